"""Hallucinated captions by rewriting words, with no network and no model.

A caption is tokenised, its nouns are found, and each kind of hallucination is a set of places where it can be changed:

- existence: a noun becomes another of its group, more likely one seen where the caption's other things are; or such a
  thing is added;
- attribute: a colour, material, size, state, posture ... becomes another that excludes it, two things exchange theirs,
  or a colour is added;
- quantity: a number, "a", "several", "a group of" or a bare plural becomes another, either way, and the words that
  agree with it follow; numbers are read exactly, so that "a dog" is false of two dogs;
- location: a relation ("on top of") becomes one that excludes it, its two things change places, a place becomes another
  place, or is added.

What takes a word's place is drawn by how often it stands beside the same words in the captions that are rewritten
(`counts`). One candidate in four leaves out an adjective or the phrase at the end as well, as others say more.

English only. Everything outside the changed words stays as it was.
"""

import bisect
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from . import KINDS, Item
from .checks import RATIO, Checker, length
from .counts import Counts
from .lexicon import (
    DETERMINERS,
    FUNCTION,
    NEGATIONS,
    NUMBER,
    PEOPLE,
    PLURAL_ONLY,
    PREPOSITIONS,
    PRONOUNS,
    TOKEN,
    article,
    lexicon,
    plural,
)

_FEW = 4  # candidates with which nothing has to be added
MOST, MORE = 16, 8  # candidates of a caption to choose one among; for each further one
LONGEST = 10_000  # characters of a caption; LLaVA's context is shorter
CHARACTERS = (0.7, 1.4)  # length in characters, beside the checker's ratio in words; given up if nothing else is left

_GENDER = {
    "man": "m", "boy": "m", "elderly man": "m", "waiter": "m", "actor": "m", "groom": "m", "king": "m", "prince": "m",
    "cowboy": "m", "businessman": "m", "fisherman": "m", "monk": "m", "priest": "m",
    "woman": "f", "girl": "f", "elderly woman": "f", "waitress": "f", "actress": "f", "bride": "f", "queen": "f",
    "princess": "f", "businesswoman": "f", "nun": "f",
}  # fmt: skip
_GENDERED = {"he": "m", "his": "m", "him": "m", "himself": "m", "she": "f", "her": "f", "hers": "f", "herself": "f"}

# What excludes a relation. A plain preposition is taken for a relation between things only where `_location` says so.
_RELATIONS = {
    "in front of": ("behind", "on top of"),
    "on top of": ("under", "next to", "behind"),
    "next to": ("on top of", "behind", "far from"),
    "beside": ("on top of", "behind", "far from"),
    "close to": ("far from",),
    "away from": ("toward",),
    "out of": ("into",),
    "upside down": ("right side up",),
    "at the top of": ("at the bottom of",),
    "at the bottom of": ("at the top of",),
    "at the base of": ("at the top of",),
    "in the middle of": ("at the edge of", "outside of"),
    "in the center of": ("at the edge of", "outside of"),
    "at the end of": ("in the middle of",),
    "at the edge of": ("in the middle of",),
    "on the side of": ("on top of", "in the middle of"),
    "in the background": ("in the foreground",),
    "in the foreground": ("in the background",),
    "on the left": ("on the right",),
    "on the right": ("on the left",),
    "left side": ("right side",),
    "right side": ("left side",),
    "to the left": ("to the right",),
    "to the right": ("to the left",),
    "surrounded by": ("far from",),
    "covered with": ("lying next to",),
    "filled with": ("next to",),
    "full of": ("next to", "without"),
    "hanging from": ("lying under",),
    "leaning against": ("far from",),
}
_RELATION_STARTS = frozenset(r.split()[0] for r in _RELATIONS)
_PLAIN = {
    "on": ("under", "next to", "behind"),
    "in": ("next to", "behind", "on top of"),
    "at": ("under", "behind", "far from"),
    "near": ("on top of", "inside", "far from"),
    "by": ("on top of", "behind", "far from"),
    "behind": ("in front of", "on top of"),
    "under": ("on top of", "next to"),
    "underneath": ("on top of", "next to"),
    "beneath": ("on top of", "next to"),
    "below": ("above",),
    "above": ("below", "next to"),
    "over": ("under", "next to"),
    "inside": ("outside", "behind", "on top of"),
    "outside": ("inside", "on top of"),
    "into": ("out of", "next to"),
    "onto": ("off of", "under"),
    "up": ("down",),
    "down": ("up",),
    "toward": ("away from",),
    "towards": ("away from",),
    "between": ("behind", "on top of"),
    "around": ("on top of", "under"),
    "against": ("far from", "on top of"),
    "along": ("far from",),
    "across": ("along", "under"),
    "through": ("around", "past"),
    "past": ("into",),
    "off": ("onto",),
    "upstairs": ("downstairs",),
    "downstairs": ("upstairs",),
    "indoors": ("outdoors",),
    "outdoors": ("indoors",),
}
_ALONE = frozenset(("upstairs", "downstairs", "indoors", "outdoors"))
# groups whose members things stand on, lie in, or are next to
_ON = frozenset(
    "furniture,road vehicle,rail vehicle,watercraft,aircraft,appliance,bath and kitchen fittings,dish,decor,bag,ride,"
    "paper,street thing,plant,building,barrier,electronics,sports gear,animal,pet,farm animal,wild animal,meal,"
    "opening,land feature,surface,ground,toy,staple,sweets".split(",")
)
_IN = frozenset(
    "road vehicle,rail vehicle,watercraft,aircraft,dish,bag,furniture,building,appliance,decor,plant".split(",")
)
_COLOURED = frozenset(
    "road vehicle,watercraft,furniture,decor,upper wear,lower wear,skirt,footwear,headwear,accessory,bag,ride,toy,"
    "building,electronics,appliance,dish,street thing,aircraft,rail vehicle,instrument,paper,eyewear,barrier,"
    "opening".split(",")
)
_ANIMATE = PEOPLE | frozenset(("animal", "pet", "farm animal", "wild animal", "bird", "stand-in"))
_OF_THINGS = frozenset("colour pattern material size".split())  # attributes that two things can exchange
# What holds one way only: "a dog behind a cat" is false where "a cat behind a dog" is true.
_ONE_WAY = frozenset(
    "behind,in front of,on top of,above,below,under,underneath,beneath,on the left of,on the right of,to the left of,"
    "to the right of,chasing,following,leading,watching,looking at,feeding".split(",")
)
_PLACES = ("room", "venue", "nature", "surface", "stop")
_VAGUE = frozenset("several many multiple numerous various some".split())
_OF_SEVERAL = frozenset(
    "their they them themselves each other others another together both all one between among row rows line lines "
    "various different same opposite including face hugging kissing hands side team competing playing dressed either "
    "neither".split()
)
_BORNE = frozenset("on in wearing riding holding carrying".split())
_WORN = frozenset("upper wear,skirt,headwear,accessory,bag,ride,road vehicle".split(","))
_GROUPS_OF = (
    "group",
    "bunch",
    "lot",
    "crowd",
    "herd",
    "flock",
    "row",
    "couple",
    "pair",
    "few",
    "number",
    "series",
    "set",
)
_MANY = ("four", "five", "six", "seven", "eight")
# What says how many, and what cannot be true at once with it ("dogs" and "two dogs" can). "" is a bare plural.
_OTHER_THAN = {
    "a": ("two", "three", *_MANY, "several", "many", "a few", "some", "a group of", "a couple of", ""),
    "": ("a",),
    "two": ("a", "three", *_MANY, "several", "many", "a group of"),
    "several": ("a", "two", "a couple of"),
    "some": ("a",),
    "a few": ("a", "two", "many"),
    "a group of": ("a", "two", "a couple of"),
    "a couple of": ("a", "three", *_MANY, "several", "many", "a group of"),
    **{n: ("a", *(m for m in ("two", "three", *_MANY) if m != n)) for n in ("three", *_MANY, "nine", "ten", "eleven")},
}
_OTHER_THAN |= {str(NUMBER[n]): tuple(o for o in _OTHER_THAN[n] if o in NUMBER) for n in _OTHER_THAN if n in NUMBER}
_SINGULAR_VERBS = {"is": "are", "was": "were", "has": "have", "does": "do", "isn't": "aren't"}
_PLURAL_VERBS = {many: one for one, many in _SINGULAR_VERBS.items()}
_PICTURES = frozenset("photo photos photograph photography picture image drawing illustration film".split())
_CLAUSE_ENDS = frozenset(", . ; : while as that which who where when ( )".split())


class Dice:
    """A stream of choices that depends on nothing but its key; far cheaper to start than random.Random."""

    def __init__(self, key: str) -> None:
        self._key, self._bits = key.encode("utf-8", "surrogatepass"), 0

    def below(self, n: int) -> int:
        """A number from 0 to n - 1."""
        if self._bits < 1 << 32:
            self._key = hashlib.blake2b(self._key, digest_size=64).digest()
            self._bits = int.from_bytes(self._key, "big")
        self._bits, found = divmod(self._bits, n)
        return found

    def choose(self, options: Sequence) -> Any:
        """One of the options, all alike."""
        return options[self.below(len(options))]

    def weighted(self, options: Sequence, sums: Sequence[float]) -> Any:
        """One of the options; ``sums``: their weights, summed up to each."""
        return options[min(bisect.bisect(sums, self.below(1 << 30) / (1 << 30) * sums[-1]), len(options) - 1)]

    def draw(self, weighted: Iterable[tuple[int, Any]]) -> Iterator[Any]:
        """Each of some (integer weight, option) pairs once, in a random order, heavier ones sooner."""
        left = list(weighted)
        total = sum(w for w, _ in left)
        while left:
            at = self.below(total)
            for i, (weight, option) in enumerate(left):  # noqa: B007
                at -= weight
                if at < 0:
                    break
            del left[i]
            total -= weight
            yield option


class _Found:
    """A noun in a text: tokens [start, end), what it is, and whether it heads its phrase."""

    __slots__ = ("start", "end", "noun", "head")

    def __init__(self, start, end, noun):
        self.start, self.end, self.noun, self.head = start, end, noun, True


class Text:
    """A caption taken apart: tokens with places, lower-case forms, nouns."""

    def __init__(self, caption: str, others: Iterable[str] = ()) -> None:
        self.lexicon = lexicon()
        self.caption = caption
        self.tokens = [match.span() for match in TOKEN.finditer(caption)]
        self.low = [caption[a:b].lower() for a, b in self.tokens]
        if "-" in self.low:
            self._join_hyphens()
        self.size = len(self.low)
        self.nouns = []
        self._find_nouns()
        self.lemmas = [self.lexicon.synonym.get(f.noun.lemma, f.noun.lemma) for f in self.nouns]
        self.known = list(self.lemmas)
        for other in others:
            self.known += _lemmas(other)
        self.scenes = {}
        for lemma in self.lemmas:
            for scene in self.lexicon.scenes.get(lemma, ()):
                self.scenes[scene] = self.scenes.get(scene, 0) + 1
        self.gender = {_GENDERED[w] for w in self.low if w in _GENDERED}
        self.starts = {f.start: f for f in self.nouns}
        self.inside = {i for f in self.nouns for i in range(f.start, f.end)}

    def _join_hyphens(self):
        # web captions are tokenised: "t - shirt", "medium - sized"
        tokens, low = [], []
        for span, word in zip(self.tokens, self.low):
            if len(low) > 1 and low[-1] == "-" and word[0].isalpha() and low[-2].isalpha():
                low[-2:] = [low[-2] + "-" + word]
                tokens[-2:] = [(tokens[-2][0], span[1])]
            else:
                low.append(word)
                tokens.append(span)
        self.tokens, self.low = tokens, low

    def at(self, i: int) -> str | None:
        """The token, in lower case; None beyond the ends."""
        return self.low[i] if 0 <= i < self.size else None

    def _find_nouns(self):
        low, words = self.low, self.lexicon
        i = 0
        while i < self.size:
            word = low[i]
            if word in FUNCTION and word != "can" or not word[0].isalpha():
                i += 1
                continue
            for n in (3, 2, 1) if word in words.phrase_starts else (1,):
                phrase = word if n == 1 else " ".join(low[i : i + n])
                noun = words.noun(phrase) if n == 1 or phrase in words.phrases and i + n <= self.size else None
                if noun and (n > 1 or not noun.doubtful or self._is_noun(i, noun)):
                    if n == 1 and word in words.attributes and not self._is_noun(i, noun):
                        continue
                    if noun.plural and plural(noun.lemma) == noun.lemma and self._after_one(i):
                        noun = noun._replace(plural=False)  # "a sheep"
                    self.nouns.append(_Found(i, i + n, noun))
                    i += n
                    break
            else:
                i += 1
        for found, following in zip(self.nouns, [*self.nouns[1:], None], strict=False):
            after = self.at(found.end)
            if following and following.start == found.end or after in ("'", "’", "'s") or self.is_unknown(after):
                found.head = False

    def _after_one(self, i):
        """Whether what stands before token i, but for adjectives, says that it is a single one."""
        while i > 0 and self.low[i - 1] not in FUNCTION and i - 1 not in (f.end - 1 for f in self.nouns):
            i -= 1
        return self.at(i - 1) in ("a", "an", "another", "this", "each", "every")

    def _is_noun(self, i, noun):
        """Whether a word that may be something else is a noun here, by its neighbours."""
        before, after = self.at(i - 1), self.at(i + 1)
        if before is None:
            return after is None or after in PREPOSITIONS or not after[0].isalpha()
        if before in ("to", "not", "n't", "can", "will", "'s") or before in PRONOUNS:
            return False
        if after in ("a", "an", "the", "his", "her", "their", "its"):
            return False
        if before in DETERMINERS or before in PREPOSITIONS or before in NUMBER:
            return True
        if before in ("and", "or", ","):
            earlier = self.at(i - 2)
            if noun.plural and earlier and earlier.endswith("s") and earlier[:-1] in self.lexicon.verbs:
                if not self.nouns or self.nouns[-1].end != i - 1:
                    return False  # "smiles and waves"
            return not noun.plural or after is None or after in FUNCTION
        if before in self.lexicon.attributes or before in self.lexicon.adjectives and before not in self.lexicon.verbs:
            return True
        if self.nouns and self.nouns[-1].end == i:  # "dog park", but not "dog watches" or "man can"
            return (
                not noun.plural and not self.nouns[-1].noun.plural and before not in ("man", "woman", "person", "dog")
            )
        return before[0].isalpha() and before.endswith(("ing", "ed", "en")) and before not in FUNCTION

    def is_unknown(self, word: str | None) -> bool:
        """Whether a token is a word of which nothing is known: a part of a name, perhaps."""
        words = self.lexicon
        return (
            word is not None
            and word[0].isalpha()
            and word not in FUNCTION
            and word not in words.attributes
            and word not in words.adjectives
            and word not in words.verbs
            and not word.endswith(("ing", "ed", "ly", "s"))
        )

    def is_english(self) -> bool:
        """Whether enough of the words are known: half with a function word among them, most without."""
        words, known, common = self.lexicon, 0, 0
        places = [i for i, w in enumerate(self.low) if w[0].isalpha()]
        for i in places:
            word = self.low[i]
            common += word in FUNCTION
            known += (
                i in self.inside
                or word in FUNCTION
                or word in words.attributes
                or word in words.adjectives
                or word in words.verbs
                or word in words.nouns
            )
        return bool(places) and known >= (0.5 if common else 0.8) * len(places)

    def denied(self, i: int) -> bool:
        """Whether a "no", "not" or "without" stands shortly before token i."""
        return not NEGATIONS.isdisjoint(self.low[max(0, i - 4) : i])

    def room(self) -> int:
        """Words that may be added."""
        return int(length(self.caption) * (RATIO[1] - 1))

    def span(self, start: int, end: int) -> tuple[int, int]:
        """Characters of tokens [start, end)."""
        return self.tokens[start][0], self.tokens[end - 1][1]

    def cased(self, start: int, end: int, new: str) -> str:
        """``new`` in upper case, or with a capital, where the caption's characters [start, end) are."""
        old = self.caption[start:end]
        if old.isupper() and len(old) > 1:
            return new.upper()
        return new[:1].upper() + new[1:] if old[:1].isupper() else new

    def put(self, start: int, end: int, new: str) -> tuple[int, int, str]:
        """An edit: tokens [start, end) become ``new``; case and a preceding "a" or "an" follow."""
        first, last = self.span(start, end)
        new = self.cased(first, last, new)
        if self.at(start - 1) in ("a", "an") and self.tokens[start - 1][1] < first:
            begin, stop = self.tokens[start - 1]
            return begin, last, self.cased(begin, stop, article(new)) + self.caption[stop:first] + new
        return first, last, new

    def apply(self, edits: Iterable[tuple[int, int, str]]) -> str:
        """The caption after some edits that do not overlap."""
        text = self.caption
        for start, end, new in sorted(edits, reverse=True):
            text = text[:start] + new + text[end:]
        return text


@functools.lru_cache(maxsize=4096)  # the captions of an image are each looked at beside all its others
def _lemmas(caption):
    return [f.noun.lemma for f in Text(caption).nouns]


@functools.lru_cache(maxsize=1024)
def _plurals(words):
    return tuple(map(plural, words))


class Rules:
    """Rewrites captions; deterministic in ``seed``, the item's index and its caption."""

    def __init__(self, seed: int = 0, checker: Checker | None = None, counts: Counts | None = None) -> None:
        self.seed, self.checker, self.lexicon = seed, checker or Checker(), lexicon()
        self.counts = counts or Counts()
        self._count = functools.lru_cache(maxsize=20_000)(self.counts.of)
        self._sums = functools.lru_cache(maxsize=20_000)(self._weigh)

    def _weigh(self, before, options, after):
        return list(itertools.accumulate(self.counts.weight(before, option, after) for option in options))

    def _fitting(self, text, start, end, options, dice):
        """One of some phrases for tokens [start, end), by how often it stands beside their neighbours in the corpus."""
        return dice.weighted(options, self._sums(text.at(start - 1), options, text.at(end)))

    # --- the four kinds: each a list of (weight, function of the dice that gives edits or None) --------------------

    def sites(self, text: Text) -> dict[str, list[tuple[int, Callable]]]:
        """{kind: [(weight, make)]}; ``make(dice)`` gives a list of (start, end, new) in characters, or None."""
        return {
            "existence": self._existence(text),
            "attribute": self._attribute(text),
            "quantity": self._quantity(text),
            "location": self._location(text),
        }

    def _existence(self, text):
        sites = []
        for found in text.nouns:
            group = found.noun.group
            counted = text.at(found.end) == "of" and (found.noun.lemma in _GROUPS_OF or group.name == "unit")
            if text.denied(found.start) or "part" in group.flags:
                continue  # "no dog" in place of "no cat" is true
            if found.head and not counted and not group.place and (group.words or group.other):
                sites.append((3 if group.name in PEOPLE else 4, partial(self._swap, text, found)))
        if text.size >= 7:
            pool = {}
            for scene, count in (text.scenes or {"person": 1}).items():
                for word in self.lexicon.scene_members[scene]:
                    pool[word] = pool.get(word, 0) + count
            words = sorted(pool)
            sums = list(itertools.accumulate(pool[w] ** 2 * (1 + self._count(w)) for w in words))
            sites.append((2, partial(self._add_thing, text, words, sums)))
        return sites

    def _options(self, group, depth=0):
        if group.words:
            return tuple(group.words)
        names = group.other if depth < 3 else ()
        return tuple(w for name in names for w in self._options(self.lexicon.groups[name], depth + 1))

    def _draw(self, text, found, options, dice):
        """Up to 12 of the options in place of a noun, by how they go with the words beside it, those seen with the
        caption's other things five times as often."""
        scenes, seen, tried = self.lexicon.scenes, text.scenes.keys(), set()
        forms = _plurals(options) if found.noun.plural else options
        sums = self._sums(text.at(found.start - 1), forms, text.at(found.end)) if options else ()
        for _ in range(48 if options else 0):
            word = dice.weighted(options, sums)
            if word in tried or seen and seen.isdisjoint(scenes.get(word, ())) and dice.below(5):
                continue
            tried.add(word)
            yield word
            if len(tried) == 12:
                return

    def _new(self, text, word):
        for known in text.known:  # a dining table is a table
            if self.lexicon.related(word, known) or word.endswith(" " + known) or known.endswith(" " + word):
                return False
            if word.startswith(known + " ") or known.startswith(word + " "):
                return False
        return True

    def _instead(self, text, found):
        """Lists of what may take a noun's place, the first one first; none where it would read broken."""
        noun, words, before = found.noun, self.lexicon, text.at(found.start - 1)
        start = self._phrase(text, found)[0]
        if text.at(found.end) in ("sized", "themed", "shaped", "styled", "style", "like") or "corn" in noun.lemma:
            return []
        bare = not noun.plural and text.at(start) not in _COUNTING and "mass" not in noun.group.flags
        if bare and (noun.lemma in _UNCOUNTED or start and not {"a", "an"}.isdisjoint(text.low)):
            return []  # "filled with furniture" would become "filled with chair"
        if noun.group.name == "furniture" and text.at(start - 1) in ("in", "into", "inside"):
            return [("chair", "armchair", "bed", "crib", "hammock", "rocking chair")]
        described = before in words.attributes or before in words.adjectives or before in FUNCTION
        unknown = before and (words.noun(before) or text.is_unknown(before) or len(before) == 1 and before.isalpha())
        if unknown and not described or noun.lemma in _CROWDS:
            return []  # "train yard" would become "train forest", "oven mitt" "oven ball"
        if before == "inside" or text.at(self._phrase(text, found)[0] - 1) == "inside" and noun.group.place != "in":
            return []
        lemma = words.synonym.get(noun.lemma, noun.lemma)
        if noun.group.name == "age" and before in ("young", "old", "older", "younger", "elderly"):
            return [tuple(w for w in ("man", "woman", "boy", "girl") if _GENDER[w] != _GENDER.get(lemma))]
        if noun.group.name == "sports gear" and before in ("play", "plays", "playing", "played"):
            return [("baseball", "basketball", "volleyball", "frisbee")]
        return [self._options(noun.group), self._others(noun.group)]

    def _swap(self, text, found, dice):
        """Every mention of a noun becomes another noun of its group, or of the groups to look in instead."""
        noun, groups = found.noun, self.lexicon.own
        mass = "mass" in noun.group.flags
        for options in self._instead(text, found) if not (mass and noun.plural) else ():
            for word in self._draw(text, found, options, dice):
                group = groups[word]
                if ("mass" in group.flags) != mass or not self._new(text, word):
                    continue
                if text.gender and noun.group.name in PEOPLE and _GENDER.get(word, "") not in text.gender:
                    continue
                if ("plural" in group.flags or word in PLURAL_ONLY) and not noun.plural:
                    continue
                edits = []
                for other in text.nouns:
                    if other.noun.lemma == noun.lemma and (other.head or other is found):
                        many = other.noun.plural and "plural" not in group.flags and not mass
                        edits.append(text.put(other.start, other.end, plural(word) if many else word))
                if group.place:
                    k = found.start - 1
                    while k >= 0 and (text.low[k] in DETERMINERS or self._is_modifier(text, k)):
                        k -= 1
                    if text.at(k) in ("in", "on", "at") and text.at(k) != group.place:
                        edits.append(text.put(k, k + 1, group.place))
                return edits
        return None

    def _others(self, group):
        return tuple(w for name in group.other for w in self._options(self.lexicon.groups[name]))

    def _add_thing(self, text, words, sums, dice):
        room = text.room()
        for _ in range(12):
            word = dice.weighted(words, sums)
            group = self.lexicon.own[word]
            if group.place or "part" in group.flags or not self._new(text, word):
                continue
            if "mass" in group.flags:
                thing = "some " + word
            elif "plural" in group.flags or word in PLURAL_ONLY:
                thing = "a pair of " + word
            else:
                thing = f"{article(word)} {word}"
            thing = dice.choose(("next to ", "near ", "and ") if room > 3 else ("near ", "and ")) + thing
            if length(thing) <= room:
                return [self._append(text, thing)]
        return None

    def _append(self, text, phrase):
        end = len(text.caption.rstrip(" \t\r\n.!?\"')…"))
        if text.caption[end : end + 1] == ")" or text.caption[end : end + 1] == '"':
            end += 1
        phrase = phrase.upper() if text.caption.isupper() else phrase
        return end, end, " " + phrase

    def _attribute(self, text):
        sites, borne, words, low, end = [], [], self.lexicon.attributes, text.low, 0
        for i, word in enumerate(low):
            if i < end or word not in words and word not in self.lexicon.attribute_starts:
                continue
            for n in (3, 2, 1):
                found = words.get(" ".join(low[i : i + n])) if i + n <= text.size else None
                if found and not text.denied(i) and self._is_attribute(text, i, i + n, found[0]):
                    sites.append((4, partial(self._exchange, text, i, i + n, found)))
                    end = i + n
                    borne.append((i, end, found))
                    break
        for (i, j, one), (k, m, other) in itertools.combinations(borne, 2):
            apart = any(j <= f.start < k for f in text.nouns)  # "red and white" is white and red
            if one[0] == other[0] and one[1] != other[1] and one[0] in _OF_THINGS and apart:
                sites.append((8, partial(self._trade, text, (i, j), (k, m))))
        for found in text.nouns:
            coloured = found.noun.group.name in _COLOURED and not text.denied(found.start)
            if found.head and coloured and text.at(found.start - 1) in _TAKES_ADJECTIVE:
                sites.append((1, partial(self._colour, text, found)))
        return sites

    def _is_attribute(self, text, i, j, kind):  # noqa: C901
        before, after = text.at(i - 1), text.at(j)
        if i in text.inside and text.starts.get(i) is None:
            return False
        at = text.starts.get(i)
        if at is not None and (at.end > j or at.head):
            return False
        if kind in ("daytime", "daylight"):
            return True
        if kind == "photo" and text.low[i] == "black" and after not in _PICTURES:
            return False
        following = text.starts.get(j)
        if "posture" in kind or "motion" in kind:
            if "verb" in kind:  # but "a food stand", "jumps a gate"
                many = "plural" not in kind or any(f.end == i and f.noun.plural for f in text.nouns)
                return i - 1 in text.inside and after not in DETERMINERS and many
            return following is None and before not in ("a", "an", "the") and after not in DETERMINERS
        if kind.endswith("verb"):
            return i - 1 in text.inside and (after in DETERMINERS or following is not None)
        if kind in ("riding", "handling", "eating", "reading"):
            return after in DETERMINERS or following is not None and before not in ("a", "an", "the")
        if kind == "facing":
            return after in DETERMINERS or following is not None
        if kind in ("face", "parking", "flight"):
            return True
        if kind in ("size", "age", "compare age", "compare size", "compare height") and following is not None:
            if following.noun.group.name == "child" or following.noun.lemma in ("boy", "girl", "baby"):
                return False
            if kind == "size" and following.noun.group.name in PEOPLE:
                return False
        if before in ("to", "very") and kind in ("open", "wet", "clean"):
            return False
        if after == "of":
            return False
        if (
            following is not None
            or after in self.lexicon.adjectives
            and after not in FUNCTION
            or after in self.lexicon.attributes
            or after in self.lexicon.plain_nouns
        ):
            return True
        if before in ("is", "are", "was", "were", "looks", "being", "painted") or kind == "colour" and after == "and":
            return after is None or after in FUNCTION or not after[0].isalpha()
        return False

    def _exchange(self, text, i, j, found, dice):
        kind, word = found
        beside = [self.lexicon.attributes.get(w, (None,))[0] for w in (text.at(i - 1), text.at(j))]
        if kind in beside:
            return None  # "dirty muddy grass" would become "dirty clean grass"
        options = [w for w in self.lexicon.attribute_groups[kind] if w != word and w not in text.low]
        doer = next((f.noun.group.name for f in reversed(text.nouns) if f.end <= i and f.head), "age")
        if kind.startswith(_DONE) and doer not in _ANIMATE:
            return None  # "shelves holding shoes" would become "shelves throwing shoes"
        of = next((f.noun.group.name for f in text.nouns if f.start >= j and f.head), None)
        if kind == "age" and word == "old" and of not in _ANIMATE:
            options = ["new"]
        if "posture" in kind:
            subject = next((f.noun.group.name for f in reversed(text.nouns) if f.end <= i), "age")
            if subject not in _ANIMATE:  # "a car is kneeling"
                options = [w for w in options if w not in ("kneeling", "crouching", "kneels", "crouches", "kneel")]
        if kind == "age" and word == "young":
            options = ["old", "elderly"]
        if not options:
            return None
        new = self._fitting(text, i, j, tuple(options), dice)
        if self.lexicon.attributes.get(new, (0, 0))[1] == word:
            return None
        return [text.put(i, j, new)]

    def _colour(self, text, found, dice):
        start = text.span(found.start, found.end)[0]
        noun = text.caption[start : text.span(found.start, found.end)[1]]
        colours = tuple(c for c in self.lexicon.attribute_groups["colour"] if c not in text.low)
        colour = self._fitting(text, found.start, found.start, colours, dice)
        if not text.caption.isupper() or text.size == 1:
            noun = noun if noun.isupper() else noun[:1].lower() + noun[1:]
        else:
            colour = colour.upper()
        first, last, new = text.put(found.start, found.end, colour)
        return [(first, last, new + " " + noun)]

    def _quantity(self, text):
        sites, phrases = [], []
        for found in text.nouns:
            counted = text.at(found.end) == "of" and found.noun.lemma in _GROUPS_OF  # as what follows is counted
            if not found.head or found.noun.group.place or counted or text.denied(found.start):
                continue
            group, first = found.noun.group, found.start
            if "mass" in group.flags or "part" in group.flags and group.name != "unit":
                continue
            while first - 1 >= 0 and self._is_modifier(text, first - 1):
                first -= 1
            start, said = self._quantifier(text, first, found)
            if said is None:
                continue
            phrases.append((start, first, found, said))
            options = tuple(q for q in _OTHER_THAN[said] if q != "a group of" or group.name in _ANIMATE)
            if found.noun.plural and ("plural" in group.flags or found.noun.lemma in PLURAL_ONLY - {"people"}):
                options = tuple(q for q in options if q != "a")
            if options:
                weight = 4 if said not in ("", "a") else 2 if said == "" else 4 if found is text.nouns[0] else 1
                sites.append((weight, partial(self._recount, text, start, first, found, said, options)))
        if {"least", "most", "than"} & set(text.low):
            sites.clear()  # "at least three cats"
        told = {p[0] for p in phrases}
        if any(word in NUMBER and i not in told for i, word in enumerate(text.low)):
            sites.clear()  # "two dogs, one of them black": what follows counts them again
        numbers = [p for p in phrases if p[3] in NUMBER and p[3] != "a" and p[2].noun.plural]
        for one, other in itertools.combinations(numbers, 2):
            if NUMBER[one[3]] != NUMBER[other[3]]:
                sites.append((8, partial(self._trade, text, (one[0], one[1]), (other[0], other[1]))))
        return sites

    def _quantifier(self, text, first, found):
        """(first token of what says how many, what it says) of a noun whose modifiers begin at token ``first``: "a", a
        number, a key of `_OTHER_THAN`, "" for a bare plural; (0, None) where it cannot be told or changed."""
        before, group = text.at(first - 1), found.noun.group
        if not found.noun.plural:
            told = before in ("a", "an", "one", "another", "single", "1") and group.name not in ("outdoor", "sky")
            if before == "single" and text.at(first - 2) in ("a", "one"):
                return first - 2, "a"
            return (first - 1, "a") if told and before != "single" else (0, None)
        pair = group.name in ("footwear", "ride", "eyewear", "lower wear")
        if before in NUMBER and NUMBER[before] > 1 and text.at(first - 2) not in ("-", "a", "of", "number"):
            return (first - 1, before) if before in _OTHER_THAN else (0, None)
        if before in _VAGUE:
            return first - 1, "some" if before in ("some", "various") else "several"
        if before == "few" and text.at(first - 2) == "a":
            return first - 2, "a few"
        if before == "of" and text.at(first - 2) in _GROUPS_OF and "plural" not in group.flags:
            few = text.at(first - 2) in ("couple", "pair", "few")
            start = first - 2
            while text.at(start - 1) in ("a", "the", "an") or self._is_modifier(text, start - 1):
                start -= 1
            return (0, None) if few and pair else (start, "a couple of" if few else "a group of")
        free = before is None or not before[0].isalpha() or before in FUNCTION or before.endswith("ing")
        bare = free and before not in DETERMINERS | {"of"} and before not in NUMBER and "plural" not in group.flags
        bare = bare and text.at(found.end) != ","  # "grapes, oranges and apples"
        if bare and found.noun.lemma != "people" and self._is_safe(text, found.end, many=True):
            return first, ""
        return 0, None

    def _recount(self, text, start, first, found, said, options, dice):
        """ "a dog sits" -> "three dogs sit", "dogs running" -> "a dog running", "several dogs" -> "two dogs"."""
        many, words = found.noun.plural, set(text.low)
        low = text.low[found.start : found.end]
        one = found.noun.lemma if many else " ".join(low)
        if many and found.noun.lemma == "people":
            one = "person"
        following = text.at(first) if first < found.start else None
        sums = self._sums(text.at(start - 1), options, following or (" ".join(low) if many else plural(one)))
        new = dice.weighted(options, sums)
        if new == "a group of" and text.at(start - 2) in ("there", "here"):
            return None
        if text.low[start] in ("one", "another") and words & {"other", "another", "one"} - {text.low[start]}:
            return None
        if said == "a" and ("its" in words or text.gender and found.noun.group.name in _ANIMATE):
            return None
        if new == "a" and many and (words & _OF_SEVERAL or self._shares(text, found)):
            return None
        edits = []
        if (new != "a") != many:
            edits = self._agreed(text, start, found, new != "a")
            if edits is None:
                return None
        begin, middle = text.tokens[start][0], text.caption[text.tokens[first][0] : text.tokens[found.start][0]]
        noun = text.caption[text.tokens[found.start][0] : text.tokens[found.end - 1][1]]
        if (new != "a") != many:
            noun = plural(noun.lower()) if new != "a" else one
        upper = text.caption.isupper() and len(text.caption) > 1
        rest = middle + noun
        if start == first == 0 and not upper:
            rest = rest[:1].lower() + rest[1:]
        quantity = article(rest) if new == "a" else new
        if new in NUMBER and said.isdigit():
            quantity = str(NUMBER[new])
        whole = f"{quantity} {rest}" if quantity else rest
        end = text.tokens[found.end - 1][1]
        return [*edits, (begin, end, whole.upper() if upper else text.cased(begin, begin + 1, whole))]

    def _shares(self, text, found):
        """Whether something plural is said of several, one for each: "two girls in hats"."""
        for other in text.nouns:
            if other.start >= found.end and other.noun.plural:
                before = text.at(self._phrase(text, other)[0] - 1)
                if other.noun.group.name in _WORN and before not in NUMBER or before in _BORNE:
                    return True
        return False

    def _agreed(self, text, start, found, many):
        """Edits that make the rest agree with a noun phrase that becomes plural (or singular), or None."""
        before = text.at(start - 1)
        change = _SINGULAR_VERBS if many else _PLURAL_VERBS
        if before in change and text.at(start - 2) in ("there", "here"):
            safe = self._is_safe(text, found.end, many=not many)
            return [text.put(start - 1, start, change[before])] if safe else None
        if before in ("is", "was", "are", "were"):
            return None
        if start == 0 or before in _CLAUSE_ENDS:
            return self._agree(text, found.end) if many else self._agree_with_one(text, found.end)
        return [] if self._is_safe(text, found.end, many=not many) else None

    def _agree_with_one(self, text, i):
        """Edits that make the verb right after a subject singular, or None if it cannot be told."""
        word, after = text.at(i), text.at(i + 1)
        if word in _PLURAL_VERBS:
            return [text.put(i, i + 1, _PLURAL_VERBS[word])]
        if self._is_safe(text, i, many=True):
            known, later = self.lexicon.verbs, range(i + 1, text.size)  # "two men with skis pose"
            verbs = any(text.low[k] in known and k - 1 in text.inside and k not in text.inside for k in later)
            return [] if not verbs and not {"are", "were", "have", "do"} & set(text.low[i:]) else None
        verb = word[0].isalpha() and word in self.lexicon.verbs and word not in FUNCTION and not word.endswith("s")
        if not verb or i in text.inside or "and" in text.low[i:] or after is None:
            return None
        ending = "es" if word.endswith(("s", "x", "ch", "sh", "z", "o")) else "s"
        ends_y = word.endswith("y") and word[-2:-1] not in "aeiou"
        return [text.put(i, i + 1, word[:-1] + "ies" if ends_y else word + ending)]

    def _trade(self, text, one, other, dice):
        """Tokens [start, end) and another such pair, in each other's place."""
        edits = []
        for here, there in ((one, other), (other, one)):
            first, last = text.span(*there)
            words = text.caption[first:last]
            if there[0] == 0 and not text.caption.isupper():
                words = words[:1].lower() + words[1:]
            edits.append(text.put(*here, words))
        return edits

    def _is_modifier(self, text, i):
        word = text.low[i]
        if word in FUNCTION or word in NUMBER or not word[0].isalpha():
            return False
        return (
            i in text.inside
            and not next(f for f in text.nouns if f.start <= i < f.end).head
            or word in self.lexicon.attributes
            or i not in text.inside
            and word in self.lexicon.adjectives
            and not (word.endswith(("ing", "ed")) and i - 1 in text.inside)
        )

    def _is_safe(self, text, i, many=False):
        """Whether what follows a noun does not have to agree with it; ``many``: a plural one."""
        after = text.at(i)
        if many and after in ("and", "or"):
            return False
        return (
            after is None
            or not after[0].isalpha()
            or after in PREPOSITIONS
            or after in ("and", "or", "while")
            and text.at(i + 1) not in _SINGULAR_VERBS
            or after.endswith(("ing", "ed"))
            and len(after) > 4
        )

    def _agree(self, text, i):
        """Edits that make the verbs of a subject that ends before token i plural, or None if it cannot be told."""
        edits = []
        for k in range(i, text.size):
            word, before = text.low[k], text.low[k - 1]
            if edits and before != "and":
                continue
            if word == "and" and not edits and k + 1 < text.size:
                following = text.low[k + 1]
                if following in DETERMINERS or following in PRONOUNS or k + 1 in text.starts:
                    return edits  # what follows has another subject
            if word in _CLAUSE_ENDS:
                return None if k == i and word in ("that", "which", "who") else edits
            if word in _SINGULAR_VERBS:
                if before in PRONOUNS - {"that", "which", "who"}:
                    return edits
                edits.append(text.put(k, k + 1, _SINGULAR_VERBS[word]))
            elif word.endswith("s") and k not in text.inside and word not in FUNCTION:
                # a verb follows its subject, an adverb or another verb; "a pair of skis", "a thumbs up" do not
                if k > i and k - 1 not in text.inside and not before.endswith("ly") and before not in ("that", "and"):
                    continue
                base = self._plural_verb(word)
                if base:
                    edits.append(text.put(k, k + 1, base))
        return edits

    def _plural_verb(self, word):
        """ "sits" -> "sit"; None if it is no verb."""
        bases = [word[:-3] + "y"] if word.endswith("ies") else []
        bases += [word[:-2]] if word.endswith(("ses", "xes", "ches", "shes", "zes", "oes")) else []
        return next((base for base in (*bases, word[:-1]) if base in self.lexicon.verbs), None)

    def _location(self, text):
        sites, low, end = [], text.low, 0
        for i, word in enumerate(low):
            if i < end or word not in _PLAIN and word not in _RELATION_STARTS:
                continue
            for n in (4, 3, 2):
                options = _RELATIONS.get(" ".join(low[i : i + n])) if i + n <= text.size else None
                if options:
                    sites.append((5, partial(self._relate, text, i, i + n, options)))
                    end = i + n
                    break
            else:
                if word in _PLAIN and self._is_relation(text, i):
                    sites.append((3, partial(self._relate, text, i, i + 1, _PLAIN[word])))
        places = False
        for found in text.nouns:
            group = found.noun.group
            if group.place or group.name in ("ground",):
                places = True
                if found.head and "mass" not in group.flags:
                    sites.append((4, partial(self._swap, text, found)))
        if not places and text.size >= 8 and text.scenes:
            near = {w for s in text.scenes for w in self.lexicon.scene_members[s]}
            far = [(w, n.place) for n in map(self.lexicon.groups.get, _PLACES) for w in n.words]
            options = [p for p in far if p[0] not in near]  # where its things are seen may well be the true place
            sums = list(itertools.accumulate(1 + self._count(word) for word, _ in options))
            sites.append((1, partial(self._add_place, text, options, sums)))
        heads = [f for f in text.nouns if f.head and not text.denied(f.start)]
        for one, other in itertools.pairwise(heads):
            if self._is_one_way(text, one, other):
                sites.append((6, partial(self._trade, text, *(self._phrase(text, f) for f in (one, other)))))
        return sites

    def _is_one_way(self, text, one, other):
        """Whether two things of much the same sort stand in a relation that does not hold the other way round."""
        a, b = one.noun, other.noun
        alike = {a.group.name, b.group.name} <= _ANIMATE or a.group.name == b.group.name
        between = text.low[one.end : self._phrase(text, other)[0]]
        told = " ".join(
            w for w in between if w not in ("is", "are", "sitting", "standing", "lying", "walking", "parked")
        )
        return alike and a.plural == b.plural and a.lemma != b.lemma and told in _ONE_WAY

    def _phrase(self, text, found):
        """Tokens [start, end) of a noun with what stands before it: "a big dog"."""
        start = found.start
        while start > 0 and self._is_modifier(text, start - 1):
            start -= 1
        return start - (text.at(start - 1) in DETERMINERS or text.at(start - 1) in NUMBER), found.end

    def _is_relation(self, text, i):
        word, before, after = text.low[i], text.at(i - 1), text.at(i + 1)
        if word in _ALONE:
            return True
        if before is None or before in FUNCTION and before not in ("is", "are", "sits", "it", "them"):
            return False
        k = i + 1
        while k < text.size and (text.low[k] in DETERMINERS or self._is_modifier(text, k)):
            k += 1
        found = text.starts.get(k)
        if found is None or not found.head:
            return False
        group = found.noun.group
        if group.place and word in ("on", "onto", "in", "into", "at", "inside", "through", "from", "over", "off"):
            return False  # the place itself is exchanged instead
        if word in ("on", "onto", "at", "against", "off"):
            return group.name in _ON and after not in PREPOSITIONS
        if word in ("in", "into", "inside", "through", "from"):
            return group.name in _IN
        if word in ("by", "up", "down", "over") and (
            before.endswith(("ed", "en")) or before in ("made", "held", "taken")
        ):
            return False
        if word in ("up", "down"):
            return group.name in ("surface", "opening", "land feature") and after in DETERMINERS
        return "part" not in group.flags

    def _relate(self, text, i, j, options, dice):
        return [text.put(i, j, self._fitting(text, i, j, options, dice))]

    def _add_place(self, text, options, sums, dice):
        for _ in range(6):
            word, place = dice.weighted(options, sums)
            if self._new(text, word) and 2 + length(word) <= text.room():
                return [self._append(text, f"{place} {article(word)} {word}")]
        return None

    # --- one caption, and many --------------------

    def _trims(self, text):
        """Characters (start, end) that a caption can do without: an adjective, the phrase at its end."""
        found = []
        for noun in text.nouns:
            i = noun.start - 1
            known = i > 0 and (text.low[i] in self.lexicon.attributes or text.low[i] in self.lexicon.adjectives)
            if noun.head and known and i not in text.inside and self._is_modifier(text, i):
                before = text.at(i - 1)
                if before in DETERMINERS or before in PREPOSITIONS:
                    found.append((text.tokens[i][0], text.tokens[noun.start][0]))
        last = text.nouns[-1] if text.nouns else None
        if last and all(not w[0].isalnum() for w in text.low[last.end :]) and text.low[0] != "there":
            k = self._phrase(text, last)[0] - 1
            needed = text.at(k) == "with" and text.at(k - 1).endswith("ed")
            listed = text.at(k) == "and" and ("," in text.low or k - 1 not in text.inside)
            if k > 4 and text.low[k] in _LAST and "between" not in text.low and not listed and not needed:
                found.append((text.tokens[k - 1][1], text.tokens[last.end - 1][1]))
        return found

    def _trimmed(self, text, edits, trims, dice):
        """The edits with something else left out, so that not all that is put in makes a caption longer."""
        start, end = dice.choose(trims)
        if any(a <= end and start <= b for a, b, _ in edits):
            return edits
        i = next((i for i, (_, stop) in enumerate(text.tokens) if stop + 1 == start), None)
        if i is not None and text.low[i] in ("a", "an"):
            begin, stop = text.tokens[i]
            if any(a <= stop and begin <= b for a, b, _ in edits):
                return edits
            following = text.caption[end:].split(" ")[0]
            return [*edits, (begin, end, text.cased(begin, stop, article(following)) + " ")]
        return [*edits, (start, end, "")]

    def _more(self, text, edits, sites, dice):
        for _ in range(text.size // 20):  # a long caption gets more than one change
            more = sites[dice.below(len(sites))][1](dice)
            if more and all(e[1] < f[0] or f[1] < e[0] for e in more for f in edits):
                edits = [*edits, *more]
        return edits

    def candidates(
        self, item: Item, text: Text, sites: dict[str, list[tuple[int, Callable]]], dice: Dice, most: int = MOST
    ) -> tuple[list[tuple[str, str]], dict[str, int]]:
        """Many hallucinated captions, of all kinds that there are sites of.

        What only adds something may be true of the image, which the caption does not tell; so it is done only where
        little else can be.

        Returns:
            [(kind, text)], at most ``most``, all different; and how many each check refused.
        """
        found, rejected, trims = {}, {}, self._trims(text)
        adds = (self._add_thing, self._add_place, self._colour)
        for adding in (False, True):
            if adding and len(found) >= _FEW:
                break
            left = {kind: [s for s in sites.get(kind, ()) if (s[1].func in adds) == adding] for kind in KINDS}
            kinds = [kind for kind in KINDS if left[kind]]
            for kind in kinds:
                self._fill(item, text, kind, left[kind], dice, trims, most / len(kinds), found, rejected)
        return [(kind, candidate) for candidate, kind in found.items()][:most], rejected

    def _fill(self, item, text, kind, sites, dice, trims, most, found, rejected):
        """Candidates of a kind into ``found``, {text: kind}."""
        makes = [make for _, make in sites]
        sums, got, seen = list(itertools.accumulate(weight for weight, _ in sites)), 0, set()
        for _ in range(int(2 * most)):
            make = dice.weighted(makes, sums)
            edits = make(dice)
            if not edits:
                continue
            edits = self._more(text, edits, sites, dice)
            if trims and dice.below(4) == 0:
                edits = self._trimmed(text, edits, trims, dice)
            candidate = text.apply(edits)
            if candidate in seen or candidate in found:
                continue
            seen.add(candidate)
            problem = self._problem(item, kind, candidate, sure=make.func == self._trade)
            if problem is None:
                found[candidate] = kind
                got += 1
                if got >= most:
                    break
            else:
                rejected[problem] = rejected.get(problem, 0) + 1

    def _problem(self, item, kind, candidate, taken=(), sure=False):
        problem = self.checker.problem(item, candidate, taken, sure=sure or kind == "quantity")
        if problem is None and not CHARACTERS[0] <= len(candidate) / len(item.caption) <= CHARACTERS[1]:
            return "length in characters"
        return problem

    def rewrite(
        self,
        item: Item,
        kind: str,
        text: Text,
        sites: list[tuple[int, Callable]],
        dice: Dice,
        taken: Iterable[str] = (),
        rejected: dict[str, int] | None = None,
    ) -> str | None:
        """One hallucinated caption of ``kind``, or None. ``sites`` is ``self.sites(text)[kind]``."""
        spare = None
        for make in itertools.islice(dice.draw(sites), 8):
            edits = make(dice)
            if not edits:
                continue
            candidate = text.apply(self._more(text, edits, sites, dice))
            problem = self._problem(item, kind, candidate, taken)
            if problem is None:
                return candidate
            if problem == "length in characters":
                spare = spare or candidate
            elif rejected is not None:
                rejected[problem] = rejected.get(problem, 0) + 1
        return spare


_UNCOUNTED = frozenset(
    "furniture straw food fruit clothing clothes luggage glass paper wood traffic decoration corn broccoli cake "
    "jewelry jewellery chicken chocolate fish pizza salad soup pasta stone brick lace garlic lettuce cabbage spinach "
    "celery squash cauliflower steak sushi candy pie ice pudding tape rope wire cable artwork wallpaper coral".split()
)
_DONE = ("riding", "handling", "eating", "reading", "motion")
_CROWDS = frozenset("team crowd group family audience couple toy".split())
_COUNTING = frozenset("a an one the this that his her their its my your".split())
_LAST = frozenset("in on at near with behind under beside inside outside over across through along and".split())
_TAKES_ADJECTIVE = frozenset("a an the his her their its of on in with and two three some".split())
