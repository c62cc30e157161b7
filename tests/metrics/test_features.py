"""Feature networks: what they compute equals what the libraries they come from compute, offline."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldgan.engine.cli import UserError
from ldgan.metrics.features import (
    INCEPTION_FILE,
    Extractor,
    FeatureNetwork,
    Features,
    add_feature_flags,
    chosen_features,
    feature_network,
)

TINY_TIMM = "timm:test_efficientnet"


def images(seed: int = 0, side: int = 20) -> Tensor:
    """Smooth colours: two images (2, 3, side, side)."""
    coarse = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return (255 * nn.functional.interpolate(coarse, side, mode="bilinear")).round().to(torch.uint8)


@pytest.fixture(autouse=True)
def torch_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torch.hub keeps what it downloaded: nothing, unless a test puts it there."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


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
    assert network.num_classes == 0
    assert network.features_and_logits(images()).logits is None


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
    assert (network.num_features, network.num_classes) == (256, 0)


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
    pixels = images(side=config["input_size"][-1])
    with torch.no_grad():
        inputs = timm_inputs(pixels, config)
        expected = peer.forward_head(peer.forward_features(inputs), pre_logits=True)
        expected_logits = peer(inputs)
    pooled, logits = network.features_and_logits(pixels)
    torch.testing.assert_close(pooled, expected)
    torch.testing.assert_close(logits, expected_logits)
    assert torch.equal(network(pixels), pooled)
    assert (network.num_features, network.num_classes) == (expected.shape[1], 1000)


def timm_inputs(pixels: Tensor, config: dict) -> Tensor:
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    return (pixels / 255 - mean) / std


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit"])
@pytest.mark.parametrize("num_classes", [0, 7])
def test_a_file_has_as_many_classes_as_it_has(tmp_path: Path, name: str, num_classes: int) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    peer = timm.create_model(name, pretrained=False, num_classes=num_classes).eval()
    network = feature_network(f"timm:{name}", saved(peer, tmp_path / "weights.pth"), "cpu")
    assert network.num_classes == num_classes
    pixels = images(side=160)
    with torch.no_grad():
        expected = peer(timm_inputs(pixels, timm.data.resolve_model_data_config(peer)))
    pooled, logits = network.features_and_logits(pixels)
    torch.testing.assert_close(pooled if num_classes == 0 else logits, expected)
    assert (logits is None) == (num_classes == 0)


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit"])
def test_another_input_size_is_that_of_timm(tmp_path: Path, name: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    path = saved(timm.create_model(name, pretrained=False).eval(), tmp_path / "weights.safetensors")
    network = feature_network(f"timm:{name}@96", path, "cpu")
    # timm resamples position embeddings as it loads a checkpoint into a model of another img_size.
    size = {"img_size": 96} if name == "test_vit" else {}
    overlay = dict(file=str(path))
    peer = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **size).eval()
    config = timm.data.resolve_model_data_config(peer)
    with torch.no_grad():
        expected = peer(timm_inputs(images(side=96), config))
    torch.testing.assert_close(network.features_and_logits(images(side=96)).logits, expected)
    assert network.metric_name("frechet_distance") == f"Frechet distance (timm:{name}@96)"
    assert network.fingerprint != feature_network(f"timm:{name}", path, "cpu").fingerprint


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("test_vit@", "'' is no size in pixels; say timm:NETWORK@224"),
        ("test_vit@0", "'0' is no size in pixels"),
        ("test_vit@9.5", "'9.5' is no size in pixels"),
        ("test_vit@100", "it takes patches of 16 px; choose a multiple of that"),
        ("gmixer_12_224@96", "timm knows it at its own input size only; leave the @96 out"),
    ],
)
def test_an_input_size_that_cannot_be_is_refused(tmp_path: Path, name: str, message: str) -> None:
    timm = pytest.importorskip("timm")
    path = saved(timm.create_model(name.partition("@")[0], num_classes=0), tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match=f"feature network timm:{name}: {message}"):
        feature_network(f"timm:{name}", path, "cpu")


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

    outputs = ["2048", "logits_unbiased"]  # what torch-fidelity takes for FID, KID and for the Inception score
    peer = FeatureExtractorInceptionV3("peer", outputs, feature_extractor_weights_path=str(inception_weights))
    network = feature_network("inception", inception_weights, "cpu")
    expected, expected_logits = peer(images())
    assert float(expected.std()) > 0
    pooled, logits = network.features_and_logits(images())
    torch.testing.assert_close(pooled, expected, rtol=0, atol=0)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=0)
    assert (network.num_features, network.num_classes) == (2048, 1008)
    names = ("frechet_distance", "kernel_distance", "classifier_score", "precision")
    assert [network.metric_name(name) for name in names] == ["FID", "KID", "Inception score", "precision (inception)"]


class Everything(Extractor):
    """Means of the three colours through a layer in bf16."""

    def __init__(self, **preprocessing: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 2).bfloat16()
        self.preprocessing = preprocessing

    def forward(self, images: Tensor) -> Features:
        means = images.float().mean(dim=(2, 3))
        return Features(self.linear(means), means)


def test_features_are_fp32_without_gradients_whatever_surrounds_them() -> None:
    network = FeatureNetwork("stub", Everything().train(), "cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = network(images())
    assert features.dtype == torch.float32
    assert not features.requires_grad
    torch.testing.assert_close(features, network(images()), rtol=0, atol=0)


def test_only_inception_has_the_names_of_its_metrics() -> None:
    network = FeatureNetwork("stub", Everything(), "cpu")
    names = ("frechet_distance", "kernel_distance", "classifier_score", "density")
    expected = ["Frechet distance (stub)", "kernel distance (stub)", "classifier score (stub)", "density (stub)"]
    assert [network.metric_name(name) for name in names] == expected


def test_the_fingerprint_is_of_weights_and_preprocessing() -> None:
    first = FeatureNetwork("stub", Everything(size=[8, 8]), "cpu")
    again = FeatureNetwork("another name", Everything(size=[8, 8]), "cpu")
    resized = FeatureNetwork("stub", Everything(size=[8, 9]), "cpu")
    moved = Everything(size=[8, 8])
    with torch.no_grad():
        moved.linear.bias[0] += 1
    assert first.fingerprint == again.fingerprint
    assert len({first.fingerprint, resized.fingerprint, FeatureNetwork("stub", moved, "cpu").fingerprint}) == 3
    digest = hashlib.sha256()
    for name, tensor in (("linear.bias", Everything().linear.bias), ("linear.weight", Everything().linear.weight)):
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + tensor.detach().float().numpy().tobytes())
    expected = digest.hexdigest() + json.dumps({"size": [8, 8]})
    assert first.fingerprint == hashlib.sha256(expected.encode()).hexdigest()


class Broken(Extractor):
    """Gives what it is told to, if an image is not black."""

    def __init__(self, pooled: float = 0.0, logit: float = 0.0) -> None:
        super().__init__()
        self.values = pooled, logit

    def forward(self, images: Tensor) -> Features:
        lit = (images > 0).flatten(1).any(dim=1, keepdim=True)
        pooled, logits = (torch.where(lit, value, 1.0) for value in self.values)
        return Features(pooled, logits)


@pytest.mark.parametrize("broken", [Broken(pooled=np.nan), Broken(pooled=-np.inf), Broken(logit=np.inf)])
def test_numbers_that_are_none_are_refused(broken: Broken) -> None:
    network = FeatureNetwork("stub", broken, "cpu")
    network(torch.zeros_like(images()))
    mixed = torch.cat([torch.zeros_like(images()), images()])
    for method in (network, network.features_and_logits):
        with pytest.raises(UserError, match="feature network stub: gives NaN or infinity; check that the file of its"):
            method(mixed)


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


@pytest.mark.parametrize("name", ["inception", "squeezenet", TINY_TIMM])
def test_the_random_numbers_of_the_caller_are_left_alone(
    name: str, squeezenet: nn.Module, inception_weights: Path, tmp_path: Path
) -> None:
    path = inception_weights
    if name == "squeezenet":
        path = saved(squeezenet, tmp_path / "weights.pth")
    elif name == TINY_TIMM:
        timm = pytest.importorskip("timm")
        path = saved(timm.create_model("test_efficientnet", pretrained=False), tmp_path / "weights.pth")
    before = torch.get_rng_state()
    feature_network(name, path, "cpu")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("would be downloaded")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)


@pytest.mark.usefixtures("offline")
def test_weights_are_found_where_torchvision_keeps_them(squeezenet: nn.Module, torch_home: Path) -> None:
    path = saved(squeezenet, torch_home / "squeezenet1_1-b8a52dc0.pth")
    peer = torchvision.models.squeezenet1_1(weights="IMAGENET1K_V1")
    torch.testing.assert_close(peer.state_dict(), squeezenet.state_dict(), rtol=0, atol=0)
    found = feature_network("squeezenet", None, "cpu")
    assert found.fingerprint == feature_network("squeezenet", path, "cpu").fingerprint


def test_a_file_that_is_named_comes_first(squeezenet: nn.Module, tmp_path: Path, torch_home: Path) -> None:
    (torch_home / "squeezenet1_1-b8a52dc0.pth").write_bytes(b"damaged")
    feature_network("squeezenet", saved(squeezenet, tmp_path / "weights.pth"), "cpu")
    with pytest.raises(UserError, match=r"squeezenet1_1-b8a52dc0\.pth: damaged"):
        feature_network("squeezenet", None, "cpu")


@pytest.mark.usefixtures("offline")
def test_weights_are_found_where_torch_fidelity_keeps_them(inception_weights: Path, torch_home: Path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    (torch_home / INCEPTION_FILE).symlink_to(inception_weights)
    (expected,) = FeatureExtractorInceptionV3("peer", ["2048"])(images())
    assert torch.equal(feature_network("inception", None, "cpu")(images()), expected)


def parsed(arguments: Sequence[str], default: str | None = None) -> tuple[str | None, Path | None]:
    parser = argparse.ArgumentParser()
    add_feature_flags(parser, default)
    return chosen_features(parser.parse_args(arguments), default)


@pytest.mark.parametrize(
    ("arguments", "default", "expected"),
    [
        ([], None, (None, None)),
        ([], "alexnet", ("alexnet", None)),
        (["--features", "squeezenet"], "alexnet", ("squeezenet", None)),
        (["--features", "squeezenet", "--feature-weights", "file"], None, ("squeezenet", Path("file"))),
        (["--feature-weights", "file"], "alexnet", ("alexnet", Path("file"))),
        (["--inception-weights", "file"], None, ("inception", Path("file"))),
        (["--inception-weights", "file"], "alexnet", ("inception", Path("file"))),
        (["--inception-weights", "file", "--features", "inception"], None, ("inception", Path("file"))),
    ],
)
def test_flags_choose_a_network(
    arguments: Sequence[str], default: str | None, expected: tuple[str | None, Path | None]
) -> None:
    assert parsed(arguments, default) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--feature-weights", "file"], "--feature-weights says not which network it belongs to"),
        (["--inception-weights", "file", "--features", "alexnet"], "not those of --features alexnet"),
        (["--inception-weights", "file", "--feature-weights", "other"], "name one file twice; give only one"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(arguments: Sequence[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parsed(arguments)


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
