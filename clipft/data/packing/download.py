"""Pictures that are in no file yet, from a URL or from inside of a table, are laid out in a
folder. It outlives a pack that is killed: none is fetched twice."""

import hashlib
import http.client
import os
import queue
import threading
import time
import urllib.request
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote

from clipft import __version__
from clipft.data.shards.tar import ByteRange

_THREADS = 16
_TRIES = 3
_WAIT = 1.0
"""Seconds before the second try, four times as many before the third."""
_SILENCE, _LONGEST = 20.0, 300.0
"""Seconds without a byte, and for a picture in all."""
_MAX_BYTES = 64 << 20
_READ = 1 << 16
_AGENT = f"clipft/{__version__}"
_BUSY = {408, 425, 429, 500, 502, 503, 504}
"""Answers that may be others a little later."""


class Pictures:
    """The folder; made when the first picture is put there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, data: bytes) -> ByteRange:
        """Lay out one picture under the hash of its bytes.

        Raises:
            OSError: the disk does not take it.
        """
        return _put(self.folder / hashlib.sha256(data).hexdigest(), data)

    def fetch(self, urls: Collection[str]) -> Iterator[tuple[str, ByteRange | str]]:
        """Each URL with its picture, or why there is none, as they come.

        The threads do not outlive the process: Ctrl-C does not wait for a silent server.

        Raises:
            OSError: the disk does not take a picture.
        """
        waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[str, ByteRange | str | Exception]] = queue.SimpleQueue()
        for url in urls:
            waiting.put(url)
        for _ in range(min(_THREADS, len(urls))):
            threading.Thread(target=self._fetch_some, args=(waiting, done), daemon=True).start()
        for _ in urls:
            url, result = done.get()
            if isinstance(result, Exception):
                raise result
            yield url, result

    def _fetch_some(
        self,
        waiting: "queue.SimpleQueue[str]",
        done: "queue.SimpleQueue[tuple[str, ByteRange | str | Exception]]",
    ) -> None:
        opener = _opener()
        while True:
            try:
                url = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((url, self._fetched(opener, url)))
            except Exception as error:  # the one who waits must hear of it
                done.put((url, error))

    def _fetched(self, opener: urllib.request.OpenerDirector, url: str) -> ByteRange | str:
        place = self.folder / hashlib.sha256(url.encode("utf-8", "replace")).hexdigest()
        if place.exists():
            return ByteRange(str(place))
        data = _tried(lambda: _get(opener, url))
        return data if isinstance(data, str) else _put(place, data)


def _put(place: Path, data: bytes) -> ByteRange:
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = place.with_suffix(f".{threading.get_ident()}")
        temporary.write_bytes(data)
        os.replace(temporary, place)
    return ByteRange(str(place))


class _Refused(Exception):
    """The picture will not be had, however often it is asked for; the message says why."""


def _opener() -> urllib.request.OpenerDirector:
    """One that knows no file:, ftp: or data:, which urllib's usual one does."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    opener.addheaders = [("User-Agent", _AGENT), ("Accept", "image/*,*/*;q=0.5")]
    return opener


def _tried(get: Callable[[], bytes]) -> bytes | str:
    """The picture, or the reason of the last try."""
    reason = ""
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_WAIT * 4 ** (attempt - 1))
        try:
            return get()
        except _Refused as error:
            return str(error)
        except HTTPError as error:
            error.close()
            if 300 <= error.code < 400:
                return "redirected in circles, or away from http and https"
            reason = f"HTTP status {error.code}"
            if error.code not in _BUSY:
                return reason
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = _reason(error)
    return reason


def _reason(error: Exception) -> str:
    """Short, and without what differs from one picture to the next: reasons are counted."""
    if isinstance(error, URLError) and isinstance(error.reason, Exception):
        return _reason(error.reason)
    if isinstance(error, URLError):  # of urllib itself: no network was asked
        return "no http or https address"
    if isinstance(error, TimeoutError):
        return "the server did not answer in time"
    if isinstance(error, ValueError | http.client.InvalidURL):
        return "not a URL"
    strerror: Any = getattr(error, "strerror", None)
    return f"not fetched: {strerror or type(error).__name__}"


def _get(opener: urllib.request.OpenerDirector, url: str) -> bytes:
    # Catalogues write URLs with spaces and letters that HTTP does not carry
    plain = quote(url.strip(), safe="%/:=&?~#+!$,;'@()*[]")
    until = time.monotonic() + _LONGEST
    with opener.open(plain, timeout=_SILENCE) as answer:
        stated = answer.headers.get("Content-Length")
        data = bytearray()
        while block := answer.read(_READ):
            data += block
            if len(data) > _MAX_BYTES:
                raise _Refused(f"more than {_MAX_BYTES >> 20} MiB")
            if time.monotonic() > until:
                raise TimeoutError
        if stated and stated.isdecimal() and len(data) != int(stated):
            raise ConnectionError(None, "broke off")
    return bytes(data)
