"""A policy-gradient sampler for searches that optimise one number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from ..core.errors import InputError
from .population import finite_values, from_unit, to_unit, violation

BINS = 10  # of a continuous parameter, or one of more values than that
RATE = 0.2  # of learning, for rewards in standard deviations
ENTROPY = 0.01  # weight of the entropy that keeps the policy from settling early
MEMORY = 0.95  # of the averages that rewards are compared with
CLIP = 3.0  # standard deviations that one reward may count for
SUREST = 3.0  # logit, of a policy that must be able to change its mind: of five values one gets at most 98 %
FAILED = -1.0  # advantage of trials that failed or break a constraint
EXPLORE = 0.03  # share of values that are drawn evenly
# After so many trials in a row that repeat earlier ones the policy is this much flatter: it has nothing new to say.
REPEATS, FLATTEST = 40, 4.0


class PolicySampler(BaseSampler):
    """A controller that learns by REINFORCE which value of each parameter brings a high reward.

    The policy is a categorical distribution for each parameter, continuous ones in bins; those of conditional
    parameters learn from the trials that asked for them. The reward is the study's only objective, compared with a
    moving average (Zoph and Le, Neural architecture search with reinforcement learning, 2017; MnasNet's reward, Tan et
    al., 2019, is `--scalarize "accuracy * (latency/5ms)^-0.07"`). It learns from every finished trial of the study,
    whoever proposed it.
    """

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._logits: dict[tuple[str, BaseDistribution], np.ndarray] = {}
        self._learnt: set[int] = set()
        self._seen: set[tuple[tuple[str, Any], ...]] = set()
        self._in_a_row = 0
        self._mean, self._square, self._weight = 0.0, 0.0, 0.0

    def probabilities(self, name: str) -> dict[Any, float]:
        """What the policy gives the values (of continuous parameters: the bins, by their middle) of a parameter."""
        found: dict[Any, float] = {}
        for (parameter, distribution), logits in self._logits.items():
            if parameter == name:
                shares = _softmax(logits)
                found |= {_value(distribution, i, 0.5): float(share) for i, share in enumerate(shares)}
        return found

    def reseed_rng(self) -> None:
        """Draw differently from other processes that hold this sampler."""
        self._rng = np.random.default_rng()

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Learn from the trials that ended since."""
        if len(study.directions) > 1:
            raise InputError(
                "sampler rl learns from one number: name one objective, or make one of several with --scalarize"
            )
        sign = 1.0 if study.direction == StudyDirection.MAXIMIZE else -1.0
        for other in study.get_trials(deepcopy=False):
            if other.state.is_finished() and other.number not in self._learnt:
                self._learnt.add(other.number)
                self._learn(other, sign)

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
        """A value drawn by the policy."""
        logits = self._of(param_name, param_distribution)
        flatter = 1.0 + (FLATTEST - 1.0) * min(1.0, self._in_a_row / REPEATS)
        shares = (1 - EXPLORE) * _softmax(logits / flatter) + EXPLORE / len(logits)
        place = int(self._rng.choice(len(shares), p=shares))
        return _value(param_distribution, place, self._rng.random())

    def _of(self, name: str, distribution: BaseDistribution) -> np.ndarray:
        return self._logits.setdefault((name, distribution), np.zeros(_size(distribution)))

    def _learn(self, trial: FrozenTrial, sign: float) -> None:
        choices = tuple(sorted(trial.params.items()))
        self._in_a_row = self._in_a_row + 1 if choices in self._seen else 0
        self._seen.add(choices)
        advantage = self._advantage(trial, sign)
        for name, value in trial.params.items():
            distribution = trial.distributions[name]
            if distribution.single():
                continue
            logits = self._of(name, distribution)
            shares = _softmax(logits)
            chosen = np.zeros(len(shares))
            chosen[_place(distribution, value)] = 1.0
            logs = np.log(np.maximum(shares, 1e-12))
            entropy = -shares * (logs - shares @ logs)
            logits += RATE * (advantage * (chosen - shares) + ENTROPY * entropy)
            logits[:] = np.clip(logits - logits.mean(), -SUREST, SUREST)

    def _advantage(self, trial: FrozenTrial, sign: float) -> float:
        """The reward above its moving average, in moving standard deviations."""
        if trial.state is not TrialState.COMPLETE or violation(trial) > 0 or not math.isfinite(trial.values[0]):
            return FAILED
        reward = sign * trial.values[0]
        known, mean = self._weight, self._mean / max(self._weight, 1e-12)
        spread = math.sqrt(max(0.0, self._square / max(known, 1e-12) - mean * mean))
        self._weight = MEMORY * self._weight + 1 - MEMORY
        self._mean = MEMORY * self._mean + (1 - MEMORY) * reward
        self._square = MEMORY * self._square + (1 - MEMORY) * reward * reward
        if not known or spread <= 1e-12 * abs(mean):
            return float(np.sign(reward - mean)) if known else 0.0
        return float(np.clip((reward - mean) / spread, -CLIP, CLIP))

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """Nothing: what ended is learnt before the next trial."""


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return np.asarray(powers / powers.sum())


def _size(distribution: BaseDistribution) -> int:
    """How many arms a parameter has."""
    values = finite_values(distribution)
    if values is None:
        return BINS
    return len(values) if isinstance(distribution, CategoricalDistribution) else min(BINS, len(values))


def _binned(distribution: BaseDistribution) -> bool:
    values = finite_values(distribution)
    return values is None or (not isinstance(distribution, CategoricalDistribution) and len(values) > BINS)


def _value(distribution: Any, place: int, within: float) -> Any:
    """The value of an arm; of a bin the one at `within`, 0 to 1."""
    if _binned(distribution):
        return from_unit(distribution, (place + within) / BINS)
    values = finite_values(distribution)
    assert values is not None
    return values[place]


def _place(distribution: Any, value: Any) -> int:
    """The arm that a value belongs to."""
    if _binned(distribution):
        return min(BINS - 1, int(to_unit(distribution, value) * BINS))
    values = finite_values(distribution)
    assert values is not None
    if isinstance(distribution, CategoricalDistribution):
        return list(values).index(value)
    return round((value - distribution.low) / distribution.step)
