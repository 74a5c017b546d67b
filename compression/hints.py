"""What a student learns from the inner values of its teachers: features, attention maps, relations between inputs.

Features have the shape (N, C, H, W), (N, L, D) or (N, D). All losses are computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import CandidateError

HINTS = ("none", "feature", "attention", "relational")

# Triplets grow with the cube of the batch: this many of its inputs are compared at most.
RELATIONS = 64
# The weights of distances and angles (Park et al. 2019, section 4.1: 1 to 2).
DISTANCE, ANGLE = 1.0, 2.0


def attention_map(features: Tensor) -> Tensor:
    """The sum of squares over the channels: (N, C, H, W) to (N, 1, H, W), (N, L, D) to (N, 1, L)."""
    squares = features.float().square()
    return squares.sum(1, keepdim=True) if features.ndim == 4 else squares.sum(2).unsqueeze(1)


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of the normalised attention maps, mean over the batch; 0 to 2.

    Summed over the positions, so that its size does not depend on the resolution. Where the resolutions differ, the
    teacher's map is resized to the student's (bilinear). Source: Zagoruyko & Komodakis 2017 (arXiv:1612.03928), p = 2.
    """
    own, other = attention_map(student), attention_map(teacher)
    other = _resized(other, own.shape[2:])
    return (F.normalize(own.flatten(1)) - F.normalize(other.flatten(1))).square().sum(1).mean()


def relational_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Distance loss plus twice the angle loss of embeddings (N, D), of any two widths.

    Source: Park et al. 2019 (arXiv:1904.05068), with the weights of its section on classification.
    """
    student, teacher = student.float(), teacher.float()
    return DISTANCE * distance_loss(student, teacher) + ANGLE * angle_loss(student, teacher)


def distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss, mean over all pairs, of Euclidean distances in units of their mean over different inputs."""
    return F.smooth_l1_loss(_distances(student)[1], _distances(teacher)[1])


def angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss, mean over all triplets, of the cosines of the angles that three embeddings form.

    Pairs that lie on one point for either model have no direction, and count as alike.
    """
    (own, own_share), (other, other_share) = _distances(student), _distances(teacher)
    apart = (own_share > 1e-3) & (other_share > 1e-3)
    return F.smooth_l1_loss(_cosines(own, apart), _cosines(other, apart))


def _distances(points: Tensor) -> tuple[Tensor, Tensor]:
    """Differences (N, N, D), and their lengths in units of the mean (N, N)."""
    differences = points.unsqueeze(0) - points.unsqueeze(1)
    lengths = torch.linalg.vector_norm(differences, dim=2)
    mean = lengths.sum() / max(1, len(points) * (len(points) - 1))
    return differences, lengths / mean.clamp_min(1e-12)


def _cosines(differences: Tensor, apart: Tensor) -> Tensor:
    """Cosine at the first point between the directions to the other two, (N, N, N)."""
    # Chosen before the division: a vanishing length would blow up the gradient.
    directions = F.normalize(torch.where(apart.unsqueeze(2), differences, 0.0), dim=2)
    return directions @ directions.transpose(1, 2)


@dataclass(frozen=True)
class Place:
    """A module, and the shape of its output for one input."""

    module: nn.Module
    shape: tuple[int, ...]


def find_places(model: nn.Module, example: Tensor) -> dict[str, Place]:
    """The outputs of all modules that return one tensor, in the order in which they end; by path.

    Args:
        example: one input; run in eval mode, without gradients.
    """
    found: dict[str, Place] = {}

    def record(name: str, module: nn.Module) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: Any, output: Any) -> None:
            found.pop(name, None)
            if isinstance(output, Tensor):
                found[name] = Place(module, tuple(output.shape))

        return hook

    handles = [module.register_forward_hook(record(name, module)) for name, module in model.named_modules() if name]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(example)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return found


def stage_ends(places: Mapping[str, Place]) -> tuple[str, ...]:
    """At each resolution of convolutions or of linear layers over tokens, the module with the most of them inside.

    The last one of several: a plain network's ends are its last layers at each resolution, a residual network's its
    stages, and not the bottleneck of the next stage that begins at this one's resolution. A layer norm is no end: it
    gives all tokens the same energy, and a map of that says nothing.
    """
    resolutions = {
        _resolution(place.shape)
        for place in places.values()
        if (isinstance(place.module, nn.Conv2d) and len(place.shape) == 4)
        or (isinstance(place.module, nn.Linear) and len(place.shape) == 3)
    }
    ends: dict[tuple[int, ...], tuple[int, str]] = {}
    for name, place in places.items():
        resolution = _resolution(place.shape)
        if resolution not in resolutions or max(resolution) == 1 or isinstance(place.module, nn.LayerNorm):
            continue
        inside = max(1, sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in place.module.modules()))
        if resolution not in ends or inside >= ends[resolution][0]:
            ends.pop(resolution, None)  # so that the order is that in which the ends are reached
            ends[resolution] = (inside, name)
    return tuple(name for _, name in ends.values())


def pair(names: Sequence[str], student: Mapping[str, Place], teacher: Mapping[str, Place]) -> tuple[str, ...]:
    """The teacher's module for each of the student's: of the same path, else resolution, else place in depth.

    Raises:
        CandidateError: the teacher has nothing with as many dimensions.
    """
    ends = stage_ends(teacher)
    found = []
    for number, name in enumerate(names):
        shape = student[name].shape
        if name in teacher and len(teacher[name].shape) == len(shape):
            found.append(name)
            continue
        alike = [end for end in ends if len(teacher[end].shape) == len(shape)]
        if not alike:
            raise CandidateError(
                f"hint: the teacher has no layer '{name}', and none with outputs of {len(shape)} dimensions to match it"
            )
        same = [end for end in alike if _resolution(teacher[end].shape) == _resolution(shape)]
        depth = max(0, round((number + 1) * len(alike) / len(names)) - 1)
        found.append(same[-1] if same else alike[depth])
    return tuple(found)


def classifier(model: nn.Module, example: Tensor) -> str:
    """Path of the linear layer that runs last; its input is the embedding of an input.

    Raises:
        CandidateError: the model has no linear layer.
    """
    linear = [name for name, place in find_places(model, example).items() if isinstance(place.module, nn.Linear)]
    if not linear:
        raise CandidateError("hint 'relational': the model has no linear layer whose input is an embedding")
    return linear[-1]


class Taps:
    """Keeps what modules take in or put out, while it is open; hooks on a model until `close`.

    Attributes:
        values: by position in `names`, of the last forward pass.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], *, inputs: bool = False) -> None:
        self.open = False
        self.values: dict[int, Tensor] = {}
        self._handles = [
            model.get_submodule(name).register_forward_hook(_keep(self, number, inputs))
            for number, name in enumerate(names)
        ]

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self.values.clear()


def _keep(taps: Taps, number: int, inputs: bool) -> Callable[..., None]:
    # A closure and no method: a copy of the model, as averaging makes one, must not copy the taps with it.
    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        value = args[0] if inputs and args else output
        if taps.open and isinstance(value, Tensor):
            taps.values[number] = value

    return hook


class Hint:
    """The loss of a student's inner values against those of its teachers, mean over layers and teachers.

    "feature": mean squared error behind a learned 1x1 convolution or linear layer from the student's width to the
    teacher's (FitNets, Romero et al. 2015, arXiv:1412.6550), resized where resolutions differ. "attention": see
    `attention_loss`. "relational": see `relational_loss`, on what the last linear layer takes in, or on `layers`;
    maps and tokens are averaged over their positions first.

    Args:
        kind: one of `HINTS` but "none".
        student: gets hooks until `close`.
        example: one input, on the models' device.
        layers: module paths in the student; () takes the ends of its stages.
        seed: for the adapters' first weights.

    Raises:
        CandidateError: no such layer, no layer that fits the kind of hint, or none in a teacher that matches.
    """

    def __init__(
        self,
        kind: str,
        student: nn.Module,
        teachers: Sequence[nn.Module],
        example: Tensor,
        layers: tuple[str, ...] = (),
        seed: int = 0,
    ) -> None:
        self.kind, self.student = kind, student
        self.adapters = nn.ModuleList()
        with ExitStack() as undo:
            if kind == "relational" and not layers:
                self._taps = [
                    _tapped(undo, Taps(model, (classifier(model, example),), inputs=True))
                    for model in (student, *teachers)
                ]
            else:
                own = find_places(student, example)
                names = self._names(own, layers)
                self._taps = [_tapped(undo, Taps(student, names))]
                for teacher in teachers:
                    other = find_places(teacher, example)
                    matches = pair(names, own, other)
                    self._taps.append(_tapped(undo, Taps(teacher, matches)))
                    if kind == "feature":
                        shapes = [(own[a].shape, other[b].shape) for a, b in zip(names, matches, strict=True)]
                        self.adapters.append(_adapters(shapes, seed))
            undo.pop_all()

    def _names(self, own: Mapping[str, Place], layers: tuple[str, ...]) -> tuple[str, ...]:
        strange = sorted(set(layers) - set(own))
        if strange:
            raise CandidateError(f"hint_layers: no layer that puts out one tensor is called {', '.join(strange)}")
        names = layers or stage_ends(own)
        flat = [name for name in names if not 3 <= len(own[name].shape) <= 4]
        if self.kind == "attention" and flat:
            raise CandidateError(f"hint 'attention': {', '.join(flat)}: outputs without positions have no attention")
        if not names:
            raise CandidateError(f"hint '{self.kind}': the model has no maps or tokens; name layers in hint_layers")
        return names

    def parameters(self) -> Iterable[nn.Parameter]:
        """The adapters' weights, on the student's device."""
        self.adapters.to(next(self.student.parameters()).device)
        return self.adapters.parameters()

    @contextmanager
    def watching_teachers(self) -> Iterator[None]:
        """Keep what the teachers compute inside the block, and what the student computes after it."""
        for taps in self._taps:
            taps.values.clear()
        for taps in self._taps[1:]:
            taps.open = True
        try:
            yield
        finally:
            for taps in self._taps[1:]:
                taps.open = False
            self._taps[0].open = True

    def loss(self) -> Tensor:
        """The loss of the student's forward pass since the teachers' one; forgets both.

        Raises:
            CandidateError: none of the layers ran.
        """
        own, *others = self._taps
        own.open = False
        found = [
            self._compare(teacher, number, own.values[number], taps.values[number])
            for teacher, taps in enumerate(others)
            for number in own.values
            if number in taps.values
        ]
        for taps in self._taps:
            taps.values.clear()
        if not found:
            raise CandidateError(f"hint '{self.kind}': none of its layers runs while the model trains")
        return torch.stack(found).mean()

    def close(self) -> None:
        """Take all hooks off."""
        for taps in self._taps:
            taps.close()

    def _compare(self, teacher: int, number: int, own: Tensor, other: Tensor) -> Tensor:
        if self.kind == "attention":
            return attention_loss(own, other)
        if self.kind == "relational":
            return relational_loss(*(_embedding(value[:RELATIONS]) for value in (own, other)))
        adapted = self.adapters[teacher][number](own.float())  # type: ignore[index]
        return F.mse_loss(_fitted(adapted, other), other.float())


def _tapped(undo: ExitStack, taps: Taps) -> Taps:
    """Taps that come off again if what follows fails."""
    undo.callback(taps.close)
    return taps


def _adapters(shapes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], seed: int) -> nn.ModuleList:
    """A layer from each student's width to the teacher's; torch's own random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.ModuleList(
            nn.Conv2d(own[1], other[1], 1) if len(own) == 4 else nn.Linear(own[-1], other[-1]) for own, other in shapes
        )


def _embedding(features: Tensor) -> Tensor:
    """(N, D): the mean over positions."""
    if features.ndim == 4:
        return features.float().mean((2, 3))
    return features.float().mean(1) if features.ndim == 3 else features.float()


def _fitted(features: Tensor, like: Tensor) -> Tensor:
    """The student's features at the teacher's resolution."""
    if features.ndim == 3:
        return _resized(features.transpose(1, 2), like.shape[1:2]).transpose(1, 2)
    return _resized(features, like.shape[2:]) if features.ndim == 4 else features


def _resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (N, C, H, W) or (N, C, L) at another resolution."""
    if tuple(maps.shape[2:]) == tuple(size):
        return maps
    return F.interpolate(maps, tuple(size), mode="bilinear" if maps.ndim == 4 else "linear", align_corners=False)


def _resolution(shape: tuple[int, ...]) -> tuple[int, ...]:
    """(H, W) of maps, (L,) of tokens, () of what has no positions."""
    return {4: shape[2:], 3: shape[1:2]}.get(len(shape), ())
