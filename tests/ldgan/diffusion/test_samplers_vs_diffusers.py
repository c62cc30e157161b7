"""Both samplers against diffusers' schedulers, and against the papers' algorithms written once more in NumPy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ldgan.diffusion.process import Diffusion, Predicts, Variance, betas_of, cosine_betas, linear_betas, vp_betas
from ldgan.diffusion.samplers import Denoiser, Noise, ancestral, ddim

BATCH_SIZE, SHAPE = 3, (2, 2, 2)
WHOLE = Diffusion(linear_betas(1000))


def network(x_t: Tensor, timestep: Tensor, predicts: Predicts, variance: Variance) -> Tensor:
    """Some function of x_t and timestep, int64 (B,), that keeps samples near unit variance in fp64."""
    bar = WHOLE.alphas_bar[timestep].reshape(-1, 1, 1, 1)
    # Near the best prediction for standard normal data, so that a chain of 1,000 steps stays where data are.
    noise = (1 - bar).sqrt() * x_t + 0.3 * torch.sin(2 * x_t.roll(1, dims=-1) + timestep.reshape(-1, 1, 1, 1) / 200)
    output = noise if predicts == "noise" else (x_t - (1 - bar).sqrt() * noise) / bar.sqrt()
    return torch.cat([output, torch.cos(3 * x_t)], dim=1) if variance == "learned" else output


def denoiser_of(diffusion: Diffusion, predicts: Predicts = "noise", variance: Variance = "posterior") -> Denoiser:
    return lambda x_t, t: diffusion.denoised(
        network(x_t, diffusion.timesteps[t], predicts, variance), x_t, t, predicts, variance
    )


def noise_of(generator: torch.Generator) -> Noise:
    return lambda shape: torch.randn(BATCH_SIZE, *shape, generator=generator, dtype=torch.float64)


def trajectory(sampler: Callable[..., Tensor], *given: Any, **options: Any) -> Tensor:
    """x_{t-1} after each step, (T, B, *SHAPE), with the noise of seed 0."""
    states: list[Tensor] = []
    noise = noise_of(torch.Generator().manual_seed(0))
    sampler(*given, noise, SHAPE, callback=lambda t, x_0, x: states.append(x), **options)
    return torch.stack(states)


def trajectory_of_peer(scheduler: Any, predicts: Predicts, variance: Variance, **options: Any) -> Tensor:
    """The same of a scheduler of diffusers, whose timesteps start at 0, with the noise of seed 0."""
    # Its own tables are those of ours in fp32 (see the test of schedules), whose rounding comes to 2e-5 in 1,000 steps.
    scheduler.alphas_cumprod = WHOLE.alphas_bar[1:]
    generator = torch.Generator().manual_seed(0)
    x, states = noise_of(generator)(SHAPE), []
    for timestep in scheduler.timesteps:
        output = network(x, timestep.expand(BATCH_SIZE) + 1, predicts, variance)
        x = scheduler.step(output, timestep, x, generator=generator, **options).prev_sample
        states.append(x)
    return torch.stack(states)


PREDICTION_TYPES = {"noise": "epsilon", "x_0": "sample"}
VARIANCE_TYPES = {"posterior": "fixed_small", "beta": "fixed_large", "learned": "learned_range"}


def test_schedules_equal_those_of_diffusers() -> None:
    schedulers = pytest.importorskip("diffusers")
    for name, betas in (("linear", linear_betas(1000)), ("squaredcos_cap_v2", cosine_betas(1000))):
        peer = schedulers.DDPMScheduler(num_train_timesteps=1000, beta_schedule=name)
        torch.testing.assert_close(peer.betas.double(), betas, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(peer.alphas_cumprod.double(), Diffusion(betas).alphas_bar[1:], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("num_steps", [10, 1000])
@pytest.mark.parametrize("variance", VARIANCE_TYPES)
@pytest.mark.parametrize("predicts", PREDICTION_TYPES)
def test_ancestral_sampling_equals_the_ddpm_scheduler(predicts: Predicts, variance: Variance, num_steps: int) -> None:
    # `respaced` visits the timesteps that diffusers calls "linspace", and improved DDPM's code spaces alike.
    peer = pytest.importorskip("diffusers").DDPMScheduler(
        num_train_timesteps=1000,
        prediction_type=PREDICTION_TYPES[predicts],
        variance_type=VARIANCE_TYPES[variance],
        clip_sample=False,
        timestep_spacing="linspace",
    )
    peer.set_timesteps(num_steps)
    diffusion = WHOLE.respaced(num_steps)
    ours = trajectory(ancestral, denoiser_of(diffusion, predicts, variance), diffusion)
    torch.testing.assert_close(ours, trajectory_of_peer(peer, predicts, variance), rtol=0, atol=1e-8)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("predicts", PREDICTION_TYPES)
@pytest.mark.parametrize(("num_steps", "spacing"), [(10, "leading"), (10, "trailing"), (1000, "leading")])
def test_ddim_equals_the_ddim_scheduler(predicts: Predicts, eta: float, num_steps: int, spacing: str) -> None:
    # With "linspace" that scheduler goes down by T // num_steps, whatever the next timestep is, so there is
    # nothing to compare with; the process is put together here from the timesteps of the other two.
    peer = pytest.importorskip("diffusers").DDIMScheduler(
        num_train_timesteps=1000,
        prediction_type=PREDICTION_TYPES[predicts],
        clip_sample=False,
        timestep_spacing=spacing,
    )
    peer.set_timesteps(num_steps)
    visited = peer.timesteps.flip(0) + 1
    zero = torch.zeros(1, dtype=torch.int64)
    diffusion = Diffusion(betas_of(WHOLE.alphas_bar[visited]), torch.cat([zero, visited]))
    ours = trajectory(ddim, denoiser_of(diffusion, predicts), diffusion, eta=eta)
    theirs = trajectory_of_peer(peer, predicts, "posterior", eta=eta)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)


def test_ddim_with_eta_1_is_ancestral_sampling_with_the_posterior_variance() -> None:
    diffusion = WHOLE.respaced(20)
    denoiser = denoiser_of(diffusion)
    torch.testing.assert_close(
        trajectory(ddim, denoiser, diffusion, eta=1.0), trajectory(ancestral, denoiser, diffusion), rtol=0, atol=1e-9
    )


def numpy_noises() -> Callable[[], np.ndarray]:
    """The noise of seed 0, draw by draw."""
    noise = noise_of(torch.Generator().manual_seed(0))
    return lambda: noise(SHAPE).numpy()


def epsilon_theta(x_t: np.ndarray, t: int) -> np.ndarray:
    return network(torch.from_numpy(x_t), torch.full((BATCH_SIZE,), t), "noise", "posterior").numpy()


@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_ancestral_sampling_is_algorithm_2_of_ho_et_al(variance: Variance) -> None:
    beta = np.array([1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)])
    alpha, alpha_bar = 1 - beta, np.cumprod(1 - beta)
    noise, expected = numpy_noises(), []
    x = noise()
    for t in range(1000, 0, -1):
        i = t - 1  # arrays start at t = 1
        z = noise() if t > 1 else np.zeros_like(x)
        previous_bar = alpha_bar[i - 1] if t > 1 else 1.0
        sigma = np.sqrt(beta[i] * ((1 - previous_bar) / (1 - alpha_bar[i]) if variance == "posterior" else 1.0))
        x = (x - (1 - alpha[i]) / np.sqrt(1 - alpha_bar[i]) * epsilon_theta(x, t)) / np.sqrt(alpha[i]) + sigma * z
        expected.append(x)
    ours = trajectory(ancestral, denoiser_of(WHOLE, variance=variance), WHOLE)
    np.testing.assert_allclose(ours.numpy(), np.stack(expected), rtol=0, atol=1e-8)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_equation_12_of_song_et_al_at_the_timesteps_of_the_respaced_process(eta: float) -> None:
    alpha = np.cumprod([1 - 1e-4 - (0.02 - 1e-4) * i / 999 for i in range(1000)])  # their alpha is abar elsewhere
    visited = [1, 112, 223, 334, 445, 556, 667, 778, 889, 1000]
    noise, expected = numpy_noises(), []
    x = noise()
    for t, s in zip(visited[::-1], [*visited[-2::-1], 0]):
        a_t, a_s = alpha[t - 1], alpha[s - 1] if s > 0 else 1.0
        sigma = eta * np.sqrt((1 - a_s) / (1 - a_t)) * np.sqrt(1 - a_t / a_s)
        epsilon = epsilon_theta(x, t)
        x_0 = (x - np.sqrt(1 - a_t) * epsilon) / np.sqrt(a_t)
        x = np.sqrt(a_s) * x_0 + np.sqrt(1 - a_s - sigma**2) * epsilon
        if sigma > 0:
            x = x + sigma * noise()
        expected.append(x)
    diffusion = WHOLE.respaced(10)
    ours = trajectory(ddim, denoiser_of(diffusion), diffusion, eta=eta)
    np.testing.assert_allclose(ours.numpy(), np.stack(expected), rtol=0, atol=1e-9)


# For data N(MEAN, s^2) the best prediction is known, and samplers are affine in their noise: with one row for no
# noise and one for each draw that is 1, mean and variance of every x_{t-1} come out exactly, without sampling.

MEAN = 0.7


def gaussian_denoiser(diffusion: Diffusion, std: float, variance: Variance) -> Denoiser:
    """The best noise prediction E[noise | x_t] for data N(MEAN, s^2), and the true variance where it is learned."""

    def denoise(x_t: Tensor, t: Tensor) -> Any:
        bar, beta = diffusion.alphas_bar[t[0]], diffusion.betas[t[0]]
        marginal = bar * std**2 + 1 - bar
        output = (1 - bar).sqrt() * (x_t - bar.sqrt() * MEAN) / marginal
        if variance == "learned":
            # Var(x_{t-1} | x_t) of data x_{t-1} ~ N(., previous) and x_t = sqrt(a) x_{t-1} + sqrt(b) noise.
            previous_bar = diffusion.alphas_bar[t[0] - 1]
            true = 1 / (1 / (previous_bar * std**2 + 1 - previous_bar) + (1 - beta) / beta)
            lower = diffusion.posterior_variance[t[0].clamp(min=2)]
            v = (true / lower).log() / (beta / lower).log()
            output = torch.cat([output, (2 * v - 1).expand_as(output)], dim=1)
        return diffusion.denoised(output, x_t, t, "noise", variance)

    return denoise


def moments(sampler: Callable[..., Tensor], diffusion: Diffusion, *given: Any, **options: Any) -> np.ndarray:
    """Mean and variance of x_{t-1} after each step, t = T..1: (T, 2)."""
    num_draws, calls, states = diffusion.num_steps, iter(range(diffusion.num_steps)), []

    def noise(shape: Sequence[int]) -> Tensor:
        draws = torch.zeros(num_draws + 1, *shape, dtype=torch.float64)
        draws[1 + next(calls)] = 1.0
        return draws

    sampler(*given, diffusion, noise, (1, 1), callback=lambda t, x_0, x: states.append(x.flatten()), **options)
    return np.array([(float(x[0]), float((x[1:] - x[0]).square().sum())) for x in states])


def true_moments(diffusion: Diffusion, std: float) -> np.ndarray:
    """Mean and variance of q(x_{t-1}) for t = T..1."""
    bar = diffusion.alphas_bar[:-1].flip(0).numpy()
    return np.stack([np.sqrt(bar) * MEAN, bar * std**2 + 1 - bar], axis=1)


@pytest.mark.parametrize("diffusion", [Diffusion(vp_betas(4)), WHOLE.respaced(50)], ids=["vp 4", "linear 50"])
@pytest.mark.parametrize(("std", "variance"), [(1.0, "beta"), (1e-4, "posterior"), (0.3, "learned"), (0.9, "learned")])
def test_ancestral_sampling_of_gaussian_data_is_exact_with_the_right_variance(
    diffusion: Diffusion, std: float, variance: Variance
) -> None:
    # b_t is right for standard normal data, the posterior variance for data in one point (Ho et al., section 3.2);
    # what lies between is learned. No noise is added in the last step: it ends in E[x_0 | x_1].
    found = moments(ancestral, diffusion, gaussian_denoiser(diffusion, std, variance))
    true = true_moments(diffusion, std)
    # x_T ~ N(0, 1), though q(x_T) is not quite that: it keeps sqrt(abar_T) of the data.
    atol = 3 * float(diffusion.alphas_bar[-1]) ** 0.5
    np.testing.assert_allclose(found[:-1], true[:-1], rtol=0, atol=atol)
    bar = float(diffusion.alphas_bar[1])
    of_last_mean = bar * std**4 / (bar * std**2 + 1 - bar)
    np.testing.assert_allclose(found[-1], [MEAN, of_last_mean], rtol=0, atol=atol)


def test_wrong_fixed_variances_err_to_the_side_they_must() -> None:
    diffusion = WHOLE.respaced(10)
    true = true_moments(diffusion, 0.5)[:-1, 1]
    small = moments(ancestral, diffusion, gaussian_denoiser(diffusion, 0.5, "posterior"))[:-1, 1]
    large = moments(ancestral, diffusion, gaussian_denoiser(diffusion, 0.5, "beta"))[:-1, 1]
    assert (small < true).all()
    assert (large > true).all()


@pytest.mark.parametrize("std", [0.3, 1.0, 2.0])
def test_ddim_carries_gaussian_noise_to_gaussian_data_the_better_the_more_steps(std: float) -> None:
    errors = []
    for num_steps in (10, 100, 1000):
        diffusion = WHOLE.respaced(num_steps)
        mean, variance = moments(ddim, diffusion, gaussian_denoiser(diffusion, std, "posterior"))[-1]
        errors.append(abs(mean - MEAN) + abs(variance**0.5 - std))
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[2] < 0.02
