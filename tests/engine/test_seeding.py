"""Seeding: streams depend on their keys alone, samples on their seeds alone."""

from __future__ import annotations

import pytest
import torch

from ldgan.engine.seeding import generator, noise_from_seeds


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


def test_global_random_state_is_neither_read_nor_changed() -> None:
    torch.manual_seed(1)
    first = noise_from_seeds([3], "noise", "cpu")((2,))
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))
    assert torch.equal(first, noise_from_seeds([3], "noise", "cpu")((2,)))


def test_a_seed_gives_the_same_sample_in_any_batch() -> None:
    together = noise_from_seeds([5, 6, 7], "latent", "cpu")((4, 8, 8))
    for row, seed in enumerate([5, 6, 7]):
        assert torch.equal(together[row], noise_from_seeds([seed], "latent", "cpu")((4, 8, 8))[0])
    assert torch.equal(together.flip(0), noise_from_seeds([7, 6, 5], "latent", "cpu")((4, 8, 8)))
    assert not torch.equal(together, noise_from_seeds([5, 6, 7], "mapping", "cpu")((4, 8, 8)))
    assert len(together.flatten(1).unique(dim=0)) == 3


def test_samples_are_standard_normal() -> None:
    noise = noise_from_seeds(range(2_000), "noise", "cpu")((16,))
    standard_error = 1 / noise.numel() ** 0.5
    assert abs(noise.mean()) < 5 * standard_error
    assert abs(noise.var() - 1) < 5 * 2**0.5 * standard_error
