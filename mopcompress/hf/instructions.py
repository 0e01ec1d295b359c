"""What an adapter reads of a batch that the network was given: the instruction's tokens, without padding."""

from collections.abc import Iterator
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


def instruction_mask_of(
    tokens: Int[Tensor, "batch time"], attention_mask: Tensor | None, labels: Int[Tensor, "batch time"] | None
) -> Bool[Tensor, "batch time"]:
    """The real tokens before the first label; without labels, all real tokens.

    Tokens after the first label are left out even where they are not scored: their states depend on the response.
    """
    if attention_mask is not None and attention_mask.shape != tokens.shape:
        raise DataError(
            f"attention_mask: its shape is {tuple(attention_mask.shape)} and that of input_ids {tuple(tokens.shape)}, "
            "so it does not say what the instruction is; give instruction_mask"
        )
    mask = torch.ones_like(tokens, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    return mask if labels is None else mask & ((labels != UNSCORED).cumsum(1) == 0)


def instructions_of(hidden: Float[Tensor, "batch time hidden"], mask: Bool[Tensor, "batch time"]) -> InstructionStates:
    """Instruction tokens of states that enter the adapter's layer, wherever in the row they stand.

    Raises `DataError` for a row that has none.
    """
    counts = mask.sum(1)
    if not bool(counts.all()):
        raise DataError(
            f"row {int(counts.argmin())}: no token before the response, so there is no instruction for the adapter to "
            "read; give the instruction's tokens the label -100, and put it first"
        )
    rows = [states[real] for states, real in zip(hidden, mask, strict=True)]
    return InstructionStates(
        hidden=torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
        lengths=counts,
        mean=torch.stack([row.mean(0) for row in rows]),
    )


@torch.no_grad()
def read_by_itself(
    model: LanguageModel, tokens: Int[Tensor, "batch time"], mask: Bool[Tensor, "batch time"], layer: int
) -> InstructionStates:
    """The same where the network does not run on the whole instruction: the lower blocks run for it alone."""
    rows = [row[real] for row, real in zip(tokens, mask, strict=True)]
    together = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    real = torch.arange(together.shape[1], device=tokens.device) < mask.sum(1)[:, None]
    return instructions_of(model.run_lower(together, layer), real)


@contextmanager
def entering(block: nn.Module, act: Any) -> Iterator[None]:
    """Inside it, the next time that hidden states are about to enter the block, `act` is called with them."""

    def note(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        handles[0].remove()  # what acts may run the block itself
        act(args[0] if args else kwargs["hidden_states"])

    with forward_hooks([block], note, pre=True, with_kwargs=True) as handles:
        yield
