"""The default sampler: Gaussian processes and expected hypervolume improvement over a pool of unseen candidates."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState
from threadpoolctl import ThreadpoolController

from .belief import Belief, Known, Observations, Prior
from .encoding import Activity, Column, Encoding, row_keys
from .population import VIOLATIONS

FIDELITY = "fidelity"

START = 20  # spread candidates before the first model
FAR, NEAR = 400, 400  # random candidates, and variations of the front's, that a proposal is chosen from
CLIMBS, SUMMITS = 2, 5  # then the best ones' neighbours, and theirs
TRIES = 50  # of the best candidates, in case the space makes something seen of them
LEAST_FULL = 2  # fully trained candidates from which on models say who is trained further
LARGE = 2000  # trials from which models cost more than they bring: variations of the front follow
EXPLORE, EXPLORE_SECONDS = 200, 5.0  # calls of the space, to know its parameters before the first trial


class AutoSampler(BaseSampler):
    """Proposes the unseen candidate that is expected to add most hypervolume to the Pareto front.

    A Gaussian process for each objective over all parameters, whether categorical, ordinal, continuous or conditional;
    of positive objectives that span a factor of two or more, over their logarithms. The expected improvement is exact
    for any number of objectives (see `improvement.expected_improvement`), times the probability that constraints hold
    and that the candidate does not fail. Running trials count as if they had come out as expected, so that parallel
    workers spread. No candidate is proposed twice while the space has others.

    Works in any Optuna study, with its constraints (`trial.set_constraint`). Trials may carry user attributes:
    "violations" (a number for each constraint, > 0 where violated, None unknown) in place of these, and "fidelity"
    (share of the full training, in (0, 1]; absent for 1), which is an input of the models; proposals are for full
    fidelity.

    Args:
        seed: of all random choices.
        space: a function of the trial; called some hundred times beforehand, it tells all its parameters and
            when they are active. Without it they are learned from the trials.
        known: by objective number, functions that give its values for many candidates' parameters at once, where
            these are cheap to compute; no model is made of them.
        start: trials that are spread over the space before the models take over.
        prior: what earlier studies found, see `belief.Prior`.
    """

    def __init__(
        self,
        seed: int | None = None,
        *,
        space: Callable[[Any], Any] | None = None,
        known: Mapping[int, Known] | None = None,
        start: int = START,
        prior: Sequence[Prior] = (),
    ) -> None:
        self._rng = np.random.default_rng(seed)
        self.space, self._start = space, start
        self._encoding = Encoding()
        self._explored: list[Mapping[str, Any]] = []
        self._rows: dict[int, np.ndarray] = {}
        self._activity: tuple[int, Activity] | None = None
        self._belief = Belief(known or {}, tuple(prior), self._rng)

    def learn_from(self, prior: Sequence[Prior]) -> None:
        """Take further earlier studies into account."""
        self._belief.priors += tuple(prior)

    def reseed_rng(self) -> None:
        """Draw other random numbers from here on."""
        self._rng = np.random.default_rng()
        self._belief.rng = self._rng

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Every parameter that the space or a trial has shown."""
        if self.space is not None and not self._explored:
            self._explore(self.space)
        for other in study.get_trials(deepcopy=False):
            self._learn(other.distributions)
        return {column.name: column.distribution for column in self._encoding.columns}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The proposal; parameters that turn out to be inactive in it are left out."""
        if not search_space:
            return {}
        with _threads().limit(limits=1):  # matrices are small, and the cores belong to the candidates
            return self._sample(study, [t for t in study.get_trials(deepcopy=False) if t.number != trial.number])

    def _sample(self, study: Study, trials: Sequence[FrozenTrial]) -> dict[str, Any]:
        trials = [t for t in trials if t.params]
        seen = {key for t in trials for key in row_keys(self._row(t)[None, :])}
        seen_rows = self._matrix(trials)
        activity = self._active(seen_rows)
        observed = [t for t in trials if t.state in (TrialState.COMPLETE, TrialState.FAIL)]
        complete = sum(t.state is TrialState.COMPLETE for t in trials)
        if len(trials) >= LARGE:
            row = self._variation(study, trials, activity, seen)
        elif complete < 4 or (len(trials) < self._start and not self._belief.informed):
            row = self._first(study, seen_rows, activity, seen)
        else:
            row = self._propose(self._observations(study, observed, trials), activity, seen)
        return self._encoding.params(row)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A random value, for parameters that no trial has shown yet."""
        column = Column.of(param_name, param_distribution)
        return column.decode(column.draw(1, self._rng)[0])

    def gains(
        self, study: Study, candidates: Sequence[Mapping[str, Any]], running: Sequence[Mapping[str, Any]] = ()
    ) -> np.ndarray | None:
        """What full training of candidates that were trained a part of the way is expected to add to the front.

        Args:
            candidates: their parameters, (n,).
            running: those of candidates that are being trained on.

        Returns:
            (n,) hypervolumes; None while too few were trained in full.
        """
        trials = [t for t in study.get_trials(deepcopy=False) if t.params]
        for trial in trials:
            self._learn(trial.distributions)
        observed = [t for t in trials if t.state in (TrialState.COMPLETE, TrialState.FAIL)]
        found = self._observations(study, observed, [])
        if np.sum(found.complete & (found.fidelity >= 1.0)) < LEAST_FULL:
            return None
        rows = [self._encoding.row(params) for params in running]
        found = dataclasses.replace(found, running=np.array(rows).reshape(len(rows), len(self._encoding.columns)))
        with _threads().limit(limits=1):
            worth = self._belief.learn(found, guess=False)
            return worth(np.array([self._encoding.row(params) for params in candidates]))

    def _explore(self, space: Callable[[Trial], Any]) -> None:
        """Call the space with random choices; a failing call tells nothing, and costs nothing."""
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=int(self._rng.integers(2**31))))
        until = time.monotonic() + EXPLORE_SECONDS
        for _ in range(EXPLORE):
            trial = study.ask()
            try:
                space(trial)
            except Exception:  # the user's code; the search itself reports what fails
                continue
            self._learn(trial.distributions)
            self._explored.append(dict(trial.params))
            if time.monotonic() > until:
                break

    def _learn(self, distributions: Mapping[str, BaseDistribution]) -> None:
        if self._encoding.learn(distributions):
            self._rows.clear()
            self._activity = None

    def _row(self, trial: FrozenTrial) -> np.ndarray:
        row = self._rows.get(trial.number)
        if row is None:
            row = self._encoding.row(trial.params)
            if trial.state.is_finished():
                self._rows[trial.number] = row
        return row

    def _matrix(self, trials: Sequence[FrozenTrial]) -> np.ndarray:
        return np.array([self._row(t) for t in trials]).reshape(len(trials), len(self._encoding.columns))

    def _active(self, seen: np.ndarray) -> Activity:
        """What is active when; learned anew once a trial has shown otherwise."""
        if self._activity is None or not self._activity[1].fits(seen[self._activity[0] :]):
            explored = [self._encoding.row(params) for params in self._explored]
            rows = np.concatenate([seen, np.array(explored).reshape(-1, seen.shape[1])])
            self._activity = len(seen), Activity(rows)
        self._activity = len(seen), self._activity[1]
        return self._activity[1]

    def _settled(self, rows: np.ndarray, activity: Activity, seen: set[bytes]) -> np.ndarray:
        """The first row that is an unseen candidate also by what the space really asks for."""
        for row in rows[:TRIES]:
            real = self._real(row)
            if row_keys(real[None, :])[0] not in seen:
                return real
        return self._any(activity, seen)

    def _real(self, row: np.ndarray) -> np.ndarray:
        """The row with the parameters that are really active, where the space is at hand."""
        if self.space is None:
            return row
        everything = np.where(np.isnan(row), self._encoding.draw(1, self._rng)[0], row)
        trial = optuna.trial.FixedTrial(self._encoding.params(everything))
        try:
            self.space(trial)
        except Exception:  # the user's code, or a range that depends on other parameters
            return row
        real = self._encoding.row(trial.params)
        if (np.isnan(real) != np.isnan(row)).any():
            self._explored.append(dict(trial.params))
            self._activity = None
        return real

    def _observations(
        self, study: Study, observed: Sequence[FrozenTrial], trials: Sequence[FrozenTrial]
    ) -> Observations:
        sign = _signs(study)
        nothing = np.full(len(sign), np.nan)
        values = [nothing if t.values is None else np.array(t.values) * sign for t in observed]
        running = [t for t in trials if t.state is TrialState.RUNNING]
        return Observations(
            self._encoding,
            self._matrix(observed),
            np.array(values),
            np.array([float(t.user_attrs.get(FIDELITY, 1.0)) for t in observed]),
            _violations(observed),
            np.array([t.state is TrialState.FAIL for t in observed]),
            self._matrix(running),
            sign,
        )

    def _propose(self, observations: Observations, activity: Activity, seen: set[bytes]) -> np.ndarray:
        encoding, rng = self._encoding, self._rng
        worth = self._belief.learn(observations)
        parents = observations.best_rows()
        near = encoding.vary(parents[rng.integers(len(parents), size=NEAR)], rng)
        rows = _unseen(activity.apply(np.concatenate([encoding.draw(FAR, rng), near])), seen)
        if not len(rows):
            return self._any(activity, seen)
        values = worth(rows)
        for _ in range(CLIMBS):
            best = rows[np.argsort(-values)[:SUMMITS]]
            around = activity.apply(np.concatenate([encoding.neighbours(row, rng) for row in best]))
            around = _unseen(around, seen | set(row_keys(rows)))
            if not len(around):
                break
            rows, values = np.concatenate([rows, around]), np.concatenate([values, worth(around)])
        return self._settled(rows[np.argsort(-values, kind="stable")], activity, seen)

    def _first(self, study: Study, taken: np.ndarray, activity: Activity, seen: set[bytes]) -> np.ndarray:
        """Before the models: the best that earlier studies found, then candidates far from each other."""
        best = _unseen(activity.apply(self._belief.first_rows(self._encoding, _signs(study))), seen)
        if len(best):
            return self._settled(best, activity, seen)
        return self._spread(taken, activity, seen)

    def _spread(self, taken: np.ndarray, activity: Activity, seen: set[bytes]) -> np.ndarray:
        """Of some random candidates the one farthest from all others."""
        rows = _unseen(activity.apply(self._encoding.draw(64, self._rng)), seen)
        if not len(rows):
            return self._any(activity, seen)
        if not len(taken):
            return self._settled(rows, activity, seen)
        points, others = self._encoding.embed(rows), self._encoding.embed(taken)
        distances = ((points[:, None, :] - others[None, :, :]) ** 2).sum(axis=2).min(axis=1)
        return self._settled(rows[np.argsort(-distances, kind="stable")], activity, seen)

    def _variation(
        self, study: Study, trials: Sequence[FrozenTrial], activity: Activity, seen: set[bytes]
    ) -> np.ndarray:
        """An unseen variation of a candidate on the front."""
        done = [t for t in trials if t.state is TrialState.COMPLETE]
        parents = self._observations(study, done[-LARGE:], []).best_rows()
        rows = self._encoding.vary(parents[self._rng.integers(len(parents), size=64)], self._rng)
        rows = _unseen(activity.apply(rows), seen)
        return self._settled(rows, activity, seen)

    def _any(self, activity: Activity, seen: set[bytes]) -> np.ndarray:
        """A random candidate, unseen where many tries find one; else the space is all but exhausted."""
        for _ in range(20):
            rows = activity.apply(self._encoding.draw(500, self._rng))
            for row in _unseen(rows, seen)[:TRIES]:
                real = self._real(row)
                if row_keys(real[None, :])[0] not in seen:
                    return real
        return np.asarray(rows[0])


@functools.cache
def _threads() -> ThreadpoolController:
    return ThreadpoolController()  # looks through all loaded libraries: once is enough


def _signs(study: Study) -> np.ndarray:
    return np.array([-1.0 if d == StudyDirection.MAXIMIZE else 1.0 for d in study.directions])


def _violations(trials: Sequence[FrozenTrial]) -> np.ndarray:
    """(trials, constraints), NaN where unknown."""
    found = [t.user_attrs.get(VIOLATIONS) or list(t.constraints.values()) for t in trials]
    width = max((len(row) for row in found), default=0)
    table = np.full((len(trials), width), np.nan)
    for row, values in zip(table, found, strict=True):
        if len(values) == width:
            row[:] = [np.nan if value is None else value for value in values]
    return table


def _unseen(rows: np.ndarray, seen: set[bytes]) -> np.ndarray:
    """The rows that are not among `seen`, each once."""
    first = {key: place for place, key in reversed(list(enumerate(row_keys(rows)))) if key not in seen}
    return rows[sorted(first.values())]
