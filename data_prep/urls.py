"""URLs as arguments of commands and as settings of runs."""

from __future__ import annotations

import os
from pathlib import Path

from data_prep.remote import is_url, public_url
from ldgan.engine.cli import UserError


def path_or_url(text: str) -> Path | str:
    """A folder as ``Path``, a URL as it is, for argparse; raises `UserError` as `is_url` does."""
    return text if is_url(text) else Path(text)


def public_name(path: str | os.PathLike[str]) -> str:
    """What to call a folder, or the URL of one, in messages: without password or token."""
    return public_url(path) if isinstance(path, str) else os.fspath(path)


def check_no_secrets(url: str, setting: str) -> None:
    """Raise a `UserError` where a URL, given as ``setting`` of a run, holds what should not be saved with the run.

    User and password, and the query, which is where signatures and tokens are. A path to a folder passes.
    """
    if is_url(url) and public_url(url) != url:
        raise UserError(
            f"{setting}={public_url(url)} was given with a password, user or query, which would be saved with the run;"
            " leave them out: http(s) takes them from ~/.netrc, s3:// and gs:// from their own files or environment"
        )
