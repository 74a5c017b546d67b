"""Masks over weights: which single weights stay zero, whatever is trained afterwards.

A mask is a boolean buffer `weight_mask` of the layer that owns the weight: stored, copied and moved with the model; it
computes nothing by itself. `training.fit` applies all masks after each step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core.errors import CandidateError

MASK = "weight_mask"


def set_mask(module: nn.Module, mask: Tensor) -> None:
    """Give the layer's weight a mask (bool, the weight's shape; False: zero from now on) and apply it."""
    mask = mask.detach().to(torch.bool)
    if isinstance(getattr(module, MASK, None), Tensor):
        setattr(module, MASK, mask)
    else:
        module.register_buffer(MASK, mask)
    _apply(module)


def masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks by layer name."""
    return {name: module.weight_mask for name, module in masked_modules(model).items()}  # type: ignore[misc]


def masked_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that carry a mask, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(getattr(module, MASK, None), Tensor)}


def apply_masks(model: nn.Module) -> None:
    """Set every masked weight to zero."""
    for module in masked_modules(model).values():
        _apply(module)


def drop_masks(model: nn.Module) -> None:
    """Remove the masks; the weights stay as they are."""
    for module in masked_modules(model).values():
        delattr(module, MASK)


def copy_masks(source: nn.Module, target: nn.Module) -> None:
    """Give `target`, a copy of `source` with weights of its own, the masks of `source`, and apply them."""
    modules = dict(target.named_modules())
    for name, mask in masks(source).items():
        set_mask(modules[name], mask.clone())


def sparsity(model: nn.Module) -> float:
    """Share of exact zeros among the weights of convolutions and linear layers."""
    weights = _weights(model).values()
    total = sum(weight.numel() for weight in weights)
    return sum(int((weight == 0).sum()) for weight in weights) / max(1, total)


def sparsity_by_layer(model: nn.Module) -> dict[str, float]:
    """Share of exact zeros in the weight of each convolution and linear layer, by layer name."""
    return {name: float((weight == 0).double().mean()) for name, weight in _weights(model).items()}


def trained_weight(module: nn.Module) -> nn.Parameter:
    """The parameter that training changes: the one behind a parametrization where there is one."""
    parametrizations = getattr(module, "parametrizations", None)
    return parametrizations.weight.original if parametrizations is not None else module.weight  # type: ignore[return-value,union-attr]


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))
    }


def _apply(module: nn.Module) -> None:
    weight, mask = trained_weight(module), module.weight_mask
    if mask.shape != weight.shape:  # type: ignore[union-attr]
        raise CandidateError(
            f"a mask of shape {tuple(mask.shape)} does not fit a weight of shape {tuple(weight.shape)}: "  # type: ignore[union-attr,arg-type]
            "what cuts a layer has to take its mask along"
        )
    with torch.no_grad():
        weight.masked_fill_(~mask, 0.0)  # type: ignore[operator,arg-type]  # a product would leave zeros of both signs
