"""ROUGE-L by its definition, and cases whose values follow from the documentation of rouge_score."""

import random

import pytest

from mopcompress.evaluation.rouge import longest_common_subsequence, rouge_l, same_words, words


def slow_lcs(first: list[str], second: list[str]) -> int:
    """Return the length of the longest common subsequence, by recursion on the ends (Lin 2004)."""
    if not first or not second:
        return 0
    if first[-1] == second[-1]:
        return 1 + slow_lcs(first[:-1], second[:-1])
    return max(slow_lcs(first[:-1], second), slow_lcs(first, second[:-1]))


def texts(seed: int) -> tuple[list[str], list[str]]:
    drawn = random.Random(seed)
    first, second = ([drawn.choice("abcd") for _ in range(drawn.randint(0, 9))] for _ in range(2))
    return first, second


@pytest.mark.parametrize("seed", range(60))
def test_the_common_subsequence_is_the_recursions(seed: int) -> None:
    first, second = texts(seed)
    assert longest_common_subsequence(first, second) == slow_lcs(first, second)


@pytest.mark.parametrize("seed", range(60))
def test_the_score_is_f1_of_precision_and_recall(seed: int) -> None:
    answer, reference = texts(seed)
    common = slow_lcs(answer, reference)
    expected = 0.0
    if common:
        precision, recall = common / len(answer), common / len(reference)
        expected = 2 * precision * recall / (precision + recall)
    assert rouge_l(" ".join(answer), " ".join(reference)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("testing one two", "testing", 0.5),  # of rouge_score's tests: P 1/3, R 1
        ("the gunman kill police", "police killed the gunman", 2 / 4),  # Lin 2004, section 3.1: "the gunman" alone
        ("police kill the gunman", "police killed the gunman", 3 / 4),  # Lin 2004: no stemming, so three words
        ("gunman the killed police", "police killed the gunman", 1 / 4),
        ("The  CAT, sat!", "the cat sat", 1.0),
        ("snake_case", "snake case", 1.0),
        ("don't", "don t", 1.0),
        ("3.14", "3 14", 1.0),
        ("yes", "no", 0.0),
        ("", "yes", 0.0),
        ("...", "yes", 0.0),
        ("", "", 0.0),
    ],
)
def test_known_scores(answer: str, reference: str, score: float) -> None:
    assert rouge_l(answer, reference) == pytest.approx(score)
    assert rouge_l(reference, answer) == pytest.approx(score)


def test_letters_of_every_alphabet_are_words() -> None:
    assert words("Äpfel, Über_Straße 7") == ["äpfel", "über", "straße", "7"]
    assert rouge_l("Москва", "москва.") == 1


def test_texts_without_words_are_compared_by_their_signs() -> None:
    assert (rouge_l("<=", "<="), rouge_l("<=", ">=")) == (1, 0)
    assert same_words(" <= ", "<=")
    assert not same_words("<=", ">=")


@pytest.mark.parametrize(("answer", "same"), [("The Answer.", True), ("answer the", False), ("the answer is", False)])
def test_the_same_words_in_order_are_a_match(answer: str, same: bool) -> None:
    assert same_words(answer, "the answer") is same
    assert (rouge_l(answer, "the answer") == 1) is same
