"""Signals are noted, not obeyed, and only as long as a run goes on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection

import pytest

from ldgan.engine.signals import exit_status, ignore_notices, noting_signals

BOTH = (signal.SIGTERM, signal.SIGUSR1)


class ByDefault(Exception):
    """What a signal does that nobody notes."""


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Let a signal that is not noted raise an exception, for the time of a test."""

    def die(number: int, frame: object) -> None:
        raise ByDefault

    before = {number: signal.signal(number, die) for number in BOTH}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_is_noted_in_the_block_and_does_its_worst_after_it(number: signal.Signals, status: int) -> None:
    with noting_signals() as notices:
        assert notices.agreed() is None
        signal.raise_signal(number)
        assert notices.agreed() is number
        assert notices.agreed() is number  # until the process ends
    with pytest.raises(ByDefault):
        signal.raise_signal(number)
    with noting_signals() as notices:
        assert notices.agreed() is None
    assert exit_status(number) == status


def test_an_error_in_the_block_restores_what_signals_meant() -> None:
    with pytest.raises(ValueError, match="x"), noting_signals():
        raise ValueError("x")
    for number in BOTH:
        with pytest.raises(ByDefault):
            signal.raise_signal(number)


def test_ctrl_c_is_none_of_its_business() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt), noting_signals():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_nothing_is_noted_and_nothing_fails() -> None:
    found: list[object] = []

    def work() -> None:
        with noting_signals() as notices:
            found.extend([notices.agreed(), signal.getsignal(signal.SIGTERM)])

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [None, before]


def read_until_told(connection: Connection) -> None:
    """A worker that is sent notices by others than its parent, and tells that it is still there."""
    ignore_notices()
    for number in BOTH:
        os.kill(os.getpid(), number)
    connection.send(os.getpgid(0))
    connection.recv()


def test_a_worker_outlives_notices_and_ends_when_its_parent_says_so() -> None:
    ours, its = multiprocessing.Pipe()
    worker = multiprocessing.get_context("fork").Process(target=read_until_told, args=(its,), daemon=True)
    worker.start()
    assert ours.poll(60)
    assert ours.recv() == worker.pid  # a process group of its own
    worker.join(0.2)
    assert worker.is_alive()
    for _ in range(100):  # one SIGTERM swallows another that has not arrived yet
        worker.terminate()
        worker.join(0.2)
        if not worker.is_alive():
            break
    assert worker.exitcode == 0
