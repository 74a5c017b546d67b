"""Training in stretches: how far it goes this time, and the state from which it goes on later, bit for bit.

Whoever wants less than the whole opens `partly` around an operator; `training.fit` asks it how far to go, returns the
model as it is by then, and leaves a file with everything that the next step depends on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

SUFFIX = ".training"


class Stateful(Protocol):
    """What a training run changes as it goes: model, optimizer, order of the data, ..."""

    def state_dict(self) -> Any:
        """Tensors, numbers and text, in dicts and lists."""
        ...

    def load_state_dict(self, state: Any) -> Any:
        """Take the state back."""
        ...


@dataclass
class Stretch:
    """How far the training runs of one operator go.

    Attributes:
        share: of each run's steps that are to be done, 0 < share <= 1.
        path: where states are kept, less number and suffix; None keeps none.
        steps: optimizer steps that were taken.
        whole: whether every run so far came to its end.
        runs: how many there were.
    """

    share: float = 1.0
    path: Path | None = None
    steps: int = 0
    whole: bool = True
    runs: int = 0


_current: ContextVar[Stretch | None] = ContextVar("stretch", default=None)


@contextmanager
def partly(share: float, path: Path | None = None) -> Iterator[Stretch]:
    """Inside the block, training runs do a share of their steps, going on from where they stopped before.

    The learning rate is that of the whole run. Each operator wants a block and a path of its own.
    """
    stretch = Stretch(share, path)
    token = _current.set(stretch)
    try:
        yield stretch
    finally:
        _current.reset(token)


class Run:
    """One training run: where it begins and where it stops this time.

    It goes on from a kept state only if that belongs to the same run: same weights to begin with, same schedule, same
    seed. An operator's second run, say, begins with what the first one learnt, and so anew when that went on.

    Args:
        total: steps of the whole run.
        settings: what else tells this run from others, such as its schedule and seed.
        parts: what the next step depends on, by name; None where one of them can't tell its state: such a run begins
            anew each time. The generator of torch comes along by itself.

    Attributes:
        first, last: the steps to do, `range(first, last)`.
    """

    def __init__(self, model: nn.Module, total: int, settings: Any, parts: Mapping[str, Stateful] | None) -> None:
        self._stretch = _current.get() or Stretch()
        self._parts, self._total, self._ended = parts, total, False
        self._path: Path | None = None
        share = self._stretch.share
        self.first, self.last = 0, total if share >= 1 else min(total, max(1, round(share * total)))
        if self._stretch.path is not None and parts is not None:
            self._path = self._stretch.path.with_name(f"{self._stretch.path.name}.{self._stretch.runs}{SUFFIX}")
            self._origin = _origin(model, settings)
            self._restore()
        self._stretch.runs += 1

    def count(self) -> None:
        """Note that a step was taken."""
        self._stretch.steps += 1

    def end(self) -> None:
        """Note that the run ended before its last step, for good."""
        self._ended = True

    def close(self, step: int) -> None:
        """Keep the state, after `step` steps in all, for a later stretch."""
        self._stretch.whole &= self._ended or step >= self._total
        if self._path is None or self._parts is None or self._stretch.share >= 1:
            return
        state = {
            "origin": self._origin,
            "step": step,
            "ended": self._ended,
            "random": torch.get_rng_state(),
            "parts": {name: part.state_dict() for name, part in self._parts.items()},
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._path.with_name(f"{self._path.name}.{os.getpid()}.part")
        torch.save(state, unfinished)
        unfinished.replace(self._path)

    def _restore(self) -> None:
        assert self._path is not None
        assert self._parts is not None
        if not self._path.is_file():
            return
        state = torch.load(self._path, weights_only=True)
        if state["origin"] != self._origin or state["step"] > self.last or set(state["parts"]) != set(self._parts):
            return
        for name, part in self._parts.items():
            part.load_state_dict(state["parts"][name])
        torch.set_rng_state(state["random"])
        self.first, self._ended = state["step"], state["ended"]
        if self._ended:
            self.last = self.first


def forget(path: Path) -> None:
    """Delete the states that were kept under this path."""
    for kept in path.parent.glob(f"{path.name}.*{SUFFIX}"):
        kept.unlink(missing_ok=True)


def state_of(parts: Mapping[str, Any]) -> dict[str, Stateful] | None:
    """The parts that are there; None where one of them can't tell its state."""
    found = {name: part for name, part in parts.items() if part is not None}
    if all(hasattr(part, "state_dict") and hasattr(part, "load_state_dict") for part in found.values()):
        return found
    return None


def _origin(model: nn.Module, settings: Any) -> str:
    """Hash of all weights and of the settings."""
    text = dataclasses.asdict(settings) if dataclasses.is_dataclass(settings) else settings  # type: ignore[arg-type]
    found = hashlib.sha256(repr(text).encode())
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
