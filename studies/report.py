"""What a search leaves behind for people: tables (CSV, Markdown, terminal) and a plot."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.types import Measurement, State
from ..evaluators.objectives import alongside
from ..evaluators.units import scale, show_measurement
from .study import Point, Record, Study, metric_columns, metrics_as_json, trial_row

if TYPE_CHECKING:
    from rich.table import Table


def write_reports(study: Study) -> None:
    """Write `trials.csv`, `front.csv` and `front.html` into the run folder."""
    records, points = study.records(), study.front()
    _write(study.folder / "trials.csv", rows_to_csv([trial_row(record) for record in records]))
    _write(study.folder / "front.csv", rows_to_csv([_point_row(point) for point in points]))
    if records:
        write_plot(study, records, points, study.folder / "front.html")


def _write(path: Path, text: str) -> None:
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text)
    part.replace(path)


def _point_row(point: Point) -> dict[str, Any]:
    row = {"trial": point.trial, "plan": point.summary, "split": point.split, "baseline": point.baseline}
    return row | {"on_front": point.on_front} | metric_columns(point.metrics)


def rows_to_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Rows with the union of their columns; None becomes an empty field."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def front_as_csv(study: Study) -> str:
    """The front as CSV, SI units."""
    return rows_to_csv([_point_row(point) for point in study.front()])


def front_as_json(study: Study) -> str:
    """A list of {trial, plan, split, metrics: {name: {value, unit, low, high, kind}}, baseline, on_front}."""
    return json.dumps(
        [
            {
                "trial": point.trial,
                "plan": point.plan,
                "split": point.split,
                "metrics": metrics_as_json(point.metrics),
                "baseline": bool(point.baseline),
                "on_front": point.on_front,
            }
            for point in study.front()
        ],
        indent=2,
    )


def shown_metrics(study: Study, points: Sequence[Point]) -> list[str]:
    """The objectives, then latency and size where they were measured but not optimised."""
    names = [objective.name for objective in study.objectives]
    return names + [n for n in ("latency", "size") if n not in names and any(n in p.metrics for p in points)]


def _cells(study: Study, points: Sequence[Point]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the front's table, with each figure's share of the untouched model's."""
    names = shown_metrics(study, points)
    untouched = next((point for point in points if point.baseline == "untouched"), None)
    header = ["trial", "plan", *names, "split"]
    rows = []
    for point in points:
        row = [str(point.trial), point.summary + (" (baseline)" if point.baseline else "")]
        for name in names:
            base = alongside(point.metrics, untouched.metrics) if untouched and point is not untouched else {}
            row.append(_figure(name, point.metrics.get(name), base.get(name)))
        rows.append([*row, point.split + ("" if point.on_front else ", beaten")])
    return header, rows


def _figure(name: str, measurement: Measurement | None, base: Measurement | None) -> str:
    text = show_measurement(measurement)
    if measurement is None:
        return text
    if measurement.provenance.method != "measured":
        text += f" {measurement.provenance.method}"
    if base is None or not base.value:
        return text
    if scale(name, measurement.unit, measurement.value)[1] == "%":
        return f"{text} ({(measurement.value - base.value) * 100:+.1f})"
    return f"{text} ({measurement.value / base.value:.0%})"


def front_table(study: Study) -> Table:
    """The front as a table for the terminal."""
    from rich.table import Table

    points = study.front()
    header, rows = _cells(study, points)
    split = "test" if points and all(point.split == "test" for point in points if point.on_front) else "search"
    table = Table(
        title=f"Pareto front, {split} split",
        caption="± half of the 95 % interval; in brackets: against the untouched model",
    )
    for name in header:
        table.add_column(name, justify="left" if name in ("plan", "split") else "right", overflow="fold")
    for point, row in zip(points, rows, strict=True):
        table.add_row(*row, style="" if point.on_front else "dim")
    return table


def front_as_markdown(study: Study) -> str:
    """The front as a Markdown table."""
    header, rows = _cells(study, study.front())
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write_plot(study: Study, records: Sequence[Record], points: Sequence[Point], path: Path) -> None:
    """Plotly page: the first objective against the second, every trial, the front drawn, baselines marked."""
    import plotly.graph_objects as go

    y, x = _axes(study)
    figure = go.Figure()
    done = [r for r in records if r.metrics.get(x) and r.metrics.get(y)]
    beaten = [r for r in done if r.trial not in {p.trial for p in points}]
    factors = _Factors(x, y, done)
    for state, colour, name in (
        (State.COMPLETE, "#9aa5b1", "trial (search split)"),
        (State.INFEASIBLE, "#e0b4a8", "outside a constraint (search split)"),
    ):
        group = [r for r in beaten if r.state is state]
        if group:
            figure.add_trace(
                go.Scatter(
                    x=[r.metrics[x].value * factors.x for r in group],
                    y=[r.metrics[y].value * factors.y for r in group],
                    mode="markers",
                    name=name,
                    marker={"size": 7, "color": colour},
                    text=[f"trial {r.trial}: {r.summary}" for r in group],
                    hovertemplate="%{text}<br>%{x:.4g}, %{y:.4g}<extra></extra>",
                )
            )
    for split in ("test", "search"):
        front = sorted((p for p in points if p.on_front and p.split == split), key=lambda p: p.metrics[x].value)
        if front:
            figure.add_trace(
                _points(front, x, y, factors, f"front ({split} split)", "#1667c7", "lines+markers", "circle")
            )
        rest = [p for p in points if p.baseline and p.split == split and x in p.metrics and y in p.metrics]
        if rest:
            marked = _points(
                rest, x, y, factors, f"baselines ({split} split)", "#d1495b", "markers+text", "diamond-open"
            )
            marked.text = [p.baseline for p in rest]
            marked.textposition = "bottom right"
            figure.add_trace(marked)
    counts = {state: sum(r.state is state for r in records) for state in State}
    figure.update_layout(
        title=f"{study.folder.name}: {y} against {x}<br><sup>{len(records)} trials, {counts[State.FAILED]} failed, "
        f"{counts[State.INFEASIBLE]} outside a constraint; bars: 95 % intervals</sup>",
        xaxis_title=factors.x_title,
        yaxis_title=factors.y_title,
        template="plotly_white",
        legend={"orientation": "h", "y": -0.18},
    )
    part = path.with_suffix(".part")
    figure.write_html(part, include_plotlyjs=True)
    part.replace(path)


class _Factors:
    """SI to shown units for the two axes, the same for all points."""

    def __init__(self, x: str, y: str, records: Sequence[Record]) -> None:
        self.x, self.x_title = self._axis(x, records)
        self.y, self.y_title = self._axis(y, records)

    @staticmethod
    def _axis(name: str, records: Sequence[Record]) -> tuple[float, str]:
        found = [r.metrics[name] for r in records]
        if not found:
            return 1.0, name
        factor, unit = scale(name, found[0].unit, max(m.value for m in found))
        return factor, f"{name} ({unit})" if unit else name


def _axes(study: Study) -> tuple[str, str]:
    """Vertical and horizontal metric: accuracy against latency where both were asked for."""
    names = [objective.name for objective in study.objectives]
    vertical = "accuracy" if "accuracy" in names else names[0]
    rest = [name for name in names if name != vertical]
    horizontal = "latency" if "latency" in rest or not rest else rest[0]
    return vertical, horizontal


def _points(
    points: Sequence[Point], x: str, y: str, factors: _Factors, name: str, colour: str, mode: str, symbol: str
) -> Any:
    import plotly.graph_objects as go

    return go.Scatter(
        x=[p.metrics[x].value * factors.x for p in points],
        y=[p.metrics[y].value * factors.y for p in points],
        error_x=_bars([p.metrics[x] for p in points], factors.x, colour),
        error_y=_bars([p.metrics[y] for p in points], factors.y, colour),
        mode=mode,
        name=name,
        line={"color": colour},
        marker={"size": 11, "color": colour, "symbol": symbol},
        customdata=[f"trial {p.trial}: {p.summary}" for p in points],
        hovertemplate="%{customdata}<br>%{x:.4g}, %{y:.4g}<extra></extra>",
    )


def _bars(measurements: Sequence[Measurement], factor: float, colour: str) -> dict[str, Any]:
    ends = [m.ci95 or (m.value, m.value) for m in measurements]
    return {
        "type": "data",
        "symmetric": False,
        "array": [(high - m.value) * factor for m, (_, high) in zip(measurements, ends, strict=True)],
        "arrayminus": [(m.value - low) * factor for m, (low, _) in zip(measurements, ends, strict=True)],
        "color": colour,
        "thickness": 1,
    }
