"""The server ends by Ctrl-C, by SIGTERM, and with its terminal."""

import os
import pty
import signal
import socket
import subprocess
import sys
import time

import pytest

from clipft.browse.server import bind
from clipft.core.errors import UsageError

SERVE = """
from clipft.browse.server import bind, serve
async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"x" * 10, "more_body": True})
    await receive()
    await receive()
listener = bind(0)
print(listener.getsockname()[1], flush=True)
serve(app, listener)
print("ended", flush=True)
"""


def wait_until_served(port: int) -> socket.socket:
    """Return a connection on which a reply has begun that never ends."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert connection.recv(100).startswith(b"HTTP/1.1 200")
    return connection


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_even_while_it_answers(number):
    args = [sys.executable, "-c", SERVE]
    with subprocess.Popen(args, stdout=subprocess.PIPE, text=True) as program:
        with wait_until_served(int(program.stdout.readline())):
            program.send_signal(number)
            assert program.stdout.readline() == "ended\n"
        assert program.wait(10) == 0


def test_closing_the_terminal_ends_it():
    pid, terminal = pty.fork()
    if not pid:
        os.execv(sys.executable, [sys.executable, "-c", SERVE])
    with wait_until_served(int(os.read(terminal, 100))):
        os.close(terminal)
        end = time.monotonic() + 10
        while not (ended := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < end:
            time.sleep(0.01)
    assert ended[0] == pid and os.WTERMSIG(ended[1]) == signal.SIGHUP


def test_replies_do_not_wait_for_acknowledgments():
    with bind(0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_port_that_is_taken_is_an_error():
    with bind(0) as taken, pytest.raises(UsageError, match="cannot use port"):
        bind(taken.getsockname()[1])
