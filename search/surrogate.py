"""Gaussian processes over embedded parameters: what a sampler believes about candidates that it has not seen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.optimize import minimize

FIT_ON = 250  # observations that length scales are fitted to; more cost time and change little
JITTER = 1e-6
WEIGHT_SPREAD, NOISE_SPREAD, SIGNAL_SPREAD = 1.5, 1.5, 1.0  # standard deviations of the priors, in logarithms
NOISE_CENTRE = np.log(1e-2)


@dataclass(frozen=True)
class Hyperparameters:
    """Of a Matérn 5/2 kernel with a weight (inverse squared length scale) for each parameter, beside a linear one.

    Attributes:
        weights: (d,), for the squared distances of the parameters.
        signal, linear, noise: variances.
    """

    weights: np.ndarray
    signal: float
    linear: float
    noise: float

    @classmethod
    def usual(cls, parameters: int) -> Hyperparameters:
        """The centre of the priors: the more parameters, the less each one matters."""
        return cls(np.full(parameters, 2.0 / max(parameters, 1)), 1.0, 0.3, float(np.exp(NOISE_CENTRE)))

    def vector(self) -> np.ndarray:
        """Logarithms, for an optimiser."""
        return np.log(np.concatenate([self.weights, [self.signal, self.linear, self.noise]]))

    @classmethod
    def from_vector(cls, vector: np.ndarray) -> Hyperparameters:
        values = np.exp(vector)
        return cls(values[:-3], float(values[-3]), float(values[-2]), float(values[-1]))


class GaussianProcess:
    """Posterior of one quantity, conditioned on observations.

    Args:
        embedded: (n, columns) observed points; squared distances between rows are those of the parameters.
        owner: (columns,) index of the parameter that each column belongs to.
        values: (n,) observed, standardised.

    Attributes:
        evidence: logarithm of the observations' density, but for a constant.
    """

    def __init__(self, embedded: np.ndarray, owner: np.ndarray, values: np.ndarray, found: Hyperparameters) -> None:
        self._owner, self._found = owner, found
        self._points = self._scaled(embedded)
        self._plain = embedded / _parameters(owner)
        covariance = self._kernel(self._points, self._plain)
        covariance[np.diag_indices_from(covariance)] += found.noise + JITTER
        self._factor = cholesky(covariance, lower=True, check_finite=False)
        self._solution = cho_solve((self._factor, True), values, check_finite=False)
        self.evidence = float(-0.5 * values @ self._solution - np.log(np.diag(self._factor)).sum())

    def mean(self, embedded: np.ndarray) -> np.ndarray:
        """Mean at (m, columns) points."""
        cross = self._kernel(self._scaled(embedded), embedded / _parameters(self._owner))
        return np.asarray(cross.T @ self._solution)

    def predict(self, embedded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation (both (m,)) of the noise-free value at (m, columns) points."""
        points, plain = self._scaled(embedded), embedded / _parameters(self._owner)
        cross = self._kernel(points, plain)
        mean = cross.T @ self._solution
        reduced = solve_triangular(self._factor, cross, lower=True, check_finite=False)
        own = self._found.signal + self._found.linear * np.sum(plain * embedded, axis=1)
        variance = own - np.sum(reduced * reduced, axis=0)
        return mean, np.sqrt(np.maximum(variance, 1e-12))

    def _scaled(self, embedded: np.ndarray) -> np.ndarray:
        return embedded * np.sqrt(self._found.weights)[self._owner]

    def _kernel(self, points: np.ndarray, plain: np.ndarray) -> np.ndarray:
        own = self._points
        squared = (own * own).sum(1)[:, None] + (points * points).sum(1)[None, :] - 2.0 * own @ points.T
        linear = self._plain @ (plain * _parameters(self._owner)).T
        return self._found.signal * _matern(np.maximum(squared, 0.0))[0] + self._found.linear * linear


def _parameters(owner: np.ndarray) -> int:
    return int(owner.max()) + 1 if len(owner) else 1


def fit(embedded: np.ndarray, owner: np.ndarray, values: np.ndarray, start: Hyperparameters) -> Hyperparameters:
    """Hyperparameters of the largest posterior density, by L-BFGS from `start`.

    The gradient is that of Rasmussen & Williams, Gaussian Processes for Machine Learning (2006), eq. 5.9.
    """
    n, parameters = len(values), _parameters(owner)
    distances = np.zeros((parameters, n * n))
    for parameter in range(parameters):
        own = embedded[:, owner == parameter]
        squared = (own * own).sum(1)
        distances[parameter] = np.maximum(squared[:, None] + squared[None, :] - 2.0 * own @ own.T, 0.0).ravel()
    linear = (embedded @ embedded.T) / parameters
    centre = Hyperparameters.usual(parameters).vector()
    spread = np.array([WEIGHT_SPREAD] * parameters + [SIGNAL_SPREAD, SIGNAL_SPREAD, NOISE_SPREAD])

    def negative(vector: np.ndarray) -> tuple[float, np.ndarray]:
        found = Hyperparameters.from_vector(vector)
        matern, slope = _matern((found.weights @ distances).reshape(n, n))
        covariance = found.signal * matern + found.linear * linear
        covariance[np.diag_indices(n)] += found.noise + JITTER
        try:
            factor = cholesky(covariance, lower=True, check_finite=False)
        except np.linalg.LinAlgError:
            return 1e10, np.zeros_like(vector)
        solution = cho_solve((factor, True), values, check_finite=False)
        inverse = cho_solve((factor, True), np.eye(n), check_finite=False)
        inner = np.outer(solution, solution) - inverse
        gradient = np.concatenate(
            [
                found.weights * (distances @ (inner * found.signal * slope).ravel()),
                [
                    found.signal * np.sum(inner * matern),
                    found.linear * np.sum(inner * linear),
                    found.noise * np.trace(inner),
                ],
            ]
        )
        away = (vector - centre) / spread
        density = -0.5 * values @ solution - np.log(np.diag(factor)).sum() - 0.5 * away @ away
        return -density, -(0.5 * gradient - away / spread)

    bounds = [(-12.0, 5.0)] * len(centre)
    result = minimize(negative, start.vector(), jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 40})
    return Hyperparameters.from_vector(result.x)


def _matern(squared: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Matérn 5/2 of squared distances, and its derivative by them."""
    scaled = np.sqrt(5.0 * squared)
    decay = np.exp(-scaled)
    return (1.0 + scaled + scaled * scaled / 3.0) * decay, -5.0 / 6.0 * (1.0 + scaled) * decay
