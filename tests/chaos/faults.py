"""Lose one process of two, or change their number, and see what becomes of the run.

    python tests/chaos/faults.py
    python tests/chaos/faults.py --stages autoencoder,gan

For each stage: one of two processes gets SIGKILL in training, and the other must end by itself, soon, with status 2
and a line that names the step; one gets SIGSTOP, and the other must do so after ``run.timeout_minutes``. The same
command must then end with the weights, averages and optimizer states of a run that nobody touched, bit for bit.
Last, a run of two processes goes on on one, and the other way round: all numbers must agree to 1e-6. The exit status
is 1 if anything is otherwise. Runs are those of ``kill.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

from kill import (
    STAGES,
    Launcher,
    checkpoint,
    expect_success,
    fork,
    log_of,
    make_inputs,
    stages,
    wait_until,
    working_folder,
)
from safetensors.torch import load_file
from torch import Tensor

from ldgan.engine import cli

NUM_STEPS, HIT_AFTER = 16, 8  # steps of a run, and a step with a checkpoint after which it is hit
TIMEOUT_SECONDS = 5.0
PATIENCE = 60.0  # seconds in which a process ends that need not wait; busy machines are slow
TOLERANCE = 1e-6  # of the norm of each tensor's difference, relative to the tensor's own


class Run:
    """A run of a stage, on however many processes."""

    def __init__(self, folder: Path, stage: str, name: str) -> None:
        self.path = folder / f"{stage}_{name}"
        self._folder, self._stage = folder, stage

    def complete(self, num_processes: int) -> None:
        """Start it and wait for its end."""
        expect_success(self.start(num_processes), log_of(self.path))

    def start(self, num_processes: int, *settings: str) -> list[int]:
        """Start it; its processes."""
        launcher = Launcher(self._folder, self._stage, num_processes, fresh=False)
        return launcher.start(self.path, f"run.num_steps={NUM_STEPS}", *settings)

    def start_until_hit(self, num_processes: int, *settings: str) -> list[int]:
        """Start it, and wait until it has the checkpoint after which it is to be hit; its processes."""
        pids = self.start(num_processes, *settings)
        if not wait_until(checkpoint(self.path, HIT_AFTER).exists, pids, PATIENCE):
            raise cli.UserError(f"{log_of(self.path)}: ended before step {HIT_AFTER}")
        return pids

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the last checkpoint, by file and name."""
        files = checkpoint(self.path, NUM_STEPS).glob("*.safetensors")
        return {f"{file.name}:{name}": tensor for file in files for name, tensor in load_file(file).items()}

    def rows(self) -> list[dict[str, float]]:
        """What was logged, but for times."""
        lines = (self.path / "metrics.jsonl").read_text().splitlines()
        return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]

    def log(self) -> str:
        """What its processes have printed."""
        return log_of(self.path).read_text()


def main() -> None:
    """Make the data, do the damage, and say what was found."""
    flags = parse_flags()
    wrong: list[str] = []
    with working_folder(None) as folder:
        expect_success([fork(lambda: make_inputs(folder), {}, folder / "inputs.log")], folder / "inputs.log")
        for stage in flags.stages:
            untouched = Run(folder, stage, "untouched")
            untouched.complete(2)
            for number, rank in ((signal.SIGKILL, 1), (signal.SIGSTOP, 0)):
                wrong += lose_a_process(untouched, Run(folder, stage, number.name), number, rank)
            for before, after in ((2, 1), (1, 2)):
                wrong += share_otherwise(untouched, Run(folder, stage, f"{before}_to_{after}"), before, after)
    print("\n".join(wrong) or "every run ended as it should")
    if wrong:
        sys.exit(1)


def lose_a_process(untouched: Run, run: Run, number: signal.Signals, rank: int) -> list[str]:
    """Send a signal to one process of two, wait for the end of the other, start both again; what is wrong."""
    pids = run.start_until_hit(2, f"run.timeout_minutes={TIMEOUT_SECONDS / 60}")
    os.kill(pids[rank], number)
    survivor, started = pids[1 - rank], time.monotonic()
    ended = not wait_until(lambda: False, [survivor], TIMEOUT_SECONDS + PATIENCE)
    seconds = time.monotonic() - started
    os.killpg(pids[0], signal.SIGKILL)
    status, _ = (os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in (survivor, pids[rank]))
    (line,) = re.findall(r"^error: step .*", run.log(), re.MULTILINE) or [""]
    print(f"{run.path.name}: the other process ended after {seconds:.1f} s with status {status}: {line}")
    expected = rf"error: step \d+: another process of the run died or hangs \(.*\); last checkpoint: {run.path}/.*"
    checks = {
        "the other process did not end": ended,
        f"status {status} instead of 2": status == 2,
        "no line that says why": re.fullmatch(expected, line) is not None,
        "half a checkpoint is left": not any(run.path.glob("checkpoints/.*")),
    }
    run.complete(2)
    checks["other weights, averages or optimizer states"] = largest_difference(untouched, run) == 0
    checks["other rows"] = untouched.rows() == run.rows()
    return [f"{run.path.name}: {what}" for what, right in checks.items() if not right]


def share_otherwise(untouched: Run, run: Run, before: int, after: int) -> list[str]:
    """Kill a run of some processes, and let it go on on another number of them; what is wrong."""
    pids = run.start_until_hit(before)
    os.killpg(pids[0], signal.SIGKILL)
    for pid in pids:
        os.waitpid(pid, 0)
    run.complete(after)
    difference = largest_difference(untouched, run)
    print(f"{run.path.name}: tensors differ by {difference:.1g} of their norms")
    note = rf"^note: the number of processes was {before} and is {after}: steps see the same samples and"
    steps = [[row["step"] for row in each.rows()] for each in (untouched, run)]
    checks = {
        f"tensors differ by {difference:.2g}": difference <= TOLERANCE,
        "it did not say once what changes": len(re.findall(note, run.log(), re.MULTILINE)) == 1,
        "other rows": steps[0] == steps[1],
    }
    return [f"{run.path.name}: {what}" for what, right in checks.items() if not right]


def largest_difference(one: Run, other: Run) -> float:
    """The largest norm of a difference of two tensors of the same name, over the norm of the one."""
    ours, theirs = one.tensors(), other.tensors()
    if not ours or ours.keys() != theirs.keys():
        return float("inf")
    differences = ((ours[name].double() - theirs[name].double()).norm() for name in ours)
    return max(
        float(difference / ours[name].double().norm().clamp(min=1e-30)) for name, difference in zip(ours, differences)
    )


def parse_flags() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--stages", type=stages, default=[*STAGES], metavar="NAME,...", help=f"(default: {','.join(STAGES)})"
    )
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
