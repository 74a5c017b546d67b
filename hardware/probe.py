"""The measuring process: times one file, alone on its pinned cores, and prints JSON.

A process of its own keeps a crash of the runtime away from the search, starts every measurement from
the same state, and lets peak memory be that of one model. Run as `python -m autocompress.hardware.probe`
with the request as JSON on standard input.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

ROUNDS = 10  # candidate and reference take turns this often, so that drift shows


def main() -> None:
    """Read the request, measure, print the answer."""
    # Die with the worker that asked (PR_SET_PDEATHSIG), so that a killed search leaves nothing running.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    request = json.load(sys.stdin)
    os.sched_setaffinity(0, request["cores"])
    json.dump(_measure(request), sys.stdout)


def _measure(request: dict[str, Any]) -> dict[str, Any]:
    import numpy as np

    from .runtimes import RUNTIMES

    open_file = RUNTIMES[request["runtime"]]
    rng, shape = np.random.default_rng(0), (32, *request["input_shape"])
    tokens = request["vocabulary"]
    images = rng.integers(0, tokens, shape) if tokens else rng.standard_normal(shape).astype(np.float32)
    one, threads = images[:1], len(request["cores"])

    _open_once(open_file, request, one, threads)  # the runtime's own libraries count for nobody
    before = _peak_memory(reset=True)
    candidate = open_file(request["path"], 1, threads, request["bf16"])
    candidate(one)
    memory = _peak_memory() - before

    reference = open_file(request["reference"], 1, threads, request["reference_bf16"]) if request["reference"] else None
    for run in (candidate, reference):
        _warm_up(run, one)
    pace = min(_seconds(candidate, one) for _ in range(5))
    per_round = max(-(-request["repeats"] // ROUNDS), min(100, int(request["budget"] / ROUNDS / max(pace, 1e-6))))
    times: dict[str, list[float]] = {"latency": [], "reference": []}
    for _ in range(ROUNDS):
        for name, run in (("latency", candidate), ("reference", reference)):
            if run is not None:
                run(one)  # the other model has had the caches
                times[name] += [_seconds(run, one) for _ in range(per_round)]

    batch = max(1, min(len(images), int(0.25 / max(pace, 1e-6))))
    many = open_file(request["path"], batch, threads, request["bf16"])
    many(images[:batch])
    batch_times = [_seconds(many, images[:batch]) for _ in range(5)]
    return {**times, "memory": memory, "batch": batch, "batch_times": batch_times}


def _open_once(open_file: Any, request: dict[str, Any], one: Any, threads: int) -> None:
    """Load and run the reference (or, for the reference itself, the candidate) so that lazy set-up is over."""
    name = "reference" if request["reference"] else "path"
    bf16 = request["reference_bf16"] if request["reference"] else request["bf16"]
    open_file(request[name], 1, threads, bf16)(one)


def _warm_up(run: Any, images: Any) -> None:
    """At least 5 runs and 50 ms, so that clocks and caches settle."""
    if run is None:
        return
    end = time.perf_counter() + 0.05
    count = 0
    while count < 5 or time.perf_counter() < end:
        run(images)
        count += 1


def _seconds(run: Any, images: Any) -> float:
    start = time.perf_counter()
    run(images)
    return time.perf_counter() - start


def _peak_memory(reset: bool = False) -> int:
    """Highest resident bytes so far; with `reset`, the count starts anew from what is resident now."""
    if reset:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
