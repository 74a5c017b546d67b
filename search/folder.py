"""A run folder while a search runs in it: one driver at a time, and no files that nobody needs."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from ..core.codec import plan_key
from ..core.errors import InputError
from ..core.types import Artifact, Evaluation, Plan, State
from ..studies.pareto import nondominated
from ..studies.study import Study


class Cleaner:
    """Deletes the files of trials that others beat: they can never be on the front again."""

    def __init__(self, study: Study, baselines: Mapping[str, Plan]) -> None:
        self.study = study
        self._kept = {plan_key(plan) for plan in baselines.values()}
        records = study.records()
        best = study.front_trials(records)
        self._front = [(study.values(r.metrics), r.artifact) for r in records if r.trial in best and not r.baseline]
        self._base = [study.values(r.metrics) for r in records if r.trial in best and r.baseline]

    def add(self, evaluation: Evaluation) -> None:
        """Take a new result into account."""
        if evaluation.artifact is None:
            return
        if evaluation.state is not State.COMPLETE:
            if evaluation.candidate.key not in self._kept:
                _remove(evaluation.artifact)
            return
        values = self.study.values(evaluation.measurements)
        if evaluation.candidate.key in self._kept:
            self._base.append(values)
        else:
            self._front.append((values, evaluation.artifact))
        rows = [*self._base, *(row for row, _ in self._front)]
        best = nondominated(rows, self.study.directions)[len(self._base) :]
        for (_, artifact), keep in zip(self._front, best, strict=True):
            if not keep and artifact is not None:
                _remove(artifact)
        self._front = [entry for entry, keep in zip(self._front, best, strict=True) if keep]


def _remove(artifact: Artifact) -> None:
    artifact.path.unlink(missing_ok=True)
    for cut in artifact.path.parent.glob("exit*/"):  # the files that end at an early exit
        shutil.rmtree(cut, ignore_errors=True)
    with suppress(OSError):
        artifact.path.parent.rmdir()


@contextmanager
def only_driver(folder: Path) -> Iterator[None]:
    """Hold the run folder: two searches in one would count the same trials twice."""
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise InputError(f"{folder} is in use by another search") from error
    try:
        yield
    finally:
        os.close(handle)
