"""From settings to a finished run folder: check everything, search, measure the front again, report."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import math
import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import optuna
import torch
from optuna.samplers import BaseSampler

from ..compression.analysis import sensitivity
from ..core.codec import check_plan
from ..core.disk import StorageLostError, blaming_storage, written_whole
from ..core.errors import AutocompressError, CandidateError, DeviceLostError, InputError
from ..core.registry import OBJECTIVES, SPACES
from ..core.types import Candidate, Capabilities, Data, Evaluation, Space, State, Task
from ..evaluators.objectives import (
    Constraint,
    check_constraints,
    check_metric,
    parse_constraint,
    parse_objectives,
)
from ..evaluators.pipeline import Evaluator, baseline_plans
from ..hardware.targets import make_backend
from ..spaces.stock import uniform_cut
from ..studies.point import make_folder
from ..studies.report import write_reports
from ..studies.study import Record, Study
from .cluster import check_address
from .config import SearchConfig, load_config, make_config, save_config
from .engine import Engine, Progress
from .executors import Executor, InlineExecutor, make_ray_executor
from .folder import Cleaner, only_driver
from .rungs import shares_of, with_restarts
from .samplers import ONE_NUMBER, make_sampler
from .several import Part, SeveralTargets, joint_evaluator, joint_study, make_parts, scalar_of, shared_capabilities
from .sharing import Exchange, travelling
from .store import Store, open_store
from .transfer import earlier_files, fingerprint, open_earlier, save_fingerprint, warm_start
from .verify import measure_front


class Watcher(Protocol):
    """Who shows a running search; every method may do nothing."""

    def started(self, study: Study, config: SearchConfig, task: Task, baseline: Record) -> None: ...

    def changed(self, progress: Progress, evaluation: Evaluation | None) -> None: ...

    def measuring(self, done: int, total: int) -> None: ...

    def settling(self, doubtful: int, left: float) -> None: ...

    def settled(self, points: int, times: int, doubtful: int) -> None: ...

    def note(self, text: str) -> None: ...

    def trouble(self, text: str) -> None: ...

    def ended(self, study: Study, progress: Progress) -> None: ...


class Silent:
    """A watcher that shows nothing."""

    def started(self, study: Study, config: SearchConfig, task: Task, baseline: Record) -> None:
        """Ignore."""

    def changed(self, progress: Progress, evaluation: Evaluation | None) -> None:
        """Ignore."""

    def measuring(self, done: int, total: int) -> None:
        """Ignore."""

    def settling(self, doubtful: int, left: float) -> None:
        """Ignore."""

    def settled(self, points: int, times: int, doubtful: int) -> None:
        """Ignore."""

    def note(self, text: str) -> None:
        """Ignore."""

    def trouble(self, text: str) -> None:
        """Ignore."""

    def ended(self, study: Study, progress: Progress) -> None:
        """Ignore."""


def run_search(
    model: str | torch.nn.Module | Task = "digits-cnn",
    data: str | Data = "digits",
    space: str | Space = "auto",
    *,
    target: str | Sequence[str] = "x86/openvino",
    objectives: Sequence[str] = ("accuracy", "latency", "size"),
    constraints: Sequence[str] = (),
    trials: int = 40,
    out: str | Path = "",
    **settings: Any,
) -> Study:
    """Search for the Pareto front of compressed variants of a model, measured on a target.

    Args:
        model: a name (see `SearchConfig.model`), a trained module that takes the data's images, or a `Task`.
        data: a name (see `SearchConfig.data`) or a `Data`; ignored where `model` is a `Task`.
        space: "auto", "prune", "quantize", or a function of the trial that returns a plan.
        target: device and runtime; several make one search with a front for each (see `Study.parts`).
        out: run folder; must not hold another run. "" makes one under runs/.
        settings: any other field of `SearchConfig`, e.g. workers=2, seed=1, executor="inline".

    Raises:
        InputError: anything that can't be used, before compute is spent on it.
        DeviceLostError: the target went away, or the disk is full, or the study's database is locked; once that is
            put right, `resume_search` goes on.
    """
    targets = target if isinstance(target, str) else list(target)
    given = {"target": targets, "objectives": list(objectives), "constraints": list(constraints), "trials": trials}
    given |= {"out": str(out), **settings}
    for name, value in (("model", model), ("data", data), ("space", space)):
        given[name] = value if isinstance(value, str) else _name_of(value)
    config = make_config(given, source="run_search")
    task = _as_task(model, data, config)
    return start_search(config, task=task, space=None if isinstance(space, str) else space)


def start_search(
    config: SearchConfig, *, task: Task | None = None, space: Space | None = None, watcher: Watcher | None = None
) -> Study:
    """Run the search that `config` describes; `task` and `space` stand in for the names in it."""
    folder = Path(config.out or _new_folder())
    if (folder / "config.yaml").exists():
        raise InputError(f"{folder} holds a run already: --resume {folder} goes on with it, --out starts another")
    if config.storage is None:
        for left in folder.glob("study.db*"):
            left.unlink()  # of a search that was refused before its first trial
    config = config.model_copy(update={"out": str(folder)})
    with blaming_storage(folder):
        return _run(config, folder, task, space, watcher or Silent())


def resume_search(
    folder: Path,
    config: SearchConfig,
    *,
    task: Task | None = None,
    space: Space | None = None,
    watcher: Watcher | None = None,
) -> Study:
    """Go on with the run in `folder` until `config.trials` trials are recorded in all."""
    with blaming_storage(folder):
        return _run(config, folder, task, space, watcher or Silent())


def _run(config: SearchConfig, folder: Path, task: Task | None, space: Space | None, watcher: Watcher) -> Study:
    if config.executor == "ray":
        check_address(config.address)
    backends = [make_backend(target, config.threads) for target in config.targets]
    constraints = tuple(parse_constraint(text) for text in config.constraints)
    for backend in backends:
        parse_objectives(config.objectives, backend)
        for constraint in constraints:
            check_metric(constraint.name, backend)
    for constraint in constraints:
        if OBJECTIVES.get(constraint.name).function is not None and constraint.name not in config.objectives:
            raise InputError(f"constraint '{constraint.text}': name {constraint.name} among the objectives as well")
    sampler = make_sampler(config.sampler, seed=0, trials=config.trials, constrained=bool(constraints))
    scalar = scalar_of(config)
    if config.sampler in ONE_NUMBER and len(config.objectives) > 1 and scalar is None:
        raise InputError(
            f"sampler {config.sampler} learns from one number: name one objective, or make one number of several with "
            "--scalarize 'accuracy * (latency/50%)^-0.1'"
        )
    saved = folder / "config.yaml"
    started_with = load_config(saved).get("warm_start", []) if saved.exists() else []
    runs, gone = open_earlier(config.warm_start, folder, started_with)
    capabilities = shared_capabilities(backends)
    if task is None:
        from ..tasks.models import load_task

        task = load_task(config.model, config.data, config.weights, config.image_size, config.seed)
    space = _check_space(space or make_space(config, task, capabilities), sampler)
    warm = warm_start(config, runs, space, scalar)
    store = open_store(config.shared, fingerprint(task)) if config.shared else None
    exchange = Exchange(store) if store is not None and config.storage is not None else None
    make_folder(folder)
    for text in gone:
        watcher.trouble(text)
    with only_driver(folder):
        shares = shares_of(config.rungs, config.reduction)
        cut = with_restarts(uniform_cut(task, config.finetune_steps, config.seed), shares)
        parts = make_parts(config, folder, task, backends, constraints, cut)
        own = fingerprint(task)
        files = {part.target: earlier_files(runs, own, part.evaluator.backend.name) for part in parts}
        study = joint_study(config, folder, parts)
        earlier = len(study.stored())
        before = time.monotonic()
        parts = [
            dataclasses.replace(
                part,
                evaluator=dataclasses.replace(
                    _with_baseline(part, constraints, config.trial_timeout), earlier=files[part.target]
                ),
            )
            for part in parts
        ]
        evaluate = joint_evaluator(parts, capabilities, study)
        # Only now: settings that were refused must leave the folder free for the right ones.
        targets = [(part.config, part.study.folder) for part in parts if study.parts]
        for settings, place in [*targets, (config, folder)]:
            with written_whole(place) as new:
                save_config(settings, new)
                save_fingerprint(own, new)
        limit = None if config.time is None else max(1.0, config.time - (time.monotonic() - before))
        cleaners = {part.target: Cleaner(part.study, part.baselines) for part in parts}

        def on_change(progress: Progress, evaluation: Evaluation | None) -> None:
            if evaluation is not None:
                for target, result in (evaluation.parts or {parts[0].target: evaluation}).items():
                    cleaners[target].add(result)
                    if exchange is not None:
                        exchange.give(cleaners[target].study, target, result)
            watcher.changed(progress, evaluation)

        untouched = next(record for record in study.records() if record.baseline == "untouched")
        if scalar is not None and scalar(untouched.metrics, untouched.metrics) is None:
            raise InputError(f"scalarize '{scalar.text}': it has no value for the untouched model; divide by a value")
        watcher.started(study, config, task, untouched)
        for text in warm.lines:
            watcher.note(text)
        engine = Engine(
            space=warm.space,
            study=study,
            executor=_make_executor(config, evaluate, folder, parts, store),
            # Another seed after an interruption: the same one would propose the same candidates again.
            sampler=make_sampler(
                config.sampler,
                seed=config.seed + earlier,
                trials=config.trials,
                constrained=bool(constraints),
                space=space,
                prior=warm.priors,
            ),
            trials=config.trials,
            seconds=limit,
            baselines=baseline_plans(capabilities, cut),
            score=None if scalar is None else partial(scalar, untouched=untouched.metrics),
            on_change=on_change,
            rungs=config.rungs,
            reduction=config.reduction,
        )
        stopped: DeviceLostError | InputError | None = None  # the latter of a cluster that can give no worker
        try:
            with blaming_storage(folder):
                if engine.run().ended != "interrupted":
                    for part in parts:
                        if exchange is not None:
                            exchange.take(part.study, part.target)
                        measure_front(part.evaluator, part.study, watcher, config.verify_time)
                    if config.rungs == 1 or engine.progress.ended != "time is up":  # else some may yet be trained on
                        shutil.rmtree(folder / "cache", ignore_errors=True)  # no candidate will share its weights now
        except KeyboardInterrupt:
            engine.progress.ended = "interrupted"
        except (DeviceLostError, InputError) as error:
            stopped = error
        try:
            with blaming_storage(folder):
                for found in [*study.parts.values(), study]:
                    write_reports(found)
        except StorageLostError as error:
            stopped = stopped or error
        watcher.ended(study, engine.progress)
        if isinstance(stopped, DeviceLostError):
            then = "once that is done" if isinstance(stopped, StorageLostError) else "once it is back"
            raise type(stopped)(f"{stopped}; nothing finished is lost: {then}, --resume {folder} goes on") from stopped
        if stopped is not None:
            raise stopped
    return study


def _with_baseline(part: Part, constraints: tuple[Constraint, ...], timeout: float) -> Evaluator:
    """Evaluate the untouched model first: limits are relative to it, and it must run at all."""
    evaluator, study = part.evaluator, part.study
    known = next((record for record in study.records() if record.baseline == "untouched"), None)
    if known is not None and known.artifact is not None and known.artifact.path.is_file():
        evaluation = Evaluation(Candidate(()), known.state, known.metrics, artifact=known.artifact)
        check_constraints(constraints, evaluation.measurements)
        return dataclasses.replace(evaluator, baseline=evaluation)
    executor = InlineExecutor(evaluator, timeout)
    executor.submit(Candidate(()))
    (evaluation,) = executor.wait(0)
    if evaluation.state is State.FAILED:
        raise CandidateError(f"the untouched model fails on {evaluator.backend.name}: {evaluation.reason}")
    found = evaluation.measurements
    for objective in evaluator.objectives:
        if objective.name not in found or not math.isfinite(found[objective.name].value):
            raise CandidateError(f"the untouched model has no {objective.name} on {evaluator.backend.name}")
    check_constraints(constraints, found)
    violations = tuple(c.violation(found, found) for c in constraints)
    broken = ", ".join(c.text for c, violation in zip(constraints, violations, strict=True) if violation > 0)
    if broken:
        evaluation = dataclasses.replace(
            evaluation, state=State.INFEASIBLE, reason=f"the untouched model breaks {broken}"
        )
    evaluation = dataclasses.replace(evaluation, violations=violations)
    if known is None:
        untouched = next(name for name, plan in part.baselines.items() if plan == ())
        study.write(dataclasses.replace(evaluation, baseline=untouched))
    return dataclasses.replace(evaluator, baseline=evaluation)


def make_space(config: SearchConfig, task: Task, capabilities: Capabilities) -> Space:
    """The space that `config` names: a stock one, or the user's function of the trial."""
    if ":" in config.space:
        from ..tasks.specs import import_object

        return import_object(config.space, kind="space")
    make = SPACES.get(config.space, "Own space: module.path:callable.")
    table = sensitivity(task) if config.sensitivity else ()
    return make(
        task,
        capabilities,
        granularity=config.granularity,
        bits=tuple(config.bits),
        finetune_steps=config.finetune_steps,
        sensitivity=table,
        seed=config.seed,
    )


def _check_space(space: Space, sampler: BaseSampler) -> Space:
    """Call the space once with the sampler's first choices, so that a mistake shows before compute is spent."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    trial = optuna.create_study(sampler=sampler).ask()
    try:
        plan = space(trial)
    except AutocompressError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise InputError(f"the space failed on {trial.params}: {type(error).__name__}: {error}") from error
    check_plan(plan)
    return space


def _make_executor(
    config: SearchConfig, evaluate: Evaluator | SeveralTargets, folder: Path, parts: list[Part], store: Store | None
) -> Executor:
    if config.executor == "inline" and store is None:
        return InlineExecutor(evaluate, config.trial_timeout)
    if store is None and config.address is None:
        return make_ray_executor(config, evaluate)
    there, receive = travelling(evaluate, folder, parts, store)
    if config.executor == "inline":
        return InlineExecutor(lambda candidate: receive(there(candidate)), config.trial_timeout)
    return make_ray_executor(config, there, receive)


def _as_task(model: str | torch.nn.Module | Task, data: str | Data, config: SearchConfig) -> Task:
    if isinstance(model, Task):
        return model
    from ..tasks.attention import open_attention
    from ..tasks.data import load_data
    from ..tasks.models import check_model, load_task, native_image_size

    if isinstance(model, str):
        return load_task(model, data, config.weights, config.image_size, config.seed)
    name = type(model).__name__
    loaded = load_data(data, config.image_size or native_image_size(name))
    task = Task(f"{name} on {loaded.name}", _Copies(open_attention(copy.deepcopy(model).cpu().eval())), loaded)
    check_model(task.build(), task)
    return task


@dataclasses.dataclass(frozen=True)
class _Copies:
    """Builds by copying a module that the user handed over."""

    module: torch.nn.Module

    def __call__(self) -> torch.nn.Module:
        return copy.deepcopy(self.module)


def _name_of(value: Any) -> str:
    return getattr(value, "__qualname__", None) or getattr(value, "name", None) or type(value).__name__


def _new_folder() -> Path:
    return Path("runs") / datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
