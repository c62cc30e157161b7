"""Train a denoising diffusion GAN on latents or pixels: stage 2."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # why: see ldgan/engine/cli.py

from dataclasses import dataclass, replace
from typing import Literal

import torch
from accelerate import Accelerator

from data_prep.loader import batches_of_run
from ldgan.diffusion.process import BETA_MAX, Predicts, build_diffusion
from ldgan.engine import cli
from ldgan.engine.checkpoint import Stateful
from ldgan.engine.command import parse_command, training_parser
from ldgan.engine.config import option, to_dict
from ldgan.engine.ema import EMA
from ldgan.engine.optimization import OptimizerConfig, adamw, learning_rate, set_learning_rate
from ldgan.engine.session import RunConfig, Session, start
from ldgan.inference.descriptions import TextDescription
from ldgan.inference.jobs import NUM_PREVIEW_IMAGES, keep_preview_captions, preview
from ldgan.inference.trained_model import GAN, WEIGHTS, TrainedModel, build_unet, process_of, text_encoder_of
from ldgan.models.conditions import Prompts
from ldgan.models.discriminator import Discriminator, DiscriminatorConfig
from ldgan.models.unet import UNetConfig
from ldgan.training.data import (
    DataSource,
    TextConditionalDataConfig,
    add_latent_flag,
    check_text_encoder,
    describe_run,
    first_captions,
    keep_autoencoder,
    keep_text_encoder,
    open_data,
)
from ldgan.training.gan import DiffusionGANTrainer, LossConfig, Objective, PhasesConfig, Players
from ldgan.training.monitoring import EvaluationConfig, open_monitor

EXAMPLES = """
accelerate launch ldgan/train.py --latent --config configs/ldgan/stacked_mnist.yaml
accelerate launch ldgan/train.py --latent --config configs/ldgan/stacked_mnist.yaml num_timesteps=2 run.dir=runs/T2
accelerate launch ldgan/train.py data=data/images run.dir=runs/pixels        (without --latent: on pixels)
torchrun --nproc_per_node 2 ldgan/train.py --latent --config configs/ldgan/stacked_mnist.yaml
"""


@dataclass
class TrainConfig(TextConditionalDataConfig):
    """Everything a run of stage 2 depends on."""

    num_timesteps: int = option(4, "T, the number of denoising steps, 1 to 8")
    beta_max: float = option(
        BETA_MAX, "noise rate at the end of the schedule; less puts more of the T steps at little noise"
    )
    schedule: Literal["vp", "geometric"] = option("vp", "how noise grows with t; geometric has no beta_max")
    objective: Objective = option(
        "denoising", "denoising in T steps; one_shot: from x_T to x_0 in one, the process being augmentation alone"
    )
    predicts: Predicts = option("x_0", "what the generator estimates: x_0, the noise in x_t, or x_previous, x_{t-1}")
    timestep_weights: list[float] = option([], "how often t = 1..T is drawn in training, in proportion; []: uniformly")
    run: RunConfig = option(RunConfig(), "")
    evaluation: EvaluationConfig = option(EvaluationConfig(), "")
    generator: UNetConfig = option(UNetConfig(), "")
    discriminator: DiscriminatorConfig = option(DiscriminatorConfig(), "")
    loss: LossConfig = option(LossConfig(), "")
    phases: PhasesConfig = option(PhasesConfig(), "")
    generator_optimizer: OptimizerConfig = option(OptimizerConfig(beta1=0.5, beta2=0.9), "")
    discriminator_optimizer: OptimizerConfig = option(OptimizerConfig(beta1=0.5, beta2=0.9), "")
    ema_halflife_images: int = option(20_000, "images in which the weights' average forgets half of the past")

    def validate(self) -> None:
        """Raise a UserError for settings that contradict each other."""
        super().validate()
        self.evaluation.validate()
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
        if self.objective == "one_shot" and self.predicts != "x_0":
            raise cli.UserError(f"predicts is {self.predicts}; objective=one_shot makes x_0 itself: set predicts=x_0")
        if self.objective == "one_shot" and (self.loss.l1_weight > 0 or self.loss.l1_weight_final > 0):
            raise cli.UserError(
                "objective=one_shot makes x_0 that belong to no data; set loss.l1_weight and l1_weight_final to 0"
            )
        self.loss.validate()
        if self.loss.mismatch_weight > 0 and not self.text_conditional:
            raise cli.UserError("loss.mismatch_weight needs captions; set text_conditional=true")


def main() -> None:
    """Train and save."""
    parser = training_parser("Train a denoising diffusion GAN (stage 2).", EXAMPLES, TrainConfig)
    add_latent_flag(parser)
    _, config = parse_command(parser, TrainConfig)
    accelerator = start(config.run)
    source, autoencoder = open_data(config, accelerator)
    check_windows(config.loss.energy_windows, source.shape[-1])
    if config.text_conditional and config.text_encoder is not None:
        check_text_encoder(config.text_encoder, source)
    classes_and_text = {"class_conditional": config.class_conditional, "text_conditional": config.text_conditional}
    description = describe_run(GAN, source, autoencoder, **classes_and_text)
    text = TextDescription.of(Path(config.run.dir), description)
    num_classes, text_dim = len(description["class_names"] or []), text.dim if text is not None else 0
    players = build_players(config, source.shape, num_classes, accelerator.device, text_dim=text_dim)
    session = Session(accelerator, config, things_to_save(players), description)
    if session.finished:
        accelerator.print(f"{config.run.dir}: finished before; nothing to do")
        return
    keep_autoencoder(config, session.run.path, accelerator)
    keep_text_encoder(config, session.run.path, accelerator)

    batches = batches_of_run(source.dataset, config.run, accelerator, first_step=session.first_step, flips=config.flips)
    trainer = build_trainer(config, accelerator, players)
    model = TrainedModel(
        players.ema.model,
        process_of(to_dict(config)),
        autoencoder,
        source.shape,
        description["resolution"],
        predicts=config.predicts,
        class_names=description["class_names"],
        text_encoder=text_encoder_of(session.run.path, text),
    )
    prompts = open_prompts(config, source, session, accelerator)
    monitor = open_monitor(config.evaluation, session, model, accelerator, prompts=prompts)
    with session.naming_faults():
        for step in session.steps():
            set_learning_rates(config, step, players)
            session.record(step, trainer.step(step, source, batches, progress=step / config.run.num_steps))
            preview(session, step, model, accelerator, prompts=prompts)
            if monitor is not None:
                monitor.evaluate(step)
        session.finish({})
    accelerator.print(f"generator in {config.run.dir} ({session.seconds:.0f} s); next: python ldgan/sample.py --help")


def check_windows(windows: list[int], side: int) -> None:
    """Raise a UserError unless the energy score's windows fit into samples of ``side`` pixels."""
    if wrong := [window for window in windows if not 1 <= window < side]:
        raise cli.UserError(f"loss.energy_windows has {wrong[0]}; choose sides from 1 to {side - 1}, as x_0 has {side}")


def build_players(
    config: TrainConfig, data_shape: tuple[int, int, int], num_classes: int, device: torch.device, *, text_dim: int = 0
) -> Players:
    """Fresh networks for data of this shape, and their optimizers.

    Raises:
        UserError: the networks' settings contradict each other or the shape.
    """
    channels, side, _ = data_shape
    pairs = config.objective == "denoising"
    try:
        generator = build_unet(config.generator, data_shape, num_classes, text_dim=text_dim).to(device)
        discriminator = Discriminator(
            config.discriminator,
            channels=channels,
            resolution=side,
            num_classes=num_classes,
            pairs=pairs,
            text_dim=text_dim,
        ).to(device)
    except ValueError as error:
        raise cli.UserError(f"generator or discriminator: {error}") from error
    return Players(
        generator,
        discriminator,
        adamw(generator.parameters(), config.generator_optimizer),
        adamw(discriminator.parameters(), config.discriminator_optimizer),
        EMA(generator, config.ema_halflife_images, rampup_ratio=0.05),
    )


def build_trainer(config: TrainConfig, accelerator: Accelerator, players: Players) -> DiffusionGANTrainer:
    """What takes the steps of a run."""
    return DiffusionGANTrainer(
        config.run.accumulation(accelerator),
        build_diffusion(config.schedule, config.num_timesteps, config.beta_max),
        players,
        objective=config.objective,
        predicts=config.predicts,
        label_dropout=config.label_dropout,
        caption_dropout=config.caption_dropout,
        loss=config.loss,
        phases=config.phases,
        timestep_weights=config.timestep_weights or [1.0] * config.num_timesteps,
    )


def open_prompts(config: TrainConfig, source: DataSource, session: Session, accelerator: Accelerator) -> Prompts | None:
    """The captions of previews and evaluations, of which the run keeps those of previews; None without captions."""
    if not config.text_conditional:
        return None
    num_evaluated = config.evaluation.num_images if config.evaluation.every_steps > 0 else 0
    prompts = first_captions(source, max(NUM_PREVIEW_IMAGES, num_evaluated), accelerator.device)
    if accelerator.is_main_process:
        keep_preview_captions(session, prompts)
    return prompts


def things_to_save(players: Players) -> dict[str, Stateful]:
    """What a checkpoint holds, by the names of its files."""
    return {
        "generator": players.generator,
        WEIGHTS[GAN]: players.ema,
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


command = cli.command(main)

if __name__ == "__main__":
    command()
