"""What the other ONNX operators compute, in JAX: element by element, norms and reductions.

As in `jax_layers`, whose table of operators this completes. Nodes whose inputs are all known when the function is
compiled are computed by NumPy, so that shapes stay plain numbers. Imported only where JAX is installed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from onnx import TensorProto, helper

from .jax_layers import Known, namespace, narrow, operator


def _erf(xp: Any, x: Any) -> Any:
    return np.vectorize(math.erf, otypes=[x.dtype])(x) if xp is np else lax.erf(x)


def _sigmoid(xp: Any, x: Any) -> Any:
    return 1 / (1 + xp.exp(-x)) if xp is np else jax.nn.sigmoid(x)


def _gelu(xp: Any, x: Any, approximate: str) -> Any:
    if approximate == "tanh":
        return x * (0.5 * (1 + xp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))))
    return x * (0.5 * (1 + _erf(xp, x * math.sqrt(0.5))))


def _divide(xp: Any, x: Any, y: Any) -> Any:
    """ONNX's division: of integers, the quotient without its fraction."""
    if jnp.issubdtype(x.dtype, jnp.integer):
        quotient = abs(x) // abs(y)
        return (quotient * xp.sign(x) * xp.sign(y)).astype(x.dtype)
    return x / y


def _elu(xp: Any, x: Any, alpha: float, gamma: float = 1.0, width: float = 1.0) -> Any:
    return gamma * xp.where(x > 0, x, alpha * (xp.exp(xp.minimum(x, 0) / width) - 1))


# Functions of (namespace, inputs).
_ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "Add": lambda xp, x, y: x + y,
    "Sub": lambda xp, x, y: x - y,
    "Mul": lambda xp, x, y: x * y,
    "Div": _divide,
    "Pow": lambda xp, x, y: xp.power(x, y).astype(x.dtype),
    "Mod": lambda xp, x, y: xp.mod(x, y),
    "Sqrt": lambda xp, x: xp.sqrt(x),
    "Reciprocal": lambda xp, x: 1 / x,
    "Exp": lambda xp, x: xp.exp(x),
    "Log": lambda xp, x: xp.log(x),
    "Erf": _erf,
    "Neg": lambda xp, x: -x,
    "Abs": lambda xp, x: abs(x),
    "Sign": lambda xp, x: xp.sign(x),
    "Floor": lambda xp, x: xp.floor(x),
    "Ceil": lambda xp, x: xp.ceil(x),
    "Round": lambda xp, x: xp.round(x),
    "Sin": lambda xp, x: xp.sin(x),
    "Cos": lambda xp, x: xp.cos(x),
    "Sigmoid": _sigmoid,
    "Tanh": lambda xp, x: xp.tanh(x),
    "HardSwish": lambda xp, x: x * xp.clip(x / 6 + 0.5, 0, 1),
    "Mish": lambda xp, x: x * xp.tanh(xp.logaddexp(x, 0)),
    "Softplus": lambda xp, x: xp.logaddexp(x, 0).astype(x.dtype),
    "Softsign": lambda xp, x: x / (1 + abs(x)),
    "PRelu": lambda xp, x, slope: xp.where(x < 0, slope * x, x),
    "Equal": lambda xp, x, y: x == y,
    "Greater": lambda xp, x, y: x > y,
    "GreaterOrEqual": lambda xp, x, y: x >= y,
    "Less": lambda xp, x, y: x < y,
    "LessOrEqual": lambda xp, x, y: x <= y,
    "And": lambda xp, x, y: xp.logical_and(x, y),
    "Or": lambda xp, x, y: xp.logical_or(x, y),
    "Not": lambda xp, x: xp.logical_not(x),
    "Where": lambda xp, condition, x, y: xp.where(condition, x, y),
}
# The same with settings: (name, value where it is left out).
_WITH_SETTINGS: dict[str, tuple[Callable[..., Any], tuple[tuple[str, Any], ...]]] = {
    "LeakyRelu": (lambda xp, x, alpha: xp.where(x < 0, alpha * x, x), (("alpha", 0.01),)),
    "HardSigmoid": (lambda xp, x, a, b: xp.clip(a * x + b, 0, 1), (("alpha", 0.2), ("beta", 0.5))),
    "Swish": (lambda xp, x, alpha: x * _sigmoid(xp, alpha * x), (("alpha", 1.0),)),
    "Gelu": (_gelu, (("approximate", "none"),)),
    "Elu": (_elu, (("alpha", 1.0),)),
    "Celu": (lambda xp, x, alpha: _elu(xp, x, alpha, 1.0, alpha), (("alpha", 1.0),)),
    "Selu": (_elu, (("alpha", 1.67326319217681884765625), ("gamma", 1.05070102214813232421875))),
    "ThresholdedRelu": (lambda xp, x, alpha: xp.where(x > alpha, x, 0 * x), (("alpha", 1.0),)),
}


@operator(*_ELEMENTWISE)
def elementwise(run: Any, node: Any, *taken: Any) -> Any:
    """One value of the result from one of each input."""
    values = run.operands(node, *taken)
    return _ELEMENTWISE[node.kind](namespace(*values), *values)


@operator(*_WITH_SETTINGS)
def elementwise_with_settings(run: Any, node: Any, *taken: Any) -> Any:
    """The same with settings of the node."""
    values = run.operands(node, *taken)
    function, settings = _WITH_SETTINGS[node.kind]
    return function(namespace(*values), *values, *(node.get(name, default) for name, default in settings))


@operator("Min", "Max", "Sum", "Mean")
def over_inputs(run: Any, node: Any, *taken: Any) -> Any:
    """Any number of inputs, brought to one shape."""
    values = run.operands(node, *taken)
    xp = namespace(*values)
    result = values[0]
    for value in values[1:]:
        join = {"Min": xp.minimum, "Max": xp.maximum}.get(node.kind, xp.add)
        result = join(result, value)
    return result / len(values) if node.kind == "Mean" else result


@operator("Relu")
def relu(run: Any, node: Any, x: Any) -> Any:
    """What is above 0; rounded values stay integers."""
    rounded = narrow(x, 0, math.inf)
    (x,) = run.operands(node, x)
    return rounded if rounded is not None else namespace(x).maximum(x, np.zeros((), x.dtype))


@operator("Clip")
def clip(run: Any, node: Any, x: Any, low: Any = None, high: Any = None) -> Any:
    """Values within two ends; rounded values stay integers."""
    ends = [node.get("min") if low is None else low, node.get("max") if high is None else high]
    if all(end is None or isinstance(end, (float, *Known)) for end in ends):
        plain = [side * math.inf if end is None else float(end) for end, side in zip(ends, (-1, 1), strict=True)]
        rounded = narrow(x, *plain)
        if rounded is not None:
            return rounded
    x = run.operands(node, x)[0]
    xp = namespace(x)
    for end, bound in zip(ends, (xp.maximum, xp.minimum), strict=True):
        x = x if end is None else bound(x, np.asarray(end, x.dtype) if isinstance(end, (float, *Known)) else end)
    return x


@operator("Identity", "Dropout")
def identity(run: Any, node: Any, x: Any, *rest: Any) -> Any:
    """The input as it is."""
    return x


@operator("Cast", "CastLike")
def cast(run: Any, node: Any, x: Any, like: Any = None) -> Any:
    """Another type; floats narrower than those of the run are rounded to, and brought back."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(like.dtype)) if like is not None else node.get("to")
    if kind in (TensorProto.INT4, TensorProto.UINT4):
        kind = TensorProto.INT8 if kind == TensorProto.INT4 else TensorProto.UINT8
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    x = run.operands(node, x)[0]
    if isinstance(x, Known):
        return x.astype(dtype)
    if jnp.issubdtype(dtype, jnp.floating):
        x = x.astype(run.dtype)
        return x.astype(dtype).astype(run.dtype) if dtype.itemsize < run.dtype.itemsize else x
    return x.astype({np.dtype(np.int64): np.int32, np.dtype(np.uint64): np.uint32}.get(dtype, dtype))


@operator("BatchNormalization")
def batch_norm(run: Any, node: Any, x: Any, scale: Any, bias: Any, mean: Any, variance: Any) -> Any:
    """One factor and one shift for each channel, made beforehand where they are stored."""
    if node.get("training_mode", 0):
        raise NotImplementedError("training mode")
    (x,) = run.operands(node, x)
    factor = scale / namespace(variance).sqrt(variance + node.get("epsilon", 1e-5))
    made = []
    for name, numbers in (("factor", factor), ("shift", bias - mean * factor)):
        if isinstance(numbers, Known):
            numbers = run.weight(f"{node.outputs[0]}/{name}", numbers)
        made.append(numbers.reshape(-1, *[1] * (x.ndim - 2)))
    return x * made[0] + made[1]


def _standardize(x: Any, axes: tuple[int, ...], epsilon: float, centred: bool = True) -> Any:
    """Mean 0 and variance 1 over axes, computed in float32."""
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(axes, keepdims=True) if centred else wide
    return (wide * lax.rsqrt((wide * wide).mean(axes, keepdims=True) + epsilon)).astype(x.dtype)


@operator("LayerNormalization", "RMSNormalization")
def layer_norm(run: Any, node: Any, x: Any, scale: Any, bias: Any = None) -> Any:
    """Standardized over the last dimensions, or divided by their root mean square."""
    x, scale, bias = run.operands(node, x, scale, bias)
    axes = tuple(range(node.get("axis", -1) % x.ndim, x.ndim))
    y = _standardize(x, axes, node.get("epsilon", 1e-5), node.kind == "LayerNormalization") * scale
    return y if bias is None else y + bias


@operator("InstanceNormalization", "GroupNormalization")
def group_norm(run: Any, node: Any, x: Any, scale: Any, bias: Any) -> Any:
    """Standardized over the positions of a group of channels."""
    x, scale, bias = run.operands(node, x, scale, bias)
    channels = x.shape[1]
    groups = node.get("num_groups", channels)
    if scale.size != channels:  # before opset 21, one number for each group
        scale, bias = (jnp.repeat(value, channels // groups) for value in (scale, bias))
    y = x.reshape(x.shape[0], groups, -1)
    y = _standardize(y, (2,), node.get("epsilon", 1e-5)).reshape(x.shape)
    shape = (-1, *[1] * (x.ndim - 2))
    return y * scale.reshape(shape) + bias.reshape(shape)


@operator("Softmax", "LogSoftmax")
def softmax(run: Any, node: Any, x: Any) -> Any:
    """Over one axis; before opset 13, over that and all behind it."""
    (x,) = run.operands(node, x)
    axis = node.get("axis", -1 if node.version >= 13 else 1) % x.ndim
    axes = (axis,) if node.version >= 13 else tuple(range(axis, x.ndim))
    return (jax.nn.softmax if node.kind == "Softmax" else jax.nn.log_softmax)(x, axes)


_REDUCTIONS: dict[str, Callable[..., Any]] = {
    "ReduceMean": lambda xp, x, **how: xp.mean(x, **how),
    "ReduceSum": lambda xp, x, **how: xp.sum(x, **how),
    "ReduceMax": lambda xp, x, **how: xp.max(x, **how),
    "ReduceMin": lambda xp, x, **how: xp.min(x, **how),
    "ReduceProd": lambda xp, x, **how: xp.prod(x, **how),
    "ReduceSumSquare": lambda xp, x, **how: xp.sum(x * x, **how),
    "ReduceL1": lambda xp, x, **how: xp.sum(abs(x), **how),
    "ReduceL2": lambda xp, x, **how: xp.sqrt(xp.sum(x * x, **how)),
}


@operator(*_REDUCTIONS)
def reduce(run: Any, node: Any, x: Any, axes: Any = None) -> Any:
    """One value from all along some axes."""
    (x,) = run.operands(node, x)
    axes = node.get("axes") if axes is None else axes.tolist()
    if not axes and node.get("noop_with_empty_axes", 0):
        return x
    how = {"axis": tuple(axes) if axes else None, "keepdims": bool(node.get("keepdims", 1))}
    return _REDUCTIONS[node.kind](namespace(x), x, **how).astype(x.dtype)


@operator("ArgMax", "ArgMin")
def arg_extreme(run: Any, node: Any, x: Any) -> Any:
    """Position of the first highest or lowest value."""
    (x,) = run.operands(node, x)
    xp = namespace(x)
    find = xp.argmax if node.kind == "ArgMax" else xp.argmin
    return find(x, node.get("axis", 0), keepdims=bool(node.get("keepdims", 1)))


@operator("Einsum")
def einsum(run: Any, node: Any, *taken: Any) -> Any:
    """Sums of products by a formula."""
    return jnp.einsum(node.get("equation"), *run.operands(node, *taken))
