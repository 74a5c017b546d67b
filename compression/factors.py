"""Low-rank factors of one convolution or linear layer: their shapes, their costs and their weights.

A kernel has shape (out, in, kh, kw), that of a linear layer (out, in). Its factors run one after the other:

    svd      kh x kw to r channels, 1x1               Zhang et al. 2015, arXiv:1505.06798
    spatial  kh x 1 to r channels, 1 x kw             Jaderberg et al. 2014, arXiv:1405.3866
    tucker   1x1, kh x kw, 1x1                        Kim et al. 2016, arXiv:1511.06530
    cp       1x1, depthwise kh x 1 and 1 x kw, 1x1    Lebedev et al. 2015, arXiv:1412.6553
    tt       1x1, kh x 1, 1 x kw, 1x1                 Oseledets 2011, doi:10.1137/090752286
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

METHODS = ("svd", "spatial", "tucker", "cp", "tt")
Ranks = tuple[int, ...]


@dataclass(frozen=True)
class Shape:
    """What a convolution or linear layer costs, apart from its bias.

    Attributes:
        kernel, stride, padding, dilation: one number per axis of the image; () for a linear layer. Padding may be
            "same" instead.
    """

    inputs: int
    outputs: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"

    @classmethod
    def of(cls, module: nn.Module) -> Shape:
        """The shape of an `nn.Linear` or of a convolution of 1 to 3 axes."""
        if isinstance(module, nn.Linear):
            return cls(module.in_features, module.out_features)
        assert isinstance(module, nn.modules.conv._ConvNd)
        return cls(
            module.in_channels,
            module.out_channels,
            tuple(module.kernel_size),
            tuple(module.stride),
            (0,) * len(module.kernel_size) if module.padding == "valid" else module.padding,  # type: ignore[arg-type]
            tuple(module.dilation),
            module.groups,
            module.padding_mode,
        )

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.outputs * self.inputs // self.groups * math.prod(self.kernel)

    def after(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Size of the output, without channels, for an input of this size."""
        if not self.kernel or isinstance(self.padding, str):
            return size
        axes = zip(size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)

    def along(self, inputs: int, outputs: int, *axes: int, groups: int = 1) -> Shape:
        """A part of this layer that works along some of its axes and is 1 wide along the others."""

        def pick(values: tuple[int, ...], other: int) -> tuple[int, ...]:
            return tuple(value if axis in axes else other for axis, value in enumerate(values))

        padding = self.padding if isinstance(self.padding, str) else pick(self.padding, 0)
        return replace(
            self,
            inputs=inputs,
            outputs=outputs,
            kernel=pick(self.kernel, 1),
            stride=pick(self.stride, 1),
            padding=padding,
            dilation=pick(self.dilation, 1),
            groups=groups,
        )

    def module(self, weight: np.ndarray, bias: Tensor | None, like: Tensor) -> nn.Module:
        """The layer with these weights, in the number format and on the device of `like`."""
        made: nn.Module
        # `skip_init` leaves torch's random generator alone.
        if not self.kernel:
            made = nn.utils.skip_init(nn.Linear, self.inputs, self.outputs, bias=bias is not None)
        else:
            made = nn.utils.skip_init(
                (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(self.kernel) - 1],
                self.inputs,
                self.outputs,
                self.kernel,
                stride=self.stride,
                padding=self.padding,
                dilation=self.dilation,
                groups=self.groups,
                bias=bias is not None,
                padding_mode=self.padding_mode,
            )
        made.weight = nn.Parameter(torch.from_numpy(np.ascontiguousarray(weight)).to(like))
        if bias is not None:
            made.bias = nn.Parameter(bias.detach().clone())
        return made


def method_for(shape: Shape, method: str) -> str:
    """`method` for 2-d convolutions wider than 1x1; "svd" for everything else."""
    return method if len(shape.kernel) == 2 and math.prod(shape.kernel) > 1 else "svd"


def cost(shapes: Sequence[Shape], size: tuple[int, ...]) -> tuple[int, int]:
    """Weights and multiply-accumulates of layers that run one after the other on an input of this size."""
    weights = macs = 0
    for shape in shapes:
        size = shape.after(size)
        weights += shape.weights
        macs += shape.weights * math.prod(size)
    return weights, macs


def split(shape: Shape, method: str, ranks: Ranks) -> tuple[Shape, ...]:
    """The shapes of the factors, in the order in which they run; `ranks` are the channels between them."""
    inputs, outputs = shape.inputs, shape.outputs
    if method == "svd":
        return shape.along(inputs, ranks[0], *range(len(shape.kernel))), shape.along(ranks[0], outputs)
    if method == "spatial":
        return shape.along(inputs, ranks[0], 0), shape.along(ranks[0], outputs, 1)
    if method == "tucker":
        first, last = ranks
        return shape.along(inputs, first), shape.along(first, last, 0, 1), shape.along(last, outputs)
    if method == "cp":
        (rank,) = ranks
        rows, columns = shape.along(rank, rank, 0, groups=rank), shape.along(rank, rank, 1, groups=rank)
        return shape.along(inputs, rank), rows, columns, shape.along(rank, outputs)
    first, middle, last = ranks
    rows, columns = shape.along(first, middle, 0), shape.along(middle, last, 1)
    return shape.along(inputs, first), rows, columns, shape.along(last, outputs)


def full_ranks(kernel: np.ndarray, method: str) -> Ranks:
    """The ranks that any kernel of this shape can be written with exactly."""
    if method == "cp":
        return (math.prod(kernel.shape) // max(kernel.shape),)
    return tuple(min(matrix.shape) for matrix in _unfoldings(kernel, method))


def energies(kernel: np.ndarray, method: str) -> list[np.ndarray]:
    """For each rank of the method, the share of the squared singular values that the first 1, 2, ... hold."""
    shares = []
    for matrix in _unfoldings(kernel, method):
        held = np.cumsum(np.square(np.linalg.svd(matrix, compute_uv=False)))
        shares.append(held / held[-1] if held[-1] > 0 else np.ones_like(held))
    return shares


def ranks_holding(shares: Sequence[np.ndarray], energy: float, round_to: int) -> Ranks:
    """The smallest ranks, in multiples of `round_to`, at which every unfolding holds this share of its energy."""
    return tuple(
        min(len(share), math.ceil((int(np.searchsorted(share, energy)) + 1) / round_to) * round_to) for share in shares
    )


def trim(shape: Shape, method: str, ranks: Ranks) -> Ranks:
    """Cut ranks that their neighbours can't fill."""
    if method == "tucker":
        area = math.prod(shape.kernel)
        first, last = ranks
        return min(first, last * area), min(last, first * area)
    if method == "tt":
        height, width = shape.kernel
        first, middle, last = ranks
        middle = min(middle, first * height)
        last = min(last, middle * width)
        middle = min(middle, last * width)
        return min(first, middle * height), middle, last
    return ranks


def factorise(module: nn.Module, method: str, ranks: Ranks, seed: int = 0, sweeps: int = 20) -> nn.Sequential:
    """The layer as factors of these ranks; the bias goes to the last one.

    Args:
        method: what `method_for` gives.
        ranks: one for svd, spatial and cp, (in, out) for tucker, three for tt; none over `full_ranks`.
        seed: for cp, where the components after the first few start at random.
        sweeps: alternating least squares, for cp.

    Raises:
        numpy.linalg.LinAlgError: cp finds no components, as for a kernel of a far lower rank.
    """
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    parts = split(Shape.of(module), method, ranks)
    arrays = _decompose(weight.detach().cpu().double().numpy(), method, ranks, seed, sweeps)
    last = len(parts) - 1
    factors = [
        part.module(
            array.reshape(part.outputs, part.inputs // part.groups, *part.kernel),
            bias if number == last and isinstance(bias, Tensor) else None,
            weight,
        )
        for number, (part, array) in enumerate(zip(parts, arrays, strict=True))
    ]
    return nn.Sequential(*factors).train(module.training)


def _unfoldings(kernel: np.ndarray, method: str) -> list[np.ndarray]:
    """The matrices whose ranks are the method's ranks, in the order in which the factors run."""
    outputs, inputs = kernel.shape[:2]
    if method == "svd":
        return [kernel.reshape(outputs, -1)]
    if method == "spatial":
        return [kernel.transpose(1, 2, 0, 3).reshape(inputs * kernel.shape[2], -1)]
    if method == "tucker":
        return [kernel.swapaxes(0, 1).reshape(inputs, -1), kernel.reshape(outputs, -1)]
    train = kernel.transpose(1, 2, 3, 0)
    return [train.reshape(math.prod(train.shape[:axes]), -1) for axes in (1, 2, 3)]


def _decompose(kernel: np.ndarray, method: str, ranks: Ranks, seed: int, sweeps: int) -> list[np.ndarray]:
    """Weights of the factors, each with its outputs first."""
    if method in ("svd", "spatial"):
        return _matrix(kernel, method, ranks[0])
    import tensorly
    from tensorly import decomposition

    # Whatever backend the process uses elsewhere, these are NumPy arrays.
    with tensorly.backend_context("numpy", local_threadsafe=True), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # the kernel's sides are shorter than cp's rank: its other components are random
        if method == "tucker":
            (core, (left, right)), _ = decomposition.partial_tucker(kernel, [ranks[1], ranks[0]], modes=[0, 1])
            return [right.T, core, left]
        if method == "tt":
            first, rows, columns, last = decomposition.tensor_train(
                kernel.transpose(1, 2, 3, 0), rank=[1, *ranks, 1]
            ).factors
            return [first[0].T, rows.transpose(2, 0, 1), columns.transpose(2, 0, 1), last[..., 0].T]
        (_, sides), errors = decomposition.parafac(
            kernel.astype(np.float32), ranks[0], n_iter_max=sweeps, tol=1e-6, random_state=seed, return_errors=True
        )
    if not errors[-1] <= 1:  # worse than no weights at all, or not a number
        raise np.linalg.LinAlgError("alternating least squares diverged")
    # A component's size is spread evenly over its four vectors.
    norms = [np.linalg.norm(side.astype(np.float64), axis=0) for side in sides]
    mean = np.prod(norms, axis=0) ** (1 / len(norms))
    out, into, rows, columns = (
        side * np.divide(mean, norm, out=np.zeros_like(mean), where=norm > 0)
        for side, norm in zip(sides, norms, strict=True)
    )
    return [into.T, rows.T, columns.T, out]


def _matrix(kernel: np.ndarray, method: str, rank: int) -> list[np.ndarray]:
    """Two factors by the truncated singular value decomposition, which no other pair of this rank beats."""
    left, values, right = np.linalg.svd(_unfoldings(kernel, method)[0], full_matrices=False)
    left, right = left[:, :rank] * np.sqrt(values[:rank]), right[:rank] * np.sqrt(values[:rank])[:, None]
    if method == "svd":
        return [right, left]
    outputs, inputs, height, width = kernel.shape
    rows = left.reshape(inputs, height, rank).transpose(2, 0, 1)
    return [rows, right.reshape(rank, outputs, width).transpose(1, 0, 2)]
