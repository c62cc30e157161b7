"""Reference statistics: they come back bit for bit, say what they are of, and are refused for anything else."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor

from ldgan.engine.cli import UserError
from ldgan.metrics import reference as module
from ldgan.metrics.features import Extractor, FeatureNetwork, Features
from ldgan.metrics.frechet import FeatureStatistics, GaussianFit, frechet_distance
from ldgan.metrics.reference import (
    Conditions,
    Reference,
    check_fits,
    library_versions,
    load_reference,
    save_reference,
)

DIM = 6


class Means(Extractor):
    """As many features as are asked, all of them the mean of the pixels."""

    def __init__(self, num_features: int = DIM) -> None:
        super().__init__()
        self.num_features, self.preprocessing = num_features, {}

    def forward(self, images: Tensor) -> Features:
        return Features(images.float().mean(dim=(1, 2, 3))[:, None].expand(-1, self.num_features), None)


NETWORK = FeatureNetwork("means", Means(), "cpu")
INCEPTION = FeatureNetwork("inception", Means(), "cpu")
CONDITIONS = Conditions(
    network="means",
    network_fingerprint=NETWORK.fingerprint,
    data_fingerprint="5ea" * 20 + "beef",
    num_images=10_000,
    size=(32, 48),
    resize={"resolution": 32, "filter": "lanczos"},
)


def random_features(num_images: int = 40, seed: int = 0) -> Tensor:
    """Correlated features that are not centred, fp32 (N, DIM)."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(DIM, DIM, generator=generator)
    return torch.randn(num_images, DIM, generator=generator) @ mixing + 3


def fit_of(features: Tensor) -> GaussianFit:
    statistics = FeatureStatistics(features.shape[1])
    statistics.add(features)
    return statistics.fit()


@pytest.fixture
def reference() -> Reference:
    features = random_features()
    return Reference(fit_of(features), features[:7], CONDITIONS, {"kind": "folder", "formats": {"png": 40}})


@pytest.fixture
def file(tmp_path: Path, reference: Reference) -> Path:
    path = tmp_path / "new" / "reference.safetensors"
    save_reference(path, reference)
    return path


def test_they_come_back_bit_for_bit(file: Path, reference: Reference) -> None:
    loaded = load_reference(file)
    pairs = zip((*loaded.fit, loaded.features), (*reference.fit, reference.features))
    assert all(torch.equal(one, other) and one.dtype == other.dtype for one, other in pairs)
    assert loaded.conditions == CONDITIONS
    assert loaded.description == reference.description | {"libraries": library_versions()}
    assert loaded.description["libraries"]["torch"] == torch.__version__.partition("+")[0]
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_without_features_or_resizing_they_come_back_too(tmp_path: Path, reference: Reference) -> None:
    plain = dataclasses.replace(CONDITIONS, resize=None)
    bare = dataclasses.replace(reference, features=torch.empty(0, DIM), conditions=plain)
    save_reference(tmp_path / "bare.safetensors", bare)
    loaded = load_reference(tmp_path / "bare.safetensors")
    assert (tuple(loaded.features.shape), loaded.conditions) == ((0, DIM), plain)


def test_a_distance_to_the_file_is_that_to_the_features(file: Path) -> None:
    samples = fit_of(random_features(seed=1))
    expected = frechet_distance(samples, fit_of(random_features()))
    assert expected > 0.1
    assert frechet_distance(samples, load_reference(file).fit) == expected


def test_nothing_is_overwritten_and_nothing_half_written_bears_the_name(
    file: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = file.read_bytes()
    with pytest.raises(UserError, match=r"reference\.safetensors: exists already"):
        save_reference(file, reference)
    assert file.read_bytes() == written

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    other = file.with_name("other.safetensors")
    with pytest.raises(UserError, match=r"other\.safetensors: cannot be written \(No space left"):
        save_reference(other, reference)
    assert not other.exists()


def test_what_could_not_be_read_again_is_not_saved(tmp_path: Path, reference: Reference) -> None:
    with pytest.raises(UserError, match=r"statistics\.npz: statistics are saved as \.safetensors only"):
        save_reference(tmp_path / "statistics.npz", reference)
    with pytest.raises(ValueError, match="unknown origin"):
        save_reference(tmp_path / "a.safetensors", dataclasses.replace(reference, conditions=None))
    assert list(tmp_path.iterdir()) == []


def test_the_question_they_were_made_for_is_answered(file: Path) -> None:
    loaded = load_reference(file)
    assert check_fits(file, loaded, NETWORK, CONDITIONS, num_features=7) == []
    assert check_fits(file, loaded, NETWORK, None, num_features=0) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network_fingerprint": "beef"}, "network_fingerprint: [0-9a-f]{40} in the file, beef asked"),
        ({"data_fingerprint": "beef"}, "data_fingerprint: (5ea){13}5 in the file, beef asked"),
        ({"num_images": 50_000}, "num_images: 10,000 in the file, 50,000 asked"),
        ({"size": (32, 32)}, "size: 32x48 px in the file, 32x32 px asked"),
        ({"resize": None}, 'resize: {"resolution": 32, "filter": "lanczos"} in the file, null asked'),
        ({"resize": {"resolution": 32, "filter": "box"}}, 'resize: .*"lanczos"} in the file, .*"box"} asked'),
    ],
)
def test_every_other_condition_is_refused(file: Path, changes: dict[str, Any], message: str) -> None:
    wanted = dataclasses.replace(CONDITIONS, **changes)
    with pytest.raises(
        UserError, match=rf"reference\.safetensors: {message}; delete the file, or ask for what"
    ) as error:
        check_fits(file, load_reference(file), NETWORK, wanted, num_features=0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("wanted", [None, dataclasses.replace(CONDITIONS, network="means2")])
def test_another_network_is_refused_whatever_else_is_wanted(file: Path, wanted: Conditions | None) -> None:
    network = FeatureNetwork("means2", Means(), "cpu")
    with pytest.raises(UserError, match="network: means in the file, means2 asked; delete"):
        check_fits(file, load_reference(file), network, wanted, num_features=0)


def test_features_that_are_needed_have_to_be_there(file: Path) -> None:
    with pytest.raises(UserError, match="features: of 7 images in the file, 1,000 needed; delete the file"):
        check_fits(file, load_reference(file), NETWORK, CONDITIONS, num_features=1000)


def test_all_differences_are_told_at_once(file: Path) -> None:
    wanted = dataclasses.replace(CONDITIONS, num_images=5, resize=None)
    with pytest.raises(UserError, match=r"num_images: .*; resize: .*; features: .*"):
        check_fits(file, load_reference(file), NETWORK, wanted, num_features=8)


def test_other_versions_of_libraries_are_told_and_not_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_reference(file)
    old, now = library_versions(), library_versions() | {"torch": "99.0"}
    monkeypatch.setattr(module, "library_versions", lambda: now)
    notes = check_fits(file, loaded, NETWORK, CONDITIONS, num_features=0)
    assert notes == [f"{file}: made with torch {old['torch']}, and this is 99.0"]


def contents_of(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(file, framework="pt") as opened:
        return load_file(file), opened.metadata()


@pytest.mark.parametrize("num_bytes", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(file: Path, num_bytes: int) -> None:
    file.write_bytes(file.read_bytes()[:num_bytes])
    with pytest.raises(UserError, match=r"reference\.safetensors: damaged, or no statistics") as error:
        load_reference(file)
    assert "\n" not in str(error.value)


def test_a_number_that_changed_is_noticed(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"damaged, or no statistics \(SHA-256 is not the one it was saved with\)"):
        load_reference(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "another"}, "holds no statistics of this version's format"),
        ({"conditions": "{}"}, "damaged"),
        ({"conditions": "[1]"}, "damaged"),
        ({"conditions": "{"}, "damaged"),
        ({"description": "no JSON"}, "damaged"),
        ({"conditions": json.dumps(dataclasses.asdict(CONDITIONS) | {"more": 1})}, "damaged"),
    ],
)
def test_a_description_of_another_kind_is_refused(file: Path, change: dict[str, str], message: str) -> None:
    tensors, metadata = contents_of(file)
    save_file(tensors, file, metadata | change)
    with pytest.raises(UserError, match=rf"reference\.safetensors: {message}"):
        load_reference(file)


def test_weights_of_a_network_are_no_statistics(file: Path) -> None:
    save_file({"mean": torch.zeros(DIM)}, file)
    with pytest.raises(UserError, match="holds no statistics of this version's format"):
        load_reference(file)
    _, metadata = contents_of(file)
    assert not metadata


def test_files_of_other_kinds_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.npz: no such file of statistics"):
        load_reference(tmp_path / "gone.npz")
    with pytest.raises(UserError, match=r"stats\.pkl: not a file of statistics; give a \.safetensors file made here"):
        load_reference(tmp_path / "stats.pkl")


def as_pytorch_fid(path: Path, features: Tensor) -> Path:
    values = features.double().numpy()
    np.savez_compressed(path, mu=values.mean(axis=0), sigma=np.cov(values, rowvar=False))
    return path


def as_adm(path: Path, features: Tensor) -> Path:
    """With spatial features, and the images themselves in objects that nobody may unpickle."""
    values = features.double().numpy()
    statistics = {"mu": values.mean(axis=0), "sigma": np.cov(values, rowvar=False)}
    spatial = {"mu_s": np.zeros(3), "sigma_s": np.full((3, 3), np.nan)}
    np.savez(path, **statistics, **spatial, arr_0=np.array([object()]))
    return path


@pytest.mark.parametrize("write", [as_pytorch_fid, as_adm])
def test_npz_files_give_the_distance_of_torch_fidelity(tmp_path: Path, write: Any) -> None:
    peer = pytest.importorskip("torch_fidelity.metric_fid")
    real, fake = random_features(), random_features(seed=1)
    loaded = load_reference(write(tmp_path / "statistics.npz", real))
    assert (loaded.conditions, len(loaded.features)) == (None, 0)
    statistics = [peer.fid_features_to_statistics(features) for features in (real, fake)]
    expected = peer.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert expected > 0.1
    assert frechet_distance(fit_of(fake), loaded.fit) == pytest.approx(expected, rel=1e-6)
    notes = check_fits(tmp_path / "statistics.npz", loaded, INCEPTION, None, num_features=0)
    assert [note.partition(": ")[2] for note in notes] == [
        "does not say which network, images and resizing it is of; taken for FID's Inception"
    ]


@pytest.mark.parametrize(
    ("network", "wanted", "num_features", "message"),
    [
        (NETWORK, None, 0, "FID's Inception is assumed, and features of means are compared"),
        (FeatureNetwork("inception", Means(9), "cpu"), None, 0, "covariance of 6 features, and FID's Inception has 9"),
        (INCEPTION, CONDITIONS, 0, "does not say which images it is of"),
        (INCEPTION, None, 50, "covariance only, and the features of 50 images are needed"),
    ],
)
def test_npz_files_serve_an_fid_and_nothing_else(
    tmp_path: Path, network: FeatureNetwork, wanted: Conditions | None, num_features: int, message: str
) -> None:
    path = as_pytorch_fid(tmp_path / "statistics.npz", random_features())
    with pytest.raises(UserError, match=rf"statistics\.npz: .*{message}; give the images themselves"):
        check_fits(path, load_reference(path), network, wanted, num_features=num_features)


MEAN, COVARIANCE = np.zeros(DIM), np.eye(DIM)
SKEWED = COVARIANCE + np.eye(DIM, k=1)
HOLED = np.where(np.eye(DIM), np.nan, 0.0)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": MEAN}, "holds no statistics under the names mu and sigma"),
        ({"arr_0": np.zeros((2, 8, 8, 3), np.uint8)}, "holds no statistics under the names mu and sigma"),
        ({"mu": np.array([object()]), "sigma": COVARIANCE}, "damaged, or no statistics .Object arrays cannot"),
        ({"mu": MEAN, "sigma": np.array([[object()]])}, "damaged, or no statistics .Object arrays cannot"),
        ({"mu": np.array(["a"] * DIM), "sigma": COVARIANCE}, "damaged, or no statistics .could not convert"),
        ({"mu": MEAN, "sigma": np.eye(DIM + 1)}, "of shapes .* are no statistics"),
        ({"mu": MEAN[:, None], "sigma": COVARIANCE}, "of shapes .* are no statistics"),
        ({"mu": np.zeros(()), "sigma": np.zeros(())}, "of shapes .* are no statistics"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, "of shapes .* are no statistics"),
        ({"mu": MEAN, "sigma": HOLED}, "holds NaN or infinity"),
        ({"mu": MEAN + np.inf, "sigma": COVARIANCE}, "holds NaN or infinity"),
        ({"mu": MEAN, "sigma": SKEWED}, "its covariance is not symmetric"),
    ],
)
def test_npz_files_of_something_else_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    path = tmp_path / "statistics.npz"
    np.savez(path, **arrays)
    with pytest.raises(UserError, match=rf"statistics\.npz: .*{message}") as error:
        load_reference(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"no zip file", "array", "truncated"])
def test_damaged_npz_files_are_refused(tmp_path: Path, content: bytes | str) -> None:
    path = as_pytorch_fid(tmp_path / "statistics.npz", random_features())
    if content == "array":
        with path.open("wb") as opened:
            np.save(opened, MEAN)
    else:
        path.write_bytes(path.read_bytes()[:200] if content == "truncated" else content)
    with pytest.raises(UserError, match=r"statistics\.npz: damaged, or no statistics") as error:
        load_reference(path)
    assert "\n" not in str(error.value)


def test_a_covariance_summed_up_in_fp32_is_symmetric_enough(tmp_path: Path) -> None:
    covariance = np.cov(random_features().double().numpy(), rowvar=False).astype(np.float32)
    covariance[0, 1] = np.nextafter(covariance[0, 1], np.float32(np.inf))
    np.savez(tmp_path / "statistics.npz", mu=MEAN.astype(np.float32), sigma=covariance)
    loaded = load_reference(tmp_path / "statistics.npz")
    assert torch.equal(loaded.fit.covariance, torch.from_numpy(covariance).double())
