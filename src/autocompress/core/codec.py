"""Records to JSON and back; the same plan always becomes the same text."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import InputError
from .registry import OPERATORS
from .types import Artifact, Evaluation, Measurement, Method, Operator, Plan, Provenance


def encode_plan(plan: Plan) -> list[dict[str, Any]]:
    """[{"op": "Prune", "ratio": 0.5, ...}, ...]; every field is written, defaults too."""
    return [{"op": type(step).__name__, **_plain(dataclasses.asdict(step))} for step in plan]  # type: ignore[call-overload]


def decode_plan(steps: Sequence[Mapping[str, Any]]) -> Plan:
    """The plan that `encode_plan` wrote; raises InputError for an operator or field that is not known."""
    plan: list[Operator] = []
    for step in steps:
        fields = {name: value for name, value in step.items() if name != "op"}
        kind = OPERATORS.get(str(step.get("op", "")))
        try:
            plan.append(kind(**fields))
        except TypeError as error:
            raise InputError(f"plan: {step.get('op')}: {error}") from error
    return tuple(plan)


def plan_key(plan: Plan) -> str:
    """16 hex digits that name this piece of work."""
    return digest(encode_plan(plan))


def digest(value: Any) -> str:
    """Hash of the value's canonical JSON, 16 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


def check_order(plan: Plan) -> None:
    """Raise InputError unless the plan's operators stand in their fixed order."""
    for step in plan:
        if not isinstance(step, Operator) or not dataclasses.is_dataclass(step):
            raise InputError(f"a plan is a tuple of operators (such as Prune, Quantize), not of {type(step).__name__}")
    ranks = [_phase(step) for step in plan]
    if ranks != sorted(ranks):
        right = ", ".join(type(step).__name__ for step in sorted(plan, key=_phase))
        raise InputError(f"plan out of order: {', '.join(type(step).__name__ for step in plan)}; expected {right}")


def _phase(step: Operator) -> int:
    """Rank, with pruning and training in one phase: iterative schedules go to and fro between them."""
    return 20 if 20 <= step.rank <= 30 else step.rank


def check_plan(plan: Plan) -> None:
    """Raise InputError unless the plan is in order and can be stored and read back by its operators' names."""
    if not isinstance(plan, tuple):
        raise InputError(f"a space must return a plan, a tuple of operators; it returned {type(plan).__name__}")
    check_order(plan)
    for step in plan:
        name = type(step).__name__
        if name not in OPERATORS or OPERATORS.get(name) is not type(step):
            raise InputError(f"operator {name} is not registered: decorate it with autocompress.core.registry.operator")


def describe_plan(plan: Plan) -> str:
    """One short line for tables: "prune 38 %, fine-tune 100, int8"; "untouched" for ()."""
    return ", ".join(_describe(step) for step in plan) or "untouched"


def _describe(step: Operator) -> str:
    text = getattr(step, "describe", None)
    return text() if callable(text) else type(step).__name__.lower()


def encode_measurements(measurements: Mapping[str, Measurement]) -> dict[str, Any]:
    """{name: {value, unit, ci95, samples, method, device, runtime, taken_at, flags}}, and outcomes where known."""
    return {
        name: {
            "value": m.value,
            "unit": m.unit,
            "ci95": list(m.ci95) if m.ci95 else None,
            "samples": m.samples,
            "method": str(m.provenance.method),
            "device": m.provenance.device,
            "runtime": m.provenance.runtime,
            "taken_at": m.provenance.taken_at,
            "flags": list(m.provenance.flags),
        }
        | ({"outcomes": m.outcomes} if m.outcomes else {})
        for name, m in measurements.items()
    }


def decode_measurements(stored: Mapping[str, Any]) -> dict[str, Measurement]:
    """The measurements that `encode_measurements` wrote."""
    return {
        name: Measurement(
            name,
            m["value"],
            m["unit"],
            (m["ci95"][0], m["ci95"][1]) if m["ci95"] else None,
            m["samples"],
            Provenance(Method(m["method"]), m["device"], m["runtime"], m["taken_at"], tuple(m.get("flags", ()))),
            m.get("outcomes", ""),
        )
        for name, m in stored.items()
    }


def encode_artifact(artifact: Artifact | None, root: Path) -> dict[str, Any] | None:
    """The artifact with its path relative to the run folder `root`, so that the folder can move."""
    if artifact is None:
        return None
    return {**_plain(dataclasses.asdict(artifact)), "path": artifact.path.relative_to(root).as_posix()}


def decode_artifact(stored: Mapping[str, Any] | None, root: Path) -> Artifact | None:
    """The artifact that `encode_artifact` wrote."""
    return Artifact(**{**stored, "path": root / stored["path"]}) if stored else None


def describe_bits(bits: Mapping[str, Mapping[str, int | float | str]]) -> str:
    """Layers by format of weights and activations, the most frequent first: "w8a8 20, w32a32 1"."""
    counts = Counter(f"w{entry['weight']}a{entry['activation']}" for entry in bits.values())
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())


def encode_evaluation(evaluation: Evaluation, root: Path) -> dict[str, Any]:
    """Everything but the parameters, which the study's database keeps by itself."""
    return {
        "state": str(evaluation.state),
        "key": evaluation.candidate.key,
        "plan": encode_plan(evaluation.candidate.plan),
        "metrics": encode_measurements(evaluation.measurements),
        "reason": evaluation.reason,
        "violations": list(evaluation.violations),
        "artifact": encode_artifact(evaluation.artifact, root),
        "seconds": round(evaluation.seconds, 3),
        "baseline": evaluation.baseline,
        "notes": list(evaluation.notes),
        "fidelity": evaluation.candidate.fidelity,
        "steps": evaluation.steps,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value
