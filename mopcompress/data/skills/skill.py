"""The parts of a family of instructions: phrasings, questions, and follow-ups to the answer of another family."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from mopcompress.data.skills.draw import Draw, Split

Kind = Literal["number", "numbers", "word", "words", "sentence", "date", "text", "yes or no"]


@dataclass(frozen=True)
class Question:
    """One item before it is phrased.

    `ask` fills the hole of a phrasing, `answer` is the only right one, `kind` decides what form is asked for.
    """

    ask: str
    input: str
    answer: str
    kind: Kind


@dataclass(frozen=True)
class FollowUp:
    """A second task on the answer to a first: "then `ask`", with the answer after both."""

    ask: str
    answer: str
    kind: Kind


@dataclass(frozen=True)
class Phrasings:
    """Sentences of each split; no sentence is in two splits."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]

    def of(self, split: Split) -> tuple[str, ...]:
        return {"train": self.train, "validation": self.validation, "test": self.test}[split]


@dataclass(frozen=True)
class Skill:
    """A family of instructions. Each phrasing has one hole, ``{}``, for `Question.ask`.

    `kinds` are the kinds of answer that `question` can give. `follow_ups` holds, for each kind of answer this skill can
    work on, a function from that answer to a second task, or to None if the answer does not suit (a list of one word
    cannot be sorted).
    """

    name: str
    phrasings: Phrasings
    kinds: frozenset[Kind]
    question: Callable[[Draw], Question]
    follow_ups: Mapping[Kind, Callable[[Draw, str], FollowUp | None]] = field(default_factory=dict)
