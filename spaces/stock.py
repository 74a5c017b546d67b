"""Stock spaces: low rank, pruning, sparsity, distillation, sharing and bit-widths, per stage or per layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..compression.analysis import Sensitivity, tolerated
from ..compression.finetune import Finetune, usual_finetune
from ..compression.graph import Layer, find_layers
from ..compression.lowrank import LowRank
from ..compression.pruning import Prune
from ..compression.qat import Qat
from ..compression.quantization import BITS, Quantize
from ..compression.sharing import Cluster
from ..compression.sparsity import Sparsify
from ..core.errors import InputError
from ..core.registry import SPACES
from ..core.types import Capabilities, Chooser, Operator, Plan, Task
from ..tasks.data import example_input

GRANULARITIES = ("stage", "layer")
# Space name: the techniques that it searches together.
STOCK: dict[str, tuple[str, ...]] = {
    "auto": ("prune", "quantize"),
    "prune": ("prune",),
    "quantize": ("quantize",),
    "lowrank": ("lowrank",),
    "sparse": ("sparse",),
    "share": ("share",),
    "qat": ("quantize", "qat"),
    "joint": ("lowrank", "prune", "distil", "quantize", "qat"),
}
FLOAT = "float"
UNIFORM_CUT = 0.5
WHOLE = 1.0
# Divergence (nats) that a group changed alone may cause: its range ends at the first, a start point keeps the second.
BEARABLE, HARMLESS = 1.0, 0.05


@dataclass(frozen=True)
class StockSpace:
    """Choose for each group of layers, train if anything was cut, then round.

    Parameters it asks for, by technique:
        lowrank: `lowrank.<group>` (share of the rank to keep, 1 for all) and `lowrank.method`.
        prune: `prune.<group>` (share of channels to remove).
        sparse: `sparse.share` of all weights to remove, and `sparse.pattern`.
        training, after any of these: `finetune.lr`, `finetune.alpha`, `finetune.temperature`; with "distil" also
            `finetune.hint` and `finetune.beta`.
        share: `clusters` (values a layer's weights may take; 0 for any).
        quantize: `bits.<group>`, `bits.float` and `calibrator`; with "qat" also `qat`, whether training goes on
            through the rounding, for as many steps as the fine-tuning has.

    Attributes:
        techniques: see above.
        groups: layer names by group, e.g. {"stage1": ("layer1.0.conv1", ...)}.
        prunable: the groups that have something to prune.
        bits: integer bit-widths on offer.
        float_bits: bit-widths for the groups that stay in floating point.
        ratios: highest pruning ratio and step.
        outputs: see `Quantize.outputs`; what the target wants.
        finetune: what follows a cut, with its rate, alpha and temperature replaced by the chosen ones.
        tops: highest pruning ratio by group, where it is lower than that of `ratios`.
        widths: bit-widths by group, where fewer are on offer.
        favourite: ratio and bit-width by group of one more plan to begin with; None for none.
    """

    techniques: tuple[str, ...]
    groups: Mapping[str, tuple[str, ...]]
    prunable: tuple[str, ...]
    bits: tuple[int, ...] = (8,)
    float_bits: tuple[int, ...] = (32, 16)
    ratios: tuple[float, float] = (0.75, 0.125)
    outputs: str = "shared"
    finetune: Finetune = field(default_factory=Finetune)
    round_to: int = 8
    tops: Mapping[str, float] = field(default_factory=dict)
    widths: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    favourite: Mapping[str, Any] | None = None

    def __call__(self, choose: Chooser) -> Plan:
        """Ask for this space's parameters; return the plan."""
        cut = (*self._lowrank(choose), *self._prune(choose), *self._sparse(choose))
        training = (self._training(choose),) if cut and self.finetune.steps else ()
        return (*cut, *training, *self._share(choose), *self._quantize(choose))

    def _lowrank(self, choose: Chooser) -> Plan:
        if "lowrank" not in self.techniques:
            return ()
        kept = {group: choose.suggest_float(f"lowrank.{group}", 0.25, WHOLE, step=0.25) for group in self.prunable}
        chosen = {layer: share for g, share in kept.items() if share < WHOLE for layer in self.groups[g]}
        if not chosen:
            return ()
        method = choose.suggest_categorical("lowrank.method", ["svd", "spatial", "tucker"])
        return (LowRank(_shared(chosen, kept), method=method),)

    def _prune(self, choose: Chooser) -> Plan:
        if "prune" not in self.techniques:
            return ()
        top, step = self.ratios
        cuts = {
            group: choose.suggest_float(f"prune.{group}", 0.0, min(top, self.tops.get(group, top)), step=step)
            for group in self.prunable
        }
        chosen = {layer: cut for group, cut in cuts.items() if cut for layer in self.groups[group]}
        return (Prune(_shared(chosen, cuts), round_to=self.round_to),) if chosen else ()

    def _sparse(self, choose: Chooser) -> Plan:
        if "sparse" not in self.techniques:
            return ()
        pattern = choose.suggest_categorical("sparse.pattern", ["none", "unstructured", "2:4", "4:8"])
        if pattern == "none":
            return ()
        if pattern != "unstructured":
            return (Sparsify(0.5, pattern=pattern),)
        return (Sparsify(choose.suggest_float("sparse.share", 0.3, 0.95, step=0.05)),)

    def _training(self, choose: Chooser) -> Operator:
        lr = choose.suggest_categorical("finetune.lr", [0.01, 0.03, 0.1])
        alpha = choose.suggest_categorical("finetune.alpha", [0.0, 0.5, 0.9])
        temperature = choose.suggest_categorical("finetune.temperature", [1.0, 2.0, 4.0]) if alpha else 1.0
        chosen = dataclasses.replace(self.finetune, lr=lr, alpha=alpha, temperature=temperature)
        if "distil" not in self.techniques:
            return chosen
        hint = choose.suggest_categorical("finetune.hint", ["none", "feature", "attention", "relational"])
        beta = choose.suggest_categorical("finetune.beta", [0.1, 1.0, 10.0]) if hint != "none" else 0.0
        return dataclasses.replace(chosen, hint=hint, beta=beta) if hint != "none" else chosen

    def _share(self, choose: Chooser) -> Plan:
        if "share" not in self.techniques:
            return ()
        clusters = choose.suggest_categorical("clusters", [0, 256, 64, 32, 16, 8])
        return (Cluster(clusters),) if clusters else ()

    def _quantize(self, choose: Chooser) -> Plan:
        if "quantize" not in self.techniques:
            return ()
        chosen = {
            group: choose.suggest_categorical(f"bits.{group}", [*self.widths.get(group, self.bits), FLOAT])
            if self.bits
            else FLOAT
            for group in self.groups
        }
        rest = 32
        if FLOAT in chosen.values() and self.float_bits:
            rest = choose.suggest_categorical("bits.float", list(self.float_bits))
        bits = {layer: rest if chosen[g] == FLOAT else int(chosen[g]) for g in self.groups for layer in self.groups[g]}
        if set(bits.values()) == {32}:
            return ()
        integer = min(bits.values()) <= 8
        calibrator = choose.suggest_categorical("calibrator", ["max", "percentile"]) if integer else "max"
        uniform = set(bits.values())
        widths: int | Mapping[str, int] = uniform.pop() if len(uniform) == 1 else bits
        trained = integer and "qat" in self.techniques and self.finetune.steps
        if trained and choose.suggest_categorical("qat", [False, True]):
            settings = self.finetune
            step: Operator = Qat(
                bits=widths,
                calibrator=calibrator,
                outputs=self.outputs,
                # What few bits break takes larger steps to mend (see `Qat.lr`).
                lr=1e-3 if min(bits.values()) <= 3 else Qat.lr,
                steps=settings.steps,
                batch_size=settings.batch_size,
                seed=settings.seed,
            )
            return (step,)
        return (Quantize(widths, calibrator, outputs=self.outputs),)

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
    bits: tuple[int, ...] = (),
    finetune_steps: int | None = None,
    sensitivity: Sequence[Sensitivity] = (),
    seed: int = 0,
) -> StockSpace:
    """The stock space for a model and a target.

    Args:
        techniques: what is searched together: "lowrank", "prune", "sparse", "distil", "share", "quantize", "qat".
        granularity: "stage" (layers of one output resolution share their choices) or "layer".
        bits: bit-widths on offer; () for all that the target really runs.
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
    strange = sorted(set(bits) - set(BITS))
    if strange:
        raise InputError(f"bits must be among {', '.join(map(str, BITS))}, not {', '.join(map(str, strange))}")
    layers = find_layers(task.build(), example_input(task.data))
    groups = group_layers(layers, granularity)
    offered = bits or capabilities.bits
    last = layers[-1].name
    integers = tuple(sorted((b for b in offered if b <= 8), reverse=True))
    space = StockSpace(
        techniques=tuple(techniques),
        groups=groups,
        prunable=tuple(group for group, names in groups.items() if set(names) != {last}),
        bits=integers,
        float_bits=tuple(sorted((b for b in offered if b > 8), reverse=True)) or (32,),
        outputs=capabilities.outputs,
        # Narrow models need finer steps: multiples of 8 would halve a layer of 16 channels or leave it.
        round_to=8 if min((layer.output_shape[0] for layer in layers if layer.kind == "conv"), default=64) >= 32 else 4,
        finetune=task_finetune(task, layers, finetune_steps, seed),
    )
    return _narrowed(space, sensitivity) if sensitivity else space


def _narrowed(space: StockSpace, table: Sequence[Sensitivity]) -> StockSpace:
    """The space without what the table says to be hopeless, and with a start that it says to be harmless."""
    top, step = space.ratios
    # What is lost by a cut can be learnt back: a range never ends below a quarter.
    tops = {g: max(2 * step, min(top, r)) for g, r in tolerated(table, space.groups, BEARABLE, "prune").items()}
    least = tolerated(table, space.groups, BEARABLE, "bits")
    widths = {g: tuple(b for b in space.bits if b >= least[g]) or space.bits[:1] for g in space.groups}
    cuts = tolerated(table, space.groups, HARMLESS, "prune")
    small = tolerated(table, space.groups, HARMLESS, "bits")
    favourite: dict[str, Any] = {f"prune.{group}": cut for group, cut in cuts.items()}
    for group in space.groups:
        fitting = [b for b in widths[group] if b >= small[group]]
        favourite[f"bits.{group}"] = min(fitting) if fitting else FLOAT
    return dataclasses.replace(space, tops=tops, widths=widths, favourite=favourite)


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


def _shared(chosen: Mapping[str, float], by_group: Mapping[str, float]) -> float | Mapping[str, float]:
    """One number where all groups were given the same, which also covers layers outside all groups."""
    values = set(by_group.values())
    return values.pop() if len(values) == 1 else dict(chosen)


def _stock(name: str) -> Any:
    def make(task: Task, capabilities: Capabilities, **settings: Any) -> StockSpace:
        return stock_space(task, capabilities, techniques=STOCK[name], **settings)

    return make


for _name in STOCK:
    SPACES.add(_name, _stock(_name))
