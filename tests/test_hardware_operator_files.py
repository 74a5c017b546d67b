"""Tables of operators' times on targets without a profiler: each operator runs in a file of its own."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from autocompress import Prune, Quantize, Task
from autocompress.core.errors import InputError
from autocompress.core.types import Method, Plan
from autocompress.hardware.agent import AgentBackend
from autocompress.hardware.gpu import GpuBackend
from autocompress.hardware.lookup import read_table
from autocompress.hardware.operator_files import operator_files
from autocompress.hardware.operators import read_operators
from autocompress.hardware.profile import build_untrained, profile_model
from autocompress.hardware.targets import find_backend, make_backend
from autocompress.hardware.x86 import CpuBackend
from autocompress.tasks.noise import noise_task

SHELL = ("sh", "-c", 'exec sh -c "$2"')  # runs what ssh would run on a board: after "--" and the host


@pytest.mark.parametrize(
    ("model", "plan"),
    [
        ("digits-cnn", ()),
        ("digits-cnn", (Quantize(8, outputs="all"),)),
        ("text-transformer", ()),
        pytest.param("resnet20", (Quantize(4, outputs="all"),), marks=pytest.mark.slow),
        pytest.param("torchvision:mobilenet_v3_small", (), marks=pytest.mark.slow),
    ],
)
def test_every_operator_runs_alone_and_does_the_work_of_the_whole(model: str, plan: Plan, tmp_path: Path) -> None:
    task = noise_task(model)
    path = build_untrained(plan, task, CpuBackend("onnxruntime"), tmp_path).path
    calls = read_operators(path)
    files = list(operator_files(onnx.load(str(path))))
    assert [call.kind for call, _ in files] == [call.kind for call in calls]
    for call, proto in files:
        (tmp_path / "one.onnx").write_bytes(proto.SerializeToString())
        alone = [other for other in read_operators(tmp_path / "one.onnx") if other.macs]
        assert sum(other.macs for other in alone) == call.macs
        if call.kind == "data":
            continue
        session = onnxruntime.InferenceSession(tmp_path / "one.onnx")
        (entry,) = session.get_inputs()
        tokens = entry.type == "tensor(int64)"
        (got,) = session.run(None, {entry.name: np.zeros((2, *entry.shape[1:]), np.int64 if tokens else np.float32)})
        assert got.shape[1:] == call.output_shape[1:]


@pytest.fixture(scope="module")
def made(digits_task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of a board that is reached through a shell."""
    path = tmp_path_factory.mktemp("tables") / "board.parquet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("board")))
        board = AgentBackend("pi@board", threads=1, budget=0.02, attempts=1, ssh=SHELL, python=sys.executable)
        profile_model(digits_task, board, [], path)
    return path


def test_a_boards_operators_add_up_to_what_the_network_takes_there(
    made: Path, digits_task: Task, tmp_path: Path
) -> None:
    table = read_table(made)
    assert table.target == "arm/agent:pi@board"
    assert list(table.details["files"].values()) == ["profiled"]
    for network in table.details["networks"]:
        rows = [list(table.rows.values())[at] for at in network["rows"]]
        total = sum(table.scale * row.seconds + table.dispatch * row.nodes for row in rows) + table.overhead
        assert total == pytest.approx(network["latency"] * table.details["reference"], rel=0.3)
    artifact = build_untrained((), digits_task, CpuBackend("onnxruntime"), tmp_path)
    seconds, _, _, flags = table.lookup(read_operators(artifact.path))
    assert flags == ()
    assert 1e-6 < seconds < 0.1


@pytest.mark.slow
def test_gpu_code_profiles_too_and_what_was_not_measured_is_flagged(digits_task: Task, tmp_path: Path) -> None:
    backend = GpuBackend("onnxruntime", device="cpu", budget=0.01, warm_up=0.01)
    path = tmp_path / "table.parquet"
    table = profile_model(digits_task, backend, [], path)
    assert len(table.rows) >= 5
    lookup = make_backend(f"lookup:{path}", threads=1)
    artifact = build_untrained((), digits_task, CpuBackend("onnxruntime"), tmp_path)
    (latency,) = lookup.measure(artifact, digits_task, None)
    assert latency.provenance.method is Method.LOOKED_UP
    assert "table of simulated figures" in latency.provenance.flags  # of a CPU, and no GPU


@pytest.mark.slow
def test_a_tpu_compilers_operators_are_a_table_of_compiled_figures(digits_task: Task, tmp_path: Path) -> None:
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs the TPU compiler: pip install 'autocompress[tpu]'")
    path = tmp_path / "table.parquet"
    table = profile_model(digits_task, make_backend("tpu/v5e"), [(Prune(0.5),)], path)
    assert table.details["method"] == Method.COMPILED
    assert len(table.rows) >= 8


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("arm/pixel3", "the latency of arm/pixel3 is predicted, at once"),
        ("fpga/ecp5-85", "the latency of fpga/ecp5-85 is simulated, at once"),
        ("arm/ethos-u55-128", "arm/ethos-u55-128 runs no ONNX files"),
        ("arm/qemu-cortex-a72", "gives no latency; it gives instructions, arm_parity"),
    ],
)
def test_targets_that_a_table_is_no_use_for_say_so(target: str, words: str, digits_task: Task, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        profile_model(digits_task, find_backend(target), [], tmp_path / "table.parquet")
