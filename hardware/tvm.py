"""Apache TVM on this machine's CPU: files are compiled, once for each processor, into libraries that are kept."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from ..core.errors import CandidateError, InputError
from ..core.lane import LANE, pause_point
from ..core.registry import backend
from ..core.types import Artifact, Capabilities, Measurement, Method, Task
from ..tasks.data import cache_folder
from .device import cpu_fingerprint, cpu_name, vector_features
from .power import declared_watts
from .runtimes import RUNTIMES
from .tvm_compile import Request, compile_libraries
from .x86 import CpuBackend

BATCH = 32  # inputs that `predict` and the throughput of quick models take at once
TRIALS = 64  # of `x86/tvm:tuned`
# Counts up when the same file is compiled in another way, so that earlier libraries are not taken for its own.
COMPILER = 2


@dataclass(frozen=True)
class TvmBackend:
    """TVM's relax compiler, for the processor that it runs on; artifacts are ONNX files, as for the other runtimes.

    TVM 0.27 computes files with rounded layers in float32, operator by operator as they are written: accuracy is as
    planned, speed is not better than that of the unrounded file.

    Attributes:
        threads: cores that a measurement is pinned to; 0 for all that this process may use.
        trials: schedules that MetaSchedule times for each function of a network, for single inputs; 0 takes what
            `tvm_schedule` knows without timing. Records are kept for each processor, and no function is tuned twice.
        watts: power that a person declares, from which energy is then predicted; 0 for none.
    """

    threads: int = 0
    trials: int = 0
    watts: float = 0.0

    @property
    def name(self) -> str:
        return f"x86/tvm:trials={self.trials}" if self.trials else "x86/tvm"

    @property
    def capabilities(self) -> Capabilities:
        tuning = (
            f"tuned: {self.trials} schedules timed for each function, minutes for each new network"
            if self.trials
            else "not tuned; x86/tvm:trials=64 times schedules of each function, which takes minutes"
        )
        return Capabilities(
            (32, 16),
            self._host.capabilities.metrics,
            notes=(
                "8-bit layers are computed in float32: right, but no faster",
                "16-bit layers are stored as float16 and run in float32",
                "compiling takes seconds for each new file; libraries are kept",
                tuning,
            ),
            fixed_shapes=True,
            method=Method.MEASURED,
        )

    @property
    def _host(self) -> CpuBackend:
        """What measures here; it is given folders of libraries in place of files."""
        return CpuBackend("tvm", self.threads, watts=self.watts)

    @property
    def cores(self) -> list[int]:
        """The cores that measurements are pinned to."""
        return self._host.cores

    def missing(self) -> str | None:
        """What is not here and how to get it."""
        if platform.machine() not in ("x86_64", "AMD64"):
            return f"{self.name} needs an x86-64 processor; this one is {platform.machine()}"
        packages = [("tvm", "apache-tvm")] + ([("xgboost", "xgboost-cpu")] if self.trials else [])
        for module, package in packages:
            if importlib.util.find_spec(module) is None:
                return f"{self.name} needs the package {package}: pip install 'autocompress[tvm]'"
        return None

    def build(self, model: nn.Module, task: Task, folder: Path) -> Artifact:
        """Write `model.onnx`, the file that ONNX Runtime gets too; it is compiled when it is first run."""
        artifact = CpuBackend("onnxruntime", self.threads).build(model, task, folder)
        return dataclasses.replace(artifact, runtime=self.name)

    def predict(self, artifact: Artifact, inputs: np.ndarray) -> np.ndarray:
        """Logits (N, classes) of inputs as `normalise` makes them, in batches, on this process's share of the cores."""
        import torch

        size = BATCH if len(inputs) > 1 else 1
        folder = self._compiled(artifact, {size, 1})
        try:
            run = RUNTIMES["tvm"](str(folder), size, torch.get_num_threads(), False)
            pieces = []
            for start in range(0, len(inputs), size):
                pause_point()
                piece = inputs[start : start + size]
                filled = np.concatenate([piece, np.repeat(piece[-1:], size - len(piece), 0)])
                pieces.append(run(np.ascontiguousarray(filled))[: len(piece)])
        except (RuntimeError, ValueError, TypeError) as error:  # what TVM raises for shapes, memory and libraries
            line = (str(error).strip().splitlines() or ["no message"])[0][:300]
            raise CandidateError(f"{self.name} can't run the file: {line}") from error
        return np.concatenate(pieces)

    def measure(self, artifact: Artifact, task: Task, reference: Artifact | None) -> list[Measurement]:
        """Latency, throughput, memory, and energy where it is known, taken as those of the other runtimes are.

        Libraries are made before: neither their compiler's time nor its memory counts.
        """
        made = [
            dataclasses.replace(entry, path=self._compiled(entry, {1, BATCH})) if entry else None
            for entry in (artifact, reference)
        ]
        assert made[0] is not None
        found = self._host.measure(made[0], task, made[1])
        if not self.trials:
            return found
        return [
            dataclasses.replace(
                m, provenance=dataclasses.replace(m.provenance, runtime=f"{m.provenance.runtime}, {self.trials} trials")
            )
            for m in found
        ]

    def _compiled(self, artifact: Artifact, batches: Iterable[int]) -> Path:
        """The folder of the file's libraries, with those for these batch sizes in it."""
        version, kept = importlib.metadata.version("apache-tvm"), cache_folder() / "tvm"
        made_for = f"{artifact.sha256}|{version}|{COMPILER}|{cpu_name()}|{vector_features()}|{self.trials}"
        if self.trials:
            made_for += f"|{len(self.cores)}"
        folder = kept / hashlib.sha256(made_for.encode()).hexdigest()[:20]
        device = f"{version}|{COMPILER}|{cpu_fingerprint()}|{len(self.cores)}"
        records = kept / "records" / hashlib.sha256(device.encode()).hexdigest()[:20]
        Request(str(artifact.path), self.trials, str(records), tuple(self.cores)).write(folder)
        try:
            if self.trials:
                with LANE.exclusive():  # what tuning times must have the cores to itself
                    compile_libraries(folder, [1])
            compile_libraries(folder, batches)
        except CandidateError as error:
            raise CandidateError(f"{self.name} can't compile the file: {error}") from error
        return folder


@backend("x86/tvm")
def tvm_backend(threads: int = 0, device: str = "") -> TvmBackend:
    """Apache TVM; a device "trials=64" tunes, "tuned" does so with 64, "watts=15" declares the power."""
    trials, watts = 0, 0.0
    for part in filter(None, device.split(",")):
        key, _, value = part.partition("=")
        if part == "tuned":
            trials = TRIALS
        elif key == "trials" and value.isdigit():
            trials = int(value)
        elif key == "watts":
            watts = declared_watts(part)
        else:
            raise InputError(f"x86/tvm:{device}: expected 'tuned', 'trials=N' or 'watts=N', got '{part}'")
    return TvmBackend(threads, trials, watts)
