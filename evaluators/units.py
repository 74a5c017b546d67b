"""SI figures in the units that people read."""

from __future__ import annotations

from ..core.types import Measurement

PERCENT = ("accuracy", "calibration_error", "parity")


def scale(name: str, unit: str, value: float) -> tuple[float, str]:
    """The factor and unit in which a figure of this size is shown, e.g. (1e3, "ms")."""
    if name.partition("@")[0] in PERCENT:
        return 100.0, "%"
    if unit == "s":
        return (1e3, "ms") if abs(value) >= 1e-3 else (1e6, "µs")
    if unit == "J":
        return (1e3, "mJ") if abs(value) >= 1e-3 else (1e6, "µJ")
    if unit == "B":
        return (1e-6, "MB") if abs(value) >= 1e6 else (1e-3, "kB")
    if unit == "" and abs(value) >= 1e6:
        return 1e-6, "M"
    if unit == "" and abs(value) >= 1e4:
        return 1e-3, "k"
    return 1.0, {"1/s": "/s"}.get(unit, unit)


def show(name: str, value: float | None, unit: str) -> str:
    """A figure with its unit, such as "1.23 ms"; "unknown" for None."""
    if value is None:
        return "unknown"
    factor, shown = scale(name, unit, value)
    number = value * factor
    digits = 2 if abs(number) < 10 else 1 if abs(number) < 1000 else 0
    return f"{number:.{digits}f} {shown}".rstrip()


def show_measurement(measurement: Measurement | None) -> str:
    """Value with half the width of its 95 % interval: "1.23 ±0.02 ms"."""
    if measurement is None:
        return "unknown"
    name, unit, value = measurement.name, measurement.unit, measurement.value
    text = show(name, value, unit)
    if measurement.ci95 is None:
        return text
    factor, _ = scale(name, unit, value)
    half = (measurement.ci95[1] - measurement.ci95[0]) / 2 * factor
    number, _, shown = text.partition(" ")
    return f"{number} ±{half:.2g} {shown}".rstrip()
