"""Samplers by name: Optuna's, and our own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from ..core.errors import unknown
from ..core.types import Space
from .auto import AutoSampler
from .belief import Prior
from .evolution import evolution_sampler, local_sampler
from .grid import ExhaustiveSampler
from .policy import PolicySampler
from .population import VIOLATIONS as VIOLATIONS


def _constraints(trial: FrozenTrial) -> Sequence[float]:
    return [value for value in trial.user_attrs.get(VIOLATIONS, ()) if value is not None]


def _population(trials: int) -> int:
    # Small populations win at small budgets: 10 to 20 beat the usual 50 up to some hundred trials.
    return max(8, min(50, trials // 5))


def _nsga2(seed: int, trials: int, constrained: bool) -> BaseSampler:
    return optuna.samplers.NSGAIISampler(
        population_size=_population(trials), seed=seed, constraints_func=_constraints if constrained else None
    )


def _nsga3(seed: int, trials: int, constrained: bool) -> BaseSampler:
    return optuna.samplers.NSGAIIISampler(
        population_size=_population(trials), seed=seed, constraints_func=_constraints if constrained else None
    )


def _auto(seed: int, trials: int, constrained: bool) -> AutoSampler:
    return AutoSampler(seed, start=max(6, min(20, trials // 5)))


def _tpe(seed: int, trials: int, constrained: bool) -> BaseSampler:
    return optuna.samplers.TPESampler(
        multivariate=True,
        group=True,
        constant_liar=True,
        n_startup_trials=max(5, min(20, trials // 5)),
        seed=seed,
        constraints_func=_constraints if constrained else None,
    )


def _gp(seed: int, trials: int, constrained: bool) -> BaseSampler:
    return optuna.samplers.GPSampler(
        n_startup_trials=max(5, min(20, trials // 5)),
        seed=seed,
        deterministic_objective=False,
        warn_independent_sampling=False,
        constraints_func=_constraints if constrained else None,
    )


def _random(seed: int, trials: int, constrained: bool) -> BaseSampler:
    return optuna.samplers.RandomSampler(seed=seed)


# These find the violations by themselves.
def _evolution(seed: int, trials: int, constrained: bool) -> BaseSampler:
    return evolution_sampler(seed, trials)


def _local(seed: int, trials: int, constrained: bool) -> BaseSampler:
    return local_sampler(seed, trials)


def _rl(seed: int, trials: int, constrained: bool) -> BaseSampler:
    return PolicySampler(seed)


def _grid(seed: int, trials: int, constrained: bool) -> BaseSampler:
    return ExhaustiveSampler(seed)


SAMPLERS: dict[str, Callable[[int, int, bool], BaseSampler]] = {
    "auto": _auto,
    "tpe": _tpe,
    "nsga2": _nsga2,
    "nsga3": _nsga3,
    "gp": _gp,
    "random": _random,
    "evolution": _evolution,
    "local": _local,
    "rl": _rl,
    "grid": _grid,
}
ONE_NUMBER = ("rl",)  # samplers that can't do with several objectives


def make_sampler(
    name: str,
    *,
    seed: int,
    trials: int,
    constrained: bool,
    space: Space | None = None,
    prior: Sequence[Prior] = (),
) -> BaseSampler:
    """The sampler called `name`; its population or start-up phase follows the number of trials.

    Args:
        space: what it will sample; "auto" looks into it beforehand.
        prior: what earlier studies found; only "auto" learns from it.

    Raises:
        InputError: no sampler of that name.
    """
    if name not in SAMPLERS:
        raise unknown("sampler", name, SAMPLERS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = SAMPLERS[name](seed, trials, constrained)
    if isinstance(sampler, AutoSampler):
        sampler.space = space
        sampler.learn_from(prior)
    return sampler
