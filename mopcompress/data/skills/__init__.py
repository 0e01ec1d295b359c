"""Instruction data made on the spot: twelve families of short tasks, each item with one computed answer.

draw        the words and numbers of one split; splits share none
words       the words that several families use
skill       the parts of a family: phrasings, questions, follow-ups
forms       phrases that ask for each kind of answer
generation  all of it phrased, split and composed

One family each: arithmetic, dates, units, sorting, selecting, strings, records, classification, reshaping, code,
rewriting, reading.
"""

from mopcompress.data.skills.generation import SKILLS, generate

__all__ = ["SKILLS", "generate"]
