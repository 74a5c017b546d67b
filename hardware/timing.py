"""The loop that times: functions take turns, with a fixed piece of work between them that shows how fast the cores are.

Imports Python (3.9 or later) and NumPy alone, so that this file also runs by itself on another machine.

What counts as a sample:

- Not the warm-up, nor the first run of each turn, for which the caches hold what ran before. These are never stored.
- Not the rounds during which the cores were slow: a processor's clock changes, and a hypervisor moves the cores of its
  guest about, so that for seconds two of them share a physical core, or are so far apart that they share no cache.
  Before and after each round, a fixed piece of work tells: in a slow round it took `SLOW` times as long on any core as
  in the fastest round but one, or `SHARED` times as long as with the other cores at rest, or handing over data from
  core to core took `FAR` times as long. For each slow round another one is taken, after a short pause, up to `MORE`
  times the rounds asked for. If fewer than half as many as asked for are left, all count, and `doubts` tells.
- Every other run, however long it took: single slow runs hardly move a median. Latencies stay as they were measured;
  they are not corrected for drift.

The fixed work is timed by the processor time of its threads. So it does not show that a core is shared with other
processes, which `Load` tells, but that the core itself is slow.
"""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

SLOW, FAR = 1.1, 2.2
MORE = 2
PAUSE = 0.05  # seconds before a round is taken again; a hypervisor places idle cores anew when they wake up
# Shares beyond which a measurement is doubted; of a quiet machine, counted in ticks of 10 ms, half of these were seen.
BUSY, STOLEN, WAITED = 0.1, 0.02, 0.1
# How much longer work may take on all cores at once than on one, whose clock is higher then, before they count as one.
SHARED = 1.3
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
        clock: seconds of the fixed work in each round, on each core while all do it.
        handover: seconds in which each core reads what its neighbour wrote, in each round; none for a single core.
        load: what else the cores did.
        alone: as `clock`, while the other cores rest; [] where that tells nothing.
        known: the fastest `handover` of earlier measurements; [] if there was none.
        asked: number of rounds that were asked for.
    """

    samples: dict[str, list[list[float]]]
    clock: list[list[float]]
    handover: list[list[float]] = field(default_factory=list)
    load: Load = field(default_factory=lambda: Load(0.0))
    alone: list[float] = field(default_factory=list)
    known: list[float] = field(default_factory=list)
    asked: int = 0

    @property
    def slowness(self) -> np.ndarray:
        """For each round, how many times as long the fixed work took as in the fastest but one, on the worst core."""
        return _worst(self.clock, _fastest(self.clock))

    @property
    def distance(self) -> np.ndarray:
        """The same for handing over data, earlier measurements included."""
        return _worst(self.handover or [[]] * len(self.clock), self.fastest_handover)

    @property
    def sharing(self) -> np.ndarray:
        """For each round, how many times as long the fixed work took as with the other cores at rest, likewise."""
        return _worst(self.clock if self.alone else [[]] * len(self.clock), self.alone)

    @property
    def fastest_handover(self) -> list[float]:
        """The `handover` of the fastest round but one, or of earlier measurements where these were faster."""
        fastest = _fastest(self.handover)
        return [min(pair) for pair in zip(fastest, self.known)] if self.known else fastest  # noqa: B905  (Python 3.9)

    @property
    def good(self) -> list[int]:
        """Numbers of the rounds in which the cores were not slow."""
        chosen = (self.slowness <= SLOW) & (self.distance <= FAR) & (self.sharing <= SHARED)
        return np.flatnonzero(chosen).tolist()

    @property
    def rounds(self) -> list[int]:
        """Numbers of the rounds that count (see the module's text)."""
        good = self.good
        return good if good and 2 * len(good) >= self.asked else list(range(len(self.clock)))

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
        slow, far, shared = (values[self.rounds] for values in (self.slowness, self.distance, self.sharing))
        if np.max(slow) > SLOW:
            found.append(f"clock drifted {100 * (np.max(slow) - 1):.0f} %")
        if np.median(shared) > SHARED:
            found.append(f"cores slowed each other by {100 * (np.median(shared) - 1):.0f} %")
        if np.median(far) > FAR:
            found.append(f"cores far apart: handing over data took {np.median(far):.1f} times as long as at best")
        return tuple(found)

    def counted(self, name: str) -> list[float]:
        """The samples of a function that count, in the order in which they were taken."""
        taken = self.samples[name]
        return [seconds for number in self.rounds for seconds in taken[number]]


def timings_from(record: Mapping[str, Any]) -> Timings:
    """The opposite of `dataclasses.asdict`, for timings that come as JSON."""
    return Timings(**{**record, "load": Load(**record["load"])})


def time_runs(
    runs: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 10,
    repeats: int = 30,
    budget: float = 0.3,
    warm_up: float = 0.05,
    cores: Collection[int] = (),
    known: Sequence[float] = (),
) -> Timings:
    """Time functions in turns.

    Args:
        runs: by name; each call is one run.
        rounds: how often they take turns; rounds in which a core was slow are taken again.
        repeats: timed runs of each at least, over all rounds.
        budget: seconds for the timed runs of each; quick functions get more runs than `repeats` for it.
        warm_up: seconds that each runs before, five times at least.
        cores: that this process is pinned to: the fixed work runs on each of them, and what else they do is watched.
            Without, it runs wherever this thread is, and the load stays unknown.
        known: `Timings.fastest_handover` of earlier measurements on these cores.
    """
    counts = {}
    for name, run in runs.items():
        _warm_up(run, warm_up)
        pace = min(seconds_of(run) for _ in range(5))
        counts[name] = max(-(-repeats // rounds), min(MOST, int(budget / rounds / max(pace, 1e-9))))
    fixed = FixedWork()
    alone = [fixed.seconds([core])[0] for core in cores] if len(cores) > 1 and not _siblings(cores) else []
    found = Timings({name: [] for name in runs}, [], alone=alone, known=list(known), asked=rounds)
    watch = LoadWatch(cores)
    before = fixed.seconds(cores), fixed.handover(cores)
    while len(found.clock) < rounds or (len(found.good) < rounds and len(found.clock) < MORE * rounds):
        for name, run in runs.items():
            run()  # the others have had the caches
            found.samples[name].append([seconds_of(run) for _ in range(counts[name])])
        after = fixed.seconds(cores), fixed.handover(cores)
        found.clock.append(np.maximum(before[0], after[0]).tolist())
        found.handover.append(np.maximum(before[1], after[1]).tolist())
        before = after
        if len(found.good) < len(found.clock):
            # Whatever slows the cores may be over after a pause.
            time.sleep(PAUSE)
            fixed.seconds(cores)  # wakes the cores
            before = fixed.seconds(cores), fixed.handover(cores)
    return replace(found, load=watch.stop())


def _fastest(times: list[list[float]]) -> list[float]:
    """The fastest round's but one, for each core: a single time may be too short, by an error of the system."""
    return [sorted(column)[min(1, len(times) - 1)] for column in zip(*times)]  # noqa: B905  (Python 3.9)


def _worst(times: list[list[float]], fastest: list[float]) -> np.ndarray:
    """For each round, the largest ratio of its times to the fastest ones, at least 1."""
    ratios = np.array(times).reshape(len(times), -1) / np.array(fastest)
    return np.max(ratios, 1, initial=1.0)


def seconds_of(run: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class FixedWork:
    """About 0.1 ms of small matrix products: how long they take tells how fast a core is just now."""

    def __init__(self) -> None:
        # Each product is so small that no BLAS spreads it over threads; one call makes 16, without Python's lock.
        self._matrices = np.linspace(-1, 1, 16 * 64 * 64, dtype=np.float32).reshape(16, 64, 64)
        # A value from each of 4096 cache lines, in an order that no processor foresees.
        self._lines = np.zeros(4096 * 16, np.float32)
        self._order = np.random.default_rng(0).permutation(4096) * 16

    def seconds(self, cores: Collection[int] = ()) -> list[float]:
        """Processor time on each core while all do it, third quickest of 9; where this thread is, without cores."""
        times = [0.0] * max(1, len(cores))
        together = threading.Barrier(len(times))

        def work(number: int, core: int | None) -> None:
            if core is not None:
                os.sched_setaffinity(0, {core})  # of this thread alone
            product = np.matmul(self._matrices, self._matrices)
            together.wait()
            taken = []
            for _ in range(9):
                start = time.thread_time()
                np.matmul(self._matrices, self._matrices, out=product)
                taken.append(time.thread_time() - start)
            times[number] = sorted(taken)[2]  # at the ends, others may be done or not begun

        if not cores:
            work(0, None)
            return times
        threads = [threading.Thread(target=work, args=pair) for pair in enumerate(cores)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return times

    def handover(self, cores: Collection[int]) -> list[float]:
        """Processor time in which each core reads what the one before it wrote, quickest of 8; [] for a single core."""
        if len(cores) < 2:
            return []
        ring = list(cores)
        times: list[float] = []

        def work() -> None:
            values = np.empty(len(self._order), np.float32)
            for number, core in enumerate(ring):
                taken = []
                for _ in range(8):
                    os.sched_setaffinity(0, {ring[number - 1]})  # of this thread alone
                    np.add(self._lines, 1, out=self._lines)
                    os.sched_setaffinity(0, {core})
                    start = time.thread_time()
                    np.take(self._lines, self._order, out=values)
                    taken.append(time.thread_time() - start)
                times.append(min(taken))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return times


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


def _siblings(cores: Collection[int]) -> bool:
    """Whether the system says that some of these cores are threads of one physical core."""
    physical = []
    for core in cores:
        lines = _lines(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
        physical.append(lines[0] if lines else str(core))
    return len(set(physical)) < len(physical)


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
