"""How many training steps a search saves by training few candidates in full: `--rungs` against full training.

Both searches have the same space, sampler and seeds. Objectives are accuracy (in PyTorch, on the search split) and
multiply-accumulates, so that nothing but training takes time; the hypervolume is that of fully trained candidates.

    python benchmarks/fidelity.py --seeds 0 1 2
    python benchmarks/fidelity.py --model resnet20 --data cifar10 --steps 200 --trials 24 --seeds 0
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from bisect import bisect_right
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from autocompress.compression.pruning import Prune
from autocompress.compression.training import accuracy
from autocompress.core.types import Candidate, Capabilities, Evaluation, Measurement, Method, Provenance, State, Task
from autocompress.evaluators.fidelity import Training
from autocompress.evaluators.objectives import find_objective
from autocompress.evaluators.pipeline import baseline_plans, cheap_figures
from autocompress.search.engine import Engine, Progress
from autocompress.search.executors import InlineExecutor
from autocompress.search.samplers import make_sampler
from autocompress.spaces.stock import StockSpace, stock_space
from autocompress.studies.pareto import hypervolume
from autocompress.studies.storage import Database, sqlite_url
from autocompress.studies.study import Study
from autocompress.tasks.models import load_task

OBJECTIVES = (find_objective("accuracy"), find_objective("macs"))
DIRECTIONS = [objective.direction for objective in OBJECTIVES]
MARKS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)  # shares of the full search's steps


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
        right = accuracy(model, self.task.data, self.task.data.search)
        source = Provenance(Method.MEASURED, "any", "pytorch", "")
        figures = {
            "accuracy": Measurement("accuracy", right, "", None, len(self.task.data.search), source),
            "macs": cheap_figures(model, self.task)["macs"],
        }
        state = State.COMPLETE if training.whole else State.STOPPED
        candidate = replace(candidate, fidelity=1.0) if training.whole else candidate
        seconds = time.perf_counter() - started
        return Evaluation(candidate, state, figures, seconds=seconds, steps=training.steps)


@dataclass
class Curve:
    """Hypervolume of the fully trained candidates after so many training steps.

    Attributes:
        limit: steps after which the search ends.
    """

    reference: list[float]
    limit: float = float("inf")
    steps: list[int] = field(default_factory=list)
    volumes: list[float] = field(default_factory=list)
    values: list[list[float]] = field(default_factory=list)
    started: int = 0

    def __call__(self, progress: Progress, evaluation: Evaluation | None) -> None:
        """Note a result; a search's `on_change`."""
        if evaluation is None:
            return
        if evaluation.state is State.COMPLETE:
            self.values.append([evaluation.measurements[objective.name].value for objective in OBJECTIVES])
        self.started = progress.trials
        self.steps.append(progress.steps)
        self.volumes.append(hypervolume(self.values, DIRECTIONS, reference=self.reference))
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
    task: Task, space: StockSpace, curve: Curve, seed: int, trials: int, sampler: str, rungs: int, reduction: int
) -> None:
    """One search; `curve` takes in what happens."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Engine(
            space=space,
            study=Study(folder, OBJECTIVES, Database(sqlite_url(folder), DIRECTIONS, ["accuracy", "macs"])),
            executor=InlineExecutor(Evaluate(task, folder / "cache")),
            sampler=make_sampler(sampler, seed=seed, trials=trials, constrained=False),
            trials=trials,
            baselines=baseline_plans(Capabilities((32,), ()), (Prune(0.5, round_to=space.round_to), space.finetune)),
            on_change=curve,
            rungs=rungs,
            reduction=reduction,
        ).run()


def compare(task: Task, space: StockSpace, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Full and partial training, with one seed."""
    macs = cheap_figures(task.build(), task)["macs"].value
    reference = [arguments.worst_accuracy, macs]
    whole = Curve(reference)
    run(task, space, whole, seed, arguments.trials, arguments.sampler, 1, arguments.reduction)
    partly = Curve(reference, limit=whole.steps[-1])
    most = 20 * arguments.trials
    run(task, space, partly, seed, most, arguments.sampler, arguments.rungs, arguments.reduction)
    total, goal = whole.steps[-1], whole.volumes[-1]
    reached, own = partly.reaches(goal), whole.reaches(goal)
    return {
        "seed": seed,
        "steps": total,
        "full": [round(whole.at(share * total), 4) for share in MARKS],
        "rungs": [round(partly.at(share * total), 4) for share in MARKS],
        "full_candidates": len(whole.values),
        "rungs_candidates": partly.started,
        "rungs_in_full": len(partly.values),
        "full_reached_at": None if own is None else round(own / total, 3),
        "rungs_reached_at": None if reached is None else round(reached / total, 3),
    }


def main() -> None:
    """Run and print: a line of JSON for each seed, then a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits-cnn")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--steps", type=int, default=270, help="of fine-tuning")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--trials", type=int, default=40, help="of the search that trains in full")
    parser.add_argument("--rungs", type=int, default=3)
    parser.add_argument("--reduction", type=int, default=3)
    parser.add_argument("--sampler", default="tpe")
    parser.add_argument("--deepest", type=float, default=0.875, help="largest share of channels that a group may lose")
    parser.add_argument("--worst-accuracy", type=float, default=0.8, help="of the hypervolume's reference point")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task = load_task(arguments.model, arguments.data)
    space = stock_space(task, Capabilities((32,), ()), techniques=("prune", "importance"), granularity="layer")
    finetune = replace(space.finetune, steps=arguments.steps, batch_size=arguments.batch)
    space = replace(space, ratios=(arguments.deepest, 0.125), finetune=finetune)
    rows = []
    for seed in arguments.seeds:
        rows.append(compare(task, space, seed, arguments))
        print(json.dumps(rows[-1]), flush=True)
    print("\n| seed | search | " + " | ".join(f"{share:.0%}" for share in MARKS) + " | reached at |")
    print("|---" * (len(MARKS) + 3) + "|")
    for row in rows:
        for kind in ("full", "rungs"):
            found, volumes = row[f"{kind}_reached_at"], row[kind]
            cells = [str(row["seed"]), kind, *(f"{value:.3f}" for value in volumes)]
            print(f"| {' | '.join(cells)} | {'never' if found is None else f'{found:.0%}'} |")


if __name__ == "__main__":
    main()
