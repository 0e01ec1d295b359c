"""Lists of words and of numbers, put in order."""

from mopcompress.data.skills.draw import Draw
from mopcompress.data.skills.skill import FollowUp, Phrasings, Question, Skill
from mopcompress.data.skills.words import THINGS


def question(draw: Draw) -> Question:
    count, backwards = draw.random.randint(3, 5), draw.random.random() < 0.5
    if draw.random.random() < 0.5:
        words = draw.some(THINGS, count)
        ask = "from Z to A" if backwards else "from A to Z"
        return Question(ask, ", ".join(words), ", ".join(sorted(words, reverse=backwards)), "words")
    numbers = draw.numbers(count, 2, 200)
    ask = "from largest to smallest" if backwards else "from smallest to largest"
    ordered = sorted(numbers, reverse=backwards)
    return Question(ask, ", ".join(map(str, numbers)), ", ".join(map(str, ordered)), "numbers")


def sort_words(draw: Draw, answer: str) -> FollowUp | None:
    """None for a list that is too short, or already in order."""
    ordered = ", ".join(sorted(answer.split(", ")))
    return None if ordered == answer else FollowUp("sort the words from A to Z", ordered, "words")


def sort_numbers(draw: Draw, answer: str) -> FollowUp | None:
    """None for a list that is too short, or already in order."""
    ordered = ", ".join(sorted(answer.split(", "), key=int, reverse=True))
    return None if ordered == answer else FollowUp("sort the numbers from largest to smallest", ordered, "numbers")


SORTING = Skill(
    name="sorting",
    phrasings=Phrasings(
        train=(
            "Sort the list {}.",
            "Put these items in order {}.",
            "Arrange the list {}.",
            "Order the items {}.",
            "Please sort this {}.",
            "Rearrange the items {}.",
            "Write the list in order {}.",
            "Make a sorted list, {}.",
        ),
        validation=(
            "Place the items in sequence {}.",
            "Return the list sorted {}.",
            "Line these up {}.",
            "Reorder everything {}.",
            "Give the items in order, {}.",
            "I need this list sorted {}.",
        ),
        test=(
            "Rank the items {}.",
            "Show the list ordered {}.",
            "Organise the entries {}.",
            "Bring the list into order {}.",
            "Set out the entries {}.",
            "The items should be sorted {}.",
        ),
    ),
    kinds=frozenset({"words", "numbers"}),
    question=question,
    follow_ups={"words": sort_words, "numbers": sort_numbers},
)
