"""Energy and clocks of NVIDIA GPUs, by NVML.

The energy counter (Volta and later) is read before and after a block of runs; older devices' power readings are
integrated instead. What the device takes when idle is measured beforehand and reported, not subtracted silently.

Source: NVML API reference, nvmlDeviceGetTotalEnergyConsumption (mJ), nvmlDeviceGetPowerUsage (mW).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

BLOCKS, SECONDS = 5, 2.0  # the counter moves every 20 to 100 ms: two seconds make that at most 5 %
IDLE_SECONDS = 1.0
STEADY, PATIENCE = 0.01, 10.0  # clocks count as steady when two readings differ by less; seconds to wait for that
SAMPLING = 0.02  # seconds between readings where power is integrated


def record_energy(
    nvml: Any, handle: Any, run: Callable[[], object], blocks: int = BLOCKS, seconds: float = SECONDS
) -> dict[str, Any]:
    """Run a function in blocks and read the device's energy around each; the clocks are steady by then.

    Args:
        nvml: the module `pynvml`, initialised.
        handle: of the device.

    Returns:
        "idle": watts before the runs; "work": [joules, seconds, runs] of each block; "counter": whether the device
        counts energy itself; "clock": MHz at the end; "steady": whether it had stopped changing.
    """
    counter = _counts(nvml, handle)
    time.sleep(0.2)
    idle, idle_seconds, _ = _block(nvml, handle, counter, lambda: time.sleep(SAMPLING), IDLE_SECONDS)
    steady = warm_up(nvml, handle, run)
    work = [list(_block(nvml, handle, counter, run, seconds)) for _ in range(blocks)]
    clock = nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)
    return {"idle": idle / idle_seconds, "work": work, "counter": counter, "clock": clock, "steady": steady}


def warm_up(nvml: Any, handle: Any, run: Callable[[], object], patience: float = PATIENCE) -> bool:
    """Run until the device's clock has stopped changing; False where it has not within `patience` seconds."""
    end = time.perf_counter() + patience
    last = 0.0
    while time.perf_counter() < end:
        stop = time.perf_counter() + 0.5
        while time.perf_counter() < stop:
            run()
        now = float(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM))
        if last and abs(now - last) <= STEADY * last:
            return True
        last = now
    return False


def _counts(nvml: Any, handle: Any) -> bool:
    try:
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except nvml.NVMLError:  # not supported before Volta, nor on some vGPUs
        return False
    return True


def _block(
    nvml: Any, handle: Any, counter: bool, run: Callable[[], object], seconds: float
) -> tuple[float, float, int]:
    """Joules, seconds and runs of one block."""
    start = time.perf_counter()
    runs, joules = 0, 0.0
    before = nvml.nvmlDeviceGetTotalEnergyConsumption(handle) if counter else 0
    last, read = start, 0.0
    while (now := time.perf_counter()) < start + seconds:
        if not counter and now - read >= SAMPLING:
            joules += nvml.nvmlDeviceGetPowerUsage(handle) / 1e3 * (now - last)
            last = read = now
        run()
        runs += 1
    end = time.perf_counter()
    if counter:
        joules = (nvml.nvmlDeviceGetTotalEnergyConsumption(handle) - before) / 1e3
    else:
        joules += nvml.nvmlDeviceGetPowerUsage(handle) / 1e3 * (end - last)
    return joules, end - start, runs
