"""Rungs: all candidates are trained a little, and the best go on (asynchronous successive halving, several objectives).

ASHA (Li et al. 2020, arXiv:1810.05934) with ranks by dominance, as MO-ASHA has (Schmucker et al. 2021,
arXiv:2106.12639).
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..compression.finetune import TrainingStep
from ..core.errors import InputError
from ..core.types import Candidate, Plan

# Of the candidates on a rung one in so many is trained further. ASHA has this number equal to the factor of training;
# with a ninth of the training on the lower rung, one in nine leaves too little for full training.
GO_ON = 3
MARGIN = 0.1  # of the range of each objective, by which the reference point of hypervolumes lies beyond the worst


def shares_of(rungs: int, reduction: int) -> tuple[float, ...]:
    """The shares of full training that candidates stop at, rising: those of all rungs but the last."""
    return tuple(float(reduction) ** (place + 1 - rungs) for place in range(rungs - 1))


def with_restarts(plan: Plan, shares: tuple[float, ...]) -> Plan:
    """The plan with a learning rate that comes down to 0 and starts again at each of the shares.

    A model that stops in the middle of a schedule, at a high rate, tells little of what it will be: that of digits-cnn
    less after a third of the steps than after a ninth. Steps that have restarts of their own keep them.
    """
    return tuple(
        dataclasses.replace(step, restarts=shares)
        if shares and isinstance(step, TrainingStep) and not step.restarts
        else step
        for step in plan
    )


Gains = Callable[[Sequence[Candidate]], np.ndarray | None]


@dataclass(frozen=True)
class _Entry:
    candidate: Candidate
    values: tuple[float, ...]
    violation: float


@dataclass
class _Rung:
    """Results at one fidelity, by candidate, and which of these candidates have gone on or never will."""

    fidelity: float
    entries: dict[str, _Entry] = field(default_factory=dict)
    left: set[str] = field(default_factory=set)


class Ladder:
    """Who is trained further, and how far.

    Args:
        directions: of the objectives.
        rungs: how many fidelities there are, the full one included.
        reduction: how much longer training is from one rung to the next.

    Attributes:
        shares: see `shares_of`.

    Raises:
        InputError: fewer than 1 rung, or a reduction below 2.
    """

    def __init__(self, directions: Sequence[str], rungs: int = 1, reduction: int = 9) -> None:
        if rungs < 1 or reduction < 2:
            raise InputError(f"expected at least 1 rung and a reduction of 2 or more, not {rungs} and {reduction}")
        self._signs = np.array([-1.0 if direction == "maximize" else 1.0 for direction in directions])
        self.shares = shares_of(rungs, reduction)
        self._rungs = [_Rung(share) for share in self.shares]
        self._last: dict[int, tuple[tuple[int, int], list[str]]] = {}

    @property
    def lowest(self) -> float:
        """The fidelity that candidates begin at."""
        return self._rungs[0].fidelity if self._rungs else 1.0

    def add(self, candidate: Candidate, values: Sequence[float], violations: Sequence[float]) -> None:
        """Take in a candidate that has stopped at its fidelity; at the next lower rung where there is none for it."""
        fitting = [place for place, rung in enumerate(self._rungs) if rung.fidelity <= candidate.fidelity * (1 + 1e-9)]
        if not fitting:
            return
        self.leave(candidate.key, fitting[-1])
        violation = sum(max(0.0, entry) for entry in violations)
        self._rungs[fitting[-1]].entries[candidate.key] = _Entry(candidate, tuple(values), violation)

    def leave(self, key: str, below: int | None = None) -> None:
        """Note that a candidate needs no further training: from the rungs under `below`, or from all."""
        for rung in self._rungs[:below]:
            rung.left.add(key)

    def next(self, last_call: bool = False, gains: Gains | None = None) -> Candidate | None:
        """The candidate to train further now, with its new fidelity; None where none has earned it.

        One in three of a rung goes on; upper rungs come first. Where `gains` knows what full training of candidates
        brings, it is the most promising of those that have not gone on yet; else the best one of these that are among
        the first third of their rung.

        Args:
            last_call: no more results will come: shares are rounded up, so that something gets to the top.
            gains: a number for each candidate, or None while too little is known.
        """
        for place in reversed(range(len(self._rungs))):
            rung = self._rungs[place]
            count = (len(rung.entries) + (GO_ON - 1 if last_call else 0)) // GO_ON
            gone = sum(key in rung.left for key in rung.entries)
            key = self._promising(rung, gains) if gains and gone < count else None
            if key is None and (not gains or gone < count):
                key = next((key for key in self._first(place, count) if key not in rung.left), None)
            if key is not None:
                rung.left.add(key)
                above = self._rungs[place + 1].fidelity if place + 1 < len(self._rungs) else 1.0
                return dataclasses.replace(rung.entries[key].candidate, fidelity=above)
        return None

    def _promising(self, rung: _Rung, gains: Gains) -> str | None:
        """The feasible candidate that has most to gain."""
        waiting = [key for key, entry in rung.entries.items() if key not in rung.left and entry.violation <= 0]
        found = gains([rung.entries[key].candidate for key in waiting]) if waiting else None
        return None if found is None else waiting[int(np.argmax(found))]

    def _first(self, place: int, count: int) -> list[str]:
        """The keys of the best `count` candidates of a rung, the best first."""
        entries = self._rungs[place].entries
        asked = (len(entries), count)  # results never change
        if place not in self._last or self._last[place][0] != asked:
            self._last[place] = (asked, best_first(entries, self._signs, count))
        return self._last[place][1]


def best_first(entries: Mapping[str, _Entry], signs: np.ndarray, count: int) -> list[str]:
    """The first `count` keys by rank of dominance, within a rank by what they add to the hypervolume.

    Infeasible ones come last, in the order of how far they are beyond the limits.
    """
    keys = [key for key, entry in entries.items() if entry.violation <= 0]
    beyond = sorted((key for key, entry in entries.items() if entry.violation > 0), key=lambda k: entries[k].violation)
    if not keys:
        return beyond[:count]
    import moocore

    values = np.array([entries[key].values for key in keys], float) * signs
    span = np.ptp(values, axis=0)
    values = (values - values.min(0)) / np.where(span > 0, span, 1.0)
    if values.shape[1] == 1:
        return [keys[i] for i in np.argsort(values[:, 0], kind="stable")][:count] + beyond[: max(0, count - len(keys))]
    ranks = moocore.pareto_rank(values)
    order: list[str] = []
    for rank in np.unique(ranks):
        if len(order) < count:
            own = np.flatnonzero(ranks == rank)
            order += [keys[own[i]] for i in by_added_volume(values[own], count - len(order))]
    return order + beyond[: count - len(order)]


def by_added_volume(values: np.ndarray, count: int) -> list[int]:
    """Positions of `count` points (N, objectives), minimised: each adds most hypervolume to those before it.

    The contribution to the whole front would put two good points that are alike behind all others, as either adds
    nothing to the other. What a point adds only shrinks as others come in, so that a gain of before is a bound.
    """
    import moocore

    corner = np.full(values.shape[1], 1 + MARGIN)
    waiting = [(-float(np.prod(corner - point)), place) for place, point in enumerate(values)]
    heapq.heapify(waiting)
    order: list[int] = []
    volume = 0.0
    while waiting and len(order) < count:
        _, place = heapq.heappop(waiting)
        gain = float(moocore.hypervolume(values[[*order, place]], ref=corner)) - volume
        if waiting and -gain > waiting[0][0]:
            heapq.heappush(waiting, (-gain, place))
            continue
        order.append(place)
        volume += gain
    return order
