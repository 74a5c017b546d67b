"""From an ONNX file to a JAX function, in the arithmetic of a TPU.

No maintained library does this: the last release of jaxonnxruntime is of 2023. What an operator computes stands in
`jax_layers`, `jax_operators` and `jax_shapes`; here is what goes beyond a single one: which values are known when the
function is compiled, which are weights, and which layers run on integers.

Imported only where JAX is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..core.errors import CandidateError
from . import jax_operators as _operators  # noqa: F401  (completes the table)
from . import jax_shapes as _shapes  # noqa: F401
from .jax_layers import OPERATORS, Known, Quantized, float_value

Weights = dict[str, np.ndarray]
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_FLOAT_TYPES = (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)


@dataclass(frozen=True)
class JaxModel:
    """A network as a function of its weights and one batch of inputs.

    Attributes:
        function: `function(weights, inputs)` returns the outputs of the graph, in order.
        weights: stored tensors by name, in the types that the function takes.
        inputs: shape and type of its inputs.
        integer_layers: names of the results of layers that multiply 8-bit integers.
    """

    function: Callable[[Mapping[str, Any], Any], tuple[Any, ...]]
    weights: Weights
    inputs: jax.ShapeDtypeStruct
    integer_layers: tuple[str, ...]


def convert(
    proto: onnx.ModelProto, input_shape: Sequence[int], floats: Any = "float32", *, integers: bool = False
) -> JaxModel:
    """The function that an ONNX graph with one input computes.

    Args:
        input_shape: with the batch; what a file leaves open, or says of its batch, is not read.
        floats: type in which all floating-point numbers are stored and computed.
        integers: whether layers whose weights and inputs are both rounded to 8 bits by QuantizeLinear and
            DequantizeLinear multiply the integers; without it they multiply the rounded values as floats.

    Raises:
        CandidateError: an operator that is not known here, or settings of one that are not.
    """
    graph = proto.graph
    stored = {entry.name: _array(entry) for entry in graph.initializer}
    inputs = [entry for entry in graph.input if entry.name not in stored]
    if len(inputs) != 1:
        raise CandidateError(f"expected an ONNX graph with one input, got {len(inputs)}")
    versions = {entry.domain: entry.version for entry in proto.opset_import}
    dtype = jax.numpy.dtype(floats)
    kind = inputs[0].type.tensor_type.elem_type
    given = dtype if kind in _FLOATS else np.dtype(np.int32)
    run = _Run(graph, stored, inputs[0].name, versions.get("", 1), dtype, integers)
    example = jax.ShapeDtypeStruct(tuple(input_shape), given)
    # A first pass without values finds the weights: what is computed from stored tensors alone, and taken by a node
    # that computes on more than these.
    jax.eval_shape(run.collect, example)
    return JaxModel(run, run.weights, example, tuple(run.integer_layers))


class _Run:
    """Runs the nodes of a graph: on NumPy arrays where values are known beforehand, else JAX arrays or `Quantized`."""

    def __init__(
        self,
        graph: onnx.GraphProto,
        stored: dict[str, np.ndarray],
        source: str,
        version: int,
        dtype: Any,
        integers: bool,
    ) -> None:
        self.stored, self.source, self.dtype, self.integers, self.version = stored, source, dtype, integers, version
        self.nodes = [_Node(node, version) for node in graph.node]
        self.results = [entry.name for entry in graph.output]
        unknown = sorted({node.kind for node in self.nodes if node.kind not in OPERATORS})
        if unknown:
            raise CandidateError(f"no TPU kernel is written here for the ONNX operators {', '.join(unknown)}")
        self.weights: Weights = {}
        self.integer_layers: list[str] = []
        self._collecting = False
        self._given: Mapping[str, Any] = {}

    def collect(self, inputs: Any) -> tuple[Any, ...]:
        """Run, and keep the weights that come up."""
        self._collecting = True
        try:
            return self(self.weights, inputs)
        finally:
            self._collecting = False

    def __call__(self, weights: Mapping[str, Any], inputs: Any) -> tuple[Any, ...]:
        self._given = weights
        values: dict[str, Any] = {"": None, **self.stored, self.source: inputs}
        for node in self.nodes:
            self._run(node, values)
        return tuple(float_value(values[name], self.dtype) for name in self.results)

    def _run(self, node: _Node, values: dict[str, Any]) -> None:
        taken = [values[name] for name in node.inputs]
        try:
            results = OPERATORS[node.kind](self, node, *taken)
        except (ValueError, TypeError, IndexError, KeyError, NotImplementedError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise CandidateError(f"{node.kind} at {node.outputs[0]} can't be converted: {reason}") from error
        results = results if isinstance(results, (tuple, list)) else (results,)
        for name, result in zip(node.outputs, results, strict=False):
            values[name] = result

    def weight(self, name: str, known: np.ndarray, floats: Any = None) -> Any:
        """A known tensor as an argument of the function; single numbers stay part of the program.

        Args:
            floats: type that it takes if it holds floating-point numbers; None for that of the run.
        """
        if known.dtype in _FLOAT_TYPES:
            known = known.astype(floats or self.dtype)
        if known.size == 1:
            return known
        if self._collecting:
            self.weights[name] = known
        return self._given[name]

    def operands(self, node: _Node, *taken: Any) -> list[Any]:
        """Inputs of a node that computes in floating point: known tensors become weights, integers what they stand for.

        Where all are known, they come back as they are, for NumPy to compute with.
        """
        taken = tuple(value.known() if isinstance(value, Quantized) and value.is_known else value for value in taken)
        if all(value is None or isinstance(value, Known) for value in taken):
            return list(taken)
        found = []
        for at, value in enumerate(taken):
            if isinstance(value, Known):
                name = node.inputs[at]
                found.append(self.weight(name, np.asarray(value)) if value.dtype in _FLOAT_TYPES else value)
            else:
                found.append(float_value(value, self.dtype))
        return found

    def note_integers(self, node: _Node) -> None:
        """Remember that a layer multiplies integers."""
        if self._collecting:
            self.integer_layers.append(node.outputs[0])


class _Node:
    """One node of the graph with its settings as plain values."""

    def __init__(self, node: onnx.NodeProto, version: int) -> None:
        own = node.domain in ("", "ai.onnx")
        self.kind = node.op_type if own else f"{node.domain}.{node.op_type}"
        self.inputs, self.outputs = list(node.input), list(node.output)
        self.version = version
        self.settings = {entry.name: _setting(entry) for entry in node.attribute}

    def get(self, name: str, default: Any = None) -> Any:
        """The setting called `name`."""
        return self.settings.get(name, default)


def _setting(entry: onnx.AttributeProto) -> Any:
    value = helper.get_attribute_value(entry)
    if isinstance(value, bytes):
        return value.decode()
    return _array(value) if isinstance(value, TensorProto) else value


def _array(entry: TensorProto) -> np.ndarray:
    """A stored tensor; integers of 4 bits in 8, which is what the chips multiply."""
    values = numpy_helper.to_array(entry)
    narrow = {np.dtype(ml_dtypes.int4): np.int8, np.dtype(ml_dtypes.uint4): np.uint8}
    return values.astype(narrow.get(values.dtype, values.dtype), copy=False)
