import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, random_tokens, saved, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

from mopcompress.compress.plan import MethodConfig
from mopcompress.compress.sequential import compress_model
from mopcompress.errors import DataError, InputNotFoundError, OutputError, RefusedError, UnavailableError
from mopcompress.models.model_loading import (
    check_output,
    load_model,
    resolve_model,
    save_model,
    weights_bytes,
    weights_hash,
)
from mopcompress.storage import artifacts

CPU = torch.device("cpu")
TOKENS = random_tokens(2, 9)
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    """A saved model, which tests copy before they damage it."""
    return saved(tiny_model(), tmp_path_factory.mktemp("models") / "whole")


@pytest.fixture
def folder(saved_model, tmp_path):
    return shutil.copytree(saved_model, tmp_path / "model")


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


# --- folders that cannot be loaded


def test_pickled_weights_are_rejected(folder):
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(RefusedError, match=r"only pickled weights \(pytorch_model\.bin\)"):
        load_model(folder, device=CPU)


def test_pickled_weights_next_to_safe_ones_are_not_read(folder):
    (folder / "pytorch_model.bin").write_bytes(b"this would fail")
    load_model(folder, device=CPU)


def test_remote_code_is_rejected(folder):
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling.Model"})
    (folder / "modeling.py").write_text("raise SystemExit('remote code ran')")
    with pytest.raises(RefusedError, match="auto_map"):
        load_model(folder, device=CPU)


def truncate(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def write_nan(folder):
    weights = load_file(folder / WEIGHTS)
    weights["model.layers.2.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def remove_a_weight(folder):
    weights = load_file(folder / WEIGHTS)
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "cannot be loaded"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b""), "cannot be loaded"),
        (write_nan, r"layers\.2\.mlp\.up_proj\.weight holds NaN"),
        (remove_a_weight, r"hold no model\.layers\.2\.mlp\.up_proj\.weight"),
        (lambda folder: change_config(folder, hidden_size=48), "model"),
        (lambda folder: change_config(folder, model_type="unheard-of"), "cannot be loaded"),
        (lambda folder: change_config(folder, is_encoder_decoder=True), "encoder-decoder"),
        (lambda folder: change_config(folder, quantization_config={"bits": 4}), "quantised already"),
        (lambda folder: (folder / "config.json").write_text("{"), "not a JSON object"),
        (lambda folder: (folder / "config.json").write_text("[1]"), "not a JSON object"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "cannot be loaded"),
    ],
)
def test_a_damaged_folder_is_a_data_error(folder, damage, message):
    damage(folder)
    with pytest.raises(DataError, match=message) as caught:
        load_model(folder, device=CPU)
    assert "\n" not in str(caught.value)


def test_a_model_that_is_no_language_model_is_a_data_error(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path)
    tiny_model().tokenizer.save_pretrained(tmp_path)
    with pytest.raises(DataError):
        load_model(tmp_path, device=CPU)


def test_a_folder_without_config_or_weights_is_not_found(folder):
    (folder / WEIGHTS).unlink()
    with pytest.raises(InputNotFoundError, match=r"no model\.safetensors or"):
        load_model(folder, device=CPU)
    (folder / "config.json").unlink()
    with pytest.raises(InputNotFoundError, match=r"no config\.json"):
        load_model(folder, device=CPU)


# --- names


def test_a_folder_wins_over_other_meanings_of_its_name(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    shutil.copytree(folder, "smollm2")
    assert resolve_model("smollm2").samefile(folder.parent / "smollm2")
    assert resolve_model(str(folder)) == folder


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "~/nowhere", "nowhere", "a/b/c"])
def test_a_path_that_does_not_exist_is_not_found(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputNotFoundError, match="no such folder"):
        resolve_model(name)


def test_a_file_is_no_model(folder):
    with pytest.raises(DataError, match="is a file"):
        resolve_model(str(folder / WEIGHTS))


def test_a_hub_id_that_cannot_be_downloaded_is_unavailable(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UnavailableError, match="some/model") as caught:
        resolve_model("some/model")
    assert "\n" not in str(caught.value)


def test_outputs_must_be_new_and_outside_the_model(folder, tmp_path):
    check_output(tmp_path / "new", folder)
    with pytest.raises(OutputError, match="exists already"):
        check_output(folder, folder)
    with pytest.raises(OutputError, match="inside the model"):
        check_output(folder / "deep" / "new", folder)


# --- saving


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@torch.no_grad()
def test_a_saved_model_has_the_tensors_of_its_source(family, dtype, tmp_path):
    source = saved(tiny_model(family), tmp_path / "source", dtype)
    model = load_model(source, device=CPU)
    target = tmp_path / "target"
    target.mkdir()
    save_model(model, source, target)
    before, after = load_file(source / WEIGHTS), load_file(target / WEIGHTS)
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert weight.dtype == after[name].dtype == dtype
        assert torch.equal(weight, after[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tied_weights_are_written_once(dtype, tmp_path):
    source = saved(tiny_model(tie_word_embeddings=True), tmp_path / "source", dtype)
    target = tmp_path / "target"
    target.mkdir()
    save_model(load_model(source, device=CPU), source, target)
    assert "lm_head.weight" not in load_file(target / WEIGHTS)
    assert weights_bytes(target) == pytest.approx(weights_bytes(source), rel=0.01)
    again = load_model(target, device=CPU).network
    assert again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()


def test_every_other_file_is_copied_byte_for_byte(folder, tmp_path):
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text())) + "  \n\n")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text("its author's words")
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    (folder / artifacts.MANIFEST).write_text("{}")
    target = tmp_path / "target"
    target.mkdir()
    save_model(load_model(folder, device=CPU), folder, target)
    copied = {path.name for path in folder.iterdir()} - {"pytorch_model.bin", artifacts.MANIFEST, WEIGHTS}
    assert {path.name for path in target.iterdir()} == copied | {WEIGHTS}
    for name in copied:
        assert (target / name).read_bytes() == (folder / name).read_bytes()


def test_a_hash_is_of_the_weights_alone(folder):
    before = weights_hash(folder)
    (folder / "README.md").write_text("words")
    assert weights_hash(folder) == before
    write_nan(folder)
    assert weights_hash(folder) != before


@torch.no_grad()
def test_stock_transformers_computes_the_same_as_we_do(stories, tmp_path):
    model = load_model(stories, device=CPU)
    tokens = torch.randint(3, 512, (2, 20), generator=torch.Generator().manual_seed(0))
    rows = compress_model(model, tokens, [MethodConfig(method="wanda", options={"sparsity": 0.5})])
    save_model(model, stories, tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    ours = load_model(tmp_path, device=CPU)
    assert torch.equal(stock(input_ids=TOKENS).logits, model.network(input_ids=TOKENS).logits)
    assert torch.equal(ours.network(input_ids=TOKENS).logits, model.network(input_ids=TOKENS).logits)
    assert (
        AutoTokenizer.from_pretrained(tmp_path)("Once upon a time").input_ids
        == model.tokenizer("Once upon a time").input_ids
    )
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        zeros = sum(int((file.get_tensor(f"{row.name}.weight") == 0).sum()) for row in rows)
    assert zeros == sum(row.zeros for row in rows) > 0
