"""An operator, a space, an objective and a backend of one's own: each under 20 lines, from outside the package."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import autocompress as ac
from autocompress.core.registry import BACKENDS, OBJECTIVES, OPERATORS, SPACES, Registry, backend, operator
from autocompress.core.types import Artifact, Capabilities, Method, Provenance
from autocompress.evaluators.objectives import Built
from autocompress.hardware.device import provenance
from autocompress.hardware.onnx_export import export_onnx
from autocompress.tasks.data import example_input


@operator
@dataclasses.dataclass(frozen=True)
class ZeroSmallest:
    """Set the smallest weights of every convolution to zero."""

    share: float

    rank = 25
    retrains = False

    def __call__(self, model: nn.Module, task: ac.Task) -> nn.Module:
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                weight = module.weight.data
                weight[weight.abs() < torch.quantile(weight.abs(), self.share)] = 0
        return model


def sparse_space(trial: Any) -> ac.Plan:
    share = trial.suggest_float("share", 0.2, 0.8)
    kept = trial.suggest_categorical("int8", [True, False])
    return (ZeroSmallest(share), ac.Quantize(8, outputs="all")) if kept else (ZeroSmallest(share),)


def zeros(built: Built) -> ac.Measurement:
    """Share of the file's bytes that are zero."""
    content = np.frombuffer(built.artifact.path.read_bytes(), np.uint8)
    source = Provenance(Method.MEASURED, "any", "counted", "")
    return ac.Measurement("zeros", float((content == 0).mean()), "", None, len(content), source)


ZEROS = OBJECTIVES.add("zeros", ac.Objective("zeros", "maximize", "", function=zeros))


@backend("test/plain")
@dataclasses.dataclass(frozen=True)
class PlainBackend:
    threads: int = 0
    name = "test/plain"
    capabilities = Capabilities(bits=(32, 8), metrics=("latency",), outputs="all")

    def missing(self) -> str | None:
        return None

    def build(self, model: nn.Module, task: ac.Task, folder: Path) -> Artifact:
        return export_onnx(model, example_input(task.data), folder / "plain.onnx", self.name)

    def predict(self, artifact: Artifact, images: np.ndarray) -> np.ndarray:
        return onnxruntime.InferenceSession(artifact.path).run(None, {"input": images})[0]

    def measure(self, artifact: Artifact, task: ac.Task, reference: Artifact | None) -> list[ac.Measurement]:
        source = provenance("a guess", 1, Method.PREDICTED)
        return [ac.Measurement("latency", artifact.size_bytes * 1e-9, "s", None, 1, source)]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, digits_task: ac.Task) -> ac.Study:
    """One search with all four."""
    return ac.run_search(
        digits_task,
        space=sparse_space,
        target="test/plain",
        objectives=["accuracy", "zeros", "size"],
        constraints=["zeros>=0.001"],
        trials=6,
        executor="inline",
        finetune_steps=1,
        verify_time=0,
        out=tmp_path_factory.mktemp("extended") / "run",
    )


@pytest.mark.parametrize("thing", [ZeroSmallest, sparse_space, zeros, PlainBackend], ids=lambda thing: thing.__name__)
def test_each_is_under_20_lines(thing: Callable[..., Any]) -> None:
    assert len(inspect.getsource(thing).splitlines()) < 20


def test_an_own_operator_is_searched_and_stored(study: ac.Study) -> None:
    proposed = [record for record in study.records() if not record.baseline]
    assert len(proposed) == 3
    for record in proposed:
        assert record.state == "complete", record.reason
        assert record.plan[0] == {"op": "ZeroSmallest", "share": record.params["share"]}
        assert record.summary.startswith("zerosmallest")


def test_an_own_objective_is_optimised_and_shown(study: ac.Study) -> None:
    assert study.directions == ["maximize", "maximize", "minimize"]
    for point in study.front():
        assert point.artifact is not None
        content = point.artifact.path.read_bytes()
        assert point.metrics["zeros"].value == pytest.approx(content.count(0) / len(content))
        assert point.split == "test"
    assert study.best(zeros=">=0.001").metrics["zeros"].value >= 0.001


def test_an_own_backend_builds_runs_and_measures(study: ac.Study) -> None:
    for point in study.front():
        assert point.artifact is not None
        assert point.artifact.path.name == "plain.onnx"
        assert point.artifact.runtime == "test/plain"
        assert point.metrics["latency"].value == pytest.approx(point.metrics["size"].value * 1e-9)
        assert point.metrics["latency"].provenance.method is Method.PREDICTED
    assert (study.folder / "front.html").is_file()


def test_what_an_own_backend_does_not_measure_can_not_be_asked_for(digits_task: ac.Task, tmp_path: Path) -> None:
    for settings in ({"objectives": ["accuracy", "memory"]}, {"constraints": ["memory<=1MB"]}):
        with pytest.raises(ac.InputError, match="test/plain gives no memory; it gives latency"):
            ac.run_search(digits_task, space=sparse_space, target="test/plain", out=tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_a_limit_on_an_own_figure_that_is_not_measured_is_refused(digits_task: ac.Task, tmp_path: Path) -> None:
    with pytest.raises(ac.InputError, match="zeros"):
        ac.run_search(
            digits_task, space=sparse_space, target="test/plain", out=tmp_path / "run", executor="inline", trials=1,
            objectives=["accuracy", "size"], constraints=["zeros>=50%"],
        )  # fmt: skip


@backend("test/silent")
class SilentBackend(PlainBackend):
    """Measures nothing: accuracy and size are known all the same."""

    name = "test/silent"
    capabilities = Capabilities(bits=(32,), metrics=())

    def measure(self, artifact: Artifact, task: ac.Task, reference: Artifact | None) -> list[ac.Measurement]:
        return []


def test_a_backend_that_measures_nothing_can_be_searched_for_accuracy_alone(
    digits_task: ac.Task, tmp_path: Path
) -> None:
    study = ac.run_search(
        digits_task, space=sparse_space, target="test/silent", out=tmp_path / "run", executor="inline", trials=1,
        objectives=["accuracy"], finetune_steps=0,
    )  # fmt: skip
    assert [point.baseline for point in study.front()] == ["untouched"]
    assert (tmp_path / "run" / "front.html").is_file()


def test_a_name_that_is_taken_can_not_be_registered_again() -> None:
    with pytest.raises(ac.InputError, match="objective 'zeros' is registered already"):
        OBJECTIVES.add("zeros", dataclasses.replace(ZEROS, direction="minimize"))
    assert OPERATORS.add("ZeroSmallest", ZeroSmallest) is ZeroSmallest


MODULE = """
import dataclasses
from autocompress import Measurement, Objective
from autocompress.core.types import Capabilities
from autocompress.hardware.device import provenance
from autocompress.hardware.onnx_export import export_onnx
from autocompress.tasks.data import example_input

@dataclasses.dataclass(frozen=True)
class Nothing:
    amount: int = 0
    rank, retrains = 25, False
    def __call__(self, model, task):
        return model

def space(task, capabilities, **settings):
    return lambda trial: (Nothing(trial.suggest_int("amount", 1, 99)),)

def letters(built):
    return Measurement("letters", float(len(built.task.name)), "", None, 1, provenance("counted", 1))

LETTERS = Objective("letters", "minimize", "", function=letters)

@dataclasses.dataclass(frozen=True)
class Backend:
    threads: int = 0
    name = "thirdparty/onnx"
    capabilities = Capabilities((32,), ("latency",))
    def missing(self):
        return None
    def build(self, model, task, folder):
        return export_onnx(model, example_input(task.data), folder / "model.onnx", self.name)
    def predict(self, artifact, images):
        import onnxruntime
        return onnxruntime.InferenceSession(artifact.path).run(None, {"input": images})[0]
    def measure(self, artifact, task, reference):
        return [Measurement("latency", 1e-3, "s", None, 1, provenance("guessed", 1))]
"""
ENTRY_POINTS = """
[autocompress.operators]
Nothing = {module}:Nothing
[autocompress.spaces]
thirdparty-space = {module}:space
[autocompress.objectives]
letters = {module}:LETTERS
[autocompress.backends]
thirdparty/onnx = {module}:Backend
"""


def install(folder: Path, module: str, text: str = MODULE) -> None:
    """Put a package with entry points into `folder`, as an installer would."""
    (folder / f"{module}.py").write_text(text)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS.format(module=module))


@pytest.mark.parametrize(
    ("kind", "known", "name", "attribute"),
    [
        ("operator", OPERATORS, "Nothing", "Nothing"),
        ("space", SPACES, "thirdparty-space", "space"),
        ("objective", OBJECTIVES, "letters", "LETTERS"),
        ("target", BACKENDS, "thirdparty/onnx", "Backend"),
    ],
)
def test_an_entry_point_is_loaded_when_its_name_is_asked_for(
    kind: str, known: Registry, name: str, attribute: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    module = f"thirdparty_{kind}"
    install(tmp_path, module)
    monkeypatch.syspath_prepend(tmp_path)
    fresh = Registry(kind, known.group)  # the package's own one has looked for entry points already
    assert fresh.get(name) is getattr(importlib.import_module(module), attribute)
    assert name in list(fresh)


def test_the_command_line_searches_with_installed_extensions(run_cli: Callable[..., Any], tmp_path: Path) -> None:
    install(tmp_path, "thirdparty_all")
    env = {"PYTHONPATH": str(tmp_path)}
    assert "thirdparty/onnx" in run_cli("doctor", env=env).stdout
    done = run_cli(
        "search", "--space", "thirdparty-space", "--target", "thirdparty/onnx", "--objectives", "accuracy", "letters",
        "--trials", "2", "--finetune-steps", "0", "--executor", "inline", "--verify-time", "0",
        "--out", tmp_path / "run", env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    table = run_cli("front", tmp_path / "run", "--format", "csv", env=env).stdout
    assert "untouched" in table
    assert "letters" in table
    assert ",20.0," in table, "the length of 'digits-cnn on digits'"


def test_an_extension_that_fails_on_import_is_named_in_one_line(run_cli: Callable[..., Any], tmp_path: Path) -> None:
    install(tmp_path, "thirdparty_broken", "raise RuntimeError('built for another version')\n")
    done = run_cli("search", "--target", "thirdparty/onnx", env={"PYTHONPATH": str(tmp_path)}, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert "thirdparty_broken" in done.stderr
