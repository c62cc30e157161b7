"""Does every metric react as theory says? Real images are damaged in known ways, and compared with real images.

    unzip cifar10.zip -d CIFAR10
    python tests/benchmarks/reactions.py --data CIFAR10 --features squeezenet --feature-weights FILE --num-images 10000
    python tests/benchmarks/reactions.py --data CIFAR10 --features inception --num-images 10000 --out reactions

The first --num-images training images are the reference; copies are damaged of others, so that nothing is compared
with itself, but for the last row, a model that has learnt its training images by heart. What theory says:

- test images, and other training images, are the floor: what finite numbers of images cost;
- blur, noise and coarse JPEG raise distances and lower recall, as undamaged images lie outside the damaged ones. Their
  precision may rise: blur makes images alike, and what is near the middle of the features is in many real balls. JPEG
  of quality 75 is hardly a damage to images that were stored in it, as CIFAR-10's often are;
- half of the classes alone leave precision where it was, and take recall and coverage down: to half, if the classes
  lie apart in the features, and less far where they overlap;
- copies of the reference are perfect by all of these, and nearer to it than any held-out image: that column is the
  probability that an image is nearer to the reference than a test image is, 0.5 for new images, if they are as sharp.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from data_prep.sources import ImageFolder
from ldgan.engine import cli
from ldgan.engine.files import new_folder
from ldgan.engine.images import encode_lossless, enlarge, image_grid
from ldgan.engine.seeding import generator
from ldgan.engine.session import describe_machine, make_accelerator
from ldgan.engine.shares import batches
from ldgan.evaluation.collecting import QUALITY_METRICS, FeatureMeter, FeatureSet, Metric, collect, measure_quality
from ldgan.evaluation.image_sets import Batch, ImageSet, open_images
from ldgan.metrics.features import FeatureNetwork, add_feature_flags, chosen_features, feature_network
from ldgan.metrics.neighbours import copying_from_distances, nearest

TEST, OTHERS, SAME = "test images", "other training images", "the same training images"
BLURRED, NOISED, COLLAPSED = "blurred, sigma 1 px", "noised, std 10 of 255", "some classes only"
NUM_SHOWN = 12  # images of each row in the picture
ENLARGED = 3  # times

Change = Callable[[Tensor, int], Tensor]


class Copies(ImageSet):
    """Chosen images of a set, each changed by a function of its pixels, uint8 (3, H, W), and its number here."""

    def __init__(self, images: ImageSet, chosen: Sequence[int], change: Change | None = None) -> None:
        self.name, self.size = images.name, images.size
        self._images, self._chosen, self._change = images, chosen, change

    def __len__(self) -> int:
        return len(self._chosen)

    def batches(self, numbers: range, batch_size: int) -> Iterator[Batch]:
        for wanted in batches(numbers, batch_size):
            yield Batch(list(wanted), torch.stack([self.read(number) for number in wanted]))

    def read(self, number: int) -> Tensor:
        image = self._images.read(self._chosen[number])
        return image if self._change is None else self._change(image, number)

    def describe(self) -> dict[str, Any]:
        return self._images.describe() | {"num_images": len(self)}

    def fingerprint(self) -> str:
        pixels = (self.read(number).numpy().tobytes() for number in range(len(self)))
        return hashlib.sha256(b"".join(hashlib.sha256(each).digest() for each in pixels)).hexdigest()


def blurred(image: Tensor, number: int) -> Tensor:
    """Gaussian blur, sigma 1 pixel, cut off at 4."""
    return gaussian_blur(image, [9, 9], [1.0, 1.0])


def noised(image: Tensor, number: int) -> Tensor:
    """White noise, standard deviation 10 of 255 levels, another for each image."""
    noise = torch.randn(image.shape, generator=generator("cpu", "noise", number))
    return (image + 10 * noise).round().clamp(0, 255).to(torch.uint8)


def jpeg(quality: int) -> Change:
    """Writing as a JPEG file, colour at half the resolution, and reading it again."""

    def change(image: Tensor, number: int) -> Tensor:
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
        return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)

    return change


class Reaction(NamedTuple):
    """A row of the table."""

    name: str
    metrics: list[Metric]
    nearer_than_heldout: float


def main() -> None:
    """Damage, measure, print a table."""
    flags = parse_flags()
    if flags.out is not None and flags.out.exists():
        raise cli.UserError(f"{flags.out}: exists already; choose another --out")
    started = time.monotonic()
    accelerator = make_accelerator("fp32", flags.threads)
    name, weights = chosen_features(flags, "squeezenet")
    network = feature_network(name or "", weights, accelerator.device)
    train, test = (open_images(flags.data / part) for part in ("train", "test"))
    pictures = ImageFolder(flags.data / "train", seed=0)  # in the order of `open_images`
    kept = kept_labels(pictures.class_names or [], flags.classes)
    rows = damaged_copies(train, [sample.label for sample in pictures], kept, test, flags.num_images)
    features = {
        name: features_of(accelerator, network, images, flags.batch_size, name) for name, images in rows.items()
    }
    metrics = [metric for metric in QUALITY_METRICS if metric != "is" or network.num_classes]
    reactions = measure(metrics, network, features)
    conditions = describe_machine(accelerator) | {
        "num_images": flags.num_images,
        "features": network.name,
        "feature_network": network.fingerprint,
        "data": str(flags.data),
        "classes": [(pictures.class_names or [])[label] for label in kept],
        "minutes": (time.monotonic() - started) / 60,
    }
    text = f"{markdown(reactions)}\n\n{sentence(conditions)}\n"
    print(text)
    if flags.out is not None:
        write(flags.out, text, reactions, conditions, rows)


def kept_labels(class_names: list[str], wanted: str | None) -> list[int]:
    """Labels of the classes that ``--classes`` names, without it of the first half."""
    if wanted is None:
        return list(range(len(class_names) // 2))
    if unknown := set(wanted.split(",")).difference(class_names):
        raise cli.UserError(f"--classes: no class {min(unknown)!r}; there are {', '.join(class_names)}")
    return [class_names.index(name) for name in wanted.split(",")]


def damaged_copies(
    train: ImageSet, labels: Sequence[int | None], kept: Sequence[int], test: ImageSet, num_images: int
) -> dict[str, ImageSet]:
    """The rows of the table by name, ``num_images`` images each.

    ``labels`` are those of the training images, ``kept`` the ones that are left in the copy without the others.

    Raises:
        UserError: there are too few images.
    """
    others = range(num_images, 2 * num_images)
    collapsed = [number for number in range(num_images, len(train)) if labels[number] in kept][:num_images]
    if min(len(test), len(train) - num_images, len(collapsed)) < num_images:
        raise cli.UserError(
            f"--num-images {num_images}: so many test images, twice as many training images, and so many of"
            f" {len(kept)} classes beside the first ones must be there; take fewer"
        )
    return {
        TEST: Copies(test, range(num_images)),
        OTHERS: Copies(train, others),
        BLURRED: Copies(train, others, blurred),
        NOISED: Copies(train, others, noised),
        "JPEG, quality 75": Copies(train, others, jpeg(75)),
        "JPEG, quality 30": Copies(train, others, jpeg(30)),
        COLLAPSED: Copies(train, collapsed),
        SAME: Copies(train, range(num_images)),
    }


def features_of(
    accelerator: Accelerator, network: FeatureNetwork, images: ImageSet, batch_size: int, label: str
) -> FeatureSet:
    """Features of all images of a set."""
    meter = FeatureMeter(network)
    collect(accelerator, images, len(images), [meter], batch_size=batch_size, label=label)
    return meter.finish(accelerator)


def measure(metrics: Collection[str], network: FeatureNetwork, features: Mapping[str, FeatureSet]) -> list[Reaction]:
    """Every row beside the reference, which is the row `SAME`; held-out images are those of the row `TEST`."""
    reference = features[SAME]
    distances = {name: nearest(each.features, reference.features).distances[:, 0] for name, each in features.items()}
    reactions = []
    for name, samples in features.items():
        results = measure_quality(metrics, samples, reference, network, show_progress=True)
        copies = copying_from_distances(distances[name], distances[TEST])
        reactions.append(Reaction(name, results, copies.nearer_than_heldout))
    return reactions


def markdown(reactions: Sequence[Reaction]) -> str:
    """The table."""
    columns = [
        "compared with training images",
        *(metric.name for metric in reactions[0].metrics),
        "nearer than held-out",
    ]
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)]]
    for reaction in reactions:
        values = [
            f"{metric.value:.4g}" + (f" ± {metric.std:.2g}" if metric.std is not None else "")
            for metric in reaction.metrics
        ]
        lines.append([reaction.name, *values, f"{reaction.nearer_than_heldout:.3f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def sentence(conditions: Mapping[str, Any]) -> str:
    """On what and how the table was measured."""
    classes, network = ", ".join(conditions["classes"]), conditions["feature_network"][:12]
    return (
        f"N = {conditions['num_images']:,} images of each set, the first ones in the order of seed 0; some classes are"
        f" {classes}; features of {conditions['features']} ({network}); {conditions['device']} with"
        f" {conditions['num_threads']} threads ({conditions['machine']}), torch {conditions['torch']},"
        f" {conditions['minutes']:.1f} minutes."
    )


def write(
    out: Path,
    text: str,
    reactions: Sequence[Reaction],
    conditions: Mapping[str, Any],
    rows: Mapping[str, ImageSet],
) -> None:
    """Write table.md, results.json and images.png, a row of images for each row of the table."""
    results = {
        "conditions": conditions,
        "rows": [
            {
                "name": reaction.name,
                "metrics": [metric._asdict() for metric in reaction.metrics],
                "nearer_than_heldout": reaction.nearer_than_heldout,
            }
            for reaction in reactions
        ],
    }
    shown = torch.stack([images.read(number) for images in rows.values() for number in range(NUM_SHOWN)])
    with new_folder(out) as folder:
        (folder / "table.md").write_text(text, encoding="utf-8")
        (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        picture = encode_lossless(image_grid(enlarge(shown, ENLARGED), columns=NUM_SHOWN), "png")
        (folder / "images.png").write_bytes(picture)
    print(f"table.md, results.json and images.png in {out}")


def parse_flags() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="folder with train/ and test/ of class folders"
    )
    add_feature_flags(parser, "squeezenet")
    parser.add_argument(
        "--num-images", type=cli.positive, default=10_000, metavar="N", help="images of each row (default: 10000)"
    )
    parser.add_argument(
        "--batch-size", type=cli.positive, default=100, metavar="N", help="images per forward pass (default: 100)"
    )
    parser.add_argument(
        "--classes",
        metavar="LIST",
        help="class folders of the collapsed copy, as in bird,cat (default: the first half)",
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: all cores)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="new folder for the table, the numbers and a picture")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
