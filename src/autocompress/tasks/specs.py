"""Objects named by the user as `module.path:callable`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any, TypeVar

from ..core.errors import AutocompressError, InputError

T = TypeVar("T")


def import_object(spec: str, kind: str) -> Any:
    """Import what `spec` ("module.path:name") names; the working folder counts as importable.

    Raises:
        InputError: no such module or name, or the module fails while it is imported.
    """
    module_name, _, attribute = spec.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise InputError(f"{kind} '{spec}': no module named '{error.name}'") from error
    except Exception as error:  # the user's own module may raise anything while it is imported
        raise InputError(f"{kind} '{spec}': importing it failed: {type(error).__name__}: {error}") from error
    if not hasattr(module, attribute):
        raise InputError(f"{kind} '{spec}': module '{module_name}' has no '{attribute}'")
    made = getattr(module, attribute)
    if not callable(made):
        raise InputError(f"{kind} '{spec}': '{attribute}' is not callable")
    return made


def _full_name(kind: type) -> str:
    package = kind.__module__.partition(".")[0]
    name = f"{package}.nn.{kind.__name__}" if package == "torch" else f"{package}.{kind.__name__}"
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def call_object(spec: str, kind: str, expected: type[T]) -> T:
    """Call what `spec` names without arguments; raises InputError if it fails or returns another type."""
    function = import_object(spec, kind)
    try:
        made = function()
    except AutocompressError:
        raise
    except Exception as error:  # the user's own code may raise anything
        raise InputError(f"{kind} '{spec}' failed: {type(error).__name__}: {error}") from error
    if not isinstance(made, expected):
        raise InputError(f"{kind} '{spec}' must return {_full_name(expected)}, not {type(made).__name__}")
    return made
