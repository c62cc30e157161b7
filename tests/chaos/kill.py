"""Kill training runs at random moments, start them again, and compare their ends with that of a run left alone.

    python tests/chaos/kill.py
    python tests/chaos/kill.py --kills 50 --stages autoencoder,gan --processes 1,2 --seed 1
    python tests/chaos/kill.py --kills 3 --stages gan --processes 1 --fresh     (a new interpreter for each start)

All processes of a run get SIGKILL at once: at any moment since the start (half of the kills), while a checkpoint is
being written (four tenths), or between the last checkpoint and the summary (a tenth). The same command starts again
until the run ends. Then weights, averages, optimizer states, checkpoints kept, logged rows, previews and summary must
equal, bit for bit, those of a run of as many processes that nobody killed; only times may differ. The exit status is
1 if anything else does.

Networks are tiny, images are noise, and all is done on the CPU. Importing libraries takes longer than such a run; so
they are imported once, and each start is a fork of that process, unless --fresh is given.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

# Before libraries are imported. Sums depend on the number of threads in their last bits.
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HOME": os.devnull}

import numpy as np
import torch
import torch._dynamo  # the first optimizer of a process imports it, which takes longer than a run
from PIL import Image
from rich.console import Console
from rich.table import Table

import autoencoder.train
import ldgan.train
from autoencoder.inference.trained_autoencoder import KIND, WEIGHTS
from autoencoder.models.autoencoder import AutoencoderKL
from autoencoder.models.config import AutoencoderConfig
from data_prep.images import encode_image
from data_prep.shards import ShardWriter
from ldgan.engine import cli
from ldgan.engine.checkpoint import save_checkpoint
from ldgan.engine.files import temporary_name
from ldgan.engine.progress import progress_bar
from ldgan.engine.run import RunFolder

ROOT = Path(__file__).resolve().parents[2]
RESOLUTION, NUM_IMAGES = 32, 64
NUM_STEPS, SAVE_EVERY = 40, 4
SAVES = range(SAVE_EVERY, NUM_STEPS + 1, SAVE_EVERY)
AUTOENCODER = {"base_channels": 8, "channel_multipliers": [1, 1, 2]}
MOMENTS = {"anywhere": 0.5, "saving": 0.4, "ending": 0.1}  # and the share of the kills
MAX_SECONDS = 600.0  # a start that takes longer hangs

RUN = (
    *(f"run.num_steps={NUM_STEPS}", "run.batch_size=8", "run.num_micro_batches=2", "run.num_threads=1"),
    *(f"run.checkpoint_every_steps={SAVE_EVERY}", "run.log_every_steps=3", "run.preview_every_steps=10"),
)


class Stage(NamedTuple):
    """A training command: its script, what the script calls, and its settings."""

    script: str
    main: Callable[[], None]
    settings: tuple[str, ...]


STAGES = {
    "autoencoder": Stage(
        "autoencoder/train.py",
        autoencoder.train.main,
        (
            *(f"network.{key}={value}".replace(" ", "") for key, value in AUTOENCODER.items()),
            *("adversarial.weight=0.1", "adversarial.start_step=10", "adversarial.num_layers=1"),
            *("adversarial.base_channels=8", "loss.learned_variance=true", "optimizer.warmup_steps=5", "flips=true"),
        ),
    ),
    "gan": Stage(
        "ldgan/train.py",
        ldgan.train.main,
        (
            *("--latent", "num_timesteps=2", "loss.r1_every_steps=2"),
            *("generator.base_channels=8", "generator.num_res_blocks=1", "generator.z_dim=8"),
            *("generator.embedding_dim=16", "discriminator.widths=[8,8]", "flips=true"),
        ),
    ),
}


class Result(NamedTuple):
    """What became of the runs of a stage and a number of processes."""

    stage: str
    num_processes: int
    num_runs: int
    kills: Counter[str]
    differences: list[str]


def main() -> None:
    """Make the data, kill, compare, and print a table."""
    flags = parse_flags()
    chance = random.Random(flags.seed)
    settings = [(stage, number) for stage in flags.stages for number in flags.processes]
    results = []
    with working_folder(flags.out) as folder, progress_bar("kills", flags.kills, "kills") as bar:
        expect_success([fork(lambda: make_inputs(folder), {}, folder / "inputs.log")], folder / "inputs.log")
        for index, (stage, num_processes) in enumerate(settings):
            num_kills = flags.kills // len(settings) + (index < flags.kills % len(settings))
            launcher = Launcher(folder, stage, num_processes, flags.fresh)
            results.append(run_and_kill(launcher, num_kills, chance, bar.advance))
    Console().print(table(results))
    different = [line for result in results for line in result.differences]
    print("\n".join(different) or "every run that was killed ended as the one that was not")
    if different:
        sys.exit(1)


def run_and_kill(launcher: Launcher, num_kills: int, chance: random.Random, advance: Callable[[], None]) -> Result:
    """Run once undisturbed, then again and again until there were ``num_kills`` kills; compare each end."""
    undisturbed = launcher.folder / f"{launcher.name}_undisturbed"
    seconds = launcher.complete(undisturbed)
    kills: Counter[str] = Counter()
    differences: list[str] = []
    num_runs = 0
    while kills.total() < num_kills:
        run = launcher.folder / f"{launcher.name}_{num_runs}"
        num_runs += 1
        while kills.total() < num_kills:
            moment = chance.choices([*MOMENTS], [*MOMENTS.values()])[0]
            if not launcher.start_and_kill(run, moment, chance, seconds):
                break
            kills[what_was_hit(run)] += 1
            advance()
        launcher.complete(run)  # a run that has ended stays as it is
        differences += [f"{run}: {name} differs" for name in compare(undisturbed, run)]
    return Result(launcher.stage, launcher.num_processes, num_runs, kills, differences)


class Launcher:
    """Starts all processes of a stage's command."""

    def __init__(self, folder: Path, stage: str, num_processes: int, fresh: bool) -> None:
        self.folder, self.stage, self.num_processes, self._fresh = folder, stage, num_processes, fresh
        self.name = f"{stage}_{num_processes}"

    def complete(self, run: Path) -> float:
        """Start the command and wait for its end; the seconds that it took."""
        started = time.monotonic()
        expect_success(self.start(run), log_of(run))
        return time.monotonic() - started

    def start_and_kill(self, run: Path, moment: str, chance: random.Random, seconds: float) -> bool:
        """Start the command and kill it at a ``moment``; whether it was still under way.

        ``seconds`` is how long a whole run takes.
        """
        saved = max((step for step in SAVES if checkpoint(run, step).exists()), default=0)
        pids = self.start(run)
        if not wait_for(moment, run, pids, saved, chance, seconds):
            expect_success(pids, log_of(run))
            return False
        os.killpg(pids[0], signal.SIGKILL)
        statuses = [os.waitpid(pid, 0)[1] for pid in pids]
        if any(os.WIFEXITED(status) and os.WEXITSTATUS(status) for status in statuses):
            raise failure(log_of(run), statuses)
        return any(os.WIFSIGNALED(status) for status in statuses)

    def start(self, run: Path, *more_settings: str) -> list[int]:
        """Start the processes, in a group of their own whose number is the first one's."""
        script, main, settings = STAGES[self.stage]
        words = [script, f"data={self.folder / 'images'}", f"run.dir={run}", *RUN, *settings, *more_settings]
        words += [f"autoencoder={self.folder / 'autoencoder'}"] if "--latent" in settings else []

        def command() -> None:
            sys.argv = words
            if self._fresh:
                os.chdir(ROOT)
                os.execv(sys.executable, [sys.executable, *words])
            main()

        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(self.num_processes)}
        pids: list[int] = []
        for rank in range(self.num_processes):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            environment = address | ranks if self.num_processes > 1 else {}
            pids.append(fork(command, environment, log_of(run), pids[0] if pids else 0))
        return pids


def fork(command: Callable[[], None], environment: Mapping[str, str], log: Path, group: int = 0) -> int:
    """Do ``command`` in a copy of this process, which joins a process group (0: a new one); its number."""
    sys.stdout.flush()
    if pid := os.fork():
        with contextlib.suppress(PermissionError):  # the copy has done it, and goes by another program already
            os.setpgid(pid, group or pid)
        return pid
    try:
        os.setpgid(0, group)
        os.environ |= environment
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        cli.run(command)
    except SystemExit as done:
        status = done.code if isinstance(done.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # what this process would do at its end is none of the copy's business


def wait_for(moment: str, run: Path, pids: list[int], saved: int, chance: random.Random, seconds: float) -> bool:
    """Wait for the moment to kill a run that goes on from the step ``saved``; whether it is still under way."""
    if moment == "anywhere":
        return wait_until(lambda: False, pids, chance.uniform(0, seconds))
    target, later = checkpoint(run, NUM_STEPS), [step for step in SAVES if step > saved]
    if moment == "saving" and later:
        target = temporary_name(checkpoint(run, chance.choice(later[:5])))
    under_way = wait_until(target.exists, pids, MAX_SECONDS)
    time.sleep(chance.uniform(0, 0.02))  # to write a checkpoint, or what follows the last one, takes about that long
    return under_way


def wait_until(arrived: Callable[[], bool], pids: list[int], seconds: float) -> bool:
    """Wait for something, for ``seconds``, or until all processes have ended; whether any of them still runs."""
    deadline = time.monotonic() + seconds
    while not arrived() and time.monotonic() < deadline:
        if all(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) for pid in pids):
            return False
        time.sleep(0.0005)
    return True


def expect_success(pids: list[int], log: Path) -> None:
    """Wait for processes; raise a UserError that shows the end of their log unless all exit with status 0."""
    if wait_until(lambda: False, pids, MAX_SECONDS):
        os.killpg(pids[0], signal.SIGKILL)
    statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    if any(statuses):
        raise failure(log, statuses)


def failure(log: Path, statuses: list[int]) -> cli.UserError:
    """What to say of a start that ended otherwise than by success or a kill."""
    return cli.UserError(f"{log}: a start did not end well ({statuses}); its last lines:\n{log.read_text()[-2000:]}")


def what_was_hit(run: Path) -> str:
    """What a run was doing when it was killed, by what it left; it starts until it has a checkpoint."""
    if any(run.glob("checkpoints/.*.tmp")):
        return "saving"
    if checkpoint(run, NUM_STEPS).exists():
        return "ending"
    return "training" if any(run.glob("checkpoints/step_*")) else "starting"


def checkpoint(run: Path, step: int) -> Path:
    """The checkpoint of a step."""
    return RunFolder(run).checkpoint_path(step)


def log_of(run: Path) -> Path:
    """Where all that a run prints goes."""
    return run.with_name(f"{run.name}.log")


def compare(undisturbed: Path, run: Path) -> list[str]:
    """Names of the files that are in one run only, or differ in more than times and the run's own path."""
    ours, theirs = contents(undisturbed), contents(run)
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def contents(run: Path) -> dict[str, Any]:
    """All that a run holds, by path; of TensorBoard's files nothing, since each start begins a new one."""
    files = (path for path in run.rglob("*") if path.is_file() and "tensorboard" not in path.parts)
    return {str(path.relative_to(run)): content(path, run) for path in files}


def content(path: Path, run: Path) -> Any:
    """A file's bytes, those of JSON parsed and without times and checksums over them."""
    data = path.read_bytes()
    if path.suffix == ".jsonl":
        return [repr(without_times(json.loads(line))) for line in data.splitlines()]
    if path.suffix == ".json":
        return repr(without_times(json.loads(data))).replace(str(run), "RUN")
    return data.replace(str(run).encode(), b"RUN") if path.suffix == ".yaml" else data


def without_times(value: Any) -> Any:
    """JSON without what is called seconds, and without the checksum of a checkpoint's description."""
    if not isinstance(value, dict):
        return value
    sealed = "things" in value
    dropped = {"seconds", "sha256"} if sealed else {"seconds"}
    return {key: without_times(item) for key, item in value.items() if key not in dropped}


def table(results: list[Result]) -> Table:
    """Kills by what they hit, and how many runs differ in their ends."""
    columns = ("starting", "training", "saving", "ending")
    table = Table("stage", "ranks", "runs", "kills", *columns, "differ", box=None, padding=(0, 2, 0, 0))
    for result in results:
        hits = [str(result.kills[column]) for column in columns]
        num_different = len({line.split(": ")[0] for line in result.differences})
        numbers = (result.num_processes, result.num_runs, result.kills.total())
        table.add_row(result.stage, *map(str, numbers), *hits, str(num_different))
    return table


def make_inputs(folder: Path) -> None:
    """Image shards of noise, and an autoencoder with random weights that counts as finished."""
    noise = np.random.default_rng(0)
    with ShardWriter(folder / "images", "images", samples_per_shard=16, details={"resolution": RESOLUTION}) as writer:
        for _ in range(NUM_IMAGES):
            pixels = noise.integers(0, 256, (RESOLUTION, RESOLUTION, 3), dtype=np.uint8)
            writer.write({"png": encode_image(Image.fromarray(pixels), "png", 0)})
    torch.manual_seed(0)
    config = AutoencoderConfig(**AUTOENCODER)
    description = {"kind": KIND, "config": {"network": vars(config)}, "latent_statistics": {}}
    save_checkpoint(folder / "autoencoder", {WEIGHTS: AutoencoderKL(config)}, description)


@contextlib.contextmanager
def working_folder(out: Path | None) -> Iterator[Path]:
    """The folder ``out``, which must be new, or a temporary one."""
    if out is None:
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)
        return
    if out.exists():
        raise cli.UserError(f"{out}: exists already; choose a new folder by --out")
    out.mkdir(parents=True)
    yield out.resolve()


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def parse_flags() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=cli.positive, default=50, metavar="N", help="in all (default: 50)")
    parser.add_argument(
        "--stages", type=stages, default=[*STAGES], metavar="NAME,...", help=f"(default: {','.join(STAGES)})"
    )
    parser.add_argument(
        "--processes", type=numbers, default=[1, 2], metavar="N,...", help="of each run, 1 or 2 (default: 1,2)"
    )
    parser.add_argument("--seed", type=int, default=0, help="decides when to kill (default: 0)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="new folder for all runs (default: a temporary one)")
    parser.add_argument("--fresh", action="store_true", help="start a new interpreter each time, which is slower")
    return parser.parse_args()


def stages(text: str) -> list[str]:
    """Parse names of stages, for argparse."""
    names = text.split(",")
    if unknown := set(names) - set(STAGES):
        raise argparse.ArgumentTypeError(f"{min(unknown)} is none of {', '.join(STAGES)}")
    return names


def numbers(text: str) -> list[int]:
    """Parse numbers of processes, for argparse; the batch has two parts."""
    if unknown := set(text.split(",")) - {"1", "2"}:
        raise argparse.ArgumentTypeError(f"{min(unknown)!r} is neither 1 nor 2")
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    cli.run(main)
