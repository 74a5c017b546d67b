"""Runs an emitted accelerator in Icarus Verilog."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..core.errors import CandidateError, MissingDependencyError
from .cycles import Pipeline
from .fpga_rtl import lanes_in, lanes_out


def missing_simulator() -> str | None:
    """What is not here and how to get it."""
    if shutil.which("iverilog") and shutil.which("vvp"):
        return None
    return "simulating an accelerator needs Icarus Verilog: apt install iverilog"


def pack(values: np.ndarray, bits: int) -> list[int]:
    """Words of the elements in each row of `values`, the first in the lowest bits."""
    masked = values.astype(object) & ((1 << bits) - 1)
    return [sum(int(element) << (place * bits) for place, element in enumerate(row)) for row in masked]


def write_words(path: Path, values: np.ndarray, lanes: tuple[int, int]) -> None:
    """Write integers as the words of a stream, for `$readmemh`.

    Args:
        lanes: elements of a word, and bits of one.
    """
    count, bits = lanes
    digits = -(-count * bits // 4)
    path.write_text("".join(f"{word:0{digits}x}\n" for word in pack(values.reshape(-1, count), bits)))


def unpack(words: list[int], count: int, bits: int, signed: bool) -> np.ndarray:
    """The elements of each word: int64, (words, count)."""
    mask, top = (1 << bits) - 1, 1 << (bits - 1)
    raw = [[(word >> (place * bits)) & mask for place in range(count)] for word in words]
    values = np.array(raw, np.int64)
    return np.where(values >= top, values - 2 * top, values) if signed else values


@dataclass(frozen=True)
class Run:
    """What a simulated accelerator did; cycles are counted from the first one after reset.

    Attributes:
        taken, left: int64, the cycle in which each word was taken, and left.
        results: int64, (words, elements of a word).
    """

    taken: np.ndarray
    left: np.ndarray
    results: np.ndarray


def simulate(
    folder: Path, pipeline: Pipeline, inputs: np.ndarray, limit: int = 10_000_000, signed: bool = False
) -> Run:
    """Run an accelerator written by `emit_pipeline`, which gets its input without a pause.

    Args:
        inputs: integers, (words, elements of a word): of one or several images.
        limit: cycles after which the circuit counts as stuck.
        signed: whether results are signed.

    Raises:
        MissingDependencyError: no Icarus Verilog here.
        CandidateError: the circuit is refused, or stuck.
    """
    reason = missing_simulator()
    if reason:
        raise MissingDependencyError(reason)
    counts = pipeline.words()
    first = next(node for node in pipeline.nodes if pipeline.source in node.inputs)
    last = next(node for node in pipeline.nodes if pipeline.sink in node.outputs)
    count, bits = lanes_in(first.stage)[first.inputs.index(pipeline.source)]
    elements, out_bits = lanes_out(last.stage)[last.outputs.index(pipeline.sink)]
    write_words(folder / "inputs.hex", inputs, (count, bits))
    words = inputs.size // count
    results = words // counts[pipeline.source] * counts[pipeline.sink]
    settings = {"WORDS": words, "RESULTS": results, "LIMIT": limit}
    sources = sorted(path.name for path in folder.glob("*.sv"))
    define = [f"-D{key}={value}" for key, value in settings.items()]
    _run(["iverilog", "-g2012", "-s", "bench", "-o", "bench.vvp", *define, *sources], folder)
    lines = [line.split() for line in _run(["vvp", "-n", "bench.vvp"], folder).splitlines()]
    taken = [int(line[1]) for line in lines if line[0] == "in"]
    pairs = [line for line in lines if line[0].isdigit()]
    if ["stuck"] in lines:
        raise CandidateError(f"the accelerator is stuck: {len(pairs)} of {results} words came in {limit} cycles")
    if len(pairs) != results or any("x" in word for _, word in pairs):
        raise CandidateError(f"the simulation gave {len(pairs)} of {results} words, or undefined ones")
    found = unpack([int(word, 16) for _, word in pairs], elements, out_bits, signed)
    return Run(np.array(taken), np.array([int(cycle) for cycle, _ in pairs]), found)


def _run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise CandidateError(f"{command[0]} failed: {said[0]}")
    return done.stdout
