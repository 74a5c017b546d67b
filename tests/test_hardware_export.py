"""Files for the x86 runtimes: what is in them, what they compute, and how they are measured."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from autocompress import Data, Plan, Quantize, Split, Task, load_task
from autocompress.compression.graph import find_layers
from autocompress.compression.quantization import Grid, quantized_layers
from autocompress.core.errors import CandidateError
from autocompress.core.types import Artifact, Method
from autocompress.evaluators.metrics import parity_error
from autocompress.hardware.onnx_bits import bits_in_graph
from autocompress.hardware.onnx_export import export_onnx
from autocompress.hardware.x86 import CpuBackend
from autocompress.tasks.data import normalise
from autocompress.tasks.models import ModelSource

RNG = np.random.default_rng(0)
NOISE = Split(RNG.integers(0, 256, (64, 3, 32, 32), dtype=np.uint8), np.arange(64) % 10)
DATA = Data("noise", NOISE, NOISE, NOISE, tuple("abcdefghij"), (0.45,) * 3, (0.25,) * 3)

RUNTIMES = ("onnxruntime", "openvino")
COMPUTING = ("Conv", "Gemm", "MatMul")
LAYERS = ("conv1", "conv2", "conv3", "fc")
MODELS = ("digits-cnn", "resnet20", "torchvision:mobilenet_v3_small")
KINDS = ("fp32", "16", "int8")
# Of the large model, one file in floating point and one in 8 bits are made by default, the others with the slow tests.
FILES = [
    pytest.param(name, kind, runtime, marks=[pytest.mark.slow] * large)
    for name in MODELS
    for kind in KINDS
    for runtime in RUNTIMES
    for large in [name == MODELS[2] and (kind == "16" or (kind, runtime) == ("int8", "onnxruntime"))]
]


@dataclass(frozen=True)
class Lively:
    """Builds a model with random weights, and batch norms that have seen something."""

    spec: str

    def __call__(self) -> nn.Module:
        model = ModelSource(self.spec, 10, (3, 32, 32))()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_var.uniform_(0.5, 1.5, generator=generator)  # type: ignore[union-attr]
                    module.running_mean.normal_(0, 0.1, generator=generator)  # type: ignore[union-attr]
                    module.bias.normal_(0, 0.1, generator=generator)
        return model


@dataclass(frozen=True)
class Built:
    """A model with rounded weights, as PyTorch computes it, and its file."""

    task: Task
    model: nn.Module
    artifact: Artifact

    def images(self, count: int) -> np.ndarray:
        """The first of the search split, as a model's input."""
        return normalise(self.task.data, self.task.data.search.inputs[:count])

    def logits(self, count: int) -> np.ndarray:
        """What PyTorch makes of them."""
        with torch.no_grad():
            return self.model(torch.from_numpy(self.images(count))).numpy()


Build = Callable[[str, str, str], Built]


@pytest.fixture(scope="module")
def build(digits_task: Task, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Make a model's file of a kind ("fp32", "16" or "int8") for a runtime; each is made once."""
    made: dict[tuple[str, str, str], Built] = {}

    def make(name: str, kind: str, runtime: str) -> Built:
        backend = CpuBackend(runtime)
        # Only int8 files differ: the other kinds are one file, for both runtimes.
        key = (name, kind, runtime if kind == "int8" else "")
        if key not in made:
            task = digits_task if name == "digits-cnn" else Task(name, Lively(name), DATA, trained=False)
            plans: dict[str, Plan] = {
                "fp32": (),
                "16": (Quantize(16),),
                "int8": (Quantize(8, outputs=backend.capabilities.outputs),),
            }
            model = task.build()
            for step in plans[kind]:
                model = step(model, task)
            folder = tmp_path_factory.mktemp("files")
            made[key] = Built(task, model, backend.build(model, task, folder))
        return made[key]

    return make


def initializers(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Stored tensors by name."""
    return {entry.name: numpy_helper.to_array(entry) for entry in proto.graph.initializer}


def makers(proto: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """The node behind each value."""
    return {name: node for node in proto.graph.node for name in node.output}


def is_grid(node: onnx.NodeProto, grid: Grid, stored: dict[str, np.ndarray]) -> bool:
    """Whether a QuantizeLinear or DequantizeLinear node has this grid's scale, zero point and sign."""
    scale, zero = stored[node.input[1]], stored[node.input[2]]
    kind = np.int8 if grid.low < 0 else np.uint8
    same = np.array_equal(scale.reshape(-1), np.asarray(grid.scale, np.float32).reshape(-1))
    return same and zero.dtype == kind and bool((zero == grid.zero_point).all())


def node_of(layer: str, built: Built, proto: onnx.ModelProto) -> onnx.NodeProto:
    """The node that computes an int8 layer, found by its integer weights."""
    stored, made_by = initializers(proto), makers(proto)
    entry = quantized_layers(built.model)[layer]
    assert entry.weight is not None
    integers = entry.weight.integers(built.model.get_submodule(layer).weight).numpy()  # type: ignore[arg-type]
    for node in proto.graph.node:
        if node.op_type in COMPUTING:
            values = stored[made_by[node.input[1]].input[0]]
            # A linear layer may be stored the other way round.
            if values.dtype == np.int8 and (np.array_equal(values, integers) or np.array_equal(values.T, integers)):
                return node
    raise AssertionError(f"no node of the file has the weights of {layer}")


@pytest.mark.parametrize(("name", "kind", "runtime"), FILES)
def test_a_file_computes_what_pytorch_computes(build: Build, name: str, kind: str, runtime: str) -> None:
    built = build(name, kind, runtime)
    got = CpuBackend(runtime).predict(built.artifact, built.images(64))
    # OpenVINO runs 16-bit layers in bfloat16 where the CPU can; an int8 sum may fall to the other side of a step.
    limit = {"fp32": 1e-3, "16": 1e-3 if runtime == "onnxruntime" else 0.05, "int8": 0.2}[kind]
    assert (got.dtype, got.shape) == (np.float32, (64, 10))
    assert parity_error(built.logits(64), got) < limit


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("kind", ["fp32", "int8"])
@pytest.mark.parametrize("count", [1, 7])
def test_a_file_takes_any_number_of_images(build: Build, kind: str, runtime: str, count: int) -> None:
    built = build("resnet20", kind, runtime)
    got = CpuBackend(runtime).predict(built.artifact, built.images(count))
    assert got.shape == (count, 10)
    assert parity_error(built.logits(count), got) < (1e-3 if kind == "fp32" else 0.2)


@pytest.mark.parametrize("name", MODELS)
def test_one_session_takes_batches_of_different_sizes(build: Build, name: str) -> None:
    built = build(name, "fp32", "onnxruntime")
    session = onnxruntime.InferenceSession(str(built.artifact.path), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", *built.task.data.input_shape]
    assert [(v.name, v.type) for v in session.get_outputs()] == [("logits", "tensor(float)")]
    for count in (1, 7):
        (got,) = session.run(None, {"input": built.images(count)})
        assert np.allclose(got, built.logits(count), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_last_batch_that_is_not_full_loses_and_adds_no_image(build: Build, runtime: str) -> None:
    built = build("digits-cnn", "fp32", runtime)
    count = len(built.task.data.search)
    assert count % 128 != 0
    got = CpuBackend(runtime).predict(built.artifact, built.images(count))
    assert np.allclose(got, built.logits(count), rtol=1e-3, atol=1e-3)


def test_fewer_bits_make_smaller_files(build: Build) -> None:
    sizes = {kind: build("resnet20", kind, "openvino").artifact.size_bytes for kind in ("fp32", "16", "int8")}
    assert sizes["int8"] < 0.4 * sizes["fp32"]
    assert sizes["16"] < 0.6 * sizes["fp32"]


def test_an_artifact_describes_its_file(build: Build) -> None:
    artifact = build("digits-cnn", "int8", "openvino").artifact
    content = artifact.path.read_bytes()
    assert artifact.size_bytes == len(content)
    assert artifact.sha256 == hashlib.sha256(content).hexdigest()
    assert artifact.runtime == "x86/openvino"


@pytest.mark.parametrize(("name", "kind", "runtime"), [file for file in FILES if "int8" in file.values])
def test_the_nodes_that_round_have_the_operators_own_scales(build: Build, name: str, kind: str, runtime: str) -> None:
    built = build(name, kind, runtime)
    proto = onnx.load(str(built.artifact.path))
    stored, made_by = initializers(proto), makers(proto)
    entries = quantized_layers(built.model)
    assert len(entries) == sum(node.op_type in COMPUTING for node in proto.graph.node)
    for layer, entry in entries.items():
        assert entry.weight is not None
        assert entry.input is not None
        node = node_of(layer, built, proto)
        weight = made_by[node.input[1]]
        assert weight.op_type == "DequantizeLinear"
        assert is_grid(weight, entry.weight, stored)
        back = made_by[node.input[0]]
        there = made_by[back.input[0]]
        assert (there.op_type, back.op_type) == ("QuantizeLinear", "DequantizeLinear")
        assert is_grid(there, entry.input, stored)
        assert is_grid(back, entry.input, stored)


@pytest.mark.parametrize(("name", "runtime"), [(MODELS[1], "onnxruntime"), (MODELS[2], "openvino")])
def test_outputs_are_rounded_in_the_file_where_the_operator_rounds_them(build: Build, name: str, runtime: str) -> None:
    built = build(name, "int8", runtime)
    proto = onnx.load(str(built.artifact.path))
    stored = initializers(proto)
    rounding = {layer: entry.output for layer, entry in quantized_layers(built.model).items() if entry.output}
    assert rounding
    for layer, grid in rounding.items():
        node = node_of(layer, built, proto)
        (taker,) = [other for other in proto.graph.node if node.output[0] in other.input]
        assert taker.op_type == "QuantizeLinear"
        assert is_grid(taker, grid, stored)


def test_a_float_file_has_no_rounding_and_no_batch_norm_in_it(build: Build) -> None:
    proto = onnx.load(str(build("resnet20", "fp32", "openvino").artifact.path))
    kinds = {node.op_type for node in proto.graph.node}
    assert "Conv" in kinds
    assert not kinds & {"QuantizeLinear", "DequantizeLinear", "BatchNormalization"}


def test_16_bit_weights_are_stored_in_half_precision(build: Build) -> None:
    built = build("digits-cnn", "16", "onnxruntime")
    stored = initializers(onnx.load(str(built.artifact.path))).values()
    halves = sorted(values.size for values in stored if values.dtype == np.float16)
    weights = [built.model.get_submodule(name).weight for name in ("conv1", "conv2", "conv3", "fc")]
    assert halves == sorted(weight.numel() for weight in weights)  # type: ignore[operator,union-attr]


@pytest.mark.parametrize("bits", [{"conv1": 8, "conv2": 4, "fc": 16}, 8, 32])
def test_the_file_says_how_many_bits_each_layer_has(
    digits_task: Task, tmp_path: Path, bits: int | dict[str, int]
) -> None:
    model = Quantize(bits)(digits_task.build(), digits_task)
    artifact = export_onnx(model, torch.zeros(1, 1, 8, 8), tmp_path / "model.onnx", "x86/openvino")
    named = bits if isinstance(bits, dict) else dict.fromkeys(LAYERS, bits)
    expected = {name: named.get(name, 32) for name in LAYERS}
    assert bits_in_graph(artifact.path) == {
        name: {"weight": b, "activation": b if b <= 8 else 32} for name, b in expected.items()
    }


@pytest.mark.parametrize(("bits", "symmetric"), [(7, True), (4, True), (4, False), (2, True)])
def test_a_layer_below_8_bits_stays_on_its_grid_in_the_file(
    digits_task: Task, tmp_path: Path, bits: int, symmetric: bool
) -> None:
    model = Quantize(bits, symmetric=symmetric, outputs="all")(digits_task.build(), digits_task)
    artifact = export_onnx(model, torch.zeros(1, 1, 8, 8), tmp_path / "model.onnx", "x86/onnxruntime")
    proto = onnx.load(str(artifact.path))
    stored, made_by = initializers(proto), makers(proto)
    top = 2 ** (bits - 1) - 1
    kind = ml_dtypes.int4 if bits <= 4 else np.int8
    weights = [value for value in stored.values() if value.dtype == kind and value.ndim > 1]
    assert len(weights) == 4
    assert all(value.min() >= -top and value.max() <= top for value in weights)
    # Show what each rounding node makes of images that are brighter and darker than those of the calibration.
    integers = [node.output[0] for node in proto.graph.node if node.op_type == "QuantizeLinear"]
    for name in integers:
        kind = onnx.TensorProto.INT8 if stored[made_by[name].input[2]].dtype == np.int8 else onnx.TensorProto.UINT8
        proto.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    images = normalise(digits_task.data, digits_task.data.search.inputs) * 3
    found = session.run(integers, {"input": images})
    grids = [g for entry in quantized_layers(model).values() for g in (entry.input, entry.output) if g is not None]
    assert len(found) == len(grids) == 5
    assert all(int(values.max()) - int(values.min()) < 2**bits for values in found)
    assert max(int(values.max()) - int(values.min()) for values in found) > 2 ** (bits - 1)


@pytest.mark.parametrize(
    "runtime",
    [
        "onnxruntime",
        "openvino",
    ],
)
@pytest.mark.parametrize("bits", [4, 2])
def test_a_file_below_8_bits_computes_what_pytorch_computes(
    digits_task: Task, tmp_path: Path, bits: int, runtime: str
) -> None:
    backend = CpuBackend(runtime)
    model = Quantize(bits, outputs=backend.capabilities.outputs)(digits_task.build(), digits_task)
    built = Built(digits_task, model, backend.build(model, digits_task, tmp_path))
    assert parity_error(built.logits(200), backend.predict(built.artifact, built.images(200))) < 0.01


Formats = dict[str, Any]

# For each setting: what the operator gets, the formats that the file's two layers must have, and the largest deviation.
# OpenVINO converts to 8-bit floating point with other ties, and rounds the inputs of linear layers with 8-bit weights.
SETTINGS: dict[str, tuple[Formats, tuple[object, object], float]] = {
    "per tensor": ({"bits": 8, "granularity": "tensor"}, (8, 8), 0.01),
    "per channel": ({"bits": 8}, (8, 8), 0.01),
    "per group": ({"bits": 8, "granularity": "group", "group_size": 8}, (8, 8), 0.01),
    "per group, 8-bit activations": (
        {"bits": 4, "activations": 8, "granularity": "group", "group_size": 8, "weight_symmetric": False},
        (4, 8),
        0.01,
    ),
    "per group, weights alone": (
        {"bits": 4, "activations": 32, "granularity": "group", "group_size": 8, "weight_symmetric": False},
        (4, 32),
        0.02,
    ),
    "asymmetric weights": ({"bits": 8, "weight_symmetric": False}, (8, 8), 0.01),
    "4-bit asymmetric weights": ({"bits": 4, "activations": 8, "weight_symmetric": False}, (4, 8), 0.01),
    "4-bit weights": ({"bits": 4, "activations": 8}, (4, 8), 0.01),
    "4-bit weights alone": ({"bits": 4, "activations": 32}, (4, 32), 0.02),
    "activations alone": ({"bits": 32, "activations": 8}, (32, 8), 0.01),
    "ternary": ({"bits": 1.58}, (1.58, 8), 0.01),
    "binary": ({"bits": 1}, (1, 8), 0.01),
    "bf16": ({"bits": "bf16"}, ("bf16", 32), 0.02),
    "fp8": ({"bits": "fp8"}, ("fp8", "fp8"), 0.03),
    "fp8e5m2 weights alone": ({"bits": "fp8e5m2", "activations": 32}, ("fp8e5m2", 32), 0.02),
    "codebook": ({"bits": 3, "scheme": "codebook"}, (3, 32), 0.01),
    "codebook per tensor": ({"bits": 5, "scheme": "codebook", "granularity": "tensor", "activations": 8}, (5, 8), 0.01),
    "dynamic": ({"bits": 8, "activations": "dynamic"}, (8, "dynamic"), 0.03),
    "awq": ({"bits": 3, "awq": True}, (3, 32), 0.02),
}


class Small(nn.Module):
    """Two layers for 8x8 images, with a sharp eye for wrong scales."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 16, 4, stride=4)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().flatten(1))


@pytest.fixture(scope="module")
def small_task() -> Task:
    """The small model on noise."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return Small().eval()

    noise = Split(np.random.default_rng(1).integers(0, 256, (128, 2, 8, 8), dtype=np.uint8), np.arange(128) % 10)
    return Task("small on noise", make, Data("noise", noise, noise, noise, DATA.classes, (0.5,) * 2, (0.25,) * 2))


@pytest.mark.parametrize("name", SETTINGS)
def test_both_runtimes_compute_every_format_and_its_file_says_which(
    small_task: Task, tmp_path: Path, name: str
) -> None:
    settings, (weight, activation), limit = SETTINGS[name]
    model = Quantize(outputs="all", **settings)(small_task.build(), small_task)
    path = tmp_path / "model.onnx"
    artifact = export_onnx(model, torch.zeros(1, 2, 8, 8), path, "x86/onnxruntime", clip_last=True)
    assert bits_in_graph(path) == {layer: {"weight": weight, "activation": activation} for layer in ("conv", "fc")}
    built = Built(small_task, model, artifact)
    for runtime in RUNTIMES:
        assert parity_error(built.logits(128), CpuBackend(runtime).predict(artifact, built.images(128))) < limit


def test_the_formats_of_a_mixed_file_are_read_from_its_graph(digits_task: Task, tmp_path: Path) -> None:
    step = Quantize(
        {"conv1": 5, "conv2": 1.58, "fc": "fp8"}, activations={"conv1": 4, "conv2": 32, "conv3": 6, "fc": "dynamic"}
    )
    artifact = export_onnx(step(digits_task.build(), digits_task), torch.zeros(1, 1, 8, 8), tmp_path / "m.onnx", "any")
    assert not onnx.load(str(artifact.path)).metadata_props
    assert bits_in_graph(artifact.path) == {
        "conv1": {"weight": 5, "activation": 4},
        "conv2": {"weight": 1.58, "activation": 32},
        "conv3": {"weight": 32, "activation": 6},
        "fc": {"weight": "fp8", "activation": "dynamic"},
    }


def test_the_weights_of_a_float_file_are_called_by_their_layers(build: Build) -> None:
    found = bits_in_graph(build("resnet20", "fp32", "openvino").artifact.path)
    layers = find_layers(build("resnet20", "fp32", "openvino").model, torch.zeros(1, 3, 32, 32))
    assert found == {layer.name: {"weight": 32, "activation": 32} for layer in layers}


def test_4_bit_weights_take_half_a_byte_and_run_on_the_kernels_for_8_bits(digits_task: Task, tmp_path: Path) -> None:
    sizes = {}
    for bits in (8, 4):
        model = Quantize(bits, activations=8, outputs="all")(digits_task.build(), digits_task)
        artifact = CpuBackend("onnxruntime").build(model, digits_task, tmp_path / str(bits))
        sizes[bits] = artifact.size_bytes
    weights = sum(model.get_submodule(name).weight.numel() for name in LAYERS)  # type: ignore[union-attr,operator]
    assert sizes[8] - sizes[4] == pytest.approx(weights / 2, rel=0.02)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(artifact.path), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds.count("QLinearConv") == 3


@pytest.mark.parametrize(
    ("runtime", "settings"),
    [("onnxruntime", {"activations": 8}), ("openvino", {"activations": 32, "granularity": "group"})],
)
def test_a_transformer_with_4_bit_weights_computes_what_pytorch_computes(
    tmp_path: Path, runtime: str, settings: Formats
) -> None:
    tokens = Split(np.random.default_rng(2).integers(0, 50, (32, 12)), np.arange(32) % 3)
    task = load_task("text-transformer", Data("tokens", tokens, tokens, tokens, tuple("abc"), vocabulary=50))
    model = Quantize(4, **settings)(task.build(), task)
    built = Built(task, model, CpuBackend(runtime).build(model, task, tmp_path))
    assert parity_error(built.logits(32), CpuBackend(runtime).predict(built.artifact, built.images(32))) < 0.01
    assert set(bits_in_graph(built.artifact.path)) == set(quantized_layers(model))


def test_a_codebook_takes_the_bits_of_its_indices(digits_task: Task, tmp_path: Path) -> None:
    step = Quantize(4, scheme="codebook", granularity="tensor")
    model = step(digits_task.build(), digits_task)
    artifact = export_onnx(model, torch.zeros(1, 1, 8, 8), tmp_path / "model.onnx", "any")
    weights = sum(model.get_submodule(name).weight.numel() for name in LAYERS)  # type: ignore[union-attr,operator]
    assert weights / 2 < artifact.size_bytes < weights / 2 + 5000


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_measurement_gives_every_figure_that_the_target_promises(build: Build, runtime: str) -> None:
    # One core and one attempt: enough to see what comes back.
    backend = CpuBackend(runtime, threads=1, budget=0.05, attempts=1)
    built, reference = build("digits-cnn", "int8", runtime), build("digits-cnn", "fp32", runtime)
    found = {m.name: m for m in backend.measure(built.artifact, built.task, reference.artifact)}
    assert set(found) == {*backend.capabilities.metrics, "reference_latency"}
    for name in ("latency", "reference_latency", "throughput"):
        ends = found[name].ci95
        assert ends is not None
        assert 0 < ends[0] <= found[name].value <= ends[1]
    assert min(found[name].samples for name in ("latency", "reference_latency")) >= 30
    assert {name: m.unit for name, m in found.items()} == {
        "latency": "s",
        "reference_latency": "s",
        "throughput": "1/s",
        "memory": "B",
    }
    assert found["memory"].value >= 0
    assert {m.provenance.method for m in found.values()} == {Method.MEASURED}
    assert all(runtime in m.provenance.runtime and "1 thread" in m.provenance.device for m in found.values())


def test_a_measurement_without_a_reference_gives_no_reference_latency(build: Build) -> None:
    backend = CpuBackend("onnxruntime", threads=1, budget=0.05, attempts=1)
    built = build("digits-cnn", "fp32", "onnxruntime")
    assert {m.name for m in backend.measure(built.artifact, built.task, None)} == set(backend.capabilities.metrics)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "gone"])
def test_a_broken_file_fails_the_candidate_and_nothing_else(
    build: Build, tmp_path: Path, runtime: str, damage: str
) -> None:
    built = build("digits-cnn", "fp32", runtime)
    content = built.artifact.path.read_bytes()
    path = tmp_path / "model.onnx"
    if damage != "gone":
        path.write_bytes({"truncated": content[:5000], "garbage": b"\x93" * 5000, "empty": b""}[damage])
    broken = Artifact(built.artifact.runtime, path, "", 0)
    backend = CpuBackend(runtime, threads=1, budget=0.05, attempts=1)
    with pytest.raises(CandidateError):
        backend.predict(broken, built.images(2))
    with pytest.raises(CandidateError):
        backend.measure(broken, built.task, None)


class Undecided(nn.Module):
    """Takes another way for bright images, which no file can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            return self.fc(x.flatten(1))
        return self.fc(-x.flatten(1))


def test_a_model_that_can_not_be_traced_fails_the_candidate(digits_task: Task, tmp_path: Path) -> None:
    with pytest.raises(CandidateError, match=r"torch.export can't trace the model|ONNX export failed"):
        CpuBackend("onnxruntime").build(Undecided(), digits_task, tmp_path)
    assert not (tmp_path / "model.onnx").exists()
