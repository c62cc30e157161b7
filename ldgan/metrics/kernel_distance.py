"""The kernel distance between two sets of images, in the features of a network.

Bińkowski et al., "Demystifying MMD GANs", ICLR 2018 (arXiv 1801.01401): the squared maximum mean discrepancy for the
kernel (x.y / d + 1)^3 of features x and y in d dimensions, averaged over random subsets. It bears the name KID for
features of Inception only. Unlike a Frechet distance its estimate has no bias, whatever the number of images: it is 0
on average, and often below, where both sets come from one distribution.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from ldgan.engine.cli import UserError
from ldgan.metrics.distances import check_pair

SEED = 2020  # torch-fidelity's


class KernelDistance(NamedTuple):
    """Mean and standard deviation over random subsets of ``subset_size`` images of either set.

    The deviation is that between subsets, not the error of the mean, which is smaller. Where a subset is the whole of
    both sets it is 0 and says nothing.
    """

    mean: float
    std: float
    subset_size: int


def kernel_distance(
    real: Tensor, fake: Tensor, *, num_subsets: int = 100, max_subset_size: int = 1000, seed: int = SEED
) -> KernelDistance:
    """Kernel distance of features (N, d) and (M, d), equal to torch-fidelity's of the same features in float64.

    Subsets are of ``max_subset_size`` images, or of all images of the smaller set where they are fewer.

    Raises:
        UserError: a set has fewer than two features, or NaN or infinite ones.
    """
    from torch_fidelity.metric_kid import kernel_mmd

    check_pair(real, fake)
    subset_size = min(max_subset_size, len(real), len(fake))
    if subset_size < 2:
        raise UserError(f"a kernel distance needs two images or more in each set, not {subset_size}; take more images")
    random = np.random.RandomState(seed)  # the generator and the order of draws that torch-fidelity has
    distances = []
    for _ in range(num_subsets):
        subsets = [x[random.choice(len(x), subset_size, replace=False)] for x in (fake, real)]
        # The distance is a small difference of large sums: one of 4e-5 in 2,048 features the size of Inception's is
        # wrong by 0.2 % in single precision.
        distances.append(kernel_mmd(*(subset.double().cpu().numpy() for subset in subsets)))
    return KernelDistance(float(np.mean(distances)), float(np.std(distances)), subset_size)
