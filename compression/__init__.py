"""Operators that change a model: pruning, quantization, fine-tuning with distillation."""

from .finetune import Finetune
from .pruning import Prune
from .quantization import Quantize

__all__ = ["Finetune", "Prune", "Quantize"]
