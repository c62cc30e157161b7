"""Writing a shard set over several runs: what is finished stays, however a run ended."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from data_prep.shards import ShardInfo, ShardWriter
from ldgan.engine.cli import UserError

JOURNAL_NAME = ".unfinished.jsonl"


class ResumableShardWriter(ShardWriter):
    """A `ShardWriter` that goes on after the shards that an earlier one has finished, be it killed or stopped.

    The hidden folder beside ``out`` stays when a shard in it is finished. A journal in it gets a line for each: what
    the manifest says of the shard, and the caller's ``notes()``, JSON, about everything up to its last sample. Those
    of earlier runs are in ``earlier_notes``, in order, and ``num_samples`` is what they have written: the caller goes
    on with the sample after these.

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
    ) -> None:
        super().__init__(out, kind, samples_per_shard=samples_per_shard, class_names=class_names, details=details)
        self.folder = out.parent / f".{out.name}.partial"
        self.earlier_notes: list[dict[str, Any]] = []
        self._settings = {"samples_per_shard": samples_per_shard, "kind": kind, **self.details}
        self._take_notes = notes

    def __enter__(self) -> ResumableShardWriter:
        self._started = time.monotonic()
        self._check_out()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._journal = (self.folder / JOURNAL_NAME).open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot create {self.out}: {error.strerror}; choose another output folder") from error
        try:
            _lock(self._journal, self.out)
            self._restore()
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            self._journal.close()
            raise UserError(f"{self._journal.name} is damaged ({error}); remove {self.folder} to begin anew") from error
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
                (self.out / JOURNAL_NAME).unlink()
        finally:
            self._journal.close()
            if self._shard is not None:
                self._shard.abandon()
            if not self._shards:
                shutil.rmtree(self.folder, ignore_errors=True)

    def _restore(self) -> None:
        """Take over what the journal says is finished; what is not goes away."""
        self._journal.seek(0)
        lines = _whole_lines(self._journal)
        if lines:
            self._check_settings(lines[0])
        else:
            self._write_line(self._settings)
        for line in lines[1:]:
            self._take_over(ShardInfo(**line["shard"]), line)
        for path in self.folder.glob("*.tar"):
            if path.name not in {shard.name for shard in self._shards}:
                path.unlink()

    def _take_over(self, shard: ShardInfo, line: Mapping[str, Any]) -> None:
        path = self.folder / shard.name
        if not path.exists() or path.stat().st_size != shard.num_bytes:
            raise UserError(f"{path} has been damaged since it was written; remove {self.folder} to begin anew")
        self._shards.append(shard)
        self.num_samples += shard.num_samples
        self._has_captions |= line["has_captions"]
        self._started = time.monotonic() - line["seconds"]
        self.earlier_notes.append(line["notes"])

    def _check_settings(self, found: Mapping[str, Any]) -> None:
        wanted = json.loads(json.dumps(self._settings))
        for key in wanted.keys() | found.keys():
            if found.get(key) != wanted.get(key):
                raise UserError(
                    f"{self.folder} is an unfinished set with another {key} ({found.get(key)}, now {wanted.get(key)});"
                    " go on with the same, or remove it"
                )

    def _close_shard(self) -> None:
        if self._shard is None:
            return
        super()._close_shard()
        shard = self._shards[-1]
        with (self.folder / shard.name).open("rb") as file:
            os.fsync(file.fileno())  # on the disk before the journal says so
        self._write_line(
            {
                "shard": asdict(shard),
                "has_captions": self._has_captions,
                "seconds": round(time.monotonic() - self._started, 3),
                "notes": self._take_notes(),
            }
        )

    def _write_line(self, fields: Mapping[str, Any]) -> None:
        self._journal.write(json.dumps(fields) + "\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())


def _lock(journal: TextIO, out: Path) -> None:
    """Keep other processes out until the file is closed, by the end of this process at the latest."""
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(f"another process is writing {out}; wait for it, or choose another output folder") from error


def _whole_lines(journal: TextIO) -> list[dict[str, Any]]:
    """The lines of a journal; one that was being written when its process died is cut off."""
    lines = journal.read().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
        journal.truncate(sum(len(line.encode()) for line in lines))
    return [json.loads(line) for line in lines]
