"""Amounts in other units."""

from mopcompress.data.skills.draw import Draw
from mopcompress.data.skills.skill import FollowUp, Phrasings, Question, Skill

UNITS = (
    ("metres", 100, "centimetres"),
    ("kilometres", 1000, "metres"),
    ("centimetres", 10, "millimetres"),
    ("kilograms", 1000, "grams"),
    ("tonnes", 1000, "kilograms"),
    ("litres", 1000, "millilitres"),
    ("hours", 60, "minutes"),
    ("minutes", 60, "seconds"),
    ("days", 24, "hours"),
    ("weeks", 7, "days"),
    ("years", 12, "months"),
    ("centuries", 100, "years"),
    ("feet", 12, "inches"),
    ("yards", 3, "feet"),
    ("gallons", 8, "pints"),
    ("pounds", 16, "ounces"),
)


def question(draw: Draw) -> Question:
    """To the smaller unit, to the larger one, or to the smaller one from an amount in both."""
    large, size, small = draw.random.choice(UNITS)
    count, rest = draw.number(2, 60), draw.number(2, 60)
    match draw.random.randrange(3):
        case 0:
            return Question(small, f"{count} {large}", str(count * size), "number")
        case 1:
            return Question(large, f"{count * size} {small}", str(count), "number")
        case _:
            return Question(small, f"{count} {large} and {rest} {small}", str(count * size + rest), "number")


def go_on(draw: Draw, answer: str) -> FollowUp | None:
    """None for a number that is not a plain amount of something."""
    if not 1 < int(answer) <= 200:
        return None
    large, size, small = draw.random.choice(UNITS)
    return FollowUp(f"read the result as {large} and convert it to {small}", str(int(answer) * size), "number")


UNIT_CONVERSION = Skill(
    name="units",
    phrasings=Phrasings(
        train=(
            "Convert the amount to {}.",
            "How many {} is this?",
            "Express this in {}.",
            "Change the amount into {}.",
            "Give this quantity in {}.",
            "What is the amount in {}?",
            "Turn the measurement into {}.",
            "Please convert this into {}.",
        ),
        validation=(
            "How much is this when measured in {}?",
            "State the quantity in {}.",
            "Rewrite the measurement in {}.",
            "I want this amount in {}.",
            "Translate the quantity into {}.",
            "Work out the same amount in {}.",
        ),
        test=(
            "How many {} are there in this amount?",
            "Report the measurement in {}.",
            "Switch the unit to {}.",
            "Show how many {} this makes.",
            "Tell me the equivalent in {}.",
            "This amount equals how many {}?",
        ),
    ),
    kinds=frozenset({"number"}),
    question=question,
    follow_ups={"number": go_on},
)
