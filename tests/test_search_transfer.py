"""Searches that start from earlier ones: what they learn, what they take over, and what they refuse."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import autocompress as ac
from autocompress.core.errors import InputError
from autocompress.core.types import Measurement, Method, Provenance
from autocompress.evaluators.reuse import same_graph
from autocompress.hardware.targets import make_backend
from autocompress.search.config import SearchConfig
from autocompress.search.improvement import spread_along
from autocompress.search.transfer import Earlier, figure, fingerprint, start_points, warm_start

ROOT = Path(__file__).parents[1]
TABLE = ROOT.parent / "shared/data/nasbench201_hardware.parquet"
SMALL = ("--executor", "inline", "--finetune-steps", 30, "--verify-time", 0)
Cli = Callable[..., tuple[int, str, str]]


def test_what_was_trained_before_is_taken_over_where_the_file_is_the_one_on_record(
    small_run: Path, call_cli: Cli, tmp_path: Path
) -> None:
    shutil.copytree(small_run, tmp_path / "earlier")
    before = {record.key: record for record in ac.Study.open("earlier").records()}
    spoilt = next(record for record in before.values() if record.baseline == "uniform pruning")
    assert spoilt.artifact is not None
    spoilt.artifact.path.write_bytes(spoilt.artifact.path.read_bytes() + b"\0")
    code, out, err = call_cli("search", *SMALL, "--trials", 4, "--warm-start", "earlier", "--out", "next")
    assert code == 0, err
    assert "warm start: 1 candidate of earlier runs first, the sampler learns from 6 trials" in out
    records = ac.Study.open("next").records()
    assert [record.baseline for record in records] == ["untouched", "uniform int8", "uniform pruning", ""]
    assert records[0].notes == ()
    for record in (records[1], records[3]):
        same = before[record.key]
        assert record.artifact is not None
        assert same.artifact is not None
        assert record.notes == (f"file of earlier, trial {same.trial}; accuracy of that run",)
        assert (record.artifact.sha256, record.steps) == (same.artifact.sha256, 0)
        assert record.metrics["accuracy"] == same.metrics["accuracy"]
        assert record.metrics["latency"].provenance.taken_at > same.metrics["latency"].provenance.taken_at
    assert any("its SHA-256 differs): evaluated from scratch" in note for note in records[2].notes)
    assert records[2].steps == 30
    assert records[2].metrics["accuracy"].value == spoilt.metrics["accuracy"].value  # the same training again

    assert yaml.safe_load(Path("next/config.yaml").read_text())["warm_start"] == ["earlier"]
    shutil.rmtree("earlier")
    code, out, err = call_cli("search", "--resume", "next", "--trials", 4)
    assert code == 0, err
    said = " ".join(out.split())
    assert "warm start: earlier is no run folder" in said
    assert "the search goes on without it" in said


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        ("nowhere", "warm start: nowhere is no run folder"),
        ("bare", "warm start: bare has no study.db yet"),
        ("garbled", "warm start: can't open the study at"),
        ("next", "warm start: next is this search's own run folder"),
        ("foreign", "warm start: foreign shares no parameter with this search: it has prune."),
    ],
)
def test_runs_that_nothing_can_be_learned_from_are_refused_in_one_line(
    folder: str, line: str, small_run: Path, call_cli: Cli, tmp_path: Path
) -> None:
    shutil.copytree(small_run, tmp_path / "foreign")
    for name in ("bare", "garbled"):
        (tmp_path / name).mkdir()
        shutil.copy(small_run / "config.yaml", tmp_path / name)
    (tmp_path / "garbled/study.db").write_bytes(b"no database" * 1000)
    space = ("--space", "tests_space:space") if folder == "foreign" else ()
    (tmp_path / "tests_space.py").write_text("def space(trial):\n    trial.suggest_float('x', 0, 1)\n    return ()\n")
    code, _, err = call_cli("search", *SMALL, *space, "--warm-start", folder, "--out", "next")
    assert code == 2
    assert err.startswith(f"error: {line}")
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "next").exists()


def test_start_points_are_those_that_mean_the_same_here(small_run: Path, digits_task: ac.Task) -> None:
    run = Earlier.open(str(small_run), Path("elsewhere"))
    names, ways = ["accuracy", "size"], ["maximize", "minimize"]

    def other(trial: Any) -> ac.Plan:
        """Takes the same parameters for something else."""
        for name in run.records[0].params:
            trial.suggest_categorical(name, sorted({r.params[name] for r in run.records if name in r.params}, key=str))
        return (ac.Finetune(1),)

    found, misfits = start_points([run], other, names, ways, 5)
    assert found == []
    assert misfits > 0
    space = ac.stock_space(digits_task, make_backend("x86/openvino").capabilities, finetune_steps=30)
    found, misfits = start_points([run], space, names, ways, 5)
    assert misfits == 0
    assert all(params in [record.params for record in run.records] for params in found)
    assert not any(params in space.starts for params in found)
    assert len(start_points([run, run], space, names, ways, 5)[0]) == len(found)
    config = SearchConfig(sampler="tpe", space="auto", trials=8)
    (line,) = warm_start(config, [run], space, None).lines
    assert "sampler tpe can't learn from other runs" in line


@pytest.mark.parametrize(
    ("name", "known", "value"),
    [
        ("latency@x86/openvino", {"latency@x86/openvino": 1.0, "latency@x86/onnxruntime": 2.0}, 1.0),
        ("latency@x86/openvino", {"latency": 3.0}, 3.0),
        ("latency@x86/openvino", {"latency@x86/onnxruntime": 2.0}, 2.0),
        ("latency", {"latency@x86/onnxruntime": 2.0, "accuracy": 0.9}, 2.0),
        ("energy", {"latency": 3.0}, float("nan")),
    ],
)
def test_figures_of_other_targets_stand_in(name: str, known: dict[str, float], value: float) -> None:
    source = Provenance(Method.SIMULATED, "test", "test", "2026-01-01T00:00:00+00:00")
    metrics = {key: Measurement(key, number, "s", None, 1, source) for key, number in known.items()}
    assert figure(metrics, name) == pytest.approx(value, nan_ok=True)


def test_points_are_spread_along_a_front() -> None:
    front = np.column_stack([np.arange(101), 100 - np.arange(101)]).astype(float)
    assert spread_along(front, 3) == [0, 100, 50]
    assert sorted(spread_along(front[:4], 9)) == [0, 1, 2, 3]
    assert spread_along(np.empty((0, 2)), 3) == []


def test_a_file_suits_another_target_if_only_its_weights_differ(digits_task: ac.Task, tmp_path: Path) -> None:
    model = digits_task.build()
    paths = {}
    for target in ("x86/openvino", "x86/onnxruntime", "tpu/edgetpu"):
        artifact = make_backend(target).build(digits_task.build(), digits_task, tmp_path / target.replace("/", "-"))
        paths[target] = artifact.path
    model.fc.weight.data.mul_(0.5)
    changed = make_backend("x86/openvino").build(model, digits_task, tmp_path / "changed").path
    assert changed.read_bytes() != paths["x86/openvino"].read_bytes()
    assert same_graph(paths["x86/openvino"], changed)
    assert same_graph(paths["x86/openvino"], paths["x86/onnxruntime"])
    assert not same_graph(paths["x86/openvino"], paths["tpu/edgetpu"])


def test_other_weights_and_other_data_are_told_apart(digits_task: ac.Task) -> None:
    import dataclasses

    model = digits_task.build()
    model.fc.weight.data[0, 0] += 1e-3
    search = dataclasses.replace(digits_task.data.search, labels=np.roll(digits_task.data.search.labels, 1))
    own = fingerprint(digits_task)
    assert fingerprint(ac.load_task("digits-cnn", "digits")) == own
    weights = fingerprint(dataclasses.replace(digits_task, build=lambda: model))
    assert (weights["model"] == own["model"], weights["data"] == own["data"]) == (False, True)
    data = fingerprint(dataclasses.replace(digits_task, data=dataclasses.replace(digits_task.data, search=search)))
    assert (data["model"] == own["model"], data["data"] == own["data"]) == (True, False)


@pytest.mark.slow
def test_another_runtime_gets_the_files_and_computes_their_accuracy_itself(tmp_path: Path) -> None:
    settings = {"space": "prune", "executor": "inline", "finetune_steps": 30, "verify_time": 0}
    first = ac.run_search(target="x86/onnxruntime", trials=5, out=tmp_path / "first", **settings)
    warm = [str(first.folder)]
    second = ac.run_search(target="x86/openvino", trials=5, warm_start=warm, out=tmp_path / "second", **settings)
    told = {record.baseline: record for record in second.records()}
    assert told["uniform pruning"].notes == (f"file of {first.folder}, trial 2; accuracy computed anew",)
    assert told["uniform pruning"].metrics["accuracy"].provenance.runtime == "x86/openvino"
    # ONNX Runtime wants other outputs rounded: another plan, and another file.
    assert told["uniform int8"].notes == ()
    both = ["x86/openvino", "x86/onnxruntime"]
    third = ac.run_search(target=both, trials=4, warm_start=warm, out=tmp_path / "third", **settings)
    assert all(part.records()[2].notes for part in third.parts.values())
    with pytest.raises(InputError, match="nowhere is no run folder"):
        ac.run_search(trials=4, warm_start=["nowhere"], out=tmp_path / "fourth", **settings)


@pytest.mark.slow
@pytest.mark.skipif(not TABLE.exists(), reason=f"needs the latency table {TABLE}")
def test_an_earlier_search_on_another_device_saves_most_of_the_trials(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, str(ROOT / "benchmarks/transfer.py"), "--table", str(TABLE), "--json", str(out)]
    command += ["--accuracy", "acc_cifar10-val", "--from", "lat_ms_silver_4114", "--to", "lat_ms_samsung_s7"]
    done = subprocess.run([*command, "--trials", "60"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    needed: dict[str, list[int]] = {"cold": [], "warm": []}
    for one in json.loads(out.read_text()):
        if one["way"] in needed:
            needed[one["way"]].append(one["evaluations_to"]["0.95"] or 61)
    assert np.median(needed["warm"]) < 0.5 * np.median(needed["cold"])
