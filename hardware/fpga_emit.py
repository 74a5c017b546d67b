"""An accelerator for one file, written out: its circuit, simulated against integers, and placed and routed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..core.errors import CandidateError
from ..core.types import Artifact, Measurement, Method, Provenance
from .accelerator import Fold, time_pipeline
from .cycles import Node, Pipeline
from .device import provenance
from .folding import Device
from .fpga import DEVICES, plan_accelerator
from .fpga_rtl import emit_pipeline, lanes_in
from .fpga_sim import Run, simulate
from .fpga_synthesis import place_and_route, synthesise, tool_versions
from .integers import Computed, IntegerNetwork, as_tables, read_integers
from .streams import Adder, Depthwise, Matrix, Pool, Stage, Window


@dataclass(frozen=True)
class Emitted:
    """A written accelerator.

    Attributes:
        cycles: from the first word of an image to the last word of its result.
        dsp: whether layers multiply in the device's multipliers; Yosys is told so for a whole circuit, so that where
            one layer is to, all do.
    """

    folder: Path
    network: IntegerNetwork
    pipeline: Pipeline
    cycles: int
    interval: int
    dsp: bool


def emit(
    artifact: Artifact, folder: Path, device: Device | None = None, folds: Sequence[Fold] | None = None
) -> Emitted:
    """Write `accelerator.sv`, its modules, memory files and test bench for a file of an FPGA target.

    Args:
        device: to fold it for; ignored with `folds`.
        folds: of each layer (`dataflow.read_layers`).

    Raises:
        CandidateError: it does not fit, or something in it is not rounded as units need it.
    """
    network = read_integers(artifact.path)
    if folds is None:
        plan = plan_accelerator(network.layers, device or DEVICES[2])
        folds, timed = plan.folding.folds, plan.timed
    else:
        timed = time_pipeline(network.layers, folds)
    pipeline = with_numbers(timed.pipeline, network)
    emit_pipeline(pipeline, as_tables(network), folder)
    dsp = any(fold.dsp for fold in folds)
    return Emitted(folder, network, pipeline, timed.latency, timed.interval, dsp)


def with_numbers(pipeline: Pipeline, network: IntegerNetwork) -> Pipeline:
    """The pipeline with what the units need besides weights: padding, shifts and factors."""
    computed = {entry.layer.name: entry for entry in network.computed}
    nodes = []
    for node in pipeline.nodes:
        entry = computed.get(node.name.removesuffix(": window"))
        nodes.append(node if entry is None else replace(node, stage=_with_numbers(node.stage, entry)))
    return dataclasses.replace(pipeline, nodes=tuple(nodes))


def _with_numbers(stage: Stage, entry: Computed) -> Stage:
    if isinstance(stage, Window):
        return replace(stage, pad=entry.pad)
    if isinstance(stage, (Matrix, Depthwise)):
        return replace(stage, unit=replace(stage.unit, shift=entry.shift))
    if isinstance(stage, Pool) and stage.sums:
        factor, offset, shift, least = entry.rescale
        return replace(stage, scale=(factor, offset, shift, least))
    if isinstance(stage, Adder):
        first, second, offset, shift, least = entry.rescale
        return replace(stage, scale=(first, second, offset, shift, least))
    return stage


def simulate_network(emitted: Emitted, images: np.ndarray, limit: int = 10_000_000) -> tuple[np.ndarray, Run]:
    """Run an accelerator in Icarus Verilog.

    Args:
        images: integers on the input's grid, (N, C, H, W).

    Returns:
        accumulators of the last layer, int64 (N, classes), and what happened when.

    Raises:
        MissingDependencyError: no Icarus Verilog here.
        CandidateError: the circuit is refused, or stuck.
    """
    first = _first(emitted.pipeline)
    count = lanes_in(first.stage)[0][0]
    words = np.moveaxis(images, 1, -1).reshape(-1, count) if images.ndim > 2 else images.reshape(-1, count)
    run = simulate(emitted.folder, emitted.pipeline, words, limit, signed=True)
    return run.results.reshape(len(images), -1), run


def _first(pipeline: Pipeline) -> Node:
    return next(node for node in pipeline.nodes if pipeline.source in node.inputs)


def compile_network(emitted: Emitted, seeds: Sequence[int] = (1,), frequency: int = 100) -> list[Measurement]:
    """Synthesise, place and route an accelerator for an ECP5-85: "luts", "ffs", "dsps", "brams" and "clock".

    Args:
        seeds: of the placer; the clock's interval spans their results.
        frequency: aimed at, MHz.

    Raises:
        MissingDependencyError: no Yosys or nextpnr here.
        CandidateError: the tools refuse the circuit: it does not fit.
    """
    sources = [path for path in sorted(emitted.folder.glob("*.sv")) if path.name != "bench.sv"]
    synthesise(emitted.folder, sources, "accelerator", dsp=emitted.dsp)
    found = [place_and_route(emitted.folder, seed, frequency) for seed in seeds]
    if "fmax" not in found[0]:
        raise CandidateError("place and route found no clock in the accelerator")
    runtime = ", ".join(f"{name} {version}" for name, version in tool_versions().items())
    source = Provenance(Method.COMPILED, "ecp5-85, speed grade 6, out of context", runtime, provenance("").taken_at)
    names = {"luts": "lut", "ffs": "ff", "dsps": "dsp", "brams": "bram"}
    figures = [Measurement(name, float(found[0][key]), "", None, 1, source) for name, key in names.items()]
    clocks = sorted(entry["fmax"] * 1e6 for entry in found)
    ends = (clocks[0], clocks[-1]) if len(clocks) > 1 else None
    return [*figures, Measurement("clock", sum(clocks) / len(clocks), "Hz", ends, len(clocks), source)]
