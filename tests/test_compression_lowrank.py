"""Low rank: the factors of a layer, the ranks that it gets, and the layers that stay whole."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import tensorly
import torch
import torch.nn.functional as F
from tensorly import decomposition
from torch import Tensor, nn

from autocompress import Data, InputError, Split, Task, load_task
from autocompress.compression.factors import METHODS, Shape, factorise, full_ranks, method_for
from autocompress.compression.graph import find_layers
from autocompress.compression.lowrank import LowRank
from autocompress.core.codec import decode_plan, encode_plan
from autocompress.core.errors import CandidateError
from autocompress.core.notes import collect_notes
from autocompress.tasks.data import example_input, normalise

RNG = np.random.default_rng(0)
NOISE = Split(RNG.integers(0, 256, (16, 3, 16, 16), dtype=np.uint8), np.arange(16) % 10)
DATA = Data("noise", NOISE, NOISE, NOISE, tuple("abcdefghij"), (0.5,) * 3, (0.25,) * 3)
WIDE = ("spatial", "tucker", "cp", "tt")


def layer(kind: Callable[..., nn.Module], *args: object, seed: int = 0, **settings: object) -> nn.Module:
    """A layer in double precision with random weights."""
    torch.manual_seed(seed)
    return kind(*args, **settings).double()


def kernel(module: nn.Module) -> np.ndarray:
    """Weights as an array."""
    return module.get_parameter("weight").detach().numpy()


def with_kernel(module: nn.Conv2d, weight: np.ndarray, x: Tensor) -> Tensor:
    """What the convolution would give with other weights."""
    weights = torch.from_numpy(np.ascontiguousarray(weight, np.float64))
    return F.conv2d(x, weights, module.bias, module.stride, module.padding, module.dilation)


def batch(*shape: int) -> Tensor:
    """Random inputs in double precision."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def parameters(model: nn.Module) -> int:
    """How many there are."""
    return sum(parameter.numel() for parameter in model.parameters())


def logits(model: nn.Module, task: Task) -> Tensor:
    """Logits of the search split."""
    with torch.no_grad():
        return model.eval()(torch.from_numpy(normalise(task.data, task.data.search.inputs)))


def task_of(model: nn.Module, data: Data = DATA) -> Task:
    """A task that has this model."""
    return Task("a net on noise", lambda: model, data, trained=False)


class Net(nn.Module):
    """Convolutions of several kinds, batch norms after them, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.wide = nn.Conv2d(16, 32, 3, padding=1)
        self.point = nn.Conv2d(32, 24, 1)
        self.tiny = nn.Conv2d(24, 1, 1)
        self.fc = nn.Linear(25, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(F.relu(self.wide(self.depthwise(F.relu(self.norm(self.stem(x)))))))
        return self.fc(torch.cat([x, self.tiny(x)], 1).mean((2, 3)))


def net() -> nn.Module:
    """The net with random weights and statistics."""
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2)
    return model.eval()


CONVOLUTIONS = [
    pytest.param((12, 10, 3), {"padding": 1}, id="3x3"),
    pytest.param((12, 10, 3), {"padding": (0, 2), "stride": 2, "bias": False}, id="strided, without bias"),
    pytest.param((12, 10, (3, 5)), {"padding": (1, 2), "stride": (1, 2), "dilation": (2, 1)}, id="3x5, dilated"),
    pytest.param((12, 10, 4), {"padding": "same"}, id="4x4, same"),
    pytest.param((12, 10, 3), {"padding": "valid"}, id="valid"),
    pytest.param((12, 10, 3), {"padding": 1, "padding_mode": "reflect"}, id="reflected border"),
]


@pytest.mark.parametrize("method", ["svd", "spatial", "tucker", "tt"])
@pytest.mark.parametrize(("args", "settings"), CONVOLUTIONS)
def test_full_ranks_reproduce_a_convolution(method: str, args: tuple[int, ...], settings: dict[str, object]) -> None:
    conv = layer(nn.Conv2d, *args, **settings)
    factored = factorise(conv, method, full_ranks(kernel(conv), method))
    x = batch(2, 12, 9, 11)
    assert torch.allclose(factored(x), conv(x), atol=1e-10)


@pytest.mark.parametrize(("args", "settings"), CONVOLUTIONS)
def test_cp_reproduces_a_convolution_that_has_its_rank(args: tuple[int, ...], settings: dict[str, object]) -> None:
    conv = layer(nn.Conv2d, *args, **settings)
    sides = [RNG.standard_normal((size, 2)) for size in kernel(conv).shape]
    with torch.no_grad():
        conv.get_parameter("weight").copy_(torch.from_numpy(tensorly.cp_to_tensor((None, sides))))
    factored = factorise(conv, "cp", (2,), sweeps=300)
    x = batch(2, 12, 9, 11)
    assert (factored(x) - conv(x)).norm() < 2e-3 * conv(x).norm()


@pytest.mark.parametrize(
    "module",
    [
        layer(nn.Linear, 20, 14),
        layer(nn.Conv1d, 8, 14, 3, padding=1, stride=2),
        layer(nn.Conv2d, 20, 14, 1, stride=2),
        layer(nn.Conv2d, 8, 14, 3, padding=1),
        layer(nn.Conv3d, 4, 14, 2, dilation=2),
    ],
    ids=["linear", "1-d", "1x1", "3x3", "3-d"],
)
@pytest.mark.parametrize("rank", [1, 5, 14])
def test_svd_factors_multiply_to_the_best_matrix_of_their_rank(module: nn.Module, rank: int) -> None:
    first, second = factorise(module, "svd", (rank,))
    matrix = kernel(module).reshape(14, -1)
    product = kernel(second).reshape(14, rank) @ kernel(first).reshape(rank, -1)
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    assert np.allclose(product, left[:, :rank] * values[:rank] @ right[:rank])
    # Eckart and Young: what is lost is what the other singular values hold.
    assert np.linalg.norm(matrix - product) == pytest.approx(math.sqrt(np.square(values[rank:]).sum()), abs=1e-10)
    assert torch.equal(second.get_parameter("bias"), module.get_parameter("bias"))
    assert first.bias is None


def test_spatial_factors_run_rows_then_columns_of_the_truncated_svd() -> None:
    conv = layer(nn.Conv2d, 6, 8, (3, 5), padding=(1, 2))
    factored = factorise(conv, "spatial", (4,))
    weight = kernel(conv)
    # One row for each (input, y), one column for each (output, x), put together entry by entry.
    matrix = np.empty((6 * 3, 8 * 5))
    for o, i, y, x in np.ndindex(*weight.shape):
        matrix[i * 3 + y, o * 5 + x] = weight[o, i, y, x]
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    best = (left[:, :4] * values[:4] @ right[:4]).reshape(6, 3, 8, 5).transpose(2, 0, 1, 3)
    assert [factor.kernel_size for factor in factored] == [(3, 1), (1, 5)]
    x = batch(2, 6, 9, 9)
    assert torch.allclose(factored(x), with_kernel(conv, best, x))


def test_tucker_factors_compose_to_tensorlys_reconstruction() -> None:
    conv = layer(nn.Conv2d, 10, 12, 3, padding=1, stride=2)
    factored = factorise(conv, "tucker", (4, 6))
    (core, sides), _ = decomposition.partial_tucker(kernel(conv), [6, 4], modes=[0, 1])
    whole = tensorly.tucker_to_tensor((core, [*sides, np.eye(3), np.eye(3)]))
    assert [(f.in_channels, f.out_channels, f.kernel_size[0]) for f in factored] == [(10, 4, 1), (4, 6, 3), (6, 12, 1)]
    x = batch(2, 10, 9, 9)
    assert torch.allclose(factored(x), with_kernel(conv, whole, x))


def test_cp_factors_compose_to_tensorlys_reconstruction_and_share_the_scale() -> None:
    conv = layer(nn.Conv2d, 10, 12, 3, padding=1, dilation=2)
    factored = factorise(conv, "cp", (7,), seed=3, sweeps=10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = decomposition.parafac(kernel(conv).astype(np.float32), 7, n_iter_max=10, tol=1e-6, random_state=3)
    assert [factor.groups for factor in factored] == [1, 7, 7, 1]
    x = batch(2, 10, 9, 9)
    whole = with_kernel(conv, tensorly.cp_to_tensor(made), x).detach()
    assert torch.allclose(factored(x), whole, atol=1e-4 * float(whole.abs().max()))
    sizes = [np.linalg.norm(kernel(factored[0]).reshape(7, -1), axis=1)]
    sizes += [np.linalg.norm(kernel(factor).reshape(7, -1), axis=1) for factor in (factored[1], factored[2])]
    sizes.append(np.linalg.norm(kernel(factored[3]).reshape(12, 7), axis=0))
    assert np.allclose(sizes, sizes[0], rtol=1e-4)


def test_cp_is_the_same_for_the_same_seed() -> None:
    conv = layer(nn.Conv2d, 10, 12, 3)
    one, again, other = (factorise(conv, "cp", (16,), seed=seed, sweeps=3) for seed in (0, 0, 1))
    assert np.array_equal(kernel(one[0]), kernel(again[0]))
    assert not np.array_equal(kernel(one[0]), kernel(other[0]))


def test_tensor_train_factors_compose_to_tensorlys_reconstruction() -> None:
    conv = layer(nn.Conv2d, 10, 12, (3, 5), padding=1)
    factored = factorise(conv, "tt", (5, 8, 6))
    train = decomposition.tensor_train(kernel(conv).transpose(1, 2, 3, 0), [1, 5, 8, 6, 1])
    whole = tensorly.tt_to_tensor(train).transpose(3, 0, 1, 2)
    assert [f.kernel_size for f in factored] == [(1, 1), (3, 1), (1, 5), (1, 1)]
    x = batch(2, 10, 9, 9)
    assert torch.allclose(factored(x), with_kernel(conv, whole, x))


def test_factorizing_leaves_torchs_random_numbers_alone() -> None:
    conv = layer(nn.Conv2d, 4, 4, 3)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    factorise(conv, "cp", (4,))
    factorise(conv, "tucker", (2, 2))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_the_ratio_bounds_weights_and_macs_and_takes_the_largest_rank_that_fits(method: str, ratio: float) -> None:
    report = LowRank(ratio, method=method).report(net(), task_of(net()))
    assert set(report) >= {"stem", "wide", "point", "fc"}
    for name in ("wide", "point"):
        found = report[name]
        assert found.weights[1] <= ratio * found.weights[0]
        assert found.macs[1] <= ratio * found.macs[0]
        assert found.method == (method if name == "wide" else "svd")
    assert report["point"].ranks == (math.floor(ratio * 32 * 24 / (32 + 24)),)
    if method == "spatial":
        assert report["wide"].ranks == (math.floor(ratio * 16 * 32 * 9 / (16 * 3 + 32 * 3)),)
    if method == "cp":
        assert report["wide"].ranks == (math.floor(ratio * 16 * 32 * 9 / (16 + 32 + 3 + 3)),)


@pytest.mark.parametrize("method", METHODS)
def test_the_reported_costs_are_those_of_the_factored_model(method: str) -> None:
    task = task_of(net())
    report = LowRank(0.5, method=method).report(net(), task)
    model = LowRank(0.5, method=method)(net(), task)
    layers = find_layers(model, example_input(DATA))
    for name, expected in report.items():
        parts = [part for part in layers if part.name.startswith(f"{name}.")]
        assert sum(part.weights for part in parts) == expected.weights[1]
        assert sum(part.macs for part in parts) == expected.macs[1]
        assert [part.output_shape[0] for part in parts[:-1]] == (
            [*expected.ranks] if expected.method != "cp" else [*expected.ranks] * 3
        )


def test_strides_make_macs_the_bound_where_a_factor_runs_before_them() -> None:
    report = LowRank(0.5, method="spatial").report(net(), task_of(net()))["stem"]
    # 3x1 over 8 rows of 16 columns, then 1x3 over 8 x 8, against 3x3 over 8 x 8.
    rank = report.ranks[0]
    assert report.macs == (3 * 16 * 9 * 64, rank * 3 * 3 * 128 + rank * 16 * 3 * 64)
    assert report.macs[1] <= 0.5 * report.macs[0] < report.macs[1] * (rank + 1) / rank


@pytest.mark.parametrize("energy", [0.5, 0.8])
@pytest.mark.parametrize("round_to", [1, 4])
def test_the_energy_rule_takes_the_smallest_rank_that_holds_it(energy: float, round_to: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 64), nn.Linear(64, 10)).eval()
    with torch.no_grad():  # strengths that fall, so that few of them hold much
        model[1].weight.mul_(0.85 ** torch.arange(64)[:, None])
    ranks = LowRank(energy=energy, round_to=round_to).ranks(model, task_of(model))
    values = np.linalg.svd(kernel(model[1]).astype(np.float64), compute_uv=False)
    held = np.cumsum(values**2) / np.sum(values**2)
    smallest = next(rank for rank in range(1, 65) if held[rank - 1] >= energy)
    assert ranks["1"] == (math.ceil(smallest / round_to) * round_to,)


@pytest.mark.parametrize("method", ["tucker", "tt"])
def test_with_several_ranks_every_unfolding_holds_the_energy(method: str) -> None:
    model = net()
    weight = kernel(model.get_submodule("wide")).astype(np.float64)
    train = weight.transpose(1, 2, 3, 0)
    unfoldings = [train.reshape(16, -1), weight.reshape(32, -1)]
    if method == "tt":
        unfoldings = [train.reshape(rows, -1) for rows in (16, 48, 144)]
    expected = []
    for matrix in unfoldings:
        held = np.cumsum(np.linalg.svd(matrix, compute_uv=False) ** 2)
        expected.append(int(np.flatnonzero(held >= 0.4 * held[-1])[0]) + 1)
    assert LowRank(energy=0.4, method=method).ranks(model, task_of(model))["wide"] == tuple(expected)


def test_all_energy_of_a_layer_of_low_rank_is_its_rank_and_keeps_the_outputs() -> None:
    task = task_of(net())
    model = net()
    wide = model.get_submodule("wide").get_parameter("weight")
    with torch.no_grad():
        wide.copy_((torch.randn(32, 4) @ torch.randn(4, 144)).view_as(wide))
    before = logits(model, task)
    operator = LowRank(energy=1 - 1e-9)
    assert operator.ranks(model, task)["wide"] == (4,)
    assert torch.allclose(logits(operator(model, task), task), before, atol=1e-4)


def test_ranks_are_multiples_where_asked() -> None:
    ranks = LowRank(0.6, round_to=4, method="tucker").ranks(net(), task_of(net()))
    assert ranks["wide"]
    assert all(rank % 4 == 0 or rank in (3, 16, 32) for found in ranks.values() for rank in found)


def test_the_measured_error_is_that_of_the_layer_and_falls_with_the_rank() -> None:
    task, model = task_of(net()), net()
    errors = [LowRank(ratio, method="tucker").report(model, task)["wide"].error for ratio in (0.1, 0.4, 0.8)]
    assert errors == sorted(errors, reverse=True)
    seen: list[tuple[Tensor, Tensor]] = []
    hook = model.get_submodule("wide").register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    logits(model, task)
    hook.remove()
    factored = LowRank({"wide": 0.4}, method="tucker")(net(), task).get_submodule("wide")
    with torch.no_grad():
        difference = (factored(seen[0][0]) - seen[0][1]).norm() / seen[0][1].norm()
    assert errors[1] == pytest.approx(float(difference), rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_factored_model_trains_and_can_be_read_again(method: str) -> None:
    task = task_of(net())
    model = LowRank(0.5, method=method)(net(), task)
    layers = {found.name: found for found in find_layers(model, example_input(DATA))}
    last = f"stem.{len(model.get_submodule('stem')) - 1}"  # type: ignore[arg-type]
    assert layers[last].batchnorm == "norm"
    assert layers[last].clipped
    assert {"depthwise", "tiny", "fc.0", "fc.1"} <= set(layers)
    F.cross_entropy(model(torch.randn(4, 3, 16, 16)), torch.arange(4)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("ratio", [1.0, {"wide": 1.0}])
def test_a_ratio_of_one_leaves_layers_whole(ratio: float | dict[str, float]) -> None:
    task = task_of(net())
    model = LowRank(ratio)(net(), task)
    assert torch.equal(logits(model, task), logits(net(), task))
    assert parameters(model) == parameters(net())


def test_a_map_factors_only_the_layers_that_it_names() -> None:
    model = LowRank({"wide": 0.5, "fc": 1.0}, method="tt")(net(), task_of(net()))
    assert [name for name, module in model.named_modules() if isinstance(module, nn.Sequential)] == ["wide"]


def test_layers_that_gain_nothing_stay_whole_with_a_note() -> None:
    with collect_notes() as notes:
        model = LowRank(0.5)(net(), task_of(net()))
    assert isinstance(model.get_submodule("tiny"), nn.Conv2d)
    assert isinstance(model.get_submodule("depthwise"), nn.Conv2d)
    assert notes[0].startswith("LowRank: depthwise: a grouped convolution")
    assert notes[1].startswith("LowRank: tiny: factors of rank 1 save nothing: 25 weights instead of 24")
    assert len(notes) == 2


def test_a_rank_that_makes_a_layer_bigger_is_refused() -> None:
    task = task_of(net())
    with collect_notes() as notes:
        ranks = LowRank(0.5, round_to=16).ranks(net(), task)
    assert "fc" not in ranks
    assert "LowRank: fc: factors of rank 10 save nothing: 350 weights instead of 250, 350 MACs instead of 250" in notes
    with pytest.raises(CandidateError, match="no layer gets smaller with low rank"):
        LowRank({"fc": 0.5}, round_to=16)(net(), task)


def test_a_kernel_that_cp_finds_no_components_for_stays_whole() -> None:
    model = net()
    nn.init.zeros_(model.get_submodule("wide").get_parameter("weight"))
    with collect_notes() as notes:
        model = LowRank(0.5, method="cp")(model, task_of(model))
    assert isinstance(model.get_submodule("wide"), nn.Conv2d)
    assert isinstance(model.get_submodule("stem"), nn.Sequential)
    assert any(text.startswith("LowRank: wide: no cp factors of rank 42 found") for text in notes)


@pytest.mark.parametrize("rank", [2, 8, 42])
def test_cp_of_a_kernel_of_rank_one_is_right_or_refused(rank: int) -> None:
    conv = layer(nn.Conv2d, 8, 8, 3)
    nn.init.constant_(conv.get_parameter("weight"), 0.3)
    x = batch(2, 8, 6, 6)
    try:
        factored = factorise(conv, "cp", (rank,))
    except np.linalg.LinAlgError:
        return
    assert (factored(x) - conv(x)).norm() < 0.02 * conv(x).norm()


def test_a_setting_that_shrinks_no_layer_fails_the_candidate() -> None:
    with pytest.raises(CandidateError, match="no layer gets smaller with low rank svd, energy 100%"):
        LowRank(energy=1.0)(net(), task_of(net()))


@pytest.mark.parametrize("name", ["conv9", "norm"])
def test_an_unknown_layer_fails_the_candidate_by_name(name: str) -> None:
    with pytest.raises(CandidateError, match=f"no layer called {name}"):
        LowRank({name: 0.5})(net(), task_of(net()))


def test_a_named_grouped_convolution_is_left_alone_but_not_for_nothing() -> None:
    with collect_notes() as notes:
        LowRank({"depthwise": 0.5, "wide": 0.5})(net(), task_of(net()))
    assert any("depthwise: a grouped convolution" in text for text in notes)
    with pytest.raises(CandidateError, match="no layer gets smaller"):
        LowRank({"depthwise": 0.5})(net(), task_of(net()))


class Odd(nn.Module):
    """Layers that can't be exchanged: borrowed, tied, read by the parent, or with a forward of their own."""

    class Padded(nn.Conv2d):
        """Pads by itself, as TensorFlow's convolutions do."""

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(F.pad(x, (0, 2, 0, 2)), self.weight, self.bias)

    def __init__(self) -> None:
        super().__init__()
        self.padded = self.Padded(3, 32, 3)
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.read = nn.Linear(32, 32)
        self.tied = nn.Linear(32, 32)
        self.other = nn.Linear(32, 32)
        self.other.weight = self.tied.weight
        self.twice = nn.Linear(32, 32)
        self.plain = nn.Linear(32, 32)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.padded(x)[:, :, ::4, ::4].flatten(2).transpose(1, 2)
        x = self.attention(x, x, x)[0]
        x = self.read(x).view(-1, 16, self.read.out_features)
        return self.fc(self.plain(self.twice(self.twice(self.other(self.tied(x))))).mean(1))


def test_layers_that_can_not_be_exchanged_stay_whole_with_a_note() -> None:
    torch.manual_seed(0)
    model = Odd().eval()
    task = task_of(model)
    with collect_notes() as notes:
        model = LowRank(0.5)(model, task)
    factored = [name for name, module in model.named_modules() if isinstance(module, nn.Sequential)]
    assert factored == ["plain", "fc"]
    said = {text.split(": ")[1]: text for text in notes}
    assert set(said) == {"padded", "attention.out_proj", "read", "tied", "other", "twice"}
    assert "Padded computes more than Conv2d" in said["padded"]
    assert "no attribute 'out_features'" in said["read"]
    assert logits(model, task).shape == (16, 10)


def test_the_trained_digits_model_loses_little_where_its_wide_layers_are_halved(digits_task: Task) -> None:
    labels = torch.from_numpy(digits_task.data.search.labels)
    before = digits_task.build()
    model = LowRank({"conv2": 0.5, "conv3": 0.5})(digits_task.build(), digits_task)
    assert parameters(model) < 0.52 * parameters(before)
    correct = [(logits(net, digits_task).argmax(1) == labels).float().mean() for net in (before, model)]
    assert correct[1] > correct[0] - 0.05


def test_a_vision_transformer_gets_smaller_linear_layers() -> None:
    images = Split(RNG.integers(0, 256, (4, 3, 160, 160), dtype=np.uint8), np.arange(4))
    data = Data("noise", images, images, images, tuple("abcd"), (0.5,) * 3, (0.25,) * 3)
    task = load_task("timm:test_vit", data)
    model = LowRank(0.25)(task.build(), task)
    assert parameters(model) < 0.4 * parameters(task.build())
    names = {found.name for found in find_layers(model, example_input(data))}
    assert {"patch_embed.proj.1", "blocks.0.attn.qkv.0", "blocks.0.attn.proj.1", "blocks.0.mlp.fc1.1"} <= names


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "either ratio or energy, got neither"),
        ({"ratio": 0.5, "energy": 0.9}, "either ratio or energy, got ratio 0.5 and energy 0.9"),
        ({"ratio": {}}, "names no layer"),
        ({"ratio": 1.5}, "ratio must be above 0 and at most 1, not 1.5"),
        ({"ratio": {"fc": 0.0}}, "ratio must be above 0"),
        ({"energy": -0.1}, "energy must be above 0"),
        ({"ratio": 0.5, "method": "svdd"}, "method must be one of svd, spatial, tucker, cp, tt, not 'svdd'"),
        ({"energy": 0.5, "method": "cp"}, "give ratio instead"),
        ({"ratio": 0.5, "round_to": 0}, "round_to must be at least 1"),
        ({"ratio": 0.5, "sweeps": 0}, "sweeps must be at least 1"),
        ({"ratio": 0.5, "seed": -1}, "seed must be at least 0"),
    ],
)
def test_settings_that_are_not_possible_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LowRank(**settings)  # type: ignore[arg-type]


def test_a_plan_is_stored_and_read_back() -> None:
    plan = (LowRank({"wide": 0.5, "fc": 0.25}, method="tucker", round_to=8),)
    assert decode_plan(json.loads(json.dumps(encode_plan(plan)))) == plan
    assert plan[0].describe() == "low rank tucker 25%-50%"
    assert LowRank(0.5).describe() == "low rank svd 50%"


def test_only_wide_2d_kernels_take_the_method() -> None:
    for method in WIDE:
        assert method_for(Shape.of(nn.Conv2d(4, 4, (1, 3))), method) == method
        for module in (nn.Linear(4, 4), nn.Conv2d(4, 4, 1), nn.Conv1d(4, 4, 3)):
            assert method_for(Shape.of(module), method) == "svd"
