"""Toy data: the exact denoising distribution beside numerical integration, how fits are judged, both toys at work."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import norm

from ldgan import toy
from ldgan.diffusion.process import Diffusion, vp_betas
from ldgan.engine.cli import UserError
from ldgan.engine.images import load_png
from ldgan.engine.philox import Random, key_of
from ldgan.reports.mixtures import GaussianMixture, grid_quality, histogram_masses, total_variation

WEIGHTS, MEANS, STDS = (0.2, 0.5, 0.3), (-1.2, 0.1, 0.9), (0.1, 0.25, 0.15)
MIXTURE = GaussianMixture(
    weights=torch.tensor(WEIGHTS, dtype=torch.float64),
    means=torch.tensor(MEANS, dtype=torch.float64)[:, None],
    stds=torch.tensor(STDS, dtype=torch.float64),
)
CORNERS = GaussianMixture(
    torch.full((4,), 0.25), torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]]), torch.full((4,), 0.1)
)


# Sums over this grid are integrals: the trapezoidal rule is exact to rounding for smooth functions that vanish at
# both ends, if its steps are well below the narrowest std.
GRID = np.linspace(-7.0, 7.0, 2801)
STEP = GRID[1] - GRID[0]


def data_density(x: np.ndarray) -> np.ndarray:
    return sum(weight * norm.pdf(x, mean, std) for weight, mean, std in zip(WEIGHTS, MEANS, STDS))


def diffused_density(x: np.ndarray, alpha_bar: float) -> np.ndarray:
    """q(x_t) as an integral over x_0."""
    kernel = norm.pdf(x[:, None], math.sqrt(alpha_bar) * GRID, math.sqrt(1 - alpha_bar))
    return kernel @ data_density(GRID) * STEP


@pytest.mark.parametrize("x_t", [-1.3, 0.2, 2.0])
@pytest.mark.parametrize("t", [1, 2])
def test_the_denoising_distribution_is_bayes_rule_by_numerical_integration(t: int, x_t: float) -> None:
    betas = vp_betas(2)
    previous = data_density(GRID) if t == 1 else diffused_density(GRID, 1 - betas[0].item())
    beta = betas[t - 1].item()
    joint = previous * norm.pdf(x_t, math.sqrt(1 - beta) * GRID, math.sqrt(beta))
    expected = torch.from_numpy(joint / (joint.sum() * STEP))
    posterior = MIXTURE.denoising(Diffusion(betas), torch.tensor([x_t], dtype=torch.float64), t)
    torch.testing.assert_close(posterior.density(torch.from_numpy(GRID)[:, None]), expected, rtol=1e-6, atol=1e-9)


def test_the_diffused_mixture_is_an_integral_over_x_0() -> None:
    diffusion, x = Diffusion(vp_betas(4)), np.array([-1.0, 0.3])
    density = MIXTURE.diffused(diffusion, 2).density(torch.from_numpy(x)[:, None])
    torch.testing.assert_close(density, torch.from_numpy(diffused_density(x, diffusion.alphas_bar[2].item())))


def test_the_denoising_distributions_of_all_x_t_make_up_q_of_x_previous() -> None:
    # In two dimensions: the mean over x_t ~ q(x_t) of q(x_{t-1} | x_t) is q(x_{t-1}).
    diffusion, random = Diffusion(vp_betas(2)), Random(key_of(0), "cpu")
    points = torch.tensor([[0.5, -0.2], [-0.7, -0.7]])
    x_t = CORNERS.diffused(diffusion, 2).sample(1000, random)
    densities = torch.stack([CORNERS.denoising(diffusion, x, 2).density(points) for x in x_t])
    error = 5 * densities.std(dim=0) / len(x_t) ** 0.5
    assert ((densities.mean(dim=0) - CORNERS.diffused(diffusion, 1).density(points)).abs() < error).all()


def kl_to_gaussian(num_steps: int) -> float:
    """KL(q(x_{t-1} | x_t) || best Gaussian) half way along the process, by a sum over a fine grid."""
    true = MIXTURE.denoising(Diffusion(vp_betas(num_steps)), torch.tensor([0.2]), num_steps // 2)
    x = torch.linspace(-6, 6, 20_001, dtype=torch.float64)[:, None]
    p, q = true.density(x), true.matched_gaussian().density(x)
    return ((p * (p.clamp(min=1e-300) / q.clamp(min=1e-300)).log()).sum() * (x[1] - x[0])).item()


def test_the_denoising_distribution_becomes_gaussian_as_steps_shrink() -> None:
    divergences = [kl_to_gaussian(num_steps) for num_steps in (2, 4, 8, 64, 1024)]
    assert divergences == sorted(divergences, reverse=True)
    assert divergences[0] > 0.2
    assert 0 <= divergences[-1] < 1e-5


def test_the_matched_gaussian_has_the_mean_and_variance_of_samples() -> None:
    gaussian = MIXTURE.matched_gaussian()
    samples = MIXTURE.sample(200_000, Random(key_of(0), "cpu")).double()
    assert gaussian.means.item() == pytest.approx(samples.mean().item(), abs=0.01)
    assert gaussian.stds.item() == pytest.approx(samples.std().item(), abs=0.01)


def test_bin_masses_are_integrals_of_the_density_and_miss_nothing() -> None:
    edges = torch.linspace(-1.0, 1.5, 6)
    masses = MIXTURE.bin_masses(edges)
    cumulative = sum(weight * norm.cdf(edges, mean, std) for weight, mean, std in zip(WEIGHTS, MEANS, STDS))
    torch.testing.assert_close(masses[1:-1], torch.from_numpy(np.diff(cumulative)[1:-1]))
    assert masses.sum().item() == pytest.approx(1.0, abs=1e-12)
    samples = MIXTURE.sample(100_000, Random(key_of(0), "cpu"))[:, 0]
    torch.testing.assert_close(histogram_masses(samples, edges), masses, atol=0.008, rtol=0.0)


def test_total_variation_of_gaussians_is_its_closed_form() -> None:
    # TV(N(-m, 1), N(m, 1)) = 2 Phi(m) - 1.
    edges = torch.linspace(-8, 8, 2001)
    p, q = (GaussianMixture(torch.ones(1), torch.tensor([[m]]), torch.ones(1)).bin_masses(edges) for m in (-0.7, 0.7))
    assert total_variation(p, q) == pytest.approx(2 * norm.cdf(0.7) - 1, abs=1e-5)
    assert total_variation(p, p) == 0


def test_quality_of_points_placed_by_hand() -> None:
    # Of four modes: two points in the first, one 3.1 std away from the second, one within 3 std of the third.
    points = torch.tensor([[-1.0, -1.0], [-1.1, -1.1], [-1.0, 1.31], [1.29, -1.0]])
    quality = grid_quality(points, CORNERS)
    assert (quality.num_modes, quality.num_covered, quality.high_quality) == (4, 2, 0.75)
    # Shares by nearest mode: 1/2, 1/4, 1/4, 0.
    assert quality.kl == pytest.approx(0.5 * math.log(2))
    assert quality.kl_floor == pytest.approx(3 / 8)


def test_quality_of_real_points_and_of_a_single_mode() -> None:
    samples = toy.GRID_25.sample(20_000, Random(key_of(0), "cpu"))
    quality = grid_quality(samples, toy.GRID_25)
    assert quality.num_covered == 25
    assert quality.high_quality == pytest.approx(1 - math.exp(-4.5), abs=0.004)  # P(chi_2 < 3), Rayleigh
    assert quality.kl == pytest.approx(quality.kl_floor, rel=1.0)
    collapsed = grid_quality(toy.GRID_25.means[:1].repeat(100, 1), toy.GRID_25)
    assert (collapsed.num_covered, collapsed.high_quality) == (1, 1.0)
    assert collapsed.kl == pytest.approx(math.log(25))


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["toy.py", *map(str, arguments)])
    toy.main()


def test_one_d_from_end_to_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "one_d"
    run(monkeypatch, "one-d", "--out", out, "--num-steps", 2, "--num-samples", 5000)
    rows = json.loads((out / "results.json").read_text())["results"]
    assert [row["name"] for row in rows] == ["T = 1,000", "T = 8", "T = 4", "T = 2", "T = 1", "T = 2, no z"]
    assert [row["num_timesteps"] for row in rows] == [1000, 8, 4, 2, 1, 2]
    # Even T start from the same noise level, and the Gaussian's error grows with the size of the step.
    assert [row["alpha_bar"] for row in rows[:4]] == pytest.approx([rows[0]["alpha_bar"]] * 4)
    errors = [row["mean_total_variation"]["gaussian"] for row in rows]
    assert errors[:4] == sorted(errors[:4])
    assert errors[0] < 0.01
    assert errors[3] > 0.2
    # Two steps teach nothing: samples of the truth are nearer to it.
    for row in rows[1:]:
        distances = row["mean_total_variation"]
        assert distances["redrawn"] < distances["generator"] <= 1
    assert rows[-1]["mean_total_variation"]["generator"] > 0.8  # without z, x_0 given x_1 is a point
    assert load_png(out / "one_d.png").float().std() > 10  # something is drawn


def test_grid25_from_end_to_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "grid25"
    run(monkeypatch, "grid25", "--out", out, "--num-steps", 2, "--num-samples", 500)
    rows = json.loads((out / "results.json").read_text())["results"]
    assert [row["name"] for row in rows] == ["real data", "T = 1", "T = 2", "T = 4", "T = 8", "T = 4, no z"]
    assert rows[0]["num_covered"] == 25
    assert all(row["high_quality"] < 0.5 for row in rows[1:])  # two steps teach nothing
    assert load_png(out / "grid25.png").float().std() > 10
    with pytest.raises(UserError, match="exists already"):
        run(monkeypatch, "grid25", "--out", out)


def test_training_learns_from_the_seed_alone() -> None:
    recipe = replace(toy.GRID_25_RECIPE, num_steps=3, seed=5)
    first, second, other = (
        toy.train(toy.GRID_25, 2, replace(recipe, seed=seed), "training").sample(range(4)) for seed in (5, 5, 6)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
