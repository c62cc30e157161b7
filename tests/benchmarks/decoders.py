"""What light decoders cost and what they lose, beside the full decoder of one autoencoder: the trade as a table.

    python tests/benchmarks/decoders.py --autoencoder runs/mine/autoencoder --latents data/mine_latents \\
        --light runs/mine/light_small runs/mine/light_medium
    python tests/benchmarks/decoders.py --autoencoder runs/mine/autoencoder --latents data/mine_latents \\
        --light runs/mine/autoencoder/light_decoder --size 512 --batch-size 1 --precision bf16 \\
        --perceptual lpips-alex --perceptual-weights alexnet-owt-7be5be79.pth

PSNR and the perceptual distance are to the full decoder's output on the first --num-latents posterior means, at the
size of the data. GMAC are multiply-adds for one image of --size. Speed is measured at --size on random latents,
all decoders taking turns in one process: medians over --repeats. Let nothing else run on the machine.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from autoencoder.inference.latents import check_latents
from autoencoder.inference.light_decoder import read_light_decoder
from autoencoder.inference.trained_autoencoder import load_autoencoder
from autoencoder.models.autoencoder import AutoencoderKL
from autoencoder.models.light_decoder import LightDecoder
from autoencoder.models.perceptual import perceptual_network
from autoencoder.training.distillation import agreement_metrics, measure_agreement
from data_prep.loader import LatentDataset, sequential_batches
from data_prep.shards import ShardSet
from ldgan.engine import cli

FULL = "full decoder"

Decoder: TypeAlias = AutoencoderKL | LightDecoder


def main() -> None:
    """Count, compare, time, and print a table."""
    flags = parse_flags()
    torch.set_num_threads(flags.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    autoencoder = load_autoencoder(flags.autoencoder, device)
    latents = LatentDataset(ShardSet.open(flags.latents))
    check_latents(latents.shards, autoencoder)
    lights = {str(path): read_light_decoder(path, autoencoder, device) for path in flags.light}
    perceptual = perceptual_network(flags.perceptual, flags.perceptual_weights) if flags.perceptual else None
    metrics = agreement_metrics(perceptual.to(device) if perceptual else None)

    decoders: dict[str, Decoder] = {FULL: autoencoder, **lights}
    macs = {name: count_decoder_macs(decoder, autoencoder, flags.size) for name, decoder in decoders.items()}
    agreement = {}
    for name, light in lights.items():
        batches = sequential_batches(latents, flags.batch_size, limit=flags.num_latents)
        means = measure_agreement(light, autoencoder, batches, metrics)
        agreement[name] = [f"{mean.mean:.4g}" for mean in means]
    seconds = alternating_medians(decoding_work(decoders, autoencoder, flags, device), flags.repeats)

    threads = f"{flags.threads} threads, " if device == "cpu" else ""
    machine = f"{threads}{device}, {platform.machine()}, torch {torch.__version__}, {flags.precision}"
    reference = f"first {min(flags.num_latents, len(latents)):,} latents of {flags.latents}"
    speed = f"images of {flags.size} px, batches of {flags.batch_size}"
    table = Table(title=f"{machine}\n{speed}; agreement on the {reference}")
    names = [f"{metric.name} ({metric.unit})" if metric.unit else metric.name for metric in metrics]
    for column in ("decoder", "parameters (M)", "GMAC", *names, "images/s", "speed-up"):
        table.add_column(column, justify="left" if column == "decoder" else "right")
    for name, decoder in decoders.items():
        table.add_row(
            name,
            f"{num_parameters(decoder) / 1e6:.2f}",
            f"{macs[name] / 1e9:.2f}",
            *agreement.get(name, ["reference"] * len(metrics)),
            f"{flags.batch_size / seconds[name]:,.1f}",
            f"{seconds[FULL] / seconds[name]:.1f}",
        )
    Console(width=160).print(table)


def count_macs(function: Callable[..., object], *inputs: Tensor) -> int:
    """Multiply-adds of ``function(*inputs)`` in convolutions, linear layers and attention; the rest counts nothing.

    They depend on shapes alone, so tensors and weights on the device "meta" will do, and cost nothing.
    """
    # The fused kernels of attention are opaque to the counter; the plain one is two matrix products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function(*inputs)
    return counter.get_total_flops() // 2


def count_decoder_macs(decoder: Decoder, autoencoder: AutoencoderKL, size: int) -> int:
    """Multiply-adds of decoding one image of ``size`` pixels."""
    latents = torch.empty(1, *autoencoder.latent_shape(size), device="meta")
    return count_macs(copy.deepcopy(decoder).to("meta").decode, latents)


def num_parameters(decoder: Decoder) -> int:
    """Weights that decoding uses."""
    network = decoder.decoder if isinstance(decoder, AutoencoderKL) else decoder
    return sum(parameter.numel() for parameter in network.parameters())


def decoding_work(
    decoders: Mapping[str, Decoder], autoencoder: AutoencoderKL, flags: argparse.Namespace, device: str
) -> dict[str, Callable[[], object]]:
    """For each decoder, decoding of one batch of random latents."""
    latents = torch.randn(flags.batch_size, *autoencoder.latent_shape(flags.size), device=device)

    def work(decoder: Decoder) -> Callable[[], object]:
        def run() -> object:
            with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=flags.precision == "bf16"):
                return decoder.decode(latents)

        return run

    return {name: work(decoder) for name, decoder in decoders.items()}


def alternating_medians(work: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median wall-clock seconds of each piece of work; they take turns, after an untimed one each."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(1 + repeats):
        for name, run in work.items():
            started = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def parse_flags() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--autoencoder", type=Path, required=True, metavar="RUN", help="run of autoencoder/train.py")
    parser.add_argument("--latents", type=Path, required=True, metavar="SHARDS", help="latent shards of its own")
    parser.add_argument(
        "--light",
        type=Path,
        nargs="+",
        required=True,
        metavar="DIR",
        help="light decoders of the autoencoder: runs of autoencoder/distill.py, or what they saved",
    )
    parser.add_argument("--size", type=cli.positive, default=256, help="side of the images in pixels (default: 256)")
    parser.add_argument("--num-latents", type=cli.positive, default=256, help="latents for PSNR (default: 256)")
    parser.add_argument("--perceptual", metavar="NETWORK", help="also this distance: lpips-alex, say")
    parser.add_argument("--perceptual-weights", type=Path, metavar="FILE", help="local weights of its backbone")
    parser.add_argument("--batch-size", type=cli.positive, default=4, help="images per decoding (default: 4)")
    parser.add_argument("--repeats", type=cli.positive, default=15, help="timed turns of each (default: 15)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the timing (default: fp32)")
    parser.add_argument("--threads", type=cli.positive, default=os.cpu_count(), help="CPU threads (default: all cores)")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
