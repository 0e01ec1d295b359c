"""Adapters that PEFT has too, as `PeftModel.from_pretrained` loads them; PEFT itself is not needed to write them.

What PEFT computes then is what this package computes, as long as no text outgrows a sliding window: PEFT's prompts
fall out of it, ours stay.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from mopcompress.errors import DataError
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.repair import repair_of
from mopcompress.models.weight_files import REPAIR
from mopcompress.recover.adapter import Adapter, AdapterConfig
from mopcompress.recover.methods.ia3 import IA3Scale
from mopcompress.recover.methods.lora import LoRAUpdate
from mopcompress.recover.methods.module_patches import PatchedModules
from mopcompress.recover.methods.prefix_tuning import TrainedPrefix
from mopcompress.recover.methods.prompt_kv import TensorsByLayer, record_prompt_kv
from mopcompress.recover.methods.prompt_tuning import InputPrompt

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class PeftAdapter:
    """The two files of a PEFT adapter: its settings, and its tensors under PEFT's names."""

    settings: dict[str, Any]
    tensors: dict[str, Tensor]


def input_prompt(adapter: Adapter, model: LanguageModel) -> PeftAdapter:
    """Prompt tuning."""
    assert isinstance(adapter, InputPrompt)
    settings = {
        "peft_type": "PROMPT_TUNING",
        "prompt_tuning_init": "RANDOM",
        "token_dim": model.hidden_size,
        "num_attention_heads": model.config.num_attention_heads,
    }
    return _prompt_learning(settings, adapter.prompts.detach(), model)


def trained_prefix(adapter: Adapter, model: LanguageModel) -> PeftAdapter:
    """Prefix tuning without projection. Raises `DataError` for families where PEFT's differs from ours."""
    assert isinstance(adapter, TrainedPrefix)
    keys, values = ({layer: one.detach() for layer, one in some.items()} for some in adapter.prefix())
    shapes = {tuple(one.shape) for one in (*keys.values(), *values.values())}
    if len(keys) < len(model.blocks) or len(shapes) > 1:
        raise DataError(
            f"PEFT's prefixes have keys and values of one shape in every layer; {type(model.network).__name__} here "
            f"has {len(keys)} layers of {len(model.blocks)} in {len(shapes)} shapes; use the adapter with mopcompress"
        )
    heads, tokens, size = shapes.pop()
    moved = moved_keys(model, keys, tokens)  # PEFT's text begins at position P, ours at 0
    pairs = [one for layer in sorted(keys) for one in (moved[layer], values[layer])]
    settings = {
        "peft_type": "PREFIX_TUNING",
        "prefix_projection": False,
        "encoder_hidden_size": heads * size,
        "token_dim": heads * size,
        "num_attention_heads": heads,
    }
    return _prompt_learning(settings, torch.stack(pairs).permute(2, 0, 1, 3).flatten(1), model)


def low_rank(adapter: Adapter, model: LanguageModel) -> PeftAdapter:
    """LoRA; its scale alpha / r is 1."""
    assert isinstance(adapter, PatchedModules)
    tensors: dict[str, Tensor] = {}
    rank = 0
    for name, change in adapter.patches_by_name().items():
        assert isinstance(change, LoRAUpdate)
        rank = len(change.down)
        tensors |= {f"{name}.lora_A.weight": change.down, f"{name}.lora_B.weight": change.up}
    return _changed_linears({"peft_type": "LORA", "r": rank, "lora_alpha": rank}, tensors, adapter, model)


def scaled(adapter: Adapter, model: LanguageModel) -> PeftAdapter:
    """(IA)^3: a row where inputs are scaled, a column where outputs are."""
    assert isinstance(adapter, PatchedModules)
    tensors: dict[str, Tensor] = {}
    of_inputs: list[str] = []
    for name, change in adapter.patches_by_name().items():
        assert isinstance(change, IA3Scale)
        tensors[f"{name}.ia3_l"] = change.scale[None] if change.scales_inputs else change.scale[:, None]
        of_inputs += [name] if change.scales_inputs else []
    return _changed_linears({"peft_type": "IA3", "feedforward_modules": of_inputs}, tensors, adapter, model)


FORMATS: dict[str, Callable[[Adapter, LanguageModel], PeftAdapter]] = {
    "input": input_prompt,
    "prefix": trained_prefix,
    "lora": low_rank,
    "eora": low_rank,
    "ia3": scaled,
}


def write_peft(adapter: Adapter, config: AdapterConfig, model: LanguageModel, base: str, folder: Path) -> None:
    """Write an adapter into `folder` as PEFT would; `base` is where PEFT's users find the model.

    Raises `DataError` for an arm that PEFT does not have, or has otherwise, and for a model with a repair, which PEFT
    would load without it.
    """
    check_arm(config.arm)
    if any(repair_of(module) is not None for module in model.network.modules()):
        raise DataError(
            f"model {base} has a low-rank repair ({REPAIR}), which PEFT would load it without; use the adapter with "
            "mopcompress"
        )
    files = FORMATS[config.arm](adapter, model)
    common = {"task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True}
    settings = json.dumps({**common, **files.settings}, indent=2, sort_keys=True)
    (folder / CONFIG).write_text(settings + "\n", encoding="utf-8")
    tensors = {name: tensor.contiguous().cpu() for name, tensor in files.tensors.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def check_arm(arm: str) -> None:
    """Raise `DataError` when PEFT has no such arm."""
    if arm not in FORMATS:
        raise DataError(f"arm {arm}: PEFT has no such adapter, only {', '.join(FORMATS)}; use it with mopcompress")


@torch.no_grad()
def moved_keys(model: LanguageModel, keys: TensorsByLayer, by: int) -> TensorsByLayer:
    """Keys with rotary positions as if they stood `by` positions later.

    Tried on keys that the model itself makes at both places; raises `DataError` when those do not agree.
    """
    model.require_rotary()
    rotary = next(module for name, module in model.network.named_modules() if name.endswith("rotary_emb"))
    noise = torch.randn(1, 4, model.hidden_size, generator=torch.Generator().manual_seed(0)).to(model.device)
    try:
        cosines, sines = rotary(noise, torch.tensor([[by]], device=model.device))
    except TypeError as error:  # a family with several kinds of positions
        raise _not_movable(model) from error
    scale = getattr(rotary, "attention_scaling", 1.0)  # keys have it already
    angles = cosines[0, 0] / scale, sines[0, 0] / scale
    here, _ = record_prompt_kv(model, noise, 0)
    there, _ = record_prompt_kv(model, noise, 0, first_position=by)
    if not all(torch.allclose(_turned(here[layer], *angles), there[layer], 1e-3, 1e-3) for layer in here):
        raise _not_movable(model)
    return {layer: _turned(key, *angles) for layer, key in keys.items()}


def _turned(
    keys: Float[Tensor, "kv_heads prompts head"], cosines: Float[Tensor, " turned"], sines: Float[Tensor, " turned"]
) -> Float[Tensor, "kv_heads prompts head"]:
    """Rotate the first dimensions, halves of which are pairs (Su et al., 2104.09864, as most families store it)."""
    first, second = keys[..., : len(cosines)].chunk(2, dim=-1)
    turned = keys[..., : len(cosines)] * cosines + torch.cat([-second, first], dim=-1) * sines
    return torch.cat([turned, keys[..., len(cosines) :]], dim=-1)


def _not_movable(model: LanguageModel) -> DataError:
    return DataError(
        f"{type(model.network).__name__} has positions that PEFT's prefixes cannot be moved to; use the adapter with "
        "mopcompress"
    )


def _prompt_learning(settings: dict[str, Any], embeddings: Tensor, model: LanguageModel) -> PeftAdapter:
    counts = {
        "num_virtual_tokens": len(embeddings),
        "num_layers": len(model.blocks),
        "num_transformer_submodules": 1,
    }
    return PeftAdapter({**settings, **counts}, {"prompt_embeddings": embeddings})


def _changed_linears(
    settings: dict[str, Any], tensors: dict[str, Tensor], adapter: PatchedModules, model: LanguageModel
) -> PeftAdapter:
    names = list(adapter.patches_by_name())  # whole ones: by their ends PEFT would find linears below the layer too
    transposed = any(isinstance(model.network.get_submodule(name), Conv1D) for name in names)
    found = {"target_modules": names, "fan_in_fan_out": transposed}
    held = {f"base_model.model.{name}": tensor.detach() for name, tensor in tensors.items()}
    return PeftAdapter({**settings, **found}, held)
