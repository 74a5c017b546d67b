"""MetaSchedule: schedules of a network's functions, sampled, timed on this machine, and kept.

TVM 0.27 has it for CPUs; its cost model needs the package xgboost-cpu.

Source: Shao et al., Tensor Program Optimization with Probabilistic Programs, NeurIPS 2022.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .tvm_compile import Request
from .tvm_schedule import scheduled

SEED = 0
AT_ONCE = 32  # schedules that are built and timed before the cost model learns from them
POPULATION = 64  # schedules that the cost model chooses from; TVM's own 512 take half a minute for each function


def apply_tuned(module: Any, target: Any, request: Request) -> Any:
    """Give each function of a network the fastest schedule that timing found, where one beats the untuned schedule.

    Functions that were timed on this machine with as many trials are not timed again; a tuning that was killed goes on
    from its records.

    Args:
        module: lowered and fused, without schedules.

    Returns:
        The module; functions that keep the untuned schedule (`tvm_schedule`) are still without one.
    """
    from tvm import relax
    from tvm.s_tir import meta_schedule as ms

    for logger in ("tvm", "tvm.s_tir.meta_schedule"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    folder = Path(request.records)
    folder.mkdir(parents=True, exist_ok=True)
    mend_records(folder)
    records = ms.database.JSONDatabase(work_dir=str(folder))
    tasks = list(ms.relax_integration.extract_tasks(module, target))
    _tune(tasks, target, records, request)
    chosen, untuned = ms.database.MemoryDatabase(), _read(folder)
    for task in tasks:
        (function,) = task.dispatched
        best = records.get_top_k(records.commit_workload(function), 1)
        beaten = untuned[_key(function)]["untuned"]
        if best and (beaten is None or _mean(best[0].run_secs) < beaten):
            chosen.commit_workload(function)
            chosen.commit_tuning_record(best[0])
    with chosen:
        return relax.transform.MetaScheduleApplyDatabase()(module)


def mend_records(folder: Path) -> None:
    """Drop what a killed tuning left half written, which TVM can't read: lines cut off, and records of no function."""
    names = ("database_workload.json", "database_tuning_record.json")
    workloads, records = (_entries(folder / name) for name in names)
    kept = {names[0]: workloads, names[1]: [(line, entry) for line, entry in records if entry[0] < len(workloads)]}
    for name, entries in kept.items():
        text = "".join(f"{line}\n" for line, _ in entries)
        if (folder / name).exists() and (folder / name).read_text() != text:
            (folder / name).write_text(text)


def _entries(path: Path) -> list[tuple[str, Any]]:
    """The lines of a file of JSON up to the first one that is none, with what they say."""
    found: list[tuple[str, Any]] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append((line, json.loads(line)))
        except json.JSONDecodeError:
            break
    return found


def _tune(tasks: Sequence[Any], target: Any, records: Any, request: Request) -> None:
    """Time what has not been timed, and note it in `functions.json`."""
    from tvm.s_tir import meta_schedule as ms

    folder, workers = Path(request.records), len(request.cores)
    known = _read(folder)
    pending = [task for task in tasks if _trials(known, task) < request.trials]
    if not pending:
        return
    builder = ms.builder.LocalBuilder(max_workers=workers, f_build=_build)
    runner = ms.runner.LocalRunner()
    contexts, weights = ms.relax_integration.extracted_tasks_to_tune_contexts(
        pending,
        request.records,
        strategy=ms.search_strategy.EvolutionarySearch(population_size=POPULATION, init_min_unmeasured=AT_ONCE),
        num_threads=workers,
        seed=SEED,
    )
    left = [request.trials - _recorded(records, task) for task in pending]
    if max(left) > 0:
        ms.tune.tune_tasks(
            tasks=contexts,
            task_weights=weights,
            work_dir=request.records,
            max_trials_global=sum(count for count in left if count > 0),
            max_trials_per_task=max(left),
            num_trials_per_iter=min(AT_ONCE, request.trials),
            builder=builder,
            runner=runner,
            database=records,
            cost_model=ms.cost_model.XGBModel(num_warmup_samples=AT_ONCE, num_tuning_cores=workers),
        )
    for task in pending:
        (function,) = task.dispatched
        seconds = _seconds(scheduled(function["main"]), target, builder, runner)
        known[_key(function)] = {"name": str(task.task_name), "trials": request.trials, "untuned": seconds}
    part = folder / f"functions.{os.getpid()}.part"
    part.write_text(json.dumps(known, indent=1))
    part.replace(folder / "functions.json")


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "functions.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _key(function: Any) -> str:
    import tvm_ffi

    return str(tvm_ffi.structural_hash(function))


def _trials(known: dict[str, Any], task: Any) -> int:
    (function,) = task.dispatched
    return known.get(_key(function), {"trials": 0})["trials"]


def _recorded(records: Any, task: Any) -> int:
    """How many schedules of a function were timed, and ran."""
    (function,) = task.dispatched
    return len(records.get_top_k(records.commit_workload(function), 1_000_000))


def _mean(seconds: Sequence[Any]) -> float:
    return statistics.fmean(float(value) for value in seconds)


def _seconds(function: Any, target: Any, builder: Any, runner: Any) -> float | None:
    """Time of a scheduled function, taken as the samples' times are; None where it can't be built or run."""
    from tvm import ir
    from tvm.s_tir import meta_schedule as ms

    module = ir.IRModule({"main": function.with_attr("global_symbol", "main")})
    (built,) = builder.build([ms.builder.BuilderInput(module, target)])
    if built.error_msg:
        return None
    arguments = ms.arg_info.ArgInfo.from_entry_func(module, remove_preproc=True)
    (future,) = runner.run([ms.runner.RunnerInput(str(built.artifact_path), "cpu", arguments)])
    seconds = future.result().run_secs
    return _mean(seconds) if seconds else None


def _build(module: Any, target: Any, _params: Any) -> Any:
    """As TVM's own, without its import of tensor intrinsics, which takes each new process twenty seconds."""
    from tvm.driver import build
    from tvm.s_tir.transform import RemoveWeightLayoutRewriteBlock

    return build(RemoveWeightLayoutRewriteBlock(skip_tensor_rewrite=True)(module), target=target)
