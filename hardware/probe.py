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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .timing import seconds_of, time_runs


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

    # The first file opened loads the runtime's own libraries, whose memory counts for nobody.
    name = "reference" if request["reference"] else "path"
    bf16 = request["reference_bf16"] if request["reference"] else request["bf16"]
    first = open_file(request[name], 1, threads, bf16)
    first(one)
    before = _peak_memory(reset=True)
    candidate = open_file(request["path"], 1, threads, request["bf16"])
    candidate(one)
    memory = _peak_memory() - before

    runs = {"latency": lambda: candidate(one)}
    if request["reference"]:
        runs["reference"] = lambda: first(one)
    else:
        del first
    timings = time_runs(
        runs,
        repeats=request["repeats"],
        budget=request["budget"],
        cores=request["cores"],
        known=request.get("handover", ()),
    )
    energy = _energy(request["powercap"], runs["latency"]) if request.get("powercap") else None
    pace = min(timings.samples["latency"][0])
    batch = max(1, min(len(images), int(0.25 / max(pace, 1e-6))))
    many = open_file(request["path"], batch, threads, request["bf16"])
    many(images[:batch])
    batch_times = [seconds_of(lambda: many(images[:batch])) for _ in range(5)]
    return {
        "latency": timings.counted("latency"),
        "reference": timings.counted("reference") if request["reference"] else [],
        "doubts": timings.doubts,
        "handover": timings.fastest_handover,
        "memory": memory,
        "batch": batch,
        "batch_times": batch_times,
        "energy": energy,
    }


def _energy(powercap: str, run: Callable[[], Any]) -> dict[str, Any] | None:
    """What `record_energy` says; None where no counter can be read."""
    from .power import find_packages, record_energy  # boards have no such counters, and this file runs there, too

    packages = find_packages(Path(powercap))
    return record_energy(run, packages) if packages else None


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
