"""Perceptual distances: equal to independent ones, frozen, fp32, and never from the network.

What needs no photos learnt from is tested on random backbones; the real LPIPS where LDGAN_WEIGHTS is a folder of
torchvision's convolutions and of EfficientNet-Lite0.
"""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import lpips
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import torchvision.models as tv
from torch import Tensor, nn

from autoencoder.models.perceptual import PERCEPTUAL_NETWORKS, FeatureDistance, PerceptualDistance, perceptual_network
from ldgan.engine.cli import UserError
from ldgan.engine.weights import load_weights

# After which of torchvision's layers LPIPS takes its features.
LAYERS = {"lpips-alex": (1, 4, 7, 9, 11), "lpips-squeeze": (1, 4, 7, 9, 10, 11, 12), "lpips-vgg": (3, 8, 15, 22, 29)}
FILES = {
    "lpips-alex": "alexnet_torchvision_features.safetensors",
    "lpips-squeeze": "squeezenet1_1_torchvision_features.safetensors",
    "timm:tf_efficientnet_lite0": "efficientnet_lite0_timm.safetensors",
}
CONVNET, TRANSFORMER = "timm:test_resnet.r160_in1k", "timm:test_vit.r160_in1k"  # timm's own, for tests
SIZE = 64


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which torch.hub keeps weights; neither it nor timm's cache has any."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def real(request: pytest.FixtureRequest) -> PerceptualDistance:
    if "LDGAN_WEIGHTS" not in os.environ:
        pytest.skip("LDGAN_WEIGHTS names no folder of weights")
    return perceptual_network(request.param, Path(os.environ["LDGAN_WEIGHTS"]) / FILES[request.param])


each_real = pytest.mark.parametrize("real", FILES, indirect=True)


def smooth_images(number: int = 0, size: int = SIZE) -> Tensor:
    coarse = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(number)) * 2 - 1
    return F.interpolate(coarse, size=size, mode="bilinear")


def noise(size: int = SIZE) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(9))


def torchvision_network(name: str) -> nn.Module:
    """The backbone under an LPIPS distance, random, in evaluation mode."""
    torch.manual_seed(0)
    return tv.get_model(PERCEPTUAL_NETWORKS[name].torchvision_name, weights=None).eval()


def save_features(network: nn.Module, path: Path) -> Path:
    """Save the convolutions by torchvision's names, and a classifier that nobody needs."""
    weights = {f"features.{name}": tensor for name, tensor in network.features.state_dict().items()}
    weights["classifier.1.weight"] = torch.zeros(3)
    torch.save(weights, path) if path.suffix == ".pth" else safetensors.torch.save_file(weights, path)
    return path


def lpips_by_hand(name: str, features: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Zhang et al., equation 1, in float64."""
    heads = load_weights(Path(lpips.__file__).parent / f"weights/v0.1/{PERCEPTUAL_NETWORKS[name].lpips_name}.pth")
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64)[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64)[:, None, None]

    def maps(images: Tensor) -> Iterator[Tensor]:
        images = (images.double() - shift) / scale
        for number, layer in enumerate(features.double()):
            images = layer(images)
            if number in LAYERS[name]:
                yield images / images.norm(dim=1, keepdim=True).clamp(min=1e-10)

    with torch.no_grad():
        pairs = zip(maps(x), maps(y))
        layers = [
            (heads[f"lin{i}.model.1.weight"] * (a - b) ** 2).sum(1).mean((1, 2)) for i, (a, b) in enumerate(pairs)
        ]
    return torch.stack(layers).sum(dim=0).float()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", ["lpips-alex", "lpips-squeeze"])
def test_lpips_on_a_local_file_equals_its_formula(tmp_path: Path, name: str, suffix: str) -> None:
    network, x, y = torchvision_network(name), smooth_images(0), smooth_images(1)
    distance = perceptual_network(name, save_features(network, tmp_path / f"weights{suffix}"))
    torch.testing.assert_close(distance(x, y), lpips_by_hand(name, network.features, x, y), rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision")  # lpips calls it by outdated names
@pytest.mark.parametrize("real", ["lpips-alex", "lpips-squeeze"], indirect=True)
def test_the_real_lpips_is_that_of_the_package(real: PerceptualDistance) -> None:
    package = lpips.LPIPS(net=PERCEPTUAL_NETWORKS[real.name].lpips_name, pnet_rand=True, verbose=False)
    weights = safetensors.torch.load_file(Path(os.environ["LDGAN_WEIGHTS"]) / FILES[real.name])
    for name, layer in package.net.named_parameters():
        layer.data = weights[f"features.{name.split('.', 1)[1]}"]
    x, y = smooth_images(0), smooth_images(1)
    torch.testing.assert_close(real(x, y), package(x, y).flatten())


@each_real
def test_distance_grows_with_distortion_from_zero(real: PerceptualDistance) -> None:
    x = smooth_images()
    assert torch.equal(real(x, x), torch.zeros(2))
    distances = [real(x + strength * noise(), x) for strength in (0.02, 0.1, 0.5)]
    assert all((nearer < farther).all() for nearer, farther in itertools.pairwise(distances))
    assert (distances[0] > 0).all()


@each_real
def test_the_gradient_reaches_the_reconstruction_and_no_weight(real: PerceptualDistance) -> None:
    x, reference = (smooth_images() + 0.1 * noise()).requires_grad_(), smooth_images()
    start = real(x, reference).sum()
    start.backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in real.parameters())
    step = 1e-2 / x.grad.norm() * x.grad
    downhill = real((x - step).detach(), reference).sum()
    torch.testing.assert_close(start - downhill, (step * x.grad).sum(), rtol=0.2, atol=0)  # first order


@pytest.mark.parametrize("name", PERCEPTUAL_NETWORKS)
def test_file_names_are_torchvisions(name: str) -> None:
    backbone = PERCEPTUAL_NETWORKS[name]
    url = tv.get_model_weights(backbone.torchvision_name).IMAGENET1K_V1.url
    assert url.endswith(f"/{backbone.file_name}")


def test_the_smallest_images_of_lpips_are_as_large_as_its_layers_need() -> None:
    for name, layers in LAYERS.items():
        # Weights play no part, and without them even vgg16 is there at once.
        with torch.device("meta"):
            features = tv.get_model(PERCEPTUAL_NETWORKS[name].torchvision_name, weights=None).features[: layers[-1] + 1]
            smallest = PERCEPTUAL_NETWORKS[name].min_size
            assert features(torch.empty(1, 3, smallest, smallest)).numel() > 0
            with pytest.raises(RuntimeError):
                features(torch.empty(1, 3, smallest - 1, smallest - 1))


def test_images_too_small_for_the_network_are_refused_in_one_line(tmp_path: Path) -> None:
    distance = perceptual_network(
        "lpips-alex", save_features(torchvision_network("lpips-alex"), tmp_path / "weights.pth")
    )
    assert distance(torch.zeros(1, 3, 31, 40), torch.zeros(1, 3, 31, 40)).item() == 0
    with pytest.raises(UserError, match="lpips-alex: images of 40x30 px are too small, it takes 31 px or more; choose"):
        distance(torch.zeros(1, 3, 40, 30), torch.zeros(1, 3, 40, 30))


def save_timm(name: str, path: Path) -> Path:
    torch.manual_seed(0)
    safetensors.torch.save_file(timm.create_model(name.removeprefix("timm:")).state_dict(), path)
    return path


@pytest.mark.parametrize("name", [CONVNET, TRANSFORMER])
def test_a_timm_distance_is_the_mean_over_layers_of_unit_normalised_maps(tmp_path: Path, name: str) -> None:
    path = save_timm(name, tmp_path / "weights.safetensors")
    network = timm.create_model(name.removeprefix("timm:"), dynamic_img_size=True) if name == TRANSFORMER else None
    network = (network or timm.create_model(name.removeprefix("timm:"))).eval().double()
    network.load_state_dict(load_weights(path))
    mean, std = (torch.tensor(network.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    layers: list[Tensor] = []
    for layer in getattr(network.feature_info, "info", network.feature_info):
        network.get_submodule(layer["module"]).register_forward_hook(lambda *given: layers.append(given[-1].detach()))

    def maps(images: Tensor) -> list[Tensor]:
        layers.clear()
        network((((images + 1) / 2 - mean) / std).double())
        # Transformers give tokens (B, 1 + positions, C), the first of which stands for the image as a whole.
        found = [x[:, network.num_prefix_tokens :].transpose(1, 2) if x.ndim == 3 else x.flatten(2) for x in layers]
        return [x / x.norm(dim=1, keepdim=True) for x in found]

    x, y = smooth_images(0), smooth_images(1)
    expected = torch.stack([(a - b).square().sum(1).mean(1) for a, b in zip(maps(x), maps(y))]).mean(0).float()
    assert len(layers) > 1
    torch.testing.assert_close(perceptual_network(name, path)(x, y), expected, rtol=1e-4, atol=1e-6)


def test_a_timm_transformer_takes_any_size(tmp_path: Path) -> None:
    distance = perceptual_network(TRANSFORMER, save_timm(TRANSFORMER, tmp_path / "weights.safetensors"))
    x = smooth_images(size=50)[:, :, :, :37]
    assert torch.equal(distance(x, x), torch.zeros(2))
    assert (distance(x, -x) > 0).all()


class Pointwise(nn.Module):
    """Looks like a network of timm, and looks at each pixel by itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)])

    def forward_intermediates(self, x: Tensor, **_: object) -> list[Tensor]:
        return [x := layer(x) for layer in self.layers]


def test_the_distance_of_tiled_images_is_that_of_one_tile() -> None:
    distance = PerceptualDistance(FeatureDistance(Pointwise(), (0.5,) * 3, (0.5,) * 3), name="pointwise", min_size=1)
    x, y = smooth_images(0, 8), smooth_images(1, 8)
    torch.testing.assert_close(distance(x.repeat(1, 1, 2, 2), y.repeat(1, 1, 2, 2)), distance(x, y))
    x, y = x[:, :, :1, :1], y[:, :, :1, :1]  # one pixel: two unit vectors a layer
    cosines = [F.cosine_similarity(a, b) for a, b in zip(*(Pointwise().forward_intermediates(z) for z in (x, y)))]
    torch.testing.assert_close(distance(x, y), torch.stack([2 - 2 * c.flatten() for c in cosines]).mean(0))


def test_under_autocast_it_is_still_computed_in_fp32(tmp_path: Path) -> None:
    name = "lpips-squeeze"
    distance = perceptual_network(name, save_features(torchvision_network(name), tmp_path / "weights.pth"))
    x, y = smooth_images(0), smooth_images(1)
    expected = distance(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(distance(x, y), expected)
    torch.testing.assert_close(distance(x.bfloat16(), y), distance(x.bfloat16().float(), y), rtol=0, atol=0)


def test_making_it_draws_no_random_number_of_the_caller(tmp_path: Path) -> None:
    path = save_features(torchvision_network("lpips-squeeze"), tmp_path / "weights.pth")
    before = torch.get_rng_state()
    perceptual_network("lpips-squeeze", path)
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_are_found_where_torch_hub_keeps_them(empty_caches: Path) -> None:
    name = "lpips-squeeze"
    network = torchvision_network(name)
    save_features(network, empty_caches / PERCEPTUAL_NETWORKS[name].file_name)
    x, y = smooth_images(0), smooth_images(1)
    expected = lpips_by_hand(name, network.features, x, y)
    torch.testing.assert_close(perceptual_network(name, None)(x, y), expected, rtol=1e-4, atol=1e-6)


def test_weights_are_found_where_timm_keeps_them(empty_caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_timm(CONVNET, empty_caches / "weights.safetensors")
    cache = {("timm/test_resnet.r160_in1k", "model.safetensors"): str(path)}
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *key: cache[key])
    x, y = smooth_images(0), smooth_images(1)
    torch.testing.assert_close(perceptual_network(CONVNET, None)(x, y), perceptual_network(CONVNET, path)(x, y))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lpips-alex", r"torchvision's alexnet weights, alexnet-owt-7be5be79\.pth, .*checkpoints/alexnet-owt-7be5be79"),
        ("lpips-vgg", r"torchvision's vgg16 weights, vgg16-397923af\.pth, .* perceptual\.backbone_weights=PATH"),
        (CONVNET, r"timm's weights of this network .* perceptual\.backbone_weights=PATH"),
        (
            "lpips-resnet",
            "no perceptual network 'lpips-resnet'; there are lpips-alex, lpips-squeeze, lpips-vgg and timm",
        ),
        ("timm:no_such_net", "timm:no_such_net: timm has no such network"),
        ("timm:resnet18.no_such_tag", "Invalid pretrained tag"),
        ("timm:hf-hub:somebody/something", "timm has no such network"),
        ("timm:swin_tiny_patch4_window7_224", "gives no feature maps of images of any size"),
    ],
)
@pytest.mark.usefixtures("empty_caches")
def test_without_weights_or_network_one_line_says_what_to_do(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        perceptual_network(name, None)
    assert "\n" not in str(caught.value)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    squeezenet = save_features(torchvision_network("lpips-squeeze"), tmp_path / "squeeze.pth")
    with pytest.raises(UserError, match=r"not the weights of lpips-alex: 9 of 10 .* \(first: features\.0\.weight\)"):
        perceptual_network("lpips-alex", squeezenet)
    with pytest.raises(UserError, match=r"not the weights of timm:test_resnet\.r160_in1k"):
        perceptual_network(CONVNET, squeezenet)
