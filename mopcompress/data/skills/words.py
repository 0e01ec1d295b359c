"""Words that several families draw from, and the little grammar they need. Every thing has a regular plural in -s."""


def listed(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


PEOPLE = listed("""
    Mara Tom Ida Leo Nina Omar Ruth Sven Tara Hugo Alma Ben Cleo Dan Elsa Finn Gina Hans Iris Jack Kara Liam Mona Nils
    Olga Paul Rosa Sam Tess Ugo Vera Walter Yara Zeno Anna Boris Clara Diego Emma Felix Greta Henry Ines Jonas Kate
    Lars Maya Noah Oona Peter Quinn Rita Simon Tina Ursula Victor Wanda Xenia Yusuf Zoe Arthur Bella Carlos Dora Erik
    Fiona
""")

PLACES = listed("""
    Oslo Leeds Lyon Porto Turin Quito Lima Cairo Delhi Kyoto Seoul Perth Miami Dallas Boston Denver Geneva Vienna
    Prague Warsaw Dublin Bergen Malmo Ghent Bruges Seville Naples Athens Izmir Tunis Dakar Accra Nairobi Havana Bogota
    Caracas Manila Hanoi Osaka Lagos Cork Bath York Riga
""")

THINGS = listed("""
    lamp chair kettle basket carpet bottle pencil hammer ladder mirror pillow candle bucket button ribbon helmet
    blanket guitar drum spoon fork plate jacket sweater sandal wallet ticket stamp coin marble ring necklace basin
    bowl teapot napkin curtain cushion magnet lantern rope tent paddle anchor wheel saddle barrel crate trunk parcel
    folder eraser ruler marker notebook poster globe clock camera printer keyboard cable charger umbrella apron engine
    arrow shovel whistle trumpet vase kite puzzle statue badge bracelet pan
""")

JOBS = listed("""
    baker pilot nurse farmer lawyer plumber painter waiter tailor sailor dentist singer dancer writer driver carpenter
    teacher gardener butcher jeweller chemist surgeon librarian cashier mechanic builder barber florist potter
    optician editor judge actor
""")

COLOURS = listed("""
    red blue green yellow purple orange pink brown black white grey silver gold violet beige maroon navy teal crimson
    olive ivory turquoise
""")

ONES = listed("""
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen
""")
TENS = listed("twenty thirty forty fifty sixty seventy eighty ninety")


def spelled(number: int) -> str:
    """A number from 0 to 99 in words."""
    if number < 20:
        return ONES[number]
    tens, ones = divmod(number, 10)
    return TENS[tens - 2] + (f"-{ONES[ones]}" if ones else "")


def with_article(noun: str) -> str:
    """The noun after "a" or "an"; none of the lists has a word such as "hour" or "unit"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
