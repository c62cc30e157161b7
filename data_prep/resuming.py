"""Shard sets that are written over several runs, by several processes: what is finished stays, however a run ended.

    shard-000000.tar     there when it is complete
    .shard-000000.json   its record, until there is a manifest
    {task}.json          what the folder is for

Either the samples of each shard are known in advance and shards are written in any order (`ResumableShards`), or what
lies in a shard depends on the samples before it (`ResumableShardWriter`).
"""

from __future__ import annotations

import bisect
import dataclasses
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from data_prep.processes import ALONE, Processes
from data_prep.shards import Manifest, ShardFile, ShardInfo, ShardWriter, shard_name
from ldgan.engine.cli import UserError
from ldgan.engine.files import new_folder, write_atomically, writing_to
from ldgan.engine.shares import batches

SETTINGS_NAME = ".unfinished.json"  # of a `ResumableShardWriter`


def begin(folder: str | os.PathLike[str], task: str, settings: Mapping[str, Any]) -> bool:
    """Make ``folder`` with a note, ``{task}.json``, of what it is for; or check the one that an earlier run left there.

    Args:
        folder: where the output goes.
        task: what is done, "decoding" say, for the note's name and for messages.
        settings: all that the output depends on, JSON.

    Returns:
        Whether an earlier run has finished the same task.

    Raises:
        UserError: the folder is of another task or of something else, or cannot be written.
    """
    folder = Path(folder)
    path = folder / f"{task}.json"
    if path.exists():
        return _finished_before(path, task, settings)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: exists already and is no {task} to continue; choose another --out")
    with writing_to(folder), new_folder(folder) as temporary:
        _write_json(temporary / path.name, {**settings, "finished": False})
    return False


def finish(folder: str | os.PathLike[str], task: str, settings: Mapping[str, Any]) -> None:
    """Note that everything is there."""
    with writing_to(Path(folder)):
        _write_json(Path(folder) / f"{task}.json", {**settings, "finished": True})


def _finished_before(path: Path, task: str, settings: Mapping[str, Any]) -> bool:
    found = _read_settings(path, "choose another --out", "finished")
    finished = found.pop("finished")
    if (key := _difference(found, settings)) is not None:
        raise UserError(
            f"{path.parent}: exists already, of another {task} ({key} {found.get(key)}, now {settings.get(key)});"
            " choose another --out"
        )
    return finished is True


def _read_settings(path: Path, remedy: str, *keys: str) -> dict[str, Any]:
    """What was noted, with ``keys`` at least; raises `UserError` where it is damaged."""
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")).items())
        for key in keys:
            found[key]
    except (AttributeError, KeyError, ValueError) as error:
        raise UserError(f"{path}: is damaged ({error}); {remedy}") from error
    return found


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """A key in which settings that were noted and those of now differ, or None."""
    wanted = json.loads(json.dumps(wanted))
    return next((key for key in {**wanted, **found} if found.get(key) != wanted.get(key)), None)


def _write_json(path: Path, fields: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(fields, indent=2) + "\n")


def batches_of_blocks(blocks: Sequence[range], batch_size: int) -> list[range]:
    """Cut blocks into batches; a block's last batch may be smaller."""
    return [batch for block in blocks for batch in batches(block, batch_size)]


class Record(NamedTuple):
    """What is known of a complete shard: what the manifest is to say of it, and what it took of the runs' time.

    ``has_captions`` and ``notes``, JSON, are those of a `ResumableShardWriter`.
    """

    info: ShardInfo
    seconds: float
    has_captions: bool = False
    notes: Mapping[str, Any] = {}

    def to_json(self) -> str:
        """For `of_json`."""
        return json.dumps({**self._asdict(), "info": dataclasses.asdict(self.info)})

    @classmethod
    def of_json(cls, text: str) -> Record:
        """Raises KeyError, TypeError or ValueError for what is no record."""
        fields = json.loads(text)
        return cls(**{**fields, "info": ShardInfo(**fields["info"])})


class ShardFolder:
    """A folder whose shards are complete or absent, each with its record; shards are called by their numbers.

    ``num_processes`` write it side by side, so that of the time that a shard took this one, so large a part counts.
    """

    def __init__(self, folder: Path, num_processes: int = 1) -> None:
        self.folder = folder
        self._num_processes = num_processes
        self._clock = time.monotonic()

    def is_complete(self, shard: int) -> bool:
        """Whether a shard is there, and as long as its record says, if it has one."""
        path, record = self.path(shard), self._read_record(shard)
        return path.exists() and (record is None or record.info.num_bytes == path.stat().st_size)

    def record(self, shard: int) -> Record | None:
        """The record of a complete shard, if it is there and whole."""
        return self._read_record(shard) if self.is_complete(shard) else None

    def open(self, shard: int) -> ShardFile:
        """Begin a shard anew."""
        for remains in (self.path(shard), self._record_path(shard)):  # of one that was lost or cut since
            remains.unlink(missing_ok=True)
        return ShardFile(self.path(shard))

    def close(self, shard: int, file: ShardFile, **fields: Any) -> Record:
        """Complete a shard, and keep a record of it with ``fields``; see `Record`."""
        info, now = file.close(), time.monotonic()
        record = Record(info, round((now - self._clock) / self._num_processes, 3), **fields)
        self._clock = now
        write_atomically(self._record_path(shard), record.to_json())
        return record

    def forget(self, num_shards: int) -> None:
        """Remove the records of the first shards; a manifest says all of them now."""
        for shard in range(num_shards):
            self._record_path(shard).unlink(missing_ok=True)

    def records(self) -> dict[int, Record]:
        """The records of all complete shards, in order."""
        numbers = sorted(int(path.stem[-6:]) for path in self.folder.glob(f".shard-{'[0-9]' * 6}.json"))
        return {number: record for number in numbers if (record := self.record(number)) is not None}

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self.folder / shard_name(shard)

    def _read_record(self, shard: int) -> Record | None:
        try:
            return Record.of_json(self._record_path(shard).read_text(encoding="utf-8"))
        except (FileNotFoundError, KeyError, TypeError, ValueError):  # a damaged record is none
            return None

    def _record_path(self, shard: int) -> Path:
        return self.folder / f".shard-{shard:06d}.json"


class ResumableShards:
    """The shards of a set that several processes and runs write; safe to use from several threads.

    ``blocks`` are the sample numbers of each shard. What a shard holds depends on its block alone, so that it has the
    same bytes on any number of processes, interrupted or not.
    """

    def __init__(self, folder: str | os.PathLike[str], blocks: Sequence[range], num_processes: int = 1) -> None:
        self.folder, self.blocks = Path(folder), list(blocks)
        self._shards = ShardFolder(self.folder, num_processes)
        self._first_numbers = [block.start for block in self.blocks]
        self._lock = threading.Lock()
        self._open: dict[int, _OrderedShard] = {}
        self._complete: set[int] = set()

    def is_written(self, shard: int) -> bool:
        """Whether a shard is complete, and still as long as it was then."""
        with self._lock:
            if shard not in self._complete and self._shards.is_complete(shard):
                self._complete.add(shard)
            return shard in self._complete

    def unfinished(self) -> list[range]:
        """The blocks whose shards are not complete."""
        return [block for shard, block in enumerate(self.blocks) if not self.is_written(shard)]

    def write(self, number: int, sample: Mapping[str, bytes]) -> None:
        """Append a sample, extension -> content, to its shard, after those before it."""
        shard = bisect.bisect_right(self._first_numbers, number) - 1
        with self._lock:
            if shard not in self._open:
                self._open[shard] = _OrderedShard(self._shards.open(shard), self.blocks[shard])
            self._open[shard].put(number, sample)
            if self._open[shard].is_full:
                self._shards.close(shard, self._open[shard].file)
                del self._open[shard]

    def close(self) -> None:
        """Abandon shards that are not complete; the next run writes them again."""
        for shard in self._open.values():
            shard.file.abandon()
        self._open.clear()

    def seconds(self) -> float:
        """Wall-clock time of all runs that went into complete shards, as far as there are records."""
        return round(sum(record.seconds for record in self._shards.records().values()), 3)

    def write_manifest(
        self,
        kind: str,
        class_names: Sequence[str] | None,
        details: Mapping[str, Any],
        seconds: float,
        *,
        has_captions: bool = False,
    ) -> None:
        """Make the shards of all processes and runs a shard set, see `Manifest`; the records have served then."""
        with writing_to(self.folder):
            manifest = Manifest(
                kind=kind,
                num_samples=sum(map(len, self.blocks)),
                shards=tuple(map(self._info, range(len(self.blocks)))),
                class_names=list(class_names) if class_names is not None else None,
                has_captions=has_captions,
                seconds=seconds,
                details=dict(details),
            )
            manifest.write(self.folder)
            self._shards.forget(len(self.blocks))

    def _info(self, shard: int) -> ShardInfo:
        if (record := self._shards.record(shard)) is not None:
            return record.info
        return ShardInfo.of_file(self._shards.path(shard), len(self.blocks[shard]))  # killed between shard and record


class _OrderedShard:
    """A tar in the making, whose samples arrive in nearly the right order."""

    def __init__(self, file: ShardFile, numbers: range) -> None:
        self.file = file
        self._numbers, self._next = numbers, numbers.start
        self._early: dict[int, Mapping[str, bytes]] = {}

    def put(self, number: int, sample: Mapping[str, bytes]) -> None:
        self._early[number] = sample
        while self._next in self._early:
            self.file.write(self._next, self._early.pop(self._next))
            self._next += 1

    @property
    def is_full(self) -> bool:
        return self._next == self._numbers.stop


class ResumableShardWriter(ShardWriter):
    """A `ShardWriter` that goes on after the shards that an earlier one has finished, be it killed or stopped.

    The hidden folder beside ``out`` stays when a shard in it is finished. With each goes a record of the caller's
    ``notes()``, JSON, about all that came after the shard before it. Those of earlier runs are in ``earlier_notes``, in
    order, and ``num_samples`` is what they have written: the caller goes on with the sample after these. A shard that
    was lost or cut meanwhile counts as not finished. In ``scratch``, a folder that need not exist, the caller may keep
    what it likes until the set is complete.

    Several ``processes`` can write one set: each is given all samples, in the same order, and writes every shard whose
    number modulo theirs is its own. At the end they wait for each other; ``manifest`` is set on the main one. Runs may
    differ in the number of processes.

    Raises `UserError` as `ShardWriter` does; where the earlier run had other ``details`` or shard sizes, or notes of
    the same samples differ from its own; and while another process is writing.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        kind: str,
        *,
        notes: Callable[[], Mapping[str, Any]],
        samples_per_shard: int = 1000,
        class_names: Sequence[str] | None = None,
        details: Mapping[str, Any] | None = None,
        processes: Processes = ALONE,
    ) -> None:
        super().__init__(out, kind, samples_per_shard=samples_per_shard, class_names=class_names, details=details)
        self.folder = self.out.parent / f".{self.out.name}.partial"
        self.scratch = self.folder / "scratch"
        self.earlier_notes: list[Mapping[str, Any]] = []
        self._settings = {"samples_per_shard": samples_per_shard, "kind": kind, **self.details}
        self._take_notes = notes
        self._processes = processes
        self._writing = FileLock(self._lock_path(processes.index))
        self._finished: dict[int, Record] = {}  # shards by number, of all processes, when this one began

    def __enter__(self) -> ResumableShardWriter:
        self._make_folder(exist_ok=True)
        self._folder = ShardFolder(self.folder, self._processes.count)
        self._lock_out_others()
        try:
            if self._processes.is_main:
                self._check_settings()
            self._take_over()
            self._processes.wait()  # until all have seen what is finished, before anything is added
            self._check_shared()
        except BaseException:
            self._writing.release()
            raise
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if exc_type is None:
                self._finish()
        finally:
            if self._shard is not None:
                self._shard.abandon()
            if self._processes.count == 1 and not self._shards and not self.scratch.exists():
                shutil.rmtree(self.folder, ignore_errors=True)
            self._writing.release()

    def write(self, sample: Mapping[str, bytes]) -> None:
        """See `ShardWriter.write`; a sample of a shard that is another's, or finished, is counted only."""
        number = len(self._shards)
        if number % self._processes.count == self._processes.index and number not in self._finished:
            super().write(sample)
            return
        self.num_samples += 1
        self._has_captions |= "txt" in sample
        if self.num_samples % self._samples_per_shard == 0:
            self._pass_over(number)

    def _pass_over(self, number: int) -> None:
        notes = json.loads(json.dumps(self._take_notes()))  # the next ones are to be of the next shard alone
        if number in self._finished and self._finished[number].notes != notes:
            raise UserError(
                f"the source has changed since {self.folder} was begun with it; remove that folder to begin anew"
            )
        self._shards.append(ShardInfo(shard_name(number), 0, 0, ""))  # until `_finish`

    def _check_settings(self) -> None:
        path = self.folder / SETTINGS_NAME
        if not path.exists():
            _write_json(path, self._settings)
        found = _read_settings(path, f"remove {self.folder} to begin anew")
        if (key := _difference(found, self._settings)) is not None:
            raise UserError(
                f"{self.folder} is an unfinished set with another {key} ({found.get(key)}, now"
                f" {self._settings.get(key)}); go on with the same, or remove it"
            )

    def _lock_out_others(self) -> None:
        """Keep other processes out until `__exit__`, or the end of this process."""
        try:
            self._writing.acquire(blocking=False)
        except Timeout as error:
            message = f"another process is writing {self.out}; wait for it, or choose another output folder"
            raise UserError(message) from error

    def _take_over(self) -> None:
        """Go on after the shards that are finished without a gap."""
        self._finished = self._folder.records()
        while (number := len(self._shards)) in self._finished:
            record = self._finished[number]
            self._shards.append(record.info)
            self.num_samples += record.info.num_samples
            self._has_captions |= record.has_captions
            self.earlier_notes.append(record.notes)

    def _check_shared(self) -> None:
        if not all(self._lock_path(index).exists() for index in range(self._processes.count)):
            raise UserError(f"{self.folder} is not the same for all processes; choose an --out that all machines share")

    def _open_shard(self, number: int) -> ShardFile:
        return self._folder.open(number)

    def _close_shard(self, number: int, shard: ShardFile) -> ShardInfo:
        return self._folder.close(number, shard, has_captions=self._has_captions, notes=self._take_notes()).info

    def _finish(self) -> None:
        """Complete the set when all processes have written their shards; return when it is there."""
        self._end_shard()
        self._processes.wait()
        if self._processes.is_main:
            finished = self._folder.records()
            num_shards = math.ceil(self.num_samples / self._samples_per_shard)
            self._shards = [finished[number].info for number in range(num_shards)]
            shutil.rmtree(self.scratch, ignore_errors=True)
            self._complete(sum(record.seconds for record in finished.values()))
            for path in self.out.glob(".*"):  # settings, records and locks
                path.unlink()
        self._processes.wait()

    def _lock_path(self, process: int) -> Path:
        return self.folder / f".writer-{process}.lock"
