"""Tables of operators' times, made by running networks of a space on the target.

How an operator is timed. What it costs depends on where it runs: the runtime fuses it with its neighbours, changes the
layout of its input, finds it in the caches or not. So whole networks are run under the runtime's own profiler (see
`operator_times`), and each operator gets what the nodes that it became took there. The other way, chains of 2 and of 10
copies without profiler, gives the same for 3x3 convolutions of ResNet-20, within 6 % (ONNX Runtime) and 15 % (OpenVINO)
for all above 10 us. But chains exist for operators alone that keep the shape, and the latency of 30 networks that were
not profiled was met less well with them (mean error with chains for these convolutions 1.4 and 4.1 %, without 1.2 and
2.9 %; 1 thread, `benchmarks/lookup_error.py`).

Machines wander, by a factor of two on virtual ones. So everything is timed in turns with the untouched network and kept
as a share of its latency; seconds are that share of the median over all files. That does not help where a second thread
is a help at one time and a hindrance at another, as on busy virtual cores: tables are best made with one thread there.

Candidates should come from the space that will be searched. What it costs to go from one format to another counts for
the operators on either side: a table of candidates with one format for each stage put networks that mix them layer by
layer 14 % too low (8 ResNet-20 candidates, ONNX Runtime); one made from 33 such candidates was off by 1.6 %.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import lsq_linear
from scipy.stats import spearmanr
from scipy.stats import t as student

from ..compression.quantization import Quantize
from ..core.codec import plan_key
from ..core.errors import CandidateError, InputError
from ..core.types import Artifact, Backend, Measurement, Operator, Plan, Space, Task
from .files import read_file
from .lookup import LookupTable, Row, read_table
from .operator_files import Alone, check_profiled, source_of, times_alone
from .operator_times import OperatorTimes, operator_times
from .operators import OperatorCall, read_operators
from .x86 import CpuBackend

if TYPE_CHECKING:
    from torch import nn

Progress = Callable[[int, int, str], None]
DRAWS = 20  # candidates drawn for each one that is wanted, before a space counts as exhausted
CALIBRATED = 32  # images that candidates are calibrated on: how large the rounded values are changes no latency
RIDGE = 0.02  # how much scale 1 and no overhead are believed in, as a share of the mean latency


class RandomChoices:
    """Answers a space's questions at random."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """Uniform over the steps."""
        return low + step * int(self._rng.integers((high - low) // step + 1))

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """Uniform over the steps, or over the range (its logarithm where asked)."""
        if step:
            return low + step * int(self._rng.integers(round((high - low) / step) + 1))
        if log:
            return float(np.exp(self._rng.uniform(np.log(low), np.log(high))))
        return float(self._rng.uniform(low, high))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Any of them."""
        return choices[int(self._rng.integers(len(choices)))]


def draw_plans(space: Space, count: int, seed: int) -> Iterator[Plan]:
    """Different plans of a space at random; fewer than `count` where the space has no more."""
    chooser = RandomChoices(seed)
    seen: set[str] = set()
    for _ in range(DRAWS * count):
        plan = space(chooser)
        if (key := plan_key(plan)) not in seen and len(seen) < count:
            seen.add(key)
            yield plan


def build_untrained(plan: Plan, task: Task, backend: Backend, folder: Path) -> Artifact:
    """The file of a plan without its training and with the quickest calibration: latency depends on neither.

    Args:
        folder: gets a folder with the file; one that is there already is taken.
    """
    place = folder / plan_key(plan)
    path = place / "model.onnx"
    if path.is_file():
        return read_file(path, backend.name)[0]
    model: nn.Module = task.build()
    for step in plan:
        prepare = getattr(step, "prepare", None)
        if prepare is not None:
            model = prepare(model, task)
        elif not step.retrains:
            model = _quick(step)(model, task)
    # Written elsewhere and moved: a killed process must leave no half of a file.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        artifact = backend.build(model, task, Path(scratch))
        if artifact.path.suffix != path.suffix:
            raise InputError(f"profile: {backend.name} runs no ONNX files, which operators are read from")
        place.mkdir(parents=True, exist_ok=True)
        return dataclasses.replace(artifact, path=artifact.path.replace(path))


def _quick(step: Operator) -> Operator:
    """A step that rounds with the simplest calibration on few images; any other as it is."""
    if not isinstance(step, Quantize):
        return step
    return dataclasses.replace(step, calibrator="max", samples=min(step.samples, CALIBRATED))


@contextlib.contextmanager
def _folder(files: Path | None) -> Iterator[Path]:
    """The folder for built files: a passing one where none is given."""
    if files is not None:
        files.mkdir(parents=True, exist_ok=True)
        yield files
    else:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)


def profile_model(
    task: Task,
    backend: Backend,
    space: Space | Sequence[Plan],
    path: Path,
    *,
    samples: int = 60,
    seed: int = 0,
    files: Path | None = None,
    on_progress: Progress | None = None,
) -> LookupTable:
    """Time the operators of the untouched model and of candidates on the target; write the table to `path`.

    A table that is there already is continued: it is written anew after each file, and no file is run twice. Nor is one
    whose operators are all known.

    Args:
        space: candidates are drawn from it at random; or their plans.
        samples: candidates; ignored where plans are given.
        files: folder where the built files are kept, for a second call; None for none.
        on_progress: called with the number of files done, of all files, and what was found in the last one.

    Raises:
        InputError: no table can be made of the target, or the one there is of another target, machine or version.
        CandidateError: the untouched model can't be built or run.
    """
    check_profiled(backend)
    plans: list[Plan] = [()]
    plans += draw_plans(space, samples, seed) if callable(space) else [plan for plan in space if plan]
    alone: Alone = {}
    with _folder(files) as folder:
        reference = build_untrained((), task, backend, folder)
        table = _begin(path, backend, task, reference)
        for number, plan in enumerate(plans, 1):
            key = plan_key(plan)
            if key in table.details["files"]:
                continue
            try:
                artifact = build_untrained(plan, task, backend, folder)
                keys = table.as_keys(read_operators(artifact.path))
                fresh = [k for k in dict.fromkeys(keys) if k not in table.rows]
                times = _times(backend, artifact, task, reference, alone) if fresh else None
            except CandidateError as error:
                if not plan:
                    raise
                table, said = _with_file(table, key, str(error)), str(error)
            else:
                said = f"{len(fresh)} new operators" if fresh else "no new operators"
                table = _with_times(table, key, times) if times else _with_file(table, key, said)
            table.write(path)
            if on_progress is not None:
                on_progress(number, len(plans), said)
    return table


def table_error(
    path: Path,
    task: Task,
    backend: Backend,
    space: Space | Sequence[Plan],
    *,
    candidates: int = 30,
    seed: int = 1,
    files: Path | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare a table with whole networks that it was not made from, and write the result into the table.

    Each network is measured by `backend.measure` in turns with the untouched one. The latency that counts is its ratio
    to the untouched one's, times the median of the latter over all measurements (and over those of the table), so that
    slow spells of the machine cancel out; "raw" errors are those of the latencies as they were measured. What was
    measured is kept in the table: a second call goes on where the first was stopped.

    Args:
        space: candidates are drawn from it at random, or their plans; networks with the same operators as one that the
            table was made from are left out.
        files: as for `profile_model`.

    Returns:
        mape, spearman, coverage (share of latencies in their 95 % interval), candidates, and raw_mape, raw_spearman.

    Raises:
        InputError: no table, or fewer than 3 new candidates.
    """
    table = read_table(path)
    known = {tuple(network["rows"]) for network in table.details.get("networks", [])}
    numbers = {key: at for at, key in enumerate(table.rows)}
    held: dict[str, Any] = dict(table.details.get("held_out", {}))
    fresh = 0
    plans = draw_plans(space, 2 * candidates, seed) if callable(space) else iter(space)
    with _folder(files) as folder:
        reference = build_untrained((), task, backend, folder)
        for plan in plans:
            key = plan_key(plan)
            if fresh == candidates:
                break
            if key in held:
                fresh += "latency" in held[key]
                continue
            if not plan or key in table.details.get("files", {}):
                continue
            try:
                artifact = build_untrained(plan, task, backend, folder)
                calls = read_operators(artifact.path)
                rows = tuple(sorted(numbers.get(k, -1) for k in table.as_keys(calls)))
                if rows in known:
                    held[key] = {"left_out": "same operators as a network of the table"}
                else:
                    found = {m.name: m for m in backend.measure(artifact, task, reference)}
                    held[key] = _held_out(table, calls, found)
                    fresh += 1
            except CandidateError as error:
                held[key] = {"left_out": str(error)}
            table = dataclasses.replace(table, details={**table.details, "held_out": held})
            table.write(path)
            if on_progress is not None:
                on_progress(fresh, candidates, held[key].get("left_out", "measured"))
    figures = held_out_error(table)
    dataclasses.replace(table, details={**table.details, "error": figures}).write(path)
    return figures


def held_out_error(table: LookupTable) -> dict[str, Any]:
    """The figures of `table_error` from what the table keeps of its held-out networks."""
    held = [entry for entry in table.details.get("held_out", {}).values() if "latency" in entry]
    if len(held) < 3:
        raise InputError(f"candidates: expected at least 3 that the table was not made from, got {len(held)}")
    columns = {name: np.array([entry[name] for entry in held]) for name in ("latency", "reference", "looked_up")}
    # On the table's own pace: its seconds are shares of the untouched network's median latency while it was made.
    pace = table.details.get("reference") or statistics.median(columns["reference"])
    truth = columns["latency"] / columns["reference"] * pace
    looked_up = columns["looked_up"]
    ends = [(entry["low"], entry["high"]) for entry in held]
    inside = [low <= value <= high for value, (low, high) in zip(truth, ends, strict=True) if low is not None]
    return {
        "candidates": len(held),
        "mape": float(np.mean(np.abs(looked_up / truth - 1))),
        "spearman": float(spearmanr(looked_up, truth).statistic),
        "coverage": float(np.mean(inside)) if inside else None,
        "raw_mape": float(np.mean(np.abs(looked_up / columns["latency"] - 1))),
        "raw_spearman": float(spearmanr(looked_up, columns["latency"]).statistic),
    }


def _held_out(table: LookupTable, calls: Sequence[OperatorCall], found: dict[str, Measurement]) -> dict[str, Any]:
    seconds, low, high, flags = table.lookup(calls)
    return {
        "latency": found["latency"].value,
        "reference": found["reference_latency"].value,
        "looked_up": seconds,
        "low": low,
        "high": high,
        "flags": list(flags),
    }


def _times(backend: Backend, artifact: Artifact, task: Task, reference: Artifact, alone: Alone) -> OperatorTimes:
    if isinstance(backend, CpuBackend):
        return operator_times(backend, artifact, task, reference)
    return times_alone(backend, artifact, task, reference, alone)


def _begin(path: Path, backend: Backend, task: Task, reference: Artifact) -> LookupTable:
    """An empty table, or the one at `path` if it can be continued."""
    source, fingerprint = source_of(backend, task, reference)
    if not path.is_file():
        details = {
            "models": [task.name], "files": {}, "networks": [], "references": [], "method": str(source.method),
        }  # fmt: skip
        return LookupTable(
            backend.name, source.device, source.runtime, fingerprint, source.taken_at, {}, details=details
        )
    table = read_table(path)
    for what, here, there in (
        ("target", backend.name, table.target),
        ("machine", fingerprint, table.fingerprint),
        ("runtime", source.runtime, table.runtime),
        ("model", task.name, ", ".join(table.details.get("models", ()))),
    ):
        if here != there:
            raise InputError(f"{path} is of another {what} ({there}) than this one ({here}); name a new file")
    return table


def _with_file(table: LookupTable, key: str, said: str) -> LookupTable:
    return dataclasses.replace(table, details={**table.details, "files": {**table.details["files"], key: said}})


def _with_times(table: LookupTable, key: str, times: OperatorTimes) -> LookupTable:
    """The table with what one more file showed."""
    details = dict(table.details)
    details["files"] = {**details["files"], key: "profiled"}
    details["references"] = [*details["references"], times.reference]
    pace = statistics.median(details["references"])
    factor = pace / details.get("reference", pace)
    details["reference"] = pace
    # What was compared with an earlier state of the table says nothing of this one.
    details.pop("held_out", None)
    details.pop("error", None)
    rows = {name: _scaled(row, factor) for name, row in table.rows.items()}
    keys = table.as_keys(times.calls)
    for name in dict.fromkeys(keys):
        at = [number for number, other in enumerate(keys) if other == name]
        rows[name] = _with_observation(rows.get(name), times, at, pace)
    numbers = {name: at for at, name in enumerate(rows)}
    network = {"rows": sorted(numbers[name] for name in keys), "latency": times.latency}
    details["networks"] = [*details["networks"], network]
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return _fitted(dataclasses.replace(table, rows=rows, details=details, taken_at=now))


def _scaled(row: Row, factor: float) -> Row:
    return dataclasses.replace(row, seconds=row.seconds * factor, low=row.low * factor, high=row.high * factor)


def _with_observation(row: Row | None, times: OperatorTimes, at: Sequence[int], pace: float) -> Row:
    """A row with the mean over the same operators of one file."""

    def mean(values: Sequence[float]) -> float:
        return statistics.fmean(values[number] for number in at)

    samples, nodes = times.samples * len(at), mean(times.nodes)
    if row is None:
        low, middle, high = (mean(values) * pace for values in (times.lows, times.shares, times.highs))
        return Row(middle, min(low, middle), max(high, middle), samples, nodes, (mean(times.shares),))
    observations = (*row.observations, mean(times.shares))
    count = len(observations)
    middle = statistics.median(observations) * pace
    half = student.ppf(0.975, count - 1) * statistics.stdev(observations) / count**0.5 * pace
    nodes = (row.nodes * (count - 1) + nodes) / count
    return Row(middle, max(0.0, middle - half), middle + half, row.samples + samples, nodes, observations)


def _fitted(table: LookupTable) -> LookupTable:
    """The table with scale, dispatch, overhead and spread as its whole networks show them."""
    networks = table.details["networks"]
    pace = table.details["reference"]
    rows = list(table.rows.values())
    latencies = np.array([network["latency"] * pace for network in networks])
    sums = np.array(
        [
            [sum(rows[at].seconds for at in network["rows"]), sum(rows[at].nodes for at in network["rows"]), 1.0]
            for network in networks
        ]
    )
    sizes = sums.mean(0) / latencies.mean()
    believed = np.diag([RIDGE, RIDGE, RIDGE])
    known = np.array([RIDGE * sizes[0], 0.0, 0.0])
    left = np.concatenate([sums / sizes / latencies[:, None], believed])
    right = np.concatenate([np.ones(len(networks)), known])
    # What the profiler adds for each node is negative here; an overhead can't be.
    found = lsq_linear(left, right, ([0, -np.inf, 0], np.inf)).x / sizes
    misses = sums @ found / latencies - 1
    free = max(1, len(networks) - len(found))
    spread = 2 * float(np.sqrt(np.square(misses).sum() / free)) if len(networks) > len(found) else None
    return dataclasses.replace(
        table, scale=float(found[0]), dispatch=float(found[1]), overhead=float(found[2]), spread=spread
    )
