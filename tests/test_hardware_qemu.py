"""ARM cores by emulation: the counter of instructions, the ARM system of files, and what the real runtime executes."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

from autocompress import Quantize, Task
from autocompress.core.errors import CandidateError, InputError, MissingDependencyError
from autocompress.core.types import Method
from autocompress.hardware.files import read_file
from autocompress.hardware.qemu import QemuBackend
from autocompress.hardware.qemu_setup import EMULATOR, INTERFACES, build_counter, make_rootfs
from autocompress.hardware.targets import find_backend, make_backend
from autocompress.tasks.data import normalise

needs_qemu = pytest.mark.skipif(
    not (shutil.which(EMULATOR) and shutil.which("gcc")), reason="needs qemu and gcc: apt install qemu-user gcc"
)
# getppid(); 1000 times round a loop of two instructions; getppid(); exit(0): in the machine code of ARM64.
COUNTED = (
    0xD28015A8, 0xD4000001, 0xD2807D09, 0xF1000529, 0x54FFFFE1, 0xD4000001, 0xD2800BA8, 0xD2800000, 0xD4000001,
)  # fmt: skip


def write_program(path: Path, instructions: tuple[int, ...]) -> None:
    """An ELF file of one segment that holds the instructions and nothing else."""
    base, headers = 0x400000, 64 + 56
    code = struct.pack(f"<{len(instructions)}I", *instructions)
    header = (
        b"\x7fELF\2\1\1" + bytes(9) + struct.pack("<2HI3QI6H", 2, 183, 1, base + headers, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    )
    size = headers + len(code)
    path.write_bytes(header + struct.pack("<2I6Q", 1, 5, 0, base, base, size, size, 4096) + code)
    path.chmod(0o755)


@needs_qemu
def test_the_counter_counts_every_instruction_between_two_calls(tmp_path: Path) -> None:
    program, counter = tmp_path / "program", tmp_path / "counter.so"
    write_program(program, COUNTED)
    for interface in INTERFACES:
        build_counter(counter, interface)
        command = [EMULATOR, "-cpu", "cortex-a72", "-plugin", f"{counter},fd=1", program]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            break
    # One that sets the loop's number, two each time round, and the second call itself.
    assert done.stdout == "2002\n", done.stderr


def test_what_is_missing_is_said_before_anything_is_downloaded(tmp_path: Path) -> None:
    for core in ("cortex-a53", "cortex-a72", "cortex-a76"):
        backend = find_backend(f"arm/qemu-{core}")
        assert backend.capabilities.emulated
        assert backend.capabilities.metrics == ("instructions", "arm_parity")
        missing = str(backend.missing())
        assert "autocompress hardware setup arm/qemu" in missing or "apt install qemu-user" in missing
    with pytest.raises(MissingDependencyError, match="arm/qemu-cortex-a72 needs"):
        make_backend("arm/qemu-cortex-a72")
    assert find_backend("arm/qemu-cortex-a76").capabilities.fast == (8,)
    assert find_backend("arm/qemu-cortex-a72").capabilities.fast == ()


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ARM system, downloaded."""
    lines: list[str] = []
    try:
        folder = make_rootfs(tmp_path_factory.mktemp("qemu") / "system", say=lines.append)
    except MissingDependencyError as error:
        pytest.skip(f"no ARM system can be had here: {error}")
    assert lines[0].startswith("reading the lists")
    assert lines[-1] == f"done: {folder}"
    return folder


@pytest.mark.slow
def test_the_real_runtime_executes_files_on_emulated_cores(system: Path, digits_task: Task, tmp_path: Path) -> None:
    model = digits_task.build()
    plans = {"float": model, "rounded": Quantize(8, outputs="all")(digits_task.build(), digits_task)}
    counts = {}
    for core in ("cortex-a72", "cortex-a76"):
        backend = QemuBackend(core, threads=1, folder=system)
        assert backend.missing() is None
        for name, plan in plans.items():
            artifact = backend.build(plan, digits_task, tmp_path / core / name)
            instructions, parity = backend.measure(artifact, digits_task, None)
            assert instructions.provenance.method is parity.provenance.method is Method.SIMULATED
            assert (instructions.name, instructions.unit, instructions.samples) == ("instructions", "", 8)
            assert parity.value < 0.01
            counts[core, name] = instructions.value
            again = backend.measure(artifact, digits_task, None)[0]
            assert (again.value, again.ci95) == (instructions.value, instructions.ci95)  # kept
    assert 4e5 < counts["cortex-a72", "float"] < 8e5
    # Cores with 8-bit dot products need far fewer; in float there is no difference.
    assert counts["cortex-a76", "rounded"] < 0.7 * counts["cortex-a72", "rounded"]
    assert counts["cortex-a76", "float"] == pytest.approx(counts["cortex-a72", "float"], rel=0.01)


@pytest.mark.slow
def test_counts_repeat(system: Path, digits_task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = QemuBackend("cortex-a72", threads=1, folder=system)
    artifact = backend.build(digits_task.build(), digits_task, tmp_path)
    values = []
    for number in range(3):
        monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path / str(number)))
        values.append(backend.measure(artifact, digits_task, None)[0].value)
    assert np.ptp(values) < 0.005 * np.median(values)


@pytest.mark.slow
def test_files_that_people_bring_are_counted_and_broken_ones_told(
    system: Path, digits_task: Task, tmp_path: Path
) -> None:
    backend = QemuBackend("cortex-a72", threads=1, folder=system)
    written = backend.build(digits_task.build(), digits_task, tmp_path)
    artifact, task = read_file(written.path, backend.name)
    assert backend.measure(artifact, task, None)[0].value > 4e5
    images = normalise(digits_task.data, digits_task.data.search.inputs[:4])
    assert backend.predict(artifact, images).shape == (4, 10)
    with pytest.raises(CandidateError, match="the emulation hung for 0 s"):
        QemuBackend("cortex-a53", limit=0.01, folder=system).measure(artifact, task, None)
    written.path.write_bytes(written.path.read_bytes()[:5000])
    broken = type(artifact)(backend.name, written.path, "0" * 64, 5000)
    with pytest.raises(CandidateError, match=r"can't run the file: .*Protobuf parsing failed"):
        backend.measure(broken, task, None)


@needs_qemu
def test_sources_that_are_no_file_are_refused(tmp_path: Path) -> None:
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        pytest.skip("needs apt-get and dpkg-deb")
    with pytest.raises(InputError, match="expected a list of apt sources"):
        make_rootfs(tmp_path / "system", sources=tmp_path / "absent", say=lambda line: None)
    assert list(tmp_path.iterdir()) == []
