"""What a search leaves in its run folder, and what the commands make of it."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
import yaml

from autocompress import SearchConfig, Study, Task
from autocompress.cli import main
from autocompress.tasks.data import normalise

UNTIMED = ("--executor", "inline", "--target", "arm/pixel3", "--verify-time", "0")  # predicts its figures
ONE_TRIAL = (*UNTIMED, "--trials", "1")
BASELINES = {"untouched", "uniform int8", "uniform pruning"}


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command in this process, in `tmp_path`; it must succeed. Returns its output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> str:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["autocompress", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        assert not ended.value.code, captured.err
        return captured.out

    return call


@pytest.fixture
def copied_run(small_run: Path, tmp_path: Path) -> Path:
    """A copy of the small run that may be changed."""
    return Path(shutil.copytree(small_run, tmp_path / "copy"))


def rows(folder: Path, name: str = "trials.csv") -> list[dict[str, str]]:
    with (folder / name).open(newline="") as file:
        return list(csv.DictReader(file))


def stored_study(folder: Path) -> optuna.Study:
    """The study, opened as anyone with Optuna would."""
    return optuna.load_study(study_name="autocompress", storage=f"sqlite:///{folder / 'study.db'}")


def settings_of(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "config.yaml").read_text())


def test_a_run_folder_holds_settings_database_tables_and_plot(small_run: Path) -> None:
    for name in ("config.yaml", "study.db", "trials.csv", "front.csv", "front.html"):
        assert (small_run / name).stat().st_size > 0


def test_every_front_point_and_baseline_has_its_file(small_run: Path) -> None:
    points = Study.open(small_run).front()
    assert points
    for point in points:
        assert point.artifact is not None
        assert hashlib.sha256(point.artifact.path.read_bytes()).hexdigest() == point.artifact.sha256
        assert point.artifact.path.stat().st_size == point.artifact.size_bytes == point.metrics["size"].value


def test_the_files_of_beaten_trials_are_deleted(small_run: Path) -> None:
    records = Study.open(small_run).records()
    kept = {point.trial for point in Study.open(small_run).front()}
    files = {path.parent.name for path in (small_run / "artifacts").rglob("model.onnx")}
    assert files == {record.key for record in records if record.trial in kept}


def test_the_saved_settings_are_complete(small_run: Path) -> None:
    settings = settings_of(small_run)
    assert set(settings) == set(SearchConfig.model_fields)
    given = SearchConfig(trials=7, executor="inline", finetune_steps=30, verify_time=0, out=str(small_run))
    assert SearchConfig(**settings) == given


def test_front_as_json_has_exactly_the_documented_fields(small_run: Path, cli: Callable[..., str]) -> None:
    points = json.loads(cli("front", small_run, "--format", "json"))
    assert len(points) >= 3
    for point in points:
        standing = {"on_front", "no_better_than", "verified", "change"}
        assert set(point) == {"trial", "plan", "split", "metrics", "baseline", *standing}
        assert isinstance(point["trial"], int)
        assert isinstance(point["baseline"], bool)
        assert isinstance(point["on_front"], bool)
        assert all("op" in step for step in point["plan"])
        assert {"accuracy", "latency", "size"} <= set(point["metrics"])
        for metric in point["metrics"].values():
            assert set(metric) == {"value", "unit", "low", "high", "kind", "flags"}
            assert metric["kind"] in ("measured", "simulated", "compiled", "looked-up", "predicted")


def test_a_finished_front_shows_the_test_split_with_intervals(small_run: Path, cli: Callable[..., str]) -> None:
    for point in json.loads(cli("front", small_run, "--format", "json")):
        assert point["split"] == "test"
        for name in ("accuracy", "latency", "throughput", "loss"):
            metric = point["metrics"][name]
            assert metric["low"] <= metric["value"] <= metric["high"], name
        assert point["metrics"]["size"]["low"] is None, "a file's size is exact"


def test_front_as_csv_agrees_with_json_and_with_the_file(small_run: Path, cli: Callable[..., str]) -> None:
    points = json.loads(cli("front", small_run, "--format", "json"))
    text = cli("front", small_run, "--format", "csv")
    table = list(csv.DictReader(io.StringIO(text)))
    assert table == rows(small_run, "front.csv")
    assert [int(row["trial"]) for row in table] == [point["trial"] for point in points]
    for row, point in zip(table, points, strict=True):
        assert row["split"] == point["split"]
        assert bool(row["baseline"]) == point["baseline"]
        assert (row["on_front"] == "True") == point["on_front"]
        for name, metric in point["metrics"].items():
            assert float(row[name]) == metric["value"]
            assert row[f"{name}_unit"] == metric["unit"]
            assert row[f"{name}_kind"] == metric["kind"]
            assert row[f"{name}_low"] == ("" if metric["low"] is None else str(metric["low"]))


def test_front_as_table_names_split_baselines_and_units(small_run: Path, cli: Callable[..., str]) -> None:
    table = cli("front", small_run)
    for words in ("Pareto front, test split", "untouched (baseline)", "int8 (baseline)", "accuracy", "kB", "µs", "±"):
        assert words in table


def test_front_as_markdown_is_one_row_per_point(small_run: Path, cli: Callable[..., str]) -> None:
    lines = cli("front", small_run, "--format", "markdown").splitlines()
    assert lines[0].startswith("| trial | plan | accuracy | latency | size |")
    assert len(lines) == 2 + len(Study.open(small_run).front())
    assert len({line.count("|") for line in lines}) == 1


def test_the_plot_shows_front_baselines_and_split(small_run: Path) -> None:
    page = (small_run / "front.html").read_text()
    assert "plotly" in page
    for words in ("baselines (test split)", "front (test split)", "untouched", "7 trials"):
        assert words in page


def test_the_three_baselines_are_trials_and_marked(small_run: Path) -> None:
    marked = {row["baseline"]: row for row in rows(small_run) if row["baseline"]}
    assert set(marked) == BASELINES
    assert marked["untouched"]["trial"] == "0"
    assert marked["untouched"]["plan"] == "untouched"


def test_plain_optuna_reads_the_study(small_run: Path) -> None:
    study = stored_study(small_run)
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE", "MINIMIZE"]
    assert study.metric_names == ["accuracy", "latency", "size"]
    assert [trial.number for trial in study.trials] == list(range(7))
    assert {trial.state.name for trial in study.trials} <= {"COMPLETE", "FAIL"}
    assert all(trial.datetime_complete is not None for trial in study.trials)


def test_the_database_agrees_with_trials_csv(small_run: Path) -> None:
    for trial, row in zip(stored_study(small_run).trials, rows(small_run), strict=True):
        assert trial.number == int(row["trial"])
        assert trial.values == [float(row[name]) for name in ("accuracy", "latency", "size")]
        for name, value in trial.params.items():
            assert row[f"param:{name}"] == str(value)


def test_the_bits_of_each_file_are_read_back_and_stored(small_run: Path) -> None:
    table = rows(small_run)
    assert table[0]["bits_in_graph"] == "w32a32 4"
    for record, row in zip(Study.open(small_run).records(), table, strict=True):
        for step in record.plan:
            if step["op"] == "Quantize" and record.artifact:
                wanted = (
                    step["bits"]
                    if isinstance(step["bits"], dict)
                    else dict.fromkeys(record.artifact.bits, step["bits"])
                )
                assert {name: entry["weight"] for name, entry in record.artifact.bits.items()} == wanted
                assert sum(int(part.split()[-1]) for part in row["bits_in_graph"].split(", ")) == len(wanted)


def test_no_trial_beats_a_front_point_on_the_search_split(small_run: Path) -> None:
    table = rows(small_run)
    values = np.array([[-float(row["accuracy"]), float(row["latency"]), float(row["size"])] for row in table])
    beaten = [
        any((other <= row).all() and (other < row).any() for number, other in enumerate(values) if number != position)
        for position, row in enumerate(values)
    ]
    unbeaten = {int(row["trial"]) for row, is_beaten in zip(table, beaten, strict=True) if not is_beaten}
    points = Study.open(small_run).front()
    front = {point.trial for point in points if point.on_front}
    assert front
    assert front | {point.trial for point in points if point.no_better_than is not None} == unbeaten
    assert {point.no_better_than for point in points} - {None} <= front


def test_a_small_search_finds_a_model_that_is_smaller_and_as_good(small_run: Path) -> None:
    best = Study.open(small_run).best(size="<=50%", accuracy=">=-3pt")
    assert best.plan


def test_an_exported_bundle_does_what_its_card_says(
    small_run: Path, cli: Callable[..., str], tmp_path: Path, digits_task: Task
) -> None:
    import onnxruntime

    test, trials = digits_task.data.test, [p.trial for p in Study.open(small_run).front() if p.on_front]
    for trial in (0, trials[-1]):
        folder = tmp_path / f"bundle{trial}"
        cli("export", small_run, "--trial", trial, "--out", folder)
        card = json.loads((folder / "bundle.json").read_text())
        assert card["file"] == "model.onnx"
        assert (card["trial"], card["target"], card["split"]) == (trial, "x86/openvino", "test")
        content = (folder / "model.onnx").read_bytes()
        assert hashlib.sha256(content).hexdigest() == card["sha256"]
        assert len(content) == card["metrics"]["size"]["value"]
        assert card["bits_in_graph"].keys() == {"conv1", "conv2", "conv3", "fc"}
        session = onnxruntime.InferenceSession(folder / "model.onnx")
        logits = session.run(None, {"input": normalise(digits_task.data, test.inputs)})[0]
        share = float((logits.argmax(1) == test.labels).mean())
        assert share == pytest.approx(card["metrics"]["accuracy"]["value"], abs=0.005)


def test_a_config_file_says_the_same_as_flags(cli: Callable[..., str], tmp_path: Path) -> None:
    flags = {"space": "quantize", "objectives": ["accuracy", "size"], "bits": [8, 32], "trial_timeout": "5m", "seed": 3}
    rest = {"executor": "inline", "target": "arm/pixel3", "verify_time": 0, "trials": 1, "out": "file"}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**flags, **rest}))
    cli("search", "--config", "c.yaml")
    cli(
        "search", *ONE_TRIAL, "--space", "quantize", "--objectives", "accuracy", "size", "--bits", "8", "32",
        "--trial-timeout", "5m", "--seed", "3", "--out", "flags",
    )  # fmt: skip
    assert {**settings_of(tmp_path / "file"), "out": ""} == {**settings_of(tmp_path / "flags"), "out": ""}
    assert settings_of(tmp_path / "file")["trial_timeout"] == 300
    assert [row["key"] for row in rows(tmp_path / "file")] == [row["key"] for row in rows(tmp_path / "flags")]


def test_flags_win_over_the_config_file(cli: Callable[..., str], tmp_path: Path) -> None:
    settings = "executor: inline\ntarget: arm/pixel3\ntrials: 9\nobjectives: [accuracy, size]\ntime: 30m\n"
    (tmp_path / "c.yaml").write_text(settings)
    cli("search", "--config", "c.yaml", "--trials", "1", "--objectives", "accuracy", "latency", "--out", "run")
    settings = settings_of(tmp_path / "run")
    assert (settings["trials"], settings["time"], settings["objectives"]) == (1, 1800, ["accuracy", "latency"])
    assert len(rows(tmp_path / "run")) == 1


def test_weights_given_by_flag_are_the_ones_that_are_searched(
    cli: Callable[..., str], tmp_path: Path, digits_task: Task
) -> None:
    from autocompress.compression.training import accuracy

    model = digits_task.build()
    with torch.no_grad():
        model.fc.weight[5:] = 0  # type: ignore[union-attr,operator]
    torch.save(model.state_dict(), tmp_path / "mine.pt")
    cli("search", *ONE_TRIAL, "--weights", "mine.pt", "--out", "run")
    expected = accuracy(model, digits_task.data, digits_task.data.search)
    assert expected < 0.9
    assert float(rows(tmp_path / "run")[0]["accuracy"]) == pytest.approx(expected, abs=0.005)


def test_bits_on_offer_may_leave_out_32(cli: Callable[..., str], tmp_path: Path) -> None:
    cli(
        "search", *UNTIMED, "--trials", "4", "--space", "quantize", "--finetune-steps", "1", "--bits", "16", "8",
        "--out", "run",
    )  # fmt: skip
    proposed = [row for row in rows(tmp_path / "run") if row["param:bits.head"]]
    assert proposed
    assert {row["param:bits.float"] for row in proposed} <= {"", "16"}


def test_a_resumed_run_goes_on_to_the_new_number_of_trials(cli: Callable[..., str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    cli("search", *UNTIMED, "--finetune-steps", "5", "--trials", "3", "--out", run)
    before = rows(run)
    cli("search", "--resume", run, "--trials", "5")
    after = rows(run)
    assert [int(row["trial"]) for row in after] == list(range(5))
    assert [{name: row[name] for name in old} for old, row in zip(before, after, strict=False)] == before
    assert len({row["key"] for row in after}) == 5
    assert settings_of(run)["trials"] == 5
    assert len(stored_study(run).trials) == 5

    front = {point.trial for point in Study.open(run).front() if point.on_front}
    cli("search", "--resume", run)  # finished already
    assert rows(run) == after
    assert {point.trial for point in Study.open(run).front() if point.on_front} == front


def test_a_moved_run_folder_still_exports(cli: Callable[..., str], copied_run: Path, tmp_path: Path) -> None:
    moved = copied_run.rename(tmp_path / "elsewhere")
    cli("export", moved, "--trial", "0", "--out", tmp_path / "bundle")
    assert (tmp_path / "bundle" / "model.onnx").is_file()


def test_doctor_names_the_targets(run_cli: Callable[..., Any]) -> None:
    done = run_cli("doctor")
    assert done.returncode == 0, done.stderr
    for words in ("x86/openvino", "x86/onnxruntime", "usable cores", "latency, throughput, memory", "optuna"):
        assert words in done.stdout


def test_help_answers_in_under_a_second(run_cli: Callable[..., Any]) -> None:
    took = []
    for _ in range(3):
        started = time.perf_counter()
        done = run_cli("--help")
        took.append(time.perf_counter() - started)
        assert done.returncode == 0
        for command in ("search", "front", "export", "dashboard", "doctor"):
            assert command in done.stdout
    assert min(took) < 1.0


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, autocompress, autocompress.cli; print({'torch', 'optuna', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_dashboard_lists_the_study_and_ends_on_ctrl_c(small_run: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "autocompress", "dashboard", str(small_run), "--port", str(port)]
    # Shells start what runs in the background with Ctrl-C ignored, and all that these start inherits it.
    ignoring = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *command]
    server = subprocess.Popen(ignoring, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert re.search(rf"http://127\.0\.0\.1:{port}/", line)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/studies", timeout=30) as answer:
            studies = json.load(answer)["study_summaries"]
        assert [study["study_name"] for study in studies] == ["autocompress"]
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=30) == 0
    finally:
        server.kill()
        server.communicate()
