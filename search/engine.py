"""The search loop: ask, evaluate, record, tell.

Sampling happens in memory; the database gets whole finished trials. One candidate is evaluated once:
a repeated proposal is answered from the study, and does not count as a trial. With several rungs (see
`rungs.Ladder`) a candidate is trained a little, recorded, and trained further where it is among the best.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, Trial, TrialState

from ..core.codec import check_plan, decode_plan, plan_key
from ..core.errors import InputError
from ..core.types import Candidate, Evaluation, Measurement, Plan, Space, State
from ..studies.claims import piece_of
from ..studies.study import FIDELITY, Study, read_record
from .auto import AutoSampler
from .executors import Executor
from .rungs import Ladder, with_restarts
from .samplers import VIOLATIONS

REPEATS_IN_A_ROW = 200  # proposals without a new candidate after which the space counts as exhausted


@dataclass
class Progress:
    """What happened so far, for whoever shows it.

    Attributes:
        trials: candidates that have a result.
        stopped: those of them that were trained a part of the way, so far.
        steps: optimizer steps, those of earlier runs included.
    """

    trials: int = 0
    failures: int = 0
    infeasible: int = 0
    repeats: int = 0
    stopped: int = 0
    steps: int = 0
    running: int = 0
    ended: str = ""


@dataclass
class _Known:
    """An answered candidate: what a repeat of it is told, and how its parameters are recorded once more."""

    values: list[float] | None
    violations: list[float | None]
    state: State
    fidelity: float
    distributions: Mapping[str, BaseDistribution]


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
        rungs, reduction: see `rungs.Ladder`; with one rung every candidate is trained in full at once.
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
    rungs: int = 1
    reduction: int = 9

    def __post_init__(self) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        directions: list[Any] = self.study.directions if self.score is None else ["maximize"]
        self._memory = optuna.create_study(sampler=self.sampler, directions=directions)
        self._known: dict[str, _Known] = {}
        self._pending: dict[str, list[Trial | None]] = {}
        self._climbing: dict[str, Mapping[str, Any]] = {}
        self._ladder = Ladder(directions, self.rungs, self.reduction)
        self.baselines = {name: with_restarts(plan, self._ladder.shares) for name, plan in self.baselines.items()}
        self._names = {plan_key(plan): name for name, plan in self.baselines.items()}
        self._claims = self.study.claims()
        self._elsewhere: dict[str, list[Trial]] = {}  # proposals that another search in the study evaluates
        stored = self.study.stored()
        self._heard = len(stored)
        for trial in stored:
            self._remember(trial)

    def run(self) -> Progress:
        """Search until the budget is spent; Ctrl-C ends it early, with nothing finished lost."""
        started = time.monotonic()
        asking = self._proposals()
        exhausted = False
        try:
            while True:
                late = self.seconds is not None and time.monotonic() - started > self.seconds
                idle = False
                self._hear()
                while not late and self.executor.room():
                    candidate = self._promoted()
                    if candidate is None and not exhausted and self._wanted() > 0:
                        candidate = next(asking, None)
                        exhausted = candidate is None
                    if candidate is None and not self._running():
                        candidate = self._promoted(last_call=True)
                    idle = candidate is None
                    if candidate is None:
                        break
                    self.executor.submit(candidate)
                # Nothing to do, that is; workers that are yet to come are waited for.
                if not self._running() and (late or idle):
                    if late or exhausted or not self._others_are_at_it():
                        break
                    time.sleep(1)
                for evaluation in self.executor.wait(0.5):
                    self._finish(evaluation)
                self._show(None)
            more = (self._wanted() > 0 and not exhausted) or self._ladder.next(last_call=True) is not None
            self.progress.ended = "time is up" if late and more else "space exhausted" if exhausted else "done"
        except KeyboardInterrupt:
            self.progress.ended = "interrupted"
        finally:
            self.executor.close()
            if self._claims is not None:
                self._claims.close()
        return self.progress

    def record(self, evaluation: Evaluation, params: Mapping[str, BaseDistribution] | None = None) -> Evaluation:
        """Write a finished evaluation into the database and remember it; returns it as it was recorded."""
        evaluation = self._checked(evaluation)
        evaluation = dataclasses.replace(evaluation, baseline=self._names.get(evaluation.candidate.key, ""))
        self.study.write(evaluation, params)
        values = self._scored(self.study.known_values(evaluation), evaluation.measurements)
        candidate = evaluation.candidate
        known = _Known(values, list(evaluation.violations), evaluation.state, candidate.fidelity, params or {})
        self._learn(candidate.key, known, candidate)
        self.progress.steps += evaluation.steps
        return evaluation

    def _learn(self, key: str, known: _Known, candidate: Candidate | None) -> None:
        """Remember and count a candidate's latest result; the candidate itself is needed where it has stopped."""
        before = self._known.get(key)
        self._known[key] = known
        if before is not None:
            self.progress.trials -= 1
            self.progress.stopped -= before.state is State.STOPPED
        self._count(known.state)
        if known.state is State.STOPPED and known.values is not None and candidate is not None:
            self._ladder.add(candidate, known.values, _found(known))
        else:
            self._ladder.leave(key)

    def _promoted(self, last_call: bool = False) -> Candidate | None:
        """The candidate that has earned more training, if any."""
        gains = self._gains if isinstance(self.sampler, AutoSampler) else None
        candidate = self._ladder.next(last_call, gains)
        while candidate is not None and not self._claim(candidate):
            candidate = self._ladder.next(last_call, gains)
        if candidate is not None:
            self._climbing[candidate.key] = candidate.params
        return candidate

    def _gains(self, candidates: Sequence[Candidate]) -> np.ndarray | None:
        """What the sampler expects of training these in full."""
        assert isinstance(self.sampler, AutoSampler)
        params = [candidate.params for candidate in candidates]
        return self.sampler.gains(self._memory, params, [p for p in self._climbing.values() if p])

    def _proposals(self) -> Any:
        """Yield candidates that are neither known nor running; ends where only repeats come."""
        for plan in self.baselines.values():
            if plan_key(plan) not in self._known and not self._is_start(plan) and self._claim(Candidate(plan)):
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
                plan = with_restarts(plan, self._ladder.shares)
            except Exception as error:  # the space is the user's code: a failing one is a failed trial
                self._record_broken(trial, error)
                in_a_row += 1
                if self._wanted() <= 0:
                    return
                continue
            candidate = Candidate(plan, dict(trial.params))
            if candidate.key not in self._names:  # baselines are trained in full at once: fronts are measured by them
                candidate = dataclasses.replace(candidate, fidelity=self._ladder.lowest)
            if candidate.key in self._known:
                self._tell(trial, self._known[candidate.key])
                self.progress.repeats += 1
                in_a_row += 1
            elif candidate.key in self._pending:
                self._pending[candidate.key].append(trial)
                self.progress.repeats += 1
                in_a_row += 1
            elif not self._claim(candidate):
                if candidate.key in self._known:  # by now
                    self._tell(trial, self._known[candidate.key])
                else:
                    self._elsewhere.setdefault(candidate.key, []).append(trial)
                self.progress.repeats += 1
                in_a_row += 1
            else:
                in_a_row = 0
                self._pending[candidate.key] = [*self._elsewhere.pop(candidate.key, []), trial]
                yield candidate

    def _is_start(self, plan: Plan) -> bool:
        """Whether the space's own start points lead to this plan (its trial then has parameters)."""
        for params in getattr(self.space, "starts", []):
            start = with_restarts(self.space(optuna.trial.FixedTrial(params)), self._ladder.shares)
            if plan_key(start) == plan_key(plan):
                return True
        return False

    def _finish(self, evaluation: Evaluation) -> None:
        key = evaluation.candidate.key
        if key in self._climbing:
            del self._climbing[key]
            distributions = self._known[key].distributions
            evaluation = self.record(evaluation, distributions)
            self._add(evaluation.candidate.params, self._known[key])
        else:
            trials = self._pending.pop(key)
            first = trials[0]
            evaluation = self.record(evaluation, first.distributions if first else None)
            for trial in trials:
                if trial is not None:
                    self._tell(trial, self._known[key])
        if self._claims is not None:
            self._claims.drop(piece_of(evaluation.candidate))
        self._show(evaluation)

    def _claim(self, candidate: Candidate) -> bool:
        """Whether the candidate is this search's to evaluate; always, where no other writes into the study."""
        if self._claims is None:
            return True
        if not self._claims.take(piece_of(candidate)):
            return False
        self._hear()  # it may have been recorded, and then given free, since the last time
        known = self._known.get(candidate.key)
        if known is None or known.fidelity < candidate.fidelity:
            return True
        self._claims.drop(piece_of(candidate))
        return False

    def _others_are_at_it(self) -> bool:
        """Whether the rest of the budget is being evaluated by other searches, one of which may yet be killed."""
        return self._claims is not None and self.progress.trials < self.trials and self._claims.elsewhere() > 0

    def _hear(self) -> None:
        """Take in what other searches have found in the study meanwhile."""
        if self._claims is None:
            return
        self._claims.beat()
        stored = self.study.stored()
        for trial in stored[self._heard :]:
            entry = trial.user_attrs.get("evaluation", {})
            known = self._known.get(entry.get("key", ""))
            if known is None or known.fidelity < entry.get("fidelity", 1.0):
                self._remember(trial)
                for waiting in self._elsewhere.pop(entry["key"], []):
                    self._tell(waiting, self._known[entry["key"]])
        self._heard = len(stored)

    def _record_broken(self, trial: Trial, error: Exception) -> None:
        from ..evaluators.pipeline import describe_error

        reason = f"the space failed: {describe_error(error)}"
        self._memory.tell(trial, state=TrialState.FAIL)
        self.study.write_broken(trial.params, trial.distributions, reason)
        self._count(State.FAILED)
        self._show(None)

    def _tell(self, trial: Trial, known: _Known) -> None:
        for name, value in _attributes(known).items():
            trial.set_user_attr(name, value)
        if known.values is None:
            self._memory.tell(trial, state=TrialState.FAIL)
        else:
            self._memory.tell(trial, known.values)

    def _remember(self, trial: FrozenTrial) -> None:
        """Take a trial of an earlier run into account."""
        stored = trial.user_attrs.get("evaluation")
        if stored is None:
            raise InputError("the study holds trials that autocompress did not write; use another study name or folder")
        record = read_record(trial, self.study.folder)
        stopped = record.state is State.STOPPED
        values = self._scored(self.study.values(record.metrics) if stopped else trial.values, record.metrics)
        known = _Known(values, list(record.violations), record.state, record.fidelity, trial.distributions)
        candidate = Candidate(decode_plan(record.plan), trial.params, record.fidelity) if stopped else None
        self._learn(record.key, known, candidate)
        self.progress.steps += record.steps or 0
        self._add(trial.params, known)

    def _add(self, params: Mapping[str, Any], known: _Known) -> None:
        """Let the sampler know of a result that it does not wait for."""
        if not params or known.values is None:
            return
        self._memory.add_trial(
            optuna.trial.create_trial(
                state=TrialState.COMPLETE,
                values=known.values,
                params=dict(params),
                distributions=dict(known.distributions),
                user_attrs=_attributes(known),
                system_attrs={"constraints": _found(known)} if _found(known) else {},
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
        if not missing or evaluation.state not in (State.COMPLETE, State.STOPPED):
            return dataclasses.replace(evaluation, measurements=kept)
        reason = (
            f"{missing} is {bad[missing]}, not a finite number" if missing in bad else f"{missing} was not measured"
        )
        return dataclasses.replace(evaluation, measurements=kept, state=State.FAILED, reason=reason)

    def _running(self) -> int:
        return len(self._pending) + len(self._climbing)

    def _wanted(self) -> int:
        elsewhere = self._claims.elsewhere() if self._claims is not None else 0
        return self.trials - self.progress.trials - len(self._pending) - elsewhere

    def _count(self, state: State) -> None:
        self.progress.trials += 1
        self.progress.failures += state is State.FAILED
        self.progress.infeasible += state is State.INFEASIBLE
        self.progress.stopped += state is State.STOPPED

    def _show(self, evaluation: Evaluation | None) -> None:
        self.progress.running = self._running()
        self.on_change(self.progress, evaluation)


def _found(known: _Known) -> list[float]:
    """The violations that are known."""
    return [violation for violation in known.violations if violation is not None]


def _attributes(known: _Known) -> dict[str, Any]:
    """What samplers read of a result beside its values."""
    found: dict[str, Any] = {VIOLATIONS: known.violations}
    return found | ({FIDELITY: known.fidelity} if known.fidelity < 1 else {})
