"""Boards that are not here: what their latency models are fitted to, predict, and refuse to vouch for."""

from __future__ import annotations

import json
import os
import runpy
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from autocompress import Prune, Quantize, Task
from autocompress.core.errors import InputError
from autocompress.core.types import Method
from autocompress.hardware.boards import SHIPPED, TABLE, BoardBackend, encode_board, read_boards
from autocompress.hardware.costs import COLUMNS, call_features, cost_prior, fit_costs
from autocompress.hardware.files import read_file
from autocompress.hardware.onnx_export import export_onnx
from autocompress.hardware.operators import OperatorCall, read_operators
from autocompress.hardware.targets import find_backend, make_backend
from autocompress.hardware.traced import operators_of
from autocompress.tasks.models import CifarResNet

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "fit_boards.py"
CELL = (1, -1, 2, 3, 0, 1)  # 3x3 convolution and nothing, 1x1 twice, pooling, skip: numbers of `OPERATORS`


class Cell(nn.Module):
    """CELL on some channels, as NAS-Bench-201 builds it: ReLU, convolution, batch norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        kernels = {(0, 1): 1, (1, 2): 3, (2, 3): 1}
        self.convs = nn.ModuleDict(
            {
                f"{start}{end}": nn.Sequential(
                    nn.ReLU(),
                    nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=False),
                    nn.BatchNorm2d(channels),
                )
                for (start, end), kernel in kernels.items()
            }
        )
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.convs["01"](x)
        second = self.convs["12"](first)
        return self.pool(x) + first + self.convs["23"](second)


class Residual(nn.Module):
    """The block between two stages."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.ReLU(), nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs))
        self.b = nn.Sequential(nn.ReLU(), nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs))
        self.down = nn.Sequential(nn.AvgPool2d(2, 2), nn.Conv2d(inputs, outputs, 1, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x)) + self.down(x)


def nasbench_network() -> nn.Module:
    """The whole network of CELL."""
    cells = [[Cell(channels) for _ in range(5)] for channels in (16, 32, 64)]
    stem = (nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16))
    body = (*cells[0], Residual(16, 32), *cells[1], Residual(32, 64), *cells[2])
    head = (nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return nn.Sequential(*stem, *body, *head).eval()


@pytest.fixture(scope="module")
def nasbench() -> pd.DataFrame:
    """The measured table."""
    for folder in (os.environ.get("AUTOCOMPRESS_DATA"), ROOT.parent / "shared" / "data"):
        if folder and (path := Path(folder) / "nasbench201_hardware.parquet").is_file():
            return pd.read_parquet(path)
    pytest.skip("nasbench201_hardware.parquet is neither in $AUTOCOMPRESS_DATA nor in ../shared/data")


def test_the_fitted_networks_are_those_that_a_converter_makes(tmp_path: Path) -> None:
    network_calls = runpy.run_path(str(SCRIPT))["network_calls"]
    path = tmp_path / "model.onnx"
    export_onnx(nasbench_network(), torch.zeros(1, 3, 32, 32), path, "any")
    # The cell as a table names it: operators 0 skip, 1 1x1, 2 3x3, 3 pool on edges 01, 02, 12, 03, 13, 23.
    made = network_calls(CELL, False)
    exported = read_operators(path)
    np.testing.assert_allclose(call_features([made]), call_features([exported]), rtol=1e-3)


def test_costs_are_recovered_from_networks_that_cost_just_so() -> None:
    rng = np.random.default_rng(0)
    prior = cost_prior()
    sizes = np.exp(-prior.mean)
    features = rng.uniform(0, 1, (400, len(COLUMNS))) * sizes
    costs = np.exp(prior.mean + rng.normal(0, 1, len(COLUMNS)))
    found, covariance = fit_costs(features[:300], features[:300] @ costs, prior, 0.01)
    np.testing.assert_allclose(features[300:] @ np.exp(found), features[300:] @ costs, rtol=0.02)
    assert (np.diag(covariance) < 0.1 * np.diag(prior.covariance)).all()


def test_outliers_do_not_spoil_a_fit() -> None:
    rng = np.random.default_rng(0)
    prior = cost_prior()
    features = rng.uniform(0, 1, (400, len(COLUMNS))) * np.exp(-prior.mean)
    latencies = features.sum(1)
    latencies[::20] *= 10
    log_costs, _ = fit_costs(features, latencies, prior, 0.02)
    assert np.median(np.abs(features @ np.exp(log_costs) / features.sum(1) - 1)) < 0.02


@pytest.mark.parametrize(("name", "mape", "correlation"), [("pixel3", 0.1, 0.96), ("samsung_a50", 0.05, 0.97)])
def test_what_ships_states_errors_that_hold(nasbench: pd.DataFrame, name: str, mape: float, correlation: float) -> None:
    script = runpy.run_path(str(SCRIPT))
    board = read_boards()[name]
    chosen, running, usable = script["nasbench201_edges"](list(nasbench["arch"]))
    ran = script["RAN"].index(board.errors["ran"])
    rows = np.random.default_rng(1).choice(np.flatnonzero(usable), 300, replace=False)
    cells = np.where(running[ran][rows], chosen[rows], -1).tolist()
    features = board.model.features(script["network_calls"](cell, ran == 0) for cell in cells)
    truth = nasbench[f"lat_ms_{name}"].to_numpy()[rows] / 1e3
    mean, low, high = board.model.predict(features)
    assert np.mean(np.abs(mean / truth - 1)) < mape
    assert spearmanr(mean, truth).statistic > correlation
    assert 0.91 < np.mean((low <= truth) & (truth <= high)) < 0.99
    assert board.errors["mape"] < mape


def test_the_shipped_table_names_its_source_and_licence() -> None:
    entries = json.loads(TABLE.read_text())
    assert tuple(entries) == SHIPPED
    for entry in entries.values():
        assert "MIT licence" in entry["source"]
        assert "HayeonLee/HELP" in entry["source"]
        assert {"mape", "spearman", "repeat_noise"} <= set(entry["held_out"])
        assert all(seconds > 0 for seconds in entry["seconds"].values())


def test_boards_survive_their_file() -> None:
    for board in read_boards().values():
        again = json.loads(json.dumps(encode_board(board)))
        assert again == encode_board(board)


def calls_of(model: nn.Module, *shape: int) -> tuple[OperatorCall, ...]:
    return operators_of(model.eval(), torch.zeros(1, *shape))


def test_resnet20_is_among_the_fitted_networks_and_others_are_told_apart() -> None:
    model = read_boards()["pixel3"].model
    assert model.extrapolations(calls_of(CifarResNet(20, 10), 3, 32, 32)) == ()
    deep = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.Conv2d(8, 8, 1, groups=2))
    assert model.extrapolations(calls_of(deep, 3, 32, 32)) == (
        "depthwise convolutions",
        "grouped convolutions",
        "much smaller than any fitted network",
    )
    wide = nn.Sequential(nn.Conv2d(3, 256, 3, 2, 1), nn.Conv2d(256, 64, 3, 1, 1))
    assert model.extrapolations(calls_of(wide, 3, 128, 128)) == (
        "layers of 256 channels, fitted up to 64",
        "4096 pixels in a layer, fitted up to 1024",
    )
    linear = nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1), nn.Flatten(), nn.Linear(64 * 1024, 1000))
    reasons = model.extrapolations(calls_of(linear, 3, 32, 32))
    assert "more in linear layers than in any fitted network" in reasons


def test_ten_thousand_networks_are_predicted_within_a_second() -> None:
    model = read_boards()["pixel3"].model
    row = model.features([calls_of(CifarResNet(20, 10), 3, 32, 32)])
    features = row * np.random.default_rng(0).uniform(0.1, 1, (10_000, 1))
    started = time.perf_counter()
    mean, low, high = model.predict(features)
    assert time.perf_counter() - started < 1
    assert mean.shape == (10_000,)
    assert ((low < mean) & (mean < high)).all()
    with pytest.raises(InputError, match=f"a matrix of {len(COLUMNS)} columns"):
        model.predict(features[:, :3])


@pytest.fixture(scope="module")
def backend() -> BoardBackend:
    made = make_backend("arm/pixel3", threads=1)
    assert isinstance(made, BoardBackend)
    return made


def test_a_file_is_predicted_and_said_to_be(backend: BoardBackend, digits_task: Task, tmp_path: Path) -> None:
    path = tmp_path / "resnet20.onnx"
    export_onnx(CifarResNet(20, 10).eval(), torch.zeros(1, 3, 32, 32), path, "any")
    artifact, task = read_file(path, backend.name)
    latency, reference = backend.measure(artifact, task, artifact)
    assert (latency.name, latency.unit, reference.name) == ("latency", "s", "reference_latency")
    assert latency.provenance.method is Method.PREDICTED
    assert latency.provenance.device == "Google Pixel 3 (predicted)"
    assert latency.provenance.flags == ()
    assert latency.samples > 15_000
    assert latency.ci95 is not None
    # NAS-Bench-201 networks of 40 million multiply-accumulates in 3x3 convolutions take 6 to 9 ms there.
    assert 5e-3 < latency.value < 1e-2
    assert latency.ci95[0] < latency.value < latency.ci95[1]


def test_networks_beyond_the_fitted_ones_have_no_interval(
    backend: BoardBackend, digits_task: Task, tmp_path: Path
) -> None:
    whole = backend.build(digits_task.build(), digits_task, tmp_path / "whole")
    cut = backend.build(Prune(0.5)(digits_task.build(), digits_task), digits_task, tmp_path / "cut")
    rounded = Quantize(8, outputs="all")(digits_task.build(), digits_task)
    int8 = backend.build(rounded, digits_task, tmp_path / "int8")
    assert (whole.runtime, backend.capabilities.emulated) == ("arm/pixel3", True)
    latency, reference = backend.measure(cut, digits_task, whole)
    assert latency.value < reference.value
    assert latency.ci95 is None
    assert latency.provenance.flags == ("extrapolated: much smaller than any fitted network",)
    as_float, _ = backend.measure(int8, digits_task, whole)
    assert as_float.value == pytest.approx(reference.value, rel=0.1)
    assert "extrapolated: 8-bit layers, timed as float" in as_float.provenance.flags
    logits = backend.predict(whole, np.zeros((3, 1, 8, 8), np.float32))
    assert logits.shape == (3, 10)


def test_a_board_without_a_file_says_how_to_make_one(tmp_path: Path) -> None:
    assert "arm/board:PATH.json" in str(find_backend("arm/board").missing())
    with pytest.raises(InputError, match="there is no file"):
        find_backend(f"arm/board:{tmp_path / 'none.json'}")
    path = tmp_path / "board.json"
    for content, message in [
        ("{", "no readable JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "expected a finished calibration"),
        ('{"latency_model": null}', "expected a finished calibration"),
        ('{"latency_model": {"seconds": {}}}', "expected the latency model of a board"),
    ]:
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            find_backend(f"arm/board:{path}")
