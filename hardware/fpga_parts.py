"""The parts of a matrix-vector-threshold unit, counted from its parameters: what the resource formula puts prices on.

All functions take arrays over units; a part is counted in the look-up tables or flip-flops that it plainly needs, so
that fitted prices stay near one.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .mvtu import SCALE_BITS, THRESHOLD_BITS

LUT_INPUTS = {"ecp5": 4, "xc7": 6}
JOINED = {4: 16, 6: 256}  # words of a table without further look-up tables; multiplexers of the 7 series join four
DISTRIBUTED_DEPTH = 64  # input buffers of more words take block RAM
LEVELS = 8  # of the adder tree, for 256 inputs a cycle


def clog2(values: np.ndarray) -> np.ndarray:
    """Bits that tell `values` things apart."""
    return np.ceil(np.log2(np.maximum(values, 1))).astype(np.int64)


BLOCKS = ((36, 512), (18, 1024), (9, 2048), (4, 4096), (2, 8192), (1, 16384))  # bits and words of 18 kbit


def block_rams(width: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Blocks of 18 kbit for a memory: of one shape, but for the columns that are left, which may take another."""

    def plain(bits_wanted: np.ndarray) -> np.ndarray:
        return np.min([-(-bits_wanted // bits) * -(-depth // words) for bits, words in BLOCKS], axis=0)

    mixed = [width // bits * -(-depth // words) + plain(width % bits) for bits, words in BLOCKS]
    return np.asarray(np.min([plain(width), *mixed], axis=0))


def _adder(width: np.ndarray, family: str) -> np.ndarray:
    """Look-up tables of an adder; the ECP5's carry cells come in pairs, with one pair to enter and one to leave."""
    if family == "xc7":
        return width
    return np.where(width <= 3, width, np.where(width == 4, 7, 2 * ((width + 1) // 2) + 4))


def _columns(width: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Columns of a memory with random contents that differ: shallow ones hold the same column more than once."""
    kinds = 2.0 ** np.minimum(depth, 16)
    occur = kinds * -np.expm1(width * np.log1p(-1 / kinds))
    return np.where(depth <= 16, np.minimum(occur, kinds - 2), width)  # two are constant


def _read_only(width: np.ndarray, depth: np.ndarray, family: str) -> tuple[np.ndarray, np.ndarray]:
    """(look-up tables, those that join them) of a memory with random contents."""
    inputs = LUT_INPUTS[family]
    tables = np.where(depth > 2, _columns(width, depth) * np.ceil(depth / 2**inputs), 0)
    return tables, width * np.maximum(np.ceil(depth / JOINED[inputs]) - 1, 0)


class Shape:
    """Sizes within a unit that several parts depend on."""

    def __init__(self, units: Mapping[str, np.ndarray]) -> None:
        self.pe, self.simd, self.w, self.a = (units[name].astype(np.int64) for name in ("pe", "simd", "w", "a"))
        self.o, self.acc = units["o"].astype(np.int64), units["acc"].astype(np.int64)
        self.steps, self.groups = units["mw"] // self.simd, units["mh"] // self.pe
        self.xnor = (self.w == 1) & (self.a == 1)
        self.halves = (self.w == 1) & (self.a > 1)
        self.products = np.where(self.xnor, (self.simd + 1) // 2, self.simd)
        self.product_bits = np.where(self.xnor, 2, np.where(self.w == 1, self.a, self.w + self.a))
        # An input of one bit leaves the weight as it is.
        self.product_bits = np.where((self.w > 1) & (self.a == 1), self.w, self.product_bits)
        self.levels = clog2(self.products)
        self.dots = self.pe + self.halves  # dot products a step: with weights of one bit one more, of the inputs alone
        self.counted = (self.o > 0) & (self.o <= THRESHOLD_BITS)
        self.rescaled = self.o > THRESHOLD_BITS
        after = np.where(self.o == 0, 0, np.where(self.counted, 2 * self.o, 4))
        latency = 5 + self.levels + self.halves + after
        self.queue = 2 ** clog2((latency + self.steps) // self.steps)
        self.out_bits = self.pe * np.where(self.o == 0, self.acc, self.o)
        # Of two places, synthesis makes registers where they are narrow.
        self.queue_in_luts = (self.queue > 2) | ((self.queue == 2) & (self.out_bits >= 32))
        self.in_bits = self.simd * self.a
        self.weight_bits = self.pe * self.simd * self.w
        self.kept = (self.groups > 1) & (self.steps > 1)
        self.kept_in_luts = self.kept & (self.steps <= DISTRIBUTED_DEPTH)
        self.in_luts = units["memory"] != "block"
        self.multiplied = units["dsp"].astype(bool)
        self.counter_bits = clog2(self.steps) + 2 * clog2(self.groups) + clog2(self.steps * self.groups)


def _tree(shape: Shape, family: str) -> dict[str, np.ndarray]:
    """Of one dot product: look-up tables in its adders, registers behind them."""
    luts, registers = np.zeros(len(shape.pe)), np.zeros(len(shape.pe))
    before, bits = shape.products, shape.product_bits
    for _ in range(LEVELS):
        pairs = np.where(before > 1, before // 2, 0)
        luts += pairs * _adder(bits + 1, family)
        registers += pairs * (bits + 1) + np.where(before > 1, before % 2, 0) * bits
        before, bits = (before + 1) // 2, bits + 1
    return {"luts": luts, "registers": registers}


def lut_parts(
    units: Mapping[str, np.ndarray], family: str, product: np.ndarray, rescaling: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Look-up tables by part.

    Args:
        product: of one product without the device's multipliers, [w - 1, a - 1].
        rescaling: of one row's requantisation without its table of factors: for accumulators of "acc" bits "hard" with
            the device's multipliers, "soft" without.
    """
    s = Shape(units)
    tree = _tree(s, family)
    hard = s.multiplied & (s.w > 1) & ((family == "ecp5") | (s.w + s.a >= 9))
    soft = np.where(hard, 0.0, product[s.w - 1, s.a - 1])
    rescaler = {name: np.interp(s.acc, rescaling["acc"], rescaling[name]) for name in ("hard", "soft")}
    weights, weight_joins = _read_only(s.weight_bits, s.steps * s.groups, family)
    thresholds, threshold_joins = np.zeros(len(s.pe)), np.zeros(len(s.pe))
    for bit in range(THRESHOLD_BITS):
        tables, joins = _read_only(s.acc - 1, s.groups * 2**bit, family)  # the sign is told by the next bit
        reached = s.counted & (bit < s.o)
        thresholds += np.where(reached, s.pe * tables, 0)
        threshold_joins += np.where(reached, s.pe * joins, 0)
    entries, entry_joins = _read_only(s.pe * (2 * SCALE_BITS + s.o), s.groups, family)
    small = family == "xc7"  # where a look-up table of six inputs does what takes two or three of four
    packed = small & hard  # Yosys puts adders behind multipliers into the 7 series' multiplier blocks
    words, bits, luts = (32, 6, 4) if small else (16, 4, 6)  # of a RAM in look-up tables
    return {
        "unit": np.full(len(s.pe), 20.0),
        "products": s.dots * s.products * soft,
        "tree": np.where(packed, 0, s.dots * tree["luts"]),
        "tree behind multipliers": np.where(packed, 0.6 * s.dots * tree["luts"], 0),
        "accumulators": s.dots * (s.acc if small else _adder(s.acc, family) + s.acc),
        "halves": s.halves * s.pe * _adder(s.acc, family),
        "weights": np.where(s.in_luts, weights, 0),
        "weight joins": np.where(s.in_luts, weight_joins, 0),
        "block joins": np.where(s.in_luts, 0, s.weight_bits * (np.ceil(s.steps * s.groups / BLOCKS[0][1]) - 1)),
        "comparators": s.counted * s.pe * s.o * (0.5 * s.acc if small else _adder(s.acc, family)),
        "thresholds": thresholds,
        "threshold joins": threshold_joins,
        "hard rescaling": s.rescaled * s.pe * s.multiplied * rescaler["hard"],
        "soft rescaling": s.rescaled * s.pe * (~s.multiplied & (s.groups > 2)) * rescaler["soft"],
        "constant rescaling": s.rescaled * s.pe * (~s.multiplied & (s.groups <= 2)) * rescaler["soft"],
        "entries": np.where(s.rescaled, entries, 0) + np.where(s.rescaled, entry_joins, 0),
        "input memory": np.where(s.kept_in_luts, luts * np.ceil(s.in_bits / bits) * np.ceil(s.steps / words), 0),
        "input joins": np.where(s.kept_in_luts, s.in_bits * (np.ceil(s.steps / words) - 1), 0),
        "input choice": np.where(s.kept, s.in_bits, 0),
        "queue memory": np.where(s.queue_in_luts, luts * np.ceil(s.out_bits / bits) * np.ceil(s.queue / words), 0),
        "queue choice": np.where((s.queue == 2) & ~s.queue_in_luts, s.out_bits, 0),
        "queue control": np.where(s.queue == 1, 5, np.where(s.queue == 2, 16, 24 + 6 * np.log2(s.queue)))
        * (0.5 if small else 1),
        "counters": (1.5 if small else 4) * s.counter_bits,
    }


def ff_parts(units: Mapping[str, np.ndarray], family: str) -> dict[str, np.ndarray]:
    """Flip-flops by part."""
    s = Shape(units)
    tree = _tree(s, family)
    # Yosys puts the registers about a multiplier of the 7 series into it.
    packed = (family == "xc7") & s.multiplied & (s.w > 1) & (s.w + s.a >= 9)
    rescaled = s.rescaled & ~((family == "xc7") & s.multiplied)
    columns = np.where(s.in_luts, 2 * _columns(s.weight_bits, s.steps * s.groups), s.weight_bits)
    thresholds, totals, known = (np.zeros(len(s.pe)) for _ in range(3))
    for bit in range(THRESHOLD_BITS):
        reached = s.counted & (bit < s.o)
        thresholds += np.where(reached & (s.groups * 2**bit > 1), _columns(s.acc - 1, s.groups * 2**bit), 0)
        totals += np.where(reached, s.acc * np.where(bit + 1 < s.o, 2, 1), 0)
        known += np.where(reached, 2 * bit + 1, 0)
    entries = _columns(s.pe * (2 * SCALE_BITS + s.o), s.groups)
    return {
        "unit": np.ones(len(s.pe)),
        "weights": np.where(packed, np.maximum(columns - s.weight_bits, 0), columns),
        "inputs": s.in_bits * (2 + s.kept_in_luts),
        "products": np.where(packed, 0, s.dots * s.products * s.product_bits),
        "tree": np.where(packed, 0, s.dots * tree["registers"]),
        "tree behind multipliers": np.where(packed, 0.6 * s.dots * tree["registers"], 0),
        "accumulators": s.dots * s.acc + s.halves * s.pe * s.acc,
        "thresholds": s.pe * thresholds,
        "totals": s.pe * totals,
        "known": s.pe * known,
        "entries": np.where(s.rescaled & (s.groups > 1), entries, 0),
        "rescaling": rescaled * s.pe * (4 * s.acc + s.o),
        "rescaling in multipliers": (s.rescaled & ~rescaled) * s.pe * 20,
        "queue": np.where(s.queue_in_luts, 0, s.queue * s.out_bits),
        "counters": s.counter_bits + 4 * np.log2(s.queue) + 2 * s.levels + np.where(s.counted, 2 * s.o, 0),
    }


def bram(units: Mapping[str, np.ndarray]) -> np.ndarray:
    """Blocks of 18 kbit: weights where they are asked to be there, and long inputs that several row groups read."""
    s = Shape(units)
    depth = s.steps * s.groups
    # In a memory of few words some columns are constant and need no place.
    varying = np.ceil(s.weight_bits * (1 - 2.0 ** (1 - np.minimum(depth, 60)))).astype(np.int64)
    weights = np.where(s.in_luts, 0, block_rams(varying, depth))
    return weights + np.where(s.kept & ~s.kept_in_luts, block_rams(s.in_bits, s.steps), 0)


def dsp(units: Mapping[str, np.ndarray], family: str) -> np.ndarray:
    """Multipliers: one for each product of weights of more than one bit, and those that requantise."""
    s = Shape(units)
    # A product one bit wider than the multiplier has that bit done in look-up tables.
    widest = 18 if family == "ecp5" else 25
    # On the 7 series, Yosys leaves products of less than 9 bits to look-up tables.
    hard = (s.w > 1) & ((family == "ecp5") | (s.w + s.a >= 9))
    each = np.where(hard, s.simd, 0) + np.where(s.rescaled, np.ceil((s.acc - 1) / widest), 0)
    return np.where(s.multiplied, s.pe * each, 0).astype(np.int64)


def clock_parts(units: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What lengthens the slowest path, for a sum in nanoseconds."""
    s = Shape(units)
    soft = np.where(s.multiplied | (s.w == 1), 0, s.w + s.a)
    cells = np.log2(s.dots * s.products * np.where(s.w == 1, s.a, s.w * s.a) + s.out_bits)
    return {
        "unit": np.ones(len(s.pe)),
        "carry": s.acc,
        "multiplier": soft,
        "hard multiplier": s.multiplied & ((s.w > 1) | s.rescaled),
        "hard multipliers": np.where(s.multiplied & (s.w > 1), np.log2(s.pe * s.simd), 0),
        "soft rescaling": s.rescaled & ~s.multiplied,
        "split rescaling": s.rescaled & s.multiplied & (s.acc > 18),
        "block RAM": ~s.in_luts | (s.kept & ~s.kept_in_luts),
        "weights": np.where(s.in_luts, np.log2(s.steps * s.groups), 0),
        "thresholds": np.where(s.counted, np.log2(s.groups) + s.o, 0),
        "size": cells,
        "queue": np.log2(s.queue),
    }
