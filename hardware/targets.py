"""Every target by its name: `family/runtime`, or `family/runtime:device` where one of several devices is meant."""

from __future__ import annotations

from ..core.errors import InputError, MissingDependencyError
from ..core.registry import BACKENDS
from ..core.types import Backend
from . import agent as _agent  # noqa: F401  (registers its targets)
from . import boards as _boards  # noqa: F401
from . import ethos_u as _ethos_u  # noqa: F401
from . import fpga as _fpga  # noqa: F401
from . import gpu as _gpu  # noqa: F401
from . import lookup_backend as _lookup  # noqa: F401
from . import qemu as _qemu  # noqa: F401
from . import tpu as _tpu  # noqa: F401
from . import tvm as _tvm  # noqa: F401
from . import x86 as _x86  # noqa: F401
from . import xla_tpu as _xla_tpu  # noqa: F401

# Names that stand for no device until one is named behind a colon.
NEED_A_DEVICE = ("arm/agent", "arm/board", "x86/board", "gpu/board", "lookup")


def find_backend(target: str, threads: int = 0) -> Backend:
    """The backend called `target`, whether or not it can be used here.

    Args:
        target: such as "x86/openvino"; what follows a colon says which device ("arm/agent:pi@kitchen").
        threads: cores that a measurement on this machine is pinned to; 0 for all.

    Raises:
        InputError: no such target, or it takes no device.
    """
    name, colon, device = target.partition(":")
    make = BACKENDS.get(name, "See `autocompress hardware list`.")
    if not colon:
        return make(threads=threads)
    try:
        return make(threads=threads, device=device)
    except TypeError as error:
        raise InputError(f"target {name} takes no device; got '{target}'") from error


def make_backend(target: str, threads: int = 0) -> Backend:
    """The backend called `target`, ready to use.

    Raises:
        InputError: no such target, or more threads than cores.
        MissingDependencyError: the target can't be used here; says how to get it.
    """
    backend = find_backend(target, threads)
    missing = backend.missing()
    if missing:
        raise MissingDependencyError(missing)
    getattr(backend, "cores", None)  # reading it checks the number of threads
    return backend
