"""Every format against its documented formula, and every export against the folder that it was made of."""

import json
import math
import shutil

import pytest
import torch
from cli_runner import invoke, left_behind
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_folders import compressed_folder
from tiny_models import saved, tiny_model
from transformers import AutoModelForCausalLM

from mopcompress.entrypoints.export import export
from mopcompress.entrypoints.verify import verify
from mopcompress.errors import DataError, InputNotFoundError, OutputError, StorageError
from mopcompress.formats import LAYOUTS, compressed_tensors, gptq, sparse
from mopcompress.formats.model_reader import open_model
from mopcompress.formats.weight_format import plain
from mopcompress.models.meta_model import MetaModel, load_meta_model
from mopcompress.models.model_loading import load_model
from mopcompress.models.quantization_grid import FILE, QuantizationGrid, codes_of, read_grid
from mopcompress.storage import artifacts

WEIGHTS = "model.safetensors"
CPU = torch.device("cpu")
EXPORTS = [*LAYOUTS]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """4 bits in groups of 32, 85 % zeros. Copied before it is changed."""
    return compressed_folder(tmp_path_factory.mktemp("q") / "quantized", bits=4, sparsity=0.85)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    return compressed_folder(tmp_path_factory.mktemp("p") / "pruned", sparsity=0.85)


def tensors_of(folder):
    stored = open_model(folder)
    return {name: tensor for path in stored.files for name, tensor in stored.tensors(path)}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


class File:
    """Tensors and a header in memory, as a safetensors file gives them."""

    def __init__(self, encoded):
        self.tensors, self.header = dict(encoded.tensors), dict(encoded.header)

    def keys(self):
        return list(self.tensors)

    def get_tensor(self, name):
        return self.tensors[name]

    def metadata(self):
        return self.header


def number(words):
    """Words of 32 bits as one long number, the first word lowest."""
    return sum((word & 0xFFFFFFFF) << (32 * index) for index, word in enumerate(words))


def field(words, index, bits):
    return (number(words) >> (index * bits)) & (2**bits - 1)


def problem(bits, *, rows=32, columns=64, group_size=32, sparsity=0.0, dtype=torch.float16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    limit = 2 ** (bits - 1)
    codes = torch.randint(-limit, limit, (rows, columns), generator=generator).to(torch.int8)
    codes *= torch.rand(rows, columns, generator=generator) >= sparsity
    scales = (torch.rand(rows, columns // group_size, generator=generator) + 0.1).half()
    weight = (codes * scales.float().repeat_interleave(group_size, dim=1)).to(dtype)
    return codes, scales, weight, QuantizationGrid(bits=bits, group_size=group_size, scales={"a": scales})


# --- layouts, by their formulas


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_is_its_formula(bits):
    codes, scales, weight, grid = problem(bits)
    parts = gptq.encode("a.weight", weight, grid).tensors
    assert {name: (one.dtype, tuple(one.shape)) for name, one in parts.items()} == {
        "a.qweight": (torch.int32, (64 * bits // 32, 32)),
        "a.qzeros": (torch.int32, (2, 32 * bits // 32)),
        "a.scales": (torch.float16, (2, 32)),
        "a.g_idx": (torch.int32, (64,)),
    }
    zero = 2 ** (bits - 1)
    assert parts["a.g_idx"].tolist() == [0] * 32 + [1] * 32
    for row in range(32):
        for column in range(64):
            group = column // 32
            code = field(parts["a.qweight"][:, row].tolist(), column, bits)
            stored_zero = field(parts["a.qzeros"][group].tolist(), row, bits)
            assert stored_zero == zero - 1  # version 1 stores one less
            assert code - (stored_zero + 1) == codes[row, column]
    assert torch.equal(parts["a.scales"], scales.T)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [64, 96])
def test_compressed_tensors_is_its_formula(bits, columns):
    codes, scales, weight, grid = problem(bits, rows=5, columns=columns)
    parts = compressed_tensors.encode("a.weight", weight, grid).tensors
    assert parts["a.weight_packed"].dtype == torch.int32
    assert parts["a.weight_packed"].shape == (5, math.ceil(columns * bits / 32))
    assert parts["a.weight_shape"].dtype == torch.int64
    assert parts["a.weight_shape"].tolist() == [5, columns]
    assert torch.equal(parts["a.weight_scale"], scales)
    for row in range(5):
        fields = [field(parts["a.weight_packed"][row].tolist(), column, bits) for column in range(columns)]
        assert [one - 2 ** (bits - 1) for one in fields] == codes[row].tolist()


def sparse_slowly(parts, facts, bits):
    """The definition, place by place."""
    rows, columns = facts["shape"]
    if facts["places"] == "bitmask":
        places = [
            row * columns + column
            for row in range(rows)
            for column in range(columns)
            if parts["a.weight.bitmask"][row, column // 8] >> (column % 8) & 1
        ]
    elif facts["places"] == "gaps":
        escape, at, places = 2 ** facts["gap_bits"] - 1, 0, []
        for index in range(facts["steps"]):
            step = field(parts["a.weight.gaps"].tolist(), index, facts["gap_bits"])
            at += step
            if step != escape:
                places.append(at)
                at += 1
    else:
        places = list(range(rows * columns))
    weight = torch.zeros(rows * columns, dtype=getattr(torch, facts["dtype"]))
    for index, place in enumerate(places):
        if "a.weight.values" in parts:
            weight[place] = parts["a.weight.values"][index]
        else:
            code = field(parts["a.weight.codes"].tolist(), index, bits) - 2 ** (bits - 1)
            scales = parts["a.weight.scales"]
            group = place % columns * scales.shape[1] // columns
            weight[place] = code * scales[place // columns, group].float()
    return weight.view(rows, columns)


@pytest.mark.parametrize(
    ("sparsity", "on_grid", "places"),
    [
        (0.02, True, "all"),
        (0.5, True, "bitmask"),
        (0.95, True, "gaps"),
        (0.5, False, "bitmask"),
        (0.95, False, "gaps"),
    ],
)
@pytest.mark.parametrize("bits", [3, 4])
def test_the_container_is_its_definition(sparsity, on_grid, places, bits):
    _, _, weight, grid = problem(bits, sparsity=sparsity, columns=96)
    encoded = sparse.encode("a.weight", weight, grid if on_grid else None)
    facts = json.loads(encoded.header["a.weight"])
    assert facts["places"] == places
    assert torch.equal(sparse_slowly(encoded.tensors, facts, bits), weight)
    assert_same(dict(sparse.decode(File(encoded), bits)), {"a.weight": weight})


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.7, 0.85, 0.95, 1.0])
@pytest.mark.parametrize("on_grid", [True, False])
def test_the_container_takes_the_smallest_way(sparsity, on_grid):
    codes, scales, weight, grid = problem(4, rows=64, columns=256, sparsity=sparsity)
    encoded = sparse.encode("a.weight", weight, grid if on_grid else None)
    size = sum(one.nbytes for one in encoded.tensors.values())
    survivors = int((codes != 0).sum())
    value = 0.5 if on_grid else 2.0
    fixed = scales.nbytes if on_grid else 0
    all_places, bitmask = weight.numel() * value, weight.numel() / 8 + survivors * value
    gap_of_8_bits = survivors * (1 + value)
    assert size - fixed <= min(all_places, bitmask, gap_of_8_bits) + 8  # words are filled up


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_survivors_keep_every_bit(dtype):
    weight = torch.zeros(16, 96, dtype=dtype)
    weight[3, 4], weight[5, 6], weight[7, 8] = torch.finfo(dtype).tiny / 2, -0.0, torch.finfo(dtype).max
    encoded = sparse.encode("a.weight", weight, None)
    assert encoded.tensors["a.weight.values"].numel() == 3
    (found,) = (tensor for _, tensor in sparse.decode(File(encoded), 0))
    assert torch.equal(found.view(torch.uint8), weight.view(torch.uint8))


def test_tensors_of_other_kinds_stay_as_they_are():
    grid = problem(4)[3]
    for layout in LAYOUTS.values():
        for tensor in (torch.zeros(100).half(), torch.zeros(50, 50, dtype=torch.int64), torch.ones(50, 50).half()):
            for name in ("norm.weight", "a.bias", "a"):
                assert layout.encode(name, tensor, grid) == plain(name, tensor)


def test_a_stack_of_matrices_comes_back():
    weight = torch.zeros(3, 8, 64).half()
    weight[1, 2, 3] = weight[2, 7, 63] = 1.5
    encoded = sparse.encode("experts", weight, None)
    assert_same(dict(sparse.decode(File(encoded), 0)), {"experts": weight})


# --- whole folders


@pytest.mark.parametrize("format", EXPORTS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, None])
def test_an_export_holds_the_very_same_tensors(format, bits, group_size, tmp_path):
    folder = compressed_folder(tmp_path / "in", bits=bits, group_size=group_size, sparsity=0.5)
    facts = export(str(folder), format, tmp_path / "out")
    assert_same(tensors_of(tmp_path / "out"), load_file(folder / WEIGHTS))
    assert facts["tensors"].keys() == load_file(folder / WEIGHTS).keys()
    assert verify(tmp_path / "out")["tensors"] == len(facts["tensors"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", EXPORTS)
def test_an_export_keeps_the_dtype(format, dtype, tmp_path):
    folder = compressed_folder(tmp_path / "in", bits=4, sparsity=0.5, dtype=dtype)
    export(str(folder), format, tmp_path / "out")
    assert_same(tensors_of(tmp_path / "out"), load_file(folder / WEIGHTS))


@pytest.mark.parametrize("middle", EXPORTS)
@pytest.mark.parametrize("bits", [4, None])
def test_there_and_back_gives_the_same_files(middle, bits, tmp_path):
    if LAYOUTS[middle].needs_grid and bits is None:
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
        assert_same(after.scales, before.scales)
    facts = artifacts.read_manifest(tmp_path / "back")
    assert facts["dense_sha256"] == artifacts.fingerprint({WEIGHTS: artifacts.sha256_file(folder / WEIGHTS)})


@pytest.mark.parametrize("format", EXPORTS)
def test_all_other_files_are_copied_byte_for_byte(format, quantized, tmp_path):
    folder = shutil.copytree(quantized, tmp_path / "in")
    (folder / "chat_template.jinja").write_text("{{ messages }}  \n")
    (folder / "layers.jsonl").write_text("{}\n")
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    export(str(folder), format, tmp_path / "out")
    copied = {path.name for path in folder.iterdir()} - {WEIGHTS, FILE, "config.json", "pytorch_model.bin"}
    assert "tokenizer.json" in copied
    for name in copied:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    before, after = (json.loads((one / "config.json").read_text()) for one in (folder, tmp_path / "out"))
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


@pytest.mark.parametrize("format", EXPORTS)
def test_shards_stay_shards(format, quantized, tmp_path):
    folder = sharded(quantized, tmp_path)
    export(str(folder), format, tmp_path / "out")
    assert len(open_model(tmp_path / "out").files) == len(open_model(folder).files)
    assert_same(tensors_of(tmp_path / "out"), load_file(quantized / WEIGHTS))
    export(str(tmp_path / "out"), "dense", tmp_path / "back")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto").state_dict()
    assert_same(stock, AutoModelForCausalLM.from_pretrained(quantized, dtype="auto").state_dict())


@pytest.mark.parametrize("family", ["gpt2", "opt", "mixtral", "qwen3"])
@pytest.mark.parametrize("bits", [4, None])
def test_the_container_holds_every_family(family, bits, tmp_path):
    folder = compressed_folder(tmp_path / "in", family=family, bits=bits, group_size=16, sparsity=0.7)
    export(str(folder), "sparse", tmp_path / "out")
    assert_same(tensors_of(tmp_path / "out"), load_file(folder / WEIGHTS))
    if bits:
        with safe_open(next((tmp_path / "out").glob("sparse-*")), framework="pt") as file:
            assert any(name.endswith(".codes") for name in file.keys())  # noqa: SIM118


@pytest.mark.parametrize(
    ("group_size", "columns", "expected"),
    [(None, 384, 128), (384, 384, 128), (192, 384, 64), (128, 384, 128), (96, 384, 32), (32, 384, 32), (None, 96, 32)],
)
def test_gptq_takes_the_largest_group_that_loaders_know(group_size, columns, expected):
    linears = {"up": torch.nn.Linear(columns, 768), "down": torch.nn.Linear(768, 384)}
    scales = {
        name: torch.rand(one.out_features, one.in_features // (group_size or one.in_features)).half()
        for name, one in linears.items()
    }
    skeleton = MetaModel(linears=linears, transposed=frozenset(), blocks="blocks")
    fitted = gptq.fit(QuantizationGrid(bits=4, group_size=group_size, scales=scales), skeleton)
    assert fitted.group_size == expected
    for name, scale in scales.items():
        before = scale.repeat_interleave(linears[name].in_features // scale.shape[1], dim=1)
        assert torch.equal(fitted.scales[name].repeat_interleave(expected, dim=1), before)


def test_gptq_refuses_groups_that_loaders_do_not_know():
    linears = {"up": torch.nn.Linear(64, 96)}
    skeleton = MetaModel(linears=linears, transposed=frozenset(), blocks="blocks")
    with pytest.raises(DataError, match="none of these divides 16"):
        gptq.fit(QuantizationGrid(bits=4, group_size=16, scales={"up": torch.ones(96, 4).half()}), skeleton)
    linears["up"] = torch.nn.Linear(64, 20)
    with pytest.raises(DataError, match="20 outputs of up in 3 bits do not fill whole words"):
        gptq.fit(QuantizationGrid(bits=3, group_size=32, scales={"up": torch.ones(20, 2).half()}), skeleton)


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
def test_what_a_format_cannot_hold_is_refused_before_anything_is_written(format, changes, message, tmp_path):
    folder = compressed_folder(tmp_path / "in", **changes)
    with pytest.raises(DataError, match=message):
        export(str(folder), format, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_linears_that_were_left_out_are_named(tmp_path):
    folder = compressed_folder(tmp_path / "in", bits=4, skip="layers.1.mlp")
    out = {format: tmp_path / format for format in ("gptq", "compressed-tensors")}
    for format, target in out.items():
        export(str(folder), format, target)
        assert_same(tensors_of(target), load_file(folder / WEIGHTS))
    skipped = [f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")]
    settings = json.loads((out["compressed-tensors"] / "config.json").read_text())["quantization_config"]
    assert sorted(settings["ignore"]) == sorted([*skipped, "lm_head"])
    settings = json.loads((out["gptq"] / "config.json").read_text())["quantization_config"]
    assert settings == json.loads((out["gptq"] / "quantize_config.json").read_text())
    (listed,) = settings["modules_in_block_to_quantize"]
    linears = load_meta_model(folder).linears
    assert set(listed) == set(linears) - {*skipped, "lm_head"}
    assert len(settings["dynamic"]) == 3


def test_a_whole_model_needs_no_list_of_modules(quantized, tmp_path):
    export(str(quantized), "gptq", tmp_path / "out")
    settings = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert settings.keys().isdisjoint({"dynamic", "modules_in_block_to_quantize"})
    assert (settings["bits"], settings["group_size"], settings["sym"], settings["desc_act"]) == (4, 32, True, False)


def test_a_weight_off_its_grid_is_never_rounded(quantized, tmp_path):
    folder = shutil.copytree(quantized, tmp_path / "in")
    weights = load_file(folder / WEIGHTS)
    name = "model.layers.2.mlp.up_proj"
    weights[f"{name}.weight"][3] *= 1.5
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    for format in ("gptq", "compressed-tensors", "sparse"):
        with pytest.raises(DataError, match=rf"{name}: a weight does not lie on its grid"):
            export(str(folder), format, tmp_path / "out")
    assert not left_behind(tmp_path / "out")


def test_a_pruned_folder_is_never_rounded(pruned, tmp_path):
    export(str(pruned), "sparse", tmp_path / "out")
    with safe_open(next((tmp_path / "out").glob("sparse-*")), framework="pt") as file:
        assert not [name for name in file.keys() if name.endswith(".codes")]  # noqa: SIM118


# --- what must not pass


@pytest.mark.parametrize("format", EXPORTS)
def test_a_writer_that_errs_is_found_out_before_anything_is_published(format, quantized, tmp_path, monkeypatch):
    from mopcompress.formats import model_reader as module

    right = module.save_file

    def wrong(tensors, path, header):
        name = sorted(name for name in tensors if "layers.3" in name)[-1]
        spoilt = tensors[name].clone()
        spoilt.view(-1)[-1] += 1
        right({**tensors, name: spoilt}, path, header)

    monkeypatch.setattr(module, "save_file", wrong)
    with pytest.raises((StorageError, DataError)):
        export(str(quantized), format, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_same_export_again_is_done_already(quantized, tmp_path):
    folder = shutil.copytree(quantized, tmp_path / "in")
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


def test_an_export_inside_its_model_is_refused(quantized, tmp_path):
    folder = shutil.copytree(quantized, tmp_path / "in")
    with pytest.raises(OutputError, match="inside the model"):
        export(str(folder), "sparse", folder / "out")


def test_files_of_two_formats_are_refused(quantized, tmp_path):
    export(str(quantized), "sparse", tmp_path / "out")
    (path,) = (tmp_path / "out").glob("sparse-*")
    save_file({"x": torch.ones(1)}, path.with_name("sparse-other.safetensors"), {"mopcompress": "gptq"})
    with pytest.raises(DataError, match="in the formats gptq, sparse"):
        open_model(tmp_path / "out")


@pytest.mark.parametrize("format", ["sparse", "gptq", "compressed-tensors"])
def test_loading_an_export_as_a_dense_model_says_what_to_do(format, quantized, tmp_path):
    export(str(quantized), format, tmp_path / "out")
    with pytest.raises(DataError, match=r"mopcompress export .* --format dense"):
        load_model(tmp_path / "out", device=CPU)


# --- verify


def spoil(path, place=-1):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


def rehash(folder):
    """What someone does who changes a file and its hash."""
    manifest = json.loads((folder / artifacts.MANIFEST).read_text())
    manifest["files"] = {name: artifacts.sha256_file(folder / name) for name in manifest["files"]}
    (folder / artifacts.MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("format", EXPORTS)
def test_verify_finds_one_flipped_bit_even_under_a_new_hash(format, quantized, tmp_path):
    export(str(quantized), format, tmp_path / "out")
    path = open_model(tmp_path / "out").files[0]
    spoil(path)
    with pytest.raises(DataError, match="differs from its hash"):
        verify(tmp_path / "out")
    rehash(tmp_path / "out")
    with pytest.raises(DataError, match=r"is not what was exported|holds NaN|is damaged"):
        verify(tmp_path / "out")


def finished(folder, target):
    with artifacts.publish(target, {"kind": "compressed model"}) as scratch:
        shutil.copytree(folder, scratch, dirs_exist_ok=True)
    return target


def test_verify_looks_into_a_compressed_folder(quantized, tmp_path):
    folder = finished(quantized, tmp_path / "out")
    assert verify(folder)["tensors"] == len(load_file(quantized / WEIGHTS))
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
def test_verify_opens_what_it_hashed(damage, message, pruned, tmp_path):
    folder = finished(pruned, tmp_path / "out")
    damage(folder)
    rehash(folder)
    with pytest.raises(DataError, match=message):
        verify(folder)


def test_verify_looks_into_any_finished_folder(tmp_path):
    with artifacts.publish(tmp_path / "out", {"kind": "adapter"}) as scratch:
        save_file({"prompts": torch.ones(3), "bad": torch.ones(2)}, scratch / "adapter.safetensors")
    assert verify(tmp_path / "out") == {"folder": str(tmp_path / "out"), "kind": "adapter", "files": 1, "tensors": 2}
    save_file({"prompts": torch.full((3,), torch.inf)}, tmp_path / "out" / "adapter.safetensors")
    rehash(tmp_path / "out")
    with pytest.raises(DataError, match="prompts holds NaN or infinite"):
        verify(tmp_path / "out")


# --- commands


def test_the_commands_say_what_they_did(quantized, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(quantized, tmp_path / "small")
    planned = invoke("export", folder, "--format", "sparse", "--dry-run", "--json")
    assert planned.json["output"] == "runs/small-sparse"
    assert not (tmp_path / "runs").exists()
    outcome = invoke("export", folder, "--format", "sparse")
    assert outcome.code == 0
    assert "MB before" in outcome.out
    assert "read back and equal" in outcome.out
    told = invoke("export", folder, "--format", "gptq", "--json", "--output-dir", "out").json
    assert told["output"] == "out"
    assert told["source_bytes"] == (folder / WEIGHTS).stat().st_size > told["model_bytes"]
    good = invoke("verify", "runs/small-sparse")
    assert (good.code, good.out.count("\n")) == (0, 1)
    assert "is whole" in good.out
    spoil(next((tmp_path / "runs/small-sparse").glob("sparse-*")))
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
def test_the_commands_end_with_the_code_of_what_went_wrong(code, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(tiny_model(), tmp_path / "dense")
    assert invoke(*words).code == code
    assert not left_behind(tmp_path / "runs")


def test_codes_survive_every_format(tmp_path):
    folder = compressed_folder(tmp_path / "in", bits=3, sparsity=0.5)
    grid = read_grid(folder)
    expected = {
        name: codes_of(load_file(folder / WEIGHTS)[f"{name}.weight"], grid.scales[name], bits=3) for name in grid.scales
    }
    for format in EXPORTS:
        export(str(folder), format, tmp_path / format)
        stored = open_model(tmp_path / format)
        tensors = tensors_of(tmp_path / format)
        for name, codes in expected.items():
            assert torch.equal(stored.grid.codes(name, tensors[f"{name}.weight"]), codes)
