"""Low-rank factorization: a layer becomes several smaller ones that run one after the other."""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..core.errors import CandidateError, InputError
from ..core.notes import note
from ..core.registry import operator
from ..core.types import Task
from ..tasks.data import example_input, normalise
from .factors import (
    METHODS,
    Ranks,
    Shape,
    cost,
    energies,
    factorise,
    full_ranks,
    method_for,
    ranks_holding,
    split,
    trim,
)
from .graph import _replace, find_layers


@dataclass(frozen=True)
class FactoredLayer:
    """What a factorization does to one layer.

    Attributes:
        method: how it is factored; layers without a wide 2-d kernel always by "svd".
        ranks: channels between the factors, in the order in which they run.
        weights, macs: before and after, biases not counted; MACs for one image.
        error: of the layer's own output on images, ||factored - original|| / ||original||; nan where not measured.
    """

    method: str
    ranks: Ranks
    weights: tuple[int, int]
    macs: tuple[int, int]
    error: float = math.nan


@operator
@dataclass(frozen=True)
class LowRank:
    """Replace layers by low-rank factors, an `nn.Sequential` at the same place.

    `method` is for 2-d convolutions with a kernel wider than 1x1 (see `compression.factors`): "svd" (kh x kw, 1x1),
    "spatial" (kh x 1, 1 x kw), "tucker" (1x1, kh x kw, 1x1), "cp" (1x1, depthwise kh x 1 and 1 x kw, 1x1) or "tt"
    (1x1, kh x 1, 1 x kw, 1x1). All other layers are split in two by "svd". Where a method has several ranks, they
    are cut where the singular values of every unfolding hold the same share of energy.

    A layer that would not get fewer weights and fewer MACs stays whole, as do grouped convolutions and layers that
    can't be exchanged (another module reads their weights); a note says so. It is an error where that leaves no
    layer to factor.

    Attributes:
        ratio: share of a layer's cost that may stay, 0 < ratio <= 1, for all layers or by layer name: it gets the
            largest ranks with which the factors take at most this share of its weights and of its MACs, and at
            least the smallest rank. 1 leaves a layer whole. Layers that are not named are left alone. One share
            for all is hard on small first and last layers, which have few singular values to lose; a map can name
            the wide ones alone.
        energy: instead of `ratio`, the smallest ranks with which the squared singular values hold this share,
            0 < energy <= 1; not for "cp", which has no singular values.
        round_to: ranks are multiples of this, as vector units like it, or full.
        sweeps: of alternating least squares, for "cp". Its time grows with the product of a layer's size and its
            rank: seconds for 128 channels, minutes for 512.
        seed: for "cp", whose components start partly at random.

    Raises:
        InputError: both or neither of ratio and energy, or a setting that is not possible.
    """

    ratio: float | Mapping[str, float] = 0.0
    energy: float = 0.0
    method: str = "svd"
    round_to: int = 1
    sweeps: int = 20
    seed: int = 0

    rank = 10
    retrains = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"LowRank: method must be one of {', '.join(METHODS)}, not '{self.method}'")
        if isinstance(self.ratio, Mapping) and not self.ratio:
            raise InputError("LowRank: ratio names no layer; leave the step out to factor nothing")
        if (self.ratio == 0) == (self.energy == 0):
            came = "neither" if self.ratio == 0 else f"ratio {self.ratio} and energy {self.energy}"
            raise InputError(f"LowRank: expected either ratio or energy, got {came}")
        for ratio in self.ratio.values() if isinstance(self.ratio, Mapping) else [self.ratio] if self.ratio else []:
            if not 0 < ratio <= 1:
                raise InputError(f"LowRank: ratio must be above 0 and at most 1, not {ratio}")
        if not 0 <= self.energy <= 1:
            raise InputError(f"LowRank: energy must be above 0 and at most 1, not {self.energy}")
        if self.energy and self.method == "cp":
            raise InputError("LowRank: cp has no singular values to hold an energy; give ratio instead")
        for name, low in (("round_to", 1), ("sweeps", 1), ("seed", 0)):
            if getattr(self, name) < low:
                raise InputError(f"LowRank: {name} must be at least {low}, not {getattr(self, name)}")

    def __call__(self, model: nn.Module, task: Task) -> nn.Module:
        """Return the factored model; raises CandidateError where nothing can be factored."""
        factors = self._factors(model, self._choose(model, task))
        self._exchange(model, factors, example_input(task.data))
        return model.eval()

    def ranks(self, model: nn.Module, task: Task) -> dict[str, Ranks]:
        """The ranks that each factored layer would get, by layer name; leaves `model` as it is."""
        return {name: layer.ranks for name, layer in self._choose(model, task).items()}

    def report(self, model: nn.Module, task: Task, samples: int = 32) -> dict[str, FactoredLayer]:
        """What would become of each factored layer, by name, its error measured on training inputs.

        Each layer sees what it gets in the untouched `model`, which is left as it is.
        """
        chosen = self._choose(model, task)
        factors = self._factors(model, chosen)
        errors = {}

        def compare(name: str, inputs: Tensor, output: Tensor) -> None:
            errors[name] = float((factors[name](inputs) - output).norm() / output.norm())

        hooks = [
            model.get_submodule(name).register_forward_hook(
                lambda _, inputs, output, name=name: compare(name, inputs[0], output)
            )
            for name in factors
        ]
        try:
            with torch.no_grad():
                model.eval()(torch.from_numpy(normalise(task.data, task.data.train.inputs[:samples])))
        finally:
            for hook in hooks:
                hook.remove()
        return {name: dataclasses.replace(chosen[name], error=error) for name, error in errors.items()}

    def describe(self) -> str:
        """Short text for tables."""
        if self.energy:
            return f"low rank {self.method}, energy {self.energy:.0%}"
        ratios = list(self.ratio.values()) if isinstance(self.ratio, Mapping) else [self.ratio]
        low, high = min(ratios), max(ratios)
        return f"low rank {self.method} {low:.0%}" + ("" if low == high else f"-{high:.0%}")

    def _choose(self, model: nn.Module, task: Task) -> dict[str, FactoredLayer]:
        """What each layer that can be factored becomes, by name."""
        example = example_input(task.data)
        names = [layer.name for layer in find_layers(model, example)]
        if isinstance(self.ratio, Mapping):
            strange = sorted(set(self.ratio) - set(names))
            if strange:
                raise CandidateError(
                    f"LowRank: no layer called {', '.join(strange)} that runs by itself, once, and in its own module"
                )
            names = [name for name in names if self.ratio.get(name, 1) < 1]
        elif self.ratio == 1:
            names = []
        else:
            for name in _others(model, names):
                self._refuse(name, "runs more than once, or another module uses its weights")
        inputs = _input_shapes(model, names, example)
        users = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
        chosen = {}
        for name in names:
            module = model.get_submodule(name)
            reason = "another module uses its weights" if users[id(module.weight)] > 1 else _unfit(module)
            if not reason:
                layer = self._layer(name, module, inputs[name])
                if layer.weights[1] < layer.weights[0] and layer.macs[1] < layer.macs[0]:
                    chosen[name] = layer
                    continue
                reason = (
                    f"factors of rank {'x'.join(map(str, layer.ranks))} save nothing: {layer.weights[1]} weights "
                    f"instead of {layer.weights[0]}, {layer.macs[1]} MACs instead of {layer.macs[0]}"
                )
            self._refuse(name, reason)
        if names and not chosen:
            raise CandidateError(f"LowRank: no layer gets smaller with {self.describe()}")
        return chosen

    def _layer(self, name: str, module: nn.Module, input_shape: tuple[int, ...]) -> FactoredLayer:
        """The ranks that a layer gets, and what they cost."""
        shape = Shape.of(module)
        size = input_shape[2:] if shape.kernel else input_shape[1:-1]
        method = method_for(shape, self.method)
        weight = module.weight
        assert isinstance(weight, Tensor)
        kernel = weight.detach().cpu().double().numpy()
        before = cost([shape], size)

        def share(ranks: Ranks) -> float:
            weights, macs = cost(split(shape, method, trim(shape, method, ranks)), size)
            return max(weights / before[0], macs / before[1])

        try:
            if self.energy:
                ranks = ranks_holding(energies(kernel, method), self.energy, self.round_to)
            else:
                ladder = _ladder(kernel, method, self.round_to)
                ratio = self.ratio[name] if isinstance(self.ratio, Mapping) else self.ratio
                ranks = ladder[max(0, bisect.bisect_right(ladder, ratio, key=share) - 1)]
        except np.linalg.LinAlgError as error:
            raise CandidateError(f"LowRank: {name}: its weights have no singular values: {error}") from error
        ranks = trim(shape, method, ranks)
        after = cost(split(shape, method, ranks), size)
        return FactoredLayer(method, ranks, (before[0], after[0]), (before[1], after[1]))

    def _factors(self, model: nn.Module, chosen: Mapping[str, FactoredLayer]) -> dict[str, nn.Module]:
        factors: dict[str, nn.Module] = {}
        for name, layer in chosen.items():
            module = model.get_submodule(name)
            try:
                factors[name] = factorise(module, layer.method, layer.ranks, self.seed, self.sweeps)
            except np.linalg.LinAlgError as error:
                self._refuse(name, f"no {layer.method} factors of rank {layer.ranks[0]} found: {error}")
        return factors

    def _exchange(self, model: nn.Module, factors: Mapping[str, nn.Module], example: Tensor) -> None:
        """Put the factors in; where the model does not run with all of them, leave out those that break it."""
        whole = {name: model.get_submodule(name) for name in factors}
        shape = _run(model, example)
        for name, module in factors.items():
            _replace(model, name, module)
        if _run(model, example) == shape:
            return
        for name, module in whole.items():
            _replace(model, name, module)
        for name, module in factors.items():
            _replace(model, name, module)
            came = _run(model, example)
            if came != shape:
                _replace(model, name, whole[name])
                self._refuse(name, f"the model does not run with its factors: {came}")

    def _refuse(self, name: str, reason: str) -> None:
        """Leave a layer whole with a note, and say why."""
        note(f"LowRank: {name}: {reason}")


def _ladder(kernel: np.ndarray, method: str, round_to: int) -> list[Ranks]:
    """All ranks that come into question, from the smallest to the full ones."""
    full = full_ranks(kernel, method)
    if len(full) == 1:
        return [(min(full[0], rank),) for rank in range(round_to, full[0] + round_to, round_to)]
    shares = energies(kernel, method)
    return [ranks_holding(shares, energy, round_to) for energy in np.unique(np.concatenate(shares))]


def _unfit(module: nn.Module) -> str:
    """Why a layer can't be factored whatever the rank; "" where it can."""
    if getattr(module, "groups", 1) > 1:
        return "a grouped convolution, whose groups are small already"
    plain = next(kind for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(module, kind))
    for method in ("forward", "_conv_forward"):
        if getattr(type(module), method, None) is not getattr(plain, method, None):
            return f"{type(module).__name__} computes more than {plain.__name__}"
    if module._forward_hooks or module._forward_pre_hooks:
        return "hooks hang on it"
    return ""


def _others(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Convolutions and linear layers that are not among `names`."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [name for name, module in model.named_modules() if isinstance(module, kinds) and name not in names]


def _input_shapes(model: nn.Module, names: Sequence[str], example: Tensor) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}

    def keep(name: str, inputs: tuple[Tensor, ...]) -> None:
        shapes[name] = tuple(inputs[0].shape)

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, inputs, name=name: keep(name, inputs))
        for name in names
    ]
    try:
        with torch.no_grad():
            model.eval()(example)
    finally:
        for hook in hooks:
            hook.remove()
    return shapes


def _run(model: nn.Module, example: Tensor) -> tuple[int, ...] | str:
    """The shape of the model's output, or what went wrong."""
    try:
        with torch.no_grad():
            return tuple(model.eval()(example).shape)
    except Exception as error:  # a parent that misses an attribute of its layer may raise anything
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
