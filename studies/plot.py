"""The front as a plot that opens in a browser."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.types import Measurement, State
from ..evaluators.units import scale
from .pareto import nondominated
from .point import Point
from .study import Record, Study

FRONT, BASELINE, LEVEL = "#1667c7", "#d1495b", "#7aa5d6"


def write_plot(study: Study, records: Sequence[Record], points: Sequence[Point], path: Path) -> None:
    """Plotly page: the first objective against the second, every trial, the front drawn, baselines marked."""
    import plotly.graph_objects as go

    y, x = _axes(study, points)
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
            _add_front(figure, study, front, x, y, factors, split)
        level = [p for p in points if p.no_better_than is not None and not p.baseline and p.split == split]
        if level:
            name = f"better by noise alone ({split} split)"
            figure.add_trace(_points(level, x, y, factors, name, LEVEL, "markers", "circle-open"))
        rest = [p for p in points if p.baseline and p.split == split and x in p.metrics and y in p.metrics]
        if rest:
            marked = _points(
                rest, x, y, factors, f"baselines ({split} split)", BASELINE, "markers+text", "diamond-open"
            )
            marked.text = [p.baseline for p in rest]
            marked.textposition = "bottom right"
            marked.cliponaxis = False
            figure.add_trace(marked)
    crossed = any(point.on_front and point.verified is False for point in points)
    counts = {state: sum(r.state is state for r in records) for state in State}
    figure.update_layout(
        title=f"{study.folder.name}: {y} against {x}<br><sup>{len(records)} trials, {counts[State.FAILED]} failed, "
        f"{counts[State.INFEASIBLE]} outside a constraint"
        f"{f', {counts[State.STOPPED]} stopped before their full training' if counts[State.STOPPED] else ''}"
        "; bars: 95 % intervals"
        f"{'; crossed: not on the front of the test split' if crossed else ''}</sup>",
        xaxis_title=factors.x_title,
        yaxis_title=factors.y_title,
        template="plotly_white",
        legend={"orientation": "h", "y": -0.12},
    )
    part = path.with_suffix(".part")
    figure.write_html(part, include_plotlyjs=True, default_height="94vh")
    part.replace(path)


def _add_front(
    figure: Any, study: Study, front: Sequence[Point], x: str, y: str, factors: _Factors, split: str
) -> None:
    """The front's points, coloured by a third objective, with a line through the best on these axes."""
    import plotly.graph_objects as go

    directions = {objective.name: objective.direction for objective in study.objectives}
    axes = [directions.get(name, "minimize") for name in (x, y)]
    kept = nondominated([[p.metrics[x].value, p.metrics[y].value] for p in front], axes)
    line = [p for p, keep in zip(front, kept, strict=True) if keep]
    figure.add_trace(
        go.Scatter(
            x=[p.metrics[x].value * factors.x for p in line],
            y=[p.metrics[y].value * factors.y for p in line],
            mode="lines",
            line={"color": FRONT, "shape": "hv" if axes == ["minimize", "maximize"] else "linear"},
            hoverinfo="skip",
            showlegend=False,
        )
    )
    trace = _points(front, x, y, factors, f"front ({split} split)", FRONT, "markers", "circle")
    trace.marker.symbol = ["circle-x" if point.verified is False else "circle" for point in front]
    third = next((name for name in directions if name not in (x, y) and all(name in p.metrics for p in front)), None)
    if third is not None:
        factor, unit = scale(third, front[0].metrics[third].unit, max(p.metrics[third].value for p in front))
        trace.marker.color = [p.metrics[third].value * factor for p in front]
        trace.marker.colorscale = "Viridis"
        trace.marker.showscale = True
        trace.marker.colorbar = {"title": f"{third} ({unit})" if unit else third}
        trace.name += f", coloured by {third}"
    figure.add_trace(trace)


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


def _axes(study: Study, points: Sequence[Point]) -> tuple[str, str]:
    """Vertical and horizontal metric: accuracy against latency where there are such figures."""
    names = [objective.name for objective in study.objectives]
    vertical = "accuracy" if "accuracy" in names else names[0]
    rest = [name for name in names if name != vertical]
    measured = [name for name in ("latency", "size", "parameters") if all(name in p.metrics for p in points)]
    horizontal = "latency" if "latency" in rest else rest[0] if rest else measured[0]
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
        customdata=[_about(point) for point in points],
        hovertemplate="%{customdata}<br>%{x:.4g}, %{y:.4g}<extra></extra>",
    )


def _about(point: Point) -> str:
    """What the pointer over a point shows beside its figures."""
    text = f"trial {point.trial}: {point.summary}"
    if point.no_better_than is not None:
        return f"{text}<br>no better than trial {point.no_better_than}"
    return f"{text}<br>{point.change}" if point.change else text


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
