"""Short texts whose words give the label away: a mood or a topic."""

from mopcompress.data.skills.draw import Draw
from mopcompress.data.skills.skill import Phrasings, Question, Skill
from mopcompress.data.skills.words import PEOPLE, listed, with_article

SUBJECTS = listed("""
    film meal hotel concert book trip service coffee play lecture song phone game party dinner tour show course museum
    flight novel room
""")
MOODS = {
    "positive": listed("""
        wonderful delightful excellent superb lovely brilliant fantastic charming marvellous pleasant amazing great
        splendid perfect enjoyable impressive terrific outstanding fabulous magnificent beautiful fascinating
        satisfying inspiring glorious exquisite admirable stunning magical refreshing thrilling flawless
    """),
    "negative": listed("""
        terrible awful dreadful horrible boring disappointing poor nasty miserable unpleasant dull disgusting annoying
        tedious appalling dismal lousy atrocious frustrating ugly painful pathetic shoddy useless ghastly horrid
        unbearable depressing rotten abysmal irritating worthless
    """),
}
TOPICS = {
    "sport": listed("""
        goalkeeper striker stadium penalty tournament marathon sprinter coach cyclist boxer champion league medal
        athlete wrestler midfielder racket scoreboard relay defender quarterback gymnast
    """),
    "music": listed("""
        orchestra violin melody chorus pianist symphony choir tuba flute conductor cello guitarist soprano rhythm
        drummer opera harp composer concerto ballad saxophone lyrics
    """),
    "cooking": listed("""
        recipe sauce flour saucepan spice dough chef garlic pepper stew casserole butter pastry omelette onion salad
        gravy cinnamon skillet marinade vinegar mustard
    """),
    "weather": listed("""
        storm rain cloud thunder drizzle blizzard forecast lightning fog hail snowfall breeze drought hurricane
        temperature sunshine frost humidity tornado heatwave downpour gale
    """),
    "money": listed("""
        bank loan mortgage salary invoice tax budget currency investor debt interest dividend pension savings cash
        credit refund inflation wage profit auditor payment
    """),
}


def mood_question(draw: Draw) -> Question:
    mood, person, subject = draw.random.choice(tuple(MOODS)), draw.one(PEOPLE), draw.one(SUBJECTS)
    word, other = draw.some(MOODS[mood], 2)
    text = draw.random.choice(
        (
            f"The {subject} was {word} and {other}.",
            f"{person} found the {subject} {word}.",
            f"{person} said: what {with_article(word)} {subject}!",
            f"It was {with_article(word)} {subject}.",
        )
    )
    return Question(" or ".join(draw.random.sample(tuple(MOODS), 2)), text, mood, "word")


def topic_question(draw: Draw) -> Question:
    labels = draw.random.sample(tuple(TOPICS), 3)
    topic, person = draw.random.choice(labels), draw.one(PEOPLE)
    first, second = draw.some(TOPICS[topic], 2)
    text = draw.random.choice(
        (
            f"{person} wrote about the {first} and the {second}.",
            f"Everyone talked about the {first} and the {second}.",
            f"First {person} mentioned the {first}, then the {second}.",
        )
    )
    return Question(f"{labels[0]}, {labels[1]} or {labels[2]}", text, topic, "word")


def question(draw: Draw) -> Question:
    return mood_question(draw) if draw.random.random() < 0.5 else topic_question(draw)


CLASSIFICATION = Skill(
    name="classification",
    phrasings=Phrasings(
        train=(
            "Choose the label that fits the text: {}.",
            "Classify the text as {}.",
            "Is the text best labelled {}?",
            "Which label fits this text: {}?",
            "Decide between these labels for the text: {}.",
            "Label the text. The labels are {}.",
            "Pick the category of this text: {}.",
            "Sort the text into one of these classes: {}.",
        ),
        validation=(
            "Which class does the text belong to: {}?",
            "Select the right tag for the text: {}.",
            "Tag this text as {}.",
            "Assign the text to {}.",
            "Of these labels, which one suits the text: {}?",
            "Name the class of the text: {}.",
        ),
        test=(
            "Which of these is the text: {}?",
            "Categorise the text as {}.",
            "Mark the text with the best of these labels: {}.",
            "Under which heading would you file this text: {}?",
            "Judge what the text is: {}.",
            "Read the text and give it one of these labels: {}.",
        ),
    ),
    kinds=frozenset({"word"}),
    question=question,
)
