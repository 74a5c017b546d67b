"""The matrix-vector-threshold unit of `rtl/mvtu.sv`: the integer function it computes, its memory files, its timing."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import InputError

RTL = Path(__file__).parent / "rtl"
SCALE_BITS = 16  # signed, of requantisation
THRESHOLD_BITS = 4  # outputs of more bits are requantised: their thresholds would be too many
BLOCK_WORTH = 256  # look-up tables; an ECP5-85 has 402 for each of its block RAMs


@dataclass(frozen=True)
class Unit:
    """Parameters of one unit, named as in the module's header.

    Attributes:
        mw, mh: columns and rows of the matrix.
        pe, simd: rows and columns done in one cycle.
        w, a, o: bits of weights, inputs and outputs; `o` = 0 leaves accumulators.
        acc: bits of accumulators; 0 for as many as the largest sum needs.
        dsp: multiply in the device's multipliers rather than in look-up tables.
        memory: of the weights: "block", "distributed" (look-up tables), or "auto": blocks where each saves more than
            BLOCK_WORTH look-up tables.
        shift: right shift of requantisation, where `o` > 4.
    """

    mw: int
    mh: int
    pe: int
    simd: int
    w: int
    a: int
    o: int
    acc: int = 0
    dsp: bool = False
    memory: str = "auto"
    a_signed: bool = False
    o_signed: bool = False
    shift: int = 16

    def __post_init__(self) -> None:
        if min(self.mw, self.mh, self.pe, self.simd, self.w, self.a) < 1 or self.o < 0:
            raise InputError(f"mw, mh, pe, simd, w and a are at least 1 and o at least 0; got {self}")
        if self.mw % self.simd or self.mh % self.pe:
            raise InputError(
                f"SIMD divides the {self.mw} columns and PE the {self.mh} rows; got SIMD {self.simd}, PE {self.pe}"
            )
        if self.memory not in ("auto", "block", "distributed"):
            raise InputError(f"memory is auto, block or distributed; got {self.memory!r}")
        if not self.acc:
            object.__setattr__(self, "acc", accumulator_bits(self.mw, self.w, self.a, self.a_signed))

        if self.memory == "auto":
            bits, steps = self.pe * self.simd * self.w, self.interval
            worth = bits * steps / 16 > BLOCK_WORTH * block_rams(bits, steps)
            object.__setattr__(self, "memory", "block" if worth else "distributed")

    @property
    def interval(self) -> int:
        """Cycles from one vector to the next."""
        return (self.mw // self.simd) * (self.mh // self.pe)

    @property
    def latency(self) -> int:
        """Cycles from the last step of a row group to its output beat."""
        xnor = self.w == 1 and self.a == 1
        levels = ceil(log2(ceil(self.simd / 2) if xnor else self.simd))
        after = 0 if self.o == 0 else 2 * self.o if self.o <= THRESHOLD_BITS else 4
        return 5 + levels + int(self.w == 1 and self.a > 1) + after

    @property
    def depth(self) -> int:
        """Row groups that may be under way or wait at the output."""
        steps = self.mw // self.simd
        return 1 << ceil(log2((self.latency + steps) // steps))

    def parameters(self, weights: str, thresholds: str) -> dict[str, int | str]:
        """Of the module, by name; the arguments name its memory files."""
        return {
            "MW": self.mw, "MH": self.mh, "PE": self.pe, "SIMD": self.simd, "W": self.w, "A": self.a, "ACC": self.acc,
            "O": self.o, "WEIGHTS": weights, "THRESHOLDS": thresholds, "RAM_STYLE": self.memory,
            "A_SIGNED": int(self.a_signed), "O_SIGNED": int(self.o_signed), "SHIFT": self.shift,
        }  # fmt: skip


def accumulator_bits(mw: int, w: int, a: int, a_signed: bool = False) -> int:
    """Bits of a signed number that holds every sum of `mw` products of `w`-bit weights and `a`-bit inputs."""
    weight = 1 if w == 1 else 2 ** (w - 1)
    value = 1 if w == 1 and a == 1 else 2 ** (a - 1) if a_signed else 2**a - 1
    return int(mw * weight * value).bit_length() + 1


def block_rams(width: int, depth: int) -> int:
    """Blocks of 18 kbit for a memory: by 36 bits to 512 words, then by 18, 9, 4, 2 or 1 for each doubling of depth."""
    shapes = [(36, 512), (18, 1024), (9, 2048), (4, 4096), (2, 8192), (1, 16384)]
    return min(-(-width // bits) * -(-depth // words) for bits, words in shapes)


def compute(unit: Unit, weights: np.ndarray, inputs: np.ndarray, thresholds: np.ndarray | None = None) -> np.ndarray:
    """What the unit puts out, in integers.

    Args:
        weights: (MH, MW): signed integers of W bits; -1 and +1 where W is 1.
        inputs: (vectors, MW): integers of A bits; -1 and +1 where W and A are 1.
        thresholds: O of 1 to 4: (MH, 2**O - 1), ascending in each row. O above 4: (MH, 2): scale and offset.

    Returns:
        int64, (vectors, MH).
    """
    sums = inputs.astype(np.int64) @ weights.astype(np.int64).T
    half = 1 << (unit.acc - 1)
    sums = (sums + half) % (2 * half) - half
    if unit.o == 0:
        return sums
    if thresholds is None:
        raise InputError(f"outputs of {unit.o} bits need thresholds")
    low = -(1 << (unit.o - 1)) if unit.o_signed else 0
    if unit.o <= THRESHOLD_BITS:
        return (sums[:, :, None] >= thresholds[None]).sum(2) + low
    scale, offset = thresholds[:, 0].astype(np.int64), thresholds[:, 1].astype(np.int64)
    return np.clip((sums * scale + offset) >> unit.shift, low, low + (1 << unit.o) - 1)


def write_memories(
    unit: Unit, weights: np.ndarray, thresholds: np.ndarray | None, folder: Path, name: str
) -> dict[str, int | str]:
    """Write the memory files of a unit into `folder`; arrays as for `compute`.

    Returns:
        the module's parameters, file names in them without the folder.
    """
    if weights.shape != (unit.mh, unit.mw):
        raise InputError(f"weights have shape ({unit.mh}, {unit.mw}); got {weights.shape}")
    files = (f"{name}_weights.hex", f"{name}_thresholds.hex")
    bits = (weights > 0).astype(np.int64) if unit.w == 1 else weights.astype(np.int64)
    rows, columns = unit.mh // unit.pe, unit.mw // unit.simd
    words = bits.reshape(rows, unit.pe, columns, unit.simd).transpose(0, 2, 1, 3).reshape(rows * columns, -1)
    _write_words(folder / files[0], words, unit.w)
    if unit.o == 0:
        return unit.parameters(*files)
    wanted = 2**unit.o - 1 if unit.o <= THRESHOLD_BITS else 2
    if thresholds is None or thresholds.shape != (unit.mh, wanted):
        raise InputError(f"thresholds have shape ({unit.mh}, {wanted}); got {getattr(thresholds, 'shape', None)}")
    values = thresholds.astype(np.int64).reshape(rows, unit.pe, wanted)
    if unit.o <= THRESHOLD_BITS:
        if (np.diff(values, axis=2) < 0).any():
            raise InputError("thresholds of a row ascend")
        padded = np.zeros((unit.pe, 1 << ceil(log2(rows)), wanted + 1), np.int64)
        padded[:, :rows, 1:] = values.transpose(1, 0, 2)
        _write_words(folder / files[1], padded.reshape(-1, 1), unit.acc)
    else:
        wide = max(unit.acc + SCALE_BITS, unit.shift + unit.o + 1)
        if (abs(values[..., 0]) >> (SCALE_BITS - 1)).any() or (abs(values[..., 1]) >> (wide - 1)).any():
            raise InputError(f"scales fit in {SCALE_BITS} and offsets in {wide} signed bits")
        entries = [
            sum(_unsigned(int(number), size) << place for number, size, place in _fields(row, wide)) for row in values
        ]
        _write_lines(folder / files[1], entries, unit.pe * (wide + SCALE_BITS))
    return unit.parameters(*files)


def _fields(row: np.ndarray, wide: int) -> list[tuple[Any, int, int]]:
    """(number, bits, place) of the scales and offsets of one row group."""
    entry = wide + SCALE_BITS
    scales = [(scale, SCALE_BITS, p * entry) for p, (scale, _) in enumerate(row)]
    return scales + [(offset, wide, p * entry + SCALE_BITS) for p, (_, offset) in enumerate(row)]


def _unsigned(number: int, bits: int) -> int:
    """Two's complement."""
    return number & ((1 << bits) - 1)


def _write_words(path: Path, words: np.ndarray, bits: int) -> None:
    """One line a row of `words`, the first number in the lowest bits."""
    lines = [sum(_unsigned(int(number), bits) << (place * bits) for place, number in enumerate(row)) for row in words]
    _write_lines(path, lines, words.shape[1] * bits)


def _write_lines(path: Path, words: list[int], bits: int) -> None:
    digits = -(-bits // 4)
    path.write_text("".join(f"{word:0{digits}x}\n" for word in words))
