"""What words mean, for the rules and the checks: `vocabulary.txt` (ours) over WordNet 3.1 (`wordnet.json.gz`).

Nothing here is a model: look-ups of surface forms, plurals, what is a kind of what, and what is seen together.
"""

import functools
import gzip
import hashlib
import json
import re
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent

# A word (with inner apostrophes and hyphens), a number, one ideograph, or one mark.
TOKEN = re.compile(
    r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff]|\d+(?:[.,:]\d+)*|[^\W\d_]+(?:['’\-][^\W\d_]+)*|[^\w\s]|_"
)
NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve".split(),
    "0 1 2 3 4 5 6 7 8 9 10 11 12".split(),
)
NUMBER = {word: i for names in NUMBERS for i, word in enumerate(names)} | {"dozen": 12, "twenty": 20}
DETERMINERS = frozenset(
    "a an the this that these those his her its their my your our some any each every another no both several many few "
    "multiple various numerous all other".split()
)
PREPOSITIONS = frozenset(
    "of in on with at by near from into onto over under above below behind beside beneath between among around through "
    "across along against inside outside to for as like off toward towards past upon within without next front atop "
    "underneath about during amid up down out".split()
)
PRONOUNS = frozenset(
    "i you he she it we they who what which there him them us me himself herself itself themselves".split()
)
FUNCTION = (
    DETERMINERS
    | PREPOSITIONS
    | PRONOUNS
    | frozenset(
        "is are was were be been being am has have had having do does did doing and or but while that not no n't "
        "never so than then too very just also only where when how can could will would may might must should if "
        "because s t re ve up top it's there's very one's whose together each such own more most much while being get "
        "gets got".split()
    )
)
NEGATIONS = frozenset(
    "not no without never none nobody nothing neither nor cannot can't isn't aren't doesn't don't n't".split()
)

IRREGULAR = dict(
    pair.split("/")
    for pair in "man/men woman/women child/children person/people foot/feet tooth/teeth goose/geese mouse/mice ox/oxen "
    "sheep/sheep deer/deer fish/fish bison/bison moose/moose aircraft/aircraft knife/knives wolf/wolves loaf/loaves "
    "leaf/leaves shelf/shelves scarf/scarves calf/calves half/halves wife/wives thief/thieves hoof/hooves life/lives "
    "cactus/cacti octopus/octopuses shrimp/shrimp salmon/salmon squid/squid cattle/cattle wildebeest/wildebeest "
    "potato/potatoes tomato/tomatoes mango/mangoes buffalo/buffalo volcano/volcanoes mosquito/mosquitoes echo/echoes "
    "hero/heroes bus/buses gas/gases lens/lenses stairs/stairs offspring/offspring police/police people/people "
    "headphones/headphones sunglasses/sunglasses scissors/scissors leash/leashes passerby/passersby quiz/quizzes "
    "tuna/tuna trout/trout antenna/antennas".split()
)
IRREGULAR_SINGULAR = {plural: single for single, plural in IRREGULAR.items()}


@functools.lru_cache(maxsize=100_000)
def plural(noun: str) -> str:
    """The plural of an English noun, of its head where it is a phrase: "glass of wine" -> "glasses of wine"."""
    head, of, rest = noun.partition(" of ")
    first, space, last = head.rpartition(" ")
    if last in IRREGULAR:
        last = IRREGULAR[last]
    elif last.endswith("man") and last not in ("human", "german", "caiman"):
        last = last[:-3] + "men"
    elif last.endswith(("s", "x", "ch", "sh", "z")):
        last += "es"
    elif last.endswith("y") and last[-2:-1] not in "aeiou":
        last = last[:-1] + "ies"
    else:
        last += "s"
    return first + space + last + of + rest


@functools.lru_cache(maxsize=100_000)
def singulars(word: str) -> tuple[str, ...]:
    """What a word could be the plural of; the word itself is not among them."""
    head, of, rest = word.partition(" of ")
    if of:
        return tuple(s + of + rest for s in singulars(head))
    first, space, last = word.rpartition(" ")
    if last in IRREGULAR_SINGULAR:
        found = (IRREGULAR_SINGULAR[last],)
    elif last.endswith("men") and len(last) > 3:
        found = (last[:-3] + "man",)
    elif last.endswith("ies") and len(last) > 4:
        found = (last[:-3] + "y", last[:-1])
    elif last.endswith("es") and len(last) > 3:
        found = (last[:-1], last[:-2])
    elif last.endswith("s") and not last.endswith(("ss", "us", "is")) and len(last) > 2:
        found = (last[:-1],)
    else:
        found = ()
    return tuple(first + space + f for f in found)


def article(word: str) -> str:
    """ "a" or "an" before ``word``."""
    word = word.lower()
    if word.startswith(("hour", "honest", "heir", "honor", "honour")):
        return "an"
    if re.match(r"(?:uni(?!n|m)|use|usu|util|eu|ewe|ufo|one(?!i)|once|ura|ukulele|u-|ubi)", word):
        return "a"
    return "an" if word[:1] in "aeiou8" or word in ("11", "18", "suv", "x-ray", "mp3") else "a"


class Group(NamedTuple):
    """Words that exclude each other. ``flags``: mass, plural, part; ``place``: the preposition, or ""."""

    name: str
    words: list
    flags: frozenset
    place: str
    other: tuple


class Noun(NamedTuple):
    """A noun as it stands in a text: its ``lemma``, its `Group`, plural or not, and whether it may be a verb too."""

    lemma: str
    group: Group
    plural: bool
    doubtful: bool


class Lexicon:
    """Loaded once by `lexicon()`; takes about 0.2 s and 60 MB."""

    def __init__(self) -> None:
        self.groups, self.synonym, self.own, self.scenes = {}, {}, {}, {}
        self.attributes, self.attribute_groups = {}, {}
        self._read_vocabulary((HERE / "vocabulary.txt").read_text(encoding="utf-8"))
        net = json.loads(gzip.decompress((HERE / "wordnet.json.gz").read_bytes()))
        self.nouns, self.up, self.verbs, self.adjectives = net["noun"], net["up"], net["verb"], net["adjective"]
        self._above = {}
        self._choose_senses()
        # Nouns that are no things: they take an adjective, and that is all that is known of them.
        self.plain_nouns = frozenset(
            "background scene view day night sky color colour light design pattern style look room area photo picture "
            "image face place shape line surface water wave air shadow hair eyes skin text letters lights display "
            "section part side piece set pair top theme decor material landscape weather ground season".split()
        )
        self._nouns = {}
        phrases = [w for table in (self.own, self.nouns) for w in table if " " in w]
        self.phrases = {*phrases, *map(plural, phrases)}
        self.phrase_starts = {w.split(" ")[0] for w in self.phrases}
        self.attribute_starts = {w.split(" ")[0] for w in self.attributes if " " in w}
        self.scene_members = {}
        for word, scenes in self.scenes.items():
            for scene in scenes if word in self.own and word in self.own[word].words else ():
                self.scene_members.setdefault(scene, []).append(word)

    def _read_vocabulary(self, text):
        group = kind = None
        for line in text.splitlines():
            if not line.strip() or line.startswith("#"):
                continue
            if line[0] == "{":
                scene, _, words = line[1:].partition("}")
                for word in words.split(","):
                    self.scenes.setdefault(self.synonym.get(word.strip(), word.strip()), set()).add(scene)
            elif line[0] == "<":
                kind = line.strip("<>")
                self.attribute_groups[kind] = []
            elif line[0] == "[":
                name, *flags = re.split(r" (?=mass|plural|part|place=|else=)", line.strip("[]"))
                options = dict(f.split("=") for f in flags if "=" in f)
                plain = frozenset(f for f in flags if "=" not in f)
                other = tuple(options.get("else", "").split(",")) if options.get("else") else ()
                group = self.groups.setdefault(name, Group(name, [], plain, options.get("place", ""), other))
            else:
                for word in line.split(","):
                    first, *same = word.strip().split("=")
                    offered, first = not first.startswith("?"), first.lstrip("?")
                    if kind is None:
                        if offered:
                            group.words.append(first)
                        self.own.setdefault(first, group)
                    else:
                        self.attribute_groups[kind].append(first)
                        self.attributes.setdefault(first, (kind, first))
                    for s in same:
                        if kind is None:
                            self.own.setdefault(s, group)
                            self.synonym.setdefault(s, first)
                        else:
                            self.attributes.setdefault(s, (kind, first))

    def _choose_senses(self):
        # Of a word's senses the one that has most in common with its group: the mouse among animals.
        self.sense, self.word_of_sense = {}, {}
        by_group = {}
        for word, group in self.own.items():
            by_group.setdefault(group.name, []).append(word)
        for words in by_group.values():
            counts = {}
            for word in words:
                for s in {a for sense in self.nouns.get(word, [[]])[0] for a in self.above(sense)}:
                    counts[s] = counts.get(s, 0) + 1
            for word in words:
                senses = self.nouns.get(word, [[]])[0]
                if senses:
                    fit = [sum(counts[a] for a in self.above(s)) / len(self.above(s)) for s in senses]
                    best = next(s for s, f in zip(senses, fit, strict=True) if f >= 0.6 * max(fit))
                    self.sense[word] = best
                    self.word_of_sense.setdefault(best, word)

    def above(self, sense: int) -> set[int]:
        """The sense and everything it is a kind of."""
        found = self._above.get(sense)
        if found is None:
            found = {sense}
            for parent in self.up[sense]:
                found |= self.above(parent)
            self._above[sense] = found
        return found

    def sense_of(self, lemma: str) -> int | None:
        """The sense of a lemma that is meant, or None."""
        sense = self.sense.get(lemma)
        if sense is None and lemma not in self.own and lemma in self.nouns:
            sense = self.nouns[lemma][0][0]
        return sense

    def noun(self, surface: str) -> Noun | None:
        """The `Noun` that a lower-case word or phrase is, or None."""
        if surface not in self._nouns:
            if len(self._nouns) > 200_000:
                self._nouns.clear()
            self._nouns[surface] = self._noun(surface)
        return self._nouns[surface]

    def _noun(self, surface):
        if surface in self.own and not (surface in IRREGULAR_SINGULAR and IRREGULAR_SINGULAR[surface] in self.own):
            group = self.own[surface]
            return Noun(surface, group, "plural" in group.flags or surface in PLURAL_ONLY, self._doubtful(surface))
        for single in singulars(surface):
            if single in self.own:
                return Noun(single, self.own[single], True, self._doubtful(single))
        first, _, last = surface.rpartition(" ")
        if first and (self.noun(last) and self.noun(last).lemma in self.own or first in self.attributes):
            return None  # "black cat" is a cat
        for lemma, many in [(surface, False), *((s, True) for s in singulars(surface))]:
            found = self.nouns.get(lemma)
            if found and lemma not in FUNCTION and lemma not in self.attributes and not found[2] and len(lemma) > 2:
                group = self._group_of(found[0][0])
                if group and "part" not in group.flags:
                    return Noun(lemma, group, many, bool(found[1]))
        return None

    def _doubtful(self, lemma):
        return lemma in DOUBTFUL or (lemma in self.nouns and bool(self.nouns[lemma][1]))

    def _group_of(self, sense):
        # breadth first, so that the nearest word of ours above it decides
        level, seen = [sense], set()
        while level:
            for s in level:
                word = self.word_of_sense.get(s)
                if word:
                    name = self.own[word].name
                    return self.groups["job" if name == "crowd" else name]
            seen.update(level)
            level = [p for s in level for p in self.up[s] if p not in seen]
        return None

    def lemma(self, word: str) -> str:
        """The dictionary form under which a lower-case word is compared: singular, synonyms of ours made one."""
        found = self.noun(word)
        if found:
            return self.synonym.get(found.lemma, found.lemma)
        if word in self.attributes:
            return self.attributes[word][1]
        return word

    @functools.lru_cache(maxsize=200_000)  # noqa: B019  (there is one lexicon)
    def related(self, a: str, b: str) -> bool:
        """Whether one of two lemmas means the same as the other, or is a kind of it."""
        a, b = self.synonym.get(a, a), self.synonym.get(b, b)
        if a == b:
            return True
        x, y = self.attributes.get(a), self.attributes.get(b)
        if x and y:
            return x[1] == y[1]
        g, h = self.own.get(a), self.own.get(b)
        if g and h:
            names = {g.name, h.name}
            if names <= PEOPLE and (len(names) == 2 or "crowd" in names) and names != {"age", "child"}:
                return True  # a man may be a surfer, and either is a person
            if g.name == h.name and "part" not in g.flags and not (a in g.words and b in g.words):
                return True  # "food" is never offered because it is above the others of its group
        s, t = self.sense_of(a), self.sense_of(b)
        if s is not None and t is not None:
            return s in self.above(t) or t in self.above(s)
        for table in (self.verbs, self.adjectives):
            shared = set(table.get(a, ())) & set(table.get(b, ()))
            if shared:
                return True
        return False

    def opposed(self, a: str, b: str) -> bool:
        """Whether two lemmas belong to one group of attributes, and so cannot both be true."""
        x, y = self.attributes.get(a), self.attributes.get(b)
        return bool(x and y and x[0] == y[0] and x[1] != y[1])


PEOPLE = frozenset(("age", "role", "job", "crowd", "child"))
PLURAL_ONLY = frozenset(
    "people scissors shorts jeans clothes stairs headphones sunglasses glasses french fries".split()
)
# Nouns of ours that are as likely something else: taken for nouns only where the words around them say so.
DOUBTFUL = frozenset(
    "saw can rose fly ground drink fish ski slide swing iron drill lock nail hose chain face back head hand sign "
    "counter mask model star cook coach pilot judge bat bow ring tie net watch stand train park dress duck crane bank "
    "fan screen cable wire ice rain water snow sand mud trunk wing arm box button card map bear orange stone brick "
    "glass plant suit present top paper wood steps fur bug bank mouse robin cardinal iron mixer seal turkey china "
    "straw cut step cover light jam toast whistle trainer waste wave smoke fog lounge house shop store stage dock "
    "pool yard field trail track platform path party market fair tour needle hook anchor comb key brush rope broom "
    "tile sheet boxer runner driver bow trumpet drum corn squash pepper pickle nut seed bean press race bill cap "
    "crown hood veil shield spear lace group mount".split()
)


def digest() -> str:
    """16 hex digits that change with the vocabulary, WordNet's part or this package's rules."""
    found = hashlib.sha256()
    files = ("vocabulary.txt", "wordnet.json.gz", "lexicon.py", "rules.py", "checks.py")
    for name in (*files, "counts.py", "source.py", "blind.py"):
        found.update((HERE / name).read_bytes())
    return found.hexdigest()[:16]


@functools.cache
def lexicon() -> Lexicon:
    """The one `Lexicon`."""
    return Lexicon()
