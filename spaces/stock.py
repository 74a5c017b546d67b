"""Stock spaces: low rank, pruning, sparsity, distillation, sharing and bit-widths, per stage or per layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..compression.analysis import Sensitivity, tolerated
from ..compression.blocks import residual_blocks
from ..compression.exits import EarlyExit
from ..compression.experts import SplitExperts
from ..compression.finetune import Finetune, TrainingStep, usual_finetune
from ..compression.gating import GateChannels, SkipBlocks
from ..compression.graph import Layer, find_layers
from ..compression.grids import FORMATS, Format, bit_width
from ..compression.pruning import Prune
from ..core.errors import CandidateError, InputError
from ..core.registry import SPACES
from ..core.types import Capabilities, Chooser, Plan, Task
from ..tasks.data import example_input
from . import choices
from .choices import FLOAT, WHOLE

GRANULARITIES = ("stage", "layer")
# Space name: the techniques that it searches together.
STOCK: dict[str, tuple[str, ...]] = {
    "auto": ("prune", "quantize"),
    "prune": ("prune", "importance"),
    "depth": ("drop", "prune"),
    "quantize": ("quantize",),
    "ptq": ("quantize", "calibration"),
    "qat": ("quantize", "qat"),
    "lowrank": ("lowrank",),
    "sparse": ("sparse",),
    "share": ("share",),
    "adaptive": ("adaptive", "quantize"),
    "joint": ("lowrank", "prune", "distil", "quantize", "qat"),
}
UNIFORM_CUT = 0.5
# Divergence (nats) that a group changed alone may cause: its range ends at the first, a start point keeps the second.
BEARABLE, HARMLESS = 1.0, 0.05


@dataclass(frozen=True)
class StockSpace:
    """Choose for each group of layers, train if anything was cut, then round.

    Parameters it asks for, by technique:
        lowrank: `lowrank.<group>` (share of the rank to keep, 1 for all) and `lowrank.method`.
        drop: `drop.blocks` (whole residual blocks or transformer layers to remove).
        prune: `prune.<group>` (share of channels to remove); with "importance" also `prune.importance`.
        sparse: `sparse.pattern`, `sparse.share` of all weights to remove, and `sparse.method` (at once, gradually while
            it trains, or sparse training).
        adaptive: `adaptive`, one of those that the model has places for: "exits" (`exits.count`, `exits.threshold`),
            "blocks" to skip (`blocks.budget`), "channels" to leave out (`channels.ratio`), "experts"
            (`experts.active` of 8). Its gain shows in the objectives expected_latency and expected_macs.
        training, after any of these: `finetune.lr`, `finetune.alpha`, `finetune.temperature`; with "distil" also
            `finetune.hint` and `finetune.beta`.
        share: `clusters` (values a layer's weights may take; 0 for any).
        quantize: `bits.<group>`, `bits.float`, `calibrator`, and below 8 bits `activations`. With "calibration" also
            `weights.calibrator`, `weights.granularity`, `activations.symmetric`, `bias_correction` and `equalize`;
            with "qat" also `qat`, whether training goes on through the rounding, for as many steps as the
            fine-tuning has.

    Attributes:
        techniques: see above.
        groups: layer names by group, e.g. {"stage1": ("layer1.0.conv1", ...)}.
        prunable: the groups that have something to prune.
        bits: formats of at most 8 bits on offer (see `Quantize.bits`).
        float_bits: formats for the groups that stay in floating point.
        ratios: highest pruning ratio and step.
        outputs: see `Quantize.outputs`; what the target wants.
        finetune: what follows a cut, with its rate, alpha and temperature replaced by the chosen ones.
        tops: highest pruning ratio by group, where it is lower than that of `ratios`.
        widths: bit-widths by group, where fewer are on offer.
        favourite: ratio and bit-width by group of one more plan to begin with; None for none.
        blocks: how many blocks can be removed.
        adaptive: kinds of adaptive computation on offer.
    """

    techniques: tuple[str, ...]
    groups: Mapping[str, tuple[str, ...]]
    prunable: tuple[str, ...]
    bits: tuple[Format, ...] = (8,)
    float_bits: tuple[Format, ...] = (32, 16)
    ratios: tuple[float, float] = (0.75, 0.125)
    outputs: str = "shared"
    finetune: Finetune = field(default_factory=Finetune)
    round_to: int = 8
    tops: Mapping[str, float] = field(default_factory=dict)
    widths: Mapping[str, tuple[Format, ...]] = field(default_factory=dict)
    favourite: Mapping[str, Any] | None = None
    blocks: int = 0
    adaptive: tuple[str, ...] = ()

    def __call__(self, choose: Chooser) -> Plan:
        """Ask for this space's parameters; return the plan."""
        cut, follows = choices.after_cuts(self, choose)
        shared = choices.share(self, choose) if "share" in self.techniques else ()
        rounded = choices.quantize(self, choose) if "quantize" in self.techniques else ()
        return (*cut, *((follows,) if follows is not None else ()), *shared, *rounded)

    @property
    def starts(self) -> list[dict[str, Any]]:
        """Parameters of the plans to begin with: untouched, uniform int8, uniform pruning, both, and the favourite."""
        found = []
        for cut in (0.0, UNIFORM_CUT) if "prune" in self.techniques else (0.0,):
            for bits in (FLOAT, *self.bits[:1]) if "quantize" in self.techniques else (FLOAT,):
                found.append({"prune": cut, "bits": bits, "bits.float": 32, "finetune.lr": 0.03, "finetune.alpha": 0.5})
        if self.favourite is not None:
            found.append({**found[0], **self.favourite})
        params = []
        for wishes in found:
            chooser = _Wishes({"lowrank": WHOLE, "finetune.temperature": 2.0, **wishes})
            self(chooser)
            if chooser.asked not in params:
                params.append(chooser.asked)
        return params


class _Wishes:
    """Answers a space's questions from wishes by parameter name or its first part, else with the first choice."""

    def __init__(self, wishes: Mapping[str, Any]) -> None:
        self.wishes, self.asked = wishes, dict[str, Any]()

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """The wish, brought into the range."""
        value = min(high, max(low, float(self._wish(name, low))))
        return self._keep(name, low + round((value - low) / step) * step if step else value)

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """The wish, brought into the range."""
        return self._keep(name, min(high, max(low, int(self._wish(name, low)))))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """The wish where it is on offer, else the first choice."""
        wish = self._wish(name, choices[0])
        return self._keep(name, wish if wish in choices else choices[0])

    def _wish(self, name: str, default: Any) -> Any:
        return self.wishes.get(name, self.wishes.get(name.partition(".")[0], default))

    def _keep(self, name: str, value: Any) -> Any:
        self.asked[name] = value
        return value


def stock_space(
    task: Task,
    capabilities: Capabilities,
    *,
    techniques: Sequence[str] = STOCK["auto"],
    granularity: str = "stage",
    bits: tuple[Format, ...] = (),
    finetune_steps: int | None = None,
    sensitivity: Sequence[Sensitivity] = (),
    seed: int = 0,
) -> StockSpace:
    """The stock space for a model and a target.

    Args:
        techniques: what is searched together; see `STOCK` for those that belong together, `StockSpace` for all.
        granularity: "stage" (layers of one output resolution share their choices) or "layer".
        bits: formats on offer, such as 8, 4, 1.58, "bf16" or "fp8"; () for the bit-widths that the target really runs.
        finetune_steps: see `usual_finetune`.
        sensitivity: the table of `analysis.sensitivity`; ranges end where a group alone does too much harm, and the
            search begins with a plan that it says to be harmless.

    Raises:
        InputError: unknown technique, granularity or bit-width.
    """
    known = sorted({technique for found in STOCK.values() for technique in found})
    for technique in techniques:
        if technique not in known:
            raise InputError(f"techniques must be among {', '.join(known)}, not '{technique}'")
    if granularity not in GRANULARITIES:
        raise InputError(f"granularity must be one of {', '.join(GRANULARITIES)}, not '{granularity}'")
    strange = [format for format in bits if isinstance(format, bool) or format not in FORMATS]
    if strange:
        raise InputError(f"bits must be among {', '.join(map(str, FORMATS))}, not {', '.join(map(str, strange))}")
    layers = find_layers(task.build(), example_input(task.data))
    groups = group_layers(layers, granularity)
    offered = sorted(bits or capabilities.bits, key=lambda format: (bit_width(format), str(format)), reverse=True)
    last = layers[-1].name
    space = StockSpace(
        techniques=tuple(techniques),
        groups=groups,
        prunable=tuple(group for group, names in groups.items() if set(names) != {last}),
        bits=tuple(format for format in offered if bit_width(format) <= 8),
        float_bits=tuple(format for format in offered if bit_width(format) > 8) or (32,),
        outputs=capabilities.outputs,
        round_to=channel_step(layers),
        finetune=task_finetune(task, layers, finetune_steps, seed),
        blocks=len(residual_blocks(task.build(), task)) if "drop" in techniques else 0,
        adaptive=adaptive_kinds(task) if "adaptive" in techniques else (),
    )
    return _narrowed(space, sensitivity) if sensitivity else space


def _narrowed(space: StockSpace, table: Sequence[Sensitivity]) -> StockSpace:
    """The space without what the table says to be hopeless, and with a start that it says to be harmless."""
    top, step = space.ratios
    # What is lost by a cut can be learnt back: a range never ends below a quarter.
    tops = {g: max(2 * step, min(top, r)) for g, r in tolerated(table, space.groups, BEARABLE, "prune").items()}
    least = tolerated(table, space.groups, BEARABLE, "bits")
    widths = {g: tuple(b for b in space.bits if bit_width(b) >= least[g]) or space.bits[:1] for g in space.groups}
    cuts = tolerated(table, space.groups, HARMLESS, "prune")
    small = tolerated(table, space.groups, HARMLESS, "bits")
    favourite: dict[str, Any] = {f"prune.{group}": cut for group, cut in cuts.items()}
    for group in space.groups:
        fitting = [b for b in widths[group] if bit_width(b) >= small[group]]
        favourite[f"bits.{group}"] = min(fitting, key=bit_width) if fitting else FLOAT
    return dataclasses.replace(space, tops=tops, widths=widths, favourite=favourite)


def adaptive_kinds(task: Task) -> tuple[str, ...]:
    """The kinds of adaptive computation that a model has places for."""
    steps: dict[str, TrainingStep] = {
        "exits": EarlyExit(exits=1),
        "blocks": SkipBlocks(),
        "channels": GateChannels(),
        "experts": SplitExperts(),
    }
    found = []
    for kind, step in steps.items():
        try:
            step.prepare(task.build(), task)
        except CandidateError:
            continue
        found.append(kind)
    return tuple(found)


def task_finetune(task: Task, layers: tuple[Layer, ...], steps: int | None, seed: int) -> Finetune:
    """The fine-tuning that suits this task."""
    return usual_finetune(sum(layer.macs for layer in layers), len(task.data.train), steps, seed)


def channel_step(layers: tuple[Layer, ...]) -> int:
    """What numbers of channels are rounded to: multiples of 8 would halve a layer of 16 channels or leave it."""
    narrowest = min((layer.output_shape[0] for layer in layers if layer.kind == "conv"), default=64)
    return 8 if narrowest >= 32 else 4


def uniform_cut(task: Task, steps: int | None, seed: int) -> Plan:
    """Half of all channels, and the fine-tuning that suits the task: as a stock space's start point has them."""
    layers = find_layers(task.build(), example_input(task.data))
    finetune = task_finetune(task, layers, steps, seed)
    cut = Prune(UNIFORM_CUT, round_to=channel_step(layers))
    return (cut, finetune) if finetune.steps else (cut,)


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


def _stock(name: str) -> Any:
    def make(task: Task, capabilities: Capabilities, **settings: Any) -> StockSpace:
        return stock_space(task, capabilities, techniques=STOCK[name], **settings)

    return make


for _name in STOCK:
    SPACES.add(_name, _stock(_name))
