"""The runtimes on x86: each opens a model file and returns a function from images to logits.

Imports nothing of the package that loads torch: the measuring process uses this file alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Run = Callable[[Any], Any]


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


RUNTIMES: dict[str, Callable[[str, int | None, int, bool], Run]] = {
    "onnxruntime": open_onnxruntime,
    "openvino": open_openvino,
}
