"""The end of a search: its front measured again on the test split, and in doubt once more."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..core.codec import decode_plan
from ..core.errors import AutocompressError, DeviceLostError
from ..core.types import Measurement
from ..evaluators.pipeline import Evaluator
from ..studies.study import SESSIONS, Record, Study

if TYPE_CHECKING:
    from .run import Watcher


def measure_front(evaluator: Evaluator, study: Study, watcher: Watcher, seconds: float) -> None:
    """Measure the front and the baselines again, on the test split, with nothing else running.

    Points that decide over the front by where in their intervals the device's figures lie are measured in turns, always
    beside the untouched model, until none is left or time is up.

    Args:
        seconds: for these further measurements.
    """
    records = study.records()
    best = study.front_trials(records)
    again = [r for r in records if r.artifact is not None and (r.trial in best or r.baseline)]
    for number, record in enumerate(again):
        watcher.measuring(number, len(again))
        _measure(evaluator, study, record, record.metrics, "test", watcher)
    _settle(evaluator, study, {record.trial: record for record in again}, watcher, seconds)


def _settle(
    evaluator: Evaluator, study: Study, records: Mapping[int, Record], watcher: Watcher, seconds: float
) -> None:
    """Measure doubtful points in turns until none is left or time is up."""
    times: Counter[int] = Counter()
    failed: set[int] = set()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        known = study.measured_again()
        doubtful = [
            trial
            for trial in study.doubtful()
            if trial in records and trial in known and trial not in failed and times[trial] < SESSIONS - 1
        ]
        for trial in doubtful:
            left = end - time.monotonic()
            if left <= 0:
                break
            watcher.settling(len(doubtful), left)
            times[trial] += 1
            if not _measure(evaluator, study, records[trial], known[trial], "", watcher):
                failed.add(trial)
        if not doubtful:
            break
    if times:
        watcher.settled(len(times), sum(times.values()), len(study.doubtful()))


def _measure(
    evaluator: Evaluator, study: Study, record: Record, known: Mapping[str, Measurement], split: str, watcher: Watcher
) -> bool:
    """Measure one trial and record it; False where that failed. Without a split, its accuracy stays as it is known."""
    assert record.artifact is not None
    try:
        metrics = evaluator.again(record.artifact, decode_plan(record.plan), known, split)
    except DeviceLostError:
        raise  # which says nothing about the trial
    except (AutocompressError, RuntimeError, OSError) as error:
        # The point keeps the figures that it has.
        watcher.trouble(f"trial {record.trial} could not be measured again: {error}")
        return False
    study.add_again(record.trial, "test", metrics)
    return True
