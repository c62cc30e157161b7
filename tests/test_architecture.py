"""Imports run one way, and the package at the bottom is cheap to import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

ROOT = Path(__file__).resolve().parent.parent


def test_imports_keep_the_contracts_of_pyproject(capsys: pytest.CaptureFixture[str]) -> None:
    status = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True, no_logo=True)
    assert status == EXIT_STATUS_SUCCESS, capsys.readouterr().out


@pytest.mark.parametrize("package", ["ldgan", "autoencoder", "data_prep"])
def test_importing_a_package_imports_nothing_heavy(package: str) -> None:
    script = f"import sys, {package}; print(sorted({{'torch', 'accelerate', 'omegaconf'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
