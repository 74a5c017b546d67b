"""The Edge TPU: its latency model against published times, its files, and a search for it."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import autocompress as ac
from autocompress import Prune, Quantize, Task
from autocompress.core.errors import CandidateError
from autocompress.core.notes import collect_notes
from autocompress.core.types import Method, State
from autocompress.evaluators.metrics import parity_error
from autocompress.evaluators.pipeline import lacks_kernels
from autocompress.hardware.onnx_export import export_onnx
from autocompress.hardware.operators import OperatorCall
from autocompress.hardware.systolic import ERROR, EdgeTpu, edge_tpu_latency, outside_validation, systolic_cycles
from autocompress.hardware.targets import make_backend
from autocompress.hardware.tpu import EdgeTpuBackend
from autocompress.hardware.traced import operators_of
from autocompress.tasks.data import normalise
from autocompress.tasks.models import import_torchvision

# Milliseconds on a desktop with the USB accelerator: https://coral.ai/docs/edgetpu/benchmarks
FITTED = [
    pytest.param("mobilenetv1_100", 224, 2.4, marks=pytest.mark.slow),
    pytest.param("mobilenetv2_100", 224, 2.6),
    pytest.param("torchvision:googlenet", 224, 3.4, marks=pytest.mark.slow),
    pytest.param("torchvision:squeezenet1_0", 224, 2.1, marks=pytest.mark.slow),
    pytest.param("torchvision:squeezenet1_1", 224, 2.1),
    pytest.param("resnet50", 299, 49, marks=pytest.mark.slow),
    pytest.param("torchvision:vgg16", 224, 296),
]
UNSEEN = [("resnetv2_50", 299, 50), ("torchvision:vgg19", 224, 308), ("inception_v4", 299, 85)]
UNSEEN += [("resnetv2_152", 299, 128), ("efficientnet_es", 224, 5.1), ("efficientnet_em", 240, 8.7)]
UNSEEN += [("efficientnet_el", 300, 25.3), ("inception_resnet_v2", 299, 57)]


def operators(name: str, size: int) -> tuple[OperatorCall, ...]:
    """Of an ImageNet model without weights."""
    torchvision = import_torchvision()
    import timm

    family, _, rest = name.rpartition(":")
    settings = {"aux_logits": False, "init_weights": False} if rest == "googlenet" else {}
    with torch.device("meta"):
        model = getattr(torchvision.models, rest)(**settings) if family else timm.create_model(rest)
    return operators_of(model.eval(), torch.empty(1, 3, size, size, device="meta"))


@pytest.mark.parametrize(("name", "size", "published"), FITTED)
def test_networks_that_the_constants_were_fitted_on_are_within_20_percent(
    name: str, size: int, published: float
) -> None:
    calls = operators(name, size)
    assert edge_tpu_latency(calls) * 1e3 == pytest.approx(published, rel=0.2)
    assert outside_validation(calls) == ()


@pytest.mark.slow
def test_the_stated_error_is_what_networks_that_were_not_fitted_show() -> None:
    ratios = {}
    for name, size, published in UNSEEN:
        calls = operators(name, size)
        assert outside_validation(calls) == ()
        ratios[name] = published / 1e3 / edge_tpu_latency(calls)
    beyond = {name: ratio for name, ratio in ratios.items() if not ERROR[0] <= ratio <= ERROR[1]}
    assert beyond == {"inception_resnet_v2": pytest.approx(0.47, abs=0.01)}
    far = {name for name, ratio in ratios.items() if not 0.9 < ratio < 1.1}
    assert far == {"efficientnet_es", "efficientnet_em", "efficientnet_el", "inception_resnet_v2"}


def test_networks_that_mostly_copy_are_told_apart() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(4 * number, 4, 3, padding=1) for number in range(1, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for conv in self.convs:
                x = torch.cat([x, conv(x)], 1)
            return x

    # Three layers of 4 channels; concatenations of 8, 12 and 16.
    reasons = outside_validation(operators_of(Dense(), torch.zeros(1, 4, 8, 8)))
    assert reasons == ("concatenations copy 3.0 times what the layers compute",)


@pytest.mark.slow
def test_densenet_is_told_apart() -> None:
    calls = operators("densenet121", 224)
    assert edge_tpu_latency(calls) < 0.5 * 20e-3  # so far off is the model here
    assert any("concatenations copy 1.5 times" in reason for reason in outside_validation(calls))


def step_through(inputs: np.ndarray, weights: np.ndarray, rows: int, columns: int) -> tuple[np.ndarray, int]:
    """Multiply on an array that is stepped cycle by cycle; returns the product and the number of the last cycle."""
    (count, depth), width = inputs.shape, weights.shape[1]
    product, cycles = np.zeros((count, width)), 0
    for top in range(0, depth, rows):
        for left in range(0, width, columns):
            tile = np.zeros((rows, columns))
            part = weights[top : top + rows, left : left + columns]
            tile[: part.shape[0], : part.shape[1]] = part
            cycles += rows  # loading, one row a cycle
            values, sums = np.zeros((rows, columns)), np.zeros((rows, columns))
            done = 0
            for cycle in range(10_000):
                # Inputs move to the right and enter skewed, vector v in row r at cycle v + r; sums move down.
                values[:, 1:] = values[:, :-1].copy()
                for row in range(rows):
                    inside = 0 <= cycle - row < count and top + row < depth
                    values[row, 0] = inputs[cycle - row, top + row] if inside else 0
                sums[1:] = sums[:-1].copy()
                sums[0] = 0
                sums += values * tile
                for column in range(columns):
                    vector = cycle - (rows - 1) - column
                    if 0 <= vector < count:
                        done += 1
                        if left + column < width:
                            product[vector, left + column] += sums[-1, column]
                if done == count * columns:
                    cycles += cycle + 1
                    break
    return product, cycles - 1


@pytest.mark.parametrize("shape", [(9, 7, 5), (4, 3, 1), (5, 3, 8), (1, 1, 1)])
def test_the_cycles_are_those_of_an_array_that_is_stepped_through(shape: tuple[int, int, int]) -> None:
    depth, width, count = shape
    rng = np.random.default_rng(0)
    inputs, weights = rng.normal(size=(count, depth)), rng.normal(size=(depth, width))
    product, cycles = step_through(inputs, weights, rows=4, columns=3)
    np.testing.assert_allclose(product, inputs @ weights)
    assert systolic_cycles(depth, width, count, rows=4, columns=3) == cycles
    assert systolic_cycles(147, 64, 12544) == (2 * 64 + 64 + 12544 - 2) * 3 - 1  # ResNet-18's first layer


def test_ten_thousand_layers_take_milliseconds() -> None:
    shapes = np.random.default_rng(0).integers(1, 2000, (3, 10_000))
    started = time.perf_counter()
    assert systolic_cycles(*shapes).shape == (10_000,)
    assert time.perf_counter() - started < 0.1


def test_weights_beyond_the_memory_are_streamed_and_heads_are_computed_one_by_one() -> None:
    layer = OperatorCall("linear", "fc", "Gemm", ((1, 4096),), (1, 4096), macs=4096**2)
    chip = EdgeTpu()
    cycles = int(systolic_cycles(4096, 4096, 1))
    expected = cycles / chip.clock + (4096**2 - chip.memory) / chip.stream + chip.fixed
    assert edge_tpu_latency([layer]) == pytest.approx(expected)
    heads = OperatorCall("matmul", "qk", "MatMul", ((1, 4, 12, 16), (1, 4, 16, 12)), (1, 4, 12, 12), macs=4 * 144 * 16)
    assert edge_tpu_latency([heads]) == pytest.approx(4 * int(systolic_cycles(16, 12, 12)) / chip.clock + chip.fixed)
    assert edge_tpu_latency([]) == chip.fixed


def test_products_of_computed_matrices_groups_and_foreign_operators_are_outside_validation() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1, groups=2)
            self.norm = nn.LayerNorm(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm(nn.functional.hardswish(self.conv(x)).flatten(2))
            return y @ y

    reasons = outside_validation(operators_of(Odd(), torch.zeros(1, 4, 2, 2)))
    assert reasons == (
        "products of computed matrices",
        "grouped convolutions",
        "may run on the host: hardswish, layernormalization",
    )


@pytest.fixture(scope="module")
def backend() -> EdgeTpuBackend:
    made = make_backend("tpu/edgetpu", threads=1)
    assert isinstance(made, EdgeTpuBackend)
    return made


def test_a_model_in_floating_point_is_rounded_when_it_is_built(
    backend: EdgeTpuBackend, digits_task: Task, tmp_path: Path
) -> None:
    model = digits_task.build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with collect_notes() as notes:
        artifact = backend.build(model, digits_task, tmp_path / "float")
    assert notes == ["tpu/edgetpu: rounded to 8 bits when built: every layer"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    rounded = backend.build(Quantize(8, outputs="all")(digits_task.build(), digits_task), digits_task, tmp_path)
    assert artifact.sha256 == rounded.sha256
    assert (artifact.runtime, rounded.runtime) == ("tpu/edgetpu", "tpu/edgetpu")


def test_what_a_plan_leaves_in_floating_point_is_rounded_and_the_rest_kept(
    backend: EdgeTpuBackend, digits_task: Task, tmp_path: Path
) -> None:
    model = Quantize({"conv2": 4, "conv3": 8})(digits_task.build(), digits_task)
    with collect_notes() as notes:
        artifact = backend.build(model, digits_task, tmp_path)
    assert notes == ["tpu/edgetpu: rounded to 8 bits when built: conv1, fc"]
    assert {name: formats["weight"] for name, formats in artifact.bits.items()} == {
        "conv1": 8, "conv2": 4, "conv3": 8, "fc": 8,
    }  # fmt: skip
    images = normalise(digits_task.data, digits_task.data.search.inputs[:64])
    with torch.no_grad():
        expected = model(torch.from_numpy(images)).numpy()
    assert parity_error(expected, backend.predict(artifact, images)) < 0.1


@pytest.mark.parametrize(
    "step",
    [Quantize("fp8"), Quantize(16), Quantize(8, activations=32), Quantize(8, activations="dynamic")],
    ids=["fp8", "half", "weights alone", "dynamic"],
)
def test_formats_without_kernels_are_refused(
    backend: EdgeTpuBackend, digits_task: Task, tmp_path: Path, step: Quantize
) -> None:
    model = step(digits_task.build(), digits_task)
    with pytest.raises(CandidateError, match="8-bit integers alone, and has no kernel for conv1, conv2, conv3, fc"):
        backend.build(model, digits_task, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_latency_is_simulated_with_the_error_of_the_model(
    backend: EdgeTpuBackend, digits_task: Task, tmp_path: Path
) -> None:
    whole = backend.build(digits_task.build(), digits_task, tmp_path / "whole")
    cut = backend.build(Prune(0.5)(digits_task.build(), digits_task), digits_task, tmp_path / "cut")
    latency, reference = backend.measure(cut, digits_task, whole)
    assert (latency.name, latency.unit, reference.name) == ("latency", "s", "reference_latency")
    assert 1.6e-3 < latency.value < reference.value < 1.7e-3
    assert latency.ci95 == (0.5 * latency.value, 2.0 * latency.value)
    assert latency.provenance.method is Method.SIMULATED
    assert (latency.provenance.device, latency.provenance.runtime) == (
        "Edge TPU, Coral USB accelerator",
        "systolic model",
    )


def test_files_that_the_model_was_not_checked_on_have_no_interval_and_say_so(
    backend: EdgeTpuBackend, digits_task: Task, tmp_path: Path
) -> None:
    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 8, 3), nn.Linear(8, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(nn.functional.hardswish(self.conv(x)).mean((2, 3)))

    artifact = export_onnx(Foreign(), torch.zeros(1, 1, 8, 8), tmp_path / "model.onnx", "any")
    (latency,) = backend.measure(artifact, digits_task, None)
    assert latency.ci95 is None
    assert latency.provenance.flags == (
        "outside validation: may run on the host: hardswish",
        "as if in 8 bits",
    )


def test_accuracy_on_another_machine_is_not_measured(backend: EdgeTpuBackend) -> None:
    assert lacks_kernels((), backend.capabilities)
    assert lacks_kernels((Quantize(8),), backend.capabilities)


def test_a_search_for_the_edge_tpu_gives_simulated_figures(tmp_path: Path) -> None:
    study = ac.run_search(
        "digits-cnn",
        "digits",
        target="tpu/edgetpu",
        trials=3,
        executor="inline",
        finetune_steps=20,
        constraints=("size<=100kB",),
        out=tmp_path / "run",
    )
    records = study.records()
    complete = [record for record in records if record.state is State.COMPLETE]
    assert {record.baseline for record in complete} >= {"untouched", "uniform int8", "uniform pruning"}
    assert not [record.reason for record in records if record.state is State.FAILED]
    for record in complete:
        for name in ("accuracy", "latency", "parity"):
            assert record.metrics[name].provenance.method is Method.SIMULATED
        assert record.metrics["size"].provenance.method is Method.MEASURED
        assert record.artifact is not None
        assert {formats["weight"] for formats in record.artifact.bits.values()} == {8}
    untouched = next(record for record in complete if record.baseline == "untouched")
    assert untouched.metrics["size"].value < 70e3  # 56 thousand weights in 8 bits
    assert untouched.metrics["accuracy"].value > 0.9
