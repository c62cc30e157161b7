"""The command: numbers equal to the metrics of the very same images, with all conditions, or an error in one line."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

from data_prep.preparation import Preparation, write_shards
from data_prep.sources import ImageFolder
from ldgan import evaluate, sample
from ldgan.engine.checkpoint import save_checkpoint
from ldgan.engine.cli import UserError
from ldgan.engine.config import to_dict
from ldgan.engine.images import load_png, save_png
from ldgan.engine.session import make_accelerator
from ldgan.evaluate import METRICS, RESULT_FILE, metric_names, parse_flags
from ldgan.evaluation.feature_metrics import GAP
from ldgan.evaluation.image_sets import open_images
from ldgan.evaluation.judging import judge_images
from ldgan.evaluation.report import significant
from ldgan.inference.trained_model import GAN, WEIGHTS, build_unet, load_model
from ldgan.metrics.classifier_score import classifier_score
from ldgan.metrics.digits import DigitClassifier, TrainedClassifier
from ldgan.metrics.features import FeatureNetwork, feature_network
from ldgan.metrics.frechet import FeatureStatistics, GaussianFit, frechet_distance
from ldgan.metrics.kernel_distance import kernel_distance
from ldgan.metrics.manifold import prdc
from ldgan.models.unet import UNetConfig

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HOME": os.devnull}
NUM_REAL, NUM_HELDOUT, NUM_SAMPLES = 14, 9, 10
TINY = "timm:test_efficientnet@32"
FRECHET = f"Frechet distance ({TINY})"

Command = Callable[..., dict[str, Any]]


def smooth_noise(num_images: int, seed: int, side: int = 8) -> Tensor:
    """Blots of colour, uint8 (N, 3, side, side)."""
    coarse = torch.rand(num_images, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
    return (255 * nn.functional.interpolate(coarse, side, mode="bilinear")).to(torch.uint8)


def save(folder: Path, images: Tensor) -> Path:
    for number, image in enumerate(images):
        save_png(folder / f"{number:09d}.png", image)
    return folder


def save_run(run: Path, side: int, num_classes: int = 0) -> Path:
    """A run of stage 2 on pixels, T = 4; the model is random."""
    config = UNetConfig(base_channels=8, channel_multipliers=[1], num_res_blocks=1, z_dim=3, embedding_dim=8)
    unet = build_unet(config, (3, side, side), num_classes)
    random = torch.Generator().manual_seed(0)
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.3, generator=random)
    description = {
        **{"kind": GAN, "data_shape": [3, side, side], "resolution": side, "autoencoder": None, "seconds": 60.0},
        "config": {"generator": to_dict(config), "num_timesteps": 4, "latent": False},
        "class_names": [str(label) for label in range(num_classes)] or None,
        "data": {"kind": "images", "seconds": 5.0},
    }
    save_checkpoint(run / "checkpoints" / "step_000000001", {WEIGHTS[GAN]: unet}, description)
    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``real``, ``heldout`` and ``samples``, all 8 px, and files of random weights, ``squeezenet`` and ``tiny``."""
    folder = tmp_path_factory.mktemp("evaluate")
    real = smooth_noise(NUM_REAL, seed=0)
    save(folder / "real", real)
    save(folder / "heldout", smooth_noise(NUM_HELDOUT, seed=1))
    copies = real[[13, 4]] ^ 2  # nearly: no distance is zero, and no two are equal
    save(folder / "samples", torch.cat([smooth_noise(NUM_SAMPLES - 2, seed=2), copies]))
    torch.manual_seed(0)
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), folder / "squeezenet.pth")
    torch.save(timm.create_model("test_efficientnet", pretrained=False).state_dict(), folder / "tiny.pth")
    return folder


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command takes all cores, which is slow where tests share them."""
    monkeypatch.setattr(evaluate, "make_accelerator", partial(make_accelerator, num_threads=1))
    monkeypatch.setattr(sample, "make_accelerator", partial(make_accelerator, num_threads=1))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose model makes images of 8 px."""
    return save_run(tmp_path / "run", side=8)


@pytest.fixture
def command(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs evaluate.py in this process; what it has written."""

    def run_command(*words: object, out: str = "out") -> dict[str, Any]:
        path = tmp_path / out
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words), "--out", str(path)])
        evaluate.main()
        return json.loads((path / RESULT_FILE).read_text())

    return run_command


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Callable[..., argparse.Namespace]:
    def parse(*words: object) -> argparse.Namespace:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
        return parse_flags()

    return parse


def features(folder: Path, name: str = "tiny") -> tuple[object, ...]:
    return ("--features", {"tiny": TINY}.get(name, name), "--feature-weights", folder / f"{name}.pth")


def files(folder: Path, name: str = "tiny") -> tuple[object, ...]:
    """``samples`` beside ``real`` in the features of a network."""
    return ("--images", folder / "samples", "--reference", folder / "real", *features(folder, name))


def pixels(folder: Path, numbers: Sequence[int]) -> Tensor:
    return torch.stack([load_png(folder / f"{number:09d}.png") for number in numbers])


def fit(features: Tensor) -> GaussianFit:
    statistics = FeatureStatistics(features.shape[1])
    statistics.add(features)
    return statistics.fit()


def values(result: dict[str, Any]) -> dict[str, float]:
    return {metric["name"]: metric["value"] for metric in result["metrics"]}


@pytest.fixture(scope="module")
def network(folder: Path) -> FeatureNetwork:
    return feature_network(TINY, folder / "tiny.pth", "cpu")


def nearest_distances(points: Tensor, candidates: Tensor) -> Tensor:
    return (points.double()[:, None] - candidates.double()).square().sum(dim=2).sqrt().min(dim=1).values


def test_files_are_measured_as_their_pixels_are(
    command: Command, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = ("--metrics", "fid,kid,pr,dc,neighbours", "--heldout", folder / "heldout")
    result = command(*files(folder, "squeezenet"), *metrics)
    network = feature_network("squeezenet", folder / "squeezenet.pth", "cpu")
    samples, real, heldout = (
        network(pixels(folder / name, range(number)))
        for name, number in (("samples", NUM_SAMPLES), ("real", NUM_REAL), ("heldout", NUM_HELDOUT))
    )
    as_many = real[:NUM_SAMPLES]
    manifold = prdc(as_many, samples, k_manifold=3, k_density=5)
    kernel = kernel_distance(as_many, samples)
    expected = {
        "Frechet distance (squeezenet)": frechet_distance(fit(samples), fit(real)),
        "kernel distance (squeezenet)": kernel.mean,
        "precision (squeezenet)": manifold.precision,
        "recall (squeezenet)": manifold.recall,
        "density (squeezenet)": manifold.density,
        "coverage (squeezenet)": manifold.coverage,
    }
    assert values(result) == pytest.approx(expected, rel=1e-4)
    assert result["metrics"][0]["details"] == {"num_images": NUM_SAMPLES, "num_reference_images": NUM_REAL}
    assert result["metrics"][1]["details"]["num_reference_images"] == NUM_SAMPLES
    assert result["metrics"][1]["details"]["subset_size"] == kernel.subset_size == NUM_SAMPLES

    ours, theirs = nearest_distances(samples, real), nearest_distances(heldout, real)
    copying = result["copying"]
    assert copying["nearer_than_heldout"] == pytest.approx((ours[:, None] < theirs).double().mean().item())
    assert copying["very_near_share"] == pytest.approx((ours < theirs.min()).double().mean().item())
    assert copying["very_near_share"] >= 0.2  # the two copies
    assert copying["median_distance_samples"] == pytest.approx(np.median(ours), rel=1e-4)
    assert copying["median_distance_heldout"] == pytest.approx(np.median(theirs), rel=1e-4)

    picture = load_png(tmp_path / "out" / "nearest_pairs.png")
    for row, (sample_number, real_number) in enumerate(((8, 13), (9, 4))):  # the copies come first
        tiles = picture[:, 98 * row :, :][:, :96:12]
        assert torch.equal(tiles[:, :, :96:12], pixels(folder / "samples", [sample_number])[0])
        assert torch.equal(tiles[:, :, 96 + GAP :][:, :, :96:12], pixels(folder / "real", [real_number])[0])
    printed = capsys.readouterr().out
    for value in (*values(result).values(), copying["median_distance_samples"]):
        assert significant(value) in printed


def test_the_result_holds_all_conditions(command: Command, folder: Path, network: FeatureNetwork) -> None:
    flags = ("--metrics", "fid", "--resolution", 6, "--resize-filter", "box", "--reference-images", 12)
    result = command(*files(folder), *flags, "--num-images", 7, "--batch-size", 3)
    prepared = {"size": [6, 6], "resize": {"resolution": 6, "filter": "box"}, "formats": {"png": 10}, "lossy": False}
    found = {key: result["images"][key] for key in prepared}
    assert found == prepared
    assert result["images"]["path"] == str(folder / "samples")
    assert (result["num_images"], result["metric"], result["checkpoint"]) == (7, "fid", None)
    assert result["images"]["fingerprint"] == open_images(folder / "samples").fingerprint(7)
    assert result["notes"]["resized"] == 7
    reference = result["reference"]
    assert (reference["path"], reference["num_images"]) == (str(folder / "real"), 12)
    assert (reference["size"], reference["resize"]) == (prepared["size"], prepared["resize"])
    assert reference["fingerprint"] == open_images(folder / "real").fingerprint(12)
    assert reference["notes"]["resized"] == 12
    assert result["network"] == {"name": TINY, "fingerprint": network.fingerprint}
    conditions = result["conditions"]
    expected = {"batch_size": 3, "precision": "fp32", "device": "cpu", "num_processes": 1, "torch": torch.__version__}
    assert {key: conditions[key] for key in expected} == expected
    assert conditions["libraries"]["torch-fidelity"]
    images = [open_images(folder / name, resolution=6, resize_filter="box") for name in ("samples", "real")]
    both = [
        network(next(each.batches(range(number), 100)).images) for each, number in zip(images, (7, 12), strict=True)
    ]
    assert values(result)[FRECHET] == pytest.approx(frechet_distance(*map(fit, both)), rel=1e-4)


def test_a_cached_reference_gives_the_same_numbers(
    command: Command, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache.safetensors"
    flags = (*files(folder), "--metrics", "fid,kid,pr,dc,neighbours", "--heldout", folder / "heldout")
    without = command(*flags, out="without")
    first = command(*flags, "--reference-cache", cache, out="first")
    written = cache.read_bytes()
    again = command(*flags, "--reference-cache", cache, out="again")
    for key in ("metrics", "copying", "network"):
        assert without[key] == first[key] == again[key]
    assert cache.read_bytes() == written
    assert again["reference"]["statistics"] == str(cache)
    pictures = [(tmp_path / out / "nearest_pairs.png").read_bytes() for out in ("without", "first", "again")]
    assert len(set(pictures)) == 1

    fewer = (*files(folder)[:3], cache, *features(folder), "--metrics", "fid,kid,pr,dc")
    assert command(*fewer, out="file")["metrics"] == without["metrics"]  # the file alone
    with pytest.raises(UserError, match="num_images: 14 in the file, 9 asked"):
        command(*flags, "--reference-cache", cache, "--reference-images", 9, out="other")
    assert not (tmp_path / "other").exists()


@pytest.fixture
def png_of(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """What sample.py writes of the run, in one batch."""

    def write(name: str, *flags: object) -> Path:
        words = ("--checkpoint", run, "--out", tmp_path / name, "--batch-size", 20, *flags)
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, words)])
        sample.main()
        return tmp_path / name

    return write


@pytest.mark.parametrize("flags", [(), ("--seed", 7), ("--sampler", "ddim", "--steps", 2)])
def test_samples_are_measured_as_the_files_of_them_are(
    command: Command, png_of: Callable[..., Path], folder: Path, run: Path, flags: tuple[object, ...]
) -> None:
    beside = ("--reference", folder / "real", *features(folder), "--batch-size", 20)
    model = command("--checkpoint", run, "--metrics", "fid,pr", "--num-images", 20, *beside, *flags, out="model")
    png = png_of("png", "--num-images", 20, *flags)
    stored = command("--images", png, "--metrics", "fid,pr", *beside, out="files")
    assert model["metrics"] == stored["metrics"]
    assert model["num_images"] == stored["num_images"] == 20
    plain = command("--checkpoint", run, "--metrics", "fid", "--num-images", 20, *beside, out="plain")
    assert (values(plain)[FRECHET] == values(model)[FRECHET]) == (not flags)


def test_an_evaluation_of_a_run_is_kept_in_it_with_times(
    folder: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    beside = ("--reference", folder / "real", *features(folder))
    flags = ("--checkpoint", run, "--metrics", "fid,time", "--num-images", 5, "--batch-size", 3, "--seed", 4, *beside)
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags)])
        evaluate.main()
    results = [json.loads((run / "evaluations" / name / RESULT_FILE).read_text()) for name in ("0001", "0002")]
    assert [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()] == results
    assert results[0]["metrics"] == results[1]["metrics"]
    result = results[0]
    assert [(timing["batch_size"], timing["evaluations_per_image"]) for timing in result["time"]] == [(1, 4), (3, 4)]
    for timing in result["time"]:
        for stage in ("sampling", "decoding", "total"):
            assert 0 < timing[stage]["lower"] <= timing[stage]["median"] <= timing[stage]["upper"]
        assert timing["sampling"]["median"] < timing["total"]["upper"]
        assert timing["num_batches"] >= 5
        assert timing["num_warmup"] >= 1
        assert timing["conditions"]["precision"] == "fp32"
    assert result["evaluations_per_image"] == 4
    assert result["checkpoint"] == str(run / "checkpoints" / "step_000000001")
    assert result["stage_seconds"] == {"images to shards": 5.0, "diffusion GAN training": 60.0}
    assert (result["images"]["kind"], result["images"]["first_seed"]) == ("samples", 4)
    printed = capsys.readouterr().out
    assert "Time for an image on cpu" in printed
    assert f"a line in {run / 'evaluations.jsonl'}" in printed


def test_a_classifier_score_needs_no_real_images(command: Command, folder: Path, network: FeatureNetwork) -> None:
    result = command("--images", folder / "real", *features(folder), "--metrics", "is")
    score = classifier_score(network.features_and_logits(pixels(folder / "real", range(NUM_REAL))).logits)
    (metric,) = result["metrics"]
    assert metric["name"] == f"classifier score ({TINY})"
    assert (metric["value"], metric["std"]) == pytest.approx((score.mean, score.std), rel=1e-4)
    assert "reference" not in result


def test_shards_and_their_urls_are_measured_as_the_folder_they_were_made_of(
    command: Command, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("samples", "real"):
        write_shards(ImageFolder(folder / name), tmp_path / name, Preparation(8), samples_per_shard=4)
    flags = ("--metrics", "fid,neighbours", *features(folder))
    shards = command("--images", tmp_path / "samples", "--reference", tmp_path / "real", *flags, out="shards")
    assert values(shards) == pytest.approx(values(command(*files(folder), "--metrics", "fid")), rel=1e-4)
    assert shards["reference"]["fingerprint"] == open_images(tmp_path / "real").fingerprint()
    picture = load_png(tmp_path / "shards" / "nearest_pairs.png")[:, :96:12]
    nearest = picture[:, :, 96 + GAP :][:, :, :96:12]
    assert any(torch.equal(nearest, image) for image in pixels(folder / "real", [13, 4]))
    monkeypatch.setenv("LDGAN_CACHE", str(tmp_path / "cache"))
    urls = (f"file://{tmp_path}/{name}" for name in ("samples", "real"))
    fetched = command("--images", next(urls), "--reference", next(urls), *flags, out="fetched")
    assert values(fetched) == values(shards)
    assert fetched["images"]["path"] == f"file://{tmp_path}/samples"


def test_the_time_alone_is_of_no_number_of_images(command: Command, run: Path) -> None:
    result = command("--checkpoint", run, "--metrics", "time", "--batch-size", 1)
    assert [timing["batch_size"] for timing in result["time"]] == [1]
    assert {"num_images", "metrics", "seconds", "reference"}.isdisjoint(result)


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> TrainedClassifier:
    """A judge that was never trained, in place of the trained one."""
    torch.manual_seed(0)
    model = DigitClassifier()
    model.head.weight.data.mul_(10)
    judge = TrainedClassifier(model.eval(), heldout_accuracy=1.0, num_train=1, num_heldout=1, seconds=0.0)
    monkeypatch.setattr(evaluate, "load_judge", lambda *_, **__: judge)
    return judge


def test_digits_of_a_model_are_counted(command: Command, judge: TrainedClassifier, tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", side=32, num_classes=10)
    flags = ("--metrics", "modes,labels", "--num-images", 12, "--batch-size", 12)
    result = command("--checkpoint", run, *flags, out="all")
    model = load_model(run)
    labels = [number % 10 for number in range(12)]
    read = judge_images(judge.model, model.decode(model.sample(range(12), labels)))
    assert result["modes"]["samples"]["num_covered"] == len(read.modes.unique()) > 1
    assert result["modes"]["samples"]["num_images"] == result["modes"]["real_images"]["num_images"] == 12
    right = read.digits == torch.tensor(labels)[:, None]
    expected = [*right.double().mean(dim=0).tolist(), right.all(dim=1).double().mean().item()]
    assert list(result["label_accuracy"].values()) == pytest.approx(expected)
    assert sum(expected[:3]) > 0
    assert result["conditions"]["labels"] == "all"
    assert "metrics" not in result

    threes = command("--checkpoint", run, *flags, "--labels", "3", out="threes")
    read = judge_images(judge.model, model.decode(model.sample(range(12), [3] * 12)))
    assert threes["label_accuracy"]["red"] == pytest.approx((read.digits[:, 0] == 3).double().mean().item())


def test_modes_of_files_are_counted(command: Command, judge: TrainedClassifier, tmp_path: Path) -> None:
    images = smooth_noise(15, seed=5, side=32)
    result = command("--images", save(tmp_path / "images", images), "--metrics", "modes", "--num-images", 11)
    assert result["modes"]["samples"]["num_images"] == result["num_images"] == 11
    modes = judge_images(judge.model, images[:11]).modes
    assert result["modes"]["samples"]["num_covered"] == len(modes.unique()) > 1


@pytest.mark.parametrize(
    ("num_classes", "side", "metrics", "message"),
    [
        (10, 8, "modes", "samples: images of 8x8 px, and digits are read at 32x32 px"),
        (4, 32, "labels", "--metrics labels is for models of the 1,000 classes of stacked_mnist or the 10 of mnist"),
    ],
)
def test_a_model_of_no_digits_is_not_judged(
    command: Command, tmp_path: Path, num_classes: int, side: int, metrics: str, message: str
) -> None:
    run = save_run(tmp_path / "run", side, num_classes)
    with pytest.raises(UserError, match=message):
        command("--checkpoint", run, "--metrics", metrics)
    assert not (tmp_path / "out").exists()


def test_metrics_are_a_list() -> None:
    assert metric_names("modes,labels") == ["modes", "labels"]
    assert metric_names("pr,fid,pr") == ["pr", "fid"]
    for text in ("modes,fdi", "fid,", "", "FID"):
        with pytest.raises(
            argparse.ArgumentTypeError, match=r"^there is no metric '.*', only fid, kid, is, pr, dc, nei"
        ):
            metric_names(text)


@pytest.mark.parametrize(
    ("metrics", "number"),
    [("fid", 50_000), ("is,modes", 50_000), ("modes", 26_000), ("labels,modes", 26_000), ("modes,time", 26_000)],
)
def test_numbers_of_samples_are_those_of_papers(parse: Callable[..., Any], metrics: str, number: int) -> None:
    run = ("--checkpoint", "run", "--reference", "real", "--metrics", metrics)
    assert parse(*run).num_images == number
    assert parse(*run, "--num-images", 3).num_images == 3


def test_features_are_those_of_inception_unless_another_network_is_named(parse: Callable[..., Any]) -> None:
    run = ("--checkpoint", "run", "--metrics", "is")
    for words, expected in (
        ((), ("inception", None)),
        (("--inception-weights", "file"), ("inception", Path("file"))),
        (("--features", "alexnet", "--feature-weights", "file"), ("alexnet", Path("file"))),
    ):
        flags = parse(*run, *words)
        assert (flags.features, flags.feature_weights) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--images samples --metrics fid --reference real", "samples: results are not kept among images; give --out"),
        ("--checkpoint run --metrics is,fid,pr", "--metrics fid and pr compares with real images; give --reference"),
        ("--checkpoint run --metrics neighbours", "--metrics neighbours compares with real images; give --reference"),
        ("--checkpoint run --metrics neighbours --reference real.npz", "real.npz: --metrics neighbours shows images"),
        ("--checkpoint run --metrics neighbours --reference a.safetensors", "give the images as --reference"),
        ("--checkpoint run --metrics fid --reference real --heldout test", "test: held-out images serve --metrics nei"),
        ("--images samples --out out --metrics time", "time, labels and text are of a model; give --checkpoint RUN"),
        ("--images samples --out out --metrics modes,labels", "time, labels and text are of a model"),
        ("--checkpoint run --metrics time --out tests", "tests: exists already; choose another --out"),
        (
            "--checkpoint run --metrics is --features alexnet --inception-weights x",
            "--inception-weights are not those of --features alexnet",
        ),
    ],
)
def test_flags_that_contradict_each_other_are_refused(
    parse: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, words: str, message: str
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as error:
        parse(*words.split())
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--metrics fid", "one of the arguments --checkpoint --images is required"),
        ("--images a --checkpoint b --metrics fid", "not allowed with argument"),
        ("--checkpoint run", "the following arguments are required: --metrics"),
        ("--checkpoint run --metrics fid,psnr", f"there is no metric 'psnr', only {', '.join(METRICS)}"),
        ("--checkpoint run --metrics fid --num-images 0", "0 is not at least 1"),
        ("--checkpoint run --metrics fid --resize-filter nearest", "invalid choice: 'nearest'"),
    ],
)
def test_flags_that_make_no_sense_are_refused(
    parse: Callable[..., Any], capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    with pytest.raises(SystemExit) as error:
        parse(*words.split())
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be measured: what is wrong has to be said before."""
    monkeypatch.setattr(evaluate, "measure", lambda *_: pytest.fail("images were measured"))


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--num-images": 11}, "samples: holds 10 images, and 11 are asked; ask for no more than there are"),
        ({"--reference-images": 15}, "real: holds 14 images, and 15 are asked"),
        ({"--images": "nowhere"}, "nowhere: does not exist; give a folder"),
        ({"--reference": "nowhere"}, "nowhere: does not exist"),
        ({"--reference": "nowhere.npz"}, "nowhere.npz: no such file of statistics"),
        ({"--reference": "large"}, "large: images of 9x9 px, and those that are measured have 8x8 px"),
        ({"--metrics": "neighbours", "--heldout": "large"}, "large: images of 9x9 px, and those that are measured"),
        ({"--metrics": "is"}, "--metrics is needs a classifier, and squeezenet is none; leave it out"),
        ({"--feature-weights": "nan.pth"}, "feature network squeezenet: gives NaN or infinity"),
        ({"--feature-weights": "nowhere.pth"}, "nowhere.pth: no such file of weights"),
        ({"--features": "inception"}, "not the weights of inception"),
        ({"--reference-cache": "cache.npz"}, "cache.npz: statistics are kept as .safetensors only"),
        ({"--metrics": "modes"}, "samples: images of 8x8 px, and digits are read at 32x32 px"),
    ],
)
def test_what_does_not_belong_together_is_said_before_anything_is_measured(
    command: Command, folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    save(tmp_path / "large", smooth_noise(4, seed=0, side=9))
    weights = torch.load(folder / "squeezenet.pth", weights_only=True)
    torch.save(weights | {"features.0.bias": torch.full((64,), torch.nan)}, tmp_path / "nan.pth")
    places = {"--images": folder / "samples", "--reference": folder / "real", "--metrics": "fid"}
    places |= {"--features": "squeezenet", "--feature-weights": folder / "squeezenet.pth"}
    paths = {"--images", "--reference", "--heldout", "--feature-weights", "--reference-cache"}
    places |= {flag: tmp_path / value if flag in paths else value for flag, value in changes.items()}
    with pytest.raises(UserError) as error:
        command(*(word for pair in places.items() for word in pair))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large", "nan.pth"]


def test_images_of_several_sizes_are_refused_or_scaled(command: Command, folder: Path, tmp_path: Path) -> None:
    mixed = shutil.copytree(folder / "samples", tmp_path / "mixed")
    save_png(mixed / "000000006.png", smooth_noise(1, seed=3, side=12)[0])
    flags = ("--images", mixed, "--reference", folder / "real", *features(folder), "--metrics", "fid")
    with pytest.raises(UserError, match=r"000000006\.png has 12 x 12 pixels, and .* has 8 x 8 pixels.*--resolution"):
        command(*flags)
    assert not (tmp_path / "out").exists()
    assert command(*flags, "--num-images", 6, out="before")["num_images"] == 6
    assert command(*flags, "--resolution", 8, out="scaled")["notes"]["resized"] == 1


def test_unreadable_files_stop_or_are_skipped_and_counted(
    command: Command, folder: Path, network: FeatureNetwork, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = shutil.copytree(folder / "samples", tmp_path / "damaged")
    (damaged / "000000002.png").write_bytes((damaged / "000000002.png").read_bytes()[:50])
    flags = ("--images", damaged, "--reference", folder / "real", *features(folder), "--metrics", "fid")
    with pytest.raises(UserError, match=r"000000002\.png cannot be read .*mend it, or add --skip-unreadable$"):
        command(*flags, "--num-images", 8)
    with pytest.raises(UserError, match="1 of the first 10 images cannot be read, which leaves fewer than the 10"):
        command(*flags, "--skip-unreadable")
    assert not (tmp_path / "out").exists()
    result = command(*flags, "--skip-unreadable", "--num-images", 8)
    assert result["num_images"] == result["metrics"][0]["details"]["num_images"] == 8
    assert (result["notes"]["num_unreadable"], result["notes"]["unreadable"]) == (1, [str(damaged / "000000002.png")])
    samples = network(pixels(folder / "samples", [0, 1, 3, 4, 5, 6, 7, 8]))
    real = network(pixels(folder / "real", range(NUM_REAL)))
    assert values(result)[FRECHET] == pytest.approx(frechet_distance(fit(samples), fit(real)), rel=1e-4)
    assert "note: images: 1 unreadable\n" in capsys.readouterr().out


def test_grey_transparent_and_lossy_images_are_measured_and_counted(
    command: Command, folder: Path, network: FeatureNetwork, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, others = smooth_noise(7, seed=6), tmp_path / "others"
    others.mkdir()
    as_rgb = []
    for number, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        picture = Image.fromarray(image)
        if number < 2:
            picture = picture.convert("L")
        elif number < 5:
            picture.putalpha(128)
        picture.save(others / f"{number:09d}.png")
        alpha = 128 / 255 if 2 <= number < 5 else 1.0
        as_rgb.append(np.asarray(picture.convert("RGB")) * alpha + 255 * (1 - alpha))
    expected = torch.from_numpy(np.stack(as_rgb)).round().to(torch.uint8).permute(0, 3, 1, 2)
    found = next(open_images(others).batches(range(7), 7)).images
    assert (found.int() - expected.int()).abs().max() <= 1

    flags = ("--reference", folder / "real", *features(folder), "--metrics", "fid")
    result = command("--images", others, *flags)
    assert {key: result["notes"][key] for key in ("grey", "alpha", "16-bit", "resized", "num_unreadable")} == {
        **{"grey": 2, "alpha": 3, "16-bit": 0, "resized": 0, "num_unreadable": 0}
    }
    real = network(pixels(folder / "real", range(NUM_REAL)))
    assert values(result)[FRECHET] == pytest.approx(frechet_distance(fit(network(found)), fit(real)), rel=1e-4)
    printed = capsys.readouterr().out
    assert "note: images: 2 grey, 3 alpha\n" in printed
    assert "stored with loss" not in printed

    for number, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        (others / f"{number:09d}.png").unlink()
        Image.fromarray(image).save(others / f"{number:09d}.jpg", quality=75)
    lossy = command("--images", others, *flags, out="lossy")
    assert (lossy["images"]["lossy"], lossy["images"]["formats"]) == (True, {"jpg": 7})
    assert "note: images: stored with loss (jpg), which shifts distances\n" in capsys.readouterr().out


def test_results_among_images_are_no_images_the_next_time(command: Command, folder: Path, tmp_path: Path) -> None:
    before = sorted((folder / "samples").rglob("*"))
    command(*files(folder), "--metrics", "fid")
    assert sorted((folder / "samples").rglob("*")) == before
    with pytest.raises(UserError, match="out: exists already"):
        command(*files(folder), "--metrics", "fid")


def test_two_processes_measure_what_one_does(command: Command, folder: Path, tmp_path: Path) -> None:
    flags = (
        *files(folder),
        "--metrics",
        "fid,kid,pr,dc,neighbours",
        "--heldout",
        folder / "heldout",
        "--batch-size",
        4,
    )
    one = command(*flags)
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    words = map(str, (*flags, "--reference-cache", tmp_path / "cache.safetensors", "--out", tmp_path / "two"))
    result = subprocess.run(
        (*launch, "ldgan/evaluate.py", *words), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Quality and coverage") == 1
    two = json.loads((tmp_path / "two" / RESULT_FILE).read_text())
    assert values(two) == pytest.approx(values(one), rel=1e-3)
    assert two["copying"]["nearer_than_heldout"] == one["copying"]["nearer_than_heldout"]
    assert (one["conditions"]["num_processes"], two["conditions"]["num_processes"]) == (1, 2)
    for name in ("neighbours.png", "nearest_pairs.png"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    again = command(*flags, "--reference-cache", tmp_path / "cache.safetensors", out="again")
    assert values(again) == pytest.approx(values(one), rel=1e-3)


def test_an_error_is_one_line_and_status_2() -> None:
    words = ("ldgan/evaluate.py", "--checkpoint", "runs/nowhere", "--metrics", "fid")
    result = subprocess.run(
        (sys.executable, *words), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 2
    assert result.stderr == "error: --metrics fid compares with real images; give --reference DATA\n"
    assert result.stdout == ""
