"""The program on a board: keeps model files by their hash, runs them, times them, and says how the board is doing.

It runs in one of two ways: started by `ssh`, for the one who logged in, or as a server (`--serve --port N`), for those
who know the token in $AUTOCOMPRESS_AGENT_TOKEN. Needs Python 3.9, NumPy and ONNX Runtime, nothing else of autocompress.

Everything that runs a file does so in a process of its own, so that a crash of the runtime is one file's fault.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import secrets
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from .board_state import board_name, board_state, fastest_cores
from .board_wire import PROTOCOL, STRANGER, Message, Wire, WireError, is_proof

TOKEN = "AUTOCOMPRESS_AGENT_TOKEN"
LITERT = ("ai-edge-litert", "tflite-runtime")  # either runs TensorFlow Lite files; neither is needed
SHORTEST = 16  # characters of a token
KEPT = 2**31  # bytes of files that are kept; the longest unused go first
BEAT = 5.0  # seconds between the signs of life that are sent during long work
STRANGERS = 10.0  # seconds in which the token must be shown
CONNECTIONS = 16


class Refused(Exception):
    """A request that can't be served; its text goes to the one who asked."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class Store:
    """Files in a folder, named by the SHA-256 of their content."""

    def __init__(self, folder: Path, kept: int = KEPT) -> None:
        self.folder, self._kept = folder, kept
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def path(self, name: object) -> Path:
        """Where a file lies; raises Refused for anything that is no hash."""
        if not (isinstance(name, str) and len(name) == 64 and set(name) <= set("0123456789abcdef")):
            raise Refused("input", f"expected the SHA-256 of a file, got {str(name)[:80]!r}")
        return self.folder / name

    def has(self, name: object) -> bool:
        """Whether a file is here; from now on it is the last to go."""
        path = self.path(name)
        if path.is_file():
            os.utime(path)
        return path.is_file()

    def put(self, name: object, content: bytes) -> None:
        """Keep a file, after its hash was checked."""
        path = self.path(name)
        found = hashlib.sha256(content).hexdigest()
        if found != name:
            raise Refused("input", f"a file came damaged: expected the SHA-256 {name}, got {found}")
        self._make_room(len(content), path)
        part = path.with_name(f"{secrets.token_hex(8)}.part")
        try:
            part.write_bytes(content)
            part.replace(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise Refused("input", f"the board can't keep a file of {len(content)} bytes: {error.strerror}") from error

    def _make_room(self, size: int, path: Path) -> None:
        held = []
        for entry in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another connection made room, too
                stat = entry.stat()
                held.append((stat.st_mtime, stat.st_size, entry))
        excess = sum(entry[1] for entry in held) + size - self._kept
        for _, freed, entry in sorted(held):
            if excess > 0 and entry != path:
                entry.unlink(missing_ok=True)
                excess -= freed


class Agent:
    """Answers the requests of one connection.

    Attributes:
        wire: to the one who asks.
        store: the files.
    """

    def __init__(self, wire: Wire, store: Store) -> None:
        self.wire, self.store = wire, store

    def greet(self, token: str) -> bool:
        """Say which protocol this is, and ask for the token if there is one; returns whether to go on."""
        nonce = secrets.token_hex(16) if token else ""
        self.wire.send({"autocompress": PROTOCOL, "nonce": nonce})
        message, _ = self.wire.receive(STRANGER, 0)
        if token and not is_proof(message.get("proof", ""), token, nonce):
            self.wire.send({"error": "token", "text": f"the token is not the one in ${TOKEN} on the board"})
            return False
        self.wire.send(describe())
        return True

    def serve(self) -> None:
        """Answer until the other side goes away."""
        answers = {"has": self._has, "put": self._put, "state": self._state, "measure": self._measure}
        answers["predict"] = self._predict
        while True:
            message, payload = self.wire.receive()
            answer = answers.get(str(message.get("op")))
            try:
                if answer is None:
                    raise Refused("input", f"unknown request {str(message.get('op'))[:40]!r}")
                reply, content = answer(message, payload)
            except Refused as refusal:
                reply, content = {"error": refusal.kind, "text": str(refusal)}, b""
            self.wire.send(reply, content)

    def _has(self, message: Message, payload: bytes) -> tuple[Message, bytes]:
        return {"has": self.store.has(message.get("file"))}, b""

    def _put(self, message: Message, payload: bytes) -> tuple[Message, bytes]:
        self.store.put(message.get("file"), payload)
        return {"has": True}, b""

    def _state(self, message: Message, payload: bytes) -> tuple[Message, bytes]:
        return {"state": board_state(_cores(message))}, b""

    def _measure(self, message: Message, payload: bytes) -> tuple[Message, bytes]:
        """Time a file, and a reference in turns with it (see `probe`)."""
        cores = _cores(message)
        request = {
            **_entry(message, "probe", dict),
            "path": str(self._held(message, "file")),
            "reference": str(self._held(message, "reference")) if message.get("reference") else "",
            "cores": cores,
        }
        with self._alone():
            before = board_state(cores)
            printed = self._run("--probe", request, _seconds(message))
            after = board_state(cores)
        answer = {"answer": json.loads(printed), "cores": cores, "before": before, "after": after}
        return answer, b""

    def _predict(self, message: Message, payload: bytes) -> tuple[Message, bytes]:
        """Run a file on inputs that were put here as an .npy file; answers with another."""
        request = {
            "path": str(self._held(message, "file")),
            "inputs": str(self._held(message, "inputs")),
            "batch": _entry(message, "batch", int),
            "cores": _cores(message),
        }
        with self._alone():
            return {"outputs": True}, self._run("--predict", request, _seconds(message))

    def _held(self, message: Message, key: str) -> Path:
        if not self.store.has(message.get(key)):
            raise Refused("gone", f"the board does not hold the file {str(message.get(key))[:80]}")
        return self.store.path(message[key])

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Whoever else measures on this board waits, in whatever process."""
        with (self.store.folder.parent / "lock").open("w") as lock:
            beat = time.monotonic()
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.1)
                if time.monotonic() > beat + BEAT:
                    self.wire.send({"busy": "another measurement"})
                    beat = time.monotonic()
            yield

    def _run(self, mode: str, request: dict[str, Any], limit: float) -> bytes:
        """What this program prints in another mode; raises Refused where it fails or hangs."""
        command = [sys.executable, *_itself(), mode]
        end = time.monotonic() + limit
        given: bytes | None = json.dumps(request).encode()
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            try:
                while True:
                    try:
                        printed, told = process.communicate(given, timeout=min(BEAT, limit))
                        break
                    except subprocess.TimeoutExpired:
                        given = None
                        if time.monotonic() > end:
                            raise Refused("candidate", f"hung for {limit:.0f} s") from None
                        self.wire.send({"busy": "at work"})
            finally:
                process.kill()
        if process.returncode == 0:
            return printed
        if process.returncode < 0:
            number = -process.returncode
            raise Refused("candidate", f"killed by signal {number} ({signal.Signals(number).name})")
        lines = told.decode(errors="replace").strip().splitlines()
        raise Refused("candidate", (lines or ["no message"])[-1][:300])


def describe() -> Message:
    """What this board is."""
    versions = {}
    for package in ("numpy", "onnxruntime", *LITERT):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "board": board_name(),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "executable": sys.executable,
        "versions": versions,
    }


def run_probe() -> None:
    """Time a file; request and answer as JSON on the standard streams."""
    from . import probe

    probe.main()


def run_predict() -> None:
    """Run a file; prints the outputs as .npy."""
    import numpy as np

    from .runtimes import open_onnxruntime

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nothing is left running where the agent is killed
    request = json.load(sys.stdin)
    os.sched_setaffinity(0, request["cores"])
    inputs, batch = np.load(request["inputs"], mmap_mode="r", allow_pickle=False), request["batch"]
    run = open_onnxruntime(request["path"], batch, len(request["cores"]), False)
    pieces = []
    for start in range(0, len(inputs), batch):
        piece = np.asarray(inputs[start : start + batch])
        filled = np.concatenate([piece, np.repeat(piece[-1:], batch - len(piece), 0)])
        pieces.append(run(filled)[: len(piece)])
    np.save(sys.stdout.buffer, np.concatenate(pieces), allow_pickle=False)


def _entry(message: Message, key: str, kind: type) -> Any:
    value = message.get(key)
    if type(value) is not kind:
        raise Refused("input", f"expected {key} as {kind.__name__}, got {str(value)[:40]!r}")
    return value


def _seconds(message: Message) -> float:
    return float(_entry(message, "limit", float))


def _cores(message: Message) -> list[int]:
    threads, usable = _entry(message, "threads", int), len(os.sched_getaffinity(0))
    if not 0 <= threads <= usable:
        raise Refused("input", f"threads: {threads} asked for, but the board has {usable} usable cores")
    return fastest_cores(threads)


def _itself() -> list[str]:
    """How to start this program: as the archive that it came in, or as a module of the installed package."""
    archive = Path(sys.argv[0])
    return [str(archive.resolve())] if archive.suffix == ".pyz" else ["-m", "autocompress.hardware.board_agent"]


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


def serve_tcp(host: str, port: int, token: str, store: Store) -> None:
    """Serve those who know the token, until the process is ended."""
    free = threading.BoundedSemaphore(CONNECTIONS)

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            if not free.acquire(blocking=False):
                return
            try:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                self.connection.settimeout(STRANGERS)
                agent = Agent(Wire(cast(BinaryIO, self.rfile), cast(BinaryIO, self.wfile)), store)
                if agent.greet(token):
                    self.connection.settimeout(None)
                    agent.serve()
            except WireError:
                pass  # whoever it was is gone
            finally:
                free.release()

    with _Server((host, port), Handler) as server:
        print(f"autocompress: measuring for holders of ${TOKEN} on {host}:{server.server_address[1]}", flush=True)
        server.serve_forever()


def serve_streams(store: Store) -> None:
    """Serve the one who started this program, over the standard streams."""
    # What a library prints must not end up between the messages.
    wire = Wire(sys.stdin.buffer, os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)
    agent = Agent(wire, store)
    try:
        if agent.greet(""):
            agent.serve()
    except WireError:
        pass  # the other side is done


def main() -> None:
    """Parse the command line and serve."""
    parser = argparse.ArgumentParser(description="Measures model files on this board for autocompress.")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--serve", action="store_true", help=f"as a TCP server; the token is read from ${TOKEN}")
    mode.add_argument("--streams", action="store_true", help="over standard input and output, as ssh starts it")
    mode.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)
    mode.add_argument("--predict", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=8765, help="0 for any that is free (default: %(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this board)")
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache" / "autocompress-board", help="for files")
    parser.add_argument("--keep", type=int, default=KEPT, help="bytes of files to keep (default: %(default)s)")
    given = parser.parse_args()
    if given.probe:
        run_probe()
    elif given.predict:
        run_predict()
    elif given.streams:
        serve_streams(Store(given.folder / "files", given.keep))
    else:
        token = os.environ.get(TOKEN, "")
        if len(token) < SHORTEST:
            parser.error(f"${TOKEN} must hold a secret of at least {SHORTEST} characters; it holds {len(token)}")
        serve_tcp(given.host, given.port, token, Store(given.folder / "files", given.keep))


if __name__ == "__main__":
    main()
