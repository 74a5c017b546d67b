"""A point of the front, which can be handed over as a bundle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import InputError
from ..core.types import Artifact, Measurement
from ..evaluators.scalar import Scalar
from .rows import metrics_as_json


@dataclass(frozen=True)
class Point:
    """A point of the front, or what is shown beside it: baselines, and points that are better by noise alone.

    Attributes:
        split: "test" once it was measured on held-out data, "search" before.
        on_front: False for a baseline that other points beat, or that breaks a constraint, and for points that are no
            better than another (below).
        no_better_than: the front's trial that stands for this one, which is better by no more than noise in anything.
        verified: whether it is on the front of the test split too; None where it was not measured there.
        change: what is different on the test split.
    """

    trial: int
    summary: str
    plan: list[dict[str, Any]]
    split: str
    metrics: Mapping[str, Measurement]
    baseline: str
    on_front: bool
    artifact: Artifact | None
    no_better_than: int | None = None
    verified: bool | None = None
    change: str = ""

    def export(self, path: str | Path) -> Path:
        """Copy the deployable file into folder `path`, with `bundle.json` beside it that says what it is.

        Raises:
            InputError: the file is gone, or `path` holds another bundle already.
        """
        folder = Path(path)
        if self.artifact is None or not self.artifact.path.is_file():
            raise InputError(f"trial {self.trial}: its file is no longer in the run folder")
        if (folder / "bundle.json").exists():
            raise InputError(f"{folder} holds a bundle already; choose another folder")
        make_folder(folder)
        shutil.copy2(self.artifact.path, folder / self.artifact.path.name)
        card = {
            "file": self.artifact.path.name,
            "sha256": self.artifact.sha256,
            "target": self.artifact.runtime,
            "trial": self.trial,
            "plan": self.plan,
            "split": self.split,
            "metrics": metrics_as_json(self.metrics),
            "bits_in_graph": self.artifact.bits,
        }
        (folder / "bundle.json").write_text(json.dumps(card, indent=2) + "\n")
        return folder


def scores(scalar: Scalar | None, points: Sequence[Point]) -> dict[int, float]:
    """By trial, the number that a scalarised search maximised; of those points that have all of its figures."""
    untouched = next((point.metrics for point in points if point.baseline == "untouched"), {})
    found = {point.trial: scalar(point.metrics, untouched) for point in points} if scalar else {}
    return {trial: score for trial, score in found.items() if score is not None}


def make_folder(folder: Path) -> None:
    """Make `folder` and its parents; raises InputError where that can't be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"can't make the folder {folder}: {error.strerror}") from error
