"""The README.md of a model that is saved to be shared: facts from its checkpoint, and how to use it."""

from __future__ import annotations

from typing import Any

from torch import nn

from ldgan.inference.trained_model import GAN, TrainedModel

TAGS = ("denoising-diffusion-gan", "latent-diffusion", "image-generation")
PAPER = "https://arxiv.org/abs/2112.07804"
MAX_CLASSES = 20  # named in the card

HEADER = """---
library_name: ldgan
pipeline_tag: {task}
tags:
{tags}
---
"""

BODY = """
# {title}

Made with ldgan, a toolkit for latent denoising diffusion GANs ([Xiao, Kreis, Vahdat, ICLR 2022]({paper})).

| | |
| --- | --- |
{facts}

```python
from ldgan import LatentDDGAN

pipeline = LatentDDGAN.from_pretrained("PATH_OR_ORG/NAME")
images = pipeline.sample({example})  # PIL images; image i comes from seed + i
```

The weights are averages over training, as safetensors; nothing is pickled. `checkpoint.json` holds the run's config.
"""


def model_card(description: dict[str, Any], model: TrainedModel) -> str:
    """Markdown with the metadata that the Hugging Face Hub reads.

    Args:
        description: the checkpoint's, as of `ldgan.engine.checkpoint.read_description`.
        model: the same, loaded.
    """
    example = "4, seed=0"
    if model.class_names:
        example += ", labels=[0]"
    if model.text_encoder is not None:
        example += ', prompts=["..."]'
    header = HEADER.format(
        task="text-to-image" if model.text_encoder is not None else "unconditional-image-generation",
        tags="\n".join(f"- {tag}" for tag in TAGS),
    )
    side, num_steps = model.resolution, model.diffusion.num_steps
    title = f"{description['kind']}, {side}x{side} pixels, T = {num_steps}"
    facts = "\n".join(f"| {name} | {value} |" for name, value in facts_of(description, model).items())
    return header + BODY.format(title=title, paper=PAPER, facts=facts, example=example)


def facts_of(description: dict[str, Any], model: TrainedModel) -> dict[str, str]:
    """What there is to say of a model, by name, for people."""
    config, data = description["config"], description.get("data", {})
    kind = "a few steps, each by a generator and a random z" if description["kind"] == GAN else "many small steps"
    facts = {
        "kind": f"{description['kind']}: {kind}",
        "steps T": f"{model.diffusion.num_steps} ({config.get('schedule', 'vp')} schedule)",
        "images": f"{model.resolution}x{model.resolution} pixels",
        "works on": "pixels" if model.autoencoder is None else f"latents {'x'.join(map(str, model.data_shape))}",
        "parameters": f"{num_parameters(model.network):,}",
    }
    if model.autoencoder is not None:
        facts["parameters of the decoder"] = f"{num_parameters(model.autoencoder.decoder):,}"
    if "num_samples" in data:
        facts["trained on"] = f"{data['num_samples']:,} samples"
    if "step" in description:
        facts["training steps"] = f"{description['step']:,}"
    if names := model.class_names:
        facts["classes"] = (
            f"{len(names)}: {', '.join(names[:MAX_CLASSES])}{', ...' if len(names) > MAX_CLASSES else ''}"
        )
    if text := description.get("text"):
        facts["prompts"] = f"read by {text['name']}, up to {text['max_tokens']} tokens"
    return facts


def num_parameters(network: nn.Module) -> int:
    """How many numbers of a network were learnt."""
    return sum(parameter.numel() for parameter in network.parameters())
