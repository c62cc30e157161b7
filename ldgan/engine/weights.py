"""Weights that others saved: files of tensors by name, read without running any code that they may carry."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ldgan.engine.cli import UserError

_PICKLED = (".pth", ".pt")

# The files under which torchvision publishes the weights of its networks.
TORCHVISION_FILES: Mapping[str, str] = {
    "alexnet": "alexnet-owt-7be5be79.pth",
    "squeezenet1_1": "squeezenet1_1-b8a52dc0.pth",
    "vgg16": "vgg16-397923af.pth",
}


def load_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, or of a .pth or .pt file that holds a state dict, on the CPU.

    Raises:
        UserError: if the file is missing, damaged, or holds anything but tensors by name.
    """
    if path.suffix not in (".safetensors", *_PICKLED):
        raise UserError(f"{path}: not a file of weights; give a .safetensors, .pth or .pt file")
    if not path.is_file():
        raise UserError(f"{path}: no such file of weights; check the path")
    try:
        weights = _unpickle(path) if path.suffix in _PICKLED else safetensors.torch.load_file(path)
    except Exception as error:  # decoders raise nearly anything on damaged bytes
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{path}: damaged, or not only weights ({reason}); get the file again") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{path}: holds something else than tensors by name; save the network's state_dict() alone")
    return dict(weights)


def _unpickle(path: Path) -> object:
    # weights_only: a pickle may run any code while it is loaded, this one tensors and plain containers only.
    return torch.load(path, map_location="cpu", weights_only=True)


def hub_file(file_name: str) -> Path:
    """Where torch.hub keeps a file of weights that it downloaded before, below TORCH_HOME."""
    return Path(torch.hub.get_dir()) / "checkpoints" / file_name


def sha256_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over names, shapes and bytes of tensors, whatever their order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_fit(path: Path, found: Mapping[str, Tensor], expected: Mapping[str, Any], *, by: str, why: str) -> None:
    """Raise a UserError about the file ``path`` unless names and shapes of its tensors are the expected ones.

    ``by`` says who expects them ("in the model"), ``why`` what a difference means.
    """
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unknown:
        raise UserError(
            f"{path}: {len(missing)} tensors missing (first: {missing[:1]}) and {len(unknown)} unknown"
            f" (first: {unknown[:1]}); {why}"
        )
    for key, tensor in expected.items():
        if tensor.shape != found[key].shape:
            shapes = f"{list(found[key].shape)} in the file, {list(tensor.shape)} {by}"
            raise UserError(f"{path}: {key}: shape {shapes}; {why}")


def fill(network: nn.Module, path: Path, name: str, name_in_file: Callable[[str], str] = lambda key: key) -> None:
    """Load all tensors of ``network`` from ``path``, which may hold more, such as a classifier nobody needs.

    ``name_in_file`` maps the network's names to the file's; ``name`` is what errors call the network, which may
    lie on the meta device.

    Raises:
        UserError: a tensor is missing or of another shape, or the file cannot be read.
    """
    weights, expected = load_weights(path), network.state_dict()
    found = {key: weights[name_in_file(key)] for key in expected if name_in_file(key) in weights}
    unfit = [key for key, tensor in expected.items() if key not in found or found[key].shape != tensor.shape]
    if unfit:
        raise UserError(
            f"{path}: not the weights of {name}: {len(unfit)} of {len(expected)} tensors are missing or of another"
            f" shape (first: {name_in_file(unfit[0])}); give the file of that network"
        )
    network.load_state_dict({key: found[key].to(tensor.dtype) for key, tensor in expected.items()}, assign=True)
