"""Every snippet of the README runs: searches with fewer trials, and with the slow tests as they stand there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done


def smaller(line: str) -> list[str]:
    """A command; of a search few trials, no second look at doubts, and no Ray unless it asks for workers."""
    words = shlex.split(line)
    if words[1] != "search":
        return words
    budget = ["--trials", "4"] if "--workers" in words else ["--executor", "inline", "--trials", "3"]
    return [*words, *budget, "--finetune-steps", "20", "--verify-time", "0"]


PYTHON = dict(zip(("run", "space", "plan"), snippets("python"), strict=True))


@pytest.mark.parametrize("code", PYTHON.values(), ids=PYTHON)
def test_python_snippet_runs(code: str, tmp_path: Path) -> None:
    run([sys.executable, "-c", code.replace("trials=6", "trials=4, finetune_steps=20, verify_time=0")], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run", "space"])
def test_python_snippet_runs_as_it_stands(name: str, tmp_path: Path) -> None:
    assert "trials=6" in PYTHON[name]
    run([sys.executable, "-c", PYTHON[name]], tmp_path)


def test_command_snippet_of_the_analysis_runs(tmp_path: Path) -> None:
    (block,) = (block for block in snippets("bash") if "analyze" in block)
    run(shlex.split(block.strip()), tmp_path)
    assert (tmp_path / "runs" / "analysis" / "analysis.html").is_file()


def test_command_snippet_of_the_targets_runs(tmp_path: Path) -> None:
    (block,) = (block for block in snippets("bash") if "hardware" in block)
    listed, compared = (run(shlex.split(line), tmp_path).stdout for line in block.strip().splitlines())
    assert "x86/openvino" in listed
    assert all(kind in compared for kind in ("measured", "simulated", "predicted"))


@pytest.mark.parametrize("command", [smaller, pytest.param(shlex.split, marks=pytest.mark.slow)])
def test_command_snippet_of_your_own_model_runs(command: Callable[[str], list[str]], tmp_path: Path) -> None:
    (block,) = (block for block in snippets("bash") if "runs/small" in block)
    for line in block.strip().splitlines():
        run(command(line), tmp_path)


@pytest.mark.slow
def test_command_snippet_of_the_main_job_runs_with_a_smaller_budget(tmp_path: Path) -> None:
    data = Path(os.environ.get("AUTOCOMPRESS_DATA", ROOT.parent / "shared" / "data")).resolve()
    if not (data / "cifar10.tar.xz").exists() and not (data / "cifar10").exists():
        pytest.skip("needs CIFAR-10 in ../shared/data or $AUTOCOMPRESS_DATA")
    (block,) = (block for block in snippets("bash") if "cifar10" in block)
    for line in block.strip().splitlines():
        few = ["--trials", "3", "--finetune-steps", "2"] if " search " in line else []
        os.environ["AUTOCOMPRESS_DATA"] = str(data)
        run([*shlex.split(line), *few], tmp_path)


@pytest.mark.parametrize("words", [smaller, pytest.param(shlex.split, marks=pytest.mark.slow)])
def test_make_demo_ends_in_a_front_that_beats_the_untouched_model(
    words: Callable[[str], list[str]], tmp_path: Path
) -> None:
    plan = subprocess.run(
        ["make", "--dry-run", "--always-make", "demo"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    command = plan[plan.index("autocompress search") :].replace("\\\n", " ").splitlines()[0]
    out = run(words(command.replace("runs/demo", str(tmp_path / "demo"))), tmp_path).stdout
    assert "Pareto front" in out

    from autocompress.studies.study import Study

    points = Study.open(tmp_path / "demo").front()
    untouched = next(point for point in points if point.baseline == "untouched").metrics
    assert any(
        point.metrics["accuracy"].value >= untouched["accuracy"].value - 0.01
        and (point.metrics["size"].value < untouched["size"].value)
        for point in points
        if point.on_front
    )
