"""The wheel, built and installed where there is no checkout: it holds all that belongs to it, and its commands work."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from ldgan.engine.cli import UserError
from ldgan.engine.shipped import find_config, shipped_configs

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("ldgan", "autoencoder", "data_prep")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what it needs, so that nothing is written into the checkout."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in (*PACKAGES, "configs"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "-q", "-w", out, source], check=True)
    (built,) = out.glob("ldgan-*.whl")
    return built


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that has the wheel and, by their folder, its dependencies."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, symlinks=os.name != "nt")
    programs = home / ("Scripts" if os.name == "nt" else "bin")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", f"--python={programs / 'python'}"]
    subprocess.run([*pip, "install", "-q", "--no-index", "--no-deps", "--no-compile", wheel], check=True)
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    installed = subprocess.run([programs / "python", "-c", where], check=True, capture_output=True, text=True)
    # A line names a folder and does not run what lies in it, such as the link to this checkout of `pip install -e`.
    (Path(installed.stdout.strip()) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return programs


def output(folder: Path, *command: object) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_holds_every_module_and_config(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.*") if path.is_file()]
    modules = {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}
    configs = {f"ldgan/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert found == modules | configs


def test_every_command_is_installed(wheel: Path, programs: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        lines = archive.read(name).decode().splitlines()
    scripts = dict(line.split(" = ") for line in lines if " = " in line)
    commands = {
        path for package in PACKAGES for path in (ROOT / package).glob("*.py") if "command(" in path.read_text()
    }
    assert set(scripts.values()) == {f"{path.parent.name}.{path.stem}:command" for path in commands}
    assert {path.stem for path in programs.glob("ldgan-*")} == set(scripts)


def test_it_works_where_there_is_no_checkout(programs: Path, tmp_path: Path) -> None:
    code = "import ldgan; print(ldgan.__file__); from ldgan import Diffusion, LatentDDGAN, UNet; print(UNet.__name__)"
    file, name = output(tmp_path, programs / "python", "-c", code).splitlines()
    assert Path(file).is_relative_to(programs.parent)
    assert name == "UNet"
    assert "usage: ldgan-sample" in output(tmp_path, programs / "ldgan-sample", "--help")
    config = ("--config", "configs/ldgan/stacked_mnist_small.yaml", "--dry-run")
    printed = output(tmp_path, programs / "ldgan-train", *config, "data=x", "run.dir=y")
    here = output(ROOT, sys.executable, "ldgan/train.py", *config, "data=x", "run.dir=y")
    assert printed == here
    assert "usage: ldgan-make-shards" in output(tmp_path, programs / "ldgan-make-shards", "--help")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    ["configs/ldgan/mnist.yaml", "configs/ldgan/mnist", "ldgan/mnist.yaml", "ldgan/mnist", "mnist.yaml", "mnist"],
)
def test_a_config_goes_by_its_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config(Path(name)) == ROOT / "configs" / "ldgan" / "mnist.yaml"
    own = tmp_path / name
    own.parent.mkdir(parents=True, exist_ok=True)
    own.write_text("")
    assert find_config(Path(name)) == Path(name)  # what is there goes first


def test_names_of_no_config_or_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("configs/ldgan/nowhere.yaml", "nist", "ldgan", "configs", ".", str(tmp_path / "mnist.yaml")):
        assert find_config(Path(name)) == Path(name)
    with pytest.raises(
        UserError, match="choose one of autoencoder/stacked_mnist, compare/stacked_mnist, ldgan/stacked"
    ):
        find_config(Path("stacked_mnist"))
    assert len(shipped_configs()) == len([*(ROOT / "configs").rglob("*.yaml")])
