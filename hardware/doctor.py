"""What runs on this machine, what is missing, and how to get it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator, Sequence

import psutil
from rich import box
from rich.console import Console
from rich.table import Table

from ..core.registry import BACKENDS
from ..core.types import Backend
from .device import cpu_flags, cpu_name, has_bf16, has_int8_dot, usable_cores
from .targets import find_backend

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

    console.print(target_table())
    for line in (*note_lines(), *missing_lines()):
        console.print(line, soft_wrap=True, markup=False)

    packages = Table("package", "version", title="Packages")
    for name in _PACKAGES:
        try:
            packages.add_row(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            packages.add_row(name, f"[red]missing[/red]: pip install {name}")
    console.print(packages)


def target_table() -> Table:
    """Every target: whether it is here, how its figures are found, what they are, and what it computes in.

    Targets of a family that differ in nothing else share a row, one name a line.
    """
    table = Table(
        title="Targets",
        caption="kind: how latency is found; fast: what beats float32; fewer bits are simulated",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for name in ("target", "here", "kind", "figures", "bits", "fast"):
        table.add_column(name, no_wrap=name in ("target", "here", "kind"), overflow="fold")
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, backend in _targets():
        able = backend.capabilities
        fast = [_ranges(able.fast), *(f"{pattern} zeros" for pattern in able.sparsity)]
        cells = (
            "no" if backend.missing() else "yes",
            str(able.method or "-"),
            ", ".join(able.metrics) or "none",
            _ranges(able.bits),
            ", ".join(filter(None, fast)) or "-",
        )
        rows.setdefault((name.partition("/")[0], *cells), []).append(name)
    families = [family for family, *_ in rows]
    for (family, *shown), names, following in zip(rows, rows.values(), [*families[1:], ""], strict=True):
        table.add_row("\n".join(names), *shown, end_section=following != family)
    return table


def _ranges(formats: Sequence[int | str]) -> str:
    """Formats as a list; three or more whole numbers in a row as their ends: "8 to 1, 1.58"."""
    whole = [format for format in formats if isinstance(format, int)]
    if len(whole) < 3 or whole != list(range(whole[0], whole[-1] - 1, -1)):
        return ", ".join(map(str, formats))
    return ", ".join([f"{whole[0]} to {whole[-1]}", *(str(format) for format in formats if format not in whole)])


def note_lines() -> list[str]:
    """What a person should know of the targets that are here; those that share it are in one line."""
    lines: dict[str, list[str]] = {}
    for name, backend in _targets():
        if backend.missing() is None:
            for note in backend.capabilities.notes:
                lines.setdefault(note, []).append(name)
    return [f"{', '.join(_whole_families(names))}: {note}" for note, names in lines.items()]


def _whole_families(names: Sequence[str]) -> list[str]:
    """The names, with "fpga/*" for all targets of a family."""
    shown = []
    for name in names:
        family = name.partition("/")[0]
        every = [other for other in BACKENDS if other.startswith(f"{family}/")]
        shown.append(f"{family}/*" if len(every) > 1 and set(every) <= set(names) else name)
    return list(dict.fromkeys(shown))


def missing_lines() -> list[str]:
    """How to get the targets that are not here, each line once."""
    return list(dict.fromkeys(line for _, backend in _targets() if (line := backend.missing())))


def _targets() -> Iterator[tuple[str, Backend]]:
    return ((name, find_backend(name)) for name in BACKENDS)


def _yes(value: bool) -> str:
    return "yes" if value else "no"
