"""Images that are in no file yet, because a table names their URL or holds their bytes, are saved
in a folder. The folder outlives a pack that is killed, so no image is downloaded twice."""

import hashlib
import http.client
import os
import queue
import threading
import time
import urllib.request
from collections.abc import Collection, Iterator
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import quote

from clipft import __version__
from clipft.data.shards.tar import ByteRange

_THREADS = 16
_TRIES = 3
# Seconds before the second try; four times as long before the third
_WAIT = 1.0
# Seconds without a byte, and for an image in all
_SILENCE, _LONGEST = 20.0, 300.0
_MAX_BYTES = 64 << 20
_READ = 1 << 16
_AGENT = f"clipft/{__version__}"
# HTTP status codes that may be different a little later
_BUSY = {408, 425, 429, 500, 502, 503, 504}


def save_image(place: Path, data: bytes) -> ByteRange:
    """Save the bytes of an image in the file ``place``, unless that exists.

    Raises:
        OSError: The disk is full, or refuses to write.
    """
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        # A name per thread, because two URLs may be saved at the same moment
        temporary = place.with_suffix(f".{threading.get_ident()}")
        temporary.write_bytes(data)
        os.replace(temporary, place)
    return ByteRange(str(place))


def download_images(folder: Path, urls: Collection[str]) -> Iterator[tuple[str, ByteRange | str]]:
    """Download images into ``folder``, several at a time.

    Yields each URL, in the order in which they finish, with its image or with the reason why there
    is none.

    Raises:
        OSError: The disk is full, or refuses to write.
    """
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[str, ByteRange | str | Exception]] = queue.SimpleQueue()

    def download_waiting() -> None:
        opener = _http_opener()
        while True:
            try:
                url = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((url, _download(opener, folder, url)))
            except Exception as error:  # raised below, where the result is awaited
                done.put((url, error))

    for url in urls:
        waiting.put(url)
    for _ in range(min(_THREADS, len(urls))):
        # Daemons: Ctrl-C must not wait for a server that is silent
        threading.Thread(target=download_waiting, daemon=True).start()
    for _ in urls:
        url, result = done.get()
        if isinstance(result, Exception):
            raise result
        yield url, result


def _http_opener() -> urllib.request.OpenerDirector:
    """Return an opener without file:, ftp: and data:, which urllib's default one would open: a
    table or a redirect could name a local file."""
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


def _download(opener: urllib.request.OpenerDirector, folder: Path, url: str) -> ByteRange | str:
    """Return the image at ``url``, or the reason why the last try failed."""
    place = folder / hashlib.sha256(url.encode("utf-8", "replace")).hexdigest()
    if place.exists():
        return ByteRange(str(place))
    reason = ""
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_WAIT * 4 ** (attempt - 1))
        try:
            data = _get(opener, url)
        except HTTPError as error:
            error.close()
            if 300 <= error.code < 400:
                return "redirected in circles, or away from http and https"
            reason = f"HTTP status {error.code}"
            if error.code not in _BUSY:
                return reason
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = _reason(error)
        else:
            if len(data) > _MAX_BYTES:
                return f"more than {_MAX_BYTES >> 20} MiB"
            # Not within the try above: a full disk ends the pack, it does not skip a pair
            return save_image(place, data)
    return reason


def _get(opener: urllib.request.OpenerDirector, url: str) -> bytes:
    """Return the body of the answer, or a bit more than _MAX_BYTES of a longer one.

    Raises:
        OSError, http.client.HTTPException, ValueError: The request fails, the answer is cut off,
            or it takes too long.
    """
    # Catalogues write URLs with spaces and letters that HTTP does not carry
    plain = quote(url.strip(), safe="%/:=&?~#+!$,;'@()*[]")
    until = time.monotonic() + _LONGEST
    with opener.open(plain, timeout=_SILENCE) as answer:
        stated = answer.headers.get("Content-Length")
        data = bytearray()
        while block := answer.read(_READ):
            data += block
            if len(data) > _MAX_BYTES:
                return bytes(data)
            if time.monotonic() > until:
                raise TimeoutError
        # http.client reports no error if the connection ends early during such reads
        if stated and stated.isdecimal() and len(data) != int(stated):
            raise ConnectionError(None, "the connection was closed early")
    return bytes(data)


def _reason(error: Exception) -> str:
    """Describe an error without what differs from image to image, because reasons are counted."""
    if isinstance(error, URLError) and isinstance(error.reason, Exception):
        return _reason(error.reason)
    if isinstance(error, URLError):  # urllib's own, raised before it uses the network
        return "not an http or https address"
    if isinstance(error, TimeoutError):
        return "the server did not answer in time"
    if isinstance(error, ValueError | http.client.InvalidURL):
        return "not a URL"
    strerror = getattr(error, "strerror", None)
    return f"download failed: {strerror or type(error).__name__}"
