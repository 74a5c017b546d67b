"""`autocompress hardware emit`: a network's circuit on disk, with a test bench that checks itself, and its figures."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from autocompress import Quantize, Task
from autocompress.hardware.fpga_sim import missing_simulator
from autocompress.hardware.fpga_synthesis import missing_tools
from autocompress.hardware.targets import find_backend

Call = Callable[..., tuple[int, str, str]]
needs_simulator = pytest.mark.skipif(missing_simulator() is not None, reason=str(missing_simulator()))
needs_tools = pytest.mark.skipif(missing_tools() != "", reason=missing_tools())


@pytest.fixture(scope="module")
def file(digits_task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small convolutional network in 4 bits."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 10)
    )
    rounded = Quantize(4, outputs="all")(model.eval(), digits_task)
    return find_backend("fpga/ecp5-85", threads=1).build(rounded, digits_task, tmp_path_factory.mktemp("file")).path


def test_the_circuit_comes_with_a_report(file: Path, tmp_path: Path, call_cli: Call) -> None:
    code, out, err = call_cli("hardware", "emit", file, "--target", "fpga/ecp5-85", "--out", "rtl")
    assert code == 0, err
    assert "simulated" in out
    assert "module accelerator" in (tmp_path / "rtl" / "accelerator.sv").read_text()
    report = (tmp_path / "rtl" / "report.md").read_text()
    assert "clock cycles" in report
    for words in ("| latency |", "| luts |", "| simulated |", "| predicted |"):
        assert words in report
    code, _, err = call_cli("hardware", "emit", file, "--out", "rtl")
    assert code == 2
    assert "expected a new folder" in err


@needs_simulator
def test_the_test_bench_checks_every_word_of_the_results(file: Path, tmp_path: Path, call_cli: Call) -> None:
    assert call_cli("hardware", "emit", file, "--out", "rtl")[0] == 0
    script = tmp_path / "rtl" / "simulate.sh"
    said = subprocess.run([script], capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1].endswith(", 0 are wrong")
    expected = tmp_path / "rtl" / "expected.hex"
    first, *others = expected.read_text().split()
    expected.write_text("\n".join([f"{int(first, 16) ^ 1:x}", *others]))
    said = subprocess.run([script], capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1].endswith(", 1 are wrong")


@pytest.mark.slow
@needs_tools
@pytest.mark.timeout(1800)
def test_place_and_route_adds_what_the_tools_found(file: Path, tmp_path: Path, call_cli: Call) -> None:
    code, out, err = call_cli("hardware", "emit", file, "--out", "rtl", "--place-and-route", "--json")
    assert code == 0, err
    predicted, routed = (row["figures"] for row in json.loads(out))
    assert (predicted["luts"]["kind"], routed["luts"]["kind"]) == ("predicted", "compiled")
    assert routed["luts"]["value"] == pytest.approx(predicted["luts"]["value"], rel=0.4)
    assert 20e6 < routed["clock"]["value"] < 400e6
    assert routed["clock"]["unit"] == "Hz"
    assert "| clock |" in (tmp_path / "rtl" / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "x86/openvino"], ["expected a target fpga/..., got x86/openvino"]),
        (["--target", "fpga/xc7z020", "--place-and-route"], ["fpga/ecp5-25", "got fpga/xc7z020"]),
        (["--target", "fpga/ecp5-99"], ["'fpga/ecp5-99'", "Did you mean"]),
    ],
)
def test_wrong_input_is_one_line(arguments: list[str], words: list[str], file: Path, call_cli: Call) -> None:
    code, _, err = call_cli("hardware", "emit", file, "--out", "rtl", *arguments)
    assert (code, len(err.splitlines())) == (2, 1)
    assert [word for word in words if word not in err] == [], err


def test_a_file_in_floating_point_is_refused(digits_task: Task, tmp_path: Path, call_cli: Call) -> None:
    whole = find_backend("x86/onnxruntime", threads=1).build(digits_task.build(), digits_task, tmp_path / "whole")
    code, _, err = call_cli("hardware", "emit", whole.path, "--out", "rtl")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "rounded" in err
    assert not (tmp_path / "rtl").exists()
