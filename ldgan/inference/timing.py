"""How long a trained model takes for an image, and how often its network is evaluated for it.

Seconds are those that a user waits: from seeds to samples of x_0, the drawing of noise included, and from these to
uint8 images in main memory. A GPU works on when a call has returned, so either stage begins and ends when it has done
all it was given. The first batches, which load kernels and fill caches, are not counted. Of the others median and
quartiles are reported, since one slow batch would shift a mean.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ldgan.engine.progress import progress_bar
from ldgan.engine.session import describe_machine
from ldgan.engine.shares import batches
from ldgan.inference.jobs import Job


class Cost(NamedTuple):
    """What an image of one batch cost: seconds, and how often it passed through the network."""

    sampling: float
    decoding: float
    evaluations: float


@dataclass(frozen=True)
class Spread:
    """Median and quartiles over batches."""

    median: float
    lower: float  # 25 %
    upper: float  # 75 %

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Those of one value or more; between two values they are interpolated linearly."""
        quartiles = torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64)
        return cls(*torch.tensor(values, dtype=torch.float64).quantile(quartiles).tolist())


@dataclass(frozen=True)
class Timing:
    """What an image costs in batches of ``batch_size``; of size 1 that is the latency, of others the throughput."""

    sampling: Spread  # seconds per image
    decoding: Spread
    total: Spread  # of both
    evaluations_per_image: float  # of the network; counted
    batch_size: int  # images
    num_batches: int  # that were counted
    num_warmup: int  # batches before them
    conditions: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return asdict(self)


def time_model(
    job: Job,
    accelerator: Accelerator,
    *,
    batch_size: int,
    num_batches: int = 10,
    num_warmup: int = 2,
    show_progress: bool = True,
) -> Timing:
    """Make ``num_warmup`` + ``num_batches`` (1 or more) batches of ``job``'s images, each of others, and time them.

    Only the calling process works, and should be alone on its device. The job's own batch size and number of images
    are not looked at.
    """
    model, costs = job.model, []
    num_images = (num_warmup + num_batches) * batch_size
    with progress_bar(f"timing batches of {batch_size}", num_images, "images", enabled=show_progress) as bar:
        for numbers in batches(range(num_images), batch_size):
            _, cost = make_images(accelerator, partial(job.sample, numbers), model.decode, model.network)
            costs.append(cost)
            bar.advance(batch_size)
    counted = costs[num_warmup:]
    return Timing(
        sampling=Spread.of([cost.sampling for cost in counted]),
        decoding=Spread.of([cost.decoding for cost in counted]),
        total=Spread.of([cost.sampling + cost.decoding for cost in counted]),
        evaluations_per_image=fmean(cost.evaluations for cost in counted),
        batch_size=batch_size,
        num_batches=num_batches,
        num_warmup=num_warmup,
        conditions=describe_machine(accelerator) | {"precision": describe_precision(accelerator)},
    )


def describe_precision(accelerator: Accelerator) -> str:
    """Arithmetic of the networks, as `ldgan.engine.session.RunConfig` names it."""
    return "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision


@torch.no_grad()
def make_images(
    accelerator: Accelerator,
    sample: Callable[[], Tensor],
    decode: Callable[[Tensor], Tensor],
    network: nn.Module | None,
) -> tuple[Tensor, Cost]:
    """The images of ``decode(sample())`` and what each cost; evaluations are those of ``network``, if there is one."""
    with count_samples(network) as count:
        started = now()
        with accelerator.autocast():
            x_0 = sample()
        sampled = now()
        with accelerator.autocast():
            images = decode(x_0)
        decoded = now()
    number = len(images)
    return images, Cost((sampled - started) / number, (decoded - sampled) / number, count() / number)


@contextmanager
def count_samples(network: nn.Module | None) -> Iterator[Callable[[], int]]:
    """Yield a function that says how many samples passed through ``network`` since; None is passed by none."""
    total = 0

    def count(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal total
        total += len(inputs[0])

    hook = network.register_forward_pre_hook(count) if network is not None else None
    try:
        yield lambda: total
    finally:
        if hook is not None:
            hook.remove()


def now() -> float:
    """Seconds on a clock, once the device has done all it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()
