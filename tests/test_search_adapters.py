"""The space and the evaluator inside searches that others drive: any Optuna study, and Ray Tune."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest

import autocompress as ac
from autocompress import as_objective
from autocompress.search.adapters import TrialObjective
from autocompress.search.tune import tune_param_space
from autocompress.studies.study import Study

optuna.logging.set_verbosity(optuna.logging.ERROR)


class Widths:
    """Untouched, 8 bits, more than a limit allows, a failing operator and a failing space."""

    starts = ({"kind": "untouched"},)

    def __call__(self, trial: Any) -> ac.Plan:
        kind = trial.suggest_categorical("kind", ["untouched", "rounded", "missing", "broken"])
        if kind == "rounded":
            return (ac.Quantize(trial.suggest_categorical("bits", [8, 16])),)
        if kind == "broken":
            raise KeyError("no such layer")
        return (ac.Prune({"nowhere": 0.5}),) if kind == "missing" else ()


@pytest.fixture(scope="module")
def objective(digits_task: ac.Task, tmp_path_factory: pytest.TempPathFactory) -> TrialObjective:
    return as_objective(
        digits_task,
        space=Widths(),
        target="arm/pixel3",  # predicts its figures
        objectives=["accuracy", "size"],
        constraints=["size<=40%"],
        out=tmp_path_factory.mktemp("adapters") / "run",
        verify_time=0,
        finetune_steps=0,
    )


@pytest.fixture(scope="module")
def optimised(objective: TrialObjective) -> optuna.Study:
    """All kinds once, and one of them again."""
    study = optuna.create_study(directions=objective.directions, sampler=optuna.samplers.NSGAIISampler(seed=0))
    objective.enqueue(study)
    for params in (
        {"kind": "rounded", "bits": 8},
        {"kind": "missing"},
        {"kind": "broken"},
        {"kind": "rounded", "bits": 16},
    ):
        study.enqueue_trial(params)
    study.enqueue_trial({"kind": "rounded", "bits": 8})
    study.optimize(objective, n_trials=6)
    return study


def test_any_optuna_study_optimises_it(objective: TrialObjective, optimised: optuna.Study) -> None:
    assert objective.directions == ["maximize", "minimize"]
    untouched, int8, missing, broken, half, again = optimised.trials
    found = objective.untouched.measurements
    assert untouched.values == [found["accuracy"].value, found["size"].value]
    assert int8.values[1] < 0.4 * untouched.values[1]
    assert [trial.state.name for trial in (missing, broken, half)] == ["FAIL"] * 3
    assert half.user_attrs["state"] == "infeasible"
    assert half.user_attrs["reason"].startswith("size<=40%: size is at least"), "known before it was measured"
    assert "nowhere" in missing.user_attrs["reason"]
    assert broken.user_attrs["reason"].startswith("the space failed: KeyError")
    assert again.values == int8.values
    assert int8.user_attrs["metrics"]["latency"]["kind"] == "predicted"


def test_constraints_are_passed_on(objective: TrialObjective, optimised: optuna.Study) -> None:
    for trial, kept in ((optimised.trials[0], False), (optimised.trials[1], True)):
        assert list(trial.constraints) == ["size<=40%"]
        assert (trial.constraints["size<=40%"] <= 0) == kept
        assert list(objective.constraints_func(trial)) == list(trial.constraints.values())
    assert {trial.number for trial in optimised.best_trials} <= {1, 5}


def test_what_was_found_is_in_a_run_folder(objective: TrialObjective, optimised: optuna.Study, tmp_path: Path) -> None:
    study = objective.finish()
    records = Study.open(study.folder).records()
    assert [str(record.state) for record in records] == ["infeasible", "complete", "failed", "infeasible"]
    assert records[0].baseline == "untouched"
    assert records[1].params == {"kind": "rounded", "bits": 8}
    assert (study.folder / "front.csv").is_file()
    assert (study.best().export(tmp_path / "bundle") / "bundle.json").is_file()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"trials": 3, "sampler": "tpe"}, "sampler, trials can't be set here"),
        ({"objectives": ["sise"]}, "Did you mean 'size'"),
        ({"constraints": ["size<30%"]}, "NAME<=VALUE"),
        ({"scalarize": "accuracy + size"}, "less size is better"),
        ({"space": "prun"}, "Did you mean 'prune'"),
        ({"colour": "red"}, "unknown key 'colour'"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], words: str, digits_task: ac.Task, tmp_path: Path) -> None:
    with pytest.raises(ac.InputError) as caught:
        as_objective(digits_task, out=tmp_path / "run", **{"objectives": ["accuracy", "size"], **settings})
    assert words in str(caught.value)


def test_a_folder_that_holds_a_run_is_refused(objective: TrialObjective, digits_task: ac.Task) -> None:
    with pytest.raises(ac.InputError, match="holds a run already"):
        as_objective(digits_task, out=objective.study.folder)


def test_other_searchers_get_every_parameter_of_a_conditional_space() -> None:
    pytest.importorskip("ray.tune")
    space = tune_param_space(Widths())
    assert sorted(space) == ["bits", "kind"]
    assert sorted(space["bits"].categories) == [8, 16]


def test_what_tune_stores_and_sends_to_workers_can_be_stored_and_sent(
    objective: TrialObjective, tmp_path: Path
) -> None:
    pytest.importorskip("ray.tune")
    from ray import cloudpickle

    from autocompress.search.tune import tune_search, tune_trainable

    search = cloudpickle.loads(cloudpickle.dumps(tune_search(objective, "local", trials=3)))
    assert search.metric == ["accuracy", "size"]
    assert search.suggest("one") == {"kind": "untouched"}
    search.on_trial_complete("one", {"accuracy": 0.9, "size": 5.0, "violation/size<=40%": 1.5})
    search.save(str(tmp_path / "search"))
    again = tune_search(objective, "local", trials=3)
    again.restore(str(tmp_path / "search"))
    (trial,) = again._ot_study.trials
    assert (trial.values, trial.constraints) == ([0.9, 5.0], {"size<=40%": 1.5})
    assert callable(cloudpickle.loads(cloudpickle.dumps(tune_trainable(objective))))


def test_numbers_keep_their_ranges_in_tune() -> None:
    pytest.importorskip("ray.tune")

    def numbers(trial: Any) -> ac.Plan:
        trial.suggest_float("rate", 1e-4, 1.0, log=True)
        trial.suggest_float("cut", 0.1, 0.7, step=0.3)
        trial.suggest_int("count", 2, 5)
        trial.suggest_int("odd", 1, 7, step=2)
        return ()

    space = tune_param_space(numbers)
    assert space["cut"].categories == pytest.approx([0.1, 0.4, 0.7])
    assert space["odd"].categories == [1, 3, 5, 7]
    assert {space["count"].sample() for _ in range(100)} == {2, 3, 4, 5}
    assert 1e-4 <= space["rate"].sample() <= 1.0


@pytest.mark.slow
@pytest.mark.parametrize("scalarize", ["", "accuracy * size^-0.1"], ids=["front", "one number"])
def test_ray_tune_searches_the_conditional_space(
    scalarize: str, digits_task: ac.Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune = pytest.importorskip("ray.tune")
    import ray

    from autocompress.search.tune import record_results, tune_search, tune_trainable

    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    objective = as_objective(
        "digits-cnn", "digits", "quantize", target="arm/pixel3", objectives=["accuracy", "size"],
        constraints=["size<=40%"], scalarize=scalarize, out=tmp_path / "run", verify_time=0,
    )  # fmt: skip
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.2")
    try:
        tuner = tune.Tuner(
            tune_trainable(objective),
            tune_config=tune.TuneConfig(
                search_alg=tune_search(objective, trials=4), num_samples=4, max_concurrent_trials=1
            ),
            run_config=tune.RunConfig(storage_path=str(tmp_path / "tune"), verbose=0),
        )
        results = tuner.fit()
    finally:
        ray.shutdown()
    assert len(results) == 4
    assert all("size<=40%: size is at least" in str(error) for error in results.errors), (
        "too large before it is measured"
    )
    first = results[0].metrics
    assert first["size"] == pytest.approx(objective.untouched.measurements["size"].value)
    assert first["violation/size<=40%"] == pytest.approx(1.5)
    assert ("score" in first) == bool(scalarize)
    record_results(objective, results)
    study = objective.finish()
    assert 1 < len(study.records()) <= 5
    assert study.best(size="<=40%").metrics["size"].value < first["size"] / 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1], ids=["optuna", "tune"])
def test_the_snippets_of_the_guide_run_as_they_stand(number: int, tmp_path: Path) -> None:
    pytest.importorskip("ray.tune")
    guide = (Path(__file__).parents[1] / "docs" / "platforms.md").read_text()
    code = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)[number]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert len(Study.open(run).records()) > 1
