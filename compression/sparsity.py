"""Sparsity: which single weights, or small groups of them, become zero, and the masks that keep them so.

The layers keep their shapes: zeros pay off in files that code them and on hardware that skips them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import CandidateError, InputError
from ..core.notes import note
from ..core.registry import operator
from ..core.types import Task
from ..tasks.data import example_input, normalise
from .graph import by_layer, find_layers
from .masks import MASK, set_mask, trained_weight

CRITERIA = ("magnitude", "taylor", "snip", "random")
SCOPES = ("global", "layer")
Shares = float | Mapping[str, float]


@dataclass(frozen=True)
class Pattern:
    """Which weights stand or fall together, and how many of them.

    A weight is seen as (out, kernel positions, in): patterns run along the inputs of one kernel position, as
    sparse tensor cores and block-sparse kernels multiply them.

    Attributes:
        keep, of: N and M of an N:M pattern (Mishra et al. 2021, arXiv:2104.08378); 0 for the other patterns.
        rows, columns: outputs and inputs of a block; 1 and 1 for single weights.
    """

    keep: int = 0
    of: int = 0
    rows: int = 1
    columns: int = 1

    @property
    def size(self) -> int:
        """Weights in a group or block."""
        return self.of or self.rows * self.columns

    def misfit(self, module: nn.Module) -> str:
        """Why the layer's weight can't take the pattern; "" where it can."""
        outputs, inputs = trained_weight(module).shape[:2]
        outputs //= int(getattr(module, "groups", 1))  # a block can't span groups, which see different inputs
        columns = self.of or self.columns
        if inputs % columns:
            return f"its {inputs} inputs are no multiple of {columns}"
        return f"its {outputs} outputs are no multiple of {self.rows}" if outputs % self.rows else ""

    def positions(self, shape: tuple[int, ...]) -> Tensor:
        """Places in the flattened weight, int64, one row for each group, block or single weight: (units, size)."""
        places = torch.arange(math.prod(shape)).view(shape)
        if self.size == 1:
            return places.view(-1, 1)
        outputs, inputs = shape[:2]
        places = places.flatten(2).transpose(1, 2) if len(shape) > 2 else places[:, None]
        if self.of:
            return places.reshape(-1, self.of)
        split = places.reshape(outputs // self.rows, self.rows, -1, inputs // self.columns, self.columns)
        return split.permute(0, 2, 3, 1, 4).reshape(-1, self.size)


def parse_pattern(text: str, owner: str) -> Pattern:
    """The pattern called "unstructured", "N:M" (as "2:4") or "block:RxC" (as "block:4x1")."""
    if text == "unstructured":
        return Pattern()
    numbers = re.fullmatch(r"(\d+):(\d+)", text)
    if numbers and 1 <= int(numbers[1]) < int(numbers[2]):
        return Pattern(keep=int(numbers[1]), of=int(numbers[2]))
    numbers = re.fullmatch(r"block:(\d+)x(\d+)", text)
    if numbers and min(int(numbers[1]), int(numbers[2])) >= 1:
        return Pattern(rows=int(numbers[1]), columns=int(numbers[2]))
    raise InputError(
        f"{owner}: pattern must be 'unstructured', 'N:M' with 1 <= N < M (such as '2:4'), "
        f"or 'block:RxC' (such as 'block:4x1'), not '{text}'"
    )


def check_shares(owner: str, sparsity: Shares, pattern: str = "unstructured", scope: str = "layer") -> None:
    """Raise InputError unless shares, pattern and scope are possible, each and together."""
    shares = list(sparsity.values()) if isinstance(sparsity, Mapping) else [sparsity]
    if not shares:
        raise InputError(f"{owner}: sparsity names no layer; leave the step out to keep all weights")
    if scope not in SCOPES:
        raise InputError(f"{owner}: scope must be one of {', '.join(SCOPES)}, not '{scope}'")
    groups = parse_pattern(pattern, owner)
    for share in shares:
        if not 0 <= share < 1:
            raise InputError(f"{owner}: sparsity must be at least 0 and below 1, not {share}")
        fixed = 1 - groups.keep / groups.of if groups.of else share
        if share and abs(share - fixed) > 1e-3:
            raise InputError(f"{owner}: pattern {pattern} means a sparsity of {fixed:g}, not {share}")


def show_shares(sparsity: Shares, pattern: str = "unstructured") -> str:
    """Short text for tables: "90%", "50%-80%", "2:4", "90% block:4x1"."""
    if ":" in pattern and not pattern.startswith("block"):
        return pattern
    shares = list(sparsity.values()) if isinstance(sparsity, Mapping) else [sparsity]
    low, high = min(shares), max(shares)
    text = f"{low:.0%}" if low == high else f"{low:.0%}-{high:.0%}"
    return text if pattern == "unstructured" else f"{text} {pattern}"


@operator
@dataclass(frozen=True)
class Sparsify:
    """Set the weights of least importance to zero at once, and keep them there by masks.

    Attributes:
        sparsity: share of zeros afterwards, 0 <= sparsity < 1, of all weights of the layers that are sparsified, or
            by layer name. One number takes all layers but the last and depthwise convolutions, which have few weights
            and suffer most; a mapping may name those too, and leaves alone what it does not name. Zeros that are
            there already count.
        pattern: "unstructured", "N:M" (N weights stay of each M along the inputs; fixes the sparsity to 1 - N/M), or
            "block:RxC" (R outputs by C inputs at one kernel position). Layers that don't divide so are left alone.
        scope: "global" ranks the weights of all layers together, "layer" gives each layer the same share; a mapping
            and N:M are always by layer.
        criterion: "magnitude"; "taylor", the squared first-order change of the loss, summed over batches (Molchanov
            et al. 2019, arXiv:1906.10771); "snip", the size of that of the mean loss (Lee et al. 2019,
            arXiv:1810.02340); or "random". Blocks are ranked by the L2 norm of their weights' scores.
        samples: training images for "taylor" and "snip".
        seed: for these images and for "random".

    At least one weight, or block, of a layer stays; the number of zeros is otherwise exact.

    Raises:
        InputError: a setting that is not possible.
    """

    sparsity: Shares = 0.5
    pattern: str = "unstructured"
    scope: str = "global"
    criterion: str = "magnitude"
    samples: int = 256
    seed: int = 0

    rank = 22
    retrains = False

    def __post_init__(self) -> None:
        check_shares("Sparsify", self.sparsity, self.pattern, self.scope)
        if self.criterion not in CRITERIA:
            raise InputError(f"Sparsify: criterion must be one of {', '.join(CRITERIA)}, not '{self.criterion}'")
        if self.samples < 1:
            raise InputError(f"Sparsify: samples must be at least 1, not {self.samples}")

    def __call__(self, model: nn.Module, task: Task) -> nn.Module:
        """Return the sparse model; raises CandidateError where no layer can be sparsified."""
        pattern = parse_pattern(self.pattern, "Sparsify")
        shares = chosen_layers(model, task, self.sparsity, pattern, "Sparsify")
        modules = {name: model.get_submodule(name) for name in shares}
        apply_shares(modules, shares, self.scores(model, task, list(shares)), pattern, scope_of(self))
        return model

    def describe(self) -> str:
        """Short text for tables."""
        text = f"sparse {show_shares(self.sparsity, self.pattern)}"
        return text if self.criterion == "magnitude" else f"{text} by {self.criterion}"

    def scores(self, model: nn.Module, task: Task, names: list[str]) -> dict[str, Tensor]:
        """Importance of each weight of the named layers, at least 0, by layer name and of the weight's shape."""
        weights = {name: trained_weight(model.get_submodule(name)) for name in names}
        if self.criterion == "magnitude":
            return {name: weight.detach().abs() for name, weight in weights.items()}
        if self.criterion == "random":
            generator = torch.Generator().manual_seed(self.seed)
            return {name: torch.rand(weight.shape, generator=generator) for name, weight in weights.items()}
        found = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        with torch.no_grad():
            for share, gradients in loss_gradients(model, task, list(weights.values()), self.samples, self.seed):
                for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
                    found[name] += (weight * gradient).square() if self.criterion == "taylor" else share * gradient
            if self.criterion == "snip":
                found = {name: (weights[name] * gradient).abs() for name, gradient in found.items()}
        strange = [name for name, scores in found.items() if not torch.isfinite(scores).all()]
        if strange:
            raise CandidateError(f"Sparsify: the gradients of {', '.join(strange)} are not finite")
        return found


def loss_gradients(
    model: nn.Module, task: Task, weights: list[nn.Parameter], samples: int, seed: int, batch_size: int = 64
) -> Iterator[tuple[float, tuple[Tensor, ...]]]:
    """Yield, for each batch of training images, its share of all samples and the gradients of its mean cross-entropy.

    The model runs in eval mode; the images are a random choice, without augmentation.
    """
    train = task.data.train
    picked = np.random.default_rng(seed).permutation(len(train))[:samples]
    for weight in weights:
        weight.requires_grad_(True)
    for start in range(0, len(picked), batch_size):
        chosen = np.sort(picked[start : start + batch_size])
        images, labels = train.inputs[chosen], torch.from_numpy(np.asarray(train.labels[chosen]))
        with torch.enable_grad():
            outputs = model.eval()(torch.from_numpy(normalise(task.data, images)))
            heads = outputs if isinstance(outputs, (list, tuple)) else [outputs]
            loss = torch.stack([F.cross_entropy(logits, labels) for logits in heads]).mean()
            gradients = torch.autograd.grad(loss, weights)
        yield len(chosen) / len(picked), gradients


def chosen_layers(model: nn.Module, task: Task, sparsity: Shares, pattern: Pattern, owner: str) -> dict[str, float]:
    """The share of zeros of each layer that gets some, in running order.

    One number stands for all layers but the last and depthwise convolutions.

    Raises:
        CandidateError: an unknown layer is named, or no layer is left.
    """
    layers = find_layers(model, example_input(task.data))
    names = [layer.name for layer in layers]
    modules = {name: model.get_submodule(name) for name in names}
    if isinstance(sparsity, Mapping):
        shares = {name: float(share) for name, share in by_layer(sparsity, layers, owner).items() if share}
        if not shares:
            return {}
    else:
        shares = {name: float(sparsity) for name in names[:-1] if not _is_depthwise(modules[name])}
    found = {}
    for name, share in shares.items():
        reason = pattern.misfit(modules[name])
        if reason:
            note(f"{owner}: {name}: {reason}")
        else:
            found[name] = share
    if not found:
        raise CandidateError(f"{owner}: no layer can take zeros; name layers that have weights to spare")
    return found


def apply_shares(
    modules: Mapping[str, nn.Module],
    shares: Mapping[str, float],
    scores: Mapping[str, Tensor],
    pattern: Pattern,
    scope: str,
) -> None:
    """Mask the weights of least score; what is zero already goes first, and what is masked already stays so."""
    zero = {name: trained_weight(module).detach() == 0 for name, module in modules.items()}
    for name, mask in choose_masks(scores, zero, shares, pattern, scope).items():
        before = getattr(modules[name], MASK, None)
        set_mask(modules[name], mask & before if isinstance(before, Tensor) else mask)


def choose_masks(
    scores: Mapping[str, Tensor],
    zero: Mapping[str, Tensor],
    shares: Mapping[str, float],
    pattern: Pattern,
    scope: str,
    signed: bool = False,
) -> dict[str, Tensor]:
    """Masks (bool, False: to be zero) that leave out the weights of least score, by layer name.

    Equal scores go in the order of layers and positions. At least one weight or block of each layer stays.

    Args:
        scores: importance of each weight, of the weight's shape.
        zero: weights that go before all others.
        shares: of zeros; with scope "global" all the same. An N:M pattern leaves out the largest whole number of each
            M weights that is within the share.
        signed: whether scores may be negative, so that a block's score is their sum and not their L2 norm.
    """
    positions = {name: pattern.positions(tuple(score.shape)) for name, score in scores.items()}
    units = {}
    for name, score in scores.items():
        rows, gone = score.reshape(-1)[positions[name]], zero[name].reshape(-1)[positions[name]]
        if pattern.of:
            units[name] = rows.masked_fill(gone, -math.inf)
            continue
        if pattern.size > 1:
            rows = rows.sum(1, keepdim=True) if signed else rows.norm(dim=1, keepdim=True)
        units[name] = rows[:, 0].masked_fill(gone.all(1), -math.inf)
        units[name][units[name].argmax()] = math.inf  # the one that stays in any case
    out = _in_groups(units, shares, pattern) if pattern.of else _in_rank(units, shares, scope)
    found = {}
    for name, score in scores.items():
        mask = torch.ones(score.numel(), dtype=torch.bool)
        mask[positions[name][out[name]]] = False
        found[name] = mask.view(score.shape)
    return found


def lowest(values: Tensor, count: int) -> Tensor:
    """Mark the `count` least of `values`, shape (N,); of equal ones the first."""
    marked = torch.zeros(len(values), dtype=torch.bool)
    if count:
        # A selection in linear time; a stable sort of millions of weights takes seconds.
        limit = torch.from_numpy(np.partition(values.numpy(), count - 1))[count - 1]
        marked = values < limit
        marked[torch.nonzero(values == limit)[: count - int(marked.sum()), 0]] = True
    return marked


def scope_of(step: Any) -> str:
    """How a step ranks: a mapping says what happens layer by layer."""
    return "layer" if isinstance(step.sparsity, Mapping) else step.scope


def _in_groups(units: Mapping[str, Tensor], shares: Mapping[str, float], pattern: Pattern) -> dict[str, Tensor]:
    """Marks of shape (groups, M)."""
    found = {}
    for name, rows in units.items():
        gone = min(math.floor((shares[name] + 1e-3) * pattern.of), pattern.of - pattern.keep)
        order = rows.argsort(dim=1, stable=True)[:, :gone]
        found[name] = torch.zeros_like(rows, dtype=torch.bool).scatter_(1, order, True)
    return found


def _in_rank(units: Mapping[str, Tensor], shares: Mapping[str, float], scope: str) -> dict[str, Tensor]:
    """Marks of shape (units,)."""
    if scope == "layer":
        return {name: lowest(row, _count(shares[name], [row])) for name, row in units.items()}
    rows = list(units.values())
    marks = lowest(torch.cat(rows), _count(next(iter(shares.values())), rows))
    return dict(zip(units, marks.split([len(row) for row in rows]), strict=True))


def _count(share: float, rows: list[Tensor]) -> int:
    total = sum(len(row) for row in rows)
    return min(round(share * total), total - len(rows))


def _is_depthwise(module: nn.Module) -> bool:
    groups = getattr(module, "groups", 1)
    return groups > 1 and groups == getattr(module, "in_channels", 0)
