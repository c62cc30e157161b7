"""Export a trained model as ONNX: generator, decoder, and the numbers of the sampling loop as JSON."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # why: see ldgan/engine/cli.py

import argparse
import json
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from autoencoder.models.autoencoder import AutoencoderKL
from autoencoder.models.light_decoder import LightDecoder
from autoencoder.models.text import Text
from ldgan.diffusion.samplers import SamplerConfig
from ldgan.engine import cli
from ldgan.engine.cli import UserError
from ldgan.engine.files import new_folder, write_through
from ldgan.engine.seeding import generator
from ldgan.inference.jobs import add_model_flags, open_model
from ldgan.inference.trained_model import TrainedModel

GENERATOR, DECODER, PROCESS = "generator.onnx", "decoder.onnx", "process.json"
OPSET = 20
EXAMPLE_BATCH, CHECKED_BATCHES = 2, (1, 3)  # 1 is the size that an exporter is tempted to take for a constant
MAX_CHECKED_STEPS = 8
TOLERANCE = 1e-3  # of the largest value; networks whose graph is right differ by 1e-6 to 1e-5

EXAMPLES = """
examples:
  python ldgan/export.py --checkpoint runs/gan --out exported/gan
  python ldgan/export.py --checkpoint runs/gan --decoder light --out exported/gan_light

docs/pipeline.md has a sampling loop of numpy and onnxruntime alone.
"""


class Generator(nn.Module):
    """The estimate of x_0, (B, C, s, s), of x_t, t and those of z, labels, text and text_mask that the model has.

    t, int64 (B,), counts the steps of the process, 1..T, whatever levels the network was trained on.
    """

    def __init__(self, model: TrainedModel) -> None:
        super().__init__()
        self.network, self.diffusion = model.network, model.diffusion
        self.predicts, self.variance = model.predicts, model.variance

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        z: Tensor | None = None,
        labels: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """See the class; shapes are those of `UNet.forward`."""
        known = Text(text, text_mask) if text is not None and text_mask is not None else None
        output = self.network(x_t, z, self.diffusion.timesteps[t], labels, known)
        return self.diffusion.denoised(output, x_t, t, self.predicts, self.variance).x_0


class Decoder(nn.Module):
    """Standardised latents (B, C, h, w) -> images (B, 3, H, W), about [-1, 1] and not clamped."""

    def __init__(self, decoder: AutoencoderKL | LightDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, latents: Tensor) -> Tensor:
        """See the class."""
        return self.decoder.decode(latents)


def main() -> None:
    """Load, export, check."""
    flags = parse_flags()
    onnxruntime = import_onnxruntime()
    model = open_model(flags.checkpoint, SamplerConfig(), decoder=flags.decoder)
    if model.variance == "learned":
        raise UserError(f"{flags.checkpoint}: learned its variance, which the exported loop has no place for")
    if flags.out.exists():
        raise UserError(f"{flags.out}: exists already; choose another --out")
    with new_folder(flags.out) as folder:
        differences = {GENERATOR: export_generator(model, folder / GENERATOR, onnxruntime)}
        if (decoder := model.light_decoder or model.autoencoder) is not None:
            differences[DECODER] = export_decoder(decoder, model.data_shape, folder / DECODER, onnxruntime)
        process = describe_process(model) | {"opset": OPSET, "max_abs_difference": differences}
        write_through(folder / PROCESS, (json.dumps(process, indent=2) + "\n").encode())
    for name, difference in differences.items():
        print(f"{flags.out / name}: differs from PyTorch by {difference:.1e} at most")


def describe_process(model: TrainedModel) -> dict[str, Any]:
    """What a sampling loop has to know: x_{t-1} = coefficient_x_0[t] x_0 + coefficient_x_t[t] x_t + std[t] noise.

    Entry 0 of these lists is never read; std[1] is 0 where no noise is added at the last step.
    """
    diffusion, network = model.diffusion, model.network
    coefficients = (diffusion.posterior_coefficient_x_0, diffusion.posterior_coefficient_x_t)
    std = (diffusion.betas if model.variance == "beta" else diffusion.posterior_variance).sqrt()
    if model.predicts == "x_previous":  # what the network gives is x_{t-1} itself
        coefficients, std = (torch.ones_like(std), torch.zeros_like(std)), torch.zeros_like(std)
    std[1] = 0.0  # Ho et al., Algorithm 2
    return {
        "num_steps": diffusion.num_steps,
        "coefficient_x_0": coefficients[0].tolist(),
        "coefficient_x_t": coefficients[1].tolist(),
        "std": std.tolist(),
        "inputs": list(generator_inputs(model, 1)),
        "data_shape": list(model.data_shape),
        "z_dim": network.z_dim,
        "class_names": model.class_names,  # label K of K classes says "no label", if the model has learnt to do without
        "text": {"dim": network.text_dim, "rows": num_text_rows(model)} if model.text_encoder is not None else None,
        "resolution": model.resolution,
    }


def generator_inputs(model: TrainedModel, batch: int, step: int = 1) -> dict[str, Tensor]:
    """Random inputs of `Generator` by name, at one step."""
    random, network = generator("cpu", "export", batch, step), model.network
    inputs = {
        "x_t": torch.randn(batch, *model.data_shape, generator=random),
        "t": torch.full((batch,), step),
    }
    if network.z_dim:
        inputs["z"] = torch.randn(batch, network.z_dim, generator=random)
    if network.num_classes:
        inputs["labels"] = torch.arange(batch) % (network.num_classes + 1)
    if model.text_encoder is not None:
        rows = num_text_rows(model)
        inputs["text"] = torch.randn(batch, rows, network.text_dim, generator=random)
        inputs["text_mask"] = torch.arange(rows) < torch.randint(rows + 1, (batch, 1), generator=random)
    return inputs


def num_text_rows(model: TrainedModel) -> int:
    """Rows of a text: the pooled one and those of the tokens."""
    assert model.text_encoder is not None
    return 1 + model.text_encoder.max_tokens


def export_generator(model: TrainedModel, path: Path, onnxruntime: ModuleType) -> float:
    """Write the generator; how far it is from PyTorch's, at most, at steps from T to 1."""
    network = Generator(model).eval()
    export(network, generator_inputs(model, EXAMPLE_BATCH), "x_0", path)
    all_steps = model.diffusion.num_steps
    steps = torch.linspace(all_steps, 1, min(all_steps, MAX_CHECKED_STEPS)).round().long().tolist()
    inputs = [generator_inputs(model, batch, step) for batch in CHECKED_BATCHES for step in steps]
    return check(network, inputs, path, onnxruntime)


def export_decoder(
    decoder: AutoencoderKL | LightDecoder, data_shape: tuple[int, int, int], path: Path, onnxruntime: ModuleType
) -> float:
    """Write the decoder; how far it is from PyTorch's, at most."""
    network = Decoder(decoder).eval()

    def inputs(batch: int) -> dict[str, Tensor]:
        return {"latents": torch.randn(batch, *data_shape, generator=generator("cpu", "export", batch))}

    export(network, inputs(EXAMPLE_BATCH), "images", path)
    return check(network, [inputs(batch) for batch in CHECKED_BATCHES], path, onnxruntime)


@torch.no_grad()
def export(network: nn.Module, inputs: dict[str, Tensor], output: str, path: Path) -> None:
    """Write one network as ONNX, weights inside; the first dimension of every input is the batch, of any size."""
    shapes = {name: {0: torch.export.Dim("batch")} for name in inputs}
    # Traced here: left to itself, torch.onnx.export tries other ways if this one fails, and fixes the batch's size.
    program = torch.export.export(network, (), inputs, dynamic_shapes=shapes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that several inputs share the name of their first dimension
        torch.onnx.export(
            program,
            f=path,
            input_names=list(inputs),
            output_names=[output],
            opset_version=OPSET,
            external_data=False,  # a single file, which may have 2 GB
            verbose=False,
        )


@torch.no_grad()
def check(network: nn.Module, batches: list[dict[str, Tensor]], path: Path, onnxruntime: ModuleType) -> float:
    """The largest absolute difference of outputs between onnxruntime and PyTorch; a UserError if it is large."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    difference = largest = 0.0
    for inputs in batches:
        expected = network(**inputs)
        (found,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        difference = max(difference, (torch.from_numpy(found) - expected).abs().max().item())
        largest = max(largest, expected.abs().max().item())
    if not difference <= TOLERANCE * largest:  # NaN too
        raise UserError(f"{path.name}: onnxruntime and PyTorch differ by {difference:.1e}; try other versions of them")
    return difference


def import_onnxruntime() -> ModuleType:
    """onnxruntime, once all that an export takes is there."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; pip install 'ldgan[onnx]'") from error
    return onnxruntime


def parse_flags() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_flags(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for the files")
    return parser.parse_args()


command = cli.command(main)

if __name__ == "__main__":
    command()
