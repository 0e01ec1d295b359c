"""Letters of a word moved, removed, replaced or counted; pairs of words joined or swapped."""

from mopcompress.data.skills.draw import Draw
from mopcompress.data.skills.skill import FollowUp, Phrasings, Question, Skill
from mopcompress.data.skills.words import COLOURS, THINGS


def one_word(draw: Draw, word: str) -> FollowUp:
    old, new = draw.random.choice(sorted(set(word))), draw.random.choice("xyz")
    return draw.random.choice(
        (
            FollowUp("write the word backwards", word[::-1], "text"),
            FollowUp("write the word in capital letters", word.upper(), "text"),
            FollowUp("remove every vowel", "".join(letter for letter in word if letter not in "aeiou"), "text"),
            FollowUp("give the first three letters", word[:3], "text"),
            FollowUp("give the last two letters", word[-2:], "text"),
            FollowUp("double the last letter", word + word[-1], "text"),
            FollowUp("put a dash between all letters", "-".join(word), "text"),
            FollowUp("move the first letter to the end", word[1:] + word[0], "text"),
            FollowUp(f"replace every {old} with {new}", word.replace(old, new), "text"),
            FollowUp("count the letters", str(len(word)), "number"),
        )
    )


def two_words(draw: Draw, first: str, second: str) -> FollowUp:
    return draw.random.choice(
        (
            FollowUp("swap the two words", f"{second} {first}", "text"),
            FollowUp("join the two words with a dash", f"{first}-{second}", "text"),
            FollowUp("write only the second word in capital letters", f"{first} {second.upper()}", "text"),
            FollowUp("drop the first word", second, "text"),
        )
    )


def question(draw: Draw) -> Question:
    if draw.random.random() < 0.7:
        text = draw.one(THINGS)
        task = one_word(draw, text)
    else:
        first, second = draw.one(COLOURS), draw.one(THINGS)
        text, task = f"{first} {second}", two_words(draw, first, second)
    return Question(task.ask, text, task.answer, task.kind)


def word_on(draw: Draw, answer: str) -> FollowUp:
    """Only what is clear for a word that may begin with a capital."""
    return draw.random.choice(
        (
            FollowUp("write the answer in capital letters", answer.upper(), "text"),
            FollowUp("give the last two letters of the answer", answer[-2:], "text"),
            FollowUp("count the letters of the answer", str(len(answer)), "number"),
        )
    )


def words_on(draw: Draw, answer: str) -> FollowUp:
    words = answer.split(", ")
    place, word = draw.random.choice((("first", words[0]), ("last", words[-1])))
    return draw.random.choice(
        (
            FollowUp(f"write only the {place} word, in capital letters", word.upper(), "text"),
            FollowUp(f"write only the {place} word, backwards", word[::-1], "text"),
            FollowUp("join the words with dashes", "-".join(words), "text"),
        )
    )


def sentence_on(draw: Draw, answer: str) -> FollowUp:
    return FollowUp("put the new sentence in capital letters", answer.upper(), "sentence")


STRINGS = Skill(
    name="strings",
    phrasings=Phrasings(
        train=(
            "Take the text and {}.",
            "With the text given, {}.",
            "For the text shown, {}.",
            "Change the text as follows: {}.",
            "Please {}.",
            "I have a text. Could you {}?",
            "Edit the text: {}.",
            "Follow this order exactly: {}.",
        ),
        validation=(
            "Work on the text: {}.",
            "Do this with the text: {}.",
            "Starting from the text, {}.",
            "Apply this step: {}.",
            "Your job is to {}.",
            "Given some text, {}.",
        ),
        test=(
            "Using the text, {}.",
            "Carry out this edit: {}.",
            "The task is to {}.",
            "Modify the string like this: {}.",
            "Handle the text like this: {}.",
            "Kindly {}.",
        ),
    ),
    kinds=frozenset({"text", "number"}),
    question=question,
    follow_ups={"word": word_on, "words": words_on, "sentence": sentence_on},
)
