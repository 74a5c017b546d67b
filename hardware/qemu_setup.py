"""An ARM system of files for qemu's user-mode emulation: made once, on request, without root.

It holds what `apt` and `pip` give for ARM64: Debian's Python, and ONNX Runtime's own package for ARM. Its files lie in
a folder; nothing is installed in the user's system, and nothing of it runs but under qemu.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ..core.errors import InputError, MissingDependencyError
from ..tasks.data import cache_folder

EMULATOR = "qemu-aarch64"
PACKAGES = ("python3", "libstdc++6")  # with all that they depend on
# What their Linux says of the cores: runtimes choose kernels by it, and the part number must be the emulated core's.
CORES = {
    "cortex-a53": ("0xd03", "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"),
    "cortex-a72": ("0xd08", "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"),
    "cortex-a76": (
        "0xd0b",
        "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp",
    ),
}
INTERFACES = range(1, 8)  # versions of qemu's plugin interface that may take the plugin
_WHEELS = (*(f"manylinux_2_{minor}_aarch64" for minor in (28, 27, 26, 24, 17)), "manylinux2014_aarch64")
_CPUINFO = """processor\t: 0
BogoMIPS\t: 100.00
Features\t: {features}
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: {part}
CPU revision\t: 3

"""


def system_folder() -> Path:
    """Where the ARM system is, or would be."""
    return cache_folder() / "qemu-aarch64"


def setup_missing(name: str, folder: Path) -> str | None:
    """What the target `name` lacks, and how to get it."""
    if shutil.which(EMULATOR) is None:
        return f"{name} needs qemu's user-mode emulation: apt install qemu-user"
    if not (folder / "ready.json").is_file():
        return f"{name} needs an ARM system of files (about 60 MB to download): autocompress hardware setup arm/qemu"
    return None


def make_rootfs(folder: Path | None = None, sources: Path | None = None, say: Callable[[str], None] = print) -> Path:
    """Download and unpack an ARM system, and compile the counter of instructions; returns its folder.

    Args:
        folder: where to; default `system_folder()`. One that is there is replaced.
        sources: a list of apt sources that have ARM64 packages, where the system's own have none.
        say: called with a line for each step.

    Raises:
        MissingDependencyError: a program is not here, or what it was to get can't be got.
    """
    folder = folder or system_folder()
    lacking = [program for program in (EMULATOR, "apt-get", "dpkg-deb", "gcc") if shutil.which(program) is None]
    if lacking:
        raise MissingDependencyError(
            f"setting up arm/qemu needs {', '.join(lacking)}; on Debian or Ubuntu: apt install qemu-user apt dpkg gcc"
        )
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        _unpack_packages(part, sources, say)
        versions = _install_runtime(part, say)
        for core, (number, features) in CORES.items():
            _add_core(part, core, number, features)
        say("compiling the counter of instructions …")
        _compile_counter(part)
        (part / "ready.json").write_text(json.dumps({**versions, "qemu": emulator_version()}, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    say(f"done: {folder}")
    return folder


def emulated(folder: Path, core: str, arguments: Sequence[str | Path], plugin: str | Path = "") -> list[str]:
    """The command that runs the ARM system's Python on a core."""
    system = folder / "cores" / core
    plugins = ["-plugin", str(plugin)] if plugin else []
    (python,) = (folder / "root/usr/bin").glob("python3.*[0-9]")
    command = [EMULATOR, "-cpu", core, "-L", str(system), *plugins, str(system / "usr/bin" / python.name)]
    return [*command, *map(str, arguments)]


def guest_environment(folder: Path) -> dict[str, str]:
    """Environment of the ARM system's Python: nothing of the user's."""
    return {"PATH": os.environ.get("PATH", ""), "PYTHONPATH": str(folder / "root/opt/site"), "LC_ALL": "C.UTF-8"}


def emulator_version() -> str:
    """Such as "7.2.22"."""
    told = _run([EMULATOR, "--version"]).split()
    return told[told.index("version") + 1]


def _unpack_packages(part: Path, sources: Path | None, say: Callable[[str], None]) -> None:
    """By the user's apt and its sources, with lists and states of our own: nothing of the user's system changes."""
    apt, root = part / "apt", part / "root"
    for name in ("lists/partial", "archives/partial"):
        (apt / name).mkdir(parents=True)
    root.mkdir()
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures::": "arm64",
        "APT::Sandbox::User": "",
        "Dir::State": str(apt),
        "Dir::State::status": "/dev/null",  # as if no package was there: all that is needed is named
        "Dir::Cache": str(apt),
        "Debug::NoLocking": "1",
    }
    if sources is not None:
        if not sources.is_file():
            raise InputError(f"{sources}: there is no such file; expected a list of apt sources")
        settings |= {"Dir::Etc::sourcelist": str(sources.resolve()), "Dir::Etc::sourceparts": "/dev/null"}
    options = [f"-o{key}={value}" for key, value in settings.items()]
    say("reading the lists of ARM64 packages …")
    subprocess.run(["apt-get", *options, "update"], capture_output=True, check=False)  # foreign sources may fail
    say(f"downloading {' and '.join(PACKAGES)} with what they need …")
    try:
        _run(["apt-get", *options, "install", "--yes", "--download-only", "--no-install-recommends", *PACKAGES])
    except MissingDependencyError as error:
        raise MissingDependencyError(
            f"apt finds no ARM64 packages in its sources ({error}); name a list of sources that has them"
        ) from error
    archives = sorted((apt / "archives").glob("*.deb"))
    say(f"unpacking {len(archives)} packages …")
    for archive in archives:
        _run(["dpkg-deb", "--extract", str(archive), str(root)])
    shutil.rmtree(apt)


def _install_runtime(part: Path, say: Callable[[str], None]) -> dict[str, str]:
    """The version of ONNX Runtime that is here too, so that instruction sets alone differ."""
    (python,) = (part / "root/usr/bin").glob("python3.*[0-9]")
    version = importlib.metadata.version("onnxruntime")
    say(f"downloading onnxruntime {version} for ARM64 …")
    platforms = [word for wheel in _WHEELS for word in ("--platform", wheel)]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--only-binary=:all:", *platforms]
    command += ["--python-version", python.name.removeprefix("python"), "--implementation", "cp"]
    _run([*command, "--target", str(part / "root/opt/site"), f"onnxruntime=={version}"])
    return {"onnxruntime": version, "python": python.name}


def _add_core(part: Path, core: str, number: str, features: str) -> None:
    """A view of the ARM system in which Linux names this core."""
    system = part / "cores" / core
    cpus = system / "sys/devices/system/cpu"
    cpus.mkdir(parents=True)
    (system / "proc").mkdir()
    (system / "proc/cpuinfo").write_text(_CPUINFO.format(part=number, features=features))
    for name in ("possible", "present", "online"):
        (cpus / name).write_text("0\n")
    for entry in (part / "root").iterdir():
        if entry.name not in ("proc", "sys"):
            (system / entry.name).symlink_to(Path("../../root") / entry.name)


def build_counter(path: Path, interface: int) -> None:
    """Compile the counter of instructions for a version of qemu's plugin interface."""
    source = Path(__file__).with_name("qemu_plugin.c")
    _run(["gcc", "-O2", "-shared", "-fPIC", f"-DPLUGIN_VERSION={interface}", "-o", str(path), str(source)])


def _compile_counter(part: Path) -> None:
    """For the version of the interface that the qemu here has: it tells by whether it loads the counter."""
    counter = part / "counter.so"
    reasons = []
    for interface in INTERFACES:
        build_counter(counter, interface)
        command = emulated(part, "cortex-a72", ["-c", "import os; [os.getppid() for _ in range(4)]"], f"{counter},fd=1")
        done = subprocess.run(command, capture_output=True, text=True, env=guest_environment(part), check=False)
        if done.returncode == 0 and len(done.stdout.split()) == 2:
            return
        reasons.append(done.stderr.strip())
    raise MissingDependencyError(f"{EMULATOR} does not take the counter of instructions: {reasons[0][:300]}")


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        told = next((line for line in lines if line.lower().startswith(("e:", "error"))), (lines or ["no message"])[-1])
        raise MissingDependencyError(f"{Path(command[0]).name} failed: {told.strip()[:300]}")
    return done.stdout
