"""Post-training quantization with a bit-width per layer.

Weights: symmetric, one scale per output channel. Activations: one scale per tensor, asymmetric or
symmetric. The model that comes back computes with rounded values ("fake quantization"), and carries
the scales that the export writes into the graph.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.errors import CandidateError, InputError
from ..core.registry import operator
from ..core.types import Task
from ..tasks.data import example_input, normalise
from .graph import Layer, find_layers, fold_batchnorm

BITS = (32, 16, 8, 7, 6, 5, 4, 3, 2)
CALIBRATORS = ("max", "percentile")
OUTPUTS = ("none", "shared", "all")


class Grid(nn.Module):
    """The values that a tensor may take: `(q - zero_point) * scale` for low <= q <= high.

    A module, so that scales are stored and moved with the model that they belong to.

    Attributes:
        scale: a tensor of one value, or one per channel.
    """

    scale: Tensor

    def __init__(self, scale: Tensor, zero_point: int, low: int, high: int) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.zero_point, self.low, self.high = zero_point, low, high

    def round(self, x: Tensor) -> Tensor:
        """Nearest grid value of each element (torch's fake quantization, ties to even)."""
        if self.scale.numel() > 1:
            zero = torch.zeros(self.scale.numel(), dtype=torch.int32)
            return torch.fake_quantize_per_channel_affine(x, self.scale, zero, 0, self.low, self.high)
        # A scale that stays a tensor, as `torch.export` can't follow the value of one.
        zero = torch.tensor(self.zero_point, dtype=torch.int32)
        return torch.fake_quantize_per_tensor_affine(x, self.scale, zero, self.low, self.high)

    def integers(self, x: Tensor) -> Tensor:
        """Grid positions of `x`, channels first where there are several scales; int32."""
        scale = self.scale.view(-1, *[1] * (x.ndim - 1)) if self.scale.numel() > 1 else self.scale
        return (x / scale).round().add(self.zero_point).clamp(self.low, self.high).to(torch.int32)


class LayerQuantization(nn.Module):
    """The grids of one layer, as sub-module `quantization` of its module.

    Attributes:
        bits: 16, or 2 to 8.
        weight, input, output: the grids; None where that tensor is not rounded.
    """

    weight: Grid | None
    input: Grid | None
    output: Grid | None

    def __init__(
        self, bits: int, weight: Grid | None = None, input: Grid | None = None, output: Grid | None = None
    ) -> None:
        super().__init__()
        self.bits = bits
        self.weight, self.input, self.output = weight, input, output

    def attach(self, module: nn.Module) -> None:
        """Round the module's input and output from now on."""
        module.register_forward_pre_hook(_round_input)
        module.register_forward_hook(_round_output)


def _round_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    grid = _of(module).input
    return (grid.round(inputs[0]), *inputs[1:]) if grid is not None else None


def _round_output(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
    grid = _of(module).output
    return grid.round(output) if grid is not None else None


def _of(module: nn.Module) -> LayerQuantization:
    return module.quantization  # type: ignore[return-value]


@operator
@dataclass(frozen=True)
class Quantize:
    """Round weights and activations to `bits`.

    Attributes:
        bits: for all layers, or by layer name; layers not named stay at 32. 16 stores half-precision
            weights, and runs in bfloat16 where the target can. 2 to 8 are integer grids.
        calibrator: "max" covers every value seen, "percentile" leaves out the outermost 0.01 %.
        symmetric: whether signed activations get a grid around 0 (unsigned ones always start at 0).
        samples: training images used for calibration.
        outputs: which convolutions also round their output, where it does not just feed the next rounded
            layer. Some runtimes need that for speed ("all": ONNX Runtime) or for right results ("shared",
            only those whose output several operations take: OpenVINO); "none" rounds inputs alone.

    Raises:
        InputError: a bit-width, calibrator or sample count that is not possible.
    """

    bits: int | Mapping[str, int] = 8
    calibrator: str = "max"
    symmetric: bool = True
    samples: int = 256
    outputs: str = "shared"

    rank = 50
    retrains = False

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) and not self.bits:
            raise InputError("Quantize: bits names no layer; leave the step out to quantize nothing")
        for bits in {self.bits} if isinstance(self.bits, int) else set(self.bits.values()):
            if bits not in BITS:
                raise InputError(f"Quantize: bits must be one of {', '.join(map(str, BITS))}, not {bits}")
        if self.calibrator not in CALIBRATORS:
            raise InputError(f"Quantize: calibrator must be one of {', '.join(CALIBRATORS)}, not '{self.calibrator}'")
        if self.outputs not in OUTPUTS:
            raise InputError(f"Quantize: outputs must be one of {', '.join(OUTPUTS)}, not '{self.outputs}'")
        if self.samples < 1:
            raise InputError(f"Quantize: samples must be at least 1, not {self.samples}")

    def __call__(self, model: nn.Module, task: Task) -> nn.Module:
        """Return the model with rounded weights and activations, its batch norms folded."""
        example = example_input(task.data)
        layers = find_layers(model, example)
        chosen = self._chosen(layers)
        fold_batchnorm(model, layers)
        modules = dict(model.named_modules())
        integer = [layer for layer in layers if chosen[layer.name] <= 8]
        seen = self._calibrate(model, [layer.name for layer in integer], task) if integer else {}
        for layer in layers:
            bits, module = chosen[layer.name], modules[layer.name]
            if bits == 32:
                continue
            quantization = LayerQuantization(bits)
            with torch.no_grad():
                if bits == 16:
                    module.weight.copy_(module.weight.half().float())  # type: ignore[operator,union-attr]
                else:
                    self._set_grids(quantization, layer, module, seen[layer.name])
                    module.weight.copy_(quantization.weight.round(module.weight))  # type: ignore[union-attr,operator,arg-type]
            module.quantization = quantization  # type: ignore[assignment]
            quantization.attach(module)
        return model

    def describe(self) -> str:
        """Short text for tables."""
        values = {self.bits} if isinstance(self.bits, int) else set(self.bits.values())
        names = [{32: "fp32", 16: "16-bit"}.get(bits, f"int{bits}") for bits in sorted(values)]
        return "+".join(names)

    def _chosen(self, layers: tuple[Layer, ...]) -> dict[str, int]:
        names = [layer.name for layer in layers]
        if isinstance(self.bits, int):
            return dict.fromkeys(names, self.bits)
        strange = sorted(set(self.bits) - set(names))
        if strange:
            raise CandidateError(f"Quantize: no layer called {', '.join(strange)}; layers: {', '.join(names)}")
        return {name: self.bits.get(name, 32) for name in names}

    def _set_grids(
        self, quantization: LayerQuantization, layer: Layer, module: nn.Module, seen: dict[str, tuple[float, float]]
    ) -> None:
        bits = quantization.bits
        quantization.weight = weight_grid(module.weight, bits)  # type: ignore[arg-type]
        quantization.input = activation_grid(*seen["input"], bits, self.symmetric)
        if (
            layer.kind == "conv"
            and not layer.int8_chain
            and (self.outputs == "all" or (self.outputs == "shared" and layer.shared))
        ):
            low, high = seen["output"]
            # Rounding to a grid from 0 upwards is the ReLU that follows.
            quantization.output = activation_grid(max(low, 0.0) if layer.clipped else low, high, bits, self.symmetric)

    def _calibrate(self, model: nn.Module, names: list[str], task: Task) -> dict[str, dict[str, tuple[float, float]]]:
        """Ranges of each layer's input and output over training images: {name: {"input": (low, high), ...}}."""
        ends: dict[tuple[str, str], list[tuple[float, float]]] = {}

        def record(name: str, side: str, x: Tensor) -> None:
            if self.calibrator == "max":
                low, high = torch.aminmax(x)
                ends.setdefault((name, side), []).append((float(low), float(high)))
            else:
                low, high = np.quantile(x.numpy(), (1e-4, 1 - 1e-4))
                ends.setdefault((name, side), []).append((float(low), float(high)))

        def hook(name: str) -> Any:
            def see(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                record(name, "input", inputs[0].detach())
                record(name, "output", output.detach())

            return see

        modules = dict(model.named_modules())
        handles = [modules[name].register_forward_hook(hook(name)) for name in names]
        train = task.data.train
        picked = np.random.default_rng(0).permutation(len(train))[: self.samples]
        try:
            with torch.no_grad():
                for start in range(0, len(picked), 64):
                    images = train.inputs[np.sort(picked[start : start + 64])]
                    model.eval()(torch.from_numpy(normalise(task.data, images)))
        finally:
            for handle in handles:
                handle.remove()
        combine = (
            (lambda pairs: (min(p[0] for p in pairs), max(p[1] for p in pairs)))
            if self.calibrator == "max"
            else (lambda pairs: (sum(p[0] for p in pairs) / len(pairs), sum(p[1] for p in pairs) / len(pairs)))
        )
        found: dict[str, dict[str, tuple[float, float]]] = {name: {} for name in names}
        for (name, side), pairs in ends.items():
            found[name][side] = combine(pairs)
        return found


def weight_grid(weight: Tensor, bits: int) -> Grid:
    """Symmetric grid with one scale per output channel (dimension 0), -(2^(b-1)-1) .. 2^(b-1)-1."""
    top = 2 ** (bits - 1) - 1
    largest = weight.detach().flatten(1).abs().amax(1)
    return Grid((largest / top).clamp_min(1e-8), 0, -top, top)


def activation_grid(low: float, high: float, bits: int, symmetric: bool) -> Grid:
    """Grid of 2^bits values over [low, high], which always includes 0 exactly.

    Unsigned where no value is negative; otherwise signed and around 0 (symmetric), or from low to high.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    levels = 2**bits - 1
    if low == 0.0:
        return Grid(torch.tensor(max(high / levels, 1e-8)), 0, 0, levels)
    if symmetric:
        top = 2 ** (bits - 1) - 1
        return Grid(torch.tensor(max(max(-low, high) / top, 1e-8)), 0, -top - 1, top)
    scale = max((high - low) / levels, 1e-8)
    return Grid(torch.tensor(scale), round(-low / scale), 0, levels)


def quantized_layers(model: nn.Module) -> dict[str, LayerQuantization]:
    """The layers that carry scales, by name."""
    return {
        name: module.quantization  # type: ignore[misc]
        for name, module in model.named_modules()
        if isinstance(getattr(module, "quantization", None), LayerQuantization)
    }


def without_rounding(model: nn.Module) -> nn.Module:
    """A copy that computes in floating point with the (already rounded) weights: what an exporter traces."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        quantization = getattr(module, "quantization", None)
        if isinstance(quantization, LayerQuantization):
            module._forward_pre_hooks = type(module._forward_pre_hooks)(
                (key, hook) for key, hook in module._forward_pre_hooks.items() if hook is not _round_input
            )
            module._forward_hooks = type(module._forward_hooks)(
                (key, hook) for key, hook in module._forward_hooks.items() if hook is not _round_output
            )
            del module.quantization
    return plain
