from __future__ import annotations

import io
import itertools
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep.images import encode_image
from data_prep.loader import (
    EpochOrder,
    ImageDataset,
    LatentDataset,
    SampleRef,
    SampleStream,
    TrainingOrder,
    read_batches,
    sequential_batches,
)
from data_prep.samples import load_moments, open_image
from data_prep.shards import ShardSet, ShardWriter
from ldgan.engine.cli import UserError

SHARD_SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=8)
SEEDS = st.integers(0, 2**32 - 1)


def order(shard_sizes: list[int], *, seed: int = 0, **changes: int) -> TrainingOrder:
    numbers = dict(micro_batch_size=2, num_micro_batches=2, rank=0, world_size=1, first_step=0)
    return TrainingOrder(shard_sizes, seed=seed, flips=True, **({"window_shards": 2} | numbers | changes))


def take(batches: TrainingOrder, num: int) -> list[list[SampleRef]]:
    return list(itertools.islice(batches, num))


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.fixture
def images(tmp_path: Path) -> ImageDataset:
    """Seven 4x4 images in shards of three: image i has red i, and a green ramp from left to right."""
    with ShardWriter(tmp_path / "images", "images", samples_per_shard=3) as writer:
        for index in range(7):
            pixels = np.zeros((4, 4, 3), np.uint8)
            pixels[..., 0], pixels[..., 1] = index, [0, 50, 100, 255]
            png = encode_image(Image.fromarray(pixels), "png", quality=95)
            writer.write({"png": png, "cls": str(10 * index).encode()})
    return ImageDataset(ShardSet.open(tmp_path / "images"))


def latents(folder: Path, array: np.ndarray, kind: str = "latents") -> LatentDataset:
    with ShardWriter(folder, kind) as writer:
        writer.write({"npy": npy(array)})
    return LatentDataset(ShardSet.open(folder))


# --- The order ----------------------------------------------------------------------------------------------


def epoch_of(sizes: list[int], seed: int, epoch: int, window_shards: int = 2) -> list[int]:
    stream = SampleStream(sizes, seed=seed, flips=False, window_shards=window_shards)
    return stream.read(epoch * sum(sizes), sum(sizes))[0].tolist()


@given(SHARD_SIZES, SEEDS, st.integers(0, 5), st.integers(1, 10))
def test_an_epoch_holds_every_sample_once_and_windows_keep_to_their_shards(sizes, seed, epoch, window_shards):
    epoch_order = EpochOrder(np.array([0, *itertools.accumulate(sizes)]), seed, epoch, window_shards)
    windows = [epoch_order.indices(window) for window in range(math.ceil(len(sizes) / window_shards))]
    assert np.concatenate(windows).tolist() == epoch_of(sizes, seed, epoch, window_shards)
    assert sorted(np.concatenate(windows).tolist()) == list(range(sum(sizes)))
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    shards_seen = [set(shard_of[window].tolist()) for window in windows]
    assert all(len(shards) <= window_shards for shards in shards_seen)
    assert sum(len(shards) for shards in shards_seen) == len(sizes)  # no shard in two windows


def test_epochs_and_seeds_differ_and_repeat_exactly():
    assert epoch_of([50, 50], 0, 0) == epoch_of([50, 50], 0, 0)
    assert len({tuple(epoch_of([50, 50], seed, epoch)) for seed in range(4) for epoch in range(4)}) == 16


def test_a_window_is_shuffled_uniformly():
    first = [epoch_of([2, 3], seed, 0)[0] for seed in range(2000)]
    counts = np.bincount(first, minlength=5)
    assert np.abs(counts - 400).max() < 5 * np.sqrt(2000 * 0.2 * 0.8)  # five standard deviations


@given(SHARD_SIZES, SEEDS)
def test_the_stream_is_the_epochs_end_to_end(sizes, seed):
    batches = order(sizes, seed=seed, micro_batch_size=3, num_micro_batches=1)
    three_epochs = [ref.index for batch in take(batches, sum(sizes)) for ref in batch]
    assert three_epochs == [index for epoch in range(3) for index in epoch_of(sizes, seed, epoch)]


@given(SHARD_SIZES, SEEDS, st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))
def test_a_step_sees_the_same_data_on_any_number_of_processes(sizes, seed, batch_size, per_rank, world_size):
    num_micro_batches = per_rank * world_size
    batching = dict(seed=seed, micro_batch_size=batch_size, num_micro_batches=num_micro_batches)
    alone = take(order(sizes, **batching), 4 * num_micro_batches)
    ranks = [order(sizes, **batching, rank=rank, world_size=world_size) for rank in range(world_size)]
    together = zip(*(take(rank, 4 * per_rank) for rank in ranks))
    assert [batch for batches in together for batch in batches] == alone


@given(SHARD_SIZES, SEEDS, st.integers(0, 30), st.integers(1, 10))
def test_a_resumed_stream_is_the_tail_of_the_uninterrupted_one(sizes, seed, first_step, window_shards):
    uninterrupted = take(order(sizes, seed=seed, window_shards=window_shards), 2 * (first_step + 3))
    resumed = take(order(sizes, seed=seed, window_shards=window_shards, first_step=first_step), 6)
    assert resumed == uninterrupted[2 * first_step :]


def test_resuming_far_out_costs_nothing():
    far = order([1000] * 50, first_step=10**12)
    assert len(take(far, 1)[0]) == 2


def test_about_half_of_the_positions_flip_and_none_when_flips_are_off():
    refs = [ref for batch in take(order([100]), 5000) for ref in batch]
    assert abs(sum(ref.flip for ref in refs) / len(refs) - 0.5) < 0.025  # five standard deviations
    first, second = ([ref.flip for ref in epoch] for epoch in (refs[:100], refs[100:200]))
    assert first != second
    plain = TrainingOrder(
        [100],
        micro_batch_size=10,
        num_micro_batches=1,
        rank=0,
        world_size=1,
        seed=0,
        first_step=0,
        flips=False,
    )
    assert not any(ref.flip for batch in take(plain, 30) for ref in batch)


def test_each_sample_flips_in_half_of_the_epochs_whatever_it_did_before():
    num_samples, num_epochs = 50, 2000
    stream = SampleStream([20, 30], seed=0, flips=True)
    flips = np.empty((num_epochs, num_samples), bool)
    for epoch in range(num_epochs):
        indices, of_epoch = stream.read(epoch * num_samples, num_samples)
        flips[epoch, indices] = of_epoch
    five_deviations = 5 * np.sqrt(0.25 / num_epochs)
    assert np.abs(flips.mean(axis=0) - 0.5).max() < five_deviations
    assert np.abs((flips[1:] == flips[:-1]).mean(axis=0) - 0.5).max() < five_deviations


def test_orders_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="3 micro-batches cannot be shared by 2 processes"):
        order([5], num_micro_batches=3, world_size=2)
    with pytest.raises(ValueError, match="no samples"):
        order([])


# --- The data -----------------------------------------------------------------------------------------------


def test_pixels_are_mapped_to_minus_one_to_one_and_flips_mirror(images):
    plain, mirrored = images[SampleRef(3, flip=False)], images[SampleRef(3, flip=True)]
    assert plain["label"] == 30
    assert plain["image"].dtype == torch.float32
    torch.testing.assert_close(plain["image"][0], torch.full((4, 4), 3 / 127.5 - 1))
    torch.testing.assert_close(plain["image"][1, 0], torch.tensor([0.0, 50.0, 100.0, 255.0]) / 127.5 - 1)
    assert (plain["image"].min(), plain["image"].max()) == (-1, 1)
    assert torch.equal(mirrored["image"], plain["image"].flip(-1))


def test_moments_are_split_into_mean_and_std(tmp_path):
    moments = np.arange(2 * 3 * 2 * 2, dtype=np.float16).reshape(6, 2, 2)
    dataset = latents(tmp_path / "set", moments)
    sample = dataset[SampleRef(0, flip=False)]
    assert sample["label"] == -1
    assert sample["mean"].dtype == sample["std"].dtype == torch.float32
    np.testing.assert_array_equal(sample["mean"], moments[:3])
    np.testing.assert_array_equal(sample["std"], moments[3:])
    with pytest.raises(ValueError, match="no latents of mirrored images"):
        dataset[SampleRef(0, flip=True)]


def test_a_flip_takes_the_moments_of_the_mirrored_image(tmp_path):
    both = np.random.default_rng(0).standard_normal((2, 4, 3, 3)).astype(np.float32)
    dataset = latents(tmp_path / "set", both)
    for flip in (False, True):
        sample = dataset[SampleRef(0, flip)]
        np.testing.assert_array_equal(np.concatenate([sample["mean"], sample["std"]]), both[int(flip)])


def test_pickles_are_not_loaded(tmp_path):
    dataset = latents(tmp_path / "set", np.array([{"an": "object"}], dtype=object))
    with pytest.raises(UserError, match=r"sample 000000000 cannot .* \(ValueError: an array of Python objects"):
        dataset[SampleRef(0, flip=False)]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_that_goes_missing_in_the_middle_of_training_ends_it_by_name(tmp_path, num_workers):
    with ShardWriter(tmp_path / "set", "images", samples_per_shard=2) as writer:
        for _ in range(4):
            writer.write({"png": encode_image(Image.new("RGB", (8, 8)), "png", 95)})
    dataset = ImageDataset(ShardSet.open(tmp_path / "set"))
    (tmp_path / "set" / "shard-000001.tar").unlink()
    batches = read_batches(dataset, order([2, 2], window_shards=1), num_workers)
    with pytest.raises(UserError, match=r"/set/shard-000001.tar is missing or damaged \(.*No such file.*shards again$"):
        list(itertools.islice(batches, 2))


@pytest.mark.parametrize(
    ("array", "details", "complaint"),
    [
        (np.zeros((2, 2)), {}, r"no moments: an array of float64 of shape \(2, 2\)"),
        (np.zeros((3, 2, 2)), {}, r"no moments: an array of float64 of shape \(3, 2, 2\)"),
        (np.zeros((4, 2, 2), dtype="M8[s]"), {}, "no moments: an array of datetime64"),
        (np.zeros((1, 4, 2, 2)), {}, "moments of 1 images instead of one and its mirror image"),
        (np.zeros((4, 2, 2)), {"flips": True}, "no moments of the mirror image, which the manifest promises"),
        (np.zeros((4, 2, 2)), {"latent_shape": [2, 4, 4]}, r"not of latents \(2, 4, 4\) as in the manifest"),
    ],
)
def test_arrays_that_are_no_moments_are_refused(array, details, complaint):
    buffer = io.BytesIO()
    np.save(buffer, array)
    with pytest.raises(ValueError, match=complaint):
        load_moments({"npy": buffer.getvalue()}, details)


def test_an_image_of_another_size_than_the_manifest_says_is_not_decoded():
    """Else a few kilobytes could take the memory of an image of 10^8 pixels."""
    content = encode_image(Image.new("RGB", (9, 8)), "png", 95)
    with pytest.raises(ValueError, match="9 x 8 pixels, not 8 x 8 as in the manifest"):
        open_image({"png": content}, 8)
    assert open_image({"png": content}, None).size == (9, 8)


def test_a_png_that_is_called_jpg_is_refused_by_name(tmp_path):
    with ShardWriter(tmp_path / "set", "images") as writer:
        writer.write({"jpg": encode_image(Image.new("RGB", (8, 8)), "png", 95)})
    dataset = ImageDataset(ShardSet.open(tmp_path / "set"))
    with pytest.raises(UserError, match=r"shard-000000.tar, sample 000000000 cannot be decoded \(Unidentified"):
        dataset[SampleRef(0, flip=False)]


def test_a_set_of_the_wrong_kind_is_refused(tmp_path, images):
    with pytest.raises(UserError, match="holds images, but latents are needed"):
        LatentDataset(images.shards)
    with pytest.raises(UserError, match="holds images, but latents are needed"):
        latents(tmp_path / "set", np.zeros(1), kind="images")


# --- Text ---------------------------------------------------------------------------------------------------

TEXT = {"max_tokens": 3, "dim": 2}


def captioned(folder: Path, *texts: np.ndarray | None, text: object = TEXT) -> ShardSet:
    """Latents of zeros with these embeddings of captions; ``text`` is what the manifest says of them."""
    details = {"text": text} if text is not None else {}
    with ShardWriter(folder, "latents", details=details) as writer:
        for rows in texts:
            writer.write({"npy": npy(np.zeros((2, 1, 1)))} | ({"text.npy": npy(rows)} if rows is not None else {}))
    return ShardSet.open(folder)


def test_texts_are_padded_and_a_mask_says_which_rows_there_are(tmp_path):
    two, four = np.array([[1, 2], [3, 4]], np.float16), np.arange(1, 9, dtype=np.float16).reshape(4, 2)
    shards = captioned(tmp_path / "set", two, None, four)
    (batch,) = sequential_batches(LatentDataset(shards, with_text=True), 3)
    expected = np.zeros((3, 4, 2), np.float16)
    expected[0, :2], expected[2] = two, four
    assert batch["text"].dtype == torch.float16
    np.testing.assert_array_equal(batch["text"], expected)
    assert batch["text_mask"].tolist() == [[True, True, False, False], [False] * 4, [True] * 4]
    assert batch["mean"].shape == (3, 1, 1, 1)
    assert set(LatentDataset(shards)[SampleRef(0, flip=False)]) == {"mean", "std", "label"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.zeros((2, 3), np.float16), r"text of float16 \(2, 3\), not float16 \(2 to 4, 2\)"),
        (np.zeros((5, 2), np.float16), r"text of float16 \(5, 2\), not"),
        (np.zeros((1, 2), np.float16), r"text of float16 \(1, 2\), not"),
        (np.zeros((2, 2), np.float32), r"text of float32 \(2, 2\), not"),
        (np.array([[0, 1], [np.nan, 0]], np.float16), "text that is not finite"),
        (np.array([["x", {}]], object), "an array of Python objects"),
    ],
    ids=["dimension", "too many rows", "no token", "type", "NaN", "pickle"],
)
def test_damaged_texts_name_the_sample(tmp_path, rows, message):
    dataset = LatentDataset(captioned(tmp_path / "set", np.zeros((2, 2), np.float16), rows), with_text=True)
    assert dataset[SampleRef(0, flip=False)]["text_mask"].sum() == 2
    with pytest.raises(
        UserError, match=rf"shard-000000.tar, sample 000000001 cannot be decoded \(ValueError: {message}"
    ):
        dataset[SampleRef(1, flip=False)]


def test_text_that_is_not_there_is_refused_at_once(tmp_path):
    with pytest.raises(UserError, match=r"holds no embeddings of captions; encode captioned images with --text-enc"):
        LatentDataset(captioned(tmp_path / "none", None, text=None), with_text=True)
    for number, text in enumerate(([], {"dim": 2}, {"max_tokens": 3, "dim": 0}, {"max_tokens": True, "dim": 2})):
        with pytest.raises(UserError, match=r'"text" is damaged in its manifest; restore it or encode again'):
            LatentDataset(captioned(tmp_path / str(number), None, text=text), with_text=True)


# --- The batches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_batches_follow_the_order_whatever_the_workers(images, num_workers):
    batches = read_batches(images, order(images.shards.shard_sizes), num_workers)
    for refs, batch in zip(take(order(images.shards.shard_sizes), 6), batches):
        assert batch["label"].tolist() == [10 * ref.index for ref in refs]
        assert torch.equal(batch["image"], torch.stack([images[ref]["image"] for ref in refs]))


def test_loading_leaves_the_global_random_generator_alone(images):
    before = torch.get_rng_state()
    next(read_batches(images, order(images.shards.shard_sizes), num_workers=0))
    assert torch.equal(torch.get_rng_state(), before)


@settings(max_examples=30)
@given(st.integers(1, 9), st.integers(1, 5), st.none() | st.integers(1, 9))
def test_sequential_batches_give_every_sample_to_one_rank(batch_size, world_size, limit):
    class Indices(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 7

        def __getitem__(self, ref: SampleRef) -> int:
            assert not ref.flip
            return ref.index

    seen = []
    for rank in range(world_size):
        batches = list(
            sequential_batches(Indices(), batch_size, rank=rank, world_size=world_size, limit=limit)  # type: ignore
        )
        assert all(len(batch) == batch_size for batch in batches[:-1])
        seen += [index for batch in batches for index in batch.tolist()]
    assert seen == list(range(min(limit or 7, 7)))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_corrupt_image_is_named_in_one_line(tmp_path, num_workers):
    with ShardWriter(tmp_path / "set", "images") as writer:
        writer.write({"png": b"not a png"})
    dataset = ImageDataset(ShardSet.open(tmp_path / "set"))
    with pytest.raises(UserError) as caught:
        next(sequential_batches(dataset, 1, num_workers=num_workers))
    shard = tmp_path / "set" / "shard-000000.tar"
    assert str(caught.value).startswith(f"{shard}, sample 000000000 cannot be decoded")
    assert "\n" not in str(caught.value)


class Signalled(ImageDataset):
    """Is sent a scheduler's notice, alone and with its process group, while it reads."""

    def __getitem__(self, ref: SampleRef) -> dict[str, torch.Tensor | int]:
        os.killpg(os.getpgid(0), signal.SIGUSR1)
        return super().__getitem__(ref) | {"group": os.getpgid(0)}


def test_workers_outlive_what_a_scheduler_sends_to_all_processes(images: ImageDataset) -> None:
    batches = list(sequential_batches(Signalled(images.shards), 4, num_workers=1))
    assert torch.cat([batch["label"] for batch in batches]).tolist() == [0, 10, 20, 30, 40, 50, 60]
    assert os.getpgid(0) not in torch.cat([batch["group"] for batch in batches]).tolist()  # a group of their own
