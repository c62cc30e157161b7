"""Trained models on disk, and the folder that makes them whole: averaged weights, process, autoencoder."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from autoencoder.inference.light_decoder import load_light_decoder
from autoencoder.inference.text_encoder import TextEncoder, open_text_encoder
from autoencoder.inference.trained_autoencoder import load_autoencoder
from autoencoder.models.autoencoder import AutoencoderKL
from autoencoder.models.light_decoder import LightDecoder
from autoencoder.models.text import Text
from ldgan.diffusion.guidance import classifier_free, classifier_gradient
from ldgan.diffusion.process import Denoised, Diffusion, Predicts, Variance
from ldgan.diffusion.samplers import Callback, Denoiser, Noise, Process, SamplerConfig, Start, ancestral, ddim
from ldgan.engine.checkpoint import read_description
from ldgan.engine.cli import UserError
from ldgan.engine.images import to_uint8
from ldgan.engine.philox import RandomRows
from ldgan.engine.rebuilding import field, load_network, read_numbers
from ldgan.engine.run import resolve_checkpoint, run_of
from ldgan.inference.descriptions import DataDescription, ProcessDescription, TextDescription
from ldgan.inference.trained_classifier import load_classifier
from ldgan.models.classifier import Classifier
from ldgan.models.conditions import Conditions, no_text
from ldgan.models.unet import UNet, UNetConfig

GAN, DDPM = "diffusion GAN", "DDPM"  # kinds of runs
# The averaged weights are the ones that are sampled from: their file, and the config section of their network.
WEIGHTS = {GAN: "generator_ema", DDPM: "network_ema"}
NETWORK = {GAN: "generator", DDPM: "network"}
AUTOENCODER_FOLDER = "autoencoder"  # a run on latents holds a copy of the autoencoder they belong to
TEXT_ENCODER_FOLDER = "text_encoder"  # a run on captions holds a copy of the text encoder that embedded them


def build_unet(
    config: UNetConfig,
    data_shape: tuple[int, int, int],
    num_classes: int = 0,
    *,
    text_dim: int = 0,
    learned_variance: bool = False,
) -> UNet:
    """A fresh network for square data of shape (C, s, s); a learned variance doubles its output channels."""
    channels, side, _ = data_shape
    return UNet(
        config,
        channels=channels,
        resolution=side,
        out_channels=2 * channels if learned_variance else channels,
        num_classes=num_classes,
        text_dim=text_dim,
    )


class TextEncoderSource(NamedTuple):
    """Where the text encoder of a model lies, to be opened when there are prompts."""

    folder: Path
    fingerprint: str
    max_tokens: int  # of a text, as in training


@dataclass
class TrainedModel:
    """A network in eval mode with all it needs to make images.

    ``autoencoder`` is None for pixels, ``class_names`` are None for a model without classes and ``text_encoder`` for
    one without text. ``light_decoder``, where given, decodes instead of the autoencoder.
    """

    network: UNet
    diffusion: Diffusion
    autoencoder: AutoencoderKL | None
    data_shape: tuple[int, int, int]
    resolution: int  # of the images, in pixels
    predicts: Predicts = "x_0"
    variance: Variance = "posterior"
    class_names: list[str] | None = None
    light_decoder: LightDecoder | None = None
    classifier: Classifier | None = None  # guides every sample that has a label
    text_encoder: TextEncoderSource | None = None

    def sample(
        self,
        seeds: Sequence[int],
        labels: Sequence[int] | None = None,
        sampler: SamplerConfig | None = None,
        callback: Callback | None = None,
        text: Text | None = None,
    ) -> Tensor:
        """Samples of x_0, (B, C, s, s): one for each seed, the same whatever the batch.

        A class-conditional model without ``labels`` draws them, uniformly, from the seeds; one that knows text, given
        as of `encode_prompts`, one for each seed, samples unconditionally without.
        """
        noise, known = RandomRows(seeds, "sample", self.device).normal, self.labels(seeds, labels)
        return self.run(noise, noise, known, sampler or SamplerConfig(), text=text, callback=callback)

    def run(
        self,
        z_noise: Noise,
        x_noise: Noise,
        labels: Tensor | None,
        sampler: SamplerConfig,
        *,
        text: Text | None = None,
        start: Start | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Samples of x_0, (B, C, s, s), from one source of noise for z and one for x_T and all that is added to x.

        ``labels`` are as of `labels`; with ``start`` (steps of `process`) sampling begins there.
        """
        denoiser, diffusion, guidance = self.process(z_noise, labels, sampler, text)
        if sampler.method == "ddim":
            return ddim(
                denoiser,
                diffusion,
                x_noise,
                self.data_shape,
                eta=sampler.eta,
                start=start,
                guidance=guidance,
                callback=callback,
            )
        return ancestral(
            denoiser, diffusion, x_noise, self.data_shape, start=start, guidance=guidance, callback=callback
        )

    def process(
        self, z_noise: Noise, labels: Tensor | None, sampler: SamplerConfig, text: Text | None = None
    ) -> Process:
        """What a sampler works with: the process in the steps that are visited, what denoises, what guides."""
        diffusion = self.diffusion.respaced(sampler.num_steps) if sampler.num_steps else self.diffusion
        known = labels if self.network.num_classes else None
        guidance = None
        if self.classifier is not None and labels is not None:
            guidance = classifier_gradient(self.classifier, diffusion, labels, sampler.classifier_scale)
        conditions = Conditions(known, text)
        return Process(self.denoiser(diffusion, z_noise, conditions, sampler.guidance_scale), diffusion, guidance)

    def denoiser(
        self,
        diffusion: Diffusion,
        noise: Noise,
        conditions: Conditions = Conditions(),
        guidance_scale: float = 1.0,
    ) -> Denoiser:
        """The network as samplers of ``diffusion`` see it; a generator's z come from ``noise``."""
        scale = guidance_scale if conditions.given() else 1.0  # away from what it would say anyway: the same

        def denoise(x_t: Tensor, t: Tensor) -> Denoised:
            z = noise((self.network.z_dim,)) if self.network.z_dim else None
            timesteps = diffusion.timesteps.to(t.device)[t]
            known = conditions
            if self.text_encoder is not None and conditions.text is None:
                known = conditions._replace(text=no_text(len(x_t), self.network.text_dim, x_t.device))
            output = classifier_free(
                self.network, x_t, z, timesteps, known, null_label=self.network.num_classes, scale=scale
            )
            return diffusion.denoised(output, x_t, t, self.predicts, self.variance)

        return denoise

    def to(self, device: torch.device | str) -> TrainedModel:
        """Move all networks there; returns the model itself."""
        for network in (self.network, self.autoencoder, self.light_decoder, self.classifier):
            if network is not None:
                network.to(device)
        self.__dict__.pop("_text_encoder", None)  # to be opened there when it is next needed
        return self

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    def labels(self, seeds: Sequence[int], labels: Sequence[int] | None) -> Tensor | None:
        """Labels as a tensor, int64 (B,); a model with classes draws them from the seeds if none are given."""
        if labels is None:
            if self.network.num_classes == 0:
                return None
            return RandomRows(seeds, "label", self.device).integers(0, self.network.num_classes, (1,)).flatten()
        return torch.tensor(labels, device=self.device)

    def encode_prompts(self, prompts: Sequence[str]) -> Text:
        """Embeddings of prompts, one text for each; those too long for the model are cut, with a notice.

        Raises:
            UserError: there are no prompts, or the model knows no text, or its text encoder is missing or another one.
        """
        if self.text_encoder is None:
            instead = "labels, as it knows classes" if self.class_names else "seeds alone"
            raise UserError(f"the model was trained without captions and reads no prompts; sample it by {instead}")
        if not prompts:
            raise UserError("there are no prompts; give one or more, or leave them out to sample without")
        too_long = sum(number > self._text_encoder.max_tokens for number in self._text_encoder.num_tokens(prompts))
        if too_long:
            limit = self._text_encoder.max_tokens
            warnings.warn(f"{too_long} prompts are longer than {limit} tokens; their ends are not read", stacklevel=2)
        return self._text_encoder(prompts)

    @cached_property
    def _text_encoder(self) -> TextEncoder:
        """The text encoder, opened where it is first needed; a UserError if it is not the model's own."""
        assert self.text_encoder is not None
        folder, fingerprint, max_tokens = self.text_encoder
        encoder = open_text_encoder(folder, self.device, max_tokens)
        if encoder.fingerprint != fingerprint:
            raise UserError(
                f"{folder}: is not the text encoder that the model was trained with; restore the run's copy"
            )
        return encoder

    @torch.no_grad()
    def decode(self, x_0: Tensor) -> Tensor:
        """Images, uint8 (B, 3, H, W) on the CPU, of samples of x_0."""
        decoder = self.light_decoder or self.autoencoder
        return to_uint8(x_0 if decoder is None else decoder.decode(x_0)).cpu()


def load_model(
    path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    decoder: Literal["full", "light"] = "full",
    classifier: str | os.PathLike[str] | None = None,
) -> TrainedModel:
    """Load a run of ldgan/train.py or ldgan/train_ddpm.py, at its latest checkpoint, or one of its checkpoints.

    The ``decoder`` is the autoencoder's own, or the light one that lies in the run's copy of the autoencoder. A
    ``classifier``, a run of ldgan/train_classifier.py or a checkpoint in it, will guide samples that have a label.

    Raises:
        UserError: ``path`` is neither, or is damaged, or the run's copy of the autoencoder is missing, or it has
            no light decoder, or the classifier does not belong to this model.
    """
    folder = resolve_checkpoint(Path(path))
    description = read_description(folder)
    kind = description.get("kind")
    if kind not in tuple(WEIGHTS):  # compared, not hashed: it may be anything that JSON can hold
        raise UserError(
            f"{path}: holds an {kind}, not a {GAN} or {DDPM}; give a run of ldgan/train.py or ldgan/train_ddpm.py"
        )
    config, data = field(folder, description, "config", dict), DataDescription.of(folder, description)
    process, text = ProcessDescription.of(config, str(folder)), TextDescription.of(folder, description)
    if decoder == "light" and not process.latent:
        raise UserError(f"{path}: works on pixels and has no decoder; leave it out", parameter="decoder")
    diffusion = process_of(config, str(folder))
    numbers = read_numbers(UNetConfig, folder, config, NETWORK[kind])
    network = load_network(
        folder,
        WEIGHTS[kind],
        lambda: build_unet(
            numbers,
            data.shape,
            len(data.class_names or []),
            text_dim=text.dim if text is not None else 0,
            learned_variance=process.variance == "learned",
        ),
    )
    model = TrainedModel(
        network.eval().requires_grad_(False),
        diffusion,
        autoencoder_of(run_of(folder), data) if process.latent else None,
        data.shape,
        data.resolution,
        predicts=process.predicts,
        variance=process.variance,
        class_names=data.class_names,
        light_decoder=load_light_decoder(run_of(folder) / AUTOENCODER_FOLDER, "cpu") if decoder == "light" else None,
        classifier=load_classifier(Path(classifier), "cpu", diffusion, description) if classifier is not None else None,
        text_encoder=text_encoder_of(run_of(folder), text),
    )
    return model.to(device)


def autoencoder_of(run: Path, data: DataDescription) -> AutoencoderKL:
    """The run's copy of the autoencoder; a UserError if its latents are not those of the data."""
    autoencoder = load_autoencoder(run / AUTOENCODER_FOLDER, "cpu")
    if autoencoder.latent_shape(data.resolution) != data.shape:
        raise UserError(f"{run / AUTOENCODER_FOLDER}: its latents have another shape than the model's; use another run")
    return autoencoder


def text_encoder_of(run: Path, text: TextDescription | None) -> TextEncoderSource | None:
    """The text encoder in a run's folder, by what its checkpoints say of it; None for models without."""
    if text is None:
        return None
    return TextEncoderSource(run / TEXT_ENCODER_FOLDER, text.encoder, text.max_tokens)


def process_of(config: Mapping[str, Any], source: str = "config") -> Diffusion:
    """The process that a run with this config is sampled by; errors name ``source``."""
    process = ProcessDescription.of(config, source)
    # A one-shot generator answers at t = T alone; the process only served its discriminator.
    return process.diffusion().respaced(1) if process.objective == "one_shot" else process.diffusion()
