"""What a checkpoint of stage 2 says of its data and of the process behind it, checked before anything is built."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ldgan.diffusion.process import BETA_MAX, Diffusion, Predicts, Schedule, Variance, build_diffusion
from ldgan.engine.checkpoint import DESCRIPTION_FILE, DamagedCheckpointError
from ldgan.engine.cli import UserError
from ldgan.engine.config import MISSING, from_dict, option
from ldgan.engine.rebuilding import MAX_NUMBER, field

MAX_TIMESTEPS = 100_000  # a hundred times those of Ho et al.; tables are as long


@dataclass(frozen=True)
class DataDescription:
    """The data of a model: shape (C, s, s) of x_0, side of the images in pixels, names of the classes."""

    shape: tuple[int, int, int]
    resolution: int
    class_names: list[str] | None

    @classmethod
    def of(cls, folder: Path, description: Mapping[str, Any]) -> DataDescription:
        """What the ``description`` in the checkpoint ``folder`` says.

        Raises:
            DamagedCheckpointError: a field is missing, or cannot be true.
        """
        shape = field(folder, description, "data_shape", list)
        if len(shape) != 3 or any(type(size) is not int or size < 1 for size in shape) or shape[1] != shape[2]:
            raise DamagedCheckpointError(f"{folder / DESCRIPTION_FILE}: damaged: data_shape is {shape!r:.80}")
        if (resolution := field(folder, description, "resolution", int)) < 1:
            raise DamagedCheckpointError(f"{folder / DESCRIPTION_FILE}: damaged: resolution is {resolution}")
        names = description.get("class_names")
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise DamagedCheckpointError(f"{folder / DESCRIPTION_FILE}: damaged: class_names is {names!r:.80}")
        return cls((shape[0], shape[1], shape[2]), resolution, names)


@dataclass(frozen=True)
class TextDescription:
    """The embeddings of captions that a model has learnt from: their text encoder's fingerprint and name, and sizes."""

    encoder: str
    name: str
    dim: int
    max_tokens: int

    @classmethod
    def of(cls, folder: Path, description: Mapping[str, Any]) -> TextDescription | None:
        """What the ``description`` in the checkpoint ``folder`` says; None for a model that reads no captions.

        Raises:
            DamagedCheckpointError: a field is missing, or cannot be true.
        """
        if description.get("text") is None:
            return None
        text = field(folder, description, "text", dict)
        encoder, name = (field(folder, text, key, str) for key in ("encoder", "name"))
        dim, max_tokens = (field(folder, text, key, int) for key in ("dim", "max_tokens"))
        for key, number in (("dim", dim), ("max_tokens", max_tokens)):
            if not 1 <= number <= MAX_NUMBER:
                raise DamagedCheckpointError(f"{folder / DESCRIPTION_FILE}: damaged: {key} of text is {number}")
        return cls(encoder, name, dim, max_tokens)


@dataclass
class ProcessDescription:
    """Those keys of a run's config by which its model is used; keys younger than the run have their default."""

    num_timesteps: int = option(MISSING, "T")
    schedule: Schedule = option("vp", "how noise grows with t")
    beta_max: float = option(BETA_MAX, "of the schedule vp")
    objective: Literal["denoising", "one_shot"] = option("denoising", "of the generator's training")
    predicts: Predicts = option("x_0", "what the network estimates")
    variance: Variance = option("posterior", "of p(x_{t-1} | x_t)")
    latent: bool = option(False, "whether x_0 are latents")

    def validate(self) -> None:
        """Raise a UserError for numbers that make no process."""
        if not 1 <= self.num_timesteps <= MAX_TIMESTEPS:
            raise UserError(f"num_timesteps is {self.num_timesteps}; 1 to {MAX_TIMESTEPS:,} can be used")

    @classmethod
    def of(cls, config: Mapping[str, Any], source: str) -> ProcessDescription:
        """What the ``config`` of a run says; errors name ``source``.

        Raises:
            UserError: a value has the wrong type, or cannot be used.
        """
        known = {key.name: config[key.name] for key in dataclasses.fields(cls) if key.name in config}
        return from_dict(cls, known, source)

    def diffusion(self) -> Diffusion:
        """The process that the model was trained on.

        Raises:
            UserError: there is none with these numbers.
        """
        try:
            return build_diffusion(self.schedule, self.num_timesteps, self.beta_max)
        except ValueError as error:
            settings = f"schedule={self.schedule} num_timesteps={self.num_timesteps} beta_max={self.beta_max}"
            raise UserError(f"no diffusion process has {settings}; use another checkpoint") from error
