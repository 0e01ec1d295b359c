"""Every export against the folder from which it was made."""

import json
import shutil

import pytest
import torch
from cli_runner import invoke, left_behind
from safetensors.torch import load_file, save_file
from tiny_folders import WEIGHTS, assert_same_tensors, compressed_folder, flip_a_bit, read_tensors
from tiny_models import saved, tiny_model
from transformers import AutoModelForCausalLM

from mopcompress.entrypoints.export import export
from mopcompress.entrypoints.verify import verify
from mopcompress.errors import DataError, InputNotFoundError, OutputError, StorageError
from mopcompress.formats import FORMATS, model_reader
from mopcompress.formats.model_reader import open_model
from mopcompress.models.meta_model import load_meta_model
from mopcompress.models.model_loading import load_model
from mopcompress.models.quantization_grid import FILE, read_grid
from mopcompress.storage import artifacts

CPU = torch.device("cpu")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, None])
def test_an_export_holds_the_same_tensors(format, bits, group_size, tmp_path):
    folder = compressed_folder(tmp_path / "in", bits=bits, group_size=group_size, sparsity=0.5)
    facts = export(str(folder), format, tmp_path / "out")
    assert_same_tensors(read_tensors(tmp_path / "out"), load_file(folder / WEIGHTS))
    assert facts["tensors"].keys() == load_file(folder / WEIGHTS).keys()
    assert verify(tmp_path / "out")["tensors"] == len(facts["tensors"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_an_export_keeps_the_dtype(format, dtype, tmp_path):
    folder = compressed_folder(tmp_path / "in", bits=4, sparsity=0.5, dtype=dtype)
    export(str(folder), format, tmp_path / "out")
    assert_same_tensors(read_tensors(tmp_path / "out"), load_file(folder / WEIGHTS))


@pytest.mark.parametrize("middle", FORMATS)
@pytest.mark.parametrize("bits", [4, None])
def test_a_round_trip_gives_the_same_files(middle, bits, tmp_path):
    if FORMATS[middle].needs_grid and bits is None:
        return
    folder = compressed_folder(tmp_path / "in", bits=bits, sparsity=0.7)
    export(str(folder), middle, tmp_path / "middle")
    export(str(tmp_path / "middle"), "dense", tmp_path / "back")
    names = {path.name for path in folder.iterdir()}
    assert {path.name for path in (tmp_path / "back").iterdir()} == names | {artifacts.MANIFEST}
    for name in names - {FILE, "config.json"}:
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes(), name
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads((folder / "config.json").read_text())
    if bits:
        before, after = read_grid(folder), read_grid(tmp_path / "back")
        assert (before.bits, before.group_size) == (after.bits, after.group_size)
        assert_same_tensors(after.scales, before.scales)
    facts = artifacts.read_manifest(tmp_path / "back")
    assert facts["dense_sha256"] == artifacts.fingerprint({WEIGHTS: artifacts.sha256_file(folder / WEIGHTS)})


@pytest.mark.parametrize("format", FORMATS)
def test_all_other_files_are_copied_byte_for_byte(format, quantized_folder, tmp_path):
    folder = shutil.copytree(quantized_folder, tmp_path / "in")
    (folder / "chat_template.jinja").write_text("{{ messages }}  \n")
    (folder / "layers.jsonl").write_text("{}\n")
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    export(str(folder), format, tmp_path / "out")
    copied = {path.name for path in folder.iterdir()} - {WEIGHTS, FILE, "config.json", "pytorch_model.bin"}
    assert "tokenizer.json" in copied
    for name in copied:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "out"))
    assert before == {name: value for name, value in after.items() if name != "quantization_config"}
    if format in {"dense", "sparse"}:
        assert (folder / "config.json").read_bytes() == (tmp_path / "out/config.json").read_bytes()


def sharded(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    target = shutil.copytree(folder, tmp_path / "sharded")
    (target / WEIGHTS).unlink()
    model.save_pretrained(target, max_shard_size="60KB")
    assert len(list(target.glob("model-*.safetensors"))) > 2
    return target


@pytest.mark.parametrize("format", FORMATS)
def test_shards_stay_shards(format, quantized_folder, tmp_path):
    folder = sharded(quantized_folder, tmp_path)
    export(str(folder), format, tmp_path / "out")
    assert len(open_model(tmp_path / "out").files) == len(open_model(folder).files)
    assert_same_tensors(read_tensors(tmp_path / "out"), load_file(quantized_folder / WEIGHTS))
    export(str(tmp_path / "out"), "dense", tmp_path / "back")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto").state_dict()
    assert_same_tensors(stock, AutoModelForCausalLM.from_pretrained(quantized_folder, dtype="auto").state_dict())


@pytest.mark.parametrize(
    ("format", "changes", "message"),
    [
        ("gptq", {"bits": 5}, "holds 2, 3, 4 or 8 bits, not 5"),
        ("gptq", {"bits": 3, "family": "gpt2"}, "holds nn.Linear alone"),
        ("compressed-tensors", {"bits": 3, "family": "gpt2"}, "holds nn.Linear alone"),
        ("gptq", {"bits": None}, "are on no grid; run `mopcompress quantize` first"),
        ("compressed-tensors", {"bits": None}, "are on no grid"),
    ],
)
def test_an_unsuitable_format_is_an_error_before_any_writing(format, changes, message, tmp_path):
    folder = compressed_folder(tmp_path / "in", **changes)
    with pytest.raises(DataError, match=message):
        export(str(folder), format, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unquantised_linears_are_named(tmp_path):
    folder = compressed_folder(tmp_path / "in", bits=4, skip="layers.1.mlp")
    out = {format: tmp_path / format for format in ("gptq", "compressed-tensors")}
    for format, target in out.items():
        export(str(folder), format, target)
        assert_same_tensors(read_tensors(target), load_file(folder / WEIGHTS))
    skipped = [f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")]
    settings = json.loads((out["compressed-tensors"] / "config.json").read_text())["quantization_config"]
    assert sorted(settings["ignore"]) == sorted([*skipped, "lm_head"])
    settings = json.loads((out["gptq"] / "config.json").read_text())["quantization_config"]
    assert settings == json.loads((out["gptq"] / "quantize_config.json").read_text())
    (listed,) = settings["modules_in_block_to_quantize"]
    linears = load_meta_model(folder).linears
    assert set(listed) == set(linears) - {*skipped, "lm_head"}
    assert len(settings["dynamic"]) == 3


def test_a_weight_off_its_grid_is_never_rounded(quantized_folder, tmp_path):
    folder = shutil.copytree(quantized_folder, tmp_path / "in")
    weights = load_file(folder / WEIGHTS)
    name = "model.layers.2.mlp.up_proj"
    weights[f"{name}.weight"][3] *= 1.5
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    for format in ("gptq", "compressed-tensors", "sparse"):
        with pytest.raises(DataError, match=rf"{name}: a weight does not lie on its grid"):
            export(str(folder), format, tmp_path / "out")
    assert not left_behind(tmp_path / "out")


# --- errors


@pytest.mark.parametrize("format", FORMATS)
def test_a_write_error_is_found_before_publication(format, quantized_folder, tmp_path, monkeypatch):
    save = model_reader.save_file

    def wrong(tensors, path, header):
        name = sorted(name for name in tensors if "layers.3" in name)[-1]
        damaged = tensors[name].clone()
        damaged.view(-1)[-1] += 1
        save({**tensors, name: damaged}, path, header)

    monkeypatch.setattr(model_reader, "save_file", wrong)
    with pytest.raises((StorageError, DataError)):
        export(str(quantized_folder), format, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_repeated_export_is_already_done(quantized_folder, tmp_path):
    folder = shutil.copytree(quantized_folder, tmp_path / "in")
    first = export(str(folder), "sparse", tmp_path / "out")
    again = export(str(folder), "sparse", tmp_path / "out")
    assert again["tensors"] == first["tensors"]
    with pytest.raises(OutputError, match="is another thing"):
        export(str(folder), "gptq", tmp_path / "out")
    with pytest.raises(OutputError, match="--resume is never"):
        export(str(folder), "sparse", tmp_path / "out", resume="never")
    with pytest.raises(InputNotFoundError, match="--resume required"):
        export(str(folder), "sparse", tmp_path / "new", resume="required")
    weights = load_file(folder / WEIGHTS)
    weights["model.norm.weight"] += 1
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(OutputError, match="is another thing"):
        export(str(folder), "sparse", tmp_path / "out")


def test_an_export_inside_its_model_is_an_error(quantized_folder, tmp_path):
    folder = shutil.copytree(quantized_folder, tmp_path / "in")
    with pytest.raises(OutputError, match="inside the model"):
        export(str(folder), "sparse", folder / "out")


@pytest.mark.parametrize("format", ["sparse", "gptq", "compressed-tensors"])
def test_loading_an_export_names_the_dense_format(format, quantized_folder, tmp_path):
    export(str(quantized_folder), format, tmp_path / "out")
    with pytest.raises(DataError, match=r"mopcompress export .* --format dense"):
        load_model(tmp_path / "out", device=CPU)


# --- commands


def test_the_commands_report_their_results(quantized_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(quantized_folder, tmp_path / "small")
    planned = invoke("export", folder, "--format", "sparse", "--dry-run", "--json")
    assert planned.json["output"] == "runs/small-sparse"
    assert not (tmp_path / "runs").exists()
    outcome = invoke("export", folder, "--format", "sparse")
    assert outcome.code == 0
    assert "MB before" in outcome.out
    assert "read back and equal" in outcome.out
    facts = invoke("export", folder, "--format", "gptq", "--json", "--output-dir", "out").json
    assert facts["output"] == "out"
    assert facts["source_bytes"] == (folder / WEIGHTS).stat().st_size > facts["model_bytes"]
    good = invoke("verify", "runs/small-sparse")
    assert (good.code, good.out.count("\n")) == (0, 1)
    assert "is intact" in good.out
    flip_a_bit(next((tmp_path / "runs/small-sparse").glob("sparse-*")))
    bad = invoke("verify", "runs/small-sparse")
    assert (bad.code, bad.out, len(bad.errors)) == (65, "", 1)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (66, ("verify", "nowhere")),
        (65, ("verify", ".")),
        (66, ("export", "./nowhere", "--format", "sparse")),
        (2, ("export", ".", "--format", "gguf")),
        (2, ("export", ".")),
        (65, ("export", "dense", "--format", "gptq")),
    ],
)
def test_errors_have_their_exit_codes(code, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(tiny_model(), tmp_path / "dense")
    assert invoke(*words).code == code
    assert not left_behind(tmp_path / "runs")
