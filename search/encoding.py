"""Parameters of a define-by-run space as rows of numbers: for a surrogate, and to draw and vary candidates.

A row holds one number for each parameter that was ever seen: the index of a choice, or a place in [0, 1] on
the parameter's own (linear or logarithmic) scale; NaN where the parameter is inactive.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

MANY = 64  # levels from which a stepped number is varied like a continuous one


@dataclass(frozen=True)
class Column:
    """One parameter.

    Attributes:
        levels: how many values it can take; 0 for a continuous one.
        ordered: whether values that are near each other are alike.
    """

    name: str
    distribution: BaseDistribution
    levels: int
    ordered: bool

    @classmethod
    def of(cls, name: str, distribution: BaseDistribution) -> Column:
        if isinstance(distribution, CategoricalDistribution):
            choices = distribution.choices
            numbers = all(isinstance(c, (int, float)) and not isinstance(c, bool) for c in choices)
            rising = numbers and all(a < b for a, b in itertools.pairwise(choices))  # type: ignore[operator]
            falling = numbers and all(a > b for a, b in itertools.pairwise(choices))  # type: ignore[operator]
            return cls(name, distribution, len(choices), len(choices) > 2 and (rising or falling))
        if isinstance(distribution, IntDistribution):
            levels = (distribution.high - distribution.low) // distribution.step + 1
            return cls(name, distribution, levels, True)
        assert isinstance(distribution, FloatDistribution)
        step = distribution.step
        levels = 0 if step is None else round((distribution.high - distribution.low) / step) + 1
        return cls(name, distribution, levels, True)

    def encode(self, value: Any) -> float:
        """The number in a row; NaN for a value that the distribution does not hold."""
        if isinstance(self.distribution, CategoricalDistribution):
            try:
                index = self.distribution.to_internal_repr(value)
            except ValueError:
                return math.nan
            return index / max(self.levels - 1, 1) if self.ordered else index
        low, high = self._range()
        place = (self._scale(value) - low) / (high - low) if high > low else 0.0
        return min(max(place, 0.0), 1.0)

    def decode(self, number: float) -> Any:
        """The value behind a number in a row."""
        if isinstance(self.distribution, CategoricalDistribution):
            return self.distribution.choices[round(number * max(self.levels - 1, 1) if self.ordered else number)]
        low, high = self._range()
        value = low + number * (high - low)
        value = math.exp(value) if self._log else value
        d = self.distribution
        if isinstance(d, IntDistribution):
            return min(max(d.low + round((value - d.low) / d.step) * d.step, d.low), d.high)
        assert isinstance(d, FloatDistribution)
        if d.step is not None:
            value = d.low + round((value - d.low) / d.step) * d.step
        return float(min(max(value, d.low), d.high))

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Random numbers for this column."""
        if self.levels and not self._log:
            index = rng.integers(self.levels, size=count)
            return index / max(self.levels - 1, 1) if self.ordered else index.astype(float)
        return self._snap(rng.random(count))

    def vary(self, numbers: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Other numbers near those given: another choice, a step or two, or a normal step of a tenth of the range."""
        count = len(numbers)
        if self.levels == 1:
            return numbers
        if not self.ordered:
            return np.asarray((numbers + rng.integers(1, self.levels, size=count)) % self.levels)
        width = np.where(rng.random(count) < 0.5, 0.05, 0.25)
        if self.levels and self.levels <= MANY:
            width = np.maximum(width, 1.0 / (self.levels - 1))
        step = rng.normal(size=count) * width
        moved = numbers + step
        moved = np.where((moved < 0) | (moved > 1), numbers - step, moved)  # turn round at the ends
        moved = self._snap(np.clip(moved, 0.0, 1.0))
        if not self.levels:
            return moved
        old, new = self._index(numbers), self._index(moved)
        beside = np.where(step > 0, old + 1, old - 1)
        beside = np.where((beside < 0) | (beside >= self.levels), 2 * old - beside, beside)
        return self._place(np.where(new == old, beside, new))

    def _snap(self, numbers: np.ndarray) -> np.ndarray:
        """The nearest numbers that stand for a value."""
        return self._place(self._index(numbers)) if self.levels else numbers

    def _index(self, numbers: np.ndarray) -> np.ndarray:
        """Which of the levels, from 0."""
        if self._log:
            d, (low, high) = self.distribution, self._range()
            assert isinstance(
                d, IntDistribution
            )  # Optuna has no logarithmic floats in steps, nor integers in other than 1
            numbers = (np.exp(low + numbers * (high - low)) - d.low) / max(d.high - d.low, 1)
        return np.round(np.clip(numbers, 0.0, 1.0) * (self.levels - 1)).astype(int)

    def _place(self, index: np.ndarray) -> np.ndarray:
        """The numbers of levels."""
        if self._log:
            d, (low, high) = self.distribution, self._range()
            assert isinstance(d, IntDistribution)
            return np.asarray((np.log(d.low + index) - low) / ((high - low) or 1.0))
        return np.asarray(index / max(self.levels - 1, 1))

    @property
    def _log(self) -> bool:
        return bool(getattr(self.distribution, "log", False))

    def _scale(self, value: float) -> float:
        return math.log(value) if self._log else float(value)

    def _range(self) -> tuple[float, float]:
        d = self.distribution
        return self._scale(d.low), self._scale(d.high)  # type: ignore[attr-defined]


class Encoding:
    """All parameters seen so far, in the order in which a space asks for them."""

    def __init__(self) -> None:
        self.columns: list[Column] = []
        self._place: dict[str, int] = {}

    def learn(self, distributions: Mapping[str, BaseDistribution]) -> bool:
        """Take parameters into account; whether any of them is new."""
        new = [name for name in distributions if name not in self._place]
        for name in new:
            self._place[name] = len(self.columns)
            self.columns.append(Column.of(name, distributions[name]))
        return bool(new)

    def row(self, params: Mapping[str, Any]) -> np.ndarray:
        """(columns,)"""
        found = np.full(len(self.columns), np.nan)
        for name, value in params.items():
            if name in self._place:
                found[self._place[name]] = self.columns[self._place[name]].encode(value)
        return found

    def params(self, row: np.ndarray) -> dict[str, Any]:
        """The active parameters of a row."""
        return {c.name: c.decode(x) for c, x in zip(self.columns, row, strict=True) if not math.isnan(x)}

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """(count, columns) random rows, every parameter active."""
        return np.column_stack([column.draw(count, rng) for column in self.columns])

    def vary(self, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """One other row for each: one active parameter is varied, a second or third at times.

        Inactive parameters get random values: the change may make them active.
        """
        active = ~np.isnan(rows)
        found = np.where(active, rows, self.draw(len(rows), rng))
        order = np.argsort(np.where(active, rng.random(rows.shape), 2.0), axis=1)
        changes = np.minimum(rng.choice([1, 2, 3], size=len(rows), p=[0.7, 0.2, 0.1]), active.sum(1))
        for rank in range(min(3, rows.shape[1])):
            for place, column in enumerate(self.columns):
                which = (changes > rank) & (order[:, rank] == place)
                if which.any():
                    found[which, place] = column.vary(found[which, place], rng)
        return found

    def neighbours(self, row: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Every row that differs in one active parameter; of long scales a few values near and far."""
        found = []
        for place in np.flatnonzero(~np.isnan(row)):
            column = self.columns[place]
            if column.levels and column.levels <= 8:
                levels = np.arange(column.levels) / (max(column.levels - 1, 1) if column.ordered else 1)
                others = np.asarray(levels[np.abs(levels - row[place]) > 1e-9], dtype=np.float64)
            else:
                others = np.asarray(column.vary(np.full(6, row[place]), rng), dtype=np.float64)
            block = np.repeat(row[None, :], len(others), axis=0)
            block[:, place] = others
            found.append(block)
        rows = np.concatenate(found) if found else np.empty((0, len(row)))
        return np.where(np.isnan(rows), self.draw(len(rows), rng), rows) if np.isnan(rows).any() else rows

    @property
    def owner(self) -> np.ndarray:
        """(dimensions,) the column that each dimension of `embed` belongs to."""
        widths = [2 if column.ordered else column.levels + 1 for column in self.columns]
        return np.repeat(np.arange(len(self.columns)), widths)

    def embed(self, rows: np.ndarray) -> np.ndarray:
        """(rows, dimensions) points whose squared distances are those of the parameters.

        That is 1 between two choices, the squared difference of ordered values, and 1 or a little more between active
        and inactive.
        """
        parts = []
        for numbers, column in zip(rows.T, self.columns, strict=True):
            off = np.isnan(numbers)
            if column.ordered:
                part = np.column_stack([np.where(off, 0.0, numbers - 0.5), np.where(off, 1.0, 0.0)])
            else:
                part = np.zeros((len(rows), column.levels + 1))
                part[np.arange(len(rows)), np.where(off, column.levels, numbers).astype(int)] = math.sqrt(0.5)
            parts.append(part)
        return np.concatenate(parts, axis=1)


class Activity:
    """Which parameters are active, learned from rows in which some are not.

    Parameters of a define-by-run space depend on those asked for before them, so each gets a decision tree over these.
    """

    def __init__(self, rows: np.ndarray) -> None:
        from sklearn.tree import DecisionTreeClassifier

        active = ~np.isnan(rows)
        known = np.where(active, rows, -1.0)
        self._trees: list[tuple[int, Any]] = []
        self._never = np.flatnonzero(~active.any(axis=0))
        for place in np.flatnonzero(active.any(axis=0) & ~active.all(axis=0)):
            if place == 0:
                continue
            tree = DecisionTreeClassifier(random_state=0).fit(known[:, :place], active[:, place])
            self._trees.append((int(place), tree))

    def apply(self, rows: np.ndarray) -> np.ndarray:
        """The rows with inactive parameters as NaN."""
        if not len(rows):
            return rows
        rows = rows.copy()
        rows[:, self._never] = np.nan
        for place, tree in self._trees:
            known = np.where(np.isnan(rows[:, :place]), -1.0, rows[:, :place])
            rows[~tree.predict(known), place] = np.nan
        return rows

    def fits(self, rows: np.ndarray) -> bool:
        """Whether these rows are active just where this says they are."""
        found = self.apply(np.where(np.isnan(rows), 0.0, rows))
        return bool((np.isnan(found) == np.isnan(rows)).all())


def row_keys(rows: np.ndarray) -> list[bytes]:
    """One key a row, equal for equal rows."""
    return [row.tobytes() for row in np.where(np.isnan(rows), -1.0, np.round(rows, 9)) + 0.0]
