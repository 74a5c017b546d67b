"""Sparsity that is found while the model trains: gradual pruning, and masks that move."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.errors import InputError
from ..core.notes import note
from ..core.registry import operator
from ..core.types import Task
from .finetune import TrainingStep
from .masks import masks, set_mask, trained_weight
from .sparsity import (
    Pattern,
    Shares,
    apply_shares,
    check_shares,
    choose_masks,
    chosen_layers,
    lowest,
    parse_pattern,
    scope_of,
    show_shares,
)

CRITERIA = ("magnitude", "movement")
METHODS = ("rigl", "set")
DISTRIBUTIONS = ("erk", "uniform")
STARTS = ("trained", "scratch")


@operator
@dataclass(frozen=True)
class GradualPrune(TrainingStep):
    """Train while more and more weights become zero, along a cubic curve (Zhu & Gupta 2017, arXiv:1710.01878).

    An N:M pattern goes from M:M down to N:M (structure decay, Kao et al. 2022, arXiv:2209.07617). The masks that the
    model has already stay: their zeros count.

    Attributes:
        sparsity, pattern, scope: see `Sparsify`.
        criterion: "magnitude", or "movement": the sum of -weight * gradient over all steps so far, large for weights
            that move away from zero (Sanh et al. 2020, arXiv:2005.07683). With it a masked weight keeps the value
            that it had, is scored on, and may come back with it; a block's score is the sum of its weights'.
        begin, end: shares of the training run between which weights go; what is left of the run recovers.
        every: steps between two rounds of that.

    Raises:
        InputError: a setting that is not possible; `patience` is not, as the best model seen would be a dense one.
    """

    sparsity: Shares = 0.5
    pattern: str = "unstructured"
    scope: str = "global"
    criterion: str = "magnitude"
    begin: float = 0.0
    end: float = 0.75
    every: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares("GradualPrune", self.sparsity, self.pattern, self.scope)
        if self.criterion not in CRITERIA:
            raise InputError(f"GradualPrune: criterion must be one of {', '.join(CRITERIA)}, not '{self.criterion}'")
        if not 0 <= self.begin < self.end <= 1:
            raise InputError(f"GradualPrune: expected 0 <= begin < end <= 1, not {self.begin} and {self.end}")
        if self.every < 1:
            raise InputError(f"GradualPrune: every must be at least 1, not {self.every}")
        if self.patience:
            raise InputError("GradualPrune: patience must be 0: the best model seen might not be sparse yet")

    def prepare(self, model: nn.Module, task: Task) -> nn.Module:
        """The model with masks as sparse as they will be, here by magnitude."""
        pattern = parse_pattern(self.pattern, "GradualPrune")
        shares = chosen_layers(model, task, self.sparsity, pattern, "GradualPrune")
        prune_by_magnitude(model, shares, pattern, scope_of(self))
        return model

    def settle(self, model: nn.Module, task: Task) -> nn.Module:
        """The model of a training that stopped on the way, as sparse as it would have been in the end."""
        return self.prepare(model, task)

    def __call__(self, model: nn.Module, task: Task) -> nn.Module:
        """Return the trained, sparse model; raises CandidateError when no layer can be, or the loss is not finite."""
        total = self.schedule(task).steps
        if total == 0:
            return self.prepare(model, task)
        pattern = parse_pattern(self.pattern, "GradualPrune")
        shares = chosen_layers(model, task, self.sparsity, pattern, "GradualPrune")
        return self.train(model, task, after_step=GradualMasks(self, model, shares, pattern, total))

    def describe(self) -> str:
        """Short text for tables."""
        how = "" if self.criterion == "magnitude" else f" by {self.criterion}"
        return f"gradually sparse {show_shares(self.sparsity, self.pattern)}{how}{self.describe_teaching()}"


def cubic(step: float, begin: float, end: float, initial: float, final: float) -> float:
    """Sparsity at `step`: fast at first, slow near the end (Zhu & Gupta 2017, equation 1)."""
    if step >= end:
        return final
    passed = max(0.0, (step - begin) / (end - begin))
    return final + (initial - final) * (1 - passed) ** 3


def prune_by_magnitude(model: nn.Module, shares: Mapping[str, float], pattern: Pattern, scope: str) -> None:
    """Mask the smallest weights of the layers in `shares`, on top of the masks that they have."""
    modules = {name: model.get_submodule(name) for name in shares}
    scores = {name: trained_weight(module).detach().abs() for name, module in modules.items()}
    apply_shares(modules, shares, scores, pattern, scope)


class GradualMasks:
    """What closes the masks of `GradualPrune` step by step; an `after_step` of `training.fit`.

    Attributes:
        scores: of the movement so far, by layer name.
    """

    def __init__(
        self, step: GradualPrune, model: nn.Module, shares: Mapping[str, float], pattern: Pattern, total: int
    ) -> None:
        self.step, self.shares, self.pattern = step, shares, pattern
        self.first, self.last = round(step.begin * total), max(1, round(step.end * total))
        self.modules = {name: model.get_submodule(name) for name in shares}
        before = masks(model)
        self.allowed = {
            name: before[name].clone() if name in before else torch.ones_like(trained_weight(module), dtype=torch.bool)
            for name, module in self.modules.items()
        }
        for name, module in self.modules.items():  # from the start on, as averaged weights need the same buffers
            set_mask(module, self.allowed[name])
        weights = {name: trained_weight(module).detach() for name, module in self.modules.items()}
        self.scores = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        self.dense = {name: weight.clone() for name, weight in weights.items()}

    @torch.no_grad()
    def __call__(self, number: int, optimizer: torch.optim.Optimizer) -> None:
        """Follow the movement, and mask weights where it is time to."""
        done = number + 1
        if self.step.criterion == "movement" and done <= self.last:
            self._follow()
        on_time = (done - self.first) % self.step.every == 0
        if self.first <= done <= self.last and (on_time or done == self.last):
            shares = {name: cubic(done, self.first, self.last, 0.0, share) for name, share in self.shares.items()}
            if self.step.criterion == "movement":
                self._let_move(shares, optimizer)
            else:
                self._close(shares)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The movement so far; masks are the model's own."""
        return {"scores": self.scores, "dense": self.dense}

    def load_state_dict(self, state: Mapping[str, dict[str, Tensor]]) -> None:
        """Go on from there."""
        self.scores, self.dense = dict(state["scores"]), dict(state["dense"])

    def _close(self, shares: Mapping[str, float]) -> None:
        for module in self.modules.values():  # the optimizer has just moved masked weights off zero
            set_mask(module, module.weight_mask)  # type: ignore[arg-type]
        scores = {name: trained_weight(module).abs() for name, module in self.modules.items()}
        apply_shares(self.modules, shares, scores, self.pattern, scope_of(self.step))

    def _follow(self) -> None:
        """Add this step's movement; the gradient belongs to the weights before the step, which `dense` still has."""
        for name, module in self.modules.items():
            weight = trained_weight(module)
            if weight.grad is None:
                continue
            self.scores[name] -= self.dense[name] * weight.grad
            self.dense[name] = torch.where(module.weight_mask, weight, self.dense[name])  # type: ignore[arg-type]

    def _let_move(self, shares: Mapping[str, float], optimizer: torch.optim.Optimizer) -> None:
        barred = {name: ~allowed for name, allowed in self.allowed.items()}
        found = choose_masks(self.scores, barred, shares, self.pattern, scope_of(self.step), signed=True)
        for name, mask in found.items():
            module = self.modules[name]
            weight = trained_weight(module)
            forget(optimizer, weight, mask & ~module.weight_mask)  # type: ignore[operator]
            weight.copy_(self.dense[name])
            set_mask(module, mask & self.allowed[name])


@operator
@dataclass(frozen=True)
class RigL(TrainingStep):
    """Train a model that is sparse all along, in which weights die and others come to life.

    Now and then each layer loses its smallest weights and gets as many new ones, zero at first, where the loss is
    steepest (Evci et al. 2020, arXiv:1911.11134) or anywhere (SET, Mocanu et al. 2018, arXiv:1707.04780). As in the
    authors' code, what has just died may be chosen again, and then goes on with its value. Masks that the model has
    already in these layers are replaced.

    Attributes:
        sparsity: share of zeros over all layers that are sparsified (see `Sparsify`), or by layer name.
        distribution: "erk" gives small kernels more weights than large ones (Erdos-Renyi-Kernel), "uniform" the same
            share to all layers; a mapping is by layer always.
        method: "rigl" or "set".
        drop: share of a layer's weights that are exchanged the first time; it falls to 0 along a cosine.
        until: share of the training run after which the masks stay.
        every: steps between two exchanges.
        start: "trained" begins with the largest weights of the model as it is, "scratch" with new weights at random
            places, as in the paper.

    Raises:
        InputError: a setting that is not possible.
    """

    sparsity: Shares = 0.8
    distribution: str = "erk"
    method: str = "rigl"
    drop: float = 0.3
    until: float = 0.75
    every: int = 10
    start: str = "trained"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares("RigL", self.sparsity)
        for field, known in (("distribution", DISTRIBUTIONS), ("method", METHODS), ("start", STARTS)):
            if getattr(self, field) not in known:
                raise InputError(f"RigL: {field} must be one of {', '.join(known)}, not '{getattr(self, field)}'")
        if not 0 < self.drop <= 1 or not 0 <= self.until <= 1:
            raise InputError(f"RigL: expected 0 < drop <= 1 and 0 <= until <= 1, not {self.drop} and {self.until}")
        if self.every < 1:
            raise InputError(f"RigL: every must be at least 1, not {self.every}")

    def prepare(self, model: nn.Module, task: Task) -> nn.Module:
        """The sparse model that training starts from."""
        return self._begin(model, list(chosen_layers(model, task, self.sparsity, Pattern(), "RigL")))

    def __call__(self, model: nn.Module, task: Task) -> nn.Module:
        """Return the trained, sparse model; raises CandidateError when no layer can be, or the loss is not finite."""
        names = list(chosen_layers(model, task, self.sparsity, Pattern(), "RigL"))
        model = self._begin(model, names)
        return self.train(model, task, after_step=MovingMasks(self, model, names, self.schedule(task).steps))

    def describe(self) -> str:
        """Short text for tables."""
        return f"{self.method} {show_shares(self.sparsity)}{self.describe_teaching()}"

    def _begin(self, model: nn.Module, names: list[str]) -> nn.Module:
        if self.start == "scratch":
            model = reinitialise(model, self.seed)
        generator = torch.Generator().manual_seed(self.seed)
        kept = self._kept({name: tuple(trained_weight(model.get_submodule(name)).shape) for name in names})
        for name, count in kept.items():
            module = model.get_submodule(name)
            weight = trained_weight(module).detach()
            score = weight.abs() if self.start == "trained" else torch.rand(weight.shape, generator=generator)
            set_mask(module, ~lowest(score.flatten(), weight.numel() - count).view(weight.shape))
        return model

    def _kept(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        if not isinstance(self.sparsity, Mapping) and self.distribution == "erk":
            return erdos_renyi_kernel(shapes, self.sparsity)
        chosen = self.sparsity if isinstance(self.sparsity, Mapping) else dict.fromkeys(shapes, self.sparsity)
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        return {name: max(1, size - round(chosen[name] * size)) for name, size in sizes.items()}


def erdos_renyi_kernel(shapes: Mapping[str, tuple[int, ...]], sparsity: float) -> dict[str, int]:
    """How many weights each layer keeps: a share in proportion to sum(shape) / prod(shape), but at most all.

    The counts add up to the rounded total, as long as each layer has at least one. Source: Evci et al. 2020, section
    3 (1), with kernel sizes; the remainders of rounding go to the largest ones.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: sum(shape) / sizes[name] for name, shape in shapes.items()}
    total = round((1 - sparsity) * sum(sizes.values()))
    dense: set[str] = set()
    while True:
        rest = [name for name in shapes if name not in dense]
        left = total - sum(sizes[name] for name in dense)
        scale = left / sum(raw[name] * sizes[name] for name in rest) if rest else 0.0
        full = max((raw[name] for name in rest), default=0.0)
        if full * scale <= 1:
            break
        dense |= {name for name in rest if raw[name] == full}
    exact = {name: float(sizes[name]) if name in dense else scale * raw[name] * sizes[name] for name in shapes}
    kept = {name: math.floor(count + 1e-9) for name, count in exact.items()}
    by_remainder = sorted(shapes, key=lambda name: kept[name] - exact[name])
    for name in by_remainder[: max(0, total - sum(kept.values()))]:
        kept[name] += 1
    return {name: max(1, count) for name, count in kept.items()}


def drop_share(done: int, until: int, drop: float) -> float:
    """Share of the weights that are exchanged after `done` steps (Evci et al. 2020, equation 1)."""
    return drop / 2 * (1 + math.cos(math.pi * done / until)) if done < until else 0.0


class MovingMasks:
    """What moves the masks of `RigL`; an `after_step` of `training.fit`."""

    def __init__(self, step: RigL, model: nn.Module, names: list[str], total: int) -> None:
        self.step, self.until = step, round(step.until * total)
        self.modules = [model.get_submodule(name) for name in names]
        self.generator = torch.Generator().manual_seed(step.seed + 1)  # another stream than that of the first masks

    @torch.no_grad()
    def __call__(self, number: int, optimizer: torch.optim.Optimizer) -> None:
        """Exchange weights where it is time to."""
        share = drop_share(number + 1, self.until, self.step.drop)
        if not share or (number + 1) % self.step.every:
            return
        for module in self.modules:
            weight = trained_weight(module)
            before: Tensor = module.weight_mask  # type: ignore[assignment]
            if self.step.method == "set" or weight.grad is None:
                growth = torch.rand(weight.shape, generator=self.generator)
            else:
                growth = weight.grad.abs()
            after = exchange(weight, before, growth, int(share * int(before.sum())))
            grown = after & ~before
            forget(optimizer, weight, grown)
            weight.masked_fill_(grown, 0.0)
            set_mask(module, after)

    def state_dict(self) -> dict[str, Tensor]:
        """Of the generator; masks are the model's own."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from there."""
        self.generator.set_state(state["generator"])


def exchange(weight: Tensor, mask: Tensor, growth: Tensor, count: int) -> Tensor:
    """The mask less its `count` smallest weights, plus as many of the largest `growth` that are then outside."""
    size = weight.abs().masked_fill(~mask, math.inf).flatten()
    kept = mask.flatten() & ~lowest(size, count)
    return (kept | lowest((-growth).flatten().masked_fill(kept, math.inf), count)).view(mask.shape)


def forget(optimizer: torch.optim.Optimizer, weight: nn.Parameter, where: Tensor) -> None:
    """Clear the momentum of single weights, which was gathered while they were masked."""
    for value in optimizer.state.get(weight, {}).values():
        if isinstance(value, Tensor) and value.shape == weight.shape:
            value.masked_fill_(where, 0.0)


def reinitialise(model: nn.Module, seed: int) -> nn.Module:
    """Draw all weights anew, as torch's layers do by themselves; statistics of normalisation start anew, too.

    Parameters whose module has no `reset_parameters` keep their values, and a note says so. Masks stay.
    """
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    reset: set[int] = set()
    try:
        for module in model.modules():
            again = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            if callable(again):
                again()
                reset.update(id(parameter) for parameter in module.parameters(recurse=False))
    finally:
        torch.random.set_rng_state(state)
    left = [name for name, parameter in model.named_parameters() if id(parameter) not in reset]
    if left:
        note(f"reinitialise: {', '.join(left)}: their modules can't reset them, so that they keep their values")
    for mask_owner, mask in masks(model).items():
        set_mask(model.get_submodule(mask_owner), mask)
    return model
