"""How a CPU runs a fused function of TVM where nothing was tuned: tiles in registers, vectors, threads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

REGISTERS = 256  # float32 values of a tile: half of what 32 registers of 512 bits hold
LANES = 32  # values of a tile along the innermost dimension, where something near divides it
WIDEST = 96  # innermost dimensions up to here, without such a divisor, are taken whole
THREADED = 50_000  # operations of a function from which a second thread repays its start
REDUCE = 2  # TVM's number for iterations that are summed over


class Unfit(Exception):
    """A function that a plan is not meant for."""


def schedule_functions(module: Any) -> Any:
    """Schedule every function that has no schedule yet; returns the module.

    TVM's own rules for CPUs know products of a matrix and a vector alone. Without a schedule the loops run as they
    are written, on one thread: ResNet-20 then takes fifty times what ONNX Runtime takes.

    Args:
        module: a `tvm.ir.IRModule`, legalized and fused.
    """
    from tvm.tirx import PrimFunc

    for name, function in module.functions_items():
        if isinstance(function, PrimFunc) and not function.attrs.get("tirx.is_scheduled", False):
            module[name] = scheduled(function)
    return module


def scheduled(function: Any) -> Any:
    """One function with a schedule, or as it is where no plan fits."""
    from tvm import ir, s_tir
    from tvm.s_tir.schedule.schedule import ScheduleError

    for plan in (_tile_the_sum, _each_alone):
        schedule = s_tir.Schedule(ir.IRModule({"main": function}))
        try:
            plan(schedule)
        except (ScheduleError, Unfit):
            continue  # left half done: the next plan starts anew
        return schedule.mod["main"].with_attr("tirx.is_scheduled", True)
    return function


def _tile_the_sum(schedule: Any) -> None:
    """One reduction, such as a convolution, with what follows it: each tile of the result is summed in registers."""
    blocks = schedule.get_child_blocks(schedule.get_sblock("root"))
    kinds = [[axis.iter_type for axis in schedule.get(block).iter_vars] for block in blocks]
    sums = [place for place, kind in enumerate(kinds) if REDUCE in kind]
    if len(sums) != 1:
        raise Unfit
    (place,) = sums
    main, kind, after = blocks[place], kinds[place], blocks[place + 1 :]
    work = math.prod(_extents(schedule, schedule.get_loops(main)))
    for block in after[:-1]:
        schedule.compute_inline(block)
    for block in blocks[:place]:
        _spread(schedule, block)
    last = after[-1] if after else schedule.cache_write(main, 0, "global")

    outer, inner = _split(schedule, schedule.get_loops(last))
    every = schedule.fuse(*outer)
    schedule.vectorize(inner[-1])
    schedule.compute_at(main, every, preserve_unit_loops=True)
    loops = schedule.get_loops(main)[1:]
    spatial = [loop for loop, number in zip(loops, kind, strict=True) if number != REDUCE]
    reduced = [loop for loop, number in zip(loops, kind, strict=True) if number == REDUCE]
    extents = _extents(schedule, spatial)
    if math.prod(extents) > 2 * REGISTERS:
        raise Unfit
    schedule.reorder(*reduced, *spatial)
    _in_registers(schedule, spatial)
    if work > THREADED:
        schedule.parallel(every)
    # Last, as TVM refuses vectors and threads for a block that adds alone; what starts the sum inherits them.
    schedule.decompose_reduction(main, reduced[0])


def _in_registers(schedule: Any, loops: Sequence[Any]) -> None:
    """Unroll a tile's loops around the innermost one, which becomes vectors."""
    wide = [loop for loop, extent in zip(loops, _extents(schedule, loops), strict=True) if extent > 1]
    for loop in wide[:-1]:
        schedule.unroll(loop)
    if wide:
        schedule.vectorize(wide[-1])


def _each_alone(schedule: Any) -> None:
    """Every block by itself; sums run as they are written, but on all threads."""
    for block in schedule.get_child_blocks(schedule.get_sblock("root")):
        _spread(schedule, block)


def _spread(schedule: Any, block: Any) -> None:
    """Threads take the outer loops of a block; where it sums nothing, vectors take the innermost one."""
    kinds = [axis.iter_type for axis in schedule.get(block).iter_vars]
    loops = schedule.get_loops(block)
    if len(loops) != len(kinds):
        return  # scheduled already, or with loops of its own
    work = math.prod(_extents(schedule, loops))
    if REDUCE in kinds:
        free = kinds.index(REDUCE)
        if free and work > THREADED:
            schedule.parallel(schedule.fuse(*loops[:free]))
        return
    rest, last = loops[:-1], loops[-1]
    lanes = _divisor(_extents(schedule, [last])[0], LANES)
    if lanes >= 4:
        outside, last = schedule.split(last, [None, lanes])
        schedule.vectorize(last)
        rest = [*rest, outside]
    if rest and work > THREADED:
        schedule.parallel(schedule.fuse(*rest))


def _split(schedule: Any, loops: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Loops over tiles, and those within a tile: the two innermost dimensions that are longer than one."""
    extents = _extents(schedule, loops)
    wide = [place for place, extent in enumerate(extents) if extent > 1][-2:]
    if not wide:
        raise Unfit
    lanes = _divisor(extents[wide[-1]], LANES)
    if lanes < 8 and extents[wide[-1]] <= WIDEST:
        lanes = extents[wide[-1]]
    sizes = {wide[-1]: lanes}
    if len(wide) == 2:
        sizes[wide[0]] = _divisor(extents[wide[0]], max(1, REGISTERS // max(16, lanes)))
    outer, inner = [], []
    for place, loop in enumerate(loops):
        if place in sizes:
            outside, inside = schedule.split(loop, [None, sizes[place]])
            outer.append(outside)
            inner.append(inside)
        else:
            outer.append(loop)
    schedule.reorder(*outer, *inner)
    return outer, inner


def _divisor(extent: int, limit: int) -> int:
    """The largest divisor of `extent` up to `limit`."""
    return next(size for size in range(min(extent, limit), 0, -1) if extent % size == 0)


def _extents(schedule: Any, loops: Sequence[Any]) -> list[int]:
    from tvm.tirx import IntImm

    extents = [schedule.get(loop).extent for loop in loops]
    if not all(isinstance(extent, IntImm) for extent in extents):
        raise Unfit
    return [int(extent) for extent in extents]
