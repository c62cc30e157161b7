"""Seconds and peak memory of encoding and decoding: our autoencoder and diffusers' with the same weights.

    python tests/benchmarks/autoencoder_vs_diffusers.py
    python tests/benchmarks/autoencoder_vs_diffusers.py --size 512 --repeats 5 --threads 1

The network is that of Stable Diffusion's autoencoders: f8, 128, 256, 512 and 512 channels, 4 latent channels, 84 M
parameters; its weights are random. One process times both libraries in turn, so that whatever else happens on
the machine happens to both; it checks first that they compute the same. Medians over --repeats after a warm-up.
Memory is the most that a single pass adds to a process that holds the weights, each in a process of its own.
Needs diffusers (in the dev extra) and, for the memory, Linux with glibc. CPU only.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import platform
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import diffusers
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from autoencoder.inference.trained_autoencoder import load_autoencoder
from ldgan.engine import cli

LIBRARIES, TASKS, PRECISIONS = ("ours", "diffusers"), ("encode", "decode"), ("fp32", "bf16")
FACTOR, LATENT_CHANNELS = 8, 4


def main() -> None:
    """Time both libraries, measure their memory, and print a table."""
    flags = parse_flags()
    torch.set_num_threads(flags.threads)
    table = Table(title=f"{flags.size} px, batch {flags.batch_size}, {flags.threads} threads, {platform.machine()}")
    for column in ("what", "precision", "library", "seconds (median)", "fastest", "peak MiB"):
        table.add_column(column, justify="left" if column in ("what", "library") else "right")
    with tempfile.TemporaryDirectory() as folder:
        save_random_model(Path(folder))
        models = {library: load(Path(folder), library) for library in LIBRARIES}
        for task in TASKS:
            data = random_data(task, flags.size, flags.batch_size)
            for precision in PRECISIONS:
                times = time_in_turn(models, task, precision, data, flags.repeats)
                for library in LIBRARIES:
                    memory = in_new_process(peak_memory, Path(folder), library, task, precision, data, flags.threads)
                    seconds = (f"{statistics.median(times[library]):.3f}", f"{min(times[library]):.3f}")
                    table.add_row(task, precision, library, *seconds, f"{memory / 2**20:,.0f}")
    Console(width=120).print(table)
    print(f"torch {torch.__version__}, diffusers {diffusers.__version__}")


def save_random_model(folder: Path) -> None:
    """Save a model of diffusers of Stable Diffusion's size, in its format."""
    torch.manual_seed(0)
    model: Any = diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
        latent_channels=LATENT_CHANNELS,
        scaling_factor=1.0,
    )
    model.save_pretrained(folder)


def load(folder: Path, library: str) -> Any:
    """The model of ``folder``, as users of either library load it."""
    return load_autoencoder(folder) if library == "ours" else diffusers.AutoencoderKL.from_pretrained(folder).eval()


def random_data(task: str, size: int, batch_size: int) -> Tensor:
    """Images in [-1, 1] to encode, or latents to decode, of images of ``size`` pixels."""
    generator = torch.Generator().manual_seed(0)
    if task == "encode":
        return torch.rand(batch_size, 3, size, size, generator=generator) * 2 - 1
    return torch.randn(batch_size, LATENT_CHANNELS, size // FACTOR, size // FACTOR, generator=generator)


@torch.inference_mode()
def run(model: Any, task: str, precision: str, data: Tensor) -> Tensor:
    """Encode to posterior means, or decode."""
    with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext():
        result = model.encode(data) if task == "encode" else model.decode(data)
    if task == "encode":
        return getattr(result, "latent_dist", result).mean
    return getattr(result, "sample", result)


def time_in_turn(
    models: dict[str, Any], task: str, precision: str, data: Tensor, repeats: int
) -> dict[str, list[float]]:
    """Seconds of ``repeats`` passes of each library; the warm-up checks that they compute the same."""
    ours, theirs = (run(model, task, precision, data).float() for model in models.values())
    tolerance = 1e-4 if precision == "fp32" else 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
    times: dict[str, list[float]] = {library: [] for library in models}
    for _ in range(repeats):
        for library, model in models.items():
            started = time.perf_counter()
            run(model, task, precision, data)
            times[library].append(time.perf_counter() - started)
    return times


def in_new_process(function: Any, *arguments: object) -> Any:
    """Call a function of this module in a process that has done nothing before."""
    # There freed tensors go back to the system at once. Else the peak depends on what malloc happens to keep: the
    # same pass differed by 50 MiB from run to run.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def peak_memory(folder: Path, library: str, task: str, precision: str, data: Tensor, threads: int) -> int:
    """Bytes of resident memory that one pass adds at its peak.

    The system's count, since PyTorch does not see what oneDNN allocates.
    """
    torch.set_num_threads(threads)
    model = load(folder, library)
    run(model, task, precision, random_data(task, 2 * FACTOR, 1))  # weights that are mapped files get resident
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: importing and loading had their own
    before = resident("VmRSS")
    run(model, task, precision, data)
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """Bytes of resident memory of this process: now (VmRSS) or at its peak (VmHWM)."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return 1024 * int(match[1])


def parse_flags() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=cli.positive, default=256, help="side of the images in pixels (default: 256)")
    parser.add_argument("--batch-size", type=cli.positive, default=1, help="images per pass (default: 1)")
    parser.add_argument("--repeats", type=cli.positive, default=10, help="timed passes of each (default: 10)")
    parser.add_argument("--threads", type=cli.positive, default=os.cpu_count(), help="CPU threads (default: all cores)")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
