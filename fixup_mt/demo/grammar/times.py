"""When something happens: times that suit a tense, dates and clock times, drawn at random."""

from __future__ import annotations

import datetime

from fixup_mt.demo.grammar import numerals
from fixup_mt.demo.grammar.draw import Draw
from fixup_mt.demo.grammar.numerals import Pair, clock, number
from fixup_mt.demo.grammar.phrases import NOTHING, join

ONE_DAYS = (
    (Pair("Tag", "day"), Pair("Tagen", "days")),
    (Pair("Woche", "week"), Pair("Wochen", "weeks")),
    (Pair("Monat", "month"), Pair("Monaten", "months")),
    (Pair("Jahr", "year"), Pair("Jahren", "years")),
)
ONE_IN_DATIVE = {"Tag": "einem", "Woche": "einer", "Monat": "einem", "Jahr": "einem"}
PAST_TIMES = (
    Pair("gestern", "yesterday"),
    Pair("vorgestern", "the day before yesterday"),
    Pair("gestern Abend", "yesterday evening"),
    Pair("heute Morgen", "this morning"),
    Pair("letzte Woche", "last week"),
    Pair("letzten Monat", "last month"),
    Pair("letztes Jahr", "last year"),
    Pair("letzten Sommer", "last summer"),
)
FUTURE_TIMES = (
    Pair("morgen", "tomorrow"),
    Pair("übermorgen", "the day after tomorrow"),
    Pair("morgen Abend", "tomorrow evening"),
    Pair("heute Abend", "this evening"),
    Pair("nächste Woche", "next week"),
    Pair("nächsten Monat", "next month"),
    Pair("nächstes Jahr", "next year"),
)
SEASONS = (
    Pair("am Wochenende", "at the weekend"),
    Pair("im Sommer", "in summer"),
    Pair("im Winter", "in winter"),
)
HABIT_TIMES = (
    *SEASONS,
    Pair("jeden Tag", "every day"),
    Pair("jeden Morgen", "every morning"),
    Pair("jeden Abend", "every evening"),
    Pair("jede Woche", "every week"),
    Pair("einmal pro Woche", "once a week"),
    Pair("zweimal pro Woche", "twice a week"),
    Pair("dreimal pro Monat", "three times a month"),
)


def any_clock(draw: Draw) -> Pair:
    return clock(draw.between(1, 12), 5 * draw.between(0, 11))


def at_clock(draw: Draw) -> Pair:
    time = any_clock(draw)
    return Pair(f"um {time.de}", f"at {time.en}")


def span(draw: Draw) -> Pair:
    """A stretch of time in the dative: "drei Tagen", "einer Woche"."""
    value, (one, many) = draw.between(1, 12), draw.pick(ONE_DAYS)
    if value == 1:
        return Pair(f"{ONE_IN_DATIVE[one.de]} {one.de}", f"a {one.en}")
    return Pair(f"{number(value).de} {many.de}", f"{number(value).en} {many.en}")


def any_date(draw: Draw, first_year: int = 1950, last_year: int = 2029) -> datetime.date:
    """A day that exists, in one of these years."""
    start = datetime.date(first_year, 1, 1).toordinal()
    end = datetime.date(last_year, 12, 31).toordinal()
    return datetime.date.fromordinal(draw.between(start, end))


def on_date(draw: Draw) -> Pair:
    day = any_date(draw)
    date = numerals.day_of_month(day.day, day.month, "en")
    return Pair(f"am {date.de}", f"on the {date.en}")


def calendar_time(draw: Draw) -> Pair:
    """A weekday, a weekday with a clock time, a clock time or a date."""
    kind = draw.between(0, 3)
    if kind == 0:
        return at_clock(draw)
    if kind == 1:
        return on_date(draw)
    day = draw.pick(numerals.WEEKDAYS)
    when = at_clock(draw) if kind == 2 else NOTHING
    return Pair(join(f"am {day.de}", when.de), join(f"on {day.en}", when.en))


def time_for(draw: Draw, tense: str, *, negative: bool = False) -> Pair:
    """A time that suits the tense.

    Negation and "every" are kept apart: "nicht jeden Tag" and "jeden Tag nicht" differ in German
    but fall together in English.
    """
    if tense == "present":
        return draw.pick((at_clock(draw), draw.pick(SEASONS))) if negative else habit_time(draw)
    kind = draw.between(0, 9)
    if kind < 5:
        return draw.pick(PAST_TIMES if tense == "perfect" else FUTURE_TIMES)
    if kind < 8:
        return calendar_time(draw)
    stretch = span(draw)
    if tense == "perfect":
        return Pair(f"vor {stretch.de}", f"{stretch.en} ago")
    return Pair(f"in {stretch.de}", f"in {stretch.en}")


def habit_time(draw: Draw) -> Pair:
    kind = draw.between(0, 2)
    if kind == 0:
        return draw.pick(HABIT_TIMES)
    if kind == 1:
        return at_clock(draw)
    day, when = draw.pick(numerals.WEEKDAYS), at_clock(draw) if draw.chance(0.5) else NOTHING
    return Pair(join(f"jeden {day.de}", when.de), join(f"every {day.en}", when.en))
