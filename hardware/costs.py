"""What operators cost on a device: a latency model of any network, fitted to a few measured ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..core.errors import InputError
from .operators import LAYER_KINDS, OperatorCall
from .statistics import Z95

LAYERS = ("conv", "conv1x1", "depthwise", "linear")
INT8 = tuple(f"{kind}_int8" for kind in LAYERS)
KINDS = (*LAYERS, *INT8, "pool", "add", "other")
# The cost of a network: a constant, and for each kind of operator so much a call, a multiply-accumulate and a byte.
COLUMNS = (
    "network.calls",
    *(f"{kind}.{part}" for kind in (*LAYERS, *INT8) for part in ("calls", "macs", "bytes")),
    *(f"{kind}.{part}" for kind in ("pool", "add", "other") for part in ("calls", "bytes")),
)
_PARTS = {"calls": 1e-5, "macs": 1e-10, "bytes": 2e-10}  # seconds on a middling processor core
# Standard deviations of the logarithm of a cost: of all of a device together, of all calls, MACs or bytes together,
# of the float and the 8-bit form of one kind of layer, and of each alone.
_COMMON, _PART, _KIND, _ALONE = 2.0, 1.0, 0.5, 0.5
_OF_KIND = {"global_pool": "pool", "multiply": "add", "matmul": "linear", **{kind: kind for kind in ("pool", "add")}}
_FREE = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")  # runtimes move no values for these
# How many times as much as in the fitted networks still counts as among them: channels and pixels, sums of a kind.
_REACH, _AMOUNT = 2.0, 10.0


def kind_of(call: OperatorCall) -> str:
    """Which of `KINDS` an operator counts as, in floating point."""
    if call.kind == "conv":
        return "conv" if math.prod(call.kernel) > 1 else "conv1x1"
    return call.kind if call.kind in LAYERS else _OF_KIND.get(call.kind, "other")


def is_int8(call: OperatorCall) -> bool:
    """Whether a layer's weights and input have 8 bits or fewer."""
    return call.kind in LAYER_KINDS and call.weight_bits <= 8 and call.activation_bits <= 8


def call_features(networks: Iterable[Sequence[OperatorCall]], int8: bool = False, block: int = 1) -> np.ndarray:
    """Calls, multiply-accumulates and bytes of each kind of operator, (networks, len(COLUMNS)).

    Bytes are those of inputs, outputs and stored weights.

    Args:
        int8: whether 8-bit layers have columns of their own; otherwise they count as if in float32.
        block: kernels of convolutions compute so many output channels at once, hence as many for the last few.
    """
    rows = []
    for calls in networks:
        row = dict.fromkeys(COLUMNS, 0.0)
        row["network.calls"] = 1.0
        for call in calls:
            narrow = int8 and call.activation_bits <= 8
            kind = kind_of(call)
            if kind in LAYERS and narrow and is_int8(call):
                kind = f"{kind}_int8"
            row[f"{kind}.calls"] += 1
            if call.op_type not in _FREE:
                row[f"{kind}.bytes"] += _bytes(call, narrow)
            if f"{kind}.macs" in row:
                row[f"{kind}.macs"] += call.macs * _filled(call, block)
        rows.append([row[name] for name in COLUMNS])
    return np.array(rows, float).reshape(-1, len(COLUMNS))


def _filled(call: OperatorCall, block: int) -> float:
    """How many times its multiply-accumulates a layer takes in kernels for whole blocks of channels."""
    if call.kind not in ("conv", "depthwise"):
        return 1.0
    return math.ceil(call.channels / block) * block / call.channels


def _bytes(call: OperatorCall, narrow: bool) -> float:
    values = sum(map(math.prod, call.input_shapes)) + math.prod(call.output_shape)
    weights = call.weights if call.kind in LAYER_KINDS else call.weight_bytes / 4
    return (values + weights) * (1 if narrow else 4)


@dataclass(frozen=True)
class Seen:
    """What the measured networks were made of, at most; beyond it a model extrapolates.

    Attributes:
        columns: largest sum of calls, MACs or bytes of a network, by column; columns that are 0 in all are left out.
        channels: of one layer's input or output.
        pixels: of one operator's output.
        grouped: whether there were convolutions in groups that are not depthwise.
        fastest: smallest latency, in seconds.
    """

    columns: dict[str, float] = field(default_factory=dict)
    channels: int = 0
    pixels: int = 0
    grouped: bool = False
    fastest: float = 0.0


def seen_in(networks: Sequence[Sequence[OperatorCall]], latencies: Sequence[float], int8: bool = False) -> Seen:
    """The `Seen` of some networks and their latencies."""
    largest = call_features(networks, int8).max(0, initial=0).tolist()
    layers = [call for calls in networks for call in calls if call.kind in LAYER_KINDS]
    return Seen(
        {name: value for name, value in zip(COLUMNS, largest, strict=True) if value > 0},
        max((_channels(call) for call in layers), default=0),
        max((_pixels(call) for call in layers), default=0),
        any(_grouped(call) for call in layers),
        float(min(latencies)),
    )


def merge_seen(parts: Sequence[Seen]) -> Seen:
    """The `Seen` of all networks together."""
    names = [name for name in COLUMNS if any(name in part.columns for part in parts)]
    return Seen(
        {name: max(part.columns.get(name, 0.0) for part in parts) for name in names},
        max(part.channels for part in parts),
        max(part.pixels for part in parts),
        any(part.grouped for part in parts),
        min(part.fastest for part in parts),
    )


def _channels(call: OperatorCall) -> int:
    """Channels of a layer's input or output, whichever are more."""
    inputs = call.input_shapes[0]
    return max(call.channels, inputs[1] if call.kind in ("conv", "depthwise") else inputs[-1])


def _pixels(call: OperatorCall) -> int:
    return call.positions if call.kind in ("conv", "depthwise") else 1


def _grouped(call: OperatorCall) -> bool:
    return call.kind == "conv" and call.groups > 1


@dataclass(frozen=True)
class LatencyModel:
    """Latency of any network on one device, in seconds, from its operators.

    A cost is the exponential of a normally distributed number, hence never negative.

    Attributes:
        log_costs: logarithms of seconds per call, multiply-accumulate and byte, in the order of `COLUMNS`.
        covariance: of these.
        spread: half width of a 95 % interval of the logarithm of one latency, besides what the costs leave open; from
            held-out networks.
        samples: how many networks it was fitted to.
        seen: what these were made of.
        int8: whether some of these had 8-bit layers.
        block: output channels that its convolutions are computed in, as in `call_features`.
    """

    log_costs: np.ndarray
    covariance: np.ndarray
    spread: float
    samples: int
    seen: Seen
    int8: bool = False
    block: int = 1

    def features(self, networks: Iterable[Sequence[OperatorCall]]) -> np.ndarray:
        """What `predict` takes, (networks, len(COLUMNS))."""
        return call_features(networks, self.int8, self.block)

    def shares(self, networks: Iterable[Sequence[OperatorCall]]) -> np.ndarray:
        """The share of each cost in each network's latency, (networks, len(COLUMNS))."""
        return _split(self.features(networks), self.log_costs)[1]

    def predict(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Latencies in seconds and the ends of their 95 % intervals, each (networks,).

        Raises:
            InputError: not a matrix of `COLUMNS`.
        """
        features = np.asarray(features, float)
        if features.ndim != 2 or features.shape[1] != len(COLUMNS):
            raise InputError(f"features: expected a matrix of {len(COLUMNS)} columns, got the shape {features.shape}")
        latency, shares = _split(features, self.log_costs)
        half = np.hypot(Z95 * _deviation(shares, self.covariance), self.spread)
        return latency, latency * np.exp(-half), latency * np.exp(half)

    def extrapolations(self, calls: Sequence[OperatorCall]) -> tuple[str, ...]:
        """In what a network goes beyond those that the model was fitted to; () where in nothing."""
        latency, shares = _split(self.features([calls]), self.log_costs)
        own = seen_in([calls], latency.tolist(), self.int8)
        share = dict(zip(COLUMNS, shares[0].tolist(), strict=True))
        reasons = []
        for kind in KINDS:
            names = [name for name in COLUMNS if name.startswith(f"{kind}.")]
            weight = sum(share[name] for name in names)
            if f"{kind}.calls" in own.columns and f"{kind}.calls" not in self.seen.columns:
                reasons.append(_NAMED[kind])
            elif weight > 0.1 and any(
                own.columns.get(name, 0) > _AMOUNT * self.seen.columns.get(name, 0) and share[name] > 0.1
                for name in names
            ):
                reasons.append(f"more in {_NAMED[kind]} than in any fitted network")
        if own.channels > _REACH * self.seen.channels:
            reasons.append(f"layers of {own.channels} channels, fitted up to {self.seen.channels}")
        if own.pixels > _REACH * self.seen.pixels:
            reasons.append(f"{own.pixels} pixels in a layer, fitted up to {self.seen.pixels}")
        if own.grouped and not self.seen.grouped:
            reasons.append("grouped convolutions")
        if own.fastest < self.seen.fastest / _REACH:
            reasons.append("much smaller than any fitted network")
        if not self.int8 and any(is_int8(call) for call in calls):
            reasons.append("8-bit layers, timed as float")
        return tuple(reasons)


_NAMED = {
    **{"conv": "convolutions", "conv1x1": "1x1 convolutions", "depthwise": "depthwise convolutions"},
    **{"linear": "linear layers", "pool": "pooling", "add": "additions", "other": "other operators"},
}
_NAMED |= {f"{kind}_int8": f"8-bit {_NAMED[kind]}" for kind in LAYERS}


@dataclass(frozen=True)
class CostPrior:
    """Normal distribution of the logarithms of the costs before anything is measured."""

    mean: np.ndarray
    covariance: np.ndarray


def cost_prior(known: Sequence[LatencyModel] = ()) -> CostPrior:
    """What is known of a device before it is measured: the costs' sizes on others, and how they vary.

    Without known devices, round figures of a middling processor core; the overall speed is open either way, by a
    factor of 50 (95 %).
    """
    parts = [name.split(".") for name in COLUMNS]
    mean = np.log([_PARTS[part] for _, part in parts])
    if known:
        mean = np.mean([model.log_costs for model in known], 0)
    plain = [(kind.removesuffix("_int8"), part) for kind, part in parts]
    same_part = np.array([[a[1] == b[1] for b in plain] for a in plain], float)
    same_kind = np.array([[a == b for b in plain] for a in plain], float)
    covariance = _COMMON**2 + _PART**2 * same_part + _KIND**2 * same_kind + _ALONE**2 * np.eye(len(plain))
    return CostPrior(mean, covariance)


def fit_costs(
    features: np.ndarray, latencies: np.ndarray, prior: CostPrior, noise: float | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Most likely logarithms of the costs and their covariance (Laplace's approximation).

    The logarithms of latencies are normally distributed around those of the sums of costs; outliers beyond
    about two standard deviations count for less (Huber's loss).

    Args:
        features: (networks, len(COLUMNS)).
        latencies: seconds, (networks,).
        noise: standard deviation of the logarithm of one latency, one for all or for each.
    """
    from scipy.optimize import least_squares

    root = np.linalg.cholesky(prior.covariance)
    logs = np.log(latencies)

    def residuals(z: np.ndarray) -> np.ndarray:
        total, _ = _split(features, prior.mean + root @ z)
        return np.concatenate([_huber((np.log(total) - logs) / noise), z])

    def jacobian(z: np.ndarray) -> np.ndarray:
        total, shares = _split(features, prior.mean + root @ z)
        slope = _huber_slope((np.log(total) - logs) / noise) / noise
        return np.concatenate([slope[:, None] * (shares @ root), np.eye(len(z))])

    found = least_squares(residuals, np.zeros(len(prior.mean)), jac=jacobian, method="lm")
    z = found.x
    curve = np.linalg.inv(found.jac.T @ found.jac)
    return prior.mean + root @ z, root @ curve @ root.T


_BEND = 2.0


def _huber(r: np.ndarray) -> np.ndarray:
    """A residual whose square is Huber's loss."""
    size = np.abs(r)
    return np.where(size <= _BEND, r, np.sign(r) * np.sqrt(np.maximum(2 * _BEND * size - _BEND**2, 0)))


def _huber_slope(r: np.ndarray) -> np.ndarray:
    size = np.abs(r)
    return np.where(size <= _BEND, 1.0, _BEND / np.sqrt(np.maximum(2 * _BEND * size - _BEND**2, 1e-12)))


def _split(features: np.ndarray, log_costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Latencies, and the share of each cost in them."""
    parts = features * np.exp(log_costs)
    total = parts.sum(1)
    return total, parts / total[:, None]


def _deviation(shares: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """Standard deviations of the logarithms of latencies that split up into costs by `shares`."""
    return np.sqrt(((shares @ covariance) * shares).sum(1))


def held_out(
    features: np.ndarray, latencies: np.ndarray, groups: np.ndarray, prior: CostPrior, noise: float | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Latencies predicted by models that were fitted without the network's group, each (networks,).

    Args:
        groups: (networks,) number of the group that each network is left out with.

    Returns:
        Seconds, and the standard deviations of their logarithms that uncertain costs make.
    """
    predicted, deviations = np.zeros(len(latencies)), np.zeros(len(latencies))
    noises = np.broadcast_to(noise, latencies.shape)
    for group in np.unique(groups):
        out = groups == group
        log_costs, covariance = fit_costs(features[~out], latencies[~out], prior, noises[~out])
        predicted[out], shares = _split(features[out], log_costs)
        deviations[out] = _deviation(shares, covariance)
    return predicted, deviations
