"""The sampler: what it calls, where it ends, and that true denoisers give true samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldgan.diffusion import Diffusion, vp_betas
from ldgan.loading import TrainedModel
from ldgan.networks import Generator
from ldgan.sampling import SamplingNoise, noise_from_seeds, sample

SHAPE, Z_DIM = (2, 4, 4), 3


def noise(seeds: list[int], num_steps: int) -> SamplingNoise:
    return noise_from_seeds(seeds, SHAPE, Z_DIM, num_steps, "cpu")


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
def test_an_oracle_is_reached_exactly(num_steps: int) -> None:
    x_0 = torch.randn(3, *SHAPE)
    result = sample(lambda x_t, z, t: x_0, Diffusion(vp_betas(num_steps)), noise([0, 1, 2], num_steps))
    assert torch.equal(result, x_0)


@pytest.mark.parametrize("num_steps", [1, 4])
def test_the_denoiser_is_called_once_for_each_t_from_the_last_to_the_first(num_steps: int) -> None:
    given, calls = noise([5, 6], num_steps), []

    def denoiser(x_t: Tensor, z: Tensor, t: Tensor) -> Tensor:
        calls.append((t.tolist(), z))
        return torch.zeros_like(x_t)

    sample(denoiser, Diffusion(vp_betas(num_steps)), given)
    assert [t for t, _ in calls] == [[t, t] for t in range(num_steps, 0, -1)]
    assert all(torch.equal(z, given.z[t[0] - 1]) for t, z in calls)


def test_the_callback_sees_every_estimate_and_what_follows_from_it() -> None:
    diffusion, given = Diffusion(vp_betas(3)), noise([7], 3)
    states = [given.x_T]
    seen = []

    def denoiser(x_t: Tensor, z: Tensor, t: Tensor) -> Tensor:
        assert torch.equal(x_t, states[-1])
        return x_t * 0.5

    def callback(t: int, x_0: Tensor, x_previous: Tensor) -> None:
        assert torch.equal(x_0, states[-1] * 0.5)
        assert torch.equal(
            x_previous, diffusion.posterior_sample(x_0, states[-1], torch.tensor([t]), given.posterior[t - 1])
        )
        states.append(x_previous)
        seen.append(t)

    result = sample(denoiser, diffusion, given, callback)
    assert seen == [3, 2, 1]
    assert torch.equal(result, states[-1])


def test_noise_of_a_seed_is_the_same_in_every_batch() -> None:
    batch, other = noise([3, 1, 4], 2), noise([9, 4], 2)
    alone = noise([4], 2)
    for noises, row in ((batch, 2), (other, 1)):
        assert torch.equal(noises.x_T[row], alone.x_T[0])
        assert torch.equal(noises.z[:, row], alone.z[:, 0])
        assert torch.equal(noises.posterior[:, row], alone.posterior[:, 0])


def test_noise_is_standard_normal_and_nothing_in_it_repeats() -> None:
    noises = noise(list(range(100)), 4)
    values = torch.cat([part.flatten() for part in noises])
    assert len(values) == 100 * (32 + 4 * (3 + 32))
    assert values.unique().numel() > 0.999 * len(values)
    assert abs(values.mean().item()) < 5 * len(values) ** -0.5
    assert abs(values.var().item() - 1) < 5 * (2 / len(values)) ** 0.5


@pytest.mark.parametrize(("num_steps", "std"), [(1, 0.5), (4, 0.5), (4, 2.0)])
def test_the_true_denoiser_gives_true_samples_at_every_noise_level(num_steps: int, std: float) -> None:
    # For x_0 ~ N(0, s^2), p(x_0 | x_t) is a Gaussian in closed form. A denoiser that draws from it, by z, makes
    # x_{t-1} ~ N(0, abar_{t-1} s^2 + 1 - abar_{t-1}) at every step: posterior and sampler are right together.
    num_samples, diffusion = 100_000, Diffusion(vp_betas(num_steps))
    x_T, *rest = torch.randn(1 + 2 * num_steps, num_samples, 1, generator=torch.manual_seed(0))
    noises = SamplingNoise(x_T, z=torch.stack(rest[:num_steps]), posterior=torch.stack(rest[num_steps:]))

    def denoiser(x_t: Tensor, z: Tensor, t: Tensor) -> Tensor:
        bar = diffusion.alphas_bar[t[0]].item()
        variance = 1 / (std**-2 + bar / (1 - bar))
        return variance * bar**0.5 / (1 - bar) * x_t + variance**0.5 * z

    def callback(t: int, x_0: Tensor, x_previous: Tensor) -> None:
        bar = diffusion.alphas_bar[t - 1].item()
        assert x_previous.var().item() == pytest.approx(bar * std**2 + 1 - bar, rel=5 * (2 / num_samples) ** 0.5)
        assert x_0.var().item() == pytest.approx(std**2, rel=5 * (2 / num_samples) ** 0.5)

    sample(denoiser, diffusion, noises, callback)


def test_a_batch_of_samples_equals_the_samples_one_by_one() -> None:
    torch.manual_seed(0)
    generator = Generator(
        channels=2,
        resolution=4,
        base_channels=8,
        channel_multipliers=[1, 2],
        num_res_blocks=1,
        attention_resolutions=[2],
        z_dim=Z_DIM,
        num_mapping_layers=2,
        embedding_dim=8,
        dropout=0.0,
    ).eval()
    model = TrainedModel(generator, Diffusion(vp_betas(4)), None, SHAPE, resolution=4)
    batch = model.sample([11, 12, 13])
    torch.testing.assert_close(torch.cat([model.sample([seed]) for seed in (11, 12, 13)]), batch)
    assert not torch.allclose(batch[0], batch[1])
    assert not batch.requires_grad
