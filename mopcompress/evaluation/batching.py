"""Batches of documents of similar length, and padding on the left."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mopcompress.data.encoding import Document

POOL = 16  # batches whose rows are sorted by length together


def batches_by_length(
    documents: Sequence[Document], batch_size: int, *, generator: torch.Generator | None
) -> list[list[int]]:
    """Return batches of rows of similar length, so that there is little padding.

    With a generator, rows are shuffled, sorted by length only within every `POOL` batches, and the batches shuffled
    again: an epoch is still nearly a random order. Without one, rows are sorted throughout.
    """
    if generator is None:
        rows = sorted(range(len(documents)), key=lambda row: len(documents[row].tokens))
        return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    rows = torch.randperm(len(documents), generator=generator).tolist()
    pool = POOL * batch_size
    batches = []
    for start in range(0, len(rows), pool):
        by_length = sorted(rows[start : start + pool], key=lambda row: len(documents[row].tokens))
        batches += [by_length[first : first + batch_size] for first in range(0, len(by_length), batch_size)]
    return [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]


def derangement(count: int) -> list[int]:
    """Return a permutation of `count` indices that leaves none in place, the same for every call.

    It is a random cycle through all indices (Sattolo, 1986).
    """
    generator = torch.Generator().manual_seed(count)
    order = torch.randperm(count, generator=generator).tolist()
    successors = dict(zip(order, [*order[1:], *order[:1]], strict=True))
    return [successors[index] for index in range(count)]


def positions(mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"]) -> Int[Tensor, "batch time"]:
    """Return the position of each token in its own text, which padding on the left does not shift."""
    return (mask.long().cumsum(1) - 1).clamp_min(0)


def left_padded(
    rows: Sequence[Sequence[int]], padding: int, device: torch.device
) -> tuple[Int[Tensor, "rows time"], Bool[Tensor, "rows time"]]:
    """Return rows of tokens with `padding` before them, and a mask that is True for the tokens."""
    longest = max(map(len, rows))
    tokens = [[padding] * (longest - len(row)) + [*row] for row in rows]
    mask = [[False] * (longest - len(row)) + [True] * len(row) for row in rows]
    return torch.tensor(tokens, device=device), torch.tensor(mask, device=device)
