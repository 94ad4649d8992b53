"""Who may talk to the page: only this machine, and only those who know the address.

Any page that is open in the browser can send requests to a server on the same machine, and a name
of its own can be made to lead there (DNS rebinding). So each request needs the random token in its
path and a local name in its Host header. What changes something needs the token in a header too,
which no other page can send without being asked for it first.
"""

from secrets import compare_digest

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
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
    """Refuses requests with 403 unless they have the token and a local Host header."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                headers.setdefault("cache-control", "no-store")
            await send(message)

        refusal = self._reason_against(scope)
        app = PlainTextResponse(f"{refusal}\n", 403) if refusal else self._app
        await app(scope, receive, send_with_headers)

    def _reason_against(self, scope: Scope) -> str:
        headers = Headers(scope=scope)
        # Not the port: it differs where the page is reached through a tunnel of ssh
        if headers.get("host", "").partition(":")[0] not in _LOCAL:
            return "The page is only for this machine."
        if not self._is_token(scope["path"].lstrip("/").partition("/")[0]):
            return "Open the address that clipft browse has printed."
        if scope["method"] not in {"GET", "HEAD"} and not self._is_token(
            headers.get(TOKEN_HEADER, "")
        ):
            return f"The request needs the token in {TOKEN_HEADER}."
        return ""

    def _is_token(self, text: str) -> bool:
        return compare_digest(text.encode(), self._token.encode())
