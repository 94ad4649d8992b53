"""Limits access to the page to browsers on this machine that know its address.

Any page in a browser can send requests to a server on the same machine, and can point its own host
name to this machine (DNS rebinding). So each request needs the random token in its path and a local
name in its Host header. Requests other than GET and HEAD also need the token in a header, which no
other page can send without permission from the server (CORS).
"""

from secrets import compare_digest

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

TOKEN_HEADER = "x-clipft-token"  # noqa: S105 (a name, not a token)
_LOCAL = {"127.0.0.1", "localhost"}
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Guard:
    """Refuses requests with 403 unless they have the token and a local Host header.

    The browser is started with ``/TICKET``, which redirects to ``/TOKEN/`` only once, because all
    users of a machine can see the arguments of its programs. A file with a redirect would not work
    for browsers in a sandbox, such as those from snap.
    """

    def __init__(self, app: ASGIApp, token: str, ticket: str) -> None:
        self._app, self._token, self._ticket = app, token, ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                headers.setdefault("cache-control", "no-store")
            await send(message)

        await self._choose(scope)(scope, receive, send_with_headers)

    def _choose(self, scope: Scope) -> ASGIApp:
        """Return the application for a request: the app, a redirect to it, or a refusal."""
        headers, changes = Headers(scope=scope), scope["method"] not in {"GET", "HEAD"}
        name = scope["path"].lstrip("/").partition("/")[0]
        # The port is ignored, because it may differ behind an ssh tunnel
        if headers.get("host", "").partition(":")[0] not in _LOCAL:
            return _refuse("This page can only be opened on this machine.")
        if self._ticket and scope["method"] == "GET" and _equal(name, self._ticket):
            self._ticket = ""
            return RedirectResponse(f"/{self._token}/", 303)
        if not _equal(name, self._token):
            return _refuse("Open the address that clipft browse printed.")
        if changes and not _equal(headers.get(TOKEN_HEADER, ""), self._token):
            return _refuse(f"The request needs the token in {TOKEN_HEADER}.")
        return self._app


def _refuse(reason: str) -> ASGIApp:
    return PlainTextResponse(f"{reason}\n", 403)


def _equal(text: str, secret: str) -> bool:
    return compare_digest(text.encode(), secret.encode())
