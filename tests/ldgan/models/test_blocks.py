"""The blocks of stage 2's networks against their formulas and against peers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from ldgan.models.blocks import (
    AdaptiveGroupNorm,
    Condition,
    ConvResample,
    Resample,
    ResampleMode,
    SelfAttention,
    TimeEmbedding,
    UNetBlock,
    fourier_waves,
    heads,
    label_embedding,
    positional_waves,
)

KERNEL = np.outer([1.0, 3.0, 3.0, 1.0], [1.0, 3.0, 3.0, 1.0]) / 64.0


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def upfirdn(image: np.ndarray, kernel: np.ndarray, *, up: int = 1, down: int = 1, pad: tuple[int, int]) -> np.ndarray:
    """Stuff zeros between pixels, pad with zeros, filter, keep every ``down``-th: StyleGAN2's definition."""
    stuffed = np.zeros([up * side for side in image.shape])
    stuffed[::up, ::up] = image
    padded = np.pad(stuffed, pad)
    height, width = (side - len(kernel) + 1 for side in padded.shape)
    rows, columns = range(0, height, down), range(0, width, down)
    taps = len(kernel)
    return np.array([[(padded[i : i + taps, j : j + taps] * kernel).sum() for j in columns] for i in rows])


def each_channel(x: Tensor, function, **arguments) -> np.ndarray:
    return np.stack([[function(image, **arguments) for image in sample] for sample in x.double().numpy()])


@pytest.mark.parametrize("sides", [(4, 4), (2, 6)])
def test_the_filter_equals_zero_stuffing(sides: tuple[int, int]) -> None:
    x = randn(2, 3, *sides).double()
    down = each_channel(x, upfirdn, kernel=KERNEL, down=2, pad=(1, 1))
    np.testing.assert_allclose(Resample("down", fir=True)(x).numpy(), down, atol=1e-15)
    up = each_channel(x, upfirdn, kernel=4 * KERNEL, up=2, pad=(2, 1))
    np.testing.assert_allclose(Resample("up", fir=True)(x).numpy(), up, atol=1e-15)


def test_without_the_filter_pixels_are_averaged_and_repeated() -> None:
    x = randn(2, 3, 4, 6)
    means = x.double().numpy().reshape(2, 3, 2, 2, 3, 2).mean(axis=(3, 5))
    np.testing.assert_allclose(Resample("down")(x).numpy(), means, atol=1e-6)
    np.testing.assert_array_equal(Resample("up")(x).numpy(), np.kron(x.numpy(), np.ones((2, 2))))


@pytest.mark.parametrize("mode", ["down", "up"])
def test_the_filter_leaves_constants_alone_and_its_weights_are_not_saved(mode: ResampleMode) -> None:
    resample = Resample(mode, fir=True)
    inside = resample(torch.ones(1, 2, 8, 8))[:, :, 1:-1, 1:-1]
    torch.testing.assert_close(inside, torch.ones_like(inside))
    assert resample.state_dict() == {}


@pytest.mark.parametrize("mode", ["down", "up"])
def test_filtered_resampling_has_both_derivatives(mode: ResampleMode) -> None:
    def squares(x: Tensor) -> Tensor:
        return Resample(mode, fir=True)(x).square()

    x = randn(1, 2, 4, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(squares, x)
    assert torch.autograd.gradgradcheck(squares, x)


def test_the_filter_doubles_in_fp32_on_a_cpu() -> None:
    double, x = Resample("up", fir=True), randn(1, 2, 4, 4)
    expected = double(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(double(x), expected)
    assert torch.equal(double(x.bfloat16()), double(x.bfloat16().float()).bfloat16())


@pytest.mark.parametrize("fir", [False, True])
@pytest.mark.parametrize("mode", ["down", "up"])
def test_resampling_with_a_convolution(mode: ResampleMode, fir: bool) -> None:
    torch.manual_seed(0)
    layer, x = ConvResample(2, 3, mode, fir).double(), randn(1, 2, 6, 6, seed=1).double()
    one = np.ones((1, 1))
    if mode == "up":
        prepared = each_channel(x, upfirdn, kernel=4 * KERNEL, up=2, pad=(2, 1)) if fir else np.kron(x, np.ones((2, 2)))
        prepared = np.pad(prepared, [(0, 0), (0, 0), (1, 1), (1, 1)])
    else:
        pad = (2, 2) if fir else (0, 1)
        prepared = each_channel(x, upfirdn, kernel=KERNEL if fir else one, pad=pad)
    weight, bias = layer.conv.weight.detach().numpy(), layer.conv.bias.detach().numpy()
    stride = 1 if mode == "up" else 2
    maps = [
        sum(upfirdn(prepared[0, i], weight[o, i], down=stride, pad=(0, 0)) for i in range(2)) + bias[o]
        for o in range(3)
    ]
    np.testing.assert_allclose(layer(x).detach().numpy()[0], np.stack(maps), atol=1e-12)


@pytest.mark.parametrize("num_heads", [1, 2, 4])
@pytest.mark.parametrize("rescale", [False, True])
def test_attention_equals_pytorchs_own(num_heads: int, rescale: bool) -> None:
    torch.manual_seed(0)
    ours, peer = SelfAttention(8, num_heads, rescale), nn.MultiheadAttention(8, num_heads, batch_first=True)
    nn.init.normal_(ours.norm.weight)
    with torch.no_grad():
        peer.in_proj_weight.copy_(ours.qkv.weight[:, :, 0, 0])
        peer.in_proj_bias.copy_(ours.qkv.bias)
        peer.out_proj.weight.copy_(ours.out.weight[:, :, 0, 0])
        peer.out_proj.bias.copy_(ours.out.bias)
    x = randn(2, 8, 3, 5)
    tokens = ours.norm(x).flatten(2).transpose(1, 2)
    branch = peer(tokens, tokens, tokens)[0].transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(ours(x), (x + branch) / (math.sqrt(2) if rescale else 1))


def test_the_number_of_heads() -> None:
    assert [heads(64, *numbers) for numbers in ((1, 0), (4, 0), (1, 16), (1, 64))] == [1, 4, 4, 1]
    with pytest.raises(ValueError, match="num_heads is 2 and head_channels is 16"):
        heads(64, 2, 16)
    with pytest.raises(ValueError, match=r"64 channels .* num_heads 3"):
        heads(64, 3, 0)
    with pytest.raises(ValueError, match=r"64 channels .* head_channels 48"):
        heads(64, 1, 48)


def test_positional_waves_equal_those_of_diffusers() -> None:
    t = torch.tensor([1, 2, 7, 1000])
    expected = get_timestep_embedding(t, 10, flip_sin_to_cos=False, downscale_freq_shift=1)
    torch.testing.assert_close(positional_waves(t, 10), expected)
    torch.testing.assert_close(positional_waves(t, 9), expected[:, :9])


def test_fourier_waves_equal_their_formula() -> None:
    x, frequencies = randn(3), 16 * randn(4, seed=1)
    angles = 2 * np.pi * np.outer(x.double(), frequencies.double())
    expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    np.testing.assert_allclose(fourier_waves(x, frequencies).numpy(), expected, atol=1e-4)  # angles go up to 300


def test_fourier_embedding_is_that_of_log_t_with_frequencies_that_are_saved() -> None:
    torch.manual_seed(0)
    embedding, other = TimeEmbedding(4, 6, "fourier"), TimeEmbedding(4, 6, "fourier")
    t = torch.tensor([1, 3, 50])
    waves = fourier_waves(torch.tensor([0.0, math.log(3), math.log(50)]), embedding.frequencies)
    expected = embedding.layer2(nn.functional.silu(embedding.layer1(waves)))
    torch.testing.assert_close(embedding(t), expected)
    assert not torch.allclose(other(t), expected)
    other.load_state_dict(embedding.state_dict())
    assert torch.equal(other(t), embedding(t))
    assert "frequencies" not in dict(embedding.named_parameters())


def test_fourier_frequencies_have_the_published_spread() -> None:
    torch.manual_seed(0)
    frequencies = TimeEmbedding(20_000, 1, "fourier").frequencies
    assert frequencies.mean().item() == pytest.approx(0, abs=5 * 16 / 20_000**0.5)
    assert frequencies.std().item() == pytest.approx(16, rel=5 / 40_000**0.5)


def test_label_embeddings_have_about_unit_length_and_one_more_row_for_no_label() -> None:
    torch.manual_seed(0)
    embedding = label_embedding(99, 400)
    assert embedding(torch.tensor([0, 99])).shape == (2, 400)
    assert embedding.weight.norm(dim=1).mean().item() == pytest.approx(1, rel=0.02)


def test_adaptive_group_norm_equals_its_formula() -> None:
    torch.manual_seed(0)
    norm, x, condition = AdaptiveGroupNorm(8, 3), randn(2, 8, 3, 3), randn(2, 3, seed=1)  # two groups of four
    groups = x.double().numpy().reshape(2, 2, -1)
    normed = (groups - groups.mean(axis=2, keepdims=True)) / np.sqrt(groups.var(axis=2, keepdims=True) + 1e-6)
    numbers = condition.double().numpy() @ norm.affine.weight.detach().double().numpy().T
    scale, shift = np.split((numbers + norm.affine.bias.detach().numpy())[:, :, None, None], 2, axis=1)
    expected = normed.reshape(x.shape) * (1 + scale) + shift
    np.testing.assert_allclose(norm(x, condition).detach().numpy(), expected, atol=1e-5)


def test_group_norm_without_a_condition_has_weights_of_its_own() -> None:
    norm, peer, x = AdaptiveGroupNorm(8, 0), nn.GroupNorm(2, 8, eps=1e-6), randn(2, 8, 3, 3)
    for parameter, other in zip(norm.parameters(), peer.parameters(), strict=True):
        nn.init.normal_(parameter)
        other.data.copy_(parameter)
    assert torch.equal(norm(x, None), peer(x))


@pytest.mark.parametrize("mode", ["none", "down", "up"])
@pytest.mark.parametrize("adaptive", [False, True], ids=["added", "adaptive"])
@pytest.mark.parametrize("rescale", [False, True])
@torch.no_grad()
def test_a_block_equals_that_of_diffusers(mode: ResampleMode, adaptive: bool, rescale: bool) -> None:
    torch.manual_seed(0)
    ours = UNetBlock(
        8,
        16,
        norm1_dim=0,
        added_dim=0 if adaptive else 6,
        norm2_dim=6 if adaptive else 0,
        dropout=0.0,
        resample=Resample(mode),
        convolved_skip=False,
        rescale=rescale,
        num_heads=0,
    )
    peer = ResnetBlock2D(
        in_channels=8,
        out_channels=16,
        temb_channels=6,
        groups=2,
        groups_out=4,
        eps=1e-6,
        time_embedding_norm="scale_shift" if adaptive else "default",
        output_scale_factor=math.sqrt(2) if rescale else 1.0,
        down=mode == "down",
        up=mode == "up",
    )
    names = {"norm1": "norm1.norm", "norm2": "norm2.norm", "conv1": "conv1", "conv2": "conv2", "conv_shortcut": "skip"}
    names["time_emb_proj"] = "norm2.affine" if adaptive else "time"
    for theirs, name in names.items():
        for parameter, other in zip(peer.get_submodule(theirs).parameters(), ours.get_submodule(name).parameters()):
            parameter.copy_(other)
    x, time = randn(2, 8, 4, 4), randn(2, 6, seed=1)
    condition = Condition(None, None, nn.functional.silu(time)) if adaptive else Condition(None, time, None)
    torch.testing.assert_close(ours(x, condition), peer(x, time), rtol=1e-5, atol=1e-5)
