"""The bookkeeping of a training run, so that a stage's loop only orders: step, look, go on.

A session resumes the run in its folder, logs, stops on losses that are no numbers, and saves checkpoints. The
loop of a stage is

    with session.naming_faults():
        for step in session.steps():
            session.record(step, trainer.step(step, batches))
        session.finish({...})

A checkpoint says, besides its own step, which one is the best so far; so a run that was interrupted anywhere goes on
with what it knew at the step that it goes on from. The last one holds the summary too.

A run that is sent SIGTERM or SIGUSR1 finishes the step under way, saves a checkpoint and exits, on all processes.
What ends it otherwise without being an error of the code (no memory, a process lost, a full disk) becomes one line.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from signal import Signals
from typing import Any, Literal, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, set_seed
from torch import Tensor

from ldgan.engine.accumulation import Accumulation, Split
from ldgan.engine.checkpoint import (
    DESCRIPTION_FILE,
    DamagedCheckpointError,
    Stateful,
    load_thing,
    read_description,
    save_checkpoint,
    tensors_of,
)
from ldgan.engine.cli import UserError
from ldgan.engine.config import MISSING, option, to_dict, to_yaml
from ldgan.engine.faults import lost_process, lost_reader, out_of_memory
from ldgan.engine.files import writing_to
from ldgan.engine.progress import ProgressBar, progress_bar
from ldgan.engine.run import Best, RunFolder
from ldgan.engine.seeding import generator
from ldgan.engine.signals import exit_status, noting_signals
from ldgan.engine.trackers import Tracker, check_finite


@dataclass
class RunConfig:
    """Where a run lives, how long it is, and how often it says something."""

    dir: str = option(MISSING, "folder of the run; one that holds the same run is resumed")
    num_steps: int = option(1000, "optimisation steps")
    batch_size: int = option(64, "images per step, over all processes")
    num_micro_batches: int = option(
        0, "parts of the batch, over all processes, whose gradients are averaged; 0: one for each process"
    )
    precision: Literal["fp32", "bf16"] = option("fp32", "arithmetic of the networks; weights stay fp32")
    seed: int = option(0, "decides initial weights, order of the data and all noise")
    num_workers: int = option(0, "processes that read data, for each training process; 0: read in the process itself")
    num_threads: int = option(0, "CPU threads of each process; 0: all cores, shared out among the processes")
    timeout_minutes: float = option(30.0, "longest wait for another process; after it, that one counts as lost")
    log_every_steps: int = option(50, "steps between two rows of scalars")
    preview_every_steps: int = option(500, "steps between two image grids")
    checkpoint_every_steps: int = option(500, "steps between two checkpoints")
    keep_checkpoints: int = option(2, "newest checkpoints that are kept, besides the best one")

    def micro_batches(self, num_processes: int) -> tuple[int, int]:
        """(number of micro-batches, images in each) for ``num_processes``; raises UserError if they do not divide."""
        number = self.num_micro_batches or num_processes
        if number % num_processes or self.batch_size % number:
            raise UserError(
                f"run.batch_size {self.batch_size} in {number} micro-batches (run.num_micro_batches) cannot be"
                f" shared by {num_processes} processes; choose numbers that divide"
            )
        return number, self.batch_size // number

    def accumulation(self, accelerator: Accelerator) -> Accumulation:
        """How trainers take the steps of this run."""
        number, _ = self.micro_batches(accelerator.num_processes)
        return Accumulation(accelerator, number, self.batch_size, self.seed)


# What may differ when a run is resumed. A run that is made longer goes on from the step it reached, on the
# schedules of the new length. What a change of the machine brings along is said; see `Split`.
MAY_CHANGE = (
    "run.num_steps",
    "run.num_micro_batches",
    "run.precision",
    "run.timeout_minutes",
    "run.num_workers",
    "run.num_threads",
    "run.log_every_steps",
    "run.preview_every_steps",
    "run.checkpoint_every_steps",
    "run.keep_checkpoints",
    "evaluation.*",  # it reads weights and draws with seeds of its own
)


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of ``run.precision``


def make_accelerator(
    precision: Literal["fp32", "bf16"], num_threads: int = 0, timeout_minutes: float = 30.0
) -> Accelerator:
    """The accelerator of this process, on whatever `accelerate launch` chose; the numbers are those of `RunConfig`.

    Raises:
        UserError: the other processes did not come in time.
    """
    # Said outright, since two processes without an accelerator would otherwise not find each other.
    cpu = not torch.accelerator.is_available()
    mixed_precision = {"fp32": "no", "bf16": "bf16"}[precision]
    # accelerate 1.15 drops a timeout of exactly 10 minutes as its own default, and torch's of 30 may hold instead.
    timeout = timedelta(minutes=timeout_minutes, milliseconds=1)
    handlers = [InitProcessGroupKwargs(timeout=timeout)]
    try:
        accelerator = Accelerator(cpu=cpu, mixed_precision=mixed_precision, kwargs_handlers=handlers)
    except RuntimeError as error:
        if (reason := lost_process(error)) is None:
            raise
        raise UserError(f"the processes of the run did not find each other ({reason}); start all of them") from error
    if cpu:
        # Otherwise `accelerate launch` leaves a process without an accelerator a single thread.
        num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(num_threads or max(1, num_cores // accelerator.num_processes))
    return accelerator


def start(run: RunConfig) -> Accelerator:
    """The accelerator of a run, whose seed decides the weights that are drawn from here on."""
    accelerator = make_accelerator(run.precision, run.num_threads, run.timeout_minutes)
    set_seed(run.seed)
    return accelerator


def add_precision_flag(parser: argparse.ArgumentParser) -> None:
    """``--precision`` of commands that have no `RunConfig`."""
    parser.add_argument(
        "--precision", choices=tuple(DTYPES), default="fp32", help="arithmetic of the networks (default: fp32)"
    )


def describe_machine(accelerator: Accelerator) -> dict[str, Any]:
    """On what a number was computed, for the record of an evaluation."""
    gpu = {"gpu": torch.cuda.get_device_name(accelerator.device)} if accelerator.device.type == "cuda" else {}
    return {
        "device": str(accelerator.device),
        **gpu,
        "num_processes": accelerator.num_processes,
        "num_threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "torch": torch.__version__,
    }


class Session:
    """One run from its first or last saved step to its end; made on every process, written by the main one."""

    def __init__(
        self,
        accelerator: Accelerator,
        config: Any,
        things: Mapping[str, Stateful],
        description: Mapping[str, Any],
    ) -> None:
        """``config`` has a section ``run``; ``things`` are saved by name, ``description`` goes into checkpoints.

        Raises:
            UserError: the folder holds another run or cannot be written, its checkpoint does not fit ``things``, or
                all are damaged; or another process was lost.
        """
        self._accelerator, self._things = accelerator, things
        self._settings: RunConfig = config.run
        self._description = {**description, "config": to_dict(config)}
        num_micro_batches, _ = self._settings.micro_batches(accelerator.num_processes)
        self._split = Split(accelerator.num_processes, num_micro_batches, self._settings.precision)
        self.run = RunFolder(Path(self._settings.dir))
        self._step = 0  # the one under way, for `naming_faults`
        with self.naming_faults():
            if accelerator.is_main_process:
                with writing_to(self.run.path):
                    RunFolder.create_or_resume(self.run.path, to_yaml(config), MAY_CHANGE)
            accelerator.wait_for_everyone()
            self.first_step, self._seconds_before, self._best = self._resume()
        with writing_to(self.run.path):
            self._tracker = Tracker(self.run, accelerator.is_main_process, self.first_step)
        self._step = self.first_step
        self._started = time.monotonic()
        self._terms: list[tuple[int, dict[str, Tensor]]] = []

    @property
    def finished(self) -> bool:
        """Whether the run had reached its last step before."""
        return self.first_step >= self._settings.num_steps

    @property
    def seconds(self) -> float:
        """Wall-clock seconds spent on the steps done so far, interruptions left out."""
        return self._seconds_before + time.monotonic() - self._started

    def steps(self) -> Iterator[int]:
        """Yield the steps to do, first_step + 1 .. num_steps; log and save after each as the config asks.

        Raises:
            SystemExit: with status 143 after SIGTERM and 138 after SIGUSR1, once a checkpoint is saved; a run that
                has no step left to do goes on to its end instead.
        """
        settings = self._settings
        timeout = timedelta(minutes=settings.timeout_minutes)
        with self._progress_bar() as bar, noting_signals(timeout) as notices:
            for step in range(self.first_step + 1, settings.num_steps + 1):
                self._step = step
                # Whatever draws from the global generator, dropout for one, becomes a function of the step.
                rank = self._accelerator.process_index
                torch.manual_seed(generator("cpu", settings.seed, "global", step, rank).initial_seed())
                yield step
                last, best = step == settings.num_steps, self._best is not None and self._best.step == step
                stopped_by = notices.agreed()
                saved = best or stopped_by is not None or step % settings.checkpoint_every_steps == 0
                if last or saved or step % settings.log_every_steps == 0:
                    self._log(bar)
                if saved and not last:
                    self._save(step, {})
                if stopped_by is not None and not last:
                    self._stop(step, stopped_by)

    @contextmanager
    def naming_faults(self) -> Iterator[None]:
        """Turn what no code can mend in this block into one line: the step, the reason, and how to go on.

        Raises:
            UserError: memory ran out, another process of the run died or was silent for ``run.timeout_minutes``, or
                one that reads data for it was killed.
        """
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if out_of_memory(error):
                number, size = self._split.num_micro_batches, self._settings.batch_size // self._split.num_micro_batches
                what = f"out of memory with {size} images of the batch of {self._settings.batch_size} at a time"
                advice = f"set run.num_micro_batches higher than {number}, or run.precision=bf16, and start it again"
            elif reason := lost_process(error):
                what = f"another process of the run died or hangs ({reason})"
                advice = "see what it said last, then run the same command to go on"
            elif reason := lost_reader(error):
                what = f"a process that reads data was killed ({reason})"
                advice = "free memory or choose fewer run.num_workers, then run the same command to go on"
            else:
                raise
            raise UserError(f"step {self._step:,}: {what}; {self._last_checkpoint()}; {advice}") from error

    def record(self, step: int, terms: dict[str, Tensor]) -> None:
        """Keep the detached scalar terms of a step until the next log."""
        self._terms.append((step, terms))

    def wants_preview(self, step: int) -> bool:
        """Whether it is time for an image grid, on the main process."""
        return self.is_due(step, self._settings.preview_every_steps) and self._accelerator.is_main_process

    def is_due(self, step: int, every_steps: int) -> bool:
        """Whether something that is done every so many steps, and after the last one, is to be done now."""
        return step % every_steps == 0 or step == self._settings.num_steps

    def preview(self, step: int, name: str, images: Tensor, columns: int) -> None:
        """Log uint8 images (N, C, H, W) as one grid."""
        with writing_to(self.run.path):
            self._tracker.log_images(step, name, images, columns)

    def log_evaluation(self, step: int, scalars: Mapping[str, float]) -> None:
        """Log what was measured after a step, as a row of its own."""
        with writing_to(self.run.path):
            self._tracker.log_scalars(step, step * self._settings.batch_size, scalars)

    def keep_best(self, step: int, name: str, value: float, better: Literal["lower", "higher"]) -> bool:
        """Have this step's checkpoint kept as the best if ``value`` of the metric ``name`` is better than all before.

        To be called by all processes in the turn of the step, whose checkpoint is saved when the turn ends; the
        ``value`` of the main process counts. A value that is not finite is never best, and the first one of
        another metric than before always.
        """
        (value,) = broadcast_object_list([value])
        former = self._best.value if self._best is not None and self._best.metric == name else None
        ahead = former is None or (value < former if better == "lower" else value > former)
        if math.isfinite(value) and ahead:
            self._best = Best(step, name, value)
        return self._best is not None and self._best.step == step

    def finish(self, results: Mapping[str, Any]) -> None:
        """Save the last checkpoint, with ``results`` in its description, and the run's summary."""
        summary = {"num_steps": self._settings.num_steps, "seconds": round(self.seconds, 1), **results}
        self._save(self._settings.num_steps, {**results, "summary": summary})
        self._close()

    def _progress_bar(self) -> AbstractContextManager[ProgressBar]:
        main, num_steps = self._accelerator.is_main_process, self._settings.num_steps
        return progress_bar("training", num_steps, "steps", initial=self.first_step, enabled=main)

    def _stop(self, step: int, stopped_by: Signals) -> NoReturn:
        """End the process after a step that is saved, and say how to go on."""
        self._close()
        self._say(f"{stopped_by.name}: {self.run.path} is saved after step {step:,}; run the same command to go on")
        raise SystemExit(exit_status(stopped_by))

    def _close(self) -> None:
        with writing_to(self.run.path):
            self._tracker.close()

    def _last_checkpoint(self) -> str:
        latest = self.run.latest_checkpoint()
        return f"last checkpoint: {latest}" if latest else "no checkpoint yet"

    def _say(self, line: str) -> None:
        """Print a line on stderr, once for all processes."""
        if self._accelerator.is_main_process:
            print(line, file=sys.stderr, flush=True)

    def _resume(self) -> tuple[int, float, Best | None]:
        """Load the newest undamaged checkpoint into the things; (its step, its seconds, the best so far)."""
        latest = self._choose_checkpoint()
        if latest is None:
            return 0, 0.0, None
        for name, thing in self._things.items():
            load_thing(latest, name, thing)
        step, seconds, best, summary, split = _read_progress(latest)
        self._accelerator.print(f"resuming {self.run.path} after step {step:,}")
        if split is not None and (changes := self._split.changes_since(split)) is not None:
            self._say(f"note: {changes}")
        if best is not None and not self.run.has_checkpoint(best.step):
            best = None  # somebody removed it
        if self._accelerator.is_main_process:
            with writing_to(self.run.path):
                self._finish_save(best, summary)  # the run may have been killed in the midst of it
        return step, seconds, best

    def _choose_checkpoint(self) -> Path | None:
        """The checkpoint to go on from, None if there is none yet; the main process looks, all get its answer."""
        latest: Path | None = None
        if self._accelerator.is_main_process:
            latest, warnings = self.run.undamaged_checkpoint()
            for warning in warnings:
                self._say(f"warning: {warning}")
        (latest,) = broadcast_object_list([latest])
        return latest

    def _log(self, bar: ProgressBar) -> None:
        """Average the recorded terms over processes and steps, check that they are numbers, and write them."""
        if not self._terms:
            return
        num_steps, step = len(self._terms), self._terms[-1][0]
        # Reading the values waits for the device: once a log interval, not once a step.
        values = torch.stack([value.detach().float() for _, terms in self._terms for value in terms.values()])
        averaged = iter(self._accelerator.reduce(values, "mean").tolist())
        history: dict[str, list[float]] = {}
        for number, terms in self._terms:
            numbers = {name: next(averaged) for name in terms}
            check_finite(numbers, number, self.run.latest_checkpoint())
            for name, value in numbers.items():
                history.setdefault(name, []).append(value)
        self._terms.clear()
        means = {name: sum(values) / len(values) for name, values in history.items()}
        with writing_to(self.run.path):
            self._tracker.log_scalars(step, step * self._settings.batch_size, means)
        bar.advance(num_steps, "  ".join(f"{name} {value:.4g}" for name, value in means.items()))

    def _save(self, step: int, results: Mapping[str, Any]) -> None:
        num_images = step * self._settings.batch_size
        progress = {"step": step, "num_images": num_images, "seconds": round(self.seconds, 3)}
        best = {} if self._best is None else {"best": self._best._asdict()}
        if self._accelerator.is_main_process:
            self._check_weights(step)
            description = {**self._description, **progress, "split": self._split._asdict(), **best, **results}
            with writing_to(self.run.checkpoint_path(step)):
                save_checkpoint(self.run.checkpoint_path(step), self._things, description)
                self._finish_save(self._best, results.get("summary"))
        self._accelerator.wait_for_everyone()

    def _check_weights(self, step: int) -> None:
        """Raise a UserError if something to be saved is not finite: a loss can be a number and its gradient none."""
        for name, thing in self._things.items():
            for key, tensor in tensors_of(thing.state_dict()).items():
                if not bool(tensor.isfinite().all()):
                    raise UserError(
                        f"step {step:,}: {key} of {name} is not finite; {self._last_checkpoint()};"
                        " a lower learning rate may help"
                    )

    def _finish_save(self, best: Best | None, summary: dict[str, Any] | None) -> None:
        """Write what belongs to the newest checkpoint, and remove those that it makes superfluous."""
        if best is not None:
            self.run.write_best(best)
        protect = [] if best is None else [self.run.checkpoint_path(best.step)]
        self.run.prune_checkpoints(self._settings.keep_checkpoints, protect)
        if summary is not None:
            self.run.write_summary(summary)


def _read_progress(folder: Path) -> tuple[int, float, Best | None, dict[str, Any] | None, Split | None]:
    """Step, seconds, the best so far, the summary if the run had ended, and the split, as `Session` saved them.

    Checkpoints made before there was a split have none.
    """
    saved = read_description(folder)
    try:
        best = saved.get("best")
        best = Best(int(best["step"]), str(best["metric"]), float(best["value"])) if best else None
        split = saved.get("split")
        if split is not None:
            split = Split(int(split["num_processes"]), int(split["num_micro_batches"]), str(split["precision"]))
        return int(saved["step"]), float(saved["seconds"]), best, saved.get("summary"), split
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        reason = f"step, seconds, best or split are not those of a run ({error})"
        raise DamagedCheckpointError(f"{folder / DESCRIPTION_FILE}: damaged: {reason}") from error
