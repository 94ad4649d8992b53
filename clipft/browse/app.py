"""Serves the page of ``clipft browse`` and answers its requests.

GET  /TOKEN/              the page; page.css, browse.css and browse.js are beside it
GET  /TOKEN/state         the searched images, the run's verdict, and the count of judgments
GET  /TOKEN/image/N       a small JPEG of image number N
POST /TOKEN/search        the lists of both models: {"words": ..., "blind": true or false}
POST /TOKEN/picture       the same for the image in the body; ?blind=1 without names
POST /TOKEN/draw          a caption drawn at random, without names
POST /TOKEN/judge         the verdict of a blind comparison: {"trial": ..., "choice": ...}

A reply with names has the ranks of each image with both models. A reply without names only has what
is needed to show the images. Errors are {"error": ..., "hint": ...}.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route

from clipft.browse.comparison import Comparison, Found
from clipft.browse.guard import Guard
from clipft.browse.judging import Judging, Trial
from clipft.core.errors import ClipftError, StorageError, UsageError
from clipft.report.html import data_uri

MOST_CHARACTERS = 1000
"""The longest query that is accepted. The models read about 77 tokens of it."""
MOST_BYTES = 32 << 20
"""The largest image that is accepted. A larger one is refused before all of it is in memory."""
_MOST_JSON_BYTES = 64 << 10
_NAMES = {"pretrained": "Pretrained", "fine_tuned": "Fine-tuned"}
_ASSETS = {
    "": ("clipft.browse", "browse.html", "text/html; charset=utf-8"),
    "page.css": ("clipft.report", "page.css", "text/css; charset=utf-8"),
    "browse.css": ("clipft.browse", "browse.css", "text/css; charset=utf-8"),
    "browse.js": ("clipft.browse", "browse.js", "text/javascript; charset=utf-8"),
}


@dataclass(frozen=True)
class Subject:
    """The run and the images of the page.

    ``verdict`` is a sentence about the gain of the run. ``held_out`` is the number of ``images``
    that the run was not trained on. Captions are drawn from these images, or from all images if
    there are none. ``examples`` are some captions as suggestions.
    """

    title: str
    run: str
    verdict: str
    images: int
    held_out: int
    examples: Sequence[str] = ()


def make_app(
    token: str, ticket: str, subject: Subject, comparison: Comparison, judging: Judging
) -> Guard:
    """Return the ASGI application. All its paths begin with the token; /TICKET redirects once."""
    pages = _Pages(subject, comparison, judging)
    routes = [
        *(Route(f"/{path}", _asset(*asset)) for path, asset in _ASSETS.items()),
        Route("/state", pages.state),
        Route("/image/{number:int}", pages.image),
        Route("/search", pages.search, methods=["POST"]),
        Route("/picture", pages.picture, methods=["POST"]),
        Route("/draw", pages.draw, methods=["POST"]),
        Route("/judge", pages.judge, methods=["POST"]),
    ]
    handlers: Mapping[Any, Any] = {ClipftError: _known_error, Exception: _bug}
    app = Starlette(routes=[Mount(f"/{token}", routes=routes)], exception_handlers=handlers)
    return Guard(app, token, ticket)


class _Pages:
    """Answers requests. Computations run in threads, so a slow query does not delay others."""

    def __init__(self, subject: Subject, comparison: Comparison, judging: Judging) -> None:
        self._subject, self._comparison, self._judging = subject, comparison, judging

    async def state(self, request: Request) -> Response:
        tally, limits = self._judging.tally.to_dict(), {"bytes": MOST_BYTES}
        return _json({**asdict(self._subject), "tally": tally, "limits": limits})

    async def image(self, request: Request) -> Response:
        number = request.path_params["number"]
        if number >= len(self._comparison.images):
            return _json({"error": "no such image", "hint": ""}, 404)
        jpeg = await run_in_threadpool(self._comparison.thumbnail, number)
        # Each server has another token in its addresses, so cached images are never outdated
        kept = {"cache-control": "private, max-age=86400, immutable"}
        return Response(jpeg, media_type="image/jpeg", headers=kept)

    async def search(self, request: Request) -> Response:
        asked = await _json_body(request)
        words = str(asked.get("words", ""))
        if len(words) > MOST_CHARACTERS:
            raise UsageError(f"more than {MOST_CHARACTERS:,} characters", "use a shorter query")
        found = await run_in_threadpool(self._comparison.by_words, words)
        return _json(self._shown(found, bool(asked.get("blind"))))

    async def picture(self, request: Request) -> Response:
        data = await _body(request, MOST_BYTES)
        found = await run_in_threadpool(self._comparison.by_image, data)
        return _json(self._shown(found, request.query_params.get("blind") == "1"))

    async def draw(self, request: Request) -> Response:
        return _json(_blind(*await run_in_threadpool(self._judging.draw)))

    async def judge(self, request: Request) -> Response:
        asked = await _json_body(request)
        given = str(asked.get("trial", "")), str(asked.get("choice", ""))
        trial = await run_in_threadpool(self._judging.judge, *given)
        return _json({**_named(trial.found, trial), "tally": self._judging.tally.to_dict()})

    def _shown(self, found: Found, blind: bool) -> dict[str, Any]:
        if blind:
            return _blind(*self._judging.start(found))
        self._judging.shown(found)
        return _named(found)


def _blind(name: str, trial: Trial) -> dict[str, Any]:
    """Describe a trial without scores and ranks, which would reveal the models."""
    lists = [
        {
            "name": letter,
            "images": [
                {"number": image.number, "key": image.key, "caption": image.caption}
                for image in images
            ],
        }
        for letter, images in zip("AB", trial.lists, strict=True)
    ]
    return {"query": _query(trial.found, own=False), "trial": name, "lists": lists}


def _named(found: Found, trial: Trial | None = None) -> dict[str, Any]:
    """Describe the results of both models, in the order of a trial if it was judged."""
    order = trial.order if trial else ("pretrained", "fine_tuned")
    letters = [f"{letter}: " if trial else "" for letter in "AB"]
    lists = [
        {
            "name": letter + (_NAMES[side].lower() if trial else _NAMES[side]),
            "model": side,
            "images": [asdict(image) for image in getattr(found, side)],
        }
        for letter, side in zip(letters, order, strict=True)
    ]
    return {"query": _query(found), "lists": lists, "summary": found.summary()}


def _query(found: Found, own: bool = True) -> dict[str, Any]:
    query = found.query
    picture = data_uri(query.image) if query.image else ""
    shown = {"words": query.words, "picture": picture, "note": query.note}
    return {**shown, "own": query.own if own else None}


async def _body(request: Request, most: int) -> bytes:
    """Read the body of a request.

    Raises:
        UsageError: The body has more than ``most`` bytes.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise UsageError(f"more than {most:,} bytes", "choose a smaller image")
    return bytes(body)


async def _json_body(request: Request) -> dict[str, Any]:
    try:
        content = json.loads(await _body(request, _MOST_JSON_BYTES))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UsageError("the request is not a JSON object", "reload the page")
    return content


def _json(content: Mapping[str, Any], status: int = 200) -> Response:
    # Only ASCII, with escapes: a key may contain bytes that are not UTF-8
    return Response(json.dumps(content), status, media_type="application/json")


def _asset(package: str, name: str, media_type: str) -> Any:
    content = files(package).joinpath("assets", name).read_bytes()

    async def asset(request: Request) -> Response:
        return Response(content, media_type=media_type)

    return asset


async def _known_error(request: Request, error: ClipftError) -> Response:
    status = 507 if isinstance(error, StorageError) else 422
    return _json({"error": error.message, "hint": error.hint}, status)


async def _bug(request: Request, error: Exception) -> Response:
    hint = "this is a bug: please report it"
    return _json({"error": f"unexpected {type(error).__name__}: {error}", "hint": hint}, 500)
