"""What a search leaves behind for people: tables (CSV, Markdown, terminal) and a plot."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import InputError
from ..core.types import Measurement, State
from ..evaluators.objectives import alongside
from ..evaluators.units import scale, show_measurement
from .cross import cross_as_csv, cross_as_json, crossings
from .plot import write_plot
from .point import Point, scores
from .rows import metric_columns, metrics_as_json, trial_row
from .study import Study

if TYPE_CHECKING:
    from rich.table import Table


def write_reports(study: Study) -> None:
    """Write `trials.csv`, `front.csv` and `front.html` into the run folder."""
    records, points = study.records(), study.front()
    _write(study.folder / "trials.csv", rows_to_csv([trial_row(record) for record in records]))
    _write(study.folder / "front.csv", rows_to_csv(_point_rows(study, points)))
    if study.parts:
        _write(study.folder / "cross.csv", cross_as_csv(crossings(study)))
    if records:
        write_plot(study, records, points, study.folder / "front.html")


def _write(path: Path, text: str) -> None:
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text)
    part.replace(path)


def _point_rows(study: Study, points: Sequence[Point]) -> list[dict[str, Any]]:
    """The rows of `front.csv`; in a scalarised search they begin with the number that it maximised."""
    numbers = scores(study.scalar, study.front())
    return [{**({"score": numbers.get(p.trial)} if study.scalar else {}), **_point_row(p)} for p in points]


def _point_row(point: Point) -> dict[str, Any]:
    row = {"trial": point.trial, "plan": point.summary, "split": point.split, "baseline": point.baseline}
    row |= {"on_front": point.on_front, "no_better_than": point.no_better_than}
    return row | {"verified": point.verified, "change": point.change} | metric_columns(point.metrics)


def rows_to_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Rows with the union of their columns; None becomes an empty field."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def front_as_csv(study: Study, verified: bool = False) -> str:
    """The front as CSV, SI units; those of all targets, after a search for several.

    Args:
        verified: only what is on the front of the test split.
    """
    if study.parts:
        return rows_to_csv(
            [
                {"target": target, **row}
                for target, part in study.parts.items()
                for row in _point_rows(part, part.front(verified=verified))
            ]
        )
    return rows_to_csv(_point_rows(study, study.front(verified=verified)))


def front_as_json(study: Study, verified: bool = False) -> str:
    """A list of {trial, plan, split, metrics, baseline, on_front, no_better_than, verified, change}.

    Metrics are {name: {value, unit, low, high, kind, flags}}; the others are those of `Point`. A scalarised search
    adds the score, the number that it maximised. After a search for
    several targets: {fronts: {target: such a list}, cross: see `cross_as_json`}.

    Args:
        verified: only what is on the front of the test split.
    """
    if study.parts:
        fronts = {target: _points_as_json(part, verified) for target, part in study.parts.items()}
        return json.dumps({"fronts": fronts, "cross": cross_as_json(crossings(study))}, indent=2)
    return json.dumps(_points_as_json(study, verified), indent=2)


def _points_as_json(study: Study, verified: bool) -> list[dict[str, Any]]:
    numbers = scores(study.scalar, study.front())
    return [
        {
            **({"score": numbers.get(point.trial)} if study.scalar else {}),
            "trial": point.trial,
            "plan": point.plan,
            "split": point.split,
            "metrics": metrics_as_json(point.metrics),
            "baseline": bool(point.baseline),
            "on_front": point.on_front,
            "no_better_than": point.no_better_than,
            "verified": point.verified,
            "change": point.change,
        }
        for point in study.front(verified=verified)
    ]


def shown_metrics(study: Study, points: Sequence[Point]) -> list[str]:
    """The objectives, then latency and size where they were measured but not optimised."""
    names = [objective.name for objective in study.objectives]
    return names + [n for n in ("latency", "size") if n not in names and any(n in p.metrics for p in points)]


def _cells(study: Study, points: Sequence[Point], verified: bool = False) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the front's table, with each figure's share of the untouched model's."""
    names = shown_metrics(study, points)
    untouched = next((point for point in study.front() if point.baseline == "untouched"), None)
    header = ["trial", "plan", *names, "changed" if verified else "split"]
    rows = []
    for point in points:
        row = [str(point.trial), point.summary + (" (baseline)" if point.baseline else "")]
        for name in names:
            known = untouched is not None and point.trial != untouched.trial
            base = alongside(point.metrics, untouched.metrics) if untouched and known else {}
            row.append(_figure(name, point.metrics.get(name), base.get(name)))
        rows.append([*row, point.change if verified else ", ".join([point.split, *_standing(point)])])
    return header, rows


def _best(study: Study) -> list[str]:
    """What a scalarised search was after, and which point is the best by it."""
    points = study.front()
    numbers = scores(study.scalar, points)
    if study.scalar is None or not any(point.on_front for point in points):
        return []
    best = study.best()
    untouched = next((numbers[p.trial] for p in points if p.baseline == "untouched" and p.trial in numbers), None)
    base = f", untouched model {untouched:.4g}" if untouched is not None else ""
    score = f"{numbers[best.trial]:.4g}" if best.trial in numbers else "unknown"
    return [f"best by {study.scalar.text}: trial {best.trial} ({score}{base})"]


def _standing(point: Point) -> list[str]:
    if point.no_better_than is not None:
        return [f"no better than {point.no_better_than}"]
    if not point.on_front:
        return ["beaten"]
    return ["not verified"] if point.verified is False else []


def _figure(name: str, measurement: Measurement | None, base: Measurement | None) -> str:
    text = show_measurement(measurement)
    if measurement is None:
        return text
    if measurement.provenance.method != "measured":
        text += f" {measurement.provenance.method}"
    if measurement.provenance.flags:
        text += "!"
    if base is None or not base.value:
        return text
    if scale(name, measurement.unit, measurement.value)[1] == "%":
        return f"{text} ({(measurement.value - base.value) * 100:+.1f})"
    return f"{text} ({measurement.value / base.value:.0%})"


def _doubts(points: Sequence[Point]) -> list[str]:
    """What "!" behind figures of the table means."""
    flags: dict[str, str] = {}
    for flag in (flag for p in points for m in p.metrics.values() for flag in m.provenance.flags):
        flags.setdefault(re.sub(r"\d+(\.\d+)?", "", flag), flag)  # of those that differ in numbers, one is enough
    return [f"!: for example {'; '.join(flags.values())} (all are in front.csv)"] if flags else []


def _notes(study: Study, points: Sequence[Point]) -> list[str]:
    """What the words in the table mean, and how much noise stands behind them."""
    notes = []
    if any(point.no_better_than is not None for point in points):
        notes.append("no better than N: better in nothing by more than noise")
    varied = study.unevenness()
    if varied >= 0.001 and any(name in ("latency", "throughput") for name in shown_metrics(study, points)):
        notes.append(f"noise: also that the untouched model's latency varied by {varied:.1%} between measurements")
    if any(point.on_front and point.verified is False for point in points):
        notes.append("not verified: not on the front of the test split; --verified says why")
    stopped = [record.fidelity for record in study.records() if record.state is State.STOPPED]
    if stopped:
        spread = " to ".join(f"{share:.0%}" for share in sorted({min(stopped), max(stopped)}))
        notes.append(f"{len(stopped)} others stopped after {spread} of their training (trials.csv)")
    return notes


def _dropped(study: Study) -> list[str]:
    """What became of the front's points that are not on that of the test split."""
    front = [point for point in study.front() if point.on_front]
    lines = [f"dropped: {p.trial} ({p.summary}): {p.change}" for p in front if p.verified is False]
    unknown = ", ".join(str(point.trial) for point in front if point.verified is None)
    return [*lines, f"not measured on the test split: {unknown}"] if unknown else lines


def check_verified(study: Study) -> None:
    """Raise InputError where no point of the front was measured on the test split."""
    if not any(part.measured_again() for part in study.parts.values() or [study]):
        raise InputError(
            f"{study.folder}: nothing is verified yet. A search measures its front on the test split when it ends; "
            f"if it was interrupted, `autocompress search --resume {study.folder}` goes on"
        )


def front_table(study: Study, target: str = "", verified: bool = False) -> Table:
    """The front as a table for the terminal.

    Args:
        target: named in its title.
        verified: only what is on the front of the test split, and below what is not.
    """
    from rich.table import Table

    points = study.front(verified=verified)
    header, rows = _cells(study, points, verified)
    split = "test" if points and all(point.split == "test" for point in points if point.on_front) else "search"
    what = "verified on the test split" if verified else f"{split} split"
    caption = ["± half of the 95 % interval; in brackets: against the untouched model", *_doubts(points)]
    caption = [*_best(study), *caption, *([] if verified else _notes(study, points))]
    table = Table(
        title=f"Pareto front{' for ' if target else ''}{target}, {what}",
        caption="\n".join([*caption, *(_dropped(study) if verified else [])]),
    )
    for name in header:
        left = name in ("plan", "split", "changed")
        table.add_column(name, justify="left" if left else "right", overflow="fold")
    for point, row in zip(points, rows, strict=True):
        table.add_row(*row, style="" if point.on_front else "dim")
    return table


def front_as_markdown(study: Study, within: float = 1.0, verified: bool = False) -> str:
    """The front as a Markdown table; points that lose more than `within` of the untouched accuracy are left out.

    Args:
        verified: only what is on the front of the test split.
    """
    if study.parts:
        return "\n".join(f"{t}\n\n{front_as_markdown(part, within, verified)}" for t, part in study.parts.items())
    points = study.front()
    least = max((p.metrics["accuracy"].value for p in points if p.baseline == "untouched"), default=0.0) - within
    shown = study.front(verified=True) if verified else points
    header, rows = _cells(
        study,
        [p for p in shown if "accuracy" not in p.metrics or p.metrics["accuracy"].value >= least],
        verified,
    )
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
