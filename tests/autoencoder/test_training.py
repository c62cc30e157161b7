"""One step of the autoencoder: the loss by hand, the gradient of the mean, the average, and that it learns."""

from __future__ import annotations

import itertools

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from autoencoder.networks import AutoencoderKL
from autoencoder.training import AutoencoderTrainer, LossConfig
from ldgan.engine.ema import EMA
from ldgan.engine.seeding import generator

BATCH_SIZE, SEED, HALFLIFE_IMAGES = 4, 3, 16


def new_autoencoder() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        image_channels=3,
        latent_channels=2,
        base_channels=8,
        channel_multipliers=[1, 2],
        num_res_blocks=1,
        mid_attention=False,
        dropout=0.0,
    )


def new_trainer(
    autoencoder: AutoencoderKL,
    optimizer: torch.optim.Optimizer,
    *,
    num_micro_batches: int = 1,
    ema: EMA | None = None,
    loss: LossConfig | None = None,
) -> AutoencoderTrainer:
    return AutoencoderTrainer(
        Accelerator(cpu=True),
        autoencoder,
        optimizer,
        ema or EMA(autoencoder, HALFLIFE_IMAGES, rampup_ratio=None),
        loss=loss or LossConfig(),
        num_micro_batches=num_micro_batches,
        batch_size=BATCH_SIZE,
        seed=SEED,
    )


def images(number: int = 0, batch_size: int = BATCH_SIZE) -> Tensor:
    return torch.rand(batch_size, 3, 8, 8, generator=torch.Generator().manual_seed(number)) * 2 - 1


def weights(network: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def leave_gradients(network: nn.Module) -> None:
    """What an earlier step leaves behind; it must have no part in the next one."""
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)


def gradients(network: nn.Module, loss: Tensor) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, list(network.parameters()))])


def descent(autoencoder: AutoencoderKL) -> torch.optim.Optimizer:
    """Rate 1: a step moves weights by minus their gradient."""
    return torch.optim.SGD(autoencoder.parameters(), lr=1.0)


@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_the_loss_equals_its_sum_by_hand(distance: str) -> None:
    autoencoder, x = new_autoencoder(), images()
    loss = LossConfig(distance=distance, kl_weight=0.3)
    terms = new_trainer(autoencoder, descent(autoencoder), loss=loss).losses(x, generator("cpu", 1))

    mean, log_variance = autoencoder.encoder(x).chunk(2, dim=1)
    std = (log_variance / 2).exp()
    difference = autoencoder.decoder(mean + std * torch.randn(mean.shape, generator=generator("cpu", 1))) - x
    pixels = difference.abs().mean() if distance == "l1" else difference.square().mean()
    kl = kl_divergence(Normal(mean, std), Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(terms, {"loss": pixels + 0.3 * kl, "reconstruction": pixels, "kl": kl})


def test_micro_batches_give_the_mean_of_their_gradients() -> None:
    autoencoder, batches = new_autoencoder(), [images(0, 2), images(1, 2)]
    trainer = new_trainer(autoencoder, descent(autoencoder), num_micro_batches=2)
    start = weights(autoencoder)
    each = [
        gradients(autoencoder, trainer.losses(x, generator("cpu", SEED, "posterior", 5, number))["loss"])
        for number, x in enumerate(batches)
    ]
    leave_gradients(autoencoder)
    trainer.step(5, iter({"image": x} for x in batches))
    torch.testing.assert_close(weights(autoencoder), start - (each[0] + each[1]) / 2)


def test_the_average_is_its_closed_form_after_each_step() -> None:
    autoencoder = new_autoencoder()
    ema = EMA(autoencoder, HALFLIFE_IMAGES, rampup_ratio=None)
    trainer = new_trainer(autoencoder, torch.optim.SGD(autoencoder.parameters(), lr=0.1), ema=ema)
    average, decay = weights(autoencoder), 0.5 ** (BATCH_SIZE / HALFLIFE_IMAGES)
    for step in range(1, 4):
        trainer.step(step, iter([{"image": images(step)}]))
        average = decay * average + (1 - decay) * weights(autoencoder)
        torch.testing.assert_close(weights(ema.model), average)


def test_a_step_depends_on_seed_and_step_alone() -> None:
    ends = []
    for step in (1, 1, 2):
        autoencoder = new_autoencoder()
        trainer = new_trainer(autoencoder, descent(autoencoder))
        torch.rand(len(ends))  # the global generator moves on
        trainer.step(step, iter([{"image": images()}]))
        ends.append(weights(autoencoder))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_one_batch_is_learned_by_heart() -> None:
    autoencoder = new_autoencoder()
    trainer = new_trainer(
        autoencoder, torch.optim.AdamW(autoencoder.parameters(), lr=1e-2), loss=LossConfig(kl_weight=1e-6)
    )
    smooth = nn.functional.interpolate(images()[:, :, :2, :2], scale_factor=4, mode="bilinear")
    batches = itertools.repeat({"image": smooth})
    losses = [trainer.step(step, batches)["reconstruction"].item() for step in range(1, 81)]
    assert losses[-1] < losses[0] / 4
