"""Encoding to disk: the right moments in the right shards, whatever interrupts it and however many share the work."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import json
import math
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from autoencoder import encode
from autoencoder.inference import encoding
from autoencoder.inference.encoding import (
    CHECKED_IMAGES,
    DTYPES,
    CaptionEncoder,
    MomentsEncoder,
    check_precision,
    encode_blocks,
    precision_line,
    shard_ranges,
)
from autoencoder.inference.text_encoder import TextEncoder, open_text_encoder
from autoencoder.inference.trained_autoencoder import KIND, WEIGHTS, fingerprint, load_autoencoder
from autoencoder.models.autoencoder import AutoencoderKL
from autoencoder.models.config import AutoencoderConfig
from autoencoder.models.text import Text
from data_prep.loader import ImageDataset, LatentDataset, SampleRef
from data_prep.resuming import ResumableShards
from data_prep.shards import ShardSet, ShardWriter
from ldgan.engine.checkpoint import save_checkpoint
from ldgan.engine.cli import UserError
from ldgan.engine.config import to_dict
from ldgan.engine.progress import progress_bar
from ldgan.engine.session import make_accelerator

ROOT = Path(__file__).resolve().parents[2]
NUM_IMAGES = 11  # in shards of 3, 3, 3 and 2
CONFIG = AutoencoderConfig(latent_channels=2, base_channels=4, channel_multipliers=[1, 1])
NUMBERS = {"batch_size": 2, "num_workers": 0, "num_passes": 1}
SHARDS = [f"shard-{number:06d}.tar" for number in range(4)]


def make_autoencoder(folder: Path, seed: int = 0) -> AutoencoderKL:
    """An autoencoder of factor 2, whose latents are neither centred nor of unit variance inside."""
    torch.manual_seed(seed)
    autoencoder = AutoencoderKL(CONFIG)
    autoencoder.set_latent_statistics(torch.tensor([0.1, -0.2]), torch.tensor([0.3, 0.5]))
    description = {"kind": KIND, "config": {"network": to_dict(CONFIG)}, "latent_statistics": {}}
    save_checkpoint(folder, {WEIGHTS: autoencoder}, description)
    return autoencoder


def make_images(folder: Path, seed: int = 0, captions: Sequence[str | None] = (None,) * NUM_IMAGES) -> None:
    """Noise of 8 x 8 pixels; every third image has no label."""
    random = np.random.default_rng(seed)
    details = {"resolution": 8}
    with ShardWriter(folder, "images", samples_per_shard=3, class_names=list("abcdef"), details=details) as writer:
        for number in range(NUM_IMAGES):
            buffer = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, "png")
            label = {"cls": str(number // 2).encode()} if number % 3 else {}
            caption = captions[number]
            text = {"txt": caption.encode()} if caption is not None else {}
            writer.write({"png": buffer.getvalue()} | label | text)


# "a red heart" is there four times, twice in one shard; one image has no caption, and one an empty one.
CAPTIONS = [
    *("a red heart", "green", "a red heart"),
    *(None, "a red heart", "the tree of the night of the red heart"),
    *("", "a red heart", "green"),
    *("\u2665 tree", "night"),
]
COUNTED = "captions: 9 encoded now, 2 images have none; 1 are longer than 6 tokens and lost their ends\n"


@pytest.fixture(scope="module")
def captioned(folder: Path, tiny_text_encoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``folder``, of the same images with captions; an encoder of ``text``, and ``latents`` with its embeddings."""
    captioned = tmp_path_factory.mktemp("captioned")
    (captioned / "autoencoder").symlink_to(folder / "autoencoder")
    make_images(captioned / "images", captions=CAPTIONS)
    (captioned / "text").symlink_to(tiny_text_encoder())
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(monkeypatch, captioned, captioned / "latents", *text_flags(captioned))
    return captioned


def text_flags(captioned: Path, max_tokens: int = 6) -> tuple[object, ...]:
    return ("--text-encoder", captioned / "text", "--max-tokens", max_tokens)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ``autoencoder``, ``images``, and the ``latents`` that one process makes without a break, in fp32 ``exact``."""
    folder = tmp_path_factory.mktemp("encode")
    make_autoencoder(folder / "autoencoder")
    make_images(folder / "images")
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(monkeypatch, folder, folder / "latents")
        run(monkeypatch, folder, folder / "exact", "--dtype", "fp32")
    return folder


def command(folder: Path, out: Path, *flags: object) -> list[str]:
    """Words of the command; batches of 2 unless told otherwise."""
    words = ["--autoencoder", folder / "autoencoder", "--data", folder / "images", "--out", out, "--batch-size", 2]
    return [str(word) for word in (*words, *flags)]


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, out: Path, *flags: object) -> None:
    """The command, in this process."""
    monkeypatch.setattr("sys.argv", ["encode.py", *command(folder, out, *flags)])
    encode.main()


def read(path: Path, number: int) -> np.ndarray:
    return np.load(io.BytesIO(ShardSet.open(path).read(number)["npy"]), allow_pickle=False)


def image(folder: Path, number: int) -> Tensor:
    pixels = ImageDataset(ShardSet.open(folder / "images"))[SampleRef(number, flip=False)]["image"]
    assert isinstance(pixels, Tensor)
    return pixels[None]


def contents(out: Path) -> dict[str, object]:
    """Everything in a finished folder, hidden files too; how long it took does not count."""
    files: dict[str, object] = {path.name: path.read_bytes() for path in out.iterdir()}
    manifest = json.loads((out / "manifest.json").read_text())
    assert 0 < manifest.pop("seconds") < 600
    return files | {"manifest.json": manifest}


def times(out: Path) -> dict[str, int]:
    """When each shard was written, in ns."""
    return {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}


def test_sample_i_holds_the_moments_of_image_i(folder):
    autoencoder = load_autoencoder(folder / "autoencoder")
    for number in range(NUM_IMAGES):
        mean, log_variance = autoencoder.encode(image(folder, number))
        exact = torch.cat([mean, torch.exp(log_variance / 2)], dim=1)[0].numpy()
        moments = read(folder / "exact", number)
        assert moments.dtype == np.float32
        np.testing.assert_allclose(moments, exact, rtol=1e-4, atol=1e-5)
        halves = read(folder / "latents", number)
        assert halves.dtype == np.float16
        np.testing.assert_array_equal(halves, moments.astype(np.float16))


def test_shard_k_is_made_of_shard_k_and_carries_its_labels(folder):
    images, latents = (ShardSet.open(folder / name) for name in ("images", "latents"))
    assert latents.shard_sizes == images.shard_sizes == [3, 3, 3, 2]
    labels = [LatentDataset(latents)[SampleRef(number, flip=False)]["label"] for number in range(NUM_IMAGES)]
    assert labels == [-1, 0, 1, -1, 2, 2, -1, 3, 4, -1, 5]
    manifest = latents.manifest
    assert manifest.class_names == list("abcdef")
    assert manifest.details["autoencoder"] == fingerprint(load_autoencoder(folder / "autoencoder"))
    assert manifest.details["latent_shape"] == [2, 4, 4]
    assert (manifest.details["dtype"], manifest.details["flips"]) == ("fp16", False)
    assert manifest.details["images"]["fingerprint"] == images.manifest.fingerprint
    assert sorted(path.name for path in (folder / "latents").iterdir()) == ["encoding.json", "manifest.json", *SHARDS]


def test_shards_are_the_bytes_that_the_shard_writer_would_write(folder, tmp_path):
    latents = ShardSet.open(folder / "latents")
    with ShardWriter(tmp_path / "copy", "latents", samples_per_shard=3) as writer:
        for number in range(NUM_IMAGES):
            writer.write(latents.read(number))
    assert writer.manifest.shards == latents.manifest.shards  # hashes included


def test_flips_are_latents_of_mirror_images(folder, tmp_path, monkeypatch):
    run(monkeypatch, folder, tmp_path / "out", "--flips", "--dtype", "fp32")
    autoencoder = load_autoencoder(folder / "autoencoder")
    dataset = LatentDataset(ShardSet.open(tmp_path / "out"))
    for number in range(NUM_IMAGES):
        np.testing.assert_array_equal(read(tmp_path / "out", number)[0], read(folder / "exact", number))
        mirrored = autoencoder.encode(image(folder, number).flip(-1))
        sample = dataset[SampleRef(number, flip=True)]
        torch.testing.assert_close(sample["mean"][None], mirrored.mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sample["std"][None], mirrored.std, rtol=1e-4, atol=1e-5)


def test_workers_that_read_change_nothing(folder, tmp_path, monkeypatch):
    run(monkeypatch, folder, tmp_path / "out", "--workers", 2)
    assert contents(tmp_path / "out") == contents(folder / "latents")


def test_the_number_of_threads_changes_nothing(folder, tmp_path, monkeypatch):
    """A pass is computed by one thread, in whatever thread it runs."""
    counts, encode_moments = [], encoding.encode_moments

    def count_threads(*arguments: Any, **options: Any) -> Tensor:
        counts.append(torch.get_num_threads())
        return encode_moments(*arguments, **options)

    monkeypatch.setattr(encoding, "encode_moments", count_threads)
    monkeypatch.setattr(encode, "make_accelerator", lambda precision: make_accelerator(precision, num_threads=3))
    run(monkeypatch, folder, tmp_path / "out")
    assert counts == [1] * 7  # batches of shards of 3, 3, 3 and 2 samples
    assert contents(tmp_path / "out") == contents(folder / "latents")


def encode_share(folder: Path, output: ResumableShards, share: list[range]) -> None:
    encoder = MomentsEncoder(load_autoencoder(folder / "autoencoder"), flips=False, dtype="fp16")
    images = ImageDataset(ShardSet.open(folder / "images"))
    with progress_bar("encoding", NUM_IMAGES, "images", enabled=False) as bar:
        encode_blocks(encoder, images, CaptionEncoder(images.shards, None), output, share, bar, **NUMBERS)


@pytest.mark.parametrize("num_processes", [2, 3, 5])
def test_several_processes_write_what_one_writes(folder, tmp_path, num_processes):
    blocks = shard_ranges(ShardSet.open(folder / "images"))
    ranks = [ResumableShards(tmp_path, blocks, num_processes) for _ in range(num_processes)]
    shares = [output.unfinished()[rank::num_processes] for rank, output in enumerate(ranks)]
    for output, share in zip(ranks, shares):
        encode_share(folder, output, share)
    assert ranks[0].unfinished() == []
    ranks[0].write_manifest("latents", None, {}, ranks[0].seconds())
    assert ShardSet.open(tmp_path).manifest.shards == ShardSet.open(folder / "latents").manifest.shards


def test_two_launched_processes_write_what_one_writes(captioned, tmp_path):
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    script = [str(ROOT / "autoencoder" / "encode.py"), *command(captioned, tmp_path / "out", *text_flags(captioned))]
    words = [*launch, "--mixed_precision", "no", "--dynamo_backend", "no", *script]
    output = subprocess.run(words, check=True, timeout=170, stdout=subprocess.PIPE, text=True).stdout
    assert COUNTED in output  # of both
    assert contents(tmp_path / "out") == contents(captioned / "latents")


# Kills itself when it is about to write sample 7, the second one of the third shard; writes one batch at a time.
KILLED = """
import os, signal
from autoencoder import encode
from autoencoder.inference import encoding
from data_prep.resuming import ResumableShards

write = ResumableShards.write

def write_or_die(self, number, sample):
    if number == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, number, sample)

ResumableShards.write = write_or_die
encoding.MAX_PENDING_BATCHES = 1
encode.main()
"""


def test_after_a_kill_the_same_command_adds_the_rest(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, *command(folder, out)], cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    before = times(out)
    assert sorted(before) == SHARDS[:2]
    with pytest.raises(UserError, match="not a folder of finished shards"):
        ShardSet.open(out)

    run(monkeypatch, folder, out)
    assert "(5 encoded now, " in capsys.readouterr().out
    assert {name: times(out)[name] for name in before} == before
    assert contents(out) == contents(folder / "latents")


def test_a_full_disk_is_one_line_and_the_next_run_adds_the_rest(folder, tmp_path, monkeypatch):
    write, out = ResumableShards.write, tmp_path / "out"

    def fail_from_the_eighth_on(self: ResumableShards, number: int, sample: dict[str, bytes]) -> None:
        if number >= 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, number, sample)

    with monkeypatch.context() as full_disk:
        full_disk.setattr(ResumableShards, "write", fail_from_the_eighth_on)
        with pytest.raises(UserError, match=r"out: cannot be written \(No space left on device\); make room"):
            run(monkeypatch, folder, out)
    before = times(out)
    assert set(before) <= {*SHARDS[:2]}
    run(monkeypatch, folder, out)
    assert {name: times(out)[name] for name in before} == before
    assert contents(out) == contents(folder / "latents")


def test_a_finished_encoding_is_left_as_it_is(folder, monkeypatch, capsys):
    files, before = contents(folder / "latents"), times(folder / "latents")
    run(monkeypatch, folder, folder / "latents")
    assert capsys.readouterr().out == f"{folder / 'latents'} was finished before; nothing to do\n"
    assert (contents(folder / "latents"), times(folder / "latents")) == (files, before)


def interrupt(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *flags: object) -> None:
    """Leave ``out`` as a run does that ends between its last shard and the manifest."""

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ResumableShards, "write_manifest", fail)
        with pytest.raises(KeyboardInterrupt):
            run(patch, folder, out, *flags)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-512])


@pytest.mark.parametrize(
    ("damage", "num_encoded"),
    [
        (lambda out: None, 0),
        (lambda out: cut(out / SHARDS[1]), 3),
        (lambda out: (out / SHARDS[3]).unlink(), 2),
        # Killed between a shard and its record.
        (lambda out: (out / f".{SHARDS[2]}").with_suffix(".json").unlink(), 0),
        (lambda out: (out / f".{SHARDS[2]}").with_suffix(".json").write_text("{"), 0),
    ],
    ids=["nothing", "cut", "lost", "no record", "damaged record"],
)
def test_only_complete_shards_are_kept(folder, tmp_path, monkeypatch, capsys, damage, num_encoded):
    out = tmp_path / "out"
    interrupt(folder, out, monkeypatch)
    assert not (out / "manifest.json").exists()
    damage(out)
    run(monkeypatch, folder, out)
    assert f"({num_encoded} encoded now, " in capsys.readouterr().out
    assert contents(out) == contents(folder / "latents")


def test_the_record_of_a_lost_shard_does_not_describe_its_successor(tmp_path):
    for content in (b"old", b"new"):
        shards = ResumableShards(tmp_path, [range(2)])
        shards.write(0, {"npy": content})
        assert sorted(path.name for path in tmp_path.iterdir()) == [f".{SHARDS[0]}.tmp"]
        shards.write(1, {"npy": content})
        if content == b"old":
            (tmp_path / SHARDS[0]).unlink()
    shards.write_manifest("latents", None, {}, shards.seconds())
    (info,) = ShardSet.open(tmp_path).manifest.shards
    assert info.sha256 == hashlib.sha256((tmp_path / SHARDS[0]).read_bytes()).hexdigest()


def test_seconds_are_those_of_all_runs_side_by_side(folder, tmp_path, monkeypatch):
    """With a clock that goes on by one second for each shard: 4 s in 2 runs, or 2 s for 2 processes."""
    blocks = shard_ranges(ShardSet.open(folder / "images"))

    def seconds(out: Path, num_processes: int) -> float:
        out.mkdir()
        now = 0.0
        monkeypatch.setattr("data_prep.resuming.time.monotonic", lambda: now)
        for first in (0, 2):
            output = ResumableShards(out, blocks, num_processes)
            for block in blocks[first : first + 2]:
                now += 1
                for number in block:
                    output.write(number, {"npy": b""})
        return output.seconds()

    assert seconds(tmp_path / "one", 1) == 4
    assert seconds(tmp_path / "two", 2) == 2


def test_an_unfinished_folder_of_another_encoding_is_refused(folder, tmp_path, monkeypatch):
    out, other = tmp_path / "out", tmp_path / "other"
    interrupt(folder, out, monkeypatch)
    make_autoencoder(other / "autoencoder", seed=1)
    make_images(other / "images", seed=1)
    before = times(out)
    for flags, difference in [
        (("--autoencoder", other / "autoencoder"), "autoencoder [0-9a-f]{64}, now [0-9a-f]{64}"),
        (("--data", other / "images"), "images [0-9a-f]{64}, now [0-9a-f]{64}"),
        (("--dtype", "fp32"), "dtype fp16, now fp32"),
        (("--flips",), "flips False, now True"),
    ]:
        with pytest.raises(UserError, match=rf"exists already, of another encoding \({difference}\); choose another"):
            run(monkeypatch, folder, out, *flags)
    assert times(out) == before


def scaled(folder: Path, factor: float) -> MomentsEncoder:
    """An encoder to latents ``factor`` times as large."""
    autoencoder = load_autoencoder(folder / "autoencoder")
    nn.init.constant_(autoencoder.latent_std, 1 / factor)
    return MomentsEncoder(autoencoder, flips=False, dtype="fp16")


@pytest.mark.parametrize("factor", [1e7, math.inf], ids=["beyond fp16", "infinite"])
def test_moments_that_fp16_cannot_hold_are_refused(folder, tmp_path, factor):
    images = ImageDataset(ShardSet.open(folder / "images"))
    output, encoder = ResumableShards(tmp_path, shard_ranges(images.shards)), scaled(folder, factor)
    captions = CaptionEncoder(images.shards, None)
    where = r"shard-000001\.tar, sample 00000000[345]: its latents "  # two batches are under way
    message = r"reach [0-9,]{9,}, and fp16 ends at 65,504; give --dtype fp32" if factor < math.inf else "are not finite"
    with progress_bar("encoding", 3, "images", enabled=False) as bar, pytest.raises(UserError, match=where + message):
        encode_blocks(encoder, images, captions, output, output.blocks[1:2], bar, **NUMBERS)
    assert list(tmp_path.iterdir()) == []
    if factor < math.inf:
        exact = dataclasses.replace(encoder, dtype="fp32")
        with progress_bar("encoding", 3, "images", enabled=False) as bar:
            encode_blocks(exact, images, captions, output, output.blocks[1:2], bar, **NUMBERS)
        assert output.is_written(1)


def pixels_of(autoencoder: AutoencoderKL, latents: Tensor) -> np.ndarray:
    """What latents decode to, in float64, rounded as images are."""
    with torch.no_grad():
        decoded = autoencoder.decode(latents).double().clamp(-1, 1)
    return np.round((decoded.numpy() + 1) * 127.5)


def test_fp16_costs_nothing_visible_and_the_manifest_says_so(folder):
    autoencoder = load_autoencoder(folder / "autoencoder")
    decibels = []
    for number in range(CHECKED_IMAGES):
        exact, stored = (
            pixels_of(autoencoder, torch.from_numpy(read(folder / name, number)[None, :2].astype(np.float32)))
            for name in ("exact", "latents")
        )
        assert np.abs(exact - stored).max() <= 1
        error = np.square(exact - stored).mean()
        decibels.append(10 * math.log10(255**2 / error) if error else math.inf)
    assert min(decibels) > 55
    found = ShardSet.open(folder / "latents").manifest.details["precision"]
    assert found["num_images"] == CHECKED_IMAGES
    # The command encodes one by one here, batches above: a pixel more or less may be rounded the other way.
    assert (math.inf if found["psnr"] is None else found["psnr"]) == pytest.approx(min(decibels), abs=3)
    exact = ShardSet.open(folder / "exact").manifest.details["precision"]
    assert exact == {"num_images": CHECKED_IMAGES, "psnr": None}


def test_the_check_finds_a_type_that_is_too_coarse(folder, monkeypatch):
    monkeypatch.setitem(DTYPES, "fp8", torch.float8_e4m3fn)
    images = ImageDataset(ShardSet.open(folder / "images"))
    autoencoder = load_autoencoder(folder / "autoencoder")
    coarse, fine = (
        check_precision(MomentsEncoder(autoencoder, flips=False, dtype=dtype), images)["psnr"]
        for dtype in ("fp8", "fp16")
    )
    # 3 bits of mantissa instead of 10: errors 128 times as large, 42 dB, as far as rounding to pixels lets through.
    assert coarse < 45
    assert fine is None or fine > coarse + 10
    check = {"num_images": 8, "psnr": coarse}
    assert precision_line("fp8", check).startswith("warning: fp8 latents")
    assert not precision_line("fp16", check | {"psnr": 71.0}).startswith("warning")


def test_a_folder_that_is_no_encoding_is_refused(folder, tmp_path, monkeypatch):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"exists already and is no encoding to continue; choose another --out"):
        run(monkeypatch, folder, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


# --- Captions -----------------------------------------------------------------------------------------------


def test_captions_are_carried_along_and_latents_stay_the_same(folder, captioned, tmp_path, monkeypatch):
    run(monkeypatch, captioned, tmp_path / "out")
    without, plain, embedded = map(ShardSet.open, (folder / "latents", tmp_path / "out", captioned / "latents"))
    for number, caption in enumerate(CAPTIONS):
        members = embedded.read(number)
        assert ("text.npy" in members) == bool(caption)
        members.pop("text.npy", None)
        assert members == plain.read(number)
        assert members.pop("txt", b"").decode() == (caption or "")
        assert members == without.read(number)
    assert [shards.manifest.has_captions for shards in (without, plain, embedded)] == [False, True, True]
    assert ["text" in shards.manifest.details for shards in (without, plain, embedded)] == [False, False, True]


def test_embeddings_are_what_the_text_encoder_says_in_fp16(captioned):
    encoder = open_text_encoder(captioned / "text", max_tokens=6)
    dataset = LatentDataset(ShardSet.open(captioned / "latents"), with_text=True)
    assert dataset.shards.manifest.details["text"] == encoder.description
    for number, caption in enumerate(CAPTIONS):
        text, sample = encoder([caption or ""]), dataset[SampleRef(number, flip=False)]
        assert torch.equal(sample["text"], text.embeddings[0].half())
        assert torch.equal(sample["text_mask"], text.mask[0])


def test_each_caption_of_a_shard_is_encoded_once_and_counted(captioned, tmp_path, monkeypatch, capsys):
    encoded: list[str] = []
    encode_captions = TextEncoder.__call__

    def note(self: TextEncoder, captions: Sequence[str]) -> Text:
        encoded.extend(filter(None, captions))
        return encode_captions(self, captions)

    monkeypatch.setattr(TextEncoder, "__call__", note)
    run(monkeypatch, captioned, tmp_path / "out", *text_flags(captioned))
    assert encoded == [*CAPTIONS[:2], *CAPTIONS[4:6], *CAPTIONS[7:]]
    assert COUNTED in capsys.readouterr().out
    assert contents(tmp_path / "out") == contents(captioned / "latents")


def test_an_interrupted_run_with_text_ends_the_same(captioned, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    interrupt(captioned, out, monkeypatch, *text_flags(captioned))
    (out / SHARDS[1]).unlink()
    run(monkeypatch, captioned, out, *text_flags(captioned))
    assert "captions: 2 encoded now, 1 images have none; 1 are longer" in capsys.readouterr().out
    assert contents(out) == contents(captioned / "latents")


def test_a_folder_is_not_continued_with_another_text_encoder(captioned, tiny_text_encoder, monkeypatch):
    other = ("--text-encoder", tiny_text_encoder(seed=1), "--max-tokens", 6)
    for flags, difference in [
        ((), "text_encoder [0-9a-f]{64}, now None"),
        (text_flags(captioned, max_tokens=7), "max_tokens 6, now 7"),
        (other, "text_encoder [0-9a-f]{64}, now [0-9a-f]{64}"),
    ]:
        with pytest.raises(UserError, match=rf"exists already, of another encoding \({difference}\); choose another"):
            run(monkeypatch, captioned, captioned / "latents", *flags)


def test_captions_are_not_added_to_latents_that_were_begun_without_them(captioned, tmp_path, monkeypatch):
    """As by a program that did not carry captions along."""
    out = tmp_path / "out"
    run(monkeypatch, captioned, out)
    note = json.loads((out / "encoding.json").read_text())
    del note["captions"]
    (out / "encoding.json").write_text(json.dumps(note))
    with pytest.raises(UserError, match=r"of another encoding \(captions None, now True\); choose another --out"):
        run(monkeypatch, captioned, out)


def test_a_text_encoder_without_captions_is_refused(folder, captioned, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"images: holds no captions; leave --text-encoder out, or give captioned im"):
        run(monkeypatch, folder, tmp_path / "out", *text_flags(captioned))
    assert not (tmp_path / "out").exists()


def test_embeddings_that_fp16_cannot_hold_name_the_sample(captioned, tmp_path, monkeypatch):
    encode_captions = TextEncoder.__call__

    def enlarge(self: TextEncoder, captions: Sequence[str]) -> Text:
        embeddings, mask = encode_captions(self, captions)
        return Text(embeddings * (1e6 if "night" in captions else 1), mask)

    monkeypatch.setattr(TextEncoder, "__call__", enlarge)
    expected = r"shard-000003.tar, sample 0000000(09|10): the embedding of its caption reaches [0-9,]+, and fp16 ends"
    with pytest.raises(UserError, match=expected):
        run(monkeypatch, captioned, tmp_path / "out", *text_flags(captioned))


def test_a_caption_that_is_no_text_names_the_sample(folder, tmp_path, monkeypatch):
    make_images(tmp_path / "images", captions=[None] * 4 + ["x"] * 7)
    shard = tmp_path / "images" / SHARDS[1]
    content = shard.read_bytes()
    assert content.count(b"x" + bytes(511)) == 2
    shard.write_bytes(content.replace(b"x" + bytes(511), b"\xff" + bytes(511), 1))
    (tmp_path / "autoencoder").symlink_to(folder / "autoencoder")
    with pytest.raises(UserError, match=r"shard-000001.tar, sample 000000004: its caption is no UTF-8"):
        run(monkeypatch, tmp_path, tmp_path / "out")
