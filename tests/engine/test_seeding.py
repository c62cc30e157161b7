"""Seeding: streams depend on their keys alone, samples on their seeds alone."""

from __future__ import annotations

import pytest
import torch

from ldgan.engine.seeding import generator


def test_seed_is_fixed_for_all_time() -> None:
    """Checkpoints and published samples rely on it: SHA-256 of the keys' Python list, first 63 bits."""
    assert generator("cpu", 0, "noise", 5).initial_seed() == 5650437604623213147


@pytest.mark.parametrize("other", [(1, "noise", 5), (0, "time", 5), (0, "noise", 6), ("0", "noise", 5), (0, "noise")])
def test_every_key_counts(other: tuple) -> None:
    assert generator("cpu", *other).initial_seed() != generator("cpu", 0, "noise", 5).initial_seed()


def test_keys_do_not_run_together() -> None:
    assert generator("cpu", "a", "bc").initial_seed() != generator("cpu", "ab", "c").initial_seed()
    assert generator("cpu", 1, 23).initial_seed() != generator("cpu", 12, 3).initial_seed()


def test_integers_of_other_types_are_the_same_key() -> None:
    assert generator("cpu", torch.tensor(3)).initial_seed() == generator("cpu", 3).initial_seed()


def test_streams_of_neighbouring_keys_are_uncorrelated() -> None:
    streams = torch.stack([torch.randn(20_000, generator=generator("cpu", 0, step)) for step in range(6)])
    off_diagonal = torch.corrcoef(streams) - torch.eye(6)
    assert off_diagonal.abs().max() < 5 / 20_000**0.5  # five standard errors
