"""Backend for a real board: a small program on it times files, started over SSH or listening on a port."""

from __future__ import annotations

import atexit
import datetime
import hashlib
import io
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ..core.errors import CandidateError, DeviceLostError, InputError, MissingDependencyError
from ..core.lane import pause_point
from ..core.registry import backend
from ..core.types import Artifact, Capabilities, Measurement, Method, Provenance, Task
from .board_agent import LITERT, TOKEN
from .board_connection import PORT, PYTHON, SSH, Connection, connect
from .board_wire import Message, WireError
from .statistics import median_interval
from .x86 import METRICS, CpuBackend

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T")
HOT = 80.0  # degrees Celsius from which boards slow down
# Connections of this process (children must not share their parent's), kept for the next measurement.
_OPEN: dict[tuple[int, AgentBackend], Connection] = {}


@dataclass(frozen=True)
class AgentBackend:
    """A board that runs files in ONNX Runtime; its figures are measured there, accuracy included.

    A file that ends in .tflite is timed in LiteRT.

    Attributes:
        address: `[user@]host[:port]` for SSH, `tcp://host[:port]` for the server; "" for no board yet.
        threads: cores of the board that a measurement is pinned to; 0 for all of the fastest kind.
        repeats, budget, limit, spread, attempts: as for `CpuBackend`.
        ssh: the command that runs another on a board; port, host and command are added.
        python: how the board calls its Python, such as "~/venv/bin/python".
        pauses: seconds before each further try to reach a board that has gone away.
    """

    address: str = ""
    threads: int = 0
    repeats: int = 30
    budget: float = 0.5
    limit: float = 600.0
    spread: float = 0.1
    attempts: int = 3
    ssh: tuple[str, ...] = SSH
    python: str = "python3"
    pauses: tuple[float, ...] = (1.0, 2.0, 4.0)

    @property
    def name(self) -> str:
        return f"arm/agent:{self.address}" if self.address else "arm/agent"

    @property
    def capabilities(self) -> Capabilities:
        notes = (
            "int8 is faster where the cores have dot products (Cortex-A76 and later)",
            "16-bit layers are stored as float16 and run in float32",
            "accuracy is computed on the board too",
            "TensorFlow Lite files that people bring are timed by LiteRT, where the board has it",
            "energy: unknown without a power meter",
        )
        return Capabilities((32, 16, 8), METRICS, "all", notes, method=Method.MEASURED)

    @property
    def predicts_on(self) -> str:
        """The board, as it calls itself: accuracies are computed there."""
        return self._talk(lambda board: str(board.board["board"]))

    @property
    def cores(self) -> list[int]:
        """The board's cores, counted from 0; raises InputError if more threads than cores are asked for."""
        count = self._talk(lambda board: board.board["cores"])
        if self.threads > count:
            raise InputError(f"threads: {self.threads} asked for, but {self.name} has {count} cores")
        return list(range(self.threads or count))

    def missing(self) -> str | None:
        """What is not here and how to get it; tries to reach the board."""
        if not self.address:
            return (
                "arm/agent needs the name of a board: arm/agent:user@host (over ssh), "
                f"or arm/agent:tcp://host:{PORT} (its server; token in ${TOKEN})"
            )
        key = (os.getpid(), self)
        try:
            if key not in _OPEN:
                _OPEN[key] = connect(self.name, self.address, self.ssh, self.python)
        except MissingDependencyError as error:
            return str(error)
        return None

    def build(self, model: nn.Module, task: Task, folder: Path) -> Artifact:
        """Write `model.onnx` as for ONNX Runtime here."""
        return replace(CpuBackend("onnxruntime").build(model, task, folder), runtime=self.name)

    def predict(self, artifact: Artifact, inputs: np.ndarray) -> np.ndarray:
        """Logits (N, classes) as the board computes them; it keeps the inputs, so that they are sent once."""
        batch = max(1, min(32, int(2e6 / inputs[0].size)))
        size = max(batch, int(4e6 / inputs[0].size) // batch * batch)
        return np.concatenate(
            [self._predict(artifact, inputs[start : start + size], batch) for start in range(0, len(inputs), size)]
        )

    def measure(self, artifact: Artifact, task: Task, reference: Artifact | None) -> list[Measurement]:
        """Latency (and the reference's, taken in turns with it), throughput and peak memory, as for `CpuBackend`.

        What the board says of itself is in the flags: its governor, heat, throttling, and other work.
        """
        runtime = "litert" if artifact.path.suffix == ".tflite" else "onnxruntime"
        probe = {
            "runtime": runtime,
            "bf16": False,
            "reference_bf16": False,
            "input_shape": list(task.data.input_shape),
            "vocabulary": task.data.vocabulary,
            "repeats": self.repeats,
            "budget": self.budget,
        }
        request = {"op": "measure", "probe": probe, "threads": self.threads, "limit": self.limit}
        request["file"] = artifact.sha256
        request["reference"] = reference.sha256 if reference else ""

        def ask(board: Connection) -> Message:
            package = _package(runtime, board.board["versions"])
            if package is None:
                command = f"{board.board['executable']} -m pip install ai-edge-litert"
                raise CandidateError(
                    f"{self.name}: the board lacks LiteRT for {artifact.path.name}; run there: {command}"
                )
            pause_point()
            for file in (artifact, reference):
                if file is not None:
                    board.hold(file.sha256, file.path.read_bytes)
            version = f"{package} {board.board['versions'][package]}"
            return {**board.ask(request)[0], "board": board.board, "runtime": version}

        found = self._talk(ask)
        for _ in range(self.attempts - 1):
            if _doubt(found["answer"], self.spread) == (0, 0.0):
                break
            found = min(found, self._talk(ask), key=lambda one: _doubt(one["answer"], self.spread))
        return self._figures(found)

    def _predict(self, artifact: Artifact, inputs: np.ndarray, batch: int) -> np.ndarray:
        stream = io.BytesIO()
        np.save(stream, np.ascontiguousarray(inputs), allow_pickle=False)
        name = hashlib.sha256(stream.getvalue()).hexdigest()
        request = {"op": "predict", "file": artifact.sha256, "inputs": name, "batch": batch}
        request |= {"threads": self.threads, "limit": self.limit}

        def ask(board: Connection) -> bytes:
            pause_point()
            board.hold(artifact.sha256, artifact.path.read_bytes)
            board.hold(name, stream.getvalue)
            return board.ask(request)[1]

        return np.load(io.BytesIO(self._talk(ask)), allow_pickle=False)

    def _figures(self, found: Message) -> list[Measurement]:
        board, answer, threads = found["board"], found["answer"], len(found["cores"])
        source = Provenance(
            Method.MEASURED,
            f"{board['board']}, {threads} thread{'s' if threads > 1 else ''}",
            found["runtime"],
            datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        doubts = (*state_flags(found["before"], found["after"]), *answer["doubts"])

        def figure(name: str, unit: str, values: list[float]) -> Measurement:
            value, ends = median_interval(values)
            wide = (ends[1] - ends[0]) / value
            flags = (*doubts, f"interval {100 * wide:.0f} % wide") if wide > self.spread else doubts
            return Measurement(name, value, unit, ends, len(values), replace(source, flags=flags))

        figures = [figure("latency", "s", answer["latency"])]
        if answer["reference"]:
            figures.append(figure("reference_latency", "s", answer["reference"]))
        figures.append(figure("throughput", "1/s", [answer["batch"] / seconds for seconds in answer["batch_times"]]))
        figures.append(Measurement("memory", float(answer["memory"]), "B", None, 1, source))
        return figures

    def _talk(self, say: Callable[[Connection], T]) -> T:
        """Say something to the board; where the connection breaks, say it once more on a new one.

        Raises:
            CandidateError: the connection broke both times, and yet the board answers: it does not survive the request.
            DeviceLostError: the board can't be reached any more.
        """
        key, broke = (os.getpid(), self), ""
        for _ in range(2):
            try:
                return say(self._connection())
            except WireError as error:
                broke = str(error)
                _OPEN.pop(key).close()
        self._connection()
        raise CandidateError(f"{self.name}: the board broke off twice over this: {broke}")

    def _connection(self) -> Connection:
        """The open connection, or a new one; a board that does not answer is tried again for a while."""
        key = (os.getpid(), self)
        for pause in (*self.pauses, None):
            if key in _OPEN:
                break
            try:
                _OPEN[key] = connect(self.name, self.address, self.ssh, self.python)
            except (InputError, MissingDependencyError) as error:
                if pause is None:
                    raise DeviceLostError(f"the board was lost: {error}") from error
                time.sleep(pause)
        return _OPEN[key]


def _package(runtime: str, versions: Mapping[str, str]) -> str | None:
    """The package by which a board runs a runtime's files; None where it has none."""
    names = LITERT if runtime == "litert" else (runtime,)
    return next((name for name in names if name in versions), None)


def state_flags(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, ...]:
    """Why to doubt what a board measured, from its state before and after."""
    flags = [f"governor {name}" for name in after["governors"] if name != "performance"]
    hottest = max((state["celsius"] for state in (before, after) if state["celsius"] is not None), default=0)
    if hottest >= HOT:
        flags.append(f"{hottest:.0f} degrees C")
    return (*flags, *sorted({*before["throttling"], *after["throttling"]}))


def _doubt(answer: Mapping[str, Any], spread: float) -> tuple[int, float]:
    """How much to doubt an answer: number of reasons, then width of the widest interval; (0, 0.0) for not at all."""
    width = 0.0
    for values in (answer["latency"], answer["reference"]):
        if values:
            value, (low, high) = median_interval(values)
            width = max(width, (high - low) / value)
    doubts = len(answer["doubts"])
    return doubts, width if width > spread or doubts else 0.0


@atexit.register
def _close_all() -> None:
    for (process, _), connection in _OPEN.items():
        if process == os.getpid():
            connection.close()


@backend("arm/agent")
def agent_backend(threads: int = 0, device: str = "") -> AgentBackend:
    """A board by its address; $AUTOCOMPRESS_AGENT_PYTHON names its Python."""
    return AgentBackend(device, threads, python=os.environ.get(PYTHON, "python3"))
