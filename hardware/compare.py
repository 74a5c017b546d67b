"""One model on many targets: every figure with its kind, or the reason why there is none."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ..compression.quantization import Quantize
from ..core.errors import AutocompressError, InputError
from ..core.types import Artifact, Backend, Measurement, Task
from .files import read_file
from .targets import find_backend

# One target for each way to a figure; `BACKENDS` has the others.
USUAL = (
    "x86/onnxruntime",
    "x86/openvino",
    "x86/tvm",
    "gpu/torch",
    "gpu/tensorrt",
    "tpu/v5e",
    "tpu/edgetpu",
    "arm/pixel3",
    "arm/qemu-cortex-a72",
    "fpga/ecp5-85",
)


@dataclass(frozen=True)
class Compared:
    """What one target makes of the model.

    Attributes:
        bits: width of weights and activations; 32 for the model as it is, None for what a file holds.
        measurements: by metric name; {} where there is a reason.
        reason: why there are none; "" otherwise.
        here: whether everything that the target needs is on this machine.
    """

    target: str
    bits: int | None
    measurements: Mapping[str, Measurement] = field(default_factory=dict)
    reason: str = ""
    here: bool = True


def compare_model(
    task: Task,
    targets: Sequence[str] = USUAL,
    bits: Sequence[int] = (32,),
    threads: int = 0,
    on_target: Callable[[str], None] = lambda target: None,
) -> Iterator[Compared]:
    """Build and measure the task's model for each target, one after the other.

    Args:
        bits: uniform widths to round the model to; 32 leaves it as it is (some targets round on their own).
        on_target: called with the name of each target before it is tried.

    Raises:
        InputError: no such target; before anything is measured.
    """
    backends = [find_backend(target, threads) for target in targets]

    def measured(backend: Backend, width: int, folder: Path) -> list[Measurement]:
        model = task.build()
        if width < 32:
            model = Quantize(width, outputs=backend.capabilities.outputs)(copy.deepcopy(model), task)
        return backend.measure(backend.build(model, task, folder), task, None)

    for target, backend in zip(targets, backends, strict=True):
        on_target(target)
        for width in bits:
            if width < 32 and width not in backend.capabilities.bits and not backend.missing():
                offered = ", ".join(str(b) for b in backend.capabilities.bits)
                yield Compared(target, width, reason=f"no kernels for {width} bits; it has {offered}")
                continue
            yield _tried(target, width, backend, partial(measured, backend, width))


def compare_file(
    path: Path,
    targets: Sequence[str] = USUAL,
    threads: int = 0,
    on_target: Callable[[str], None] = lambda target: None,
) -> Iterator[Compared]:
    """Measure an ONNX file on each target, as it is.

    Raises:
        InputError: no such target, or no file that can be measured; before anything is.
    """
    backends = [find_backend(target, threads) for target in targets]
    files = [read_file(path, target) for target in targets]

    def measured(backend: Backend, artifact: Artifact, task: Task, folder: Path) -> list[Measurement]:
        return backend.measure(artifact, task, None)

    for target, backend, (artifact, task) in zip(targets, backends, files, strict=True):
        on_target(target)
        yield _tried(target, None, backend, partial(measured, backend, artifact, task))


def _tried(target: str, bits: int | None, backend: Backend, measure: Callable[[Path], list[Measurement]]) -> Compared:
    missing = backend.missing()
    if missing:
        return Compared(target, bits, reason=missing, here=False)
    with tempfile.TemporaryDirectory(prefix="autocompress-") as folder:
        try:
            found = measure(Path(folder))
        except (AutocompressError, RuntimeError, TimeoutError, MemoryError) as error:
            # What a runtime can't do is this target's result; the others go on.
            lines = str(error).strip().splitlines() or [type(error).__name__]
            return Compared(target, bits, reason=lines[0][:300])
    return Compared(target, bits, {m.name: m for m in found})


def check_targets(targets: Sequence[str]) -> None:
    """Raise InputError for a name that no target has, or that is given twice."""
    for target in targets:
        find_backend(target)
    repeated = sorted({target for target in targets if list(targets).count(target) > 1})
    if repeated:
        raise InputError(f"--target: {', '.join(repeated)} given more than once")
