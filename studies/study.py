"""A finished or running search as its user sees it: trials, front, best points, files."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.trial import FrozenTrial, TrialState

from ..core.codec import (
    decode_artifact,
    decode_measurements,
    describe_plan,
    digest,
    encode_evaluation,
    encode_measurements,
)
from ..core.errors import InputError
from ..core.types import Artifact, Candidate, Evaluation, Measurement, State
from ..evaluators.objectives import (
    Constraint,
    Objective,
    find_objective,
    is_device_figure,
    joint_names,
    parse_constraint,
)
from ..evaluators.scalar import Scalar, parse_scalar
from .claims import Claims, piece_of
from .front import Results
from .noise import merge
from .pareto import hypervolume
from .point import Point, scores
from .rows import trial_row
from .storage import Database, sqlite_url

if TYPE_CHECKING:
    import pandas
    from optuna.distributions import BaseDistribution
    from optuna.storages import BaseStorage

FIDELITY = "fidelity"  # user attribute of trials that were trained a part of the way
SESSIONS = 10  # measurements of one trial after the search that are kept, the newest


@dataclass(frozen=True)
class Record:
    """One trial as it stands in the database.

    Attributes:
        plan: as encoded by `core.codec`.
        summary: the plan in a few words.
        baseline: "untouched", "uniform int8", ...; "" for what the search proposed.
        notes: what operators left undone, and why.
        fidelity: share of its training steps that were done: less than 1 for what stopped on a lower rung.
        steps: optimizer steps that it was trained for; None where an older version did not count them.
    """

    trial: int
    key: str
    state: State
    reason: str
    summary: str
    plan: list[dict[str, Any]]
    params: Mapping[str, Any]
    metrics: Mapping[str, Measurement]
    violations: tuple[float | None, ...]
    artifact: Artifact | None
    seconds: float
    baseline: str
    notes: tuple[str, ...] = ()
    fidelity: float = 1.0
    steps: int | None = None


class Study:
    """The results of one search, read from its run folder.

    Args:
        folder: the run folder.
        objectives: what was optimised, in order.
        parts: in a search for several targets, the study of each, by target.
        constraints: the limits of the search.
        scalar: the one number that the search optimised; None where it was after the whole front.
    """

    def __init__(
        self,
        folder: Path,
        objectives: Sequence[Objective],
        database: Database,
        parts: Mapping[str, Study] | None = None,
        constraints: Sequence[Constraint] = (),
        scalar: Scalar | None = None,
    ) -> None:
        self.folder, self.objectives, self._database = folder, tuple(objectives), database
        self.parts, self.constraints, self.scalar = parts or {}, tuple(constraints), scalar
        self._keys: set[tuple[str, float]] | None = None

    @classmethod
    def open(cls, folder: str | Path) -> Study:
        """Open a run folder; raises InputError where it is none."""
        path = Path(folder)
        if not (path / "config.yaml").is_file():
            raise InputError(f"{path} is no run folder: it has no config.yaml (expected the --out of a search)")
        import yaml

        try:
            config = yaml.safe_load((path / "config.yaml").read_text())
            if not config.get("storage") and not (path / "study.db").is_file():
                raise InputError(f"{path} has no study.db yet: the search ended before its first trial")
            study, url = config["study"], config.get("storage") or sqlite_url(path)
            targets = config["target"] if isinstance(config["target"], list) else [config["target"]]
            names = joint_names(config["objectives"], targets)
            limits = [parse_constraint(text) for text in config.get("constraints", [])]
            formula = config.get("scalarize", "")
            scalar = parse_scalar(formula, config["objectives"]) if formula else None
        except (yaml.YAMLError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
            raise InputError(f"{path / 'config.yaml'} is broken: {' '.join(str(error).split())[:200]}") from error
        parts = {target: cls.open(path / part_folder(target)) for target in targets} if len(targets) > 1 else {}
        return cls(path, [find_objective(name) for name in names], Database(url, study=study), parts, limits, scalar)

    def claims(self) -> Claims | None:
        """The register of who evaluates what, where other searches may write into this study; None where none can."""
        study = self._database.study
        return Claims(study._storage, study._study_id) if self._database.shared else None

    @property
    def storage(self) -> BaseStorage:
        """Optuna's storage, for its dashboard and visualisations."""
        return self._database.study._storage

    @property
    def directions(self) -> list[str]:
        """Direction per objective."""
        return [objective.direction for objective in self.objectives]

    def records(self) -> list[Record]:
        """Every trial, by number; of a candidate that went up rungs the last one, with the costs of all."""
        return _last_ones([read_record(trial, self.folder) for trial in self._database.trials()])

    def stored(self) -> list[FrozenTrial]:
        """Every trial as Optuna stores it, by number; a candidate has one for each rung that it was evaluated at."""
        return self._database.trials()

    def write(self, evaluation: Evaluation, distributions: Mapping[str, BaseDistribution] | None = None) -> None:
        """Record a finished evaluation; `distributions` are those of its candidate's parameters.

        What it is made of goes into the studies of the targets first: a search that is killed between the two
        evaluates the candidate again, and finds it there already.
        """
        for target, part in evaluation.parts.items():
            if not self.parts[target].holds(part.candidate):
                self.parts[target].write(dataclasses.replace(part, baseline=evaluation.baseline), distributions)
        if self._keys is not None:
            self._keys.add((evaluation.candidate.key, evaluation.candidate.fidelity))
        stopped = evaluation.state is State.STOPPED
        values = None if stopped else self.known_values(evaluation)
        state = TrialState.FAIL if values is None else TrialState.COMPLETE
        violations = [violation for violation in evaluation.violations if violation is not None]
        self._database.add(
            # Optuna's own fronts, those of its dashboard included, leave pruned trials out.
            state=TrialState.PRUNED if stopped else state,
            values=values,
            params=evaluation.candidate.params,
            distributions=distributions or {},
            user_attrs={
                "summary": describe_plan(evaluation.candidate.plan),
                "state": str(evaluation.state),
                "reason": evaluation.reason,
                "evaluation": encode_evaluation(evaluation, self.folder),
                "training_steps": evaluation.steps,
                **({FIDELITY: evaluation.candidate.fidelity} if evaluation.candidate.fidelity < 1 else {}),
            },
            system_attrs={"constraints": violations} if values is not None and violations else {},
            seconds=evaluation.seconds,
            piece=piece_of(evaluation.candidate),
        )

    def holds(self, candidate: Candidate) -> bool:
        """Whether a candidate's result is recorded; results that others write meanwhile do not count."""
        if self._keys is None:
            stored = [trial.user_attrs["evaluation"] for trial in self.stored()]
            self._keys = {(entry["key"], entry.get("fidelity", 1.0)) for entry in stored}
        return (candidate.key, candidate.fidelity) in self._keys

    def write_broken(
        self, params: Mapping[str, Any], distributions: Mapping[str, BaseDistribution], reason: str
    ) -> None:
        """Record choices that led to no plan."""
        nothing = encode_evaluation(Evaluation(Candidate(()), State.FAILED, reason=reason), self.folder)
        nothing["key"] = digest({"params": dict(params), "reason": reason})
        self._database.add(
            state=TrialState.FAIL,
            values=None,
            params=params,
            distributions=distributions,
            user_attrs={"summary": "", "state": str(State.FAILED), "reason": reason, "evaluation": nothing},
            system_attrs={},
            seconds=0.0,
        )

    def known_values(self, evaluation: Evaluation) -> list[float] | None:
        """One value per objective; None for failures and where one is unknown."""
        found = evaluation.measurements
        if evaluation.state is State.FAILED or any(objective.name not in found for objective in self.objectives):
            return None
        return self.values(found)

    def front(self, baselines: bool = True, verified: bool = False) -> list[Point]:
        """The feasible trials that are better than any other by more than noise, best first objective first.

        On the search split, that is; docs/fronts.md has the rule. Figures are those of the test split once the search
        has ended.

        Args:
            baselines: whether what is shown beside the front comes along, with `Point.on_front` False: beaten
                baselines, and points that no other beats if noise is ignored.
            verified: the front of the test split instead, of what was measured there; [] before the search has ended.
        """
        again = self._database.front()
        results = self._results()
        places = results.places()
        points = []
        for record in results.records:
            place = places.get(record.trial)
            beside = place and (place.no_better_than is not None or (record.baseline and record.metrics))
            if place is None or not (place.verified if verified else place.on_front or (baselines and beside)):
                continue
            points.append(
                Point(
                    record.trial,
                    record.summary,
                    record.plan,
                    again[record.trial]["split"] if record.trial in again else "search",
                    results.again.get(record.trial, record.metrics),
                    record.baseline,
                    verified or place.on_front,
                    record.artifact,
                    None if verified else place.no_better_than,
                    place.verified,
                    place.change,
                )
            )
        first = self.objectives[0]
        sign = -1 if first.direction == "maximize" else 1
        return sorted(
            points, key=lambda p: sign * p.metrics[first.name].value if first.name in p.metrics else float("inf")
        )

    def _results(self) -> Results:
        stored = self._database.front()
        return Results(
            self.records(),
            {trial: decode_measurements(found["metrics"]) for trial, found in stored.items()},
            self.objectives,
            self.constraints,
            {trial: [decode_measurements(m) for m in found.get("sessions", [])] for trial, found in stored.items()},
        )

    def unevenness(self) -> float:
        """Relative standard deviation of the untouched model's latency from one measurement to the next.

        Fronts take it for noise of each latency, beside its own interval.
        """
        during, after = self._results().unevenness()
        return after if self._database.front() else during

    def front_trials(self, records: Sequence[Record]) -> set[int]:
        """Numbers of the complete, feasible trials that no other beats on the search split, noise or not."""
        return {record.trial for record in Results(records, {}, self.objectives).contenders()}

    def doubtful(self) -> list[int]:
        """Trials that decide over the front by where in their intervals the device's figures lie."""
        return self._results().doubtful()

    def measured_again(self) -> dict[int, Mapping[str, Measurement]]:
        """By trial, the figures on the test split of what was measured after the search."""
        return {trial: decode_measurements(found["metrics"]) for trial, found in self._database.front().items()}

    def add_again(self, trial: int, split: str, metrics: Mapping[str, Measurement]) -> None:
        """Record what a trial was measured at after the search; the device's figures are merged with earlier ones."""
        known = self._database.front().get(trial, {})
        earlier = [decode_measurements(session) for session in known.get("sessions", [])]
        device = {name: m for name, m in metrics.items() if is_device_figure(name) or name == "reference_latency"}
        sessions = [*earlier[1 - SESSIONS :], device]
        merged = {name: merge([session[name] for session in sessions if name in session]) for name in device}
        self._database.set_front(
            trial, split, encode_measurements({**metrics, **merged}), [encode_measurements(found) for found in sessions]
        )

    def hypervolume(self, reference: Mapping[str, float] | None = None) -> float:
        """Share of the box between the ideal and the reference point that complete trials dominate on the search split.

        Noise is not taken off, which makes it the larger the more trials there are.

        Args:
            reference: by objective; without, 10 % worse than the untouched model, or 0 (see `pareto.hypervolume`).

        Raises:
            InputError: no trial of the untouched model, or an objective without a reference.
        """
        records = self.records()
        values = [self.values(record.metrics) for record in records if record.state is State.COMPLETE]
        if reference is not None:
            missing = [objective.name for objective in self.objectives if objective.name not in reference]
            if missing:
                raise InputError(f"hypervolume: the reference point has no {missing[0]}")
            corner = [reference[objective.name] for objective in self.objectives]
            return hypervolume(values, self.directions, reference=corner)
        untouched = next((record for record in records if record.baseline == "untouched"), None)
        if untouched is None:
            raise InputError(f"{self.folder}: the untouched model was not measured; give a reference point")
        return hypervolume(values, self.directions, self.values(untouched.metrics))

    def values(self, metrics: Mapping[str, Measurement]) -> list[float]:
        """One value per objective."""
        return [metrics[objective.name].value for objective in self.objectives]

    def best(self, **limits: str) -> Point:
        """The front point with the best first objective among those within `limits`; if scalarised, the best score.

        Args:
            limits: by metric, e.g. `latency="<=5ms"`, `size="<=30%"` (of the untouched model).

        Raises:
            InputError: no front point is within the limits.
        """
        points = sorted(self.front(), key=lambda point: not point.on_front)
        numbers = scores(self.scalar, points)
        points.sort(key=lambda point: -numbers.get(point.trial, -math.inf))
        untouched = next((p for p in points if p.baseline == "untouched"), None)
        constraints = [parse_constraint(f"{name}{limit}") for name, limit in limits.items()]
        for constraint in constraints:
            if constraint.kind != "absolute" and untouched is None:
                raise InputError(f"'{constraint.text}' is relative, and the untouched model was not measured")
        base = untouched.metrics if untouched else {}
        # Those that are no better than a front point are within limits where that one may be not.
        for point in points:
            if (point.on_front or point.no_better_than is not None) and all(
                c.name in point.metrics and c.violation(point.metrics, base) <= 0 for c in constraints
            ):
                return point
        asked = ", ".join(c.text for c in constraints) or "any"
        raise InputError(f"no point of the front keeps {asked}; see `autocompress front {self.folder}`")

    def to_dataframe(self) -> pandas.DataFrame:
        """One row per trial: state, reason, plan, parameters, and value, low, high and kind of each metric."""
        import pandas

        return pandas.DataFrame([trial_row(record) for record in self.records()])


def part_folder(target: str) -> str:
    """Name of a target's folder inside the run folder of a search for several."""
    return re.sub(r"[^\w.=-]+", "-", target)


def _last_ones(records: Sequence[Record]) -> list[Record]:
    """The records without those of candidates that went on later; these have the costs of all their rungs."""
    went_on: dict[str, Record] = {}
    found: dict[int, Record] = {}
    for record in records:
        before = went_on.pop(record.key, None)
        if before is not None:
            del found[before.trial]
            steps = None if record.steps is None or before.steps is None else record.steps + before.steps
            record = dataclasses.replace(record, seconds=record.seconds + before.seconds, steps=steps)
        found[record.trial] = record
        if record.state is State.STOPPED:
            went_on[record.key] = record
    return list(found.values())


def read_record(trial: FrozenTrial, folder: Path) -> Record:
    """The record behind one stored trial."""
    stored = trial.user_attrs["evaluation"]
    return Record(
        trial=trial.number,
        key=stored["key"],
        state=State(stored["state"]),
        reason=stored["reason"],
        summary=trial.user_attrs["summary"],
        plan=stored["plan"],
        params=trial.params,
        metrics=decode_measurements(stored["metrics"]),
        violations=tuple(stored["violations"]),
        artifact=decode_artifact(stored["artifact"], folder),
        seconds=stored["seconds"],
        baseline=stored["baseline"],
        notes=tuple(stored.get("notes", ())),
        fidelity=stored.get("fidelity", 1.0),
        steps=stored.get("steps"),
    )
