import os
import tempfile

import pytest
import torch

from mopcompress.errors import StorageError
from mopcompress.storage.memmap import map_anonymous, map_file, reserve


def test_a_mapped_tensor_is_its_file(tmp_path):
    mapped = map_file(tmp_path / "states", 2, 3, torch.float16)
    mapped.copy_(torch.arange(6.0).view(2, 3))
    assert (tmp_path / "states").read_bytes() == torch.arange(6.0).half().numpy().tobytes()
    assert torch.equal(map_file(tmp_path / "states", 2, 3, torch.float16), mapped)


def test_an_anonymous_mapping_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mapped = map_anonymous(4, 2, torch.float32)
    assert not list(tmp_path.iterdir())
    mapped.fill_(3.0)
    assert float(mapped.sum()) == 24


def test_states_without_room_are_refused_in_words(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(StorageError, match=r"bytes of hidden states find no room in .*; free some, or set TMPDIR"):
        map_anonymous(2**50, 2**8, torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_room_is_reserved_on_systems_without_fallocate_too(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")  # as on macOS
    for size in (0, 12):
        reserve(tmp_path / "states", size)
        assert (tmp_path / "states").stat().st_size == size
