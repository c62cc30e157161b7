"""Files and folders that are complete or absent, never half written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def temporary_name(path: Path) -> Path:
    """Return the hidden sibling under which ``path`` is written before it gets its name."""
    return path.with_name(f".{path.name}.tmp")


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file (text as UTF-8), replacing an older one in a single step."""
    temporary = temporary_name(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_through(temporary, data.encode() if isinstance(data, str) else data)
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
    yield temporary
    _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder; it loses its name first, so that nobody meets it half empty."""
    temporary = temporary_name(path)
    shutil.rmtree(temporary, ignore_errors=True)
    os.replace(path, temporary)
    shutil.rmtree(temporary)


def write_through(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
