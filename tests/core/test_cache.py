"""The cache folder: what is listed, what is removed, and what a bound spares."""

import os
import subprocess
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipft.core.cache import (
    CACHES,
    CacheEntry,
    cache_entries,
    keep_within,
    mark_used,
    remove,
    to_prune,
)

DAY = 86400


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPFT_CACHE", str(tmp_path))
    return tmp_path


def put(path, size, days=0.0):
    """Make an entry: a folder with one file, or for a name with a dot in it just a file."""
    file = path if path.suffix else path / "values"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"x" * size)
    for name in (file, path):
        os.utime(name, (time.time() - days * DAY,) * 2)
    return path


def test_it_lists_every_kind_with_sizes_the_longest_unused_first(cache):
    put(cache / "features" / "a", 10, days=2)
    put(cache / "captions" / "b", 20, days=3)
    put(cache / "batch_sizes.json", 5, days=1)
    put(cache / "of_another_program" / "c", 5)
    found = [(entry.kind, entry.bytes) for entry in cache_entries()]
    assert found == [("captions", 20), ("features", 10), ("batch sizes", 5)]


def test_an_empty_cache_is_no_error(cache):
    assert cache_entries() == []
    assert keep_within(0) == []


def test_what_a_killed_process_left_is_an_entry_and_what_a_living_one_writes_is_not(cache):
    ended = subprocess.Popen(["true"])
    ended.wait()
    put(cache / "features" / f".a.{ended.pid}", 10)
    put(cache / "features" / f".b.{os.getpid()}", 10)
    left = cache_entries()
    assert [(entry.path.name, entry.unfinished) for entry in left] == [(f".a.{ended.pid}", True)]
    remove(left[0])
    assert os.listdir(cache / "features") == [f".b.{os.getpid()}"]


def test_a_bound_removes_what_was_used_longest_ago_but_neither_downloads_nor_what_is_in_use(cache):
    put(cache / "s3" / "bucket", 1000, days=50)
    oldest = put(cache / "features" / "oldest", 100, days=3)
    older = put(cache / "pictures" / "older", 100, days=2)
    put(cache / "captions" / "old", 100, days=1)
    put(cache / "features" / "now", 100)
    assert [entry.path for entry in keep_within(200)] == [oldest, older]
    assert [entry.path.name for entry in keep_within(0)] == ["old"]
    assert sorted(entry.path.name for entry in cache_entries()) == ["bucket", "now"]


def test_using_an_entry_makes_it_the_last_to_be_removed(cache):
    first = put(cache / "features" / "first", 10, days=9)
    put(cache / "features" / "second", 10, days=8)
    mark_used(first)
    mark_used(cache / "features" / "missing")
    assert [entry.path.name for entry in cache_entries()] == ["second", "first"]


def test_what_has_a_removed_entry_open_reads_it_to_the_end(cache):
    path = put(cache / "features" / "a", 10)
    with (path / "values").open("rb") as file:
        remove(cache_entries()[0])
        assert file.read() == b"x" * 10
    remove(CacheEntry("features", path, 10, 0.0))  # removed already
    assert os.listdir(cache / "features") == []


entries = st.lists(
    st.builds(
        CacheEntry,
        kind=st.sampled_from(sorted(CACHES)),
        path=st.just(None),
        bytes=st.integers(0, 100),
        last_used=st.floats(0, 100 * DAY),
    )
)


@given(entries, st.integers(0, 2000), st.integers(0, 100))
def test_pruning_keeps_the_bound_with_no_removal_too_many(entries, keep, days):
    entries.sort(key=lambda entry: entry.last_used)
    now = 100 * DAY
    chosen = to_prune(entries, unused_days=days, keep_bytes=keep, now=now)
    may_go = [entry for entry in entries if entry.last_used <= now - days * DAY]
    assert chosen == may_go[: len(chosen)]
    kept = sum(entry.bytes for entry in entries) - sum(entry.bytes for entry in chosen)
    assert kept <= keep or chosen == may_go
    assert not chosen or kept + chosen[-1].bytes > keep


def test_the_command_shows_and_prunes(cache, capsys):
    from clipft.cli.app import run

    put(cache / "features" / "a", 3 << 20, days=40)
    put(cache / "captions" / "b", 10, days=1)
    assert run(["cache"]) == 0
    shown = capsys.readouterr().out
    assert "2 items" in shown
    assert "3.0 MiB  40 days ago  1: outputs of frozen encoders" in shown
    assert run(["cache", "--prune", "--unused-days", "30"]) == 0
    assert "Removed 1 item," in capsys.readouterr().out
    assert [entry.kind for entry in cache_entries()] == ["captions"]
    assert run(["cache", "--kind", "feature"]) == 2
    assert "did you mean features?" in capsys.readouterr().err


def test_the_setting_bounds_the_cache_after_a_command(cache, capsys):
    from clipft.cli.app import run

    put(cache / "features" / "a", 3 << 20, days=1)
    put(cache / "s3" / "bucket", 3 << 20, days=1)
    assert run(["settings", "--cache-limit", "0.001"]) == 0
    assert "Removed 1 cached result" in capsys.readouterr().err
    assert [entry.kind for entry in cache_entries()] == ["s3"]
