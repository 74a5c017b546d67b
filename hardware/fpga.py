"""Backends for FPGAs: networks as streaming accelerators in our own RTL, folded to what a device has room for.

Nothing is measured on a board. Cycles are those of the circuit, exactly (`cycles`); the clock and what the circuit
takes are predicted from place and route of its units.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..compression.quantization import LayerQuantization, quantized_layers
from ..core.errors import CandidateError
from ..core.registry import BACKENDS
from ..core.types import Artifact, Capabilities, Measurement, Method, Provenance, Task
from .accelerator import Timed, time_pipeline
from .dataflow import Layer, read_layers
from .device import provenance
from .folding import Device, Folding, fold_network
from .fpga_resources import network_fmax, stated_error
from .mvtu import Unit
from .qdq import has_integer_kernel
from .rounded import rounded_to_8_bits
from .stream_prices import Need, need_of
from .streams import Converter, Depthwise, Duplicator, Fifo, Matrix
from .x86 import CpuBackend

if TYPE_CHECKING:
    from torch import nn

ECP5_SHEET = "Lattice FPGA-DS-02012, ECP5 and ECP5-5G Family, table 1.1"
ZYNQ_SHEET = "AMD DS190, Zynq-7000 SoC Overview, table 1"
# Power while computing, of four networks from KWS to CIFAR-10: MLPerf Tiny v0.7, open division, FINN and hls4ml.
PYNQ_Z2, ARTY = (1.58, 1.76), (2.18, 2.27)

DEVICES = (
    Device("ecp5-25", "ecp5", 24_000, 28, 56, ECP5_SHEET),
    Device("ecp5-45", "ecp5", 44_000, 72, 108, ECP5_SHEET),
    Device("ecp5-85", "ecp5", 84_000, 156, 208, ECP5_SHEET),
    Device("xc7z020", "xc7", 53_200, 220, 280, ZYNQ_SHEET, clock=100e6, watts=PYNQ_Z2),
    Device("xc7a100t", "xc7", 63_400, 240, 270, "AMD DS180, 7 Series FPGAs Overview, table 4", clock=100e6, watts=ARTY),
    Device("xczu3eg", "xc7", 70_560, 360, 432, "AMD DS891, Zynq UltraScale+ MPSoC Overview, table 1", clock=100e6),
)
MODEL = "streaming accelerator, cycle recurrence"
# Foldings that are tried until what connects the layers fits beside them.
TRIES = 6


@dataclass(frozen=True)
class Plan:
    """An accelerator for one network on one device.

    Attributes:
        need: of the whole accelerator.
    """

    layers: tuple[Layer, ...]
    folding: Folding
    timed: Timed
    need: Need

    @property
    def units(self) -> list[Unit]:
        """The matrix and depthwise units."""
        return [node.stage.unit for node in self.timed.pipeline.nodes if isinstance(node.stage, (Matrix, Depthwise))]


def plan_accelerator(layers: tuple[Layer, ...], device: Device) -> Plan:
    """Fold a network for a device, and find its times.

    Raises:
        CandidateError: it does not fit, even at its slowest.
    """
    between = Need()
    for _ in range(TRIES):
        folding = fold_network(layers, device, between)
        timed = time_pipeline(layers, folding.folds)
        connecting = [
            node.stage for node in timed.pipeline.nodes if isinstance(node.stage, (Fifo, Converter, Duplicator))
        ]
        found = sum((need_of(stage, device.family) for stage in connecting), Need())
        need = folding.need + found
        if need.lut <= device.luts * device.fill and need.dsp <= device.dsps and need.bram <= device.brams:
            return Plan(layers, folding, timed, need)
        between = Need(max(found.lut, between.lut), 0, max(found.bram, between.bram + 1))
    raise CandidateError(
        f"what connects the layers does not fit beside them: {need.lut:.0f} look-up tables and {need.bram} block RAMs "
        f"needed, {device.name} has {device.luts * device.fill:.0f} ({device.fill:.0%}) and {device.brams}"
    )


@functools.lru_cache(maxsize=64)
def _planned(path: Path, sha256: str, device: Device) -> Plan:
    """The plan of a file; the untouched model's is wanted again beside each candidate's."""
    return plan_accelerator(read_layers(path), device)


@dataclass(frozen=True)
class FpgaBackend:
    """One FPGA; neither it nor its vendor's tools are needed.

    What a plan leaves in floating point is rounded to 8 bits when the file is built.

    Attributes:
        threads: for ONNX Runtime, which runs the files here.
    """

    device: Device
    threads: int = 0

    @property
    def name(self) -> str:
        return f"fpga/{self.device.name}"

    @property
    def capabilities(self) -> Capabilities:
        device = self.device
        metrics = ("latency", "throughput", "luts", "dsps", "brams")
        clock = f"clock assumed: {device.clock / 1e6:.0f} MHz" if device.clock else "clock predicted"
        return Capabilities(
            (8, 7, 6, 5, 4, 3, 2, 1),
            (*metrics, "energy") if device.watts else metrics,
            "all",
            notes=(
                f"{device.luts} look-up tables, {device.dsps} multipliers, {device.brams} block RAMs ({device.sheet})",
                f"simulated: cycles are the circuit's; {clock}",
                "what a plan leaves in floating point is rounded to 8 bits",
                "weights lie on the chip: networks that do not fit are refused",
                "accuracy is that of ONNX Runtime on this machine",
            ),
            emulated=True,
            fast=(8, 7, 6, 5, 4, 3, 2, 1.58, 1),  # type: ignore[arg-type]
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
        """Write `model.onnx`, with every convolution and linear layer in 8 bits or fewer.

        Raises:
            CandidateError: a layer is in a format that matrix units do not compute in.
        """
        self._refuse(name for name, entry in quantized_layers(model).items() if not _fits_unit(entry))
        model = rounded_to_8_bits(model, task, self.name, self.capabilities.outputs)
        return dataclasses.replace(self._host.build(model, task, folder), runtime=self.name)

    def predict(self, artifact: Artifact, inputs: np.ndarray) -> np.ndarray:
        """Logits (N, classes) of inputs as `normalise` makes them, by ONNX Runtime on this machine's CPU."""
        return self._host.predict(artifact, inputs)

    def measure(self, artifact: Artifact, task: Task, reference: Artifact | None) -> list[Measurement]:
        """Latency of one image (and the reference's), images a second, and what the accelerator takes.

        Latency: from the first word of an image to the last word of its result; what a host adds is not in it. Its
        interval spans the clock's. Energy: what a board with the device takes in that time. The interval of the look-up
        tables spans the largest error on units that were not fitted on; no unit outside that range has one.

        Raises:
            CandidateError: the network does not fit, or needs a unit that there is none for.
        """
        plan = _planned(artifact.path, artifact.sha256, self.device)
        clock, ends, flags = self._clock(plan)
        latency = self._seconds("latency", plan, clock, ends, flags)
        found = [latency]
        if reference is not None:
            with_reference = _planned(reference.path, reference.sha256, self.device)
            found.append(self._seconds("reference_latency", with_reference, *self._clock(with_reference)))
        cycles = plan.timed.interval
        rates = None if ends is None else (ends[0] / cycles, ends[1] / cycles)
        source = latency.provenance
        found.append(Measurement("throughput", clock / cycles, "1/s", rates, 1, source))
        if self.device.watts is not None:
            low, high = self.device.watts
            spread = latency.ci95 or (latency.value, latency.value)
            between = (low * spread[0], high * spread[1])
            power = dataclasses.replace(source, flags=(*source.flags, "power of other networks on such a board"))
            found.append(Measurement("energy", (low + high) / 2 * latency.value, "J", between, 1, power))
        counted = dataclasses.replace(source, method=Method.PREDICTED)
        luts = plan.need.lut
        error = stated_error(self.device.family)["lut"]["largest"]
        between_luts = None if plan.folding.extrapolated else (luts * (1 - error), luts * (1 + error))
        found.append(Measurement("luts", float(round(luts)), "", between_luts, 1, counted))
        found.append(Measurement("dsps", float(plan.need.dsp), "", None, 1, counted))
        found.append(Measurement("brams", float(plan.need.bram), "", None, 1, counted))
        return found

    def _seconds(
        self, name: str, plan: Plan, clock: float, ends: tuple[float, float] | None, flags: tuple[str, ...]
    ) -> Measurement:
        cycles = plan.timed.latency
        interval = None if ends is None else (cycles / ends[1], cycles / ends[0])
        source = Provenance(Method.SIMULATED, self.device.name, MODEL, provenance(MODEL).taken_at, flags)
        return Measurement(name, cycles / clock, "s", interval, 1, source)

    def _clock(self, plan: Plan) -> tuple[float, tuple[float, float] | None, tuple[str, ...]]:
        """(hertz, its interval, flags of figures with it)."""
        flags = []
        if plan.folding.extrapolated:
            flags.append("extrapolated: units larger than those that prices were fitted on")
        if any(layer.floats for layer in plan.layers):
            flags.append("as if in 8 bits")
        if not plan.timed.exact:
            flags.append("cycles bounded from below")
        if self.device.clock is not None:
            return self.device.clock, None, (*flags, f"clock assumed: {self.device.clock / 1e6:.0f} MHz")
        clock = network_fmax(plan.units)
        return float(clock.value), (float(clock.low), float(clock.high)), tuple(flags)

    def _refuse(self, layers: Iterable[str]) -> None:
        """Raise CandidateError if any layers are named."""
        named = ", ".join(sorted(layers))
        if named:
            raise CandidateError(
                f"{self.name} computes on integers of 1 to 8 bits around zero, and has no unit for {named}: round "
                "weights (symmetric, a scale for each channel or one for all) and activations"
            )


def _fits_unit(entry: LayerQuantization) -> bool:
    """Whether a matrix unit computes a layer as it is rounded."""
    if not has_integer_kernel(entry):
        return False
    assert entry.weight is not None
    return entry.weight.zero_points is None or not bool(entry.weight.zero_points.any())


def _register(device: Device) -> None:
    BACKENDS.add(f"fpga/{device.name}", lambda threads=0: FpgaBackend(device, threads))


for _device in DEVICES:
    _register(_device)
