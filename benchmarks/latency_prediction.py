"""How well ten designed measurements of a new device predict its latencies, from tables of known devices.

    python benchmarks/latency_prediction.py --table ../shared/data/nasbench201_hardware.parquet
    python benchmarks/latency_prediction.py --table T.csv --sources a,b,c --device x --samples 20 --json out.json

The table is Parquet or CSV, with columns `lat_ms_<device>` and `arch`: NAS-Bench-201 cells, or any other strings, whose
tokens are then the features (`token_features`). Without a column `arch`, all other integer columns together stand
for it: one operator for each place (`layer00`, `layer01`, ...).

The protocol is that of HELP (arXiv:2106.08630), whose code takes rows 900-1899 of the table, orders them by
the new device's own latencies, and leaves the first and the last tenth out; 800 remain. Spearman's rank
correlation, the mean absolute percentage error and the share of latencies in their 95 % intervals are over
these. The measured samples come from the rest of the table: none of rows 900-1899 is ever measured, and no network
whose output does not depend on its input is, but such networks are predicted and count like all others. A seed
decides which half of the rest a greedy design may choose from, and what a random design draws.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from autocompress.core.errors import InputError, unknown
from autocompress.hardware.design import architecture_features, design_samples
from autocompress.hardware.latency_tables import PREFIX, architectures, devices_in, latencies_of, read_table
from autocompress.hardware.prediction import FEWEST, fit_predictor

SOURCES = (
    "1080ti_1",
    "1080ti_32",
    "1080ti_256",
    "silver_4114",
    "silver_4210r",
    "samsung_a50",
    "pixel3",
    "essential_ph_1",
    "samsung_s7",
)
OUTLIERS = 0.1  # share left out at either end


def listed(texts: list[str] | None) -> list[str]:
    """Device names from options that may repeat and hold commas."""
    names = [name.strip().removeprefix(PREFIX) for text in texts or [] for name in text.split(",")]
    return list(dict.fromkeys(name for name in names if name))


def choose_devices(known: list[str], sources: list[str], targets: list[str]) -> tuple[list[str], list[str]]:
    """Source and target devices; a target is never a source of its own, and all others are targets by default."""
    for kind, names in (("source device", sources), ("device", targets)):
        for name in names:
            if name not in known:
                raise unknown(kind, name, known)
    if both := sorted(set(sources) & set(targets)):
        raise InputError(f"--device: {both[0]} is among --sources; a device can't predict itself")
    sources = sources or [name for name in SOURCES if name in known and name not in targets]
    if len(sources) < 2:
        raise InputError(f"--sources: expected two of {', '.join(known)} at least, got {', '.join(sources) or 'none'}")
    targets = targets or [name for name in known if name not in sources]
    if not targets:
        raise InputError("--device: expected a device that is not among --sources; every device of the table is")
    return sources, targets


def evaluated(latencies: np.ndarray, first: int, end: int) -> np.ndarray:
    """HELP's query set: rows `first` to `end` without the device's own fastest and slowest tenth."""
    order = first + np.argsort(latencies[first:end], kind="stable")
    return order[int(len(order) * OUTLIERS) : int(len(order) * (1 - OUTLIERS))]


def benchmark(
    table: pd.DataFrame,
    sources: list[str],
    targets: list[str],
    samples: int,
    design: str,
    seeds: int,
    rows: tuple[int, int],
) -> list[dict[str, Any]]:
    """One row for each device and seed."""
    features = architecture_features(architectures(table, "--table"))
    known = np.stack([latencies_of(table, name, "--table") for name in sources], 1)
    columns = {name: latencies_of(table, name, "--table") for name in targets}
    rest = np.setdiff1d(np.arange(len(table)), np.arange(*rows))
    found = []
    for seed in range(seeds):
        indices = design_samples(features, known, samples, method=design, seed=seed, allowed=rest)
        for name, latencies in columns.items():
            predictor = fit_predictor(features, known, indices, latencies[indices])
            chosen = evaluated(latencies, *rows)
            truth = latencies[chosen]
            mean, low, high = predictor.predict(features.take(chosen))
            found.append(
                {
                    "device": name,
                    "seed": seed,
                    "samples": samples,
                    "design": design,
                    "spearman": float(spearmanr(mean, truth).statistic),
                    "mape": float(np.mean(np.abs(mean - truth) / truth)),
                    "coverage": float(np.mean((low <= truth) & (truth <= high))),
                    "width": float(np.mean((high - low) / truth)),
                }
            )
    return sorted(found, key=lambda row: (targets.index(row["device"]), row["seed"]))


def show(found: list[dict[str, Any]], sources: list[str]) -> Table:
    """Means over seeds, for people."""
    first = found[0]
    seeds = len({row["seed"] for row in found})
    shown = Table(
        title=f"{first['samples']} samples, {first['design']} design, {seeds} seeds",
        caption=f"known devices: {', '.join(sources)}; width: of the 95 % intervals, of the latency",
    )
    shown.add_column("device")
    for name in ("Spearman", "worst seed", "MAPE", "coverage", "width"):
        shown.add_column(name, justify="right")
    names = list(dict.fromkeys(row["device"] for row in found))
    for number, name in enumerate([*names, "mean"]):
        some = [row for row in found if name in (row["device"], "mean")]
        shown.add_row(
            name,
            f"{np.mean([row['spearman'] for row in some]):.4f}",
            f"{min(row['spearman'] for row in some):.4f}",
            *(f"{100 * np.mean([row[key] for row in some]):.1f} %" for key in ("mape", "coverage", "width")),
            end_section=number + 1 == len(names),
        )
    return shown


def row_range(text: str) -> tuple[int, int]:
    """`900:1900` as (900, 1900)."""
    first, _, end = text.partition(":")
    if not (first.isdigit() and end.isdigit() and int(first) < int(end)):
        raise InputError(f"--rows: expected FIRST:END as in 900:1900, got '{text}'")
    return int(first), int(end)


def run(arguments: argparse.Namespace) -> None:
    """Benchmark, print, write."""
    if arguments.samples < FEWEST:
        raise InputError(f"--samples: expected at least {FEWEST} measurements, got {arguments.samples}")
    if arguments.seeds < 1:
        raise InputError(f"--seeds: expected at least 1, got {arguments.seeds}")
    if arguments.json and not arguments.json.resolve().parent.is_dir():
        raise InputError(f"--json: there is no folder '{arguments.json.parent}'")
    rows = row_range(arguments.rows)
    table = read_table(arguments.table, "--table")
    if len(table) < rows[1] or len(table) - (rows[1] - rows[0]) < arguments.samples:
        raise InputError(
            f"--rows: {arguments.rows} and {arguments.samples} samples besides need more rows than the table's "
            f"{len(table)}; choose others with --rows FIRST:END"
        )
    sources, targets = choose_devices(devices_in(table, "--table"), listed(arguments.sources), listed(arguments.device))
    found = benchmark(table, sources, targets, arguments.samples, arguments.design, arguments.seeds, rows)
    Console().print(show(found, sources))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--sources", action="append", metavar="A,B,...", help=f"default: {', '.join(SOURCES)}")
    parser.add_argument("--device", action="append", metavar="X", help="may repeat; default: all that are no sources")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--design", choices=("greedy", "random"), default="greedy")
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds, from 0")
    parser.add_argument("--rows", default="900:1900", metavar="FIRST:END", help="rows to evaluate on")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the rows there")
    try:
        run(parser.parse_args())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
