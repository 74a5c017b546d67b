"""TensorRT engines from ONNX files with QDQ nodes, built once for each file, batch size, device and version.

Never run by us: TensorRT's builder needs NVIDIA's own package index. Written against its documented interface, versions
10 and 11 (https://docs.nvidia.com/deeplearning/tensorrt): strongly typed networks, explicit quantization, timing cache.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

from ..core.errors import CandidateError


def engine_path(file: Path, batch: int, device: str, version: str, folder: Path) -> Path:
    """Where the engine of a file is kept; another device, version, batch size or content has another place.

    Args:
        device: the GPU's name and compute capability, such as "NVIDIA H100 80GB HBM3, 9.0".
    """
    content = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    return folder / f"{content}-b{batch}-{_slug(device)}-trt{_slug(version)}.engine"


def timing_cache_path(device: str, version: str, folder: Path) -> Path:
    """Where the kernels' times of a device are kept, which all engines share."""
    return folder / f"{_slug(device)}-trt{_slug(version)}.timing"


def once(path: Path, build: Callable[[], bytes]) -> Path:
    """`path`, made by `build` unless it is there; other processes see all of it or nothing."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_bytes(build())
        part.replace(path)
    return path


def cached_engine(file: Path, batch: int, device: str, folder: Path) -> Path:
    """The engine of an ONNX file, built at the first call.

    Raises:
        CandidateError: TensorRT can't parse the file or build an engine for it.
    """
    import tensorrt
    import torch

    properties = torch.cuda.get_device_properties(device)
    name = f"{properties.name}, {properties.major}.{properties.minor}"
    timings = timing_cache_path(name, tensorrt.__version__, folder)
    place = engine_path(file, batch, name, tensorrt.__version__, folder)
    return once(place, lambda: _build(file, batch, timings))


def _build(file: Path, batch: int, timings: Path) -> bytes:
    import tensorrt

    builder = tensorrt.Builder(tensorrt.Logger(tensorrt.Logger.ERROR))
    # Types come from the graph: QDQ pairs make 8-bit kernels, and nothing else is rounded behind the user's back.
    flags = 1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = tensorrt.OnnxParser(network, builder.logger)
    if not parser.parse(file.read_bytes()):
        raise CandidateError(
            f"TensorRT can't read the file: {parser.get_error(0).desc() if parser.num_errors else '?'}"
        )
    config = builder.create_builder_config()
    cache = config.create_timing_cache(timings.read_bytes() if timings.is_file() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    first = network.get_input(0)
    shape = (batch, *tuple(first.shape)[1:])
    profile = builder.create_optimization_profile()
    profile.set_shape(first.name, shape, shape, shape)
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise CandidateError("TensorRT can't build an engine for the file")
    part = timings.with_suffix(f".{os.getpid()}.part")
    part.write_bytes(memoryview(config.get_timing_cache().serialize()))
    part.replace(timings)
    return bytes(memoryview(engine))


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")
