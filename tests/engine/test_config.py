"""Config: precedence of file and command line, round trips, and what each mistake is told."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from ldgan.engine.cli import UserError
from ldgan.engine.command import parse_command, training_parser
from ldgan.engine.config import MISSING, describe, from_dict, load_config, option, to_dict, to_yaml


@dataclass
class Optimizer:
    lr: float = option(1e-3, "step size")
    betas: list[float] = option([0.0, 0.9], "decay rates of the moments")


@dataclass
class Config:
    data: str = option(MISSING, "folder of shards")
    precision: Literal["fp32", "bf16"] = option("fp32", "number format")
    crop: int | None = option(None, "side in pixels")
    flip: bool = option(True, "mirror half of the images")
    generator_optimizer: Optimizer = option(Optimizer(lr=2e-4), "generator")
    discriminator_optimizer: Optimizer = option(Optimizer(lr=1e-4), "discriminator")

    def validate(self) -> None:
        if self.generator_optimizer.lr <= 0:
            raise UserError("generator_optimizer.lr must be positive")


@pytest.fixture
def yaml_path(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("data: shards\ngenerator_optimizer:\n  lr: 5e-4\n")
    return path


def error_of(yaml_path: Path | None, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(Config, yaml_path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_command_line_goes_before_file_and_file_before_defaults(yaml_path: Path) -> None:
    config = load_config(Config, yaml_path, ["discriminator_optimizer.lr=3e-4", "crop=64", "crop=32"])
    assert isinstance(config, Config)
    assert isinstance(config.generator_optimizer, Optimizer)
    assert config.generator_optimizer.lr == 5e-4  # file
    assert config.discriminator_optimizer.lr == 3e-4  # command line
    assert config.generator_optimizer.betas == [0.0, 0.9]  # default
    assert config.crop == 32  # the last one counts


def test_lists_and_null_are_yaml_values() -> None:
    config = load_config(Config, None, ["data=x", "crop=null", "generator_optimizer.betas=[0.5, 1]"])
    assert config.crop is None
    assert config.generator_optimizer.betas == [0.5, 1.0]


def test_defaults_are_copied() -> None:
    first, second = Config(data="x"), Config(data="x")
    first.generator_optimizer.betas.append(3.0)
    assert second.generator_optimizer.betas == [0.0, 0.9]


def test_yaml_and_json_round_trips(tmp_path: Path) -> None:
    config = load_config(Config, None, ["data=x", "precision=bf16", "generator_optimizer.lr=1.7e-5"])
    path = tmp_path / "saved.yaml"
    path.write_text(to_yaml(config))
    assert load_config(Config, path, []) == config
    assert from_dict(Config, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("lr=1", "generator_optimizer.lr"),
        ("discriminator_optimzer.lr=1", "discriminator_optimizer.lr"),
        ("discriminator_optimizer.lrr=1", "discriminator_optimizer.lr"),
        ("betass=[0,1]", "generator_optimizer.betas"),
        ("precison=bf16", "precision"),
    ],
)
def test_unknown_key_names_the_closest(override: str, meant: str) -> None:
    key = override.partition("=")[0]
    assert error_of(None, override) == f"command line: unknown key {key!r}; did you mean {meant!r}?"


def test_unknown_key_that_resembles_nothing() -> None:
    assert error_of(None, "zzz=1") == "command line: unknown key 'zzz'; --help lists the keys"


def test_unknown_key_in_a_file_names_the_file(yaml_path: Path) -> None:
    yaml_path.write_text("generator_optimizer:\n  learning_rate: 1\n  lrs: 2\n")
    assert error_of(yaml_path).startswith(f"{yaml_path}: unknown key 'generator_optimizer.learning_rate'")


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("generator_optimizer.lr=fast", "generator_optimizer.lr: expected float, got 'fast'"),
        ("generator_optimizer.betas=0.5", "generator_optimizer.betas: expected list[float], got '0.5'"),
        ("generator_optimizer.betas=[a]", "generator_optimizer.betas: expected list[float], got \"['a']\""),
        ("crop=1.5", "crop: expected int | None, got '1.5'"),
        ("precision=fp8", "precision: expected fp32 | bf16, got 'fp8'"),
        ("flip=maybe", "flip: expected bool, got 'maybe'"),
        ("data=null", "data: expected str, got 'null'"),
        ("generator_optimizer=3", "generator_optimizer: expected a section with keys of its own, got '3'"),
        ("data=${oc.env:HOME}", "data: interpolation ('${oc.env:HOME}') is refused; write the value itself"),
        ("data", "expected key=value, found 'data'"),
        ("data=[1", "'data=[1' is not key=value with a YAML value"),
    ],
)
def test_wrong_values(override: str, problem: str) -> None:
    assert error_of(None, override) == f"command line: {problem}"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("data: [1", "not valid YAML"),
        ("data: a\ndata: b", "not valid YAML"),
        ("- data", "expected `key: value` lines, found a list"),
        ("data: ${crop}", "data: interpolation"),
        ("data: ${crop", "not valid YAML"),
        ("data: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("generator_optimizer:", "generator_optimizer: expected a section"),
    ],
)
def test_wrong_files(yaml_path: Path, text: str, problem: str) -> None:
    yaml_path.write_text(text)
    assert error_of(yaml_path).startswith(f"{yaml_path}: {problem}")


def test_missing_file_and_missing_value(tmp_path: Path) -> None:
    assert error_of(tmp_path / "no.yaml") == f"{tmp_path / 'no.yaml'}: cannot read the config: no such file"
    assert error_of(None) == "no value for data; give it in the config file or as `data=VALUE`"


def test_validate_is_called() -> None:
    assert error_of(None, "data=x", "generator_optimizer.lr=0") == "generator_optimizer.lr must be positive"


def test_from_dict_is_strict() -> None:
    with pytest.raises(UserError, match=r"^old.json: unknown key 'network'"):
        from_dict(Config, {"data": "x", "network": {}}, source="old.json")


def test_describe_lists_key_type_default_help() -> None:
    lines = describe(Config).splitlines()
    assert [line.split()[0] for line in lines] == [
        *("data", "precision", "crop", "flip"),
        *("generator_optimizer.lr", "generator_optimizer.betas"),
        *("discriminator_optimizer.lr", "discriminator_optimizer.betas"),
    ]
    assert lines[0].split(maxsplit=3)[1:] == ["str", "(required)", "folder of shards"]
    assert lines[6].split(maxsplit=3)[1:] == ["float", "0.0001", "step size"]
    assert len({line.index(help) for line, help in zip(lines[:2], ["folder", "number"])}) == 1  # aligned


def test_command_accepts_settings_between_flags(yaml_path: Path) -> None:
    parser = training_parser("Train.", "train.py --latent", Config)
    parser.add_argument("--latent", action="store_true")
    arguments = ["crop=8", "--latent", "flip=false", "--config", str(yaml_path), "generator_optimizer.lr=1"]
    flags, config = parse_command(parser, Config, arguments)
    assert flags.latent
    assert (config.crop, config.flip, config.generator_optimizer.lr) == (8, False, 1.0)
    assert "generator_optimizer.lr" in parser.format_help()


def test_dry_run_prints_the_resolved_config(yaml_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = training_parser("Train.", "train.py", Config)
    with pytest.raises(SystemExit) as caught:
        parse_command(parser, Config, ["--config", str(yaml_path), "--dry-run", "crop=8"])
    assert caught.value.code == 0
    yaml_path.write_text(capsys.readouterr().out)
    assert load_config(Config, yaml_path, []) == Config("shards", crop=8, generator_optimizer=Optimizer(5e-4))
