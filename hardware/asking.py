"""Processes of their own that measure or compile: a request as JSON goes in, an answer as JSON comes out.

A process of its own keeps a crash away from the search, starts every measurement from the same state, and can be
ended where it hangs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from ..core.errors import CandidateError


def ask(
    module: str, request: Mapping[str, Any], name: str, limit: float, work: str = "the measurement"
) -> dict[str, Any]:
    """Run `python -m MODULE` with the request on its standard input; what it prints is the answer.

    Args:
        name: of the target, for messages.
        limit: seconds after which it counts as hanging.
        work: what the process does, for messages.

    Raises:
        CandidateError: it failed, was killed, or hung.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", module],
            input=json.dumps(request),
            capture_output=True,
            timeout=limit,
            check=False,
            # What a runtime says of a broken file may hold the file's own bytes.
            encoding="utf-8",
            errors="replace",
        )
    except subprocess.TimeoutExpired as error:
        raise CandidateError(f"{name}: {work} hung for {limit:.0f} s") from error
    if done.returncode != 0:
        killed = done.returncode < 0
        reason = f"killed by signal {-done.returncode}" if killed else _last_line(done.stderr)
        raise CandidateError(f"{name}: {work} failed: {reason}")
    return json.loads(done.stdout)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1][:300]
