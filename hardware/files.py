"""ONNX and TensorFlow Lite files that people bring, as backends know files: an artifact, a task with shapes alone."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NoReturn

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto

from ..core.errors import InputError
from ..core.types import Artifact, Data, Split, Task
from .onnx_bits import read_bits
from .tflite_file import input_of

# Beginnings of targets that take TensorFlow Lite files.
TAKE_TFLITE = ("arm/ethos-u", "arm/agent")


def read_file(path: Path, target: str) -> tuple[Artifact, Task]:
    """A file with one input, and a task that has its input shape and no data: enough to measure it.

    Files are ONNX or, for targets in `TAKE_TFLITE`, TensorFlow Lite (.tflite).

    Args:
        target: name of the backend that is to load it.

    Raises:
        InputError: no such file, no readable one, several inputs, or an input with open sizes besides the first.
    """
    if path.suffix == ".tflite":
        return _read_tflite(path, target)
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; expected an ONNX model")
    content = path.read_bytes()
    try:
        proto = onnx.ModelProto.FromString(content)
    except DecodeError as error:
        raise InputError(f"{path} is no readable ONNX file") from error
    stored = {entry.name for entry in proto.graph.initializer}
    inputs = [entry for entry in proto.graph.input if entry.name not in stored]
    if len(inputs) != 1:
        raise InputError(f"{path}: expected an ONNX model with one input, got {len(inputs)}")
    tensor = inputs[0].type.tensor_type
    sizes = tuple(size.dim_value for size in tensor.shape.dim)[1:]
    if not sizes or not all(sizes):
        raise InputError(f"{path}: expected fixed sizes after the batch, got the input shape {_shown(tensor)}")
    if tensor.elem_type not in (TensorProto.FLOAT, TensorProto.INT64):
        kind = TensorProto.DataType.Name(tensor.elem_type).lower()
        raise InputError(f"{path}: expected an input of type float or int64, got {kind}")
    tokens = tensor.elem_type == TensorProto.INT64
    nothing = Split(np.zeros((0, *sizes), np.int64 if tokens else np.uint8), np.zeros(0, np.int64))
    # Token 0 and 1 exist in every vocabulary; how large it is can't be read from all files.
    data = Data(path.stem, nothing, nothing, nothing, (), vocabulary=2 if tokens else 0)
    artifact = Artifact(target, path, hashlib.sha256(content).hexdigest(), len(content), read_bits(proto))
    return artifact, Task(path.stem, _no_model, data, trained=False)


def _read_tflite(path: Path, target: str) -> tuple[Artifact, Task]:
    if not target.startswith(TAKE_TFLITE):
        raise InputError(f"{target} takes ONNX files; TensorFlow Lite files are for {' and '.join(TAKE_TFLITE)}...")
    shape, kind = input_of(path)
    if target.startswith("arm/ethos-u") and kind not in ("int8", "uint8"):
        raise InputError(f"{path}: {target} needs a file whose input is in 8-bit integers; it is {kind}")
    content = path.read_bytes()
    nothing = Split(np.zeros((0, *shape[1:]), np.uint8), np.zeros(0, np.int64))
    artifact = Artifact(target, path, hashlib.sha256(content).hexdigest(), len(content))
    return artifact, Task(path.stem, _no_model, Data(path.stem, nothing, nothing, nothing, ()), trained=False)


def _no_model() -> NoReturn:
    raise InputError("a file has no PyTorch model behind it")


def _shown(tensor: onnx.TypeProto.Tensor) -> str:
    return f"({', '.join(str(size.dim_value or size.dim_param or '?') for size in tensor.shape.dim)})"
