"""Ethos-U NPUs: TensorFlow Lite files with the same integers as ours, and what Arm's compiler makes of them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from autocompress import Prune, Quantize, Task
from autocompress.core.errors import CandidateError, InputError
from autocompress.core.types import Artifact, Candidate, Method, State
from autocompress.evaluators.objectives import parse_objectives
from autocompress.evaluators.pipeline import Evaluator
from autocompress.hardware.compare import compare_file
from autocompress.hardware.ethos_u import EthosUBackend
from autocompress.hardware.files import read_file
from autocompress.hardware.onnx_export import export_onnx
from autocompress.hardware.onnx_to_tflite import convert
from autocompress.hardware.targets import make_backend
from autocompress.hardware.tflite_file import Grid, TfOperator, TfTensor, input_of, write_model
from autocompress.hardware.x86 import CpuBackend
from autocompress.tasks.data import normalise
from autocompress.tasks.models import load_task

pytest.importorskip("ethosu", reason="needs Arm's compiler: pip install ethos-u-vela")
pytest.importorskip("ai_edge_litert", reason="needs LiteRT: pip install ai-edge-litert")
NPU = EthosUBackend("u55-128")


@pytest.fixture(scope="module")
def rounded(digits_task: Task, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The digits model in 8 bits, as ONNX."""
    model = Quantize(8, outputs="all")(digits_task.build(), digits_task)
    return CpuBackend("onnxruntime").build(model, digits_task, tmp_path_factory.mktemp("rounded"))


def deviation(found: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square of the difference, relative to that of the expected values."""
    return float(np.sqrt(np.mean(np.square(found - expected)) / np.mean(np.square(expected))))


def as_tflite(onnx: Artifact, path: Path, images: np.ndarray | None = None) -> Artifact:
    content, assumed = convert(onnx.path, images)
    assert assumed == ()
    path.write_bytes(content)
    return replace(onnx, path=path, size_bytes=len(content))


def test_a_tflite_file_computes_what_the_rounded_onnx_file_computes(
    rounded: Artifact, digits_task: Task, tmp_path: Path
) -> None:
    images = normalise(digits_task.data, digits_task.data.search.inputs[:200])
    expected = CpuBackend("onnxruntime").predict(rounded, images)
    file = as_tflite(rounded, tmp_path / "model.tflite", images)
    assert input_of(file.path) == ((1, 8, 8, 1), "int8")
    found = NPU.predict(file, images)
    assert deviation(found, expected) < 0.03
    assert (found.argmax(1) == expected.argmax(1)).mean() > 0.98


class Mixed(nn.Module):
    """Paddings of all kinds, depthwise, dilated and grouped convolutions, sums, products, pooling and joins."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 16, 3, padding=2, dilation=2, groups=8)
        self.even = nn.Conv2d(16, 8, 2)
        self.point = nn.Conv2d(8, 8, 1, bias=False)
        self.pool, self.mean = nn.MaxPool2d(2, 1), nn.AvgPool2d(2, 1)
        self.gate = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(images))
        y = self.even(nn.functional.relu6(self.depthwise(x)))
        y = self.mean(self.pool(nn.functional.hardswish(y + self.point(y))))
        gate = self.gate(y.mean((2, 3), keepdim=True))
        y = torch.cat([y * nn.functional.hardsigmoid(gate), y * torch.sigmoid(gate)], 1)
        return self.head(y.mean((2, 3)))


def test_operators_of_many_kinds_are_written_as_they_compute(digits_task: Task, tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = replace(digits_task, build=lambda: Mixed().eval())
    model = Quantize(8, outputs="all")(task.build(), task)
    images = normalise(task.data, task.data.search.inputs[:100])
    onnx = CpuBackend("onnxruntime").build(model, task, tmp_path)
    expected = CpuBackend("onnxruntime").predict(onnx, images)
    file = as_tflite(onnx, tmp_path / "model.tflite", images)
    spread = expected - expected.mean(0)  # random networks have much in common for all images
    found = NPU.predict(file, images)
    assert deviation(found, expected) < 0.02
    assert np.corrcoef((found - found.mean(0)).ravel(), spread.ravel())[0, 1] > 0.98
    latency = NPU.measure(file, task, None)[0]
    assert latency.provenance.flags == ()  # all of it runs on the NPU


def test_a_candidate_gets_a_file_to_deploy_and_figures_of_their_kind(
    rounded: Artifact, digits_task: Task, tmp_path: Path
) -> None:
    backend = make_backend("arm/ethos-u55-128")
    evaluator = Evaluator(digits_task, backend, parse_objectives(["accuracy", "latency"], backend), (), tmp_path)
    found = evaluator(Candidate((Prune(0.5),)))
    assert found.state is State.COMPLETE, found.reason
    assert found.notes == ("arm/ethos-u55-128: rounded to 8 bits when built: every layer",)
    assert found.artifact is not None
    assert found.artifact.path.suffix == ".tflite"
    kinds = {name: m.provenance.method for name, m in found.measurements.items()}
    assert kinds["latency"] is kinds["memory"] is Method.COMPILED
    assert kinds["accuracy"] is kinds["parity"] is Method.SIMULATED
    assert found.measurements["parity"].value < 0.1
    whole = as_tflite(rounded, tmp_path / "whole.tflite")
    latency, memory, reference = NPU.measure(found.artifact, digits_task, whole)
    assert (latency.unit, memory.unit, reference.name) == ("s", "B", "reference_latency")
    assert 1e-5 < latency.value < reference.value < 1e-3
    assert latency.provenance.device == "Ethos-U55-128, 500 MHz, Ethos_U55_High_End_Embedded, Shared_Sram"


def test_files_that_people_bring_are_estimated(rounded: Artifact, digits_task: Task, tmp_path: Path) -> None:
    file = as_tflite(rounded, tmp_path / "model.tflite")
    small, large = compare_file(file.path, ["arm/ethos-u55-128", "arm/ethos-u65-512"])
    assert small.reason == large.reason == ""
    assert large.measurements["latency"].value < small.measurements["latency"].value
    (onnx,) = compare_file(rounded.path, ["arm/ethos-u55-128"])
    assert onnx.measurements["latency"].value == small.measurements["latency"].value
    whole = CpuBackend("onnxruntime").build(digits_task.build(), digits_task, tmp_path)
    (floats,) = compare_file(whole.path, ["arm/ethos-u55-128"])
    assert floats.measurements["latency"].provenance.flags == ("as if in 8 bits: 4 of the layers are not",)


def test_files_that_no_npu_takes_are_refused(rounded: Artifact, tmp_path: Path) -> None:
    file = as_tflite(rounded, tmp_path / "model.tflite")
    with pytest.raises(InputError, match=r"x86/openvino takes ONNX files; TensorFlow Lite files are for arm/ethos-u"):
        read_file(file.path, "x86/openvino")
    broken = tmp_path / "broken.tflite"
    for content in (b"", b"nothing at all", file.path.read_bytes()[:40]):
        broken.write_bytes(content)
        with pytest.raises(InputError, match=r"is no (readable )?TensorFlow Lite model"):
            read_file(broken, NPU.name)
    floats = TfTensor("x", (1, 8), "float32")
    broken.write_bytes(write_model([floats], [], [0], [0]))
    with pytest.raises(InputError, match="needs a file whose input is in 8-bit integers; it is float32"):
        read_file(broken, NPU.name)


def pooled(kernel: int) -> bytes:
    """A convolution, and a mean whose windows the NPU has or has not."""
    grid = Grid((0.05,))
    window = (("padding", 0), ("stride_w", kernel // 2), ("stride_h", kernel // 2), ("filter_w", kernel))
    return write_model(
        [
            TfTensor("x", (1, 16, 16, 8), grid=grid),
            TfTensor("w", (8, 1, 1, 8), grid=Grid((0.01,) * 8), data=np.ones((8, 1, 1, 8), np.int8)),
            TfTensor("b", (8,), "int32", Grid((0.0005,) * 8), np.zeros(8, np.int32)),
            TfTensor("h", (1, 16, 16, 8), grid=grid),
            TfTensor("y", (1, *(-(-16 // (kernel // 2)),) * 2, 8), grid=grid),
        ],
        [
            TfOperator("CONV_2D", (0, 1, 2), (3,), (("padding", 1), ("stride_w", 1), ("stride_h", 1))),
            TfOperator("AVERAGE_POOL_2D", (3,), (4,), (*window, ("filter_h", kernel))),
        ],
        [0],
        [4],
    )


def test_what_is_left_to_the_processor_is_flagged(tmp_path: Path) -> None:
    flags = {}
    for kernel in (2, 9):
        path = tmp_path / f"{kernel}.tflite"
        path.write_bytes(pooled(kernel))
        flags[kernel] = NPU.measure(*read_file(path, NPU.name), None)[0].provenance.flags
    left = "without 1 operator left to the processor: AVERAGE_POOL_2D (kernel width: 9 out of range)"
    assert flags == {2: (), 9: (left,)}


def test_what_can_not_be_written_fails_the_candidate(digits_task: Task, tmp_path: Path) -> None:
    half = Quantize(16)(digits_task.build(), digits_task)
    with pytest.raises(CandidateError, match="computes on 8-bit integers alone, and has no kernel for conv1, conv2"):
        NPU.build(half, digits_task, tmp_path)
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Softplus(), nn.Flatten(), nn.Linear(256, 10)).eval()
    file = export_onnx(model, torch.zeros(1, 1, 8, 8), tmp_path / "model.onnx", "any")
    with pytest.raises(CandidateError, match=r"TensorFlow Lite in 8 bits: Softplus \(.*\) can't be written"):
        convert(file.path)


@pytest.mark.slow
def test_a_trained_resnet_keeps_its_accuracy(tmp_path: Path) -> None:
    archive = Path(os.environ.get("AUTOCOMPRESS_DATA", Path(__file__).parents[2] / "shared/data")) / "cifar10.tar.xz"
    if not archive.is_file():
        pytest.skip(f"needs CIFAR-10 in {archive}")
    task = load_task("resnet20", f"cifar10:{archive}")
    model = Quantize(8, outputs="all")(task.build(), task)
    images, labels = normalise(task.data, task.data.search.inputs[:500]), task.data.search.labels[:500]
    with torch.no_grad():
        expected = model(torch.from_numpy(images)).numpy()
    file = NPU.build(model, task, tmp_path)
    found = NPU.predict(file, images)
    assert abs((found.argmax(1) == labels).mean() - (expected.argmax(1) == labels).mean()) < 0.01
    # As of the file that litert-torch 0.10 makes: 1.27 ms.
    assert NPU.measure(file, task, None)[0].value == pytest.approx(1.27e-3, rel=0.05)


def test_a_target_says_whose_estimate_it_gives() -> None:
    assert NPU.missing() is None
    assert "latency is Vela's own estimate for its system Ethos_U55_High_End_Embedded with memory Shared_Sram" in (
        NPU.capabilities.notes
    )
