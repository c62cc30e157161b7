"""What samples should show: a class, a text, or both."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from autoencoder.models.text import Text
from ldgan.engine.philox import Random


class Conditions(NamedTuple):
    """What each of B samples should show; None for what a network does not know."""

    labels: Tensor | None = None  # int64 (B,) in 0..num_classes, where num_classes says "no label"
    text: Text | None = None  # B texts, some of which may have no rows

    def given(self) -> dict[str, Any]:
        """Those that there are, as a network's arguments by name."""
        return {name: value for name, value in self._asdict().items() if value is not None}

    def null(self, null_label: int) -> Conditions:
        """The same with neither label nor text: what a model draws from where it is told nothing."""
        labels = torch.full_like(self.labels, null_label) if self.labels is not None else None
        return Conditions(labels, without_rows(self.text) if self.text is not None else None)

    def followed_by(self, others: Conditions) -> Conditions:
        """Those of 2B samples: these, and the same number of others of the same kind."""
        labels = text = None
        if self.labels is not None and others.labels is not None:
            labels = torch.cat([self.labels, others.labels])
        if self.text is not None and others.text is not None:
            text = Text(*(torch.cat(pair) for pair in zip(self.text, others.text)))
        return Conditions(labels, text)


class Prompts(NamedTuple):
    """Captions as people wrote them, and as networks read them."""

    captions: list[str]
    text: Text  # as many

    def of(self, numbers: list[int]) -> Text:
        """The texts of samples with these numbers, (len(numbers), ...): prompts are gone through again and again."""
        rows = torch.tensor([number % len(self.captions) for number in numbers], device=self.text.mask.device)
        return Text(self.text.embeddings[rows], self.text.mask[rows])


def no_text(num: int, dim: int, device: torch.device | str) -> Text:
    """``num`` texts without any row, of dimension ``dim``."""
    return Text(torch.zeros(num, 1, dim, device=device), torch.zeros(num, 1, dtype=torch.bool, device=device))


def without_rows(text: Text) -> Text:
    """As many texts of the same shape, none of which has a row."""
    return Text(text.embeddings, torch.zeros_like(text.mask))


def drop_text(text: Text, probability: float, random: Random) -> Text:
    """Leave out a share of the texts: they keep no row.

    So one network learns p(x_0 | text) and p(x_0) (Ho and Salimans, arXiv 2207.12598, Algorithm 1).
    """
    kept = random.uniform((len(text.mask),)) >= probability
    return Text(text.embeddings, text.mask & kept[:, None])


def mismatched(text: Text) -> tuple[Text, Tensor]:
    """The text of the next sample for each, round the batch, and which of them differ, bool (B,).

    Where either is absent, or both say the same, there is nothing that does not match. (Reed et al., arXiv
    1605.05396, draw the other text from the data; a batch is such a draw, already shuffled.)
    """
    embeddings, mask = clear(text)
    other = Text(*(tensor.roll(1, dims=0) for tensor in text))
    same = (embeddings == embeddings.roll(1, dims=0)).flatten(1).all(dim=1)
    return other, mask[:, 0] & other.mask[:, 0] & ~same


def clear(text: Text) -> Text:
    """The same with zeros in the rows that are not there, whatever was stored in them."""
    return Text(text.embeddings.masked_fill(~text.mask[:, :, None], 0.0), text.mask)
