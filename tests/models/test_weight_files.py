import json

import pytest

from mopcompress.errors import DataError, RefusedError
from mopcompress.models.weight_files import weight_files


def write_index(folder, *names):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(enumerate(names))}))


def test_weight_files_are_a_single_file_or_its_shards(tmp_path):
    for name in ("grid.safetensors", "consolidated.safetensors", "b.safetensors", "a.safetensors"):
        (tmp_path / name).touch()
    assert weight_files(tmp_path) == []
    write_index(tmp_path, "b.safetensors", "a.safetensors", "b.safetensors")
    assert weight_files(tmp_path) == [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    (tmp_path / "model.safetensors").touch()
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", "deep/a.safetensors", "a.bin"])
def test_an_index_cannot_name_files_outside_its_folder(name, tmp_path):
    write_index(tmp_path, name)
    with pytest.raises(RefusedError, match="no safetensors file in its folder"):
        weight_files(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index_is_a_data_error(text, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(DataError, match="no index of weights"):
        weight_files(tmp_path)


def test_a_missing_shard_is_a_data_error(tmp_path):
    write_index(tmp_path, "a.safetensors")
    with pytest.raises(DataError, match=r"a\.safetensors, which is missing"):
        weight_files(tmp_path)
