"""The measuring process of GPU targets: times one file in turns with another, reads the energy, and prints JSON.

Run as `python -m autocompress.hardware.gpu_probe` with the request as JSON on standard input.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import signal
import sys
from typing import Any

BATCH = 128  # of the throughput


def main() -> None:
    """Read the request, measure, print the answer."""
    # Die with the worker that asked (PR_SET_PDEATHSIG), so that a killed search leaves nothing running.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    request = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):  # libraries that greet must not mix into the answer
        answer = measure(request)
    json.dump(answer, sys.stdout)


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """What `gpu.GpuBackend` asks for; see `gpu_runtimes.open_session` for the request."""
    import numpy as np

    from .gpu_runtimes import open_session
    from .timing import time_runs

    rng, shape, tokens = np.random.default_rng(0), request["input_shape"], request["vocabulary"]
    count = request["batch"]
    inputs = (
        rng.integers(0, tokens, (count, *shape)) if tokens else rng.standard_normal((count, *shape)).astype(np.float32)
    )
    sessions = {"latency": open_session(request, request["path"], inputs[:1])}
    if request["reference"]:
        sessions["reference"] = open_session(request, request["reference"], inputs[:1])
    runs = {name: session.run for name, session in sessions.items()}
    timings = time_runs(runs, repeats=request["repeats"], budget=request["budget"], warm_up=request["warm_up"])
    many = open_session(request, request["path"], inputs)
    batches = time_runs({"batch": many.run}, rounds=5, repeats=5, budget=0.5, warm_up=0.1)
    answer = {
        "timings": dataclasses.asdict(timings),
        "batches": dataclasses.asdict(batches),
        "batch": count,
        "memory": _memory(request["device"]),
        "energy": None,
    }
    if request["device"].startswith("cuda"):
        with contextlib.suppress(ImportError):
            answer["energy"] = _energy(request["device"], sessions["latency"].run)
    return answer


def _memory(device: str) -> int | None:
    """Bytes that PyTorch holds on the device at most; other runtimes do not tell theirs."""
    if not device.startswith("cuda") or "torch" not in sys.modules:
        return None
    import torch

    return int(torch.cuda.max_memory_reserved(device)) or None


def _energy(device: str, run: Any) -> dict[str, Any]:
    import pynvml
    import torch

    from .nvml import record_energy

    pynvml.nvmlInit()
    try:
        # CUDA's numbering is not NVML's; this name is the same in both.
        name = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        return record_energy(pynvml, pynvml.nvmlDeviceGetHandleByUUID(name), run)
    finally:
        pynvml.nvmlShutdown()


if __name__ == "__main__":
    main()
