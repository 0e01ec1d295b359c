"""ROUGE-L (Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004, https://aclanthology.org/W04-1013/).

The definition is that of Google's rouge_score 0.1.2 without stemming: words are runs of letters and digits in lower
case, and precision and recall weigh the same (section 3.1 with beta 1). Two differences leave English words alone.
Letters of every alphabet count, not only a to z. A text without any word, such as `<=`, is split at white space;
rouge_score has nothing to compare there and gives 0.
"""

import re


def words(text: str) -> list[str]:
    """Split a text into the words that it is compared by."""
    return re.findall(r"[^\W_]+", text.lower()) or text.split()


def rouge_l(answer: str, reference: str) -> float:
    """Return F1 of the longest common subsequence of words: 0 without a common word, 1 for the same words."""
    answer_words, reference_words = words(answer), words(reference)
    common = longest_common_subsequence(answer_words, reference_words)
    return 2 * common / (len(answer_words) + len(reference_words)) if common else 0.0


def same_words(answer: str, reference: str) -> bool:
    """Return True for an exact match, case, punctuation and white space aside."""
    return words(answer) == words(reference)


def longest_common_subsequence(first: list[str], second: list[str]) -> int:
    """Return the length of the longest list that both contain in order, gaps allowed.

    O(len(first) len(second)) time.
    """
    lengths = [0] * (len(second) + 1)  # entry j: for the words of `first` so far, and the first j words of `second`
    for word in first:
        longer = [0]
        for index, other in enumerate(second):
            longer.append(lengths[index] + 1 if word == other else max(lengths[index + 1], longer[index]))
        lengths = longer
    return lengths[-1]
