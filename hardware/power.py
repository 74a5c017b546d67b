"""Energy and power of the processor: its own counters (RAPL) where Linux lets us read them, or a declared power.

RAPL counts the energy of whole packages, other work on them included, as `intel-rapl` zones under
`/sys/class/powercap`, for AMD's processors too. The counters move about every millisecond and wrap around after some
minutes. Since Linux 5.10 only root may read them, until `sudo chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj`.

Source: kernel documentation, power/powercap/powercap.rst.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import InputError

POWERCAP = Path("/sys/class/powercap")
_SETTLE = 0.02  # seconds until the spinning threads of a runtime are asleep


@dataclass(frozen=True)
class Package:
    """One processor package's energy counter.

    Attributes:
        folder: its powercap zone.
        wrap: joules after which the counter starts again at 0.
    """

    folder: Path
    wrap: float

    def joules(self) -> float:
        """What the counter shows."""
        return int((self.folder / "energy_uj").read_text()) / 1e6


def find_packages(root: Path = POWERCAP) -> tuple[Package, ...]:
    """The packages of this machine whose counters can be read; () if any of them can't, as the sum would be wrong.

    Their parts (cores, memory) are counted in them or stand beside them, and are not returned, nor is the whole
    platform ("psys").
    """
    found = []
    for folder in sorted(root.glob("intel-rapl:*")):
        try:
            # Zones are numbered; a second number is a part of a package.
            if folder.name.count(":") == 1 and (folder / "name").read_text().startswith("package"):
                package = Package(folder, int((folder / "max_energy_range_uj").read_text()) / 1e6)
                package.joules()
                found.append(package)
        except (OSError, ValueError):  # not allowed, or no number there
            return ()
    return tuple(found)


class EnergyCounter:
    """Sums the energy of packages from its creation on; ask it more often than the counters wrap around."""

    def __init__(self, packages: Sequence[Package]) -> None:
        self._packages = packages
        self._last = [package.joules() for package in packages]
        self._sum = 0.0

    def joules(self) -> float:
        """Energy since the creation, of all packages."""
        for number, package in enumerate(self._packages):
            now = package.joules()
            passed = now - self._last[number]
            self._sum += passed if passed >= 0 else passed + package.wrap
            self._last[number] = now
        return self._sum


def record_energy(
    run: Callable[[], object], packages: Sequence[Package], blocks: int = 10, seconds: float = 0.1
) -> dict[str, list[list[float]]]:
    """Run a function in blocks, with pauses between, and read the counters around each.

    Returns:
        "work": [joules, seconds, runs] of each block; "idle": [joules, seconds] of each pause. Blocks are long against
        the millisecond in which counters move, so that each is right within about 2 %.
    """
    counter = EnergyCounter(packages)
    found: dict[str, list[list[float]]] = {"work": [], "idle": []}
    for _ in range(blocks):
        time.sleep(_SETTLE)
        energy, start = counter.joules(), time.perf_counter()
        time.sleep(seconds / 2)
        found["idle"].append([counter.joules() - energy, time.perf_counter() - start])
        run()  # wakes the threads
        energy, start, runs = counter.joules(), time.perf_counter(), 0
        while time.perf_counter() < start + seconds:
            run()
            runs += 1
        found["work"].append([counter.joules() - energy, time.perf_counter() - start, runs])
    return found


def energy_figures(record: dict[str, Any]) -> dict[str, tuple[str, list[float]]]:
    """Unit and one value for each block, by name, of what `record_energy` returned.

    "energy" is all that the packages took for one run, "power" the same for a second of running, and "idle_power" what
    they take anyway: energy less idle power times latency is what the run itself added.
    """
    work, idle = record["work"], record["idle"]
    return {
        "energy": ("J", [joules / runs for joules, _, runs in work]),
        "power": ("W", [joules / seconds for joules, seconds, _ in work]),
        "idle_power": ("W", [joules / seconds for joules, seconds in idle]),
    }


def declared_watts(device: str) -> float:
    """Watts that a person declares for a target, as in "watts=15"; 0 for "".

    Raises:
        InputError: anything else, or no positive number.
    """
    if not device:
        return 0.0
    match = re.fullmatch(r"watts=(\d+(?:\.\d*)?|\.\d+)", device)
    watts = float(match[1]) if match else 0.0
    if not 0 < watts < math.inf:
        raise InputError(f"expected the power of the running processor, such as watts=15, got '{device}'")
    return watts
