import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_folders import WEIGHTS, flip_a_bit, rehash

from mopcompress.entrypoints.export import export
from mopcompress.entrypoints.verify import verify
from mopcompress.errors import DataError
from mopcompress.formats import FORMATS
from mopcompress.formats.model_reader import open_model
from mopcompress.storage import artifacts


@pytest.mark.parametrize("format", FORMATS)
def test_a_flipped_bit_is_found_even_under_a_new_hash(format, quantized_folder, tmp_path):
    export(str(quantized_folder), format, tmp_path / "out")
    path = open_model(tmp_path / "out").files[0]
    flip_a_bit(path)
    with pytest.raises(DataError, match="differs from its hash"):
        verify(tmp_path / "out")
    rehash(tmp_path / "out")
    with pytest.raises(DataError, match=r"is not what was exported|holds NaN|is damaged"):
        verify(tmp_path / "out")


def finish(folder, target):
    with artifacts.publish(target, {"kind": "compressed model"}) as scratch:
        shutil.copytree(folder, scratch, dirs_exist_ok=True)
    return target


def test_weights_off_their_grid_are_found(quantized_folder, tmp_path):
    folder = finish(quantized_folder, tmp_path / "out")
    assert verify(folder)["tensors"] == len(load_file(quantized_folder / WEIGHTS))
    weights = load_file(folder / WEIGHTS)
    weights["model.layers.0.mlp.up_proj.weight"][0] *= 1.5
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    rehash(folder)
    with pytest.raises(DataError, match=r"layers\.0\.mlp\.up_proj: a weight does not lie on its grid"):
        verify(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").write_text('{"model_type": "unheard-of"}'), "cannot be loaded"),
        (lambda folder: save_file({"x": torch.full((2,), torch.nan)}, folder / WEIGHTS), "holds NaN"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"rubbish"), "is damaged"),
    ],
)
def test_damage_is_found_even_under_new_hashes(damage, message, pruned_folder, tmp_path):
    folder = finish(pruned_folder, tmp_path / "out")
    damage(folder)
    rehash(folder)
    with pytest.raises(DataError, match=message):
        verify(folder)


def test_any_finished_folder_is_verified(tmp_path):
    with artifacts.publish(tmp_path / "out", {"kind": "adapter"}) as scratch:
        save_file({"prompts": torch.ones(3), "bad": torch.ones(2)}, scratch / "adapter.safetensors")
    assert verify(tmp_path / "out") == {"folder": str(tmp_path / "out"), "kind": "adapter", "files": 1, "tensors": 2}
    save_file({"prompts": torch.full((3,), torch.inf)}, tmp_path / "out" / "adapter.safetensors")
    rehash(tmp_path / "out")
    with pytest.raises(DataError, match="prompts holds NaN or infinite"):
        verify(tmp_path / "out")
