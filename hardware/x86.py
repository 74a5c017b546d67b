"""Backends for the CPU of this machine: ONNX Runtime and OpenVINO.

A measurement is one process (`probe`) with the lane of this machine to itself, pinned to its cores; which of its runs
count is told in `timing`. One that can be doubted, since its interval is wider than asked, other work took the cores
or their clock drifted, is repeated; if every attempt can be, the best one counts, and flags say why to doubt it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..core.errors import CandidateError, InputError
from ..core.lane import LANE, pause_point
from ..core.registry import backend
from ..core.types import Artifact, Capabilities, Measurement, Method, Task
from ..tasks.data import cache_folder, example_input
from .asking import ask
from .device import cpu_name, has_bf16, has_int8_dot, provenance, usable_cores
from .onnx_export import export_onnx
from .power import POWERCAP, declared_watts, energy_figures, find_packages
from .runtimes import RUNTIMES
from .statistics import median_interval

METRICS = ("latency", "throughput", "memory")
ENERGY_METRICS = ("energy", "power", "idle_power")


@dataclass(frozen=True)
class CpuBackend:
    """One runtime on this machine's CPU; a file runs in bfloat16 if it has 16-bit layers and the CPU can.

    Attributes:
        runtime: "onnxruntime" or "openvino".
        threads: cores that a measurement is pinned to; 0 for all that this process may use.
        repeats: timed runs of a file at least; quick models get more, for up to `budget` seconds.
        limit: seconds after which a measurement counts as hanging.
        spread: width of the latency's interval, as a share of it, beyond which the measurement is repeated.
        attempts: measurements at most, where there is something to doubt.
        patience: seconds after which no further attempt begins.
        watts: power that a person declares, from which energy is then predicted; 0 for none.
        powercap: where Linux shows the energy counters.
    """

    runtime: str
    threads: int = 0
    repeats: int = 30
    budget: float = 0.3
    limit: float = 300.0
    spread: float = 0.1
    attempts: int = 3
    patience: float = 3.0
    watts: float = 0.0
    powercap: Path = POWERCAP

    @property
    def name(self) -> str:
        return f"x86/{self.runtime}"

    @property
    def capabilities(self) -> Capabilities:
        notes = [
            "int8 dot products: " + ("yes" if has_int8_dot() else "no, int8 may be slower than float"),
        ]
        eights: tuple[int | str, ...] = (8,) if has_int8_dot() else ()
        metrics: tuple[str, ...] = METRICS
        if self.watts:
            metrics += ("energy",)
            notes.append(f"energy: predicted from the declared {self.watts:g} W")
        elif find_packages(self.powercap):
            metrics += ENERGY_METRICS
        else:
            notes.append(f"energy: no counter can be read here; {self.name}:watts=15 predicts it from a declared power")
        if self.runtime == "openvino":
            notes.append("16-bit layers run in bfloat16" if has_bf16() else "no bfloat16: 16-bit layers run in float32")
            # A rounded output that several operations take is needed for right results: OpenVINO 2026.4 fuses
            # an int8 convolution with the additions behind it as if its values were unsigned.
            halves: tuple[int | str, ...] = (16, "bf16") if has_bf16() else ()
            fast = (*halves, *eights)
            return Capabilities((32, 16, 8), metrics, "shared", tuple(notes), fast=fast, method=Method.MEASURED)
        notes.append("16-bit layers are stored as float16 and run in float32")
        return Capabilities((32, 16, 8), metrics, "all", tuple(notes), fast=eights, method=Method.MEASURED)

    def missing(self) -> str | None:
        """What is not here and how to get it."""
        if platform.machine() not in ("x86_64", "AMD64"):
            return f"{self.name} needs an x86-64 processor; this one is {platform.machine()}"
        if importlib.util.find_spec(self.runtime) is None:
            return f"{self.name} needs the package {self.runtime}: pip install {self.runtime}"
        return None

    def build(self, model: nn.Module, task: Task, folder: Path) -> Artifact:
        """Write `model.onnx`, which both runtimes load as it is."""
        # ONNX Runtime rounds a layer's bias to the product of its scales; where a grid of few bits ends in the
        # DequantizeLinear itself, that product is too coarse. OpenVINO wants the opposite order.
        clip_last = self.runtime == "onnxruntime"
        return export_onnx(model, example_input(task.data), folder / "model.onnx", self.name, clip_last=clip_last)

    def predict(self, artifact: Artifact, inputs: np.ndarray) -> np.ndarray:
        """Logits (N, classes) of inputs as `normalise` makes them, in batches, on this process's share of the cores."""
        import torch

        size = min(len(inputs), max(1, min(128, int(2e7 / inputs[0].size))))
        try:
            run = RUNTIMES[self.runtime](str(artifact.path), size, torch.get_num_threads(), self._bf16(artifact))
            pieces = []
            for start in range(0, len(inputs), size):
                pause_point()
                piece = inputs[start : start + size]
                filled = (
                    np.concatenate([piece, np.repeat(piece[-1:], size - len(piece), 0)]) if len(piece) < size else piece
                )
                pieces.append(np.array(run(np.ascontiguousarray(filled)))[: len(piece)])
        except (CandidateError, TimeoutError, MemoryError):
            raise
        except Exception as error:  # each runtime has its own exceptions for files that it can't load or run
            raise CandidateError(f"{self.name} can't run the file: {_first_line(str(error))}") from error
        return np.concatenate(pieces)

    def measure(self, artifact: Artifact, task: Task, reference: Artifact | None) -> list[Measurement]:
        """Latency (and the reference's, taken in turns with it), throughput, peak memory and energy of one file.

        Everything else of autocompress on this machine pauses meanwhile. Latency: median over single
        images with the 95 % interval of the median, seconds. Memory: growth of resident bytes from
        loading the file and running it once. Energy: joules of all packages for one run, and their power
        while they run it and while they idle, watts; or latency times the declared power, whose interval
        takes that power as exact.
        """
        request = {
            "runtime": self.runtime,
            "path": str(artifact.path),
            "bf16": self._bf16(artifact),
            "reference": str(reference.path) if reference else "",
            "reference_bf16": bool(reference and self._bf16(reference)),
            "cores": self.cores,
            "input_shape": list(task.data.input_shape),
            "vocabulary": task.data.vocabulary,
            "repeats": self.repeats,
            "budget": self.budget,
            "powercap": "" if self.watts else str(self.powercap),
        }
        with LANE.exclusive():
            end = time.monotonic() + self.patience
            answer = self._attempt(request)
            for _ in range(self.attempts - 1):
                if _doubt(answer, self.spread) == (0, 0.0) or time.monotonic() > end:
                    break
                answer = min(answer, self._attempt(request), key=lambda one: _doubt(one, self.spread))
        return self._measurements(answer)

    def _attempt(self, request: dict[str, Any]) -> dict[str, Any]:
        """One measurement, which knows how near to each other these cores have been, and may see them nearer."""
        path = cache_folder() / "handover.json"
        known: dict[str, list[float]] = json.loads(path.read_text()) if path.is_file() else {}
        name = f"{cpu_name()}: {self.cores}"
        answer = ask("autocompress.hardware.probe", {**request, "handover": known.get(name, [])}, self.name, self.limit)
        if answer["handover"] != known.get(name, []):
            part = path.with_suffix(f".{os.getpid()}.part")
            part.write_text(json.dumps({**known, name: answer["handover"]}))
            part.replace(path)
        return answer

    def _measurements(self, answer: dict[str, Any]) -> list[Measurement]:
        source = provenance(f"{self.runtime} {self.version}", len(self.cores), Method.MEASURED)

        def figure(name: str, unit: str, values: list[float]) -> Measurement:
            value, ends = median_interval(values)
            width = (ends[1] - ends[0]) / value if value else 0.0
            wide = (f"interval {100 * width:.0f} % wide",) if width > self.spread else ()
            return Measurement(name, value, unit, ends, len(values), replace(source, flags=(*answer["doubts"], *wide)))

        found = [figure("latency", "s", answer["latency"])]
        if answer["reference"]:
            found.append(figure("reference_latency", "s", answer["reference"]))
        found.append(figure("throughput", "1/s", [answer["batch"] / seconds for seconds in answer["batch_times"]]))
        found.append(Measurement("memory", float(answer["memory"]), "B", None, 1, source))
        if answer["energy"]:
            found += [figure(name, unit, values) for name, (unit, values) in energy_figures(answer["energy"]).items()]
        if self.watts:
            latency = found[0]
            assert latency.ci95 is not None
            low, high = latency.ci95
            flags = (f"declared power {self.watts:g} W", *latency.provenance.flags)
            declared = replace(latency.provenance, method=Method.PREDICTED, flags=flags)
            ends = (self.watts * low, self.watts * high)
            found.append(Measurement("energy", self.watts * latency.value, "J", ends, latency.samples, declared))
        return found

    @property
    def cores(self) -> list[int]:
        """The cores that measurements are pinned to."""
        cores = usable_cores()
        if self.threads > len(cores):
            raise InputError(f"threads: {self.threads} asked for, but this process may use {len(cores)} cores")
        return cores[: self.threads or len(cores)]

    @property
    def version(self) -> str:
        """Version of the runtime."""
        return importlib.metadata.version("apache-tvm" if self.runtime == "tvm" else self.runtime)

    def _bf16(self, artifact: Artifact) -> bool:
        if self.runtime != "openvino" or not has_bf16():
            return False
        return any(entry["weight"] in (16, "bf16") for entry in artifact.bits.values())


def _doubt(answer: dict[str, Any], spread: float) -> tuple[int, float]:
    """How much to doubt an answer: number of reasons, then width of the widest interval; (0, 0.0) for not at all."""
    width = 0.0
    for values in (answer["latency"], answer["reference"]):
        if values:
            value, (low, high) = median_interval(values)
            width = max(width, (high - low) / value)
    doubts = len(answer["doubts"])
    return doubts, width if width > spread or doubts else 0.0


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[0][:300]


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1][:300]


@backend("x86/onnxruntime")
def onnxruntime_backend(threads: int = 0, device: str = "") -> CpuBackend:
    """ONNX Runtime, CPU provider; a device "watts=15" declares the power."""
    return CpuBackend("onnxruntime", threads, watts=declared_watts(device))


@backend("x86/openvino")
def openvino_backend(threads: int = 0, device: str = "") -> CpuBackend:
    """OpenVINO, CPU plugin; a device "watts=15" declares the power."""
    return CpuBackend("openvino", threads, watts=declared_watts(device))
