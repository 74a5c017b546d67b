"""GPU targets without a GPU: what needs none, and the same code on the CPU, whose figures are never called measured."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from autocompress import InputError, Quantize, Task
from autocompress.core.errors import CandidateError
from autocompress.core.types import Artifact, Method, Provenance
from autocompress.hardware import nvml, trt_engine
from autocompress.hardware.gpu import GpuBackend, energy_figures, parse_device
from autocompress.hardware.targets import find_backend
from autocompress.tasks.data import normalise

RUNTIMES = ("torch", "onnxruntime")


@pytest.fixture(scope="module", params=RUNTIMES)
def built(request: pytest.FixtureRequest, digits_task: Task, tmp_path_factory: pytest.TempPathFactory) -> Any:
    backend = GpuBackend(request.param, device="cpu", budget=0.02, warm_up=0.05)
    folder = tmp_path_factory.mktemp(request.param)
    return SimpleNamespace(backend=backend, artifact=backend.build(digits_task.build(), digits_task, folder))


def test_a_file_computes_what_pytorch_computes(built: Any, digits_task: Task) -> None:
    images = normalise(digits_task.data, digits_task.data.search.inputs[:130])
    with torch.no_grad():
        expected = digits_task.build()(torch.from_numpy(images)).numpy()
    found = built.backend.predict(built.artifact, images)
    assert found.shape == (130, 10)
    assert np.abs(found - expected).max() < 1e-4


def test_the_measuring_process_times_in_turns_and_claims_nothing_of_a_gpu(built: Any, digits_task: Task) -> None:
    found = {m.name: m for m in built.backend.measure(built.artifact, digits_task, built.artifact)}
    assert set(found) == {"latency", "reference_latency", "throughput"}
    assert found["latency"].samples >= 50 // 2
    ends = found["latency"].ci95
    assert ends is not None
    assert 0 < ends[0] <= found["latency"].value <= ends[1]
    assert {m.provenance.method for m in found.values()} == {Method.SIMULATED}


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_broken_file_fails_the_candidate(runtime: str, digits_task: Task, tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_bytes(b"nothing")
    backend = GpuBackend(runtime, device="cpu")
    images = normalise(digits_task.data, digits_task.data.search.inputs[:2])
    with pytest.raises(CandidateError, match=f"gpu/{runtime} can't run the file"):
        backend.predict(Artifact(backend.name, path, "", 7), images)


def test_16_bit_layers_run_the_whole_file_in_that_format(digits_task: Task, tmp_path: Path) -> None:
    model = Quantize("bf16")(digits_task.build(), digits_task)
    backend = GpuBackend("torch", device="cpu")
    artifact = backend.build(model, digits_task, tmp_path)
    assert {entry["weight"] for entry in artifact.bits.values()} == {"bf16"}
    images = normalise(digits_task.data, digits_task.data.search.inputs[:64])
    with torch.no_grad():
        expected = model(torch.from_numpy(images)).numpy()
    assert np.abs(backend.predict(artifact, images) - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("runtime", ["torch", "onnxruntime", "tensorrt"])
def test_what_is_missing_is_said_in_one_line(runtime: str) -> None:
    missing = find_backend(f"gpu/{runtime}").missing()
    assert missing is not None
    assert len(missing.splitlines()) == 1
    if runtime == "tensorrt" and importlib.util.find_spec("tensorrt") is None:
        assert "the package tensorrt" in missing
    elif runtime == "torch":
        assert "NVIDIA GPU" in missing


@pytest.mark.parametrize(
    ("runtime", "device", "expected"),
    [
        ("torch", "", ("cuda:0", "fp32")),
        ("torch", "1,fp16", ("cuda:1", "fp16")),
        ("torch", "tf32", ("cuda:0", "tf32")),
        ("tensorrt", "2", ("cuda:2", "fp32")),
    ],
)
def test_the_device_part_names_gpu_and_precision(runtime: str, device: str, expected: tuple[str, str]) -> None:
    assert parse_device(runtime, device) == expected


@pytest.mark.parametrize(("target", "came"), [("gpu/torch:fp12", "fp12"), ("gpu/tensorrt:fp16", "fp16")])
def test_wrong_device_parts_are_refused(target: str, came: str) -> None:
    with pytest.raises(InputError, match=f"expected the number of a GPU.*, got '{came}'"):
        find_backend(target)


def test_an_engine_is_built_once_for_each_file_batch_device_and_version(tmp_path: Path) -> None:
    one, two = tmp_path / "one.onnx", tmp_path / "two.onnx"
    one.write_bytes(b"one")
    two.write_bytes(b"two")
    choices = itertools.product((one, two), (1, 128), ("H100, 9.0", "T4, 7.5"), ("10.1", "11.0"))
    paths = {trt_engine.engine_path(*choice, tmp_path / "cache") for choice in choices}
    assert len(paths) == 16
    calls = []

    def build() -> bytes:
        calls.append(1)
        return b"engine"

    for _ in range(2):
        place = trt_engine.once(trt_engine.engine_path(one, 1, "H100, 9.0", "10.1", tmp_path / "cache"), build)
        assert place.read_bytes() == b"engine"
    assert len(calls) == 1
    assert list(place.parent.iterdir()) == [place], "no half-written file is left"


def make_device(joules_at: Callable[[float], float], counts: bool = True, clocks: tuple[int, ...] = (1000,)) -> Any:
    """NVML's interface over a device whose energy is a function of time."""
    import time

    start, readings = time.perf_counter(), itertools.chain(clocks[:-1], itertools.repeat(clocks[-1]))

    class NVMLError(Exception):
        pass

    def energy(handle: Any) -> float:
        if not counts:
            raise NVMLError
        return 1e3 * joules_at(time.perf_counter() - start)

    def power(handle: Any) -> float:
        now = time.perf_counter() - start
        return 1e3 * (joules_at(now + 0.001) - joules_at(now)) / 0.001

    return SimpleNamespace(
        NVMLError=NVMLError,
        NVML_CLOCK_SM=1,
        nvmlDeviceGetTotalEnergyConsumption=energy,
        nvmlDeviceGetPowerUsage=power,
        nvmlDeviceGetClockInfo=lambda handle, kind: next(readings),
    )


@pytest.mark.parametrize("counts", [True, False], ids=["counter", "power readings"])
def test_energy_of_a_device_that_takes_100_watts(counts: bool) -> None:
    import time

    device = make_device(lambda seconds: 100 * seconds, counts)
    record = nvml.record_energy(device, None, lambda: time.sleep(0.01), blocks=2, seconds=0.2)
    assert record["counter"] is counts
    assert record["steady"]
    assert record["idle"] == pytest.approx(100, rel=0.02)
    source = Provenance(Method.MEASURED, "a device", "runtime", "")
    energy, power = energy_figures(record, source)
    assert power.value == pytest.approx(100, rel=0.02)
    assert energy.value == pytest.approx(100 * 0.2 / record["work"][0][2], rel=0.1)
    assert "board idles at 100 W" in energy.provenance.flags
    assert ("power readings integrated" in energy.provenance.flags) is not counts


def test_a_clock_that_never_settles_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    device = make_device(lambda seconds: seconds, clocks=tuple(range(1000, 9000, 500)))
    assert not nvml.warm_up(device, None, lambda: None, patience=1.2)
