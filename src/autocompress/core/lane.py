"""Timing never shares its cores with other work: a readers-writer lock between this machine's processes.

Training and evaluation hold the lane together with others; a measurement holds it alone, and training
loops pause for it at `pause_point()`. The locks belong to the processes, so a killed one leaves none.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def _open(name: str) -> int:
    path = Path(tempfile.gettempdir()) / f"autocompress-{os.getuid()}-{name}.lock"
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


class _Lane:
    """Two lock files: who waits to measure holds the gate, so that newcomers queue behind it."""

    def __init__(self) -> None:
        self._pid = 0
        self._gate = self._lane = -1
        self._depth = 0

    def _files(self) -> tuple[int, int]:
        if self._pid != os.getpid():  # a forked child must not share its parent's locks
            self._pid, self._gate, self._lane, self._depth = os.getpid(), _open("gate"), _open("lane"), 0
        return self._gate, self._lane

    def _enter(self) -> None:
        gate, lane = self._files()
        fcntl.flock(gate, fcntl.LOCK_SH)
        fcntl.flock(lane, fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Hold the lane with others: for work that may be paused by a measurement."""
        self._enter()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            fcntl.flock(self._lane, fcntl.LOCK_UN)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the lane alone; a shared hold of this process is given up and taken again afterwards."""
        gate, lane = self._files()
        if self._depth:
            fcntl.flock(lane, fcntl.LOCK_UN)
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(lane, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(lane, fcntl.LOCK_UN)
            fcntl.flock(gate, fcntl.LOCK_UN)
            if self._depth:
                self._enter()

    def pause_point(self) -> None:
        """Let a waiting measurement pass; costs two system calls where none waits."""
        if not self._depth:
            return
        gate, lane = self._files()
        try:
            fcntl.flock(gate, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(lane, fcntl.LOCK_UN)
            self._enter()
        else:
            fcntl.flock(gate, fcntl.LOCK_UN)


LANE = _Lane()
pause_point = LANE.pause_point
