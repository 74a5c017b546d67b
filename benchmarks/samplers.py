"""How many evaluations samplers need to find the Pareto front of a table of measured architectures.

    python benchmarks/samplers.py --table ../shared/data/nasbench201_hardware.parquet \\
        --accuracy acc_cifar10-val --latency lat_ms_pixel3 --sampler auto,optuna-tpe,local --trials 200 --seeds 3
    ... --latency lat_ms_pixel3,lat_ms_gold_6240 --workers 8 --json out.json

The table is Parquet or CSV with a column `arch` of NAS-Bench-201 cells, one categorical parameter an edge. Accuracy is
maximised, each latency minimised; latencies are clipped from below at the fastest architecture whose output is
connected to its input. Options that repeat make several tasks: each `--accuracy` goes with the `--latency` in the
same place, a single one with all.

Hypervolume is over the box between the worst value of each objective in the table and the best, as a share of what
the true front covers. Every trial counts as an evaluation, repeated ones too. With W workers, W trials run at any
time and they end in random order. Besides our samplers by name, `optuna-nsga2` and `optuna-tpe` are Optuna's with
default settings, `optuna-tpe-multivariate` and `optuna-nsga2-20` the best stock ones that we know for small budgets.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one process a core is faster than threads in each
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import moocore
import numpy as np
import optuna
import pandas as pd
from optuna.samplers import BaseSampler, NSGAIISampler, TPESampler
from rich.console import Console
from rich.progress import track
from rich.table import Table

from autocompress.core.errors import InputError, unknown
from autocompress.hardware.latency_tables import read_table
from autocompress.search.samplers import SAMPLERS, make_sampler

CHECKPOINTS = (50, 100, 200, 500, 1000)
SHARES = (0.95, 0.975, 0.99)
EDGES = ((1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2))  # (to, from) of a cell's nodes, as written in `arch`

STOCK: dict[str, Callable[[int, int], BaseSampler]] = {
    "optuna-nsga2": lambda seed, workers: NSGAIISampler(seed=seed),
    "optuna-nsga2-20": lambda seed, workers: NSGAIISampler(seed=seed, population_size=20),
    "optuna-tpe": lambda seed, workers: TPESampler(seed=seed, constant_liar=workers > 1),
    "optuna-tpe-multivariate": lambda seed, workers: TPESampler(
        seed=seed, multivariate=True, constant_liar=workers > 1
    ),
}


@dataclass(frozen=True)
class Problem:
    """One task: cells, and (cells, objectives) of what is minimised."""

    accuracy: str
    latency: str
    cells: dict[tuple[str, ...], int]
    values: np.ndarray


def cells_of(table: pd.DataFrame) -> dict[tuple[str, ...], int]:
    """Row of each cell, by its six operations."""
    if "arch" not in table:
        raise InputError("--table: expected a column 'arch' of NAS-Bench-201 cells")
    found = {}
    for row, text in enumerate(table["arch"]):
        edges = tuple(edge.partition("~")[0] for edge in str(text).replace("+", "").split("|") if edge)
        if len(edges) != len(EDGES):
            raise InputError(f"--table: arch '{text}' in row {row} is no NAS-Bench-201 cell of {len(EDGES)} edges")
        found[edges] = row
    return found


def connected(cell: Sequence[str]) -> bool:
    """Whether the output of a cell depends on its input."""
    reached = {0}
    for (to, start), operation in zip(EDGES, cell, strict=True):
        if start in reached and operation != "none":
            reached.add(to)
    return 3 in reached


def make_problem(table: pd.DataFrame, accuracy: str, latency: str) -> Problem:
    """The task of one accuracy column and one or more latency columns."""
    cells = cells_of(table)
    used = np.array([connected(cell) for cell in cells])
    columns = []
    for name in (accuracy, *latency.split(",")):
        if name not in table:
            option = "--accuracy" if name == accuracy else "--latency"
            raise InputError(f"{option}: the table has no column '{name}', it has {', '.join(map(str, table.columns))}")
        values = table[name].to_numpy(float)[list(cells.values())]
        columns.append(-values if name == accuracy else np.maximum(values, values[used].min()))
    return Problem(accuracy, latency, {cell: row for row, cell in enumerate(cells)}, np.column_stack(columns))


def sampler_of(name: str, seed: int, trials: int, workers: int) -> BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name in STOCK:
            return STOCK[name](seed, workers)
        return make_sampler(name, seed=seed, trials=trials, constrained=False)


def run_one(problem: Problem, name: str, seed: int, trials: int, workers: int) -> dict[str, Any]:
    """One search; the rows that it evaluated, in the order in which they ended, and what that comes to."""
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = sampler_of(name, seed, trials, workers)
    study = optuna.create_study(directions=["minimize"] * problem.values.shape[1], sampler=sampler)
    operations = sorted({operation for cell in problem.cells for operation in cell})
    rng = np.random.default_rng(seed)
    running: list[tuple[optuna.Trial, int]] = []
    ended: list[int] = []
    spent = 0.0
    for asked in range(trials):
        before = time.perf_counter()
        trial = study.ask()
        cell = tuple(trial.suggest_categorical(f"edge{number}", operations) for number in range(len(EDGES)))
        spent += time.perf_counter() - before
        running.append((trial, problem.cells[cell]))
        while len(running) >= (workers if asked + 1 < trials else 1):
            trial, row = running.pop(int(rng.integers(len(running))))
            study.tell(trial, [float(value) for value in problem.values[row]])
            ended.append(row)
    return judge(problem, ended) | {
        "sampler": name,
        "accuracy": problem.accuracy,
        "latency": problem.latency,
        "seed": seed,
        "workers": workers,
        "repeats": trials - len(set(ended)),
        "seconds_per_suggestion": spent / trials,
    }


def judge(problem: Problem, ended: Sequence[int], checkpoints: Sequence[int] = CHECKPOINTS) -> dict[str, Any]:
    """Hypervolume after each evaluation that matters, and the share of the true front that was found."""
    values, reference = problem.values, problem.values.max(axis=0)
    true = values[moocore.is_nondominated(values)]
    everything = moocore.hypervolume(true, ref=reference)
    found: list[float] = []
    for count in range(1, len(ended) + 1):
        row = values[ended[count - 1]]
        beaten = count > 1 and bool(np.any(np.all(values[ended[: count - 1]] <= row, axis=1)))
        found.append(found[-1] if beaten else moocore.hypervolume(values[ended[:count]], ref=reference) / everything)
    reached = {share: next((n for n, h in enumerate(found, 1) if h >= share), None) for share in SHARES}
    points = {tuple(row) for row in values[list(ended)]}
    return {
        "hypervolumes": {count: found[count - 1] for count in checkpoints if count <= len(found)}
        or {len(found): found[-1]},
        "evaluations_to": {str(share): count for share, count in reached.items()},
        "front_found": float(np.mean([tuple(row) in points for row in np.unique(true, axis=0)])),
    }


def benchmark(
    problems: Sequence[Problem], samplers: Sequence[str], trials: int, seeds: int, workers: int, processes: int
) -> list[dict[str, Any]]:
    """Every sampler on every task with every seed."""
    jobs = [(p, name, seed, trials, workers) for name in samplers for p in problems for seed in range(seeds)]
    with ProcessPoolExecutor(processes) as pool:
        running = [pool.submit(run_one, *job) for job in jobs]
        return [job.result() for job in track(running, "searching", console=Console(stderr=True))]


def rows_of(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each checkpoint."""
    rows = []
    for one in found:
        rest = {key: value for key, value in one.items() if key != "hypervolumes"}
        rows += [rest | {"evaluations": n, "hypervolume": h} for n, h in one["hypervolumes"].items()]
    return rows


def show(found: Sequence[dict[str, Any]], trials: int) -> Table:
    """Means over seeds, for each sampler by task and over all tasks."""
    shown = Table(title=f"{trials} trials, {found[0]['workers']} workers, {len({f['seed'] for f in found})} seeds")
    counts = list(found[0]["hypervolumes"])
    for name in ("sampler", "accuracy", "latency"):
        shown.add_column(name)
    headings = [*(f"at {n}" for n in counts), *(f"to {share}" for share in SHARES), "front", "repeats", "ms each"]
    for name in headings:
        shown.add_column(name, justify="right")
    tasks = list(dict.fromkeys((f["accuracy"], f["latency"]) for f in found))
    for sampler in dict.fromkeys(f["sampler"] for f in found):
        for task in [*tasks, None] if len(tasks) > 1 else tasks:
            some = [f for f in found if f["sampler"] == sampler and task in ((f["accuracy"], f["latency"]), None)]
            reached = []
            for share in SHARES:
                needed = [f["evaluations_to"][str(share)] for f in some]
                here = [n for n in needed if n is not None]
                # A median that counts those who did not get there as later than all others.
                late = sorted(here) + [None] * (len(needed) - len(here))
                middle = late[len(late) // 2]
                reached.append(f"> {trials}" if middle is None else str(middle))
            shown.add_row(
                sampler,
                *(task or ("mean of all", "")),
                *(f"{np.mean([f['hypervolumes'][n] for f in some]):.4f}" for n in counts),
                *reached,
                f"{100 * np.mean([f['front_found'] for f in some]):.0f} %",
                f"{np.mean([f['repeats'] for f in some]):.1f}",
                f"{1000 * np.mean([f['seconds_per_suggestion'] for f in some]):.1f}",
                end_section=task is None,
            )
    return shown


def run(arguments: argparse.Namespace) -> None:
    """Benchmark, print, write."""
    for name in ("trials", "seeds", "workers", "processes"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name}: expected at least 1, got {getattr(arguments, name)}")
    if arguments.json and not arguments.json.resolve().parent.is_dir():
        raise InputError(f"--json: there is no folder '{arguments.json.parent}'")
    samplers = [name.strip() for text in arguments.sampler or ["auto"] for name in text.split(",")]
    for name in samplers:
        if name not in STOCK and name not in SAMPLERS:
            raise unknown("sampler", name, [*SAMPLERS, *STOCK])
    accuracies, latencies = arguments.accuracy, arguments.latency
    if len(accuracies) not in (1, len(latencies)):
        raise InputError(
            f"--accuracy: expected once, or as often as --latency ({len(latencies)}), got {len(accuracies)}"
        )
    accuracies = accuracies * len(latencies) if len(accuracies) == 1 else accuracies
    table = read_table(arguments.table, "--table")
    problems = [make_problem(table, *names) for names in zip(accuracies, latencies, strict=True)]
    found = benchmark(problems, samplers, arguments.trials, arguments.seeds, arguments.workers, arguments.processes)
    Console(width=None if sys.stdout.isatty() else 160).print(show(found, arguments.trials))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows_of(found), indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--accuracy", action="append", required=True, metavar="COL", help="may repeat")
    parser.add_argument("--latency", action="append", required=True, metavar="COL[,COL]", help="may repeat")
    parser.add_argument("--sampler", action="append", metavar="NAME[,NAME]", help="default: auto; may repeat")
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, from 0")
    parser.add_argument("--workers", type=int, default=1, help="trials that run at any time")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="searches side by side")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write one row per checkpoint there")
    try:
        run(parser.parse_args())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
