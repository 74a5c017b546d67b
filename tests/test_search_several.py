"""One search for several targets: a front for each, and what each one's best costs on the others."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import autocompress as ac
from autocompress.core.types import State
from autocompress.studies.cross import crossings

TARGETS = ["x86/onnxruntime", "tpu/edgetpu"]


@pytest.fixture(scope="module")
def trained() -> list[ac.Finetune]:
    """The trainings of the search, as they come."""
    return []


@pytest.fixture(scope="module")
def folder(trained: list[ac.Finetune], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run for two targets; read only."""
    original = ac.Finetune.__call__

    def counted(self: Any, model: Any, task: Any) -> Any:
        trained.append(self)
        return original(self, model, task)

    out = tmp_path_factory.mktemp("several") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ac.Finetune, "__call__", counted)
        ac.run_search(
            "digits-cnn", "digits", target=TARGETS, trials=4, executor="inline", finetune_steps=5, verify_time=0,
            threads=1, out=out,
        )  # fmt: skip
    return out


def test_each_target_has_a_run_folder_with_its_own_front(folder: Path) -> None:
    for target in TARGETS:
        study = ac.Study.open(folder / target.replace("/", "-"))
        assert len(study.records()) == 4
        points = [point for point in study.front() if point.on_front]
        assert points
        for point in points:
            assert point.split == "test"
            assert point.artifact is not None
            assert point.artifact.runtime == target
            assert point.artifact.path.is_file()
        kinds = {point.metrics["latency"].provenance.method for point in points}
        assert kinds == ({"measured"} if target.startswith("x86") else {"simulated"})


def test_the_search_sums_up_what_each_target_gave(folder: Path) -> None:
    joint = ac.Study.open(folder)
    assert [objective.name for objective in joint.objectives] == [
        "accuracy", "latency@x86/onnxruntime", "latency@tpu/edgetpu", "size",
    ]  # fmt: skip
    parts = [ac.Study.open(folder / target.replace("/", "-")).records() for target in TARGETS]
    for whole, *own in zip(joint.records(), *parts, strict=True):
        assert whole.state is State.COMPLETE
        assert whole.baseline == own[0].baseline == own[1].baseline
        assert whole.metrics["accuracy"].value == min(part.metrics["accuracy"].value for part in own)
        assert whole.metrics["size"].value == max(part.metrics["size"].value for part in own)
        for target, part in zip(TARGETS, own, strict=True):
            assert whole.metrics[f"latency@{target}"].value == part.metrics["latency"].value


def test_a_candidate_is_trained_once_for_all_targets(folder: Path, trained: list[ac.Finetune]) -> None:
    plans = [record.plan for record in ac.Study.open(folder).records()]
    tuned = [[step for step in plan if step["op"] != "Quantize"] for plan in plans if "Finetune" in str(plan)]
    assert len(trained) == len({json.dumps(steps) for steps in tuned}) > 0


def test_each_devices_best_is_priced_on_the_others(folder: Path) -> None:
    joint = ac.Study.open(folder)
    rows = crossings(joint)
    assert [row.target for row in rows] == TARGETS
    for row in rows:
        assert row.ratios[row.target] == 1.0
        for other in TARGETS:
            base = next(r for r in rows if r.target == other).costs[other]
            cost, ratio = row.costs[other], row.ratios[other]
            assert base is not None
            assert cost is not None
            assert ratio is not None
            assert math.isclose(ratio, cost.value / base.value)
    with (folder / "cross.csv").open() as lines:
        written = list(csv.DictReader(lines))
    assert [(line["best_for"], line["on"]) for line in written] == [(a, b) for a in TARGETS for b in TARGETS]


def test_the_command_line_prints_a_front_for_each_and_the_crossing(folder: Path, run_cli: Callable[..., Any]) -> None:
    shown = run_cli("front", folder).stdout
    for target in TARGETS:
        assert f"Pareto front for {target}" in shown
    assert "What each device's best costs on the others" in shown
    found = json.loads(run_cli("front", folder, "--format", "json").stdout)
    assert list(found["fronts"]) == TARGETS
    assert [row["best_for"] for row in found["cross"]] == TARGETS
    refused = run_cli("export", folder, "--trial", 0, "--out", folder / "bundle")
    assert refused.returncode == 2
    assert "export from the folder of one of them" in refused.stderr


@pytest.mark.slow
def test_it_can_be_resumed(tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    common = ("--executor", "inline", "--finetune-steps", 2, "--trials")
    out = tmp_path / "run"
    first = run_cli("search", "--target", *TARGETS, *common, 2, "--threads", 1, "--out", out)
    assert first.returncode == 0, first.stderr
    again = run_cli("search", "--resume", out, "--trials", 3)
    assert again.returncode == 0, again.stderr
    assert [len(part.records()) for part in ac.Study.open(out).parts.values()] == [3, 3]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["x86/onnxruntime", "x86/onnxruntime"], "several different ones"),
        ([], "expected one target"),
        (["x86/onnxruntime", "x86/nothing"], "unknown target 'x86/nothing'"),
    ],
)
def test_wrong_targets_are_refused(targets: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ac.InputError, match=message):
        ac.run_search("digits-cnn", "digits", target=targets, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_figure_that_one_target_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ac.InputError, match="target tpu/edgetpu gives no memory"):
        ac.run_search("digits-cnn", "digits", target=TARGETS, objectives=["accuracy", "memory"], out=tmp_path / "run")
