"""Structured pruning: whole channels go, with everything that depends on them (Torch-Pruning)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..core.errors import CandidateError, InputError
from ..core.registry import operator
from ..core.types import Task
from ..tasks.data import example_input
from .graph import find_layers

IMPORTANCES = ("l1", "l2")


@operator
@dataclass(frozen=True)
class Prune:
    """Remove the output channels of least magnitude.

    Channels that a shortcut ties together are cut together, ranked by their group's mean norm
    (Fang et al. 2023, DepGraph, arXiv:2301.12900); where tied layers are given different shares, that of the
    first one in Torch-Pruning's group decides. The last layer keeps its outputs.

    Attributes:
        ratio: share of channels to remove, 0 <= ratio < 1, for all layers or by layer name; layers
            that are not named are left alone, unless a named one depends on them.
        round_to: the channels that remain are the nearest multiple of this, as vector units like it;
            layers of no more channels than this stay whole.
        importance: "l1" or "l2" norm of a channel's weights.

    Raises:
        InputError: a ratio outside [0, 1), or another setting that is not possible.
    """

    ratio: float | Mapping[str, float]
    round_to: int = 8
    importance: str = "l2"

    rank = 20
    retrains = False

    def __post_init__(self) -> None:
        ratios = list(self.ratio.values()) if isinstance(self.ratio, Mapping) else [self.ratio]
        if not ratios:
            raise InputError("Prune: ratio names no layer; leave the step out to prune nothing")
        for ratio in ratios:
            if not 0 <= ratio < 1:
                raise InputError(f"Prune: ratio must be at least 0 and below 1, not {ratio}")
        if self.round_to < 1:
            raise InputError(f"Prune: round_to must be at least 1, not {self.round_to}")
        if self.importance not in IMPORTANCES:
            raise InputError(f"Prune: importance must be one of {', '.join(IMPORTANCES)}, not '{self.importance}'")

    def __call__(self, model: nn.Module, task: Task) -> nn.Module:
        """Return the narrower model; raises CandidateError where the cut can't be made."""
        import torch_pruning as tp

        example = example_input(task.data)
        layers = find_layers(model, example)
        modules = dict(model.named_modules())
        ratios = self.ratio if isinstance(self.ratio, Mapping) else {layer.name: self.ratio for layer in layers}
        strange = sorted(set(ratios) - {layer.name for layer in layers})
        if strange:
            raise CandidateError(f"Prune: no layer called {', '.join(strange)}")
        for parameter in model.parameters():
            parameter.requires_grad_(True)  # the dependency graph is read from autograd
        try:
            tp.pruner.BasePruner(
                model,
                example,
                importance=tp.importance.GroupMagnitudeImportance(p=1 if self.importance == "l1" else 2),
                pruning_ratio=0.0,
                pruning_ratio_dict={
                    modules[name]: self._rounded(modules[name], ratio) for name, ratio in ratios.items()
                },
                ignored_layers=[modules[layers[-1].name]],
            ).step()
        except Exception as error:  # Torch-Pruning raises many kinds for graphs that it can't follow
            raise CandidateError(
                f"Prune: Torch-Pruning can't cut this model: {type(error).__name__}: {error}"
            ) from error
        return self._check(model.eval(), example, task)

    def describe(self) -> str:
        """Short text for tables."""
        ratios = list(self.ratio.values()) if isinstance(self.ratio, Mapping) else [self.ratio]
        low, high = min(ratios), max(ratios)
        return f"prune {low:.0%}" if low == high else f"prune {low:.0%}-{high:.0%}"

    def _rounded(self, module: nn.Module, ratio: float) -> float:
        """The ratio that leaves the nearest multiple of `round_to` channels (Torch-Pruning would round down)."""
        channels = int(getattr(module, "out_channels", 0) or getattr(module, "out_features", 0))
        if channels <= self.round_to:
            return 0.0
        kept = max(1, math.floor(channels * (1 - ratio) / self.round_to + 0.5)) * self.round_to
        # A hair less than the exact share: Torch-Pruning truncates what is to be kept.
        return max(0.0, 1 - min(kept, channels) / channels - 1e-6)

    @staticmethod
    def _check(model: nn.Module, example: torch.Tensor, task: Task) -> nn.Module:
        try:
            with torch.no_grad():
                logits = model(example)
        except RuntimeError as error:
            raise CandidateError(f"Prune: the cut model does not run: {str(error).splitlines()[0]}") from error
        if logits.shape != (1, len(task.data.classes)) or not torch.isfinite(logits).all():
            raise CandidateError(f"Prune: the cut model's logits are wrong: shape {tuple(logits.shape)}")
        return model
