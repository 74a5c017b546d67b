"""The compiling process: an ONNX file through XLA for a TPU that need not be here, or timed on a device that is.

A process of its own keeps the compiler's memory (1.5 GB) and its crashes away from the search, and lets each choose its
devices. Run as `python -m autocompress.hardware.xla_compile` with the request as JSON on standard input.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import sys
import time
from typing import Any

from ..core.errors import CandidateError

# No TPU is looked for on this host or by its cloud's metadata; several processes may load libtpu at once.
AHEAD_OF_TIME = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
ROUNDS = 10  # candidate and reference take turns this often, so that drift shows


def main() -> None:
    """Read the request, compile or time, print the answer; {"error": reason} for files that can't be compiled."""
    # Die with the worker that asked (PR_SET_PDEATHSIG), so that a killed search leaves nothing running.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    request = json.load(sys.stdin)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the errors
    platform = request.get("platform", "")
    os.environ.update({"JAX_PLATFORMS": platform} if platform else AHEAD_OF_TIME)
    import jax

    try:
        answer = time_on_device(request) if platform else compile_ahead(request)
    except (CandidateError, jax.errors.JaxRuntimeError) as error:
        answer = {"error": (str(error).strip().splitlines() or ["no message"])[0][:300]}
    json.dump(answer, answers)
    answers.flush()


def compile_ahead(request: dict[str, Any]) -> dict[str, Any]:
    """What the compiler expects of one batch: cycles, bytes to and from the chip's memory, bytes that lie there.

    The cycles are those that the compiler notes down for each operation of the schedule. Results that a kernel leaves
    for another in the chip's memory are written and read, so they count twice.
    """
    import jax
    from jax.experimental import topologies

    settings = {"chip_config_name": request["config"]} if request["config"] else {}
    described = topologies.get_topology_desc(platform="tpu", topology_name=request["topology"], **settings)
    device: Any = described.devices[0]
    model = _load(request["path"], request)
    sharding = jax.sharding.SingleDeviceSharding(device)

    def placed(value: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)

    weights = {name: placed(value) for name, value in model.weights.items()}
    compiled: Any = jax.jit(model.function).lower(weights, placed(model.inputs)).compile()
    schedule = compiled.as_text().split("\nENTRY", 1)[1]
    cycles = [int(count) for count in re.findall(r'"estimated_cycles":"(\d+)"', schedule)]
    if not cycles:
        raise CandidateError("the compiler gives no estimate of cycles; expected jax 0.10 with its libtpu")
    sizes = compiled.memory_analysis()
    held = sizes.argument_size_in_bytes + sizes.output_size_in_bytes
    return {
        "kind": device.device_kind,
        "cycles": sum(cycles),
        "traffic": held + 2 * sizes.temp_size_in_bytes,
        "memory": held + sizes.temp_size_in_bytes + sizes.generated_code_size_in_bytes,
        "integer_layers": len(model.integer_layers),
        "loops": schedule.count(" while("),
    }


def time_on_device(request: dict[str, Any]) -> dict[str, Any]:
    """Seconds of single runs on the first device of the platform, after warming up; none where it is of another kind.

    Inputs lie on the device already; a run lasts until its result is ready, so that the host's part is in it.
    """
    import jax
    import numpy as np

    device = jax.devices(request["platform"])[0]
    answer: dict[str, Any] = {"kind": device.device_kind, "latency": [], "reference": [], "batches": [], "memory": None}
    if request["kind"] not in ("", device.device_kind):
        return answer
    runs = {}
    for name, key, batch in (
        ("latency", "path", 1),
        ("reference", "reference", 1),
        ("batches", "path", request["batch"]),
    ):
        if request[key] and batch:
            model = _load(request[key], {**request, "batch": batch})
            inputs = np.zeros(model.inputs.shape, np.int32)
            if model.inputs.dtype != np.int32:
                inputs = np.random.default_rng(0).standard_normal(model.inputs.shape).astype(model.inputs.dtype)
            weights, inputs = jax.device_put((model.weights, inputs), device)
            compiled = jax.jit(model.function).lower(weights, inputs).compile()
            runs[name] = (compiled, weights, inputs)
    sizes = runs["latency"][0].memory_analysis()
    if sizes is not None:
        answer["memory"] = sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes
    for run in runs.values():
        for _ in range(5):
            _seconds(run)
    for _ in range(ROUNDS):
        for name, run in runs.items():
            answer[name] += [_seconds(run) for _ in range(-(-request["repeats"] // ROUNDS))]
    return answer


def _load(path: str, request: dict[str, Any]) -> Any:
    import onnx

    from .onnx_to_jax import convert

    shape = (request["batch"], *request["input_shape"])
    return convert(onnx.load(path), shape, request["floats"], integers=request["integers"])


def _seconds(run: Any) -> float:
    import jax

    function, weights, inputs = run
    start = time.perf_counter()
    jax.block_until_ready(function(weights, inputs))
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
