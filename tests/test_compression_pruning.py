"""Pruning: how many channels go, which ones, and what goes with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress import Data, InputError, Prune, Split, Task, load_task
from autocompress.core.errors import CandidateError
from autocompress.tasks.data import normalise
from autocompress.tasks.models import ModelSource

RNG = np.random.default_rng(0)
NOISE = Split(RNG.integers(0, 256, (16, 3, 32, 32), dtype=np.uint8), np.arange(16) % 10)
DATA = Data("noise", NOISE, NOISE, NOISE, tuple("abcdefghij"), (0.5,) * 3, (0.25,) * 3)


class TwoConvolutions(nn.Module):
    """A plain net: what the first convolution makes, only the second one takes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 8, 3, padding=1)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.second(F.relu(self.first(x))).mean((2, 3)))


def two_convolutions() -> nn.Module:
    """The plain net, with a second convolution that weighs all its inputs alike."""
    torch.manual_seed(0)
    model = TwoConvolutions()
    with torch.no_grad():
        # Strengths between 1 and 16 in a mixed-up order.
        model.first.weight.mul_(torch.tensor([float(7 * c % 16 + 1) for c in range(16)])[:, None, None, None])
        model.second.weight.fill_(0.01)
    return model.eval()


PLAIN = Task("two convolutions on noise", two_convolutions, DATA, trained=False)


@pytest.fixture(scope="module")
def resnet20() -> Task:
    """ResNet-20 with random weights."""
    return Task("resnet20 on noise", ModelSource("resnet20", 10, (3, 32, 32)), DATA, trained=False)


def widths(model: nn.Module) -> dict[str, int]:
    """Output channels of every convolution and linear layer."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            found[name] = module.weight.shape[0]
    return found


def changed(model: nn.Module, task: Task) -> dict[str, int]:
    """The layers that have fewer outputs than the task's own model, with what is left of them."""
    before = widths(task.build())
    return {name: width for name, width in widths(model).items() if width != before[name]}


def parameters(model: nn.Module) -> int:
    """How many there are."""
    return sum(parameter.numel() for parameter in model.parameters())


def logits(model: nn.Module, task: Task) -> Tensor:
    """Logits of the search split."""
    with torch.no_grad():
        return model.eval()(torch.from_numpy(normalise(task.data, task.data.search.inputs)))


@pytest.mark.parametrize(
    ("ratio", "round_to", "left"),
    [
        (0.0, 8, (32, 64, 64)),
        (0.25, 8, (24, 48, 48)),
        (0.3, 8, (24, 48, 48)),  # nearest multiples of 22.4 and 44.8
        (0.3, 1, (22, 45, 45)),
        (0.5, 8, (16, 32, 32)),
        (0.75, 16, (16, 16, 16)),
        (0.95, 8, (8, 8, 8)),
        (0.99, 1, (1, 1, 1)),
        (0.5, 32, (32, 32, 32)),
    ],
)
def test_the_ratio_says_how_many_channels_stay(
    digits_task: Task, ratio: float, round_to: int, left: tuple[int, int, int]
) -> None:
    model = Prune(ratio, round_to=round_to)(digits_task.build(), digits_task)
    assert widths(model) == dict(zip(("conv1", "conv2", "conv3"), left, strict=True), fc=10)


def test_the_classifier_keeps_its_outputs_even_where_it_is_named(digits_task: Task) -> None:
    model = Prune({"fc": 0.5, "conv3": 0.5})(digits_task.build(), digits_task)
    assert changed(model, digits_task) == {"conv3": 32}
    assert logits(model, digits_task).shape == (len(digits_task.data.search), 10)


def test_a_ratio_of_zero_leaves_the_outputs_as_they_are(digits_task: Task) -> None:
    model = Prune(0.0)(digits_task.build(), digits_task)
    assert torch.equal(logits(model, digits_task), logits(digits_task.build(), digits_task))


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_channels_that_shortcuts_tie_together_are_cut_together(resnet20: Task, ratio: float) -> None:
    model = Prune(ratio)(resnet20.build(), resnet20)
    left = widths(model)
    for stage in ("layer1", "layer2", "layer3"):
        stream = {left[f"{stage}.{block}.conv2"] for block in range(3)}
        stream |= {left[f"{stage}.0.shortcut.0"]} if stage != "layer1" else {left["conv1"]}
        assert len(stream) == 1
    assert all(width % 8 == 0 for name, width in left.items() if name != "fc")
    assert left["fc"] == 10
    assert logits(model, resnet20).shape == (16, 10)
    assert parameters(model) < parameters(resnet20.build()) * (1 - ratio)


def test_a_map_cuts_only_the_layers_that_it_names(resnet20: Task) -> None:
    model = Prune({"layer2.1.conv1": 0.5, "layer3.0.conv1": 0.25})(resnet20.build(), resnet20)
    assert changed(model, resnet20) == {"layer2.1.conv1": 16, "layer3.0.conv1": 48}
    assert logits(model, resnet20).shape == (16, 10)


@pytest.mark.parametrize("name", ["layer2.0.conv2", "layer2.0.shortcut.0", "layer2.2.conv2"])
def test_a_map_that_names_one_layer_of_a_residual_stream_cuts_the_whole_stream(resnet20: Task, name: str) -> None:
    model = Prune({name: 0.5})(resnet20.build(), resnet20)
    stream = ("layer2.0.conv2", "layer2.0.shortcut.0", "layer2.1.conv2", "layer2.2.conv2")
    assert changed(model, resnet20) == dict.fromkeys(stream, 16)


def test_the_channels_of_least_l2_norm_are_removed() -> None:
    before = two_convolutions()
    model = Prune({"first": 0.5})(two_convolutions(), PLAIN)
    weight = before.get_submodule("first").weight.detach().numpy()
    norms = np.sqrt(np.square(weight).sum((1, 2, 3)))
    kept = np.sort(np.argsort(norms)[8:])
    assert np.array_equal(model.get_submodule("first").weight.detach().numpy(), weight[kept])
    assert torch.equal(model.get_submodule("first").bias, before.get_submodule("first").bias[kept])
    assert torch.equal(model.get_submodule("second").weight, before.get_submodule("second").weight[:, kept])


@pytest.mark.parametrize(("importance", "kept"), [("l1", "spread"), ("l2", "peaked")])
def test_the_norm_decides_between_many_small_weights_and_a_large_one(importance: str, kept: str) -> None:
    model = two_convolutions()
    with torch.no_grad():
        model.get_submodule("first").weight[:8] = 0.2  # sum 5.4, square sum 1.08
        model.get_submodule("first").weight[8:] = 0.0
        model.get_submodule("first").weight[8:, 0, 0, 0] = 2.0  # sum 2, square sum 4
    pruned = Prune({"first": 0.5}, importance=importance)(model, PLAIN)
    largest = float(pruned.get_submodule("first").weight.detach().abs().amax())
    assert largest == pytest.approx({"spread": 0.2, "peaked": 2.0}[kept])


def test_the_weights_that_take_a_channel_count_for_it_too() -> None:
    model = two_convolutions()
    with torch.no_grad():
        model.get_submodule("first").weight[:] = 0.1
        model.get_submodule("second").weight[:, :8] = 1.0
    pruned = Prune({"first": 0.5})(model, PLAIN)
    assert pruned.get_submodule("second").weight.unique().tolist() == [1.0]


def test_removing_channels_that_do_nothing_keeps_the_outputs(digits_task: Task) -> None:
    model = digits_task.build()
    rng = np.random.default_rng(1)
    with torch.no_grad():
        for number in (1, 2, 3):
            conv, norm = model.get_submodule(f"conv{number}"), model.get_submodule(f"bn{number}")
            idle = torch.from_numpy(rng.permutation(conv.weight.shape[0])[::2].copy())
            for tensor in (conv.weight, norm.weight, norm.bias):
                tensor[idle] = 0
    expected = logits(model, digits_task)
    pruned = Prune(0.5)(model, digits_task)
    assert widths(pruned) == {"conv1": 16, "conv2": 32, "conv3": 32, "fc": 10}
    assert torch.allclose(logits(pruned, digits_task), expected, atol=1e-4)


def test_removing_idle_channels_of_a_residual_stream_keeps_the_outputs(resnet20: Task) -> None:
    model = resnet20.build()
    idle = torch.arange(0, 64, 2)
    with torch.no_grad():
        for path in ("0.conv2", "0.shortcut.0", "1.conv2", "2.conv2"):
            model.get_submodule(f"layer3.{path}").weight[idle] = 0
            norm = model.get_submodule(f"layer3.{path.replace('conv', 'bn').replace('shortcut.0', 'shortcut.1')}")
            norm.weight[idle] = 0
            norm.bias[idle] = 0
    expected = logits(model, resnet20)
    pruned = Prune({"layer3.0.conv2": 0.5})(model, resnet20)
    assert widths(pruned)["layer3.2.conv2"] == 32
    assert torch.allclose(logits(pruned, resnet20), expected, atol=1e-4)


def test_the_same_cut_is_made_every_time(resnet20: Task) -> None:
    first, second = (Prune(0.5)(resnet20.build(), resnet20).state_dict() for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("ratio", [1.0, 1.5, -0.1, float("nan"), {"conv1": 1.0}, {"conv1": 0.5, "conv2": -1.0}])
def test_a_ratio_outside_its_range_is_refused_at_once(ratio: float | dict[str, float]) -> None:
    with pytest.raises(InputError, match="ratio must be at least 0 and below 1, not"):
        Prune(ratio)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"round_to": 0}, "round_to must be at least 1, not 0"), ({"importance": "l3"}, "one of l1, l2, .*, not 'l3'")],
)
def test_other_impossible_settings_are_refused_at_once(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Prune(0.5, **settings)  # type: ignore[arg-type]


def test_an_unknown_layer_fails_the_candidate_by_name(digits_task: Task) -> None:
    with pytest.raises(CandidateError, match="no layer called conv9, layer1"):
        Prune({"conv1": 0.5, "layer1": 0.5, "conv9": 0.5})(digits_task.build(), digits_task)


@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:mobilenet_v3_small"])
def test_models_from_the_zoos_can_be_cut(name: str) -> None:
    task = load_task(name, DATA)
    model = Prune(0.5)(task.build(), task)
    assert logits(model, task).shape == (16, 10)
    assert parameters(model) < 0.4 * parameters(task.build())
    depthwise = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert all(m.groups == m.in_channels == m.out_channels for m in depthwise)
    assert len(depthwise) == (11 if "mobilenet" in name else 0)
