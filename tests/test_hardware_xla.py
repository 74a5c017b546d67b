"""TPUs by the XLA compiler: what targets say of themselves, and what the compiler makes of files."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import onnx
import pytest
import torch

import autocompress as ac
from autocompress import Quantize, Task
from autocompress.core.errors import CandidateError, InputError
from autocompress.core.types import Artifact, Measurement, Method
from autocompress.evaluators.objectives import parse_objectives
from autocompress.hardware.files import read_file
from autocompress.hardware.onnx_export import export_onnx
from autocompress.hardware.targets import find_backend
from autocompress.hardware.tpu_chips import CHIPS
from autocompress.hardware.xla_tpu import XlaTpuBackend, structure, time_files
from autocompress.tasks.models import import_torchvision


def tpu(target: str) -> XlaTpuBackend:
    """The backend of that name."""
    found = find_backend(target)
    assert isinstance(found, XlaTpuBackend)
    return found


def needs_compiler() -> None:
    missing = tpu("tpu/v5e").missing()
    if missing:
        pytest.skip(missing)


def latency(measured: list[Measurement]) -> Measurement:
    return next(entry for entry in measured if entry.name == "latency")


def test_without_jax_the_targets_say_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jax", None)
    for name in CHIPS:
        backend = tpu(f"tpu/{name}")
        assert "pip install 'autocompress[tpu]'" in (backend.missing() or "")
        assert backend.capabilities.metrics[:2] == ("latency", "memory")


def test_asking_what_is_missing_loads_no_jax() -> None:
    code = (
        "import sys; from autocompress.hardware.targets import find_backend; find_backend('tpu/v5e').missing(); "
        "print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "False"


def test_int8_is_named_where_chips_multiply_integers() -> None:
    assert {name for name in CHIPS if 8 in tpu(f"tpu/{name}").capabilities.bits} == {"v5e", "v5p", "v6e", "v7x"}
    assert 8 not in tpu("tpu/v7x").capabilities.fast
    assert any("no 8-bit products" in note for note in tpu("tpu/v4").capabilities.notes)
    assert all(tpu(f"tpu/{name}").capabilities.emulated for name in CHIPS)


def test_energy_is_given_where_the_chips_power_was_published() -> None:
    assert {name for name in CHIPS if "energy" in tpu(f"tpu/{name}").capabilities.metrics} == {"v3", "v4"}
    parse_objectives(["energy"], tpu("tpu/v4"))
    with pytest.raises(InputError, match="target tpu/v5e gives no energy; it gives latency, memory"):
        parse_objectives(["energy"], tpu("tpu/v5e"))


def test_throughput_is_given_for_a_batch_that_is_named() -> None:
    assert "throughput" not in tpu("tpu/v5e").capabilities.metrics
    assert "throughput" in tpu("tpu/v5e:batch=64").capabilities.metrics
    for device in ("64", "batch=0", "batch=many", "core=1"):
        with pytest.raises(InputError, match="expected a batch size for throughput, as in tpu/v5e:batch=128"):
            find_backend(f"tpu/v5e:{device}")


def test_files_that_differ_in_weights_alone_have_one_structure(digits_task: Task, tmp_path: Path) -> None:
    backend = tpu("tpu/v5e")
    found = set()
    for model in (digits_task.build(), Quantize(8)(digits_task.build(), digits_task)):
        artifact = backend.build(model, digits_task, tmp_path)
        assert artifact.runtime == "tpu/v5e"
        proto = onnx.load(artifact.path)
        before = structure(proto)
        weights = [entry for entry in proto.graph.initializer if len(entry.dims) > 1 and entry.data_type != 7]
        scales = [entry for entry in proto.graph.initializer if len(entry.dims) < 1 and entry.data_type == 1]
        for entry in weights + scales:
            values = onnx.numpy_helper.to_array(entry)
            entry.CopyFrom(onnx.numpy_helper.from_array((values * 0.9).astype(values.dtype), entry.name))
        assert proto.SerializeToString() != artifact.path.read_bytes()
        assert structure(proto) == before
        del proto.graph.initializer[0].dims[:]
        assert structure(proto) != before
        found.add(before)
    assert len(found) == 2


@pytest.fixture
def digits_file(digits_task: Task, tmp_path: Path) -> Artifact:
    return tpu("tpu/v5e").build(digits_task.build(), digits_task, tmp_path)


def test_a_file_is_timed_on_a_device_of_this_machine(digits_file: Artifact, digits_task: Task) -> None:
    needs_compiler()
    backend = dataclasses.replace(tpu("tpu/v5e:batch=4"), repeats=30)
    found = {entry.name: entry for entry in time_files(backend, digits_file, digits_task, digits_file, "cpu")}
    assert set(found) == {"latency", "reference_latency", "throughput", "memory"}
    assert found["throughput"].value > 0.5 / found["latency"].value
    for name in ("latency", "reference_latency"):
        figure = found[name]
        assert figure.provenance.method is Method.MEASURED
        assert figure.provenance.device.startswith("cpu: ")
        assert "TPU" not in figure.provenance.device
        assert figure.samples >= 30
        assert figure.ci95 is not None
        assert 0 < figure.ci95[0] <= figure.value <= figure.ci95[1]


def test_operators_without_a_converter_are_named(tmp_path: Path) -> None:
    needs_compiler()
    node = onnx.helper.make_node("NonZero", ["x"], ["y"])
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph([node], "g", [value("x", 1, ["batch", 4])], [value("y", 7, [2, "n"])])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]), tmp_path / "model.onnx")
    artifact, task = read_file(tmp_path / "model.onnx", "tpu/v5e")
    with pytest.raises(CandidateError, match=r"tpu/v5e can't compile the file: .*NonZero"):
        tpu("tpu/v5e").measure(artifact, task, None)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CHIPS))
def test_every_chip_gets_an_estimate(name: str, digits_file: Artifact, digits_task: Task) -> None:
    needs_compiler()
    backend = tpu(f"tpu/{name}:batch=32")
    found = {entry.name: entry for entry in backend.measure(digits_file, digits_task, digits_file)}
    assert set(found) == {"reference_latency", *backend.capabilities.metrics}
    figure = found["latency"]
    assert 1e-6 < figure.value < 1e-4
    assert figure.value == found["reference_latency"].value
    error = CHIPS[name].error
    assert figure.ci95 == pytest.approx(((1 - error) * figure.value, (1 + error) * figure.value))
    assert figure.provenance.method is Method.COMPILED
    assert figure.provenance.device.startswith(f"TPU {name}")
    assert figure.provenance.runtime.startswith("jax ")
    assert found["throughput"].value > 2 / figure.value  # batches fill the chip
    if "energy" in found:
        energy, power = found["energy"], CHIPS[name].power
        assert "bound from published chip power" in energy.provenance.flags
        assert energy.ci95 is not None
        assert power is not None
        assert energy.ci95[0] < energy.value < energy.ci95[1] <= power[2] * 1.1 * figure.value * 1.0001


@pytest.mark.slow
def test_a_model_is_compiled_once_for_all_its_weights(digits_task: Task, tmp_path: Path) -> None:
    needs_compiler()
    backend, model = tpu("tpu/v5e"), digits_task.build()
    first = latency(backend.measure(backend.build(model, digits_task, tmp_path / "a"), digits_task, None))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    other = backend.build(model, digits_task, tmp_path / "b")
    started = time.perf_counter()
    again = latency(backend.measure(other, digits_task, None))
    assert time.perf_counter() - started < 0.5
    assert again.value == first.value


@pytest.mark.slow
def test_a_compilation_that_takes_too_long_is_given_up(
    digits_file: Artifact, digits_task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_compiler()
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path / "empty"))  # what was compiled before would answer at once
    backend = dataclasses.replace(tpu("tpu/v5p"), limit=0.1)
    with pytest.raises(CandidateError, match="tpu/v5p: compiling hung for 0"):
        backend.measure(digits_file, digits_task, None)


def imagenet_file(name: str, folder: Path) -> Path:
    """A torchvision model with random weights."""
    model = getattr(import_torchvision().models, name)(weights=None).eval()
    return export_onnx(model, torch.zeros(1, 3, 224, 224), folder / f"{name}.onnx", "any").path


# Milliseconds that the same compiler gave for the same models by way of torchax instead of ONNX.
REFERENCES = [
    ("resnet18", "v5e", 0.242),
    ("resnet50", "v5e", 0.325),
    ("mobilenet_v3_small", "v5e", 0.271),
    ("resnet50", "v4", 0.371),
    ("resnet50", "v6e", 0.144),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "chip", "expected"), REFERENCES)
def test_files_take_as_long_as_the_models_they_were_made_of(
    name: str, chip: str, expected: float, tmp_path: Path
) -> None:
    needs_compiler()
    artifact, task = read_file(imagenet_file(name, tmp_path), f"tpu/{chip}")
    assert latency(tpu(f"tpu/{chip}").measure(artifact, task, None)).value * 1e3 == pytest.approx(expected, rel=0.2)


@pytest.mark.slow
def test_resnet50_on_a_tpu_v3_agrees_with_its_submission_to_mlperf(tmp_path: Path) -> None:
    needs_compiler()
    artifact, task = read_file(imagenet_file("resnet50", tmp_path), "tpu/v3")
    found = tpu("tpu/v3:batch=256").measure(artifact, task, None)
    throughput = next(entry for entry in found if entry.name == "throughput")
    # Evaluation on one core, from the log of MLPerf Training v0.5.
    assert throughput.value == pytest.approx(4089, rel=0.1)
    assert throughput.ci95 is not None
    assert throughput.ci95[0] < 4089 < throughput.ci95[1]


@pytest.mark.slow
def test_a_search_for_a_tpu_gives_compiled_figures(tmp_path: Path) -> None:
    needs_compiler()
    study = ac.run_search(
        "digits-cnn", "digits", target="tpu/v5e", trials=3, executor="inline", finetune_steps=20, out=tmp_path / "run"
    )
    records = study.records()
    assert not [record.reason for record in records if record.reason]
    for record in records:
        assert record.metrics["latency"].provenance.method is Method.COMPILED
        assert record.metrics["accuracy"].provenance.method is Method.SIMULATED
    assert os.listdir(tmp_path / "run")
