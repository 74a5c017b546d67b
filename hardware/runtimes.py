"""The runtimes on processors: each opens a model file and returns a function from images to logits.

Imports nothing of the package that loads torch: the measuring process uses this file alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Run = Callable[[Any], Any]
ONE_CORE_EACH, SHARED_CORES = -2, -3  # how TVM's threads are pinned


def open_onnxruntime(path: str, batch: int | None, threads: int, bf16: bool) -> Run:
    """Open with ONNX Runtime's CPU provider.

    Args:
        batch: fixed batch size; None for any.
        bf16: ignored, as the CPU provider computes half-precision weights in float32.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if batch is not None:
        options.add_free_dimension_override_by_name("batch", batch)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


def open_openvino(path: str, batch: int | None, threads: int, bf16: bool) -> Run:
    """Open with OpenVINO's CPU plugin, in bfloat16 where asked and the cores have it, else in float32."""
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    if batch is not None:
        shape = model.input(0).partial_shape
        shape[0] = batch
        model.reshape(shape)
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
    }
    request = core.compile_model(model, "CPU", settings).create_infer_request()

    def run(images: Any) -> Any:
        request.infer([images], share_inputs=True)
        return request.get_output_tensor(0).data

    return run


def open_tvm(path: str, batch: int | None, threads: int, bf16: bool) -> Run:
    """Open a folder of libraries that TVM made (`tvm_compile`); one for this batch size is made where it has none.

    Args:
        bf16: ignored, as the libraries say what they compute in.
    """
    # Read when TVM's threads start; by itself it takes half of them for hyper-threads.
    os.environ["TVM_NUM_THREADS"] = str(threads)
    import tvm
    from tvm import relax

    from .tvm_compile import compile_libraries, library_path

    if batch is None:
        raise ValueError("TVM compiles for a fixed batch size; got None")
    folder = Path(path)
    compile_libraries(folder, [batch])
    # By itself TVM pins its threads to the machine's first cores, whatever this process may use.
    cores = sorted(os.sched_getaffinity(0))
    pinned = ONE_CORE_EACH if threads == len(cores) else SHARED_CORES
    tvm.get_global_func("runtime.config_threadpool")(pinned, threads, [str(core) for core in cores])
    machine = relax.VirtualMachine(tvm.runtime.load_module(str(library_path(folder, batch))), tvm.cpu())
    compute = machine["main"]

    def run(images: Any) -> Any:
        result = compute(tvm.runtime.tensor(images))
        return (result if hasattr(result, "numpy") else result[0]).numpy()

    return run


def open_litert(path: str, batch: int | None, threads: int, bf16: bool) -> Run:
    """Open a TensorFlow Lite file with LiteRT, or its older form tflite_runtime; inputs of a batch run one by one.

    Inputs are cast to the type that the file takes.

    Args:
        bf16: ignored, as the file says what it computes in.
    """
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        from tflite_runtime.interpreter import Interpreter

    interpreter = Interpreter(path, num_threads=threads)
    interpreter.allocate_tensors()
    taken, given = interpreter.get_input_details()[0], interpreter.get_output_details()[0]

    def run(images: Any) -> Any:
        for image in images.astype(taken["dtype"], copy=False):
            interpreter.set_tensor(taken["index"], image[None])
            interpreter.invoke()
        return interpreter.get_tensor(given["index"])

    return run


RUNTIMES: dict[str, Callable[[str, int | None, int, bool], Run]] = {
    "onnxruntime": open_onnxruntime,
    "openvino": open_openvino,
    "tvm": open_tvm,
    "litert": open_litert,
}
