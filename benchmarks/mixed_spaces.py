"""Samplers on spaces of mixed parameters: categorical, ordinal, continuous and conditional ones together.

    python benchmarks/mixed_spaces.py --space resnet20-joint --trials 300 --seeds 10
    python benchmarks/mixed_spaces.py --space layers --sampler auto,optuna-tpe-multivariate --json out.json

`resnet20-joint` is the stock space "joint" of ResNet-20 as a search on a target with 2, 4, 8 and 16 bits sees it;
`layers` has for each of eight layers a kind of compression, a continuous ratio or a rank that depends on the kind,
and bits. A candidate's figures are synthetic: costs multiply, errors add up over the groups of layers, with
interactions between pruning and few bits, all with weights drawn from the seed, which is that of the task and of
the sampler. The error stands for one minus accuracy (at most 1), costs are shares of the untouched model's.
Hypervolume is that below (1, 1, ...).
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
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import moocore
import numpy as np
import optuna
from optuna.samplers import BaseSampler, NSGAIISampler, TPESampler
from rich.console import Console
from rich.progress import track
from rich.table import Table

from autocompress.core.errors import InputError, unknown
from autocompress.core.types import Capabilities
from autocompress.search.samplers import SAMPLERS, make_sampler
from autocompress.spaces.stock import STOCK, stock_space
from autocompress.tasks.noise import noise_task

CHECKPOINTS = (50, 100, 200, 300)
BITS = (16, 8, 4, 2)
SPEED = {32: 1.0, 16: 0.7, 8: 0.4, 4: 0.35, 2: 0.32}  # of layers with so many bits, in time

STOCK_SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "optuna-nsga2": lambda seed: NSGAIISampler(seed=seed),
    "optuna-nsga2-20": lambda seed: NSGAIISampler(seed=seed, population_size=20),
    "optuna-tpe": lambda seed: TPESampler(seed=seed),
    "optuna-tpe-multivariate": lambda seed: TPESampler(seed=seed, multivariate=True, group=True),
}
SPACES = ("resnet20-joint", "layers")


def layers(trial: Any) -> None:
    """Eight layers, each cut in one of several ways or not, with bits of its own."""
    for layer in range(8):
        kind = trial.suggest_categorical(f"kind.{layer}", ["none", "prune", "lowrank"])
        if kind == "prune":
            trial.suggest_float(f"prune.{layer}", 0.05, 0.9)
        elif kind == "lowrank":
            trial.suggest_int(f"rank.{layer}", 1, 16, log=True)
        trial.suggest_categorical(f"bits.{layer}", list(BITS))


def space_of(name: str) -> Callable[[Any], Any]:
    if name == "layers":
        return layers
    return stock_space(noise_task("resnet20"), Capabilities(BITS, ("latency",)), techniques=STOCK["joint"])


class Landscape:
    """Synthetic figures for a space's parameters: (error, latency, size), all to be minimised."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def _weight(self, *what: Any) -> float:
        """A lognormal number that depends on the seed and on what it is for."""
        words = np.frombuffer(repr((self._seed, what)).encode(), dtype=np.uint8)
        return float(np.exp(np.random.default_rng(words).normal(0.0, 0.8)))

    def __call__(self, params: dict[str, Any]) -> tuple[float, float, float]:
        groups = sorted({name.split(".", 1)[1] for name in params if name.startswith(("bits.", "prune.", "lowrank."))})
        groups = [g for g in groups if g not in ("importance", "method", "float")]
        error, latency, size, total = 0.05, 0.0, 0.0, 0.0
        for group in groups:
            share = self._weight("share", group)
            cut = params.get(f"prune.{group}", 0.0)
            kept = params.get(f"lowrank.{group}", params.get(f"rank.{group}", 16) / 16)
            bits = params.get(f"bits.{group}", 32)
            bits = params.get("bits.float", 16) if bits == "float" else bits
            rounding = 2.0 ** (2 - bits) * self._weight("bits", group)
            error += 0.05 * self._weight("prune", group) * cut**2 * (1.0 + 8.0 * rounding)
            loss = 0.05 * self._weight("rank", group) * (1.0 - kept) ** 2
            error += loss * self._weight("method", params.get("lowrank.method")) ** 0.5 + 0.03 * rounding
            work = share * (1.0 - cut) * min(1.0, 0.15 + kept)  # two thin layers are no faster than one
            latency, size, total = latency + work * SPEED[bits], size + work * bits / 32, total + share
        training = [
            name for name in sorted(params) if name.partition(".")[0] not in ("prune", "lowrank", "rank", "bits")
        ]
        for name in training:
            error *= self._weight(name, params[name]) ** 0.1
        return min(error, 1.0), 0.1 + 0.9 * latency / total, size / total


def run_one(space_name: str, name: str, seed: int, trials: int) -> dict[str, Any]:
    """One search; the hypervolume at each checkpoint."""
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space, landscape = space_of(space_name), Landscape(seed)
    objectives = 2 if space_name == "layers" else 3
    if name in STOCK_SAMPLERS:
        sampler = STOCK_SAMPLERS[name](seed)
    else:
        sampler = make_sampler(name, seed=seed, trials=trials, constrained=False, space=space)
    study = optuna.create_study(directions=["minimize"] * objectives, sampler=sampler)
    values: list[tuple[float, ...]] = []
    spent = 0.0
    for _ in range(trials):
        before = time.perf_counter()
        trial = study.ask()
        space(trial)
        spent += time.perf_counter() - before
        values.append(landscape(trial.params)[:objectives])
        study.tell(trial, values[-1])
    counts = [count for count in CHECKPOINTS if count <= trials] or [trials]
    return {
        "space": space_name,
        "sampler": name,
        "seed": seed,
        "parameters": len({p for t in study.trials for p in t.params}),
        "repeats": trials - len({tuple(sorted(t.params.items(), key=str)) for t in study.trials}),
        "seconds_per_suggestion": spent / trials,
        "hypervolumes": {n: moocore.hypervolume(np.array(values[:n]), ref=np.ones(objectives)) for n in counts},
    }


def show(found: Sequence[dict[str, Any]], space: str, trials: int) -> Table:
    """Mean hypervolume of each sampler, and in how many seeds the first sampler is ahead of it."""
    seeds, counts = sorted({f["seed"] for f in found}), list(found[0]["hypervolumes"])
    by = {(f["sampler"], f["seed"]): f for f in found}
    first = found[0]["sampler"]
    shown = Table(
        title=f"{space}: {max(f['parameters'] for f in found)} parameters, {trials} trials, {len(seeds)} seeds"
    )
    shown.add_column("sampler")
    for name in [*(f"at {n}" for n in counts), f"{first} ahead at {counts[-1]}", "repeats", "ms each"]:
        shown.add_column(name, justify="right")
    for sampler in dict.fromkeys(f["sampler"] for f in found):
        some = [by[sampler, seed] for seed in seeds]
        ahead = sum(
            by[first, s]["hypervolumes"][counts[-1]] > by[sampler, s]["hypervolumes"][counts[-1]] for s in seeds
        )
        shown.add_row(
            sampler,
            *(f"{np.mean([f['hypervolumes'][n] for f in some]):.4f}" for n in counts),
            "" if sampler == first else f"{ahead} of {len(seeds)}",
            f"{np.mean([f['repeats'] for f in some]):.1f}",
            f"{1000 * np.mean([f['seconds_per_suggestion'] for f in some]):.1f}",
        )
    return shown


def run(arguments: argparse.Namespace) -> None:
    """Benchmark, print, write."""
    for name in ("trials", "seeds", "processes"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name}: expected at least 1, got {getattr(arguments, name)}")
    samplers = [name.strip() for name in arguments.sampler.split(",")]
    for name in samplers:
        if name not in STOCK_SAMPLERS and name not in SAMPLERS:
            raise unknown("sampler", name, [*SAMPLERS, *STOCK_SAMPLERS])
    jobs = [(arguments.space, name, seed, arguments.trials) for name in samplers for seed in range(arguments.seeds)]
    with ProcessPoolExecutor(arguments.processes) as pool:
        running = [pool.submit(run_one, *job) for job in jobs]
        found = [job.result() for job in track(running, "searching", console=Console(stderr=True))]
    Console(width=None if sys.stdout.isatty() else 140).print(show(found, arguments.space, arguments.trials))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", choices=SPACES, default=SPACES[0])
    parser.add_argument("--sampler", default="auto,optuna-tpe-multivariate,optuna-tpe,optuna-nsga2-20")
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=10, help="how many seeds, from 0")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="searches side by side")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write one row per search there")
    try:
        run(parser.parse_args())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
