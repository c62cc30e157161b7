"""Whether samples show what their prompts say, in the features of a network.

A sample should be nearer to the real images of its own prompt than to those of another one. Prompts are the captions of
the reference, which were best held out of training; by chance half of all comparisons would come out so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data_prep.shards import ShardSet
from data_prep.urls import public_name
from ldgan.engine.cli import UserError
from ldgan.engine.progress import progress_bar
from ldgan.engine.seeding import generator
from ldgan.evaluation.collecting import FeatureSet

BLOCK_SIZE = 256  # points whose distances to all images are held at a time


class Agreement(NamedTuple):
    """How often points are nearer to the images of their own caption than to those of another, ties counting half.

    ``share`` compares each point with one other caption, drawn at random, ``mean_rank_share`` with all of them, which
    is the same number in expectation and a steadier one: the share of captions that lie farther than the point's own.
    Standard errors are over points.
    """

    share: float
    share_std_error: float
    mean_rank_share: float
    mean_rank_share_std_error: float
    num_points: int


def read_captions(path: Path | str, num_images: int | None) -> list[str]:
    """The captions of the first ``num_images`` (None: all) images in shards, by number; "" where there is none.

    Raises:
        UserError: these are no image shards, or have fewer than two different captions.
    """
    shards = ShardSet.open(path)
    name = public_name(path)
    if shards.manifest.kind != "images" or not shards.manifest.has_captions:
        raise UserError(f"{name}: --metrics text needs captions; give image shards that have some as --reference")
    numbers = range(len(shards))[:num_images]
    captions = [shards.read(number).get("txt", b"").decode(errors="replace").strip() for number in numbers]
    if len(prompts_of_captions(captions)) < 2:
        raise UserError(f"{name}: --metrics text compares images of different captions, and there are not two")
    return captions


def prompts_of_captions(captions: Sequence[str]) -> list[str]:
    """The different captions, in the order in which they are first met."""
    return list(dict.fromkeys(caption for caption in captions if caption))


def text_results(captions: Sequence[str], samples: FeatureSet, reference: FeatureSet, seed: int) -> dict[str, Any]:
    """The agreement of samples with their prompts, as JSON; sample n has the prompt n, round and round.

    Beside it is that of real images with others of their own caption, None where no caption has two.
    """
    prompts = prompts_of_captions(captions)
    number_of = {prompt: number for number, prompt in enumerate(prompts)}
    captioned = [row for row, number in enumerate(reference.numbers.tolist()) if captions[number]]
    images = reference.features[captioned]
    groups = torch.tensor([number_of[captions[int(reference.numbers[row])]] for row in captioned])
    wanted = samples.numbers % len(prompts)
    return {
        "samples": agreement(samples.features, wanted, images, groups, seed=seed)._asdict(),
        "real_images": _agreement_of_images(images, groups, seed),
        "chance": 0.5,
        "num_prompts": len(prompts),
        "num_images": len(images),
        "seed": seed,
    }


def agreement(
    points: Tensor, wanted: Tensor, images: Tensor, captions: Tensor, *, seed: int, leave_out: Tensor | None = None
) -> Agreement:
    """How near points (N, d) are to the images (M, d) of the caption that is wanted of them.

    Args:
        points: features of what is judged.
        wanted: int64 (N,), the number of each point's caption.
        images: features of real images.
        captions: int64 (M,), the number of each image's caption; every number from 0 to the highest occurs.
        seed: of the other captions that are drawn.
        leave_out: int64 (N,), for each point an image that it is not compared with: itself.
    """
    own_share, all_shares = [], []
    random = generator("cpu", "other captions", seed)
    with progress_bar("distances to captions", len(points), "images") as bar:
        for rows in torch.arange(len(points)).split(BLOCK_SIZE):
            left_out = leave_out[rows] if leave_out is not None else None
            distances = _distances_to_captions(points[rows], images, captions, left_out)
            mine = wanted[rows, None]
            own = distances.gather(1, mine)
            wins = (own < distances).double() + 0.5 * (own == distances)
            other = torch.randint(distances.shape[1] - 1, mine.shape, generator=random)
            own_share.append(wins.gather(1, other + (other >= mine)).squeeze(1))
            all_shares.append((wins.sum(dim=1) - 0.5) / (distances.shape[1] - 1))  # its own caption is no other one
            bar.advance(len(rows))
    shares = [torch.cat(each) for each in (own_share, all_shares)]
    means, errors = ([number(share) for share in shares] for number in (_mean, _std_error))
    return Agreement(means[0], errors[0], means[1], errors[1], len(points))


def _distances_to_captions(points: Tensor, images: Tensor, captions: Tensor, leave_out: Tensor | None) -> Tensor:
    """Distances, float64 (N, P), of points (N, d) to the nearest image (M, d) of each caption."""
    # By differences, not as a matrix product: equal images must have equal distances.
    distances = torch.cdist(points.double(), images.double(), compute_mode="donot_use_mm_for_euclid_dist")
    if leave_out is not None:
        distances.scatter_(1, leave_out[:, None], math.inf)
    nearest = distances.new_full((len(points), int(captions.max()) + 1), math.inf)
    return nearest.scatter_reduce_(1, captions.expand(len(points), -1), distances, "amin")


def _agreement_of_images(images: Tensor, captions: Tensor, seed: int) -> dict[str, Any] | None:
    """The agreement of images whose caption others share with these others."""
    shared = (captions.bincount()[captions] > 1).nonzero().squeeze(1)
    if len(shared) == 0:
        return None
    return agreement(images[shared], captions[shared], images, captions, seed=seed, leave_out=shared)._asdict()


def _mean(values: Tensor) -> float:
    return values.mean().item()


def _std_error(values: Tensor) -> float:
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
