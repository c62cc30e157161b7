"""Captions in stage 2: what networks, players, guidance and samplers make of them, and a run that learns them."""

from __future__ import annotations

import io
import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from autoencoder.inference.latents import describe_latents, pack_moments
from autoencoder.inference.text_encoder import open_text_encoder
from autoencoder.inference.trained_autoencoder import KIND as AUTOENCODER_KIND
from autoencoder.inference.trained_autoencoder import WEIGHTS as AUTOENCODER_WEIGHTS
from autoencoder.models.text import Text
from data_prep.shards import ShardWriter
from ldgan import train
from ldgan.diffusion.guidance import classifier_free
from ldgan.diffusion.process import Diffusion, vp_betas
from ldgan.diffusion.samplers import SamplerConfig
from ldgan.engine.accumulation import Accumulation
from ldgan.engine.checkpoint import save_checkpoint
from ldgan.engine.cli import UserError
from ldgan.engine.config import load_config, to_dict
from ldgan.engine.ema import EMA
from ldgan.engine.philox import Random, key_of
from ldgan.evaluation.image_sets import Samples
from ldgan.inference.jobs import Job, read_prompts
from ldgan.inference.trained_model import TrainedModel, load_model
from ldgan.models.blocks import CrossAttention, PooledText
from ldgan.models.conditions import Conditions, Prompts, drop_text, mismatched, no_text, without_rows
from ldgan.models.discriminator import Discriminator, DiscriminatorConfig
from ldgan.models.unet import UNet, UNetConfig
from ldgan.train import TrainConfig
from ldgan.training.data import check_text_encoder, first_captions, open_source
from ldgan.training.gan import Batch, DiffusionGANTrainer, LossConfig, PhasesConfig, Players

DIM, NUM_ROWS, SHAPE = 6, 5, (2, 4, 4)
PROMPTS = ["a red heart", "the green tree"]


def texts(lengths: list[int], seed: int = 0) -> Text:
    """Random texts with so many rows."""
    embeddings = torch.randn(len(lengths), NUM_ROWS, DIM, generator=torch.Generator().manual_seed(seed))
    return Text(embeddings, torch.arange(NUM_ROWS) < torch.tensor(lengths)[:, None])


def randomise(network: nn.Module) -> nn.Module:
    """Weights under which every input counts; fresh ones leave much at zero."""
    random = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3, generator=random)
    return network.eval()


def small_unet(**changes: Any) -> UNet:
    numbers: dict[str, Any] = {
        "base_channels": 8,
        "channel_multipliers": [1, 1],
        "num_res_blocks": 1,
        "attention_resolutions": [],
        "text_attention_resolutions": [2],
        "z_dim": 3,
        "num_mapping_layers": 1,
        "embedding_dim": 8,
    }
    num_classes, text_dim = changes.pop("num_classes", 0), changes.pop("text_dim", DIM)
    config = UNetConfig(**numbers | changes)
    torch.manual_seed(0)
    return UNet(config, channels=2, resolution=4, out_channels=2, num_classes=num_classes, text_dim=text_dim)


def small_discriminator(**changes: Any) -> Discriminator:
    config = DiscriminatorConfig(widths=[8, 8], embedding_dim=8)
    torch.manual_seed(1)
    return Discriminator(config, **{"channels": 2, "resolution": 4, "num_classes": 0, "text_dim": DIM} | changes)


def inputs(batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, z and t, which goes round."""
    random = torch.Generator().manual_seed(2)
    x_t, z = torch.randn(batch_size, *SHAPE, generator=random), torch.randn(batch_size, 3, generator=random)
    return x_t, z, torch.arange(batch_size) % 4 + 1


@torch.no_grad()
def test_cross_attention_is_a_softmax_over_the_rows_that_are_there_and_one_that_always_is() -> None:
    attention = randomise(CrossAttention(8, DIM, num_heads=2, rescale=False))
    assert isinstance(attention, CrossAttention)
    x, text = torch.randn(3, 8, 2, 2, generator=torch.Generator().manual_seed(3)), texts([5, 2, 0])
    output = attention(x, text)
    weights = {name: tensor.double() for name, tensor in attention.state_dict().items()}
    normalised = F.group_norm(x.double(), attention.norm.num_groups, weights["norm.weight"], weights["norm.bias"], 1e-6)
    for sample in range(3):
        there = text.embeddings[sample][text.mask[sample]].double()
        rows = F.layer_norm(there, (DIM,), weights["norm_text.weight"], weights["norm_text.bias"])
        rows = torch.cat([weights["null"][None], rows])
        keys, values = (rows @ weights["kv.weight"].T + weights["kv.bias"]).split(8, dim=1)
        for place in range(4):
            query = weights["q.weight"][:, :, 0, 0] @ normalised[sample].flatten(1)[:, place] + weights["q.bias"]
            heads = []
            for head in (slice(0, 4), slice(4, 8)):
                scores = keys[:, head] @ query[head] / math.sqrt(4)
                heads.append(scores.softmax(dim=0) @ values[:, head])
            out = weights["out.weight"][:, :, 0, 0] @ torch.cat(heads) + weights["out.bias"]
            expected = x[sample].flatten(1)[:, place] + out
            torch.testing.assert_close(output[sample].flatten(1)[:, place].double(), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_pooled_row_counts_by_its_direction_and_has_a_vector_in_its_place() -> None:
    pooled = randomise(PooledText(DIM, 4))
    text = texts([5, 1, 0])
    row = text.embeddings[:2, 0].double()
    expected = row / row.square().sum(dim=1, keepdim=True).sqrt() @ pooled.linear.weight.T.double() + pooled.linear.bias
    torch.testing.assert_close(pooled(text)[:2].double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pooled(text)[2], pooled.null, rtol=0, atol=0)


@pytest.mark.parametrize("conditioning", ["cross_attention", "pooled"])
@torch.no_grad()
def test_networks_read_rows_of_their_own_sample_and_nothing_else(conditioning: str) -> None:
    unet = randomise(small_unet(text_conditioning=conditioning))
    discriminator = randomise(small_discriminator())
    (x_t, z, t), text = inputs(4), texts([5, 3, 1, 0])
    garbage = Text(text.embeddings.masked_fill(~text.mask[:, :, None], math.nan), text.mask)
    order = torch.tensor([2, 0, 3, 1])
    swapped = Text(text.embeddings[order], text.mask[order])
    for network, given in ((unet, (x_t, z, t)), (discriminator, (x_t.sin(), x_t, t))):
        output = network(*given, text=text)
        assert torch.equal(network(*given, text=garbage), output)
        nothing = network(*given, text=without_rows(text))
        torch.testing.assert_close(network(*given, text=no_text(4, DIM, "cpu")), nothing, rtol=1e-5, atol=1e-6)
        dropped = drop_text(text, 1.0, Random(key_of(0), "cpu"))
        assert torch.equal(network(*given, text=dropped), nothing)
        assert all((output[row] - nothing[row]).abs().max() > 1e-3 for row in range(3))
        torch.testing.assert_close(output[3], nothing[3])
        if network is unet:  # a discriminator looks at the spread of its batch
            permuted = network(*(tensor[order] for tensor in given), text=swapped)
            torch.testing.assert_close(permuted, output[order], rtol=1e-4, atol=1e-5)
    tokens = Text(torch.cat([text.embeddings[:, :1], -text.embeddings[:, 1:]], dim=1), text.mask)
    moved = (unet(x_t, z, t, text=tokens) - unet(x_t, z, t, text=text)).abs().amax(dim=(1, 2, 3))
    assert (moved[:2] > 1e-4).all() == (conditioning == "cross_attention")
    assert torch.equal(moved[2:], torch.zeros(2))


@torch.no_grad()
def test_the_discriminator_projects_the_text_on_its_features() -> None:
    discriminator = randomise(small_discriminator())
    features: list[Tensor] = []
    discriminator.logit.register_forward_pre_hook(lambda module, given: features.append(given[0]))
    (x_t, _, t), text, other = inputs(3), texts([4, 2, 0]), texts([0, 3, 2], seed=1)
    difference = discriminator(x_t.sin(), x_t, t, text=text) - discriminator(x_t.sin(), x_t, t, text=other)
    project = discriminator.projected_text
    assert project is not None
    expected = ((project(text) - project(other)) * features[0]).sum(dim=1)
    torch.testing.assert_close(difference, expected, rtol=1e-4, atol=1e-4)
    assert (difference.abs() > 1e-2).all()


def test_a_network_without_text_has_no_weights_for_it_and_wants_none() -> None:
    with_text, without = small_unet(), small_unet(text_dim=0)
    extra = set(with_text.state_dict()) - set(without.state_dict())
    assert {name.split(".")[0] for name in extra} == {"text_embedding", "down", "middle", "up"}
    assert all(name.startswith("text_embedding") or ".cross_attention." in name for name in extra)
    assert not set(without.state_dict()) - set(with_text.state_dict())
    with pytest.raises(ValueError, match="text_dim is 0, but text is Text"):
        without(*inputs(2), text=texts([1, 1]))
    with pytest.raises(ValueError, match="text_dim is 6, but text is NoneType"):
        with_text(*inputs(2))
    with pytest.raises(ValueError, match=r"no feature map would attend to captions.*\[4, 2\]"):
        small_unet(text_attention_resolutions=[8])


@pytest.mark.parametrize("labelled", [False, True])
@torch.no_grad()
def test_guidance_extrapolates_from_neither_label_nor_text(labelled: bool) -> None:
    unet = randomise(small_unet(num_classes=3 if labelled else 0))
    assert isinstance(unet, UNet)
    (x_t, z, t), text = inputs(4), texts([5, 2, 1, 0])
    labels = torch.tensor([0, 1, 2, 1]) if labelled else None
    none = torch.full_like(labels, 3) if labels is not None else None
    conditions = Conditions(labels, text)
    conditional = unet(x_t, z, t, labels, text).double()
    unconditional = unet(x_t, z, t, none, no_text(4, DIM, "cpu")).double()
    for scale in (0.0, 1.0, 3.0):
        output = classifier_free(unet, x_t, z, t, conditions, null_label=3, scale=scale).double()
        expected = unconditional + scale * (conditional - unconditional)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(classifier_free(unet, x_t, z, t, conditions, null_label=3, scale=1).double(), conditional)
    assert (conditional - unconditional).abs().amax(dim=(1, 2, 3))[:3].min() > 1e-2


def new_game(caption_dropout: float = 0.0, **loss: Any) -> tuple[DiffusionGANTrainer, UNet, Discriminator]:
    """Tiny players under gradient descent with rate 1."""
    generator, discriminator = small_unet(), small_discriminator()
    trainer = DiffusionGANTrainer(
        Accumulation(Accelerator(cpu=True), 1, 4, 7),
        Diffusion(vp_betas(4)),
        Players(
            generator,
            discriminator,
            torch.optim.SGD(generator.parameters(), lr=1.0),
            torch.optim.SGD(discriminator.parameters(), lr=1.0),
            EMA(generator, halflife_images=8, rampup_ratio=None),
        ),
        objective="denoising",
        predicts="x_0",
        label_dropout=0.0,
        caption_dropout=caption_dropout,
        loss=LossConfig(**loss),
        phases=PhasesConfig(),
        timestep_weights=[1.0] * 4,
    )
    return trainer, generator, discriminator


def weights(network: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def test_the_caption_of_the_next_sample_is_a_mismatch_unless_it_says_the_same_or_nothing() -> None:
    text = texts([3, 3, 0, 2, 2, 4])
    text.embeddings[0] = text.embeddings[5]
    text = Text(text.embeddings.clone(), text.mask.clone())
    text.mask[0] = text.mask[5]
    text.embeddings[0, 4] = 9.0  # a row that is not there makes no difference
    other, differs = mismatched(text)
    # Each beside the one before it: 0 says what 5 says, 2 says nothing, 3 comes behind it.
    assert differs.tolist() == [False, True, False, False, True, True]
    assert torch.equal(other.embeddings, text.embeddings[[5, 0, 1, 2, 3, 4]])
    assert torch.equal(other.mask, text.mask[[5, 0, 1, 2, 3, 4]])


def test_mismatched_captions_are_fakes_to_the_discriminator_alone() -> None:
    trainer, generator, discriminator = new_game(mismatch_weight=0.5)
    batch = Batch(inputs(4)[0], None, texts([3, 2, 0, 4]))
    judged: list[tuple[tuple[Tensor, ...], Text, Tensor]] = []
    discriminator.register_forward_hook(
        lambda module, given, conditions, logits: judged.append((given, conditions["text"], logits.detach())),
        with_kwargs=True,
    )
    terms = trainer.discriminator_losses(batch, Random(key_of(0), "cpu"), penalise=False)
    (real, _, _), (_, _, _), (beside_others, other, logits) = judged
    assert all(torch.equal(a, b) for a, b in zip(real, beside_others))
    assert torch.equal(other.mask, batch.text.mask.roll(1, 0))
    # Sample 2 has no caption, and 3 comes behind it: of four, two are left.
    expected = 0.5 * sum(math.log1p(math.exp(logits[row])) for row in (0, 1)) / 4
    assert terms["mismatch"].item() == pytest.approx(expected, rel=1e-5)

    before, start = weights(generator), weights(discriminator)
    trainer.discriminator_step(1, [batch])
    assert torch.equal(weights(generator), before)
    assert all(parameter.grad is None for parameter in generator.parameters())
    assert not torch.equal(weights(discriminator), start)
    assert discriminator.projected_text.linear.weight.grad.abs().max() > 0
    assert "mismatch" not in trainer.generator_losses(batch, Random(key_of(0), "cpu"), adversarial=True)


def test_both_players_are_told_the_same_captions_of_which_a_share_is_left_out() -> None:
    trainer, generator, discriminator = new_game(caption_dropout=0.25)
    num = 2000
    batch = Batch(torch.zeros(num, *SHAPE), None, texts([3, 2] * (num // 2)))
    told: list[Tensor] = []
    for player in (generator, discriminator):
        player.register_forward_pre_hook(
            lambda module, given, conditions: told.append(conditions["text"].mask), with_kwargs=True
        )
    with torch.no_grad():
        for losses in (trainer.discriminator_losses, trainer.generator_losses):
            told.clear()
            losses(batch, Random(key_of(0), "cpu"), False)
            assert len(told) >= 1
            assert all(torch.equal(told[0], others) for others in told[1:])
            kept = told[0].any(dim=1)
            assert torch.equal(told[0][kept], batch.text.mask[kept])
            assert 1 - kept.float().mean().item() == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / num) ** 0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["text_conditional=true"], "give --latent"),
        (["text_conditional=true", "latent=true", "autoencoder=a"], "give text_encoder=PATH"),
        (["caption_dropout=0.1"], "set text_conditional=true"),
        (["caption_dropout=1"], "choose 0 or more and less than 1"),
        (["loss.mismatch_weight=1"], "set text_conditional=true"),
        (["loss.mismatch_weight=-1"], "choose 0 or more"),
        (["loss.mismatch_weight=1", "loss.adversarial=relativistic"], "set loss.adversarial=non_saturating"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(TrainConfig, None, ["data=shards", "run.dir=run", *settings])
    assert message in str(error.value)


@pytest.fixture(scope="module")
def encoder(tiny_text_encoder: Callable[..., Path]) -> Path:
    return tiny_text_encoder("t5")  # the random BERT hardly tells captions apart


@pytest.fixture
def stage_1(tmp_path: Path, tiny_autoencoder: Callable[..., Any]) -> Path:
    """A finished autoencoder."""
    autoencoder = tiny_autoencoder().eval()
    description = {
        "kind": AUTOENCODER_KIND,
        "config": {"network": to_dict(autoencoder.config)},
        "latent_statistics": {"mean": [0.0, 0.0], "std": [1.0, 1.0]},
        "data": {"seconds": 0.0},
        "seconds": 0.0,
    }
    save_checkpoint(tmp_path / "stage_1", {AUTOENCODER_WEIGHTS: autoencoder}, description)
    return tmp_path / "stage_1"


def write_latents(folder: Path, stage_1: Any, encoder: Path | None, captions: list[str]) -> str:
    """Latents of 8 px images: all 1 for captions of hearts, -1 for others, with embeddings if there is an encoder."""
    details = describe_latents(stage_1, 8, flips=False)
    text_encoder = open_text_encoder(encoder, max_tokens=6) if encoder is not None else None
    if text_encoder is not None:
        details["text"] = text_encoder.description
    with ShardWriter(folder, "latents", details=details) as writer:
        for caption in captions:
            mean = torch.full((2, 4, 4), 1.0 if "heart" in caption else -1.0)
            sample = pack_moments(torch.cat([mean, torch.zeros(2, 4, 4)]), label=-1)
            if caption:
                sample["txt"] = caption.encode()
            if text_encoder is not None and caption:
                embeddings, mask = text_encoder([caption])
                buffer = io.BytesIO()
                np.save(buffer, embeddings[mask].numpy().astype(np.float16), allow_pickle=False)
                sample["text.npy"] = buffer.getvalue()
            writer.write(sample)
    return str(folder)


@pytest.fixture
def autoencoder(tiny_autoencoder: Callable[..., Any]) -> Any:
    return tiny_autoencoder().eval()


def test_shards_must_hold_the_embeddings_that_a_run_learns_from(
    tmp_path: Path, autoencoder: Any, encoder: Path, tiny_text_encoder: Callable[..., Path]
) -> None:
    without = write_latents(tmp_path / "a", autoencoder, None, ["", ""])
    with pytest.raises(UserError, match="holds no captions; make shards of images with captions"):
        open_source(without, autoencoder, with_text=True)
    not_embedded = write_latents(tmp_path / "b", autoencoder, None, PROMPTS)
    with pytest.raises(UserError, match=r"were not embedded; encode the images again .* --text-encoder PATH"):
        open_source(not_embedded, autoencoder, with_text=True)
    with ShardWriter(tmp_path / "images", "images", details={"resolution": 8}) as writer:
        writer.write({"png": b"", "txt": b"a heart"})
    with pytest.raises(UserError, match="holds images, whose captions were not embedded; encode them first"):
        open_source(str(tmp_path / "images"), autoencoder, with_text=True)
    source = open_source(write_latents(tmp_path / "c", autoencoder, encoder, PROMPTS), autoencoder, with_text=True)
    check_text_encoder(str(encoder), source)
    with pytest.raises(UserError, match="embedded by another text encoder"):
        check_text_encoder(str(tiny_text_encoder("t5", seed=1)), source)


def test_the_first_captions_are_read_with_their_embeddings(tmp_path: Path, autoencoder: Any, encoder: Path) -> None:
    captions = ["", PROMPTS[1], PROMPTS[0], "", "night"]
    source = open_source(write_latents(tmp_path / "a", autoencoder, encoder, captions), autoencoder, with_text=True)
    first = first_captions(source, 2, "cpu")
    assert first.captions == [PROMPTS[1], PROMPTS[0]]
    expected = open_text_encoder(encoder, max_tokens=6)(first.captions)
    assert torch.equal(first.text.mask, expected.mask)
    torch.testing.assert_close(first.text.embeddings, expected.embeddings, rtol=1e-3, atol=1e-3)  # stored in fp16
    assert torch.equal(first.of([3, 0]).embeddings, first.text.embeddings[[1, 0]])
    assert first_captions(source, 9, "cpu").captions[-1] == "night"


TINY_RUN = (
    "run.num_steps=90",
    "run.batch_size=16",
    "run.num_threads=1",
    "run.checkpoint_every_steps=45",
    "run.keep_checkpoints=2",
    "run.preview_every_steps=90",
    "caption_dropout=0.1",
    "num_timesteps=2",
    "generator.base_channels=8",
    "generator.channel_multipliers=[1]",
    "generator.num_res_blocks=1",
    "generator.attention_resolutions=[4]",
    "generator.embedding_dim=16",
    "generator.z_dim=2",
    "generator.num_mapping_layers=1",
    "discriminator.widths=[8]",
    "discriminator.embedding_dim=8",
    "loss.energy_weight=1",
    "loss.mismatch_weight=0.5",
    "phases.pretraining_steps=87",
    "phases.pretraining_lr=1e-2",
    "generator_optimizer.lr=1e-4",
    "generator_optimizer.warmup_steps=1",
    "ema_halflife_images=50",
)


def test_a_run_learns_its_captions_and_resumed_ends_in_the_same_bits(
    tmp_path: Path, stage_1: Path, autoencoder: Any, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_latents(tmp_path / "latents", autoencoder, encoder, PROMPTS * 8)
    settings = (f"data={data}", f"autoencoder={stage_1}", "text_conditional=true", f"text_encoder={encoder}")

    def run() -> None:
        words = ["train.py", "--latent", *settings, *TINY_RUN, f"run.dir={tmp_path / 'run'}"]
        monkeypatch.setattr(sys, "argv", words)
        train.main()

    run()
    last = "checkpoints/step_000000090"
    whole = shutil.copytree(tmp_path / "run", tmp_path / "whole")
    shutil.rmtree(tmp_path / "run" / last)
    (tmp_path / "run" / "summary.json").unlink()
    run()
    for file in sorted((whole / last).glob("*.safetensors")):
        assert (tmp_path / "run" / last / file.name).read_bytes() == file.read_bytes()
    description = json.loads((whole / last / "checkpoint.json").read_text())
    assert description["text"] == open_text_encoder(encoder, max_tokens=6).description
    assert (whole / "samples" / "captions.txt").read_text().splitlines() == PROMPTS * 8

    shutil.move(encoder, tmp_path / "away")  # the run has a copy
    try:
        check_samples(load_model(tmp_path / "run"))
    finally:
        shutil.move(tmp_path / "away", encoder)


def check_samples(model: TrainedModel) -> None:
    """Samples follow their prompts, whatever the batch; of no prompt they may be either."""
    text = model.encode_prompts(PROMPTS)
    rows = torch.arange(20) % 2
    alternating = Text(text.embeddings[rows], text.mask[rows])
    samples = model.sample(range(20), text=alternating).mean(dim=(1, 2, 3))
    assert (samples[0::2] > 0.5).all()
    assert (samples[1::2] < -0.5).all()
    guided = model.sample(range(20), sampler=SamplerConfig(guidance_scale=2.0), text=alternating)
    assert (guided.mean(dim=(1, 2, 3)) * (1 - 2 * rows) > 0.5).all()
    plain = model.sample(range(20))
    torch.testing.assert_close(model.sample(range(20), text=no_text(20, 8, "cpu")), plain)
    assert torch.equal(model.sample(range(20), sampler=SamplerConfig(guidance_scale=2.0)), plain)

    job = Job(model, SamplerConfig(), None, num_images=5, first_seed=3, batch_size=5, prompts=Prompts(PROMPTS, text))
    together = job.sample(range(5))
    for number in range(5):
        torch.testing.assert_close(job.sample([number])[0], together[number], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together, model.sample(range(3, 8), text=Text(*(each[rows[:5]] for each in text))))
    fingerprints = {
        Samples(replace(job, prompts=prompts), Accelerator(cpu=True)).fingerprint()
        for prompts in (None, job.prompts, Prompts(PROMPTS[::-1], text))
    }
    assert len(fingerprints) == 3
    with pytest.raises(UserError, match="guidance: steers towards prompts"):
        replace(job, sampler=SamplerConfig(guidance_scale=2.0), prompts=None)
    assert job.captions_of([0, 3]) == PROMPTS
    assert replace(job, prompts=None).captions_of([0, 3]) == ["", ""]

    with pytest.raises(UserError, match="there are no prompts"):
        model.encode_prompts([])
    with pytest.warns(UserWarning, match="1 prompts are longer than 6 tokens"):
        model.encode_prompts([PROMPTS[0], "a red red red red heart"])
    assert model.text_encoder is not None
    other = replace(model, text_encoder=model.text_encoder._replace(fingerprint="0"))
    with pytest.raises(UserError, match="is not the text encoder that the model was trained with"):
        other.encode_prompts(PROMPTS)
    with pytest.raises(UserError, match=r"was trained without captions .* by labels"):
        replace(model, text_encoder=None, class_names=["a"]).encode_prompts(PROMPTS)


def test_prompts_come_from_the_lines_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a red heart\n\n  the night \r\n", encoding="utf-8-sig")
    assert read_prompts(file) == ["a red heart", "the night"]
    file.write_text(" \n\n")
    with pytest.raises(UserError, match="holds no prompts"):
        read_prompts(file)
    file.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match="it is not UTF-8"):
        read_prompts(file)
    with pytest.raises(UserError, match="No such file"):
        read_prompts(tmp_path / "nowhere.txt")
