"""How much a channel matters: scores for groups of channels that can only go together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.notes import note
from ..core.types import Task
from ..tasks.data import normalise

if TYPE_CHECKING:
    from torch_pruning.dependency import Group

IMPORTANCES = ("l1", "l2", "activation", "taylor", "bn_scale", "fpgm", "random")
BATCH = 32


def calibration(task: Task, samples: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of up to 32 inputs and labels: `samples` of the train split, chosen by `seed`, not augmented."""
    order = np.random.default_rng(seed).permutation(len(task.data.train))[:samples]
    for start in range(0, len(order), BATCH):
        chosen = np.sort(order[start : start + BATCH])
        inputs = torch.from_numpy(normalise(task.data, np.asarray(task.data.train.inputs[chosen])))
        yield inputs, torch.from_numpy(np.asarray(task.data.train.labels[chosen], np.int64))


def score_groups(
    kind: str, groups: Sequence[Group], model: nn.Module, task: Task, samples: int, seed: int
) -> list[Tensor]:
    """One score per channel of each group, the smallest going first.

    The score of a group's channel is the mean over its layers ("taylor": the sum). Scores of different groups can be
    compared: "taylor" and "bn_scale" are in units of their own, the others are divided by their group's mean.

    "l1", "l2" and "bn_scale" are Torch-Pruning's. Its Taylor score leaves batch norms out and may mix up channels
    behind a concatenation, its geometric median compares squared weights: those two follow the papers here.

    Args:
        kind: see `pruning.Prune.importance`.
        groups: Torch-Pruning's groups with all their channels.
    """
    import torch_pruning as tp

    if kind in ("l1", "l2"):
        magnitude = tp.importance.GroupMagnitudeImportance(p=1 if kind == "l1" else 2)
        return [torch.nan_to_num(magnitude(group)) for group in groups]
    if kind == "random":
        generator = torch.Generator().manual_seed(seed)
        return [torch.rand(len(group[0].idxs), generator=generator) for group in groups]
    if kind == "activation":
        sizes = _input_sizes(model, task, samples, seed)
        return [_relative(_mean(group, lambda *part: _consumed(sizes, *part))) for group in groups]
    if kind == "taylor":
        return _taylor(groups, model, task, samples, seed)
    if kind == "fpgm":
        return [_relative(_mean(group, _spread)) for group in groups]
    slimming = tp.importance.BNScaleImportance(normalizer=None)
    scores = [slimming(group) for group in groups]
    known = [score for score in scores if score is not None]
    unit = torch.cat(known).mean() if known else torch.tensor(1.0)
    norm = tp.importance.GroupMagnitudeImportance(p=2)
    for position, score in enumerate(scores):
        if score is None:
            note(f"Prune: {root_name(groups[position])}: no batch norm; ranked by l2")
            scores[position] = norm(groups[position]) * unit
    return scores


def root_name(group: Group) -> str:
    """Path of the layer that a group is listed under."""
    return str(group._DG._module2name[group[0].dep.target.module])


def parts(group: Group) -> Iterator[tuple[nn.Module, str, list[int], list[int]]]:
    """(layer, side, its channels, the group's channels) for each layer that a group cuts.

    The side is "out" (rows of a weight), "in" (its columns), "depthwise" or "norm".
    """
    for item in group.items:
        dep, idxs = item.dep, item.idxs
        layer = dep.target.module
        roots = getattr(item, "root_idxs", None)
        if roots is None or any(root is None for root in roots):
            continue
        if isinstance(layer, nn.modules.conv._ConvNd) and layer.groups == layer.out_channels > 1:
            yield layer, "depthwise", idxs, roots
        elif isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
            yield layer, "out" if group._DG.is_out_channel_pruning_fn(dep.handler) else "in", idxs, roots
        elif isinstance(layer, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)):
            yield layer, "norm", idxs, roots


def per_channel(values: Tensor, layer: nn.Module, side: str) -> Tensor:
    """Rows of `values`, in the shape of the layer's weight, by channel of one side: (channels, rest)."""
    if side == "norm":
        return values.flatten()[:, None]
    if getattr(layer, "transposed", False):
        side = {"out": "in", "in": "out"}.get(side, side)
    if side != "in":
        return values.flatten(1)
    groups = int(getattr(layer, "groups", 1))
    # (groups * outputs, inputs, ..) to (groups * inputs, outputs, ..)
    return values.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flatten(1)


def _mean(group: Group, score: Callable[..., Tensor | None], total: bool = False) -> Tensor:
    """Mean (or sum) of what `score(layer, side, channels)` gives for the layers of a group; it may give None."""
    out, count = torch.zeros(len(group[0].idxs)), 0
    for layer, side, idxs, roots in parts(group):
        found = score(layer, side, idxs)
        if found is not None:
            out.scatter_add_(0, torch.tensor(roots), found.float())
            count += 1
    return out if total else out / max(1, count)


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def _relative(score: Tensor) -> Tensor:
    mean = score.mean()
    return score / mean if mean > 0 else score


def _spread(layer: nn.Module, side: str, idxs: list[int]) -> Tensor | None:
    """Sum of a filter's Euclidean distances to the others of its layer; small ones can be replaced by the others."""
    if side != "out":
        return None
    filters = per_channel(_weight(layer).detach(), layer, side)
    return torch.cdist(filters, filters, compute_mode="donot_use_mm_for_euclid_dist").sum(1)[idxs]


def _consumed(sizes: dict[nn.Module, Tensor], layer: nn.Module, side: str, idxs: list[int]) -> Tensor | None:
    return sizes[layer][idxs] if side == "in" and layer in sizes else None


def _input_sizes(model: nn.Module, task: Task, samples: int, seed: int) -> dict[nn.Module, Tensor]:
    """Mean absolute value of each channel that goes into a layer, over the calibration inputs."""
    totals: dict[nn.Module, list[Any]] = {}

    def watch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach().abs()
        dim = x.ndim - 1 if isinstance(module, nn.Linear) else 1
        mean = x.transpose(0, dim).flatten(1).mean(1)
        total = totals.setdefault(module, [0.0, 0])
        total[0], total[1] = total[0] + mean * len(x), total[1] + len(x)

    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
    hooks = [layer.register_forward_pre_hook(watch) for layer in layers]
    try:
        with torch.no_grad():
            for inputs, _ in calibration(task, samples, seed):
                model.eval()(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return {module: total / count for module, (total, count) in totals.items()}


def _taylor(groups: Sequence[Group], model: nn.Module, task: Task, samples: int, seed: int) -> list[Tensor]:
    """|sum of weight times gradient| per channel and layer, summed over a group, averaged over batches."""
    scores = [torch.zeros(len(group[0].idxs)) for group in groups]

    def change(layer: nn.Module, side: str, idxs: list[int]) -> Tensor | None:
        weight = layer.weight
        if not isinstance(weight, Tensor) or weight.grad is None:
            return None
        return per_channel(weight.detach() * weight.grad, layer, side).sum(1).abs()[idxs]

    for _ in gradients(model, task, samples, seed):
        for score, group in zip(scores, groups, strict=True):
            score += _mean(group, change, total=True)
    return scores


def gradients(model: nn.Module, task: Task, samples: int, seed: int) -> Iterator[int]:
    """For each calibration batch, put the gradients of the cross-entropy in place; yields its number of inputs."""
    try:
        for inputs, labels in calibration(task, samples, seed):
            model.zero_grad(set_to_none=True)
            F.cross_entropy(model.eval()(inputs), labels).backward()
            yield len(labels)
    finally:
        model.zero_grad(set_to_none=True)


def score_heads(
    kind: str, attentions: Mapping[str, nn.Module], model: nn.Module, task: Task, samples: int, seed: int
) -> list[Tensor]:
    """One score per head of each attention, from the columns of `proj` that take the head in.

    "l1", "l2": the sum of their absolute values or squares; "activation", "taylor": as for channels, over the head.
    """
    modules: list[Any] = list(attentions.values())
    if not modules:
        return []
    generator = torch.Generator().manual_seed(seed)
    if kind == "random":
        return [torch.rand(module.num_heads, generator=generator) for module in modules]
    if kind in ("bn_scale", "fpgm"):
        note(f"Prune: heads: {kind} is not for heads; ranked by l2")
    if kind == "activation":
        sizes = _input_sizes(model, task, samples, seed)
        return [sizes[module.proj].unflatten(0, (module.num_heads, -1)).sum(1) for module in modules]
    if kind == "taylor":
        scores = [torch.zeros(module.num_heads) for module in modules]
        for _ in gradients(model, task, samples, seed):
            for score, module in zip(scores, modules, strict=True):
                product = (module.proj.weight * module.proj.weight.grad).detach()
                score += product.unflatten(1, (module.num_heads, -1)).sum((0, 2)).abs()
        return scores
    power = 1 if kind == "l1" else 2
    return [
        module.proj.weight.detach().abs().pow(power).unflatten(1, (module.num_heads, -1)).sum((0, 2))
        for module in modules
    ]
