"""W&B without a network, with a wrong key, or killed: training never waits for it."""

import http.server
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.faults.helpers import lines
from tests.faults.outside import Program, steps, wait_until

ONE_EPOCH = [
    *("--model", "tiny", "--epochs", "1", "--effective-batch-size", "8", "--device", "cpu"),
    *("--micro-batch-size", "8", "--num-workers", "0", "--precision", "fp32"),
]
KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


class Refusing(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.dumps({"errors": [{"message": "user is not logged in"}]}).encode()
        self.send_response(401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def refusing_server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def start(programs, catalogue, out, mode: str, **env: str) -> Program:
    where = ["--data-dir", str(catalogue), "--output-dir", str(out), "--wandb", mode]
    quiet = {"WANDB_API_KEY": KEY, "WANDB_ERROR_REPORTING": "false", "HOME": str(out)}
    return programs.start("train", *ONE_EPOCH, *where, env={**quiet, **env})


@pytest.mark.slow
def test_a_server_that_does_not_answer_does_not_delay_training(
    programs, catalogue, tmp_path, silent_server
):
    run = start(programs, catalogue, tmp_path, "online", WANDB_BASE_URL=silent_server)
    wait_until(lambda: (tmp_path / "dual_lora" / "settings.toml").exists(), run)
    began = time.monotonic()
    wait_until(lambda: steps(tmp_path) >= 1, run)
    assert time.monotonic() - began < 15  # importing wandb at the same time takes seconds
    assert run.wait(90) == 0, run.err
    assert "warning: W&B" in run.err and KEY not in run.err
    assert steps(tmp_path) == 12


@pytest.mark.slow
def test_a_wrong_key_is_reported_once_and_training_continues(
    programs, catalogue, tmp_path, refusing_server
):
    run = start(programs, catalogue, tmp_path, "online", WANDB_BASE_URL=refusing_server)
    assert run.wait(120) == 0, run.err
    assert run.err.count("warning: W&B is off for this run") == 1 and KEY not in run.err
    assert steps(tmp_path) == 12


@pytest.mark.slow
def test_a_run_survives_a_killed_wandb_service(programs, catalogue, tmp_path):
    run = start(programs, catalogue, tmp_path, "offline")

    def service() -> list[psutil.Process]:
        children = psutil.Process(run.pid).children(recursive=True)
        return [child for child in children if "wandb" in child.name()]

    wait_until(lambda: bool(service()) or steps(tmp_path) == 12, run)
    for process in service():
        process.kill()
    assert run.wait(90) == 0, run.err
    assert steps(tmp_path) == 12


@pytest.mark.slow
def test_offline_files_can_be_synced_later(programs, catalogue, tmp_path):
    """`wandb sync` finds each step of metrics.jsonl, under one id."""
    run = start(programs, catalogue, tmp_path, "offline")
    assert run.wait(90) == 0, run.err
    (record,) = (tmp_path / "dual_lora").rglob("run-*.wandb")
    read = [line for line in records(record) if line.WhichOneof("record_type") == "history"]
    metrics = lines(tmp_path / "dual_lora" / "metrics.jsonl")
    assert [line.history.step.num for line in read] == sorted({m["step"] for m in metrics})
    losses = [loss for line in read if (loss := value(line.history, "train/loss")) is not None]
    assert losses == [line["loss"] for line in metrics if line["kind"] == "step"]


def value(history, name: str) -> float | None:
    for item in history.item:
        if name in (item.key, "/".join(item.nested_key)):
            return float(item.value_json)
    return None


def records(path: Path) -> Iterator:
    """Read a `.wandb` file: a LevelDB log in blocks of 32 KiB, whose records are protobufs."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record
