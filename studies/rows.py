"""Trials and figures as flat rows for tables, and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..core.codec import describe_bits
from ..core.types import Measurement

if TYPE_CHECKING:
    from .study import Record


def trial_row(record: Record) -> dict[str, Any]:
    """One flat row of `trials.csv`."""
    row: dict[str, Any] = {
        "trial": record.trial,
        "state": str(record.state),
        "baseline": record.baseline,
        "plan": record.summary,
        "reason": record.reason,
        "seconds": record.seconds,
        "fidelity": record.fidelity,
        "training_steps": record.steps,
        "bits_in_graph": describe_bits(record.artifact.bits) if record.artifact else "",
        "notes": "; ".join(record.notes),
    }
    row |= metric_columns(record.metrics)
    return row | {f"param:{name}": value for name, value in record.params.items()} | {"key": record.key}


def metric_columns(metrics: Mapping[str, Measurement]) -> dict[str, Any]:
    """Columns NAME, NAME_low, NAME_high, NAME_unit and NAME_kind of each metric, in SI units; NAME_flags where any."""
    row: dict[str, Any] = {}
    for name, m in metrics.items():
        low, high = m.ci95 if m.ci95 else (None, None)
        row |= {name: m.value, f"{name}_low": low, f"{name}_high": high, f"{name}_unit": m.unit}
        row[f"{name}_kind"] = str(m.provenance.method)
        if m.provenance.flags:
            row[f"{name}_flags"] = "; ".join(m.provenance.flags)
    return row


def metrics_as_json(metrics: Mapping[str, Measurement]) -> dict[str, dict[str, Any]]:
    """{name: {value, unit, low, high, kind, flags}}, in SI units; low and high are None where exact or unknown."""
    return {
        name: {
            "value": m.value,
            "unit": m.unit,
            "low": m.ci95[0] if m.ci95 else None,
            "high": m.ci95[1] if m.ci95 else None,
            "kind": str(m.provenance.method),
            "flags": list(m.provenance.flags),
        }
        for name, m in metrics.items()
    }
