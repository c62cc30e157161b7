"""Feature networks: pretrained classifiers of photos without their last layer. Nothing is downloaded."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldgan.engine.cli import UserError
from ldgan.engine.weights import TORCHVISION_FILES, fill, load_weights

INCEPTION, TIMM_PREFIX = "inception", "timm:"


TORCHVISION_NETWORKS: Mapping[str, str] = {"alexnet": "alexnet", "squeezenet": "squeezenet1_1"}  # torchvision's names
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"


class FeatureNetwork:
    """Turns images into features, frozen and always in fp32; made by `feature_network`."""

    def __init__(self, name: str, network: nn.Module, device: torch.device | str) -> None:
        """``network`` maps uint8 images (B, 3, H, W) to features (B, d)."""
        self.name = name
        self._network = network.to(device).float().eval().requires_grad_(False)
        self._device = torch.device(device)
        self.num_features = self(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape[1]

    @property
    def distance_name(self) -> str:
        """What a Frechet distance in these features may be called: FID is the one in Inception's."""
        return "FID" if self.name == INCEPTION else f"Frechet distance ({self.name})"

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Features, fp32 (B, num_features), of images, uint8 (B, 3, H, W), of any size."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be uint8 (B, 3, H, W), not {images.dtype} {tuple(images.shape)}")
        with torch.autocast(self._device.type, enabled=False):
            return self._network(images.to(self._device))


class Inception(nn.Module):
    """The network of the FID: torch-fidelity's conversion of the original, resizing as TensorFlow 1 did."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        super().__init__()
        # torch-fidelity unpickles its file without a check; so it is given a file that holds our tensors alone.
        file = io.BytesIO()
        torch.save(dict(weights), file)
        file.seek(0)
        self.extractor = FeatureExtractorInceptionV3(INCEPTION, ["2048"], feature_extractor_weights_path=file)

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, 2048) of images, uint8 (B, 3, H, W)."""
        return self.extractor(images)[0]


class PooledFeatures(nn.Module):
    """Resizes and normalises images for a network, and averages what it gives over positions."""

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
        self.network, self.size, self.interpolation = network, size, interpolation
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, d) of images, uint8 (B, 3, H, W)."""
        inputs = F.interpolate(images / 255, self.size, mode=self.interpolation, antialias=True).clamp(0, 1)
        features = self.network((inputs - self.mean) / self.std)
        return features.mean(dim=(2, 3)) if features.ndim == 4 else features


def feature_network(name: str, weights: Path | None, device: torch.device | str) -> FeatureNetwork:
    """The feature network ``name`` on ``device``, with the weights of a local file.

    - ``inception``: Inception-v3 of the FID, 2048 features; the file is torch-fidelity's.
    - ``alexnet``, ``squeezenet``: torchvision's convolutions at 224 px, 256 and 512 features.
    - ``timm:NAME``: pooled features of a network of timm, at its own input size.

    Images of any size are resized with antialiasing to the square that the network was trained on, those for
    Inception without, as the definition of the FID has it.

    Raises:
        UserError: there is no such network, or its weights are missing or do not fit.
    """
    if name == INCEPTION:
        path = _given(weights, name, f"torch-fidelity's {INCEPTION_FILE}")
        return FeatureNetwork(name, _inception(path), device)
    if name in TORCHVISION_NETWORKS:
        path = _given(weights, name, f"torchvision's {TORCHVISION_FILES[TORCHVISION_NETWORKS[name]]}")
        return FeatureNetwork(name, _torchvision(name, path), device)
    if name.startswith(TIMM_PREFIX):
        path = _given(weights, name, "timm's weights of this network, safetensors or .pth")
        return FeatureNetwork(name, _timm(name, path), device)
    known = ", ".join([INCEPTION, *TORCHVISION_NETWORKS])
    raise UserError(f"no feature network {name!r}; there are {known} and {TIMM_PREFIX}NAME (say timm:resnet50)")


def _inception(path: Path) -> nn.Module:
    try:
        return Inception(load_weights(path))
    except RuntimeError as error:
        raise _unfit(path, INCEPTION, error) from error


def _torchvision(name: str, path: Path) -> nn.Module:
    import torchvision

    with torch.device("meta"):  # the classifier, most of the weights, never takes any memory
        network = torchvision.models.get_model(TORCHVISION_NETWORKS[name], weights=None)
    network.classifier = nn.Identity()
    fill(network, path, name)
    # ImageNet's mean and standard deviation, which torchvision's weights were trained with.
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return PooledFeatures(network.features, size=(224, 224), interpolation="bilinear", mean=mean, std=std)


def _timm(name: str, path: Path) -> nn.Module:
    import timm
    from timm.data import resolve_model_data_config

    timm_name = name.removeprefix(TIMM_PREFIX)
    if not timm.is_model(timm_name):
        raise UserError(f"feature network {name}: timm has no such network; timm.list_models() lists them")
    try:
        network = timm.create_model(timm_name, pretrained=False, num_classes=0)
    except RuntimeError as error:  # no such pretrained tag
        raise UserError(f"feature network {name}: {error}") from error
    fill(network, path, name)
    config = resolve_model_data_config(network)
    return PooledFeatures(
        network,
        size=config["input_size"][1:],
        interpolation="bilinear" if config["interpolation"] == "bilinear" else "bicubic",
        mean=config["mean"],
        std=config["std"],
    )


def _given(weights: Path | None, name: str, what: str) -> Path:
    if weights is None:
        raise UserError(f"feature network {name}: nothing is downloaded; get {what}, and give --feature-weights FILE")
    return weights


def _unfit(path: Path, name: str, error: RuntimeError) -> UserError:
    reason = textwrap.shorten(str(error), 200)
    return UserError(f"{path}: not the weights of {name} ({reason}); give the file of that network")
