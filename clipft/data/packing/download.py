"""Saves images in a folder if a table has their URL or their bytes. The folder is kept if a pack is
killed, so no image is downloaded twice."""

import hashlib
import os
import queue
import threading
import time
import uuid
from collections.abc import Collection, Iterator
from functools import cached_property
from pathlib import Path
from urllib.parse import SplitResult, quote, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3
from urllib3 import exceptions as http_errors

from clipft import __version__
from clipft.data.shards.tar import ByteRange

_THREADS = 16
_TRIES = 3
# Seconds to wait before the second try; before the third it is four times as long
_WAIT = 1.0
# Timeouts in seconds: without a byte, and for a whole image
_SILENCE, _LONGEST = 20.0, 300.0
_MAX_BYTES = 64 << 20
_READ = 1 << 16
_HEADERS = {"User-Agent": f"clipft/{__version__}", "Accept": "image/*,*/*;q=0.5"}
# HTTP status codes for which a later try may succeed
_BUSY = {408, 425, 429, 500, 502, 503, 504}


def save_image(place: Path, data: bytes) -> ByteRange:
    """Save the bytes of an image in the file ``place``, unless the file exists.

    Raises:
        OSError: The disk is full, or refuses to write.
    """
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        # A unique name, because another thread or part may be saving the same image
        temporary = place.with_suffix(f".{uuid.uuid4().hex}")
        temporary.write_bytes(data)
        os.replace(temporary, place)
    return ByteRange(str(place))


def download_images(folder: Path, urls: Collection[str]) -> Iterator[tuple[str, ByteRange | str]]:
    """Download images into ``folder``, several at a time, over connections that are kept open.

    Yields each URL as soon as it is done, with its image or with the reason why there is none.

    Raises:
        OSError: The disk is full, or refuses to write.
    """
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[str, ByteRange | str | Exception]] = queue.SimpleQueue()
    web = _Web()

    def download_waiting() -> None:
        while True:
            try:
                url = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((url, _download(web, folder, url)))
            except Exception as error:  # raised below, where the result is awaited
                done.put((url, error))

    for url in urls:
        waiting.put(url)
    for _ in range(min(_THREADS, len(urls))):
        # Daemons, so that Ctrl-C does not wait for a server
        threading.Thread(target=download_waiting, daemon=True).start()
    for _ in urls:
        url, result = done.get()
        if isinstance(result, Exception):
            raise result
        yield url, result


class _Busy(Exception):
    """The download failed, but a later try may succeed. The message gives the reason."""


class _Refused(Exception):
    """The download failed, and another try would fail too. The message gives the reason."""


def _download(web: "_Web", folder: Path, url: str) -> ByteRange | str:
    """Return the image at ``url``, or the reason why the last try failed."""
    place = folder / hashlib.sha256(url.encode("utf-8", "replace")).hexdigest()
    if place.exists():
        return ByteRange(str(place))
    reason = ""
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_WAIT * 4 ** (attempt - 1))
        try:
            data = web.get(url)
        except _Refused as error:
            return str(error)
        except _Busy as error:
            reason = str(error)
        else:
            # Outside the try above, because a full disk must end the pack and not skip a pair
            return save_image(place, data)
    return reason


class _Web:
    """Gets images by http and https, through the proxies set in the environment."""

    @cached_property
    def _direct(self) -> urllib3.PoolManager:
        return urllib3.PoolManager(num_pools=64, maxsize=_THREADS, headers=_HEADERS)

    @cached_property
    def _proxies(self) -> dict[str, urllib3.PoolManager]:
        found: dict[str, urllib3.PoolManager] = {}
        for scheme, proxy in getproxies().items():
            if scheme in {"http", "https"}:
                parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
                login = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
                found[scheme] = urllib3.ProxyManager(
                    parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl(),
                    maxsize=_THREADS,
                    headers=_HEADERS,
                    proxy_headers=urllib3.make_headers(proxy_basic_auth=login)
                    if parts.username
                    else None,
                )
        return found

    def get(self, url: str) -> bytes:
        """Return the body of the answer.

        Raises:
            _Refused, _Busy: The request fails, the answer is cut off, too large, or takes too long.
        """
        try:
            # URLs in catalogues may have spaces and letters that HTTP does not allow
            parts = urlsplit(quote(url.strip(), safe="%/:=&?~#+!$,;'@()*[]"))
        except ValueError as error:
            raise _Refused("not a URL") from error
        if parts.scheme not in {"http", "https"}:
            raise _Refused("not an http or https address")
        if not parts.hostname:
            raise _Refused("not a URL")
        try:
            return self._read(parts)
        except (http_errors.MaxRetryError, http_errors.LocationValueError) as error:
            reason = getattr(error, "reason", None)
            if reason is None or isinstance(reason, http_errors.ResponseError):
                raise _Refused("redirected in circles, or away from http and https") from error
            raise _Busy(_reason(reason)) from error
        except (http_errors.HTTPError, OSError) as error:
            raise _Busy(_reason(error)) from error

    def _read(self, url: SplitResult) -> bytes:
        pool = self._direct
        if not proxy_bypass(url.hostname or ""):
            pool = self._proxies.get(url.scheme, pool)
        until = time.monotonic() + _LONGEST
        retries = urllib3.Retry(connect=0, read=0, redirect=10, status=0, other=0)
        answer = pool.request(
            "GET", url.geturl(), preload_content=False, retries=retries, timeout=_SILENCE
        )
        try:
            if not 200 <= answer.status < 300:
                kind = _Busy if answer.status in _BUSY else _Refused
                raise kind(f"HTTP status {answer.status}")
            data = bytearray()
            for block in answer.stream(_READ):
                data += block
                if len(data) > _MAX_BYTES:
                    raise _Refused(f"more than {_MAX_BYTES >> 20} MiB")
                if time.monotonic() > until:
                    raise TimeoutError
        except BaseException:
            answer.close()  # or the rest of the body would come before the next response
            raise
        answer.release_conn()
        return bytes(data)


def _reason(error: Exception) -> str:
    """Describe an error without details of the image, so that equal reasons can be counted."""
    if isinstance(error, http_errors.TimeoutError | TimeoutError):
        return "the server did not answer in time"
    if isinstance(error, http_errors.ProtocolError):  # also IncompleteRead
        return "download failed: the connection was closed early"
    cause = error.__cause__ or error.__context__
    strerror = getattr(error, "strerror", None) or getattr(cause, "strerror", None)
    return f"download failed: {strerror or type(error).__name__}"
