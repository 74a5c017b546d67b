"""Google's TPU chips: what the compiler calls them, their clocks, memories and power, and which are in this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TpuChip:
    """What one program runs on, as XLA knows it.

    Attributes:
        name: such as "v5e".
        kind: JAX's name of the device.
        topology, config: its names for the compiler.
        clock: Hz; from v5e on derived from the published peak of operations a second.
        bandwidth: bytes a second to and from the memory.
        error: of the estimate, as a share; known for the old chips, a guess for those since.
        int8: whether layers rounded to 8 bits multiply integers.
        fast_int8: whether these are faster than bfloat16, by the compiler's own cycles.
        cores: of the chip; a program runs on one of them if `one_core`.
        power: watts of a chip at work, lowest, mean and highest; None where not published.
        pci: device number, by which an attached chip is found.
    """

    name: str
    kind: str
    topology: str
    clock: float
    bandwidth: float
    pci: str
    error: float = 0.25
    int8: bool = True
    fast_int8: bool = True
    cores: int = 1
    one_core: bool = False
    config: str = ""
    power: tuple[float, float, float] | None = None

    @property
    def device(self) -> str:
        """For people."""
        return f"TPU {self.name}, one of {self.cores} cores" if self.one_core else f"TPU {self.name}"


# Memory bandwidth of a chip: v2 700, v3 900 GB/s (Jouppi et al. 2020, doi:10.1145/3360307); v4 lite (v4i) 614 GB/s
# (Jouppi et al. 2021, doi:10.1109/ISCA52012.2021.00010); v4 1200, v5e 819, v5p 2765, v6e 1640, TPU7x 7380 GB/s and the
# power of v3 and v4 (https://docs.cloud.google.com/tpu/docs, one page for each). A core has its share.
CHIPS = {
    chip.name: chip
    for chip in (
        TpuChip("v2", "TPU v2", "v2:2x2", 0.70e9, 350e9, "0x0027", 0.1, False, False, 2, True),
        TpuChip(
            "v3", "TPU v3", "v3:2x2", 0.94e9, 450e9, "0x0027", 0.1, False, False, 2, True, power=(123.0, 220.0, 262.0)
        ),
        TpuChip(
            "v4", "TPU v4", "v4:2x2x1", 1.05e9, 1200e9, "0x005e", 0.1, False, False, 2,
            config="megacore", power=(90.0, 170.0, 192.0),
        ),
        TpuChip("v4-lite", "TPU v4 lite", "v4 lite:2x2x1", 1.05e9, 614e9, "", 0.25, False, False),
        TpuChip("v5e", "TPU v5 lite", "v5e:2x2", 1.5e9, 819e9, "0x0063"),
        TpuChip("v5p", "TPU v5", "v5p:2x2x1", 1.75e9, 2765e9, "0x0062", cores=2),
        TpuChip("v6e", "TPU v6 lite", "v6e:2x2", 1.75e9, 1640e9, "0x006f"),
        TpuChip("v7x", "TPU7x", "tpu7x:2x2x1", 2.2e9, 3690e9, "0x0076", fast_int8=False, cores=2, one_core=True),
    )
}  # fmt: skip


def attached() -> frozenset[str]:
    """PCI device numbers of Google's chips in this machine."""
    found = set()
    for vendor in Path("/sys/bus/pci/devices").glob("*/vendor"):
        if vendor.read_text().strip() == "0x1ae0":
            found.add((vendor.parent / "device").read_text().strip())
    return frozenset(found)
