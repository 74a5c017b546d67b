"""Convolutions, matrix products, pooling and rounding of ONNX in JAX; imported only where JAX is installed.

Every function takes the run (`onnx_to_jax`), the node, and the inputs of the node: NumPy arrays where they are known
when the function is compiled, JAX arrays or `Quantized` elsewhere, None where left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

OPERATORS: dict[str, Callable[..., Any]] = {}
Known = (np.ndarray, np.generic)
Pads = list[tuple[int, int]]


def operator(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the function computes the ONNX operators of these names."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        OPERATORS.update(dict.fromkeys(names, function))
        return function

    return add


@dataclass(frozen=True)
class Quantized:
    """Integers of 8 bits (32 for biases), or 8-bit floats, with what each stands for: (codes - zero) * scale.

    Attributes:
        scale, zero: single numbers, or one for each position of `axis`.
        name: of the codes, under which they become a weight.
    """

    codes: Any
    scale: Any
    zero: Any
    axis: int
    name: str

    @property
    def is_known(self) -> bool:
        return all(isinstance(value, Known) for value in (self.codes, self.scale, self.zero))

    def known(self) -> np.ndarray:
        """The floats, where all is known."""
        return (self.codes.astype(np.float32) - self._spread(self.zero)) * self._spread(self.scale)

    def traced(self, dtype: Any) -> Any:
        """The floats elsewhere."""
        values = self.codes.astype(jnp.float32) - self._spread(self.zero)
        return (values * self._spread(self.scale)).astype(dtype)

    def _spread(self, numbers: Any) -> Any:
        if numbers.size == 1:
            return numbers.reshape(()).astype(np.float32)
        shape = [1] * self.codes.ndim
        shape[self.axis] = numbers.size
        return numbers.reshape(shape).astype(np.float32)


def float_value(value: Any, dtype: Any) -> Any:
    """What a value stands for: floats where it is `Quantized`, the value itself elsewhere."""
    if isinstance(value, Quantized):
        return value.known().astype(dtype) if value.is_known else value.traced(dtype)
    return value


@operator("QuantizeLinear")
def quantize(run: Any, node: Any, x: Any, scale: Any, zero: Any = None) -> Any:
    """Round to 8-bit integers, halves to even."""
    if node.get("block_size") or not isinstance(scale, Known) or scale.size > 1:
        raise NotImplementedError("only rounding by one stored scale")
    zero = np.zeros((), np.uint8) if zero is None else zero
    if zero.dtype not in (np.int8, np.uint8):
        raise NotImplementedError(f"rounding to {zero.dtype}")
    ends = np.iinfo(zero.dtype)
    wide = float_value(x, run.dtype).astype(np.float32)
    # A product instead of the division: what chips do; it differs in the last bit of a float at most.
    codes = jnp.round(wide * (1 / np.float32(scale.reshape(())))) + np.float32(zero.reshape(()))
    return jnp.clip(codes, ends.min, ends.max).astype(zero.dtype)


@operator("DequantizeLinear")
def dequantize(run: Any, node: Any, codes: Any, scale: Any, zero: Any = None) -> Any:
    """Keep integers with their scale, for the layer that takes them to choose the arithmetic."""
    block, axis = node.get("block_size", 0), node.get("axis", 1)
    zero = np.zeros((), np.int8) if zero is None else zero
    if block:
        count = codes.shape[axis]
        scale, zero = (np.repeat(v, block, axis).take(range(count), axis) if v.ndim else v for v in (scale, zero))
        return (codes.astype(np.float32) - zero.astype(np.float32)) * scale.astype(np.float32)
    return Quantized(codes, scale, zero, axis, node.inputs[0])


@operator("DynamicQuantizeLinear")
def dynamic_quantize(run: Any, node: Any, x: Any) -> Any:
    """Round to 0..255 by the tensor's own range; returns codes, scale and zero point."""
    wide = float_value(x, run.dtype).astype(jnp.float32)
    low, high = jnp.minimum(wide.min(), 0), jnp.maximum(wide.max(), 0)
    scale = (high - low) / 255
    scale = jnp.where(scale == 0, 1, scale)
    zero = jnp.clip(jnp.round(-low / scale), 0, 255)
    return jnp.clip(jnp.round(wide / scale) + zero, 0, 255).astype(jnp.uint8), scale, zero.astype(jnp.uint8)


@operator("Conv")
def conv(run: Any, node: Any, x: Any, w: Any, bias: Any = None) -> Any:
    """Convolution in NC... layout with any number of spatial dimensions."""
    kernel = (w.codes if isinstance(w, Quantized) else w).shape[2:]
    strides, dilations, pads = window(node, kernel, (x.codes if isinstance(x, Quantized) else x).shape[2:])
    settings = {"window_strides": strides, "rhs_dilation": dilations, "feature_group_count": node.get("group", 1)}
    pair = _integer_pair(run, x, w, 0)
    if pair is None:
        x, w, bias = run.operands(node, x, w, bias)
        y = lax.conv_general_dilated(x, w, padding=pads, **settings)
        return y if bias is None else y + bias.reshape(-1, *[1] * len(kernel))
    codes, zero, weight = pair
    stored = run.weight(w.name, weight)
    sums = lax.conv_general_dilated(codes, stored, padding=pads, preferred_element_type=jnp.int32, **settings)
    # The border is code 0, and so is not the float 0 where the zero point is another: what each output's window takes
    # from inside the image times the zero point is what it has too much.
    totals = _sums_inside(weight, x.codes.shape[2:], strides, dilations, pads)
    return _rescale(run, node, sums, totals, x, w, zero, bias, [-1, *[1] * len(kernel)])


def _sums_inside(weight: np.ndarray, sizes: Any, strides: Any, dilations: Any, pads: Pads) -> np.ndarray:
    """Sum of the weights that fall on the image, for each output channel and position: (channels, ...)."""
    sums = weight.sum(1, dtype=np.int64)
    for at, (n, k, s, d, (before, after)) in enumerate(
        zip(sizes, weight.shape[2:], strides, dilations, pads, strict=True)
    ):
        count = (n + before + after - (k - 1) * d - 1) // s + 1
        places = np.arange(count)[:, None] * s + np.arange(k) * d - before
        inside = (places >= 0) & (places < n)
        sums = np.moveaxis(np.tensordot(sums, inside, (1 + at, 1)), -1, 1 + at)
    return sums


@operator("MatMul")
def matmul(run: Any, node: Any, x: Any, w: Any) -> Any:
    """Matrix product."""
    if isinstance(w, Quantized) and w.codes.ndim == 2:
        pair = _integer_pair(run, x, w, 1)
        if pair is not None:
            return _integer_matmul(run, node, x, w, None, pair, pair[2])
    x, w = run.operands(node, x, w)
    return x @ w


@operator("Gemm")
def gemm(run: Any, node: Any, x: Any, w: Any, bias: Any = None) -> Any:
    """alpha * x w + beta * bias, either matrix transposed where asked for."""
    alpha, beta, turned = node.get("alpha", 1.0), node.get("beta", 1.0), bool(node.get("transB", 0))
    plain = alpha == 1 and not node.get("transA", 0) and (bias is None or beta == 1)
    pair = _integer_pair(run, x, w, 0 if turned else 1) if plain else None
    if pair is not None:
        return _integer_matmul(run, node, x, w, bias, pair, pair[2].T if turned else pair[2])
    x, w, bias = run.operands(node, x, w, bias)
    y = (x.T if node.get("transA", 0) else x) @ (w.T if turned else w)
    y = y if alpha == 1 else y * np.asarray(alpha, y.dtype)
    return y if bias is None else y + (bias if beta == 1 else bias * np.asarray(beta, y.dtype))


def _integer_matmul(run: Any, node: Any, x: Any, w: Quantized, bias: Any, pair: Any, weight: np.ndarray) -> Any:
    codes, zero, _ = pair
    sums = jnp.matmul(codes, run.weight(f"{w.name}/{weight.shape}", weight), preferred_element_type=jnp.int32)
    return _rescale(run, node, sums, weight.sum(0, dtype=np.int32), x, w, zero, bias, [-1])


def _integer_pair(run: Any, x: Any, w: Any, channels: int) -> tuple[Any, Any, np.ndarray] | None:
    """Codes, zero point and weights of a layer as signed 8-bit integers; None where it can't multiply these.

    Args:
        channels: the weight's axis of output channels, the only one that may have several scales.
    """
    if not (run.integers and isinstance(x, Quantized) and isinstance(w, Quantized) and w.is_known):
        return None
    several = w.scale.size > 1 and w.axis % w.codes.ndim != channels
    if x.scale.size > 1 or several or any(v.codes.dtype not in (np.int8, np.uint8) for v in (x, w)):
        return None
    shape = [1] * w.codes.ndim
    shape[channels] = -1
    weight = w.codes.astype(np.int32) - w.zero.astype(np.int32).reshape(shape)
    if weight.min() < -128 or weight.max() > 127:
        return None
    zero = x.zero.reshape(()).astype(np.int32)
    if x.codes.dtype == np.int8:
        return x.codes, zero, weight.astype(np.int8)
    signed = lax.bitcast_convert_type(x.codes ^ jnp.uint8(128), jnp.int8)
    return signed, zero - np.int32(128), weight.astype(np.int8)


def _rescale(
    run: Any, node: Any, sums: Any, totals: np.ndarray, x: Quantized, w: Quantized, zero: Any, bias: Any, shape: Any
) -> Any:
    """Sums of integer products as floats; what the zero point of the inputs adds goes with the bias.

    Args:
        totals: sums of weights, broadcast against `sums` without the batch.
        shape: of one number for each channel, broadcast against `sums`.
    """
    run.note_integers(node)
    scale = x.scale.reshape(()).astype(np.float32) * w.scale.reshape(-1).astype(np.float32)
    scale = scale.reshape(shape if scale.size > 1 else ())
    shift = -zero.astype(np.float32) * totals.astype(np.float32) * scale
    bias = bias.known() if isinstance(bias, Quantized) else bias
    shift = shift if bias is None else shift + bias.reshape(shape).astype(np.float32)
    if isinstance(scale, Known):
        scale = run.weight(f"{node.outputs[0]}/scale", scale, np.float32)
    if isinstance(shift, Known):
        shift = _shift(run, f"{node.outputs[0]}/shift", np.asarray(shift))
    return (sums.astype(jnp.float32) * scale + shift).astype(run.dtype)


def _shift(run: Any, name: str, numbers: np.ndarray) -> Any:
    """Known numbers (channels, rows, ...) put together from those rows that differ, as most are alike."""
    if numbers.ndim < 2:
        return run.weight(name, numbers, np.float32)
    middle = numbers[:, numbers.shape[1] // 2 : numbers.shape[1] // 2 + 1]
    if middle.ndim > 2 and (middle == middle[:, :, :1]).all():
        middle = middle[:, :, :1]
    result = run.weight(f"{name}/middle", middle, np.float32)
    place = np.arange(numbers.shape[1]).reshape(-1, *[1] * (numbers.ndim - 2))
    for at in range(numbers.shape[1]):
        row = numbers[:, at : at + 1]
        if not np.array_equal(np.broadcast_to(middle, row.shape), row):
            result = jnp.where(place == at, run.weight(f"{name}/{at}", row, np.float32), result)
    return result


@operator("MaxPool")
def max_pool(run: Any, node: Any, x: Any) -> Any:
    """Highest value of each window."""
    if len(node.outputs) > 1:
        raise NotImplementedError("positions of the highest values")
    (x,) = run.operands(node, x)
    strides, dilations, pads, _ = _pooling(node, x.shape[2:])
    low = -jnp.inf if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).min
    sizes = (1, 1, *node.get("kernel_shape"))
    ends = [(0, 0), (0, 0), *pads]
    return lax.reduce_window(
        x, np.asarray(low, x.dtype), lax.max, sizes, (1, 1, *strides), ends, None, (1, 1, *dilations)
    )


@operator("AveragePool")
def average_pool(run: Any, node: Any, x: Any) -> Any:
    """Mean of each window, summed in float32."""
    (x,) = run.operands(node, x)
    strides, dilations, pads, given = _pooling(node, x.shape[2:])
    kernel = node.get("kernel_shape")
    sizes, steps, ends = (1, 1, *kernel), (1, 1, *strides), [(0, 0), (0, 0), *pads]
    sums = lax.reduce_window(
        x.astype(jnp.float32), np.float32(0), lax.add, sizes, steps, ends, None, (1, 1, *dilations)
    )
    # How many values each window has: along each dimension, those inside the image or its given border.
    counts = np.ones((1, 1), np.float32)
    for at, (k, s, d, (before, _)) in enumerate(zip(kernel, strides, dilations, pads, strict=True)):
        border = given[at] if node.get("count_include_pad", 0) else (0, 0)
        places = np.arange(sums.shape[2 + at])[:, None] * s + np.arange(k) * d - before
        inside = (places >= -border[0]) & (places < x.shape[2 + at] + border[1])
        counts = counts[..., None] * inside.sum(1).astype(np.float32)
    counts = counts.reshape(-1)[0] if (counts == counts.reshape(-1)[0]).all() else counts
    return (sums * (1 / counts)).astype(x.dtype)


@operator("GlobalAveragePool")
def global_average_pool(run: Any, node: Any, x: Any) -> Any:
    """Mean over all positions."""
    (x,) = run.operands(node, x)
    return x.mean(tuple(range(2, x.ndim)), keepdims=True)


@operator("GlobalMaxPool")
def global_max_pool(run: Any, node: Any, x: Any) -> Any:
    """Highest value over all positions."""
    (x,) = run.operands(node, x)
    return x.max(tuple(range(2, x.ndim)), keepdims=True)


def window(node: Any, kernel: Sequence[int], sizes: Sequence[int]) -> tuple[list[int], list[int], Pads]:
    """Strides, dilations and padding (before, after) for each spatial dimension of the input."""
    count = len(kernel)
    strides, dilations = list(node.get("strides", [1] * count)), list(node.get("dilations", [1] * count))
    given = node.get("pads", [0] * 2 * count)
    pads = list(zip(given[:count], given[count:], strict=True))
    rule = node.get("auto_pad", "NOTSET")
    if rule == "VALID":
        pads = [(0, 0)] * count
    elif rule.startswith("SAME"):
        total = [
            max(0, (-(-n // s) - 1) * s + (k - 1) * d + 1 - n)
            for n, s, k, d in zip(sizes, strides, kernel, dilations, strict=True)
        ]
        pads = [(t // 2, t - t // 2) if rule == "SAME_UPPER" else (t - t // 2, t // 2) for t in total]
    return strides, dilations, pads


def _pooling(node: Any, sizes: Sequence[int]) -> tuple[list[int], list[int], Pads, Pads]:
    """The same for a pooling node, with what rounding up adds to the padding; lastly the padding without that."""
    kernel = node.get("kernel_shape")
    strides, dilations, given = window(node, kernel, sizes)
    pads = []
    for n, k, s, d, (before, after) in zip(sizes, kernel, strides, dilations, given, strict=True):
        extra = 0
        if node.get("ceil_mode", 0):
            room = n + before + after - (k - 1) * d - 1
            places = math.ceil(room / s) + 1
            # No window begins beyond the image and the border before it.
            places -= (places - 1) * s >= n + before
            extra = max(0, (places - 1) * s - room)
        pads.append((before, after + extra))
    return strides, dilations, pads, given


def narrow(value: Any, low: float, high: float) -> Quantized | None:
    """A rounded value clipped to an interval, still as integers; None where it is not one that can be."""
    if not isinstance(value, Quantized) or value.is_known or not isinstance(value.scale, Known) or value.scale.size > 1:
        return None
    if value.codes.dtype not in (np.int8, np.uint8):
        return None
    scale, zero = float(value.scale.reshape(())), int(value.zero.reshape(()))
    ends = np.iinfo(value.codes.dtype)
    first, last = (min(max(end / scale + zero, ends.min), ends.max) for end in (low, high))
    codes = jnp.clip(value.codes, *(np.asarray(round(end), value.codes.dtype) for end in (first, last)))
    return Quantized(codes, value.scale, value.zero, value.axis, value.name)


def namespace(*values: Any) -> Any:
    """NumPy where all values are known, else JAX's."""
    return np if all(value is None or isinstance(value, Known) for value in values) else jax.numpy
