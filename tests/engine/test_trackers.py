"""Trackers: the same numbers in both places, and a resumed run logs each step once."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ldgan.engine.cli import UserError
from ldgan.engine.run import RunFolder
from ldgan.engine.trackers import Tracker, check_finite


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def log_steps(run: RunFolder, steps: range, loss: float, resume_step: int = 0) -> None:
    with Tracker(run, enabled=True, resume_step=resume_step) as tracker:
        for step in steps:
            tracker.log_scalars(step, num_images=8 * step, scalars={"loss": loss})


def rows(run: RunFolder) -> list[dict]:
    return [json.loads(line) for line in run.metrics_path.read_text().splitlines()]


def tensorboard(run: RunFolder) -> EventAccumulator:
    return EventAccumulator(str(run.tensorboard)).Reload()


def test_both_places_get_the_numbers(run: RunFolder) -> None:
    log_steps(run, range(1, 4), loss=0.5)
    assert [(row["step"], row["num_images"], row["loss"]) for row in rows(run)] == [
        (1, 8, 0.5),
        (2, 16, 0.5),
        (3, 24, 0.5),
    ]
    assert [(event.step, event.value) for event in tensorboard(run).Scalars("loss")] == [
        (1, 0.5),
        (2, 0.5),
        (3, 0.5),
    ]


def test_a_step_may_have_two_rows(run: RunFolder) -> None:
    with Tracker(run, enabled=True) as tracker:
        tracker.log_scalars(2, 16, {"loss": 0.5})
        tracker.log_scalars(2, 16, {"Frechet distance (squeezenet)": 40.0})
        tracker.log_scalars(3, 24, {"loss": 0.25})
    with Tracker(run, enabled=True, resume_step=2):
        pass
    kept = [{key: value for key, value in row.items() if key != "seconds"} for row in rows(run)]
    numbers = {"step": 2, "num_images": 16}
    assert kept == [numbers | {"loss": 0.5}, numbers | {"Frechet distance (squeezenet)": 40.0}]
    assert [(event.step, event.value) for event in tensorboard(run).Scalars("Frechet distance (squeezenet)")] == [
        (2, 40.0)
    ]


def test_a_resumed_run_logs_each_step_once(run: RunFolder) -> None:
    log_steps(run, range(1, 6), loss=1.0)
    with run.metrics_path.open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    log_steps(run, range(4, 8), loss=2.0, resume_step=3)
    expected = [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0), (7, 2.0)]
    assert [(row["step"], row["loss"]) for row in rows(run)] == expected
    assert [(event.step, event.value) for event in tensorboard(run).Scalars("loss")] == expected


def test_the_clock_goes_on_after_a_resume(run: RunFolder) -> None:
    row = {"step": 1, "num_images": 8, "seconds": 3600.0, "loss": 1.0}
    run.metrics_path.write_text(json.dumps(row) + "\n" + json.dumps(row | {"step": 2, "seconds": 9999.0}) + "\n")
    log_steps(run, range(2, 3), loss=1.0, resume_step=1)
    assert 3600.0 <= rows(run)[1]["seconds"] < 3700.0


def test_starting_over_drops_everything(run: RunFolder) -> None:
    log_steps(run, range(1, 6), loss=1.0)
    log_steps(run, range(1, 3), loss=2.0)
    assert [row["loss"] for row in rows(run)] == [2.0, 2.0]


def test_image_grids(run: RunFolder) -> None:
    images = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 4, 4) * 100
    with Tracker(run, enabled=True) as tracker:
        tracker.log_images(5, "samples", images, columns=3)
    with Image.open(run.samples / "samples_000000005.png") as image:
        assert image.size == (3 * 4 + 2 * 2, 4)
        assert [image.getpixel((x, 0))[0] for x in (0, 6, 12)] == [0, 100, 200]
    assert tensorboard(run).Images("samples")[0].step == 5


def test_a_disabled_tracker_writes_nothing(run: RunFolder) -> None:
    with Tracker(run, enabled=False) as tracker:
        tracker.log_scalars(1, 8, {"loss": 1.0})
        tracker.log_images(1, "samples", torch.zeros(1, 3, 2, 2, dtype=torch.uint8), columns=1)
    assert list(run.path.iterdir()) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_losses_that_are_not_finite_stop_the_run(bad: float) -> None:
    terms = {"generator": 1.0, "r1": bad}
    with pytest.raises(UserError, match=rf"^step 7: r1 is {bad}; last good checkpoint: run/step_5;"):
        check_finite(terms, step=7, last_checkpoint=Path("run/step_5"))
    with pytest.raises(UserError, match="no checkpoint yet"):
        check_finite(terms, step=7, last_checkpoint=None)
    check_finite({"generator": 1e30, "r1": 0.0}, step=7, last_checkpoint=None)
