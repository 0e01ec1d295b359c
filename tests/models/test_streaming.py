"""A model that is read block by block is the model, and what is written of it lies where it was read."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import BLOCKS, FAMILIES, config_of, network_of, random_tokens, saved, tiny_model, word_tokenizer

from mopcompress.errors import DataError, StorageError
from mopcompress.models.model_loading import load_model
from mopcompress.models.safetensors_io import overwrite, read, read_rows, tensor_locations
from mopcompress.models.streaming import StreamedModel

CPU = torch.device("cpu")
TOKENS = random_tokens(2, 9)
WEIGHTS = "model.safetensors"
UP = "model.layers.2.mlp.up_proj.weight"


def streamed(folder):
    return StreamedModel(folder, word_tokenizer(), TOKENS, device=CPU)


def on_meta(model):
    return {name for name, weight in model.network.named_parameters() if weight.is_meta}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_a_streamed_model_is_the_model_and_is_stored_as_it_was_read(family, dtype, tmp_path):
    folder = saved(tiny_model(family), tmp_path / "model", dtype)
    parts, whole = streamed(folder), load_model(folder, device=CPU)
    stored, one, other = load_file(folder / WEIGHTS), None, None
    seen = set()
    for index in range(BLOCKS):
        with parts.block(index):
            one, other = parts.model.run_block(TOKENS, one, index), whole.run_block(TOKENS, other, index)
            assert torch.equal(one, other)
            for name, weight in parts.stored(index).items():
                assert torch.equal(weight.to(dtype), stored[name])
                seen.add(name)
            assert parts.dtype_of(index) == dtype
    blocks = {name for name in stored if any(f".{index}." in name for index in range(BLOCKS)) and "wpe" not in name}
    assert seen == blocks


def test_only_one_block_and_what_stands_around_has_weights(tmp_path):
    parts = streamed(saved(tiny_model(), tmp_path / "model"))
    blocks = {f"model.layers.{index}" for index in range(BLOCKS)}

    def present():
        return blocks - {name.rsplit(".", 3)[0] for name in on_meta(parts.model) if "self_attn.q_proj" in name}

    with parts.block(0):
        assert present() == {"model.layers.0"}
    assert present() == set()
    assert "lm_head.weight" in on_meta(parts.model)
    assert not {"model.embed_tokens.weight", "model.norm.weight"} & on_meta(parts.model)
    with parts.block(2):
        assert present() == {"model.layers.2"}
    parts.hold(1)
    parts.hold(3)
    assert present() == {"model.layers.3"}


def test_of_the_embedding_only_rows_that_are_read_are_there(tmp_path):
    model = tiny_model()
    parts = streamed(saved(model, tmp_path / "model"))
    rows = [0, *TOKENS.unique().tolist()]
    embedding = parts.model.network.get_input_embeddings().weight
    assert torch.equal(embedding[rows], model.network.get_input_embeddings().weight[rows])


def test_a_checkpoint_of_the_bare_decoder_is_stored_under_its_own_names(tmp_path):
    network = network_of(config_of("gpt2"))
    network.transformer.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    parts = streamed(tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    assert not any(name.startswith("transformer.") for name in stored)
    with parts.block(1):
        assert {name for name in stored if name.startswith("h.1.")} == parts.stored(1).keys()


def test_tied_weights_may_be_stored_under_the_heads_name(tmp_path):
    folder = saved(tiny_model(tie_word_embeddings=True), tmp_path / "model")
    weights = load_file(folder / WEIGHTS)
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    parts, whole = streamed(folder), load_model(folder, device=CPU)
    with parts.block(0), torch.inference_mode():
        assert torch.equal(parts.model.run_block(TOKENS, None, 0), whole.run_block(TOKENS, None, 0))


# --- what is damaged


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return saved(tiny_model(), tmp_path_factory.mktemp("models") / "whole")


def change(folder, act):
    weights = load_file(folder / WEIGHTS)
    act(weights)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def truncate(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-4])


def reshape(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 24}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "cut off"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b""), "no whole safetensors file"),
        (lambda folder: change(folder, lambda weights: weights.pop(UP)), rf"hold no {UP}"),
        (lambda folder: change(folder, lambda weights: weights[UP][3].fill_(torch.nan)), rf"{UP} holds NaN"),
        (reshape, "is not of shape"),
    ],
)
def test_a_damaged_folder_is_a_data_error(whole, damage, message, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "model")
    damage(folder)
    with pytest.raises(DataError, match=message) as caught, streamed(folder).block(2):
        pass
    assert "\n" not in str(caught.value)


# --- tensors in place


def test_a_tensor_is_read_as_safetensors_reads_it(whole):
    for name, tensor in load_file(whole / WEIGHTS).items():
        assert torch.equal(read(whole, tensor_locations(whole)[name]), tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_overwriting_changes_one_tensor_and_nothing_else(dtype, tmp_path):
    tensors = {name: torch.randn(4, 5).to(dtype) for name in "abc"}
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    new = torch.randn(4, 5)
    overwrite(tmp_path, tensor_locations(tmp_path)["b"], new)
    after = load_file(tmp_path / WEIGHTS)
    assert torch.equal(after["b"], new.to(dtype))
    assert torch.equal(after["a"], tensors["a"])
    assert torch.equal(after["c"], tensors["c"])


def test_rows_are_read_from_where_they_are(tmp_path):
    tensors = {"a": torch.randn(3), "b": torch.randn(6, 5).half()}
    save_file(tensors, tmp_path / WEIGHTS)
    found = read_rows(tmp_path, tensor_locations(tmp_path)["b"], [1, 4, 5])
    assert torch.equal(found[[1, 4, 5]], tensors["b"][[1, 4, 5]].float())


def test_what_is_not_there_as_it_was_written_is_an_error(tmp_path):
    save_file({"a": torch.zeros(4)}, tmp_path / WEIGHTS)
    (tmp_path / "null").symlink_to("/dev/null")
    with pytest.raises(StorageError):
        overwrite(tmp_path, replace(tensor_locations(tmp_path)["a"], file="null"), torch.ones(4))
