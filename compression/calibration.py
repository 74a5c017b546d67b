"""Which range of activations a grid should cover, found on training inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..core.types import Task
from ..tasks.data import normalise
from .grids import SHARES, Grid

CALIBRATORS = ("max", "percentile", "entropy", "mse")
BATCH = 64
# Values of a tensor that the search for the smallest squared error looks at.
KEPT = 65536

Range = tuple[float, float]
MakeGrid = Callable[[float, float], Grid]


class Observer(Protocol):
    """Sees one tensor, batch by batch, and says which range its grid should cover."""

    def see(self, values: np.ndarray) -> None:
        """Take in a batch of values, float32."""
        ...

    def range(self, levels: int, make: MakeGrid) -> Range:
        """Low and high end for a grid of about `levels` values that `make(low, high)` makes."""
        ...


class MaxObserver:
    """Everything that was seen."""

    def __init__(self) -> None:
        self.low, self.high = np.inf, -np.inf

    def see(self, values: np.ndarray) -> None:
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))

    def range(self, levels: int, make: MakeGrid) -> Range:
        return self.low, self.high


class PercentileObserver:
    """From percentile 100 - p to p, averaged over batches."""

    def __init__(self, percentile: float) -> None:
        self.shares = (1 - percentile / 100, percentile / 100)
        self.ends: list[tuple[float, float]] = []

    def see(self, values: np.ndarray) -> None:
        low, high = np.quantile(values, self.shares)
        self.ends.append((float(low), float(high)))

    def range(self, levels: int, make: MakeGrid) -> Range:
        return sum(low for low, _ in self.ends) / len(self.ends), sum(high for _, high in self.ends) / len(self.ends)


class EntropyObserver:
    """The range whose rounded histogram diverges least from the true one (Kullback-Leibler).

    The algorithm is that of `onnxruntime.quantization.calibrate.HistogramCollector`, after Migacz, "8-bit inference
    with TensorRT", GTC 2017. The number of bins must be well above that of the levels: with as many there is just one
    range to choose from.

    Attributes:
        bins: of the histogram of the first batch, over both signs; wider batches add some of the same width.
    """

    def __init__(self, bins: int = 2048) -> None:
        self.bins = bins
        self.counts = np.zeros(bins, np.int64)
        self.end, self.low, self.high = 0.0, np.inf, -np.inf

    def see(self, values: np.ndarray) -> None:
        low, high = float(values.min()), float(values.max())
        end = max(abs(low), abs(high))
        if end > self.end > 0:
            width = 2 * self.end / len(self.counts)
            more = int((end - self.end) // width + 1)
            self.end += more * width
            self.counts = np.pad(self.counts, more)
        elif end > self.end:
            self.end = end
        self.counts += np.histogram(values, len(self.counts), range=(-self.end, self.end))[0]
        self.low, self.high = min(self.low, low), max(self.high, high)

    def range(self, levels: int, make: MakeGrid) -> Range:
        low, high = entropy_range(self.counts, self.end, max(2, min(128, levels // 2)))
        return max(low, self.low), min(high, self.high)


def entropy_range(counts: np.ndarray, end: float, levels: int) -> Range:
    """Of all ranges around the middle of a histogram over [-end, end], that with the smallest divergence."""
    edges = np.linspace(-end, end, len(counts) + 1)
    middle, half = len(counts) // 2, levels // 2
    best, found = np.inf, (-end, end)
    for reach in range(half, middle + 1):
        first, last = middle - reach, min(middle + reach + 1, len(counts))
        inside = counts[first:last]
        true = inside.copy()
        true[0] += counts[:first].sum()
        true[-1] += counts[last:].sum()
        divergence = _divergence(true, _rounded(inside, true != 0, levels))
        if divergence < best:
            best, found = divergence, (float(edges[first]), float(edges[last]))
    return found


def _rounded(counts: np.ndarray, filled: np.ndarray, levels: int) -> np.ndarray:
    """The histogram after merging its bins into `levels` and spreading each evenly over those that were filled."""
    width = len(counts) // levels
    starts = np.arange(levels) * width
    merged = np.add.reduceat(counts, starts)
    # The last level counts what is left over too, but spreads it over its own width alone.
    filled_in = filled[: levels * width].reshape(levels, width).sum(1)
    each = np.where(filled_in > 0, merged / np.maximum(filled_in, 1), 0).astype(np.int64)
    spread = np.zeros(len(counts), np.int64)
    spread[: levels * width] = np.repeat(each, width)
    return spread


def _divergence(true: np.ndarray, rounded: np.ndarray) -> float:
    pair = []
    for counts in (true, rounded):
        empty = counts == 0
        if empty.all():
            return np.inf
        smooth = counts.astype(np.float32)
        smooth += np.where(empty, 1e-4, -1e-4 * empty.sum() / (~empty).sum()).astype(np.float32)
        pair.append(smooth / smooth.sum())
    p, q = pair
    return float(np.sum(p * np.log(p / q)))


class ErrorObserver:
    """The share of the whole range with the smallest squared error of rounding, on a sample of the values."""

    def __init__(self, seed: int) -> None:
        self.widest = MaxObserver()
        self.rng = np.random.default_rng(seed)
        self.kept: list[np.ndarray] = []

    def see(self, values: np.ndarray) -> None:
        self.widest.see(values)
        flat = values.reshape(-1)
        self.kept.append(flat if len(flat) <= KEPT // 4 else self.rng.choice(flat, KEPT // 4, replace=False))

    def range(self, levels: int, make: MakeGrid) -> Range:
        values = np.concatenate(self.kept)
        if len(values) > KEPT:
            values = self.rng.choice(values, KEPT, replace=False)
        sample = torch.from_numpy(values)
        low, high = self.widest.low, self.widest.high
        errors = [float((make(low * s, high * s).round(sample) - sample).square().mean()) for s in SHARES]
        share = SHARES[int(np.argmin(errors))]
        return low * share, high * share


def make_observer(calibrator: str, percentile: float, seed: int) -> Observer:
    """The observer for a calibrator's name."""
    makers: dict[str, Callable[[], Observer]] = {
        "max": MaxObserver,
        "percentile": lambda: PercentileObserver(percentile),
        "entropy": EntropyObserver,
        "mse": lambda: ErrorObserver(seed),
    }
    return makers[calibrator]()


def calibration_batches(task: Task, samples: int, seed: int = 0) -> Iterator[Tensor]:
    """Inputs of the training split as a model sees them, `samples` of them in batches; always the same ones."""
    train = task.data.train
    picked = np.random.default_rng(seed).permutation(len(train))[:samples]
    for start in range(0, len(picked), BATCH):
        yield torch.from_numpy(normalise(task.data, train.inputs[np.sort(picked[start : start + BATCH])]))


def observe(
    model: nn.Module, sides: Mapping[str, tuple[str, ...]], batches: Iterator[Tensor], make: Callable[[], Observer]
) -> dict[tuple[str, str], Observer]:
    """Run `model` on the batches; observers of the named layers' inputs and outputs, by (layer, side).

    Args:
        sides: for each layer what to look at: "input", "output".
    """
    found = {(name, side): make() for name, which in sides.items() for side in which}

    def hook(name: str) -> Any:
        def see(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            for side in sides[name]:
                found[name, side].see((inputs[0] if side == "input" else output).detach().numpy())

        return see

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_hook(hook(name)) for name in sides]
    try:
        with torch.no_grad():
            for batch in batches if sides else ():
                model.eval()(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found
