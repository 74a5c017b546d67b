"""The `autocompress hardware` commands: what runs where, one model on many targets, tables, and wrong input."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from autocompress import Task
from autocompress.core.registry import BACKENDS
from autocompress.hardware.compare import USUAL
from autocompress.hardware.onnx_export import export_onnx
from autocompress.hardware.targets import find_backend
from autocompress.tasks.data import example_input
from autocompress.tasks.noise import noise_task

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def file(digits_task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits model as an ONNX file."""
    path = tmp_path_factory.mktemp("file") / "digits.onnx"
    return export_onnx(digits_task.build(), example_input(digits_task.data), path, "x86/onnxruntime").path


def test_every_target_says_what_it_can_do_whether_or_not_it_is_here(call_cli: Call) -> None:
    code, out, _ = call_cli("hardware", "list")
    assert code == 0
    assert "…" not in out  # 80 columns cut nothing off
    for name in BACKENDS:
        backend = find_backend(name)
        assert name in out
        assert str(backend.capabilities.method or "-") in out  # targets from elsewhere need not say
        assert backend.name.partition(":")[0] == name
        assert backend.capabilities.bits
        missing = backend.missing()
        if missing is not None:
            assert len(missing.splitlines()) == 1
            assert missing in out


def test_the_list_says_how_figures_are_found_and_groups_targets_that_are_alike(call_cli: Call) -> None:
    lines = [line.split() for line in call_cli("hardware", "list")[1].splitlines()]
    kinds = {
        "x86/openvino": "measured",
        "tpu/edgetpu": "simulated",
        "tpu/v5e": "compiled",
        "arm/essential_ph_1": "predicted",
    }
    for target, kind in kinds.items():
        line = next(line for line in lines if line[:1] == [target])  # what is missing comes below the table
        assert line[2] == kind
    assert ["arm/pixel3"] in lines  # under another phone, in the same row


def test_there_are_all_five_families_and_the_usual_targets() -> None:
    assert {name.partition("/")[0] for name in BACKENDS} >= {"x86", "gpu", "tpu", "arm", "fpga"}
    assert set(USUAL) <= set(BACKENDS)


def test_one_model_is_compared_on_many_targets(call_cli: Call) -> None:
    targets = ["x86/onnxruntime", "tpu/edgetpu", "arm/pixel3", "gpu/tensorrt"]
    code, out, err = call_cli("hardware", "compare", "--model", "digits-cnn", "--target", *targets, "--json")
    assert code == 0, err
    rows = {row["target"]: row for row in json.loads(out)}
    assert list(rows) == targets
    kinds = {"x86/onnxruntime": "measured", "tpu/edgetpu": "simulated", "arm/pixel3": "predicted"}
    for target, kind in kinds.items():
        figure = rows[target]["figures"]["latency"]
        assert (figure["kind"], figure["unit"]) == (kind, "s")
        if target == "arm/pixel3":  # not fitted to images as small as these
            assert figure["low"] is None
            assert any("extrapolated" in flag for flag in rows[target]["flags"])
        else:
            assert figure["low"] <= figure["value"] <= figure["high"]
    assert not rows["gpu/tensorrt"]["here"]
    assert "tensorrt" in rows["gpu/tensorrt"]["reason"]
    assert rows["gpu/tensorrt"]["figures"] == {}


def test_widths_that_a_target_has_no_kernels_for_are_not_timed(call_cli: Call) -> None:
    asked = ("--target", "x86/onnxruntime", "--bits", 8, 4, "--json")
    code, out, _ = call_cli("hardware", "compare", "--model", "digits-cnn", *asked)
    assert code == 0
    eight, four = json.loads(out)
    assert (eight["bits"], eight["reason"]) == (8, "")
    assert (four["bits"], four["figures"]) == (4, {})
    assert four["reason"] == "no kernels for 4 bits; it has 32, 16, 8"


def test_a_file_is_measured_as_it_is(file: Path, call_cli: Call) -> None:
    code, out, err = call_cli("hardware", "measure", file, "--target", "tpu/edgetpu")
    assert code == 0, err
    assert "simulated" in out
    code, out, err = call_cli("hardware", "measure", file, "--target", "tpu/edgetpu", "--json")
    assert code == 0, err
    assert "as if in 8 bits" in json.loads(out)[0]["flags"]
    code, out, err = call_cli("hardware", "compare", "--model", file, "--target", "tpu/edgetpu", "arm/pixel3", "--json")
    assert code == 0, err
    assert [row["bits"] for row in json.loads(out)] == [None, None]


def test_tables_of_others_are_brought_in_and_looked_up(file: Path, tmp_path: Path, call_cli: Call) -> None:
    from autocompress.hardware.operators import read_operators

    rows = [
        {
            "op": call.kind,
            "op_type": call.op_type,
            "input_shapes": ";".join("x".join(map(str, shape)) for shape in call.input_shapes),
            "output_shape": "x".join(map(str, call.output_shape)),
            "kernel": "x".join(map(str, call.kernel)),
            "stride": "x".join(map(str, call.stride)),
            "padding": "x".join(map(str, call.padding)),
            "fused": call.fused,
            "time": 2.0,
        }
        for call in read_operators(file)
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "theirs.csv", index=False)
    names = ("--columns", "kind=op", "latency_us=time")
    code, out, err = call_cli("hardware", "import", "theirs.csv", *names, "--out", "ours.parquet")
    assert code == 0, err
    assert f"{len(rows)} operators" in out
    code, out, err = call_cli("hardware", "measure", file, "--target", "lookup:ours.parquet", "--json")
    assert code == 0, err
    figure = json.loads(out)[0]["figures"]["latency"]
    assert figure["kind"] == "looked-up"
    assert figure["value"] == pytest.approx(2e-6 * len(rows))
    code, _, err = call_cli("hardware", "measure", file, "--target", "lookup:nowhere.parquet")
    assert code == 2
    assert "nowhere.parquet" in err


def test_a_new_device_is_predicted_from_what_the_command_proposed_to_measure(tmp_path: Path, call_cli: Call) -> None:
    ops = ("nor_conv_1x1", "nor_conv_3x3", "skip_connect", "avg_pool_3x3")
    archs = [f"|{a}~0|+|{b}~0|{c}~1|+|{d}~0|{a}~1|{b}~2|" for a in ops for b in ops for c in ops for d in ops]
    slow = [1 + 5 * arch.count("3x3|") + arch.count("1x1") + 3 * arch.count("nor_conv_3x3") for arch in archs]
    known = {"lat_ms_one": slow, "lat_ms_two": [2 * v + 1 for v in slow], "lat_ms_three": [3 * v for v in slow]}
    pd.DataFrame({"arch": archs, **known}).to_csv(tmp_path / "table.csv", index=False)
    code, out, err = call_cli("hardware", "predict", "--table", "table.csv", "--samples", 8)
    assert code == 0, err
    proposed = out.split()
    assert len(set(proposed)) == 8
    truth = dict(zip(archs, (0.5 * value for value in slow), strict=True))
    pd.DataFrame({"arch": proposed, "latency_ms": [truth[arch] for arch in proposed]}).to_csv("measured.csv")
    asked = ("--table", "table.csv", "--measured", "measured.csv", "--out", "predicted.csv")
    code, out, err = call_cli("hardware", "predict", *asked)
    assert code == 0, err
    found = pd.read_csv(tmp_path / "predicted.csv").set_index("arch")
    expected = pd.Series(truth)[found.index]
    assert found["measured"].sum() == 8
    assert ((found["latency_ms"] - expected).abs() / expected).mean() < 0.05
    assert (found["low_ms"] <= found["latency_ms"]).all()
    code, _, err = call_cli("hardware", "predict", *asked, "--sources", "nobody")
    assert code == 2
    assert "unknown source device 'nobody'" in err


def test_the_program_for_a_board_is_written(tmp_path: Path, call_cli: Call) -> None:
    code, out, err = call_cli("hardware", "agent", "board.pyz")
    assert code == 0, err
    assert "--serve" in out
    helped = subprocess.run([sys.executable, "board.pyz", "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert helped.returncode == 0, helped.stderr
    assert "--serve" in helped.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["measure", "nowhere.onnx", "--target", "x86/openvino"], ["nowhere.onnx", "no such file"]),
        (["measure", "broken.onnx", "--target", "x86/openvino"], ["broken.onnx", "no readable ONNX file"]),
        (["compare", "--model", "digits-cnn", "--target", "x86/openvin"], ["'x86/openvin'", "Did you mean"]),
        (["compare", "--model", "digits-cnn", "--target", "tpu/edgetpu", "tpu/edgetpu"], ["more than once"]),
        (["compare", "--model", "digits-cnn", "--target", "tpu/edgetpu:1"], ["takes no device"]),
        (["compare", "--model", "digits-cnn", "--bits", "64"], ["--bits", "64"]),
        (["compare", "--model", "broken.onnx", "--bits", "8"], ["measured as it is"]),
        (["compare", "--model", "resnet21"], ["unknown model 'resnet21'"]),
        (["import", "nowhere.csv", "--out", "t.parquet"], ["nowhere.csv"]),
        (["import", "broken.onnx", "--columns", "kind", "--out", "t.parquet"], ["OURS=THEIRS", "'kind'"]),
        (["profile", "--target", "tpu/edgetpu", "--model", "digits-cnn", "--out", "t.parquet"], ["tpu/edgetpu"]),
        (["setup", "arm/agent"], ["expected arm/qemu"]),
        (["setup", "arm/qemu", "--sources", "nowhere.list"], ["nowhere.list"]),
        (["predict", "--table", "nowhere.csv"], ["--table", "nowhere.csv"]),
        (["predict", "--table", "broken.onnx"], ["expected a file .parquet or .csv"]),
        (["agent", "nowhere/board.pyz"], ["can't be written"]),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    arguments: list[str], words: list[str], tmp_path: Path, call_cli: Call
) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"\x93nothing")
    code, _, err = call_cli("hardware", *arguments)
    lines = [line for line in err.splitlines() if line.strip()]
    assert code == 2
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


def test_noise_stands_in_for_data_where_shapes_are_all_that_counts() -> None:
    assert noise_task("resnet20").data.input_shape == (3, 32, 32)
    assert noise_task("text-transformer").data.vocabulary == 1000
    assert len(noise_task("torchvision:mobilenet_v3_small").data.classes) == 1000
