"""Epochs are exact, whatever the shards, processes and workers; and how far their order is from a true permutation."""

from __future__ import annotations

import io
import itertools
import math
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, get_worker_info

from data_prep.loader import LatentDataset, SampleRef, SampleStream, TrainingOrder, read_batches
from data_prep.shards import Manifest, ShardInfo, ShardSet, ShardWriter

SHARD_SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=40)
SEEDS = st.integers(0, 2**32 - 1)
RANKS = st.integers(1, 16)
WORKERS = st.integers(0, 4)


def order_of(sizes: Sequence[int], rank: int, world_size: int, **changes: int) -> TrainingOrder:
    """One rank's order, of one micro-batch of two samples for each rank and step unless told otherwise."""
    numbers = {"micro_batch_size": 2, "num_micro_batches": world_size, "seed": 0, "first_step": 0} | changes
    return TrainingOrder(sizes, rank=rank, world_size=world_size, flips=True, **numbers)


def steps_of(sizes: Sequence[int], world_size: int, num_steps: int, **changes: int) -> list[list[SampleRef]]:
    """The samples of each step over all ranks, in the order of the stream."""
    per_rank = changes.get("num_micro_batches", world_size) // world_size
    orders = [order_of(sizes, rank, world_size, **changes) for rank in range(world_size)]
    ranks = [list(itertools.islice(order, num_steps * per_rank)) for order in orders]
    turns = [[rank[turn] for rank in ranks] for turn in range(num_steps * per_rank)]
    micro_batches = [turns[first : first + per_rank] for first in range(0, len(turns), per_rank)]
    return [[ref for turn in step for batch in turn for ref in batch] for step in micro_batches]


def naive_stream(sizes: Sequence[int], seed: int, window_shards: int = 16) -> Iterator[SampleRef]:
    """The stream, one sample after the other from position 0 on, as runs have seen it from the first version."""
    first_indices = np.cumsum([0, *sizes])
    for epoch in itertools.count():
        shards = np.random.default_rng([seed, epoch, 0, 0]).permutation(len(sizes))
        for window in range(math.ceil(len(sizes) / window_shards)):
            of_window = shards[window * window_shards : (window + 1) * window_shards]
            indices = np.concatenate([np.arange(first_indices[shard], first_indices[shard + 1]) for shard in of_window])
            order = np.random.default_rng([seed, epoch, window, 1]).permutation(indices)
            flips = np.random.default_rng([seed, epoch, window, 2]).random(len(indices)) < 0.5
            yield from map(SampleRef, order.tolist(), flips.tolist())


# --- Every sample once --------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(SHARD_SIZES, SEEDS, RANKS, st.integers(1, 5), st.integers(1, 3))
def test_after_any_number_of_steps_no_sample_is_ahead_of_another_by_more_than_one(
    sizes, seed, world_size, batch_size, per_rank
):
    num_samples, num_micro_batches = sum(sizes), world_size * per_rank
    num_steps = 2 * num_samples // (batch_size * num_micro_batches) + 2
    steps = steps_of(
        sizes, world_size, num_steps, seed=seed, micro_batch_size=batch_size, num_micro_batches=num_micro_batches
    )
    assert {len(step) for step in steps} == {batch_size * num_micro_batches}  # so no rank waits for a batch
    counts = np.zeros(num_samples, int)
    for step in steps:
        np.add.at(counts, [ref.index for ref in step], 1)
        assert counts.max() - counts.min() <= 1
    stream = [ref.index for step in steps for ref in step]
    for epoch in range(len(stream) // num_samples):
        assert sorted(stream[epoch * num_samples :][:num_samples]) == list(range(num_samples))


@settings(deadline=None, max_examples=60)
@given(SHARD_SIZES, SEEDS, RANKS, st.integers(1, 5))
def test_ranks_together_read_the_stream_of_seed_and_position_alone(sizes, seed, world_size, batch_size):
    num_steps = 2 * sum(sizes) // (batch_size * world_size) + 2
    steps = steps_of(sizes, world_size, num_steps, seed=seed, micro_batch_size=batch_size)
    together = [ref for step in steps for ref in step]
    assert together == list(itertools.islice(naive_stream(sizes, seed), len(together)))


@settings(deadline=None, max_examples=40)
@given(SHARD_SIZES, SEEDS, RANKS, RANKS, st.booleans(), st.integers(0, 10))
def test_a_run_that_goes_on_with_other_processes_takes_the_same_samples_in_the_same_steps(
    sizes, seed, before, after, one_each, first_step
):
    global_batch_size = before * after

    def steps(world_size: int, num_steps: int, first_step: int = 0) -> list[list[SampleRef]]:
        num_micro_batches = world_size if one_each else global_batch_size
        batching = {
            "micro_batch_size": global_batch_size // num_micro_batches,
            "num_micro_batches": num_micro_batches,
        }
        return steps_of(sizes, world_size, num_steps, seed=seed, first_step=first_step, **batching)

    assert steps(after, 2, first_step) == steps(before, first_step + 2)[first_step:]


@settings(deadline=None, max_examples=60)
@given(SHARD_SIZES, SEEDS, st.integers(1, 7), st.lists(st.tuples(st.integers(0, 300), st.integers(1, 40)), max_size=6))
def test_a_stream_can_be_read_at_any_position_in_any_turn(sizes, seed, window_shards, places):
    stream = SampleStream(sizes, seed=seed, flips=True, window_shards=window_shards)
    expected = list(itertools.islice(naive_stream(sizes, seed, window_shards), 340))
    for position, num in places:
        indices, flips = stream.read(position, num)
        assert list(map(SampleRef, indices.tolist(), flips.tolist())) == expected[position : position + num]


# --- With workers that really read --------------------------------------------------------------------------


class WhoReads(Dataset[tuple[int, int]]):
    """Tells which worker was asked for which sample."""

    def __getitem__(self, ref: SampleRef) -> tuple[int, int]:
        worker = get_worker_info()
        return ref.index, 0 if worker is None else worker.id


@settings(deadline=None, max_examples=8)
@given(SHARD_SIZES, RANKS, WORKERS)
def test_workers_take_turns_and_lose_nothing(sizes, world_size, num_workers):
    rank, num_batches = world_size - 1, 7
    order = order_of(sizes, rank, world_size)
    loader = DataLoader(WhoReads(), batch_sampler=order, num_workers=num_workers)
    for number, (refs, (indices, workers)) in enumerate(zip(itertools.islice(order, num_batches), loader)):
        assert indices.tolist() == [ref.index for ref in refs]
        assert set(workers.tolist()) == {number % max(1, num_workers)}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("samples_per_shard", [5, 12])  # three shards, and fewer shards than processes
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_with_workers_read_every_stored_sample_once_an_epoch(
    tmp_path: Path, num_workers: int, samples_per_shard: int, world_size: int
):
    """Labels and moments are the sample's number, those of the mirrored image -1 - number."""
    num_samples, num_epochs, batch_size = 12, 3, 2
    with ShardWriter(tmp_path / "set", "latents", samples_per_shard=samples_per_shard) as writer:
        for index in range(num_samples):
            plain_and_mirrored = np.array([index, -1 - index], np.float32).reshape(2, 1, 1, 1).repeat(2, axis=1)
            moments = io.BytesIO()
            np.save(moments, plain_and_mirrored)
            writer.write({"npy": moments.getvalue(), "cls": str(index).encode()})
    dataset = LatentDataset(ShardSet.open(tmp_path / "set"))
    refs = list(itertools.islice(naive_stream(dataset.shards.shard_sizes, seed=0), num_epochs * num_samples))
    counts = np.zeros((num_epochs, num_samples), int)
    for rank in range(world_size):
        order = order_of(dataset.shards.shard_sizes, rank, world_size, micro_batch_size=batch_size)
        num_batches = num_epochs * num_samples // (batch_size * world_size)
        batches = itertools.islice(read_batches(dataset, order, num_workers), num_batches)
        for position, batch in zip(order.positions(), batches):
            labels, flips = zip(*refs[position : position + batch_size])
            assert batch["label"].tolist() == list(labels)
            values = [-1 - label if flip else label for label, flip in zip(labels, flips)]
            assert batch["mean"].flatten().tolist() == values
            counts[position // num_samples, batch["label"].numpy()] += 1
    np.testing.assert_array_equal(counts, 1)


# --- At scale, from manifests alone -------------------------------------------------------------------------


def test_512_ranks_of_8_workers_share_an_epoch_of_100_000_shards():
    world_size, num_workers, batch_size = 512, 8, 256
    sizes = np.random.default_rng(0).integers(500, 1501, size=100_000)
    infos = tuple(ShardInfo(f"shard-{number:06d}.tar", int(size), 0, "") for number, size in enumerate(sizes))
    num_samples = int(sizes.sum())
    manifest = Manifest("latents", num_samples, infos, class_names=None, has_captions=False, seconds=0, details={})
    shards = ShardSet(Path("nowhere"), manifest)

    starts = [order_of(shards.shard_sizes, 0, 1, micro_batch_size=batch_size)]
    del starts
    stream = SampleStream(shards.shard_sizes, seed=0, flips=False)
    positions = [order_of([1], rank, world_size, micro_batch_size=batch_size).positions() for rank in range(world_size)]
    num_steps = math.ceil(num_samples / (world_size * batch_size))
    seen = np.zeros(num_samples, bool)
    num_read = 0
    num_batches = np.zeros((world_size, num_workers), int)
    for step in range(num_steps):
        batches = [stream.read(next(of_rank), batch_size)[0] for of_rank in positions]
        indices = np.concatenate(batches)[: num_samples - num_read]  # the last step reaches into the next epoch
        seen[indices] = True
        num_read += len(indices)
        num_batches[:, step % num_workers] += 1
    # As many reads as samples, and each sample among them: so each of them once.
    assert num_read == num_samples
    assert seen.all()
    assert num_batches.max() - num_batches.min() <= 1


def test_one_rank_of_512_takes_its_batches_from_that_stream():
    world_size, batch_size = 512, 256
    sizes = np.random.default_rng(0).integers(500, 1501, size=100_000).tolist()
    stream = SampleStream(sizes, seed=0, flips=True)
    for rank, step in [(0, 0), (511, 761), (300, 762), (7, 10**9)]:
        order = order_of(sizes, rank, world_size, micro_batch_size=batch_size, first_step=step)
        for turn, refs in enumerate(itertools.islice(order, 3)):
            indices, flips = stream.read(((step + turn) * world_size + rank) * batch_size, batch_size)
            assert refs == list(map(SampleRef, indices.tolist(), flips.tolist()))


def test_memory_is_a_windows_and_a_few_numbers_for_each_shard():
    def peak(num_shards: int) -> int:
        sizes = [100] * num_shards
        tracemalloc.start()
        stream = SampleStream(sizes, seed=0, flips=True)
        for position in range(0, 2 * sum(sizes), max(1, num_shards // 50) * 100):  # through two epochs
            stream.read(position, 64)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    window = 16 * 100 * 8
    assert peak(16) < 10 * window
    assert peak(100_000) - peak(16) < 100_000 * 80  # ten numbers


# --- Against a true permutation -----------------------------------------------------------------------------

SHARD_SIZE, WINDOW_SHARDS, BATCH_SIZE, NUM_EPOCHS = 32, 16, 32, 40  # batches that do not straddle windows


def epochs_of(num_shards: int) -> list[np.ndarray]:
    stream = SampleStream([SHARD_SIZE] * num_shards, seed=0, flips=False, window_shards=WINDOW_SHARDS)
    return [stream.read(epoch * stream.num_samples, stream.num_samples)[0] for epoch in range(NUM_EPOCHS)]


def permutations_of(num_shards: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.permutation(num_shards * SHARD_SIZE) for _ in range(NUM_EPOCHS)]


def windows_of(num_shards: int, window_shards: int) -> np.ndarray:
    """The number of shards of each window; the last window may have fewer than the others."""
    full, rest = divmod(num_shards, window_shards)
    return np.array([window_shards] * full + [rest] * (rest > 0))


def pairs_of_one_shard(epochs: list[np.ndarray]) -> float:
    """The share of a batch's pairs of samples that come from one shard, over all batches."""
    shards = np.sort(np.stack(epochs).reshape(-1, BATCH_SIZE) // SHARD_SIZE)
    return float(np.mean([(np.roll(shards, lag, axis=1) == shards).mean() for lag in range(1, BATCH_SIZE)]))


def neighbour_correlation(epochs: list[np.ndarray]) -> float:
    """Spearman's correlation between the index of a sample and that of the next one in the order."""
    standardised = [(epoch - epoch.mean()) / epoch.std() for epoch in epochs]
    return float(np.mean([(epoch[:-1] * epoch[1:]).mean() for epoch in standardised]))


@pytest.mark.parametrize("num_shards", [10, 100, 1000])
@pytest.mark.parametrize("window_shards", [WINDOW_SHARDS, 10**9])  # one window of all shards is a true permutation
def test_a_batch_is_a_fair_draw_from_the_shards_of_a_window(num_shards, window_shards):
    windows = windows_of(num_shards, window_shards)
    # Two of n samples of a window come from one shard of s samples with probability (s - 1) / (n - 1).
    probability = (windows / num_shards) @ ((SHARD_SIZE - 1) / (windows * SHARD_SIZE - 1))
    # Whether i and j share a shard says nothing of i and k: the pairs of a batch are uncorrelated.
    num_pairs = NUM_EPOCHS * num_shards * SHARD_SIZE // BATCH_SIZE * math.comb(BATCH_SIZE, 2)
    tolerance = 5 * math.sqrt(probability * (1 - probability) / num_pairs)
    epochs = epochs_of(num_shards) if window_shards == WINDOW_SHARDS else permutations_of(num_shards)
    assert pairs_of_one_shard(epochs) == pytest.approx(probability, abs=tolerance)


@pytest.mark.parametrize("num_shards", [10, 100, 1000])
@pytest.mark.parametrize("window_shards", [WINDOW_SHARDS, 10**9])
def test_neighbours_are_correlated_as_far_as_they_share_a_window(num_shards, window_shards):
    windows = windows_of(num_shards, window_shards)
    shares = windows / num_shards
    # An index is s * shard + place. Shards are drawn without replacement, so two different ones have a negative
    # covariance, and so have two places in one shard.
    of_shards = SHARD_SIZE**2 * (num_shards**2 - 1) / 12
    of_places = (SHARD_SIZE**2 - 1) / 12
    same_shard = (SHARD_SIZE - 1) / (windows * SHARD_SIZE - 1)
    covariance = same_shard * (of_shards - of_places / (SHARD_SIZE - 1)) - (1 - same_shard) * of_shards / (
        num_shards - 1
    )
    expected = shares @ covariance / (of_shards + of_places)
    # A correlation of n pairs has variance 1 / n, and a window's mean, of variance v, adds a square of 2 v^2.
    of_mean = (1 - shares) / windows
    variance = 1 / (num_shards * SHARD_SIZE) + shares**2 @ (2 * of_mean**2)
    epochs = epochs_of(num_shards) if window_shards == WINDOW_SHARDS else permutations_of(num_shards)
    assert neighbour_correlation(epochs) == pytest.approx(expected, abs=5 * math.sqrt(variance / NUM_EPOCHS))
    if len(windows) == 1:
        assert expected == pytest.approx(-1 / (num_shards * SHARD_SIZE - 1))
