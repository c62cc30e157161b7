"""A checkpoint: a folder of named stateful things that describes itself.

``checkpoint.json`` holds the description (step, config ...), library versions, and for each thing the size
and SHA-256 of its file and the part of its state that is not tensors; last comes the SHA-256 of all this. Tensors
are in ``<name>.safetensors``. Nothing is pickled, and nothing that is read is believed before it was checked.
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
MAX_DESCRIPTION_BYTES = 64 * 2**20  # a thousand times what our largest networks need


class DamagedCheckpointError(UserError):
    """A checkpoint that is not as it was written: something is missing, cut short or altered.

    ``reason`` says what is wrong where, without the advice that the message ends in.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}; use another checkpoint")
        self.reason = reason


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
    if reserved := {"format", "libraries", "things", "sha256"} & set(description):
        raise ValueError(f"names reserved by the checkpoint format: {sorted(reserved)}")
    libraries = {"python": platform.python_version()} | {name: version(name) for name in ("torch", "safetensors")}
    with new_folder(folder) as temporary:
        records = {name: _write_thing(temporary, name, thing) for name, thing in things.items()}
        document = {"format": FORMAT, **description, "libraries": libraries, "things": records}
        sealed = {**document, "sha256": _digest(document)}
        write_through(temporary / DESCRIPTION_FILE, json.dumps(sealed, indent=2).encode())


def tensors_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of what a `Stateful` gives away, by name; those of nested states have dotted names."""
    return _split(state)[0]


def read_description(folder: Path) -> dict[str, Any]:
    """Return the contents of ``checkpoint.json``, but for the hash over them.

    Raises:
        DamagedCheckpointError: if there is none, or it is damaged.
        UserError: if it is of another format.
    """
    path = folder / DESCRIPTION_FILE
    try:
        fields = _parse(path)
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{folder}: not a checkpoint: it has no {DESCRIPTION_FILE}") from error
    except (ValueError, RecursionError) as error:  # bad JSON, bytes that are not UTF-8, or brackets without end
        raise DamagedCheckpointError(f"{path}: damaged ({error})") from error
    if (found := fields.get("format")) != FORMAT or not isinstance(fields.get("things"), dict):
        raise UserError(f"{path}: format {found!r}, expected {FORMAT!r}; use a checkpoint made by this version")
    return fields


def check_checkpoint(folder: Path) -> dict[str, Any]:
    """Read every file of a checkpoint, load nothing; its description.

    Raises:
        DamagedCheckpointError: if a file is missing, or not as it was written.
        UserError: if it is of another format.
    """
    description = read_description(folder)
    for name in description["things"]:
        _read_bytes(folder, name, description["things"])
    return description


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
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
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
    path, data = _read_bytes(folder, name, things)
    try:
        return path, safetensors.torch.load(data), things[name].get("rest")
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file ({error}); use another checkpoint") from error


def _read_bytes(folder: Path, name: str, things: Mapping[str, Any]) -> tuple[Path, bytes]:
    """Return a thing's file and what is in it, if size and hash are as the description says."""
    if not name.isidentifier():  # it becomes part of a path
        raise DamagedCheckpointError(f"{folder / DESCRIPTION_FILE}: damaged: {name!r} is no name of a thing")
    path, record = folder / f"{name}.safetensors", things[name]
    num_bytes, digest = (record.get(key) if isinstance(record, dict) else None for key in ("num_bytes", "sha256"))
    try:
        found = path.stat().st_size  # before it is read: a file may be larger than the memory
        if found != num_bytes:
            raise DamagedCheckpointError(f"{path}: damaged: {found} bytes, not {str(num_bytes)[:80]}")
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{path}: missing from the checkpoint") from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise DamagedCheckpointError(f"{path}: damaged: SHA-256 is not that of {DESCRIPTION_FILE}")
    return path, data


def _parse(path: Path) -> dict[str, Any]:
    """Return the fields of a description without their hash; raises ValueError or RecursionError on damage."""
    if (num_bytes := path.stat().st_size) > MAX_DESCRIPTION_BYTES:
        raise ValueError(f"{num_bytes:,} bytes are too many")
    document = json.loads(path.read_text(encoding="utf-8"))
    fields = document if isinstance(document, dict) else {}
    # Checkpoints made before there was this hash have none.
    if (digest := fields.pop("sha256", None)) is not None and digest != _digest(fields):
        raise ValueError("SHA-256 is not that of its contents")
    return fields


def _digest(document: Mapping[str, Any]) -> str:
    """SHA-256 (hex) over a description; JSON that was read gives the text again that was written."""
    return hashlib.sha256(json.dumps(document, indent=2).encode()).hexdigest()


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
