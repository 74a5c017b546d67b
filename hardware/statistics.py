"""Intervals for what was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z95 = 1.959964


def median_interval(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Median and its interval from order statistics, of at least 95 % whatever the distribution.

    Source: Conover, Practical Nonparametric Statistics, 3rd ed., section 3.2 (exact binomial).
    """
    from scipy.stats import binom

    ordered = sorted(values)
    count = len(ordered)
    middle = (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
    low = max(0, int(binom.ppf(0.025, count, 0.5)) - 1)
    return middle, (ordered[low], ordered[count - 1 - low])


def share_interval(successes: int, count: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share (Wilson 1927)."""
    share = successes / count
    scale = 1 + Z95**2 / count
    centre = (share + Z95**2 / (2 * count)) / scale
    half = Z95 * math.sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(mean: float, deviation: float, count: int) -> tuple[float, float]:
    """95 % interval of a mean, given the sample's standard deviation (normal approximation)."""
    half = Z95 * deviation / math.sqrt(count)
    return mean - half, mean + half


def paired_interval(gained: int, lost: int, count: int) -> tuple[float, float]:
    """95 % interval of the difference of two shares of the same `count` samples.

    Args:
        gained: samples that count for the first share and not for the second; `lost`: the other way round.

    Source: Agresti and Min 2005, Statistics in Medicine 24, "Wald + 2": half a sample is added to each of four cells.
    """
    difference = gained - lost
    half = Z95 * math.sqrt(gained + lost + 1 - difference**2 / (count + 2))
    return (difference - half) / (count + 2), (difference + half) / (count + 2)


def variance_between(values: Sequence[float], errors: Sequence[float]) -> float:
    """Variance of the thing that was measured several times, beyond what the standard errors explain.

    Source: DerSimonian and Laird 1986, Controlled Clinical Trials 7.
    """
    weights = [error**-2 for error in errors]
    total = sum(weights)
    mean = sum(w * value for w, value in zip(weights, values, strict=True)) / total
    disagreement = sum(w * (value - mean) ** 2 for w, value in zip(weights, values, strict=True))
    scale = total - sum(w**2 for w in weights) / total
    return max(0.0, (disagreement - (len(values) - 1)) / scale) if scale > 0 else 0.0


def pooled_interval(values: Sequence[float], errors: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Mean of several measurements of one thing and its 95 % interval, which is wider where they disagree.

    Args:
        errors: standard error of each value, above 0.

    Source: random effects, as for `variance_between`.
    """
    between = variance_between(values, errors)
    weights = [1 / (error**2 + between) for error in errors]
    mean = sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights)
    half = Z95 / math.sqrt(sum(weights))
    return mean, (mean - half, mean + half)
