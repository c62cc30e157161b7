"""The diffusion process against its closed forms, derived once more here in float64 NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldgan.diffusion.process import Diffusion, betas_of, cosine_betas, geometric_betas, linear_betas, vp_betas

NUM_STEPS = [1, 2, 4, 8]


def paper_schedule(num_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """(b_t, abar_t) for t = 1..T from the variance of the variance-preserving SDE at T + 1 times."""
    s = 1e-3 + (1 - 1e-3) * np.arange(num_steps + 1) / num_steps
    variance = 1 - np.exp(-(s**2) * (20 - 0.1) / 2 - s * 0.1)
    betas = 1 - (1 - variance[1:]) / (1 - variance[:-1])
    return betas, np.array([np.prod(1 - betas[: t + 1]) for t in range(num_steps)])


def steps(t: int, batch_size: int) -> torch.Tensor:
    return torch.full((batch_size,), t)


@pytest.mark.parametrize("num_steps", NUM_STEPS)
def test_betas_and_alphas_bar_equal_the_paper(num_steps: int) -> None:
    betas, alphas_bar = paper_schedule(num_steps)
    diffusion = Diffusion(vp_betas(num_steps))
    assert diffusion.num_steps == num_steps
    np.testing.assert_allclose(diffusion.betas[1:].numpy(), betas, rtol=1e-9)
    np.testing.assert_allclose(diffusion.alphas_bar[1:].numpy(), alphas_bar, rtol=1e-9)


@pytest.mark.parametrize("num_steps", NUM_STEPS)
def test_the_last_noise_level_is_the_same_for_every_number_of_steps(num_steps: int) -> None:
    # The betas telescope: abar_T = (1 - var(1)) / (1 - var(epsilon)).
    expected = np.exp(-10.05 + 0.5e-6 * 19.9 + 1e-4)
    assert Diffusion(vp_betas(num_steps)).alphas_bar[-1].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("beta_max", [8.0, 12.0, 20.0])
def test_alpha_bar_is_the_closed_form_of_the_vp_sde_for_any_beta_max(beta_max):
    def log_alpha_bar(s: float) -> float:
        return -0.5 * s * s * (beta_max - 0.1) - 0.1 * s

    times = [1e-3 + 0.999 * t / 8 for t in range(9)]
    expected = [np.exp(log_alpha_bar(s) - log_alpha_bar(1e-3)) for s in times]
    alphas_bar = Diffusion(vp_betas(8, beta_max=beta_max)).alphas_bar.tolist()
    assert alphas_bar == pytest.approx(expected, rel=1e-12)


def test_entry_0_of_every_table_stands_for_data() -> None:
    diffusion = Diffusion(vp_betas(4))
    assert diffusion.alphas_bar[0] == 1
    x_0, noise = torch.randn(2, 3, 5)
    assert torch.equal(diffusion.diffuse(x_0, steps(0, 3), noise), x_0)


def test_custom_betas_give_the_products_of_their_alphas() -> None:
    diffusion = Diffusion(torch.tensor([0.1, 0.5, 1.0]))
    torch.testing.assert_close(diffusion.alphas_bar, torch.tensor([1, 0.9, 0.45, 0.0], dtype=torch.float64))


@pytest.mark.parametrize(("num_steps", "t"), [(2, 2), (4, 2), (4, 3), (4, 4), (8, 5)])
def test_posterior_is_the_normalised_product_of_two_gaussians(num_steps: int, t: int) -> None:
    # As functions of x_{t-1}: q(x_{t-1} | x_0) q(x_t | x_{t-1}), where precisions add.
    betas, alphas_bar = paper_schedule(num_steps)
    beta, previous_bar = betas[t - 1], alphas_bar[t - 2]
    x_0, x_t = torch.randn(2, 6, 3, dtype=torch.float64, generator=torch.manual_seed(0))
    precision = 1 / (1 - previous_bar) + (1 - beta) / beta
    weighted = np.sqrt(previous_bar) / (1 - previous_bar) * x_0 + np.sqrt(1 - beta) / beta * x_t

    diffusion = Diffusion(vp_betas(num_steps))
    posterior = diffusion.posterior(x_0, x_t, steps(t, 6))
    torch.testing.assert_close(posterior.mean, weighted / precision, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        posterior.std, torch.full((6, 1), precision**-0.5, dtype=torch.float64), rtol=1e-9, atol=1e-9
    )
    assert torch.equal(posterior.x_0, x_0)


@pytest.mark.parametrize("num_steps", NUM_STEPS)
def test_the_posterior_at_t_1_is_x_0_whatever_the_noise(num_steps: int) -> None:
    x_0, x_t, noise = torch.randn(3, 5, 2, generator=torch.manual_seed(0))
    assert torch.equal(Diffusion(vp_betas(num_steps)).posterior(x_0, x_t, steps(1, 5)).sample(1e3 * noise), x_0)


@pytest.mark.parametrize("t", [1, 2, 3, 4])
def test_both_ways_to_a_pair_have_the_same_joint_distribution(t: int) -> None:
    # x_{t-1} from x_0 and x_t from it; or x_t from x_0 and x_{t-1} from the posterior. Both jointly Gaussian.
    num_samples, value = 100_000, 1.5
    diffusion = Diffusion(vp_betas(4))
    noise = torch.randn(4, num_samples, dtype=torch.float64, generator=torch.manual_seed(t))
    x_0, t_batch = torch.full((num_samples,), value, dtype=torch.float64), steps(t, num_samples)
    forward = torch.stack(diffusion.pair(x_0, t_batch, noise[0], noise[1]))
    x_t = diffusion.diffuse(x_0, t_batch, noise[2])
    backward = torch.stack([diffusion.posterior(x_0, x_t, t_batch).sample(noise[3]), x_t])

    previous_bar, bar, alpha = diffusion.alphas_bar[t - 1], diffusion.alphas_bar[t], diffusion.alphas[t]
    mean = value * torch.stack([previous_bar, bar]).sqrt()
    covariance = alpha.sqrt() * (1 - previous_bar)
    covariances = torch.stack([1 - previous_bar, covariance, covariance, 1 - bar]).reshape(2, 2)
    for pair in (forward, backward):
        torch.testing.assert_close(pair.mean(dim=1), mean, rtol=0, atol=5 * num_samples**-0.5)
        torch.testing.assert_close(torch.cov(pair), covariances, rtol=0, atol=5 * (2 / num_samples) ** 0.5)


def test_pair_has_the_marginals_of_diffuse() -> None:
    # x_t of a pair is linear in x_0 and two noises; its weights must add up to those of `diffuse`.
    diffusion, t = Diffusion(vp_betas(8)), torch.arange(1, 9)
    one, zero = torch.ones(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    _, of_x_0 = diffusion.pair(one, t, zero, zero)
    _, of_first_noise = diffusion.pair(zero, t, one, zero)
    _, of_second_noise = diffusion.pair(zero, t, zero, one)
    torch.testing.assert_close(of_x_0, diffusion.diffuse(one, t, zero))
    torch.testing.assert_close(of_first_noise.square() + of_second_noise.square(), 1 - diffusion.alphas_bar[1:])


def test_every_sample_has_its_own_t() -> None:
    diffusion, t = Diffusion(vp_betas(4)), torch.tensor([3, 1, 4])
    x_0, x_t, noise = torch.randn(3, 3, 2, 4, 4, generator=torch.manual_seed(0))
    batch = diffusion.posterior(x_0, x_t, t).sample(noise)
    for i in range(3):
        row = slice(i, i + 1)
        assert torch.equal(diffusion.posterior(x_0[row], x_t[row], t[row]).sample(noise[row]), batch[row])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_results_have_the_dtype_of_the_samples(dtype: torch.dtype) -> None:
    diffusion, t, x = Diffusion(vp_betas(2)), torch.tensor([1, 2]), torch.ones(2, 3, dtype=dtype)
    results = [diffusion.diffuse(x, t, x), *diffusion.pair(x, t, x, x), *diffusion.posterior(x, x, t)]
    assert [result.dtype for result in results] == [dtype] * 6


@pytest.mark.parametrize("betas", [[0.0, 0.5], [0.5, 1.1], [0.5, -0.1], [float("nan")], [[0.5]]])
def test_betas_outside_of_0_to_1_are_refused(betas: list) -> None:
    with pytest.raises(ValueError, match=r"betas must be a vector with values in \(0, 1\]"):
        Diffusion(torch.tensor(betas))


@pytest.mark.parametrize("num_steps", [2, 1000])
def test_linear_betas_are_evenly_spaced(num_steps: int) -> None:
    expected = np.array([1e-4 + (0.02 - 1e-4) * i / (num_steps - 1) for i in range(num_steps)])
    np.testing.assert_allclose(linear_betas(num_steps).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("num_steps", [4, 1000])
def test_cosine_betas_give_the_alphas_bar_of_the_paper(num_steps: int) -> None:
    # f(t) = cos^2((t / T + s) / (1 + s) pi / 2), abar_t = f(t) / f(0); only the last beta is capped.
    f = np.cos((np.arange(num_steps + 1) / num_steps + 0.008) / 1.008 * np.pi / 2) ** 2
    betas = cosine_betas(num_steps)
    np.testing.assert_allclose(Diffusion(betas).alphas_bar[:-1].numpy(), (f / f[0])[:-1], rtol=1e-9)
    assert betas[-1] == 0.999


@pytest.mark.parametrize("num_steps", [4, 8])
def test_the_variance_of_the_geometric_schedule_grows_by_one_factor(num_steps: int) -> None:
    variance = 1 - Diffusion(geometric_betas(num_steps)).alphas_bar[1:].numpy()
    expected = 0.9999 * 99.99 ** (np.arange(1 - num_steps, 1) / num_steps)  # from the last one back
    np.testing.assert_allclose(variance, expected, rtol=1e-9)


def test_betas_of_alphas_bar_are_the_way_back() -> None:
    betas = vp_betas(8)
    torch.testing.assert_close(betas_of(Diffusion(betas).alphas_bar[1:]), betas, rtol=1e-12, atol=0)


@pytest.mark.parametrize("predicts", ["x_0", "noise"])
def test_the_truth_denoises_to_the_posterior_whatever_is_predicted(predicts: str) -> None:
    diffusion, t = Diffusion(linear_betas(1000)), torch.tensor([1, 2, 500, 1000])
    x_0, noise = torch.randn(2, 4, 3, 2, dtype=torch.float64, generator=torch.manual_seed(0))
    x_t = diffusion.diffuse(x_0, t, noise)
    denoised = diffusion.denoised({"x_0": x_0, "noise": noise}[predicts], x_t, t, predicts)
    for value, expected in zip(denoised, diffusion.posterior(x_0, x_t, t)):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)


def test_noise_and_x_0_are_each_other_s_inverse() -> None:
    diffusion, t = Diffusion(linear_betas(1000)), torch.tensor([1, 30, 1000])
    x_0, noise = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.manual_seed(0))
    x_t = diffusion.diffuse(x_0, t, noise)
    torch.testing.assert_close(diffusion.x_0_of_noise(noise, x_t, t), x_0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(diffusion.noise_of_x_0(x_0, x_t, t), noise, rtol=1e-9, atol=1e-9)


def test_a_prediction_of_x_previous_is_taken_as_it_is() -> None:
    output, x_t, noise = torch.randn(3, 4, 2, generator=torch.manual_seed(0))
    denoised = Diffusion(vp_betas(4)).denoised(output, x_t, torch.arange(1, 5), "x_previous")
    assert torch.equal(denoised.sample(noise), output)
    assert torch.equal(denoised.x_0, output)


def test_the_two_fixed_variances() -> None:
    diffusion, t, x = Diffusion(vp_betas(4)), torch.arange(1, 5), torch.randn(4, 2)
    torch.testing.assert_close(diffusion.denoised(x, x, t, variance="beta").std[:, 0].double() ** 2, vp_betas(4))
    posterior = diffusion.denoised(x, x, t, variance="posterior").std[:, 0].double() ** 2
    torch.testing.assert_close(posterior, diffusion.posterior_variance[1:])


def test_a_learned_variance_lies_between_the_fixed_ones_on_a_logarithmic_scale() -> None:
    diffusion, t = Diffusion(linear_betas(100)), torch.tensor([1, 2, 50, 100])
    x = torch.randn(4, 3, 1, dtype=torch.float64, generator=torch.manual_seed(0))
    upper, lower = diffusion.betas[t], diffusion.posterior_variance[t.clamp(min=2)]  # at t = 1 that of t = 2

    def variance(v: float) -> torch.Tensor:
        output = torch.cat([x, torch.full_like(x, v)], dim=1)
        denoised = diffusion.denoised(output, x, t, "noise", "learned")
        assert torch.equal(denoised.mean, diffusion.denoised(x, x, t, "noise").mean)
        return denoised.std[:, 0, 0].square()

    for v, expected in ((-1.0, lower), (0.0, (upper * lower).sqrt()), (1.0, upper)):
        torch.testing.assert_close(variance(v), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("num_steps", "visited"),
    [(1, [1000]), (2, [1, 1000]), (4, [1, 334, 667, 1000]), (10, [1, 112, 223, 334, 445, 556, 667, 778, 889, 1000])],
)
def test_a_respaced_process_visits_noise_levels_of_the_whole_one(num_steps: int, visited: list[int]) -> None:
    whole = Diffusion(linear_betas(1000))
    few = whole.respaced(num_steps)
    assert few.timesteps.tolist() == [0, *visited]
    torch.testing.assert_close(few.alphas_bar[1:], whole.alphas_bar[visited], rtol=1e-9, atol=0)


def test_respaced_to_all_steps_it_is_the_same_process_and_twice_respaced_it_keeps_its_timesteps() -> None:
    whole = Diffusion(linear_betas(100))
    same = whole.respaced(100)
    assert torch.equal(same.timesteps, whole.timesteps)
    torch.testing.assert_close(same.betas, whole.betas, rtol=1e-9, atol=0)
    assert whole.respaced(12).respaced(2).timesteps.tolist() == [0, 1, 100]


@pytest.mark.parametrize("num_steps", [0, 5])
def test_more_steps_than_there_are_cannot_be_visited(num_steps: int) -> None:
    with pytest.raises(ValueError, match="steps of a process of 4"):
        Diffusion(vp_betas(4)).respaced(num_steps)
