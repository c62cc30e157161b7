"""Files that a stranger made: one line that says what is wrong, no code of theirs run, no memory that they ask for.

Their sizes and hashes are right, since a stranger can compute these as well.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import resource
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from ldgan.engine.checkpoint import FORMAT, check_checkpoint, load_state, load_thing, read_description, save_checkpoint
from ldgan.engine.cli import UserError
from ldgan.engine.config import option
from ldgan.engine.run import RunFolder
from ldgan.engine.session import RunConfig, Session
from ldgan.engine.weights import load_weights

MAX_GROWTH = 256 * 2**20  # bytes; what the files below ask for starts at 1 TiB


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "executed"


@contextmanager
def refused(marker: Path, match: str | None = None) -> Iterator[None]:
    """The block must raise a UserError of one line, run nothing, and take little memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=match) as caught:
        yield
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert "\n" not in str(caught.value)
    assert not marker.exists()
    assert growth * 1024 < MAX_GROWTH


def torch_file(contents: object, path: Path, **options: bool) -> bytes:
    torch.save(contents, path, **options)
    return path.read_bytes()


def safetensors_file(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with this header, that says it is ``length`` bytes long."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(shape: list[int], end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"weight": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}


HOSTILE_TENSORS = {
    "nothing": b"",
    "a header of 8 EiB": safetensors_file({}, length=2**63),
    "a header of 1 TiB": safetensors_file({}, length=2**40),
    "a tensor of 4 TiB": safetensors_file(tensor([2**40], 2**42), bytes(64)),
    "a tensor of 4 TiB in 64 bytes": safetensors_file(tensor([2**40], 64), bytes(64)),
    "a size that overflows": safetensors_file(tensor([2**62, 2**62], 0)),
    "a negative size": safetensors_file(tensor([-1], 4), bytes(4)),
    "another data type": safetensors_file(tensor([1], 4, "object"), bytes(4)),
    "offsets backwards": safetensors_file({"weight": tensor([1], 4)["weight"] | {"data_offsets": [4, 0]}}, bytes(4)),
    "brackets without end": safetensors_file(b'{"weight":' + b"[" * 100_000),
    "no JSON": safetensors_file(b"\xff" * 32),
    "a list": safetensors_file([1, 2, 3]),
}


def write_checkpoint(folder: Path, data: bytes, rest: object = None) -> Path:
    """A checkpoint whose thing "model" is ``data``, as its description says."""
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(data)
    record = {"num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "rest": rest}
    (folder / "checkpoint.json").write_text(json.dumps({"format": FORMAT, "things": {"model": record}}))
    return folder


def test_the_payload_works(marker: Path) -> None:
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()


@pytest.mark.parametrize("name", HOSTILE_TENSORS)
def test_tensors_of_a_hostile_checkpoint(tmp_path: Path, marker: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path / "saved", HOSTILE_TENSORS[name])
    with refused(marker, "model.safetensors: "):
        load_thing(folder, "model", nn.Linear(2, 2))
    with refused(marker, "model.safetensors: "):
        load_state(folder, "model")
    (tmp_path / "weights.safetensors").write_bytes(HOSTILE_TENSORS[name])
    with refused(marker, "weights.safetensors: damaged, or not only weights"):
        load_weights(tmp_path / "weights.safetensors")


PICKLES: dict[str, Callable[[Payload, Path], bytes]] = {
    "a pickle": lambda payload, path: pickle.dumps(payload),
    "a pickle in a dict of tensors": lambda payload, path: torch_file({"a": torch.ones(1), "b": payload}, path),
    "the former format": lambda payload, path: torch_file(payload, path, _use_new_zipfile_serialization=False),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", PICKLES)
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_weights_with_code_in_them(tmp_path: Path, marker: Path, name: str, suffix: str) -> None:
    path = (tmp_path / "weights").with_suffix(suffix)
    path.write_bytes(PICKLES[name](Payload(marker), tmp_path / "made"))
    with refused(marker, "damaged, or not only weights"):
        load_weights(path)


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_by_the_name_of_a_thing(tmp_path: Path, marker: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path / "saved", PICKLES[name](Payload(marker), tmp_path / "made"))
    with refused(marker, "model.safetensors: not a safetensors file"):
        load_thing(folder, "model", nn.Linear(2, 2))


def described(things: object) -> str:
    return json.dumps({"format": FORMAT, "things": things})


RECORD = {"num_bytes": 4, "sha256": hashlib.sha256(b"abcd").hexdigest(), "rest": None}
HOSTILE_DESCRIPTIONS = {
    "no record": described({"model": None}),
    "a record that is a list": described({"model": [1, 2]}),
    "a size that is text": described({"model": RECORD | {"num_bytes": "4"}}),
    "a size that is negative": described({"model": RECORD | {"num_bytes": -1}}),
    "a hash that is a number": described({"model": RECORD | {"sha256": 5}}),
    "things in a list": described(["model"]),
    "a thing outside the folder": described({"model": RECORD, "../secret": RECORD}),
    "a thing at the root": described({"model": RECORD, "/etc/passwd": RECORD}),
    "a thing with a zero in its name": described({"model": RECORD, "a\0b": RECORD}),
    "a thing with half a character for a name": described({"model": RECORD, "\ud800": RECORD}),
    "brackets without end": described({}).replace("{}", '{"a":' * 200_000),
    "brackets that are hashed": described({}).replace("{}", '{"a":' * 900 + "1" + "}" * 900 + ', "sha256": "0"'),
    "a number of a million digits": described({"model": RECORD | {"num_bytes": 4}}).replace("4", "4" * 1_000_000),
    "another format": json.dumps({"format": {"a": 1}, "things": {}}),
    "a hash that is a list": described({}).replace('"things"', '"sha256": [], "things"'),
    "text": '"checkpoint"',
    "nothing": "",
}


@pytest.mark.parametrize("name", HOSTILE_DESCRIPTIONS)
def test_a_hostile_description(tmp_path: Path, marker: Path, name: str) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    for path in (folder / "model.safetensors", tmp_path / "secret.safetensors"):
        path.write_bytes(b"abcd")
    (folder / "checkpoint.json").write_text(HOSTILE_DESCRIPTIONS[name])
    with refused(marker, "checkpoint.json|model.safetensors"):
        check_checkpoint(folder)


@pytest.mark.parametrize("file", ["checkpoint.json", "model.safetensors"])
def test_files_larger_than_any_memory_are_not_read(tmp_path: Path, marker: Path, file: str) -> None:
    save_checkpoint(tmp_path / "saved", {"model": nn.Linear(2, 2)}, {})
    os.truncate(tmp_path / "saved" / file, 2**40)  # takes no room on the disk
    with refused(marker, rf"{file}: damaged.*1,?099,?511,?627,?776 bytes"):
        load_thing(tmp_path / "saved", "model", nn.Linear(2, 2))


@pytest.mark.parametrize(
    "rest",
    [
        5,
        "param_groups",
        [],
        [{}],
        {"param_groups": 5},
        {"param_groups": [5]},
        {"param_groups": [{"params": 5}]},
        {"param_groups": [{"params": [0, 1]}], "state": 5},
        {"param_groups": [{"params": [0, 1]}], "state": {"0": 7}},
        {"param_groups": {"__class__": "x"}, "state": None},
    ],
)
def test_a_hostile_state_of_an_optimizer(tmp_path: Path, marker: Path, rest: object) -> None:
    data = safetensors_file({"state.0.step": tensor([1], 4)["weight"]}, bytes(4))
    folder = write_checkpoint(tmp_path / "saved", data, rest)
    optimizer = torch.optim.AdamW(nn.Linear(2, 2).parameters())
    with refused(marker, "model.safetensors: does not fit what is being loaded"):
        load_thing(folder, "model", optimizer)


def test_a_state_deeper_than_any_network(tmp_path: Path, marker: Path) -> None:
    rest: Any = {"a": 1}
    for _ in range(900):  # which JSON may hold
        rest = {"a": rest}
    data = safetensors_file({"a." * 3000 + "b": tensor([1], 4)["weight"]}, bytes(4))
    with refused(marker):
        load_thing(write_checkpoint(tmp_path / "saved", data, rest), "model", torch.optim.AdamW([torch.ones(1)]))


@dataclass
class Config:
    run: RunConfig = option(RunConfig(), "")


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "x"},
        {"step": None},
        {"step": 1e999},
        {"seconds": []},
        {"best": [1, 2, 3]},
        {"best": {"step": "../..", "metric": "FID", "value": 1.0}},
        {"best": {"step": 2}},
    ],
)
def test_a_run_goes_on_from_no_hostile_progress(tmp_path: Path, marker: Path, changes: dict[str, object]) -> None:
    model = nn.Linear(2, 2)
    config = Config(RunConfig(dir=str(tmp_path / "run"), num_steps=4, batch_size=1))

    def session() -> Session:
        return Session(Accelerator(cpu=True), config, {"model": model}, {})

    session()
    progress = {"step": 2, "seconds": 1.0}
    save_checkpoint(RunFolder(tmp_path / "run").checkpoint_path(2), {"model": model}, progress | changes)
    with refused(marker, "checkpoint.json: damaged: step, seconds or best are not those of a run"):
        session()


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir"])
def test_the_config_of_a_run_is_data(tmp_path: Path, marker: Path, tag: str) -> None:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.config_path.write_text(f"seed: {tag} ['{marker}']\n")
    with refused(marker, "config.yaml"):
        RunFolder.create_or_resume(run.path, "seed: 1\n")


def test_what_we_write_ourselves_is_taken(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    save_checkpoint(tmp_path / "saved", {"model": model}, {"step": 1})
    check_checkpoint(tmp_path / "saved")
    assert read_description(tmp_path / "saved")["step"] == 1
    taken = nn.Linear(2, 2)
    load_thing(tmp_path / "saved", "model", taken)
    torch.testing.assert_close(taken.state_dict(), model.state_dict(), rtol=0, atol=0)
