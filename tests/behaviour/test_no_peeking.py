"""No arm reads a response: whatever its tokens, the output before it is the same to the bit."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from factories import perturbed_adapter
from recovered_models import LAYER, labelled_batch
from tiny_models import next_of, random_documents, recovered
from torch import Tensor

from mopcompress.data.encoding import Document
from mopcompress.evaluation.hidden_states import HiddenStateDataset, InstructionStates
from mopcompress.models.language_model import LanguageModel
from mopcompress.recipe.arms import ARM_DEFAULTS
from mopcompress.recover.registry import RECOVERY_METHODS

DOCUMENTS = random_documents(3)
ROW = 2  # the last is changed; `shuffled` reads the others

ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {arm: (arm, {}) for arm in RECOVERY_METHODS} | {
    "mop, values": ("mop", {"gate_mode": "values"}),
    "mop, separate": ("mop", {"gate_mode": "separate"}),
    "mop, one expert": ("mop", {"top_k": 1}),
    "mop, shared": ("mop", {"shared_expert": True}),
    "mop, per layer": ("mop", {"per_layer_prompts": True}),
    "single, per layer": ("single", {"per_layer_prompts": True}),
}
WAYS = ("active", "compiled", "left-padded", "right-padded in training")  # the last two in transformers
CASES = [
    (name, way)
    for name, (arm, _) in ADAPTERS.items()
    for way in WAYS
    if not (ARM_DEFAULTS[arm].needs_tasks and "padded" in way)  # transformers knows no tasks
]


@dataclass
class Observation:
    """The inputs of an adapter, its weights, and the logits of the network."""

    inputs: list[Tensor]
    weights: list[Tensor]
    logits: list[Tensor]  # per document


def weights_of(adapter: Any, model: LanguageModel, instructions: InstructionStates) -> list[Tensor]:
    """Return all weights that an adapter gives its groups for the instructions; some adapters have none."""
    reported = adapter.expert_weights(model, instructions) if hasattr(adapter, "expert_weights") else None
    trained = adapter.training_log_weights(instructions) if hasattr(adapter, "training_log_weights") else None
    routed = adapter.log_gate(instructions.mean) if hasattr(adapter, "log_gate") else None
    return [weights for weights in (reported, trained, routed) if weights is not None]


def record_instructions(adapter: Any) -> list[InstructionStates]:
    """Return a list that grows by the instructions that an adapter acts on."""
    recorded: list[InstructionStates] = []
    active, compile_for_inference = adapter.active, adapter.compile_for_inference

    def record(instructions: InstructionStates) -> InstructionStates:
        recorded.append(instructions)
        return instructions

    def compile_and_record(model: LanguageModel) -> Any:
        apply = compile_for_inference(model)
        return lambda instructions: apply(record(instructions))

    adapter.active = lambda model, instructions: active(model, record(instructions))
    adapter.compile_for_inference = compile_and_record
    return recorded


@torch.no_grad()
def observe(way: str, model: LanguageModel, adapter: Any, documents: Sequence[Document]) -> Observation:
    adapter = copy.deepcopy(adapter)  # in training `smop` draws new noise every time
    recorded = record_instructions(adapter)
    if "padded" in way:
        batch = labelled_batch(documents, side=way.split("-")[0])
        logits = recovered(model, adapter).train("training" in way)(**batch).logits
        is_token = batch["attention_mask"].bool()
    else:
        states = HiddenStateDataset(model, documents, adapter.layer, batch_size=2).batch(range(len(documents)))
        context = (
            adapter.compile_for_inference(model)(states.instructions)
            if way == "compiled"
            else adapter.active(model, states.instructions)
        )
        with context:
            upper = model.run_upper(states.hidden, adapter.layer)
        logits = torch.stack([model.logits(row) for row in upper])
        lengths = torch.tensor([len(document.tokens) for document in documents])
        is_token = torch.arange(upper.shape[1]) < lengths[:, None]
    instructions = recorded[0]
    parts = (instructions.hidden, instructions.lengths, instructions.mean, instructions.shuffled_mean)
    return Observation(
        [part for part in parts if part is not None],
        weights_of(adapter, model, instructions),
        [row[mask] for row, mask in zip(logits, is_token, strict=True)],
    )


def with_another_token(position: int) -> list[Document]:
    """Return the documents with another token at a position of the last one."""
    tokens = list(DOCUMENTS[ROW].tokens)
    tokens[position] = int(next_of(torch.tensor(tokens[position])))
    return [*DOCUMENTS[:ROW], replace(DOCUMENTS[ROW], tokens=tuple(tokens))]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize(("name", "way"), CASES)
def test_no_peeking(tiny_llama: LanguageModel, name: str, way: str) -> None:
    """A token of the response changes nothing before it; a token of the instruction is read."""
    arm, changes = ADAPTERS[name]
    adapter, _ = perturbed_adapter(arm, tiny_llama, layer=LAYER, **changes)
    before, first = observe(way, tiny_llama, adapter, DOCUMENTS), DOCUMENTS[ROW].context_tokens
    for position in range(first, len(DOCUMENTS[ROW].tokens)):
        after = observe(way, tiny_llama, adapter, with_another_token(position))
        assert same(after.inputs, before.inputs)
        assert same(after.weights, before.weights)
        assert same(after.logits[:ROW], before.logits[:ROW])
        changed = [not torch.equal(*pair) for pair in zip(after.logits[ROW], before.logits[ROW], strict=True)]
        assert changed == [index >= position for index in range(len(changed))]
    instructed = observe(way, tiny_llama, adapter, with_another_token(first - 1))
    assert not same(instructed.inputs, before.inputs)
    if adapter.parameter_groups()["gate"] and arm != "shuffled":  # in transformers `shuffled` reads no example
        assert not same(instructed.weights, before.weights)
