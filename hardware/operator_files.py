"""Operators as files of their own, for targets whose runtimes have no profiler to ask: boards, GPUs, compilers.

What a target says of a file with one operator holds the costs of a whole run too. The table's fit to whole networks
(`profile`) takes them off again: one share for each operator, one for the run.

What a compiler does across operators is not in it. A table of digits-cnn for tpu/v5e, made from 9 networks, was 14 %
off on 5 others (0.3 to 40 %), and did not keep their order (rank correlation 0.0).
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..core.errors import CandidateError, InputError
from ..core.types import Artifact, Backend, Measurement, Method, Provenance, Task
from .device import cpu_fingerprint, provenance
from .files import read_file
from .lookup import describe, operator_key
from .operator_times import OperatorTimes, operators_and_owners
from .operators import OperatorCall
from .x86 import CpuBackend

INPUT = "input"
# Keys of operators with what they took alone: seconds, and the ends of the interval.
Alone = dict[OperatorCall, tuple[float, float, float, int]]


def check_profiled(backend: Backend) -> None:
    """Raise InputError where a table of operators' times makes no sense, or can't be made."""
    able = backend.capabilities
    if isinstance(backend, CpuBackend):
        return
    if "latency" not in able.metrics:
        raise InputError(f"profile: {backend.name} gives no latency; it gives {', '.join(able.metrics) or 'nothing'}")
    if able.method not in (Method.MEASURED, Method.COMPILED):
        raise InputError(
            f"profile: the latency of {backend.name} is {able.method}, at once: search on it without a table"
        )


def source_of(backend: Backend, task: Task, reference: Artifact) -> tuple[Provenance, str]:
    """Where a table's figures come from, and what tells the machine or device from others."""
    if isinstance(backend, CpuBackend):
        cores = len(backend.cores)
        return provenance(f"{backend.runtime} {backend.version}", cores), f"{cpu_fingerprint()}, {cores} threads"
    source = _latency(backend.measure(reference, task, None)).provenance
    return source, source.device


def times_alone(backend: Backend, artifact: Artifact, task: Task, reference: Artifact, known: Alone) -> OperatorTimes:
    """Measure each operator of a file in a file of its own, and the whole file in turns with `reference`.

    Args:
        known: operators that were measured already; gets those that are measured now.

    Raises:
        CandidateError: the target can't run an operator, or it can't be put in a file.
    """
    found = {m.name: m for m in backend.measure(artifact, task, reference if artifact != reference else None)}
    whole = found["latency"]
    pace = found.get("reference_latency", whole).value
    calls: list[OperatorCall] = []
    with tempfile.TemporaryDirectory() as folder:
        for call, proto in operator_files(onnx.load(str(artifact.path))):
            calls.append(call)
            key = operator_key(call)
            if key not in known:
                path = Path(folder) / f"{len(calls)}.onnx"
                path.write_bytes(proto.SerializeToString())
                known[key] = _measured(backend, path, key)
    times = [known[operator_key(call)] for call in calls]
    return OperatorTimes(
        tuple(calls),
        tuple(seconds / pace for seconds, _, _, _ in times),
        tuple(low / pace for _, low, _, _ in times),
        tuple(high / pace for _, _, high, _ in times),
        (1,) * len(calls),
        whole.value / pace,
        pace,
        min(samples for _, _, _, samples in times),
    )


def _measured(backend: Backend, path: Path, key: OperatorCall) -> tuple[float, float, float, int]:
    artifact, task = read_file(path, backend.name)
    try:
        figure = _latency(backend.measure(artifact, task, None))
    except CandidateError as error:
        if key.kind == "data":
            return 0.0, 0.0, 0.0, 1  # moves values about, the batch among them: it stays with the costs of a whole run
        raise CandidateError(f"{describe(key)} alone: {error}") from error
    low, high = figure.ci95 or (figure.value, figure.value)
    return figure.value, low, high, figure.samples


def _latency(figures: Sequence[Measurement]) -> Measurement:
    return next(figure for figure in figures if figure.name == "latency")


def operator_files(proto: onnx.ModelProto) -> Iterator[tuple[OperatorCall, onnx.ModelProto]]:
    """Each operator of a model, with what rounds its values, as a model with one input.

    Several inputs become one where their shapes are the same; others are cut from one. Indices beside them are zeros.

    Raises:
        CandidateError: an operator takes or gives values of unknown shape.
    """
    for entry in proto.graph.input:  # whose name the operators' own inputs get
        for node in proto.graph.node:
            for place, value in enumerate(node.input):
                if value == entry.name:
                    node.input[place] = f"network.{entry.name}"
        entry.name = f"network.{entry.name}"
    proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    graph = proto.graph
    for node in graph.node:
        node.name = node.output[0]
    calls, owners = operators_and_owners(proto)
    makers = {value: node for node in graph.node for value in node.output}
    types = {entry.name: entry.type.tensor_type for entry in (*graph.value_info, *graph.input, *graph.output)}
    for at, call in enumerate(calls):
        names = {node.output[0] for node in graph.node if owners.get(node.output[0]) == at}
        # Values between operators may be rounded; a file of its own takes them in floating point.
        names |= {
            value
            for name in names
            for value in makers[name].input
            if value in makers and makers[value].op_type == "QuantizeLinear"
        }
        nodes = [node for node in graph.node if node.output[0] in names]
        yield call, _alone(proto, nodes, types, call)


def _alone(
    proto: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    types: Mapping[str, onnx.TypeProto.Tensor],
    call: OperatorCall,
) -> onnx.ModelProto:
    stored = {entry.name: entry for entry in proto.graph.initializer}
    made = {value for node in nodes for value in node.output}
    used = dict.fromkeys(value for node in nodes for value in node.input if value)
    outside = [value for value in used if value not in made and value not in stored]
    elsewhere = {value for node in proto.graph.node if node not in nodes for value in node.input}
    elsewhere |= {entry.name for entry in proto.graph.output}
    # One output: a value that is taken as it is and rounded too would be two.
    ends = [value for node in nodes for value in node.output if value in elsewhere][-1:]
    shapes = {value: _sizes(types, value) for value in (*outside, *ends)}
    unknown = [value for value, shape in shapes.items() if shape is None]
    if unknown or not outside or not ends:
        raise CandidateError(f"{describe(operator_key(call))} can't be put in a file of its own: unknown shapes")
    taken = [value for value in outside if types[value].elem_type == TensorProto.FLOAT] or outside
    kind = types[taken[0]].elem_type
    # Indices, where an operator takes them beside values: it costs the same whichever they are.
    extra = [numpy_helper.from_array(np.zeros((1, *(shapes[v] or ())), np.int64), v) for v in outside if v not in taken]
    sizes = [shapes[value] or () for value in taken]
    if len(set(sizes)) == 1:
        shape = sizes[0]
        before = [helper.make_node("Identity", [INPUT], [value]) for value in taken]
    else:
        counts = [math.prod(one) for one in sizes]
        shape = (sum(counts),)
        extra.append(numpy_helper.from_array(np.array(counts), f"{INPUT}.parts"))
        before = [helper.make_node("Split", [INPUT, f"{INPUT}.parts"], [f"{v}.flat" for v in taken], axis=1)]
        for value, one in zip(taken, sizes, strict=True):
            extra.append(numpy_helper.from_array(np.array((0, *one)), f"{value}.shape"))
            before.append(helper.make_node("Reshape", [f"{value}.flat", f"{value}.shape"], [value]))
    graph = helper.make_graph(
        [*before, *nodes],
        "operator",
        [helper.make_tensor_value_info(INPUT, kind, ["batch", *shape])],
        [helper.make_tensor_value_info(v, types[v].elem_type, ["batch", *(shapes[v] or ())]) for v in ends],
        [*(stored[value] for value in used if value in stored), *extra],
    )
    return helper.make_model(graph, opset_imports=proto.opset_import, ir_version=proto.ir_version)


def _sizes(types: Mapping[str, onnx.TypeProto.Tensor], value: str) -> tuple[int, ...] | None:
    """What follows the batch in a value's shape; None where that is unknown, or where it has no batch."""
    if value not in types or not types[value].shape.dim or types[value].shape.dim[0].dim_value > 1:
        return None
    sizes = tuple(size.dim_value for size in types[value].shape.dim[1:])
    return sizes if all(sizes) else None
