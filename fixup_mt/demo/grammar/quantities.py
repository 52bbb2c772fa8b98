"""Quantities of food and drink: by weight, by the bottle, by the dozen, or counted."""

from __future__ import annotations

from typing import NamedTuple

from fixup_mt.demo.grammar import words
from fixup_mt.demo.grammar.draw import Draw
from fixup_mt.demo.grammar.numerals import Pair, number, word_list
from fixup_mt.demo.grammar.phrases import NOTHING, counted, noun_phrase
from fixup_mt.demo.grammar.words import Noun


def _measure(german: str, gender: str, plural: str, english: str) -> Noun:
    return Noun(german, gender, plural, german, english, words.english_plural(english))


KILO, POUND = _measure("Kilo", "n", "Kilo", "kilo"), _measure("Pfund", "n", "Pfund", "pound")
LITRE = _measure("Liter", "m", "Liter", "litre")
BOTTLE, CUP = (
    _measure("Flasche", "f", "Flaschen", "bottle"),
    _measure("Tasse", "f", "Tassen", "cup"),
)
GLASS, BAG = _measure("Glas", "n", "Gläser", "glass"), _measure("Tüte", "f", "Tüten", "bag")
SLICE = _measure("Scheibe", "f", "Scheiben", "slice")
BAR = _measure("Tafel", "f", "Tafeln", "bar")
BASKET = _measure("Korb", "m", "Körbe", "basket")
COUNTABLE = {noun.de: noun for noun in words.FOODS}
MASS = {noun.de: noun for noun in words.STAPLES + words.DRINKS}
# What is sold by weight; eggs and rolls are counted instead.
WEIGHED = word_list("Kartoffel Tomate Zwiebel Apfel Birne Banane Pflaume Orange Pfirsich")
WEIGHED += word_list("Butter Käse Reis Fleisch Mehl Zucker Schinken Fisch")
FILLINGS: tuple[tuple[Noun, tuple[str, ...]], ...] = (
    (BOTTLE, ("Milch", "Wasser", "Wein", "Bier", "Saft", "Limonade")),
    (CUP, ("Kaffee", "Tee", "Kakao")),
    (GLASS, ("Wasser", "Milch", "Wein", "Saft")),
    (BAG, ("Mehl", "Reis", "Zucker")),
    (SLICE, ("Brot", "Käse", "Schinken")),
    (BAR, ("Schokolade",)),
    (BASKET, ("Apfel", "Birne", "Pflaume", "Ei")),
)


class Quantity(NamedTuple):
    """A quantity of goods, and whether the verb after it is plural in either language."""

    text: Pair
    de_plural: bool
    en_plural: bool


def _goods(name: str) -> Pair:
    if name in MASS:
        return Pair(name, MASS[name].en)
    return Pair(COUNTABLE[name].de_plural, COUNTABLE[name].en_plural)


def _of(measure: Pair, name: str) -> Pair:
    goods = _goods(name)
    return Pair(f"{measure.de} {goods.de}", f"{measure.en} of {goods.en}")


def weight(draw: Draw, case: str) -> Quantity:
    """Half a pound, one kilo, one and a half litres, twelve kilos, two hundred grams of ..."""
    unit = draw.pick((KILO, POUND, LITRE))
    name = draw.pick(tuple(n.de for n in words.DRINKS)) if unit is LITRE else draw.pick(WEIGHED)
    kind = draw.between(0, 9)
    if kind < 2:
        half = noun_phrase(unit, case, "a", Pair("halb", ""))
        return Quantity(_of(Pair(half.de, f"half {half.en}"), name), False, False)
    if kind < 4:
        more = Pair(f"anderthalb {unit.de}", f"one and a half {unit.en_plural}")
        return Quantity(_of(more, name), True, True)
    if kind < 6 and unit is not LITRE:
        grams = number(50 * draw.between(2, 18))
        return Quantity(_of(Pair(f"{grams.de} Gramm", f"{grams.en} grams"), name), True, True)
    value = draw.between(1, 20)
    return Quantity(_of(counted(value, unit, case), name), value > 1, value > 1)


def quantity(draw: Draw, case: str) -> Quantity:
    """Weights, containers, dozens and plain counts of food."""
    kind = draw.between(0, 9)
    if kind < 4:
        return weight(draw, case)
    value = draw.pick((1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12))
    if kind < 7:
        measure, names = draw.pick(FILLINGS)
        text = _of(counted(value, measure, case), draw.pick(names))
        return Quantity(text, value > 1, value > 1)
    if kind < 8:
        goods = _goods(draw.pick(("Ei", "Brötchen", "Zitrone")))
        return Quantity(Pair(f"ein Dutzend {goods.de}", f"a dozen {goods.en}"), False, True)
    adjective = draw.pick(words.FOOD_ADJECTIVES) if draw.chance(0.4) else NOTHING
    text = counted(value, draw.pick(words.FOODS), case, adjective)
    return Quantity(text, value > 1, value > 1)
