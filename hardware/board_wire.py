"""How a measuring board and this machine talk: lines of JSON, some of them followed by bytes.

Imports Python alone, so that this file also runs by itself on the board (Python 3.9 or later).
"""

from __future__ import annotations

import hashlib
import hmac
import json
from typing import Any, BinaryIO

PROTOCOL = 1
LINE = 2**20  # bytes of a line of JSON at most
STRANGER = 2**12  # bytes of a line at most from somebody who has not shown the token
PAYLOAD = 2**29  # bytes behind a line at most

Message = dict[str, Any]


class WireError(Exception):
    """The other side went away, or what it sent is no message."""


class Wire:
    """Messages over two streams of bytes, or one twice.

    A message is a JSON object on a line; its entry "bytes" says how many bytes follow the line.
    """

    def __init__(self, reader: BinaryIO, writer: BinaryIO) -> None:
        self._reader, self._writer = reader, writer

    def send(self, message: Message, payload: bytes = b"") -> None:
        """Send one message.

        Raises:
            WireError: the other side is gone.
        """
        line = json.dumps({**message, "bytes": len(payload)}) + "\n"
        try:
            self._writer.write(line.encode())
            self._writer.write(payload)
            self._writer.flush()
        except (OSError, ValueError) as error:
            raise WireError(f"the connection broke: {error}") from error

    def receive(self, line_limit: int = LINE, payload_limit: int = PAYLOAD) -> tuple[Message, bytes]:
        """The next message and the bytes behind it.

        Raises:
            WireError: the other side is gone or silent, or sent something else or something larger.
        """
        try:
            line = self._reader.readline(line_limit + 1)
            if not line:
                raise WireError("the connection was closed")
            if not line.endswith(b"\n"):
                limit = f"; a line has at most {line_limit} bytes" if len(line) > line_limit else ""
                raise WireError(f"a message broke off after {len(line)} bytes{limit}")
            message = _parsed(line)
            size = message.pop("bytes", 0)
            if type(size) is not int or not 0 <= size <= payload_limit:
                raise WireError(f"expected at most {payload_limit} bytes behind a message, got {str(size)[:40]}")
            return message, self._read(size)
        except TimeoutError as error:
            raise WireError("the other side is silent") from error
        except OSError as error:
            raise WireError(f"the connection broke: {error}") from error

    def _read(self, size: int) -> bytes:
        pieces, left = [], size
        while left:
            # In pieces, so that memory is taken for what comes and not for what is announced.
            piece = self._reader.read(min(left, 2**20))
            if not piece:
                raise WireError(f"a message broke off after {size - left} of {size} bytes")
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces)


def proof(token: str, nonce: str) -> str:
    """What shows that one knows the token, without sending it."""
    return hmac.new(token.encode(), nonce.encode(), hashlib.sha256).hexdigest()


def is_proof(given: object, token: str, nonce: str) -> bool:
    """Whether `given` is the right proof; takes as long for any wrong one."""
    return hmac.compare_digest(str(given).encode(), proof(token, nonce).encode())


def _parsed(line: bytes) -> Message:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise WireError(f"expected a message, got {line[:80]!r}") from error
    if not isinstance(message, dict):
        raise WireError(f"expected a message, got {line[:80]!r}")
    return message
