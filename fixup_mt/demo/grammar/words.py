"""The lexicon: every German word has exactly one English word here, so that German decides."""

from __future__ import annotations

from dataclasses import dataclass

from fixup_mt.demo.grammar.numerals import Pair, word_list

IRREGULAR_PLURALS = {"child": "children", "knife": "knives", "man": "men", "woman": "women"}
PLURALS_IN_ES = ("s", "x", "ch", "sh", "potato", "tomato")


@dataclass(frozen=True)
class Noun:
    """German noun with gender "m", "f" or "n"; `oblique` differs only for weak nouns."""

    de: str
    gender: str
    de_plural: str
    oblique: str
    en: str
    en_plural: str


@dataclass(frozen=True)
class Verb:
    """A verb with the forms that rules would get wrong; `prefix` is the separable one."""

    prefix: str
    infinitive: str
    du: str
    er: str
    participle: str
    auxiliary: str
    en: str
    en_past: str

    @property
    def full_infinitive(self) -> str:
        return self.prefix + self.infinitive

    @property
    def zu_infinitive(self) -> str:
        """As in "zu kaufen", but "aufzumachen"."""
        return f"{self.prefix}zu{self.infinitive}" if self.prefix else f"zu {self.infinitive}"


def english_plural(word: str) -> str:
    if word in IRREGULAR_PLURALS:
        return IRREGULAR_PLURALS[word]
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(PLURALS_IN_ES) else "s")


def _nouns(table: str) -> tuple[Noun, ...]:
    """Rows "singular[/oblique] gender plural english", separated by semicolons."""
    nouns = []
    for row in table.replace("\n", " ").strip(" ;").split(";"):
        german, gender, plural, english = row.split(None, 3)
        singular, _, oblique = german.partition("/")
        english = english.strip()
        forms = (plural, oblique or singular, english, english_plural(english))
        nouns.append(Noun(singular, gender, *forms))
    return tuple(nouns)


def _verb(row: str) -> Verb:
    """Row "[prefix|]infinitive du er [*]participle english/past"; * means "sein"."""
    infinitive, du, er, participle, english = row.split(None, 4)
    prefix, _, base = infinitive.rpartition("|")
    auxiliary = "sein" if participle.startswith("*") else "haben"
    present, past = english.split("/")
    return Verb(prefix, base, du, er, participle.lstrip("*"), auxiliary, present, past)


def _verbs(table: str) -> tuple[Verb, ...]:
    return tuple(_verb(row.strip()) for row in table.strip(" \n;").split(";"))


def table(text: str) -> tuple[Pair, ...]:
    """Rows "german/english", separated by semicolons."""
    rows = (row.strip() for row in text.replace("\n", " ").strip(" ;").split(";"))
    return tuple(Pair(*(side.strip() for side in row.split("/"))) for row in rows)


THINGS = _nouns("""
Fahrrad n Fahrräder bicycle; Auto n Autos car; Tisch m Tische table; Stuhl m Stühle chair;
Lampe f Lampen lamp; Uhr f Uhren clock; Tasche f Taschen bag; Schlüssel m Schlüssel key;
Hut m Hüte hat; Mantel m Mäntel coat; Jacke f Jacken jacket; Hemd n Hemden shirt;
Kleid n Kleider dress; Regenschirm m Regenschirme umbrella; Koffer m Koffer suitcase;
Computer m Computer computer; Kamera f Kameras camera; Ball m Bälle ball; Messer n Messer knife;
Teller m Teller plate; Spiegel m Spiegel mirror; Fahrkarte f Fahrkarten ticket;
Bild n Bilder picture; Decke f Decken blanket; Ring m Ringe ring; Gitarre f Gitarren guitar;
Teppich m Teppiche carpet; Kissen n Kissen cushion; Vase f Vasen vase""")
LAID = ("Schlüssel", "Buch", "Zeitung", "Brief", "Messer", "Kamera", "Ring", "Kissen", "Bild")
STOOD = ("Stuhl", "Lampe", "Koffer", "Vase", "Gitarre", "Tasche")
CLOTHES = ("Hut", "Mantel", "Jacke", "Hemd", "Kleid", "Ring")
PRINTED = ("Buch", "Zeitung", "Zeitschrift")
MACHINES = ("Fahrrad", "Auto", "Lampe", "Uhr", "Computer", "Kamera")
TEXTS = _nouns("""
Buch n Bücher book; Zeitung f Zeitungen newspaper; Brief m Briefe letter; Roman m Romane novel;
Zeitschrift f Zeitschriften magazine; Gedicht n Gedichte poem; Märchen n Märchen fairy tale;
Postkarte f Postkarten postcard; Geschichte f Geschichten story; Bericht m Berichte report""")
FOODS = _nouns("""
Apfel m Äpfel apple; Banane f Bananen banana; Birne f Birnen pear; Orange f Orangen orange;
Ei n Eier egg; Brötchen n Brötchen roll; Kartoffel f Kartoffeln potato; Wurst f Würste sausage;
Tomate f Tomaten tomato; Zwiebel f Zwiebeln onion; Gurke f Gurken cucumber;
Pfirsich m Pfirsiche peach; Zitrone f Zitronen lemon; Pflaume f Pflaumen plum""")
STAPLES = _nouns("""
Brot n - bread; Käse m - cheese; Butter f - butter; Reis m - rice; Fleisch n - meat; Mehl n - flour;
Zucker m - sugar; Schinken m - ham; Honig m - honey; Schokolade f - chocolate; Fisch m - fish""")
DRINKS = _nouns("""
Milch f - milk; Wasser n - water; Kaffee m - coffee; Tee m - tea; Wein m - wine; Bier n - beer;
Saft m - juice; Limonade f - lemonade; Kakao m - cocoa""")
RELATIVES = _nouns("""
Bruder m Brüder brother; Schwester f Schwestern sister; Vater m Väter father;
Mutter f Mütter mother; Onkel m Onkel uncle; Tante f Tanten aunt; Sohn m Söhne son;
Tochter f Töchter daughter; Großmutter f Großmütter grandmother;
Großvater m Großväter grandfather; Freund m Freunde friend; Chef m Chefs boss;
Nachbar/Nachbarn m Nachbarn neighbour; Kollege/Kollegen m Kollegen colleague""")
PEOPLE = _nouns("""
Mann m Männer man; Frau f Frauen woman; Lehrer m Lehrer teacher; Ärztin f Ärztinnen doctor;
Schüler m Schüler pupil; Student/Studenten m Studenten student; Bäcker m Bäcker baker;
Polizist/Polizisten m Polizisten police officer; Verkäuferin f Verkäuferinnen shop assistant;
Köchin f Köchinnen cook; Gast m Gäste guest""")
OPENINGS = _nouns("""
Fenster n Fenster window; Tür f Türen door; Koffer m Koffer suitcase; Flasche f Flaschen bottle;
Garage f Garagen garage; Paket n Pakete parcel""")
ROOMS = _nouns("""
Zimmer n Zimmer room; Küche f Küchen kitchen; Garage f Garagen garage; Keller m Keller cellar;
Büro n Büros office; Schrank m Schränke cupboard""")
BUILDINGS = _nouns("""
Brücke f Brücken bridge; Schule f Schulen school; Kirche f Kirchen church; Turm m Türme tower;
Haus n Häuser house; Bahnhof m Bahnhöfe station; Museum n Museen museum; Hotel n Hotels hotel;
Theater n Theater theatre; Krankenhaus n Krankenhäuser hospital""")
SHOPS = _nouns("""
Museum n Museen museum; Bäckerei f Bäckereien bakery; Bibliothek f Bibliotheken library;
Supermarkt m Supermärkte supermarket; Apotheke f Apotheken pharmacy; Post f - post office;
Restaurant n Restaurants restaurant; Schwimmbad n Schwimmbäder swimming pool""")
SHOWS = _nouns("""
Film m Filme film; Konzert n Konzerte concert; Unterricht m - lesson; Spiel n Spiele match;
Kurs m Kurse course; Fest n Feste party""")
VEHICLES = _nouns("""
Zug m Züge train; Bus m Busse bus; Nachtzug m Nachtzüge night train;
Schnellzug m Schnellzüge express train""")

THING_ADJECTIVES = table("""
neu/new; alt/old; klein/small; groß/big; schön/beautiful; teur/expensive; billig/cheap; rot/red;
blau/blue; grün/green; weiß/white; schwarz/black; gelb/yellow; braun/brown; schwer/heavy;
leicht/light""")
TEXT_ADJECTIVES = table("""
neu/new; alt/old; lang/long; kurz/short; interessant/interesting; langweilig/boring;
lustig/funny""")
FOOD_ADJECTIVES = table("frisch/fresh; groß/big; klein/small")
PEOPLE_ADJECTIVES = table("""
alt/old; jung/young; freundlich/friendly; nett/nice; reich/rich; berühmt/famous; klug/clever""")
BUILDING_ADJECTIVES = table("alt/old; neu/new; klein/small; groß/big; schön/beautiful")
CONTRARIES = ({"alt", "neu"}, {"alt", "jung"}, {"groß", "klein"})
FEELINGS = table("""
müde/tired; krank/ill; hungrig/hungry; durstig/thirsty; glücklich/happy; traurig/sad;
zufrieden/satisfied; nervös/nervous""")
# Predicative adjective, its comparative, and both in English.
THING_GRADES = (
    (Pair("groß", "big"), Pair("größer", "bigger")),
    (Pair("klein", "small"), Pair("kleiner", "smaller")),
    (Pair("teuer", "expensive"), Pair("teurer", "more expensive")),
    (Pair("billig", "cheap"), Pair("billiger", "cheaper")),
    (Pair("schön", "beautiful"), Pair("schöner", "more beautiful")),
    (Pair("schwer", "heavy"), Pair("schwerer", "heavier")),
    (Pair("alt", "old"), Pair("älter", "older")),
)
PEOPLE_GRADES = (
    (Pair("alt", "old"), Pair("älter", "older")),
    (Pair("jung", "young"), Pair("jünger", "younger")),
    (Pair("reich", "rich"), Pair("reicher", "richer")),
    (Pair("freundlich", "friendly"), Pair("freundlicher", "friendlier")),
    (Pair("berühmt", "famous"), Pair("berühmter", "more famous")),
    (Pair("klug", "clever"), Pair("klüger", "cleverer")),
)

SHOPPING = _verbs("""
kaufen kaufst kauft gekauft buy/bought; verkaufen verkaufst verkauft verkauft sell/sold;
suchen suchst sucht gesucht look for/looked for; finden findest findet gefunden find/found;
holen holst holt geholt fetch/fetched;
verlieren verlierst verliert verloren lose/lost; sehen siehst sieht gesehen see/saw;
bestellen bestellst bestellt bestellt order/ordered; ein|packen packst packt eingepackt pack/packed;
bezahlen bezahlst bezahlt bezahlt pay for/paid for;
aus|suchen suchst sucht ausgesucht choose/chose""")
(NEED,) = _verbs("brauchen brauchst braucht gebraucht need/needed")
PROCURING = tuple(verb for verb in SHOPPING if verb.en in ("buy", "fetch", "order"))
EATING = _verbs("essen isst isst gegessen eat/ate; kaufen kaufst kauft gekauft buy/bought")
DRINKING = _verbs("""
trinken trinkst trinkt getrunken drink/drank; kaufen kaufst kauft gekauft buy/bought;
bestellen bestellst bestellt bestellt order/ordered""")
READING = _verbs("""
lesen liest liest gelesen read/read;
aus|leihen leihst leiht ausgeliehen borrow/borrowed""")
WRITING = _verbs("schreiben schreibst schreibt geschrieben write/wrote")
REPAIRING = _verbs("""
reparieren reparierst repariert repariert repair/repaired;
putzen putzt putzt geputzt clean/cleaned""")
MEETING = _verbs("""
treffen triffst trifft getroffen meet/met; besuchen besuchst besucht besucht visit/visited;
an|rufen rufst ruft angerufen call/called; ein|laden lädst lädt eingeladen invite/invited;
ab|holen holst holt abgeholt collect/collected; fragen fragst fragt gefragt ask/asked""")
HELPING = _verbs("""
helfen hilfst hilft geholfen help/helped; danken dankst dankt gedankt thank/thanked;
antworten antwortest antwortet geantwortet answer/answered;
zu|hören hörst hört zugehört listen to/listened to""")
GIVING = _verbs("""
geben gibst gibt gegeben give/gave; zeigen zeigst zeigt gezeigt show/showed;
bringen bringst bringt gebracht bring/brought; schicken schickst schickt geschickt send/sent;
leihen leihst leiht geliehen lend/lent""")
WEARING = _verbs("""
tragen trägst trägt getragen wear/wore;
an|probieren probierst probiert anprobiert try on/tried on""")
OPENING = _verbs("""
auf|machen machst macht aufgemacht open/opened; zu|machen machst macht zugemacht close/closed""")
TIDYING = _verbs("auf|räumen räumst räumt aufgeräumt tidy/tidied")
STAYING = _verbs("""
arbeiten arbeitest arbeitet gearbeitet work/worked; warten wartest wartet gewartet wait/waited;
schlafen schläfst schläft geschlafen sleep/slept; spielen spielst spielt gespielt play/played;
tanzen tanzt tanzt getanzt dance/danced; singen singst singt gesungen sing/sang;
frühstücken frühstückst frühstückt gefrühstückt have breakfast/had breakfast""")
WORK = STAYING[0]
RISING = _verbs("""
auf|stehen stehst steht *aufgestanden get up/got up;
ein|schlafen schläfst schläft *eingeschlafen fall asleep/fell asleep;
zurück|kommen kommst kommt *zurückgekommen come back/came back""")
GO, TRAVEL, FLY = _verbs("""
gehen gehst geht *gegangen go/went; fahren fährst fährt *gefahren travel/travelled;
fliegen fliegst fliegt *geflogen fly/flew""")
(LIVE,) = _verbs("wohnen wohnst wohnt gewohnt live/lived")
LAY, STAND = _verbs("""
legen legst legt gelegt put/put; stellen stellst stellt gestellt put/put""")
WAIT, THINK, SPEAK = _verbs("""
warten wartest wartet gewartet wait/waited; denken denkst denkt gedacht think/thought;
sprechen sprichst spricht gesprochen speak/spoke""")
DEPART, ARRIVE = _verbs("""
ab|fahren fährst fährt *abgefahren leave/left; an|kommen kommst kommt *angekommen arrive/arrived""")
BEGIN, END = _verbs("""
an|fangen fängst fängt angefangen begin/began; auf|hören hörst hört aufgehört end/ended""")

PLACES = table("""
im Garten/in the garden; in der Küche/in the kitchen; im Park/in the park; im Büro/at the office;
zu Hause/at home; in der Bibliothek/in the library; im Hotel/at the hotel;
am Bahnhof/at the station; in der Schule/at school; auf dem Balkon/on the balcony""")
DIRECTIONS = table("""
ins Kino/to the cinema; in den Park/to the park; in die Schule/to school;
auf den Markt/to the market; zum Arzt/to the doctor; zum Bahnhof/to the station;
in die Stadt/to town; ins Museum/to the museum; zur Arbeit/to work;
in die Bibliothek/to the library; zur Post/to the post office; nach Hause/home""")
# Where something lies (dative), and where it is put (accusative).
SPOTS = tuple(
    (Pair(*row.split("/")[::2]), Pair(*row.split("/")[1:]))
    for row in (
        "auf dem Tisch/auf den Tisch/on the table",
        "unter dem Bett/unter das Bett/under the bed",
        "neben der Tür/neben die Tür/beside the door",
        "in der Ecke/in die Ecke/in the corner",
        "hinter dem Sofa/hinter das Sofa/behind the sofa",
        "vor dem Fenster/vor das Fenster/in front of the window",
        "im Schrank/in den Schrank/in the cupboard",
        "auf dem Boden/auf den Boden/on the floor",
    )
)
MEANS = table("""
mit dem Bus/by bus; mit dem Zug/by train; mit dem Auto/by car; mit dem Fahrrad/by bicycle""")
CITIES = table("""
Berlin/Berlin; Hamburg/Hamburg; München/Munich; Köln/Cologne; Wien/Vienna; Zürich/Zurich;
Dresden/Dresden; Bremen/Bremen; Nürnberg/Nuremberg; Prag/Prague; Rom/Rome; Paris/Paris;
London/London; Brüssel/Brussels; Warschau/Warsaw""")
JOBS = tuple(
    (Pair(*row.split("/")[::2]), Pair(*row.split("/")[1:]))
    for row in (
        "Lehrer/Lehrerin/teacher",
        "Arzt/Ärztin/doctor",
        "Bäcker/Bäckerin/baker",
        "Koch/Köchin/cook",
        "Ingenieur/Ingenieurin/engineer",
        "Sänger/Sängerin/singer",
        "Maler/Malerin/painter",
        "Architekt/Architektin/architect",
    )
)
WOMEN = word_list("Anna Maria Lena Julia Sophie Emma Clara Laura Eva Nina")
MEN = word_list("Paul Peter Jonas Felix Max Lukas Thomas David Martin Simon")
