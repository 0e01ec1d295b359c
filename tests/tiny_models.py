"""Tiny seeded models of many families and a tokenizer of words, built here: nothing is downloaded."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from mopcompress.data.encoding import Document
from mopcompress.evaluation import generation
from mopcompress.evaluation.hidden_states import InstructionStates
from mopcompress.hf import MopForCausalLM
from mopcompress.models.attention import NAME
from mopcompress.models.language_model import LanguageModel
from mopcompress.recover.adapter import AdapterConfig

VOCABULARY, HIDDEN, BLOCKS = 64, 32, 4
SPECIAL = ("<unk>", "<s>", "</s>")

TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPE = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # large, so that every block matters
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
SLIDING = {"sliding_window": 4, "query_pre_attn_scalar": 8}


def config_of(family: str, **changes: object) -> PretrainedConfig:
    """Return the smallest configuration with all features: grouped heads, and windows if the family slides."""
    match family:
        case "llama":
            return LlamaConfig(**TOKENS | SHAPE | GROUPED | changes)
        case "qwen3":
            return Qwen3Config(**TOKENS | SHAPE | GROUPED | changes)
        case "mistral":
            return MistralConfig(**TOKENS | SHAPE | GROUPED | {"sliding_window": 4} | changes)
        case "mixtral":
            return MixtralConfig(**TOKENS | SHAPE | GROUPED | {"num_local_experts": 3} | changes)
        case "qwen2":
            return Qwen2Config(**TOKENS | SHAPE | {"num_key_value_heads": 2} | changes)
        case "qwen3_moe":
            sizes = GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
            return Qwen3MoeConfig(**TOKENS | SHAPE | sizes | changes)
        case "gemma":
            return GemmaConfig(**TOKENS | SHAPE | GROUPED | changes)
        case "phi":
            return PhiConfig(**TOKENS | SHAPE | changes)
        case "bloom":
            sizes = {"hidden_size": HIDDEN, "n_layer": BLOCKS, "n_head": 4, "initializer_range": 0.2}
            return BloomConfig(**TOKENS | sizes | changes)
        case "gemma2":
            return Gemma2Config(**TOKENS | SHAPE | GROUPED | SLIDING | {"attn_logit_softcapping": None} | changes)
        case "gemma3":
            kinds = ["sliding_attention", "full_attention"] * 2
            return Gemma3TextConfig(**TOKENS | SHAPE | GROUPED | SLIDING | {"layer_types": kinds} | changes)
        case "gemma4":  # passes its tokens to every block
            kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 4}
            per_layer = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY}
            sizes = kinds | per_layer | {"global_head_dim": 8, "num_kv_shared_layers": 0}
            return Gemma4TextConfig(**TOKENS | SHAPE | GROUPED | sizes | changes)
        case "gpt_neox":
            return GPTNeoXConfig(**TOKENS | SHAPE | changes)
        case "gpt2":
            sizes = {"n_embd": HIDDEN, "n_layer": BLOCKS, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
            return GPT2Config(**TOKENS | sizes | changes)
        case "opt":
            sizes = SHAPE | {"ffn_dim": 48, "word_embed_proj_dim": HIDDEN, "init_std": 0.2}
            return OPTConfig(**TOKENS | sizes | changes)
    raise ValueError(family)


FAMILIES = ("llama", "qwen3", "mistral", "mixtral", "gemma2", "gemma3", "gpt_neox", "gpt2", "opt")


def network_of(config: PretrainedConfig, *, seed: int = 0, attention: str = NAME) -> torch.nn.Module:
    """Build a network with random weights; equal seeds give equal weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
        for name, weight in network.named_parameters():
            if "norm" in name or "ln_" in name or name.endswith("bias"):
                weight.data.add_(0.2 * torch.randn_like(weight))  # otherwise no test would notice a missing norm
    return network.eval()


def tiny_model(family: str = "llama", *, seed: int = 0, **changes: object) -> LanguageModel:
    return LanguageModel(network_of(config_of(family, **changes), seed=seed), word_tokenizer())


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer of the words w3 to w63, separated by white space; the token of a word is its number."""
    vocabulary = {token: number for number, token in enumerate(SPECIAL)}
    vocabulary |= {f"w{number}": number for number in range(len(SPECIAL), VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def recovered(model: LanguageModel, adapter: Any, arm: str = "mop") -> MopForCausalLM:
    """Combine both as a transformers model; the adapter can be saved only if it was built by `arm` with two experts."""
    config = AdapterConfig(
        arm=arm,
        experts=2,
        prompts_per_expert=3,
        layer=adapter.layer,
        hidden_size=model.hidden_size,
        base_sha256="",
        tasks=("add", "sort"),
    )
    return MopForCausalLM.from_parts(model, adapter, config)


def generate(model: LanguageModel, adapter: Any, prompts: list[str], **settings: Any) -> list[str]:
    """Generate answers with an adapter, or without when it is None."""
    network = model.network if adapter is None else recovered(model, adapter)
    return generation.generate(network, model.tokenizer, prompts, **settings)


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Draw ordinary tokens: no special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIAL), VOCABULARY, shape, generator=generator)


def random_documents(
    count: int, *, seed: int = 0, tasks: tuple[str, ...] = ("add", "sort", "tell")
) -> tuple[Document, ...]:
    """Return documents of 5 to 14 tokens, task after task; responses have 2 to 5 tokens and end with </s>."""
    generator = torch.Generator().manual_seed(seed)
    documents = []
    for index in range(count):
        context, response = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((3, 10), (1, 5)))
        words = torch.randint(len(SPECIAL), VOCABULARY, (context + response,), generator=generator).tolist()
        documents.append(Document(tasks[index % len(tasks)], (*words, 2), context))
    return tuple(documents)


def instructions_of(model: LanguageModel, tokens: torch.Tensor, layer: int, **known: object) -> InstructionStates:
    """Return what an adapter may read of instructions of equal length."""
    hidden = model.run_lower(tokens, layer)
    return InstructionStates(hidden, torch.full((len(tokens),), tokens.shape[1]), hidden.mean(1), **known)


def saved(model: LanguageModel, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write model and tokenizer as an ordinary Hugging Face folder."""
    model.network.to(dtype).save_pretrained(folder)
    model.network.float()
    model.tokenizer.save_pretrained(folder)
    return folder


def hooks(network: torch.nn.Module) -> int:
    """Count the hooks of the network; asking transformers for hidden states leaves some of its own."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules())


def next_of(tokens: torch.Tensor) -> torch.Tensor:
    """Return the next ordinary token; after the last comes the first."""
    return torch.where(tokens == VOCABULARY - 1, len(SPECIAL), tokens + 1)


def counting_model() -> LanguageModel:
    """Build a model that is certain of `next_of(token)`: its blocks add nothing, its head is a permutation."""
    model = tiny_model("llama", hidden_size=VOCABULARY)
    one_hot = torch.eye(VOCABULARY)
    with torch.no_grad():
        for block in model.blocks:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        model.network.model.embed_tokens.weight.copy_(one_hot)
        model.network.model.norm.weight.fill_(1.0)
        model.network.lm_head.weight.copy_(100 * one_hot[next_of(torch.arange(VOCABULARY))].T)
    return model
