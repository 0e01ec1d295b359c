"""ROUGE-L (Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004, https://aclanthology.org/W04-1013/).

As Google's rouge_score 0.1.2 has it without stemming: words are runs of letters and digits in lower case, and precision
and recall weigh the same (section 3.1 with beta 1). Two differences, neither of which touches English words: letters of
every alphabet count, not a to z alone; and a text without any word (`<=`) is what white space parts it into, where
rouge_score has nothing to compare and gives 0.
"""

import re


def words(text: str) -> list[str]:
    """What two texts are compared by."""
    return re.findall(r"[^\W_]+", text.lower()) or text.split()


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words: 0 when none is shared, 1 when the words are the same."""
    wrote, wanted = words(answer), words(reference)
    shared = longest_common_subsequence(wrote, wanted)
    return 2 * shared / (len(wrote) + len(wanted)) if shared else 0.0


def same_words(answer: str, reference: str) -> bool:
    """Exact match, but for case, punctuation and white space."""
    return words(answer) == words(reference)


def longest_common_subsequence(first: list[str], second: list[str]) -> int:
    """Length of the longest list that both hold in order, gaps allowed. O(len(first) len(second)) time."""
    before = [0] * (len(second) + 1)  # entry j: of what was read of `first` and the first j of `second`
    for word in first:
        here = [0]
        for place, other in enumerate(second):
            here.append(before[place] + 1 if word == other else max(before[place + 1], here[place]))
        before = here
    return before[-1]
