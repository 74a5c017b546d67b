"""Our space and evaluator inside Ray Tune: a trainable, Tune's OptunaSearch over our space, and a space for others."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler

from ..core.codec import check_plan, decode_artifact, decode_measurements, decode_plan, encode_evaluation
from ..core.errors import CandidateError, MissingDependencyError
from ..core.types import Candidate, Evaluation, Space, State
from .adapters import TrialObjective
from .executors import InlineExecutor
from .population import finite_values
from .samplers import make_sampler

if TYPE_CHECKING:
    from ray import tune

PROBES = 200  # random calls of a space, to find all parameters that it may ask for
RESULT = "autocompress"  # key of Tune's result that holds the whole evaluation as JSON


def tune_trainable(objective: TrialObjective, cpus: float = 1.0) -> Any:
    """A trainable for `tune.Tuner` that evaluates a config of the objective's space.

    It reports all figures by name, in SI units, for each constraint "violation/CONSTRAINT" (above 0: violated), and in
    a search for one number its "score". A candidate that fails or lacks an objective raises its reason, so that Tune
    shows the trial as failed.

    Args:
        cpus: of each trial. Timings of one machine never overlap, whatever Tune runs side by side.
    """
    tune = _tune()
    space, evaluate, timeout = objective.space, objective.evaluate, objective.timeout
    folder, names = objective.study.folder, [found.name for found in objective.study.objectives]
    constraints, scalar, base = objective.violation_names, objective.scalar, objective.untouched

    def trainable(config: dict[str, Any]) -> None:
        plan = space(optuna.trial.FixedTrial(config))
        check_plan(plan)
        evaluation = base  # the untouched model is known, and may break limits that would reject it unmeasured
        if plan:
            executor = InlineExecutor(evaluate, timeout)
            executor.submit(Candidate(plan, config))
            (evaluation,) = executor.wait(0)
        figures: dict[str, Any] = {name: m.value for name, m in evaluation.measurements.items()}
        if evaluation.state is State.FAILED or any(name not in figures for name in names):
            raise CandidateError(evaluation.reason)
        if scalar is not None:
            figures["score"] = scalar(evaluation.measurements, base.measurements)
        found = zip(constraints, evaluation.violations, strict=True)
        violations = {f"violation/{name}": violation for name, violation in found if violation is not None}
        whole = json.dumps(encode_evaluation(evaluation, folder))
        tune.report({**figures, **violations, RESULT: whole})

    return tune.with_resources(trainable, {"cpu": cpus})


def tune_search(objective: TrialObjective, sampler: str | BaseSampler = "auto", *, trials: int, seed: int = 0) -> Any:
    """Tune's `OptunaSearch` over the objective's conditional space, for `tune.TuneConfig(search_alg=...)`.

    The space's start points come first. Constraints are passed on to Optuna, and failed trials are told as failed.
    `TuneConfig` must not name metric and mode again.

    Args:
        sampler: one of `--sampler`, or any of Optuna's.
        trials: `num_samples` of the `TuneConfig`.
    """
    _tune()
    from ray import cloudpickle
    from ray.tune.search.optuna import OptunaSearch

    space, names = objective.space, objective.violation_names  # Tune stores the search: it must not hold the folder

    class Search(OptunaSearch):  # type: ignore[misc]
        """Tells Optuna of violations before the trial's values, and can be stored whatever the space is made of."""

        def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
            trial = self._ot_trials[trial_id]
            if result and not error:
                found = {name: result[key] for name in names if (key := f"violation/{name}") in result}
                TrialObjective.tell_violations(trial, found)
            super().on_trial_complete(trial_id, result, error)

        def save(self, checkpoint_path: str) -> None:
            Path(checkpoint_path).write_bytes(cloudpickle.dumps(vars(self)))  # as Tune's own, but for local functions

    def choices(trial: Any) -> None:
        space(trial)

    if isinstance(sampler, str):
        sampler = make_sampler(sampler, seed=seed, trials=trials, constrained=bool(names))
    objectives = objective.study.objectives
    metric: Any = "score" if objective.scalar else [found.name for found in objectives]
    modes = ["max" if direction == "maximize" else "min" for direction in objective.directions]
    return Search(
        space=choices,
        metric=metric,
        mode="max" if objective.scalar else modes,
        points_to_evaluate=objective.starts or None,
        sampler=sampler,
    )


def tune_param_space(space: Space, seed: int = 0) -> dict[str, Any]:
    """The space as Tune's other searchers want it: a fixed set of parameters, for `tune.Tuner(param_space=...)`.

    Conditional parameters are always drawn, and ignored where nothing asks for them. Which there are is found by
    calling the space at random.
    """
    tune = _tune()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    found: dict[str, BaseDistribution] = {}
    for _ in range(PROBES):
        trial = study.ask()
        with suppress(Exception):  # the user's code: some choices may lead to no plan
            space(trial)
        found |= trial.distributions
    return {name: _domain(tune, distribution) for name, distribution in sorted(found.items())}


def record_results(objective: TrialObjective, results: tune.ResultGrid) -> None:
    """Write what Tune found into the objective's run folder; `objective.finish()` then reports the front."""
    folder = objective.study.folder
    for result in (results[number] for number in range(len(results))):
        text = (result.metrics or {}).get(RESULT)
        if text is not None:
            evaluation = _decoded(json.loads(text), result.config or {}, folder)
            objective.record(evaluation, _distributions(objective.space, evaluation.candidate.params))


def _decoded(stored: Mapping[str, Any], params: Mapping[str, Any], folder: Any) -> Evaluation:
    return Evaluation(
        Candidate(decode_plan(stored["plan"]), dict(params)),
        State(stored["state"]),
        decode_measurements(stored["metrics"]),
        stored["reason"],
        tuple(stored["violations"]),
        decode_artifact(stored["artifact"], folder),
        stored["seconds"],
        notes=tuple(stored["notes"]),
    )


def _distributions(space: Space, params: Mapping[str, Any]) -> dict[str, BaseDistribution]:
    trial = optuna.trial.FixedTrial(dict(params))
    space(trial)
    return trial.distributions


def _domain(tune: Any, distribution: Any) -> Any:
    values = finite_values(distribution)
    if isinstance(distribution, CategoricalDistribution):
        return tune.choice(list(distribution.choices))
    if isinstance(distribution, IntDistribution) and distribution.step == 1:
        draw: Callable[..., Any] = tune.lograndint if distribution.log else tune.randint
        return draw(distribution.low, distribution.high + 1)
    if values is not None:
        # Tune's own steps count from 0, not from the lowest value.
        return tune.choice(list(values))
    draw = tune.loguniform if distribution.log else tune.uniform
    return draw(distribution.low, distribution.high)


def _tune() -> Any:
    try:
        from ray import tune
    except ImportError as error:
        raise MissingDependencyError(f"Ray Tune is not here ({error}): pip install 'autocompress[bench]'") from error
    return tune
