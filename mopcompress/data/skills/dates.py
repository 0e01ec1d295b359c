"""Days and dates before and after each other."""

from datetime import date, timedelta

from mopcompress.data.skills.draw import Draw
from mopcompress.data.skills.skill import FollowUp, Phrasings, Question, Skill
from mopcompress.data.skills.words import listed

MONTHS = listed("January February March April May June July August September October November December")
WEEKDAYS = listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")


def written(day: date) -> str:
    """Day, month name and year, whatever the locale."""
    return f"{day.day} {MONTHS[day.month - 1]} {day.year}"


def read(text: str) -> date:
    day, month, year = text.split()
    return date(int(year), MONTHS.index(month) + 1, int(day))


def any_day(draw: Draw) -> date:
    return date(draw.number(1950, 2049), draw.random.randint(1, 12), draw.number(1, 28))


def question(draw: Draw) -> Question:
    start, days, weeks = any_day(draw), draw.number(2, 30), draw.random.randint(1, 4)
    match draw.random.randrange(5):
        case 0:
            return Question(
                f"the date {days} days after this one", written(start), written(start + timedelta(days)), "date"
            )
        case 1:
            return Question(
                f"the date {days} days before this one", written(start), written(start - timedelta(days)), "date"
            )
        case 2:
            many = "1 week" if weeks == 1 else f"{weeks} weeks"
            return Question(
                f"the date {many} after this one", written(start), written(start + timedelta(weeks=weeks)), "date"
            )
        case 3:
            both = f"{written(start)} and {written(start + timedelta(days))}"
            return Question("the number of days from the first date to the second", both, str(days), "number")
        case _:
            today = draw.random.randrange(7)
            return Question(
                f"the weekday {days} days after this one", WEEKDAYS[today], WEEKDAYS[(today + days) % 7], "word"
            )


def days_later(draw: Draw, answer: str) -> FollowUp | None:
    if not 0 < int(answer) <= 60:
        return None
    start = any_day(draw)
    return FollowUp(
        f"give the date that many days after {written(start)}", written(start + timedelta(int(answer))), "date"
    )


def days_on(draw: Draw, answer: str) -> FollowUp:
    days = draw.number(2, 30)
    return FollowUp(f"give the date {days} days after that one", written(read(answer) + timedelta(days)), "date")


DATES = Skill(
    name="dates",
    phrasings=Phrasings(
        train=(
            "Find {}.",
            "Give {}.",
            "What is {}?",
            "Use the calendar to find {}.",
            "Tell me {}.",
            "I need to know {}.",
            "Please name {}.",
            "Count the days and give {}.",
        ),
        validation=(
            "Looking at a calendar, what would be {}?",
            "Identify {}.",
            "Write down {}.",
            "Can you name {}?",
            "Settle {}.",
            "Please look up {}.",
        ),
        test=(
            "Count along the calendar to get {}.",
            "Which is {}?",
            "Provide {}.",
            "Kindly state {}.",
            "With the calendar in mind, give me {}.",
            "My question is: what is {}?",
        ),
    ),
    kinds=frozenset({"date", "number", "word"}),
    question=question,
    follow_ups={"number": days_later, "date": days_on},
)
