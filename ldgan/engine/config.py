"""Configuration: typed dataclasses hold every option and its default; YAML and ``key=value`` change them.

A config is data: interpolation (``${...}``) is refused, whatever it refers to, so nothing in it reads the environment
or runs a resolver.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import enum
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ldgan.engine.cli import UserError
from ldgan.engine.shipped import find_config

__all__ = [
    "MISSING",
    "describe",
    "flatten",
    "from_dict",
    "load_config",
    "option",
    "parse_yaml",
    "read_yaml",
    "to_dict",
    "to_yaml",
]

T = TypeVar("T")
COMMAND_LINE = "command line"
# What somebody else wrote may be made to take any time and memory; ours are a hundred times smaller.
MAX_YAML_CHARACTERS = 1 << 20
MAX_YAML_NODES = 10_000  # each alias counted as what it stands for, which can be a billion of others (billion laughs)
MAX_YAML_DEPTH = 50
MAX_LIST_ITEMS = 1000
MAX_SHOWN = 200  # characters of a wrong key or value in a message

# PyYAML and OmegaConf let through what Python raises for scalars and keys that no type has room for, or for depth.
_YAML_ERRORS = (
    *(YAMLError, OmegaConfBaseException, ArithmeticError, AssertionError, LookupError, RecursionError),
    *(AttributeError, TypeError, ValueError),
)


def option(default: Any, help: str) -> Any:
    """Return a dataclass field with a default and the help text that `describe` shows.

    The default ``MISSING`` makes an option mandatory. Lists, dicts and dataclasses are copied per instance.
    """
    if isinstance(default, (list, dict)) or dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


def load_config(schema: type[T], yaml_path: Path | None, overrides: Sequence[str]) -> T:
    """Return ``schema`` with the settings of a YAML file, then those of ``section.key=value`` strings.

    A config that comes with the code goes by its name as well, see `find_config`.

    If ``schema`` has a method ``validate``, it is called on the result and may raise `UserError` itself.

    Raises:
        UserError: for a file that is missing or no YAML mapping, an unknown key, a value of the wrong type,
            an interpolation, or a mandatory value that nobody gave.
    """
    config = OmegaConf.structured(schema)
    if yaml_path is not None:
        _assign(config, schema, read_yaml(find_config(yaml_path)), str(yaml_path))
    for override in overrides:
        _assign(config, schema, _read_override(override), COMMAND_LINE)
    return _finish(config, schema)


def from_dict(schema: type[T], mapping: Mapping[str, Any], source: str = "checkpoint") -> T:
    """Rebuild a config from what `to_dict` returned, as strictly as `load_config`; errors name ``source``.

    Options that ``mapping`` lacks, because they are younger than it, have their default.
    """
    config = OmegaConf.structured(schema)
    _assign(config, schema, mapping, source)
    return _finish(config, schema)


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config as nested dicts, lists and scalars that JSON can hold."""
    container = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    return typing.cast("dict[str, Any]", container)


def to_yaml(config: Any) -> str:
    """Return a config, defaults included, as YAML text that `load_config` reads back to an equal config."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def parse_yaml(text: str, source: str) -> dict[str, Any]:
    """Return the mapping that YAML text holds, ``${...}`` left as it stands; errors name ``source``.

    Raises:
        UserError: if the text is not YAML, or not a mapping, or far larger than any config.
    """
    if len(text) > MAX_YAML_CHARACTERS:
        raise UserError(f"{source}: longer than {MAX_YAML_CHARACTERS:,} characters; give a config")
    try:
        _check_depth(text)
        config = OmegaConf.create(text, max_yaml_expanded_nodes=MAX_YAML_NODES)
        container = OmegaConf.to_container(config)
    except _YAML_ERRORS as error:
        raise UserError(f"{source}: not valid YAML: {_shorten(' '.join(str(error).split()))}") from error
    if not isinstance(container, dict):
        raise UserError(f"{source}: expected `key: value` lines, found a list")
    return typing.cast("dict[str, Any]", container)


def _check_depth(text: str) -> None:
    """Raise ValueError for text that is nested deeper than `MAX_YAML_DEPTH`: libyaml's loader would end the process."""
    depth = 0
    for event in yaml.parse(text, yaml.CSafeLoader):  # one event after the other, so that this itself has no depth
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_YAML_DEPTH:
            raise ValueError(f"nested more than {MAX_YAML_DEPTH} deep")


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, under dotted keys: ``{"a": {"b": 1}}`` becomes ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def describe(schema: type) -> str:
    """Return the options of a schema, one aligned line each: dotted key, type, default, help."""
    defaults = OmegaConf.structured(schema)
    required = OmegaConf.missing_keys(defaults)
    rows = []
    for key, leaf in _leaves(schema).items():
        default = "(required)" if key in required else _show(OmegaConf.select(defaults, key))
        rows.append((key, leaf.type_name, default, leaf.help))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join("  ".join([*map(str.ljust, row[:3], widths), row[3]]).rstrip() for row in rows)


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """One option: what `describe` and error messages say of it."""

    type_name: str
    help: str


def _leaves(schema: type, prefix: str = "") -> dict[str, _Leaf]:
    """Return every option of a schema by dotted key, in the order in which the dataclasses list them."""
    leaves: dict[str, _Leaf] = {}
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        key, hint = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(hint):
            leaves |= _leaves(typing.cast(type, hint), f"{key}.")
        else:
            leaves[key] = _Leaf(_type_name(hint), field.metadata.get("help", ""))
    return leaves


def _type_name(hint: Any) -> str:
    """Return a type as written in source, ``list[int]`` say, or the choices of a Literal or enum."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(_type_name, arguments))
    if origin is not None:
        return f"{origin.__name__}[{', '.join(map(_type_name, arguments))}]"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return " | ".join(hint.__members__)
    return "None" if hint is type(None) else getattr(hint, "__name__", str(hint))


def _show(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, enum.Enum):
        return value.name
    return str(value).lower() if isinstance(value, bool) else _shorten(str(value))


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds, as `parse_yaml` does; a UserError where it cannot be read."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_YAML_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise UserError(f"{path}: cannot read the config: {reason}") from error
    return parse_yaml(text, str(path))


def _read_override(override: str) -> dict[str, Any]:
    if "=" not in override:
        raise UserError(f"{COMMAND_LINE}: expected key=value, found {override!r}")
    try:
        _check_depth(override.partition("=")[2])
        container = OmegaConf.to_container(OmegaConf.from_dotlist([override]))
    except _YAML_ERRORS as error:
        raise UserError(f"{COMMAND_LINE}: {_shorten(override)!r} is not key=value with a YAML value") from error
    return typing.cast("dict[str, Any]", container)


def _assign(config: DictConfig, schema: type, settings: Mapping[str, Any], source: str) -> None:
    """Set the options in ``settings`` one by one, so that an error can name source, key and value."""
    leaves = _leaves(schema)
    try:
        for key, value in _settings(settings, schema, source):
            _assign_one(config, leaves, key, value, source)
    except RecursionError as error:
        raise UserError(f"{source}: nested too deeply for a config") from error


def _assign_one(config: DictConfig, leaves: Mapping[str, _Leaf], key: str, value: Any, source: str) -> None:
    if key not in leaves:
        key = _shorten(key)
        raise UserError(f"{source}: unknown key {key!r}; {_suggestion(key, list(leaves))}")
    if isinstance(value, list | tuple) and len(value) > MAX_LIST_ITEMS:
        raise UserError(f"{source}: {key}: a list of {len(value):,}; at most {MAX_LIST_ITEMS:,} are read")
    if "${" in str(value):
        raise UserError(f"{source}: {key}: interpolation ({_shorten(repr(value))}) is refused; write the value itself")
    expected = leaves[key].type_name
    try:
        # OmegaConf itself takes [[1]] for a list[int].
        nested = isinstance(value, list | tuple) and any(isinstance(item, list | tuple | Mapping) for item in value)
        if nested and not expected.startswith("list[dict"):
            raise TypeError("a list in a list")
        OmegaConf.update(config, key, value)
    except _YAML_ERRORS as error:
        raise UserError(f"{source}: {key}: expected {expected}, got {_show(value)!r}") from error


def _settings(settings: Mapping[str, Any], schema: type, source: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted key and value of each setting, descending where ``schema`` has a section."""
    hints = typing.get_type_hints(schema)
    for name, value in settings.items():
        key, hint = f"{prefix}{name}", hints.get(name)
        if hint is None:  # unknown, perhaps a misspelt section: errors show each key in full
            yield from flatten({key: value}).items()
        elif not dataclasses.is_dataclass(hint):
            yield key, value
        elif isinstance(value, Mapping):
            yield from _settings(value, typing.cast(type, hint), source, f"{key}.")
        else:
            raise UserError(f"{source}: {key}: expected a section with keys of its own, got {_show(value)!r}")


def _suggestion(wrong: str, keys: list[str]) -> str:
    """Say which key was probably meant; the last part also counts alone: people forget the section."""

    def similarity(key: str) -> tuple[float, float]:
        pairs = (wrong, key), (wrong.rpartition(".")[2], key.rpartition(".")[2])
        whole, last = (difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)
        return max(whole, last), whole

    best = max(keys, key=similarity)
    return f"did you mean {best!r}?" if similarity(best)[0] > 0.6 else "--help lists the keys"


def _finish(config: DictConfig, schema: type[T]) -> T:
    if missing := sorted(OmegaConf.missing_keys(config)):
        names = ", ".join(missing)
        raise UserError(f"no value for {names}; give it in the config file or as `{missing[0]}=VALUE`")
    result = typing.cast(T, OmegaConf.to_object(config))
    if hasattr(result, "validate"):
        result.validate()
    return result
