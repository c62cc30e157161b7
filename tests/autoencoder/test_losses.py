"""Losses of the autoencoder: means, so that no weight depends on the resolution."""

from __future__ import annotations

import pytest
import torch

from autoencoder.losses import kl_loss, reconstruction_loss


@pytest.mark.parametrize(("distance", "value"), [("l1", (1 + 3) / 4), ("l2", (1 + 9) / 4)])
def test_reconstruction_at_given_pixels(distance: str, value: float) -> None:
    images = torch.zeros(1, 1, 2, 2)
    reconstructions = torch.tensor([[[[1.0, 0.0], [-3.0, 0.0]]]])
    assert reconstruction_loss(reconstructions, images, distance).item() == value


@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_losses_do_not_depend_on_the_resolution(distance: str) -> None:
    a, b = torch.randn(2, 2, 3, 4, 4)
    small = reconstruction_loss(a, b, distance)
    large = reconstruction_loss(a.repeat(1, 1, 2, 2), b.repeat(1, 1, 2, 2), distance)
    torch.testing.assert_close(small, large)
    torch.testing.assert_close(kl_loss(a), kl_loss(a.repeat(1, 1, 2, 2)))


def test_kl_is_the_mean_over_latent_dimensions() -> None:
    assert kl_loss(torch.tensor([1.0, 2.0, 6.0])).item() == 3.0


def test_an_unknown_distance_is_refused() -> None:
    with pytest.raises(ValueError, match="no reconstruction distance 'l3'; there are 'l1' and 'l2'"):
        reconstruction_loss(torch.zeros(1), torch.zeros(1), "l3")
