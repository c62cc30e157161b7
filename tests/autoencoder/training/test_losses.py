"""Losses of the autoencoder: closed forms, and means, so that no weight depends on the resolution."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autoencoder.training.losses import (
    adaptive_weight,
    adversarial_loss,
    discriminator_loss,
    kl_loss,
    negative_log_likelihood,
    reconstruction_loss,
)


@pytest.mark.parametrize(("distance", "value"), [("l1", (1 + 3) / 4), ("l2", (1 + 9) / 4)])
def test_reconstruction_at_given_pixels(distance: str, value: float) -> None:
    images = torch.zeros(1, 1, 2, 2)
    reconstructions = torch.tensor([[[[1.0, 0.0], [-3.0, 0.0]]]])
    assert reconstruction_loss(reconstructions, images, distance).item() == value


TERMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": lambda x, y: reconstruction_loss(x, y, "l1"),
    "l2": lambda x, y: reconstruction_loss(x, y, "l2"),
    "kl": lambda x, _: kl_loss(x),
    "hinge, discriminator": lambda x, y: discriminator_loss(x, y, "hinge"),
    "hinge, autoencoder": lambda x, _: adversarial_loss(x, "hinge"),
    "non-saturating, discriminator": lambda x, y: discriminator_loss(x, y, "non-saturating"),
    "non-saturating, autoencoder": lambda x, _: adversarial_loss(x, "non-saturating"),
}


@pytest.mark.parametrize("term", TERMS)
def test_no_term_depends_on_the_resolution(term: str) -> None:
    x, y = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    tiled = [tensor.repeat(1, 1, 2, 2) for tensor in (x, y)]
    torch.testing.assert_close(TERMS[term](*tiled), TERMS[term](x, y))


def test_kl_is_the_mean_over_latent_dimensions() -> None:
    assert kl_loss(torch.tensor([1.0, 2.0, 6.0])).item() == 3.0


def test_the_likelihood_is_best_where_the_variance_is_the_distance() -> None:
    distance, log_variance = torch.tensor(0.3), torch.tensor(0.3).log().requires_grad_()
    loss = negative_log_likelihood(distance, log_variance)
    torch.testing.assert_close(loss, 1 + distance.log())
    loss.backward()
    torch.testing.assert_close(log_variance.grad, torch.tensor(0.0), rtol=0, atol=1e-6)
    for other in (-3.0, 0.0):
        assert negative_log_likelihood(distance, torch.tensor(other)) > loss


def test_the_likelihood_of_unit_variance_is_the_distance() -> None:
    assert negative_log_likelihood(torch.tensor(0.3), torch.tensor(0.0)).item() == pytest.approx(0.3)


def test_hinge_ends_where_logits_are_beyond_one() -> None:
    real, fake = torch.tensor([3.0, 0.0, -1.0]), torch.tensor([-3.0, 0.0, 2.0])
    assert discriminator_loss(real, fake, "hinge").item() == pytest.approx((0 + 1 + 2) / 3 + (0 + 1 + 3) / 3)
    assert adversarial_loss(fake, "hinge").item() == pytest.approx(1 / 3)


def test_the_non_saturating_loss_is_cross_entropy_with_true_labels_swapped_for_the_autoencoder() -> None:
    real, fake = torch.randn(2, 3, 1, 2, 2)
    ones, zeros = torch.ones_like(real), torch.zeros_like(fake)
    entropy = F.binary_cross_entropy_with_logits
    torch.testing.assert_close(
        discriminator_loss(real, fake, "non-saturating"), entropy(real, ones) + entropy(fake, zeros)
    )
    torch.testing.assert_close(adversarial_loss(fake, "non-saturating"), entropy(fake, ones))


@pytest.mark.parametrize("kind", ["hinge", "non-saturating"])
def test_players_want_opposite_logits(kind: str) -> None:
    real, fake = torch.zeros(2, 4, requires_grad=True).unbind()
    real_gradient, fake_gradient = torch.autograd.grad(discriminator_loss(real, fake, kind), (real, fake))
    assert (real_gradient < 0).all()
    assert (fake_gradient > 0).all()
    (gradient,) = torch.autograd.grad(adversarial_loss(fake, kind), fake)
    assert (gradient < 0).all()


def test_the_adaptive_weight_is_the_ratio_of_the_gradients_norms() -> None:
    weight = torch.zeros(4, requires_grad=True)
    a, b = torch.tensor([3.0, 0.0, 4.0, 0.0]), torch.tensor([0.0, 0.0, 0.0, 2.0])
    reconstruction, adversarial = (a * weight).sum(), (b * weight).sum()
    ratio = adaptive_weight(reconstruction, adversarial, weight)
    assert ratio.item() == pytest.approx(5 / (2 + 1e-4))
    assert not ratio.requires_grad
    (reconstruction + ratio * adversarial).backward()  # both graphs are still there
    torch.testing.assert_close(weight.grad, a + ratio * b)


def test_the_adaptive_weight_is_clamped() -> None:
    weight = torch.zeros(2, requires_grad=True)
    strong, none = (2 * weight).sum(), (0 * weight).sum()
    assert adaptive_weight(strong, none, weight).item() == 1e4  # 2 sqrt(2) / 1e-4 otherwise
    assert adaptive_weight(none, strong, weight).item() == 0.0


def test_the_adaptive_weight_is_computed_in_fp32() -> None:
    weight = torch.zeros(2, requires_grad=True, dtype=torch.bfloat16)
    ratio = adaptive_weight(3 * weight.sum(), 7 * weight.sum(), weight)
    assert ratio.dtype == torch.float32
    assert ratio.item() == pytest.approx(3 / 7, rel=1e-4)  # bf16 has but three digits


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda x: reconstruction_loss(x, x, "l3"), "no reconstruction distance 'l3'; there are 'l1' and 'l2'"),
        (lambda x: adversarial_loss(x, "lsgan"), "no adversarial loss 'lsgan'; there are 'hinge' and 'non-saturating'"),
        (lambda x: discriminator_loss(x, x, "lsgan"), "no adversarial loss 'lsgan'"),
    ],
)
def test_an_unknown_loss_is_refused(loss: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss(torch.zeros(1))
