"""Examples and their splits. They are divided, thinned and hashed by content, never by position or a global stream."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, combinations, zip_longest

from mopcompress.errors import DataError

PASSAGE_CHARACTERS = 200  # an input this long is a text of its own, and questions about it stay in one split


@dataclass(frozen=True)
class Example:
    """One row: an instruction, perhaps an input (empty if none), and the reference output.

    `where` is the origin for messages (`data.jsonl: line 2`; empty for generated rows). It is not part of the content:
    equality, hashes and SHA-256 ignore it.
    """

    task: str
    instruction: str
    input: str
    output: str
    where: str = field(default="", compare=False)

    @property
    def content(self) -> tuple[str, str, str, str]:
        """The row without its origin: task, instruction, input, output."""
        return self.task, self.instruction, self.input, self.output


@dataclass(frozen=True)
class Splits:
    """The examples of a data set by split. `composed` is empty except in the built-in skills."""

    name: str
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    composed: tuple[Example, ...] = ()
    sha256: str = field(kw_only=True)


def assemble(
    name: str,
    *,
    train: Sequence[Example],
    validation: Sequence[Example],
    test: Sequence[Example],
    composed: Sequence[Example] = (),
) -> Splits:
    """Join the splits with the SHA-256 of their content: all rows in order, without the name."""
    parts = {"train": tuple(train), "validation": tuple(validation), "test": tuple(test), "composed": tuple(composed)}
    canonical = json.dumps([[row.content for row in part] for part in parts.values()], separators=(",", ":"))
    return Splits(name=name, sha256=hashlib.sha256(canonical.encode()).hexdigest(), **parts)


def content_key(seed: int, *parts: str) -> bytes:
    """Return a keyed hash of `parts`. Sorting by it is a shuffle that depends on the seed and the content alone."""
    return hashlib.blake2b(json.dumps(parts).encode(), key=str(seed).encode(), digest_size=16).digest()


def subset(examples: Sequence[Example], count: int | None, *, seed: int) -> tuple[Example, ...]:
    """Choose `count` examples, balanced over tasks: round robin over seeded shuffles, one shuffle per task.

    A larger count extends a smaller one. `None` returns all, in their own order.
    """
    if count is None:
        return tuple(examples)
    by_task: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        by_task[example.task].append(example)
    shuffled = [
        sorted(rows, key=lambda row: content_key(seed, "subset", *row.content)) for _, rows in sorted(by_task.items())
    ]
    turns = chain.from_iterable(zip_longest(*shuffled))
    return tuple(example for example in turns if example is not None)[:count]


def complete_splits(name: str, examples: Mapping[str, Sequence[Example]], *, seed: int) -> Splits:
    """Make all three splits from examples by split: all three, `train` and one other, or a single one of any name.

    A single split is divided 80/10/10. A missing held-out split is a tenth of `train`. Raises `DataError` when a prompt
    is in two splits, or when there are too few prompts to divide.
    """
    parts = dict(examples)
    if len(parts) == 1:
        (only,) = parts.values()
        parts = dict(zip(("train", "validation", "test"), divide(only, (8, 1, 1), seed=seed, name=name), strict=True))
    for held_out in {"validation", "test"} - parts.keys():
        parts["train"], parts[held_out] = divide(parts["train"], (9, 1), seed=seed, name=name)
    parts = {split: parts[split] for split in ("train", "validation", "test")}
    _check_disjoint(name, parts)
    return assemble(name, **parts)


def divide(examples: Sequence[Example], parts: Sequence[int], *, seed: int, name: str) -> list[tuple[Example, ...]]:
    """Divide by a keyed hash of the content into tuples in the proportions of `parts`; rows stay in order.

    Rows with the same prompt, or the same long input, form a group that stays together. Every tuple but the first has
    the rounded number of groups, at least one. Raises `DataError` when there are fewer groups than parts.
    """
    keys = [_group_key(example, seed) for example in examples]
    order = sorted(set(keys))
    if len(order) < len(parts):
        raise DataError(
            f"{name}: {len(order)} distinct prompt(s) cannot be divided into {len(parts)} splits; "
            "give more rows, or a folder with train, validation and test files"
        )
    part_of_key: dict[bytes, int] = {}
    for index, part in reversed(list(enumerate(parts))):
        size = max(1, round(part / sum(parts) * len(order))) if index else len(order)
        part_of_key |= {key: index for key in order[len(part_of_key) :][:size]}
    return [
        tuple(example for example, key in zip(examples, keys, strict=True) if part_of_key[key] == index)
        for index in range(len(parts))
    ]


def _group_key(example: Example, seed: int) -> bytes:
    if len(example.input) >= PASSAGE_CHARACTERS:
        return content_key(seed, "split", example.input)
    return content_key(seed, "split", example.instruction, example.input)


def _check_disjoint(name: str, parts: Mapping[str, Sequence[Example]]) -> None:
    for (first, rows), (second, others) in combinations(parts.items(), 2):
        prompts = {(row.instruction, row.input) for row in rows}
        shared = [number for number, row in enumerate(others, start=1) if (row.instruction, row.input) in prompts]
        if shared:
            raise DataError(
                f"{name}: {len(shared)} of {len(others)} prompts of {second} are in {first} too "
                f"(the first is row {shared[0]} of {second}); remove them, or give one file to be divided"
            )
