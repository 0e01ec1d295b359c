"""Runs of a network with its adapter: in one forward pass, or throughout a generation.

The adapter reads the instruction once, on its way through the network: when its states are about to enter the adapter's
layer, the adapter reads them, and it acts from there on. So nothing runs twice, in any arm. In a generation the adapter
acts until the generation ends, and reads nothing more.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import Cache
from transformers.utils.generic import ModelOutput

from mopcompress.errors import DataError
from mopcompress.evaluation.hidden_states import ApplyAdapter, InstructionStates
from mopcompress.hf.instructions import gather_instructions, infer_instruction_mask, on_next_input, run_instructions
from mopcompress.models.compat import CACHE
from mopcompress.models.language_model import LanguageModel
from mopcompress.recover.adapter import Adapter


@dataclass
class _Generation:
    """State of one generation: the adapter acts from the prompt to the last token."""

    runner: "AdapterRunner"
    prompt_tokens: int | None  # padding included; tokens after them at the first step are a draft. None: all are prompt
    active: ExitStack = field(default_factory=ExitStack)
    has_read: bool = False


_generation: ContextVar[_Generation | None] = ContextVar("generation", default=None)
# the instructions that each cache begins with, for decoding loops that callers write themselves
_instructions: WeakKeyDictionary[Cache, InstructionStates] = WeakKeyDictionary()


class AdapterRunner:
    """A network and its adapter; the adapter is compiled for inference until a tensor of either changes."""

    def __init__(self, model: LanguageModel, adapter: Adapter) -> None:
        self.model, self.adapter = model, adapter
        self._compiled: tuple[object, ApplyAdapter] | None = None

    def run(
        self, inputs: dict[str, Any], instruction_mask: Bool[Tensor, "batch time"] | None, *, training: bool
    ) -> ModelOutput:
        """Run the network's forward on `inputs` with the adapter acting on it.

        Inside `generation` only the first run reads an instruction. Raises `DataError` when there is no instruction to
        read, and for a cache that another model began.
        """
        generation = self._current_generation()
        if generation is None:
            with ExitStack() as active:
                return self._read_and_run(active, inputs, instruction_mask, training=training)
        if generation.has_read:
            return self.model.network(**inputs)
        generation.has_read = True
        return self._read_and_run(generation.active, inputs, instruction_mask, training=training)

    @contextmanager
    def generation(self, prompt_tokens: int | None) -> Iterator[None]:
        """Let the adapter read the prompt in the first run of the `with` block, and act until the block ends.

        `prompt_tokens` is the prompt's length, padding included; None means that all tokens of the first run are
        prompt.
        """
        generation = _Generation(self, prompt_tokens)
        token = _generation.set(generation)
        try:
            with generation.active:
                yield
        finally:
            _generation.reset(token)

    def prompt_inputs(
        self, tokens: Int[Tensor, "batch time"], attention_mask: Tensor | None, cache: Cache | None, *, training: bool
    ) -> dict[str, Any]:
        """Return the mask of the prompt's real tokens as an input of the next run, if that run reads the prompt.

        With a cache that holds the beginning of the prompt, the prompt is read here. Raises `DataError` when the tokens
        of such a cache are missing.
        """
        generation = self._current_generation()
        if generation is None or generation.has_read:
            return {}
        mask = torch.ones_like(tokens, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        if mask.shape != tokens.shape:
            raise DataError("generate goes on from a cache without its tokens; give all of input_ids, or no cache")
        if generation.prompt_tokens is not None:  # an assistant's draft may follow it already
            mask = mask & (torch.arange(mask.shape[1], device=mask.device) < generation.prompt_tokens)
        if cache is None or cache.get_seq_length() == 0:
            return {"instruction_mask": mask}
        generation.has_read = True  # the cache has the beginning's keys and values, but not the states to read
        instructions = run_instructions(self.model, tokens, mask, self.adapter.layer)
        generation.active.enter_context(self._adapter_context(instructions, training=training))
        return {}

    def discard_compiled(self) -> None:
        """Compile the adapter anew in its next use at inference."""
        self._compiled = None

    def _current_generation(self) -> _Generation | None:
        generation = _generation.get()
        return generation if generation is not None and generation.runner is self else None

    def _read_and_run(
        self, active: ExitStack, inputs: dict[str, Any], mask: Bool[Tensor, "batch time"] | None, *, training: bool
    ) -> ModelOutput:
        """Run the network; the adapter reads the instruction on its way and acts until `active` ends."""
        network, cache, tokens = self.model.network, inputs[CACHE], inputs["input_ids"]
        if cache is not None and cache.get_seq_length() > 0:
            if cache not in _instructions:
                raise DataError(f"{CACHE} was not begun by this model, so no instruction was read; begin without")
            active.enter_context(self._adapter_context(_instructions[cache], training=training))
            return network(**inputs)
        if mask is None and inputs["labels"] is None and training:
            raise DataError(
                "training without labels or instruction_mask: the adapter would read the response too; give one of "
                "them (Trainer takes the labels away for label smoothing and a loss function of one's own)"
            )
        if mask is None:
            mask = infer_instruction_mask(tokens, inputs["attention_mask"], inputs["labels"])
        instructions: list[InstructionStates] = []

        def read_and_act(hidden: Tensor) -> None:
            instructions.append(gather_instructions(hidden, mask))
            active.enter_context(self._adapter_context(instructions[0], training=training))

        if self.adapter.layer == 0:
            read_and_act(self.model.run_lower(tokens, 0))
            output = network(**inputs)
        else:
            with on_next_input(self.model.blocks[self.adapter.layer], read_and_act):
                output = network(**inputs)
        if isinstance(new_cache := output.get(CACHE), Cache):
            _instructions[new_cache] = instructions[0]
        return output

    def _adapter_context(self, instructions: InstructionStates, *, training: bool) -> AbstractContextManager[object]:
        """Return the adapter's context: with gradients if any are needed, else compiled until a tensor changes."""
        assert isinstance(self.adapter, nn.Module)  # for mypy: a protocol cannot ask for it
        parameters = list(self.adapter.parameters())
        if training or (torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters)):
            return self.adapter.active(self.model, instructions)
        tensors = (*self.model.network.parameters(), *parameters, *self.adapter.buffers())
        state = [(tensor.data_ptr(), tensor._version) for tensor in tensors]
        if self._compiled is None or self._compiled[0] != state:
            with torch.inference_mode(False), torch.no_grad():
                self._compiled = state, self.adapter.compile_for_inference(self.model)
        return self._compiled[1](instructions)
