"""Analysis: costs and sensitivities of layers, what is kept of them, and what a search makes of them."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autocompress import InputError, Prune, Quantize, Task, stock_space
from autocompress.compression.analysis import (
    RATIOS,
    WIDTHS,
    Sensitivity,
    profile_layers,
    rounding_errors,
    sensitivity,
    tolerated,
)
from autocompress.compression.graph import find_layers, fold_batchnorm
from autocompress.core.types import Capabilities
from autocompress.tasks.data import example_input, normalise

CallCli = Callable[..., tuple[int, str, str]]

TARGET = Capabilities((32, 8), ("latency",))


@pytest.fixture(scope="module")
def table(digits_task: Task) -> tuple[Sensitivity, ...]:
    """The digits model's."""
    return sensitivity(digits_task, images=200)


def test_a_profile_counts_what_each_layer_costs(digits_task: Task) -> None:
    profile = {layer.name: layer for layer in profile_layers(digits_task, repeats=5)}
    assert list(profile) == ["conv1", "conv2", "conv3", "fc"]
    assert profile["conv2"].parameters == 64 * 32 * 9
    assert profile["conv2"].macs == 64 * 32 * 9 * 16
    assert profile["conv2"].activation_bytes == 64 * 16 * 4
    assert profile["fc"].parameters == 64 * 10 + 10
    assert all(layer.seconds > 0 and layer.zeros == 0 for layer in profile.values())
    assert 0 < sum(layer.share for layer in profile.values()) < 1.2


def test_each_layer_is_cut_and_rounded_alone(digits_task: Task, table: tuple[Sensitivity, ...]) -> None:
    data = digits_task.data
    inputs = torch.from_numpy(normalise(data, data.search.inputs[:200]))
    labels = torch.from_numpy(data.search.labels[:200])
    entries = {(e.layer, e.change, e.amount): e for e in table}
    assert len(entries) == 4 * len(WIDTHS) + 3 * len(RATIOS)
    for change, amount, step in (
        ("prune", 0.5, Prune({"conv2": 0.5}, round_to=1)),
        ("bits", 3, Quantize({"conv2": 3}, samples=64)),
    ):
        with torch.no_grad():
            base = digits_task.build()(inputs).double().log_softmax(1)
            changed = step(digits_task.build(), digits_task)(inputs).double().log_softmax(1)
        found = entries["conv2", change, amount]
        assert found.divergence == pytest.approx(float((base.exp() * (base - changed)).sum(1).mean()), rel=1e-3)
        rise = float(F.nll_loss(changed, labels) - F.nll_loss(base, labels))
        assert found.loss == pytest.approx(rise, rel=1e-3)


def test_the_table_is_computed_once(digits_task: Task, table: tuple[Sensitivity, ...]) -> None:
    layers: list[int] = []
    again = sensitivity(digits_task, images=200, on_layer=lambda done, total: layers.append(done))
    assert again == table
    assert layers == []


def test_rounding_errors_are_those_of_the_folded_weights(digits_task: Task) -> None:
    model = digits_task.build()
    fold_batchnorm(model, find_layers(model, example_input(digits_task.data)))
    weight = model.get_submodule("conv3").weight.detach().numpy().astype(np.float64)  # type: ignore[union-attr,operator]
    scale = np.abs(weight).max((1, 2, 3), keepdims=True) / 7
    noise = np.round(weight / scale) * scale - weight
    found = {entry.layer: entry for entry in rounding_errors(digits_task, 4)}
    assert found["conv3"].sqnr == pytest.approx(10 * math.log10((weight**2).sum() / (noise**2).sum()), abs=0.05)
    assert sum(found["conv3"].counts) == weight.size


def test_a_group_tolerates_what_its_layers_tolerate_together() -> None:
    entries = [
        Sensitivity(layer, "prune", ratio, ratio * weight, 0.0, 0.0)
        for layer, weight in (("a", 1.0), ("b", 3.0))
        for ratio in (0.25, 0.5)
    ] + [Sensitivity("a", "bits", bits, 1 / bits, 0.0, 0.0) for bits in (8, 4, 2)]
    groups = {"one": ("a",), "two": ("a", "b"), "none": ("c",)}
    assert tolerated(entries, groups, 1.0, "prune") == {"one": 0.5, "two": 0.25, "none": 0.0}
    assert tolerated(entries, groups, 0.3, "bits") == {"one": 4, "two": 4, "none": 32}


def test_layers_that_are_cut_together_count_once(digits_task: Task) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.inner, self.outer = (nn.Conv2d(i, 8, 3, padding=1) for i in (1, 8, 8))
            self.fc = nn.Linear(8, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x).relu()
            x = x + self.outer(self.inner(x).relu())
            return self.fc(x.mean((2, 3)))

    torch.manual_seed(0)
    model = Block().eval()
    task = Task("block", lambda: copy.deepcopy(model), digits_task.data)
    table = sensitivity(task, ratios=(0.5,), bits=(8,), images=100)
    cuts = {entry.layer: entry for entry in table if entry.change == "prune"}
    assert cuts["stem"].tied == cuts["outer"].tied == ("stem", "outer")
    assert cuts["inner"].tied == ("inner",)
    apart = sum(entry.divergence or 0.0 for entry in cuts.values())
    together = apart - min(cuts[name].divergence or 0.0 for name in ("stem", "outer"))
    middle = (apart + together) / 2
    assert together < middle < apart
    assert tolerated(table, {"all": tuple(cuts)}, middle, "prune") == {"all": 0.5}


def test_a_space_is_narrowed_and_starts_from_what_is_harmless(
    digits_task: Task, table: tuple[Sensitivity, ...]
) -> None:
    wide = stock_space(digits_task, TARGET, granularity="layer", bits=(8, 4, 2))
    narrow = stock_space(digits_task, TARGET, granularity="layer", bits=(8, 4, 2), sensitivity=table)
    assert len(narrow.starts) == len(wide.starts) + 1
    assert narrow.widths["conv1"] == (8, 4)  # two bits make noise of it
    favourite = narrow.starts[-1]
    assert set(favourite) >= {"prune.conv1", "bits.conv1", "bits.fc"}
    assert favourite["bits.conv1"] in (8, 4)


def test_images_are_needed(digits_task: Task) -> None:
    with pytest.raises(InputError, match="images must be at least 1, not 0"):
        sensitivity(digits_task, images=0)


def test_the_command_prints_a_table_and_writes_a_page(
    call_cli: CallCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = call_cli("analyze", "digits-cnn", "--images", 200, "--out", "analysis")
    assert code == 0, err
    assert "conv3" in out
    assert "prune 50%" in out
    stored = json.loads((tmp_path / "analysis" / "analysis.json").read_text())
    assert [layer["name"] for layer in stored["layers"]] == ["conv1", "conv2", "conv3", "fc"]
    page = (tmp_path / "analysis" / "analysis.html").read_text()
    assert "Divergence after pruning this layer alone" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nonsense",), "unknown model 'nonsense'"),
        (("digits-cnn", "--images", "0"), "--images must be at least 1, not 0"),
        (("digits-cnn", "--rounding", "16"), "--rounding must lie in 2..8, not 16"),
    ],
)
def test_wrong_input_is_one_line(call_cli: CallCli, arguments: tuple[str, ...], message: str) -> None:
    code, _, err = call_cli("analyze", *arguments)
    assert code == 2
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
