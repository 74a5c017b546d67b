"""Training through rounding: gradients for the weights, the activations and the scales of a quantized model.

Weights are parametrized while training lasts: the optimizer sees float weights, the model computes with rounded ones
(straight-through estimator, Bengio et al. 2013, arXiv:1308.3432), and rounded ones are left at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..core.notes import note
from .grids import SMALLEST, BinaryGrid, Codebook, DynamicGrid, Format, Grid, TernaryGrid
from .quantization import quantized_layers

SIDES = ("weight", "input", "output")
HALVES: dict[Format, torch.dtype] = {16: torch.float16, "bf16": torch.bfloat16}


class TrainedGrid(nn.Module):
    """Rounds like its grid, with gradients for what is rounded and, where asked, for the scale.

    The scale is a parameter of the grid while it is trained; `finish` makes it a buffer again. Codebooks and dynamic
    grids have no scale to learn.

    Attributes:
        per_sample: whether the first dimension counts samples, as that of activations does.
    """

    def __init__(self, grid: Grid, *, learn_scale: bool, per_sample: bool) -> None:
        super().__init__()
        self.grid, self.per_sample = grid, per_sample
        self.learn_scale = learn_scale and not isinstance(grid, (Codebook, DynamicGrid))
        if self.learn_scale:
            scale = grid.scale
            del grid.scale
            # One dimension, as the optimizer decays what has more.
            self.shape = scale.shape
            grid.scale = nn.Parameter(scale.detach().reshape(-1).clone())

    def round(self, x: Tensor) -> Tensor:
        """The nearest grid value of each element; float32, whatever the precision of `x`."""
        self._keep_positive()
        return _Round.apply(x.float(), self.grid.scale, self.grid, self.per_sample)

    def finish(self) -> Grid:
        """The grid with the scale that was learned, as a buffer."""
        if self.learn_scale:
            self._keep_positive()
            scale = self.grid.scale.detach().reshape(self.shape)
            del self.grid.scale
            self.grid.register_buffer("scale", scale)
        return self.grid

    def _keep_positive(self) -> None:
        # Past autograd: a scale that a graph holds already was made positive before, and stays as it is.
        if self.learn_scale:
            self.grid.scale.data.clamp_(min=SMALLEST)


class _Round(torch.autograd.Function):
    """The gradients of LSQ: Esser et al. 2020, arXiv:1902.08153, equations 3 and 5, scaled as in section 2.2.

    The straight-through estimator passes within the ends of the grid; to binary and ternary weights it always passes,
    as in the papers of their grids.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, grid: Grid, per_sample: bool) -> Tensor:
        rounded = grid.round(x)
        ctx.save_for_backward(x, scale, rounded)
        ctx.grid, ctx.per_sample = grid, per_sample
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (gradient,) = gradients
        x, scale, rounded = ctx.saved_tensors
        grid: Grid = ctx.grid
        rows = scale.numel()
        zero = grid.zero_point if grid.zero_points is None else grid.zero_points.reshape(-1, 1)
        lowest, highest = grid.low - zero, grid.high - zero
        if isinstance(grid, (BinaryGrid, TernaryGrid, Codebook, DynamicGrid)):
            passed = gradient
        else:
            step = scale.reshape(-1, 1) if rows > 1 else scale
            scaled = x if grid.input_scale is None else x * grid.input_scale.view(1, -1, *[1] * (x.ndim - 2))
            # A row for each scale: the tensor, a channel or a group.
            scaled = scaled.reshape(rows, -1) if rows > 1 else scaled
            passed = gradient * ((scaled > lowest * step) & (scaled < highest * step)).reshape(x.shape)
        if not ctx.needs_input_grad[1]:
            return passed, None, None, None
        # Inside round(x/s) - x/s, beyond an end that end: with y = s round(x/s) both are (y - x, or y) / s. Binary and
        # ternary positions do not move with the scale: y / s.
        change = gradient * rounded
        if not isinstance(grid, (BinaryGrid, TernaryGrid)):
            change = change - passed * x
        total = change.reshape(rows, -1).sum(1) if rows > 1 else change.sum()
        count = x[0].numel() if ctx.per_sample else x.numel() / rows
        top = torch.as_tensor(highest).clamp_min(1).reshape(-1)
        return passed, (total / scale / (count * top).sqrt()).reshape(scale.shape), None, None


class RoundedWeight(nn.Module):
    """The parametrization of a weight that is rounded to a grid."""

    def __init__(self, grid: TrainedGrid) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, weight: Tensor) -> Tensor:
        """The rounded weight."""
        return self.grid.round(weight)


class HalfWeight(nn.Module):
    """The parametrization of a weight that is stored in a 16-bit type."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, weight: Tensor) -> Tensor:
        """The nearest values of that type, as float32; gradients pass through the casts."""
        return weight.to(self.dtype).float()


@contextmanager
def trainable_rounding(
    model: nn.Module, *, learn_scales: bool = False, weights: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """Inside the block, training goes through the model's rounding; afterwards its weights lie on their grids.

    Does nothing to a model that is not quantized, nor inside another such block.

    Args:
        learn_scales: whether the grids' scales are parameters inside the block.
        weights: the float weights to start from, by layer; those not given start from the rounded ones.
    """
    modules = dict(model.named_modules())
    parametrized: list[nn.Module] = []
    trained: list[tuple[nn.Module, str, TrainedGrid]] = []
    try:
        for name, entry in quantized_layers(model).items():
            module = modules[name]
            grids = {side: grid for side in SIDES if (grid := getattr(entry, side)) is not None}
            if any(isinstance(grid, TrainedGrid) for grid in grids.values()):
                continue
            if parametrize.is_parametrized(module, "weight"):
                if grids or entry.bits in HALVES:
                    note(f"training: {name}: its weight is computed from other tensors and stays without rounding")
                continue
            for side, grid in grids.items():
                made = TrainedGrid(grid, learn_scale=learn_scales, per_sample=side != "weight")
                setattr(entry, side, made)
                trained.append((entry, side, made))
            if weights is not None and name in weights:
                with torch.no_grad():
                    cast("Tensor", module.weight).copy_(weights[name])
            rounding: nn.Module
            if isinstance(entry.weight, TrainedGrid):
                rounding = RoundedWeight(entry.weight)
            elif entry.bits in HALVES:
                rounding = HalfWeight(HALVES[entry.bits])
            else:
                continue
            parametrize.register_parametrization(module, "weight", rounding)
            parametrized.append(module)
        yield
    finally:
        for module in parametrized:
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
        for owner, side, made in trained:
            setattr(owner, side, made.finish())
