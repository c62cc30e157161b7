"""Discriminator: what depends on what, at the start and after weights have moved, and its derivatives."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldgan.engine.config import load_config
from ldgan.models.discriminator import Discriminator, DiscriminatorConfig, append_minibatch_stddev
from ldgan.train import TrainConfig
from ldgan.training.losses import discriminator_loss, gradient_penalty

CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "ldgan"
CHANNELS, SIDE = 3, 8

# The forms that the published recipes take, tiny.
SMALL = {"widths": [16, 32, 32], "stem_width": 8, "stem_kernel_size": 1, "fir": True}
LARGE = {**SMALL, "downsample_first": True}
PLACES = {"logits": "positions", "minibatch_stddev": False}


def fresh_discriminator(seed: int = 0, *, num_classes: int = 0, pairs: bool = True, **changes: Any) -> Discriminator:
    torch.manual_seed(seed)
    config = DiscriminatorConfig(**{"widths": [16, 32, 32], "embedding_dim": 16} | changes)
    return Discriminator(config, channels=CHANNELS, resolution=SIDE, num_classes=num_classes, pairs=pairs)


def pairs(batch_size: int, num_steps: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """(x_{t-1}, x_t, t) for a discriminator; t goes round."""
    random = torch.Generator().manual_seed(1)
    x_t = torch.randn(batch_size, CHANNELS, SIDE, SIDE, generator=random)
    x_previous = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(2))
    return x_previous, x_t, torch.arange(batch_size) % num_steps + 1


def distance(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().mean().item()


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


def halved(x: Tensor, fir: bool) -> Tensor:
    """2x2 means, or the filter [1, 3, 3, 1] / 8 in both directions on zero-padded images, every second pixel kept."""
    if not fir:
        return x.unflatten(3, (-1, 2)).mean(dim=4).unflatten(2, (-1, 2)).mean(dim=3)
    padded = F.pad(x, (1, 1, 1, 1))
    taps = torch.tensor([1, 3, 3, 1]).double() / 8
    rows = sum(tap * padded[:, :, i : i + x.shape[2] - 1] for i, tap in enumerate(taps))
    return sum(tap * rows[..., i : i + x.shape[3] - 1] for i, tap in enumerate(taps))[:, :, ::2, ::2]


def independent_logits(weights: dict[str, Tensor], x: Tensor, t: Tensor, config: dict[str, Any]) -> Tensor:
    """The network again, in float64, from its description."""
    w = {name: weight.double() for name, weight in weights.items()}
    leaky = functools.partial(F.leaky_relu, negative_slope=0.2)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def convolve(x: Tensor, name: str) -> Tensor:
        weight = w[f"{name}.weight"]
        return F.conv2d(x, weight, w.get(f"{name}.bias"), padding=weight.shape[-1] // 2)

    angles = t[:, None] * torch.exp(-math.log(10_000) * torch.arange(8).double() / 7)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    time = leaky(linear(F.silu(linear(waves, "time_embedding.layer1")), "time_embedding.layer2"))
    x = convolve(x.double(), "conv_in")
    for block in range(3):
        h = convolve(leaky(x), f"blocks.{block}.conv1")
        h = leaky(h + linear(time, f"blocks.{block}.time")[:, :, None, None])
        if block > 0 or config.get("downsample_first"):
            h, x = halved(h, config.get("fir", False)), halved(x, config.get("fir", False))
        x = (convolve(h, f"blocks.{block}.conv2") + convolve(x, f"blocks.{block}.skip")) / 2**0.5
    if config.get("minibatch_stddev", True):
        stddev = (x.var(dim=0, unbiased=False) + 1e-8).sqrt().mean()  # of a single group
        x = torch.cat([x, stddev.expand(len(x), 1, *x.shape[2:])], dim=1)
    x = leaky(convolve(x, "conv_out"))
    if config.get("logits") == "positions":
        places = [(row, column) for row in range(x.shape[2]) for column in range(x.shape[3])]
        return torch.cat([linear(x[:, :, row, column], "logit") for row, column in places], dim=1)
    return linear(x.sum(dim=(2, 3)), "logit").squeeze(1)


@pytest.mark.parametrize("config", [{}, SMALL, LARGE, PLACES, {**SMALL, "logits": "positions"}])
def test_the_logits_are_those_of_an_independent_implementation(config: dict[str, Any]) -> None:
    discriminator = fresh_discriminator(**config)
    assert discriminator.conv_in.weight.shape[-1] == config.get("stem_kernel_size", 3)
    x_previous, x_t, t = pairs(4)
    logits = discriminator(x_previous, x_t, t).detach()
    expected = independent_logits(discriminator.state_dict(), torch.cat([x_previous, x_t], dim=1), t, config)
    torch.testing.assert_close(logits, expected.float(), rtol=1e-4, atol=1e-5)


def test_projection_adds_the_product_of_embedding_and_features() -> None:
    conditional = fresh_discriminator(num_classes=5)
    weights = dict(conditional.state_dict())
    embeddings = weights.pop("projected.weight")
    assert embeddings.shape == (6, 32)  # the last one stands for "no label"
    plain = fresh_discriminator(1)
    plain.load_state_dict(weights)
    features: list[Tensor] = []
    plain.logit.register_forward_pre_hook(lambda module, given: features.append(given[0]))
    labels = torch.tensor([0, 3, 5, 3])
    expected = plain(*pairs(4)) + (embeddings[labels] * features[0]).sum(dim=1)
    torch.testing.assert_close(conditional(*pairs(4), labels), expected)
    assert distance(expected, plain(*pairs(4))) > 1e-2


@pytest.mark.parametrize("num_classes", [0, 5])
@torch.no_grad()
def test_a_samples_logit_comes_from_the_sum_of_its_features_bit_for_bit(num_classes: int) -> None:
    # As before there was a choice: runs of then go on as they were.
    discriminator = fresh_discriminator(num_classes=num_classes)
    maps: list[Tensor] = []
    discriminator.conv_out.register_forward_hook(lambda module, given, output: maps.append(output))
    labels = torch.tensor([0, 3, 5, 3]) if num_classes > 0 else None
    logits = discriminator(*pairs(4), labels)
    features = F.leaky_relu(maps[0], 0.2).sum(dim=(2, 3))
    expected = discriminator.logit(features).squeeze(1)
    if num_classes > 0:
        expected = expected + (discriminator.projected(labels) * features).sum(dim=1)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("class_conditioning", ["projection", "added"])
def test_logits_of_positions_add_up_to_the_samples(class_conditioning: str) -> None:
    whole, places = (
        fresh_discriminator(seed, num_classes=5, class_conditioning=class_conditioning, logits=logits)
        for seed, logits in enumerate(("sample", "positions"))
    )
    places.load_state_dict(whole.state_dict())
    nn.init.constant_(whole.logit.bias, 0.7)
    nn.init.constant_(places.logit.bias, 0.7)
    labels = torch.tensor([0, 3, 5, 3])
    with torch.no_grad():
        logits, one = places(*pairs(4), labels), whole(*pairs(4), labels)
    assert logits.shape == (4, 2 * 2)
    assert logits.std(dim=1).min() > 1e-2
    torch.testing.assert_close(logits.sum(dim=1), one + 3 * 0.7, rtol=1e-4, atol=1e-4)


def test_without_minibatch_stddev_a_sample_is_judged_alone() -> None:
    x_previous, x_t, t = pairs(4)
    for minibatch_stddev in (False, True):
        discriminator = fresh_discriminator(minibatch_stddev=minibatch_stddev)
        alone = discriminator(x_previous[:1], x_t[:1], t[:1])
        difference = (discriminator(x_previous, x_t, t)[:1] - alone).abs().item()
        assert difference > 1e-3 if minibatch_stddev else difference < 1e-5


def test_an_added_class_acts_like_time() -> None:
    conditional = fresh_discriminator(num_classes=5, class_conditioning="added")
    weights = dict(conditional.state_dict())
    embeddings = weights.pop("added.weight")
    plain = fresh_discriminator(1)
    plain.load_state_dict(weights)
    plain.time_embedding.register_forward_hook(lambda module, given, time: time + embeddings[2])
    logits = conditional(*pairs(4), torch.full((4,), 2))
    torch.testing.assert_close(logits, plain(*pairs(4)))
    assert distance(logits, conditional(*pairs(4), torch.full((4,), 4))) > 1e-3


def test_a_discriminator_without_pairs_is_one_that_is_blind_to_x_t() -> None:
    alone, blind = fresh_discriminator(pairs=False), fresh_discriminator(1)
    weights = alone.state_dict()
    weights["conv_in.weight"] = torch.cat([weights["conv_in.weight"], torch.zeros(16, CHANNELS, 3, 3)], dim=1)
    blind.load_state_dict(weights)
    x_previous, x_t, t = pairs(4)
    torch.testing.assert_close(alone(x_previous, None, t), blind(x_previous, x_t, t))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": [8] * 5}, r"halve the side 4 times; it is 8"),
        ({"widths": [8] * 4, "downsample_first": True}, r"halve the side 4 times; it is 8"),
        ({"attention_resolutions": [16]}, r"attention_resolutions has 16; the blocks' outputs have sides \[8, 4, 2\]"),
    ],
)
def test_numbers_that_contradict_the_resolution_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fresh_discriminator(**changes)


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


@pytest.mark.parametrize(
    "changes",
    [
        {},
        SMALL,
        LARGE,
        {"attention_resolutions": [4]},
        {"num_classes": 3},
        {"num_classes": 3, "class_conditioning": "added"},
        {"pairs": False},
        PLACES,
        {"num_classes": 3, "logits": "positions"},
    ],
    ids=str,
)
def test_second_derivatives_are_right(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # the few places that insist on fp32
    discriminator = fresh_discriminator(**changes | {"widths": [4, 6], "embedding_dim": 4})
    discriminator.double()
    x_previous, x_t, t = (part[:3] for part in pairs(3))
    labels = torch.tensor([0, 3, 1]) if discriminator.num_classes > 0 else None
    condition = x_t.double() if discriminator.pairs else None
    names = [name for name, _ in discriminator.named_parameters()]

    def logits(x: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(discriminator, dict(zip(names, parameters)), (x, condition, t, labels))

    inputs = (x_previous.double().requires_grad_(), *discriminator.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradcheck(logits, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(logits, inputs, fast_mode=True)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_resolutions": [8, 2]},
        {"num_classes": 3},
        {"num_classes": 3, **LARGE},
        {"num_classes": 3, **PLACES},
    ],
    ids=str,
)
def test_every_parameter_of_the_discriminator_takes_part(changes: dict[str, Any]) -> None:
    discriminator = fresh_discriminator(**changes)
    x_previous, x_t, t = pairs(4)
    labels = torch.arange(4) if discriminator.num_classes > 0 else None
    real, fake = discriminator(x_previous, x_t, t, labels), discriminator(x_previous * 2, x_t, t, labels)
    discriminator_loss(real, fake).backward()
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


@pytest.mark.parametrize(
    ("name", "data_shape", "published", "ours"),
    [
        ("ddgan_cifar10", (3, 32), 12.74, 12_741_633),
        ("ddgan_celebahq256", (3, 256), 27.74, 27_737_217),
        ("ddgan_lsun_church256", (3, 256), 27.74, 27_737_217),
        ("lddgan_cifar10", (4, 16), 7.63, 7_628_545),
        ("lddgan_celebahq256", (3, 64), 17.51, 17_510_529),
        ("lddgan_lsun_church256", (4, 32), 17.51, 17_510_785),
    ],
)
def test_discriminators_have_the_published_number_of_parameters(
    name: str, data_shape: tuple[int, int], published: float, ours: int
) -> None:
    config = load_config(TrainConfig, CONFIGS / f"{name}.yaml", []).discriminator
    channels, side = data_shape
    with torch.device("meta"):
        discriminator = Discriminator(config, channels=channels, resolution=side, num_classes=0)
    number = sum(parameter.numel() for parameter in discriminator.parameters())
    assert number == ours
    assert round(number / 1e6, 2) == published
