"""Evaluations during training: the right samples, the right numbers, and a training that does not notice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy import linalg
from torch import Tensor

from data_prep.images import encode_image
from data_prep.shards import ShardWriter
from ldgan import train, train_ddpm
from ldgan.diffusion.samplers import SamplerConfig
from ldgan.engine.cli import UserError
from ldgan.engine.config import load_config
from ldgan.engine.images import save_png
from ldgan.engine.run import resolve_checkpoint
from ldgan.evaluation.image_sets import open_images
from ldgan.evaluation.references import ReferenceImages
from ldgan.inference.trained_model import load_model
from ldgan.metrics.features import FeatureNetwork, feature_network
from ldgan.training import monitoring
from ldgan.training.ddpm import DDPMTrainer
from ldgan.training.gan import DiffusionGANTrainer
from ldgan.training.monitoring import FIRST_SEED, EvaluationConfig

ROOT = Path(__file__).resolve().parents[3]
FEATURES = "timm:test_efficientnet@32"
FRECHET, KERNEL, SCORE = (
    f"{name} ({FEATURES})" for name in ("Frechet distance", "kernel distance", "classifier score")
)
NUM_IMAGES, NUM_STEPS = 16, 6

RUN = (
    *(f"run.num_steps={NUM_STEPS}", "run.batch_size=8", "run.num_micro_batches=2", "run.num_threads=1"),
    *("run.log_every_steps=2", "run.checkpoint_every_steps=4", "run.keep_checkpoints=1", "ema_halflife_images=8"),
)
GAN = (
    *("num_timesteps=2", "generator.base_channels=8", "generator.channel_multipliers=[1]", "generator.z_dim=3"),
    *("generator.num_res_blocks=1", "generator.embedding_dim=8", "generator.attention_resolutions=[]"),
    *("discriminator.widths=[8,8]", "discriminator.embedding_dim=8", "generator_optimizer.lr=0.01"),
)
DDPM = (
    *("num_timesteps=12", "schedule=cosine", "network.base_channels=8", "network.channel_multipliers=[1]"),
    *("network.num_res_blocks=1", "network.embedding_dim=8", "network.attention_resolutions=[]", "optimizer.lr=0.01"),
    "network.dropout=0.2",  # draws from the global generator
)
WHOLE = ("evaluation.metrics=[fid,kid,is,pr]", "evaluation.best=fid")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``shards`` and ``real``, the same 8-pixel images, and ``weights.safetensors`` of a random feature network."""
    folder = tmp_path_factory.mktemp("monitoring")
    random = np.random.default_rng(0)
    with ShardWriter(folder / "shards", "images", details={"resolution": 8}) as writer:
        for number in range(20):
            pixels = random.integers(0, 256, (2, 2, 3), dtype=np.uint8).repeat(4, axis=0).repeat(4, axis=1)
            writer.write({"png": encode_image(Image.fromarray(pixels), "png", quality=100)})
            save_png(folder / "real" / f"{number:09d}.png", torch.from_numpy(pixels).permute(2, 0, 1))
    torch.manual_seed(1)
    network = timm.create_model("test_efficientnet", pretrained=False)
    save_file(network.state_dict(), folder / "weights.safetensors")
    return folder


@pytest.fixture(scope="module")
def network(folder: Path) -> FeatureNetwork:
    return feature_network(FEATURES, folder / "weights.safetensors", "cpu")


def evaluation(folder: Path, **changes: Any) -> tuple[str, ...]:
    """Settings of an evaluation after every step."""
    settings = {"every_steps": 1, "num_images": NUM_IMAGES, "batch_size": 5, "features": FEATURES}
    settings |= {"feature_weights": folder / "weights.safetensors", "reference": folder / "real"} | changes
    return tuple(f"evaluation.{key}={value}" for key, value in settings.items())


def settings_of(command: ModuleType, folder: Path, run: Path, *settings: str) -> tuple[str, ...]:
    return (f"data={folder / 'shards'}", f"run.dir={run}", *RUN, *(GAN if command is train else DDPM), *settings)


def run_command(
    monkeypatch: pytest.MonkeyPatch, command: ModuleType, folder: Path, run: Path, *settings: str
) -> dict[int, dict[str, float]]:
    """Train in this process; what was measured, by step."""
    monkeypatch.setattr(sys, "argv", [command.__name__, *settings_of(command, folder, run, *settings)])
    command.main()
    return measured(run)


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def measured(run: Path) -> dict[int, dict[str, float]]:
    """Rows of evaluations by step: their names have a network in brackets."""
    times = {"step", "num_images", "seconds"}
    found = [(row["step"], {name: row[name] for name in row.keys() - times}) for row in rows(run)]
    return {step: values for step, values in found if any("(" in name for name in values)}


def last_weights(run: Path) -> dict[str, Tensor]:
    files = sorted((run / "checkpoints" / f"step_{NUM_STEPS:09d}").glob("*.safetensors"))
    assert len(files) > 2
    return {f"{file.stem}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def assert_same_weights(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


def real_images(folder: Path, number: int = NUM_IMAGES) -> Tensor:
    files = [folder / "real" / f"{i:09d}.png" for i in range(number)]
    return torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files])


def expected_frechet(features: Tensor, reference: Tensor) -> float:
    """By a square root of the product of covariances."""
    (a, b), (m, n) = ([np.cov(f.double().numpy(), rowvar=False) for f in (features, reference)], (features, reference))
    shift = (m.double().mean(dim=0) - n.double().mean(dim=0)).square().sum().item()
    return shift + np.trace(a) + np.trace(b) - 2 * linalg.sqrtm(a @ b).real.trace()


@pytest.fixture(scope="module", params=[train, train_ddpm], ids=["gan", "ddpm"])
def command(request: pytest.FixtureRequest) -> ModuleType:
    return request.param


@pytest.fixture(scope="module")
def whole(folder: Path, command: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that was measured after every step."""
    run = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_command(monkeypatch, command, folder, run, *WHOLE, *evaluation(folder))
    return run


def test_the_averaged_weights_are_sampled_and_compared_with_the_reference(
    folder: Path, network: FeatureNetwork, command: ModuleType, whole: Path
) -> None:
    model, found = load_model(whole), measured(whole)
    sampler = SamplerConfig() if command is train else SamplerConfig("ddim", num_steps=12)  # those of previews
    seeds = range(FIRST_SEED, FIRST_SEED + NUM_IMAGES)
    samples = network(torch.cat([model.decode(model.sample(part, sampler=sampler)) for part in (seeds[:5], seeds[5:])]))
    assert found[6][FRECHET] == pytest.approx(expected_frechet(samples, network(real_images(folder))), rel=1e-3)
    assert list(found) == [1, 2, 3, 4, 5, 6]
    assert len({values[FRECHET] for values in found.values()}) == 6  # the weights move, and the numbers with them
    others = {f"{name} ({FEATURES})" for name in ("precision", "recall")}
    assert all(values.keys() == {FRECHET, KERNEL, SCORE} | others for values in found.values())


def test_training_does_not_notice(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: ModuleType, whole: Path
) -> None:
    monkeypatch.setattr(monitoring, "open_features", lambda *_, **__: pytest.fail("a network was opened"))
    assert run_command(monkeypatch, command, folder, tmp_path / "run", "evaluation.features=nothing") == {}
    assert_same_weights(last_weights(whole), last_weights(tmp_path / "run"))
    assert not (tmp_path / "run" / "best.json").exists()


def assert_best(run: Path, name: str, step: int, beside: str) -> None:
    record = json.loads((run / "best.json").read_text())
    assert (record["step"], record["value"]) == (step, measured(run)[step][name])
    assert record["metric"] == f"{name} of 16 samples{beside}"
    assert resolve_checkpoint(run / "best") == run / "checkpoints" / f"step_{step:09d}"
    load_model(run / "best")


def test_the_best_checkpoint_is_that_of_the_lowest_distance(folder: Path, whole: Path) -> None:
    found = measured(whole)
    assert_best(whole, FRECHET, min(found, key=lambda step: found[step][FRECHET]), f" beside {folder / 'real'}")


def test_the_best_checkpoint_is_that_of_the_highest_score(folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    run = tmp_path / "run"
    found = run_command(monkeypatch, train, folder, run, *evaluation(folder, metrics="[is]", best="is"))
    step = max(found, key=lambda step: found[step][SCORE])
    assert_best(run, SCORE, step, "")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in said] == [f"step {number}" for number in range(1, 7)]
    assert [line for line in said if line.endswith("so far")][-1] == (
        f"step {step}: {SCORE} {found[step][SCORE]:.4g}, the best so far"
    )


@pytest.mark.parametrize("stopped_at", [2, 5, 6])
def test_a_resumed_run_measures_and_keeps_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: ModuleType, whole: Path, stopped_at: int
) -> None:
    trainer = DiffusionGANTrainer if command is train else DDPMTrainer
    step = trainer.step

    def stop(trainer: Any, number: int, *given: Any, **named: Any) -> dict[str, Tensor]:
        if number == stopped_at:
            raise KeyboardInterrupt
        return step(trainer, number, *given, **named)

    with monkeypatch.context() as stopping:
        stopping.setattr(trainer, "step", stop)
        with pytest.raises(KeyboardInterrupt):
            run_command(stopping, command, folder, tmp_path, *WHOLE, *evaluation(folder))
    run_command(monkeypatch, command, folder, tmp_path, *WHOLE, *evaluation(folder))
    assert_same_weights(last_weights(tmp_path), last_weights(whole))
    logged = [[row | {"seconds": 0} for row in rows(run)] for run in (whole, tmp_path)]
    assert logged[0] == logged[1]
    assert (tmp_path / "best.json").read_text() == (whole / "best.json").read_text()


@pytest.mark.parametrize("command", [train], ids=["gan"], indirect=True)
def test_two_processes_measure_what_one_does(folder: Path, tmp_path: Path, command: ModuleType, whole: Path) -> None:
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    settings = settings_of(train, folder, tmp_path, *WHOLE, *evaluation(folder))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        (*launch, "ldgan/train.py", *settings), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    one, two = measured(whole), measured(tmp_path)
    assert two.keys() == one.keys()
    for step, values in one.items():
        assert two[step] == pytest.approx(values, rel=0.02)
    bests = [resolve_checkpoint(run / "best").name for run in (whole, tmp_path)]
    assert bests[0] == bests[1]
    assert result.stdout.count("step 3: ") == 1


def test_a_run_may_begin_to_be_measured_and_one_of_before_there_was_an_evaluation(
    folder: Path, tmp_path: Path, monkeypatch
) -> None:
    run = tmp_path / "run"
    run_command(monkeypatch, train, folder, run, "run.num_steps=4")
    lines = (run / "config.yaml").read_text().splitlines(keepends=True)
    first = lines.index("evaluation:\n")
    last = next(number for number, line in enumerate(lines) if number > first and not line.startswith(" "))
    (run / "config.yaml").write_text("".join(lines[:first] + lines[last:]))
    found = run_command(monkeypatch, train, folder, run, *evaluation(folder))
    assert list(found) == [5, 6]


def test_numbers_of_other_settings_are_not_compared(folder: Path, tmp_path: Path, monkeypatch) -> None:
    real = {"reference": folder / "real", "every_steps": 4}
    run_command(monkeypatch, train, folder, tmp_path, "run.num_steps=4", *evaluation(folder, best="fid", **real))
    # Of the same images, but fewer: their distance is larger.
    found = run_command(monkeypatch, train, folder, tmp_path, *evaluation(folder, best="fid", **real, num_images=10))
    assert list(found) == [4, 6]
    assert found[6][FRECHET] > found[4][FRECHET]
    record = json.loads((tmp_path / "best.json").read_text())
    assert (record["step"], record["value"]) == (6, found[6][FRECHET])


def test_a_file_of_statistics_serves_as_the_images_do(
    folder: Path, network: FeatureNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    statistics = tmp_path / "real.safetensors"
    ReferenceImages(open_images(folder / "real"), NUM_IMAGES, statistics).measure(
        Accelerator(cpu=True), network, num_kept=NUM_IMAGES, batch_size=NUM_IMAGES
    )
    changes = {"every_steps": 3, "metrics": "[fid,kid,dc]"}
    images, shards, file = (
        run_command(
            monkeypatch, train, folder, tmp_path / "runs" / path.name, *evaluation(folder, reference=path, **changes)
        )
        for path in (folder / "real", folder / "shards", statistics)
    )
    assert list(images) == [3, 6]
    for step, values in images.items():
        assert shards[step] == values  # the first images of either are the same
        assert file[step] == pytest.approx(values, rel=1e-4)


def test_real_images_are_brought_to_the_size_of_the_samples(
    folder: Path, network: FeatureNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "large").mkdir()
    small = []
    for number in range(NUM_IMAGES):
        with Image.open(folder / "real" / f"{number:09d}.png") as image:
            large = image.resize((16, 16), Image.Resampling.NEAREST)
        large.save(tmp_path / "large" / f"{number:09d}.png")
        small.append(np.array(large.resize((8, 8), Image.Resampling.LANCZOS)))
    changes = {"reference": tmp_path / "large", "every_steps": 6}
    found = run_command(monkeypatch, train, folder, tmp_path / "run", *evaluation(folder, **changes))
    model = load_model(tmp_path / "run")
    samples = network(model.decode(model.sample(range(FIRST_SEED, FIRST_SEED + NUM_IMAGES))))
    reference = network(torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2))
    assert found[6][FRECHET] == pytest.approx(expected_frechet(samples, reference), rel=1e-3)
    assert found[6][FRECHET] != pytest.approx(expected_frechet(samples, network(real_images(folder))), rel=1e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "nowhere"}, "nowhere: does not exist"),
        ({"reference": "nowhere.npz"}, "nowhere.npz: no such file of statistics"),
        ({"reference": "https://me:pw@host/set"}, "evaluation.reference=https://host/set was given with"),
        ({"num_images": 21}, "holds 20 images, and 21 are asked"),
        ({"features": "resnet"}, "no feature network 'resnet'"),
        ({"feature_weights": "nowhere.pth"}, "nowhere.pth: no such file"),
        ({"features": "squeezenet", "metrics": "[is]"}, "is needs a network that classifies, and squeezenet does not"),
    ],
)
def test_what_cannot_be_measured_is_said_before_the_first_step(
    folder: Path, tmp_path: Path, monkeypatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(DiffusionGANTrainer, "step", lambda *_, **__: pytest.fail("a step was done"))
    if changes.get("features") == "squeezenet":
        torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), tmp_path / "squeezenet.pth")
        changes |= {"feature_weights": tmp_path / "squeezenet.pth"}
    with pytest.raises(UserError, match=message):
        run_command(monkeypatch, train, folder, tmp_path / "run", *evaluation(folder, **changes))
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("command", [train, train_ddpm], ids=["gan", "ddpm"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_steps": 5}, "evaluation.metrics=fid compares with real images; give evaluation.reference"),
        ({"metrics": "[fid,fdi]"}, "evaluation.metrics: there is no metric 'fdi'; choose out of fid, kid, is, pr, dc"),
        (
            {"best": "pr", "metrics": "[fid,pr]"},
            "evaluation.best is 'pr'; choose one of fid, kid, is, or null for none",
        ),
        ({"best": "kid"}, "evaluation.best is kid, which is not measured; add it to evaluation.metrics"),
        ({"every_steps": -1}, "evaluation.every_steps is -1"),
        ({"every_steps": 1, "metrics": "[]"}, "evaluation.metrics: nothing to measure"),
        ({"every_steps": 1, "reference": "r", "num_images": 9}, "evaluation.num_images is 9 and batch_size 100"),
        ({"every_steps": 1, "reference": "r", "batch_size": 0}, "batch_size 0; choose 10 or more, and 1 or more"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    command: ModuleType, settings: dict[str, Any], message: str
) -> None:
    overrides = [f"evaluation.{key}={value}" for key, value in settings.items()]
    with pytest.raises(UserError) as error:
        load_config(command.TrainConfig, None, ["data=shards", "run.dir=run", *overrides])
    assert message in str(error.value)


def test_a_score_needs_no_reference() -> None:
    EvaluationConfig(every_steps=1, metrics=["is"], best="is").validate()
