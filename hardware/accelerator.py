"""From a network's layers and how each is folded to the pipeline of units that computes it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .cycles import Node, Pipeline, Schedule, solve
from .dataflow import Layer
from .mvtu import Unit
from .streams import Adder, Converter, Depthwise, Duplicator, Fifo, Matrix, Pool, Stage, Window

# Words of a FIFO between two layers: what the smallest LUT RAM holds. Beyond FAST words, FIFOs lie in block RAM.
DEPTH, FAST = 16, 64
# Words more than a FIFO held for one image: later images come a few cycles closer together.
SPARE = 8
# Of networks with more words in all, one image is timed, not two.
MANY_WORDS = 1_000_000
# Rounds of `solve`; ResNet-20 is exact after four.
FEW_ROUNDS = 50

Edge = tuple[int, int]  # the layer that takes, and which of its inputs


@dataclass(frozen=True)
class Fold:
    """How much of a layer is computed in one cycle.

    Attributes:
        lanes: elements of an input word: SIMD of a matrix, channels otherwise.
        pe: rows of a matrix; of other layers the same as `lanes`.
        memory: "block" or "distributed" (look-up tables): where the weights lie.
        dsp: whether it multiplies in the device's multipliers.
    """

    lanes: int
    pe: int
    memory: str = "block"
    dsp: bool = False


def cycles_of(layer: Layer, fold: Fold) -> int:
    """Cycles that a layer needs for an image, reading its windows and its image included."""
    taken = math.prod(layer.size) * layer.channels // fold.lanes
    read = layer.positions * math.prod(layer.kernel) * layer.channels // fold.lanes
    computed = read * (layer.outputs // fold.pe) if layer.kind == "matrix" else read
    return max(taken, read, computed)


def unit_of(layer: Layer, fold: Fold) -> Unit:
    """The matrix or depthwise unit of a layer."""
    simd = fold.lanes if layer.kind == "matrix" else 1
    # Depthwise units know no weights of one bit: they are stored as two.
    bits = layer.weight_bits if layer.kind == "matrix" else max(2, layer.weight_bits)
    return Unit(
        layer.columns, layer.outputs, fold.pe, simd, bits, layer.bits, layer.out_bits, dsp=fold.dsp, memory=fold.memory
    )  # fmt: skip


def window_of(layer: Layer, fold: Fold) -> Window:
    """What gives a layer its windows."""
    return Window(
        fold.lanes * layer.bits,
        fold.lanes,
        layer.channels // fold.lanes,
        layer.size,
        layer.kernel,
        layer.stride,
        layer.dilation,
        layer.before,
        layer.out,
        grouped=layer.kind == "depthwise",
    )


def build_pipeline(
    layers: Sequence[Layer], folds: Sequence[Fold], depths: Mapping[Edge, int] | None = None
) -> Pipeline:
    """The units of a network, in order.

    Args:
        depths: words of the FIFO in front of a layer's input, where they are not the usual ones.
    """
    builder = _Builder(layers, folds, depths or {})
    for at in range(len(layers)):
        builder.add_layer(at)
    return Pipeline(tuple(builder.nodes), 0, builder.ready[len(layers) - 1][0])


class _Builder:
    """Adds units one after the other; `ready` has the streams that each layer's takers still have to take."""

    def __init__(self, layers: Sequence[Layer], folds: Sequence[Fold], depths: Mapping[Edge, int]) -> None:
        self.layers, self.folds, self.depths = layers, folds, depths
        self.nodes: list[Node] = []
        self.streams = 0
        self.ready: dict[int, list[int]] = {}
        first = next(layer for layer in layers if -1 in layer.sources)
        self.input_lanes = folds[layers.index(first)].lanes
        self.input = (math.prod(first.size) * first.channels, first.bits)
        self.fan_out(-1, self.stream())

    def stream(self) -> int:
        self.streams += 1
        return self.streams - 1

    def add(self, name: str, stage: Stage, *inputs: int) -> int:
        """Add a unit; returns its (last) output."""
        outputs = tuple(self.stream() for _ in stage.gives)
        self.nodes.append(Node(name, stage, inputs, outputs))
        return outputs[-1]

    def given(self, at: int) -> tuple[int, int, int]:
        """(elements of an image, lanes, bits) of what a layer gives; of the network's input for -1."""
        if at < 0:
            return self.input[0], self.input_lanes, self.input[1]
        layer, fold = self.layers[at], self.folds[at]
        bits = layer.out_bits or unit_of(layer, fold).acc
        return layer.positions * layer.outputs, fold.pe, bits

    def fan_out(self, at: int, stream: int) -> None:
        """A stream for each that takes what a layer gives."""
        count, lanes, bits = self.given(at)
        takers = sum(layer.sources.count(at) for layer in self.layers)
        self.ready[at] = []
        for _ in range(takers - 1):
            stream = self.add("copy", Duplicator(count // lanes, lanes * bits), stream)
            self.ready[at].append(stream - 1)
        self.ready[at].append(stream)

    def connect(self, at: int, slot: int) -> int:
        """What a layer takes, in words of its width, behind a FIFO."""
        source, lanes = self.layers[at].sources[slot], self.folds[at].lanes
        count, given, bits = self.given(source)
        stream = self.ready[source].pop(0)
        if source < 0 and given == lanes:
            return stream
        name = self.layers[at].name
        between = math.lcm(given, lanes)
        for wide in (between, lanes):
            if wide != given:
                stream = self.add(f"{name}: converter", Converter(count // given, bits, given, wide), stream)
                given = wide
        depth = self.depths.get((at, slot), _usual_depth(self.layers[at], self.folds[at]))
        return self.add(f"{name}: fifo", Fifo(count // lanes, lanes * bits, depth, depth <= FAST), stream)

    def add_layer(self, at: int) -> None:
        layer, fold = self.layers[at], self.folds[at]
        taken = [self.connect(at, slot) for slot in range(len(layer.sources))]
        pixels, fold_in = layer.positions, layer.channels // fold.lanes
        if layer.kind == "add":
            bits = (layer.bits, layer.bits)
            stage: Stage = Adder(pixels * fold_in, fold.lanes, bits, layer.out_bits)
            self.fan_out(at, self.add(layer.name, stage, *taken))
            return
        whole = layer.kind in ("max", "mean") and layer.kernel == layer.size  # needs no windows: it takes each once
        if layer.windowed and not whole:
            taken = [self.add(f"{layer.name}: window", window_of(layer, fold), *taken)]
        if layer.kind in ("max", "mean"):
            positions = math.prod(layer.kernel)
            sums = layer.kind == "mean"
            stage = Pool(pixels, positions, fold_in, fold.lanes, layer.bits, layer.out_bits, sums)
        else:
            stage = (Matrix if layer.kind == "matrix" else Depthwise)(unit_of(layer, fold), pixels)
        self.fan_out(at, self.add(layer.name, stage, *taken))


def _usual_depth(layer: Layer, fold: Fold) -> int:
    """Words of a FIFO before a layer: where no window keeps the next vector while one is computed, all of that."""
    if layer.kind != "matrix" or layer.windowed:
        return DEPTH
    return _memory_depth(layer.columns // fold.lanes)


@dataclass(frozen=True)
class Timed:
    """A pipeline with FIFOs as deep as they have to be, and its times.

    Attributes:
        latency: cycles from the first word of an image to the last of its result.
        interval: cycles from one image to the next.
        exact: whether these are the times of the circuit, or (large networks) bounds that are not below by much.
    """

    pipeline: Pipeline
    latency: int
    interval: int
    exact: bool


def time_pipeline(layers: Sequence[Layer], folds: Sequence[Fold]) -> Timed:
    """Choose the depths of FIFOs in front of additions, and find when images leave.

    A FIFO that holds less than what the other branch takes before it begins would stop everything. So times are
    found with FIFOs that never fill first, and these then get what they held at most.
    """
    joins = [(at, slot) for at, layer in enumerate(layers) if layer.kind == "add" for slot in range(2)]
    depths: dict[Edge, int] = {}
    if joins:
        endless = {edge: layers[edge[0]].positions * layers[edge[0]].channels for edge in joins}
        pipeline = build_pipeline(layers, folds, endless)
        schedule = solve(pipeline, rounds=FEW_ROUNDS)
        fifos = _fifos(pipeline, layers)
        depths = {edge: _memory_depth(_held(fifos[edge], schedule) + SPARE) for edge in joins}
    pipeline = build_pipeline(layers, folds, depths)
    images = 2 if sum(pipeline.words().values()) <= MANY_WORDS else 1
    schedule = solve(pipeline, images, rounds=FEW_ROUNDS)
    left = schedule.taken[pipeline.sink].reshape(images, -1)[:, -1]
    interval = max(pipeline.interval, int(left[-1] - left[0]) if images > 1 else 0)
    return Timed(pipeline, int(left[0]) + 1, interval, schedule.exact)


def _fifos(pipeline: Pipeline, layers: Sequence[Layer]) -> dict[Edge, Node]:
    """The FIFOs by what takes from them."""
    found: dict[Edge, Node] = {}
    maker = {stream: node for node in pipeline.nodes for stream in node.outputs}
    at = {layer.name: number for number, layer in enumerate(layers)}
    for node in pipeline.nodes:
        if node.name in at and isinstance(node.stage, Adder):
            for slot, stream in enumerate(node.inputs):
                found[at[node.name], slot] = maker[stream]
    return found


def _held(fifo: Node, schedule: Schedule) -> int:
    """The most words that a FIFO held."""
    came, left = schedule.taken[fifo.inputs[0]], schedule.taken[fifo.outputs[0]]
    return int((np.arange(1, len(came) + 1) - np.searchsorted(left, came, "left")).max(initial=1))


def _memory_depth(words: int) -> int:
    """At least `words`, in sizes of memories."""
    return max(DEPTH, 1 << (words - 1).bit_length()) if words <= 512 else -(-words // 512) * 512
