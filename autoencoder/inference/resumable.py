"""Output that goes on where it was stopped: a note of what a folder is for, and shards that are complete or absent.

The work is cut into blocks, one for each shard, that processes share out among themselves. What a shard holds depends
on its block alone, so that it has the same bytes on any number of processes, interrupted or not.
"""

from __future__ import annotations

import bisect
import dataclasses
import json
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.shards import Manifest, ShardFile, ShardInfo, shard_name
from ldgan.engine.cli import UserError
from ldgan.engine.files import commit, new_folder, temporary_name, write_atomically, writing_to
from ldgan.engine.shares import batches


def begin(folder: Path, task: str, settings: Mapping[str, Any]) -> bool:
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
    path = folder / f"{task}.json"
    if path.exists():
        return _finished_before(path, task, settings)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: exists already and is no {task} to continue; choose another --out")
    with writing_to(folder), new_folder(folder) as temporary:
        _write_note(temporary / path.name, settings, finished=False)
    return False


def finish(folder: Path, task: str, settings: Mapping[str, Any]) -> None:
    """Note that everything is there."""
    with writing_to(folder):
        _write_note(folder / f"{task}.json", settings, finished=True)


def _write_note(path: Path, settings: Mapping[str, Any], *, finished: bool) -> None:
    write_atomically(path, json.dumps({**settings, "finished": finished}, indent=2) + "\n")


def _finished_before(path: Path, task: str, settings: Mapping[str, Any]) -> bool:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        finished = found.pop("finished")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: is damaged ({error}); choose another --out") from error
    for key in {**settings, **found}:
        if found.get(key) != settings.get(key):
            raise UserError(
                f"{path.parent}: exists already, of another {task} ({key} {found.get(key)}, now {settings.get(key)});"
                " choose another --out"
            )
    return finished is True


def batches_of_blocks(blocks: Sequence[range], batch_size: int) -> list[range]:
    """Cut blocks into batches; a block's last batch may be smaller."""
    return [batch for block in blocks for batch in batches(block, batch_size)]


class ResumableShards:
    """The shards of a set that several processes and runs write; safe to use from several threads.

    ``blocks`` are the sample numbers of each shard. A shard gets its name when it is complete, and then, until there
    is a manifest, a hidden record beside it: size, hash, and what it took of the time that ``num_processes`` processes
    worked side by side.
    """

    def __init__(self, folder: Path, blocks: Sequence[range], num_processes: int = 1) -> None:
        self.folder, self.blocks = folder, list(blocks)
        self._num_processes = num_processes
        self._first_numbers = [block.start for block in self.blocks]
        self._lock = threading.Lock()
        self._open: dict[int, _OrderedShard] = {}
        self._complete: set[int] = set()
        self._clock = time.monotonic()

    def shard_of(self, number: int) -> int:
        """The shard that sample ``number`` belongs to."""
        return bisect.bisect_right(self._first_numbers, number) - 1

    def is_written(self, shard: int) -> bool:
        """Whether a shard is complete, and still as long as it was then."""
        with self._lock:
            if shard not in self._complete and self._path(shard).exists():
                record = self._read_record(shard)
                if record is None or record.info.num_bytes == self._path(shard).stat().st_size:
                    self._complete.add(shard)
            return shard in self._complete

    def unfinished(self) -> list[range]:
        """The blocks whose shards are not complete."""
        return [block for shard, block in enumerate(self.blocks) if not self.is_written(shard)]

    def write(self, number: int, sample: Mapping[str, bytes]) -> None:
        """Append a sample, extension -> content, to its shard, after those before it."""
        shard = self.shard_of(number)
        with self._lock:
            if shard not in self._open:
                for remains in (self._path(shard), self._record_path(shard)):  # of a shard that was lost or cut since
                    remains.unlink(missing_ok=True)
                self._open[shard] = _OrderedShard(self._path(shard), self.blocks[shard])
            info = self._open[shard].put(number, sample)
            if info is not None:
                self._write_record(shard, info)
                del self._open[shard]

    def close(self) -> None:
        """Abandon shards that are not complete; the next run writes them again."""
        for shard in self._open.values():
            shard.abandon()
        self._open.clear()

    def seconds(self) -> float:
        """Wall-clock time of all runs that went into complete shards, as far as there are records."""
        records = map(self._read_record, range(len(self.blocks)))
        return round(sum(record.seconds for record in records if record is not None), 3)

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
                shards=tuple(map(self._describe, range(len(self.blocks)))),
                class_names=list(class_names) if class_names is not None else None,
                has_captions=has_captions,
                seconds=seconds,
                details=dict(details),
            )
            manifest.write(self.folder)
            for shard in range(len(self.blocks)):
                self._record_path(shard).unlink(missing_ok=True)

    def _describe(self, shard: int) -> ShardInfo:
        record = self._read_record(shard)
        if record is not None:
            return record.info
        return ShardInfo.of_file(self._path(shard), len(self.blocks[shard]))  # killed between shard and record

    def _write_record(self, shard: int, info: ShardInfo) -> None:
        now = time.monotonic()
        record = _Record(info, seconds=(now - self._clock) / self._num_processes)
        self._clock = now
        write_atomically(self._record_path(shard), json.dumps(dataclasses.asdict(record)))

    def _read_record(self, shard: int) -> _Record | None:
        try:
            fields = json.loads(self._record_path(shard).read_text(encoding="utf-8"))
            return _Record(ShardInfo(**fields["info"]), fields["seconds"])
        except (FileNotFoundError, KeyError, TypeError, ValueError):  # a damaged record is none
            return None

    def _path(self, shard: int) -> Path:
        return self.folder / shard_name(shard)

    def _record_path(self, shard: int) -> Path:
        return self.folder / f".shard-{shard:06d}.json"


@dataclasses.dataclass(frozen=True)
class _Record:
    info: ShardInfo
    seconds: float


class _OrderedShard:
    """A tar in the making, whose samples arrive in nearly the right order."""

    def __init__(self, path: Path, numbers: range) -> None:
        self._path, self._numbers, self._next = path, numbers, numbers.start
        self._early: dict[int, Mapping[str, bytes]] = {}
        self._tar = ShardFile(temporary_name(path))

    def put(self, number: int, sample: Mapping[str, bytes]) -> ShardInfo | None:
        """Take a sample; if it was the last one missing, the shard is on the disk, and this is what it is."""
        self._early[number] = sample
        while self._next in self._early:
            self._tar.write(self._next, self._early.pop(self._next))
            self._next += 1
        if self._next < self._numbers.stop:
            return None
        info = self._tar.close()
        commit(self._path)
        return dataclasses.replace(info, name=self._path.name)

    def abandon(self) -> None:
        self._tar.abandon()
        temporary_name(self._path).unlink(missing_ok=True)
