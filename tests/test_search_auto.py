"""The default sampler: its parts against references, and what it does in studies of Optuna."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import moocore
import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, DotProduct, Matern, WhiteKernel

import autocompress as ac
from autocompress.search.belief import Prior
from autocompress.search.encoding import Activity, Column, Encoding
from autocompress.search.improvement import expected_improvement, free_boxes, nondominated_rows
from autocompress.search.surrogate import GaussianProcess, Hyperparameters, fit

optuna.logging.set_verbosity(optuna.logging.ERROR)
ROOT = Path(__file__).parents[1]
TABLE = ROOT.parent / "shared/data/nasbench201_hardware.parquet"


def study_of(sampler: ac.AutoSampler, objectives: int = 2, storage: str | None = None) -> optuna.Study:
    return optuna.create_study(directions=["minimize"] * objectives, sampler=sampler, storage=storage)


def layers(trial: Any) -> tuple[float, float]:
    """A small joint space: conditional, continuous, ordinal and categorical parameters."""
    error, cost = 0.0, 1.0
    for k in range(4):
        kind = trial.suggest_categorical(f"kind{k}", ["none", "prune", "rank"])
        if kind == "prune":
            ratio = trial.suggest_float(f"ratio{k}", 0.05, 0.9)
            error, cost = error + 0.02 * (k + 1) * ratio**2, cost * (1 - 0.4 * ratio)
        elif kind == "rank":
            rank = trial.suggest_int(f"rank{k}", 1, 16, log=True)
            error, cost = error + 0.03 / rank, cost * (0.6 + 0.4 * rank / 16)
        bits = trial.suggest_categorical(f"bits{k}", [2, 4, 8, 16])
        error, cost = error + 0.1 * 2.0**-bits * (k + 1), cost * (0.8 + 0.2 * bits / 16)
    return error, cost


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_the_free_boxes_fill_exactly_what_a_front_does_not_dominate(objectives: int) -> None:
    points = np.random.default_rng(objectives).random((15, objectives))
    lower, upper = free_boxes(nondominated_rows(points), np.ones(objectives))
    volume = np.prod(upper - np.maximum(lower, 0.0), axis=1).sum()
    assert volume == pytest.approx(1.0 - moocore.hypervolume(points, ref=np.ones(objectives)), rel=1e-12)


@pytest.mark.parametrize("logarithmic", [(False, False), (True, False), (False, True, False)])
def test_the_expected_improvement_is_that_of_sampled_outcomes(logarithmic: tuple[bool, ...]) -> None:
    rng = np.random.default_rng(0)
    objectives = len(logarithmic)
    front, reference = 0.3 + rng.random((6, objectives)), np.full(objectives, 1.5)
    mean, deviation = rng.random((3, objectives)) - 0.3 * np.array(logarithmic), np.full((3, objectives), 0.3)
    boxes = free_boxes(nondominated_rows(front), reference)
    found = expected_improvement(mean, deviation, logarithmic, *boxes)
    before = moocore.hypervolume(front, ref=reference)
    for point in range(3):
        outcomes = rng.normal(mean[point], deviation[point], size=(20_000, objectives))
        outcomes = np.where(logarithmic, np.exp(outcomes), outcomes)
        added = [moocore.hypervolume(np.vstack([front, row]), ref=reference) - before for row in outcomes]
        assert found[point] == pytest.approx(np.mean(added), abs=4 * np.std(added) / np.sqrt(len(added)))


def test_a_known_value_improves_by_exactly_what_it_adds() -> None:
    front, reference = np.array([[0.2, 0.8], [0.6, 0.3]]), np.ones(2)
    boxes = free_boxes(front, reference)
    point = np.array([[0.4, 0.5]])
    added = moocore.hypervolume(np.vstack([front, point]), ref=reference) - moocore.hypervolume(front, ref=reference)
    assert expected_improvement(point, np.zeros((1, 2)), (False, False), *boxes)[0] == pytest.approx(added, rel=1e-6)


def test_the_gaussian_process_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    points, values, others = rng.normal(size=(30, 3)), rng.normal(size=30), rng.normal(size=(7, 3))
    weights = np.array([0.5, 2.0, 0.1])
    ours = GaussianProcess(points, np.arange(3), values, Hyperparameters(weights, 1.5, 0.6, 0.1))
    kernel = (
        ConstantKernel(1.5) * Matern(1 / np.sqrt(weights), nu=2.5)
        + ConstantKernel(0.2) * DotProduct(0.0, "fixed")
        + WhiteKernel(0.1)
    )
    theirs = GaussianProcessRegressor(kernel, optimizer=None, alpha=1e-6).fit(points, values)
    mean, deviation = theirs.predict(others, return_std=True)
    found_mean, found_deviation = ours.predict(others)
    np.testing.assert_allclose(found_mean, mean, rtol=1e-5)
    np.testing.assert_allclose(ours.mean(others), mean, rtol=1e-5)
    np.testing.assert_allclose(found_deviation**2, deviation**2 - 0.1, rtol=1e-4)


def test_fitting_finds_the_parameters_that_matter() -> None:
    rng = np.random.default_rng(2)
    points = rng.random((120, 4)) - 0.5
    values = np.sin(9 * points[:, 1])
    found = fit(points, np.arange(4), values / values.std(), Hyperparameters.usual(4))
    assert found.weights[1] > 20 * max(found.weights[[0, 2, 3]])
    assert found.noise < 0.01


@pytest.mark.parametrize(
    ("distribution", "values"),
    [
        (CategoricalDistribution(["a", "b", None]), ["a", "b", None]),
        (CategoricalDistribution([2, 4, 8]), [2, 4, 8]),
        (IntDistribution(2, 64, log=True), [2, 17, 64]),
        (IntDistribution(0, 12, step=4), [0, 4, 12]),
        (FloatDistribution(0.0, 1.0, step=0.125), [0.0, 0.375, 1.0]),
        (FloatDistribution(1e-4, 1.0, log=True), [1e-4, 0.03, 1.0]),
    ],
)
def test_values_survive_the_encoding_and_stay_valid_when_varied(distribution: Any, values: list[Any]) -> None:
    rng = np.random.default_rng(0)
    column = Column.of("x", distribution)
    assert [column.decode(column.encode(value)) for value in values] == pytest.approx(values)
    drawn = column.draw(50, rng)
    for numbers in (drawn, column.vary(drawn, rng)):
        assert all(distribution._contains(distribution.to_internal_repr(column.decode(x))) for x in numbers)
    if column.levels:
        assert all(column.decode(a) != column.decode(b) for a, b in zip(drawn, column.vary(drawn, rng), strict=True))


def test_which_parameters_are_active_is_learned_from_examples() -> None:
    study = optuna.create_study(directions=["minimize"] * 2, sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(layers, n_trials=60)
    encoding = Encoding()
    for trial in study.trials:
        encoding.learn(trial.distributions)
    activity = Activity(np.array([encoding.row(trial.params) for trial in study.trials]))
    for row in activity.apply(encoding.draw(200, np.random.default_rng(0))):
        params = encoding.params(row)
        fixed = optuna.trial.FixedTrial(params)
        layers(fixed)  # fails where an active parameter is missing
        assert set(fixed.params) == set(params)


def test_a_finite_space_is_searched_to_its_end_without_a_repeat() -> None:
    study = study_of(ac.AutoSampler(0))

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        a, b = trial.suggest_categorical("a", "xyz"), trial.suggest_int("b", 0, 4)
        return ord(a) * b, abs(b - 2) + (trial.suggest_float("c", 0, 1, step=0.5) if a == "x" else 0)

    study.optimize(objective, n_trials=25)
    assert len({tuple(sorted(trial.params.items())) for trial in study.trials}) == 25


def test_running_trials_are_respected() -> None:
    study = study_of(ac.AutoSampler(0, start=8))
    study.optimize(layers, n_trials=12)
    running = [study.ask() for _ in range(16)]
    for trial in running:
        layers(trial)
    assert len({tuple(sorted(trial.params.items())) for trial in running}) == 16
    # Not all of them are variations of one candidate.
    kinds = {tuple(trial.params[f"kind{k}"] for k in range(4)) for trial in running}
    assert len(kinds) > 4


@pytest.mark.parametrize("storage", [None, "sqlite"])
def test_the_same_seed_makes_the_same_study(storage: str | None, tmp_path: Path) -> None:
    studies = []
    for number in range(2):
        url = f"sqlite:///{tmp_path}/{number}.db" if storage else None
        studies.append(study_of(ac.AutoSampler(3, start=6, space=layers), storage=url))
        studies[-1].optimize(layers, n_trials=12)
    assert [t.params for t in studies[0].trials] == [t.params for t in studies[1].trials]


@pytest.mark.parametrize("how", ["optuna", "attribute"])
def test_constraints_and_failures_are_avoided(how: str) -> None:
    def objective(trial: optuna.Trial) -> tuple[float, float]:
        error, cost = layers(trial)
        if trial.params["kind1"] == "rank":
            raise ValueError("this one can't be built")
        if how == "optuna":
            trial.set_constraint("cost", cost - 0.6)
        else:
            trial.set_user_attr("violations", [cost - 0.6, None])
        return error, cost

    study = study_of(ac.AutoSampler(0, start=12, space=layers))
    study.optimize(objective, n_trials=48, catch=ValueError)
    first, later = study.trials[:12], study.trials[24:]
    assert sum(t.state is TrialState.FAIL for t in later) < 0.5 * 24 * np.mean(
        [t.state is TrialState.FAIL for t in first]
    )
    good = [t.values[1] <= 0.6 for t in later if t.values]
    assert np.mean(good) > 0.7


def test_a_constraint_that_nothing_meets_yet_is_worked_towards() -> None:
    def objective(trial: optuna.Trial) -> tuple[float, float]:
        error, cost = layers(trial)
        trial.set_user_attr("violations", [cost - 0.16])  # about 1 in 200 random ones
        return error, cost

    study = study_of(ac.AutoSampler(0, start=10, space=layers))
    study.optimize(objective, n_trials=40)
    assert any(t.values[1] <= 0.16 for t in study.trials)


def test_a_known_objective_is_asked_and_not_modelled() -> None:
    asked: list[int] = []

    def cost(params: Any) -> list[float]:
        asked.append(len(params))
        return [layers(optuna.trial.FixedTrial(dict(choices)))[1] for choices in params]

    study = study_of(ac.AutoSampler(0, start=6, space=layers, known={1: cost}))
    study.optimize(layers, n_trials=12)
    assert max(asked) > 100
    assert study.trials[-1].values[1] == layers(optuna.trial.FixedTrial(study.trials[-1].params))[1]


def test_results_at_low_fidelity_are_told_apart() -> None:
    """At a tenth of the training everything with few bits looks bad; at full training it isn't."""

    def objective(trial: optuna.Trial, fidelity: float) -> tuple[float, float]:
        bits = trial.suggest_int("bits", 1, 32)
        trial.set_user_attr("fidelity", fidelity)
        return (1 / bits if fidelity < 1 else 0.01 * bits), 1.0 + trial.suggest_float("x", 0, 1)

    study = study_of(ac.AutoSampler(0, start=20))
    for number in range(40):
        trial = study.ask()
        study.tell(trial, objective(trial, 0.1 if number % 2 else 1.0))
    proposals = [study.ask() for _ in range(6)]
    for trial in proposals:
        objective(trial, 1.0)
    assert np.median([trial.params["bits"] for trial in proposals]) < 10


def test_an_earlier_study_saves_trials() -> None:
    """The same space on a slower device, with another level of accuracy."""
    earlier = study_of(ac.AutoSampler(1, space=layers))
    earlier.optimize(layers, n_trials=40)
    prior = Prior([t.params for t in earlier.trials], np.array([t.values for t in earlier.trials]))

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        error, cost = layers(trial)
        return 1.7 * error + 0.1, 30 * cost**0.9

    def volume(sampler: ac.AutoSampler) -> float:
        study = study_of(sampler)
        study.optimize(objective, n_trials=14)
        return float(moocore.hypervolume(np.array([t.values for t in study.trials]), ref=[0.6, 30.0]))

    cold = np.mean([volume(ac.AutoSampler(seed, space=layers, start=8)) for seed in range(2)])
    warm = np.mean([volume(ac.AutoSampler(seed, space=layers, start=8, prior=[prior])) for seed in range(2)])
    assert warm > 1.02 * cold


def test_beyond_the_models_variations_of_the_front_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autocompress.search.auto.LARGE", 30)
    study = study_of(ac.AutoSampler(0, start=10))
    study.optimize(layers, n_trials=45)
    keys = {tuple(sorted(t.params.items())) for t in study.trials}
    assert len(keys) == 45


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks/samplers.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(not TABLE.exists(), reason=f"needs the latency table {TABLE}")
def test_the_benchmark_finds_most_of_a_front_in_a_hundred_trials(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    task = ["--table", str(TABLE), "--accuracy", "acc_cifar100-val", "--latency", "lat_ms_silver_4210r"]
    done = benchmark(*task, "--trials", "100", "--seeds", "2", "--json", str(out))
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())
    assert {"sampler", "accuracy", "latency", "seed", "evaluations", "hypervolume"} <= set(rows[0])
    assert [row["evaluations"] for row in rows] == [50, 100, 50, 100]
    assert np.mean([row["hypervolume"] for row in rows if row["evaluations"] == 100]) > 0.945
    assert all(row["repeats"] == 0 for row in rows)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"--table": "nowhere.csv"}, "--table: there is no file 'nowhere.csv'"),
        ({"--latency": "lat_ms_toaster"}, "--latency: the table has no column 'lat_ms_toaster'"),
    ],
)
def test_the_benchmark_refuses_wrong_input_in_one_line(change: dict[str, str], line: str, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    edges = "|nor_conv_3x3~0|+|none~0|none~1|+|skip_connect~0|none~1|none~2|"
    table.write_text(f"arch,acc,lat_ms_phone\n{edges},90.0,3.0\n")
    options = {"--table": str(table), "--accuracy": "acc", "--latency": "lat_ms_phone"} | change
    done = benchmark(*(part for pair in options.items() for part in pair))
    assert done.returncode == 2
    assert line in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
