"""The source ``rules``: hallucinated captions by rewriting words, with no network and no model.

A caption is tokenised, its nouns are found, and each kind of hallucination is a set of places where it can be changed:

- existence: a noun becomes another of its group, more likely one seen where the caption's other things are; or such a
  thing is added;
- attribute: a colour, material, size, state, posture ... becomes another that excludes it, or an odd colour is added;
- quantity: a number, "a", "several" or a bare plural becomes another number, and the words that agree with it follow;
- location: a relation ("on top of") becomes one that excludes it, a place becomes another place, or is added.

English only. Everything outside the changed words stays as it was.
"""

import collections
import functools
import gc
import hashlib
import itertools
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

from ..config import HaclError
from ..records import unblock
from . import KINDS, Answer, Item
from .checks import RATIO, Checker, length
from .lexicon import (
    DETERMINERS,
    FUNCTION,
    NEGATIONS,
    NUMBER,
    NUMBERS,
    PEOPLE,
    PLURAL_ONLY,
    PREPOSITIONS,
    PRONOUNS,
    TOKEN,
    article,
    lexicon,
    plural,
)

BLOCK = 256  # records over which the kinds are balanced
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
    "from": ("toward",),
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
_ODD_COLOURS = ("purple", "pink", "turquoise", "orange", "maroon", "golden", "yellow", "lavender")
_PLACES = ("room", "venue", "nature", "surface", "stop")
_VAGUE = {"several": "two", "many": "two", "multiple": "two", "numerous": "two", "various": "two", "some": "a dozen"}
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
_COUNTS = ("two", "three", "four", "five", "six", "seven", "eight", "ten")
_SINGULAR_VERBS = {"is": "are", "was": "were", "has": "have", "does": "do", "isn't": "aren't"}
_PICTURES = frozenset("photo photos photograph photography picture image drawing illustration film".split())
_CLAUSE_ENDS = frozenset(", . ; : while as that which who where when ( )".split())


class _Dice:
    """A stream of choices that depends on nothing but its key; far cheaper to start than random.Random."""

    def __init__(self, key):
        self._key, self._bits = key.encode("utf-8", "surrogatepass"), 0

    def below(self, n):
        if self._bits < 1 << 32:
            self._key = hashlib.blake2b(self._key, digest_size=64).digest()
            self._bits = int.from_bytes(self._key, "big")
        self._bits, found = divmod(self._bits, n)
        return found

    def choose(self, options):
        return options[self.below(len(options))]

    def draw(self, weighted):
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


class _Text:
    """A caption taken apart: tokens with places, lower-case forms, nouns."""

    def __init__(self, caption, others=()):
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

    def at(self, i):
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
                    self.nouns.append(_Found(i, i + n, noun))
                    i += n
                    break
            else:
                i += 1
        for found, following in zip(self.nouns, [*self.nouns[1:], None], strict=False):
            after = self.at(found.end)
            if following and following.start == found.end or after in ("'", "’", "'s") or self._is_unknown(after):
                found.head = False

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

    def _is_unknown(self, word):
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

    def is_english(self):
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

    def denied(self, i):
        """Whether a "no", "not" or "without" stands shortly before token i."""
        return not NEGATIONS.isdisjoint(self.low[max(0, i - 4) : i])

    def room(self):
        """Words that may be added."""
        return int(length(self.caption) * (RATIO[1] - 1))

    def span(self, start, end):
        """Characters of tokens [start, end)."""
        return self.tokens[start][0], self.tokens[end - 1][1]

    def cased(self, start, end, new):
        """``new`` in upper case, or with a capital, where the caption's characters [start, end) are."""
        old = self.caption[start:end]
        if old.isupper() and len(old) > 1:
            return new.upper()
        return new[:1].upper() + new[1:] if old[:1].isupper() else new

    def put(self, start, end, new):
        """An edit: tokens [start, end) become ``new``; case and a preceding "a" or "an" follow."""
        first, last = self.span(start, end)
        new = self.cased(first, last, new)
        if self.at(start - 1) in ("a", "an") and self.tokens[start - 1][1] < first:
            begin, stop = self.tokens[start - 1]
            return begin, last, self.cased(begin, stop, article(new)) + self.caption[stop:first] + new
        return first, last, new

    def apply(self, edits):
        text = self.caption
        for start, end, new in sorted(edits, reverse=True):
            text = text[:start] + new + text[end:]
        return text


@functools.lru_cache(maxsize=4096)  # the captions of an image are each looked at beside all its others
def _lemmas(caption):
    return [f.noun.lemma for f in _Text(caption).nouns]


class Rules:
    """Rewrites captions; deterministic in ``seed``, the item's index and its caption."""

    def __init__(self, seed: int = 0, checker: Checker | None = None) -> None:
        self.seed, self.checker, self.lexicon = seed, checker or Checker(), lexicon()

    # --- the four kinds: each a list of (weight, function of the dice that gives edits or None) --------------------

    def sites(self, text: _Text) -> dict[str, list[tuple[int, Callable]]]:
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
            if text.denied(found.start):
                continue  # "no dog" in place of "no cat" is true
            if found.head and not counted and not group.place and (group.words or group.other):
                sites.append((3 if group.name in PEOPLE else 4, partial(self._swap, text, found)))
        if text.size >= 7:
            sites.append((2, partial(self._add_thing, text)))
        return sites

    def _options(self, group, depth=0):
        if group.words:
            return group.words
        return [w for name in group.other if depth < 3 for w in self._options(self.lexicon.groups[name], depth + 1)]

    def _draw(self, text, options, dice):
        """Up to 12 of the options at random, those seen with the caption's other things five times as often."""
        scenes, seen, tried = self.lexicon.scenes, text.scenes.keys(), set()
        for _ in range(48 if options else 0):
            word = options[dice.below(len(options))]
            if word in tried or seen and seen.isdisjoint(scenes.get(word, ())) and dice.below(5):
                continue
            tried.add(word)
            yield word
            if len(tried) == 12:
                return

    def _new(self, text, word):
        return not any(self.lexicon.related(word, known) for known in text.known)

    def _swap(self, text, found, dice):
        """Every mention of a noun becomes another noun of its group, or of the groups to look in instead."""
        noun, groups = found.noun, self.lexicon.own
        mass = "mass" in noun.group.flags
        for options in (self._options(noun.group), self._others(noun.group)):
            for word in self._draw(text, options, dice):
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
        return [w for name in group.other for w in self._options(self.lexicon.groups[name])]

    def _add_thing(self, text, dice):
        pool = {}
        for scene, count in (text.scenes or {"person": 1}).items():
            for word in self.lexicon.scene_members[scene]:
                pool[word] = pool.get(word, 0) + count
        room = text.room()
        for word in itertools.islice(dice.draw([(pool[w] ** 2, w) for w in sorted(pool)]), 12):
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
        sites, words, low, end = [], self.lexicon.attributes, text.low, 0
        for i, word in enumerate(low):
            if i < end or word not in words and word not in self.lexicon.attribute_starts:
                continue
            for n in (3, 2, 1):
                found = words.get(" ".join(low[i : i + n])) if i + n <= text.size else None
                if found and not text.denied(i) and self._is_attribute(text, i, i + n, found[0]):
                    sites.append((4, partial(self._exchange, text, i, i + n, found)))
                    end = i + n
                    break
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
            if "verb" in kind:
                return i - 1 in text.inside
            return following is None and before not in ("a", "an", "the") and after not in DETERMINERS
        if kind.endswith("verb"):
            return i - 1 in text.inside and (after in DETERMINERS or following is not None)
        if kind in ("riding", "handling", "eating", "reading"):
            return after in DETERMINERS or following is not None and before not in ("a", "an", "the")
        if kind in ("face", "facing", "parking", "flight"):
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
        options = [w for w in self.lexicon.attribute_groups[kind] if w != word and w not in text.low]
        if kind == "age" and word == "old" and text.starts.get(j) and text.starts[j].noun.group.name not in PEOPLE:
            options = ["new"]
        if "posture" in kind:
            subject = next((f.noun.group.name for f in reversed(text.nouns) if f.end <= i), "age")
            if subject not in _ANIMATE:  # "a car is kneeling"
                options = [w for w in options if w not in ("kneeling", "crouching", "kneels", "crouches", "kneel")]
        if kind == "age" and word == "young":
            options = ["old", "elderly"]
        if not options:
            return None
        new = dice.choose(options)
        if self.lexicon.attributes.get(new, (0, 0))[1] == word:
            return None
        return [text.put(i, j, new)]

    def _colour(self, text, found, dice):
        start = text.span(found.start, found.end)[0]
        noun = text.caption[start : text.span(found.start, found.end)[1]]
        colour = dice.choose([c for c in _ODD_COLOURS if c not in text.low] or _ODD_COLOURS)
        if not text.caption.isupper() or text.size == 1:
            noun = noun if noun.isupper() else noun[:1].lower() + noun[1:]
        else:
            colour = colour.upper()
        first, last, new = text.put(found.start, found.end, colour)
        return [(first, last, new + " " + noun)]

    def _quantity(self, text):
        sites = []
        for found in text.nouns:
            counted = text.at(found.end) == "of" and found.noun.lemma in _GROUPS_OF  # as what follows is counted
            if not found.head or found.noun.group.place or counted or text.denied(found.start):
                continue
            group, first = found.noun.group, found.start
            if "mass" in group.flags or "part" in group.flags and group.name != "unit":
                continue
            while first - 1 >= 0 and self._is_modifier(text, first - 1):
                first -= 1
            before = text.at(first - 1)
            if found.noun.plural:
                if before in NUMBER and NUMBER[before] != 1 and not text.at(first - 2) == "-":
                    sites.append((4, partial(self._other_number, text, first - 1)))
                elif before in _VAGUE:
                    sites.append((3, partial(self._number, text, first - 1, first, _VAGUE[before])))
                elif before == "of" and text.at(first - 2) in _GROUPS_OF and "plural" not in group.flags:
                    few = text.at(first - 2) in ("couple", "pair", "few")
                    if not (few and group.name in ("footwear", "ride", "eyewear", "lower wear")):
                        start = first - 2 - (text.at(first - 3) in ("a", "the") or self._is_modifier(text, first - 3))
                        start -= text.at(start - 1) == "a"
                        sites.append((3, partial(self._number, text, start, first, "a dozen" if few else "two")))
                elif before == "few" and text.at(first - 2) == "a":
                    sites.append((3, partial(self._number, text, first - 2, first, "a dozen")))
                elif (
                    "plural" not in group.flags and found.noun.lemma != "people" and before not in DETERMINERS | {"of"}
                ):
                    free = before is None or not before[0].isalpha() or before in FUNCTION or before.endswith("ing")
                    if free and before not in NUMBER and self._is_safe(text, found.end):
                        sites.append((2, partial(self._single, text, first, found)))
            elif before in ("a", "an", "one", "another", "single", "1") and group.name not in ("outdoor", "sky"):
                sites.append((4 if found is text.nouns[0] else 1, partial(self._several, text, first, found)))
        return sites

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

    def _is_safe(self, text, i):
        """Whether what follows a noun does not have to agree with it."""
        after = text.at(i)
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
        bases += [word[:-2]] if word.endswith("es") else []
        return next((base for base in (*bases, word[:-1]) if base in self.lexicon.verbs), None)

    def _other_number(self, text, i, dice):
        word, value = text.low[i], NUMBER[text.low[i]]
        many = [n for n in range(2, 9) if abs(n - value) > (0 if value < 5 else 1) and n != value]
        new = dice.choose(many)
        return [text.put(i, i + 1, str(new) if word[0].isdigit() else NUMBERS[0][new])]

    def _number(self, text, start, end, new, dice):
        """ "several dogs" -> "two dogs", "a few dogs" -> "seven dogs"."""
        if text.at(start - 1) in ("a", "an"):
            return None
        if new != "two":
            new = dice.choose(("six", "seven", "eight", "ten", "a dozen"))
        edits = [text.put(start, end, new)]
        if start == 0:
            agreed = self._agree(text, end + 1) if text.low[end - 1] == "of" else []
            if agreed is None:
                return None
            edits += agreed
        return edits

    def _single(self, text, first, found, dice):
        """ "dogs running" -> "a single dog running"."""
        start, end = text.span(first, found.end)
        middle = text.caption[start : text.tokens[found.start][0]]
        middle = middle if text.caption.isupper() else middle[:1].lower() + middle[1:]
        return [(start, end, text.cased(start, start + 1, f"a single {middle}{found.noun.lemma}"))]

    def _several(self, text, first, found, dice):
        """ "a dog sits" -> "three dogs sit"."""
        if "its" in text.low or text.gender and found.noun.group.name in (*PEOPLE, "pet"):
            return None
        start = first - 1
        before = text.at(start - 1)
        edits = []
        if before in _SINGULAR_VERBS and text.at(start - 2) in ("there", "here"):
            edits.append(text.put(start - 1, start, _SINGULAR_VERBS[before]))
            if not self._is_safe(text, found.end):
                return None
        elif before in ("is", "was"):
            return None
        elif start == 0 or before in _CLAUSE_ENDS:
            agreed = self._agree(text, found.end)
            if agreed is None:
                return None
            edits += agreed
        elif not self._is_safe(text, found.end):
            return None
        edits.append(text.put(start, start + 1, dice.choose(_COUNTS)))
        start, end = text.span(found.start, found.end)
        edits.append((start, end, text.cased(start, end, plural(text.caption[start:end].lower()))))
        return edits

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
            sites.append((1, partial(self._add_place, text)))
        return sites

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
        return [text.put(i, j, dice.choose(options))]

    def _add_place(self, text, dice):
        pool = sorted({w for s in text.scenes for w in self.lexicon.scene_members[s] if self.lexicon.own[w].place})
        far = [(w, n.place) for n in map(self.lexicon.groups.get, _PLACES) for w in n.words]
        options = [p for p in far if p[0] not in pool]  # where the caption's things are seen may well be the true place
        for _ in range(6):
            word, place = dice.choose(options)
            if self._new(text, word) and 2 + length(word) <= text.room():
                return [self._append(text, f"{place} {article(word)} {word}")]
        return None

    # --- one caption, and many --------------------

    def rewrite(
        self,
        item: Item,
        kind: str,
        text: _Text,
        sites: list[tuple[int, Callable]],
        dice: _Dice,
        taken: Iterable[str] = (),
        rejected: dict[str, int] | None = None,
    ) -> str | None:
        """One hallucinated caption of ``kind``, or None. ``sites`` is ``self.sites(text)[kind]``."""
        spare = None
        for make in itertools.islice(dice.draw(sites), 8):
            edits = make(dice)
            if not edits:
                continue
            for _ in range(text.size // 20):  # a long caption gets more than one change
                more = sites[dice.below(len(sites))][1](dice)
                if more and all(e[1] < f[0] or f[1] < e[0] for e in more for f in edits):
                    edits = [*edits, *more]
            candidate = text.apply(edits)
            problem = self.checker.problem(item, candidate, taken)
            if problem is None:
                if CHARACTERS[0] <= len(candidate) / len(item.caption) <= CHARACTERS[1]:
                    return candidate
                spare, problem = spare or candidate, "length in characters"
            if rejected is not None and problem != "length in characters":
                rejected[problem] = rejected.get(problem, 0) + 1
        return spare


_TAKES_ADJECTIVE = frozenset("a an the his her their its of on in with and two three some".split())


class RulesSource:
    """`Rules` over many captions, with the kinds balanced as asked.

    Args:
        types: {kind: weight}, the shares of the kinds.
        seed: of every choice.
        checker: refuses candidates.
        workers: processes.

    The kinds are balanced within blocks of `BLOCK` items by position, rarest possibility first; so what a block gives
    depends on that block alone, and the caller hands in whole blocks.
    """

    whole_blocks, stopped = True, None

    def __init__(
        self, types: dict[str, float] | None = None, seed: int = 0, checker: Checker | None = None, workers: int = 1
    ) -> None:
        self.types = types or dict.fromkeys(KINDS, 1.0)
        self.seed, self.checker, self.workers = seed, checker, workers
        self._rules = None

    def answers(self, items: Iterable[Item]) -> Iterator[Answer]:
        """One `Answer` for each item, in order."""
        if self.workers == 1:
            lexicon()
            gc.freeze()  # half a million small objects that the collector would go through again and again
            try:
                yield from itertools.chain.from_iterable(map(self.block, _blocks(items)))
            finally:
                gc.unfreeze()
            return
        context, waiting = multiprocessing.get_context("spawn"), collections.deque()
        pool = ProcessPoolExecutor(self.workers, context, initializer=_start_worker)
        try:
            blocks = _blocks(items)
            while True:
                for block in itertools.islice(blocks, 2 * self.workers - len(waiting)):
                    waiting.append(pool.submit(self.block, block))
                if not waiting:
                    break
                yield from waiting.popleft().result()
        except BrokenProcessPool:
            unblock(pool)
            raise HaclError(
                "a worker process was killed (out of memory, perhaps); the answers so far are safe: give the same "
                "command again, with fewer --workers."
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_rules": None}

    def block(self, items: Sequence[Item]) -> list[Answer]:
        """Answers for the items of one block, in order."""
        if self._rules is None:
            self._rules = Rules(self.seed, self.checker)
        rules, work = self._rules, []
        for item in items:
            text = _Text(item.caption if len(item.caption) <= LONGEST else "", item.others)
            english = text.is_english()
            sites = rules.sites(text) if english else {}
            kinds = [k for k in KINDS if self.types.get(k) and sites.get(k)]
            dice = _Dice(f"{self.seed}/{item.index}/{item.caption}")
            work.append((item, text, sites, kinds, dice, [], {}, english))
        total, got = sum(self.types.values()), dict.fromkeys(KINDS, 0)
        asked = 0
        for turn in range(max((len(item.wanted) for item in items), default=0)):
            for item, text, sites, kinds, dice, taken, rejected, _ in sorted(
                work, key=lambda w: (len(w[3]), w[0].index)
            ):
                if turn >= len(item.wanted):
                    continue
                asked += 1
                used = {k for k, _ in taken}
                order = sorted(kinds, key=lambda k: (k in used, got[k] - self.types[k] / total * asked, KINDS.index(k)))
                for kind in order:
                    caption = rules.rewrite(item, kind, text, sites[kind], dice, [t for _, t in taken], rejected)
                    if caption is not None:
                        taken.append((kind, caption))
                        got[kind] += 1
                        break
        return [self._answer(*w) for w in work]

    @staticmethod
    def _answer(item, text, sites, kinds, dice, taken, rejected, english):
        reason = None
        if len(taken) < len(item.wanted):
            if len(item.caption) > LONGEST:
                reason = "too long"
            elif not english:
                reason = "not English"
            elif not kinds:
                reason = "nothing in it to rewrite"
            elif not taken:
                reason = "every candidate was rejected"
            else:
                reason = f"only {len(taken)} of {len(item.wanted)}"
        return Answer(item.index, tuple(taken), reason, rejected=rejected)


def _start_worker():
    lexicon()
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's


def _blocks(items):
    block = []
    for item in items:
        if block and item.index // BLOCK != block[0].index // BLOCK:
            yield block
            block = []
        block.append(item)
    if block:
        yield block


def rewrite(caption: str, kind: str | None = None, seed: int = 0, count: int = 1) -> list[tuple[str, str]]:
    """Hallucinated captions of one caption, as ``hacl-llava hallucinate --source rules`` makes them.

    Args:
        caption: English text.
        kind: one of `KINDS`, or None for any.
        seed: the same seed gives the same texts.
        count: how many are wanted; fewer may come.

    Returns:
        A list of (kind, text).
    """
    if kind not in (None, *KINDS):
        raise HaclError(f"kind is {kind!r}, allowed are {', '.join(KINDS)} or None for any.")
    types = {kind: 1.0} if kind else None
    item = Item(0, "caption", caption, (), (kind or KINDS[0],) * count)
    return list(RulesSource(types, seed).block([item])[0].captions)
