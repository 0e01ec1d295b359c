"""Export of adapters that PEFT has too, as `PeftModel.from_pretrained` loads them. Writing them needs no PEFT.

PEFT then computes the same as this package, as long as no text outgrows a sliding window: PEFT's prompts fall out of
the window, ours stay.
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
    """Convert an adapter to PEFT's prompt tuning."""
    assert isinstance(adapter, InputPrompt)
    settings = {
        "peft_type": "PROMPT_TUNING",
        "prompt_tuning_init": "RANDOM",
        "token_dim": model.hidden_size,
        "num_attention_heads": model.config.num_attention_heads,
    }
    return _prompt_learning(settings, adapter.prompts.detach(), model)


def trained_prefix(adapter: Adapter, model: LanguageModel) -> PeftAdapter:
    """Convert an adapter to PEFT's prefix tuning without projection.

    Raises `DataError` for model families where PEFT's prefixes differ from ours.
    """
    assert isinstance(adapter, TrainedPrefix)
    keys, values = ({layer: tensor.detach() for layer, tensor in tensors.items()} for tensors in adapter.prefix())
    shapes = {tuple(tensor.shape) for tensor in (*keys.values(), *values.values())}
    if len(keys) < len(model.blocks) or len(shapes) > 1:
        raise DataError(
            f"PEFT's prefixes have keys and values of one shape in every layer; {type(model.network).__name__} here "
            f"has {len(keys)} layers of {len(model.blocks)} in {len(shapes)} shapes; use the adapter with mopcompress"
        )
    heads, tokens, size = shapes.pop()
    moved = shift_keys(model, keys, tokens)  # PEFT's text begins at position `tokens`, ours at 0
    pairs = [tensor for layer in sorted(keys) for tensor in (moved[layer], values[layer])]
    settings = {
        "peft_type": "PREFIX_TUNING",
        "prefix_projection": False,
        "encoder_hidden_size": heads * size,
        "token_dim": heads * size,
        "num_attention_heads": heads,
    }
    return _prompt_learning(settings, torch.stack(pairs).permute(2, 0, 1, 3).flatten(1), model)


def low_rank(adapter: Adapter, model: LanguageModel) -> PeftAdapter:
    """Convert an adapter to PEFT's LoRA, with a scale alpha / r of 1."""
    assert isinstance(adapter, PatchedModules)
    tensors: dict[str, Tensor] = {}
    rank = 0
    for name, patch in adapter.patches_by_name().items():
        assert isinstance(patch, LoRAUpdate)
        rank = len(patch.down)
        tensors |= {f"{name}.lora_A.weight": patch.down, f"{name}.lora_B.weight": patch.up}
    return _patched_linears({"peft_type": "LORA", "r": rank, "lora_alpha": rank}, tensors, adapter, model)


def scaled(adapter: Adapter, model: LanguageModel) -> PeftAdapter:
    """Convert an adapter to PEFT's (IA)^3: a row vector scales inputs, a column vector scales outputs."""
    assert isinstance(adapter, PatchedModules)
    tensors: dict[str, Tensor] = {}
    scaling_inputs: list[str] = []
    for name, patch in adapter.patches_by_name().items():
        assert isinstance(patch, IA3Scale)
        tensors[f"{name}.ia3_l"] = patch.scale[None] if patch.scales_inputs else patch.scale[:, None]
        scaling_inputs += [name] if patch.scales_inputs else []
    return _patched_linears({"peft_type": "IA3", "feedforward_modules": scaling_inputs}, tensors, adapter, model)


FORMATS: dict[str, Callable[[Adapter, LanguageModel], PeftAdapter]] = {
    "input": input_prompt,
    "prefix": trained_prefix,
    "lora": low_rank,
    "eora": low_rank,
    "ia3": scaled,
}


def write_peft(adapter: Adapter, config: AdapterConfig, model: LanguageModel, base: str, folder: Path) -> None:
    """Write an adapter into `folder` in PEFT's format; `base` is the folder or name under which PEFT finds the model.

    Raises `DataError` for an arm that PEFT lacks or defines otherwise, and for a model with a low-rank repair, which
    PEFT would not load.
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
    """Raise `DataError` for an arm that PEFT lacks."""
    if arm not in FORMATS:
        raise DataError(f"arm {arm}: PEFT has no such adapter, only {', '.join(FORMATS)}; use it with mopcompress")


@torch.no_grad()
def shift_keys(model: LanguageModel, keys: TensorsByLayer, shift: int) -> TensorsByLayer:
    """Return keys, [kv_heads, prompts, head] per layer, with rotary positions that are `shift` positions later.

    Raises `DataError` when that fails on keys that the model itself computes at both positions.
    """
    model.require_rotary()
    rotary = next(module for name, module in model.network.named_modules() if name.endswith("rotary_emb"))
    noise = torch.randn(1, 4, model.hidden_size, generator=torch.Generator().manual_seed(0)).to(model.device)
    try:
        cosines, sines = rotary(noise, torch.tensor([[shift]], device=model.device))
    except TypeError as error:  # a family with several kinds of positions
        raise _unmovable_error(model) from error
    scale = getattr(rotary, "attention_scaling", 1.0)  # keys are scaled already
    angles = cosines[0, 0] / scale, sines[0, 0] / scale
    original, _ = record_prompt_kv(model, noise, 0)
    shifted, _ = record_prompt_kv(model, noise, 0, first_position=shift)
    if not all(torch.allclose(_rotate(original[layer], *angles), shifted[layer], 1e-3, 1e-3) for layer in original):
        raise _unmovable_error(model)
    return {layer: _rotate(key, *angles) for layer, key in keys.items()}


def _rotate(
    keys: Float[Tensor, "kv_heads prompts head"], cosines: Float[Tensor, " rotary"], sines: Float[Tensor, " rotary"]
) -> Float[Tensor, "kv_heads prompts head"]:
    """Rotate the first dimensions, whose two halves are pairs (Su et al., 2104.09864, as most families store it)."""
    first, second = keys[..., : len(cosines)].chunk(2, dim=-1)
    rotated = keys[..., : len(cosines)] * cosines + torch.cat([-second, first], dim=-1) * sines
    return torch.cat([rotated, keys[..., len(cosines) :]], dim=-1)


def _unmovable_error(model: LanguageModel) -> DataError:
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


def _patched_linears(
    settings: dict[str, Any], tensors: dict[str, Tensor], adapter: PatchedModules, model: LanguageModel
) -> PeftAdapter:
    names = list(adapter.patches_by_name())  # whole names: by their ends PEFT would match linears below the layer too
    transposed = any(isinstance(model.network.get_submodule(name), Conv1D) for name in names)
    targets = {"target_modules": names, "fan_in_fan_out": transposed}
    prefixed = {f"base_model.model.{name}": tensor.detach() for name, tensor in tensors.items()}
    return PeftAdapter({**settings, **targets}, prefixed)
