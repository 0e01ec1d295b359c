"""Sums told as one-sentence stories, with the numbers in words or in digits."""

from mopcompress.data.skills.draw import Draw
from mopcompress.data.skills.skill import FollowUp, Phrasings, Question, Skill
from mopcompress.data.skills.words import PEOPLE, THINGS, spelled


def question(draw: Draw) -> Question:
    person, things = draw.one(PEOPLE), draw.one(THINGS) + "s"
    write = draw.random.choice((str, spelled))
    small, large = sorted(draw.numbers(2, 2, 60))
    times, each = draw.random.randint(2, 6), draw.number(2, 16)
    owned = f"how many {things} {person} has now"
    story, ask, result = draw.random.choice(
        (
            (f"{person} has {write(large)} {things} and buys {write(small)} more.", owned, large + small),
            (f"{person} has {write(large)} {things} and gives away {write(small)}.", owned, large - small),
            (f"{person} has {write(times)} boxes with {write(each)} {things} in each.", owned, times * each),
            (
                f"{person} shares {write(times * each)} {things} equally among {write(times)} people.",
                f"how many {things} each of them gets",
                each,
            ),
        )
    )
    return Question(ask, story, str(result), "number")


def go_on(draw: Draw, answer: str) -> FollowUp:
    """Add, subtract or compare."""
    value, amount = int(answer), draw.number(2, 40)
    if draw.random.random() < 0.5:
        return FollowUp(f"say whether the result is more than {amount}", "yes" if value > amount else "no", "yes or no")
    if amount < value:
        return FollowUp(f"subtract {amount} from the result", str(value - amount), "number")
    return FollowUp(f"add {amount} to the result", str(value + amount), "number")


def add_up(draw: Draw, answer: str) -> FollowUp:
    return FollowUp("add the numbers up", str(sum(map(int, answer.split(", ")))), "number")


ARITHMETIC = Skill(
    name="arithmetic",
    phrasings=Phrasings(
        train=(
            "Work out {}.",
            "Calculate {}.",
            "Find out {}.",
            "Read the story and tell me {}.",
            "Using the story, determine {}.",
            "Please compute {}.",
            "Do the sum and say {}.",
            "I would like to know {}.",
        ),
        validation=(
            "Figure out {}.",
            "Given the story, establish {}.",
            "State {}.",
            "Solve this to learn {}.",
            "Help me see {}.",
            "Do the maths to discover {}.",
        ),
        test=(
            "Use the numbers in the story to find {}.",
            "Show {}.",
            "Tell us {}.",
            "From what is written, deduce {}.",
            "Do the arithmetic and report {}.",
            "Reckon {}.",
        ),
    ),
    kinds=frozenset({"number"}),
    question=question,
    follow_ups={"number": go_on, "numbers": add_up},
)
