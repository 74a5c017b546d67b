"""What a network computes for one input: its operators in order, with shapes, bit-widths and costs."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper, shape_inference

from ..compression.grids import bit_width
from ..core.errors import CandidateError
from .onnx_bits import COMPUTING, GraphReader

Shape = tuple[int, ...]

KINDS = {
    **dict.fromkeys(("MaxPool", "AveragePool", "LpPool"), "pool"),
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool"), "global_pool"),
    **dict.fromkeys(("Add", "Sub"), "add"),
    **dict.fromkeys(("Mul", "Div"), "multiply"),
    "Concat": "concat",
    **dict.fromkeys(
        ("Relu", "Clip", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "Gelu", "Sigmoid", "HardSigmoid", "HardSwish"),
        "activation",
    ),
    **dict.fromkeys(("Swish", "Mish", "Tanh", "Erf", "Softplus", "Softsign", "ThresholdedRelu"), "activation"),
    **dict.fromkeys(("BatchNormalization", "LayerNormalization", "InstanceNormalization"), "norm"),
    **dict.fromkeys(("GroupNormalization", "RMSNormalization", "LpNormalization"), "norm"),
    **dict.fromkeys(("Softmax", "LogSoftmax"), "softmax"),
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand", "Tile", "Transpose"), "data"),
    **dict.fromkeys(("Slice", "Split", "Gather", "GatherElements", "GatherND", "Pad"), "data"),
    **dict.fromkeys(("DepthToSpace", "SpaceToDepth"), "data"),
}
LAYER_KINDS = ("conv", "depthwise", "linear")
# Kinds that take an activation in with them.
_FUSING = (*LAYER_KINDS, "matmul", "add", "multiply", "norm")
# Nodes that say how a value is represented and compute nothing.
_ROUNDING = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Cast", "Identity", "Dropout")
# Names of what `qdq.Writer` stores: a Clip, Mul or Sub with one of these is part of a rounding.
_WRITTEN = re.compile(r"q\d+o?_\d+")


@dataclass(frozen=True)
class OperatorCall:
    """One operator of a network, for a single input; shapes have the batch dimension, which is 1.

    Attributes:
        kind: "conv", "depthwise" (one input channel a group), "linear", "matmul" (of two computed tensors), "pool",
            "global_pool", "add", "multiply", "concat", "activation", "norm", "softmax", "data" (moves values without
            computing: reshapes, slices, look-ups) or "other".
        name: the layer's module path, as in `onnx_bits`; of other operators, the name of their result.
        op_type: ONNX operator type, such as "MaxPool" or "HardSwish".
        input_shapes: of computed inputs; stored tensors are not among them.
        kernel, stride, dilation: one number for each spatial dimension; () where an operator has none.
        padding: at the beginning of each spatial dimension, then at the end of each.
        groups: of a convolution.
        weight_bits, activation_bits: widths of a layer's weights and of the operator's first input as the graph
            rounds them; 32 where it does not.
        macs: multiply-accumulates; 0 for kinds other than "conv", "depthwise", "linear" and "matmul".
        weight_bytes: of the stored weights, biases excluded; of other operators, of what they read from the file.
        fused: the activation that alone takes the output and is listed here only, such as "relu", "relu6" or
            "hardswish"; "" for none, or where the rounding that follows does it.
    """

    kind: str
    name: str
    op_type: str
    input_shapes: tuple[Shape, ...]
    output_shape: Shape
    kernel: Shape = ()
    stride: Shape = ()
    padding: Shape = ()
    dilation: Shape = ()
    groups: int = 1
    weight_bits: float = 32
    activation_bits: float = 32
    macs: int = 0
    weight_bytes: int = 0
    fused: str = ""

    @property
    def contraction(self) -> int:
        """Products that are summed for one output value: kernel elements times the input channels of a group."""
        return self.macs // max(1, math.prod(self.output_shape))

    @property
    def channels(self) -> int:
        """Output channels of a layer; columns of a matrix product."""
        return self.output_shape[1] if self.kind in ("conv", "depthwise") else self.output_shape[-1]

    @property
    def positions(self) -> int:
        """Output values of each channel: pixels, tokens, rows."""
        return math.prod(self.output_shape) // max(1, self.channels)

    @property
    def weights(self) -> int:
        """Weights of a layer, biases excluded; 0 for other kinds."""
        return self.contraction * self.channels if self.kind in LAYER_KINDS else 0


@dataclass(frozen=True)
class Step:
    """An operator with the values that it takes and makes, by which activations find what they follow."""

    call: OperatorCall
    inputs: tuple[Any, ...]
    output: Any


def total_macs(calls: Iterable[OperatorCall]) -> int:
    """Multiply-accumulates of the convolutions and linear layers, as `compression.graph.find_layers` counts them.

    Products of two computed tensors, as in attention, are not among these; their own `macs` tell them.
    """
    return sum(call.macs for call in calls if call.kind in LAYER_KINDS)


def read_operators(path: Path) -> tuple[OperatorCall, ...]:
    """The operators that an ONNX file runs for one input, in order.

    Nodes that bring weights or rounded values back to float32 are no operators, nor is what no output depends on.

    Raises:
        CandidateError: no readable ONNX file, or a shape in it depends on the values that it computes.
    """
    try:
        proto = onnx.load(str(path), load_external_data=False)
    except (OSError, DecodeError) as error:
        raise CandidateError(f"{path} is no readable ONNX file: {error}") from error
    return operators_in_graph(proto)


def operators_in_graph(proto: onnx.ModelProto) -> tuple[OperatorCall, ...]:
    """The same, of a graph in memory."""
    steps, results = steps_in_graph(proto)
    return fuse(steps, results)


def steps_in_graph(proto: onnx.ModelProto) -> tuple[list[Step], list[str]]:
    """The same before activations and biases join what they follow; also the values that the network returns.

    A step's output is the value that its node makes; its inputs are what others made, apart from their rounding.
    """
    graph = proto.graph
    shapes = _infer_shapes(proto)
    reader = GraphReader(graph)
    computed = {entry.name for entry in graph.input if entry.name not in reader.stored}
    # What a value is apart from its rounding.
    plain: dict[str, str] = {}
    steps = []
    for node in _live(graph):
        taken = [value for value in node.input if value in computed]
        if not taken or node.op_type in ("Shape", "Size"):
            continue
        sources = tuple(plain.get(value, value) for value in taken)
        written = any(_WRITTEN.fullmatch(value) for value in node.input if value in reader.stored)
        if node.op_type in _ROUNDING or written:
            computed.add(node.output[0])
            plain[node.output[0]] = sources[0]
            continue
        computed.update(node.output)
        call = _call(node, taken, shapes, reader, computed)
        steps.append(Step(call, sources, node.output[0]))
    return steps, [plain.get(entry.name, entry.name) for entry in graph.output]


def fuse(steps: Sequence[Step], results: Iterable[Any]) -> tuple[OperatorCall, ...]:
    """The calls of `steps`, biases and activations that alone take a layer's output in one with it.

    Activations also join additions, products and norms. A bias is the addition of a stored vector to a MatMul.

    Args:
        results: values that the network returns.
    """
    uses = Counter(value for step in steps for value in step.inputs)
    uses.update(results)
    calls: list[OperatorCall] = []
    maker: dict[Any, int] = {}
    for step in steps:
        at = maker.get(step.inputs[0]) if step.inputs else None
        if at is not None and len(step.inputs) == 1 and uses[step.inputs[0]] == 1 and not calls[at].fused:
            before = calls[at]
            bias = step.call.kind == "add" and before.kind == "linear" and before.op_type == "MatMul"
            if bias or (step.call.kind == "activation" and before.kind in _FUSING):
                calls[at] = dataclasses.replace(before, fused=step.call.fused)
                maker[step.output] = at
                continue
        maker[step.output] = len(calls)
        kept = dataclasses.replace(step.call, fused="") if step.call.kind == "activation" else step.call
        calls.append(kept)
    return tuple(calls)


def reduces_all_positions(dimensions: int, axes: Iterable[int]) -> bool:
    """Whether a mean over `axes` of a tensor leaves one value for each input and channel."""
    reduced = {axis % dimensions for axis in axes}
    if dimensions == 3:
        return reduced in ({1}, {2})  # tokens: (N, L, C); signals: (N, C, L)
    return dimensions > 3 and reduced in (set(range(2, dimensions)), set(range(1, dimensions - 1)))


def _infer_shapes(proto: onnx.ModelProto) -> dict[str, Shape]:
    """Shape of every value, for one input; symbolic dimensions are the batch."""
    single = onnx.ModelProto()
    single.CopyFrom(proto)
    del single.graph.value_info[:]
    for value in [*single.graph.input, *single.graph.output]:
        for size in value.type.tensor_type.shape.dim:
            if not size.HasField("dim_value"):
                size.dim_value = 1
    try:
        graph = shape_inference.infer_shapes(single, data_prop=True).graph
    except Exception as error:  # onnx raises its own errors, which derive from RuntimeError or ValueError
        raise CandidateError(f"the shapes in the ONNX file can't be inferred: {str(error).strip()[:200]}") from error
    shapes = {entry.name: tuple(entry.dims) for entry in graph.initializer}
    for value in [*graph.input, *graph.value_info, *graph.output]:
        sizes = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(size.HasField("dim_value") for size in sizes):
            shapes.setdefault(value.name, tuple(size.dim_value for size in sizes))
    return shapes


def _live(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes that an output of the graph depends on, in order."""
    needed = {entry.name for entry in graph.output}
    found = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            found.append(node)
    return found[::-1]


def _call(
    node: onnx.NodeProto, taken: list[str], shapes: dict[str, Shape], reader: GraphReader, computed: set[str]
) -> OperatorCall:
    """The record of one node; `taken` are its computed inputs."""

    def shape(value: str) -> Shape:
        if value not in shapes:
            raise CandidateError(f"the ONNX file leaves open the shape of {value}, at {node.op_type}")
        return shapes[value]

    settings = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
    output = shape(node.output[0])
    call = OperatorCall(
        kind=KINDS.get(node.op_type, "other"),
        name=node.name or node.output[0],
        op_type=node.op_type,
        input_shapes=tuple(shape(value) for value in taken),
        output_shape=output,
        activation_bits=bit_width(reader.activation(taken[0])),
        weight_bytes=sum(_float_bytes(reader.stored[value]) for value in node.input if value in reader.stored),
    )
    if node.op_type in COMPUTING:
        return _layer_call(call, node, settings, reader, shape, computed)
    if call.kind == "pool":
        return dataclasses.replace(call, **_window(settings, call.input_shapes[0][2:], settings["kernel_shape"]))
    if node.op_type in ("ReduceMean", "ReduceMax"):
        axes = settings.get("axes") or _integers(reader, node.input[1] if len(node.input) > 1 else "")
        if reduces_all_positions(len(call.input_shapes[0]), axes):
            return dataclasses.replace(call, kind="global_pool")
    if call.kind == "activation":
        return dataclasses.replace(call, fused=_activation(node, reader))
    return call


def _layer_call(
    call: OperatorCall,
    node: onnx.NodeProto,
    settings: dict[str, Any],
    reader: GraphReader,
    shape: Callable[[str], Shape],
    computed: set[str],
) -> OperatorCall:
    """The record of a convolution, a linear layer or a product of two computed matrices."""
    at = next((at for at in (1, 0) if node.input[at] not in computed), None)
    second = shape(node.input[1 if at is None else at])
    if node.op_type == "Conv":
        groups = int(settings.get("group", 1))
        call = dataclasses.replace(
            call,
            kind="depthwise" if groups > 1 and second[1] == 1 else "conv",
            groups=groups,
            macs=math.prod(call.output_shape) * math.prod(second[1:]),
            **_window(settings, call.input_shapes[0][2:], settings.get("kernel_shape") or second[2:]),
        )
    else:
        transposed = settings.get("transB") if at != 0 else not settings.get("transA")
        inner = second[-1] if transposed or len(second) == 1 else second[-2]
        kind = "matmul" if at is None else "linear"
        call = dataclasses.replace(call, kind=kind, macs=math.prod(call.output_shape) * inner)
    known = None if at is None else reader.weight(node.input[at])
    if known is None:
        return dataclasses.replace(call, weight_bytes=0 if at is None else 4 * math.prod(second))
    name, format = known
    bits = bit_width(format)
    stored = next(width for width in (4, 8, 16, 32) if bits <= width)
    return dataclasses.replace(
        call, name=name, weight_bits=bits, weight_bytes=math.ceil(math.prod(second) * stored / 8)
    )


def _window(settings: dict[str, Any], sizes: Shape, kernel: Sequence[int]) -> dict[str, Any]:
    """Kernel, stride, padding and dilation from a node's attributes; `sizes` are the input's, in pixels."""
    ones = (1,) * len(kernel)
    stride, dilation = tuple(settings.get("strides", ones)), tuple(settings.get("dilations", ones))
    padding = tuple(settings.get("pads", (0,) * 2 * len(kernel)))
    rule = settings.get("auto_pad", b"NOTSET").decode()
    if rule.startswith("SAME"):
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
        total = [max(0, (-(-n // s) - 1) * s + r - n) for n, s, r in zip(sizes, stride, reach, strict=True)]
        less, more = tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)
        padding = less + more if rule == "SAME_UPPER" else more + less
    return {"kernel": tuple(kernel), "stride": stride, "padding": padding, "dilation": dilation}


def _activation(node: onnx.NodeProto, reader: GraphReader) -> str:
    """ "relu6" for a Clip from 0 to 6, else the operator type in small letters."""
    if node.op_type != "Clip":
        return node.op_type.lower()
    ends = [
        float(numpy_helper.to_array(reader.stored[value])) if value in reader.stored else math.nan
        for value in node.input[1:]
    ]
    return "relu6" if ends == [0, 6] else "clip"


def _integers(reader: GraphReader, value: str) -> list[int]:
    return numpy_helper.to_array(reader.stored[value]).reshape(-1).tolist() if value in reader.stored else []


def _float_bytes(entry: TensorProto) -> int:
    """Bytes of a stored tensor of floats; 0 for single numbers and for integers, which are shapes and indices."""
    count = math.prod(entry.dims)
    widths: dict[int, int] = {
        TensorProto.FLOAT: 4,
        TensorProto.FLOAT16: 2,
        TensorProto.BFLOAT16: 2,
        TensorProto.DOUBLE: 8,
    }
    return count * widths.get(entry.data_type, 0) if count > 1 else 0
