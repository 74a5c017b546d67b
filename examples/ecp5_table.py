"""Synthesise, place and route circuits of hardware/rtl over a plan of points and keep what they took.

    python examples/ecp5_table.py lines.jsonl           (about 90 minutes of one core; goes on where it stopped)
    python examples/ecp5_table.py lines.jsonl --pack    (then: write hardware/tables/ecp5.json)
    python examples/ecp5_table.py other.jsonl --backwards             (the last points first, on another core)
    python examples/ecp5_table.py fresh.jsonl --fresh 24 --seed 7     (points that no fit has seen)

Weights and thresholds are random. For the ECP5-85, speed grade 6, figures are after place and route; for Xilinx's
7 series after synthesis alone, so that no clock is known. Half of the ECP5's points are packed but not placed: their
cells are counted all the same, their clock is unknown.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from autocompress.core.errors import CandidateError
from autocompress.hardware.fpga_synthesis import place_and_route, synthesise, tool_versions, xilinx_figures
from autocompress.hardware.mvtu import RTL, THRESHOLD_BITS, Unit, write_memories

TABLE = Path(__file__).parents[1] / "hardware" / "tables" / "ecp5.json"
FIELDS = ("mw", "mh", "pe", "simd", "w", "a", "o", "acc", "dsp", "memory")
FIGURES = ("lut", "ff", "dsp", "bram", "fmax", "seconds")
LARGEST = 2600  # rough look-up tables of a random point; a few are let through up to LARGE
LARGE = 9000


def rough_size(unit: Unit) -> float:
    """Look-up tables, to a factor of two: keeps the plan within its time."""
    multiply = 0.0 if unit.dsp else 1.3 * unit.w * unit.a
    lanes = unit.pe * unit.simd * (multiply + unit.w + unit.a + 2)
    memory = unit.pe * unit.simd * unit.w * unit.interval / 16 if unit.memory == "distributed" else 0
    groups = unit.mh // unit.pe
    after = unit.pe * unit.acc * (groups * 2**unit.o / 16 + unit.o) if unit.o <= THRESHOLD_BITS else 0
    return lanes + memory + after + (unit.pe * unit.acc * (3 if unit.dsp else 20) if unit.o > THRESHOLD_BITS else 0)


def random_unit(rng: random.Random, largest: float) -> Unit:
    """A unit of 150 to `largest` rough look-up tables."""
    while True:
        pe, simd = rng.choice((1, 2, 3, 4, 6, 8, 12, 16)), rng.choice((1, 2, 3, 4, 5, 6, 8, 9, 12, 16))
        w, a = rng.choice((1, 1, 2, 3, 4, 5, 6, 8)), rng.choice((1, 2, 3, 4, 5, 6, 8))
        steps, groups = rng.choice((2, 4, 6, 8, 9, 16, 18, 36, 64, 72)), rng.choice((1, 2, 3, 4, 6, 8, 16, 32))
        unit = Unit(
            simd * steps, pe * groups, pe, simd, w, a, rng.choice((0, 1, 1, 2, 2, 3, 4, 4, 8)), dsp=rng.random() < 0.3,
            memory=rng.choice(("block", "distributed")),
        )  # fmt: skip
        if unit.interval > 1 and unit.interval <= 4096 and 150 < rough_size(unit) < largest:
            return unit


def unit_points(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Random units; every eighth is a large one, every fourth is held out of the fit, every second one is routed."""
    rng = random.Random(seed)
    for number in range(count):
        unit = random_unit(rng, LARGE if number % 8 == 7 else LARGEST)
        kind = {"kind": "unit", "role": "held out" if number % 4 == 2 else "fit", "routed": number % 2 == 0}
        yield {**kind, **{name: getattr(unit, name) for name in FIELDS}}


def plan(units: int, seed: int) -> list[dict[str, Any]]:
    """All points, in the order in which they are done: what the fit needs comes first."""
    products = [
        {"kind": "product", "role": "fit", "routed": False, "w": w, "a": a, "dsp": False}
        for w in range(1, 9)
        for a in range(1, 9)
    ]
    multiplied = [
        {"kind": "product", "role": "fit", "routed": False, "w": w, "a": a, "dsp": True}
        for w, a in ((2, 1), (2, 2), (3, 1), (4, 4), (8, 8))
    ]
    rescaled = [
        {"kind": "requantise", "role": "fit", "routed": False, "acc": acc, "o": 8, "dsp": dsp}
        for acc in (8, 12, 14, 16, 18, 19, 20, 22, 24, 28)
        for dsp in (True, False)
    ]
    whole = list(unit_points(units, seed))
    xilinx = [{**point, "family": "xc7", "routed": False} for point in [*products, *rescaled, *whole[::2]]]
    again = [{**point, "pnr_seed": seed} for point in whole[: 2 * len(whole) // 3 : 4] for seed in (2, 3)]
    half = len(whole) // 2
    first = [*whole[:12], *multiplied, *products, *rescaled]
    return [*first, *whole[12:half], *stream_points(), *xilinx, *whole[half:], *again]


def stream_points() -> Iterator[dict[str, Any]]:
    """Sliding windows, width converters and FIFOs, whose parameters are kept by the modules' own names."""
    for width, size, channels, kernel in (
        (4, 16, 1, 3), (8, 16, 4, 3), (16, 32, 2, 3), (32, 8, 8, 5), (8, 32, 1, 5), (16, 16, 16, 3), (64, 8, 4, 3),
    ):  # fmt: skip
        pad = kernel // 2
        rows = 4 if kernel == 3 else 8
        image = {"H": size, "WD": size, "OH": size, "OW": size, "KH": kernel, "KW": kernel, "PT": pad, "PL": pad}
        yield {"kind": "swu", "W": width, "CF": channels, **image, "ROWS": rows}
    for width, wide_in, wide_out in ((4, 1, 4), (4, 4, 1), (8, 1, 16), (8, 16, 1), (2, 8, 2), (8, 2, 8)):
        yield {"kind": "dwc", "W": width, "IN": wide_in, "OUT": wide_out}
    for width, depth in ((8, 2), (8, 16), (32, 32), (16, 64), (64, 4), (16, 256), (32, 1024)):
        yield {"kind": "fifo", "W": width, "DEPTH": depth, "FAST": int(depth <= 64)}


def memories(unit: Unit, folder: Path, seed: int) -> dict[str, int | str]:
    """Random weights and thresholds in files; returns the module's parameters."""
    rng = np.random.default_rng(seed)
    most = 2 ** (unit.w - 1)
    weights = rng.choice([-1, 1], (unit.mh, unit.mw)) if unit.w == 1 else rng.integers(-most, most, (unit.mh, unit.mw))
    thresholds = None
    if 0 < unit.o <= THRESHOLD_BITS:
        quarter = 1 << (unit.acc - 2)
        thresholds = np.sort(rng.integers(-quarter, quarter, (unit.mh, 2**unit.o - 1)), axis=1)
    elif unit.o:
        scale = rng.integers(2**14, 2**15, unit.mh)
        offset = rng.integers(-(1 << (unit.shift + 6)), 1 << (unit.shift + 6), unit.mh)
        thresholds = np.stack([scale, offset], 1)
    return write_memories(unit, weights, thresholds, folder, "unit")


def circuit(point: dict[str, Any], folder: Path, seed: int) -> tuple[str, dict[str, int | str]]:
    """(module, parameters) of a point, its memory files written into `folder`."""
    if point["kind"] == "product":
        lanes = 2 if point["w"] == point["a"] == 1 else 1
        return "mvtu_dot", {"SIMD": lanes, "W": point["w"], "A": point["a"]}
    if point["kind"] == "requantise":
        unit = Unit(8, 16, 1, 1, 4, 4, point["o"], acc=point["acc"])
        parameters = memories(unit, folder, seed)
        kept = {name: parameters[name] for name in ("PE", "ACC", "O", "SHIFT")}
        return "mvtu_requantise", {**kept, "NF": 16, "FILE": parameters["THRESHOLDS"]}
    if point["kind"] != "unit":
        return point["kind"], {name: value for name, value in point.items() if name.isupper()}
    unit = Unit(**{name: point[name] for name in FIELDS})
    return "mvtu", memories(unit, folder, seed)


def run_point(point: dict[str, Any], seed: int) -> dict[str, Any]:
    """The figures of a point."""
    started = time.perf_counter()
    family = point.get("family", "ecp5")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        top, parameters = circuit(point, folder, seed)
        source = RTL / f"{top.partition('_')[0]}.sv"
        cells = synthesise(folder, [source], top, parameters, point.get("dsp", True), family)
        if family == "xc7":
            figures = xilinx_figures(cells)
        else:
            figures = place_and_route(folder, point.get("pnr_seed", 1), pack_only=not point.get("routed", True))
    return {**figures, "seconds": round(time.perf_counter() - started, 1)}


def pack(lines: list[dict[str, Any]]) -> None:
    """Write the table: one list of values a row, with names by kind."""
    kinds: dict[str, dict[str, Any]] = {}
    for line in lines:
        point, figures = line["point"], line["figures"]
        columns = [name for name in point if name.isupper() or (name in FIELDS and name != "dsp")]
        kind = kinds.setdefault(point["kind"], {"columns": [], "rows": []})
        kind["columns"] = [*columns, "dsp_wanted", "family", "routed", "pnr_seed", "role", *FIGURES]
        settings = [point.get("dsp", True), point.get("family", "ecp5"), point.get("routed", True)]
        settings += [point.get("pnr_seed", 1), point.get("role", "fit")]
        kind["rows"].append([*(point[name] for name in columns), *settings, *(figures.get(name) for name in FIGURES)])
    note = "ecp5: LFE5UM-85F, CABGA756, speed grade 6, placed and routed or only packed; xc7: synthesis alone"
    head = json.dumps({"note": note, "tools": tool_versions(), "weights_seed": lines[0]["seed"]}, indent=1)[:-2]
    body = ",\n".join(
        f' "{name}": {{"columns": {json.dumps(kind["columns"])}, "rows": [\n'
        + ",\n".join(json.dumps(row) for row in kind["rows"])
        + "\n]}"
        for name, kind in kinds.items()
    )
    TABLE.write_text(f"{head},\n{body}\n}}\n")
    print(f"{TABLE}: {len(lines)} rows, {TABLE.stat().st_size / 1e3:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path, help="JSON lines, appended to")
    parser.add_argument("--units", type=int, default=130)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", type=int, default=0, help="this many random units instead of the plan")
    parser.add_argument("--family", default="ecp5", help="of --fresh")
    parser.add_argument("--backwards", action="store_true", help="the last points first")
    parser.add_argument("--pack", action="store_true", help="write the table from the lines")
    options = parser.parse_args()
    lines = [json.loads(line) for line in options.lines.read_text().splitlines()] if options.lines.exists() else []
    if options.pack:
        pack(lines)
        return
    points = list(unit_points(options.fresh, options.seed)) if options.fresh else plan(options.units, options.seed)
    points = [{**point, "routed": True} for point in points] if options.fresh else points
    if options.fresh and options.family != "ecp5":
        points = [{**point, "family": options.family, "routed": False} for point in points]
    done = {json.dumps(line["point"], sort_keys=True) for line in lines}
    if options.backwards:
        points.reverse()
    for number, point in enumerate(points):
        if json.dumps(point, sort_keys=True) in done:
            continue
        try:
            figures = run_point(point, options.seed)
        except CandidateError as error:
            print(f"{number + 1}/{len(points)} {point}: {error}", flush=True)
            continue
        with options.lines.open("a") as file:
            file.write(json.dumps({"point": point, "seed": options.seed, "figures": figures}) + "\n")
        print(f"{number + 1}/{len(points)} {point} {figures}", flush=True)


if __name__ == "__main__":
    main()
