"""A stand-in for an attention layer of a tiny Llama, and generation with a prefix."""

import torch

from mopcompress.models.attention import attend_to

KV_HEADS, HEAD = 2, 8


class AttentionLayer(torch.nn.Module):
    """The attributes of its module that an attention function reads."""

    layer_idx = 1
    num_key_value_groups = 2
    is_causal = True


def generate_with_prefix(model, tokens, prefix, **settings):
    """Return greedy answers of eight tokens, their prompts before them, while text attends to a prefix."""
    with attend_to(prefix):
        return model.network.generate(
            tokens,
            attention_mask=settings.pop("attention_mask", torch.ones_like(tokens)),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            **settings,
        )
