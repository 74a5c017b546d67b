"""TensorFlow Lite files: what they hold, writing them, and what goes in and comes out of one.

The numbers of fields, types and operators are those of TensorFlow Lite's schema (tensorflow/lite/schema/schema.fbs,
version 3), whose fields never change theirs.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
from flatbuffers import number_types
from flatbuffers.table import Table

from ..core.errors import InputError

IDENTIFIER = b"TFL3"
TYPES = {"float32": 0, "int32": 2, "uint8": 3, "int64": 4, "int8": 9}
CODES = {
    "ADD": 0, "AVERAGE_POOL_2D": 1, "CONCATENATION": 2, "CONV_2D": 3, "DEPTHWISE_CONV_2D": 4, "FULLY_CONNECTED": 9,
    "LOGISTIC": 14, "MAX_POOL_2D": 17, "MUL": 18, "RELU": 19, "RELU6": 21, "RESHAPE": 22, "PAD": 34, "MEAN": 40,
    "QUANTIZE": 114, "HARD_SWISH": 117,
}  # fmt: skip
# Of the operator's options: its number among them, and its fields in order.
OPTIONS: dict[str, tuple[int, tuple[str, ...]]] = {
    "CONV_2D": (1, ("padding", "stride_w", "stride_h", "activation", "dilation_w", "dilation_h")),
    "DEPTHWISE_CONV_2D": (
        2, ("padding", "stride_w", "stride_h", "multiplier", "activation", "dilation_w", "dilation_h"),
    ),
    "AVERAGE_POOL_2D": (5, ("padding", "stride_w", "stride_h", "filter_w", "filter_h", "activation")),
    "MAX_POOL_2D": (5, ("padding", "stride_w", "stride_h", "filter_w", "filter_h", "activation")),
    "FULLY_CONNECTED": (8, ("activation",)),
    "CONCATENATION": (10, ("axis", "activation")),
    "ADD": (11, ("activation",)),
    "MUL": (21, ("activation",)),
    "RESHAPE": (17, ()),
    "PAD": (22, ()),
    "MEAN": (27, ("keep_dims",)),
}  # fmt: skip
SAME, VALID = 0, 1
_BYTES = ("padding", "activation", "keep_dims")
# Versions of operators with 8-bit integers; the others have 1.
_VERSIONS = {
    "ADD": 2, "AVERAGE_POOL_2D": 2, "CONCATENATION": 2, "CONV_2D": 3, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": 4,
    "LOGISTIC": 2, "MAX_POOL_2D": 2, "MUL": 2, "RELU": 2, "RELU6": 2, "PAD": 2, "MEAN": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """Integers q that stand for `scale * (q - zero)`; of weights, a scale for each entry along `axis`."""

    scales: tuple[float, ...]
    zero: int = 0
    axis: int = 0


@dataclass(frozen=True)
class TfTensor:
    """A tensor of a file: computed, or stored where `data` is there."""

    name: str
    shape: tuple[int, ...]
    type: str = "int8"
    grid: Grid | None = None
    data: np.ndarray | None = None


@dataclass(frozen=True)
class TfOperator:
    """An operator by its name in `CODES`; inputs and outputs are numbers of tensors, -1 for none."""

    code: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: tuple[tuple[str, int], ...] = ()


def write_model(
    tensors: Sequence[TfTensor], operators: Sequence[TfOperator], inputs: Sequence[int], outputs: Sequence[int]
) -> bytes:
    """The file that holds one graph."""
    builder = flatbuffers.Builder(1024)
    buffers = [_table(builder, 1, {})]  # the first is empty by convention
    places = []
    for tensor in tensors:
        places.append(len(buffers) if tensor.data is not None else 0)
        if tensor.data is not None:
            buffers.append(_buffer(builder, np.ascontiguousarray(tensor.data).tobytes()))
    made = [_tensor(builder, tensor, place) for tensor, place in zip(tensors, places, strict=True)]
    codes = sorted({operator.code for operator in operators})
    calls = [_operator(builder, operator, codes) for operator in operators]
    graph = {
        0: ("offset", _offsets(builder, made)),
        1: ("offset", _numbers(builder, inputs)),
        2: ("offset", _numbers(builder, outputs)),
        3: ("offset", _offsets(builder, calls)),
    }
    subgraph = _table(builder, 5, graph)
    known = [
        _table(builder, 4, {0: ("int8", CODES[code]), 2: ("int32", _VERSIONS.get(code, 1)), 3: ("int32", CODES[code])})
        for code in codes
    ]
    fields = {
        0: ("uint32", 3),
        1: ("offset", _offsets(builder, known)),
        2: ("offset", _offsets(builder, [subgraph])),
        4: ("offset", _offsets(builder, buffers)),
    }
    builder.Finish(_table(builder, 8, fields), file_identifier=IDENTIFIER)
    return bytes(builder.Output())


def input_of(path: Path) -> tuple[tuple[int, ...], str]:
    """Shape and type of the one input of a file, such as ((1, 32, 32, 3), "int8").

    Raises:
        InputError: no such file, no TensorFlow Lite model, several inputs, or a type that is not in `TYPES`.
    """
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; expected a TensorFlow Lite model")
    content = path.read_bytes()
    if content[4:8] != IDENTIFIER:
        raise InputError(f"{path} is no TensorFlow Lite model")
    try:
        model = Table(content, struct.unpack_from("<I", content)[0])
        graph = _entries(model, 2)[0]
        inputs = _integers(graph, 1)
        tensor = _entries(graph, 0)[inputs[0]]
        at = tensor.Offset(6)  # of the field "type"
        number = tensor.Get(number_types.Int8Flags, tensor.Pos + at) if at else 0
        shape = tuple(_integers(tensor, 0))
    except (struct.error, IndexError, ValueError) as error:
        raise InputError(f"{path} is no readable TensorFlow Lite model") from error
    kind = next((name for name, known in TYPES.items() if known == number), "")
    if len(inputs) != 1 or not kind or any(size < 1 for size in shape):
        raise InputError(
            f"{path}: expected one input of a fixed shape, of {', '.join(TYPES)}; got {len(inputs)}, "
            f"the first of type number {number} and shape {shape}"
        )
    return shape, kind


def _table(builder: Any, size: int, fields: dict[int, tuple[str, int]]) -> int:
    """A table with `size` fields, of which those given are written."""
    builder.StartObject(size)
    for slot, (kind, value) in fields.items():
        if kind == "offset":
            builder.PrependUOffsetTRelativeSlot(slot, value, 0)
        else:
            prepend = {"int8": builder.PrependInt8Slot, "int32": builder.PrependInt32Slot}
            prepend["uint32"] = builder.PrependUint32Slot
            prepend[kind](slot, value, None)  # also where it is the default
    return builder.EndObject()


def _operator(builder: Any, operator: TfOperator, codes: list[str]) -> int:
    fields = {
        0: ("uint32", codes.index(operator.code)),
        1: ("offset", _numbers(builder, operator.inputs)),
        2: ("offset", _numbers(builder, operator.outputs)),
    }
    if operator.code in OPTIONS:
        number, names = OPTIONS[operator.code]
        given = {names.index(name): ("int8" if name in _BYTES else "int32", value) for name, value in operator.options}
        fields |= {3: ("int8", number), 4: ("offset", _table(builder, max(1, len(names)), given))}
    return _table(builder, 5, fields)


def _tensor(builder: Any, tensor: TfTensor, buffer: int) -> int:
    name, shape = builder.CreateString(tensor.name), _numbers(builder, tensor.shape)
    fields = {0: ("offset", shape), 1: ("int8", TYPES[tensor.type]), 2: ("uint32", buffer), 3: ("offset", name)}
    if tensor.grid is not None:
        grid = tensor.grid
        scales = builder.CreateNumpyVector(np.asarray(grid.scales, np.float32))
        zeros = builder.CreateNumpyVector(np.full(len(grid.scales), grid.zero, np.int64))
        quantization = {2: ("offset", scales), 3: ("offset", zeros), 6: ("int32", grid.axis)}
        fields[4] = ("offset", _table(builder, 7, quantization))
    return _table(builder, 5, fields)


def _buffer(builder: Any, content: bytes) -> int:
    # As the schema asks: at multiples of 16 bytes.
    builder.StartVector(1, len(content), 16)
    builder.head = builder.head - len(content)
    builder.Bytes[builder.head : builder.head + len(content)] = content
    return _table(builder, 1, {0: ("offset", builder.EndVector())})


def _numbers(builder: Any, values: Sequence[int]) -> int:
    return builder.CreateNumpyVector(np.asarray(values, np.int32))


def _offsets(builder: Any, values: Sequence[int]) -> int:
    builder.StartVector(4, len(values), 4)
    for value in reversed(values):
        builder.PrependUOffsetTRelative(value)
    return builder.EndVector()


def _entries(table: Any, slot: int) -> list[Any]:
    """The tables in a field that holds several."""
    at = table.Offset(4 + 2 * slot)
    if not at:
        return []
    start = table.Vector(at)
    return [Table(table.Bytes, table.Indirect(start + 4 * entry)) for entry in range(table.VectorLen(at))]


def _integers(table: Any, slot: int) -> list[int]:
    at = table.Offset(4 + 2 * slot)
    if not at:
        return []
    start = table.Vector(at)
    return [int(table.Get(number_types.Int32Flags, start + 4 * entry)) for entry in range(table.VectorLen(at))]
