"""The seam through which prompts reach every attention layer of nearly every decoder family.

transformers calls a registered attention function *after* position encoding and *after* the KV cache. Ours attends to
extra keys and values, scaled by a gate, when a `Prefix` is active; otherwise it is `sdpa` to the bit. So there is no
per-family code and no hook, the positions of the text never move, and the KV cache never holds a prompt.

The gate is read as a bias on the logits, ``softmax(s_ij + log g_e(j))`` with ``log g = 0`` for text: an expert with
``g = 0`` is exactly absent, one with ``g = 1`` is exactly a plain prompt. (The paper, Dun et al. 2310.02842, scales the
attention paid to a group; that the scaled weights are renormalised is our reading.)
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
    """Keys and values of all prompts by layer (`layer_idx`), and the log gate of each prompt for each example."""

    keys: dict[int, Float[Tensor, "kv_heads prompts head"]]
    values: dict[int, Float[Tensor, "kv_heads prompts value_head"]]
    log_gate: Float[Tensor, "batch prompts"]


Recording = dict[int, tuple[Float[Tensor, "batch kv_heads time head"], Float[Tensor, "batch kv_heads time value_head"]]]

_prefix: ContextVar[Prefix | None] = ContextVar("prefix", default=None)
_recording: ContextVar[Recording | None] = ContextVar("recording", default=None)


@contextmanager
def attending_to(prefix: Prefix) -> Iterator[None]:
    """Inside the block every layer that `prefix` knows also attends to the prompts."""
    token = _prefix.set(prefix)
    try:
        yield
    finally:
        _prefix.reset(token)


@contextmanager
def recording() -> Iterator[Recording]:
    """Inside the block every layer notes the keys and values that it attends to, with their gradients."""
    seen: Recording = {}
    token = _recording.set(seen)
    try:
        yield seen
    finally:
        _recording.reset(token)


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
    batch, heads, time, head = query.shape
    kv_heads = key.shape[1]
    # one gate an example; beam search repeats each example next to itself
    log_gate = prefix.log_gate.repeat_interleave(batch // prefix.log_gate.shape[0], dim=0)
    bias = torch.cat(
        [
            log_gate[:, None, None, :].expand(-1, -1, time, -1),
            _text_bias(attention_mask, time, key).expand(batch, 1, time, -1),
        ],
        dim=-1,
    )
    keys = torch.cat([prefix.keys[layer].expand(batch, -1, -1, -1), key], dim=2)
    values = torch.cat([prefix.values[layer].expand(batch, -1, -1, -1), value], dim=2)
    # the query heads that share a key head are more rows of one product, so keys are never repeated
    rows = query.reshape(batch, kv_heads, -1, head) * (head**-0.5 if scaling is None else scaling)
    scores = (rows @ keys.transpose(2, 3)).view(batch, kv_heads, heads // kv_heads, time, -1) + bias[:, :, None]
    attended = scores.softmax(-1).view(batch, kv_heads, -1, keys.shape[2]) @ values
    return attended.view(batch, heads, time, -1).transpose(1, 2).contiguous(), None


def _text_bias(mask: Tensor | None, time: int, key: Tensor) -> Float[Tensor, "b 1 t keys"]:
    """What the text's own mask adds to the logits.

    transformers leaves out the mask, as for `sdpa`, of one query that sees every key and of queries that begin where
    the keys do (of which a static cache has more than are filled).
    """
    if mask is None:
        seen = key.shape[2] if time == 1 else 0
        mask = torch.ones(time, key.shape[2], dtype=torch.bool, device=key.device).tril(seen)[None, None]
    if mask.dtype != torch.bool:
        return mask[..., : key.shape[2]].to(key.dtype)
    lowest = torch.finfo(key.dtype).min  # finite: a padding row that sees nothing gives a mean, not NaN
    return torch.zeros_like(mask, dtype=key.dtype).masked_fill(~mask, lowest)


AttentionInterface.register(NAME, prompted_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
