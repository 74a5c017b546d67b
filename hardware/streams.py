"""Units of a streaming accelerator, as in `rtl/`: what they are called there, and when words move through them.

Two units share a stream: a word moves in the cycle in which its maker offers it and its taker is ready. Each unit
here tells, from the cycles in which its inputs are offered and its outputs are taken, when it takes its inputs and
offers its outputs. Every such rule takes maxima of cycles plus constants; `cycles.solve` finds the times that fit all.

Arrays of cycles are int64, one entry a word, for all images one after the other.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .mvtu import Unit as Mvtu

Times = np.ndarray
Several = tuple[Times, ...]


class Stage(Protocol):
    """A unit between streams.

    Attributes:
        module: of `rtl/`.
        takes, gives: words of each input and output for one image.
    """

    @property
    def module(self) -> str: ...

    @property
    def takes(self) -> tuple[int, ...]: ...

    @property
    def gives(self) -> tuple[int, ...]: ...

    @property
    def interval(self) -> int:
        """Cycles an image at least, if no other unit holds it up."""
        ...

    def times(self, offered: Several, taken: Several, left: Several) -> tuple[Several, Several]:
        """When the inputs are taken and the outputs offered.

        Args:
            offered: cycles in which the words of each input are offered.
            taken, left: cycles before which no word of an input, or of an output, moves, as far as is known.
        """
        ...


def paced(bounds: Times, steps: Times | int = 1) -> Times:
    """The earliest cycles that are no earlier than `bounds` and each at least a step after the one before it.

    Args:
        steps: cycles from each entry to the next; of an array, entry k is what lies between k - 1 and k.
    """
    offsets = np.arange(len(bounds)) * steps if isinstance(steps, int) else np.cumsum(steps)
    return offsets + np.maximum.accumulate(bounds - offsets)


def delayed(times: Times, words: int) -> Times:
    """For each word, the time of the one `words` before it; far in the past for the first ones."""
    shifted = np.full(len(times), -1 << 40, np.int64)
    shifted[words:] = times[: max(0, len(times) - words)]
    return shifted


@dataclass(frozen=True)
class Fifo:
    """`depth` words; `fast`: flip-flops or LUT RAM, otherwise block RAM behind a register (see `rtl/fifo.sv`)."""

    words: int
    bits: int
    depth: int = 2
    fast: bool = True

    module = "fifo"

    @property
    def takes(self) -> tuple[int, ...]:
        return (self.words,)

    @property
    def gives(self) -> tuple[int, ...]:
        return (self.words,)

    @property
    def interval(self) -> int:
        return self.words * (2 if self.depth == 1 and self.fast else 1)

    def times(self, offered: Several, taken: Several, left: Several) -> tuple[Several, Several]:
        if self.fast:
            accepted = paced(np.maximum(offered[0], delayed(left[0], self.depth) + 1))
            return (accepted,), (np.maximum(accepted + 1, delayed(left[0], 1) + 1),)
        pop = paced(np.maximum(np.maximum(offered[0], taken[0]) + 1, delayed(left[0], 1)))
        accepted = paced(np.maximum(offered[0], delayed(pop, self.depth) + 1))
        pop = paced(np.maximum(accepted + 1, delayed(left[0], 1)))
        return (accepted,), (pop + 1,)


@dataclass(frozen=True)
class Converter:
    """Width converter: `words` of `wide_in` elements become words of `wide_out`, one of which divides the other."""

    words: int
    bits: int
    wide_in: int
    wide_out: int

    module = "dwc"

    @property
    def takes(self) -> tuple[int, ...]:
        return (self.words,)

    @property
    def gives(self) -> tuple[int, ...]:
        return (self.words * self.wide_in // self.wide_out,)

    @property
    def interval(self) -> int:
        return max(self.takes + self.gives)

    def times(self, offered: Several, taken: Several, left: Several) -> tuple[Several, Several]:
        if self.wide_out >= self.wide_in:
            ratio = self.wide_out // self.wide_in
            bounds = offered[0].copy()
            bounds[::ratio] = np.maximum(bounds[::ratio], delayed(left[0], 1))
            accepted = paced(bounds)
            return (accepted,), (accepted[ratio - 1 :: ratio] + 1,)
        ratio = self.wide_in // self.wide_out
        accepted = paced(np.maximum(offered[0], delayed(left[0][ratio - 1 :: ratio], 1)), ratio)
        out = delayed(left[0], 1) + 1
        out[::ratio] = accepted + 1
        return (accepted,), (paced(out),)


@dataclass(frozen=True)
class Window:
    """Sliding window unit; sizes by (vertical, horizontal) as in `rtl/swu.sv`.

    Attributes:
        fold: words of a pixel.
        grouped: whether all positions of some channels follow each other, as depthwise layers want them.
        pad: value of positions outside the image.
    """

    bits: int
    lanes: int
    fold: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    before: tuple[int, int]
    out: tuple[int, int]
    grouped: bool = False
    pad: int = 0

    module = "swu"

    @property
    def rows(self) -> int:
        """Of the ring: writing goes on while the rows of a window are read."""
        needed = (self.kernel[0] - 1) * self.dilation[0] + 1 + self.stride[0]
        return 1 << (needed - 1).bit_length()

    @property
    def takes(self) -> tuple[int, ...]:
        return (self.size[0] * self.size[1] * self.fold,)

    @property
    def gives(self) -> tuple[int, ...]:
        return (self.out[0] * self.out[1] * self.kernel[0] * self.kernel[1] * self.fold,)

    @property
    def interval(self) -> int:
        return max(self.takes + self.gives)

    def times(self, offered: Several, taken: Several, left: Several) -> tuple[Several, Several]:
        needed, frees = _window_order(self)
        images = len(offered[0]) // self.takes[0]
        shift = np.arange(images)[:, None] * self.takes[0]
        # Windows outside the image need no word: they point behind the last one, which is always there.
        wanted = np.where(needed < 0, self.takes[0] * images, needed + shift).reshape(-1)
        bounds = np.maximum(offered[0], taken[0])
        ends = self.gives[0] // self.out[0]
        base = (frees + np.arange(images)[:, None] * self.size[0]).reshape(-1)
        # Row R may be written once the first row still needed is R - rows + 1 or later.
        row = np.arange(images * self.size[0]) - self.rows + 1
        event = np.searchsorted(base, row)
        written = paced(bounds)
        for _ in range(2):
            there = np.append(written, -1)
            issued = paced(np.maximum(there[wanted] + 1, delayed(left[0], 1)))
            read = np.append(issued[ends - 1 :: ends] + 1, 1 << 40)
            free = np.where(row <= 0, 0, read[event])
            written = paced(np.maximum(bounds, np.repeat(free, self.size[1] * self.fold)))
        there = np.append(written, -1)
        issued = paced(np.maximum(there[wanted] + 1, delayed(left[0], 1)))
        return (written,), (issued + 1,)


@functools.lru_cache(maxsize=512)
def _window_order(unit: Window) -> tuple[np.ndarray, np.ndarray]:
    """Of one image: the input word that each output word is (-1 for padding), and the first row that is still needed
    after each row of windows."""
    (height, width), fold = unit.size, unit.fold
    places = []
    for axis in (0, 1):
        start = np.arange(unit.out[axis]) * unit.stride[axis] - unit.before[axis]
        places.append(start[:, None] + np.arange(unit.kernel[axis]) * unit.dilation[axis])
    y, x = places[0][:, None, :, None, None], places[1][None, :, None, :, None]
    c = np.arange(fold)
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    index = np.where(inside, (y * width + x) * fold + c, -1)  # (oy, ox, ky, kx, c)
    order = index.transpose(0, 1, 4, 2, 3) if unit.grouped else index
    base = np.clip(np.arange(1, unit.out[0] + 1) * unit.stride[0] - unit.before[0], 0, height)
    base[-1] = height
    return order.reshape(1, -1), base


@dataclass(frozen=True)
class Matrix:
    """A matrix-vector-threshold unit (`rtl/mvtu.sv`) at `positions` pixels."""

    unit: Mvtu
    positions: int

    module = "mvtu"

    @property
    def takes(self) -> tuple[int, ...]:
        return (self.positions * self.unit.mw // self.unit.simd,)

    @property
    def gives(self) -> tuple[int, ...]:
        return (self.positions * self.unit.mh // self.unit.pe,)

    @property
    def interval(self) -> int:
        return self.positions * self.unit.interval

    def times(self, offered: Several, taken: Several, left: Several) -> tuple[Several, Several]:
        steps, groups = self.unit.mw // self.unit.simd, self.unit.mh // self.unit.pe
        return _credited(offered[0], left[0], steps, groups, self.unit.latency, self.unit.depth)


def _credited(
    offered: Times, left: Times, steps: int, groups: int, latency: int, depth: int
) -> tuple[Several, Several]:
    """Of units that issue `groups` groups of `steps` steps a vector, the first group's steps taking a word each."""
    credit = (delayed(left, depth) + 1).reshape(-1, groups)
    # What can wait: the steps of the first group, for a word, and the last step of each group, for a credit.
    bounds = np.concatenate([offered.reshape(-1, steps), credit[:, 1:]], 1)
    bounds[:, steps - 1] = np.maximum(bounds[:, steps - 1], credit[:, 0])
    apart = np.ones_like(bounds)
    apart[:, steps:] = steps
    issued = paced(bounds.reshape(-1), apart.reshape(-1)).reshape(bounds.shape)
    done = issued[:, steps - 1 :].reshape(-1) + latency
    return (issued[:, :steps].reshape(-1),), (np.maximum(done, delayed(left, 1) + 1),)


@dataclass(frozen=True)
class Depthwise:
    """A depthwise unit (`rtl/dwu.sv`) at `positions` pixels; `unit` has a channel's weights as columns, SIMD of 1."""

    unit: Mvtu
    positions: int

    module = "dwu"

    @property
    def takes(self) -> tuple[int, ...]:
        return (self.positions * self.unit.interval,)

    @property
    def gives(self) -> tuple[int, ...]:
        return (self.positions * self.unit.mh // self.unit.pe,)

    @property
    def interval(self) -> int:
        return self.takes[0]

    def times(self, offered: Several, taken: Several, left: Several) -> tuple[Several, Several]:
        return _credited(offered[0], left[0], self.unit.mw, 1, self.unit.latency, self.unit.depth)


@dataclass(frozen=True)
class Pool:
    """Largest value, or rescaled sum, of `count` positions of `fold` words, at `positions` pixels (`rtl/pool.sv`).

    Attributes:
        scale: (factor, offset, shift, lowest value) of the rescaling.
    """

    positions: int
    count: int
    fold: int
    lanes: int
    bits: int
    out_bits: int
    sums: bool = False
    scale: tuple[int, int, int, int] = (1, 0, 0, 0)

    module = "pool"

    @property
    def registers(self) -> int:
        """That a result goes through."""
        return 4 if self.sums else 1

    @property
    def takes(self) -> tuple[int, ...]:
        return (self.positions * self.count * self.fold,)

    @property
    def gives(self) -> tuple[int, ...]:
        return (self.positions * self.fold,)

    @property
    def interval(self) -> int:
        return self.takes[0]

    def times(self, offered: Several, taken: Several, left: Several) -> tuple[Several, Several]:
        last = np.arange(len(offered[0])).reshape(-1, self.count, self.fold)[:, -1].reshape(-1)
        bounds = offered[0].copy()
        after = last + 1
        within = after < len(bounds)
        # What comes next waits until a result leaves its first register.
        free = delayed(left[0], self.registers - 1)
        bounds[after[within]] = np.maximum(bounds[after[within]], free[within])
        accepted = paced(bounds)
        return (accepted,), (np.maximum(accepted[last] + self.registers, delayed(left[0], 1) + 1),)


@dataclass(frozen=True)
class Duplicator:
    """Every word to both outputs (`rtl/dup.sv`)."""

    words: int
    bits: int

    module = "dup"

    @property
    def takes(self) -> tuple[int, ...]:
        return (self.words,)

    @property
    def gives(self) -> tuple[int, ...]:
        return (self.words, self.words)

    @property
    def interval(self) -> int:
        return self.words

    def times(self, offered: Several, taken: Several, left: Several) -> tuple[Several, Several]:
        accepted = paced(np.maximum(offered[0], delayed(np.maximum(*left), 1)))
        return (accepted,), (accepted + 1, accepted + 1)


@dataclass(frozen=True)
class Adder:
    """Rescaled sum of two streams (`rtl/add.sv`).

    Attributes:
        scale: (factor of the first, factor of the second, offset, shift, lowest value).
    """

    words: int
    lanes: int
    bits: tuple[int, int]
    out_bits: int
    scale: tuple[int, int, int, int, int] = (1, 1, 0, 1, 0)

    module = "add"
    registers = 3

    @property
    def takes(self) -> tuple[int, ...]:
        return (self.words, self.words)

    @property
    def gives(self) -> tuple[int, ...]:
        return (self.words,)

    @property
    def interval(self) -> int:
        return self.words

    def times(self, offered: Several, taken: Several, left: Several) -> tuple[Several, Several]:
        issued = paced(np.maximum(np.maximum(*offered), delayed(left[0], self.registers)))
        return (issued, issued), (np.maximum(issued + self.registers, delayed(left[0], 1) + 1),)
