"""Who evaluates what, among several searches in one study.

Each search keeps one attribute in the study: what it evaluates at the moment, what it asks for, and a beat that
changes while it lives. Nothing has to be cleaned up after one that was killed: a beat that stands still counts for
nothing.
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
PATIENCE = 10.0  # seconds that a search has to make up its mind about a piece of work that others want as well


def piece_of(candidate: Candidate) -> str:
    """Names a candidate and how thoroughly it is evaluated."""
    return f"{candidate.key}@{candidate.fidelity:g}"


class Claims:
    """What this search evaluates, and what the others do; works on every storage of Optuna."""

    def __init__(self, storage: BaseStorage, study_id: int) -> None:
        self._storage, self._study_id = storage, study_id
        self._name = f"{PREFIX}{uuid.uuid4().hex}"
        self._mine: set[str] = set()
        self._asking = ""
        self._beats = 0
        self._written = 0.0
        self._seen: dict[str, tuple[int, float]] = {}  # each other search's beat, and when it was new here

    def take(self, piece: str) -> bool:
        """Claim a piece of work; False where another search has it.

        No storage of Optuna's writes only where nobody has written meanwhile, so a search asks first, and looks who
        else does. Of those that see each other the first by name gets it, but not before the others have answered: one
        that looked before this search had written sees no other, and keeps what it asked for.
        """
        if piece in self._others():
            return False
        self._asking = piece
        self._write()
        end = time.monotonic() + PATIENCE
        while True:
            alive = self._alive()
            asking = [name for name, value in alive.items() if value.get("asking") == piece]
            held = any(piece in value["pieces"] for value in alive.values())
            taken = held or min(asking, default=self._name) < self._name
            if taken or not asking or time.monotonic() > end:
                break
            time.sleep(0.02)
        self._asking = ""
        if not taken:
            self._mine.add(piece)
        self._write()
        return not taken

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
        value: dict[str, Any] = {"beat": self._beats, "pieces": sorted(self._mine), "asking": self._asking}
        self._storage.set_study_system_attr(self._study_id, self._name, value)
        self._written = time.monotonic()

    def _others(self) -> set[str]:
        alive = self._alive().values()
        return {piece for value in alive for piece in (*value["pieces"], value.get("asking")) if piece}

    def _alive(self) -> Mapping[str, Any]:
        """What those write that showed a sign of life lately, by this machine's own clock; by search."""
        now = time.monotonic()
        found = {}
        for name, value in self._storage.get_study_system_attrs(self._study_id).items():
            if not name.startswith(PREFIX) or name == self._name or not (value["pieces"] or value.get("asking")):
                continue
            if name not in self._seen or self._seen[name][0] != value["beat"]:
                self._seen[name] = (value["beat"], now)
            if now - self._seen[name][1] <= SILENCE:
                found[name] = value
        return found
