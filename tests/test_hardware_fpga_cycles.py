"""The cycle of every word that leaves a streaming accelerator, and its value, against a simulation of the circuit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from autocompress.core.errors import CandidateError
from autocompress.hardware.cycles import Node, Pipeline, solve
from autocompress.hardware.fpga_rtl import emit_pipeline
from autocompress.hardware.fpga_sim import Run, missing_simulator, simulate
from autocompress.hardware.mvtu import Unit, compute
from autocompress.hardware.streams import (
    Adder,
    Converter,
    Depthwise,
    Duplicator,
    Fifo,
    Matrix,
    Pool,
    Stage,
    Window,
)

pytestmark = pytest.mark.skipif(missing_simulator() is not None, reason=str(missing_simulator()))

IMAGES = 2
CONFIGURATIONS = 40
Tables = dict[str, tuple[np.ndarray, np.ndarray | None]]


def divisor(rng: np.random.Generator, number: int, of: int = 0) -> int:
    """A divisor of `number`, and of `of` or a multiple of it where that is given."""
    every = [d for d in range(1, number + 1) if number % d == 0 and (not of or d % of == 0 or of % d == 0)]
    return int(rng.choice(every))


def window(rng: np.random.Generator, size: tuple[int, int], channels: int, simd: int, bits: int) -> Window:
    """Any kernel, stride, dilation and padding that leave at least one position."""
    kernel = tuple(int(rng.integers(1, min(4, side) + 1)) for side in size)
    dilation = tuple(int(rng.integers(1, 3)) if side >= 2 * k else 1 for side, k in zip(size, kernel, strict=True))
    stride = tuple(int(number) for number in rng.integers(1, 4, 2))
    before = tuple(int(rng.integers(0, k)) for k in kernel)
    out = tuple(
        (side + before[i] + int(rng.integers(0, kernel[i])) - (kernel[i] - 1) * dilation[i] - 1) // stride[i] + 1
        for i, side in enumerate(size)
    )
    pad = int(rng.integers(0, 2**bits))
    return Window(simd * bits, simd, channels // simd, size, kernel, stride, dilation, before, out, pad=pad)  # type: ignore[arg-type]


def windows_of(images: np.ndarray, unit: Window) -> np.ndarray:
    """The windows of integer images (N, H, W, C): (N * positions, kernel elements * C), channels last."""
    reach = [
        (k - 1) * d + (o - 1) * s + 1
        for k, d, o, s in zip(unit.kernel, unit.dilation, unit.out, unit.stride, strict=True)
    ]
    after = [max(0, r - b - side) for r, b, side in zip(reach, unit.before, unit.size, strict=True)]
    ends = [(0, 0), *zip(unit.before, after, strict=True), (0, 0)]
    padded = np.pad(images, ends, constant_values=unit.pad)
    found = []
    for y in range(unit.out[0]):
        for x in range(unit.out[1]):
            top, left = y * unit.stride[0], x * unit.stride[1]
            rows = top + np.arange(unit.kernel[0]) * unit.dilation[0]
            columns = left + np.arange(unit.kernel[1]) * unit.dilation[1]
            found.append(padded[:, rows][:, :, columns])
    return np.stack(found, 1).reshape(len(images) * len(found), *found[0].shape[1:3], images.shape[3])


def matrix(
    rng: np.random.Generator, mw: int, mh: int, pe: int, simd: int, w: int, a: int, o: int
) -> tuple[Unit, Tables]:
    """A unit with random weights and with thresholds about where its sums lie."""
    unit = Unit(mw, mh, pe, simd, w, a, o)
    weights = rng.choice([-1, 1], (mh, mw)) if w == 1 else rng.integers(-(2 ** (w - 1)), 2 ** (w - 1), (mh, mw))
    spread = int(np.sqrt(mw) * 2 ** max(0, w - 1) * 2**a // 2) + 2
    thresholds = None
    if 0 < o <= 4:
        thresholds = np.sort(rng.integers(-spread, spread, (mh, 2**o - 1)), 1)
    elif o > 4:
        scales = rng.integers(1, max(2, (2**o << 16) // (2 * spread)), mh).clip(1, 2**15 - 1)
        thresholds = np.stack([scales, rng.integers(0, 2 ** (o + 15), mh)], 1)
    return unit, {"": (weights, thresholds)}


def values(bits: np.ndarray, unit: Unit) -> np.ndarray:
    """What the unit takes its input bits for."""
    return 2 * bits - 1 if unit.w == 1 and unit.a == 1 else bits


@dataclass
class Drawn:
    """Two layers: window, matrix, converter, FIFO, window, matrix."""

    pipeline: Pipeline
    tables: Tables
    inputs: np.ndarray
    expected: np.ndarray


def two_layers(seed: int) -> Drawn:
    rng = np.random.default_rng(seed)
    size = (int(rng.integers(3, 8)), int(rng.integers(3, 8)))
    channels, middle, last = (int(rng.choice([1, 2, 3, 4, 6, 8])) for _ in range(3))
    (w1, a1), (w2, a2) = (tuple(int(b) for b in rng.choice([1, 2, 3, 4, 8], 2)) for _ in range(2))
    pe1, simd1, pe2 = divisor(rng, middle), divisor(rng, channels), divisor(rng, last)
    simd2 = divisor(rng, middle, of=pe1)
    first = window(rng, size, channels, simd1, a1)
    unit1, table1 = matrix(rng, first.kernel[0] * first.kernel[1] * channels, middle, pe1, simd1, w1, a1, a2)
    second = window(rng, first.out, middle, simd2, a2)
    out = int(rng.choice([0, 3, 8]))
    unit2, table2 = matrix(rng, second.kernel[0] * second.kernel[1] * middle, last, pe2, simd2, w2, a2, out)
    positions = first.out[0] * first.out[1]
    converter = Converter(positions * middle // pe1, a2, pe1, simd2)
    fifo = Fifo(*converter.gives, simd2 * a2, int(rng.choice([1, 2, 3, 8, 40])), bool(rng.integers(0, 2)))
    stages: list[tuple[str, Stage]] = [
        ("window 1", first),
        ("matrix 1", Matrix(unit1, positions)),
        ("converter", converter),
        ("fifo", fifo),
        ("window 2", second),
        ("matrix 2", Matrix(unit2, second.out[0] * second.out[1])),
    ]
    nodes = tuple(Node(name, stage, (at,), (at + 1,)) for at, (name, stage) in enumerate(stages))
    images = rng.integers(0, 2**a1, (IMAGES, *size, channels))
    x = windows_of(images, first).reshape(-1, unit1.mw)
    hidden = compute(unit1, table1[""][0], values(x, unit1), table1[""][1])
    y = windows_of(hidden.reshape(IMAGES, *first.out, middle), second).reshape(-1, unit2.mw)
    expected = compute(unit2, table2[""][0], values(y, unit2), table2[""][1])
    tables = {"matrix 1": table1[""], "matrix 2": table2[""]}
    return Drawn(Pipeline(nodes, 0, len(stages)), tables, images, expected)


def simulated(drawn: Drawn, folder: Path) -> Run:
    last = drawn.pipeline.nodes[-1].stage
    signed = isinstance(last, (Matrix, Depthwise)) and last.unit.o == 0
    emit_pipeline(drawn.pipeline, drawn.tables, folder)
    return simulate(folder, drawn.pipeline, drawn.inputs, signed=signed)


def agree(drawn: Drawn, folder: Path) -> None:
    """Values of every word that leaves, and the cycles in which words are taken and leave."""
    run = simulated(drawn, folder)
    schedule = solve(drawn.pipeline, IMAGES)
    np.testing.assert_array_equal(run.results.reshape(drawn.expected.shape), drawn.expected)
    np.testing.assert_array_equal(run.left, schedule.taken[drawn.pipeline.sink])
    taken = schedule.taken[drawn.pipeline.source]
    # The simulation ends with the last result, whether or not rows that no window needs are still to be read.
    np.testing.assert_array_equal(run.taken, taken[: len(run.taken)])
    assert len(run.taken) == (taken <= run.left[-1]).sum()


@pytest.mark.parametrize(
    "seed", [pytest.param(s, marks=[] if s < 6 else [pytest.mark.slow]) for s in range(CONFIGURATIONS)]
)
def test_every_cycle_and_every_value_of_two_layers_is_the_circuits(seed: int, tmp_path: Path) -> None:
    drawn = two_layers(seed)
    agree(drawn, tmp_path)


class Late(Unit):
    """A unit whose results are believed to come one cycle later than they do."""

    @property
    def latency(self) -> int:
        return super().latency + 1


class Narrow(Unit):
    """A unit that is believed to have half the credits."""

    @property
    def depth(self) -> int:
        return max(1, super().depth // 2)


class Flat(Window):
    """A window that is believed to keep twice the rows."""

    @property
    def rows(self) -> int:
        return 2 * super().rows


def mutated(pipeline: Pipeline, at: int, stage: Stage) -> Pipeline:
    nodes = list(pipeline.nodes)
    nodes[at] = replace(nodes[at], stage=stage)
    return replace(pipeline, nodes=tuple(nodes))


def test_a_rule_that_is_off_by_one_is_noticed(tmp_path: Path) -> None:
    noticed: dict[str, int] = {}
    for seed in (0, 1, 2, 3, 6, 16):  # in the last two, the FIFO of one word is what holds the others up
        drawn = two_layers(seed)
        run = simulated(drawn, tmp_path / str(seed))
        first, second, fifo, matrix1 = (drawn.pipeline.nodes[at].stage for at in (0, 5, 3, 1))
        assert isinstance(first, Window)
        assert isinstance(second, Matrix)
        assert isinstance(matrix1, Matrix)
        assert isinstance(fifo, Fifo)
        for what, at, stage in (
            ("latency", 5, Matrix(Late(**vars(second.unit)), second.positions)),
            ("credits", 1, Matrix(Narrow(**vars(matrix1.unit)), matrix1.positions)),
            ("rows", 0, Flat(**vars(first))),
            ("depth", 3, replace(fifo, depth=fifo.depth + 1)),
            ("kind of memory", 3, replace(fifo, fast=not fifo.fast)),
        ):
            wrong = solve(mutated(drawn.pipeline, at, stage), IMAGES).taken
            same = np.array_equal(wrong[drawn.pipeline.sink], run.left)
            same &= np.array_equal(wrong[drawn.pipeline.source][: len(run.taken)], run.taken)
            noticed[what] = noticed.get(what, 0) + int(not same)
    assert noticed["latency"] == noticed["kind of memory"] == 6
    assert min(noticed.values()) >= 2, noticed


def residual(depth: int, fast: bool) -> Drawn:
    """A block with a shortcut around a depthwise layer and a matrix; then pooling, and the mean over all positions."""
    rng = np.random.default_rng(7)
    size, channels = (6, 5), 4
    around = Window(2 * 4, 2, 2, size, (3, 3), (1, 1), (1, 1), (1, 1), size, grouped=True)
    small, table1 = matrix(rng, 9, channels, 2, 1, 4, 4, 4)
    point, table2 = matrix(rng, channels, channels, 2, 2, 3, 4, 4)
    pixels = size[0] * size[1]
    halves = Window(2 * 5, 2, 2, size, (2, 2), (2, 2), (1, 1), (0, 0), (3, 2))
    rescale, mean = (3, 2, 2 + 4, 3, 1), (171, 512, 10, 0)
    nodes = (
        Node("duplicator", Duplicator(2 * pixels, 8), (0,), (1, 2)),
        Node("window", around, (1,), (3,)),
        Node("depthwise", Depthwise(small, pixels), (3,), (4,)),
        Node("matrix", Matrix(point, pixels), (4,), (5,)),
        Node("fifo", Fifo(2 * pixels, 8, depth, fast), (2,), (6,)),
        Node("adder", Adder(2 * pixels, 2, (4, 4), 5, rescale), (5, 6), (7,)),
        Node("windows", halves, (7,), (8,)),
        Node("pool", Pool(6, 4, 2, 2, 5, 5), (8,), (9,)),
        Node("mean", Pool(1, 6, 2, 2, 5, 5, sums=True, scale=mean), (9,), (10,)),
    )
    images = rng.integers(0, 16, (IMAGES, *size, channels))
    near = windows_of(images, around).reshape(-1, 9, channels)
    assert table1[""][1] is not None
    deep = (near * table1[""][0].T).sum(1)[:, :, None] >= table1[""][1]
    far = compute(point, table2[""][0], deep.sum(2), table2[""][1]).reshape(images.shape)
    total = np.clip((far * 3 + images * 2 + 6) >> 3, 1, 31)
    pooled = windows_of(total, halves).max((1, 2))
    summed = pooled.reshape(IMAGES, 6, channels).sum(1)
    expected = np.clip((summed * 171 + 512) >> 10, 0, 31)
    tables = {"depthwise": table1[""], "matrix": table2[""]}
    words = images.reshape(-1, 2) @ np.array([1, 16])  # two channels a word
    return Drawn(Pipeline(nodes, 0, 10), tables, words, expected)


@pytest.mark.parametrize(("depth", "fast"), [(30, True), (64, False), (16, True)])
def test_shortcuts_depthwise_layers_and_pooling_are_exact_too(depth: int, fast: bool, tmp_path: Path) -> None:
    drawn = residual(depth, fast)
    agree(drawn, tmp_path)


def test_a_fifo_too_small_for_its_shortcut_stops_both_the_circuit_and_the_recurrence(tmp_path: Path) -> None:
    drawn = residual(10, True)
    with pytest.raises(CandidateError, match="a FIFO is too small"):
        solve(drawn.pipeline, IMAGES)
    emit_pipeline(drawn.pipeline, drawn.tables, tmp_path)
    with pytest.raises(CandidateError, match="stuck: 0 of 4 words"):
        simulate(tmp_path, drawn.pipeline, drawn.inputs, limit=5000)
