"""The Python door: `LatentDDGAN` loads a trained model and samples, edits, saves and shares it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor

from autoencoder.inference.light_decoder import light_decoder_folder
from autoencoder.inference.text_encoder import copy_text_encoder
from autoencoder.inference.trained_autoencoder import copy_autoencoder
from ldgan.diffusion.samplers import Callback, SamplerConfig
from ldgan.engine.checkpoint import read_description, save_checkpoint
from ldgan.engine.cli import UserError
from ldgan.engine.files import new_folder
from ldgan.engine.run import resolve_checkpoint, run_of
from ldgan.engine.shares import batches
from ldgan.inference import editing
from ldgan.inference.jobs import Job, check_sampler, class_names_of, labels_of, open_model
from ldgan.inference.model_card import model_card, num_parameters
from ldgan.inference.pictures import OUTPUTS, Masks, Output, Pictures, open_masks, open_pictures, to_images, to_masks
from ldgan.inference.trained_model import AUTOENCODER_FOLDER, TEXT_ENCODER_FOLDER, WEIGHTS, TrainedModel
from ldgan.models.conditions import Prompts

if TYPE_CHECKING:
    from typing_extensions import Unpack

Method = Literal["ancestral", "ddim"]
Labels = Sequence[int | str]

DTYPES: Mapping[str | None, torch.dtype | None] = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "README.md"]  # nothing that could be a pickle


class Settings(TypedDict, total=False):
    """How images are made; `LatentDDGAN.sample` tells what each means, and its default."""

    seed: int
    labels: Labels | None
    prompts: Sequence[str] | None
    guidance: float
    steps: int | None
    sampler: Method
    batch_size: int


class HubOptions(TypedDict, total=False):
    """Which version of a model of the Hub, and how it is fetched; see `huggingface_hub.snapshot_download`."""

    revision: str | None
    cache_dir: str | os.PathLike[str] | None
    force_download: bool
    local_files_only: bool
    token: str | bool | None


class LatentDDGAN(ModelHubMixin, library_name="ldgan"):
    """A trained model, a diffusion GAN or a DDPM, with all that it takes to make and edit images.

    `from_pretrained` makes one. Image i of a call comes from seed ``seed`` + i, whatever the batch size: its noise is
    the same to the bit, its pixels but for the rounding of convolutions over batches of another size. Errors that
    the caller can mend are `ldgan.engine.cli.UserError`: one line that names what is possible.

    >>> from ldgan import LatentDDGAN
    >>> pipeline = LatentDDGAN.from_pretrained("runs/mine/gan")
    >>> [image] = pipeline.sample(1, seed=7)
    >>> image.save("seven.png")
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> LatentDDGAN:
        """Leave the mixin's out, which makes a config.json of the arguments and deep-copies the model for it."""
        return object.__new__(cls)

    def __init__(
        self, model: TrainedModel, checkpoint: str | os.PathLike[str], dtype: torch.dtype | None = None
    ) -> None:
        """``checkpoint`` is the folder of the model's weights; in ``dtype``, if any, networks compute by autocast."""
        self.model = model
        self._checkpoint, self._dtype = Path(checkpoint), dtype
        self._description = read_description(self._checkpoint)

    def __repr__(self) -> str:
        model, size = self.model, f"{self.resolution}x{self.resolution}"
        facts = [
            self._description["kind"],
            f"{num_parameters(model.network):,} parameters",
            f"T = {self.num_steps}",
            f"latents {'x'.join(map(str, model.data_shape))} of images {size}"
            if model.autoencoder
            else f"images {size}",
            f"{len(self.class_names)} classes" if self.class_names else "",
            "prompts" if self.has_text else "",
            f"on {self.device}",
        ]
        return f"{type(self).__name__}({', '.join(filter(None, facts))})"

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        path: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        dtype: Literal["bf16", "fp16"] | None = None,
        compile: bool = False,
        decoder: Literal["full", "light"] = "full",
        **hub: Unpack[HubOptions],
    ) -> LatentDDGAN:
        """Load a run, one of its checkpoints, RUN/best, a folder of `save_pretrained`, or ORG/NAME from the Hub.

        ``dtype`` is the arithmetic of the networks by autocast, None fp32; weights stay fp32. ``compile`` hands network
        and decoder to torch.compile, which pays after minutes of sampling. ``decoder`` "light" takes the one of
        autoencoder/distill.py. ``hub``, as of snapshot_download, concerns the Hub, which is asked only for an ORG/NAME
        that is no folder here and fetches JSON, text and safetensors files alone.

        Raises:
            UserError: there is no such model, it is damaged, or it has no light decoder; or there is no such device.

        >>> half = LatentDDGAN.from_pretrained("runs/mine/gan", dtype="bf16")
        """
        # Not the mixin's own: it looks for a config.json and takes RUN/best for a name on the Hub.
        number_format, name = one_of("dtype", dtype, DTYPES), os.fspath(path)
        checkpoint = resolve_checkpoint(download(name, **hub) if only_on_the_hub(name) else Path(name))
        model = open_model(checkpoint, SamplerConfig(), usable_device(device), decoder)
        if compile:
            compile_networks(model)
        return cls(model, checkpoint, number_format)

    def to(self, device: torch.device | str) -> LatentDDGAN:
        """Move all networks to a device; returns the pipeline itself. For arithmetic see `from_pretrained`.

        Raises:
            UserError: there is no such device.

        >>> pipeline.to("cpu").device
        device(type='cpu')
        """
        if isinstance(device, torch.dtype):
            raise UserError("moves to a device; weights stay fp32, and from_pretrained takes a dtype", parameter="to")
        self.model.to(usable_device(device))
        return self

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], *, config: None = None, model_card_kwargs: None = None
    ) -> None:
        """Write one folder that holds all of the model: `from_pretrained` and every command take it as they take a run.

        It holds ``checkpoint.json``, the averaged weights, ``autoencoder/`` with its light decoder, ``text_encoder/``,
        each where there is one, and ``README.md``, the model card. ``checkpoint.json`` has the run's whole config,
        paths of your machine included. Leave the other arguments out: `push_to_hub` passes them.

        Raises:
            UserError: the folder exists.

        >>> pipeline.save_pretrained("mine")
        >>> same = LatentDDGAN.from_pretrained("mine")
        """
        folder = Path(save_directory)
        if folder.exists():
            raise UserError(f"{folder}: exists already; choose a new folder")
        with new_folder(folder) as temporary:
            super().save_pretrained(temporary)

    def _save_pretrained(self, save_directory: Path) -> None:
        """The mixin's hook: weights and what belongs to them, but for the model card."""
        save_directory.rmdir()  # which save_checkpoint makes itself
        kept = {key: value for key, value in self._description.items() if key not in ("format", "libraries", "things")}
        save_checkpoint(save_directory, {WEIGHTS[kept["kind"]]: self.model.network}, kept)
        if self.model.autoencoder is not None:
            source, copy = run_of(self._checkpoint) / AUTOENCODER_FOLDER, save_directory / AUTOENCODER_FOLDER
            copy_autoencoder(source, copy)
            if light_decoder_folder(source).exists():
                shutil.copytree(light_decoder_folder(source), light_decoder_folder(copy))
        if self.model.text_encoder is not None:
            copy_text_encoder(self.model.text_encoder.folder, save_directory / TEXT_ENCODER_FOLDER)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The README.md of `save_pretrained`: what the model is, and how it is used."""
        return ModelCard(model_card(self._description, self.model))

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.model.device

    @property
    def num_steps(self) -> int:
        """T, the steps of sampling as the model was trained."""
        return self.model.diffusion.num_steps

    @property
    def resolution(self) -> int:
        """Height and width of the images, in pixels."""
        return self.model.resolution

    @property
    def class_names(self) -> list[str]:
        """Names of the classes 0, 1, ...; empty for a model without classes."""
        return list(class_names_of(self.model))

    @property
    def has_text(self) -> bool:
        """Whether the model takes prompts."""
        return self.model.text_encoder is not None

    def sample(
        self,
        num_images: int,
        *,
        seed: int = 0,
        labels: Labels | None = None,
        prompts: Sequence[str] | None = None,
        guidance: float = 1.0,
        steps: int | None = None,
        sampler: Method = "ancestral",
        output: Output = "pil",
        batch_size: int = 64,
        callback: Callback | None = None,
    ) -> Any:
        """Make images: ``num_images`` of them, uint8, (s, s, 3) or (3, s, s) each.

        Args:
            num_images: how many.
            seed: image i is made from seed ``seed`` + i.
            labels: classes by number or name, gone through again and again; None: drawn from the seeds.
            prompts: texts that say what images show, gone through again and again; None: whatever was learnt.
            guidance: classifier-free guidance: 1 is the plain model, 2 to 8 follow labels or prompts closer.
            steps: steps, evenly among those of training: 50, say, of a DDPM with "ddim"; None: all of them.
            sampler: "ancestral", as a model was trained, or "ddim", for a DDPM.
            output: "pil", a list; "numpy", an array (B, s, s, 3); or "tensor", (B, 3, s, s) on the CPU.
            batch_size: images per forward pass.
            callback: called after each step of each batch with t, the estimate of x_0 and x_{t-1}, (B, C, s, s).

        Raises:
            UserError: the model knows no such label, no labels or no text; ``prompts`` are empty; or it cannot be
                sampled this way, in so many steps or with guidance.

        >>> images = pipeline.sample(4, seed=10, output="numpy")
        >>> images.shape == (4, pipeline.resolution, pipeline.resolution, 3)
        True
        """
        one_of("output", output, OUTPUTS)
        x_0 = self.sample_latents(
            num_images,
            callback,
            seed=seed,
            labels=labels,
            prompts=prompts,
            guidance=guidance,
            steps=steps,
            sampler=sampler,
            batch_size=batch_size,
        )
        return self.decode(x_0, output=output, batch_size=batch_size)

    __call__ = sample

    def sample_latents(self, num_images: int, callback: Callback | None = None, **settings: Unpack[Settings]) -> Tensor:
        """What `sample` decodes: standardised latents or, of a model on pixels, images in about [-1, 1].

        fp32 (num_images, C, s, s) on the model's device; ``settings`` and errors are as of `sample`.

        >>> x_0 = pipeline.sample_latents(2)
        >>> x_0.shape == (2, *pipeline.model.data_shape)
        True
        """
        job = self._job(num_images, **settings)
        with self._autocast():
            return torch.cat([job.sample(numbers, callback) for numbers in batches(range(num_images), job.batch_size)])

    def decode(self, latents: Tensor, *, output: Output = "pil", batch_size: int = 64) -> Any:
        """Images, with ``output`` as of `sample`, of latents (B, C, s, s) as `sample_latents` and `encode` give them.

        >>> images = pipeline.decode(pipeline.sample_latents(2, seed=3), output="tensor")
        >>> images.equal(pipeline.sample(2, seed=3, output="tensor"))
        True
        """
        to_output = one_of("output", output, OUTPUTS)
        with self._autocast():
            return to_output(torch.cat([self.model.decode(x_0) for x_0 in latents.to(self.device).split(batch_size)]))

    def encode(self, images: Pictures, *, batch_size: int = 64) -> Tensor:
        """Standardised latents, the posterior's means, of images; of a model on pixels, the images in [-1, 1].

        ``images`` are PIL images, paths, arrays (H, W, 3) or (B, H, W, 3), tensors (3, H, W) or (B, 3, H, W), or a list
        of these; arrays and tensors hold uint8 in 0..255 or floats in 0..1. Those of another size than the model's are
        scaled and cropped to squares, as for training. The latents are fp32 (B, C, s, s), on the model's device.

        Raises:
            UserError: something is no image, or cannot be read.

        >>> x_0 = pipeline.encode("photo.png")
        """
        fitted = to_images(open_pictures(images), self.resolution)
        with self._autocast():
            return torch.cat([editing.encode_images(self.model, part) for part in fitted.split(batch_size)])

    def reconstruct(self, images: Pictures, *, output: Output = "pil", batch_size: int = 64) -> Any:
        """Images (as of `encode`) through the autoencoder and back: what latents can hold of them.

        >>> [again] = pipeline.reconstruct("photo.png")
        """
        return self.decode(self.encode(images, batch_size=batch_size), output=output, batch_size=batch_size)

    def edit(
        self,
        images: Pictures,
        *,
        strength: float | None = None,
        step: int | None = None,
        num_images: int | None = None,
        output: Output = "pil",
        **settings: Unpack[Settings],
    ) -> Any:
        """Turn images, or strokes that were painted roughly, into samples like them: noise to step t, then denoise.

        SDEdit (Meng et al., arXiv 2108.01073). Give ``strength``, in (0, 1], or ``step``, t in 1..T: a little keeps the
        image, all of it forgets it. ``images``, as of `encode`, are gone through again and again until there are
        ``num_images`` (None: one for each image); ``settings`` and ``output`` are as of `sample`.

        Raises:
            UserError: as of `sample` and `encode`; neither or both of ``strength`` and ``step``, or one out of range.

        >>> [edited] = pipeline.edit("photo.png", strength=0.5)
        >>> variants = pipeline.edit("photo.png", step=1, num_images=3, seed=7, output="numpy")
        """
        if (strength is None) == (step is None):
            raise UserError(f"edit takes strength, in (0, 1], or step, 1 to {self.num_steps}; give one of them")
        given = to_images(open_pictures(images), self.resolution)
        job = self._job(len(given) if num_images is None else num_images, **settings)
        if strength is not None:
            step = editing.step_of_strength(strength, job.num_steps)
        return self._edited(job, output, editing.edit, [given], step=step)

    def inpaint(
        self,
        images: Pictures,
        masks: Masks,
        *,
        num_resamples: int = editing.DEFAULT_RESAMPLES,
        num_images: int | None = None,
        output: Output = "pil",
        **settings: Unpack[Settings],
    ) -> Any:
        """Make the masked part of images anew, to fit the rest, whose pixels stay as they are (at the model's size).

        ``masks`` are PIL images or paths (new where they have 128 or more of 255), or arrays or tensors (H, W) or
        (B, H, W) of bool, uint8 (not 0) or floats in 0..1 (more than half), or a list of these: one for each image, of
        its size, or one for all. They are scaled and cropped with their images. Each step is done ``num_resamples``
        times, which fits both parts to each other (RePaint, Lugmayr et al., arXiv 2201.09865). Else it is as `edit`.

        Raises:
            UserError: as of `sample` and `encode`; a mask has another size than its image; the numbers do not fit.

        >>> import numpy as np
        >>> before = pipeline.sample(1, output="numpy")
        >>> mask = np.zeros(before.shape[1:3], dtype=bool)
        >>> mask[: len(mask) // 2] = True
        >>> after = pipeline.inpaint(before, mask, seed=1, output="numpy")
        >>> bool((after[:, ~mask] == before[:, ~mask]).all())
        True
        """
        pictures = open_pictures(images)
        new = to_masks(open_masks(masks, pictures), self.resolution)
        given = to_images(pictures, self.resolution)
        job = self._job(len(given) if num_images is None else num_images, **settings)
        return self._edited(job, output, editing.inpaint, [given, new], num_resamples=num_resamples)

    def outpaint(
        self,
        images: Pictures,
        *,
        left: int = 0,
        right: int = 0,
        top: int = 0,
        bottom: int = 0,
        num_resamples: int = editing.DEFAULT_RESAMPLES,
        num_images: int | None = None,
        output: Output = "pil",
        **settings: Unpack[Settings],
    ) -> Any:
        """Continue images by so many pixels on each side: windows of the model's size slide outward, each inpainted.

        Images keep their size, the model's or larger, and come out as (H + top + bottom) x (W + left + right) pixels.
        The rest is as of `inpaint`.

        Raises:
            UserError: as of `inpaint`; images are smaller than the model's, or of several sizes; no side is to grow.

        >>> before = pipeline.sample(1)
        >>> [wide] = pipeline.outpaint(before, left=4, right=4)
        >>> wide.size == (pipeline.resolution + 8, pipeline.resolution)
        True
        """
        given = to_images(open_pictures(images))
        job = self._job(len(given) if num_images is None else num_images, **settings)
        sides = {"left": left, "right": right, "top": top, "bottom": bottom}
        return self._edited(job, output, editing.outpaint, [given], num_resamples=num_resamples, **sides)

    def interpolate(
        self,
        seed_a: int,
        seed_b: int,
        num_frames: int = 8,
        *,
        along: editing.Along = "both",
        output: Output = "pil",
        **settings: Unpack[Settings],
    ) -> Any:
        """Walk from the sample of ``seed_a`` to that of ``seed_b`` in ``num_frames`` images, both ends included.

        ``along`` says what changes: "z", "x_T" (with the noise of all steps), or "both", where the ends are the samples
        of the two seeds. All frames are one batch and show the first of ``labels`` and ``prompts``; ``settings`` and
        ``output`` are as of `sample`, but that there is no other seed.

        Raises:
            UserError: as of `sample`; fewer than 2 frames; the model has no z.

        >>> frames = pipeline.interpolate(0, 5, num_frames=3, output="numpy")
        >>> frames.shape == (3, pipeline.resolution, pipeline.resolution, 3)
        True
        """
        to_output = one_of("output", output, OUTPUTS)
        job = self._job(num_frames, **settings)
        with self._autocast():
            how = job.conditions_of([0] * num_frames)
            return to_output(editing.interpolate(self.model, seed_a, seed_b, num_frames, along=along, **how))

    def mix_styles(
        self,
        num_images: int,
        *,
        style_seed: int,
        switch_step: int,
        output: Output = "pil",
        **settings: Unpack[Settings],
    ) -> Any:
        """Make images whose z is another seed's in the late steps, t <= ``switch_step``: style mixing over steps.

        Image i is that of seed ``seed`` + i with the z of ``style_seed`` + i; ``switch_step`` 0 changes nothing.
        ``settings`` and ``output`` are as of `sample`.

        Raises:
            UserError: as of `sample`; ``switch_step`` is out of range, or the model has no z.

        >>> mixed = pipeline.mix_styles(2, style_seed=100, switch_step=1)
        """
        job = self._job(num_images, **settings)
        styles = torch.arange(style_seed, style_seed + num_images)

        def mix(model: TrainedModel, style_seeds: Tensor, seeds: Sequence[int], **how: Any) -> Tensor:
            return editing.mix_styles(model, seeds, style_seeds.tolist(), switch_step=switch_step, **how)

        return self._edited(job, output, mix, [styles])

    def _autocast(self) -> AbstractContextManager[Any]:
        """Arithmetic of the networks."""
        return torch.autocast(self.device.type, self._dtype, enabled=self._dtype is not None)

    def _job(
        self,
        num_images: int,
        *,
        seed: int = 0,
        labels: Labels | None = None,
        prompts: Sequence[str] | None = None,
        guidance: float = 1.0,
        steps: int | None = None,
        sampler: Method = "ancestral",
        batch_size: int = 64,
    ) -> Job:
        """What is asked for, if the model can do it."""
        if num_images < 1 or batch_size < 1:
            raise UserError(f"num_images is {num_images} and batch_size {batch_size}; give 1 or more")
        one_of("sampler", sampler, ("ancestral", "ddim"))
        if steps is not None and not 1 <= steps <= self.num_steps:
            raise UserError(f"steps is {steps}, but the model has {self.num_steps}; give 1 to {self.num_steps}")
        settings = SamplerConfig(sampler, steps or 0, guidance_scale=guidance)
        check_sampler(self._checkpoint, self.model, settings)
        text = None
        if prompts is not None:
            prompts = [prompts] if isinstance(prompts, str) else list(prompts)
            text = Prompts(prompts, self.model.encode_prompts(prompts))
        return Job(self.model, settings, self._labels(labels), num_images, seed, batch_size, text)

    def _labels(self, labels: Labels | int | str | None) -> list[int] | None:
        """Numbers of classes by number or name; names may be such that the command line could not tell them."""
        if labels is None:
            return labels_of(None, self.model)
        items = [labels] if isinstance(labels, (int, str)) else list(labels)
        if not items:
            raise UserError("there are no labels; give one or more, or leave them out")
        numbers = {name: number for number, name in enumerate(self.class_names)}
        known = [[numbers[item]] if item in numbers else labels_of(str(item), self.model) for item in items]
        return [number for found in known for number in found or []]

    def _edited(
        self, job: Job, output: Output, edit: Callable[..., Tensor], given: Sequence[Tensor], **how: Any
    ) -> Any:
        """Images of a job that ``edit`` makes of those that are given, in batches."""
        to_output = one_of("output", output, OUTPUTS)
        parts = []
        with self._autocast():
            for numbers in batches(range(job.num_images), job.batch_size):
                rows = [[number % len(tensor) for number in numbers] for tensor in given]
                inputs = [tensor[row] for tensor, row in zip(given, rows)]
                parts.append(edit(self.model, *inputs, seeds_of(job, numbers), **job.conditions_of(numbers), **how))
        return to_output(torch.cat(parts))


def seeds_of(job: Job, numbers: Sequence[int]) -> list[int]:
    """The seeds of the images with these numbers."""
    return [job.first_seed + number for number in numbers]


def one_of(name: str, value: Any, possible: Any) -> Any:
    """What ``possible`` has for ``value``; a UserError that lists the possible ones if it has nothing."""
    if value not in possible:
        raise UserError(f"{name} is {value!r}; choose one of {', '.join(map(repr, possible))}")
    return possible[value] if isinstance(possible, Mapping) else value


def usable_device(device: torch.device | str) -> torch.device:
    """The device, if tensors can be made there; else a UserError."""
    try:
        return torch.empty(0, device=device).device
    except (AssertionError, RuntimeError) as error:  # AssertionError: of a torch that was built without it
        reason = str(error).partition("\n")[0]
        raise UserError(f"{device} cannot be used ({reason}); choose cpu, say", parameter="device") from error


def only_on_the_hub(name: str) -> bool:
    """Whether ORG/NAME is no folder here, nor a place in one."""
    path = Path(name)
    return len(path.parts) == 2 and not path.is_absolute() and not path.exists() and not path.parent.exists()


def download(name: str, **hub: Any) -> Path:
    """The folder of a model of the Hub, fetched unless it is there; ``hub`` as of snapshot_download."""
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES, **hub))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{name}: no folder here, and not to be had from the Hub ({reason}); check the path") from error


def compile_networks(model: TrainedModel) -> None:
    """Have torch.compile compile network and decoder when they are first used."""
    model.network.compile()
    if model.light_decoder is not None:
        model.light_decoder.compile()
    elif model.autoencoder is not None:
        model.autoencoder.decoder.compile()
