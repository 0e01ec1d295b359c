"""Tensors of files are read, overwritten and hashed in place."""

import zlib
from dataclasses import replace
from hashlib import sha256

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_folders import WEIGHTS
from tiny_models import saved, tiny_model

from mopcompress.errors import StorageError
from mopcompress.models.safetensors_io import (
    overwrite,
    read_rows,
    read_tensor,
    stored_hash,
    tensor_crc32,
    tensor_locations,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return saved(tiny_model(), tmp_path_factory.mktemp("models") / "whole")


def test_a_tensor_is_read_as_safetensors_reads_it(whole):
    for name, tensor in load_file(whole / WEIGHTS).items():
        assert torch.equal(read_tensor(whole, tensor_locations(whole)[name]), tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_overwriting_changes_one_tensor_and_nothing_else(dtype, tmp_path):
    tensors = {name: torch.randn(4, 5).to(dtype) for name in "abc"}
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    new = torch.randn(4, 5)
    digest = overwrite(tmp_path, tensor_locations(tmp_path)["b"], new)
    assert digest == stored_hash(tmp_path, tensor_locations(tmp_path)["b"])
    after = load_file(tmp_path / WEIGHTS)
    assert torch.equal(after["b"], new.to(dtype))
    assert torch.equal(after["a"], tensors["a"])
    assert torch.equal(after["c"], tensors["c"])


def test_single_rows_are_read(tmp_path):
    tensors = {"a": torch.randn(3), "b": torch.randn(6, 5).half()}
    save_file(tensors, tmp_path / WEIGHTS)
    rows = read_rows(tmp_path, tensor_locations(tmp_path)["b"], [1, 4, 5])
    assert torch.equal(rows[[1, 4, 5]], tensors["b"][[1, 4, 5]].float())


def test_a_write_that_does_not_arrive_is_a_storage_error(tmp_path):
    save_file({"a": torch.zeros(4)}, tmp_path / WEIGHTS)
    (tmp_path / "null").symlink_to("/dev/null")
    with pytest.raises(StorageError):
        overwrite(tmp_path, replace(tensor_locations(tmp_path)["a"], file="null"), torch.ones(4))


def test_a_stored_hash_is_the_sha256_of_the_bytes(tmp_path):
    tensors = {"a": torch.randn(3), "b": torch.randn(6, 5).half()}
    save_file(tensors, tmp_path / WEIGHTS)
    for name, location in tensor_locations(tmp_path).items():
        assert stored_hash(tmp_path, location) == sha256(tensors[name].numpy().tobytes()).hexdigest()


def test_a_checksum_continues_from_the_one_before():
    first, second = torch.randn(3, 4), torch.arange(5)
    content = first.numpy().tobytes() + second.numpy().tobytes()
    assert tensor_crc32(second, tensor_crc32(first)) == zlib.crc32(content)
    assert tensor_crc32(first.T) == zlib.crc32(first.T.contiguous().numpy().tobytes())
