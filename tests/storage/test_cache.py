import json
import os
import shutil

import pytest

from mopcompress.errors import DataError
from mopcompress.storage import artifacts, cache

SIZE = 1000


@pytest.fixture(autouse=True)
def entries(tmp_path, monkeypatch):
    """The folder of all entries."""
    monkeypatch.setenv("MOPCOMPRESS_CACHE", str(tmp_path))
    return tmp_path / "states"


class Counter:
    """A value in the cache, and how often it was written and computed."""

    def __init__(self):
        self.written = self.computed = 0

    def load(self, name="model", *, size=SIZE):
        def write(folder, manifest):
            self.written += 1
            manifest["note"] = "added while writing"
            (folder / "value").write_bytes(name.encode().ljust(size))

        def compute():
            self.computed += 1
            return name

        def read(folder):
            return (folder / "value").read_bytes().decode().strip()

        return cache.cached({"name": name}, size=size, write=write, read=read, compute=compute)


def test_an_entry_is_written_once_and_then_read(entries):
    counter = Counter()
    assert [counter.load(), counter.load()] == ["model", "model"]
    assert (counter.written, counter.computed) == (1, 0)
    (folder,) = entries.iterdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["name"], manifest["note"]) == ("model", "added while writing")


def test_the_folder_is_named_by_the_key(entries):
    Counter().load("other")
    assert [path.name for path in entries.iterdir()] == [artifacts.fingerprint({"name": "other"})]


def test_a_damaged_entry_is_removed_and_written_again(entries):
    counter = Counter()
    counter.load()
    (folder,) = entries.iterdir()
    (folder / "value").write_bytes(b"mode1".ljust(SIZE))
    assert not cache.is_intact(folder)
    assert not folder.exists()
    assert counter.load() == "model"
    assert counter.written == 2


def test_an_error_of_the_computation_is_passed_on(entries):
    def write(_folder, _manifest):
        raise DataError("the model is broken")

    with pytest.raises(DataError, match="is broken"):
        cache.cached({}, size=1, write=write, read=str, compute=lambda: pytest.fail("computed"))
    assert not list(entries.iterdir())


def test_an_entry_that_vanishes_before_it_is_read_is_computed(entries, monkeypatch):
    counter = Counter()
    counter.load()
    monkeypatch.setattr(cache, "is_intact", lambda folder: shutil.rmtree(folder, ignore_errors=True) or True)
    assert counter.load() == "model"
    assert (counter.written, counter.computed) == (1, 1)


def test_an_entry_of_a_faster_process_is_read(monkeypatch):
    """It appears after this process found none, so that publishing fails."""
    slow, fast = Counter(), Counter()
    evict = cache._evict
    monkeypatch.setattr(cache, "_evict", lambda *_: monkeypatch.setattr(cache, "_evict", evict) or fast.load())
    assert slow.load() == "model"
    assert (slow.written, slow.computed, fast.written) == (0, 0, 1)


@pytest.mark.parametrize("reason", ["too large", "no folder"])
def test_an_entry_that_cannot_be_written_is_computed(entries, monkeypatch, reason):
    if reason == "too large":
        monkeypatch.setattr(cache, "LIMIT", SIZE - 1)
    else:
        entries.parent.joinpath("file").write_text("in the way")
        monkeypatch.setenv("MOPCOMPRESS_CACHE", str(entries.parent / "file"))
    counter = Counter()
    assert counter.load() == "model"
    assert (counter.written, counter.computed) == (0, 1)


def test_the_least_recently_used_entries_make_room(entries, monkeypatch):
    counter = Counter()
    for name in ("first", "second", "third"):
        counter.load(name)
    size = sum(file.stat().st_size for folder in entries.iterdir() for file in folder.iterdir())
    monkeypatch.setattr(cache, "LIMIT", size + SIZE // 2)
    counter.load("first")  # used again: now `second` is the oldest
    counter.load("fourth")
    names = {json.loads((folder / "manifest.json").read_text())["name"] for folder in entries.iterdir()}
    assert names == {"first", "third", "fourth"}


def test_no_more_entries_are_removed_than_needed(entries, monkeypatch):
    counter = Counter()
    for name in ("first", "second", "third"):
        counter.load(name)
    size = sum(file.stat().st_size for folder in entries.iterdir() for file in folder.iterdir())
    monkeypatch.setattr(cache, "LIMIT", size + SIZE)
    counter.load("fourth")
    assert len(list(entries.iterdir())) == 4


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"MOPCOMPRESS_CACHE": "/own", "XDG_CACHE_HOME": "/xdg"}, "/own"),
        ({"MOPCOMPRESS_CACHE": "", "XDG_CACHE_HOME": "/xdg"}, "/xdg/mopcompress"),
        ({"MOPCOMPRESS_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/home/me"}, "/home/me/.cache/mopcompress"),
    ],
)
def test_the_cache_folder_follows_the_environment(monkeypatch, variables, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(cache.cache_folder()) == os.path.normpath(expected)
