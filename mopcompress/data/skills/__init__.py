"""Instruction data made on the spot: twelve families of short tasks, each item with one computed answer.

draw        what one split may draw; no word or number list is shared between splits
words       the words that several families use
skill       what a family is: phrasings, a question, follow-ups
forms       how an answer of each kind is asked for
generation  all of it phrased, split and composed

One family each: arithmetic, dates, units, sorting, selecting, strings, records, classification, reshaping, code,
rewriting, reading.
"""

from mopcompress.data.skills.generation import SKILLS, generate

__all__ = ["SKILLS", "generate"]
