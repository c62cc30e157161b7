"""Random numbers as a function of what they are for and where they stand: Philox 4x32-10, computed where they are used.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). A counter of four words and a key of two are
mixed in ten rounds to four random words; nothing is remembered from one number to the next. So a number depends on
neither the device nor the batch that it is drawn in, and a step that is recorded and replayed draws anew when its
number, a tensor, goes up. PyTorch's own generators have none of these three, which is why this is not left to them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

NUM_ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # what the key's words grow by from round to round
MASK = 0xFFFFFFFF  # words of 32 bits are kept in int64, which every device can multiply

Word = int | Tensor
"""32 bits: a number, or int64 tensors that broadcast with the other words'."""


def philox(counter: Sequence[Word], key: Sequence[Word]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words, each int64 in 0..2^32 - 1, for ``counter`` (four words) and ``key`` (two words)."""
    a, b, c, d = counter
    key_0, key_1 = key
    for _ in range(NUM_ROUNDS):
        # Products wrap at 64 bits, which leaves both halves right; the sign is masked off behind the shift.
        first, second = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b = ((second >> 32) & MASK) ^ b ^ key_0, second & MASK
        c, d = ((first >> 32) & MASK) ^ d ^ key_1, first & MASK
        key_0, key_1 = (key_0 + WEYL[0]) & MASK, (key_1 + WEYL[1]) & MASK
    return a, b, c, d  # type: ignore[return-value]


def key_of(*names: int | str) -> tuple[int, int]:
    """A key, two words, that says what numbers are for: a hash of ``names``."""
    digest = hashlib.sha256(repr(names).encode()).digest()
    return int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:8], "big")


class Random:
    """A stream of random numbers: those of a draw depend on the stream, on the draw's number and on their place in it.

    Normal numbers are computed in float64 and rounded, so that devices agree in every bit, but for about one number
    in 10^8 where the last bits of their logarithms differ.
    """

    def __init__(self, key: tuple[Word, Word], device: torch.device | str, *, step: Word = 0, part: Word = 0) -> None:
        """``step`` and ``part`` set streams of one key apart; tensors among the words must be on ``device``."""
        self._key, self._step, self._part = key, step, part
        self.device = torch.device(device)
        self._num_draws = 0

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers, fp32 (Box and Muller, 1958: two of two words)."""
        a, b, c, d = (word.double() for word in self._words(shape))
        pairs = []
        for first, second in ((a, b), (c, d)):
            radius = torch.sqrt(-2.0 * torch.log((first + 0.5) / 2**32))
            angle = second * (2.0 * math.pi / 2**32)
            pairs += [radius * torch.cos(angle), radius * torch.sin(angle)]
        return self._laid_out(pairs, shape).float()

    def normal_like(self, x: Tensor) -> Tensor:
        """The same in the shape and dtype of ``x``."""
        return self.normal(x.shape).to(x.dtype)

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """Numbers in [0, 1), float64: multiples of 2^-32."""
        return self._laid_out([word.double() / 2**32 for word in self._words(shape)], shape)

    def integers(self, low: int, high: int, shape: Sequence[int]) -> Tensor:
        """Numbers low..high - 1, int64; of ranges far below 2^32 all are equally likely."""
        return low + (self.uniform(shape) * (high - low)).long()

    def choices(self, weights: Tensor, num: int) -> Tensor:
        """Indices 0..K - 1, int64 (num,), in proportion to ``weights``, float64 (K,) on the stream's device."""
        bounds = weights.cumsum(0)
        chosen = torch.searchsorted(bounds, self.uniform((num,)) * bounds[-1], right=True)
        return chosen.clamp(max=len(weights) - 1)

    def _words(self, shape: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Four words for each four numbers of a draw."""
        places = torch.arange(-(-math.prod(shape) // 4), device=self.device)
        self._num_draws += 1
        return philox((places, self._num_draws, self._step, self._part), self._key)

    def _laid_out(self, quarters: list[Tensor], shape: Sequence[int]) -> Tensor:
        """Four numbers a place, in the order of the places, as (*shape) or, where words have rows, (B, *shape)."""
        numbers = torch.stack(quarters, dim=-1).flatten(-2)
        return numbers[..., : math.prod(shape)].reshape(*numbers.shape[:-1], *shape)


class RandomRows(Random):
    """Streams side by side, one for each of B seeds: draws are (B, *shape), and row i depends on seed i alone."""

    def __init__(self, seeds: Sequence[int], use: str, device: torch.device | str) -> None:
        """``use`` says what the seeds, whole numbers of 64 bits, serve for."""
        words = torch.tensor([[seed & MASK, seed >> 32 & MASK] for seed in seeds], device=device)
        super().__init__(key_of(use), device, step=words[:, :1], part=words[:, 1:])
