"""Edit pictures with a trained model, and go from sample to sample: PNG files, and a grid of all."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # why: see ldgan/engine/cli.py

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from data_prep.sources import IMAGE_SUFFIXES
from ldgan.engine import cli
from ldgan.engine.files import new_folder, writing_to
from ldgan.engine.images import enlarge, image_grid, save_png
from ldgan.engine.progress import progress_bar
from ldgan.engine.session import add_precision_flag, make_accelerator
from ldgan.engine.shares import batches
from ldgan.inference import editing
from ldgan.inference.jobs import Job, add_model_flags, add_sampler_flags, job_of
from ldgan.inference.pictures import MASKED, open_masks, open_pictures, to_images, to_masks

GRID_FILE, MAX_GRID_ROWS = "grid.png", 16
ALPHA = "alpha"  # in place of a mask: the image's own transparency
ALPHA_FORMATS = ("AVIF", "GIF", "PNG", "TIFF", "WEBP")
DEFAULT_STRENGTH = 0.5

EXAMPLES = """
examples:
  python ldgan/edit.py stroke --checkpoint runs/gan --image painting.png --step 2 --num-variants 4 --out out/stroke
  python ldgan/edit.py img2img --checkpoint runs/gan --image photos/ --strength 0.3 --out out/photos
  python ldgan/edit.py inpaint --checkpoint runs/gan --image photo.png --mask mask.png --seed 0 --num-variants 4 \\
      --out out/hole
  python ldgan/edit.py inpaint --checkpoint runs/gan --image cutout.png --mask alpha --out out/cutout
  python ldgan/edit.py outpaint --checkpoint runs/gan --image photo.png --left 64 --right 64 --out out/wide
  python ldgan/edit.py interpolate --checkpoint runs/gan --seed 3 --to 8 --along z --num-frames 16 --out out/way
  python ldgan/edit.py mix --checkpoint runs/gan --num-images 4 --num-styles 4 --switch-step 2 --out out/mixed
  python ldgan/edit.py stroke --checkpoint runs/ddpm --sampler ddim --steps 50 --step 25 --image painting.png \\
      --out out/ddpm

Variant k of every image is made from seed --seed + k and has label or prompt k of those given, whatever the batch
size.
"""


class Input(NamedTuple):
    """A picture to edit, of the model's resolution."""

    name: str
    image: Tensor  # uint8 (3, H, W)
    mask: Tensor  # bool (1, H, W), what is made anew; of no meaning where there is no mask


class Result(NamedTuple):
    """What a command has made, all uint8 (3, H, W)."""

    images: dict[str, Tensor]  # by name, without a suffix
    grid: list[Tensor]  # row by row
    columns: int


def main() -> None:
    """Read, edit, write."""
    flags = parse_flags()
    if flags.out.exists():
        raise cli.UserError(f"{flags.out}: exists already; choose another --out")
    accelerator = make_accelerator(flags.precision)
    if accelerator.num_processes > 1:
        raise cli.UserError("pictures are edited by one process; launch it with --num_processes 1")
    job = job_of(flags, accelerator.device)
    started = time.monotonic()
    with accelerator.autocast():
        result = flags.make(job, flags)
    seconds = time.monotonic() - started
    with writing_to(flags.out), new_folder(flags.out) as folder:
        for name, image in result.images.items():
            save_png(folder / f"{name}.png", image)
        save_png(folder / GRID_FILE, image_grid(enlarge(torch.stack(result.grid)), columns=result.columns))
    print(f"{len(result.images):,} images in {flags.out} ({seconds / len(result.images):.3g} s an image)")


def stroke(job: Job, flags: argparse.Namespace) -> Result:
    """Noise to --step, then denoise."""
    step = flags.step or editing.step_of_strength(DEFAULT_STRENGTH, job.num_steps)
    return noised(job, flags, step)


def img2img(job: Job, flags: argparse.Namespace) -> Result:
    """Noise as far as --strength says, then denoise."""
    return noised(job, flags, editing.step_of_strength(flags.strength, job.num_steps))


def noised(job: Job, flags: argparse.Namespace, step: int) -> Result:
    """Both: a row for each image, the image and its variants."""
    inputs = read_inputs(flags.image, job.model.resolution)

    def work(chosen: Sequence[Input], seeds: list[int], conditions: dict[str, Any]) -> Tensor:
        images = torch.stack([each.image for each in chosen])
        return editing.edit(job.model, images, seeds, step=step, **conditions)

    return variants(job, inputs, work, lambda each: [each.image])


def inpaint(job: Job, flags: argparse.Namespace) -> Result:
    """Make what the mask marks anew: rows of image, mask, variants."""
    inputs = read_inputs(flags.image, job.model.resolution, flags.mask)

    def work(chosen: Sequence[Input], seeds: list[int], conditions: dict[str, Any]) -> Tensor:
        images, masks = (torch.stack(each) for each in zip(*((each.image, each.mask) for each in chosen)))
        return editing.inpaint(job.model, images, masks, seeds, num_resamples=flags.num_resamples, **conditions)

    return variants(job, inputs, work, lambda each: [each.image, 255 * each.mask.to(torch.uint8).expand(3, -1, -1)])


def outpaint(job: Job, flags: argparse.Namespace) -> Result:
    """Add margins: rows of the image in a black frame, variants."""
    inputs = read_inputs(flags.image, job.model.resolution)
    margins = {side: getattr(flags, side) for side in ("left", "right", "top", "bottom")}

    def work(chosen: Sequence[Input], seeds: list[int], conditions: dict[str, Any]) -> Tensor:
        images = torch.stack([each.image for each in chosen])
        return editing.outpaint(job.model, images, seeds, num_resamples=flags.num_resamples, **margins, **conditions)

    return variants(job, inputs, work, lambda each: [torch.nn.functional.pad(each.image, tuple(margins.values()))])


def interpolate(job: Job, flags: argparse.Namespace) -> Result:
    """From the sample of --seed to that of --to: a row of frames."""
    frames = editing.interpolate(
        job.model,
        job.first_seed,
        flags.to,
        job.num_images,
        along=flags.along,
        **job.conditions_of([0] * job.num_images),
    )
    return Result({f"frame_{number:04d}": frame for number, frame in enumerate(frames)}, list(frames), len(frames))


def mix(job: Job, flags: argparse.Namespace) -> Result:
    """Mix every image with every style: a table with the unmixed images at its left and the styles on top."""
    model, styles, numbers = (
        job.model,
        range(flags.style_seed, flags.style_seed + flags.num_styles),
        range(job.num_images),
    )
    pairs = [(number, style) for number in numbers for style in styles]
    conditions = job.conditions_of([number for number, _ in pairs])
    seeds = [job.first_seed + number for number, _ in pairs]
    mixed = editing.mix_styles(model, seeds, [style for _, style in pairs], switch_step=flags.switch_step, **conditions)
    own = model.decode(job.sample(numbers))
    heads = model.decode(model.sample(styles, **job.conditions_of([0] * len(styles))))
    rows = [row for number in numbers for row in (own[number], *mixed[number * len(styles) :][: len(styles)])]
    names = [f"seed_{seed}_style_{style}" for seed, (_, style) in zip(seeds, pairs)]
    return Result(dict(zip(names, mixed)), [torch.zeros_like(own[0]), *heads, *rows], 1 + len(styles))


def variants(
    job: Job,
    inputs: Sequence[Input],
    work: Callable[[Sequence[Input], list[int], dict[str, Any]], Tensor],
    beside: Callable[[Input], list[Tensor]],
) -> Result:
    """``job.num_images`` variants of every input, which ``work`` makes of inputs, seeds and conditions.

    The grid has a row for each of the first inputs: what ``beside`` makes of it, then its variants.
    """
    made: list[Tensor] = []
    with progress_bar("editing", len(inputs) * job.num_images, "images") as bar:
        for pairs in batches(range(len(inputs) * job.num_images), job.batch_size):
            numbers = [pair % job.num_images for pair in pairs]
            seeds = [job.first_seed + number for number in numbers]
            chosen = [inputs[pair // job.num_images] for pair in pairs]
            made.extend(work(chosen, seeds, job.conditions_of(numbers)))
            bar.advance(len(pairs))
    images: dict[str, Tensor] = {}
    grid: list[Tensor] = []
    for row, each in enumerate(inputs):
        its_own = made[row * job.num_images :][: job.num_images]
        images |= {f"{each.name}_seed_{job.first_seed + number}": image for number, image in enumerate(its_own)}
        grid += [*beside(each), *its_own] if row < MAX_GRID_ROWS else []
    return Result(images, grid, len(beside(inputs[0])) + job.num_images)


def read_inputs(path: Path, resolution: int, mask: str | None = None) -> list[Input]:
    """The picture at ``path``, or those in the folder, scaled and cropped to squares; a mask is treated alike.

    Raises:
        UserError: there is none, it cannot be read, two have one name, or the mask does not fit.
    """
    paths = [path] if not path.is_dir() else sorted(each for each in path.iterdir() if _is_image(each))
    if not paths:
        raise cli.UserError(f"{path}: holds no images; known suffixes are {' '.join(sorted(IMAGE_SUFFIXES))}")
    inputs = {each.stem: read_input(each, resolution, mask) for each in paths}
    if len(inputs) < len(paths):
        raise cli.UserError(f"{path}: two images have the same name but for the suffix; rename one of them")
    return list(inputs.values())


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def read_input(path: Path, resolution: int, mask: str | None) -> Input:
    """One picture; says so if it is not of the model's size."""
    (image,) = open_pictures(path)
    width, height = image.size
    marked = read_mask(mask, path, image) if mask is not None else Image.new("L", image.size)
    if image.size != (resolution, resolution):
        print(f"{path}: {width} x {height} pixels, scaled and cropped to {resolution} x {resolution}")
    pixels, where = to_images([image], resolution)[0], to_masks([marked], resolution)[0]
    if mask is not None and not bool(where.any()):
        raise cli.UserError(f"{mask}: marks nothing of {path}; paint white what is to be made anew", parameter="mask")
    return Input(path.stem, pixels, where)


def read_mask(mask: str, path: Path, image: Image.Image) -> Image.Image:
    """The mask of the picture at ``path``: grey, 255 where it is made anew and else 0."""
    if mask == ALPHA:
        return _transparent(path)
    try:
        return open_masks(mask, [image])[0]
    except cli.UserError as error:
        raise cli.UserError(f"{mask}: not for {path}: {error}", parameter="mask") from error


def _transparent(path: Path) -> Image.Image:
    """Where a picture, which has been read before, lets through more than it hides."""
    with suppress(UnidentifiedImageError), Image.open(path, formats=ALPHA_FORMATS) as opened:
        if opened.has_transparency_data:
            alpha = ImageOps.exif_transpose(opened).convert("RGBA").getchannel("A")
            return alpha.point(lambda level: 255 * (level < MASKED))
    raise cli.UserError(f"{ALPHA}: {path} has no transparency; give a mask as a file", parameter="mask")


def parse_flags() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for make, add_flags, summary in (
        (stroke, add_stroke_flags, "a picture from a painting in rough strokes"),
        (img2img, add_img2img_flags, "other versions of a picture"),
        (inpaint, add_inpaint_flags, "fill a hole; all other pixels stay as they are"),
        (outpaint, add_outpaint_flags, "go on beyond the edges"),
        (interpolate, add_interpolate_flags, "from one sample to another"),
        (mix, add_mix_flags, "samples with the z of others in the last steps"),
    ):
        command = commands.add_parser(make.__name__, help=summary, description=summary)
        command.set_defaults(make=make)
        add_flags(command.add_argument)
        add_shared_flags(command)
    return parser.parse_args()


Add = Callable[..., Any]


def add_shared_flags(parser: argparse.ArgumentParser) -> None:
    """Those of every command."""
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help=f"new folder for PNG files and {GRID_FILE}")
    add("--batch-size", type=cli.positive, default=64, metavar="N", help="images per forward pass (default: 64)")
    add_model_flags(parser)
    add_precision_flag(parser)
    add_sampler_flags(parser)


def add_stroke_flags(add: Add) -> None:
    """Those of ``stroke`` alone."""
    add_image_flags(add)
    add(
        "--step",
        type=cli.positive,
        metavar="N",
        help="step, of those that are sampled, to which noise is added: 1 keeps the most of the painting (default:"
        " half of the steps)",
    )


def add_img2img_flags(add: Add) -> None:
    """Those of ``img2img`` alone."""
    add_image_flags(add)
    add(
        "--strength",
        type=float,
        default=DEFAULT_STRENGTH,
        metavar="S",
        help="how far to go away from the picture: above 0, to 1, where nothing of it is left (default: 0.5)",
    )


def add_inpaint_flags(add: Add) -> None:
    """Those of ``inpaint`` alone."""
    add_image_flags(add)
    add(
        "--mask",
        required=True,
        metavar="FILE",
        help=f"picture of the image's size, white where it is made anew; or {ALPHA}: where the image is transparent",
    )
    add_resamples_flag(add)


def add_outpaint_flags(add: Add) -> None:
    """Those of ``outpaint`` alone."""
    add_image_flags(add)
    for side in ("left", "right", "top", "bottom"):
        add(f"--{side}", type=int, default=0, metavar="PIXELS", help="pixels to add there, 32, say (default: 0)")
    add_resamples_flag(add)


def add_interpolate_flags(add: Add) -> None:
    """Those of ``interpolate`` alone."""
    add("--seed", type=int, default=0, metavar="S", help="seed of the first sample (default: 0)")
    add("--to", type=int, required=True, metavar="S", help="seed of the last sample, 1, say")
    add(
        "--num-frames",
        dest="num_images",
        type=cli.positive,
        default=8,
        metavar="N",
        help="images, both ends included; the first of --labels and prompts holds for all (default: 8)",
    )
    add(
        "--along",
        choices=("z", "x_T", "both"),
        default="both",
        help="what changes: the generator's z; x_T and the noise of the steps; or both, from sample to sample"
        " (default: both)",
    )


def add_mix_flags(add: Add) -> None:
    """Those of ``mix`` alone."""
    add("--seed", type=int, default=0, metavar="S", help="seed of the first image (default: 0)")
    add("--num-images", type=cli.positive, default=4, metavar="N", help="images to mix styles into (default: 4)")
    add("--style-seed", type=int, default=1000, metavar="S", help="seed of the first style (default: 1000)")
    add("--num-styles", type=cli.positive, default=4, metavar="N", help="styles (default: 4)")
    add(
        "--switch-step",
        type=int,
        required=True,
        metavar="N",
        help="steps from this one down to 1 take the z of the style: 0, none, to the number of steps, all",
    )


def add_image_flags(add: Add) -> None:
    """Which pictures, and how many variants of each."""
    add(
        "--image",
        type=Path,
        required=True,
        metavar="FILE",
        help="a picture, or a folder of them; other sizes than the model's are scaled and cropped to its square",
    )
    add("--seed", type=int, default=0, metavar="S", help="seed of the first variant (default: 0)")
    add(
        "--num-variants",
        dest="num_images",
        type=cli.positive,
        default=1,
        metavar="N",
        help="variants of each image (default: 1)",
    )


def add_resamples_flag(add: Add) -> None:
    """``--num-resamples`` of an inpainting."""
    add(
        "--num-resamples",
        type=cli.positive,
        default=editing.DEFAULT_RESAMPLES,
        metavar="N",
        help="how often each step is taken, so that new and old come to fit: 1, fast, to 20 (default: 5)",
    )


command = cli.command(main)

if __name__ == "__main__":
    command()
