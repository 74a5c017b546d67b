"""From logits to accuracy, loss and calibration error, each with its interval."""

from __future__ import annotations

import numpy as np

from ..core.errors import CandidateError
from ..core.types import Measurement, Provenance
from ..hardware.statistics import mean_interval, share_interval


def score(logits: np.ndarray, labels: np.ndarray, provenance: Provenance) -> dict[str, Measurement]:
    """Accuracy (Wilson interval), mean cross-entropy, and expected calibration error.

    Args:
        logits: float32 (N, classes).
        labels: int64 (N,).

    Raises:
        CandidateError: a logit is not finite.
    """
    if not np.isfinite(logits).all():
        bad = int((~np.isfinite(logits)).any(1).sum())
        raise CandidateError(f"the model's output is not finite for {bad} of {len(labels)} images")
    count = len(labels)
    right = logits.argmax(1) == labels
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    losses = -log_probabilities[np.arange(count), labels]
    confidence = np.exp(log_probabilities.max(1))
    deviation = float(losses.std(ddof=1)) if count > 1 else 0.0
    return {
        "accuracy": Measurement(
            "accuracy",
            float(right.mean()),
            "",
            share_interval(int(right.sum()), count),
            count,
            provenance,
            np.packbits(right).tobytes().hex(),
        ),
        "loss": Measurement(
            "loss", float(losses.mean()), "", mean_interval(float(losses.mean()), deviation, count), count, provenance
        ),
        "calibration_error": Measurement(
            "calibration_error", calibration_error(confidence, right), "", None, count, provenance
        ),
    }


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error over equal-width bins (Guo et al. 2017, arXiv:1706.04599)."""
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    total = 0.0
    for number in range(bins):
        inside = index == number
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return float(total)


def parity_error(expected: np.ndarray, got: np.ndarray) -> float:
    """Root mean square of the difference between two sets of logits, relative to the first one's."""
    scale = float(np.sqrt(np.mean(np.square(expected))))
    return float(np.sqrt(np.mean(np.square(got - expected)))) / max(scale, 1e-12)
