"""Tiny recovered models in transformers' hands, their inputs, and their folders."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from factories import perturbed_adapter
from tiny_models import HIDDEN, random_documents, random_tokens, recovered, saved, tiny_model
from torch import Tensor

from mopcompress.data.encoding import Document
from mopcompress.hf import MopForCausalLM
from mopcompress.models.model_loading import weights_hash
from mopcompress.recipe.arms import ARM_DEFAULTS
from mopcompress.recover.methods.gate import Gate
from mopcompress.recover.methods.mixture_of_prompts import MixtureOfPrompts
from mopcompress.recover.registry import RECOVERY_METHODS
from mopcompress.recover.save_and_load import save_adapter
from mopcompress.storage import artifacts

LAYER, NEW_TOKENS = 1, 6
CONTEXTS = [random_tokens(length, seed=length).tolist() for length in (9, 4, 6)]
DOCUMENTS = random_documents(4)
GENERATING_ARMS = [arm for arm in RECOVERY_METHODS if not ARM_DEFAULTS[arm].needs_tasks]
GREEDY = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": None, "pad_token_id": 0}


def gated_model(family: str = "llama") -> MopForCausalLM:
    """Return a model with two experts of three prompts and a random gate, large enough to change what is generated."""
    generator = torch.Generator().manual_seed(0)
    gate = Gate(HIDDEN, 2, generator=generator)
    gate.scale_logits(3.0)
    mixture = MixtureOfPrompts(3 * torch.randn(2, 3, HIDDEN, generator=generator), LAYER, gate)
    return recovered(tiny_model(family), mixture)


@functools.cache
def perturbed_model(arm: str) -> MopForCausalLM:
    """Return a model with an arm's adapter as after training. No test may change it."""
    return recovered(tiny_model(), perturbed_adapter(arm, tiny_model(), layer=LAYER)[0])


def padded(rows: list[list[int]], *, side: str = "left", value: int = 0) -> tuple[Tensor, Tensor]:
    """Return padded tokens and their attention mask."""
    longest = max(map(len, rows))
    fills = [[value] * (longest - len(row)) for row in rows]
    left = side == "left"
    tokens = [fill + row if left else row + fill for row, fill in zip(rows, fills, strict=True)]
    mask = [[0] * len(fill) + [1] * len(row) for row, fill in zip(rows, fills, strict=True)]
    return torch.tensor(tokens), torch.tensor(mask if left else [row[::-1] for row in mask])


def labelled_batch(documents: Sequence[Document], *, side: str) -> dict[str, Tensor]:
    """Return documents as a batch whose labels are their responses."""
    rows = [list(document.tokens) for document in documents]
    labels = [
        [-100] * document.context_tokens + row[document.context_tokens :]
        for row, document in zip(rows, documents, strict=True)
    ]
    tokens, mask = padded(rows, side=side)
    return {"input_ids": tokens, "attention_mask": mask, "labels": padded(labels, side=side, value=-100)[0]}


@contextmanager
def recorded_gate(model: MopForCausalLM) -> Iterator[list[Tensor]]:
    """Record the gate's outputs, call after call."""
    outputs: list[Tensor] = []
    handle = model.adapter.gate.register_forward_hook(lambda _gate, _inputs, output: outputs.append(output.detach()))
    yield outputs
    handle.remove()


def generate_tokens(model: Any, rows: list[list[int]], **settings: Any) -> list[list[int]]:
    """Return the new tokens after left-padded prompts."""
    tokens, mask = padded(rows)
    return model.generate(tokens, attention_mask=mask, **GREEDY | settings)[:, tokens.shape[1] :].tolist()


def save_base_and_adapter(arm: str, folder: Path, family: str = "llama", **changes: Any) -> tuple[Path, Path]:
    """Write a base and an adapter for it, and return their folders."""
    base = saved(tiny_model(family), folder / "base")
    adapter, config = perturbed_adapter(arm, tiny_model(family), layer=LAYER, base_sha256=weights_hash(base), **changes)
    with artifacts.publish(folder / "adapter", {"kind": "adapter"}) as scratch:
        save_adapter(adapter, config, scratch)
    return base, folder / "adapter"
