"""The two steps: whose weights move, by which gradient, and when."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldgan.diffusion.process import Diffusion, Predicts, vp_betas
from ldgan.engine.accumulation import Accumulation
from ldgan.engine.cli import UserError
from ldgan.engine.config import load_config
from ldgan.engine.ema import EMA
from ldgan.engine.philox import Random, key_of
from ldgan.models.discriminator import Discriminator, DiscriminatorConfig, Logits
from ldgan.models.unet import UNet, UNetConfig
from ldgan.train import TrainConfig
from ldgan.training.data import Pixels
from ldgan.training.gan import Batch, DiffusionGANTrainer, Drawn, LossConfig, Objective, PhasesConfig, Players

SHAPE, BATCH_SIZE, SEED = (2, 4, 4), 4, 7
SOURCE = Pixels(None, SHAPE)  # the trainer reads no dataset, it is handed batches
DIFFUSION = Diffusion(vp_betas(4))


@dataclass
class Game:
    """Tiny players under gradient descent with rate 1: a step moves weights by minus their gradient."""

    trainer: DiffusionGANTrainer
    generator: UNet
    discriminator: Discriminator
    ema: EMA[UNet]


def new_game(
    *,
    objective: Objective = "denoising",
    predicts: Predicts = "x_0",
    num_classes: int = 0,
    label_dropout: float = 0.0,
    z_dim: int = 3,
    attention_resolutions: Sequence[int] = (),
    logits: Logits = "sample",
    num_micro_batches: int = 1,
    timestep_weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    phases: PhasesConfig | None = None,
    **loss: Any,
) -> Game:
    torch.manual_seed(0)
    numbers = UNetConfig(
        base_channels=8,
        channel_multipliers=[1],
        num_res_blocks=1,
        attention_resolutions=[],
        z_dim=z_dim,
        num_mapping_layers=1,
        embedding_dim=8,
    )
    generator = UNet(numbers, channels=2, resolution=4, out_channels=2, num_classes=num_classes)
    discriminator = Discriminator(
        DiscriminatorConfig(
            widths=[8, 8], embedding_dim=8, attention_resolutions=list(attention_resolutions), logits=logits
        ),
        channels=2,
        resolution=4,
        num_classes=num_classes,
        pairs=objective == "denoising",
    )
    ema = EMA(generator, halflife_images=8, rampup_ratio=None)
    trainer = DiffusionGANTrainer(
        Accumulation(Accelerator(cpu=True), num_micro_batches, BATCH_SIZE, SEED),
        DIFFUSION,
        Players(
            generator,
            discriminator,
            torch.optim.SGD(generator.parameters(), lr=1.0),
            torch.optim.SGD(discriminator.parameters(), lr=1.0),
            ema,
        ),
        objective=objective,
        predicts=predicts,
        label_dropout=label_dropout,
        loss=LossConfig(**loss),
        phases=phases or PhasesConfig(),
        timestep_weights=timestep_weights,
    )
    return Game(trainer, generator, discriminator, ema)


def batch(number: int = 0, batch_size: int = BATCH_SIZE, labels: Tensor | None = None) -> Batch:
    return Batch(data(number, batch_size), labels)


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
    game.trainer.discriminator_step(1, [batch()])
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
    game.trainer.generator_step(1, [batch()], l1_weight=0.0, adversarial=True)
    assert not torch.equal(weights(game.generator), start)
    assert not torch.equal(weights(game.ema.model), start)
    torch.testing.assert_close(game.discriminator.state_dict(), before, rtol=0, atol=0)
    for parameter, sentinel in zip(game.discriminator.parameters(), sentinels):
        assert torch.equal(parameter.grad, sentinel)


@pytest.mark.parametrize("logits", ["sample", "positions"])
def test_a_step_of_both_players_equals_the_equations_in_float64(logits: Logits) -> None:
    """Schedule, forward process, posterior, losses and R1 once more, from the papers' equations alone."""
    game, x_0 = new_game(r1_every_steps=1, r1_gamma=0.6, l1_weight=0.5, logits=logits), data()
    generator, discriminator = copy.deepcopy(game.generator), copy.deepcopy(game.discriminator)
    starts = weights(game.discriminator), weights(game.generator)
    game.trainer.discriminator_step(1, [Batch(x_0, None)])
    moved_discriminator = copy.deepcopy(game.discriminator)
    game.trainer.generator_step(1, [Batch(x_0, None)], l1_weight=0.5, adversarial=True)

    def variance(t: int) -> float:
        s = 1e-3 + (1 - 1e-3) * t / 4
        return 1 - math.exp(-(s**2) * (20 - 0.1) / 2 - s * 0.1)

    beta = [0.0, *(1 - (1 - variance(t)) / (1 - variance(t - 1)) for t in range(1, 5))]
    bar = [math.prod(1 - b for b in beta[: t + 1]) for t in range(5)]

    def play(player: str) -> tuple[Tensor, ...]:
        """t, x_0, x_{t-1}, x_t, and a fake x_{t-1} with the estimate behind it, of the player's own noise."""
        random = Random(key_of(SEED, player), "cpu", step=1, part=0)
        t = 1 + random.choices(torch.ones(4).double(), BATCH_SIZE)
        noises = [random.normal(x_0.shape).double() for _ in range(2)]
        z, last = random.normal((BATCH_SIZE, 3)).double(), random.normal(x_0.shape)
        b, a_bar, previous = (torch.tensor([f(n) for n in t.tolist()], dtype=torch.float64).reshape(-1, 1, 1, 1)
                              for f in (beta.__getitem__, bar.__getitem__, lambda n: bar[n - 1]))  # fmt: skip
        x_previous = previous.sqrt() * x_0 + (1 - previous).sqrt() * noises[0]
        x_t = (1 - b).sqrt() * x_previous + b.sqrt() * noises[1]
        estimate = generator(x_t.float(), z.float(), t).double()
        mean = previous.sqrt() * b / (1 - a_bar) * estimate + (1 - b).sqrt() * (1 - previous) / (1 - a_bar) * x_t
        return t, x_previous, x_t, mean + ((1 - previous) / (1 - a_bar) * b).sqrt() * last.double(), estimate

    t, real, x_t, fake, _ = play("discriminator")
    real.requires_grad_()

    def judge(network: Discriminator, x_previous: Tensor) -> Tensor:
        return network(x_previous.float(), x_t.float(), t).double()

    real_logits, fake_logits = judge(discriminator, real), judge(discriminator, fake.detach())
    (slope,) = torch.autograd.grad(real_logits.sum(), real, create_graph=True)
    loss = (1 + (-real_logits).exp()).log().mean() + (1 + fake_logits.exp()).log().mean()
    loss = loss + 0.6 / 2 * slope.square().sum(dim=(1, 2, 3)).mean()
    expected = starts[0].double() - gradients(discriminator, loss)
    torch.testing.assert_close(weights(game.discriminator).double(), expected, rtol=0, atol=2e-6)

    t, _, x_t, fake, estimate = play("generator")
    adversarial = (1 + (-judge(moved_discriminator, fake)).exp()).log().mean()
    loss = adversarial + 0.5 * (estimate - x_0).abs().mean()
    expected = starts[1].double() - gradients(generator, loss)
    torch.testing.assert_close(weights(game.generator).double(), expected, rtol=0, atol=2e-6)


def test_the_discriminator_trains_again_after_a_step_of_the_generator() -> None:
    game = new_game()
    game.trainer.generator_step(1, [batch()], l1_weight=0.0, adversarial=True)
    start = weights(game.discriminator)
    game.trainer.discriminator_step(2, [batch()])
    assert not torch.equal(weights(game.discriminator), start)


def test_r1_comes_with_exactly_every_third_step() -> None:
    game = new_game(r1_every_steps=3)
    penalised = [step for step in range(1, 10) if "r1" in game.trainer.discriminator_step(step, [batch(step)])]
    assert penalised == [3, 6, 9]


@dataclass
class Again:
    """What a player's step draws, drawn again from the same numbers; `random` goes on from there."""

    random: Random
    t: Tensor
    real: Tensor  # x_{t-1}
    x_t: Tensor
    z: Tensor
    fake: Tensor  # x_{t-1} of a generator that predicts x_0


def draw_again(game: Game, x_0: Tensor, random: Random) -> Again:
    t = 1 + random.choices(torch.ones(4).double(), len(x_0))
    noises = [random.normal(x_0.shape) for _ in range(2)]
    real, x_t = DIFFUSION.pair(x_0, t, *noises)
    z = random.normal((len(x_0), 3))
    estimate = game.generator(x_t, z, t)
    fake = DIFFUSION.posterior(estimate, x_t, t).sample(random.normal(x_0.shape))
    return Again(random, t, real, x_t, z, fake)


def squared_gradient(discriminator: Discriminator, x: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(x, x_t, t).sum(), x)
    return gradient.square().sum(dim=(1, 2, 3)).mean()


@pytest.mark.parametrize("attention_resolutions", [[], [4, 2]])
def test_penalties_are_half_gamma_times_squared_gradients_on_real_and_on_fake_samples(attention_resolutions) -> None:
    game = new_game(r1_gamma=0.6, r2_gamma=0.2, attention_resolutions=attention_resolutions)
    terms = game.trainer.discriminator_losses(batch(), Random(key_of("penalty"), "cpu"), penalise=True)
    drawn = draw_again(game, data(), Random(key_of("penalty"), "cpu"))
    with sdpa_kernel(SDPBackend.MATH):
        r1, r2 = (squared_gradient(game.discriminator, x, drawn.x_t, drawn.t) for x in (drawn.real, drawn.fake))
    torch.testing.assert_close(terms["r1"], 0.3 * r1)
    torch.testing.assert_close(terms["r2"], 0.1 * r2)
    assert abs(r1 - r2) > 1e-3 * r1


def test_r1_of_positions_is_that_of_their_sum_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # the few places that insist on fp32
    game = new_game(z_dim=0, r1_gamma=0.6, logits="positions")
    for network in (game.generator, game.discriminator):
        network.double()
    random = Random(key_of("penalty"), "cpu")
    x_0 = data().double()
    terms = game.trainer.discriminator_losses(Batch(x_0, None), random, penalise=True)
    random = Random(key_of("penalty"), "cpu")
    t = 1 + random.choices(torch.ones(4).double(), BATCH_SIZE)
    noises = [random.normal(x_0.shape) for _ in range(2)]
    real, x_t = DIFFUSION.pair(x_0, t, *noises)

    def each_position(x: Tensor) -> Tensor:
        return game.discriminator(x, x_t, t)

    # (B, N, B, C, s, s): how each position's logit of each sample turns with each sample.
    slopes = torch.autograd.functional.jacobian(each_position, real).sum(dim=(0, 1))
    expected = 0.3 * slopes.square().sum(dim=(1, 2, 3)).mean()
    assert terms["r1"].dtype == torch.float64
    torch.testing.assert_close(terms["r1"], expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("gammas", [{"r1_gamma": 1.0}, {"r1_gamma": 0.0, "r2_gamma": 1.0}, {"r1_gamma": 0.0}], ids=str)
def test_penalties_without_a_weight_are_left_out(gammas: dict[str, float]) -> None:
    terms = new_game(**gammas).trainer.discriminator_losses(batch(), Random(key_of(0), "cpu"), penalise=True)
    assert terms.keys() - {"discriminator"} == {name.removesuffix("_gamma") for name, gamma in gammas.items() if gamma}


@pytest.mark.parametrize("logits", ["sample", "positions"])
def test_finite_differences_step_along_fresh_noise(logits: Logits) -> None:
    game = new_game(penalty="finite_difference", r1_gamma=0.6, r2_gamma=0.2, penalty_epsilon=0.5, logits=logits)
    terms = game.trainer.discriminator_losses(batch(), Random(key_of("penalty"), "cpu"), penalise=True)
    drawn = draw_again(game, data(), Random(key_of("penalty"), "cpu"))
    for name, weight, x in (("r1", 0.3, drawn.real), ("r2", 0.1, drawn.fake)):
        there = x + 0.5 * drawn.random.normal(x.shape)
        change = game.discriminator(there, drawn.x_t, drawn.t) - game.discriminator(x, drawn.x_t, drawn.t)
        change = change.reshape(BATCH_SIZE, -1).sum(dim=1)
        torch.testing.assert_close(terms[name], weight * (change / 0.5).square().mean())


def test_only_an_exact_penalty_takes_the_slow_kernel_of_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    attention = F.scaled_dot_product_attention

    def spy(*tensors: Tensor) -> Tensor:
        seen.append(torch.backends.cuda.flash_sdp_enabled())  # the switch of the fast kernels, on the CPU as well
        return attention(*tensors)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    for penalty, fast in (("gradient", [True, True, False, False]), ("finite_difference", [True] * 5)):
        game = new_game(attention_resolutions=[2], r1_every_steps=2, penalty=penalty)
        seen.clear()
        for step in (1, 2):
            game.trainer.discriminator_step(step, [batch()])
        assert seen == fast


@pytest.mark.parametrize("logits", ["sample", "positions"])
def test_the_relativistic_game_is_about_pairs_of_the_same_x_t(logits: Logits) -> None:
    game = new_game(adversarial="relativistic", logits=logits)
    for name, player in (("discriminator", 1.0), ("generator", -1.0)):
        if name == "discriminator":
            term = game.trainer.discriminator_losses(batch(), Random(key_of(1), "cpu"), penalise=False)[name]
        else:
            term = game.trainer.generator_losses(batch(), Random(key_of(1), "cpu"), adversarial=True)[name]
        drawn = draw_again(game, data(), Random(key_of(1), "cpu"))
        real, fake = (game.discriminator(x, drawn.x_t, drawn.t) for x in (drawn.real, drawn.fake))
        torch.testing.assert_close(term, torch.log(1 + torch.exp(-player * (real - fake))).mean())


def test_the_relativistic_generators_gradient_comes_through_its_fake_alone() -> None:
    game = new_game(adversarial="relativistic")
    start, before = weights(game.generator), copy.deepcopy(game.discriminator.state_dict())
    game.trainer.generator_step(1, [batch()], l1_weight=0.0, adversarial=True)
    torch.testing.assert_close(game.discriminator.state_dict(), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in game.discriminator.parameters())
    moved = weights(game.generator)

    again = new_game(adversarial="relativistic")
    drawn = draw_again(again, data(), Random(key_of(SEED, "generator"), "cpu", step=1, part=0))
    real, fake = (again.discriminator(x, drawn.x_t, drawn.t) for x in (drawn.real, drawn.fake))
    losing = torch.sigmoid(real - fake).detach() / BATCH_SIZE  # minus the loss's derivative by each fake logit
    torch.testing.assert_close(moved, start + gradients(again.generator, (losing * fake).sum()))


@pytest.mark.parametrize("step", [1, 2])  # R1 on the second
def test_micro_batches_give_the_mean_of_their_gradients_to_the_discriminator(step: int) -> None:
    game, batches = new_game(num_micro_batches=2, r1_every_steps=2), [batch(0, 2), batch(1, 2)]
    start = weights(game.discriminator)
    each = []
    for number, part in enumerate(batches):
        random = Random(key_of(SEED, "discriminator"), "cpu", step=step, part=number)
        losses = game.trainer.discriminator_losses(part, random, penalise=step == 2)
        each.append(gradients(game.discriminator, sum(losses.values(), torch.zeros(()))))
    leave_gradients(game.discriminator)
    game.trainer.discriminator_step(step, batches)
    torch.testing.assert_close(weights(game.discriminator), start - (each[0] + each[1]) / 2)


def test_micro_batches_give_the_mean_of_their_gradients_to_the_generator() -> None:
    game, batches = new_game(num_micro_batches=2), [batch(0, 2), batch(1, 2)]
    start = weights(game.generator)
    each = []
    for number, part in enumerate(batches):
        random = Random(key_of(SEED, "generator"), "cpu", step=1, part=number)
        losses = game.trainer.generator_losses(part, random, adversarial=True)
        each.append(gradients(game.generator, 0.7 * losses["l1"] + losses["generator"]))
    leave_gradients(game.generator)
    game.trainer.generator_step(1, batches, l1_weight=0.7, adversarial=True)
    torch.testing.assert_close(weights(game.generator), start - (each[0] + each[1]) / 2)


def test_the_average_is_its_closed_form_after_each_step() -> None:
    game = new_game()
    average, decay = weights(game.generator), 0.5 ** (BATCH_SIZE / 8)
    for step in range(1, 5):
        game.trainer.generator_step(step, [batch(step)], l1_weight=1.0, adversarial=False)
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
    losses = game.trainer.generator_losses(
        Batch(x_0, None), Random(key_of(SEED, "generator"), "cpu", step=1, part=0), adversarial=False
    )
    expected = start - gradients(game.generator, 3.0 * losses["energy"])
    leave_gradients(game.generator)
    game.trainer.step(1, SOURCE, iter([{"image": x_0}]), progress=0.0)
    torch.testing.assert_close(weights(game.generator), expected)
    assert all(parameter.grad is None for parameter in game.discriminator.parameters())


def test_without_z_the_energy_score_is_a_distance_and_takes_one_evaluation() -> None:
    game, evaluated = new_game(z_dim=0, energy_weight=1.0, energy_windows=[2]), []
    game.generator.register_forward_hook(lambda module, given, output: evaluated.append(output.detach()))
    terms = game.trainer.generator_losses(batch(), Random(key_of(1), "cpu"), adversarial=False)
    assert len(evaluated) == 1
    squares = (evaluated[0] - data()).double().square()
    whole = squares.mean(dim=(1, 2, 3)).sqrt().mean()
    windows = squares.unfold(2, 2, 1).unfold(3, 2, 1).mean(dim=(1, 4, 5)).sqrt().mean()
    torch.testing.assert_close(terms["energy"].double(), (whole + windows) / 2, rtol=1e-5, atol=0)
    one_shot = new_game(objective="one_shot", z_dim=0, energy_weight=1.0)
    one_shot.generator.register_forward_hook(lambda module, given, output: evaluated.append(output.detach()))
    one_shot.trainer.generator_losses(batch(), Random(key_of(1), "cpu"), adversarial=False)
    assert len(evaluated) == 3  # each starts from an x_T of its own
    assert not torch.equal(evaluated[1], evaluated[2])


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
    game.trainer.discriminator_losses(batch(batch_size=4000), Random(key_of(0), "cpu"), penalise=False)
    real_t, fake_t = seen
    assert torch.equal(real_t, fake_t)
    counts = torch.bincount(real_t, minlength=5)
    assert counts[0] == 0
    torch.testing.assert_close(counts[1:].float(), torch.full((4,), 1000.0), rtol=0, atol=5 * 750**0.5)


def test_timesteps_are_drawn_in_proportion_to_their_weights() -> None:
    trainer = new_game(timestep_weights=[3.0, 0.0, 1.0, 0.0]).trainer
    t = trainer._draw(batch(batch_size=4000), Random(key_of(0), "cpu")).t
    shares = torch.bincount(t, minlength=5) / len(t)
    torch.testing.assert_close(shares, torch.tensor([0.0, 0.75, 0.0, 0.25, 0.0]), atol=0.02, rtol=0.0)


def test_without_z_a_denoising_step_to_data_is_a_function_of_x_t() -> None:
    # At t = 1 the posterior adds no noise: what remains random is z.
    for z_dim, same in ((0, True), (3, False)):
        game, random = new_game(z_dim=z_dim), Random(key_of(0), "cpu")
        x_t, t = data(), torch.ones(BATCH_SIZE, dtype=torch.int64)
        first, second = (game.trainer._fake(game.generator, Drawn(x_t, x_t, t, None), random)[0] for _ in range(2))
        assert torch.equal(first, second) == same
        assert game.trainer.step(1, SOURCE, iter([{"image": data()}]), progress=0.0).keys() >= {"generator"}


@pytest.mark.parametrize("predicts", ["x_0", "noise", "x_previous"])
def test_a_fake_is_made_of_what_the_generator_predicts(predicts: Predicts) -> None:
    game = new_game(predicts=predicts)
    x_t, t = data(), torch.tensor([1, 2, 3, 4])
    fake, estimate = game.trainer._fake(game.generator, Drawn(x_t, x_t, t, None), Random(key_of(0), "cpu"))
    random = Random(key_of(0), "cpu")
    output = game.generator(x_t, random.normal((BATCH_SIZE, 3)), t).double()
    noise = random.normal(x_t.shape).double()

    def column(table: list[float]) -> Tensor:
        return torch.tensor(table, dtype=torch.float64)[:, None, None, None]

    a = [1 - float(beta) for beta in vp_betas(4)]
    bar = [float(torch.tensor(a[:i]).double().prod()) for i in range(5)]  # abar_0..abar_4
    if predicts == "noise":
        output = (x_t - column([(1 - bar[i]) ** 0.5 for i in range(1, 5)]) * output) / column(bar[1:]).sqrt()
    expected = output
    if predicts != "x_previous":
        c_0 = column([bar[i - 1] ** 0.5 * (1 - a[i - 1]) / (1 - bar[i]) for i in range(1, 5)])
        c_t = column([a[i - 1] ** 0.5 * (1 - bar[i - 1]) / (1 - bar[i]) for i in range(1, 5)])
        std = column([((1 - bar[i - 1]) / (1 - bar[i]) * (1 - a[i - 1])) ** 0.5 for i in range(1, 5)])
        expected = c_0 * output + c_t * x_t + std * noise
    torch.testing.assert_close(estimate, output.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fake, expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("predicts", ["x_0", "x_previous"])
def test_l1_and_energy_compare_with_what_is_estimated(predicts: Predicts) -> None:
    game = new_game(predicts=predicts, energy_weight=1.0)
    terms = game.trainer.generator_losses(batch(), Random(key_of(0), "cpu"), adversarial=False)
    drawn = draw_again(game, data(), Random(key_of(0), "cpu"))
    other = game.generator(drawn.x_t, drawn.random.normal((BATCH_SIZE, 3)), drawn.t)
    one = game.generator(drawn.x_t, drawn.z, drawn.t)
    target = data() if predicts == "x_0" else drawn.real
    torch.testing.assert_close(terms["l1"], (one - target).abs().mean())
    to_target, apart = (
        [(x - y).square().mean(dim=(1, 2, 3)).sqrt().mean() for x, y in those]
        for those in ([(one, target), (other, target)], [(one, other)])
    )
    torch.testing.assert_close(terms["energy"], sum(to_target) / 2 - apart[0] / 2, rtol=1e-4, atol=1e-4)


def test_a_one_shot_game_makes_x_0_from_noise_and_judges_it_diffused() -> None:
    game = new_game(objective="one_shot", energy_weight=1.0)
    made, judged = [], []
    game.generator.register_forward_hook(lambda module, given, output: made.append((*given, output.detach())))
    game.discriminator.register_forward_pre_hook(lambda module, given: judged.append(given))
    x_0 = torch.full((BATCH_SIZE, *SHAPE), 100.0)  # of which the generator must see nothing
    terms = game.trainer.discriminator_losses(Batch(x_0, None), Random(key_of(3), "cpu"), penalise=True)
    assert terms.keys() == {"discriminator", "r1"}
    ((x_T, _, told, output),) = made
    assert x_T.abs().max() < 10
    assert told.tolist() == [4] * BATCH_SIZE
    (real, no_x_t, t), (fake, _, fake_t) = judged
    assert no_x_t is None
    assert torch.equal(t, fake_t)
    random = Random(key_of(3), "cpu")
    assert torch.equal(t, 1 + random.choices(torch.ones(4).double(), BATCH_SIZE))
    torch.testing.assert_close(real, DIFFUSION.diffuse(x_0, t - 1, random.normal(x_0.shape)))
    assert torch.equal(x_T, random.normal(x_0.shape))
    random.normal((BATCH_SIZE, 3))  # z
    torch.testing.assert_close(fake, DIFFUSION.diffuse(output, t - 1, random.normal(x_0.shape)))

    terms = game.trainer.generator_losses(Batch(x_0, None), Random(key_of(3), "cpu"), adversarial=True)
    assert terms.keys() == {"energy", "generator"}
    assert all(told.tolist() == [4] * BATCH_SIZE for _, _, told, _ in made)
    assert not torch.equal(made[-1][0], made[-2][0])  # the energy score's two samples come from an x_T each


def test_a_one_shot_generator_is_sampled_by_a_process_of_one_step() -> None:
    process, x_T = DIFFUSION.respaced(1), data()
    t = torch.ones(BATCH_SIZE, dtype=torch.int64)
    assert process.timesteps[t].tolist() == [4] * BATCH_SIZE
    output = torch.randn(x_T.shape)
    torch.testing.assert_close(process.denoised(output, x_T, t).sample(torch.randn(x_T.shape)), output)


def test_both_players_are_told_the_same_labels_of_which_a_share_is_left_out() -> None:
    game = new_game(num_classes=3, label_dropout=0.25)
    labels = torch.arange(4000) % 3
    told: list[Tensor] = []

    def listen(module: nn.Module, given: tuple[Tensor, ...], conditions: dict[str, Tensor]) -> None:
        told.append(conditions["labels"])

    for player in (game.generator, game.discriminator):
        player.register_forward_pre_hook(listen, with_kwargs=True)
    for losses in (game.trainer.discriminator_losses, game.trainer.generator_losses):
        told.clear()
        losses(batch(batch_size=4000, labels=labels), Random(key_of(0), "cpu"), True)
        assert all(torch.equal(told[0], others) for others in told[1:])
        assert len(told) >= 2
        left_out = told[0] == 3
        assert torch.equal(told[0][~left_out], labels[~left_out])
        assert left_out.float().mean().item() == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / 4000) ** 0.5)


def test_labels_come_from_the_batches_of_the_dataset() -> None:
    game, labels = new_game(num_classes=3), torch.tensor([2, 0, 1, 1])
    told: list[Tensor] = []

    def listen(module: nn.Module, given: tuple[Tensor, ...], conditions: dict[str, Tensor]) -> None:
        told.append(conditions["labels"])

    game.discriminator.register_forward_pre_hook(listen, with_kwargs=True)
    game.trainer.step(1, SOURCE, iter([{"image": data(), "label": labels}]), progress=0.0)
    assert all(torch.equal(seen, labels) for seen in told)
    assert len(told) == 3  # real, fake, and fake once more for the generator


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["objective=one_shot", "predicts=noise"], "objective=one_shot makes x_0 itself"),
        (["objective=one_shot", "loss.l1_weight=1"], "set loss.l1_weight"),
        (["loss.r2_gamma=-1"], "loss.r2_gamma -1.0; choose 0 or more"),
        (["loss.r1_every_steps=0"], "choose 1 or more"),
        (["loss.penalty_epsilon=0"], "choose more than 0"),
        (["loss.adversarial=hinge"], "expected non_saturating | relativistic"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(TrainConfig, None, ["data=shards", "run.dir=run", *settings])
    assert message in str(error.value)
