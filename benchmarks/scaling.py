"""How busy the search engine keeps 1, 4, 16 and 64 workers, beside Ray Tune's OptunaSearch, in one run.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --workers 2 8 --seconds 0.5 --json scaling.json

An evaluation sleeps for a set time and makes its two figures up from three parameters, so that two cores do for many
workers, and what is lost is lost by proposing, sending, recording and telling. Both engines get the same sampler with
the same seed. Time counts while all workers have work: from when all have started and as many trials are done as there
are workers, to when as many are still to come. The driver's share is its processor time in this while: 100 % is one
core. Ray Tune keeps its actors from one trial to the next (`reuse_actors`); by default it starts
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
from dataclasses import dataclass, field
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
from autocompress.search.engine import Engine, Progress
from autocompress.search.executors import Executor, RayExecutor
from autocompress.search.samplers import make_sampler
from autocompress.studies.storage import Database, sqlite_url
from autocompress.studies.study import Study

ROUNDS, LEAST = 12, 20  # trials for each worker, and at least
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


@dataclass
class Clock:
    """Takes the time of a search.

    Attributes:
        done: of each finished trial, the time and the driver's processor time by then.
        waited: how many were done when all workers had started.
    """

    workers: int
    started: float = field(default_factory=time.perf_counter)
    done: list[tuple[float, float]] = field(default_factory=list)
    waited: int | None = None
    start_up: float | None = None

    def running(self, count: int) -> None:
        """So many workers have work now."""
        if self.waited is None and count >= self.workers:
            self.waited, self.start_up = len(self.done), time.perf_counter() - self.started

    def finish(self) -> None:
        """A trial is done."""
        self.done.append((time.perf_counter(), time.process_time()))

    def row(self, seconds: float) -> dict[str, float | None]:
        """What was seen while all workers had work; their start-up counts where they never did."""
        first, last = (self.waited or 0) + self.workers - 1, len(self.done) - self.workers
        if last <= first:
            first = self.workers - 1
        trials = last - first
        wall, processor = (late - early for early, late in zip(self.done[first], self.done[last], strict=True))
        lost = wall / trials * self.workers - seconds
        return {
            "start-up, s": self.start_up,
            "trials a second": trials / wall,
            "busy": seconds * trials / (wall * self.workers),
            "lost a trial, ms": lost * 1e3,
            "driver's share": processor / wall,
            "driver a trial, ms": processor / trials * 1e3,
        }


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


@dataclass
class Watched:
    """An executor that says how many candidates its workers have."""

    executor: Executor
    clock: Clock
    running: int = 0

    def room(self) -> bool:
        return self.executor.room()

    def submit(self, candidate: Candidate) -> None:
        self.executor.submit(candidate)
        self.running += 1
        self.clock.running(self.running)

    def wait(self, seconds: float) -> list[Evaluation]:
        done = self.executor.wait(seconds)
        self.running -= len(done)
        return done

    def close(self) -> None:
        self.executor.close()


def time_ours(job: Job) -> Clock:
    """This package's engine, recording into SQLite."""
    clock = Clock(job.workers)

    def space(trial: Chooser) -> Plan:
        return (Dials(tuple(trial.suggest_float(name, 0.0, 1.0) for name in PARAMETERS)),)

    def on_change(progress: Progress, evaluation: Evaluation | None) -> None:
        if evaluation is not None:
            clock.finish()

    engine = Engine(
        space=space,
        study=Study(job.folder, OBJECTIVES, Database(sqlite_url(job.folder), DIRECTIONS, NAMES)),
        executor=Watched(RayExecutor(Sleeps(job.seconds), job.workers), clock),
        sampler=job.new_sampler(),
        trials=job.trials,
        on_change=on_change,
    )
    progress = engine.run()
    if progress.failures or len(clock.done) != job.trials:
        raise SystemExit(f"autocompress: {progress}")
    return clock


def time_tune(job: Job) -> Clock:
    """Ray Tune."""
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    clock, evaluate, running = Clock(job.workers), Sleeps(job.seconds), set[str]()

    class Watch(tune.Callback):
        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            running.add(trial.trial_id)
            clock.running(len(running))

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            running.discard(trial.trial_id)
            clock.finish()

    def trainable(config: dict[str, float]) -> dict[str, float]:
        return dict(zip(NAMES, evaluate.figures(tuple(config[name] for name in PARAMETERS)), strict=True))

    space = {name: optuna.distributions.FloatDistribution(0.0, 1.0) for name in PARAMETERS}
    search = OptunaSearch(space=space, metric=NAMES, mode=["min"] * len(NAMES), sampler=job.new_sampler())
    results = tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1}),
        tune_config=tune.TuneConfig(
            search_alg=search, num_samples=job.trials, max_concurrent_trials=job.workers, reuse_actors=True
        ),
        run_config=tune.RunConfig(storage_path=str(job.folder), name="tune", verbose=0, callbacks=[Watch()]),
    ).fit()
    if results.num_errors or len(clock.done) != job.trials:
        raise SystemExit(f"Ray Tune: {results.num_errors} of {len(clock.done)} trials failed")
    return clock


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
        cells = [
            f"{cell:.3g}" if isinstance(cell, float) else "never" if cell is None else str(cell)
            for cell in row.values()
        ]
        last = number + 1 < len(rows) and rows[number + 1]["workers"] != row["workers"]
        shown.add_row(*cells, end_section=last)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--seconds", type=float, default=1.0, help="that one evaluation takes")
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
    ways: dict[str, Callable[[Job], Clock]] = {OURS: time_ours}
    if has_tune():
        ways[TUNE] = time_tune
    console, rows = Console(), []
    with console.status("") as status:
        for workers in arguments.workers:
            for name, measure in ways.items():
                status.update(f"{workers} workers: {name}")
                with tempfile.TemporaryDirectory() as folder:
                    job = Job(workers, arguments.seconds, arguments.sampler, arguments.seed, Path(folder))
                    found = measure(job).row(arguments.seconds)
                rows.append({"workers": workers, "engine": name, "trials": job.trials, **found})
    ray.shutdown()
    cores = len(os.sched_getaffinity(0))
    console.print(table(rows, f"Evaluations of {arguments.seconds:g} s, sampler {arguments.sampler}, {cores} cores"))
    if not has_tune():
        console.print("Ray Tune is not installed: pip install 'autocompress[bench]'")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
