"""Optuna's dashboard for a run, on this machine only."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from wsgiref.simple_server import WSGIRequestHandler, make_server

from ..core.errors import InputError
from .study import Study

HOST = "127.0.0.1"


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:
        """Requests are no news."""


def serve(folder: Path, port: int, ready: Callable[[str], None]) -> None:
    """Serve until Ctrl-C.

    Args:
        ready: called with the address once requests are answered.

    Raises:
        InputError: `folder` is no run folder, or the port is taken.
    """
    from optuna_dashboard import wsgi

    study = Study.open(folder)
    application = wsgi(study.storage)
    try:
        server = make_server(HOST, port, application, handler_class=_Quiet)
    except (OSError, OverflowError) as error:
        raise InputError(f"port {port} on {HOST} can't be used ({error}); choose another with --port") from error
    with server:
        # In a thread of its own: what answers requests swallows a Ctrl-C that comes in the middle of one.
        answering = threading.Thread(target=server.serve_forever, daemon=True)
        answering.start()
        ready(f"http://{HOST}:{server.server_port}/dashboard")
        try:
            answering.join()
        except KeyboardInterrupt:
            server.shutdown()
