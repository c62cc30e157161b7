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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from autoencoder.inference.trained_autoencoder import load_autoencoder
from autoencoder.models.autoencoder import AutoencoderKL
from ldgan.engine.checkpoint import FORMAT, check_checkpoint, load_state, load_thing, read_description, save_checkpoint
from ldgan.engine.cli import UserError
from ldgan.engine.config import load_config, option, to_dict
from ldgan.engine.rebuilding import load_network
from ldgan.engine.run import RunFolder
from ldgan.engine.session import RunConfig, Session
from ldgan.engine.weights import load_weights
from ldgan.inference.trained_model import build_unet, load_model
from ldgan.models.classifier import ClassifierConfig, build_classifier
from ldgan.models.unet import UNetConfig

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
    with pytest.raises(UserError, match=match) as caught, limited_memory():
        yield
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert "\n" not in str(caught.value)
    assert not marker.exists()
    assert growth * 1024 < MAX_GROWTH


@contextmanager
def limited_memory() -> Iterator[None]:
    """Let a test that asks for terabytes fail before the machine does."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 8 * MAX_GROWTH, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


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
    with refused(marker, "checkpoint.json: damaged: step, seconds, .* are not those of a run"):
        session()


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir"])
def test_the_config_of_a_run_is_data(tmp_path: Path, marker: Path, tag: str) -> None:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.config_path.write_text(f"seed: {tag} ['{marker}']\n")
    with refused(marker, "config.yaml"):
        RunFolder.create_or_resume(run.path, "seed: 1\n")


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
HOSTILE_YAML = {
    "a tag that runs code": "seed: !!python/object/apply:os.mkdir [{marker}]",
    "a billion laughs": LAUGHS,
    "merges": LAUGHS.replace("[x, x]", "{x: 1}").replace(": &", ": &").replace("[*", "{<<: [*").replace("]\n", "]}\n"),
    "an alias of itself": "seed: &a [*a]",
    "brackets that would end the process": "seed: " + "[" * 100_000,
    "dashes that would end the process": "- " * 100_000,
    "a number of very many digits": "seed: " + "9" * 5000,
    "a megabyte": "#" * (1 << 20) + "\nseed: 1",
    "the environment": "dir: ${{oc.env:HOME}}",
    "the environment, decoded": "seed: ${{oc.decode:${{oc.env:HOME}}}}",
    "a resolver": "dir: ${{oc.create:{{a:1}}}}",
    "another key": "dir: ${{precision}}",
    "an interpolation in a list": "dir: [a, '${{oc.env:HOME}}']",
    "a list of lists": "betas: [[1]]",
    "a list without end": "betas: [" + "1," * 5000 + "1]",
}


@dataclass
class Settings:
    dir: str = option("", "")
    precision: str = option("", "")
    seed: int = option(0, "")
    betas: list[float] = option([], "")


@pytest.mark.parametrize("name", HOSTILE_YAML)
def test_a_hostile_config(tmp_path: Path, marker: Path, name: str) -> None:
    text = HOSTILE_YAML[name]
    (tmp_path / "config.yaml").write_text(text.replace("{marker}", str(marker)).replace("{{", "{").replace("}}", "}"))
    with refused(marker, "config.yaml: "):
        load_config(Settings, tmp_path / "config.yaml", [])


def test_values_from_the_command_line_are_data_too(marker: Path) -> None:
    for value in (f"!!python/object/apply:os.mkdir ['{marker}']", "[" * 100_000, "${oc.env:HOME}", "${seed}"):
        with refused(marker, "command line: "):
            load_config(Settings, None, [f"dir={value}"])


def test_messages_are_one_line_that_steers_no_terminal() -> None:
    assert str(UserError("a\nb\x1b[31m\u202ec\ud800 größer")) == "a b\\x1b[31m\\u202ec\\ud800 größer"


# --- Descriptions of networks -------------------------------------------------------------------------------

UNET = UNetConfig(base_channels=8, channel_multipliers=[1], num_res_blocks=1)
CLASSIFIER = ClassifierConfig(base_channels=8, channel_multipliers=[1], num_res_blocks=1)
PROCESS = {"num_timesteps": 2, "schedule": "vp", "beta_max": 20.0}
DATA = {"data_shape": [3, 8, 8], "resolution": 8, "class_names": ["a", "b"], "autoencoder": None}


def save_gan(folder: Path, changes: dict[str, Any], config: dict[str, Any], network: dict[str, Any]) -> None:
    """A model of two classes of 8 px images, whose description says something else than what is there."""
    settings = {"generator": to_dict(UNET) | network, "latent": False, **PROCESS, **config}
    unet = build_unet(UNET, (3, 8, 8), 2)
    save_checkpoint(folder, {"generator_ema": unet}, {"kind": "diffusion GAN", "config": settings, **DATA, **changes})


HOSTILE_NUMBERS: dict[str, dict[str, Any]] = {
    "width": {"base_channels": 10**9},
    "width of more digits than C knows": {"base_channels": 10**30},
    "no width": {"base_channels": 0},
    "negative width": {"base_channels": -8},
    "depth": {"num_res_blocks": 10**9},
    "levels": {"channel_multipliers": [1] * 900},
    "levels without end": {"channel_multipliers": [1] * 100_000},
    "no levels": {"channel_multipliers": []},
    "mapping": {"num_mapping_layers": 10**9},
    "z": {"z_dim": 10**12},
    "a word for a number": {"base_channels": "many"},
    "a list for a number": {"base_channels": [8]},
    "another choice": {"resblock": "os.system"},
    "an interpolation": {"resblock": "${oc.env:HOME}"},
    "an unknown number": {"__class__": "os.system"},
}


@pytest.mark.parametrize("name", HOSTILE_NUMBERS)
def test_hostile_numbers_of_a_network(tmp_path: Path, marker: Path, name: str) -> None:
    save_gan(tmp_path / "saved", {}, {}, HOSTILE_NUMBERS[name])
    with refused(marker, "/saved"):
        load_model(tmp_path / "saved")


@pytest.mark.parametrize(
    "config",
    [
        {"num_timesteps": 10**12},
        {"num_timesteps": 0},
        {"num_timesteps": "x"},
        {"num_timesteps": None},
        {"beta_max": float("nan")},
        {"beta_max": -1e308},
        {"schedule": "os.system"},
        {"variance": []},
        {"predicts": 3},
        {"objective": {}},
        {"latent": "perhaps"},
        {"latent": True},  # there is no autoencoder
        {"generator": 3},
        {"generator": None},
    ],
)
def test_a_hostile_process(tmp_path: Path, marker: Path, config: dict[str, Any]) -> None:
    save_gan(tmp_path / "saved", {}, config, {})
    with refused(marker):
        load_model(tmp_path / "saved")


@pytest.mark.parametrize(
    "changes",
    [
        {"data_shape": [3, 10**9, 10**9]},
        {"data_shape": [10**12, 8, 8]},
        {"data_shape": [3, 8]},
        {"data_shape": [3, 8, 9]},
        {"data_shape": "388"},
        {"data_shape": [3.0, 8, 8]},
        {"resolution": 0},
        {"resolution": True},
        {"class_names": 10**9},
        {"class_names": [1, 2]},
        {"text": 7},
        {"text": {"encoder": "e", "name": "n", "dim": 10**9, "max_tokens": 4}},
        {"text": {"encoder": "e", "name": "n", "dim": 4, "max_tokens": 0}},
        {"class_names": ["x"] * 100_000},
        {"config": []},
        {"kind": ["diffusion GAN"]},
        {"kind": None},
    ],
)
def test_a_hostile_description_of_data(tmp_path: Path, marker: Path, changes: dict[str, Any]) -> None:
    save_gan(tmp_path / "saved", changes, {}, {})
    with refused(marker, "/saved"):
        load_model(tmp_path / "saved")


@pytest.mark.parametrize("numbers", [{"base_channels": 10**9}, {"num_res_blocks": 10**9}, {"num_groups": 3}])
def test_a_hostile_autoencoder(
    tmp_path: Path, marker: Path, tiny_autoencoder: Callable[..., AutoencoderKL], numbers: dict[str, Any]
) -> None:
    autoencoder = tiny_autoencoder()
    config = {"network": to_dict(autoencoder.config) | numbers}
    description = {"kind": "autoencoder", "config": config, "latent_statistics": {}}
    save_checkpoint(tmp_path / "saved", {"autoencoder_ema": autoencoder}, description)
    with refused(marker):
        load_autoencoder(tmp_path / "saved")
    # The same in the format of diffusers.
    tiny_autoencoder(num_groups=2).save_diffusers(tmp_path / "diffusers")
    path = tmp_path / "diffusers" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layers_per_block": 10**9}))
    with refused(marker, "diffusers/config.json"):
        load_autoencoder(tmp_path / "diffusers")


@pytest.mark.parametrize(
    ("changes", "numbers"), [({}, {"base_channels": 10**9}), ({"class_names": 7}, {}), ({"config": {}}, {})]
)
def test_a_hostile_classifier(tmp_path: Path, marker: Path, changes: dict[str, Any], numbers: dict[str, Any]) -> None:
    save_gan(tmp_path / "model", {}, {}, {})
    classifier = build_classifier(CLASSIFIER, (3, 8, 8), ["a", "b"])
    config = {"network": to_dict(CLASSIFIER) | numbers, **PROCESS}
    description = {"kind": "classifier of noisy samples", "config": config, **DATA, **changes}
    save_checkpoint(tmp_path / "saved", {"classifier_ema": classifier}, description)
    with refused(marker):
        load_model(tmp_path / "model", classifier=tmp_path / "saved")


def test_a_network_that_is_checked_first_is_the_one_that_was_saved(tmp_path: Path) -> None:
    """Buffers that are not saved are not left on the meta device, and the check draws no random numbers."""
    config = replace(UNET, fir=True, time_embedding="fourier", channel_multipliers=[1, 1], attention_resolutions=[8])
    unet = build_unet(config, (3, 8, 8), 2).eval()
    save_checkpoint(tmp_path / "saved", {"unet": unet}, {})
    torch.manual_seed(0)
    build_unet(config, (3, 8, 8), 2)
    expected = torch.get_rng_state()
    torch.manual_seed(0)
    loaded = load_network(tmp_path / "saved", "unet", lambda: build_unet(config, (3, 8, 8), 2)).eval()
    assert torch.equal(torch.get_rng_state(), expected)
    x_t, z, t = torch.randn(2, 3, 8, 8), torch.randn(2, 64), torch.tensor([1, 2])
    assert torch.equal(loaded(x_t, z, t, torch.tensor([0, 2])), unet(x_t, z, t, torch.tensor([0, 2])))


def test_what_we_write_ourselves_is_taken(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    save_checkpoint(tmp_path / "saved", {"model": model}, {"step": 1})
    check_checkpoint(tmp_path / "saved")
    assert read_description(tmp_path / "saved")["step"] == 1
    taken = nn.Linear(2, 2)
    load_thing(tmp_path / "saved", "model", taken)
    torch.testing.assert_close(taken.state_dict(), model.state_dict(), rtol=0, atol=0)
