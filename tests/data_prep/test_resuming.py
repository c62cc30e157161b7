from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import signal
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import preparation, prepared, resuming
from data_prep.preparation import Preparation, write_shards
from data_prep.processes import ALONE, Processes
from data_prep.resuming import SETTINGS_NAME, Record
from data_prep.shards import Manifest, ShardFile
from data_prep.sources import ImageFolder, RawSample, Source
from ldgan.engine.cli import UserError

NUM_IMAGES = 60


def write_set(
    source: Source, out: Path, *, samples_per_shard: int = 5, processes: Processes = ALONE, **changes: int
) -> Manifest | None:
    preparation = Preparation(**({"resolution": 8, "deduplicate": True, "min_side": 6} | changes))
    return write_shards(source, out, preparation, samples_per_shard=samples_per_shard, processes=processes)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty images in two classes: some too small, some there twice, some no image; with captions."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        folder = root / "ab"[number % 2]
        folder.mkdir(exist_ok=True)
        seed = number // 2 if number % 7 == 0 else number
        side = 5 if number % 11 == 0 else 8
        pixels = np.random.default_rng(seed).integers(256, size=(side, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        if number % 13 == 0:
            (folder / f"{number}.png").write_bytes(rng.bytes(50))
        (folder / f"{number}.txt").write_text(f"number {number}")
    return root


@pytest.fixture(scope="module")
def undisturbed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "set"
    manifest = write_set(ImageFolder(photos), out)
    assert all(count > 1 for count in manifest.details["rejected"].values())
    return out


class Stopping(ImageFolder):
    """A folder whose reading is interrupted before sample ``stop``."""

    def __init__(self, root: Path, stop: int) -> None:
        super().__init__(root)
        self._stop = stop

    def __getitem__(self, position: int) -> RawSample:
        if position == self._stop:
            raise KeyboardInterrupt
        return super().__getitem__(position)


def records(folder: Path) -> list[Path]:
    """The records of the finished shards, in order."""
    return sorted(folder.glob(".shard-*.json"))


def contents(folder: Path) -> dict[str, object]:
    """Every file of a set; of the manifest all but the time it took."""
    files: dict[str, object] = {path.name: path.read_bytes() for path in folder.iterdir()}
    files["manifest.json"] = json.loads(files["manifest.json"]) | {"seconds": None}
    return files


@pytest.mark.parametrize("stops", [(0,), (16,), (32, 32), (16, 32, 48), (59,)])
def test_a_set_begun_several_times_has_the_bytes_of_one_written_at_once(photos, undisturbed, tmp_path, stops):
    out = tmp_path / "set"
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            write_set(Stopping(photos, stop), out)
        assert not out.exists()
    write_set(ImageFolder(photos), out)
    assert contents(out) == contents(undisturbed)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_what_is_finished_is_not_read_again(photos, tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        write_set(Stopping(photos, 32), tmp_path / "set")
    num_read = Record.of_json(records(tmp_path / ".set.partial")[-1].read_text()).notes["num_read"]
    prepared: list[str] = []
    prepare = preparation._prepare_one
    monkeypatch.setattr(
        preparation, "_prepare_one", lambda sample, *how: prepared.append(sample.name) or prepare(sample, *how)
    )
    write_set(ImageFolder(photos), tmp_path / "set")
    assert prepared == [sample.name for sample in ImageFolder(photos)][num_read:]
    assert num_read > 20


def test_a_run_killed_at_any_moment_is_gone_on_with(photos, undisturbed, tmp_path):
    generator = random.Random(0)
    context = multiprocessing.get_context("fork")
    num_killed = 0
    for _ in range(12):
        process = context.Process(target=_write_slowly, args=(photos, tmp_path / "set"))
        process.start()
        time.sleep(generator.uniform(0.01, 0.15))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        num_killed += process.exitcode == -signal.SIGKILL
        if (tmp_path / "set").exists():
            break
    assert num_killed >= 2
    if not (tmp_path / "set").exists():
        write_set(ImageFolder(photos), tmp_path / "set")
    assert contents(tmp_path / "set") == contents(undisturbed)


def _write_slowly(photos: Path, out: Path) -> None:
    prepare = preparation._prepare_one
    preparation._prepare_one = lambda sample, *how: time.sleep(0.01) or prepare(sample, *how)
    preparation.CHUNK_SAMPLES = 1
    write_set(ImageFolder(photos), out)


@pytest.mark.parametrize("content", ["", "{", "not JSON", "[]", "{}", '{"info": {}, "seconds": 1}', "1", "whole"])
@pytest.mark.parametrize("number", [0, 2, -1])
def test_a_shard_whose_record_or_end_is_lost_is_written_again(photos, undisturbed, tmp_path, content, number):
    with pytest.raises(KeyboardInterrupt):
        write_set(Stopping(photos, 48), tmp_path / "set")
    record = records(tmp_path / ".set.partial")[number]
    if content == "whole":
        shard = tmp_path / ".set.partial" / f"{record.stem[1:]}.tar"
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        record.write_text(content)
    write_set(ImageFolder(photos), tmp_path / "set")
    assert contents(tmp_path / "set") == contents(undisturbed)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("change", [{"resolution": 4}, {"samples_per_shard": 6}, {"quality": 3}, {"seed": 1}])
def test_other_settings_are_not_mixed_in(photos, tmp_path, change):
    with pytest.raises(KeyboardInterrupt):
        write_set(Stopping(photos, 32), tmp_path / "set")
    ((key, value),) = change.items()
    with pytest.raises(UserError, match=rf"\.set\.partial is an unfinished set with another {key} \(.*, now {value}\)"):
        write_set(ImageFolder(photos), tmp_path / "set", **change)
    write_set(ImageFolder(photos), tmp_path / "set")


def test_a_source_that_changed_meanwhile_is_noticed(photos, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_set(Stopping(photos, 32), tmp_path / "set")
    with pytest.raises(UserError, match=r"the source has changed since .*set\.partial was begun"):
        write_set(ImageFolder(photos, seed=1), tmp_path / "set")
    with pytest.raises(UserError, match="another num_raw_images"):
        write_set(ImageFolder(photos, num_images=50), tmp_path / "set")
    records(tmp_path / ".set.partial")[0].unlink()  # so that the order is not known from the last sample
    with pytest.raises(UserError, match=r"the source has changed since .*set\.partial was begun"):
        write_set(ImageFolder(photos, seed=1), tmp_path / "set")


@pytest.mark.parametrize("content", ["", "not JSON", "[]", '"text"'])
def test_damaged_settings_are_named(photos, tmp_path, content):
    with pytest.raises(KeyboardInterrupt):
        write_set(Stopping(photos, 32), tmp_path / "set")
    (tmp_path / ".set.partial" / SETTINGS_NAME).write_text(content)
    with pytest.raises(UserError, match=r"\.unfinished\.json: is damaged .* to begin anew"):
        write_set(ImageFolder(photos), tmp_path / "set")


def test_two_processes_do_not_write_one_set(photos, tmp_path):
    class Second(ImageFolder):
        def __getitem__(self, position: int) -> RawSample:
            with pytest.raises(UserError, match="another process is writing"):
                write_set(ImageFolder(photos), tmp_path / "set")
            return super().__getitem__(position)

    write_set(Second(photos), tmp_path / "set")
    assert Manifest.read(tmp_path / "set").num_samples > 30


# --- Several processes --------------------------------------------------------------------------------------


@pytest.fixture
def small_blocks(monkeypatch) -> None:
    monkeypatch.setattr(prepared, "BLOCK_SAMPLES", 7)  # neither divides shards nor is divided by them


def launch(photos: Path, out: Path, num_processes: int, **faults: object) -> list[int]:
    """Write a set by several processes; as a launcher does, end all when one has ended badly. The exit statuses."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(num_processes)
    processes = [
        context.Process(target=_take_part, args=(photos, out, Processes(index, num_processes, barrier.wait), faults))
        for index in range(num_processes)
    ]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        if any(process.exitcode for process in processes):
            for process in processes:
                process.kill()
        time.sleep(0.005)
    return [process.exitcode for process in processes]


def _take_part(photos: Path, out: Path, processes: Processes, faults: dict[str, object]) -> None:
    """Write a set; the process ``dies`` when it has called the function of that name ``after`` times."""
    calls = itertools.count()

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            if next(calls) == faults["after"]:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    if faults and processes.index == faults["process"]:
        owner, name = faults["dies"]
        setattr(owner, name, counted(getattr(owner, name)))
    write_set(ImageFolder(photos), out, processes=processes)


@pytest.mark.parametrize("num_processes", [2, 3])
@pytest.mark.usefixtures("small_blocks")
def test_several_processes_write_the_bytes_of_one(photos, undisturbed, tmp_path, num_processes):
    assert launch(photos, tmp_path / "set", num_processes) == [0] * num_processes
    assert contents(tmp_path / "set") == contents(undisturbed)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


# What a process may be at when it is killed: preparing blocks, packing shards, noting a finished one, the end.
MOMENTS = {
    "preparing": ((preparation, "_prepare_one"), 10),
    "between blocks": ((prepared.PreparedBlocks, "write"), 1),
    "packing": ((ShardFile, "write"), 8),
    "noting": ((resuming, "write_atomically"), 2),  # the shard has its name, and no record yet
    "completing": ((Manifest, "write"), 0),
}


@pytest.mark.parametrize(
    ("moment", "process", "next_number"),
    [
        *(("preparing", 0, 1), ("preparing", 1, 3), ("between blocks", 1, 2), ("packing", 0, 3), ("packing", 1, 1)),
        *(("noting", 0, 1), ("noting", 1, 3), ("completing", 0, 3)),
    ],
)
@pytest.mark.usefixtures("small_blocks")
def test_two_processes_of_which_one_is_killed_are_gone_on_with_by_any_number(
    photos, undisturbed, tmp_path, moment, process, next_number
):
    dies, after = MOMENTS[moment]
    statuses = launch(photos, tmp_path / "set", 2, dies=dies, after=after, process=process)
    assert statuses[process] == -signal.SIGKILL
    assert not (tmp_path / "set").exists()
    assert launch(photos, tmp_path / "set", next_number) == [0] * next_number
    assert contents(tmp_path / "set") == contents(undisturbed)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.usefixtures("small_blocks")
def test_what_one_process_began_several_go_on_with(photos, undisturbed, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_set(Stopping(photos, 32), tmp_path / "set")
    assert launch(photos, tmp_path / "set", 2) == [0, 0]
    assert contents(tmp_path / "set") == contents(undisturbed)


@pytest.mark.usefixtures("small_blocks")
def test_blocks_of_a_source_that_changed_are_noticed(photos, tmp_path):
    dies, after = MOMENTS["packing"]
    launch(photos, tmp_path / "set", 2, dies=dies, after=after, process=0)
    with pytest.raises(UserError, match=r"the source has changed since .*set\.partial was begun"):
        write_set(ImageFolder(photos, seed=1), tmp_path / "set")
    blocks = sorted((tmp_path / ".set.partial" / "scratch").glob("*.zip"))
    whole = [block.read_bytes() for block in blocks]

    def cut(block: Path) -> None:
        block.write_bytes(block.read_bytes()[:-9])

    def change(block: Path) -> None:
        """Flip a bit of the first member that there is, which its checksum tells."""
        content = bytearray(block.read_bytes())
        content[60] ^= 1
        block.write_bytes(content)

    def without_samples(block: Path) -> None:
        with zipfile.ZipFile(block, "w") as archive:
            archive.writestr("samples.json", "[{}]")

    for damage in (cut, change, without_samples):
        for block, content in zip(blocks, whole):
            block.write_bytes(content)
            damage(block)
        with pytest.raises(UserError, match=r"scratch/00000[0-9]\.zip is missing or damaged .* to prepare anew"):
            write_set(ImageFolder(photos), tmp_path / "set")


def test_processes_that_do_not_share_the_folder_are_told(photos, tmp_path):
    with pytest.raises(UserError, match="choose an --out that all machines share"):
        write_set(ImageFolder(photos), tmp_path / "set", processes=Processes(0, 2, lambda: None))
