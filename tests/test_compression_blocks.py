"""Removing whole residual blocks: which there are, which matter least, and what is left."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress import Data, InputError, Split, Task
from autocompress.compression.blocks import DropBlocks, residual_blocks, score_blocks
from autocompress.compression.graph import find_layers
from autocompress.core.codec import decode_plan, encode_plan
from autocompress.core.errors import CandidateError
from autocompress.tasks.data import example_input, normalise
from autocompress.tasks.models import ModelSource

RNG = np.random.default_rng(0)
NOISE = Split(RNG.integers(0, 256, (16, 3, 16, 16), dtype=np.uint8), np.arange(16) % 10)
DATA = Data("noise", NOISE, NOISE, NOISE, tuple("abcdefghij"), (0.5,) * 3, (0.25,) * 3)
INPUTS = torch.from_numpy(normalise(DATA, NOISE.inputs))
RESNET20 = Task("resnet20 on noise", ModelSource("resnet20", 10, (3, 16, 16)), DATA, trained=False)
REMOVABLE = (
    *(f"layer1.{block}" for block in range(3)),
    *(f"layer2.{block}" for block in (1, 2)),
    *(f"layer3.{block}" for block in (1, 2)),
)


def captured(model: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """What goes into a block and comes out of it, for all inputs; gradients stay on."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_hook(lambda _, args, out: seen.extend([args[0], out]))
    loss = F.cross_entropy(model(INPUTS), torch.from_numpy(NOISE.labels), reduction="sum")
    hook.remove()
    (slope,) = torch.autograd.grad(loss, seen[1], retain_graph=True)
    return torch.stack([seen[0], seen[1]]).detach(), slope


def test_blocks_that_keep_their_shape_are_found_and_others_are_not() -> None:
    assert residual_blocks(RESNET20.build(), RESNET20) == REMOVABLE


def test_a_net_without_shortcuts_has_no_blocks(digits_task: Task) -> None:
    assert residual_blocks(digits_task.build(), digits_task) == ()
    with pytest.raises(CandidateError, match="1 blocks to remove, but only 0 can be"):
        DropBlocks(1)(digits_task.build(), digits_task)


def test_dropping_a_block_equals_passing_its_input_on() -> None:
    model, dropped = RESNET20.build(), DropBlocks(("layer2.1", "layer3.2"))(RESNET20.build(), RESNET20)
    with torch.no_grad():
        x = F.relu(model.get_submodule("bn1")(model.get_submodule("conv1")(INPUTS)))
        x = model.get_submodule("layer1")(x)
        x = model.get_submodule("layer2.2")(model.get_submodule("layer2.0")(x))
        x = model.get_submodule("layer3.1")(model.get_submodule("layer3.0")(x))
        assert torch.equal(dropped(INPUTS), model.get_submodule("fc")(x.mean((2, 3))))
    names = {layer.name for layer in find_layers(dropped, example_input(DATA))}
    before = {layer.name for layer in find_layers(model, example_input(DATA))}
    assert before - names == {f"{block}.conv{i}" for block in ("layer2.1", "layer3.2") for i in (1, 2)}


def test_cosine_scores_are_those_of_shortgpt() -> None:
    model = RESNET20.build()
    scores = score_blocks("cosine", REMOVABLE, model, RESNET20, 16, 0)
    for name in ("layer1.1", "layer3.2"):
        (before, after), _ = captured(model, name)
        a, b = before.flatten(1).numpy(), after.flatten(1).numpy()
        cosine = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
        assert scores[name] == pytest.approx(float((1 - cosine).mean()), rel=1e-4)


def test_taylor_scores_are_the_first_order_change_of_the_loss() -> None:
    model = RESNET20.build()
    scores = score_blocks("taylor", REMOVABLE, model, RESNET20, 16, 0)
    for name in ("layer1.1", "layer3.2"):
        (before, after), slope = captured(model, name)
        expected = (slope * (after - before)).flatten(1).sum(1).abs().mean()
        assert scores[name] == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("importance", ["cosine", "taylor"])
def test_a_block_that_does_nothing_goes_first(importance: str) -> None:
    model = RESNET20.build()
    norm = model.get_submodule("layer2.2.bn2")
    with torch.no_grad():
        norm.weight.zero_()
        norm.bias.zero_()
        expected = model(INPUTS)
        dropped = DropBlocks(1, importance=importance, samples=16)(model, RESNET20)
        assert isinstance(dropped.get_submodule("layer2.2"), nn.Identity)
        assert torch.allclose(dropped(INPUTS), expected, atol=1e-5)


def test_the_last_blocks_go_first_where_asked() -> None:
    model = DropBlocks(2, importance="last")(RESNET20.build(), RESNET20)
    assert [n for n, m in model.named_modules() if isinstance(m, nn.Identity) and "shortcut" not in n] == [
        "layer3.1",
        "layer3.2",
    ]


def test_random_blocks_follow_the_seed() -> None:
    first, again, other = (score_blocks("random", REMOVABLE, nn.Identity(), RESNET20, 1, seed) for seed in (0, 0, 1))
    assert first == again != other


def test_a_transformer_layer_that_is_called_with_masks_can_be_dropped() -> None:
    noise = Split(RNG.integers(0, 50, (8, 16)), np.arange(8) % 10)
    data = Data("tokens", noise, noise, noise, tuple("abcdefghij"), vocabulary=50)
    task = Task("text", ModelSource("text-transformer", 10, (16,), vocabulary=50), data, trained=False)
    model = task.build()
    assert "encoder.layers.1" in residual_blocks(model, task)
    dropped = DropBlocks(("encoder.layers.1",))(model, task)
    assert not any(layer.name.startswith("encoder.layers.1") for layer in find_layers(dropped, example_input(data)))


def test_blocks_that_are_not_there_fail_the_candidate_by_name() -> None:
    with pytest.raises(CandidateError, match=r"can be removed: layer2\.0; there are layer1\.0"):
        DropBlocks(("layer2.0",))(RESNET20.build(), RESNET20)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": 0}, "names or a number of at least 1"),
        ({"blocks": ()}, "names or a number of at least 1"),
        ({"blocks": 1, "importance": "first"}, "one of cosine, taylor, random, last"),
        ({"blocks": 1, "samples": 0}, "samples must be at least 1"),
    ],
)
def test_impossible_settings_are_refused_at_once(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DropBlocks(**settings)  # type: ignore[arg-type]


def test_a_plan_with_dropped_blocks_is_stored_and_read_back() -> None:
    plan = (DropBlocks(("layer1.1",)),)
    assert decode_plan(encode_plan(plan)) == plan
    assert plan[0].describe() == "drop 1 block"
