"""ONNX files compute what PyTorch computes, and the numpy loop of docs/pipeline.md makes the same images."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from autoencoder.inference.trained_autoencoder import KIND as AUTOENCODER_KIND
from autoencoder.inference.trained_autoencoder import WEIGHTS as AUTOENCODER_WEIGHTS
from autoencoder.models.autoencoder import AutoencoderKL
from autoencoder.models.config import AutoencoderConfig
from ldgan import export
from ldgan.diffusion.samplers import SamplerConfig
from ldgan.engine.checkpoint import save_checkpoint
from ldgan.engine.cli import UserError
from ldgan.engine.config import to_dict
from ldgan.inference.trained_model import DDPM, GAN, NETWORK, WEIGHTS, build_unet, load_model
from ldgan.models.unet import UNetConfig

onnxruntime = pytest.importorskip("onnxruntime", reason="exporting needs the extra ldgan[onnx]")
pytest.importorskip("onnxscript", reason="exporting needs the extra ldgan[onnx]")

DOCS = Path(__file__).parents[2] / "docs" / "pipeline.md"
SHAPE, CLASSES = (2, 4, 4), ["cat", "dog"]
TEXT = {"encoder": "none", "name": "tiny", "dim": 8, "max_tokens": 6}


def randomise(network: nn.Module, seed: int) -> nn.Module:
    """Weights under which every input counts; fresh ones leave much at zero."""
    random = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3, generator=random)
    return network


def save_run(
    run: Path,
    kind: str = GAN,
    *,
    class_names: Sequence[str] = (),
    text: dict[str, Any] | None = None,
    latent: bool = False,
    **config: Any,
) -> Path:
    """A run of stage 2 with a small random model with attention; on latents with a random autoencoder."""
    network = UNetConfig(
        base_channels=8, channel_multipliers=[1], num_res_blocks=1, z_dim=3 if kind == GAN else 0, embedding_dim=8
    )
    unet = build_unet(
        network,
        SHAPE,
        len(class_names),
        text_dim=text["dim"] if text else 0,
        learned_variance=config.get("variance") == "learned",
    )
    config = {NETWORK[kind]: to_dict(network), "num_timesteps": 4, "latent": latent, **config}
    description = {"kind": kind, "config": config, "data_shape": list(SHAPE), "resolution": 8 if latent else 4}
    description |= {"class_names": list(class_names) or None, "text": text}
    checkpoint = run / "checkpoints" / "step_000000001"
    save_checkpoint(checkpoint, {WEIGHTS[kind]: randomise(unet, seed=0)}, description)
    if latent:
        numbers = AutoencoderConfig(latent_channels=2, base_channels=8, channel_multipliers=[1, 2], mid_attention=True)
        autoencoder = AutoencoderKL(numbers)
        nn.init.normal_(autoencoder.decoder.conv_out.weight, std=0.1)
        autoencoder.set_latent_statistics(torch.tensor([0.5, -1.0]), torch.tensor([2.0, 0.5]))
        told = {"kind": AUTOENCODER_KIND, "config": {"network": to_dict(numbers)}, "latent_statistics": {}}
        save_checkpoint(run / "autoencoder", {AUTOENCODER_WEIGHTS: autoencoder}, told)
    return run


def run_command(run: Path, out: Path, *flags: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["export.py", "--checkpoint", str(run), "--out", str(out), *flags])
        export.main()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of all kinds of inputs, and what the command made of it: once, as it takes seconds."""
    folder = tmp_path_factory.mktemp("export")
    run_command(save_run(folder / "run", class_names=CLASSES, text=TEXT, latent=True), folder / "exported")
    return folder


def test_the_numpy_loop_of_the_docs_makes_the_images_of_pytorch(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (loop,) = re.findall(r"```python\n(import json\n.*?)```", DOCS.read_text(), flags=re.DOTALL)
    assert sum(line.strip() != "" for line in loop.splitlines()) <= 25
    assert set(re.findall(r"^(?:import|from) (\w+)", loop, flags=re.MULTILINE)) == {
        "json",
        "numpy",
        "onnxruntime",
        "PIL",
    }
    monkeypatch.chdir(exported)
    exec(compile(loop, str(DOCS), "exec"), {})
    found = np.stack([np.asarray(Image.open(path)) for path in sorted(exported.glob("*.png"))])

    model, random = load_model(exported / "run"), np.random.default_rng(0)

    def noise(shape: Sequence[int]) -> Tensor:
        return torch.from_numpy(random.standard_normal((len(found), *shape), dtype=np.float32))

    labels = torch.arange(len(found)) % 2
    images = model.decode(model.run(noise, noise, labels, SamplerConfig())).permute(0, 2, 3, 1)
    assert images.float().std() > 20  # there is something in them
    assert np.abs(found.astype(int) - images.numpy().astype(int)).max() <= 1


def test_the_files_were_checked_and_a_wrong_one_is_refused(exported: Path) -> None:
    process = json.loads((exported / "exported/process.json").read_text())
    assert process["class_names"] == CLASSES
    assert process["inputs"] == ["x_t", "t", "z", "labels", "text", "text_mask"]
    assert process["text"] == {"dim": 8, "rows": 7}
    assert 0 < process["max_abs_difference"]["generator.onnx"] < 1e-3
    assert 0 < process["max_abs_difference"]["decoder.onnx"] < 1e-3
    with pytest.raises(UserError, match="exists already"):
        run_command(exported / "run", exported / "exported")
    model = load_model(exported / "run")
    network, batches = export.Generator(model), [export.generator_inputs(model, batch) for batch in (1, 5)]
    assert export.check(network, batches, exported / "exported/generator.onnx", onnxruntime) < 1e-3
    model.network.conv_out.bias.add_(1.0)
    with pytest.raises(UserError, match=r"^generator\.onnx: onnxruntime and PyTorch differ by 1\.0e\+00"):
        export.check(network, batches, exported / "exported/generator.onnx", onnxruntime)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (DDPM, {"predicts": "noise", "variance": "beta", "schedule": "linear"}),
        (GAN, {"predicts": "x_previous"}),
        (GAN, {"objective": "one_shot"}),
    ],
)
def test_every_process_is_sampled_by_the_same_numbers(tmp_path: Path, kind: str, config: dict[str, Any]) -> None:
    """The loop of the docs with PyTorch's x_0: of other predictions, variances and objectives, in float64."""
    model = load_model(save_run(tmp_path / "run", kind, **config))
    process, random = export.describe_process(model), torch.Generator().manual_seed(0)

    def noise(shape: Sequence[int]) -> Tensor:
        return torch.randn(2, *shape, generator=random)

    expected = model.run(noise, noise, None, SamplerConfig())
    random.manual_seed(0)
    network, x = export.Generator(model), noise(SHAPE)
    for t in range(process["num_steps"], 0, -1):
        z = noise((3,)) if "z" in process["inputs"] else None
        x_0 = network(x, torch.full((2,), t), z)
        x = process["coefficient_x_0"][t] * x_0 + process["coefficient_x_t"][t] * x
        x = x + process["std"][t] * noise(SHAPE)
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_exported_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learned = save_run(tmp_path / "learned", DDPM, predicts="noise", variance="learned")
    with pytest.raises(UserError, match="learned its variance"):
        run_command(learned, tmp_path / "out")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"onnxscript is not installed; pip install 'ldgan\[onnx\]'"):
        run_command(learned, tmp_path / "out")
    assert not (tmp_path / "out").exists()
