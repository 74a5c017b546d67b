"""Predicting a new device's latency from a few designed measurements."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from autocompress.core.errors import InputError
from autocompress.hardware.design import (
    Features,
    architecture_features,
    design_samples,
    nasbench201_features,
    token_features,
)
from autocompress.hardware.latency_tables import design_table, predict_table, read_table
from autocompress.hardware.prediction import fit_predictor

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "latency_prediction.py"
OPERATORS = ["none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3"]


def cell(*names: str) -> str:
    """The string of a cell with these operators, edge by edge."""
    return "|{}~0|+|{}~0|{}~1|+|{}~0|{}~1|{}~2|".format(*names)


def some_cells(count: int) -> list[str]:
    """Random cells."""
    rng = np.random.default_rng(0)
    return [cell(*rng.choice(OPERATORS, 6)) for _ in range(count)]


def made_up(
    features: Features, devices: int, noise: float, counting: int = 0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Latencies of known devices (candidates, devices) and of one that counts in its own way, linear in the counts."""
    rng = np.random.default_rng(seed)
    costs = np.array([2.0, 0.1, 1.0, 3.0, 0.5])[:, None] * rng.uniform(0.5, 2.0, (5, devices + 1))
    ones = np.ones((len(features), 1))
    exact = np.concatenate([ones, features.countings[0]], 1) @ costs
    exact[:, -1] = np.concatenate([ones, features.countings[counting]], 1) @ costs[:, -1]
    latencies = exact * (1 + noise * rng.standard_normal(exact.shape))
    latencies *= rng.uniform(1, 20, devices + 1)
    return latencies[:, :-1], latencies[:, -1]


@pytest.fixture(scope="module")
def nasbench() -> pd.DataFrame:
    """The measured table."""
    for folder in (os.environ.get("AUTOCOMPRESS_DATA"), ROOT.parent / "shared" / "data"):
        if folder and (path := Path(folder) / "nasbench201_hardware.parquet").is_file():
            return pd.read_parquet(path)
    pytest.skip("nasbench201_hardware.parquet is neither in $AUTOCOMPRESS_DATA nor in ../shared/data")


def known_devices(table: pd.DataFrame) -> pd.DataFrame:
    """Nine devices, none of which is of the four that results are reported on."""
    return table[[name for name in table if name.startswith("lat_ms_") and "titanx" not in name and "gold" not in name]]


@pytest.mark.parametrize("counting", [0, 1, 2])
def test_a_linear_device_is_recovered_whichever_way_it_counts(counting: int) -> None:
    features = nasbench201_features(some_cells(3000))
    sources, target = made_up(features, devices=6, noise=0.005, counting=counting)
    indices = design_samples(features, sources, 12)
    mean, low, high = fit_predictor(features, sources, indices, target[indices]).predict(features)
    usable = features.usable
    assert np.median(np.abs(mean / target - 1)[usable]) < 0.02
    assert spearmanr(mean[usable], target[usable]).statistic > 0.99
    assert (low <= mean).all()
    assert (mean <= high).all()


def test_predictions_scale_with_the_unit_of_the_measurements() -> None:
    features = nasbench201_features(some_cells(500))
    sources, target = made_up(features, devices=4, noise=0.05)
    indices = design_samples(features, sources, 10)
    in_ms = fit_predictor(features, sources, indices, target[indices]).predict(features)
    in_s = fit_predictor(features, sources * 7, indices, target[indices] / 1000).predict(features)
    for one, other in zip(in_ms, in_s, strict=True):
        np.testing.assert_allclose(one / 1000, other, rtol=1e-6, atol=1e-9)


def test_the_units_of_the_features_do_not_matter() -> None:
    features = nasbench201_features(some_cells(500))
    sources, target = made_up(features, devices=4, noise=0.05)
    scaled = Features(tuple(matrix * [1, 1e6, 1e-3, 40] for matrix in features.countings), features.usable)
    indices = design_samples(features, sources, 10)
    assert indices.tolist() == design_samples(scaled, sources, 10).tolist()
    plain = fit_predictor(features, sources, indices, target[indices]).predict(features)
    other = fit_predictor(scaled, sources, indices, target[indices]).predict(scaled)
    for one, two in zip(plain, other, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6 * target.mean())


def test_dead_branches_are_not_counted_by_compilers_that_prune_them() -> None:
    # Node 1 is read by nobody; node 2 is fed by nothing; both at once; everything lives.
    archs = [
        cell("nor_conv_3x3", "skip_connect", "none", "nor_conv_1x1", "none", "avg_pool_3x3"),
        cell("none", "none", "nor_conv_3x3", "nor_conv_1x1", "avg_pool_3x3", "avg_pool_3x3"),
        cell("nor_conv_3x3", "none", "none", "skip_connect", "none", "nor_conv_3x3"),
        cell(*["nor_conv_1x1"] * 6),
    ]
    features = nasbench201_features(archs)
    everything, read, live = features.countings  # columns: skip, 1x1, 3x3, pool
    assert everything.tolist() == [[1, 1, 1, 1], [0, 1, 1, 2], [1, 0, 2, 0], [0, 6, 0, 0]]
    assert read.tolist() == [[1, 1, 0, 1], [0, 1, 1, 2], [1, 0, 1, 0], [0, 6, 0, 0]]
    assert live.tolist() == [[1, 1, 0, 1], [0, 1, 0, 0], [1, 0, 0, 0], [0, 6, 0, 0]]
    assert features.usable.all()


def test_a_network_whose_output_is_cut_off_is_never_measured_nor_predicted_fastest() -> None:
    cut = cell("nor_conv_3x3", "nor_conv_3x3", "nor_conv_3x3", "none", "none", "none")
    empty = cell(*["none"] * 6)
    features = nasbench201_features([*some_cells(400), cut, empty])
    assert not features.usable[-2:].any()
    # A device whose compiler drops what nobody reads: what is cut off takes no time.
    sources, target = made_up(features, devices=5, noise=0.01, counting=2)
    target = np.where(features.usable, target, 1e-3)
    indices = design_samples(features, sources, 10)
    assert features.usable[indices].all()
    mean, _, _ = fit_predictor(features, sources, indices, target[indices]).predict(features)
    assert mean[~features.usable].min() > mean[features.usable].min()


def test_tokens_describe_architectures_of_other_spaces() -> None:
    places = token_features(["3 0 8", "3 1 8", "2 0 8"])
    # The third place never varies; the others have two tokens each.
    assert places.countings[0].tolist() == [[0, 1, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0]]
    bags = architecture_features(["conv-conv-pool", "conv", "pool pool"])
    assert bags.countings[0].tolist() == [[2, 1], [1, 0], [0, 2]]
    assert architecture_features(some_cells(5)).countings[0].shape == (5, 4)


def test_greedy_designs_beat_random_ones_on_devices_left_out(nasbench: pd.DataFrame) -> None:
    features = nasbench201_features(list(nasbench["arch"]))
    table = known_devices(nasbench)
    allowed = np.flatnonzero(features.usable)[2000:]
    checked = np.flatnonzero(features.usable)[500:1500]
    found: dict[str, list[float]] = {"greedy": [], "random": []}
    held = []
    for device in table:
        sources, target = table.drop(columns=device).to_numpy(), table[device].to_numpy()
        for method, correlations in found.items():
            indices = design_samples(features, sources, 10, method=method, seed=0, allowed=allowed)
            assert len(set(indices)) == 10
            assert set(indices) <= set(allowed)
            predictor = fit_predictor(features, sources, indices, target[indices])
            mean, low, high = predictor.predict(features.take(checked))
            correlations.append(spearmanr(mean, target[checked]).statistic)
            if method == "greedy":
                held.append(np.mean((low <= target[checked]) & (target[checked] <= high)))
    assert np.mean(found["greedy"]) > np.mean(found["random"]) + 0.005
    assert np.mean(found["greedy"]) > 0.95
    # Nominal 95 % intervals, on devices that nothing was calibrated on.
    assert 0.90 < np.mean(held) <= 1.0


def test_intervals_are_narrow_for_quiet_devices_and_hold_95_percent_of_noisy_ones() -> None:
    features = nasbench201_features(some_cells(2000))
    widths, held = [], []
    for noise in (0.01, 0.1):
        for seed in range(4):
            sources, target = made_up(features, devices=6, noise=noise, seed=seed)
            indices = design_samples(features, sources, 10, seed=seed)
            mean, low, high = fit_predictor(features, sources, indices, target[indices]).predict(features)
            inside = ((low <= target) & (target <= high))[features.usable]
            held.append(inside.mean())
            widths.append(np.median((high - low) / mean))
    assert np.mean(held) > 0.95
    assert np.mean(widths[:4]) < 0.5 * np.mean(widths[4:])


def test_ten_thousand_candidates_are_predicted_in_one_quick_call() -> None:
    features = nasbench201_features(some_cells(10_000))
    sources, target = made_up(features, devices=6, noise=0.02)
    indices = design_samples(features, sources, 10)
    predictor = fit_predictor(features, sources, indices, target[indices])
    started = time.perf_counter()
    mean, low, high = predictor.predict(features)
    assert time.perf_counter() - started < 0.5
    assert mean.shape == low.shape == high.shape == (10_000,)
    again = predictor.predict(features.take([17, 4]))[0]
    np.testing.assert_allclose(again, mean[[17, 4]])


def test_designs_depend_on_nothing_but_their_seed() -> None:
    features = nasbench201_features(some_cells(600))
    sources, _ = made_up(features, devices=4, noise=0.02)
    for method in ("greedy", "random"):
        first = design_samples(features, sources, 10, method=method, seed=1)
        assert first.tolist() == design_samples(features, sources, 10, method=method, seed=1).tolist()
        assert first.tolist() != design_samples(features, sources, 10, method=method, seed=2).tolist()


def test_a_plain_matrix_of_counts_will_do() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 5, (300, 3)).astype(float)
    latencies = 1 + counts @ rng.uniform(0.5, 2.0, (3, 5))
    indices = design_samples(counts, latencies[:, :4], 8)
    mean, _, _ = fit_predictor(counts, latencies[:, :4], indices, latencies[indices, 4]).predict(counts)
    np.testing.assert_allclose(mean, latencies[:, 4], rtol=0.05)


def test_what_does_not_fit_together_is_refused() -> None:
    counts = np.arange(40.0).reshape(20, 2)
    sources = np.ones((20, 3)) + counts[:, :1]
    with pytest.raises(InputError, match="at least 3 measurements, got 2"):
        fit_predictor(counts, sources, [0, 1], [1.0, 2.0])
    with pytest.raises(InputError, match="one latency for each index"):
        fit_predictor(counts, sources, [0, 1, 2], [1.0, 2.0])
    with pytest.raises(InputError, match="different row numbers"):
        fit_predictor(counts, sources, [0, 1, 1], [1.0, 2.0, 3.0])
    with pytest.raises(InputError, match="above 0"):
        fit_predictor(counts, sources, [0, 1, 2], [1.0, 2.0, 0.0])
    with pytest.raises(InputError, match="two known devices"):
        design_samples(counts, sources[:, :1], 5)
    with pytest.raises(InputError, match="missing, infinite or negative"):
        design_samples(counts, sources * np.nan, 5)
    with pytest.raises(InputError, match="1 to 20"):
        design_samples(counts, sources, 21)
    with pytest.raises(InputError, match="greedy or random"):
        design_samples(counts, sources, 5, method="clever")
    with pytest.raises(InputError, match="expected 2 a candidate, got 3"):
        fit_predictor(counts, sources, [0, 9, 19], [1.0, 2.0, 3.0]).predict(np.ones((4, 3)))
    with pytest.raises(InputError, match="NAS-Bench-201 cell"):
        nasbench201_features(["|max_pool~0|"])


def refusal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[object, str]:
    """Exit code and message of the benchmark script, run in this process, which must print nothing else."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return stopped.value.code, printed.err


@pytest.fixture(scope="module")
def small_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up table as CSV: 400 cells on four devices."""
    archs = some_cells(400)
    sources, target = made_up(nasbench201_features(archs), devices=3, noise=0.02)
    path = tmp_path_factory.mktemp("tables") / "table.csv"
    columns = {f"lat_ms_{name}": sources[:, number] for number, name in enumerate("abc")}
    pd.DataFrame({"arch": archs, "lat_ms_x": target, **columns}).to_csv(path, index=False)
    return path


def test_the_benchmark_writes_a_row_for_each_device_and_seed(small_table: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    options = ["--sources", "a,b", "--device", "x", "--device", "c", "--samples", "10"]
    options += ["--design", "greedy", "--seeds", "2", "--rows", "100:300"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--table", str(small_table), *options, "--json", str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())
    assert [(row["device"], row["seed"]) for row in rows] == [("x", 0), ("x", 1), ("c", 0), ("c", 1)]
    assert all(row["samples"] == 10 and row["design"] == "greedy" for row in rows)
    assert all(row["spearman"] > 0.95 and 0 < row["mape"] < 0.1 and 0.8 < row["coverage"] <= 1 for row in rows)
    assert "Spearman" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "y"], "unknown device 'y'"),
        (["--sources", "a,z"], "unknown source device 'z'"),
        (["--sources", "a,x", "--device", "x"], "x is among --sources"),
        (["--sources", "a,b", "--samples", 2], "at least 3 measurements, got 2"),
        (["--sources", "a,b"], "more rows than the table's 400"),
    ],
)
def test_the_benchmark_refuses_bad_input_in_one_line(
    small_table: Path,
    arguments: list[object],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [] if "rows than" in message else ["--rows", "100:300"]
    code, printed = refusal(monkeypatch, capsys, "--table", small_table, *rows, *arguments)
    assert code == 2
    assert message in printed


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"arch": ["a b", "b a"] * 10}, "expected columns lat_ms_<device>"),
        ({f"lat_ms_{name}": [1.0, 2.0] * 10 for name in "abc"}, "expected a column arch"),
        ({"arch": ["a b", "b a"] * 10, **{f"lat_ms_{name}": [1.0, None] * 10 for name in "abc"}}, "some are missing"),
    ],
)
def test_a_table_without_what_is_needed_is_refused(
    tmp_path: Path,
    columns: dict[str, list[object]],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "table.csv"
    pd.DataFrame(columns).to_csv(path, index=False)
    options = ["--table", path, "--rows", "0:10", "--samples", 4, "--sources", "a,b"]
    code, printed = refusal(monkeypatch, capsys, *options)
    assert code == 2
    assert message in printed


def test_a_whole_table_is_predicted_from_a_file_of_measurements(small_table: Path) -> None:
    table = read_table(small_table)
    chosen = design_table(table, ["a", "b", "c"], samples=10)
    assert len(set(chosen)) == 10
    truth = table.drop_duplicates("arch").set_index("arch")["lat_ms_x"]
    measured = pd.DataFrame({"arch": chosen, "latency_s": truth[chosen].to_numpy() / 1e3})
    found = predict_table(table, ["a", "b", "c"], measured)
    assert list(found.columns) == ["arch", "latency_ms", "low_ms", "high_ms", "measured"]
    assert len(found) == len(table)
    assert np.median(np.abs(found["latency_ms"] / table["lat_ms_x"] - 1)) < 0.05
    assert ((found["low_ms"] <= found["latency_ms"]) & (found["latency_ms"] <= found["high_ms"])).all()
    assert set(found["arch"][found["measured"]]) == set(chosen)
    twice = predict_table(table, ["a", "b", "c"], pd.concat([measured, measured]))
    pd.testing.assert_frame_equal(twice, found)


@pytest.mark.parametrize(
    ("sources", "change", "message"),
    [
        (["a", "z"], {}, "unknown source device 'z'"),
        (["a"], {}, "expected two of x, a, b, c at least, got a"),
        (["a", "b"], {"arch": "no such"}, "the table has no architecture 'no such'"),
        (["a", "b"], {"latency_ms": 0.0}, "expected latencies above 0"),
        (["a", "b"], {"latency_s": 1.0}, "expected one column latency_ms or latency_s"),
    ],
)
def test_measurements_that_do_not_fit_the_table_are_refused(
    small_table: Path, sources: list[str], change: dict[str, object], message: str
) -> None:
    table = read_table(small_table)
    measured = pd.DataFrame({"arch": table["arch"][:10], "latency_ms": 1.0}).assign(**change)
    with pytest.raises(InputError, match=message):
        predict_table(table, sources, measured)
