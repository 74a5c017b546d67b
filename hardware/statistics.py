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
