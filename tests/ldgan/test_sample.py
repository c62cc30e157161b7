"""From flags to samples: labels that reach their rows, guidance, the picture of steps, and errors in one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ldgan import sample
from ldgan.diffusion.samplers import SamplerConfig
from ldgan.engine import cli
from ldgan.engine.checkpoint import save_checkpoint
from ldgan.engine.cli import UserError
from ldgan.engine.config import to_dict
from ldgan.engine.images import enlarge, load_png
from ldgan.inference.jobs import Job, add_sampler_flags, generate, job_of, labels_of, open_model, sampler_of
from ldgan.inference.trained_classifier import KIND as CLASSIFIER
from ldgan.inference.trained_classifier import WEIGHTS as CLASSIFIER_WEIGHTS
from ldgan.inference.trained_model import DDPM, GAN, NETWORK, WEIGHTS, TrainedModel, build_unet
from ldgan.models.classifier import ClassifierConfig, build_classifier
from ldgan.models.unet import UNetConfig

SHAPE, CLASSES = (3, 8, 8), ["cat", "dog", "12", "emu"]
CLASSIFIER_CONFIG = ClassifierConfig(base_channels=8, channel_multipliers=[1], num_res_blocks=1, embedding_dim=8)


def randomise(network: nn.Module, seed: int) -> None:
    """Weights under which every input counts; fresh ones leave much at zero."""
    random = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3, generator=random)


def save_run(run: Path, kind: str = GAN, class_names: Sequence[str] | None = None, **config: Any) -> Path:
    """A run of stage 2 on pixels, T = 4; the model is random."""
    network = UNetConfig(base_channels=8, channel_multipliers=[1], num_res_blocks=1, z_dim=0, embedding_dim=8)
    if kind == GAN:
        network.z_dim = 3
    unet = build_unet(network, SHAPE, len(class_names or []))
    randomise(unet, seed=0)
    config = {NETWORK[kind]: to_dict(network), "num_timesteps": 4, "latent": False, **config}
    description = {"kind": kind, "config": config, "data_shape": list(SHAPE), "resolution": SHAPE[1]}
    description |= {"class_names": class_names, "autoencoder": None}
    save_checkpoint(run / "checkpoints" / "step_000000001", {WEIGHTS[kind]: unet}, description)
    return run


def save_classifier(run: Path, schedule: str = "vp") -> Path:
    """A run of train_classifier.py for T = 4; the classifier is random."""
    classifier = build_classifier(CLASSIFIER_CONFIG, SHAPE, CLASSES)
    randomise(classifier, seed=1)
    config = {"network": to_dict(CLASSIFIER_CONFIG), "schedule": schedule, "num_timesteps": 4, "beta_max": 20.0}
    description = {"kind": CLASSIFIER, "config": config, "data_shape": list(SHAPE), "autoencoder": None}
    save_checkpoint(
        run / "checkpoints" / "step_000000001",
        {CLASSIFIER_WEIGHTS: classifier},
        {**description, "class_names": CLASSES, "resolution": SHAPE[-1]},
    )
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with and without classes, and a classifier for each process."""
    folder = tmp_path_factory.mktemp("runs")
    save_run(folder / "plain")
    save_run(folder / "classes", class_names=CLASSES)
    save_run(folder / "dropped", class_names=CLASSES, label_dropout=0.1)
    save_run(folder / "ddpm", DDPM, predicts="noise", variance="beta", schedule="linear")
    save_run(folder / "single", num_timesteps=1)
    save_run(folder / "previous", predicts="x_previous")
    save_classifier(folder / "classifier")
    save_classifier(folder / "linear_classifier", "linear")
    return folder


def flags_of(*words: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_sampler_flags(parser)
    return parser.parse_args([str(word) for word in words])


def job(model: TrainedModel, **changes: Any) -> Job:
    """Six images in batches of four."""
    plain = Job(model, SamplerConfig(), labels=None, num_images=6, first_seed=10, batch_size=4)
    return replace(plain, **changes)


def samples_of(job: Job) -> Tensor:
    return torch.cat([x_0 for _, x_0 in generate(Accelerator(cpu=True), job)])


def test_flags_become_a_sampler(tmp_path: Path) -> None:
    assert sampler_of(flags_of()) == SamplerConfig()
    flags = flags_of("--sampler", "ddim", "--steps", 50, "--eta", 0.5, "--guidance", 2, "--classifier-scale", 3)
    assert sampler_of(flags) == SamplerConfig("ddim", 50, 0.5, 2.0, None, 3.0)
    assert sampler_of(flags_of("--classifier", "runs/c")) == SamplerConfig(classifier="runs/c")
    with pytest.raises(UserError, match="only the ddim sampler"):
        sampler_of(flags_of("--eta", 1))


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("2", [2]),
        ("3,0-2", [3, 0, 1, 2]),
        ("dog, 1,cat", [1, 1, 0]),
        ("1-1", [1]),
        ("emu,00", [3, 0]),
        ("all", [0, 1, 2, 3]),
    ],
)
def test_labels_are_numbers_ranges_and_names(runs: Path, text: str, labels: list[int]) -> None:
    assert labels_of(text, open_model(runs / "classes", SamplerConfig())) == labels


@pytest.mark.parametrize("text", ["4", "2-4", "2-1", "12", "cow", "", "-1", "1;2", "0x1"])
def test_an_unknown_label_is_answered_with_the_known_ones(runs: Path, text: str) -> None:
    # The class named 12 is number 2: digits alone are always a number.
    with pytest.raises(
        UserError, match=r"^labels: no class .*; the model knows 0 to 3, or by name: cat, dog, 12, emu$"
    ):
        labels_of(text, open_model(runs / "classes", SamplerConfig()))


def test_labels_reach_their_rows_in_turn(runs: Path) -> None:
    model = open_model(runs / "classes", SamplerConfig())
    samples = samples_of(job(model, labels=[3, 1, 0, 0]))
    for number, label in enumerate([3, 1, 0, 0, 3, 1]):
        (alone,) = model.sample([10 + number], [label])
        torch.testing.assert_close(samples[number], alone, rtol=1e-4, atol=1e-4)
        (other,) = model.sample([10 + number], [2])
        assert not torch.allclose(samples[number], other, atol=0.01)


def test_without_labels_classes_are_drawn_from_the_seeds(runs: Path) -> None:
    model = open_model(runs / "classes", SamplerConfig())
    drawn = model.labels(range(200), None)
    assert drawn.bincount(minlength=4).min() > 25  # of 50 each
    torch.testing.assert_close(model.sample([3, 4]), model.sample([3, 4], drawn[3:5].tolist()), rtol=0, atol=0)


def test_guidance_1_is_the_conditional_model_and_0_forgets_the_label(runs: Path) -> None:
    def samples(scale: float, labels: list[int]) -> Tensor:
        sampler = SamplerConfig(guidance_scale=scale)
        return open_model(runs / "dropped", sampler).sample([1, 2], labels, sampler)

    plain = open_model(runs / "dropped", SamplerConfig()).sample([1, 2], [0, 3])
    assert torch.equal(samples(1.0, [0, 3]), plain)
    assert torch.equal(samples(0.0, [0, 3]), samples(0.0, [1, 1]))
    assert not torch.allclose(samples(3.0, [0, 3]), plain, atol=0.01)


def test_a_classifier_guides_a_model_without_classes(runs: Path) -> None:
    def samples(scale: float, labels: list[int]) -> Tensor:
        sampler = SamplerConfig(classifier=str(runs / "classifier"), classifier_scale=scale)
        return open_model(runs / "plain", sampler).sample([1, 2], labels, sampler)

    plain = open_model(runs / "plain", SamplerConfig()).sample([1, 2])
    assert torch.equal(samples(0.0, [0, 3]), plain)
    guided, other = samples(5.0, [0, 3]), samples(5.0, [0, 2])
    assert not torch.allclose(guided, plain, atol=0.01)
    torch.testing.assert_close(guided[0], other[0])
    assert not torch.allclose(guided[1], other[1], atol=0.01)


@pytest.mark.parametrize(
    ("run", "settings", "message"),
    [
        ("plain", {"guidance_scale": 2.0}, "was trained without classes and captions; leave it out"),
        ("classes", {"guidance_scale": 2.0}, "train with label_dropout"),
        ("plain", {"num_steps": 5}, "has 4 steps, and 5 are asked"),
        ("previous", {"method": "ddim"}, "predicts x_{t-1} itself"),
        ("previous", {"num_steps": 2}, "predicts x_{t-1} itself"),
        ("previous", {"classifier": "classifier"}, "its steps have no variance to act on"),
        ("plain", {"classifier": "classifier", "num_steps": 1}, "its steps have no variance to act on"),
        ("plain", {"classifier": "linear_classifier"}, "was trained with schedule=linear num_timesteps=4"),
        ("single", {"classifier": "classifier"}, "the model with other noise levels"),
        ("plain", {"classifier": "classes"}, "holds a diffusion GAN, no classifier"),
        ("classifier", {}, "give a run of ldgan/train.py"),
        ("plain", {"classifier": "nowhere"}, "nowhere: does not exist"),
    ],
)
def test_a_sampler_that_does_not_fit_the_model_is_refused(
    runs: Path, run: str, settings: dict[str, Any], message: str
) -> None:
    if "classifier" in settings:
        settings = settings | {"classifier": str(runs / settings["classifier"])}
    with pytest.raises(UserError) as error:
        open_model(runs / run, SamplerConfig(**settings))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_labels_need_a_model_or_a_classifier_that_knows_them(runs: Path) -> None:
    plain = open_model(runs / "plain", SamplerConfig())
    assert labels_of(None, plain) is None
    with pytest.raises(UserError, match=r"^labels: .*trained without classes; leave it out, or add a classifier"):
        labels_of("1", plain)
    guided = open_model(runs / "plain", SamplerConfig(classifier=str(runs / "classifier")))
    assert labels_of("1", guided) == [1]
    with pytest.raises(UserError, match=r"^labels: a classifier guides to them; give some of 0 to 3"):
        labels_of(None, guided)


@pytest.mark.parametrize(
    ("sampler", "number"),
    [(SamplerConfig(), 4), (SamplerConfig(num_steps=2), 2), (SamplerConfig(guidance_scale=2), 8)],
)
def test_evaluations_are_counted(runs: Path, sampler: SamplerConfig, number: int) -> None:
    model = open_model(runs / "dropped", sampler)
    sizes: list[int] = []
    model.network.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    this = job(model, sampler=sampler, labels=[1])
    samples_of(this)
    assert sum(sizes) / this.num_images == this.evaluations_per_image == number


@pytest.fixture
def command(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Runs sample.py on a run with flags; the folder it made."""

    def run_command(run: str, *flags: object) -> Path:
        words = ["sample.py", "--checkpoint", runs / run, "--out", tmp_path / run, *flags]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        sample.main()
        return tmp_path / run

    return run_command


@pytest.mark.parametrize("run", ["plain", "ddpm"])
def test_the_picture_of_steps_ends_in_the_images(command: Callable[..., Path], run: str) -> None:
    folder = command(run, "--num-images", 3, "--steps-grid", "--batch-size", 2)
    picture = load_png(folder / "steps.png")
    tile = 8 * (96 // 8)
    assert picture.shape == (3, 3 * tile + 2 * 2, 4 * tile + 3 * 2)
    tiles = [
        [picture[:, r * (tile + 2) :, c * (tile + 2) :][:, :tile, :tile].int() for c in range(4)] for r in range(3)
    ]
    for number, row in enumerate(tiles):
        image = enlarge(load_png(folder / f"{number:09d}.png")[None], 12)[0].int()
        assert (row[-1] - image).abs().max() <= 1  # another batch size
        assert all((estimate - image).abs().max() > 1 for estimate in row[:-1])


def test_the_picture_shows_some_of_many_steps(command: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "MAX_STEPS_COLUMNS", 2)
    whole = load_png(command("plain", "--num-images", 1, "--steps-grid") / "steps.png")
    assert whole.shape == (3, 96, 2 * 96 + 2)


def test_ddim_in_fewer_steps_makes_other_images(command: Callable[..., Path], runs: Path) -> None:
    flags = ("--sampler", "ddim", "--steps", 2, "--num-images", 1)
    image = load_png(command("ddpm", *flags) / "000000000.png")
    sampler = sampler_of(flags_of(*flags[:4]))
    model = open_model(runs / "ddpm", sampler)
    np.testing.assert_array_equal(image.numpy(), model.decode(model.sample([0], sampler=sampler))[0].numpy())
    assert not np.array_equal(image.numpy(), model.decode(model.sample([0]))[0].numpy())


def test_errors_come_before_any_work(command: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^labels: no class 'cow'"):
        command("classes", "--num-images", 1, "--labels", "cow")
    with pytest.raises(UserError, match="--steps-grid is a picture"):
        command("plain", "--num-images", 1, "--save", "latents", "--steps-grid")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("run", "flags", "message"),
    [
        ("classes", ("--labels", "cow"), "--labels: no class 'cow'; the model knows 0 to 3"),
        ("plain", ("--steps", 9), "has 4 steps, and 9 are asked; give 1 to 4"),
        ("plain", ("--guidance", 2), "was trained without classes and captions; leave it out, or use a classifier"),
        ("previous", ("--sampler", "ddim"), "predicts x_{t-1} itself, step by step; leave it out"),
        ("plain", ("--decoder", "light"), "works on pixels and has no decoder; leave it out"),
    ],
)
def test_the_command_speaks_of_its_flags(
    command: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    run: str,
    flags: tuple[object, ...],
    message: str,
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.run(lambda: command(run, "--num-images", 1, *flags) and None)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {flags[0]}: ")
    assert message in line


def test_a_job_is_what_the_flags_say(runs: Path) -> None:
    flags = flags_of("--labels", "3,dog", "--guidance", 2)
    vars(flags).update(checkpoint=runs / "dropped", decoder="full", num_images=7, seed=5, batch_size=3)
    this = job_of(flags, torch.device("cpu"))
    assert (this.num_images, this.first_seed, this.batch_size) == (7, 5, 3)
    assert this.labels_of(range(4, 7)) == [3, 1, 3]
    assert this.sampler.guidance_scale == 2
