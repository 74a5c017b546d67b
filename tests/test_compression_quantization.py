"""Quantization: the grids, their rounding, what calibration finds, and what is left alone."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from autocompress import Data, InputError, Quantize, Split, Task, load_task
from autocompress.compression.graph import find_layers, fold_batchnorm
from autocompress.compression.quantization import (
    Grid,
    activation_grid,
    quantized_layers,
    weight_grid,
    without_rounding,
)
from autocompress.compression.training import accuracy
from autocompress.core.errors import CandidateError
from autocompress.tasks.data import example_input, normalise

LAYERS = ("conv1", "conv2", "conv3", "fc")


class Branching(nn.Module):
    """Signed and unsigned inputs, a value with two takers, biases, and one channel in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.left = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.thin = nn.Conv2d(8, 1, 1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        x = x + self.left(F.relu(x)) * self.thin(x)
        return self.fc(x.mean((2, 3)))


@pytest.fixture(scope="module")
def branching() -> Task:
    """The branching model with lively batch-norm statistics, on sixteen noise images of 8x8."""

    def build() -> nn.Module:
        torch.manual_seed(3)
        model = Branching()
        with torch.no_grad():
            for tensor in (model.norm.weight, model.norm.running_var):
                tensor.uniform_(0.5, 2.0)
            for tensor in (model.norm.bias, model.norm.running_mean):
                tensor.normal_()
        return model.eval()

    rng = np.random.default_rng(4)
    noise = Split(rng.integers(0, 256, (16, 3, 8, 8), dtype=np.uint8), np.arange(16) % 4)
    data = Data("noise", noise, noise, noise, ("a", "b", "c", "d"), (0.5,) * 3, (0.25,) * 3)
    return Task("branching on noise", build, data, trained=False)


def search_logits(model: nn.Module, task: Task) -> Tensor:
    """Logits of the search split."""
    with torch.no_grad():
        return model.eval()(torch.from_numpy(normalise(task.data, task.data.search.inputs)))


def values(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def run_qdq(x: np.ndarray, scale: np.ndarray, zero_point: np.ndarray) -> np.ndarray:
    """What ONNX Runtime makes of QuantizeLinear and DequantizeLinear, one scale per row where there are several."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], axis=0),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], axis=0),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape) for name in ("x", "y")]
    stored = [numpy_helper.from_array(scale, "s"), numpy_helper.from_array(zero_point, "z")]
    graph = helper.make_graph(nodes, "qdq", ends[:1], ends[1:], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("bits", [8, 7, 4, 3, 2])
@pytest.mark.parametrize(("low", "high", "symmetric"), [(0.0, 4.0, True), (-3.0, 2.0, True), (-1.0, 5.0, False)])
def test_activations_round_bit_for_bit_like_torch_fake_quantization(
    low: float, high: float, symmetric: bool, bits: int
) -> None:
    grid = activation_grid(low, high, bits, symmetric)
    x = values(bits, 4096, scale=4.0)
    expected = torch.fake_quantize_per_tensor_affine(x, float(grid.scale), grid.zero_point, grid.low, grid.high)
    assert torch.equal(grid.round(x), expected)
    assert len(expected.unique()) <= 2**bits


@pytest.mark.parametrize("bits", [8, 5, 2])
@pytest.mark.parametrize("shape", [(16, 3, 3, 3), (10, 64), (1, 8, 1, 1)])
def test_weights_round_bit_for_bit_like_torch_fake_quantization(shape: tuple[int, ...], bits: int) -> None:
    weight = values(bits, *shape)
    grid = weight_grid(weight, bits)
    zeros = torch.zeros(shape[0], dtype=torch.int32)
    top = 2 ** (bits - 1) - 1
    expected = torch.fake_quantize_per_channel_affine(weight, grid.scale, zeros, 0, -top, top)
    assert torch.equal(grid.round(weight), expected)


def test_int8_weights_round_like_onnx_quantize_linear() -> None:
    weight = values(0, 12, 5, 3, 3)
    grid = weight_grid(weight, 8)
    scale = grid.scale.numpy()
    got = grid.integers(weight).numpy().astype(np.float32) * scale[:, None, None, None]
    assert np.array_equal(got, run_qdq(weight.numpy(), scale, np.zeros(12, np.int8)))


@pytest.mark.parametrize(("low", "high", "symmetric"), [(0.0, 3.7, True), (-2.1, 1.3, True), (-0.9, 4.2, False)])
def test_int8_activations_round_like_onnx_quantize_linear(low: float, high: float, symmetric: bool) -> None:
    grid = activation_grid(low, high, 8, symmetric)
    # Beyond both ends too: what does not fit is clipped, not wrapped.
    x = np.linspace(1.5 * low - 1, 1.5 * high + 1, 20001, dtype=np.float32)
    scale = grid.scale.numpy()
    kind = np.int8 if grid.low < 0 else np.uint8
    got = (grid.integers(torch.from_numpy(x)).numpy() - grid.zero_point).astype(np.float32) * scale
    assert np.array_equal(got, run_qdq(x, scale, np.asarray(grid.zero_point, kind)))


def test_a_value_halfway_between_two_grid_values_goes_to_the_even_one() -> None:
    grid = Grid(torch.tensor(0.5), 0, -128, 127)
    halves = torch.tensor([-1.25, -0.75, -0.25, 0.25, 0.75, 1.25])
    assert grid.integers(halves).tolist() == [-2, -2, 0, 0, 2, 2]
    assert grid.round(halves).tolist() == [-1.0, -1.0, 0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize(
    ("low", "high", "symmetric"),
    [(0.0, 1.7, True), (0.3, 1.7, False), (-0.4, 1.7, True), (-0.4, 1.7, False), (-2.0, -0.5, False), (0.0, 0.0, True)],
)
def test_every_activation_grid_holds_zero_exactly(low: float, high: float, symmetric: bool, bits: int) -> None:
    grid = activation_grid(low, high, bits, symmetric)
    assert grid.low <= grid.zero_point <= grid.high
    assert grid.round(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]


def test_a_grid_for_values_without_negative_ones_is_unsigned() -> None:
    grid = activation_grid(0.2, 5.1, 8, symmetric=True)
    assert (grid.zero_point, grid.low, grid.high) == (0, 0, 255)
    assert float(grid.round(torch.tensor([5.1]))) == pytest.approx(5.1)


def test_a_symmetric_grid_is_signed_around_zero_and_reaches_the_larger_end() -> None:
    grid = activation_grid(-3.0, 1.0, 8, symmetric=True)
    assert (grid.zero_point, grid.low, grid.high) == (0, -128, 127)
    assert grid.integers(torch.tensor([-3.0])).tolist() == [-127]


def test_an_asymmetric_grid_spends_all_its_values_between_the_ends() -> None:
    grid = activation_grid(-1.0, 3.0, 8, symmetric=False)
    assert (grid.low, grid.high, grid.zero_point) == (0, 255, 64)
    assert grid.integers(torch.tensor([-1.0, 3.0])).tolist() == [0, 255]


def test_the_largest_weight_of_each_channel_becomes_127() -> None:
    weight = values(1, 6, 4, 3, 3) * torch.tensor([1e-3, 0.1, 1.0, 10.0, 1e3, 1.0])[:, None, None, None]
    integers = weight_grid(weight, 8).integers(weight).flatten(1)
    position = weight.flatten(1).abs().argmax(1)
    signs = weight.flatten(1).gather(1, position[:, None]).sign().flatten()
    assert integers.gather(1, position[:, None]).flatten().tolist() == (signs * 127).int().tolist()
    assert int(integers.abs().amax()) == 127


def test_a_channel_of_zeros_stays_zero() -> None:
    weight = values(2, 3, 8)
    weight[1] = 0
    grid = weight_grid(weight, 4)
    assert torch.isfinite(grid.scale).all()
    assert grid.round(weight)[1].tolist() == [0.0] * 8


def test_int8_keeps_the_accuracy_of_the_digits_model(digits_task: Task) -> None:
    data = digits_task.data
    before = accuracy(digits_task.build(), data, data.search)
    after = accuracy(Quantize(8)(digits_task.build(), digits_task), data, data.search)
    assert before > 0.9
    assert abs(before - after) <= 0.02


def test_fewer_bits_move_the_logits_further(digits_task: Task) -> None:
    expected = search_logits(digits_task.build(), digits_task)

    def error(bits: int) -> float:
        model = Quantize(bits)(digits_task.build(), digits_task)
        return float((search_logits(model, digits_task) - expected).square().mean())

    errors = [error(bits) for bits in (16, 8, 6, 4, 2)]
    assert errors == sorted(errors)
    assert errors[-1] > 100 * errors[1]


def test_the_weights_of_a_quantized_layer_lie_on_its_grid(digits_task: Task) -> None:
    model = Quantize(4)(digits_task.build(), digits_task)
    for name, entry in quantized_layers(model).items():
        weight = model.get_submodule(name).weight
        assert entry.weight is not None
        assert torch.equal(entry.weight.round(weight), weight)
        assert all(len(channel.unique()) <= 15 for channel in weight.flatten(1))


def test_a_quantized_layer_sees_only_values_of_its_input_grid(digits_task: Task) -> None:
    model = Quantize(3)(digits_task.build(), digits_task)
    seen: list[Tensor] = []
    model.get_submodule("conv2").register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    search_logits(model, digits_task)
    assert len(seen[0].unique()) <= 8


def test_layers_that_a_map_does_not_name_are_left_alone(digits_task: Task) -> None:
    model = Quantize({"conv2": 4, "fc": 16})(digits_task.build(), digits_task)
    folded = digits_task.build()
    fold_batchnorm(folded, find_layers(folded, torch.zeros(1, 1, 8, 8)))
    assert {name: entry.bits for name, entry in quantized_layers(model).items()} == {"conv2": 4, "fc": 16}
    for name in LAYERS:
        same = torch.equal(model.get_submodule(name).weight, folded.get_submodule(name).weight)
        assert same == (name in ("conv1", "conv3"))
        assert torch.equal(model.get_submodule(name).bias, folded.get_submodule(name).bias)


def test_32_bits_change_nothing_but_the_batch_norms(digits_task: Task) -> None:
    model = Quantize(32)(digits_task.build(), digits_task)
    assert quantized_layers(model) == {}
    assert torch.allclose(search_logits(model, digits_task), search_logits(digits_task.build(), digits_task), atol=1e-4)


def test_16_bit_layers_hold_half_precision_weights_and_round_no_activations(digits_task: Task) -> None:
    model = Quantize(16)(digits_task.build(), digits_task)
    for name, entry in quantized_layers(model).items():
        weight = model.get_submodule(name).weight
        assert torch.equal(weight, weight.half().float())
        assert (entry.weight, entry.input, entry.output) == (None, None, None)


def test_an_unknown_layer_fails_the_candidate_and_names_the_known_ones(digits_task: Task) -> None:
    with pytest.raises(CandidateError, match=r"no layer called conv9.*conv1, conv2, conv3, fc"):
        Quantize({"conv9": 8})(digits_task.build(), digits_task)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 9}, "bits must be one of .* not 9"),
        ({"bits": True}, "not True"),
        ({"bits": "int8"}, "bits must be one of .* not 'int8'"),
        ({"bits": {"fc": 12}}, "not 12"),
        ({"bits": {}}, "bits names no layer"),
        ({"calibrator": "mean"}, "calibrator must be one of max, percentile, entropy, mse, not 'mean'"),
        ({"weight_calibrator": "entropy"}, "weight_calibrator must be one of max, mse, not 'entropy'"),
        ({"percentile": 50}, "percentile must be above 50 and at most 100, not 50"),
        ({"activations": 16}, "activations must be one of .* not 16"),
        ({"activations": {"fc": 1}}, "activations must be one of .* not 1"),
        ({"granularity": "row"}, "granularity must be one of tensor, channel, group, not 'row'"),
        ({"granularity": "group", "group_size": 1}, "group_size must be at least 2, not 1"),
        ({"scheme": "power-of-two"}, "scheme must be one of uniform, codebook"),
        ({"scheme": "codebook", "bits": 1.58}, "a codebook takes 1 to 8 bits, not 1.58"),
        ({"scheme": "codebook", "granularity": "group"}, "granularity can't be 'group'"),
        ({"awq": True, "activations": 8}, "awq is for uniform weights alone"),
        ({"outputs": "some"}, "outputs must be one of none, shared, all, not 'some'"),
        ({"samples": 0}, "samples must be at least 1, not 0"),
    ],
)
def test_impossible_settings_are_refused_at_once(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Quantize(**settings)  # type: ignore[arg-type]


def test_folding_batch_norms_keeps_the_outputs_and_leaves_none(digits_task: Task, branching: Task) -> None:
    for task in (digits_task, branching):
        model = task.build()
        expected = search_logits(task.build(), task)
        fold_batchnorm(model, find_layers(model, example_input(task.data)))
        assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert torch.allclose(search_logits(model, task), expected, rtol=1e-4, atol=1e-4)


def test_folding_keeps_the_outputs_of_a_residual_network() -> None:
    rng = np.random.default_rng(0)
    noise = Split(rng.integers(0, 256, (8, 3, 32, 32), dtype=np.uint8), np.arange(8) % 4)
    task = load_task("resnet20", Data("noise", noise, noise, noise, tuple("abcd"), (0.5,) * 3, (0.25,) * 3))
    model = task.build()
    expected = search_logits(task.build(), task)
    fold_batchnorm(model, find_layers(model, torch.zeros(1, 3, 32, 32)))
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert torch.allclose(search_logits(model, task), expected, rtol=1e-4, atol=1e-4)


def test_the_percentile_range_lies_inside_the_range_of_all_values(digits_task: Task) -> None:
    widest = quantized_layers(Quantize(8, "max", outputs="all")(digits_task.build(), digits_task))
    inner = quantized_layers(Quantize(8, "percentile", outputs="all")(digits_task.build(), digits_task))
    pairs = [(inner[name].input, widest[name].input) for name in LAYERS]
    pairs += [(inner[name].output, widest[name].output) for name in LAYERS if widest[name].output is not None]
    assert len(pairs) > len(LAYERS)
    assert all(small is not None and large is not None for small, large in pairs)
    assert all(float(small.scale) <= float(large.scale) for small, large in pairs)  # type: ignore[union-attr]
    assert any(float(small.scale) < float(large.scale) for small, large in pairs)  # type: ignore[union-attr]


def test_the_max_range_covers_exactly_what_calibration_saw(branching: Task) -> None:
    model = branching.build()
    with torch.no_grad():
        stream = model.norm(model.stem(torch.from_numpy(normalise(branching.data, branching.data.train.inputs))))
    entries = quantized_layers(Quantize(8)(branching.build(), branching))
    left, thin = entries["left"].input, entries["thin"].input
    assert left is not None
    assert thin is not None
    assert float(left.scale) == pytest.approx(float(stream.max()) / 255, rel=1e-5)
    assert float(thin.scale) == pytest.approx(float(stream.abs().max()) / 127, rel=1e-5)
    assert (left.low, thin.low) == (0, -128)


def test_outputs_are_rounded_only_where_asked(branching: Task) -> None:
    def rounded(outputs: str) -> set[str]:
        entries = quantized_layers(Quantize(8, outputs=outputs)(branching.build(), branching))
        return {name for name, entry in entries.items() if entry.output is not None}

    assert rounded("none") == set()
    assert rounded("shared") == {"stem"}
    assert rounded("all") == {"stem", "left", "thin"}


def test_calibration_reads_training_images_only(digits_task: Task) -> None:
    data = digits_task.data
    blank = Split(np.zeros_like(data.search.inputs), data.search.labels)
    other = Data(data.name, data.train, blank, blank, data.classes, data.mean, data.std)
    first = Quantize(8)(digits_task.build(), digits_task)
    second = Quantize(8)(digits_task.build(), Task("digits", digits_task.build, other))
    assert torch.equal(search_logits(first, digits_task), search_logits(second, digits_task))


def test_taking_the_rounding_off_leaves_the_rounded_model_as_it_is(digits_task: Task) -> None:
    model = Quantize(2)(digits_task.build(), digits_task)
    expected = search_logits(model, digits_task)
    plain = without_rounding(model)
    assert quantized_layers(plain) == {}
    assert not torch.allclose(search_logits(plain, digits_task), expected, atol=1e-3)
    assert torch.equal(search_logits(model, digits_task), expected)
