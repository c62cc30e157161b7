"""Where x_0 comes from: latent shards, image shards encoded on the fly, or pixels; labels and captions with it."""

from __future__ import annotations

import argparse
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor

from autoencoder.inference.latents import check_latents, draw
from autoencoder.inference.light_decoder import light_decoder_folder
from autoencoder.inference.text_encoder import copy_text_encoder, open_text_encoder
from autoencoder.inference.trained_autoencoder import copy_autoencoder, fingerprint, load_autoencoder
from autoencoder.models.autoencoder import AutoencoderKL
from autoencoder.models.text import Text
from data_prep.loader import ImageDataset, LatentDataset, SampleRef
from data_prep.shards import ShardSet
from data_prep.urls import check_no_secrets
from ldgan.engine.cli import UserError
from ldgan.engine.config import MISSING, option
from ldgan.engine.files import new_folder
from ldgan.engine.philox import Random
from ldgan.inference.trained_model import AUTOENCODER_FOLDER, TEXT_ENCODER_FOLDER
from ldgan.models.conditions import Prompts


@dataclass
class DataConfig:
    """What every training command of stage 2 reads."""

    data: str = option(MISSING, "folder of latent shards, or of image shards (encoded on the fly with latent=true)")
    latent: bool = option(False, "train on latents of `autoencoder`; the flag --latent sets it")
    autoencoder: str | None = option(None, "finished run of autoencoder/train.py; needed with latent=true")
    flips: bool = option(False, "mirror half of the images; latent shards must hold the mirror images")
    sample_posterior: bool = option(True, "draw x_0 from the latents' posterior at every read; false: take its mean")

    def validate(self) -> None:
        """Raise a UserError for settings that contradict each other, or must not be saved."""
        check_no_secrets(self.data, "data")
        if self.latent and self.autoencoder is None:
            raise UserError("--latent needs an autoencoder; give autoencoder=RUN, a run of autoencoder/train.py")


@dataclass
class ConditionalDataConfig(DataConfig):
    """The same for models that may learn p(x_0 | label)."""

    class_conditional: bool = option(False, "learn each class's images, by the labels of the shards")
    label_dropout: float = option(
        0.0, "share of labels left out in training; above 0 allows classifier-free guidance (0.1 is usual)"
    )

    def validate(self) -> None:
        """Raise a UserError for settings that contradict each other."""
        super().validate()
        if not 0 <= self.label_dropout < 1:
            raise UserError(f"label_dropout is {self.label_dropout}; choose 0 or more and less than 1")
        if self.label_dropout > 0 and not self.class_conditional:
            raise UserError("label_dropout needs labels; set class_conditional=true")


@dataclass
class TextConditionalDataConfig(ConditionalDataConfig):
    """The same for models that may learn p(x_0 | caption) too."""

    text_conditional: bool = option(
        False, "learn what captions say; needs latent shards of autoencoder/encode.py --text-encoder"
    )
    text_encoder: str | None = option(None, "the text encoder that those were made with; needed with text_conditional")
    caption_dropout: float = option(
        0.0, "share of captions left out in training; above 0 allows classifier-free guidance (0.1 is usual)"
    )

    def validate(self) -> None:
        """Raise a UserError for settings that contradict each other."""
        super().validate()
        if not 0 <= self.caption_dropout < 1:
            raise UserError(f"caption_dropout is {self.caption_dropout}; choose 0 or more and less than 1")
        if self.caption_dropout > 0 and not self.text_conditional:
            raise UserError("caption_dropout needs captions; set text_conditional=true")
        if self.text_conditional and not self.latent:
            raise UserError("text_conditional works on latents, which keep the captions' embeddings; give --latent")
        if self.text_conditional and self.text_encoder is None:
            raise UserError(
                "text_conditional needs the text encoder of the latents; give text_encoder=PATH, as to"
                " autoencoder/encode.py --text-encoder"
            )


def add_latent_flag(parser: argparse.ArgumentParser) -> None:
    """``--latent``, appended to the settings it stands for, so that --dry-run and the run's config see it too."""
    parser.add_argument(
        "--latent", dest="overrides", action="append_const", const="latent=true", help="train on latents: latent=true"
    )


@dataclass
class DataSource:
    """A shard set whose batches it turns into x_0 of one shape, and into labels."""

    dataset: LatentDataset | ImageDataset
    shape: tuple[int, int, int]
    description: ClassVar[str]

    def x_0(self, batch: dict[str, Tensor], noise: Random) -> Tensor:
        """x_0, (B, *shape), of a batch of the dataset, on the device of ``noise``."""
        raise NotImplementedError

    def labels(self, batch: dict[str, Tensor], device: torch.device | str) -> Tensor:
        """The labels, int64 (B,), of a batch of the dataset.

        Raises:
            UserError: a sample has no label.
        """
        if bool((batch["label"] < 0).any()):
            raise UserError(f"{self.dataset.shards.folder}: holds samples without a label; set class_conditional=false")
        return batch["label"].to(device)

    def text(self, batch: dict[str, Tensor], device: torch.device | str) -> Text:
        """The captions' embeddings of a batch of a dataset that was opened with text."""
        return Text(batch["text"].to(device).float(), batch["text_mask"].to(device))

    @property
    def class_names(self) -> list[str]:
        """Names of the classes that labels 0, 1, ... stand for.

        Raises:
            UserError: the shards have no classes.
        """
        names = self.dataset.shards.manifest.class_names
        if names is None:
            raise UserError(f"{self.dataset.shards.folder}: has no classes; make shards of one folder for each class")
        return names


@dataclass
class StoredLatents(DataSource):
    """Standardised posteriors from latent shards; each read draws a new sample, or takes the mean."""

    sample_posterior: bool
    description: ClassVar[str] = "latents read from latent shards"

    def x_0(self, batch: dict[str, Tensor], noise: Random) -> Tensor:
        """Sample the posteriors of the batch, or take their means."""
        mean, std = batch["mean"].to(noise.device), batch["std"].to(noise.device)
        return draw(mean, std, noise) if self.sample_posterior else mean


@dataclass
class EncodedImages(DataSource):
    """Latents of image shards, encoded as they are read; slower than `StoredLatents` in every epoch."""

    sample_posterior: bool
    autoencoder: AutoencoderKL
    description: ClassVar[str] = "image shards, encoded on the fly (autoencoder/encode.py would do it once)"

    @torch.no_grad()
    def x_0(self, batch: dict[str, Tensor], noise: Random) -> Tensor:
        """Encode the batch and sample the posteriors, or take their means."""
        posterior = self.autoencoder.encode(batch["image"].to(noise.device))
        return draw(posterior.mean, posterior.std, noise) if self.sample_posterior else posterior.mean


@dataclass
class Pixels(DataSource):
    """Images themselves, in [-1, 1], as in the paper."""

    description: ClassVar[str] = "pixels of image shards"

    def x_0(self, batch: dict[str, Tensor], noise: Random) -> Tensor:
        """The images of the batch."""
        return batch["image"].to(noise.device)


def open_data(config: DataConfig, accelerator: Accelerator) -> tuple[DataSource, AutoencoderKL | None]:
    """Open what a run trains on and, for latents, their autoencoder; say on the main process what it is."""
    autoencoder = None
    if config.latent and config.autoencoder is not None:
        autoencoder = load_autoencoder(Path(config.autoencoder), accelerator.device)
    source = open_source(
        config.data,
        autoencoder,
        flips=config.flips,
        sample_posterior=config.sample_posterior,
        with_text=isinstance(config, TextConditionalDataConfig) and config.text_conditional,
    )
    folder = source.dataset.shards.folder  # a URL without its password
    accelerator.print(f"{folder}: {len(source.dataset):,} samples of shape {source.shape}: {source.description}")
    return source, autoencoder


def open_source(
    folder: str,
    autoencoder: AutoencoderKL | None,
    *,
    flips: bool = False,
    sample_posterior: bool = True,
    with_text: bool = False,
) -> DataSource:
    """Open a shard set for training on latents of ``autoencoder`` or, without one, on pixels.

    Raises:
        UserError: latent shards without an autoencoder, or of another one, or for ``flips`` without mirror images, or
            no shards with embeddings of captions for ``with_text``.
    """
    shards = ShardSet.open(folder)
    details = shards.manifest.details
    if with_text:
        _check_captions(shards)
    if autoencoder is None:
        if shards.manifest.kind == "latents":
            raise UserError(
                f"{shards.folder}: holds latents; give --latent and autoencoder=RUN, or a folder of image shards"
            )
        return Pixels(ImageDataset(shards), (3, details["resolution"], details["resolution"]))
    if shards.manifest.kind == "latents":
        check_latents(shards, autoencoder, flips=flips)
        channels, side, _ = details["latent_shape"]
        return StoredLatents(
            LatentDataset(shards, with_text),
            (channels, side, side),
            sample_posterior,
        )
    shape = autoencoder.latent_shape(details["resolution"])
    return EncodedImages(ImageDataset(shards), shape, sample_posterior, autoencoder)


def _check_captions(shards: ShardSet) -> None:
    """Raise a UserError unless shards hold the embeddings of captions."""
    encode = "with autoencoder/encode.py --text-encoder PATH"
    if not shards.manifest.has_captions:
        raise UserError(
            f"{shards.folder}: holds no captions; make shards of images with captions (a .txt beside each, say) and"
            f" encode them {encode}, or set text_conditional=false"
        )
    if shards.manifest.kind != "latents":
        raise UserError(f"{shards.folder}: holds images, whose captions were not embedded; encode them first {encode}")
    if shards.manifest.details.get("text") is None:
        raise UserError(f"{shards.folder}: its captions were not embedded; encode the images again {encode}")


def check_text_encoder(path: str, source: DataSource) -> None:
    """Raise a UserError unless the text encoder in ``path`` made the embeddings of a source's captions."""
    shards = source.dataset.shards
    text = shards.manifest.details["text"]
    given = open_text_encoder(path, max_tokens=text["max_tokens"]).fingerprint
    if given != text["encoder"]:
        raise UserError(
            f"{shards.folder}: captions embedded by another text encoder ({text['name']}, fingerprint"
            f" {text['encoder'][:12]}, given {given[:12]}); give that one as text_encoder, or encode again"
        )


def describe_run(
    kind: str,
    source: DataSource,
    autoencoder: AutoencoderKL | None,
    *,
    class_conditional: bool,
    text_conditional: bool = False,
) -> dict[str, Any]:
    """What a checkpoint tells about itself besides config and progress."""
    manifest = source.dataset.shards.manifest
    data = {
        "folder": str(source.dataset.shards.folder),
        "kind": manifest.kind,
        "fingerprint": manifest.fingerprint,
        "num_samples": manifest.num_samples,
        "seconds": manifest.seconds,
    }
    return {
        "kind": kind,
        "data_shape": list(source.shape),
        "resolution": manifest.details["resolution"],
        "class_names": source.class_names if class_conditional else None,
        "text": manifest.details["text"] if text_conditional else None,
        "data": data,
        "autoencoder": fingerprint(autoencoder) if autoencoder is not None else None,
    }


def keep_autoencoder(config: DataConfig, run: Path, accelerator: Accelerator) -> None:
    """Copy a run's autoencoder, with its light decoder if it has one, into the run: it can then make images alone."""
    folder = run / AUTOENCODER_FOLDER
    if config.latent and config.autoencoder is not None and accelerator.is_main_process:
        if not folder.exists():
            copy_autoencoder(Path(config.autoencoder), folder)
        light_decoder, copy = map(light_decoder_folder, (Path(config.autoencoder), folder))
        if light_decoder.exists() and not copy.exists():
            with new_folder(copy) as temporary:
                shutil.copytree(light_decoder, temporary, dirs_exist_ok=True)
    accelerator.wait_for_everyone()


def keep_text_encoder(config: TextConditionalDataConfig, run: Path, accelerator: Accelerator) -> None:
    """Copy a run's text encoder into the run: it can then read prompts alone."""
    folder = run / TEXT_ENCODER_FOLDER
    wanted = config.text_conditional and accelerator.is_main_process and not folder.exists()
    if wanted and config.text_encoder is not None:
        copy_text_encoder(config.text_encoder, folder)
    accelerator.wait_for_everyone()


def first_captions(source: DataSource, num: int, device: torch.device | str) -> Prompts:
    """The first ``num`` samples that have a caption, of a source with text, as prompts; fewer if there are not so many.

    Raises:
        UserError: there is none.
    """
    shards = source.dataset.shards
    captions: list[str] = []
    samples: list[dict[str, Tensor | int]] = []
    for number in range(len(shards)):
        if len(captions) == num:
            break
        sample = source.dataset[SampleRef(number, flip=False)]
        if bool(torch.as_tensor(sample["text_mask"]).any()):
            captions.append(shards.read(number)["txt"].decode())
            samples.append(sample)
    if not captions:
        raise UserError(f"{shards.folder}: all its captions are empty; set text_conditional=false")
    batch = {key: torch.stack([torch.as_tensor(sample[key]) for sample in samples]) for key in ("text", "text_mask")}
    return Prompts(captions, source.text(batch, device))


def drop_labels(labels: Tensor, probability: float, num_classes: int, random: Random) -> Tensor:
    """Replace a share of the labels, int64 (B,), by ``num_classes``, which says "no label".

    So one network learns p(x_0 | label) and p(x_0) (Ho and Salimans, arXiv 2207.12598, Algorithm 1).
    """
    dropped = random.uniform(labels.shape) < probability
    return labels.masked_fill(dropped, num_classes)
