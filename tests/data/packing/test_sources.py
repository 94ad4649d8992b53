"""What can be packed: tables, Parquet files, shards, and images at URLs."""

import datetime
import decimal
import functools
import http.server
import io
import json
import shutil
import socket
import sys
import tarfile
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipft.cli.app import run
from clipft.core.errors import DataError, UsageError
from clipft.data.packing import download
from clipft.data.packing.options import PackOptions
from clipft.data.packing.pack import pack
from clipft.data.packing.rows.arrow import plain_value
from tests.conftest import add
from tests.data.packing.pack_helpers import (
    metadata_of,
    packed,
    pairs_of,
    pattern,
    write_pair,
    write_table,
)


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    pattern(number).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_tables_of_every_kind_are_packed(tmp_path, kind):
    raw = tmp_path / "raw"
    rows: list[dict[str, object]] = []
    for i in range(6):
        write_pair(raw / f"p{i}.png", i, None)
        rows.append({"id": str(i), "filepath": f"p{i}.png", "title": f'a "fine", chair {i}'})
    rows.append({"id": "7", "filepath": "gone.png", "title": "x"})
    rows.append({"id": "8", "filepath": "ftp://example.com/a.jpg", "title": "x"})
    rows.append({"id": "9", "filepath": "p1.png", "title": ""})
    rows.append({"id": "10", "filepath": "p\0.png", "title": "a NUL"})
    if kind in {"csv", "tsv"}:
        rows.pop()
    write_table(raw / f"products.{kind}", rows)
    result = packed(raw / f"products.{kind}", tmp_path / "out", val_share=0)
    assert result.train_pairs == 6
    assert result.skipped == {
        "no such file": len(rows) - 8,
        "neither a path nor an http or https address": 1,
        "empty caption": 1,
    }
    found = metadata_of(tmp_path / "out" / "train")
    assert found == {f'a "fine", chair {i}': {"id": str(i)} for i in range(6)}


def test_a_missing_column_is_an_error_that_lists_the_columns(tmp_path):
    (tmp_path / "t.csv").write_text("thing,words\na.png,x\n")
    with pytest.raises(UsageError, match="it has thing, words") as caught:
        packed(tmp_path / "t.csv", tmp_path / "out")
    assert "--image-column" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"image": 1'),
        ("a.jsonl", b"[1]\n"),
        ("a.csv", b"\xff\xfe\x00"),
        ("a.csv", b""),
        ("a.parquet", b"PAR1"),
        ("a.xlsx", b"PK"),
    ],
)
def test_unreadable_tables_are_errors_with_hints(tmp_path, name, content, capsys):
    (tmp_path / name).write_bytes(content)
    assert run(["pack", str(tmp_path / name), str(tmp_path / "out")]) == 3
    assert "hint: " in capsys.readouterr().err


def test_other_parquet_columns_become_plain_metadata(tmp_path):
    row = {
        "image": {"bytes": png(1), "path": None},
        "caption": "a chair",
        "alt": "a seat",
        "price": decimal.Decimal("19.90"),
        "since": datetime.date(2020, 1, 2),
        "weight": float("nan"),
        "sizes": [1, 2],
        "other": {"bytes": b"x", "path": "y"},
        "raw": b"\xff",
    }
    write_table(tmp_path / "t.parquet", [row, {**row, "image": {"bytes": b"?", "path": None}}])
    result = packed(tmp_path / "t.parquet", tmp_path / "out", val_share=0)
    assert result.skipped == {"not an image": 1}
    assert metadata_of(tmp_path / "out" / "train") == {
        "a chair": {
            "alt": "a seat",
            "price": 19.9,
            "since": "2020-01-02",
            "weight": None,
            "sizes": [1, 2],
        }
    }
    assert {image for image, _ in pairs_of(tmp_path / "out" / "train")} == {png(1)}
    assert not list((tmp_path / "out").glob(".clipft-part*"))


def test_parquet_without_pyarrow_is_an_error_that_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError) as caught:
        packed(tmp_path / "t.parquet", tmp_path / "out")
    assert "pipx inject clipft pyarrow" in caught.value.hint


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
    | st.decimals() | st.datetimes() | st.times() | st.timedeltas(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=4,
)  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(), anything))
def test_any_row_becomes_strict_json(row):
    text = json.dumps(plain_value(row), ensure_ascii=False, allow_nan=False)
    assert isinstance(json.loads(text), dict)


def test_shards_can_be_packed_again_without_loss(raw, tmp_path):
    for path in raw.rglob("*.txt"):
        path.with_suffix(".json").write_text(json.dumps({"id": path.stem}))
    packed(raw, tmp_path / "a", shard_pairs=7)
    sent = pairs_of(tmp_path / "a" / "train") | pairs_of(tmp_path / "a" / "val")
    loose = tmp_path / "loose"
    loose.mkdir()
    for split in ("train", "val"):
        for path in (tmp_path / "a" / split).glob("*.tar"):
            shutil.copy(path, loose / f"{split}{path.name}")
    result = packed(loose, tmp_path / "b", shard_pairs=30, val_share=0.5)
    assert (result.train_pairs, result.val_pairs, result.skipped) == (30, 30, {})
    assert pairs_of(tmp_path / "b" / "train") | pairs_of(tmp_path / "b" / "val") == sent
    found = metadata_of(tmp_path / "b" / "train")
    assert all(meta["id"].startswith("p ") for meta in found.values())
    own = packed(tmp_path / "a", tmp_path / "c")  # a source with train/ and val/ keeps its split
    assert (own.train_pairs, own.val_pairs) == (54, 6)
    assert pairs_of(tmp_path / "c" / "val") == pairs_of(tmp_path / "a" / "val")


def test_shards_of_img2dataset_can_be_packed(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    with tarfile.open(folder / "00000.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for i in range(12):
            add(tar, f"{i:09d}.jpg", png(i))
            add(tar, f"{i:09d}.json", json.dumps({"caption": f"thing {i}", "url": "u"}).encode())
            add(tar, f"{i:09d}.txt", f"thing {i}".encode())
        add(tar, "000000099.jpg", b"gone")
        add(tar, "000000099.txt", b"broken")
        add(tar, "000000100.txt", b"alone")
    (folder / "00000.parquet").write_bytes(b"PAR1")
    (folder / "00000_stats.json").write_text("{}")
    result = packed(folder, tmp_path / "out", val_share=0.25)
    assert (result.train_pairs, result.val_pairs) == (9, 3)
    assert result.skipped == {"no image": 1, "not an image": 1}
    told = (tmp_path / "out" / "skipped.jsonl").read_text()
    assert "00000.tar:000000099" in told


def test_an_image_with_metadata_alone_is_skipped(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    with tarfile.open(source / "0.tar", "w") as tar:
        for number, suffix in ((1, "txt"), (2, "txt"), (3, "json")):
            add(tar, f"{number}.png", png(number))
            add(tar, f"{number}.{suffix}", b'"%d"' % number)
    result = packed(source, tmp_path / "out")
    assert result.train_pairs + result.val_pairs == 2
    assert result.skipped == {"no caption": 1}


def test_shards_beside_image_files_are_refused(raw, tmp_path):
    packed(raw, tmp_path / "a")
    shutil.copy(tmp_path / "a" / "train" / "00000.tar", raw / "backup.tar")
    with pytest.raises(UsageError, match="both shards"):
        packed(raw, tmp_path / "out")


def test_a_truncated_shard_is_an_error(raw, tmp_path):
    packed(raw, tmp_path / "a")
    data = (tmp_path / "a" / "train" / "00000.tar").read_bytes()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "00000.tar").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="not a complete tar"):
        packed(tmp_path / "cut", tmp_path / "out")


def test_the_shards_may_be_inside_the_source(raw, tmp_path):
    packed(raw, raw / "shards")
    packed(raw, raw / "shards", overwrite=True)
    with pytest.raises(UsageError, match="same folder"):
        packed(raw, raw, overwrite=True)


def test_members_are_named_after_the_format_of_the_image(tmp_path):
    for i, (name, kind) in enumerate(
        [
            ("a.jpg", "PNG"),
            ("b.png", "JPEG"),
            ("c.jpeg", "WEBP"),
            ("d.tiff", "TIFF"),
            ("e.jpg", "PPM"),
            ("f.jpg", "AVIF"),
            ("g.jpg", "JPEG2000"),
            ("h.jfif", "JPEG"),
            ("i", "PNG"),
            ("j.jpg", "TGA"),
        ]
    ):
        write_pair(tmp_path / "raw" / name, i, name)
        pattern(i).save(tmp_path / "raw" / name, kind)
    result = packed(tmp_path / "raw", tmp_path / "out", val_share=0)
    with tarfile.open(tmp_path / "out" / "train" / "00000.tar") as tar:
        names = {name for name in tar.getnames() if not name.endswith(".txt")}
    named = {"e.ppm", "f.avif", "g.jp2", "h.jpg", "i.png"}
    assert names == {"a.png", "b.jpg", "c.webp", "d.tif"} | named
    assert result.skipped == {"TGA images are not read: convert them to JPEG or PNG": 1}


class Server(http.server.BaseHTTPRequestHandler):
    """Serves image N as /N.png; other paths misbehave as their name says."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        name = self.path.rpartition("/")[2].partition("?")[0]
        if name.removesuffix(".png").isdecimal():
            self.answer(200, png(int(name.removesuffix(".png"))))
        elif name == "busy.png":
            self.answer(*((200, png(50)) if self.asked.count(self.path) == 3 else (503, b"")))
        elif name == "cut.png":
            self.answer(200, png(51), length=100_000)
        elif name == "moved.png":
            self.answer(302, b"", Location="/52.png")
        elif name == "away.png":
            self.answer(302, b"", Location="file:///etc/hostname")
        elif name == "ftp.png":
            self.answer(302, b"", Location="ftp://127.0.0.1/1.png")
        elif name == "large.png":
            self.answer(200, bytes(9000))
        else:
            self.answer(404, b"")

    def answer(self, code: int, body: bytes, length: int | None = None, **headers: str) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        return None


@pytest.fixture
def server(monkeypatch):
    """Yield the address of a running server, and the list of paths requested so far."""
    monkeypatch.setattr(download, "_WAIT", 0.001)
    monkeypatch.setattr(download, "_MAX_BYTES", 5000)
    asked: list[str] = []
    monkeypatch.setattr(http.server.ThreadingHTTPServer, "request_queue_size", 64)
    handler = functools.partial(type("Own", (Server,), {"asked": asked}))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()


def url_table(table: Path, address: str, names: list[str]) -> None:
    rows = [{"url": f"{address}/{name}", "text": f"thing {name}"} for name in names]
    write_table(table, rows)


def test_images_are_downloaded_and_failures_are_counted(server, tmp_path):
    address, asked = server
    fine = ["1.png", "2.png", "3.png?size=large size", "busy.png", "moved.png"]
    bad = ["gone.png", "cut.png", "away.png", "ftp.png", "large.png"]
    url_table(tmp_path / "t.csv", address, fine + bad)
    result = packed(tmp_path / "t.csv", tmp_path / "out", val_share=0)
    assert result.train_pairs == len(fine)
    assert result.skipped == {
        "HTTP status 404": 1,
        "download failed: the connection was closed early": 1,
        "redirected in circles, or away from http and https": 2,
        "more than 0 MiB": 1,
    }
    images = {image for image, _ in pairs_of(tmp_path / "out" / "train")}
    assert images == {png(number) for number in (1, 2, 3, 50, 52)}
    assert (asked.count("/gone.png"), asked.count("/cut.png")) == (1, 3)
    with tarfile.open(tmp_path / "out" / "train" / "00000.tar") as tar:
        assert {"1.png", "3.png", "busy.png"} <= set(tar.getnames())


def test_connections_are_kept_open(server, tmp_path, monkeypatch):
    address, asked = server
    opened = []
    connect = socket.create_connection
    monkeypatch.setattr(
        "urllib3.util.connection.create_connection",
        lambda *args, **kwargs: opened.append(args) or connect(*args[:2]),
    )
    monkeypatch.setattr(Server, "protocol_version", "HTTP/1.1")
    monkeypatch.setattr(download, "_THREADS", 2)
    url_table(tmp_path / "t.csv", address, [f"{number}.png" for number in range(12)])
    assert packed(tmp_path / "t.csv", tmp_path / "out", val_share=0).train_pairs == 12
    assert len(asked) == 12 and 1 <= len(opened) <= 2


def test_downloads_go_through_the_proxy_of_the_environment(server, tmp_path, monkeypatch):
    address, asked = server
    monkeypatch.setenv("http_proxy", address.replace("://", "://me:secret@"))
    monkeypatch.setenv("no_proxy", "")
    url_table(tmp_path / "t.csv", "http://images.invalid", ["1.png"])
    packed(tmp_path / "t.csv", tmp_path / "out", val_share=0)
    assert asked == ["http://images.invalid/1.png"]  # a proxy is asked for whole addresses


def test_downloads_before_an_interruption_are_not_repeated(server, tmp_path):
    address, asked = server
    url_table(tmp_path / "t.jsonl", address, [f"{i}.png" for i in range(20)] + ["0.png"])

    def interrupt(done, total):
        if done > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(tmp_path / "t.jsonl", tmp_path / "out", PackOptions(processes=1), interrupt)
    assert len(asked) == 20
    packed(tmp_path / "t.jsonl", tmp_path / "out")
    assert len(asked) == 20
    assert not list((tmp_path / "out").glob(".clipft-part*"))


@pytest.mark.parametrize("url", ["http://", "http://[::1", "http://127.0.0.1:1/a.png"])
def test_pairs_with_unreachable_urls_are_skipped(tmp_path, url, monkeypatch):
    monkeypatch.setattr(download, "_WAIT", 0.001)
    write_table(tmp_path / "t.jsonl", [{"image": url, "caption": "x"}])
    with pytest.raises(DataError, match="1 x "):
        packed(tmp_path / "t.jsonl", tmp_path / "out")
