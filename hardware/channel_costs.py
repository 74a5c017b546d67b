"""Costs of operators at channel counts that were not measured, from others that differ in their channels alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from .operators import OperatorCall, Shape

LANES = 16  # numbers of 32 bits in a vector register of 512; channels are filled up to whole registers
FEWEST = 4  # measured points below which nothing is fitted
UNKNOWN = 0.5  # half width of the interval, as a share, where there are too few points to tell
NEAR = 0.1  # distance in logarithms of the channels below which points count alike


def channel_axis(call: OperatorCall, shape: Shape) -> int:
    """Where a shape has its channels: second in images and signals, last in tokens and vectors."""
    return 1 if len(shape) > 3 or (call.kind in ("conv", "depthwise") and len(shape) == 3) else len(shape) - 1


def channels_of(call: OperatorCall) -> tuple[int, int]:
    """Input and output channels; of operators with several inputs, the first one's."""
    first = call.input_shapes[0] if call.input_shapes else call.output_shape
    return (
        first[channel_axis(call, first)] if first else 1,
        call.output_shape[channel_axis(call, call.output_shape)] if call.output_shape else 1,
    )


def with_channels(call: OperatorCall, inputs: int, outputs: int) -> OperatorCall:
    """The same operator for other channel counts; all inputs of sums and products get the outputs'."""
    several = len(call.input_shapes) > 1 and call.kind in ("add", "multiply")

    def changed(shape: Shape, size: int) -> Shape:
        axis = channel_axis(call, shape)
        return (*shape[:axis], size, *shape[axis + 1 :]) if shape else shape

    return dataclasses.replace(
        call,
        input_shapes=tuple(changed(shape, outputs if several else inputs) for shape in call.input_shapes),
        output_shape=changed(call.output_shape, outputs),
        groups=outputs if call.kind == "depthwise" else call.groups,
    )


def family(call: OperatorCall) -> OperatorCall:
    """What operators have in common that differ in their channels alone."""
    return dataclasses.replace(with_channels(call, 0, 0), name="", macs=0, weight_bytes=0)


@dataclass(frozen=True)
class ChannelCosts:
    """A family's costs as a function of its channels.

    Non-negative multiples of a constant, the channels, their product, and the products of channels filled up to whole
    vector registers; the misfit at measured points is carried over to those near by (inverse distance weighting,
    Shepard 1968).

    Attributes:
        channels: (points, 2), input and output channels of the measured operators.
        seconds: (points,).
        factors: of the terms; None where there are too few points, and the nearest one is scaled by its channels.
        spread: half width of a 95 % interval as a share, from leaving each point out.
    """

    channels: np.ndarray
    seconds: np.ndarray
    factors: np.ndarray | None
    spread: float

    def at(self, inputs: int, outputs: int) -> float:
        """Seconds at any channel counts."""
        wanted = np.array([[inputs, outputs]], float)
        distances = np.abs(np.log(self.channels / wanted)).sum(1)
        if self.factors is None:
            nearest = int(distances.argmin())
            return float(self.seconds[nearest] * (wanted.prod() / self.channels[nearest].prod()) ** 0.5)
        expected, fitted = _terms(wanted) @ self.factors, _terms(self.channels) @ self.factors
        usable = (fitted > 0) & (self.seconds > 0)
        if not usable.any():
            return float(expected[0])
        weights = 1 / (distances[usable] + NEAR) ** 2
        misfit = np.log(self.seconds[usable] / fitted[usable]) @ weights / weights.sum()
        return float(expected[0] * np.exp(misfit))

    def holds(self, inputs: int, outputs: int) -> bool:
        """Whether channel counts lie among those that were measured."""
        wanted = np.array([inputs, outputs])
        inside = (self.channels.min(0) <= wanted) & (wanted <= self.channels.max(0))
        return self.factors is not None and bool(inside.all())


def fit_channel_costs(channels: Sequence[tuple[int, int]], seconds: Sequence[float]) -> ChannelCosts:
    """Fit a family of operators.

    Args:
        channels: input and output channels of each measured operator.
        seconds: what each takes.
    """
    points, values = np.asarray(channels, float).reshape(-1, 2), np.asarray(seconds, float)
    costs = ChannelCosts(points, values, _factors(points, values), UNKNOWN)
    if costs.factors is None or not (values > 0).all():
        return costs
    misses = []
    for left_out in range(len(points)):
        rest = np.arange(len(points)) != left_out
        factors = _factors(points[rest], values[rest])
        other = ChannelCosts(points[rest], values[rest], factors, UNKNOWN)
        misses.append(other.at(*points[left_out].astype(int)) / values[left_out] - 1)
    return dataclasses.replace(costs, spread=2 * float(np.sqrt(np.mean(np.square(misses)))))


def _factors(channels: np.ndarray, seconds: np.ndarray) -> np.ndarray | None:
    if len(seconds) < FEWEST:
        return None
    # Relative errors count; what takes no time of its own must not count infinitely.
    weights = 1 / np.maximum(seconds, max(float(seconds.max()) * 1e-2, 1e-12))
    # Scaled to one at the largest: the terms differ by orders of magnitude.
    terms = _terms(channels)
    sizes = terms.max(0)
    return nnls(terms / sizes * weights[:, None], seconds * weights)[0] / sizes


def _terms(channels: np.ndarray) -> np.ndarray:
    filled = np.ceil(channels / LANES) * LANES
    return np.stack(
        [
            np.ones(len(channels)),
            channels[:, 0],
            channels[:, 1],
            channels.prod(1),
            channels[:, 0] * filled[:, 1],
            filled.prod(1),
        ],
        axis=1,
    )
