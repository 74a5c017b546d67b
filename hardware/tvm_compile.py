"""The compiling process: an ONNX file becomes shared libraries of TVM, one for each batch size.

A process of its own keeps TVM's crashes and its compiler's memory away from searches and measurements. Run as
`python -m autocompress.hardware.tvm_compile FOLDER BATCH...`; the folder holds the request (`Request`), and gets
`batch1.so` and the like.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import CandidateError
from .device import cpu_flags

LIMIT = 1800.0  # seconds for compiling; tuning has a limit of its own
# Vector features by the names of Linux and of LLVM: a virtual machine may hide what its processor's name promises.
FEATURES = {
    "avx": "avx", "avx2": "avx2", "fma": "fma", "f16c": "f16c", "avx_vnni": "avxvnni", "avx512f": "avx512f",
    "avx512bw": "avx512bw", "avx512cd": "avx512cd", "avx512dq": "avx512dq", "avx512vl": "avx512vl",
    "avx512vbmi": "avx512vbmi", "avx512_vbmi2": "avx512vbmi2", "avx512_vnni": "avx512vnni",
    "avx512_bitalg": "avx512bitalg", "avx512_vpopcntdq": "avx512vpopcntdq", "avx512ifma": "avx512ifma",
    "avx512_bf16": "avx512bf16", "avx512_fp16": "avx512fp16", "amx_tile": "amx-tile", "amx_int8": "amx-int8",
    "amx_bf16": "amx-bf16",
}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """What a folder's libraries are made from.

    Attributes:
        model: path of the ONNX file.
        trials: schedules that are timed for each of its functions, for single inputs; 0 for no tuning.
        records: folder of what earlier tuning found.
        cores: the numbers of the cores that tuning times on.
    """

    model: str
    trials: int
    records: str
    cores: tuple[int, ...]

    def write(self, folder: Path) -> None:
        """Store it as `request.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"request.{os.getpid()}.part"
        part.write_text(json.dumps(dataclasses.asdict(self)))
        part.replace(folder / "request.json")


def library_path(folder: Path, batch: int) -> Path:
    """Where the library for a batch size stands, or will."""
    return folder / f"batch{batch}.so"


def compile_libraries(folder: Path, batches: Iterable[int], limit: float = LIMIT) -> None:
    """Make the libraries that the folder lacks, in a process of their own.

    Raises:
        CandidateError: TVM can't compile the file, or takes longer than `limit` seconds; says why in one line.
    """
    lacking = [str(batch) for batch in batches if not library_path(folder, batch).exists()]
    if not lacking:
        return
    command = [sys.executable, "-m", "autocompress.hardware.tvm_compile", str(folder), *lacking]
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=limit, check=False, encoding="utf-8", errors="replace"
        )
    except subprocess.TimeoutExpired as error:
        raise CandidateError(f"it took longer than {limit:.0f} s") from error
    if done.returncode < 0:
        raise CandidateError(f"the compiler was killed by signal {-done.returncode}")
    if done.returncode:
        said = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["no message"]
        raise CandidateError(said[-1])


def main() -> None:
    """Compile what the command line asks for; an error is the last line of the output, for the process that waits."""
    folder, batches = Path(sys.argv[1]), [int(text) for text in sys.argv[2:]]
    request = json.loads((folder / "request.json").read_text())
    if request["trials"]:
        # What tuning times has the cores and threads that a measurement has; the processes that it starts inherit them.
        os.sched_setaffinity(0, request["cores"])
        os.environ["TVM_NUM_THREADS"] = str(len(request["cores"]))
    try:
        for batch in batches:
            _compile(Request(**request), batch, library_path(folder, batch))
    except Exception as error:  # the front end and the compiler raise whatever they like; all mean "can't be compiled"
        lines = str(error).strip().splitlines() or ["no message"]
        print(f"{type(error).__name__}: {lines[0][:300]}")
        sys.exit(1)


def _compile(request: Request, batch: int, path: Path) -> None:
    import tvm

    from .tvm_schedule import schedule_functions

    target = make_target(request.cores)
    with target, tvm.transform.PassContext(opt_level=3):
        module = lower(request.model, batch)
        if request.trials and batch == 1:
            from .tvm_tuning import apply_tuned

            module = apply_tuned(module, target, request)
        built = tvm.compile(schedule_functions(module), target)
    part = path.with_name(f"{path.stem}.{os.getpid()}.part.so")
    built.export_library(str(part))
    part.replace(path)


def make_target(cores: Iterable[int]) -> Any:
    """This machine's processor, as TVM names it, without the features that it does not show."""
    import tvm
    from tvm.target.codegen import llvm_get_cpu_features, llvm_get_system_cpu

    described: dict[str, Any] = {"kind": "llvm", "mcpu": llvm_get_system_cpu(), "num-cores": len(list(cores))}
    promised = {str(name) for name in llvm_get_cpu_features(tvm.target.Target(described))}
    hidden = [f"-{llvm}" for linux, llvm in FEATURES.items() if llvm in promised and linux not in cpu_flags()]
    return tvm.target.Target({**described, "mattr": hidden} if hidden else described)


def lower(model: str, batch: int) -> Any:
    """The file's network as a module of fused loops, for one batch size.

    Convolutions without groups read their channels last: there, the weights of neighbouring outputs lie together, as
    vectors want them.
    """
    import onnx
    from onnxscript.optimizer import fold_constants
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx

    proto = onnx.load(model)
    # TVM's front end knows no weights in 4 bits or 8-bit floats; what is stored rounded is computed in float32 anyway.
    fold_constants(proto, input_size_limit=2**62, output_size_limit=2**62, should_fold=lambda node: True)
    if any(node.op_type == "Cast" and _names_float8(node) for node in proto.graph.node):
        raise ValueError("TVM 0.27 rounds computed values to 8-bit floats wrongly")
    entry = proto.graph.input[0]
    shape = [batch, *(size.dim_value for size in entry.type.tensor_type.shape.dim[1:])]
    module = from_onnx(proto, shape_dict={entry.name: shape}, keep_params_in_input=False)
    passes = [
        relax.transform.DecomposeOpsForInference(),
        relax.transform.CanonicalizeBindings(),
        relax.transform.ConvertLayout({}, _channels_last),
        relax.transform.FoldConstant(),
        relax.get_pipeline("zero"),
    ]
    for step in passes:
        module = step(module)
    return module


def _names_float8(node: Any) -> bool:
    from onnx import TensorProto

    kinds = {number for name, number in TensorProto.DataType.items() if name.startswith("FLOAT8")}
    return any(attribute.name == "to" and attribute.i in kinds for attribute in node.attribute)


def _channels_last(call: Any) -> dict[str, list[str]]:
    if call.op.name == "relax.nn.conv2d" and int(call.attrs.groups) == 1:
        return {"relax.nn.conv2d": ["NHWC", "HWIO"]}
    return {}


if __name__ == "__main__":
    main()
