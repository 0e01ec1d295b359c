"""The built-in data: every answer is worked out again here, slowly, from the text of the prompt alone."""

import csv
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta
from functools import cache
from itertools import chain, combinations, product
from random import Random

import pytest

from mopcompress.data.skills import SKILLS, generate, rewriting, words
from mopcompress.data.skills.classification import MOODS, SUBJECTS, TOPICS
from mopcompress.data.skills.draw import TURNS, Draw, share
from mopcompress.data.skills.forms import FORMS, JOINS
from mopcompress.data.skills.generation import composed, family_rows
from mopcompress.data.skills.skill import Skill
from mopcompress.data.splits import Example, Splits

SPLITS = ("train", "validation", "test")
NAMES = [skill.name for skill in SKILLS]
generate_cached = cache(generate)


@pytest.fixture(scope="module", params=(0, 1))
def splits(request: pytest.FixtureRequest) -> Splits:
    return generate_cached(request.param)


def fits(first: Skill, second: Skill) -> bool:
    """True when `second` can continue from some answer of `first`."""
    return first is not second and any(kind in second.follow_ups for kind in first.kinds)


# The slow definitions: task -> answer from (instruction, input).


def groups(pattern: str, text: str) -> tuple[str, ...]:
    match = re.search(pattern, text)
    assert match, f"{pattern!r} is not in {text!r}"
    return match.groups()


def number_in(word: str) -> int:
    """Read digits, or words such as forty-two as the sum of their parts."""
    if word.isdigit():
        return int(word)
    small = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
    tens = "ten twenty thirty forty fifty sixty seventy eighty ninety"
    values = {name: value for value, name in enumerate([*words.listed(small), "seventeen", "eighteen", "nineteen"])}
    values |= {name: 10 * count for count, name in enumerate(words.listed(tens), start=1)}
    return sum(values[part] for part in word.split("-"))


def arithmetic(instruction: str, text: str) -> str:
    if "buys" in text:
        first, second = map(number_in, groups(r"has (\S+) .* buys (\S+) more", text))
        return str(first + second)
    if "gives away" in text:
        first, second = map(number_in, groups(r"has (\S+) .* gives away (\S+)\.", text))
        return str(first - second)
    if "boxes" in text:
        first, second = map(number_in, groups(r"has (\S+) boxes with (\S+) ", text))
        return str(sum(second for _ in range(first)))
    first, second = map(number_in, groups(r"shares (\S+) .* among (\S+) people", text))
    assert first % second == 0
    return str(first // second)


def day_in(text: str) -> datetime:
    return datetime.strptime(text, "%d %B %Y")


def written(day: datetime) -> str:
    return day.strftime("%d %B %Y").removeprefix("0")


def dates(instruction: str, text: str) -> str:
    if " and " in text:
        first, second = map(day_in, text.split(" and "))
        assert "from the first date to the second" in instruction
        return str((second - first).days)
    count, unit, direction = groups(r"(\d+) (day|week)s? (after|before) this one", instruction)
    step = timedelta(days=int(count) * {"day": 1, "week": 7}[unit]) * {"after": 1, "before": -1}[direction]
    if "weekday" in instruction:
        monday = datetime(2024, 1, 1)
        week = {(monday + timedelta(days=k)).strftime("%A"): monday + timedelta(days=k) for k in range(7)}
        return (week[text] + step).strftime("%A")
    return written(day_in(text) + step)


SIZES = {
    **{"millimetres": 1, "centimetres": 10, "metres": 1000, "kilometres": 1000 * 1000},
    **{"grams": 1, "kilograms": 1000, "tonnes": 1000 * 1000, "millilitres": 1, "litres": 1000},
    **{"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400, "weeks": 7 * 86400},
    **{"months": 1, "years": 12, "centuries": 1200, "inches": 1, "feet": 12, "yards": 36},
    **{"pints": 1, "gallons": 8, "ounces": 1, "pounds": 16},
}


def units(instruction: str, text: str) -> str:
    (unit,) = (word for word in re.findall(r"\w+", instruction) if word in SIZES)
    amount = sum(int(count) * SIZES[name] for count, name in re.findall(r"(\d+) (\w+)", text))
    assert amount % SIZES[unit] == 0
    return str(amount // SIZES[unit])


def ordered(items: list[str], direction: str) -> list[str]:
    """Take the smallest (or the largest) left, again and again."""
    measure: Callable[[str], object] = str if direction in ("from A to Z", "from Z to A") else int
    choose = min if direction in ("from A to Z", "from smallest to largest") else max
    left, result = list(items), []
    while left:
        result.append(choose(left, key=measure))
        left.remove(result[-1])
    return result


DIRECTION = r"(from A to Z|from Z to A|from smallest to largest|from largest to smallest)"


def sorting(instruction: str, text: str) -> str:
    return ", ".join(ordered(text.split(", "), *groups(DIRECTION, instruction)))


CONDITIONS: dict[str, Callable[[str, str], bool]] = {
    r"that contain the letter (\w)": lambda item, letter: item.count(letter) > 0,
    r"that start with (\w)": lambda item, letter: item[0] == letter,
    r"that end with (\w)": lambda item, letter: item[-1] == letter,
    r"with more than (\d) letters": lambda item, length: len(item) > int(length),
    r"with fewer than (\d) letters": lambda item, length: len(item) < int(length),
    r"the (even) numbers": lambda item, _: item[-1] in "02468",
    r"the (odd) numbers": lambda item, _: item[-1] in "13579",
    r"numbers above (\d+)": lambda item, limit: int(item) > int(limit),
    r"numbers below (\d+)": lambda item, limit: int(item) < int(limit),
}


def selecting(instruction: str, text: str) -> str:
    (pattern,) = (pattern for pattern in CONDITIONS if re.search(pattern, instruction))
    matching = [item for item in text.split(", ") if CONDITIONS[pattern](item, *groups(pattern, instruction))]
    return str(len(matching)) if "count the" in instruction else ", ".join(matching)


def strings(instruction: str, text: str) -> str:
    if "replace every" in instruction:
        old, new = groups(r"replace every (\w) with (\w)", instruction)
        return "".join(new if letter == old else letter for letter in text)
    first, _, second = text.partition(" ")
    answers = {
        "write the word backwards": "".join(reversed(text)),
        "write the word in capital letters": text.upper(),
        "remove every vowel": re.sub("[aeiou]", "", text),
        "give the first three letters": text[0] + text[1] + text[2],
        "give the last two letters": text[len(text) - 2] + text[len(text) - 1],
        "double the last letter": re.sub(r"(.)$", r"\1\1", text),
        "put a dash between all letters": re.sub(r"(?<=.)(?=.)", "-", text),
        "move the first letter to the end": re.sub(r"^(.)(.*)$", r"\2\1", text),
        "count the letters": str(sum(1 for _ in text)),
        "swap the two words": second + " " + first,
        "join the two words with a dash": text.replace(" ", "-"),
        "write only the second word in capital letters": first + " " + second.upper(),
        "drop the first word": second,
    }
    (task,) = (task for task in answers if task in instruction)
    return answers[task]


def records(instruction: str, text: str) -> str:
    if ":" in text:
        fields = dict(field.split(": ") for field in text.split("; "))
        (wanted,) = (name for name in fields if f"the {name}" in instruction)
        return fields[wanted]
    rows = [row.split(", ") for row in text.split("; ")]
    if "of the people in" in instruction:
        column, place = groups(r"the (names|ages) of the people in (\w+)", instruction)
        return ", ".join(row[("names", "ages").index(column)] for row in rows if row[2] == place)
    column, key = groups(r"the (name|age|job) of (?:the )?(\w+)", instruction)
    (row,) = (row for row in rows if key in row)
    return row[("name", "age", "job").index(column)]


def classification(instruction: str, text: str) -> str:
    present = set(re.findall(r"\w+", text))
    labels = [label for label, clues in {**MOODS, **TOPICS}.items() if present & set(clues)]
    assert len(labels) == 1, text
    assert re.search(rf"\b{labels[0]}\b", instruction)
    return labels[0]


def reshaping(instruction: str, text: str) -> str:
    content: dict[str, str] | list[str]
    if text[0] in "[{":
        loaded = json.loads(text)
        content = loaded if isinstance(loaded, list) else {name: str(value) for name, value in loaded.items()}
    elif "=" in text:
        content = dict(pair.split("=") for pair in text.split(" "))
    elif "\n" in text:
        header, row = csv.reader(text.splitlines())
        content = dict(zip(header, row, strict=True))
    else:
        content = text.split(", ")
    if isinstance(content, list):
        return ", ".join(content) if "plain words" in instruction else str(content).replace("'", '"')
    if "JSON object" in instruction:
        pairs = [f'"{name}": {value}' if value.isdigit() else f'"{name}": "{value}"' for name, value in content.items()]
        return "{" + ", ".join(pairs) + "}"
    if "CSV" in instruction:
        return ",".join(content) + "\n" + ",".join(content.values())
    assert "name=value" in instruction
    return " ".join(map("=".join, content.items()))


def code(instruction: str, text: str) -> str:
    scope: dict[str, object] = {}
    exec(text, scope)
    return str(scope[groups(r"the final value of (\w+)", instruction)[0]])


def rewriting_(instruction: str, text: str) -> str:
    of_form = {form: verb for verb in rewriting.VERBS for form in verb}
    if "could you please" in instruction:
        return f"Could you please {text[0].lower()}{text[1:-1]}?"
    if "active voice" in instruction:
        thing, participle, person = groups(r"^The (\w+) was (\w+) by (\w+)\.$", text)
        return f"{person} {of_form[participle][2]} the {thing}."
    person, form, thing = groups(r"^(\w+) (\w+) the (\w+)\.$", text)
    base, third, past, participle = of_form[form]
    assert form == (third if "simple past" in instruction else past)
    answers = {
        "simple past tense": f"{person} {past} the {thing}.",
        "simple present tense": f"{person} {third} the {thing}.",
        "future tense with will": f"{person} will {base} the {thing}.",
        "passive voice": f"The {thing} was {participle} by {person}.",
        "'it' in place of the object": text.replace(f"the {thing}", "it"),
        "'they' in place of the name": text.replace(person, "They"),
        "as a negative, using did not": f"{person} did not {base} the {thing}.",
        "yes-or-no question with did": f"Did {person} {base} the {thing}?",
    }
    (task,) = (task for task in answers if task in instruction)
    return answers[task]


def reading(instruction: str, text: str) -> str:
    """Write the text as facts of two columns, then look the question's one known column up."""
    homes = re.findall(r"(\w+) lives in (\w+) and works as an? (\w+)", text)
    bought = re.findall(r"(\w+) (?:went to \w+ and|came and) bought (\d+) (\w+)", text)
    trip = re.findall(r"(\w+) left (\w+) on (.*) and travelled to (\w+) by train", text)
    went = re.findall(r"(\w+) went to (\w+)", text)
    tables: list[tuple[str, list[tuple[str, ...]], int, int]] = [
        (r"Where does (\w+) live", homes, 0, 1),
        (r"Who lives in (\w+)", homes, 1, 0),
        (r"the job of (\w+)", homes, 0, 2),
        (r"Who works as an? (\w+)", homes, 2, 0),
        (r"In which city does the (\w+) live", homes, 2, 1),
        (r"How many (?!things did)(\w+) were bought", bought, 2, 1),
        (r"How many things did (\w+) buy", bought, 0, 1),
        (r"Who bought the (\w+)", bought, 2, 0),
        (r"To which city did (\w+) go", went, 0, 1),
        (r"On which date did (\w+) leave", trip, 0, 2),
        (r"Which city did (\w+) leave", trip, 0, 1),
        (r"Which city did (\w+) travel to", trip, 0, 3),
    ]
    ((pattern, rows, key, wanted),) = (entry for entry in tables if re.search(entry[0], instruction))
    (answer,) = (row[wanted] for row in rows if row[key] == groups(pattern, instruction)[0])
    return answer


SOLVERS: dict[str, Callable[[str, str], str]] = {
    **{"arithmetic": arithmetic, "dates": dates, "units": units, "sorting": sorting, "selecting": selecting},
    **{"strings": strings, "records": records, "classification": classification, "reshaping": reshaping},
    **{"code": code, "rewriting": rewriting_, "reading": reading},
}


def follow_up(task: str, ask: str, answer: str) -> str:
    """Apply the second task of a composed example to the answer of the first."""
    items = answer.split(", ")
    match task:
        case "arithmetic":
            if "numbers up" in ask:
                return str(sum(int(item) for item in items))
            if "more than" in ask:
                return {True: "yes", False: "no"}[int(answer) > int(groups(r"more than (\d+)", ask)[0])]
            verb, amount = groups(r"(add|subtract) (\d+)", ask)
            return str(int(answer) + int(amount) * {"add": 1, "subtract": -1}[verb])
        case "units":
            before, after = groups(r"read the result as (\w+) and convert it to (\w+)", ask)
            return str(int(answer) * SIZES[before] // SIZES[after])
        case "dates" if "that many days" in ask:
            return written(day_in(*groups(r"after (\d+ \w+ \d+)", ask)) + timedelta(days=int(answer)))
        case "dates":
            return written(day_in(answer) + timedelta(days=int(*groups(r"the date (\d+) days after that one", ask))))
        case "code":
            return str(eval(*groups(r"expression (.*) with x set", ask), {"x": int(answer), "max": max}))
        case "sorting":
            return ", ".join(ordered(items, *groups(DIRECTION, ask)))
        case "selecting":
            return str(len(answer.split())) if "of the new sentence" in ask else selecting(ask, answer)
        case "reshaping":
            return "[" + ", ".join(item if item.isdigit() else f'"{item}"' for item in items) + "]"
        case "strings":
            word = items[-1] if "last word" in ask else items[0] if "first word" in ask else answer
            if "dashes" in ask:
                return "-".join(items)
            if "count" in ask:
                return str(len(answer))
            if "last two" in ask:
                return answer[-2:]
            return "".join(reversed(word)) if "backwards" in ask else word.upper()
    raise AssertionError(f"{task} does not follow anything")


# Answers.


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("split", SPLITS)
def test_answers_follow_from_the_prompt_alone(splits: Splits, split: str, name: str) -> None:
    examples = [example for example in getattr(splits, split) if example.task == name]
    assert examples
    for example in examples:
        assert example.output == SOLVERS[name](example.instruction, example.input), example


def split_composed(example: Example) -> tuple[str, str, str]:
    """Return the second family, its instruction, and the answer that it starts from."""
    first, second = example.task.split("+")
    joins = "|".join(join.split("{}")[0] for join in JOINS)
    task, ask = re.split(f" (?:{joins})", example.instruction)
    return second, ask, SOLVERS[first](task, example.input)


@pytest.fixture(scope="module")
def many_composed() -> list[Example]:
    """Every pair of families often, so that each follow-up occurs."""
    draw = Draw("test", Random(0))
    pairs = [pair for pair in product(SKILLS, SKILLS) if fits(*pair)]
    return [composed(first, second, draw) for first, second in pairs for _ in range(50)]


def test_composed_answers_apply_the_second_task_to_the_first(splits: Splits, many_composed: list[Example]) -> None:
    for example in (*splits.composed, *many_composed):
        assert example.output == follow_up(*split_composed(example)), example


def test_capitals_and_small_letters_give_the_same_answer(many_composed: list[Example]) -> None:
    for example in many_composed:
        second, ask, between = split_composed(example)
        if second == "selecting":
            assert follow_up(second, ask, between.lower()) == example.output


def test_sums_and_conversions_stay_plain(many_composed: list[Example]) -> None:
    """Nothing is subtracted below zero, and only a plain amount is read as metres or as days."""
    for example in many_composed:
        second, ask, between = split_composed(example)
        if "subtract" in ask:
            assert int(example.output) > 0
        if second == "units" or "that many days" in ask:
            assert 0 < int(between) <= 200


@pytest.mark.parametrize(
    ("name", "kind", "answer"),
    [
        *(("units", "number", answer) for answer in ("-5", "0", "1", "201")),
        *(("dates", "number", answer) for answer in ("-5", "0", "61")),
        *(("sorting", "words", answer) for answer in ("lamp", "lamp, rope")),
        *(("sorting", "numbers", answer) for answer in ("9", "12, 9")),
        ("selecting", "numbers", "9"),
    ],
)
def test_no_skill_continues_from_an_unsuitable_answer(name: str, kind: str, answer: str) -> None:
    (skill,) = (skill for skill in SKILLS if skill.name == name)
    assert all(skill.follow_ups[kind](Draw("test", Random(seed)), answer) is None for seed in range(20))


def test_most_answers_cannot_be_guessed(splits: Splits) -> None:
    """No answer of a family is right for more than a third of its items."""
    for name in NAMES:
        answers = Counter(example.output for example in splits.train if example.task == name)
        assert answers.most_common(1)[0][1] <= 200 / 3, name


# Splits.


def test_counts_are_exact(splits: Splits) -> None:
    for split, count in (("train", 200), ("validation", 25), ("test", 40)):
        assert Counter(example.task for example in getattr(splits, split)) == dict.fromkeys(NAMES, count)
    assert len(NAMES) == len(set(NAMES)) == 12
    assert len(splits.composed) == 120


def test_families_take_turns(splits: Splits) -> None:
    for split in SPLITS:
        assert [example.task for example in getattr(splits, split)[:24]] == NAMES * 2


def test_no_prompt_occurs_twice(splits: Splits) -> None:
    prompts = [(row.instruction, row.input) for part in (*SPLITS, "composed") for row in getattr(splits, part)]
    assert len(prompts) == len(set(prompts)) == 2400 + 300 + 480 + 120


def test_a_split_asks_no_question_twice_in_other_words() -> None:
    for skill in SKILLS:
        phrasings = [re.escape(phrasing).replace(r"\{\}", "(.*)") for phrasing in skill.phrasings.train]
        rows = [example for example in generate_cached(0).train if example.task == skill.name]
        questions = [
            min((match[1] for pattern in phrasings if (match := re.match(pattern, row.instruction))), key=len)
            for row in rows
        ]
        bare = Counter((row.input, question) for row, question in zip(rows, questions, strict=True))
        assert max(bare.values()) == 1, skill.name


def test_phrasings_and_forms_of_the_splits_are_disjoint() -> None:
    for first, second in combinations(SPLITS, 2):
        of = [
            {
                sentence
                for group in (*(skill.phrasings for skill in SKILLS), *FORMS.values())
                for sentence in group.of(split)
            }
            for split in (first, second)
        ]
        assert all(of)
        assert not of[0] & of[1]


def test_every_phrasing_has_one_hole_and_there_are_enough() -> None:
    for skill in SKILLS:
        for split, least in (("train", 8), ("validation", 6), ("test", 6)):
            phrasings = skill.phrasings.of(split)
            assert len(set(phrasings)) == len(phrasings) >= least
            assert all(phrasing.count("{}") == 1 and phrasing.format("x") != phrasing for phrasing in phrasings)


def test_every_phrasing_is_used() -> None:
    instructions = [row.instruction for row in generate_cached(0).train]
    for skill in SKILLS:
        for phrasing in skill.phrasings.train:
            head = phrasing.split("{}")[0]
            assert any(instruction.startswith(head) for instruction in instructions), phrasing


ENTITIES = {
    **{"people": words.PEOPLE, "places": words.PLACES, "things": words.THINGS, "jobs": words.JOBS},
    **{"colours": words.COLOURS, "subjects": SUBJECTS, **MOODS, **TOPICS},
    "verbs": tuple(base for base, *_ in rewriting.VERBS),
}


def test_an_entity_belongs_to_one_list() -> None:
    listed = [word for entities in ENTITIES.values() for word in entities]
    assert [word for word, count in Counter(listed).items() if count > 1] == []


def test_entities_of_the_splits_are_disjoint(splits: Splits) -> None:
    """Read from the prompts and answers; "tests" is the verb as much as "test"."""
    stems = {word: word for entities in ENTITIES.values() for word in entities}
    stems |= {f"{thing}s": thing for thing in words.THINGS}
    stems |= {form: base for base, *forms in rewriting.VERBS for form in forms}
    met = {
        part: {
            stems[word]
            for row in getattr(splits, part)
            for word in re.findall(r"\w+", f"{row.input} {row.output}")
            if word in stems
        }
        for part in (*SPLITS, "composed")
    }
    assert all(len(met[split]) > 60 for split in SPLITS)
    for first, second in combinations(SPLITS, 2):
        assert not met[first] & met[second]
    assert not met["composed"] & (met["train"] | met["validation"])


def test_listed_numbers_of_the_splits_are_disjoint(splits: Splits) -> None:
    met = {
        split: {
            number
            for row in getattr(splits, split)
            if row.task in ("sorting", "selecting")
            for number in re.findall(r"\d+", row.input)
        }
        for split in SPLITS
    }
    assert all(len(numbers) > 15 for numbers in met.values())
    for first, second in combinations(SPLITS, 2):
        assert not met[first] & met[second]


def test_shares_divide_a_list() -> None:
    for length in (0, 1, 11, 40):
        parts = [share(range(length), split) for split in SPLITS]
        assert sorted(chain(*parts)) == list(range(length))
    assert Counter(TURNS) == {"train": 6, "validation": 2, "test": 3}


def test_numbers_of_a_split_are_of_every_sort() -> None:
    """Odd and even, on every weekday, in every month: no remainder is missing from a split."""
    for split in SPLITS:
        numbers = share(range(400), split)
        assert {Draw(split, Random(0)).number(number, number) for number in numbers} == set(numbers)
        for divisor in (2, 7, 10, 12):
            assert {number % divisor for number in numbers} == set(range(divisor))


def test_a_family_is_made_without_the_others() -> None:
    """So that a change to one family leaves the rows of all others as they were."""
    for skill in SKILLS:
        alone = family_rows(skill, Draw("test", Random(f"0/{skill.name}/test")))
        assert alone == [row for row in generate_cached(0).test if row.task == skill.name]


def test_the_same_words_are_drawn_for_every_seed() -> None:
    """A model trained with one seed may be tested with another: no prompt of one is in the other's test split."""
    train = {(row.instruction, row.input) for row in generate_cached(0).train}
    assert not train & {(row.instruction, row.input) for row in generate_cached(1).test}


# Composition.


def test_a_composed_example_names_two_families(splits: Splits) -> None:
    for example in splits.composed:
        first, second = example.task.split("+")
        assert first in NAMES
        assert second in NAMES
        assert first != second


def test_every_family_and_every_pair_that_fits_is_composed(splits: Splits) -> None:
    pairs = Counter(example.task for example in splits.composed)
    assert set(pairs) == {
        f"{first.name}+{second.name}" for first, second in product(SKILLS, SKILLS) if fits(first, second)
    }
    assert {name for pair in pairs for name in pair.split("+")} == set(NAMES)
    assert max(pairs.values()) - min(pairs.values()) <= 1


def test_a_skill_declares_the_kinds_of_its_answers() -> None:
    for skill in SKILLS:
        draw = Draw("train", Random(0))
        assert {skill.question(draw).kind for _ in range(300)} == skill.kinds, skill.name


# Form.


def every_row(splits: Splits) -> list[Example]:
    return [row for part in (*SPLITS, "composed") for row in getattr(splits, part)]


def test_texts_are_short_plain_and_whole(splits: Splits) -> None:
    for row in every_row(splits):
        text = f"{row.instruction}\n{row.input}\n{row.output}"
        assert text.isascii()
        assert all(part == part.strip() != "" for part in (row.instruction, row.input, row.output))
        assert len(row.output.split()) <= 15
        assert len(text.split()) <= 60
        assert "{}" not in text
        assert "  " not in text.replace("\n    ", "\n")
        assert row.instruction.endswith(".")


def test_articles_fit_the_next_letter(splits: Splits) -> None:
    for row in every_row(splits):
        text = f"{row.instruction} {row.input} {row.output}"
        assert not re.search(
            r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", re.sub(r"every a with|letter a |with a\b|from A", "", text)
        ), text


def test_plurals_are_regular() -> None:
    assert all(not thing.endswith(("s", "x", "z", "y", "ch", "sh", "f", "fe", "o", "man")) for thing in words.THINGS)


def test_number_words_count_up() -> None:
    assert [number_in(words.spelled(number)) for number in range(100)] == list(range(100))
    assert words.spelled(40) == "forty"
    assert words.spelled(99) == "ninety-nine"


# Generation.


def test_a_seed_decides_everything() -> None:
    first, second = generate_cached(0), generate_cached(1)
    assert generate(0) == first
    assert first.sha256 != second.sha256
    for part in (*SPLITS, "composed"):
        assert getattr(first, part) != getattr(second, part)


FRESH = """
import random, sys, time
import mopcompress.data.skills as skills

def timed():
    start = time.process_time()
    skills.generate(0)
    return time.process_time() - start

state = random.getstate()
print(min(timed() for _ in range(3)))
print(skills.generate(0).sha256)
print(random.getstate() == state)
print([name for name in ("torch", "numpy", "datasets", "transformers") if name in sys.modules])
"""


def test_a_fresh_process_makes_the_same_data_quickly() -> None:
    """Strings hash differently there, and the type checks of the test run neither slow it nor draw random numbers."""
    run = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, check=True)
    seconds, sha256, untouched, heavy = run.stdout.splitlines()
    assert float(seconds) < 0.5
    assert (sha256, untouched, heavy) == (generate_cached(0).sha256, "True", "[]")
