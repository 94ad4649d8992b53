"""The server answers those who have the address, from this machine, and nobody else."""

import io
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from clipft.browse.app import MOST_BYTES, MOST_CHARACTERS
from clipft.data.demo.catalogue import render_pair
from tests.browse.conftest import HEADERS, TICKET, TOKEN
from tests.conftest import jpeg


@pytest.mark.parametrize("path", ["/", "/state", "/wrong/", "/wrong/state", f"/{TOKEN[:-1]}/"])
def test_without_the_token_there_is_nothing(served, path):
    assert served.ask("GET", path)[0] == 403


@pytest.mark.parametrize("path", ["search", "picture", "draw", "judge"])
def test_what_changes_something_needs_the_token_in_a_header(served, path):
    for headers in ({"Host": "localhost"}, {"Host": "localhost", "X-Clipft-Token": "wrong"}):
        status, content, _ = served.ask("POST", f"/{TOKEN}/{path}", "{}", headers)
        assert (status, b"x-clipft-token" in content) == (403, True)


def test_the_ticket_of_the_browser_leads_to_the_page_once(served):
    def ask(method, host="127.0.0.1"):
        return served.ask(method, f"/{TICKET}", headers={"Host": host})

    assert ask("HEAD")[0] == ask("POST")[0] == ask("GET", "evil.example")[0] == 403
    status, _, reply = ask("GET")
    assert (status, reply.headers["location"]) == (303, f"/{TOKEN}/")
    status, content, _ = ask("GET")
    assert status == 403 and TOKEN.encode() not in content


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", ""])
def test_another_host_is_refused(served, host):
    assert served.ask("GET", f"/{TOKEN}/", headers={**HEADERS, "Host": host})[0] == 403


@pytest.mark.parametrize("host", ["127.0.0.1:80", "localhost:8000", "localhost"])
def test_this_machine_is_served_on_whatever_port_a_tunnel_has(served, host):
    assert served.ask("GET", f"/{TOKEN}/", headers={**HEADERS, "Host": host})[0] == 200


def test_only_this_machine_can_connect(served):
    own = socket.gethostbyname(socket.gethostname())
    if own.startswith("127."):
        pytest.skip("this machine has no other address")
    with pytest.raises(OSError):
        socket.create_connection((own, served.port), timeout=2)


def test_the_page_may_load_and_run_only_what_the_server_gives(served):
    for path in ("", "browse.js", "page.css", "state", "nothing", "image/0"):
        headers = served.ask("GET", f"/{TOKEN}/{path}")[2].headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "server" not in headers
    page = served.ask("GET", f"/{TOKEN}/")[1].decode()
    assert "http:" not in page and "https:" not in page and "style=" not in page
    assert "<script>" not in page and " on" not in page.partition("<body>")[0]


def test_images_are_small_and_asked_for_by_number_alone(served):
    status, content, reply = served.ask("GET", f"/{TOKEN}/image/97")
    assert status == 200 and "immutable" in reply.headers["cache-control"]
    assert max(Image.open(io.BytesIO(content)).size) <= 240
    for wrong in ("136", "-1", "x", "..%2f..%2fsettings.toml", "../settings.toml"):
        assert served.ask("GET", f"/{TOKEN}/image/{wrong}")[0] == 404


def test_both_lists_have_scores_and_ranks(served):
    status, content = served.post("search", {"words": "a wooden table"})
    assert status == 200
    assert [list_["model"] for list_ in content["lists"]] == ["pretrained", "fine_tuned"]
    expected = served.comparison.by_words("a wooden table")
    for list_ in content["lists"]:
        images = getattr(expected, list_["model"])
        got = [(i["number"], i["rank"], i["other_rank"]) for i in list_["images"]]
        assert got == [(i.number, i.rank, i.other_rank) for i in images]


def test_a_blind_reply_does_not_tell_the_models_apart(served):
    status, content = served.post("draw", {})
    assert status == 200
    assert [list_["name"] for list_ in content["lists"]] == ["A", "B"]
    for list_ in content["lists"]:
        assert set(list_) == {"name", "images"}
        assert all(set(image) == {"number", "key", "caption"} for image in list_["images"])
    assert content["query"]["own"] is None
    said = json.dumps(content)
    assert "tuned" not in said and "score" not in said


def test_a_verdict_reveals_the_models_and_the_tally(served):
    _, drawn = served.post("draw", {})
    before = served.judging.tally.judged
    status, content = served.post("judge", {"trial": drawn["trial"], "choice": "same"})
    assert status == 200 and content["tally"]["judged"] == before + 1
    assert {list_["model"] for list_ in content["lists"]} == {"pretrained", "fine_tuned"}
    for shown, named in zip(drawn["lists"], content["lists"], strict=True):
        assert [i["number"] for i in shown["images"]] == [i["number"] for i in named["images"]]
    assert served.ask("GET", f"/{TOKEN}/state")[1]["tally"] == content["tally"]


def test_a_picture_is_searched_with_and_shown(served):
    status, content = served.post("picture", jpeg(render_pair(7, 1003)))
    assert status == 200 and content["query"]["picture"].startswith("data:image/jpeg;base64,")
    assert all(list_["images"][0]["key"] == "01003" for list_ in content["lists"])


def png(size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("1", size).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("search", b"{", "not a JSON object"),
        ("search", b"[]", "not a JSON object"),
        ("search", {"words": ""}, "no words"),
        ("search", {"words": "x" * (MOST_CHARACTERS + 1)}, "1,000 characters"),
        ("search", b"[" * 60_000, "not a JSON object"),
        ("search", b" " * 70_000, "bytes"),
        ("picture", b"", "empty"),
        ("picture", b"GIF89a", "image"),
        ("picture", b"\xff\xd8\xff" * 1000, "image"),
        ("picture", png((20_000, 10_000)), "pixels"),
        ("picture", b"\0" * (MOST_BYTES + 1), "bytes"),
        ("judge", {"trial": [1], "choice": None}, "already judged"),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, str) else None,
)
def test_what_cannot_be_used_is_refused_in_a_sentence(served, path, body, said):
    status, content = served.post(path, body)
    assert status == 422 and said in content["error"] and content["hint"]


def test_a_name_that_is_not_utf8_is_no_error(served):
    assert served.ask("GET", f"/{TOKEN}/state")[1]["run"] == "dual_lora\udcff"


def test_a_slow_client_holds_up_nobody(served):
    with socket.create_connection(("127.0.0.1", served.port)) as slow:
        lines = [f"POST /{TOKEN}/picture HTTP/1.1", "Host: localhost", f"X-Clipft-Token: {TOKEN}"]
        slow.sendall("\r\n".join([*lines, "Content-Length: 1000", "", "x"]).encode())
        start = time.monotonic()
        assert served.post("search", {"words": "a lamp"})[0] == 200
        assert time.monotonic() - start < 5


def test_queries_at_the_same_time_get_their_own_answers(served):
    words = [f"a {color} {thing}" for color in ("red", "blue") for thing in ("sofa", "lamp", "bed")]
    alone = [served.post("search", {"words": one})[1] for one in words]
    with ThreadPoolExecutor(6) as threads:
        together = list(threads.map(lambda one: served.post("search", {"words": one})[1], words))
    assert together == alone
