"""What an earlier search on another device, or for other data, saves the next one.

    python benchmarks/transfer.py --table ../shared/data/nasbench201_hardware.parquet \\
        --accuracy acc_cifar10-val --from lat_ms_1080ti_1 --to lat_ms_pixel3 --earlier 200 --trials 200 --seeds 3
    ... --accuracy acc_cifar100-val --from-accuracy acc_cifar10-val --json out.json

The table is that of samplers.py. For each seed the default sampler first searches the table with `--from-accuracy` and
`--from` for `--earlier` trials, then the one with `--accuracy` and `--to`: "cold" without knowing of the first search,
"warm" with it as its prior. "starts" tries the best candidates of the first search before anything else, a quarter of
the trials at most, and knows nothing else of it. Hypervolumes are as in samplers.py. Options `--from` and `--to`
repeat; every pair of them makes a task, but for a device with itself on the same data.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one process a core is faster than threads in each
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import moocore
import numpy as np
import optuna
from rich.console import Console
from rich.progress import track
from rich.table import Table
from samplers import EDGES, SHARES, Problem, judge, make_problem

from autocompress import AutoSampler
from autocompress.core.errors import InputError
from autocompress.hardware.latency_tables import read_table
from autocompress.search.belief import Prior
from autocompress.search.improvement import spread_along

CHECKPOINTS = (10, 20, 30, 50, 100, 200)
WAYS = ("cold", "starts", "warm")


def search(
    problem: Problem, sampler: AutoSampler, trials: int, starts: Sequence[dict[str, Any]] = ()
) -> tuple[list[dict[str, Any]], list[int]]:
    """Parameters and rows of the table, in the order in which they were evaluated."""
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(directions=["minimize"] * problem.values.shape[1], sampler=sampler)
    operations = sorted({operation for cell in problem.cells for operation in cell})
    for params in starts:
        study.enqueue_trial(params)
    rows = []
    for _ in range(trials):
        trial = study.ask()
        cell = tuple(trial.suggest_categorical(f"edge{number}", operations) for number in range(len(EDGES)))
        rows.append(problem.cells[cell])
        study.tell(trial, [float(value) for value in problem.values[rows[-1]]])
    return [trial.params for trial in study.trials], rows


def run_one(earlier: Problem, problem: Problem, before: int, trials: int, seed: int) -> list[dict[str, Any]]:
    """One seed: the earlier search, then each way of the next."""
    params, rows = search(earlier, AutoSampler(seed + 1000), before)
    values = earlier.values[rows]
    best = np.flatnonzero(moocore.is_nondominated(values))
    chosen = [params[int(best[place])] for place in spread_along(values[best], trials // 4)]
    found = []
    for way in WAYS:
        prior = [Prior(params, values)] if way == "warm" else []
        _, ended = search(problem, AutoSampler(seed, prior=prior), trials, chosen if way == "starts" else ())
        counts = [count for count in CHECKPOINTS if count <= trials] or [trials]
        found.append(
            judge(problem, ended, counts)
            | {"way": way, "from": f"{earlier.accuracy} {earlier.latency}", "seed": seed}
            | {"to": f"{problem.accuracy} {problem.latency}"}
        )
    return found


def show(found: Sequence[dict[str, Any]], before: int) -> Table:
    """Means over seeds, for each task and over all."""
    counts = list(found[0]["hypervolumes"])
    shown = Table(title=f"after {before} trials of an earlier search, {len({f['seed'] for f in found})} seeds")
    for name in ("from", "to", ""):
        shown.add_column(name)
    for name in [*(f"at {n}" for n in counts), *(f"to {share}" for share in SHARES)]:
        shown.add_column(name, justify="right")
    tasks = list(dict.fromkeys((f["from"], f["to"]) for f in found))
    for task in [*tasks, None] if len(tasks) > 1 else tasks:
        for way in WAYS:
            some = [f for f in found if f["way"] == way and task in ((f["from"], f["to"]), None)]
            reached = []
            for share in SHARES:
                needed = [f["evaluations_to"][str(share)] for f in some]
                here = sorted(n for n in needed if n is not None)
                reached.append(str(here[len(needed) // 2]) if len(here) > len(needed) // 2 else f"> {max(counts)}")
            names = (task or ("all", f"mean of {len(tasks)}")) if way == WAYS[0] else ("", "")
            means = [f"{np.mean([f['hypervolumes'][n] for f in some]):.4f}" for n in counts]
            shown.add_row(*names, way, *means, *reached, end_section=way == WAYS[-1])
    return shown


def run(arguments: argparse.Namespace) -> None:
    """Search twice for each pair, print, write."""
    for name in ("trials", "earlier", "seeds", "processes"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name}: expected at least 1, got {getattr(arguments, name)}")
    table = read_table(arguments.table, "--table")
    first = arguments.from_accuracy or arguments.accuracy
    pairs = [
        (make_problem(table, first, source), make_problem(table, arguments.accuracy, target))
        for source, target in itertools.product(arguments.sources, arguments.targets)
        if (first, source) != (arguments.accuracy, target)
    ]
    if not pairs:
        raise InputError("--from, --to: expected different devices, or another --from-accuracy")
    with ProcessPoolExecutor(arguments.processes) as pool:
        running = [
            pool.submit(run_one, *pair, arguments.earlier, arguments.trials, seed)
            for pair in pairs
            for seed in range(arguments.seeds)
        ]
        jobs = track(running, "searching", console=Console(stderr=True))
        found = [one for job in jobs for one in job.result()]
    Console(width=None if sys.stdout.isatty() else 180).print(show(found, arguments.earlier))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--accuracy", required=True, metavar="COL")
    parser.add_argument("--from-accuracy", metavar="COL", help="of the earlier search; default: the same")
    parser.add_argument("--from", dest="sources", action="append", required=True, metavar="COL", help="may repeat")
    parser.add_argument("--to", dest="targets", action="append", required=True, metavar="COL", help="may repeat")
    parser.add_argument("--earlier", type=int, default=200, help="trials of the earlier search")
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, from 0")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="searches side by side")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write every search there")
    try:
        run(parser.parse_args())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
