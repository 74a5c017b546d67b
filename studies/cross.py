"""What the best candidate for one device costs on the others, after a search for several."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from ..core.types import Measurement, State
from ..evaluators.objectives import is_device_figure
from ..evaluators.units import show
from .study import Record, Study

TOLERATED = 0.01  # accuracy that a device's best may lose against the untouched model


@dataclass(frozen=True)
class Crossing:
    """The best candidate for one device, and what it costs on each.

    Attributes:
        target: the device that it is the best for.
        figure: name of what it is best in, such as "latency".
        trial: its number in that device's study.
        accuracy: there, on the search split; None where the search did not ask for it.
        costs: `figure` on each target; None where it failed there.
        ratios: the same, as a share of what that target's own best takes.
    """

    target: str
    figure: str
    trial: int
    summary: str
    accuracy: Measurement | None
    costs: Mapping[str, Measurement | None]
    ratios: Mapping[str, float | None]


def crossings(study: Study, tolerated: float = TOLERATED) -> list[Crossing]:
    """One for each target that has a front.

    A target's best is the trial with the lowest latency (or the first device figure among the objectives) of those
    on its front that lose at most `tolerated` accuracy against the untouched model; where none does, the most accurate.
    """
    figure = next((o.name for part in study.parts.values() for o in part.objectives if is_device_figure(o.name)), None)
    if figure is None:
        return []
    records = {target: part.records() for target, part in study.parts.items()}
    known = {target: {_identity(r): r for r in found} for target, found in records.items()}
    best = {}
    for target, part in study.parts.items():
        chosen = _best(part, records[target], figure, tolerated)
        if chosen is not None:
            best[target] = chosen
    rows = []
    for target, record in best.items():
        costs = {}
        for other in study.parts:
            twin = known[other].get(_identity(record))
            costs[other] = twin.metrics.get(figure) if twin and twin.state is not State.FAILED else None
        own = {other: best[other].metrics[figure].value if other in best else None for other in study.parts}
        ratios = {other: m.value / base if m and (base := own[other]) else None for other, m in costs.items()}
        accuracy = record.metrics.get("accuracy")
        rows.append(Crossing(target, figure, record.trial, record.summary, accuracy, costs, ratios))
    return rows


def _identity(record: Record) -> str:
    """What is the same for a candidate on all targets: its parameters, or which baseline it is."""
    return json.dumps([record.baseline, dict(record.params)], sort_keys=True, default=str)


def _best(study: Study, records: Sequence[Record], figure: str, tolerated: float) -> Record | None:
    numbers = study.front_trials(records)
    front = [record for record in records if record.trial in numbers and figure in record.metrics]
    if not front or not all("accuracy" in record.metrics for record in front):
        return min(front, key=lambda r: r.metrics[figure].value, default=None)
    untouched = next((r.metrics["accuracy"].value for r in records if r.baseline == "untouched"), 1.0)
    good = [r for r in front if r.metrics["accuracy"].value >= untouched - tolerated]
    if not good:
        return max(front, key=lambda r: r.metrics["accuracy"].value)
    return min(good, key=lambda r: r.metrics[figure].value)


def cross_table(rows: Sequence[Crossing]) -> Table:
    """For the terminal: a line for each device's best, a column for each device that it could run on."""
    figure = rows[0].figure if rows else "latency"
    table = Table(
        title=f"What each device's best costs on the others: {figure}",
        caption=f"best: lowest {figure} of those within a point of the untouched accuracy (search split); "
        "in brackets: against that device's own best",
    )
    for name in ("best for", "plan", "accuracy", *(rows[0].costs if rows else ())):
        table.add_column(name, justify="left" if name in ("best for", "plan") else "right", overflow="fold")
    for row in rows:
        accuracy = show("accuracy", row.accuracy.value, "") if row.accuracy else "unknown"
        table.add_row(row.target, row.summary, accuracy, *(_cost(row, other) for other in row.costs))
    return table


def _cost(row: Crossing, other: str) -> str:
    measurement, ratio = row.costs[other], row.ratios[other]
    if measurement is None:
        return "failed there"
    text = show(row.figure, measurement.value, measurement.unit)
    kind = measurement.provenance.method
    return text + (f" {kind}" if kind != "measured" else "") + (f" ({ratio:.0%})" if ratio is not None else "")


def cross_as_json(rows: Sequence[Crossing]) -> list[dict[str, Any]]:
    """[{best_for, trial, plan, figure, accuracy, costs: {target: {value, kind, ratio}}}], in SI units."""
    return [
        {
            "best_for": row.target,
            "trial": row.trial,
            "plan": row.summary,
            "figure": row.figure,
            "accuracy": row.accuracy.value if row.accuracy else None,
            "costs": {
                other: {"value": m.value, "kind": str(m.provenance.method), "ratio": row.ratios[other]} if m else None
                for other, m in row.costs.items()
            },
        }
        for row in rows
    ]


def cross_as_csv(rows: Sequence[Crossing]) -> str:
    """One line for each pair of devices."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["best_for", "trial", "plan", "accuracy", "on", "figure", "value", "kind", "ratio"])
    for row in rows:
        for other, m in row.costs.items():
            figures = [m.value, m.provenance.method, row.ratios[other]] if m else ["", "", ""]
            accuracy = row.accuracy.value if row.accuracy else ""
            writer.writerow([row.target, row.trial, row.summary, accuracy, other, row.figure, *figures])
    return out.getvalue()
