"""Lists of words and of numbers: keep what meets a condition, or count it."""

from collections.abc import Callable

from mopcompress.data.skills.draw import Draw
from mopcompress.data.skills.skill import FollowUp, Phrasings, Question, Skill
from mopcompress.data.skills.words import THINGS


def word_condition(draw: Draw, words: list[str]) -> tuple[str, Callable[[str], bool]]:
    """A description of some words, and whether it holds for a word."""
    letter, length = draw.random.choice("aeiloprst"), draw.random.randint(4, 6)
    initial = draw.random.choice(words)[0]
    return draw.random.choice(
        (
            (f"the words that contain the letter {letter}", lambda word: letter in word),
            (f"the words that start with {initial}", lambda word: word.startswith(initial)),
            (f"the words that end with {letter}", lambda word: word.endswith(letter)),
            (f"the words with more than {length} letters", lambda word: len(word) > length),
            (f"the words with fewer than {length + 1} letters", lambda word: len(word) <= length),
        )
    )


def number_condition(draw: Draw) -> tuple[str, Callable[[str], bool]]:
    """A description of some numbers, and whether it holds for a number."""
    limit = draw.number(10, 90)
    return draw.random.choice(
        (
            ("the even numbers", lambda number: int(number) % 2 == 0),
            ("the odd numbers", lambda number: int(number) % 2 == 1),
            (f"the numbers above {limit}", lambda number: int(number) > limit),
            (f"the numbers below {limit}", lambda number: int(number) < limit),
        )
    )


def question(draw: Draw) -> Question:
    """At least two items are kept and at least one is not."""
    while True:
        numeric, count = draw.random.random() < 0.5, draw.random.randint(5, 6)
        items = [str(number) for number in draw.numbers(count, 2, 99)] if numeric else draw.some(THINGS, count)
        wanted, holds = number_condition(draw) if numeric else word_condition(draw, items)
        kept = [item for item in items if holds(item)]
        if 2 <= len(kept) < len(items):
            break
    if draw.random.random() < 0.4:
        return Question(f"count {wanted}", ", ".join(items), str(len(kept)), "number")
    return Question(f"keep only {wanted}", ", ".join(items), ", ".join(kept), "numbers" if numeric else "words")


def count_words(draw: Draw, answer: str) -> FollowUp | None:
    """None if it matters whether a capital counts as the letter."""
    words = answer.split(", ")
    wanted, holds = word_condition(draw, words)
    if any(holds(word) != holds(word.lower()) for word in words):
        return None
    return FollowUp(f"count {wanted}", str(sum(map(holds, words))), "number")


def keep_numbers(draw: Draw, answer: str) -> FollowUp | None:
    """None if nothing or everything would be kept."""
    numbers = answer.split(", ")
    wanted, holds = number_condition(draw)
    kept = [number for number in numbers if holds(number)]
    if not 0 < len(kept) < len(numbers):
        return None
    return FollowUp(f"keep only {wanted}", ", ".join(kept), "numbers")


def count_sentence(draw: Draw, answer: str) -> FollowUp:
    return FollowUp("count the words of the new sentence", str(len(answer.split())), "number")


SELECTING = Skill(
    name="selecting",
    phrasings=Phrasings(
        train=(
            "From the list, {}.",
            "Look at the list and {}.",
            "Go through the items and {}.",
            "Here is a list: {}.",
            "Please read the list and {}.",
            "Check each item and {}.",
            "In this list, {}.",
            "Given these items, {}.",
        ),
        validation=(
            "Inspect the list and {}.",
            "Among these items, {}.",
            "Run down the list and {}.",
            "For the list shown, {}.",
            "Take every item in turn and {}.",
            "With these items, {}.",
        ),
        test=(
            "Scan the entries and {}.",
            "Out of these entries, {}.",
            "Examine the items one by one and {}.",
            "Filter the list: {}.",
            "Your task on this list: {}.",
            "Walk through the entries and {}.",
        ),
    ),
    kinds=frozenset({"words", "numbers", "number"}),
    question=question,
    follow_ups={"words": count_words, "numbers": keep_numbers, "sentence": count_sentence},
)
