"""How well a latency repeats: one model's file measured several times, each time as a search measures a candidate.

    python benchmarks/repeatability.py --model resnet20 --target x86/openvino
    python benchmarks/repeatability.py --model digits-cnn --target x86/onnxruntime --threads 1 --json out.json
    python benchmarks/repeatability.py --model resnet20 --target x86/openvino --load --times 3

Every row is one call of the backend's `measure`, its repeated attempts included, in processes of their own. Latency is
the median of its runs, with the 95 % interval of that median. Over the rows are computed

    spread:  (largest - smallest) / median of these medians,
    robust:  the same without the smallest and the largest of them, where there are at least 5,
    trusted: the spread of those that carry no flag.

With `--load`, as many measurements follow while a busy process runs on each of the measured cores; they have to be
flagged. Data are not needed, as time does not depend on them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from autocompress.core.errors import AutocompressError, InputError
from autocompress.core.types import Artifact, Backend, Task
from autocompress.hardware.files import read_file
from autocompress.hardware.targets import make_backend

SHAPES = {"digits-cnn": (1, 8, 8), "resnet20": (3, 32, 32)}
BUSY = "import os\nos.sched_setaffinity(0, {%d})\nwhile os.getppid() == %d: sum(range(10000))"


def build_file(model: str, backend: Backend, folder: Path) -> tuple[Artifact, Task]:
    """The untouched model's file, or the ONNX file that `model` names."""
    if model.endswith(".onnx"):
        return read_file(Path(model), backend.name)
    import torch

    from autocompress.hardware.onnx_export import export_onnx
    from autocompress.tasks.models import ModelSource

    if model not in SHAPES:
        raise InputError(f"--model: expected {', '.join(SHAPES)} or an ONNX file, got '{model}'")
    shape = SHAPES[model]
    export_onnx(ModelSource(model, 10, shape)().eval(), torch.zeros(1, *shape), folder / "model.onnx", backend.name)
    return read_file(folder / "model.onnx", backend.name)


@contextlib.contextmanager
def busy_cores(cores: list[int]) -> Iterator[None]:
    """Keep each of these cores busy with a process of its own."""
    started = [subprocess.Popen([sys.executable, "-c", BUSY % (core, os.getpid())]) for core in cores]
    try:
        time.sleep(0.5)  # until they run
        yield
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.wait()


def measure(backend: Backend, artifact: Artifact, task: Task, loaded: bool) -> dict[str, Any]:
    """One row."""
    start = time.perf_counter()
    found = {m.name: m for m in backend.measure(artifact, task, None)}
    latency = found["latency"]
    return {
        "latency": latency.value,
        "interval": latency.ci95,
        "samples": latency.samples,
        "method": latency.provenance.method,
        "flags": list(latency.provenance.flags),
        "seconds": time.perf_counter() - start,
        "loaded": loaded,
    }


def spread_of(values: list[float]) -> tuple[float, float]:
    """(spread, robust), as shares; see the module's text."""
    ordered = sorted(values)
    middle = statistics.median(ordered)
    inner = ordered[1:-1] if len(ordered) >= 5 else ordered
    return (ordered[-1] - ordered[0]) / middle, (inner[-1] - inner[0]) / middle


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of all rows of one kind."""
    spread, robust = spread_of([row["latency"] for row in rows])
    trusted = [row["latency"] for row in rows if not row["flags"]]
    return {
        "times": len(rows),
        "median": statistics.median(row["latency"] for row in rows),
        "spread": spread,
        "robust": robust,
        "trusted": spread_of(trusted)[0] if len(trusted) > 1 else None,
        "flagged": len(rows) - len(trusted),
        "seconds": statistics.median(row["seconds"] for row in rows),
    }


def show(rows: list[dict[str, Any]], title: str) -> Table:
    """Rows for people."""
    shown = Table("no.", "latency", "95 % interval", "runs", "took", "load", "flags", title=title)
    for number, row in enumerate(rows, 1):
        low, high = row["interval"] or (row["latency"],) * 2
        shown.add_row(
            str(number),
            f"{row['latency'] * 1e3:.4f} ms",
            f"{low * 1e3:.4f}-{high * 1e3:.4f}",
            str(row["samples"]),
            f"{row['seconds']:.1f} s",
            "busy" if row["loaded"] else "",
            "; ".join(row["flags"]),
        )
    return shown


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, write."""
    if arguments.times < 2:
        raise InputError(f"--times: expected at least 2, got {arguments.times}")
    if arguments.json and not arguments.json.resolve().parent.is_dir():
        raise InputError(f"--json: there is no folder '{arguments.json.parent}'")
    backend = make_backend(arguments.target, arguments.threads)
    if arguments.load and not hasattr(backend, "cores"):
        raise InputError(f"--load: expected a target on this machine, got {arguments.target}")
    with tempfile.TemporaryDirectory() as folder:
        artifact, task = build_file(arguments.model, backend, Path(folder))
        rows = [measure(backend, artifact, task, False) for _ in range(arguments.times)]
        if arguments.load:
            with busy_cores(backend.cores):  # type: ignore[attr-defined]
                rows += [measure(backend, artifact, task, True) for _ in range(arguments.times)]
    console = Console(width=160)
    console.print(show(rows, f"{arguments.model} on {arguments.target}"))
    kinds = {"quiet": [row for row in rows if not row["loaded"]], "busy": [row for row in rows if row["loaded"]]}
    totals = {name: summary(some) for name, some in kinds.items() if some}
    for name, total in totals.items():
        trusted = "unknown" if total["trusted"] is None else f"{100 * total['trusted']:.1f} %"
        console.print(
            f"{name}: {total['times']} measurements, median {total['median'] * 1e3:.4f} ms, spread "
            f"{100 * total['spread']:.1f} % (robust {100 * total['robust']:.1f} %, trusted {trusted}), "
            f"{total['flagged']} flagged, {total['seconds']:.1f} s each"
        )
    if arguments.json:
        record = {"model": arguments.model, "target": arguments.target, "rows": rows, "summary": totals}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20", help=f"{', '.join(SHAPES)} or an ONNX file")
    parser.add_argument("--target", default="x86/openvino")
    parser.add_argument("--threads", type=int, default=0, help="cores to use; default: all")
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--load", action="store_true", help="then measure as often again on busy cores")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the rows there")
    try:
        run(parser.parse_args())
    except AutocompressError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
