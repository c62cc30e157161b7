"""Distances between all features of two sets, one block of the matrix at a time.

All 50,000 x 50,000 of them would take 20 GB. Features stay as they are given, in single precision for those of
networks; in float64 are only a block and the features that it lies between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ldgan.engine.cli import UserError

BLOCK_SIZE = 1024  # features on either side of a block

Progress = Callable[[int], None]  # is told how many distances were computed since it was last told


class Block(NamedTuple):
    """Squared distances, float64 (R, C), between the features ``rows`` of one set and ``columns`` of another.

    ``rounding``, (R, C), is how far rounding may have moved two of them apart that are equal.
    """

    rows: slice
    columns: slice
    squared: Tensor
    rounding: Tensor


def check_finite(values: Tensor, what: str) -> None:
    """Check that ``values`` (N, ...), ``what`` they are, are numbers.

    Raises:
        UserError: one of them is NaN or infinite.
    """
    if not all(part.isfinite().all() for part in values.split(BLOCK_SIZE)):
        raise UserError(f"{what} hold NaN or infinity; check the images and the weights of the network")


def check_pair(a: Tensor, b: Tensor) -> None:
    """Check that two sets hold finite features of one length, (N, d) and (M, d).

    Raises:
        ValueError: their shapes are others.
        UserError: a feature is NaN or infinite.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features must be (N, d) and (M, d), not {tuple(a.shape)} and {tuple(b.shape)}")
    for features in (a, b):
        check_finite(features, f"features of {len(features):,} images")


def mean_of(features: Tensor) -> Tensor:
    """Mean of features (N, d), float64 (d,)."""
    # `features.mean(dim=0, dtype=torch.float64)` would first make a copy of them all.
    return torch.stack([part.double().sum(dim=0) for part in features.split(BLOCK_SIZE)]).sum(dim=0) / len(features)


def distance_blocks(
    a: Tensor,
    b: Tensor,
    origin: Tensor,
    *,
    half: bool = False,
    block_size: int = BLOCK_SIZE,
    progress: Progress | None = None,
) -> Iterator[Block]:
    """Yield the squared distances between features (N, d) and (M, d), all on one device.

    |a|^2 + |b|^2 - 2 a.b is a matrix product, tens of times faster than differences, but exact only up to rounding
    at the size of |a|^2 and |b|^2: ``origin``, float64 (d,), should lie among the features. ``half`` leaves out the
    blocks below the diagonal, which mirror others where ``b`` is ``a``.
    """
    for start in range(0, len(a), block_size):
        rows = slice(start, min(start + block_size, len(a)))
        points = a[rows].double() - origin
        for first in range(start if half else 0, len(b), block_size):
            columns = slice(first, min(first + block_size, len(b)))
            others = b[columns].double() - origin
            norms = points.square().sum(dim=1)[:, None] + others.square().sum(dim=1)
            squared = torch.addmm(norms, points, others.T, alpha=-2)
            num_distances = math.comb(len(points) + 1, 2) if half and rows == columns else squared.numel()
            yield Block(rows, columns, squared, norms.mul_(8 * points.shape[1] * torch.finfo(norms.dtype).eps))
            if progress is not None:
                progress(num_distances)
