"""Shared fixtures: the digits task, the command line, and one small run that many tests read."""

from __future__ import annotations

import fcntl
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# One thread, set before torch is loaded: models this small gain nothing from more, and lose to other work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# One token for all Ray clusters of the tests: Ray reads it once in a process.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

import numpy as np
import pytest

if TYPE_CHECKING:
    from autocompress import Task

RunCli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The package's cache folder of this test session, for this process and for those it starts."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOCOMPRESS_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def digits_task() -> Task:
    """The built-in, trained digits model on its data."""
    from autocompress import load_task

    return load_task("digits-cnn", "digits")


@pytest.fixture(scope="session")
def run_cli(cache_folder: Path) -> RunCli:
    """Run `autocompress ARGS` in a process of its own."""

    def run(
        *args: object, cwd: Path | None = None, env: dict[str, str] | None = None, timeout: float = 240
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "autocompress", *map(str, args)],
            cwd=cwd,
            env={**os.environ, "COLUMNS": "200", **(env or {})},
            timeout=timeout,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture
def call_cli(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run `autocompress ARGS` in this process, in `tmp_path`; returns exit code, output and errors."""
    from autocompress.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the command adds its working folder

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["autocompress", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return call


@pytest.fixture(scope="session")
def small_run(run_cli: RunCli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished search over seven digits models; read only, copy it to change it.

    Processes that run tests side by side share it: the first one searches, the others wait.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "small_run"
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "front.html").is_file():  # written last
            settings = ("--trials", 7, "--executor", "inline", "--finetune-steps", 30, "--verify-time", 0)
            done = run_cli("search", *settings, "--out", folder)
            assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 24 PNGs, 40x40 pixels of noise around one colour each; read only."""
    from PIL import Image

    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name, colour in (("blue", (40, 60, 200)), ("green", (60, 190, 70)), ("red", (210, 50, 60))):
        (root / name).mkdir()
        for number in range(24):
            pixels = np.clip(rng.normal(colour, 30, (40, 40, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number:02}.png")
    return root
