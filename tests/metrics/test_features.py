"""Feature networks: what they compute equals what the libraries they come from compute, offline."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldgan.engine.cli import UserError
from ldgan.metrics.features import FeatureNetwork, feature_network

TINY_TIMM = "timm:test_efficientnet"


def images(seed: int = 0, side: int = 20) -> Tensor:
    """Smooth colours: two images (2, 3, side, side)."""
    coarse = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return (255 * nn.functional.interpolate(coarse, side, mode="bilinear")).round().to(torch.uint8)


def published_weights(name: str) -> Path:
    """A file of the folder that LDGAN_WEIGHTS names."""
    if "LDGAN_WEIGHTS" not in os.environ:
        pytest.skip("LDGAN_WEIGHTS names no folder of weights")
    return Path(os.environ["LDGAN_WEIGHTS"]) / name


def saved(network: nn.Module, path: Path) -> Path:
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    torch.save(state, path) if path.suffix == ".pth" else save_file(state, path)
    return path


def resized(pixels: Tensor, side: int, resample: Image.Resampling) -> Tensor:
    """Pillow's antialiased resizing, float32 in [0, 1]."""
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()).resize((side, side), resample) for image in pixels]
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2) / 255


@pytest.fixture(scope="module")
def squeezenet() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.squeezenet1_1(weights=None).eval()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_squeezenet_is_torchvisions_up_to_its_classifier(squeezenet: nn.Module, tmp_path: Path, suffix: str) -> None:
    network = feature_network("squeezenet", saved(squeezenet, tmp_path / f"weights{suffix}"), "cpu")
    assert (network.name, network.num_features) == ("squeezenet", 512)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    inputs = (images(side=224) / 255 - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        expected = squeezenet.features(inputs).mean(dim=(2, 3))
    torch.testing.assert_close(network(images(side=224)), expected)


@pytest.mark.parametrize("side", [20, 500])
def test_images_are_resized_with_antialiasing(squeezenet: nn.Module, tmp_path: Path, side: int) -> None:
    network = feature_network("squeezenet", saved(squeezenet, tmp_path / "weights.pth"), "cpu")
    pixels = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    by_pillow = (255 * resized(pixels, 224, Image.Resampling.BILINEAR)).round().to(torch.uint8)
    expected = network(by_pillow)  # but for Pillow's rounding to whole grey levels
    assert float((network(pixels) - expected).norm()) < 0.01 * float(expected.norm())


def test_published_alexnet() -> None:
    path = published_weights("alexnet_torchvision_features.safetensors")
    network = feature_network("alexnet", path, "cpu")
    peer = torchvision.models.alexnet(weights=None).features
    peer.load_state_dict({name.removeprefix("features."): tensor for name, tensor in load_file(path).items()})
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = peer((images(side=224) / 255 - mean[:, None, None]) / std[:, None, None]).mean(dim=(2, 3))
    torch.testing.assert_close(network(images(side=224)), expected)
    assert (network.num_features, network.distance_name) == (256, "Frechet distance (alexnet)")


@pytest.mark.parametrize(
    ("name", "file"), [("test_efficientnet", None), ("tf_efficientnet_lite0", "efficientnet_lite0_timm.safetensors")]
)
def test_a_network_of_timm_gives_its_pooled_features_at_its_own_size(
    tmp_path: Path, name: str, file: str | None
) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    peer = timm.create_model(name, pretrained=False).eval()
    if file is not None:
        peer.load_state_dict(load_file(published_weights(file)))
    network = feature_network(f"timm:{name}", saved(peer, tmp_path / "weights.safetensors"), "cpu")
    config = timm.data.resolve_model_data_config(peer)
    side, mean, std = config["input_size"][-1], *(torch.tensor(config[key]) for key in ("mean", "std"))
    with torch.no_grad():
        inputs = (images(side=side) / 255 - mean[:, None, None]) / std[:, None, None]
        expected = peer.forward_head(peer.forward_features(inputs), pre_logits=True)
    torch.testing.assert_close(network(images(side=side)), expected)
    assert network.num_features == expected.shape[1]
    assert network.distance_name == f"Frechet distance (timm:{name})"


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights under torch-fidelity's names."""
    extractors = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extractors, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(nn.Module, "load_state_dict", lambda *args: None)
        network = extractors.FeatureExtractorInceptionV3("random", ["2048"], verbose=False)
    return saved(network, tmp_path_factory.mktemp("inception") / "weights.pth")


def test_inception_is_that_of_torch_fidelity(inception_weights: Path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    peer = FeatureExtractorInceptionV3("peer", ["2048"], feature_extractor_weights_path=str(inception_weights))
    network = feature_network("inception", inception_weights, "cpu")
    (expected,) = peer(images())
    assert float(expected.std()) > 0
    torch.testing.assert_close(network(images()), expected, rtol=0, atol=0)
    assert (network.num_features, network.distance_name) == (2048, "FID")


class Everything(nn.Module):
    """Notes the precision it computes in."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.float().mean(dim=(2, 3)))


def test_features_are_fp32_without_gradients_whatever_surrounds_them() -> None:
    network = FeatureNetwork("stub", Everything().train(), "cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = network(images())
    assert features.dtype == torch.float32
    assert not features.requires_grad
    torch.testing.assert_close(features, network(images()), rtol=0, atol=0)


@pytest.mark.parametrize("wrong", [images().float(), images()[:, :1], images()[0]])
def test_images_of_another_kind_are_refused(wrong: Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be uint8 \(B, 3, H, W\)"):
        FeatureNetwork("stub", Everything(), "cpu")(wrong)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("inception", "torch-fidelity's weights-inception-2015-12-05-6726825d.pth"),
        ("alexnet", "torchvision's alexnet-owt-7be5be79.pth"),
        (TINY_TIMM, "timm's weights of this network"),
    ],
)
def test_without_a_file_the_error_names_it_and_the_flag(name: str, file: str) -> None:
    with pytest.raises(UserError, match=f"nothing is downloaded; get {file}.*--feature-weights FILE"):
        feature_network(name, None, "cpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet", "no feature network 'resnet'; there are inception, alexnet, squeezenet and timm:NAME"),
        ("timm:nothing", "timm has no such network"),
        ("timm:hf-hub:somebody/something", "timm has no such network"),  # it would have to be downloaded
        (f"{TINY_TIMM}.nothing", "feature network timm:test_efficientnet.nothing: "),
    ],
)
def test_unknown_networks_are_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        feature_network(name, tmp_path / "weights.safetensors", "cpu")


@pytest.mark.parametrize("name", ["inception", "alexnet", TINY_TIMM])
def test_weights_of_another_network_are_refused(squeezenet: nn.Module, tmp_path: Path, name: str) -> None:
    path = saved(squeezenet, tmp_path / "weights.safetensors")
    with pytest.raises(
        UserError, match=f"{path}: not the weights of {name}[: ].*; give the file of that network"
    ) as error:
        feature_network(name, path, "cpu")
    assert len(str(error.value).splitlines()) == 1
