"""Decoding to disk: the right pixels in the right files, whatever interrupts it and however many share the work."""

from __future__ import annotations

import errno
import io
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from autoencoder import decode
from autoencoder.inference import light_decoder
from autoencoder.inference.decoding import (
    TASK,
    ImageFiles,
    ImageShards,
    Output,
    decode_batches,
    unfinished_blocks,
)
from autoencoder.inference.latents import describe_latents, pack_caption, pack_moments
from autoencoder.inference.tiling import decode_tiled
from autoencoder.inference.trained_autoencoder import KIND, WEIGHTS, fingerprint, load_autoencoder
from autoencoder.models.autoencoder import AutoencoderKL
from autoencoder.models.config import AutoencoderConfig
from autoencoder.models.light_decoder import LightDecoderConfig, build_light_decoder
from data_prep.loader import ImageDataset, LatentDataset, SampleRef
from data_prep.resuming import batches_of_blocks, begin, finish
from data_prep.shards import ShardSet, ShardWriter
from ldgan.engine.checkpoint import save_checkpoint
from ldgan.engine.cli import UserError
from ldgan.engine.config import to_dict
from ldgan.engine.images import to_uint8
from ldgan.engine.progress import progress_bar

NUM_IMAGES = 11
FORMATS = ["png", "webp", "shards"]
NUMBERS = {"latent_channels": 2, "base_channels": 4, "channel_multipliers": [1, 1]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ``autoencoder`` of factor 2, and ``latents`` of images of 16 x 16 pixels; every third has no label."""
    folder = tmp_path_factory.mktemp("decode")
    config = AutoencoderConfig(**NUMBERS)
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(config)
    autoencoder.set_latent_statistics(torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.5]))
    description = {"kind": KIND, "config": {"network": to_dict(config)}, "latent_statistics": {}}
    save_checkpoint(folder / "autoencoder", {WEIGHTS: autoencoder}, description)
    details = describe_latents(autoencoder, 16, flips=False)
    with ShardWriter(
        folder / "latents", "latents", samples_per_shard=4, class_names=list("abcdef"), details=details
    ) as writer:
        for number in range(NUM_IMAGES):
            writer.write(pack_moments(torch.randn(4, 8, 8), label=number // 2 if number % 3 else -1))
    return folder


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, out: Path, *flags: object) -> None:
    """The command, in this process; batches of 3 unless told otherwise."""
    words = ["--autoencoder", folder / "autoencoder", "--latents", folder / "latents", "--out", out]
    words = ["decode.py", *words, "--batch-size", 3, *flags]
    monkeypatch.setattr("sys.argv", [str(word) for word in words])
    decode.main()


def format_flags(image_format: str) -> tuple[object, ...]:
    return ("--format", image_format, *(("--samples-per-shard", 4) if image_format == "shards" else ()))


def latent_means(folder: Path) -> Tensor:
    latents = LatentDataset(ShardSet.open(folder / "latents"))
    return torch.stack([latents[SampleRef(number, flip=False)]["mean"] for number in range(NUM_IMAGES)])


def images_of(out: Path, image_format: str) -> np.ndarray:
    """What was written, uint8 (N, H, W, 3)."""
    if image_format == "shards":
        shards = ShardSet.open(out)
        files = [io.BytesIO(shards.read(number)["png"]) for number in range(len(shards))]
    else:
        names = [f"{number:09d}.{image_format}" for number in range(NUM_IMAGES)]
        assert sorted(path.name for path in out.iterdir()) == [*names, "decoding.json"]
        files = [io.BytesIO((out / name).read_bytes()) for name in names]
    return np.stack([np.asarray(Image.open(file)) for file in files])


def state(out: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of every file that is not hidden."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.glob("[!.]*")}


@pytest.mark.parametrize("image_format", FORMATS)
def test_image_i_is_row_i_of_the_latents(folder, tmp_path, monkeypatch, image_format):
    run(monkeypatch, folder, tmp_path / "out", *format_flags(image_format))
    autoencoder = load_autoencoder(folder / "autoencoder")
    one_by_one = torch.cat([to_uint8(autoencoder.decode(latent[None])) for latent in latent_means(folder)])
    images = images_of(tmp_path / "out", image_format).astype(int)
    # Sums of a batch may come in another order, which can tip the rounding.
    assert np.abs(images - one_by_one.permute(0, 2, 3, 1).numpy()).max() <= 1
    assert len(np.unique(images, axis=0)) == NUM_IMAGES


def test_shards_carry_labels_and_say_what_they_are_of(folder, tmp_path, monkeypatch):
    run(monkeypatch, folder, tmp_path / "out", *format_flags("shards"))
    images, latents = ShardSet.open(tmp_path / "out"), ShardSet.open(folder / "latents")
    labels = [ImageDataset(images)[SampleRef(number, flip=False)]["label"] for number in range(NUM_IMAGES)]
    assert labels == [-1, 0, 1, -1, 2, 2, -1, 3, 4, -1, 5]
    assert images.shard_sizes == [4, 4, 3]
    assert images.manifest.class_names == list("abcdef")
    assert images.manifest.details["resolution"] == 16
    decoded = images.manifest.details["decoding"]
    assert decoded["latents"] == latents.manifest.fingerprint
    assert decoded["autoencoder"] == latents.manifest.details["autoencoder"]


def test_shards_carry_captions(folder, tmp_path, monkeypatch):
    run(monkeypatch, folder, tmp_path / "plain", *format_flags("shards"))
    plain, latents = ShardSet.open(tmp_path / "plain"), ShardSet.open(folder / "latents")
    captioned = tmp_path / "captioned"
    captioned.mkdir()
    (captioned / "autoencoder").symlink_to(folder / "autoencoder")
    captions = [f"image {number}, ♥" if number % 4 else "" for number in range(NUM_IMAGES)]
    with ShardWriter(captioned / "latents", "latents", details=latents.manifest.details) as writer:
        for number, caption in enumerate(captions):
            writer.write(latents.read(number) | pack_caption(caption))
    run(monkeypatch, captioned, tmp_path / "out", *format_flags("shards"))
    images = ShardSet.open(tmp_path / "out")
    for number, caption in enumerate(captions):
        assert images.read(number) == plain.read(number) | ({"txt": caption.encode()} if caption else {})
    assert (images.manifest.has_captions, plain.manifest.has_captions) == (True, False)


def test_shards_are_the_bytes_that_the_shard_writer_would_write(folder, tmp_path, monkeypatch):
    run(monkeypatch, folder, tmp_path / "out", *format_flags("shards"))
    shards = ShardSet.open(tmp_path / "out")
    with ShardWriter(tmp_path / "copy", "images", samples_per_shard=4) as writer:
        for number in range(NUM_IMAGES):
            writer.write(shards.read(number))
    assert writer.manifest.shards == shards.manifest.shards  # hashes included


@pytest.mark.parametrize("image_format", FORMATS)
def test_a_full_disk_is_one_line_and_the_next_run_adds_the_rest(folder, tmp_path, monkeypatch, capsys, image_format):
    flags = format_flags(image_format)
    run(monkeypatch, folder, tmp_path / "uninterrupted", *flags)
    kind = ImageShards if image_format == "shards" else ImageFiles
    write, out = kind.write, tmp_path / "out"

    def fail_from_the_eighth_on(self: Output, number: int, image: Tensor, label: int, caption: str) -> None:
        if number >= 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, number, image, label, caption)

    with monkeypatch.context() as full_disk:
        full_disk.setattr(kind, "write", fail_from_the_eighth_on)
        with pytest.raises(UserError, match=r"out: cannot be written \(No space left on device\); make room"):
            run(monkeypatch, folder, out, *flags)
    before = state(out)
    assert json.loads(before.pop("decoding.json")[0])["finished"] is False
    complete = [f"{number:09d}.{image_format}" for number in range(7)] if kind is ImageFiles else ["shard-000000.tar"]
    assert sorted(before) == complete

    capsys.readouterr()
    run(monkeypatch, folder, out, *flags)
    # In batches of 3 the one from 6 on is decoded again; in shards of 4 the one from 4 on is written again.
    assert f"11 images in {out} ({5 if kind is ImageFiles else 7} decoded now, " in capsys.readouterr().out
    after = state(out)
    assert {name: after[name] for name in before} == before
    files, reference = ({n: c for n, (c, _) in state(p).items()} for p in (out, tmp_path / "uninterrupted"))
    for contents in (files, reference):
        contents.pop("manifest.json", None)  # knows how long it took
    assert files == reference
    assert json.loads(files["decoding.json"])["finished"] is True


def test_a_file_half_written_is_no_image(folder, tmp_path, monkeypatch):
    """As after a kill -9: under temporary names lies what was being written."""
    run(monkeypatch, folder, tmp_path / "uninterrupted", *format_flags("shards"))
    out = tmp_path / "out"
    run(monkeypatch, folder, out, *format_flags("shards"))
    for name in ("manifest.json", "shard-000001.tar"):
        (out / name).unlink()
    (out / ".shard-000001.tar.tmp").write_bytes(b"half")
    run(monkeypatch, folder, out, *format_flags("shards"))
    assert not (out / ".shard-000001.tar.tmp").exists()
    shards = [ShardSet.open(path).manifest.shards for path in (out, tmp_path / "uninterrupted")]
    assert shards[0] == shards[1]


def test_a_shard_that_was_cut_before_the_end_is_written_again(folder, tmp_path):
    whole, cut = (ImageShards(tmp_path / name, NUM_IMAGES, samples_per_shard=4) for name in ("whole", "cut"))
    for output in (whole, cut):
        output.folder.mkdir()
        decode_share(folder, output, unfinished_blocks(output, NUM_IMAGES))
    path = tmp_path / "cut" / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:-512])
    before = state(tmp_path / "cut")
    output = ImageShards(tmp_path / "cut", NUM_IMAGES, samples_per_shard=4)
    assert unfinished_blocks(output, NUM_IMAGES) == [range(4, 8)]
    decode_share(folder, output, [range(4, 8)])
    after = state(tmp_path / "cut")
    assert [name for name in after if after[name] != before[name]] == ["shard-000001.tar"]
    contents = [{name: content for name, (content, _) in files.items()} for files in (after, state(tmp_path / "whole"))]
    assert contents[0] == contents[1]


@pytest.mark.parametrize("image_format", FORMATS)
def test_a_finished_decoding_is_left_as_it_is(folder, tmp_path, monkeypatch, capsys, image_format):
    run(monkeypatch, folder, tmp_path / "out", *format_flags(image_format))
    before = state(tmp_path / "out")
    capsys.readouterr()
    run(monkeypatch, folder, tmp_path / "out", *format_flags(image_format))
    assert capsys.readouterr().out == f"{tmp_path / 'out'} was finished before; nothing to do\n"
    assert state(tmp_path / "out") == before


def test_a_folder_of_another_decoding_is_refused(folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(monkeypatch, folder, out)
    before = state(out)
    for flags, difference in [
        (("--format", "webp"), "images png, now webp"),
        (("--tile", 6, "--overlap", 2), "tile 0, now 6"),
    ]:
        with pytest.raises(UserError, match=rf"exists already, of another decoding \({difference}\); choose another"):
            run(monkeypatch, folder, out, *flags)
    assert state(out) == before


@pytest.mark.parametrize("content", ["[]", "{", "{}", '"finished"'])
def test_a_damaged_note_is_refused(tmp_path, content):
    (tmp_path / "decoding.json").write_text(content)
    with pytest.raises(UserError, match=r"decoding.json: is damaged .*; choose another --out"):
        begin(tmp_path, TASK, {})


def test_folders_of_other_things_are_refused_and_empty_ones_taken(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"exists already and is no decoding to continue"):
        begin(tmp_path, TASK, {})
    with pytest.raises(UserError, match=r"exists already and is no decoding to continue"):
        begin(tmp_path / "thesis.tex", TASK, {})
    (tmp_path / "empty").mkdir()
    assert begin(tmp_path / "empty", TASK, {"tile": 0}) is False
    finish(tmp_path / "empty", TASK, {"tile": 0})
    assert begin(tmp_path / "empty", TASK, {"tile": 0}) is True


def outputs(out: Path) -> list[Callable[[], Output]]:
    return [lambda: ImageFiles(out, "png", block_size=2), lambda: ImageShards(out, NUM_IMAGES, samples_per_shard=2)]


def decode_share(folder: Path, output: Output, share: list[range]) -> list[range]:
    """Decode the blocks of one process; returns the batches."""
    latents = LatentDataset(ShardSet.open(folder / "latents"))
    batches = batches_of_blocks(share, 2)
    with progress_bar("decoding", NUM_IMAGES, "images", enabled=False) as bar:
        decode_batches(load_autoencoder(folder / "autoencoder").decode, latents, output, batches, "cpu", bar)
    return batches


@pytest.mark.parametrize("kind", [0, 1], ids=["files", "shards"])
def test_two_processes_write_what_one_writes(folder, tmp_path, kind):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    output = outputs(tmp_path / "one")[kind]()
    decode_share(folder, output, unfinished_blocks(output, NUM_IMAGES))
    expected = {name: content for name, (content, _) in state(tmp_path / "one").items()}

    ranks = [outputs(tmp_path / "two")[kind]() for _ in range(2)]
    blocks = [unfinished_blocks(output, NUM_IMAGES) for output in ranks]
    first = decode_share(folder, ranks[0], blocks[0][0::2])
    written_by_first = state(tmp_path / "two")
    second = decode_share(folder, ranks[1], blocks[1][1::2])
    after = state(tmp_path / "two")
    assert {name: content for name, (content, _) in after.items()} == expected
    assert {name: after[name] for name in written_by_first} == written_by_first
    assert sorted(number for batch in first + second for number in batch) == list(range(NUM_IMAGES))
    assert unfinished_blocks(ranks[0], NUM_IMAGES) == []


def test_an_unfinished_batch_is_decoded_as_a_whole_but_only_missing_files_are_written(folder, tmp_path):
    output = ImageFiles(tmp_path, "png", block_size=4)
    decode_share(folder, output, unfinished_blocks(output, NUM_IMAGES))
    before = state(tmp_path)
    for number in (1, 5, 6):
        (tmp_path / f"{number:09d}.png").unlink()
    assert unfinished_blocks(output, NUM_IMAGES) == [range(0, 4), range(4, 8)]
    decode_share(folder, output, unfinished_blocks(output, NUM_IMAGES))
    after = state(tmp_path)
    assert {name: content for name, (content, _) in after.items()} == {name: c for name, (c, _) in before.items()}
    assert sorted(name for name in after if after[name] != before[name]) == [
        f"{number:09d}.png" for number in (1, 5, 6)
    ]


class _Memory(Output):
    """Keeps images by number; ``before_write`` is called first."""

    def __init__(self, before_write: Callable[[], None]) -> None:
        super().__init__(Path("memory"), block_size=2)
        self.images: dict[int, Tensor] = {}
        self._before_write = before_write

    def is_written(self, number: int) -> bool:
        return number in self.images

    def write(self, number: int, image: Tensor, label: int, caption: str) -> None:
        self._before_write()
        self.images[number] = image

    def close(self) -> None:
        pass


def test_reading_decoding_and_writing_overlap(folder, monkeypatch):
    """Batch 0 is written only after batch 1 is decoded, and decoded only after batch 1 is read: no deadlock."""
    read_second, decoded_second = threading.Event(), threading.Event()
    read, latents = LatentDataset.__getitem__, LatentDataset(ShardSet.open(folder / "latents"))

    def note_reading(self: LatentDataset, ref: SampleRef) -> dict[str, Tensor | int]:
        if ref.index >= 2:
            read_second.set()
        return read(self, ref)

    num_decoded = 0

    def decode_pixels(batch: Tensor) -> Tensor:
        nonlocal num_decoded
        assert read_second.wait(60)
        num_decoded += 1
        if num_decoded == 2:
            decoded_second.set()
        return batch.clamp(-1, 1)

    def wait_for_network() -> None:
        assert decoded_second.wait(60)

    monkeypatch.setattr(LatentDataset, "__getitem__", note_reading)
    output = _Memory(wait_for_network)
    with progress_bar("decoding", 6, "images", enabled=False) as bar:
        decode_batches(decode_pixels, latents, output, [range(0, 2), range(2, 4), range(4, 6)], "cpu", bar)
    means = latent_means(folder)
    for number in range(6):
        assert torch.equal(output.images[number], to_uint8(means[number]))


def test_tiles_of_the_command_are_those_of_decode_tiled(folder, tmp_path, monkeypatch):
    run(monkeypatch, folder, tmp_path / "out", "--tile", 6, "--overlap", 2, "--batch-size", NUM_IMAGES)
    autoencoder, means = load_autoencoder(folder / "autoencoder"), latent_means(folder)
    tiled = to_uint8(decode_tiled(autoencoder.decode, means, tile=6, overlap=2, factor=2))
    images = images_of(tmp_path / "out", "png")
    np.testing.assert_array_equal(images, tiled.permute(0, 2, 3, 1).numpy())
    assert not torch.equal(tiled, to_uint8(autoencoder.decode(means)))  # group norms see a tile


def test_the_light_decoder_is_used_when_asked_for(folder, tmp_path, monkeypatch):
    full, run_dir = load_autoencoder(folder / "autoencoder"), tmp_path / "autoencoder"
    shutil.copytree(folder / "autoencoder", run_dir)
    config = LightDecoderConfig(widths=[4], num_blocks=[1])
    description = {"kind": light_decoder.KIND, "autoencoder": fingerprint(full), "config": {"network": to_dict(config)}}
    light = build_light_decoder(config, full)
    save_checkpoint(light_decoder.light_decoder_folder(run_dir), {light_decoder.WEIGHTS: light}, description)
    flags = ("--autoencoder", run_dir, "--batch-size", NUM_IMAGES)

    run(monkeypatch, folder, tmp_path / "out", *flags, "--decoder", "light")
    expected = to_uint8(light.decode(latent_means(folder)))
    np.testing.assert_array_equal(images_of(tmp_path / "out", "png"), expected.permute(0, 2, 3, 1).numpy())
    with pytest.raises(UserError, match=r"of another decoding \(decoder light, now full\)"):
        run(monkeypatch, folder, tmp_path / "out", *flags)


@pytest.mark.parametrize("flags", [["--tile", 8, "--overlap", 5], ["--overlap", 2], ["--tile", -8]])
def test_tiles_that_make_no_sense_are_refused(folder, tmp_path, monkeypatch, flags):
    with pytest.raises(UserError, match="give an overlap from 0 to half a tile"):
        run(monkeypatch, folder, tmp_path / "out", *flags)
    assert list(tmp_path.iterdir()) == []


def test_webp_is_refused_for_images_that_it_cannot_hold(tmp_path, monkeypatch, folder):
    monkeypatch.setattr(decode, "MAX_WEBP_SIDE", 15)
    with pytest.raises(UserError, match="webp holds at most 15 pixels a side, and these images have 16"):
        run(monkeypatch, folder, tmp_path / "out", "--format", "webp")
    assert list(tmp_path.iterdir()) == []
