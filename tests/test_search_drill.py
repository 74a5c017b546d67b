"""Everything that can happen to a search, in one search: what it ends with is whole all the same."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnxruntime  # noqa: F401  (as the next but one: here, so that no candidate's time goes into loading it)
import onnxscript  # noqa: F401
import pytest
import torch
from torch import nn

import autocompress as ac
from autocompress.core.errors import DeviceLostError
from autocompress.core.registry import OBJECTIVES, operator
from autocompress.core.types import Chooser, Method, Provenance, Task
from autocompress.evaluators.objectives import Built
from autocompress.search.config import load_config, make_config
from autocompress.search.run import resume_search

HERE = Path(__file__).parent
MARKS, STARTS = "DRILL_MARKS", "DRILL_STARTS"  # environment variables: a folder for marks, and what comes first
SEARCH = [sys.executable, "-c", "import test_search_drill; from autocompress.cli import main; main()", "search"]
# What a candidate does, by its number, where it is one of those that come first.
KILLED, HANGS, NAN, MEMORY, NODE, FILLS, FILLS_LATE, LOCKS = 10, 20, 30, 40, 50, 60, 70, 80
GATES = {KILLED: "killed", NODE: "node", LOCKS: "locked"}
TIMEOUT = 30.0  # of a trial; others need a second, or several in a new worker on a busy machine
MAGIC = {NAN: np.float32(123.456), FILLS_LATE: np.float32(654.321)}  # weights by which a file tells what it is
LOCK = (
    "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], timeout=60, isolation_level=None);"
    "c.execute('BEGIN IMMEDIATE'); print('locked', flush=True); sys.stdin.read(); c.execute('ROLLBACK')"
)


def marks() -> Path:
    return Path(os.environ[MARKS])


def began(number: int) -> list[tuple[str, int]]:
    """(node, process) of each time that a candidate began, in order."""
    found = sorted((path.name.split("-") for path in marks().glob(f"began-{number}-*")), key=lambda m: int(m[4]))
    return [(node, int(pid)) for _, _, node, pid, _ in found]


def fill(ballast: Path) -> None:
    """Write a file until the disk takes nothing more."""
    with open(ballast, "wb", buffering=0) as file:
        for size in (1 << 16, 1 << 9, 1):
            with suppress(OSError):
                while file.write(bytes(size)):
                    pass


@contextmanager
def locked(database: Path) -> Iterator[None]:
    """Another process holds the database's write lock."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", LOCK, str(database)], stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        yield


def once(name: str) -> bool:
    """Whether this is the first time, in any process."""
    try:
        (marks() / f"once-{name}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


@operator
@dataclasses.dataclass(frozen=True)
class Drill:
    """Do what the number stands for, and make the file another one than any other's."""

    number: int

    rank: ClassVar[int] = 15
    retrains: ClassVar[bool] = False

    def __call__(self, model: nn.Module, task: Task) -> nn.Module:
        import ray

        node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
        (marks() / f"began-{self.number}-{node}-{os.getpid()}-{time.monotonic_ns()}").touch()
        asked = self.number if str(self.number) in os.environ[STARTS].split() else 0
        while asked in GATES and not (marks() / GATES[asked]).exists():
            time.sleep(0.05)
        if asked == HANGS:
            time.sleep(600)
        elif asked == MEMORY:
            exhaust_memory()
        elif asked == FILLS and once("fills"):
            fill(Path(os.environ["DRILL_DISK"]) / "ballast")
        last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        with torch.no_grad():
            last.bias[0] += self.number / 1000
            if asked in MAGIC:
                last.bias[1] = float(MAGIC[asked])
        return model


def exhaust_memory() -> None:
    """Ask for more memory than this process may have from now on."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), before[1]))
    try:
        torch.ones(1 << 28)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def measure(built: Built) -> ac.Measurement:
    """A figure that has nothing to do with the size."""
    content = built.artifact.path.read_bytes()
    if MAGIC[FILLS_LATE].tobytes() in content and once("fills late"):
        fill(Path(os.environ["DRILL_DISK"]) / "ballast")
    value = float("nan") if MAGIC[NAN].tobytes() in content else float(np.frombuffer(content, np.uint8).sum() % 997)
    (marks() / f"measured-{time.monotonic_ns()}").touch()
    return ac.Measurement("drill", value, "", None, 1, Provenance(Method.SIMULATED, "test", "test", ""))


OBJECTIVES.add("drill", ac.Objective("drill", "minimize", "", function=measure))


class Space:
    @property
    def starts(self) -> list[dict[str, Any]]:
        return [{"number": int(number)} for number in os.environ[STARTS].split()]

    def __call__(self, choose: Chooser) -> ac.Plan:
        number = choose.suggest_int("number", 1, 899)
        return (Drill(number), ac.Prune(0.05 + number / 1000))


SPACE = Space()


def wait_until(condition: Callable[[], bool], driver: subprocess.Popen[str] | None = None) -> None:
    end = time.monotonic() + 240
    while not condition():
        assert driver is None or driver.poll() is None, "the driver ended"
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def rows(run: Path) -> dict[int, tuple[str, dict[str, Any], tuple[float, ...]]]:
    """{trial number: (state, what was found, values)} as the database has it."""
    asked = (
        "select number, state, value_json, (select group_concat(value, ' ') from (select value from trial_values v "
        "where v.trial_id = t.trial_id order by objective)) from trials t "
        "join trial_user_attributes a on a.trial_id = t.trial_id where key = 'evaluation' order by number"
    )
    if not (run / "study.db").exists():
        return {}
    with suppress(sqlite3.OperationalError), closing(sqlite3.connect(run / "study.db", timeout=60)) as connection:
        return {
            number: (state, json.loads(found), tuple(map(float, (values or "").split())))
            for number, state, found, values in connection.execute(asked)
        }
    return {}


def recorded(run: Path) -> set[int]:
    """The numbers of the candidates that have a result."""
    steps = [step for _, found, _ in rows(run).values() for step in found["plan"]]
    return {step["number"] for step in steps if "number" in step}


def check_whole(run: Path, trials: int, reasons: dict[int, str], seen: list[dict[int, Any]]) -> None:
    """Every finished trial is there once, failures have their reasons, the budget is exact, the front is right."""
    found = rows(run)
    assert list(found) == list(range(trials))
    assert len({entry["key"] for _, entry, _ in found.values()}) == trials
    for before in seen:
        assert {number: found[number] for number in before} == before, "what was recorded stays as it is"
    failed = {entry["plan"][0]["number"]: entry["reason"] for _, entry, _ in found.values() if entry["reason"]}
    assert failed.keys() == reasons.keys(), failed
    assert all(reason in failed[number] for number, reason in reasons.items()), failed
    assert [state for state, _, _ in found.values()].count("FAIL") == len(reasons)
    assert {state for state, _, _ in found.values()} <= {"COMPLETE", "FAIL"}

    points = {number: values for number, (state, _, values) in found.items() if state == "COMPLETE"}
    best = {
        number
        for number, mine in points.items()
        if not any(all(a <= b for a, b in zip(other, mine, strict=True)) and other != mine for other in points.values())
    }
    front = ac.Study.open(run).front(baselines=False)
    assert {point.trial for point in front} == best
    assert all(point.artifact is not None and point.artifact.path.is_file() for point in front)
    with open(run / "front.csv") as file:
        assert {int(row["trial"]) for row in csv.DictReader(file) if row["on_front"] == "True"} == best
    with open(run / "trials.csv") as file:
        assert [int(row["trial"]) for row in csv.DictReader(file)] == list(range(trials))


@pytest.fixture
def disk(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A disk of 32 MB at `tmp_path / "disk"`; returns why there is none, or ""."""
    place = tmp_path / "disk"
    place.mkdir()
    (tmp_path / "marks").mkdir()
    monkeypatch.setenv(MARKS, str(tmp_path / "marks"))
    monkeypatch.setenv("DRILL_DISK", str(place))
    if os.getuid() and subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0:
        again = [sys.executable, "-m", "pytest", "-m", "", "-p", "no:cacheprovider", request.node.nodeid]
        done = subprocess.run(["unshare", "-rm", *again], cwd=request.config.rootpath, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        pytest.skip("only root mounts a small disk: passed in a user namespace")
    mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "drill", str(place)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    yield mounted.stderr.strip() if mounted.returncode else ""
    if mounted.returncode == 0:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk_and_a_locked_study_cost_nothing(
    disk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if disk:
        pytest.skip(disk)
    run, ballast = tmp_path / "disk" / "run", tmp_path / "disk" / "ballast"
    monkeypatch.setenv(STARTS, f"200 {FILLS} 201 {FILLS_LATE} 202")
    told = rf"no space left for .*: make room; nothing finished is lost: once that is done, --resume {run} goes on$"
    with pytest.raises(DeviceLostError, match=told):
        search(run, 9)
    seen = [rows(run)]
    assert recorded(run) == {200}
    with pytest.raises(DeviceLostError, match="no space left"):  # the disk is as full as before
        resume(run)
    assert rows(run) == seen[0]
    ballast.unlink()
    with pytest.raises(DeviceLostError, match="no space left for the study's database: make room; nothing finished"):
        resume(run)
    seen.append(rows(run))
    assert recorded(run) == {200, FILLS, 201}
    ballast.unlink()
    monkeypatch.setenv(STARTS, f"{LOCKS} {os.environ[STARTS]}")
    with lock_holder(run / "study.db", seconds=2):
        resume(run)
    check_whole(run, 9, {}, seen)


@pytest.mark.slow
def test_a_study_locked_for_longer_than_a_minute_ends_the_search_until_it_is_resumed(
    disk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setenv(STARTS, f"200 {LOCKS} 201")
    told = rf"stayed locked by another process: end that one; nothing finished .* --resume {run} goes on$"
    with lock_holder(run / "study.db"), pytest.raises(DeviceLostError, match=told):
        search(run, 7)
    seen = [rows(run)]
    assert recorded(run) == {200}
    resume(run)
    check_whole(run, 7, {}, seen)


def search(run: Path, trials: int) -> None:
    settings = {"target": "arm/pixel3", "objectives": ["size", "drill"], "sampler": "random"}
    settings |= {"executor": "inline", "finetune_steps": 0, "verify_time": 0}
    ac.run_search("digits-cnn", space=SPACE, trials=trials, out=run, **settings)


def resume(run: Path) -> None:
    resume_search(run, make_config({**load_config(run / "config.yaml"), "out": str(run)}), space=SPACE)


@contextmanager
def lock_holder(database: Path, seconds: float = 300.0) -> Iterator[None]:
    """Lock the study from when one candidate waits for that, for some seconds, or until the block ends."""
    done = threading.Event()

    def hold() -> None:
        wait_until(lambda: bool(began(LOCKS)) or done.is_set())
        with locked(database):
            (marks() / GATES[LOCKS]).touch()
            done.wait(seconds)

    holder = threading.Thread(target=hold)
    holder.start()
    try:
        yield
    finally:
        done.set()
        holder.join()


class Drivers:
    """The processes of a search, one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.errors, self.started = folder, folder / "errors", []

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        with open(self.errors, "w") as errors:
            settings = {"cwd": self.folder, "stdout": subprocess.DEVNULL, "stderr": errors, "start_new_session": True}
            self.started.append(subprocess.Popen([*SEARCH, *arguments], text=True, **settings))
        return self.started[-1]


@pytest.fixture
def drivers(tmp_path: Path) -> Iterator[Drivers]:
    made = Drivers(tmp_path)
    yield made
    for process in made.started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def cluster(disk: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Ray cluster of two nodes with a core each, beside the head; its workers know this module."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_worker_niceness", "0")  # by default they are the first to yield to other work
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv(STARTS, f"200 201 {KILLED} {HANGS} 202 203 {NAN} {MEMORY} {NODE}")
    memory = {"object_store_memory": 100 << 20}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **memory})
    made.nodes = {node.node_id: node for node in [made.add_node(num_cpus=1, **memory) for _ in range(2)]}
    yield made
    made.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_search_to_which_everything_happens_ends_whole(
    disk: str, cluster: Any, drivers: Drivers, tmp_path: Path
) -> None:
    run, trials = tmp_path / "disk" / "run", 20
    driver = drivers.start(
        *("--target", "arm/pixel3", "--objectives", "size", "drill", "--space", "test_search_drill:SPACE"),
        *("--sampler", "random", "--finetune-steps", "0", "--verify-time", "0", "--trials", str(trials)),
        *("--address", cluster.address, "--workers", "2", "--trial-timeout", f"{TIMEOUT:g}s", "--out", str(run)),
    )
    # A worker is killed.
    wait_until(lambda: bool(began(KILLED)), driver)
    os.kill(began(KILLED)[0][1], signal.SIGKILL)
    (marks() / "killed").touch()
    # The storage is locked for 20 s, from before the driver writes the next result; one candidate hangs meanwhile.
    wait_until(lambda: bool(began(HANGS)), driver)
    with locked(run / "study.db"):
        seen = [rows(run)]
        measured = len(list(marks().glob("measured-*")))
        wait_until(lambda: len(list(marks().glob("measured-*"))) > measured, driver)
        time.sleep(20)
        assert rows(run) == seen[0]
    # A node is lost, with the worker on it.
    wait_until(lambda: bool(began(NODE)), driver)
    cluster.remove_node(cluster.nodes[began(NODE)[0][0]], allow_graceful=False)
    (marks() / "node").touch()
    wait_until(lambda: {HANGS, NODE} <= recorded(run), driver)
    # The driver is killed, and resumed.
    seen.append(rows(run))
    driver.kill()
    driver.wait()
    driver = drivers.start("--resume", str(run))
    wait_until(lambda: len(rows(run)) > len(seen[1]), driver)
    # The disk is full: the search ends by itself.
    if not disk:
        fill(tmp_path / "disk" / "ballast")
        assert driver.wait(240) == 2
        told = drivers.errors.read_text()
        assert told.startswith("error: no space left for ")
        assert told.count("\n") == 1, told
        assert told.endswith(f": make room; nothing finished is lost: once that is done, --resume {run} goes on\n")
        seen.append(rows(run))
        assert len(seen[1]) < len(seen[2]) < trials
        (tmp_path / "disk" / "ballast").unlink()
        driver = drivers.start("--resume", str(run))
    assert driver.wait(400) == 0, drivers.errors.read_text()

    reasons = {HANGS: f"took longer than {TIMEOUT:g} s", NAN: "drill is nan", MEMORY: "out of memory: "}
    check_whole(run, trials, reasons, seen)
    times = {number: len(began(number)) for number in (KILLED, HANGS, NAN, MEMORY, NODE)}
    assert times == {KILLED: 2, HANGS: 1, NAN: 1, MEMORY: 1, NODE: 2}
    if disk:
        pytest.skip(f"whole, but for the full disk, which could not be tried: {disk}")
