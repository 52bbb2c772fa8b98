"""Numbers, dates, clock times and prices as they are spoken, in German and in British English."""

from __future__ import annotations

import datetime
from typing import NamedTuple


class Pair(NamedTuple):
    """A German text and its English translation."""

    de: str
    en: str


def word_list(text: str) -> tuple[str, ...]:
    return tuple(text.split())


GERMAN_SMALL = word_list(
    "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn "
    "vierzehn fünfzehn sechzehn siebzehn achtzehn neunzehn"
)
GERMAN_TENS = word_list("- zehn zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig")
ENGLISH_SMALL = word_list(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen "
    "fourteen fifteen sixteen seventeen eighteen nineteen"
)
ENGLISH_TENS = word_list("- ten twenty thirty forty fifty sixty seventy eighty ninety")

WEEKDAYS = tuple(
    Pair(*words.split("/"))
    for words in word_list(
        "Montag/Monday Dienstag/Tuesday Mittwoch/Wednesday Donnerstag/Thursday Freitag/Friday "
        "Samstag/Saturday Sonntag/Sunday"
    )
)
MONTHS = tuple(
    Pair(*words.split("/"))
    for words in word_list(
        "Januar/January Februar/February März/March April/April Mai/May Juni/June Juli/July "
        "August/August September/September Oktober/October November/November "
        "Dezember/December"
    )
)
GERMAN_ORDINAL_STEMS = {1: "erst", 3: "dritt", 7: "siebt", 8: "acht"}
ENGLISH_ORDINALS = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
    "twenty": "twentieth",
    "thirty": "thirtieth",
}


def german_number(number: int) -> str:
    """The cardinal as counted aloud ("eins", "einhunderteins"), for 0 to 9999."""
    if not 0 <= number <= 9999:
        raise ValueError(f"spelled numbers go from 0 to 9999, not {number}")
    if number < 20:
        return GERMAN_SMALL[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return (f"{_german_prefix(ones)}und" if ones else "") + GERMAN_TENS[tens]
    unit, word = (1000, "tausend") if number >= 1000 else (100, "hundert")
    count, rest = divmod(number, unit)
    return _german_prefix(count) + word + (german_number(rest) if rest else "")


def _german_prefix(number: int) -> str:
    return "ein" if number == 1 else german_number(number)


def english_number(number: int) -> str:
    """The cardinal with the British "and", for 0 to 9999."""
    if not 0 <= number <= 9999:
        raise ValueError(f"spelled numbers go from 0 to 9999, not {number}")
    if number < 20:
        return ENGLISH_SMALL[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return ENGLISH_TENS[tens] + (f"-{ENGLISH_SMALL[ones]}" if ones else "")
    unit, word = (1000, "thousand") if number >= 1000 else (100, "hundred")
    count, rest = divmod(number, unit)
    joiner = " and " if 0 < rest < 100 else " " if rest else ""
    return f"{english_number(count)} {word}{joiner}{english_number(rest) if rest else ''}"


def number(value: int) -> Pair:
    return Pair(german_number(value), english_number(value))


def year(value: int) -> Pair:
    """A year from 1100 to 2099 as it is read aloud."""
    if not 1100 <= value <= 2099:
        raise ValueError(f"spoken years go from 1100 to 2099, not {value}")
    century, rest = divmod(value, 100)
    tail = german_number(rest) if rest else ""
    german = german_number(value) if value >= 2000 else f"{german_number(century)}hundert{tail}"
    if 2000 <= value < 2010:
        return Pair(german, english_number(value))
    spoken = english_number(rest) if rest >= 10 else f"oh {ENGLISH_SMALL[rest]}"
    return Pair(german, f"{english_number(century)} {spoken if rest else 'hundred'}")


def ordinal_stem(value: int) -> str:
    """German ordinal without its ending ("dritt", "einundzwanzigst"), for 1 to 99."""
    return GERMAN_ORDINAL_STEMS.get(value, german_number(value) + ("t" if value < 20 else "st"))


def english_ordinal(value: int) -> str:
    head, dash, last = english_number(value).rpartition("-")
    return head + dash + ENGLISH_ORDINALS.get(last, f"{last}th")


def day_of_month(day: int, month: int, ending: str) -> Pair:
    """Without article: "dritten Mai", "third of May"; `ending` inflects the German ordinal."""
    name = MONTHS[month - 1]
    return Pair(
        f"{ordinal_stem(day)}{ending} {name.de}",
        f"{english_ordinal(day)} of {name.en}",
    )


def weekday(date: datetime.date) -> Pair:
    return WEEKDAYS[date.weekday()]


def clock(hour: int, minute: int) -> Pair:
    """The everyday clock ("halb drei", "half past two"): hour 1 to 12, minute a multiple of 5."""
    if not 1 <= hour <= 12 or minute not in range(0, 60, 5):
        raise ValueError(f"no everyday name for {hour}:{minute:02d}")
    following = hour % 12 + 1
    if minute == 0:
        return Pair(f"{_german_prefix(hour)} Uhr", f"{ENGLISH_SMALL[hour]} o'clock")
    if minute <= 30:
        english = f"{_english_minutes(minute)} past {ENGLISH_SMALL[hour]}"
    else:
        english = f"{_english_minutes(60 - minute)} to {ENGLISH_SMALL[following]}"
    return Pair(_german_clock(hour, following, minute), english)


def _german_clock(hour: int, following: int, minute: int) -> str:
    now, then = german_number(hour), german_number(following)
    if minute <= 20:
        return f"{_german_minutes(minute)} nach {now}"
    if minute >= 40:
        return f"{_german_minutes(60 - minute)} vor {then}"
    return {25: "fünf vor halb", 30: "halb", 35: "fünf nach halb"}[minute] + f" {then}"


def _german_minutes(minutes: int) -> str:
    return "Viertel" if minutes == 15 else german_number(minutes)


def _english_minutes(minutes: int) -> str:
    return {15: "a quarter", 30: "half"}.get(minutes) or english_number(minutes)


def timetable(hour: int, minute: int) -> Pair:
    """The timetable's time ("vierzehn Uhr fünf", "fourteen oh five"): 1 to 23, 1 to 59."""
    if not (1 <= hour <= 23 and 1 <= minute <= 59):
        raise ValueError(f"no timetable name for {hour}:{minute:02d}")
    spoken = english_number(minute) if minute >= 10 else f"oh {ENGLISH_SMALL[minute]}"
    return Pair(
        f"{_german_prefix(hour)} Uhr {german_number(minute)}", f"{english_number(hour)} {spoken}"
    )


def price(euros: int, cents: int) -> Pair:
    """A price in the accusative ("einen Euro zwanzig"), as "kosten" wants it."""
    german = "einen" if euros == 1 else german_number(euros)
    coins = "euro" if euros == 1 else "euros"
    tail = number(cents) if cents else Pair("", "")
    return Pair(
        f"{german} Euro {tail.de}".rstrip(), f"{english_number(euros)} {coins} {tail.en}".rstrip()
    )
