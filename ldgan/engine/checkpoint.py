"""A checkpoint: a folder of named stateful things that describes itself.

``checkpoint.json`` holds the description (step, config ...), library versions, and for each thing the size
and SHA-256 of its file and the part of its state that is not tensors. Tensors are in ``<name>.safetensors``.
Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ldgan.engine.cli import UserError
from ldgan.engine.files import new_folder, write_through
from ldgan.engine.weights import check_fit

FORMAT = "ldgan-checkpoint/1"
DESCRIPTION_FILE = "checkpoint.json"


class Stateful(Protocol):
    """Modules, optimizers, schedulers, `EMA`: whatever gives its state away and takes it back."""

    def state_dict(self) -> dict[str, Any]:
        """Return tensors by name, or nested dicts and lists of tensors and JSON values."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Take over what `state_dict` returned."""
        ...


def save_checkpoint(folder: Path, things: Mapping[str, Stateful], description: Mapping[str, Any]) -> None:
    """Write the state of ``things`` and a JSON ``description`` into a new ``folder``, complete or not at all.

    Raises:
        UserError: if ``folder`` exists.
        ValueError: if ``description`` uses a name that the format keeps for itself.
    """
    if folder.exists():
        raise UserError(f"{folder}: exists, and a checkpoint is never overwritten; remove it or save elsewhere")
    if reserved := {"format", "libraries", "things"} & set(description):
        raise ValueError(f"names reserved by the checkpoint format: {sorted(reserved)}")
    libraries = {"python": platform.python_version()} | {name: version(name) for name in ("torch", "safetensors")}
    with new_folder(folder) as temporary:
        records = {name: _write_thing(temporary, name, thing) for name, thing in things.items()}
        document = {"format": FORMAT, **description, "libraries": libraries, "things": records}
        write_through(temporary / DESCRIPTION_FILE, json.dumps(document, indent=2).encode())


def read_description(folder: Path) -> dict[str, Any]:
    """Return the contents of ``checkpoint.json``.

    Raises:
        UserError: if there is none, or it is damaged or of another format.
    """
    path = folder / DESCRIPTION_FILE
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{folder}: not a checkpoint: it has no {DESCRIPTION_FILE}") from error
    except ValueError as error:  # bad JSON, or bytes that are not UTF-8
        raise UserError(f"{path}: damaged ({error}); use another checkpoint") from error
    found = document.get("format") if isinstance(document, dict) else None
    if found != FORMAT or not isinstance(document.get("things"), dict):
        raise UserError(f"{path}: format {found!r}, expected {FORMAT!r}; use a checkpoint made by this version")
    return document


def load_thing(folder: Path, name: str, thing: Stateful) -> None:
    """Load the state saved as ``name`` into ``thing``; names and shapes of tensors must match exactly.

    Sequences in optimizer options come back as lists (AdamW's betas, say), numbers and tensors bit for bit.

    Raises:
        UserError: if the file is missing or damaged, or its contents do not fit ``thing``.
    """
    path, tensors, rest = _read_thing(folder, name)
    try:
        if rest is None:
            check_fit(
                path, tensors, thing.state_dict(), by="in the model", why="it was saved from another architecture"
            )
        thing.load_state_dict(tensors if rest is None else _join(tensors, rest))
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: does not fit what is being loaded: {reason}") from error


def load_state(folder: Path, name: str) -> dict[str, Tensor]:
    """Return the tensors saved as ``name``, on the CPU; those of nested states have dotted names.

    Raises:
        UserError: if the file is missing or damaged.
    """
    return _read_thing(folder, name)[1]


def _write_thing(folder: Path, name: str, thing: Stateful) -> dict[str, Any]:
    """Write ``<name>.safetensors``; return its record for the description."""
    tensors, rest = _split(thing.state_dict())
    # safetensors wants each tensor contiguous and in memory of its own: transposed or tied weights are not.
    owned = {
        key: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for key, tensor in tensors.items()
    }
    data = safetensors.torch.save(owned)
    write_through(folder / f"{name}.safetensors", data)
    return {"num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "rest": rest}


def _read_thing(folder: Path, name: str) -> tuple[Path, dict[str, Tensor], Any]:
    """Return path, tensors and the rest of a thing's state, if size and hash are as the description says."""
    things = read_description(folder)["things"]
    if name not in things:
        raise UserError(f"{folder}: holds no {name!r}, only {', '.join(things)}")
    path, record = folder / f"{name}.safetensors", things[name]
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing from the checkpoint; use another checkpoint") from error
    if len(data) != record["num_bytes"]:
        sizes = f"{len(data)} bytes, not {record['num_bytes']}"
        raise UserError(f"{path}: damaged: {sizes}; use another checkpoint")
    if hashlib.sha256(data).hexdigest() != record["sha256"]:
        raise UserError(f"{path}: damaged: SHA-256 is not that of {DESCRIPTION_FILE}; use another checkpoint")
    try:
        return path, safetensors.torch.load(data), record["rest"]
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file ({error})") from error


def _split(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], Any]:
    """Return a state's tensors and the rest, which is None for a module: tensors by name and no more."""
    if all(isinstance(value, Tensor) for value in state.values()):
        return dict(state), None
    tensors: dict[str, Tensor] = {}
    return tensors, _take_tensors(state, "", tensors)


def _take_tensors(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Move the tensors of nested dicts and lists into ``tensors`` under dotted names; return what is left.

    In a list a tensor leaves None in its place; in a dict it, and a dict that held no more, leaves nothing.
    """
    if isinstance(value, Tensor):
        tensors[path[1:]] = value
        return None
    if isinstance(value, (list, tuple)) and value:
        return [_take_tensors(item, f"{path}.{index}", tensors) for index, item in enumerate(value)]
    if not isinstance(value, Mapping) or not value:
        return value
    if dotted := [key for key in value if "." in str(key)]:
        raise ValueError(f"a nested state cannot have keys with dots: {dotted[0]!r}")
    rest = {key: _take_tensors(item, f"{path}.{key}", tensors) for key, item in value.items()}
    return {key: item for key, item in rest.items() if item or item is value[key]}


def _join(tensors: Mapping[str, Tensor], rest: Any) -> Any:
    """Undo `_take_tensors`."""
    state = _restore_keys(rest)
    for path, tensor in tensors.items():
        *parents, last = map(_key, path.split("."))
        target = state
        for parent in parents:
            target = target[parent] if isinstance(target, list) else target.setdefault(parent, {})
        target[last] = tensor
    return state


def _restore_keys(rest: Any) -> Any:
    if isinstance(rest, list):
        return [_restore_keys(item) for item in rest]
    return {_key(key): _restore_keys(item) for key, item in rest.items()} if isinstance(rest, dict) else rest


def _key(text: str) -> Any:
    """Optimizers number their parameters with integers, which JSON and tensor names turn into text."""
    return int(text) if text.isdecimal() else text
