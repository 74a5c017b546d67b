"""Backends for NVIDIA GPUs: PyTorch, ONNX Runtime and TensorRT.

Latency is that of the device for one input that lies on it already: launches are replayed from a CUDA graph where the
runtime can (PyTorch), and copies between host and device do not count. The device part of a target chooses among
several GPUs and, for PyTorch, the precision: `gpu/torch:1`, `gpu/torch:tf32`, `gpu/torch:1,fp16`.

TensorRT's way has not been run by us (see `trt_engine`); those of PyTorch and ONNX Runtime on the CPU alone.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..compression.graph import find_layers
from ..compression.quantization import quantized_layers
from ..core.errors import CandidateError, InputError
from ..core.lane import LANE, pause_point
from ..core.registry import backend
from ..core.types import Artifact, Capabilities, Measurement, Method, Provenance, Task
from ..tasks.data import cache_folder, example_input
from .asking import ask
from .device import provenance
from .gpu_probe import BATCH
from .gpu_runtimes import PRECISIONS, Session, open_session
from .onnx_export import export_onnx
from .statistics import median_interval
from .timing import timings_from

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class GpuBackend:
    """One runtime on one GPU of this machine.

    Attributes:
        runtime: "torch", "onnxruntime" or "tensorrt".
        device: "cuda:0"; "cpu" runs the same code without a GPU, which only tests want.
        precision: for PyTorch: "fp32", "tf32", "fp16" or "bf16"; files with 16-bit layers run in these anyway.
        repeats, budget, limit: as for `CpuBackend`.
        warm_up: seconds that a file runs before it is timed, until the clock has risen.
    """

    runtime: str
    device: str = "cuda:0"
    precision: str = "fp32"
    repeats: int = 50
    budget: float = 1.0
    limit: float = 600.0
    warm_up: float = 1.0

    @property
    def name(self) -> str:
        return f"gpu/{self.runtime}"

    @property
    def capabilities(self) -> Capabilities:
        metrics: tuple[str, ...] = ("latency", "throughput", "energy", "power")
        if self.runtime == "tensorrt":
            return Capabilities(
                bits=(32, 16, 8),
                metrics=metrics,
                outputs="all",
                notes=("zeros in 2:4 pattern are used from compute capability 8.0", "never run by us"),
                fast=(16, "bf16", 8),
                sparsity=("2:4",),
                fixed_shapes=True,
                method=Method.MEASURED,
            )
        if self.runtime == "onnxruntime":
            told = "CUDA provider; rounded layers are computed in floating point"
            return Capabilities((32, 16), metrics, notes=(told,), fast=(16,), method=Method.MEASURED)
        told = "rounding below 16 bits is imitated in floating point"
        return Capabilities((32, 16), (*metrics, "memory"), notes=(told,), fast=(16, "bf16"), method=Method.MEASURED)

    @property
    def predicts_on(self) -> str:
        """The GPU's name."""
        return self._source().device

    def missing(self) -> str | None:
        """What is not here and how to get it."""
        for package in {"torch": ("torch",), "tensorrt": ("tensorrt", "torch")}.get(self.runtime, (self.runtime,)):
            if importlib.util.find_spec(package) is None:
                how = "see NVIDIA's installation guide" if package == "tensorrt" else f"pip install {package}"
                return f"{self.name} needs the package {package}: {how}"
        if self.device == "cpu":
            return None
        import torch

        if not torch.cuda.is_available():
            built = "" if torch.version.cuda else ", and this PyTorch was built without CUDA: install a CUDA build"
            return f"{self.name} needs an NVIDIA GPU with its driver; none is here{built}"
        number = int(self.device.partition(":")[2] or 0)
        if number >= torch.cuda.device_count():
            return f"{self.name}:{number}: there are {torch.cuda.device_count()} GPUs, numbered from 0"
        if self.runtime == "onnxruntime":
            import onnxruntime

            if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
                return f"{self.name} needs ONNX Runtime's CUDA provider: pip install onnxruntime-gpu"
        return None

    def build(self, model: nn.Module, task: Task, folder: Path) -> Artifact:
        """Write `model.pt2` (PyTorch) or `model.onnx` (the others)."""
        if self.runtime != "torch":
            return export_onnx(model, example_input(task.data), folder / "model.onnx", self.name)
        return export_program(model, task, folder / "model.pt2", self.name)

    def predict(self, artifact: Artifact, inputs: np.ndarray) -> np.ndarray:
        """Logits (N, classes) of inputs as `normalise` makes them, in batches, on the GPU."""
        size = min(len(inputs), BATCH)
        pieces = []
        try:
            session: Session | None = None
            for start in range(0, len(inputs), size):
                pause_point()
                piece = np.ascontiguousarray(inputs[start : start + size])
                filled = (
                    np.concatenate([piece, np.repeat(piece[-1:], size - len(piece), 0)]) if len(piece) < size else piece
                )
                if session is None:
                    session = open_session(self._request(artifact), str(artifact.path), filled)
                session.load(filled)
                session.run()
                pieces.append(np.array(session.logits())[: len(piece)])
        except (CandidateError, TimeoutError, MemoryError):
            raise
        except Exception as error:  # each runtime has its own exceptions for files that it can't load or run
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise CandidateError(f"{self.name} can't run the file: {lines[0][:300]}") from error
        return np.concatenate(pieces)

    def measure(self, artifact: Artifact, task: Task, reference: Artifact | None) -> list[Measurement]:
        """Latency (and the reference's, taken in turns with it), throughput, memory and energy of one file.

        Energy is that of the whole board for one input, joules; "power" while it runs, watts; the board's idle power
        stands in the flags and is not subtracted.
        """
        request = self._request(artifact) | {
            "path": str(artifact.path),
            "reference": str(reference.path) if reference else "",
            "input_shape": list(task.data.input_shape),
            "vocabulary": task.data.vocabulary,
            "batch": BATCH,
            "repeats": self.repeats,
            "budget": self.budget,
            "warm_up": self.warm_up,
        }
        with LANE.exclusive():
            answer = ask("autocompress.hardware.gpu_probe", request, self.name, self.limit)
        return self._figures(answer)

    def _figures(self, answer: Mapping[str, Any]) -> list[Measurement]:
        timings, batches = timings_from(answer["timings"]), timings_from(answer["batches"])
        source = self._source()
        found = []
        for key, name in (("latency", "latency"), ("reference", "reference_latency")):
            if key in timings.samples:
                value, ends = median_interval(timings.counted(key))
                found.append(Measurement(name, value, "s", ends, len(timings.counted(key)), source))
        rates = [answer["batch"] / seconds for seconds in batches.counted("batch")]
        value, ends = median_interval(rates)
        found.append(Measurement("throughput", value, "1/s", ends, len(rates), source))
        if answer["memory"] is not None:
            found.append(Measurement("memory", float(answer["memory"]), "B", None, 1, source))
        return found + (energy_figures(answer["energy"], source) if answer["energy"] else [])

    def _source(self) -> Provenance:
        version = importlib.import_module(self.runtime).__version__  # of whichever package brings it
        if self.device == "cpu":
            return provenance(f"{self.runtime} {version}", method=Method.SIMULATED)
        import torch

        here = provenance(f"{self.runtime} {version}, {self.precision}" if self.runtime == "torch" else self.runtime)
        return replace(here, device=torch.cuda.get_device_name(self.device))

    def _request(self, artifact: Artifact) -> dict[str, Any]:
        formats = {entry["weight"] for entry in artifact.bits.values()}
        precision = "bf16" if "bf16" in formats else "fp16" if 16 in formats else self.precision
        cache = str(cache_folder() / "tensorrt")
        return {"runtime": self.runtime, "precision": precision, "device": self.device, "cache": cache}


def energy_figures(record: Mapping[str, Any], source: Provenance) -> list[Measurement]:
    """ "energy" and "power" from what `nvml.record_energy` returned."""
    flags = [f"board idles at {record['idle']:.0f} W", f"at {record['clock']} MHz"]
    flags += [] if record["counter"] else ["power readings integrated"]
    flags += [] if record["steady"] else ["the clock was still changing"]
    told = replace(source, flags=(*source.flags, *flags))
    found = []
    for name, unit, values in (
        ("energy", "J", [joules / runs for joules, _, runs in record["work"]]),
        ("power", "W", [joules / seconds for joules, seconds, _ in record["work"]]),
    ):
        value, ends = median_interval(values)
        found.append(Measurement(name, value, unit, ends, len(values), told))
    return found


def export_program(model: nn.Module, task: Task, path: Path, target: str) -> Artifact:
    """Write `model` as a `torch.export` program that takes any batch size.

    Raises:
        CandidateError: the model can't be traced.
    """
    import torch

    example = example_input(task.data, 2)
    batch = torch.export.Dim("batch", min=1, max=65536)
    try:
        with torch.no_grad():
            program = torch.export.export(model.eval(), (example,), dynamic_shapes=({0: batch},))
    except Exception as error:  # tracing raises many kinds; all mean "can't be exported"
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CandidateError(f"torch.export can't trace the model: {lines[0][:300]}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.export.save(program, path)
    content = path.read_bytes()
    rounded = quantized_layers(model)
    bits: dict[str, dict[str, int | float | str]] = {}
    for layer in find_layers(model, example_input(task.data)):
        entry = rounded.get(layer.name)
        bits[layer.name] = {
            "weight": entry.bits if entry else 32,
            "activation": entry.bits if entry and entry.input is not None else 32,
        }
    return Artifact(target, path, hashlib.sha256(content).hexdigest(), len(content), bits)


def parse_device(runtime: str, device: str) -> tuple[str, str]:
    """("cuda:1", "fp16") of "1,fp16", in any order; ("cuda:0", "fp32") of "".

    Raises:
        InputError: neither a number nor a precision, or a precision for another runtime than PyTorch.
    """
    number, precision = "0", "fp32"
    for part in filter(None, device.split(",")):
        if part.isdigit():
            number = part
        elif part in PRECISIONS and runtime == "torch":
            precision = part
        else:
            also = f" or {', '.join(PRECISIONS)}" if runtime == "torch" else ""
            raise InputError(f"gpu/{runtime}: expected the number of a GPU{also}, got '{part}'")
    return f"cuda:{number}", precision


@backend("gpu/torch")
def torch_backend(threads: int = 0, device: str = "") -> GpuBackend:
    """PyTorch on CUDA."""
    return GpuBackend("torch", *parse_device("torch", device))


@backend("gpu/onnxruntime")
def onnxruntime_gpu_backend(threads: int = 0, device: str = "") -> GpuBackend:
    """ONNX Runtime's CUDA provider."""
    return GpuBackend("onnxruntime", *parse_device("onnxruntime", device))


@backend("gpu/tensorrt")
def tensorrt_backend(threads: int = 0, device: str = "") -> GpuBackend:
    """TensorRT engines from the QDQ ONNX file."""
    return GpuBackend("tensorrt", *parse_device("tensorrt", device))
