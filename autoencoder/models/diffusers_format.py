"""Autoencoders in the format of Hugging Face's diffusers: a folder with config.json and safetensors files.

Both networks are latent diffusion's (Rombach et al., arXiv 2112.10752). They differ in names, and in one thing
more: our attention computes q, k and v in one 1x1 convolution, diffusers' in three linear layers.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from autoencoder.models.blocks import num_groups
from autoencoder.models.config import AutoencoderConfig
from autoencoder.models.sharded_weights import files_of_index
from ldgan.engine.cli import UserError
from ldgan.engine.config import from_dict
from ldgan.engine.files import new_folder, write_through
from ldgan.engine.rebuilding import meta_device
from ldgan.engine.weights import check_fit, load_weights

CONFIG_FILE, STEM = "config.json", "diffusion_pytorch_model"
WEIGHTS_FILE = f"{STEM}.safetensors"
# Of one file or of an index of shards, with or without a variant (fp16, say).
WEIGHTS_NAME = re.compile(rf"{STEM}(\.safetensors\.index)?(\.(?P<variant>\w+))?\.(?(1)json|safetensors)")
PIPELINE_FILE, PIPELINE_PART = "model_index.json", "vae"
CLASS_NAME = "AutoencoderKL"
STATISTICS = ("latent_mean", "latent_std")  # the buffers of an autoencoder that are settings in this format

M = TypeVar("M", bound=nn.Module)

# Types of levels without and with self-attention after each residual block.
DOWN_BLOCKS = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
UP_BLOCKS = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")

# What diffusers takes for settings that a config.json lacks. Settings that are not here have no part in the result.
DEFAULTS: Mapping[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}

# Our layers in residual blocks and attention that diffusers names otherwise; q, k and v follow each other in ours.
LAYERS: Mapping[str, tuple[str, ...]] = {
    "skip": ("conv_shortcut",),
    "norm": ("group_norm",),
    "qkv": ("to_q", "to_k", "to_v"),
    "out": ("to_out.0",),
}
# Older names of attention's layers: diffusers renames them as it loads, and many published files have them.
OLD_LAYERS: Mapping[str, str] = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OLD_LAYER = re.compile(rf"(?<=\.attentions\.\d\.)({'|'.join(OLD_LAYERS)})(?=\.)")


def is_diffusers_folder(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` holds a model in diffusers' format, of whatever class, or a whole pipeline with a ``vae``."""
    return (_model_folder(Path(path)) / CONFIG_FILE).is_file()


def _model_folder(path: Path) -> Path:
    """``path`` itself, or the ``vae`` in it if it is the folder of a pipeline."""
    return path / PIPELINE_PART if (path / PIPELINE_FILE).is_file() else path


def load_diffusers(folder: str | os.PathLike[str], build: Callable[[AutoencoderConfig], M]) -> M:
    """Load an AutoencoderKL of diffusers into the network that ``build`` makes of its numbers.

    ``folder`` is one of its save_pretrained, or of a whole pipeline's, whose ``vae`` is taken. Its weights may be of
    a variant (fp16, say) and in several shards; they become fp32. The statistics of its latents are its config's.

    Raises:
        UserError: a file is missing or damaged, the two do not belong together, or the model has something
            that ours cannot have.
    """
    folder = _model_folder(Path(folder))
    settings = read_settings(folder / CONFIG_FILE, CLASS_NAME, DEFAULTS)
    config = _to_config(settings, folder / CONFIG_FILE)
    file = weights_file(folder)
    found = {OLD_LAYER.sub(lambda match: OLD_LAYERS[match[0]], name): t for name, t in read_weights(file).items()}
    with meta_device(folder / CONFIG_FILE, len(found)):
        expected = _to_diffusers(config, build(config).state_dict())
    why = f"it does not belong to its {CONFIG_FILE}"
    check_fit(file, found, expected, by=f"by its {CONFIG_FILE}", why=why)
    autoencoder = build(config)
    state = autoencoder.state_dict()
    for ours, theirs in _tensor_names(config, state):
        state[ours].copy_(torch.cat([found[name] for name in theirs]).view_as(state[ours]))
    for ours, statistic in zip(STATISTICS, _latent_statistics(settings, folder / CONFIG_FILE)):
        state[ours].copy_(statistic.view_as(state[ours]))
    return autoencoder


def save_diffusers(config: AutoencoderConfig, state: Mapping[str, Tensor], folder: str | os.PathLike[str]) -> None:
    """Write an autoencoder, its numbers and its state dict, as a new ``folder`` that diffusers loads, or not at all.

    Its statistics become ``latents_mean`` and ``latents_std``, beside a ``scaling_factor`` of 1.

    Raises:
        UserError: ``folder`` exists, or the network has something that the format cannot say.
    """
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder}: exists already; choose another folder")
    settings = _to_settings(config, *(state[name].flatten().tolist() for name in STATISTICS))
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _to_diffusers(config, state).items()}
    with new_folder(folder) as temporary:
        # diffusers asks for this piece of metadata, and loads no file without it.
        write_through(temporary / WEIGHTS_FILE, safetensors.torch.save(tensors, {"format": "pt"}))
        write_through(temporary / CONFIG_FILE, (json.dumps(settings, indent=2) + "\n").encode())


def read_settings(path: Path, class_name: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a config.json that have ``defaults``; a UserError if it is damaged, or of another class."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; give a folder that diffusers' save_pretrained wrote") from error
    except (ValueError, RecursionError) as error:  # bad JSON, bytes that are not UTF-8, or brackets without end
        raise UserError(f"{path}: damaged ({error}); get the file again") from error
    found = document.get("_class_name") if isinstance(document, dict) else None
    if found != class_name:
        raise UserError(f"{path}: describes a model of class {found!r:.80}; only {class_name!r} can be loaded")
    return {key: document.get(key, default) for key, default in defaults.items()}


def _to_config(settings: Mapping[str, Any], path: Path) -> AutoencoderConfig:
    """Our numbers for diffusers' settings; errors name ``path``."""

    def demand(condition: bool, key: str, expected: str) -> None:
        if not condition:
            raise UserError(f"{path}: {key} is {settings[key]!r:.200}, and only {expected} can be loaded")

    widths = settings["block_out_channels"]
    integers = isinstance(widths, list) and all(type(width) is int and width > 0 for width in widths)
    demand(integers and len(widths) > 0, "block_out_channels", "a list of whole numbers")
    demand(settings["act_fn"] in ("silu", "swish"), "act_fn", "'silu'")
    demand(
        settings["out_channels"] == settings["in_channels"],
        "out_channels",
        f"in_channels' {settings['in_channels']!r:.80}",
    )
    quant_conv = settings["use_quant_conv"]
    demand(settings["use_post_quant_conv"] == quant_conv, "use_post_quant_conv", f"use_quant_conv's {quant_conv}")
    for key, types in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
        known = isinstance(settings[key], list) and all(block in types for block in settings[key])
        demand(known and len(settings[key]) == len(widths), key, f"{len(widths)} of {' and '.join(types)}")
    groups = settings["norm_num_groups"]
    divides = type(groups) is int and groups > 0 and not any(width % groups for width in widths)
    demand(divides, "norm_num_groups", f"a divisor of block_out_channels {widths}")
    attention = [block == DOWN_BLOCKS[1] for block in settings["down_block_types"]]
    mirrored = [block == UP_BLOCKS[1] for block in reversed(settings["up_block_types"])]
    demand(attention == mirrored, "up_block_types", "attention where down_block_types has it")
    numbers = {
        "image_channels": settings["in_channels"],
        "latent_channels": settings["latent_channels"],
        "base_channels": math.gcd(*widths),
        "channel_multipliers": [width // math.gcd(*widths) for width in widths],
        "num_res_blocks": settings["layers_per_block"],
        "mid_attention": settings["mid_block_add_attention"],
        "attention_factors": [2**level for level, present in enumerate(attention) if present],
        "num_groups": groups,
        "latent_convolutions": quant_conv,
    }
    return from_dict(AutoencoderConfig, numbers, str(path))


def _to_settings(config: AutoencoderConfig, mean: list[float], std: list[float]) -> dict[str, Any]:
    """The contents of config.json."""
    groups = {config.num_groups or num_groups(width) for width in config.widths}
    if len(groups) > 1:
        raise UserError(
            f"diffusers' format has one number of groups for all normalisations, this autoencoder {sorted(groups)};"
            " train one with network.num_groups set"
        )
    attention = [2**level in config.attention_factors for level in range(len(config.widths))]
    return {
        "_class_name": CLASS_NAME,
        "in_channels": config.image_channels,
        "out_channels": config.image_channels,
        "down_block_types": [DOWN_BLOCKS[present] for present in attention],
        "up_block_types": [UP_BLOCKS[present] for present in reversed(attention)],
        "block_out_channels": config.widths,
        "layers_per_block": config.num_res_blocks,
        "act_fn": "silu",
        "latent_channels": config.latent_channels,
        "norm_num_groups": groups.pop(),
        "scaling_factor": 1.0,
        "latents_mean": mean,
        "latents_std": std,
        "use_quant_conv": config.latent_convolutions,
        "use_post_quant_conv": config.latent_convolutions,
        "mid_block_add_attention": config.mid_attention,
    }


def _latent_statistics(settings: Mapping[str, Any], path: Path) -> tuple[Tensor, Tensor]:
    """Mean and std, (latent_channels,), with which ``z = std * standardised + mean`` as diffusers' pipelines say.

    They compute ``latents / scaling_factor + shift_factor``, or, where the config has statistics of each channel,
    ``latents * latents_std / scaling_factor + latents_mean``.
    """
    mean, std = settings["latents_mean"], settings["latents_std"]
    if mean is None or std is None:
        mean, std = [settings["shift_factor"] or 0.0], [1.0]
    try:
        shape = (settings["latent_channels"],)
        statistics = torch.tensor(mean).expand(shape), (torch.tensor(std) / settings["scaling_factor"]).expand(shape)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: latents_mean, latents_std and scaling_factor do not fit: {error}") from error
    if not all(tensor.isfinite().all() for tensor in statistics) or not (statistics[1] > 0).all():
        raise UserError(f"{path}: the latents' standard deviation is {statistics[1].tolist()}, not positive")
    return statistics


def read_weights(file: Path) -> dict[str, Tensor]:
    """All tensors of a file, or of the shards that an index lists."""
    if file.suffix != ".json":
        return load_weights(file)
    weights: dict[str, Tensor] = {}
    for shard in files_of_index(file):
        weights |= load_weights(shard)
    return weights


def weights_file(folder: Path) -> Path:
    """The file of weights, or the index of its shards; where there is none, the name of the one that is missing.

    Weights without a variant are taken where there are any, else those of the one variant that is there.
    """
    found = {
        match["variant"]: path for path in sorted(folder.iterdir()) if (match := WEIGHTS_NAME.fullmatch(path.name))
    }
    if None in found:
        return found[None]
    if len(found) > 1:
        raise UserError(f"{folder}: holds weights in the variants {', '.join(found)}, and none without; keep one")
    if not found and (others := sorted(path.name for path in folder.glob(f"{STEM}*"))):
        raise UserError(f"{folder}: holds {others[0]}, and neither {WEIGHTS_FILE} nor an index; get the folder again")
    return next(iter(found.values()), folder / WEIGHTS_FILE)


def _to_diffusers(config: AutoencoderConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under diffusers' names and in its shapes."""
    tensors = {}
    for ours, theirs in _tensor_names(config, state):
        for name, tensor in zip(theirs, state[ours].chunk(len(theirs))):
            # Attention has linear layers for our 1x1 convolutions: (C, C) for (C, C, 1, 1), (C,) for (C,).
            tensors[name] = tensor.reshape(tensor.shape[:2]) if ".to_" in name else tensor
    return tensors


def _tensor_names(config: AutoencoderConfig, state: Mapping[str, Tensor]) -> Iterator[tuple[str, list[str]]]:
    """Our name of each weight, and diffusers' names of the tensors that make it up, one after the other."""
    for ours, theirs in _module_names(config).items():
        for name in state:
            if name.startswith(f"{ours}."):
                layer, _, kind = name.removeprefix(f"{ours}.").rpartition(".")
                layers = LAYERS.get(layer, (layer,))
                yield name, [f"{theirs}.{layer}.{kind}" if layer else f"{theirs}.{kind}" for layer in layers]


def _module_names(config: AutoencoderConfig) -> dict[str, str]:
    """Our name of each block and of each layer outside blocks, and diffusers'."""
    names: dict[str, str] = {}
    if config.latent_convolutions:
        names |= {"encoder.latent_conv": "quant_conv", "decoder.latent_conv": "post_quant_conv"}
    middle = ["resnets.0", "attentions.0", "resnets.1"] if config.mid_attention else ["resnets.0", "resnets.1"]
    for part in ("encoder", "decoder"):
        names |= {f"{part}.{name}": f"{part}.{name}" for name in ("conv_in", "conv_out")}
        names[f"{part}.norm_out"] = f"{part}.conv_norm_out"
        names |= {f"{part}.mid.{index}": f"{part}.mid_block.{name}" for index, name in enumerate(middle)}
    last = len(config.widths) - 1
    for level in range(last + 1):
        # diffusers counts the decoder's levels from the lowest resolution up.
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{last - level}"
        names |= _block_names(config, 2**level, "encoder", down, config.num_res_blocks)
        names |= _block_names(config, 2**level, "decoder", up, config.num_res_blocks + 1)
        if level < last:
            names[f"encoder.levels.f{2 ** (level + 1)}_down"] = f"{down}.downsamplers.0"
        if level > 0:
            names[f"decoder.levels.f{2**level}_up"] = f"{up}.upsamplers.0"
    return names


def _block_names(config: AutoencoderConfig, factor: int, part: str, theirs: str, num_blocks: int) -> dict[str, str]:
    kinds = {"block": "resnets"} | ({"attention": "attentions"} if factor in config.attention_factors else {})
    return {
        f"{part}.levels.f{factor}_{ours}{index}": f"{theirs}.{name}.{index}"
        for ours, name in kinds.items()
        for index in range(num_blocks)
    }
