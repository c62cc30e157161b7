"""Toy data that show the idea of denoising diffusion GANs on a CPU, in minutes.

one-d: the true q(x_{t-1} | x_t) of a 1-D mixture, in closed form, turns multimodal as steps grow. Beside it, the
best that a Gaussian can do, as in DDPM, and what a generator with a random z learns against a discriminator.
grid25: 25 Gaussians on a grid. Modes covered and share of high-quality samples, for several T and without z.

Trainer, losses, process and sampler are those of images; only the two networks are small perceptrons.
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
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ldgan.diffusion.process import Diffusion
from ldgan.engine import cli
from ldgan.engine.files import new_folder, write_atomically
from ldgan.engine.philox import Random, key_of
from ldgan.inference.trained_model import TrainedModel
from ldgan.reports.mixtures import GaussianMixture, GridQuality, grid_quality, histogram_masses, total_variation
from ldgan.reports.toy_plots import DenoisingPanel, GridPanel, denoising_plot, grid_plot
from ldgan.training.points import Recipe, train

TINY_STEPS, LARGE_STEPS = 1000, (8, 4, 2, 1)  # T of DDPM, and of ldgan/train.py

# About mean 0 and variance 1, so that x_T ~ N(0, 1) fits.
THREE_MODES = GaussianMixture(
    weights=torch.tensor([0.3, 0.3, 0.4]),
    means=torch.tensor([[-1.3], [0.1], [1.1]]),
    stds=torch.full((3,), 0.12),
)

# The grid of Azadi et al., Discriminator Rejection Sampling (arXiv 1810.06758).
GRID_25 = GaussianMixture(
    weights=torch.full((25,), 1 / 25),
    means=torch.cartesian_prod(torch.arange(-2.0, 3.0), torch.arange(-2.0, 3.0)),
    stds=torch.full((25,), 0.05),
)

SHOWN_X_T, NUM_DRAWN = 0.2, 32  # the x_t of the plot, and how many are drawn from q(x_t)
EDGES = torch.linspace(-3.0, 3.0, 101, dtype=torch.float64)  # of the histograms of x_{t-1}
MAX_POINTS_SHOWN = 2000

EXAMPLES = """
examples:
  python ldgan/toy.py one-d --out runs/toy/one_d
  python ldgan/toy.py grid25 --out runs/toy/grid25
  python ldgan/toy.py grid25 --num-steps 20000 --out runs/toy/grid25_long

Each writes results.json and a plot, PNG, into the new folder, and prints the results as a table.
"""


# In one dimension the fits have to be broad besides sharp: a stronger penalty, and networks that start smooth.
ONE_D_RECIPE = Recipe(
    num_steps=1500,
    batch_size=256,
    z_dim=8,
    generator_octaves=0,
    discriminator_octaves=5,
    xavier=False,
    lr=1e-3,
    r1_gamma=0.1,
)
GRID_25_RECIPE = Recipe(num_steps=2500)


class Denoising(NamedTuple):
    """q(x_{t-1} | x_t) at one x_t and what stands for it, as shares of the bins between ``EDGES``."""

    x_t: float
    true: Tensor
    gaussian: Tensor
    redrawn: Tensor  # a histogram of true samples: as near as one of the generator's can be expected to come
    generator: Tensor | None

    def distances(self) -> dict[str, float]:
        """Total variation distances from the truth."""
        fits = {"gaussian": self.gaussian, "redrawn": self.redrawn, "generator": self.generator}
        return {name: total_variation(self.true, fit) for name, fit in fits.items() if fit is not None}


@dataclass(frozen=True)
class StepFit:
    """The denoising step to t - 1 of a process of T steps: at the x_t that is shown, and at x_t ~ q(x_t)."""

    name: str
    num_timesteps: int
    t: int
    alpha_bar: float
    alpha_bar_previous: float
    shown: Denoising
    others: list[Denoising]

    def results(self) -> dict[str, Any]:
        """What of it is a number, for a JSON file; the mean is the one over x_t ~ q(x_t)."""
        drawn = [denoising.distances() for denoising in self.others]
        return {
            "name": self.name,
            "num_timesteps": self.num_timesteps,
            "t": self.t,
            "alpha_bar": self.alpha_bar,
            "alpha_bar_previous": self.alpha_bar_previous,
            "x_t": self.shown.x_t,
            "total_variation": self.shown.distances(),
            "mean_total_variation": {name: sum(row[name] for row in drawn) / len(drawn) for name in drawn[0]},
        }


def one_d(recipe: Recipe, num_samples: int, folder: Path) -> Table:
    """Compare q(x_{t-1} | x_t) with a Gaussian and with trained generators, for steps of growing size."""
    # What a Gaussian is right for comes first, without a generator.
    fits = [fit_step(f"T = {TINY_STEPS:,}", recipe.diffusion(TINY_STEPS), None, num_samples, recipe.seed)]
    for name, num_timesteps, z_dim in (
        *((f"T = {num_timesteps}", num_timesteps, recipe.z_dim) for num_timesteps in LARGE_STEPS),
        ("T = 2, no z", 2, 0),
    ):
        model = train(THREE_MODES, num_timesteps, replace(recipe, z_dim=z_dim), name)
        fits.append(fit_step(name, model.diffusion, model, num_samples, recipe.seed))
    results = [fit.results() for fit in fits]
    write_results(folder, recipe, results)
    write_atomically(folder / "one_d.png", denoising_plot([panel(fit) for fit in fits]))
    return one_d_table(results)


@torch.no_grad()
def fit_step(name: str, diffusion: Diffusion, model: TrainedModel | None, num_samples: int, seed: int) -> StepFit:
    """Take the step that starts half way, where abar is the same for every even T; T = 1 has but one."""
    t = max(1, diffusion.num_steps // 2)
    random = Random(key_of(seed, "fit", diffusion.num_steps), "cpu")

    def denoising(x_t: float) -> Denoising:
        true = THREE_MODES.denoising(diffusion, torch.tensor([x_t]), t)
        generated = None if model is None else generated_steps(model, x_t, t, num_samples, random)
        return Denoising(
            x_t,
            true.bin_masses(EDGES),
            true.matched_gaussian().bin_masses(EDGES),
            histogram_masses(true.sample(num_samples, random)[:, 0], EDGES),
            None if generated is None else histogram_masses(generated, EDGES),
        )

    drawn = THREE_MODES.diffused(diffusion, t).sample(NUM_DRAWN, random)[:, 0]
    bars = diffusion.alphas_bar[t].item(), diffusion.alphas_bar[t - 1].item()
    others = [denoising(x_t) for x_t in drawn.tolist()]
    return StepFit(name, diffusion.num_steps, t, *bars, denoising(SHOWN_X_T), others)


def generated_steps(model: TrainedModel, x_t: float, t: int, num_samples: int, random: Random) -> Tensor:
    """x_{t-1}, (N,), that a model makes of one x_t with as many z."""

    def noise(shape: Sequence[int]) -> Tensor:
        return random.normal((num_samples, *shape))

    x = torch.full((num_samples, 1, 1, 1), x_t)
    denoised = model.denoiser(model.diffusion, noise)(x, torch.full((num_samples,), t))
    return denoised.sample(noise(model.data_shape)).flatten()


def panel(fit: StepFit) -> DenoisingPanel:
    """What the plot shows of a fit: densities."""
    widths = EDGES.diff()
    true, gaussian, generator = fit.shown.true, fit.shown.gaussian, fit.shown.generator
    title = f"{fit.name}: $x_{{{fit.t}}}$ to $x_{{{fit.t - 1}}}$"
    return DenoisingPanel(
        title,
        EDGES.numpy(),
        (true / widths).numpy(),
        (gaussian / widths).numpy(),
        None if generator is None else (generator / widths).numpy(),
    )


def one_d_table(results: Sequence[dict[str, Any]]) -> Table:
    """One line for each number of steps; the distances are the means over x_t."""
    table = Table(title="Total variation distance from q(x_{t-1} | x_t), mean over x_t", title_justify="left")
    for heading in ("", "t", "abar_t", "abar_(t-1)", "Gaussian", "generator", "floor"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in results:
        mean = row["mean_total_variation"]
        numbers = row["alpha_bar"], row["alpha_bar_previous"], mean["gaussian"], mean.get("generator"), mean["redrawn"]
        cells = ("" if number is None else f"{number:.3f}" for number in numbers)
        table.add_row(row["name"], str(row["t"]), *cells)
    return table


def grid25(recipe: Recipe, num_samples: int, folder: Path) -> Table:
    """Train for several T, and once without z; count modes and judge samples."""
    points = {"real data": GRID_25.sample(num_samples, Random(key_of(recipe.seed, "real"), "cpu"))}
    for name, num_timesteps, z_dim in (
        *((f"T = {num_timesteps}", num_timesteps, recipe.z_dim) for num_timesteps in reversed(LARGE_STEPS)),
        ("T = 4, no z", 4, 0),
    ):
        model = train(GRID_25, num_timesteps, replace(recipe, z_dim=z_dim), name)
        points[name] = model.sample(range(num_samples)).flatten(1)
    qualities = {name: grid_quality(samples, GRID_25) for name, samples in points.items()}
    write_results(folder, recipe, [{"name": name, **asdict(quality)} for name, quality in qualities.items()])
    panels = [
        GridPanel(name, describe(qualities[name]), samples[:MAX_POINTS_SHOWN].numpy())
        for name, samples in points.items()
    ]
    write_atomically(folder / "grid25.png", grid_plot(panels, GRID_25.means.numpy()))
    return grid25_table(qualities)


def describe(quality: GridQuality) -> str:
    """A quality in a line, for the plot."""
    return f"{quality.num_covered} modes, {quality.high_quality:.1%} within 3 std, KL {quality.kl:.3f}"


def grid25_table(qualities: Mapping[str, GridQuality]) -> Table:
    """One line for each model."""
    table = Table(title="25 Gaussians", title_justify="left")
    for heading in ("", "modes of 25", "within 3 std", "KL to uniform", "KL floor"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, quality in qualities.items():
        numbers = f"{quality.high_quality:.1%}", f"{quality.kl:.4f}", f"{quality.kl_floor:.4f}"
        table.add_row(name, str(quality.num_covered), *numbers)
    return table


def write_results(folder: Path, recipe: Recipe, results: Sequence[Mapping[str, Any]]) -> None:
    """Write settings and numbers as JSON."""
    content = {"recipe": asdict(recipe), "torch": torch.__version__, "results": results}
    write_atomically(folder / "results.json", json.dumps(content, indent=2) + "\n")


def main() -> None:
    """Run one of the toys."""
    flags = parse_flags()
    if flags.out.exists():
        raise cli.UserError(f"{flags.out}: exists already; choose another --out")
    started = time.monotonic()
    recipe = replace(flags.recipe, num_steps=flags.num_steps or flags.recipe.num_steps, seed=flags.seed)
    with new_folder(flags.out) as folder:
        table = flags.toy(recipe, flags.num_samples, folder)
    Console().print(table)
    print(f"results.json and a plot in {flags.out} ({time.monotonic() - started:.0f} s)")


def parse_flags() -> argparse.Namespace:
    """Parse the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=raw)
    toys = parser.add_subparsers(required=True, metavar="TOY")
    for name, toy, recipe, help in (
        ("one-d", one_d, ONE_D_RECIPE, "the true denoising distribution of a 1-D mixture, and what fits it"),
        ("grid25", grid25, GRID_25_RECIPE, "25 Gaussians: modes covered and sample quality for several T"),
    ):
        command = toys.add_parser(name, help=help, description=help)
        command.set_defaults(toy=toy, recipe=recipe)
        command.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for what is written")
        command.add_argument(
            "--num-steps",
            type=cli.positive,
            metavar="N",
            help=f"training steps of each model (default: {recipe.num_steps:,})",
        )
        command.add_argument(
            "--num-samples", type=cli.positive, default=10_000, metavar="N", help="samples judged (default: 10,000)"
        )
        command.add_argument("--seed", type=int, default=0, metavar="S", help="seed of everything (default: 0)")
    return parser.parse_args()


command = cli.command(main)

if __name__ == "__main__":
    command()
