"""Backends for Arm's Ethos-U NPUs in microcontrollers: files in 8-bit integers, timed by Arm's compiler Vela.

No figure is measured: Vela estimates the cycles of each operator on the NPU, and how much SRAM it needs, for an
assumed clock and memory. The file that is built is the TensorFlow Lite file that Vela compiles; accuracies are computed
by TensorFlow Lite's integer arithmetic (LiteRT) on this machine. The NPU's is made to equal that of its reference
kernels; the quicker ones that run here were off by one step of the logits at most (ResNet-20).
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..compression.quantization import quantized_layers
from ..core.errors import CandidateError
from ..core.lane import pause_point
from ..core.registry import backend
from ..core.types import Artifact, Capabilities, Measurement, Method, Provenance, Task
from ..tasks.data import cache_folder, normalise
from .device import provenance
from .onnx_to_tflite import convert
from .qdq import has_integer_kernel
from .rounded import rounded_to_8_bits
from .x86 import CpuBackend

if TYPE_CHECKING:
    from torch import nn

# Clock and memories that Vela's own configuration file (Arm/vela.ini) has for systems with each NPU.
SYSTEMS = {
    "u55": ("Ethos_U55_High_End_Embedded", "Shared_Sram"),
    "u65": ("Ethos_U65_High_End", "Dedicated_Sram"),
    "u85": ("Ethos_U85_SYS_DRAM_Mid", "Dedicated_Sram"),
}
PACKAGES = {"ethosu": "ethos-u-vela", "ai_edge_litert": "ai-edge-litert"}
_REFUSED = re.compile(r"^Warning \(supported operators\) operator: (\w+).*\nReason: (.*)$", re.MULTILINE)
CALIBRATION = 128  # inputs by which the ranges of logits and sums are found


@dataclass(frozen=True)
class EthosUBackend:
    """One Ethos-U by its kind and its multiply-accumulates in a cycle, such as "u55-128".

    It computes on integers alone, so that what a plan leaves in floating point is rounded to 8 bits when the file is
    built, the untouched model included.

    Attributes:
        limit: seconds after which Vela counts as hanging.
    """

    kind: str
    threads: int = 0
    limit: float = 300.0

    @property
    def name(self) -> str:
        return f"arm/ethos-{self.kind}"

    @property
    def capabilities(self) -> Capabilities:
        system, memory = SYSTEMS[self.kind.partition("-")[0]]
        notes = (
            f"latency is Vela's own estimate for its system {system} with memory {memory}",
            "operators that Vela leaves to the processor are not in the latency; flags name them",
            "memory is the SRAM that the NPU needs",
            "what a plan leaves in floating point is rounded to 8 bits",
            "accuracy is that of TensorFlow Lite's integer arithmetic on this machine",
            "weights are stored compressed: zeros and fewer bits save flash and bandwidth",
        )
        return Capabilities(
            bits=(8,),
            metrics=("latency", "memory"),
            outputs="all",
            notes=notes,
            emulated=True,
            fast=(8,),
            fixed_shapes=True,
            method=Method.COMPILED,
        )

    @property
    def _host(self) -> CpuBackend:
        """What writes the ONNX file that is converted."""
        return CpuBackend("onnxruntime", self.threads)

    @property
    def cores(self) -> list[int]:
        """The cores that files may run on here."""
        return self._host.cores

    def missing(self) -> str | None:
        """What is not here and how to get it."""
        lacks = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
        if lacks:
            return f"{self.name} needs the package {' and '.join(lacks)}: pip install 'autocompress[ethos-u]'"
        return None

    def build(self, model: nn.Module, task: Task, folder: Path) -> Artifact:
        """Write `model.tflite`, with every convolution and linear layer in 8 bits or fewer.

        Raises:
            CandidateError: a layer is in a format that the NPU does not compute in, or has no operator in it.
        """
        rounded = quantized_layers(model)
        self._refuse(name for name, entry in rounded.items() if not has_integer_kernel(entry))
        model = rounded_to_8_bits(model, task, self.name, self.capabilities.outputs)
        with tempfile.TemporaryDirectory(prefix="autocompress-") as place:
            made = self._host.build(model, task, Path(place))
            inputs = task.data.train.inputs[:CALIBRATION]
            content, doubts = convert(made.path, normalise(task.data, inputs) if len(inputs) else None)
        if doubts:
            raise CandidateError(f"{self.name} computes on 8-bit integers alone: {'; '.join(doubts)}")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "model.tflite"
        path.write_bytes(content)
        return Artifact(self.name, path, hashlib.sha256(content).hexdigest(), len(content), made.bits)

    def predict(self, artifact: Artifact, inputs: np.ndarray) -> np.ndarray:
        """Logits (N, classes) of inputs as `normalise` makes them, by LiteRT on this machine, one after the other."""
        from ai_edge_litert.interpreter import Interpreter

        try:
            # Several threads spin, and cost a factor of a hundred where others want the cores.
            interpreter = Interpreter(str(artifact.path), num_threads=1)
            interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise CandidateError(f"{self.name}: LiteRT can't open the file: {str(error).splitlines()[0]}") from error
        taken, given = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
        found = []
        for image in inputs:
            pause_point()
            scale, zero = taken["quantization"]
            codes = np.clip(np.rint(np.moveaxis(image, 0, -1) / scale) + zero, -128, 127)
            interpreter.set_tensor(taken["index"], codes[None].astype(np.int8))
            interpreter.invoke()
            scale, zero = given["quantization"]
            found.append(scale * (interpreter.get_tensor(given["index"]).astype(np.float32) - zero))
        return np.concatenate(found).astype(np.float32)

    def measure(self, artifact: Artifact, task: Task, reference: Artifact | None) -> list[Measurement]:
        """Vela's estimates of a .tflite file, or of an ONNX file that is converted: latency, and SRAM in bytes."""
        latency, memory = self._estimate(artifact)
        found = [latency, memory]
        if reference is not None:
            found.append(dataclasses.replace(self._estimate(reference)[0], name="reference_latency"))
        return found

    def _estimate(self, artifact: Artifact) -> tuple[Measurement, Measurement]:
        flags: tuple[str, ...] = ()
        content = artifact.path.read_bytes()
        if artifact.path.suffix == ".onnx":
            content, flags = convert(artifact.path)
        version = importlib.metadata.version("ethos-u-vela")
        system, memory = SYSTEMS[self.kind.partition("-")[0]]
        request = {"kind": self.kind, "system": system, "memory": memory, "version": version}
        key = hashlib.sha256(json.dumps(request).encode() + content).hexdigest()
        path = cache_folder() / "vela" / f"{key}.json"
        if path.is_file():
            found = json.loads(path.read_text())
        else:
            found = self._compile(content, system, memory)
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}.part")
            part.write_text(json.dumps(found))
            part.replace(path)
        left = ""
        if found["left"]:
            named = ", ".join(sorted(set(found["reasons"]))) or "Vela does not say which"
            left = f"{found['left']} operator{'s' if found['left'] > 1 else ''} left to the processor: {named}"
            flags += (f"without {left}",)
        device = f"Ethos-{self.kind.upper()}, {found['clock'] / 1e6:g} MHz, {system}, {memory}"
        source = Provenance(Method.COMPILED, device, f"vela {version}", provenance("").taken_at, flags)
        if not found["seconds"]:
            raise CandidateError(f"{self.name}: nothing runs on the NPU; {left}")
        return (
            Measurement("latency", found["seconds"], "s", None, 1, source),
            Measurement("memory", found["sram"], "B", None, 1, source),
        )

    def _compile(self, content: bytes, system: str, memory: str) -> dict[str, Any]:
        """What Vela says of a file."""
        with tempfile.TemporaryDirectory(prefix="autocompress-") as folder:
            file = Path(folder) / "model.tflite"
            file.write_bytes(content)
            command = [sys.executable, "-m", "ethosu.vela", str(file), "--output-dir", folder]
            command += ["--accelerator-config", f"ethos-{self.kind}", "--config", "Arm/vela.ini"]
            command += ["--system-config", system, "--memory-mode", memory, "--show-cpu-operations"]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=self.limit, check=False)
            except subprocess.TimeoutExpired as error:
                raise CandidateError(f"{self.name}: Vela hung for {self.limit:.0f} s") from error
            summaries = list(Path(folder).glob("model_summary_*.csv"))
            if done.returncode or len(summaries) != 1:
                lines = [line for line in (done.stdout + done.stderr).splitlines() if "rror" in line]
                reason = lines[-1] if lines else f"exit code {done.returncode}"
                raise CandidateError(f"{self.name}: Vela failed: {reason.strip()[:300]}")
            with summaries[0].open(newline="") as lines_of:
                row = next(csv.DictReader(lines_of))
        return {
            "seconds": float(row["inference_time"]),
            "sram": float(row["sram_memory_used"]) * 1024,
            "clock": float(row["core_clock"]),
            "left": len(re.findall(r"^\s*CPU: ", done.stdout, re.MULTILINE)),
            "reasons": [f"{name} ({why.strip()})" for name, why in _REFUSED.findall(done.stdout)],
        }

    def _refuse(self, layers: Iterable[str]) -> None:
        """Raise CandidateError if any layers are named."""
        named = ", ".join(sorted(layers))
        if named:
            raise CandidateError(f"{self.name} computes on 8-bit integers alone, and has no kernel for {named}")


@backend("arm/ethos-u55-128")
def ethos_u55_128(threads: int = 0) -> EthosUBackend:
    """Such as beside a Cortex-M55 in a microcontroller."""
    return EthosUBackend("u55-128", threads)


@backend("arm/ethos-u55-256")
def ethos_u55_256(threads: int = 0) -> EthosUBackend:
    """The largest Ethos-U55."""
    return EthosUBackend("u55-256", threads)


@backend("arm/ethos-u65-256")
def ethos_u65_256(threads: int = 0) -> EthosUBackend:
    """Such as in NXP's i.MX 93."""
    return EthosUBackend("u65-256", threads)


@backend("arm/ethos-u65-512")
def ethos_u65_512(threads: int = 0) -> EthosUBackend:
    """The largest Ethos-U65."""
    return EthosUBackend("u65-512", threads)


@backend("arm/ethos-u85-512")
def ethos_u85_512(threads: int = 0) -> EthosUBackend:
    """An Ethos-U85 of medium size."""
    return EthosUBackend("u85-512", threads)
