"""How long each operator of one file takes, as the target's runtime itself counts it."""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from ..core.errors import CandidateError
from ..core.lane import LANE
from ..core.types import Artifact, Task
from .device import has_bf16
from .operators import OperatorCall, fuse, steps_in_graph
from .statistics import median_interval
from .x86 import CpuBackend

ROUNDS = {"onnxruntime": 8, "openvino": 6}
RUNS = {"onnxruntime": 25, "openvino": 150}
# What runtimes append to the names of the nodes that they replace.
_APPENDED = re.compile(r"(_token_\d+|_nchwc|_nhwc|/WithoutBiases.*|/DequantizationMultiply|/sink_port_\d+)+$")


@dataclass(frozen=True)
class OperatorTimes:
    """The operators of a file in order, with their times.

    Attributes:
        shares: seconds of each operator, those of conversions that it needs included, divided by the latency of the
            reference, timed in the same turns; 0 where the runtime runs it as part of another or not at all.
        lows, highs: 95 % intervals of the shares, from the turns.
        nodes: how many nodes the runtime runs for each operator.
        latency: of the whole file, without profiler, as a share too.
        reference: latency of the reference meanwhile, in seconds.
        samples: timed runs behind each share.
    """

    calls: tuple[OperatorCall, ...]
    shares: tuple[float, ...]
    lows: tuple[float, ...]
    highs: tuple[float, ...]
    nodes: tuple[int, ...]
    latency: float
    reference: float
    samples: int


def operator_times(backend: CpuBackend, artifact: Artifact, task: Task, reference: Artifact) -> OperatorTimes:
    """Profile one file with the runtime of `backend`, in turns with `reference`.

    Raises:
        CandidateError: the runtime can't run or profile the file.
    """
    proto = onnx.load(str(artifact.path), load_external_data=False)
    # The runtimes name what they run after the nodes that it came from; exported files name none.
    for node in proto.graph.node:
        node.name = node.output[0]
    runtime = backend.runtime
    with tempfile.TemporaryDirectory() as folder:
        named = Path(folder) / "named.onnx"
        named.write_bytes(proto.SerializeToString())
        request = {
            "runtime": runtime,
            "path": str(named),
            "bf16": runs_in_bf16(runtime, artifact),
            "reference": str(reference.path),
            "reference_bf16": runs_in_bf16(runtime, reference),
            "cores": backend.cores,
            "input_shape": list(task.data.input_shape),
            "vocabulary": task.data.vocabulary,
            "rounds": ROUNDS[runtime],
            "runs": RUNS[runtime],
        }
        with LANE.exclusive():
            answer = _ask(request, backend.limit)
    calls, owners = operators_and_owners(proto)
    executed = answer["nodes"]
    owned = {name: _owner(name, executed, owners) for name in executed}
    rounds = []
    for turn in answer["rounds"]:
        totals = [0.0] * len(calls)
        for name, seconds in turn["nodes"].items():
            at = owned.get(name)
            # What belongs to no operator (copying the input, say) is part of the overhead of a whole run.
            if at is not None:
                totals[at] += seconds
        rounds.append([seconds / turn["reference"] for seconds in totals])
    middles = [median_interval(column) for column in zip(*rounds, strict=True)]
    run = [owned.get(name) for name in answer["rounds"][0]["nodes"]]
    return OperatorTimes(
        calls,
        tuple(share for share, _ in middles),
        tuple(low for _, (low, _) in middles),
        tuple(high for _, (_, high) in middles),
        tuple(run.count(at) for at in range(len(calls))),
        statistics.median(turn["latency"] / turn["reference"] for turn in answer["rounds"]),
        statistics.median(turn["reference"] for turn in answer["rounds"]),
        ROUNDS[runtime] * RUNS[runtime],
    )


def runs_in_bf16(runtime: str, artifact: Artifact) -> bool:
    """Whether a runtime computes a file's floating point in bfloat16: one layer in 16 bits is enough."""
    halves = any(formats["weight"] in (16, "bf16") for formats in artifact.bits.values())
    return runtime == "openvino" and halves and has_bf16()


def _ask(request: dict[str, Any], limit: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "autocompress.hardware.operator_probe"]
    what = f"profiling the operators with {request['runtime']}"
    try:
        done = subprocess.run(
            command,
            input=json.dumps(request),
            capture_output=True,
            timeout=limit,
            check=False,
            encoding="utf-8",
            errors="replace",
        )
    except subprocess.TimeoutExpired as error:
        raise CandidateError(f"{what} hung for {limit:.0f} s") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise CandidateError(f"{what} failed: {lines[-1][:300]}")
    return json.loads(done.stdout)


def operators_and_owners(proto: onnx.ModelProto) -> tuple[tuple[OperatorCall, ...], dict[str, int]]:
    """The operators of a graph, and for the name of each node (that of its first output) the operator it counts for.

    Rounding counts for what makes the value; bringing rounded values and weights back, for what takes them.
    """
    steps, results = steps_in_graph(proto)
    numbered = [
        dataclasses.replace(step, call=dataclasses.replace(step.call, name=str(at))) for at, step in enumerate(steps)
    ]
    fused = fuse(numbered, results)
    kept = {int(call.name): at for at, call in enumerate(fused)}
    calls = tuple(dataclasses.replace(call, name=steps[int(call.name)].call.name) for call in fused)
    owners: dict[str, int] = {}
    for at, step in enumerate(steps):
        owners[step.output] = kept[at] if at in kept else owners[step.inputs[0]]
    nodes = list(proto.graph.node)
    for node in nodes:
        if node.op_type == "QuantizeLinear" and node.output[0] not in owners and node.input[0] in owners:
            owners[node.output[0]] = owners[node.input[0]]
    for node in reversed(nodes):
        if node.output[0] in owners:
            for value in node.input:
                owners.setdefault(value, owners[node.output[0]])
    return calls, owners


def _owner(name: str, executed: Mapping[str, Mapping[str, Any]], owners: Mapping[str, int]) -> int | None:
    """The operator that an executed node counts for; for nodes that the runtime added, that of what they follow."""
    found = _known([name], owners)
    merged = _known(executed[name]["stands_for"], owners)
    if merged is not None:
        return merged
    if found is not None:
        return found
    for before in executed[name]["from"]:
        if before in executed and (at := _known([before, *executed[before]["stands_for"]], owners)) is not None:
            return at
    for after, node in executed.items():
        if name in node["from"] and (at := _known([after, *node["stands_for"]], owners)) is not None:
            return at
    return None


def _known(names: Sequence[str], owners: Mapping[str, int]) -> int | None:
    """The operator of the first name that one has."""
    for name in names:
        for known in (name, _APPENDED.sub("", name)):
            if known in owners:
                return owners[known]
    return None
