"""Training in stretches ends where training in one go does, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from autocompress import Prune, Task
from autocompress.compression.exits import EarlyExit
from autocompress.compression.finetune import Finetune, TrainingStep
from autocompress.compression.gating import GateChannels
from autocompress.compression.lottery import LotteryTicket
from autocompress.compression.qat import Qat
from autocompress.compression.sharing import Cluster, TuneCodebook
from autocompress.compression.sparse_training import GradualPrune, RigL
from autocompress.compression.sparsity import Sparsify
from autocompress.compression.stretches import Stretch, forget, partly
from autocompress.core.types import Operator

SHARES = (1 / 9, 1 / 3, 1.0)
TEACHING = {"teachers": ("self", "original"), "hint": "feature"}
STEPS: dict[str, tuple[Operator, TrainingStep]] = {
    "distilled, with momentum": (Prune(0.5), Finetune(9, batch_size=32)),
    "with restarts": (Prune(0.5), Finetune(9, batch_size=32, restarts=(1 / 9, 1 / 3))),
    "rounded": (Prune(0.5), Qat(9, bits=4, batch_size=32)),
    "made sparse by movement": (Prune(0.25), GradualPrune(9, every=2, criterion="movement", batch_size=32)),
}
MORE: dict[str, tuple[Operator, TrainingStep]] = {
    "AdamW, averaged": (Prune(0.5), Finetune(18, optimizer="adamw", lr=1e-3, ema=0.9)),
    "own average and inner values": (Prune(0.5), Finetune(18, **TEACHING)),  # type: ignore[arg-type]
    "until it gets no better": (Prune(0.5), Finetune(36, patience=3)),
    "sparse all along": (Prune(0.25), RigL(18, every=2, method="set")),
    "lottery ticket": (Prune(0.25), LotteryTicket(18, rounds=2)),
    "codebook": (Cluster(16), TuneCodebook(18)),
    "gated": (Prune(0.25), GateChannels(18)),
    "exits alone": (Prune(0.25), EarlyExit(18, exits=1, train_part="heads")),
}
CASES = [*STEPS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]


def stretches(before: Operator, step: TrainingStep, task: Task, path: Path) -> tuple[list[Stretch], nn.Module]:
    """Train in three stretches, each as a new process would: from the plan's beginning."""
    done = []
    for share in SHARES:
        torch.manual_seed(len(done))  # what happened in between must not matter
        with partly(share, path) as stretch:
            model = step(before(task.build(), task), task)
        done.append(stretch)
    return done, model


@pytest.mark.parametrize("name", CASES)
def test_three_stretches_give_the_weights_of_one(name: str, digits_task: Task, tmp_path: Path) -> None:
    before, step = (STEPS | MORE)[name]
    whole = step(before(digits_task.build(), digits_task), digits_task).state_dict()
    done, model = stretches(before, step, digits_task, tmp_path / "state")
    found = model.state_dict()
    assert found.keys() == whole.keys()
    assert [name for name in whole if not torch.equal(found[name], whole[name])] == []
    assert done[-1].whole


def test_each_step_is_done_once(digits_task: Task, tmp_path: Path) -> None:
    before, step = STEPS["distilled, with momentum"]
    done, _ = stretches(before, step, digits_task, tmp_path / "state")
    assert [(stretch.steps, stretch.whole) for stretch in done] == [(1, False), (2, False), (6, True)]


def test_a_run_that_began_otherwise_does_not_go_on(digits_task: Task, tmp_path: Path) -> None:
    path = tmp_path / "state"
    step = Finetune(6, batch_size=32)
    with partly(0.5, path):
        step(Prune(0.5)(digits_task.build(), digits_task), digits_task)
    with partly(1.0, path) as other:
        step(Prune(0.25)(digits_task.build(), digits_task), digits_task)
    assert other.steps == 6
    with partly(1.0, path) as same:
        step(Prune(0.5)(digits_task.build(), digits_task), digits_task)
    assert same.steps == 3


def test_states_can_be_read_without_running_code_and_are_deleted(digits_task: Task, tmp_path: Path) -> None:
    path = tmp_path / "state"
    with partly(0.5, path):
        Finetune(4, batch_size=32)(digits_task.build(), digits_task)
    (kept,) = tmp_path.iterdir()
    assert torch.load(kept, weights_only=True)["step"] == 2
    forget(path)
    assert not list(tmp_path.iterdir())


def test_gradual_pruning_that_stopped_is_as_sparse_as_it_would_get(digits_task: Task, tmp_path: Path) -> None:
    from autocompress.compression.masks import sparsity

    step = GradualPrune(9, sparsity=0.8, every=2, batch_size=32)
    with partly(1 / 3, tmp_path / "state"):
        model = step(digits_task.build(), digits_task)
    assert sparsity(model) < 0.78
    final = sparsity(Sparsify(0.8)(digits_task.build(), digits_task))
    assert abs(sparsity(step.settle(model, digits_task)) - final) < 1e-3
