"""What the units around the matrix units take on an FPGA: windows, FIFOs, converters, pooling, additions.

Counted from what they store and how they are controlled, with prices fitted on place and route of the ECP5 (PRICES);
the 7 series' look-up tables of six inputs hold more, by the factor in LARGER.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .fpga_parts import block_rams
from .streams import Adder, Converter, Duplicator, Fifo, Pool, Stage, Window

# Memories of more bits lie in block RAM; so do those of more words.
SMALL_BITS, SMALL_WORDS = 2048, 64
LARGER = {"ecp5": 1.0, "xc7": 0.66}
RAM_WORDS = {"ecp5": 16, "xc7": 32}

# Look-up tables by kind of unit and by what is counted in `_counts`: fitted on 32 units after place and route (nextpnr
# for the ECP5), with errors of at most 10 % for windows, additions and pooling, 20 % for FIFOs, and 33 % for
# converters, which are the smallest.
PRICES: dict[str, dict[str, float]] = {
    "fifo": {"unit": 0, "control": 11.8, "memory": 1.27},
    "dwc": {"unit": 0, "control": 9.2, "bits": 0.52},
    "swu": {"unit": 189, "control": 1.7, "bits": 0.32, "memory": 1.35},
    "dup": {"unit": 4},
    "add": {"unit": 8, "lanes": 40, "bits": 2.37},
    "pool": {"unit": 0, "control": 5.9, "compared": 2.1, "scaled": 3.95, "memory": 1.06},
}


@dataclass(frozen=True)
class Need:
    """Look-up tables, multipliers and block RAMs of 18 kbit."""

    lut: float = 0.0
    dsp: int = 0
    bram: int = 0

    def __add__(self, other: Need) -> Need:
        return Need(self.lut + other.lut, self.dsp + other.dsp, self.bram + other.bram)


def need_of(stage: Stage, family: str) -> Need:
    """What a unit other than a matrix or a depthwise unit takes."""
    counts, bram = _counts(stage, family)
    prices = PRICES[stage.module]
    lut = LARGER[family] * sum(prices[name] * count for name, count in counts.items())
    return Need(lut, _multipliers(stage), bram)


def _multipliers(stage: Stage) -> int:
    """Those that rescale: one for each lane of each input."""
    if isinstance(stage, Adder):
        return 2 * stage.lanes
    return stage.lanes if isinstance(stage, Pool) and stage.sums else 0


def _counts(stage: Stage, family: str) -> tuple[dict[str, float], int]:
    match stage:
        case Fifo():
            tables, bram = _memory(stage.bits, stage.depth, family, stage.fast)
            return {"unit": 1, "control": _bits(stage.depth), "memory": tables}, bram
        case Converter():
            ratio = max(stage.wide_in, stage.wide_out) // min(stage.wide_in, stage.wide_out)
            bits = stage.bits * (stage.wide_in if stage.wide_in > stage.wide_out else 0)
            return {"unit": 1, "control": _bits(ratio) + ratio * (bits == 0), "bits": bits}, 0
        case Window():
            line = 1 << _bits(stage.size[1] * stage.fold)
            tables, bram = _memory(stage.bits, line * stage.rows, family)
            sizes = (*stage.size, *stage.kernel, *stage.out, stage.fold, stage.rows, line, line, line)
            return {"unit": 1, "control": sum(map(_bits, sizes)), "bits": stage.bits, "memory": tables}, bram
        case Pool():
            width = stage.bits + (_bits(stage.count) if stage.sums else 0)
            tables, bram = _memory(width * stage.lanes, stage.fold, family, stage.fold <= SMALL_WORDS)
            kind = "scaled" if stage.sums else "compared"
            counted = {kind: stage.lanes * width, "control": _bits(stage.count) + _bits(stage.fold)}
            return {"unit": 1, **counted, "memory": tables}, bram
        case Adder():
            return {"unit": 1, "lanes": stage.lanes, "bits": stage.lanes * sum(stage.bits)}, 0
        case Duplicator():
            return {"unit": 1}, 0
    raise TypeError(f"no price for {stage}")


def _memory(width: int, words: int, family: str, small: bool | None = None) -> tuple[float, int]:
    """(look-up tables, block RAMs) of a memory that is written and read."""
    if small is None:
        small = words <= SMALL_WORDS or width * words <= SMALL_BITS
    if not small:
        return 0.0, int(block_rams(np.array(width), np.array(words)))
    pieces = math.ceil(words / RAM_WORDS[family])
    return 4 * math.ceil(width / 4) * pieces + width * (pieces - 1) if words > 1 else 0.0, 0


def _bits(count: int) -> int:
    return max(0, count - 1).bit_length()
