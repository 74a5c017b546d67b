"""Who evaluates what, among several searches in one study.

Each search keeps one attribute in the study: what it evaluates at the moment, and a beat that changes while it
lives. Nothing has to be cleaned up after one that was killed: a beat that stands still counts for nothing.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Any

from optuna.storages import BaseStorage

from ..core.types import Candidate

PREFIX = "running:"
BEAT = 15.0  # seconds between signs of life
SILENCE = 90.0  # seconds without one after which a search counts as dead


def piece_of(candidate: Candidate) -> str:
    """Names a candidate and how thoroughly it is evaluated."""
    return f"{candidate.key}@{candidate.fidelity:g}"


class Claims:
    """What this search evaluates, and what the others do; works on every storage of Optuna."""

    def __init__(self, storage: BaseStorage, study_id: int) -> None:
        self._storage, self._study_id = storage, study_id
        self._name = f"{PREFIX}{uuid.uuid4().hex}"
        self._mine: set[str] = set()
        self._beats = 0
        self._written = 0.0
        self._seen: dict[str, tuple[int, float]] = {}  # each other search's beat, and when it was new here

    def take(self, piece: str) -> bool:
        """Claim a piece of work; False where another search has it.

        Two searches that ask within the same milliseconds may both get it: the study keeps one result all the same.
        """
        if piece in self._others():
            return False
        self._mine.add(piece)
        self._write()
        later = [name for name, pieces in self._alive().items() if piece in pieces and name < self._name]
        if later:
            self.drop(piece)
        return not later

    def drop(self, piece: str) -> None:
        """The piece of work is done, or given up."""
        self._mine.discard(piece)
        self._write()

    def beat(self) -> None:
        """Give a sign of life, where it is time for one."""
        if time.monotonic() - self._written > BEAT:
            self._write()

    def elsewhere(self) -> int:
        """How many pieces of work the other searches are at."""
        return len(self._others())

    def close(self) -> None:
        """This search evaluates nothing any more."""
        self._mine.clear()
        self._write()

    def _write(self) -> None:
        self._beats += 1
        value: dict[str, Any] = {"beat": self._beats, "pieces": sorted(self._mine)}
        self._storage.set_study_system_attr(self._study_id, self._name, value)
        self._written = time.monotonic()

    def _others(self) -> set[str]:
        return {piece for pieces in self._alive().values() for piece in pieces}

    def _alive(self) -> Mapping[str, Any]:
        """By search, the pieces of work of those that showed a sign of life lately, by this machine's own clock."""
        now = time.monotonic()
        found = {}
        for name, value in self._storage.get_study_system_attrs(self._study_id).items():
            if not name.startswith(PREFIX) or name == self._name or not value["pieces"]:
                continue
            if name not in self._seen or self._seen[name][0] != value["beat"]:
                self._seen[name] = (value["beat"], now)
            if now - self._seen[name][1] <= SILENCE:
                found[name] = value["pieces"]
        return found
