"""Train a DDPM on latents or pixels, with the U-Net of the diffusion GAN: the baseline of stage 2."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # why: see ldgan/engine/cli.py

from dataclasses import dataclass
from typing import Literal

import torch

from data_prep.loader import batches_of_run
from ldgan.diffusion.process import build_diffusion
from ldgan.diffusion.samplers import SamplerConfig
from ldgan.engine import cli
from ldgan.engine.checkpoint import Stateful
from ldgan.engine.command import parse_command, training_parser
from ldgan.engine.config import option
from ldgan.engine.ema import EMA
from ldgan.engine.optimization import OptimizerConfig, adamw, learning_rate, set_learning_rate
from ldgan.engine.session import RunConfig, Session, start
from ldgan.inference.descriptions import MAX_TIMESTEPS
from ldgan.inference.jobs import preview
from ldgan.inference.trained_model import DDPM, WEIGHTS, TrainedModel, build_unet
from ldgan.models.unet import UNetConfig
from ldgan.training.data import ConditionalDataConfig, add_latent_flag, describe_run, keep_autoencoder, open_data
from ldgan.training.ddpm import DDPMTrainer, Denoising
from ldgan.training.monitoring import EvaluationConfig, open_monitor

MAX_PREVIEW_STEPS = 50  # previews by DDIM: all of 1,000 steps would hold the training up
MAX_REMAINING_SIGNAL = 0.01  # abar_T; sampling starts from pure noise, so hardly any data may be left in x_T

EXAMPLES = """
accelerate launch ldgan/train_ddpm.py --latent --config configs/ldgan/stacked_mnist_ddpm.yaml
accelerate launch ldgan/train_ddpm.py --latent --config configs/ldgan/stacked_mnist_iddpm.yaml      (improved DDPM)
accelerate launch ldgan/train_ddpm.py --latent --config configs/ldgan/stacked_mnist_ddpm.yaml schedule=cosine \\
    run.dir=runs/cosine
torchrun --nproc_per_node 2 ldgan/train_ddpm.py --latent --config configs/ldgan/stacked_mnist_ddpm.yaml
"""


@dataclass
class TrainConfig(ConditionalDataConfig):
    """Everything a run of the baseline depends on; the defaults are those of Ho et al."""

    num_timesteps: int = option(1000, "T, the number of noise levels")
    schedule: Literal["linear", "cosine"] = option(
        "linear", "linear: b_t from 1e-4 to 0.02, made for T = 1000; cosine: abar_t along a cosine, for any T"
    )
    predicts: Literal["noise", "x_0"] = option("noise", "what the network estimates")
    variance: Literal["beta", "posterior", "learned"] = option(
        "posterior", "variance of p(x_{t-1} | x_t): b_t, that of q(x_{t-1} | x_t, x_0), or learned (improved DDPM)"
    )
    vlb_weight: float = option(1e-3, "weight of the variational bound, which teaches the variance if it is learned")
    run: RunConfig = option(RunConfig(), "")
    evaluation: EvaluationConfig = option(EvaluationConfig(), "")
    network: UNetConfig = option(UNetConfig(z_dim=0), "")
    optimizer: OptimizerConfig = option(OptimizerConfig(beta2=0.999), "")
    max_gradient_norm: float = option(1.0, "gradients longer than this are shortened to it; 0: never")
    ema_halflife_images: int = option(20_000, "images in which the weights' average forgets half of the past")

    def validate(self) -> None:
        """Raise a UserError for settings that contradict each other."""
        super().validate()
        self.evaluation.validate()
        if not 1 <= self.num_timesteps <= MAX_TIMESTEPS:
            raise cli.UserError(f"num_timesteps is {self.num_timesteps}; choose 1 to {MAX_TIMESTEPS:,} (1000 is usual)")
        remaining = float(build_diffusion(self.schedule, self.num_timesteps).alphas_bar[-1])
        if remaining > MAX_REMAINING_SIGNAL:
            raise cli.UserError(
                f"num_timesteps is {self.num_timesteps}, which leaves {remaining:.0%} of the data's variance in x_T"
                f" (schedule={self.schedule}); choose more (1000 is usual), or schedule=cosine"
            )
        if self.network.z_dim != 0:
            raise cli.UserError(f"network.z_dim is {self.network.z_dim}, but a DDPM draws no z; leave it out")
        if self.vlb_weight < 0 or self.max_gradient_norm < 0:
            raise cli.UserError(
                f"vlb_weight is {self.vlb_weight} and max_gradient_norm {self.max_gradient_norm}; choose 0 or more"
            )


def main() -> None:
    """Train and save."""
    parser = training_parser("Train a DDPM, the baseline of stage 2.", EXAMPLES, TrainConfig)
    add_latent_flag(parser)
    _, config = parse_command(parser, TrainConfig)
    accelerator = start(config.run)
    source, autoencoder = open_data(config, accelerator)
    class_names = source.class_names if config.class_conditional else None

    diffusion = build_diffusion(config.schedule, config.num_timesteps)
    learner = build_learner(config, source.shape, len(class_names or []), accelerator.device)
    description = describe_run(DDPM, source, autoencoder, class_conditional=config.class_conditional)
    session = Session(accelerator, config, things_to_save(learner), description)
    if session.finished:
        accelerator.print(f"{config.run.dir}: finished before; nothing to do")
        return
    keep_autoencoder(config, session.run.path, accelerator)

    batches = batches_of_run(source.dataset, config.run, accelerator, first_step=session.first_step, flips=config.flips)
    trainer = DDPMTrainer(
        config.run.accumulation(accelerator),
        diffusion,
        learner,
        predicts=config.predicts,
        variance=config.variance,
        vlb_weight=config.vlb_weight,
        label_dropout=config.label_dropout,
        max_gradient_norm=config.max_gradient_norm,
    )
    model = TrainedModel(
        learner.ema.model,
        diffusion,
        autoencoder,
        source.shape,
        description["resolution"],
        predicts=config.predicts,
        variance=config.variance,
        class_names=class_names,
    )
    sampler = SamplerConfig(method="ddim", num_steps=min(config.num_timesteps, MAX_PREVIEW_STEPS))
    monitor = open_monitor(config.evaluation, session, model, accelerator, sampler)
    with session.naming_faults():
        for step in session.steps():
            set_learning_rate(learner.optimizer, learning_rate(config.optimizer, step, config.run.num_steps))
            session.record(step, trainer.step(step, source, batches))
            preview(session, step, model, accelerator, sampler)
            if monitor is not None:
                monitor.evaluate(step)
        session.finish({})
    accelerator.print(f"DDPM in {config.run.dir} ({session.seconds:.0f} s); next: python ldgan/sample.py --help")


def build_learner(
    config: TrainConfig, data_shape: tuple[int, int, int], num_classes: int, device: torch.device
) -> Denoising:
    """A fresh network for data of this shape, and its optimizer."""
    network = build_unet(config.network, data_shape, num_classes, learned_variance=config.variance == "learned")
    network = network.to(device)
    optimizer = adamw(network.parameters(), config.optimizer)
    return Denoising(network, optimizer, EMA(network, config.ema_halflife_images, rampup_ratio=0.05))


def things_to_save(learner: Denoising) -> dict[str, Stateful]:
    """What a checkpoint holds, by the names of its files."""
    return {"network": learner.network, WEIGHTS[DDPM]: learner.ema, "optimizer": learner.optimizer}


command = cli.command(main)

if __name__ == "__main__":
    command()
