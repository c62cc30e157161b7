"""Writing a shard set over several runs: what is finished stays, however a run ended."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from data_prep.processes import ALONE, Processes
from data_prep.shards import ShardInfo, ShardWriter, shard_name
from ldgan.engine.cli import UserError

JOURNAL_NAME = ".unfinished.jsonl"  # of the main process
_JOURNAL_PATTERN = ".unfinished*.jsonl"


class ResumableShardWriter(ShardWriter):
    """A `ShardWriter` that goes on after the shards that an earlier one has finished, be it killed or stopped.

    The hidden folder beside ``out`` stays when a shard in it is finished. A journal in it gets a line for each: what
    the manifest says of the shard, and the caller's ``notes()``, JSON, about everything up to its last sample. Those
    of earlier runs are in ``earlier_notes``, in order, and ``num_samples`` is what they have written: the caller goes
    on with the sample after these. In ``scratch``, a folder that need not exist, the caller may keep what it likes
    until the set is complete.

    Several ``processes`` can write one set: each is given all samples, in the same order, and writes every shard whose
    number modulo theirs is its own, with a journal of its own. At the end they wait for each other; ``manifest`` is
    set on the main one. Runs may differ in the number of processes.

    Raises `UserError` as `ShardWriter` does; where the earlier run had other ``details`` or shard sizes; and while
    another process is writing.
    """

    def __init__(
        self,
        out: Path,
        kind: str,
        *,
        notes: Callable[[], Mapping[str, Any]],
        samples_per_shard: int = 1000,
        class_names: Sequence[str] | None = None,
        details: Mapping[str, Any] | None = None,
        processes: Processes = ALONE,
    ) -> None:
        super().__init__(out, kind, samples_per_shard=samples_per_shard, class_names=class_names, details=details)
        self.folder = out.parent / f".{out.name}.partial"
        self.scratch = self.folder / "scratch"
        self.earlier_notes: list[dict[str, Any]] = []
        self._settings = {"samples_per_shard": samples_per_shard, "kind": kind, **self.details}
        self._take_notes = notes
        self._processes = processes
        self._finished: dict[str, _Finished] = {}  # shards by name, of all processes, when this one began

    def __enter__(self) -> ResumableShardWriter:
        self._started = time.monotonic()
        self._check_out()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._journal = self._journal_path(self._processes.index).open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot create {self.out}: {error.strerror}; choose another output folder") from error
        try:
            _lock(self._journal, self.out)
            self._restore()
            self._processes.wait()  # until all have seen what is finished, before anything is added
            self._check_shared()
        except BaseException:
            self._journal.close()
            raise
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if exc_type is None:
                self._finish()
        finally:
            self._journal.close()
            if self._shard is not None:
                self._shard.abandon()
            if self._processes.count == 1 and not self._shards and not self.scratch.exists():
                shutil.rmtree(self.folder, ignore_errors=True)

    def write(self, sample: Mapping[str, bytes]) -> None:
        """See `ShardWriter.write`; a sample of a shard that is another's, or finished, is counted only."""
        if self._writes(len(self._shards)):
            super().write(sample)
            return
        self.num_samples += 1
        self._has_captions |= "txt" in sample
        if self.num_samples % self._samples_per_shard == 0:
            self._take_notes()  # the next ones are to be of the next shard alone
            self._shards.append(ShardInfo(shard_name(len(self._shards)), 0, 0, ""))  # until `_finish`

    def _writes(self, number: int) -> bool:
        """Whether it falls to this process to write a shard."""
        return number % self._processes.count == self._processes.index and shard_name(number) not in self._finished

    def _restore(self) -> None:
        """Take over what the journals say is finished; what is not goes away."""
        if _cut_torn_line(self._journal):
            self._write_line(self._settings)
        self._finished = self._read_journals()
        while (name := shard_name(len(self._shards))) in self._finished:
            self._take_over(self._finished[name])
        if self._processes.is_main:
            for path in self.folder.glob("*.tar"):
                if path.name not in self._finished:
                    path.unlink()

    def _take_over(self, finished: _Finished) -> None:
        self._shards.append(finished.shard)
        self.num_samples += finished.shard.num_samples
        self._has_captions |= finished.has_captions
        self._started = time.monotonic() - finished.seconds
        self.earlier_notes.append(finished.notes)

    def _read_journals(self) -> dict[str, _Finished]:
        """The shards that this process and others have finished, now and in earlier runs, by name."""
        finished = {}
        for path in sorted(self.folder.glob(_JOURNAL_PATTERN)):
            try:
                settings, *lines = [json.loads(line) for line in _whole_lines(path)] or [None]
                shards = [_Finished.of_json(line) for line in lines]
                if settings is not None:
                    self._check_settings(settings)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise UserError(f"{path} is damaged ({error}); remove {self.folder} to begin anew") from error
            for each in shards:
                self._check_size(each.shard)
                finished[each.shard.name] = each
        return finished

    def _check_size(self, shard: ShardInfo) -> None:
        path = self.folder / shard.name
        if not path.exists() or path.stat().st_size != shard.num_bytes:
            raise UserError(f"{path} has been damaged since it was written; remove {self.folder} to begin anew")

    def _check_settings(self, found: Mapping[str, Any]) -> None:
        wanted = json.loads(json.dumps(self._settings))
        for key in wanted.keys() | found.keys():
            if found.get(key) != wanted.get(key):
                raise UserError(
                    f"{self.folder} is an unfinished set with another {key} ({found.get(key)}, now {wanted.get(key)});"
                    " go on with the same, or remove it"
                )

    def _check_shared(self) -> None:
        if not all(self._journal_path(index).exists() for index in range(self._processes.count)):
            raise UserError(f"{self.folder} is not the same for all processes; choose an --out that all machines share")

    def _close_shard(self) -> None:
        if self._shard is None:
            return
        super()._close_shard()
        shard = self._shards[-1]
        with (self.folder / shard.name).open("rb") as file:
            os.fsync(file.fileno())  # on the disk before the journal says so
        seconds = round(time.monotonic() - self._started, 3)
        self._write_line(asdict(_Finished(shard, self._has_captions, seconds, dict(self._take_notes()))))

    def _finish(self) -> None:
        """Complete the set when all processes have written their shards; return when it is there."""
        self._close_shard()
        self._processes.wait()
        if self._processes.is_main:
            finished = self._read_journals()
            num_shards = math.ceil(self.num_samples / self._samples_per_shard)
            self._shards = [finished[shard_name(number)].shard for number in range(num_shards)]
            shutil.rmtree(self.scratch, ignore_errors=True)
            super()._finish()
            for path in self.out.glob(_JOURNAL_PATTERN):
                path.unlink()
        self._processes.wait()

    def _journal_path(self, process: int) -> Path:
        return self.folder / (f".unfinished-{process}.jsonl" if process else JOURNAL_NAME)

    def _write_line(self, fields: Mapping[str, Any]) -> None:
        self._journal.write(json.dumps(fields) + "\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())


@dataclass(frozen=True)
class _Finished:
    """A line of a journal: a shard, whether there was a caption up to its end, the time until then, and notes."""

    shard: ShardInfo
    has_captions: bool
    seconds: float
    notes: dict[str, Any]

    @classmethod
    def of_json(cls, fields: Mapping[str, Any]) -> _Finished:
        """Raises KeyError or TypeError for what is no such line."""
        return cls(**{**fields, "shard": ShardInfo(**fields["shard"])})


def _lock(journal: TextIO, out: Path) -> None:
    """Keep other processes out until the file is closed, by the end of this process at the latest."""
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(f"another process is writing {out}; wait for it, or choose another output folder") from error


def _cut_torn_line(journal: TextIO) -> bool:
    """Cut off a line that was being written when its process died; whether nothing is left."""
    journal.seek(0)
    text = journal.read()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        journal.truncate(len(whole.encode()))
    return not whole


def _whole_lines(path: Path) -> list[str]:
    """The lines of a journal, without one that is being written."""
    return path.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()
