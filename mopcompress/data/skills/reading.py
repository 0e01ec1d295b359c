"""Closed questions about a paragraph of two people."""

from mopcompress.data.skills.dates import any_day, written
from mopcompress.data.skills.draw import Draw
from mopcompress.data.skills.skill import Phrasings, Question, Skill
from mopcompress.data.skills.words import JOBS, PEOPLE, PLACES, THINGS, with_article


def homes_and_jobs(draw: Draw) -> Question:
    people, places, jobs = draw.some(PEOPLE, 2), draw.some(PLACES, 2), draw.some(JOBS, 2)
    text = " ".join(
        f"{person} lives in {place} and works as {with_article(job)}."
        for person, place, job in zip(people, places, jobs, strict=True)
    )
    one = draw.random.randrange(2)
    ask, answer = draw.random.choice(
        (
            (f"Where does {people[one]} live?", places[one]),
            (f"Who lives in {places[one]}?", people[one]),
            (f"What is the job of {people[one]}?", jobs[one]),
            (f"Who works as {with_article(jobs[one])}?", people[one]),
            (f"In which city does the {jobs[one]} live?", places[one]),
        )
    )
    return Question(ask, text, answer, "word")


def purchases(draw: Draw) -> Question:
    people, things, counts, place = draw.some(PEOPLE, 2), draw.some(THINGS, 2), draw.numbers(2, 2, 60), draw.one(PLACES)
    text = (
        f"{people[0]} went to {place} and bought {counts[0]} {things[0]}s. "
        f"Later {people[1]} came and bought {counts[1]} {things[1]}s."
    )
    one = draw.random.randrange(2)
    return draw.random.choice(
        (
            Question(f"How many {things[one]}s were bought?", text, str(counts[one]), "number"),
            Question(f"How many things did {people[one]} buy?", text, str(counts[one]), "number"),
            Question(f"Who bought the {things[one]}s?", text, people[one], "word"),
            Question(f"To which city did {people[0]} go?", text, place, "word"),
        )
    )


def journeys(draw: Draw) -> Question:
    person, places, day = draw.one(PEOPLE), draw.some(PLACES, 2), written(any_day(draw))
    text = f"{person} left {places[0]} on {day} and travelled to {places[1]} by train."
    return draw.random.choice(
        (
            Question(f"On which date did {person} leave?", text, day, "date"),
            Question(f"Which city did {person} leave?", text, places[0], "word"),
            Question(f"Which city did {person} travel to?", text, places[1], "word"),
        )
    )


def question(draw: Draw) -> Question:
    return draw.random.choice((homes_and_jobs, purchases, journeys))(draw)


READING = Skill(
    name="reading",
    phrasings=Phrasings(
        train=(
            "Answer from the text. {}",
            "Read the passage. {}",
            "Use the passage to answer: {}",
            "Here is a passage and a question. {}",
            "According to the text: {}",
            "Question about the text: {}",
            "Please answer this from the passage. {}",
            "The passage has the answer. {}",
        ),
        validation=(
            "Study the passage. {}",
            "Reply to a question on the text. {}",
            "Look for the answer in the passage: {}",
            "Based on the text: {}",
            "One question on this paragraph: {}",
            "Go by the text alone. {}",
        ),
        test=(
            "Consult the paragraph. {}",
            "What does the paragraph say? {}",
            "After reading the paragraph, reply: {}",
            "Relying on the paragraph only: {}",
            "Take the answer from the paragraph. {}",
            "A reader asks: {}",
        ),
    ),
    kinds=frozenset({"word", "number", "date"}),
    question=question,
)
