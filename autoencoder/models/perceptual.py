"""Perceptual distances: how far apart two images are in the features of a network trained on photos.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018
(arXiv 1801.03924). Nothing is downloaded: weights come from a local file or from a library's own cache.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldgan.engine.cli import UserError
from ldgan.engine.config import option
from ldgan.engine.weights import TORCHVISION_FILES, fill, hub_file, load_weights

TIMM_PREFIX = "timm:"


@dataclass
class PerceptualConfig:
    """A distance between features of a pretrained network, added to that between pixels."""

    network: str = option("none", "lpips-alex, lpips-squeeze, lpips-vgg, timm:NAME (a network of timm), or none")
    backbone_weights: str | None = option(
        None, "local file of the network's weights; null: look where torch.hub and timm keep theirs"
    )
    weight: float = option(1.0, "weight of the perceptual distance")


class Backbone(NamedTuple):
    """The network under an LPIPS distance."""

    lpips_name: str
    torchvision_name: str
    min_size: int
    """Smallest height and width, in pixels, of which its last feature map has a position left."""

    @property
    def file_name(self) -> str:
        """Under which torchvision publishes the weights."""
        return TORCHVISION_FILES[self.torchvision_name]


PERCEPTUAL_NETWORKS: Mapping[str, Backbone] = {
    "lpips-alex": Backbone("alex", "alexnet", 31),
    "lpips-squeeze": Backbone("squeeze", "squeezenet1_1", 17),
    "lpips-vgg": Backbone("vgg", "vgg16", 16),
}


class PerceptualDistance(nn.Module):
    """A frozen network that tells images apart, always in fp32; made by `perceptual_network`."""

    def __init__(self, distance: nn.Module, *, name: str, min_size: int) -> None:
        super().__init__()
        self.name, self.min_size = name, min_size
        self._distance = distance.eval().requires_grad_(False)

    def forward(self, images: Tensor, reference: Tensor) -> Tensor:
        """Distances (B,), fp32 and at least 0, of images (B, 3, H, W) in [-1, 1] from their reference.

        Raises:
            UserError: if the images are smaller than the network can take.
        """
        self.check_size(*images.shape[-2:])
        # Unit-normalised features of nearly equal images differ by less than bf16 resolves.
        with torch.autocast(images.device.type, enabled=False):
            return self._distance(images.float(), reference.float()).flatten()

    def check_size(self, height: int, width: int) -> None:
        """Raise a UserError if images of ``height`` x ``width`` pixels are smaller than the network can take."""
        if min(height, width) < self.min_size:
            raise UserError(
                f"perceptual network {self.name}: images of {height}x{width} px are too small, it takes"
                f" {self.min_size} px or more; choose another network or larger images"
            )


class FeatureDistance(nn.Module):
    """Squared distance of unit-normalised feature maps, averaged over positions and layers: LPIPS without
    its learned weights of channels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """``network`` is one of timm's; ``mean`` and ``std``, per channel, are those of its inputs in [0, 1]."""
        super().__init__()
        self.network: Any = network  # has methods that nn.Module does not know of
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: Tensor, reference: Tensor) -> Tensor:
        """Distances (B,) of images (B, 3, H, W) in [-1, 1]."""
        pairs = zip(self.features(images), self.features(reference))
        return torch.stack([(x - y).square().sum(dim=1).mean(dim=(1, 2)) for x, y in pairs]).mean(dim=0)

    def features(self, images: Tensor) -> list[Tensor]:
        """Feature maps (B, C, h, w) of each layer, of length 1 along channels."""
        inputs = ((images + 1) / 2 - self.mean) / self.std
        maps = self.network.forward_intermediates(inputs, intermediates_only=True, output_fmt="NCHW")
        return [F.normalize(features, dim=1, eps=1e-10) for features in maps]


def build_perceptual(config: PerceptualConfig, device: torch.device) -> PerceptualDistance | None:
    """The perceptual distance that the config asks for."""
    if config.network == "none":
        return None
    return perceptual_network(config.network, config.backbone_weights).to(device)


def perceptual_network(name: str, backbone_weights: str | os.PathLike[str] | None) -> PerceptualDistance:
    """The perceptual distance ``name``: one of `PERCEPTUAL_NETWORKS`, or timm:NAME for a network of timm.

    ``backbone_weights`` is a file of torchvision's (LPIPS) or timm's weights; None looks where torch.hub and
    timm keep what they downloaded before. The random numbers of the caller are not touched.

    Raises:
        UserError: if there is no such network, or its weights are missing or do not fit.
    """
    weights = Path(backbone_weights) if backbone_weights is not None else None
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # lpips calls torchvision by outdated names
        if name in PERCEPTUAL_NETWORKS:
            return _lpips_distance(name, weights)
        if name.startswith(TIMM_PREFIX):
            return _timm_distance(name, weights)
    known = ", ".join(PERCEPTUAL_NETWORKS)
    raise UserError(f"no perceptual network {name!r}; there are {known} and {TIMM_PREFIX}NAME (say timm:resnet18)")


def _lpips_distance(name: str, weights: Path | None) -> PerceptualDistance:
    import lpips  # with torchvision's models it takes a second, which only those who use it shall pay

    backbone = PERCEPTUAL_NETWORKS[name]
    cached = hub_file(backbone.file_name)
    path = weights or (cached if cached.is_file() else None)
    if path is None:
        raise _no_weights(name, f"torchvision's {backbone.torchvision_name} weights, {backbone.file_name}", cached)
    # pnet_rand: otherwise lpips downloads the backbone, and it has no option for a local file.
    distance = lpips.LPIPS(net=backbone.lpips_name, pretrained=False, pnet_rand=True, verbose=False)
    heads = Path(lpips.__file__).parent / "weights" / "v0.1" / f"{backbone.lpips_name}.pth"
    distance.load_state_dict(load_weights(heads), strict=False)
    # lpips' slice2.3.weight is torchvision's features.3.weight.
    fill(distance.net, path, name, name_in_file=lambda key: "features." + key.partition(".")[2])
    return PerceptualDistance(distance, name=name, min_size=backbone.min_size)


def _timm_distance(name: str, weights: Path | None) -> PerceptualDistance:
    network = _timm_network(name)
    config = network.pretrained_cfg
    cached = _cached_by_timm(config)
    path = weights or next((path for path in cached if path.is_file()), None)
    if path is None:
        raise _no_weights(name, "timm's weights of this network (safetensors or .pth)", *cached[-1:])
    fill(network, path, name)
    distance = FeatureDistance(network, config["mean"], config["std"])
    layers = getattr(network.feature_info, "info", network.feature_info)
    return PerceptualDistance(distance, name=name, min_size=max(layer["reduction"] for layer in layers))


def _timm_network(name: str) -> Any:
    """A network of timm without its classifier, with random weights, that takes images of any size."""
    import timm  # takes a second, which only those who use it shall pay

    timm_name = name.removeprefix(TIMM_PREFIX)
    if not timm.is_model(timm_name):
        raise UserError(f"perceptual network {name}: timm has no such network; timm.list_models() lists them")
    network: Any
    try:
        return timm.create_model(timm_name, num_classes=0, dynamic_img_size=True, dynamic_img_pad=True)
    except TypeError:  # convolutional networks take any size, and refuse the options by which transformers do
        network = timm.create_model(timm_name, num_classes=0)
    except RuntimeError as error:  # no such pretrained tag
        raise UserError(f"perceptual network {name}: {error}") from error
    if network.pretrained_cfg["fixed_input_size"] or not hasattr(network, "forward_intermediates"):
        raise UserError(f"perceptual network {name}: gives no feature maps of images of any size; choose another one")
    return network


def _cached_by_timm(config: Mapping[str, Any]) -> list[Path]:
    """Where timm keeps the weights of a network, by its ``pretrained_cfg``, once they have been downloaded."""
    from huggingface_hub import try_to_load_from_cache

    places = []
    if config.get("hf_hub_id"):
        found = try_to_load_from_cache(config["hf_hub_id"], config.get("hf_hub_filename") or "model.safetensors")
        places += [Path(found)] if isinstance(found, str) else []
    if config.get("url"):
        places.append(hub_file(config["url"].rpartition("/")[2]))
    return places


def _no_weights(name: str, what: str, *places: Path) -> UserError:
    put = f"put the file at {places[0]} or give its path" if places else "give the path of the file"
    return UserError(
        f"perceptual network {name}: nothing is downloaded, and {what}, are not on this machine;"
        f" {put} (in training, perceptual.backbone_weights=PATH)"
    )
