"""What the world does to a run: one line, whole checkpoints, and a next start that goes on."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, Dataset
from torch.utils.hooks import RemovableHandle

from ldgan.engine import checkpoint, cli, files, session
from ldgan.engine.accumulation import Split
from ldgan.engine.checkpoint import load_thing, read_description
from ldgan.engine.cli import UserError
from ldgan.engine.config import option
from ldgan.engine.faults import lost_process, lost_reader, out_of_memory
from ldgan.engine.run import RunFolder
from ldgan.engine.session import RunConfig, Session

NUM_STEPS = 6


@dataclass
class Config:
    """A stage's config, as far as a session knows it."""

    run: RunConfig = option(RunConfig(), "")


def train(folder: Path, fault: Callable[[int], object] = lambda step: None, **settings: int | str) -> nn.Linear:
    """Fit random targets; every second step is saved, and ``fault`` is called in each with its number."""
    torch.manual_seed(0)
    model = nn.Linear(64, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    numbers = {"num_steps": NUM_STEPS, "batch_size": 4, "checkpoint_every_steps": 2, "log_every_steps": 3} | settings
    run = Session(Accelerator(cpu=True), Config(RunConfig(dir=str(folder), **numbers)), {"model": model}, {})
    with run.naming_faults():
        for step in run.steps():
            optimizer.zero_grad()
            loss = (model(torch.randn(4, 64)) - torch.randn(4, 64)).square().mean()
            loss.backward()
            fault(step)
            optimizer.step()
            run.record(step, {"loss": loss.detach()})
        run.finish({})
    return model


def at_step(number: int, fault: Callable[[], object]) -> Callable[[int], object]:
    return lambda step: fault() if step == number else None


def ask_for_more_memory_than_there_is() -> None:
    torch.empty(2**50)  # 4 PiB


def raise_(error: Exception) -> None:
    raise error


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_ends_as_an_untouched_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Start the run again, and compare its last checkpoint with that of one that nothing happened to."""
    model = train(folder.parent / "untouched")
    capsys.readouterr()
    train(folder)
    assert f"resuming {folder} after step " in capsys.readouterr().out
    saved = nn.Linear(64, 64)
    load_thing(RunFolder(folder).checkpoint_path(NUM_STEPS), "model", saved)
    torch.testing.assert_close(saved.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ..."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: not enough memory: you tried"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
    ],
)
def test_a_lack_of_memory_is_told(error: Exception) -> None:
    assert out_of_memory(error)
    assert lost_process(error) is lost_reader(error) is None


def test_what_gloo_nccl_and_the_loader_say_of_a_lost_process_is_told() -> None:
    gloo = "[/src/gloo/transport/tcp/pair.cc:561] Connection closed by peer [10.0.0.2]:1. This is typically caused by a"
    assert lost_process(RuntimeError(gloo)) == "Connection closed by peer [10.0.0.2]:1"
    nccl = torch.distributed.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:1, remote process exited.\nLast")
    assert lost_process(nccl) == "NCCL error in: ProcessGroupNCCL.cpp:1, remote process exited"
    loader = "DataLoader worker (pid 7) is killed by signal: Killed. "
    assert lost_reader(RuntimeError(loader)) == "DataLoader worker (pid 7) is killed by signal: Killed"


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("out of memory"), KeyError("gloo/")]
)
def test_errors_of_the_code_are_none_of_these(error: Exception, tmp_path: Path) -> None:
    assert not out_of_memory(error)
    assert lost_process(error) is lost_reader(error) is None
    with pytest.raises(type(error)) as caught:
        train(tmp_path, at_step(2, lambda: raise_(error)))
    assert caught.value is error


@pytest.mark.parametrize(("step", "last"), [(1, "no checkpoint yet"), (3, "last checkpoint: {}")])
def test_a_batch_that_memory_does_not_hold_ends_in_one_line_and_smaller_parts_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], step: int, last: str
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: train(folder, at_step(step, ask_for_more_memory_than_there_is)))
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        f"error: step {step}: out of memory with 4 images of the batch of 4 at a time;"
        f" {last.format(RunFolder(folder).checkpoint_path(2))};"
        " set run.num_micro_batches higher than 1, or run.precision=bf16, and start it again\n"
    )
    train(folder, num_micro_batches=2, precision="bf16")
    note = (
        "note: the number of micro-batches was 1 and is 2, run.precision was fp32 and is bf16: steps see the same"
        " samples, but draw other noise (run.num_micro_batches=1 draws the same)\n"
    )
    assert capsys.readouterr().err.partition("training: ")[0] == (note if step > 2 else "")
    assert read_description(RunFolder(folder).checkpoint_path(NUM_STEPS))["split"] == {
        "num_processes": 1,
        "num_micro_batches": 2,
        "precision": "bf16",
    }


@pytest.mark.parametrize(
    ("former", "now", "expected"),
    [
        (Split(2, 2, "fp32"), Split(2, 2, "fp32"), None),
        (
            Split(2, 2, "fp32"),
            Split(1, 2, "fp32"),
            "the number of processes was 2 and is 1: steps see the same samples and, but for dropout, the same noise,"
            " rounded differently",
        ),
        (
            Split(2, 2, "fp32"),
            Split(4, 4, "fp32"),  # two micro-batches cannot be shared by four
            "the number of processes was 2 and is 4, the number of micro-batches was 2 and is 4: steps see the same"
            " samples, but draw other noise",
        ),
    ],
)
def test_what_changes_with_the_processes_is_said(former: Split, now: Split, expected: str | None) -> None:
    assert now.changes_since(former) == expected


@pytest.mark.parametrize("split", [1, [], {}, {"num_processes": "two", "num_micro_batches": 2, "precision": "fp32"}])
def test_a_split_that_is_none_is_a_damage(tmp_path: Path, split: object) -> None:
    train(tmp_path)
    path = RunFolder(tmp_path).checkpoint_path(NUM_STEPS) / "checkpoint.json"
    description = json.loads(path.read_text())
    del description["sha256"]
    path.write_text(json.dumps(description | {"split": split}))
    with pytest.raises(UserError, match=r"checkpoint.json: damaged: step, seconds, best or split are not those"):
        train(tmp_path)


@pytest.mark.parametrize("parameter", ["weight", "bias"])
def test_weights_that_a_gradient_has_spoiled_are_not_saved(tmp_path: Path, parameter: str) -> None:
    number = ["weight", "bias"].index(parameter)

    def spoil(optimizer: torch.optim.Optimizer, *_: object) -> None:
        optimizer.param_groups[0]["params"][number].grad.view(-1)[-1] = math.nan  # while the loss is a number

    hooks: list[RemovableHandle] = []
    last = RunFolder(tmp_path).checkpoint_path(2)
    message = f"step 4: {parameter} of model is not finite; last checkpoint: {last}; a lower learning rate may help"
    with pytest.raises(UserError, match=re.escape(message)):
        train(tmp_path, at_step(4, lambda: hooks.append(register_optimizer_step_pre_hook(spoil))))
    hooks.pop().remove()
    assert names(tmp_path / "checkpoints") == ["step_000000002"]


@pytest.mark.parametrize("minutes", [0.5, 10.0, 30.0])
def test_the_timeout_reaches_the_process_group(monkeypatch: pytest.MonkeyPatch, minutes: float) -> None:
    passed: list[timedelta] = []

    def accelerator(*, kwargs_handlers: list[InitProcessGroupKwargs], **_: object) -> None:
        passed.append(kwargs_handlers[0].to_kwargs()["timeout"])  # what accelerate hands on
        raise torch.distributed.DistStoreError("Timed out after 1 seconds waiting for clients. 1/2 clients joined.")

    monkeypatch.setattr(session, "Accelerator", accelerator)
    message = (
        r"did not find each other \(Timed out after 1 seconds waiting for clients. 1/2 clients joined\); start all"
    )
    with pytest.raises(UserError, match=message):
        session.make_accelerator("fp32", timeout_minutes=minutes)
    assert passed[0].total_seconds() == pytest.approx(60 * minutes, abs=0.01)


@contextmanager
def full_disk() -> Iterator[None]:
    """Files take half of what is written to them, then there is no space left."""

    def write_half(path: Path, data: bytes) -> None:
        path.write_bytes(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "write_through", write_half)
        yield


@contextmanager
def limited_files() -> Iterator[None]:
    """The system lets no file grow beyond 8 KiB; the model has 16.6 KB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("damage", "reason"), [(full_disk, "No space left on device"), (limited_files, "File too large")]
)
def test_a_disk_that_fills_up_while_a_checkpoint_is_written_costs_that_checkpoint_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable, reason: str
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(SystemExit):
        cli.run(lambda: train(folder, at_step(3, lambda: signal.raise_signal(signal.SIGTERM))))  # leaves steps 2 and 3
    before = {path: path.read_bytes() for path in folder.glob("checkpoints/**/*") if path.is_file()}
    capsys.readouterr()
    with damage(), pytest.raises(SystemExit) as stopped:
        cli.run(lambda: train(folder))
    assert stopped.value.code == 2
    target = RunFolder(folder).checkpoint_path(4)
    advice = "make room or mend it, then run the same command"
    assert capsys.readouterr().err == f"error: {target}: cannot be written ({reason}); {advice}\n"
    assert {path: path.read_bytes() for path in folder.glob("checkpoints/**/*") if path.is_file()} == before
    assert names(folder / "checkpoints") == ["step_000000002", "step_000000003"]  # and no half one that takes room
    assert_ends_as_an_untouched_run(folder, capsys)


def test_a_folder_that_cannot_be_written_is_named_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    steps: list[int] = []
    message = f"{tmp_path / 'file' / 'run'}: cannot be written (Not a directory); make room or mend it, then run"
    with pytest.raises(UserError, match=re.escape(message)):
        train(tmp_path / "file" / "run", steps.append)
    assert steps == []


def test_a_run_whose_folder_can_no_longer_be_written_does_not_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(KeyError):
        train(folder, at_step(4, lambda: raise_(KeyError())))
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_through", lambda *_: raise_(OSError(errno.EROFS, "Read-only file system")))
        with pytest.raises(UserError, match=r"run: cannot be written \(Read-only file system\)"):
            train(folder, lambda step: pytest.fail("it trained"))
    assert_ends_as_an_untouched_run(folder, capsys)


class Fatal(Dataset[int]):
    """Whose reader is killed by the system, as where memory is short."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return index


def test_a_process_that_reads_data_and_is_killed_ends_the_run_in_one_line(tmp_path: Path) -> None:
    message = (
        rf"^step 3: a process that reads data was killed \(DataLoader worker \(pid.*\); last checkpoint: "
        rf"{RunFolder(tmp_path).checkpoint_path(2)}; free memory or choose fewer run.num_workers, then run the same"
    )
    loader = DataLoader(Fatal(), num_workers=1, multiprocessing_context="fork")
    with pytest.raises(UserError, match=message):
        train(tmp_path, at_step(3, lambda: next(iter(loader))))
