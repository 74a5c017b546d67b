"""Figures, intervals, limits, and the way of one candidate through the pipeline."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from autocompress import Candidate, Evaluation, Finetune, InputError, Measurement, Plan, Prune, Quantize, Task
from autocompress.core.codec import check_order, plan_key
from autocompress.core.errors import CandidateError
from autocompress.core.types import Backend, Method, Provenance, State
from autocompress.evaluators.metrics import parity_error, score
from autocompress.evaluators.objectives import check_constraints, parse_constraint
from autocompress.evaluators.pipeline import Evaluator, baseline_plans, cheap_figures, lacks_kernels, lowest_bits
from autocompress.hardware.statistics import mean_interval, median_interval, share_interval
from autocompress.hardware.targets import make_backend
from autocompress.studies.pareto import hypervolume, nondominated

HERE = Provenance(Method.MEASURED, "test", "test", "")


def figure(name: str, value: float, unit: str = "") -> Measurement:
    return Measurement(name, value, unit, None, 1, HERE)


BASE = {
    "accuracy": figure("accuracy", 0.9),
    "latency": figure("latency", 0.01, "s"),
    "size": figure("size", 400e3, "B"),
    "throughput": figure("throughput", 200.0, "1/s"),
    "parameters": figure("parameters", 1e5),
}


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("size<=200kB", 200e3),
        ("size<=0.2MB", 200e3),
        ("size <= 1 KiB", 1024.0),
        ("size<=1e6", 1e6),
        ("size<=25%", 100e3),
        ("latency<=5ms", 5e-3),
        ("latency<=250us", 250e-6),
        ("latency<=250µs", 250e-6),
        ("latency<=0.5s", 0.5),
        ("latency<=50%", 5e-3),
        ("throughput>=150/s", 150.0),
        ("throughput>=150%", 300.0),
        ("parameters<=50k", 50e3),
        ("parameters<=0.1M", 1e5),
        ("accuracy>=0.85", 0.85),
        ("accuracy>=-1pt", 0.89),
        ("accuracy>=+1pt", 0.91),
        ("accuracy>=95%", 0.855),
    ],
)
def test_a_constraint_means_what_it_says(text: str, limit: float) -> None:
    constraint = parse_constraint(text)
    assert constraint.limit(BASE) == pytest.approx(limit)
    assert constraint.name == text.split("<")[0].split(">")[0].strip()
    assert constraint.at_most == ("<=" in text)
    sign = 1 if constraint.at_most else -1
    within, beyond = (figure(constraint.name, limit * (1 + share * sign)) for share in (-0.01, 0.01))
    assert constraint.violation({constraint.name: within}, BASE) < 0
    assert constraint.violation({constraint.name: beyond}, BASE) == pytest.approx(0.01)


def test_a_share_of_the_latency_is_that_of_the_latency_measured_in_turns() -> None:
    found = {"latency": figure("latency", 0.009, "s"), "reference_latency": figure("reference_latency", 0.02, "s")}
    assert parse_constraint("latency<=50%").violation(found, BASE) == pytest.approx(-0.1)
    assert parse_constraint("latency<=5ms").violation(found, BASE) == pytest.approx(0.8)


@pytest.mark.parametrize(
    "text", ["", "size", "size=3", "size<3", "size<=", "<=3", "size<=3 4", "size<=kB", "size<=--3", "size<=3kB;"]
)
def test_a_constraint_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="NAME<=VALUE"):
        parse_constraint(text)


@pytest.mark.parametrize("text", ["latency<=5kB", "size<=5ms", "accuracy>=1MB", "throughput>=5ms", "size<=5mb"])
def test_a_unit_of_another_figure_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="unit"):
        parse_constraint(text)


@pytest.mark.parametrize("text", ["latency<=-1pt", "size<=+3pt", "throughput>=-1pt"])
def test_points_are_for_shares_only(text: str) -> None:
    with pytest.raises(InputError, match="pt"):
        parse_constraint(text)


def test_limits_that_can_not_be_kept_together_are_refused() -> None:
    def check(*texts: str) -> None:
        check_constraints([parse_constraint(text) for text in texts], BASE)

    check("size<=200kB", "size>=100kB", "accuracy>=-1pt")
    with pytest.raises(InputError, match="contradict"):
        check("size<=25%", "size>=200kB")
    with pytest.raises(InputError, match="impossible"):
        check("accuracy>=+11pt")


def random_logits(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 7, 311)
    logits = rng.normal(0, 2, (311, 7)).astype(np.float32)
    logits[np.arange(311), labels] += 1.5
    return logits, labels


def test_accuracy_and_loss_agree_with_scikit_learn() -> None:
    from scipy.special import softmax
    from sklearn.metrics import accuracy_score, log_loss

    logits, labels = random_logits(3)
    found = score(logits, labels, HERE)
    assert found["accuracy"].value == pytest.approx(accuracy_score(labels, logits.argmax(1)))
    probabilities = softmax(logits.astype(np.float64), axis=1)
    assert found["loss"].value == pytest.approx(log_loss(labels, probabilities, labels=range(7)), rel=1e-9)
    assert found["accuracy"].samples == found["loss"].samples == 311


def test_calibration_error_agrees_with_its_definition() -> None:
    from scipy.special import softmax

    logits, labels = random_logits(4)
    probabilities = softmax(logits.astype(np.float64), axis=1)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    expected = 0.0
    for low in np.arange(15) / 15:
        inside = [i for i, c in enumerate(confidence) if low <= c < low + 1 / 15 or (c == 1 and low > 14 / 15 - 1e-9)]
        if inside:
            gap = abs(np.mean([right[i] for i in inside]) - np.mean([confidence[i] for i in inside]))
            expected += len(inside) / len(labels) * gap
    assert score(logits, labels, HERE)["calibration_error"].value == pytest.approx(expected, rel=1e-9)


def test_large_logits_lose_no_precision() -> None:
    logits = np.array([[3e4, 0.0], [0.0, 3e4]], np.float32)
    found = score(logits, np.array([0, 0]), HERE)
    assert found["accuracy"].value == 0.5
    assert found["loss"].value == pytest.approx(1.5e4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_an_error_and_not_a_figure(bad: float) -> None:
    logits, labels = random_logits(5)
    logits[7, 2] = bad
    with pytest.raises(CandidateError, match="not finite for 1 of 311 images"):
        score(logits, labels, HERE)


@pytest.mark.parametrize(("right", "count"), [(0, 10), (10, 10), (7, 10), (430, 450), (449, 450), (9012, 10000)])
def test_the_interval_of_a_share_is_wilsons(right: int, count: int) -> None:
    from scipy.stats import binomtest

    expected = binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert share_interval(right, count) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_the_interval_of_a_mean_is_the_normal_one() -> None:
    low, high = mean_interval(5.0, 2.0, 100)
    assert (low, high) == pytest.approx((5 - 0.391993, 5 + 0.391993), abs=1e-5)


@pytest.mark.parametrize("count", [30, 31, 100])
def test_the_interval_of_a_median_covers_it_95_percent_of_the_time(count: int) -> None:
    rng = np.random.default_rng(count)
    times = rng.lognormal(0, 1, (4000, count))  # the median is 1
    hits = [low <= 1.0 <= high for _, (low, high) in map(median_interval, times.tolist())]
    assert 0.94 <= np.mean(hits) <= 0.98


@pytest.mark.parametrize("count", [1, 2, 5, 30, 31, 100])
def test_the_interval_of_a_median_treats_both_sides_alike(count: int) -> None:
    values = np.random.default_rng(count).normal(size=count).tolist()
    middle, (low, high) = median_interval(values)
    mirrored, (mirrored_low, mirrored_high) = median_interval([-value for value in values])
    assert middle == pytest.approx(np.median(values))
    assert low <= middle <= high
    assert (mirrored, mirrored_low, mirrored_high) == pytest.approx((-middle, -high, -low))


def test_hypervolume_of_two_objectives_agrees_with_a_hand_computed_area() -> None:
    # Accuracy up from 0 to 1, size down from 110 (10 % above the untouched model's 100) to 0.
    points = [(0.9, 100.0), (0.8, 50.0), (0.7, 60.0)]  # the last is beaten
    area = 0.8 * (110 - 50) + (0.9 - 0.8) * (110 - 100)
    assert hypervolume(points, ["maximize", "minimize"], [0.9, 100.0]) == pytest.approx(area / 110)
    assert hypervolume(points[::-1], ["maximize", "minimize"], [0.9, 100.0]) == pytest.approx(area / 110)
    assert hypervolume([], ["maximize", "minimize"], [0.9, 100.0]) == 0.0


def test_of_equal_points_one_stays_on_the_front() -> None:
    values = [(1.0, 5.0), (2.0, 4.0), (1.0, 5.0), (2.0, 6.0), (3.0, 4.0)]
    assert nondominated(values, ["minimize", "minimize"]) == [True, True, False, False, False]
    assert nondominated(values, ["maximize", "maximize"]) == [False, False, False, True, True]
    assert nondominated([(0.5,), (0.5,)], ["maximize"]) == [True, False]
    assert nondominated([], ["minimize"]) == []


def test_parity_error_is_relative_to_the_expected_logits() -> None:
    expected = np.array([[3.0, 4.0]])
    assert parity_error(expected, expected) == 0
    assert parity_error(expected, expected * 1.1) == pytest.approx(0.1)


def test_cheap_figures_of_the_digits_model_agree_with_a_hand_count(digits_task: Task) -> None:
    found = cheap_figures(digits_task.build(), digits_task)
    convolutions = 9 * 32 * 64 + 9 * 32 * 64 * 16 + 9 * 64 * 64 * 16
    assert found["macs"].value == convolutions + 640
    assert found["parameters"].value == 9 * 32 + 9 * 32 * 64 + 9 * 64 * 64 + 2 * (32 + 64 + 64) + 650


def test_the_baselines_are_the_untouched_model_int8_and_a_cut() -> None:
    plans = baseline_plans(make_backend("x86/onnxruntime").capabilities, (Prune(0.5), Finetune(5, seed=3)))
    assert list(plans) == ["untouched", "uniform int8", "uniform pruning"]
    assert plans["untouched"] == ()
    assert lowest_bits(plans["uniform int8"]) == 8
    assert plans["uniform pruning"][-1] == Finetune(5, seed=3)


@pytest.mark.parametrize(
    "plan", [(Quantize(8), Prune(0.5)), (Prune(0.5), Quantize(8), Finetune(3)), (Quantize(8), Finetune(3))], ids=str
)
def test_a_plan_out_of_order_is_refused(plan: Plan) -> None:
    with pytest.raises(InputError, match="out of order"):
        check_order(plan)


@pytest.fixture(scope="module")
def backend() -> Backend:
    return make_backend("x86/onnxruntime", threads=1)


@pytest.fixture(scope="module")
def untouched(digits_task: Task, backend: Backend, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """The untouched digits model, evaluated once."""
    evaluator = Evaluator(digits_task, backend, (), (), tmp_path_factory.mktemp("untouched"))
    return evaluator(Candidate(()))


Make = Callable[..., Evaluator]


@pytest.fixture
def make_evaluator(digits_task: Task, backend: Backend, untouched: Evaluation, tmp_path: Path) -> Make:
    """An evaluator in a folder of its own, with limits relative to the untouched model."""

    def make(*constraints: str) -> Evaluator:
        limits = tuple(parse_constraint(text) for text in constraints)
        return Evaluator(digits_task, backend, (), limits, tmp_path, baseline=untouched)

    return make


def trained(evaluator: Evaluator) -> list[Path]:
    """Files of trained weights that an evaluator left."""
    return sorted((evaluator.folder / "cache").glob("*"))


def test_the_untouched_model_gets_every_figure_with_its_origin(untouched: Evaluation) -> None:
    assert untouched.state is State.COMPLETE, untouched.reason
    found = untouched.measurements
    names = "accuracy loss calibration_error latency throughput memory size parameters macs parity"
    assert set(names.split()) <= set(found)
    assert found["accuracy"].value > 0.95
    assert found["parity"].value < 1e-4
    assert found["latency"].samples >= 30
    assert found["latency"].unit == "s"
    for name in ("accuracy", "latency", "throughput"):
        low, high = found[name].ci95 or (math.nan, math.nan)
        assert low <= found[name].value <= high
        assert found[name].provenance.method is Method.MEASURED
    assert untouched.artifact is not None
    assert untouched.artifact.path.stat().st_size == found["size"].value


def test_a_candidate_that_is_too_large_is_rejected_before_it_is_trained(make_evaluator: Make) -> None:
    evaluator = make_evaluator("size<=5%")
    found = evaluator(Candidate((Prune(0.25), Finetune(50))))
    assert found.state is State.INFEASIBLE
    assert found.reason.startswith("size<=5%: size is at least ")
    assert trained(evaluator) == []
    assert "accuracy" not in found.measurements


def test_a_candidate_with_too_many_parameters_is_rejected_with_its_violation(make_evaluator: Make) -> None:
    found = make_evaluator("parameters<=10k", "latency<=5s")(Candidate((Prune(0.25),)))
    assert found.state is State.INFEASIBLE
    over = found.violations[0]
    assert over is not None
    assert over == pytest.approx(found.measurements["parameters"].value / 10e3 - 1)
    assert found.violations[1] is None, "its latency was never measured"


def test_a_candidate_that_is_too_slow_is_rejected_before_it_is_trained(make_evaluator: Make) -> None:
    evaluator = make_evaluator("latency<=1%")
    found = evaluator(Candidate((Prune(0.5), Finetune(50))))
    assert found.state is State.INFEASIBLE
    assert "latency<=1%: latency is before training " in found.reason
    assert found.violations[0] is not None
    assert found.violations[0] > 0
    assert trained(evaluator) == []
    assert not list(evaluator.folder.rglob("*.onnx")), "the draft's file is gone"


def test_candidates_that_share_a_cut_share_its_training(make_evaluator: Make) -> None:
    evaluator = make_evaluator()
    cut = (Prune(0.5), Finetune(4))
    first = evaluator(Candidate(cut))
    assert first.state is State.COMPLETE, first.reason
    (path,) = trained(evaluator)
    assert path.stem == plan_key(cut)
    written, content = path.stat().st_mtime_ns, path.read_bytes()
    second = evaluator(Candidate((*cut, Quantize(8, outputs="all"))))
    assert second.state is State.COMPLETE, second.reason
    assert trained(evaluator) == [path]
    assert (path.stat().st_mtime_ns, path.read_bytes()) == (written, content)
    assert second.measurements["size"].value < 0.5 * first.measurements["size"].value
    assert second.measurements["accuracy"].value == pytest.approx(first.measurements["accuracy"].value, abs=0.05)


def test_other_settings_of_the_training_are_trained_anew(make_evaluator: Make) -> None:
    evaluator = make_evaluator()
    for seed in (1, 2):
        assert evaluator(Candidate((Prune(0.75), Finetune(1, seed=seed)))).state is State.COMPLETE
    assert len(trained(evaluator)) == 2


@pytest.mark.parametrize(
    ("step", "imitated"),
    [
        (Quantize(8), False),
        (Quantize(4), True),
        (Quantize("fp8"), True),
        (Quantize("bf16"), False),
        (Quantize(8, activations="dynamic"), True),
        (Quantize(8, granularity="group"), True),
        (Quantize(8, granularity="group", activations=32), False),
    ],
    ids=str,
)
def test_arithmetic_that_the_target_lacks_counts_as_imitated(step: Quantize, imitated: bool) -> None:
    assert lacks_kernels((step,), make_backend("x86/onnxruntime").capabilities) is imitated


def test_bits_that_no_kernel_runs_are_labelled_simulated(make_evaluator: Make) -> None:
    found = make_evaluator()(Candidate((Quantize(4, outputs="all"),))).measurements
    assert found["accuracy"].provenance.method is Method.SIMULATED


def test_training_that_diverges_is_a_failed_candidate_with_a_reason(make_evaluator: Make) -> None:
    found = make_evaluator()(Candidate((Prune(0.5), Finetune(10, lr=1e8))))
    assert found.state is State.FAILED
    assert "diverged" in found.reason
    assert "step" in found.reason


def test_a_plan_out_of_order_is_a_failed_candidate_with_a_reason(make_evaluator: Make) -> None:
    found = make_evaluator()(Candidate((Quantize(8), Prune(0.5))))
    assert found.state is State.FAILED
    assert "out of order" in found.reason


@dataclasses.dataclass(frozen=True)
class Breaks:
    """Raises, as torch does where memory or a kernel is missing."""

    message: str

    rank = 20
    retrains = False

    def __call__(self, model: nn.Module, task: Task) -> nn.Module:
        raise RuntimeError(self.message)


@dataclasses.dataclass(frozen=True)
class Poisons:
    """Makes every logit NaN."""

    rank = 20
    retrains = False

    def __call__(self, model: nn.Module, task: Task) -> nn.Module:
        nn.init.constant_(model.fc.weight, math.nan)  # type: ignore[union-attr,arg-type]
        return model


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("no kernel for this shape\nlong trace", "RuntimeError: no kernel for this shape"),
        ("DefaultCPUAllocator: can't allocate memory: 9 GB", "out of memory"),
    ],
)
def test_an_operator_that_raises_is_a_failed_candidate_with_a_reason(
    make_evaluator: Make, message: str, reason: str
) -> None:
    found = make_evaluator()(Candidate((Breaks(message),)))
    assert found.state is State.FAILED
    assert found.reason.startswith(reason)
    assert "\n" not in found.reason


def test_a_model_that_computes_nan_is_a_failed_candidate(make_evaluator: Make) -> None:
    found = make_evaluator()(Candidate((Poisons(),)))
    assert found.state is State.FAILED
    assert "accuracy" not in found.measurements
    assert all(math.isfinite(m.value) for m in found.measurements.values() if m.name != "parity")


def test_a_prune_plan_for_layers_that_do_not_exist_is_a_failed_candidate(make_evaluator: Make) -> None:
    strange: Mapping[str, float] = {"conv9": 0.5}
    found = make_evaluator()(Candidate((Prune(strange),)))
    assert found.state is State.FAILED
    assert "no layer called conv9" in found.reason
