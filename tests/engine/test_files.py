"""Files that are complete or absent, and jobs that write them in the background."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest

from ldgan.engine.cli import UserError
from ldgan.engine.files import BackgroundWrites, commit, new_folder, temporary_name, write_atomically, writing_to


class Killed(Exception):
    """Whatever ends a program."""


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    def fail_inside() -> None:
        with new_folder(tmp_path / "new") as folder:
            (folder / "half").write_text("x")
            raise Killed

    with pytest.raises(Killed):
        fail_inside()
    assert not (tmp_path / "new").exists()
    with new_folder(tmp_path / "new") as folder:
        (folder / "whole").write_text("x")
        assert not (tmp_path / "new").exists()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["whole"]  # nothing of the first attempt
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_file_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")

    def fail(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as broken:
        broken.setattr("os.replace", fail)
        with pytest.raises(Killed):
            write_atomically(path, "new")
    assert path.read_text() == "old"
    write_atomically(path, "new")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"file": "new"}


def test_a_committed_file_has_its_name(tmp_path: Path) -> None:
    temporary_name(tmp_path / "file").write_text("x")
    commit(tmp_path / "file")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"file": "x"}


def test_errors_of_writing_name_the_place(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"out: cannot be written \(Disk quota exceeded\)"), writing_to(Path("out")):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")
    with pytest.raises(ValueError, match="a bug"), writing_to(Path("out")):
        raise ValueError("a bug")


def test_all_jobs_are_done_at_the_end_of_the_block() -> None:
    done: list[int] = []
    with BackgroundWrites(3) as writes:
        for number in range(50):
            writes.submit(done.append, number)
    assert sorted(done) == list(range(50))


def test_no_more_jobs_are_under_way_than_allowed() -> None:
    lock, under_way, most = threading.Lock(), 0, 0

    def job() -> None:
        nonlocal under_way
        threading.Event().wait(0.001)
        with lock:
            under_way -= 1

    with BackgroundWrites(3) as writes:
        for _ in range(50):
            writes.submit(job)
            with lock:
                under_way += 1
                most = max(most, under_way)
    assert under_way == 0
    assert most <= 3


def test_a_failed_job_stops_the_caller_who_waits_for_room() -> None:
    release, started = threading.Event(), []

    def fail() -> None:
        assert release.wait(60)
        raise OSError(errno.ENOSPC, "No space left on device")

    def submit_two() -> None:
        with BackgroundWrites(1) as writes:
            writes.submit(fail)
            threading.Timer(0.05, release.set).start()
            writes.submit(started.append, 1)  # waits for the only place

    with pytest.raises(OSError, match="No space left"):
        submit_two()
    assert started == []


def test_a_failure_of_the_last_job_is_raised_at_the_end() -> None:
    def fail() -> None:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"), BackgroundWrites(2) as writes:
        writes.submit(fail)


def test_jobs_that_have_not_begun_are_dropped_after_an_error() -> None:
    release, done = threading.Event(), []

    def submit_many() -> None:
        with BackgroundWrites(200) as writes:
            for number in range(100):
                writes.submit(lambda number=number: (release.wait(60), done.append(number)))
            threading.Timer(0.05, release.set).start()
            raise Killed

    with pytest.raises(Killed):
        submit_many()
    assert len(done) < 100  # one for each thread
