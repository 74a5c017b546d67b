"""What runs on this machine, what is missing, and how to get it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys

import psutil
from rich.console import Console
from rich.table import Table

from ..core.registry import BACKENDS
from . import targets as _targets  # noqa: F401  (registers them)
from .device import cpu_flags, cpu_name, has_bf16, has_int8_dot, usable_cores

# Families that are planned, with what is known about getting them here.
_PACKAGES = (
    "torch", "torchvision", "timm", "torch-pruning", "onnx", "onnxscript", "onnxruntime", "openvino", "optuna",
    "optuna-dashboard", "ray", "pandas", "plotly",
)  # fmt: skip


def report() -> None:
    """Print machine, targets and packages as tables."""
    console = Console(highlight=False)
    memory = psutil.virtual_memory()
    vector = [
        name
        for name in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8")
        if name in cpu_flags()
    ]
    console.print(
        f"{cpu_name()}, {len(usable_cores())} usable cores, {memory.total / 2**30:.0f} GiB memory, {platform.system()}"
    )
    console.print(f"Python {sys.version.split()[0]}; instructions: {', '.join(vector) or 'unknown'}")
    console.print(f"bfloat16 in hardware: {_yes(has_bf16())}; 8-bit dot products: {_yes(has_int8_dot())}")
    if os.getloadavg()[0] > 0.5 * len(usable_cores()):
        console.print(
            f"[yellow]load average {os.getloadavg()[0]:.1f}: other work on this machine blurs measurements[/yellow]"
        )

    targets = Table("target", "here", "bits", "measures", "notes", title="Targets")
    for name in BACKENDS:
        backend = BACKENDS.get(name)()
        missing = backend.missing()
        able = backend.capabilities
        bits = ", ".join(str(b) for b in able.bits)
        notes = missing or "; ".join(able.notes)
        targets.add_row(name, "no" if missing else "yes", bits, ", ".join(able.metrics), notes)
    console.print(targets)

    packages = Table("package", "version", title="Packages")
    for name in _PACKAGES:
        try:
            packages.add_row(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            packages.add_row(name, f"[red]missing[/red]: pip install {name}")
    console.print(packages)


def _yes(value: bool) -> str:
    return "yes" if value else "no"
