"""A TCP proxy that behaves like a long line that loses packets.

No packet is really lost. Instead, each direction of each connection follows TCP's textbook rules
(Reno): a window of segments goes out per round trip; a lost segment halves the window and costs
one more round trip; a round without loss adds a segment (until the first loss, it doubles the
window). At 50 ms and 1 % this lets about 0.3 MB/s through each connection, as Mathis et al. (1997)
expect. So a client is as fast as the number of its connections at work.
"""

import asyncio
import multiprocessing
import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from urllib.parse import urlsplit

SEGMENT = 1460
_FIRST_WINDOW = 10


@contextmanager
def slow_line(upstream: str, round_trip: float, loss: float) -> Iterator[str]:
    """Run the proxy in a process of its own during the block and yield its URL. ``round_trip`` is
    in seconds, and ``loss`` the share of segments that are lost."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_run, args=(upstream, round_trip, loss, there), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{here.recv()}"
    finally:
        process.kill()
        process.join()


def _run(upstream: str, round_trip: float, loss: float, started: Connection) -> None:
    asyncio.run(_serve(upstream, round_trip, loss, started))


async def _serve(upstream: str, round_trip: float, loss: float, started: Connection) -> None:
    place, seeds = urlsplit(upstream), iter(range(1 << 30))

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(round_trip)  # the handshake
        behind = await asyncio.open_connection(place.hostname, place.port)
        chances = random.Random(next(seeds))
        ways = ((reader, behind[1]), (behind[0], writer))
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            await asyncio.gather(*(_way(a, b, round_trip, loss, chances) for a, b in ways))
        for end in (writer, behind[1]):
            end.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0, limit=1 << 20)
    started.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()


async def _way(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    round_trip: float,
    loss: float,
    chances: random.Random,
) -> None:
    """One direction of a connection, until it is closed."""
    window, doubles = float(_FIRST_WINDOW), True
    clock, busy_until = asyncio.get_running_loop().time, 0.0
    while data := await reader.read(max(1, int(window)) * SEGMENT):
        # What is sent while nothing is on its way arrives after half a round trip; a full window
        # has to wait until the one before it is acknowledged
        await asyncio.sleep(max(round_trip / 2, busy_until - clock()))
        writer.write(data)
        await writer.drain()
        segments = -(-len(data) // SEGMENT)
        lost = sum(chances.random() < loss for _ in range(segments))
        busy_until = clock() + round_trip * (2 if lost else 1)
        if lost:
            window, doubles = max(2.0, window / 2), False
        elif segments >= int(window):
            window = window * 2 if doubles else window + 1
    with suppress(OSError):
        writer.write_eof()
