"""Every combination of a finite space, conditional parameters included."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from ..core.errors import InputError
from .population import finite_values


@dataclass(eq=False)
class _Node:
    """What a trial asks for next after certain answers; it is not known before a trial was there.

    Attributes:
        values: on offer; none where trials ended here, or none was here yet.
        children: by place among the values.
        visits: trials that came through.
        closed: whether every combination from here on was tried.
    """

    parent: _Node | None = None
    name: str = ""
    values: Sequence[Any] = ()
    children: dict[int, _Node] = field(default_factory=dict)
    visits: int = 0
    closed: bool = False

    def ask(self, name: str, distribution: BaseDistribution) -> None:
        if not self.name:
            self.name, self.values = name, _values(name, distribution)

    def child(self, place: int) -> _Node:
        return self.children.setdefault(place, _Node(self))

    def close(self) -> None:
        """Take note that a trial ended here, and of the parents that this completes."""
        node: _Node | None = self
        while node is not None and len(node.children) == len(node.values):
            if not all(child.closed for child in node.children.values()):
                return
            node.closed = True
            node = node.parent

    def busy(self, running: set[_Node]) -> bool:
        """Whether nothing is left to begin from here on: all is tried or being tried."""
        if self.closed or not self.name:
            return self.closed or self in running
        return len(self.children) == len(self.values) and all(c.busy(running) for c in self.children.values())


class ExhaustiveSampler(BaseSampler):
    """Tries every combination once, in an order in which all values appear early.

    Each parameter takes the value that was tried least, of these the one that was tried least after the same answers
    before it. Which parameters follow from which answers is learnt as trials ask, so a space may be
    conditional, as long as it asks the same after the same answers. `study.optimize` ends when all is tried.
    """

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._random = RandomSampler(seed=seed)
        self._root = _Node()
        self._added: set[int] = set()
        self._own: set[int] = set()
        self._tried: Counter[tuple[str, int]] = Counter()
        self._running: set[_Node] = set()

    def reseed_rng(self) -> None:
        """Draw differently from other processes that hold this sampler."""
        self._rng = np.random.default_rng()
        self._random.reseed_rng()

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Take note of what was tried, and of what others are trying."""
        self._running = set()
        for other in study.get_trials(deepcopy=False):
            if other.state.is_finished():
                self._add(other)
            elif other.state is TrialState.RUNNING and other.number != trial.number and other.params:
                self._running.add(self._end(other.params, other.distributions))
        self._own.add(trial.number)

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
        """The least tried value with combinations left; a random one where there are none.

        Raises:
            InputError: the parameter is continuous.
        """
        node = self._end(trial.params, trial.distributions)
        node.ask(param_name, param_distribution)
        # A busy parent may have been reached through a parameter that was fixed from outside.
        left = [
            place
            for place in range(len(node.values))
            if place not in node.children or not node.children[place].busy(self._running)
        ]
        if node.name != param_name or not left:
            return self._random.sample_independent(study, trial, param_name, param_distribution)
        ties = self._rng.random(len(node.values))
        visits = [node.children[p].visits if p in node.children else 0 for p in range(len(node.values))]
        place = min(left, key=lambda p: (self._tried[param_name, p], visits[p], ties[p]))
        node.child(place).visits += 1
        self._tried[param_name, place] += 1
        return node.values[place]

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """Take note of what was tried; end the study's loop where that was the last."""
        self._add(trial)
        if self._root.closed and study._thread_local.in_optimize_loop:
            study.stop()

    def _add(self, trial: FrozenTrial) -> None:
        if trial.number in self._added or (not trial.params and trial.number not in self._own):
            return
        self._added.add(trial.number)
        if trial.number not in self._own:
            self._count(trial)
        self._end(trial.params, trial.distributions).close()

    def _count(self, trial: FrozenTrial) -> None:
        """Count a trial that another sampler proposed."""
        node = self._root
        self._end(trial.params, trial.distributions)  # makes the nodes
        while node.name in trial.params:
            place = _place(node, trial.params[node.name])
            if place is None:
                return
            self._tried[node.name, place] += 1
            node = node.child(place)
            node.visits += 1

    def _end(self, params: Mapping[str, Any], distributions: Mapping[str, BaseDistribution]) -> _Node:
        """Where a trial's answers lead, in the order in which they were asked for."""
        node = self._root
        left = {name: value for name, value in params.items() if not distributions[name].single()}
        while left:
            if not node.name:
                first = next(iter(left))
                node.ask(first, distributions[first])
            place = _place(node, left.pop(node.name)) if node.name in left else None
            if place is None:
                return _Node(self._root)  # of another order or other ranges: nowhere in this tree
            node = node.child(place)
        return node


def _place(node: _Node, value: Any) -> int | None:
    if isinstance(node.values, Sequence) and value in node.values:
        return node.values.index(value)
    near = [place for place, other in enumerate(node.values) if isinstance(other, float) and abs(other - value) < 1e-9]
    return near[0] if near else None


def _values(name: str, distribution: BaseDistribution) -> Sequence[Any]:
    values = finite_values(distribution)
    if values is None:
        assert not isinstance(distribution, CategoricalDistribution)
        low, high = getattr(distribution, "low", 0), getattr(distribution, "high", 1)
        raise InputError(
            f"sampler grid needs a finite space, and '{name}' is continuous ({low:g} to {high:g}): give it a step, "
            f"such as suggest_float('{name}', {low:g}, {high:g}, step={(high - low) / 4:g}), or use another sampler"
        )
    return values
