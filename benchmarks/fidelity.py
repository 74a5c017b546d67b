"""How many training steps a search saves by training few candidates in full: `--rungs` against full training.

All searches have the same space and seed; those that train in full take the samplers named with `--against`.
Objectives are accuracy (in PyTorch, on the search split) and multiply-accumulates, so that nothing but training takes
time. Compared is the hypervolume, on the test split, of the front of fully trained candidates.

    python benchmarks/fidelity.py --seeds 0 1 2
    python benchmarks/fidelity.py --model resnet20 --data cifar10 --granularity stage --steps 270 --batch 64 \\
        --images 2000 --worst-accuracy 0.3 --trials 24 --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from bisect import bisect_right
from dataclasses import dataclass, field, replace
from itertools import compress
from pathlib import Path
from typing import Any

import torch

from autocompress.compression.pruning import Prune
from autocompress.compression.training import accuracy
from autocompress.core.types import (
    Candidate,
    Capabilities,
    Evaluation,
    Measurement,
    Method,
    Provenance,
    Split,
    State,
    Task,
)
from autocompress.evaluators.fidelity import Training
from autocompress.evaluators.objectives import find_objective
from autocompress.evaluators.pipeline import baseline_plans, cheap_figures
from autocompress.search.engine import Engine, Progress
from autocompress.search.executors import InlineExecutor
from autocompress.search.samplers import make_sampler
from autocompress.spaces.stock import StockSpace, stock_space
from autocompress.studies.pareto import hypervolume, nondominated
from autocompress.studies.storage import Database, sqlite_url
from autocompress.studies.study import Study
from autocompress.tasks.models import load_task

OBJECTIVES = (find_objective("accuracy"), find_objective("macs"))
DIRECTIONS = [objective.direction for objective in OBJECTIVES]
MARKS = (0.1, 0.2, 0.33, 0.5, 0.7, 0.85, 1.0)  # shares of the full search's steps


@dataclass(frozen=True)
class Evaluate:
    """A candidate's accuracy and multiply-accumulates, in PyTorch."""

    task: Task
    cache: Path

    def __call__(self, candidate: Candidate) -> Evaluation:
        """Train as far as the candidate's fidelity says."""
        started = time.perf_counter()
        training, model = Training(self.task, self.cache, candidate.fidelity), self.task.build()
        for position, step in enumerate(candidate.plan):
            retrains = step.retrains
            model = training(model, candidate.plan[: position + 1]) if retrains else step(model, self.task)
        data, source = self.task.data, Provenance(Method.MEASURED, "any", "pytorch", "")
        splits = {"accuracy": data.search, "test_accuracy": data.test}
        state = State.COMPLETE if training.whole else State.STOPPED
        figures = {"macs": cheap_figures(model, self.task)["macs"]} | {
            name: Measurement(name, accuracy(model, data, split), "", None, len(split), source)
            for name, split in splits.items()
            if name == "accuracy" or training.whole
        }
        candidate = replace(candidate, fidelity=1.0) if training.whole else candidate
        seconds = time.perf_counter() - started
        return Evaluation(candidate, state, figures, seconds=seconds, steps=training.steps)


@dataclass
class Curve:
    """Hypervolume of the front of fully trained candidates after so many training steps.

    The front is that of the search split, its volume that of the test split: the more candidates a search trains in
    full, the luckier the best of them are on the images that they are chosen by.

    Attributes:
        limit: steps after which the search ends.
        values: of fully trained candidates, on the search split; `unseen`, on the test split.
    """

    reference: list[float]
    limit: float = float("inf")
    steps: list[int] = field(default_factory=list)
    volumes: list[float] = field(default_factory=list)
    values: list[list[float]] = field(default_factory=list)
    unseen: list[list[float]] = field(default_factory=list)
    started: int = 0

    def __call__(self, progress: Progress, evaluation: Evaluation | None) -> None:
        """Note a result; a search's `on_change`."""
        if evaluation is None:
            return
        if evaluation.state is State.COMPLETE:
            found = {name: m.value for name, m in evaluation.measurements.items()}
            self.values.append([found["accuracy"], found["macs"]])
            self.unseen.append([found["test_accuracy"], found["macs"]])
        self.started = progress.trials
        self.steps.append(progress.steps)
        best = [*compress(self.unseen, nondominated(self.values, DIRECTIONS))]
        self.volumes.append(hypervolume(best, DIRECTIONS, reference=self.reference))
        if progress.steps >= self.limit:
            raise KeyboardInterrupt  # as Ctrl-C ends a search

    def at(self, steps: float) -> float:
        """The hypervolume once so many steps were done."""
        place = bisect_right(self.steps, steps)
        return self.volumes[place - 1] if place else 0.0

    def reaches(self, volume: float) -> int | None:
        """The steps after which it is this large; None where it never is."""
        return next((s for s, v in zip(self.steps, self.volumes, strict=True) if v >= volume), None)


def run(
    task: Task, space: StockSpace, curve: Curve, seed: int, arguments: argparse.Namespace, sampler: str, rungs: int = 1
) -> None:
    """One search; `curve` takes in what happens, and ends it where it has rungs: these start as many as they like."""
    trials = arguments.trials
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Engine(
            space=space,
            study=Study(folder, OBJECTIVES, Database(sqlite_url(folder), DIRECTIONS, ["accuracy", "macs"])),
            executor=InlineExecutor(Evaluate(task, folder / "cache")),
            sampler=make_sampler(sampler, seed=seed, trials=trials, constrained=False, space=space),
            trials=trials if rungs == 1 else 20 * trials,
            baselines=baseline_plans(Capabilities((32,), ()), (Prune(0.5, round_to=space.round_to), space.finetune)),
            on_change=curve,
            rungs=rungs,
            reduction=arguments.reduction,
        ).run()


def compare(task: Task, space: StockSpace, seed: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each search with one seed; the last one is that with rungs."""
    reference = [arguments.worst_accuracy, cheap_figures(task.build(), task)["macs"].value]
    found = {}
    for sampler in arguments.against:
        curve = found[f"in full, {sampler}"] = Curve(reference)
        run(task, space, curve, seed, arguments, sampler)
    most = max(curve.steps[-1] for curve in found.values())
    partly = Curve(reference, limit=arguments.share * most)
    run(task, space, partly, seed, arguments, arguments.sampler, arguments.rungs)
    rows = []
    for search, curve in [*found.items(), (f"rungs, {arguments.sampler}", partly)]:
        seen = [m for m in MARKS if m * most <= 1.05 * curve.steps[-1]]
        reached = None if curve is partly else partly.reaches(curve.volumes[-1])
        row = {
            "seed": seed,
            "search": search,
            "started": curve.started,
            "in full": len(curve.values),
            "steps": curve.steps[-1],
            "hypervolume": [round(curve.at(m * most), 4) for m in seen],
            "rungs reach its last": None if reached is None else round(reached / curve.steps[-1], 3),
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    """Run and print: a line of JSON for each seed, then a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits-cnn")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--granularity", default="layer")
    parser.add_argument("--images", type=int, default=0, help="of the search and the test split; 0 for all")
    parser.add_argument("--steps", type=int, default=270, help="of fine-tuning")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--trials", type=int, default=24, help="of the searches that train in full")
    parser.add_argument("--rungs", type=int, default=2)
    parser.add_argument("--reduction", type=int, default=9)
    parser.add_argument("--share", type=float, default=0.7, help="of the full searches' steps that rungs get")
    parser.add_argument("--sampler", default="auto", help="of the search with rungs")
    parser.add_argument("--against", nargs="+", default=["auto", "nsga2"], help="samplers of the full searches")
    parser.add_argument("--deepest", type=float, default=0.875, help="largest share of channels that a group may lose")
    parser.add_argument("--worst-accuracy", type=float, default=0.8, help="of the hypervolume's reference point")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task = load_task(arguments.model, arguments.data)
    if arguments.images:
        first = slice(arguments.images)
        splits = {name: getattr(task.data, name) for name in ("search", "test")}
        fewer = {name: Split(split.inputs[first], split.labels[first]) for name, split in splits.items()}
        task = replace(task, data=replace(task.data, **fewer))
    techniques = ("prune", "importance")
    space = stock_space(task, Capabilities((32,), ()), techniques=techniques, granularity=arguments.granularity)
    finetune = replace(space.finetune, steps=arguments.steps, batch_size=arguments.batch)
    space = replace(space, ratios=(arguments.deepest, 0.125), finetune=finetune)
    rows = [row for seed in arguments.seeds for row in compare(task, space, seed, arguments)]
    marks = " | ".join(f"{share:.0%}" for share in MARKS)
    print(f"\n| seed | search | {marks} | rungs reach its last value at |")
    print("|---" * (len(MARKS) + 3) + "|")
    for row in rows:
        cells = [f"{volume:.3f}" for volume in row["hypervolume"]]
        cells += [""] * (len(MARKS) - len(cells))
        found = row["rungs reach its last"]
        last = "" if row["search"].startswith("rungs") else "not" if found is None else f"{found:.0%}"
        print(f"| {row['seed']} | {row['search']} | {' | '.join(cells)} | {last} |")


if __name__ == "__main__":
    main()
