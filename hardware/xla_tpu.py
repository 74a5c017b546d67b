"""Backends for Google's TPUs, by their own compiler: XLA compiles each file ahead of time, on any machine.

The compiler notes down how many cycles it expects of each operation. A file's latency is their sum, or the time that
the program's traffic takes at the bandwidth of the chip's memory, whichever is longer. Checked on ResNet-50 on one
core of a TPU v3, batches of 256: 8 % to 10 % fewer images a second than in the log of Google's submission to MLPerf
Training v0.5. Where the machine has the chip, the same program is timed on it instead.

Integers pay in batches: by this estimate, ResNet-18 with 8-bit layers takes 0.40 ms on a v5e where bfloat16 takes 0.24,
but 2.8 ms instead of 4.2 for 64 images. XLA does not join the rounding to an integer convolution as it does biases and
activations to one in floating point, and each kernel of its own costs a single image more than the products save.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto

from ..core.errors import CandidateError, InputError
from ..core.lane import LANE
from ..core.registry import BACKENDS
from ..core.types import Artifact, Capabilities, Measurement, Method, Provenance, Task
from ..tasks.data import cache_folder
from .asking import ask as ask_process
from .device import provenance
from .statistics import median_interval
from .tpu_chips import CHIPS, TpuChip, attached
from .x86 import CpuBackend

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class XlaTpuBackend:
    """A TPU, whose files are ONNX and are compiled by XLA when they are measured.

    Attributes:
        batch: size of the batches that throughput is taken for; 0 for none, as it takes a second compilation.
        threads: for ONNX Runtime, which runs the files here.
        repeats: timed runs of a file at least, where the chip is here.
        limit: seconds after which a compilation counts as hanging.
    """

    chip: TpuChip
    batch: int = 0
    threads: int = 0
    repeats: int = 50
    limit: float = 600.0

    @property
    def name(self) -> str:
        return f"tpu/{self.chip.name}"

    @property
    def capabilities(self) -> Capabilities:
        chip = self.chip
        share = f"{chip.error:.0%}".replace("%", " %")
        notes = [
            f"estimated by the XLA compiler for the TPU: within about {share}; the host's part (dispatch) is not in it",
            "floating point runs in bfloat16",
        ]
        if chip.pci and chip.pci in attached():
            notes[0] = "timed on the chip in this machine, the host's part (dispatch) included"
        if chip.one_core:
            notes.append(f"figures are of one of the chip's {chip.cores} cores")
        if not chip.int8:
            notes.append("no 8-bit products: rounded layers run in bfloat16")
        elif chip.fast_int8:
            notes.append("layers with weights and inputs in 8 bits multiply integers, which pays in batches")
        else:
            notes.append("layers with weights and inputs in 8 bits multiply integers, no faster than bfloat16")
        notes.append("accuracy is that of ONNX Runtime on this machine")
        metrics = ["latency", "memory"]
        if self.batch:
            metrics.append("throughput")
        else:
            notes.append(f"throughput: name a batch size, as in {self.name}:batch=128")
        if chip.power:
            metrics.append("energy")
            notes.append("energy is a bound: latency times the chip's published power")
        return Capabilities(
            (32, 16, 8) if chip.int8 else (32, 16),
            tuple(metrics),
            notes=tuple(notes),
            emulated=True,
            fast=("bf16", 16, 8) if chip.fast_int8 else ("bf16", 16),
            fixed_shapes=True,
            method=Method.COMPILED,
        )

    @property
    def _host(self) -> CpuBackend:
        """What writes and runs the files here."""
        return CpuBackend("onnxruntime", self.threads)

    @property
    def cores(self) -> list[int]:
        """The cores that ONNX Runtime may use here."""
        return self._host.cores

    def missing(self) -> str | None:
        """What is not here and how to get it."""
        if importlib.util.find_spec("jax") is None or importlib.util.find_spec("libtpu") is None:
            return (
                f"{self.name} needs JAX and Google's libtpu (under Google's own terms), "
                "which is for Linux on x86-64: pip install 'autocompress[tpu]'"
            )
        return None

    def build(self, model: nn.Module, task: Task, folder: Path) -> Artifact:
        """Write `model.onnx`; it is compiled when it is measured."""
        return dataclasses.replace(self._host.build(model, task, folder), runtime=self.name)

    def predict(self, artifact: Artifact, inputs: np.ndarray) -> np.ndarray:
        """Logits (N, classes) of inputs as `normalise` makes them, by ONNX Runtime on this machine's CPU."""
        return self._host.predict(artifact, inputs)

    def measure(self, artifact: Artifact, task: Task, reference: Artifact | None) -> list[Measurement]:
        """Latency of one input (and of the reference), memory on the chip, and what else `capabilities` names.

        Measured where the chip is attached to this machine, else the compiler's estimate, with the estimate's error
        as its interval. Files that differ in the values of their weights alone are compiled once.

        Raises:
            CandidateError: an operator that can't be converted, or the compiler refuses the program.
        """
        if self.chip.pci and self.chip.pci in attached():
            timed = time_files(self, artifact, task, reference, "tpu")
            if timed:
                return timed + self._energy(timed[0])
        answer = self._compile(artifact, task, 1)
        source = self._provenance(answer)
        latency = self._estimate("latency", self._seconds(answer), "s", source)
        found = [latency]
        if reference is not None:
            other = self._compile(reference, task, 1)
            found.append(self._estimate("reference_latency", self._seconds(other), "s", self._provenance(other)))
        if self.batch:
            many = self._compile(artifact, task, self.batch)
            rate = self.batch / self._seconds(many)
            found.append(self._estimate("throughput", rate, "1/s", self._provenance(many, f"batch {self.batch}")))
        found.append(Measurement("memory", float(answer["memory"]), "B", None, 1, source))
        return found + self._energy(latency)

    def _energy(self, latency: Measurement) -> list[Measurement]:
        """Bound of the energy: from the lowest power for the shortest time to the highest for the longest.

        A core's value and lower end are its share of the chip; the upper end is for a chip that works for it alone.
        """
        if self.chip.power is None or latency.ci95 is None:
            return []
        low, mean, high = self.chip.power
        share = 1 / self.chip.cores if self.chip.one_core else 1.0
        ends = (low * share * latency.ci95[0], high * latency.ci95[1])
        flags = (*latency.provenance.flags, "bound from published chip power")
        source = dataclasses.replace(latency.provenance, method=Method.PREDICTED, flags=flags)
        return [Measurement("energy", mean * share * latency.value, "J", ends, latency.samples, source)]

    def _seconds(self, answer: dict[str, Any]) -> float:
        return max(answer["cycles"] / self.chip.clock, answer["traffic"] / self.chip.bandwidth)

    def _estimate(self, name: str, value: float, unit: str, source: Provenance) -> Measurement:
        error = self.chip.error
        return Measurement(name, value, unit, (value * (1 - error), value * (1 + error)), 1, source)

    def _provenance(self, answer: dict[str, Any], *flags: str) -> Provenance:
        if answer["loops"]:
            flags = (*flags, "loops of the program are counted once")
        runtime = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))
        return Provenance(Method.COMPILED, self.chip.device, runtime, provenance("").taken_at, flags)

    def _compile(self, artifact: Artifact, task: Task, batch: int) -> dict[str, Any]:
        """The compiler's answer for one file, from the cache folder where it was asked before."""
        request = {
            "topology": self.chip.topology,
            "config": self.chip.config,
            "batch": batch,
            "input_shape": list(task.data.input_shape),
            "floats": "bfloat16",
            "integers": self.chip.int8,
        }
        stored = cache_folder() / "xla" / f"{_key(artifact.path, request)}.json"
        if stored.exists():
            return json.loads(stored.read_text())
        answer = ask(self, {**request, "path": str(artifact.path)})
        stored.parent.mkdir(parents=True, exist_ok=True)
        # Written beside and moved into place, so that two processes can do it at once.
        part = stored.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(answer))
        part.replace(stored)
        return answer


def time_files(
    backend: XlaTpuBackend, artifact: Artifact, task: Task, reference: Artifact | None, platform: str
) -> list[Measurement]:
    """Latency of single inputs on a device of this machine, taken in turns with the reference's; throughput; memory.

    Args:
        platform: JAX's name: "tpu" for the backend's chip; on another, such as "cpu", the figures are of that device
            and say so.

    Returns:
        the measurements; none where the machine's TPU is of another kind than the backend's.
    """
    request = {
        "platform": platform,
        "kind": backend.chip.kind if platform == "tpu" else "",
        "path": str(artifact.path),
        "reference": str(reference.path) if reference else "",
        "batch": backend.batch,
        "input_shape": list(task.data.input_shape),
        "floats": "bfloat16",
        "integers": backend.chip.int8,
        "repeats": backend.repeats,
    }
    with LANE.exclusive():
        answer = ask(backend, request)
    here = provenance(f"jax {importlib.metadata.version('jax')}")
    source = dataclasses.replace(here, device=answer["kind"] if platform == "tpu" else f"{platform}: {here.device}")
    found = []
    for name, key in (("latency", "latency"), ("reference_latency", "reference")):
        if answer[key]:
            value, ends = median_interval(answer[key])
            found.append(Measurement(name, value, "s", ends, len(answer[key]), source))
    if answer["batches"]:
        pace, ends = median_interval(answer["batches"])
        rate, interval = backend.batch / pace, (backend.batch / ends[1], backend.batch / ends[0])
        marked = dataclasses.replace(source, flags=(f"batch {backend.batch}",))
        found.append(Measurement("throughput", rate, "1/s", interval, len(answer["batches"]), marked))
    if found and answer["memory"] is not None:
        found.append(Measurement("memory", float(answer["memory"]), "B", None, 1, source))
    return found


def ask(backend: XlaTpuBackend, request: dict[str, Any]) -> dict[str, Any]:
    """The answer of the compiling process.

    Raises:
        CandidateError: the file can't be converted or compiled, or the process hangs or dies.
    """
    answer = ask_process("autocompress.hardware.xla_compile", request, backend.name, backend.limit, "compiling")
    if "error" in answer:
        raise CandidateError(f"{backend.name} can't compile the file: {answer['error']}")
    return answer


def _key(path: Path, request: dict[str, Any]) -> str:
    """Hash of all that the compiler's answer depends on."""
    digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode())
    for package in ("jax", "libtpu"):
        digest.update(importlib.metadata.version(package).encode())
    for name in ("onnx_to_jax", "jax_layers", "jax_operators", "jax_shapes", "xla_compile"):
        digest.update((Path(__file__).parent / f"{name}.py").read_bytes())
    try:
        digest.update(structure(onnx.load(str(path), load_external_data=False)))
    except (OSError, DecodeError) as error:
        raise CandidateError(f"{path} is no readable ONNX file: {error}") from error
    return digest.hexdigest()


def structure(proto: onnx.ModelProto) -> bytes:
    """What the compiler's result depends on: the graph without the values of weights and of rounding scales.

    Files that differ in these alone, such as one before and after fine-tuning, are compiled once.
    """
    plain = onnx.ModelProto()
    plain.CopyFrom(proto)
    scales = {n.input[1] for n in plain.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")}
    floats = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
    small = (TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.UINT4)
    for entry in plain.graph.initializer:
        several = math.prod(entry.dims) > 1
        floating = entry.data_type in floats and (several or entry.name in scales)
        if floating or (entry.data_type in small and len(entry.dims) > 1):
            entry.CopyFrom(TensorProto(name=entry.name, dims=entry.dims, data_type=entry.data_type))
    return plain.SerializeToString(deterministic=True)


def xla_tpu_backend(chip: TpuChip, threads: int = 0, device: str = "") -> XlaTpuBackend:
    """A TPU by the XLA compiler.

    Args:
        device: "batch=128" to have throughput too, in batches of that many; "" without.
    """
    key, _, number = device.partition("=")
    if device and not (key == "batch" and number.isdecimal() and int(number) > 0):
        name = f"tpu/{chip.name}"
        raise InputError(f"{name}:{device}: expected a batch size for throughput, as in {name}:batch=128")
    return XlaTpuBackend(chip, int(number or 0), threads)


for _chip in CHIPS.values():
    BACKENDS.add(f"tpu/{_chip.name}", functools.partial(xla_tpu_backend, _chip))
