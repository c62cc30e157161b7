"""The classifier of noisy samples: what it trains on, what it learns, a run that is stopped, and whom it may guide."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.numpy import load_file
from torch import Tensor, nn

from data_prep.images import encode_image
from data_prep.shards import ShardWriter
from ldgan import train_classifier
from ldgan.diffusion.process import Diffusion, build_diffusion, linear_betas
from ldgan.engine.accumulation import Accumulation
from ldgan.engine.cli import UserError
from ldgan.engine.ema import EMA
from ldgan.engine.philox import Random, key_of
from ldgan.inference.trained_classifier import load_classifier, same_process
from ldgan.models.classifier import ClassifierConfig, build_classifier
from ldgan.training.classifier import ClassifierTrainer, spread_timesteps

SHAPE, NUM_CLASSES, T = (2, 4, 4), 3, 8
SIZE = math.prod(SHAPE)


class LinearClassifier(nn.Module):
    """Logits linear in x_t; keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(SIZE, NUM_CLASSES, bias=False)
        nn.init.normal_(self.linear.weight, std=0.1, generator=torch.Generator().manual_seed(0))
        self.given: list[tuple[Tensor, Tensor]] = []

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        self.given.append((x_t, t))
        return self.linear(x_t.flatten(1))


class KnowsLittleNoise(nn.Module):
    """Names class 0 where t is at most T / 2, and class 1 elsewhere."""

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return torch.stack([t <= T // 2, t > T // 2], dim=1).float()


class Batches:
    """A data source whose batches are x_0 and labels themselves."""

    def x_0(self, batch: dict[str, Tensor], noise: Random) -> Tensor:
        return batch["x_0"]

    def labels(self, batch: dict[str, Tensor], device: torch.device) -> Tensor:
        return batch["label"]


def new_trainer(classifier: nn.Module, num_micro_batches: int = 1) -> ClassifierTrainer:
    """Gradient descent with rate 1: a step moves weights by minus their gradient."""
    parameters = list(classifier.parameters()) or [torch.zeros(1)]
    return ClassifierTrainer(
        Accumulation(Accelerator(cpu=True), num_micro_batches, 8, 0),
        build_diffusion("vp", T),
        classifier,
        torch.optim.SGD(parameters, lr=1.0),
        EMA(classifier, halflife_images=8, rampup_ratio=None),
    )


def new_batch(seed: int, size: int = 8) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    x_0 = torch.randn(size, *SHAPE, generator=random)
    return {"x_0": x_0, "label": torch.randint(NUM_CLASSES, (size,), generator=random)}


@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_a_step_follows_the_gradient_of_cross_entropy(num_micro_batches: int) -> None:
    # The gradient for logits W x is (softmax(W x) - onehot(y)) x^T, averaged.
    classifier = LinearClassifier()
    before = classifier.linear.weight.detach().double()
    batches = [new_batch(seed, 8 // num_micro_batches) for seed in range(num_micro_batches)]
    terms = new_trainer(classifier, num_micro_batches).step(1, Batches(), iter(batches))
    x = torch.cat([x_t.flatten(1) for x_t, _ in classifier.given]).double()
    labels = torch.cat([batch["label"] for batch in batches])
    probabilities = (x @ before.T).softmax(dim=1)
    onehot = torch.eye(NUM_CLASSES, dtype=torch.float64)[labels]
    expected = before - (probabilities - onehot).T @ x / len(x)
    torch.testing.assert_close(classifier.linear.weight.detach().double(), expected, rtol=1e-5, atol=1e-6)
    loss = -probabilities[torch.arange(len(x)), labels].log().mean()
    assert terms["loss"].item() == pytest.approx(loss.item(), rel=1e-5)


def test_it_sees_every_noise_level_of_the_process() -> None:
    # Where x_0 is zero, x_t is noise of variance 1 - abar_t.
    classifier, size = LinearClassifier(), 4000
    batch = {"x_0": torch.zeros(size, *SHAPE), "label": torch.zeros(size, dtype=torch.int64)}
    new_trainer(classifier).step(1, Batches(), iter([batch]))
    ((x_t, t),) = classifier.given
    assert t.bincount().tolist() == [0] + [size // T] * T
    for step, alpha_bar in enumerate(build_diffusion("vp", T).alphas_bar.tolist()[1:], start=1):
        values = x_t[t == step]
        assert values.var().item() == pytest.approx(1 - alpha_bar, rel=5 * (2 / values.numel()) ** 0.5)


def test_accuracy_is_told_apart_by_quarters_of_t() -> None:
    terms = new_trainer(KnowsLittleNoise()).terms(
        torch.zeros(16, *SHAPE), torch.zeros(16).long(), Random(key_of(0), "cpu")
    )
    accuracies = [terms[f"accuracy_{number}"].item() for number in (1, 2, 3, 4)]
    assert accuracies == [1, 1, 0, 0]


@pytest.mark.parametrize(("batch_size", "num_steps"), [(8, 1000), (4, 3), (1, 5), (6, 1)])
def test_timesteps_are_spread_and_uniform(batch_size: int, num_steps: int) -> None:
    random = Random(key_of(0), "cpu")
    draws = torch.stack([spread_timesteps(batch_size, num_steps, random) for _ in range(2000)])
    assert bool((draws.diff(dim=1) >= 0).all())
    # Row i has the i-th share of the range.
    edges = torch.arange(batch_size + 1) * num_steps / batch_size
    assert bool((draws > edges[:-1].floor()).all())
    assert bool((draws <= edges[1:].ceil()).all())
    frequencies = draws.flatten().bincount(minlength=num_steps + 1)[1:] / draws.numel()
    deviation = (num_steps / draws.numel()) ** 0.5  # relative, of independent draws; these deviate less
    torch.testing.assert_close(frequencies * num_steps, torch.ones(num_steps), rtol=0, atol=5 * deviation)


def test_class_scores_depend_on_position_noise_level_and_nothing_but_the_sample() -> None:
    torch.manual_seed(0)
    config = ClassifierConfig(base_channels=8, num_res_blocks=1, embedding_dim=8)
    classifier = build_classifier(config, SHAPE, ["a", "b", "c"]).eval()
    x_t, t = torch.randn(4, *SHAPE), torch.tensor([1, 2, 3, 4])
    logits = classifier(x_t, t)
    torch.testing.assert_close(torch.cat([classifier(x[None], step[None]) for x, step in zip(x_t, t)]), logits)
    assert not torch.allclose(classifier(x_t, t.flip(0)), logits, atol=1e-3)
    assert not torch.allclose(classifier(x_t.flip(3), t), logits, atol=1e-3)
    with pytest.raises(ValueError, match="resolution 6 cannot be halved"):
        build_classifier(ClassifierConfig(channel_multipliers=[1, 1, 1]), (2, 6, 6), ["a"])


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of 8 x 8 pixels that are bright on the left, or on the right."""
    folder = tmp_path_factory.mktemp("data") / "images"
    with ShardWriter(folder, "images", details={"resolution": 8}, class_names=["left", "right"]) as writer:
        for number in range(16):
            pixels = np.zeros((8, 8, 3), dtype=np.uint8)
            pixels[:, 4 * (number % 2) :][:, :4] = 200 + number
            image = encode_image(Image.fromarray(pixels), "png", quality=100)
            writer.write({"png": image, "cls": str(number % 2).encode()})
    return folder


def train(monkeypatch: pytest.MonkeyPatch, data: Path, run: Path, *settings: str) -> None:
    """A run of the command."""
    tiny = (
        *("run.batch_size=16", "run.num_micro_batches=2", "run.num_threads=1", "run.log_every_steps=5"),
        *("run.checkpoint_every_steps=2", "optimizer.warmup_steps=2", "optimizer.lr=0.01"),
        *("network.base_channels=8", "network.num_res_blocks=1", "network.embedding_dim=8", "network.dropout=0.1"),
    )
    monkeypatch.setattr("sys.argv", ["train_classifier.py", f"data={data}", f"run.dir={run}", *tiny, *settings])
    train_classifier.main()


@pytest.fixture(scope="module")
def run(halves: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 40 steps."""
    folder = tmp_path_factory.mktemp("run") / "classifier"
    with pytest.MonkeyPatch.context() as monkeypatch:
        train(monkeypatch, halves, folder, "run.num_steps=40")
    return folder


def test_it_learns_what_noise_leaves_to_see(run: Path) -> None:
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["accuracy_1"] > 0.95
    assert last["accuracy_4"] < 0.9  # at t = T there is hardly more than noise
    assert last["loss"] < math.log(2)


def guided(**changes: Any) -> dict[str, Any]:
    """The description of a model on the same data."""
    return {"data_shape": [3, 8, 8], "autoencoder": None, "class_names": ["left", "right"], **changes}


def test_a_loaded_classifier_has_the_averaged_weights(run: Path) -> None:
    classifier = load_classifier(run, "cpu", build_diffusion("vp", 4), guided(class_names=None))
    averaged = load_file(run / "checkpoints" / "step_000000040" / "classifier_ema.safetensors")
    assert classifier.class_names == ["left", "right"]
    assert not classifier.training
    for name, tensor in classifier.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), averaged[name], err_msg=name)
    x_t, t = torch.full((1, 3, 8, 8), -1.0), torch.ones(1, dtype=torch.int64)
    x_t[..., :4] = 0.7
    assert classifier(x_t, t).argmax().item() == 0
    assert classifier(x_t.flip(3), t).argmax().item() == 1


@pytest.mark.parametrize(
    ("diffusion", "model", "message"),
    [
        (build_diffusion("vp", 8), guided(), "schedule=vp num_timesteps=4 beta_max=20.0, the model with other"),
        (build_diffusion("vp", 4, beta_max=7), guided(), "the model with other noise levels"),
        (build_diffusion("geometric", 4), guided(), "the model with other noise levels"),
        (build_diffusion("vp", 4), guided(autoencoder="another"), "latents of another autoencoder"),
        (build_diffusion("vp", 4), guided(data_shape=[3, 16, 16]), "samples of another shape"),
        (build_diffusion("vp", 4), guided(class_names=["right", "left"]), "other classes"),
    ],
)
def test_a_classifier_guides_only_models_of_its_process_and_data(
    run: Path, diffusion: Diffusion, model: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_classifier(run, "cpu", diffusion, model)


def test_processes_are_the_same_if_all_their_noise_levels_are() -> None:
    assert same_process(build_diffusion("linear", 1000), build_diffusion("linear", 1000))
    assert not same_process(build_diffusion("linear", 1000), build_diffusion("cosine", 1000))
    # The first betas, far below the last ones, count as much.
    betas = linear_betas(1000)
    betas[0] *= 1.001
    assert not same_process(build_diffusion("linear", 1000), Diffusion(betas))


def test_a_run_that_was_stopped_ends_in_the_same_weights(
    halves: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(monkeypatch, halves, tmp_path / "whole", "run.num_steps=5")
    step = ClassifierTrainer.step

    def stop_at_four(trainer: ClassifierTrainer, number: int, *given: Any) -> dict[str, Tensor]:
        if number == 4:
            raise KeyboardInterrupt
        return step(trainer, number, *given)

    with monkeypatch.context() as stopping:
        stopping.setattr(ClassifierTrainer, "step", stop_at_four)
        with pytest.raises(KeyboardInterrupt):
            train(stopping, halves, tmp_path / "stopped", "run.num_steps=5")
    train(monkeypatch, halves, tmp_path / "stopped", "run.num_steps=5")

    checkpoints = [tmp_path / name / "checkpoints" / "step_000000005" for name in ("whole", "stopped")]
    for name in ("classifier", "classifier_ema", "optimizer"):
        whole, resumed = (load_file(checkpoint / f"{name}.safetensors") for checkpoint in checkpoints)
        assert whole.keys() == resumed.keys()
        for key, array in whole.items():
            np.testing.assert_array_equal(array, resumed[key], err_msg=f"{name}/{key}")


def test_shards_without_classes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ShardWriter(tmp_path / "images", "images", details={"resolution": 8}) as writer:
        image = Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8))
        writer.write({"png": encode_image(image, "png", quality=100)})
    with pytest.raises(UserError, match="has no classes"):
        train(monkeypatch, tmp_path / "images", tmp_path / "run")
    assert not (tmp_path / "run").exists()
