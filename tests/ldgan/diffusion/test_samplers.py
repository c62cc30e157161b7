"""The samplers: what they call, where they end, and that true denoisers give true samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldgan.diffusion.process import Denoised, Diffusion, linear_betas, vp_betas
from ldgan.diffusion.samplers import Denoiser, Noise, SamplerConfig, ancestral, ddim
from ldgan.engine.philox import RandomRows
from ldgan.inference.trained_model import TrainedModel
from ldgan.models.unet import UNet, UNetConfig

SHAPE, Z_DIM = (2, 4, 4), 3


def seeded(seeds: list[int]) -> Noise:
    return RandomRows(seeds, "test", "cpu").normal


def denoiser_of(diffusion: Diffusion, estimate) -> Denoiser:
    """A denoiser whose estimate of x_0 is a function of (x_t, t)."""
    return lambda x_t, t: diffusion.denoised(estimate(x_t, t), x_t, t)


@pytest.mark.parametrize("sampler", [ancestral, ddim])
@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
def test_an_oracle_is_reached_exactly(sampler, num_steps: int) -> None:
    x_0, diffusion = torch.randn(3, *SHAPE), Diffusion(vp_betas(num_steps))
    result = sampler(denoiser_of(diffusion, lambda x_t, t: x_0), diffusion, seeded([0, 1, 2]), SHAPE)
    torch.testing.assert_close(result, x_0, rtol=0, atol=0 if sampler is ancestral else 1e-6)


@pytest.mark.parametrize("sampler", [ancestral, ddim])
def test_the_denoiser_is_called_once_for_each_t_from_the_last_to_the_first(sampler) -> None:
    diffusion, calls = Diffusion(vp_betas(4)), []

    def estimate(x_t: Tensor, t: Tensor) -> Tensor:
        calls.append(t.tolist())
        return torch.zeros_like(x_t)

    sampler(denoiser_of(diffusion, estimate), diffusion, seeded([5, 6]), SHAPE)
    assert calls == [[t, t] for t in (4, 3, 2, 1)]


def test_the_callback_sees_every_estimate_and_what_follows_from_it() -> None:
    diffusion, same_noise, seen = Diffusion(vp_betas(3)), seeded([7]), []
    states = [same_noise(SHAPE)]

    def callback(t: int, x_0: Tensor, x_previous: Tensor) -> None:
        assert torch.equal(x_0, states[-1] * 0.5)
        posterior = diffusion.posterior(x_0, states[-1], torch.tensor([t]))
        assert torch.equal(x_previous, posterior.sample(same_noise(SHAPE)) if t > 1 else x_0)
        states.append(x_previous)
        seen.append(t)

    denoiser = denoiser_of(diffusion, lambda x_t, t: x_t * 0.5)
    result = ancestral(denoiser, diffusion, seeded([7]), SHAPE, callback=callback)
    assert seen == [3, 2, 1]
    assert torch.equal(result, states[-1])


def test_a_learned_or_fixed_variance_adds_no_noise_in_the_last_step() -> None:
    diffusion, mean = Diffusion(vp_betas(1)), torch.randn(2, *SHAPE)
    result = ancestral(lambda x_t, t: Denoised(mean, mean, torch.ones(1)), diffusion, seeded([1, 2]), SHAPE)
    assert torch.equal(result, mean)


def test_deterministic_ddim_depends_on_its_first_noise_alone() -> None:
    diffusion = Diffusion(linear_betas(10))

    def only_once(shape, calls=[]) -> Tensor:  # noqa: B006
        calls.append(shape)
        assert len(calls) == 1
        return seeded([3])(shape)

    denoiser = denoiser_of(diffusion, lambda x_t, t: 0.9 * x_t)
    result = ddim(denoiser, diffusion, only_once, SHAPE)
    assert not torch.equal(result, ddim(denoiser, diffusion, seeded([3]), SHAPE, eta=1.0))


def test_guidance_shifts_every_mean_by_the_variance_times_it() -> None:
    # With one step left after x_T of two, the shift of x_1 carries over: x_0 = estimate(x_1) = x_1 here.
    diffusion, gradient = Diffusion(vp_betas(2)), torch.randn(1, *SHAPE)
    denoiser = denoiser_of(diffusion, lambda x_t, t: x_t)
    plain = ancestral(denoiser, diffusion, seeded([1]), SHAPE)
    guided = ancestral(denoiser, diffusion, seeded([1]), SHAPE, guidance=lambda x_t, t: gradient)
    torch.testing.assert_close(guided - plain, float(diffusion.posterior_variance[2]) * gradient)


@pytest.mark.parametrize(("num_steps", "std"), [(1, 0.5), (4, 0.5), (4, 2.0)])
def test_the_true_denoiser_gives_true_samples_at_every_noise_level(num_steps: int, std: float) -> None:
    # For x_0 ~ N(0, s^2), p(x_0 | x_t) is a Gaussian in closed form. A denoiser that draws from it, by z, makes
    # x_{t-1} ~ N(0, abar_{t-1} s^2 + 1 - abar_{t-1}) at every step: posterior and sampler are right together.
    num_samples, diffusion = 100_000, Diffusion(vp_betas(num_steps))
    random = torch.Generator().manual_seed(0)

    def noise(shape) -> Tensor:
        return torch.randn(num_samples, *shape, generator=random)

    def estimate(x_t: Tensor, t: Tensor) -> Tensor:
        bar = diffusion.alphas_bar[t[0]].item()
        variance = 1 / (std**-2 + bar / (1 - bar))
        return variance * bar**0.5 / (1 - bar) * x_t + variance**0.5 * noise((1,))

    def callback(t: int, x_0: Tensor, x_previous: Tensor) -> None:
        bar = diffusion.alphas_bar[t - 1].item()
        assert x_previous.var().item() == pytest.approx(bar * std**2 + 1 - bar, rel=5 * (2 / num_samples) ** 0.5)
        assert x_0.var().item() == pytest.approx(std**2, rel=5 * (2 / num_samples) ** 0.5)

    ancestral(denoiser_of(diffusion, estimate), diffusion, noise, (1,), callback=callback)


def test_a_batch_of_samples_equals_the_samples_one_by_one() -> None:
    torch.manual_seed(0)
    config = UNetConfig(
        base_channels=8,
        channel_multipliers=[1, 2],
        num_res_blocks=1,
        attention_resolutions=[2],
        z_dim=Z_DIM,
        num_mapping_layers=2,
        embedding_dim=8,
    )
    generator = UNet(config, channels=2, resolution=4, out_channels=2, num_classes=0).eval()
    model = TrainedModel(generator, Diffusion(vp_betas(4)), None, SHAPE, resolution=4)
    batch = model.sample([11, 12, 13])
    torch.testing.assert_close(torch.cat([model.sample([seed]) for seed in (11, 12, 13)]), batch)
    assert not torch.allclose(batch[0], batch[1])
    assert not batch.requires_grad


def test_fewer_steps_tell_the_network_the_levels_it_was_trained_on() -> None:
    told = []

    class Network(torch.nn.Module):
        z_dim, num_classes = 0, 0

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, x_t: Tensor, z: Tensor | None, t: Tensor) -> Tensor:
            told.append(t.tolist())
            return x_t

    model = TrainedModel(Network(), Diffusion(linear_betas(1000)), None, SHAPE, resolution=4, predicts="noise")
    model.sample([0], sampler=SamplerConfig(num_steps=4))
    assert told == [[1000], [667], [334], [1]]
