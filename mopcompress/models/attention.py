"""The attention function through which prompts reach every attention layer of nearly every decoder family.

transformers calls a registered attention function *after* position encoding and *after* the KV cache. Ours attends to
extra keys and values, scaled by a gate, when a `Prefix` is active; otherwise it equals `sdpa` to the bit. So there is
no per-family code and no hook, the positions of the text never move, and the KV cache never holds a prompt.

A gate can weight a prompt in two ways, from which `recover/methods/expert_weights.py` builds three gate modes. It can
be a bias on the prompt's logits, ``softmax(s_ij + b_j)`` with ``b = 0`` for text, or a factor on its value. At
``b = -inf`` a prompt is exactly absent; at ``b = 0`` and factor 1 it is an ordinary prompt.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from mopcompress.errors import DataError

NAME = "mopcompress"

Network = TypeVar("Network")

# arguments of some families' attention that `sdpa` either rejects or silently ignores
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")


@dataclass(frozen=True)
class Prefix:
    """Keys and values of all prompts by layer (`layer_idx`), and the weight of each prompt in each example."""

    keys: dict[int, Float[Tensor, "kv_heads prompts head"]]
    values: dict[int, Float[Tensor, "kv_heads prompts value_head"]]
    log_gate: Float[Tensor, "batch prompts"]  # added to the prompts' logits
    value_gate: Float[Tensor, "batch prompts"] | None = None  # factor on the prompts' values; None: 1
    separate: int = 0  # number of equal groups of prompts with a softmax of their own; 0: all share the text's


AttentionWeights = dict[int, Float[Tensor, "batch time prompts"]]
Recording = dict[int, tuple[Float[Tensor, "batch kv_heads time head"], Float[Tensor, "batch kv_heads time value_head"]]]

_prefix: ContextVar[Prefix | None] = ContextVar("prefix", default=None)
_recording: ContextVar[Recording | None] = ContextVar("recording", default=None)
_attention_weights: ContextVar[AttentionWeights | None] = ContextVar("attention_weights", default=None)


@contextmanager
def attend_to(prefix: Prefix) -> Iterator[None]:
    """Let every layer that has prompts in `prefix` attend to them too, inside the `with` block."""
    token = _prefix.set(prefix)
    try:
        yield
    finally:
        _prefix.reset(token)


@contextmanager
def record_kv() -> Iterator[Recording]:
    """Record the keys and values that every layer attends to, with their gradients, inside the `with` block."""
    recording: Recording = {}
    token = _recording.set(recording)
    try:
        yield recording
    finally:
        _recording.reset(token)


@contextmanager
def record_attention() -> Iterator[AttentionWeights]:
    """Record the attention weight of each prompt at each position, the mean over heads, inside the `with` block."""
    weights: AttentionWeights = {}
    token = _attention_weights.set(weights)
    try:
        yield weights
    finally:
        _attention_weights.reset(token)


def make_with_attention(make: Callable[..., Network]) -> Network:
    """Call `make(attn_implementation=...)` with ours, or without it for families whose attention cannot be exchanged.

    Some of those families reject another name; others take it and only leave out the mask that their own code needs.
    """
    try:
        result = make(attn_implementation=NAME)
    except KeyError as error:
        if error.args != (NAME,):
            raise
        return make()
    network: Any = result[0] if isinstance(result, tuple) else result
    return result if network._can_set_attn_implementation() else make()


def prompted_attention(
    module: nn.Module,
    query: Float[Tensor, "batch heads time head"],
    key: Float[Tensor, "batch kv_heads keys head"],
    value: Float[Tensor, "batch kv_heads keys value_head"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch time heads value_head"], None]:
    """Attend to the text and to the prompts of the active `Prefix`, if any.

    Raises `DataError` when the family passes its attention more than keys, values and a mask.
    """
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise DataError(
                f"{type(module).__name__} needs {name}, which is not supported; use a model of another family"
            )
    layer: int = module.layer_idx  # type: ignore[assignment]
    recording, prefix = _recording.get(), _prefix.get()
    if recording is not None:
        recording[layer] = (key, value)
    if prefix is None or layer not in prefix.keys:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    scaled = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if prefix.separate:
        text, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return text + _attend_separately(scaled, prefix, layer).transpose(1, 2), None
    if query.shape[2] == 1:
        return _attend_one_query(scaled, key, value, attention_mask, prefix, layer).transpose(1, 2), None
    text_bias = _text_bias(attention_mask, query.shape[2], key)
    return _attend_together(scaled, key, value, text_bias, prefix, layer).transpose(1, 2).contiguous(), None


def _attend_together(
    query: Float[Tensor, "batch heads time head"],
    key: Float[Tensor, "batch kv_heads keys head"],
    value: Float[Tensor, "batch kv_heads keys value_head"],
    text_bias: Float[Tensor, "b 1 t keys"],
    prefix: Prefix,
    layer: int,
) -> Float[Tensor, "batch heads time value_head"]:
    """Attend with one softmax over prompts and text."""
    batch, heads, time, head = query.shape
    prompts = prefix.log_gate.shape[1]
    log_gate = _gate_per_example(prefix.log_gate, batch)
    prompt_bias = log_gate[:, None, None, :].expand(-1, -1, time, -1)
    bias = torch.cat([prompt_bias, text_bias.expand(batch, 1, time, -1)], dim=-1)
    keys = torch.cat([prefix.keys[layer].expand(batch, -1, -1, -1), key], dim=2)
    values = torch.cat([_gated_values(prefix, layer, batch), value], dim=2)
    # the query heads that share a key head are more rows of one product, so keys are never repeated
    scores = query.reshape(batch, keys.shape[1], -1, head) @ keys.transpose(2, 3)
    scores = scores.view(batch, keys.shape[1], -1, time, keys.shape[2]) + bias[:, :, None]
    weights = scores.softmax(-1)
    if (recorded := _attention_weights.get()) is not None:
        recorded[layer] = weights[..., :prompts].mean((1, 2))
    attended = weights.view(batch, keys.shape[1], -1, keys.shape[2]) @ values
    return attended.view(batch, heads, time, -1)


def _attend_one_query(
    query: Float[Tensor, "batch heads 1 head"],
    key: Float[Tensor, "batch kv_heads keys head"],
    value: Float[Tensor, "batch kv_heads keys value_head"],
    mask: Tensor | None,
    prefix: Prefix,
    layer: int,
) -> Float[Tensor, "batch heads 1 value_head"]:
    """Attend with one softmax for the single query of a generation step, without copying keys and values.

    Copying them would cost the most. A step is so short that every operation counts: few of them, and none for a
    mask that is absent.
    """
    batch, heads, _, head = query.shape
    kv_heads, prompts = key.shape[1], prefix.log_gate.shape[1]
    # the query heads that share a key head are more rows of one product, so keys are never repeated
    rows = query.reshape(batch * kv_heads, -1, head)
    text_logits = torch.bmm(rows, key.flatten(0, 1).transpose(1, 2))
    if mask is not None:
        text_logits = text_logits + _text_bias(mask, 1, key).expand(batch, kv_heads, 1, -1).flatten(0, 1)
    # examples share all prompts, so they are more rows of one product too
    log_gate = _gate_per_example(prefix.log_gate, batch)[:, None].expand(-1, rows.shape[1], -1).flatten(0, 1)
    prompt_logits = torch.baddbmm(log_gate[None], _group_by_head(rows, batch), prefix.keys[layer].transpose(1, 2))
    weights = torch.cat([_group_by_example(prompt_logits, batch), text_logits], dim=-1).softmax(-1)
    prompt_weights, text_weights = weights.split([prompts, key.shape[2]], dim=-1)
    if (recorded := _attention_weights.get()) is not None:
        recorded[layer] = prompt_weights.unflatten(0, (batch, -1)).mean((1, 2))[:, None]
    if prefix.value_gate is not None:
        factors = _gate_per_example(prefix.value_gate, batch).repeat_interleave(kv_heads, dim=0)
        prompt_weights = prompt_weights * factors[:, None]
    from_prompts = torch.bmm(_group_by_head(prompt_weights, batch), prefix.values[layer])
    attended = torch.baddbmm(_group_by_example(from_prompts, batch), text_weights, value.flatten(0, 1))
    return attended.view(batch, heads, 1, -1)


def _group_by_head(
    rows: Float[Tensor, "batch_x_heads rows inner"], batch: int
) -> Float[Tensor, "kv_heads batch_x_rows inner"]:
    """Put all examples' rows of a key head together, for one product with the prompts that the examples share."""
    return rows if batch == 1 else rows.unflatten(0, (batch, -1)).transpose(0, 1).flatten(1, 2)


def _group_by_example(
    rows: Float[Tensor, "kv_heads batch_x_rows outer"], batch: int
) -> Float[Tensor, "batch_x_heads rows outer"]:
    """Put the rows of an example together again: the inverse of `_group_by_head`."""
    return rows if batch == 1 else rows.unflatten(1, (batch, -1)).transpose(0, 1).flatten(0, 1)


def _attend_separately(
    query: Float[Tensor, "batch heads time head"], prefix: Prefix, layer: int
) -> Float[Tensor, "batch heads time value_head"]:
    """Return the sum over groups of each group's own attention, to be added to the text's."""
    batch, heads, time, head = query.shape
    keys, values = prefix.keys[layer], _gated_values(prefix, layer, batch)
    rows = query.reshape(batch, len(keys), -1, head)
    scores = rows @ keys.transpose(1, 2) + _gate_per_example(prefix.log_gate, batch)[:, None, None]
    weights = scores.unflatten(-1, (prefix.separate, -1)).softmax(-1).flatten(-2)
    return (weights @ values).view(batch, heads, time, -1)


def _gated_values(prefix: Prefix, layer: int, batch: int) -> Float[Tensor, "batch kv_heads prompts value_head"]:
    values = prefix.values[layer].expand(batch, -1, -1, -1)
    return (
        values if prefix.value_gate is None else values * _gate_per_example(prefix.value_gate, batch)[:, None, :, None]
    )


def _gate_per_example(gate: Float[Tensor, "examples prompts"], batch: int) -> Float[Tensor, "batch prompts"]:
    """Return one gate per row of the batch; beam search repeats each example next to itself."""
    return gate if len(gate) == batch else gate.repeat_interleave(batch // len(gate), dim=0)


def _text_bias(mask: Tensor | None, time: int, key: Tensor) -> Float[Tensor, "b 1 t keys"]:
    """Return the bias that the text's own mask adds to the logits.

    As for `sdpa`, transformers passes no mask for queries that begin where the keys do. (A static cache has more keys
    than are filled.)
    """
    if mask is None:
        mask = torch.ones(time, key.shape[2], dtype=torch.bool, device=key.device).tril()[None, None]
    if mask.dtype != torch.bool:
        return mask[..., : key.shape[2]].to(key.dtype)
    lowest = torch.finfo(key.dtype).min  # finite: a padding row that may see nothing gives a mean, not NaN
    return torch.where(mask, key.new_zeros(()), lowest)


AttentionInterface.register(NAME, prompted_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
