"""The short form of the kill test, and that it would notice what it looks for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).with_name("kill.py")


def test_a_run_that_is_killed_ends_as_one_that_is_not() -> None:
    command = [sys.executable, SCRIPT, "--kills", "3", "--stages", "autoencoder", "--processes", "1", "--seed", "5"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    (row,) = [line.split() for line in result.stdout.splitlines() if line.strip().startswith("autoencoder ")]
    ranks, _, kills, *hits, differ = map(int, row[1:])
    assert (ranks, kills, sum(hits), differ) == (1, 3, 3, 0)


@pytest.fixture(scope="module")
def kill() -> Iterator[ModuleType]:
    """The script as a module; it sets the environment of a process that is all its own."""
    environment = dict(os.environ)
    spec = spec_from_file_location("kill", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["kill"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["kill"]
    os.environ.clear()
    os.environ.update(environment)


def write_run(folder: Path, seconds: float) -> Path:
    """The files that a run leaves, as far as their form matters."""
    checkpoint = folder / "checkpoints" / "step_000000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "network.safetensors").write_bytes(bytes(range(9)))
    thing = {"num_bytes": 9, "sha256": "ab", "rest": {"lr": 0.1}}
    description = {"step": 4, "seconds": seconds, "things": {"network": thing}, "config": {"dir": str(folder)}}
    description |= {"summary": {"seconds": seconds, "answer": 1}, "sha256": str(seconds)}
    (checkpoint / "checkpoint.json").write_text(json.dumps(description))
    (folder / "config.yaml").write_text(f"dir: {folder}\n")
    (folder / "summary.json").write_text(json.dumps(description["summary"]))
    rows = [{"step": step, "seconds": seconds, "loss": 1 / step} for step in (2, 4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tensorboard").mkdir()
    (folder / "tensorboard" / str(seconds)).touch()
    return folder


def replace(file: str, old: str, new: str) -> Callable[[Path], object]:
    def change(run: Path) -> None:
        path = run / file
        text = path.read_text(encoding="latin-1")
        assert old in text
        path.write_text(text.replace(old, new), encoding="latin-1")

    return change


METRICS = "metrics.jsonl"
DESCRIPTION = "checkpoints/step_000000004/checkpoint.json"


@pytest.mark.parametrize(
    ("change", "file"),
    [
        (replace("checkpoints/step_000000004/network.safetensors", "\x03", "\x02"), None),
        (replace(DESCRIPTION, '"step": 4', '"step": 5'), DESCRIPTION),
        (replace(DESCRIPTION, '"sha256": "ab"', '"sha256": "ac"'), DESCRIPTION),
        (replace(DESCRIPTION, '"lr": 0.1', '"lr": 0.10000000000000002'), DESCRIPTION),
        (replace(METRICS, "0.25", "0.25000000000000006"), METRICS),
        (replace(METRICS, '"step": 4', '"step": 3'), METRICS),
        (lambda run: (run / METRICS).write_text((run / METRICS).read_text() * 2), METRICS),
        (lambda run: (run / METRICS).write_text((run / METRICS).read_text().split("\n")[0]), METRICS),
        (replace("summary.json", '"answer": 1', '"answer": 2'), "summary.json"),
        (lambda run: (run / "summary.json").unlink(), "summary.json"),
        (lambda run: (run / ".x.tmp").touch(), ".x.tmp"),
        (lambda run: shutil.rmtree(run / "checkpoints" / "step_000000004"), DESCRIPTION),
    ],
)
def test_a_difference_is_noticed(
    kill: ModuleType, tmp_path: Path, change: Callable[[Path], object], file: str | None
) -> None:
    whole, run = write_run(tmp_path / "whole", 1.0), write_run(tmp_path / "run", 2.0)
    assert kill.compare(whole, run) == []
    change(run)
    assert (file or "checkpoints/step_000000004/network.safetensors") in kill.compare(whole, run)
