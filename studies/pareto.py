"""Pareto fronts and hypervolumes, by moocore."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def nondominated(values: Sequence[Sequence[float]], directions: Sequence[str]) -> list[bool]:
    """Which rows no other row beats; of equal rows only the first counts.

    Args:
        values: one row per point, one column per objective.
        directions: "minimize" or "maximize" per column.
    """
    if not len(values):
        return []
    import moocore

    maximise = [direction == "maximize" for direction in directions]
    return [bool(kept) for kept in moocore.is_nondominated(np.asarray(values, float), maximise=maximise)]


def hypervolume(
    values: Sequence[Sequence[float]],
    directions: Sequence[str],
    baseline: Sequence[float] = (),
    *,
    reference: Sequence[float] = (),
) -> float:
    """Share of the box between the ideal and the reference point that the points dominate, 0 to 1.

    The ideal is 0 where smaller is better, and the larger of 1 and the best value where larger is better for shares
    (the best value seen for others, which makes volumes of different points comparable only if they share it).

    Args:
        baseline: the untouched model's values; the reference point is 10 % worse in each minimised objective, and 0
            in each maximised one.
        reference: the reference point itself, instead.
    """
    if not len(values):
        return 0.0
    import moocore

    signs = np.array([-1.0 if direction == "maximize" else 1.0 for direction in directions])
    points = np.array(values, float) * signs
    if len(reference):
        corner = np.array(reference, float) * signs
    else:
        base = np.array(baseline, float)
        corner = np.where(signs > 0, base + 0.1 * np.abs(base), 0.0)
        corner[(signs > 0) & (base == 0)] = 1e-12
    best = np.minimum(points.min(0), corner)
    if len(baseline):
        best = np.minimum(best, np.array(baseline, float) * signs)
    ideal = np.where(signs > 0, np.minimum(best, 0.0), np.where(best >= -1, -1.0, best))
    if not (corner > ideal).all():
        return 0.0  # a box without room
    volume = float(moocore.hypervolume(points, ref=corner))
    return volume / float(np.prod(corner - ideal))
