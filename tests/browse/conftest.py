"""One run, one server and one browser for all tests of the page."""

import http.client
import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from clipft.cli.app import run
from clipft.runs.folder import RunPaths

TOKEN, TICKET = "token-of-the-tests", "ticket-of-the-tests"
EXAMPLES = ("a red <b>chair</b>", "a lamp")
HEADERS = {"Host": "127.0.0.1:80", "X-Clipft-Token": TOKEN}
TRAINED = [
    *("--model", "tiny", "--epochs", "2", "--effective-batch-size", "16", "--lr", "4e-3"),
    *("--micro-batch-size", "16", "--num-workers", "0", "--precision", "fp32"),
]


@dataclass
class Served:
    """A running page; ``judgments`` is the file of its tally."""

    port: int
    run: Path
    judgments: Path
    comparison: Any
    judging: Any

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/{TOKEN}/"

    def ask(
        self, method: str, path: str, body: bytes | str = b"", headers: dict[str, str] = HEADERS
    ) -> tuple[int, Any, http.client.HTTPResponse]:
        """Send a request as it is; return the status, the content and the reply."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.putrequest(method, path, skip_host=True)
        data = body.encode() if isinstance(body, str) else body
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            connection.putheader(name, value)
        connection.endheaders(data)
        reply = connection.getresponse()
        content = reply.read()
        is_json = reply.headers.get_content_type() == "application/json"
        return reply.status, json.loads(content) if is_json else content, reply

    def post(self, path: str, content: Any) -> tuple[int, Any]:
        body = content if isinstance(content, bytes) else json.dumps(content)
        return self.ask("POST", f"/{TOKEN}/{path}", body)[:2]


@pytest.fixture(scope="session")
def trained(catalogue, tmp_path_factory) -> Path:
    """The folder of a short run. Read only."""
    out = tmp_path_factory.mktemp("browse")
    args = ["--data-dir", str(catalogue), "--output-dir", str(out)]
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CLIPFT_CACHE", str(out / "cache"))
        assert run(["train", *TRAINED, *args]) == 0
    return out / "dual_lora"


@pytest.fixture(scope="session")
def comparison(trained, catalogue):
    from clipft.browse.comparison import open_comparison
    from clipft.config.sources import load_settings
    from clipft.core.common import silent
    from clipft.runs.load import open_model
    from clipft.search.images import open_images

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CLIPFT_CACHE", str(trained.parent / "cache"))
        opened = open_model(str(trained), load_settings({}, None), ())
        return open_comparison(opened, open_images(catalogue), 8, silent)


@pytest.fixture(scope="session")
def served(trained, catalogue, comparison, tmp_path_factory) -> Iterator[Served]:
    from clipft.browse.app import Subject, make_app
    from clipft.browse.judging import Judging
    from clipft.browse.server import bind, make_server

    folder = tmp_path_factory.mktemp("run") / "dual_lora"
    shutil.copytree(trained, folder)
    paths = RunPaths(folder)
    judging = Judging(comparison, paths.judgments, 2, catalogue, range(96, 136))
    subject = Subject(
        "dual_lora on tiny", "dual_lora\udcff", "Mean recall rose.", 136, 40, EXAMPLES
    )
    listener = bind(0)
    port = listener.getsockname()[1]
    app = make_app(TOKEN, TICKET, subject, comparison, judging)
    server = make_server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield Served(port, folder, paths.judgments, comparison, judging)
    server.should_exit = True
    thread.join()
