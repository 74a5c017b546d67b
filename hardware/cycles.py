"""The cycle of every word in a streaming accelerator, exactly, and without stepping through cycles.

Each unit's rule (`streams`) is a maximum of earlier cycles plus constants. The units' rules together have one least
solution, which is what the circuit does; it is found by applying them forwards and backwards until nothing moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..core.errors import CandidateError
from .streams import Stage, Times, paced

# Rounds after which units that still push each other on are taken to wait for each other.
ROUNDS = 20_000


@dataclass(frozen=True)
class Node:
    """A unit with the numbers of the streams that it takes and gives."""

    name: str
    stage: Stage
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class Pipeline:
    """Units in an order in which words move, from stream `source` to stream `sink`."""

    nodes: tuple[Node, ...]
    source: int
    sink: int

    @property
    def interval(self) -> int:
        """Cycles from one image to the next, if no FIFO is too small."""
        return max(node.stage.interval for node in self.nodes)

    @property
    def slowest(self) -> str:
        """Name of the unit that sets the interval."""
        return max(self.nodes, key=lambda node: node.stage.interval).name

    def words(self) -> dict[int, int]:
        """Words of each stream for one image."""
        counts: dict[int, int] = {}
        for node in self.nodes:
            for streams, numbers in ((node.inputs, node.stage.takes), (node.outputs, node.stage.gives)):
                for stream, number in zip(streams, numbers, strict=True):
                    if counts.setdefault(stream, number) != number:
                        raise ValueError(
                            f"stream {stream} at {node.name}: {counts[stream]} words on one side, {number}"
                        )
        return counts


@dataclass(frozen=True)
class Schedule:
    """When words are offered and taken, by stream; cycle 0 is that in which the first word is offered.

    Attributes:
        exact: whether these are the cycles of the circuit; otherwise they are bounds from below.
    """

    offered: dict[int, Times]
    taken: dict[int, Times]
    exact: bool


def solve(pipeline: Pipeline, images: int = 1, arrivals: Sequence[int] | None = None, rounds: int = ROUNDS) -> Schedule:
    """The schedule of some images that are offered without a pause, to a receiver that takes every word at once.

    Args:
        arrivals: the first cycle in which each word of the source may be offered; None for 0.
        rounds: at most; one round ignores that units wait for those behind them.

    Raises:
        CandidateError: units wait for each other and for ever: a FIFO is too small.
    """
    counts = {stream: number * images for stream, number in pipeline.words().items()}
    offered = {stream: np.zeros(number, np.int64) for stream, number in counts.items()}
    taken = {stream: np.zeros(number, np.int64) for stream, number in counts.items()}
    first = np.zeros(counts[pipeline.source], np.int64) if arrivals is None else np.asarray(arrivals, np.int64)
    limit = _longest(pipeline, images) + int(first.max(initial=0))
    versions = dict.fromkeys(counts, 0)
    seen: dict[Node, tuple[int, ...]] = {}

    def update(known: dict[int, Times], stream: int, times: Times) -> None:
        if not np.array_equal(times, known[stream]):
            known[stream] = times
            versions[stream] += 1

    for number in range(rounds):
        before = sum(versions.values())
        ahead = np.append(first[:1], taken[pipeline.source][:-1] + 1)
        update(offered, pipeline.source, np.maximum(paced(first), ahead))
        for node in pipeline.nodes if number % 2 == 0 else pipeline.nodes[::-1]:
            now = tuple(versions[stream] for stream in node.inputs + node.outputs)
            if seen.get(node) == now:
                continue
            seen[node] = now
            accepted, gives = node.stage.times(
                tuple(offered[stream] for stream in node.inputs),
                tuple(taken[stream] for stream in node.inputs),
                tuple(np.maximum(taken[stream], offered[stream]) for stream in node.outputs),
            )
            for stream, times in zip(node.inputs, accepted, strict=True):
                update(taken, stream, np.maximum(times, taken[stream]))
            for stream, times in zip(node.outputs, gives, strict=True):
                update(offered, stream, times)
        last = offered[pipeline.sink]
        update(taken, pipeline.sink, last)
        if sum(versions.values()) == before:
            return Schedule(offered, taken, True)
        if len(last) and last[-1] > limit:
            break
    if rounds < ROUNDS:
        return Schedule(offered, taken, False)
    raise CandidateError("units of the accelerator wait for each other for ever: a FIFO is too small")


def _longest(pipeline: Pipeline, images: int) -> int:
    """Cycles within which all is done, even if one unit after the other works."""
    return sum(8 * images * (node.stage.interval + 16) for node in pipeline.nodes)
