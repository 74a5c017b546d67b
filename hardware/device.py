"""This machine: its processor, its cores, and what they compute fast."""

from __future__ import annotations

import datetime
import functools
import os
from pathlib import Path

from ..core.types import Method, Provenance
from .board_state import board_name

ROOT = Path("/")
# What changes which kernels a runtime picks, from old to new; names of Linux on x86-64, then on 64-bit ARM.
VECTOR_FEATURES = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
    "amx_fp16", "asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2", "sme",
)  # fmt: skip


@functools.cache
def cpu_flags(root: Path = ROOT) -> frozenset[str]:
    """Instruction-set flags as Linux names them, of 64-bit ARM too; empty where they can't be read.

    Args:
        root: where the system's files are.
    """
    path = root / "proc/cpuinfo"
    if not path.exists():
        return frozenset()
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


@functools.cache
def cpu_name(root: Path = ROOT) -> str:
    """The processor's model; on ARM the board's name, where Linux knows it, and that of its cores."""
    return board_name(root)


def vector_features(root: Path = ROOT) -> tuple[str, ...]:
    """Which of `VECTOR_FEATURES` the cores have, as the system shows them."""
    return tuple(name for name in VECTOR_FEATURES if name in cpu_flags(root))


def cpu_fingerprint(root: Path = ROOT) -> str:
    """What tells one device from another where figures are kept: model, vector features, usable cores.

    Such as "AMD EPYC, avx2 avx512f avx512_vnni avx512_bf16, 2 cores".
    """
    count = len(usable_cores())
    features = " ".join(vector_features(root)) or "no vector features known"
    return f"{cpu_name(root)}, {features}, {count} core{'s' if count > 1 else ''}"


def has_bf16(root: Path = ROOT) -> bool:
    """Whether the cores multiply bfloat16 in hardware."""
    return bool(cpu_flags(root) & {"avx512_bf16", "amx_bf16", "bf16"})


def has_fp16(root: Path = ROOT) -> bool:
    """Whether the cores multiply float16 in hardware."""
    return bool(cpu_flags(root) & {"avx512_fp16", "amx_fp16", "asimdhp"})


def has_int8_dot(root: Path = ROOT) -> bool:
    """Whether the cores have 8-bit dot products (VNNI or AMX; on ARM the dot-product extension)."""
    return bool(cpu_flags(root) & {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"})


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
