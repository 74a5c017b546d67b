"""A short training run after a cut, with the original model as teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..core.errors import InputError
from ..core.registry import operator
from ..core.types import Task
from .distillation import Distillation, Teachers
from .training import Schedule, fit

OPTIMIZERS = ("sgd", "adamw")

# Multiply-accumulates that one CPU core trains with in about a minute (bfloat16), and the batch sizes for it.
MINUTE, SMALL_BATCH, LARGE_BATCH, LARGE_MODEL = 6e12, 32, 128, 200e6


def usual_finetune(macs: int, images: int, steps: int | None = None, seed: int = 0) -> Finetune:
    """The fine-tuning that suits a model and its data, where the user gave no number of steps.

    An epoch, but at least 100 steps, and no more than about a minute on one CPU core; at least 10 steps.
    The minute is for plain convolutions: depthwise ones take a few, as CPUs train them far below their peak.

    Args:
        macs: multiply-accumulates for one image.
        images: size of the train split.
        steps: the user's number; None for the usual one.
    """
    batch = min(images, SMALL_BATCH if macs > LARGE_MODEL else LARGE_BATCH)
    if steps is None:
        # Forward and backward of the student and forward of the teacher: four times the forward cost.
        affordable = int(MINUTE / (4 * max(macs, 1) * batch))
        steps = max(10, min(affordable, max(100, images // batch)))
    return Finetune(steps, batch_size=batch, seed=seed)


@dataclass(frozen=True)
class TrainingStep:
    """The settings that every step which trains has; a base for such operators.

    Attributes:
        steps: optimizer steps.
        epochs: passes over the train split, in place of `steps`; 0 takes `steps`.
        lr: peak learning rate of a one-cycle schedule.
        optimizer: "sgd" or "adamw".
        ema: decay of averaged weights; 0 for none.
        patience: see `Schedule.patience`.
        alpha: weight of the teachers' logits in the loss, 0 to 1 (response distillation).
        temperature: softens the logits that are compared.
        seed: for batch order and augmentation.

    Raises:
        InputError: a setting outside its range.
    """

    steps: int = 100
    epochs: float = 0.0
    lr: float = 0.03
    batch_size: int = 128
    optimizer: str = "sgd"
    weight_decay: float = 5e-4
    ema: float = 0.0
    patience: int = 0
    alpha: float = 0.5
    temperature: float = 2.0
    seed: int = 0

    rank = 30
    retrains = True

    def __post_init__(self) -> None:
        name = type(self).__name__
        for field, low in (("steps", 0), ("epochs", 0), ("batch_size", 1), ("weight_decay", 0), ("patience", 0)):
            if getattr(self, field) < low:
                raise InputError(f"{name}: {field} must be at least {low}, not {getattr(self, field)}")
        if self.lr <= 0 or self.temperature <= 0:
            raise InputError(f"{name}: lr and temperature must be above 0, not {self.lr} and {self.temperature}")
        if not 0 <= self.alpha <= 1:
            raise InputError(f"{name}: alpha must lie in 0..1, not {self.alpha}")
        if not 0 <= self.ema < 1:
            raise InputError(f"{name}: ema must be at least 0 and below 1, not {self.ema}")
        if self.optimizer not in OPTIMIZERS:
            raise InputError(f"{name}: optimizer must be one of {', '.join(OPTIMIZERS)}, not '{self.optimizer}'")

    def prepare(self, model: nn.Module, task: Task) -> nn.Module:
        """The structure that the trained weights fit; here the model's own."""
        return model

    def schedule(self, task: Task) -> Schedule:
        """The training schedule on this task's data."""
        batch = min(self.batch_size, len(task.data.train))
        steps = round(self.epochs * (len(task.data.train) // batch)) if self.epochs else self.steps
        return Schedule(
            steps,
            lr=self.lr,
            batch_size=batch,
            optimizer=self.optimizer,
            weight_decay=self.weight_decay,
            ema=self.ema,
            patience=self.patience,
        )

    def train(
        self,
        model: nn.Module,
        task: Task,
        *,
        schedule: Schedule | None = None,
        after_step: Callable[[int, torch.optim.Optimizer], None] | None = None,
    ) -> nn.Module:
        """Train all weights of `model`; raises CandidateError when the loss is not finite.

        Args:
            schedule: in place of the step's own.
            after_step: see `fit`.
        """
        schedule = schedule or self.schedule(task)
        if schedule.steps == 0:
            return model
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        teaching = Teachers(Distillation(self.alpha, self.temperature), [task.build()]) if self.alpha else None
        return fit(model, task.data, schedule, seed=self.seed, teaching=teaching, after_step=after_step)


@operator
@dataclass(frozen=True)
class Finetune(TrainingStep):
    """Train on the train split, from labels and from the original model's logits."""

    def __call__(self, model: nn.Module, task: Task) -> nn.Module:
        """Return the trained model; raises CandidateError when the loss is not finite."""
        return self.train(model, task)

    def describe(self) -> str:
        """Short text for tables."""
        length = f"{self.epochs:g} epochs" if self.epochs else f"{self.steps}"
        return f"distil {length}" if self.alpha else f"fine-tune {length}"
