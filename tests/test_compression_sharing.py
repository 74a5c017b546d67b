"""Weight sharing: k-means against scikit-learn's, what stays zero, and values that are trained together."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor, nn

from autocompress import InputError, Task
from autocompress.compression.coding import compressed_size
from autocompress.compression.masks import set_mask
from autocompress.compression.sharing import Cluster, SharedWeight, TuneCodebook, share_values
from autocompress.compression.training import accuracy
from autocompress.core.codec import check_plan, decode_plan, describe_plan, encode_plan
from autocompress.core.errors import CandidateError
from autocompress.core.notes import collect_notes

LAYERS = ("conv1", "conv2", "conv3", "fc")


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights of the digits model's layers."""
    return {name: model.get_submodule(name).weight.detach().clone() for name in LAYERS}


def values(weight: Tensor) -> Tensor:
    """Different non-zero values."""
    return weight[weight != 0].unique()


def masked(task: Task, share: float) -> nn.Module:
    """The digits model with its smallest weights masked, layer by layer."""
    model = task.build()
    for name in LAYERS[:-1]:
        module = model.get_submodule(name)
        size = module.weight.detach().abs()
        set_mask(module, size > size.flatten().kthvalue(round(share * size.numel())).values)
    return model


@pytest.mark.parametrize("clusters", [2, 16, 32])
@pytest.mark.parametrize("init", ["linear", "density", "kmeans++"])
def test_every_layer_takes_no_more_values_than_asked_for(digits_task: Task, clusters: int, init: str) -> None:
    model = Cluster(clusters, init=init)(digits_task.build(), digits_task)
    assert all(len(values(weight)) <= clusters for weight in weights(model).values())


def test_a_map_shares_only_the_layers_that_it_names(digits_task: Task) -> None:
    before = weights(digits_task.build())
    after = weights(Cluster({"conv2": 4, "fc": 16})(digits_task.build(), digits_task))
    assert len(values(after["conv2"])) == 4
    assert len(values(after["fc"])) == 16
    assert torch.equal(after["conv1"], before["conv1"])
    assert torch.equal(after["conv3"], before["conv3"])


def test_zeros_stay_zero_and_count_as_no_value(digits_task: Task) -> None:
    model = masked(digits_task, 0.8)
    with torch.no_grad():
        model.conv2.weight[model.conv2.weight == 0] = -0.0
    zeros = {name: weight == 0 for name, weight in weights(model).items()}
    after = weights(Cluster(8)(model, digits_task))
    for name, weight in after.items():
        assert torch.equal(weight == 0, zeros[name])
        assert len(values(weight)) == 8
        assert not torch.signbit(weight[weight == 0]).any()


def test_zeros_are_weights_like_others_where_they_need_not_be_kept(digits_task: Task) -> None:
    for keep, number in ((True, 9), (False, 8)):
        model = Cluster(8, keep_zeros=keep)(masked(digits_task, 0.3), digits_task)
        assert len(weights(model)["conv2"].unique()) == number


def test_layers_of_few_values_are_left_alone(digits_task: Task) -> None:
    once = weights(Cluster(16)(digits_task.build(), digits_task))
    model = digits_task.build()
    with torch.no_grad():
        for name, weight in once.items():
            model.get_submodule(name).weight.copy_(weight)
    again = weights(Cluster(16)(model, digits_task))
    assert all(torch.equal(again[name], once[name]) for name in LAYERS)


@pytest.mark.parametrize("clusters", [2, 5, 32, 256])
@pytest.mark.parametrize("shape", ["normal", "laplace", "heavy"])
def test_the_clusters_are_scikit_learns_and_every_weight_is_with_the_nearest(clusters: int, shape: str) -> None:
    rng = np.random.default_rng(clusters)
    draws = {"normal": rng.standard_normal, "laplace": rng.laplace, "heavy": lambda size: rng.standard_t(3, size)}
    points = (0.05 * draws[shape](size=6000)).astype(np.float32)  # type: ignore[operator]
    shared = share_values(points, clusters)
    centers = np.unique(shared)
    assert len(centers) <= clusters
    distances = np.abs(points[:, None].astype(float) - centers[None])
    assert np.allclose(np.abs(points.astype(float) - shared), distances.min(1), atol=1e-8)
    starts = np.linspace(points.min(), points.max(), clusters)[:, None]
    reference = KMeans(clusters, init=starts, n_init=1, tol=0).fit(points[:, None].astype(float))
    assert np.square(points.astype(float) - shared).sum() <= 1.001 * reference.inertia_


def test_linear_starts_keep_large_weights_better_and_random_starts_the_rest() -> None:
    points = np.random.default_rng(0).standard_t(3, 20_000).astype(np.float32)
    shared = {init: share_values(points, 32, init) for init in ("linear", "density", "kmeans++")}
    largest = np.abs(points) >= np.sort(np.abs(points))[-20]
    worst = {init: float(np.abs(points - found)[largest].max()) for init, found in shared.items()}
    assert worst["linear"] < worst["density"]
    typical = {init: float(np.median(np.abs(points - found))) for init, found in shared.items()}
    assert typical["density"] < typical["linear"]


def test_the_same_seed_gives_the_same_values() -> None:
    points = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
    first, second, other = (share_values(points, 16, "kmeans++", seed) for seed in (1, 1, 2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_a_large_layer_takes_a_large_codebook() -> None:
    points = np.random.default_rng(0).standard_normal(300_000).astype(np.float32)
    shared = share_values(points, 65536)
    assert 60_000 < len(np.unique(shared)) <= 65536
    assert np.abs(points - shared).max() < 1e-3


def test_accuracy_stays_and_the_file_shrinks(digits_task: Task) -> None:
    model = digits_task.build()
    dense, exact = compressed_size(model), accuracy(model, digits_task.data, digits_task.data.search)
    model = Cluster(32)(model, digits_task)
    assert accuracy(model, digits_task.data, digits_task.data.search) > exact - 0.01
    assert compressed_size(model) < dense / 5


def test_a_layer_that_is_not_finite_is_left_alone_and_said_so(digits_task: Task) -> None:
    model = digits_task.build()
    with torch.no_grad():
        model.conv2.weight[0, 0, 0, 0] = float("nan")
    with collect_notes() as notes:
        model = Cluster(16)(model, digits_task)
    assert notes == ["Cluster: conv2: its weights are not all finite"]
    assert len(values(weights(model)["conv3"])) == 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clusters": 1}, "whole number from 2 to 65536 with linear, not 1"),
        ({"clusters": 65537}, "not 65537"),
        ({"clusters": 2.5}, "not 2.5"),
        ({"clusters": {"fc": 0}}, "not 0"),
        ({"clusters": {}}, "names no layer"),
        ({"clusters": 2000, "init": "kmeans++"}, r"from 2 to 1024 with kmeans\+\+, not 2000"),
        ({"init": "random"}, "one of linear, density, kmeans.., not 'random'"),
    ],
)
def test_impossible_settings_are_refused_at_once(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Cluster(**settings)  # type: ignore[arg-type]


def test_an_unknown_layer_fails_the_candidate_by_name(digits_task: Task) -> None:
    with pytest.raises(CandidateError, match="no layer called conv9; layers: conv1"):
        Cluster({"conv9": 16})(digits_task.build(), digits_task)


def test_plans_with_these_steps_can_be_stored_and_described() -> None:
    plan = (Cluster({"fc": 16, "conv1": 64}, seed=3), TuneCodebook(epochs=2))
    check_plan(plan)
    assert decode_plan(encode_plan(plan)) == plan
    assert describe_plan(plan) == "share 16-64 values, tune codebook 2 epochs"


def test_the_gradient_of_a_value_is_the_sum_of_its_weights_gradients() -> None:
    weight = torch.tensor([[0.5, 0.0, -1.0], [0.5, 0.5, 0.0]])
    shared = SharedWeight(weight)
    parameter = shared.right_inverse(weight).requires_grad_(True)
    made = shared(parameter)
    assert torch.allclose(made, weight)
    assert torch.equal(made == 0, weight == 0)
    gradient = torch.tensor([[1.0, 7.0, 5.0], [2.0, 6.0, 7.0]])
    (made * gradient).sum().backward()
    # Ascending values -1 (one weight) and 0.5 (three); the parameter is the value times the root of its weights.
    assert torch.allclose(parameter.grad * shared.scale, torch.tensor([5.0, 1.0 + 2.0 + 6.0]))
    # A step of gradient descent on the parameter moves the value by the mean gradient of its weights.
    step = (parameter - 0.1 * parameter.grad) / shared.scale - parameter / shared.scale
    assert torch.allclose(step, -0.1 * torch.tensor([5.0, 3.0]))


def test_shared_weights_move_together_and_zeros_stay(digits_task: Task) -> None:
    model = Cluster(8)(masked(digits_task, 0.7), digits_task)
    before, names = weights(model), list(model.state_dict())
    model = TuneCodebook(steps=12, batch_size=32)(model, digits_task)
    after = weights(model)
    for name in LAYERS:
        moved = after[name] - before[name]
        assert moved.abs().max() > 0
        assert torch.equal(after[name] == 0, before[name] == 0)
        for value in values(before[name]):
            assert len(after[name][before[name] == value].unique()) == 1
    assert sorted(model.state_dict()) == sorted(names)
    assert all(torch.equal(model.get_submodule(n).weight_mask, before[n] != 0) for n in LAYERS[:-1])


def test_tuning_gives_back_accuracy_that_sharing_lost(digits_task: Task) -> None:
    data = digits_task.data
    shared = Cluster(3, init="density")(digits_task.build(), digits_task)
    lost = accuracy(shared, data, data.search)
    tuned = TuneCodebook(steps=60, batch_size=64)(shared, digits_task)
    assert accuracy(tuned, data, data.search) > max(lost + 0.02, 0.9)
    assert all(len(values(weight)) <= 3 for weight in weights(tuned).values())


def test_tuned_weights_can_be_loaded_into_the_prepared_model(digits_task: Task) -> None:
    step = TuneCodebook(steps=3, batch_size=16)
    trained = step(Cluster(16)(masked(digits_task, 0.5), digits_task), digits_task).state_dict()
    again = step(Cluster(16)(masked(digits_task, 0.5), digits_task), digits_task).state_dict()
    assert all(torch.equal(trained[name], again[name]) for name in trained)
    fresh = step.prepare(Cluster(16)(masked(digits_task, 0.5), digits_task), digits_task)
    fresh.load_state_dict(trained)
    assert all(torch.equal(fresh.state_dict()[name], trained[name]) for name in trained)


def test_tuning_what_is_not_shared_fails_the_candidate(digits_task: Task) -> None:
    with pytest.raises(CandidateError, match="no layer shares its weights; Cluster must come before it"):
        TuneCodebook(steps=1)(digits_task.build(), digits_task)


def example() -> ModuleType:
    """The script `examples/deep_compression.py` as a module."""
    path = Path(__file__).parents[1] / "examples" / "deep_compression.py"
    spec = importlib.util.spec_from_file_location("deep_compression", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_deep_compression_makes_files_twenty_times_smaller_within_a_point(tmp_path: Path) -> None:
    stages = example().compress("digits", seed=0, folder=tmp_path, epochs=15)
    dense, last = stages[0], stages[-1]
    assert last.bytes == last.path.stat().st_size
    assert dense.bytes == dense.path.stat().st_size
    assert dense.accuracy > 0.97
    assert dense.bytes / last.bytes >= 20
    assert last.accuracy >= dense.accuracy - 0.01
