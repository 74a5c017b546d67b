"""What a search optimises, and the limits that it must keep."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..core.errors import InputError, unknown
from ..core.registry import OBJECTIVES
from ..core.types import Artifact, Backend, Measurement, Task


@dataclass(frozen=True)
class Built:
    """What an objective of one's own is computed from."""

    task: Task
    artifact: Artifact
    backend: Backend
    measurements: Mapping[str, Measurement]


@dataclass(frozen=True)
class Objective:
    """One figure with a direction.

    Attributes:
        direction: "minimize" or "maximize".
        unit: SI unit of the figure; "" for shares.
        cost: "cheap" where it is known from the cut model alone, "costly" otherwise.
        function: computes it; None for the figures that every evaluation has anyway.
    """

    name: str
    direction: str
    unit: str
    cost: str = "costly"
    function: Callable[[Built], Measurement] | None = None


for _entry in (
    Objective("accuracy", "maximize", ""),
    Objective("loss", "minimize", ""),
    Objective("calibration_error", "minimize", ""),
    Objective("latency", "minimize", "s"),
    Objective("throughput", "maximize", "1/s"),
    Objective("memory", "minimize", "B"),
    Objective("energy", "minimize", "J"),
    Objective("power", "minimize", "W"),
    Objective("instructions", "minimize", ""),
    Objective("luts", "minimize", ""),
    Objective("dsps", "minimize", ""),
    Objective("brams", "minimize", ""),
    Objective("size", "minimize", "B"),
    Objective("compressed_size", "minimize", "B"),
    Objective("parameters", "minimize", "", cost="cheap"),
    Objective("macs", "minimize", "", cost="cheap"),
    Objective("expected_latency", "minimize", "s"),
    Objective("expected_macs", "minimize", ""),
):
    OBJECTIVES.add(_entry.name, _entry)

DEVICE_FIGURES = ("latency", "throughput", "memory", "energy", "power", "instructions", "luts", "dsps", "brams")

SCALES = {
    "s": {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6},
    "B": {"": 1.0, "B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30},
    "1/s": {"": 1.0, "/s": 1.0},
    "J": {"": 1.0, "J": 1.0, "mJ": 1e-3, "uJ": 1e-6, "µJ": 1e-6},
    "W": {"": 1.0, "W": 1.0, "mW": 1e-3},
    "": {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9},
}
_PATTERN = re.compile(r"^\s*([a-z_]+)\s*(<=|>=)\s*([+-]?\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)\s*([A-Za-zµ%/]*)\s*$")


@dataclass(frozen=True)
class Constraint:
    """A limit on one objective, as written by the user.

    Attributes:
        text: "latency<=50%", "accuracy>=-1pt", "size<=200kB".
        kind: "absolute" (SI units), "percent" (of the untouched model) or "points" (hundredths added to it).
    """

    text: str
    name: str
    at_most: bool
    value: float
    kind: str

    def limit(self, baseline: Mapping[str, Measurement]) -> float:
        """The limit in SI units, given the untouched model's figures."""
        if self.kind == "absolute":
            return self.value
        base = baseline[self.name].value
        return base * self.value if self.kind == "percent" else base + self.value

    def violation(self, metrics: Mapping[str, Measurement], baseline: Mapping[str, Measurement]) -> float:
        """How far the figures are beyond the limit, as a share of the limit; 0 or less keeps it."""
        value, limit = metrics[self.name].value, self.limit(alongside(metrics, baseline))
        over = value - limit if self.at_most else limit - value
        return over / max(abs(limit), 1e-12)


def alongside(metrics: Mapping[str, Measurement], baseline: Mapping[str, Measurement]) -> dict[str, Measurement]:
    """The untouched model's figures, with its latency as measured in turns with this candidate where it was.

    What slows the machine down for a while then slows both, and leaves their ratio right.
    """
    if "reference_latency" not in metrics:
        return {**baseline}
    turn = metrics["reference_latency"]
    return {**baseline, "latency": turn, "expected_latency": turn}


def parse_objectives(names: Sequence[str], backend: Backend) -> tuple[Objective, ...]:
    """Objectives by name; raises InputError for unknown or repeated ones, and for those that the target lacks."""
    if not names:
        raise InputError("objectives: at least one is needed, such as accuracy latency size")
    repeated = sorted({name for name in names if list(names).count(name) > 1})
    if repeated:
        raise InputError(f"objectives: {', '.join(repeated)} given more than once")
    found = tuple(OBJECTIVES.get(name) for name in names)
    for objective in found:
        check_metric(objective.name, backend)
    return found


def find_objective(name: str) -> Objective:
    """The objective called `name`; "latency@arm/pixel3" is the latency on one of several targets."""
    base, at, _ = name.partition("@")
    found: Objective = OBJECTIVES.get(base)
    return dataclasses.replace(found, name=name) if at else found


def joint_names(names: Sequence[str], targets: Sequence[str]) -> list[str]:
    """Names of the objectives of a search for several targets.

    Figures that only a device gives come once for each target, "latency@TARGET"; the others once: the worst of the
    targets' counts.
    """
    if len(targets) == 1:
        return list(names)
    return [n for name in names for n in ([f"{name}@{t}" for t in targets] if is_device_figure(name) else [name])]


def is_device_figure(name: str) -> bool:
    """Whether only a device gives this figure."""
    return name.removeprefix("expected_") in DEVICE_FIGURES


def check_metric(name: str, backend: Backend) -> None:
    """Raise InputError where only a device gives this figure and `backend` does not."""
    measured = name.removeprefix("expected_")
    if is_device_figure(name) and measured not in backend.capabilities.metrics:
        raise InputError(f"target {backend.name} gives no {name}; it gives {', '.join(backend.capabilities.metrics)}")


def parse_constraint(text: str) -> Constraint:
    """Read "latency<=50%" (of the untouched model), "accuracy>=-1pt" (points from it) or "size<=200kB".

    Raises:
        InputError: not of that form, unknown name or unit, or no model could ever keep it.
    """
    match = _PATTERN.match(text)
    if match is None:
        raise InputError(
            f"constraint '{text}': expected NAME<=VALUE or NAME>=VALUE, "
            "such as latency<=50%, accuracy>=-1pt, size<=200kB"
        )
    name, sign, number, unit = match.groups()
    objective: Objective = OBJECTIVES.get(name)
    at_most, value = sign == "<=", float(number)
    if unit == "pt" and objective.unit:
        raise InputError(
            f"constraint '{text}': points (pt) are for shares such as accuracy; use a unit or % for {name}"
        )
    if unit == "%":
        kind, value = "percent", value / 100
    elif unit == "pt":
        kind, value = "points", value / 100
    else:
        scales = SCALES.get(objective.unit, {"": 1.0})
        if unit not in scales:
            raise unknown(f"unit in constraint '{text}':", unit, [key for key in scales if key] + ["%", "pt"])
        kind, value = "absolute", value * scales[unit]
    constraint = Constraint(text, name, at_most, value, kind)
    _check_possible(constraint)
    return constraint


def _check_possible(constraint: Constraint) -> None:
    share = constraint.name in ("accuracy", "calibration_error")
    if constraint.kind == "absolute":
        if constraint.at_most and constraint.value <= 0 and not share:
            raise InputError(f"constraint '{constraint.text}' is impossible: {constraint.name} is always above 0")
        if share and not constraint.at_most and constraint.value > 1:
            raise InputError(
                f"constraint '{constraint.text}' is impossible: {constraint.name} is a share and at most 1 "
                f"(write {constraint.name}>={constraint.value / 100:g}, or -1pt for points from the untouched model)"
            )
    if constraint.kind == "percent" and constraint.at_most and constraint.value <= 0:
        raise InputError(f"constraint '{constraint.text}' is impossible: nothing is below 0 % of the untouched model")


def check_constraints(constraints: Sequence[Constraint], baseline: Mapping[str, Measurement]) -> None:
    """Raise InputError for limits that can't be kept together, or not at all, given the untouched model's figures."""
    bounds: dict[str, list[Constraint]] = {}
    for constraint in constraints:
        limit = constraint.limit(baseline)
        if constraint.name == "accuracy" and not constraint.at_most and limit > 1:
            raise InputError(
                f"constraint '{constraint.text}' is impossible: it asks for an accuracy of {limit:.1%} "
                f"(the untouched model has {baseline['accuracy'].value:.1%})"
            )
        bounds.setdefault(constraint.name, []).append(constraint)
    for name, group in bounds.items():
        highest = min((c.limit(baseline) for c in group if c.at_most), default=float("inf"))
        lowest = max((c.limit(baseline) for c in group if not c.at_most), default=float("-inf"))
        if lowest > highest:
            raise InputError(f"constraints on {name} contradict each other: {', '.join(c.text for c in group)}")
