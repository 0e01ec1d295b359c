"""Batches of documents of similar length, and padding."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mopcompress.data.encoding import Document

POOL = 16  # batches that rows of one length are gathered from


def batches_by_length(
    documents: Sequence[Document], batch_size: int, *, generator: torch.Generator | None
) -> list[list[int]]:
    """Rows in batches of similar length, so that little is padding.

    With a generator: shuffled, sorted by length only inside every `POOL` batches, and the batches shuffled again, so
    that an epoch is still nearly a random order. Without one: sorted throughout.
    """
    if generator is None:
        rows = sorted(range(len(documents)), key=lambda row: len(documents[row].tokens))
        return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    rows = torch.randperm(len(documents), generator=generator).tolist()
    pool = POOL * batch_size
    batches = []
    for start in range(0, len(rows), pool):
        near = sorted(rows[start : start + pool], key=lambda row: len(documents[row].tokens))
        batches += [near[first : first + batch_size] for first in range(0, len(near), batch_size)]
    return [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]


def derangement(count: int) -> list[int]:
    """A random cycle through `count` places (Sattolo, 1986), the same whenever it is asked for: none stays."""
    generator = torch.Generator().manual_seed(count)
    order = torch.randperm(count, generator=generator).tolist()
    following = dict(zip(order, [*order[1:], *order[:1]], strict=True))
    return [following[place] for place in range(count)]


def positions(mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"]) -> Int[Tensor, "batch time"]:
    """Where each token stands in its own text: padding on the left counts for nothing."""
    return (mask.long().cumsum(1) - 1).clamp_min(0)


def left_padded(
    rows: Sequence[Sequence[int]], padding: int, device: torch.device
) -> tuple[Int[Tensor, "rows time"], Bool[Tensor, "rows time"]]:
    """Tokens with padding before them, and which are no padding."""
    longest = max(map(len, rows))
    tokens = [[padding] * (longest - len(row)) + [*row] for row in rows]
    mask = [[False] * (longest - len(row)) + [True] * len(row) for row in rows]
    return torch.tensor(tokens, device=device), torch.tensor(mask, device=device)
