"""Distilling a light decoder: what one step does, and the command from end to end on the CPU."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

from autoencoder import distill
from autoencoder.evaluation.reconstruction import ImageMetric
from autoencoder.inference.latents import describe_latents, pack_moments
from autoencoder.inference.light_decoder import light_decoder_folder, load_light_decoder
from autoencoder.inference.trained_autoencoder import KIND, WEIGHTS, fingerprint, load_autoencoder
from autoencoder.models.autoencoder import AutoencoderKL
from autoencoder.models.light_decoder import LightDecoder
from autoencoder.training.distillation import DistillationTrainer, agreement_metrics, measure_agreement
from data_prep.shards import ShardWriter
from ldgan.engine.accumulation import Accumulation
from ldgan.engine.checkpoint import read_description, save_checkpoint
from ldgan.engine.cli import UserError
from ldgan.engine.config import to_dict
from ldgan.engine.ema import EMA
from ldgan.engine.images import load_png, to_uint8
from ldgan.engine.philox import Random, key_of

BATCH_SIZE, SEED, NUM_STEPS, NUM_LATENTS = 4, 3, 4, 6

AutoencoderFactory = Callable[..., AutoencoderKL]


def new_light_decoder(seed: int = 0) -> LightDecoder:
    torch.manual_seed(seed)
    return LightDecoder(latent_channels=2, image_channels=3, widths=[6], num_blocks=[1])


def new_trainer(
    autoencoder: AutoencoderKL,
    light: LightDecoder,
    optimizer: torch.optim.Optimizer,
    *,
    perceptual: nn.Module | None = None,
    num_micro_batches: int = 1,
    ema: EMA[LightDecoder] | None = None,
) -> DistillationTrainer:
    return DistillationTrainer(
        Accumulation(Accelerator(cpu=True), num_micro_batches, BATCH_SIZE, SEED),
        autoencoder.eval().requires_grad_(False),
        light,
        optimizer,
        ema or EMA(light, 1000, rampup_ratio=None),
        perceptual,  # type: ignore[arg-type]  # any distance will do
        distance="l2",
        perceptual_weight=0.5,
    )


def descent(light: LightDecoder) -> torch.optim.Optimizer:
    """Rate 1: a step moves weights by minus their gradient."""
    return torch.optim.SGD(light.parameters(), lr=1.0)


def latents(number: int = 0, batch_size: int = BATCH_SIZE) -> dict[str, Tensor]:
    mean, std = torch.randn(2, batch_size, 2, 4, 4, generator=torch.Generator().manual_seed(number))
    return {"mean": mean, "std": 0.1 * std.abs()}


def weights(network: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


class FarthestPixel(nn.Module):
    """Stands for a perceptual network: the largest difference of an image, (B,)."""

    def forward(self, images: Tensor, reference: Tensor) -> Tensor:
        return (images - reference).abs().amax(dim=(1, 2, 3))


def linear_decoder(autoencoder: AutoencoderKL) -> AutoencoderKL:
    """The same autoencoder, but each pixel is a linear function of the 3x3 latents around it."""
    torch.manual_seed(5)
    convolution = nn.Conv2d(2, 3, 3, padding=1)
    autoencoder.decoder = nn.Sequential(convolution, nn.Upsample(scale_factor=2.0))  # type: ignore[assignment]
    return autoencoder


def test_targets_are_the_full_decoding_of_posterior_samples(tiny_autoencoder: AutoencoderFactory) -> None:
    autoencoder, light, batch = tiny_autoencoder(), new_light_decoder(), latents()
    autoencoder.set_latent_statistics(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0]))
    z, targets = new_trainer(autoencoder, light, descent(light)).pairs(batch, Random(key_of(1), "cpu"))
    noise = Random(key_of(1), "cpu").normal(z.shape)
    assert torch.equal(z, batch["mean"] + batch["std"] * noise)
    raw = z * torch.tensor([0.5, 3.0])[:, None, None] + torch.tensor([1.0, -2.0])[:, None, None]
    torch.testing.assert_close(targets, autoencoder.decoder(raw))


def test_images_are_encoded_as_stored_latents_would_be(tiny_autoencoder: AutoencoderFactory) -> None:
    autoencoder, light = tiny_autoencoder(), new_light_decoder()
    autoencoder.set_latent_statistics(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0]))
    trainer = new_trainer(autoencoder, light, descent(light))
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    posterior = autoencoder.encode(images)
    stored = trainer.pairs({"mean": posterior.mean, "std": posterior.std}, Random(key_of(1), "cpu"))
    torch.testing.assert_close(trainer.pairs({"image": images}, Random(key_of(1), "cpu")), stored)


@pytest.mark.parametrize("perceptual", [None, FarthestPixel()])
def test_the_loss_equals_its_sum_by_hand(tiny_autoencoder: AutoencoderFactory, perceptual: nn.Module | None) -> None:
    light, z, targets = new_light_decoder(), latents()["mean"], torch.rand(BATCH_SIZE, 3, 8, 8)
    trainer = new_trainer(tiny_autoencoder(), light, descent(light), perceptual=perceptual)
    difference = light(z) - targets
    pixels, farthest = difference.square().mean(), difference.abs().flatten(1).max(dim=1).values.mean()
    expected = {"loss": pixels, "reconstruction": pixels}
    if perceptual is not None:
        expected |= {"loss": pixels + 0.5 * farthest, "perceptual": farthest}
    torch.testing.assert_close(trainer.losses(z, targets), expected)


def test_a_step_moves_the_light_decoder_alone_by_the_mean_gradient(tiny_autoencoder: AutoencoderFactory) -> None:
    autoencoder, light, batches = tiny_autoencoder(), new_light_decoder(), [latents(0, 2), latents(1, 2)]
    trainer = new_trainer(autoencoder, light, descent(light), num_micro_batches=2)
    before, start = fingerprint(autoencoder), weights(light)
    each = []
    for number, batch in enumerate(batches):
        random = Random(key_of(SEED, "posterior"), "cpu", step=5, part=number)
        loss = trainer.losses(*trainer.pairs(batch, random))["loss"]
        each.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(light.parameters()))]))
    for parameter in light.parameters():
        parameter.grad = torch.ones_like(parameter)  # left behind by an earlier step, to be forgotten
    trainer.step(5, iter(batches))
    torch.testing.assert_close(weights(light), start - (each[0] + each[1]) / 2)
    assert fingerprint(autoencoder) == before
    assert all(parameter.grad is None for parameter in autoencoder.parameters())


def test_the_average_follows_the_weights(tiny_autoencoder: AutoencoderFactory) -> None:
    light = new_light_decoder()
    ema = EMA(light, halflife_images=2 * BATCH_SIZE, rampup_ratio=None)
    trainer = new_trainer(tiny_autoencoder(), light, torch.optim.SGD(light.parameters(), lr=0.1), ema=ema)
    average = weights(light)
    for step in range(1, 4):
        trainer.step(step, iter([latents(step)]))
        average = 0.5**0.5 * average + (1 - 0.5**0.5) * weights(light)
        torch.testing.assert_close(weights(ema.model), average)


def test_a_linear_decoder_is_learnt(tiny_autoencoder: AutoencoderFactory) -> None:
    light = new_light_decoder()
    optimizer = torch.optim.AdamW(light.parameters(), lr=1e-2, weight_decay=0.0)
    trainer = new_trainer(linear_decoder(tiny_autoencoder()), light, optimizer)
    batches = (latents(number) for number in itertools.count())  # never the same latents twice
    losses = [trainer.step(step, batches)["loss"].item() for step in range(1, 151)]
    assert losses[-1] < losses[0] / 100


def test_agreement_is_measured_on_stored_images_at_posterior_means(tiny_autoencoder: AutoencoderFactory) -> None:
    autoencoder, light = tiny_autoencoder().eval(), new_light_decoder().eval()
    error = ImageMetric("error", "", "lower", lambda x, y: (x.double() - y.double()).abs().mean(dim=(1, 2, 3)))
    batches = [latents(0, 3), latents(1, 1)]
    measured = measure_agreement(light, autoencoder, batches, [error])[0]
    with torch.no_grad():
        means = torch.cat([batch["mean"] for batch in batches])
        by_hand = error.compute(to_uint8(light(means)), to_uint8(autoencoder.decode(means)))
    assert measured.mean == pytest.approx(by_hand.mean().item(), rel=1e-3)
    assert measured.standard_error == pytest.approx(by_hand.std().item() / 2, rel=1e-2)


def test_equal_images_do_not_make_the_mean_infinite(tiny_autoencoder: AutoencoderFactory) -> None:
    autoencoder = tiny_autoencoder().eval()
    [mean] = measure_agreement(autoencoder, autoencoder, [latents()], agreement_metrics(None))  # type: ignore[arg-type]
    assert mean.mean == 100.0


@pytest.fixture
def folder(tmp_path: Path, tiny_autoencoder: AutoencoderFactory) -> Path:
    """A finished ``autoencoder``, and posteriors of its as ``latents``."""
    autoencoder = tiny_autoencoder()
    description = {"kind": KIND, "config": {"network": to_dict(autoencoder.config)}, "latent_statistics": {}}
    save_checkpoint(tmp_path / "autoencoder", {WEIGHTS: autoencoder}, description)
    write_latents(tmp_path / "latents", autoencoder)
    return tmp_path


def write_latents(folder: Path, autoencoder: AutoencoderKL) -> None:
    details = describe_latents(autoencoder, 8, flips=False)
    with ShardWriter(folder, "latents", details=details) as writer:
        for number in range(NUM_LATENTS):
            batch = latents(number, 1)
            writer.write(pack_moments(torch.cat([batch["mean"][0], batch["std"][0]]).half(), label=-1))


@pytest.fixture
def run_distill(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs the command on ``folder`` in this process, with settings added to or replacing the test's own."""

    def run(run_dir: str, *settings: str) -> None:
        defaults = (
            *(f"autoencoder={folder / 'autoencoder'}", f"latents={folder / 'latents'}", f"run.dir={folder / run_dir}"),
            *(f"run.num_steps={NUM_STEPS}", f"run.batch_size={BATCH_SIZE}", "run.num_threads=1"),
            *("run.checkpoint_every_steps=2", "run.log_every_steps=1", "run.keep_checkpoints=9"),
            *("network.widths=[6]", "network.num_blocks=[1]", "optimizer.warmup_steps=1"),
        )
        monkeypatch.setattr("sys.argv", ["distill.py", *defaults, *settings])
        distill.main()

    return run


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, optimizer included."""
    files = sorted(checkpoint.glob("*.safetensors"))
    assert files, f"{checkpoint} holds no tensors"
    return {f"{file.stem}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def checkpoint(run: Path, step: int = NUM_STEPS) -> Path:
    return run / "checkpoints" / f"step_{step:09d}"


def test_a_stopped_run_resumes_bit_for_bit(folder: Path, run_distill: Callable[..., None]) -> None:
    run_distill("whole", f"out={folder / 'light_whole'}")
    checkpoint(folder / "stopped", step=2).parent.mkdir(parents=True)
    for name in ("config.yaml", f"checkpoints/{checkpoint(folder, 2).name}"):
        source, target = folder / "whole" / name, folder / "stopped" / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    config = (folder / "stopped" / "config.yaml").read_text()
    config = config.replace(str(folder / "whole"), str(folder / "stopped")).replace("light_whole", "light_stopped")
    (folder / "stopped" / "config.yaml").write_text(config)

    run_distill("stopped", f"out={folder / 'light_stopped'}")
    for stopped, whole in (("stopped", "whole"), ("light_stopped", "light_whole")):
        ends = [folder / name if "light" in name else checkpoint(folder / name) for name in (stopped, whole)]
        torch.testing.assert_close(tensors(ends[0]), tensors(ends[1]), rtol=0, atol=0)
    before = tensors(checkpoint(folder / "whole", 2))
    assert any(not torch.equal(before[name], tensor) for name, tensor in tensors(ends[1]).items())


def test_the_light_decoder_is_found_beside_its_autoencoder(folder: Path, run_distill: Callable[..., None]) -> None:
    run_distill("run")
    light = load_light_decoder(folder / "autoencoder")
    saved = load_file(checkpoint(folder / "run") / "light_decoder_ema.safetensors")
    torch.testing.assert_close(dict(light.state_dict()), saved, rtol=0, atol=0)
    description = read_description(light_decoder_folder(folder / "autoencoder"))
    assert description["agreement"]["num_latents"] == NUM_LATENTS
    assert description["agreement"]["latents"] == str(folder / "latents")
    assert 0 < description["agreement"]["metrics"]["PSNR"]["mean"] < 60


def test_previews_show_the_full_decoding_above_the_light_one(folder: Path, run_distill: Callable[..., None]) -> None:
    run_distill("run")
    grid = load_png(folder / "run" / "samples" / f"decoders_{NUM_STEPS:09d}.png")
    decoders = (load_autoencoder(folder / "autoencoder"), load_light_decoder(folder / "autoencoder"))
    for number in range(NUM_LATENTS):
        mean = latents(number, 1)["mean"].half().float()  # as it is stored
        full, light = (to_uint8(decoder.decode(mean))[0].int() for decoder in decoders)
        # Cells of 8 px and 2 px between; sums for a batch may round another way.
        rows = grid[..., 10 * number : 10 * number + 8].split([8, 2, 8, 2, 8], dim=1)
        torch.testing.assert_close(rows[0].int(), full, rtol=0, atol=1)
        torch.testing.assert_close(rows[2].int(), light, rtol=0, atol=1)
        errors = (light - full).abs().float().mean(dim=0) * 255 / 64
        torch.testing.assert_close(rows[4][0].float(), errors.clamp(max=255), rtol=0, atol=8)


def test_the_same_command_again_changes_nothing(
    folder: Path, run_distill: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    run_distill("run")
    light = light_decoder_folder(folder / "autoencoder")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    run_distill("run")
    assert f"{light}: finished before; nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before

    shutil.rmtree(light)  # as if the run had been killed between its last checkpoint and this
    run_distill("run")
    assert {
        path: path.stat().st_mtime_ns for path in (folder / "run" / "checkpoints").rglob("*")
    }.items() <= before.items()
    load_light_decoder(folder / "autoencoder")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["optimizer.lr=1e-3"], "autoencoder/light_decoder: exists already, and other settings made it"),
        (["out={folder}/latents"], "latents: exists already"),
        (["out={folder}/new", "latents={folder}/foreign"], "latents of another autoencoder"),
        (["out={folder}/new", "latents=https://host/set?token=pw"], "latents=https://host/set was given with"),
        (["out={folder}/new", "flips=true"], "holds no latents of mirror images"),
        (["out={folder}/new", "network.widths=[]"], r"network.widths is \[\]"),
        (["out={folder}/new", "perceptual.network=vgg"], "no perceptual network 'vgg'"),
        (["out={folder}/new", "num_evaluation_latents=1"], "num_evaluation_latents is 1; give 2 or more"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    folder: Path,
    run_distill: Callable[..., None],
    tiny_autoencoder: AutoencoderFactory,
    settings: list[str],
    message: str,
) -> None:
    run_distill("run", "run.num_steps=1")
    write_latents(folder / "foreign", tiny_autoencoder(seed=1))
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError, match=message):
        run_distill("other", *(setting.format(folder=folder) for setting in settings))
    assert sorted(folder.rglob("*")) == before
