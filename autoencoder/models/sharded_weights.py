"""Weights in several safetensors files beside an index, as Hugging Face's libraries write them."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ldgan.engine.cli import UserError

_FILE_NAME = re.compile(r"[\w-][\w.-]*\.safetensors")  # no path: a folder's weights lie in the folder


def files_of_index(index: Path) -> list[Path]:
    """The files of weights that ``index`` lists, each once, in the order of their names.

    Raises:
        UserError: the index is damaged, a name in it is no plain one of a safetensors file, or a file is missing.
    """
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"{index}: damaged, or no index of weights ({error!r:.200}); get the file again") from error
    for name in sorted(names, key=str):
        plain = isinstance(name, str) and _FILE_NAME.fullmatch(name) is not None
        if not plain or not (index.parent / name).is_file():
            raise UserError(f"{index}: there is no file of weights {name!r:.200} beside it; get the folder again")
    return [index.parent / name for name in sorted(names)]
