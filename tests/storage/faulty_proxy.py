"""An HTTP proxy in front of a real S3 server that spoils some of its answers."""

import http.client
import http.server
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Exchange:
    """One request and the server's answer to it, on its way to the client."""

    method: str
    path: str
    status: int
    headers: list[tuple[str, str]]
    body: bytes
    handler: http.server.BaseHTTPRequestHandler

    def send(self, body: bytes | None = None, length: int | None = None) -> None:
        """Send the answer, with ``body`` instead of its own body if that is given."""
        own = self.handler
        own.send_response(self.status)
        for name, value in self.headers:
            if name.lower() == "content-length" and length is not None:
                value = str(length)
            own.send_header(name, value)
        own.end_headers()
        own.wfile.write(self.body if body is None else body)
        own.wfile.flush()

    def reset(self) -> None:
        """Reset the connection instead of closing it properly."""
        linger = struct.pack("ii", 1, 0)
        self.handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.handler.close_connection = True
        self.handler.connection.close()


Fault = Callable[[Exchange], None]
Choice = Callable[[str, str], Fault | None]
"""Chooses the fault for a request by method and path; None passes the answer on unchanged."""


def fails(status: int, code: str) -> Fault:
    """Answer with an error instead."""

    def fault(exchange: Exchange) -> None:
        body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
        headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
        exchange.status, exchange.headers, exchange.body = status, headers, body
        exchange.send()

    return fault


def breaks_off(exchange: Exchange) -> None:
    """Send half of the body, then reset the connection."""
    exchange.send(exchange.body[: len(exchange.body) // 2])
    exchange.reset()


def stalls(seconds: float) -> Fault:
    """Send half of the body, then nothing for ``seconds``."""

    def fault(exchange: Exchange) -> None:
        exchange.send(exchange.body[: len(exchange.body) // 2])
        time.sleep(seconds)
        exchange.reset()

    return fault


def drips(pause: float) -> Fault:
    """Send the body one byte at a time."""

    def fault(exchange: Exchange) -> None:
        exchange.send(b"")
        for place in range(len(exchange.body)):
            exchange.handler.wfile.write(exchange.body[place : place + 1])
            time.sleep(pause)

    return fault


def corrupts(exchange: Exchange) -> None:
    """Change one byte of the body."""
    spoilt = bytearray(exchange.body)
    spoilt[len(spoilt) // 2] ^= 1
    exchange.send(bytes(spoilt))


def shortens(exchange: Exchange) -> None:
    """Send a shorter body and its true length, as if the object were another."""
    body = exchange.body[:-1]
    exchange.send(body, len(body))


class Times:
    """Applies a fault to the first ``count`` requests with a method and a part of a path.

    ``seen`` lists the paths of all such requests.
    """

    def __init__(self, count: int, fault: Fault, method: str = "GET", contains: str = "") -> None:
        self._left, self._fault = count, fault
        self._method, self._contains = method, contains
        self._lock = threading.Lock()
        self.seen: list[str] = []

    def __call__(self, method: str, path: str) -> Fault | None:
        if method != self._method or self._contains not in path:
            return None
        with self._lock:
            self.seen.append(path)
            self._left -= 1
            return self._fault if self._left >= 0 else None


def untouched(method: str, path: str) -> None:
    """Pass every answer on unchanged."""


def spoils_uploads(path: str, body: bytes) -> bytes:
    """Change the first byte of a checkpoint on its way to the server."""
    return b"x" + body[1:] if ".pt" in path else body


@contextmanager
def faulty_proxy(
    upstream: str, choose: Choice, alter: Callable[[str, bytes], bytes] = lambda path, body: body
) -> Iterator[str]:
    """Run a proxy during the block and yield its URL. ``alter`` may change uploaded bodies."""
    host = urlsplit(upstream).netloc

    def serve(handler: Any) -> None:
        length = int(handler.headers.get("Content-Length") or 0)
        sent = alter(handler.path, handler.rfile.read(length))
        behind = http.client.HTTPConnection(host, timeout=60)
        behind.putrequest(handler.command, handler.path, skip_host=True, skip_accept_encoding=True)
        for name, value in handler.headers.items():
            if name.lower() not in {"expect", "connection"}:
                behind.putheader(name, value)
        behind.endheaders(sent)
        answer = behind.getresponse()
        body = answer.read()
        kept = [h for h in answer.getheaders() if h[0].lower() not in {"connection", "date"}]
        kept = [h for h in kept if h[0].lower() != "transfer-encoding"]
        if not any(h[0].lower() == "content-length" for h in kept):
            kept.append(("Content-Length", str(len(body))))
        exchange = Exchange(handler.command, handler.path, answer.status, kept, body, handler)
        behind.close()
        fault = choose(handler.command, handler.path)
        try:
            fault(exchange) if fault else exchange.send()
        except OSError:  # the client has given up
            handler.close_connection = True

    names = ("GET", "HEAD", "PUT", "POST", "DELETE")
    methods: dict[str, Any] = {f"do_{name}": serve for name in names}
    methods |= {"protocol_version": "HTTP/1.1", "log_message": lambda *rest: None}
    handler = type("Handler", (http.server.BaseHTTPRequestHandler,), methods)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
