"""A model that is read block by block equals the model, and its weights have the names of the files they came from."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import BLOCKS, FAMILIES, config_of, network_of, random_tokens, saved, tiny_model, word_tokenizer

from mopcompress.errors import DataError
from mopcompress.models.model_loading import load_model
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
def test_a_streamed_model_is_the_model(family, dtype, tmp_path):
    folder = saved(tiny_model(family), tmp_path / "model", dtype)
    streaming, whole = streamed(folder), load_model(folder, device=CPU)
    stored, hidden, expected = load_file(folder / WEIGHTS), None, None
    names = set()
    for index in range(BLOCKS):
        with streaming.block(index):
            hidden = streaming.model.run_block(TOKENS, hidden, index)
            expected = whole.run_block(TOKENS, expected, index)
            assert torch.equal(hidden, expected)
            for name, weight in streaming.weights_to_store(index).items():
                assert torch.equal(weight.to(dtype), stored[name])
                names.add(name)
            assert streaming.stored_dtype(index) == dtype
    blocks = {name for name in stored if any(f".{index}." in name for index in range(BLOCKS)) and "wpe" not in name}
    assert names == blocks


def test_only_a_single_block_and_its_surroundings_are_loaded(tmp_path):
    streaming = streamed(saved(tiny_model(), tmp_path / "model"))
    blocks = {f"model.layers.{index}" for index in range(BLOCKS)}

    def present():
        return blocks - {name.rsplit(".", 3)[0] for name in on_meta(streaming.model) if "self_attn.q_proj" in name}

    with streaming.block(0):
        assert present() == {"model.layers.0"}
    assert present() == set()
    assert "lm_head.weight" in on_meta(streaming.model)
    assert not {"model.embed_tokens.weight", "model.norm.weight"} & on_meta(streaming.model)
    with streaming.block(2):
        assert present() == {"model.layers.2"}
    streaming.load_block(1)
    streaming.load_block(3)
    assert present() == {"model.layers.3"}


def test_embedding_rows_of_the_tokens_are_loaded(tmp_path):
    model = tiny_model()
    streaming = streamed(saved(model, tmp_path / "model"))
    rows = [0, *TOKENS.unique().tolist()]
    embedding = streaming.model.network.get_input_embeddings().weight
    assert torch.equal(embedding[rows], model.network.get_input_embeddings().weight[rows])


def test_a_checkpoint_of_the_bare_decoder_keeps_its_names(tmp_path):
    network = network_of(config_of("gpt2"))
    network.transformer.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    streaming = streamed(tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    assert not any(name.startswith("transformer.") for name in stored)
    with streaming.block(1):
        assert {name for name in stored if name.startswith("h.1.")} == streaming.weights_to_store(1).keys()


def test_tied_weights_may_have_the_name_of_the_head(tmp_path):
    folder = saved(tiny_model(tie_word_embeddings=True), tmp_path / "model")
    weights = load_file(folder / WEIGHTS)
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    streaming, whole = streamed(folder), load_model(folder, device=CPU)
    with streaming.block(0), torch.inference_mode():
        assert torch.equal(streaming.model.run_block(TOKENS, None, 0), whole.run_block(TOKENS, None, 0))


# --- damaged folders


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
