"""The classifier score: are images clearly of one class each, and of many classes together?

Salimans et al., "Improved Techniques for Training GANs", NeurIPS 2016 (arXiv 1606.03498): exp of the mean KL
divergence of p(class | image) from the mean of these over the images. It bears the name Inception score for Inception
only, where it is measured on 50,000 images in 10 splits. It knows no real images: a generator that makes one perfect
image of each class reaches its maximum, and scores of a network trained on other classes mislead (Barratt and Sharma,
"A Note on the Inception Score", 2018, arXiv 1801.01973).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ldgan.engine.cli import UserError
from ldgan.metrics.distances import check_finite

SEED = 2020  # torch-fidelity's

# exp(-700) is still a number in float64. A class that is less likely in all images of a split would give 0 * infinity.
LEAST_LOG_PROBABILITY = -700.0


class ClassifierScore(NamedTuple):
    """Mean and standard deviation over the splits of the images; between 1 and the number of classes."""

    mean: float
    std: float


def classifier_score(logits: Tensor, *, num_splits: int = 10, seed: int = SEED) -> ClassifierScore:
    """Classifier score of logits (N, K), computed by torch-fidelity in float64.

    It lies between 1, where all images have the same probabilities, and K, where every image is surely of one class
    and every split holds as many of each. The images of a split, N / ``num_splits``, bound it as well: compare values
    for the same numbers only.

    Args:
        logits: in any floating-point type.
        num_splits: the images, in an order drawn with ``seed``, are cut into as many equal parts.
        seed: of the order.

    Raises:
        ValueError: the shape is another.
        UserError: there are fewer images than splits, or a logit is NaN or infinite.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    if logits.ndim != 2:
        raise ValueError(f"logits must be (N, K), not {tuple(logits.shape)}")
    if len(logits) < num_splits:
        raise UserError(f"a classifier score in {num_splits} splits needs as many images, not {len(logits)}; take more")
    check_finite(logits, f"logits of {len(logits):,} images")
    log_probabilities = logits.double().log_softmax(dim=1).clamp_(min=LEAST_LOG_PROBABILITY)
    score = isc_features_to_metric(log_probabilities, splits=num_splits, shuffle=True, rng_seed=seed)
    return ClassifierScore(score[KEY_METRIC_ISC_MEAN], score[KEY_METRIC_ISC_STD])
