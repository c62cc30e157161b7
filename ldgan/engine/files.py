"""Files and folders that are complete or absent, never half written."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from ldgan.engine.cli import UserError


def temporary_name(path: Path) -> Path:
    """Return the hidden sibling under which ``path`` is written before it gets its name."""
    return path.with_name(f".{path.name}.tmp")


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file (text as UTF-8), replacing an older one in a single step."""
    temporary = temporary_name(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_through(temporary, data.encode() if isinstance(data, str) else data)
    except OSError:
        temporary.unlink(missing_ok=True)  # where the disk is full, its room is needed
        raise
    os.replace(temporary, path)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``path`` when the block ends without an error.

    Raises:
        OSError: if ``path`` exists and is not an empty folder.
    """
    temporary = temporary_name(path)
    shutil.rmtree(temporary, ignore_errors=True)  # left behind by a run that was killed
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # where the disk is full, its room is needed
        raise
    _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder; it loses its name first, so that nobody meets it half empty."""
    temporary = temporary_name(path)
    shutil.rmtree(temporary, ignore_errors=True)
    os.replace(path, temporary)
    shutil.rmtree(temporary)


def commit(path: Path) -> None:
    """Give a file that was written under its `temporary_name` its own name, once it is on the disk."""
    temporary = temporary_name(path)
    _sync(temporary)
    os.replace(temporary, path)


def write_through(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turn what the system says about a full disk or a lack of permission into a UserError about ``path``."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); make room or mend it, then run the same command"
        ) from error


class BackgroundWrites:
    """Jobs that write files, done by threads while the caller computes; a context manager.

    At most ``max_pending`` jobs wait or run, which bounds their memory. An error of a job is raised by the next
    `submit`, one that is waiting included, or at the end of the block, where all jobs are waited for. After an
    error jobs that have not begun are dropped.
    """

    def __init__(self, max_pending: int) -> None:
        self._slots = threading.BoundedSemaphore(max_pending)
        self._pool = ThreadPoolExecutor(thread_name_prefix="writer")
        self._error: BaseException | None = None

    def __enter__(self) -> BackgroundWrites:
        return self

    def submit(self, job: Callable[..., object], *arguments: Any) -> None:
        """Have ``job(*arguments)`` done soon; waits while ``max_pending`` jobs are under way."""
        self._slots.acquire()
        if self._error is not None:
            raise self._error
        self._pool.submit(job, *arguments).add_done_callback(self._done)

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=exc is not None)
        if exc is None and self._error is not None:
            raise self._error

    def _done(self, job: Future[object]) -> None:
        if not job.cancelled() and self._error is None:
            self._error = job.exception()
        self._slots.release()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of_file(path: Path) -> str:
    """SHA-256 (hex) of a file's content, read in pieces; raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
