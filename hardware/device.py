"""This machine: its processor, its cores, and what they compute fast."""

from __future__ import annotations

import datetime
import functools
import os
import platform
from pathlib import Path

from ..core.types import Method, Provenance


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Instruction-set flags as Linux names them; empty where they can't be read."""
    return frozenset(_cpuinfo("flags").split())


@functools.cache
def cpu_name() -> str:
    """The processor's model name."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(key: str) -> str:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return ""
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def has_bf16() -> bool:
    """Whether the cores multiply bfloat16 in hardware."""
    return bool(cpu_flags() & {"avx512_bf16", "amx_bf16"})


def has_int8_dot() -> bool:
    """Whether the cores have 8-bit dot products (VNNI or AMX)."""
    return bool(cpu_flags() & {"avx512_vnni", "avx_vnni", "amx_int8"})


def usable_cores() -> list[int]:
    """Numbers of the cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


def provenance(
    runtime: str, threads: int = 0, method: Method = Method.MEASURED, flags: tuple[str, ...] = ()
) -> Provenance:
    """Where a figure taken here and now comes from; no threads are named where they do not change it."""
    taken_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    used = f", {threads} thread{'s' if threads > 1 else ''}" if threads else ""
    return Provenance(method, cpu_name() + used, runtime, taken_at, flags)
