"""Kill workers and drivers of small searches at random, resume them, and check what is left.

    python examples/fault_drill.py --rounds 5

Each round is a search of digits-cnn over two Ray workers. While it runs, one of its workers, or the driver itself, gets
`kill -9` soon after a trial was recorded, now and then at once; a killed driver is resumed. When the search has ended,
its run folder is checked: every trial is there once, in order, none running; what was recorded before a kill is still
there, unchanged; the budget is exact; every file that the front refers to exists and has the recorded hash; no process
is left.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil

from autocompress import Study

WORKERS = 2
SEARCH = [sys.executable, "-m", "autocompress", "search"]
SETTINGS = ["--space", "ptq", "--granularity", "layer", "--sampler", "random", "--finetune-steps", "1"]
SETTINGS += ["--workers", str(WORKERS), "--verify-time", "0"]
LONGEST = 900.0  # seconds for a round


def rows(folder: Path) -> dict[int, tuple[str, str]]:
    """{trial number: (state, what was found)} as the database has it."""
    asked = (
        "select number, state, value_json from trials join trial_user_attributes using (trial_id) "
        "where key = 'evaluation' order by number"
    )
    try:
        with closing(sqlite3.connect(f"file:{folder / 'study.db'}?mode=ro", uri=True)) as connection:
            return {number: (state, text) for number, state, text in connection.execute(asked)}
    except sqlite3.OperationalError:  # not made yet
        return {}


def family(driver: psutil.Process) -> list[psutil.Process]:
    """The driver's processes, its workers among them."""
    try:
        return driver.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def one_round(folder: Path, trials: int, seed: int, pause: float) -> tuple[Counter[str], list[str]]:
    """Run a search under fire; returns how often what was killed, and what is wrong afterwards."""
    chance, killed, wrong = random.Random(seed), Counter[str](), []
    started = [*SEARCH, *SETTINGS, "--trials", str(trials), "--seed", str(seed), "--out", str(folder)]
    resumed = [*SEARCH, "--resume", str(folder)]
    seen: dict[int, tuple[str, str]] = {}
    processes: list[psutil.Process] = []
    end = time.monotonic() + LONGEST
    command = started
    while time.monotonic() < end:
        driver = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        outcome = fire(driver, folder, chance, pause, killed, seen, processes, end)
        if outcome == 0:
            break
        if outcome is not None and outcome > 0:
            wrong.append(f"the driver ended with {outcome}: {driver.stderr.read().strip()[-300:]}")
            break
        # One that was killed before it had checked its settings is started anew.
        command = resumed if (folder / "config.yaml").exists() else started
    else:
        wrong.append(f"not done after {LONGEST:g} s")
    time.sleep(5)  # Ray's processes notice that their driver is gone
    left = [process.name() for process in processes if process.is_running() and process.status() != "zombie"]
    wrong += [f"{len(left)} processes are left: {', '.join(sorted(set(left)))}"] if left else []
    return killed, [*wrong, *faults(folder, trials, seen)]


def fire(
    driver: psutil.Popen,
    folder: Path,
    chance: random.Random,
    pause: float,
    killed: Counter[str],
    seen: dict[int, tuple[str, str]],
    processes: list[psutil.Process],
    end: float,
) -> int | None:
    """Kill workers of a driver, and at last itself; returns its exit status where it came to an end before."""
    while time.monotonic() < end:
        # Some progress between kills, whatever the speed of the machine; but start-up and clean-up are hit as well.
        known = len(rows(folder)) if chance.random() < 0.8 else -1
        while len(rows(folder)) <= known and driver.poll() is None and time.monotonic() < end:
            time.sleep(0.2)
        try:
            return int(driver.wait(chance.uniform(0.1, 2.0) * pause))
        except (subprocess.TimeoutExpired, psutil.TimeoutExpired):
            pass
        for number, row in rows(folder).items():
            seen.setdefault(number, row)
        members = family(driver)
        processes += members
        workers = [process for process in members if "_Worker" in _name(process)]
        if chance.random() < 0.3:
            driver.kill()
            driver.wait()
            killed["driver"] += 1
            return None
        if workers:
            try:
                chance.choice(workers).kill()
                killed["worker"] += 1
            except psutil.NoSuchProcess:
                continue
    driver.kill()
    return None


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()) or process.name()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def faults(folder: Path, trials: int, seen: dict[int, tuple[str, str]]) -> list[str]:
    """What is wrong in a run folder."""
    found = rows(folder)
    wrong = []
    if list(found) != list(range(trials)):
        wrong.append(f"trials {list(found)} instead of 0..{trials - 1}")
    wrong += [f"trial {number} is {state}" for number, (state, _) in found.items() if state not in ("COMPLETE", "FAIL")]
    wrong += [f"trial {number} has changed or is gone" for number, row in seen.items() if found.get(number) != row]
    keys = Counter(json.loads(text)["key"] for _, text in found.values())
    wrong += [f"candidate {key} stands there {times} times" for key, times in keys.items() if times > 1]
    study = Study.open(folder)
    for record in study.records():
        if record.reason and "its worker" not in record.reason:
            wrong.append(f"trial {record.trial}: {record.reason}")
    for point in study.front():
        if point.artifact is None or not point.artifact.path.is_file():
            wrong.append(f"the file of trial {point.trial} is gone")
        elif hashlib.sha256(point.artifact.path.read_bytes()).hexdigest() != point.artifact.sha256:
            wrong.append(f"the file of trial {point.trial} is another one")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0, help="of the first round; the next ones count on")
    parser.add_argument("--pause", type=float, default=4.0, help="mean seconds from a recorded trial to the next kill")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the rounds there")
    arguments = parser.parse_args()
    told: list[dict[str, Any]] = []
    for number in range(arguments.rounds):
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            killed, wrong = one_round(Path(folder) / "run", arguments.trials, arguments.seed + number, arguments.pause)
        seconds = time.monotonic() - began
        told.append({"round": number, "seconds": round(seconds), "killed": dict(killed), "wrong": wrong})
        print(
            f"round {number}: {killed['worker']} workers and {killed['driver']} drivers killed in {seconds:.0f} s; "
            f"{'; '.join(wrong) or 'nothing lost, nothing doubled'}",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(told, indent=1) + "\n")
    sys.exit(any(entry["wrong"] for entry in told))


if __name__ == "__main__":
    main()
