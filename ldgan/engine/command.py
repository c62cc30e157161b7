"""The command line of every training command: a config file, ``key=value`` settings and ``--dry-run``."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from ldgan.engine.config import describe, load_config, to_yaml

T = TypeVar("T")


def training_parser(description: str, examples: str, schema: type) -> argparse.ArgumentParser:
    """Return a training command's parser; ``--help`` shows ``examples`` and each option of ``schema``."""
    options = textwrap.indent(describe(schema), "  ")
    examples = textwrap.indent(textwrap.dedent(examples).strip(), "  ")
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"examples:\n{examples}\n\nsettings (key, type, default):\n{options}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file with the settings of the run")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and exit")
    parser.add_argument(
        "overrides", nargs="*", action="extend", metavar="key=value", help="settings that override the file's"
    )
    return parser


def parse_command(
    parser: argparse.ArgumentParser, schema: type[T], arguments: Sequence[str] | None = None
) -> tuple[argparse.Namespace, T]:
    """Parse ``arguments`` (default: sys.argv) into flags and a config; ``--dry-run`` prints it and exits."""
    # Intermixed: `key=value` may stand before, between and after flags.
    flags = parser.parse_intermixed_args(arguments)
    config = load_config(schema, flags.config, flags.overrides)
    if flags.dry_run:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return flags, config
