"""Features of real images, for tests that want more than random numbers."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldgan.metrics.features import feature_network

NUM_IMAGES = 300


@pytest.fixture(scope="session")
def real_features() -> tuple[Tensor, Tensor]:
    """SqueezeNet's features of CIFAR-10, fp32 (300, 512) each: of training images and of test images."""
    for variable in ("LDGAN_DATA", "LDGAN_WEIGHTS"):
        if variable not in os.environ:
            pytest.skip(f"{variable} names no folder")
    weights = Path(os.environ["LDGAN_WEIGHTS"]) / "squeezenet1_1_torchvision_features.safetensors"
    network = feature_network("squeezenet", weights, "cpu")
    with zipfile.ZipFile(Path(os.environ["LDGAN_DATA"]) / "cifar10.zip") as archive:
        train, test = (
            torch.cat([network(batch) for batch in read_pictures(archive, part).split(50)])
            for part in ("train", "test")
        )
    return train, test


def read_pictures(archive: zipfile.ZipFile, part: str) -> Tensor:
    """Pictures in the folder ``part``, evenly spread over its classes, uint8 (300, 3, 32, 32)."""
    names = sorted(name for name in archive.namelist() if name.startswith(f"{part}/") and not name.endswith("/"))
    pictures = []
    for name in names[:: len(names) // NUM_IMAGES][:NUM_IMAGES]:
        with archive.open(name) as file:
            pictures.append(np.asarray(Image.open(file).convert("RGB")))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
