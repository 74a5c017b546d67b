"""What `autocompress analyze` shows: a table in the terminal, a page of plots and a JSON file."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import plotly.graph_objects as go
from plotly.subplots import make_subplots
from rich.table import Table

from ..compression.analysis import (
    HISTOGRAM_BINS,
    LayerProfile,
    RoundingError,
    Sensitivity,
    as_json,
    write_json,
)


def profile_table(profile: Sequence[LayerProfile], table: Sequence[Sensitivity]) -> Table:
    """One row a layer: costs, and the harm of the middle pruning ratio and bit-width that were tried."""
    shown = Table(title="Layers", header_style="bold")
    shown.add_column("layer")
    for name in ("parameters", "MACs", "activation", "time", "zeros"):
        shown.add_column(name, justify="right")
    changes = [(change, amount) for change in ("prune", "bits") if (amount := _middle(table, change)) is not None]
    for change, amount in changes:
        shown.add_column(f"prune {amount:.0%}" if change == "prune" else f"{amount:g} bits", justify="right")
    harm = {(entry.layer, entry.change, entry.amount): entry for entry in table}
    for layer in profile:
        cells = [layer.name, f"{layer.parameters:,}", f"{layer.macs:,}", f"{layer.activation_bytes:,} B"]
        cells += [f"{layer.share:.1%}", f"{layer.zeros:.0%}"]
        for change, amount in changes:
            entry = harm.get((layer.name, change, amount))
            cells.append("–" if entry is None or entry.divergence is None else f"{entry.divergence:.3g}")
        shown.add_row(*cells)
    total = [sum(layer.parameters for layer in profile), sum(layer.macs for layer in profile)]
    rest = [f"{sum(layer.share for layer in profile):.1%}", "", *[""] * len(changes)]
    shown.add_row("all", f"{total[0]:,}", f"{total[1]:,}", "", *rest, style="bold")
    shown.caption = (
        "time: share of the model's own in PyTorch on this CPU, one input. Last columns: divergence of the answers "
        "(nats) when this layer alone is changed, without training; channels that a shortcut ties to those of other "
        "layers go there too; – could not be tried."
    )
    return shown


def write_analysis(
    folder: Path,
    name: str,
    profile: Sequence[LayerProfile],
    table: Sequence[Sensitivity],
    errors: Sequence[RoundingError],
) -> tuple[Path, Path]:
    """Write `analysis.json` and `analysis.html` into `folder`; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    data, page = folder / "analysis.json", folder / "analysis.html"
    write_json(data, as_json(profile, table, errors))
    figure = analysis_figure(name, profile, table, errors)
    page.write_text(figure.to_html(include_plotlyjs=True, full_html=True), encoding="utf-8")
    return data, page


def analysis_figure(
    name: str, profile: Sequence[LayerProfile], table: Sequence[Sensitivity], errors: Sequence[RoundingError]
) -> go.Figure:
    """Costs, sensitivity to pruning and to bits, rounding errors and zeros, one row of a grid each."""
    names = [layer.name for layer in profile]
    bits = errors[0].bits if errors else 0
    titles = (
        "Share of parameters, multiply-accumulates and time",
        "Divergence after pruning this layer alone (nats, log scale)",
        "Divergence after rounding this layer alone (nats, log scale)",
        f"Error of the weights at {bits} bits, from minus to plus the largest (share of the weights)",
        "Share of weights that are zero",
    )
    figure = make_subplots(rows=5, cols=1, subplot_titles=titles, vertical_spacing=0.09)
    for row, part in enumerate(("parameters", "macs", "share")):
        values = [float(getattr(layer, part)) for layer in profile]
        label, colour = (("parameters", "#4C78A8"), ("MACs", "#F58518"), ("time", "#54A24B"))[row]
        shares = [value / max(sum(values), 1e-12) for value in values]
        figure.add_bar(x=names, y=shares, name=label, marker_color=colour, row=1, col=1)
    for row, change in ((2, "prune"), (3, "bits")):
        amounts = sorted({entry.amount for entry in table if entry.change == change})
        harm = {(entry.layer, entry.amount): entry.divergence for entry in table if entry.change == change}
        heights = [[_log10(harm.get((layer, amount))) for layer in names] for amount in amounts]
        labels = [f"{amount:.0%}" if change == "prune" else f"{amount:g} bits" for amount in amounts]
        bar = {"title": "log10", "len": 0.16, "y": 1.11 - 0.218 * row}
        figure.add_heatmap(x=names, y=labels, z=heights, colorscale="Viridis", colorbar=bar, row=row, col=1)
    counted = [[entry.counts[place] / max(sum(entry.counts), 1) for entry in errors] for place in range(HISTOGRAM_BINS)]
    places = [2 * place / (HISTOGRAM_BINS - 1) - 1 for place in range(HISTOGRAM_BINS)]
    figure.add_heatmap(
        x=[entry.layer for entry in errors], y=places, z=counted, colorscale="Blues", showscale=False, row=4, col=1
    )
    zeros = [layer.zeros for layer in profile]
    figure.add_bar(x=names, y=zeros, marker_color="#4C78A8", showlegend=False, row=5, col=1)
    figure.update_yaxes(tickformat=".0%", row=1, col=1)
    figure.update_yaxes(tickformat=".0%", range=[0, 1], row=5, col=1)
    for row in range(1, 5):
        figure.update_xaxes(showticklabels=False, row=row, col=1)
    figure.update_layout(
        title=f"{name}: layers", height=1500, template="plotly_white", legend={"orientation": "h", "y": 1.03}
    )
    return figure


def _middle(table: Sequence[Sensitivity], change: str) -> float | None:
    amounts = {entry.amount for entry in table if entry.change == change}
    return statistics.median_low(sorted(amounts)) if amounts else None


def _log10(value: float | None) -> float | None:
    return None if value is None else math.log10(max(value, 1e-6))
