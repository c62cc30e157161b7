"""Serve a page on which a trained model can be played with in a browser: sample, inpaint, paint, interpolate."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # why: see ldgan/engine/cli.py

import argparse
import os
import tempfile
from time import sleep
from typing import TYPE_CHECKING, Literal

from ldgan.diffusion.samplers import SamplerConfig
from ldgan.engine import cli
from ldgan.engine.run import resolve_checkpoint
from ldgan.engine.session import add_precision_flag
from ldgan.inference.jobs import add_model_flags, check_sampler
from ldgan.inference.trained_model import TrainedModel

if TYPE_CHECKING:
    from ldgan.reports.demo_page import Studio

EXAMPLES = """
examples:
  python ldgan/demo.py --checkpoint runs/gan
  python ldgan/demo.py --checkpoint runs/ddpm --sampler ddim --steps 50
  python ldgan/demo.py --checkpoint runs/gan --host 0.0.0.0 --port 8000 --max-images 8 --queue 4

Then open the address that is printed. Gradio serves the page: pip install 'ldgan[demo]'. Ctrl-C ends it.
"""
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


def main() -> None:
    """Load the model, then serve until Ctrl-C."""
    flags = parse_flags()
    try:
        from ldgan.reports.demo_page import build_page, serve
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise cli.UserError("the page is served by Gradio: pip install 'ldgan[demo]'") from error
    studio = open_studio(flags)
    # What visitors send and are shown is gone when the command ends.
    with tempfile.TemporaryDirectory(prefix="ldgan-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = build_page(studio, "/".join(flags.checkpoint.parts[-2:]), flags.queue)
        address = serve(page, flags.host, flags.port)
        print(f"{flags.checkpoint} at {address} (Ctrl-C ends it)", flush=True)
        if flags.host not in LOCAL_HOSTS:
            print("anybody who can reach this machine can use it; there is no password", flush=True)
        try:
            while True:
                sleep(1)
        except KeyboardInterrupt:
            page.close(verbose=False)


def open_studio(flags: argparse.Namespace) -> Studio:
    """What the page works with; a UserError if the model cannot be sampled in this way."""
    from ldgan.pipeline import LatentDDGAN
    from ldgan.reports.demo_page import Studio

    checkpoint = resolve_checkpoint(flags.checkpoint)  # before the pipeline would look for it on the Hub
    dtype: Literal["bf16"] | None = "bf16" if flags.precision == "bf16" else None
    pipeline = LatentDDGAN.from_pretrained(checkpoint, device=flags.device, dtype=dtype, decoder=flags.decoder)
    check_sampler(checkpoint, pipeline.model, SamplerConfig(flags.sampler, flags.steps or 0))
    return Studio(pipeline, flags.max_images, can_guide(checkpoint, pipeline.model), flags.steps, flags.sampler)


def can_guide(checkpoint: Path, model: TrainedModel) -> bool:
    """Whether a model takes classifier-free guidance."""
    try:
        check_sampler(checkpoint, model, SamplerConfig(guidance_scale=2.0))
    except cli.UserError:
        return False
    return True


def parse_flags() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add_model_flags(parser)
    add(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="where to listen; 0.0.0.0: everywhere (default: 127.0.0.1)",
    )
    add("--port", type=cli.positive, default=7860, metavar="N", help="where to listen (default: 7860)")
    add("--max-images", type=cli.positive, default=16, metavar="N", help="images of one request, at most (default: 16)")
    add("--queue", type=cli.positive, default=16, metavar="N", help="requests that wait, at most (default: 16)")
    add("--device", default="cpu", metavar="NAME", help="where the networks are, such as cuda (default: cpu)")
    add(
        "--sampler",
        choices=("ancestral", "ddim"),
        default="ancestral",
        help="as of ldgan/sample.py (default: ancestral)",
    )
    add("--steps", type=cli.positive, metavar="N", help="steps, such as 50 for a DDPM run with ddim (default: all)")
    add_precision_flag(parser)
    return parser.parse_args()


command = cli.command(main)

if __name__ == "__main__":
    command()
