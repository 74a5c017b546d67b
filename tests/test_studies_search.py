"""The search loop, its samplers and its database, with a quick synthetic evaluation; then through `run_search`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from torch import nn

import autocompress as ac
from autocompress.core.codec import (
    check_plan,
    decode_measurements,
    decode_plan,
    describe_plan,
    encode_measurements,
    encode_plan,
    plan_key,
)
from autocompress.core.registry import OBJECTIVES, operator
from autocompress.core.types import Method, Provenance, State
from autocompress.search.engine import Engine, Progress
from autocompress.search.executors import InlineExecutor
from autocompress.search.samplers import SAMPLERS, make_sampler
from autocompress.studies.storage import Database, sqlite_url
from autocompress.studies.study import Study

HERE = Provenance(Method.SIMULATED, "test", "test", "2026-01-01T00:00:00+00:00")
NAMES = ("loss", "size")


@operator
@dataclass(frozen=True)
class Toy:
    """Changes nothing; carries the values that were chosen."""

    x: float = 0.0
    n: int = 0
    kind: str = "a"

    rank = 20
    retrains = False

    def __call__(self, model: nn.Module, task: ac.Task) -> nn.Module:
        return model


def mixed_space(trial: Any) -> ac.Plan:
    """Parameters of all types; one of them only for one kind."""
    kind = trial.suggest_categorical("kind", ["a", "b", "c"])
    x = trial.suggest_float("x", 0.0, 1.0)
    n = trial.suggest_int("n", 1, 9, step=2) if kind == "b" else 0
    return (Toy(x, n, kind),)


def figures(loss: float, size: float) -> dict[str, ac.Measurement]:
    return {
        "loss": ac.Measurement("loss", loss, "", None, 1, HERE),
        "size": ac.Measurement("size", size, "B", None, 1, HERE),
    }


def evaluate(candidate: ac.Candidate) -> ac.Evaluation:
    """Loss falls and size grows with x."""
    x, n = candidate.params["x"], candidate.params.get("n", 0)
    return ac.Evaluation(candidate, State.COMPLETE, figures((1 - x) ** 2 + 0.1, 100 + 900 * x + n))


@dataclass
class Search:
    """A finished engine run with what it left."""

    progress: Progress
    database: Database
    shown: list[ac.Evaluation] = field(default_factory=list)

    @property
    def trials(self) -> list[optuna.trial.FrozenTrial]:
        return self.database.trials()

    def told(self, name: str) -> list[Any]:
        """One user attribute of every trial."""
        return [trial.user_attrs[name] for trial in self.trials]

    @property
    def keys(self) -> list[str]:
        return [entry["key"] for entry in self.told("evaluation")]


@pytest.fixture
def search(tmp_path: Path) -> Callable[..., Search]:
    """Run an engine inline in a folder of its own."""

    def run(
        *,
        trials: int = 10,
        space: Callable[[Any], Any] = mixed_space,
        evaluation: Callable[[ac.Candidate], ac.Evaluation] = evaluate,
        sampler: str = "random",
        seed: int = 0,
        timeout: float | None = None,
        name: str = "run",
        **settings: Any,
    ) -> Search:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        shown: list[ac.Evaluation] = []
        database = Database(sqlite_url(folder), ["minimize", "minimize"], NAMES)
        engine = Engine(
            space=space,
            study=Study(folder, [OBJECTIVES.get(objective) for objective in NAMES], database),
            executor=InlineExecutor(evaluation, timeout),
            sampler=make_sampler(sampler, seed=seed, trials=trials, constrained=False),
            trials=trials,
            on_change=lambda progress, finished: shown.append(finished) if finished else None,
            **settings,
        )
        return Search(engine.run(), database, shown)

    return run


RunSearch = Callable[..., Search]


@pytest.mark.parametrize("sampler", sorted(set(SAMPLERS) - {"grid", "rl"}))  # which have tests of their own
def test_every_sampler_keeps_the_budget_exactly(search: RunSearch, sampler: str) -> None:
    found = search(trials=10, sampler=sampler)
    assert len(found.trials) == found.progress.trials == 10
    assert found.progress.ended == "done"
    assert len(set(found.keys)) == 10
    assert set(found.told("state")) == {"complete"}


@pytest.mark.parametrize("sampler", sorted(set(SAMPLERS) - {"grid", "rl"}))  # which have tests of their own
def test_the_same_seed_gives_the_same_study(search: RunSearch, sampler: str) -> None:
    first, second = (search(trials=7, sampler=sampler, seed=4, name=name) for name in ("one", "two"))
    other = search(trials=7, sampler=sampler, seed=5, name="three")
    assert [trial.params for trial in first.trials] == [trial.params for trial in second.trials]
    assert first.keys == second.keys
    assert first.keys != other.keys


def test_a_small_space_ends_when_every_candidate_is_known(search: RunSearch) -> None:
    evaluated = []

    def six(trial: Any) -> ac.Plan:
        return (Toy(trial.suggest_categorical("x", [0.25, 0.5, 1.0]), kind=trial.suggest_categorical("k", ["a", "b"])),)

    def count(candidate: ac.Candidate) -> ac.Evaluation:
        evaluated.append(candidate.key)
        return evaluate(candidate)

    found = search(trials=50, space=six, evaluation=count)
    assert found.progress.ended == "space exhausted"
    assert len(found.trials) == found.progress.trials == len(evaluated) == len(set(evaluated)) == 6
    assert found.progress.repeats > 0


def test_a_continued_study_answers_what_it_knows(search: RunSearch) -> None:
    def six(trial: Any) -> ac.Plan:
        return (Toy(trial.suggest_categorical("x", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6])),)

    before = [trial.user_attrs for trial in search(trials=4, space=six).trials]
    after = search(trials=6, space=six, seed=1)
    assert len(set(after.keys)) == 6
    assert [trial.user_attrs for trial in after.trials][:4] == before
    assert len(after.shown) == 2


def test_start_points_come_first_and_baselines_are_marked(search: RunSearch) -> None:
    class Space:
        starts = ({"kind": "b", "x": 0.5, "n": 3},)

        def __call__(self, trial: Any) -> ac.Plan:
            return mixed_space(trial)

    def alike(candidate: ac.Candidate) -> ac.Evaluation:
        return ac.Evaluation(candidate, State.COMPLETE, figures(1.0, 100.0))

    baselines = {"untouched": (), "middle": (Toy(0.5, 3, "b"),)}
    found = search(trials=5, space=Space(), evaluation=alike, baselines=baselines)
    assert found.trials[0].params == {}
    assert found.trials[1].params == {"kind": "b", "x": 0.5, "n": 3}
    assert [entry["baseline"] for entry in found.told("evaluation")] == ["untouched", "middle", "", "", ""]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_objective_that_is_not_finite_is_a_recorded_failure(search: RunSearch, bad: float) -> None:
    def sometimes(candidate: ac.Candidate) -> ac.Evaluation:
        found = figures(bad if candidate.params["x"] > 0.5 else 0.3, 100.0)
        return ac.Evaluation(candidate, State.COMPLETE, found)

    found = search(trials=10, evaluation=sometimes)
    failed = [trial for trial in found.trials if trial.params["x"] > 0.5]
    assert 0 < len(failed) < 10
    assert found.progress.failures == len(failed)
    for trial in found.trials:
        beyond = trial.params["x"] > 0.5
        assert trial.state.name == ("FAIL" if beyond else "COMPLETE")
        assert trial.user_attrs["state"] == ("failed" if beyond else "complete")
        assert ("loss is" in trial.user_attrs["reason"]) == beyond


def test_an_objective_that_is_missing_is_a_recorded_failure_for_those_who_watch_too(search: RunSearch) -> None:
    def half(candidate: ac.Candidate) -> ac.Evaluation:
        return ac.Evaluation(candidate, State.COMPLETE, {"size": figures(0, 5.0)["size"]})

    found = search(trials=3, evaluation=half)
    assert found.told("state") == ["failed"] * 3
    assert all("loss was not measured" in reason for reason in found.told("reason"))
    assert [evaluation.state for evaluation in found.shown] == [State.FAILED] * 3


def test_an_evaluation_that_raises_is_a_recorded_failure_with_its_reason(search: RunSearch) -> None:
    def fragile(candidate: ac.Candidate) -> ac.Evaluation:
        if candidate.params["kind"] == "a":
            raise ZeroDivisionError("no channels left\nsecond line")
        return evaluate(candidate)

    found = search(trials=12, evaluation=fragile)
    states = {trial.params["kind"]: trial.user_attrs["state"] for trial in found.trials}
    assert states == {"a": "failed", "b": "complete", "c": "complete"}
    reasons = {trial.user_attrs["reason"] for trial in found.trials if trial.params["kind"] == "a"}
    assert reasons == {"ZeroDivisionError: no channels left"}
    assert len(found.trials) == 12


def test_a_space_that_sometimes_raises_costs_only_those_trials(search: RunSearch) -> None:
    def fragile(trial: Any) -> ac.Plan:
        x = trial.suggest_float("x", 0, 1)
        if x < 0.4:
            raise KeyError("no such layer")
        return (Toy(x),)

    found = search(trials=10, space=fragile)
    assert len(found.trials) == 10
    for trial in found.trials:
        assert (trial.user_attrs["state"] == "failed") == (trial.params["x"] < 0.4)
        if trial.params["x"] < 0.4:
            assert "the space failed" in trial.user_attrs["reason"]
            assert "no such layer" in trial.user_attrs["reason"]


def test_an_inline_candidate_that_takes_too_long_is_a_recorded_failure(search: RunSearch) -> None:
    def slow(candidate: ac.Candidate) -> ac.Evaluation:
        if candidate.params["x"] > 0.5:
            time.sleep(30)
        return evaluate(candidate)

    found = search(trials=6, evaluation=slow, timeout=0.3)
    for trial in found.trials:
        hung = trial.params["x"] > 0.5
        assert trial.user_attrs["state"] == ("failed" if hung else "complete")
        assert ("longer than 0.3 s" in trial.user_attrs["reason"]) == hung
    assert 0 < found.progress.failures < 6


def test_ctrl_c_keeps_everything_that_was_finished(search: RunSearch) -> None:
    evaluated: list[str] = []

    def interrupted(candidate: ac.Candidate) -> ac.Evaluation:
        if len(evaluated) == 4:
            raise KeyboardInterrupt
        evaluated.append(candidate.key)
        return evaluate(candidate)

    found = search(trials=10, evaluation=interrupted)
    assert found.progress.ended == "interrupted"
    assert found.keys == evaluated
    assert {trial.state.name for trial in found.trials} == {"COMPLETE"}
    assert len(search(trials=10, seed=1).trials) == 10


def test_the_time_budget_ends_a_search(search: RunSearch) -> None:
    found = search(trials=1000, seconds=0.5)
    assert found.progress.ended == "time is up"
    assert 0 < len(found.trials) < 1000


def test_infeasible_candidates_are_recorded_with_their_violations(search: RunSearch) -> None:
    def limited(candidate: ac.Candidate) -> ac.Evaluation:
        over = candidate.params["x"] - 0.5
        state = State.INFEASIBLE if over > 0 else State.COMPLETE
        reason = "size<=550" if over > 0 else ""
        return ac.Evaluation(candidate, state, figures(1.0, 100.0), reason, (over,))

    found = search(trials=10, evaluation=limited)
    infeasible = [trial for trial in found.trials if trial.user_attrs["state"] == "infeasible"]
    assert len(infeasible) == found.progress.infeasible > 0
    for trial in found.trials:
        assert trial.system_attrs["constraints"] == [trial.params["x"] - 0.5]


def test_an_unknown_sampler_is_refused() -> None:
    with pytest.raises(ac.InputError, match="Did you mean 'nsga2'"):
        make_sampler("nsgaII2", seed=0, trials=10, constrained=False)


def test_the_database_gives_back_what_was_written_through_optunas_own_interface(tmp_path: Path) -> None:
    url = sqlite_url(tmp_path)
    database = Database(url, ["maximize", "minimize"], ["accuracy", "size"], study="mine")
    distributions: dict[str, BaseDistribution] = {
        "x": FloatDistribution(0, 1, step=0.125),
        "lr": FloatDistribution(1e-4, 1, log=True),
        "n": IntDistribution(2, 64, log=True),
        "bits": CategoricalDistribution([8, 16, "float", None, True]),
    }
    params = {"x": 0.375, "lr": 0.03, "n": 17, "bits": "float"}
    attrs = {"summary": "prune 38 %", "nested": {"list": [1, 2.5, None], "µ": "ü"}}
    for values in ([0.9876543210123456, 123.0], None):
        database.add(
            state=optuna.trial.TrialState.FAIL if values is None else optuna.trial.TrialState.COMPLETE,
            values=values,
            params=params,
            distributions=distributions,
            user_attrs=attrs,
            system_attrs={"constraints": [-0.5]},
            seconds=2.0,
        )
    study = optuna.load_study(study_name="mine", storage=url)
    assert study.metric_names == ["accuracy", "size"]
    assert [trial.number for trial in study.trials] == [0, 1]
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL"]
    assert study.trials[0].values == [0.9876543210123456, 123.0]
    assert study.trials[1].values is None
    for trial in study.trials:
        assert trial.params == params
        assert trial.distributions == distributions
        assert trial.user_attrs == attrs
        assert trial.duration is not None
        assert trial.duration.total_seconds() == pytest.approx(2.0)
    assert [trial.number for trial in study.best_trials] == [0]


def test_a_database_without_the_study_is_refused(tmp_path: Path) -> None:
    Database(sqlite_url(tmp_path), ["minimize"], ["size"], study="mine")
    with pytest.raises(ac.InputError, match="no study called 'yours'"):
        Database(sqlite_url(tmp_path), study="yours")


def test_a_study_that_others_wrote_is_not_continued(search: RunSearch, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    foreign = optuna.create_study(
        study_name="autocompress", storage=sqlite_url(tmp_path / "run"), directions=["minimize", "minimize"]
    )
    foreign.optimize(lambda trial: (trial.suggest_float("x", 0, 1), 1.0), n_trials=1)
    with pytest.raises(ac.InputError, match="did not write"):
        search(trials=3)


PLANS: list[ac.Plan] = [
    (),
    (ac.Prune(0.5),),
    (ac.Prune({"conv1": 0.25, "conv2": 0.5}, round_to=4, importance="l1"), ac.Finetune(7, lr=0.1, seed=3)),
    (ac.Quantize({"fc": 4, "conv1": 8}, "percentile", outputs="all"),),
]


@pytest.mark.parametrize("plan", PLANS, ids=describe_plan)
def test_a_plan_comes_back_from_its_text(plan: ac.Plan) -> None:
    import json

    text = json.dumps(encode_plan(plan))
    assert decode_plan(json.loads(text)) == plan
    assert plan_key(decode_plan(json.loads(text))) == plan_key(plan)


def test_a_plans_key_follows_every_setting_and_no_order_of_names() -> None:
    assert len({plan_key(plan) for plan in PLANS}) == len(PLANS)
    assert plan_key((ac.Finetune(7, seed=1),)) != plan_key((ac.Finetune(7, seed=2),))
    assert plan_key((ac.Prune({"a": 0.5, "b": 0.25}),)) == plan_key((ac.Prune({"b": 0.25, "a": 0.5}),))


def test_an_unknown_operator_or_field_in_a_stored_plan_is_refused() -> None:
    with pytest.raises(ac.InputError, match="Did you mean 'Prune'"):
        decode_plan([{"op": "Prun", "ratio": 0.5}])
    with pytest.raises(ac.InputError, match="share"):
        decode_plan([{"op": "Prune", "share": 0.5}])


def test_an_operator_that_can_not_be_read_back_is_refused() -> None:
    @dataclass(frozen=True)
    class Unknown:
        rank = 20
        retrains = False

        def __call__(self, model: nn.Module, task: ac.Task) -> nn.Module:
            return model

    with pytest.raises(ac.InputError, match="Unknown is not registered"):
        check_plan((Unknown(),))


def test_measurements_come_back_from_their_text() -> None:
    import json

    found = {
        "latency": ac.Measurement("latency", 1.25e-3, "s", (1.2e-3, 1.3e-3), 100, HERE),
        "size": ac.Measurement("size", 1000.0, "B", None, 1, HERE),
    }
    assert decode_measurements(json.loads(json.dumps(encode_measurements(found)))) == found


class Plain(nn.Module):
    """An untrained model of the user's own, for digits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 32, 3, padding=1)
        self.wide = nn.Conv2d(32, 64, 3, padding=1)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.wide(torch.relu(self.conv(x)))).mean((2, 3)))


def halves(trial: Any) -> ac.Plan:
    """A search space as its user writes it: ask, and return a plan."""
    plan: list[Any] = []
    if trial.suggest_categorical("prune", [True, False]):
        plan.append(ac.Prune({"wide": trial.suggest_float("ratio", 0.25, 0.5, step=0.25)}, round_to=4))
    if trial.suggest_categorical("int8", [True, False]):
        plan.append(ac.Quantize(8, outputs="all"))
    return tuple(plan)


@pytest.fixture(scope="module")
def own_study(tmp_path_factory: pytest.TempPathFactory) -> ac.Study:
    """A user's module, data object and space, searched through the Python interface."""
    torch.manual_seed(0)
    return ac.run_search(
        Plain(),
        ac.load_data("digits"),
        halves,
        target="x86/onnxruntime",
        trials=5,
        out=tmp_path_factory.mktemp("own") / "run",
        executor="inline",
        finetune_steps=2,
        verify_time=0,
        threads=1,
    )


def test_a_module_data_and_space_of_ones_own_can_be_searched(own_study: ac.Study) -> None:
    records = own_study.records()
    assert len(records) == 5
    assert {record.state for record in records} == {State.COMPLETE}, [record.reason for record in records]
    assert {record.baseline for record in records} >= {"untouched", "uniform int8", "uniform pruning"}
    proposed = [record for record in records if not record.baseline]
    assert proposed
    assert all(record.params for record in proposed)
    assert all(point.split == "test" for point in own_study.front())


def test_the_users_module_is_left_as_it_was() -> None:
    torch.manual_seed(1)
    model = Plain().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ac.InputError):
        ac.run_search(model, "digits", halves, target="nowhere")
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_best_respects_its_limits(own_study: ac.Study) -> None:
    untouched = next(point for point in own_study.front() if point.baseline == "untouched")
    best = own_study.best(size="<=50%")
    limit = 0.5 * untouched.metrics["size"].value
    assert best.metrics["size"].value <= limit
    within = [p for p in own_study.front() if p.on_front and p.metrics["size"].value <= limit]
    assert best.metrics["accuracy"].value == max(point.metrics["accuracy"].value for point in within)
    assert own_study.best().metrics["accuracy"].value >= best.metrics["accuracy"].value


def test_best_says_so_where_nothing_is_within_the_limits(own_study: ac.Study) -> None:
    with pytest.raises(ac.InputError, match="no point of the front keeps size<=1B"):
        own_study.best(size="<=1B")
    with pytest.raises(ac.InputError, match="NAME<=VALUE"):
        own_study.best(size="small")


def test_best_can_be_exported(own_study: ac.Study, tmp_path: Path) -> None:
    folder = own_study.best(latency="<=10s").export(tmp_path / "bundle")
    assert sorted(path.name for path in folder.iterdir()) == ["bundle.json", "model.onnx"]


def test_a_data_frame_has_a_row_per_trial_and_columns_per_figure_and_parameter(own_study: ac.Study) -> None:
    frame = own_study.to_dataframe()
    assert list(frame["trial"]) == [0, 1, 2, 3, 4]
    expected = {"trial", "state", "baseline", "plan", "reason", "seconds", "key", "param:prune", "param:int8"}
    for name in ("accuracy", "latency", "size", "throughput", "memory", "loss", "parameters", "macs"):
        expected |= {name, f"{name}_low", f"{name}_high", f"{name}_unit", f"{name}_kind"}
    assert expected <= set(frame.columns)
    assert (frame["accuracy_low"] <= frame["accuracy"]).all()
    assert (frame["accuracy"] <= frame["accuracy_high"]).all()


def test_a_wrong_setting_is_refused_by_name() -> None:
    with pytest.raises(ac.InputError, match=r"unknown key 'trails'.*Did you mean 'trials'"):
        ac.run_search(trails=3)
    with pytest.raises(ac.InputError, match="workers"):
        ac.run_search(workers=0)
