"""How much hypervolume a candidate is expected to add to a Pareto front. Smaller is better in every objective here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import ndtr


def nondominated_rows(values: np.ndarray) -> np.ndarray:
    """The distinct rows of (n, objectives) that no other row beats, sorted by the first objective."""
    import moocore

    rows = np.unique(values, axis=0)
    return np.asarray(rows[moocore.is_nondominated(rows)])


def free_boxes(front: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Disjoint boxes (lower, upper), each (boxes, objectives), that fill what the front does not dominate.

    Bounded by `reference` above and open (-inf) below. A plane sweeps over the last objective; between two
    points of the front the boxes are those of the points passed so far, in one objective less.
    """
    front = front[np.all(front < reference, axis=1)]
    if len(reference) == 1:
        top = front.min(axis=0) if len(front) else reference
        return np.full((1, 1), -np.inf), top.reshape(1, 1)
    front = front[np.argsort(front[:, -1], kind="stable")]
    edges = np.concatenate([[-np.inf], front[:, -1], reference[-1:]])
    if len(reference) == 2:  # a staircase: the later, the better in the first objective
        steps = np.concatenate([reference[:1], front[:, 0]])
        return np.column_stack([np.full(len(steps), -np.inf), edges[:-1]]), np.column_stack([steps, edges[1:]])
    lowers, uppers = [], []
    for passed in range(len(front) + 1):
        low, high = edges[passed], edges[passed + 1]
        if low >= high:
            continue
        lower, upper = free_boxes(nondominated_rows(front[:passed, :-1]), reference[:-1])
        lowers.append(np.column_stack([lower, np.full(len(lower), low)]))
        uppers.append(np.column_stack([upper, np.full(len(upper), high)]))
    return np.concatenate(lowers), np.concatenate(uppers)


def expected_improvement(
    mean: np.ndarray,
    deviation: np.ndarray,
    logarithmic: Sequence[bool],
    lower: np.ndarray,
    upper: np.ndarray,
) -> np.ndarray:
    """Expected added hypervolume of points with independent objectives, exact for any number of them.

    Within a box the added volume is the product over the objectives of (u - y)+ - (l - y)+, whose expectations
    have closed forms; see Yang et al., Efficient computation of expected hypervolume improvement (2019).

    Args:
        mean, deviation: (points, objectives) of normal distributions; a deviation of 0 marks a known value.
        logarithmic: whether `mean` and `deviation` are those of an objective's logarithm (the boxes never are).
        lower, upper: of `free_boxes`.

    Returns:
        (points,)
    """
    product = np.ones((len(mean), len(lower)))
    for objective, log in enumerate(logarithmic):
        own = mean[:, objective, None], np.maximum(deviation[:, objective, None], 1e-9)
        shortfall = _lognormal_shortfall if log else _shortfall
        # Many boxes share a bound, so each bound is computed once.
        bounds, place = np.unique(np.concatenate([lower[:, objective], upper[:, objective]]), return_inverse=True)
        found = np.zeros((len(mean), len(bounds)))
        finite = np.isfinite(bounds)
        found[:, finite] = shortfall(*own, bounds[None, finite])
        product *= found[:, place[len(lower) :]] - found[:, place[: len(lower)]]
    return np.asarray(product.sum(axis=1))


def _shortfall(mean: np.ndarray, deviation: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """E[(bound - y)+] of normal y."""
    z = (bound - mean) / deviation
    return np.asarray((bound - mean) * ndtr(z) + deviation * np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi))


def _lognormal_shortfall(mean: np.ndarray, deviation: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """E[(bound - y)+] of y whose logarithm is normal; bounds are positive (Black and Scholes' put)."""
    z = (np.log(bound) - mean) / deviation
    return np.asarray(bound * ndtr(z) - np.exp(mean + 0.5 * deviation**2) * ndtr(z - deviation))


def spread_along(values: np.ndarray, count: int) -> list[int]:
    """Places of up to `count` rows of (n, objectives): the first objective's best, then always the farthest from all.

    Distances are in units of each objective's range, as nothing else is known about what a difference is worth.
    """
    if not len(values) or count < 1:
        return []
    low, high = values.min(axis=0), values.max(axis=0)
    points = (values - low) / np.where(high > low, high - low, 1.0)
    chosen = [int(np.argmin(values[:, 0]))]
    nearest = ((points - points[chosen[0]]) ** 2).sum(axis=1)
    while len(chosen) < min(count, len(values)):
        nearest[chosen] = -1.0
        chosen.append(int(np.argmax(nearest)))
        nearest = np.minimum(nearest, ((points - points[chosen[-1]]) ** 2).sum(axis=1))
    return chosen
