"""What the pages say exists: links and anchors, commands, and the files that they name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
PRESENT = [page for page in PAGES if page.name != "CHANGELOG.md"]  # a changelog names files that were

LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
SOURCE = re.compile(r"\b(?:ldgan|autoencoder|data_prep|tests|configs)/[\w/]+\.(?:py|yaml)\b")
COMMAND = re.compile(r"\b(?:python|accelerate launch(?: --quiet)?) ([\w./]+\.py)\b")
MODULE = re.compile(r"`((?:ldgan|autoencoder|data_prep)(?:\.\w+)+)`")


def by_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them: lower case, without punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_links_lead_somewhere(page: Path) -> None:
    lost = []
    for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert lost == []


@pytest.mark.parametrize("page", PRESENT, ids=by_name)
def test_commands_and_files_that_a_page_names_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = {*SOURCE.findall(text), *COMMAND.findall(text)}
    assert sorted(name for name in named if not (ROOT / name).is_file()) == []


@pytest.mark.parametrize("page", PRESENT, ids=by_name)
def test_modules_that_a_page_names_are_there(page: Path) -> None:
    """``ldgan.models.unet.UNet``: the longest part that is a path is a package or a module, the rest is in its text."""
    for name in MODULE.findall(page.read_text(encoding="utf-8")):
        parts = name.split(".")
        depth = next(n for n in range(len(parts), 0, -1) if source_of(parts[:n]) is not None)
        source = source_of(parts[:depth])
        assert source is not None
        assert depth == len(parts) or parts[depth] in source.read_text(encoding="utf-8"), name


def source_of(parts: list[str]) -> Path | None:
    """The file of a module or package, or None where there is none."""
    path = ROOT.joinpath(*parts)
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs/README.md"
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {index.name}
    assert pages - set(LINK.findall(index.read_text(encoding="utf-8"))) == set()


def test_the_readme_is_one_page() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    assert [line for line in lines if len(line) > 120 and not line.startswith("|")] == []
