"""The short form of the fuzz run, and that it would notice what it looks for."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from ldgan.engine.cli import UserError

NUM_CASES = {"tars": 60, "jpeg": 30, "npy": 60, "captions": 30, "manifests": 60, "configs": 12, "checkpoints": 12}


@pytest.fixture(scope="module")
def fuzz() -> Iterator[ModuleType]:
    """The script as a module; it sets the environment of a process that is all its own."""
    environment = dict(os.environ)
    sys.path.insert(0, str(Path(__file__).parent))
    yield import_module("fuzz")
    sys.path.pop(0)
    del sys.modules["fuzz"], sys.modules["hostile"]
    os.environ.clear()
    os.environ.update(environment)


@pytest.mark.parametrize("name", NUM_CASES)
def test_hostile_files_are_read_or_refused_and_nothing_else_happens(fuzz: ModuleType, name: str) -> None:
    outcomes = fuzz.fuzz(name, seed=1, num_cases=NUM_CASES[name])
    assert [outcome.number for outcome in outcomes] == list(range(NUM_CASES[name]))
    assert [outcome for outcome in outcomes if outcome.is_finding] == []
    assert {outcome.kind for outcome in outcomes} == {"read", "refused"}


def refuse(message: str) -> None:
    raise UserError(message)


def refuse_for_lack_of_memory(_: Path) -> None:
    try:
        bytearray(1 << 45)
    except MemoryError as error:
        raise UserError("an array of a wrong size") from error


def write_outside(folder: Path) -> None:
    (folder.parent.parent / "outside").write_text("x")


def handle_everything(folder: Path) -> None:
    try:
        os.system("true")
    except Exception:
        refuse("all is well")


BAD: dict[str, tuple[str, Callable[[Path], object]]] = {
    "another exception": ("exception", lambda folder: 1 / 0),
    "an empty message": ("message", lambda folder: refuse("")),
    "a lack of memory that a message hides": ("memory", refuse_for_lack_of_memory),
    "a file outside": ("executed", write_outside),
    "a folder outside": ("executed", lambda folder: os.mkdir("/tmp/outside")),
    "a command whose failure is handled": ("executed", handle_everything),
    "a death": ("crash", lambda folder: os._exit(3)),
    "a loop without end": ("slow", lambda folder: [None for _ in iter(int, 1)]),
}


@pytest.mark.parametrize("name", BAD)
def test_what_must_not_happen_is_found(fuzz: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    kind, act = BAD[name]

    class Bad:
        def prepare(self, home: Path) -> None:
            pass

        def run(self, rng: random.Random, folder: Path) -> None:
            act(folder)

    monkeypatch.setitem(fuzz.TARGETS, "bad", Bad)
    monkeypatch.setattr(fuzz, "CASE_SECONDS", 0.2)
    (outcome,) = fuzz.fuzz("bad", seed=0, num_cases=1)
    assert outcome.kind == kind
    assert outcome.is_finding


def test_a_case_depends_on_the_seed_and_its_number_alone(fuzz: ModuleType) -> None:
    whole = fuzz.fuzz("tars", seed=3, num_cases=8)
    assert [outcome.kind for outcome in whole] == [outcome.kind for outcome in fuzz.fuzz("tars", seed=3, num_cases=8)]
    assert {outcome.detail for outcome in whole} != {o.detail for o in fuzz.fuzz("tars", seed=4, num_cases=8)}
