"""Searches with rungs: who goes on, what is recorded, what a front may hold."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import optuna
import pytest

import autocompress as ac
from autocompress import Prune, Quantize
from autocompress.compression.finetune import Finetune
from autocompress.core.codec import decode_plan
from autocompress.core.types import Candidate, Chooser, Evaluation, Measurement, Method, Plan, Provenance, State
from autocompress.evaluators.objectives import find_objective
from autocompress.search.engine import Engine
from autocompress.search.executors import InlineExecutor
from autocompress.search.rungs import Ladder, shares_of, with_restarts
from autocompress.search.samplers import make_sampler
from autocompress.studies.storage import Database, sqlite_url
from autocompress.studies.study import Study

NAMES = ("accuracy", "macs")
DIRECTIONS = ["maximize", "minimize"]


def candidate(ratio: float, fidelity: float = 1 / 9) -> Candidate:
    return Candidate((Prune(ratio),), {"x": ratio}, fidelity)


def ratio_of(found: Candidate | None) -> float | None:
    return None if found is None else found.params["x"]


def test_the_best_third_goes_on_one_by_one_and_each_once() -> None:
    ladder = Ladder(DIRECTIONS, rungs=3, reduction=3)
    assert ladder.lowest == pytest.approx(1 / 9)
    figures = {0.1: (0.9, 5.0), 0.2: (0.8, 6.0), 0.3: (0.7, 7.0)}  # each beats the next one
    for ratio, values in figures.items():
        ladder.add(candidate(ratio), values, [])
    first = ladder.next()
    assert ratio_of(first) == 0.1
    assert first is not None
    assert first.fidelity == pytest.approx(1 / 3)
    assert ladder.next() is None
    for ratio in (0.4, 0.5, 0.6):
        ladder.add(candidate(ratio), (0.1, 9.0), [])
    assert ratio_of(ladder.next()) == 0.2
    assert ladder.next() is None


def test_upper_rungs_come_first_and_the_last_call_gets_someone_to_the_top() -> None:
    ladder = Ladder(DIRECTIONS, rungs=3, reduction=3)
    for ratio in (0.1, 0.2, 0.3):
        ladder.add(candidate(ratio), (1 - ratio, ratio), [])
    ladder.add(candidate(0.9, 1 / 3), (0.5, 0.5), [])
    assert ladder.next() is not None
    assert ladder.next() is None
    top = ladder.next(last_call=True)
    assert ratio_of(top) == 0.9
    assert top is not None
    assert top.fidelity == 1.0


def test_feasible_candidates_come_first_then_hypervolume_decides_within_a_front() -> None:
    ladder = Ladder(DIRECTIONS, rungs=2, reduction=2)
    for number in range(3):
        ladder.add(candidate(0.7 + 0.1 * number, 0.5), (0.01, 10.0), [0.3])  # hopeless
    ladder.add(candidate(0.1, 0.5), (0.99, 1.0), [0.2])  # the best, but outside a limit
    ladder.add(candidate(0.2, 0.5), (0.90, 9.0), [0.0])
    ladder.add(candidate(0.3, 0.5), (0.80, 5.0), [0.0])  # the knee of the front
    ladder.add(candidate(0.4, 0.5), (0.10, 4.8), [0.0])
    ladder.add(candidate(0.5, 0.5), (0.05, 9.9), [0.0])  # beaten
    ladder.add(candidate(0.6, 0.5), (0.05, 9.9), [0.1])
    assert [ratio_of(ladder.next()) for _ in range(4)] == [0.3, 0.2, 0.4, None]


def test_of_two_good_ones_that_are_alike_one_goes_on_early() -> None:
    ladder = Ladder(DIRECTIONS, rungs=2, reduction=2)
    knee, twin, accurate, small = (0.80, 3.0), (0.801, 3.01), (0.90, 9.0), (0.10, 2.0)
    for ratio, values in zip((0.1, 0.2, 0.3, 0.4), (accurate, small, knee, twin), strict=True):
        ladder.add(candidate(ratio, 0.5), values, [])
    assert ratio_of(ladder.next()) in (0.3, 0.4)


def test_a_model_of_full_training_decides_who_goes_on_within_the_same_share() -> None:
    ladder = Ladder(DIRECTIONS, rungs=2, reduction=2)
    for ratio in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6):
        ladder.add(candidate(ratio, 0.5), (1 - ratio, 10 * ratio), [])
    assert ratio_of(ladder.next(gains=lambda found: np.array([c.params["x"] for c in found]))) == 0.6
    assert ratio_of(ladder.next(gains=lambda found: np.array([-c.params["x"] for c in found]))) == 0.1
    assert ladder.next(gains=lambda found: np.ones(len(found))) is None  # a third of them have gone
    for ratio in (0.7, 0.8, 0.9):
        ladder.add(candidate(ratio, 0.5), (0.0, 10 * ratio - 7), [])
    assert ratio_of(ladder.next(gains=lambda found: None)) is not None  # as without, while too little is known


def test_one_rung_stops_nobody() -> None:
    assert Ladder(DIRECTIONS).lowest == 1.0
    with pytest.raises(ac.InputError, match="at least 1 rung"):
        Ladder(DIRECTIONS, rungs=0)


class Learning:
    """A made-up evaluation: accuracy grows with training, by more where x is small; it costs 90 steps in all."""

    def __init__(self) -> None:
        self.done: dict[str, float] = {}
        self.asked: list[tuple[float, float]] = []

    def __call__(self, candidate: Candidate) -> Evaluation:
        x, fidelity = candidate.params.get("x", 0.0), candidate.fidelity
        self.asked.append((x, round(fidelity, 3)))
        if x == 0.5 and fidelity > 0.2:
            raise RuntimeError("the loss is nan")
        source = Provenance(Method.SIMULATED, "test", "test", "")
        values = {"accuracy": 0.9 - x + 0.1 * fidelity, "macs": 1 - x}
        steps = round(90 * (fidelity - self.done.get(candidate.key, 0.0)))
        self.done[candidate.key] = fidelity
        return Evaluation(
            candidate,
            State.STOPPED if fidelity < 1 else State.COMPLETE,
            {name: Measurement(name, value, "", None, 1, source) for name, value in values.items()},
            seconds=1.0,
            steps=steps,
        )


class Line:
    """One parameter, the values in order."""

    starts: ClassVar = [{"x": i / 10} for i in range(1, 9)]

    def __call__(self, choose: Chooser) -> Plan:
        return (Prune(choose.suggest_float("x", 0.0, 0.95, step=0.05)),)


class Seeing(optuna.samplers.RandomSampler):
    """Remembers the study that it was last asked about."""

    def before_trial(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        self.study = study


def search(folder: Path, evaluate: Learning, trials: int, sampler: Any = None) -> tuple[Study, Engine]:
    names = list(NAMES)
    study = Study(folder, [find_objective(name) for name in NAMES], Database(sqlite_url(folder), DIRECTIONS, names))
    engine = Engine(
        space=Line(),
        study=study,
        executor=InlineExecutor(evaluate),
        sampler=sampler or make_sampler("random", seed=0, trials=trials, constrained=False),
        trials=trials,
        baselines={"untouched": ()},
        rungs=3,
        reduction=3,
    )
    engine.run()
    return study, engine


def test_a_search_counts_candidates_and_records_where_each_stopped(tmp_path: Path) -> None:
    evaluate = Learning()
    study, engine = search(tmp_path, evaluate, 9)
    records = study.records()
    assert engine.progress.trials == len(records) == 9
    assert evaluate.asked[0] == (0.0, 1.0)  # the baseline is trained in full at once
    stopped = [record for record in records if record.state is State.STOPPED]
    assert engine.progress.stopped == len(stopped) > 0
    assert all(record.fidelity < 1 and record.steps == round(90 * record.fidelity) for record in stopped)
    full = [record for record in records if record.state is State.COMPLETE and not record.baseline]
    assert full
    assert all((record.steps, record.seconds) == (90, 3.0) for record in full)  # of all three rungs
    assert engine.progress.steps == sum(record.steps or 0 for record in records)
    front = {point.trial for point in study.front()}
    assert front.isdisjoint({record.trial for record in stopped})
    # Optuna's own front, as its dashboard shows it.
    stored = {trial.number: trial for trial in study.stored()}
    assert {stored[record.trial].state.name for record in stopped} == {"PRUNED"}
    assert stored[stopped[0].trial].user_attrs["fidelity"] == stopped[0].fidelity
    table = study.to_dataframe().set_index("trial")
    assert table.loc[stopped[0].trial, ["state", "fidelity", "training_steps"]].tolist() == [
        "stopped", stopped[0].fidelity, stopped[0].steps,
    ]  # fmt: skip


def test_a_failure_on_an_upper_rung_is_recorded_and_the_search_goes_on(tmp_path: Path) -> None:
    evaluate = Learning()
    study, _ = search(tmp_path, evaluate, 20)
    (failure,) = [record for record in study.records() if record.state is State.FAILED]
    assert "the loss is nan" in failure.reason
    assert failure.params == {"x": 0.5}
    assert failure.seconds >= 1.0  # what the lower rung cost is not forgotten


def test_samplers_see_results_of_all_rungs_with_their_fidelity(tmp_path: Path) -> None:
    sampler = Seeing(seed=0)
    evaluate = Learning()
    search(tmp_path, evaluate, 12, sampler)
    seen = [t for t in sampler.study.get_trials() if t.state.name == "COMPLETE"]
    by_x: dict[float, list[float]] = {}
    for trial in seen:
        fidelity = trial.user_attrs.get("fidelity", 1.0)
        assert trial.values[0] == pytest.approx(0.9 - trial.params["x"] + 0.1 * fidelity)
        by_x.setdefault(trial.params["x"], []).append(round(fidelity, 3))
    assert {0.111, 0.333, 1.0} in [set(found) for found in by_x.values()]


def test_an_interrupted_search_goes_on_with_its_rungs(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    search(whole, Learning(), 9)
    evaluate = Learning()
    search(parts, evaluate, 4)
    study, engine = search(parts, evaluate, 9)
    assert engine.progress.trials == len(study.records()) == 9
    done = [(record.params.get("x"), record.fidelity) for record in study.records()]
    assert len({x for x, _ in done}) == 9
    assert len(evaluate.asked) == len(set(evaluate.asked))  # nothing was trained twice


class Cuts:
    """Pruned models with fine-tuning, and one that is rounded, without."""

    starts: ClassVar = [{"cut": cut} for cut in (0.0, 0.25, 0.625, 0.75)]

    def __call__(self, choose: Chooser) -> Plan:
        cut = choose.suggest_float("cut", 0.0, 0.875, step=0.125)
        return (Prune(cut, round_to=4), Finetune(18, batch_size=32)) if cut else (Quantize(8, "percentile"),)


@pytest.fixture(scope="module")
def measured() -> list[str]:
    """Names of the files that were measured."""
    return []


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, measured: list[str]) -> Study:
    """A finished search over six digits models with two rungs; read only."""
    from autocompress.hardware.tpu import EdgeTpuBackend

    original = EdgeTpuBackend.measure

    def counted(self: Any, artifact: Any, task: Any, reference: Any) -> Any:
        measured.append(artifact.path.parent.name)
        return original(self, artifact, task, reference)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EdgeTpuBackend, "measure", counted)
        return ac.run_search(
            "digits-cnn", "digits", Cuts(), target="tpu/edgetpu", trials=7, executor="inline", finetune_steps=18,
            rungs=2, reduction=3, sampler="random", verify_time=0, out=tmp_path_factory.mktemp("runs") / "rungs",
        )  # fmt: skip


def test_only_full_training_reaches_the_front_and_the_test_split(study: Study) -> None:
    records = {record.trial: record for record in study.records()}
    stopped = [record for record in records.values() if record.state is State.STOPPED]
    assert stopped
    assert all(record.artifact is None and record.fidelity == pytest.approx(1 / 3) for record in stopped)
    assert all(record.steps == 6 for record in stopped)
    points = study.front()
    assert all(records[point.trial].state is State.COMPLETE and point.split == "test" for point in points)
    climbed = [r for r in records.values() if r.state is State.COMPLETE and r.steps == 18 and not r.baseline]
    assert climbed
    assert not (study.folder / "cache").exists()


def test_what_has_no_training_is_complete_at_once(study: Study) -> None:
    (rounded,) = [record for record in study.records() if record.params.get("cut") == 0]
    assert (rounded.state, rounded.fidelity, rounded.steps) == (State.COMPLETE, 1.0, 0)


def test_the_device_measures_a_structure_once(study: Study, measured: list[str]) -> None:
    final = {point.artifact.path.parent.name for point in study.front() if point.artifact}
    for record in study.records():
        again = record.key in final or bool(record.baseline)  # on the test split, after the search
        assert measured.count(record.key) == 1 + again
    rows = [trial.user_attrs["evaluation"] for trial in study.stored()]
    by_key: dict[str, list[Any]] = {}
    for row in rows:
        by_key.setdefault(row["key"], []).append(row["metrics"])
    twice = [metrics for metrics in by_key.values() if len(metrics) > 1]
    assert twice
    for first, second in twice:
        assert first["latency"] == second["latency"]
        assert first["macs"] == second["macs"]


def test_tables_say_how_far_each_was_trained(study: Study) -> None:
    with (study.folder / "trials.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert {row["fidelity"] for row in rows if row["state"] == "stopped"} == {str(1 / 3)}
    assert {row["training_steps"] for row in rows} >= {"0", "6", "18"}


def test_full_training_on_rungs_is_full_training(study: Study) -> None:
    from autocompress.compression.training import accuracy

    task = ac.load_task("digits-cnn", "digits")
    climbed = next(r for r in study.records() if r.state is State.COMPLETE and r.steps == 18 and not r.baseline)
    model = task.build()
    for step in decode_plan(climbed.plan):
        model = step(model, task)
    assert climbed.metrics["accuracy"].value == pytest.approx(accuracy(model, task.data, task.data.search), abs=0.003)


def test_the_learning_rate_starts_again_where_candidates_stop(study: Study) -> None:
    for record in study.records():
        for step in record.plan:
            if step["op"] == "Finetune":
                assert step["restarts"] == pytest.approx([1 / 3])
    own = Finetune(18, restarts=(0.5,))
    assert with_restarts((Prune(0.5), own, Quantize(8)), (1 / 3,)) == (Prune(0.5), own, Quantize(8))
    assert with_restarts((Finetune(18),), shares_of(3, 3)) == (Finetune(18, restarts=(1 / 9, 1 / 3)),)
    assert with_restarts((Finetune(18),), shares_of(1, 3)) == (Finetune(18),)


@pytest.mark.parametrize("flags", [("--rungs", "0"), ("--reduction", "1")])
def test_wrong_rungs_are_refused(flags: tuple[str, str], call_cli: Callable[..., tuple[int, str, str]]) -> None:
    code, _, errors = call_cli("search", *flags)
    assert code == 2
    assert flags[0].removeprefix("--") in errors


SEARCH = [sys.executable, "-m", "autocompress", "search"]


@pytest.mark.slow
def test_a_killed_driver_trains_nothing_twice(tmp_path: Path) -> None:
    arguments = [
        "--rungs",
        "3",
        "--reduction",
        "3",
        "--space",
        "prune",
        "--finetune-steps",
        "90",
        "--trials",
        "12",
        "--out",
        "run",
    ]
    limits = [
        "--space",
        "prune",
        "--target",
        "tpu/edgetpu",
        "--executor",
        "inline",
        "--objectives",
        "accuracy",
        "macs",
        "--verify-time",
        "1s",
    ]
    driver = subprocess.Popen([*SEARCH, *arguments, *limits], cwd=tmp_path, start_new_session=True)
    out, end = tmp_path / "run", time.monotonic() + 400
    while not ((out / "config.yaml").is_file() and len(list((out / "cache").glob("*.training"))) >= 2):
        assert time.monotonic() < end
        assert driver.poll() is None
        time.sleep(0.1)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    kept = {path.name.split(".")[0] for path in (out / "cache").glob("*.training")}
    done = subprocess.run([*SEARCH, "--resume", "run"], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "stopped before their full training" in done.stdout
    records = Study.open(out).records()
    assert kept
    assert len(records) == len({record.key for record in records}) == 12
    full = [record for record in records if record.state is State.COMPLETE and record.params]
    assert any(record.steps == 90 for record in full)
    assert max(record.steps or 0 for record in records) == 90


@pytest.mark.slow
def test_several_targets_share_the_training_on_every_rung(tmp_path: Path) -> None:
    targets = ["x86/onnxruntime", "tpu/edgetpu"]
    joint = ac.run_search(
        "digits-cnn", "digits", "prune", target=targets, trials=8, executor="inline", finetune_steps=18, rungs=2,
        reduction=3, threads=1, verify_time=0, objectives=["accuracy", "latency"], out=tmp_path / "run",
    )  # fmt: skip
    states = {record.state for record in joint.records()}
    assert states == {State.STOPPED, State.COMPLETE}
    for part in joint.parts.values():
        assert [record.state for record in part.records()] == [record.state for record in joint.records()]
    for record in joint.records():
        assert record.steps in (0, 6, 18)
