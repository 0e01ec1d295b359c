"""The part of a batch that an adapter reads: the instruction's tokens, without padding."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mopcompress.errors import DataError
from mopcompress.evaluation.hidden_states import InstructionStates
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.modules import forward_hooks

UNSCORED = -100  # transformers' label of a token that is no part of the response


def infer_instruction_mask(
    tokens: Int[Tensor, "batch time"], attention_mask: Tensor | None, labels: Int[Tensor, "batch time"] | None
) -> Bool[Tensor, "batch time"]:
    """Mark the real tokens before the first label; without labels, all real tokens.

    Tokens after the first label are left out even if they are not scored: their states depend on the response. Raises
    `DataError` for an attention mask of another shape than the tokens.
    """
    if attention_mask is not None and attention_mask.shape != tokens.shape:
        raise DataError(
            f"attention_mask: its shape is {tuple(attention_mask.shape)} and that of input_ids {tuple(tokens.shape)}, "
            "so it does not say what the instruction is; give instruction_mask"
        )
    mask = torch.ones_like(tokens, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    return mask if labels is None else mask & ((labels != UNSCORED).cumsum(1) == 0)


def gather_instructions(
    hidden: Float[Tensor, "batch time hidden"], mask: Bool[Tensor, "batch time"]
) -> InstructionStates:
    """Gather the instruction tokens of states that enter the adapter's layer, at any positions of the rows.

    Raises `DataError` for a row without instruction tokens.
    """
    counts = mask.sum(1)
    if not bool(counts.all()):
        raise DataError(
            f"row {int(counts.argmin())}: no token before the response, so there is no instruction for the adapter to "
            "read; give the instruction's tokens the label -100, and put it first"
        )
    rows = [states[in_instruction] for states, in_instruction in zip(hidden, mask, strict=True)]
    return InstructionStates(
        hidden=torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
        lengths=counts,
        mean=torch.stack([row.mean(0) for row in rows]),
    )


@torch.no_grad()
def run_instructions(
    model: LanguageModel, tokens: Int[Tensor, "batch time"], mask: Bool[Tensor, "batch time"], layer: int
) -> InstructionStates:
    """Run the blocks below `layer` on the instructions alone and gather their states.

    It serves where the network itself does not run on the whole instruction, such as after a cache.
    """
    rows = [row[in_instruction] for row, in_instruction in zip(tokens, mask, strict=True)]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    is_token = torch.arange(padded.shape[1], device=tokens.device) < mask.sum(1)[:, None]
    return gather_instructions(model.run_lower(padded, layer), is_token)


@contextmanager
def on_next_input(block: nn.Module, callback: Callable[[Tensor], None]) -> Iterator[None]:
    """Call `callback` with the hidden states that next enter the block, once, inside the `with` block only."""

    def hook(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        handles[0].remove()  # the callback may run the block itself
        callback(args[0] if args else kwargs["hidden_states"])

    with forward_hooks([block], hook, pre=True, with_kwargs=True) as handles:
        yield
