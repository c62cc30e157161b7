"""Philox: the published generator's words; what is drawn depends on use, step, place and seed, and on nothing else."""

from __future__ import annotations

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ldgan.engine.philox import MASK, MULTIPLIERS, WEYL, Random, RandomRows, key_of, philox

WORDS = st.integers(0, MASK)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # kat_vectors of Random123, the authors' own implementation: philox4x32, 10 rounds
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((MASK,) * 4, (MASK,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers_of_the_published_generator(counter: tuple, key: tuple, expected: tuple) -> None:
    words = philox([torch.tensor([word]) for word in counter], [torch.tensor([word]) for word in key])
    assert [word.item() for word in words] == list(expected)


@given(st.tuples(WORDS, WORDS, WORDS, WORDS), st.tuples(WORDS, WORDS))
@settings(max_examples=200, deadline=None)
def test_products_that_wrap_at_64_bits_give_the_words_of_whole_numbers(counter: tuple, key: tuple) -> None:
    words = philox([torch.tensor([word]) for word in counter], key)
    assert [word.item() for word in words] == _philox_of_integers(counter, key)


def _philox_of_integers(counter: tuple[int, ...], key: tuple[int, ...]) -> list[int]:
    """Salmon et al., section 3.3, in Python's unbounded integers."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        high_0, low_0 = divmod(MULTIPLIERS[0] * a, 2**32)
        high_1, low_1 = divmod(MULTIPLIERS[1] * c, 2**32)
        a, b, c, d = high_1 ^ b ^ k, low_1, high_0 ^ d ^ m, low_0
        k, m = (k + WEYL[0]) % 2**32, (m + WEYL[1]) % 2**32
    return [a, b, c, d]


def test_streams_are_fixed_for_all_time() -> None:
    """Samples of a seed and resumed runs rely on it: SHA-256 of the names, the counter (place, draw, step, part)."""
    assert key_of(0, "generator") == (1587776460, 230371680)
    words = [word.item() for word in philox([torch.tensor([0]), 1, 5, 2], key_of(0, "generator"))]
    uniform = Random(key_of(0, "generator"), "cpu", step=5, part=2).uniform((4,))
    assert torch.equal(uniform, torch.tensor(words, dtype=torch.float64) / 2**32)


def test_normal_numbers_are_box_and_muller_of_the_words() -> None:
    a, b, c, d = Random(key_of("test"), "cpu").uniform((4,)).mul(2**32).tolist()
    half = torch.tensor([0.5], dtype=torch.float64)
    expected = []
    for first, second in ((a, b), (c, d)):
        radius = torch.sqrt(-2 * torch.log((first + half) / 2**32))
        angle = torch.tensor([2 * torch.pi * second / 2**32], dtype=torch.float64)
        expected += [radius * angle.cos(), radius * angle.sin()]
    torch.testing.assert_close(Random(key_of("test"), "cpu").normal((4,)), torch.cat(expected).float(), rtol=0, atol=0)


def test_normal_and_uniform_numbers_have_their_distributions() -> None:
    random = Random(key_of(1), "cpu")
    assert scipy.stats.kstest(random.normal((200_000,)).double(), "norm").pvalue > 1e-3
    assert scipy.stats.kstest(random.uniform((200_000,)), "uniform").pvalue > 1e-3


def _streams() -> dict[str, Random]:
    return {
        "one": Random(key_of(0, "a"), "cpu", step=1),
        "other seed": Random(key_of(1, "a"), "cpu", step=1),
        "other use": Random(key_of(0, "b"), "cpu", step=1),
        "other step": Random(key_of(0, "a"), "cpu", step=2),
        "other part": Random(key_of(0, "a"), "cpu", step=1, part=1),
    }


def test_streams_and_draws_of_a_stream_are_uncorrelated() -> None:
    streams = _streams()
    draws = [stream.normal((50_000,)) for stream in streams.values()] + [streams["one"].normal((50_000,))]
    off_diagonal = torch.corrcoef(torch.stack(draws)) - torch.eye(len(draws))
    assert off_diagonal.abs().max() < 5 / 50_000**0.5  # five standard errors


def test_numbers_do_not_depend_on_what_was_drawn_of_other_streams_or_of_torch() -> None:
    torch.manual_seed(0)
    first = Random(key_of(0), "cpu").normal((5,))
    torch.rand(3)
    assert torch.equal(first, Random(key_of(0), "cpu").normal((5,)))
    torch.manual_seed(0)
    untouched = torch.rand(3)
    torch.manual_seed(0)
    Random(key_of(0), "cpu").normal((5,))
    assert torch.equal(untouched, torch.rand(3))


def test_a_step_that_is_a_tensor_draws_what_the_number_draws() -> None:
    step = torch.tensor(7)
    assert torch.equal(
        Random(key_of(0), "cpu", step=step).normal((3, 5)), Random(key_of(0), "cpu", step=7).normal((3, 5))
    )
    step += 1  # as a replayed step does
    assert torch.equal(
        Random(key_of(0), "cpu", step=step).normal((3, 5)), Random(key_of(0), "cpu", step=8).normal((3, 5))
    )


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5), st.integers(1, 9))
@settings(max_examples=50, deadline=None)
def test_a_row_depends_on_its_seed_alone(seeds: list[int], size: int) -> None:
    together = RandomRows(seeds, "latent", "cpu")
    first, second = together.normal((size,)), together.normal((2, size))
    for row, seed in enumerate(seeds):
        alone = RandomRows([seed], "latent", "cpu")
        assert torch.equal(first[row], alone.normal((size,))[0])
        assert torch.equal(second[row], alone.normal((2, size))[0])


def test_seeds_that_differ_in_the_upper_half_alone_give_other_numbers() -> None:
    rows = RandomRows([3, 3 + 2**32, -1, 2**32 - 1], "latent", "cpu").normal((4,))
    assert len(rows.unique(dim=0)) == 4
    assert not torch.equal(rows, RandomRows([3, 3 + 2**32, -1, 2**32 - 1], "style", "cpu").normal((4,)))


def test_integers_and_choices_are_drawn_in_proportion() -> None:
    random = Random(key_of(3), "cpu")
    _expect_counts(random.integers(1, 5, (40_000,)) - 1, torch.tensor([1.0, 1.0, 1.0, 1.0]))
    weights = torch.tensor([1.0, 0.0, 2.0, 5.0], dtype=torch.float64)
    _expect_counts(random.choices(weights, 40_000), weights)


def _expect_counts(drawn: Tensor, weights: Tensor) -> None:
    counts = drawn.bincount(minlength=len(weights))
    expected = weights / weights.sum() * len(drawn)
    assert counts[expected == 0].sum() == 0
    assert scipy.stats.chisquare(counts[expected > 0], expected[expected > 0]).pvalue > 1e-3


def test_a_seed_gives_the_same_sample_in_any_batch() -> None:
    together = RandomRows([5, 6, 7], "latent", "cpu").normal((4, 8, 8))
    assert torch.equal(together.flip(0), RandomRows([7, 6, 5], "latent", "cpu").normal((4, 8, 8)))
    assert len(together.flatten(1).unique(dim=0)) == 3


def test_rows_of_many_seeds_are_standard_normal_and_uncorrelated() -> None:
    rows = RandomRows(range(2_000), "noise", "cpu").normal((16,))
    assert scipy.stats.kstest(rows.flatten().double(), "norm").pvalue > 1e-3
    neighbours = torch.corrcoef(torch.stack([rows[:-1].flatten(), rows[1:].flatten()]))[0, 1]
    assert neighbours.abs() < 5 / rows.numel() ** 0.5
