"""How fast samples are read, in how much memory, and how well they are shuffled.

    python tests/benchmarks/loading.py
    python tests/benchmarks/loading.py --parts images --num-images 4096 --size 512 --workers 4
    python tests/benchmarks/loading.py --parts latents --ldgan configs/ldgan/latent256.yaml --latent-shape 4 32 32

images     our loader, torchvision's ImageFolder and plain webdataset on the same JPEG bytes, each with the same flip
           and the same normalisation; they take turns, an epoch a turn without its first batch: medians over --repeats
latents    our loader on latents against a training step of stage 2, both players, at its config's batch size
memory     peak memory of a process that reads an epoch, for sets of more and more shards
shuffling  batches of our order against those of a true permutation, for the same sets

Everything is generated, in a temporary folder. Let nothing else run on the machine.
"""

from __future__ import annotations

import argparse
import io
import itertools
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np
import psutil
import torch
import webdataset
from accelerate import Accelerator
from PIL import Image
from rich.console import Console
from rich.table import Table
from speed import diffusion_gan, game_step, timed
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from data_prep.images import encode_image
from data_prep.loader import ImageDataset, LatentDataset, SampleStream, TrainingOrder, read_batches
from data_prep.shards import ShardSet, ShardWriter
from ldgan.engine import cli
from ldgan.engine.config import load_config
from ldgan.engine.session import make_accelerator
from ldgan.train import TrainConfig
from ldgan.training.gan import Batch

Loaded: TypeAlias = dict[str, Tensor] | list[Tensor]

SET_SIZES = (10, 100, 1000)  # shards
SHUFFLED_EPOCHS = 10


def main() -> None:
    """Measure the parts that were asked for, and print a table of each."""
    flags = parse_flags()
    console = Console(width=120)
    console.print(f"{platform.machine()}, torch {torch.__version__}, {flags.workers} workers, {flags.threads} threads")
    parts = {"images": image_table, "latents": latent_table, "memory": memory_table, "shuffling": shuffling_table}
    for part in flags.parts:
        with tempfile.TemporaryDirectory() as folder:
            console.print(parts[part](flags, Path(folder)))


# --- Images -------------------------------------------------------------------------------------------------


def image_table(flags: argparse.Namespace, folder: Path) -> Table:
    """Images per second of three loaders, in batches of ``--batch-size``."""
    num_batches = flags.num_images // flags.batch_size
    if num_batches < 2:
        raise cli.UserError("--num-images makes less than two batches of --batch-size; raise one or lower the other")
    write_images(folder, flags.num_images, flags.size, flags.shard_size)
    loaders: dict[str, Callable[[], Iterable[Loaded]]] = {
        "ldgan": lambda: our_images(folder / "shards", flags),
        "torchvision ImageFolder": lambda: image_folder(folder / "classes", flags),
        "webdataset": lambda: plain_webdataset(folder / "shards", flags),
    }
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(flags.repeats):
        for name, open_loader in loaders.items():
            rates[name].append(samples_per_second(open_loader(), num_batches - 1))
    table = titled(f"{flags.num_images:,} images of {flags.size} px, batches of {flags.batch_size}")
    for column in ("images/s", "least", "most", "to the fastest peer"):
        table.add_column(column, justify="right")
    medians = {name: statistics.median(rate) for name, rate in rates.items()}
    fastest_peer = max(median for name, median in medians.items() if name != "ldgan")
    for name, rate in rates.items():
        numbers = (medians[name], min(rate), max(rate))
        table.add_row(name, *(f"{number:,.0f}" for number in numbers), f"{medians[name] / fastest_peer:.2f}")
    return table


def write_images(folder: Path, num_images: int, size: int, shard_size: int) -> None:
    """The same JPEG bytes as an ImageFolder in ``classes`` and as a shard set in ``shards``."""
    random = np.random.default_rng(0)
    (folder / "classes" / "0").mkdir(parents=True)
    with ShardWriter(folder / "shards", "images", samples_per_shard=shard_size) as writer:
        for index in range(num_images):
            # Smooth colours with a little noise: about the bytes of a photograph, which white noise has not.
            colours = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((size, size))
            pixels = np.asarray(colours) + random.normal(0, 4, (size, size, 3))
            jpeg = encode_image(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), "jpg", quality=90)
            (folder / "classes" / "0" / f"{index:09d}.jpg").write_bytes(jpeg)
            writer.write({"jpg": jpeg, "cls": b"0"})


def our_images(shards: Path, flags: argparse.Namespace) -> Iterator[dict[str, Tensor]]:
    """Our loader, as training opens it."""
    dataset = ImageDataset(ShardSet.open(shards))
    return read_batches(dataset, order_of(dataset, flags.batch_size, flips=True), flags.workers)


def image_folder(folder: Path, flags: argparse.Namespace) -> Iterable[Loaded]:
    """torchvision's ImageFolder, shuffled."""
    dataset = datasets.ImageFolder(folder, transform=peers_transform())
    return DataLoader(dataset, flags.batch_size, shuffle=True, num_workers=flags.workers)


def plain_webdataset(shards: Path, flags: argparse.Namespace) -> Iterable[Loaded]:
    """webdataset as its README has it."""
    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    dataset = (
        webdataset.WebDataset(urls, shardshuffle=100)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(peers_transform(), int)
    )
    return DataLoader(dataset, flags.batch_size, num_workers=flags.workers)


def peers_transform() -> Callable[[Image.Image], Tensor]:
    """What our loader does to an image, in torchvision's words."""
    return transforms.Compose(
        [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
    )


def order_of(dataset: ImageDataset | LatentDataset, batch_size: int, *, flips: bool) -> TrainingOrder:
    """The order of a run of one process."""
    return TrainingOrder(
        dataset.shards.shard_sizes,
        micro_batch_size=batch_size,
        num_micro_batches=1,
        rank=0,
        world_size=1,
        seed=0,
        first_step=0,
        flips=flips,
    )


def samples_per_second(batches: Iterable[Loaded], num_batches: int) -> float:
    """The rate of the ``num_batches`` after the first, which brings the workers up; the last ones may not be full."""
    iterator = iter(batches)
    next(iterator)
    started = time.perf_counter()
    num_samples = sum(num_samples_of(batch) for batch in itertools.islice(iterator, num_batches))
    return num_samples / (time.perf_counter() - started)


def num_samples_of(batch: Loaded) -> int:
    """The length of a batch's first tensor."""
    return len(next(iter(batch.values())) if isinstance(batch, dict) else batch[0])


# --- Latents ------------------------------------------------------------------------------------------------


def latent_table(flags: argparse.Namespace, folder: Path) -> Table:
    """Latents per second that are read, and that stage 2 eats."""
    config = load_config(TrainConfig, flags.ldgan, [])
    shape = tuple(flags.latent_shape)
    batch_size = config.run.batch_size
    write_latents(folder / "latents", flags.num_latents, shape, flags.shard_size)
    dataset = LatentDataset(ShardSet.open(folder / "latents"))
    num_batches = max(1, flags.num_latents // batch_size)
    rates = [
        samples_per_second(
            read_batches(dataset, order_of(dataset, batch_size, flips=False), flags.workers), num_batches
        )
        for _ in range(flags.repeats)
    ]
    read = statistics.median(rates)

    accelerator = make_accelerator(config.run.precision, flags.threads)
    table = titled(f"latents of {shape}, batches of {batch_size}, {config.run.precision} on {accelerator.device}")
    table.add_column("latents/s", justify="right")
    table.add_column("read for each that is eaten", justify="right")
    table.add_row("read", f"{read:,.0f}", "")
    for name, step in training_steps(accelerator, config, shape).items():
        eaten = batch_size / statistics.median(timed(step, flags.repeats))
        table.add_row(f"eaten by {flags.ldgan.stem}, {name}", f"{eaten:,.0f}", f"{read / eaten:,.1f}")
    return table


def training_steps(
    accelerator: Accelerator, config: TrainConfig, shape: tuple[int, int, int]
) -> dict[str, Callable[[], object]]:
    """The steps that a run of this config is made of, on random latents."""
    _, trainer = diffusion_gan(accelerator, config, shape)
    steps = {"both players": game_step(accelerator, trainer, (config.run.batch_size, *shape), itertools.count(1))}
    if config.phases.pretraining_steps > 0:
        batches = [Batch(torch.randn(config.run.batch_size, *shape, device=accelerator.device), None)]
        steps["pretraining"] = lambda: trainer.generator_step(
            1, batches, config.loss.l1_weight_at(0), adversarial=False
        )
    return steps


def write_latents(folder: Path, num_latents: int, shape: tuple[int, int, int], shard_size: int) -> None:
    """A set of random posteriors, fp16 as autoencoder/encode.py may store them."""
    random = np.random.default_rng(0)
    with ShardWriter(folder, "latents", samples_per_shard=shard_size) as writer:
        for _ in range(num_latents):
            content = io.BytesIO()
            np.save(content, random.standard_normal((2 * shape[0], *shape[1:]), np.float32).astype(np.float16))
            writer.write({"npy": content.getvalue()})


# --- Memory -------------------------------------------------------------------------------------------------


def memory_table(flags: argparse.Namespace, folder: Path) -> Table:
    """Peak memory of a fresh process that reads an epoch without workers, for each of `SET_SIZES`."""
    table = titled(f"sets of shards of {flags.shard_size} latents", "shards")
    for column in ("samples", "peak memory (MiB)", "beyond an empty process (MiB)"):
        table.add_column(column, justify="right")
    context = multiprocessing.get_context("spawn")  # a forked process would start with this one's memory
    for num_shards in SET_SIZES:
        path = folder / str(num_shards)
        write_latents(path, num_shards * flags.shard_size, (4, 4, 4), flags.shard_size)
        with context.Pool(1) as pool:
            before, after = pool.apply(peak_memory, (path,))
        samples = f"{num_shards * flags.shard_size:,}"
        table.add_row(f"{num_shards:,}", samples, f"{after:,.0f}", f"{after - before:,.1f}")
    return table


def peak_memory(shards: Path) -> tuple[float, float]:
    """Resident memory of this process in MiB, before it opens a set, and the most while it reads an epoch of it."""
    before = resident_mib()
    dataset = LatentDataset(ShardSet.open(shards))
    num_batches = len(dataset) // 32
    batches = read_batches(dataset, order_of(dataset, 32, flips=False), 0)
    return before, max(resident_mib() for _ in itertools.islice(batches, num_batches))


def resident_mib() -> float:
    """The memory that this process holds. getrusage's maximum would do on Linux, did it not inherit the parent's."""
    return psutil.Process().memory_info().rss / 2**20


# --- Shuffling ----------------------------------------------------------------------------------------------


def shuffling_table(flags: argparse.Namespace, folder: Path) -> Table:
    """What a batch of ``--batch-size`` is made of, and how much neighbours in the order tell of each other."""
    del folder  # an order needs no files
    table = titled(f"batches of {flags.batch_size} from shards of {flags.shard_size}", "shards, order")
    for column in ("shards in a batch", "most of one shard", "neighbours' rank correlation"):
        table.add_column(column, justify="right")
    for num_shards in SET_SIZES:
        stream = SampleStream([flags.shard_size] * num_shards, seed=0, flips=False)
        num_samples = stream.num_samples
        random = np.random.default_rng(0)
        ours = [stream.read(epoch * num_samples, num_samples)[0] for epoch in range(SHUFFLED_EPOCHS)]
        true = [random.permutation(num_samples) for _ in range(SHUFFLED_EPOCHS)]
        for name, epochs in (("ours", ours), ("true permutation", true)):
            numbers = mixing(np.stack(epochs), flags.shard_size, flags.batch_size)
            table.add_row(f"{num_shards:,}, {name}", *(f"{number:.4g}" for number in numbers))
    return table


def mixing(epochs: np.ndarray, shard_size: int, batch_size: int) -> tuple[float, float, float]:
    """Of sample indices in their order, int64 (E, N): the columns of `shuffling_table`, means over all batches."""
    num_batches = epochs.shape[1] // batch_size
    batches = epochs[:, : num_batches * batch_size].reshape(-1, batch_size) // shard_size
    counts = [np.unique(batch, return_counts=True)[1] for batch in batches]
    standardised = (epochs - epochs[0].mean()) / epochs[0].std()
    correlation = (standardised[:, :-1] * standardised[:, 1:]).mean()
    return (
        statistics.fmean(len(of_batch) for of_batch in counts),
        statistics.fmean(int(of_batch.max()) for of_batch in counts),
        float(correlation),
    )


def titled(title: str, first_column: str = "") -> Table:
    """An empty table whose first column holds names."""
    table = Table(title=title)
    table.add_column(first_column)
    return table


def parse_flags() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    names = ("images", "latents", "memory", "shuffling")
    add("--parts", nargs="+", choices=names, default=names, help="what to measure (default: all)")
    add("--num-images", type=cli.positive, default=2048, help="images in the set (default: 2048)")
    add("--size", type=cli.positive, default=256, help="side of the images in pixels (default: 256)")
    add("--batch-size", type=cli.positive, default=64, help="images per batch (default: 64)")
    add("--workers", type=int, default=2, help="processes of each loader, 0: none beside this one (default: 2)")
    add("--shard-size", type=cli.positive, default=100, help="samples per shard (default: 100)")
    add("--ldgan", type=Path, default=Path("configs/ldgan/stacked_mnist.yaml"), metavar="FILE", help="eats latents")
    add("--num-latents", type=cli.positive, default=10_000, help="latents in the set (default: 10000)")
    add("--latent-shape", type=cli.positive, nargs=3, default=(4, 8, 8), metavar=("C", "H", "W"), help="of --ldgan")
    add("--threads", type=cli.positive, default=os.cpu_count(), help="of a training step (default: all cores)")
    add("--repeats", type=cli.positive, default=5, help="timed turns of each (default: 5)")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
