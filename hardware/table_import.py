"""Tables of latencies that others measured, brought into the package's own format."""

from __future__ import annotations

import dataclasses
import datetime
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import InputError, unknown
from .lookup import LookupTable, Row
from .operators import KINDS, LAYER_KINDS, OperatorCall, Shape

if TYPE_CHECKING:
    import pandas as pd

ARCHITECTURES = "autocompress architecture table 1"
UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
PREFIX = "lat_ms_"
_SIZES = ("kernel", "stride", "padding", "dilation")
_NUMBERS = ("groups", "weight_bits", "activation_bits")
FIELDS = (
    "kind",
    "op_type",
    "input_shapes",
    "output_shape",
    *_SIZES,
    *_NUMBERS,
    "fused",
    "samples",
    *(f"latency_{unit}" for unit in UNITS),
)
_READERS = (".csv", ".parquet")


def import_table(
    path: Path, columns: Mapping[str, str], out: Path, *, target: str = "", device: str = "", runtime: str = ""
) -> LookupTable | pd.DataFrame:
    """Convert a table of operators or of architectures, and write it to `out` as Parquet.

    Operators need `kind` (as in `OperatorCall`), `output_shape` and one of `latency_s`, `latency_ms`, `latency_us`,
    `latency_ns`; `input_shapes` and the other fields of `OperatorCall` tell them apart further. Shapes are written
    "1x16x32x32", or as lists; a single number stands for all dimensions of a kernel, stride or padding; several inputs
    are separated by ";". A table with a column `arch` is one of architectures: every column `lat_ms_<device>` is a
    device, and `latency_ms=column` names another one.

    Args:
        path: CSV or Parquet.
        columns: the table's column for each of our fields, where the names differ: {"kind": "op", "latency_ms": "t"}.
        target: what the latencies are of; the file's name by default.

    Returns:
        The operator table; of architectures a frame with the index `arch` and seconds by device.

    Raises:
        InputError: an unreadable file, unknown or missing columns, latencies that are no positive numbers, rows that
            tell the same operator twice.
    """
    frame = _read(path)
    known = (*FIELDS, "arch")
    for field, column in columns.items():
        if field not in known:
            raise unknown("column", field, known)
        if column not in frame:
            raise InputError(f"{path}: there is no column '{column}' for {field}; it has {_listed(frame)}")
    source = str(path)
    if "arch" in frame or "arch" in columns:
        return _import_architectures(frame, columns, path, out)
    chosen = {field: columns.get(field, field) for field in FIELDS if columns.get(field, field) in frame}
    for field in ("kind", "output_shape"):
        if field not in chosen:
            raise InputError(f"{path}: expected a column {field} (or --columns {field}=NAME); it has {_listed(frame)}")
    seconds = _seconds(frame, chosen, path)
    rows: dict[OperatorCall, Row] = {}
    for number, (record, value) in enumerate(zip(frame.to_dict("records"), seconds, strict=True), 2):
        where = f"{path}, row {number}"
        key = _operator({field: record[column] for field, column in chosen.items()}, where)
        if key in rows:
            raise InputError(f"{where}: the operator is there twice; expected one row for each, such as their median")
        samples = int(record[chosen["samples"]]) if "samples" in chosen else 1
        rows[key] = Row(value, value, value, samples)
    if not rows:
        raise InputError(f"{path}: expected rows; there is none")
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    name = target or path.stem
    details = {"source": source}
    table = LookupTable(name, device or name, runtime or "imported", "", now, rows, details=details)
    table.write(out)
    return table


def read_architectures(path: Path) -> pd.DataFrame:
    """Seconds by device, with the architectures as index, of a table that `import_table` wrote.

    Raises:
        InputError: no such file, or no table of architectures.
    """
    import pandas as pd
    import pyarrow.parquet as pq

    if path.suffix != ".parquet" or not path.is_file():
        raise InputError(f"{path}: expected a Parquet file that `autocompress hardware import` wrote")
    metadata = pq.read_schema(path).metadata or {}
    if metadata.get(b"format", b"").decode() != ARCHITECTURES:
        raise InputError(f"{path} is no table of architectures; bring it in by `autocompress hardware import`")
    return pd.read_parquet(path).set_index("arch")


def _read(path: Path) -> pd.DataFrame:
    import pandas as pd

    if path.suffix not in _READERS:
        raise InputError(f"expected a file {' or '.join(_READERS)}, got '{path}'")
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; expected a table of latencies")
    try:
        # Texts stay texts: "1x1" is no number, and neither is an architecture such as "012".
        return pd.read_csv(path, dtype=str, keep_default_na=False) if path.suffix == ".csv" else pd.read_parquet(path)
    except (ValueError, OSError) as error:  # parsing errors of pandas and pyarrow are ValueErrors
        raise InputError(f"{path} can't be read: {str(error).splitlines()[0]}") from error


def _import_architectures(frame: pd.DataFrame, columns: Mapping[str, str], path: Path, out: Path) -> pd.DataFrame:
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    found: dict[str, Any] = {"arch": [str(arch) for arch in frame[columns.get("arch", "arch")]]}
    doubles = pd.Series(found["arch"]).duplicated()
    if doubles.any():
        raise InputError(f"{path}: the architecture '{found['arch'][int(doubles.argmax())]}' is there twice")
    named = {column: f"latency_{unit}" for unit in UNITS if (column := columns.get(f"latency_{unit}"))}
    named |= {str(name): "latency_ms" for name in frame if str(name).startswith(PREFIX) and name not in named}
    if not named:
        wanted = f"columns {PREFIX}<device>, or --columns latency_ms=NAME"
        raise InputError(f"{path}: expected {wanted}; it has {_listed(frame)}")
    for column, field in named.items():
        found[column.removeprefix(PREFIX)] = _seconds(frame, {field: column}, path)
    made = pd.DataFrame(found)
    table = pa.Table.from_pandas(made, preserve_index=False)
    table = table.replace_schema_metadata({"format": ARCHITECTURES, "source": str(path)})
    out.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, out)
    return made.set_index("arch")


def _seconds(frame: pd.DataFrame, chosen: Mapping[str, str], path: Path) -> list[float]:
    """The latencies of a table, in seconds."""
    given = [field for field in chosen if field.startswith("latency_")]
    if len(given) != 1:
        wanted = ", ".join(f"latency_{unit}" for unit in UNITS)
        raise InputError(f"{path}: expected one column of latencies ({wanted}), got {', '.join(given) or 'none'}")
    column = chosen[given[0]]
    factor = UNITS[given[0].removeprefix("latency_")]
    seconds = []
    for number, value in enumerate(frame[column], 2):
        try:
            found = float(value)
        except (TypeError, ValueError):
            found = math.nan
        if not (math.isfinite(found) and found >= 0):
            raise InputError(f"{path}, row {number}: {column}: expected a latency of 0 or more, got '{value}'")
        seconds.append(found * factor)
    return seconds


def _operator(record: Mapping[str, Any], where: str) -> OperatorCall:
    """The operator of one row."""
    kind = str(record["kind"]).strip()
    kinds = sorted({*KINDS.values(), *LAYER_KINDS, "matmul", "global_pool", "other"})
    if kind not in kinds:
        try:
            raise unknown("kind", kind, kinds)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
    output = _shape(record["output_shape"], f"{where}: output_shape")
    inputs = tuple(_shape(part, f"{where}: input_shapes") for part in _parts(record.get("input_shapes", "")))
    spatial = max(0, len(output) - 2)
    sizes: dict[str, Any] = {name: _window(record.get(name, ""), spatial, f"{where}: {name}") for name in _SIZES}
    if len(sizes["padding"]) == spatial:  # the same at the end as at the beginning
        sizes["padding"] *= 2
    if kind in ("conv", "depthwise"):
        sizes["stride"] = sizes["stride"] or (1,) * spatial
        sizes["dilation"] = sizes["dilation"] or (1,) * spatial
        sizes["padding"] = sizes["padding"] or (0,) * 2 * spatial
    numbers: dict[str, Any] = {
        name: _number(record[name], f"{where}: {name}") for name in _NUMBERS if _given(record.get(name))
    }
    if kind == "depthwise":
        numbers.setdefault("groups", output[1] if len(output) > 1 else 1)
    op_type = str(record.get("op_type", "")) or {"conv": "Conv", "depthwise": "Conv", "linear": "Gemm"}.get(kind, "")
    fused = str(record["fused"]) if _given(record.get("fused")) else ""
    call = OperatorCall(kind, "", op_type, inputs, output, fused=fused, **sizes)
    return dataclasses.replace(call, **numbers)


def _given(value: Any) -> bool:
    return value is not None and value != "" and not (isinstance(value, float) and math.isnan(value))


def _parts(value: Any) -> list[Any]:
    """The inputs of an operator: texts apart at ";", or a list of lists."""
    if isinstance(value, (str, float, type(None))) and not _given(value):
        return []
    if isinstance(value, str):
        return [part for part in value.split(";") if part.strip()]
    several = [part for part in value if not isinstance(part, (int, float)) and hasattr(part, "__len__")]
    return several or [value]


def _shape(value: Any, where: str) -> Shape:
    """Sizes written "1x16x32x32", "(1, 16, 32, 32)" or as a list."""
    texts = re.split(r"[x,*\s]+", value.strip(" ()[]")) if isinstance(value, str) else None
    try:
        sizes = tuple(int(size) for size in (texts if texts is not None else value))
    except (TypeError, ValueError):
        sizes = ()
    if not sizes or min(sizes) < 0:
        raise InputError(f"{where}: expected sizes such as 1x16x32x32, got '{value}'")
    return sizes


def _window(value: Any, spatial: int, where: str) -> Shape:
    if isinstance(value, (str, float, type(None))) and not _given(value):
        return ()
    sizes = _shape([value] if isinstance(value, (int, float)) else value, where)
    return sizes * spatial if len(sizes) == 1 else sizes


def _number(value: Any, where: str) -> float | int:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: expected a number, got '{value}'") from error
    return int(number) if number == int(number) else number


def _listed(frame: pd.DataFrame) -> str:
    return ", ".join(map(str, frame)) or "no columns"
