"""Tables of latencies: one row for each architecture, a column `lat_ms_<device>` for each device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ..core.errors import InputError, unknown
from .design import Features, architecture_features, design_samples
from .prediction import fit_predictor

PREFIX = "lat_ms_"
OWN_UNITS = {"latency_ms": 1e-3, "latency_s": 1.0}


def read_table(path: Path, name: str = "") -> pd.DataFrame:
    """A Parquet or CSV file, by its suffix.

    Args:
        name: what an error calls it, such as "--table"; its path by default.

    Raises:
        InputError: no such file, another suffix, or it can't be read.
    """
    where = f"{name}: " if name else ""
    if path.suffix not in (".parquet", ".csv"):
        raise InputError(f"{where}expected a file .parquet or .csv, got '{path}'")
    if not path.is_file():
        raise InputError(f"{where}there is no file '{path}'")
    try:
        return pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    except (ValueError, OSError) as error:  # parsing errors of pandas and pyarrow are ValueErrors
        raise InputError(f"{where}'{path}' can't be read: {str(error).splitlines()[0]}") from error


def architectures(table: pd.DataFrame, name: str = "table") -> list[str]:
    """One string for each row: the column `arch`, or all integer columns together."""
    if "arch" in table:
        if table["arch"].isna().any():
            raise InputError(f"{name}: some rows of the column arch are empty")
        return [str(arch) for arch in table["arch"]]
    places = [
        place for place in map(str, table.columns) if not place.startswith(PREFIX) and table[place].dtype.kind in "iu"
    ]
    if not places:
        raise InputError(f"{name}: expected a column arch, or integer columns with one operator each; there is neither")
    return [" ".join(map(str, row)) for row in table[places].to_numpy().tolist()]


def devices_in(table: pd.DataFrame, name: str = "table") -> list[str]:
    """Names of the devices that the table has latencies of."""
    found = [column.removeprefix(PREFIX) for column in map(str, table.columns) if column.startswith(PREFIX)]
    if not found:
        raise InputError(f"{name}: expected columns {PREFIX}<device>; there is none")
    return found


def latencies_of(table: pd.DataFrame, device: str, name: str = "table") -> np.ndarray:
    """A device's column, checked."""
    return _positive(table[PREFIX + device], f"{name}: {PREFIX}{device}")


def read_latencies(table: pd.DataFrame, name: str) -> np.ndarray:
    """Seconds of the column `latency_ms` or `latency_s`, checked."""
    found = [column for column in OWN_UNITS if column in table]
    if len(found) != 1:
        raise InputError(
            f"{name}: expected one column {' or '.join(OWN_UNITS)}, got {', '.join(map(str, table.columns))}"
        )
    return _positive(table[found[0]], f"{name}: {found[0]}") * OWN_UNITS[found[0]]


def _positive(column: pd.Series, where: str) -> np.ndarray:
    try:
        values = column.to_numpy(float)
    except ValueError as error:
        raise InputError(f"{where}: expected numbers: {error}") from error
    if not np.isfinite(values).all() or (values <= 0).any():
        raise InputError(f"{where}: expected latencies above 0; some are missing or not positive")
    return values


def predict_table(table: pd.DataFrame, sources: Sequence[str], measured: pd.DataFrame) -> pd.DataFrame:
    """Latencies of all architectures of a table on a new device, from a few that were measured there.

    Args:
        table: a column `arch` (or integer columns, see `architectures`), and `lat_ms_<device>` of known devices.
        sources: names of the known devices to build on, two at least; all of the table where empty.
        measured: the same columns that say which architecture, and `latency_ms` or `latency_s`. Repeated
            measurements of one architecture count by their median.

    Returns:
        `arch`, `latency_ms`, `low_ms` and `high_ms` (ends of the 95 % interval of one measurement), `measured` (whether
        it was one of those given), a row for each of the table's.

    Raises:
        InputError: something is missing, or a measured architecture is not in the table.
    """
    archs = architectures(table)
    features, known = _known(table, archs, sources)
    row = {arch: number for number, arch in reversed(list(enumerate(archs)))}
    latencies: dict[int, list[float]] = {}
    for arch, seconds in zip(architectures(measured, "measured"), read_latencies(measured, "measured"), strict=True):
        if arch not in row:
            raise InputError(f"measured: the table has no architecture '{arch}'")
        latencies.setdefault(row[arch], []).append(float(seconds))
    rows = np.array(list(latencies), int)
    middles = [float(np.median(values)) for values in latencies.values()]
    mean, low, high = (1e3 * ends for ends in fit_predictor(features, known, rows, middles).predict(features))
    given = np.isin(np.arange(len(archs)), rows)
    return pd.DataFrame({"arch": archs, "latency_ms": mean, "low_ms": low, "high_ms": high, "measured": given})


def design_table(table: pd.DataFrame, sources: Sequence[str], samples: int = 10, seed: int = 0) -> list[str]:
    """The architectures of a table that are worth measuring on a new device (see `design_samples`).

    Args:
        sources: as for `predict_table`.
    """
    archs = architectures(table)
    features, known = _known(table, archs, sources)
    return [archs[row] for row in design_samples(features, known, samples, seed=seed)]


def _known(table: pd.DataFrame, archs: list[str], sources: Sequence[str]) -> tuple[Features, np.ndarray]:
    """Features of the architectures, and latencies (architectures, sources)."""
    devices = devices_in(table)
    names = list(sources) or devices
    for name in names:
        if name not in devices:
            raise unknown("source device", name, devices)
    if len(names) < 2:
        raise InputError(f"sources: expected two of {', '.join(devices)} at least, got {', '.join(names) or 'none'}")
    return architecture_features(archs), np.stack([latencies_of(table, name) for name in names], 1)
