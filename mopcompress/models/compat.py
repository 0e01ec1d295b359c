"""What transformers calls a cache of keys and values: `past_key_values` until 5.23, since then plainly `cache`."""

from transformers.modeling_outputs import CausalLMOutputWithPast

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""The keyword of a network's forward, and the field of what comes out of it."""
