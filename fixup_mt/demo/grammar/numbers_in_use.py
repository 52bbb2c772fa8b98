"""Sentence templates around numbers: times, dates, prices, quantities, ages, sums."""

from __future__ import annotations

from fixup_mt.demo.grammar import events as ev
from fixup_mt.demo.grammar import numerals, times, words
from fixup_mt.demo.grammar.draw import Draw
from fixup_mt.demo.grammar.numerals import Pair, number
from fixup_mt.demo.grammar.phrases import (
    NOTHING,
    Clause,
    Event,
    Subject,
    counted,
    english_main,
    english_question,
    german_main,
    german_question,
    noun_phrase,
    sentence,
)
from fixup_mt.demo.grammar.quantities import quantity

CENTS = (0, 0, 0, 10, 20, 25, 30, 40, 50, 60, 70, 75, 80, 90, 95, 99)
DISHES = words.table("für den Kuchen/for the cake; für die Suppe/for the soup")
DISHES += words.table("für den Salat/for the salad; für das Frühstück/for breakfast")
DAYTIMES = (
    (range(5, 10), Pair("morgens", "in the morning")),
    (range(1, 6), Pair("nachmittags", "in the afternoon")),
    (range(6, 11), Pair("abends", "in the evening")),
)


def any_price(draw: Draw, most: int) -> Pair:
    return numerals.price(draw.between(1, most), draw.pick(CENTS))


def quantity_price(draw: Draw) -> Pair:
    what, cost = quantity(draw, "nom"), any_price(draw, 30)
    german = f"{what.text.de} {'kosten' if what.de_plural else 'kostet'} {cost.de}"
    return sentence(german, f"{what.text.en} {'cost' if what.en_plural else 'costs'} {cost.en}")


def thing_price(draw: Draw) -> Pair:
    adjective = draw.pick(words.THING_ADJECTIVES) if draw.chance(0.6) else NOTHING
    thing = noun_phrase(draw.pick(words.THINGS), "nom", "the", adjective)
    if draw.chance(0.15):
        return sentence(f"wie viel kostet {thing.de}", f"how much does {thing.en} cost", "?")
    cost = any_price(draw, 99)
    return sentence(f"{thing.de} kostet {cost.de}", f"{thing.en} costs {cost.en}")


def recipe(draw: Draw) -> Pair:
    """The fronted purpose puts the subject after the verb."""
    dish, one, two = draw.pick(DISHES), quantity(draw, "acc").text, quantity(draw, "acc").text
    while two.de.split()[-1] == one.de.split()[-1]:
        two = quantity(draw, "acc").text
    who = draw.pick(ev.PRONOUNS)
    needed = Pair(f"{one.de} und {two.de}", f"{one.en} and {two.en}")
    clause = Clause(who, Event(words.NEED, needed), "present", dish)
    german = german_main(clause, dish.de, with_time=False)
    return sentence(german, english_main(clause, front=True))


def purchase(draw: Draw) -> Pair:
    who, tense = ev.subject(draw), draw.pick(("perfect", "perfect", "future", "must", "want"))
    verb = draw.pick(words.PROCURING)
    event = Event(verb, quantity(draw, "acc").text, polarity="closed")
    clause = Clause(who, event, tense, times.time_for(draw, tense))
    if draw.chance(0.5):
        german = german_main(clause, clause.time.de, with_time=False)
        return sentence(german, english_main(clause, front=True))
    return sentence(german_main(clause), english_main(clause))


def request(draw: Draw) -> Pair:
    """Imperatives, and the polite wish in a shop."""
    what = quantity(draw, "acc").text
    if draw.chance(0.4):
        who = draw.pick((Pair("ich hätte", "I"), Pair("wir hätten", "we")))
        return sentence(f"{who.de} gern {what.de}", f"{who.en} would like {what.en}")
    verb = draw.pick((Pair("kauf", "buy"), Pair("hol", "fetch"), Pair("bestell", "order")))
    return sentence(f"{verb.de} bitte {what.de}", f"please {verb.en} {what.en}", "!")


def time_now(draw: Draw) -> Pair:
    hour, minute = draw.between(1, 12), 5 * draw.between(0, 11)
    time = numerals.clock(hour, minute)
    fitting = [Pair("", "")] + [part for hours, part in DAYTIMES if hour in hours]
    part = draw.pick(fitting)
    start = draw.pick((Pair("es ist", "it is"), Pair("jetzt ist es", "now it is")))
    german, english = f"{start.de} {time.de} {part.de}", f"{start.en} {time.en} {part.en}"
    return sentence(german.rstrip(), english.rstrip())


def departure(draw: Draw) -> Pair:
    vehicle, city = draw.pick(words.VEHICLES), draw.pick(words.CITIES)
    name = noun_phrase(vehicle, "nom")
    verb, link = draw.pick(
        ((words.DEPART, Pair("nach", "to")), (words.ARRIVE, Pair("aus", "from")))
    )
    text = Pair(f"{name.de} {link.de} {city.de}", f"{name.en} {link.en} {city.en}")
    who = Subject(text, "3s")
    kind = draw.between(0, 9)
    if kind == 0:
        clause = Clause(who, Event(verb), "present")
        return sentence(german_question(clause, "wann"), english_question(clause, "when"), "?")
    if kind < 3:
        late = number(draw.between(2, 59))
        german = f"{text.de} hat {late.de} Minuten Verspätung"
        return sentence(german, f"{text.en} is {late.en} minutes late")
    time = numerals.timetable(draw.between(1, 23), draw.between(1, 59))
    when = Pair(f"um {time.de}", f"at {time.en}")
    clause = Clause(who, Event(verb), "present", when)
    return sentence(german_main(clause), english_main(clause))


def opening_hours(draw: Draw) -> Pair:
    """From some time in the morning to some time in the afternoon."""
    shop = noun_phrase(draw.pick(words.SHOPS), "nom")
    start = numerals.clock(draw.between(6, 11), 5 * draw.between(0, 11))
    end = numerals.clock(draw.between(1, 8), 5 * draw.between(0, 11))
    if draw.chance(0.5):
        german = f"{shop.de} ist von {start.de} bis {end.de} geöffnet"
        return sentence(german, f"{shop.en} is open from {start.en} to {end.en}")
    verb, time = draw.pick(((Pair("öffnet", "opens"), start), (Pair("schließt", "closes"), end)))
    day = draw.pick((*numerals.WEEKDAYS, NOTHING))
    when = Pair(f"am {day.de} " if day.de else "", f" on {day.en}" if day.en else "")
    german = f"{shop.de} {verb.de} {when.de}um {time.de}"
    return sentence(german, f"{shop.en} {verb.en} at {time.en}{when.en}")


def today(draw: Draw) -> Pair:
    date = times.any_date(draw)
    day = numerals.day_of_month(date.day, date.month, "e")
    name = draw.pick(numerals.WEEKDAYS)
    start = draw.pick((Pair("heute ist", "today is"), Pair("morgen ist", "tomorrow is")))
    return sentence(f"{start.de} {name.de}, der {day.de}", f"{start.en} {name.en}, the {day.en}")


def weekday_of_date(draw: Draw) -> Pair:
    """True by the calendar."""
    date = times.any_date(draw, 1950, 2019)
    day = numerals.day_of_month(date.day, date.month, "e")
    year, name = numerals.year(date.year), numerals.weekday(date)
    return sentence(
        f"der {day.de} {year.de} war ein {name.de}", f"the {day.en} {year.en} was a {name.en}"
    )


def birthday(draw: Draw) -> Pair:
    date, who = times.any_date(draw, 1950, 2019), ev.person(draw).text
    day = numerals.day_of_month(date.day, date.month, "en")
    if draw.chance(0.4):
        return sentence(
            f"{who.de} hat am {day.de} Geburtstag", f"{who.en}'s birthday is on the {day.en}"
        )
    year = numerals.year(date.year)
    german = f"{who.de} wurde am {day.de} {year.de} geboren"
    return sentence(german, f"{who.en} was born on the {day.en} {year.en}")


def age(draw: Draw) -> Pair:
    first, second = draw.two(words.WOMEN + words.MEN)
    years = number(draw.between(2, 99))
    if draw.chance(0.5):
        return sentence(f"{first} ist {years.de} Jahre alt", f"{first} is {years.en} years old")
    years = number(draw.between(2, 40))
    more = draw.pick((Pair("älter", "older"), Pair("jünger", "younger")))
    german = f"{first} ist {years.de} Jahre {more.de} als {second}"
    return sentence(german, f"{first} is {years.en} years {more.en} than {second}")


def arithmetic(draw: Draw) -> Pair:
    """Always a true sum."""
    one, two = draw.between(2, 99), draw.between(2, 99)
    kind = draw.pick(("plus", "minus", "mal", "geteilt durch"))
    if kind == "mal":
        one, two = draw.between(2, 30), draw.between(2, 30)
    if kind == "minus":
        one, two = max(one, two), min(one, two)
    if kind == "geteilt durch":
        one, two = (one % 30 + 2) * (two % 11 + 2), two % 11 + 2
    word, result = {
        "plus": ("plus", one + two),
        "minus": ("minus", one - two),
        "mal": ("times", one * two),
        "geteilt durch": ("divided by", one // two),
    }[kind]
    first, second, third = number(one), number(two), number(result)
    return sentence(
        f"{first.de} {kind} {second.de} ist {third.de}",
        f"{first.en} {word} {second.en} is {third.en}",
    )


def big_number(draw: Draw) -> int:
    """Small numbers as often as large ones; never ...01, which would inflect before a noun."""
    value = draw.between(2, draw.pick((99, 999, 9999)))
    return value + 1 if value % 100 == 1 else value


def plain_number(draw: Draw) -> Pair:
    value = number(big_number(draw))
    start = draw.pick(
        (
            Pair("die Antwort lautet", "the answer is"),
            Pair("die richtige Zahl ist", "the correct number is"),
            Pair("sein Zimmer hat die Nummer", "his room is number"),
        )
    )
    return sentence(f"{start.de} {value.de}", f"{start.en} {value.en}")


def amount(draw: Draw) -> Pair:
    """Pages, inhabitants, kilometres."""
    value = number(big_number(draw))
    book, city = noun_phrase(words.TEXTS[draw.pick((0, 3))], "nom"), draw.pick(words.CITIES)
    village = draw.pick((Pair("Dorf", "village"), Pair("Hotel", "hotel")))
    return draw.pick(
        (
            sentence(f"{book.de} hat {value.de} Seiten", f"{book.en} has {value.en} pages"),
            sentence(
                f"bis nach {city.de} sind es noch {value.de} Kilometer",
                f"it is another {value.en} kilometres to {city.en}",
            ),
            sentence(
                f"in diesem {village.de} wohnen {value.de} Menschen",
                f"{value.en} people live in this {village.en}",
            ),
        )
    )


def duration(draw: Draw) -> Pair:
    hours, minutes = draw.between(0, 12), number(draw.between(2, 59))
    city = draw.pick(words.CITIES)
    start = draw.pick(
        (Pair("die Fahrt nach", "the journey to"), Pair("der Flug nach", "the flight to"))
    )
    de, en = f"{minutes.de} Minuten", f"{minutes.en} minutes"
    if hours:
        stretch = number(hours)
        de = (f"{stretch.de} Stunden" if hours > 1 else "eine Stunde") + f" und {de}"
        en = (f"{stretch.en} hours" if hours > 1 else "an hour") + f" and {en}"
    return sentence(f"{start.de} {city.de} dauert {de}", f"{start.en} {city.en} takes {en}")


def temperature(draw: Draw) -> Pair:
    city, value = draw.pick(words.CITIES), number(draw.between(2, 35))
    sign = draw.pick(("", "minus "))
    return sentence(
        f"in {city.de} sind es heute {sign}{value.de} Grad",
        f"it is {sign}{value.en} degrees in {city.en} today",
    )


def there_is(draw: Draw) -> Pair:
    """Two-way prepositions with the dative; the verb agrees with what follows."""
    names, verbs = draw.pick(
        ((words.LAID, ("liegt", "liegen")), (words.STOOD, ("steht", "stehen")))
    )
    noun = draw.pick(tuple(n for n in ev.BOOKS_AND_THINGS if n.de in names))
    value, (where, _) = draw.between(1, 12), draw.pick(words.SPOTS)
    adjective = draw.pick(words.THING_ADJECTIVES) if draw.chance(0.4) else NOTHING
    what = counted(value, noun, "nom", adjective)
    german = f"{where.de} {verbs[value > 1]} {what.de}"
    return sentence(german, f"there {'are' if value > 1 else 'is'} {what.en} {where.en}")


def since(draw: Draw) -> Pair:
    """German present, English perfect."""
    who, stretch, city = ev.subject(draw), times.span(draw), draw.pick(words.CITIES)
    verb, participle = draw.pick(((words.LIVE, "lived"), (words.WORK, "worked")))
    place = Pair(f"in {city.de}", f"in {city.en}")
    clause = Clause(who, Event(verb, rest=place), "present", Pair(f"seit {stretch.de}", ""))
    has = "has" if who.person == "3s" else "have"
    english = f"{who.text.en} {has} {participle} {place.en} for {stretch.en}"
    return sentence(german_main(clause), english)


def built(draw: Draw) -> Pair:
    """The passive, with a year."""
    adjective = draw.pick(words.BUILDING_ADJECTIVES) if draw.chance(0.6) else NOTHING
    house = noun_phrase(draw.pick(words.BUILDINGS), "nom", "the", adjective)
    year = numerals.year(draw.between(1800, 2019))
    return sentence(
        f"{house.de} wurde im Jahr {year.de} gebaut", f"{house.en} was built in {year.en}"
    )


def how_many(draw: Draw) -> Pair:
    noun, tense = draw.pick(words.FOODS + words.THINGS), draw.pick(("perfect", "must", "future"))
    who, verb = ev.subject(draw), draw.pick(words.PROCURING)
    clause = Clause(who, Event(verb), tense, times.time_for(draw, tense))
    question = Pair(f"wie viele {noun.de_plural}", f"how many {noun.en_plural}")
    german = german_question(clause, question.de)
    return sentence(german, english_question(clause, question.en), "?")


def appointment(draw: Draw) -> Pair:
    """A reflexive verb: the pronoun keeps its place right after the finite verb."""
    when = times.calendar_time(draw)
    place = draw.pick(words.PLACES[:4] + words.PLACES[5:8])
    german = f"wir treffen uns {when.de} {place.de}"
    if draw.chance(0.5):
        german = f"{when.de} treffen wir uns {place.de}"
        return sentence(german, f"{when.en} we meet {place.en}")
    return sentence(german, f"we meet {place.en} {when.en}")


TEMPLATES = (
    (quantity_price, 5),
    (thing_price, 5),
    (recipe, 5),
    (purchase, 5),
    (request, 5),
    (time_now, 2),
    (departure, 5),
    (opening_hours, 4),
    (today, 3),
    (weekday_of_date, 4),
    (birthday, 5),
    (age, 3),
    (arithmetic, 5),
    (plain_number, 4),
    (amount, 4),
    (duration, 4),
    (temperature, 3),
    (there_is, 4),
    (since, 4),
    (built, 4),
    (how_many, 4),
    (appointment, 4),
)
