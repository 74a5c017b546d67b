"""The errors that people meet; each says what was expected, what came and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AutocompressError(Exception):
    """Root of all errors raised on purpose by this package."""


class InputError(AutocompressError, ValueError):
    """A value given by the user (flag, file, spec, constraint) can't be used."""


class MissingDependencyError(AutocompressError, ImportError):
    """A package or device that the request needs is not here."""


class DeviceLostError(MissingDependencyError):
    """A device went away while it was in use; the search stops, and can go on once it is back."""


class CandidateError(AutocompressError, RuntimeError):
    """One candidate can't be built, trained or measured; the search records the reason and goes on."""


def unknown(kind: str, name: str, known: Iterable[str], hint: str = "") -> InputError:
    """Build the error for a name that is not among the known ones, with the nearest match first.

    Args:
        kind: what the name stands for ("model", "target", ...).
        name: what came.
        known: the names that would have been accepted.
        hint: a closing sentence on what else is possible.
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    guess = f" Did you mean '{close[0]}'?" if close else ""
    return InputError(
        f"unknown {kind} '{name}': expected one of {', '.join(names)}.{guess}{' ' + hint if hint else ''}"
    )
