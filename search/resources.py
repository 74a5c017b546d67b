"""What one worker needs: parsed, given to Ray, and compared with what a cluster's nodes have."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import InputError

_BYTES = {"": 1, "B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_EXPECTED = "expected such as cpu=2,gpu=0.5,mem=2GB"


@dataclass(frozen=True)
class Resources:
    """What Ray reserves for each worker.

    Attributes:
        cpu: cores; also the threads that training uses.
        gpu: graphics cards; parts of one are allowed.
        memory: bytes; 0 for no reservation.
        other: a cluster's own resources, by name (`ray start --resources`).
    """

    cpu: float = 1.0
    gpu: float = 0.0
    memory: int = 0
    other: Mapping[str, float] = field(default_factory=dict)

    @property
    def threads(self) -> int:
        """Threads for training."""
        return max(1, int(self.cpu))

    def options(self) -> dict[str, Any]:
        """Keyword arguments of Ray's `options`."""
        asked: dict[str, Any] = {"num_cpus": self.cpu, "resources": dict(self.other)}
        asked |= {"num_gpus": self.gpu} if self.gpu else {}
        return asked | ({"memory": self.memory} if self.memory else {})

    def count(self, has: Mapping[str, float]) -> int:
        """Workers that fit into what a node has, by Ray's names."""
        wanted = {"CPU": self.cpu, "GPU": self.gpu, "memory": float(self.memory), **self.other}
        # A hair more: sums of fractions such as 0.1 are not exact.
        return min(int(has.get(name, 0.0) / amount + 1e-6) for name, amount in wanted.items() if amount)

    def __str__(self) -> str:
        parts = {"cpu": f"{self.cpu:g}", "gpu": f"{self.gpu:g}" if self.gpu else ""}
        parts |= {"mem": show_bytes(self.memory) if self.memory else ""}
        parts |= {name: f"{amount:g}" for name, amount in self.other.items()}
        return ",".join(f"{name}={amount}" for name, amount in parts.items() if amount)


def parse_resources(text: str) -> Resources:
    """Read "cpu=2,gpu=0.5,mem=2GB"; other names are resources of the cluster's own.

    Raises:
        InputError: it can't be read, or asks for nothing, or Ray could not give it.
    """
    found: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", value)
        units = _BYTES if name == "mem" else {"": 1}
        if not equals or not re.fullmatch(r"[\w.-]+", name) or match is None or match[2] not in units:
            raise InputError(f"can't read '{part}': {_EXPECTED}")
        if name in found:
            raise InputError(f"{name} is given twice")
        if float(match[1]) == 0:
            raise InputError(f"{name}=0 asks for nothing; leave it out")
        found[name] = float(match[1]) * units[match[2]]
    for name, amount in found.items():
        if name != "mem" and amount > 1 and amount != int(amount):
            raise InputError(f"{name}={amount:g}: above 1, whole numbers only")
    cpu, gpu, memory = found.pop("cpu", 1.0), found.pop("gpu", 0.0), int(found.pop("mem", 0.0))
    if 0 < memory < 2**20:
        raise InputError(f"mem={memory} is less than a megabyte; {_EXPECTED}")
    return Resources(cpu, gpu, memory, found)


def show_bytes(amount: float) -> str:
    """Bytes in gigabytes or megabytes, as `parse_resources` reads them."""
    return f"{amount / 1e9:.4g}GB" if amount >= 1e9 else f"{amount / 1e6:.4g}MB"


def describe_nodes(nodes: Iterable[Mapping[str, float]], asked: Resources) -> str:
    """What nodes have of what is asked for: "2 x cpu=4,mem=8GB; 1 x cpu=0"."""
    counts: dict[str, int] = {}
    for has in nodes:
        parts = [f"cpu={has.get('CPU', 0):g}"]
        parts += [f"gpu={has.get('GPU', 0):g}"] if asked.gpu else []
        parts += [f"mem={show_bytes(has.get('memory', 0))}"] if asked.memory else []
        parts += [f"{name}={has.get(name, 0):g}" for name in asked.other]
        shown = ",".join(parts)
        counts[shown] = counts.get(shown, 0) + 1
    return "; ".join(f"{count} x {shown}" for shown, count in counts.items()) or "none"
