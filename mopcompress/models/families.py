"""Module names of the model families: the one place that knows how Llama, GPT-2, GPT-NeoX and others name theirs."""

import re

MLPS = (  # names of the linears that write an MLP's inner features, and of the one that reads them
    (("gate_proj", "up_proj"), "down_proj"),  # Llama, Mistral, Qwen, Gemma
    (("gate_up_proj",), "down_proj"),  # Phi-3
    (("fc1",), "fc2"),  # Phi, OPT
    (("c_fc",), "c_proj"),  # GPT-2
    (("dense_h_to_4h",), "dense_4h_to_h"),  # GPT-NeoX
)
ATTENTIONS = (  # names of the linears that make queries, keys and values, and of the one that reads the heads
    (("q_proj", "k_proj", "v_proj"), "o_proj"),
    (("q_proj", "k_proj", "v_proj"), "dense"),  # Phi
    (("q_proj", "k_proj", "v_proj"), "out_proj"),  # OPT
    (("qkv_proj",), "o_proj"),  # Phi-3
)
CHANNEL_KEYS = ("ffn_dim", "n_inner", "intermediate_size")  # keys of the MLP width: the first that a config has counts
KEYS_AND_VALUES = (("k_proj", "v_proj"), ("c_attn",), ("query_key_value",), ("qkv_proj",))  # make keys and values
MLP_READERS = (("down_proj",), ("fc2",), ("mlp.c_proj",), ("dense_4h_to_h",))  # read the neurons of an MLP
ATTENTION_READERS = {name for first, _ in ATTENTIONS for name in first} | {"c_attn", "query_key_value"}  # of the stream
WRITERS = {last for _, last in (*MLPS, *ATTENTIONS)}  # add to the residual stream

# The weight files of these families use the network's names; for other families the loaded model is needed.
NETWORK_NAMES = re.compile(
    r"(?:model\.layers|model\.decoder\.layers|transformer\.h|gpt_neox\.layers)\.[0-9]+\.(.+)\.weight"
)
TRANSPOSED = ("gpt2",)  # `model_type` of families that store a linear's weight as [in, out]

EXPERT_STACKS = {"gate_up_proj", "down_proj"}  # parameters [experts, out, in] of a module of stacked experts
EXPERT_LAYOUT = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}  # Mixtral's
ROTARY = "rotary"  # part of the name of a module that makes rotary positions
