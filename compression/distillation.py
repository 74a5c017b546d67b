"""What a student learns from its teachers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Distillation:
    """Response distillation (Hinton et al. 2015, arXiv:1503.02531).

    Attributes:
        alpha: weight of the teacher's part of the loss; 0 learns from labels alone.
        temperature: softens both distributions; the loss is scaled by its square.
    """

    alpha: float = 0.5
    temperature: float = 2.0

    def loss(self, logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """KL divergence of softened distributions, times the squared temperature; logits (N, classes)."""
        student = F.log_softmax(logits / self.temperature, dim=1)
        teacher = F.log_softmax(teacher_logits / self.temperature, dim=1)
        return F.kl_div(student, teacher, log_target=True, reduction="batchmean") * self.temperature**2


class Teachers:
    """The teachers of one training run; a `training.Teaching`.

    Args:
        teachers: models whose mean logits the student learns from.
    """

    def __init__(self, distillation: Distillation, teachers: list[nn.Module]) -> None:
        self.distillation = distillation
        self.teachers = [
            teacher.to(memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]
            for teacher in teachers
        ]
        self._logits: Tensor | None = None

    def parameters(self) -> Iterable[nn.Parameter]:
        """None."""
        return ()

    def observe(self, images: Tensor) -> None:
        """Run the teachers on a batch."""
        with torch.no_grad():
            self._logits = torch.stack([teacher(images).float() for teacher in self.teachers]).mean(0)

    def mix(self, loss: Tensor, logits: Tensor) -> Tensor:
        """(1 - alpha) of the labels' loss and alpha of the teachers'."""
        assert self._logits is not None, "observe() comes first"
        alpha = self.distillation.alpha
        return (1 - alpha) * loss + alpha * self.distillation.loss(logits, self._logits)

    def hints(self) -> float:
        """Nothing."""
        return 0.0
