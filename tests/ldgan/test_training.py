"""The two steps: whose weights move, by which gradient, and when."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ldgan.data import Pixels
from ldgan.diffusion import Diffusion, vp_betas
from ldgan.engine.ema import EMA
from ldgan.engine.seeding import generator as random_generator
from ldgan.networks import Discriminator, Generator
from ldgan.training import DiffusionGANTrainer, LossConfig, PhasesConfig, Players

SHAPE, BATCH_SIZE, SEED = (2, 4, 4), 4, 7
SOURCE = Pixels(None, SHAPE)  # the trainer reads no dataset, it is handed batches


@dataclass
class Game:
    """Tiny players under gradient descent with rate 1: a step moves weights by minus their gradient."""

    trainer: DiffusionGANTrainer
    generator: Generator
    discriminator: Discriminator
    ema: EMA[Generator]


def new_game(
    *,
    num_micro_batches: int = 1,
    timestep_weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    phases: PhasesConfig | None = None,
    **loss: float,
) -> Game:
    torch.manual_seed(0)
    generator = Generator(
        channels=2,
        resolution=4,
        base_channels=8,
        channel_multipliers=[1],
        num_res_blocks=1,
        attention_resolutions=[],
        z_dim=3,
        num_mapping_layers=1,
        embedding_dim=8,
        dropout=0.0,
    )
    discriminator = Discriminator(channels=2, widths=[8, 8], embedding_dim=8)
    ema = EMA(generator, halflife_images=8, rampup_ratio=None)
    trainer = DiffusionGANTrainer(
        Accelerator(cpu=True),
        Diffusion(vp_betas(4)),
        Players(
            generator,
            discriminator,
            torch.optim.SGD(generator.parameters(), lr=1.0),
            torch.optim.SGD(discriminator.parameters(), lr=1.0),
            ema,
        ),
        loss=LossConfig(**loss),
        phases=phases or PhasesConfig(),
        timestep_weights=timestep_weights,
        num_micro_batches=num_micro_batches,
        batch_size=BATCH_SIZE,
        seed=SEED,
    )
    return Game(trainer, generator, discriminator, ema)


def data(number: int = 0, batch_size: int = BATCH_SIZE) -> Tensor:
    return torch.randn(batch_size, *SHAPE, generator=torch.Generator().manual_seed(number))


def weights(network: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def leave_gradients(network: nn.Module) -> None:
    """What an earlier step leaves behind; it must have no part in the next one."""
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)


def gradients(network: nn.Module, loss: Tensor) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, list(network.parameters()))])


def test_the_discriminators_step_moves_the_discriminator_alone() -> None:
    game = new_game(r1_every_steps=1)
    before = copy.deepcopy(game.generator.state_dict())
    start = weights(game.discriminator)
    game.trainer.discriminator_step(1, [data()])
    assert not torch.equal(weights(game.discriminator), start)
    for network in (game.generator, game.ema.model):
        torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
        assert all(parameter.grad is None for parameter in network.parameters())


def test_the_generators_step_moves_the_generator_and_its_average_alone() -> None:
    game = new_game()
    start, before = weights(game.generator), copy.deepcopy(game.discriminator.state_dict())
    sentinels = [torch.full_like(parameter, 3.0) for parameter in game.discriminator.parameters()]
    for parameter, sentinel in zip(game.discriminator.parameters(), sentinels):
        parameter.grad = sentinel.clone()
    game.trainer.generator_step(1, [data()], l1_weight=0.0, adversarial=True)
    assert not torch.equal(weights(game.generator), start)
    assert not torch.equal(weights(game.ema.model), start)
    torch.testing.assert_close(game.discriminator.state_dict(), before, rtol=0, atol=0)
    for parameter, sentinel in zip(game.discriminator.parameters(), sentinels):
        assert torch.equal(parameter.grad, sentinel)


def test_the_discriminator_trains_again_after_a_step_of_the_generator() -> None:
    game = new_game()
    game.trainer.generator_step(1, [data()], l1_weight=0.0, adversarial=True)
    start = weights(game.discriminator)
    game.trainer.discriminator_step(2, [data()])
    assert not torch.equal(weights(game.discriminator), start)


def test_r1_comes_with_exactly_every_third_step() -> None:
    game = new_game(r1_every_steps=3)
    penalised = [step for step in range(1, 10) if "r1" in game.trainer.discriminator_step(step, [data(step)])]
    assert penalised == [3, 6, 9]


def test_r1_is_half_gamma_times_the_squared_gradient_on_real_pairs() -> None:
    game, x_0 = new_game(r1_gamma=0.6), data()
    random = random_generator("cpu", "r1")
    r1 = game.trainer.discriminator_losses(x_0, random, penalise=True)["r1"]

    random = random_generator("cpu", "r1")  # the same t and noise again
    t = 1 + torch.multinomial(torch.ones(4), BATCH_SIZE, replacement=True, generator=random)
    noises = [torch.randn(x_0.shape, generator=random) for _ in range(2)]
    x_previous, x_t = Diffusion(vp_betas(4)).pair(x_0, t, *noises)
    x_previous.requires_grad_()
    (gradient,) = torch.autograd.grad(game.discriminator(x_previous, x_t, t).sum(), x_previous)
    torch.testing.assert_close(r1, 0.3 * gradient.square().sum(dim=(1, 2, 3)).mean())


@pytest.mark.parametrize("step", [1, 2])  # R1 on the second
def test_micro_batches_give_the_mean_of_their_gradients_to_the_discriminator(step: int) -> None:
    game, batches = new_game(num_micro_batches=2, r1_every_steps=2), [data(0, 2), data(1, 2)]
    start = weights(game.discriminator)
    each = []
    for number, x_0 in enumerate(batches):
        random = random_generator("cpu", SEED, "discriminator", step, number)
        losses = game.trainer.discriminator_losses(x_0, random, penalise=step == 2)
        each.append(gradients(game.discriminator, sum(losses.values(), torch.zeros(()))))
    leave_gradients(game.discriminator)
    game.trainer.discriminator_step(step, batches)
    torch.testing.assert_close(weights(game.discriminator), start - (each[0] + each[1]) / 2)


def test_micro_batches_give_the_mean_of_their_gradients_to_the_generator() -> None:
    game, batches = new_game(num_micro_batches=2), [data(0, 2), data(1, 2)]
    start = weights(game.generator)
    each = []
    for number, x_0 in enumerate(batches):
        random = random_generator("cpu", SEED, "generator", 1, number)
        losses = game.trainer.generator_losses(x_0, random, adversarial=True)
        each.append(gradients(game.generator, 0.7 * losses["l1"] + losses["generator"]))
    leave_gradients(game.generator)
    game.trainer.generator_step(1, batches, l1_weight=0.7, adversarial=True)
    torch.testing.assert_close(weights(game.generator), start - (each[0] + each[1]) / 2)


def test_the_average_is_its_closed_form_after_each_step() -> None:
    game = new_game()
    average, decay = weights(game.generator), 0.5 ** (BATCH_SIZE / 8)
    for step in range(1, 5):
        game.trainer.generator_step(step, [data(step)], l1_weight=1.0, adversarial=False)
        average = decay * average + (1 - decay) * weights(game.generator)
        torch.testing.assert_close(weights(game.ema.model), average)


def test_phases_follow_each_other() -> None:
    phases = PhasesConfig(pretraining_steps=2, discriminator_only_steps=2)
    game = new_game(phases=phases, l1_weight=1.0, r1_every_steps=100)
    batches = ({"image": data(number)} for number in itertools.count())
    terms, moved = [], []
    for step in range(1, 7):
        before = weights(game.generator), weights(game.discriminator)
        terms.append(set(game.trainer.step(step, SOURCE, batches, progress=0.0)))
        after = weights(game.generator), weights(game.discriminator)
        moved.append(tuple(not torch.equal(old, new) for old, new in zip(before, after)))
    both = {"discriminator", "l1", "generator"}
    assert terms == [{"l1"}, {"l1"}, {"discriminator"}, {"discriminator"}, both, both]
    assert moved == [(True, False)] * 2 + [(False, True)] * 2 + [(True, True)] * 2


def test_the_energy_score_is_weighted_and_reaches_the_generator_alone() -> None:
    game, x_0 = new_game(phases=PhasesConfig(pretraining_steps=1), energy_weight=3.0), data()
    start = weights(game.generator)
    losses = game.trainer.generator_losses(x_0, random_generator("cpu", SEED, "generator", 1, 0), adversarial=False)
    expected = start - gradients(game.generator, 3.0 * losses["energy"])
    leave_gradients(game.generator)
    game.trainer.step(1, SOURCE, iter([{"image": x_0}]), progress=0.0)
    torch.testing.assert_close(weights(game.generator), expected)
    assert all(parameter.grad is None for parameter in game.discriminator.parameters())


def test_the_l1_weight_falls_from_its_start_to_its_end() -> None:
    loss = LossConfig(l1_weight=2.0, l1_weight_final=1.0)
    assert loss.l1_weight_at(0.5) == pytest.approx(1.5)
    assert loss.l1_weight_at(0.0) + loss.l1_weight_at(1.0) == pytest.approx(3.0)
    assert loss.l1_weight_at(0.0) == pytest.approx(2.0, abs=0.01)
    assert LossConfig(l1_weight=0.3, l1_weight_final=0.3).l1_weight_at(0.9) == pytest.approx(0.3)


def test_a_step_depends_on_seed_and_step_alone() -> None:
    first, second = new_game(), new_game()
    torch.rand(17)  # the global generator moved on
    for game in (first, second):
        game.trainer.step(5, SOURCE, iter([{"image": data()}]), progress=0.5)
    assert torch.equal(weights(first.generator), weights(second.generator))
    assert torch.equal(weights(first.discriminator), weights(second.discriminator))
    other = new_game()
    other.trainer.step(6, SOURCE, iter([{"image": data()}]), progress=0.5)
    assert not torch.equal(weights(first.generator), weights(other.generator))


def test_every_step_of_the_process_is_trained_on() -> None:
    # With x_0 known, T = 4 and 4,000 draws, each t = 1..4 must come up in a quarter of the pairs.
    game, seen = new_game(), []
    game.discriminator.register_forward_pre_hook(lambda module, given: seen.append(given[2]))
    game.trainer.discriminator_losses(data(batch_size=4000), random_generator("cpu", 0), penalise=False)
    real_t, fake_t = seen
    assert torch.equal(real_t, fake_t)
    counts = torch.bincount(real_t, minlength=5)
    assert counts[0] == 0
    torch.testing.assert_close(counts[1:].float(), torch.full((4,), 1000.0), rtol=0, atol=5 * 750**0.5)


def test_timesteps_are_drawn_in_proportion_to_their_weights() -> None:
    trainer = new_game(timestep_weights=[3.0, 0.0, 1.0, 0.0]).trainer
    t, _, _ = trainer._real_pair(data(batch_size=4000), torch.Generator().manual_seed(0))
    shares = torch.bincount(t, minlength=5) / len(t)
    torch.testing.assert_close(shares, torch.tensor([0.0, 0.75, 0.0, 0.25, 0.0]), atol=0.02, rtol=0.0)
