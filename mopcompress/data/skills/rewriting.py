"""One short sentence, rewritten by a rule of grammar."""

from mopcompress.data.skills.draw import Draw
from mopcompress.data.skills.skill import Phrasings, Question, Skill
from mopcompress.data.skills.words import PEOPLE, THINGS, listed

# Base form, third person, past, participle.
VERBS = tuple(
    tuple(forms.split("/"))
    for forms in listed("""
        paint/paints/painted/painted wash/washes/washed/washed carry/carries/carried/carried fix/fixes/fixed/fixed
        open/opens/opened/opened move/moves/moved/moved clean/cleans/cleaned/cleaned repair/repairs/repaired/repaired
        sell/sells/sold/sold scratch/scratches/scratched/scratched grab/grabs/grabbed/grabbed lose/loses/lost/lost
        break/breaks/broke/broken hide/hides/hid/hidden steal/steals/stole/stolen throw/throws/threw/thrown
        draw/draws/drew/drawn choose/chooses/chose/chosen bring/brings/brought/brought forget/forgets/forgot/forgotten
        keep/keeps/kept/kept hold/holds/held/held lift/lifts/lifted/lifted drop/drops/dropped/dropped
        pack/packs/packed/packed inspect/inspects/inspected/inspected borrow/borrows/borrowed/borrowed
        polish/polishes/polished/polished measure/measures/measured/measured order/orders/ordered/ordered
        admire/admires/admired/admired deliver/delivers/delivered/delivered collect/collects/collected/collected
        test/tests/tested/tested weigh/weighs/weighed/weighed label/labels/labelled/labelled
        examine/examines/examined/examined wrap/wraps/wrapped/wrapped describe/describes/described/described
        cover/covers/covered/covered sketch/sketches/sketched/sketched store/stores/stored/stored
        replace/replaces/replaced/replaced rent/rents/rented/rented
    """)
)


def question(draw: Draw) -> Question:
    person, thing = draw.one(PEOPLE), draw.one(THINGS)
    base, third, past, participle = draw.one(VERBS)
    now, then = f"{person} {third} the {thing}.", f"{person} {past} the {thing}."
    ask, before, after = draw.random.choice(
        (
            ("in the simple past tense", now, then),
            ("in the simple present tense", then, now),
            ("in the future tense with will", then, f"{person} will {base} the {thing}."),
            ("in the passive voice", then, f"The {thing} was {participle} by {person}."),
            ("in the active voice", f"The {thing} was {participle} by {person}.", then),
            ("with 'it' in place of the object", then, f"{person} {past} it."),
            ("with 'they' in place of the name", then, f"They {past} the {thing}."),
            ("as a negative, using did not", then, f"{person} did not {base} the {thing}."),
            ("as a yes-or-no question with did", then, f"Did {person} {base} the {thing}?"),
            (
                "as a polite request starting with could you please",
                f"{base.capitalize()} the {thing}.",
                f"Could you please {base} the {thing}?",
            ),
        )
    )
    return Question(ask, before, after, "sentence")


REWRITING = Skill(
    name="rewriting",
    phrasings=Phrasings(
        train=(
            "Rewrite the sentence {}.",
            "Write the sentence again {}.",
            "Restate the sentence {}.",
            "Say the same thing {}.",
            "Rephrase this {}.",
            "Please rewrite this {}.",
            "Repeat the sentence {}.",
            "Here is a sentence. Write it {}.",
        ),
        validation=(
            "Reword the sentence {}.",
            "Put this sentence {}.",
            "Give the sentence {}.",
            "Return the sentence {}.",
            "I would like this sentence {}.",
            "Compose the sentence anew {}.",
        ),
        test=(
            "Recast the sentence {}.",
            "Express this sentence {}.",
            "Show the sentence {}.",
            "Formulate the sentence {}.",
            "Write this out {}.",
            "The sentence should be rewritten {}.",
        ),
    ),
    kinds=frozenset({"sentence"}),
    question=question,
)
