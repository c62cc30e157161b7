"""Networks built again from what a checkpoint says of them, which a stranger may have written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from ldgan.engine.checkpoint import DESCRIPTION_FILE, DamagedCheckpointError, load_state
from ldgan.engine.cli import UserError
from ldgan.engine.config import from_dict
from ldgan.engine.weights import check_fit

SPARE_PARAMETERS = 1000  # that a network may have more than its file, before building it is given up
MAX_NUMBER = 1 << 20  # of channels, blocks ...; lists as long as that still take little memory

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")


def load_network(folder: Path, name: str, build: Callable[[], M]) -> M:
    """The network that ``build`` makes, with the weights that are saved as ``name`` in the checkpoint ``folder``.

    It is built on the meta device first and compared with the file: the numbers that a checkpoint gives may ask for
    more than any machine has. So memory stays bounded by the size of the file.

    Raises:
        UserError: the file is missing or damaged, or its tensors are not those of the network, or no network can have
            these numbers.
    """
    weights = load_state(folder, name)
    path = folder / f"{name}.safetensors"
    with meta_device(path, len(weights)):
        expected = build().state_dict()
    check_fit(path, weights, expected, by="in the model", why="it was saved from another architecture")
    network = build()
    network.load_state_dict(weights)
    return network


@contextmanager
def meta_device(path: Path, num_tensors: int) -> Iterator[None]:
    """Build what is built in the block on the meta device, where tensors take no memory.

    Raises:
        UserError: a network with far more than the ``num_tensors`` of the file ``path``, which would not even end to be
            built, or numbers that make no network.
    """
    try:
        with torch.device("meta"), _Uninitialised(), _at_most_parameters(num_tensors + SPARE_PARAMETERS):
            yield
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{path}: no network has the numbers that come with it ({reason}); use another") from error


class _Uninitialised(TorchFunctionMode):
    """No initial values: there is nothing to fill, and `normal_` of the meta device imports seconds of PyTorch."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


@contextmanager
def _at_most_parameters(limit: int) -> Iterator[None]:
    """Raise ValueError when modules that are built in the block have more parameters."""
    number = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal number
        number += 1
        if number > limit:
            raise ValueError(f"more than {limit:,} parameters")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def read_numbers(schema: type[T], folder: Path, config: Mapping[str, Any], key: str) -> T:
    """The numbers of a network, which lie under ``key`` in the ``config`` of the checkpoint ``folder``.

    Raises:
        UserError: they are missing, of another type, or beyond any network's.
    """
    numbers = from_dict(schema, field(folder, config, key, dict), str(folder))
    for name, value in vars(numbers).items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and abs(number) > MAX_NUMBER:
                raise UserError(f"{folder}: {key}.{name} is {value!r:.80}; no network has more than {MAX_NUMBER:,}")
    return numbers


def field(folder: Path, description: Mapping[str, Any], key: str, kind: type | tuple[type, ...]) -> Any:
    """The field ``key`` of the description in the checkpoint ``folder``, checked to be of a type.

    Raises:
        DamagedCheckpointError: it is missing, or of another type.
    """
    value = description.get(key)
    # bool is a kind of int, but True is no number of anything.
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        shown = f"{value!r:.80}" if key in description else "missing"
        raise DamagedCheckpointError(f"{folder / DESCRIPTION_FILE}: damaged: {key} is {shown}")
    return value
