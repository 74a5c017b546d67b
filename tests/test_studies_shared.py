"""Several searches in one study: on SQLite, a journal file, a gRPC server and PostgreSQL."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from autocompress import InputError, Prune, Study
from autocompress.core.errors import MissingDependencyError
from autocompress.core.types import Candidate, Chooser, Evaluation, Measurement, Method, Plan, Provenance, State
from autocompress.evaluators.objectives import Objective
from autocompress.search.engine import Engine
from autocompress.search.executors import InlineExecutor
from autocompress.search.samplers import make_sampler
from autocompress.studies import claims as claims_module
from autocompress.studies.claims import Claims, piece_of
from autocompress.studies.storage import Database, show_url

TOOLS = Path("/usr/lib/postgresql/15/bin")
SEARCH = [sys.executable, "-m", "autocompress", "search", "--executor", "inline", "--verify-time", "0"]
SEARCH += ["--space", "ptq", "--granularity", "layer", "--finetune-steps", "2"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    """URL of a PostgreSQL server of our own; it refuses to run as root."""
    found = shutil.which("initdb") or (str(TOOLS / "initdb") if (TOOLS / "initdb").exists() else None)
    if found is None:
        pytest.skip("PostgreSQL is not installed: apt install postgresql")
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("no driver for PostgreSQL: pip install 'autocompress[postgresql]'")
    tools, user = Path(found).resolve().parent, ""
    if os.getuid() == 0:
        user = next((u.pw_name for u in pwd.getpwall() if u.pw_name in ("postgres", "nobody")), "")
        if not user or shutil.which("setpriv") is None:
            pytest.skip("PostgreSQL does not run as root, and there is no other user to run it")
    drop = ["setpriv", "--reuid", user, "--clear-groups"] if user else []
    with tempfile.TemporaryDirectory() as folder:
        if user:
            os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
        port, data = free_port(), f"{folder}/data"
        asked = [tools / "initdb", "--pgdata", data, "--username", "search", "--auth", "trust", "--no-sync"]
        subprocess.run([*drop, *asked], check=True, capture_output=True, cwd=folder)
        settings = ["-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={folder}", "-c", "fsync=off"]
        server = subprocess.Popen(
            [*drop, tools / "postgres", "-D", data, "-p", str(port), *settings],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
        )
        ready = [tools / "pg_isready", "-h", "127.0.0.1", "-p", str(port)]
        wait_until(lambda: subprocess.run(ready, capture_output=True).returncode == 0, 30)
        yield f"postgresql+psycopg://search@127.0.0.1:{port}/postgres"
        server.send_signal(signal.SIGINT)
        server.wait()


@pytest.fixture
def grpc_server(tmp_path: Path) -> Iterator[str]:
    """URL of Optuna's gRPC server in front of a journal file."""
    if importlib.util.find_spec("grpc") is None:
        pytest.skip("no gRPC: pip install 'autocompress[grpc]'")
    port = free_port()
    script = (
        "import optuna; from optuna.storages.journal import JournalFileBackend\n"
        f"storage = optuna.storages.JournalStorage(JournalFileBackend({str(tmp_path / 'server.log')!r}))\n"
        f"optuna.storages.run_grpc_proxy_server(storage, host='127.0.0.1', port={port})"
    )
    server = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    yield f"grpc://127.0.0.1:{port}"
    server.kill()
    server.wait()


@pytest.fixture(params=["sqlite", "journal", "grpc", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    kinds = {"sqlite": f"sqlite:///{tmp_path / 'study.db'}", "journal": f"journal:{tmp_path / 'study.log'}"}
    fixtures = {"grpc": "grpc_server", "postgresql": "postgresql"}
    name = fixtures.get(request.param)
    return request.getfixturevalue(name) if name else kinds[request.param]


def opened(url: str, study: str) -> Database:
    return Database(url, ["maximize", "minimize"], ["accuracy", "size"], study, shared=True)


def write(database: Database, number: int, state: TrialState = TrialState.COMPLETE) -> int | None:
    values = [number / 100, 1.0] if state is TrialState.COMPLETE else None
    return database.add(
        state=state,
        values=values,
        params={"x": number / 100},
        distributions={"x": FloatDistribution(0, 1)},
        user_attrs={"evaluation": {"key": f"k{number}"}},
        system_attrs={},
        seconds=0.5,
        piece=f"k{number}@1",
    )


def test_several_writers_get_numbers_in_order_and_no_piece_of_work_twice(
    url: str, request: pytest.FixtureRequest
) -> None:
    study = request.node.name
    opened(url, study)

    def work(offset: int) -> None:
        mine = opened(url, study)
        for number in range(offset, offset + 12):  # the other writer has the last two of these as well
            write(mine, number, TrialState.FAIL if number % 5 == 0 else TrialState.COMPLETE)

    writers = [threading.Thread(target=work, args=(offset,)) for offset in (0, 10)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    trials = opened(url, study).trials()
    assert [trial.number for trial in trials] == list(range(len(trials)))
    assert {trial.state for trial in trials} == {TrialState.COMPLETE, TrialState.FAIL}
    pieces = [trial.user_attrs["piece"] for trial in trials]
    assert set(pieces) == {f"k{number}@1" for number in range(22)}
    # Without transactions there is a moment between looking and writing.
    assert len(pieces) == 22 or (not url.startswith(("sqlite", "postgresql")) and len(pieces) <= 24)
    assert write(opened(url, study), 3) is None
    complete = next(trial for trial in trials if trial.state is TrialState.COMPLETE)
    assert complete.params["x"] == complete.values[0]
    assert complete.duration is not None
    assert complete.duration.total_seconds() == pytest.approx(0.5)


def test_a_claimed_candidate_is_left_to_who_claimed_it_while_that_one_lives(
    url: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = opened(url, request.node.name).study
    mine, yours = (Claims(study._storage, study._study_id) for _ in range(2))
    assert mine.take("a")
    assert mine.take("b")
    assert not yours.take("a")
    assert yours.elsewhere() == 2
    mine.drop("a")
    assert yours.take("a")
    monkeypatch.setattr(claims_module, "SILENCE", 0.2)
    time.sleep(0.3)
    assert yours.take("b"), "a search that shows no sign of life keeps nothing"


def test_the_front_measured_again_is_there_for_all(url: str, request: pytest.FixtureRequest) -> None:
    first = opened(url, request.node.name)
    write(first, 1)
    first.set_front(0, "test", {"accuracy": {"value": 0.9}})
    assert opened(url, request.node.name).front()[0]["metrics"] == {"accuracy": {"value": 0.9}}


class Coarse:
    """A space of 40 candidates, the same four first."""

    starts: ClassVar = [{"x": x} for x in (0.1, 0.2, 0.3, 0.4)]

    def __call__(self, choose: Chooser) -> Plan:
        return (Prune(choose.suggest_float("x", 0.02, 0.8, step=0.02)),)


def engine(url: str, folder: Path, evaluated: list[str], trials: int) -> Engine:
    def evaluate(candidate: Candidate) -> Evaluation:
        evaluated.append(candidate.key)
        time.sleep(0.05)
        source = Provenance(Method.SIMULATED, "test", "test", "")
        x = candidate.params["x"]
        found = {n: Measurement(n, v, "", None, 1, source) for n, v in (("accuracy", 1 - x), ("size", 1 - x * x))}
        return Evaluation(candidate, State.COMPLETE, found)

    objectives = (Objective("accuracy", "maximize", ""), Objective("size", "minimize", "B"))
    study = Study(folder, objectives, opened(url, "engines"))
    sampler = make_sampler("random", seed=0, trials=trials, constrained=False)
    return Engine(Coarse(), study, InlineExecutor(evaluate), sampler, trials)


def test_engines_share_candidates_and_budget(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    evaluated: list[list[str]] = [[], [], []]
    engines = [engine(url, tmp_path, mine, 24) for mine in evaluated]
    threads = [threading.Thread(target=each.run) for each in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    keys = [record.key for record in engines[0].study.records()]
    assert len(keys) == len(set(keys))
    assert 24 <= len(keys) <= 26, "each further search may ask for the last one in the same milliseconds"
    assert all(mine for mine in evaluated)
    # Each may evaluate one in vain while the last ones are recorded.
    assert sum(len(mine) for mine in evaluated) <= len(keys) + len(engines)


def test_an_engine_takes_over_what_a_dead_one_had_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    evaluated: list[str] = []
    survivor = engine(url, tmp_path, evaluated, 6)
    study = survivor.study
    dead = study.claims()
    assert dead is not None
    first = piece_of(Candidate(Coarse()(optuna.trial.FixedTrial(Coarse.starts[0]))))
    assert dead.take(first)
    monkeypatch.setattr(claims_module, "SILENCE", 2.0)
    assert survivor.run().ended == "done"
    assert len(study.records()) == len(evaluated) == 6


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("grpc://nowhere", "expected grpc://HOST:PORT"),
        ("journal:/proc/none/study.log", "can't open the study at journal:/proc/none/study.log"),
        ("nonsense", "can't open the study at nonsense"),
        ("postgresql+psycopg://me:secret@127.0.0.1:1/x", "connection"),
    ],
)
def test_storages_that_can_not_be_opened_are_told_in_one_line(wrong: str, told: str) -> None:
    if wrong.startswith("grpc") and importlib.util.find_spec("grpc") is None:
        pytest.skip("no gRPC: pip install 'autocompress[grpc]'")
    if wrong.startswith("postgresql") and importlib.util.find_spec("psycopg") is None:
        pytest.skip("no driver for PostgreSQL: pip install 'autocompress[postgresql]'")
    with pytest.raises(InputError, match=told) as caught:
        opened(wrong, "study")
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_driver_is_named() -> None:
    with pytest.raises(MissingDependencyError, match="install the package that it names"):
        opened("mysql+mysqldb://me:secret@127.0.0.1/x", "study")
    assert show_url("mysql://me:secret@host/x") == "mysql://me:***@host/x"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("url", ["journal", "postgresql"], indirect=True)
def test_two_searches_share_a_study_and_its_budget(url: str, tmp_path: Path) -> None:
    def start(out: str) -> subprocess.Popen[str]:
        asked = ["--trials", "8", "--storage", url, "--study", "both", "--out", str(tmp_path / out), "--seed", "3"]
        asked += ["--shared", str(tmp_path / "shared")]
        return subprocess.Popen([*SEARCH, *asked], stderr=subprocess.PIPE, text=True)

    searches = [start("one"), start("two")]
    told = [search.communicate(timeout=500)[1] for search in searches]
    assert [search.returncode for search in searches] == [0, 0], told
    study = Study.open(tmp_path / "one")
    records = study.records()
    assert 8 <= len(records) <= 9
    assert [record.trial for record in records] == list(range(len(records)))
    assert len({record.key for record in records}) == len(records)
    files = [
        {path.parent.name for path in (tmp_path / out / "artifacts").glob("*/*")} & {r.key for r in records}
        for out in ("one", "two")
    ]
    assert all(len(found) > 1 for found in files), "both searches evaluated candidates"
    fronts = [Study.open(tmp_path / out).front() for out in ("one", "two")]
    present = [[p.artifact is not None and p.artifact.path.is_file() for p in front] for front in fronts]
    assert any(all(found) for found in present), "the last one to end has everybody's files"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_search_goes_on_where_another_in_its_study_was_killed(postgresql: str, tmp_path: Path) -> None:
    asked = ["--trials", "7", "--storage", postgresql, "--study", "killed"]
    first = subprocess.Popen([*SEARCH, *asked, "--out", str(tmp_path / "one")], stdout=subprocess.DEVNULL)

    def recorded() -> int:
        try:
            return len(optuna.load_study(study_name="killed", storage=postgresql).trials)
        except KeyError:
            return 0

    wait_until(lambda: recorded() >= 3, 200)
    first.kill()
    first.wait()
    subprocess.run([*SEARCH, *asked, "--out", str(tmp_path / "two")], check=True, timeout=500)
    records = Study.open(tmp_path / "two").records()
    assert len(records) == len({record.key for record in records}) == 7
    states = {trial.state for trial in optuna.load_study(study_name="killed", storage=postgresql).trials}
    assert states <= {TrialState.COMPLETE, TrialState.FAIL}
