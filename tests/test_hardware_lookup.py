"""Tables of operators' times: made on this machine, resumed, looked up, imported, and searched with."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import autocompress as ac
from autocompress import Prune, Quantize, Task
from autocompress.core.errors import InputError, MissingDependencyError
from autocompress.core.types import Method, Plan, State
from autocompress.hardware.channel_costs import channels_of, fit_channel_costs, with_channels
from autocompress.hardware.lookup import LookupTable, Row, describe, operator_key, read_table
from autocompress.hardware.operators import OperatorCall, read_operators
from autocompress.hardware.profile import build_untrained, draw_plans, held_out_error, profile_model, table_error
from autocompress.hardware.table_import import import_table, read_architectures
from autocompress.hardware.targets import make_backend
from autocompress.spaces import stock_space

PLANS: list[Plan] = [(Prune(0.5),), (Quantize(8, outputs="all"),)]
CONV = OperatorCall("conv", "", "Conv", ((1, 16, 8, 8),), (1, 32, 8, 8), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1))


@pytest.fixture(scope="module")
def made(digits_task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of digits-cnn and two candidates; its making was interrupted after the first file."""
    path = tmp_path_factory.mktemp("lookup") / "table.parquet"
    backend = make_backend("x86/onnxruntime", threads=1)

    def interrupt(done: int, count: int, said: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profile_model(digits_task, backend, PLANS, path, on_progress=interrupt)
    first = read_table(path)
    assert len(first.details["networks"]) == 1

    done: list[int] = []
    table = profile_model(digits_task, backend, PLANS, path, on_progress=lambda number, *rest: done.append(number))
    assert done == [2, 3]  # the untouched model was not run again
    assert table.details["references"][0] == first.details["references"][0]
    assert set(first.rows) < set(table.rows)
    return path


@pytest.fixture(scope="module")
def calls(digits_task: Task, tmp_path_factory: pytest.TempPathFactory) -> tuple[OperatorCall, ...]:
    """The operators of the untouched model."""
    backend = make_backend("x86/onnxruntime", threads=1)
    return read_operators(build_untrained((), digits_task, backend, tmp_path_factory.mktemp("built")).path)


def table_of(rows: dict[OperatorCall, float], **settings: object) -> LookupTable:
    made_rows = {key: Row(seconds, 0.9 * seconds, 1.1 * seconds, 10) for key, seconds in rows.items()}
    return LookupTable("a target", "a device", "a runtime", "", "2026-01-01T00:00:00+00:00", made_rows, **settings)


def test_the_latency_of_a_profiled_model_is_the_sum_of_its_operators(
    made: Path, calls: tuple[OperatorCall, ...]
) -> None:
    table = read_table(made)
    seconds, low, high, flags = table.lookup(calls)
    assert flags == ()
    rows = [table.rows[key] for key in table.as_keys(calls)]
    expected = sum(table.scale * row.seconds + table.dispatch * row.nodes for row in rows) + table.overhead
    assert seconds == pytest.approx(expected)
    # What the whole network took when the table was made.
    network = table.details["networks"][0]
    assert seconds == pytest.approx(network["latency"] * table.details["reference"], rel=0.3)
    assert low is None or high is None or low <= seconds <= high
    convolutions = [row.seconds for key, row in table.rows.items() if key.kind == "conv"]
    assert len(convolutions) >= 6
    assert all(1e-7 < found < 1e-2 for found in convolutions)


def test_an_operator_that_is_not_in_the_table_is_named(calls: tuple[OperatorCall, ...], made: Path) -> None:
    table = read_table(made)
    strange = OperatorCall("softmax", "attention", "Softmax", ((1, 4, 12, 12),), (1, 4, 12, 12))
    seconds, low, high, flags = table.lookup([*calls, strange])
    assert flags == ("missing: softmax 4x12x12 -> 4x12x12",)
    assert (low, high) == (None, None)
    assert seconds == pytest.approx(table.lookup(calls)[0])


def test_channels_that_were_not_measured_are_interpolated_and_flagged() -> None:
    def cost(inputs: int, outputs: int) -> float:
        return 5e-6 + 2e-8 * inputs * outputs

    rows = {with_channels(CONV, i, o): cost(i, o) for i in (8, 16, 32, 48) for o in (8, 24, 32, 64)}
    table = table_of(rows, spread=0.1)
    seconds, low, high, flags = table.lookup([with_channels(CONV, 40, 40)])
    assert seconds == pytest.approx(cost(40, 40), rel=0.15)
    assert flags == ("interpolated: conv 3x3 40x8x8 -> 40x8x8",)
    assert low is not None
    assert high is not None
    assert low < cost(40, 40) < high
    assert table.lookup([with_channels(CONV, 512, 40)])[3] == ("extrapolated: conv 3x3 512x8x8 -> 40x8x8",)
    assert table.lookup([with_channels(CONV, 8, 24)])[3] == ()
    another = dataclasses.replace(with_channels(CONV, 8, 24), stride=(2, 2), output_shape=(1, 24, 4, 4))
    assert table.lookup([another])[3] == ("missing: conv 3x3 8x8x8 -> 24x4x4",)


def test_few_points_are_scaled_and_no_interval_is_claimed_narrow() -> None:
    costs = fit_channel_costs([(8, 8), (16, 16)], [1e-5, 2e-5])
    assert costs.at(16, 16) == pytest.approx(2e-5)
    assert costs.at(32, 32) == pytest.approx(4e-5)
    assert not costs.holds(12, 12)
    assert costs.spread == 0.5


def test_one_layer_in_16_bits_puts_a_file_for_openvino_in_bfloat16() -> None:
    half = dataclasses.replace(CONV, weight_bits=16)
    table = table_of({CONV: 4e-5, dataclasses.replace(half, activation_bits=16): 1e-5})
    assert table.lookup([CONV, CONV])[0] == pytest.approx(8e-5)
    openvino = dataclasses.replace(table, target="x86/openvino")
    assert openvino.lookup([CONV, CONV])[0] == pytest.approx(8e-5)
    assert openvino.lookup([CONV, half])[0] == pytest.approx(2e-5)


def test_many_networks_are_looked_up_at_once_with_the_same_result(made: Path, calls: tuple[OperatorCall, ...]) -> None:
    table = read_table(made)
    networks = [calls, calls[:2], (*calls, *calls)]
    expected = [table.lookup(network)[0] for network in networks]
    keys, counts = table.count_operators(networks)
    assert counts.shape == (3, len(keys))
    np.testing.assert_allclose(table.seconds(counts, keys), expected)
    own = np.zeros((1, len(table.keys)))
    for key in table.as_keys(calls):
        own[0, table.keys.index(key)] += 1
    np.testing.assert_allclose(table.seconds(own), expected[:1])
    channels = np.array([[channels_of(call) for call in calls]] * 2)
    channels[1] = np.maximum(1, channels[1] // 2)
    narrow = [with_channels(call, *map(int, pair)) for call, pair in zip(calls, channels[1], strict=True)]
    expected = [table.lookup(calls)[0], table.lookup(narrow)[0]]
    np.testing.assert_allclose(table.seconds_of_channels(calls, channels), expected)
    with pytest.raises(InputError, match="channels: expected the shape"):
        table.seconds_of_channels(calls, channels[:, :-1])


def test_a_table_comes_back_from_its_file_as_it_was(made: Path, tmp_path: Path) -> None:
    table = read_table(made)
    table.write(tmp_path / "copy.parquet")
    again = read_table(tmp_path / "copy.parquet")
    assert dict(again.rows) == dict(table.rows)
    for field in dataclasses.fields(LookupTable):
        assert getattr(again, field.name) == getattr(table, field.name)
    frame = pd.read_parquet(made)
    assert {"kind", "input_shapes", "output_shape", "weight_bits", "sparsity", "seconds", "low", "high"} <= set(frame)
    assert set(frame["runtime"]) == {table.runtime}
    assert set(frame["fingerprint"]) == {table.fingerprint}


def test_a_table_of_another_machine_is_not_continued(made: Path, digits_task: Task, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.parquet"
    dataclasses.replace(read_table(made), fingerprint="another processor").write(foreign)
    backend = make_backend("x86/onnxruntime", threads=1)
    with pytest.raises(InputError, match="is of another machine"):
        profile_model(digits_task, backend, PLANS, foreign)
    with pytest.raises(InputError, match="is of another target"):
        profile_model(digits_task, make_backend("x86/openvino", threads=1), PLANS, made)
    with pytest.raises(InputError, match="the latency of tpu/edgetpu is simulated, at once"):
        profile_model(digits_task, make_backend("tpu/edgetpu", threads=1), PLANS, tmp_path / "new.parquet")


@pytest.mark.slow
def test_the_error_is_that_of_networks_which_the_table_was_not_made_from(
    made: Path, digits_task: Task, tmp_path: Path
) -> None:
    path = tmp_path / "table.parquet"
    path.write_bytes(made.read_bytes())
    backend = make_backend("x86/onnxruntime", threads=1)
    space = stock_space(digits_task, backend.capabilities)
    error = table_error(path, digits_task, backend, space, candidates=4, seed=5)
    assert error["candidates"] == 4
    assert 0 <= error["mape"] < 1
    assert -1 <= error["spearman"] <= 1
    table = read_table(path)
    assert table.details["error"] == error == held_out_error(table)
    # A second call measures nothing.
    said: list[str] = []
    again = table_error(
        path, digits_task, backend, space, candidates=4, seed=5, on_progress=lambda done, count, text: said.append(text)
    )
    assert (again, said) == (error, [])


def test_drawn_plans_differ_and_come_again_with_the_same_seed(digits_task: Task) -> None:
    space = stock_space(digits_task, make_backend("x86/onnxruntime").capabilities)
    plans = list(draw_plans(space, 5, seed=0))
    assert len(plans) == 5
    assert plans == list(draw_plans(space, 5, seed=0))
    assert plans != list(draw_plans(space, 5, seed=1))


def test_a_search_on_a_table_times_nothing(made: Path, tmp_path: Path) -> None:
    study = ac.run_search(
        "digits-cnn",
        "digits",
        target=f"lookup:{made}",
        trials=3,
        executor="inline",
        finetune_steps=20,
        verify_time=0,
        constraints=("latency<=200%",),
        out=tmp_path / "run",
    )
    records = study.records()
    assert not [record.reason for record in records if record.state is State.FAILED]
    table = read_table(made)
    complete = [record for record in records if record.state is State.COMPLETE]
    assert complete
    for record in complete:
        latency = record.metrics["latency"]
        assert latency.provenance.method is Method.LOOKED_UP
        assert (latency.provenance.device, latency.provenance.runtime) == (table.device, table.runtime)
        assert record.metrics["accuracy"].provenance.method is Method.MEASURED


def test_a_table_of_a_target_that_is_not_here_is_run_by_onnx_runtime(made: Path, tmp_path: Path) -> None:
    path = tmp_path / "phone.parquet"
    dataclasses.replace(read_table(made), target="some phone").write(path)
    backend = make_backend(f"lookup:{path}", threads=1)
    assert backend.capabilities.emulated
    assert not make_backend(f"lookup:{made}", threads=1).capabilities.emulated
    assert backend.capabilities.metrics == ("latency",)


def test_a_lookup_needs_a_table(tmp_path: Path) -> None:
    with pytest.raises(MissingDependencyError, match="needs a table"):
        make_backend("lookup")
    with pytest.raises(MissingDependencyError, match="there is no such file"):
        make_backend(f"lookup:{tmp_path}/none.parquet")
    other = tmp_path / "other.parquet"
    pd.DataFrame({"a": [1]}).to_parquet(other)
    with pytest.raises(InputError, match="is no operator table; tables of others come in by"):
        read_table(other)
    other.write_text("text")
    with pytest.raises(InputError, match="no readable Parquet"):
        read_table(other)


OPERATORS = """op,in,out,k,s,ms
conv,1x16x8x8,1x32x8x8,3,1,0.05
conv,1x32x8x8,1x32x8x8,3x3,1,0.08
linear,1x32,1x10,,,0.01
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_operators_that_others_measured_are_looked_up(tmp_path: Path) -> None:
    source = write(tmp_path / "phone.csv", OPERATORS)
    names = {"kind": "op", "input_shapes": "in", "output_shape": "out", "kernel": "k", "stride": "s"}
    out = tmp_path / "phone.parquet"
    made_table = import_table(source, {**names, "latency_ms": "ms"}, out, target="phone", device="Phone 3")
    table = read_table(out)
    assert isinstance(made_table, LookupTable)
    assert dict(table.rows) == dict(made_table.rows)
    assert (table.target, table.device, table.details["source"]) == ("phone", "Phone 3", str(source))
    first = dataclasses.replace(CONV, padding=(0, 0, 0, 0))
    assert table.lookup([first]) == (pytest.approx(5e-5), None, None, ())
    total, _, _, flags = table.lookup([first, OperatorCall("linear", "fc", "Gemm", ((1, 32),), (1, 10))])
    assert (total, flags) == (pytest.approx(6e-5), ())
    assert describe(operator_key(first)) == "conv 3x3 16x8x8 -> 32x8x8"


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        ("op,ms\nconv,1\n", {"kind": "op", "latency_ms": "ms"}, "expected a column output_shape"),
        (OPERATORS, {"kind": "op", "output_shape": "out"}, "expected one column of latencies .* got none"),
        (OPERATORS, {"kind": "operator"}, "there is no column 'operator' for kind; it has op, in, out, k, s, ms"),
        (OPERATORS, {"latency_mss": "ms"}, "unknown column 'latency_mss'.* Did you mean 'latency_ms'"),
        ("kind,output_shape,latency_ms\nconv,1x8x8x8,-2\n", {}, "row 2: latency_ms: expected a latency .* got '-2'"),
        ("kind,output_shape,latency_ms\nconv,1x8x8x8,fast\n", {}, "row 2: latency_ms: .* got 'fast'"),
        ("kind,output_shape,latency_ms\nconv,wide,1\n", {}, "row 2: output_shape: expected sizes such as"),
        ("kind,output_shape,latency_ms\nconf,1x8x8x8,1\n", {}, "row 2: unknown kind 'conf'.* Did you mean 'conv'"),
        ("kind,output_shape,latency_us\nadd,1x8,1\nadd,1x8,2\n", {}, "row 3: the operator is there twice"),
        ("kind,output_shape,latency_us\n", {}, "expected rows; there is none"),
        ("arch,lat_ms_a\nx,1\nx,2\n", {}, "the architecture 'x' is there twice"),
        ("arch,time\nx,1\n", {}, "expected columns lat_ms_<device>"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_imported_say_why(
    tmp_path: Path, text: str, columns: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        import_table(write(tmp_path / "table.csv", text), columns, tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


def test_architectures_that_others_measured_are_imported(tmp_path: Path) -> None:
    source = write(tmp_path / "nas.csv", "arch,lat_ms_phone,t\n012,3.5,1000\n210,4.5,2000\n")
    frame = import_table(source, {"latency_us": "t"}, tmp_path / "out.parquet")
    assert isinstance(frame, pd.DataFrame)
    again = read_architectures(tmp_path / "out.parquet")
    pd.testing.assert_frame_equal(frame, again)
    assert again.loc["012", "phone"] == pytest.approx(3.5e-3)
    assert again.loc["210", "t"] == pytest.approx(2e-3)
    with pytest.raises(InputError, match="is no operator table"):
        read_table(tmp_path / "out.parquet")


@pytest.mark.parametrize("name", ["out.csv", "none.parquet"])
def test_only_imported_tables_of_architectures_are_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="expected a Parquet file"):
        read_architectures(tmp_path / name)


def test_a_foreign_parquet_with_lists_as_shapes_is_imported(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {"kind": ["add"], "input_shapes": ["1x8x4x4;1x8x4x4"], "output_shape": [[1, 8, 4, 4]], "latency_us": [3.0]}
    )
    frame.to_parquet(tmp_path / "in.parquet")
    table = import_table(tmp_path / "in.parquet", {}, tmp_path / "out.parquet")
    assert isinstance(table, LookupTable)
    (key,) = table.rows
    assert key.input_shapes == ((1, 8, 4, 4), (1, 8, 4, 4))
    assert math.isclose(table.rows[key].seconds, 3e-6)
