"""What a student learns from its teachers, and who they are."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..core.errors import InputError
from ..core.types import Task
from ..tasks.models import WEIGHTS_FOLDER, ModelSource, check_model, check_model_name
from .hints import Hint

ORIGINAL, PREVIOUS, SELF = "original", "previous", "self"

# Decay of the averaged student that teaches itself (Tarvainen & Valpola 2017, section 3.1, while learning goes fast).
SELF_DECAY = 0.99

# Where a trained model keeps a frozen copy of itself, beside its parameters.
_KEPT = "_last_trained"


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

    def pool(self, logits: Sequence[Tensor]) -> Tensor:
        """Logits (N, classes) whose softened distribution is the mean of those of several teachers.

        Probabilities are averaged rather than logits, as teachers of other families have logits of other sizes.
        """
        if len(logits) == 1:
            return logits[0]
        shares = torch.stack([F.log_softmax(each / self.temperature, dim=1) for each in logits])
        return (shares.logsumexp(0) - math.log(len(logits))) * self.temperature


class SelfTeacher:
    """An exponential moving average of a student, as its teacher.

    Weights and buffers become `decay * average + (1 - decay) * student` once a step; decay is min(1 - 1 / (step + 1),
    `SELF_DECAY`), so that the untrained start is soon forgotten. Source: Mean Teacher (Tarvainen & Valpola 2017,
    arXiv:1703.01780).

    Attributes:
        model: the average; the student itself before the first step.
    """

    def __init__(self, student: nn.Module) -> None:
        self.student, self.step = student, 0
        self.model = copy.deepcopy(student).eval().requires_grad_(False)

    def update(self) -> None:
        """Take in the student's weights after its step; before the first one, they are the average."""
        decay = min(1 - 1 / (self.step + 1), SELF_DECAY)
        self.step += 1
        current = self.student.state_dict()
        with torch.no_grad():
            for name, average in self.model.state_dict().items():
                latest = current.get(name)
                if latest is None or latest.shape != average.shape:
                    continue
                if average.is_floating_point():
                    average.lerp_(latest.to(average.dtype), 1 - decay)
                else:
                    average.copy_(latest)


class Teachers:
    """The teachers of one training run; a `training.Teaching`.

    Args:
        teachers: models in whose mean softened distribution the student learns; frozen, in eval mode from now on.
        hint: what is learned from their inner values; made for the same teachers in the same order.
        beta: weight of the hint's loss.
        average: the one among the teachers that follows the student, if any.
    """

    def __init__(
        self,
        distillation: Distillation,
        teachers: Sequence[nn.Module],
        *,
        hint: Hint | None = None,
        beta: float = 1.0,
        average: SelfTeacher | None = None,
    ) -> None:
        self.distillation, self.hint, self.beta, self.average = distillation, hint, beta, average
        self.teachers = [
            teacher.to(memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]
            for teacher in teachers
        ]
        self._device = torch.device("cpu")
        self._logits: Tensor | None = None

    def parameters(self) -> Iterable[nn.Parameter]:
        """The hint's adapters."""
        return self.hint.parameters() if self.hint is not None else ()

    def observe(self, images: Tensor) -> None:
        """Run each teacher once on a batch, on the batch's device."""
        if images.device != self._device:
            self.teachers = [teacher.to(images.device) for teacher in self.teachers]
            self._device = images.device
        if self.average is not None:
            self.average.update()
        with torch.no_grad(), self.hint.watching_teachers() if self.hint is not None else nullcontext():
            self._logits = self.distillation.pool([_logits(teacher(images)) for teacher in self.teachers])

    def mix(self, loss: Tensor, logits: Tensor) -> Tensor:
        """(1 - alpha) of the labels' loss and alpha of the teachers'."""
        assert self._logits is not None, "observe() comes first"
        alpha = self.distillation.alpha
        return (1 - alpha) * loss + alpha * self.distillation.loss(logits, self._logits) if alpha else loss

    def hints(self) -> Tensor | float:
        """The hint's loss, weighted."""
        return self.beta * self.hint.loss() if self.hint is not None else 0.0

    def state_dict(self) -> dict[str, Any]:
        """What changes while a student learns: the hint's adapters, and the student's average."""
        average = self.average
        return {
            "parameters": [parameter.detach().clone() for parameter in self.parameters()],
            "average": {"step": average.step, "model": average.model.state_dict()} if average is not None else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        with torch.no_grad():
            for parameter, kept in zip(self.parameters(), state["parameters"], strict=True):
                parameter.copy_(kept)
        if self.average is not None:
            self.average.step = state["average"]["step"]
            self.average.model.load_state_dict(state["average"]["model"])


def _logits(output: Any) -> Tensor:
    """A model's logits in float32; the last ones of a model with several."""
    return (output[-1] if isinstance(output, (list, tuple)) else output).float()


def make_teachers(names: Sequence[str], model: nn.Module, task: Task) -> tuple[list[nn.Module], SelfTeacher | None]:
    """The models that a training step's `teachers` name, and the one among them that follows `model`.

    "previous" is the original where no training came before.

    Raises:
        InputError: a named model can't be built, or does not fit the task.
    """
    found: list[nn.Module] = []
    average = None
    for name in names:
        if name == SELF:
            average = SelfTeacher(model)
            found.append(average.model)
        elif name == PREVIOUS and (kept := last_trained(model)) is not None:
            found.append(kept)
        elif name == ORIGINAL or (name == PREVIOUS and ORIGINAL not in names):
            found.append(task.build())
        elif name != PREVIOUS:
            found.append(_named(name, task))
    return found, average


def check_teacher(name: str) -> None:
    """Raise InputError unless `name` has the form of a teacher: "original", "previous", "self", MODEL or MODEL=PATH."""
    if name in (ORIGINAL, PREVIOUS, SELF):
        return
    model, equals, path = name.partition("=")
    if not model or (equals and not path):
        raise InputError(
            f"teacher '{name}': expected original, previous, self, or a model with its weights, "
            "such as resnet56=PATH.safetensors or timm:NAME=PATH"
        )
    try:
        check_model_name(model)
    except InputError as error:
        raise InputError(f"teacher '{name}': {error} Also: {ORIGINAL}, {PREVIOUS}, {SELF}.") from None


def _named(name: str, task: Task) -> nn.Module:
    """A teacher by model name, with the weights given, shipped, or its callable's own."""
    spec, _, given = name.partition("=")
    data = task.data
    path = Path(given) if given else WEIGHTS_FOLDER / f"{spec}-{data.name}.safetensors"
    if not path.is_file():
        if given:
            raise InputError(f"teacher '{name}': no such file: {path}")
        if ":" not in spec or spec.startswith(("timm:", "torchvision:")):
            raise InputError(f"teacher '{name}': no weights for {data.name} come with the package; give {spec}=PATH")
    source = ModelSource(
        spec, len(data.classes), data.input_shape, path if path.is_file() else None, vocabulary=data.vocabulary
    )
    try:
        model = source()
    except InputError as error:
        raise InputError(f"teacher '{name}': {error}") from error
    check_model(model, dataclasses.replace(task, name=f"teacher '{name}'"))
    return model


class _Kept:
    """A frozen model inside another one: no sub-module of it, and shared by its copies."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __deepcopy__(self, memo: dict[int, Any]) -> _Kept:
        return self


def remember(model: nn.Module) -> nn.Module:
    """Keep a frozen copy of the model as it is now, for the next training step that learns from "previous".

    The copy is no sub-module: it is in no state dict and no exported file. It replaces an earlier one.
    """
    for module in model.modules():
        vars(module).pop(_KEPT, None)
        # What modules noted for the loss while they trained still hangs on its graph, which can't be copied.
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                vars(module)[name] = value.detach()
    setattr(model, _KEPT, _Kept(_frozen_copy(model)))
    return model


def _frozen_copy(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    for module in list(copied.modules()):
        if not parametrize.is_parametrized(module):
            continue
        # A parametrized module shares its class with its copies, which break when the original gives it up.
        names = list(module.parametrizations)  # type: ignore[arg-type]
        values = {name: getattr(module, name).detach().clone() for name in names}
        plain = parametrize.type_before_parametrizations(module)
        del module.parametrizations
        module.__class__ = plain
        for name, value in values.items():
            module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    return copied


def last_trained(model: nn.Module) -> nn.Module | None:
    """The copy that `remember` kept, of the model or of one that it wraps by now; None where there is none."""
    return next((kept.model for module in model.modules() if (kept := vars(module).get(_KEPT)) is not None), None)
