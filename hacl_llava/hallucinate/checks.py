"""Whether a text may stand as a hallucinated caption of an image.

A hallucinated caption is a hard negative only if it is false of the image. No look at the image is taken here; what can
be told from the words is: whether the text is a caption at all, how long it is, whether it says anything that the
caption does not say already, and whether another caption of the same image says the same.
"""

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

from . import Item
from .lexicon import FUNCTION, NEGATIONS, NUMBER, PREPOSITIONS, TOKEN, lexicon

RATIO = (0.7, 1.4)  # of the number of tokens
KEPT = 0.3  # of the caption's different words: a text with fewer is no version of it

# Where things are to each other. Two words of one line say the same.
_RELATIONS = {
    words: line.split(",")[0]
    for line in (
        "next to,beside,alongside,adjacent to,near,nearby,close to",
        "on top of,atop",
        "under,below,beneath,underneath",
        "above,over",
        "behind,in back of",
        "in front of",
        "inside,within",
        "outside",
        "far from,away from",
        "between",
        "left",
        "right",
        "top",
        "bottom",
        "foreground",
        "background",
        "upside down",
        "indoors",
        "outdoors",
        "around",
        "out of",
        "into",
        "toward,towards",
        "down",
        "up",
    )
    for words in line.split(",")
}
_SYMMETRIC = frozenset(("next to", "far from", "between", "around", "indoors", "outdoors"))
_DIRECTED = PREPOSITIONS - frozenset("with next to near by beside between among around for as".split())
_RELATION_STARTS = frozenset(r.split()[0] for r in _RELATIONS)

_WORDS = re.compile(r"[^\W_]+")
_CHATTER = re.compile(
    r"^\W*(?:here(?:'s| is| are)\b|sure\b|certainly\b|of course\b|okay\b|ok,|i(?:'m| am) (?:sorry|unable)|sorry\b"
    r"|i can(?:'t|not)\b|as an ai"
    r"|(?:the )?(?:hallucinated|revised|mirrored|modified|rewritten|new|original)?\s*"
    r"(?:caption|version|output|answer)s?\s*:)"
    r"|hallucinat|mirrored version|revised caption|given caption|fine-grained|coarse-grained|language model"
    r"|</?s>|<image>|<\||\[/?inst\]|```|\{\"|\n",
    re.IGNORECASE,
)


# Marks of layout, labels and comments, which a caption brings along or does not have; quotes and numbers around it all.
_MARKS = frozenset("*_#<>[]{}|\\`~^=:")
_WRAPPED = re.compile(r"^\s*(?:\d+[.)]\s|[-•]\s)|^[\"“‘'].*[\"”’']$|\([^()]*\)$")
_OTHER_SCRIPT = re.compile(r"[\u0370-\u1dff\u2c00-\u2dff\u2e80-\ua7ff\uab30-\ufaff]")  # no Latin letters


def normal(text: str) -> str:
    """The text without case, punctuation and variants of the same letter: what a difference is measured against."""
    text = text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
    return " ".join(_WORDS.findall(text))


def _pieces(key):
    """The words of a `normal` text; ideographs one by one."""
    return key.split() if key.isascii() else TOKEN.findall(key)


def length(text: str) -> int:
    """Tokens of a text: words, numbers and ideographs; punctuation is not counted."""
    return sum(t[0].isalnum() for t in TOKEN.findall(text))


class Meaning:
    """What a caption says: its content words, numbers, relations, negations, and which word stands where."""

    def __init__(self, text: str) -> None:
        words = lexicon()
        text = text if text.isascii() else unicodedata.normalize("NFKC", text).replace("’", "'")
        tokens = [t for t in TOKEN.findall(text.lower()) if t[0].isalnum()]
        self.length, self.negations = len(tokens), 0
        self.relations, self.numbers, self.sequence = {}, {}, []
        content, sequence, i = set(), self.sequence, 0
        while i < len(tokens):
            token = tokens[i]
            i += 1
            kind, value = _kind(token)
            if kind == "word":
                content.add(value)
                sequence.append(value)
            elif kind == "function":
                sequence.append(value)
            elif kind == "phrase":
                for n in (2, 1):  # "fire hydrant" is one thing
                    phrase = " ".join(tokens[i - 1 : i + n])
                    if phrase in words.phrases and words.noun(phrase) or phrase in words.attributes:
                        value = _lemma(phrase)
                        i += n
                        break
                content.add(value)
                sequence.append(value)
            elif kind == "relation":
                for n in (2, 1, 0):
                    relation = _RELATIONS.get(" ".join(tokens[i - 1 : i + n]))
                    if relation:
                        self.relations[relation] = self.relations.get(relation, 0) + 1
                        sequence += ["." + t for t in tokens[i - 1 : i + n]]
                        i += n
                        break
                else:
                    sequence.append("." + token)
            elif kind == "negation":
                self.negations += 1
            else:
                self.numbers[value] = self.numbers.get(value, 0) + 1
                sequence.append(str(value))
        self.words = frozenset(content)

    def pairs(self) -> Counter[tuple[str, str]]:
        """Each content word with the word right after it: who has which colour."""
        return Counter(zip(self.sequence, self.sequence[1:], strict=False))

    def directed(self) -> set[tuple[str, str]]:
        """(word, word) wherever the order matters: "a dog on a bed", "a dog left of a bed", "a dog chases a cat"."""
        found, between, last, before = set(), set(), None, None
        directed = bool(set(self.relations) - _SYMMETRIC)
        for word in self.sequence:
            if word[0] == ".":
                between.add(word[1:])
                continue
            if last is not None and (directed or between & _DIRECTED):
                found.add((last, word))
            if before is not None and last in lexicon().verbs and not lexicon().noun(last):
                found.add((before, word))
            before, last, between = last, word, set()
        return found


@functools.lru_cache(maxsize=4096)  # of true captions, which several candidates are held against
def _meaning(caption):
    return Meaning(caption)


_DOING = ("posture", "motion", "verb", "riding", "handling", "eating", "reading")


@functools.lru_cache(maxsize=200_000)
def _kind(token):
    """What a lower-case token counts as, with its value."""
    words = lexicon()
    if token in _RELATION_STARTS:
        return "relation", None
    if token in NEGATIONS or token.endswith("n't"):
        return "negation", None
    if token in NUMBER:
        return "number", NUMBER[token]
    if token in FUNCTION:
        return "function", "." + token
    return "phrase" if token in words.phrase_starts or token in words.attribute_starts else "word", _lemma(token)


@functools.lru_cache(maxsize=200_000)
def _lemma(word):
    # "sits" and "sitting" are one word as far as saying something new goes
    words = lexicon()
    word = words.lemma(word)
    if word in words.attributes and not words.attributes[word][0].endswith(_DOING):
        return word
    if word in ("lying", "laying"):
        return "lie"
    found = words.noun(word)
    if found and (found.lemma in words.own or not word.endswith(("ing", "ed"))):
        return word
    for ending in ("ing", "ies", "es", "ed", "s"):
        if word.endswith(ending) and len(word) > len(ending) + 2:
            stem = word[: -len(ending)]
            for form in (stem, stem + "e", stem[:-1] if stem[-1:] == stem[-2:-1] else stem, stem + "y"):
                if form in words.verbs:
                    return form
    return word


def _more(counts, than):
    """What is counted more often than in the other."""
    return {k for k, n in counts.items() if n > than.get(k, 0)}


class Checker:
    """Refuses texts that are no hallucinated caption.

    Args:
        ratio: smallest and largest allowed number of tokens of the candidate, as a share of the caption's.
    """

    def __init__(self, ratio: tuple[float, float] = RATIO) -> None:
        self.ratio = ratio

    def problem(self, item: Item, candidate: str, taken: Iterable[str] = (), sure: bool = False) -> str | None:
        """Why ``candidate`` may not stand as a hallucinated caption of ``item``, or None if it may.

        Args:
            item: the `Item`. candidate: the text. taken: texts already taken for this item. sure: it is known to say
                something else than the caption ("a dog" for "two dogs", which the words alone do not tell).

        Returns:
            "empty", "chatter", "another language", "same as the caption", "duplicate", "caption of the same image",
            "length ratio", "unrelated", "paraphrase", "true of another caption"; None: it may be taken.
        """
        text = candidate.strip()
        key = normal(text)
        if not key:
            return "empty"
        caption, said = normal(item.caption), _meaning(item.caption)
        if key == caption:
            return "same as the caption"
        chatter = _CHATTER.search(text)
        if chatter and not _CHATTER.search(item.caption):
            return "chatter"
        if set(text) & _MARKS - set(item.caption) or _WRAPPED.search(text) and not _WRAPPED.search(item.caption):
            return "chatter"
        if _OTHER_SCRIPT.search(text) and not _OTHER_SCRIPT.search(item.caption):
            return "another language"
        if any(key == normal(t) for t in taken):
            return "duplicate"
        if any(key == normal(o) for o in item.others):
            return "caption of the same image"
        now = Meaning(text)
        if not self.ratio[0] <= now.length / max(said.length, 1) <= self.ratio[1]:
            return "length ratio"
        kept = set(_pieces(caption))
        if len(kept) > 3 and len(kept & set(_pieces(key))) < KEPT * len(kept):
            return "unrelated"
        new = self._says_new(said, now)
        if new is None and not sure:
            return "paraphrase"
        if new and item.others and self._supported(new, item.others):
            return "true of another caption"
        return None

    @staticmethod
    def _says_new(said, now):
        """The words, numbers and relations that only ``now`` has, possibly none; None if it says nothing new."""
        words = lexicon()
        dropped = said.words - now.words
        added = now.words - said.words
        negated = said.negations != now.negations
        new = {w for w in added if not any(words.related(w, s) for s in said.words)}
        new_numbers = _more(now.numbers, said.numbers)
        relations = _more(now.relations, said.relations)
        if negated and new and len(new) == len(added) and all(any(words.opposed(n, d) for d in dropped) for n in new):
            return None  # "not open", "closed"
        if new or new_numbers:
            return new | new_numbers | relations
        if negated and not added:
            return set()
        lost = _more(said.relations, now.relations)
        if relations and not added and not dropped:
            return relations
        if lost and not relations and not added and not dropped and len(now.sequence) >= len(said.sequence) - 2:
            return set()  # "under the table", "on the table": plain "on" and "in" are no relation of their own
        if not relations and sorted(said.sequence) == sorted(now.sequence):
            # the same words: said of each other, or with their colours exchanged?
            before, after = said.directed(), now.directed()
            if any((b, a) in before and (a, b) not in before for a, b in after):
                return set()
            bound = [(a, b) for a, b in now.pairs() - said.pairs() if a in words.attributes and b[0] != "."]
            if len(bound) > 1:  # one alone: "red and white", "white and red"
                return set()
        return None

    @staticmethod
    def _supported(new, others):
        """Whether each new word is also in another caption of the image."""
        words = lexicon()
        meanings = [_meaning(o) for o in others]
        known = frozenset().union(*(m.words for m in meanings))
        marks = {n for m in meanings for n in (*m.numbers, *m.relations)}
        return all(n in marks or isinstance(n, str) and any(words.related(n, k) for k in known) for n in new)
