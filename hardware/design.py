"""What is known before a new device is measured, and which few candidates to measure on it.

Candidates are described by counts of their operators. A compiler may drop some of them, and which ones it
drops is a property of the device, so there can be several rival ways of counting; measurements tell them apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..core.errors import InputError

NOISE = 0.05  # repeat noise of one measurement, as a share of it, that designs reckon with
CLOSE_TO_ZERO = 0.15  # share of the mean latency under which noise no longer shrinks with the latency
UNSEEN = 0.19  # how far a new device is from all that known ones show, as a share of how much latencies vary
SPEED = 0.5  # how open its overall speed is, as a share
EXTREMES = 0.8  # share of the samples of a greedy design that are chosen for their own uncertainty
CHOICES = 0.5  # share of the candidates that a seed puts up for choice

OPERATORS = ("skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
_CELL = re.compile(r"\|(\w+)~0\|\+\|(\w+)~0\|(\w+)~1\|\+\|(\w+)~0\|(\w+)~1\|(\w+)~2\|")


@dataclass(frozen=True)
class Features:
    """Operator counts of candidates.

    Attributes:
        countings: matrices (candidates, features), all of one shape: rival ways to count, of which a device
            follows one (one matrix is the usual case).
        usable: (candidates,); False for networks whose output does not depend on their input. They are never
            measured, and never predicted to be the fastest.
    """

    countings: tuple[np.ndarray, ...]
    usable: np.ndarray

    def __len__(self) -> int:
        return len(self.usable)

    def take(self, rows: np.ndarray | Sequence[int]) -> Features:
        """The features of some candidates."""
        return Features(tuple(matrix[rows] for matrix in self.countings), self.usable[rows])


def as_features(features: Features | np.ndarray) -> Features:
    """Check features; a single matrix (candidates, features) counts as one counting of usable candidates."""
    if not isinstance(features, Features):
        matrix = np.asarray(features, float)
        features = Features((matrix,), np.ones(len(matrix), bool))
    shapes = {np.shape(matrix) for matrix in features.countings}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 2 or shape[0] != len(features.usable) or not shape[1]:
        raise InputError("features: expected matrices (candidates, features) of one shape, one row for each candidate")
    if not all(np.isfinite(matrix).all() for matrix in features.countings):
        raise InputError("features: expected finite numbers; some are missing or infinite")
    return features


def nasbench201_features(archs: Sequence[str]) -> Features:
    """Operator counts of NAS-Bench-201 cells such as `|op~0|+|op~0|op~1|+|op~0|op~1|op~2|`, counted in three ways.

    All operators (eager frameworks run every branch); those from which the output can be reached (a converter
    drops what nobody reads); those that are also fed by the input (constants are folded, too). "none" is no
    operator. Cells whose output is not fed by the input are not usable.

    Source: Dong & Yang, arXiv:2001.00326.
    """
    chosen, running, usable = nasbench201_edges(archs)
    kinds = np.arange(len(OPERATORS))
    hot = chosen[:, :, None] == kinds
    countings = tuple((hot & mask[:, :, None]).sum(1).astype(float) for mask in running)
    return Features(countings, usable)


def nasbench201_edges(archs: Sequence[str]) -> tuple[np.ndarray, tuple[np.ndarray, ...], np.ndarray]:
    """The operators on the `EDGES` of NAS-Bench-201 cells, and which of them run.

    Returns:
        Numbers of `OPERATORS`, -1 for none, (cells, 6); whether each runs, (cells, 6), counted in the three ways of
        `nasbench201_features`; whether the output is fed by the input, (cells,).
    """
    chosen = np.array([_operators(arch) for arch in archs], int).reshape(-1, len(EDGES))
    present = chosen >= 0
    fed = np.zeros((len(chosen), 4), bool)
    read = np.zeros((len(chosen), 4), bool)
    fed[:, 0] = read[:, 3] = True
    for edge, (start, end) in enumerate(EDGES):
        fed[:, end] |= fed[:, start] & present[:, edge]
    for edge, (start, end) in reversed(list(enumerate(EDGES))):
        read[:, start] |= read[:, end] & present[:, edge]
    starts, ends = np.array(EDGES).T
    is_read = present & read[:, ends]
    return chosen, (present, is_read, is_read & fed[:, starts]), fed[:, 3]


def token_features(archs: Sequence[str]) -> Features:
    """Features of any architecture string: which token stands at which place, or how often each token occurs.

    Tokens are what lies between punctuation and spaces. Strings of one length, as in `3 0 7 8 1`, become one
    column for each pair of place and token; others become one column for each token.
    """
    texts = [re.findall(r"\w+", str(arch)) for arch in archs]
    lengths = {len(tokens) for tokens in texts}
    if not texts or lengths == {0}:
        raise InputError("architectures: expected strings with letters or digits; these are empty")
    keys = [list(enumerate(tokens)) if len(lengths) == 1 else [(0, token) for token in tokens] for tokens in texts]
    known = sorted({key for row in keys for key in row})
    column = {key: number for number, key in enumerate(known)}
    matrix = np.zeros((len(texts), len(known)))
    for number, row in enumerate(keys):
        np.add.at(matrix[number], [column[key] for key in row], 1.0)
    varies = matrix.std(0) > 0
    return Features((matrix[:, varies] if varies.any() else matrix[:, :1],), np.ones(len(texts), bool))


def architecture_features(archs: Sequence[str]) -> Features:
    """Features of NAS-Bench-201 cells where all strings are such cells, of their tokens otherwise."""
    cells = bool(len(archs)) and all(_CELL.fullmatch(str(arch)) for arch in archs)
    return nasbench201_features(archs) if cells else token_features(archs)


def _operators(arch: str) -> list[int]:
    """Number of each edge's operator, -1 for none."""
    found = _CELL.fullmatch(arch)
    names = found.groups() if found else ()
    if not names or any(name not in (*OPERATORS, "none") for name in names):
        raise InputError(f"expected a NAS-Bench-201 cell of {', '.join(OPERATORS)}, none; got '{arch}'")
    return [OPERATORS.index(name) if name in OPERATORS else -1 for name in names]


@dataclass(frozen=True)
class Prior:
    """What known devices say about the cost of each feature on a new one, latencies divided by their mean.

    Attributes:
        costs: (sources, 1 + features) of the known devices, a constant first.
        chosen: (sources,), which counting each of them follows.
        weights: how likely a new device follows each counting.
        middle: mean of the costs.
        unseen: (1 + features,), standard deviations of what known devices do not show.
        spread: covariance of a new device's costs.
    """

    costs: np.ndarray
    chosen: np.ndarray
    weights: np.ndarray
    middle: np.ndarray
    unseen: np.ndarray
    spread: np.ndarray

    def without(self, source: int) -> Prior:
        """What the other devices say."""
        return _prior(np.delete(self.costs, source, 0), np.delete(self.chosen, source), len(self.weights), self.unseen)


def source_prior(features: Features, sources: np.ndarray) -> Prior:
    """Costs of the features on the known devices, each with the counting that fits it best, and their spread.

    Args:
        sources: latencies (candidates, devices), any unit.
    """
    usable = features.usable
    shares = sources[usable] / sources[usable].mean(0)
    costs = np.zeros((shares.shape[1], features.countings[0].shape[1] + 1))
    chosen = np.zeros(shares.shape[1], int)
    best = np.full(shares.shape[1], np.inf)
    for number, matrix in enumerate(features.countings):
        found = np.linalg.lstsq(with_constant(matrix[usable]), shares, rcond=None)[0]
        errors = np.square(shares - with_constant(matrix[usable]) @ found).mean(0)
        costs[errors < best] = found.T[errors < best]
        chosen[errors < best] = number
        best = np.minimum(best, errors)
    sizes = np.std(features.countings[0][usable], axis=0)
    sizes = np.concatenate([[1.0], np.where(sizes > 0, sizes, 1.0)])
    unseen = UNSEEN * np.sqrt(np.mean(shares.var(0)) / len(sizes)) / sizes
    return _prior(costs, chosen, len(features.countings), unseen)


def _prior(costs: np.ndarray, chosen: np.ndarray, ways: int, unseen: np.ndarray) -> Prior:
    # Laplace's rule: one more device is reckoned with for each counting.
    weights = (np.bincount(chosen, minlength=ways) + 1) / (len(chosen) + ways)
    middle = costs.mean(0)
    # A new device differs from the known ones in ways that they do not show, and in its overall speed.
    spread = np.diag(unseen**2) + SPEED**2 * np.outer(middle, middle)
    if len(costs) > 1:
        spread += np.cov(costs.T)
    return Prior(costs, chosen, weights, middle, unseen, spread)


def with_constant(matrix: np.ndarray) -> np.ndarray:
    """The matrix with a column of ones in front."""
    return np.concatenate([np.ones((len(matrix), 1)), matrix], axis=1)


def noise_variance(expected: np.ndarray, share: float) -> np.ndarray:
    """Variance of single measurements where the expected latency is a share of the mean latency."""
    return np.square(share * np.maximum(expected, CLOSE_TO_ZERO)) + 0.005**2


def check_sources(features: Features, sources: np.ndarray) -> np.ndarray:
    """The table of known devices as floats (candidates, devices)."""
    table = np.asarray(sources, float)
    if table.ndim != 2 or len(table) != len(features) or table.shape[1] < 2:
        raise InputError(
            f"sources: expected latencies ({len(features)} candidates, devices) of two known devices at least, "
            f"got the shape {table.shape}"
        )
    if not np.isfinite(table).all() or (table < 0).any() or (table[features.usable].mean(0) <= 0).any():
        raise InputError("sources: expected finite, positive latencies; some are missing, infinite or negative")
    return table


def design_samples(
    features: Features | np.ndarray,
    sources: np.ndarray,
    count: int,
    *,
    method: str = "greedy",
    seed: int = 0,
    allowed: np.ndarray | None = None,
) -> np.ndarray:
    """Choose candidates to measure on a device of which nothing is known yet.

    "greedy" takes, again and again, the candidate whose latency is most uncertain given those taken before,
    in units of its noise (sequential D-optimal design): the prior of its costs comes from the known devices,
    and where rival countings disagree, that is uncertainty too. The seed decides which half of the candidates
    is up for choice. "random" draws uniformly.

    Args:
        features: counts of the candidates' operators.
        sources: latencies (candidates, devices) of known devices, any unit.
        allowed: numbers of the candidates that may be chosen; all usable ones by default.

    Returns:
        `count` different row numbers.
    """
    features = as_features(features)
    sources = check_sources(features, sources)
    pool = np.arange(len(features)) if allowed is None else np.unique(np.asarray(allowed, int))
    if len(pool) and not (pool[0] >= 0 and pool[-1] < len(features)):
        raise InputError(f"allowed: expected row numbers below {len(features)}, got {pool[0]}..{pool[-1]}")
    pool = pool[features.usable[pool]]
    if not 1 <= count <= len(pool):
        raise InputError(f"samples: expected 1 to {len(pool)} (the candidates that may be measured), got {count}")
    rng = np.random.default_rng(seed)
    if method == "random":
        return rng.choice(pool, count, replace=False)
    if method != "greedy":
        raise InputError(f"design: expected greedy or random, got '{method}'")
    pool = rng.choice(pool, max(count, round(CHOICES * len(pool))), replace=False)
    prior = source_prior(features, sources)
    return pool[_most_uncertain(features.take(pool), prior, count)]


def _most_uncertain(features: Features, prior: Prior, count: int) -> np.ndarray:
    """Rows by sequential design under the mixture of rival countings, all equally likely.

    First what is most uncertain itself (D-optimal: extreme candidates), then what makes all candidates
    together most certain (I-optimal: typical ones, which shows where the extremes mislead).
    """
    ways = [with_constant(matrix) / np.sqrt(len(features.countings)) for matrix in features.countings]
    guesses = np.stack([way @ prior.middle for way in ways], 1)
    expected = guesses.sum(1) / np.sqrt(len(ways))
    disagreement = guesses - guesses.mean(1, keepdims=True)
    # What the latencies have in common is a linear model; its covariance is the mixture's: the expected
    # covariance within a counting, and the spread of the countings' means.
    known = np.concatenate([*ways, disagreement], axis=1)
    width = len(prior.middle)
    covariance = np.eye(known.shape[1])
    for number in range(len(ways)):
        part = slice(number * width, (number + 1) * width)
        covariance[part, part] = prior.spread
    return sequential_design(known, covariance, noise_variance(expected, NOISE), count, math.ceil(EXTREMES * count))


def sequential_design(
    known: np.ndarray, covariance: np.ndarray, noise: np.ndarray, count: int, extremes: int = 0
) -> np.ndarray:
    """Rows to measure under a Bayesian linear model, one after another.

    The first `extremes` are those that are most uncertain themselves, in units of their noise (D-optimal); the
    others make all rows together most certain (I-optimal). No measurement is needed to choose.

    Args:
        known: (candidates, features), or (cases, candidates, features) of equally likely models; gains then are shares
            of each case's uncertainty.
        covariance: of the features' costs.
        noise: variance of one measurement of each candidate.
    """
    cases = known if known.ndim == 3 else known[None]
    covariances = np.repeat(covariance[None], len(cases), 0)
    moments = np.swapaxes(cases, 1, 2) @ cases
    taken: list[int] = []
    for number in range(count):
        gains = cases @ covariances
        variance = (gains * cases).sum(2)
        if number < extremes:
            score = (variance / noise).mean(0)
        else:
            shared = ((gains @ moments) * gains).sum(2) / (variance + noise)
            score = (shared / variance.sum(1, keepdims=True)).mean(0)
        score[taken] = -1
        row = int(score.argmax())
        taken.append(row)
        chosen = gains[:, row]
        lessened = chosen[:, :, None] * chosen[:, None] / (variance[:, row] + noise[row])[:, None, None]
        covariances = covariances - lessened
    return np.array(taken)
