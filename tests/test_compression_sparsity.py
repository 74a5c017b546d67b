"""Sparsity in one go: how many weights become zero, which ones, in what patterns, and that they stay zero."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress import Data, Finetune, InputError, Prune, Quantize, Split, Task
from autocompress.compression.masks import apply_masks, masks, set_mask, sparsity, sparsity_by_layer
from autocompress.compression.sparsity import Pattern, Sparsify, loss_gradients, lowest
from autocompress.core.codec import decode_plan, encode_plan
from autocompress.core.errors import CandidateError
from autocompress.core.notes import collect_notes
from autocompress.tasks.data import normalise

RNG = np.random.default_rng(0)
NOISE = Split(RNG.integers(0, 256, (24, 2, 6, 6), dtype=np.uint8), np.arange(24) % 3)
DATA = Data("noise", NOISE, NOISE, NOISE, tuple("abc"), (0.5,) * 2, (0.25,) * 2)


class SmallNet(nn.Module):
    """A convolution on two channels, a wide one, a depthwise one, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.wide = nn.Conv2d(8, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.hidden = nn.Linear(16, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.depthwise(F.relu(self.wide(F.relu(self.stem(x))))))
        return self.head(F.relu(self.hidden(x.mean((2, 3)))))


def small_net() -> nn.Module:
    """Always the same random weights."""
    torch.manual_seed(0)
    return SmallNet().eval()


SMALL = Task("small net on noise", small_net, DATA, trained=False)
USUAL = ("stem", "wide", "hidden")


def weight_of(model: nn.Module, name: str) -> np.ndarray:
    """The layer's weight as NumPy."""
    return model.get_submodule(name).weight.detach().numpy()  # type: ignore[union-attr,operator]


def reference_zeros(values: list[np.ndarray], count: int) -> list[np.ndarray]:
    """Marks of the `count` smallest of all values, the first of equal ones, by a stable sort."""
    flat = np.concatenate([value.ravel() for value in values])
    marks = np.zeros(len(flat), bool)
    marks[np.argsort(flat, kind="stable")[:count]] = True
    ends = np.cumsum([value.size for value in values])[:-1]
    return [mark.reshape(value.shape) for mark, value in zip(np.split(marks, ends), values, strict=True)]


@pytest.mark.parametrize("share", [0.0, 0.37, 0.8])
def test_a_global_share_is_met_exactly_by_the_smallest_weights_of_all_layers(share: float) -> None:
    before = [np.abs(weight_of(small_net(), name)) for name in USUAL]
    model = Sparsify(share)(small_net(), SMALL)
    expected = reference_zeros(before, round(share * sum(value.size for value in before)))
    for name, gone in zip(USUAL, expected, strict=True):
        np.testing.assert_array_equal(weight_of(model, name) == 0, gone)
    assert set(masks(model)) == set(USUAL)


def test_a_share_by_layer_is_met_in_each_layer() -> None:
    model = Sparsify(0.7, scope="layer")(small_net(), SMALL)
    for name in USUAL:
        before = np.abs(weight_of(small_net(), name))
        (gone,) = reference_zeros([before], round(0.7 * before.size))
        np.testing.assert_array_equal(weight_of(model, name) == 0, gone)


def test_a_mapping_may_name_the_last_and_depthwise_layers_and_leaves_others_alone() -> None:
    model = Sparsify({"head": 0.5, "depthwise": 0.25, "stem": 0.0})(small_net(), SMALL)
    shares = sparsity_by_layer(model)
    assert shares == {"stem": 0.0, "wide": 0.0, "depthwise": 0.25, "hidden": 0.0, "head": 0.5}
    assert sparsity(model) == pytest.approx((18 + 36) / (144 + 1152 + 144 + 192 + 36))


def test_equal_weights_go_in_order() -> None:
    marks = lowest(torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0, 3.0]), 3)
    assert marks.tolist() == [False, True, True, False, True, False]
    assert not lowest(torch.ones(3), 0).any()


def test_no_layer_dies() -> None:
    task = Task("faint stem", lambda: scaled(small_net(), "stem", 1e-6), DATA, trained=False)
    model = Sparsify(0.995)(task.build(), task)
    zeros = {name: int((weight_of(model, name) == 0).sum()) for name in USUAL}
    assert zeros["stem"] == 144 - 1
    assert np.abs(weight_of(model, "stem")).max() == np.abs(weight_of(task.build(), "stem")).max()
    assert sum(zeros.values()) == round(0.995 * (144 + 1152 + 192))
    almost = Sparsify(0.99999, scope="layer")(small_net(), SMALL)
    assert [int((weight_of(almost, name) != 0).sum()) for name in USUAL] == [1, 1, 1]


def scaled(model: nn.Module, name: str, factor: float) -> nn.Module:
    """The model with one layer's weights made larger or smaller."""
    with torch.no_grad():
        model.get_submodule(name).weight.mul_(factor)  # type: ignore[union-attr,operator]
    return model


def test_zeros_that_are_there_count_and_masks_stay() -> None:
    once = Sparsify(0.6)(small_net(), SMALL)
    again = Sparsify(0.3)(copy.deepcopy(once), SMALL)
    for name in USUAL:
        np.testing.assert_array_equal(weight_of(again, name), weight_of(once, name))
        assert torch.equal(masks(again)[name], masks(once)[name])
    in_steps = Sparsify(0.8)(once, SMALL)
    at_once = Sparsify(0.8)(small_net(), SMALL)
    assert all(torch.equal(masks(in_steps)[name], masks(at_once)[name]) for name in USUAL)


@pytest.mark.parametrize(("keep", "of"), [(2, 4), (4, 8), (1, 4)])
def test_an_n_of_m_pattern_keeps_the_largest_of_each_group_along_the_inputs(keep: int, of: int) -> None:
    with collect_notes() as notes:
        model = Sparsify(1 - keep / of, pattern=f"{keep}:{of}")(small_net(), SMALL)
    assert notes == [f"Sparsify: stem: its 2 inputs are no multiple of {of}"]
    for name in ("wide", "hidden"):
        before, after = weight_of(small_net(), name), weight_of(model, name)
        # (out, in, kh, kw) -> groups of `of` consecutive inputs of one output and kernel position
        before, after = (np.moveaxis(w, 1, -1).reshape(-1, of) for w in (before, after))
        kept = np.sort(np.argsort(-np.abs(before), axis=1)[:, :keep], axis=1)
        assert ((after != 0).sum(1) == keep).all()
        np.testing.assert_array_equal(np.nonzero(after)[1].reshape(-1, keep), kept)
        np.testing.assert_array_equal(after[after != 0], np.take_along_axis(before, kept, 1).ravel())


@pytest.mark.parametrize("name", ["wide", "hidden"])
def test_blocks_of_least_norm_go_whole(name: str) -> None:
    model = Sparsify({name: 0.6}, pattern="block:4x2")(small_net(), SMALL)
    before, after = weight_of(small_net(), name), weight_of(model, name)
    kernels = before.reshape(*before.shape[:2], -1)
    outputs, inputs, places = kernels.shape
    norms = np.empty((outputs // 4, places, inputs // 2))
    gone = np.empty_like(norms, bool)
    for o, p, i in np.ndindex(norms.shape):
        block = (slice(4 * o, 4 * o + 4), slice(2 * i, 2 * i + 2), p)
        norms[o, p, i] = np.sqrt((kernels[block] ** 2).sum())
        zeros = after.reshape(kernels.shape)[block] == 0
        assert zeros.all() or not zeros.any()
        gone[o, p, i] = zeros.all()
    assert gone.sum() == round(0.6 * norms.size)
    assert norms[gone].max() < norms[~gone].min()


def test_a_block_never_spans_groups_of_a_convolution() -> None:
    grouped = nn.Conv2d(8, 8, 1, groups=4)
    assert Pattern(rows=4).misfit(grouped) == "its 2 outputs are no multiple of 4"
    assert Pattern(rows=2, columns=2).misfit(grouped) == ""
    assert Pattern(keep=2, of=4).misfit(grouped) == "its 2 inputs are no multiple of 4"


def gradients_by_hand(model: nn.Module, chosen: np.ndarray) -> dict[str, np.ndarray]:
    """Gradients of the mean cross-entropy over these training images."""
    model.zero_grad()
    logits = model(torch.from_numpy(normalise(DATA, NOISE.inputs[chosen])))
    F.cross_entropy(logits, torch.from_numpy(NOISE.labels[chosen])).backward()
    return {name: model.get_submodule(name).weight.grad.numpy().copy() for name in USUAL}  # type: ignore[union-attr]


def test_snip_scores_are_the_size_of_weight_times_gradient() -> None:
    step = Sparsify(0.5, criterion="snip", samples=24)
    scores = step.scores(small_net(), SMALL, list(USUAL))
    found = gradients_by_hand(small_net(), np.arange(24))
    for name in USUAL:
        np.testing.assert_allclose(scores[name], np.abs(weight_of(small_net(), name) * found[name]), 1e-3, 1e-8)
    model = step(small_net(), SMALL)
    expected = reference_zeros([scores[name].numpy() for name in USUAL], round(0.5 * (144 + 1152 + 192)))
    for name, gone in zip(USUAL, expected, strict=True):
        np.testing.assert_array_equal(weight_of(model, name) == 0, gone)


def test_taylor_scores_are_squares_summed_over_batches() -> None:
    model = small_net()
    picked = np.random.default_rng(3).permutation(24)[:20]
    weights = [model.get_submodule(name).weight for name in USUAL]
    batches = list(loss_gradients(model, SMALL, weights, samples=20, seed=3, batch_size=8))  # type: ignore[arg-type]
    assert [share for share, _ in batches] == [0.4, 0.4, 0.2]
    for (_, gradients), start in zip(batches, (0, 8, 16), strict=True):
        expected = gradients_by_hand(model, picked[start : start + 8])
        for name, gradient in zip(USUAL, gradients, strict=True):
            np.testing.assert_allclose(gradient.numpy(), expected[name], rtol=1e-3, atol=1e-7)
    many = Split(np.tile(NOISE.inputs, (4, 1, 1, 1)), np.tile(NOISE.labels, 4))
    task = Task("more noise", small_net, Data("n", many, NOISE, NOISE, tuple("abc"), (0.5,) * 2, (0.25,) * 2), False)
    scores = Sparsify(criterion="taylor", samples=96, seed=1).scores(small_net(), task, list(USUAL))
    order = np.random.default_rng(1).permutation(96) % 24
    parts = [gradients_by_hand(small_net(), np.sort(part)) for part in (order[:64], order[64:])]
    for name in USUAL:
        expected = sum((weight_of(small_net(), name) * part[name]) ** 2 for part in parts)
        np.testing.assert_allclose(scores[name], expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("criterion", ["random", "taylor"])
def test_the_same_seed_gives_the_same_masks_and_another_one_others(criterion: str) -> None:
    first, again, other = (
        masks(Sparsify(criterion=criterion, samples=8, seed=seed)(small_net(), SMALL)) for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in USUAL)
    assert not all(torch.equal(first[name], other[name]) for name in USUAL)


def test_zeros_survive_training_and_quantization(digits_task: Task) -> None:
    model = Sparsify(0.7)(digits_task.build(), digits_task)
    gone = {name: ~mask for name, mask in masks(model).items()}
    model = Finetune(6, batch_size=64)(model, digits_task)
    moved = digits_task.build().get_submodule("conv2").weight
    assert not torch.equal(model.get_submodule("conv2").weight[~gone["conv2"]], moved[~gone["conv2"]])  # type: ignore[index]
    model = Quantize(8)(model, digits_task)
    for name, zeros in gone.items():
        assert (model.get_submodule(name).weight[zeros] == 0).all()  # type: ignore[index]


def test_averaged_weights_keep_masks_and_zeros(digits_task: Task) -> None:
    model = Sparsify(0.7)(digits_task.build(), digits_task)
    gone = {name: ~mask.clone() for name, mask in masks(model).items()}
    model = Finetune(6, batch_size=64, ema=0.9)(model, digits_task)
    for name, zeros in gone.items():
        assert torch.equal(~masks(model)[name], zeros)
        assert (model.get_submodule(name).weight[zeros] == 0).all()  # type: ignore[index]


def test_a_structurally_pruned_model_can_be_sparse_too(digits_task: Task) -> None:
    model = Sparsify(0.5, pattern="2:4")(Prune(0.5)(digits_task.build(), digits_task), digits_task)
    assert sparsity_by_layer(model) == {"conv1": 0.0, "conv2": 0.5, "conv3": 0.5, "fc": 0.0}


def test_zeros_survive_structured_pruning_afterwards(digits_task: Task) -> None:
    model = Prune(0.5)(Sparsify(0.7)(digits_task.build(), digits_task), digits_task)
    model = Finetune(3, batch_size=64)(model, digits_task)
    for name, mask in masks(model).items():
        weight = model.get_submodule(name).weight
        assert mask.shape == weight.shape  # type: ignore[union-attr]
        assert ((weight == 0) == ~mask).all()  # type: ignore[union-attr]
    assert set(masks(model)) == {"conv1", "conv2", "conv3"}
    assert sparsity(model) > 0.4


def test_a_mask_that_no_longer_fits_its_layer_is_an_error_of_the_candidate() -> None:
    layer = nn.Linear(4, 4)
    set_mask(layer, torch.eye(4, dtype=torch.bool))
    layer.weight = nn.Parameter(layer.weight.detach()[:2])
    with pytest.raises(CandidateError, match=r"a mask of shape \(4, 4\) does not fit a weight of shape \(2, 4\)"):
        apply_masks(nn.Sequential(layer))


def test_a_plan_with_sparsity_can_be_stored(digits_task: Task) -> None:
    plan = (Sparsify({"conv2": 0.5}, pattern="2:4"), Sparsify(0.9, scope="layer", criterion="snip", seed=3))
    assert decode_plan(encode_plan(plan)) == plan
    assert [step.describe() for step in plan] == ["sparse 2:4", "sparse 90% by snip"]
    assert Sparsify({"a": 0.5, "b": 0.8}, pattern="block:4x1").describe() == "sparse 50%-80% block:4x1"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1.0}, "sparsity must be at least 0 and below 1, not 1.0"),
        ({"sparsity": {}}, "sparsity names no layer"),
        ({"sparsity": {"conv1": -0.1}}, "sparsity must be at least 0 and below 1, not -0.1"),
        ({"pattern": "4:4"}, "pattern must be 'unstructured', 'N:M' with 1 <= N < M"),
        ({"pattern": "block:0x4"}, "pattern must be 'unstructured'"),
        ({"pattern": "1:4"}, "pattern 1:4 means a sparsity of 0.75, not 0.5"),
        ({"scope": "local"}, "scope must be one of global, layer, not 'local'"),
        ({"criterion": "l1"}, "criterion must be one of magnitude, taylor, snip, random, not 'l1'"),
        ({"samples": 0}, "samples must be at least 1, not 0"),
    ],
)
def test_impossible_settings_are_refused_at_once(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sparsify(**settings)  # type: ignore[arg-type]


def test_unknown_layers_and_models_without_a_fitting_layer_are_refused() -> None:
    with pytest.raises(CandidateError, match="no layer called stern; layers: stem, wide"):
        Sparsify({"stern": 0.5})(small_net(), SMALL)
    with pytest.raises(CandidateError, match="no layer can take zeros"):
        Sparsify(pattern="32:64")(small_net(), SMALL)
