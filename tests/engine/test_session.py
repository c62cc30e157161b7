"""A run from start to end: what it leaves, that interruptions leave no trace, and that it stops on NaN."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
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
    signalled: Mapping[int, signal.Signals] | None = None,
    nan_at: int = 0,
    evaluations: Mapping[int, float] | None = None,
    metric: str = "FID",
    **settings: int,
) -> tuple[nn.Linear, Session]:
    """Fit random targets, drawn from the global generator; ``killed_at`` and ``nan_at`` are steps.

    ``signalled`` says which signal arrives in which step. ``evaluations`` are what is measured after a step, the
    lower the better.
    """
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    session = new_session(folder, model, optimizer, **settings)
    for step in session.steps():
        if step == killed_at:
            raise Killed
        if signalled is not None and step in signalled:
            signal.raise_signal(signalled[step])
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
    return sorted(int(path.name.removeprefix("step_")) for path in (folder / "checkpoints").glob("step_*"))


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
    description = json.loads(path.read_text())
    del description["sha256"]  # an older checkpoint, for one, has none
    path.write_text(json.dumps(description | {"seconds": 1000.0}))
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


def same_end(whole: Path, resumed: Path) -> bool:
    """Whether two runs saved the same bits after the last step."""
    files = sorted(checkpoint(whole, 6).glob("*.safetensors"))
    assert len(files) == 2
    return all(file.read_bytes() == (checkpoint(resumed, 6) / file.name).read_bytes() for file in files)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_ends_a_run_after_the_step_under_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals, status: int
) -> None:
    train(tmp_path / "whole")
    capsys.readouterr()
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1)]
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "run", signalled={3: number})
    assert stopped.value.code == status
    line = f"{number.name}: {tmp_path / 'run'} is saved after step 3; run the same command to go on\n"
    assert capsys.readouterr().err == line
    assert saved_steps(tmp_path / "run") == [2, 3]
    assert not (tmp_path / "run" / "summary.json").exists()
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1)] == handlers

    _, session = train(tmp_path / "run")
    assert session.first_step == 3
    assert same_end(tmp_path / "whole", tmp_path / "run")
    assert [row["square"] for row in rows(tmp_path / "run")] == [(1 + 4) / 2, 9, 16, (25 + 36) / 2]


def test_a_signal_in_the_last_step_lets_the_run_end(tmp_path: Path) -> None:
    train(tmp_path, signalled={6: signal.SIGTERM})
    assert json.loads((tmp_path / "summary.json").read_text())["answer"] == 42
    assert saved_steps(tmp_path) == [4, 6]


def test_weights_after_a_nan_are_not_saved_for_a_signal(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="step 3: kl is nan"):
        train(tmp_path, nan_at=3, signalled={3: signal.SIGTERM}, log_every_steps=6)
    assert saved_steps(tmp_path) == [2]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, damage: Callable[[Path], object]
) -> None:
    train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "run", killed_at=6)
    damage(checkpoint(tmp_path / "run", 4) / file)
    damaged = {path.name: path.read_bytes() for path in checkpoint(tmp_path / "run", 4).iterdir()}
    capsys.readouterr()
    _, session = train(tmp_path / "run")
    printed = capsys.readouterr()
    assert printed.err.startswith(f"warning: {checkpoint(tmp_path / 'run', 4)}")
    assert "; kept as damaged_step_000000004, going on from step_000000002\n" in printed.err
    assert "after step 2\n" in printed.out
    assert session.first_step == 2
    kept = tmp_path / "run" / "checkpoints" / "damaged_step_000000004"
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == damaged
    assert same_end(tmp_path / "whole", tmp_path / "run")
    assert [row["step"] for row in rows(tmp_path / "run")] == [2, 3, 4, 6]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(tmp_path, killed_at=6)
    for step in (2, 4):
        cut(checkpoint(tmp_path, step) / "model.safetensors")
    logged = rows(tmp_path)
    for _ in range(2):
        with pytest.raises(UserError, match="no checkpoint is undamaged"):
            train(tmp_path)
    assert rows(tmp_path) == logged


@pytest.mark.parametrize("method", ["write_best", "prune_checkpoints", "write_summary"])
def test_a_run_killed_before_its_summary_writes_it_when_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    train(tmp_path / "whole", evaluations={2: 5.0})
    with monkeypatch.context() as patch:
        original = getattr(RunFolder, method)

        def killed(run: RunFolder, *arguments: object) -> None:
            if run.has_checkpoint(6):
                raise Killed
            original(run, *arguments)

        patch.setattr(RunFolder, method, killed)
        with pytest.raises(Killed):
            train(tmp_path / "run", evaluations={2: 5.0})
    assert not (tmp_path / "run" / "summary.json").exists()
    model = nn.Linear(3, 2)
    assert new_session(tmp_path / "run", model, torch.optim.AdamW(model.parameters())).finished
    summaries = [json.loads((tmp_path / run / "summary.json").read_text()) for run in ("whole", "run")]
    assert summaries[0] | {"seconds": 0} == summaries[1] | {"seconds": 0}
    assert saved_steps(tmp_path / "run") == saved_steps(tmp_path / "whole") == [2, 4, 6]
    assert best(tmp_path / "run") == (2, "FID", 5.0)


def test_a_prolonged_run_killed_before_its_summary_does_not_keep_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path, num_steps=4)
    monkeypatch.setattr(RunFolder, "write_summary", lambda run, summary: None)
    train(tmp_path)
    monkeypatch.undo()
    model = nn.Linear(3, 2)
    new_session(tmp_path, model, torch.optim.AdamW(model.parameters()))
    assert json.loads((tmp_path / "summary.json").read_text())["num_steps"] == 6


# One of two processes is told, which sends the signal to itself in step 3; both print where they stop.
TWO_PROCESSES = """
import os, signal, sys
from pathlib import Path
import torch
from accelerate import Accelerator
from ldgan.engine import cli
from ldgan.engine.config import option
from ldgan.engine.session import RunConfig, Session
from dataclasses import dataclass

@dataclass
class Config:
    run: RunConfig = option(RunConfig(), "")

def main():
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    config = Config(RunConfig(dir=sys.argv[1], num_steps=9, batch_size=2, checkpoint_every_steps=2))
    model = torch.nn.Linear(2, 1)
    session = Session(accelerator, config, {"model": model}, {"kind": "toy"})
    Path(sys.argv[1] + f".first_{rank}").write_text(str(session.first_step))
    for step in session.steps():
        Path(sys.argv[1] + f".step_{rank}").write_text(str(step))
        if step == 3 and rank == 1:
            signal.raise_signal(signal.SIGUSR1)
        session.record(step, {"loss": torch.tensor(float(rank))})
    session.finish({})

cli.run(main)
"""


def start_two_processes(folder: Path) -> list[subprocess.CompletedProcess[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
    ranks = [address | {"RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""} for rank in range(2)]
    command = [sys.executable, "-c", TWO_PROCESSES, str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env={**os.environ, **rank}, **pipes) for rank in ranks]
    outputs = [process.communicate(timeout=240) for process in processes]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(processes, outputs)
    ]


def test_processes_agree_on_the_last_step_and_on_the_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first, second = start_two_processes(run)
    assert (first.returncode, second.returncode) == (138, 138), first.stderr + second.stderr
    assert [(tmp_path / f"run.step_{rank}").read_text() for rank in range(2)] == ["3", "3"]
    assert f"SIGUSR1: {run} is saved after step 3; run the same command to go on\n" in first.stderr
    assert "SIGUSR1" not in second.stderr
    assert saved_steps(run) == [2, 3]
    assert [row["loss"] for row in rows(run)] == [0.5, 0.5]

    flip(checkpoint(run, 3) / "model.safetensors")
    results = start_two_processes(run)  # from step 2 on, so that step 3 comes again, and the signal with it
    assert [result.returncode for result in results] == [138, 138]
    assert [(tmp_path / f"run.first_{rank}").read_text() for rank in range(2)] == ["2", "2"]
    assert [result.stderr.count("warning: ") for result in results] == [1, 0]
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["damaged_step_000000003", "step_000000002", "step_000000003"]
