"""Mode coverage on StackedMNIST: how many of 1,000 known modes does a generator reach, and how evenly?

A StackedMNIST image carries an independent MNIST digit in each colour channel, so that it belongs to one of
10 * 10 * 10 equally likely modes. A classifier of single digits reads the mode off a generated image. The
benchmark goes back to Metz et al. 2017 (Unrolled GAN); PacGAN (Lin et al. 2018) and DD-GAN (Xiao et al. 2022)
report it for 26,000 images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ldgan.engine.cli import UserError


@dataclass(frozen=True)
class ModeCoverage:
    """How ``num_images`` images spread over ``num_modes`` modes that are equally likely in the data.

    ``num_covered`` counts the modes with at least one image. ``kl`` is KL(p_generated || uniform) in nats,
    between 0 (perfectly even) and ln(num_modes) (all images in one mode).
    """

    num_modes: int
    num_covered: int
    kl: float
    num_images: int

    @property
    def sampling_floor(self) -> float:
        """The KL a perfect generator is expected to score, (K - 1) / (2 N): a KL without its N says nothing.

        N draws from the uniform distribution itself never fill K modes evenly, so the KL of their histogram
        is positive. 2 N KL(histogram || uniform) is the likelihood-ratio statistic of the hypothesis that
        modes are uniform; where that holds, and for large N, it follows a chi-squared distribution with K - 1
        degrees of freedom (Wilks 1938), whose mean is K - 1. At K = 1,000 and N = 26,000 the floor is 0.0192.
        For N below a few K, modes hold a handful of images each and the approximation is loose.
        """
        return (self.num_modes - 1) / (2 * self.num_images)


def mode_coverage(modes: np.ndarray, num_modes: int = 1000) -> ModeCoverage:
    """Count the modes that images fall into and measure how far their histogram is from uniform.

    Args:
        modes: (N,) integers in 0..num_modes - 1, the mode of each image; their order does not matter.
        num_modes: K, the number of modes in the data.

    Raises:
        UserError: ``modes`` is empty, not a vector of integers, or has values outside the range.
    """
    if modes.ndim != 1 or not np.issubdtype(modes.dtype, np.integer):
        raise UserError(
            f"modes are {modes.dtype} of shape {modes.shape}; give a vector of integers, one for each image"
        )
    if modes.size == 0:
        raise UserError("mode coverage needs at least one image and got none; generate some images first")
    if modes.min() < 0 or modes.max() >= num_modes:
        raise UserError(f"modes run from {modes.min()} to {modes.max()}, outside 0..{num_modes - 1}; correct num_modes")
    histogram = np.bincount(modes, minlength=num_modes) / modes.size
    covered = histogram[histogram > 0]  # the limit of p ln p at p = 0 is 0
    kl = float(np.sum(covered * np.log(covered * num_modes)))
    return ModeCoverage(num_modes, num_covered=covered.size, kl=kl, num_images=modes.size)
