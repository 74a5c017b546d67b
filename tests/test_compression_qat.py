"""Training through rounding: its gradients, what it leaves behind, and what it is worth."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autocompress import Finetune, InputError, Quantize, Task
from autocompress.compression.grids import Grid, activation_grid, weight_grid
from autocompress.compression.masks import set_mask
from autocompress.compression.qat import Qat, float_weights
from autocompress.compression.quantization import quantized_layers
from autocompress.compression.rounding import TrainedGrid, trainable_rounding
from autocompress.compression.training import accuracy, search_loss
from autocompress.core.codec import decode_plan, encode_plan
from autocompress.core.errors import CandidateError
from autocompress.evaluators.metrics import parity_error
from autocompress.hardware.x86 import CpuBackend
from autocompress.tasks.data import normalise

LAYERS = ("conv1", "conv2", "conv3", "fc")


def values(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def inputs(task: Task, count: int = 200) -> Tensor:
    """The first inputs of the search split."""
    return torch.from_numpy(normalise(task.data, task.data.search.inputs[:count]))


def logits(model: nn.Module, task: Task, count: int = 200) -> Tensor:
    """What a model makes of them."""
    with torch.no_grad():
        return model.eval()(inputs(task, count))


def weight_of(model: nn.Module, layer: str) -> Tensor:
    """A layer's weight."""
    return cast("Tensor", model.get_submodule(layer).weight).detach()


def scales(model: nn.Module) -> dict[str, Tensor]:
    """All scales, by their names in the state dict."""
    return {name: tensor for name, tensor in model.state_dict().items() if name.endswith(".scale")}


def check_on_grid(model: nn.Module) -> None:
    """Every weight is bit for bit an integer of its range times its scale, and rounding it changes nothing."""
    entries = quantized_layers(model)
    assert entries
    for name, entry in entries.items():
        weight, grid = weight_of(model, name), entry.weight
        assert isinstance(grid, Grid)
        integers = grid.integers(weight)
        assert int(integers.min()) >= grid.low
        assert int(integers.max()) <= grid.high
        assert torch.equal(integers * grid.scale.view(-1, *[1] * (weight.ndim - 1)), weight)
        assert torch.equal(grid.round(weight), weight)


def lsq(v: Tensor, s: Tensor, qn: float, qp: float, g: float) -> Tensor:
    """The quantizer of LSQ as its paper's pseudo-code has it: gradscale, clamp, roundpass."""
    s = (s - s * g).detach() + s * g
    inside = (v / s).clamp(-qn, qp)
    return ((inside.round() - inside).detach() + inside) * s


SHAPE = (6, 8, 3, 3)
WEIGHT = values(1, *SHAPE, scale=0.2)
GRIDS = {
    "channel": weight_grid(WEIGHT, 4),
    "tensor": weight_grid(WEIGHT, 3, granularity="tensor"),
    "group": weight_grid(WEIGHT, 4, granularity="group", group=12),
    "zero points": weight_grid(WEIGHT, 3, symmetric=False),
    "input scales": weight_grid(WEIGHT, 4, input_scale=torch.linspace(0.5, 2.0, 8)),
    "ternary": weight_grid(WEIGHT, 1.58),
    "binary": weight_grid(WEIGHT, 1),
    "fp8": weight_grid(WEIGHT, "fp8"),
    "unsigned": activation_grid(0.0, 0.3, 4, True),
    "signed": activation_grid(-0.3, 0.2, 4, True),
    "zero point": activation_grid(-0.1, 0.3, 4, False),
}


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("kind", GRIDS)
def test_trained_rounding_is_bit_for_bit_that_of_the_grid(kind: str, learn: bool) -> None:
    grid = copy.deepcopy(GRIDS[kind])
    x = values(2, *SHAPE, scale=0.3)
    expected, before = grid.round(x), grid.scale.clone()
    trained = TrainedGrid(grid, learn_scale=learn, per_sample=False)
    assert torch.equal(trained.round(x.requires_grad_(True)), expected)
    assert torch.equal(trained.finish().scale, before)
    assert "scale" in dict(grid.named_buffers())
    assert list(grid.parameters()) == []


def test_values_in_low_precision_are_rounded_in_float32() -> None:
    grid = activation_grid(0.0, 1.0, 8, True)
    x = values(3, 512).bfloat16()
    rounded = TrainedGrid(copy.deepcopy(grid), learn_scale=True, per_sample=True).round(x)
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, grid.round(x.float()))


@pytest.mark.parametrize(
    ("kind", "per_sample"),
    [
        *[(kind, False) for kind in ("channel", "tensor", "group", "zero points", "unsigned", "signed", "zero point")],
        *[(kind, True) for kind in ("unsigned", "signed", "zero point")],
    ],
)
def test_gradients_are_those_of_the_learned_step_size_paper(kind: str, per_sample: bool) -> None:
    grid = copy.deepcopy(GRIDS[kind])
    # Steps small enough for values beyond both ends.
    grid.scale.mul_(0.6)
    rows = grid.scale.numel()
    zeros = [grid.zero_point] * rows if grid.zero_points is None else grid.zero_points.tolist()
    x, arriving = values(4, *SHAPE, scale=0.25), values(5, *SHAPE)
    v = x.double().requires_grad_(True)
    s = grid.scale.detach().double().reshape(-1).requires_grad_(True)
    count = x[0].numel() if per_sample else x.numel() // rows
    pieces = [
        lsq(
            piece,
            s[row],
            zeros[row] - grid.low,
            grid.high - zeros[row],
            1 / math.sqrt(count * (grid.high - zeros[row])),
        )
        for row, piece in enumerate(v.reshape(rows, -1))
    ]
    torch.stack(pieces).reshape(SHAPE).backward(arriving.double())
    trained = TrainedGrid(grid, learn_scale=True, per_sample=per_sample)
    trained.round(x.requires_grad_(True)).backward(arriving)
    assert x.grad is not None
    assert v.grad is not None
    assert s.grad is not None
    assert torch.equal(x.grad.double(), v.grad)
    assert 0 < int((x.grad == 0).sum()) < x.numel()
    assert grid.scale.grad is not None
    assert torch.allclose(grid.scale.grad.double(), s.grad, rtol=1e-4, atol=1e-6)


def test_the_gradient_of_a_step_has_the_closed_form() -> None:
    step, v = 0.5, torch.tensor([-9.0, -1.3, -0.2, 0.0, 0.3, 1.1, 3.2, 4.0])
    q = v / step
    for number in range(len(v)):
        grid = Grid(torch.tensor(step), 0, -8, 7)
        TrainedGrid(grid, learn_scale=True, per_sample=False).round(v[number : number + 1]).sum().backward()
        expected = -8.0 if q[number] <= -8 else 7.0 if q[number] >= 7 else float(q[number].round() - q[number])
        assert grid.scale.grad is not None
        assert float(grid.scale.grad) == pytest.approx(expected / math.sqrt(1 * 7), abs=1e-6)


def test_with_frozen_scales_gradients_pass_within_the_range_and_nowhere_else() -> None:
    x = torch.tensor([-2.0, -0.3, -0.01, 0.01, 0.7, 1.49, 1.51, 9.0], requires_grad=True)
    grid = Grid(torch.tensor(0.1), 0, 0, 15)
    TrainedGrid(grid, learn_scale=False, per_sample=True).round(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 0, 0, 1, 1, 1, 0, 0]
    assert grid.scale.grad is None


@pytest.mark.parametrize("bits", [1, 1.58])
def test_gradients_pass_to_every_binary_or_ternary_weight(bits: float) -> None:
    grid = weight_grid(WEIGHT, bits)
    weight = WEIGHT.clone().requires_grad_(True)
    rounded = TrainedGrid(grid, learn_scale=True, per_sample=False).round(weight)
    rounded.backward(torch.ones(SHAPE))
    assert weight.grad is not None
    assert grid.scale.grad is not None
    assert torch.equal(weight.grad, torch.ones(SHAPE))
    signs = (rounded.detach() / grid.scale.detach().view(-1, 1, 1, 1)).flatten(1).sum(1)
    assert torch.allclose(grid.scale.grad, signs / math.sqrt(WEIGHT[0].numel()), rtol=1e-4, atol=1e-5)


def test_scales_stay_positive() -> None:
    trained = TrainedGrid(weight_grid(WEIGHT, 4), learn_scale=True, per_sample=False)
    trained.grid.scale.data.fill_(-1.0)
    assert bool(trained.round(WEIGHT).isfinite().all())
    trained.grid.scale.data.fill_(-1.0)
    assert float(trained.finish().scale.min()) > 0


def test_training_starts_from_the_float_weights_that_round_to_the_quantized_ones(digits_task: Task) -> None:
    step = Qat(bits=4)
    weights = float_weights(digits_task.build(), digits_task)
    model = step.prepare(digits_task.build(), digits_task)
    with trainable_rounding(model, weights=weights):
        for name in LAYERS:
            module = model.get_submodule(name)
            assert torch.equal(module.parametrizations.weight.original, weights[name])  # type: ignore[union-attr]
    untrained = step.prepare(digits_task.build(), digits_task)
    for name in LAYERS:
        assert not torch.equal(weight_of(untrained, name), weights[name])
        assert torch.equal(weight_of(model, name), weight_of(untrained, name))
    assert torch.equal(logits(model, digits_task), logits(untrained, digits_task))


@pytest.fixture(scope="module")
def trained(digits_task: Task) -> nn.Module:
    """The digits model, trained in 4 bits; read only."""
    return Qat(bits=4, steps=20, batch_size=32)(digits_task.build(), digits_task)


def test_trained_weights_lie_on_grids_with_scales_that_were_learned(digits_task: Task, trained: nn.Module) -> None:
    check_on_grid(trained)
    before, after = scales(Qat(bits=4).prepare(digits_task.build(), digits_task)), scales(trained)
    assert before.keys() == after.keys()
    assert {f"{name}.quantization.{side}.scale" for name in LAYERS for side in ("weight", "input")} <= set(after)
    assert all(before[name].shape == after[name].shape for name in before)
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert all(float(scale.min()) > 0 for scale in after.values())
    assert not any(name.endswith(".scale") for name, _ in trained.named_parameters())


def test_a_few_steps_move_small_scales_a_little(digits_task: Task) -> None:
    step = Qat(bits=8, steps=4, batch_size=32)
    before, after = (
        scales(step.prepare(digits_task.build(), digits_task)),
        scales(step(digits_task.build(), digits_task)),
    )
    for name, scale in before.items():
        assert 0 < float((after[name] / scale).log().abs().max()) < 0.2


def test_scales_that_are_not_learned_stay_as_calibrated(digits_task: Task) -> None:
    step = Qat(bits=4, steps=5, learn_scales=False)
    model, before = step(digits_task.build(), digits_task), step.prepare(digits_task.build(), digits_task)
    check_on_grid(model)
    assert all(torch.equal(scale, scales(model)[name]) for name, scale in scales(before).items())
    assert not torch.equal(weight_of(model, "conv2"), weight_of(before, "conv2"))


def test_a_prepared_model_with_the_stored_weights_computes_exactly_the_same(
    digits_task: Task, trained: nn.Module
) -> None:
    again = Qat(bits=4).prepare(digits_task.build(), digits_task)
    assert not torch.equal(logits(again, digits_task), logits(trained, digits_task))
    again.load_state_dict(trained.state_dict())
    assert torch.equal(logits(again, digits_task), logits(trained, digits_task))


def test_the_same_seed_trains_the_same_model(digits_task: Task, trained: nn.Module) -> None:
    model = Qat(bits=4, steps=20, batch_size=32)(digits_task.build(), digits_task)
    assert all(torch.equal(tensor, trained.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("bits", "learn", "gain", "floor"), [(2, True, 0.3, 0.8), (3, False, 0.05, 0.94), (1.58, True, 0.2, 0.95)]
)
def test_training_with_rounding_recovers_most_of_what_it_costs(
    digits_task: Task, bits: float, learn: bool, gain: float, floor: float
) -> None:
    data = digits_task.data
    step = Qat(bits=bits, steps=50, batch_size=64, lr=3e-3, learn_scales=learn)
    rounded = accuracy(step.prepare(digits_task.build(), digits_task), data, data.search)
    model = step(digits_task.build(), digits_task)
    found = accuracy(model, data, data.search)
    assert found > rounded + gain
    assert found > floor
    assert all(len(row.unique()) <= 2 ** math.ceil(bits) for row in weight_of(model, "conv3").flatten(1))


def test_training_with_rounding_beats_training_before_it(digits_task: Task) -> None:
    def loss(model: nn.Module) -> float:
        return search_loss(model, digits_task.data, digits_task.data.search)

    step = Qat(bits=2, steps=40, batch_size=32, lr=3e-3)
    before = Finetune(40, lr=step.lr, optimizer=step.optimizer, batch_size=32)(digits_task.build(), digits_task)
    assert loss(step(digits_task.build(), digits_task)) < 0.5 * loss(step.quantize()(before, digits_task))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_file_of_a_trained_model_computes_what_pytorch_computes(
    digits_task: Task, tmp_path: Path, bits: int, runtime: str
) -> None:
    backend = CpuBackend(runtime)
    model = Qat(bits=bits, steps=4, outputs=backend.capabilities.outputs)(digits_task.build(), digits_task)
    artifact = backend.build(model, digits_task, tmp_path)
    got = backend.predict(artifact, inputs(digits_task).numpy())
    # An int8 sum may fall to the other side of a step.
    assert parity_error(logits(model, digits_task).numpy(), got) < 0.05
    assert np.mean(got.argmax(1) == logits(model, digits_task).argmax(1).numpy()) > 0.99


def test_each_layer_may_have_its_own_bits(digits_task: Task) -> None:
    model = Qat(bits={"conv1": 8, "conv2": 3, "fc": 16}, steps=10)(digits_task.build(), digits_task)
    entries = quantized_layers(model)
    assert {name: entry.bits for name, entry in entries.items()} == {"conv1": 8, "conv2": 3, "fc": 16}
    for name in ("conv1", "conv2"):
        grid = entries[name].weight
        assert grid is not None
        assert torch.equal(grid.round(weight_of(model, name)), weight_of(model, name))
    assert all(len(row.unique()) <= 7 for row in weight_of(model, "conv2").flatten(1))
    half, free = weight_of(model, "fc"), weight_of(model, "conv3")
    assert torch.equal(half, half.half().float())
    assert not torch.equal(free, free.half().float())


@pytest.mark.parametrize(
    "settings",
    [
        {"granularity": "group", "group_size": 8},
        {"granularity": "tensor", "weight_symmetric": False, "symmetric": False},
        {"bits": "fp8"},
        {"activations": 32},
        {"activations": "dynamic"},
        {"bits": 1},
    ],
)
def test_every_format_can_be_trained(digits_task: Task, settings: dict[str, Any]) -> None:
    step = Qat(**{"bits": 4, "steps": 3, **settings})
    model = step(digits_task.build(), digits_task)
    for name, entry in quantized_layers(model).items():
        assert entry.weight is not None
        assert torch.allclose(entry.weight.round(weight_of(model, name)), weight_of(model, name), rtol=1e-6)
    again = step.prepare(digits_task.build(), digits_task)
    assert not all(torch.equal(scale, scales(model)[name]) for name, scale in scales(again).items())
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again, digits_task), logits(model, digits_task))


def test_averaged_and_early_stopped_training_leaves_weights_on_their_grids(digits_task: Task) -> None:
    step = Qat(bits=3, steps=20, batch_size=32, ema=0.9, patience=2)
    model = step(digits_task.build(), digits_task)
    check_on_grid(model)
    again = step.prepare(digits_task.build(), digits_task)
    assert search_loss(model, digits_task.data, digits_task.data.search) < search_loss(
        again, digits_task.data, digits_task.data.search
    )
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again, digits_task), logits(model, digits_task))


def masked_model(task: Task) -> nn.Module:
    """The digits model without the smaller half of the weights of `conv2`."""
    model = task.build()
    weight = weight_of(model, "conv2")
    set_mask(model.get_submodule("conv2"), weight.abs() > weight.abs().median())
    return model


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_masked_weights_stay_zero(digits_task: Task, ema: float) -> None:
    model = Qat(bits=4, steps=5, ema=ema)(masked_model(digits_task), digits_task)
    mask = cast("Tensor", model.get_submodule("conv2").weight_mask)
    assert not mask.all()
    assert bool((weight_of(model, "conv2")[~mask] == 0).all())
    check_on_grid(model)


def test_fine_tuning_a_quantized_model_keeps_it_quantized(digits_task: Task) -> None:
    model = Quantize(3)(digits_task.build(), digits_task)
    before = {name: scale.clone() for name, scale in scales(model).items()}
    loss = search_loss(model, digits_task.data, digits_task.data.search)
    model = Finetune(30, lr=0.01)(model, digits_task)
    check_on_grid(model)
    assert all(torch.equal(scale, before[name]) for name, scale in scales(model).items())
    assert search_loss(model, digits_task.data, digits_task.data.search) < 0.5 * loss


def test_a_training_that_fails_leaves_the_model_as_quantization_makes_it(digits_task: Task) -> None:
    model = digits_task.build()
    with pytest.raises(CandidateError, match="training diverged"):
        Qat(bits=4, lr=1e9, steps=10)(model, digits_task)
    assert model.state_dict().keys() == Qat(bits=4).prepare(digits_task.build(), digits_task).state_dict().keys()
    assert all(isinstance(entry.weight, Grid) for entry in quantized_layers(model).values())


def test_a_block_inside_another_changes_nothing(digits_task: Task) -> None:
    model = Quantize(4)(digits_task.build(), digits_task)
    with trainable_rounding(model, learn_scales=True):
        names = list(dict(model.named_parameters()))
        assert sum(name.endswith("scale") for name in names) > len(LAYERS)
        with trainable_rounding(model):
            assert list(dict(model.named_parameters())) == names
        assert list(dict(model.named_parameters())) == names
    plain = digits_task.build()
    with trainable_rounding(plain, learn_scales=True):
        assert plain.state_dict().keys() == digits_task.build().state_dict().keys()


def test_no_steps_leave_the_quantized_model(digits_task: Task) -> None:
    step = Qat(bits=4, steps=0)
    model, expected = step(digits_task.build(), digits_task), step.prepare(digits_task.build(), digits_task)
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (Qat(bits=4), "QAT int4, 100 steps"),
        (Qat(bits={"conv1": 8, "fc": 2}, epochs=1.5), "QAT int2+int8, 1.5 epochs"),
        (Qat(bits=1.58, steps=7), "QAT ternary, 7 steps"),
    ],
)
def test_a_step_describes_itself_and_survives_storage(step: Qat, text: str) -> None:
    assert step.describe() == text
    assert decode_plan(encode_plan((step,))) == (step,)
    assert (step.rank, step.retrains) == (50, True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 9}, "^Qat: bits must be one of .*, not 9"),
        ({"bits": {}}, "^Qat: bits names no layer"),
        ({"bits": 32}, "^Qat: nothing is rounded to 8 bits or fewer"),
        ({"bits": {"fc": 16}}, "^Qat: nothing is rounded to 8 bits or fewer"),
        ({"calibrator": "best"}, "^Qat: calibrator must be one of"),
        ({"samples": 0}, "^Qat: samples must be at least 1, not 0"),
        ({"lr": 0.0}, "^Qat: lr and temperature must be above 0"),
        ({"steps": -1}, "^Qat: steps must be at least 0, not -1"),
    ],
)
def test_impossible_settings_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Qat(**settings)


def test_models_that_can_not_be_trained_so_fail_the_candidate(digits_task: Task) -> None:
    with pytest.raises(CandidateError, match="quantized already"):
        Qat(bits=4)(Quantize(8)(digits_task.build(), digits_task), digits_task)
    with pytest.raises(CandidateError, match="no layer called nowhere"):
        Qat(bits={"nowhere": 4})(digits_task.build(), digits_task)
    with pytest.raises(CandidateError, match="conv2: masked weights must stay zero, binary ones can't"):
        Qat(bits=1)(masked_model(digits_task), digits_task)
