"""Any device for which there is a table of operators' times: `lookup:PATH.parquet`."""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..core.errors import InputError
from ..core.registry import BACKENDS, backend
from ..core.types import Artifact, Backend, Capabilities, Measurement, Method, Provenance, Task
from .lookup import LookupTable, read_table
from .operators import read_operators
from .x86 import CpuBackend

if TYPE_CHECKING:
    from torch import nn

NAME = "lookup"


@dataclass(frozen=True)
class LookupBackend:
    """Builds and runs files with the target that a table was made for, and looks their latency up in it.

    Where that target can't be used here, files are written for and run by ONNX Runtime. Nothing is timed, so a search
    needs no quiet machine.

    Attributes:
        path: of the table; "" where none was named.
        threads: for the runtime that runs the files here.
    """

    path: str
    threads: int = 0

    @property
    def name(self) -> str:
        return f"{NAME}:{self.path}" if self.path else NAME

    @property
    def capabilities(self) -> Capabilities:
        if not self.path:
            told = "needs a table: lookup:TABLE.parquet"
            return Capabilities((32, 16, 8), ("latency",), notes=(told,), method=Method.LOOKED_UP)
        table = _table(self.path)
        host, here = self._host
        able = host.capabilities
        notes = [f"latency looked up in {len(table.rows)} operators of {table.target} on {table.device}"]
        error = table.details.get("error")
        if error:
            notes.append(
                f"on {error['candidates']} networks that it was not made from, its mean error is {error['mape']:.1%}, "
                f"its rank correlation {error['spearman']:.3f}"
            )
        if not here:
            notes.append(f"{table.target} can't be used here: accuracy is that of ONNX Runtime on this machine")
        return dataclasses.replace(
            able,
            metrics=("latency",),
            notes=(*notes, *able.notes),
            emulated=able.emulated or not here,
            method=Method.LOOKED_UP,
        )

    @property
    def predicts_on(self) -> str:
        """The device of the table's target where it is here; "" for this machine."""
        host, _ = self._host
        return getattr(host, "predicts_on", "")

    @property
    def cores(self) -> list[int]:
        """The cores that files may run on here."""
        return CpuBackend("onnxruntime", self.threads).cores

    def missing(self) -> str | None:
        """What is not here and how to get it."""
        if not self.path:
            return (
                f"{NAME} needs a table of operators' times, as in {NAME}:TABLE.parquet; make one by `autocompress "
                "hardware profile`, or bring one in by `autocompress hardware import`"
            )
        if not Path(self.path).is_file():
            return f"{self.name}: there is no such file; make a table by `autocompress hardware profile`"
        if importlib.util.find_spec("onnxruntime") is None:
            return f"{self.name} runs its files by the package onnxruntime: pip install onnxruntime"
        return None

    def build(self, model: nn.Module, task: Task, folder: Path) -> Artifact:
        """Write the file as the table's target wants it."""
        host, _ = self._host
        return dataclasses.replace(host.build(model, task, folder), runtime=self.name)

    def predict(self, artifact: Artifact, inputs: np.ndarray) -> np.ndarray:
        """Logits (N, classes) of inputs as `normalise` makes them, by the table's target or ONNX Runtime."""
        host, _ = self._host
        return host.predict(artifact, inputs)

    def measure(self, artifact: Artifact, task: Task, reference: Artifact | None) -> list[Measurement]:
        """Latency of one file (and of the reference), looked up; flags name operators that were not measured."""
        found = [self._latency("latency", artifact)]
        if reference is not None:
            found.append(self._latency("reference_latency", reference))
        return found

    def _latency(self, name: str, artifact: Artifact) -> Measurement:
        table = _table(self.path)
        calls = read_operators(artifact.path)
        seconds, low, high, flags = table.lookup(calls)
        interval = None if low is None or high is None else (low, high)
        rows = [table.rows[key] for key in table.as_keys(calls) if key in table.rows]
        samples = min((row.samples for row in rows), default=0)
        method = table.details.get("method", Method.MEASURED)
        if method != Method.MEASURED:
            flags = (*flags, f"table of {method} figures")
        source = Provenance(Method.LOOKED_UP, table.device, table.runtime, table.taken_at, flags)
        return Measurement(name, seconds, "s", interval, samples, source)

    @property
    def _host(self) -> tuple[Backend, bool]:
        """What writes and runs files here, and whether it is what the table was made for."""
        target = _table(self.path).target
        name, colon, device = target.partition(":")
        if name in BACKENDS and name != NAME:
            make = BACKENDS.get(name)
            host: Backend = make(threads=self.threads, device=device) if colon else make(threads=self.threads)
            if host.missing() is None:
                return host, True
        return CpuBackend("onnxruntime", self.threads), False


_TABLES: dict[tuple[str, int], LookupTable] = {}


def _table(path: str) -> LookupTable:
    """The table, read anew where the file has changed."""
    file = Path(path)
    key = (path, file.stat().st_mtime_ns if file.is_file() else 0)
    if key not in _TABLES:
        table = read_table(file)
        if not table.rows:
            raise InputError(f"{path} has no operators; tables of whole architectures can't time a new network")
        _TABLES.clear()
        _TABLES[key] = table
    return _TABLES[key]


@backend(NAME)
def lookup_backend(threads: int = 0, device: str = "") -> LookupBackend:
    """A table of operators' times; `device` is its path."""
    return LookupBackend(device, threads)
