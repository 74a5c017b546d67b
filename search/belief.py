"""What a study's trials say about candidates that were never tried: models of objectives, constraints and failures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtr

from .encoding import Encoding, row_keys
from .improvement import expected_improvement, free_boxes, nondominated_rows, spread_along
from .surrogate import FIT_ON, GaussianProcess, Hyperparameters, fit

Known = Callable[[Sequence[Mapping[str, Any]]], Sequence[float]]
Worth = Callable[[np.ndarray], np.ndarray]

MODEL_ON = 400  # observations in a model; beyond, the best and a random rest
REFIT = 1.15  # growth in observations after which length scales are fitted anew
BAD_TAIL = 2.0  # values further behind the median than twice the best is ahead of it are all the same: bad
FEW = 0.1  # where candidates were trained in part, for what is bad then need not be, that holds for this share at most
SPANS = 2.0  # ratio of largest to smallest from which a positive objective is modelled by its logarithm
PRIOR_TRIALS = 3  # how many of its own trials a study must have to outweigh what earlier ones suggest
FRONT = {1: 1000, 2: 1000, 3: 60, 4: 30}  # front points that improvement is computed over, by objectives; 12 for more


@dataclass(frozen=True)
class Prior:
    """What an earlier study found: a similar space, or the same one on another device.

    Attributes:
        params: one mapping for each candidate.
        values: (candidates, objectives) in this study's order and signs as told; NaN for what the earlier study did
            not have. Only their pattern counts: level and scale are learned from this study's own trials.
    """

    params: Sequence[Mapping[str, Any]]
    values: np.ndarray


@dataclass(frozen=True)
class Observations:
    """A study's trials as arrays; smaller values are better.

    Attributes:
        rows: (n, parameters), see `Encoding`.
        values: (n, objectives), NaN where unknown.
        fidelity: (n,), 1 for full.
        violations: (n, constraints), > 0 where violated, NaN where unknown.
        failed: (n,)
        running: (k, parameters)
        sign: (objectives,), -1 where the study maximises.
    """

    encoding: Encoding
    rows: np.ndarray
    values: np.ndarray
    fidelity: np.ndarray
    violations: np.ndarray
    failed: np.ndarray
    running: np.ndarray
    sign: np.ndarray

    @property
    def complete(self) -> np.ndarray:
        """(n,) whether all objectives are known."""
        return np.asarray(~np.isnan(self.values).any(axis=1))

    @property
    def feasible(self) -> np.ndarray:
        """(n,) whether a candidate is complete and violates nothing."""
        return np.asarray(self.complete & ~(self.violations > 0).any(axis=1))

    def unfinished_rows(self) -> np.ndarray:
        """Rows of feasible candidates that have results of partial training alone."""
        full = self.feasible & (self.fidelity >= 1.0)
        finished, keys = set(row_keys(self.rows[full])), row_keys(self.rows)
        return np.asarray(self.rows[self.feasible & np.array([key not in finished for key in keys], dtype=bool)])

    def best_rows(self) -> np.ndarray:
        """Rows of the front; where nothing is feasible, of those that violate least."""
        feasible = np.flatnonzero(self.feasible)
        if len(feasible):
            full = feasible[self.fidelity[feasible] == self.fidelity[feasible].max()]
            return np.asarray(self.rows[full[domination_counts(self.values[full]) == 0]])
        if not self.violations.size:
            return self.rows
        total = np.nan_to_num(np.maximum(self.violations, 0.0)).sum(axis=1)
        return np.asarray(self.rows[np.argsort(total)[:8]])


@dataclass(frozen=True)
class _Quantity:
    """A model of one number: standardised, over its logarithm where `log`."""

    log: bool
    centre: float
    scale: float
    process: GaussianProcess
    columns: int

    def mean(self, points: np.ndarray) -> np.ndarray:
        """Mean alone: much cheaper."""
        return self.process.mean(points) * self.scale + self.centre

    def predict(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation, of the logarithm where `log`."""
        mean, deviation = self.process.predict(points)
        return mean * self.scale + self.centre, deviation * self.scale

    def evidence(self, count: int) -> float:
        """Logarithm of the density of the `count` values, but for a constant."""
        return self.process.evidence - count * float(np.log(self.scale))


class Belief:
    """Models that learn from a study's trials as they come."""

    def __init__(self, known: Mapping[int, Known], priors: Sequence[Prior], rng: np.random.Generator) -> None:
        self.rng = rng
        self.priors = tuple(priors)
        self._known = known
        self._fitted: dict[str, tuple[int, Hyperparameters]] = {}
        self._earlier: dict[tuple[int, int, bool], _Quantity] = {}
        self._shares: dict[int, tuple[list[_Quantity], np.ndarray]] = {}

    @property
    def informed(self) -> bool:
        """Whether earlier studies stand behind it."""
        return bool(self.priors)

    def first_rows(self, encoding: Encoding, sign: np.ndarray) -> np.ndarray:
        """The fronts of the earlier studies, in turns, each in an order that covers it soon."""
        found = [np.empty((0, len(encoding.columns)))]
        for prior in self.priors:
            values = prior.values * sign
            shared = ~np.isnan(values).all(axis=0)
            if shared.any():
                best = np.flatnonzero(domination_counts(np.nan_to_num(values[:, shared], nan=np.inf)) == 0)
                order = best[spread_along(values[best][:, shared], len(best))]
                found.append(np.array([encoding.row(prior.params[int(place)]) for place in order]))
        turns = np.concatenate([np.arange(len(rows)) for rows in found])
        return np.concatenate(found)[np.argsort(turns, kind="stable")]

    def _worst_rows(self, seen: Observations) -> np.ndarray:
        """For each objective what was worst in the earlier studies."""
        found = [np.empty((0, len(seen.encoding.columns)))]
        for prior in self.priors:
            values = prior.values * seen.sign
            for column in values.T[~np.isnan(values).all(axis=0)]:
                found.append(seen.encoding.row(prior.params[int(np.nanargmax(column))])[None, :])
        return np.concatenate(found)

    def learn(self, seen: Observations, guess: bool = True) -> Worth:
        """How much hypervolume rows add, as expected; with `guess` to what partly trained ones will become, too."""
        objectives = seen.values.shape[1]
        logs = [_spans(seen.values[:, j]) for j in range(objectives)]
        chosen = self._chosen(seen)
        models = [None if j in self._known else self._objective(seen, j, chosen, logs[j]) for j in range(objectives)]
        limits = [self._limit(seen, column) for column in range(seen.violations.shape[1])]
        limits += [self._failures(seen)] if seen.failed.any() else []

        def predict(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            points = _points(seen, rows)
            mean, deviation = np.empty((len(rows), objectives)), np.zeros((len(rows), objectives))
            for j, model in enumerate(models):
                if model is not None:
                    mean[:, j], deviation[:, j] = model.predict(points)
                    earlier, doubt = self._expected(seen, j, rows)
                    mean[:, j] += earlier
                    deviation[:, j] = np.hypot(deviation[:, j], doubt)
                    continue
                values = np.asarray(self._known[j]([seen.encoding.params(row) for row in rows]), float) * seen.sign[j]
                mean[:, j] = np.log(values) if logs[j] else values
            return mean, deviation

        full = seen.feasible & (seen.fidelity >= 1.0)
        believed = [seen.values[full]]
        guessed = np.concatenate([seen.running, seen.unfinished_rows() if guess else seen.running[:0]])
        if len(guessed):
            # What is under way counts as found where it is expected, so that its neighbours promise little.
            mean, _ = predict(guessed)
            believed.append(np.where(logs, np.exp(np.where(logs, mean, 0.0)), mean))
            for j, model in enumerate(models):
                if model is not None:
                    apart = mean[:, j] - self._expected(seen, j, guessed)[0]
                    models[j] = self._objective(seen, j, chosen, logs[j], (_points(seen, guessed), apart))
        points = np.concatenate(believed)
        everything = np.concatenate([seen.values[seen.complete], *believed[1:]])
        if len(bad := self._worst_rows(seen)):
            # Trials that begin on an earlier front do not show how far the objectives reach.
            mean, _ = predict(bad)
            everything = np.concatenate([everything, np.where(logs, np.exp(np.where(logs, mean, 0.0)), mean)])
        worst, best = everything.max(axis=0), everything.min(axis=0)
        reference = worst + 1e-3 * np.maximum(worst - best, 1e-9 * np.maximum(np.abs(worst), 1.0))
        front = nondominated_rows(points) if len(points) else points
        most = FRONT.get(objectives, 12)
        if len(front) > most:
            front = front[np.sort(self.rng.permutation(len(front))[:most])]
        lower, upper = free_boxes(front, reference)

        def worth(rows: np.ndarray) -> np.ndarray:
            mean, deviation = predict(rows)
            found = expected_improvement(mean, deviation, logs, lower, upper)
            points = _points(seen, rows)
            for limit in limits:
                if limit is not None:
                    centre, spread = limit.predict(points)
                    found = found * ndtr(-centre / spread)
            return np.asarray(found)

        return worth

    def _chosen(self, seen: Observations) -> np.ndarray:
        """Indices of the complete trials that models are made of."""
        complete = np.flatnonzero(seen.complete)
        if len(complete) <= MODEL_ON:
            return complete
        order = np.argsort(domination_counts(seen.values[complete]), kind="stable")
        best, rest = order[: MODEL_ON // 2], order[MODEL_ON // 2 :]
        return np.asarray(complete[np.concatenate([best, self.rng.permutation(rest)[: MODEL_ON - len(best)]])])

    def _objective(
        self,
        seen: Observations,
        objective: int,
        chosen: np.ndarray,
        log: bool,
        believed: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> _Quantity:
        """A model of one objective, or of what earlier studies leave of it; `believed` points count as observed."""
        few = 1.0 if (seen.fidelity >= 1.0).all() else FEW
        values = _transformed(seen.values[chosen, objective], log, few)
        if self.priors and believed is None:
            self._weigh(seen, objective, chosen, values, log)
        points = _points(seen, seen.rows[chosen], seen.fidelity[chosen])
        alone = f"objective {objective}"
        if objective not in self._shares:
            return self._quantity(alone, seen, points, values, log, believed)
        left = values - self._expected(seen, objective, seen.rows[chosen])[0]
        found = self._quantity(f"{alone} after others", seen, points, left, log, believed)
        if believed is None:
            without = self._quantity(alone, seen, points, values, log)
            if without.evidence(len(values)) > found.evidence(len(values)):
                del self._shares[objective]
                return without
        return found

    def _limit(self, seen: Observations, column: int) -> _Quantity | None:
        """A model of how far a constraint is violated, None while too little is known."""
        values = seen.violations[:, column]
        known = np.flatnonzero(~np.isnan(values))[-MODEL_ON:]
        if len(known) < 2:
            return None
        spread = np.median(np.abs(values[known])) or np.abs(values[known]).max() or 1.0
        values = np.clip(values[known] / spread, -3.0, 3.0)  # only the sign counts in the end
        points = _points(seen, seen.rows[known], seen.fidelity[known])
        return self._quantity(f"constraint {column}", seen, points, values, False)

    def _failures(self, seen: Observations) -> _Quantity | None:
        """A model of failing, on a scale of -1 (works) to 1; what broke a constraint did not fail."""
        broken = (seen.violations > 0).any(axis=1)
        known = np.flatnonzero(seen.complete | (seen.failed & ~broken))[-MODEL_ON:]
        values = np.where(seen.complete[known], -1.0, 1.0)
        if len(known) < 2 or values.max() < 0:
            return None
        points = _points(seen, seen.rows[known], seen.fidelity[known])
        return self._quantity("failures", seen, points, values, False)

    def _quantity(
        self,
        name: str,
        seen: Observations,
        points: np.ndarray,
        values: np.ndarray,
        log: bool,
        believed: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> _Quantity:
        owner = seen.encoding.owner
        if points.shape[1] > len(owner):
            owner = np.append(owner, len(seen.encoding.columns))
        # The level of a constraint or failure counts: far from all trials it is "as usual", not "as on average".
        centre, scale = float(values.mean()), float(values.std()) or 1.0
        standard = (values - centre) / scale
        parameters = int(owner.max()) + 1
        last, found = self._fitted.get(name, (0, Hyperparameters.usual(parameters)))
        if len(found.weights) != parameters:
            last, found = 0, Hyperparameters.usual(parameters)
        if len(values) >= last * REFIT + 1:
            some = self.rng.permutation(len(values))[:FIT_ON]
            found = fit(points[some], owner, standard[some], found)
            self._fitted[name] = len(values), found
        if believed is not None:
            points = np.concatenate([points, believed[0]])
            standard = np.concatenate([standard, (believed[1] - centre) / scale])
        return _Quantity(log, centre, scale, GaussianProcess(points, owner, standard, found), parameters)

    def _weigh(self, seen: Observations, objective: int, chosen: np.ndarray, values: np.ndarray, log: bool) -> None:
        """How much of each earlier study's pattern this study's trials show: ridge regression towards all of it."""
        models = []
        for number, prior in enumerate(self.priors):
            key = number, objective, log
            if key not in self._earlier or self._earlier[key].columns != len(seen.encoding.columns):
                found = self._earlier_model(seen, prior, objective, log)
                if found is None:
                    continue
                self._earlier[key] = found
            models.append(self._earlier[key])
        if models:
            points = seen.encoding.embed(seen.rows[chosen])
            patterns = np.column_stack([model.mean(points) for model in models])
            patterns = patterns - patterns.mean(axis=0)
            usual = np.full(len(models), 1.0 / len(models))
            strength = PRIOR_TRIALS * (patterns.var(axis=0).mean() + 1e-12)
            left = patterns.T @ patterns + strength * np.eye(len(models))
            share = np.linalg.solve(left, patterns.T @ (values - values.mean()) + strength * usual)
            self._shares[objective] = models, share

    def _earlier_model(self, seen: Observations, prior: Prior, objective: int, log: bool) -> _Quantity | None:
        values = np.asarray(prior.values, float)[:, objective] * seen.sign[objective]
        known = np.flatnonzero(np.isfinite(values))[:MODEL_ON]
        if len(known) < 2 or (log and values[known].min() <= 0):
            return None
        rows = np.array([seen.encoding.row(prior.params[int(place)]) for place in known])
        values = _transformed(values[known], log)
        points, owner = seen.encoding.embed(rows), seen.encoding.owner
        centre, scale = float(values.mean()), float(values.std()) or 1.0
        standard = (values - centre) / scale
        some = self.rng.permutation(len(values))[:FIT_ON]
        found = fit(points[some], owner, standard[some], Hyperparameters.usual(len(seen.encoding.columns)))
        process = GaussianProcess(points, owner, standard, found)
        return _Quantity(log, centre, scale, process, len(seen.encoding.columns))

    def _expected(
        self, seen: Observations, objective: int, rows: np.ndarray
    ) -> tuple[np.ndarray | float, np.ndarray | float]:
        """What earlier studies make one expect, as far as this study's own trials bear it out; and how unsure they are.

        0 without any.
        """
        if objective not in self._shares:
            return 0.0, 0.0
        models, share = self._shares[objective]
        points = seen.encoding.embed(rows)
        found = [model.predict(points) for model in models]
        mean = np.column_stack([mean for mean, _ in found]) @ share
        return mean, np.sqrt(np.column_stack([deviation**2 for _, deviation in found]) @ share**2)


def _points(seen: Observations, rows: np.ndarray, fidelity: np.ndarray | None = None) -> np.ndarray:
    """Embedded rows; with a dimension for the fidelity where trials differ in it, 1 where none is given."""
    points = seen.encoding.embed(rows)
    if (seen.fidelity >= 1.0).all():
        return points
    # Rungs are shares such as 1/9, 1/3 and 1: equally far from each other in logarithms.
    share = np.ones(len(rows)) if fidelity is None else 1.0 + np.log10(np.maximum(fidelity, 1e-3))
    return np.column_stack([points, share])


def _transformed(values: np.ndarray, log: bool, most: float = 1.0) -> np.ndarray:
    """Logarithms, or the values with their bad tail, at `most` such a share, cut off: it would take up the model."""
    if log:
        return np.log(values)
    middle, best = np.median(values), values.min()
    worst = max(middle + BAD_TAIL * (middle - best), np.quantile(values, 1 - most))
    return np.minimum(values, worst) if middle > best else values


def _spans(values: np.ndarray) -> bool:
    known = values[~np.isnan(values)]
    return bool(len(known) and known.min() > 0 and known.max() > SPANS * known.min())


def domination_counts(values: np.ndarray) -> np.ndarray:
    """(n,) how many of the others beat each row; 0 on the front."""
    no_worse = np.ones((len(values), len(values)), dtype=bool)
    better = np.zeros_like(no_worse)
    for column in values.T:
        no_worse &= column[:, None] <= column[None, :]
        better |= column[:, None] < column[None, :]
    return np.asarray((no_worse & better).sum(axis=0))
