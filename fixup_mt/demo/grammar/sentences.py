"""The sentence templates: each draws one German sentence and its only English translation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fixup_mt.demo.grammar import events as ev
from fixup_mt.demo.grammar import numbers_in_use, times, words
from fixup_mt.demo.grammar.draw import Draw
from fixup_mt.demo.grammar.numerals import Pair
from fixup_mt.demo.grammar.phrases import (
    MODALS,
    NOTHING,
    Clause,
    Event,
    Subject,
    a_or_an,
    be,
    english_main,
    english_question,
    german_main,
    german_question,
    german_subordinate,
    join,
    noun_phrase,
    relative_pronoun,
    sentence,
)

Template = Callable[[Draw], Pair]

TENSES = ("present", "perfect", "perfect", "future", "modal")
THAT = (("sagt", "says"), ("glaubt", "thinks"), ("weiß", "knows"), ("hofft", "hopes"))
CAUSES = (
    Pair("es regnet", "it rains"),
    Pair("es schneit", "it snows"),
    Pair("das Wetter schön ist", "the weather is beautiful"),
    Pair("es sehr kalt ist", "it is very cold"),
    Pair("die Sonne scheint", "the sun shines"),
)
CONDITIONS = (
    Pair("es morgen regnet", "it rains tomorrow"),
    Pair("es morgen schneit", "it snows tomorrow"),
    Pair("das Wetter gut ist", "the weather is good"),
    Pair("der Zug nicht kommt", "the train does not come"),
)
INTENTIONS = (
    Pair("versucht", "tries"),
    Pair("hofft", "hopes"),
    Pair("hat vergessen", "forgot"),
    Pair("hat versprochen", "promised"),
    Pair("hat beschlossen", "decided"),
)
ERRANDS = words.DIRECTIONS[:9]


def a_tense(draw: Draw) -> str:
    tense = draw.pick(TENSES)
    return draw.pick(tuple(MODALS)) if tense == "modal" else tense


def a_clause(
    draw: Draw, tense: str = "", *, who: Subject | None = None, negated: bool = False
) -> Clause:
    """A whole event with a time that suits it; `negated` holds only where "nicht" can stand."""
    tense = tense or a_tense(draw)
    who = who or ev.subject(draw)
    act = ev.event(draw, who)
    negated = negated and act.polarity == "open"
    time = times.time_for(draw, tense, negative=negated or act.polarity == "kein")
    return Clause(who, act, tense, time, negated)


def without_time(clause: Clause) -> Clause:
    return replace(clause, time=NOTHING)


def statement(draw: Draw) -> Pair:
    clause = a_clause(draw)
    return sentence(german_main(clause), english_main(clause))


def fronted(draw: Draw) -> Pair:
    """The time comes first, so the subject follows the German verb."""
    clause = a_clause(draw)
    german = german_main(clause, clause.time.de, with_time=False)
    return sentence(german, english_main(clause, front=True))


def negated(draw: Draw) -> Pair:
    clause = a_clause(draw, negated=True)
    return sentence(german_main(clause), english_main(clause))


def yes_no(draw: Draw) -> Pair:
    clause = a_clause(draw)
    if clause.event.polarity == "kein":
        return statement(draw)
    return sentence(german_question(clause), english_question(clause), "?")


def w_question(draw: Draw) -> Pair:
    clause = a_clause(draw)
    if clause.event.polarity == "kein":
        return yes_no(draw)
    word = draw.pick((Pair("wann", "when"), Pair("warum", "why")))
    if word.de == "wann":
        clause = without_time(clause)
    return sentence(german_question(clause, word.de), english_question(clause, word.en), "?")


def who_question(draw: Draw) -> Pair:
    clause = a_clause(draw, who=ev.WHO)
    return sentence(german_main(clause), english_main(clause), "?")


def what_question(draw: Draw) -> Pair:
    """Asks for the object: "Was hat Anna gestern gekauft?"."""
    tense = a_tense(draw)
    verb = draw.pick(
        words.SHOPPING + words.READING + words.WRITING + words.EATING[:1] + words.DRINKING[:1]
    )
    clause = Clause(ev.subject(draw), Event(verb), tense, times.time_for(draw, tense))
    return sentence(german_question(clause, "was"), english_question(clause, "what"), "?")


def because_feeling(draw: Draw) -> Pair:
    clause = a_clause(draw)
    feeling, who = draw.pick(words.FEELINGS), clause.subject.as_pronoun()
    is_ = be(who.person)
    german = f"{german_main(clause)}, weil {who.text.de} {feeling.de} {is_.de}"
    return sentence(german, f"{english_main(clause)} because {who.text.en} {is_.en} {feeling.en}")


def because_event(draw: Draw) -> Pair:
    reason = a_clause(draw, "perfect")
    feeling, who = draw.pick(words.FEELINGS), reason.subject
    reason = replace(reason, subject=who.as_pronoun())
    is_ = be(who.person)
    german = f"{who.text.de} {is_.de} {feeling.de}, weil {german_subordinate(reason)}"
    return sentence(german, f"{who.text.en} {is_.en} {feeling.en} because {english_main(reason)}")


def although(draw: Draw) -> Pair:
    """A fronted subordinate clause counts as the first part: the verb follows the comma."""
    clause = a_clause(draw)
    who, feeling = clause.subject, draw.pick(words.FEELINGS)
    is_ = be(who.person)
    main = replace(clause, subject=who.as_pronoun())
    german = german_main(main, f"obwohl {who.text.de} {feeling.de} {is_.de},")
    english = f"although {who.text.en} {is_.en} {feeling.en}, {english_main(main)}"
    return sentence(german, english)


def when_weather(draw: Draw) -> Pair:
    clause = without_time(a_clause(draw, "present"))
    cause = draw.pick(CAUSES)
    german = german_main(clause, f"wenn {cause.de},")
    return sentence(german, f"when {cause.en}, {english_main(clause)}")


def if_weather(draw: Draw) -> Pair:
    clause = without_time(a_clause(draw, "future"))
    cause = draw.pick(CONDITIONS)
    german = german_main(clause, f"falls {cause.de},")
    return sentence(german, f"if {cause.en}, {english_main(clause)}")


def that_clause(draw: Draw) -> Pair:
    speaker, clause = ev.person(draw), a_clause(draw)
    while speaker.text.de in clause.subject.text.de:
        clause = a_clause(draw)
    german, english = draw.pick(THAT)
    return sentence(
        f"{speaker.text.de} {german}, dass {german_subordinate(clause)}",
        f"{speaker.text.en} {english} that {english_main(clause)}",
    )


def whether(draw: Draw) -> Pair:
    clause = a_clause(draw)
    opening = draw.pick((Pair("weißt du", "do you know"), Pair("weiß er", "does he know")))
    german = f"{opening.de}, ob {german_subordinate(clause)}"
    return sentence(german, f"{opening.en} whether {english_main(clause)}", "?")


def to_infinitive(draw: Draw) -> Pair:
    who = ev.person(draw)
    act, opening = ev.event(draw, who), draw.pick(INTENTIONS)
    while act.polarity == "kein":
        act = ev.event(draw, who)
    parts = (act.obj.de, act.rest.de, act.verb.zu_infinitive)
    german = f"{who.text.de} {opening.de}, {join(*parts)}"
    english = join(who.text.en, opening.en, "to", act.verb.en, act.obj.en, act.rest.en)
    return sentence(german, english)


def in_order_to(draw: Draw) -> Pair:
    """Someone goes somewhere in order to do something there."""
    who, tense = ev.subject(draw), a_tense(draw)
    errand = Clause(who, Event(words.GO, rest=draw.pick(ERRANDS)), tense)
    family = draw.pick((ev.shopping, ev.reading, ev.meeting, ev.helping, ev.eating))
    act = family(draw, who)
    while act.polarity == "kein":
        act = family(draw, who)
    purpose = join(act.obj.de, act.rest.de, act.verb.zu_infinitive)
    english = join("to", act.verb.en, act.obj.en, act.rest.en)
    return sentence(f"{german_main(errand)}, um {purpose}", f"{english_main(errand)} {english}")


def two_clauses(draw: Draw) -> Pair:
    tense = a_tense(draw)
    first, second = (without_time(a_clause(draw, tense)) for _ in range(2))
    german, english = draw.pick(((" und", " and"), (", aber", ", but")))
    return sentence(
        f"{german_main(first)}{german} {german_main(second)}",
        f"{english_main(first)}{english} {english_main(second)}",
    )


def likes(draw: Draw) -> Pair:
    """The German subject is the English object: "Der Film gefällt Anna."."""
    noun = draw.pick(words.THINGS + words.TEXTS)
    adjectives = words.TEXT_ADJECTIVES if noun in words.TEXTS else words.THING_ADJECTIVES
    adjective = draw.pick(adjectives) if draw.chance(0.6) else NOTHING
    thing = noun_phrase(noun, "nom", "the", adjective)
    if draw.chance(0.5):
        name = draw.pick(words.WOMEN + words.MEN)
        return sentence(f"{thing.de} gefällt {name}", f"{name} likes {thing.en}")
    owner = noun_phrase(draw.pick(words.RELATIVES), "dat", draw.pick((ev.MY, ev.OUR)))
    return sentence(f"{thing.de} gefällt {owner.de}", f"{owner.en} likes {thing.en}")


def belongs(draw: Draw) -> Pair:
    adjective = draw.pick(words.THING_ADJECTIVES) if draw.chance(0.6) else NOTHING
    thing = noun_phrase(draw.pick(words.THINGS), "nom", "the", adjective)
    owner = noun_phrase(draw.pick(words.RELATIVES), "dat", draw.pick(ev.CLEAR_POSSESSIVES))
    return sentence(f"{thing.de} gehört {owner.de}", f"{thing.en} belongs to {owner.en}")


def compares_things(draw: Draw) -> Pair:
    first, second = draw.two(words.THINGS)
    plain, more = draw.pick(words.THING_GRADES)
    one, other = noun_phrase(first, "nom"), noun_phrase(second, "nom")
    if draw.chance(0.5):
        return sentence(
            f"{one.de} ist {more.de} als {other.de}", f"{one.en} is {more.en} than {other.en}"
        )
    return sentence(
        f"{one.de} ist so {plain.de} wie {other.de}", f"{one.en} is as {plain.en} as {other.en}"
    )


def compares_people(draw: Draw) -> Pair:
    first, second = draw.two(words.WOMEN + words.MEN)
    plain, more = draw.pick(words.PEOPLE_GRADES)
    if draw.chance(0.5):
        return sentence(
            f"{first} ist {more.de} als {second}", f"{first} is {more.en} than {second}"
        )
    return sentence(
        f"{first} ist so {plain.de} wie {second}", f"{first} is as {plain.en} as {second}"
    )


def describes(draw: Draw) -> Pair:
    """Attributive and predicative adjective in one sentence."""
    nouns, adjectives = draw.pick(
        ((words.PEOPLE, words.PEOPLE_ADJECTIVES), (words.BUILDINGS, words.BUILDING_ADJECTIVES))
    )
    first, second = draw.two(adjectives)
    while {first.de, second.de} in words.CONTRARIES:
        first, second = draw.two(adjectives)
    thing = noun_phrase(draw.pick(nouns), "nom", "the", first)
    verb = draw.pick((Pair("ist", "is"), Pair("war", "was")))
    return sentence(
        f"{thing.de} {verb.de} sehr {second.de}", f"{thing.en} {verb.en} very {second.en}"
    )


def relative_subject(draw: Draw) -> Pair:
    """A relative clause about a person; the predicate is a profession without article."""
    noun = draw.pick(tuple(noun for noun in words.PEOPLE if noun.de in ("Mann", "Frau")))
    adjective = draw.pick(words.PEOPLE_ADJECTIVES) if draw.chance(0.6) else NOTHING
    who, city = noun_phrase(noun, "nom", "the", adjective), draw.pick(words.CITIES)
    job = draw.pick(words.JOBS)[noun.gender == "f"]
    verb = draw.pick((Pair("wohnt", "lives"), Pair("arbeitet", "works")))
    pronoun = relative_pronoun(noun, "nom")
    german = f"{who.de}, {pronoun} in {city.de} {verb.de}, ist {job.de}"
    english = f"{who.en} who {verb.en} in {city.en} is {a_or_an(job.en)}"
    return sentence(german, english)


def relative_object(draw: Draw) -> Pair:
    """As in "Das Buch, das Anna gestern gekauft hat, ist teuer."."""
    noun = draw.pick(words.THINGS)
    act = Event(draw.pick(words.SHOPPING))
    clause = Clause(ev.subject(draw), act, "perfect", times.time_for(draw, "perfect"))
    thing, (grade, _) = noun_phrase(noun, "nom"), draw.pick(words.THING_GRADES)
    pronoun = relative_pronoun(noun, "acc")
    german = f"{thing.de}, {pronoun} {german_subordinate(clause)}, ist {grade.de}"
    return sentence(german, f"{thing.en} that {english_main(clause)} is {grade.en}")


def profession(draw: Draw) -> Pair:
    who = ev.person(draw)
    job = draw.pick(words.JOBS)[who.text.de in words.WOMEN]
    city = draw.pick(words.CITIES)
    german = f"{who.text.de} ist {job.de} und arbeitet in {city.de}"
    return sentence(german, f"{who.text.en} is {a_or_an(job.en)} and works in {city.en}")


def begins(draw: Draw) -> Pair:
    """Separable verbs: the prefix stands at the very end."""
    show = noun_phrase(draw.pick(words.SHOWS), "nom")
    verb, when = draw.pick((words.BEGIN, words.END)), times.calendar_time(draw)
    clause = Clause(Subject(show, "3s"), Event(verb), draw.pick(("present", "perfect")), when)
    if draw.chance(0.4):
        return sentence(german_question(clause), english_question(clause), "?")
    return sentence(german_main(clause), english_main(clause))


# Weights: how often each template is tried; small ones soon run out of new sentences.
TEMPLATES: tuple[tuple[Template, int], ...] = (
    (statement, 14),
    (fronted, 14),
    (negated, 8),
    (yes_no, 6),
    (w_question, 6),
    (who_question, 4),
    (what_question, 4),
    (because_feeling, 4),
    (because_event, 4),
    (although, 4),
    (when_weather, 4),
    (if_weather, 4),
    (that_clause, 6),
    (whether, 4),
    (to_infinitive, 4),
    (in_order_to, 4),
    (two_clauses, 4),
    (likes, 2),
    (belongs, 2),
    (compares_things, 2),
    (compares_people, 2),
    (describes, 2),
    (relative_subject, 3),
    (relative_object, 3),
    (profession, 2),
    (begins, 3),
    *numbers_in_use.TEMPLATES,
)
_LOTS = tuple(template for template, weight in TEMPLATES for _ in range(weight))


def draw_sentence(draw: Draw) -> Pair:
    """One sentence pair from a template drawn by weight."""
    return draw.pick(_LOTS)(draw)
