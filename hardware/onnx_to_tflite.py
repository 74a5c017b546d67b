"""A rounded ONNX file as a TensorFlow Lite file in 8-bit integers, with the same integers and scales.

Values have their channels last there. What the ONNX file rounds is rounded alike; what it leaves in floating point
between layers (sums, means, the logits) gets a grid too, as TensorFlow Lite's integer operators have no other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import helper, numpy_helper

from ..core.errors import CandidateError
from .operators import OperatorCall, Step, steps_in_graph
from .tflite_file import SAME, VALID, Grid, TfOperator, TfTensor, write_model

PLACEHOLDER = Grid((1.0,))
UNIT = Grid((1 / 255,), -128)
SIGMOID = Grid((1 / 256,), -128)  # what TensorFlow Lite asks for
# Operators that leave values on their grid, or take the largest of some.
KEEPING = ("Relu", "Clip", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "MaxPool", "Identity", "DequantizeLinear")
RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
NHWC = {0: 0, 1: 3, 2: 1, 3: 2}  # where the dimensions of images go


def convert(path: Path, images: np.ndarray | None = None) -> tuple[bytes, tuple[str, ...]]:
    """The TensorFlow Lite file for one input, and what had to be assumed, a few words each.

    Args:
        images: inputs as the network sees them, (N, C, H, W), by which the range is found of values that the file does
            not round; noise by default, which costs accuracy but no speed.

    Raises:
        CandidateError: no readable ONNX file, or something in it that TensorFlow Lite has no 8-bit operator for.
    """
    try:
        proto = onnx.load(str(path), load_external_data=False)
    except (OSError, DecodeError) as error:
        raise CandidateError(f"{path} is no readable ONNX file: {error}") from error
    first = _Converter(proto, {})
    found = first.convert()
    if not first.unknown:
        return found
    shape = first.input_shape
    if images is None:
        images = np.random.default_rng(0).standard_normal((8, *shape[1:])).astype(np.float32)
    return _Converter(proto, _ranges(proto, sorted(first.unknown), images)).convert()


def _ranges(proto: onnx.ModelProto, values: list[str], images: np.ndarray) -> dict[str, Grid]:
    """Grids of values by what ONNX Runtime computes for images, with zero on each."""
    import onnxruntime

    shown = onnx.ModelProto()
    shown.CopyFrom(proto)
    known = {entry.name for entry in shown.graph.output}
    shown.graph.output.extend(onnx.ValueInfoProto(name=value) for value in values if value not in known)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    low, high = dict.fromkeys(values, 0.0), dict.fromkeys(values, 1e-6)
    try:
        session = onnxruntime.InferenceSession(shown.SerializeToString(), options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        for image in images:
            for value, made in zip(values, session.run(values, {name: image[None]}), strict=True):
                low[value], high[value] = min(low[value], float(made.min())), max(high[value], float(made.max()))
    except Exception as error:  # ONNX Runtime has exceptions of its own
        raise CandidateError(f"ONNX Runtime can't run the file: {str(error).splitlines()[0][:300]}") from error
    grids = {}
    for value in values:
        scale = 1.05 * (high[value] - low[value]) / 255
        grids[value] = Grid((scale,), round(-128 - 1.05 * low[value] / scale))
    return grids


class _Converter:
    def __init__(self, proto: onnx.ModelProto, ranges: Mapping[str, Grid]) -> None:
        self.graph, self.ranges = proto.graph, ranges
        self.unknown: set[str] = set()  # values whose range has to be found
        self.input_shape: tuple[int, ...] = ()
        self.steps, self.results = steps_in_graph(proto)
        self.stored = {entry.name: numpy_helper.to_array(entry) for entry in proto.graph.initializer}
        self.makers = {name: node for node in proto.graph.node for name in node.output}
        self.users: dict[str, list[onnx.NodeProto]] = {}
        for node in proto.graph.node:
            for name in node.input:
                self.users.setdefault(name, []).append(node)
        self.tensors: list[TfTensor] = []
        self.operators: list[TfOperator] = []
        self.number: dict[str, int] = {}  # tensor of each ONNX value, apart from its rounding
        self.flat: dict[str, tuple[int, ...]] = {}  # shapes (C, H, W) of the images behind flattened values
        self.rounded: dict[tuple[int, Grid], int] = {}
        self.floats: list[str] = []

    def convert(self) -> tuple[bytes, tuple[str, ...]]:
        names = [entry.name for entry in self.graph.input if entry.name not in self.stored]
        shape = next((s.call.input_shapes[s.inputs.index(n)] for n in names for s in self.steps if n in s.inputs), ())
        if len(names) != 1 or len(shape) not in (2, 4):
            raise CandidateError(f"TensorFlow Lite: expected one input of images or vectors, got the shape {shape}")
        self.input_shape = shape
        source = self.add(names[0], shape, self.grid(names[0]))
        for step in self.steps:
            self.step(step)
        result = self.number[self.results[0]]
        assumed = []
        if self.floats:
            assumed.append(f"as if in 8 bits: {len(self.floats)} of the layers are not")
        return write_model(self.tensors, self.operators, [source], [result]), tuple(assumed)

    def step(self, step: Step) -> None:
        """Write one operator."""
        call = step.call
        if call.kind in ("conv", "depthwise"):
            self.convolution(step)
        elif call.kind == "linear":
            self.linear(step)
        elif call.op_type in ("Relu", "Clip"):
            self.activation(step)
        elif call.op_type in RESHAPES:
            self.reshape(step)
        elif call.op_type in ("MaxPool", "AveragePool"):
            self.pool(step)
        elif call.kind == "global_pool" and call.op_type in ("GlobalAveragePool", "ReduceMean"):
            axes = self.store("axes", np.array([1, 2], np.int32))
            keep = len(call.output_shape) == len(call.input_shapes[0])
            grid = self.grid(step.output, self.tensors[self.number[step.inputs[0]]].grid)
            self.emit("MEAN", [self.value(step, 0), axes], step, grid, keep_dims=int(keep))
        elif call.op_type in ("Add", "Mul") and len(step.inputs) == 2:
            self.emit(call.op_type.upper(), [self.value(step, 0), self.value(step, 1)], step, activation=0)
        elif call.op_type == "Add" and self.is_bias(step):
            self.number[step.output] = self.number[step.inputs[0]]
        elif call.op_type == "Concat":
            self.concat(step)
        elif call.op_type == "Sigmoid":
            self.emit("LOGISTIC", [self.value(step, 0)], step, SIGMOID)
        elif call.op_type == "HardSigmoid":
            self.hard_sigmoid(step)
        elif call.op_type == "HardSwish":
            self.emit("HARD_SWISH", [self.value(step, 0)], step)
        else:
            raise CandidateError(f"TensorFlow Lite in 8 bits: {call.op_type} ({call.name}) can't be written")

    def convolution(self, step: Step) -> None:
        call, node = step.call, self.makers[step.output]
        if len(call.kernel) != 2:
            raise CandidateError(f"TensorFlow Lite in 8 bits: {call.name} is no convolution of images")
        codes, scales = self.weights(node, call)
        depthwise = call.kind == "depthwise"
        laid = np.moveaxis(codes, 1, -1) if not depthwise else np.moveaxis(codes, 0, -1)
        source, padding = self.padded(step, "zeros")
        weight = self.store(f"{call.name}.weight", laid.astype(np.int8), Grid(scales, 0, 3 if depthwise else 0))
        options = {"padding": padding, "stride_h": call.stride[0], "stride_w": call.stride[1]}
        options |= {"dilation_h": call.dilation[0], "dilation_w": call.dilation[1], "activation": 0}
        if depthwise:
            options["multiplier"] = len(codes) // call.groups
        inputs = [source, weight, self.bias(node, call, source, scales)]
        self.emit("DEPTHWISE_CONV_2D" if depthwise else "CONV_2D", inputs, step, None, **options)

    def linear(self, step: Step) -> None:
        call, node = step.call, self.makers[step.output]
        if len(call.input_shapes[0]) != 2:
            raise CandidateError(f"TensorFlow Lite in 8 bits: {call.name} takes {call.input_shapes[0]}, no vectors")
        codes, scales = self.weights(node, call)
        image = self.flat.get(step.inputs[0])
        if image is not None:
            codes = np.moveaxis(codes.reshape(len(codes), *image), 1, -1).reshape(codes.shape)
        source = self.value(step, 0)
        weight = self.store(f"{call.name}.weight", codes.astype(np.int8), Grid(scales))
        inputs = [source, weight, self.bias(node, call, source, scales)]
        self.emit("FULLY_CONNECTED", inputs, step, activation=0)

    def weights(self, node: onnx.NodeProto, call: OperatorCall) -> tuple[np.ndarray, tuple[float, ...]]:
        """Integers (outputs, ...) and their scales; weights in floating point are rounded here."""
        back, value = self.makers.get(node.input[1]), node.input[1]
        transposed = call.kind == "linear" and not self.settings(node).get("transB")
        if back is not None and back.op_type == "DequantizeLinear":
            cast = self.makers.get(back.input[0])
            codes = self.stored[cast.input[0] if cast is not None else back.input[0]].astype(np.int64)
            scales = self.stored[back.input[1]].astype(np.float64).reshape(-1)
            if len(back.input) > 2 and np.any(self.stored[back.input[2]].astype(np.int64)):
                raise CandidateError(f"TensorFlow Lite in 8 bits: {call.name}: expected weights around zero")
            return codes.T if transposed else codes, tuple(scales.tolist())
        if value not in self.stored:
            raise CandidateError(f"TensorFlow Lite in 8 bits: {call.name}: its weights are no plain integers")
        self.floats.append(call.name)
        weight = self.stored[value].astype(np.float64)
        weight = weight.T if transposed else weight
        scales = np.maximum(np.abs(weight).reshape(len(weight), -1).max(1), 1e-9) / 127
        codes = np.rint(weight / scales.reshape(-1, *[1] * (weight.ndim - 1))).astype(np.int64)
        return codes, tuple(scales.tolist())

    def bias(self, node: onnx.NodeProto, call: OperatorCall, source: int, scales: tuple[float, ...]) -> int:
        """The bias as 32-bit integers, in steps of the products."""
        given = self.tensors[source].grid
        assert given is not None
        values = np.zeros(call.channels)
        if len(node.input) > 2 and node.input[2]:
            values = self.stored[node.input[2]].astype(np.float64)
        elif node.op_type == "MatMul":
            for user in self.users.get(node.output[0], []):
                stored = [name for name in user.input if name in self.stored]
                if user.op_type == "Add" and stored:
                    values = self.stored[stored[0]].astype(np.float64).reshape(-1)
        steps = tuple(given.scales[0] * scale for scale in scales)
        codes = np.clip(np.rint(values / np.array(steps)), -(2**31), 2**31 - 1).astype(np.int32)
        return self.store(f"{call.name}.bias", codes, Grid(steps), "int32")

    def is_bias(self, step: Step) -> bool:
        """Whether an addition of something stored was written with the layer before it."""
        before = self.makers.get(step.inputs[0])
        return before is not None and before.op_type == "MatMul"

    def activation(self, step: Step) -> None:
        """A clip, where the grid does not end there anyway."""
        before = self.tensors[self.number[step.inputs[0]]].grid
        low, high = 0.0, math.inf
        if step.call.op_type == "Clip":
            ends = [float(self.stored[name]) for name in self.makers[step.output].input[1:] if name in self.stored]
            low, high = ends if len(ends) == 2 else (math.nan, math.nan)
        first, last = _ends(before)
        slack = 0.5 * before.scales[0] if before else 0.0
        if first >= low - slack and last <= high + slack:
            self.number[step.output] = self.number[step.inputs[0]]
            return
        if low != 0 or high not in (6.0, math.inf):
            raise CandidateError(f"TensorFlow Lite in 8 bits: no clip from {low:g} to {high:g} ({step.call.name})")
        self.emit("RELU6" if high == 6 else "RELU", [self.value(step, 0)], step)

    def reshape(self, step: Step) -> None:
        """Only from an image to a vector, or where nothing changes in memory."""
        before, after = step.call.input_shapes[0], step.call.output_shape
        if len(before) == 4 and len(after) == 2 and after[1] == math.prod(before[1:]):
            if math.prod(before[2:]) > 1:
                self.flat[step.output] = before[1:]
        elif not (len(before) == 2 and (len(after) == 2 or after[2:] == (1, 1))):
            raise CandidateError(f"TensorFlow Lite in 8 bits: no reshape from {before} to {after} ({step.call.name})")
        source = self.number[step.inputs[0]]
        shape = self.store("shape", np.array(_shape(after), np.int32))
        self.emit("RESHAPE", [source, shape], step, self.tensors[source].grid)

    def pool(self, step: Step) -> None:
        call, settings = step.call, self.settings(self.makers[step.output])
        largest = call.op_type == "MaxPool"
        if any(entry != 1 for entry in call.dilation) or settings.get("ceil_mode"):
            raise CandidateError(f"TensorFlow Lite in 8 bits: pooling {call.name} is dilated or rounds up its size")
        source, padding = self.padded(step, "least" if largest else "zeros")
        if not largest and any(call.padding) and (padding == SAME) == bool(settings.get("count_include_pad")):
            raise CandidateError(f"TensorFlow Lite in 8 bits: means over a padded image ({call.name})")
        options = {"padding": padding, "stride_h": call.stride[0], "stride_w": call.stride[1], "activation": 0}
        options |= {"filter_h": call.kernel[0], "filter_w": call.kernel[1]}
        code = "MAX_POOL_2D" if largest else "AVERAGE_POOL_2D"
        self.emit(code, [source], step, self.tensors[source].grid, **options)

    def hard_sigmoid(self, step: Step) -> None:
        """As a product and a sum, cut off where the grid from 0 to 1 ends."""
        settings, source = self.settings(self.makers[step.output]), self.value(step, 0)
        slope, middle = settings.get("alpha", 0.2), settings.get("beta", 0.5)
        before = self.tensors[source]
        assert before.grid is not None
        grid = Grid((before.grid.scales[0] * slope,), before.grid.zero)
        self.tensors.append(replace(before, name=f"{step.output}.product", grid=grid))
        product = len(self.tensors) - 1
        one = np.ones(1, np.int8)
        factor = self.store(f"{step.output}.slope", one, Grid((slope,)))
        self.operators.append(TfOperator("MUL", (source, factor), (product,), (("activation", 0),)))
        self.emit("ADD", [product, self.store("middle", one, Grid((middle,)))], step, UNIT, activation=0)

    def concat(self, step: Step) -> None:
        grid = self.grid(step.output, self.tensors[self.number[step.inputs[0]]].grid)
        axis = int(self.settings(self.makers[step.output])["axis"]) % len(step.call.output_shape)
        axis = NHWC[axis] if len(step.call.output_shape) == 4 else axis
        sources = [self.requantized(self.number[value], grid) for value in step.inputs]
        self.emit("CONCATENATION", sources, step, grid, axis=axis, activation=0)

    def padded(self, step: Step, kind: str) -> tuple[int, int]:
        """The input of a window, padded where SAME would pad otherwise; which rule is then right."""
        call, source = step.call, self.value(step, 0)
        sizes = call.input_shapes[0][2:]
        before, after = call.padding[:2], call.padding[2:]
        if not any(call.padding):
            return source, VALID
        wanted = []
        for size, kernel, stride, dilation in zip(
            sizes, call.kernel, call.stride, call.dilation or (1, 1), strict=True
        ):
            total = max(0, (-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size)
            wanted.append((total // 2, total - total // 2))
        if tuple(zip(before, after, strict=True)) == tuple(wanted):
            return source, SAME
        grid = self.tensors[source].grid
        if kind == "least" and _ends(grid)[0] < 0:
            raise CandidateError(f"TensorFlow Lite in 8 bits: largest values of a padded image ({call.name})")
        pads = np.array([(0, 0), (before[0], after[0]), (before[1], after[1]), (0, 0)], np.int32)
        shape = tuple(int(size + pads[at].sum()) for at, size in enumerate(self.tensors[source].shape))
        amounts = self.store("pads", pads)
        self.tensors.append(TfTensor(f"{step.output}.padded", shape, "int8", grid))
        made = len(self.tensors) - 1
        self.operators.append(TfOperator("PAD", (source, amounts), (made,)))
        return made, VALID

    def value(self, step: Step, at: int) -> int:
        """The tensor of a step's input, rounded as the step's own rounding of it says."""
        source = self.number[step.inputs[at]]
        node, grid = self.makers[step.output], None
        taken = [name for name in node.input if name not in self.stored and self.plain(name) == step.inputs[at]]
        back = self.makers.get(taken[0]) if taken else None
        while back is not None and grid is None and back.op_type in ("DequantizeLinear", "Clip", "QuantizeLinear"):
            grid = self.rounding(back) if back.op_type == "QuantizeLinear" else None
            back = self.makers.get(back.input[0])
        return source if grid is None else self.requantized(source, grid)

    def plain(self, name: str) -> str:
        """A value apart from its rounding."""
        known = {value for step in self.steps for value in (step.output, *step.inputs)}
        while name not in known and name in self.makers:
            name = self.makers[name].input[0]
        return name

    def requantized(self, source: int, grid: Grid | None) -> int:
        """The same values on another grid."""
        tensor = self.tensors[source]
        if grid is None or tensor.grid == grid:
            return source
        if (source, grid) not in self.rounded:
            self.tensors.append(replace(tensor, name=f"{tensor.name}.rounded{len(self.rounded)}", grid=grid))
            self.rounded[source, grid] = len(self.tensors) - 1
            self.operators.append(TfOperator("QUANTIZE", (source,), (len(self.tensors) - 1,)))
        return self.rounded[source, grid]

    def grid(self, value: str, otherwise: Grid | None = None) -> Grid:
        """How the values that follow are rounded."""
        todo = [value]
        while todo:
            found = [node for name in todo for node in self.users.get(name, [])]
            rounding = next((node for node in found if node.op_type == "QuantizeLinear"), None)
            if rounding is not None:
                return self.rounding(rounding)
            todo = [node.output[0] for node in found if node.op_type in KEEPING]
        if otherwise is not None or value in self.ranges:
            return otherwise or self.ranges[value]
        self.unknown.add(value)
        return PLACEHOLDER

    def rounding(self, node: onnx.NodeProto) -> Grid:
        scale, zero = (self.stored[name] for name in node.input[1:3])
        if scale.size != 1 or zero.dtype not in (np.int8, np.uint8):
            raise CandidateError(f"TensorFlow Lite: expected values of 8 bits with one scale, got {zero.dtype}")
        return Grid((float(scale),), int(zero) - (128 if zero.dtype == np.uint8 else 0))

    def emit(self, code: str, inputs: list[int], step: Step, grid: Grid | None = None, **options: int) -> None:
        """Add an operator that makes the step's value."""
        made = self.add(step.output, step.call.output_shape, grid or self.grid(step.output))
        self.operators.append(TfOperator(code, tuple(inputs), (made,), tuple(options.items())))

    def add(self, name: str, shape: tuple[int, ...], grid: Grid | None) -> int:
        self.tensors.append(TfTensor(name, _shape(shape), "int8", grid))
        self.number[name] = len(self.tensors) - 1
        return self.number[name]

    def store(self, name: str, data: np.ndarray, grid: Grid | None = None, kind: str = "") -> int:
        self.tensors.append(TfTensor(name, data.shape, kind or str(data.dtype), grid, data))
        return len(self.tensors) - 1

    @staticmethod
    def settings(node: onnx.NodeProto) -> dict[str, Any]:
        return {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}


def _shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """With the channels of images last."""
    return (shape[0], *shape[2:], shape[1]) if len(shape) == 4 else shape


def _ends(grid: Grid | None) -> tuple[float, float]:
    """The least and the largest value of a grid."""
    assert grid is not None  # all computed values have one
    return (-128 - grid.zero) * grid.scales[0], (127 - grid.zero) * grid.scales[0]
