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


def hypervolume(values: Sequence[Sequence[float]], directions: Sequence[str], baseline: Sequence[float]) -> float:
    """Share of the box between the ideal and the reference point that the points dominate, 0 to 1.

    The reference point is 10 % worse than the untouched model in each minimised objective and 0 in each
    maximised one; the ideal is 0 where smaller is better, and the larger of 1 and the best value where
    larger is better for shares (the best value seen for others).
    """
    if not len(values):
        return 0.0
    import moocore

    points, reference, ideal = np.array(values, float), np.array(baseline, float), np.zeros(len(directions))
    for column, direction in enumerate(directions):
        if direction == "maximize":
            best = max(float(points[:, column].max()), reference[column])
            ideal[column] = -(1.0 if best <= 1 else best)
            points[:, column] *= -1
            reference[column] = 0.0
        else:
            reference[column] = reference[column] * 1.1 or 1e-12
    volume = float(moocore.hypervolume(points, ref=reference))
    return volume / float(np.prod(reference - ideal))
