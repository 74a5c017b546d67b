"""A board that measures: the real program in a process of its own, over a shell as by ssh, and over a port."""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from autocompress import Quantize, Task
from autocompress.core.errors import CandidateError, DeviceLostError, InputError
from autocompress.core.registry import BACKENDS, backend
from autocompress.core.types import Artifact, Candidate, Evaluation, Method, State
from autocompress.evaluators.objectives import parse_objectives
from autocompress.evaluators.pipeline import Evaluator
from autocompress.hardware.agent import AgentBackend, state_flags
from autocompress.hardware.board_agent import Refused, Store
from autocompress.hardware.board_connection import agent_archive
from autocompress.hardware.board_state import board_name, board_state, fastest_cores
from autocompress.hardware.board_wire import proof
from autocompress.hardware.files import read_file
from autocompress.hardware.onnx_to_tflite import convert
from autocompress.hardware.targets import find_backend, make_backend
from autocompress.hardware.tflite_file import TfTensor, write_model
from autocompress.hardware.x86 import CpuBackend
from autocompress.search.config import make_config
from autocompress.search.engine import Progress
from autocompress.search.executors import InlineExecutor
from autocompress.search.run import Silent, resume_search, start_search
from autocompress.studies.study import Study
from autocompress.tasks.data import normalise

RunCli = Callable[..., "subprocess.CompletedProcess[str]"]

TOKEN = "a secret of the tests"
SHELL = ("sh", "-c", 'exec sh -c "$2"')  # runs what ssh would run on a board: after "--" and the host


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The board's home folder."""
    folder = tmp_path_factory.mktemp("board")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def board(home: Path) -> AgentBackend:
    """A board that is reached through a shell."""
    return AgentBackend("pi@board", threads=1, budget=0.05, spread=9.0, ssh=SHELL, python=sys.executable)


def start_server(folder: Path, port: int = 0, token: str = TOKEN) -> tuple[subprocess.Popen[str], str]:
    """The archive as it is copied to a board, serving; its process, and its address or last words."""
    archive = folder / "board.pyz"
    archive.write_bytes(agent_archive())
    process = subprocess.Popen(
        [sys.executable, archive, "--serve", "--port", str(port), "--folder", folder / "kept"],
        env={**os.environ, "AUTOCOMPRESS_AGENT_TOKEN": token},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip().rpartition(" on ")[2]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a board that serves a port."""
    process, address = start_server(tmp_path_factory.mktemp("server"))
    yield f"tcp://{address}"
    process.kill()


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOCOMPRESS_AGENT_TOKEN", TOKEN)


@pytest.fixture(scope="module")
def files(digits_task: Task, tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Artifact]:
    """The digits model in float and in 8 bits."""
    folder = tmp_path_factory.mktemp("files")
    host = CpuBackend("onnxruntime")
    rounded = Quantize(8, outputs="all")(digits_task.build(), digits_task)
    return (
        host.build(digits_task.build(), digits_task, folder / "float"),
        host.build(rounded, digits_task, folder / "rounded"),
    )


def test_a_board_measures_a_file_in_turns_with_a_reference(
    board: AgentBackend, digits_task: Task, files: tuple[Artifact, Artifact]
) -> None:
    whole, rounded = files
    figures = {m.name: m for m in board.measure(rounded, digits_task, whole)}
    assert {name: m.unit for name, m in figures.items()} == {
        "latency": "s", "reference_latency": "s", "throughput": "1/s", "memory": "B",
    }  # fmt: skip
    latency = figures["latency"]
    assert latency.samples >= 30
    assert latency.ci95 is not None
    assert 0 < latency.ci95[0] <= latency.value <= latency.ci95[1] < 1
    assert latency.provenance.method is Method.MEASURED
    assert latency.provenance.device == f"{board_name()}, 1 thread"
    assert latency.provenance.runtime.startswith("onnxruntime ")


def test_a_board_computes_what_the_same_runtime_computes_here(
    board: AgentBackend, digits_task: Task, files: tuple[Artifact, Artifact]
) -> None:
    images = normalise(digits_task.data, digits_task.data.search.inputs[:100])
    for file in files:
        np.testing.assert_allclose(
            board.predict(file, images), CpuBackend("onnxruntime").predict(file, images), atol=1e-5
        )


def test_accuracy_bears_the_name_of_the_board_that_computed_it(home: Path, digits_task: Task, tmp_path: Path) -> None:
    cores = tmp_path / "cpuinfo"
    cores.write_text("processor\t: 0\nCPU part\t: 0xd08\n\n")
    disguise = f"mount --bind {cores} /proc/cpuinfo"
    if subprocess.run(["unshare", "-m", "sh", "-c", disguise], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount, for a board that calls itself something else than this machine")
    shell = ("unshare", "-m", "sh", "-c", f'{disguise} && exec sh -c "$2"')
    board = AgentBackend("pi@board", threads=1, budget=0.05, spread=9.0, ssh=shell, python=sys.executable)
    evaluator = Evaluator(digits_task, board, parse_objectives(["accuracy", "latency"], board), (), tmp_path)
    found = evaluator(Candidate(())).measurements
    devices = {name: found[name].provenance.device for name in ("accuracy", "loss", "parity", "latency")}
    assert devices == {**dict.fromkeys(("accuracy", "loss", "parity"), "Cortex-A72"), "latency": "Cortex-A72, 1 thread"}
    assert found["accuracy"].provenance.method is Method.MEASURED
    assert board_name() != "Cortex-A72"


def test_files_are_built_for_the_board_and_sent_once(
    board: AgentBackend, home: Path, digits_task: Task, tmp_path: Path
) -> None:
    artifact = board.build(digits_task.build(), digits_task, tmp_path)
    assert artifact.runtime == "arm/agent:pi@board"
    images = normalise(digits_task.data, digits_task.data.search.inputs[:3])
    board.predict(artifact, images)
    kept = home / ".cache/autocompress-board/files" / artifact.sha256
    assert kept.read_bytes() == artifact.path.read_bytes()
    artifact.path.unlink()
    assert board.predict(artifact, images).shape == (3, 10)


def test_a_board_times_tensorflow_lite_files(
    board: AgentBackend, files: tuple[Artifact, Artifact], tmp_path: Path
) -> None:
    pytest.importorskip("ai_edge_litert", reason="needs LiteRT: pip install ai-edge-litert")
    path = tmp_path / "model.tflite"
    path.write_bytes(convert(files[1].path)[0])
    artifact, task = read_file(path, board.name)
    figures = {m.name: m for m in board.measure(artifact, task, None)}
    assert set(figures) == {"latency", "throughput", "memory"}
    assert figures["latency"].provenance.method is Method.MEASURED
    assert figures["latency"].provenance.runtime == f"ai-edge-litert {importlib.metadata.version('ai-edge-litert')}"
    assert 1e-6 < figures["latency"].value < 1e-2


def test_a_board_without_litert_says_how_to_get_it(home: Path, tmp_path: Path) -> None:
    python = tmp_path / "bare/bin/python"
    venv.create(tmp_path / "bare", with_pip=False)
    site = next((tmp_path / "bare/lib").glob("python*/site-packages"))
    for name in ("numpy", "onnxruntime"):
        for found in Path(np.__file__).parents[1].glob(f"{name}*"):
            (site / found.name).symlink_to(found)
    board = AgentBackend("pi@board", ssh=SHELL, python=str(python))
    path = tmp_path / "model.tflite"
    path.write_bytes(write_model([TfTensor("x", (1, 8))], [], [0], [0]))
    with pytest.raises(
        CandidateError, match=r"the board lacks LiteRT for .*model.tflite; run there: .* ai-edge-litert"
    ):
        board.measure(*read_file(path, board.name), None)


@pytest.mark.usefixtures("token")
def test_a_server_measures_for_those_who_know_the_token(
    server: str, digits_task: Task, files: tuple[Artifact, Artifact]
) -> None:
    backend = make_backend(f"arm/agent:{server}", threads=1)
    assert isinstance(backend, AgentBackend)
    quick = AgentBackend(server, threads=1, budget=0.05, spread=9.0)
    assert quick.name == backend.name
    latency = quick.measure(files[0], digits_task, None)[0]
    assert latency.provenance.method is Method.MEASURED
    with pytest.raises(InputError, match=r"threads: 4096 asked for, but arm/agent:tcp://.* has \d+ cores"):
        make_backend(f"arm/agent:{server}", threads=4096)


def test_a_wrong_token_or_none_is_refused(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOCOMPRESS_AGENT_TOKEN", TOKEN + "!")
    with pytest.raises(InputError, match=r"the token is not the one in \$AUTOCOMPRESS_AGENT_TOKEN on the board"):
        make_backend(f"arm/agent:{server}")
    monkeypatch.delenv("AUTOCOMPRESS_AGENT_TOKEN")
    with pytest.raises(InputError, match=r"asks for a token; set \$AUTOCOMPRESS_AGENT_TOKEN"):
        make_backend(f"arm/agent:{server}")


def test_a_server_does_not_start_without_a_token(tmp_path: Path) -> None:
    process, _ = start_server(tmp_path, token="short")
    assert process.wait(timeout=20) == 2
    assert process.stdout is not None
    assert "must hold a secret of at least 16 characters; it holds 5" in process.stdout.read()


@pytest.mark.usefixtures("token")
def test_broken_files_and_hanging_ones_fail_alone(
    server: str, digits_task: Task, files: tuple[Artifact, Artifact], tmp_path: Path
) -> None:
    backend = AgentBackend(server, threads=1, budget=0.05, spread=9.0)
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(files[0].path.read_bytes()[:5000])
    bad = Artifact("any", broken, hashlib.sha256(broken.read_bytes()).hexdigest(), 5000)
    for run in (lambda: backend.measure(bad, digits_task, None), lambda: backend.predict(bad, np.zeros((1, 1, 8, 8)))):
        with pytest.raises(CandidateError) as caught:
            run()
        assert len(str(caught.value).splitlines()) == 1
        assert "protobuf" in str(caught.value).lower()
    with pytest.raises(CandidateError, match="hung for 0 s"):
        AgentBackend(server, limit=0.01).measure(files[0], digits_task, None)
    with pytest.raises(InputError, match="a file came damaged"):
        backend.predict(Artifact("any", broken, files[1].sha256[::-1], 5000), np.zeros((1, 1, 8, 8)))
    assert backend.measure(files[0], digits_task, None)[0].value > 0


def exchange(server: str, *lines: bytes, stay: bool = True) -> list[dict[str, object]]:
    """What the server says after its greeting to somebody with the token who then sends bytes of his own."""
    host, _, port = server.removeprefix("tcp://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection, connection.makefile("rb") as answers:
        nonce = json.loads(answers.readline())["nonce"]
        connection.sendall(json.dumps({"proof": proof(TOKEN, nonce)}).encode() + b"\n")
        assert "board" in json.loads(answers.readline())
        for line in lines:
            connection.sendall(line)
        if not stay:
            connection.shutdown(socket.SHUT_WR)
        said = []
        with contextlib.suppress(ConnectionResetError):
            for line in answers:
                said.append(json.loads(line))
                if stay:
                    break
        return said


def test_a_server_refuses_names_of_files_and_lives_through_broken_messages(server: str) -> None:
    for name in ("../../etc/passwd", "/etc/passwd", "A" * 64, 7, None):
        message = json.dumps({"op": "put", "file": name, "bytes": 3}).encode() + b"\nabc"
        (answer,) = exchange(server, message)
        assert answer["error"] == "input"
        assert "expected the SHA-256 of a file" in str(answer["text"])
    (answer,) = exchange(server, b'{"op": "measure", "threads": "all"}\n')
    assert answer["error"] == "input"
    (answer,) = exchange(server, b'{"op": "shell"}\n')
    assert "unknown request 'shell'" in str(answer["text"])
    assert exchange(server, b'{"op": "put", "bytes": 1000}\nonly this', stay=False) == []  # broken off
    assert exchange(server, b'{"op": "put", "bytes": 10000000000000}\n') == []  # too much announced
    assert exchange(server, b'{"op": "put", "bytes": -1}\n') == []
    assert exchange(server, b"[" * 2_000_000) == []  # a line without end
    assert exchange(server, b"GET / HTTP/1.1\n") == []
    assert exchange(server, b'{"op": "has", "file": "' + b"0" * 64 + b'"}\n') == [{"has": False, "bytes": 0}]


def test_strangers_may_send_little(server: str) -> None:
    host, _, port = server.removeprefix("tcp://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        assert b"nonce" in connection.recv(4096)
        connection.sendall(b"x" * 5000)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(4096) == b""


@pytest.mark.usefixtures("token")
def test_a_lost_server_is_told_and_found_again(
    digits_task: Task, tmp_path: Path, files: tuple[Artifact, Artifact]
) -> None:
    process, address = start_server(tmp_path)
    backend = AgentBackend(f"tcp://{address}", threads=1, pauses=(0.1,))
    images = np.zeros((2, 1, 8, 8), np.float32)
    expected = backend.predict(files[0], images)
    process.kill()
    process.wait()
    with pytest.raises(DeviceLostError, match=r"no server answers there \(Connection refused\); start it on"):
        backend.predict(files[0], images)
    executor = InlineExecutor(Evaluator(digits_task, backend, parse_objectives(["latency"], backend), (), tmp_path))
    executor.submit(Candidate(()))
    with pytest.raises(DeviceLostError):  # instead of a failed candidate
        executor.wait(0)
    process, _ = start_server(tmp_path, port=int(address.rpartition(":")[2]))
    np.testing.assert_array_equal(backend.predict(files[0], images), expected)
    process.kill()


class Unplugging(Silent):
    """Watches a search, and kills the board's server when `after` trials are recorded."""

    def __init__(self, process: subprocess.Popen[str], after: int) -> None:
        self._process, self._after = process, after

    def changed(self, progress: Progress, evaluation: Evaluation | None) -> None:
        if progress.trials == self._after:
            self._process.kill()
            self._process.wait()


@pytest.fixture
def impatient_target() -> Iterator[str]:
    """A target for boards that are soon given up."""
    name = "arm/impatient"

    @backend(name)
    def make(threads: int = 0, device: str = "") -> AgentBackend:
        return AgentBackend(device, threads, budget=0.05, spread=9.0, pauses=(0.1, 0.2))

    yield name
    del BACKENDS._entries[name]


@pytest.mark.slow
@pytest.mark.usefixtures("token")
def test_a_search_stops_where_its_board_is_lost_and_goes_on_once_it_is_back(
    tmp_path: Path, impatient_target: str
) -> None:
    process, address = start_server(tmp_path)
    folder = tmp_path / "run"
    given = {"target": f"{impatient_target}:tcp://{address}", "space": "prune", "executor": "inline", "trials": 4}
    given |= {"verify_time": 0}
    config = make_config({**given, "objectives": ["accuracy", "latency"], "finetune_steps": 0, "out": str(folder)}, "")
    with pytest.raises(DeviceLostError) as caught:
        start_search(config, watcher=Unplugging(process, after=3))
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert f"the board was lost: arm/agent:tcp://{address}: no server answers there (Connection refused)" in text
    assert text.endswith(f"nothing finished is lost: once it is back, --resume {folder} goes on")
    before = Study.open(folder).records()
    assert [record.state for record in before] == [State.COMPLETE] * 3
    assert (folder / "front.html").is_file()

    process, _ = start_server(tmp_path, port=int(address.rpartition(":")[2]))
    records = resume_search(folder, config).records()
    process.kill()
    assert records[:3] == before
    assert [record.state for record in records] == [State.COMPLETE] * 4


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("token")
def test_a_search_by_workers_stops_where_its_board_is_lost(tmp_path: Path, run_cli: RunCli) -> None:
    process, address = start_server(tmp_path)
    out = tmp_path / "run"
    timer = threading.Thread(target=_kill_when, args=(process, lambda: _recorded(out) >= 4))
    timer.start()
    done = run_cli(
        "search", "--target", f"arm/agent:tcp://{address}", "--space", "prune", "--workers", 2, "--trials", 30,
        "--objectives", "accuracy", "latency", "--finetune-steps", 0, "--verify-time", 0, "--out", out,
    )  # fmt: skip
    timer.join()
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"error: the board was lost: arm/agent:tcp://{address}: no server answers there")
    assert line.endswith(f"--resume {out} goes on")
    found = [record.state for record in Study.open(out).records()]
    assert found == [State.COMPLETE] * len(found)
    process, _ = start_server(tmp_path, port=int(address.rpartition(":")[2]))
    done = run_cli("search", "--resume", out, "--trials", len(found) + 2)
    process.kill()
    assert done.returncode == 0, done.stderr
    assert len(Study.open(out).records()) == len(found) + 2


def _recorded(folder: Path) -> int:
    return len(Study.open(folder).records()) if (folder / "config.yaml").is_file() else 0


def _kill_when(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition() and time.monotonic() < end:
        time.sleep(0.2)
    process.kill()
    process.wait()


@pytest.mark.usefixtures("token")
def test_a_file_that_the_connection_never_survives_fails_alone(
    tmp_path: Path, files: tuple[Artifact, Artifact]
) -> None:
    process, address = start_server(tmp_path)
    board = AgentBackend(f"tcp://{address}", threads=1, budget=0.05, spread=9.0)
    huge = tmp_path / "huge.onnx"
    with huge.open("wb") as file:
        file.truncate(2**29 + 1)  # more than the board takes behind a message
    with pytest.raises(CandidateError, match="the board broke off twice over this"):
        board.predict(Artifact("any", huge, "0" * 64, 2**29 + 1), np.zeros((1, 1, 8, 8), np.float32))
    assert board.predict(files[0], np.zeros((1, 1, 8, 8), np.float32)).shape == (1, 10)
    process.kill()


def test_a_server_of_another_version_is_told_apart() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(20)
        backend = AgentBackend(f"tcp://127.0.0.1:{other.getsockname()[1]}")

        def greet() -> None:
            connection, _ = other.accept()
            with connection:
                connection.sendall(b'{"autocompress": 99, "nonce": ""}\n')

        thread = threading.Thread(target=greet)
        thread.start()
        missing = backend.missing()
        thread.join()
    assert missing is not None
    assert "expected version 1 of the board's program, got 99" in missing


def test_what_a_board_lacks_is_said(home: Path, tmp_path: Path) -> None:
    assert "arm/agent needs the name of a board: arm/agent:user@host" in str(find_backend("arm/agent").missing())
    board = AgentBackend("board", ssh=SHELL, python="no-such-python")
    assert "name the board's Python in $AUTOCOMPRESS_AGENT_PYTHON" in str(board.missing())
    venv.create(tmp_path / "bare", with_pip=False)
    python = tmp_path / "bare/bin/python"
    missing = str(AgentBackend("board", ssh=SHELL, python=str(python)).missing())
    assert f"the board lacks numpy and onnxruntime; run there: {python}" in missing
    denied = ("sh", "-c", "echo pi@board: Permission denied '(publickey).' >&2; exit 255")
    assert AgentBackend("board", ssh=denied).missing() == "arm/agent:board: pi@board: Permission denied (publickey)."
    chatty = ("sh", "-c", "echo Welcome to this board")
    assert "expected a message, got b'Welcome" in str(AgentBackend("board", ssh=chatty).missing())


@pytest.mark.parametrize("address", ["-oProxyCommand=evil", "a b", "user@", "host:port", "host;ls", "tcp:/x", "tcp://"])
def test_addresses_that_are_none_are_refused(address: str) -> None:
    with pytest.raises(InputError, match=r"expected .*tcp://host"):
        make_backend(f"arm/agent:{address}")


def test_a_board_tells_its_governor_heat_and_throttling(tmp_path: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))
    files = {f"sys/devices/system/cpu/cpu{core}/cpufreq/cpuinfo_max_freq": "1400000" for core in cores}
    files |= {
        f"sys/devices/system/cpu/cpu{cores[-1]}/cpufreq/cpuinfo_max_freq": "1800000",
        f"sys/devices/system/cpu/cpu{cores[-1]}/cpufreq/scaling_governor": "powersave\n",
        f"sys/devices/system/cpu/cpu{cores[-1]}/cpufreq/scaling_cur_freq": "600000\n",
        "sys/class/thermal/thermal_zone0/temp": "82400\n",
        "sys/class/thermal/cooling_device0/type": "thermal-cpufreq-0\n",
        "sys/class/thermal/cooling_device0/cur_state": "2\n",
        "sys/devices/platform/soc/soc:firmware/get_throttled": "50005\n",
        "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0",
        "proc/cpuinfo": "processor\t: 0\nCPU part\t: 0xd08\n\nprocessor\t: 1\nCPU part\t: 0xd08\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert board_name(tmp_path) == "Raspberry Pi 4 Model B Rev 1.4, Cortex-A72"
    assert fastest_cores(1, tmp_path) == [cores[-1]]
    if len(cores) > 1:
        assert fastest_cores(0, tmp_path) == [cores[-1]]
    hot = board_state([cores[-1]], tmp_path)
    assert hot["clocks"] == [600_000_000]
    calm = board_state([], tmp_path / "nothing")
    assert state_flags(calm, calm) == ()
    assert state_flags(calm, hot) == ("governor powersave", "82 degrees C", "throttled", "under-voltage")


def test_a_board_keeps_what_was_used_last(tmp_path: Path) -> None:
    store = Store(tmp_path / "files", kept=250)
    contents = [bytes([number]) * 100 for number in range(3)]
    names = [hashlib.sha256(content).hexdigest() for content in contents]
    for age, number in ((30, 0), (20, 1)):
        store.put(names[number], contents[number])
        os.utime(store.path(names[number]), (time.time() - age,) * 2)
    assert store.has(names[0])  # the older one is used again
    store.put(names[2], contents[2])
    assert [store.has(name) for name in names] == [True, False, True]
    with pytest.raises(Refused, match="a file came damaged"):
        store.put(names[1], contents[2])


@pytest.mark.slow
def test_a_real_ssh_server_starts_the_program(
    digits_task: Task, files: tuple[Artifact, Artifact], tmp_path: Path
) -> None:
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if sshd is None or shutil.which("ssh") is None:
        pytest.skip("needs sshd and ssh: apt install openssh-server openssh-client")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = {"ListenAddress": "127.0.0.1", "Port": port, "HostKey": tmp_path / "host", "StrictModes": "no"}
    settings |= {"AuthorizedKeysFile": tmp_path / "user.pub", "PidFile": "none", "UsePAM": "no"}
    options = [f"-o{key}={value}" for key, value in settings.items()]
    Path("/run/sshd").mkdir(exist_ok=True)
    with subprocess.Popen([sshd, "-D", "-e", "-f", "/dev/null", *options], stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert b"listening" in process.stderr.readline()
        ssh = ("ssh", "-oBatchMode=yes", "-oStrictHostKeyChecking=no", "-oUserKnownHostsFile=/dev/null")
        address = f"{getpass.getuser()}@127.0.0.1:{port}"
        try:
            backend = AgentBackend(address, 1, ssh=(*ssh, f"-i{tmp_path / 'user'}"), python=sys.executable)
            latency, reference = backend.measure(files[1], digits_task, files[0])[:2]
            assert latency.provenance.method is reference.provenance.method is Method.MEASURED
            stranger = AgentBackend(address, ssh=(*ssh, "-oIdentitiesOnly=yes", "-i/dev/null"), python=sys.executable)
            assert "Permission denied (publickey" in str(stranger.missing())
        finally:
            process.kill()
