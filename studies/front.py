"""Where each trial stands: on the front, no better than a point of it, and whether that holds on the test split."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..core.types import Measurement, Method, State
from ..evaluators.objectives import Constraint, Objective, is_device_figure
from ..evaluators.units import show
from .noise import Row, doubtful, spread, standings, widen
from .pareto import nondominated

if TYPE_CHECKING:
    from .study import Record

Metrics = Mapping[str, Measurement]
TIMED = ("latency", "expected_latency", "throughput")


@dataclass(frozen=True)
class Place:
    """Where one trial stands; the attributes are those of `Point`."""

    on_front: bool = False
    no_better_than: int | None = None
    verified: bool | None = None
    change: str = ""


@dataclass(frozen=True)
class Results:
    """What fronts are made from.

    Attributes:
        again: by trial, what was measured on the test split after the search, with the device's figures of all
            sessions since merged.
        sessions: by trial, the device's figures of each of these sessions.
        constraints: limits that points must keep on the test split too.
    """

    records: Sequence[Record]
    again: Mapping[int, Metrics]
    objectives: Sequence[Objective]
    constraints: Sequence[Constraint] = ()
    sessions: Mapping[int, Sequence[Metrics]] = field(default_factory=dict)

    @functools.cached_property
    def _uneven(self) -> tuple[float, float]:
        return self.unevenness()

    @functools.cached_property
    def _directions(self) -> list[str]:
        return [objective.direction for objective in self.objectives]

    def _row(self, metrics: Metrics, deviation: float = 0.0) -> Row:
        """One figure per objective, with an interval that is noise.

        Args:
            deviation: of measured times from one measurement to the next, relative.
        """
        row = []
        for objective in self.objectives:
            found, name = metrics[objective.name], objective.name.partition("@")[0]
            if is_device_figure(name) and found.provenance.method is not Method.MEASURED:
                # How far a model of the device may be off: in the same direction for all, so that it hides no order.
                found = dataclasses.replace(found, ci95=None)
            row.append(widen(found, deviation) if name in TIMED else found)
        return row

    def unevenness(self) -> tuple[float, float]:
        """Relative standard deviation of the untouched model's latency from one measurement to the next.

        During the search and after it; the former stands in for the latter where that is not known.
        """
        search = [_reference(record.metrics) for record in self.records]
        after = [_reference(session) for found in self.sessions.values() for session in found]
        known = [[m for m in found if m is not None and _is_measured(m)] for found in (search, after)]
        first = spread(known[0]) if known[0] else 0.0
        return first, spread(known[1]) if len(known[1]) > 2 else first

    def _after(self, trial: int) -> float:
        """What `unevenness` leaves of a trial's figures that were measured again and merged."""
        return self._uneven[1] / math.sqrt(max(1, len(self.sessions.get(trial, ()))))

    def contenders(self) -> list[Record]:
        """The complete, feasible trials that no other beats by the values of the search alone, noise or not.

        Only their files are kept, and only they are measured again.
        """
        done = [record for record in self.records if record.state is State.COMPLETE]
        values = [[m.value for m in self._row(record.metrics)] for record in done]
        return [record for record, keep in zip(done, nondominated(values, self._directions), strict=True) if keep]

    def found(self) -> tuple[list[Record], list[Row]]:
        """The contenders with their figures: the search split's, and the device's as measured since the search."""
        records = self.contenders()
        rows = []
        for record in records:
            again = self.again.get(record.trial, {})
            device = {name: m for name, m in again.items() if is_device_figure(name)}
            deviation = self._after(record.trial) if device else self._uneven[0]
            rows.append(self._row({**record.metrics, **device}, deviation))
        return records, rows

    def tested(self) -> tuple[list[Record], list[Row]]:
        """The contenders and baselines that keep the limits on the test split, with their figures there."""
        contenders = {record.trial for record in self.contenders()}
        records = [
            r
            for r in self.records
            if r.state is State.COMPLETE and (r.trial in contenders or r.baseline) and self._broken(r) == ""
        ]
        return records, [self._row(self.again[record.trial], self._after(record.trial)) for record in records]

    def _broken(self, record: Record) -> str | None:
        """The first limit that is broken on the test split, "" for none; None where a figure is missing there."""
        metrics = self.again.get(record.trial, {})
        names = [*(o.name for o in self.objectives), *(c.name for c in self.constraints)]
        if not all(name in metrics for name in names):
            return None
        untouched = next((r for r in self.records if r.baseline == "untouched"), record)
        base = self.again.get(untouched.trial, untouched.metrics)
        return next((c.text for c in self.constraints if c.violation(metrics, base) > 0), "")

    def places(self) -> dict[int, Place]:
        """Where the contenders and baselines stand, by trial."""
        records, rows = self.found()
        search = {
            record.trial: records[standing.by].trial
            for record, standing in zip(records, standings(rows, self._directions), strict=True)
        }
        records, rows = self.tested()
        test = {
            record.trial: (records[standing.by].trial, standing.level)
            for record, standing in zip(records, standings(rows, self._directions), strict=True)
        }
        found = {}
        for record in self.records:
            if record.trial in search or record.baseline:
                by = search.get(record.trial)
                on_front = by == record.trial
                verified, change = self._verdict(record, on_front, test)
                found[record.trial] = Place(on_front, None if on_front else by, verified, change)
        return found

    def _verdict(self, record: Record, on_front: bool, test: Mapping[int, tuple[int, bool]]) -> tuple[bool | None, str]:
        """Whether a trial is on the front of the test split, and what changed."""
        broken = self._broken(record)
        if broken is None:
            return None, ""
        if broken:
            return False, f"breaks {broken} on the test split"
        if record.trial not in test:  # outside a limit in the search already
            return False, ""
        by, level = test[record.trial]
        if by != record.trial:
            said = f"{'level with' if level else 'beaten by'} trial {by} on the test split"
            return False, said if on_front else ""
        changes = [] if on_front else ["not on the front of the search split"]
        for objective in self.objectives:
            before, now = record.metrics[objective.name], self.again[record.trial][objective.name]
            values = [show(objective.name, m.value, m.unit) for m in (before, now)]
            if values[0] != values[1]:
                changes.append(f"{objective.name} {' → '.join(values)}")
        return True, ", ".join(changes)

    def doubtful(self) -> list[int]:
        """Trials that decide over the front by where in their intervals the device's figures lie."""
        trials: set[int] = set()
        for records, rows in (self.found(), self.tested()):
            # Another measurement tells no more about what is computed, nor about the same images.
            names = [is_device_figure(objective.name) for objective in self.objectives]
            movable = [[device and _is_measured(m) for m, device in zip(row, names, strict=True)] for row in rows]
            trials |= {records[position].trial for position in doubtful(rows, self._directions, movable)}
        return sorted(trials)


def _is_measured(measurement: Measurement) -> bool:
    return measurement.provenance.method is Method.MEASURED and measurement.ci95 is not None


def _reference(metrics: Metrics) -> Measurement | None:
    """The untouched model's latency, as timed in turns with a trial."""
    return metrics.get("reference_latency")
