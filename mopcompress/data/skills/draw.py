"""Random choices that stay inside one split: no word or number is drawn for both training and testing.

One rule decides: the k-th word of a list, and the number k, belong to the split ``TURNS[k % 11]``. It does not depend
on the seed, so a model trained with one seed can be tested with another. 11 shares no factor with 7, 10 or 12, so no
split has only Mondays or only even numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, TypeVar

T = TypeVar("T")
Split = Literal["train", "validation", "test"]
TURNS: tuple[Split, ...] = (
    *("train", "test", "train", "validation", "train", "test"),
    *("train", "train", "validation", "test", "train"),
)


def share(words: Sequence[T], split: Split) -> list[T]:
    """The words of the list that belong to the split, in order."""
    return [word for place, word in enumerate(words) if TURNS[place % len(TURNS)] == split]


@dataclass(frozen=True)
class Draw:
    """Draws for one split. What all splits share (months, units, operations) is chosen with `random` itself."""

    split: Split
    random: Random

    def one(self, words: Sequence[T]) -> T:
        return self.random.choice(share(words, self.split))

    def some(self, words: Sequence[T], count: int) -> list[T]:
        """`count` different words."""
        return self.random.sample(share(words, self.split), count)

    def number(self, low: int, high: int) -> int:
        """A number of this split from `low` to `high`, both included."""
        return self.numbers(1, low, high)[0]

    def numbers(self, count: int, low: int, high: int) -> list[int]:
        """`count` different numbers of this split from `low` to `high`, both included."""
        mine = [number for number in range(low, high + 1) if TURNS[number % len(TURNS)] == self.split]
        return self.random.sample(mine, count)
