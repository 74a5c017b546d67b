"""Tables of what one model costs on each target."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from ..core.types import Measurement
from ..evaluators.units import scale, show
from ..hardware.boards import CALIBRATED
from ..hardware.calibration import WIDE, Calibration
from ..hardware.compare import Compared
from .rows import metrics_as_json


def show_interval(measurement: Measurement) -> str:
    """The ends of the 95 % interval in the value's unit: "0.83 to 3.3 ms"; "unknown" or "exact" where there is none."""
    if measurement.ci95 is None:
        return "exact" if measurement.unit == "" and measurement.provenance.method == "measured" else "unknown"
    factor, unit = scale(measurement.name, measurement.unit, measurement.value)
    low, high = (f"{end * factor:.3g}" for end in measurement.ci95)
    return f"{low} to {high} {unit}".rstrip()


def compare_table(rows: Sequence[Compared], title: str) -> Table:
    """One line for each target (and bit-width): latency, its interval and kind, other figures, remarks."""
    several = len({row.bits for row in rows}) > 1
    table = Table(
        title=title, caption="interval: 95 %; kind: how the latency (or, in brackets, another figure) was found"
    )
    for name in ("target", *(["bits"] if several else []), "latency", "interval", "kind", "other figures", "remarks"):
        right, whole = name in ("bits", "latency"), name in ("target", "latency", "kind")
        table.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=whole)
    for row in rows:
        bits = [str(row.bits)] if several else []
        if row.reason:
            reason = row.reason if not row.here else f"[red]failed[/red]: {row.reason}"
            table.add_row(row.target, *bits, "not here" if not row.here else "-", "", "", "", reason)
            continue
        latency = row.measurements.get("latency")
        first = (
            [show("latency", latency.value, latency.unit), show_interval(latency), str(latency.provenance.method)]
            if latency
            else ["unknown", "", ""]
        )
        kind = latency.provenance.method if latency else None
        others = [
            f"{name} {show(name, m.value, m.unit)}"
            + (f" ({m.provenance.method})" if m.provenance.method != kind else "")
            for name, m in row.measurements.items()
            if name != "latency"
        ]
        table.add_row(row.target, *bits, *first, ", ".join(others), "; ".join(remarks(row.measurements.values())))
    return table


def remarks(measurements: Iterable[Measurement]) -> list[str]:
    """The flags of all figures, each once."""
    return list(dict.fromkeys(flag for m in measurements for flag in m.provenance.flags))


def compare_as_json(rows: Sequence[Compared]) -> list[dict[str, Any]]:
    """[{target, bits, reason, figures: {name: {value, unit, low, high, kind}}, flags, device}], in SI units."""
    return [
        {
            "target": row.target,
            "bits": row.bits,
            "here": row.here,
            "reason": row.reason,
            "figures": metrics_as_json(row.measurements),
            "flags": remarks(row.measurements.values()),
            "device": next((m.provenance.device for m in row.measurements.values()), None),
        }
        for row in rows
    ]


def calibration_lines(found: Calibration, path: Path) -> list[str]:
    """What a finished calibration is worth, and how to use it."""
    board = found.board
    if board is None:
        return [f"{path}: {len(found.measured)} of {found.samples} networks are measured; calibrate on"]
    errors, doubted = board.errors, sum(one.width > WIDE for one in found.measured)
    family = found.target.partition("/")[0]
    lines = [
        f"{path}: {board.device}, {len(found.measured)} networks, {found.runtime}",
        f"each predicted from the others: mean error {errors['mape']:.0%}, rank correlation {errors['spearman']:.2f}, "
        f"{errors['coverage']:.0%} within their 95 % intervals",
        f"Use it with: --target {family if family in CALIBRATED else CALIBRATED[0]}/board:{path}",
    ]
    if doubted:
        lines.insert(2, f"{doubted} measurements have intervals wider than {WIDE:.0%}; run it again to retake them")
    return lines
