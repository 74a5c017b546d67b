"""Stock spaces: every technique on offer gives plans that can be stored, run and searched."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from autocompress import InputError, Task, stock_space
from autocompress.core.codec import check_plan, decode_plan, encode_plan, plan_key
from autocompress.core.types import Capabilities
from autocompress.spaces.stock import STOCK

TARGET = Capabilities((32, 16, 8), ("latency",), "shared")


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
    expected = {"lowrank": "LowRank", "prune": "Prune", "sparse": "Sparsify", "share": "Cluster", "qat": "Qat"}
    assert {kind for technique, kind in expected.items() if technique in STOCK[name]} <= kinds


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


def test_an_unknown_technique_is_refused(digits_task: Task) -> None:
    with pytest.raises(InputError, match=r"techniques must be among distil, lowrank.*, not 'magic'"):
        stock_space(digits_task, TARGET, techniques=("magic",))
