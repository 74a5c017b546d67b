"""Fronts of noisy figures: what is kept, what is dropped, and what holds when it is measured again."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import optuna._hypervolume
import pytest

from autocompress import InputError, Prune, Study, Task
from autocompress.core.types import (
    Artifact,
    Candidate,
    Capabilities,
    Evaluation,
    Measurement,
    Method,
    Plan,
    Provenance,
    State,
)
from autocompress.evaluators.objectives import find_objective, parse_constraint
from autocompress.evaluators.pipeline import Evaluator
from autocompress.hardware.statistics import paired_interval, share_interval
from autocompress.hardware.x86 import CpuBackend
from autocompress.search.config import SearchConfig, save_config
from autocompress.search.run import Silent
from autocompress.search.verify import measure_front
from autocompress.studies.noise import clearly_better, doubtful, merge, spread, standings
from autocompress.studies.pareto import hypervolume, nondominated
from autocompress.studies.storage import Database, sqlite_url

HERE = Provenance(Method.MEASURED, "a device", "a runtime", "")
DOWN = ["minimize", "minimize", "minimize"]


def figure(value: float, half: float = 0.0, name: str = "latency", **changes: object) -> Measurement:
    """A measurement with a symmetric interval; exact without one."""
    fields = {"ci95": (value - half, value + half) if half else None, "samples": 30, "provenance": HERE} | changes
    unit = {"latency": "s", "size": "B"}.get(name, "")
    return Measurement(name, value, unit, **fields)  # type: ignore[arg-type]


def share(outcomes: list[bool]) -> Measurement:
    """The accuracy of a model that is right where `outcomes` says so."""
    right, bits = sum(outcomes), np.packbits(outcomes).tobytes().hex()
    return figure(
        right / len(outcomes), ci95=share_interval(right, len(outcomes)), samples=len(outcomes), outcomes=bits
    )


def kept(rows: list[list[Measurement]], directions: list[str]) -> list[int]:
    return [position for position, standing in enumerate(standings(rows, directions)) if standing.by == position]


def test_a_difference_counts_beyond_the_root_of_the_sum_of_squares() -> None:
    assert not clearly_better(figure(10, 3), figure(14.9, 4), "minimize")
    assert clearly_better(figure(10, 3), figure(15.1, 4), "minimize")
    assert clearly_better(figure(15.1, 4), figure(10, 3), "maximize")
    assert not clearly_better(figure(15.1, 4), figure(10, 3), "minimize")
    assert clearly_better(figure(1), figure(1.0001), "minimize"), "exact figures differ by anything"
    assert not clearly_better(figure(1), figure(1), "minimize")


def test_of_uneven_intervals_the_sides_that_face_each_other_count() -> None:
    a, b = figure(10, ci95=(0, 11)), figure(12, ci95=(11, 30))
    assert clearly_better(a, b, "minimize"), "2 > sqrt(1 + 1)"
    assert not clearly_better(a, figure(12, ci95=(9, 30)), "minimize"), "2 < sqrt(1 + 9)"


def test_shares_of_the_same_samples_are_compared_in_pairs() -> None:
    good, worse = [True] * 900 + [False] * 100, [True] * 890 + [False] * 110
    swapped = [False] * 60 + [True] * 890 + [False] * 50
    assert clearly_better(share(good), share(worse), "maximize"), "ten lost, none gained"
    assert not clearly_better(share(good), share(swapped), "maximize"), "60 lost, 50 gained"
    alone = share(worse)
    apart = figure(alone.value, ci95=alone.ci95, samples=1000)
    assert not clearly_better(share(good), apart, "maximize"), "nothing is known of its samples"


def test_the_interval_of_a_paired_difference_by_hand() -> None:
    half = 1.959964 * math.sqrt(7 - 36 / 100) / 100
    assert paired_interval(6, 0, 98) == pytest.approx((0.06 - half, 0.06 + half))
    assert paired_interval(0, 6, 98) == pytest.approx((-0.06 - half, -0.06 + half))


def test_exact_figures_make_the_plain_front() -> None:
    values = np.random.default_rng(0).integers(0, 6, (40, 3)).tolist()
    plain = nondominated(values, DOWN)
    assert kept([[figure(v) for v in row] for row in values], DOWN) == [i for i, keep in enumerate(plain) if keep]


def test_a_point_that_is_better_by_noise_alone_is_no_point_of_the_front() -> None:
    # Accuracy with 1 % of noise, exact size: the second is half a point better, and larger.
    rows = [[figure(0.900, 0.01), figure(100)], [figure(0.905, 0.01), figure(150)], [figure(0.93, 0.01), figure(200)]]
    found = standings(rows, ["maximize", "minimize"])
    assert [(standing.by, standing.level) for standing in found] == [(0, True), (0, False), (2, True)]


def test_of_level_points_the_best_first_objective_stands_for_the_others() -> None:
    rows = [[figure(1.2, 1), figure(5, 1)], [figure(1.0, 1), figure(5.1, 1)], [figure(1.1, 1), figure(4.9, 1)]]
    assert [standing.by for standing in standings(rows, DOWN[:2])] == [1, 1, 1]


def test_a_circle_of_points_that_beat_each_other_leaves_its_first() -> None:
    a, b, c = ([figure(v, 0.7) for v in row] for row in ((0, 0.6, 1.2), (1.2, 0, 0.6), (0.6, 1.2, 0)))
    for rows in ([a, b, c], [c, b, a], [b, a, c]):
        assert kept(rows, DOWN) == [rows.index(a)]


def test_random_fronts_are_consistent_and_do_not_depend_on_the_order() -> None:
    rng = np.random.default_rng(1)
    directions = ["maximize", "minimize", "minimize"]
    for _ in range(60):
        halves = rng.choice([0, 0.1, 0.2, 0.4], (rng.integers(1, 12), 3))
        rows = [[figure(v, h) for v, h in zip(rng.random(3), half, strict=True)] for half in halves]
        found = standings(rows, directions)
        better = [[any(map(clearly_better, a, b, directions)) for b in rows] for a in rows]
        for position, standing in enumerate(found):
            stands = standing.by
            assert found[stands].by == stands, "what stands for others is kept"
            if stands != position:
                in_circle = standing.level and better[position][stands]
                assert in_circle or not better[position][stands], "no better than what stands for it"
        front = kept(rows, directions)
        assert all(better[a][b] for a in front for b in front if a != b), "each is better in something"
        order = rng.permutation(len(rows)).tolist()
        assert {order[i] for i in kept([rows[i] for i in order], directions)} == set(front)


def test_doubtful_is_what_the_front_depends_on() -> None:
    rows = [[figure(10, 1), figure(5)], [figure(11.3, 1), figure(4)], [figure(30, 1), figure(3)]]
    movable = [[True, False]] * 3
    # The second is as fast as the first and smaller, so it beats it; it would not if either were off by half.
    assert kept(rows, DOWN[:2]) == [1, 2]
    assert doubtful(rows, DOWN[:2], movable) == [0, 1]
    assert doubtful(rows, DOWN[:2], [[False, False]] * 3) == []
    far = [[figure(10, 1), figure(5)], [figure(20, 1), figure(4)]]
    assert kept(far, DOWN[:2]) == [0, 1]
    assert doubtful(far, DOWN[:2], movable[:2]) == []


def test_merged_measurements_are_a_random_effects_mean() -> None:
    # Standard errors of 0.1: Q = 8, C = 100, so the variance between is 0.07; each weighs 1 / (0.01 + 0.07).
    half = 1.959964 * 0.1
    merged = merge([figure(10.0, half), figure(10.4, half)])
    assert merged.value == pytest.approx(10.2)
    assert merged.ci95 == pytest.approx((10.2 - 1.959964 * 0.2, 10.2 + 1.959964 * 0.2))
    assert merged.samples == 60
    agreeing = merge([figure(10.0, half)] * 4)
    assert agreeing.ci95 == pytest.approx((10 - half / 2, 10 + half / 2))


def test_measurements_on_another_device_are_not_merged() -> None:
    other = Provenance(Method.MEASURED, "another device", "a runtime", "")
    newest = figure(10.0, 1)
    assert merge([figure(50.0, 1, provenance=other), newest]) == newest


def test_the_spread_between_measurements_is_what_their_intervals_leave() -> None:
    values = [1.0, 1.1, 0.9, 1.05]
    assert spread([figure(v, 1e-9) for v in values]) == pytest.approx(float(np.std(np.log(values), ddof=1)))
    assert spread([figure(v, 1.0) for v in values]) == 0.0
    assert spread([figure(1, 0.1), figure(2, 0.1)]) == 0.0, "two tell too little"


def test_hypervolume_agrees_with_optunas() -> None:
    rng = np.random.default_rng(2)
    points, corner = rng.random((20, 3)), np.array([0.8, 0.9, 1.0])
    inside = points[(points < corner).all(1)]
    expected = optuna._hypervolume.compute_hypervolume(inside, corner)
    assert hypervolume(points.tolist(), DOWN, reference=corner.tolist()) == pytest.approx(expected / corner.prod())
    flipped = points * [-1, 1, 1]
    share_ = hypervolume(flipped.tolist(), ["maximize", *DOWN[1:]], reference=[-0.8, 0.9, 1.0])
    assert share_ == pytest.approx(expected / (1.8 * 0.9))  # the ideal of a maximised figure is 1


NAMES = ("accuracy", "latency", "size")
Make = Callable[..., Study]


@pytest.fixture
def make_study(tmp_path: Path) -> Make:
    """A run folder with a trial for each (accuracy, its noise, latency in ms, its noise, size in kB)."""

    def make(*rows: tuple[float, ...], limits: tuple[str, ...] = ()) -> Study:
        objectives = [find_objective(name) for name in NAMES]
        database = Database(sqlite_url(tmp_path), [o.direction for o in objectives], NAMES)
        save_config(SearchConfig(objectives=list(NAMES), constraints=list(limits), out=str(tmp_path)), tmp_path)
        study = Study(tmp_path, objectives, database, constraints=[parse_constraint(limit) for limit in limits])
        for number, row in enumerate(rows):
            plan: Plan = (Prune(number / 10),) if number else ()
            baseline = "" if number else "untouched"
            study.write(Evaluation(Candidate(plan), State.COMPLETE, figures(*row), baseline=baseline))
        return study

    return make


def figures(*row: float) -> dict[str, Measurement]:
    accuracy, noise, latency, jitter, size = row
    return {
        "accuracy": figure(accuracy, noise, "accuracy"),
        "latency": figure(latency / 1e3, jitter / 1e3, "latency"),
        "size": figure(size * 1e3, name="size"),
    }


ROWS = (
    (0.95, 0.01, 10.0, 0.1, 400),
    (0.93, 0.01, 5.0, 0.1, 200),  # on the front
    (0.935, 0.01, 5.05, 0.1, 210),  # no better than trial 1, but for its larger size
    (0.90, 0.01, 5.0, 0.1, 100),  # on the front
    (0.80, 0.01, 6.0, 0.1, 300),  # beaten
)


def test_the_front_marks_what_is_better_by_noise_alone(make_study: Make) -> None:
    study = make_study(*ROWS)
    standing = {p.trial: (p.on_front, p.no_better_than, p.verified) for p in study.front()}
    assert standing == {0: (True, None, None), 1: (True, None, None), 2: (False, 1, None), 3: (True, None, None)}
    assert [point.trial for point in study.front(baselines=False)] == [0, 1, 3]
    assert study.front(verified=True) == []


def test_best_takes_a_point_that_is_within_limits_where_its_better_is_not(make_study: Make) -> None:
    assert make_study(*ROWS).best(accuracy=">=0.934", latency="<=6ms").trial == 2


def test_verified_is_what_stands_on_the_test_split_and_says_what_changed(make_study: Make) -> None:
    study = make_study(*ROWS, limits=("latency<=60%",))
    study.add_again(0, "test", figures(0.94, 0.01, 10.0, 0.1, 400))
    study.add_again(1, "test", figures(0.90, 0.01, 5.0, 0.1, 200))  # level with trial 3 now, which is smaller
    study.add_again(2, "test", figures(0.93, 0.01, 6.2, 0.1, 210))  # too slow now
    study.add_again(3, "test", figures(0.90, 0.01, 5.1, 0.1, 100))
    found = {point.trial: (point.verified, point.change) for point in study.front()}
    assert found[1] == (False, "beaten by trial 3 on the test split")
    assert found[2] == (False, "breaks latency<=60% on the test split")
    assert found[3] == (True, "latency 5.00 ms → 5.10 ms")
    holding = study.front(verified=True)
    assert [point.trial for point in holding] == [3]
    assert all(point.on_front and point.split == "test" for point in holding)


def test_measuring_again_settles_a_doubt(make_study: Make) -> None:
    study = make_study((0.95, 0.01, 10.0, 1.0, 400), (0.95, 0.01, 9.0, 1.0, 410))
    assert study.doubtful() == [0, 1]
    for latency in (9.02, 9.0, 8.98):
        study.add_again(1, "test", figures(0.95, 0.01, latency, 0.05, 410))
    for latency in (10.02, 10.0, 9.98):
        study.add_again(0, "test", figures(0.95, 0.01, latency, 0.05, 400))
    assert study.doubtful() == []
    assert [point.trial for point in study.front() if point.on_front] == [0, 1]
    merged = study.measured_again()[1]["latency"]
    assert merged.value == pytest.approx(9.0e-3)
    assert merged.samples == 90


def test_how_uneven_the_machine_was_counts_as_noise(make_study: Make) -> None:
    rows = [(0.9, 0.01, 10.0, 0.01, 400), (0.9, 0.01, 9.8, 0.01, 410)]
    steady, study = make_study(*rows), make_study()
    assert [point.trial for point in steady.front() if point.on_front] == [0, 1]
    for number, reference in enumerate((0.0100, 0.0104, 0.0096)):
        found = figures(0.5, 0.01, 20.0, 0.01, 500) | {
            "reference_latency": figure(reference, 1e-5, "reference_latency")
        }
        study.write(Evaluation(Candidate((Prune(0.5 + number / 10),)), State.COMPLETE, found))
    assert study.unevenness() == pytest.approx(0.04, rel=0.05)
    assert [point.trial for point in study.front() if point.on_front] == [0]


def test_an_emulated_devices_interval_hides_no_order(make_study: Make) -> None:
    study = make_study()
    simulated = Provenance(Method.SIMULATED, "a chip", "a model", "")
    for number, latency in enumerate((10.0, 9.0)):
        found = figures(0.9, 0.01, latency, 0.0, 100 + number)
        found["latency"] = figure(latency / 1e3, 5e-3, "latency", provenance=simulated)
        study.write(Evaluation(Candidate((Prune(0.1 + number / 10),)), State.COMPLETE, found))
    assert len([point for point in study.front() if point.on_front]) == 2
    assert study.doubtful() == [], "to simulate it again would tell nothing"


def test_a_studys_hypervolume_by_hand(make_study: Make) -> None:
    study = make_study((0.8, 0, 10.0, 0, 100), (0.5, 0, 5.0, 0, 50))
    # Latency to 11 ms and size to 110 kB, 10 % above the untouched model's.
    union = 0.5 * 6 * 60 + 0.3 * 1 * 10
    assert study.hypervolume() == pytest.approx(union / (11 * 110))
    inside = study.hypervolume({"accuracy": 0.4, "latency": 0.01, "size": 100e3})
    assert inside == pytest.approx(0.1 * 5 * 50 / (0.6 * 10 * 100))
    with pytest.raises(InputError, match="the reference point has no latency"):
        study.hypervolume({"accuracy": 0})


def test_the_command_line_prints_what_is_verified(
    make_study: Make, call_cli: Callable[..., tuple[int, str, str]]
) -> None:
    study = make_study(*ROWS)
    code, said, error = call_cli("front", study.folder, "--verified")
    assert (code, said) == (2, "")
    assert "nothing is verified yet" in error
    assert f"--resume {study.folder}" in error
    assert "no better than 1" in call_cli("front", study.folder, "--format", "markdown")[1]
    study.add_again(1, "test", figures(0.90, 0.01, 5.0, 0.1, 200))
    study.add_again(3, "test", figures(0.90, 0.01, 4.0, 0.1, 100))
    _, said, _ = call_cli("front", study.folder, "--verified")
    words = " ".join(said.split())
    assert "verified on the test split" in words
    assert "dropped: 1 (prune 10%): beaten by trial 3 on the test split" in words
    assert "not measured on the test split: 0" in words
    (row,) = csv.DictReader(io.StringIO(call_cli("front", study.folder, "--verified", "--format", "csv")[1]))
    assert (row["trial"], row["verified"], row["change"]) == ("3", "True", "latency 5.00 ms → 4.00 ms")


class Jittery:
    """ONNX Runtime's files with made-up latencies: what is not the untouched model is 10 % faster."""

    name = "test/jittery"
    capabilities = Capabilities(bits=(32,), metrics=("latency",))

    def __init__(self) -> None:
        self._real, self._rng, self.sessions = CpuBackend("onnxruntime", 1), np.random.default_rng(0), 0
        self.build, self.predict, self.missing = self._real.build, self._real.predict, self._real.missing

    def measure(self, artifact: Artifact, task: Task, reference: Artifact | None) -> list[Measurement]:
        self.sessions += 1
        value = (0.9 if reference else 1.0) + 0.01 * float(self._rng.normal())
        return [figure(value, 0.1, "latency")]


class Listener(Silent):
    """Keeps what it was told."""

    told: tuple[int, int, int] | None = None

    def settled(self, points: int, times: int, doubtful: int) -> None:
        self.told = points, times, doubtful


def test_a_search_ends_with_its_doubtful_points_measured_again(digits_task: Task, make_study: Make) -> None:
    study, backend, listener = make_study(), Jittery(), Listener()
    evaluator = Evaluator(digits_task, backend, study.objectives, (), study.folder)
    untouched = evaluator(Candidate(()))
    assert untouched.artifact is not None
    study.write(untouched)
    # The same file under another plan, a byte larger: only its latency, 10 ±14 % lower, may put it on the front.
    larger = {**untouched.measurements, "size": figure(untouched.artifact.size_bytes + 1, name="size")}
    larger["latency"] = figure(0.9, 0.1)
    study.write(Evaluation(Candidate((Prune(0.25),)), State.COMPLETE, larger, artifact=untouched.artifact))
    assert [point.trial for point in study.front() if point.on_front] == [0]
    assert study.doubtful() == [0, 1]
    before = backend.sessions
    measure_front(dataclasses.replace(evaluator, baseline=untouched), study, listener, seconds=0)
    assert (backend.sessions - before, listener.told) == (2, None), "each once, where there is no time for more"
    measure_front(dataclasses.replace(evaluator, baseline=untouched), study, listener, seconds=60)
    assert listener.told is not None
    assert listener.told[2] == 0
    assert backend.sessions - before == 4 + listener.told[1]
    assert [point.trial for point in study.front() if point.on_front] == [0, 1]
    again = study.measured_again()
    assert all(again[trial]["latency"].samples > 60 for trial in (0, 1)), "sessions are merged"
    assert all(m["accuracy"].samples == len(digits_task.data.test) for m in again.values())
