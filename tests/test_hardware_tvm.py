"""TVM on x86: right logits, libraries that are compiled once, tuning that is not repeated."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from autocompress import Quantize, Task, load_task
from autocompress.core.errors import CandidateError, InputError
from autocompress.core.types import Artifact, Method, Plan
from autocompress.evaluators.pipeline import lacks_kernels
from autocompress.hardware.targets import find_backend, make_backend
from autocompress.hardware.tvm import TvmBackend
from autocompress.hardware.tvm_tuning import mend_records
from autocompress.hardware.x86 import CpuBackend
from autocompress.tasks.data import normalise

needs_tvm = pytest.mark.skipif(importlib.util.find_spec("tvm") is None, reason="apache-tvm is not installed")
needs_xgboost = pytest.mark.skipif(importlib.util.find_spec("xgboost") is None, reason="xgboost is not installed")


@pytest.fixture(scope="module")
def backend() -> TvmBackend:
    made = find_backend("x86/tvm", threads=1)
    assert isinstance(made, TvmBackend)
    return made


@pytest.fixture(scope="module")
def images(digits_task: Task) -> np.ndarray:
    return normalise(digits_task.data, digits_task.data.search.inputs[:40])


def built(backend: TvmBackend, task: Task, plan: Plan, folder: Path) -> tuple[Artifact, torch.nn.Module]:
    model = task.build()
    for step in plan:
        model = step(model, task)
    return backend.build(model, task, folder), model.eval()


def libraries(cache: Path) -> dict[Path, int]:
    """Every library that was compiled, with the time of its making."""
    return {path: path.stat().st_mtime_ns for path in (cache / "tvm").rglob("*.so")}


@needs_tvm
@pytest.mark.parametrize(
    "plan",
    [
        (),
        pytest.param((Quantize(8),), marks=pytest.mark.slow),
        pytest.param((Quantize(8, outputs="all"),), marks=pytest.mark.slow),
        pytest.param((Quantize(4),), marks=pytest.mark.slow),
        pytest.param((Quantize(4, activations=32, granularity="group"),), marks=pytest.mark.slow),
        pytest.param((Quantize("fp8", activations=32),), marks=pytest.mark.slow),
        pytest.param((Quantize(16),), marks=pytest.mark.slow),
    ],
    ids=["float", "int8", "outputs too", "4 bits", "4 bits in groups", "fp8 weights", "half"],
)
def test_logits_are_those_of_pytorch_and_libraries_are_compiled_once(
    backend: TvmBackend, digits_task: Task, images: np.ndarray, cache_folder: Path, tmp_path: Path, plan: Plan
) -> None:
    artifact, model = built(backend, digits_task, plan, tmp_path)
    assert artifact.runtime == "x86/tvm"
    with torch.no_grad():
        expected = model(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(backend.predict(artifact, images), expected, atol=2e-4)
    if not plan:
        from_onnxruntime = CpuBackend("onnxruntime", 1).predict(artifact, images)
        np.testing.assert_allclose(backend.predict(artifact, images), from_onnxruntime, atol=2e-4)

    made = libraries(cache_folder)
    copy = tmp_path / "moved.onnx"
    artifact.path.rename(copy)
    again = dataclasses.replace(artifact, path=copy)  # the file's content counts, not where it stands
    np.testing.assert_allclose(backend.predict(again, images[:1]), expected[:1], atol=2e-4)
    if not plan:
        by_name = {m.name: m for m in backend.measure(again, digits_task, again)}
        assert set(by_name) >= {"latency", "reference_latency", "throughput", "memory"}
        latency = by_name["latency"]
        assert latency.provenance.method is Method.MEASURED
        assert latency.provenance.runtime.startswith("tvm 0.")
        assert 1e-6 < latency.value < 0.1
    assert libraries(cache_folder) == made


@needs_tvm
def test_files_that_tvm_does_not_understand_fail_with_one_line(
    backend: TvmBackend, images: np.ndarray, tmp_path: Path
) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"no onnx")
    artifact = Artifact("x86/tvm", path, hashlib.sha256(b"no onnx").hexdigest(), 7)
    with pytest.raises(CandidateError, match=r"x86/tvm can't compile the file: DecodeError") as caught:
        backend.predict(artifact, images)
    assert "\n" not in str(caught.value)


@needs_tvm
@pytest.mark.slow
def test_values_that_are_rounded_to_8_bit_floats_are_refused(
    backend: TvmBackend, digits_task: Task, images: np.ndarray, tmp_path: Path
) -> None:
    artifact, _ = built(backend, digits_task, (Quantize("fp8"),), tmp_path)
    with pytest.raises(CandidateError, match="8-bit floats"):
        backend.predict(artifact, images)


def test_capabilities_promise_no_speed_from_8_bits(backend: TvmBackend) -> None:
    able = backend.capabilities
    assert able.fixed_shapes
    assert able.fast == ()
    assert not able.emulated
    assert set(able.metrics) >= {"latency", "throughput", "memory"}
    assert lacks_kernels((Quantize(8),), able)  # so that its accuracy is called simulated
    assert not lacks_kernels((), able)


def test_the_device_says_how_much_is_tuned() -> None:
    assert find_backend("x86/tvm:trials=16").name == "x86/tvm:trials=16"
    assert find_backend("x86/tvm:tuned").name == "x86/tvm:trials=64"
    assert find_backend("x86/tvm:trials=16,watts=15").capabilities.metrics[-1] == "energy"
    with pytest.raises(InputError, match="expected 'tuned', 'trials=N' or 'watts=N', got 'fast'"):
        find_backend("x86/tvm:fast")


def test_a_missing_package_is_named_with_the_way_to_get_it(
    backend: TvmBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert backend.missing() == "x86/tvm needs the package apache-tvm: pip install 'autocompress[tvm]'"
    assert backend.capabilities.bits == (32, 16)


def test_records_that_a_killed_tuning_left_half_written_are_mended(tmp_path: Path) -> None:
    workloads, records = (tmp_path / f"database_{name}.json" for name in ("workload", "tuning_record"))
    workloads.write_text('["1", "conv"]\n["2", "mat')
    records.write_text("[0, [[], [0.5]]]\n[1, [[], [0.25]]]\n[0, [[], [0.")
    mend_records(tmp_path)
    assert workloads.read_text() == '["1", "conv"]\n'
    assert records.read_text() == "[0, [[], [0.5]]]\n"


@needs_tvm
@needs_xgboost
@pytest.mark.slow
def test_tuned_functions_are_kept_and_never_tuned_twice(
    digits_task: Task, images: np.ndarray, cache_folder: Path, tmp_path: Path
) -> None:
    tuned = make_backend("x86/tvm:trials=2", threads=1)
    assert isinstance(tuned, TvmBackend)
    artifact, model = built(tuned, digits_task, (), tmp_path)
    with torch.no_grad():
        expected = model(torch.from_numpy(images[:1])).numpy()
    np.testing.assert_allclose(tuned.predict(artifact, images[:1]), expected, atol=2e-4)
    (notes,) = (cache_folder / "tvm" / "records").rglob("functions.json")
    before, made = notes.read_text(), notes.stat().st_mtime_ns
    assert {entry["trials"] for entry in json.loads(before).values()} == {2}

    # Other weights, the same functions: another file is compiled, and nothing is tuned.
    other = digits_task.build()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.01)
    started = time.perf_counter()
    tuned.predict(tuned.build(other, digits_task, tmp_path / "other"), images[:1])
    assert time.perf_counter() - started < 120
    assert (notes.read_text(), notes.stat().st_mtime_ns) == (before, made)


@needs_tvm
@pytest.mark.slow
@pytest.mark.parametrize("spec", ["resnet20", "torchvision:mobilenet_v3_small"])
def test_larger_networks_are_right_and_not_absurdly_slow(
    backend: TvmBackend, digits_task: Task, tmp_path: Path, spec: str
) -> None:
    pixels = np.repeat(np.repeat(digits_task.data.search.inputs.repeat(3, 1), 4, 2), 4, 3)
    split = dataclasses.replace(digits_task.data.search, inputs=pixels)
    data = dataclasses.replace(digits_task.data, train=split, search=split, test=split, mean=(0.3,) * 3, std=(0.4,) * 3)
    task = load_task(spec, data)
    artifact = backend.build(task.build(), task, tmp_path)
    onnxruntime = CpuBackend("onnxruntime", 1)
    inputs = normalise(data, pixels[:33])
    expected = onnxruntime.predict(artifact, inputs)
    np.testing.assert_allclose(backend.predict(artifact, inputs), expected, atol=1e-3 * np.abs(expected).max())
    times = [
        next(m.value for m in runtime.measure(artifact, task, None) if m.name == "latency")
        for runtime in (backend, onnxruntime)
    ]
    assert times[0] < 8 * times[1]
