"""Statistics of real images in files: measured once, used often, and refused where they do not fit the question.

Ours is a safetensors file that says what it is of. The .npz files of pytorch-fid and ADM, which others publish, hold
mean and covariance and say nothing else.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldgan import __version__
from ldgan.engine.cli import UserError
from ldgan.engine.files import write_atomically, writing_to
from ldgan.engine.weights import sha256_of
from ldgan.metrics.features import INCEPTION, FeatureNetwork
from ldgan.metrics.frechet import GaussianFit

FORMAT = "ldgan reference statistics 1"
LIBRARIES = ("pillow", "timm", "torch", "torch-fidelity", "torchvision")
SUFFIX, NPZ_SUFFIX = ".safetensors", ".npz"


@dataclass(frozen=True)
class Conditions:
    """What statistics of images depend on."""

    network: str
    network_fingerprint: str  # of its weights and preprocessing
    data_fingerprint: str
    num_images: int
    size: tuple[int, int]  # (height, width) in pixels, in front of the network's own resizing
    resize: dict[str, Any] | None  # how images of the data were brought to that size; None: they have it


@dataclass
class Reference:
    """Features of a set of images.

    ``features``, fp32 (M, d), are those of the first M images, and M may be 0. ``conditions`` are None where a file
    does not tell. ``description`` is JSON about the images, and in files also about the libraries that were used.
    """

    fit: GaussianFit
    features: Tensor
    conditions: Conditions | None
    description: dict[str, Any]


def save_reference(path: Path, reference: Reference) -> None:
    """Write a new safetensors file, complete or not at all, with the versions of libraries in its description.

    Raises:
        UserError: ``path`` exists, has another suffix or cannot be written.
        ValueError: the conditions are not known.
    """
    if reference.conditions is None:
        raise ValueError("statistics of unknown origin are not saved again")
    if path.suffix != SUFFIX:
        raise UserError(f"{path}: statistics are saved as {SUFFIX} only; name such a file")
    if path.exists():
        raise UserError(f"{path}: exists already, and statistics are never overwritten; delete it or name another file")
    tensors = {"mean": reference.fit.mean, "covariance": reference.fit.covariance, "features": reference.features}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {
        "format": FORMAT,
        "conditions": json.dumps(asdict(reference.conditions)),  # safetensors holds strings only
        "description": json.dumps(reference.description | {"libraries": library_versions()}),
        "sha256": sha256_of(tensors),
    }
    with writing_to(path):
        write_atomically(path, safetensors.torch.save(tensors, metadata))


def load_reference(path: Path) -> Reference:
    """Read a file of `save_reference`, or the mean and covariance of an .npz file of pytorch-fid or ADM.

    Raises:
        UserError: it is missing, damaged or something else, or its numbers make no Gaussian.
    """
    readers = {SUFFIX: _load_safetensors, NPZ_SUFFIX: _load_npz}
    if path.suffix not in readers:
        raise UserError(f"{path}: not a file of statistics; give a {SUFFIX} file made here, or an {NPZ_SUFFIX} file")
    if not path.is_file():
        raise UserError(f"{path}: no such file of statistics; check the path")
    reference = readers[path.suffix](path)
    _check_numbers(path, reference)
    return reference


def check_fits(
    path: Path, reference: Reference, network: FeatureNetwork, wanted: Conditions | None, *, num_features: int
) -> list[str]:
    """Refuse statistics, read from ``path``, that do not fit the question.

    Args:
        path: for messages.
        reference: what the file holds.
        network: whose features are compared.
        wanted: what the statistics have to be of; None takes those of any images.
        num_features: how many images' features are needed one by one, beside mean and covariance.

    Returns:
        What does not refuse but should be told, one line each.

    Raises:
        UserError: with all differences.
    """
    conditions = reference.conditions
    if conditions is None:
        _check_silent(path, reference, network, wanted, num_features)
        return [f"{path}: does not say which network, images and resizing it is of; taken for FID's Inception"]
    expected = {"network": network.name, "network_fingerprint": network.fingerprint}
    expected |= {} if wanted is None else asdict(wanted)
    found = asdict(conditions)
    differences = [
        f"{name}: {_text(found[name])} in the file, {_text(value)} asked"
        for name, value in expected.items()
        if found[name] != value
    ]
    if len(reference.features) < num_features:
        differences.append(f"features: of {len(reference.features):,} images in the file, {num_features:,} needed")
    if differences:
        raise UserError(f"{path}: {'; '.join(differences)}; delete the file, or ask for what it holds")
    recorded = reference.description.get("libraries", {})
    return [
        f"{path}: made with {name} {recorded[name]}, and this is {now}"
        for name, now in library_versions().items()
        if recorded.get(name, now) != now
    ]


def library_versions() -> dict[str, str]:
    """Versions of what has a hand in features."""
    return {"ldgan": __version__} | {name: version(name) for name in LIBRARIES}


def _check_silent(
    path: Path, reference: Reference, network: FeatureNetwork, wanted: Conditions | None, num_features: int
) -> None:
    """Refuse an .npz file for anything but an FID."""
    if network.name != INCEPTION:
        reason = f"does not say its network, FID's Inception is assumed, and features of {network.name} are compared"
    elif len(reference.fit.mean) != network.num_features:
        numbers = f"{len(reference.fit.mean):,} features, and FID's Inception has {network.num_features:,}"
        reason = f"has mean and covariance of {numbers}"
    elif wanted is not None:
        reason = "does not say which images it is of"
    elif num_features:
        reason = f"holds mean and covariance only, and the features of {num_features:,} images are needed"
    else:
        return
    raise UserError(f"{path}: {reason}; give the images themselves")


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "x".join(map(str, value)) + " px"
    if isinstance(value, int):
        return f"{value:,}"
    return value[:40] if isinstance(value, str) else json.dumps(value)  # long enough to tell hashes apart


def _load_safetensors(path: Path) -> Reference:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise _damaged(path, error) from error
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path}: holds no statistics of this version's format; give another file, or measure again")
    try:
        conditions, description = json.loads(metadata["conditions"]), json.loads(metadata["description"])
        conditions["size"] = tuple(conditions["size"])
        reference = Reference(
            GaussianFit(tensors["mean"], tensors["covariance"]),
            tensors["features"],
            Conditions(**conditions),
            dict(description),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from error
    if sha256_of(tensors) != metadata.get("sha256"):
        raise _damaged(path, "SHA-256 is not the one it was saved with")
    return reference


def _load_npz(path: Path) -> Reference:
    """Mean and covariance; other members, such as ADM's spatial statistics and images, are not even read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, covariance = (torch.from_numpy(file[name].astype(np.float64)) for name in ("mu", "sigma"))
    except KeyError as error:
        raise UserError(f"{path}: holds no statistics under the names mu and sigma; give another file") from error
    except Exception as error:  # decoders raise nearly anything on damaged bytes
        raise _damaged(path, error) from error
    features = torch.empty(0, mean.numel())
    return Reference(GaussianFit(mean, covariance), features, None, {"kind": "npz", "path": str(path)})


def _check_numbers(path: Path, reference: Reference) -> None:
    """Raise a UserError unless there are mean and covariance of a Gaussian, and features of its dimension."""
    (mean, covariance), features = reference.fit, reference.features
    shapes = [tuple(tensor.shape) for tensor in (mean, covariance, features)]
    if mean.ndim != 1 or not len(mean) or shapes[1:] != [(len(mean), len(mean)), (len(features), len(mean))]:
        raise UserError(
            f"{path}: mean, covariance and features of shapes {shapes} are no statistics; give another file"
        )
    if not all(tensor.isfinite().all() for tensor in (mean, covariance, features)):
        raise UserError(f"{path}: holds NaN or infinity; measure the images again")
    # Covariances summed up in fp32 are symmetric up to rounding.
    if (covariance - covariance.T).abs().max() > 1e-5 * covariance.abs().max():
        raise UserError(f"{path}: its covariance is not symmetric; measure the images again")


def _damaged(path: Path, reason: object) -> UserError:
    text = " ".join(str(reason).split())
    return UserError(f"{path}: damaged, or no statistics ({text}); delete it and measure again, or give another file")
