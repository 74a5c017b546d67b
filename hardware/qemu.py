"""Backends for ARM cores that are not here: ONNX Runtime's own ARM program, emulated, with its instructions counted.

Emulation computes what the core computes, and takes other paths than this machine's: kernels for the instructions that
the core has. It tells nothing of time: how many instructions a core completes in a second depends on its pipelines and
caches. Unlike MACs, executed instructions tell of bits, kernels and the instruction set.

As a rank of float networks they are no better than MACs: on 80 random cells of NAS-Bench-201, counted for a Cortex-A76,
their rank correlation with the latency of a Pixel 3 (another runtime, other cores) is 0.87, that of MACs 0.90; on the
50 cells in which every operator is used, 0.94 and 0.93.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.errors import CandidateError
from ..core.registry import backend
from ..core.types import Artifact, Capabilities, Measurement, Method, Provenance, Task
from ..tasks.data import cache_folder
from .board_connection import python_archive
from .device import provenance
from .qemu_setup import CORES, emulated, guest_environment, setup_missing, system_folder
from .statistics import median_interval
from .x86 import CpuBackend

if TYPE_CHECKING:
    from torch import nn

METRICS = ("instructions", "arm_parity")
PARITY = 0.02  # deviation of the logits from this machine's beyond which they are worth a look


@dataclass(frozen=True)
class QemuBackend:
    """One ARM core, emulated; needs qemu and an ARM system of files (`make_rootfs`).

    Attributes:
        core: "cortex-a53", "cortex-a72" or "cortex-a76".
        threads: for ONNX Runtime on this machine, which computes accuracies; emulated is one thread.
        runs: inferences that are counted and compared.
        limit: seconds after which an emulation counts as hanging.
        folder: of the ARM system; None for the one in the cache folder.
    """

    core: str
    threads: int = 0
    runs: int = 8
    limit: float = 900.0
    folder: Path | None = None

    @property
    def name(self) -> str:
        return f"arm/qemu-{self.core}"

    @property
    def capabilities(self) -> Capabilities:
        dot = "asimddp" in CORES[self.core][1].split()
        notes = (
            "instructions tell of bits, kernels and dead code, not of time: seconds need a board",
            "8-bit dot products: " + ("yes" if dot else "no, int8 saves size more than instructions"),
            "accuracy is that of ONNX Runtime on this machine; arm_parity compares a few images on the emulated core",
            "energy: unknown without a board and a power meter",
        )
        return Capabilities(
            (32, 16, 8), METRICS, "all", notes, emulated=True, fast=(8,) if dot else (), method=Method.SIMULATED
        )

    @property
    def _host(self) -> CpuBackend:
        """What writes the files and computes accuracies here."""
        return CpuBackend("onnxruntime", self.threads)

    @property
    def _system(self) -> Path:
        return self.folder or system_folder()

    @property
    def cores(self) -> list[int]:
        """The cores that ONNX Runtime may use here."""
        return self._host.cores

    def missing(self) -> str | None:
        """What is not here and how to get it."""
        return setup_missing(self.name, self._system)

    def build(self, model: nn.Module, task: Task, folder: Path) -> Artifact:
        """Write `model.onnx` as for ONNX Runtime here."""
        return dataclasses.replace(self._host.build(model, task, folder), runtime=self.name)

    def predict(self, artifact: Artifact, inputs: np.ndarray) -> np.ndarray:
        """Logits (N, classes) of inputs as `normalise` makes them, by ONNX Runtime on this machine's CPU."""
        return self._host.predict(artifact, inputs)

    def measure(self, artifact: Artifact, task: Task, reference: Artifact | None) -> list[Measurement]:
        """Executed instructions of one inference, and how far the logits deviate from this machine's.

        "instructions": median over inferences of random inputs, one thread, after a first one. "arm_parity": root
        mean square of the difference, relative to that of the logits. Both are kept in the cache folder by the file's
        hash, as they repeat. The reference is not run: its own figures can be compared with.
        """
        versions = json.loads((self._system / "ready.json").read_text())
        key = f"{self.core}-{versions['onnxruntime']}-{versions['qemu']}-{self.runs}-{artifact.sha256}"
        path = cache_folder() / "instructions" / f"{key}.json"
        if path.is_file():
            found = json.loads(path.read_text())
        else:
            found = self._emulate(artifact, task)
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}.part")
            part.write_text(json.dumps(found))
            part.replace(path)
        value, ends = median_interval(found["counts"])
        deviation = found["deviation"]
        source = Provenance(
            Method.SIMULATED,
            f"{self.core.title()}, emulated, 1 thread",
            f"onnxruntime {versions['onnxruntime']}",
            provenance("").taken_at,
            () if deviation <= PARITY else (f"logits deviate by {deviation:.1%} from this machine's",),
        )
        return [
            Measurement("instructions", value, "", ends, len(found["counts"]), source),
            Measurement("arm_parity", deviation, "", None, len(found["counts"]), source),
        ]

    def _emulate(self, artifact: Artifact, task: Task) -> dict[str, Any]:
        rng, shape = np.random.default_rng(0), (self.runs, *task.data.input_shape)
        tokens = task.data.vocabulary
        inputs = rng.integers(0, tokens, shape) if tokens else rng.standard_normal(shape).astype(np.float32)
        expected = self.predict(artifact, inputs)
        with tempfile.TemporaryDirectory() as folder:
            program, given, wanted = (Path(folder) / name for name in ("guest.pyz", "inputs.npy", "outputs.npy"))
            program.write_bytes(_guest())
            np.save(given, inputs)
            arguments = [program, artifact.path.resolve(), given, wanted]
            command = emulated(self._system, self.core, arguments, f"{self._system / 'counter.so'},fd=1")
            try:
                done = subprocess.run(
                    command,
                    capture_output=True,
                    timeout=self.limit,
                    env=guest_environment(self._system),
                    encoding="utf-8",
                    errors="replace",
                    check=False,
                )
            except subprocess.TimeoutExpired as error:
                raise CandidateError(f"{self.name}: the emulation hung for {self.limit:.0f} s") from error
            if done.returncode:
                raise CandidateError(f"{self.name}: {_reason(done)}")
            counts = [int(line) for line in done.stdout.split()]
            deviation = np.sqrt(np.mean(np.square(np.load(wanted) - expected)) / np.mean(np.square(expected)))
        if len(counts) != self.runs or not np.isfinite(deviation):
            raise CandidateError(
                f"{self.name}: expected {self.runs} counts and finite logits, got {len(counts)} counts"
            )
        return {"counts": counts, "deviation": float(deviation)}


@functools.cache
def _guest() -> bytes:
    return python_archive("hardware.qemu_guest", ("hardware.qemu_guest", "hardware.runtimes"))


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """Why an emulated program ended; a signal of its own comes back as 128 plus its number."""
    number = -done.returncode if done.returncode < 0 else done.returncode - 128
    if number == signal.SIGILL:
        return "the file needs an instruction that the core does not have"
    if number > 0:
        return f"killed by signal {number} ({signal.Signals(number).name})"
    return (done.stderr.strip().splitlines() or ["no message"])[-1][:300]


@backend("arm/qemu-cortex-a53")
def cortex_a53_backend(threads: int = 0) -> QemuBackend:
    """Such as in a Raspberry Pi 3."""
    return QemuBackend("cortex-a53", threads)


@backend("arm/qemu-cortex-a72")
def cortex_a72_backend(threads: int = 0) -> QemuBackend:
    """Such as in a Raspberry Pi 4."""
    return QemuBackend("cortex-a72", threads)


@backend("arm/qemu-cortex-a76")
def cortex_a76_backend(threads: int = 0) -> QemuBackend:
    """Such as in a Raspberry Pi 5."""
    return QemuBackend("cortex-a76", threads)
