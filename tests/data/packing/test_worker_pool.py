"""The pool of worker processes that packing uses."""

import os
import time

import pytest

from clipft.core.errors import DataError
from clipft.data.packing.worker_pool import Workers


def large(number: int) -> bytes:
    return bytes([number % 256]) * 300_000


def dies(number: int) -> int:
    if number == 5:
        os._exit(1)
    return number


def fails(number: int) -> int:
    if number == 5:
        raise OSError(28, "No space left on device", "shard")
    return number


def slow(number: int) -> int:
    time.sleep(0.01 * (number % 3))
    return number


def sleeps(number: int) -> int:
    time.sleep(60 * number)
    return number


def test_results_are_in_the_order_of_the_tasks():
    with Workers(3) as workers:
        assert list(workers.map(slow, range(30))) == list(range(30))
        assert list(workers.map(slow, range(2))) == [0, 1]
        assert [data[0] for data in workers.map(large, range(20))] == list(range(20))


def test_a_killed_worker_and_a_failing_task_raise_different_errors():
    with pytest.raises(DataError, match="was killed"), Workers(2) as workers:
        list(workers.map(dies, range(30)))
    with pytest.raises(OSError, match="No space left") as caught, Workers(2) as workers:
        list(workers.map(fails, range(30)))
    assert caught.value.filename == "shard"


def test_an_exception_in_the_block_ends_the_workers_at_once():
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Workers(2) as workers:
        for _ in workers.map(sleeps, [0, 1, 1]):
            raise KeyboardInterrupt
    assert time.monotonic() - started < 20
