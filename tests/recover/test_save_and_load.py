"""Adapter folders: a round trip for every arm, and the names on disk, which stay as they were first written."""

import json

import pytest
import torch
from factories import adapter_config, perturbed_adapter, saved_and_loaded
from safetensors.torch import load_file
from tiny_models import tiny_model

from mopcompress.recover.registry import RECOVERY_METHODS
from mopcompress.recover.save_and_load import (
    adapter_bytes,
    config_from_disk,
    config_to_disk,
    read_config,
    save_adapter,
    tensors_from_disk,
    tensors_to_disk,
)


@pytest.mark.parametrize("arm", RECOVERY_METHODS)
def test_every_arm_is_loaded_as_it_was_saved(tmp_path, arm):
    model = tiny_model()
    adapter, config = perturbed_adapter(arm, model, base_sha256="base")
    loaded, loaded_config = saved_and_loaded(adapter, config, model, tmp_path / "adapter")
    assert config_to_disk(loaded_config) == json.loads(json.dumps(config_to_disk(config)))
    assert loaded.state_dict().keys() == adapter.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in adapter.state_dict().items())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_files_keep_their_first_names(tmp_path):
    adapter, config = perturbed_adapter("mop", tiny_model(), per_layer_prompts=True, gate_mode="values")
    save_adapter(adapter, config, tmp_path)
    fields = json.loads((tmp_path / "adapter.json").read_text())
    assert (fields["gate_reading"], fields["deep"]) == ("values", True)
    assert not {"gate_mode", "per_layer_prompts"} & fields.keys()
    tensors = load_file(tmp_path / "adapter.safetensors")
    first_parts = {name.partition(".")[0] for name in tensors}
    assert {"log_opening", "deep", "gate"} <= first_parts
    assert not {"prompt_log_weight", "layer_key_values"} & first_parts
    assert tensors_from_disk(tensors).keys() == adapter.state_dict().keys()
    assert adapter_bytes(tmp_path) == (tmp_path / "adapter.safetensors").stat().st_size


def test_only_the_first_part_of_a_tensors_name_changes():
    tensors = {"deep.prompt_log_weight": torch.zeros(1), "prompt_log_weight": torch.ones(1)}
    assert tensors_to_disk(tensors).keys() == {"deep.prompt_log_weight", "log_opening"}


def test_an_unknown_field_of_a_config_is_a_type_error():
    fields = config_to_disk(adapter_config("mop", tiny_model()))
    assert config_from_disk(fields) == adapter_config("mop", tiny_model())
    with pytest.raises(TypeError, match="another"):
        config_from_disk(fields | {"another": 1})


def test_a_config_is_read_without_its_weights_being_loaded(tmp_path):
    model = tiny_model()
    adapter, config = perturbed_adapter("lora", model, base_sha256="base")
    saved_and_loaded(adapter, config, model, tmp_path / "adapter")
    assert read_config(tmp_path / "adapter", base_sha256="base").arm == "lora"
