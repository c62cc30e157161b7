"""The configs that come with the code: `configs/` of a checkout, which an installed package carries inside."""

from __future__ import annotations

from pathlib import Path

from ldgan.engine.cli import UserError

PACKAGE = Path(__file__).resolve().parents[1]


def find_config(path: Path) -> Path:
    """The file at ``path`` or, where there is none, the shipped config of that name, else ``path``.

    A name is that in the checkout, configs/ldgan/mnist.yaml, and may lack the first folder and the suffix, or be
    the last part alone.

    Raises:
        UserError: several configs have this name.
    """
    if path.exists() or path.is_absolute():
        return path
    parts = path.with_suffix("").parts if path.suffix == ".yaml" else path.parts
    wanted = parts[1:] if parts[:1] == ("configs",) else parts
    found = {name: file for name, file in shipped_configs().items() if wanted and name[-len(wanted) :] == wanted}
    if len(found) > 1:
        raise UserError(f"{path}: several configs have this name; choose one of {', '.join(map('/'.join, found))}")
    return next(iter(found.values()), path)


def shipped_configs() -> dict[tuple[str, ...], Path]:
    """The files by name, ("ldgan", "mnist") say."""
    installed, checkout = PACKAGE / "configs", PACKAGE.parent / "configs"
    folder = installed if installed.is_dir() else checkout
    return {(file.parent.name, file.stem): file for file in sorted(folder.glob("*/*.yaml"))}
