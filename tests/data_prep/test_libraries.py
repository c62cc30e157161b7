from __future__ import annotations

import hashlib
import io
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.libraries import HuggingFaceDataset, open_torchvision
from data_prep.preparation import Preparation, write_shards
from data_prep.shards import ShardSet
from data_prep.sources import Split
from ldgan.engine.cli import UserError


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(256, size=(32, 32, 3), dtype=np.uint8)


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(noise(seed)).save(buffer, "PNG")
    return buffer.getvalue()


# --- CIFAR --------------------------------------------------------------------------------------------------


@pytest.fixture
def cifar_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six training and two test images, in the format of CIFAR-10, with torchvision expecting these files."""
    datasets = pytest.importorskip("torchvision.datasets")
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    contents = {
        "data_batch_1": {"data": planes(0, 1, 2), "labels": [3, 1, 9]},
        "data_batch_2": {"data": planes(3, 4, 5), "labels": [0, 3, 2]},
        "test_batch": {"data": planes(6, 7), "labels": [5, 5]},
        "batches.meta": {"label_names": [f"class {label}" for label in range(10)]},
    }
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
    lists = {name: [name, md5(folder / name)] for name in contents}
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [lists["data_batch_1"], lists["data_batch_2"]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [lists["test_batch"]])
    meta = datasets.CIFAR10.meta | {"md5": lists["batches.meta"][1]}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    return tmp_path


def planes(*seeds: int) -> np.ndarray:
    """Rows of 3,072 bytes: all red, all green, all blue, as CIFAR stores images."""
    return np.stack([noise(seed).transpose(2, 0, 1).reshape(-1) for seed in seeds])


def test_cifar_gives_its_pixels_and_classes(cifar_root):
    source = open_torchvision("CIFAR10", cifar_root)
    assert source.class_names[3] == "class 3"
    found = {sample.name: (sample.image.tobytes(), sample.label) for sample in source}
    labels = [3, 1, 9, 0, 3, 2]
    assert found == {f"CIFAR10/train/{i}": (noise(i).tobytes(), label) for i, label in enumerate(labels)}
    test = open_torchvision("CIFAR10/test", cifar_root)
    assert {(sample.image.tobytes(), sample.label) for sample in test} == {(noise(i).tobytes(), 5) for i in (6, 7)}


def test_parts_of_cifar_are_disjoint_and_all_of_it(cifar_root):
    parts = [open_torchvision("CIFAR10", cifar_root, split=Split(part, 0.4)) for part in ("train", "validation")]
    names = [{sample.name for sample in part} for part in parts]
    assert sorted(names[0] | names[1]) == [f"CIFAR10/train/{number}" for number in range(6)]
    assert not names[0] & names[1]
    assert parts[1].description["split"]["validation_share"] == 0.4


def test_a_pickle_that_is_not_the_published_one_is_not_loaded(cifar_root):
    class Marker:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (cifar_root / "executed",)

    (cifar_root / "cifar-10-batches-py" / "data_batch_2").write_bytes(pickle.dumps(Marker()))
    with pytest.raises(UserError, match=r"not the unpacked archive cifar-10-python.tar.gz, or is damaged"):
        open_torchvision("CIFAR10", cifar_root)
    assert not (cifar_root / "executed").exists()


# --- CelebA -------------------------------------------------------------------------------------------------


@pytest.fixture
def celeba_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four photos, two for training, with torchvision expecting these files."""
    datasets = pytest.importorskip("torchvision.datasets")
    folder = tmp_path / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    names = [f"{number:06d}.jpg" for number in range(1, 5)]
    for number, name in enumerate(names):
        (folder / "img_align_celeba" / name).write_bytes(png(number))
    headers = {"identity_CelebA.txt": "", "list_eval_partition.txt": ""}
    for name in ("list_attr_celeba.txt", "list_bbox_celeba.txt", "list_landmarks_align_celeba.txt"):
        headers[name] = "4\nfirst second\n"
    for name, header in headers.items():
        values = "{part}" if name == "list_eval_partition.txt" else "1" if name.startswith("identity") else "1 -1"
        lines = [f"{image} {values.format(part=number // 2)}\n" for number, image in enumerate(names)]
        (folder / name).write_text(header + "".join(lines))
    files = [("", md5(folder / name), name) for name in headers]
    monkeypatch.setattr(datasets.CelebA, "file_list", files)
    return tmp_path


def test_celeba_gives_the_photos_of_its_part(celeba_root):
    for part, numbers in (("CelebA", (0, 1)), ("CelebA/valid", (2, 3)), ("CelebA/all", (0, 1, 2, 3))):
        source = open_torchvision(part, celeba_root)
        found = {sample.name: (sample.image.read(), sample.label) for sample in source}
        assert found == {f"{number + 1:06d}.jpg": (png(number), None) for number in numbers}


def test_celeba_that_is_not_complete_is_named(celeba_root):
    (celeba_root / "celeba" / "list_attr_celeba.txt").write_text("something else")
    with pytest.raises(UserError, match=r"celeba is not a complete CelebA"):
        open_torchvision("CelebA", celeba_root)


# --- LSUN ---------------------------------------------------------------------------------------------------


@pytest.fixture
def lsun_root(tmp_path: Path) -> Iterator[Path]:
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(tmp_path / "church_outdoor_train_lmdb")) as database, database.begin(write=True) as transaction:
        for number in range(20):
            transaction.put(hashlib.sha1(bytes([number])).hexdigest().encode(), png(number))
    return tmp_path


def test_lsun_gives_every_image_of_a_category_with_two_workers_too(lsun_root):
    source = open_torchvision("LSUN/church_outdoor_train", lsun_root)
    found = {sample.name: sample.image.read() for sample in source}
    assert found == {hashlib.sha1(bytes([number])).hexdigest(): png(number) for number in range(20)}
    write_shards(source, lsun_root / "set", Preparation(32), num_workers=2)
    shards = ShardSet.open(lsun_root / "set")
    stored = {Image.open(io.BytesIO(shards.read(index)["png"])).tobytes() for index in range(20)}
    assert stored == {noise(number).tobytes() for number in range(20)}


def test_lsun_that_is_not_there_is_named(lsun_root):
    with pytest.raises(UserError, match=r"bedroom_train_lmdb is no LMDB of LSUN"):
        open_torchvision("LSUN/bedroom_train", lsun_root)


# --- Names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("ImageNet", "known data sets are CIFAR10, CIFAR100, CelebA, LSUN"),
        ("LSUN", "say which category, such as torchvision:LSUN/church_outdoor_train"),
        ("LSUN/../../secret", "say which category"),
        ("CIFAR10/valid", "its parts are train, test"),
        ("CelebA/all of it", "its parts are train, valid, test, all"),
        ("CIFAR10", "cifar-10-batches-py is not the unpacked archive cifar-10-python.tar.gz"),
        ("CIFAR100/test", "cifar-100-python is not the unpacked archive cifar-100-python.tar.gz"),
        ("CelebA", "celeba is not a complete CelebA"),
    ],
)
def test_names_that_are_unknown_or_sets_that_are_missing_are_told(tmp_path, name, complaint):
    with pytest.raises(UserError, match=complaint):
        open_torchvision(name, tmp_path)


# --- Hugging Face -------------------------------------------------------------------------------------------


def test_a_saved_dataset_gives_images_labels_and_captions(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {
        "image": [{"bytes": png(number), "path": None} for number in range(3)],
        "label": [1, 0, -1],
        "text": ["one", "two", None],
    }
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "text": datasets.Value("string"),
        }
    )
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.save_to_disk(tmp_path / "set")
    source = HuggingFaceDataset(tmp_path / "set")
    assert source.class_names == ["cat", "dog"]
    assert {(sample.image.read(), sample.label, sample.caption) for sample in source} == {
        (png(0), 1, "one"),
        (png(1), 0, "two"),
        (png(2), None, None),
    }
    datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / "parts")
    with pytest.raises(UserError, match=r"holds the parts train; choose one, such as hf:.*parts/train"):
        HuggingFaceDataset(tmp_path / "parts")
    with pytest.raises(UserError, match="holds no data set that save_to_disk has written"):
        HuggingFaceDataset(tmp_path)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    for package in ("datasets", "lmdb"):
        monkeypatch.setitem(sys.modules, package, None)  # importing it raises ImportError
    with pytest.raises(UserError, match="pip install datasets"):
        HuggingFaceDataset(tmp_path)
    with pytest.raises(UserError, match="pip install lmdb"):
        open_torchvision("LSUN/church_outdoor_train", tmp_path)
