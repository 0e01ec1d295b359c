"""Differences between the versions of transformers that this package supports.

A cache of keys and values is called `past_key_values` before transformers 5.23, and `cache` since then.
"""

from transformers.modeling_outputs import CausalLMOutputWithPast

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""The keyword of a network's forward, and the field of its output, that hold the cache."""
