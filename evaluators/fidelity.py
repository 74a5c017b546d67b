"""Candidates that are trained a part of the way: what they learnt so far, and what needs no second look.

Weights and states of training lie in the cache folder: `KEY.safetensors` is what a plan's beginning (up to a training
step, see `plan_key`) learnt in full, `KEY@SHARE.safetensors` after a share of the steps, and `KEY.N.training` what its
training goes on from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.codec import decode_measurements, digest, encode_measurements, plan_key
from ..core.types import Artifact, Measurement, Operator, Plan, Task

if TYPE_CHECKING:
    from torch import nn

UNTRAINED = ("parameters", "macs", "size", "reference_latency")  # besides the device's figures


@dataclass
class Training:
    """The training of one candidate, as far as it goes this time.

    Attributes:
        share: of the steps of each training run; 1 trains in full.
        steps: optimizer steps that were taken, of the original model's none.
        whole: whether all training so far came to its end: what took no part of `share`, or ended early, counts.
    """

    task: Task
    cache: Path
    share: float = 1.0
    steps: int = 0
    whole: bool = True

    def __call__(self, model: nn.Module, prefix: Plan) -> nn.Module:
        """Run the last, retraining step of `prefix`, or load what an earlier candidate with this prefix learnt."""
        from ..compression.stretches import forget, partly

        path = self.cache / plan_key(prefix)
        complete, partial = path.with_suffix(".safetensors"), self.cache / f"{path.name}@{self.share:.6g}.safetensors"
        # What follows a part of a training is not what follows all of it.
        if self.whole and complete.is_file():
            return self._load(model, prefix[-1], complete)
        if partial.is_file():
            self.whole = False
            return self._load(model, prefix[-1], partial)
        with partly(self.share, path) as stretch:
            try:
                model = prefix[-1](model, self.task)
            finally:
                self.steps += stretch.steps
        if not stretch.whole:
            settle = getattr(prefix[-1], "settle", None)
            model = settle(model, self.task) if settle is not None else model
        self.whole = self.whole and stretch.whole
        self._save(model, complete if self.whole else partial)
        if self.share >= 1:
            forget(path)
        return model

    def _load(self, model: nn.Module, step: Operator, path: Path) -> nn.Module:
        from safetensors.torch import load_file

        from ..compression.distillation import remember

        model = prepared(step, model, self.task)
        model.load_state_dict(load_file(path))
        return remember(model.eval())  # as training does: a later step may learn from this model

    def _save(self, model: nn.Module, path: Path) -> None:
        from safetensors.torch import save_file

        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, part)
        part.replace(path)


@dataclass(frozen=True)
class Figures:
    """The device's figures of a candidate that will come back with better weights, as a JSON file.

    Attributes:
        path: of the file.
    """

    path: Path

    @classmethod
    def of(cls, cache: Path, target: str, key: str) -> Figures:
        """Those of a candidate on a target."""
        return cls(cache / f"{key}.{digest(target)}.json")

    def known(self) -> bool:
        """Whether the candidate was measured before."""
        return self.path.is_file()

    def read(self, structure: str) -> dict[str, Measurement] | None:
        """What was measured; None where nothing was, or on a file of another structure."""
        if not self.path.is_file():
            return None
        kept = json.loads(self.path.read_text())
        return decode_measurements(kept["figures"]) if kept["structure"] == structure else None

    def write(self, structure: str, figures: Mapping[str, Measurement]) -> None:
        """Keep what was measured."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps({"structure": structure, "figures": encode_measurements(figures)}))
        part.replace(self.path)

    def drop(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)


def structure_of(model: nn.Module, task: Task, artifact: Artifact) -> str:
    """Hash of what a file computes, whatever its weights: layers, their shapes and costs, and the bits it carries."""
    from ..compression.graph import find_layers
    from ..tasks.data import example_input

    layers = find_layers(model, example_input(task.data))
    return digest([[[la.name, la.kind, list(la.output_shape), la.macs] for la in layers], artifact.bits])


def prepared(step: Operator, model: nn.Module, task: Task) -> nn.Module:
    """The structure that a retraining step's weights fit, without the training."""
    prepare = getattr(step, "prepare", None)
    return prepare(model, task) if prepare is not None else model
