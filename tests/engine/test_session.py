"""A run from start to end: what it leaves, that interruptions leave no trace, and that it stops on NaN."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from ldgan.engine.checkpoint import load_thing, read_description
from ldgan.engine.cli import UserError
from ldgan.engine.config import option
from ldgan.engine.session import RunConfig, Session


@dataclass
class Config:
    """A stage's config, as far as a session knows it."""

    run: RunConfig = option(RunConfig(), "")


class Killed(Exception):
    """The machine went away."""


def new_session(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, **settings: int) -> Session:
    numbers = {"num_steps": 6, "batch_size": 4, "checkpoint_every_steps": 2, "log_every_steps": 3} | settings
    config = Config(RunConfig(dir=str(folder), **numbers))
    things = {"model": model, "optimizer": optimizer}
    return Session(Accelerator(cpu=True), config, things, {"kind": "toy"})


def train(folder: Path, *, killed_at: int = 0, nan_at: int = 0, **settings: int) -> tuple[nn.Linear, Session]:
    """Fit random targets, drawn from the global generator; ``killed_at`` and ``nan_at`` are steps."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    session = new_session(folder, model, optimizer, **settings)
    for step in session.steps():
        if step == killed_at:
            raise Killed
        optimizer.zero_grad()
        loss = (model(torch.randn(4, 3)) - torch.randn(4, 2)).square().mean()
        loss.backward()
        optimizer.step()
        terms = {"loss": loss.detach(), "square": torch.tensor(step**2)}
        session.record(step, terms | ({"kl": torch.tensor(float("nan"))} if step == nan_at else {}))
    session.finish({"answer": 42})
    return model, session


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step_{step:09d}"


def test_a_run_leaves_checkpoints_scalars_and_a_summary(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    model, _ = train(folder)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_000000004", "step_000000006"]
    description = read_description(checkpoint(folder, 6))
    assert {key: description[key] for key in ("kind", "step", "num_images", "answer")} == {
        "kind": "toy",
        "step": 6,
        "num_images": 24,
        "answer": 42,
    }
    assert description["config"]["run"]["num_steps"] == 6
    saved = nn.Linear(3, 2)
    load_thing(checkpoint(folder, 6), "model", saved)
    torch.testing.assert_close(saved.state_dict(), model.state_dict(), rtol=0, atol=0)
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["num_steps"], summary["answer"]) == (6, 42)


def test_logged_scalars_are_means_over_the_steps_since_the_last_log(tmp_path: Path) -> None:
    train(tmp_path / "run")  # logs at 3 and 6 as asked, and at 2 and 4 before checkpoints
    logged = [(row["step"], row["num_images"], row["square"]) for row in rows(tmp_path / "run")]
    assert logged == [(2, 8, (1 + 4) / 2), (3, 12, 9), (4, 16, 16), (6, 24, (25 + 36) / 2)]


@pytest.mark.parametrize("killed_at", [1, 3, 4, 6])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path, killed_at: int) -> None:
    train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "resumed", killed_at=killed_at)
    _, session = train(tmp_path / "resumed")
    assert session.first_step == (killed_at - 1) // 2 * 2
    for name in ("model", "optimizer"):
        file = f"{name}.safetensors"
        whole, resumed = (checkpoint(tmp_path / run, 6) / file for run in ("whole", "resumed"))
        assert whole.read_bytes() == resumed.read_bytes()
    losses = [[(row["step"], row["loss"]) for row in rows(tmp_path / run)] for run in ("whole", "resumed")]
    assert losses[0] == losses[1]


def test_time_before_an_interruption_counts(tmp_path: Path) -> None:
    train(tmp_path / "run")
    path = checkpoint(tmp_path / "run", 6) / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": 1000.0}))
    model = nn.Linear(3, 2)
    session = new_session(tmp_path / "run", model, torch.optim.AdamW(model.parameters()))
    assert 1000 < session.seconds < 1060


@pytest.mark.parametrize(("nan_at", "last_good"), [(2, "no checkpoint yet"), (5, "step_000000004")])
def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path, nan_at: int, last_good: str) -> None:
    with pytest.raises(UserError, match=rf"step {nan_at}: kl is nan; .*{last_good}"):
        train(tmp_path / "run", nan_at=nan_at, checkpoint_every_steps=4)
    assert checkpoint(tmp_path / "run", 4).exists() == (nan_at > 4)  # weights after a NaN are never saved


def test_a_finished_run_says_so_and_may_be_prolonged(tmp_path: Path) -> None:
    model, first = train(tmp_path / "run", num_steps=4)
    assert not first.finished
    again = new_session(tmp_path / "run", model, torch.optim.AdamW(model.parameters()), num_steps=4)
    assert again.finished
    assert list(again.steps()) == []
    _, longer = train(tmp_path / "run", num_steps=7)
    assert longer.first_step == 4
    assert read_description(checkpoint(tmp_path / "run", 7))["step"] == 7


def test_what_a_run_learns_from_may_not_change(tmp_path: Path) -> None:
    train(tmp_path / "run")
    with pytest.raises(UserError, match=r"another config \(run.batch_size: 4 in the run, 8 asked\)"):
        train(tmp_path / "run", batch_size=8)


def test_previews_are_due_at_their_steps_and_at_the_end(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    session = new_session(tmp_path / "run", model, optimizer, num_steps=8, preview_every_steps=3)
    assert [step for step in session.steps() if session.wants_preview(step)] == [3, 6, 8]


@pytest.mark.parametrize(
    ("batch_size", "num_micro_batches", "num_processes", "expected"),
    [(64, 0, 1, (1, 64)), (64, 0, 4, (4, 16)), (64, 8, 2, (8, 8)), (6, 3, 3, (3, 2))],
)
def test_the_batch_is_parted_into_equal_micro_batches(
    batch_size: int, num_micro_batches: int, num_processes: int, expected: tuple[int, int]
) -> None:
    settings = RunConfig(batch_size=batch_size, num_micro_batches=num_micro_batches)
    assert settings.micro_batches(num_processes) == expected


@pytest.mark.parametrize(("batch_size", "num_micro_batches", "num_processes"), [(64, 3, 1), (64, 2, 4), (9, 0, 2)])
def test_parts_that_do_not_divide_are_refused(batch_size: int, num_micro_batches: int, num_processes: int) -> None:
    settings = RunConfig(batch_size=batch_size, num_micro_batches=num_micro_batches)
    number = num_micro_batches or num_processes
    message = (
        f"run.batch_size {batch_size} in {number} micro-batches (run.num_micro_batches) cannot be"
        f" shared by {num_processes} processes; choose numbers that divide"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        settings.micro_batches(num_processes)
