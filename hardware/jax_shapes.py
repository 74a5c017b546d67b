"""ONNX operators that move values about, in JAX; as in `jax_layers`, and imported only where JAX is installed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jax import lax
from jax import numpy as jnp

from .jax_layers import Known, namespace, operator


@operator("Constant")
def constant(run: Any, node: Any) -> Any:
    """A stored tensor."""
    for name in ("value", "value_float", "value_int", "value_floats", "value_ints"):
        if name in node.settings:
            found = np.asarray(node.get(name))
            return found.astype(np.float32) if "float" in name else found
    raise NotImplementedError(f"constants by {', '.join(node.settings)}")


@operator("ConstantOfShape")
def constant_of_shape(run: Any, node: Any, shape: Any) -> Any:
    """One number everywhere."""
    value = node.get("value", np.zeros(1, np.float32))
    return np.full(shape.tolist(), value.reshape(()), value.dtype)


@operator("Range")
def arange(run: Any, node: Any, start: Any, stop: Any, step: Any) -> Any:
    """Numbers from start to stop."""
    return np.arange(start.item(), stop.item(), step.item(), dtype=start.dtype)


@operator("Shape", "Size")
def shape_of(run: Any, node: Any, x: Any) -> Any:
    """Sizes, always known."""
    if node.kind == "Size":
        return np.asarray(math.prod(x.shape), np.int64)
    return np.asarray(x.shape[node.get("start", 0) : node.get("end")], np.int64)


@operator("Reshape")
def reshape(run: Any, node: Any, x: Any, shape: Any) -> Any:
    """Other sizes; 0 keeps one, -1 is what is left."""
    (x,) = run.operands(node, x)
    sizes = shape.tolist()
    if not node.get("allowzero", 0):
        sizes = [x.shape[at] if size == 0 else size for at, size in enumerate(sizes)]
    return x.reshape(sizes)


@operator("Flatten")
def flatten(run: Any, node: Any, x: Any) -> Any:
    """Two dimensions."""
    (x,) = run.operands(node, x)
    axis = node.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), -1)


@operator("Transpose")
def transpose(run: Any, node: Any, x: Any) -> Any:
    """Dimensions in another order."""
    (x,) = run.operands(node, x)
    return x.transpose(node.get("perm", list(range(x.ndim))[::-1]))


@operator("Squeeze")
def squeeze(run: Any, node: Any, x: Any, axes: Any = None) -> Any:
    """Without dimensions of size 1."""
    (x,) = run.operands(node, x)
    axes = node.get("axes") if axes is None else axes.reshape(-1).tolist()
    return namespace(x).squeeze(x, None if axes is None else tuple(axes))


@operator("Unsqueeze")
def unsqueeze(run: Any, node: Any, x: Any, axes: Any = None) -> Any:
    """With dimensions of size 1."""
    (x,) = run.operands(node, x)
    axes = node.get("axes") if axes is None else axes.reshape(-1).tolist()
    return namespace(x).expand_dims(x, tuple(axes))


@operator("Concat")
def concat(run: Any, node: Any, *taken: Any) -> Any:
    """One after the other."""
    values = run.operands(node, *taken)
    return namespace(*values).concatenate(values, node.get("axis"))


@operator("Slice")
def cut(run: Any, node: Any, x: Any, starts: Any = None, ends: Any = None, axes: Any = None, steps: Any = None) -> Any:
    """From start to end along some axes, as Python slices."""
    (x,) = run.operands(node, x)
    given = [
        node.get(name) if value is None else value.reshape(-1).tolist()
        for name, value in (("starts", starts), ("ends", ends), ("axes", axes), ("steps", steps))
    ]
    first, last = given[:2]
    places = [slice(None)] * x.ndim
    for at, axis in enumerate(given[2] or range(len(first))):
        step = given[3][at] if given[3] else 1
        # With a negative step, an end before the first value is a number that Python would count from the back.
        end = None if step < 0 and last[at] < -x.shape[axis] else last[at]
        places[axis] = slice(first[at], end, step)
    return x[tuple(places)]


@operator("Split")
def split(run: Any, node: Any, x: Any, sizes: Any = None) -> Any:
    """Pieces along an axis."""
    (x,) = run.operands(node, x)
    axis = node.get("axis", 0)
    parts = node.get("split") if sizes is None else sizes.tolist()
    if parts is None:
        each = -(-x.shape[axis] // len(node.outputs))
        parts = [min(each, x.shape[axis] - start) for start in range(0, x.shape[axis], each)]
    return namespace(x).split(x, np.cumsum(parts)[:-1].tolist(), axis)


@operator("Gather")
def gather(run: Any, node: Any, x: Any, places: Any) -> Any:
    """Values at places along an axis."""
    x, places = run.operands(node, x, places)
    return namespace(x, places).take(x, places, node.get("axis", 0))


@operator("GatherElements")
def gather_elements(run: Any, node: Any, x: Any, places: Any) -> Any:
    """For each place, the value there along an axis."""
    x, places = run.operands(node, x, places)
    return namespace(x, places).take_along_axis(x, places, node.get("axis", 0))


@operator("Expand")
def expand(run: Any, node: Any, x: Any, shape: Any) -> Any:
    """Repeated to a shape."""
    (x,) = run.operands(node, x)
    return namespace(x).broadcast_to(x, np.broadcast_shapes(x.shape, tuple(shape.tolist())))


@operator("Tile")
def tile(run: Any, node: Any, x: Any, repeats: Any) -> Any:
    """Repeated as a whole."""
    (x,) = run.operands(node, x)
    return namespace(x).tile(x, tuple(repeats.tolist()))


@operator("Pad")
def pad(run: Any, node: Any, x: Any, pads: Any = None, value: Any = None, axes: Any = None) -> Any:
    """A border of one number, or of values from the edge; negative sizes cut."""
    (x,) = run.operands(node, x)
    sizes = node.get("pads") if pads is None else pads.tolist()
    chosen = range(x.ndim) if axes is None else [axis % x.ndim for axis in axes.tolist()]
    ends = [(0, 0)] * x.ndim
    for at, axis in enumerate(chosen):
        ends[axis] = (sizes[at], sizes[at + len(chosen)])
    mode = node.get("mode", "constant")
    if mode != "constant":
        if min(min(pair) for pair in ends) < 0:
            raise NotImplementedError(f"negative sizes in mode {mode}")
        return jnp.pad(x, ends, {"reflect": "reflect", "edge": "edge", "wrap": "wrap"}[mode])
    filler = node.get("value", 0.0) if value is None else value
    filler = np.asarray(filler, x.dtype).reshape(()) if isinstance(filler, (float, *Known)) else filler
    return lax.pad(x, filler, [(*pair, 0) for pair in ends])


@operator("DepthToSpace", "SpaceToDepth")
def depth_and_space(run: Any, node: Any, x: Any) -> Any:
    """Channels to blocks of pixels, or back."""
    (x,) = run.operands(node, x)
    n, c, h, w = x.shape
    b = node.get("blocksize")
    if node.kind == "SpaceToDepth":
        blocks = x.reshape(n, c, h // b, b, w // b, b).transpose(0, 3, 5, 1, 2, 4)
        return blocks.reshape(n, c * b * b, h // b, w // b)
    if node.get("mode", "DCR") == "DCR":
        blocks = x.reshape(n, b, b, c // (b * b), h, w).transpose(0, 3, 4, 1, 5, 2)
    else:
        blocks = x.reshape(n, c // (b * b), b, b, h, w).transpose(0, 1, 4, 2, 5, 3)
    return blocks.reshape(n, c // (b * b), h * b, w * b)


@operator("Resize", "Upsample")
def resize(run: Any, node: Any, x: Any, *taken: Any) -> Any:
    """Nearest and linear, one axis after the other."""
    (x,) = run.operands(node, x)
    scales = taken[-1] if node.kind == "Upsample" or len(taken) < 3 else taken[1]
    sizes = taken[2] if len(taken) > 2 else None
    if node.get("axes") or node.get("antialias", 0) or node.get("mode", "nearest") == "cubic":
        raise NotImplementedError("resizing with axes, antialias or cubic")
    new = sizes.tolist() if sizes is not None else [int(n * s) for n, s in zip(x.shape, scales.tolist(), strict=True)]
    factors = [m / n for m, n in zip(new, x.shape, strict=True)] if sizes is not None else scales.tolist()
    for axis, (size, factor) in enumerate(zip(new, factors, strict=True)):
        if size != x.shape[axis]:
            places = _places(node, x.shape[axis], size, factor)
            x = _sampled(node, x, axis, np.clip(places, 0, x.shape[axis] - 1))
    return x


def _places(node: Any, old: int, new: int, factor: float) -> np.ndarray:
    """Where in the old image each new pixel lies."""
    at = np.arange(new, dtype=np.float64)
    way = node.get("coordinate_transformation_mode", "half_pixel" if node.kind == "Resize" else "asymmetric")
    if way == "asymmetric":
        return at / factor
    if way == "align_corners":
        return at * (old - 1) / max(new - 1, 1)
    if way == "half_pixel" or (way == "pytorch_half_pixel" and new > 1):
        return (at + 0.5) / factor - 0.5
    raise NotImplementedError(f"resizing by {way}")


def _sampled(node: Any, x: Any, axis: int, places: np.ndarray) -> Any:
    if node.get("mode", "nearest") == "nearest":
        rule = node.get("nearest_mode", "round_prefer_floor" if node.kind == "Resize" else "floor")
        rounded = {
            "floor": np.floor(places),
            "ceil": np.ceil(places),
            "round_prefer_floor": np.ceil(places - 0.5),
            "round_prefer_ceil": np.floor(places + 0.5),
        }[rule]
        return jnp.take(x, rounded.astype(np.int32), axis)
    low = np.floor(places).astype(np.int32)
    shape = [1] * x.ndim
    shape[axis] = -1
    share = (places - low).reshape(shape).astype(x.dtype)
    high = np.minimum(low + 1, x.shape[axis] - 1)
    return jnp.take(x, low, axis) * (1 - share) + jnp.take(x, high, axis) * share
