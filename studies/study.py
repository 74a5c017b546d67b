"""A finished or running search as its user sees it: trials, front, best points, files."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.codec import decode_artifact, decode_measurements, describe_plan, digest, encode_evaluation
from ..core.errors import InputError
from ..core.types import Artifact, Candidate, Evaluation, Measurement, State
from ..evaluators.objectives import Objective, find_objective, joint_names, parse_constraint
from .pareto import nondominated
from .rows import metrics_as_json, trial_row
from .storage import Database, sqlite_url

if TYPE_CHECKING:
    import pandas
    from optuna.distributions import BaseDistribution
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial


@dataclass(frozen=True)
class Record:
    """One trial as it stands in the database.

    Attributes:
        plan: as encoded by `core.codec`.
        summary: the plan in a few words.
        baseline: "untouched", "uniform int8", ...; "" for what the search proposed.
        notes: what operators left undone, and why.
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


@dataclass(frozen=True)
class Point:
    """A point of the front (or a baseline beside it).

    Attributes:
        split: "test" once it was measured on held-out data, "search" before.
        on_front: False for a baseline that other points beat, or that breaks a constraint.
    """

    trial: int
    summary: str
    plan: list[dict[str, Any]]
    split: str
    metrics: Mapping[str, Measurement]
    baseline: str
    on_front: bool
    artifact: Artifact | None

    def export(self, path: str | Path) -> Path:
        """Copy the deployable file into folder `path`, with `bundle.json` beside it that says what it is.

        Raises:
            InputError: the file is gone, or `path` holds another bundle already.
        """
        folder = Path(path)
        if self.artifact is None or not self.artifact.path.is_file():
            raise InputError(f"trial {self.trial}: its file is no longer in the run folder")
        if (folder / "bundle.json").exists():
            raise InputError(f"{folder} holds a bundle already; choose another folder")
        make_folder(folder)
        shutil.copy2(self.artifact.path, folder / self.artifact.path.name)
        card = {
            "file": self.artifact.path.name,
            "sha256": self.artifact.sha256,
            "target": self.artifact.runtime,
            "trial": self.trial,
            "plan": self.plan,
            "split": self.split,
            "metrics": metrics_as_json(self.metrics),
            "bits_in_graph": self.artifact.bits,
        }
        (folder / "bundle.json").write_text(json.dumps(card, indent=2) + "\n")
        return folder


class Study:
    """The results of one search, read from its run folder.

    Args:
        folder: the run folder.
        objectives: what was optimised, in order.
        parts: in a search for several targets, the study of each, by target.
    """

    def __init__(
        self,
        folder: Path,
        objectives: Sequence[Objective],
        database: Database,
        parts: Mapping[str, Study] | None = None,
    ) -> None:
        self.folder, self.objectives, self._database = folder, tuple(objectives), database
        self.parts = parts or {}
        self._keys: set[str] | None = None

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
        except (yaml.YAMLError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
            raise InputError(f"{path / 'config.yaml'} is broken: {' '.join(str(error).split())[:200]}") from error
        parts = {target: cls.open(path / part_folder(target)) for target in targets} if len(targets) > 1 else {}
        return cls(path, [find_objective(name) for name in names], Database(url, study=study), parts)

    @property
    def storage(self) -> BaseStorage:
        """Optuna's storage, for its dashboard and visualisations."""
        return self._database.study._storage

    @property
    def directions(self) -> list[str]:
        """Direction per objective."""
        return [objective.direction for objective in self.objectives]

    def records(self) -> list[Record]:
        """Every trial, by number."""
        return [read_record(trial, self.folder) for trial in self._database.trials()]

    def stored(self) -> list[FrozenTrial]:
        """Every trial as Optuna stores it, by number."""
        return self._database.trials()

    def write(self, evaluation: Evaluation, distributions: Mapping[str, BaseDistribution] | None = None) -> None:
        """Record a finished evaluation; `distributions` are those of its candidate's parameters.

        What it is made of goes into the studies of the targets first: a search that is killed between the two
        evaluates the candidate again, and finds it there already.
        """
        for target, part in evaluation.parts.items():
            if not self.parts[target].holds(part.candidate.key):
                self.parts[target].write(dataclasses.replace(part, baseline=evaluation.baseline), distributions)
        if self._keys is not None:
            self._keys.add(evaluation.candidate.key)
        values = self.known_values(evaluation)
        violations = [violation for violation in evaluation.violations if violation is not None]
        self._database.add(
            complete=values is not None,
            values=values,
            params=evaluation.candidate.params,
            distributions=distributions or {},
            user_attrs={
                "summary": describe_plan(evaluation.candidate.plan),
                "state": str(evaluation.state),
                "reason": evaluation.reason,
                "evaluation": encode_evaluation(evaluation, self.folder),
            },
            system_attrs={"constraints": violations} if values is not None and violations else {},
            seconds=evaluation.seconds,
        )

    def holds(self, key: str) -> bool:
        """Whether a candidate's result is recorded; results that others write meanwhile do not count."""
        if self._keys is None:
            self._keys = {trial.user_attrs["evaluation"]["key"] for trial in self.stored()}
        return key in self._keys

    def write_broken(
        self, params: Mapping[str, Any], distributions: Mapping[str, BaseDistribution], reason: str
    ) -> None:
        """Record choices that led to no plan."""
        nothing = encode_evaluation(Evaluation(Candidate(()), State.FAILED, reason=reason), self.folder)
        nothing["key"] = digest({"params": dict(params), "reason": reason})
        self._database.add(
            complete=False,
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

    def front(self, baselines: bool = True) -> list[Point]:
        """The feasible trials that no other beats on the search split, best first objective first.

        Figures are those of the test split once the search has ended. With `baselines`, the baselines
        come along whether or not they are on the front (see `Point.on_front`).
        """
        records = self.records()
        again = self._database.front()
        best = self.front_trials(records)
        points = []
        for record in records:
            on_front = record.trial in best
            if not on_front and not (baselines and record.baseline and record.metrics):
                continue
            later = again.get(record.trial)
            metrics = decode_measurements(later["metrics"]) if later else record.metrics
            split = later["split"] if later else "search"
            points.append(
                Point(
                    record.trial,
                    record.summary,
                    record.plan,
                    split,
                    metrics,
                    record.baseline,
                    on_front,
                    record.artifact,
                )
            )
        first = self.objectives[0]
        sign = -1 if first.direction == "maximize" else 1
        return sorted(
            points, key=lambda p: sign * p.metrics[first.name].value if first.name in p.metrics else float("inf")
        )

    def front_trials(self, records: Sequence[Record]) -> set[int]:
        """Numbers of the complete, feasible trials that no other beats on the search split."""
        done = [record for record in records if record.state is State.COMPLETE]
        kept = nondominated([self.values(record.metrics) for record in done], self.directions)
        return {record.trial for record, keep in zip(done, kept, strict=True) if keep}

    def values(self, metrics: Mapping[str, Measurement]) -> list[float]:
        """One value per objective."""
        return [metrics[objective.name].value for objective in self.objectives]

    def best(self, **limits: str) -> Point:
        """The front point with the best first objective among those within `limits`.

        Args:
            limits: by metric, e.g. `latency="<=5ms"`, `size="<=30%"` (of the untouched model).

        Raises:
            InputError: no front point is within the limits.
        """
        points = self.front()
        untouched = next((p for p in points if p.baseline == "untouched"), None)
        constraints = [parse_constraint(f"{name}{limit}") for name, limit in limits.items()]
        for constraint in constraints:
            if constraint.kind != "absolute" and untouched is None:
                raise InputError(f"'{constraint.text}' is relative, and the untouched model was not measured")
        base = untouched.metrics if untouched else {}
        for point in points:
            if point.on_front and all(
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


def make_folder(folder: Path) -> None:
    """Make `folder` and its parents; raises InputError where that can't be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"can't make the folder {folder}: {error.strerror}") from error


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
    )
