"""Sparsity found by training: gradual pruning, moving masks, lottery tickets."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autocompress import InputError, Task
from autocompress.compression.lottery import LotteryTicket, go_back, rest_of, share_after, snapshot
from autocompress.compression.masks import masks, set_mask, sparsity_by_layer
from autocompress.compression.sparse_training import (
    GradualMasks,
    GradualPrune,
    MovingMasks,
    RigL,
    cubic,
    drop_share,
    erdos_renyi_kernel,
    exchange,
    forget,
    reinitialise,
)
from autocompress.compression.sparsity import Pattern, Sparsify
from autocompress.compression.training import Schedule, accuracy
from autocompress.core.codec import decode_plan, encode_plan
from autocompress.core.notes import collect_notes
from autocompress.core.registry import OPERATORS
from autocompress.core.types import Operator

SHORT = {"steps": 12, "batch_size": 64, "alpha": 0.0}
SIZES = {"conv1": 32 * 9, "conv2": 64 * 32 * 9, "conv3": 64 * 64 * 9}
STEPS = [
    GradualPrune(**SHORT, sparsity=0.8, every=3),
    GradualPrune(**SHORT, sparsity=0.8, every=3, criterion="movement", scope="layer"),
    RigL(**SHORT, sparsity=0.8, every=3),
    RigL(**SHORT, sparsity=0.8, every=3, method="set", distribution="uniform", start="scratch"),
    LotteryTicket(**SHORT, sparsity=0.8, rounds=2),
    LotteryTicket(**SHORT, sparsity=0.8, rounds=2, rewind="learning-rate", scope="layer"),
]


def label(step: Any) -> str:
    """Short name of a test's step."""
    return str(step.describe()).replace(" ", "-")


@pytest.fixture(scope="module")
def trained(digits_task: Task) -> dict[Operator, nn.Module]:
    """What each of the steps makes of the digits model."""
    torch.manual_seed(5)  # their seeds alone are to count
    return {step: step(digits_task.build(), digits_task) for step in STEPS}


def masked(model: nn.Module) -> dict[str, int]:
    """Masked weights of each convolution; the weights are zero there, but a new one of RigL's may be so, too."""
    found = masks(model)
    assert all((model.get_submodule(name).weight[~mask] == 0).all() for name, mask in found.items())  # type: ignore[index]
    return {name: int((~mask).sum()) for name, mask in found.items()}


def same_state(a: nn.Module, b: nn.Module) -> bool:
    """Whether all parameters and buffers are bit for bit the same."""
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("step", STEPS, ids=label)
def test_the_share_is_met_exactly_and_masked_weights_are_zero(
    step: Operator, trained: dict[Operator, nn.Module]
) -> None:
    model = trained[step]
    found = masked(model)
    if getattr(step, "scope", "") == "layer" or getattr(step, "distribution", "") == "uniform":
        assert found == {name: round(0.8 * size) for name, size in SIZES.items()}
    assert abs(sum(found.values()) - 0.8 * sum(SIZES.values())) <= 1.5
    assert all(share >= found[name] / SIZES[name] for name, share in sparsity_by_layer(model).items() if name in found)


@pytest.mark.parametrize("step", STEPS, ids=label)
def test_stored_weights_fit_what_prepare_makes(
    step: Any, trained: dict[Operator, nn.Module], digits_task: Task
) -> None:
    state = {name: tensor.contiguous() for name, tensor in trained[step].state_dict().items()}
    torch.manual_seed(77)
    model = step.prepare(digits_task.build(), digits_task)
    assert abs(sum(masked(model).values()) - 0.8 * sum(SIZES.values())) <= 1.5, "a draft is as sparse"
    model.load_state_dict(state)
    assert same_state(model.eval(), trained[step])
    x = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(model(x), trained[step](x))


@pytest.mark.parametrize("step", STEPS[3:5], ids=label)
def test_the_same_seed_gives_the_same_model(step: Any, trained: dict[Operator, nn.Module], digits_task: Task) -> None:
    torch.manual_seed(99)
    assert same_state(step(digits_task.build(), digits_task), trained[step])


@pytest.mark.parametrize("step", STEPS, ids=label)
def test_a_plan_with_the_step_can_be_stored(step: Any) -> None:
    assert decode_plan(encode_plan((step,))) == (step,)
    assert OPERATORS.get(type(step).__name__) is type(step)
    assert (step.rank, step.retrains) == (30, True)


def test_no_steps_prune_at_once(digits_task: Task) -> None:
    model = GradualPrune(0, sparsity=0.6)(digits_task.build(), digits_task)
    assert same_state(model, Sparsify(0.6)(digits_task.build(), digits_task))


def test_gradual_pruning_keeps_accuracy_that_pruning_at_once_loses(digits_task: Task) -> None:
    data = digits_task.data
    at_once = accuracy(Sparsify(0.95)(digits_task.build(), digits_task), data, data.search)
    model = GradualPrune(60, sparsity=0.95, every=4, batch_size=64)(digits_task.build(), digits_task)
    assert at_once < 0.6
    assert accuracy(model, data, data.search) > 0.9


def test_the_cubic_curve_is_that_of_the_paper() -> None:
    for step in (10, 17, 25, 40):
        assert cubic(step, 10, 40, 0.1, 0.9) == pytest.approx(0.9 + (0.1 - 0.9) * (1 - (step - 10) / 30) ** 3)
    assert cubic(0, 10, 40, 0.1, 0.9) == pytest.approx(0.1)
    assert cubic(99, 10, 40, 0.1, 0.9) == 0.9
    assert cubic(5, 5, 5, 0.0, 0.5) == 0.5


class Line(nn.Module):
    """One linear layer of six weights."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def run(model: Line, control: Callable[[int, torch.optim.Optimizer], None], steps: int, seed: int = 0) -> list[Any]:
    """Descend a squared error as `fit` would; (weight before, gradient, mask after, weight after) of each step."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    rng = np.random.default_rng(seed)
    seen = []
    for number in range(steps):
        x, y = (torch.from_numpy(rng.normal(size=(5, size)).astype(np.float32)) for size in (3, 2))
        before = model.fc.weight.detach().clone()
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        control(number, optimizer)
        set_mask(model.fc, model.fc.weight_mask)  # type: ignore[arg-type]
        assert model.fc.weight.grad is not None
        seen.append(
            (before, model.fc.weight.grad.clone(), masks(model)["fc"].clone(), model.fc.weight.detach().clone())
        )
    return seen


def test_gradual_pruning_follows_the_curve_step_by_step() -> None:
    torch.manual_seed(0)
    model = Line()
    step = GradualPrune(20, sparsity=0.67, every=4, begin=0.1, end=0.8, scope="layer")
    seen = run(model, GradualMasks(step, model, {"fc": 0.67}, Pattern(), 20), 20)
    gone = [int((~mask).sum()) for _, _, mask, _ in seen]
    updates = {done: round(cubic(done, 2, 16, 0.0, 0.67) * 6) for done in (2, 6, 10, 14, 16)}
    expected = [max((count for at, count in updates.items() if at <= done), default=0) for done in range(1, 21)]
    assert gone == expected
    assert gone[-1] == 4
    for (_, _, mask, _), (_, _, later, _) in pairwise(seen):
        assert (mask | ~later).all(), "a weight that is gone by magnitude stays so"


def test_an_n_of_m_pattern_closes_one_weight_at_a_time(digits_task: Task) -> None:
    counts = set()

    class Watched(GradualPrune):
        def train(self, model: nn.Module, task: Task, **settings: Any) -> nn.Module:
            inner = settings["after_step"]

            def after_step(number: int, optimizer: torch.optim.Optimizer) -> None:
                inner(number, optimizer)
                groups = masks(model)["conv3"].movedim(1, -1).reshape(-1, 4).sum(1)
                counts.add((int(groups.min()), int(groups.max())))

            return super().train(model, task, after_step=after_step)

    Watched(**SHORT, pattern="2:4", every=1, sparsity=0.5)(digits_task.build(), digits_task)
    assert counts == {(4, 4), (3, 3), (2, 2)}


def test_movement_scores_are_the_sum_of_minus_weight_times_gradient_and_masked_weights_may_return() -> None:
    returned = 0
    for seed in range(8):
        torch.manual_seed(seed)
        model = Line()
        step = GradualPrune(12, sparsity=0.5, every=2, end=1.0, scope="layer", criterion="movement")
        control = GradualMasks(step, model, {"fc": 0.5}, Pattern(), 12)
        seen = run(model, control, 12, seed)
        dense, scores, mask = seen[0][0].clone(), torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
        for done, (_, gradient, mask_after, after) in enumerate(seen, 1):
            scores -= dense * gradient  # with the value that a masked weight had when it went
            dense = torch.where(mask, dense - 0.1 * gradient, dense)
            if done % 2 == 0:
                before, mask = mask, torch.ones(6, dtype=torch.bool)
                mask[scores.flatten().argsort(stable=True)[: round(cubic(done, 0, 12, 0.0, 0.5) * 6)]] = False
                mask = mask.view(2, 3)
                returned += int((mask & ~before).sum())
            assert torch.equal(mask_after, mask)
            torch.testing.assert_close(after, dense * mask)
        torch.testing.assert_close(control.scores["fc"], scores)
    assert returned > 0, "no masked weight came back in any of the runs"


def test_movement_never_brings_back_what_an_earlier_mask_forbids() -> None:
    torch.manual_seed(0)
    model = Line()
    earlier = torch.tensor([[True, False, True], [True, True, False]])
    set_mask(model.fc, earlier)
    step = GradualPrune(8, sparsity=0.5, every=1, scope="layer", criterion="movement")
    seen = run(model, GradualMasks(step, model, {"fc": 0.5}, Pattern(), 8), 8)
    assert all((earlier | ~mask).all() for _, _, mask, _ in seen)
    assert int(seen[-1][2].sum()) == 3


def test_averaged_weights_end_as_sparse(digits_task: Task) -> None:
    for step in (GradualPrune(**SHORT, sparsity=0.8, every=3, ema=0.9), RigL(**SHORT, sparsity=0.8, every=3, ema=0.9)):
        model = step(digits_task.build(), digits_task)
        assert sum(masked(model).values()) == round(0.8 * sum(SIZES.values()))


def test_erk_gives_each_layer_its_share_of_the_paper_and_the_right_total() -> None:
    shapes = {"a": (16, 3, 3, 3), "b": (64, 32, 3, 3), "c": (64, 64, 3, 3), "d": (10, 64)}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    kept = erdos_renyi_kernel(shapes, 0.9)
    assert sum(kept.values()) == round(0.1 * sum(sizes.values()))
    raw = {name: sum(shape) / sizes[name] for name, shape in shapes.items()}
    full = [name for name in shapes if kept[name] == sizes[name]]
    rest = [name for name in shapes if name not in full]
    assert full  # the smallest layer would get more than it has
    scale = (sum(kept.values()) - sum(sizes[n] for n in full)) / sum(raw[n] * sizes[n] for n in rest)
    assert all(raw[name] * scale > 1 for name in full)
    assert all(abs(kept[name] - scale * raw[name] * sizes[name]) <= 1 for name in rest)
    assert erdos_renyi_kernel(shapes, 0.0) == sizes


def test_the_exchanged_share_falls_along_a_cosine() -> None:
    assert [drop_share(t, 100, 0.3) for t in (0, 25, 50)] == pytest.approx(
        [0.3, 0.15 * (1 + math.cos(math.pi / 4)), 0.15]
    )
    assert drop_share(100, 100, 0.3) == 0.0


def test_an_exchange_drops_the_smallest_and_grows_where_the_gradient_is_largest() -> None:
    rng = np.random.default_rng(0)
    weight, gradient = rng.normal(size=(8, 5)), np.abs(rng.normal(size=(8, 5)))
    mask = rng.random((8, 5)) < 0.4
    count = 5
    active = np.flatnonzero(mask)
    dropped = active[np.argsort(np.abs(weight.ravel()[active]))[:count]]
    kept = np.setdiff1d(active, dropped)
    outside = np.setdiff1d(np.arange(40), kept)
    grown = outside[np.argsort(-gradient.ravel()[outside])[:count]]
    found = exchange(torch.from_numpy(weight), torch.from_numpy(mask), torch.from_numpy(gradient), count)
    assert set(np.flatnonzero(found.numpy())) == set(kept) | set(grown)


def test_rigl_exchanges_weights_at_its_steps_only_with_new_ones_at_zero() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8, bias=False))
    layer = model[0]
    mask = torch.rand(8, 6, generator=torch.Generator().manual_seed(2)) < 0.5
    set_mask(layer, mask)
    control = MovingMasks(RigL(40, every=5, until=0.5, drop=0.4), model, ["0"], 40)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    changes = []
    for number in range(40):
        before = masks(model)["0"].clone()
        optimizer.zero_grad()
        x = torch.randn(10, 6)
        (model(x) - x.repeat(1, 2)[:, :8]).square().mean().backward()
        optimizer.step()
        moved = layer.weight.detach().clone()
        gradient = layer.weight.grad.clone()  # type: ignore[union-attr,operator]
        control(number, optimizer)
        after = masks(model)["0"]
        assert int(after.sum()) == int(mask.sum())
        if not torch.equal(before, after):
            changes.append(number + 1)
            count = int(drop_share(number + 1, 20, 0.4) * int(mask.sum()))
            assert torch.equal(after, exchange(moved, before, gradient.abs(), count))
            grown = after & ~before
            assert (layer.weight[grown] == 0).all()  # type: ignore[index]
            assert (optimizer.state[layer.weight]["momentum_buffer"][grown] == 0).all()  # type: ignore[index]
            assert torch.equal(layer.weight[before & after], moved[before & after])  # type: ignore[index]
        set_mask(layer, after)
    assert changes
    assert set(changes) <= {5, 10, 15}


def test_rigl_keeps_every_layers_count_all_along_and_replaces_old_masks(digits_task: Task) -> None:
    counts, moved = set(), []

    class Watched(RigL):
        def train(self, model: nn.Module, task: Task, **settings: Any) -> nn.Module:
            inner = settings["after_step"]

            def after_step(number: int, optimizer: torch.optim.Optimizer) -> None:
                before = masks(model)["conv3"].clone()
                inner(number, optimizer)
                counts.add(tuple(int(masks(model)[name].sum()) for name in SIZES))
                moved.append(not torch.equal(before, masks(model)["conv3"]))

            return super().train(model, task, after_step=after_step)

    model = Sparsify({"conv3": 0.99, "fc": 0.5})(digits_task.build(), digits_task)
    head = masks(model)["fc"].clone()
    model = Watched(**SHORT, sparsity=0.75, distribution="uniform", every=4)(model, digits_task)
    assert counts == {tuple(size - round(0.75 * size) for size in SIZES.values())}
    assert [number + 1 for number, change in enumerate(moved) if change] == [4, 8]
    assert torch.equal(masks(model)["fc"], head), "layers that it does not take keep their masks"


def test_rigl_takes_a_share_by_layer(digits_task: Task) -> None:
    model = RigL(2, sparsity={"conv2": 0.5, "fc": 0.25}, alpha=0.0)(digits_task.build(), digits_task)
    assert sparsity_by_layer(model) == {"conv1": 0.0, "conv2": 0.5, "conv3": 0.0, "fc": 0.25}


def test_adams_moments_of_single_weights_are_cleared() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    forget(optimizer, weight, torch.tensor([True, False, False]))
    state = optimizer.state[weight]
    assert state["exp_avg"][0] == 0
    assert state["exp_avg_sq"][0] == 0
    assert (state["exp_avg"][1:] != 0).all()


def test_new_weights_depend_on_the_seed_alone(digits_task: Task) -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = reinitialise(digits_task.build(), 3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert same_state(first, reinitialise(reinitialise(digits_task.build(), 4), 3))
    conv = first.get_submodule("conv2").weight
    assert float(conv.detach().abs().max()) <= 1 / math.sqrt(32 * 9)  # type: ignore[operator]
    assert (first.get_submodule("bn1").running_mean == 0).all()


def test_parameters_that_cannot_be_drawn_anew_are_named() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.full((2,), 7.0))
            self.fc = nn.Linear(2, 2)

    with collect_notes() as notes:
        model = reinitialise(Scaled(), 0)
    assert notes == ["reinitialise: gain: their modules can't reset them, so that they keep their values"]
    assert model.get_parameter("gain").tolist() == [7.0, 7.0]


LEGS: list[tuple[Schedule | None, dict[str, Tensor]]] = []
ENDS: list[dict[str, Tensor]] = []


class WatchedTicket(LotteryTicket):
    """Notes the weights that each training begins and ends with."""

    def train(self, model: nn.Module, task: Task, **settings: Any) -> nn.Module:
        LEGS.append((settings.get("schedule"), copy.deepcopy(model.state_dict())))
        trained = super().train(model, task, **settings)
        ENDS.append(copy.deepcopy(trained.state_dict()))
        return trained


def ticket_legs(task: Task, **settings: Any) -> nn.Module:
    """Run a watched ticket; the result, with LEGS and ENDS filled anew."""
    LEGS.clear()
    ENDS.clear()
    return WatchedTicket(**SHORT, sparsity=0.75, rounds=2, **settings)(task.build(), task)


def test_a_ticket_goes_back_to_its_first_weights_before_each_training(digits_task: Task) -> None:
    ticket_legs(digits_task, rewind_to=0.0, scope="layer")
    assert [schedule.steps if schedule else None for schedule, _ in LEGS] == [None, 12, 12]
    start = reinitialise(digits_task.build(), 0).state_dict()
    assert all(torch.equal(LEGS[0][1][name], tensor) for name, tensor in start.items())
    for number, share in ((1, 0.5), (2, 0.75)):
        _, state = LEGS[number]
        for name, size in SIZES.items():
            mask = state[f"{name}.weight_mask"]
            assert torch.equal(state[f"{name}.weight"], start[f"{name}.weight"] * mask)
            assert int((~mask).sum()) == round(share * size)
            # The smallest of the weights that the training before has ended with.
            ended = ENDS[number - 1][f"{name}.weight"].abs()
            assert ended[~mask].max() <= ended[mask].min()
        assert torch.equal(state["fc.weight"], start["fc.weight"])
        assert torch.equal(state["bn1.running_mean"], start["bn1.running_mean"])


def test_a_ticket_can_go_back_to_an_early_step(digits_task: Task) -> None:
    ticket_legs(digits_task, rewind_to=0.25)
    assert [schedule.steps if schedule else None for schedule, _ in LEGS] == [None, 9, 9]
    first = reinitialise(digits_task.build(), 0).get_submodule("conv3").weight
    later = [state["conv3.weight"] for _, state in LEGS[1:]]
    alive = LEGS[2][1]["conv3.weight_mask"]
    assert torch.equal(later[0][alive], later[1][alive])
    assert not torch.equal(later[1][alive], first[alive])  # type: ignore[index]
    assert not torch.equal(later[1][alive], ENDS[0]["conv3.weight"][alive])


def test_rewinding_the_learning_rate_keeps_the_trained_weights(digits_task: Task) -> None:
    model = ticket_legs(digits_task, rewind_to=0.5, rewind="learning-rate")
    assert [schedule.steps for schedule, _ in LEGS if schedule] == [6, 6]
    given = digits_task.build().state_dict()
    for (_, begin), before in zip(LEGS, (given, ENDS[0]), strict=True):
        for name in SIZES:
            mask = begin[f"{name}.weight_mask"]
            assert torch.equal(begin[f"{name}.weight"], before[f"{name}.weight"] * mask)
    assert sum(masked(model).values()) == round(0.75 * sum(SIZES.values()))


def test_what_is_left_of_a_schedule_has_its_rates() -> None:
    whole = Schedule(20, lr=0.3, warmup=0.3, ema=0.9)
    rest = rest_of(whole, 4)
    assert [rest.rate(step) for step in range(16)] == [whole.rate(step) for step in range(4, 20)]
    assert (rest.steps, rest.ema) == (16, 0.9)


def test_each_round_takes_the_same_share_of_what_is_left() -> None:
    left = [1 - share_after(number, 4, 0.8) for number in range(5)]
    assert [b / a for a, b in pairwise(left)] == pytest.approx([0.2**0.25] * 4)
    assert share_after(4, 4, 0.8) == 0.8


def test_going_back_leaves_masks_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    point = snapshot(model)
    with torch.no_grad():
        model[0].weight.add_(1)
    mask = torch.tensor([[True, False], [False, True]])
    set_mask(model[0], mask)
    assert set(snapshot(model)) == set(point) == {"0.weight", "0.bias"}
    go_back(model, point)
    assert torch.equal(masks(model)["0"], mask)
    assert torch.equal(model[0].weight, point["0.weight"] * mask)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (GradualPrune, {"criterion": "taylor"}, "criterion must be one of magnitude, movement, not 'taylor'"),
        (GradualPrune, {"begin": 0.8}, "expected 0 <= begin < end <= 1, not 0.8 and 0.75"),
        (GradualPrune, {"every": 0}, "every must be at least 1, not 0"),
        (GradualPrune, {"patience": 2}, "patience must be 0"),
        (GradualPrune, {"pattern": "3:2"}, "pattern must be"),
        (GradualPrune, {"lr": 0.0}, "lr and temperature must be above 0"),
        (RigL, {"sparsity": 1.0}, "sparsity must be at least 0 and below 1"),
        (RigL, {"method": "deep-r"}, "method must be one of rigl, set, not 'deep-r'"),
        (RigL, {"distribution": "er"}, "distribution must be one of erk, uniform, not 'er'"),
        (RigL, {"start": "zero"}, "start must be one of trained, scratch, not 'zero'"),
        (RigL, {"drop": 0.0}, "expected 0 < drop <= 1 and 0 <= until <= 1, not 0.0 and 0.75"),
        (RigL, {"every": 0}, "every must be at least 1, not 0"),
        (LotteryTicket, {"rounds": 0}, "rounds must be at least 1, not 0"),
        (LotteryTicket, {"rewind": "all"}, "rewind must be one of weights, learning-rate, not 'all'"),
        (LotteryTicket, {"rewind_to": 1.0}, "rewind_to must be at least 0 and below 1, not 1.0"),
        (LotteryTicket, {"scope": "x"}, "scope must be one of global, layer, not 'x'"),
    ],
)
def test_impossible_settings_are_refused_at_once(
    kind: Callable[..., Operator], settings: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        kind(**settings)
