"""Who does what: subjects, and events with their complements, drawn at random."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fixup_mt.demo.grammar import words
from fixup_mt.demo.grammar.draw import Draw
from fixup_mt.demo.grammar.numerals import Pair
from fixup_mt.demo.grammar.phrases import NOTHING, Event, Subject, counted, join, noun_phrase
from fixup_mt.demo.grammar.words import Noun, Verb

MY, YOUR, HIS = Pair("mein", "my"), Pair("dein", "your"), Pair("sein", "his")
HER, OUR, THEIR = Pair("ihr", "her"), Pair("unser", "our"), Pair("ihr", "their")
# Without a subject beside it "ihr" may be "her" or "their": here it is "her".
CLEAR_POSSESSIVES = (MY, YOUR, HIS, HER, OUR)


def _pronoun(de: str, en: str, person: str, possessive: Pair) -> Subject:
    return Subject(Pair(de, en), person, possessive, Pair(de, en))


HE, SHE = _pronoun("er", "he", "3s", HIS), _pronoun("sie", "she", "3s", HER)
THEY = _pronoun("sie", "they", "3p", THEIR)
PRONOUNS = (
    _pronoun("ich", "I", "1s", MY),
    _pronoun("du", "you", "2s", YOUR),
    HE,
    SHE,
    _pronoun("wir", "we", "1p", OUR),
    THEY,
)
WHO = Subject(Pair("wer", "who"), "3s")


def person(draw: Draw) -> Subject:
    """A named man or woman."""
    if draw.chance(0.5):
        name = draw.pick(words.WOMEN)
        return Subject(Pair(name, name), "3s", SHE.possessive, SHE.text)
    name = draw.pick(words.MEN)
    return Subject(Pair(name, name), "3s", HE.possessive, HE.text)


def subject(draw: Draw) -> Subject:
    """Pronouns, names, couples, and people named by a noun."""
    kind = draw.between(0, 9)
    if kind < 3:
        return draw.pick(PRONOUNS)
    if kind < 7:
        return person(draw)
    if kind < 8:
        first, second = draw.two(words.WOMEN + words.MEN)
        both = Pair(f"{first} und {second}", f"{first} and {second}")
        return Subject(both, "3p", THEY.possessive, THEY.text)
    return noun_subject(draw)


def noun_subject(draw: Draw) -> Subject:
    if draw.chance(0.5):
        noun = draw.pick(words.RELATIVES)
        text = noun_phrase(noun, "nom", draw.pick((MY, OUR)))
    else:
        noun = draw.pick(words.PEOPLE)
        adjective = draw.pick(words.PEOPLE_ADJECTIVES) if draw.chance(0.5) else NOTHING
        text = noun_phrase(noun, "nom", "the", adjective)
    pronoun = SHE if noun.gender == "f" else HE
    return Subject(text, "3s", pronoun.possessive, pronoun.text)


def own(draw: Draw, who: Subject) -> str | Pair:
    """The subject's possessive or "the"."""
    return who.possessive if who.possessive and draw.chance(0.5) else "the"


def object_phrase(
    draw: Draw, who: Subject, noun: Noun, adjectives: Sequence[Pair], *, countable: bool = True
) -> tuple[Pair, str]:
    """An accusative object and its polarity (see `Event`)."""
    adjective = draw.pick(adjectives) if adjectives and draw.chance(0.4) else NOTHING
    kind = draw.between(0, 9)
    if kind < 5:
        return noun_phrase(noun, "acc", own(draw, who), adjective), "open"
    if kind < 7:
        return noun_phrase(noun, "acc", "a", adjective), "closed"
    if kind < 8 or not countable:
        return noun_phrase(noun, "acc", "no", adjective), "kein"
    return counted(draw.between(2, 20), noun, "acc", adjective), "closed"


def _transitive(
    verbs: Sequence[Verb], nouns: Sequence[Noun], adjectives: Sequence[Pair], *, countable=True
) -> Callable[[Draw, Subject], Event]:
    def event(draw: Draw, who: Subject) -> Event:
        noun = draw.pick(nouns)
        phrase, polarity = object_phrase(draw, who, noun, adjectives, countable=countable)
        return Event(draw.pick(verbs), phrase, polarity=polarity)

    return event


def _named(nouns: Sequence[Noun], names: Sequence[str]) -> tuple[Noun, ...]:
    return tuple(noun for noun in nouns if noun.de in names)


BOOKS_AND_THINGS = words.TEXTS + words.THINGS
shopping = _transitive(words.SHOPPING, words.THINGS, words.THING_ADJECTIVES)
reading = _transitive(words.READING, words.TEXTS, words.TEXT_ADJECTIVES)
writing = _transitive(
    words.WRITING,
    tuple(noun for noun in words.TEXTS if noun.de not in words.PRINTED),
    words.TEXT_ADJECTIVES,
)
eating = _transitive(words.EATING, words.FOODS, words.FOOD_ADJECTIVES)
wearing = _transitive(
    words.WEARING, _named(words.THINGS, words.CLOTHES), words.THING_ADJECTIVES, countable=False
)


def repairing(draw: Draw, who: Subject) -> Event:
    """Machines and rooms, doors and windows: definite objects only."""
    verbs, nouns = draw.pick(
        (
            (words.REPAIRING, _named(words.THINGS, words.MACHINES)),
            (words.OPENING, words.OPENINGS),
            (words.TIDYING, words.ROOMS),
        )
    )
    return Event(draw.pick(verbs), noun_phrase(draw.pick(nouns), "acc", own(draw, who)))


def consuming(draw: Draw, who: Subject) -> Event:
    """Bread and milk, without article."""
    verbs, nouns = draw.pick(((words.EATING, words.STAPLES), (words.DRINKING, words.DRINKS)))
    det = draw.pick(("", "no"))
    noun = draw.pick(nouns)
    phrase = noun_phrase(noun, "acc", det)
    # "kein Brot" is "not ... bread": mass nouns take no English article.
    return Event(draw.pick(verbs), Pair(phrase.de, noun.en), polarity="kein" if det else "closed")


def _someone(draw: Draw, who: Subject, case: str) -> Pair:
    if draw.chance(0.5):
        return noun_phrase(draw.pick(words.RELATIVES), case, who.possessive or "the")
    adjective = draw.pick(words.PEOPLE_ADJECTIVES) if draw.chance(0.4) else NOTHING
    return noun_phrase(draw.pick(words.PEOPLE), case, "the", adjective)


def meeting(draw: Draw, who: Subject) -> Event:
    return Event(draw.pick(words.MEETING), _someone(draw, who, "acc"))


def helping(draw: Draw, who: Subject) -> Event:
    return Event(draw.pick(words.HELPING), _someone(draw, who, "dat"))


def giving(draw: Draw, who: Subject) -> Event:
    """Dative before accusative, and English with two objects in the same order."""
    receiver = _someone(draw, who, "dat")
    gift, polarity = object_phrase(draw, who, draw.pick(BOOKS_AND_THINGS), ())
    pair = Pair(join(receiver.de, gift.de), join(receiver.en, gift.en))
    return Event(draw.pick(words.GIVING), pair, polarity=polarity)


def talking(draw: Draw, who: Subject) -> Event:
    """Verbs with a fixed preposition."""
    verb, de, en, case = draw.pick(
        (
            (words.WAIT, "auf", "for", "acc"),
            (words.THINK, "an", "of", "acc"),
            (words.SPEAK, "mit", "to", "dat"),
        )
    )
    someone = _someone(draw, who, case)
    return Event(verb, rest=Pair(f"{de} {someone.de}", f"{en} {someone.en}"))


def staying(draw: Draw, who: Subject) -> Event:
    return Event(draw.pick(words.STAYING), rest=draw.pick((*words.PLACES, NOTHING)))


def rising(draw: Draw, who: Subject) -> Event:
    return Event(draw.pick(words.RISING))


def moving(draw: Draw, who: Subject) -> Event:
    """Manner before place in German, after it in English."""
    kind = draw.between(0, 2)
    if kind == 0:
        return Event(words.GO, rest=draw.pick(words.DIRECTIONS))
    city = draw.pick(words.CITIES)
    if kind == 1:
        return Event(words.FLY, rest=Pair(f"nach {city.de}", f"to {city.en}"))
    means = draw.pick(words.MEANS)
    rest = Pair(f"{means.de} nach {city.de}", f"to {city.en} {means.en}")
    return Event(words.TRAVEL, rest=rest)


def putting(draw: Draw, who: Subject) -> Event:
    """Two-way prepositions with the accusative."""
    verb, names = draw.pick(((words.LAY, words.LAID), (words.STAND, words.STOOD)))
    noun = draw.pick(_named(BOOKS_AND_THINGS, names))
    _, where = draw.pick(words.SPOTS)
    return Event(verb, noun_phrase(noun, "acc", own(draw, who)), where)


FAMILIES = (
    (shopping, 6),
    (reading, 3),
    (writing, 1),
    (eating, 3),
    (wearing, 2),
    (repairing, 3),
    (consuming, 3),
    (meeting, 4),
    (helping, 3),
    (giving, 4),
    (talking, 3),
    (staying, 3),
    (rising, 1),
    (moving, 4),
    (putting, 3),
)
_LOTS = tuple(family for family, weight in FAMILIES for _ in range(weight))


def event(draw: Draw, who: Subject) -> Event:
    return draw.pick(_LOTS)(draw, who)
