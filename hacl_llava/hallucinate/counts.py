"""How often words stand beside each other in the captions that are rewritten: what a replacement is drawn by."""

import array
import zlib
from collections.abc import Iterable

from .lexicon import TOKEN

BITS = 21  # of the table: 8 MiB, whatever the size of the corpus; words that share a place in it are counted together
_MASK = (1 << BITS) - 1
_UNSEEN, _ELSEWHERE = 0.02, 0.05  # smoothing: of what was never seen, of what was seen beside other words


class Counts:
    """Counts of single words and of pairs of neighbours, in lower case."""

    def __init__(self, captions: Iterable[str] = ()) -> None:
        self.table = array.array("I", bytes(4 << BITS))
        table, crc32 = self.table, zlib.crc32
        for caption in captions:
            before = b"<"
            for word in TOKEN.findall(caption.lower()):
                word = b"a" if word == "an" else word.encode("utf-8", "replace")
                table[crc32(word) & _MASK] += 1
                table[crc32(before + b" " + word) & _MASK] += 1
                before = word
            table[crc32(before + b" >") & _MASK] += 1

    def of(self, phrase: str) -> int:
        """How often a word was seen, or at most how often a phrase was; in lower case."""
        words = phrase.split(" ")
        pairs = [f"{a} {b}" for a, b in zip(words, words[1:])] or [phrase]
        return min(self.table[zlib.crc32(pair.encode("utf-8", "replace")) & _MASK] for pair in pairs)

    def weight(self, before: str | None, phrase: str, after: str | None) -> float:
        """How well a phrase of one or more words goes between two words (None: the beginning, the end).

        About (times seen after the one) x (times seen before the other) / (times seen at all); the same small number
        for every phrase that was never seen.
        """
        before = "a" if before == "an" else before
        whole, words = self.of(phrase), phrase.split(" ")
        left = min(self.of(f"{before or '<'} {words[0]}"), whole)
        right = min(self.of(f"{words[-1]} {after or '>'}"), whole)
        rest = _ELSEWHERE * whole + _UNSEEN
        return (left + rest) * (right + rest) / (whole + 25 * _UNSEEN)
