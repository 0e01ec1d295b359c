"""The seam through which prompts reach every attention layer of nearly every decoder family.

transformers calls a registered attention function *after* position encoding and *after* the KV cache. Ours attends to
extra keys and values, scaled by a gate, when a `Prefix` is active; otherwise it is `sdpa` to the bit. So there is no
per-family code and no hook, the positions of the text never move, and the KV cache never holds a prompt.

What a prompt weighs can be said in two places, which `recover/weighing.py` makes three readings of a gate from: as a
bias on its logits, ``softmax(s_ij + b_j)`` with ``b = 0`` for text, and as a factor on its value. At ``b = -inf`` a
prompt is exactly absent; at ``b = 0`` and factor 1 it is exactly a plain one.
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

Made = TypeVar("Made")

# what some families ask of their attention and `sdpa` either refuses or silently leaves out
_UNKNOWN = ("softcap", "s_aux", "position_bias")


@dataclass(frozen=True)
class Prefix:
    """Keys and values of all prompts by layer (`layer_idx`), and what each prompt weighs for each example."""

    keys: dict[int, Float[Tensor, "kv_heads prompts head"]]
    values: dict[int, Float[Tensor, "kv_heads prompts value_head"]]
    log_gate: Float[Tensor, "batch prompts"]  # added to the prompts' logits
    value_gate: Float[Tensor, "batch prompts"] | None = None  # factor on the prompts' values; None: 1
    separate: int = 0  # as many equal groups of prompts have a softmax of their own each; 0: all share the text's


Watched = dict[int, Float[Tensor, "batch time prompts"]]
Recording = dict[int, tuple[Float[Tensor, "batch kv_heads time head"], Float[Tensor, "batch kv_heads time value_head"]]]

_prefix: ContextVar[Prefix | None] = ContextVar("prefix", default=None)
_recording: ContextVar[Recording | None] = ContextVar("recording", default=None)
_watching: ContextVar[Watched | None] = ContextVar("watching", default=None)


@contextmanager
def attend_to(prefix: Prefix) -> Iterator[None]:
    """Inside the block every layer that `prefix` knows also attends to the prompts."""
    token = _prefix.set(prefix)
    try:
        yield
    finally:
        _prefix.reset(token)


@contextmanager
def record_kv() -> Iterator[Recording]:
    """Inside the block every layer notes the keys and values that it attends to, with their gradients."""
    seen: Recording = {}
    token = _recording.set(seen)
    try:
        yield seen
    finally:
        _recording.reset(token)


@contextmanager
def record_attention() -> Iterator[Watched]:
    """Inside the block every layer notes how much each position attends to each prompt: the mean over heads."""
    seen: Watched = {}
    token = _watching.set(seen)
    try:
        yield seen
    finally:
        _watching.reset(token)


def with_our_attention(make: Callable[..., Made]) -> Made:
    """`make(attn_implementation=...)`: ours, or the family's own where it cannot be exchanged.

    Some of those families refuse another name; others take it and only leave out the mask that their own code needs.
    """
    try:
        made = make(attn_implementation=NAME)
    except KeyError as error:
        if error.args != (NAME,):
            raise
        return make()
    network: Any = made[0] if isinstance(made, tuple) else made
    return made if network._can_set_attn_implementation() else make()


def prompted_attention(
    module: nn.Module,
    query: Float[Tensor, "batch heads time head"],
    key: Float[Tensor, "batch kv_heads keys head"],
    value: Float[Tensor, "batch kv_heads keys value_head"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch time heads value_head"], None]:
    """Attention over the text and over the prompts of the active `Prefix`, if any.

    Raises `DataError` when the family wants more of its attention than keys, values and a mask.
    """
    for name in _UNKNOWN:
        if kwargs.get(name) is not None:
            raise DataError(
                f"{type(module).__name__} wants {name}, which is not supported; use a model of another family"
            )
    layer: int = module.layer_idx  # type: ignore[assignment]
    seen, prefix = _recording.get(), _prefix.get()
    if seen is not None:
        seen[layer] = (key, value)
    if prefix is None or layer not in prefix.keys:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    scaled = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if prefix.separate:
        text, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return text + _separately(scaled, prefix, layer).transpose(1, 2), None
    if query.shape[2] == 1:
        return _for_one_query(scaled, key, value, attention_mask, prefix, layer).transpose(1, 2), None
    text_bias = _text_bias(attention_mask, query.shape[2], key)
    return _together(scaled, key, value, text_bias, prefix, layer).transpose(1, 2).contiguous(), None


def _together(
    query: Float[Tensor, "batch heads time head"],
    key: Float[Tensor, "batch kv_heads keys head"],
    value: Float[Tensor, "batch kv_heads keys value_head"],
    text_bias: Float[Tensor, "b 1 t keys"],
    prefix: Prefix,
    layer: int,
) -> Float[Tensor, "batch heads time value_head"]:
    """One softmax over prompts and text."""
    batch, heads, time, head = query.shape
    prompts = prefix.log_gate.shape[1]
    log_gate = _for_each(prefix.log_gate, batch)
    of_prompts = log_gate[:, None, None, :].expand(-1, -1, time, -1)
    bias = torch.cat([of_prompts, text_bias.expand(batch, 1, time, -1)], dim=-1)
    keys = torch.cat([prefix.keys[layer].expand(batch, -1, -1, -1), key], dim=2)
    values = torch.cat([_gated_values(prefix, layer, batch), value], dim=2)
    # the query heads that share a key head are more rows of one product, so keys are never repeated
    scores = query.reshape(batch, keys.shape[1], -1, head) @ keys.transpose(2, 3)
    scores = scores.view(batch, keys.shape[1], -1, time, keys.shape[2]) + bias[:, :, None]
    weights = scores.softmax(-1)
    if (watched := _watching.get()) is not None:
        watched[layer] = weights[..., :prompts].mean((1, 2))
    attended = weights.view(batch, keys.shape[1], -1, keys.shape[2]) @ values
    return attended.view(batch, heads, time, -1)


def _for_one_query(
    query: Float[Tensor, "batch heads 1 head"],
    key: Float[Tensor, "batch kv_heads keys head"],
    value: Float[Tensor, "batch kv_heads keys value_head"],
    mask: Tensor | None,
    prefix: Prefix,
    layer: int,
) -> Float[Tensor, "batch heads 1 value_head"]:
    """The same for the one query of a generation's step: there, copying all keys and values would cost the most.

    A step is so short that every operation counts: few of them, and none for a mask that is not there.
    """
    batch, heads, _, head = query.shape
    kv_heads, prompts = key.shape[1], prefix.log_gate.shape[1]
    # the query heads that share a key head are more rows of one product, so keys are never repeated
    rows = query.reshape(batch * kv_heads, -1, head)
    to_text = torch.bmm(rows, key.flatten(0, 1).transpose(1, 2))
    if mask is not None:
        to_text = to_text + _text_bias(mask, 1, key).expand(batch, kv_heads, 1, -1).flatten(0, 1)
    # and so are the examples, which share all prompts
    log_gate = _for_each(prefix.log_gate, batch)[:, None].expand(-1, rows.shape[1], -1).flatten(0, 1)
    shared = torch.baddbmm(log_gate[None], _by_head(rows, batch), prefix.keys[layer].transpose(1, 2))
    weights = torch.cat([_by_example(shared, batch), to_text], dim=-1).softmax(-1)
    of_prompts, of_text = weights.split([prompts, key.shape[2]], dim=-1)
    if (watched := _watching.get()) is not None:
        watched[layer] = of_prompts.unflatten(0, (batch, -1)).mean((1, 2))[:, None]
    if prefix.value_gate is not None:
        factors = _for_each(prefix.value_gate, batch).repeat_interleave(kv_heads, dim=0)
        of_prompts = of_prompts * factors[:, None]
    given = torch.bmm(_by_head(of_prompts, batch), prefix.values[layer])
    attended = torch.baddbmm(_by_example(given, batch), of_text, value.flatten(0, 1))
    return attended.view(batch, heads, 1, -1)


def _by_head(
    rows: Float[Tensor, "batch_x_heads rows inner"], batch: int
) -> Float[Tensor, "kv_heads batch_x_rows inner"]:
    """All examples' rows of a key head together, for one product with what the examples share."""
    return rows if batch == 1 else rows.unflatten(0, (batch, -1)).transpose(0, 1).flatten(1, 2)


def _by_example(
    rows: Float[Tensor, "kv_heads batch_x_rows outer"], batch: int
) -> Float[Tensor, "batch_x_heads rows outer"]:
    """The same rows by example again."""
    return rows if batch == 1 else rows.unflatten(1, (batch, -1)).transpose(0, 1).flatten(0, 1)


def _separately(
    query: Float[Tensor, "batch heads time head"], prefix: Prefix, layer: int
) -> Float[Tensor, "batch heads time value_head"]:
    """The sum over groups of each group's own attention, to be added to the text's."""
    batch, heads, time, head = query.shape
    keys, values = prefix.keys[layer], _gated_values(prefix, layer, batch)
    rows = query.reshape(batch, len(keys), -1, head)
    scores = rows @ keys.transpose(1, 2) + _for_each(prefix.log_gate, batch)[:, None, None]
    weights = scores.unflatten(-1, (prefix.separate, -1)).softmax(-1).flatten(-2)
    return (weights @ values).view(batch, heads, time, -1)


def _gated_values(prefix: Prefix, layer: int, batch: int) -> Float[Tensor, "batch kv_heads prompts value_head"]:
    values = prefix.values[layer].expand(batch, -1, -1, -1)
    return values if prefix.value_gate is None else values * _for_each(prefix.value_gate, batch)[:, None, :, None]


def _for_each(gate: Float[Tensor, "examples prompts"], batch: int) -> Float[Tensor, "batch prompts"]:
    """One gate an example; beam search repeats each example next to itself."""
    return gate if len(gate) == batch else gate.repeat_interleave(batch // len(gate), dim=0)


def _text_bias(mask: Tensor | None, time: int, key: Tensor) -> Float[Tensor, "b 1 t keys"]:
    """What the text's own mask adds to the logits.

    transformers leaves out the mask, as for `sdpa`, of queries that begin where the keys do (of which a static cache
    has more than are filled).
    """
    if mask is None:
        mask = torch.ones(time, key.shape[2], dtype=torch.bool, device=key.device).tril()[None, None]
    if mask.dtype != torch.bool:
        return mask[..., : key.shape[2]].to(key.dtype)
    lowest = torch.finfo(key.dtype).min  # finite: a padding row that sees nothing gives a mean, not NaN
    return torch.where(mask, key.new_zeros(()), lowest)


AttentionInterface.register(NAME, prompted_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
