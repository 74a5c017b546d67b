"""Backends for boards that are not here: latency predicted by a model fitted to what was measured on them."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.errors import InputError
from ..core.registry import backend
from ..core.types import Artifact, Capabilities, Measurement, Method, Provenance, Task
from .costs import COLUMNS, LatencyModel, Seen
from .device import provenance
from .operators import read_operators
from .x86 import CpuBackend

if TYPE_CHECKING:
    from torch import nn

TABLE = Path(__file__).parent / "tables" / "boards.json"
CALIBRATED = ("arm", "x86", "gpu")  # families of which devices are calibrated: FAMILY/board:FILE
SHIPPED = ("pixel3", "samsung_a50", "samsung_s7", "essential_ph_1")


@dataclass(frozen=True)
class Board:
    """A device by its latency model.

    Attributes:
        device: such as "Google Pixel 3".
        errors: of held-out networks: "mape" and "coverage" (of 95 % intervals) as shares of 1, "spearman",
            "repeat_noise"; what is not known is left out.
        source: where the measurements come from.
    """

    device: str
    model: LatencyModel
    errors: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""


def encode_board(board: Board) -> dict[str, Any]:
    """A board as JSON holds it; the costs by name, of their covariance the lower triangle."""
    model = board.model
    costs = {name: _short(value) for name, value in zip(COLUMNS, np.exp(model.log_costs).tolist(), strict=True)}
    triangle = [[_short(value, 4) for value in row[: at + 1]] for at, row in enumerate(model.covariance.tolist())]
    return {
        "device": board.device,
        "source": board.source,
        "held_out": {key: _short(value) if isinstance(value, float) else value for key, value in board.errors.items()},
        "seconds": costs,
        "spread": _short(model.spread),
        "samples": model.samples,
        "int8": model.int8,
        "block": model.block,
        "seen": {**dataclasses.asdict(model.seen), "columns": {k: _short(v) for k, v in model.seen.columns.items()}},
        "covariance": triangle,
    }


def decode_board(entry: Mapping[str, Any], where: str) -> Board:
    """The board that `encode_board` wrote.

    Args:
        where: what to call the file in an error.

    Raises:
        InputError: it was not written by this version of `encode_board`.
    """
    try:
        costs = [float(entry["seconds"][name]) for name in COLUMNS]
        covariance = np.zeros((len(COLUMNS), len(COLUMNS)))
        for at, row in enumerate(entry["covariance"]):
            covariance[at, : at + 1] = covariance[: at + 1, at] = row
        model = LatencyModel(
            np.log(costs),
            covariance,
            float(entry["spread"]),
            int(entry["samples"]),
            Seen(**entry["seen"]),
            bool(entry["int8"]),
            int(entry.get("block", 1)),
        )
        return Board(str(entry["device"]), model, dict(entry["held_out"]), str(entry["source"]))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{where}: expected the latency model of a board ({reason}); calibrate it again") from error


def write_boards(boards: Mapping[str, Board], path: Path) -> None:
    """Write several boards by name."""
    write_json({name: encode_board(board) for name, board in boards.items()}, path)


def read_boards(path: Path = TABLE) -> dict[str, Board]:
    """The boards that `write_boards` wrote, those of this package by default."""
    return {name: decode_board(entry, f"{path.name}: {name}") for name, entry in read_json(path).items()}


def write_json(value: Any, path: Path) -> None:
    """Write a file that is never seen half-written."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(_lines(value) + "\n")
    partial.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        InputError: no such file, or no JSON object in it.
    """
    if not path.is_file():
        raise InputError(f"there is no file '{path}'; expected JSON as `write_boards` writes it")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of both, bytes that are no text and text that is no JSON
        raise InputError(f"{path} is no readable JSON file: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected a JSON object, got a {type(found).__name__}")
    return found


def _lines(value: Any, indent: str = "") -> str:
    """JSON with a line for each entry, but lists of numbers on one."""
    inner = f"{indent} "
    if isinstance(value, Mapping) and value:
        entries = [f"{inner}{json.dumps(key)}: {_lines(entry, inner)}" for key, entry in value.items()]
        return "{\n" + ",\n".join(entries) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(entry, (list, Mapping)) for entry in value):
        return "[\n" + ",\n".join(inner + _lines(entry, inner) for entry in value) + f"\n{indent}]"
    return json.dumps(value)


def _short(value: float, digits: int = 6) -> float:
    return float(f"{value:.{digits}g}")


@dataclass(frozen=True)
class BoardBackend:
    """A board that is not here; its files are ONNX and its latency is predicted.

    Attributes:
        name: such as "arm/pixel3".
        board: its latency model; None where it can't be read, which `problem` explains.
        threads: for ONNX Runtime, which runs the files here.
    """

    name: str
    board: Board | None
    threads: int = 0
    problem: str = ""

    @property
    def capabilities(self) -> Capabilities:
        notes = ["latency is predicted; accuracy is that of ONNX Runtime on this machine"]
        int8 = False
        if self.board is not None:
            errors, int8 = self.board.errors, self.board.model.int8
            notes[:0] = [f"{self.board.device}, fitted to {self.board.model.samples} networks{_stated(errors)}"]
            if not int8:
                notes.append("8-bit layers are timed as float, and flagged")
        return Capabilities(
            (32, 16, 8), ("latency",), "all", tuple(notes), emulated=True, fast=(8,) if int8 else (),
            method=Method.PREDICTED,
        )  # fmt: skip

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
        if self.problem:
            return self.problem
        if importlib.util.find_spec("onnxruntime") is None:
            return f"{self.name} runs its files by the package onnxruntime: pip install onnxruntime"
        return None

    def build(self, model: nn.Module, task: Task, folder: Path) -> Artifact:
        """Write `model.onnx`."""
        return dataclasses.replace(self._host.build(model, task, folder), runtime=self.name)

    def predict(self, artifact: Artifact, inputs: np.ndarray) -> np.ndarray:
        """Logits (N, classes) of inputs as `normalise` makes them, by ONNX Runtime on this machine's CPU."""
        return self._host.predict(artifact, inputs)

    def measure(self, artifact: Artifact, task: Task, reference: Artifact | None) -> list[Measurement]:
        """Latency of one file (and of the reference), predicted from its operators.

        The interval is that of held-out networks; where a file goes beyond those that the model was fitted to, there
        is none, and the flags say why.
        """
        found = [self._latency("latency", artifact)]
        if reference is not None:
            found.append(self._latency("reference_latency", reference))
        return found

    def _latency(self, name: str, artifact: Artifact) -> Measurement:
        if self.board is None:
            raise InputError(self.problem)
        model = self.board.model
        calls = read_operators(artifact.path)
        value, low, high = (float(ends[0]) for ends in model.predict(model.features([calls])))
        flags = tuple(f"extrapolated: {reason}" for reason in model.extrapolations(calls))
        runtime = f"latency model of {model.samples} measured networks"
        device = f"{self.board.device} (predicted)"
        source = Provenance(Method.PREDICTED, device, runtime, provenance(runtime).taken_at, flags)
        return Measurement(name, value, "s", None if flags else (low, high), model.samples, source)


def _stated(errors: Mapping[str, Any]) -> str:
    """The errors of held-out networks, in words."""
    parts = []
    if "mape" in errors:
        parts.append(f"mean error {errors['mape']:.0%}")
    if "spearman" in errors:
        parts.append(f"rank correlation {errors['spearman']:.2f}")
    if "coverage" in errors:
        parts.append(f"{errors['coverage']:.0%} in their intervals")
    if "repeat_noise" in errors:
        parts.append(f"their own noise {errors['repeat_noise']:.0%}")
    return f" (held-out networks: {', '.join(parts)})" if parts else ""


def _register_calibrated(family: str) -> None:
    @backend(f"{family}/board")
    def board_backend(threads: int = 0, device: str = "") -> BoardBackend:
        """A device by its calibration file, such as `arm/board:PATH.json`."""
        name = f"{family}/board"
        if not device:
            hint = f"{name} needs a file, as in {name}:PATH.json; make one by `autocompress hardware calibrate`"
            return BoardBackend(name, None, threads, hint)
        path = Path(device)
        entry = read_json(path)
        if not entry.get("latency_model"):
            raise InputError(f"{path}: expected a finished calibration, which has a latency_model; calibrate on")
        return BoardBackend(f"{name}:{device}", decode_board(entry["latency_model"], str(path)), threads)


def _register(name: str) -> None:
    @backend(f"arm/{name}")
    def shipped_backend(threads: int = 0) -> BoardBackend:
        """A phone from the table of this package."""
        return BoardBackend(f"arm/{name}", read_boards()[name], threads)


for _family in CALIBRATED:
    _register_calibrated(_family)
for _name in SHIPPED:
    _register(_name)
