"""How busy the search engine keeps 1, 2, 8 and 32 workers, beside Ray Tune's OptunaSearch, in one run.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --workers 2 8 --seconds 1 --json scaling.json

An evaluation sleeps for a set time and makes its two figures up from three parameters, so that two cores do for many
workers, and what is lost is lost by proposing, sending, recording and telling. Both engines get the same sampler with
the same seed. Time counts while all workers have work: from when as many trials are done as there are workers, to when
as many are still to come. Ray Tune keeps its actors from one trial to the next (`reuse_actors`); by default it starts
a process for each trial.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before Ray is imported: no usage reports, no progress tables, no notes on settings that nobody chose here.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")

import optuna
from rich.console import Console
from rich.table import Table

from autocompress.core.registry import operator
from autocompress.core.types import Candidate, Chooser, Evaluation, Measurement, Method, Plan, Provenance, State, Task
from autocompress.evaluators.objectives import Objective
from autocompress.search.engine import Engine
from autocompress.search.executors import RayExecutor
from autocompress.search.samplers import make_sampler
from autocompress.studies.storage import Database, sqlite_url
from autocompress.studies.study import Study

ROUNDS, LEAST = 8, 20  # trials for each worker, and at least
OBJECTIVES = (Objective("made_up_error", "minimize", ""), Objective("made_up_cost", "minimize", ""))
NAMES = [objective.name for objective in OBJECTIVES]
DIRECTIONS = [objective.direction for objective in OBJECTIVES]
PARAMETERS = ("x0", "x1", "x2")
SOURCE = Provenance(Method.SIMULATED, "none", "synthetic", "")
OURS, TUNE = "autocompress", "Ray Tune/OptunaSearch, reuse_actors"


@operator
@dataclass(frozen=True)
class Dials:
    """Changes nothing; carries the parameters' values."""

    values: tuple[float, ...]

    rank = 10
    retrains = False

    def __call__(self, model: Any, task: Task) -> Any:
        return model


@dataclass(frozen=True)
class Job:
    """What each engine is asked to do."""

    workers: int
    seconds: float
    sampler: str
    seed: int
    folder: Path

    @property
    def trials(self) -> int:
        """How many, those at the beginning and the end that do not count included."""
        return max(LEAST, ROUNDS * self.workers)

    def new_sampler(self) -> optuna.samplers.BaseSampler:
        """The sampler, from its start."""
        return make_sampler(self.sampler, seed=self.seed, trials=self.trials, constrained=False)

    def per_trial(self, stamps: list[float]) -> float:
        """Seconds from one finished trial to the next while all workers have work."""
        first, last = self.workers - 1, len(stamps) - self.workers
        return (stamps[last] - stamps[first]) / (last - first)


@dataclass(frozen=True)
class Sleeps:
    """The synthetic evaluation."""

    seconds: float

    def __call__(self, candidate: Candidate) -> Evaluation:
        (dials,) = candidate.plan
        found = {
            name: Measurement(name, value, "", None, 1, SOURCE)
            for name, value in zip(NAMES, self.figures(getattr(dials, "values", ())), strict=True)
        }
        return Evaluation(candidate, State.COMPLETE, found)

    def figures(self, values: tuple[float, ...]) -> tuple[float, float]:
        """Two figures that conflict (ZDT1, Zitzler et al. 2000), after the time that an evaluation takes."""
        time.sleep(self.seconds)
        rest = 1 + 9 * sum(values[1:]) / (len(values) - 1)
        return values[0], rest * (1 - (values[0] / rest) ** 0.5)


def time_ours(job: Job) -> float:
    """Seconds from one trial to the next of this package's engine, recording into SQLite."""
    stamps: list[float] = []

    def space(trial: Chooser) -> Plan:
        return (Dials(tuple(trial.suggest_float(name, 0.0, 1.0) for name in PARAMETERS)),)

    def on_change(progress: Any, evaluation: Evaluation | None) -> None:
        if evaluation is not None:
            stamps.append(time.perf_counter())

    engine = Engine(
        space=space,
        study=Study(job.folder, OBJECTIVES, Database(sqlite_url(job.folder), DIRECTIONS, NAMES)),
        executor=RayExecutor(Sleeps(job.seconds), job.workers),
        sampler=job.new_sampler(),
        trials=job.trials,
        on_change=on_change,
    )
    progress = engine.run()
    if progress.failures or len(stamps) != job.trials:
        raise SystemExit(f"autocompress: {progress}")
    return job.per_trial(stamps)


def time_tune(job: Job) -> float:
    """Seconds from one trial to the next of Ray Tune."""
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    stamps: list[float] = []
    evaluate = Sleeps(job.seconds)

    class Clock(tune.Callback):
        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            stamps.append(time.perf_counter())

    def trainable(config: dict[str, float]) -> dict[str, float]:
        return dict(zip(NAMES, evaluate.figures(tuple(config[name] for name in PARAMETERS)), strict=True))

    space = {name: optuna.distributions.FloatDistribution(0.0, 1.0) for name in PARAMETERS}
    search = OptunaSearch(space=space, metric=NAMES, mode=["min"] * len(NAMES), sampler=job.new_sampler())
    results = tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1}),
        tune_config=tune.TuneConfig(
            search_alg=search, num_samples=job.trials, max_concurrent_trials=job.workers, reuse_actors=True
        ),
        run_config=tune.RunConfig(storage_path=str(job.folder), name="tune", verbose=0, callbacks=[Clock()]),
    ).fit()
    if results.num_errors or len(stamps) != job.trials:
        raise SystemExit(f"Ray Tune: {results.num_errors} of {len(stamps)} trials failed")
    return job.per_trial(stamps)


def has_tune() -> bool:
    """Whether Ray Tune can be imported; Ray alone comes without what it needs."""
    try:
        import ray.tune  # noqa: F401
    except ImportError:
        return False
    return True


def table(rows: list[dict[str, Any]], title: str) -> Table:
    """The rows for people."""
    shown = Table(title=title)
    for name in rows[0]:
        shown.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right", overflow="fold")
    for number, row in enumerate(rows):
        cells = [f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row.values()]
        last = number + 1 < len(rows) and rows[number + 1]["workers"] != row["workers"]
        shown.add_row(*cells, end_section=last)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 8, 32])
    parser.add_argument("--seconds", type=float, default=0.5, help="that one evaluation takes")
    parser.add_argument("--sampler", default="nsga2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the rows there")
    arguments = parser.parse_args()
    if min(arguments.workers) < 1 or arguments.seconds <= 0:
        parser.error("expected at least one worker, and more than 0 seconds")

    import ray

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    # Started once, before any clock: the executor and Ray Tune both join it.
    address = {"_node_ip_address": "127.0.0.1"}
    settings = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR", **address}
    ray.init("local", num_cpus=max(arguments.workers), **settings)
    ways: dict[str, Callable[[Job], float]] = {OURS: time_ours}
    if has_tune():
        ways[TUNE] = time_tune
    console, rows = Console(), []
    with console.status("") as status:
        for workers in arguments.workers:
            for name, measure in ways.items():
                status.update(f"{workers} workers: {name}")
                with tempfile.TemporaryDirectory() as folder:
                    job = Job(workers, arguments.seconds, arguments.sampler, arguments.seed, Path(folder))
                    taken = measure(job)
                rows.append(
                    {
                        "workers": workers,
                        "engine": name,
                        "trials": job.trials,
                        "trials a second": 1 / taken,
                        "busy": job.seconds / (taken * workers),
                        "lost a trial, ms": (taken * workers - job.seconds) * 1e3,
                    }
                )
    ray.shutdown()
    cores = len(os.sched_getaffinity(0))
    console.print(table(rows, f"Evaluations of {arguments.seconds:g} s, sampler {arguments.sampler}, {cores} cores"))
    if not has_tune():
        console.print("Ray Tune is not installed: pip install 'autocompress[bench]'")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
