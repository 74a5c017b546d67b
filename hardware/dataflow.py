"""A network as layers that stream pixels to each other: what each computes, from which others, and in which bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from ..core.errors import CandidateError
from .operators import OperatorCall, Step, steps_in_graph

LAYERS = {"conv": "matrix", "linear": "matrix", "depthwise": "depthwise"}
# Activations that ascend and end in a clip, which thresholds and rescaling compute for nothing.
FREE = ("Relu", "Clip")
RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
# What a stream of pixels has at least where no layer says how its values are rounded.
DEFAULT_BITS = 8


@dataclass(frozen=True)
class Layer:
    """One step of the streaming network; sizes are (height, width).

    Attributes:
        name: the layer's module path, or the name of the result.
        kind: "matrix" (convolution or linear layer), "depthwise", "max" or "mean" (pooling) or "add".
        sources: numbers of the layers that its inputs come from; -1 for the network's input.
        channels: of the input: what a pixel has; a linear layer takes a whole image as one vector.
        outputs: output channels.
        size, out: pixels in and out.
        weight_bits, bits: of weights and of input elements.
        out_bits: of output elements; 0 for whole accumulators.
        floats: whether the file leaves the weights or the input in floating point: bits are those that it would get.
        value: what the ONNX file calls its result.
    """

    name: str
    kind: str
    sources: tuple[int, ...]
    channels: int
    outputs: int
    size: tuple[int, int]
    out: tuple[int, int]
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    before: tuple[int, int] = (0, 0)
    weight_bits: int = 0
    bits: int = DEFAULT_BITS
    out_bits: int = DEFAULT_BITS
    floats: bool = False
    value: str = ""

    @property
    def positions(self) -> int:
        """Output pixels."""
        return math.prod(self.out)

    @property
    def columns(self) -> int:
        """Of the matrix: what is summed for one output value."""
        return math.prod(self.kernel) * (1 if self.kind == "depthwise" else self.channels)

    @property
    def weights(self) -> int:
        """Stored weights; 0 for layers without."""
        return self.columns * self.outputs if self.kind in LAYERS.values() else 0

    @property
    def windowed(self) -> bool:
        """Whether pixels are taken more than once, skipped, or padded."""
        return self.kernel != (1, 1) or self.stride != (1, 1) or self.before != (0, 0) or self.size != self.out


def read_layers(path: Path) -> tuple[Layer, ...]:
    """The layers of an ONNX file, in order; the last one gives the network's result.

    Raises:
        CandidateError: no readable ONNX file, or a step that the accelerator has no unit for.
    """
    try:
        proto = onnx.load(str(path), load_external_data=False)
    except (OSError, DecodeError) as error:
        raise CandidateError(f"{path} is no readable ONNX file: {error}") from error
    return layers_in_graph(proto)


def layers_in_graph(proto: onnx.ModelProto) -> tuple[Layer, ...]:
    """The same, of a graph in memory."""
    steps, results = steps_in_graph(proto)
    layers: list[Layer] = []
    maker = {entry.name: -1 for entry in proto.graph.input}
    for step in steps:
        sources = tuple(maker[value] for value in step.inputs)
        kind = LAYERS.get(step.call.kind, step.call.kind)
        if _passes(step, layers, sources):
            maker[step.output] = sources[0]
            continue
        maker[step.output] = len(layers)
        layer = _layer(step.call, kind, sources)
        # A layer that a network runs several times is several.
        uses = sum(other.name.split(" #")[0] == layer.name for other in layers)
        layers.append(replace(layer, name=f"{layer.name} #{uses + 1}" if uses else layer.name, value=step.output))
    last = {maker[name] for name in results}
    if last != {len(layers) - 1} or not layers:
        raise CandidateError(
            "an accelerator gives one result, that of the network's last layer; got several, or another"
        )
    return _with_output_bits(layers)


def _passes(step: Step, layers: Sequence[Layer], sources: tuple[int, ...]) -> bool:
    """Whether a step needs no unit: it only clips, renames values, or adds a bias."""
    call = step.call
    if call.op_type in FREE or call.op_type in RESHAPES:
        return True
    if len(sources) == 1 and call.kind == "add" and sources[0] >= 0 and layers[sources[0]].kind == "matrix":
        return True
    return call.kind == "pool" and math.prod(call.kernel) == 1 and set(call.stride) == {1}


def _layer(call: OperatorCall, kind: str, sources: tuple[int, ...]) -> Layer:
    """The layer of a call that is one."""
    shapes = (*call.input_shapes, call.output_shape)
    if kind == "matrix" and call.kind == "linear":
        tokens = math.prod(call.output_shape[1:-1])
        return _rounded(
            Layer(call.name, kind, sources, shapes[0][-1], call.output_shape[-1], (1, tokens), (1, tokens)), call
        )
    if kind == "add" and len(sources) == 2 and shapes[0] == shapes[1] and call.op_type == "Add":
        return Layer(
            call.name, kind, sources, _channels(shapes[0]), _channels(shapes[2]), _size(shapes[0]), _size(shapes[2])
        )
    pooled = {"MaxPool": "max", "AveragePool": "mean", "GlobalMaxPool": "max", "GlobalAveragePool": "mean"}
    pooled |= {"ReduceMean": "mean", "ReduceMax": "max"}
    if call.kind == "global_pool" and len(shapes[0]) in (3, 4):
        size = _size(shapes[0])
        return Layer(
            call.name,
            pooled[call.op_type],
            sources,
            _channels(shapes[0]),
            _channels(shapes[0]),
            size,
            (1, 1),
            size,
            size,
        )
    if call.kind == "pool" and call.op_type in pooled:
        kind = pooled[call.op_type]
    elif call.kind == "conv" and call.groups > 1:
        raise CandidateError(f"the accelerator has no unit for grouped convolutions: {call.name}")
    elif call.kind == "depthwise" and call.output_shape[1] != call.input_shapes[0][1]:
        raise CandidateError(f"the accelerator has no unit for depthwise layers that add channels: {call.name}")
    elif call.kind not in ("conv", "depthwise"):
        raise CandidateError(f"the accelerator has no unit for {call.op_type}: {call.name}")
    if len(call.kernel) > 2:
        raise CandidateError(f"the accelerator has no unit for volumes: {call.name}")

    def both(values: tuple[int, ...], missing: int) -> tuple[int, int]:
        """A vertical number too where the layer is a signal's, which is an image of one row."""
        found = (missing,) * (2 - len(values)) + tuple(values)
        return found[0], found[1]

    layer = Layer(
        call.name,
        kind,
        sources,
        _channels(shapes[0]),
        _channels(shapes[1]),
        _size(shapes[0]),
        _size(shapes[1]),
        kernel=both(call.kernel, 1),
        stride=both(call.stride, 1),
        dilation=both(call.dilation, 1),
        before=both(call.padding[: len(call.kernel)], 0),
    )
    return _rounded(layer, call)


def _rounded(layer: Layer, call: OperatorCall) -> Layer:
    """A layer with the widths of a call's weights and input."""
    if layer.kind not in LAYERS.values():
        return layer
    floats = max(call.weight_bits, call.activation_bits) > DEFAULT_BITS
    widths = [min(DEFAULT_BITS, math.ceil(bits)) for bits in (call.weight_bits, call.activation_bits)]
    return replace(layer, weight_bits=widths[0], bits=widths[1], floats=floats)


def _with_output_bits(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """What a layer gives is as wide as the widest that takes it; the last one gives accumulators."""
    found = list(layers)
    for at in reversed(range(len(found))):
        takers = [layer for layer in found if at in layer.sources]
        bits = max((layer.bits for layer in takers), default=0)
        if not takers and layers[at].kind not in LAYERS.values():
            bits = DEFAULT_BITS
        found[at] = replace(found[at], out_bits=bits)
        # Pooling and additions take what they give.
        if found[at].kind not in LAYERS.values():
            found[at] = replace(found[at], bits=bits)
    return tuple(found)


def _channels(shape: tuple[int, ...]) -> int:
    return shape[1]


def _size(shape: tuple[int, ...]) -> tuple[int, int]:
    """(height, width) of an image, or (1, length) of a signal."""
    return (shape[2], shape[3]) if len(shape) == 4 else (1, math.prod(shape[2:]))
