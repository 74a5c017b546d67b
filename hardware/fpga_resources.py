"""What a matrix-vector-threshold unit takes on an FPGA: a structural formula, its prices fitted on real circuits.

`fpga_parts` counts the parts of `rtl/mvtu.sv`; each kind of part has one price in look-up tables and one in
flip-flops. Block RAMs and multipliers follow by rule. `examples/fit_fpga_resources.py` fits the prices on circuits of
`tables/ecp5.json`, after place and route for the ECP5, after synthesis alone for Xilinx's 7 series, and writes them
with the error on circuits that it did not see.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import InputError
from .fpga_parts import bram, clock_parts, dsp, ff_parts, lut_parts
from .mvtu import Unit

PRICES = Path(__file__).parent / "tables" / "fpga_resources.json"
LARGEST_BITS = 8
FIELDS = ("mw", "mh", "pe", "simd", "w", "a", "o", "acc", "dsp", "memory")


@dataclass(frozen=True)
class Resources:
    """Of units, arrays of one length.

    Attributes:
        lut, ff: look-up tables and flip-flops; real numbers.
        dsp, bram: multipliers and block RAMs of 18 kbit; exact.
        extrapolated: outside the range of PE, SIMD and size that the prices were fitted on, or with constant weights,
            which fold into the logic.
    """

    lut: np.ndarray
    ff: np.ndarray
    dsp: np.ndarray
    bram: np.ndarray
    extrapolated: np.ndarray


@dataclass(frozen=True)
class Clock:
    """Highest clock frequency in Hz, as place and route would report it; arrays over units, or a number for a network.

    Attributes:
        value: expected.
        low, high: nine in ten circuits lie between these, seeds of the placer included.
    """

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def as_arrays(units: Unit | Iterable[Unit]) -> dict[str, np.ndarray]:
    """Fields of units, one array each."""
    listed = [units] if isinstance(units, Unit) else list(units)
    return {name: np.array([getattr(unit, name) for unit in listed]) for name in FIELDS}


def resources(units: Unit | Iterable[Unit] | Mapping[str, Any], family: str = "ecp5") -> Resources:
    """Predict what units take.

    Args:
        units: one, several, or by name of their fields numbers and arrays that broadcast: mw, mh, pe, simd, w, a, o,
            acc, dsp (bool) and memory ("block" or "distributed").
        family: "ecp5", or "xc7" for Xilinx's 7 series.

    Raises:
        InputError: more than 8 bits, unknown family, or a folding that does not divide its matrix.
    """
    prices = fitted(family)
    arrays = _checked(units)
    luts = lut_parts(arrays, family, np.array(prices["products"]), prices["rescaling"])
    lut = sum(prices["lut"][name] * count for name, count in luts.items())
    ff = sum(prices["ff"][name] * count for name, count in ff_parts(arrays, family).items())
    outside = arrays["mw"] * arrays["mh"] == arrays["simd"] * arrays["pe"]
    for name, value in {"pe": arrays["pe"], "simd": arrays["simd"], "lut": lut}.items():
        least, most = prices["range"][name]
        outside = outside | (value < least) | (value > most)
    return Resources(lut, ff, dsp(arrays, family), bram(arrays), outside)


def fmax(units: Unit | Iterable[Unit] | Mapping[str, Any]) -> Clock:
    """Predict the clock of each unit by itself on an ECP5-85 of speed grade 6; for other families nothing is known."""
    arrays, prices = _checked(units), fitted("ecp5")["clock"]
    nanoseconds = _longest_path(arrays, prices["parts"])
    value = 1e9 / nanoseconds
    return Clock(value, value * prices["low"], value * prices["high"])


def network_fmax(units: Iterable[Unit] | Mapping[str, Any]) -> Clock:
    """Predict the clock of a network of units in one circuit.

    The slowest unit's clock is lowered by DERATE: together, units are placed worse than each by itself.
    """
    each, derate = fmax(units), fitted("ecp5")["clock"]["derate"]
    slowest = int(np.argmin(each.value))
    return Clock(*(np.asarray(derate * array[slowest]) for array in (each.value, each.low, each.high)))


def stated_error(family: str = "ecp5") -> dict[str, Any]:
    """Errors of the formula on circuits that were not fitted on: mean and largest relative error, and how many."""
    return dict(fitted(family)["held out"])


@functools.cache
def fitted(family: str) -> dict[str, Any]:
    """The fitted prices of a family.

    Raises:
        InputError: no prices for it.
    """
    families = json.loads(PRICES.read_text())["families"]
    if family not in families:
        raise InputError(f"FPGA families with fitted prices: {', '.join(families)}; got {family!r}")
    return dict(families[family])


def _longest_path(arrays: Mapping[str, np.ndarray], prices: Mapping[str, float]) -> np.ndarray:
    """Nanoseconds of the slowest path of each unit."""
    return np.asarray(sum(prices[name] * value for name, value in clock_parts(arrays).items()))


def _checked(units: Unit | Iterable[Unit] | Mapping[str, Any]) -> dict[str, np.ndarray]:
    fields = units if isinstance(units, Mapping) else as_arrays(units)
    if missing := [name for name in FIELDS if name not in fields]:
        raise InputError(f"units are described by {', '.join(FIELDS)}; {', '.join(missing)} missing")
    values = np.broadcast_arrays(*(np.atleast_1d(fields[name]) for name in FIELDS))
    arrays = dict(zip(FIELDS, values, strict=True))
    for name, least in (("w", 1), ("a", 1), ("o", 0)):
        wrong = (arrays[name] < least) | (arrays[name] > LARGEST_BITS)
        if wrong.any():
            raise InputError(
                f"{name} is {least} to {LARGEST_BITS} bits, beyond which nothing is known; got {arrays[name][wrong][0]}"
            )
    if (arrays["mw"] % arrays["simd"]).any() or (arrays["mh"] % arrays["pe"]).any():
        raise InputError("SIMD divides the columns of its matrix and PE the rows")
    if not np.isin(arrays["memory"], ("block", "distributed")).all():
        raise InputError("memory is block or distributed")
    return arrays
