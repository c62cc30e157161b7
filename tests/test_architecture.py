"""Imports run one way, and packages are cheap to import."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

import autoencoder

ROOT = Path(__file__).resolve().parent.parent


def test_imports_keep_the_contracts_of_pyproject(capsys: pytest.CaptureFixture[str]) -> None:
    status = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True, no_logo=True)
    assert status == EXIT_STATUS_SUCCESS, capsys.readouterr().out


@pytest.mark.parametrize(
    ("module", "line", "complaint"),
    [
        ("ldgan/models/wrong.py", "import ldgan.training.gan", "ldgan.models.wrong -> ldgan.training.gan"),
        ("ldgan/diffusion/wrong.py", "import autoencoder.inference.latents", "ldgan.diffusion.wrong -> autoencoder"),
        ("ldgan/new_thing.py", "", "ldgan.new_thing"),
        ("autoencoder/new_thing.py", "", "autoencoder.new_thing"),
    ],
)
def test_a_module_in_the_wrong_room_or_in_none_breaks_a_contract(
    tmp_path: Path, module: str, line: str, complaint: str
) -> None:
    for name in ("ldgan", "autoencoder", "data_prep"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / module).write_text(f"{line}\n")
    # In a process of its own: what is linted is what Python would import, and here that is the checkout.
    script = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    assert complaint in " ".join(result.stdout.split())


@pytest.mark.parametrize("package", ["ldgan", "autoencoder", "data_prep"])
def test_importing_a_package_imports_nothing_heavy(package: str) -> None:
    script = f"import sys, {package}; print(sorted({{'torch', 'accelerate', 'omegaconf'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_stage_1_has_its_names_at_its_door() -> None:
    from autoencoder.inference.light_decoder import load_light_decoder
    from autoencoder.inference.trained_autoencoder import load_autoencoder
    from autoencoder.models.autoencoder import AutoencoderKL

    assert autoencoder.AutoencoderKL is AutoencoderKL
    assert autoencoder.load_autoencoder is load_autoencoder
    assert autoencoder.load_light_decoder is load_light_decoder
    assert set(autoencoder.__all__) == {"AutoencoderKL", "load_autoencoder", "load_light_decoder"}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        autoencoder.nothing  # noqa: B018
