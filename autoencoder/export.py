"""Write a finished autoencoder in the format of Hugging Face's diffusers."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # why: see ldgan/engine/cli.py

import argparse

from autoencoder.inference.trained_autoencoder import load_autoencoder
from ldgan.engine import cli

EXAMPLES = """
examples:
  python autoencoder/export.py --autoencoder runs/ae --out exported/vae
  python -c "from diffusers import AutoencoderKL; AutoencoderKL.from_pretrained('exported/vae')"
"""


def main() -> None:
    """Load, save."""
    flags = parse_flags()
    load_autoencoder(flags.autoencoder).save_diffusers(flags.out)
    print(f"autoencoder in diffusers' format in {flags.out}; its latents_mean and latents_std standardise latents")


def parse_flags() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--autoencoder", type=Path, required=True, metavar="RUN", help="finished run of autoencoder/train.py"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="new folder for config.json and the safetensors file"
    )
    return parser.parse_args()


command = cli.command(main)

if __name__ == "__main__":
    command()
