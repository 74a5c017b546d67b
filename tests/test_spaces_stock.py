"""Stock spaces: every technique on offer gives plans that can be stored, run and searched."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
import pytest

from autocompress import Data, InputError, Split, Task, load_task, stock_space
from autocompress.core.codec import check_plan, decode_plan, encode_plan, plan_key
from autocompress.core.types import Capabilities
from autocompress.spaces.stock import STOCK, uniform_cut

TARGET = Capabilities((32, 16, 8), ("latency",), "shared")


def noise() -> Data:
    """Ten classes of 32-pixel noise."""
    split = Split(np.zeros((20, 3, 32, 32), dtype=np.uint8), np.arange(20) % 10)
    return Data("noise", split, split, split, tuple("0123456789"), (0.5,) * 3, (0.25,) * 3)


def tokens() -> Data:
    """Two classes of short sequences."""
    split = Split(np.arange(160).reshape(20, 8) % 50, np.arange(20) % 2)
    return Data("tokens", split, split, split, ("0", "1"), vocabulary=50)


class Dice:
    """Chooses at random, and remembers the names."""

    def __init__(self, seed: int) -> None:
        self.random, self.asked = random.Random(seed), dict[str, Any]()

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """One of the steps."""
        value = low + self.random.randrange(round((high - low) / (step or 1)) + 1) * (step or 1)
        return self.asked.setdefault(name, value)

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """Any."""
        return self.asked.setdefault(name, self.random.randint(low, high))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Any."""
        return self.asked.setdefault(name, self.random.choice(list(choices)))


@pytest.mark.parametrize("granularity", ["stage", "layer"])
@pytest.mark.parametrize("name", list(STOCK))
def test_plans_are_in_order_and_survive_storage(digits_task: Task, name: str, granularity: str) -> None:
    space = stock_space(digits_task, TARGET, techniques=STOCK[name], granularity=granularity, bits=(8, 4))
    kinds = set()
    for seed in range(25):
        plan = space(Dice(seed))
        check_plan(plan)
        assert plan_key(decode_plan(encode_plan(plan))) == plan_key(plan)
        kinds |= {type(step).__name__ for step in plan}
    expected = {
        "lowrank": {"LowRank"},
        "prune": {"Prune"},
        "sparse": {"Sparsify", "GradualPrune", "RigL"},
        "share": {"Cluster"},
        "quantize": {"Quantize"},
        "qat": {"Qat"},
        "adaptive": {"EarlyExit", "GateChannels"},  # digits-cnn has no residual block and no MLP
    }
    for technique in STOCK[name]:
        assert expected.get(technique, set()) <= kinds


@pytest.mark.parametrize("name", list(STOCK))
def test_a_search_begins_with_the_untouched_model(digits_task: Task, name: str) -> None:
    space = stock_space(digits_task, TARGET, techniques=STOCK[name])
    plans = []
    for start in space.starts:
        dice = Dice(0)
        dice.asked.update(start)
        plans.append(space(dice))
        assert dice.asked == start, "a start point answers every question, and no other"
    assert plans[0] == ()
    assert len({plan_key(plan) for plan in plans}) == len(plans)


def test_joint_plans_run_from_low_rank_to_rounding(digits_task: Task) -> None:
    space = stock_space(digits_task, TARGET, techniques=STOCK["joint"], finetune_steps=4)
    dice = Dice(1)
    dice.asked.update({f"lowrank.{group}": 0.5 for group in space.prunable})
    dice.asked.update({f"prune.{group}": 0.25 for group in space.prunable})
    dice.asked.update({f"bits.{group}": 8 for group in space.groups})
    dice.asked.update({"lowrank.method": "tucker", "finetune.hint": "attention", "qat": True})
    plan = space(dice)
    assert [type(step).__name__ for step in plan] == ["LowRank", "Prune", "Finetune", "Qat"]
    model = digits_task.build()
    before = sum(p.numel() for p in model.parameters())
    for step in plan:
        model = step(model, digits_task)
    assert sum(p.numel() for p in model.parameters()) < 0.6 * before


def test_a_space_offers_what_the_model_has_places_for() -> None:
    resnet = stock_space(load_task("resnet20", noise()), TARGET, techniques=("drop", "adaptive"))
    assert resnet.adaptive == ("exits", "blocks", "channels")
    assert resnet.blocks == 7  # two of the nine change the shape
    dice = Dice(0)
    dice.asked.update({"drop.blocks": 2, "adaptive": "blocks", "blocks.budget": 0.5})
    assert [type(step).__name__ for step in resnet(dice)] == ["DropBlocks", "SkipBlocks"]
    text = stock_space(load_task("text-transformer", tokens()), TARGET, techniques=STOCK["adaptive"])
    assert "experts" in text.adaptive
    assert "channels" not in text.adaptive


def test_the_uniform_cut_is_the_baseline_and_a_start_point_at_once() -> None:
    task = load_task("resnet20", noise())  # narrow: channels go in fours
    space = stock_space(task, TARGET, finetune_steps=5)
    starts = {plan_key(space(optuna.trial.FixedTrial(params))) for params in space.starts}
    assert plan_key(uniform_cut(task, steps=5, seed=0)) in starts


def test_any_format_can_be_on_offer(digits_task: Task) -> None:
    space = stock_space(digits_task, TARGET, techniques=STOCK["qat"], bits=("fp8", 1.58, 8, "bf16", 4))
    assert set(space.bits[:2]) == {8, "fp8"}
    assert (space.bits[2:], space.float_bits) == ((4, 1.58), ("bf16",))
    assert space.starts, "formats of any kind have an order"
    dice = Dice(0)
    dice.asked.update({f"bits.{group}": 4 for group in space.groups})
    dice.asked.update({"activations": "int8", "qat": False})
    (step,) = space(dice)
    assert step.activations == dict.fromkeys(("conv1", "conv2", "conv3", "fc"), 8)  # type: ignore[attr-defined]
    dice.asked.update({f"bits.{group}": "fp8" for group in space.groups})
    assert [type(step).__name__ for step in space(dice)] == ["Quantize"], "8-bit floats are not trained"


def test_training_steps_share_the_settings_of_the_fine_tuning(digits_task: Task) -> None:
    space = stock_space(digits_task, TARGET, techniques=STOCK["sparse"], finetune_steps=7, seed=3)
    dice = Dice(0)
    dice.asked.update({"sparse.pattern": "unstructured", "sparse.share": 0.5, "sparse.method": "rigl"})
    dice.asked.update({"finetune.lr": 0.1, "finetune.alpha": 0.9, "finetune.temperature": 4.0})
    (step,) = space(dice)
    wanted = {"steps": 7, "lr": 0.1, "alpha": 0.9, "temperature": 4.0, "seed": 3, "sparsity": 0.5}
    assert {name: getattr(step, name) for name in wanted} == wanted


def test_an_unknown_technique_is_refused(digits_task: Task) -> None:
    with pytest.raises(InputError, match=r"techniques must be among adaptive, calibration.*, not 'magic'"):
        stock_space(digits_task, TARGET, techniques=("magic",))
