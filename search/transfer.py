"""What earlier runs tell a new search: a prior for its sampler, candidates to start from, and trained files.

The earlier run may be for another device, other data, or a space that shares parameters with this one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution

from ..core.codec import plan_key
from ..core.errors import InputError
from ..core.types import Chooser, Measurement, Plan, Space, State, Task
from ..evaluators.objectives import find_objective, joint_names
from ..evaluators.reuse import EarlierFile
from ..evaluators.scalar import Scalar
from ..studies.study import Record, Study
from .belief import Prior, domination_counts
from .config import SearchConfig
from .improvement import spread_along

LOOKS, LOOK_SECONDS = 100, 3.0  # calls of a space to learn its parameters
STARTS = 4  # one trial in so many, at most, goes to candidates of earlier runs
ENOUGH = 8  # of these for a sampler that learns from the rest by itself
IMAGES = 4096  # inputs of a split that its fingerprint reads
FINGERPRINT = "task.json"


@dataclass(frozen=True)
class Earlier:
    """An earlier run.

    Attributes:
        folder: as the user named it.
        records: its complete trials that were trained in full and have parameters.
    """

    folder: str
    study: Study
    records: tuple[Record, ...]

    @classmethod
    def open(cls, folder: str, out: Path) -> Earlier:
        """Read a run folder.

        Raises:
            InputError: there is none, nothing can be learned from it, or it is `out` itself.
        """
        if Path(folder).resolve() == out.resolve():
            raise InputError(f"warm start: {folder} is this search's own run folder; expected that of an earlier run")
        try:
            study = Study.open(folder)
            records = study.records()
        except (InputError, KeyError, sqlalchemy_error()) as error:
            text = " ".join(str(error).split())[:200]
            raise InputError(f"warm start: {text if isinstance(error, InputError) else f'{folder}: {text}'}") from error
        good = tuple(r for r in records if r.state is State.COMPLETE and r.fidelity >= 1 and r.params)
        if not good:
            raise InputError(
                f"warm start: {folder} holds no complete trial with parameters, so there is nothing to learn"
            )
        return cls(folder, study, good)

    @property
    def untouched(self) -> Mapping[str, Measurement]:
        """What the untouched model came to there; {} where it was not measured."""
        return next((r.metrics for r in self.study.records() if r.baseline == "untouched"), {})


def open_earlier(folders: Sequence[str], out: Path, known: Sequence[str]) -> tuple[list[Earlier], list[str]]:
    """The earlier runs, and a line for each that is gone.

    Args:
        known: folders that this run was started with: it goes on without those that can't be read any more.
    """
    found, lost = [], []
    for folder in dict.fromkeys(folders):
        try:
            found.append(Earlier.open(folder, out))
        except InputError as error:
            if folder not in known:
                raise
            lost.append(f"{error}; the search goes on without it")
    return found, lost


def sqlalchemy_error() -> type[Exception]:
    """What a database that is none raises."""
    from sqlalchemy.exc import SQLAlchemyError

    return SQLAlchemyError


def parameters_of(space: Space, seed: int) -> dict[str, BaseDistribution]:
    """The parameters that a space asks for, as far as random choices show them."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    found: dict[str, BaseDistribution] = {}
    until = time.monotonic() + LOOK_SECONDS
    for _ in range(LOOKS):
        trial = study.ask()
        try:
            space(trial)
        except Exception:  # the user's code; the search itself reports what fails
            continue
        found |= trial.distributions
        if time.monotonic() > until:
            break
    return found


def make_prior(
    earlier: Earlier, parameters: Mapping[str, BaseDistribution], names: Sequence[str], scalar: Scalar | None
) -> Prior:
    """The run's figures under the names of this search's objectives, or the one number that it maximises.

    Raises:
        InputError: the run shares no parameter with this search.
    """
    found, values = [], []
    untouched = earlier.untouched if scalar else {}
    for record in earlier.records:
        params = {name: v for name, v in record.params.items() if name in parameters and _holds(parameters[name], v)}
        if not params:
            continue
        found.append(params)
        if scalar is not None:
            number = scalar(record.metrics, untouched)
            values.append([math.nan if number is None else number])
        else:
            values.append([figure(record.metrics, name) for name in names])
    if not found:
        theirs = ", ".join(list(dict.fromkeys(name for record in earlier.records for name in record.params))[:4])
        raise InputError(
            f"warm start: {earlier.folder} shares no parameter with this search: it has {theirs}; "
            f"this one has {', '.join(list(parameters)[:4])}"
        )
    return Prior(found, np.array(values, dtype=float))


def figure(metrics: Mapping[str, Measurement], name: str) -> float:
    """The figure called `name`; else the same one of no target in particular, or of another; NaN without any.

    After a search for several targets, names are such as "latency@x86/openvino".
    """
    plain = name.partition("@")[0]
    others = (other for other in metrics if other.partition("@")[0] == plain)
    key = next((key for key in (name, plain, *others) if key in metrics), None)
    return math.nan if key is None else metrics[key].value


def _holds(distribution: BaseDistribution, value: Any) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and not (getattr(distribution, "log", False) and value <= 0)


def start_points(
    earlier: Sequence[Earlier], space: Space, names: Sequence[str], directions: Sequence[str], count: int
) -> tuple[list[dict[str, Any]], int]:
    """Parameters of the earlier runs' best candidates, spread over their fronts; and how many don't fit this space."""
    signs = np.array([-1.0 if direction == "maximize" else 1.0 for direction in directions])
    queues: list[list[Mapping[str, Any]]] = []
    known = {_plan_at(space, params) for params in getattr(space, "starts", [])}
    misfits = 0
    for run in earlier:
        values = signs * np.array([[figure(record.metrics, name) for name in names] for record in run.records])
        values = values[:, ~np.isnan(values).any(axis=0)]
        fitting = []
        for place in np.flatnonzero(domination_counts(values) == 0) if values.size else []:
            key = _plan_at(space, run.records[place].params, run.records[place].plan)
            misfits += key is None
            if key is not None and key not in known:
                known.add(key)
                fitting.append(place)
        queues.append([run.records[fitting[n]].params for n in spread_along(values[fitting], count)])
    # In turns, so that each run has its share.
    longest = max((len(queue) for queue in queues), default=0)
    merged = [dict(queue[turn]) for turn in range(longest) for queue in queues if turn < len(queue)]
    return merged[:count], misfits


def _plan_at(space: Space, params: Mapping[str, Any], like: Sequence[Mapping[str, Any]] | None = None) -> str | None:
    """Key of the plan that parameters lead to; None where they don't fit, or mean other operators than in `like`."""
    trial = optuna.trial.FixedTrial(dict(params))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of values out of range, which are refused below
            plan: Plan = space(trial)
    except Exception:  # the user's code, with choices that it may never have offered
        return None
    inside = all(d._contains(d.to_internal_repr(trial.params[name])) for name, d in trial.distributions.items())
    if not inside or set(trial.params) != set(params):
        return None
    # Settings may differ, as each target wants its outputs rounded in its own way.
    if like is not None and [type(step).__name__ for step in plan] != [step["op"] for step in like]:
        return None
    return plan_key(plan)


@dataclass(frozen=True)
class WarmStart:
    """What a search makes of earlier runs.

    Attributes:
        space: of the search, with the earlier runs' best candidates as further start points.
        lines: what to tell the user.
    """

    space: Space
    priors: tuple[Prior, ...]
    lines: tuple[str, ...]


def warm_start(config: SearchConfig, runs: Sequence[Earlier], space: Space, scalar: Scalar | None) -> WarmStart:
    """Prepare what `config.warm_start` asks for.

    Raises:
        InputError: a run shares no parameter with the space.
    """
    if not runs:
        return WarmStart(space, (), ())
    names = joint_names(config.objectives, config.targets)
    directions = [find_objective(name).direction for name in names]
    parameters = parameters_of(space, config.seed)
    priors = tuple(make_prior(run, parameters, names, scalar) for run in runs)
    learns = config.sampler == "auto"
    count = min(config.trials // STARTS, ENOUGH if learns else config.trials)
    starts, misfits = start_points(runs, space, names, directions, count)
    told = f"warm start: {len(starts)} candidate{'s' if len(starts) != 1 else ''} of earlier runs first"
    told += f" ({misfits} on their fronts do not fit this space)" if misfits else ""
    if learns:
        told += f", the sampler learns from {sum(len(prior.params) for prior in priors)} trials"
    else:
        told += f"; that is all, as sampler {config.sampler} can't learn from other runs (--sampler auto does)"
    return WarmStart(StartingSpace(space, starts), priors, (told,))


class StartingSpace:
    """A space with further start points."""

    def __init__(self, space: Space, starts: Sequence[Mapping[str, Any]]) -> None:
        self._space = space
        self.starts = [*getattr(space, "starts", []), *starts]

    def __call__(self, choose: Chooser) -> Plan:
        """The plan of the space itself."""
        return self._space(choose)


def fingerprint(task: Task) -> dict[str, str]:
    """Hashes of what a trained file depends on besides its plan: the original model, and the data.

    Of large splits all labels count and a few thousand inputs, evenly spread.
    """
    model, data = hashlib.sha256(), hashlib.sha256()
    built = task.build()
    model.update(str(built).encode())
    for name, tensor in built.state_dict().items():
        model.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    for split in (task.data.train, task.data.search, task.data.test):
        places = np.unique(np.linspace(0, len(split) - 1, min(len(split), IMAGES)).astype(int))
        data.update(str((split.inputs.shape, split.inputs.dtype)).encode())
        data.update(np.ascontiguousarray(split.inputs[places]).tobytes())
        data.update(np.ascontiguousarray(split.labels).tobytes())
    d = task.data
    data.update(str((d.classes, d.mean, d.std, d.shift, d.flip, d.vocabulary)).encode())
    return {"model": model.hexdigest(), "data": data.hexdigest()}


def save_fingerprint(found: Mapping[str, str], folder: Path) -> None:
    """Write it into a run folder."""
    (folder / FINGERPRINT).write_text(json.dumps(found, indent=1) + "\n")


def earlier_files(earlier: Sequence[Earlier], own: Mapping[str, str], target: str) -> dict[str, EarlierFile]:
    """Files of runs on the same model and data, by the key of the plan; those that were made for `target` first."""
    found: dict[str, EarlierFile] = {}
    for run in earlier:
        try:
            same = json.loads((run.study.folder / FINGERPRINT).read_text()) == own
        except (OSError, ValueError):  # an older run, which does not say what it was trained on
            same = False
        if not same:
            continue
        for study in run.study.parts.values() or [run.study]:
            for record in study.records():
                artifact = record.artifact
                good = record.state is State.COMPLETE and record.fidelity >= 1 and record.plan
                if artifact is None or not good or not artifact.path.is_file():
                    continue
                known = found.get(record.key)
                if known is None or (artifact.runtime == target and known.artifact.runtime != target):
                    here = dataclasses.replace(artifact, path=artifact.path.resolve())
                    found[record.key] = EarlierFile(str(study.folder), record.trial, here, record.metrics)
    return found
