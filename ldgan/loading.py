"""Trained models on disk, and the folder that makes them whole: averaged weights, process, autoencoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from autoencoder.light_decoder import LightDecoder, load_light_decoder
from autoencoder.loading import load_autoencoder
from autoencoder.networks import AutoencoderKL
from ldgan.classifier import Classifier, load_classifier
from ldgan.descriptions import DataDescription, ProcessDescription
from ldgan.diffusion import Denoised, Diffusion, Predicts, Variance
from ldgan.engine.checkpoint import read_description
from ldgan.engine.cli import UserError
from ldgan.engine.images import to_uint8
from ldgan.engine.rebuilding import field, load_network, read_numbers
from ldgan.engine.run import resolve_checkpoint, run_of
from ldgan.engine.seeding import generator, noise_from_seeds
from ldgan.guidance import classifier_free, classifier_gradient
from ldgan.networks import UNet, UNetConfig
from ldgan.sampling import Callback, Denoiser, Noise, SamplerConfig, ancestral, ddim

GAN, DDPM = "diffusion GAN", "DDPM"  # kinds of runs
# The averaged weights are the ones that are sampled from: their file, and the config section of their network.
WEIGHTS = {GAN: "generator_ema", DDPM: "network_ema"}
NETWORK = {GAN: "generator", DDPM: "network"}
AUTOENCODER_FOLDER = "autoencoder"  # a run on latents holds a copy of the autoencoder they belong to


def build_unet(
    config: UNetConfig, data_shape: tuple[int, int, int], num_classes: int = 0, *, learned_variance: bool = False
) -> UNet:
    """A fresh network for square data of shape (C, s, s); a learned variance doubles its output channels."""
    channels, side, _ = data_shape
    out_channels = 2 * channels if learned_variance else channels
    return UNet(channels=channels, resolution=side, out_channels=out_channels, num_classes=num_classes, **vars(config))


@dataclass
class TrainedModel:
    """A network in eval mode with all it needs to make images.

    ``autoencoder`` is None for pixels, ``class_names`` are None for a model without classes. ``light_decoder``,
    where given, decodes instead of the autoencoder.
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

    def sample(
        self,
        seeds: Sequence[int],
        labels: Sequence[int] | None = None,
        sampler: SamplerConfig | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Samples of x_0, (B, C, s, s): one for each seed, the same whatever the batch.

        A class-conditional model without ``labels`` draws them, uniformly, from the seeds.
        """
        sampler = sampler or SamplerConfig()
        device = next(self.network.parameters()).device
        noise = noise_from_seeds(seeds, "sample", device)
        diffusion = self.diffusion.respaced(sampler.num_steps) if sampler.num_steps else self.diffusion
        wanted = self.labels(seeds, labels, device)
        denoiser = self.denoiser(diffusion, noise, wanted if self.network.num_classes else None, sampler.guidance_scale)
        guidance = None
        if self.classifier is not None and wanted is not None:
            guidance = classifier_gradient(self.classifier, diffusion, wanted, sampler.classifier_scale)
        if sampler.method == "ddim":
            eta = sampler.eta
            return ddim(denoiser, diffusion, noise, self.data_shape, eta=eta, guidance=guidance, callback=callback)
        return ancestral(denoiser, diffusion, noise, self.data_shape, guidance=guidance, callback=callback)

    def denoiser(
        self, diffusion: Diffusion, noise: Noise, labels: Tensor | None = None, guidance_scale: float = 1.0
    ) -> Denoiser:
        """The network as samplers of ``diffusion`` see it; a generator's z come from ``noise``."""

        def denoise(x_t: Tensor, t: Tensor) -> Denoised:
            z = noise((self.network.z_dim,)) if self.network.z_dim else None
            timesteps = diffusion.timesteps.to(t.device)[t]
            if labels is None:
                output = self.network(x_t, z, timesteps)
            else:
                null_label = self.network.num_classes
                output = classifier_free(
                    self.network, x_t, z, timesteps, labels, null_label=null_label, scale=guidance_scale
                )
            return diffusion.denoised(output, x_t, t, self.predicts, self.variance)

        return denoise

    def labels(self, seeds: Sequence[int], labels: Sequence[int] | None, device: torch.device) -> Tensor | None:
        """Labels as a tensor, int64 (B,); a model with classes draws them from the seeds if none are given."""
        if labels is None:
            if self.network.num_classes == 0:
                return None
            random = [generator("cpu", "label", seed) for seed in seeds]
            labels = [int(torch.randint(self.network.num_classes, (), generator=each)) for each in random]
        return torch.tensor(labels, device=device)

    @torch.no_grad()
    def decode(self, x_0: Tensor) -> Tensor:
        """Images, uint8 (B, 3, H, W) on the CPU, of samples of x_0."""
        decoder = self.light_decoder or self.autoencoder
        return to_uint8(x_0 if decoder is None else decoder.decode(x_0)).cpu()


def load_model(
    path: Path,
    device: torch.device | str = "cpu",
    decoder: Literal["full", "light"] = "full",
    classifier: Path | None = None,
) -> TrainedModel:
    """Load a run of ldgan/train.py or ldgan/train_ddpm.py, at its latest checkpoint, or one of its checkpoints.

    The ``decoder`` is the autoencoder's own, or the light one that lies in the run's copy of the autoencoder. A
    ``classifier``, a run of ldgan/train_classifier.py or a checkpoint in it, will guide samples that have a label.

    Raises:
        UserError: ``path`` is neither, or is damaged, or the run's copy of the autoencoder is missing, or it has
            no light decoder, or the classifier does not belong to this model.
    """
    folder = resolve_checkpoint(path)
    description = read_description(folder)
    kind = description.get("kind")
    if kind not in tuple(WEIGHTS):  # compared, not hashed: it may be anything that JSON can hold
        raise UserError(
            f"{path}: holds an {kind}, not a {GAN} or {DDPM}; give a run of ldgan/train.py or ldgan/train_ddpm.py"
        )
    config, data = field(folder, description, "config", dict), DataDescription.of(folder, description)
    process = ProcessDescription.of(config, str(folder))
    diffusion = process_of(config, str(folder))
    numbers = read_numbers(UNetConfig, folder, config, NETWORK[kind])
    network = load_network(
        folder,
        WEIGHTS[kind],
        lambda: build_unet(
            numbers, data.shape, len(data.class_names or []), learned_variance=process.variance == "learned"
        ),
    )
    autoencoder = light_decoder = None
    if process.latent:
        autoencoder_folder = run_of(folder) / AUTOENCODER_FOLDER
        autoencoder = load_autoencoder(autoencoder_folder, device)
        light_decoder = load_light_decoder(autoencoder_folder, device) if decoder == "light" else None
        if autoencoder.latent_shape(data.resolution) != data.shape:
            raise UserError(f"{autoencoder_folder}: its latents have another shape than the model's; use another run")
    elif decoder == "light":
        raise UserError(f"{path}: works on pixels and has no decoder; leave out --decoder light")
    guide = load_classifier(classifier, device, diffusion, description) if classifier is not None else None
    return TrainedModel(
        network.to(device).eval().requires_grad_(False),
        diffusion,
        autoencoder,
        data.shape,
        data.resolution,
        predicts=process.predicts,
        variance=process.variance,
        class_names=data.class_names,
        light_decoder=light_decoder,
        classifier=guide,
    )


def process_of(config: Mapping[str, Any], source: str = "config") -> Diffusion:
    """The process that a run with this config is sampled by; errors name ``source``."""
    process = ProcessDescription.of(config, source)
    # A one-shot generator answers at t = T alone; the process only served its discriminator.
    return process.diffusion().respaced(1) if process.objective == "one_shot" else process.diffusion()
