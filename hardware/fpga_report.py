"""A file's accelerator for those who build it: circuit, test bench with data, a script that runs it, and a report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..core.errors import InputError, MissingDependencyError
from ..core.types import Measurement, Method
from .compare import Compared
from .files import read_file
from .fpga import FpgaBackend
from .fpga_emit import Emitted, compile_network, emit
from .fpga_rtl import lanes_in, lanes_out
from .fpga_sim import write_words
from .fpga_synthesis import missing_tools
from .integers import run_integers
from .targets import find_backend

IMAGES = 2  # in the test bench: the second one shows the interval between results
PER_IMAGE = 20  # times the cycles foretold, after which the test bench calls the circuit stuck
SCRIPT = """\
#!/bin/sh
# Runs the test bench in Icarus Verilog; compares each word of the results of {images} random images with expected.hex.
cd "$(dirname "$0")" || exit 1
iverilog -g2012 -s bench -o bench.vvp -DCHECK -DWORDS={words} -DRESULTS={results} -DLIMIT={limit} *.sv &&
  vvp -n bench.vvp
"""


def emit_file(path: Path, target: str, folder: Path, route: bool = False, seed: int = 0) -> list[Compared]:
    """Write the accelerator for a file whose layers are all rounded: all that synthesis and a simulator need.

    Args:
        target: an FPGA, such as "fpga/ecp5-85".
        folder: new, or empty; gets `accelerator.sv`, its modules and memories, `bench.sv` with its data, `simulate.sh`
            and `report.md`.
        route: whether to place and route it, which takes minutes; for the ECP5 alone.
        seed: of the random images of the test bench.

    Returns:
        the target's figures, and with `route` those of place and route.

    Raises:
        InputError: no such file, no FPGA, or a folder that holds something.
        CandidateError: it does not fit, or something in it is not rounded as the circuit's units need it.
        MissingDependencyError: no Yosys or nextpnr here, with `route`.
    """
    backend = find_backend(target)
    if not isinstance(backend, FpgaBackend):
        raise InputError(f"emit: expected a target fpga/..., got {target}")
    if route and backend.device.family != "ecp5":
        raise InputError(f"--place-and-route works for fpga/ecp5-25, -45 and -85; got {target}")
    if route and (missing := missing_tools()):
        raise MissingDependencyError(missing)
    artifact, task = read_file(path, target)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--out: '{folder}' holds something already; expected a new folder")
    measured = backend.measure(artifact, task, None)
    emitted = emit(artifact, folder, backend.device)
    _write_bench(emitted, task.data.input_shape, seed)
    found = [Compared(target, None, {m.name: m for m in measured})]
    if route:
        figures = {m.name: m for m in compile_network(emitted)}
        latency = _at_clock(emitted, figures["clock"])
        found.append(Compared(f"{target}, routed", None, {"latency": latency, **figures}))
    _write_report(path, emitted, found)
    return found


def _at_clock(emitted: Emitted, clock: Measurement) -> Measurement:
    """Latency of an image at the clock that place and route found."""
    source = replace(clock.provenance, method=Method.SIMULATED)
    return Measurement("latency", emitted.cycles / clock.value, "s", None, 1, source)


def _write_bench(emitted: Emitted, shape: Sequence[int], seed: int) -> None:
    """The words that go in, those that must come out, and how to run it."""
    pipeline, folder = emitted.pipeline, emitted.folder
    first = next(node for node in pipeline.nodes if pipeline.source in node.inputs)
    last = next(node for node in pipeline.nodes if pipeline.sink in node.outputs)
    grid = emitted.network.input
    images = np.random.default_rng(seed).integers(0, 2**grid.bits, (IMAGES, *shape))
    results = run_integers(emitted.network, images)
    taken, given = lanes_in(first.stage)[0], lanes_out(last.stage)[0]
    write_words(folder / "inputs.hex", np.moveaxis(images, 1, -1) if images.ndim > 2 else images, taken)
    write_words(folder / "expected.hex", results, given)
    script = folder / "simulate.sh"
    limit = PER_IMAGE * IMAGES * emitted.cycles
    settings = {"words": images.size // taken[0], "results": results.size // given[0], "limit": limit}
    script.write_text(SCRIPT.format(images=IMAGES, **settings))
    script.chmod(0o755)


def _write_report(path: Path, emitted: Emitted, found: Sequence[Compared]) -> None:
    rows = "\n".join(f"| {figure} |" for row in found for figure in _figures(row))
    flags = dict.fromkeys(flag for row in found for m in row.measurements.values() for flag in m.provenance.flags)
    doubts = f"\nTo doubt: {'; '.join(flags)}.\n" if flags else ""
    (emitted.folder / "report.md").write_text(
        f"# {path.name} on {found[0].target}\n\n"
        f"{emitted.cycles} clock cycles from the first word of an image to the last of its result; an image every "
        f"{emitted.interval} cycles.\n\n"
        "The top module is `accelerator` in `accelerator.sv`. `simulate.sh` runs `bench.sv` (apt install iverilog).\n\n"
        f"| figure | value | from | to | kind | of |\n| --- | --- | --- | --- | --- | --- |\n{rows}\n{doubts}"
    )


def _figures(row: Compared) -> Iterator[str]:
    for figure in row.measurements.values():
        low, high = (f"{end:.4g}" for end in figure.ci95) if figure.ci95 else ("", "")
        value = f"{figure.value:.6g} {figure.unit}".rstrip()
        yield " | ".join((figure.name, value, low, high, str(figure.provenance.method), figure.provenance.device))
