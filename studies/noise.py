"""Fronts of figures that have 95 % intervals: what differs by more than noise. docs/fronts.md gives the reasons."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..core.types import Measurement
from ..hardware.statistics import Z95, paired_interval, pooled_interval, variance_between

Row = Sequence[Measurement]


@dataclass(frozen=True)
class Standing:
    """What became of one point when a front was thinned.

    Attributes:
        by: position of the kept point that stands for it; its own where it is kept.
        level: whether the two differ in nothing by more than noise. Otherwise `by` is clearly better in something, and
            clearly worse in nothing.
    """

    by: int
    level: bool


def clearly_better(a: Measurement, b: Measurement, direction: str) -> bool:
    """Whether `a` is better than `b` by more than noise: the 95 % interval of the difference lies on one side of 0.

    The interval is made from those of `a` and `b` as if they were independent (square and add: Zou and Donner 2008,
    Statistics in Medicine 27); a figure without an interval counts as exact. Shares of the same samples, whose outcomes
    are known one by one, are compared in pairs (Agresti and Min 2005, Statistics in Medicine 24).

    Args:
        direction: "minimize" or "maximize".
    """
    larger, smaller = (a, b) if direction == "maximize" else (b, a)
    gap = larger.value - smaller.value
    if gap <= 0:
        return False
    if larger.outcomes and smaller.outcomes and larger.samples == smaller.samples:
        gained, lost = _changed(larger.outcomes, smaller.outcomes), _changed(smaller.outcomes, larger.outcomes)
        return paired_interval(gained, lost, larger.samples)[0] > 0
    (least, _), (_, most) = _ends(larger), _ends(smaller)
    return gap > math.hypot(larger.value - least, most - smaller.value)


def _ends(measurement: Measurement) -> tuple[float, float]:
    return measurement.ci95 or (measurement.value, measurement.value)


@functools.lru_cache(4096)
def _changed(these: str, others: str) -> int:
    """How many samples count in `these` and not in `others`."""
    return (int(these, 16) & ~int(others, 16)).bit_count()


def standings(rows: Sequence[Row], directions: Sequence[str]) -> list[Standing]:
    """Thin points to those that differ by more than noise; for each point, which kept one stands for it.

    A point beats another if it is clearly better in an objective and clearly worse in none; the two are level if
    neither is clearly better in anything. Of those that nothing beats, the first is kept, and stands for all that it
    beats or is level with; the same again for what is left. First is what has the best first objective, then the best
    second one, and so on; then the narrower intervals; then what comes first. Where noise makes a circle of points that
    each beat the next, its first one is kept and counts as level with whatever beats it.

    No kept point beats another or is level with it, and the order of the points matters for equal ones alone.

    Args:
        rows: one per point, with a measurement per objective.
        directions: "minimize" or "maximize" per objective.
    """
    order = sorted(range(len(rows)), key=lambda position: (_preference(rows[position], directions), position))
    return _thin(order, _relations(rows, directions))


def _preference(row: Row, directions: Sequence[str]) -> tuple[float, ...]:
    values = [m.value if way == "minimize" else -m.value for m, way in zip(row, directions, strict=True)]
    return (*values, *(high - low for low, high in map(_ends, row)))


def _better(a: Row, b: Row, directions: Sequence[str]) -> bool:
    """Whether `a` is clearly better than `b` in any objective."""
    return any(clearly_better(x, y, way) for x, y, way in zip(a, b, directions, strict=True))


def _relations(rows: Sequence[Row], directions: Sequence[str]) -> np.ndarray:
    """Bool (points, points): whether one is clearly better than the other in any objective."""
    found = [[a is not b and _better(a, b, directions) for b in rows] for a in rows]
    return np.array(found, bool).reshape(len(rows), len(rows))


def _thin(order: Sequence[int], better: np.ndarray) -> list[Standing]:
    beats, level = better & ~better.T, ~(better | better.T)
    found: dict[int, Standing] = {}
    left = np.ones(len(order), bool)
    while left.any():
        unbeaten = left & ~beats[left].any(0)
        eligible = unbeaten if unbeaten.any() else _circles(beats, left)
        kept = next(position for position in order if eligible[position])
        gone = left & (beats[kept] | level[kept] | beats[:, kept])
        for position in np.flatnonzero(gone):
            found[int(position)] = Standing(kept, not beats[kept, position])
        left &= ~gone
    return [found[position] for position in range(len(order))]


def _circles(beats: np.ndarray, left: np.ndarray) -> np.ndarray:
    """Which of the points that are left beat, in one or more steps, whatever beats them."""
    from scipy.sparse.csgraph import connected_components

    positions = np.flatnonzero(left)
    inner = beats[np.ix_(positions, positions)]
    _, groups = connected_components(inner, connection="strong")
    from_outside = (inner & (groups[:, None] != groups[None, :])).any(0)
    eligible = np.zeros(len(left), bool)
    eligible[positions[~np.isin(groups, groups[from_outside])]] = True
    return eligible


def doubtful(rows: Sequence[Row], directions: Sequence[str], movable: Sequence[Sequence[bool]]) -> list[int]:
    """Positions of the points that decide, by where in their intervals their figures lie, over which ones are kept.

    Each point in turn is put to the good ends of its intervals and to the bad ends, all others staying where they are;
    it is in doubt if different points are kept then.

    Args:
        movable: for each point and objective, whether the figure is in question; others stay.
    """
    better = _relations(rows, directions)
    keys = [_preference(row, directions) for row in rows]
    found = []
    for position, (row, moves) in enumerate(zip(rows, movable, strict=True)):
        ends = [_moved(row, directions, moves, good) for good in (False, True)] if any(moves) else []
        fronts = set()
        for moved in ends:
            changed = better.copy()
            for other, stays in enumerate(rows):
                if other != position:
                    changed[position, other] = _better(moved, stays, directions)
                    changed[other, position] = _better(stays, moved, directions)
            now = [*keys[:position], _preference(moved, directions), *keys[position + 1 :]]
            order = sorted(range(len(rows)), key=lambda place: (now[place], place))
            fronts.add(frozenset(standing.by for standing in _thin(order, changed)))
        if len(fronts) > 1:
            found.append(position)
    return found


def _moved(row: Row, directions: Sequence[str], moves: Sequence[bool], good: bool) -> list[Measurement]:
    """The row with its figures at one end of their intervals, these as wide as before."""
    moved = []
    for measurement, way, move in zip(row, directions, moves, strict=True):
        low, high = _ends(measurement)
        end = (high if (way == "maximize") == good else low) if move else measurement.value
        shift = end - measurement.value
        interval = (low + shift, high + shift) if measurement.ci95 else None
        moved.append(dataclasses.replace(measurement, value=end, ci95=interval))
    return moved


def merge(taken: Sequence[Measurement]) -> Measurement:
    """One figure from measurements of the same thing at different times.

    Those by other means than the newest (device, runtime or method) do not count. Where an interval is unknown, the
    newest stands.
    """
    newest = taken[-1]
    same = [m for m in taken if _source(m) == _source(newest)]
    intervals = [m.ci95 for m in same if m.ci95 is not None]
    if len(same) == 1 or len(intervals) < len(same):
        return newest
    value, interval = pooled_interval([m.value for m in same], [_error(m) for m in same])
    flags = tuple(dict.fromkeys(flag for m in same for flag in m.provenance.flags))
    return dataclasses.replace(
        newest,
        value=value,
        ci95=interval,
        samples=sum(m.samples for m in same),
        provenance=dataclasses.replace(newest.provenance, flags=flags),
    )


def _error(measurement: Measurement) -> float:
    """Standard error; a clock's steps can make an interval empty, so it is a millionth of the figure at least."""
    low, high = _ends(measurement)
    return max((high - low) / 2 / Z95, 1e-6 * abs(measurement.value), 1e-30)


def spread(taken: Sequence[Measurement]) -> float:
    """Relative standard deviation of one thing from one measurement to the next, beyond what their intervals explain.

    0 for fewer than three measurements.
    """
    same = [m for m in taken if _source(m) == _source(taken[-1]) and m.value > 0]
    if len(same) < 3:
        return 0.0
    logs = [math.log(m.value) for m in same]
    return math.sqrt(variance_between(logs, [_error(m) / m.value for m in same]))


def widen(measurement: Measurement, deviation: float) -> Measurement:
    """The figure with an interval that holds another, relative standard deviation too; exact ones stay."""
    if measurement.ci95 is None:
        return measurement
    value, (low, high), more = measurement.value, measurement.ci95, Z95 * deviation * measurement.value
    interval = (value - math.hypot(value - low, more), value + math.hypot(high - value, more))
    return dataclasses.replace(measurement, ci95=interval)


def _source(measurement: Measurement) -> tuple[str, str, str]:
    origin = measurement.provenance
    return origin.method, origin.device, origin.runtime
