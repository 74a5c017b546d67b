"""Lottery tickets: iterative magnitude pruning, with training that goes back and starts again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..core.errors import InputError
from ..core.registry import operator
from ..core.types import Task
from .finetune import TrainingStep
from .masks import MASK, apply_masks
from .sparse_training import prune_by_magnitude, reinitialise
from .sparsity import Shares, check_shares, chosen_layers, parse_pattern, scope_of, show_shares
from .training import Schedule

REWINDS = ("weights", "learning-rate")


@operator
@dataclass(frozen=True)
class LotteryTicket(TrainingStep):
    """Train, prune the smallest weights, go back, and train what is left, in rounds.

    With rewind="weights" the model's trained weights are NOT used: it starts from new random ones (Frankle & Carbin
    2019, arXiv:1803.03635), trains once in full, and in each round the weights that survive go back to what they were
    early in that run (Frankle et al. 2020, arXiv:1912.05671). With rewind="learning-rate" the model as it is gets
    pruned, and only the learning rate goes back (Renda et al. 2020, arXiv:2003.02389). The optimizer's momentum
    starts anew each time. Masks that the model has already stay.

    Costs (1 + rounds) runs of `steps`, or `rounds` with "learning-rate"; each retraining leaves out what comes
    before the rewinding point. With `patience` each run may end early by itself.

    Attributes:
        sparsity, pattern, scope: see `Sparsify`.
        rounds: how often it prunes; each time the same share of what is left, up to the sparsity.
        rewind: "weights" or "learning-rate".
        rewind_to: the share of the run to whose end it goes back; 0 for the very start.

    Raises:
        InputError: a setting that is not possible.
    """

    sparsity: Shares = 0.8
    pattern: str = "unstructured"
    scope: str = "global"
    rounds: int = 3
    rewind: str = "weights"
    rewind_to: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares("LotteryTicket", self.sparsity, self.pattern, self.scope)
        if self.rounds < 1:
            raise InputError(f"LotteryTicket: rounds must be at least 1, not {self.rounds}")
        if self.rewind not in REWINDS:
            raise InputError(f"LotteryTicket: rewind must be one of {', '.join(REWINDS)}, not '{self.rewind}'")
        if not 0 <= self.rewind_to < 1:
            raise InputError(f"LotteryTicket: rewind_to must be at least 0 and below 1, not {self.rewind_to}")

    def prepare(self, model: nn.Module, task: Task) -> nn.Module:
        """The model with masks as sparse as they will be, here by its present weights' magnitude."""
        self._prune(model, self._shares(model, task), self.rounds)
        return model

    def __call__(self, model: nn.Module, task: Task) -> nn.Module:
        """Return the trained ticket; raises CandidateError when no layer can be sparse, or the loss is not finite."""
        shares = self._shares(model, task)
        full = self.schedule(task)
        skipped = min(round(self.rewind_to * full.steps), max(0, full.steps - 1))
        rest = rest_of(full, skipped)
        point: dict[str, Tensor] | None = None
        if self.rewind == "weights":
            model, point = self._first_run(reinitialise(model, self.seed), task, skipped)
        for number in range(1, self.rounds + 1):
            self._prune(model, shares, number)
            if point is not None:
                go_back(model, point)
            # Another order of images each time: a ticket is to be good in general.
            model = replace(self, seed=self.seed + number).train(model, task, schedule=rest)
        return model

    def describe(self) -> str:
        """Short text for tables."""
        how = "ticket" if self.rewind == "weights" else "rewound"
        return f"{how} {show_shares(self.sparsity, self.pattern)} in {self.rounds}{self.describe_teaching()}"

    def _shares(self, model: nn.Module, task: Task) -> dict[str, float]:
        pattern = parse_pattern(self.pattern, "LotteryTicket")
        return chosen_layers(model, task, self.sparsity, pattern, "LotteryTicket")

    def _prune(self, model: nn.Module, shares: Mapping[str, float], number: int) -> None:
        now = {name: share_after(number, self.rounds, share) for name, share in shares.items()}
        prune_by_magnitude(model, now, parse_pattern(self.pattern, "LotteryTicket"), scope_of(self))

    def _first_run(self, model: nn.Module, task: Task, skipped: int) -> tuple[nn.Module, dict[str, Tensor]]:
        """Train in full; the trained model, and its state after `skipped` steps."""
        apply_masks(model)
        keep = _Point(model, skipped)
        trained = self.train(model, task, after_step=keep)
        return trained, keep.point or snapshot(trained)


class _Point:
    """Keeps what the model is after `steps` steps; an `after_step` of `training.fit`."""

    def __init__(self, model: nn.Module, steps: int) -> None:
        self.model, self.steps = model, steps
        self.point = snapshot(model) if steps == 0 else {}

    def __call__(self, number: int, optimizer: torch.optim.Optimizer) -> None:
        """Keep it, when it is time."""
        if number + 1 == self.steps:
            self.point = snapshot(self.model)

    def state_dict(self) -> dict[str, Tensor]:
        """The point; empty before it."""
        return self.point

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take it back."""
        self.point = dict(state)


def share_after(number: int, rounds: int, sparsity: float) -> float:
    """Share of zeros after round `number`, where each of `rounds` takes the same share of what is left."""
    return sparsity if number == rounds else 1 - (1 - sparsity) ** (number / rounds)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers but masks, by name."""
    return {
        name: tensor.detach().clone() for name, tensor in model.state_dict().items() if name.rpartition(".")[2] != MASK
    }


def go_back(model: nn.Module, point: Mapping[str, Tensor]) -> None:
    """Give the model the weights and statistics of `point`; its masks stay and are applied."""
    model.load_state_dict(point, strict=False)
    apply_masks(model)


@dataclass(frozen=True)
class _Rest(Schedule):
    """What is left of a schedule; `steps` counts only that."""

    skipped: int = 0

    def rate(self, step: int) -> float:
        whole = Schedule(self.steps + self.skipped, lr=self.lr, warmup=self.warmup, restarts=self.restarts)
        return whole.rate(step + self.skipped)


def rest_of(schedule: Schedule, skipped: int) -> Schedule:
    """The schedule without its first `skipped` steps: its learning rates from there on."""
    return _Rest(**{**vars(schedule), "steps": schedule.steps - skipped}, skipped=skipped)
