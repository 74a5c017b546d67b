"""Energy on x86: the processor's counters, read from a tree like Linux's, and a power that a person declares."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from autocompress import Task
from autocompress.core.errors import InputError
from autocompress.core.types import Artifact, Method
from autocompress.hardware.power import EnergyCounter, declared_watts, energy_figures, find_packages, record_energy
from autocompress.hardware.targets import find_backend
from autocompress.hardware.x86 import CpuBackend

WRAP = 262_143_328_850  # microjoules, of a real counter


def add_zone(root: Path, zone: str, name: str, energy: int = 0, wrap: int = WRAP) -> Path:
    """A powercap zone as Linux shows it."""
    folder = root / zone
    folder.mkdir(parents=True)
    for file, text in (("name", name), ("energy_uj", str(energy)), ("max_energy_range_uj", str(wrap))):
        (folder / file).write_text(f"{text}\n")
    return folder


@contextmanager
def powered(folders: list[Path], watts: float, start: int = 0) -> Iterator[None]:
    """Move the counters as processors of this power would, every millisecond."""
    over = threading.Event()

    def move() -> None:
        began = time.perf_counter()
        while not over.wait(0.001):
            now = (start + int((time.perf_counter() - began) * watts * 1e6)) % WRAP
            for folder in folders:
                # One write of one length, so that a reader never sees half a number.
                with open(folder / "energy_uj", "r+b", buffering=0) as file:
                    file.write(b"%020d\n" % now)

    thread = threading.Thread(target=move)
    thread.start()
    try:
        time.sleep(0.01)
        yield
    finally:
        over.set()
        thread.join()


def test_the_packages_of_a_machine_are_found_and_not_their_parts(tmp_path: Path) -> None:
    for zone, name in (
        ("intel-rapl", "control"),
        ("intel-rapl:0", "package-0"),
        ("intel-rapl:0:0", "core"),
        ("intel-rapl:0:1", "dram"),
        ("intel-rapl:1", "package-1"),
        ("intel-rapl:2", "psys"),
        ("intel-rapl-mmio:0", "package-0"),  # the same counter by another way
        ("dtpm", "dtpm"),
    ):
        add_zone(tmp_path, zone, name)
    assert [package.folder.name for package in find_packages(tmp_path)] == ["intel-rapl:0", "intel-rapl:1"]


def test_counters_that_can_not_be_read_are_no_counters(tmp_path: Path) -> None:
    assert find_packages(tmp_path / "nowhere") == ()
    add_zone(tmp_path, "intel-rapl:0", "package-0")
    second = add_zone(tmp_path, "intel-rapl:1", "package-1")
    assert len(find_packages(tmp_path)) == 2
    # A folder in its place fails to be read as a file without permission does, for root as well.
    (second / "energy_uj").unlink()
    (second / "energy_uj").mkdir()
    assert find_packages(tmp_path) == (), "the sum of some packages would be too low"


def test_the_energy_of_several_packages_is_summed_over_wrap_arounds(tmp_path: Path) -> None:
    first = add_zone(tmp_path, "intel-rapl:0", "package-0", energy=5_000_000)
    second = add_zone(tmp_path, "intel-rapl:1", "package-1", energy=WRAP - 1_000_000)
    counter = EnergyCounter(find_packages(tmp_path))
    assert counter.joules() == 0
    (first / "energy_uj").write_text("7500000")
    (second / "energy_uj").write_text("500000")
    assert counter.joules() == pytest.approx(2.5 + 1.5)
    (second / "energy_uj").write_text("200000")
    assert counter.joules() == pytest.approx(4.0 + WRAP / 1e6 - 0.3)


def test_energy_of_a_run_is_power_times_time(tmp_path: Path) -> None:
    folders = [add_zone(tmp_path, f"intel-rapl:{n}", f"package-{n}", energy=0) for n in range(2)]
    with powered(folders, watts=20, start=WRAP - 10_000_000):  # wraps around after half a second
        record = record_energy(lambda: time.sleep(0.005), find_packages(tmp_path), blocks=8)
    figures = energy_figures(record)
    assert {name: unit for name, (unit, _) in figures.items()} == {"energy": "J", "power": "W", "idle_power": "W"}
    for (joules, _, runs), energy in zip(record["work"], figures["energy"][1], strict=True):
        assert energy == pytest.approx(joules / runs)
    # Single blocks are wrong where the thread that moves the counters has to wait for a core.
    assert statistics.median(figures["power"][1]) == pytest.approx(40, rel=0.25)
    assert statistics.median(figures["idle_power"][1]) == pytest.approx(40, rel=0.25)
    assert statistics.median(figures["energy"][1]) >= 0.75 * 40 * 0.005


@pytest.fixture(scope="module")
def artifact(digits_task: Task, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The digits model as both runtimes take it."""
    return CpuBackend("onnxruntime").build(digits_task.build(), digits_task, tmp_path_factory.mktemp("file"))


def test_where_counters_can_be_read_energy_is_measured(digits_task: Task, artifact: Artifact, tmp_path: Path) -> None:
    folder = add_zone(tmp_path, "intel-rapl:0", "package-0")
    backend = CpuBackend("onnxruntime", threads=1, budget=0.02, attempts=1, powercap=tmp_path)
    assert {"energy", "power", "idle_power"} < set(backend.capabilities.metrics)
    with powered([folder], watts=30):
        found = {m.name: m for m in backend.measure(artifact, digits_task, None)}
    assert set(found) == set(backend.capabilities.metrics)
    assert {name: found[name].unit for name in ("energy", "power", "idle_power")} == {
        "energy": "J", "power": "W", "idle_power": "W",
    }  # fmt: skip
    assert found["power"].value == pytest.approx(30, rel=0.25)
    # A run of a block also takes the loop around it, and the machine's other work; never less than the latency.
    assert found["energy"].value > 0.7 * 30 * found["latency"].value
    for name in ("energy", "power", "idle_power"):
        ends = found[name].ci95
        assert found[name].provenance.method is Method.MEASURED
        assert found[name].samples == 10
        assert ends is not None
        assert ends[0] <= found[name].value <= ends[1]


def test_where_no_counter_can_be_read_energy_is_unknown(digits_task: Task, artifact: Artifact, tmp_path: Path) -> None:
    backend = CpuBackend("onnxruntime", threads=1, budget=0.02, attempts=1, powercap=tmp_path)
    assert backend.capabilities.metrics == ("latency", "throughput", "memory")
    assert any("x86/onnxruntime:watts=15" in note for note in backend.capabilities.notes)
    assert {m.name for m in backend.measure(artifact, digits_task, None)} == {"latency", "throughput", "memory"}


def test_a_declared_power_predicts_energy_and_says_so(digits_task: Task, artifact: Artifact) -> None:
    backend = find_backend("x86/onnxruntime:watts=15", threads=1)
    assert isinstance(backend, CpuBackend)
    assert backend.name == "x86/onnxruntime"
    assert "energy" in backend.capabilities.metrics
    assert "power" not in backend.capabilities.metrics
    found = {m.name: m for m in backend.measure(artifact, digits_task, None)}
    energy, latency = found["energy"], found["latency"]
    assert energy.value == pytest.approx(15 * latency.value)
    assert latency.ci95 is not None
    assert energy.ci95 == pytest.approx(tuple(15 * end for end in latency.ci95))
    assert (energy.unit, energy.provenance.method) == ("J", Method.PREDICTED)
    assert energy.provenance.flags[0] == "declared power 15 W"
    assert latency.provenance.method is Method.MEASURED


@pytest.mark.parametrize("device", ["15", "watts=", "watts=-3", "watts=0", "watts=nan", "watts=1e400", "volts=5"])
def test_another_device_is_refused(device: str) -> None:
    with pytest.raises(InputError, match=r"such as watts=15, got '"):
        find_backend(f"x86/openvino:{device}")
    assert declared_watts("watts=.5") == 0.5
    assert declared_watts("") == 0.0
