"""Text as networks read it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Text(NamedTuple):
    """Embeddings of captions, and which rows of them there are.

    Row 0 is the pooled one, the others are tokens. A caption that is not given has no row at all.
    """

    embeddings: Tensor  # fp32 (B, 1 + max_tokens, d)
    mask: Tensor  # bool (B, 1 + max_tokens)
