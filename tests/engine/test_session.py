"""A run from start to end: what it leaves, that interruptions leave no trace, and that it stops on NaN."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from ldgan.engine.checkpoint import load_thing, read_description
from ldgan.engine.cli import UserError
from ldgan.engine.config import option
from ldgan.engine.run import Best, RunFolder, resolve_checkpoint
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


def train(
    folder: Path,
    *,
    killed_at: int = 0,
    nan_at: int = 0,
    evaluations: Mapping[int, float] | None = None,
    metric: str = "FID",
    **settings: int,
) -> tuple[nn.Linear, Session]:
    """Fit random targets, drawn from the global generator; ``killed_at`` and ``nan_at`` are steps.

    ``evaluations`` are what is measured after a step, the lower the better.
    """
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
        if evaluations is not None and step in evaluations:
            session.log_evaluation(step, {metric: evaluations[step]})
            session.keep_best(step, metric, evaluations[step], "lower")
    session.finish({"answer": 42})
    return model, session


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step_{step:09d}"


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (folder / "checkpoints").iterdir())


def best(folder: Path) -> tuple[int, str, float]:
    """Step, metric and value of the best checkpoint, which must be there."""
    record = json.loads((folder / "best.json").read_text())
    assert resolve_checkpoint(folder / "best") == folder / record["checkpoint"] == checkpoint(folder, record["step"])
    return record["step"], record["metric"], record["value"]


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


# Checkpoints are due at 4, 8, ...; evaluations come in between and with them.
EVALUATIONS = {1: 9.0, 2: 5.0, 3: 7.0, 4: 5.0, 6: math.nan, 7: 3.0, 8: 4.0, 10: -math.inf}
KEEP_BEST = {"num_steps": 11, "checkpoint_every_steps": 4, "log_every_steps": 5, "keep_checkpoints": 1}


@pytest.mark.parametrize(
    ("num_steps", "expected", "kept"), [(1, 1, [1]), (2, 2, [2]), (5, 2, [2, 5]), (7, 7, [7]), (11, 7, [7, 11])]
)
def test_the_best_checkpoint_is_kept_and_no_former_one(
    tmp_path: Path, num_steps: int, expected: int, kept: list[int]
) -> None:
    train(tmp_path, evaluations=EVALUATIONS, **KEEP_BEST | {"num_steps": num_steps})
    assert best(tmp_path) == (expected, "FID", EVALUATIONS[expected])
    assert saved_steps(tmp_path) == kept
    assert read_description(checkpoint(tmp_path, kept[-1]))["answer"] == 42  # what finish() adds


def test_the_best_checkpoint_holds_the_weights_that_were_measured(tmp_path: Path) -> None:
    model, _ = train(tmp_path / "short", num_steps=7)
    train(tmp_path / "long", evaluations=EVALUATIONS, **KEEP_BEST)
    kept = nn.Linear(3, 2)
    load_thing(resolve_checkpoint(tmp_path / "long" / "best"), "model", kept)
    torch.testing.assert_close(kept.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_whether_lower_or_higher_is_better_is_said(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    session = new_session(tmp_path, model, torch.optim.AdamW(model.parameters()), num_steps=6)
    values = dict(enumerate([math.nan, 2.0, 2.0, 3.0, 2.5, math.inf], start=1))
    found = [session.keep_best(step, "Inception score", values[step], "higher") for step in session.steps()]
    assert found == [False, True, False, True, False, False]


def test_nothing_is_best_where_nothing_is_finite(tmp_path: Path) -> None:
    train(tmp_path, evaluations={2: math.nan, 4: math.inf})
    assert not (tmp_path / "best.json").exists()


def state(folder: Path) -> dict[str, object]:
    """All that a run knows, but for times."""
    logged = [{key: str(value) for key, value in row.items() if key != "seconds"} for row in rows(folder)]
    files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.safetensors")}
    return {"rows": logged, "files": files, "best": best(folder), "steps": saved_steps(folder)}


@pytest.mark.parametrize("killed_at", [2, 3, 5, 7, 8, 9, 11])
def test_a_resumed_run_keeps_the_same_best_one(tmp_path: Path, killed_at: int) -> None:
    train(tmp_path / "whole", evaluations=EVALUATIONS, **KEEP_BEST)
    with pytest.raises(Killed):
        train(tmp_path / "resumed", killed_at=killed_at, evaluations=EVALUATIONS, **KEEP_BEST)
    train(tmp_path / "resumed", evaluations=EVALUATIONS, **KEEP_BEST)
    assert state(tmp_path / "resumed") == state(tmp_path / "whole")


@pytest.mark.parametrize("method", ["write_best", "prune_checkpoints"])
@pytest.mark.parametrize("call", [1, 2, 3, 4, 5])
def test_a_run_killed_while_it_saves_keeps_the_same_best_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, call: int
) -> None:
    train(tmp_path / "whole", evaluations=EVALUATIONS, **KEEP_BEST)  # saves after 1, 2, 4, 7, 8 and 11 steps
    with monkeypatch.context() as patch:
        original, calls = getattr(RunFolder, method), iter(range(1, 7))

        def killed(*arguments: object) -> None:
            if next(calls) == call:
                raise Killed
            original(*arguments)

        patch.setattr(RunFolder, method, killed)
        with pytest.raises(Killed):
            train(tmp_path / "resumed", evaluations=EVALUATIONS, **KEEP_BEST)
    _, session = train(tmp_path / "resumed", evaluations=EVALUATIONS, **KEEP_BEST)
    assert session.first_step == [1, 2, 4, 7, 8, 11][call - 1]
    assert state(tmp_path / "resumed") == state(tmp_path / "whole")


def test_a_run_whose_last_act_was_its_best_checkpoint_names_it_when_asked_again(tmp_path: Path) -> None:
    model, _ = train(tmp_path, num_steps=4, evaluations={2: 5.0, 4: 1.0})
    RunFolder(tmp_path).write_best(Best(2, "FID", 5.0))  # killed before it could write the last one
    assert new_session(tmp_path, model, torch.optim.AdamW(model.parameters()), num_steps=4).finished
    assert best(tmp_path) == (4, "FID", 1.0)


def test_a_best_checkpoint_that_was_removed_is_forgotten(tmp_path: Path) -> None:
    train(tmp_path, evaluations=EVALUATIONS, **KEEP_BEST)
    shutil.rmtree(checkpoint(tmp_path, 7))
    train(tmp_path, evaluations={12: 100.0}, **KEEP_BEST | {"num_steps": 13})
    assert best(tmp_path) == (12, "FID", 100.0)
    assert saved_steps(tmp_path) == [12, 13]


def test_values_of_another_metric_are_not_compared(tmp_path: Path) -> None:
    train(tmp_path, evaluations=EVALUATIONS, **KEEP_BEST)
    train(tmp_path, evaluations={12: math.nan}, metric="KID", **KEEP_BEST | {"num_steps": 13})
    assert best(tmp_path) == (7, "FID", 3.0)
    train(tmp_path, evaluations={14: 100.0}, metric="KID", **KEEP_BEST | {"num_steps": 15})
    assert best(tmp_path) == (14, "KID", 100.0)
    assert saved_steps(tmp_path) == [14, 15]


def test_what_is_not_a_number_is_never_saved_as_the_best(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="step 2: kl is nan"):
        train(tmp_path, nan_at=2, evaluations={2: 1.0})
    assert not (tmp_path / "checkpoints").exists()
