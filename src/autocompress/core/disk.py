"""A disk or a database that takes no more: full, over its quota, or locked. No candidate is to blame for that."""

from __future__ import annotations

import errno
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import AutocompressError, DeviceLostError

FULL = (errno.ENOSPC, errno.EDQUOT)
ROOM = 1 << 20  # bytes; less than any model's file, and than what libraries leave after a write that failed


class StorageLostError(DeviceLostError):
    """The disk or the database takes no more; the search stops, and can go on once that is put right."""


def storage_trouble(error: BaseException, folder: Path | None = None) -> StorageLostError | None:
    """What `error` says of the disk or the database; None where it has another cause.

    Args:
        folder: where things were written. Libraries do not always say that the disk is full (OpenVINO:
            "basic_ios::clear: iostream error"; torch: "unexpected pos 640 vs 598"), so it is tried.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, StorageLostError):
            return cause
        told = _told(cause, folder)
        if told:
            return StorageLostError(told)
        cause = cause.__cause__
    return None if folder is None or _takes_more(folder) else StorageLostError(_full(folder))


@contextmanager
def blaming_storage(folder: Path) -> Iterator[None]:
    """Raise what comes from a full disk or a locked database, whatever it was, as StorageLostError."""
    try:
        yield
    except AutocompressError:
        raise
    except Exception as error:  # SQLAlchemy's, Optuna's, the system's
        trouble = storage_trouble(error, folder)
        if trouble is None:
            raise
        raise trouble from error


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Give a folder to write into, whose files then come to `folder`: whole, or, on a full disk, not at all."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as scratch:
        yield Path(scratch)
        for path in Path(scratch).iterdir():
            path.replace(folder / path.name)


def _told(error: BaseException, folder: Path | None) -> str:
    """The error in a user's words, where it names the trouble."""
    text = str(error)
    if isinstance(error, OSError) and error.errno in FULL:
        return _full(error.filename or folder)
    if "No space left on device" in text or "Disk quota exceeded" in text:
        return _full(folder)
    if "database or disk is full" in text:
        return "no space left for the study's database: make room"
    if "database is locked" in text:
        return "the study's database stayed locked by another process: end that one"
    return ""


def _full(place: Path | str | None) -> str:
    where = f" for {place}" if place else ""
    return f"no space left{where} on {socket.gethostname()}: make room"


def _takes_more(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(os.urandom(ROOM))  # no zeros: some file systems store none
    except OSError as error:
        return error.errno not in FULL
    return True
