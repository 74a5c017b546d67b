"""Ranges, grids and corrections of post-training quantization, against references."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from onnxruntime.quantization.calibrate import HistogramCollector
from sklearn.cluster import KMeans
from torch import Tensor, nn

from autocompress import Data, Quantize, Split, Task
from autocompress.compression.calibration import (
    EntropyObserver,
    ErrorObserver,
    MaxObserver,
    Observer,
    PercentileObserver,
    calibration_batches,
)
from autocompress.compression.equalization import awq_scale, equalize, find_pairs, output_means
from autocompress.compression.graph import find_layers, fold_batchnorm
from autocompress.compression.grids import (
    FORMATS,
    Codebook,
    DynamicGrid,
    Grid,
    activation_grid,
    bit_width,
    codebook,
    weight_grid,
)
from autocompress.compression.quantization import quantized_layers
from autocompress.core.codec import decode_plan, encode_plan, plan_key
from autocompress.core.errors import CandidateError, InputError
from autocompress.core.notes import collect_notes
from autocompress.evaluators.pipeline import lowest_bits
from autocompress.tasks.data import example_input, normalise

LAYERS = ("conv1", "conv2", "conv3", "fc")


def values(seed: int, *shape: int) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batches_of(kind: str) -> list[np.ndarray]:
    """Three batches, each wider than the one before."""
    rng = np.random.default_rng(5)
    draw: dict[str, Callable[[int], np.ndarray]] = {
        "normal": lambda n: rng.standard_normal(n),
        "heavy": lambda n: rng.standard_t(2, n),
        "relu": lambda n: np.maximum(rng.standard_normal(n), 0),
    }
    return [(draw[kind](4000) * scale).astype(np.float32) for scale in (1.0, 1.3, 2.0)]


def observed(observer: Observer, batches: list[np.ndarray], bits: int = 8) -> tuple[float, float]:
    """The range that an observer finds."""
    for batch in batches:
        observer.see(batch)
    return observer.range(2**bits, lambda low, high: activation_grid(low, high, bits, True))


def logits(model: nn.Module, task: Task) -> Tensor:
    """Of the search split."""
    with torch.no_grad():
        return model.eval()(torch.from_numpy(normalise(task.data, task.data.search.inputs)))


@pytest.mark.parametrize("bins", [128, 512])
@pytest.mark.parametrize("kind", ["normal", "heavy", "relu"])
def test_the_entropy_range_is_that_of_onnxruntime(kind: str, bins: int) -> None:
    batches = batches_of(kind)
    collector = HistogramCollector("entropy", True, bins, 128, None, None)
    for batch in batches:
        collector.collect({"x": batch})
    low, high, counts, edges = collector.compute_entropy()["x"]
    observer = EntropyObserver(bins)
    found = observed(observer, batches)
    assert np.array_equal(observer.counts, counts)
    assert found == pytest.approx((float(low), float(high)), abs=float(edges[1] - edges[0]))
    if kind == "heavy" and bins > 128:
        assert found[1] < 0.8 * max(batch.max() for batch in batches), "the tail is cut"


def test_the_percentile_range_is_that_of_numpy() -> None:
    (batch, *_) = batches_of("heavy")
    assert observed(PercentileObserver(99.0), [batch]) == pytest.approx(tuple(np.percentile(batch, (1, 99))))
    assert observed(PercentileObserver(100), [batch]) == pytest.approx((batch.min(), batch.max()))


@pytest.mark.parametrize("bits", [4, 3])
def test_the_mse_range_rounds_heavy_tails_better_than_any_other(bits: int) -> None:
    batches = batches_of("heavy")
    everything = torch.from_numpy(np.concatenate(batches))

    def error(ends: tuple[float, float]) -> float:
        return float((activation_grid(*ends, bits, True).round(everything) - everything).square().mean())

    best = error(observed(ErrorObserver(0), batches, bits))
    assert best < 0.8 * error(observed(MaxObserver(), batches, bits))
    for other in (PercentileObserver(99.9), EntropyObserver()):
        assert best <= error(observed(other, batches, bits)) * 1.01


@pytest.mark.parametrize("bits", [6, 3])
def test_weights_with_the_mse_calibrator_are_nearer_in_every_channel(bits: int) -> None:
    weight = torch.from_numpy(np.random.default_rng(0).standard_t(3, (8, 4, 5, 5)).astype(np.float32))

    def errors(calibrator: str, symmetric: bool) -> Tensor:
        grid = weight_grid(weight, bits, calibrator=calibrator, symmetric=symmetric)
        return (grid.round(weight) - weight).square().flatten(1).sum(1)

    for symmetric in (True, False):
        assert (errors("mse", symmetric) <= errors("max", symmetric)).all()
        assert errors("mse", symmetric).sum() < (0.8 if bits == 3 else 1) * errors("max", symmetric).sum()


@pytest.mark.parametrize("calibrator", ["entropy", "mse", "percentile"])
def test_every_calibrator_keeps_the_accuracy_of_the_digits_model(digits_task: Task, calibrator: str) -> None:
    model = Quantize(8, calibrator)(digits_task.build(), digits_task)
    same = logits(model, digits_task).argmax(1) == logits(digits_task.build(), digits_task).argmax(1)
    assert float(same.float().mean()) > 0.98


@pytest.mark.parametrize(
    ("format", "kind"), [("fp8", ml_dtypes.float8_e4m3fn), ("fp8e5m2", ml_dtypes.float8_e5m2)], ids=["e4m3", "e5m2"]
)
def test_8_bit_floating_point_rounds_like_ml_dtypes(format: str, kind: type) -> None:
    weight = values(1, 6, 50) * torch.tensor([1e-3, 0.1, 1.0, 10.0, 1e3, 1.0])[:, None]
    grid = weight_grid(weight, format)
    scale = weight.abs().amax(1, keepdim=True) / float(ml_dtypes.finfo(kind).max)
    expected = (weight / scale).numpy().astype(kind).astype(np.float32) * scale.numpy()
    assert np.array_equal(grid.round(weight).numpy(), expected)
    beyond = grid.round(10 * weight)
    assert torch.isfinite(beyond).all()
    assert torch.allclose(beyond.abs().amax(1), weight.abs().amax(1), rtol=1e-6)


@pytest.mark.parametrize(("format", "kind"), [("bf16", torch.bfloat16), (16, torch.float16)])
def test_16_bit_formats_round_like_torch(digits_task: Task, format: str | int, kind: torch.dtype) -> None:
    plain = digits_task.build()
    fold_batchnorm(plain, find_layers(plain, example_input(digits_task.data)))
    model = Quantize(format)(digits_task.build(), digits_task)
    for name in LAYERS:
        weight = plain.get_submodule(name).weight
        assert torch.equal(model.get_submodule(name).weight, weight.to(kind).float())  # type: ignore[arg-type,operator]


def test_ternary_weights_follow_the_formula_of_ternary_weight_networks() -> None:
    weight = values(2, 5, 3, 4)
    got = weight_grid(weight, 1.58).round(weight)
    for channel, rounded in zip(weight, got, strict=True):
        threshold = 0.7 * channel.abs().mean()
        scale = channel.abs()[channel.abs() > threshold].mean()
        expected = torch.where(channel.abs() > threshold, channel.sign() * scale, torch.zeros(()))
        assert torch.allclose(rounded, expected)
    assert len(weight_grid(weight, 1.58, granularity="tensor").round(weight).unique()) == 3


def test_binary_weights_follow_the_formula_of_xnor_net() -> None:
    weight = values(3, 5, 3, 4)
    weight[0, 0, 0] = 0
    expected = torch.where(weight >= 0, 1.0, -1.0) * weight.abs().mean((1, 2), keepdim=True)
    assert torch.allclose(weight_grid(weight, 1).round(weight), expected)


@pytest.mark.parametrize("bits", [8, 1.58, 1, "fp8", 3])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_what_is_rounded_stays_where_it_is(granularity: str, bits: float | str) -> None:
    weight = values(4, 6, 4, 3, 3)
    grid = weight_grid(weight, bits, granularity=granularity, group=12)
    rounded = grid.round(weight)
    assert torch.allclose(grid.round(rounded), rounded, rtol=1e-6)
    assert grid.scale.numel() == {"tensor": 1, "channel": 6, "group": 18}[granularity]


@pytest.mark.parametrize("bits", [4, 8])
def test_groups_of_weights_have_the_scales_of_numpy(bits: int) -> None:
    weight = values(5, 6, 4, 2, 2)
    top = 2 ** (bits - 1) - 1
    rows = weight.numpy().reshape(-1, 8)
    scale = np.abs(rows).max(1, keepdims=True) / np.float32(top)
    expected = (np.rint(rows / scale) * scale).reshape(weight.shape)
    grid = weight_grid(weight, bits, granularity="group", group=8)
    assert np.allclose(grid.round(weight).numpy(), expected, atol=1e-6)
    assert np.array_equal(grid.integers(weight).numpy().reshape(-1, 8), np.rint(rows / scale))


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_asymmetric_weights_round_bit_for_bit_like_torch_fake_quantization(bits: int) -> None:
    weight = values(6, 7, 4, 3, 3) + torch.linspace(-3, 3, 7).view(-1, 1, 1, 1)
    grid = weight_grid(weight, bits, symmetric=False)
    assert grid.zero_points is not None
    expected = torch.fake_quantize_per_channel_affine(weight, grid.scale, grid.zero_points, 0, grid.low, grid.high)
    assert torch.equal(grid.round(weight), expected)
    span = weight.flatten(1).amax(1).clamp(min=0) - weight.flatten(1).amin(1).clamp(max=0)
    assert torch.allclose(grid.scale * (2**bits - 1), span)
    assert torch.equal(grid.round(torch.zeros_like(weight)), torch.zeros_like(weight))


def test_layers_that_can_not_be_cut_into_groups_are_noted(digits_task: Task) -> None:
    with collect_notes() as notes:
        model = Quantize(4, granularity="group", group_size=16)(digits_task.build(), digits_task)
    assert notes == ["Quantize: conv1: 9 weights are no multiple of 16: a scale per channel"]
    scales = {name: entry.weight.scale.numel() for name, entry in quantized_layers(model).items() if entry.weight}
    assert scales == {"conv1": 32, "conv2": 64 * 18, "conv3": 64 * 36, "fc": 40}


def test_a_codebook_is_as_good_as_the_k_means_of_scikit_learn() -> None:
    weight = values(7, 4, 200)
    grid = codebook(weight, 8)
    rounded = grid.round(weight)
    assert all(len(channel.unique()) <= 8 for channel in rounded)
    best = sum(KMeans(8, n_init=5, random_state=0).fit(channel.numpy()[:, None]).inertia_ for channel in weight)
    assert float((rounded - weight).square().sum()) < 1.1 * best
    uniform = weight_grid(weight, 3)
    assert (rounded - weight).square().sum() < 0.7 * (uniform.round(weight) - weight).square().sum()


def test_a_codebook_of_the_tensor_has_one_set_of_values(digits_task: Task) -> None:
    model = Quantize(4, scheme="codebook", granularity="tensor")(digits_task.build(), digits_task)
    for name, entry in quantized_layers(model).items():
        assert isinstance(entry.weight, Codebook)
        assert entry.input is None
        assert len(model.get_submodule(name).weight.unique()) <= 16  # type: ignore[operator,union-attr]


@pytest.mark.parametrize("shift", [-5.0, 0.0, 5.0])
def test_dynamic_activations_round_bit_for_bit_like_onnxruntime(shift: float) -> None:
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [64, 32]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "dynamic", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = values(8, 64, 32) * 2 + shift
    assert np.array_equal(DynamicGrid().round(x).numpy(), session.run(None, {"x": x.numpy()})[0])
    assert torch.equal(DynamicGrid().round(torch.zeros(3)), torch.zeros(3))


class Chain(nn.Module):
    """Convolutions, one of them depthwise, of which some feed only each other; ranges far apart."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 12, 1)
        self.side = nn.Conv2d(12, 12, 1)
        self.grouped = nn.Conv2d(12, 12, 1, groups=2)
        self.hidden = nn.Linear(12, 16)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(torch.relu(self.depthwise(torch.relu(self.norm(self.stem(x))))))
        x = self.grouped(torch.relu(self.side(torch.nn.functional.gelu(x)))) + x
        return self.fc(torch.relu(self.hidden(x.mean((2, 3)))))


@pytest.fixture(scope="module")
def chain() -> Task:
    """The chain on noise."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        model = Chain().eval()
        with torch.no_grad():
            model.norm.running_mean.normal_()  # type: ignore[union-attr,operator]
            model.norm.bias.normal_()
            # As much is taken off behind: the channels matter alike.
            scale = torch.logspace(-1.5, 1.5, 8)
            model.norm.weight.mul_(scale)
            model.norm.bias.mul_(scale)
            model.depthwise.weight.div_(scale.view(-1, 1, 1, 1))
        return model

    rng = np.random.default_rng(4)
    noise = Split(rng.integers(0, 256, (96, 3, 8, 8), dtype=np.uint8), np.arange(96) % 4)
    data = Data("noise", noise, noise, noise, ("a", "b", "c", "d"), (0.5,) * 3, (0.25,) * 3)
    return Task("chain on noise", build, data, trained=False)


def test_equalizing_evens_the_ranges_and_keeps_the_outputs(chain: Task) -> None:
    model, example = chain.build(), example_input(chain.data)
    fold_batchnorm(model, find_layers(model, example))
    pairs = [(pair.first, pair.second) for pair in find_pairs(model, example)]
    # GELU is not homogeneous, a residual stream has two takers, and groups hide whose channel is whose.
    assert pairs == [("stem", "depthwise"), ("depthwise", "point"), ("hidden", "fc")]
    equalize(model, example)
    assert torch.allclose(logits(model, chain), logits(chain.build(), chain), rtol=1e-4, atol=1e-5)
    made = model.stem.weight.flatten(1).abs().amax(1)  # type: ignore[union-attr,operator]
    taken = model.depthwise.weight.flatten(1).abs().amax(1)  # type: ignore[union-attr,operator]
    assert torch.allclose(made, taken, rtol=0.01)


def test_equalizing_helps_where_one_scale_serves_channels_of_different_size(chain: Task) -> None:
    expected = logits(chain.build(), chain)

    def error(equalized: bool) -> float:
        step = Quantize(6, activations=32, granularity="tensor", equalize=equalized)
        return float((logits(step(chain.build(), chain), chain) - expected).square().mean())

    assert error(True) < 0.5 * error(False)


def test_corrected_biases_give_every_layer_the_mean_output_of_the_float_model(digits_task: Task) -> None:
    plain = digits_task.build()
    fold_batchnorm(plain, find_layers(plain, example_input(digits_task.data)))
    batches = list(calibration_batches(digits_task, 128))
    expected = output_means(plain, LAYERS, batches)

    def shift(correct: bool, name: str) -> float:
        step = Quantize(3, samples=128, bias_correction=correct)
        model = step(digits_task.build(), digits_task)
        return float((output_means(model, LAYERS, batches)[name] - expected[name]).abs().max())

    for name in LAYERS:
        assert shift(True, name) < 1e-4
        assert shift(False, name) > 100 * shift(True, name)


@pytest.mark.parametrize("bits", [4, 3])
def test_awq_halves_the_output_error_where_few_input_channels_are_large(bits: int) -> None:
    x = values(10, 256, 64)
    x[:, :2] *= 50
    layer = nn.Linear(64, 32)
    with torch.no_grad():
        layer.weight.copy_(values(11, 32, 64))

    def make(scale: Tensor | None) -> Grid:
        return weight_grid(layer.weight, bits, input_scale=scale)

    def error(scale: Tensor | None) -> float:
        return float((x @ (make(scale).round(layer.weight) - layer.weight).detach().T).square().mean())

    scale = awq_scale(layer, x, make)
    assert scale is not None
    assert error(scale) < 0.5 * error(None)
    # s = mean|x|^a, up to a common factor.
    ratio = (scale / scale[0]).log() / (x.abs().mean(0) / x[:, 0].abs().mean()).log()
    assert torch.allclose(ratio[1:], ratio[1:].median().expand(63), atol=0.05)


def test_awq_never_moves_the_digits_model_further(digits_task: Task) -> None:
    expected = logits(digits_task.build(), digits_task)

    def error(awq: bool) -> float:
        step = Quantize(3, activations=32, awq=awq)
        return float((logits(step(digits_task.build(), digits_task), digits_task) - expected).square().mean())

    assert error(True) < error(False)


def test_awq_is_noted_where_it_can_not_work(chain: Task) -> None:
    with collect_notes() as notes:
        Quantize(4, activations={"fc": 8}, awq=False)(chain.build(), chain)
        Quantize(4, awq=True)(chain.build(), chain)
    text = "awq is for ungrouped layers with rounded weights alone"
    assert notes == [f"Quantize: depthwise: {text}", f"Quantize: grouped: {text}"]


def test_activations_take_their_format_from_the_weights_unless_told_otherwise(digits_task: Task) -> None:
    bits = {"conv1": 4, "conv2": 1.58, "fc": "bf16"}

    def inputs(**settings: object) -> dict[str, object]:
        model = Quantize(bits, **settings)(digits_task.build(), digits_task)  # type: ignore[arg-type]
        grids = {name: entry.input for name, entry in quantized_layers(model).items()}
        return {name: grid if grid is None else grid.high - grid.low + 1 for name, grid in grids.items()}

    assert inputs() == {"conv1": 16, "conv2": 256, "fc": None}
    assert inputs(activations=32) == {"conv1": None, "conv2": None, "fc": None}
    assert inputs(activations=6) == {"conv1": 64, "conv2": 64, "fc": 64}
    assert inputs(activations={"conv3": 8, "conv1": 2}) == {"conv1": 4, "conv2": 256, "conv3": 256, "fc": None}
    with pytest.raises(CandidateError, match="no layer called conv9"):
        inputs(activations={"conv9": 8})


def test_formats_are_ordered_by_their_bits() -> None:
    widths = [bit_width(format) for format in FORMATS]
    assert widths == [32, 16, 16, 8, 8, 8, 7, 6, 5, 4, 3, 2, 1.58, 1]
    with pytest.raises(InputError, match="not int8"):
        bit_width("int8")


def test_the_lowest_width_of_a_plan_counts_activations_too() -> None:
    assert lowest_bits(()) == 32
    assert lowest_bits((Quantize("bf16"),)) == 16
    assert lowest_bits((Quantize(8, activations=4),)) == 4
    assert lowest_bits((Quantize({"a": "fp8", "b": 1.58}, activations="dynamic"),)) == 1.58


def test_every_setting_is_stored_and_read_back() -> None:
    formats = {"a": 1.58, "b": "fp8", "c": 4}
    plan = (Quantize(formats, "entropy", activations={"a": "dynamic"}, granularity="group", group_size=16, seed=3),)
    again = decode_plan(encode_plan(plan))
    assert plan_key(again) == plan_key(plan)
    assert again[0].describe() == "ternary+int4+fp8 per group of 16, activations by layer"  # type: ignore[attr-defined]


def test_the_seed_chooses_the_training_inputs(digits_task: Task) -> None:
    def scales(seed: int) -> list[float]:
        model = Quantize(8, samples=8, seed=seed)(digits_task.build(), digits_task)
        return [float(entry.input.scale) for entry in quantized_layers(model).values() if entry.input]

    found = {seed: scales(seed) for seed in (0, 1)}
    assert found[0] == scales(0)
    assert all(a != b for a, b in itertools.pairwise([found[0], found[1]]))
