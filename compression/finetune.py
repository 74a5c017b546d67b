"""A short training run after a cut, with the original model as teacher."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..core.errors import InputError
from ..core.registry import operator
from ..core.types import Task
from .training import Distillation, Schedule, fit

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


@operator
@dataclass(frozen=True)
class Finetune:
    """Train on the train split, from labels and from the original model's logits.

    Attributes:
        steps: optimizer steps.
        lr: peak learning rate of a one-cycle schedule.
        alpha: weight of the original's logits in the loss, 0 to 1 (response distillation).
        temperature: softens the logits that are compared.
        seed: for batch order and augmentation.

    Raises:
        InputError: a setting outside its range.
    """

    steps: int = 100
    lr: float = 0.03
    batch_size: int = 128
    alpha: float = 0.5
    temperature: float = 2.0
    seed: int = 0

    rank = 30
    retrains = True

    def __post_init__(self) -> None:
        for name, low in (("steps", 0), ("batch_size", 1)):
            if getattr(self, name) < low:
                raise InputError(f"Finetune: {name} must be at least {low}, not {getattr(self, name)}")
        if self.lr <= 0 or self.temperature <= 0:
            raise InputError(f"Finetune: lr and temperature must be above 0, not {self.lr} and {self.temperature}")
        if not 0 <= self.alpha <= 1:
            raise InputError(f"Finetune: alpha must lie in 0..1, not {self.alpha}")

    def __call__(self, model: nn.Module, task: Task) -> nn.Module:
        """Return the trained model; raises CandidateError when the loss is not finite."""
        if self.steps == 0:
            return model
        schedule = Schedule(self.steps, lr=self.lr, batch_size=self.batch_size)
        distillation = Distillation(self.alpha, self.temperature) if self.alpha else None
        teacher = task.build() if distillation else None
        return fit(model, task.data, schedule, seed=self.seed, teacher=teacher, distillation=distillation)

    def describe(self) -> str:
        """Short text for tables."""
        return f"fine-tune {self.steps}" if not self.alpha else f"distil {self.steps}"
