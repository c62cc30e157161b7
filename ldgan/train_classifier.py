"""Train a classifier of noisy samples, p(y | x_t), that can guide the samples of stage 2's models."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # why: see ldgan/engine/cli.py

from dataclasses import dataclass

from data_prep.loader import batches_of_run
from ldgan.diffusion.process import BETA_MAX, Schedule, build_diffusion
from ldgan.engine import cli
from ldgan.engine.command import parse_command, training_parser
from ldgan.engine.config import option
from ldgan.engine.ema import EMA
from ldgan.engine.optimization import OptimizerConfig, adamw, learning_rate, set_learning_rate
from ldgan.engine.session import RunConfig, Session, start
from ldgan.inference.trained_classifier import KIND, WEIGHTS
from ldgan.models.classifier import ClassifierConfig, build_classifier
from ldgan.training.classifier import ClassifierTrainer
from ldgan.training.data import DataConfig, add_latent_flag, describe_run, keep_autoencoder, open_data

EXAMPLES = """
for a diffusion GAN with T = 4:
  accelerate launch ldgan/train_classifier.py --latent --config configs/ldgan/mnist_classifier.yaml
for a DDPM with its usual 1,000 steps:
  accelerate launch ldgan/train_classifier.py --latent --config configs/ldgan/mnist_classifier.yaml \\
      num_timesteps=1000 schedule=linear run.dir=runs/classifier_ddpm
and then:
  python ldgan/sample.py --checkpoint runs/gan --classifier runs/classifier --labels 7 --num-images 64 --out samples/7
"""


@dataclass
class TrainConfig(DataConfig):
    """Everything a run depends on; the process must be that of the models to be guided."""

    num_timesteps: int = option(4, "T of the models to be guided, as in their config")
    schedule: Schedule = option("vp", "schedule of the models to be guided; a DDPM usually has linear")
    beta_max: float = option(BETA_MAX, "the same with the schedule vp, as in their config")
    run: RunConfig = option(RunConfig(), "")
    network: ClassifierConfig = option(ClassifierConfig(), "")
    optimizer: OptimizerConfig = option(OptimizerConfig(lr=1e-3, weight_decay=0.05), "")
    ema_halflife_images: int = option(20_000, "images in which the weights' average forgets half of the past")

    def validate(self) -> None:
        """Raise a UserError for settings that contradict each other."""
        super().validate()
        if self.num_timesteps < 1:
            raise cli.UserError(f"num_timesteps is {self.num_timesteps}; choose 1 or more, as in the models' config")
        if self.beta_max <= 0.1:
            raise cli.UserError(f"beta_max is {self.beta_max}; choose more than 0.1, as in the models' config")


def main() -> None:
    """Train and save."""
    parser = training_parser("Train a classifier of noisy samples, for guidance.", EXAMPLES, TrainConfig)
    add_latent_flag(parser)
    _, config = parse_command(parser, TrainConfig)
    accelerator = start(config.run)
    source, autoencoder = open_data(config, accelerator)
    classifier = build_classifier(config.network, source.shape, source.class_names).to(accelerator.device)
    optimizer = adamw(classifier.parameters(), config.optimizer)
    ema = EMA(classifier, config.ema_halflife_images, rampup_ratio=0.05)

    description = describe_run(KIND, source, autoencoder, class_conditional=True)
    session = Session(
        accelerator, config, {"classifier": classifier, WEIGHTS: ema, "optimizer": optimizer}, description
    )
    if session.finished:
        accelerator.print(f"{config.run.dir}: finished before; nothing to do")
        return
    keep_autoencoder(config, session.run.path, accelerator)

    batches = batches_of_run(source.dataset, config.run, accelerator, first_step=session.first_step, flips=config.flips)
    trainer = ClassifierTrainer(
        config.run.accumulation(accelerator),
        build_diffusion(config.schedule, config.num_timesteps, config.beta_max),
        classifier,
        optimizer,
        ema,
    )
    with session.naming_faults():
        for step in session.steps():
            set_learning_rate(optimizer, learning_rate(config.optimizer, step, config.run.num_steps))
            session.record(step, trainer.step(step, source, batches))
        session.finish({})
    accelerator.print(f"classifier in {config.run.dir} ({session.seconds:.0f} s); next: python ldgan/sample.py --help")


command = cli.command(main)

if __name__ == "__main__":
    command()
