"""Deep prompts: keys and values of their own in every layer, in place of states that flow on.

Li and Liang, 2101.00190, without the paper's reparametrisation by an MLP: PEFT's prefix tuning without projection.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mopcompress.models.attention import record_kv
from mopcompress.models.language_model import LanguageModel

TensorsByLayer = dict[int, Tensor]  # [kv_heads, prompts, head], of which only prompts are equal in all layers


class LearnedKeyValues(nn.Module):
    """What text attends to, trained layer by layer; keys as they are after position encoding."""

    def __init__(self, keys: Mapping[int, Tensor], values: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.keys = nn.ParameterDict({str(layer): key.detach().clone() for layer, key in keys.items()})
        self.values = nn.ParameterDict({str(layer): value.detach().clone() for layer, value in values.items()})

    def forward(self) -> tuple[TensorsByLayer, TensorsByLayer]:
        """Keys and values by layer."""
        return _by_layer(self.keys), _by_layer(self.values)


def record_prompt_kv(
    model: LanguageModel, groups: Float[Tensor, "groups prompts hidden"], layer: int, *, first_position: int = 0
) -> tuple[TensorsByLayer, TensorsByLayer]:
    """Keys and values of prompts that enter `layer`, the groups one after the other; no group sees another.

    Every group begins at `first_position`. Raises `DataError` for some families.
    """
    model.require_prompt_attention()
    with record_kv() as seen:
        model.run_upper(groups, layer, first_position=first_position)
    keys = {layer: key.transpose(0, 1).flatten(1, 2) for layer, (key, _) in seen.items()}
    values = {layer: value.transpose(0, 1).flatten(1, 2) for layer, (_, value) in seen.items()}
    return keys, values


@torch.no_grad()
def zero_prompt_kv(model: LanguageModel, layer: int, prompts: int) -> tuple[TensorsByLayer, TensorsByLayer]:
    """Zeros in the shapes of `prompts` keys and values, of each layer from `layer` on."""
    one = torch.zeros(1, 1, model.hidden_size, device=model.device, dtype=model.network.dtype)
    keys, values = record_prompt_kv(model, one, layer)
    return _zeros(keys, prompts), _zeros(values, prompts)


def _by_layer(stored: nn.ParameterDict) -> TensorsByLayer:
    return {int(layer): tensor for layer, tensor in stored.items()}


def _zeros(tensors: TensorsByLayer, prompts: int) -> TensorsByLayer:
    return {layer: one.new_zeros(one.shape[0], prompts, one.shape[2]) for layer, one in tensors.items()}
