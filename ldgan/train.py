"""Train a denoising diffusion GAN on latents or pixels: stage 2."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # As a script, Python puts this folder first on sys.path, where our modules would shadow libraries of the
    # same name (`evaluate`, say) for every dependency; the checkout's root belongs there instead.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dataclasses import dataclass, replace

import torch
from accelerate.utils import set_seed

from autoencoder.loading import fingerprint, load_autoencoder
from autoencoder.networks import AutoencoderKL
from data_prep.loader import batches_of_run
from ldgan.data import DataSource, open_source
from ldgan.diffusion import BETA_MAX, Diffusion, vp_betas
from ldgan.engine import cli
from ldgan.engine.checkpoint import Stateful
from ldgan.engine.command import parse_command, training_parser
from ldgan.engine.config import MISSING, option
from ldgan.engine.ema import EMA
from ldgan.engine.optimization import OptimizerConfig, adamw, learning_rate, set_learning_rate
from ldgan.engine.session import RunConfig, Session, make_accelerator
from ldgan.loading import (
    KIND,
    WEIGHTS,
    TrainedModel,
    build_discriminator,
    build_generator,
    keep_autoencoder,
)
from ldgan.networks import DiscriminatorConfig, GeneratorConfig
from ldgan.training import DiffusionGANTrainer, LossConfig, PhasesConfig, Players

NUM_PREVIEW_IMAGES, PREVIEW_COLUMNS = 64, 16

EXAMPLES = """
accelerate launch ldgan/train.py --latent --config configs/ldgan/stacked_mnist.yaml
accelerate launch ldgan/train.py --latent --config configs/ldgan/stacked_mnist.yaml num_timesteps=2 run.dir=runs/T2
accelerate launch ldgan/train.py data=data/images run.dir=runs/pixels        (without --latent: on pixels)
torchrun --nproc_per_node 2 ldgan/train.py --latent --config configs/ldgan/stacked_mnist.yaml
"""


@dataclass
class TrainConfig:
    """Everything a run of stage 2 depends on."""

    data: str = option(MISSING, "folder of latent shards, or of image shards (encoded on the fly with latent=true)")
    latent: bool = option(False, "train on latents of `autoencoder`; the flag --latent sets it")
    autoencoder: str | None = option(None, "finished run of autoencoder/train.py; needed with latent=true")
    flips: bool = option(False, "mirror half of the images; latent shards must hold the mirror images")
    sample_posterior: bool = option(True, "draw x_0 from the latents' posterior at every read; false: take its mean")
    num_timesteps: int = option(4, "T, the number of denoising steps, 1 to 8")
    beta_max: float = option(
        BETA_MAX, "noise rate at the end of the schedule; less puts more of the T steps at little noise"
    )
    timestep_weights: list[float] = option([], "how often t = 1..T is drawn in training, in proportion; []: uniformly")
    run: RunConfig = option(RunConfig(), "")
    generator: GeneratorConfig = option(GeneratorConfig(), "")
    discriminator: DiscriminatorConfig = option(DiscriminatorConfig(), "")
    loss: LossConfig = option(LossConfig(), "")
    phases: PhasesConfig = option(PhasesConfig(), "")
    generator_optimizer: OptimizerConfig = option(OptimizerConfig(beta1=0.5, beta2=0.9), "")
    discriminator_optimizer: OptimizerConfig = option(OptimizerConfig(beta1=0.5, beta2=0.9), "")
    ema_halflife_images: int = option(20_000, "images in which the weights' average forgets half of the past")

    def validate(self) -> None:
        """Raise a UserError for settings that contradict each other."""
        if not 1 <= self.num_timesteps <= 8:
            raise cli.UserError(f"num_timesteps is {self.num_timesteps}; choose 1 to 8")
        if self.beta_max <= 0.1:
            raise cli.UserError(
                f"beta_max is {self.beta_max}; choose more than 0.1, the rate at the start (20 is usual)"
            )
        if self.phases.pretraining_steps > 0 and self.loss.l1_weight == 0 and self.loss.energy_weight == 0:
            raise cli.UserError("phases.pretraining_steps needs a loss: set loss.l1_weight or loss.energy_weight")
        weights = self.timestep_weights
        if weights and (len(weights) != self.num_timesteps or min(weights) < 0 or sum(weights) == 0):
            raise cli.UserError(f"timestep_weights is {weights}; give one weight >= 0 for each of t = 1..T, or none")
        if self.latent and self.autoencoder is None:
            raise cli.UserError("--latent needs an autoencoder; give autoencoder=RUN, a run of autoencoder/train.py")


def main() -> None:
    """Train and save."""
    parser = training_parser("Train a denoising diffusion GAN (stage 2).", EXAMPLES, TrainConfig)
    # Appended to the settings that it stands for, so that --dry-run, the checks and the run's config see it too.
    parser.add_argument(
        "--latent", dest="overrides", action="append_const", const="latent=true", help="train on latents: latent=true"
    )
    _, config = parse_command(parser, TrainConfig)
    accelerator = make_accelerator(config.run.precision, config.run.num_threads)
    set_seed(config.run.seed)
    autoencoder = None
    if config.latent and config.autoencoder is not None:
        autoencoder = load_autoencoder(Path(config.autoencoder), accelerator.device)
    source = open_source(config.data, autoencoder, flips=config.flips, sample_posterior=config.sample_posterior)
    check_windows(config.loss.energy_windows, source.shape[-1])
    accelerator.print(f"{config.data}: {len(source.dataset):,} samples of shape {source.shape}: {source.description}")

    diffusion = Diffusion(vp_betas(config.num_timesteps, beta_max=config.beta_max))
    players = build_players(config, source.shape, accelerator.device)
    session = Session(accelerator, config, things_to_save(players), describe_run(source, autoencoder))
    if session.finished:
        accelerator.print(f"{config.run.dir}: finished before; nothing to do")
        return
    if config.autoencoder is not None and config.latent and accelerator.is_main_process:
        keep_autoencoder(Path(config.autoencoder), session.run.path)
    accelerator.wait_for_everyone()

    batches = batches_of_run(source.dataset, config.run, accelerator, first_step=session.first_step, flips=config.flips)
    trainer = DiffusionGANTrainer(
        accelerator,
        diffusion,
        players,
        loss=config.loss,
        phases=config.phases,
        timestep_weights=config.timestep_weights or [1.0] * config.num_timesteps,
        num_micro_batches=config.run.micro_batches(accelerator.num_processes)[0],
        batch_size=config.run.batch_size,
        seed=config.run.seed,
    )
    resolution = source.dataset.shards.manifest.details["resolution"]
    model = TrainedModel(players.ema.model, diffusion, autoencoder, source.shape, resolution)
    for step in session.steps():
        set_learning_rates(config, step, players)
        session.record(step, trainer.step(step, source, batches, progress=step / config.run.num_steps))
        if session.wants_preview(step):
            with accelerator.autocast():
                previews = model.decode(model.sample(list(range(NUM_PREVIEW_IMAGES))))
            session.preview(step, "samples", previews, PREVIEW_COLUMNS)

    session.finish({})
    accelerator.print(f"generator in {config.run.dir} ({session.seconds:.0f} s); next: python ldgan/sample.py --help")


def check_windows(windows: list[int], side: int) -> None:
    """Raise a UserError unless the energy score's windows fit into samples of ``side`` pixels."""
    if wrong := [window for window in windows if not 1 <= window < side]:
        raise cli.UserError(f"loss.energy_windows has {wrong[0]}; choose sides from 1 to {side - 1}, as x_0 has {side}")


def build_players(config: TrainConfig, data_shape: tuple[int, int, int], device: torch.device) -> Players:
    """Fresh networks for data of this shape, and their optimizers."""
    generator = build_generator(config.generator, data_shape).to(device)
    discriminator = build_discriminator(config.discriminator, data_shape).to(device)
    return Players(
        generator,
        discriminator,
        adamw(generator.parameters(), config.generator_optimizer),
        adamw(discriminator.parameters(), config.discriminator_optimizer),
        EMA(generator, config.ema_halflife_images, rampup_ratio=0.05),
    )


def things_to_save(players: Players) -> dict[str, Stateful]:
    """What a checkpoint holds, by the names of its files."""
    return {
        "generator": players.generator,
        WEIGHTS: players.ema,
        "discriminator": players.discriminator,
        "generator_optimizer": players.generator_optimizer,
        "discriminator_optimizer": players.discriminator_optimizer,
    }


def set_learning_rates(config: TrainConfig, step: int, players: Players) -> None:
    """Set the rates of step 1..num_steps; pretraining and the game each have a schedule from warm-up to decay."""
    num_pretraining_steps, num_steps = config.phases.pretraining_steps, config.run.num_steps
    if step <= num_pretraining_steps:
        pretraining = replace(config.generator_optimizer, lr=config.phases.pretraining_lr)
        set_learning_rate(players.generator_optimizer, learning_rate(pretraining, step, num_pretraining_steps))
        return
    game = (step - num_pretraining_steps, num_steps - num_pretraining_steps)
    set_learning_rate(players.generator_optimizer, learning_rate(config.generator_optimizer, *game))
    set_learning_rate(players.discriminator_optimizer, learning_rate(config.discriminator_optimizer, *game))


def describe_run(source: DataSource, autoencoder: AutoencoderKL | None) -> dict:
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
        "kind": KIND,
        "data_shape": list(source.shape),
        "resolution": manifest.details["resolution"],
        "data": data,
        "autoencoder": fingerprint(autoencoder) if autoencoder is not None else None,
    }


if __name__ == "__main__":
    cli.run(main)
