"""Phrases that ask for each kind of answer, and phrases that join a second task to a first."""

from collections.abc import Mapping

from mopcompress.data.skills.skill import Kind, Phrasings

FORMS: Mapping[Kind, Phrasings] = {
    "number": Phrasings(
        train=(
            "Answer with the number only.",
            "Give just the number, in digits.",
            "Reply with a number and nothing else.",
        ),
        validation=("Write only the number, in digits.", "The answer must be a bare number."),
        test=("Your reply should be the number alone.", "Respond with nothing but the number."),
    ),
    "numbers": Phrasings(
        train=(
            "Separate the numbers with commas.",
            "Answer with a comma-separated list of numbers.",
            "Use commas between numbers.",
        ),
        validation=("Write the numbers with commas between them.", "Give the numbers, split by commas."),
        test=("List the numbers, comma-separated.", "Put a comma after each number but the last."),
    ),
    "word": Phrasings(
        train=("Answer with one word.", "Reply with a single word.", "Give one word and nothing else."),
        validation=("Write one word only.", "The answer is a single word."),
        test=("Respond with just one word.", "Your reply should be one word."),
    ),
    "words": Phrasings(
        train=(
            "Separate the words with commas.",
            "Answer with a comma-separated list of words.",
            "Use commas between words.",
        ),
        validation=("Write the words with commas between them.", "Give the words, split by commas."),
        test=("List the words, comma-separated.", "Put a comma after each word but the last."),
    ),
    "sentence": Phrasings(
        train=(
            "Answer with the new sentence only.",
            "Give just the new sentence.",
            "Reply with one sentence and nothing else.",
        ),
        validation=("Write only the changed sentence.", "The answer is the new sentence alone."),
        test=("Respond with just the sentence.", "Your reply should be the sentence by itself."),
    ),
    "date": Phrasings(
        train=(
            "Write it as day, month name and year.",
            "Answer with day, month name, year.",
            "Give day, month name and year only.",
        ),
        validation=("Reply in the order day, month name, year.", "The answer is a day, a month name and a year."),
        test=("Respond with the day, the month name and the year.", "Use day, then month name, then year."),
    ),
    "text": Phrasings(
        train=("Answer with the result only.", "Give the result and nothing else.", "Reply with just the result."),
        validation=("Write only the result.", "The answer is the bare result."),
        test=("Respond with the result alone.", "Your reply should be the result by itself."),
    ),
    "yes or no": Phrasings(
        train=("Answer yes or no.", "Reply with yes or no only.", "Say yes or no."),
        validation=("Write yes or no.", "The answer is yes or no."),
        test=("Respond with yes or no.", "Your reply should be yes or no."),
    ),
}

JOINS = ("Then {}.", "After that, {}.", "Next, {}.")
