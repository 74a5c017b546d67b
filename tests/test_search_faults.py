"""What a search survives: its driver killed, its workers killed, hanging candidates, Ctrl-C."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
from optuna.trial import TrialState

from autocompress.core.types import Candidate, Chooser, Evaluation, Measurement, Method, Plan, Provenance, State
from autocompress.evaluators.objectives import Objective
from autocompress.search.engine import Engine
from autocompress.search.executors import RayExecutor
from autocompress.search.samplers import make_sampler
from autocompress.studies.storage import Database, sqlite_url
from autocompress.studies.study import Study

QUICK = ("--finetune-steps", "20", "--executor", "inline", "--verify-time", "0", "--out", "run")
UNTIMED = ("--target", "arm/pixel3", *QUICK)  # predicts its figures
SEARCH = [sys.executable, "-m", "autocompress", "search"]


def start_search(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([*SEARCH, *arguments], cwd=cwd, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def recorded(folder: Path) -> int:
    """Trials in the run's database so far."""
    try:
        with closing(sqlite3.connect(f"file:{folder / 'study.db'}?mode=ro", uri=True)) as connection:
            return int(connection.execute("select count(*) from trials").fetchone()[0])
    except sqlite3.OperationalError:
        return 0


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


def check_whole(folder: Path, trials: int) -> None:
    """Every trial is there once, numbered in order, none running, and the budget is exact."""
    with closing(sqlite3.connect(folder / "study.db")) as connection:
        rows = connection.execute("select number, state from trials order by number").fetchall()
    assert [number for number, _ in rows] == list(range(trials))
    assert {state for _, state in rows} <= {"COMPLETE", "FAIL"}
    keys = [record.key for record in Study.open(folder).records()]
    assert len(set(keys)) == len(keys) == trials


def test_a_killed_driver_loses_nothing_and_resume_keeps_the_budget(tmp_path: Path) -> None:
    out = tmp_path / "run"
    driver = start_search("--trials", "9", *UNTIMED, cwd=tmp_path)
    wait_until(lambda: recorded(out) >= 4, 120)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.communicate()
    before = {record.trial: record for record in Study.open(out).records()}
    assert 4 <= len(before) < 9

    done = subprocess.run([*SEARCH, "--resume", "run"], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    check_whole(out, 9)
    after = {record.trial: record for record in Study.open(out).records()}
    assert all(after[number] == record for number, record in before.items())


def test_ctrl_c_ends_cleanly_and_says_how_to_go_on(tmp_path: Path) -> None:
    driver = start_search("--trials", "50", *QUICK, cwd=tmp_path)
    wait_until(lambda: recorded(tmp_path / "run") >= 3, 120)
    driver.send_signal(signal.SIGINT)
    output, errors = driver.communicate(timeout=60)
    assert driver.returncode == 130
    assert "--resume run" in errors
    assert "Traceback" not in output + errors
    assert (tmp_path / "run" / "front.html").is_file()
    check_whole(tmp_path / "run", recorded(tmp_path / "run"))


def test_two_searches_can_not_share_a_run_folder(tmp_path: Path) -> None:
    driver = start_search("--trials", "50", *UNTIMED, cwd=tmp_path)
    try:
        wait_until(lambda: recorded(tmp_path / "run") >= 1, 120)
        second = subprocess.run([*SEARCH, "--resume", "run"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert second.returncode == 2
        assert "in use" in second.stderr
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.communicate()


OBJECTIVES = (Objective("latency", "minimize", "s"), Objective("size", "minimize", "B"))


class Trouble:
    """A synthetic evaluation that gets into the trouble its parameters ask for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, candidate: Candidate) -> Evaluation:
        x, trouble = candidate.params["x"], candidate.params.get("trouble", "")
        if trouble == "hang":
            time.sleep(600)
        if trouble == "die always" or (trouble == "die once" and not (self.folder / "died").exists()):
            (self.folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if trouble == "memory":
            raise MemoryError("cannot allocate 900 GB")
        if trouble == "raise":
            raise ZeroDivisionError("division by zero")
        source = Provenance(Method.SIMULATED, "test", "test", "")
        figures = {
            "latency": Measurement("latency", x, "s", None, 1, source),
            "size": Measurement("size", float("nan") if trouble == "nan" else 1 - x, "B", None, 1, source),
        }
        return Evaluation(candidate, State.COMPLETE, figures)


def test_workers_that_hang_die_or_run_out_of_memory_become_recorded_failures(tmp_path: Path) -> None:
    from autocompress import Prune

    troubles = ["", "hang", "die once", "die always", "memory", "raise", "nan"]

    class Space:
        starts: ClassVar = [{"x": 0.1 + i / 10, "trouble": trouble} for i, trouble in enumerate(troubles)]

        def __call__(self, choose: Chooser) -> Plan:
            choose.suggest_categorical("trouble", troubles)
            return (Prune(choose.suggest_float("x", 0.01, 0.9)),)

    database = Database(sqlite_url(tmp_path), ["minimize", "minimize"], ["latency", "size"])
    engine = Engine(
        space=Space(),
        study=Study(tmp_path, OBJECTIVES, database),
        executor=RayExecutor(Trouble(tmp_path), workers=2, timeout=6),
        sampler=make_sampler("random", seed=0, trials=7, constrained=False),
        trials=7,
    )
    progress = engine.run()
    assert (progress.trials, progress.ended) == (7, "done")
    found = {trial.params["trouble"]: trial.user_attrs for trial in database.trials()}
    states = {trouble: attributes["state"] for trouble, attributes in found.items()}
    failing = ("hang", "die always", "memory", "raise", "nan")
    assert states == {"": "complete", "die once": "complete", **dict.fromkeys(failing, "failed")}
    assert "longer than 6 s" in found["hang"]["reason"]
    assert "died 2 times" in found["die always"]["reason"]
    assert "out of memory" in found["memory"]["reason"]
    assert "ZeroDivisionError: division by zero" in found["raise"]["reason"]
    assert "size is nan" in found["nan"]["reason"]


def test_a_journal_file_whose_last_write_was_cut_off_goes_on(tmp_path: Path) -> None:
    url = f"journal:{tmp_path / 'study.log'}"

    def add(x: float) -> None:
        attributes: dict[str, Any] = {"params": {}, "distributions": {}, "user_attrs": {"x": x}, "system_attrs": {}}
        Database(url, ["minimize"], ["size"]).add(state=TrialState.COMPLETE, values=[x], seconds=0, **attributes)

    add(0.1)
    with open(tmp_path / "study.log", "ab") as journal:  # as a full disk or kill -9 leaves it
        journal.write(b'{"op_code":4,"worker_id":"3f')
    add(0.2)
    add(0.3)
    assert [trial.values for trial in Database(url).trials()] == [[0.1], [0.2], [0.3]]


@pytest.mark.slow
def test_a_ray_worker_killed_from_outside_costs_no_trial(tmp_path: Path) -> None:
    arguments = ("--trials", "10", "--workers", "2", "--finetune-steps", "200", "--verify-time", "0", "--out", "run")
    driver = start_search(*arguments, cwd=tmp_path)

    def workers() -> list[psutil.Process]:
        children = psutil.Process(driver.pid).children(recursive=True)
        return [child for child in children if child.name().startswith("ray::_Worker.evaluate")]

    try:
        wait_until(lambda: recorded(tmp_path / "run") >= 3 and bool(workers()), 300)
        workers()[0].kill()
        driver.communicate(timeout=500)
        assert driver.returncode == 0
    finally:
        if driver.poll() is None:
            os.killpg(driver.pid, signal.SIGKILL)
    check_whole(tmp_path / "run", 10)
