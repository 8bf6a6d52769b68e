"""What a ComfyUI server tells its page while a graph runs: a small WebSocket client, standard library only."""

from __future__ import annotations

import base64
import json
import os
import socket
import struct
from typing import Any

PREVIEW = "preview"  # how binary messages are named here


class Events:
    """Messages of one client, in order: (name, data); a preview picture is ("preview", bytes)."""

    def __init__(self, port: int, client: str, seconds: float = 60):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=seconds)
        key = base64.b64encode(os.urandom(16)).decode()
        self.socket.sendall(
            f"GET /ws?clientId={client} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        self.stream = self.socket.makefile("rb")
        status = self.stream.readline()
        if b" 101 " not in status:
            raise ConnectionError(f"no WebSocket: {status!r}")
        while self.stream.readline() not in (b"\r\n", b""):
            pass

    def __enter__(self) -> Events:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()
        self.socket.close()

    def exactly(self, count: int) -> bytes:
        """That many bytes."""
        data = self.stream.read(count)
        if len(data) < count:
            raise ConnectionError("the server closed the WebSocket")
        return data

    def frame(self) -> tuple[bool, int, bytes]:
        """One frame: last of its message?, kind, payload. A server sends unmasked."""
        first, length = self.exactly(2)
        if length >= 126:
            (length,) = struct.unpack(">H" if length == 126 else ">Q", self.exactly(2 if length == 126 else 8))
        return bool(first & 0x80), first & 0x0F, self.exactly(length)

    def next(self) -> tuple[str, Any]:
        """The next message; waits for it, at most the seconds given before (TimeoutError)."""
        payload, kind = b"", 0
        while True:
            last, code, data = self.frame()
            if code == 9:  # ping: answered with the same payload, masked by zeros
                self.socket.sendall(bytes([0x8A, 0x80 | len(data)]) + bytes(4) + data)
            elif code == 8:
                raise ConnectionError("the server closed the WebSocket")
            elif code in (0, 1, 2):
                payload, kind = payload + data, code or kind
                if last and kind == 2:
                    return PREVIEW, payload
                if last:
                    message = json.loads(payload)
                    return message["type"], message.get("data") or {}
