"""Fit the prices of hardware/fpga_resources.py on hardware/tables/ecp5.json and write them with their error.

python examples/fit_fpga_resources.py
python examples/fit_fpga_resources.py --fresh lines.jsonl      (the error on points of `ecp5_table.py --fresh` only)
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import lsq_linear

from autocompress.hardware.fpga_parts import LUT_INPUTS, bram, clock_parts, dsp, ff_parts, lut_parts
from autocompress.hardware.fpga_resources import FIELDS, PRICES, fmax, resources
from autocompress.hardware.fpga_table import load_table
from autocompress.hardware.mvtu import SCALE_BITS

Rows = list[dict[str, Any]]
# How strongly prices are held to what is plainly expected, which the few circuits with a rare part need.
HOLD = {"ecp5": 0.1, "xc7": 0.2}
BOUNDS = (0.25, 2.5)  # of prices, by which the counts may be wrong
DERATE = 0.78  # clock of a network of two layers over that of its slowest unit: 97 and 122 MHz


def arrays_of(rows: Rows) -> dict[str, np.ndarray]:
    """Fields of units, one array each."""
    columns = {name: "dsp_wanted" if name == "dsp" else name for name in FIELDS}
    return {name: np.array([row[column] for row in rows]) for name, column in columns.items()}


def prices_of(
    parts: Mapping[str, np.ndarray], values: np.ndarray, hold: float, bounds: tuple[float, float] = BOUNDS
) -> dict[str, float]:
    """Prices within bounds that give the least relative error, held to 1 where there is little to tell them."""
    counts = np.stack([np.broadcast_to(part, values.shape) for part in parts.values()], 1) / values[:, None]
    typical = np.sqrt((counts**2).mean(0)) + 1e-6
    held = hold * np.sqrt(len(values)) * np.diag(typical)
    wanted = np.concatenate([np.ones(len(values)), held @ np.ones(len(typical))])
    found = lsq_linear(np.vstack([counts, held]), wanted, bounds).x
    return {name: round(float(price), 4) for name, price in zip(parts, found, strict=True)}


def product_prices(family: str) -> np.ndarray:
    """Look-up tables of one product by bits of weights and inputs, (8, 8)."""
    grid = np.zeros((8, 8))
    for row in load_table("product"):
        if row["family"] == family and not row["dsp_wanted"]:
            grid[row["w"] - 1, row["a"] - 1] = row["lut"]
    if family == "ecp5":  # a circuit has one or two cells that supply constants, not one for each product
        bits = np.arange(1, 9)
        grid -= np.where((bits[:, None] == 1) | (bits == 1), 1, 2)
    return grid


def rescaling_prices(family: str) -> dict[str, list[float]]:
    """Look-up tables of one row's requantisation by bits of accumulators, with and without multipliers."""
    inputs = LUT_INPUTS[family]
    found: dict[str, dict[int, float]] = {"hard": {}, "soft": {}}
    for row in load_table("requantise"):
        if row["family"] == family:
            table = (2 * SCALE_BITS + row["o"]) * (1 if inputs == 4 else 0.5)  # 16 words of factors
            found["hard" if row["dsp_wanted"] else "soft"][row["acc"]] = row["lut"] - table
    bits = sorted(found["hard"].keys() & found["soft"].keys())
    return {"acc": bits, **{name: [luts[acc] for acc in bits] for name, luts in found.items()}}


def errors(predicted: np.ndarray, values: np.ndarray) -> dict[str, float]:
    relative = abs(predicted / values - 1)
    return {"mean": round(float(relative.mean()), 4), "largest": round(float(relative.max()), 4)}


def predicted(parts: Mapping[str, np.ndarray], prices: Mapping[str, float]) -> np.ndarray:
    return np.asarray(sum(prices[name] * count for name, count in parts.items()))


def fit_family(family: str) -> dict[str, Any]:
    """Prices of a family, with the error on held-out circuits."""
    rows = [row for row in load_table("unit") if row["family"] == family and row["pnr_seed"] == 1]
    fit = np.array([row["role"] == "fit" for row in rows])
    arrays = arrays_of(rows)
    products = product_prices(family)
    rescaling = rescaling_prices(family)
    found: dict[str, Any] = {"products": products.tolist(), "rescaling": rescaling}
    held: dict[str, Any] = {"circuits": int((~fit).sum()), "fitted on": int(fit.sum())}
    for name, parts in (("lut", lut_parts(arrays, family, products, rescaling)), ("ff", ff_parts(arrays, family))):
        values = np.array([row[name] for row in rows], float)
        found[name] = prices_of({key: part[fit] for key, part in parts.items()}, values[fit], HOLD[family])
        guesses = predicted(parts, found[name])
        held[name] = errors(guesses[~fit], values[~fit])
        print(f"{family} {name}: fitted {errors(guesses[fit], values[fit])}, held out {held[name]}, {held['circuits']}")
        for worst in np.argsort(-abs(guesses / values - 1))[:5]:
            print(f"   {guesses[worst]:.0f} for {values[worst]:.0f}: {rows[worst]}")
    for name, counts in (("dsp", dsp(arrays, family)), ("bram", bram(arrays))):
        for row, count in zip(rows, counts, strict=True):
            if row[name] != count:
                print(f"   {name} {count} by rule: {row}")
    found["held out"] = held
    luts = [row["lut"] for row in rows]
    found["range"] = {name: [int(arrays[name].min()), int(arrays[name].max())] for name in ("pe", "simd")}
    found["range"]["lut"] = [min(luts), max(luts)]
    return found


def fit_clock() -> dict[str, Any]:
    """Prices of the slowest path, and the spread about it on circuits that were not fitted on, seeds included."""
    rows = [row for row in load_table("unit") if row["fmax"]]
    fit = np.array([row["role"] == "fit" for row in rows])
    arrays, paths = arrays_of(rows), np.array([1e3 / row["fmax"] for row in rows])
    parts = clock_parts(arrays)
    # Prices here are nanoseconds, of which none is plainly expected: they are held to 0 but for a little.
    scaled = {key: part * (1 if key == "unit" else 0.1) for key, part in parts.items()}
    found = prices_of({key: part[fit] for key, part in scaled.items()}, paths[fit], hold=0.01, bounds=(0, np.inf))
    found = {key: round(price * (1 if key == "unit" else 0.1), 5) for key, price in found.items()}
    guesses = predicted(parts, found)
    ratio = guesses / paths  # of the true clock to the predicted one
    # So few circuits leave one in twenty on a side only beyond the last of them (split conformal prediction).
    held = np.sort(ratio[~fit])
    beyond = int(0.05 * (len(held) + 1))
    low, high = held[max(beyond - 1, 0)], held[min(len(held) - beyond, len(held) - 1)]
    print(f"clock: fitted {errors(ratio[fit], np.ones(fit.sum()))}, held out {errors(ratio[~fit], np.ones(sum(~fit)))}")
    print(f"   nine in ten within {low:.2f} to {high:.2f}; {found}")
    return {"parts": found, "low": round(float(low), 3), "high": round(float(high), 3), "derate": DERATE}


def seed_spread() -> dict[str, Any]:
    """Largest and smallest clock over the placer's seeds, relative to their mean."""
    by_unit: dict[str, list[float]] = {}
    for row in load_table("unit"):
        if row["fmax"]:
            by_unit.setdefault(str([row[name] for name in FIELDS if name != "dsp"] + [row["dsp_wanted"]]), []).append(
                row["fmax"]
            )
    spreads = [(max(clocks) - min(clocks)) / 2 / np.mean(clocks) for clocks in by_unit.values() if len(clocks) > 2]
    if not spreads:
        return {}
    return {"circuits": len(spreads), "mean": round(float(np.mean(spreads)), 3), "largest": round(max(spreads), 3)}


def judge(path: Path) -> None:
    """Print the errors of the written prices on circuits of a file."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for family in ("ecp5", "xc7"):
        mine = [line for line in lines if line["point"].get("family", "ecp5") == family]
        if not mine:
            continue
        arrays = {name: np.array([line["point"][name] for line in mine]) for name in FIELDS}
        guess = resources(arrays, family)
        for name in ("lut", "ff", "dsp", "bram"):
            values = np.array([line["figures"][name] for line in mine], float)
            guesses = getattr(guess, name)
            if name in ("dsp", "bram"):
                print(f"{family} {name}: {(guesses == values).sum()} of {len(values)} exact")
                continue
            print(f"{family} {name}: {errors(guesses, values)} over {len(values)}")
            print("   ", " ".join(f"{ratio:.3f}" for ratio in guesses / values))
        if family == "ecp5":
            clock, true = fmax(arrays), np.array([line["figures"]["fmax"] * 1e6 for line in mine])
            inside = ((clock.low <= true) & (true <= clock.high)).sum()
            print(f"clock: {errors(clock.value, true)}, {inside} of {len(true)} within the interval")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", type=Path)
    options = parser.parse_args()
    if options.fresh:
        judge(options.fresh)
        return
    families = {family: fit_family(family) for family in ("ecp5", "xc7")}
    families["ecp5"]["clock"] = fit_clock()
    families["ecp5"]["clock"]["seeds"] = seed_spread()
    PRICES.write_text(json.dumps({"families": families}, indent=1) + "\n")
    print(f"{PRICES}: {PRICES.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
