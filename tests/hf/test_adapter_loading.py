"""Recovered models from folders: a base and its adapter, or one saved folder."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import perturbed_adapter
from recovered_models import (
    CONTEXTS,
    DOCUMENTS,
    GENERATING_ARMS,
    GREEDY,
    LAYER,
    NEW_TOKENS,
    gated_model,
    generate_tokens,
    labelled_batch,
    padded,
    save_base_and_adapter,
)
from safetensors.torch import load_file, save_file
from tiny_models import HIDDEN, saved, tiny_model, word_tokenizer
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, pipeline

from mopcompress.algorithms.solution import LowRankFactors
from mopcompress.errors import DataError, UsageError
from mopcompress.hf import MopConfig, MopForCausalLM
from mopcompress.hf.adapter_loading import parse_device_map
from mopcompress.models.model_loading import weights_hash
from mopcompress.models.repair import write_repairs
from mopcompress.recover.save_and_load import config_from_disk, save_adapter
from mopcompress.storage import artifacts


@pytest.mark.parametrize("arm", GENERATING_ARMS)
def test_every_arm_is_saved_in_one_folder_and_loaded_again(arm: str, tmp_path: Path) -> None:
    model = MopForCausalLM.from_pretrained(*save_base_and_adapter(arm, tmp_path))
    assert not model.training
    model.save_pretrained(tmp_path / "one")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert isinstance(loaded, MopForCausalLM)
    assert isinstance(AutoConfig.from_pretrained(tmp_path / "one"), MopConfig)
    assert loaded.config.adapter["arm"] == arm
    assert loaded.state_dict().keys() == model.state_dict().keys()
    batch = labelled_batch(DOCUMENTS, side="left")
    with torch.no_grad():
        expected = model(**batch).logits
        assert torch.equal(loaded(**batch).logits, expected)
        assert not torch.allclose(model.network(**batch).logits, expected, atol=1e-3)
    tokens, mask = padded(CONTEXTS)
    assert (
        generate_tokens(model, CONTEXTS)
        == generate_tokens(loaded, CONTEXTS)
        == generate_tokens(model, CONTEXTS, use_cache=False)
    )
    assert torch.equal(
        copy.deepcopy(model).generate(tokens, attention_mask=mask, **GREEDY)[:, -NEW_TOKENS:].flatten(),
        torch.tensor(generate_tokens(model, CONTEXTS)).flatten(),
    )


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "mixtral"])
def test_tied_and_stacked_weights_come_back(family: str, tmp_path: Path) -> None:
    model = MopForCausalLM.from_pretrained(*save_base_and_adapter("mop", tmp_path, family))
    model.save_pretrained(tmp_path / "one")
    loaded = MopForCausalLM.from_pretrained(tmp_path / "one")
    assert generate_tokens(model, CONTEXTS) == generate_tokens(loaded, CONTEXTS)
    tied = model.network.config.tie_word_embeddings
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied


def test_generation_with_the_oracle_raises(tmp_path: Path) -> None:
    model = MopForCausalLM.from_pretrained(*save_base_and_adapter("oracle", tmp_path))
    with pytest.raises(UsageError, match="needs the true task"):
        generate_tokens(model, CONTEXTS)


def test_a_repair_is_saved_and_loaded_too(tmp_path: Path) -> None:
    base = saved(tiny_model(), tmp_path / "base")
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(HIDDEN, 2, generator=generator), torch.randn(2, 48, generator=generator)
    write_repairs(base / "repair.safetensors", {"model.layers.2.mlp.down_proj": LowRankFactors(up, down)})
    with artifacts.publish(tmp_path / "adapter", {"kind": "adapter"}) as scratch:
        save_adapter(*perturbed_adapter("mop", tiny_model(), layer=LAYER, base_sha256=weights_hash(base)), scratch)
    model = MopForCausalLM.from_pretrained(base, tmp_path / "adapter")
    model.save_pretrained(tmp_path / "one")
    loaded = MopForCausalLM.from_pretrained(tmp_path / "one")
    batch = labelled_batch(DOCUMENTS, side="right")
    with torch.no_grad():
        expected = model(**batch).logits
        assert torch.equal(loaded(**batch).logits, expected)
        (tmp_path / "one" / "repair.safetensors").unlink()
        assert not torch.allclose(MopForCausalLM.from_pretrained(tmp_path / "one")(**batch).logits, expected)
    joined = MopForCausalLM.from_parts(model.language_model, model.adapter, config_from_disk(model.config.adapter))
    with pytest.raises(DataError, match="repair that would be lost"):
        joined.save_pretrained(tmp_path / "two")


def test_a_device_map_of_the_whole_model_names_its_device() -> None:
    meta = torch.device("meta")
    assert [parse_device_map(device) for device in ("meta", meta, {"": "meta"}, {"": meta}, None)] == [meta] * 4 + [
        None
    ]


def test_a_base_alone_raises(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="name its adapter"):
        MopForCausalLM.from_pretrained(saved(tiny_model(), tmp_path / "base"))


@pytest.mark.parametrize("device_map", ["cpu", torch.device("cpu"), {"": "cpu"}])
def test_dtype_and_device_are_those_of_transformers(device_map: Any, tmp_path: Path) -> None:
    folders = save_base_and_adapter("mop", tmp_path)
    model = MopForCausalLM.from_pretrained(*folders, dtype="bfloat16", device_map=device_map)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert len(generate_tokens(model, CONTEXTS)[0]) == NEW_TOKENS


def test_hub_arguments_reach_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, arguments = tmp_path / "one", {}
    MopForCausalLM.from_pretrained(*save_base_and_adapter("norms", tmp_path)).save_pretrained(folder)
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **kwargs: arguments.update(kwargs) or str(folder)
    )
    hub = {"revision": "v2", "cache_dir": str(tmp_path), "local_files_only": True}
    MopForCausalLM.from_pretrained("org/model", **hub, token=None)
    assert {name: value for name, value in arguments.items() if name != "allow_patterns"} == hub


@pytest.mark.parametrize("per_layer", [False, True])
def test_prompts_per_layer_load_in_half_precision_too(per_layer: bool, tmp_path: Path) -> None:
    folders, batch = (
        save_base_and_adapter("mop", tmp_path, per_layer_prompts=per_layer),
        labelled_batch(DOCUMENTS, side="left"),
    )
    half = MopForCausalLM.from_pretrained(*folders, dtype="bfloat16")
    full = MopForCausalLM.from_pretrained(*folders)
    with torch.no_grad():
        assert_close(half(**batch).logits.float(), full(**batch).logits, rtol=0.1, atol=0.5)


@pytest.mark.parametrize("arm", GENERATING_ARMS)
def test_a_model_in_half_precision_is_loaded_unchanged(arm: str, tmp_path: Path) -> None:
    """Positions are as exact as in fp32, as in transformers."""
    model = MopForCausalLM.from_pretrained(*save_base_and_adapter(arm, tmp_path), dtype="bfloat16")
    assert {buffer.dtype for name, buffer in model.named_buffers() if "inv_freq" in name} == {torch.float32}
    model.save_pretrained(tmp_path / "one")
    batch = labelled_batch(DOCUMENTS, side="left")
    full = MopForCausalLM.from_pretrained(tmp_path / "one", dtype="float32")
    assert {parameter.dtype for parameter in full.parameters()} == {torch.float32}
    with torch.no_grad():
        expected = model(**batch).logits
        assert_close(full(**batch).logits, expected.float(), rtol=0.1, atol=0.5)
        for dtype in (None, "auto", torch.bfloat16):
            loaded = MopForCausalLM.from_pretrained(tmp_path / "one", dtype=dtype)
            assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
            assert torch.equal(loaded(**batch).logits, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attn_implementation": "sdpa"}, "attn_implementation: adapters need"),
        ({"device": "cpu"}, "no argument 'device'"),
        ({"quantization_config": {}}, "no argument 'quantization_config'"),
        ({"device_map": "auto"}, "device_map 'auto' is not one device"),
        ({"device_map": {"": "cpu", "lm_head": "disk"}}, "is not one device"),
        ({"config": PretrainedConfig()}, "config: a base and its adapter bring their own"),
    ],
)
def test_arguments_without_effect_raise(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    base, adapter = save_base_and_adapter("norms", tmp_path)
    with pytest.raises(TypeError, match=message):
        MopForCausalLM.from_pretrained(base, adapter, **settings)


def test_arguments_of_auto_classes_and_pipelines_are_accepted(tmp_path: Path) -> None:
    MopForCausalLM.from_pretrained(*save_base_and_adapter("norms", tmp_path)).save_pretrained(tmp_path / "one")
    hub = {"cache_dir": str(tmp_path), "local_files_only": True, "token": None, "trust_remote_code": False}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype="bfloat16", **hub)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    word_tokenizer().save_pretrained(tmp_path / "one")
    piped = pipeline("text-generation", model=str(tmp_path / "one"), device="cpu", dtype=torch.float32)
    assert isinstance(piped.model, MopForCausalLM)


# --- names on disk


OLD_NAMES = {"prompt_log_weight": "log_opening", "layer_key_values": "deep", "patches": "changes"}


@pytest.mark.parametrize(
    ("arm", "changes", "first_parts"),
    [
        ("mop", {}, {"prompts", "log_opening", "gate"}),
        ("mop", {"per_layer_prompts": True}, {"deep", "log_opening", "gate"}),
        ("lora", {}, {"changes"}),
        ("norms", {}, {"changes"}),
        ("mop+", {}, {"norms", "linears", "gate"}),
    ],
)
def test_a_saved_folder_has_the_names_of_an_adapter_file(
    arm: str, changes: dict[str, Any], first_parts: set[str], tmp_path: Path
) -> None:
    """A state that the caller gives is written under the same names, and both load to the same model."""
    base, adapter = save_base_and_adapter(arm, tmp_path, **changes)
    model = MopForCausalLM.from_pretrained(base, adapter)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "given", state_dict=model.state_dict())
    on_disk = load_file(adapter / "adapter.safetensors")
    assert {name.partition(".")[0] for name in on_disk} == first_parts
    for folder in (tmp_path / "one", tmp_path / "given"):
        weights = load_file(folder / "model.safetensors")
        assert {name.removeprefix("adapter.") for name in weights if name.startswith("adapter.")} == set(on_disk)
        loaded = MopForCausalLM.from_pretrained(folder).state_dict()
        assert loaded.keys() == model.state_dict().keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_a_given_state_is_saved_in_place_of_the_models_own(tmp_path: Path) -> None:
    model = gated_model()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["adapter.prompt_log_weight"] += 1
    model.save_pretrained(tmp_path / "one", state_dict=state)
    loaded = MopForCausalLM.from_pretrained(tmp_path / "one").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_a_state_loads_under_its_names_on_disk_and_in_the_code(tmp_path: Path) -> None:
    """Trainer reads the files of a checkpoint and calls `load_state_dict` with them."""
    model = gated_model()
    model.save_pretrained(tmp_path / "one")
    for state in (model.state_dict(), load_file(tmp_path / "one" / "model.safetensors")):
        other = gated_model()
        with torch.no_grad():
            for parameter in other.adapter.parameters():
                parameter.zero_()
        assert not any(other.load_state_dict(dict(state), strict=False))
        assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def old_folder(folder: Path, base_sha256: str) -> dict[str, torch.Tensor]:
    """Write an adapter folder as the first versions did, field by field, and return its tensors."""
    generator = torch.Generator().manual_seed(0)
    config = {
        "arm": "mop",
        "experts": 2,
        "prompts_per_expert": 3,
        "layer": 3,
        "hidden_size": HIDDEN,
        "base_sha256": base_sha256,
        "tasks": ["add", "sort"],
        "gate_reading": "values",
        "shared_expert": True,
        "top_k": 1,
        "deep": True,
        "rank": None,
        "targets": None,
    }
    shapes: dict[str, tuple[int, ...]] = {
        "log_opening": (),
        "gate.mean": (HIDDEN,),
        "gate.inner.weight": (128, HIDDEN),
        "gate.inner.bias": (128,),
        "gate.outer.weight": (2, 128),
        "gate.outer.bias": (2,),
        "deep.keys.3": (2, 9, 8),
        "deep.values.3": (2, 9, 8),
    }
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors["gate.deviation"] = torch.ones(HIDDEN)
    with artifacts.publish(folder, {"kind": "adapter"}) as scratch:
        (scratch / "adapter.json").write_text(json.dumps(config))
        save_file(tensors, scratch / "adapter.safetensors")
    return tensors


def test_a_folder_with_the_old_names_loads(tmp_path: Path) -> None:
    base = saved(tiny_model(), tmp_path / "base")
    tensors = old_folder(tmp_path / "adapter", weights_hash(base))
    model = MopForCausalLM.from_pretrained(base, tmp_path / "adapter")
    config = config_from_disk(model.config.adapter)
    assert (config.gate_mode, config.per_layer_prompts, config.shared_expert, config.top_k) == ("values", True, True, 1)
    weighting = model.adapter.weighting
    assert (weighting.mode, weighting.shared, weighting.top_k) == ("values", True, 1)
    state = model.adapter.state_dict()
    assert len(state) == len(tensors)
    for name, tensor in tensors.items():
        first, dot, rest = name.partition(".")
        new_name = {old: new for new, old in OLD_NAMES.items()}.get(first, first) + dot + rest
        assert torch.equal(state[new_name], tensor), name
    model.save_pretrained(tmp_path / "one")
    stored = json.loads((tmp_path / "one" / "config.json").read_text())["adapter"]
    assert stored == json.loads((tmp_path / "adapter" / "adapter.json").read_text())
    assert generate_tokens(MopForCausalLM.from_pretrained(tmp_path / "one"), CONTEXTS) == generate_tokens(
        model, CONTEXTS
    )


def test_a_module_patch_with_the_old_names_loads(tmp_path: Path) -> None:
    base, adapter = save_base_and_adapter("ia3", tmp_path)
    scale = torch.linspace(0.5, 1.5, 16)
    name = "changes.model/layers/2/self_attn/k_proj.scale"
    tensors = load_file(adapter / "adapter.safetensors")
    assert tensors[name].shape == scale.shape
    with artifacts.publish(tmp_path / "old", {"kind": "adapter"}) as scratch:
        shutil.copy(adapter / "adapter.json", scratch)
        save_file(tensors | {name: scale}, scratch / "adapter.safetensors")
    model = MopForCausalLM.from_pretrained(base, tmp_path / "old")
    assert torch.equal(model.adapter.patches_by_name()["model.layers.2.self_attn.k_proj"].scale, scale)
