"""Tables of operators' times, and the latency of whole networks that is looked up in them.

latency = sum over the operators of (scale * seconds + dispatch * nodes) + overhead

The seconds are what each operator takes inside of whole networks (see `profile`); scale, dispatch (what the profiler
itself takes away or adds for each node that the runtime runs) and overhead are fitted to whole networks that were
timed when the table was made. What the table does not have is interpolated between channel counts, and flagged.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import InputError
from .channel_costs import ChannelCosts, channels_of, family, fit_channel_costs, with_channels
from .operators import OperatorCall, Shape

FORMAT = "autocompress operator table 1"
SHOWN = 3  # operators that a flag names; of the others it gives the number
MEASURED, INTERPOLATED, EXTRAPOLATED, MISSING = "", "interpolated", "extrapolated", "missing"
# Targets where one layer in 16 bits makes the whole file's floating point run in bfloat16.
_HALF_IS_SHARED = ("x86/openvino",)
_SHAPES = ("kernel", "stride", "padding", "dilation")
_PLAIN = ("kind", "op_type", "groups", "weight_bits", "activation_bits", "fused")


@dataclass(frozen=True)
class Row:
    """What was measured of one operator.

    Attributes:
        seconds: median over files; 0 where the runtime runs it as part of another operator.
        low, high: 95 % interval.
        samples: timed runs behind it.
        nodes: what the runtime runs for it, conversions included; a mean over files.
        observations: seconds in each file, divided by the reference's latency at that time.
    """

    seconds: float
    low: float
    high: float
    samples: int
    nodes: float = 1.0
    observations: tuple[float, ...] = ()


@dataclass(frozen=True)
class Estimate:
    """What the table says of one operator, before scale and overhead; `how` it knows that."""

    seconds: float
    low: float
    high: float
    nodes: float
    how: str


@dataclass(frozen=True, eq=False)
class LookupTable:
    """Operators' times on one device.

    Attributes:
        target: what it was made for, such as "x86/openvino"; a name of their choice in tables of others.
        device, runtime: as in `Provenance`.
        fingerprint: tells machines apart; "" for tables of others.
        taken_at: ISO 8601, UTC.
        rows: by operator, without name and costs (see `operator_key`).
        scale, dispatch, overhead: see above; seconds.
        spread: half width of a whole network's 95 % interval, as a share; None where no networks were timed.
        details: what else is known: "models", "source", "error" (see `table_error`), "profile".
    """

    target: str
    device: str
    runtime: str
    fingerprint: str
    taken_at: str
    rows: Mapping[OperatorCall, Row]
    scale: float = 1.0
    dispatch: float = 0.0
    overhead: float = 0.0
    spread: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def keys(self) -> tuple[OperatorCall, ...]:
        """The operators of the table, in order."""
        return tuple(self.rows)

    def lookup(self, calls: Sequence[OperatorCall]) -> tuple[float, float | None, float | None, tuple[str, ...]]:
        """Latency of one network: seconds, both ends of its 95 % interval, and flags.

        Flags name operators that are interpolated, extrapolated or missing. Missing ones count for nothing, so the
        interval is unknown (None) then, as it is in tables without timed networks.

        Args:
            calls: as `read_operators` gives them.
        """
        keys = self.as_keys(calls)
        found = {key: self.estimate(key) for key in keys}
        seconds = self.overhead
        variance = 0.0
        for key, count in _counted(keys).items():
            known = found[key]
            seconds += count * self._cost(known)
            if known.how != MEASURED:  # errors of what was measured are in the spread already
                variance += (count * self.scale * (known.high - known.low) / 2) ** 2
        flags = tuple(
            _flag(how, [key for key in dict.fromkeys(keys) if found[key].how == how])
            for how in (INTERPOLATED, EXTRAPOLATED, MISSING)
            if any(known.how == how for known in found.values())
        )
        seconds = max(seconds, 0.0)
        if self.spread is None or any(known.how == MISSING for known in found.values()):
            return seconds, None, None, flags
        half = math.hypot(self.spread * seconds, math.sqrt(variance))
        return seconds, max(0.0, seconds - half), seconds + half, flags

    def as_keys(self, calls: Iterable[OperatorCall]) -> tuple[OperatorCall, ...]:
        """What the calls of one network are looked up by."""
        keys = tuple(operator_key(call) for call in calls)
        if self.target in _HALF_IS_SHARED and any(key.weight_bits == 16 for key in keys):
            return tuple(_in_half(key) for key in keys)
        return keys

    def estimate(self, key: OperatorCall) -> Estimate:
        """What the table says of one operator."""
        known = self._estimates.get(key)
        if known is None:
            known = self._estimates[key] = self._estimate(key)
        return known

    def costs(self, keys: Sequence[OperatorCall]) -> np.ndarray:
        """Seconds that each operator adds to a network's latency, shape (keys,); 0 for missing ones."""
        return np.array([self._cost(self.estimate(key)) for key in keys], float)

    def seconds(self, counts: np.ndarray, keys: Sequence[OperatorCall] | None = None) -> np.ndarray:
        """Latencies of many networks at once, shape (networks,).

        Args:
            counts: (networks, keys), how often each has each operator; see `count_operators`.
            keys: what the columns stand for; the table's own operators by default.
        """
        found = np.asarray(counts) @ self.costs(self.keys if keys is None else keys) + self.overhead
        return np.maximum(found, 0.0)

    def count_operators(
        self, networks: Sequence[Sequence[OperatorCall]]
    ) -> tuple[tuple[OperatorCall, ...], np.ndarray]:
        """Distinct operators of many networks, and how often each has each, shape (networks, keys)."""
        columns: dict[OperatorCall, int] = {}
        counts: list[dict[int, int]] = []
        # Networks repeat the same few operators: each is looked at once, in float and in bfloat16.
        known: dict[tuple[OperatorCall, bool], int] = {}
        shared = self.target in _HALF_IS_SHARED
        for calls in networks:
            half = shared and any(call.weight_bits == 16 for call in calls)
            row: dict[int, int] = {}
            for call in calls:
                at = known.get((call, half))
                if at is None:
                    key = _in_half(operator_key(call)) if half else operator_key(call)
                    at = known[call, half] = columns.setdefault(key, len(columns))
                row[at] = row.get(at, 0) + 1
            counts.append(row)
        matrix = np.zeros((len(networks), len(columns)), np.int32)
        for number, row in enumerate(counts):
            matrix[number, list(row)] = list(row.values())
        return tuple(columns), matrix

    def seconds_of_channels(
        self, calls: Sequence[OperatorCall], channels: np.ndarray, bits: np.ndarray | None = None
    ) -> np.ndarray:
        """Latencies of one network with many choices of its channels (and bits), shape (choices,).

        Args:
            calls: of the network.
            channels: (choices, calls, 2), input and output channels of each operator.
            bits: (choices, calls), widths of weights and activations; those of `calls` by default.
        """
        channels = np.asarray(channels)
        expected = (len(channels), len(calls), 2)
        if channels.shape != expected or (bits is not None and np.shape(bits) != expected[:2]):
            raise InputError(f"channels: expected the shape (choices, {len(calls)}, 2), and bits without the last")
        widths = np.zeros(expected[:2], int) if bits is None else np.asarray(bits)
        shared = self.target in _HALF_IS_SHARED and bits is not None
        half = (widths == 16).any(1) if shared else np.zeros(len(channels), bool)
        total = np.full(len(channels), self.overhead)
        for at, call in enumerate(calls):
            choices = np.column_stack([channels[:, at], widths[:, at], half])
            distinct, which = np.unique(choices, axis=0, return_inverse=True)
            keys = []
            for inputs, outputs, width, halved in distinct.tolist():
                changed = with_channels(call, inputs, outputs)
                key = operator_key(changed if bits is None else _in_bits(changed, width))
                keys.append(_in_half(key) if halved else key)
            total += self.costs(keys)[which.reshape(-1)]
        return np.maximum(total, 0.0)

    def write(self, path: Path) -> None:
        """Write the table as Parquet; a reader never sees half of it."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        records = [{**_record(key), **dataclasses.asdict(row)} for key, row in self.rows.items()]
        for record in records:
            record |= {"runtime": self.runtime, "device": self.device, "fingerprint": self.fingerprint}
        table = pa.Table.from_pylist(records, schema=_schema())
        about = {
            entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self) if entry.name not in ("rows",)
        }
        table = table.replace_schema_metadata({"format": FORMAT, "autocompress": json.dumps(about)})
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        pq.write_table(table, part)
        part.replace(path)

    @functools.cached_property
    def _estimates(self) -> dict[OperatorCall, Estimate]:
        return {}

    @functools.cached_property
    def _families(self) -> dict[OperatorCall, tuple[ChannelCosts, float]]:
        """Costs by family, and the mean number of nodes."""
        members: dict[OperatorCall, list[OperatorCall]] = {}
        for key in self.rows:
            members.setdefault(family(key), []).append(key)
        return {
            name: (
                fit_channel_costs([channels_of(key) for key in keys], [self.rows[key].seconds for key in keys]),
                float(np.mean([self.rows[key].nodes for key in keys])),
            )
            for name, keys in members.items()
        }

    def _estimate(self, key: OperatorCall) -> Estimate:
        row = self.rows.get(key)
        if row is not None:
            return Estimate(row.seconds, row.low, row.high, row.nodes, MEASURED)
        # An activation that is computed along costs little: the same operator with another one is the next best.
        others = [key, *(dataclasses.replace(key, fused=fused) for fused in self._fused if fused != key.fused)]
        for other in others[1:]:
            if (row := self.rows.get(other)) is not None:
                return Estimate(row.seconds, row.low, row.high, row.nodes, INTERPOLATED)
        for other in others:
            found = self._families.get(family(other))
            if found is not None:
                costs, nodes = found
                inputs, outputs = channels_of(key)
                seconds = costs.at(inputs, outputs)
                how = INTERPOLATED if costs.holds(inputs, outputs) else EXTRAPOLATED
                low, high = (max(0.0, seconds * (1 - costs.spread)), seconds * (1 + costs.spread))
                return Estimate(seconds, low, high, nodes, how)
        return Estimate(0.0, 0.0, 0.0, 0.0, MISSING)

    @functools.cached_property
    def _fused(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(key.fused for key in self.rows))

    def _cost(self, known: Estimate) -> float:
        return self.scale * known.seconds + self.dispatch * known.nodes


def operator_key(call: OperatorCall) -> OperatorCall:
    """What tells operators apart: everything but the name and what follows from the rest."""
    return dataclasses.replace(call, name="", macs=0, weight_bytes=0)


def read_table(path: Path) -> LookupTable:
    """A table that `LookupTable.write` wrote.

    Raises:
        InputError: no such file, or no operator table.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise InputError(f"{path}: there is no such file; expected an operator table (autocompress hardware profile)")
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} is no readable Parquet file") from error
    metadata = table.schema.metadata or {}
    if metadata.get(b"format", b"").decode() != FORMAT:
        raise InputError(
            f"{path} is no operator table; tables of others come in by `autocompress hardware import {path.name}`"
        )
    rows = {}
    for record in table.to_pylist():
        names = [entry.name for entry in dataclasses.fields(Row)]
        row = Row(**{name: record[name] for name in names})
        rows[_key(record)] = dataclasses.replace(row, observations=tuple(row.observations))
    return LookupTable(rows=rows, **json.loads(metadata[b"autocompress"]))


def describe(key: OperatorCall) -> str:
    """Such as "conv 3x3 16x32x32 -> 32x16x16 int8"."""
    kernel = f" {_text(key.kernel)}" if key.kernel else ""
    first = _text(key.input_shapes[0][1:]) if key.input_shapes else "?"
    width = max(key.weight_bits, key.activation_bits) if key.kind in ("conv", "depthwise", "linear") else 32
    bits = "" if width == 32 else f" {width:g} bits"
    return f"{key.kind}{kernel} {first} -> {_text(key.output_shape[1:])}{bits}"


def _flag(how: str, keys: Sequence[OperatorCall]) -> str:
    rest = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return f"{how}: {', '.join(describe(key) for key in keys[:SHOWN])}{rest}"


def _counted(keys: Iterable[OperatorCall]) -> dict[OperatorCall, int]:
    counts: dict[OperatorCall, int] = {}
    for key in keys:
        counts[key] = counts.get(key, 0) + 1
    return counts


def _in_half(key: OperatorCall) -> OperatorCall:
    """The operator in a file whose floating point runs in bfloat16."""
    return dataclasses.replace(
        key,
        weight_bits=min(key.weight_bits, 16),
        activation_bits=min(key.activation_bits, 16),
    )


def _in_bits(call: OperatorCall, width: int) -> OperatorCall:
    """A layer with other widths; inputs stay in floating point above 8 bits. Other operators are left as they are."""
    if call.kind not in ("conv", "depthwise", "linear"):
        return call
    return dataclasses.replace(call, weight_bits=width, activation_bits=width if width <= 8 else 32)


def _text(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def _sizes(text: str) -> Shape:
    return tuple(int(size) for size in text.split("x")) if text else ()


def _record(key: OperatorCall) -> dict[str, Any]:
    shapes = {name: _text(getattr(key, name)) for name in (*_SHAPES, "output_shape")}
    inputs = ",".join(_text(shape) for shape in key.input_shapes)
    return {**{name: getattr(key, name) for name in _PLAIN}, **shapes, "input_shapes": inputs, "sparsity": ""}


def _key(record: Mapping[str, Any]) -> OperatorCall:
    fields: dict[str, Any] = {name: _sizes(record[name]) for name in (*_SHAPES, "output_shape")}
    fields |= {name: record[name] for name in _PLAIN}
    inputs = tuple(_sizes(text) for text in record["input_shapes"].split(",") if text)
    return OperatorCall(name="", input_shapes=inputs, **fields)


def _schema() -> Any:
    import pyarrow as pa

    texts = ("kind", "op_type", "input_shapes", "output_shape", *_SHAPES, "fused", "sparsity")
    numbers = ("weight_bits", "activation_bits", "seconds", "low", "high", "nodes")
    return pa.schema(
        [(name, pa.string()) for name in texts]
        + [("groups", pa.int64()), ("samples", pa.int64())]
        + [(name, pa.float64()) for name in numbers]
        + [("observations", pa.list_(pa.float64()))]
        + [(name, pa.string()) for name in ("runtime", "device", "fingerprint")]
    )
