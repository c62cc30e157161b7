"""Checkpoints: exact resumption, all or nothing on disk, and every kind of damage is noticed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from ldgan.engine.checkpoint import (
    DamagedCheckpointError,
    check_checkpoint,
    load_state,
    load_thing,
    read_description,
    save_checkpoint,
)
from ldgan.engine.cli import UserError
from ldgan.engine.ema import EMA


class Trainer:
    """A toy run with everything that must survive: weights, optimizer moments, learning rate, average."""

    def __init__(self, width: int = 5, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 1))
        groups = [
            {"params": [*self.model[0].parameters()]},
            {"params": [*self.model[1:].parameters()], "lr": 0.1},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.5, 0.9))
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, gamma=0.97)
        self.ema = EMA(self.model, halflife_images=50, rampup_ratio=None)

    @property
    def things(self) -> dict:
        return {name: getattr(self, name) for name in ("model", "optimizer", "scheduler", "ema")}

    def train(self, first_step: int, last_step: int) -> None:
        for step in range(first_step, last_step):
            inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
            self.optimizer.zero_grad()
            self.model(inputs).square().mean().backward()
            self.optimizer.step()
            self.scheduler.step()
            self.ema.update(self.model, num_images_per_step=8, num_images_seen=8 * (step + 1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint after three steps of the toy run."""
    trainer = Trainer()
    trainer.train(0, 3)
    save_checkpoint(tmp_path / "saved", trainer.things, {"step": 3, "config": {"width": 5}})
    return tmp_path / "saved"


def test_resuming_equals_not_stopping_bit_for_bit(folder: Path) -> None:
    uninterrupted = Trainer()
    uninterrupted.train(0, 8)
    resumed = Trainer(seed=1)
    for name, thing in resumed.things.items():
        load_thing(folder, name, thing)
    resumed.train(3, 8)
    for ours, theirs in ((resumed.model, uninterrupted.model), (resumed.ema.model, uninterrupted.ema.model)):
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    ours, theirs = resumed.optimizer.state_dict(), uninterrupted.optimizer.state_dict()
    torch.testing.assert_close(ours["state"], theirs["state"], rtol=0, atol=0)
    assert [group["lr"] for group in ours["param_groups"]] == [group["lr"] for group in theirs["param_groups"]]


def test_description_comes_back(folder: Path) -> None:
    description = read_description(folder)
    assert (description["format"], description["step"]) == ("ldgan-checkpoint/1", 3)
    assert description["config"] == {"width": 5}
    assert description["libraries"]["torch"] == torch.__version__.partition("+")[0]
    for name, record in description["things"].items():
        assert record["num_bytes"] == (folder / f"{name}.safetensors").stat().st_size


def test_tensors_have_readable_names(folder: Path) -> None:
    assert set(load_state(folder, "model")) == set(Trainer().model.state_dict())
    assert {"state.0.step", "state.5.exp_avg_sq"} <= set(load_state(folder, "optimizer"))
    rest = read_description(folder)["things"]["optimizer"]["rest"]
    assert list(rest) == ["param_groups"]
    assert rest["param_groups"][1]["betas"] == [0.5, 0.9]


def test_tied_transposed_and_expanded_tensors(tmp_path: Path) -> None:
    weight = torch.randn(3, 4)

    class Things:
        def state_dict(self) -> dict:
            return {
                "a": weight,
                "tied": weight,
                "transposed": weight.t(),
                "expanded": weight[:1].expand(5, 4),
            }

    save_checkpoint(tmp_path / "saved", {"odd": Things()}, {})
    torch.testing.assert_close(load_state(tmp_path / "saved", "odd"), Things().state_dict(), rtol=0, atol=0)


def test_nested_state_with_tensors_in_lists(tmp_path: Path) -> None:
    class Loop:
        def __init__(self, state: dict) -> None:
            self.state = state

        def state_dict(self) -> dict:
            return self.state

        def load_state_dict(self, state: dict) -> None:
            self.state = state

    streams = [torch.arange(3), torch.ones(2, dtype=torch.bool)]
    rest = {"seen": {7: 0.1}, "done": None, "empty": {}, "none": [], "zero": 0}
    save_checkpoint(tmp_path / "saved", {"loop": Loop({"streams": streams} | rest)}, {})
    loop = Loop({})
    load_thing(tmp_path / "saved", "loop", loop)
    torch.testing.assert_close(loop.state.pop("streams"), streams, rtol=0, atol=0)
    assert loop.state == rest


def test_an_existing_checkpoint_is_never_overwritten(folder: Path) -> None:
    before = (folder / "checkpoint.json").read_bytes()
    with pytest.raises(UserError, match="never overwritten"):
        save_checkpoint(folder, {}, {})
    assert (folder / "checkpoint.json").read_bytes() == before


def test_an_interrupted_save_leaves_no_checkpoint(tmp_path: Path) -> None:
    class Broken:
        def state_dict(self) -> dict:
            raise KeyboardInterrupt

    things = {"model": nn.Linear(2, 2), "broken": Broken()}
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path / "saved", things, {})
    assert not (tmp_path / "saved").exists()
    save_checkpoint(tmp_path / "saved", {"model": things["model"]}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "checkpoint.json",
        "model.safetensors",
    ]


def test_reserved_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="things"):
        save_checkpoint(tmp_path / "saved", {}, {"things": 1})


@pytest.mark.parametrize("position", [0, 100, -1])
def test_a_flipped_byte_is_detected(folder: Path, position: int) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"model.safetensors: damaged: SHA-256"):
        load_thing(folder, "model", Trainer().model)


def test_every_flipped_bit_of_the_description_is_detected_or_changes_nothing(folder: Path) -> None:
    path = folder / "checkpoint.json"
    data, description = path.read_bytes(), read_description(folder)
    unnoticed = 0
    for position in range(0, len(data), 7):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1 << position % 8]) + data[position + 1 :])
        try:
            found = read_description(folder)
        except DamagedCheckpointError:
            continue
        # White space that became other white space, or the name of the hash, whose value is then one more field.
        unnoticed += description != {key: value for key, value in found.items() if key in description}
    assert unnoticed == 0


@pytest.mark.parametrize("name", ["model", "optimizer", "scheduler", "ema"])
def test_a_check_reads_every_file(folder: Path, name: str) -> None:
    assert check_checkpoint(folder) == read_description(folder)
    path = folder / f"{name}.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)
    with pytest.raises(DamagedCheckpointError, match=rf"{name}.safetensors: damaged: SHA-256"):
        check_checkpoint(folder)
    path.unlink()
    with pytest.raises(DamagedCheckpointError, match=rf"{name}.safetensors: missing"):
        check_checkpoint(folder)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("model.safetensors", cut, "model.safetensors: damaged: .* bytes, not"),
        ("model.safetensors", Path.unlink, "model.safetensors: missing from the checkpoint"),
        ("checkpoint.json", cut, "checkpoint.json: damaged"),
        ("checkpoint.json", Path.unlink, "saved: not a checkpoint: it has no checkpoint.json"),
        (
            "checkpoint.json",
            lambda path: path.write_text('{"format": "x/2"}'),
            "checkpoint.json: format 'x/2'",
        ),
        ("checkpoint.json", lambda path: path.write_text("[]"), "checkpoint.json: format None"),
    ],
)
def test_damage_is_named(folder: Path, file: str, damage: Callable[[Path], object], message: str) -> None:
    damage(folder / file)
    with pytest.raises(UserError, match=message):
        load_thing(folder, "model", Trainer().model)


def test_what_does_not_fit_is_named(folder: Path) -> None:
    with pytest.raises(UserError, match=r"0.weight: shape \[5, 3\] in the file, \[6, 3\] in the model"):
        load_thing(folder, "model", Trainer(width=6).model)
    with pytest.raises(UserError, match=r"2 tensors missing \(first: \['bias'\]\) and 9 unknown"):
        load_thing(folder, "model", nn.Linear(3, 5))
    with pytest.raises(UserError, match="does not fit what is being loaded: loaded state dict has a different"):
        load_thing(folder, "optimizer", torch.optim.AdamW(nn.Linear(3, 5).parameters()))
    with pytest.raises(UserError, match="holds no 'teacher', only model, optimizer, scheduler, ema"):
        load_thing(folder, "teacher", nn.Linear(3, 5))


def test_description_is_readable_text(folder: Path) -> None:
    text = (folder / "checkpoint.json").read_text()
    assert json.dumps(json.loads(text), indent=2) == text
