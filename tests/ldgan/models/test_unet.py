"""The U-Net: what depends on what, at the start and after weights have moved, under each of its options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldgan.models.blocks import AdaptiveGroupNorm, Condition, ConvResample, UNetBlock
from ldgan.models.unet import UNet, UNetConfig, residual_outputs

CHANNELS, SIDE, Z_DIM = 3, 8, 6

NCSNPP = {
    "attention_layout": "ncsnpp",
    "resblock": "ncsnpp",
    "fir": True,
    "progressive_input": "residual",
    "adaptive_output_norm": False,
    "style_dim": 10,
}
ADM = {
    "attention_layout": "adm",
    "head_channels": 4,
    "rescale": False,
    "z_dim": 0,
    "time_conditioning": "adaptive_norm",
}
DDPM = {"attention_layout": "adm", "resblock": "plain", "rescale": False, "z_dim": 0}


def fresh_unet(*, num_classes: int = 0, out_channels: int = CHANNELS, **changes: Any) -> UNet:
    torch.manual_seed(0)
    numbers: dict[str, Any] = {
        "base_channels": 8,
        "num_res_blocks": 1,
        "z_dim": Z_DIM,
        "num_mapping_layers": 2,
        "embedding_dim": 16,
    }
    config = UNetConfig(**numbers | changes)
    return UNet(config, channels=CHANNELS, resolution=SIDE, out_channels=out_channels, num_classes=num_classes).eval()


def moved_unet(**changes: Any) -> UNet:
    """A U-Net whose residual branches do something, as after some training."""
    unet = fresh_unet(**changes)
    for layer in residual_outputs(unet):
        nn.init.xavier_uniform_(layer.weight)
    return unet


def inputs(batch_size: int, unet: UNet, num_steps: int = 4) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """(x_t, z, t, labels) for ``unet``; t and labels go round."""
    random = torch.Generator().manual_seed(1)
    x_t = torch.randn(batch_size, CHANNELS, SIDE, SIDE, generator=random)
    z = torch.randn(batch_size, unet.z_dim, generator=random) if unet.z_dim else None
    labels = torch.arange(batch_size) % unet.num_classes if unet.num_classes else None
    return x_t, z, torch.arange(batch_size) % num_steps + 1, labels


def distance(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().mean().item()


def names_of(unet: UNet, kind: type[nn.Module]) -> list[str]:
    return [name for name, module in unet.named_modules() if isinstance(module, kind)]


@pytest.mark.parametrize("rescale", [True, False])
def test_every_residual_branch_starts_as_nothing(rescale: bool) -> None:
    unet = fresh_unet(rescale=rescale)
    blocks = [module for module in unet.modules() if isinstance(module, UNetBlock)]
    assert len(blocks) == 2 + 1 + 2 + 4 + 1  # down, its resampling, middle, up, its resampling
    for block in blocks:
        block.attention = nn.Identity()  # its own branch stands behind the block's
        x, vector = torch.randn(2, block.conv1.in_channels, 4, 4), torch.randn(2, 16)
        expected = block.skip(block.resample(x)) * (0.5**0.5 if rescale else 1.0)
        assert torch.equal(block(x, Condition(vector, vector, vector)), expected)


def test_time_acts_through_residual_branches_alone() -> None:
    for unet, same in ((fresh_unet(), True), (moved_unet(), False)):
        x_t, z, _, _ = inputs(2, unet)
        first, last = unet(x_t, z, torch.tensor([1, 1])), unet(x_t, z, torch.tensor([4, 4]))
        assert torch.equal(first, last) == same


@pytest.mark.parametrize("changes", [{}, NCSNPP, {"z_conditioning": "add"}, {"time_conditioning": "adaptive_norm"}])
def test_the_network_listens_to_all_of_its_inputs(changes: dict[str, Any]) -> None:
    unet = moved_unet(num_classes=3, **changes)
    x_t, z, t, labels = inputs(2, unet)
    output = unet(x_t, z, t, labels)
    assert distance(unet(x_t + 1, z, t, labels), output) > 1e-2
    assert distance(unet(x_t, -z, t, labels), output) > 1e-2
    assert distance(unet(x_t, z, t % 4 + 1, labels), output) > 1e-2
    assert distance(unet(x_t, z, t, labels + 1), output) > 1e-2


def test_the_style_depends_on_the_direction_of_z_alone() -> None:
    unet = fresh_unet()
    z = inputs(4, unet)[1]
    torch.testing.assert_close(unet.mapping(5 * z), unet.mapping(z))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        NCSNPP,
        ADM,
        DDPM,
        {"channel_multipliers": [1], "attention_resolutions": []},
        {"channel_multipliers": [2, 1, 3], "num_res_blocks": 2, "attention_resolutions": [8, 2], "num_heads": 2},
        {"channel_multipliers": [1, 2, 3], "resblock": "plain", "fir": True, "progressive_input": "residual"},
        {"z_conditioning": "add", "time_embedding": "fourier", "num_classes": 2, "out_channels": 2 * CHANNELS},
        {"z_conditioning": "add", "time_conditioning": "adaptive_norm", "style_dim": 5},
    ],
)
def test_every_weight_takes_part(changes: dict[str, Any]) -> None:
    unet = moved_unet(**changes)
    x_t, z, t, labels = inputs(3, unet)
    labels = None if labels is None else torch.arange(3)  # the null label is one of them
    output = unet(x_t.requires_grad_(), z, t, labels)
    assert output.shape == (3, changes.get("out_channels", CHANNELS), SIDE, SIDE)
    output.square().sum().backward()
    assert [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert x_t.grad.abs().amin(dim=1).gt(0).all()


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("every_block", ["down.4x4_block0", "middle.0", "middle.1", "up.4x4_block0", "up.4x4_block1"]),
        ("adm", ["down.4x4_block0", "middle.0", "up.4x4_block0", "up.4x4_block1"]),
        ("ncsnpp", ["down.4x4_block0", "middle.0", "up.4x4_block1"]),
    ],
)
def test_attention_is_where_it_was_asked_for(layout: str, expected: list[str]) -> None:
    def blocks_with_attention(**changes: Any) -> list[str]:
        names, ending = fresh_unet(attention_layout=layout, **changes).state_dict(), ".attention.qkv.weight"
        return [name.removesuffix(ending) for name in names if name.endswith(ending)]

    assert blocks_with_attention() == expected
    assert blocks_with_attention(attention_resolutions=[]) == ([] if layout == "every_block" else ["middle.0"])


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [({}, {1}), ({"num_heads": 2}, {2}), ({"head_channels": 4}, {2, 4}), ({"head_channels": 8}, {1, 2})],
)
def test_heads_of_each_attention(numbers: dict[str, int], expected: set[int]) -> None:
    unet = fresh_unet(attention_resolutions=[8, 4], **numbers)  # of 8 and 16 channels
    heads = {
        module.attention.num_heads
        for module in unet.modules()
        if hasattr(module, "attention") and hasattr(module.attention, "num_heads")
    }
    assert heads == expected


def test_the_number_of_heads_changes_the_output_alone() -> None:
    one, two = moved_unet(), moved_unet(num_heads=2)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert distance(one(*inputs(2, one)), two(*inputs(2, two))) > 1e-3


@pytest.mark.parametrize(
    ("resblock", "convolved", "plain"),
    [("biggan", False, []), ("ncsnpp", True, []), ("plain", False, ["down.4x4_down", "up.8x8_up"])],
)
def test_the_way_from_one_resolution_to_the_next(resblock: str, convolved: bool, plain: list[str]) -> None:
    unet = fresh_unet(resblock=resblock)
    assert names_of(unet, ConvResample) == plain
    keys = unet.state_dict()
    assert [f"{name}.skip.weight" in keys for name in ("down.4x4_down", "up.8x8_up")] == [convolved] * 2
    assert "down.8x8_block0.skip.weight" not in keys  # as wide as before


@pytest.mark.parametrize("resblock", ["biggan", "plain"])
def test_the_filter_has_no_weights_and_changes_the_output(resblock: str) -> None:
    plain, filtered = moved_unet(resblock=resblock), moved_unet(resblock=resblock, fir=True)
    filtered.load_state_dict(plain.state_dict())
    assert distance(plain(*inputs(2, plain)), filtered(*inputs(2, plain))) > 1e-3


@pytest.mark.parametrize("rescale", [True, False])
def test_the_input_pyramid_joins_each_level(rescale: bool) -> None:
    unet = moved_unet(channel_multipliers=[1, 2, 2], progressive_input="residual", rescale=rescale)
    assert list(unet.pyramid) == ["4x4_down", "2x2_down"]
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name in (
        "down.4x4_down",
        "down.4x4_block0",
        "down.2x2_down",
        "down.2x2_block0",
        "pyramid.4x4_down",
        "pyramid.2x2_down",
    ):
        hook = lambda _, given, made, name=name: seen.update({name: (given[0], made)})  # noqa: E731
        unet.get_submodule(name).register_forward_hook(hook)
    x_t, z, t, _ = inputs(2, unet)
    unet(x_t, z, t)
    scale = 0.5**0.5 if rescale else 1.0
    assert seen["pyramid.4x4_down"][0] is x_t
    assert seen["pyramid.2x2_down"][0] is seen["down.4x4_block0"][0]  # the pyramid goes on from the sum
    for side in ("4x4", "2x2"):
        joined = (seen[f"pyramid.{side}_down"][1] + seen[f"down.{side}_down"][1]) * scale
        assert torch.equal(seen[f"down.{side}_block0"][0], joined)


@pytest.mark.parametrize("z_conditioning", ["add", "adaptive_norm"])
@pytest.mark.parametrize("time_conditioning", ["add", "adaptive_norm"])
@torch.no_grad()
def test_z_and_time_go_the_ways_they_are_sent(z_conditioning: str, time_conditioning: str) -> None:
    """Cut one way, and the inputs that go the other way are those that still act."""
    ways = {"z": z_conditioning, "time": time_conditioning, "label": time_conditioning}
    for cut in ("add", "adaptive_norm"):
        unet = moved_unet(z_conditioning=z_conditioning, time_conditioning=time_conditioning, num_classes=2)
        for module in unet.modules():
            if isinstance(module, UNetBlock) and module.time is not None and cut == "add":
                module.time.weight.zero_()
            if isinstance(module, AdaptiveGroupNorm) and module.affine is not None and cut == "adaptive_norm":
                module.affine.weight.zero_()
        x_t, z, t, labels = inputs(2, unet)
        output = unet(x_t, z, t, labels)
        changed = {"z": (x_t, -z, t, labels), "time": (x_t, z, t + 1, labels), "label": (x_t, z, t, labels + 1)}
        for name, given in changed.items():
            assert torch.equal(unet(*given), output) == (ways[name] == cut), (cut, name)


@torch.no_grad()
def test_adaptive_time_steers_the_second_normalisation_alone() -> None:
    unet = moved_unet(time_conditioning="adaptive_norm", num_classes=2)
    x_t, z, t, labels = inputs(2, unet)
    style, time = unet.mapping(z), unet.time_embedding(t) + unet.label_embedding(labels)
    expected = {"norm1": style, "norm2": torch.cat([nn.functional.silu(time), style], dim=1), "norm_out": style}
    conditions = []
    for name, module in unet.named_modules():
        if isinstance(module, AdaptiveGroupNorm):
            kind = name.rpartition(".")[2]
            module.register_forward_hook(lambda _, given, __, kind=kind: conditions.append((kind, given[1])))
    unet(x_t, z, t, labels)
    assert len(conditions) == 2 * 10 + 1
    assert all(torch.equal(condition, expected[kind]) for kind, condition in conditions)


def test_the_last_normalisation_is_steered_only_where_asked() -> None:
    def weights(**changes: Any) -> set[str]:
        return {name for name in fresh_unet(**changes).state_dict() if name.startswith("norm_out")}

    plain = {"norm_out.norm.weight", "norm_out.norm.bias"}
    assert weights() == {"norm_out.affine.weight", "norm_out.affine.bias"}
    assert weights(adaptive_output_norm=False) == weights(z_dim=0) == weights(z_conditioning="add") == plain


def test_without_z_there_is_no_mapping_and_no_steered_normalisation() -> None:
    unet = moved_unet(z_dim=0)
    assert [name for name in unet.state_dict() if "mapping" in name or "affine" in name] == []
    output = unet(*inputs(2, unet))
    assert torch.equal(output, unet(*inputs(2, unet)))


def test_no_label_is_the_unlabelled_network_but_for_its_embedding() -> None:
    labelled, unlabelled = moved_unet(num_classes=3), moved_unet()
    weights = {name: value for name, value in labelled.state_dict().items() if name != "label_embedding.weight"}
    unlabelled.load_state_dict(weights)
    x_t, z, t, labels = inputs(2, labelled)
    null = torch.full_like(labels, 3)
    assert not torch.equal(labelled(x_t, z, t, null), unlabelled(x_t, z, t))
    nn.init.zeros_(labelled.label_embedding.weight[3])
    assert torch.equal(labelled(x_t, z, t, null), unlabelled(x_t, z, t))
    assert not torch.equal(labelled(x_t, z, t, labels), unlabelled(x_t, z, t))


def test_labels_are_added_to_the_time_embedding() -> None:
    """Shifting all labels' embedding by v equals shifting the time embedding by v."""
    unet, shift = moved_unet(num_classes=2), torch.linspace(-1, 1, 16)
    given = inputs(2, unet)
    with torch.no_grad():
        unet.label_embedding.weight += shift
        by_label = unet(*given)
        unet.label_embedding.weight -= shift
        unet.time_embedding.layer2.bias += shift
    torch.testing.assert_close(unet(*given), by_label, rtol=1e-4, atol=1e-5)


def test_time_embeddings_differ() -> None:
    positional, fourier = moved_unet(), moved_unet(time_embedding="fourier")
    assert set(fourier.state_dict()) - set(positional.state_dict()) == {"time_embedding.frequencies"}
    x_t, z, t, _ = inputs(2, fourier)
    assert distance(fourier(x_t, z, t), fourier(x_t, z, t + 1)) > 1e-3


def test_dropout_acts_in_training_alone() -> None:
    unet = moved_unet(dropout=0.5)
    given = inputs(2, unet)
    torch.testing.assert_close(unet(*given), moved_unet()(*given), rtol=0, atol=0)
    unet.train()
    assert distance(unet(*given), unet(*given)) > 1e-2


@pytest.mark.parametrize("changes", [{}, NCSNPP, {**ADM, "num_classes": 3}])
def test_a_sample_does_not_depend_on_the_rest_of_its_batch(changes: dict[str, Any]) -> None:
    unet = moved_unet(**changes)
    given = inputs(4, unet)
    batch = unet(*given)
    alone = torch.cat([unet(*(None if part is None else part[i : i + 1] for part in given)) for i in range(4)])
    torch.testing.assert_close(alone, batch, rtol=1e-4, atol=1e-5)


def test_arguments_that_contradict_each_other() -> None:
    with pytest.raises(ValueError, match=r"resolution 8 .* channel_multipliers \[1, 1, 1, 1, 1\]"):
        fresh_unet(channel_multipliers=[1, 1, 1, 1, 1])
    with pytest.raises(ValueError, match="num_heads is 2 and head_channels is 4"):
        fresh_unet(num_heads=2, head_channels=4)
    with pytest.raises(ValueError, match="num_res_blocks is 0"):
        fresh_unet(num_res_blocks=0)


def test_inputs_that_are_missing_or_too_many() -> None:
    x_t, z, t, _ = inputs(2, fresh_unet())
    labels = torch.tensor([0, 1])
    for changes, wrong in (
        ({}, (x_t, None, t, None)),
        ({}, (x_t, z, t, labels)),
        ({"z_dim": 0}, (x_t, z, t, None)),
        ({"num_classes": 2}, (x_t, z, t, None)),
    ):
        with pytest.raises(ValueError, match=r"(z_dim|num_classes) is \d, but (z|labels) is"):
            fresh_unet(**changes)(*wrong)
