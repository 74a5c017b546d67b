"""Small networks with random weights, varied in their operators: what a board is measured with to learn its costs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.types import Data, Split, Task
from .operators import LAYER_KINDS, OperatorCall

SIZES = (8, 16, 32, 64)
# Most layers have multiples of 8, which many kernels want; a pruned network's channels often are none.
CHANNELS = (8, 12, 16, 22, 24, 32, 44, 48, 64, 90, 96, 128, 160, 192, 256)
BLOCKS = ("conv3", "conv5", "conv1", "residual", "bottleneck", "inverted", "separable", "gated", "branches", "pools")
HEADS = (0, 64, 256)  # hidden features of the classifier; 0 for none
MOST_MACS = 1.5e8
# Of a hidden linear layer. More than the caches hold take several times as long each: a cost of their own, of networks
# that are rare today.
MOST_WEIGHTS = 1e6
CLASSES = 10
CALIBRATION_IMAGES = 16


@dataclass(frozen=True)
class PoolNetwork:
    """How to make one of the networks.

    Attributes:
        size: height and width of its images.
        stages: block, channels and number of blocks of each stage; all but the first halve height and width.
        hidden: features of a linear layer before the last one, on all pixels; 0 for none.
        bits: 32, or 8 for layers rounded to 8 bits.
        seed: of the weights.
    """

    size: int
    stages: tuple[tuple[str, int, int], ...]
    hidden: int = 0
    bits: int = 32
    seed: int = 0

    @property
    def name(self) -> str:
        """Such as "32px residual-16x2 inverted-32x1 float"."""
        stages = " ".join(f"{block}-{channels}x{count}" for block, channels, count in self.stages)
        hidden = f" hidden-{self.hidden}" if self.hidden else ""
        return f"{self.size}px {stages}{hidden} {'float' if self.bits == 32 else 'int8'}"

    def module(self) -> nn.Module:
        """The network in floating point, input (N, 3, size, size), output (N, 10)."""
        state = torch.random.get_rng_state()
        torch.manual_seed(self.seed)
        try:
            return self._layers().eval()
        finally:
            torch.random.set_rng_state(state)

    def _layers(self) -> nn.Sequential:
        width = self.stages[0][1]
        layers: list[nn.Module] = [_conv(3, width, 3)]
        size = self.size
        for number, (block, channels, count) in enumerate(self.stages):
            if number and size > 4:
                layers.append(nn.MaxPool2d(2) if block == "pools" else _conv(width, width, 3, stride=2))
                size //= 2
            if channels != width:
                layers.append(_conv(width, channels, 1))
                width = channels
            layers += [_block(block, width) for _ in range(count)]
        if self.hidden:
            layers += [
                nn.Flatten(),
                nn.Linear(width * size**2, self.hidden),
                nn.ReLU(),
                nn.Linear(self.hidden, CLASSES),
            ]
        else:
            layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES)]
        return nn.Sequential(*layers)

    def task(self) -> Task:
        """A task with the network and a few random images."""
        rng = np.random.default_rng(self.seed)
        images = rng.integers(0, 256, (CALIBRATION_IMAGES, 3, self.size, self.size), np.uint8)
        split = Split(images, np.arange(CALIBRATION_IMAGES) % CLASSES)
        names = tuple(map(str, range(CLASSES)))
        data = Data(self.name, split, split, split, names, (0.5,) * 3, (0.25,) * 3)
        return Task(self.name, self.module, data, trained=False)

    def calls(self) -> tuple[OperatorCall, ...]:
        """Its operators, as the exported file will have them but for their names; computes nothing."""
        found = _float_calls(dataclasses.replace(self, bits=32))
        if self.bits == 32:
            return found
        # What lies between two layers is mostly read in float32; only a design depends on that, never a fit.
        return tuple(
            dataclasses.replace(call, weight_bits=8, activation_bits=8) if call.kind in LAYER_KINDS else call
            for call in found
        )

    @property
    def _hidden_weights(self) -> int:
        pixels = self.size // 2 ** sum(self.size >> number > 4 for number in range(len(self.stages) - 1))
        return self.stages[-1][1] * pixels**2 * self.hidden


@lru_cache(maxsize=512)
def _float_calls(network: PoolNetwork) -> tuple[OperatorCall, ...]:
    found: list[OperatorCall] = []
    with torch.device("meta"):
        model = network._layers().eval()
        image = torch.empty(1, 3, network.size, network.size)
    for module in model.modules():
        if type(module) in _KINDS:
            module.register_forward_hook(lambda *values: found.append(_call(*values)))
    model(image)
    return tuple(found)


def pool_networks(count: int = 60, seed: int = 0, int8: bool = False) -> tuple[PoolNetwork, ...]:
    """Random networks, all different, of up to 150 million multiply-accumulates and a million weights in one layer.

    Args:
        int8: whether there is an 8-bit form of each, too.
    """
    rng = np.random.default_rng(seed)
    found: dict[str, PoolNetwork] = {}
    while len(found) < count:
        depth = int(rng.integers(1, 4))
        widths = np.sort(rng.choice(CHANNELS, depth))
        stages = tuple((str(rng.choice(BLOCKS)), int(width), int(rng.integers(1, 4))) for width in widths)
        network = PoolNetwork(int(rng.choice(SIZES)), stages, int(rng.choice(HEADS)), seed=int(rng.integers(1 << 16)))
        if network.name in found or network._hidden_weights > MOST_WEIGHTS:
            continue
        if sum(call.macs for call in network.calls()) <= MOST_MACS:
            found[network.name] = network
    networks = tuple(found.values())
    return networks + tuple(dataclasses.replace(network, bits=8) for network in networks) if int8 else networks


class Sum(nn.Module):
    """`inner(x) + x`, or their product."""

    def __init__(self, inner: nn.Module, product: bool = False) -> None:
        super().__init__()
        self.inner, self.join = inner, Join("multiply" if product else "add")

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.inner(x), x)


class Branches(nn.Module):
    """Branches side by side, their channels together."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches, self.join = nn.ModuleList(branches), Join("concat")

    def forward(self, x: Tensor) -> Tensor:
        return self.join(*(branch(x) for branch in self.branches))


class Join(nn.Module):
    """An addition, product or concatenation as a module, so that hooks see it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, *values: Tensor) -> Tensor:
        if self.kind == "concat":
            return torch.cat(values, 1)
        return values[0] + values[1] if self.kind == "add" else values[0] * values[1]


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, relu: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, nn.ReLU()) if relu else nn.Sequential(*layers)


def _block(name: str, width: int) -> nn.Module:
    """One of `BLOCKS`, which keeps shapes."""
    if name in ("conv1", "conv3", "conv5"):
        return _conv(width, width, int(name[-1]))
    if name == "residual":
        return Sum(nn.Sequential(_conv(width, width, 3), _conv(width, width, 3, relu=False)))
    if name == "bottleneck":
        inner = max(8, width // 4)
        return Sum(nn.Sequential(_conv(width, inner, 1), _conv(inner, inner, 3), _conv(inner, width, 1, relu=False)))
    if name == "inverted":
        inner = 4 * width
        deep = (_conv(width, inner, 1), _conv(inner, inner, 3, groups=inner), _conv(inner, width, 1, relu=False))
        return Sum(nn.Sequential(*deep))
    if name == "separable":
        return nn.Sequential(_conv(width, width, 3, groups=width), _conv(width, width, 1))
    if name == "gated":
        inner = max(8, width // 4)
        gate = (nn.AdaptiveAvgPool2d(1), _conv(width, inner, 1), nn.Conv2d(inner, width, 1), nn.Hardsigmoid())
        return nn.Sequential(_conv(width, width, 3), Sum(nn.Sequential(*gate), product=True))
    half = width // 2
    if name == "branches":
        return Branches(_conv(width, half, 1), _conv(width, width - half, 3))
    # Runtimes have slow kernels, tens of times so, for averages of channels that are no multiple of 16.
    pooled = max(16, half // 16 * 16)
    pools = Branches(nn.Sequential(_conv(width, pooled, 1), nn.AvgPool2d(3, 1, 1)), nn.MaxPool2d(3, 1, 1))
    return nn.Sequential(pools, _conv(width + pooled, width, 1))


_KINDS: dict[type[nn.Module], tuple[str, str]] = {
    nn.Conv2d: ("conv", "Conv"),
    nn.Linear: ("linear", "Gemm"),
    nn.MaxPool2d: ("pool", "MaxPool"),
    nn.AvgPool2d: ("pool", "AveragePool"),
    nn.AdaptiveAvgPool2d: ("global_pool", "GlobalAveragePool"),
    nn.Hardsigmoid: ("activation", "HardSigmoid"),
    nn.Flatten: ("data", "Flatten"),
    Join: ("add", "Add"),
}


def _call(module: Any, inputs: Sequence[Tensor], output: Tensor) -> OperatorCall:
    """One module's operator."""
    kind, op_type = _KINDS[type(module)]
    call = OperatorCall(kind, "", op_type, tuple(tuple(x.shape) for x in inputs), tuple(output.shape))
    if isinstance(module, Join):
        names = {"add": "Add", "multiply": "Mul", "concat": "Concat"}
        return dataclasses.replace(call, kind=module.kind, op_type=names[module.kind])
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        weights = math.prod(module.weight.shape)
        macs = output.numel() * (weights // module.weight.shape[0])
        call = dataclasses.replace(call, macs=macs, weight_bytes=4 * weights)
    if isinstance(module, nn.Conv2d):
        depthwise = module.groups > 1 and module.weight.shape[1] == 1
        kernel = tuple(module.kernel_size)
        kind = "depthwise" if depthwise else "conv"
        return dataclasses.replace(call, kind=kind, kernel=kernel, groups=module.groups)
    return call
