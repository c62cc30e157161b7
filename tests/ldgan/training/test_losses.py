"""Losses of the game at points where their values are known."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from ldgan.training.losses import (
    discriminator_loss,
    distance,
    energy_score,
    finite_difference_penalty,
    generator_loss,
    gradient_penalty,
    mismatch_loss,
    reconstruction_loss,
    relativistic_loss,
    sigmoid_decay,
)


def test_an_undecided_discriminator_costs_log_2_for_each_term() -> None:
    zero = torch.zeros(3)
    assert discriminator_loss(zero, zero).item() == pytest.approx(2 * math.log(2))
    assert generator_loss(zero).item() == pytest.approx(math.log(2))


def test_losses_at_given_logits() -> None:
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([0.5, -3.0])
    log1pexp = [math.log1p(math.exp(x)) for x in (-2.0, 1.0, 0.5, -3.0)]
    assert discriminator_loss(real, fake).item() == pytest.approx(sum(log1pexp) / 2)
    assert generator_loss(fake).item() == pytest.approx((math.log1p(math.exp(-0.5)) + math.log1p(math.exp(3.0))) / 2)


def test_losses_of_positions_are_means_over_all_of_them() -> None:
    random = torch.manual_seed(0)
    real, fake = torch.randn(2, 5, 3, generator=random, dtype=torch.float64)
    differs = torch.tensor([True, False, True, True, False])

    def mean(values: list[float]) -> float:
        return sum(values) / 15

    def softplus(logit: torch.Tensor) -> float:
        return math.log1p(math.exp(logit.item()))

    places = [(sample, place) for sample in range(5) for place in range(3)]
    expected = mean([softplus(-real[at]) for at in places]) + mean([softplus(fake[at]) for at in places])
    assert discriminator_loss(real, fake).item() == pytest.approx(expected)
    assert generator_loss(fake).item() == pytest.approx(mean([softplus(-fake[at]) for at in places]))
    assert relativistic_loss(real, fake).item() == pytest.approx(mean([softplus(fake[at] - real[at]) for at in places]))
    others = mean([softplus(real[at]) for at in places if differs[at[0]]])
    assert mismatch_loss(real, differs).item() == pytest.approx(others)
    whole = real[:, 0]
    torch.testing.assert_close(mismatch_loss(whole, differs), mismatch_loss(whole[:, None], differs), rtol=0, atol=0)


def test_losses_are_binary_cross_entropies() -> None:
    real, fake = torch.randn(2, 100, generator=torch.manual_seed(0)) * 5
    cross_entropy = F.binary_cross_entropy_with_logits
    expected = cross_entropy(real, torch.ones(100)) + cross_entropy(fake, torch.zeros(100))
    torch.testing.assert_close(discriminator_loss(real, fake), expected)
    torch.testing.assert_close(generator_loss(fake), cross_entropy(fake, torch.ones(100)))


def test_the_generators_gradient_does_not_vanish_where_the_discriminator_is_sure() -> None:
    logit = torch.tensor([-50.0], requires_grad=True)
    generator_loss(logit).backward()
    assert logit.grad is not None
    assert logit.grad.item() == pytest.approx(-1.0)


def test_equal_logits_cost_either_player_log_2() -> None:
    logits = torch.tensor([-3.0, 0.0, 7.0])
    assert relativistic_loss(logits, logits).item() == pytest.approx(math.log(2))


def test_the_relativistic_loss_sees_pairs_and_differences_alone() -> None:
    real, fake = torch.randn(2, 6, generator=torch.manual_seed(0)).double()
    loss = relativistic_loss(real, fake)
    expected = -torch.log(1 / (1 + torch.exp(-(real - fake)))).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(relativistic_loss(real + 3, fake + 3), loss)
    assert abs(relativistic_loss(real, fake.flip(0)) - loss) > 1e-3


def test_the_relativistic_gradient_in_closed_form() -> None:
    # Of each logit: the chance, by the logistic function, that its opponent looks more real.
    random = torch.manual_seed(0)
    real, fake = (torch.randn(5, generator=random).requires_grad_() for _ in range(2))
    relativistic_loss(fake, real).backward()
    losing = torch.sigmoid(real.detach() - fake.detach()) / 5
    torch.testing.assert_close(fake.grad, -losing)
    torch.testing.assert_close(real.grad, losing)


def test_the_penalty_of_a_linear_discriminator_is_its_squared_norm() -> None:
    weight = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
    x = torch.randn(5, 3, requires_grad=True)
    penalty = gradient_penalty(x @ weight, x)
    assert penalty.item() == pytest.approx(1 + 4 + 9)
    penalty.backward()
    torch.testing.assert_close(weight.grad, 2 * weight.detach())  # it was differentiated a second time


def test_the_penalty_of_a_quadratic_discriminator() -> None:
    # D(x) = x^T A x / 2 with symmetric A: the gradient in x is A x, sample by sample.
    random = torch.manual_seed(0)
    A = torch.randn(4, 4, generator=random)
    A = (A + A.T).requires_grad_()
    x = torch.randn(6, 1, 2, 2, generator=random, requires_grad=True)
    flat = x.flatten(1)
    penalty = gradient_penalty(0.5 * ((flat @ A) * flat).sum(dim=1), x)
    expected = (flat @ A).square().sum(dim=1).mean()
    torch.testing.assert_close(penalty, expected)
    (gradient,) = torch.autograd.grad(penalty, A)
    S = (flat.T @ flat / 6).detach()
    torch.testing.assert_close(gradient, A.detach() @ S + S @ A.detach())  # of tr(A S A), S = E x x^T, A symmetric


def test_penalties_of_positions_are_those_of_their_sum() -> None:
    # D_n(x) = w_n x with w_1 + w_2 = (2, 0, 3): not the mean of ||w_n||^2, nor that of their mean.
    weight = torch.tensor([[1.0, -2.0, 3.0], [1.0, 2.0, 0.0]], dtype=torch.float64, requires_grad=True)
    random = torch.Generator().manual_seed(0)
    x, v = (torch.randn(5, 3, generator=random, dtype=torch.float64, requires_grad=True) for _ in range(2))
    penalty = gradient_penalty(x @ weight.T, x)
    assert penalty.item() == pytest.approx(4 + 9)
    (gradient,) = torch.autograd.grad(penalty, weight)
    torch.testing.assert_close(gradient, 2 * weight.detach().sum(dim=0).expand(2, 3))
    estimate = finite_difference_penalty(x @ weight.T, (x + 0.1 * v) @ weight.T, 0.1)
    torch.testing.assert_close(estimate, (v @ torch.tensor([2.0, 0.0, 3.0]).double()).square().mean())


def test_finite_differences_of_a_linear_discriminator_give_its_penalty_at_any_epsilon() -> None:
    weight = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64, requires_grad=True)
    random = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 400_000, 3, generator=random, dtype=torch.float64)
    for epsilon in (0.01, 1.0):
        penalty = finite_difference_penalty(x @ weight, (x + epsilon * v) @ weight, epsilon)
        (gradient,) = torch.autograd.grad(penalty, weight)
        # (v . w)^2 is ||w||^2 times a chi-squared variable of variance 2: five standard errors.
        assert penalty.item() == pytest.approx(14, abs=5 * 14 * (2 / 400_000) ** 0.5)
        torch.testing.assert_close(gradient, 2 * weight.detach(), rtol=0, atol=0.15)


def test_finite_differences_of_a_quadratic_discriminator_exceed_its_penalty_by_the_curvature() -> None:
    # D(x) = x^T A x / 2. Since v^T A v has mean tr A and variance 2 ||A||^2, its square adds
    # epsilon^2 / 4 (tr(A)^2 + 2 ||A||^2) to the exact penalty; the cross term is odd in v and vanishes.
    random = torch.Generator().manual_seed(0)
    A = torch.randn(4, 4, generator=random, dtype=torch.float64)
    A, x = A + A.T, torch.randn(1, 4, generator=random, dtype=torch.float64).requires_grad_()
    v = torch.randn(400_000, 4, generator=random, dtype=torch.float64)

    def discriminator(x: torch.Tensor) -> torch.Tensor:
        return 0.5 * ((x @ A) * x).sum(dim=1)

    exact = gradient_penalty(discriminator(x), x).item()
    curvature = (A.trace().square() + 2 * A.square().sum()).item()
    for epsilon in (0.01, 0.5):
        estimate = finite_difference_penalty(discriminator(x), discriminator(x + epsilon * v), epsilon).item()
        assert estimate == pytest.approx(exact + epsilon**2 / 4 * curvature, rel=0.02)
    assert 0.25 / 4 * curvature > 0.1 * exact  # so that the second epsilon tells the two apart


def test_reconstruction_is_the_mean_absolute_error() -> None:
    assert reconstruction_loss(torch.tensor([1.0, -2.0]), torch.tensor([0.0, 1.0])).item() == pytest.approx(2.0)


def test_sigmoid_decay_at_its_ends_and_in_the_middle() -> None:
    assert sigmoid_decay(0.0) == pytest.approx(1 / (1 + math.exp(-5)))
    assert sigmoid_decay(0.5) == 0.5
    assert sigmoid_decay(1.0) == pytest.approx(1 / (1 + math.exp(5)))
    assert sigmoid_decay(0.25, midpoint=0.25, sharpness=100) == 0.5
    values = [sigmoid_decay(i / 20) for i in range(21)]
    assert values == sorted(values, reverse=True)
    assert all(a + b == pytest.approx(1) for a, b in zip(values, reversed(values)))


def test_the_energy_score_of_hand_picked_samples() -> None:
    # One sample of four values: root mean squares of differences 1, 3 and 2 apart.
    x_0, estimate, other = torch.zeros(1, 4), torch.ones(1, 4), torch.full((1, 4), 3.0)
    score = energy_score(estimate, other, x_0)
    torch.testing.assert_close(score, torch.tensor((1 + 3) / 2 - 2 / 2))


def test_windows_add_the_energy_scores_of_parts() -> None:
    # Differences of 1 in the first column of a 4x4 sample. Windows of side 2 at every second half: nine of them.
    x_0, estimate = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    estimate[..., 0] = 1.0
    whole, windows = 0.5, (3 * 0.5**0.5 + 6 * 0.0) / 9  # nine windows, three of which touch the column
    score = energy_score(estimate, estimate, x_0, windows=[2])
    torch.testing.assert_close(score, torch.tensor((whole + windows) / 2), atol=2e-4, rtol=0)


def test_the_energy_score_is_least_for_samples_of_the_true_distribution() -> None:
    # x_0 ~ N(0, 1): an estimator that always answers the median scores worse than one that samples, and too
    # narrow or too wide ones score worse as well.
    random = torch.Generator().manual_seed(0)
    x_0, first, second = (torch.randn(200_000, 1, generator=random) for _ in range(3))
    scores = {width: float(energy_score(width * first, width * second, x_0)) for width in (0.0, 0.5, 1.0, 1.5)}
    assert min(scores, key=scores.__getitem__) == 1.0
    assert scores[1.0] == pytest.approx(1 / math.pi**0.5, abs=0.005)  # E|X - Y| / 2 = 1 / sqrt(pi)


def test_the_energy_score_of_estimates_that_coincide_is_the_distance_to_the_data() -> None:
    random = torch.Generator().manual_seed(0)
    estimate, x_0 = torch.randn(2, 3, 2, 4, 4, generator=random, dtype=torch.float64)
    score = energy_score(estimate, estimate, x_0, windows=[2])
    whole = (estimate - x_0).square().sum(dim=(1, 2, 3)).div(32).sqrt().mean()
    squares = (estimate - x_0).square()
    parts = [
        squares[:, :, row : row + 2, column : column + 2].sum(dim=(1, 2, 3)).div(8).sqrt()
        for row in range(3)
        for column in range(3)
    ]
    expected = (whole + torch.stack(parts).mean()) / 2
    torch.testing.assert_close(distance(estimate, x_0, windows=[2]), expected, rtol=1e-7, atol=0)
    torch.testing.assert_close(score, expected, rtol=0, atol=1e-4)  # half the distance of equal samples, 1e-4


def test_the_energy_score_has_a_gradient_where_estimates_coincide() -> None:
    estimate = torch.zeros(2, 3, requires_grad=True)
    energy_score(estimate, estimate, torch.ones(2, 3)).backward()
    assert torch.isfinite(estimate.grad).all()
