"""How far latencies looked up in a table of operators are from those of whole networks, on this machine.

    python benchmarks/lookup_error.py
    python benchmarks/lookup_error.py --target x86/openvino --candidates 30 --seed 1 --table tables/ --json error.json

The networks are ResNet-20 candidates of the stock space "auto" (channels and bits by stage), built without training, on
which latency does not depend. The table is made from the untouched network and `--samples` random candidates; then
`--candidates` others, drawn with another seed and never used for the table, are measured as a search would measure
them, in turns with the untouched network.

Latencies of one file wander on virtual machines, by up to a factor of two between spells of minutes. So what is
compared is the drift-corrected latency: its ratio to the untouched network's latency, taken in the same turns, times
the median of the latter over the table's measurements. The errors of the latencies as measured ("raw") are shown too.

One thread is the default here. Networks as small as these gain little from a second one, and on two virtual cores it
depends on what else these do, from one second to the next, whether it helps or hurts: then a network has no one
latency that could be looked up.

Nothing is measured twice: a run that was stopped goes on with its table. `--stop` ends a run after so many seconds
(what is measured counts later); `--build` only builds the files, which needs no quiet machine. At the end, 10,000
random choices of channels and bits are looked up at once, and timed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from autocompress import load_task
from autocompress.core.errors import AutocompressError
from autocompress.core.types import Plan, Task
from autocompress.hardware.channel_costs import channels_of
from autocompress.hardware.lookup import LookupTable, read_table
from autocompress.hardware.operators import read_operators
from autocompress.hardware.profile import build_untrained, draw_plans, profile_model, table_error
from autocompress.hardware.targets import make_backend
from autocompress.spaces.stock import stock_space

TARGETS = ("x86/onnxruntime", "x86/openvino")
SPEARMAN, MAPE = 0.95, 0.15  # the goal
MANY = 10_000


class Stopped(Exception):
    """The time that `--stop` gave is over."""


def lookups_per_second(table: LookupTable, path: Path, seed: int) -> tuple[float, float]:
    """Seconds for 10,000 networks: from their channels and bits, and from a matrix of counts."""
    calls = read_operators(path)
    rng = np.random.default_rng(seed)
    choices = rng.integers(1, 5, (MANY, 1, 1))
    channels = np.maximum(1, np.array([channels_of(call) for call in calls])[None] * choices // 4)
    bits = rng.choice([32, 8], (MANY, 1)).repeat(len(calls), 1)
    started = time.perf_counter()
    table.seconds_of_channels(calls, channels, bits)
    direct = time.perf_counter() - started
    counts = rng.integers(0, 3, (MANY, len(table.keys)))
    started = time.perf_counter()
    table.seconds(counts)
    return direct, time.perf_counter() - started


def benchmark(target: str, task: Task, arguments: argparse.Namespace, end: float) -> dict[str, Any]:
    """One target's figures."""
    backend = make_backend(target, arguments.threads)
    space = stock_space(task, backend.capabilities)
    path = arguments.table / f"{target.replace('/', '-')}-{len(backend.cores)}.parquet"
    files = arguments.table / "files" / target.replace("/", "-")

    def tell(done: int, count: int, said: str) -> None:
        print(f"{target}: {done} of {count}: {said}", file=sys.stderr, flush=True)
        if time.monotonic() > end:
            raise Stopped

    plans: list[Plan] = [(), *draw_plans(space, arguments.samples, arguments.seed + 1000)]
    held_out = list(draw_plans(space, 2 * arguments.candidates, arguments.seed))
    if arguments.build:
        files.mkdir(parents=True, exist_ok=True)
        for number, plan in enumerate([*plans, *held_out[: arguments.candidates + 2]], 1):
            build_untrained(plan, task, backend, files)
            tell(number, len(plans) + arguments.candidates + 2, "built")
        return {}
    profile_model(task, backend, plans, path, files=files, on_progress=tell)
    error = table_error(path, task, backend, held_out, candidates=arguments.candidates, files=files, on_progress=tell)
    table = read_table(path)
    reference = build_untrained((), task, backend, files)
    direct, counted = lookups_per_second(table, reference.path, arguments.seed)
    return {
        "target": target,
        "threads": len(backend.cores),
        "device": table.device,
        "runtime": table.runtime,
        "operators": len(table.rows),
        "networks": len(table.details["networks"]),
        **error,
        "scale": table.scale,
        "dispatch": table.dispatch,
        "overhead": table.overhead,
        "seconds_for_10000_choices": direct,
        "seconds_for_10000_counts": counted,
        "goal_met": error["spearman"] >= SPEARMAN and error["mape"] <= MAPE,
    }


def shown(results: list[dict[str, Any]]) -> Table:
    """The figures for people."""
    table = Table(title=f"Lookup tables against whole networks (goal: Spearman >= {SPEARMAN}, MAPE <= {MAPE:.0%})")
    for column in ("target", "operators", "networks", "Spearman", "MAPE", "in 95 %", "raw Spearman", "raw MAPE"):
        table.add_column(column, justify="left" if column == "target" else "right")
    table.add_column("10,000 looked up", justify="right")
    table.add_column("goal")
    for row in results:
        coverage = "-" if row["coverage"] is None else f"{row['coverage']:.0%}"
        table.add_row(
            row["target"],
            str(row["operators"]),
            str(row["candidates"]),
            f"{row['spearman']:.3f}",
            f"{row['mape']:.1%}",
            coverage,
            f"{row['raw_spearman']:.3f}",
            f"{row['raw_mape']:.1%}",
            f"{row['seconds_for_10000_choices'] * 1e3:.0f} ms",
            "met" if row["goal_met"] else "missed",
        )
    return table


def main() -> int:
    """Read the options, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: both")
    parser.add_argument("--candidates", type=int, default=30, help="networks that the table is compared with")
    parser.add_argument("--samples", type=int, default=36, help="candidates that the table is made from")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="0: all cores")
    parser.add_argument("--table", type=Path, default=Path("lookup_tables"), help="folder of the tables and files")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--build", action="store_true", help="only build the files")
    parser.add_argument("--stop", type=float, default=float("inf"), metavar="SECONDS", help="end, to go on later")
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.stop
    try:
        task = load_task("resnet20", "cifar10")
        results = [benchmark(target, task, arguments, end) for target in arguments.target or TARGETS]
    except AutocompressError as error:
        print(error, file=sys.stderr)
        return 2
    except Stopped:
        print("stopped; the same command goes on", file=sys.stderr)
        return 3
    if arguments.build:
        return 0
    Console(width=140).print(shown(results))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0 if all(row["goal_met"] for row in results) else 1


if __name__ == "__main__":
    sys.exit(main())
