"""Shallower models: whole residual blocks and transformer layers go, their inputs passing straight on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..core.errors import CandidateError, InputError
from ..core.registry import operator
from ..core.types import Task
from ..tasks.data import example_input
from .importance import calibration

IMPORTANCES = ("cosine", "taylor", "random", "last")


class Bypass(nn.Identity):
    """What takes a removed block's place: returns its first input, whatever else it is called with."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The input."""
        return input


@operator
@dataclass(frozen=True)
class DropBlocks:
    """Replace whole residual blocks, or transformer layers, by the identity.

    Attributes:
        blocks: their names, as `residual_blocks` gives them, or how many to remove.
        importance: which go first where only their number is given: "cosine", those that change least, by
            1 - cosine similarity of a block's input and output, each flattened, averaged over training inputs (Men et
            al. 2024, ShortGPT, arXiv:2403.03853); "taylor", those whose removal changes the loss least to first
            order, |sum of gradient times (output - input)| per input, averaged; "last", the last one first; "random".
        samples: training inputs for "cosine" and "taylor".
        seed: which samples; and for "random".

    Raises:
        InputError: a setting that is not possible.
    """

    blocks: tuple[str, ...] | int
    importance: str = "cosine"
    samples: int = 64
    seed: int = 0

    rank = 18
    retrains = False

    def __post_init__(self) -> None:
        if not isinstance(self.blocks, int):
            names = (self.blocks,) if isinstance(self.blocks, str) else tuple(self.blocks)
            object.__setattr__(self, "blocks", names)
        if self.blocks in (0, ()) or (isinstance(self.blocks, int) and self.blocks < 1):
            raise InputError(f"DropBlocks: blocks must be names or a number of at least 1, not {self.blocks}")
        if self.importance not in IMPORTANCES:
            raise InputError(f"DropBlocks: importance must be one of {', '.join(IMPORTANCES)}, not '{self.importance}'")
        if self.samples < 1:
            raise InputError(f"DropBlocks: samples must be at least 1, not {self.samples}")

    def __call__(self, model: nn.Module, task: Task) -> nn.Module:
        """Return the shallower model; raises CandidateError for blocks that are not there or can't go."""
        found = residual_blocks(model, task)
        if isinstance(self.blocks, int):
            if self.blocks > len(found):
                raise CandidateError(f"DropBlocks: {self.blocks} blocks to remove, but only {len(found)} can be")
            scores = score_blocks(self.importance, found, model, task, self.samples, self.seed)
            names = sorted(found, key=lambda name: (scores[name], found.index(name)))[: self.blocks]
        else:
            names = list(self.blocks)
            strange = [name for name in names if name not in found]
            if strange:
                raise CandidateError(
                    f"DropBlocks: no residual block that can be removed: {', '.join(strange)}; "
                    f"there are {', '.join(found) or 'none'}"
                )
        for name in names:
            _put(model, name, Bypass())
        if not _runs(model, task):
            raise CandidateError(f"DropBlocks: the model does not run without {', '.join(names)}")
        return model.eval()

    def describe(self) -> str:
        """Short text for tables."""
        count = self.blocks if isinstance(self.blocks, int) else len(self.blocks)
        return f"drop {count} block{'s' if count > 1 else ''}"


def residual_blocks(model: nn.Module, task: Task) -> tuple[str, ...]:
    """Names of the blocks that can be removed, in the order in which they run.

    A block is a module that is run once and whose output has its input's shape and comes from an addition of two
    tensors of that shape; of nested ones, the inner. The model must run without it.
    """
    calls = _calls(model, task)
    names = {module: name for name, module in model.named_modules()}
    shaped = [
        names[module]
        for module, ((args, kwargs), output, count) in calls.items()
        if module is not model
        and count == 1
        and any(module.children())
        and args
        and isinstance(args[0], Tensor)
        and isinstance(output, Tensor)
        and args[0].shape == output.shape
        and args[0].dtype == output.dtype
        and _adds(module, args, kwargs, output.shape)
    ]
    inner = [name for name in shaped if not any(other.startswith(f"{name}.") for other in shaped)]
    found = []
    for name in inner:
        block = model.get_submodule(name)
        _put(model, name, Bypass())
        if _runs(model, task):
            found.append(name)
        _put(model, name, block)
    return tuple(found)


def score_blocks(
    kind: str, names: Sequence[str], model: nn.Module, task: Task, samples: int, seed: int
) -> dict[str, float]:
    """How much each block matters, see `DropBlocks.importance`; the lowest goes first."""
    if kind == "last":
        return {name: float(-position) for position, name in enumerate(names)}
    if kind == "random":
        return dict(zip(names, np.random.default_rng(seed).random(len(names)).tolist(), strict=True))
    totals, count = dict.fromkeys(names, 0.0), 0
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for inputs, labels in calibration(task, samples, seed):
        with torch.set_grad_enabled(kind == "taylor"), _watched(model.eval(), names) as seen:
            loss = F.cross_entropy(model(inputs), labels, reduction="sum")
        outputs = [seen[name][1] for name in names]
        slopes = torch.autograd.grad(loss, outputs) if kind == "taylor" else outputs
        for name, slope in zip(names, slopes, strict=True):
            before, after = (x.detach().flatten(1) for x in seen[name])
            if kind == "taylor":
                totals[name] += float((slope.flatten(1) * (after - before)).sum(1).abs().sum())
            else:
                totals[name] += float((1 - F.cosine_similarity(before, after)).sum())
        count += len(labels)
    return {name: total / count for name, total in totals.items()}


@contextmanager
def _watched(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Collect what goes into and comes out of the named blocks."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watcher(name: str) -> Any:
        def watch(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            # A copy each: the next block may write over its input (in-place ReLU).
            result = output.clone()
            seen[name] = (before.pop(name), result)
            return result.clone()

        return watch

    def keeper(name: str) -> Any:
        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            before[name] = args[0].detach().clone()

        return keep

    before: dict[str, Tensor] = {}
    hooks = [model.get_submodule(name).register_forward_pre_hook(keeper(name)) for name in names]
    hooks += [model.get_submodule(name).register_forward_hook(watcher(name)) for name in names]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _calls(model: nn.Module, task: Task) -> dict[nn.Module, tuple[tuple[Any, Any], Any, int]]:
    """(inputs, output, number of calls) of every module that runs."""
    calls: dict[nn.Module, tuple[tuple[Any, Any], Any, int]] = {}

    def watch(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls[module] = ((args, kwargs), output, calls[module][2] + 1 if module in calls else 1)

    hooks = [module.register_forward_hook(watch, with_kwargs=True) for module in model.modules()]
    try:
        with torch.no_grad():
            model.eval()(example_input(task.data, 2))
    finally:
        for hook in hooks:
            hook.remove()
    return {module: calls[module] for module in model.modules() if module in calls}


class _Additions(TorchDispatchMode):
    """Sees whether two tensors of one shape are added."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.seen = shape, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_):
            self.seen |= all(isinstance(x, Tensor) and x.shape == self.shape for x in args[:2])
        return func(*args, **(kwargs or {}))


def _adds(module: nn.Module, args: Any, kwargs: Any, shape: torch.Size) -> bool:
    with torch.no_grad(), _Additions(shape) as additions:
        module(*(x.clone() if isinstance(x, Tensor) else x for x in args), **kwargs)
    return additions.seen


def _runs(model: nn.Module, task: Task) -> bool:
    try:
        with torch.no_grad():
            logits = model.eval()(example_input(task.data, 2))
    except Exception:  # a model may look into its blocks in any way
        return False
    return logits.shape == (2, len(task.data.classes)) and bool(torch.isfinite(logits).all())


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
