"""One search for one or several targets: each candidate is trained once, and built and measured for every target.

With several, each target gets a run folder of its own inside the search's, with its own front; the search itself
optimises what they have in common (the worst of the targets' accuracies counts) and each target's own figures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import InputError
from ..core.types import Backend, Candidate, Capabilities, Evaluation, Measurement, Plan, State, Task
from ..evaluators.objectives import Constraint, find_objective, is_device_figure, joint_names, parse_objectives
from ..evaluators.pipeline import Evaluator, baseline_plans
from ..evaluators.scalar import Scalar, parse_scalar
from ..studies.point import make_folder
from ..studies.storage import Database, sqlite_url
from ..studies.study import Study, part_folder
from .config import SearchConfig

WORST_FIRST = (State.FAILED, State.INFEASIBLE, State.STOPPED, State.COMPLETE)


@dataclass(frozen=True)
class Part:
    """One target's share of a search.

    Attributes:
        target: as the user names it.
        config: the settings of a search for this target alone.
        baselines: plans that the search must beat, as this target wants them.
    """

    target: str
    config: SearchConfig
    evaluator: Evaluator
    study: Study
    database: Database
    baselines: dict[str, Plan]


def make_parts(
    config: SearchConfig,
    folder: Path,
    task: Task,
    backends: Sequence[Backend],
    constraints: tuple[Constraint, ...],
    cut: Plan,
) -> list[Part]:
    """A part for each target; that of a single target has the run folder to itself."""
    parts = []
    for target, backend in zip(config.targets, backends, strict=True):
        own, place = config, folder
        if len(backends) > 1:
            place = folder / part_folder(target)
            # In a shared database each target has a study of its own.
            study = f"{config.study}@{target}"
            own = config.model_copy(update={"target": target, "out": str(place), "study": study})
        make_folder(place)
        objectives = parse_objectives(config.objectives, backend)
        database = _database(own, place, [o.direction for o in objectives], config.objectives)
        evaluator = Evaluator(task, backend, objectives, constraints, place, cache=folder / "cache")
        baselines = baseline_plans(backend.capabilities, cut)
        found = Study(place, objectives, database, constraints=constraints, scalar=scalar_of(config))
        parts.append(Part(target, own, evaluator, found, database, baselines))
    return parts


def joint_study(config: SearchConfig, folder: Path, parts: Sequence[Part]) -> Study:
    """The study that the search itself writes: the only part's, or one that sums up all of them."""
    if len(parts) == 1:
        return parts[0].study
    names = joint_names(config.objectives, config.targets)
    objectives = [find_objective(name) for name in names]
    database = _database(config, folder, [o.direction for o in objectives], names)
    studies = {part.target: part.study for part in parts}
    return Study(folder, objectives, database, studies, scalar=scalar_of(config))


def scalar_of(config: SearchConfig) -> Scalar | None:
    """The one number that a search is to maximise; None for the whole front."""
    return parse_scalar(config.scalarize, config.objectives) if config.scalarize else None


def _database(config: SearchConfig, folder: Path, directions: list[str], names: Sequence[str]) -> Database:
    url = config.storage or sqlite_url(folder)
    return Database(url, directions, names, config.study, shared=config.storage is not None)


def shared_capabilities(backends: Sequence[Backend]) -> Capabilities:
    """What all targets can do: the space that suits every one of them.

    Raises:
        InputError: no bit-width runs on all of them.
    """
    first = backends[0].capabilities
    if len(backends) == 1:
        return first
    bits = tuple(b for b in first.bits if all(b in backend.capabilities.bits for backend in backends))
    if not bits:
        each = "; ".join(f"{b.name}: {', '.join(map(str, b.capabilities.bits))}" for b in backends)
        raise InputError(f"--target: no bit-width runs on all targets ({each}); search for them one by one")
    return dataclasses.replace(first, bits=bits)


def joint_evaluator(parts: Sequence[Part], capabilities: Capabilities, study: Study) -> Evaluator | SeveralTargets:
    """What evaluates candidates; with several targets it has the untouched model's results recorded already."""
    if len(parts) == 1:
        return parts[0].evaluator
    evaluator = SeveralTargets({part.target: part.evaluator for part in parts}, capabilities.outputs)
    if not any(record.baseline == "untouched" for record in study.records()):
        found = {part.target: part.evaluator.baseline for part in parts}
        results = {target: result for target, result in found.items() if result is not None}
        study.write(dataclasses.replace(evaluator.sum_up(Candidate(()), results), baseline="untouched"))
    return evaluator


@dataclass(frozen=True)
class SeveralTargets:
    """Evaluates a candidate on each target in turn; sent to every worker once.

    Attributes:
        evaluators: by target; they share the trained weights.
        outputs: what the space sets for `Quantize.outputs`; each target gets what it wants instead.
    """

    evaluators: Mapping[str, Evaluator]
    outputs: str

    @property
    def task(self) -> Task:
        """What is compressed."""
        return next(iter(self.evaluators.values())).task

    def __call__(self, candidate: Candidate) -> Evaluation:
        """Evaluate on every target, also where one of them fails."""
        results = {}
        for target, evaluator in self.evaluators.items():
            plan = self._plan_for(candidate.plan, evaluator.backend.capabilities)
            results[target] = evaluator(dataclasses.replace(candidate, plan=plan))
        return self.sum_up(candidate, results)

    def _plan_for(self, plan: Plan, capabilities: Capabilities) -> Plan:
        """The plan with outputs rounded as the target's kernels want them."""
        return tuple(
            dataclasses.replace(step, outputs=capabilities.outputs)  # type: ignore[type-var]
            if getattr(step, "outputs", None) == self.outputs
            else step
            for step in plan
        )

    def sum_up(self, candidate: Candidate, results: Mapping[str, Evaluation]) -> Evaluation:
        """One result for all targets: failed or infeasible where any of them is."""
        states = [result.state for result in results.values()]
        worst = next(state for state in WORST_FIRST if state in states)
        reasons = [f"{target}: {result.reason}" for target, result in results.items() if result.state is worst]
        notes = dict.fromkeys(note for result in results.values() for note in result.notes)
        fidelity = min(result.candidate.fidelity for result in results.values())
        return Evaluation(
            dataclasses.replace(candidate, fidelity=fidelity),
            worst,
            _measurements(results),
            "; ".join(reasons) if worst is not State.COMPLETE else "",
            tuple(violation for result in results.values() for violation in result.violations),
            seconds=sum(result.seconds for result in results.values()),
            notes=tuple(notes),
            parts=dict(results),
            steps=sum(result.steps for result in results.values()),
        )


def _measurements(results: Mapping[str, Evaluation]) -> dict[str, Measurement]:
    """Each target's own figures as "NAME@TARGET"; of the others the worst target's."""
    found: dict[str, Measurement] = {}
    for target, result in results.items():
        for name, measurement in result.measurements.items():
            if is_device_figure(name) or name == "reference_latency":
                found[f"{name}@{target}"] = dataclasses.replace(measurement, name=f"{name}@{target}")
    common = [result.measurements for result in results.values()]
    for name in common[0]:
        if is_device_figure(name) or not all(name in measurements for measurements in common):
            continue
        maximize = _maximized(name)
        found[name] = (min if maximize else max)((m[name] for m in common), key=lambda m: m.value)
    return found


def _maximized(name: str) -> bool:
    from ..core.registry import OBJECTIVES

    return name in OBJECTIVES and OBJECTIVES.get(name).direction == "maximize"
