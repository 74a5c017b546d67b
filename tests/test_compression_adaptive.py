"""Early exits: where they are, when they are taken, what they get right, and what they cost."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress import InputError, Quantize, Task
from autocompress.compression.exits import (
    EarlyExit,
    ExitThreshold,
    all_logits,
    exit_accuracies,
    exit_count,
    exit_rates,
    exit_taken,
    exits_of,
    prefix,
)
from autocompress.compression.graph import find_layers
from autocompress.compression.places import exit_places
from autocompress.compression.training import accuracy
from autocompress.core.codec import decode_plan, encode_plan
from autocompress.core.errors import CandidateError
from autocompress.core.types import Candidate, Measurement, Method, Provenance, State
from autocompress.evaluators.adaptive import (
    adapts,
    expected_again,
    expected_macs,
    expected_measurements,
    macs_per_input,
    mix_latency,
)
from autocompress.evaluators.objectives import parse_constraint, parse_objectives
from autocompress.evaluators.pipeline import Evaluator
from autocompress.hardware.x86 import CpuBackend
from autocompress.tasks.data import example_input, normalise
from autocompress.tasks.models import CifarResNet

EXITS = EarlyExit(exits=2, threshold=0.8, steps=100)


@pytest.fixture(scope="module")
def trained(digits_task: Task) -> nn.Module:
    """The digits model with two exits, all trained together; read only."""
    return EXITS(digits_task.build(), digits_task)


def images(task: Task, count: int = 64) -> Tensor:
    """The first of the search split, as a model's input."""
    return torch.from_numpy(normalise(task.data, task.data.search.inputs[:count]))


def run(model: nn.Module, x: Tensor) -> Tensor:
    """Logits, without gradients."""
    with torch.no_grad():
        return model(x)


def stop_early(model: Any, x: Tensor, threshold: float) -> tuple[Tensor, int]:
    """What the digits model with two exits computes for one image if it really stops: logits and number of the exit."""
    heads = model.early_exits.heads
    with torch.no_grad():
        x = model.bn1(model.conv1(x))
        logits = heads[0](x)
        if F.softmax(logits, 1).max() >= threshold:
            return logits, 0
        x = model.bn2(model.conv2(F.relu(x)))
        logits = heads[1](x)
        if F.softmax(logits, 1).max() >= threshold:
            return logits, 1
        x = F.relu(model.bn3(model.conv3(F.relu(x))))
        return model.fc(x.mean((2, 3))), 2


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
def test_an_input_gets_the_logits_of_the_exit_at_which_it_stops(
    digits_task: Task, trained: nn.Module, threshold: float
) -> None:
    model = ExitThreshold(threshold)(copy.deepcopy(trained), digits_task)
    x = images(digits_task)
    stopped = [stop_early(model, x[i : i + 1], threshold) for i in range(len(x))]
    taken = exit_taken(model, all_logits(model, digits_task.data, digits_task.data.search))[: len(x)]
    assert torch.allclose(run(model, x), torch.cat([logits for logits, _ in stopped]), atol=1e-5)
    assert taken.tolist() == [number for _, number in stopped]
    assert len(set(taken.tolist())) >= 2


@pytest.mark.parametrize(("threshold", "rates"), [(0.0, [1.0, 0.0, 0.0]), (1.01, [0.0, 0.0, 1.0])])
def test_threshold_0_takes_the_first_exit_and_above_1_none(
    digits_task: Task, trained: nn.Module, threshold: float, rates: list[float]
) -> None:
    model = ExitThreshold(threshold)(copy.deepcopy(trained), digits_task)
    data = digits_task.data
    assert exit_rates(model, data, data.search) == rates
    first_or_last = all_logits(model, data, data.search)[rates.index(1.0)]
    assert np.allclose(run(model, images(digits_task)).numpy(), first_or_last[:64], atol=1e-5)


def test_rates_sum_to_1_and_a_higher_threshold_takes_fewer_early_exits(digits_task: Task, trained: nn.Module) -> None:
    model = copy.deepcopy(trained)
    ends = []
    for threshold in (0.5, 0.8, 0.95):
        rates = exit_rates(ExitThreshold(threshold)(model, digits_task), digits_task.data, digits_task.data.search)
        assert sum(rates) == pytest.approx(1.0)
        ends.append(rates[-1])
    assert ends == sorted(ends)
    assert ends[0] < ends[-1]


def test_trained_exits_know_the_digits_and_leaving_early_keeps_the_accuracy(
    digits_task: Task, trained: nn.Module
) -> None:
    data = digits_task.data
    first, second, final = exit_accuracies(trained, data, data.search)
    assert first > 0.4  # a tenth is chance
    assert second > 0.9
    assert final > 0.95
    assert exit_rates(trained, data, data.search)[-1] < 0.3
    assert accuracy(trained, data, data.search) > final - 0.03


def test_training_the_heads_alone_leaves_the_network_as_it_is(digits_task: Task) -> None:
    original = digits_task.build()
    model = EarlyExit(exits=("bn2",), steps=60, train_part="heads")(digits_task.build(), digits_task)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in original.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    early, final = exit_accuracies(model, digits_task.data, digits_task.data.search)
    assert early > 0.8
    assert final == accuracy(original, digits_task.data, digits_task.data.search)


def test_exits_are_spread_over_the_work_at_the_ends_of_blocks(digits_task: Task) -> None:
    torch.manual_seed(0)
    model = CifarResNet(14, 10, 1).eval()
    example = example_input(digits_task.data)
    places = exit_places(model, example)
    # Where the shortcut still carries something around a layer, nothing can leave; the last block saves nothing.
    assert list(places) == ["bn1", "layer1.0", "layer1", "layer2.0", "layer2", "layer3.0"]
    macs = {layer.name: layer.macs for layer in find_layers(model, example)}
    half = sum(count for name, count in macs.items() if name.startswith(("conv1", "layer1", "layer2.0")))
    assert places["layer2.0"] == pytest.approx(half / sum(macs.values()))
    made = EarlyExit(exits=3).prepare(model, digits_task)
    exits = exits_of(made)
    assert exits is not None
    assert exits.paths == ("layer1.0", "layer2.0", "layer2")


def test_the_layers_keep_their_names_and_order(digits_task: Task, trained: nn.Module) -> None:
    names = [layer.name for layer in find_layers(copy.deepcopy(trained), example_input(digits_task.data))]
    assert [name for name in names if not name.startswith("early_exits.")] == ["conv1", "conv2", "conv3", "fc"]
    assert [name for name in names if name.startswith("early_exits.")] == [
        "early_exits.heads.0.fc",
        "early_exits.heads.1.fc",
    ]


def test_named_exits_are_sorted_by_when_they_run(digits_task: Task) -> None:
    model = EarlyExit(exits=("bn2", "bn1"), hidden=16).prepare(digits_task.build(), digits_task)
    exits: Any = exits_of(model)
    assert exits.paths == ("bn1", "bn2")
    assert [head.hidden[0].in_features for head in exits.heads] == [32, 64]


def test_a_plain_sequence_can_have_exits(digits_task: Task) -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))
    plain = nn.Sequential(*layers).eval()
    model = EarlyExit(exits=("1",), threshold=2.0).prepare(copy.deepcopy(plain), digits_task)
    assert torch.equal(run(model, images(digits_task)), run(plain, images(digits_task)))


def test_while_training_all_logits_come_back_and_all_get_gradients(digits_task: Task) -> None:
    model = EXITS.prepare(digits_task.build(), digits_task).train()
    outputs = model(images(digits_task))
    assert [tuple(one.shape) for one in outputs] == [(64, 10)] * 3
    outputs[0].sum().backward()
    assert model.get_parameter("early_exits.heads.0.fc.weight").grad is not None
    assert model.get_parameter("conv2.weight").grad is None


def test_trained_weights_fit_what_prepare_makes(digits_task: Task, trained: nn.Module) -> None:
    again = EXITS.prepare(digits_task.build(), digits_task)
    again.load_state_dict({name: tensor.clone() for name, tensor in trained.state_dict().items()})
    assert torch.equal(run(again.eval(), images(digits_task)), run(trained, images(digits_task)))


def test_the_same_seed_makes_the_same_heads(digits_task: Task) -> None:
    one, two = (EXITS.prepare(digits_task.build(), digits_task).state_dict() for _ in range(2))
    other = dataclasses.replace(EXITS, seed=1).prepare(digits_task.build(), digits_task).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["early_exits.heads.0.fc.weight"], other["early_exits.heads.0.fc.weight"])


def test_a_copy_has_exits_of_its_own(digits_task: Task, trained: nn.Module) -> None:
    before = run(trained, images(digits_task))
    twin = copy.deepcopy(trained)
    assert torch.equal(run(twin, images(digits_task)), before)
    ExitThreshold(0.0)(twin, digits_task)
    with torch.no_grad():
        twin.get_parameter("early_exits.heads.0.fc.bias").fill_(100.0)
    assert not torch.allclose(run(twin, images(digits_task)), before)
    assert torch.equal(run(trained, images(digits_task)), before)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("bits", [32, 8])
def test_the_file_decides_as_the_model_does(
    digits_task: Task, trained: nn.Module, tmp_path: Path, runtime: str, bits: int
) -> None:
    backend = CpuBackend(runtime)
    model = copy.deepcopy(trained)
    if bits < 32:
        model = Quantize(bits, outputs=backend.capabilities.outputs)(model, digits_task)
        assert exit_count(model) == 2
    got = backend.predict(backend.build(model, digits_task, tmp_path), images(digits_task).numpy())
    difference = np.abs(got - run(model, images(digits_task)).numpy()).max(1)
    # Beyond rounding, an input on the edge of the threshold may leave elsewhere in int8.
    assert np.quantile(difference, 0.9) < (1e-3 if bits == 32 else 0.5)
    if bits == 32:
        assert difference.max() < 1e-3


def test_a_prefix_needs_no_later_layer_and_keeps_earlier_decisions(
    digits_task: Task, trained: nn.Module, tmp_path: Path
) -> None:
    quantized = Quantize(8, outputs="all")(copy.deepcopy(trained), digits_task)
    backend, example = CpuBackend("onnxruntime"), example_input(digits_task.data)
    logits = torch.from_numpy(all_logits(quantized, digits_task.data, digits_task.data.search)[:, :64])
    early = F.softmax(logits[0], 1).amax(1, keepdim=True) >= 0.8
    cut = prefix(quantized, 1, example)
    assert torch.allclose(run(cut, images(digits_task)), torch.where(early, logits[0], logits[1]), atol=1e-5)
    sizes = [backend.build(prefix(quantized, n, example), digits_task, tmp_path / str(n)).size_bytes for n in range(3)]
    weights = [32 * 9, 32 * 9 + 64 * 32 * 9, 32 * 9 + 64 * 32 * 9 + 64 * 64 * 9]
    assert sizes[0] < sizes[1] < sizes[2]
    assert all(size > count for size, count in zip(sizes, weights, strict=True))
    assert sizes[0] < weights[1]
    assert sizes[1] < weights[2]


def test_expected_macs_are_those_of_the_layers_up_to_each_exit(digits_task: Task, trained: nn.Module) -> None:
    data = digits_task.data
    conv1, conv2, conv3, fc = 64 * 32 * 9, 16 * 64 * 32 * 9, 16 * 64 * 64 * 9, 640
    steps = np.array([conv1 + 320, conv1 + 320 + conv2 + 640, conv1 + 320 + conv2 + 640 + conv3 + fc])
    rates = exit_rates(trained, data, data.search)
    measured = expected_macs(trained, digits_task)
    assert measured.value == pytest.approx(float(np.dot(rates, steps)))
    assert measured.samples == len(data.search)
    assert set(macs_per_input(trained, digits_task, data.search)) == set(steps)


def test_a_model_that_does_not_adapt_has_its_plain_costs(digits_task: Task) -> None:
    model = digits_task.build()
    assert not adapts(model)
    macs = sum(layer.macs for layer in find_layers(model, example_input(digits_task.data)))
    assert expected_macs(model, digits_task).value == macs
    assert expected_macs(model, digits_task).ci95 is None


SOURCE = Provenance(Method.MEASURED, "cpu", "runtime", "")


def test_the_expected_latency_weighs_each_exit_by_its_rate() -> None:
    latencies = [Measurement("latency", ms * 1e-3, "s", (ms * 9e-4, ms * 11e-4), 30, SOURCE) for ms in (1, 2, 4)]
    rates = [Measurement("", rate, "", None, 400, SOURCE) for rate in (0.5, 0.3)]
    mixed = mix_latency(latencies, rates)
    assert mixed.value == pytest.approx(0.5 * 1e-3 + 0.3 * 2e-3 + 0.2 * 4e-3)
    assert mixed.provenance.method is Method.PREDICTED
    # Standard error of the mean of 400 draws, and the three latencies' own intervals.
    draws = np.repeat([1e-3, 2e-3, 4e-3], [200, 120, 80])
    own = np.sqrt((0.5 * 1e-4) ** 2 + (0.3 * 2e-4) ** 2 + (0.2 * 4e-4) ** 2)
    assert mixed.ci95 is not None
    half = (mixed.ci95[1] - mixed.ci95[0]) / 2
    assert half == pytest.approx(np.hypot(1.959964 * draws.std() / 20, own))


def test_the_files_that_end_at_an_exit_are_built_measured_and_found_again(
    digits_task: Task, trained: nn.Module, tmp_path: Path
) -> None:
    backend = CpuBackend("onnxruntime", repeats=5, budget=0.02, attempts=1)
    model = EarlyExit(exits=("bn1",), threshold=0.5, steps=0).prepare(digits_task.build(), digits_task)
    artifact = backend.build(model, digits_task, tmp_path)
    known = {m.name: m for m in backend.measure(artifact, digits_task, None)}
    found = expected_measurements(model, digits_task, backend, artifact, known)
    assert set(found) == {"expected_latency", "expected_macs", "exit1_rate"}
    assert found["expected_latency"].value > 0
    assert found["exit1_rate"].value == exit_rates(model, digits_task.data, digits_task.data.search)[0]
    assert (tmp_path / "exit1" / "model.onnx").stat().st_size < artifact.size_bytes
    (tmp_path / "exit1" / "model.onnx").unlink()
    with pytest.raises(CandidateError, match="is gone"):
        expected_again(digits_task, backend, artifact, {**known, **found})
    plain = expected_again(digits_task, backend, artifact, known)
    assert plain["expected_latency"].value == known["latency"].value


@pytest.mark.slow
def test_a_search_can_limit_the_expected_latency(digits_task: Task, tmp_path: Path) -> None:
    backend = CpuBackend("onnxruntime", repeats=5, budget=0.02, attempts=1)
    objectives = parse_objectives(("accuracy", "expected_latency", "expected_macs"), backend)
    evaluator = Evaluator(digits_task, backend, objectives, (parse_constraint("expected_macs<=50%"),), tmp_path)
    untouched = evaluator(Candidate(()))
    assert untouched.measurements["expected_latency"].value == untouched.measurements["latency"].value
    assert untouched.measurements["expected_macs"].value == untouched.measurements["macs"].value
    evaluator = dataclasses.replace(evaluator, baseline=untouched)
    steps = EarlyExit(exits=("bn1",), steps=0)
    early, late = (evaluator(Candidate((steps, ExitThreshold(threshold)))) for threshold in (0.0, 1.1))
    assert (early.state, late.state) == (State.COMPLETE, State.INFEASIBLE)
    assert early.measurements["expected_latency"].provenance.method is Method.PREDICTED
    assert early.measurements["exit1_rate"].value == 1.0
    assert late.reason.startswith("expected_macs<=50%")
    assert early.artifact is not None
    again = evaluator.again(early.artifact, early.candidate.plan, early.measurements, "test")
    assert set(again) == set(early.measurements)


def test_plans_with_exits_are_stored_and_read_back() -> None:
    plan = (EarlyExit(exits=("bn1", "bn2"), threshold=0.7), Quantize(8), ExitThreshold(0.6))
    assert decode_plan(encode_plan(plan)) == plan
    assert [step.describe() for step in plan] == ["2 exits at 0.7", "int8", "exit at 0.6"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exits": 0}, "exits must be at least 1"),
        ({"exits": ()}, "different module paths"),
        ({"exits": "bn1"}, "different module paths"),
        ({"exits": ("bn1", "bn1")}, "different module paths"),
        ({"threshold": -0.1}, "threshold must be at least 0"),
        ({"threshold": float("nan")}, "threshold must be at least 0"),
        ({"train_part": "some"}, "train_part must be one of heads, all"),
        ({"hidden": -1}, "hidden must be at least 0"),
        ({"lr": 0.0}, "lr and temperature must be above 0"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        EarlyExit(**settings)


@pytest.mark.parametrize(
    ("exits", "message"),
    [
        (("bn9",), "no module called 'bn9'"),
        (("fc",), "does not put out a feature map"),
        (9, "9 exits asked for, but only 2 places: bn1, bn2"),
    ],
)
def test_exits_that_the_model_has_no_place_for_are_refused(digits_task: Task, exits: Any, message: str) -> None:
    with pytest.raises(CandidateError, match=message):
        EarlyExit(exits=exits).prepare(digits_task.build(), digits_task)


def test_a_model_has_exits_once_and_a_threshold_only_with_them(digits_task: Task) -> None:
    model = digits_task.build()
    with pytest.raises(CandidateError, match="no exits; put EarlyExit before it"):
        ExitThreshold(0.5)(model, digits_task)
    EarlyExit(exits=("bn1",)).prepare(model, digits_task)
    with pytest.raises(CandidateError, match="has exits already"):
        EarlyExit(exits=("bn2",)).prepare(model, digits_task)
