"""The matrix-vector-threshold unit: simulated, its outputs and the cycles they come in against NumPy."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from autocompress.core.errors import InputError
from autocompress.hardware.mvtu import RTL, THRESHOLD_BITS, Unit, compute, write_memories

BENCH = """
module bench;
  reg clk = 0;
  reg rst = 1;
  always #5 clk = ~clk;
  initial begin
    repeat (4) @(posedge clk);
    #1 rst = 0;
  end
  reg [{in_bits}-1:0] beats[0:{beats}-1];
  initial $readmemh("inputs.hex", beats);
  integer sent = 0, got = 0, cycle = 0, seed = {seed};
  reg in_valid = 0, out_ready = 0, taken = 0;
  wire in_ready, out_valid;
  wire [{out_bits}-1:0] out_data;
  mvtu #({parameters}) unit (
      .clk(clk), .rst(rst), .in_valid(in_valid), .in_ready(in_ready), .in_data(beats[sent]),
      .out_valid(out_valid), .out_ready(out_ready), .out_data(out_data)
  );
  always @(posedge clk) begin
    cycle <= cycle + 1;
    taken = in_valid && in_ready && !rst;
    if (taken) $display("in %0d", cycle);
    if (out_valid && out_ready && !rst) begin
      $display("out %0d %h", cycle, out_data);
      got = got + 1;
      if (got == {outs}) $finish;
    end
    if (cycle > 100000) $finish;
    #1;
    if (taken) sent = sent + 1;
    in_valid <= !rst && sent < {beats} &&
      ({offered} == 100 || (in_valid && !taken) || $urandom(seed) % 100 < {offered});
    out_ready <= {accepted} == 100 || $urandom(seed) % 100 < {accepted};
  end
endmodule
"""
tools = pytest.mark.skipif(not shutil.which("iverilog"), reason="iverilog not installed: apt install iverilog")


def random_arrays(unit: Unit, vectors: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Weights, inputs and thresholds over their whole range."""
    rng = np.random.default_rng(seed)
    most = 2 ** (unit.w - 1)
    weights = rng.choice([-1, 1], (unit.mh, unit.mw)) if unit.w == 1 else rng.integers(-most, most, (unit.mh, unit.mw))
    low = -(2 ** (unit.a - 1)) if unit.a_signed else 0
    inputs = rng.integers(low, low + 2**unit.a, (vectors, unit.mw))
    if unit.w == unit.a == 1:
        inputs = 2 * inputs - 1
    largest = int(abs(inputs @ weights.T).max()) + 1
    if unit.o == 0:
        return weights, inputs, None
    if unit.o <= THRESHOLD_BITS:
        return weights, inputs, np.sort(rng.integers(-largest, largest, (unit.mh, 2**unit.o - 1)), axis=1)
    ends = (1 << (unit.shift + unit.o)) // 2
    scales = rng.integers(-(2**15) + 1, 2**15, unit.mh)
    return weights, inputs, np.stack([scales, rng.integers(-ends, ends, unit.mh)], 1)


def simulate(
    unit: Unit, folder: Path, seed: int, offered: int = 100, accepted: int = 100
) -> tuple[np.ndarray, np.ndarray, list[int], list[int]]:
    """Run five vectors through Icarus Verilog.

    Args:
        offered, accepted: in what percentage of cycles inputs are there and outputs are taken.

    Returns:
        outputs, what they should be, cycles in which inputs went in, cycles in which outputs came out.
    """
    weights, inputs, thresholds = random_arrays(unit, 5, seed)
    parameters = write_memories(unit, weights, thresholds, folder, "unit")
    codes = (inputs > 0) if unit.w == unit.a == 1 else inputs % 2**unit.a
    words = [sum(int(code) << (i * unit.a) for i, code in enumerate(beat)) for beat in codes.reshape(-1, unit.simd)]
    (folder / "inputs.hex").write_text("".join(f"{word:x}\n" for word in words))
    bits = unit.o or unit.acc
    outs = 5 * unit.mh // unit.pe
    named = ", ".join(f'.{key}("{v}")' if isinstance(v, str) else f".{key}({v})" for key, v in parameters.items())
    bench = BENCH
    for name, value in {
        "in_bits": unit.simd * unit.a, "out_bits": unit.pe * bits, "beats": len(words), "outs": outs, "seed": seed,
        "offered": offered, "accepted": accepted, "parameters": named,
    }.items():  # fmt: skip
        bench = bench.replace("{" + name + "}", str(value))
    (folder / "bench.sv").write_text(bench)
    subprocess.run(["iverilog", "-g2012", "-o", "bench", "bench.sv", str(RTL / "mvtu.sv")], cwd=folder, check=True)
    printed = subprocess.run(["vvp", "bench"], cwd=folder, check=True, capture_output=True, text=True).stdout
    lines = [line.split() for line in printed.splitlines()]
    out = [line for line in lines if line[0] == "out"]
    assert len(out) == outs, printed[-300:]
    codes = np.array([[int(line[2], 16) >> (p * bits) & (2**bits - 1) for p in range(unit.pe)] for line in out])
    if unit.o == 0 or unit.o_signed:
        codes = (codes + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)
    expected = compute(unit, weights, inputs, thresholds)
    return (
        codes.reshape(5, unit.mh),
        expected,
        [int(line[1]) for line in lines if line[0] == "in"],
        [int(line[1]) for line in out],
    )


UNITS = {
    "binary": Unit(24, 12, 3, 4, 1, 1, 1),
    "binary weights": Unit(15, 8, 2, 3, 1, 4, 3),
    "one beat a vector": Unit(8, 12, 2, 8, 2, 3, 2),
    "one row group": Unit(18, 4, 4, 3, 4, 4, 4, memory="block"),
    "one step": Unit(5, 3, 3, 5, 3, 2, 2),
    "accumulators": Unit(12, 10, 2, 4, 8, 8, 0, memory="distributed"),
    "signed": Unit(12, 6, 2, 2, 4, 4, 4, a_signed=True, o_signed=True),
    "binary weights, signed inputs": Unit(12, 6, 2, 2, 1, 4, 0, a_signed=True),
    "8 bits": Unit(20, 6, 2, 4, 8, 8, 8),
    "8 bits, signed": Unit(20, 6, 3, 5, 8, 8, 8, a_signed=True, o_signed=True, shift=12),
    "narrow accumulators wrap": Unit(16, 4, 2, 4, 4, 4, 0, acc=8),
}


@tools
@pytest.mark.parametrize("name", UNITS)
def test_the_circuit_gives_the_same_integers_as_numpy_however_its_streams_stall(name: str, tmp_path: Path) -> None:
    outputs, expected, _, _ = simulate(UNITS[name], tmp_path, seed=len(name), offered=60, accepted=40)
    np.testing.assert_array_equal(outputs, expected)
    assert len(np.unique(expected)) > 1


@tools
@pytest.mark.parametrize("name", UNITS)
def test_unhindered_a_vector_takes_the_interval_and_the_first_output_the_latency(name: str, tmp_path: Path) -> None:
    unit = UNITS[name]
    outputs, expected, went_in, came_out = simulate(unit, tmp_path, seed=1)
    np.testing.assert_array_equal(outputs, expected)
    assert came_out[0] == went_in[unit.mw // unit.simd - 1] + unit.latency
    ends = came_out[unit.mh // unit.pe - 1 :: unit.mh // unit.pe]
    assert set(np.diff(ends)) == {unit.interval}


@tools
@pytest.mark.slow
def test_a_hundred_random_units_agree_with_numpy(tmp_path: Path) -> None:
    rng = random.Random(0)
    for number in range(100):
        pe, simd = rng.choice((1, 2, 3, 4)), rng.choice((1, 2, 3, 4, 5, 8))
        o, a = rng.choice((0, 1, 2, 3, 4, 6, 8)), rng.choice((1, 2, 4, 8))
        unit = Unit(
            simd * rng.choice((1, 2, 3, 5, 9)), pe * rng.choice((1, 2, 3, 4, 5)), pe, simd,
            rng.choice((1, 2, 3, 8)), a, o,
            a_signed=a > 1 and rng.random() < 0.4, o_signed=o > 0 and rng.random() < 0.4,
        )  # fmt: skip
        for share in (100, 40):
            outputs, expected, *_ = simulate(unit, tmp_path, number, rng.choice((30, 100)), share)
            np.testing.assert_array_equal(outputs, expected, err_msg=str(unit))


def test_requantisation_rounds_half_up_when_the_offset_holds_a_half() -> None:
    unit = Unit(1, 1, 1, 1, 8, 8, 8, shift=1, o_signed=True)
    inputs = np.arange(5)[:, None]
    rounded = compute(unit, np.array([[-1]]), inputs, np.array([[1, 1]]))
    assert rounded.ravel().tolist() == [0, 0, -1, -1, -2]  # 0, -0.5, -1, -1.5, -2


def test_settings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="SIMD divides the 9 columns and PE the 4 rows; got SIMD 2, PE 2"):
        Unit(9, 4, 2, 2, 4, 4, 4)
    with pytest.raises(InputError, match="memory is auto, block or distributed; got 'ultra'"):
        Unit(8, 4, 2, 2, 4, 4, 4, memory="ultra")
    unit = Unit(8, 4, 2, 2, 4, 4, 2)
    with pytest.raises(InputError, match=r"weights have shape \(4, 8\); got \(8, 4\)"):
        write_memories(unit, np.zeros((8, 4)), None, tmp_path, "unit")
    with pytest.raises(InputError, match=r"thresholds have shape \(4, 3\); got None"):
        write_memories(unit, np.zeros((4, 8)), None, tmp_path, "unit")
    with pytest.raises(InputError, match="thresholds of a row ascend"):
        write_memories(unit, np.zeros((4, 8)), np.array([[2, 1, 3]] * 4), tmp_path, "unit")


def test_accumulators_hold_the_largest_sums() -> None:
    assert Unit(9, 1, 1, 1, 1, 1, 0).acc == 5  # -9 .. 9
    assert Unit(16, 1, 1, 1, 8, 8, 0).acc == 20  # 16 * 128 * 255 = 522240
    assert Unit(1000, 64, 8, 8, 4, 4, 4).memory == "block"
    assert Unit(16, 16, 2, 2, 2, 2, 2).memory == "distributed"
