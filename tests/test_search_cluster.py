"""Searches over several Ray nodes: what each worker gets, nodes that go or come, requests that nobody can meet."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from autocompress import InputError, Prune, run_search
from autocompress.core.types import Candidate, Chooser, Evaluation, Measurement, Method, Plan, Provenance, State
from autocompress.evaluators.objectives import Objective
from autocompress.search.config import make_config
from autocompress.search.engine import Engine, Progress
from autocompress.search.executors import RayExecutor
from autocompress.search.resources import Resources, parse_resources
from autocompress.search.samplers import make_sampler
from autocompress.studies.storage import Database, sqlite_url
from autocompress.studies.study import Study

OBJECTIVES = (Objective("latency", "minimize", "s"), Objective("size", "minimize", "B"))
SOURCE = Provenance(Method.SIMULATED, "test", "test", "")


def space(choose: Chooser) -> Plan:
    return (Prune(choose.suggest_float("x", 0.01, 0.9)),)


class Notes:
    """A synthetic evaluation of some seconds that writes down where it ran, and how it came there."""

    def __init__(self, folder: Path, seconds: float, kills: float = 2.0) -> None:
        self.folder, self.seconds, self.kills = folder, seconds, kills
        self.images = np.zeros((64, 3, 64, 64), np.uint8)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        (self.folder / f"received-{os.getpid()}-{time.monotonic_ns()}").touch()

    def __call__(self, candidate: Candidate) -> Evaluation:
        import ray

        x = candidate.params["x"]
        node = ray.get_runtime_context().get_node_id()
        copied = int(self.images.flags.writeable)
        (self.folder / f"ran-{node}-{os.getpid()}-{time.monotonic_ns()}-{copied}").touch()
        time.sleep(self.seconds)
        if x > self.kills:
            os.kill(os.getpid(), 9)
        figures = {"latency": Measurement("latency", x, "s", None, 1, SOURCE)}
        figures["size"] = Measurement("size", 1 - x, "B", None, 1, SOURCE)
        return Evaluation(candidate, State.COMPLETE, figures)

    def ran(self) -> list[tuple[str, str]]:
        """(node, process) of every evaluation that began."""
        return [(name.split("-")[1], name.split("-")[2]) for name in sorted(p.name for p in self.folder.glob("ran-*"))]


def search(
    folder: Path, executor: RayExecutor, trials: int, on_change: Any = lambda progress, evaluation: None
) -> tuple[Progress, Study]:
    database = Database(sqlite_url(folder), ["minimize", "minimize"], ["latency", "size"])
    study = Study(folder, OBJECTIVES, database)
    sampler = make_sampler("random", seed=0, trials=trials, constrained=False)
    engine = Engine(space, study, executor, sampler, trials, on_change=on_change)
    return engine.run(), study


class Nodes:
    """A Ray cluster of several nodes on this machine."""

    def __init__(self, *nodes: dict[str, Any]) -> None:
        from ray.cluster_utils import Cluster

        small = {"object_store_memory": 100 << 20, "include_dashboard": False}
        self._small = {"object_store_memory": 100 << 20}
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
        self.nodes = [self.add(**node) for node in nodes]
        self.address: str = self._cluster.address

    def add(self, **settings: Any) -> Any:
        return self._cluster.add_node(**{"num_cpus": 1, **self._small, **settings})

    def kill(self, node: Any) -> None:
        """End a node as a power cut does."""
        self._cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        import ray

        ray.shutdown()
        self._cluster.shutdown()


@pytest.fixture
def nodes() -> Iterator[Any]:
    made: list[Nodes] = []

    def make(*settings: dict[str, Any]) -> Nodes:
        made.append(Nodes(*settings))
        return made[0]

    yield make
    for cluster in made:
        cluster.close()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cpu=2,gpu=0.5,mem=2GB", Resources(2, 0.5, 2_000_000_000)),
        ("mem=512MB", Resources(1, 0, 512_000_000)),
        ("gpu=1, board=1", Resources(1, 1, 0, {"board": 1.0})),
    ],
)
def test_resources_are_read_and_shown_alike(text: str, expected: Resources) -> None:
    assert parse_resources(text) == expected
    assert parse_resources(str(expected)) == expected


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("cpu", "can't read 'cpu'"),
        ("cpu=two", "cpu=2,gpu=0.5,mem=2GB"),
        ("mem=2GX", "can't read 'mem=2GX'"),
        ("cpu=2GB", "can't read 'cpu=2GB'"),
        ("gpu=1.5", "whole numbers only"),
        ("gpu=0", "asks for nothing"),
        ("cpu=1,cpu=2", "given twice"),
        ("mem=2", "less than a megabyte"),
    ],
)
def test_resources_that_can_not_be_read_are_told_in_one_line(text: str, told: str) -> None:
    with pytest.raises(InputError, match=told) as caught:
        make_config({"resources": text}, "flags")
    assert "\n" not in str(caught.value)


def test_a_node_holds_as_many_workers_as_its_scarcest_resource_allows() -> None:
    has = {"CPU": 8.0, "GPU": 1.0, "memory": 5e9, "board": 1.0}
    assert parse_resources("cpu=2").count(has) == 4
    assert parse_resources("gpu=0.3").count(has) == 3
    assert parse_resources("cpu=2,mem=2GB").count(has) == 2
    assert parse_resources("board=1").count(has) == 1
    assert parse_resources("other=1").count(has) == 0


@pytest.mark.parametrize(
    ("address", "told"), [("127.0.0.1:1", "nothing answers at 127.0.0.1:1"), ("here", "HOST:PORT")]
)
def test_an_address_without_a_cluster_is_told_at_once(address: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=told):
        run_search(address=address, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_each_worker_gets_model_and_data_once_and_reads_the_data_in_place(nodes: Any, tmp_path: Path) -> None:
    cluster = nodes({}, {"num_cpus": 2})
    notes = Notes(tmp_path, 0.05)
    progress, _ = search(tmp_path, RayExecutor(notes, 3, address=cluster.address), 24)
    assert (progress.trials, progress.failures) == (24, 0)
    ran = notes.ran()
    processes = {process for _, process in ran}
    assert len(processes) == 3
    assert len({node for node, _ in ran}) == 2
    assert len(list(tmp_path.glob("received-*"))) == 3
    assert len(list(tmp_path.glob("ran-*-0"))) == 24, "arrays that may be written to are copies"


@pytest.mark.slow
def test_a_node_that_dies_costs_no_trial_and_one_that_comes_is_used(nodes: Any, tmp_path: Path) -> None:
    cluster = nodes({}, {})
    notes = Notes(tmp_path, 1.0)
    executor = RayExecutor(notes, 10, address=cluster.address, growing=True)
    happened: list[str] = []

    def on_change(progress: Progress, evaluation: Evaluation | None) -> None:
        if progress.trials >= 4 and not happened:
            happened.append("killed")
            cluster.kill(cluster.nodes[0])
        if progress.trials >= 8 and len(happened) == 1:
            happened.append("added")
            cluster.add()

    progress, study = search(tmp_path, executor, 24, on_change)
    assert (progress.trials, progress.failures, progress.ended) == (24, 0, "done")
    assert len({record.key for record in study.records()}) == 24
    assert happened == ["killed", "added"]
    assert len({node for node, _ in notes.ran()}) == 3


@pytest.mark.slow
def test_candidates_that_kill_their_workers_fail_alone(nodes: Any, tmp_path: Path) -> None:
    cluster = nodes({}, {})
    notes = Notes(tmp_path, 0.1, kills=0.7)
    progress, study = search(tmp_path, RayExecutor(notes, 2, address=cluster.address), 12)
    assert progress.trials == 12
    for record in study.records():
        assert (record.state is State.FAILED) == (record.params["x"] > 0.7)
        assert ("its worker died" in record.reason) == (record.params["x"] > 0.7)


@pytest.mark.slow
def test_a_request_that_no_node_can_meet_is_told_at_once(nodes: Any, tmp_path: Path) -> None:
    cluster = nodes({})
    executor = RayExecutor(Notes(tmp_path, 0), 2, address=cluster.address, resources=parse_resources("cpu=2,board=1"))
    started = time.monotonic()
    with pytest.raises(InputError, match=r"no node can hold a worker that needs cpu=2,board=1; there are: .*1 x cpu=1"):
        search(tmp_path, executor, 2)
    assert time.monotonic() - started < 30


@pytest.mark.slow
def test_a_cluster_that_is_busy_is_waited_for_but_not_for_ever(nodes: Any, tmp_path: Path) -> None:
    cluster = nodes({})
    import ray

    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")

    @ray.remote(num_cpus=1)
    class Other:
        def ready(self) -> None:
            """Return once it runs."""

    other = Other.remote()
    ray.get(other.ready.remote())
    with pytest.raises(InputError, match=r"no worker for 8 s: all nodes that can hold a worker .* in use by others"):
        search(tmp_path, RayExecutor(Notes(tmp_path, 0), 1, address=cluster.address, patience=8), 2)
    ray.kill(other)
    progress, _ = search(tmp_path, RayExecutor(Notes(tmp_path, 0), 1, address=cluster.address, patience=30), 2)
    assert progress.trials == 2


AUTOSCALED = """
cluster_name: autoscaled
max_workers: 2
provider:
    type: fake_multinode
    use_node_id_as_ip: True
    disable_node_updaters: True
    disable_launch_config_check: True
available_node_types:
    head: {resources: {CPU: 0}, node_config: {}, max_workers: 0}
    small: {resources: {CPU: 1, object_store_memory: 100000000}, node_config: {}, min_workers: 0, max_workers: 2}
head_node_type: head
auth: {}
docker: {}
upscaling_speed: 1.0
idle_timeout_minutes: 5
initialization_commands: []
setup_commands: []
head_setup_commands: []
worker_setup_commands: []
head_start_ray_commands: []
worker_start_ray_commands: []
file_mounts: {}
cluster_synced_files: []
file_mounts_sync_continuously: false
rsync_exclude: []
rsync_filter: []
"""


@pytest.mark.slow
def test_a_cluster_that_grows_on_demand_is_asked_for_nodes(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(AUTOSCALED)
    # The provider that imitates a cloud on one machine knows this port alone.
    with socket.socket() as probe:
        try:
            probe.bind(("", 6379))
        except OSError:
            pytest.skip("port 6379 is in use")
    ray = str(Path(sys.executable).parent / "ray")
    fixed = ["--num-cpus=0", "--object-store-memory=100000000", "--include-dashboard=false", "--disable-usage-stats"]
    scaling = [f"--autoscaling-config={tmp_path / 'cluster.yaml'}", "--port=6379", "--block"]
    environment = {
        **os.environ,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_AUTH_MODE": "disabled",
    }
    with open(tmp_path / "head.log", "w") as log:
        head = subprocess.Popen([ray, "start", "--head", *fixed, *scaling], env=environment, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 60
        while "Ray runtime started" not in (tmp_path / "head.log").read_text():
            assert time.monotonic() < end, (tmp_path / "head.log").read_text()
            time.sleep(0.5)
        notes = Notes(tmp_path, 1.0)
        executor = RayExecutor(notes, 30, address="127.0.0.1:6379", growing=True, patience=90)
        progress, _ = search(tmp_path, executor, 30)
        assert (progress.trials, progress.failures) == (30, 0)
        assert len({node for node, _ in notes.ran()}) == 2
    finally:
        started = psutil.Process(head.pid).children(recursive=True)
        for process in [*started, head]:
            if process.is_running() if isinstance(process, psutil.Process) else process.poll() is None:
                process.kill()
        head.wait()
