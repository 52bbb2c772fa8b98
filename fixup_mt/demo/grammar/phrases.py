"""Inflection: noun phrases, subjects, and clauses with German and English word order.

A clause is built once and then rendered as a main clause (verb second, with or without a fronted
part), as a subordinate clause (verb last) or as a question; the two languages never mix before
the last step.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from fixup_mt.demo.grammar.numerals import Pair, number
from fixup_mt.demo.grammar.words import Noun, Verb

NOTHING = Pair("", "")
# Rows by case; columns masculine, feminine, neuter, plural.
_COLUMNS = "mfnp"
_DEFINITE = {"nom": "der die das die", "acc": "den die das die", "dat": "dem der dem den"}
_EIN = {"nom": "- e - e", "acc": "en e - e", "dat": "em er em en"}
_WEAK = {"nom": "e e e en", "acc": "en e e en", "dat": "en en en en"}
_MIXED = {"nom": "er e es en", "acc": "en e es en", "dat": "en en en en"}
_STRONG = {"nom": "er e es e", "acc": "en e es e", "dat": "em er em en"}
RELATIVE = {"nom": "der die das die", "acc": "den die das die"}

_PRESENT = {"haben": "habe hast hat haben haben", "sein": "bin bist ist sind sind"}
_PRESENT |= {"werden": "werde wirst wird werden werden"}
MODALS = {
    "can": ("can", "kann kannst kann können können"),
    "must": ("have to", "muss musst muss müssen müssen"),
    "want": ("want to", "will willst will wollen wollen"),
    "may": ("be allowed to", "darf darfst darf dürfen dürfen"),
    "should": ("should", "soll sollst soll sollen sollen"),
    "would like": ("would like to", "möchte möchtest möchte möchten möchten"),
}
_PERSONS = ("1s", "2s", "3s", "1p", "3p")
_ENGLISH_BE = dict(zip(_PERSONS, ("am", "are", "is", "are", "are"), strict=True))
AN_EXCEPTIONS = ("hour",)


@dataclass(frozen=True)
class Subject:
    """Who acts; `possessive` ("sein", "his") is None where none would be natural."""

    text: Pair
    person: str
    possessive: Pair | None = None
    pronoun: Pair = NOTHING

    def as_pronoun(self) -> Subject:
        return replace(self, text=self.pronoun)


@dataclass(frozen=True)
class Event:
    """A verb with its complements.

    German "nicht" stands between `obj` (definite objects) and `rest` (places and the like).
    `polarity` is "open" (may be negated with "nicht"), "closed" (indefinite objects: not negated)
    or "kein" (the German negation is in the object already).
    """

    verb: Verb
    obj: Pair = NOTHING
    rest: Pair = NOTHING
    polarity: str = "open"


@dataclass(frozen=True)
class Clause:
    """`tense`: "present", "perfect" (English simple past), "future" or a key of MODALS."""

    subject: Subject
    event: Event
    tense: str
    time: Pair = NOTHING
    negated: bool = field(default=False)


def join(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def a_or_an(words: str) -> str:
    vowel = words[0].lower() in "aeiou" or words.startswith(AN_EXCEPTIONS)
    return f"{'an' if vowel else 'a'} {words}"


def _ending(table: dict[str, str], case: str, noun: Noun, plural: bool) -> str:
    column = _COLUMNS.index("p" if plural else noun.gender)
    return table[case].split()[column].strip("-")


def german_noun(noun: Noun, case: str, *, plural: bool = False) -> str:
    if plural:
        needs_n = case == "dat" and not noun.de_plural.endswith(("n", "s"))
        return noun.de_plural + ("n" if needs_n else "")
    return noun.de if case == "nom" else noun.oblique


def noun_phrase(
    noun: Noun, case: str, det: str | Pair = "the", adjective: Pair = NOTHING, *, plural=False
) -> Pair:
    """Article, adjective and noun, agreeing.

    Args:
        noun: what it is about.
        case: "nom", "acc" or "dat".
        det: "the", "a", "no" (German "kein", English "a": the English verb is negated), "" for a
            bare noun, or a possessive such as Pair("mein", "my").
        adjective: German stem without ending, and the English adjective.
        plural: of the noun and all that agrees with it.
    """
    if det == "the":
        article, table = _ending(_DEFINITE, case, noun, plural), _WEAK
    elif det == "":
        article, table = "", _STRONG
    else:
        stem = det.de if isinstance(det, Pair) else {"a": "ein", "no": "kein"}[det]
        article, table = stem + _ending(_EIN, case, noun, plural), _MIXED
    german_adjective = adjective.de and adjective.de + _ending(table, case, noun, plural)
    german = join(article, german_adjective, german_noun(noun, case, plural=plural))
    english = join(adjective.en, noun.en_plural if plural else noun.en)
    if det in ("a", "no"):
        return Pair(german, a_or_an(english))
    return Pair(german, join(det.en if isinstance(det, Pair) else det, english))


def counted(value: int, noun: Noun, case: str, adjective: Pair = NOTHING) -> Pair:
    """As in "drei rote Äpfel"; one is the article, as in ordinary speech."""
    if value == 1:
        return noun_phrase(noun, case, "a", adjective)
    bare = noun_phrase(noun, case, "", adjective, plural=True)
    return Pair(f"{number(value).de} {bare.de}", f"{number(value).en} {bare.en}")


def relative_pronoun(noun: Noun, case: str) -> str:
    return _ending(RELATIVE, case, noun, plural=False)


def third_person(verb: str) -> str:
    """As in "look for" -> "looks for"."""
    head, space, tail = verb.partition(" ")
    if head in ("have", "be"):
        head = {"have": "has", "be": "is"}[head]
    elif head.endswith("y") and head[-2] not in "aeiou":
        head = head[:-1] + "ies"
    else:
        head += "es" if head.endswith(("s", "x", "ch", "sh", "o")) else "s"
    return head + space + tail


def conjugate(verb: Verb, person: str) -> str:
    """German present, without a separable prefix."""
    if person == "1s":
        return verb.infinitive.removesuffix("n")
    return {"2s": verb.du, "3s": verb.er}.get(person, verb.infinitive)


def auxiliary(forms: str, person: str) -> str:
    return forms.split()[_PERSONS.index(person)]


def be(person: str) -> Pair:
    return Pair(auxiliary(_PRESENT["sein"], person), _ENGLISH_BE[person])


def german_verbs(clause: Clause) -> tuple[str, str]:
    """Finite verb, and what closes the clause (prefix, participle or infinitive)."""
    verb, person = clause.event.verb, clause.subject.person
    if clause.tense == "present":
        return conjugate(verb, person), verb.prefix
    if clause.tense == "perfect":
        return auxiliary(_PRESENT[verb.auxiliary], person), verb.participle
    forms = _PRESENT["werden"] if clause.tense == "future" else MODALS[clause.tense][1]
    return auxiliary(forms, person), verb.full_infinitive


def _middle(clause: Clause, *, with_time: bool = True) -> str:
    event = clause.event
    nicht = "nicht" if clause.negated and event.polarity == "open" else ""
    return join(clause.time.de if with_time else "", event.obj.de, nicht, event.rest.de)


def german_main(clause: Clause, front: str = "", *, with_time: bool = True) -> str:
    """Verb second: subject first, or `front` first and the subject after the verb."""
    finite, closing = german_verbs(clause)
    head = (front, finite, clause.subject.text.de) if front else (clause.subject.text.de, finite)
    return join(*head, _middle(clause, with_time=with_time), closing)


def german_question(clause: Clause, word: str = "") -> str:
    finite, closing = german_verbs(clause)
    return join(word, finite, clause.subject.text.de, _middle(clause), closing)


def german_subordinate(clause: Clause) -> str:
    """Verb last; a separable prefix joins its verb again."""
    finite, closing = german_verbs(clause)
    last = closing + finite if clause.tense == "present" else join(closing, finite)
    return join(clause.subject.text.de, _middle(clause), last)


def english_verbs(clause: Clause, *, split: bool) -> tuple[str, str]:
    """Auxiliary and main verb; `split` (questions, negation) calls for "do" where none is."""
    verb, person = clause.event.verb, clause.subject.person
    if clause.tense == "perfect":
        return ("did", verb.en) if split else ("", verb.en_past)
    if clause.tense == "future":
        return "will", verb.en
    base = verb.en
    if clause.tense in MODALS:
        modal, _, infinitive = MODALS[clause.tense][0].partition(" ")
        base = join(infinitive, verb.en)
        if modal == "be":
            return _ENGLISH_BE[person], base
        if modal in ("can", "should", "would"):
            return modal, base
        base = join(modal, base)
    if split:
        return ("does" if person == "3s" else "do"), base
    return "", third_person(base) if person == "3s" else base


def english_predicate(clause: Clause) -> str:
    """Everything after the subject except the time."""
    negative = clause.negated or clause.event.polarity == "kein"
    helper, main = english_verbs(clause, split=negative)
    if negative:
        helper = "cannot" if helper == "can" else f"{helper} not"
    return join(helper, main, clause.event.obj.en, clause.event.rest.en)


def english_main(clause: Clause, *, front: bool = False) -> str:
    body = join(clause.subject.text.en, english_predicate(clause))
    return join(clause.time.en, body) if front else join(body, clause.time.en)


def english_question(clause: Clause, word: str = "") -> str:
    helper, main = english_verbs(clause, split=True)
    event = clause.event
    order = (word, helper, clause.subject.text.en, main, event.obj.en, event.rest.en)
    return join(*order, clause.time.en)


def sentence(german: str, english: str, mark: str = ".") -> Pair:
    return Pair(*(side[0].upper() + side[1:] + mark for side in (german, english)))
