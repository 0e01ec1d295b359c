"""The value that a few lines of Python leave in a variable."""

from mopcompress.data.skills.draw import Draw
from mopcompress.data.skills.skill import FollowUp, Phrasings, Question, Skill
from mopcompress.data.skills.words import THINGS


def question(draw: Draw) -> Question:
    a, b, c, d = draw.numbers(4, 2, 30)
    factor, turns, place = draw.random.randint(2, 5), draw.random.randint(2, 5), draw.random.randrange(4)
    word = draw.one(THINGS)
    name, lines, value = draw.random.choice(
        (
            ("x", f"x = ({a} + {b}) * {factor}", (a + b) * factor),
            ("x", f"x = {a} + {b} * {factor}", a + b * factor),
            ("y", f"x = {a}\ny = {factor} * x - {b}", factor * a - b),
            ("x", f"x = max({a}, {b}) - min({c}, {d})", max(a, b) - min(c, d)),
            ("x", f"numbers = [{a}, {b}, {c}, {d}]\nx = numbers[{place}]", (a, b, c, d)[place]),
            ("x", f'x = len("{word}") + {a}', len(word) + a),
            ("x", f"x = {a} if {b} > {c} else {d}", a if b > c else d),
            ("total", f"total = {a}\nfor i in range({turns}):\n    total += {b}", a + turns * b),
            ("total", f"total = 0\nfor n in [{a}, {b}, {c}]:\n    total += n", a + b + c),
            ("x", f"x = {a * factor + turns}\nwhile x > {a}:\n    x -= {a}", (a * factor + turns - 1) % a + 1),
        )
    )
    return Question(f"the final value of {name}", lines, str(value), "number")


def evaluate(draw: Draw, answer: str) -> FollowUp:
    value, factor, amount = int(answer), draw.random.randint(2, 4), draw.number(2, 30)
    expression, result = draw.random.choice(
        (
            (f"x * {factor} + {amount}", value * factor + amount),
            (f"max(x, {amount})", max(value, amount)),
            (f"x - {amount}", value - amount),
            (f"x % {factor + 1}", value % (factor + 1)),
        )
    )
    return FollowUp(f"evaluate the Python expression {expression} with x set to the result", str(result), "number")


CODE = Skill(
    name="code",
    phrasings=Phrasings(
        train=(
            "Run this Python code and give {}.",
            "What is {} after this code?",
            "Execute the program and report {}.",
            "Trace the Python code to find {}.",
            "Read the code. Tell me {}.",
            "Evaluate the program and write {}.",
            "Work through the code and state {}.",
            "Predict {} in this Python program.",
        ),
        validation=(
            "Step through the code and name {}.",
            "After the Python code has run, what is {}?",
            "Simulate the program to get {}.",
            "Follow the Python code and show {}.",
            "Determine {} in this code.",
            "When the program ends, what is {}?",
        ),
        test=(
            "Play interpreter: report {} here.",
            "What does this Python program leave as {}?",
            "Interpret the code to learn {}.",
            "Go through the Python lines and find {}.",
            "Suppose this code runs. Give {}.",
            "Derive {} from the program.",
        ),
    ),
    kinds=frozenset({"number"}),
    question=question,
    follow_ups={"number": evaluate},
)
