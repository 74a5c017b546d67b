"""The process that asks a runtime how long each operator of a file takes, and prints JSON.

Like `probe`, a process of its own that dies with the one that asked. Run as
`python -m autocompress.hardware.operator_probe` with the request as JSON on standard input.

The runtimes' own profilers count in whole microseconds. ONNX Runtime cuts every duration off, which loses half a
microsecond on average; OpenVINO cuts every duration and then their mean, which loses about one. That is added again.
OpenVINO's mean is over everything since the file was compiled, so each round compiles it anew.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CUT = {"onnxruntime": 0.5e-6, "openvino": 1e-6}
RUNS = 15  # of whole networks, before and after each turn of the profiler


def main() -> None:
    """Read the request, measure, print the answer."""
    # Die with the worker that asked (PR_SET_PDEATHSIG), so that a killed run leaves nothing running.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    request = json.load(sys.stdin)
    os.sched_setaffinity(0, request["cores"])
    json.dump(_measure(request), sys.stdout)


def _measure(request: dict[str, Any]) -> dict[str, Any]:
    import numpy as np

    from .runtimes import RUNTIMES

    rng, shape, tokens = np.random.default_rng(0), (1, *request["input_shape"]), request["vocabulary"]
    one = rng.integers(0, tokens, shape) if tokens else rng.standard_normal(shape).astype(np.float32)
    threads = len(request["cores"])
    open_file = RUNTIMES[request["runtime"]]
    whole = open_file(request["path"], 1, threads, request["bf16"])
    reference = open_file(request["reference"], 1, threads, request["reference_bf16"])
    for _ in range(2 * RUNS):
        whole(one)
        reference(one)

    def pace() -> tuple[float, float]:
        """Latency of the file and of the reference, just now."""
        found = []
        for run in (whole, reference):
            run(one)  # what ran before has had the caches
            found.append(statistics.median(_seconds(run, one) for _ in range(RUNS)))
        return found[0], found[1]

    profile = {"onnxruntime": _profile_onnxruntime, "openvino": _profile_openvino}[request["runtime"]]
    return profile(request, one, threads, pace)


def _profile_onnxruntime(request: dict[str, Any], one: Any, threads: int, pace: Any) -> dict[str, Any]:
    """One session; the reference takes turns with it, and durations are told apart by the number of the run."""
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        options.add_free_dimension_override_by_name("batch", 1)
        options.enable_profiling = True
        options.profile_file_prefix = f"{folder}/profile"
        options.optimized_model_filepath = f"{folder}/optimized.onnx"
        session = onnxruntime.InferenceSession(request["path"], options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        for _ in range(10):
            session.run(None, {name: one})
        paces = []
        for _ in range(request["rounds"]):
            before = pace()
            for _ in range(1 + request["runs"]):
                session.run(None, {name: one})
            paces.append(_mean(before, pace()))
        events = json.loads(Path(session.end_profiling()).read_text())
        graph = onnx.load(f"{folder}/optimized.onnx", load_external_data=False).graph
    durations: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            durations.setdefault(event["name"].removesuffix("_kernel_time"), []).append(event["dur"] * 1e-6)
    size = 1 + request["runs"]
    rounds = []
    for number, pair in enumerate(paces):
        start = 10 + number * size + 1  # the first run of a turn finds the reference's values in the caches
        chosen = {node: times[start : start + size - 1] for node, times in durations.items()}
        rounds.append(
            {
                **pair,
                "nodes": {node: _middle(times) + CUT["onnxruntime"] for node, times in chosen.items() if times},
            }
        )
    makers = {value: node.name for node in graph.node for value in node.output}
    nodes = {
        node.name: {
            "type": node.op_type,
            "from": [makers[value] for value in node.input if value in makers],
            "stands_for": [],
        }
        for node in graph.node
    }
    return {"rounds": rounds, "nodes": nodes}


def _profile_openvino(request: dict[str, Any], one: Any, threads: int, pace: Any) -> dict[str, Any]:
    import openvino

    core = openvino.Core()
    model = core.read_model(request["path"])
    shape = model.input(0).partial_shape
    shape[0] = 1
    model.reshape(shape)
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if request["bf16"] else "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERF_COUNT": True,
    }
    rounds: list[dict[str, Any]] = []
    nodes: dict[str, dict[str, Any]] = {}
    for _ in range(request["rounds"]):
        compiled = core.compile_model(model, "CPU", settings)
        infer = compiled.create_infer_request()
        before = pace()
        for _ in range(request["runs"]):
            infer.infer([one], share_inputs=True)
        found = {
            entry.node_name: entry.real_time.total_seconds() + CUT["openvino"]
            for entry in infer.profiling_info
            if entry.status == openvino.ProfilingInfo.Status.EXECUTED
        }
        rounds.append({**_mean(before, pace()), "nodes": found})
        if not nodes:
            for node in compiled.get_runtime_model().get_ordered_ops():
                info = node.get_rt_info()
                stands_for = info["originalLayersNames"].astype(str) if "originalLayersNames" in info else ""
                nodes[node.friendly_name] = {
                    "type": info["layerType"].astype(str) if "layerType" in info else "",
                    "from": [value.get_source_output().get_node().friendly_name for value in node.inputs()],
                    "stands_for": [name for name in stands_for.split(",") if name],
                }
    return {"rounds": rounds, "nodes": nodes}


def _mean(before: tuple[float, float], after: tuple[float, float]) -> dict[str, float]:
    return {"latency": (before[0] + after[0]) / 2, "reference": (before[1] + after[1]) / 2}


def _middle(times: list[float]) -> float:
    """Mean of the middle half: as robust as the median, and finer than the microsecond that the times come in."""
    ordered = sorted(times)
    quarter = len(ordered) // 4
    return statistics.fmean(ordered[quarter : len(ordered) - quarter])


def _seconds(run: Any, images: Any) -> float:
    start = time.perf_counter()
    run(images)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
