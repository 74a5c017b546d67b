"""What samplers ask of a study: how its trials rank, which choices are known, and which lie next to them."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from ..studies.study import FIDELITY

VIOLATIONS = "violations"  # user attribute: one number per constraint, above 0 where it is violated
ALL_OTHERS = 9  # parameters with at most so many values have all others as neighbours
STEP = 0.15  # of a parameter's range: standard deviation of a change where there are more

Choices = Mapping[str, Any]


def violation(trial: FrozenTrial) -> float:
    """How far a trial is beyond its constraints, all of them added up; 0 for feasible ones."""
    found = trial.user_attrs.get(VIOLATIONS) or getattr(trial, "constraints", {}).values()
    return sum(max(0.0, value) for value in found if value is not None)


def finished(study: Study) -> list[FrozenTrial]:
    """Trials with values and parameters, in the order in which they ended.

    Of a candidate that was trained further (see `rungs.Ladder`) only the last.
    """
    done = [t for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) if t.params]
    done.sort(key=lambda t: (t.datetime_complete or datetime.datetime.min, t.number))
    last = {tuple(sorted(t.params.items())): t.number for t in done}
    return [t for t in done if FIDELITY not in t.user_attrs or last[tuple(sorted(t.params.items()))] == t.number]


def losses(study: Study, trials: Sequence[FrozenTrial]) -> np.ndarray:
    """(trials, objectives), smaller is better, finite."""
    signs = [-1.0 if direction == StudyDirection.MAXIMIZE else 1.0 for direction in study.directions]
    values = np.array([trial.values for trial in trials], float).reshape(-1, len(signs))
    return np.nan_to_num(values * signs, posinf=1e300, neginf=-1e300)


def ranks(study: Study, trials: Sequence[FrozenTrial]) -> np.ndarray:
    """(trials,) fronts that a trial is behind: 0 for those that no other beats.

    Feasible trials come before all others, which rank by how far they are beyond the constraints (Deb et al.,
    A fast and elitist multiobjective genetic algorithm, 2002).
    """
    import moocore

    beyond = np.array([violation(trial) for trial in trials])
    values, feasible = losses(study, trials), beyond <= 0
    found = np.zeros(len(trials), int)
    if feasible.any():
        rows = values[feasible]
        single = rows.shape[1] == 1
        found[feasible] = np.unique(rows[:, 0], return_inverse=True)[1] if single else moocore.pareto_rank(rows)
    behind = found[feasible].max() + 1 if feasible.any() else 0
    found[~feasible] = behind + np.unique(beyond[~feasible], return_inverse=True)[1]
    return found


def crowding(values: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """(trials,) distance between a trial's neighbours of its own rank; infinite at the ends (Deb et al., 2002)."""
    found = np.zeros(len(values))
    for front in (np.flatnonzero(rank == r) for r in np.unique(rank)):
        for column in values[front].T:
            order = np.argsort(column, kind="stable")
            spread = column[order[-1]] - column[order[0]]
            found[front[order[[0, -1]]]] = np.inf
            if len(front) > 2 and spread > 0:
                found[front[order[1:-1]]] += (column[order[2:]] - column[order[:-2]]) / spread
    return found


def finite_values(distribution: BaseDistribution) -> Sequence[Any] | None:
    """All values of a parameter, in order; None for a continuous one."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    if isinstance(distribution, IntDistribution):
        return range(distribution.low, distribution.high + 1, distribution.step)
    assert isinstance(distribution, FloatDistribution)
    if distribution.step is None:
        return None
    count = round((distribution.high - distribution.low) / distribution.step) + 1
    return [distribution.low + number * distribution.step for number in range(count)]


def to_unit(distribution: FloatDistribution | IntDistribution, value: float) -> float:
    """A number's place in its range, 0 to 1, in logarithms where the parameter is asked for so."""
    low, high = distribution.low, distribution.high
    if distribution.log:
        return math.log(value / low) / math.log(high / low)
    return (value - low) / (high - low)


def from_unit(distribution: FloatDistribution | IntDistribution, place: float) -> float | int:
    """The value at a place in the range; the nearest one on offer."""
    low, high, place = distribution.low, distribution.high, min(1.0, max(0.0, place))
    value = low * (high / low) ** place if distribution.log else low + (high - low) * place
    if distribution.step is not None:
        value = low + round((value - low) / distribution.step) * distribution.step
    value = min(high, max(low, value))
    return round(value) if isinstance(distribution, IntDistribution) else value


def other_values(distribution: BaseDistribution, value: Any, rng: np.random.Generator) -> list[Any]:
    """Values next to `value`: all others where there are few, else one above and one below, drawn at random."""
    values = finite_values(distribution)
    if values is not None and (isinstance(distribution, CategoricalDistribution) or len(values) <= ALL_OTHERS):
        return [other for other in values if other != value]
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    place = to_unit(distribution, value)
    least = 0.0 if values is None else 1.0 / (len(values) - 1)
    found = [from_unit(distribution, place + side * max(least, abs(rng.normal(0, STEP)))) for side in (-1, 1)]
    return [other for other in found if other != value]


def neighbours(trial: FrozenTrial, rng: np.random.Generator) -> list[Choices]:
    """The trial's choices with one of them changed, in every way; what a change brings along is left open."""
    return [
        {**trial.params, name: other}
        for name, value in trial.params.items()
        if not trial.distributions[name].single()
        for other in other_values(trial.distributions[name], value, rng)
    ]


def mutated(choices: Choices, trial: FrozenTrial, rng: np.random.Generator) -> Choices:
    """`choices` with another value for one of the trial's parameters."""
    names = [name for name, distribution in trial.distributions.items() if not distribution.single()]
    if not names:
        return choices
    name = names[rng.integers(len(names))]
    others = other_values(trial.distributions[name], choices[name], rng)
    return {**choices, name: others[rng.integers(len(others))]} if others else choices


class Known:
    """The choices that a study's trials made, those still running included."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, ...], set[tuple[Any, ...]]] = {}
        self._numbers: set[int] = set()
        self._running: list[Choices] = []

    def update(self, study: Study) -> None:
        """Take trials into account that started or ended since."""
        self._running = []
        for trial in study.get_trials(deepcopy=False):
            if trial.number in self._numbers or not trial.params:
                continue
            if not trial.state.is_finished():
                self._running.append(trial.params)  # may still ask for more parameters
                continue
            self._numbers.add(trial.number)
            names = tuple(sorted(trial.params))
            self._rows.setdefault(names, set()).add(tuple(trial.params[name] for name in names))

    def __contains__(self, choices: Choices) -> bool:
        """Whether some trial made these choices; it need not have asked for all of them."""
        for names, rows in self._rows.items():
            if all(name in choices for name in names) and tuple(choices[name] for name in names) in rows:
                return True
        return any(all(choices.get(name) == value for name, value in p.items()) for p in self._running)


Propose = Callable[[Study, Known, np.random.Generator], Choices]


class ProposalSampler(BaseSampler):
    """Gives every trial the choices that `propose` makes; what these leave open is drawn at random.

    Spaces may be conditional: proposed parameters that a trial does not ask for, or that no longer fit its ranges,
    are ignored.
    """

    def __init__(self, propose: Propose, seed: int) -> None:
        self._propose, self._seed = propose, seed
        self._rng = np.random.default_rng(seed)
        self._random = RandomSampler(seed=seed)
        self._known = Known()
        self._proposals: dict[int, Choices] = {}

    def reseed_rng(self) -> None:
        """Draw differently from other processes that hold this sampler."""
        self._rng = np.random.default_rng()
        self._random.reseed_rng()

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Decide where the trial should lie."""
        self._known.update(study)
        self._proposals[trial.number] = self._propose(study, self._known, self._rng)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Nothing: parameters are answered one by one."""
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Nothing: parameters are answered one by one."""
        return {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The proposed value where there is one that fits, else a random one."""
        choices = self._proposals.get(trial.number, {})
        if param_name in choices and fits(param_distribution, choices[param_name]):
            return choices[param_name]
        return self._random.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """Forget the proposal."""
        self._proposals.pop(trial.number, None)


def fits(distribution: BaseDistribution, value: Any) -> bool:
    """Whether a parameter may take this value."""
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return distribution._contains(distribution.to_internal_repr(value))
