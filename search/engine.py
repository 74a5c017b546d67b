"""The search loop: ask, evaluate, record, tell.

Sampling happens in memory; the database gets whole finished trials. One candidate is evaluated once:
a repeated proposal is answered from the study, and does not count as a trial.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, Trial, TrialState

from ..core.codec import check_plan, decode_measurements, plan_key
from ..core.errors import InputError
from ..core.types import Candidate, Evaluation, Measurement, Plan, Space, State
from ..studies.study import Study
from .executors import Executor
from .samplers import VIOLATIONS

REPEATS_IN_A_ROW = 200  # proposals without a new candidate after which the space counts as exhausted


@dataclass
class Progress:
    """What happened so far, for whoever shows it."""

    trials: int = 0
    failures: int = 0
    infeasible: int = 0
    repeats: int = 0
    running: int = 0
    ended: str = ""


@dataclass
class _Known:
    """An answered candidate: what a repeat of it is told."""

    values: list[float] | None
    violations: list[float]


@dataclass
class Engine:
    """One search, or its continuation.

    Attributes:
        study: where results are recorded; its trials count as done.
        space: a function of the trial that returns a plan; a `starts` attribute (list of parameters) is
            proposed first.
        baselines: plans to mark as baselines, by name.
        score: one number to maximise instead of the study's objectives; None where a figure is unknown.
        trials: recorded trials to end with, those of earlier runs included.
        seconds: wall-clock budget of this run; None for no limit.
        on_change: called after every recorded trial, and about twice a second.
    """

    space: Space
    study: Study
    executor: Executor
    sampler: BaseSampler
    trials: int
    seconds: float | None = None
    baselines: Mapping[str, Plan] = field(default_factory=dict)
    score: Callable[[Mapping[str, Measurement]], float | None] | None = None
    on_change: Callable[[Progress, Evaluation | None], None] = lambda progress, evaluation: None
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        directions: list[Any] = self.study.directions if self.score is None else ["maximize"]
        self._memory = optuna.create_study(sampler=self.sampler, directions=directions)
        self._known: dict[str, _Known] = {}
        self._pending: dict[str, list[Trial | None]] = {}
        self._names = {plan_key(plan): name for name, plan in self.baselines.items()}
        for trial in self.study.stored():
            self._remember(trial)

    def run(self) -> Progress:
        """Search until the budget is spent; Ctrl-C ends it early, with nothing finished lost."""
        started = time.monotonic()
        asking = self._proposals()
        exhausted = False
        try:
            while True:
                late = self.seconds is not None and time.monotonic() - started > self.seconds
                while not (late or exhausted) and self.executor.room() and self._wanted() > 0:
                    candidate = next(asking, None)
                    exhausted = candidate is None
                    if candidate is not None:
                        self.executor.submit(candidate)
                if not self._pending:
                    break
                for evaluation in self.executor.wait(0.5):
                    self._finish(evaluation)
                self._show(None)
            self.progress.ended = (
                "space exhausted" if exhausted else "time is up" if late and self._wanted() else "done"
            )
        except KeyboardInterrupt:
            self.progress.ended = "interrupted"
        finally:
            self.executor.close()
        return self.progress

    def record(self, evaluation: Evaluation, params: Mapping[str, BaseDistribution] | None = None) -> Evaluation:
        """Write a finished evaluation into the database and remember it; returns it as it was recorded."""
        evaluation = self._checked(evaluation)
        evaluation = dataclasses.replace(evaluation, baseline=self._names.get(evaluation.candidate.key, ""))
        self.study.write(evaluation, params)
        violations = [v for v in evaluation.violations if v is not None]
        values = self._scored(self.study.known_values(evaluation), evaluation.measurements)
        self._known[evaluation.candidate.key] = _Known(values, violations)
        self._count(evaluation.state)
        return evaluation

    def _proposals(self) -> Any:
        """Yield candidates that are neither known nor running; ends where only repeats come."""
        for plan in self.baselines.values():
            if plan_key(plan) not in self._known and not self._is_start(plan):
                self._pending[plan_key(plan)] = [None]
                yield Candidate(plan)
        for params in getattr(self.space, "starts", []):
            self._memory.enqueue_trial(params)
        in_a_row = 0
        while in_a_row < REPEATS_IN_A_ROW:
            trial = self._memory.ask()
            try:
                plan = self.space(trial)
                check_plan(plan)
            except Exception as error:  # the space is the user's code: a failing one is a failed trial
                self._record_broken(trial, error)
                in_a_row += 1
                if self._wanted() <= 0:
                    return
                continue
            candidate = Candidate(plan, dict(trial.params))
            if candidate.key in self._known:
                self._tell(trial, self._known[candidate.key])
                self.progress.repeats += 1
                in_a_row += 1
            elif candidate.key in self._pending:
                self._pending[candidate.key].append(trial)
                self.progress.repeats += 1
                in_a_row += 1
            else:
                in_a_row = 0
                self._pending[candidate.key] = [trial]
                yield candidate

    def _is_start(self, plan: Plan) -> bool:
        """Whether the space's own start points lead to this plan (its trial then has parameters)."""
        for params in getattr(self.space, "starts", []):
            if plan_key(self.space(optuna.trial.FixedTrial(params))) == plan_key(plan):
                return True
        return False

    def _finish(self, evaluation: Evaluation) -> None:
        trials = self._pending.pop(evaluation.candidate.key)
        first = trials[0]
        evaluation = self.record(evaluation, first.distributions if first else None)
        for trial in trials:
            if trial is not None:
                self._tell(trial, self._known[evaluation.candidate.key])
        self._show(evaluation)

    def _record_broken(self, trial: Trial, error: Exception) -> None:
        from ..evaluators.pipeline import describe_error

        reason = f"the space failed: {describe_error(error)}"
        self._memory.tell(trial, state=TrialState.FAIL)
        self.study.write_broken(trial.params, trial.distributions, reason)
        self._count(State.FAILED)
        self._show(None)

    def _tell(self, trial: Trial, known: _Known) -> None:
        trial.set_user_attr(VIOLATIONS, known.violations)
        if known.values is None:
            self._memory.tell(trial, state=TrialState.FAIL)
        else:
            self._memory.tell(trial, known.values)

    def _remember(self, trial: FrozenTrial) -> None:
        """Take a trial of an earlier run into account."""
        stored = trial.user_attrs.get("evaluation")
        if stored is None:
            raise InputError("the study holds trials that autocompress did not write; use another study name or folder")
        violations = [v for v in stored["violations"] if v is not None]
        values = self._scored(trial.values, decode_measurements(stored["metrics"]))
        self._known[stored["key"]] = _Known(values, violations)
        self._count(State(stored["state"]))
        if trial.params and values is not None:
            self._memory.add_trial(
                optuna.trial.create_trial(
                    state=trial.state,
                    values=values,
                    params=trial.params,
                    distributions=trial.distributions,
                    user_attrs={VIOLATIONS: violations},
                    system_attrs={"constraints": violations} if violations else {},
                )
            )

    def _scored(self, values: list[float] | None, metrics: Mapping[str, Measurement]) -> list[float] | None:
        """What the sampler is told of a trial's values; None for a failure."""
        if self.score is None or values is None:
            return values
        score = self.score(metrics)
        return None if score is None else [score]

    def _checked(self, evaluation: Evaluation) -> Evaluation:
        """The evaluation without figures that are no numbers; a failure where an objective is missing then."""
        bad = {name: m.value for name, m in evaluation.measurements.items() if not math.isfinite(m.value)}
        kept = {name: m for name, m in evaluation.measurements.items() if name not in bad}
        missing = next((objective.name for objective in self.study.objectives if objective.name not in kept), "")
        if not missing or evaluation.state is not State.COMPLETE:
            return dataclasses.replace(evaluation, measurements=kept)
        reason = (
            f"{missing} is {bad[missing]}, not a finite number" if missing in bad else f"{missing} was not measured"
        )
        return dataclasses.replace(evaluation, measurements=kept, state=State.FAILED, reason=reason)

    def _wanted(self) -> int:
        return self.trials - self.progress.trials - len(self._pending)

    def _count(self, state: State) -> None:
        self.progress.trials += 1
        self.progress.failures += state is State.FAILED
        self.progress.infeasible += state is State.INFEASIBLE

    def _show(self, evaluation: Evaluation | None) -> None:
        self.progress.running = len(self._pending)
        self.on_change(self.progress, evaluation)
