"""Serves the page on this machine until Ctrl-C, SIGTERM or the end of the terminal session."""

import os
import signal
import socket
import sys
import threading
import webbrowser
from typing import TYPE_CHECKING

from clipft.core.errors import UsageError

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp

HOST = "127.0.0.1"


def bind(port: int) -> socket.socket:
    """Listen on a port of this machine; 0 means any free port.

    Raises:
        UsageError: Another program uses the port, or the system does not allow it.
    """
    try:
        listener = socket.create_server((HOST, port))
        # asyncio sets this only for sockets with an explicit protocol. Without it, the body of each
        # reply waits 40 ms for the browser to acknowledge the headers
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        raise UsageError(
            f"cannot use port {port}: {error.strerror}",
            "choose another --port, or leave it out to get a free one",
        ) from error


def serve(app: "ASGIApp", listener: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM. SIGHUP, which is sent when the terminal is closed, ends the
    process directly, because no output can be shown."""
    server = make_server(app)

    def stop(number: int, frame: object) -> None:
        server.should_exit = True

    # In a separate thread, because in the main thread uvicorn would raise the signals again
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        thread.start()
        while thread.is_alive():  # a signal that another thread receives does not end a join
            thread.join(0.2)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def make_server(app: "ASGIApp") -> "uvicorn.Server":
    """Return a server without log output. The page shows errors, and addresses with the token must
    not be logged."""
    import uvicorn

    return uvicorn.Server(
        uvicorn.Config(
            app,
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="off",
            log_level="critical",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=1,
        )
    )


def open_browser(url: str) -> bool:
    """Open the page in a browser; return False if there is none. Browsers in the terminal are not
    used, because they cannot show images."""
    graphical = ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
    if sys.platform == "linux" and not any(os.environ.get(name) for name in graphical):
        return False
    return webbrowser.open(url)
