"""Keys and values of prompts by layer: recorded from the network, or trained in each layer by themselves.

Trained ones are per-layer prompts, in place of states that flow on: Li and Liang, 2101.00190, without the paper's
reparametrisation by an MLP, as PEFT's prefix tuning without projection.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mopcompress.models.attention import record_kv
from mopcompress.models.language_model import LanguageModel

TensorsByLayer = dict[int, Tensor]  # [kv_heads, prompts, head], of which only prompts are equal in all layers


class LearnedKeyValues(nn.Module):
    """Trained keys and values per layer, [kv_heads, prompts, head] each; keys are already position-encoded."""

    def __init__(self, keys: Mapping[int, Tensor], values: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.keys = nn.ParameterDict({str(layer): key.detach().clone() for layer, key in keys.items()})
        self.values = nn.ParameterDict({str(layer): value.detach().clone() for layer, value in values.items()})

    def forward(self) -> tuple[TensorsByLayer, TensorsByLayer]:
        """Return keys and values by layer."""
        return _by_layer(self.keys), _by_layer(self.values)


def record_prompt_kv(
    model: LanguageModel, groups: Float[Tensor, "groups prompts hidden"], layer: int, *, first_position: int = 0
) -> tuple[TensorsByLayer, TensorsByLayer]:
    """Run prompts from `layer` up and return their keys and values, the groups one after the other.

    No group sees another, and each begins at `first_position`. Raises `DataError` for families without prompt
    attention.
    """
    model.require_prompt_attention()
    with record_kv() as recorded:
        model.run_upper(groups, layer, first_position=first_position)
    keys = {layer: key.transpose(0, 1).flatten(1, 2) for layer, (key, _) in recorded.items()}
    values = {layer: value.transpose(0, 1).flatten(1, 2) for layer, (_, value) in recorded.items()}
    return keys, values


@torch.no_grad()
def zero_prompt_kv(model: LanguageModel, layer: int, prompts: int) -> tuple[TensorsByLayer, TensorsByLayer]:
    """Return zeros in the shapes of the keys and values of `prompts` prompts, for each layer from `layer` up."""
    prompt = torch.zeros(1, 1, model.hidden_size, device=model.device, dtype=model.network.dtype)
    keys, values = record_prompt_kv(model, prompt, layer)
    return _zeros(keys, prompts), _zeros(values, prompts)


def _by_layer(parameters: nn.ParameterDict) -> TensorsByLayer:
    return {int(layer): tensor for layer, tensor in parameters.items()}


def _zeros(tensors: TensorsByLayer, prompts: int) -> TensorsByLayer:
    return {layer: tensor.new_zeros(tensor.shape[0], prompts, tensor.shape[2]) for layer, tensor in tensors.items()}
