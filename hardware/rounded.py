"""Rounding to 8 bits what a plan leaves in floating point, for targets that compute on integers alone."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from ..compression.graph import find_layers
from ..compression.quantization import Quantize, quantized_layers
from ..core.notes import note
from ..core.types import Task
from ..tasks.data import example_input

if TYPE_CHECKING:
    from torch import nn


def rounded_to_8_bits(model: nn.Module, task: Task, target: str, outputs: str) -> nn.Module:
    """The model, or a copy of it in which every convolution and linear layer that was not yet rounded is, to 8 bits.

    Args:
        target: name of the backend, for the note that says what was rounded.
        outputs: see `Quantize.outputs`.
    """
    rounded = quantized_layers(model)
    layers = [layer.name for layer in find_layers(model, example_input(task.data))]
    left = [name for name in layers if name not in rounded]
    if not left:
        return model
    note(f"{target}: rounded to 8 bits when built: {', '.join(left) if rounded else 'every layer'}")
    step = Quantize(dict.fromkeys(left, 8) if rounded else 8, outputs=outputs)
    return step(copy.deepcopy(model), task)
