"""Number formats by name, and the grids that weights and activations are rounded to.

A format is a number of bits or a name: 32, 16 (half precision), "bf16", "fp8" (e4m3), "fp8e5m2", 8 to 2 (integers),
1.58 (ternary) and 1 (binary).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import InputError

Format = int | float | str

FORMATS: tuple[Format, ...] = (32, 16, "bf16", "fp8", "fp8e5m2", 8, 7, 6, 5, 4, 3, 2, 1.58, 1)
# Largest finite values: Micikevicius et al. 2022 (arXiv:2209.05433), table 1.
FLOAT8: dict[str, tuple[torch.dtype, float]] = {
    "fp8": (torch.float8_e4m3fn, 448.0),
    "fp8e5m2": (torch.float8_e5m2, 57344.0),
}
SMALLEST = 1e-8
# Shares of the whole range that the search for the smallest squared error tries.
SHARES = tuple(step / 100 for step in range(1, 101))


def bit_width(format: Format) -> float:
    """Bits of one value in a format; "dynamic" activations have 8. Raises InputError for an unknown format."""
    names: dict[Format, float] = {"bf16": 16, "fp8": 8, "fp8e5m2": 8, "dynamic": 8}
    if format in names:
        return names[format]
    if isinstance(format, (str, bool)) or format not in FORMATS:
        raise InputError(f"bits must be one of {', '.join(map(str, FORMATS))}, not {format}")
    return format


def is_integer(format: Format) -> bool:
    """Whether values of a format are small integers times a scale."""
    return not isinstance(format, str) and format <= 8


class Grid(nn.Module):
    """The values that a tensor may take: `(q - zero_point) * scale` for integers low <= q <= high.

    A module, so that scales are stored and moved with the model that they belong to.

    Attributes:
        scale: a tensor of one value, or one per channel (dimension 0), or one per group, in order.
        zero_point: of all values; 0 where `zero_points` has one for each scale.
        zero_points: int32, as many as scales; None where they are all alike.
        group: weights that share a scale, along the flattened dimensions after the first; 0 for all of a channel.
        input_scale: factors by which each input channel (dimension 1) is multiplied before rounding and divided
            after it (AWQ); None for none.
    """

    scale: Tensor
    zero_points: Tensor | None
    input_scale: Tensor | None

    def __init__(
        self,
        scale: Tensor,
        zero_point: int,
        low: int,
        high: int,
        *,
        zero_points: Tensor | None = None,
        group: int = 0,
        input_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("zero_points", zero_points)
        self.register_buffer("input_scale", input_scale)
        self.zero_point, self.low, self.high, self.group = zero_point, low, high, group

    def round(self, x: Tensor) -> Tensor:
        """Nearest grid value of each element."""
        if self.input_scale is None:
            return self._round(x)
        factors = self._factors(x)
        return self._round(x * factors) / factors

    def integers(self, x: Tensor) -> Tensor:
        """Grid positions of `x`, channels first where there are several scales; int32."""
        x = x if self.input_scale is None else x * self._factors(x)
        return self._integers(x)

    def _round(self, x: Tensor) -> Tensor:
        # torch's fake quantization: ties to even.
        if self.scale.numel() == 1:
            # A scale that stays a tensor, as `torch.export` can't follow the value of one.
            zero = torch.tensor(self.zero_point, dtype=torch.int32) if self.zero_points is None else self.zero_points
            return torch.fake_quantize_per_tensor_affine(x, self.scale, zero, self.low, self.high)
        zeros = self.zero_points
        if zeros is None:
            zeros = torch.full((self.scale.numel(),), self.zero_point, dtype=torch.int32)
        rows = x.reshape(-1, self.group) if self.group else x
        scale = self.scale.reshape(-1)
        return torch.fake_quantize_per_channel_affine(rows, scale, zeros, 0, self.low, self.high).view_as(x)

    def _integers(self, x: Tensor) -> Tensor:
        zero = self.zero_point if self.zero_points is None else self._spread(self.zero_points, x)
        return (x / self._spread(self.scale, x)).round().add(zero).clamp(self.low, self.high).to(torch.int32)

    def _spread(self, values: Tensor, x: Tensor) -> Tensor:
        """One value per scale, in a shape that broadcasts against `x`."""
        if values.numel() == 1:
            return values
        if self.group:
            return values.reshape(-1).repeat_interleave(self.group).view_as(x)
        return values.reshape(-1, *[1] * (x.ndim - 1))

    def _factors(self, x: Tensor) -> Tensor:
        assert self.input_scale is not None
        return self.input_scale.view(1, -1, *[1] * (x.ndim - 2))


class TernaryGrid(Grid):
    """-scale, 0 and scale; what is not larger than `threshold * scale` becomes 0.

    Source: Ternary Weight Networks, Li & Liu 2016 (arXiv:1605.04711).
    """

    threshold: Tensor

    def __init__(self, scale: Tensor, threshold: Tensor, **settings: Any) -> None:
        super().__init__(scale, 0, -1, 1, **settings)
        self.register_buffer("threshold", threshold)

    def _round(self, x: Tensor) -> Tensor:
        return self._integers(x) * self._spread(self.scale, x)

    def _integers(self, x: Tensor) -> Tensor:
        kept = x.abs() > self._spread(self.scale, x) * self._spread(self.threshold, x)
        return (x.sign() * kept).to(torch.int32)


class BinaryGrid(Grid):
    """-scale and scale, by sign; 0 becomes scale.

    Source: XNOR-Net, Rastegari et al. 2016 (arXiv:1603.05279), section 3.1.
    """

    def __init__(self, scale: Tensor, **settings: Any) -> None:
        super().__init__(scale, 0, -1, 1, **settings)

    def _round(self, x: Tensor) -> Tensor:
        return self._integers(x) * self._spread(self.scale, x)

    def _integers(self, x: Tensor) -> Tensor:
        return torch.where(x >= 0, 1, -1).to(torch.int32)


class FloatGrid(Grid):
    """8-bit floating-point numbers times a scale; larger ones become the largest.

    Attributes:
        format: "fp8" (e4m3) or "fp8e5m2".
    """

    def __init__(self, scale: Tensor, format: str, **settings: Any) -> None:
        self.dtype, top = FLOAT8[format]
        super().__init__(scale, 0, -int(top), int(top), **settings)
        self.format = format

    def codes(self, x: Tensor) -> Tensor:
        """The 8-bit numbers, in torch's type for them."""
        return (x / self._spread(self.scale, x)).clamp(self.low, self.high).to(self.dtype)

    def _round(self, x: Tensor) -> Tensor:
        return self.codes(x).to(torch.float32) * self._spread(self.scale, x)


class Codebook(Grid):
    """Any values, found by k-means: `centroids` of shape (1 or channels, entries), ascending.

    Source: Deep Compression, Han et al. 2016 (arXiv:1510.00149), section 3.
    """

    centroids: Tensor

    def __init__(self, centroids: Tensor) -> None:
        super().__init__(torch.ones(1), 0, 0, centroids.shape[1] - 1)
        self.register_buffer("centroids", centroids)

    def _round(self, x: Tensor) -> Tensor:
        positions = self._integers(x).reshape(len(self.centroids), -1)
        return self.centroids.gather(1, positions.long()).view_as(x)

    def _integers(self, x: Tensor) -> Tensor:
        return _nearest(x.reshape(len(self.centroids), -1), self.centroids).view_as(x).to(torch.int32)


class DynamicGrid(Grid):
    """8-bit unsigned integers over the range of each batch, as ONNX's DynamicQuantizeLinear defines them.

    Its scale and zero point are found anew for every tensor; those of the attributes mean nothing.
    """

    def __init__(self) -> None:
        super().__init__(torch.ones(()), 0, 0, 255)

    def _round(self, x: Tensor) -> Tensor:
        low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
        scale = (high - low) / 255
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        zero = (-low / scale).round().clamp(0, 255)
        return (((x / scale).round() + zero).clamp(0, 255) - zero) * scale

    def _integers(self, x: Tensor) -> Tensor:
        raise NotImplementedError("positions on a dynamic grid are known at run time only")


def weight_grid(
    weight: Tensor,
    bits: Format,
    *,
    granularity: str = "channel",
    group: int = 0,
    symmetric: bool = True,
    calibrator: str = "max",
    input_scale: Tensor | None = None,
) -> Grid:
    """The grid for a weight, shape (channels, ...).

    Integers: -(2^(b-1)-1) .. 2^(b-1)-1 around 0, or, not symmetric, -2^(b-1) .. 2^(b-1)-1 with a zero point.

    Args:
        bits: 2 to 8, 1.58, 1, "fp8" or "fp8e5m2".
        granularity: "tensor", "channel" or "group": what shares a scale.
        group: weights in a group; must divide the weights of a channel.
        calibrator: "max" covers every weight, "mse" the share of the range with the smallest squared error.
        input_scale: see `Grid`.
    """
    weight = weight.detach()
    if input_scale is not None:
        weight = weight * input_scale.view(1, -1, *[1] * (weight.ndim - 2))
    size = group if granularity == "group" else 0
    rows = weight.reshape(1, -1) if granularity == "tensor" else weight.reshape(-1, size) if size else weight.flatten(1)
    settings: dict[str, Any] = {"group": size, "input_scale": input_scale}
    largest = rows.abs().amax(1)
    if bits == 1:
        return BinaryGrid(rows.abs().mean(1).clamp_min(SMALLEST), **settings)
    if bits == 1.58:
        threshold = 0.7 * rows.abs().mean(1)
        kept = rows.abs() > threshold[:, None]
        scale = ((rows.abs() * kept).sum(1) / kept.sum(1).clamp_min(1)).clamp_min(SMALLEST)
        return TernaryGrid(scale, threshold / scale, **settings)
    if isinstance(bits, str):
        return FloatGrid((largest / FLOAT8[bits][1]).clamp_min(SMALLEST), bits, **settings)
    bits = int(bits)
    top = 2 ** (bits - 1) - 1
    if symmetric:
        scale = (largest / top).clamp_min(SMALLEST)
        if calibrator == "mse":
            errors = [_error(rows, Grid(scale * share, 0, -top, top)) for share in SHARES]
            scale = scale * torch.tensor(SHARES)[torch.stack(errors).argmin(0)]
        return Grid(scale, 0, -top, top, **settings)
    low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    if calibrator == "mse":
        errors = [_error(rows, _asymmetric(low * share, high * share, bits)) for share in SHARES]
        best = torch.tensor(SHARES)[torch.stack(errors).argmin(0)]
        low, high = low * best, high * best
    return _asymmetric(low, high, bits, **settings)


def _asymmetric(low: Tensor, high: Tensor, bits: int, **settings: Any) -> Grid:
    bottom, levels = -(2 ** (bits - 1)), 2**bits - 1
    scale = ((high - low) / levels).clamp_min(SMALLEST)
    # Signed, as the runtimes' integer kernels want their weights.
    zeros = (-low / scale).round().add(bottom).clamp(bottom, bottom + levels).to(torch.int32)
    return Grid(scale, 0, bottom, bottom + levels, zero_points=zeros, **settings)


def _error(rows: Tensor, grid: Grid) -> Tensor:
    """Squared error of rounding, for each row."""
    return (grid.round(rows) - rows).square().sum(1)


def codebook(weight: Tensor, entries: int, granularity: str = "channel") -> Codebook:
    """The codebook that k-means (Lloyd's algorithm) finds for a weight or for each channel.

    Begins halfway between the quantiles and values evenly over the range: of normal numbers, what it ends at has a
    squared error within a tenth of the best of five random starts.
    """
    weight = weight.detach()
    rows = (weight.reshape(1, -1) if granularity == "tensor" else weight.flatten(1)).sort(1).values
    places = (torch.arange(entries) + 0.5) / entries
    quantiles = rows[:, (places * rows.shape[1]).long()]
    even = rows[:, :1] + places * (rows[:, -1:] - rows[:, :1])
    return Codebook(_lloyd(rows, (quantiles + even) / 2))


def _lloyd(rows: Tensor, centroids: Tensor, iterations: int = 100) -> Tensor:
    """Centroids (R, K), moved until they are the means of what is nearest to them in `rows` (R, N)."""
    for _ in range(iterations):
        nearest = _nearest(rows, centroids)
        sums = torch.zeros_like(centroids).scatter_add_(1, nearest, rows)
        counts = torch.zeros_like(centroids).scatter_add_(1, nearest, torch.ones_like(rows))
        # A centroid that no weight is nearest to stays where it is.
        moved = torch.where(counts > 0, sums / counts.clamp_min(1), centroids).sort(1).values
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids


def _nearest(rows: Tensor, centroids: Tensor) -> Tensor:
    """Index of the nearest of the ascending `centroids` (R, K) for each element of `rows` (R, N)."""
    middles = (centroids[:, 1:] + centroids[:, :-1]) / 2
    return torch.searchsorted(middles.contiguous(), rows.contiguous())


def activation_grid(low: float, high: float, bits: Format, symmetric: bool) -> Grid:
    """Grid of 2^bits values over [low, high], which always includes 0 exactly; or 8-bit floating-point numbers.

    Unsigned where no value is negative; otherwise signed and around 0 (symmetric), or from low to high.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if isinstance(bits, str):
        return FloatGrid(torch.tensor(max(max(-low, high) / FLOAT8[bits][1], SMALLEST)), bits)
    bits = int(bits)
    levels = 2**bits - 1
    if low == 0.0:
        return Grid(torch.tensor(max(high / levels, SMALLEST)), 0, 0, levels)
    if symmetric:
        top = 2 ** (bits - 1) - 1
        return Grid(torch.tensor(max(max(-low, high) / top, SMALLEST)), 0, -top - 1, top)
    scale = max((high - low) / levels, SMALLEST)
    return Grid(torch.tensor(scale), round(-low / scale), 0, levels)
