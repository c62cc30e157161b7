"""The clock: what is counted and what is not, and evaluations as they happen."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ldgan.diffusion.process import build_diffusion
from ldgan.diffusion.samplers import SamplerConfig
from ldgan.inference import timing
from ldgan.inference.jobs import Job
from ldgan.inference.timing import Cost, Spread, count_samples, make_images, time_model
from ldgan.inference.trained_model import TrainedModel, build_unet
from ldgan.models.unet import UNetConfig

SHAPE, CLASSES = (3, 4, 4), ["cat", "dog"]


def trained_model(num_timesteps: int, class_names: list[str] | None = None) -> TrainedModel:
    """A random model on pixels."""
    config = UNetConfig(base_channels=8, channel_multipliers=[1], num_res_blocks=1, z_dim=0, embedding_dim=8)
    network = build_unet(config, SHAPE, len(class_names or [])).eval()
    diffusion = build_diffusion("cosine", num_timesteps)
    return TrainedModel(network, diffusion, None, SHAPE, SHAPE[1], predicts="noise", class_names=class_names)


def job_of(model: TrainedModel, **sampler: Any) -> Job:
    labels = [0, 1] if model.class_names else None
    return Job(model, SamplerConfig(**sampler), labels, num_images=1, first_seed=5, batch_size=1)


class Ticks:
    """A clock that goes on by given seconds, in place of the work that they are spent on."""

    def __init__(self, seconds: Iterator[float]) -> None:
        self.now, self._seconds = 0.0, seconds

    def tick(self) -> None:
        self.now += next(self._seconds)


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def test_medians_and_quartiles_leave_the_warm_up_out(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    # By batch; the first two are the warm-up.
    sampling, decoding = [50.0, 40.0, 8.0, 1.0, 2.0, 4.0, 16.0], [90.0, 90.0, 3.0, 5.0, 1.0, 4.0, 2.0]
    sampler, decoder = Ticks(iter(sampling)), Ticks(iter(decoding))
    seen: list[list[int]] = []

    def sample(_: TrainedModel, seeds: list[int], *__: Any) -> Tensor:
        seen.append(list(seeds))
        sampler.tick()
        return torch.zeros(len(seeds), *SHAPE)

    def decode(_: TrainedModel, x_0: Tensor) -> Tensor:
        decoder.tick()
        return torch.zeros(len(x_0), *SHAPE, dtype=torch.uint8)

    monkeypatch.setattr(TrainedModel, "sample", sample)
    monkeypatch.setattr(TrainedModel, "decode", decode)
    monkeypatch.setattr(timing, "now", lambda: sampler.now + decoder.now)
    result = time_model(job_of(trained_model(4)), accelerator, batch_size=2, num_batches=5, num_warmup=2)
    # Sorted, the five counted batches of two: 1, 2, 4, 8, 16 and 1, 2, 3, 4, 5 and, of both, 3, 6, 8, 11, 18.
    assert result.sampling == Spread(median=4 / 2, lower=2 / 2, upper=8 / 2)
    assert result.decoding == Spread(median=3 / 2, lower=2 / 2, upper=4 / 2)
    assert result.total == Spread(median=8 / 2, lower=6 / 2, upper=11 / 2)
    assert (result.batch_size, result.num_batches, result.num_warmup) == (2, 5, 2)
    assert seen == [[5 + 2 * batch, 6 + 2 * batch] for batch in range(7)]  # images made before are not made again


def test_quartiles_are_interpolated() -> None:
    assert Spread.of([4.0, 1.0, 2.0, 3.0]) == Spread(median=2.5, lower=1.75, upper=3.25)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_nothing_but_sampling_and_decoding_is_on_the_clock(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Ticks(iter([3.0, 5.0]))
    monkeypatch.setattr(timing, "now", lambda: clock.now)

    def sample() -> Tensor:
        clock.tick()
        return torch.arange(4.0)

    def decode(x_0: Tensor) -> Tensor:
        clock.tick()
        return 2 * x_0

    images, cost = make_images(accelerator, sample, decode, None)
    assert images.tolist() == [0, 2, 4, 6]
    assert cost == Cost(sampling=3 / 4, decoding=5 / 4, evaluations=0)


@pytest.mark.parametrize(
    ("num_timesteps", "class_names", "sampler", "evaluations"),
    [
        (4, None, {}, 4),
        (100, None, {"method": "ddim", "num_steps": 7}, 7),
        (100, None, {"num_steps": 5}, 5),
        (4, CLASSES, {}, 4),
        (4, CLASSES, {"guidance_scale": 2.0}, 8),  # with the label and without
        (100, CLASSES, {"method": "ddim", "num_steps": 3, "guidance_scale": 3.0}, 6),
    ],
)
def test_evaluations_are_counted(
    accelerator: Accelerator,
    num_timesteps: int,
    class_names: list[str] | None,
    sampler: dict[str, Any],
    evaluations: int,
) -> None:
    job = job_of(trained_model(num_timesteps, class_names), **sampler)
    result = time_model(job, accelerator, batch_size=3, num_batches=2, num_warmup=1, show_progress=False)
    assert result.evaluations_per_image == evaluations == job.evaluations_per_image
    assert 0 < result.sampling.lower <= result.sampling.median <= result.sampling.upper


def test_samples_are_counted_inside_the_block_alone() -> None:
    network = nn.Identity()
    network(torch.zeros(7, 2))
    with count_samples(network) as count:
        network(torch.zeros(3, 2))
        network(torch.zeros(2, 2))
    network(torch.zeros(9, 2))
    assert count() == 5


def test_conditions_go_with_the_numbers(accelerator: Accelerator) -> None:
    result = time_model(job_of(trained_model(2)), accelerator, batch_size=1, num_batches=1, num_warmup=0)
    read = json.loads(json.dumps(result.as_dict()))
    assert read["conditions"] == {
        "device": "cpu",
        "num_processes": 1,
        "num_threads": torch.get_num_threads(),
        "machine": read["conditions"]["machine"],
        "torch": torch.__version__,
        "precision": "fp32",
    }
    assert read["sampling"] == dict.fromkeys(("median", "lower", "upper"), result.sampling.median)
    assert read["evaluations_per_image"] == 2
