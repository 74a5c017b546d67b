"""How latencies are measured: turns, rounds that count, other work on the cores, and what is doubted."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import autocompress.hardware.timing
from autocompress import Task
from autocompress.core.types import Artifact
from autocompress.hardware.timing import FixedWork, Load, Timings, time_runs, timings_from
from autocompress.hardware.x86 import CpuBackend

ROOT = Path(__file__).parents[1]
STEADY = [[1e-4, 1e-4]] * 10


@contextmanager
def busy(cores: list[int]) -> Iterator[None]:
    """Keep these cores busy, two processes each."""
    code = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nprint(flush=True)\nwhile True: pass"
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(core)], stdout=subprocess.PIPE)
        for core in cores
        for _ in "ab"
    ]
    try:
        for process in started:
            assert process.stdout is not None
            process.stdout.readline()
        yield
    finally:
        for process in started:
            process.kill()
            process.communicate()


def test_functions_take_turns_and_the_first_run_of_a_turn_does_not_count() -> None:
    calls: list[str] = []
    timings = time_runs(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=4, repeats=20, budget=0, warm_up=0
    )
    assert {name: [len(one) for one in rounds] for name, rounds in timings.samples.items()} == {
        "a": [5] * 4, "b": [5] * 4,
    }  # fmt: skip
    turn = ["a"] * 6 + ["b"] * 6
    assert calls[-48:] == turn * 4
    assert len(timings.clock) == 4
    assert timings.load.others is None, "without cores nobody knows"


def test_quick_functions_get_more_runs() -> None:
    timings = time_runs({"quick": lambda: None}, rounds=3, repeats=3, budget=0.01, warm_up=0)
    assert min(len(one) for one in timings.samples["quick"]) > 10


def test_rounds_in_which_a_core_was_slow_do_not_count() -> None:
    samples = {"latency": [[float(number)] * 3 for number in range(10)]}
    clock = [[1e-4, 2e-4] for _ in range(10)]
    clock[2] = [1.2e-4, 2e-4]
    clock[7] = [1e-4, 2.3e-4]
    timings = Timings(samples, clock, asked=10)
    assert timings.good == timings.rounds == [0, 1, 3, 4, 5, 6, 8, 9]
    assert timings.counted("latency") == [float(n) for n in (0, 1, 3, 4, 5, 6, 8, 9) for _ in range(3)]
    assert timings.doubts == (), "what is left is steady"


def test_where_most_rounds_were_slow_all_count_and_the_drift_is_told() -> None:
    clock = [[1e-4]] * 4 + [[1.18e-4]] * 6
    timings = Timings({"latency": [[1.0]] * 10}, clock, asked=10)
    assert len(timings.counted("latency")) == 10
    assert timings.doubts == ("clock drifted 18 %",)


def test_cores_that_are_one_to_the_host_are_told() -> None:
    samples = {"latency": [[2.0]] * 20}
    shared = Timings(samples, [[1.9e-4, 1.94e-4]] * 20, alone=[1e-4, 1e-4], asked=10)
    assert shared.doubts == ("cores slowed each other by 94 %",)
    apart = Timings(samples, [[1.9e-4, 1.94e-4]] * 12 + [[1.1e-4, 1e-4]] * 8, alone=[1e-4, 1e-4], asked=10)
    assert apart.rounds == list(range(12, 20)), "for a while they were not"
    assert apart.doubts == (), "a clock that is a little lower when all cores work is no reason to doubt"


def test_cores_that_the_host_moves_apart_are_told() -> None:
    samples, near, far = {"latency": [[2.0]] * 20}, [11e-6, 12e-6], [35e-6, 36e-6]
    some = Timings(samples, [[1e-4, 1e-4]] * 20, [far] * 10 + [near] * 10, asked=10)
    assert (some.rounds, some.doubts) == (list(range(10, 20)), ())
    always = Timings(samples, [[1e-4, 1e-4]] * 20, [far] * 20, asked=10)
    assert always.doubts == (), "nobody knows that they have been nearer"
    known = Timings(samples, [[1e-4, 1e-4]] * 20, [far] * 20, known=near, asked=10)
    assert known.doubts == ("cores far apart: handing over data took 3.2 times as long as at best",)
    assert always.fastest_handover == far
    assert known.fastest_handover == near


@pytest.mark.parametrize(
    ("load", "doubts"),
    [
        (Load(1.0), ()),
        (Load(1.0, others=0.05, stolen=0.0, waited=0.04, pressure=0.3, preempted=4), ()),
        (Load(1.0, others=0.31, waited=0.4), ("busy machine: other work took 31 % of the cores",)),
        (Load(1.0, others=0.02, waited=0.12), ("busy machine: waited for a core 12 % of the time",)),
        (Load(1.0, stolen=0.25), ("busy host: other virtual machines took 25 % of the cores",)),
    ],
    ids=["unknown", "quiet", "others", "waited", "stolen"],
)
def test_a_busy_machine_is_told(load: Load, doubts: tuple[str, ...]) -> None:
    assert Timings({"latency": [[1.0]] * 10}, STEADY, load=load, asked=10).doubts == doubts


def test_timings_survive_json() -> None:
    timings = time_runs({"a": lambda: None}, rounds=2, repeats=4, budget=0, warm_up=0, cores=os.sched_getaffinity(0))
    assert timings_from(json.loads(json.dumps(dataclasses.asdict(timings)))) == timings


def test_the_loop_runs_on_machines_without_the_package() -> None:
    path = autocompress.hardware.timing.__file__
    code = (
        f"import runpy, sys; loop = runpy.run_path({str(path)!r})['time_runs']; loop({{'a': lambda: None}}, warm_up=0)"
    )
    code += "; assert not {'torch', 'autocompress', 'scipy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_fixed_work_visits_each_core_and_comes_back() -> None:
    cores = sorted(os.sched_getaffinity(0))
    seconds = FixedWork().seconds(cores)
    assert len(seconds) == len(cores)
    assert all(0 < one < 0.05 for one in seconds)
    assert sorted(os.sched_getaffinity(0)) == cores
    handover = FixedWork().handover(cores)
    assert len(handover) == (len(cores) if len(cores) > 1 else 0)
    assert all(0 < one < 0.05 for one in handover)
    assert FixedWork().handover(cores[:1]) == []


SPIN = """
import os, sys, time
core = int(sys.argv[1])
os.sched_setaffinity(0, {core})
from autocompress.hardware.timing import LoadWatch
watch, own = LoadWatch([core]), time.process_time()
end = time.perf_counter() + 0.6
while time.perf_counter() < end: pass
load, own = watch.stop(), time.process_time() - own
print(load.others, load.waited, load.preempted, own / load.seconds)
"""


def test_work_of_others_is_told_from_own_work() -> None:
    core = sorted(os.sched_getaffinity(0))[-1]
    with busy([core]):
        done = subprocess.run([sys.executable, "-c", SPIN, str(core)], capture_output=True, text=True, check=True)
    others, waited, preempted, own = map(float, done.stdout.split())
    assert others > 0.5, "two of the three processes on the core"
    assert others + own == pytest.approx(1, abs=0.1), "the core was never idle"
    assert waited == pytest.approx(others, abs=0.1)
    assert preempted > 5


@pytest.fixture(scope="module")
def artifact(digits_task: Task, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The digits model as both runtimes take it."""
    return CpuBackend("onnxruntime").build(digits_task.build(), digits_task, tmp_path_factory.mktemp("file"))


def test_a_measurement_on_busy_cores_is_flagged(digits_task: Task, artifact: Artifact) -> None:
    backend = CpuBackend("onnxruntime", threads=1, attempts=1)
    with busy(backend.cores):
        found = {m.name: m for m in backend.measure(artifact, digits_task, artifact)}
    for name in ("latency", "reference_latency", "throughput"):
        assert any(flag.startswith("busy machine: other work took") for flag in found[name].provenance.flags), name
    assert found["memory"].provenance.flags == (), "bytes do not depend on what else runs"


def test_an_interval_wider_than_asked_is_measured_again_and_then_flagged(digits_task: Task, artifact: Artifact) -> None:
    backend = CpuBackend("onnxruntime", threads=1, budget=0.02, spread=1e-9, attempts=2)
    latency = next(m for m in backend.measure(artifact, digits_task, None) if m.name == "latency")
    assert latency.ci95 is not None
    width = 100 * (latency.ci95[1] - latency.ci95[0]) / latency.value
    assert f"interval {width:.0f} % wide" in latency.provenance.flags


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_ten_measurements_agree_and_load_is_noticed(tmp_path: Path, runtime: str) -> None:
    done = subprocess.run(
        [
            sys.executable, "benchmarks/repeatability.py", "--load", "--model", "resnet20",
            "--target", f"x86/{runtime}", "--json", tmp_path / "out.json",
        ],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["summary"]["busy"]["flagged"] == 10
    steady = [row["latency"] for row in found["rows"] if not row["loaded"] and not row["flags"]]
    if len(steady) < 5:
        pytest.skip(f"the machine was busy: {10 - len(steady)} of 10 measurements were flagged")
    assert max(steady) / min(steady) - 1 < 0.03
