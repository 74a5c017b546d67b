"""ONNX files as JAX functions: the same results as ONNX Runtime gives, in float32 on the CPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from autocompress import Quantize, Task
from autocompress.compression.grids import Format
from autocompress.core.errors import CandidateError
from autocompress.hardware.onnx_export import export_onnx
from autocompress.tasks.data import example_input, normalise
from autocompress.tasks.models import import_torchvision

# JAX would look for a TPU otherwise.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
pytest.importorskip("jax", reason="the converter needs JAX: pip install 'autocompress[tpu]'")

from autocompress.hardware.onnx_to_jax import convert


def by_onnx_runtime(proto: onnx.ModelProto, inputs: np.ndarray) -> np.ndarray:
    """First output of a graph."""
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: inputs})[0]


def both(proto: onnx.ModelProto, inputs: np.ndarray, **settings: Any) -> tuple[np.ndarray, np.ndarray]:
    """The same by ONNX Runtime and by the converted function."""
    import jax

    model = convert(proto, inputs.shape, **settings)
    return by_onnx_runtime(proto, inputs), np.asarray(jax.jit(model.function)(model.weights, inputs)[0])


def graph(nodes: list[onnx.NodeProto], shape: tuple[int, ...], stored: dict[str, Any], opset: int) -> onnx.ModelProto:
    """From "x" to "y"."""
    made = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_empty_tensor_value_info("y")],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in stored.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


RNG = np.random.default_rng(0)
IMAGE = (2, 4, 7, 6)


def values(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def ints(*numbers: int) -> np.ndarray:
    return np.asarray(numbers, np.int64)


# Operator, what follows x among its inputs, settings, shape of x.
CASES: list[tuple[str, list[Any], dict[str, Any], tuple[int, ...]]] = [
    ("Conv", [values(6, 4, 3, 3), values(6)], {"pads": [1, 0, 2, 1], "strides": [2, 1], "dilations": [1, 2]}, IMAGE),
    ("Conv", [values(8, 2, 3, 2)], {"group": 2, "auto_pad": "SAME_LOWER", "strides": [2, 2]}, IMAGE),
    ("Conv", [values(4, 1, 3, 3)], {"group": 4, "auto_pad": "SAME_UPPER"}, IMAGE),
    ("Conv", [values(5, 4, 3)], {"auto_pad": "VALID"}, (2, 4, 9)),
    ("Gemm", [values(6, 5), values(5)], {"alpha": 0.5, "beta": 2.0}, (3, 6)),
    ("Gemm", [values(5, 3)], {"transA": 1, "transB": 1}, (3, 6)),
    ("MatMul", [values(2, 6, 5)], {}, (2, 7, 6)),
    ("MaxPool", [], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "ceil_mode": 1}, IMAGE),
    ("MaxPool", [], {"kernel_shape": [2, 3], "dilations": [2, 1]}, IMAGE),
    ("AveragePool", [], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "ceil_mode": 1}, IMAGE),
    ("AveragePool", [], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}, IMAGE),
    ("GlobalAveragePool", [], {}, IMAGE),
    ("GlobalMaxPool", [], {}, IMAGE),
    ("BatchNormalization", [values(4), values(4), values(4), abs(values(4))], {"epsilon": 1e-3}, IMAGE),
    ("InstanceNormalization", [values(4), values(4)], {}, IMAGE),
    ("GroupNormalization", [values(4), values(4)], {"num_groups": 2}, IMAGE),
    ("LayerNormalization", [values(6), values(6)], {"axis": -1}, IMAGE),
    ("Softmax", [], {"axis": 1}, IMAGE),
    ("LogSoftmax", [], {}, IMAGE),
    ("Add", [values(4, 1, 1)], {}, IMAGE),
    ("Sub", [values(6)], {}, IMAGE),
    ("Mul", [np.float32(3)], {}, IMAGE),
    ("Div", [np.float32(3)], {}, IMAGE),
    ("Pow", [np.float32(2)], {}, IMAGE),
    ("Min", [values(6), values(7, 1)], {}, IMAGE),
    ("PRelu", [values(4, 1, 1)], {}, IMAGE),
    ("Clip", [np.float32(-0.5), np.float32(0.7)], {}, IMAGE),
    ("Clip", ["", np.float32(0.7)], {}, IMAGE),
    *((name, [], {}, IMAGE) for name in ("Relu", "Sigmoid", "Tanh", "Erf", "Exp", "HardSigmoid", "HardSwish")),
    *((name, [], {}, IMAGE) for name in ("Elu", "Selu", "Celu", "LeakyRelu", "Softplus", "Softsign", "Mish", "Neg")),
    *((name, [], {}, IMAGE) for name in ("Abs", "Floor", "Round", "Sign", "Sin", "Gelu", "Identity", "Dropout")),
    ("Gelu", [], {"approximate": "tanh"}, IMAGE),
    ("ReduceMean", [ints(2, 3)], {"keepdims": 0}, IMAGE),
    ("ReduceSum", [ints(-1)], {}, IMAGE),
    ("ReduceL2", [], {}, IMAGE),
    ("ArgMax", [], {"axis": 1}, IMAGE),
    ("Reshape", [ints(0, -1, 3)], {}, IMAGE),
    ("Transpose", [], {"perm": [0, 2, 3, 1]}, IMAGE),
    ("Flatten", [], {"axis": 2}, IMAGE),
    ("Squeeze", [ints(1)], {}, (2, 1, 3)),
    ("Unsqueeze", [ints(0, 3)], {}, (2, 3)),
    ("Concat", [values(2, 3, 7, 6)], {"axis": 1}, IMAGE),
    ("Slice", [ints(1, -1), ints(2**62, -(2**62)), ints(1, 2), ints(1, -2)], {}, IMAGE),
    ("Split", [ints(1, 3)], {"axis": 1}, IMAGE),
    ("Split", [], {"axis": 2, "num_outputs": 2}, IMAGE),
    ("Gather", [ints(2, 0)], {"axis": 1}, IMAGE),
    ("GatherElements", [np.zeros((2, 4, 7, 2), np.int64)], {"axis": 3}, IMAGE),
    ("Expand", [ints(3, 1, 6)], {}, (3, 4, 1)),
    ("Tile", [ints(1, 2, 1, 3)], {}, IMAGE),
    ("Pad", [ints(0, 0, 1, 2, 0, 0, -1, 0), np.float32(0.5)], {}, IMAGE),
    ("Pad", [ints(0, 0, 1, 2, 0, 0, 3, 0)], {"mode": "reflect"}, IMAGE),
    ("DepthToSpace", [], {"blocksize": 2, "mode": "CRD"}, IMAGE),
    ("SpaceToDepth", [], {"blocksize": 2}, (2, 4, 6, 4)),
    ("Resize", ["", np.asarray([1, 1, 2, 2], np.float32)], {"mode": "nearest"}, IMAGE),
    ("Resize", ["", "", ints(2, 4, 5, 9)], {"mode": "linear"}, IMAGE),
    ("Cast", [], {"to": TensorProto.FLOAT16}, IMAGE),
]


def test_operators_compute_what_onnx_runtime_does() -> None:
    import jax

    expected, functions, arguments = [], [], []
    for kind, others, settings, shape in CASES:
        stored = {f"c{at}": value for at, value in enumerate(others) if not isinstance(value, str)}
        names = [f"c{at}" if f"c{at}" in stored else "" for at in range(len(others))]
        outputs = ["y", "z"] if kind == "Split" else ["y"]
        node = helper.make_node(kind, ["x", *names], outputs, **settings)
        proto = graph([node], shape, stored, 22 if kind == "GroupNormalization" else 20)
        inputs = values(*shape)
        expected.append(by_onnx_runtime(proto, inputs))
        model = convert(proto, shape)
        functions.append(model.function)
        arguments.append((model.weights, inputs))
    # One compilation for all takes a tenth of the time of one each.
    found = jax.jit(lambda given: [f(*one)[0] for f, one in zip(functions, given, strict=True)])(arguments)
    for case, right, here in zip(CASES, expected, found, strict=True):
        assert here.shape == right.shape, case
        np.testing.assert_allclose(here, right.astype(here.dtype), rtol=2e-5, atol=2e-5, err_msg=str(case))


def test_shapes_computed_in_the_graph_are_plain_numbers() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["all"]),
        helper.make_node("Gather", ["all", "first"], ["batch"]),
        helper.make_node("Mul", ["batch", "two"], ["twice"]),
        helper.make_node("Unsqueeze", ["twice", "axis"], ["rows"]),
        helper.make_node("Concat", ["rows", "rest"], ["shape"], axis=0),
        helper.make_node("Reshape", ["x", "shape"], ["y"]),
    ]
    stored = {"first": np.int64(0), "two": np.int64(2), "axis": ints(0), "rest": ints(-1)}
    expected, found = both(graph(nodes, IMAGE, stored, 20), values(*IMAGE))
    assert found.shape == expected.shape == (4, 84)


def test_settings_without_a_converter_are_named() -> None:
    node = helper.make_node("Resize", ["x", "", "", "c"], ["y"], mode="cubic")
    proto = graph([node], IMAGE, {"c": ints(2, 4, 14, 12)}, 20)
    with pytest.raises(CandidateError, match="Resize at y can't be converted: resizing with axes, antialias or cubic"):
        convert(proto, IMAGE)


def exported(model: torch.nn.Module, example: torch.Tensor, folder: Path) -> onnx.ModelProto:
    return onnx.load(export_onnx(model, example, folder / "model.onnx", "x86/onnxruntime", clip_last=True).path)


@pytest.mark.parametrize(
    ("bits", "activations", "integer_layers"),
    [
        pytest.param(32, None, 0, id="float"),
        pytest.param(8, None, 4, id="int8"),
        pytest.param(4, None, 4, id="int4", marks=pytest.mark.slow),
        pytest.param(8, "dynamic", 1, id="dynamic", marks=pytest.mark.slow),
        pytest.param("fp8", None, 0, id="fp8", marks=pytest.mark.slow),
    ],
)
def test_digits_files_give_onnx_runtimes_logits(
    bits: Format, activations: Any, integer_layers: int, digits_task: Task, tmp_path: Path
) -> None:
    model = digits_task.build()
    if bits != 32:
        model = Quantize(bits, activations=activations)(model, digits_task)
    proto = exported(model, example_input(digits_task.data), tmp_path)
    images = normalise(digits_task.data, digits_task.data.search.inputs[:64])
    for integers in (False, True):
        expected, found = both(proto, images, integers=integers)
        # A value in the middle of two numbers of the grid may be rounded to the other one.
        assert np.abs(found - expected).max() < 0.05 * expected.std()
        assert (found.argmax(1) == expected.argmax(1)).mean() > 0.98
    assert len(convert(proto, images.shape, integers=True).integer_layers) == integer_layers
    assert convert(proto, images.shape, integers=False).integer_layers == ()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v3_small", "timm:vit_tiny_patch16_224", "timm:efficientnet_b0"]
)
def test_imagenet_files_give_onnx_runtimes_logits(name: str, tmp_path: Path) -> None:
    torchvision = import_torchvision()
    import timm

    family, _, rest = name.rpartition(":")
    torch.manual_seed(0)
    model = timm.create_model(rest) if family else getattr(torchvision.models, rest)()
    proto = exported(model.eval(), torch.zeros(1, 3, 224, 224), tmp_path)
    expected, found = both(proto, values(2, 3, 224, 224))
    np.testing.assert_allclose(found, expected, atol=1e-4 * expected.std(), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("outputs", [None, "none", "all"])
def test_resnet20_files_give_onnx_runtimes_logits(outputs: str | None, tmp_path: Path) -> None:
    from autocompress import load_task
    from autocompress.core.errors import InputError

    try:
        task = load_task("resnet20", "cifar10")
    except InputError as error:
        pytest.skip(str(error))
    model = task.build()
    if outputs is not None:
        model = Quantize(8, outputs=outputs)(model, task)
    proto = exported(model, example_input(task.data), tmp_path)
    images = normalise(task.data, task.data.search.inputs[:256])
    expected, found = both(proto, images, integers=True)
    assert np.abs(found - expected).mean() < 0.02 * expected.std()
    assert (found.argmax(1) == expected.argmax(1)).mean() > 0.97
    assert len(convert(proto, images.shape, integers=True).integer_layers) == (0 if outputs is None else 22)
