"""The loop that times: functions take turns, with a fixed piece of work between them that shows how fast the cores are.

Imports Python (3.9 or later) and NumPy alone, so that this file also runs by itself on another machine.

What counts as a sample:

- Not the warm-up, nor the first run of each turn, for which the caches hold what ran before. These are never stored.
- Not the rounds during which a core was slow: a processor's clock changes, and another virtual machine may share a
  physical core. Slow is a round in which the fixed work on any of the cores took `SLOW` times as long as in the fastest
  quarter of the rounds; if fewer than half of the rounds are left, all count, and `drift` tells.
- Every other run, however long it took: single slow runs hardly move a median. Latencies stay as they were measured;
  they are not corrected for drift.

The fixed work is timed by the processor time of its thread. So it does not show that a core is shared with other
processes, which `Load` tells, but that the core itself is slow.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

SLOW = 1.05
# Shares beyond which a measurement is doubted; of a quiet machine, counted in ticks of 10 ms, half of these were seen.
BUSY, STOLEN, WAITED = 0.1, 0.02, 0.05
MOST = 100  # runs of one function in one round


@dataclass(frozen=True)
class Load:
    """What else the cores did during a measurement, as shares of time; None where the system does not tell.

    Attributes:
        seconds: how long the measurement took.
        others: of the cores' time, what other processes and the system took.
        stolen: of the cores' time, what the hypervisor gave to other virtual machines; many do not tell.
        waited: of the time in which this process's threads wanted to run, what they waited for a core.
        pressure: of the time, how long any thread of this machine waited for a core.
        preempted: how often the timing thread lost its core.
    """

    seconds: float
    others: float | None = None
    stolen: float | None = None
    waited: float | None = None
    pressure: float | None = None
    preempted: int | None = None


@dataclass(frozen=True)
class Timings:
    """What `time_runs` found.

    Attributes:
        samples: seconds of each run, by name and round.
        clock: seconds of the fixed work in each round, on each core.
    """

    samples: dict[str, list[list[float]]]
    clock: list[list[float]]
    load: Load = field(default_factory=lambda: Load(0.0))

    @property
    def slowness(self) -> list[float]:
        """For each round, how much longer the fixed work took than in the fastest quarter, on the worst core."""
        clock = np.array(self.clock)
        fastest = np.median(np.sort(clock, 0)[: max(1, len(clock) // 4)], 0)
        return (np.max(clock / fastest, 1) - 1).tolist()

    @property
    def steady(self) -> list[int]:
        """Numbers of the rounds that count (see the module's text)."""
        chosen = [number for number, share in enumerate(self.slowness) if share <= SLOW - 1]
        return chosen if 2 * len(chosen) >= len(self.clock) else list(range(len(self.clock)))

    @property
    def drift(self) -> float:
        """The largest slowness among the rounds that count."""
        slowness = self.slowness
        return max(0.0, *(slowness[number] for number in self.steady))

    @property
    def doubts(self) -> tuple[str, ...]:
        """What speaks against these figures, a few words each; () for a quiet machine."""
        others, stolen, waited = self.load.others or 0.0, self.load.stolen or 0.0, self.load.waited or 0.0
        found = []
        if others > BUSY:
            found.append(f"busy machine: other work took {100 * others:.0f} % of the cores")
        elif waited > WAITED:
            found.append(f"busy machine: waited for a core {100 * waited:.0f} % of the time")
        if stolen > STOLEN:
            found.append(f"busy host: other virtual machines took {100 * stolen:.0f} % of the cores")
        if self.drift > SLOW - 1:
            found.append(f"clock drifted {100 * self.drift:.0f} %")
        return tuple(found)

    def counted(self, name: str) -> list[float]:
        """The samples of a function that count, in the order in which they were taken."""
        rounds = self.samples[name]
        return [seconds for number in self.steady for seconds in rounds[number]]


def timings_from(record: Mapping[str, Any]) -> Timings:
    """The opposite of `dataclasses.asdict`, for timings that come as JSON."""
    return Timings(record["samples"], record["clock"], Load(**record["load"]))


def time_runs(
    runs: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 10,
    repeats: int = 30,
    budget: float = 0.3,
    warm_up: float = 0.05,
    cores: Collection[int] = (),
) -> Timings:
    """Time functions in turns.

    Args:
        runs: by name; each call is one run.
        rounds: how often they take turns.
        repeats: timed runs of each at least, over all rounds.
        budget: seconds for the timed runs of each; quick functions get more runs than `repeats` for it.
        warm_up: seconds that each runs before, five times at least.
        cores: that this process is pinned to: the fixed work runs on each of them, and what else they do is watched.
            Without, it runs wherever this thread is, and the load stays unknown.
    """
    counts = {}
    for name, run in runs.items():
        _warm_up(run, warm_up)
        pace = min(seconds_of(run) for _ in range(5))
        counts[name] = max(-(-repeats // rounds), min(MOST, int(budget / rounds / max(pace, 1e-9))))
    fixed = FixedWork()
    fixed.seconds(cores)
    samples: dict[str, list[list[float]]] = {name: [] for name in runs}
    clock = []
    watch = LoadWatch(cores)
    for _ in range(rounds):
        clock.append(fixed.seconds(cores))
        for name, run in runs.items():
            run()  # the others have had the caches
            samples[name].append([seconds_of(run) for _ in range(counts[name])])
    return Timings(samples, clock, watch.stop())


def seconds_of(run: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class FixedWork:
    """About 0.1 ms of small matrix products: how long they take tells how fast a core is just now."""

    def __init__(self) -> None:
        # So small that no BLAS spreads it over threads.
        self._matrix = np.linspace(-1, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
        self._product = np.empty_like(self._matrix)

    def __call__(self) -> None:
        for _ in range(16):
            np.matmul(self._matrix, self._matrix, out=self._product)

    def seconds(self, cores: Collection[int] = ()) -> list[float]:
        """Processor time on each core, the quickest of five calls; where this thread is, if no cores are given."""
        if not cores:
            return [self._quickest()]
        allowed = os.sched_getaffinity(0)
        found = []
        # The first core last, where a single thread then stays.
        for core in sorted(cores, reverse=True):
            os.sched_setaffinity(0, {core})  # of this thread alone
            found.append(self._quickest())
        os.sched_setaffinity(0, allowed)
        return found[::-1]

    def _quickest(self) -> float:
        self()
        times = []
        for _ in range(5):
            start = time.thread_time()
            self()
            times.append(time.thread_time() - start)
        return min(times)


class LoadWatch:
    """Counts what the cores do from now on until `stop`."""

    def __init__(self, cores: Collection[int]) -> None:
        self._cores = cores
        self._before = self._read()

    def stop(self) -> Load:
        """What they did."""
        before, now = self._before, self._read()
        change = {
            name: None if value is None or before[name] is None else value - before[name] for name, value in now.items()
        }
        seconds = change["seconds"] or 1e-9
        total = seconds * max(1, len(self._cores))
        busy, own, waited, ran = change["busy"], change["own"], change["waited"], change["ran"]
        stolen, pressure, preempted = change["stolen"], change["pressure"], change["preempted"]
        return Load(
            seconds,
            others=None if busy is None or own is None else min(1.0, max(0.0, busy - own) / total),
            stolen=None if stolen is None else stolen / total,
            waited=None if waited is None or ran is None else waited / max(waited + ran, 1e-9),
            pressure=None if pressure is None else pressure / seconds,
            preempted=None if preempted is None else int(preempted),
        )

    def _read(self) -> dict[str, Any]:
        usage = resource.getrusage(resource.RUSAGE_THREAD)
        busy, stolen = _core_seconds(self._cores)
        ran, waited = _thread_seconds()
        return {
            "seconds": time.perf_counter(),
            "own": time.process_time(),
            "busy": busy,
            "stolen": stolen,
            "ran": ran,
            "waited": waited,
            "pressure": _pressure_seconds(),
            "preempted": usage.ru_nivcsw,
        }


def _core_seconds(cores: Collection[int]) -> tuple[float | None, float | None]:
    """Seconds since the start of the system that these cores computed for anybody, and that were stolen from them."""
    lines = _lines("/proc/stat")
    tick = os.sysconf("SC_CLK_TCK")
    busy = stolen = 0.0
    found = 0
    for line in lines:
        name, *fields = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in cores:
            user, nice, system, _idle, _wait, irq, softirq, steal = (int(field) / tick for field in fields[:8])
            busy += user + nice + system + irq + softirq
            stolen += steal
            found += 1
    return (busy, stolen) if found else (None, None)


def _thread_seconds() -> tuple[float | None, float | None]:
    """Seconds that this process's threads have run, and that they were ready to run and had no core."""
    ran = waited = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        for line in _lines(path):
            fields = line.split()
            ran += int(fields[0])
            waited += int(fields[1])
    return (ran / 1e9, waited / 1e9) if ran else (None, None)


def _pressure_seconds() -> float | None:
    for line in _lines("/proc/pressure/cpu"):
        if line.startswith("some"):
            return int(line.rpartition("total=")[2]) / 1e6
    return None


def _lines(path: str | Path) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:  # not on every system, and not for everybody
        return []


def _warm_up(run: Callable[[], object], seconds: float) -> None:
    """At least 5 runs and `seconds`, so that clocks and caches settle."""
    end = time.perf_counter() + seconds
    count = 0
    while count < 5 or time.perf_counter() < end:
        run()
        count += 1
