"""How much of each layer to compute in one cycle: the shortest interval between images that a device has room for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..core.errors import CandidateError
from .accelerator import Fold, cycles_of, unit_of, window_of
from .dataflow import LAYERS, Layer
from .fpga_resources import resources
from .mvtu import Unit
from .stream_prices import Need, need_of
from .streams import Adder, Pool

# Tries to balance look-up tables, multipliers and block RAMs against each other, for one interval.
BALANCING = 24
# Intervals are as good as the best to within this share.
PRECISION = 0.005


@dataclass(frozen=True)
class Device:
    """An FPGA.

    Attributes:
        name: in targets, as in "fpga/ecp5-85".
        family: whose prices `fpga_resources` knows: "ecp5" or "xc7".
        luts, dsps, brams: look-up tables, multipliers, blocks of 18 kbit; from the data sheet.
        clock: hertz that is assumed; None where it is predicted.
        watts: least and most that a board with it was measured to take while it computed; None where unknown.
        sheet: the data sheet.
        fill: share of the look-up tables that may be used: beyond it, routing fails or slows the clock.
    """

    name: str
    family: str
    luts: int
    dsps: int
    brams: int
    sheet: str
    clock: float | None = None
    watts: tuple[float, float] | None = None
    fill: float = 0.75


@dataclass(frozen=True)
class Folding:
    """How each layer is folded, and what the layers' units take in all.

    Attributes:
        interval: cycles from one image to the next.
        extrapolated: whether prices were used outside the range that they were fitted on.
    """

    folds: tuple[Fold, ...]
    interval: int
    need: Need
    extrapolated: bool


@dataclass(frozen=True)
class _Choices:
    """Every way to fold every layer: arrays (layers, ways); cycles of those that a layer has not are huge."""

    folds: list[list[Fold]]
    cycles: np.ndarray
    parts: np.ndarray  # (layers, ways, 3): look-up tables, multipliers, block RAMs
    extrapolated: np.ndarray


def fold_network(layers: Sequence[Layer], device: Device, others: Need | None = None) -> Folding:
    """The folding with the shortest interval that fits.

    Args:
        others: what FIFOs, converters and copies take besides.

    Raises:
        CandidateError: not even the slowest folding fits; says what is needed and what there is.
    """
    others = others or Need()
    choices = _choices(layers, device)
    budget = np.array([device.luts * device.fill - others.lut, device.dsps - others.dsp, device.brams - others.bram])
    shortest, longest = _limits(choices)
    picked = _pick(choices, longest, budget)
    if not _fits(choices, picked, budget):
        raise CandidateError(_too_large(choices, picked, others, device))
    low, high = shortest, longest
    while high > low * (1 + PRECISION) and high - low > 1:
        middle = int(math.sqrt(low * high)) if high > 2 * low else (low + high) // 2
        candidate = _pick(choices, middle, budget)
        if _fits(choices, candidate, budget):
            picked, high = candidate, middle
        else:
            low = middle
    rows = np.arange(len(layers))
    folds = tuple(ways[at] for ways, at in zip(choices.folds, picked, strict=True))
    lut, dsp, bram = choices.parts[rows, picked].sum(0)
    return Folding(
        folds,
        int(choices.cycles[rows, picked].max()),
        Need(float(lut), int(dsp), int(bram)),
        bool(choices.extrapolated[rows, picked].any()),
    )


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _choices(layers: Sequence[Layer], device: Device) -> _Choices:
    # Layers of one shape have the same choices.
    alike = {_shape(layer): None for layer in layers}
    shapes = list(alike)
    found = _choices_of(shapes, device)
    rows = [shapes.index(_shape(layer)) for layer in layers]
    return _Choices([found.folds[row] for row in rows], found.cycles[rows], found.parts[rows], found.extrapolated[rows])


def _shape(layer: Layer) -> Layer:
    """What the choices of a layer depend on."""
    return replace(layer, name="", value="", sources=())


def _choices_of(layers: Sequence[Layer], device: Device) -> _Choices:
    folds: list[list[Fold]] = []
    units: list[Unit] = []
    for layer in layers:
        lanes = _divisors(layer.channels)
        if layer.kind not in LAYERS.values():
            folds.append([Fold(lane, lane) for lane in lanes])
            continue
        pairs = [(s, p) for s in lanes for p in _divisors(layer.outputs) if layer.kind == "matrix" or s == p]
        dsps = (False, True) if layer.weight_bits > 1 and device.dsps else (False,)
        ways = [
            Fold(lane, pe, memory, dsp)
            for lane, pe in pairs
            # More products a cycle than a device has room for are no choice.
            if lane * (pe if layer.kind == "matrix" else 1) <= 4096
            for memory in ("block", "distributed")
            for dsp in dsps
        ]
        folds.append(ways)
        units += [unit_of(layer, way) for way in ways]
    found = resources(units, device.family) if units else None
    width = max(map(len, folds))
    cycles = np.full((len(layers), width), np.iinfo(np.int64).max // 2)
    parts = np.full((len(layers), width, 3), np.inf)
    outside = np.zeros((len(layers), width), bool)
    at = 0
    for row, (layer, ways) in enumerate(zip(layers, folds, strict=True)):
        cycles[row, : len(ways)] = [cycles_of(layer, way) for way in ways]
        extra = {lanes: _beside(layer, Fold(lanes, lanes), device) for lanes in {way.lanes for way in ways}}
        parts[row, : len(ways)] = [(e.lut, e.dsp, e.bram) for e in (extra[way.lanes] for way in ways)]
        if layer.kind in LAYERS.values():
            assert found is not None
            piece = slice(at, at + len(ways))
            parts[row, : len(ways)] += np.stack([found.lut[piece], found.dsp[piece], found.bram[piece]], 1)
            outside[row, : len(ways)] = found.extrapolated[piece]
            at += len(ways)
    kept = [_undominated(np.column_stack([cycles[row], parts[row]])[: len(ways)]) for row, ways in enumerate(folds)]
    width = max(map(len, kept))
    order = np.array([np.pad(ways, (0, width - len(ways)), mode="edge") for ways in kept])
    rows = np.arange(len(layers))[:, None]
    short = [[ways[at] for at in chosen] for ways, chosen in zip(folds, kept, strict=True)]
    padded = np.arange(width) >= np.array([len(ways) for ways in kept])[:, None]
    cycles = np.where(padded, np.iinfo(np.int64).max // 2, cycles[rows, order])
    return _Choices(short, cycles, parts[rows, order], outside[rows, order])


def _undominated(costs: np.ndarray) -> np.ndarray:
    """Numbers of the rows that no other row is below in everything; of equal ones the first."""
    below = (costs[:, None] <= costs[None]).all(2)
    better = below & ~(below.T & (np.arange(len(costs))[:, None] >= np.arange(len(costs))[None]))
    return np.flatnonzero(~better.any(0))


def _beside(layer: Layer, fold: Fold, device: Device) -> Need:
    """What a layer takes besides its matrix unit."""
    total = Need()
    if layer.windowed and not (layer.kind in ("max", "mean") and layer.kernel == layer.size):
        total += need_of(window_of(layer, fold), device.family)
    fold_in = layer.channels // fold.lanes
    if layer.kind == "add":
        bits = (layer.bits, layer.bits)
        total += need_of(Adder(layer.positions * fold_in, fold.lanes, bits, layer.out_bits), device.family)
    elif layer.kind in ("max", "mean"):
        count, sums = math.prod(layer.kernel), layer.kind == "mean"
        pool = Pool(layer.positions, count, fold_in, fold.lanes, layer.bits, layer.out_bits, sums)
        total += need_of(pool, device.family)
    return total


def _limits(choices: _Choices) -> tuple[int, int]:
    """The shortest and the longest interval that foldings can have."""
    real = choices.cycles < np.iinfo(np.int64).max // 2
    shortest = np.where(real, choices.cycles, np.iinfo(np.int64).max // 2).min(1).max()
    return int(shortest), int(np.where(real, choices.cycles, 0).max())


def _pick(choices: _Choices, interval: int, budget: np.ndarray) -> np.ndarray:
    """For each layer a way that keeps to the interval: the one at which the fullest of the three is least full.

    Prices of the three are raised where they are over the budget, until they balance (multiplicative weights).
    """
    rows = np.arange(len(choices.cycles))
    shares = choices.parts / np.maximum(budget, 1e-9)
    barred = np.where(choices.cycles > interval, np.inf, 0)
    weights = np.ones(3)
    best, least = np.zeros(len(rows), np.int64), np.inf
    for number in range(BALANCING):
        costs = np.where(np.isinf(barred), np.inf, np.nan_to_num(shares, posinf=1e30) @ weights)
        picked = costs.argmin(1)
        use = choices.parts[rows, picked].sum(0)
        full = np.where(use > 0, use / np.maximum(budget, 1e-9), 0)
        if full.max() < least:
            best, least = picked, full.max()
        if full.max() <= 1:
            break
        weights *= (np.maximum(full, 0.02) / full.max()) ** (1 / (1 + number / 6))
        weights /= weights.sum()
    return best if least <= 1 else _repaired(choices, best, np.isinf(barred), budget)


def _repaired(choices: _Choices, picked: np.ndarray, barred: np.ndarray, budget: np.ndarray) -> np.ndarray:
    """Layers changed one by one, while that brings what is used closer to the budget.

    One set of prices treats layers of one shape alike, where some of them should use what others leave.
    """
    rows, picked = np.arange(len(picked)), picked.copy()
    budget = np.maximum(budget, 1e-9)
    parts = np.where(barred[..., None], np.inf, choices.parts) / budget
    for _ in range(len(rows) * 2):
        use = parts[rows, picked]
        over = np.maximum(use.sum(0)[None, None] - use[:, None] + parts - 1, 0).sum(2)
        layer, way = np.unravel_index(over.argmin(), over.shape)
        if over[layer, way] >= np.maximum(use.sum(0) - 1, 0).sum():
            break
        picked[layer] = way
    return picked


def _fits(choices: _Choices, picked: np.ndarray, budget: np.ndarray) -> bool:
    return bool((choices.parts[np.arange(len(picked)), picked].sum(0) <= budget).all())


def _too_large(choices: _Choices, picked: np.ndarray, others: Need, device: Device) -> str:
    """What is needed at the slowest, and what there is."""
    use = choices.parts[np.arange(len(picked)), picked].sum(0) + np.array([others.lut, others.dsp, others.bram])
    have = np.array([device.luts * device.fill, device.dsps, device.brams])
    names = ("look-up tables", "multipliers", "block RAMs")
    short = [
        f"needs {math.ceil(need)} {name}, {device.name} has {int(there)}"
        + (f" ({device.fill:.0%} of {device.luts})" if name == names[0] else "")
        for need, there, name in zip(use, have, names, strict=True)
        if need > there
    ]
    return f"too large even at the slowest: {'; '.join(short)}"
