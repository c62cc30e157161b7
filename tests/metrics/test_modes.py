"""Mode coverage and its KL against closed forms, and the reading of stacked digits."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ldgan.engine.cli import UserError
from ldgan.metrics.modes import mode_coverage


def test_even_histogram_has_no_divergence():
    coverage = mode_coverage(np.tile(np.arange(1000), 26))
    assert coverage.num_covered == coverage.num_modes == 1000
    assert coverage.num_images == 26_000
    assert coverage.kl == pytest.approx(0, abs=1e-12)


def test_a_collapsed_generator_scores_ln_k():
    coverage = mode_coverage(np.full(50, 7))
    assert coverage.num_covered == 1
    assert coverage.kl == pytest.approx(math.log(1000))


def test_two_level_histogram_by_hand():
    # p = 3/8 twice and 1/8 twice, against 1/4: 3/4 ln(3/2) + 1/4 ln(1/2)
    coverage = mode_coverage(np.array([0, 0, 0, 1, 1, 1, 2, 3]), num_modes=4)
    assert coverage.kl == pytest.approx(0.75 * math.log(1.5) - 0.25 * math.log(2))


def test_missing_modes_count_and_cost_the_log_of_their_share():
    # Even over 600 of 1,000 modes: every p is 1/600, so that KL = ln(1000 / 600).
    coverage = mode_coverage(np.repeat(np.arange(200, 800), 5))
    assert coverage.num_covered == 600
    assert coverage.kl == pytest.approx(math.log(1000 / 600))


def test_the_order_of_images_does_not_matter():
    rng = np.random.default_rng(0)
    modes = rng.integers(0, 1000, size=3000)
    assert mode_coverage(modes) == mode_coverage(rng.permutation(modes))


def test_uniform_draws_score_the_sampling_floor():
    rng = np.random.default_rng(0)
    coverages = [mode_coverage(rng.integers(0, 1000, size=26_000)) for _ in range(100)]
    floor = coverages[0].sampling_floor
    assert floor == pytest.approx(0.0192, abs=5e-5)
    # One KL scatters by sqrt(2 (K - 1)) / (2 N), 4.5 % of the floor; the mean of 100 by a tenth of that.
    assert np.mean([coverage.kl for coverage in coverages]) == pytest.approx(floor, rel=0.02)


@pytest.mark.parametrize(
    ("modes", "message"),
    [
        (np.array([], dtype=int), "at least one image"),
        (np.array([0, 1000]), "0 to 1000, outside 0..999"),
        (np.array([-1, 3]), "-1 to 3, outside 0..999"),
        (np.array([0.0, 1.0]), "float64 of shape"),
        (np.zeros((2, 3), dtype=int), "vector of integers"),
    ],
)
def test_modes_that_make_no_sense_are_refused(modes, message):
    with pytest.raises(UserError, match=message):
        mode_coverage(modes)
