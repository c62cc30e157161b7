"""Editing with a trained model: strokes, images, holes, margins, and the ways between samples.

Every function takes a model and tensors, and makes row i of its result from seed i, the same whatever the batch.
Images are uint8 (B, 3, H, W) on the CPU, of the model's resolution unless told otherwise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from autoencoder.models.text import Text
from ldgan.diffusion.process import Denoised, Diffusion, at
from ldgan.diffusion.samplers import Callback, Denoiser, Noise, SamplerConfig, Start, ancestral
from ldgan.engine.cli import UserError
from ldgan.engine.images import from_uint8
from ldgan.engine.philox import RandomRows
from ldgan.inference.trained_model import TrainedModel

if TYPE_CHECKING:
    from typing_extensions import Unpack

DEFAULT_RESAMPLES = 5  # how often commands take each step of an inpainting, unless told otherwise
SAMPLE_STREAM = "sample"  # of `TrainedModel.sample`: an edit that begins at pure noise is the sample of its seed

Along = Literal["z", "x_T", "both"]
"""What changes from one end of an interpolation to the other."""


class How(TypedDict, total=False):
    """What is shown, and how it is sampled, as of `TrainedModel.sample`: a label and a text for each row."""

    labels: Sequence[int] | None
    sampler: SamplerConfig | None
    text: Text | None


class Wanted(NamedTuple):
    """The same with all that was left out."""

    labels: Tensor | None
    sampler: SamplerConfig
    text: Text | None


def _read(how: How, model: TrainedModel, seeds: Sequence[int]) -> Wanted:
    return Wanted(model.labels(seeds, how.get("labels")), how.get("sampler") or SamplerConfig(), how.get("text"))


@torch.no_grad()
def encode_images(model: TrainedModel, images: Tensor) -> Tensor:
    """x_0 of images, fp32 (B, C, s, s) on the model's device: means of the autoencoder's posterior, or the pixels.

    Raises:
        UserError: the images are not of the model's resolution.
    """
    _check_size(model, images)
    pixels = from_uint8(images).to(model.device)
    return pixels if model.autoencoder is None else model.autoencoder.encode(pixels).mean


def step_of_strength(strength: float, num_steps: int) -> int:
    """The step t = ceil(``strength`` * T) of ``num_steps`` = T at which an edit of this strength begins.

    Raises:
        UserError: ``strength`` is not above 0 and at most 1.
    """
    if not 0 < strength <= 1:
        raise UserError(
            f"a strength of {strength:g}; choose more than 0, where nothing would change, and at most 1,"
            " where nothing of the image is left"
        )
    return max(1, math.ceil(strength * num_steps - 1e-9))  # 0.7 * 10 is a little more than 7


def edit(
    model: TrainedModel,
    images: Tensor,
    seeds: Sequence[int],
    *,
    step: int,
    **how: Unpack[How],
) -> Tensor:
    """Noise images to step t, then denoise them: uint8 (B, 3, H, W).

    SDEdit (Meng et al., arXiv 2108.01073), which makes pictures of stroke paintings, by few steps as in section 5 of
    Xiao et al. (arXiv 2112.07804). A small ``step`` keeps more of the image, one near T brings it closer to the data.
    It counts the steps that are sampled: with ``sampler.num_steps`` = 50, 1..50.

    Raises:
        UserError: ``step`` is not among the sampler's, or the images are not of the model's resolution.
    """
    noise, (labels, sampler, text) = RandomRows(seeds, SAMPLE_STREAM, model.device).normal, _read(how, model, seeds)
    diffusion = model.process(noise, labels, sampler, text).diffusion
    if not 1 <= step <= diffusion.num_steps:
        raise UserError(f"step {step}: the model is sampled in {diffusion.num_steps}; choose 1 to that many")
    x_0 = encode_images(model, images)
    t = torch.full((len(x_0),), step, device=x_0.device)
    start = Start(step, diffusion.diffuse(x_0, t, noise(model.data_shape)))
    return model.decode(model.run(noise, noise, labels, sampler, text=text, start=start))


def inpaint(
    model: TrainedModel,
    images: Tensor,
    masks: Tensor,
    seeds: Sequence[int],
    *,
    num_resamples: int,
    callback: Callback | None = None,
    **how: Unpack[How],
) -> Tensor:
    """Make what ``masks``, bool (B, 1, H, W), mark anew, fitting the rest, which comes back pixel by pixel.

    RePaint, see `repaint`, in T * ``num_resamples`` evaluations. What lies under the mask has no influence.

    Raises:
        UserError: a size is not the model's, or ``num_resamples`` is below 1.
    """
    noise = RandomRows(seeds, SAMPLE_STREAM, model.device).normal
    return _fill(model, images, masks, noise, num_resamples, _read(how, model, seeds), callback)


def _fill(
    model: TrainedModel,
    images: Tensor,
    masks: Tensor,
    noise: Noise,
    num_resamples: int,
    wanted: Wanted,
    callback: Callback | None = None,
) -> Tensor:
    """`inpaint`, from a source of noise."""
    if num_resamples < 1:
        raise UserError(f"{num_resamples} resamples; choose 1, which is none, or more")
    _check_masks(images, masks)
    known = encode_images(model, grown(images, ~masks))
    labels, sampler, text = wanted
    process = model.process(noise, labels, sampler, text)
    mask = latent_mask(masks, model.resolution // model.data_shape[1]).to(known.device)
    denoiser = repaint(process.steps(sampler), process.diffusion, known, mask, noise, num_resamples)
    x_0 = ancestral(denoiser, process.diffusion, noise, model.data_shape, callback=callback)
    return torch.where(masks, model.decode(x_0), images)


def grown(images: Tensor, known: Tensor) -> Tensor:
    """Images, uint8 (B, 3, H, W), whose ``known`` pixels, bool (B, 1, H, W), have grown over all others.

    Known latents see some of what lies beside them. Measured on StackedMNIST with half of each image masked, the step
    in brightness across the seam is 25 grey levels then, as in real images, and 51 where the rest is plain black.
    """
    pixels = torch.where(known, images, 127).float()  # grey, for an image of which nothing is known
    for _ in range(max(images.shape[-2:])):
        if bool(known.all()):
            break
        weights = F.avg_pool2d(known.float(), 3, stride=1, padding=1)
        means = F.avg_pool2d(pixels * known, 3, stride=1, padding=1) / weights.clamp(min=1e-6)
        reached = weights > 0
        pixels, known = torch.where(reached & ~known, means, pixels), reached
    return pixels.round().to(torch.uint8)


def latent_mask(masks: Tensor, factor: int) -> Tensor:
    """Which latent pixels are made anew, bool (B, 1, H / factor, W / factor): those with any pixel of ``masks``.

    Not those beside them as well, though the encoder saw the mask from there: measured as in `grown`, the decoded image
    then differs twice as much from the known pixels next to the mask.
    """
    return F.max_pool2d(masks.float(), factor) > 0


def repaint(
    steps: Denoiser, diffusion: Diffusion, known: Tensor, mask: Tensor, noise: Noise, num_resamples: int
) -> Denoiser:
    """Steps of a sampler, as of `Process.steps`, that know x_0 = ``known`` where ``mask`` is not.

    Lugmayr et al. (arXiv 2201.09865), Algorithm 1: the known part of x_{t-1} is drawn from q(x_{t-1} | x_0), and each
    step is taken ``num_resamples`` times, with a step of the forward process back between them, so that what is new
    and what is known come to fit each other. Unlike there, t = 1 is taken as often: with few steps it is a large one.

    The network sees the known part through the noise of t = 1 or more. Of two correlated Gaussian variables, the
    unknown one's mean comes out abar_1 times the true conditional mean, however often steps are taken; abar_1 is 0.52
    for the "vp" schedule with T = 4, 0.84 with T = 8, and 0.98 for "geometric" with T = 8.
    """

    def pasted(x_t: Tensor, t: Tensor) -> Denoised:
        denoised = steps(x_t, t)
        known_mean = at(diffusion.alphas_bar.sqrt(), t - 1, known) * known
        known_std = at((1.0 - diffusion.alphas_bar).sqrt(), t - 1, known)
        return Denoised(
            torch.where(mask, denoised.x_0, known),
            torch.where(mask, denoised.mean, known_mean),
            torch.where(mask, denoised.std, known_std),
        )

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        shape = x_t.shape[1:]
        for _ in range(num_resamples - 1):
            x_previous = pasted(x_t, t).sample(noise(shape))
            x_t = diffusion.forward_step(x_previous, t, noise(shape))
        return pasted(x_t, t)

    return denoise


def outpaint(
    model: TrainedModel,
    images: Tensor,
    seeds: Sequence[int],
    *,
    left: int = 0,
    right: int = 0,
    top: int = 0,
    bottom: int = 0,
    num_resamples: int,
    **how: Unpack[How],
) -> Tensor:
    """Add so many pixels at each side: uint8 (B, 3, top + H + bottom, left + W + right), the given ones unchanged.

    Windows of the model's size slide outward, each an inpainting of which at least half is known, with noise of its
    own from the seed and the window's number. Images may be larger than the model's.

    Raises:
        UserError: no pixels are added, or fewer than none; the images are smaller than the model's.
    """
    height, width = images.shape[-2:]
    side, margins = model.resolution, (left, right, top, bottom)
    if min(margins) < 0 or max(margins) == 0:
        raise UserError(
            f"{left}, {right}, {top} and {bottom} pixels at left, right, top and bottom; add some, and none below 0"
        )
    if min(height, width) < side:
        raise UserError(f"images of {width} x {height} pixels; the model needs {side} x {side} or more to go on from")
    canvas = F.pad(images, margins)
    unknown = F.pad(torch.zeros(len(images), 1, height, width, dtype=torch.bool), margins, value=True)
    wanted = _read(how, model, seeds)
    columns, rows = (left, left + width), (top, top + height)
    for number, (y, x) in enumerate(windows(columns, rows, canvas.shape[-1], canvas.shape[-2], side)):
        window = (..., slice(y, y + side), slice(x, x + side))
        noise = RandomRows(seeds, f"window {number}", model.device).normal
        canvas[window] = _fill(model, canvas[window], unknown[window], noise, num_resamples, wanted)
        unknown[window] = False
    return canvas


def windows(
    columns: tuple[int, int], rows: tuple[int, int], width: int, height: int, side: int
) -> Iterator[tuple[int, int]]:
    """Yield top and left of the windows that fill a canvas around the known rectangle of ``columns`` and ``rows``.

    First to the right and the left, then down and up over the whole width. Each brings at most ``side`` // 2 new
    columns or rows, and what it shares with windows before it is known by then.
    """
    for x in _outward(*columns, width, side):
        yield from ((y, x) for y in _along(*rows, side))
    for y in _outward(*rows, height, side):
        yield from ((y, x) for x in _along(0, width, side))


def _outward(first: int, end: int, length: int, side: int) -> Iterator[int]:
    """Starts of windows that widen the known part ``first``..``end`` of an axis to all of it."""
    while end < length:
        end = min(end + side // 2, length)
        yield end - side
    while first > 0:
        first = max(first - side // 2, 0)
        yield first


def _along(first: int, end: int, side: int) -> list[int]:
    """Starts of windows that cover ``first``..``end`` of an axis, neighbours sharing half or more."""
    return [*range(first, end - side, side // 2), end - side]


def interpolate(
    model: TrainedModel,
    seed_a: int,
    seed_b: int,
    num_frames: int,
    *,
    along: Along,
    **how: Unpack[How],
) -> Tensor:
    """Images on the way from one seed's sample to another's, uint8 (num_frames, 3, H, W), by `slerp` of their noise.

    ``along`` "z" changes z alone: x_T and the noise of every step stay those of ``seed_a``. "x_T" changes these, which
    are all of x's path that is random, and leaves z as it is. With "both" the ends are the samples of the two seeds.
    Without ``labels``, one for each frame, all have the one that ``seed_a`` draws.

    Raises:
        UserError: fewer than 2 frames, or a way along z for a model that has none.
    """
    if num_frames < 2:
        raise UserError(f"{num_frames} frames; a way from one sample to another has 2 or more")
    if along == "z":
        _check_z(model)
    a, b = (RandomRows([seed] * num_frames, SAMPLE_STREAM, model.device).normal for seed in (seed_a, seed_b))
    fractions = torch.linspace(0, 1, num_frames, dtype=torch.float64)
    moving, staying = partial(slerp, fractions=fractions), partial(slerp, fractions=torch.zeros_like(fractions))
    z_noise = together(a, b, staying if along == "x_T" else moving)
    x_noise = together(a, b, staying if along == "z" else moving)
    labels, sampler, text = _read(how, model, [seed_a] * num_frames)
    return model.decode(model.run(z_noise, x_noise, labels, sampler, text=text))


def mix_styles(
    model: TrainedModel,
    seeds: Sequence[int],
    style_seeds: Sequence[int],
    *,
    switch_step: int,
    **how: Unpack[How],
) -> Tensor:
    """Samples of ``seeds`` with the z of ``style_seeds`` at the steps t <= ``switch_step``: uint8 (B, 3, H, W).

    Style mixing (Karras et al., arXiv 1812.04948, section 3.1) over steps in place of layers: early steps, near T,
    decide on what is there, late ones on how it looks. 0 gives the samples of ``seeds``; T takes every z from
    ``style_seeds``, and leaves x_T and the noise of the steps. Labels are drawn from ``seeds``.

    Raises:
        UserError: the model has no z, or no such step.
    """
    _check_z(model)
    labels, sampler, text = _read(how, model, seeds)
    num_steps = sampler.num_steps or model.diffusion.num_steps
    if not 0 <= switch_step <= num_steps:
        raise UserError(f"switch_step {switch_step}: the model is sampled in {num_steps} steps; choose 0 to that many")
    own, style = (RandomRows(each, SAMPLE_STREAM, model.device).normal for each in (seeds, style_seeds))
    steps = itertools.count(num_steps, -1)  # z is drawn once a step
    z_noise = together(own, style, lambda a, b: b if next(steps) <= switch_step else a)
    x_noise = together(own, style, lambda a, b: a)
    return model.decode(model.run(z_noise, x_noise, labels, sampler, text=text))


def together(first: Noise, second: Noise, combine: Callable[[Tensor, Tensor], Tensor]) -> Noise:
    """A source of noise made of two, both drawn at every call: so either goes on as in the sample of its own seed."""
    return lambda shape: combine(first(shape), second(shape))


def slerp(a: Tensor, b: Tensor, fractions: Tensor) -> Tensor:
    """Spherical linear interpolation from ``a`` (at 0) to ``b`` (at 1), both (B, ...), row by row.

    Shoemake (SIGGRAPH 1985), on vectors of any length as White (arXiv 1609.04468): on the straight line between two
    samples of N(0, I), noise would be too small in the middle. Parallel vectors have that line alone. ``fractions``,
    float64 (B,), are in [0, 1]; at the ends the result is ``a`` or ``b`` to the bit.
    """
    angle = F.cosine_similarity(a.flatten(1).double(), b.flatten(1).double()).clamp(-1, 1).acos()
    fractions = fractions.to(angle.device)
    parallel = angle.sin() < 1e-6

    def weight(fraction: Tensor) -> Tensor:
        weights = torch.where(parallel, fraction, (fraction * angle).sin() / angle.sin())
        return weights.to(a.dtype).view(-1, *[1] * (a.ndim - 1))

    return weight(1 - fractions) * a + weight(fractions) * b


def _check_size(model: TrainedModel, images: Tensor) -> None:
    height, width = images.shape[-2:]
    if (height, width) != (model.resolution, model.resolution):
        side = model.resolution
        raise UserError(f"images of {width} x {height} pixels; the model works on {side} x {side}: resize them")


def _check_masks(images: Tensor, masks: Tensor) -> None:
    (height, width), (mask_height, mask_width) = images.shape[-2:], masks.shape[-2:]
    if (height, width) != (mask_height, mask_width):
        raise UserError(
            f"a mask of {mask_width} x {mask_height} pixels for images of {width} x {height}; make them the same size"
        )


def _check_z(model: TrainedModel) -> None:
    if model.network.z_dim == 0:
        raise UserError("the model has no z; its samples differ by x_T alone, along which `interpolate` can go")
