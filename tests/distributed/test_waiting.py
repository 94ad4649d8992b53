"""While processes of a run are missing, the user reads who, for how long, and what to do."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from clipft.core.errors import ProcessError
from clipft.distributed import waiting
from clipft.distributed.waiting import Waiting, meet, named
from tests import warm
from tests.training.process_helpers import ROOT, free_port, torchrun_environment


def test_ranks_are_named():
    assert named([3]) == "process 3"
    assert named([1, 2]) == "processes 1, 2"
    assert named(range(1, 16)) == "processes 1, 2, 3, 4, 5, 6, 7, 8 and 7 more"


def test_a_line_is_printed_every_few_seconds_and_not_before(monkeypatch):
    now, said = [100.0], []
    monkeypatch.setattr(waiting.time, "monotonic", lambda: now[0])
    display = Waiting(said.append, 4, "Press Ctrl-C to stop.", 5)
    for second in range(13):
        now[0] = 100.0 + second
        display.look([1, 3])
    assert said == [
        "Waiting for processes 1, 3 of 4 for 5s. Press Ctrl-C to stop.",
        "Waiting for processes 1, 3 of 4 for 10s. Press Ctrl-C to stop.",
    ]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_wait_ends_after_the_timeout_and_names_who_is_missing(rank, monkeypatch):
    monkeypatch.setattr(waiting, "SPEAK_EVERY", 0.1)
    said, port, other = list[str](), free_port(), 1 - rank
    with pytest.raises(ProcessError) as caught:
        meet("127.0.0.1", port, rank, 2, 0.01, said.append)
    assert f"process {rank} of 2 gave up waiting for process {other}" in caught.value.message
    assert f"127.0.0.1:{port}" in caught.value.message and "--process-timeout" in caught.value.hint
    assert said and f"Waiting for process {other} of 2" in said[0] and "Ctrl-C" in said[0]


def test_all_meet_and_the_one_that_is_late_is_named(monkeypatch):
    monkeypatch.setattr(waiting, "SPEAK_EVERY", 0.2)
    monkeypatch.setattr(waiting, "_SPEAK_LATER", 0.2)
    port, said, met = free_port(), list[str](), {}

    def come(rank: int) -> None:
        met[rank] = meet("127.0.0.1", port, rank, 3, 1, said.append)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in (0, 1, 2)]
    for thread in threads[:2]:
        thread.start()
    time.sleep(0.7)
    threads[2].start()
    for thread in threads:
        thread.join(timeout=20)
    assert sorted(met) == [0, 1, 2]
    assert said and all("process 2 of 3" in line for line in said)

    said.clear()  # and later on, where the work of one process takes long
    met[2][1].arrive()
    with met[0][1].watched(said.append):
        time.sleep(0.7)
        met[1][1].arrive()
    assert said and all("process 1 of 3" in line for line in said)


def test_ctrl_c_ends_the_wait():
    code = (
        "from clipft.cli.app import run; import sys;"
        "sys.exit(run(['train', '--model', 'tiny', '--device', 'cpu']))"
    )
    process = warm.Popen(
        [sys.executable, "-c", code],
        env={**torchrun_environment(0, 2, free_port()), "PYTHONUNBUFFERED": "1"},
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stderr
    line = process.stderr.readline()
    assert "Waiting for process 1 of 2 for" in line and "Ctrl-C" in line
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=10) == 130


def test_a_machine_that_was_replaced_meets_one_that_counts_another_attempt(monkeypatch):
    """Each torchrun counts its own restarts, and a new one begins at 0."""
    port = free_port()
    code = f"from clipft.distributed.waiting import meet; meet('127.0.0.1', {port}, 1, 2, 1, print)"
    survivor = warm.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "TORCHELASTIC_RESTART_COUNT": "1"},
        cwd=ROOT,
    )
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    store, _ = meet("127.0.0.1", port, 0, 2, 0.5, print)
    assert survivor.wait(timeout=20) == 0
    assert store.check(["roll/1/1"])
