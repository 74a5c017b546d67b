"""What the search engine itself costs per trial, beside Ray Tune's OptunaSearch and plain Optuna, in one run.

    python benchmarks/engine_overhead.py
    python benchmarks/engine_overhead.py --trials 200 --sampler random --json overhead.json

The evaluation is synthetic: it makes its two figures up from the parameters, at once, so that what is
timed is proposing, sending, recording and telling. Every engine gets the same sampler with the same seed
and the same two objectives. Starting Ray, its workers and the first trials are not timed.
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
from rich.markup import escape
from rich.table import Table

from autocompress.core.registry import operator
from autocompress.core.types import Candidate, Chooser, Evaluation, Measurement, Method, Plan, Provenance, State, Task
from autocompress.evaluators.objectives import Objective
from autocompress.search.engine import Engine
from autocompress.search.executors import Executor, InlineExecutor, RayExecutor
from autocompress.search.samplers import SAMPLERS, make_sampler
from autocompress.studies.storage import Database, sqlite_url
from autocompress.studies.study import Study

WORKERS = 2
WARM_UP = 6  # trials that every engine does before its clock starts
OBJECTIVES = (Objective("made_up_error", "minimize", ""), Objective("made_up_cost", "minimize", ""))
NAMES = [objective.name for objective in OBJECTIVES]
DIRECTIONS = [objective.direction for objective in OBJECTIVES]
SOURCE = Provenance(Method.SIMULATED, "none", "synthetic", "")
SYNTHETIC = "the evaluation is synthetic and takes no time"
MS, RATIO = "ms a trial", "of Ray Tune"
NO_TUNE = "not installed: pip install 'ray[tune]'"
# By default Ray Tune starts a process for every trial, which drowns the rest: shares are of the faster setting.
REUSING, DEFAULT = "Ray Tune/OptunaSearch, reuse_actors", "Ray Tune/OptunaSearch, defaults"
MOST_PROCESSES = 20  # trials of the slower setting, at seconds a trial


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
    """What every engine is asked to do."""

    parameters: int
    trials: int
    sampler: str
    seed: int
    folder: Path

    @property
    def total(self) -> int:
        """Trials to run, those that are not timed included."""
        return self.trials + WARM_UP

    @property
    def names(self) -> list[str]:
        """The parameters' names; each lies in 0..1."""
        return [f"x{number:02}" for number in range(self.parameters)]

    def new_sampler(self) -> optuna.samplers.BaseSampler:
        """The sampler, from its start."""
        return make_sampler(self.sampler, seed=self.seed, trials=self.trials, constrained=False)

    def choose(self, trial: Chooser) -> list[float]:
        """Ask for the parameters."""
        return [trial.suggest_float(name, 0.0, 1.0) for name in self.names]


class Stamps(list[float]):
    """When each trial was finished and recorded."""

    def add(self, *ignored: Any) -> None:
        """Note the time; serves as a callback."""
        self.append(time.perf_counter())

    def per_trial(self) -> float:
        """Mean seconds a trial, without those of the warm-up."""
        return (self[-1] - self[WARM_UP - 1]) / (len(self) - WARM_UP)


def made_up(values: list[float] | tuple[float, ...]) -> tuple[float, float]:
    """Two figures that conflict (ZDT1, Zitzler et al. 2000); stands in for minutes of training and measuring."""
    rest = 1 + 9 * sum(values[1:]) / max(1, len(values) - 1)
    return values[0], rest * (1 - (values[0] / rest) ** 0.5)


def evaluate(candidate: Candidate) -> Evaluation:
    """The synthetic evaluation."""
    (dials,) = candidate.plan
    assert isinstance(dials, Dials)
    values = zip(NAMES, made_up(dials.values), strict=True)
    found = {name: Measurement(name, value, "", None, 1, SOURCE) for name, value in values}
    return Evaluation(candidate, State.COMPLETE, found)


def time_autocompress(job: Job, executor: Executor) -> float:
    """Seconds a trial of this package's engine, recording into SQLite."""
    stamps = Stamps()

    def space(trial: Chooser) -> Plan:
        return (Dials(tuple(job.choose(trial))),)

    engine = Engine(
        space=space,
        study=Study(job.folder, OBJECTIVES, Database(sqlite_url(job.folder), DIRECTIONS, NAMES)),
        executor=executor,
        sampler=job.new_sampler(),
        trials=job.total,
        on_change=lambda progress, evaluation: stamps.add() if evaluation is not None else None,
    )
    progress = engine.run()
    if progress.failures or progress.trials != job.total:
        raise SystemExit(f"autocompress: {progress}")
    return stamps.per_trial()


def time_inline(job: Job) -> float:
    """Seconds a trial in this process."""
    return time_autocompress(job, InlineExecutor(evaluate))


def time_over_ray(job: Job) -> float:
    """Seconds a trial over Ray actors."""
    return time_autocompress(job, RayExecutor(evaluate, WORKERS))


def time_optuna(job: Job) -> float:
    """Seconds a trial of `Study.optimize` on SQLite, in this process."""
    stamps = Stamps()
    study = optuna.create_study(storage=sqlite_url(job.folder), sampler=job.new_sampler(), directions=DIRECTIONS)
    study.optimize(lambda trial: made_up(job.choose(trial)), n_trials=job.total, callbacks=[stamps.add])
    return stamps.per_trial()


def time_tune(job: Job, reuse: bool) -> float:
    """Seconds a trial of Ray Tune with two trials at once; `reuse` keeps its actors between trials."""
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    stamps = Stamps()

    class Clock(tune.Callback):
        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            stamps.add()

    def trainable(config: dict[str, float]) -> dict[str, float]:
        return dict(zip(NAMES, made_up([config[name] for name in job.names]), strict=True))

    space = {name: optuna.distributions.FloatDistribution(0.0, 1.0) for name in job.names}
    search = OptunaSearch(space=space, metric=NAMES, mode=["min"] * len(NAMES), sampler=job.new_sampler())
    results = tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1}),
        tune_config=tune.TuneConfig(
            search_alg=search, num_samples=job.total, max_concurrent_trials=WORKERS, reuse_actors=reuse
        ),
        run_config=tune.RunConfig(storage_path=str(job.folder), name="tune", verbose=0, callbacks=[Clock()]),
    ).fit()
    if results.num_errors or len(stamps) != job.total:
        raise SystemExit(f"Ray Tune: {results.num_errors} of {len(stamps)} trials failed")
    return stamps.per_trial()


def has_tune() -> bool:
    """Whether Ray Tune can be imported; Ray alone comes without what it needs."""
    try:
        import ray.tune  # noqa: F401
    except ImportError:
        return False
    return True


def benchmark(trials: int, sampler: str, seed: int, show: Callable[[str], None]) -> list[dict[str, Any]]:
    """One row per number of parameters and engine."""
    ways: dict[str, Callable[[Job], float]] = {
        "autocompress, inline": time_inline,
        f"autocompress, Ray, {WORKERS} workers": time_over_ray,
        REUSING: lambda job: time_tune(job, reuse=True),
        DEFAULT: lambda job: time_tune(job, reuse=False),
        "Optuna, SQLite, inline": time_optuna,
    }
    rows: list[dict[str, Any]] = []
    for parameters in (3, 60):
        counts = {name: min(trials, MOST_PROCESSES) if name == DEFAULT else trials for name in ways}
        seconds: dict[str, float] = {}
        for name, measure in ways.items():
            if name.startswith("Ray Tune") and not has_tune():
                continue
            show(f"{parameters} parameters: {name}")
            with tempfile.TemporaryDirectory() as folder:
                seconds[name] = measure(Job(parameters, counts[name], sampler, seed, Path(folder)))
        base = seconds.get(REUSING)
        for name in ways:
            taken = seconds.get(name)
            rows.append(
                {
                    "parameters": parameters,
                    "engine": name,
                    "sampler": sampler,
                    "evaluation": "synthetic",
                    "trials": counts[name],
                    MS: taken * 1e3 if taken is not None else NO_TUNE,
                    RATIO: taken / base if taken is not None and base is not None else "",
                }
            )
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows for people."""
    shown = Table(title=f"Overhead of the search engine, sampler {rows[0]['sampler']}; {SYNTHETIC}")
    columns = [name for name in rows[0] if name not in ("sampler", "evaluation")]
    for name in columns:
        cell = rows[0][name]
        shown.add_column(name, justify="left" if isinstance(cell, str) else "right", overflow="fold")
    for number, row in enumerate(rows):
        new_group = number + 1 < len(rows) and rows[number + 1]["parameters"] != row["parameters"]
        cells = [f"{cell:.2f}" if isinstance(cell, float) else escape(str(cell)) for cell in map(row.get, columns)]
        shown.add_row(*cells, end_section=new_group)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--trials", type=int, default=100, help=f"timed trials of each engine, at most {MOST_PROCESSES} of the slowest"
    )
    parser.add_argument("--sampler", choices=sorted(SAMPLERS), default="nsga2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the rows there")
    arguments = parser.parse_args()
    if arguments.trials < 1:
        parser.error("--trials must be at least 1")

    import ray

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    # Started once, before any clock: the executor and Ray Tune both join it.
    ray.init(
        "local",
        num_cpus=WORKERS,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        _node_ip_address="127.0.0.1",
    )
    console = Console()
    with console.status("") as status:
        rows = benchmark(arguments.trials, arguments.sampler, arguments.seed, status.update)
    ray.shutdown()
    console.print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
