"""No arm reads a response: whatever stands there, what an adapter does before it is the same to the bit."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hf.test_model import batch_of, begun
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
    "mop, deep": ("mop", {"per_layer_prompts": True}),
    "single, deep": ("single", {"per_layer_prompts": True}),
}
WAYS = ("applied", "compiled", "left-padded", "right-padded in training")  # the last two in transformers
CASES = [
    (name, way)
    for name, (arm, _) in ADAPTERS.items()
    for way in WAYS
    if not (ARM_DEFAULTS[arm].needs_tasks and "padded" in way)  # transformers knows no tasks
]


@dataclass
class Seen:
    """What an adapter was given, what it made of that, and what came of it."""

    given: list[Tensor]
    weights: list[Tensor]
    logits: list[Tensor]  # a document


def weights_of(adapter: Any, model: LanguageModel, instructions: InstructionStates) -> list[Tensor]:
    """All that an adapter says about the instructions; for some there is nothing."""
    chosen = adapter.expert_weights(model, instructions) if hasattr(adapter, "expert_weights") else None
    trained = adapter.training_log_weights(instructions) if hasattr(adapter, "training_log_weights") else None
    routed = adapter.log_gate(instructions.mean) if hasattr(adapter, "log_gate") else None
    return [one for one in (chosen, trained, routed) if one is not None]


def watch(adapter: Any) -> list[InstructionStates]:
    """The instructions that an adapter acts on from now on."""
    given: list[InstructionStates] = []
    applied, compiled = adapter.active, adapter.compile_for_inference

    def noted(instructions: InstructionStates) -> InstructionStates:
        given.append(instructions)
        return instructions

    def compiled_and_noted(model: LanguageModel) -> Any:
        act = compiled(model)
        return lambda instructions: act(noted(instructions))

    adapter.active = lambda model, instructions: applied(model, noted(instructions))
    adapter.compile_for_inference = compiled_and_noted
    return given


@torch.no_grad()
def see(way: str, model: LanguageModel, adapter: Any, documents: Sequence[Document]) -> Seen:
    adapter = copy.deepcopy(adapter)  # in training `smop` draws other noise every time
    given = watch(adapter)
    if "padded" in way:
        batch = batch_of(documents, side=way.split("-")[0])
        logits = recovered(model, adapter).train("training" in way)(**batch).logits
        real = batch["attention_mask"].bool()
    else:
        states = HiddenStateDataset(model, documents, adapter.layer, batch_size=2).batch(range(len(documents)))
        acting = adapter.compile_for_inference(model) if way == "compiled" else lambda read: adapter.active(model, read)
        with acting(states.instructions):
            left = model.run_upper(states.hidden, adapter.layer)
        logits = torch.stack([model.logits(row) for row in left])
        lengths = torch.tensor([len(document.tokens) for document in documents])
        real = torch.arange(left.shape[1]) < lengths[:, None]
    read = given[0]
    parts = (read.hidden, read.lengths, read.mean, read.shuffled_mean)
    return Seen(
        [part for part in parts if part is not None],
        weights_of(adapter, model, read),
        [row[where] for row, where in zip(logits, real, strict=True)],
    )


def with_another(place: int) -> list[Document]:
    """The documents with another token there."""
    tokens = list(DOCUMENTS[ROW].tokens)
    tokens[place] = int(next_of(torch.tensor(tokens[place])))
    return [*DOCUMENTS[:ROW], replace(DOCUMENTS[ROW], tokens=tuple(tokens))]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(left, right, strict=True))


@pytest.mark.parametrize(("name", "way"), CASES)
def test_no_peeking(tiny_llama: LanguageModel, name: str, way: str) -> None:
    """A token of the response changes nothing that is said before it; one of the instruction is read."""
    arm, changes = ADAPTERS[name]
    adapter, _ = begun(tiny_llama, arm, "", **changes)
    before, first = see(way, tiny_llama, adapter, DOCUMENTS), DOCUMENTS[ROW].context_tokens
    for place in range(first, len(DOCUMENTS[ROW].tokens)):
        after = see(way, tiny_llama, adapter, with_another(place))
        assert same(after.given, before.given)
        assert same(after.weights, before.weights)
        assert same(after.logits[:ROW], before.logits[:ROW])
        changed = [not torch.equal(*pair) for pair in zip(after.logits[ROW], before.logits[ROW], strict=True)]
        assert changed == [position >= place for position in range(len(changed))]
    asked = see(way, tiny_llama, adapter, with_another(first - 1))
    assert not same(asked.given, before.given)
    if adapter.parameter_groups()["gate"] and arm != "shuffled":  # which reads no example where there are no strangers
        assert not same(asked.weights, before.weights)
