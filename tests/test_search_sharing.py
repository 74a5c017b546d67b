"""What nodes share: files that come home from other machines, trained weights that are trained once."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from autocompress import InputError, Study
from autocompress.core.errors import MissingDependencyError
from autocompress.search.store import open_store

MADE_FROM = {"model": "a", "data": "b"}


def test_a_store_gives_back_whole_files(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path / 'there'}", MADE_FROM)
    (tmp_path / "a.safetensors").write_bytes(b"1" * 1000)
    store.put(tmp_path / "a.safetensors", "cache/a1.safetensors")
    store.put(tmp_path / "a.safetensors", "cache/b.safetensors")
    assert store.names("cache/a") == ["cache/a1.safetensors"]
    assert store.get("cache/a1.safetensors", tmp_path / "here" / "a1")
    assert (tmp_path / "here" / "a1").read_bytes() == b"1" * 1000
    store.drop("cache/a1.safetensors")
    store.drop("cache/a1.safetensors")
    assert store.names("cache/a") == []
    assert not store.get("cache/a1.safetensors", tmp_path / "here" / "a2")
    assert not list(tmp_path.rglob("*.part"))


def test_what_was_made_from_other_models_or_data_stays_apart(tmp_path: Path) -> None:
    first, second = (open_store(str(tmp_path), {**MADE_FROM, "model": model}) for model in "ab")
    (tmp_path / "file").write_bytes(b"1")
    first.put(tmp_path / "file", "cache/k")
    assert second.names("cache/k") == []


@pytest.mark.parametrize(
    ("url", "told"), [("file:///proc/none", "can't write to file:///proc/none"), ("nonsense://x", "nonsense")]
)
def test_a_store_that_can_not_be_written_to_is_told_in_one_line(url: str, told: str) -> None:
    with pytest.raises(InputError, match=told) as caught:
        open_store(url, MADE_FROM)
    assert "\n" not in str(caught.value)


def test_a_store_without_its_package_says_how_to_get_it() -> None:
    if importlib.util.find_spec("s3fs") is not None:
        pytest.skip("s3fs is installed")
    with pytest.raises(MissingDependencyError, match=r"autocompress\[s3\]"):
        open_store("s3://bucket/path", MADE_FROM)


def test_object_storage_does_as_a_folder_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("s3fs") is None or shutil.which("moto_server") is None:
        pytest.skip("no imitation of S3: pip install s3fs 'moto[server]'")
    import s3fs

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    server = subprocess.Popen(["moto_server", "-H", "127.0.0.1", "-p", str(port)], stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 30
        with socket.socket() as probe:
            while probe.connect_ex(("127.0.0.1", port)):
                assert time.monotonic() < end
                time.sleep(0.2)
        s3fs.S3FileSystem().mkdir("bucket")
        store = open_store("s3://bucket/shared", MADE_FROM)
        (tmp_path / "a").write_bytes(b"1" * 1000)
        store.put(tmp_path / "a", "cache/a1.safetensors")
        assert store.names("cache/a") == ["cache/a1.safetensors"]
        assert store.get("cache/a1.safetensors", tmp_path / "b")
        assert (tmp_path / "b").read_bytes() == b"1" * 1000
        store.drop("cache/a1.safetensors")
        assert store.names("cache/a") == []
        assert not store.get("cache/a1.safetensors", tmp_path / "c")
        with pytest.raises(InputError, match="can't write to s3://other"):
            open_store("s3://other/shared", MADE_FROM)
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[str]:
    """Address of a Ray cluster of two nodes that see an empty folder in place of the run folder's parent."""
    hidden = tmp_path / "runs"
    hidden.mkdir()
    mount = f"mount -t tmpfs none {hidden}"
    # For good, as a search on this machine does: Ray reads the token once in a process.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "sh", "-c", mount]).returncode:
        pytest.skip("needs the right to mount (root), to hide the run folder from the workers")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray = f"{Path(sys.executable).parent / 'ray'} start --block --disable-usage-stats --object-store-memory=100000000"
    head = f"exec {ray} --head --port={port} --num-cpus=0 --include-dashboard=false"
    node = f"{mount} && exec {ray} --address=127.0.0.1:{port} --num-cpus=1"
    started = []
    try:
        for number, command in enumerate((["sh", "-c", head], *[["unshare", "-m", "sh", "-c", node]] * 2)):
            place = tmp_path / f"node{number}"
            place.mkdir()
            with open(place / "log", "w") as log:
                environment = {**os.environ, "TMPDIR": str(place)} if number else dict(os.environ)
                started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            end = time.monotonic() + 60
            while "Ray runtime started" not in (place / "log").read_text():
                assert time.monotonic() < end, (place / "log").read_text()
                time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        for process in reversed(started):
            children = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            process.wait(30)
            for child in children:
                if child.is_running():
                    child.kill()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_files_and_weights_of_workers_on_other_machines_reach_the_run_folder_and_each_other(
    elsewhere: str, tmp_path: Path
) -> None:
    out, shared = tmp_path / "runs" / "one", tmp_path / "shared"
    asked = ["--trials", "7", "--finetune-steps", "5", "--verify-time", "0", "--workers", "auto"]
    search = [sys.executable, "-m", "autocompress", "search", *asked, "--address", elsewhere]
    subprocess.run([*search, "--shared", str(shared), "--out", str(out)], check=True, timeout=800)
    study = Study.open(out)
    assert len(study.records()) == 7
    assert not [record.reason for record in study.records() if record.reason]
    for point in study.front():
        assert point.artifact is not None
        assert point.artifact.path.is_file()
        assert hashlib.sha256(point.artifact.path.read_bytes()).hexdigest() == point.artifact.sha256
        assert point.split == "test"
    weights = list(shared.glob("*/cache/*.safetensors"))
    assert weights
    nodes = [list((tmp_path / f"node{number}").glob("autocompress-*-runs/*")) for number in (1, 2)]
    assert all(len(found) == 1 for found in nodes), "both nodes worked, in a folder of their own"
    untouched = next(record for record in study.records() if record.baseline == "untouched")
    for (folder,) in nodes:
        assert [path.parent.name for path in folder.glob("artifacts/*/*")] == [untouched.key], "files went home"
