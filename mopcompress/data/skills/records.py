"""One fact, or one column under a condition, out of a record or a small table."""

from mopcompress.data.skills.draw import Draw
from mopcompress.data.skills.skill import Kind, Phrasings, Question, Skill
from mopcompress.data.skills.words import COLOURS, JOBS, PEOPLE, PLACES, THINGS


def article_of_stock(draw: Draw) -> Question:
    """One record of named fields, in any order."""
    fields = {
        "item": draw.one(THINGS),
        "colour": draw.one(COLOURS),
        "price": str(draw.number(2, 90)),
        "stock": str(draw.number(100, 400)),
        "origin": draw.one(PLACES),
    }
    names = draw.random.sample(tuple(fields), 4)
    wanted = draw.random.choice(names)
    record = "; ".join(f"{name}: {fields[name]}" for name in names)
    return Question(f"the {wanted}", record, fields[wanted], "number" if wanted in ("price", "stock") else "word")


def row_of_people(draw: Draw) -> Question:
    """Three rows of name, age and job; one cell is asked for."""
    people, ages, jobs = draw.some(PEOPLE, 3), draw.numbers(3, 18, 80), draw.some(JOBS, 3)
    table = "; ".join(f"{person}, {age}, {job}" for person, age, job in zip(people, ages, jobs, strict=True))
    person, age, job = draw.random.choice(list(zip(people, ages, jobs, strict=True)))
    cells: tuple[tuple[str, str, Kind], ...] = (
        (f"the age of {person}", str(age), "number"),
        (f"the job of {person}", job, "word"),
        (f"the name of the {job}", person, "word"),
        (f"the age of the {job}", str(age), "number"),
    )
    ask, answer, kind = draw.random.choice(cells)
    return Question(ask, table, answer, kind)


def column_of_people(draw: Draw) -> Question:
    """Four rows of name, age and place, two rows a place; the column of one place is asked for."""
    people, ages, places = draw.some(PEOPLE, 4), draw.numbers(4, 18, 80), draw.some(PLACES, 2) * 2
    draw.random.shuffle(places)
    rows = list(zip(people, ages, places, strict=True))
    table = "; ".join(f"{person}, {age}, {place}" for person, age, place in rows)
    place = places[0]
    if draw.random.random() < 0.5:
        names = [person for person, _, home in rows if home == place]
        return Question(f"the names of the people in {place}", table, ", ".join(names), "words")
    matching = [str(age) for _, age, home in rows if home == place]
    return Question(f"the ages of the people in {place}", table, ", ".join(matching), "numbers")


def question(draw: Draw) -> Question:
    return draw.random.choice((article_of_stock, row_of_people, column_of_people))(draw)


RECORDS = Skill(
    name="records",
    phrasings=Phrasings(
        train=(
            "Extract {} from the data.",
            "From this record, copy {}.",
            "Look up {}.",
            "Find {} in the table.",
            "The data is given. What is listed as {}?",
            "Please fetch {} from the record.",
            "Search the data for {}.",
            "Read {} from the data.",
        ),
        validation=(
            "Retrieve {} from the table.",
            "Pull {} out of the data.",
            "Use the record to report {}.",
            "Quote {} as written in the data.",
            "Locate {} in the record.",
            "Select {} in this data.",
        ),
        test=(
            "Get {} out of the record.",
            "According to the data, give {}.",
            "In the data below, spot {}.",
            "Query the table for {}.",
            "Take {} from the entries.",
            "Consult the record and copy out {}.",
        ),
    ),
    kinds=frozenset({"word", "number", "words", "numbers"}),
    question=question,
)
