import json

import pytest

from mopcompress.errors import DataError, OutputError, StorageError
from mopcompress.storage import artifacts


def finished(folder, **metadata):
    with artifacts.publish(folder, metadata) as scratch:
        (scratch / "deep").mkdir()
        (scratch / "deep" / "numbers.bin").write_bytes(bytes(range(256)))
        (scratch / "words.txt").write_text("words")
    return folder


def test_a_folder_appears_whole_with_metadata_and_hashes(tmp_path):
    target = tmp_path / "new" / "out"
    with artifacts.publish(target, metadata := {"kind": "test"}) as scratch:
        (scratch / "words.txt").write_text("words")
        assert not target.exists()
        metadata["late"] = 1
    assert artifacts.read_manifest(target) == {
        "kind": "test",
        "late": 1,
        "files": {"words.txt": artifacts.sha256_file(target / "words.txt")},
    }
    assert [path.name for path in target.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, DataError])
def test_after_an_error_nothing_is_left(tmp_path, error):
    def fail():
        with artifacts.publish(tmp_path / "out", {}) as scratch:
            (scratch / "half.txt").write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert not list(tmp_path.iterdir())


def test_a_failing_disk_is_a_storage_error_and_leaves_nothing(tmp_path):
    with pytest.raises(StorageError, match="No space left"), artifacts.publish(tmp_path / "out", {}):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("make", ["folder", "file"])
def test_an_existing_target_is_refused_and_kept(tmp_path, make):
    target = tmp_path / "out"
    if make == "folder":
        target.mkdir()
    else:
        target.write_text("mine")
    with pytest.raises(OutputError, match="exists already"), artifacts.publish(target, {}):
        pytest.fail("the block ran")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_target_that_cannot_be_created_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be created"), artifacts.publish(tmp_path / "file" / "out", {}):
        pytest.fail("the block ran")


# --- verify


def test_a_whole_folder_is_verified(tmp_path):
    artifacts.verify(finished(tmp_path / "out"))


@pytest.mark.parametrize("index", [0, 100, 255])
def test_one_flipped_bit_is_found(tmp_path, index):
    path = finished(tmp_path / "out") / "deep" / "numbers.bin"
    content = bytearray(path.read_bytes())
    content[index] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"numbers\.bin is missing or differs"):
        artifacts.verify(tmp_path / "out")


def test_a_missing_file_is_found(tmp_path):
    (finished(tmp_path / "out") / "words.txt").unlink()
    with pytest.raises(DataError, match=r"words\.txt is missing"):
        artifacts.verify(tmp_path / "out")


def test_a_folder_without_a_manifest_is_not_finished(tmp_path):
    assert artifacts.read_manifest(tmp_path) is None
    with pytest.raises(DataError, match="not a finished"):
        artifacts.verify(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[1]", '"text"', "{}"])
def test_a_damaged_manifest_is_a_data_error(tmp_path, content):
    (finished(tmp_path / "out") / artifacts.MANIFEST).write_text(content)
    with pytest.raises(DataError, match=r"make (it|the folder) again"):
        artifacts.verify(tmp_path / "out")


# --- small parts


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    artifacts.write_atomically(path, "old")

    def fail(_descriptor):
        assert path.read_text() == "old"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space"):
        artifacts.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]
    monkeypatch.undo()
    artifacts.write_atomically(path, "new")
    assert path.read_text() == "new"


@pytest.mark.parametrize(("data", "content"), [(b"\x00\xff\n", b"\x00\xff\n"), ("ä\n", b"\xc3\xa4\n")])
def test_bytes_are_written_as_they_are_and_text_as_utf8(tmp_path, data, content):
    artifacts.write_atomically(tmp_path / "file", data)
    assert (tmp_path / "file").read_bytes() == content


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_replacement_that_fails_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "weights"
    path.write_bytes(b"old")

    def fail():
        with artifacts.replaced_atomically(path) as scratch:
            scratch.write_bytes(b"half")
            assert scratch.parent == path.parent  # on the same file system: renaming is atomic
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_replacement_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "weights"
    with artifacts.replaced_atomically(path) as scratch:
        scratch.write_bytes(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_hash_is_that_of_sha256sum(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert artifacts.sha256_file(tmp_path / "abc") == expected


def test_a_fingerprint_is_of_content_not_order():
    settings = {"a": 1, "b": {"c": 2, "d": 3}}
    assert artifacts.fingerprint(settings) == artifacts.fingerprint(json.loads('{"b": {"d": 3, "c": 2}, "a": 1}'))
    assert artifacts.fingerprint(settings) != artifacts.fingerprint(settings | {"a": 2})


def test_differences_of_settings_have_dotted_names():
    old, new = {"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"c": 2, "d": 4}, "e": 5}
    assert artifacts.differences(old, new) == ["a was 1, is None", "b.d was 3, is 4", "e was None, is 5"]
    assert artifacts.differences(old, old) == []
