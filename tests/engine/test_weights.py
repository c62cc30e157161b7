"""Weights that others saved: read as tensors by name, and anything else refused without running it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ldgan.engine.cli import UserError
from ldgan.engine.weights import load_weights

WEIGHTS = {"features.0.weight": torch.arange(6.0).view(2, 3), "features.0.bias": torch.tensor([1.5, -2.0])}


def save(path: Path) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(WEIGHTS, path)
    else:
        torch.save(WEIGHTS, path)
    return path


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth", "weights.pt"])
def test_weights_are_read_back_exactly(tmp_path: Path, name: str) -> None:
    torch.testing.assert_close(load_weights(save(tmp_path / name)), WEIGHTS, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
@pytest.mark.parametrize("num_bytes", [0, 100])
def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, name: str, num_bytes: int) -> None:
    path = save(tmp_path / name)
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(UserError, match="damaged, or not only weights") as caught:
        load_weights(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


class Malicious:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1), "more": Malicious(tmp_path / "made")}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="damaged, or not only weights"):
        load_weights(tmp_path / "weights.pth")
    assert not (tmp_path / "made").exists()
    torch.load(tmp_path / "weights.pth", weights_only=False)  # the file is what it says: loaded trustingly, it acts
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize("content", [torch.zeros(2), {"state_dict": {"weight": torch.zeros(2)}}])
def test_more_than_tensors_by_name_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"holds something else than tensors by name; .* state_dict\(\) alone"):
        load_weights(tmp_path / "weights.pth")


def test_a_missing_file_and_one_of_another_kind_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.safetensors: no such file"):
        load_weights(tmp_path / "gone.safetensors")
    with pytest.raises(UserError, match=r"weights\.npz: not a file of weights; give a \.safetensors, \.pth or \.pt"):
        load_weights(tmp_path / "weights.npz")
