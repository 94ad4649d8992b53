"""Start two or more real processes that communicate over gloo."""

import json
import os
import socket
import sys
from subprocess import PIPE
from typing import Any

from tests import warm
from tests.warm import ROOT

START = """
import json, sys
import torch
from clipft.config.settings import Settings
from clipft.distributed.rendezvous import start_processes
torch.set_num_threads(1)
with start_processes(Settings(device="{device}", process_timeout={minutes})) as processes:
    rank, count = processes.rank, processes.world_size
    result = None
{body}
    print("RESULT", json.dumps(result))
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def torchrun_environment(rank: int, count: int, port: int) -> dict[str, str]:
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def start_all(body: str, count: int, minutes: float = 1, device: str = "cpu") -> list[warm.Popen]:
    """Run ``body``, an indented block that may set ``result``, in each process."""
    port = free_port()
    return [
        warm.Popen(
            [sys.executable, "-c", START.format(body=body, minutes=minutes, device=device)],
            env=torchrun_environment(rank, count, port),
            stdout=PIPE,
            stderr=PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in range(count)
    ]


def results(body: str, count: int = 2, seconds: float = 120, device: str = "cpu") -> list[Any]:
    """The ``result`` of ``body`` on each process; fails if one of them failed."""
    found = []
    for process in start_all(body, count, device=device):
        stdout, stderr = process.communicate(timeout=seconds)
        assert process.returncode == 0, stderr
        line = next(line for line in stdout.splitlines() if line.startswith("RESULT"))
        found.append(json.loads(line.removeprefix("RESULT")))
    return found
