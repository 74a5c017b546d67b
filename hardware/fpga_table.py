"""The table of circuits that were really synthesised, placed and routed: `tables/ecp5.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TABLE = Path(__file__).parent / "tables" / "ecp5.json"


def load_table(kind: str = "unit", path: Path = TABLE) -> list[dict[str, Any]]:
    """Rows of one kind of circuit, by column name.

    Kinds are "unit" (a whole matrix-vector-threshold unit), "product" (of one weight and one input) and "requantise"
    (of one row). `routed` is False after synthesis alone; then `fmax` (MHz) is None. `dsp_wanted` says whether
    multiplications were to go to the device's multipliers, `dsp` how many it took; `bram` are blocks of 18 kbit.
    """
    entry = json.loads(path.read_text())[kind]
    return [dict(zip(entry["columns"], row, strict=True)) for row in entry["rows"]]
