"""The run folder: what a training run writes, and where.

::

    config.yaml                   the resolved config
    checkpoints/step_000001000/   see `ldgan.engine.checkpoint`
    checkpoints/damaged_step_.../ one that was found damaged when the run was resumed; nothing reads or removes it
    best.json                     the best checkpoint so far, by a metric measured during training: its step, metric,
                                  value and folder; commands take RUN/best for it, as they take RUN for the latest
    samples/                      image grids (PNG)
    tensorboard/                  event files
    metrics.jsonl                 the same scalars, one JSON object a line
    summary.json                  the results, written when the run ends
    evaluations/0001/             numbers and pictures of an evaluation by the evaluate commands
    evaluations.jsonl             what the evaluate commands measured, one JSON object each
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Collection
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from ldgan.engine.checkpoint import DESCRIPTION_FILE, DamagedCheckpointError, check_checkpoint
from ldgan.engine.cli import UserError
from ldgan.engine.config import flatten, parse_yaml, read_yaml
from ldgan.engine.files import remove_folder, temporary_name, write_atomically

STEP_FOLDER = re.compile(r"step_(\d{9,})")
BEST = "best"  # RUN/best stands for the best checkpoint


class Best(NamedTuple):
    """What the best checkpoint so far is best by."""

    step: int
    metric: str
    value: float


class RunFolder:
    """Paths and files of one run. Only the main process writes; others may look paths up."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_path = path / "config.yaml"
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"
        self.tensorboard = path / "tensorboard"
        self.metrics_path = path / "metrics.jsonl"
        self.summary_path = path / "summary.json"
        self.best_path = path / f"{BEST}.json"

    @classmethod
    def create_or_resume(cls, path: Path, config_yaml: str, may_change: Collection[str] = ()) -> RunFolder:
        """Start a run in ``path``, or resume the one that is there if it has the same config.

        ``may_change`` names dotted keys that do not alter what a run is, such as its length or how often it
        logs, or all keys of a section, as ``logs.*``; where they differ, the folder's config becomes the new one.

        Raises:
            UserError: if ``path`` holds a run with another config, or files that belong to no run.
        """
        run = cls(path)
        if run.config_path.is_file():
            run._check_same_config(config_yaml, may_change)
        elif path.exists() and (not path.is_dir() or set(path.iterdir()) - {temporary_name(run.config_path)}):
            raise UserError(f"{path}: not a run folder (no config.yaml); choose a new or an empty folder")
        write_atomically(run.config_path, config_yaml)
        return run

    def checkpoint_path(self, step: int) -> Path:
        """Return the folder for the checkpoint after ``step`` optimisation steps."""
        return self.checkpoints / f"step_{step:09d}"

    def has_checkpoint(self, step: int) -> bool:
        """Whether there is a complete checkpoint of this step."""
        return (self.checkpoint_path(step) / DESCRIPTION_FILE).is_file()

    def latest_checkpoint(self) -> Path | None:
        """Return the complete checkpoint with the highest step, None if there is none yet."""
        complete = self._complete_checkpoints()
        return complete[-1] if complete else None

    def undamaged_checkpoint(self) -> tuple[Path | None, list[str]]:
        """Return the newest checkpoint that is as it was written, and what to say of newer ones that are not.

        Those are set aside as ``damaged_<name>``, and None is returned only if there never was a checkpoint.

        Raises:
            UserError: if all are damaged; they stay where they are, so that no run starts anew by mistake.
        """
        damaged: dict[Path, str] = {}
        for folder in reversed(self._step_folders()):
            try:
                check_checkpoint(folder)
            except DamagedCheckpointError as error:
                damaged[folder] = error.reason
                continue
            names = {former: self._set_aside(former) for former in damaged}
            return folder, [
                f"{reason}; kept as {names[former]}, going on from {folder.name}" for former, reason in damaged.items()
            ]
        if damaged:
            raise UserError(
                f"{self.checkpoints}: no checkpoint is undamaged ({'; '.join(damaged.values())}); put a copy of one"
                " back, or remove the folder to train from the first step"
            )
        return None, []

    def prune_checkpoints(self, keep: int, protect: Collection[Path] = ()) -> None:
        """Remove all but the ``keep`` (at least 1) newest checkpoints and those in ``protect``.

        What an interrupted save or removal left behind goes too, so no save may be under way.
        """
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        for folder in self._complete_checkpoints()[:-keep]:
            if folder not in protect:
                remove_folder(folder)
        for leftover in self.checkpoints.glob(".*.tmp"):
            shutil.rmtree(leftover)

    def best_checkpoint(self) -> Path | None:
        """Return the checkpoint that `write_best` named, None if there is none or it is gone.

        Raises:
            UserError: if the file that names it is damaged.
        """
        try:
            step = int(json.loads(self.best_path.read_text(encoding="utf-8"))["step"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.best_path}: damaged ({error}); name a checkpoint of the run instead") from error
        return self.checkpoint_path(step) if self.has_checkpoint(step) else None

    def write_best(self, best: Best) -> None:
        """Say which complete checkpoint is the best one."""
        record = best._asdict() | {"checkpoint": str(self.checkpoint_path(best.step).relative_to(self.path))}
        write_atomically(self.best_path, json.dumps(record, indent=2) + "\n")

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write the results of the run as JSON."""
        write_atomically(self.summary_path, json.dumps(summary, indent=2) + "\n")

    def read_summary(self) -> dict[str, Any]:
        """Return what `write_summary` wrote.

        Raises:
            UserError: if the run has not ended, or the file is damaged.
        """
        try:
            return json.loads(self.summary_path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(f"{self.summary_path}: not there yet; it is written when the run ends") from error
        except ValueError as error:
            raise UserError(f"{self.summary_path}: damaged ({error})") from error

    def _step_folders(self) -> list[Path]:
        """Return all folders with a checkpoint's name, by rising step."""
        names = ((STEP_FOLDER.fullmatch(folder.name), folder) for folder in self.checkpoints.glob("step_*"))
        steps = {int(match[1]): folder for match, folder in names if match}
        return [steps[step] for step in sorted(steps)]

    def _complete_checkpoints(self) -> list[Path]:
        """Return the checkpoints by rising step; a folder gets its name when it is complete."""
        return [folder for folder in self._step_folders() if (folder / DESCRIPTION_FILE).is_file()]

    def _set_aside(self, folder: Path) -> str:
        """Give a damaged checkpoint a name that nothing looks for, and return it."""
        name, numbers = f"damaged_{folder.name}", itertools.count(2)
        while (folder.parent / name).exists():
            name = f"damaged_{folder.name}_{next(numbers)}"
        folder.rename(folder.parent / name)
        return name

    def _check_same_config(self, config_yaml: str, may_change: Collection[str]) -> None:
        old = flatten(read_yaml(self.config_path))
        new = flatten(parse_yaml(config_yaml, "the config asked for"))
        different = [
            f"{key}: {old.get(key, 'nothing')} in the run, {new.get(key, 'nothing')} asked"
            for key in dict.fromkeys([*old, *new])
            if not any(fnmatchcase(key, pattern) for pattern in may_change)
            and (key not in old or key not in new or old[key] != new[key])
        ]
        if different:
            raise UserError(
                f"{self.path}: holds a run with another config ({'; '.join(different)});"
                " choose another folder, or the run's own settings to resume it"
            )


def resolve_checkpoint(path: Path) -> Path:
    """Return the checkpoint folder that ``path`` means: itself, the latest one of a run, or the best one of RUN/best.

    Raises:
        UserError: if ``path`` is none of these, or the run keeps no best checkpoint.
    """
    if (path / DESCRIPTION_FILE).is_file():
        return path
    run, parent = RunFolder(path), RunFolder(path.parent)
    if latest := run.latest_checkpoint():
        return latest
    if path.name == BEST and (best := parent.best_checkpoint()):
        return best
    if path.name == BEST and parent.config_path.is_file():
        found = "the run keeps no best checkpoint (evaluation.best)"
    elif not path.exists():
        found = "does not exist"
    elif run.config_path.is_file():
        found = "is a run that has saved no checkpoint yet"
    else:
        found = "is neither a run nor a checkpoint"
    raise UserError(f"{path}: {found}; expected a run folder or one like RUN/checkpoints/step_000001000")


def run_of(path: Path) -> Path:
    """The run that ``path``, a run or one of its checkpoints, belongs to; otherwise ``path``."""
    saved_by_run = path.parent.name == "checkpoints" and STEP_FOLDER.fullmatch(path.name)
    return path.parent.parent if saved_by_run else path


def append_evaluation(run: Path, result: dict[str, Any]) -> Path:
    """Append a result, as one line of JSON, to the history of a run's evaluations; the history's path."""
    history = run / "evaluations.jsonl"
    with history.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")
    return history


def next_evaluation(home: Path) -> Path:
    """A new folder for the results of an evaluation: the next of ``home``/evaluations/0001, 0002, ..."""
    taken = [int(path.name) for path in (home / "evaluations").glob("[0-9]*") if path.name.isdecimal()]
    return home / "evaluations" / f"{max(taken, default=0) + 1:04d}"
