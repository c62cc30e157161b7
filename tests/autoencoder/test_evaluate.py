"""The evaluation of an autoencoder: closed forms, many processes as one, and the command from end to end."""

from __future__ import annotations

import io
import json
import math
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from autoencoder import evaluate
from autoencoder.evaluation.reconstruction import MAX_PSNR, Evaluation, ImageMetric, LatentActivity, MeanOverImages
from autoencoder.inference.trained_autoencoder import KIND, WEIGHTS, fingerprint
from autoencoder.models.autoencoder import AutoencoderKL, Posterior
from autoencoder.models.perceptual import perceptual_network
from data_prep.loader import ImageDataset
from data_prep.shards import ShardSet, ShardWriter
from ldgan.engine.checkpoint import save_checkpoint
from ldgan.engine.cli import UserError
from ldgan.engine.config import to_dict
from ldgan.engine.images import error_maps, from_uint8, load_png, to_uint8
from ldgan.metrics.features import feature_network
from ldgan.metrics.frechet import FeatureStatistics, frechet_distance
from ldgan.metrics.pixels import psnr, ssim

SIDE, NUM_IMAGES = 32, 12


def grey_levels(seed: int = 0, num_images: int = NUM_IMAGES) -> Tensor:
    """Images, uint8 (N, 3, SIDE, SIDE), that stay 20 levels away from black and white."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(num_images, 3, 4, 4, generator=random)
    return (20 + 215 * nn.functional.interpolate(coarse, SIDE, mode="bilinear")).to(torch.uint8)


class Brighten:
    """An autoencoder whose latents are the pixels, and whose decoder adds ``levels`` of 255."""

    def __init__(self, levels: float = 0.0, std: float = 0.5) -> None:
        self.levels, self.log_variance = levels, 2 * math.log(std)
        self.latent_mean = torch.tensor([0.1, -0.2, 0.3])[:, None, None]
        self.latent_std = torch.tensor([0.5, 2.0, 0.7])[:, None, None]

    def encode(self, images: Tensor) -> Posterior:
        log_variance = torch.full_like(images, self.log_variance) - 2 * self.latent_std.log()
        return Posterior((images - self.latent_mean) / self.latent_std, log_variance)

    def decode(self, latents: Tensor) -> Tensor:
        return latents * self.latent_std + self.latent_mean + self.levels / 127.5


class ChannelMeans:
    """Features of which everything is known."""

    name, num_features = "means", 3

    def __call__(self, images: Tensor) -> Tensor:
        return images.float().mean(dim=(2, 3))


METRICS = {"psnr": ImageMetric("PSNR", "dB", "higher", psnr), "ssim": ImageMetric("SSIM", "", "higher", ssim)}


def new_evaluation(autoencoder: Brighten | AutoencoderKL, latent_shape: tuple[int, int, int]) -> Evaluation:
    return Evaluation(autoencoder, latent_shape, METRICS, ChannelMeans())


def statistics_of(features: Tensor) -> FeatureStatistics:
    result = FeatureStatistics(features.shape[1])
    result.add(features)
    return result


def evaluation_of(autoencoder: Brighten, images: Tensor) -> Evaluation:
    evaluation = new_evaluation(autoencoder, (3, SIDE, SIDE))
    for batch in images.split(5):
        evaluation.add_images(from_uint8(batch))
    return evaluation


def test_mean_and_standard_error_are_those_of_numpy() -> None:
    values = torch.randn(17, generator=torch.Generator().manual_seed(0)) * 3 + 20
    mean = MeanOverImages("cpu")
    for batch in values.split(5):
        mean.add(batch)
    assert mean.mean == pytest.approx(values.double().mean().item(), rel=1e-12)
    assert mean.standard_error == pytest.approx(np.std(values.double().numpy(), ddof=1) / 17**0.5, rel=1e-9)


def test_a_constant_error_gives_its_closed_forms() -> None:
    evaluation = evaluation_of(Brighten(levels=10.0), grey_levels())
    assert evaluation.means["psnr"].mean == pytest.approx(20 * math.log10(255 / 10), rel=1e-6)
    assert evaluation.means["psnr"].standard_error == pytest.approx(0.0, abs=1e-5)
    # Means of the features move by 10 each, and their covariance stays.
    distance = frechet_distance(*(evaluation.statistics[kind].fit() for kind in ("reconstructions", "images")))
    assert distance == pytest.approx(3 * 10**2, rel=1e-9)


def test_reconstructions_are_measured_as_they_are_stored() -> None:
    evaluation = evaluation_of(Brighten(levels=10.4), grey_levels())
    assert evaluation.means["psnr"].mean == pytest.approx(20 * math.log10(255 / 10), rel=1e-6)
    evaluation = evaluation_of(Brighten(levels=1000.0), torch.full((2, 3, SIDE, SIDE), 55, dtype=torch.uint8))
    assert evaluation.means["psnr"].mean == pytest.approx(20 * math.log10(255 / 200), rel=1e-6)


def test_latents_are_described_as_the_encoder_makes_them() -> None:
    images, autoencoder = grey_levels(), Brighten(std=0.3)
    images[:, 1] = 128  # a channel that tells nothing
    latents = evaluate.summarise_latents(evaluation_of(autoencoder, images))
    values = from_uint8(images).double()
    mean, variance = values.mean(dim=(0, 2, 3)), values.var(dim=(0, 2, 3), unbiased=False) + 0.3**2
    kl = kl_divergence(Normal(values, 0.3), Normal(0.0, 1.0)).mean(dim=(0, 2, 3))
    shift, scale = autoencoder.latent_mean.flatten(), autoencoder.latent_std.flatten()
    expected = {
        "raw_mean_per_channel": mean,
        "raw_std_per_channel": variance.sqrt(),
        "mean_per_channel": (mean - shift) / scale,
        "std_per_channel": variance.sqrt() / scale,
        "kl_nats_per_dimension_per_channel": kl,
        "inactive_share_per_channel": torch.tensor([0.0, 1.0, 0.0]),
    }
    for name, numbers in expected.items():
        np.testing.assert_allclose(latents[name], numbers.numpy(), rtol=1e-4, atol=1e-6, err_msg=name)
    assert latents["inactive_share"] == pytest.approx(1 / 3)
    assert latents["kl_nats_per_dimension"] == pytest.approx(kl.mean().item(), rel=1e-5)
    assert latents["shape"] == [3, SIDE, SIDE]


@pytest.mark.parametrize(("variance", "inactive"), [(0.0099, True), (0.0101, False)])
def test_a_dimension_is_active_from_a_variance_of_a_hundredth_on(variance: float, inactive: bool) -> None:
    mean = 3 + variance**0.5 * torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1)
    activity = LatentActivity((1, 1, 1), "cpu")
    activity.add(Posterior(mean, torch.full_like(mean, 5.0)))  # the posterior's own variance has no part in it
    assert activity.inactive.item() is inactive


def test_noise_in_the_place_of_latents_has_a_distance_of_its_own() -> None:
    evaluation = evaluation_of(Brighten(), grey_levels())
    noise = torch.zeros(4, 3, SIDE, SIDE)
    evaluation.add_prior_samples(noise)
    # Zero is the mean of the latents: all four images show `latent_mean`.
    pixels = to_uint8(evaluation.autoencoder.latent_mean.expand(4, 3, SIDE, SIDE))
    expected = statistics_of(ChannelMeans()(pixels)).sums
    torch.testing.assert_close(evaluation.statistics["prior_samples"].sums, expected)


def test_error_maps_are_grey_and_on_a_fixed_scale() -> None:
    images = torch.full((1, 3, 1, 3), 100, dtype=torch.uint8)
    reconstructions = images.clone()
    reconstructions[0, :, 0, 1] = torch.tensor([70, 100, 118], dtype=torch.uint8)  # 16 levels off, on average
    reconstructions[0, :, 0, 2] = 0
    expected = torch.tensor([0, 64, 255], dtype=torch.uint8).expand(1, 3, 1, 3)
    assert torch.equal(error_maps(reconstructions, images), expected)


def write_shards(folder: Path, images: Tensor) -> Path:
    with ShardWriter(folder, "images", samples_per_shard=5, details={"resolution": images.shape[-1]}) as writer:
        for image in images:
            buffer = io.BytesIO()
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "PNG")
            writer.write({"png": buffer.getvalue()})
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "heldout", grey_levels())


def save_autoencoder(folder: Path, autoencoder: AutoencoderKL, **description: object) -> Path:
    """A run with one checkpoint, as training leaves it."""
    network = {"kind": KIND, "config": {"network": to_dict(autoencoder.config)}, "latent_statistics": {}}
    save_checkpoint(folder / "checkpoints" / "step_000000004", {WEIGHTS: autoencoder}, network | description)
    return folder


@pytest.fixture
def autoencoder(tiny_autoencoder) -> AutoencoderKL:
    autoencoder = tiny_autoencoder(num_groups=2).eval()
    autoencoder.set_latent_statistics(torch.tensor([0.3, -0.1]), torch.tensor([0.5, 0.8]))
    return autoencoder


def measured_by_ranks(shards: Path, num_images: int, world_size: int) -> list[Tensor]:
    """The sums of each accumulator over simulated processes."""
    flags = Namespace(batch_size=4, workers=0)
    totals: list[Tensor] | None = None
    for rank in range(world_size):
        evaluation = new_evaluation(Brighten(levels=10.0), (3, SIDE, SIDE))
        process = SimpleNamespace(
            process_index=rank, num_processes=world_size, device=torch.device("cpu"), reduce=lambda sums, how: sums
        )
        evaluate.measure(process, evaluation, ImageDataset(ShardSet.open(shards)), num_images, flags)
        sums = [accumulator.sums for accumulator in evaluation.accumulators]
        totals = sums if totals is None else [total + part for total, part in zip(totals, sums)]
    return totals


@pytest.mark.parametrize("num_images", [2, 11])  # fewer than processes, and not a multiple
def test_processes_measure_together_what_one_measures_alone(shards: Path, num_images: int) -> None:
    one, three = (measured_by_ranks(shards, num_images, world_size) for world_size in (1, 3))
    assert one[0][0] == num_images
    torch.testing.assert_close(three, one, rtol=1e-9, atol=1e-9)


def test_noise_of_an_image_depends_on_its_number_alone(autoencoder: AutoencoderKL) -> None:
    evaluation = new_evaluation(autoencoder, autoencoder.latent_shape(SIDE))
    whole = torch.cat(list(evaluate.prior_noise(evaluation, range(7), 7)))
    parts = torch.cat(
        [*evaluate.prior_noise(evaluation, range(3), 2), *evaluate.prior_noise(evaluation, range(3, 7), 3)]
    )
    assert torch.equal(whole, parts)
    assert len(whole.flatten(1).unique(dim=0)) == 7


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs the command in this process, on the CPU."""

    def run(*arguments: object) -> None:
        monkeypatch.setattr(evaluate, "make_accelerator", lambda precision: Accelerator(cpu=True))
        monkeypatch.setattr(sys, "argv", ["autoencoder/evaluate.py", *map(str, arguments)])
        evaluate.main()

    return run


@pytest.fixture(scope="module")
def squeezenet_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, which serve LPIPS and the Frechet distance alike."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "squeezenet.safetensors"
    save_file(torchvision.models.squeezenet1_1(weights=None).state_dict(), path)
    return path


def test_the_command_reports_every_number_with_its_origin(
    tmp_path: Path, shards: Path, autoencoder: AutoencoderKL, squeezenet_weights: Path, command, capsys
) -> None:
    run = save_autoencoder(tmp_path / "run", autoencoder, data={"fingerprint": "another"})
    num_images = 9
    command(
        *("--autoencoder", run, "--data", shards, "--num-images", num_images, "--batch-size", 4),
        *("--perceptual", "lpips-squeeze", "--perceptual-weights", squeezenet_weights),
        *("--features", "squeezenet", "--feature-weights", squeezenet_weights),
    )
    folder = run / "evaluations" / "0001"
    result = json.loads((folder / "evaluation.json").read_text())
    printed = capsys.readouterr().out

    manifest = ShardSet.open(shards).manifest
    assert result["fingerprint"] == fingerprint(autoencoder)
    assert result["checkpoint"] == str(run / "checkpoints" / "step_000000004")
    reference = {"folder": str(shards), "fingerprint": manifest.fingerprint, "resolution": SIDE, "trained_on": False}
    metrics = result["metrics"]
    names = ["psnr", "ssim", "lpips-squeeze", "frechet_reconstructions", "frechet_prior_samples"]
    assert list(metrics) == names
    assert all((metric["num_images"], metric["reference"]) == (num_images, reference) for metric in metrics.values())
    assert result["left_out"] == []

    images = grey_levels()[:num_images]
    with torch.no_grad():
        reconstructions = to_uint8(autoencoder.decode(autoencoder.encode(from_uint8(images)).mean))
        (noise,) = evaluate.prior_noise(Evaluation(autoencoder, autoencoder.latent_shape(SIDE), {}, None), range(9), 9)
        samples = to_uint8(autoencoder.decode(noise))
    lpips = perceptual_network("lpips-squeeze", squeezenet_weights)
    features = feature_network("squeezenet", squeezenet_weights, "cpu")
    by_hand = {
        "psnr": psnr(reconstructions, images),
        "ssim": ssim(reconstructions, images),
        "lpips-squeeze": lpips(from_uint8(reconstructions), from_uint8(images)),
    }
    for name, values in by_hand.items():
        assert metrics[name]["value"] == pytest.approx(values.double().mean().item(), rel=1e-3), name
        assert metrics[name]["standard_error"] == pytest.approx(values.double().std().item() / 3, rel=1e-2), name
    for kind, others in (("reconstructions", reconstructions), ("prior_samples", samples)):
        distance = frechet_distance(*(statistics_of(features(batch)).fit() for batch in (others, images)))
        assert metrics[f"frechet_{kind}"]["value"] == pytest.approx(distance, rel=1e-2), kind

    assert metrics["frechet_reconstructions"]["name"] == "Frechet distance (squeezenet) of reconstructions"
    assert "FID" not in printed
    assert f"N = 9 images of {shards} (fingerprint {manifest.fingerprint[:12]})" in printed
    for name in names:
        assert f"{metrics[name]['value']:.4f}" in printed

    grid = load_png(folder / "reconstructions.png")
    tile = 3 * SIDE + 2  # enlarged three times, two pixels apart
    assert grid.shape == (3, 3 * tile - 2, 8 * tile - 2)
    assert torch.equal(grid[:, : 3 * SIDE : 3, tile : tile + 3 * SIDE : 3], images[1])
    assert (grid[:, tile : tile + 3 * SIDE : 3, : 3 * SIDE : 3].int() - reconstructions[0].int()).abs().max() <= 1
    assert load_png(folder / "prior_samples.png").shape == (3, 8 * tile - 2, 8 * tile - 2)


def test_without_networks_their_metrics_are_left_out_and_nothing_is_overwritten(
    tmp_path: Path, shards: Path, autoencoder: AutoencoderKL, command, capsys
) -> None:
    data = {"fingerprint": ShardSet.open(shards).manifest.fingerprint}
    run = save_autoencoder(tmp_path / "run", autoencoder, data=data)
    for out in ((), (), ("--out", tmp_path / "out")):
        # A checkpoint stands for its run.
        command("--autoencoder", run / "checkpoints" / "step_000000004", "--data", shards, *out)
    folders = [run / "evaluations" / "0001", run / "evaluations" / "0002", tmp_path / "out"]
    results = [json.loads((folder / "evaluation.json").read_text()) for folder in folders]
    history = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert history == results
    assert results[0]["metrics"] == results[1]["metrics"] == results[2]["metrics"]
    assert list(results[0]["metrics"]) == ["psnr", "ssim"]
    assert results[0]["num_images"] == NUM_IMAGES
    printed = capsys.readouterr().out
    for text in ("LPIPS (give --perceptual lpips-alex", "Frechet distances (give --features inception"):
        assert sum(text in line for line in printed.splitlines()) == 3
    assert "THE IMAGES IT WAS TRAINED ON" in printed
    assert results[0]["metrics"]["psnr"]["reference"]["trained_on"] is True


def test_a_folder_in_the_format_of_diffusers_gives_the_same_numbers(
    tmp_path: Path, shards: Path, autoencoder: AutoencoderKL, command
) -> None:
    run = save_autoencoder(tmp_path / "run", autoencoder, data={"fingerprint": "another"})
    autoencoder.save_diffusers(tmp_path / "diffusers")
    for path in (run, tmp_path / "diffusers"):
        command("--autoencoder", path, "--data", shards, "--out", tmp_path / f"{path.name}_results")
    ours, theirs = (
        json.loads((tmp_path / f"{name}_results" / "evaluation.json").read_text()) for name in ("run", "diffusers")
    )
    for name in ("psnr", "ssim"):
        assert theirs["metrics"][name]["value"] == pytest.approx(ours["metrics"][name]["value"], rel=1e-5)
    assert theirs["latents"]["std_per_channel"] == pytest.approx(ours["latents"]["std_per_channel"], rel=1e-5)
    assert theirs["metrics"]["psnr"]["reference"]["trained_on"] is None  # its config does not tell
    assert theirs["checkpoint"] == str(tmp_path / "diffusers")


def test_an_exact_reconstruction_counts_with_a_finite_psnr() -> None:
    metrics = evaluate.image_metrics(Namespace(perceptual=None), torch.device("cpu"))
    images = grey_levels(num_images=2)
    assert metrics["psnr"].compute(images, images).tolist() == [MAX_PSNR] * 2
    torch.testing.assert_close(metrics["psnr"].compute(images + 1, images), psnr(images + 1, images))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-images", "13"], "heldout: holds 12 images, and 13 are asked"),
        (["--num-images", "1"], "heldout: holds 12 images, and 1 are asked; give from 2 to all of them"),
        (["--out", "{tmp_path}"], "exists already; choose another --out"),
        (["--feature-weights", "file"], "--feature-weights says not .*; give --features NAME too"),
        (["--perceptual-weights", "file"], "--perceptual-weights says not .*; give --perceptual NAME too"),
        (["--features", "alexnet"], "alexnet-owt-7be5be79.pth, and give --feature-weights FILE"),
        (["--features", "alexnet", "--inception-weights", "file"], "not those of --features alexnet"),
        (["--perceptual", "lpips"], "no perceptual network 'lpips'"),
    ],
)
def test_flags_that_make_no_sense_are_refused(
    tmp_path: Path,
    shards: Path,
    autoencoder: AutoencoderKL,
    command,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # where nothing was downloaded before
    run = save_autoencoder(tmp_path / "run", autoencoder)
    arguments = [argument.format(tmp_path=tmp_path) for argument in arguments]
    with pytest.raises(UserError, match=message):
        command("--autoencoder", run, "--data", shards, *arguments)
    assert [path.name for path in run.iterdir()] == ["checkpoints"]


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"image_channels": 1}, "heldout: images have 3 channels, and the autoencoder takes 1"),
        ({"channel_multipliers": [1] * 7}, "images of 32x32 px are no multiple of the autoencoder's factor 64"),
    ],
)
def test_images_of_another_kind_are_refused(
    tmp_path: Path, shards: Path, tiny_autoencoder, command, numbers: dict, message: str
) -> None:
    run = save_autoencoder(tmp_path / "run", tiny_autoencoder(**numbers))
    with pytest.raises(UserError, match=message):
        command("--autoencoder", run, "--data", shards)
    assert [path.name for path in run.iterdir()] == ["checkpoints"]


def test_latents_are_no_images(tmp_path: Path, autoencoder: AutoencoderKL, command) -> None:
    with ShardWriter(tmp_path / "latents", "latents", details={"resolution": SIDE}) as writer:
        writer.write({"npy": b""})
    run = save_autoencoder(tmp_path / "run", autoencoder)
    with pytest.raises(UserError, match="latents holds latents, but images are needed"):
        command("--autoencoder", run, "--data", tmp_path / "latents")
