"""All families phrased, split, and composed two by two. No other module composes prompts.

Every sequence of random numbers is keyed by its purpose (`0/sorting/train`), so a change of one family does not change
the others.
"""

from itertools import cycle, product
from random import Random

from mopcompress.data.skills.arithmetic import ARITHMETIC
from mopcompress.data.skills.classification import CLASSIFICATION
from mopcompress.data.skills.code import CODE
from mopcompress.data.skills.dates import DATES
from mopcompress.data.skills.draw import Draw, Split
from mopcompress.data.skills.forms import FORMS, JOINS
from mopcompress.data.skills.reading import READING
from mopcompress.data.skills.records import RECORDS
from mopcompress.data.skills.reshaping import RESHAPING
from mopcompress.data.skills.rewriting import REWRITING
from mopcompress.data.skills.selecting import SELECTING
from mopcompress.data.skills.skill import Kind, Question, Skill
from mopcompress.data.skills.sorting import SORTING
from mopcompress.data.skills.strings import STRINGS
from mopcompress.data.skills.units import UNIT_CONVERSION
from mopcompress.data.splits import Example, Splits, assemble

SKILLS: tuple[Skill, ...] = (
    *(ARITHMETIC, DATES, UNIT_CONVERSION, SORTING, SELECTING, STRINGS),
    *(RECORDS, CLASSIFICATION, RESHAPING, CODE, REWRITING, READING),
)
ROWS_PER_FAMILY: dict[Split, int] = {"train": 200, "validation": 25, "test": 40}
COMPOSED_ROWS = 120


def generate(seed: int) -> Splits:
    """All splits, families taking turns.

    `composed` draws the phrasings and words of `test`: the only news in it is that there are two tasks at once.
    """
    return assemble(
        "skills",
        train=rows(seed, "train"),
        validation=rows(seed, "validation"),
        test=rows(seed, "test"),
        composed=composed_rows(seed),
    )


def rows(seed: int, split: Split) -> list[Example]:
    """The examples of all families in one split, in turn."""
    families = [family_rows(skill, Draw(split, Random(f"{seed}/{skill.name}/{split}"))) for skill in SKILLS]
    return [example for turn in zip(*families, strict=True) for example in turn]


def family_rows(skill: Skill, draw: Draw) -> list[Example]:
    """Examples with different questions: a phrasing alone does not make a new one."""
    questions: dict[tuple[str, str], Question] = {}
    while len(questions) < ROWS_PER_FAMILY[draw.split]:
        question = skill.question(draw)
        questions.setdefault((question.ask, question.input), question)
    return [
        Example(
            skill.name,
            f"{phrased(skill, question, draw)} {asked_for(question.kind, draw)}",
            question.input,
            question.answer,
        )
        for question in questions.values()
    ]


def phrased(skill: Skill, question: Question, draw: Draw) -> str:
    return draw.random.choice(skill.phrasings.of(draw.split)).format(question.ask)


def asked_for(kind: Kind, draw: Draw) -> str:
    return draw.random.choice(FORMS[kind].of(draw.split))


def composed_rows(seed: int) -> list[Example]:
    """Examples of two tasks, the second on the answer to the first; every pair of families that fits takes its turn."""
    pairs = [
        (first, second)
        for first, second in product(SKILLS, SKILLS)
        if first is not second and first.kinds & second.follow_ups.keys()
    ]
    draw = Draw("test", Random(f"{seed}/composed"))
    draw.random.shuffle(pairs)
    found: dict[tuple[str, str], Example] = {}
    for first, second in cycle(pairs):
        example = composed(first, second, draw)
        found.setdefault((example.instruction, example.input), example)
        if len(found) == COMPOSED_ROWS:
            break
    return list(found.values())


def composed(first: Skill, second: Skill, draw: Draw) -> Example:
    """A question of `first`, then a follow-up of `second`; drawn again until the answer to the one suits the other."""
    while True:
        question = first.question(draw)
        go_on = second.follow_ups.get(question.kind)
        follow_up = go_on(draw, question.answer) if go_on else None
        if follow_up is not None:
            break
    then = draw.random.choice(JOINS).format(follow_up.ask)
    instruction = f"{phrased(first, question, draw)} {then} {asked_for(follow_up.kind, draw)}"
    return Example(f"{first.name}+{second.name}", instruction, question.input, follow_up.answer)
