"""Progress in a log file: when lines come, what they count, and silence where it is wanted."""

from __future__ import annotations

import pytest

from ldgan.engine import progress
from ldgan.engine.progress import progress_bar


class Clock:
    """A `time` whose seconds pass when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_lines_come_every_ten_seconds_and_at_the_end(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("train", total=60, unit="img") as bar:
        for _ in range(60):
            clock.now += 0.5
            bar.advance(notes="loss 1.5")
    output = capsys.readouterr()
    lines = output.err.splitlines()
    assert output.out == ""
    assert [line.split()[1] for line in lines] == ["21/60", "42/60", "60/60"]
    assert lines[0] == "train: 21/60 img  ETA 0:19  2.0 img/s  loss 1.5"


def test_what_an_earlier_run_did_counts_as_done_but_not_for_the_rate(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress_bar("train", total=1300, unit="img", initial=1000) as bar:
        clock.now += 20
        bar.advance(100)
    assert capsys.readouterr().err.strip() == "train: 1,100/1,300 img  ETA 0:40  5.0 img/s"


def test_other_ranks_are_silent(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("train", total=2, unit="img", enabled=False) as bar:
        clock.now += 20
        bar.advance(2)
    assert capsys.readouterr() == ("", "")
