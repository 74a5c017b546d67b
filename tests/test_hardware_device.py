"""What a processor is called and what it computes fast, on x86-64 and on ARM."""

from __future__ import annotations

from pathlib import Path

import pytest

from autocompress.hardware.device import (
    cpu_fingerprint,
    cpu_flags,
    cpu_name,
    has_bf16,
    has_fp16,
    has_int8_dot,
    usable_cores,
    vector_features,
)
from autocompress.hardware.x86 import CpuBackend

# As the kernel of a Raspberry Pi 5 writes it.
PI5 = """processor\t: 0
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x4
CPU part\t: 0xd0b
CPU revision\t: 1
"""
SAPPHIRE_RAPIDS = """processor\t: 0
model name\t: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz
flags\t\t: fpu sse2 avx fma avx2 avx512f avx_vnni avx512_bf16 avx512_vnni amx_bf16 avx512_fp16 amx_tile amx_int8
"""
OLD = "processor\t: 0\nmodel name\t: Intel(R) Core(TM) i5-3320M CPU @ 2.60GHz\nflags\t\t: fpu sse2 avx f16c\n"


def machine(folder: Path, cpuinfo: str, model: str = "") -> Path:
    """The system's files of another machine."""
    (folder / "proc/device-tree").mkdir(parents=True)
    (folder / "proc/cpuinfo").write_text(cpuinfo)
    if model:
        (folder / "proc/device-tree/model").write_text(model)
    return folder


def test_an_arm_board_is_named_by_its_device_tree_and_its_cores(tmp_path: Path) -> None:
    root = machine(tmp_path, PI5, "Raspberry Pi 5 Model B Rev 1.0\0")
    assert cpu_name(root) == "Raspberry Pi 5 Model B Rev 1.0, Cortex-A76"
    assert "asimddp" in cpu_flags(root)
    assert vector_features(root) == ("asimd", "asimdhp", "asimddp")
    assert (has_int8_dot(root), has_fp16(root), has_bf16(root)) == (True, True, False)


def test_matrix_units_and_short_floats_of_x86_are_seen(tmp_path: Path) -> None:
    root = machine(tmp_path, SAPPHIRE_RAPIDS)
    assert cpu_name(root) == "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz"
    assert vector_features(root) == (
        "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
    )  # fmt: skip
    assert (has_int8_dot(root), has_fp16(root), has_bf16(root)) == (True, True, True)


def test_a_processor_without_them_has_none(tmp_path: Path) -> None:
    root = machine(tmp_path, OLD)
    assert vector_features(root) == ()
    assert not has_int8_dot(root)
    assert not has_bf16(root)
    assert "no vector features known" in cpu_fingerprint(root)


def test_the_fingerprint_tells_devices_apart_and_stays_the_same(tmp_path: Path) -> None:
    first, second = machine(tmp_path / "a", PI5, "Raspberry Pi 5"), machine(tmp_path / "b", SAPPHIRE_RAPIDS)
    count = len(usable_cores())
    cores = f"{count} core{'s' if count > 1 else ''}"
    assert cpu_fingerprint(first) == f"Raspberry Pi 5, Cortex-A76, asimd asimdhp asimddp, {cores}"
    assert cpu_fingerprint(first) != cpu_fingerprint(second)
    assert cpu_fingerprint() == cpu_fingerprint()


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_what_is_said_to_be_fast_is_what_the_cores_have(runtime: str) -> None:
    fast = CpuBackend(runtime).capabilities.fast
    assert (8 in fast) == has_int8_dot()
    assert (16 in fast) == (runtime == "openvino" and has_bf16())
