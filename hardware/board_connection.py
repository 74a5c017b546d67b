"""Reaching a board: its program over SSH or as a server, and what goes wrong on the way, in one line each."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import shlex
import socket
import subprocess
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast
from urllib.parse import urlsplit

from ..core.errors import CandidateError, InputError, MissingDependencyError
from .board_agent import TOKEN
from .board_wire import PROTOCOL, Message, Wire, WireError, proof

PORT = 8765
PYTHON = "AUTOCOMPRESS_AGENT_PYTHON"
SHIPPED = (
    *(f"hardware.{name}" for name in ("board_agent", "board_state", "board_wire", "probe", "runtimes")),
    "hardware.timing",
)
SILENCE = 30.0  # seconds without a sign of life after which a board is lost
START = 60.0  # seconds that logging in and starting the program may take
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=10")
# Receives the program, keeps it under its hash and becomes it. Nothing follows the program before it has greeted, so
# that what is read ahead is never lost.
START_PROGRAM = """
import hashlib, os, sys
if sys.version_info < (3, 9): sys.exit("the board needs Python 3.9 or later; it has " + sys.version.split()[0])
content = sys.stdin.buffer.read(int(sys.stdin.buffer.readline()))
folder = os.path.expanduser("~/.cache/autocompress-board")
os.makedirs(folder, mode=0o700, exist_ok=True)
path = os.path.join(folder, "agent-" + hashlib.sha256(content).hexdigest()[:16] + ".pyz")
part = path + "." + str(os.getpid())
open(part, "wb").write(content)
os.replace(part, path)
os.execv(sys.executable, [sys.executable, path, "--streams"])
"""
_HOST = re.compile(r"(?P<host>(?:[\w.]+[\w.-]*@)?(?:\w[\w.-]*|\[[0-9A-Fa-f:.]+\]))(?::(?P<port>\d+))?", re.ASCII)


def agent_archive() -> bytes:
    """The program for the board as one file that Python runs (.pyz)."""
    return python_archive("hardware.board_agent", SHIPPED)


def python_archive(main: str, modules: Sequence[str]) -> bytes:
    """Modules of this package as one file that any Python runs (.pyz); the same bytes for the same sources.

    Args:
        main: the module whose `main()` runs, such as "hardware.board_agent".
        modules: all that it needs, itself included; they import each other and installed packages alone.
    """
    root = __name__.partition(".")[0]
    packages = {root, *(f"{root}.{name.rpartition('.')[0]}" for name in modules)}
    texts = {f"{package}.__init__": "" for package in packages}
    for name in modules:
        spec = importlib.util.find_spec(f"{root}.{name}")
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"{root}.{name}")
        texts[f"{root}.{name}"] = Path(spec.origin).read_text(encoding="utf-8")
    texts["__main__"] = f"from {root}.{main} import main\n\nmain()\n"
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for module, text in sorted(texts.items()):
            entry = zipfile.ZipInfo(f"{module.replace('.', '/')}.py", (1980, 1, 1, 0, 0, 0))
            archive.writestr(entry, text, zipfile.ZIP_DEFLATED)
    return content.getvalue()


@dataclass
class Connection:
    """An open connection to a board, and what the board said of itself."""

    wire: Wire
    close: Callable[[], None]
    board: Mapping[str, Any]

    def ask(self, message: Message, payload: bytes = b"") -> tuple[Message, bytes]:
        """The answer to a request; waits as long as the board shows that it is alive.

        Raises:
            WireError: the board is gone.
            CandidateError: the file can't be run there.
            InputError: the board refuses the request.
        """
        self.wire.send(message, payload)
        while True:
            answer, content = self.wire.receive()
            if "busy" not in answer:
                break
        if "error" not in answer:
            return answer, content
        text = f"{self.board['board']}: {answer.get('text')}"
        raise CandidateError(text) if answer["error"] in ("candidate", "gone") else InputError(text)

    def hold(self, name: str, read: Callable[[], bytes]) -> None:
        """Have the board hold a file; only what it lacks is sent."""
        if not self.ask({"op": "has", "file": name})[0]["has"]:
            self.ask({"op": "put", "file": name}, read())


def connect(name: str, address: str, ssh: tuple[str, ...] = SSH, python: str = "python3") -> Connection:
    """Reach a board.

    Args:
        name: of the target, for messages.
        address: `[user@]host[:port]` for SSH, `tcp://host[:port]` for the server, whose token is in the environment.
        ssh: the command that runs another on a board; port, host and command are added.
        python: how the board calls its Python, such as "~/venv/bin/python".

    Raises:
        InputError: no such address, or the wrong token.
        MissingDependencyError: the board can't be reached, or lacks something.
    """
    if address.startswith("tcp:"):
        wire, close, why = _connect_tcp(name, address)
    else:
        wire, close, why = _connect_ssh(name, address, ssh, python)
    try:
        return Connection(wire, close, _greeted(name, wire))
    except WireError as error:
        reason = why() or str(error)
        close()
        raise MissingDependencyError(f"{name}: {reason}") from error
    except (InputError, MissingDependencyError):
        close()
        raise


def _greeted(name: str, wire: Wire) -> Message:
    """What the board says of itself, after the token was shown."""
    greeting, _ = wire.receive()
    if greeting.get("autocompress") != PROTOCOL:
        raise MissingDependencyError(
            f"{name}: expected version {PROTOCOL} of the board's program, got "
            f"{str(greeting.get('autocompress'))[:40]}; copy this one's to the board"
        )
    token = os.environ.get(TOKEN, "")
    if greeting.get("nonce") and not token:
        raise InputError(f"{name} asks for a token; set ${TOKEN} to the one that its server was started with")
    wire.send({"proof": proof(token, str(greeting.get("nonce")))})
    board, _ = wire.receive()
    if board.get("error") == "token":
        raise InputError(f"{name}: {board.get('text')}")
    lacks = [package for package in ("numpy", "onnxruntime") if package not in board.get("versions", {})]
    if lacks:
        command = f"{board.get('executable')} -m pip install {' '.join(lacks)}"
        raise MissingDependencyError(f"{name}: the board lacks {' and '.join(lacks)}; run there: {command}")
    return board


Way = tuple[Wire, Callable[[], None], Callable[[], str]]  # how to talk, how to end it, and why it ended


def _connect_tcp(name: str, address: str) -> Way:
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port or PORT
    except ValueError:
        host, port = None, PORT
    if not host or not address.startswith("tcp://") or parts.path not in ("", "/"):
        raise InputError(f"target {name}: expected tcp://host:port behind the colon, such as tcp://192.168.1.20:{PORT}")
    try:
        connection = socket.create_connection((host, port), timeout=10)
    except OSError as error:
        raise MissingDependencyError(
            f"{name}: no server answers there ({error.strerror or error}); "
            f"start it on the board: python3 board.pyz --serve --port {port}"
        ) from error
    connection.settimeout(SILENCE)
    return _wire(connection), connection.close, lambda: ""


def _connect_ssh(name: str, address: str, ssh: tuple[str, ...], python: str) -> Way:
    match = _HOST.fullmatch(address)
    if match is None:
        raise InputError(f"target {name}: expected [user@]host[:port] or tcp://host[:port] behind the colon")
    if not re.fullmatch(r"[\w.~/+][\w.~/+-]*", python, re.ASCII):
        raise InputError(f"${PYTHON}: expected the path of the board's Python, got '{python}'")
    port = ["-p", match["port"]] if match["port"] else []
    command = [*ssh, *port, "--", match["host"], f"{python} -c {shlex.quote(START_PROGRAM)}"]
    # A socket at both ends, as pipes know no time limits.
    ours, theirs = socket.socketpair()
    told = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the connection)
    try:
        process = subprocess.Popen(command, stdin=theirs.fileno(), stdout=theirs.fileno(), stderr=told)
    except FileNotFoundError as error:
        raise MissingDependencyError(f"{name} needs the program {ssh[0]}: apt install openssh-client") from error
    finally:
        theirs.close()
    ours.settimeout(START)

    def close() -> None:
        ours.close()
        process.kill()
        process.wait()
        told.close()

    program = agent_archive()
    with contextlib.suppress(OSError):  # the greeting that then does not come has the reason
        ours.sendall(f"{len(program)}\n".encode() + program)
    return _wire(ours), close, lambda: _last_words(process, told)


def _last_words(process: subprocess.Popen[bytes], told: IO[bytes]) -> str:
    """What a command that ended said last; "" if it goes on or said nothing."""
    try:
        code = process.wait(timeout=2)
    except subprocess.TimeoutExpired:
        return ""
    told.seek(0)
    lines = told.read().decode(errors="replace").strip().splitlines()
    last = lines[-1].strip()[:300] if lines else ""
    return f"{last}; name the board's Python in ${PYTHON}" if code == 127 else last


def _wire(connection: socket.socket) -> Wire:
    return Wire(cast(BinaryIO, connection.makefile("rb")), cast(BinaryIO, connection.makefile("wb")))
