"""Our space and evaluator inside a search that others drive: as the objective of any Optuna study.

What they find is recorded in a run folder as in a search of our own, so that its front can be shown and exported.
"""

from __future__ import annotations

import dataclasses
import shutil
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import BaseTrial, FrozenTrial

from ..core.codec import check_plan, describe_plan
from ..core.disk import written_whole
from ..core.errors import AutocompressError, InputError
from ..core.types import Candidate, Data, Evaluation, Space, State, Task
from ..evaluators.objectives import Constraint, check_metric, parse_constraint
from ..evaluators.pipeline import describe_error
from ..evaluators.scalar import Scalar
from ..hardware.targets import make_backend
from ..spaces.stock import uniform_cut
from ..studies.point import make_folder
from ..studies.report import write_reports
from ..studies.rows import metrics_as_json
from ..studies.study import Study
from .config import SearchConfig, make_config, save_config
from .engine import Engine
from .executors import Evaluate, InlineExecutor
from .folder import Cleaner, only_driver
from .run import Silent, _as_task, _check_space, _name_of, _with_baseline, make_space
from .samplers import VIOLATIONS
from .several import Part, joint_evaluator, joint_study, make_parts, scalar_of, shared_capabilities
from .transfer import fingerprint, save_fingerprint
from .verify import measure_front

if TYPE_CHECKING:
    import torch

OURS = ("rungs", "reduction", "sampler", "warm_start", "trials", "time", "workers", "resources", "executor", "address")


@dataclass
class TrialObjective:
    """A function of the trial for any Optuna study; see `as_objective`.

    Attributes:
        space: asks a trial for its choices; returns the plan.
        evaluate: turns a candidate into its evaluation; can be sent to other processes.
        untouched: the untouched model's evaluation.
        study: the results in the run folder, `autocompress.Study`.
        constraints: of the search.
        scalar: the one number that is maximised; None for all objectives.
    """

    space: Space
    evaluate: Evaluate
    untouched: Evaluation
    study: Study
    constraints: tuple[Constraint, ...]
    scalar: Scalar | None
    timeout: float
    _parts: Sequence[Part]
    _verify_time: float
    _held: ExitStack
    _known: dict[str, Evaluation] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._executor = InlineExecutor(self.evaluate, self.timeout)
        self._recorder = Engine(
            space=self.space,
            study=self.study,
            executor=self._executor,
            sampler=optuna.samplers.RandomSampler(),
            trials=0,
            score=self._score,
        )
        self._cleaners = {part.target: Cleaner(part.study, part.baselines) for part in self._parts}
        self._known[self.untouched.candidate.key] = self.untouched

    @property
    def directions(self) -> list[str]:
        """What `optuna.create_study(directions=...)` needs."""
        return ["maximize"] if self.scalar else self.study.directions

    @property
    def starts(self) -> list[dict[str, Any]]:
        """Parameters that a search should begin with; those of the untouched model first, in stock spaces."""
        return [dict(params) for params in getattr(self.space, "starts", [])]

    def enqueue(self, study: optuna.Study) -> None:
        """Let an Optuna study begin with `starts`."""
        for params in self.starts:
            study.enqueue_trial(params, skip_if_exists=True)

    def __call__(self, trial: BaseTrial) -> float | tuple[float, ...] | None:
        """Evaluate a trial's choices; None, which Optuna takes for a failure, where a figure is missing.

        Sets the user attributes summary, state, reason, metrics, violations and artifact, and Optuna's constraints. A
        plan that was evaluated before is answered from there.
        """
        try:
            plan = self.space(trial)
            check_plan(plan)
        except optuna.TrialPruned:
            raise
        except Exception as error:  # the space is the user's code: a failing one is a failed trial
            trial.set_user_attr("state", str(State.FAILED))
            trial.set_user_attr("reason", f"the space failed: {describe_error(error)}")
            return None
        with self._lock:
            candidate = Candidate(plan, dict(trial.params))
            if candidate.key not in self._known:
                self._executor.submit(candidate)
                (evaluation,) = self._executor.wait(0)
                self.record(evaluation, trial.distributions)
            evaluation = self._known[candidate.key]
        for name, value in attributes(evaluation).items():
            trial.set_user_attr(name, value)
        found = zip(self.violation_names, evaluation.violations, strict=False)
        self.tell_violations(trial, {name: violation for name, violation in found if violation is not None})
        return self.values(evaluation)

    def record(self, evaluation: Evaluation, distributions: Mapping[str, BaseDistribution]) -> None:
        """Write an evaluation into the run folder, once; files of what others beat are deleted."""
        if evaluation.candidate.key in self._known:
            return
        evaluation = self._recorder.record(evaluation, distributions)
        self._known[evaluation.candidate.key] = evaluation
        for target, result in (evaluation.parts or {self._parts[0].target: evaluation}).items():
            self._cleaners[target].add(result)

    def values(self, evaluation: Evaluation) -> float | tuple[float, ...] | None:
        """What an Optuna study is told; None for a failure."""
        values = self.study.known_values(evaluation)
        if values is None:
            return None
        if self.scalar is not None:
            return self._score(evaluation.measurements)
        return values[0] if len(values) == 1 else tuple(values)

    @property
    def violation_names(self) -> list[str]:
        """What the violations of an evaluation belong to: the constraints, of each target in turn."""
        targets = [f" on {target}" for target in self.study.parts] or [""]
        return [f"{constraint.text}{target}" for target in targets for constraint in self.constraints]

    @staticmethod
    def tell_violations(trial: BaseTrial, violations: Mapping[str, float]) -> None:
        """Let Optuna know how far constraints are violated (above 0) or kept."""
        trial.set_user_attr(VIOLATIONS, list(violations.values()))
        for name, violation in violations.items():
            if hasattr(trial, "set_constraint"):  # Optuna 5; before, samplers ask `constraints_func`
                trial.set_constraint(name, violation)

    @staticmethod
    def constraints_func(trial: FrozenTrial) -> Sequence[float]:
        """For the samplers of Optuna 4, which ask for a `constraints_func`."""
        return trial.user_attrs.get(VIOLATIONS, ())

    def finish(self) -> Study:
        """Measure the front again on the test split, write the reports, and let go of the run folder."""
        for part in self._parts:
            measure_front(part.evaluator, part.study, Silent(), self._verify_time)
        for found in [*self.study.parts.values(), self.study]:
            write_reports(found)
        shutil.rmtree(self.study.folder / "cache", ignore_errors=True)  # trained weights; nobody will share them now
        self._held.close()
        return self.study

    def _score(self, metrics: Any) -> float | None:
        return self.scalar(metrics, self.untouched.measurements) if self.scalar else None


def attributes(evaluation: Evaluation) -> dict[str, Any]:
    """What is noted with a trial, JSON."""
    return {
        "summary": describe_plan(evaluation.candidate.plan),
        "state": str(evaluation.state),
        "reason": evaluation.reason,
        "metrics": metrics_as_json(evaluation.measurements),
        "artifact": str(evaluation.artifact.path) if evaluation.artifact else "",
    }


def as_objective(
    model: str | torch.nn.Module | Task = "digits-cnn",
    data: str | Data = "digits",
    space: str | Space = "auto",
    *,
    target: str | Sequence[str] = "x86/openvino",
    objectives: Sequence[str] = ("accuracy", "latency", "size"),
    constraints: Sequence[str] = (),
    out: str | Path,
    **settings: Any,
) -> TrialObjective:
    """A function of the trial that any Optuna study can optimise, with the untouched model evaluated.

        objective = as_objective("digits-cnn", "digits", objectives=["accuracy", "latency"], out="runs/mine")
        study = optuna.create_study(directions=objective.directions)
        objective.enqueue(study)
        study.optimize(objective, n_trials=20)
        objective.finish().best(latency="<=50%").export("bundle")

    Trials run one at a time in this process; failed ones tell the reason in their user attribute "reason".

    Args:
        model, data, space, target, objectives, constraints: as for `run_search`.
        out: run folder; must not hold another run.
        settings: other fields of `SearchConfig`, but for those that are Optuna's business here, such as trials and
            sampler.

    Raises:
        InputError: anything that can't be used.
        CandidateError: the untouched model does not run on the target.
    """
    theirs = sorted(set(OURS) & set(settings))
    if theirs:
        raise InputError(f"as_objective: {', '.join(theirs)} can't be set here: the study that calls it decides")
    folder = Path(out).resolve()  # other processes may work in another folder
    if (folder / "config.yaml").exists():
        raise InputError(f"{folder} holds a run already: name another folder as out")
    targets = target if isinstance(target, str) else list(target)
    given = {"target": targets, "objectives": list(objectives), "constraints": list(constraints), "out": str(folder)}
    for name, value in (("model", model), ("data", data), ("space", space)):
        given[name] = value if isinstance(value, str) else _name_of(value)
    config = make_config({**given, **settings}, source="as_objective")
    limits = tuple(parse_constraint(text) for text in config.constraints)
    scalar = scalar_of(config)
    backends = [make_backend(name, config.threads) for name in config.targets]
    for backend in backends:
        for limit in limits:
            check_metric(limit.name, backend)
    task = _as_task(model, data, config)
    capabilities = shared_capabilities(backends)
    made = make_space(config, task, capabilities) if isinstance(space, str) else space
    _check_space(made, optuna.samplers.RandomSampler(seed=config.seed))
    held = ExitStack()
    try:
        make_folder(folder)
        held.enter_context(only_driver(folder))
        cut = uniform_cut(task, config.finetune_steps, config.seed)
        parts = make_parts(config, folder, task, backends, limits, cut)
        study = joint_study(config, folder, parts)
        parts = [
            dataclasses.replace(part, evaluator=_with_baseline(part, limits, config.trial_timeout)) for part in parts
        ]
        evaluate = joint_evaluator(parts, capabilities, study)
        record = next(record for record in study.records() if record.baseline == "untouched")
        untouched = Evaluation(
            Candidate(()), record.state, record.metrics, record.reason, record.violations, record.artifact
        )
        own = fingerprint(task)
        places: list[tuple[SearchConfig, Path]] = [(p.config, p.study.folder) for p in parts if study.parts]
        for own_config, place in [*places, (config, folder)]:
            with written_whole(place) as new:
                save_config(own_config, new)
                save_fingerprint(own, new)
        return TrialObjective(
            made, evaluate, untouched, study, limits, scalar, config.trial_timeout, parts, config.verify_time, held
        )
    except (AutocompressError, KeyboardInterrupt):
        held.close()
        raise
