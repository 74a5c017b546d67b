"""What a board is and how it is doing: processor, clocks, governor, temperature, throttling.

Imports Python alone, so that this file also runs by itself on the board (Python 3.9 or later).
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

# "CPU part" in /proc/cpuinfo of cores that Arm designed: https://developer.arm.com/documentation (MIDR_EL1).
CORES = {
    "0xd03": "Cortex-A53", "0xd04": "Cortex-A35", "0xd05": "Cortex-A55", "0xd07": "Cortex-A57",
    "0xd08": "Cortex-A72", "0xd09": "Cortex-A73", "0xd0a": "Cortex-A75", "0xd0b": "Cortex-A76",
    "0xd0c": "Neoverse-N1", "0xd0d": "Cortex-A77", "0xd40": "Neoverse-V1", "0xd41": "Cortex-A78",
    "0xd42": "Cortex-A78AE", "0xd44": "Cortex-X1", "0xd46": "Cortex-A510", "0xd47": "Cortex-A710",
    "0xd48": "Cortex-X2", "0xd49": "Neoverse-N2", "0xd4b": "Cortex-A78C", "0xd4d": "Cortex-A715",
    "0xd4f": "Neoverse-V2", "0xd80": "Cortex-A520", "0xd81": "Cortex-A720", "0xd82": "Cortex-X4",
}  # fmt: skip
# Bits of what a Raspberry Pi's firmware tells of this moment.
PI_THROTTLING = {1: "under-voltage", 2: "clock capped", 4: "throttled", 8: "soft temperature limit"}


def board_name(root: Path = Path("/")) -> str:
    """The board's and the processor's model, such as "Raspberry Pi 4 Model B Rev 1.4, Cortex-A72"."""
    entries = _cpuinfo(root)
    cores = sorted({CORES.get(entry.get("CPU part", ""), "") for entry in entries} - {""})
    models = sorted({entry.get("model name", "") for entry in entries} - {""})
    parts = [_text(root / "proc/device-tree/model").strip("\0\n "), "+".join(cores) or "+".join(models)]
    return ", ".join(part for part in parts if part) or platform.processor() or platform.machine()


def fastest_cores(threads: int, root: Path = Path("/")) -> list[int]:
    """The cores that a measurement is pinned to: those with the highest clock first; 0 for all of the fastest kind."""
    usable = sorted(os.sched_getaffinity(0))
    clocks = {core: _number(_cpufreq(root, core) / "cpuinfo_max_freq") or 0 for core in usable}
    if not threads:
        return [core for core in usable if clocks[core] == max(clocks.values())]
    return sorted(sorted(usable, key=lambda core: (-clocks[core], core))[:threads])


def board_state(cores: list[int], root: Path = Path("/")) -> dict[str, Any]:
    """How the board is doing now.

    Returns:
        governors: of the cores, each named once; [] where the system does not tell.
        clocks: of the cores in Hz, those that are known.
        celsius: the hottest sensor; None where there is none.
        throttling: why the board computes slower than it could, a few words each.
    """
    governors = {_text(_cpufreq(root, core) / "scaling_governor").strip() for core in cores} - {""}
    clocks = [_number(_cpufreq(root, core) / "scaling_cur_freq") for core in cores]
    zones = [_number(path) for path in sorted((root / "sys/class/thermal").glob("thermal_zone*/temp"))]
    return {
        "governors": sorted(governors),
        "clocks": [clock * 1000 for clock in clocks if clock is not None],
        "celsius": max((zone / 1000 for zone in zones if zone is not None), default=None),
        "throttling": _throttling(root),
    }


def _throttling(root: Path) -> list[str]:
    found = []
    for folder in sorted((root / "sys/class/thermal").glob("cooling_device*")):
        kind = _text(folder / "type").strip()
        if ("cpufreq" in kind or kind == "Processor") and (_number(folder / "cur_state") or 0) > 0:
            found.append("throttled")
    for path in sorted((root / "sys/devices/platform").glob("soc*/soc*firmware/get_throttled")):
        found += _pi_throttling(_text(path))
    if not found and root == Path("/") and shutil.which("vcgencmd"):
        done = subprocess.run(["vcgencmd", "get_throttled"], stdout=subprocess.PIPE, timeout=10, check=False)
        found += _pi_throttling(done.stdout.decode(errors="replace").partition("=")[2])
    return sorted(set(found))


def _pi_throttling(text: str) -> list[str]:
    try:
        bits = int(text.strip(), 16)
    except ValueError:
        return []
    return [name for bit, name in PI_THROTTLING.items() if bits & bit]


def _cpufreq(root: Path, core: int) -> Path:
    return root / f"sys/devices/system/cpu/cpu{core}/cpufreq"


def _cpuinfo(root: Path) -> list[dict[str, str]]:
    """One dict a core, by key; [] where the system does not tell."""
    entries: list[dict[str, str]] = [{}]
    for line in _text(root / "proc/cpuinfo").splitlines():
        key, colon, value = line.partition(":")
        if colon:
            entries[-1][key.strip()] = value.strip()
        elif not line.strip():
            entries.append({})
    return [entry for entry in entries if entry]


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.lstrip("-").isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # not on every system, and sensors that are switched off can't be read
        return ""
