"""Searches that are after one number: how it is written, what the sampler is told, and what the report names."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

import autocompress as ac
from autocompress.core.types import Method, Provenance
from autocompress.evaluators.scalar import parse_scalar
from autocompress.search.samplers import make_sampler
from autocompress.studies.study import Study

HERE = Provenance(Method.SIMULATED, "test", "test", "2026-01-01T00:00:00+00:00")
NAMES = ["accuracy", "latency", "size", "throughput"]


def figures(**values: float) -> dict[str, ac.Measurement]:
    units = {"latency": "s", "size": "B", "throughput": "1/s", "reference_latency": "s"}
    return {
        name.replace("__", "@"): ac.Measurement(name, value, units.get(name.partition("__")[0], ""), None, 1, HERE)
        for name, value in values.items()
    }


UNTOUCHED = figures(accuracy=0.9, latency=10e-3, size=2e6, throughput=100.0)
CANDIDATE = figures(accuracy=0.8, latency=4e-3, size=1e6, throughput=300.0)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("accuracy - 0.3 latency", 0.8 - 0.3 * 0.4),
        ("accuracy-0.3*latency", 0.8 - 0.3 * 0.4),
        ("-0.3 latency + accuracy", 0.8 - 0.3 * 0.4),
        ("2 accuracy - 0.5 latency/5ms - 0.1 (size/500kB)", 1.6 - 0.5 * 0.8 - 0.1 * 2),
        ("accuracy - latency/50%", 0.8 - 0.8),
        ("accuracy + 1e-1 throughput", 0.8 + 0.3),
        ("accuracy/80%", 1.0),
        ("accuracy * (latency/5ms)^-0.07", 0.8 * 0.8**-0.07),
        ("accuracy * latency**-0.07", 0.8 * 0.4**-0.07),
        ("accuracy^2 * (size/50%)^-1 * throughput^0.5", 0.64 * 3**0.5),
    ],
)
def test_a_formula_means_what_it_says(text: str, value: float) -> None:
    assert parse_scalar(text, NAMES)(CANDIDATE, UNTOUCHED) == pytest.approx(value)


def test_latency_is_compared_with_that_of_the_untouched_model_in_the_same_turns() -> None:
    slow_spell = {**CANDIDATE, **figures(reference_latency=20e-3)}
    assert parse_scalar("accuracy - latency", NAMES)(slow_spell, UNTOUCHED) == pytest.approx(0.8 - 0.2)


def test_of_several_targets_the_worst_counts() -> None:
    scalar = parse_scalar("accuracy - latency", NAMES)
    untouched = figures(accuracy=0.9, latency__one=10e-3, latency__two=1e-3)
    found = figures(accuracy=0.8, latency__one=4e-3, latency__two=0.7e-3)
    assert scalar(found, untouched) == pytest.approx(0.8 - 0.7)
    assert scalar({**found, **figures(reference_latency__two=7e-3)}, untouched) == pytest.approx(0.8 - 0.4)


def test_a_figure_that_is_unknown_or_divides_by_zero_gives_no_number() -> None:
    assert parse_scalar("accuracy - latency", NAMES)(figures(accuracy=1.0), UNTOUCHED) is None
    assert parse_scalar("accuracy - latency", NAMES)(CANDIDATE, figures(latency=0.0)) is None
    assert parse_scalar("latency^-1", NAMES)(figures(latency=0.0), UNTOUCHED) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("accuracy latency", "a sum or a product"),
        ("accuracy - ", "a sum or a product"),
        ("0.3", "a sum or a product"),
        ("accuracy * (latency/5ms", "a sum or a product"),
        ("accuracy ^ latency", "a sum or a product"),
        ("accuracy - latancy", "Did you mean 'latency'?"),
        ("accuracy - energy", "name energy among the objectives"),
        ("accuracy - latency - latency", "more than once"),
        ("accuracy + 0.3 latency", "less latency is better, so its weight must be negative (write -0.3)"),
        ("accuracy * latency/5ms", "less latency is better, so its exponent must be negative (write -1)"),
        ("latency^-1 * accuracy^-2", "more accuracy is better, so its exponent must be positive (write +2)"),
        ("accuracy - 0 latency", "must be negative"),
        ("accuracy - latency/5kB", "unit 'kB' for latency: expected one of %, s, ms"),
        ("accuracy - latency/0ms", "above 0"),
    ],
)
def test_a_wrong_formula_is_refused_in_one_line(text: str, words: str) -> None:
    with pytest.raises(ac.InputError) as caught:
        parse_scalar(text, NAMES)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_command_line_refuses_a_wrong_formula_before_anything_runs(
    call_cli: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    code, _, err = call_cli("search", "--out", "run", "--scalarize", "accuracy + latency", "--executor", "inline")
    assert code == 2
    assert err.startswith("error: scalarize 'accuracy + latency': ")
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_search_for_one_number_records_all_objectives_and_names_its_best(
    call_cli: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    formula = "accuracy * (size/20%)^-0.1"
    code, out, err = call_cli(
        "search", "--sampler", "rl", "--scalarize", formula, "--objectives", "accuracy", "size", "--trials", 4,
        "--space", "quantize", "--executor", "inline", "--verify-time", 0, "--finetune-steps", 0, "--out", "run",
        "--target", "arm/pixel3",
    )  # fmt: skip
    assert code == 0, err
    assert f"best by {formula}: trial" in " ".join(out.split())
    study = Study.open(tmp_path / "run")
    assert [objective.name for objective in study.objectives] == ["accuracy", "size"]
    assert len(study.records()) == 4
    scalar = parse_scalar(formula, ["accuracy", "size"])
    points = study.front()
    untouched = next(point.metrics for point in points if point.baseline == "untouched")
    scores = {point.trial: scalar(point.metrics, untouched) for point in points}
    assert scores[study.best().trial] == max(score for score in scores.values() if score is not None)
    rows = list(csv.DictReader((tmp_path / "run" / "front.csv").open()))
    assert {int(row["trial"]): float(row["score"]) for row in rows} == pytest.approx(scores)
    code, out, _ = call_cli("front", "run", "--format", "json")
    assert {point["trial"]: point["score"] for point in json.loads(out)} == pytest.approx(scores)


def test_the_sampler_is_told_the_number_alone_also_of_trials_before_a_resume(
    search_space: Callable[[object], ac.Plan], tmp_path: Path
) -> None:
    from autocompress.core.registry import OBJECTIVES
    from autocompress.core.types import State
    from autocompress.search.engine import Engine
    from autocompress.search.executors import InlineExecutor
    from autocompress.studies.storage import Database, sqlite_url

    def evaluate(candidate: ac.Candidate) -> ac.Evaluation:
        cut = candidate.params["cut"]
        return ac.Evaluation(candidate, State.COMPLETE, figures(accuracy=1 - cut**2, size=1e6 * (1 - cut)))

    scalar = parse_scalar("accuracy - size/1MB", ["accuracy", "size"])  # (1 - cut^2) - (1 - cut): best at 0.5
    for trials in (15, 60):
        database = Database(sqlite_url(tmp_path), ["maximize", "minimize"], ["accuracy", "size"])
        sampler = make_sampler("tpe", seed=trials, trials=60, constrained=False)
        engine = Engine(
            space=search_space,
            study=Study(tmp_path, [OBJECTIVES.get("accuracy"), OBJECTIVES.get("size")], database, scalar=scalar),
            executor=InlineExecutor(evaluate),
            sampler=sampler,
            trials=trials,
            score=lambda metrics: scalar(metrics, {}),
        )
        engine.run()
    told = engine._memory.trials
    assert len(told) >= 60
    for trial in told:
        assert trial.value == pytest.approx(trial.params["cut"] - trial.params["cut"] ** 2)
    assert all(len(trial.values) == 2 for trial in database.trials())
    late = [trial.params["cut"] for trial in database.trials()[-20:]]
    assert sum(0.3 < cut < 0.7 for cut in late) > 12


@pytest.fixture
def search_space() -> Callable[[object], ac.Plan]:
    def space(trial: object) -> ac.Plan:
        return (ac.Prune(trial.suggest_float("cut", 0.01, 0.95)),)  # type: ignore[attr-defined]

    return space
