import contextlib
import http.server
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.loaders import JSONFileLoader
from moto.server import ThreadedMotoServer

from clipft.config.sections.data import StorageSettings
from tests.storage.rados_gateway import KEY, MISSING, SECRET, RadosGateway, installed

_NUMBERS = count()


@dataclass
class Bucket:
    """A bucket, the settings that reach it, and a boto3 client to change and inspect it."""

    client: Any
    settings: StorageSettings

    def put(self, objects: dict[str, bytes]) -> None:
        for key, body in objects.items():
            self.client.put_object(Bucket=self.settings.s3_bucket, Key=key, Body=body)

    def but(self, **changed: Any) -> StorageSettings:
        return self.settings.model_copy(update=changed)


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    yield "http://{}:{}".format(*moto.get_host_and_port())
    moto.stop()


@pytest.fixture(scope="session", autouse=True)
def parsed_once() -> Iterator[None]:
    """Read botocore's service descriptions once: every client would read them again, which took
    most of the time of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JSONFileLoader, "load_file", cache(JSONFileLoader.load_file))
        patch.setattr(JSONFileLoader, "__hash__", lambda self: 0)
        patch.setattr(JSONFileLoader, "__eq__", lambda self, other: True)
        yield


@pytest.fixture(autouse=True)
def own_credentials(monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))
    for name in (
        "AWS_PROFILE",
        "AWS_SESSION_TOKEN",
        "AWS_DEFAULT_REGION",
        "AWS_REGION",
        "AWS_CA_BUNDLE",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def client(server) -> Any:
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "testtest"}
    return boto3.client("s3", endpoint_url=server, region_name="us-east-1", **keys)


@pytest.fixture
def bucket(server, client, tmp_path) -> Bucket:
    return make_bucket(client, server, tmp_path)


def make_bucket(client: Any, url: str, tmp_path: Path) -> Bucket:
    """Make an empty bucket, and settings that give up on it after half a second."""
    name = f"bucket-{next(_NUMBERS)}"
    client.create_bucket(Bucket=name)
    settings = StorageSettings(
        data_dir=tmp_path / "data", s3_bucket=name, endpoint_url=url, s3_retry_timeout=0.5
    )
    return Bucket(client, settings)


@pytest.fixture(scope="session")
def gateway(tmp_path_factory) -> Iterator[str]:
    """The URL of a real server. Tests that use it are skipped where it is not installed."""
    if not installed():
        pytest.skip(MISSING)
    with RadosGateway(tmp_path_factory.mktemp("ceph") / "node") as server:
        yield server.url


@pytest.fixture
def real_bucket(gateway, tmp_path) -> Bucket:
    keys = {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET}
    client = boto3.client("s3", endpoint_url=gateway, region_name="us-east-1", **keys)
    return make_bucket(client, gateway, tmp_path)


Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


@pytest.fixture
def serving() -> Iterator[Callable[[Answer], str]]:
    """A function that starts a server, which gives ``answer`` to every GET and HEAD, and returns
    its URL."""
    with contextlib.ExitStack() as servers:

        def serve(answer: Answer) -> str:
            methods = {"do_GET": answer, "do_HEAD": answer, "log_message": lambda *a: None}
            handler = type("Handler", (http.server.BaseHTTPRequestHandler,), methods)
            own = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
            threading.Thread(target=own.serve_forever, daemon=True).start()
            servers.callback(own.server_close)
            servers.callback(own.shutdown)
            return f"http://127.0.0.1:{own.server_port}"

        yield serve


def refusing(status: int, code: str) -> Answer:
    """Answer every request with S3's error ``code``."""

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/xml")
        handler.send_header("x-amz-bucket-region", "eu-west-1")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return answer
