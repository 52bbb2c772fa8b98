"""The built-in corpus: its numbers read back, its grammar looked over, its files repeatable.

`problems` knows nothing of how sentences are made: it looks at finished text with the lexicon in
hand, and every check has a broken sentence that it must catch.
"""

from __future__ import annotations

import datetime
import hashlib
import random
import re
from pathlib import Path

import pytest

from fixup_mt.demo.corpus import SPLITS, unique_pairs, write_corpus
from fixup_mt.demo.grammar import numerals, words
from fixup_mt.demo.grammar.draw import Draw
from fixup_mt.demo.grammar.numerals import Pair
from fixup_mt.demo.grammar.sentences import TEMPLATES
from fixup_mt.errors import UserError

DEFAULT_SHA256 = "f59e2fb7554616c8a349a4312eb859bd8b74dfc9a05b29b795f761265b210aba"

GERMAN_UNITS = {
    "null": 0, "eins": 1, "ein": 1, "zwei": 2, "drei": 3, "vier": 4, "fünf": 5, "sechs": 6,
    "sieben": 7, "acht": 8, "neun": 9, "zehn": 10, "elf": 11, "zwölf": 12, "dreizehn": 13,
    "vierzehn": 14, "fünfzehn": 15, "sechzehn": 16, "siebzehn": 17, "achtzehn": 18,
    "neunzehn": 19, "zwanzig": 20, "dreißig": 30, "vierzig": 40, "fünfzig": 50, "sechzig": 60,
    "siebzig": 70, "achtzig": 80, "neunzig": 90,
}  # fmt: skip
ENGLISH_UNITS = {
    "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7,
    "eight": 8, "nine": 9, "ten": 10, "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14,
    "fifteen": 15, "sixteen": 16, "seventeen": 17, "eighteen": 18, "nineteen": 19, "twenty": 20,
    "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90,
}  # fmt: skip
ENGLISH_DAYS = numerals.word_list(
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth "
    "thirteenth fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth "
    "twentieth twenty-first twenty-second twenty-third twenty-fourth twenty-fifth "
    "twenty-sixth twenty-seventh twenty-eighth twenty-ninth thirtieth thirty-first"
)
GERMAN_DAYS = numerals.word_list(
    "erste zweite dritte vierte fünfte sechste siebte achte neunte zehnte elfte zwölfte "
    "dreizehnte vierzehnte fünfzehnte sechzehnte siebzehnte achtzehnte neunzehnte "
    "zwanzigste einundzwanzigste zweiundzwanzigste dreiundzwanzigste vierundzwanzigste "
    "fünfundzwanzigste sechsundzwanzigste siebenundzwanzigste achtundzwanzigste "
    "neunundzwanzigste dreißigste einunddreißigste"
)


def parse_german(text: str) -> int:
    """The inverse of spelling, from the largest unit down; KeyError for a misspelling."""
    for word, factor in (("tausend", 1000), ("hundert", 100)):
        head, found, tail = text.partition(word)
        if found:
            return parse_german(head) * factor + (parse_german(tail) if tail else 0)
    ones, found, tens = text.partition("und")
    if found:
        return GERMAN_UNITS[tens] + {**GERMAN_UNITS, "eins": 99999}[ones]
    return GERMAN_UNITS[text]


def parse_english(text: str) -> int:
    """The inverse of spelling; the "and" must stand exactly before the last two digits."""
    for word, factor in ((" thousand", 1000), (" hundred", 100)):
        head, found, tail = text.partition(word)
        if found:
            rest = parse_english(tail.strip().removeprefix("and ")) if tail else 0
            assert tail.startswith(" and ") == (0 < rest < 100), text
            return parse_english(head) * factor + rest
    return sum(ENGLISH_UNITS[part] for part in text.split("-"))


def parse_english_year(text: str) -> int:
    if "thousand" in text:
        return parse_english(text)
    century, _, rest = text.partition(" ")
    tail = 0 if rest == "hundred" else parse_english(rest.removeprefix("oh "))
    assert rest.startswith("oh ") == (0 < tail < 10), text
    return ENGLISH_UNITS[century] * 100 + tail


def parse_german_clock(text: str) -> int:
    """Minutes after twelve."""
    if text.endswith(" Uhr"):
        return parse_german(text.removesuffix(" Uhr")) % 12 * 60
    *offset, hour = text.split()
    minutes = GERMAN_UNITS[hour] % 12 * 60
    if offset[-1] == "halb":
        minutes, offset = minutes - 30, offset[:-1]
    if offset:
        amount = 15 if offset[0] == "Viertel" else GERMAN_UNITS[offset[0]]
        minutes += {"nach": amount, "vor": -amount}[offset[1]]
    return minutes % 720


def parse_english_clock(text: str) -> int:
    if text.endswith(" o'clock"):
        return ENGLISH_UNITS[text.removesuffix(" o'clock")] % 12 * 60
    match = re.fullmatch(r"(a quarter|half|[a-z-]+) (past|to) ([a-z]+)", text)
    assert match, text
    amount = {"a quarter": 15, "half": 30}.get(match[1]) or parse_english(match[1])
    sign = 1 if match[2] == "past" else -1
    return (ENGLISH_UNITS[match[3]] * 60 + sign * amount) % 720


def _lexicon() -> tuple[words.Noun, ...]:
    tables = (value for value in vars(words).values() if isinstance(value, tuple))
    return tuple(item for table in tables for item in table if isinstance(item, words.Noun))


def _verbs() -> tuple[words.Verb, ...]:
    values = list(vars(words).values())
    tables = [value for value in values if isinstance(value, tuple)]
    found = [verb for table in tables for verb in table if isinstance(verb, words.Verb)]
    return tuple(found + [value for value in values if isinstance(value, words.Verb)])


NOUNS = {noun.de: noun for noun in _lexicon()}
PLURALS = {noun.de_plural for noun in NOUNS.values()}
PRONOUNS = ["ich", "du", "er", "sie", "wir"]
ARTICLES = {"m": "der den dem", "f": "die der", "n": "das dem"}
ENDINGS = {"m": ("", "en", "em"), "f": ("e", "er"), "n": ("", "em")}
INVARIABLE = ("bitte", "gern")
STEMS = ["ein", "kein", "mein", "dein", "sein", "ihr", "unser"]
FINITE = set(
    numerals.word_list(
        "habe hast hat haben bin bist ist sind werde wirst wird werden kann kannst können "
        "muss musst müssen will willst wollen darf darfst dürfen soll sollst sollen möchte "
        "möchtest möchten regnet schneit scheint kommt zu"
    )
)
for _verb in _verbs():
    _forms = (_verb.du, _verb.er, _verb.infinitive, _verb.infinitive.removesuffix("n"))
    FINITE |= {_verb.prefix + form for form in _forms} | {f"{_verb.prefix}zu{_verb.infinitive}"}
BASES = {verb.en.split()[0] for verb in _verbs()} - {"read", "put"}
NAMES = "|".join((*words.WOMEN, *words.MEN, "He", "She"))
SINGULARS = "|".join({noun.en for noun in NOUNS.values()} - {"fish"})


def article_problem(article: str, noun: words.Noun) -> bool:
    """Whether an article or a possessive does not fit a singular noun's gender."""
    if article in ["der", "die", "das", "den", "dem"]:
        return article not in ARTICLES[noun.gender].split()
    stem = next((s for s in STEMS if article.startswith(s)), None)
    return stem is not None and article.removeprefix(stem) not in ENDINGS[noun.gender]


def adjective_problem(article: str, adjective: str, noun: words.Noun) -> bool:
    """Whether the ending disagrees with the article before it (singular)."""
    bare = article in STEMS
    if bare:
        return not adjective.endswith({"m": "er", "n": "es", "f": "-"}[noun.gender])
    weak_e = article in ("die", "das") or (article == "der" and noun.gender == "m")
    if weak_e or (noun.gender == "f" and article.endswith("e")):
        return not adjective.endswith("e")
    return not adjective.endswith("en")


def german_problems(text: str) -> list[str]:
    found = []
    # "ein Uhr" is a time of day, not a clock.
    tokens = re.findall(r"\w+", text.replace("ein Uhr", "Uhr"))
    for token in tokens:
        if token.capitalize() in NOUNS and token.islower() and token != "morgen":
            found.append(f"noun without capital: {token}")
    for at, token in enumerate(tokens):
        if token not in NOUNS or token in PLURALS:
            continue
        noun, before = NOUNS[token], ["", "", *tokens[:at]][-2:]
        article, adjective = before[0].lower(), before[1]
        if _is_article(adjective.lower()):
            if article_problem(adjective.lower(), noun):
                found.append(f"{adjective} {token}")
        elif not _is_article(article) or not adjective.islower() or adjective in INVARIABLE:
            continue
        elif article_problem(article, noun) or adjective_problem(article, adjective, noun):
            found.append(f"{article} {adjective} {token}")
    if re.search(r"[^,] (weil|dass|ob|obwohl|wenn|falls)\b", text):
        found.append("comma missing before the subordinate clause")
    for clause in re.findall(
        r"\b(?:[Ww]eil|dass|[Oo]b|[Oo]bwohl|[Ww]enn|[Ff]alls) ([^,.?]+)", text
    ):
        if clause.split()[-1] not in FINITE:
            found.append(f"verb not last: {clause}")
    return found


def _is_article(word: str) -> bool:
    possessive = re.fullmatch(rf"({'|'.join(STEMS)})(e|en|em|er|es)?", word)
    return bool(possessive) or word in ["der", "die", "das", "den", "dem"]


def english_problems(text: str) -> list[str]:
    found = []
    for article, following in re.findall(r"\b([Aa]n?) (\w+)", text):
        if (article.lower() == "an") != (following[0] in "aeiou" or following == "hour"):
            found.append(f"{article} {following}")
    match = re.match(rf"(?:{NAMES}) (\w+)\b", text)
    if match and match[1] in BASES:
        found.append(f"third person: {match[0]}")
    match = re.match(r"(?:I|You|We|They) (\w+)s\b", text)
    if match and match[1] in BASES:
        found.append(f"not third person: {match[0]}")
    amounts = "two|three|four|five|six|seven|eight|nine|ten|eleven|twelve"
    if re.search(rf"\b(?:{amounts}) (?:{SINGULARS})\b(?! train)", text):
        found.append("number with a singular noun")
    return found


def problems(pair: Pair) -> list[str]:
    """What is wrong with a pair, in words; empty for a good one."""
    found = german_problems(pair.de) + english_problems(pair.en)
    if pair.de[-1] != pair.en[-1] or pair.de[-1] not in ".?!":
        found.append("end marks")
    for side in pair:
        if not side[0].isupper() or re.search(r"\s\s|\s[.,?!]|,\S|[.,]{2}|\s$", side):
            found.append(f"typography: {side}")
    return found


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Pair]]:
    directory = tmp_path_factory.mktemp("corpus")
    write_corpus(directory)
    return {split: read_split(directory, split) for split in SPLITS}


def read_split(directory: Path, split: str) -> list[Pair]:
    sides = [
        (directory / f"{split}.{language}").read_text(encoding="utf-8").split("\n")
        for language in ("de", "en")
    ]
    assert sides[0].pop() == sides[1].pop() == ""
    return [Pair(*sentences) for sentences in zip(*sides, strict=True)]


def digest(directory: Path) -> str:
    names = [f"{split}.{language}" for split in SPLITS for language in ("de", "en")]
    return hashlib.sha256(b"\0".join((directory / n).read_bytes() for n in names)).hexdigest()


def test_every_number_reads_back() -> None:
    for value in range(10_000):
        assert parse_german(numerals.german_number(value)) == value
        assert parse_english(numerals.english_number(value)) == value


@pytest.mark.parametrize("broken", ["einsundzwanzig", "zweizig", "fünfundvierzich", "sechszehn"])
def test_a_misspelt_german_number_does_not_read_back(broken: str) -> None:
    with pytest.raises(KeyError):
        assert parse_german(broken) in range(10_000) or GERMAN_UNITS[broken]


def test_every_year_reads_back() -> None:
    for value in range(1100, 2100):
        german, english = numerals.year(value)
        assert (parse_german(german), parse_english_year(english)) == (value, value)
    assert numerals.year(1998).en == "nineteen ninety-eight"


def test_every_day_of_a_leap_year() -> None:
    for ordinal in range(366):
        date = datetime.date(2024, 1, 1) + datetime.timedelta(days=ordinal)
        german, english = numerals.day_of_month(date.day, date.month, "e")
        month = date.month - 1
        assert german == f"{GERMAN_DAYS[date.day - 1]} {numerals.MONTHS[month].de}"
        assert english == f"{ENGLISH_DAYS[date.day - 1]} of {numerals.MONTHS[month].en}"


def test_every_clock_time_reads_back() -> None:
    names = set()
    for hour in range(1, 13):
        for minute in range(0, 60, 5):
            german, english = numerals.clock(hour, minute)
            assert parse_german_clock(german) == hour % 12 * 60 + minute
            assert parse_english_clock(english) == hour % 12 * 60 + minute
            names |= {german, english}
    assert len(names) == 2 * 144


def test_every_timetable_time_reads_back() -> None:
    for hour in range(1, 24):
        for minute in range(1, 60):
            german, english = numerals.timetable(hour, minute)
            assert [parse_german(word) for word in german.split(" Uhr ")] == [hour, minute]
            first, _, rest = english.partition(" ")
            if "-" in english.split()[0] or hour <= 20:
                assert parse_english(first) == hour
            assert parse_english(rest.removeprefix("oh ")) == minute


def test_sizes_and_splits(corpus: dict[str, list[Pair]]) -> None:
    assert [len(corpus[split]) for split in SPLITS] == [24_000, 500, 500]
    everything = [pair for split in SPLITS for pair in corpus[split]]
    for language in (0, 1):
        assert len({pair[language] for pair in everything}) == 25_000


def test_no_pair_has_a_problem(corpus: dict[str, list[Pair]]) -> None:
    bad = [(pair, found) for split in SPLITS for pair in corpus[split] if (found := problems(pair))]
    assert not bad, bad[:10]


def test_german_decides_and_every_template_is_sound() -> None:
    """Far more sentences than one corpus holds, so that other seeds are safe too."""
    assert len(TEMPLATES) >= 30
    english_of: dict[str, str] = {}
    for template, _ in TEMPLATES:
        draw = Draw(random.Random(11))
        for pair in (template(draw) for _ in range(2000)):
            assert english_of.setdefault(pair.de, pair.en) == pair.en
            assert not problems(pair), pair


GOOD = Pair(
    "Anna sagt, dass sie gestern einen roten Hut gekauft hat.",
    "Anna says that she bought a red hat yesterday.",
)


@pytest.mark.parametrize(
    ("de", "en"),
    [
        (GOOD.de.replace(", dass", " dass"), GOOD.en),
        (GOOD.de.replace("gekauft hat", "hat gekauft"), GOOD.en),
        (GOOD.de.replace("Hut", "hut"), GOOD.en),
        (GOOD.de.replace("einen roten", "eine rote"), GOOD.en),
        (GOOD.de.replace("einen roten", "einen roter"), GOOD.en),
        (GOOD.de, GOOD.en.replace("a red", "an red")),
        (GOOD.de, GOOD.en.replace("a red hat", "a orange")),
        (GOOD.de, GOOD.en.replace("a red hat", "two hat")),
        (GOOD.de, "Anna buy a red hat."),
        (GOOD.de, "We buys a red hat."),
        (GOOD.de, GOOD.en.replace(".", "?")),
        (GOOD.de.replace(" gestern", "  gestern"), GOOD.en),
        (GOOD.de.replace("Anna", "anna"), GOOD.en),
    ],
)
def test_a_broken_pair_is_caught(de: str, en: str) -> None:
    assert not problems(GOOD)
    assert problems(Pair(de, en))


def sum_is_true(pair: Pair) -> bool:
    german = re.fullmatch(r"(\w+) (plus|minus|mal|geteilt durch) (\w+) ist (\w+)\.", pair.de)
    english = re.fullmatch(r"(.+) (plus|minus|times|divided by) (.+) is (.+)\.", pair.en)
    assert german, pair
    assert english, pair
    one, two, result = (parse_german(german[i].lower()) for i in (1, 3, 4))
    same = [parse_english(english[i].lower()) for i in (1, 3, 4)] == [one, two, result]
    truth = {
        "plus": one + two,
        "minus": one - two,
        "mal": one * two,
        "geteilt durch": one / two,
    }
    return same and truth[german[2]] == result


def test_sums_are_true(corpus: dict[str, list[Pair]]) -> None:
    sums = [
        pair for pair in corpus["train"] if re.search(r" (plus|mal|durch|minus) \w+ ist", pair.de)
    ]
    assert len(sums) > 300
    assert all(sum_is_true(pair) for pair in sums)
    assert not sum_is_true(Pair("Zwei plus zwei ist fünf.", "Two plus two is five."))
    assert not sum_is_true(Pair("Zwei plus zwei ist vier.", "Two plus three is four."))


def test_default_output_is_repeatable_and_seeded(tmp_path: Path) -> None:
    write_corpus(tmp_path / "one")
    assert digest(tmp_path / "one") == DEFAULT_SHA256
    write_corpus(tmp_path / "two", seed=2, train=200, valid=20, test=20)
    write_corpus(tmp_path / "three", seed=3, train=200, valid=20, test=20)
    assert digest(tmp_path / "two") != digest(tmp_path / "three")


def test_user_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="valid set needs at least 1"):
        write_corpus(tmp_path, valid=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is not a folder"):
        write_corpus(tmp_path / "file", train=5, valid=1, test=1)


def test_too_many_sentences_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fixup_mt.demo.corpus.draw_sentence", lambda draw: Pair("Ja.", "Yes."))
    with pytest.raises(UserError, match="ask for fewer"):
        unique_pairs(2, seed=1)


def test_more_pairs_than_can_be_made_are_refused_at_once(tmp_path: Path, monkeypatch) -> None:
    begins = "fixup_mt.demo.corpus.unique_pairs"
    monkeypatch.setattr(begins, lambda *_, **__: pytest.fail("it begins"))
    with pytest.raises(UserError, match="2,000,000 sentence pairs at the most"):
        write_corpus(tmp_path, train=100_000_000)
