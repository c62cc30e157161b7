"""Generator and discriminator: what depends on what, at the start and after weights have moved."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ldgan.losses import discriminator_loss, gradient_penalty
from ldgan.networks import (
    Discriminator,
    Generator,
    UNetBlock,
    append_minibatch_stddev,
    residual_outputs,
)

CHANNELS, SIDE, Z_DIM = 3, 8, 6


def fresh_generator(**changes: object) -> Generator:
    torch.manual_seed(0)
    numbers = {
        "base_channels": 8,
        "channel_multipliers": [1, 2],
        "num_res_blocks": 1,
        "attention_resolutions": [4],
        "z_dim": Z_DIM,
        "num_mapping_layers": 2,
        "embedding_dim": 16,
        "dropout": 0.0,
    }
    return Generator(channels=CHANNELS, resolution=SIDE, **numbers | changes)


def moved_generator(**changes: object) -> Generator:
    """A generator whose residual branches do something, as after some training."""
    generator = fresh_generator(**changes)
    for layer in residual_outputs(generator):
        nn.init.xavier_uniform_(layer.weight)
    return generator


def fresh_discriminator(seed: int = 0) -> Discriminator:
    torch.manual_seed(seed)
    return Discriminator(channels=CHANNELS, widths=[16, 32, 32], embedding_dim=16)


def inputs(batch_size: int, num_steps: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """(x_t, z, t) for a generator; t goes round."""
    random = torch.Generator().manual_seed(1)
    x_t = torch.randn(batch_size, CHANNELS, SIDE, SIDE, generator=random)
    return x_t, torch.randn(batch_size, Z_DIM, generator=random), torch.arange(batch_size) % num_steps + 1


def pairs(batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(x_{t-1}, x_t, t) for a discriminator."""
    x_t, _, t = inputs(batch_size)
    return torch.randn(x_t.shape, generator=torch.Generator().manual_seed(2)), x_t, t


def distance(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().mean().item()


def test_every_residual_branch_starts_as_nothing() -> None:
    generator = fresh_generator()
    blocks = [module for module in generator.modules() if isinstance(module, UNetBlock)]
    assert len(blocks) == 2 + 1 + 2 + 4 + 1  # down, its resampling, middle, up, its resampling
    for block in blocks:
        block.attention = nn.Identity()  # its own branch stands behind the block's
        x, time = torch.randn(2, block.norm1.affine.out_features // 2, 4, 4), torch.randn(2, 16)
        assert torch.equal(block(x, time, time), block.skip(block.resample(x)) * 0.5**0.5)


def test_time_acts_through_residual_branches_alone() -> None:
    x_t, z, _ = inputs(2)
    for generator, same in ((fresh_generator(), True), (moved_generator(), False)):
        first, last = generator(x_t, z, torch.tensor([1, 1])), generator(x_t, z, torch.tensor([4, 4]))
        assert torch.equal(first, last) == same


def test_the_generator_listens_to_all_of_its_inputs() -> None:
    generator = moved_generator()
    x_t, z, t = inputs(2)
    output = generator(x_t, z, t)
    assert distance(generator(x_t + 1, z, t), output) > 1e-2
    assert distance(generator(x_t, -z, t), output) > 1e-2
    assert distance(generator(x_t, z, t % 4 + 1), output) > 1e-2


def test_the_style_depends_on_the_direction_of_z_alone() -> None:
    mapping, z = fresh_generator().mapping, inputs(4)[1]
    torch.testing.assert_close(mapping(5 * z), mapping(z))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"channel_multipliers": [1], "attention_resolutions": []},
        {"channel_multipliers": [2, 1, 3], "num_res_blocks": 2, "attention_resolutions": [8, 2]},
    ],
)
def test_every_weight_of_the_generator_takes_part(changes: dict) -> None:
    generator = moved_generator(**changes)
    x_t, z, t = inputs(3)
    output = generator(x_t, z, t)
    assert output.shape == x_t.shape
    output.square().sum().backward()
    assert [name for name, p in generator.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_attention_is_where_it_was_asked_for() -> None:
    names = [name for name, _ in fresh_generator().named_modules() if name.endswith("attention.qkv")]
    assert names == [
        "down.4x4_block0.attention.qkv",
        "middle.0.attention.qkv",
        "middle.1.attention.qkv",
        "up.4x4_block0.attention.qkv",
        "up.4x4_block1.attention.qkv",
    ]


def test_a_sample_does_not_depend_on_the_rest_of_its_batch() -> None:
    generator, given = moved_generator(), inputs(4)
    batch = generator(*given)
    alone = torch.cat([generator(*(part[i : i + 1] for part in given)) for i in range(4)])
    torch.testing.assert_close(alone, batch, rtol=1e-4, atol=1e-5)


def test_the_discriminator_listens_to_all_of_its_inputs() -> None:
    discriminator = fresh_discriminator()
    x_previous, x_t, t = pairs(4)
    logits = discriminator(x_previous, x_t, t)
    assert logits.shape == (4,)
    assert distance(discriminator(x_previous + 0.5, x_t, t), logits) > 1e-2
    assert distance(discriminator(x_previous, x_t + 0.5, t), logits) > 1e-2
    assert distance(discriminator(x_previous, x_t, t % 4 + 1), logits) > 1e-2


@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_the_signal_survives_the_discriminator_at_its_start(seed: int) -> None:
    discriminator = fresh_discriminator(seed)
    x_previous, x_t, t = pairs(32)
    ours = discriminator(x_previous, x_t, torch.ones_like(t)).std().item()
    for layer in discriminator.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.reset_parameters()  # PyTorch's own initialisation
    assert ours > 0.03
    assert ours > 10 * discriminator(x_previous, x_t, torch.ones_like(t)).std().item()


@pytest.mark.parametrize("batch_size", [1, 4, 6])
def test_the_penalty_reaches_every_weight(batch_size: int) -> None:
    discriminator = fresh_discriminator()
    x_previous, x_t, t = pairs(batch_size)
    x_previous.requires_grad_()
    gradient_penalty(discriminator(x_previous, x_t, t), x_previous).backward()
    for name, parameter in discriminator.named_parameters():
        if name.endswith("bias") or "time" in name:
            continue  # leaky ReLUs are linear almost everywhere: what is added to x hardly changes the slope
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_every_parameter_of_the_discriminator_takes_part() -> None:
    discriminator = fresh_discriminator()
    x_previous, x_t, t = pairs(4)
    discriminator_loss(discriminator(x_previous, x_t, t), discriminator(x_previous * 2, x_t, t)).backward()
    assert [name for name, p in discriminator.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    ("batch_size", "group_size"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 1), (6, 3), (7, 1), (8, 4), (9, 3)]
)
def test_minibatch_stddev_at_any_batch_size(batch_size: int, group_size: int) -> None:
    x = torch.randn(batch_size, 5, 2, 3, generator=torch.manual_seed(0))
    result = append_minibatch_stddev(x)
    assert torch.equal(result[:, :5], x)
    num_groups = batch_size // group_size
    for i in range(batch_size):
        members = x.double().numpy()[i % num_groups :: num_groups]  # every num_groups-th sample
        assert len(members) == group_size
        expected = np.sqrt(members.var(axis=0) + 1e-8).mean()
        np.testing.assert_allclose(result[i, 5].numpy(), np.full((2, 3), expected), rtol=1e-5)


def test_minibatch_stddev_of_equal_samples_has_a_finite_gradient() -> None:
    x = torch.ones(4, 2, 2, 2, requires_grad=True)
    append_minibatch_stddev(x)[:, -1].sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.zeros_like(x))
