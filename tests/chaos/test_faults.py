"""A process of two that is lost, and another number of them: see ``faults.py``."""

from __future__ import annotations

import io
import itertools
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_prep.loader import LatentDataset, TrainingOrder, sequential_batches
from data_prep.shards import ShardSet, ShardWriter
from ldgan.engine.cli import UserError

SCRIPT = Path(__file__).with_name("faults.py")


def test_a_lost_process_ends_the_others_and_another_number_of_processes_goes_on() -> None:
    command = [sys.executable, SCRIPT, "--stages", "autoencoder"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("ended after") == 2
    assert result.stdout.count("tensors differ by") == 2


@pytest.mark.parametrize("num_micro_batches", [(2, 2), (2, 4), (4, 8)])
def test_every_sample_is_seen_once_an_epoch_when_the_number_of_processes_changes_in_it(
    num_micro_batches: tuple[int, int],
) -> None:
    batch_size, num_samples, changes = 8, 56, [(2, 0, 3), (1, 3, 5), (2, 5, 7)]  # processes, first step, last + 1
    seen = [0] * num_samples
    for number, (world_size, first, last) in zip(itertools.cycle(num_micro_batches), changes):
        for rank in range(world_size):
            order = TrainingOrder(
                [20, 10, 26],
                micro_batch_size=batch_size // number,
                num_micro_batches=number,
                rank=rank,
                world_size=world_size,
                seed=0,
                first_step=first,
                flips=False,
            )
            for refs in itertools.islice(order, (last - first) * number // world_size):
                for ref in refs:
                    seen[ref.index] += 1
    assert seen == [1] * num_samples


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_latents_that_are_not_finite_are_named_before_anything_learns_from_them(tmp_path: Path, value: float) -> None:
    moments = np.ones((2, 2, 2), np.float16)
    with ShardWriter(tmp_path / "set", "latents", samples_per_shard=2, details={"latent_shape": [1, 2, 2]}) as writer:
        for number in range(4):
            moments[0, 1, 1] = value if number == 3 else number
            writer.write({"npy": array_bytes(moments)})
    batches = sequential_batches(LatentDataset(ShardSet.open(tmp_path / "set")), 3)
    assert next(batches)["mean"][:, 0, 1, 1].tolist() == [0, 1, 2]
    message = (
        f"{tmp_path / 'set' / 'shard-000001.tar'}, sample 000000003 cannot be decoded (ValueError: moments that are not"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        next(batches)


def array_bytes(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()
