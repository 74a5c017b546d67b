"""The runtimes on GPUs: each opens a model file for one batch size, and runs it with inputs that lie on the device.

Only the measuring process and `predict` use this file; it imports the runtime that is asked for, and nothing else.
Every session has `load` (inputs to the device), `run` (returns when the device is done) and `logits`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

PRECISIONS = ("fp32", "tf32", "fp16", "bf16")


class Session(Protocol):
    """One model, ready to run."""

    def load(self, inputs: Any) -> None:
        """Copy inputs (batch, ...) as NumPy array to the device."""
        ...

    def run(self) -> None:
        """Compute the logits, and wait for them."""
        ...

    def logits(self) -> Any:
        """The logits of the last run as NumPy array (batch, classes), float32."""
        ...


class TorchSession:
    """A program saved by `torch.export`; on CUDA replayed as a CUDA graph, so that the host's launches cost nothing.

    Loading such a file can run code that is in it: open only files that you, or a search of yours, have written.

    Args:
        precision: "fp32"; "tf32" for float32 with products in TF32; "fp16" or "bf16" for everything.
        device: "cuda", "cuda:1", or "cpu" (where no graph is captured).
    """

    def __init__(self, path: str, example: Any, precision: str, device: str) -> None:
        import torch

        self._torch, self._cuda = torch, device.startswith("cuda")
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
        if self._cuda:
            torch.cuda.set_device(device)
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
            torch.backends.cudnn.benchmark = True
        program = torch.export.load(path)
        layout = torch.channels_last if self._cuda and example.ndim == 4 else torch.contiguous_format
        self._model = program.module().to(device=device, dtype=dtype)
        inputs = torch.from_numpy(example).to(device)
        self._inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
        self._inputs = self._inputs.contiguous(memory_format=layout)
        with torch.inference_mode():
            self._step = self._capture() if self._cuda else self._compute
        self._step()

    def _compute(self) -> None:
        with self._torch.inference_mode():
            self._logits = self._model(self._inputs)

    def _capture(self) -> Callable[[], None]:
        """Record the kernels once, after runs on a side stream that let libraries choose theirs."""
        torch = self._torch
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._compute()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._compute()
        return graph.replay

    def load(self, inputs: Any) -> None:
        """Copy inputs to the device."""
        self._inputs.copy_(self._torch.from_numpy(inputs))

    def run(self) -> None:
        """Compute the logits, and wait for them."""
        self._step()
        if self._cuda:
            self._torch.cuda.synchronize()

    def logits(self) -> Any:
        """The logits of the last run."""
        return self._logits.float().cpu().numpy()


class OnnxSession:
    """ONNX Runtime with one of its providers, inputs and outputs bound to the device.

    Args:
        provider: "CUDAExecutionProvider" or, for tests of this code, "CPUExecutionProvider".
    """

    def __init__(self, path: str, example: Any, provider: str, number: int) -> None:
        import onnxruntime

        if hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()  # finds the CUDA libraries of nvidia's wheels
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_free_dimension_override_by_name("batch", len(example))
        settings = {} if provider.startswith("CPU") else {"device_id": number}
        session = onnxruntime.InferenceSession(path, options, providers=[(provider, settings)])
        if session.get_providers()[0] != provider:
            raise RuntimeError(f"ONNX Runtime could not start {provider}; its CUDA libraries are missing")
        self._session, self._binding = session, session.io_binding()
        self._device, self._number = ("cpu" if provider.startswith("CPU") else "cuda"), number
        self._make = onnxruntime.OrtValue.ortvalue_from_numpy
        self._output = session.get_outputs()[0].name
        self._binding.bind_output(self._output, self._device, number)
        self.load(example)

    def load(self, inputs: Any) -> None:
        """Copy inputs to the device."""
        self._inputs = self._make(inputs, self._device, self._number)
        self._binding.bind_ortvalue_input(self._session.get_inputs()[0].name, self._inputs)

    def run(self) -> None:
        """Compute the logits, and wait for them."""
        self._session.run_with_iobinding(self._binding)
        self._binding.synchronize_outputs()

    def logits(self) -> Any:
        """The logits of the last run."""
        return self._binding.copy_outputs_to_cpu()[0]


class TensorRtSession:
    """A TensorRT engine, with PyTorch's memory and streams around it.

    Args:
        engine: serialized, as `trt_engine.cached_engine` made it for this device and batch size.
    """

    def __init__(self, engine: Path, example: Any, device: str) -> None:
        import tensorrt
        import torch

        self._torch = torch
        torch.cuda.set_device(device)
        runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.ERROR))
        self._engine = runtime.deserialize_cuda_engine(engine.read_bytes())
        if self._engine is None:
            raise RuntimeError(f"TensorRT can't load the engine {engine}; delete it to build it anew")
        self._context, self._stream = self._engine.create_execution_context(), torch.cuda.Stream()
        names = [self._engine.get_tensor_name(number) for number in range(self._engine.num_io_tensors)]
        self._inputs = torch.from_numpy(example).to(device)
        self._context.set_input_shape(names[0], tuple(self._inputs.shape))
        shape = tuple(self._context.get_tensor_shape(names[1]))
        self._logits = torch.empty(shape, dtype=torch.float32, device=device)
        self._context.set_tensor_address(names[0], self._inputs.data_ptr())
        self._context.set_tensor_address(names[1], self._logits.data_ptr())

    def load(self, inputs: Any) -> None:
        """Copy inputs to the device."""
        self._inputs.copy_(self._torch.from_numpy(inputs))

    def run(self) -> None:
        """Compute the logits, and wait for them."""
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise RuntimeError("TensorRT could not start the engine")
        self._stream.synchronize()

    def logits(self) -> Any:
        """The logits of the last run."""
        return self._logits.cpu().numpy()


def open_session(request: dict[str, Any], path: str, example: Any) -> Session:
    """Open a file as a measuring request says.

    Args:
        request: {"runtime": "torch", "onnxruntime" or "tensorrt", "precision", "device": "cuda:0" or "cpu", "cache"}.
        example: inputs (batch, ...) as NumPy array; their number is the batch size.
    """
    device = request["device"]
    number = int(device.partition(":")[2] or 0)
    if request["runtime"] == "torch":
        return TorchSession(path, example, request["precision"], device)
    if request["runtime"] == "onnxruntime":
        provider = "CUDAExecutionProvider" if device.startswith("cuda") else "CPUExecutionProvider"
        return OnnxSession(path, example, provider, number)
    from .trt_engine import cached_engine

    return TensorRtSession(cached_engine(Path(path), len(example), device, Path(request["cache"])), example, device)
