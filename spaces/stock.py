"""Stock spaces: pruning ratio and bit-width per stage or layer, and the fine-tuning between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..compression.finetune import Finetune, usual_finetune
from ..compression.graph import Layer, find_layers
from ..compression.pruning import Prune
from ..compression.quantization import BITS, Quantize
from ..core.errors import InputError
from ..core.registry import SPACES
from ..core.types import Capabilities, Chooser, Operator, Plan, Task
from ..tasks.data import example_input

GRANULARITIES = ("stage", "layer")
FLOAT = "float"
UNIFORM_CUT = 0.5


@dataclass(frozen=True)
class PruneQuantize:
    """Prune each group, fine-tune if anything was cut, then give each group its bit-width.

    Parameters it asks for: `prune.<group>`, `finetune.lr`, `finetune.alpha`, `finetune.temperature`
    (the three only where something is pruned), `bits.<group>`, `bits.float` and `calibrator`.

    Attributes:
        groups: layer names by group, e.g. {"stage1": ("layer1.0.conv1", ...)}.
        prunable: the groups that have something to prune.
        bits: integer bit-widths on offer; () leaves all groups in floating point.
        float_bits: bit-widths for the groups that stay in floating point.
        ratios: highest pruning ratio and step; (0, 0) prunes nothing.
        outputs: see `Quantize.outputs`; what the target wants.
        finetune: what follows a cut, with its rate, alpha and temperature replaced by the chosen ones.
    """

    groups: Mapping[str, tuple[str, ...]]
    prunable: tuple[str, ...]
    bits: tuple[int, ...] = (8,)
    float_bits: tuple[int, ...] = (32, 16)
    ratios: tuple[float, float] = (0.75, 0.125)
    outputs: str = "shared"
    finetune: Finetune = dataclasses.field(default_factory=Finetune)
    round_to: int = 8

    def __call__(self, choose: Chooser) -> Plan:
        """Ask for this space's parameters; return the plan."""
        plan: list[Operator] = []
        top, step = self.ratios
        cuts = {g: choose.suggest_float(f"prune.{g}", 0.0, top, step=step) for g in self.prunable} if top else {}
        if any(cuts.values()):
            by_layer = {layer: cut for group, cut in cuts.items() if cut for layer in self.groups[group]}
            uniform = len(set(cuts.values())) == 1
            plan.append(Prune(max(cuts.values()) if uniform else by_layer, round_to=self.round_to))
            if self.finetune.steps:
                lr = choose.suggest_categorical("finetune.lr", [0.01, 0.03, 0.1])
                alpha = choose.suggest_categorical("finetune.alpha", [0.0, 0.5, 0.9])
                temperature = choose.suggest_categorical("finetune.temperature", [1.0, 2.0, 4.0]) if alpha else 1.0
                plan.append(dataclasses.replace(self.finetune, lr=lr, alpha=alpha, temperature=temperature))
        return (*plan, *self._quantize(choose))

    def _quantize(self, choose: Chooser) -> Plan:
        choices = [*self.bits, FLOAT]
        chosen = {g: choose.suggest_categorical(f"bits.{g}", choices) if self.bits else FLOAT for g in self.groups}
        rest = 32
        if FLOAT in chosen.values() and self.float_bits:
            rest = choose.suggest_categorical("bits.float", list(self.float_bits))
        bits = {layer: rest if chosen[g] == FLOAT else int(chosen[g]) for g in self.groups for layer in self.groups[g]}
        if set(bits.values()) == {32}:
            return ()
        integer = min(bits.values()) <= 8
        calibrator = choose.suggest_categorical("calibrator", ["max", "percentile"]) if integer else "max"
        uniform = set(bits.values())
        return (Quantize(uniform.pop() if len(uniform) == 1 else bits, calibrator, outputs=self.outputs),)

    @property
    def starts(self) -> list[dict[str, Any]]:
        """Parameters of the plans to begin with: untouched, uniform int8, uniform pruning, and both."""
        top = self.ratios[0]
        found = []
        for cut in (0.0, UNIFORM_CUT) if top else (0.0,):
            tuned = {"finetune.lr": 0.03, "finetune.alpha": 0.5, "finetune.temperature": 2.0}
            for bits in (FLOAT, *self.bits[:1]):
                params: dict[str, Any] = {f"prune.{group}": cut for group in self.prunable} if top else {}
                params |= tuned if cut and self.finetune.steps else {}
                params |= {f"bits.{group}": bits for group in self.groups} if self.bits else {}
                if bits == FLOAT and self.float_bits:
                    params["bits.float"] = self.float_bits[0]
                if bits != FLOAT:
                    params["calibrator"] = "max"
                found.append(params)
        return found


def stock_space(
    task: Task,
    capabilities: Capabilities,
    *,
    prune: bool = True,
    quantize: bool = True,
    granularity: str = "stage",
    bits: tuple[int, ...] = (),
    finetune_steps: int | None = None,
    seed: int = 0,
) -> PruneQuantize:
    """The stock space for a model and a target.

    Args:
        granularity: "stage" (layers of one output resolution share their choices) or "layer".
        bits: bit-widths on offer; () for all that the target really runs.
        finetune_steps: see `usual_finetune`.

    Raises:
        InputError: unknown granularity or bit-width.
    """
    if granularity not in GRANULARITIES:
        raise InputError(f"granularity must be one of {', '.join(GRANULARITIES)}, not '{granularity}'")
    strange = sorted(set(bits) - set(BITS))
    if strange:
        raise InputError(f"bits must be among {', '.join(map(str, BITS))}, not {', '.join(map(str, strange))}")
    layers = find_layers(task.build(), example_input(task.data))
    groups = group_layers(layers, granularity)
    offered = bits or capabilities.bits
    last = layers[-1].name
    return PruneQuantize(
        groups=groups,
        prunable=tuple(group for group, names in groups.items() if set(names) != {last}) if prune else (),
        bits=tuple(sorted((b for b in offered if b <= 8), reverse=True)) if quantize else (),
        float_bits=tuple(sorted((b for b in offered if b > 8), reverse=True)) or (32,) if quantize else (),
        ratios=(0.75, 0.125) if prune else (0.0, 0.0),
        outputs=capabilities.outputs,
        # Narrow models need finer steps: multiples of 8 would halve a layer of 16 channels or leave it.
        round_to=8 if min((layer.output_shape[0] for layer in layers if layer.kind == "conv"), default=64) >= 32 else 4,
        finetune=task_finetune(task, layers, finetune_steps, seed),
    )


def task_finetune(task: Task, layers: tuple[Layer, ...], steps: int | None, seed: int) -> Finetune:
    """The fine-tuning that suits this task."""
    return usual_finetune(sum(layer.macs for layer in layers), len(task.data.train), steps, seed)


def group_layers(layers: tuple[Layer, ...], granularity: str) -> dict[str, tuple[str, ...]]:
    """Layer names by group; a stage is a run of convolutions with one output resolution, "head" the linear rest."""
    if granularity == "layer":
        return {layer.name: (layer.name,) for layer in layers}
    resolutions: list[tuple[int, ...]] = []
    groups: dict[str, list[str]] = {}
    for layer in layers:
        if layer.kind == "linear" and len(layer.output_shape) == 1:
            group = "head"
        else:
            resolution = layer.output_shape[1:] if layer.kind == "conv" else layer.output_shape[:-1]
            if resolution not in resolutions:
                resolutions.append(resolution)
            group = f"stage{resolutions.index(resolution) + 1}"
        groups.setdefault(group, []).append(layer.name)
    return {group: tuple(names) for group, names in groups.items()}


def _auto(task: Task, capabilities: Capabilities, **settings: Any) -> PruneQuantize:
    return stock_space(task, capabilities, **settings)


def _prune_only(task: Task, capabilities: Capabilities, **settings: Any) -> PruneQuantize:
    return stock_space(task, capabilities, quantize=False, **settings)


def _quantize_only(task: Task, capabilities: Capabilities, **settings: Any) -> PruneQuantize:
    return stock_space(task, capabilities, prune=False, **settings)


SPACES.add("auto", _auto)
SPACES.add("prune", _prune_only)
SPACES.add("quantize", _quantize_only)
