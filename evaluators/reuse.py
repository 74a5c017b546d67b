"""Files that an earlier run made of a candidate, taken over where training it again would give the same file."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.notes import note
from ..core.types import Artifact, Measurement, Provenance
from .adaptive import is_exit_rate

if TYPE_CHECKING:
    import onnx

SCORES = ("accuracy", "loss", "calibration_error")


@dataclass(frozen=True)
class EarlierFile:
    """The file of a trial of an earlier run on the same model and data.

    Attributes:
        run: the earlier run's folder.
        metrics: what the earlier run found.
    """

    run: str
    trial: int
    artifact: Artifact
    metrics: Mapping[str, Measurement]

    @property
    def name(self) -> str:
        """For notes."""
        return f"file of {self.run}, trial {self.trial}"

    @property
    def adaptive(self) -> bool:
        """Whether there is more to it than one file: early exits, or blocks that are left out for some inputs."""
        return any(is_exit_rate(name) or name.startswith("expected_") for name in self.metrics)


def copy_file(earlier: EarlierFile, target: str, folder: Path) -> Artifact | None:
    """Copy the file into `folder`; None, with a note, where it is gone or is not the one that was recorded."""
    path = folder / earlier.artifact.path.name
    folder.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copyfile(earlier.artifact.path, path)
        content = path.read_bytes()
    except OSError as error:
        drop_file(path)
        note(f"{earlier.name} can't be read ({error.strerror}): evaluated from scratch")
        return None
    if hashlib.sha256(content).hexdigest() != earlier.artifact.sha256:
        drop_file(path)
        note(f"{earlier.name} is not what was recorded (its SHA-256 differs): evaluated from scratch")
        return None
    return Artifact(target, path, earlier.artifact.sha256, len(content), earlier.artifact.bits)


def drop_file(path: Path) -> None:
    """Delete a copy and its folder, if nothing else is in it."""
    path.unlink(missing_ok=True)
    if not any(path.parent.iterdir()):
        path.parent.rmdir()


def same_graph(first: Path, second: Path) -> bool:
    """Whether two ONNX files differ in stored numbers alone; False for files of other kinds."""
    if first.suffix != ".onnx" or second.suffix != ".onnx":
        return False
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return _shape_of(onnx.load(str(first))) == _shape_of(onnx.load(str(second)))
    except (DecodeError, OSError):
        return False


def _shape_of(model: onnx.ModelProto) -> bytes:
    """The model without its stored numbers, as bytes that are equal for equal graphs."""
    for tensor in model.graph.initializer:
        for field in ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
            tensor.ClearField(field)
    return bytes(model.SerializeToString(deterministic=True))


def known_accuracy(
    earlier: EarlierFile, source: Provenance, untouched: Mapping[str, Measurement]
) -> dict[str, Measurement]:
    """The accuracy figures that the same runtime found on the same kind of machine; {} where it was another.

    Args:
        source: of an accuracy computed here.
        untouched: what the untouched model came to here; latencies name the runtime's version.
    """
    found = {name: earlier.metrics[name] for name in SCORES if name in earlier.metrics}
    sources = {(m.provenance.method, m.provenance.device, m.provenance.runtime) for m in found.values()}
    versions = {m["latency"].provenance.runtime if "latency" in m else "" for m in (earlier.metrics, untouched)}
    same = sources == {(source.method, source.device, source.runtime)} and len(versions) == 1
    if not same or "accuracy" not in found:
        return {}
    return found | {name: m for name, m in earlier.metrics.items() if name == "parity"}
