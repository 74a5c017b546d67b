"""A short training run after a cut, with the original model as teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from ..core.errors import InputError
from ..core.registry import operator
from ..core.types import Task
from ..tasks.data import example_input
from .distillation import ORIGINAL, Distillation, Teachers, check_teacher, make_teachers, remember
from .hints import HINTS, Hint
from .rounding import trainable_rounding
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
        restarts: see `Schedule.restarts`; a search with rungs wants one at each.
        alpha: weight of the teachers' logits in the loss, 0 to 1 (response distillation, `distillation.Distillation`).
        temperature: softens the logits that are compared.
        hint: what is learned from the teachers' inner values besides: "none", "feature", "attention" or "relational";
            see `hints.Hint`.
        beta: weight of the hint's loss, which is added to the others.
        hint_layers: module paths in the student whose outputs are compared; () takes the ends of its stages, and for
            "relational" what the last linear layer takes in. A teacher without a layer of that path is matched by
            resolution, then by depth.
        teachers: who teaches; the student learns from the mean of their softened distributions, and from the mean of
            their hints. "original": the model that is compressed. "previous": the model as the last training step of
            the plan left it, so that a student learns from a teacher of nearly its size (teacher assistants, Mirzadeh
            et al. 2020, arXiv:1902.03393); the original where no training came before. "self": a moving average of
            the student (`distillation.SelfTeacher`). Or a model by name with its weights, "resnet56=PATH.safetensors"
            or "timm:NAME=PATH"; the path may be left out where the package has weights for the data.
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
    restarts: tuple[float, ...] = ()
    alpha: float = 0.5
    temperature: float = 2.0
    hint: str = "none"
    beta: float = 1.0
    hint_layers: tuple[str, ...] = ()
    teachers: tuple[str, ...] = (ORIGINAL,)
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
        object.__setattr__(self, "restarts", tuple(self.restarts))  # JSON has lists only
        if not all(0 < low < high for low, high in pairwise((*self.restarts, 1.0))):
            raise InputError(f"{name}: restarts must be rising shares between 0 and 1, not {self.restarts}")
        self._check_teaching(name)

    def _check_teaching(self, name: str) -> None:
        if self.hint not in HINTS:
            raise InputError(f"{name}: hint must be one of {', '.join(HINTS)}, not '{self.hint}'")
        if not 0 <= self.beta < float("inf"):
            raise InputError(f"{name}: beta must be at least 0 and finite, not {self.beta}")
        for field in ("hint_layers", "teachers"):
            value = getattr(self, field)
            if not isinstance(value, (list, tuple)) or not all(isinstance(entry, str) for entry in value):
                raise InputError(f"{name}: {field} must be a tuple of names, such as ('...',), not {value!r}")
            if len(set(value)) < len(value):
                raise InputError(f"{name}: {field} names something twice: {', '.join(value)}")
            object.__setattr__(self, field, tuple(value))  # JSON has lists only
        for teacher in self.teachers:
            check_teacher(teacher)
        if self.is_taught and not self.teachers:
            raise InputError(f"{name}: teachers is empty: name one, such as 'original', or set alpha and beta to 0")

    @property
    def has_hint(self) -> bool:
        """Whether inner values are compared."""
        return self.hint != "none" and self.beta > 0

    @property
    def is_taught(self) -> bool:
        """Whether any teacher is needed."""
        return self.alpha > 0 or self.has_hint

    def describe_teaching(self) -> str:
        """What is unusual about the teaching: " (feature, 2 teachers)"; "" for the original model's logits alone."""
        parts = [self.hint] if self.has_hint else []
        if self.is_taught and self.teachers != (ORIGINAL,):
            only = self.teachers[0].partition("=")[0]
            parts.append(only if len(self.teachers) == 1 else f"{len(self.teachers)} teachers")
        return f" ({', '.join(parts)})" if parts else ""

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
            restarts=self.restarts,
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
            return remember(model)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        with trainable_rounding(model), self.teaching(model, task) as teaching:
            model = fit(model, task.data, schedule, seed=self.seed, teaching=teaching, after_step=after_step)
        return remember(model)

    @contextmanager
    def teaching(self, model: nn.Module, task: Task) -> Iterator[Teachers | None]:
        """The teachers of `model`, for `fit`; None where none is needed. Hooks come off the models at the end.

        Raises:
            InputError: a named teacher can't be built, or does not fit the task.
            CandidateError: the hint finds nothing to compare.
        """
        if not self.is_taught:
            yield None
            return
        models, average = make_teachers(self.teachers, model, task)
        hint = None
        if self.has_hint:
            hint = Hint(self.hint, model, models, example_input(task.data), self.hint_layers, self.seed)
        try:
            yield Teachers(
                Distillation(self.alpha, self.temperature), models, hint=hint, beta=self.beta, average=average
            )
        finally:
            if hint is not None:
                hint.close()


@operator
@dataclass(frozen=True)
class Finetune(TrainingStep):
    """Train on the train split, from labels and from teachers: the original model's logits unless set otherwise."""

    def __call__(self, model: nn.Module, task: Task) -> nn.Module:
        """Return the trained model; raises CandidateError when the loss is not finite."""
        return self.train(model, task)

    def describe(self) -> str:
        """Short text for tables."""
        length = f"{self.epochs:g} epochs" if self.epochs else f"{self.steps}"
        return f"{'distil' if self.is_taught else 'fine-tune'} {length}{self.describe_teaching()}"
