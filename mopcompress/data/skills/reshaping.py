"""Data rewritten in another notation: CSV, JSON, key=value pairs, lists."""

import json

from mopcompress.data.skills.draw import Draw
from mopcompress.data.skills.skill import FollowUp, Phrasings, Question, Skill
from mopcompress.data.skills.words import COLOURS, JOBS, PEOPLE, PLACES, THINGS


def record(draw: Draw) -> dict[str, str | int]:
    """Two or three named fields of a person or of a thing."""
    person: dict[str, str | int] = {
        "name": draw.one(PEOPLE),
        "age": draw.number(18, 80),
        "city": draw.one(PLACES),
        "job": draw.one(JOBS),
    }
    thing: dict[str, str | int] = {"item": draw.one(THINGS), "price": draw.number(2, 90), "colour": draw.one(COLOURS)}
    fields = draw.random.choice((person, thing))
    return {name: fields[name] for name in draw.random.sample(tuple(fields), draw.random.randint(2, 3))}


def question(draw: Draw) -> Question:
    fields, things = record(draw), draw.some(THINGS, draw.random.randint(3, 4))
    as_csv = f"{','.join(fields)}\n{','.join(map(str, fields.values()))}"
    as_pairs = " ".join(f"{name}={value}" for name, value in fields.items())
    as_json, as_list = json.dumps(fields), json.dumps(things)
    return draw.random.choice(
        (
            Question("a JSON object with unquoted numbers", as_csv, as_json, "text"),
            Question("a JSON object with unquoted numbers", as_pairs, as_json, "text"),
            Question("name=value pairs with spaces between them", as_json, as_pairs, "text"),
            Question("name=value pairs with spaces between them", as_csv, as_pairs, "text"),
            Question("CSV with a header line", as_json, as_csv, "text"),
            Question("a JSON list of strings", ", ".join(things), as_list, "text"),
            Question("plain words without brackets or quotes", as_list, ", ".join(things), "words"),
        )
    )


def words_to_json(draw: Draw, answer: str) -> FollowUp:
    return FollowUp("write the words as a JSON list of strings", json.dumps(answer.split(", ")), "text")


def numbers_to_json(draw: Draw, answer: str) -> FollowUp:
    numbers = [int(number) for number in answer.split(", ")]
    return FollowUp("write the numbers as a JSON list", json.dumps(numbers), "text")


RESHAPING = Skill(
    name="reshaping",
    phrasings=Phrasings(
        train=(
            "Rewrite the data as {}.",
            "Convert the data to {}.",
            "Turn this into {}.",
            "Format the data as {}.",
            "Reshape the input into {}.",
            "Write the same data as {}.",
            "Please output this as {}.",
            "Change the notation to {}.",
        ),
        validation=(
            "Transform the data into {}.",
            "Express the data as {}.",
            "I need the data as {}.",
            "Make this {}.",
            "Recast the input as {}.",
            "Return the data as {}.",
        ),
        test=(
            "Translate the data into {}.",
            "Represent the input as {}.",
            "Print this as {}.",
            "Serialise the input as {}.",
            "Give me the data as {}.",
            "Restructure this into {}.",
        ),
    ),
    kinds=frozenset({"text", "words"}),
    question=question,
    follow_ups={"words": words_to_json, "numbers": numbers_to_json},
)
