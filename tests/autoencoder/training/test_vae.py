"""The two steps of stage 1: whose weights move, by which gradient, and when."""

from __future__ import annotations

import copy
import itertools
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from safetensors.numpy import load_file
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from autoencoder import train
from autoencoder.models.autoencoder import AutoencoderKL
from autoencoder.models.discriminator import PatchDiscriminator
from autoencoder.models.perceptual import PERCEPTUAL_NETWORKS, PerceptualDistance
from autoencoder.training.vae import (
    AdversarialConfig,
    Adversary,
    AutoencoderTrainer,
    LogVariance,
    LossConfig,
    Players,
)
from data_prep.images import encode_image
from data_prep.loader import ImageDataset
from data_prep.shards import ShardSet, ShardWriter
from ldgan.engine.accumulation import Accumulation
from ldgan.engine.cli import UserError
from ldgan.engine.config import load_config
from ldgan.engine.ema import EMA
from ldgan.engine.images import error_maps
from ldgan.engine.philox import Random, key_of

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[3]
BATCH_SIZE, SEED, HALFLIFE_IMAGES = 4, 3, 16
PERCEPTUAL_WEIGHT, ADVERSARIAL_WEIGHT = 0.7, 0.5


class Edges(nn.Module):
    """A stand-in for a perceptual distance: squared distance of horizontal differences."""

    def forward(self, images: Tensor, reference: Tensor) -> Tensor:
        return (images - reference).diff(dim=-1).square().mean(dim=(1, 2, 3))


@dataclass
class Game:
    """Tiny players under gradient descent: with rate 1 a step moves weights by minus their gradient."""

    trainer: AutoencoderTrainer
    players: Players

    @property
    def autoencoder(self) -> AutoencoderKL:
        return self.players.autoencoder

    @property
    def adversary(self) -> Adversary:
        assert self.players.adversary is not None
        return self.players.adversary

    @property
    def discriminator(self) -> PatchDiscriminator:
        return self.adversary.discriminator


@pytest.fixture
def new_game(tiny_autoencoder: Any) -> Any:
    def build(
        *,
        num_micro_batches: int = 1,
        loss: LossConfig | None = None,
        perceptual: bool = False,
        adversarial: AdversarialConfig | None = None,
        lr: float = 1.0,
    ) -> Game:
        autoencoder, loss = tiny_autoencoder(), loss or LossConfig()
        log_variance = LogVariance() if loss.learned_variance else None
        learned = [*autoencoder.parameters(), *(log_variance.parameters() if log_variance else ())]
        players = Players(
            autoencoder,
            torch.optim.SGD(learned, lr),
            EMA(autoencoder, HALFLIFE_IMAGES, rampup_ratio=None),
            log_variance,
        )
        if adversarial is not None:
            discriminator = PatchDiscriminator(image_channels=3, base_channels=4, num_layers=1)
            players.adversary = Adversary(discriminator, torch.optim.SGD(discriminator.parameters(), lr))
        trainer = AutoencoderTrainer(
            Accumulation(Accelerator(cpu=True), num_micro_batches, BATCH_SIZE, SEED),
            players,
            PerceptualDistance(Edges(), name="edges", min_size=1) if perceptual else None,
            loss=loss,
            perceptual_weight=PERCEPTUAL_WEIGHT,
            adversarial=adversarial or AdversarialConfig(),
        )
        return Game(trainer, players)

    return build


def game_of(**changes: Any) -> AdversarialConfig:
    return AdversarialConfig(weight=ADVERSARIAL_WEIGHT, **changes)


def images(number: int = 0, batch_size: int = BATCH_SIZE) -> Tensor:
    return torch.rand(batch_size, 3, 8, 8, generator=torch.Generator().manual_seed(number)) * 2 - 1


def batches(*numbers: int, batch_size: int = BATCH_SIZE) -> Any:
    return iter([{"image": images(number, batch_size)} for number in numbers])


def weights(network: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def leave_gradients(network: nn.Module) -> None:
    """What an earlier step leaves behind; it must have no part in the next one."""
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)


def gradients(network: nn.Module, loss: Tensor) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, list(network.parameters()))])


def losses(game: Game, x: Tensor, noise: Random, adversary: Adversary | None = None) -> dict[str, Tensor]:
    return game.trainer.autoencoder_losses(x, game.trainer.reconstruct(x, noise), adversary)


@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_the_loss_without_extras_equals_its_sum_by_hand(new_game: Any, distance: str) -> None:
    game, x = new_game(loss=LossConfig(distance=distance, kl_weight=0.3)), images()
    terms = losses(game, x, Random(key_of(1), "cpu"))

    mean, log_variance = game.autoencoder.encoder(x).chunk(2, dim=1)
    std = (log_variance / 2).exp()
    difference = game.autoencoder.decoder(mean + std * Random(key_of(1), "cpu").normal(mean.shape)) - x
    pixels = difference.abs().mean() if distance == "l1" else difference.square().mean()
    kl = kl_divergence(Normal(mean, std), Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(terms, {"loss": pixels + 0.3 * kl, "reconstruction": pixels, "kl": kl})


@pytest.mark.parametrize("kind", ["hinge", "non-saturating"])
def test_the_loss_with_all_terms_equals_its_sum_by_hand(new_game: Any, kind: str) -> None:
    loss = LossConfig(kl_weight=0.3, learned_variance=True)
    game, x = new_game(loss=loss, perceptual=True, adversarial=game_of(kind=kind)), images()
    game.players.log_variance.value.data.fill_(-0.4)
    terms = losses(game, x, Random(key_of(1), "cpu"), game.adversary)

    reconstruction = game.autoencoder(x, Random(key_of(1), "cpu").normal((4, 2, 4, 4)))
    pixels = (reconstruction.images - x).abs().mean()
    perceptual = (reconstruction.images - x).diff(dim=-1).square().mean()
    likelihood = (pixels + PERCEPTUAL_WEIGHT * perceptual) / math.exp(-0.4) - 0.4
    logits = game.discriminator(reconstruction.images)
    adversarial = -logits.mean() if kind == "hinge" else F.softplus(-logits).mean()
    last = game.autoencoder.decoder.conv_out.weight
    norms = [torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (likelihood, adversarial)]
    ratio, kl = norms[0] / (norms[1] + 1e-4), reconstruction.posterior.kl().mean()
    expected = {
        "loss": likelihood + 0.3 * kl + ADVERSARIAL_WEIGHT * ratio * adversarial,
        "reconstruction": pixels,
        "perceptual": perceptual,
        "log_variance": torch.tensor(-0.4),
        "kl": kl,
        "adversarial": adversarial,
        "adaptive_weight": ratio,
    }
    torch.testing.assert_close(terms, expected)
    torch.testing.assert_close(  # the adaptive weight counts as a constant
        gradients(game.autoencoder, terms["loss"]), gradients(game.autoencoder, expected["loss"])
    )


def test_without_the_adaptive_weight_the_adversarial_loss_has_its_weight_alone(new_game: Any) -> None:
    game = new_game(loss=LossConfig(kl_weight=0.0), adversarial=game_of(adaptive=False))
    terms = losses(game, images(), Random(key_of(1), "cpu"), game.adversary)
    torch.testing.assert_close(terms["loss"], terms["reconstruction"] + ADVERSARIAL_WEIGHT * terms["adversarial"])
    assert "adaptive_weight" not in terms


def test_the_adaptive_weight_makes_both_losses_pull_in_proportion_at_the_last_layer(new_game: Any) -> None:
    game, x = new_game(loss=LossConfig(kl_weight=0.0), adversarial=game_of()), images()
    terms = losses(game, x, Random(key_of(1), "cpu"), game.adversary)
    last = game.autoencoder.decoder.conv_out.weight
    both, alone = (torch.autograd.grad(terms[k], last, retain_graph=True)[0] for k in ("loss", "reconstruction"))
    # The small constant in its denominator makes it a little less.
    assert (both - alone).norm() / alone.norm() == pytest.approx(ADVERSARIAL_WEIGHT, rel=0.05)


def test_the_autoencoders_step_moves_the_autoencoder_alone(new_game: Any) -> None:
    game = new_game(adversarial=game_of())
    start, before = weights(game.autoencoder), copy.deepcopy(game.discriminator.state_dict())
    for parameter in game.discriminator.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    terms, reconstructions = game.trainer.autoencoder_step(1, [images()], game.adversary)
    assert not torch.equal(weights(game.autoencoder), start)
    assert not torch.equal(weights(game.players.ema.model), start)
    torch.testing.assert_close(game.discriminator.state_dict(), before, rtol=0, atol=0)
    assert all((parameter.grad == 3.0).all() for parameter in game.discriminator.parameters())
    assert not any(tensor.requires_grad for tensor in (*terms.values(), *reconstructions))


def test_the_adversarial_loss_reaches_encoder_and_decoder(new_game: Any) -> None:
    game = new_game(adversarial=game_of(adaptive=False))
    terms = losses(game, images(), Random(key_of(1), "cpu"), game.adversary)
    gradient = torch.autograd.grad(terms["adversarial"], list(game.autoencoder.parameters()))
    assert all(part.any() for part in gradient)


def test_the_discriminators_step_moves_the_discriminator_alone(new_game: Any) -> None:
    game = new_game(adversarial=game_of())
    before, start = copy.deepcopy(game.autoencoder.state_dict()), weights(game.discriminator)
    fakes = game.trainer.reconstruct(images(), Random(key_of(1), "cpu")).images.detach()
    real_logits, fake_logits = game.discriminator(images()), game.discriminator(fakes)
    loss = F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()
    gradient = gradients(game.discriminator, loss)
    leave_gradients(game.discriminator)
    terms = game.trainer.discriminator_step(game.adversary, [images()], [fakes])
    torch.testing.assert_close(terms, {"discriminator": loss.detach()})
    torch.testing.assert_close(weights(game.discriminator), start - gradient)
    for network in (game.autoencoder, game.players.ema.model):
        torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
        assert all(parameter.grad is None for parameter in network.parameters())


def test_the_game_begins_at_its_first_step(new_game: Any) -> None:
    game = new_game(adversarial=game_of(start_step=3), lr=0.1)
    names, moved = [], []
    for step in range(1, 6):
        start = weights(game.discriminator)
        names.append(set(game.trainer.step(step, batches(step))))
        moved.append(not torch.equal(weights(game.discriminator), start))
    plain = {"loss", "reconstruction", "kl"}
    both = plain | {"adversarial", "adaptive_weight", "discriminator"}
    assert moved == [False, False, True, True, True]
    assert names == [plain, plain, both, both, both]


def test_one_pass_through_the_autoencoder_serves_both_players(new_game: Any) -> None:
    game = new_game(adversarial=game_of(), perceptual=True, lr=0.1)
    passes: dict[str, int] = dict.fromkeys(("encoder", "decoder", "perceptual"), 0)

    def count(name: str) -> Any:
        def hook(*_: object) -> None:
            passes[name] += 1

        return hook

    game.autoencoder.encoder.register_forward_hook(count("encoder"))
    game.autoencoder.decoder.register_forward_hook(count("decoder"))
    game.trainer._perceptual.register_forward_hook(count("perceptual"))
    judged: list[Tensor] = []
    game.discriminator.register_forward_hook(lambda _, given, __: judged.append(given[0]))
    game.trainer.step(1, batches(0))
    assert passes == {"encoder": 1, "decoder": 1, "perceptual": 1}
    by_autoencoder, by_discriminator = judged
    assert torch.equal(by_discriminator, torch.cat([images(), by_autoencoder]))
    assert not by_discriminator.requires_grad


def test_the_log_variance_descends_its_gradient(new_game: Any) -> None:
    game = new_game(loss=LossConfig(learned_variance=True), lr=0.5)
    value = 0.0
    for step in range(1, 4):
        terms = game.trainer.step(step, batches(step))
        assert terms["log_variance"].item() == pytest.approx(value, rel=1e-5)  # the one that the loss was made of
        distance = terms["reconstruction"].item()
        value -= 0.5 * (1 - distance * math.exp(-value))
        assert game.players.log_variance.value.item() == pytest.approx(value, rel=1e-5)
    assert value != 0.0


def test_micro_batches_give_the_mean_of_their_gradients_to_both_players(new_game: Any) -> None:
    loss = LossConfig(learned_variance=True)
    game = new_game(num_micro_batches=2, loss=loss, perceptual=True, adversarial=game_of())
    halves = [images(0, 2), images(1, 2)]
    starts = weights(game.autoencoder), weights(game.discriminator)
    autoencoder_gradients, discriminator_gradients = [], []
    for number, x in enumerate(halves):
        reconstruction = game.trainer.reconstruct(x, Random(key_of(SEED, "posterior"), "cpu", step=5, part=number))
        terms = game.trainer.autoencoder_losses(x, reconstruction, game.adversary)
        autoencoder_gradients.append(gradients(game.autoencoder, terms["loss"]))
        real_logits, fake_logits = game.discriminator(x), game.discriminator(reconstruction.images.detach())
        judgement = F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()
        discriminator_gradients.append(gradients(game.discriminator, judgement))
    leave_gradients(game.autoencoder)
    leave_gradients(game.discriminator)
    game.trainer.step(5, iter([{"image": x} for x in halves]))
    for network, start, parts in (
        (game.autoencoder, starts[0], autoencoder_gradients),
        (game.discriminator, starts[1], discriminator_gradients),
    ):
        torch.testing.assert_close(weights(network), start - (parts[0] + parts[1]) / 2)


def test_two_micro_batches_are_one_batch(new_game: Any) -> None:
    # Without noise, which each micro-batch draws for itself; and the adaptive weight is that of a micro-batch.
    ends = []
    for number, halves in ((1, [images()]), (2, list(images().chunk(2)))):
        game = new_game(
            num_micro_batches=number,
            loss=LossConfig(learned_variance=True),
            perceptual=True,
            adversarial=game_of(adaptive=False),
            lr=0.1,
        )
        nn.init.constant_(game.autoencoder.encoder.conv_out.bias[2:], -1e4)  # variance exp(-30)
        terms = game.trainer.step(1, iter([{"image": x} for x in halves]))
        ends.append((terms, *map(weights, (game.autoencoder, game.discriminator, game.players.log_variance))))
    torch.testing.assert_close(*ends)


def test_the_average_is_its_closed_form_after_each_step(new_game: Any) -> None:
    game = new_game(lr=0.1)
    average, decay = weights(game.autoencoder), 0.5 ** (BATCH_SIZE / HALFLIFE_IMAGES)
    for step in range(1, 4):
        game.trainer.step(step, batches(step))
        average = decay * average + (1 - decay) * weights(game.autoencoder)
        torch.testing.assert_close(weights(game.players.ema.model), average)


def test_a_step_depends_on_seed_and_step_alone(new_game: Any) -> None:
    ends = []
    for step in (1, 1, 2):
        game = new_game(adversarial=game_of())
        torch.rand(len(ends))  # the global generator moves on
        game.trainer.step(step, batches(0))
        ends.append((weights(game.autoencoder), weights(game.discriminator)))
    assert all(map(torch.equal, ends[0], ends[1]))
    assert not any(map(torch.equal, ends[0], ends[2]))


def test_one_batch_is_learned_by_heart(new_game: Any) -> None:
    game = new_game(loss=LossConfig(kl_weight=1e-6))
    game.players.optimizer = torch.optim.AdamW(game.autoencoder.parameters(), lr=1e-2)
    smooth = F.interpolate(images()[:, :, :2, :2], scale_factor=4, mode="bilinear")
    history = [game.trainer.step(step, itertools.repeat({"image": smooth})) for step in range(1, 81)]
    assert history[-1]["reconstruction"] < history[0]["reconstruction"] / 4


def test_the_discriminator_learns_to_tell_images_from_poor_reconstructions(new_game: Any) -> None:
    game = new_game(adversarial=game_of(), lr=0.1)
    fakes = images(1).mean(dim=(2, 3), keepdim=True).expand(-1, -1, 8, 8)
    for _ in range(60):
        terms = game.trainer.discriminator_step(game.adversary, [images()], [fakes])
    assert terms["discriminator"] < 0.2  # 2 for one that knows nothing
    assert game.discriminator(images()).mean() > 0.8
    assert game.discriminator(fakes).mean() < -0.8


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of 8 x 8 pixels."""
    folder = tmp_path_factory.mktemp("data") / "images"
    with ShardWriter(folder, "images", details={"resolution": 8}) as writer:
        for x in ((images(1, 12) + 1) * 127.5).byte().permute(0, 2, 3, 1).numpy():
            writer.write({"png": encode_image(Image.fromarray(x), "png", quality=100)})
    return folder


SETTINGS = (
    *("run.num_steps=5", "run.batch_size=4", "run.num_micro_batches=2", "run.num_threads=1", "flips=true"),
    *("run.checkpoint_every_steps=2", "run.log_every_steps=1", "optimizer.warmup_steps=2"),
    *("network.base_channels=8", "network.channel_multipliers=[1,2]", "loss.learned_variance=true"),
    *("adversarial.weight=0.5", "adversarial.start_step=2", "adversarial.base_channels=4", "adversarial.num_layers=1"),
)


def run_training(monkeypatch: pytest.MonkeyPatch, data: Path, run: Path, *settings: str) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", f"data={data}", f"run.dir={run}", *SETTINGS, *settings])
    train.main()


def last_state(run: Path) -> dict[str, np.ndarray]:
    """Every tensor of the last checkpoint, as file/name -> array."""
    files = sorted((run / "checkpoints" / "step_000000005").glob("*.safetensors"))
    return {f"{file.stem}/{name}": array for file in files for name, array in load_file(file).items()}


def test_a_run_that_was_stopped_ends_in_the_same_weights(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_training(monkeypatch, shards, tmp_path / "whole")
    step = AutoencoderTrainer.step

    def stop_at_four(trainer: AutoencoderTrainer, number: int, data: Any) -> dict[str, Tensor]:
        if number == 4:
            raise KeyboardInterrupt
        return step(trainer, number, data)

    with monkeypatch.context() as stopping:
        stopping.setattr(AutoencoderTrainer, "step", stop_at_four)
        with pytest.raises(KeyboardInterrupt):
            run_training(stopping, shards, tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "summary.json").exists()
    run_training(monkeypatch, shards, tmp_path / "stopped")

    whole, resumed = last_state(tmp_path / "whole"), last_state(tmp_path / "stopped")
    things = {"autoencoder", "autoencoder_ema", "optimizer", "log_variance", "discriminator", "discriminator_optimizer"}
    assert {name.split("/")[0] for name in whole} == things
    assert whole.keys() == resumed.keys()
    for name, array in whole.items():
        np.testing.assert_array_equal(array, resumed[name], err_msg=name)
    assert whole["log_variance/value"] != 0
    # One more parameter than the autoencoder has, and four of five steps of the discriminator.
    num_parameters = len(list(train.build_players(config_of(shards, tmp_path), CPU).autoencoder.parameters()))
    assert f"optimizer/state.{num_parameters}.exp_avg" in whole
    assert whole["discriminator_optimizer/state.0.step"] == 4


def config_of(data: Path, run: Path, *settings: str) -> train.TrainConfig:
    return load_config(train.TrainConfig, None, [f"data={data}", f"run.dir={run}", *SETTINGS, *settings])


def test_two_processes_compute_what_one_computes_with_two_micro_batches(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_training(monkeypatch, shards, tmp_path / "one")
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    command = (*launch, "autoencoder/train.py", f"data={shards}", f"run.dir={tmp_path / 'two'}", *SETTINGS)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    one, two = last_state(tmp_path / "one"), last_state(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, array in one.items():
        np.testing.assert_allclose(two[name], array, rtol=1e-4, atol=1e-5, err_msg=name)


def test_without_an_adversarial_weight_there_is_no_discriminator(tmp_path: Path) -> None:
    players = train.build_players(config_of(tmp_path, tmp_path, "adversarial.weight=0"), CPU)
    assert players.adversary is None
    assert set(train.things_to_save(players)) == {"autoencoder", "autoencoder_ema", "optimizer", "log_variance"}


def test_extras_leave_the_autoencoders_first_weights_alone(tmp_path: Path) -> None:
    starts = []
    for settings in ((), ("adversarial.weight=0", "loss.learned_variance=false")):
        torch.manual_seed(0)
        starts.append(weights(train.build_players(config_of(tmp_path, tmp_path, *settings), CPU).autoencoder))
    assert torch.equal(*starts)


def test_the_discriminators_rate_warms_up_when_the_game_begins(tmp_path: Path) -> None:
    settings = ("run.num_steps=100", "adversarial.start_step=11", "optimizer.warmup_steps=5", "optimizer.lr=2")
    optimizer = ("adversarial.optimizer.lr=1", "adversarial.optimizer.warmup_steps=10")
    config = config_of(tmp_path, tmp_path, *settings, *optimizer)
    players = train.build_players(config, CPU)
    assert players.adversary is not None
    rates = {}
    for step in (1, 11, 20, 100):
        train.set_learning_rates(config, step, players)
        groups = (players.optimizer.param_groups, players.adversary.optimizer.param_groups)
        rates[step] = tuple(group[0]["lr"] for group in groups)
    assert rates[1][0] == pytest.approx(2 / 5)
    assert rates[11][1] == pytest.approx(1 / 10)
    assert rates[20][1] == pytest.approx(1)
    assert rates[100] == pytest.approx((2 * 0.01, 0.01))


def test_a_preview_is_originals_reconstructions_and_their_error(shards: Path, tiny_autoencoder: Any) -> None:
    rows = train.preview(tiny_autoencoder().eval(), ImageDataset(ShardSet.open(shards)))
    originals, reconstructions, errors = rows.chunk(3)
    assert torch.equal(originals, ((images(1, 12) + 1) * 127.5).byte())
    assert torch.equal(errors, error_maps(reconstructions, originals))
    assert errors.any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["adversarial.num_layers=2"], "images of 8 px are too small for the discriminator, it takes 12 px or more"),
        (["network.channel_multipliers=[1,1,1,1,1]"], "images of 8 px are no multiple of the autoencoder's factor 16"),
        (["perceptual.network=lpips"], "no perceptual network 'lpips'; there are lpips-alex, lpips-squeeze, lpips-vgg"),
        (["perceptual.backbone_weights=x.pth"], r"without a network; give perceptual\.network=lpips-alex"),
        (["adversarial.start_step=6"], "start_step 6 comes after the last of 5 steps"),
        (["loss.kl_weight=-1"], "a loss has a weight below 0"),
    ],
)
def test_settings_that_cannot_work_stop_before_anything_is_written(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        run_training(monkeypatch, shards, tmp_path / "run", *settings)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


LATENT_SHAPES = {
    "celebahq256": (256, (3, 64, 64)),
    "cifar10": (32, (4, 16, 16)),
    "emoji64": (64, (4, 16, 16)),
    "folder256": (256, (4, 32, 32)),
    "lsun_church256": (256, (4, 32, 32)),
    "stacked_mnist": (32, (4, 8, 8)),
    "stacked_mnist_full": (32, (4, 8, 8)),
}


def test_the_table_above_has_every_config_of_an_autoencoder() -> None:
    stems = {path.stem for path in (ROOT / "configs" / "autoencoder").glob("*.yaml")}
    assert {stem for stem in stems if not stem.startswith("light_")} == set(LATENT_SHAPES)


@pytest.mark.parametrize("name", LATENT_SHAPES)
def test_each_config_builds_networks_for_latents_of_its_shape(name: str) -> None:
    config = load_config(train.TrainConfig, ROOT / "configs" / "autoencoder" / f"{name}.yaml", [])
    resolution, latent_shape = LATENT_SHAPES[name]
    with torch.device("meta"):
        players = train.build_players(config, torch.device("meta"))
        x, noise = torch.empty(2, 3, resolution, resolution), torch.empty(2, *latent_shape)
        assert players.autoencoder.latent_shape(resolution) == latent_shape
        assert players.autoencoder(x, noise).images.shape == x.shape
    assert config.perceptual.network in (*PERCEPTUAL_NETWORKS, "none")
    if players.adversary is not None:
        assert players.adversary.discriminator.min_size <= resolution
