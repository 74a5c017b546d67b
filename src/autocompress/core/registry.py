"""What can be named in a configuration: operators, spaces, backends and objectives.

Built-in ones register on import of their layer. Other packages add theirs through the entry-point
groups `autocompress.operators`, `autocompress.spaces`, `autocompress.backends` and
`autocompress.objectives`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Any, TypeVar

from .errors import InputError, unknown

T = TypeVar("T")


class Registry:
    """Names to objects, with those of installed entry points loaded at the first miss."""

    def __init__(self, kind: str, group: str) -> None:
        self.kind, self.group = kind, group
        self._entries: dict[str, Any] = {}
        self._loaded = False

    def add(self, name: str, entry: T) -> T:
        """Register `entry` under `name`; registering another object under a taken name is an error."""
        if self._entries.get(name, entry) is not entry:
            raise InputError(f"{self.kind} '{name}' is registered already")
        self._entries[name] = entry
        return entry

    def get(self, name: str, hint: str = "") -> Any:
        """Return the entry called `name`; raises InputError with the nearest name for an unknown one."""
        if name not in self._entries:
            self._load()
        if name not in self._entries:
            raise unknown(self.kind, name, self._entries, hint)
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._entries))

    def _load(self) -> None:
        if not self._loaded:
            self._loaded = True
            for point in entry_points(group=self.group):
                try:
                    self.add(point.name, point.load())
                except Exception as error:  # another package's code may raise anything while it is imported
                    raise InputError(
                        f"{self.kind} '{point.name}': loading {point.value} failed: {type(error).__name__}: {error}"
                    ) from error


OPERATORS = Registry("operator", "autocompress.operators")
SPACES = Registry("space", "autocompress.spaces")
BACKENDS = Registry("target", "autocompress.backends")
OBJECTIVES = Registry("objective", "autocompress.objectives")


def operator(kind: type[T]) -> type[T]:
    """Class decorator: register an operator under its class name, the name that plans are stored with."""
    return OPERATORS.add(kind.__name__, kind)


def backend(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: register a function that makes the backend called `name`."""
    return lambda make: BACKENDS.add(name, make)
