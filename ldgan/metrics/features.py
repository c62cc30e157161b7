"""Feature networks: pretrained networks whose features stand for images in metrics. Nothing is downloaded."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import textwrap
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldgan.engine.cli import UserError
from ldgan.engine.weights import TORCHVISION_FILES, fill, hub_file, load_weights, sha256_of

INCEPTION, TIMM_PREFIX = "inception", "timm:"
TORCHVISION_NETWORKS: Mapping[str, str] = {"alexnet": "alexnet", "squeezenet": "squeezenet1_1"}  # torchvision's names
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"

# Metrics that have names of their own in the features of Inception, and only there.
INCEPTION_METRICS: Mapping[str, str] = {
    "frechet_distance": "FID",
    "kernel_distance": "KID",
    "classifier_score": "Inception score",
}


class Features(NamedTuple):
    """What a network makes of B images, fp32."""

    pooled: Tensor
    """Features, one vector for each image, (B, d)."""
    logits: Tensor | None
    """Of the network's classes, (B, K); None where it has none."""


class Extractor(nn.Module):
    """Maps images, uint8 (B, 3, H, W), to `Features`: what a `FeatureNetwork` consists of."""

    preprocessing: Mapping[str, Any]
    """How images become the network's inputs, as JSON: numbers depend on it as they do on the weights."""

    def forward(self, images: Tensor) -> Features:
        """See the class."""
        raise NotImplementedError


class FeatureNetwork:
    """Turns images into features, frozen and always in fp32; made by `feature_network`.

    ``num_features`` is their number d, and ``num_classes`` that of the logits, 0 if there are none.
    """

    def __init__(self, name: str, extractor: Extractor, device: torch.device | str) -> None:
        """``name`` goes into the names of metrics; ``extractor`` is moved to ``device``."""
        self.name = name
        self._extractor = extractor.to(device).float().eval().requires_grad_(False)
        self._device = torch.device(device)
        pooled, logits = self.features_and_logits(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
        self.num_features = pooled.shape[1]
        self.num_classes = 0 if logits is None else logits.shape[1]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over weights and preprocessing."""
        preprocessing = json.dumps(self._extractor.preprocessing, sort_keys=True)
        return hashlib.sha256(f"{sha256_of(self._extractor.state_dict())}{preprocessing}".encode()).hexdigest()

    def metric_name(self, metric: str) -> str:
        """What a metric in these features may be called; FID, KID and Inception score are those in Inception's.

        ``metric`` is its general name: frechet_distance, kernel_distance, classifier_score, precision, recall, ...
        """
        if self.name == INCEPTION and metric in INCEPTION_METRICS:
            return INCEPTION_METRICS[metric]
        return f"{metric.replace('frechet', 'Frechet').replace('_', ' ')} ({self.name})"

    def __call__(self, images: Tensor) -> Tensor:
        """Features, fp32 (B, num_features), of images, uint8 (B, 3, H, W), of any size; see `features_and_logits`."""
        return self.features_and_logits(images).pooled

    @torch.inference_mode()
    def features_and_logits(self, images: Tensor) -> Features:
        """Features, and logits where there are any, of images, uint8 (B, 3, H, W), of any size, in one pass.

        Raises:
            UserError: some of them are NaN or infinite.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be uint8 (B, 3, H, W), not {images.dtype} {tuple(images.shape)}")
        with torch.autocast(self._device.type, enabled=False):
            features: Features = self._extractor(images.to(self._device))
        if not all(values.isfinite().all() for values in features if values is not None):
            raise UserError(
                f"feature network {self.name}: gives NaN or infinity; check that the file of its weights is whole and"
                " its own"
            )
        return features


class Inception(Extractor):
    """The network of the FID: torch-fidelity's conversion of the original, resizing as TensorFlow 1 did.

    2,048 features, and 1,008 logits without the last layer's bias, as the original Inception score takes them.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        super().__init__()
        self.preprocessing = {"size": [299, 299], "interpolation": "bilinear of TensorFlow 1", "antialias": False}
        # torch-fidelity unpickles its file without a check; so it is given a file that holds our tensors alone.
        file = io.BytesIO()
        torch.save(dict(weights), file)
        file.seek(0)
        outputs = ["2048", "logits_unbiased"]
        self.extractor = FeatureExtractorInceptionV3(INCEPTION, outputs, feature_extractor_weights_path=file)

    def forward(self, images: Tensor) -> Features:
        """See `Extractor`."""
        return Features(*self.extractor(images))


class Resized(Extractor):
    """Resizes, with antialiasing, and normalises images for a network."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        size: tuple[int, int],
        interpolation: str,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        """``size`` is (height, width) in pixels; ``mean`` and ``std`` are those of the inputs in [0, 1]."""
        super().__init__()
        self.network: Any = network  # timm's have methods that nn.Module does not know of
        self.size, self.interpolation = size, interpolation
        self.preprocessing = {
            "size": list(size),
            "interpolation": interpolation,
            "antialias": True,
            "mean": list(mean),
            "std": list(std),
        }
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def inputs(self, images: Tensor) -> Tensor:
        """What the network is given for images, uint8 (B, 3, H, W)."""
        resized = F.interpolate(images / 255, self.size, mode=self.interpolation, antialias=True).clamp(0, 1)
        return (resized - self.mean) / self.std


class Convolutions(Resized):
    """Feature maps averaged over positions."""

    def forward(self, images: Tensor) -> Features:
        """See `Extractor`."""
        return Features(self.network(self.inputs(images)).mean(dim=(2, 3)), logits=None)


class TimmNetwork(Resized):
    """Features as timm pools them for the last layer of a classifier, and that layer's logits if it is there."""

    def forward(self, images: Tensor) -> Features:
        """See `Extractor`."""
        network = self.network
        maps = network.forward_features(self.inputs(images))
        logits = network.forward_head(maps) if network.num_classes else None
        return Features(network.forward_head(maps, pre_logits=True), logits)


def feature_network(name: str, weights: Path | None, device: torch.device | str) -> FeatureNetwork:
    """The feature network ``name`` on ``device``, with the weights of a local file.

    - ``inception``: Inception-v3 of the FID, 2048 features and 1008 logits; the file is torch-fidelity's.
    - ``alexnet``, ``squeezenet``: torchvision's convolutions at 224 px, 256 and 512 features, no logits.
    - ``timm:NAME``: pooled features of a network of timm, at its own input size, and logits if the file holds them.
      ``timm:NAME@PIXELS`` is the same at another input size; transformers' position embeddings are resampled.

    Images of any size are resized with antialiasing to that square, those for Inception without, as the definition
    of the FID has it. Without a file (``weights`` is None), inception's and torchvision's are looked for where
    torch.hub puts what these libraries download. The random numbers of the caller are not touched.

    Raises:
        UserError: there is no such network, or its weights are missing or do not fit.
    """
    with torch.random.fork_rng(devices=[]):  # networks are born with random weights
        return FeatureNetwork(name, _extractor(name, weights), device)


def add_feature_flags(parser: argparse.ArgumentParser, default: str | None, more: Sequence[str] = ()) -> None:
    """Add the flags that choose a feature network; ``more`` are names that the command knows besides."""
    names = ", ".join([*more, INCEPTION, *TORCHVISION_NETWORKS, "timm:NETWORK"])
    parser.add_argument(
        "--features",
        metavar="NAME",
        help=f"network whose features are compared: {names} or timm:NETWORK@PIXELS, such as"
        f" timm:vit_large_patch14_dinov2@224 (default: {default or 'none'})",
    )
    parser.add_argument(
        "--feature-weights",
        type=Path,
        metavar="FILE",
        help="weights of that network, safetensors or .pth (default: where torch.hub keeps them)",
    )
    parser.add_argument(
        "--inception-weights",
        type=Path,
        metavar="FILE",
        help="short for --features inception --feature-weights FILE, for FID, KID and Inception score",
    )


def chosen_features(flags: argparse.Namespace, default: str | None) -> tuple[str | None, Path | None]:
    """Name and weights of the network that the flags of `add_feature_flags` choose.

    Raises:
        UserError: they contradict each other, or give weights of nothing.
    """
    if flags.inception_weights is not None:
        if flags.features not in (None, INCEPTION):
            raise UserError(
                f"--inception-weights are not those of --features {flags.features}; give --feature-weights instead"
            )
        if flags.feature_weights is not None:
            raise UserError("--inception-weights and --feature-weights name one file twice; give only one of them")
        return INCEPTION, flags.inception_weights
    name = flags.features or default
    if flags.feature_weights is not None and name is None:
        raise UserError("--feature-weights says not which network it belongs to; give --features NAME too")
    return name, flags.feature_weights


def _extractor(name: str, weights: Path | None) -> Extractor:
    if name == INCEPTION:
        return _inception(_given(weights, name, f"torch-fidelity's {INCEPTION_FILE}", hub_file(INCEPTION_FILE)))
    if name in TORCHVISION_NETWORKS:
        file_name = TORCHVISION_FILES[TORCHVISION_NETWORKS[name]]
        return _torchvision(name, _given(weights, name, f"torchvision's {file_name}", hub_file(file_name)))
    if name.startswith(TIMM_PREFIX):
        return _timm(name, _given(weights, name, "timm's weights of this network, safetensors or .pth"))
    known = ", ".join([INCEPTION, *TORCHVISION_NETWORKS])
    raise UserError(f"no feature network {name!r}; there are {known} and {TIMM_PREFIX}NAME (say timm:resnet50)")


def _inception(path: Path) -> Inception:
    try:
        return Inception(load_weights(path))
    except RuntimeError as error:
        reason = textwrap.shorten(str(error), 200)
        raise UserError(f"{path}: not the weights of {INCEPTION} ({reason}); give the file of that network") from error


def _torchvision(name: str, path: Path) -> Convolutions:
    import torchvision

    with torch.device("meta"):  # the classifier, most of the weights, never takes any memory
        network = torchvision.models.get_model(TORCHVISION_NETWORKS[name], weights=None)
    network.classifier = nn.Identity()
    fill(network, path, name)
    # ImageNet's mean and standard deviation, which torchvision's weights were trained with.
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return Convolutions(network.features, size=(224, 224), interpolation="bilinear", mean=mean, std=std)


def _timm(name: str, path: Path) -> TimmNetwork:
    from timm.data import resolve_model_data_config

    timm_name, at, pixels = name.removeprefix(TIMM_PREFIX).partition("@")
    network = _timm_network(name, timm_name, path)
    config = resolve_model_data_config(network)
    size = config["input_size"][1:]
    if at:
        size = _resize_timm(name, network, pixels)
    return TimmNetwork(
        network,
        size=size,
        interpolation="bilinear" if config["interpolation"] == "bilinear" else "bicubic",
        mean=config["mean"],
        std=config["std"],
    )


def _timm_network(name: str, timm_name: str, path: Path) -> Any:
    """A network of timm with the weights, and as many classes as the file has."""
    import timm

    if not timm.is_model(timm_name):
        raise UserError(f"feature network {name}: timm has no such network; timm.list_models() lists them")
    try:
        config = timm.get_pretrained_cfg(timm_name)
    except RuntimeError as error:  # no such pretrained tag
        raise UserError(f"feature network {name}: {error}") from error
    layers = (config and config.classifier) or ""
    classifier = layers if isinstance(layers, str) else layers[0]  # distilled transformers have two, of one size
    classes = load_weights(path).get(f"{classifier}.weight", torch.empty(0))
    network = timm.create_model(timm_name, pretrained=False, num_classes=len(classes))
    fill(network, path, name)
    return network


def _resize_timm(name: str, network: Any, pixels: str) -> tuple[int, int]:
    """Have a network of timm take inputs of ``pixels`` x ``pixels``; returns (height, width).

    Position embeddings are resampled by timm, with antialiasing; DINOv2's own code does without.
    """
    if not pixels.isdecimal() or int(pixels) == 0:
        raise UserError(f"feature network {name}: {pixels!r} is no size in pixels; say {TIMM_PREFIX}NETWORK@224")
    size = int(pixels), int(pixels)
    patch, _ = getattr(getattr(network, "patch_embed", None), "patch_size", (1, 1))
    if size[0] % patch:
        raise UserError(f"feature network {name}: it takes patches of {patch} px; choose a multiple of that")
    if hasattr(network, "set_input_size"):
        network.set_input_size(img_size=size)
    elif network.pretrained_cfg["fixed_input_size"]:
        raise UserError(f"feature network {name}: timm knows it at its own input size only; leave the @{pixels} out")
    return size


def _given(weights: Path | None, name: str, what: str, cached: Path | None = None) -> Path:
    """The file of weights, or what a library downloaded to ``cached`` before."""
    if weights is not None:
        return weights
    if cached is not None and cached.is_file():
        return cached
    place = f", or put it at {cached}" if cached is not None else ""
    raise UserError(
        f"feature network {name}: nothing is downloaded; get {what}, and give --feature-weights FILE{place}"
    )
