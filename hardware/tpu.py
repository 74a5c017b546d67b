"""Backends for TPUs: Google's Edge TPU, simulated."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..compression.grids import bit_width
from ..compression.quantization import quantized_layers
from ..core.errors import CandidateError
from ..core.registry import backend
from ..core.types import Artifact, Capabilities, Measurement, Method, Provenance, Task
from .device import provenance
from .operators import read_operators
from .qdq import has_integer_kernel
from .rounded import rounded_to_8_bits
from .systolic import CORAL_USB, ERROR, EdgeTpu, edge_tpu_latency, outside_validation, weight_bytes
from .x86 import CpuBackend

if TYPE_CHECKING:
    from torch import nn

DEVICE = "Edge TPU, Coral USB accelerator"
MODEL = "systolic model"


@dataclass(frozen=True)
class EdgeTpuBackend:
    """The Edge TPU of the Coral USB accelerator; neither it nor its compiler is needed, and no figure is measured.

    The Edge TPU computes on 8-bit integers alone. So what a plan leaves in floating point is rounded to 8 bits when
    the file is built, the untouched model included: size and accuracy are those of what would be deployed. Other
    formats that it has no kernels for are refused.

    Attributes:
        chip: the constants of the latency model.
        threads: for ONNX Runtime, which runs the files here.
    """

    chip: EdgeTpu = CORAL_USB
    threads: int = 0

    @property
    def name(self) -> str:
        return "tpu/edgetpu"

    @property
    def capabilities(self) -> Capabilities:
        watts = self.chip.peak_power
        return Capabilities(
            (8,),
            ("latency",),
            "all",
            notes=(
                f"simulated: within a factor of {ERROR[1]:g} for 13 of 14 published networks",
                "what a plan leaves in floating point is rounded to 8 bits",
                "accuracy is that of ONNX Runtime on this machine",
                f"energy: at most {watts:g} mJ for each ms, as the chip takes at most {watts:g} W",
            ),
            emulated=True,
            fast=(8,),
            fixed_shapes=True,
            method=Method.SIMULATED,
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
        if importlib.util.find_spec("onnxruntime") is None:
            return f"{self.name} runs its files by the package onnxruntime: pip install onnxruntime"
        return None

    def build(self, model: nn.Module, task: Task, folder: Path) -> Artifact:
        """Write `model.onnx`, with every convolution and linear layer in 8 bits.

        Raises:
            CandidateError: a layer is in a format that the Edge TPU does not compute in.
        """
        rounded = quantized_layers(model)
        self._refuse(name for name, entry in rounded.items() if not has_integer_kernel(entry))
        model = rounded_to_8_bits(model, task, self.name, self.capabilities.outputs)
        artifact = dataclasses.replace(self._host.build(model, task, folder), runtime=self.name)
        try:
            self._refuse(name for name, formats in artifact.bits.items() if not _is_int8(formats))
        except CandidateError:
            artifact.path.unlink()
            raise
        return artifact

    def predict(self, artifact: Artifact, inputs: np.ndarray) -> np.ndarray:
        """Logits (N, classes) of inputs as `normalise` makes them, by ONNX Runtime on this machine's CPU."""
        return self._host.predict(artifact, inputs)

    def measure(self, artifact: Artifact, task: Task, reference: Artifact | None) -> list[Measurement]:
        """Latency of one file (and of the reference), computed from its operators.

        The interval spans the model's error on published networks; where a file is unlike these, there is none, and
        the flags say why. A file with layers in floating point gets the latency of its 8-bit equivalent, which
        the flags say too.
        """
        found = [self._latency("latency", artifact)]
        if reference is not None:
            found.append(self._latency("reference_latency", reference))
        return found

    def _latency(self, name: str, artifact: Artifact) -> Measurement:
        calls = read_operators(artifact.path)
        seconds = edge_tpu_latency(calls, self.chip)
        flags = [f"outside validation: {reason}" for reason in outside_validation(calls)]
        interval = None if flags else (ERROR[0] * seconds, ERROR[1] * seconds)
        if any(not _is_int8(formats) for formats in artifact.bits.values()):
            flags.append("as if in 8 bits")
        streamed = max(0.0, weight_bytes(calls) - self.chip.memory)
        if streamed:
            flags.append(f"streams {streamed / 1e6:.1f} MB of weights")
        taken_at = provenance(MODEL).taken_at
        source = Provenance(Method.SIMULATED, DEVICE, MODEL, taken_at, tuple(flags))
        return Measurement(name, seconds, "s", interval, 1, source)

    def _refuse(self, layers: Iterable[str]) -> None:
        """Raise CandidateError if any layers are named."""
        named = ", ".join(sorted(layers))
        if named:
            raise CandidateError(f"{self.name} computes on 8-bit integers alone, and has no kernel for {named}")


def _is_int8(formats: Mapping[str, int | float | str]) -> bool:
    return all(bit_width(formats[key]) <= 8 for key in ("weight", "activation"))


@backend("tpu/edgetpu")
def edge_tpu_backend(threads: int = 0) -> EdgeTpuBackend:
    """The Coral USB accelerator, simulated."""
    return EdgeTpuBackend(threads=threads)
