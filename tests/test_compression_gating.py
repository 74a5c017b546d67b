"""Gates over blocks and channels, and experts: what they leave out, and that nothing else changes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress import Data, InputError, Quantize, Split, Task
from autocompress.compression.experts import Router, SplitExperts, balanced_clusters, fit_routers, mlp_blocks
from autocompress.compression.finetune import Finetune, TrainingStep
from autocompress.compression.gating import (
    ChannelGate,
    GateChannels,
    SkipBlocks,
    gates,
    residual_blocks,
    run_shares,
    skip_rates,
)
from autocompress.compression.graph import find_layers
from autocompress.compression.training import accuracy
from autocompress.core.codec import decode_plan, encode_plan
from autocompress.core.errors import CandidateError
from autocompress.core.notes import collect_notes
from autocompress.evaluators.adaptive import expected_macs, macs_per_input
from autocompress.hardware.x86 import CpuBackend
from autocompress.tasks.attention import open_attention
from autocompress.tasks.data import example_input, normalise
from autocompress.tasks.models import CifarResNet, TextTransformer


class Mlp(nn.Module):
    """One residual MLP block on the pixels of a digit."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(64, 32), nn.Linear(32, 10)
        self.fc1, self.fc2 = nn.Linear(32, 96), nn.Linear(96, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(1))
        return self.head(x + self.fc2(F.gelu(self.fc1(x))))


@pytest.fixture(scope="module")
def resnet(digits_task: Task) -> Task:
    """A small residual network with random weights, on the digits."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return CifarResNet(14, 10, 1).eval()

    return Task("resnet14 on digits", build, digits_task.data, trained=False)


@pytest.fixture(scope="module")
def mlp(digits_task: Task) -> Task:
    """The MLP, trained on the digits."""
    torch.manual_seed(0)
    untrained = Task("", lambda: Mlp().eval(), digits_task.data, trained=False)
    model = Finetune(steps=150, alpha=0.0, lr=0.1)(untrained.build(), untrained)
    return Task("mlp on digits", lambda: copy.deepcopy(model), digits_task.data)


@pytest.fixture(scope="module")
def tokens(digits_task: Task) -> Task:
    """A text transformer with random weights, on the digits' pixels as tokens."""
    parts = [digits_task.data.split(name) for name in ("train", "search", "test")]
    splits = [Split((part.inputs.reshape(-1, 64) // 16).astype(np.int64), part.labels) for part in parts]
    data = Data("tokens", *splits, digits_task.data.classes, vocabulary=16)

    def build() -> nn.Module:
        torch.manual_seed(0)
        return open_attention(TextTransformer(10, 16, 64, 32, 4, 2)).eval()

    return Task("transformer on tokens", build, data, trained=False)


@pytest.fixture(scope="module")
def skipping(resnet: Task) -> nn.Module:
    """The residual network, trained with gates to a budget of 30 %; read only."""
    return SkipBlocks(budget=0.3, steps=40, lr=0.1, alpha=0.0)(resnet.build(), resnet)


@pytest.fixture(scope="module")
def gated(digits_task: Task) -> nn.Module:
    """The digits model that keeps half of its channels for each input; read only."""
    return GateChannels(ratio=0.5, steps=60)(digits_task.build(), digits_task)


def inputs(task: Task, count: int = 64) -> Tensor:
    """The first of the search split, as a model's input."""
    return torch.from_numpy(normalise(task.data, task.data.search.inputs[:count]))


def run(model: nn.Module, x: Tensor) -> Tensor:
    """Logits, without gradients."""
    with torch.no_grad():
        return model(x)


def random_gates(model: nn.Module, x: Tensor) -> nn.Module:
    """Block gates that decide by the input, each in its own way, about as often yes as no."""
    generator = torch.Generator().manual_seed(0)
    for gate in gates(model).values():
        with torch.no_grad():
            gate.fc.weight.normal_(0, 1, generator=generator)  # type: ignore[operator,union-attr]
            gate.fc.bias.zero_()  # type: ignore[operator,union-attr]
        gate.norm.train().momentum = 1.0  # type: ignore[operator,union-attr,assignment]
    run(model, x)
    return model.eval()


def check_file(model: nn.Module, task: Task, folder: Path, runtime: str = "onnxruntime") -> None:
    """Assert that the runtime computes what PyTorch does, whatever the number of inputs."""
    backend = CpuBackend(runtime)
    artifact = backend.build(model, task, folder)
    for count in (1, 32):
        x = inputs(task, count)
        assert np.allclose(backend.predict(artifact, x.numpy()), run(model, x).numpy(), rtol=1e-3, atol=1e-4)


def test_residual_blocks_add_their_input_and_keep_its_shape(resnet: Task, tokens: Task, digits_task: Task) -> None:
    found = residual_blocks(resnet.build(), example_input(resnet.data))
    assert found == {
        "layer1.0": (1, 16, 8, 8),
        "layer1.1": (1, 16, 8, 8),
        "layer2.1": (1, 32, 4, 4),
        "layer3.1": (1, 64, 2, 2),
    }
    assert list(residual_blocks(tokens.build(), example_input(tokens.data))) == ["encoder.layers.0", "encoder.layers.1"]
    with pytest.raises(CandidateError, match="no residual block"):
        SkipBlocks().prepare(digits_task.build(), digits_task)


def test_new_gates_let_every_block_run(resnet: Task) -> None:
    model = SkipBlocks().prepare(resnet.build(), resnet)
    assert torch.equal(run(model, inputs(resnet)), run(resnet.build(), inputs(resnet)))
    assert set(skip_rates(model, resnet.data, resnet.data.search).values()) == {0.0}


def test_a_skipped_block_is_as_if_it_were_not_there(resnet: Task) -> None:
    model: Any = random_gates(SkipBlocks().prepare(resnet.build(), resnet), inputs(resnet))
    x = inputs(resnet, 24)
    rates = skip_rates(model, resnet.data, resnet.data.search)
    assert any(0.05 < rate < 0.95 for rate in rates.values())
    original: Any = resnet.build()
    by_path = {gate.governs[0]: gate for gate in model.skip_gates.gates}
    for i in range(len(x)):
        with torch.no_grad():
            y = F.relu(original.bn1(original.conv1(x[i : i + 1])))
            for stage in ("layer1", "layer2", "layer3"):
                for number, block in enumerate(getattr(original, stage)):
                    gate = by_path.get(f"{stage}.{number}")
                    if gate is None or gate(y).item() == 1:
                        y = block(y)
            logits = original.fc(y.mean((2, 3)))
        assert torch.allclose(run(model, x[i : i + 1]), logits, atol=1e-5)


def test_decisions_are_hard_when_the_model_is_used(skipping: nn.Module, resnet: Task) -> None:
    shares = run_shares(skipping, resnet.data, resnet.data.search)
    assert len(shares) == 4
    assert all(set(np.unique(share)) <= {0.0, 1.0} for share in shares.values())


def test_the_penalty_lowers_the_share_of_work_that_runs(skipping: nn.Module, resnet: Task) -> None:
    free = SkipBlocks(budget=1.0, steps=40, lr=0.1, alpha=0.0)(resnet.build(), resnet)
    data = resnet.data

    def share(model: Any) -> float:
        rates = skip_rates(model, data, data.search).values()
        return sum((1 - rate) * macs for rate, macs in zip(rates, model.skip_gates.macs, strict=True)) / sum(
            model.skip_gates.macs
        )

    assert share(free) > 0.8
    assert share(skipping) < 0.5
    assert accuracy(skipping, data, data.search) > 0.8
    assert expected_macs(skipping, resnet).value < 0.75 * expected_macs(free, resnet).value


def test_the_penalty_is_the_work_beyond_the_budget(resnet: Task) -> None:
    model: Any = SkipBlocks(budget=0.25, penalty=3.0).prepare(resnet.build(), resnet)
    model.train()(inputs(resnet))
    assert float(model.skip_gates.training_penalty().detach()) == pytest.approx(3.0 * 0.75)
    assert model.skip_gates.training_penalty() == 0.0
    copy.deepcopy(model)


def test_skipped_blocks_cost_nothing(resnet: Task) -> None:
    model: Any = SkipBlocks().prepare(resnet.build(), resnet)
    layers = find_layers(model, example_input(resnet.data))
    whole = sum(layer.macs for layer in layers)
    assert expected_macs(model, resnet).value == whole
    with torch.no_grad():
        model.skip_gates.gates[1].fc.bias.fill_(-1.0)  # never runs layer1.1
    block = sum(layer.macs for layer in layers if layer.name.startswith("layer1.1."))
    assert block == 2 * 64 * 16 * 16 * 9
    assert np.unique(macs_per_input(model, resnet, resnet.data.search)).tolist() == [whole - block]


def test_exactly_the_winning_channels_stay_for_each_input(gated: nn.Module, digits_task: Task) -> None:
    model: Any = copy.deepcopy(gated)
    made = {name: gate for name, gate in gates(model).items() if isinstance(gate, ChannelGate)}
    assert {name: gate.kept for name, gate in made.items()} == {
        "conv1.channel_gate": 16,
        "conv2.channel_gate": 32,
        "conv3.channel_gate": 32,
    }
    seen: list[Tensor] = []
    model.bn2.register_forward_hook(lambda module, taken, output: seen.append(output))
    run(model, inputs(digits_task))
    dead = (seen[0] == 0).all(3).all(2)
    assert (dead.sum(1) >= 32).all()
    assert len(torch.unique(dead, dim=0)) > 1
    ties = torch.zeros(5, 64)
    assert made["conv2.channel_gate"].winners(ties).sum(1).tolist() == [32.0] * 5


def test_gated_channels_are_those_of_the_papers_formula(gated: nn.Module, digits_task: Task) -> None:
    model: Any = copy.deepcopy(gated)
    taken: list[Tensor] = []
    model.conv2.register_forward_pre_hook(lambda module, inputs: taken.append(inputs[0].detach()))
    run(model, inputs(digits_task, 16))
    x, gate, bn = taken[0], model.conv2.channel_gate, model.bn2
    plain = F.conv2d(x, model.conv2.weight, padding=1, stride=model.conv2.stride)
    normal = (plain - bn.running_mean[:, None, None]) / (bn.running_var[:, None, None] + bn.eps).sqrt()
    normal = normal * bn.weight[:, None, None] + bn.bias[:, None, None]
    pooled = x.abs().mean((2, 3)).detach().numpy()
    pooled = pooled / pooled.mean(1, keepdims=True) - 1
    saliency = np.maximum(pooled @ gate.fc.weight.detach().numpy().T + gate.fc.bias.detach().numpy(), 0)
    cut = np.sort(saliency, 1)[:, -gate.kept][:, None]
    expected = normal.detach().numpy() * np.where(saliency >= cut, saliency, 0)[:, :, None, None]
    seen: list[Tensor] = []
    bn.register_forward_hook(lambda module, taken, output: seen.append(output))
    run(model, inputs(digits_task, 16))
    assert np.allclose(seen[0].numpy(), expected, atol=1e-5)


def test_gated_channels_keep_the_accuracy_at_half_the_macs(gated: nn.Module, digits_task: Task) -> None:
    data = digits_task.data
    assert accuracy(gated, data, data.search) > 0.93
    layers = {layer.name: layer.macs for layer in find_layers(copy.deepcopy(gated), example_input(data))}
    convs = sum(layers[name] for name in ("conv1", "conv2", "conv3"))
    assert expected_macs(gated, digits_task).value == sum(layers.values()) - convs / 2


def test_a_convolution_that_no_batch_norm_follows_is_left_and_said_so(digits_task: Task) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 10)
    )
    with collect_notes() as notes:
        model = GateChannels().prepare(plain.eval(), digits_task)
    assert list(gates(model)) == ["2.channel_gate"]
    assert notes == ["GateChannels: 0: no batch norm takes its output alone"]
    with pytest.raises(CandidateError, match="no convolution with a batch norm"):
        GateChannels(layers=("5",)).prepare(plain, digits_task)


def test_mlp_blocks_are_two_linear_layers_around_an_activation(mlp: Task, tokens: Task) -> None:
    assert mlp_blocks(mlp.build(), example_input(mlp.data)) == [("fc1", "fc2")]
    assert mlp_blocks(tokens.build(), example_input(tokens.data)) == [
        ("encoder.layers.0.linear1", "encoder.layers.0.linear2"),
        ("encoder.layers.1.linear1", "encoder.layers.1.linear2"),
    ]


def test_with_all_experts_active_nothing_changes(mlp: Task, tokens: Task) -> None:
    for task in (mlp, tokens):
        model = SplitExperts(experts=4, active=4, steps=0, samples=32)(task.build(), task)
        assert torch.equal(run(model, inputs(task)), run(task.build(), inputs(task)))


def test_experts_are_clusters_of_equal_size() -> None:
    rng = np.random.default_rng(0)
    centres = np.array([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    truth = np.repeat([0, 1, 2], 5)
    points = centres[truth] + rng.normal(0, 0.5, (15, 2))
    found = balanced_clusters(points, 3, seed=0)
    assert sorted({(int(a), int(b)) for a, b in zip(truth, found, strict=True)}, key=lambda pair: pair[0]) == [
        (0, found[0]),
        (1, found[5]),
        (2, found[10]),
    ]
    uneven = balanced_clusters(rng.normal(size=(14, 3)), 4, seed=0)
    assert sorted(np.bincount(uneven).tolist()) == [3, 3, 4, 4]


def test_the_chosen_experts_alone_reach_the_output(mlp: Task) -> None:
    model: Any = SplitExperts(experts=8, active=3, steps=0)(mlp.build(), mlp)
    original: Any = mlp.build()
    router, x = model.fc1.router, inputs(mlp, 16)
    with torch.no_grad():
        stem = original.stem(x.flatten(1))
        for i, row in enumerate(stem):
            experts = router.fc(row).topk(3).indices
            neurons = torch.isin(router.expert, experts)
            hidden = F.gelu(row @ original.fc1.weight[neurons].T + original.fc1.bias[neurons])
            y = row + hidden @ original.fc2.weight[:, neurons].T + original.fc2.bias
            assert torch.allclose(run(model, x[i : i + 1])[0], original.head(y), atol=1e-5)


def test_routers_start_as_the_least_squares_fit(mlp: Task) -> None:
    model: Any = SplitExperts(experts=8, active=3).prepare(mlp.build(), mlp)
    x = inputs(mlp, 256)
    fit_routers(model, x, ridge=0.0)
    router: Router = model.fc1.router
    with torch.no_grad():
        stem = model.stem(x.flatten(1))
        hidden = F.gelu(F.linear(stem, model.fc1.weight, model.fc1.bias)).abs() * model.fc2.weight.norm(dim=0)
    target = np.stack([hidden[:, router.expert == e].sum(1).numpy() for e in range(8)], 1)
    assert float(router.scale) == pytest.approx(target.mean(), rel=1e-5)
    table = np.concatenate([stem.numpy(), np.ones((256, 1))], 1)
    solved = np.linalg.lstsq(table, target / target.mean(), rcond=None)[0]
    assert np.allclose(router.fc.weight.detach().numpy(), solved[:-1].T, atol=1e-3)
    assert router.active == 3


def test_routers_of_layers_wider_than_their_data_are_the_same_ridge_fit(mlp: Task) -> None:
    from sklearn.linear_model import Ridge

    model: Any = SplitExperts(experts=8, active=3).prepare(mlp.build(), mlp)
    x = inputs(mlp, 12)  # fewer than the 32 inputs of the block
    fit_routers(model, x, ridge=1e-2)
    router: Router = model.fc1.router
    with torch.no_grad():
        stem = model.stem(x.flatten(1)).double()
        hidden = F.gelu(F.linear(stem.float(), model.fc1.weight, model.fc1.bias)).abs() * model.fc2.weight.norm(dim=0)
    target = np.stack([hidden[:, router.expert == e].sum(1).numpy() for e in range(8)], 1)
    fitted = Ridge(1e-2 * float(stem.square().sum(0).mean())).fit(stem.numpy(), target / target.mean())
    assert np.allclose(router.fc.weight.detach().numpy(), fitted.coef_, atol=1e-4)
    assert np.allclose(router.fc.bias.detach().numpy(), fitted.intercept_, atol=1e-4)


def test_fitted_and_trained_routers_choose_better_than_blind_ones(mlp: Task) -> None:
    data = mlp.data
    blind = SplitExperts(experts=8, active=2).prepare(mlp.build(), mlp)
    trained = SplitExperts(experts=8, active=2, steps=60)(mlp.build(), mlp)
    full = accuracy(mlp.build(), data, data.search)
    assert accuracy(blind, data, data.search) < accuracy(trained, data, data.search)
    assert accuracy(trained, data, data.search) > full - 0.05
    layers = {layer.name: layer.macs for layer in find_layers(trained, example_input(data))}
    idle = 0.75 * (layers["fc1"] + layers["fc2"])
    assert layers["fc1.router.fc"] == 32 * 8
    assert expected_macs(trained, mlp).value == pytest.approx(sum(layers.values()) - idle)


STEPS: list[tuple[str, TrainingStep]] = [
    ("resnet", SkipBlocks(steps=2, lr=0.01)),
    ("digits_task", GateChannels(steps=2)),
    ("mlp", SplitExperts(steps=2)),
]


@pytest.mark.parametrize(("name", "step"), STEPS)
def test_trained_weights_fit_what_prepare_makes(request: pytest.FixtureRequest, name: str, step: TrainingStep) -> None:
    task: Task = request.getfixturevalue(name)
    model = step(task.build(), task)
    again = step.prepare(task.build(), task)
    twin = step.prepare(task.build(), task).state_dict()
    assert all(torch.equal(tensor, twin[key]) for key, tensor in again.state_dict().items())
    again.load_state_dict({key: tensor.clone() for key, tensor in model.state_dict().items()})
    expected = run(model, inputs(task))
    assert torch.equal(run(again.eval(), inputs(task)), expected)
    assert torch.equal(run(copy.deepcopy(model), inputs(task)), expected)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("resnet", 32),
        pytest.param("resnet", 8, marks=pytest.mark.slow),
        ("digits_task", 32),
        ("mlp", 8),
        ("tokens", 32),
    ],
)
def test_the_file_computes_what_pytorch_computes(
    request: pytest.FixtureRequest, tmp_path: Path, name: str, bits: int
) -> None:
    task: Task = request.getfixturevalue(name)
    if name == "resnet":
        model = random_gates(SkipBlocks().prepare(task.build(), task), inputs(task))
    elif name == "digits_task":
        model = copy.deepcopy(request.getfixturevalue("gated"))
    else:
        model = SplitExperts(steps=0, samples=64)(task.build(), task)
    if bits == 32:
        check_file(model, task, tmp_path)
        return
    model = Quantize(bits, outputs="all")(model, task)
    backend, x = CpuBackend("onnxruntime"), inputs(task)
    got = backend.predict(backend.build(model, task, tmp_path), x.numpy())
    # A sum that falls to the other side of a rounding step may change a decision for a few inputs.
    assert np.quantile(np.abs(got - run(model, x).numpy()).max(1), 0.9) < 0.5


def test_openvino_computes_gates_too(gated: nn.Module, digits_task: Task, tmp_path: Path) -> None:
    check_file(copy.deepcopy(gated), digits_task, tmp_path, "openvino")


def test_plans_with_gates_are_stored_and_read_back() -> None:
    plan = (
        SkipBlocks(0, budget=0.4),
        GateChannels(0, ratio=0.25, layers=("conv1",)),
        SplitExperts(experts=4, active=1),
    )
    assert decode_plan(encode_plan(plan)) == plan
    assert [step.describe() for step in plan] == ["skip blocks to 40%", "gate 25% of channels", "1 of 4 experts"]


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (SkipBlocks, {"budget": 1.1}, "budget must lie in 0..1"),
        (SkipBlocks, {"penalty": -1.0}, "penalty must be at least 0"),
        (GateChannels, {"ratio": 1.0}, "ratio must be at least 0 and below 1"),
        (GateChannels, {"layers": "conv1"}, "a list of layer names"),
        (GateChannels, {"penalty": -1.0}, "penalty must be at least 0"),
        (SplitExperts, {"experts": 1, "active": 1}, "experts must be at least 2"),
        (SplitExperts, {"experts": 4, "active": 5}, "active must lie in 1..4"),
        (SplitExperts, {"samples": 0}, "samples must be at least 1"),
        (SplitExperts, {"layers": "fc1"}, "a list of layer names"),
    ],
)
def test_impossible_settings_are_refused(kind: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        kind(**settings)


def test_what_a_model_lacks_is_refused(mlp: Task, digits_task: Task) -> None:
    with pytest.raises(CandidateError, match="no MLP block"):
        SplitExperts().prepare(digits_task.build(), digits_task)
    with pytest.raises(CandidateError, match="fc2 begins no MLP block; those that do: fc1"):
        SplitExperts(layers=("fc2",)).prepare(mlp.build(), mlp)
    with pytest.raises(CandidateError, match="no layer called conv9"):
        GateChannels(layers=("conv9",)).prepare(digits_task.build(), digits_task)
    with collect_notes() as notes, pytest.raises(CandidateError, match="no MLP block"):
        SplitExperts(experts=128).prepare(mlp.build(), mlp)
    assert notes == ["SplitExperts: fc1: only 96 hidden neurons"]
