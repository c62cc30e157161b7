"""Nearest neighbours of images in the features of a network, and whether a model copies its training images."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldgan.engine.cli import UserError
from ldgan.metrics.distances import BLOCK_SIZE, Progress, check_pair, distance_blocks, mean_of

NUM_PAIRS = 1024  # pairs of features whose differences are in memory at a time


class Neighbours(NamedTuple):
    """For each of N points, the nearest first: ``distances``, float64 (N, k), and ``numbers``, int64 (N, k)."""

    distances: Tensor
    numbers: Tensor


class Copying(NamedTuple):
    """How far samples are from their nearest training images, beside how far held-out real images are from theirs.

    nearer_than_heldout: probability that a sample is nearer than a held-out image, plus half of that of a tie: 0.5
        where samples are as new as real images, near 1 for copies, below 0.5 for bad images far from everything.
        It is the Mann-Whitney statistic of Meehan, Chaudhuri and Dasgupta, "A Non-Parametric Test to Detect
        Data-Copying in Generative Models", AISTATS 2020 (arXiv 2004.05675), without its cells. Of N samples and M
        held-out images that are equally new, its standard deviation is sqrt((N + M + 1) / (12 N M)).
    very_near_share: share of samples that are nearer than over 99 % of held-out images: 0.01 is expected, and a few
        copies among many new images lift it.
    median_distance_samples, median_distance_heldout: medians of the distances.
    """

    nearer_than_heldout: float
    very_near_share: float
    median_distance_samples: float
    median_distance_heldout: float


def nearest(
    points: Tensor, candidates: Tensor, k: int = 1, *, block_size: int = BLOCK_SIZE, progress: Progress | None = None
) -> Neighbours:
    """The ``k`` nearest of ``candidates``, features (M, d), to each of ``points``, features (N, d).

    Distances are those of float64 differences: exactly 0 to a copy. Of equally near candidates those with lower
    numbers come first. Memory beyond the features is for blocks of ``block_size`` x max(``block_size``, d) numbers.
    ``progress`` is told now and then how many more distances are done, of N x M in all.

    Raises:
        UserError: there are fewer than ``k`` candidates, or features are NaN or infinite.
    """
    check_pair(points, candidates)
    if len(candidates) < k:
        raise UserError(f"there are only {len(candidates):,} images to find the {k:,} nearest among; take more")
    candidates = candidates.to(points.device)
    squared = torch.full((len(points), k), torch.inf, dtype=torch.float64, device=points.device)
    numbers = torch.zeros((len(points), k), dtype=torch.int64, device=points.device)
    for block in distance_blocks(points, candidates, mean_of(candidates), block_size=block_size, progress=progress):
        rows, first = block.rows, block.columns.start
        # A product's rounding must not decide: among the k nearest may be whatever it does not place behind them.
        lower, upper = block.squared - block.rounding, block.squared + block.rounding
        limit = upper.topk(min(k, upper.shape[1]), largest=False).values[:, -1]
        point, candidate = (lower <= torch.minimum(limit, squared[rows, -1])[:, None]).nonzero(as_tuple=True)
        if len(point) == 0:
            continue
        found = _squared_differences(points[rows], candidates[block.columns], point, candidate)
        distances = torch.cat([squared[rows], _padded(found, point, len(lower), torch.inf)], dim=1)
        which = torch.cat([numbers[rows], _padded(candidate + first, point, len(lower), -1)], dim=1)
        order = distances.argsort(dim=1, stable=True)[:, :k]  # stable: equal ones stay in the order of their numbers
        squared[rows], numbers[rows] = distances.gather(1, order), which.gather(1, order)
    return Neighbours(squared.sqrt(), numbers)


def copying(
    samples: Tensor,
    heldout: Tensor,
    training: Tensor,
    *,
    block_size: int = BLOCK_SIZE,
    progress: Progress | None = None,
) -> Copying:
    """Compare the distances to ``training`` of samples with those of held-out images: features (N, d), (M, d), (T, d).

    ``heldout`` are real images of the same distribution as ``training`` that are not in it. ``progress`` is told now
    and then how many more distances are done, of (N + M) x T in all.

    Raises:
        UserError: one of the sets is empty, or features are NaN or infinite.
    """
    ours, theirs = (
        nearest(points, training, block_size=block_size, progress=progress).distances[:, 0]
        for points in (samples, heldout)
    )
    return copying_from_distances(ours, theirs)


def copying_from_distances(samples: Tensor, heldout: Tensor) -> Copying:
    """`copying` where the distances to the nearest training images are known: those of samples (N,), of others (M,).

    Raises:
        UserError: one of the sets is empty.
    """
    if min(len(samples), len(heldout)) == 0:
        raise UserError("a copying check needs samples and held-out images, and there are none; give some")
    ours, theirs = (np.sort(distances.cpu().numpy()) for distances in (samples, heldout))
    nearer, as_near = (np.searchsorted(theirs, ours, side) for side in ("left", "right"))  # held-out images, counted
    farther = len(theirs) - (nearer + as_near) / 2  # half of those as far
    return Copying(
        nearer_than_heldout=float(np.mean(farther) / len(theirs)),
        very_near_share=float(np.mean(100 * as_near < len(theirs))),
        median_distance_samples=float(np.median(ours)),
        median_distance_heldout=float(np.median(theirs)),
    )


def _squared_differences(points: Tensor, candidates: Tensor, point: Tensor, candidate: Tensor) -> Tensor:
    """Squared distances, float64 (P,), of the pairs whose numbers ``point`` and ``candidate``, (P,), are."""
    pairs = zip(point.split(NUM_PAIRS), candidate.split(NUM_PAIRS))
    return torch.cat([(points[p].double() - candidates[c].double()).square().sum(dim=1) for p, c in pairs])


def _padded(values: Tensor, rows: Tensor, num_rows: int, padding: float) -> Tensor:
    """Lay ``values`` (P,) out in ``rows`` (P,), which ascend: (num_rows, most of a row), filled up with ``padding``."""
    lengths = torch.bincount(rows, minlength=num_rows)
    places = torch.arange(len(rows), device=rows.device) - (lengths.cumsum(0) - lengths)[rows]
    table = values.new_full((num_rows, int(lengths.max())), padding)
    table[rows, places] = values
    return table
