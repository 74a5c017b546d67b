"""A rounded ONNX file as the integer network that an accelerator computes: weights, thresholds, rescaling.

Values that stream are unsigned integers u of b bits that stand for `scale * (u - zero)`. What the file computes between
two roundings becomes one step: a matrix unit's accumulator goes to the next grid by thresholds (up to 4 bits) or by a
16-bit scale, so that results may be off by one from those of a runtime that multiplies in floating point.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ..core.errors import CandidateError
from .accelerator import Fold, unit_of
from .dataflow import Layer, layers_in_graph
from .mvtu import SCALE_BITS, THRESHOLD_BITS, accumulator_bits, compute
from .onnx_bits import COMPUTING

# Operators that leave values on their grid, or take the largest of some.
KEEPING = ("Relu", "Clip", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "MaxPool", "DequantizeLinear", "Identity")


@dataclass(frozen=True)
class Values:
    """Integers 0 .. 2**bits - 1 that stand for `scale * (u - zero)`."""

    scale: float
    zero: int
    bits: int

    def integers(self, values: np.ndarray) -> np.ndarray:
        """Nearest integers of real values, halves to even."""
        return np.clip(np.rint(values / self.scale) + self.zero, 0, 2**self.bits - 1).astype(np.int64)


@dataclass(frozen=True)
class Computed:
    """One layer in integers.

    Attributes:
        layer: with the bits of the grids.
        pad: integer of positions outside the image.
        weights, thresholds: of a matrix or depthwise layer, as `mvtu.compute` takes them; columns in the order of
            windows: vertical, horizontal, channels.
        shift: right shift of its rescaling.
        rescale: of pooling (factor, offset, shift, least) and of additions (two factors, offset, shift, least).
    """

    layer: Layer
    pad: int = 0
    weights: np.ndarray | None = None
    thresholds: np.ndarray | None = None
    shift: int = 0
    rescale: tuple[int, ...] = ()


@dataclass(frozen=True)
class IntegerNetwork:
    """What `read_integers` finds.

    Attributes:
        input: grid of the network's input.
        scale, offset: of the last layer: logits are `accumulators * scale + offset`, for each class.
    """

    computed: tuple[Computed, ...]
    input: Values
    scale: np.ndarray
    offset: np.ndarray

    @property
    def layers(self) -> tuple[Layer, ...]:
        return tuple(entry.layer for entry in self.computed)


def read_integers(path: Path) -> IntegerNetwork:
    """The integer network in a file whose layers are all rounded.

    Raises:
        CandidateError: something in it is not rounded, or not as units need it; or it has no unit.
    """
    proto = onnx.load(str(path), load_external_data=False)
    return _Reader(proto).network()


class _Reader:
    def __init__(self, proto: onnx.ModelProto) -> None:
        self.layers = list(layers_in_graph(proto))
        self.input = proto.graph.input[0].name
        self.stored = {entry.name: numpy_helper.to_array(entry) for entry in proto.graph.initializer}
        self.makers = {name: node for node in proto.graph.node for name in node.output}
        self.users: dict[str, list[onnx.NodeProto]] = {}
        for node in proto.graph.node:
            for name in node.input:
                self.users.setdefault(name, []).append(node)

    def network(self) -> IntegerNetwork:
        grids = {-1: self.grid(self.input, "the network's input")}
        last = len(self.layers) - 1
        for at, layer in enumerate(self.layers[:-1]):
            grids[at] = self.grid(layer.value, layer.name)
        found = []
        for at, layer in enumerate(self.layers):
            taken = [grids[source] for source in layer.sources]
            given = grids.get(at)
            bits = given.bits if given else 0
            layer = replace(layer, bits=max(grid.bits for grid in taken), out_bits=bits)
            if layer.kind in ("matrix", "depthwise"):
                found.append(self.matrix(layer, taken[0], given))
            elif given is None:
                raise CandidateError(f"{layer.name}: an emitted network ends in a convolution or a linear layer")
            else:
                found.append(_moved(layer, taken, given))
        weights, scale, bias = self.weights(self.layers[last])
        scales = scale * taken[0].scale
        return IntegerNetwork(tuple(found), grids[-1], scales, bias - scales * taken[0].zero * weights.sum(1))

    def grid(self, value: str, name: str) -> Values:
        """How the values that follow are rounded."""
        clipped = False
        todo = [value]
        while todo:
            value = todo.pop(0)
            for node in self.users.get(value, []):
                clipped |= node.op_type == "Relu"
                if node.op_type == "QuantizeLinear":
                    return self.rounding(node, clipped, name)
                if node.op_type in KEEPING:
                    todo.append(node.output[0])
        raise CandidateError(f"{name}: its values are not rounded before they are used")

    def rounding(self, node: onnx.NodeProto, clipped: bool, name: str) -> Values:
        scale, zero = (self.stored[entry] for entry in node.input[1:3])
        if scale.size != 1 or zero.dtype not in (np.int8, np.uint8):
            raise CandidateError(f"{name}: expected values of 8 bits with one scale, got {scale.size} and {zero.dtype}")
        low, high = int(np.iinfo(zero.dtype).min), int(np.iinfo(zero.dtype).max)
        for back in self.users.get(node.output[0], []):
            for clip in self.users.get(back.output[0], []):
                clipped |= clip.op_type == "Relu"
                if clip.op_type == "Clip" and all(entry in self.stored for entry in clip.input[1:]):
                    ends = [round(float(self.stored[e]) / float(scale)) + int(zero) for e in clip.input[1:]]
                    if (ends[1] - ends[0] + 1) & (ends[1] - ends[0]) == 0:
                        low, high = ends
        bits = (high - low).bit_length()
        if clipped and int(zero) != low:
            raise CandidateError(f"{name}: expected unsigned values behind its ReLU; they are rounded as signed ones")
        return Values(float(scale), int(zero) - low, bits)

    def weights(self, layer: Layer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(integers (rows, columns), scales (rows,), biases (rows,)) of a layer."""
        node = next(node for node in self.behind(layer.value) if node.op_type in COMPUTING)
        back = self.makers.get(node.input[1])
        if back is None or back.op_type != "DequantizeLinear":
            raise CandidateError(f"{layer.name}: its weights are not integers")
        source = back.input[0]
        cast = self.makers.get(source)
        codes = self.stored[cast.input[0] if cast is not None else source].astype(np.int64)
        scale = self.stored[back.input[1]].astype(np.float64).reshape(-1)
        settings = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
        if codes.ndim == 2 and not settings.get("transB"):
            codes = codes.T
        bias = self.bias(node, layer)
        rows = len(codes)
        if codes.ndim > 2:
            codes = np.moveaxis(codes, 1, -1)
        codes = codes.reshape(rows, -1)
        source_at = layer.sources[0]
        if source_at >= 0 and self.layers[source_at].positions > 1 and codes.shape[1] != layer.columns:
            raise CandidateError(f"{layer.name}: expected {layer.columns} columns, got {codes.shape[1]}")
        return self.in_order(codes, layer), np.broadcast_to(scale, (rows,)), bias

    def in_order(self, codes: np.ndarray, layer: Layer) -> np.ndarray:
        """Columns of a linear layer behind an image, which streams with its channels last."""
        before = self.layers[layer.sources[0]] if layer.sources[0] >= 0 else None
        if before is None or layer.size != (1, 1) or before.positions == 1 or codes.shape[1] == before.outputs:
            return codes
        images = codes.reshape(len(codes), before.outputs, before.positions)
        return np.moveaxis(images, 1, 2).reshape(codes.shape)

    def bias(self, node: onnx.NodeProto, layer: Layer) -> np.ndarray:
        if len(node.input) > 2 and node.input[2]:
            return self.stored[node.input[2]].astype(np.float64)
        for user in self.users.get(node.output[0], []):
            if user.op_type == "Add":
                other = [name for name in user.input if name in self.stored]
                if other:
                    return self.stored[other[0]].astype(np.float64).reshape(-1)
        return np.zeros(layer.outputs)

    def behind(self, value: str) -> Iterator[onnx.NodeProto]:
        """The nodes that a value comes from, nearest first."""
        while value in self.makers:
            node = self.makers[value]
            yield node
            value = node.input[0]

    def matrix(self, layer: Layer, taken: Values, given: Values | None) -> Computed:
        weights, scale, bias = self.weights(layer)
        layer = replace(layer, bits=taken.bits)
        if given is None:
            return Computed(layer, taken.zero, weights)
        # The result is `factor * accumulator + add`, in steps of the next grid.
        factor = scale * taken.scale / given.scale
        add = bias / given.scale + given.zero - factor * taken.zero * weights.sum(1)
        if given.bits <= THRESHOLD_BITS:
            steps = np.arange(1, 2**given.bits)
            reached = np.ceil((steps - 0.5 - add[:, None]) / factor[:, None])
            top = 2 ** (accumulator_bits(layer.columns, layer.weight_bits, layer.bits) - 1)
            return Computed(layer, taken.zero, weights, np.clip(reached, -top, top - 1).astype(np.int64))
        shift = SCALE_BITS - 2 - math.frexp(factor.max())[1]
        if shift < 1:
            raise CandidateError(f"{layer.name}: its results are too large for 16-bit scales")
        table = np.stack([np.rint(factor * 2.0**shift), np.rint((add + 0.5) * 2.0**shift)], 1)
        return Computed(layer, taken.zero, weights, table.astype(np.int64), shift)


def _moved(layer: Layer, taken: list[Values], given: Values) -> Computed:
    """Pooling and additions."""
    if layer.kind == "max":
        return Computed(replace(layer, bits=taken[0].bits, out_bits=taken[0].bits))
    if layer.kind == "mean" and layer.before != (0, 0):
        raise CandidateError(f"{layer.name}: means over a padded image have no unit")
    count = math.prod(layer.kernel) if layer.kind == "mean" else 1
    factors = [grid.scale / given.scale / count for grid in taken]
    add = given.zero - sum(f * grid.zero * count for f, grid in zip(factors, taken, strict=True)) + 0.5
    shift = SCALE_BITS - 2 - math.frexp(max(factors))[1]
    scaled = [round(factor * 2.0**shift) for factor in factors]
    return Computed(layer, rescale=(*scaled, round(add * 2.0**shift), shift, 0))


def run_integers(network: IntegerNetwork, images: np.ndarray) -> np.ndarray:
    """Accumulators of the last layer, int64 (N, classes): what the accelerator gives.

    Args:
        images: integers on the input's grid, (N, C, H, W).
    """
    made: dict[int, np.ndarray] = {-1: np.moveaxis(images, 1, -1) if images.ndim > 2 else images[:, None, None]}
    for at, entry in enumerate(network.computed):
        layer = entry.layer
        taken = [made[source] for source in layer.sources]
        if layer.kind == "add":
            first, second, offset, shift, least = entry.rescale
            total = (taken[0] * first + taken[1] * second + offset) >> shift
            made[at] = np.clip(total, least, 2**layer.out_bits - 1)
            continue
        count = len(taken[0])
        x = taken[0].reshape(count, *layer.size, layer.channels)
        seen = windows(x, layer, entry.pad)  # (N, positions, kernel elements, channels)
        if layer.kind == "max":
            result = seen.max(2)
        elif layer.kind == "mean":
            factor, offset, shift, least = entry.rescale
            result = np.clip((seen.sum(2) * factor + offset) >> shift, least, 2**layer.out_bits - 1)
        else:
            result = _multiplied(entry, seen)
        made[at] = result.reshape(count, *layer.out, layer.outputs)
    return made[len(network.computed) - 1].reshape(len(images), -1)


def _multiplied(entry: Computed, seen: np.ndarray) -> np.ndarray:
    """Of a matrix or a depthwise layer."""
    layer, weights = entry.layer, entry.weights
    assert weights is not None
    unit = replace(unit_of(layer, Fold(1, 1)), shift=entry.shift)
    if layer.kind == "matrix":
        return compute(unit, weights, seen.reshape(-1, layer.columns), entry.thresholds)
    channels = [
        compute(
            replace(unit, mh=1), weights[c : c + 1], seen[..., c].reshape(-1, layer.columns),
            None if entry.thresholds is None else entry.thresholds[c : c + 1],
        )
        for c in range(layer.channels)
    ]  # fmt: skip
    return np.concatenate(channels, 1)


def windows(images: np.ndarray, layer: Layer, pad: int) -> np.ndarray:
    """The windows of images (N, H, W, C): (N, positions, kernel elements, C)."""
    pairs = list(zip(layer.size, layer.kernel, layer.stride, layer.dilation, layer.before, layer.out, strict=True))
    ends = [(b, max(0, (o - 1) * s + (k - 1) * d + 1 - n - b)) for n, k, s, d, b, o in pairs]
    padded = np.pad(images, [(0, 0), *ends, (0, 0)], constant_values=pad)
    rows, columns = (np.arange(o)[:, None] * s + np.arange(k) * d for _, k, s, d, _, o in pairs)
    seen = padded[:, rows[:, None, :, None], columns[None, :, None, :]]  # (N, oy, ox, ky, kx, C)
    return seen.reshape(len(images), layer.positions, -1, images.shape[-1])


def as_tables(network: IntegerNetwork) -> Mapping[str, tuple[np.ndarray, np.ndarray | None]]:
    """Weights and thresholds by the names of their units, as `fpga_rtl.emit_pipeline` takes them."""
    return {e.layer.name: (e.weights, e.thresholds) for e in network.computed if e.weights is not None}
