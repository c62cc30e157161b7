"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import pytest
import torch

from autoencoder.models.autoencoder import AutoencoderKL
from autoencoder.models.config import AutoencoderConfig


class AutoencoderFactory(Protocol):
    """Builds a tiny autoencoder: f2, 2 latent channels, latent statistics 0 and 1, but for ``overrides``."""

    def __call__(self, *, seed: int = 0, **overrides: Any) -> AutoencoderKL: ...


class TextEncoderFactory(Protocol):
    """Writes a folder with a tiny random text encoder that knows `WORDS`; ``kind`` is bert, clip or t5.

    Two layers, 8 numbers wide, reading 40 tokens at most (T5: any number).
    """

    def __call__(self, kind: str = "bert", *, seed: int = 0) -> Path: ...


WORDS = ("a", "red", "green", "heart", "tree", "of", "the", "night")


@pytest.fixture(scope="session")
def tiny_text_encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoderFactory:
    pytest.importorskip("transformers", reason="text encoders need the extra ldgan[text]")
    return lambda kind="bert", *, seed=0: _make_text_encoder(tmp_path_factory.mktemp(kind), kind, seed)


def _make_text_encoder(folder: Path, kind: str, seed: int) -> Path:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: number for number, word in enumerate(("[PAD]", "[UNK]", "[START]", "[END]", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "$A [END]" if kind == "t5" else "[START] $A [END]"
    tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=[("[START]", 2), ("[END]", 3)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder)

    torch.manual_seed(seed)
    size = {"vocab_size": len(vocabulary), "pad_token_id": 0}
    layers = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    network: transformers.PreTrainedModel
    if kind == "bert":
        network = transformers.BertModel(transformers.BertConfig(**size, **layers, max_position_embeddings=40))
    elif kind == "clip":
        ends = {"bos_token_id": 2, "eos_token_id": 3}
        config = transformers.CLIPTextConfig(**size, **layers, **ends, max_position_embeddings=40)
        network = transformers.CLIPTextModel(config)
    else:
        numbers = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2, "eos_token_id": 3}
        network = transformers.T5EncoderModel(transformers.T5Config(**size, **numbers))
    for parameter in network.parameters():
        parameter.data.normal_(std=0.5)  # far from the start, where layers hardly do anything
    network.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_autoencoder() -> AutoencoderFactory:
    def build(*, seed: int = 0, **overrides: Any) -> AutoencoderKL:
        torch.manual_seed(seed)
        numbers: dict[str, Any] = {"latent_channels": 2, "base_channels": 8, "channel_multipliers": [1, 2]}
        return AutoencoderKL(AutoencoderConfig(**numbers | overrides))

    return build
