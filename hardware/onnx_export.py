"""From a PyTorch model to one ONNX file with QDQ nodes made from the operator's own scales."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from ..compression.graph import find_layers, fold_batchnorm
from ..compression.quantization import Grid, LayerQuantization, quantized_layers, without_rounding
from ..core.errors import CandidateError
from ..core.types import Artifact

BITS_KEY = "autocompress.bits"
INPUT, OUTPUT = "input", "logits"


def export_onnx(
    model: nn.Module, example: torch.Tensor, path: Path, runtime: str, *, clip_last: bool = False
) -> Artifact:
    """Write `model` as ONNX: input "input" (batch, ...), output "logits" (batch, classes).

    Integer layers get QuantizeLinear/DequantizeLinear pairs with the scales found by `Quantize`, int8
    weights and float32 biases; 16-bit layers store float16 weights. The bit-width of every layer goes
    into the file's metadata.

    Args:
        example: one input, as `tasks.data.example_input` makes it.
        clip_last: below 8 bits, whether values are clipped to the narrower grid after the QDQ pair, not before.

    Raises:
        CandidateError: the exporter can't handle the model, or a layer's weight is not in the graph.
    """
    quantization = quantized_layers(model)
    plain = without_rounding(model)
    if not quantization:
        fold_batchnorm(plain, find_layers(plain, example))
    proto = _export_float(plain, example)
    _insert_qdq(proto, quantization, plain, clip_last)
    bits = ",".join(f"{name}={entry.bits}" for name, entry in quantization.items())
    helper.set_model_props(proto, {BITS_KEY: bits})
    path.parent.mkdir(parents=True, exist_ok=True)
    content = proto.SerializeToString()
    path.write_bytes(content)
    return Artifact(runtime, path, hashlib.sha256(content).hexdigest(), len(content))


def bits_in_graph(path: Path) -> dict[str, int]:
    """The bit-width of each layer below 32, as stored in the file."""
    try:
        proto = onnx.load(str(path), load_external_data=False)
    except (OSError, DecodeError) as error:
        raise CandidateError(f"{path} is no readable ONNX file: {error}") from error
    entry = next((prop.value for prop in proto.metadata_props if prop.key == BITS_KEY), "")
    return {name: int(bits) for name, _, bits in (item.rpartition("=") for item in entry.split(",") if item)}


def _export_float(model: nn.Module, example: torch.Tensor) -> onnx.ModelProto:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    batch = torch.export.Dim("batch", min=1, max=65536)
    # Two images: a batch of one would let the exporter fix the batch dimension.
    images = example.expand(2, *example.shape[1:]).contiguous()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model.eval(),
                (images,),
                dynamo=True,
                verbose=False,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: batch},),
            )
        assert program is not None
        proto = program.model_proto
    except Exception as error:  # the exporter raises many kinds; all mean "can't be exported"
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CandidateError(f"ONNX export failed: {lines[0][:300]}") from error
    _strip(proto)
    return proto


def _strip(proto: onnx.ModelProto) -> None:
    """Remove what no runtime reads (stack traces, scopes, shapes): up to a fifth of a small model's bytes."""
    proto.doc_string = ""
    proto.graph.doc_string = ""
    del proto.metadata_props[:], proto.graph.metadata_props[:], proto.graph.value_info[:]
    for node in proto.graph.node:
        node.doc_string, node.name = "", ""
        del node.metadata_props[:]
    for value in [*proto.graph.input, *proto.graph.output, *proto.graph.initializer]:
        value.doc_string = ""
        del value.metadata_props[:]


def _insert_qdq(
    proto: onnx.ModelProto, quantization: dict[str, LayerQuantization], model: nn.Module, clip_last: bool
) -> None:
    graph = proto.graph
    initializers = {entry.name: entry for entry in graph.initializer}
    order = list(graph.node)
    for number, (name, entry) in enumerate(quantization.items()):
        weight = model.get_submodule(name).weight.detach()  # type: ignore[union-attr,operator]
        stored, transposed = _find_weight(initializers, f"{name}.weight", weight.numpy())
        users = [node for node in order if stored in node.input]
        if len(users) != 1:
            raise CandidateError(f"export: the weight of layer {name} is used {len(users)} times in the ONNX graph")
        node = users[0]
        prefix = f"q{number}"
        before: list[onnx.NodeProto] = []
        if entry.bits == 16:
            half = weight.numpy().T if transposed else weight.numpy()
            graph.initializer.append(
                numpy_helper.from_array(np.ascontiguousarray(half.astype(np.float16)), prefix + "w")
            )
            before.append(helper.make_node("Cast", [prefix + "w"], [prefix + "wf"], to=TensorProto.FLOAT))
        else:
            assert entry.weight is not None
            integers = entry.weight.integers(weight).numpy().astype(np.int8)
            integers = np.ascontiguousarray(integers.T if transposed else integers)
            scales = entry.weight.scale.numpy().astype(np.float32)
            graph.initializer.append(numpy_helper.from_array(integers, prefix + "w"))
            graph.initializer.append(numpy_helper.from_array(scales, prefix + "ws"))
            graph.initializer.append(numpy_helper.from_array(np.zeros(len(scales), np.int8), prefix + "wz"))
            before.append(
                helper.make_node(
                    "DequantizeLinear",
                    [prefix + "w", prefix + "ws", prefix + "wz"],
                    [prefix + "wf"],
                    axis=1 if transposed else 0,
                )
            )
        if entry.input is not None:
            nodes, rounded = _round_nodes(graph, entry.input, node.input[0], prefix + "i", entry.bits, clip_last)
            before += nodes
            node.input[0] = rounded
        node.input[list(node.input).index(stored)] = prefix + "wf"
        at = order.index(node)
        order[at:at] = before
        if entry.output is not None:
            outer, node.output[0] = node.output[0], prefix + "y"
            nodes, rounded = _round_nodes(graph, entry.output, prefix + "y", prefix + "o", entry.bits, clip_last)
            nodes[-1].output[0] = outer
            at = order.index(node) + 1
            order[at:at] = nodes
        graph.initializer.remove(initializers.pop(stored))
    del graph.node[:]
    graph.node.extend(order)


def _round_nodes(
    graph: onnx.GraphProto, grid: Grid, source: str, prefix: str, bits: int, clip_last: bool
) -> tuple[list[onnx.NodeProto], str]:
    """Nodes that round tensor `source` to `grid`; below 8 bits a Clip keeps to the narrower grid."""
    dtype = np.int8 if grid.low < 0 else np.uint8
    scale = np.float32(float(grid.scale))
    graph.initializer.append(numpy_helper.from_array(np.asarray(scale), prefix + "s"))
    graph.initializer.append(numpy_helper.from_array(np.asarray(grid.zero_point, dtype), prefix + "z"))
    steps: list[tuple[str, list[str]]] = [
        ("QuantizeLinear", [prefix + "s", prefix + "z"]),
        ("DequantizeLinear", [prefix + "s", prefix + "z"]),
    ]
    if bits < 8:
        for end, value in (("l", grid.low), ("h", grid.high)):
            limit = np.asarray(np.float32(value - grid.zero_point) * scale, np.float32)
            graph.initializer.append(numpy_helper.from_array(limit, prefix + end))
        steps.insert(2 if clip_last else 0, ("Clip", [prefix + "l", prefix + "h"]))
    nodes = []
    for number, (kind, inputs) in enumerate(steps):
        nodes.append(helper.make_node(kind, [source, *inputs], [f"{prefix}{number}"]))
        source = f"{prefix}{number}"
    return nodes, source


def _find_weight(initializers: dict[str, TensorProto], name: str, weight: np.ndarray) -> tuple[str, bool]:
    """Name of the initializer that holds `weight`, and whether it is stored transposed."""
    named = initializers.get(name)
    if named is not None and tuple(named.dims) == weight.shape and np.array_equal(numpy_helper.to_array(named), weight):
        return name, False
    for stored, entry in initializers.items():
        dims = tuple(entry.dims)
        if dims not in (weight.shape, weight.shape[::-1]):
            continue
        values = numpy_helper.to_array(entry)
        if dims == weight.shape and np.array_equal(values, weight):
            return stored, False
        if weight.ndim == 2 and np.array_equal(values, weight.T):
            return stored, True
    raise CandidateError(f"export: no initializer of the ONNX graph holds the weight of layer {name}")
