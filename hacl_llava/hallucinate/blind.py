"""The choice among candidates after which text alone does not tell hallucinated captions from true ones.

A candidate is drawn with probability proportional to exp(w . d), where d counts what it has more of than its caption:
words, pairs and triples of words, endings, lengths, all that also by kind. The w is the one for which the expected sum
of d over the captions is 0: whatever a candidate puts in is put in as often as other candidates take it out. Then a
linear classifier of those features has nothing to learn. It is the minimum of a convex function,

    sum over captions of log (sum over candidates of exp(w . d))  +  PENALTY / 2 |w|^2,

whose gradient is that expected sum (plus PENALTY w): maximum entropy under constraints (Berger, Della Pietra, Della
Pietra 1996, Computational Linguistics 22:39). It is the limit of adversarial filtering (AFLite, SugarCrepe), where
classifiers and choices take turns, found at once.
"""

import math
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from . import KINDS, chance
from .lexicon import TOKEN

if TYPE_CHECKING:
    import numpy as np  # what needs it imports it when called: the commands' help does without

BITS = 20  # of a hashed feature
SAMPLE = 10_000  # captions that it is found from
PENALTY = 8.0  # with 2,500 captions, .41 of pairs are ordered rightly at 1, .46 at 6, .49 at 12, .56 at 25
STEPS = 200  # of L-BFGS
_LENGTH = 0.3  # how much a word more or less weighs as a feature
_MASK = (1 << BITS) - 1


class Candidate(NamedTuple):
    """``likelihood``: by how much a language model prefers it to its caption, in nats, where one was asked."""

    kind: str
    text: str
    likelihood: float | None = None


def _grams(words, first, last, found, sign):
    # all runs of 1 to 3 words that overlap words[first:last]
    for n in (1, 2, 3):
        for i in range(max(first - n + 1, 0), min(last, len(words) - n + 1)):
            gram = " ".join(words[i : i + n])
            found[gram] = found.get(gram, 0) + sign
    for word in words[first:last]:
        for ending in ("-" + word[-1:], "-" + word[-3:]):
            found[ending] = found.get(ending, 0) + sign


def features(caption: Sequence[str], candidate: Candidate) -> "tuple[np.ndarray, np.ndarray]":
    """What a candidate has more of (or less, negative) than its caption.

    Args:
        caption: `words` of the caption.

    Returns:
        (places int64 [n] below 2 ** `BITS`, values float32 [n]); a place may come twice.
    """
    import numpy as np

    after = words(candidate.text)
    first, end = 0, min(len(caption), len(after))
    while first < end and caption[first] == after[first]:
        first += 1
    last = 0
    while last < end - first and caption[-1 - last] == after[-1 - last]:
        last += 1
    found = {f"={len(after)}": 1.0, f"={len(caption)}": -1.0} if len(after) != len(caption) else {}
    found["=="] = _LENGTH * (len(after) - len(caption))
    # where words were only put in or only taken out, the words around them are new neighbours
    _grams(after, first, max(len(after) - last, first), found, 1.0)
    _grams(caption, first, max(len(caption) - last, first), found, -1.0)
    if candidate.likelihood is not None:
        found["~"], found["~~"] = float(np.tanh(candidate.likelihood)), float(np.clip(candidate.likelihood / 4, -2, 2))
    found = [(zlib.crc32(key.encode("utf-8", "replace")), value) for key, value in found.items() if value]
    places = np.array([place for place, _ in found], dtype=np.int64)
    values = np.array([value for _, value in found], dtype=np.float32)
    by_kind = places * 31 + 7919 * (1 + KINDS.index(candidate.kind))
    return np.concatenate([places, by_kind]) & _MASK, np.concatenate([values, values])


def words(text: str) -> list[str]:
    """The words and marks of a text in lower case, with a mark for its beginning and end."""
    return ["<", *TOKEN.findall(text.lower()), ">"]


class Choice:
    """How candidates are drawn.

    Args:
        weights: of features, float32 [2 ** BITS]. kinds: {kind: weight}. count: how many are drawn for a caption. seed:
        of the draws.
    """

    def __init__(self, weights: "np.ndarray", kinds: dict[str, float], count: int, seed: int) -> None:
        self.weights, self.kinds, self.count, self.seed = weights, kinds, count, seed

    def scores(self, caption: str, candidates: Sequence[Candidate]) -> list[float]:
        """The logarithm of the probability of each candidate, up to a constant."""
        before, found = words(caption), []
        for candidate in candidates:
            places, values = features(before, candidate)
            found.append(float(self.weights[places] @ values) + self.kinds[candidate.kind])
        return found

    def take(self, index: int, caption: str, candidates: Sequence[Candidate]) -> list[tuple[str, str]]:
        """Some of the candidates, of different kinds as far as that leaves the texts balanced.

        Args:
            index: of the record; the same gives the same.

        Returns:
            (kind, text) of each; fewer than ``count`` where there are not as many.
        """
        # the largest of scores with Gumbel noise is a draw by exp(score)
        scores = [s + _noise(self.seed, index, "take", i) for i, s in enumerate(self.scores(caption, candidates))]
        taken = [max(slot, key=lambda i: scores[i]) for slot in _slots(candidates, self.count)]
        left = sorted(set(range(len(candidates))) - set(taken), key=lambda i: -scores[i])
        return [candidates[i][:2] for i in (*taken, *left[: max(self.count - len(taken), 0)])]


def _noise(*key):
    return -math.log(-math.log(min(max(chance(*key), 1e-12), 1 - 1e-12)))


def _slots(candidates, count):
    """Places of candidates, one list for each draw.

    Each kind has a list of its own as long as there are so few draws. But there has to be something in each list that
    leaves the texts balanced, and few numbers and places do: so half of the things and attributes go into all lists.
    """
    slots, seen = [[] for _ in range(count)], Counter()
    for i, candidate in enumerate(candidates):
        turn, slot = seen[candidate.kind], KINDS.index(candidate.kind)
        seen[candidate.kind] += 1
        if count > len(KINDS) or slot < 2 and turn % 2:
            slot = turn // 2
        slots[slot % count].append(i)
    return [slot for slot in slots if slot]


def fit(
    samples: Iterable[tuple[str, Sequence[Candidate]]],
    types: dict[str, float],
    count: int = 1,
    seed: int = 0,
    penalty: float = PENALTY,
) -> Choice:
    """The `Choice` that balances some captions' candidates.

    Args:
        samples: (caption, candidates). types: {kind: weight}, the shares of the kinds, kept as far
            as that leaves the texts balanced. count: how many are drawn for a caption. seed: of the draws.
            penalty: on the weights, against chance in rare words.
    """
    import numpy as np
    from scipy.optimize import minimize
    from scipy.sparse import csr_matrix

    choice = Choice(np.zeros(1 << BITS, dtype=np.float32), dict.fromkeys(KINDS, 0.0), count, seed)
    places, values, ends, starts, kinds = [], [], [0], [], []
    for caption, candidates in samples:
        before = words(caption)
        for slot in _slots(candidates, count):
            starts.append(len(kinds))
            for i in slot:
                at, each = features(before, candidates[i])
                places.append(at.astype(np.int32))
                values.append(each)
                ends.append(ends[-1] + len(at))
                kinds.append(KINDS.index(candidates[i].kind))
    if not starts:
        return choice
    places = np.concatenate(places)
    used = np.flatnonzero(np.bincount(places, minlength=1 << BITS))
    column = np.zeros(1 << BITS, dtype=np.int32)
    column[used] = np.arange(len(used))
    matrix = csr_matrix((np.concatenate(values), column[places], ends), shape=(len(kinds), len(used)))
    kinds, starts = np.array(kinds), np.array(starts)
    sizes = np.diff(np.append(starts, len(kinds)))
    shares = np.array([types.get(kind, 0.0) for kind in KINDS]) / sum(types.values()) * len(starts)

    # a weight of 1 for a kind is paid for by no less than a twentieth more of it than there would be
    penalties = np.concatenate([np.full(len(used), penalty), np.full(len(KINDS), len(starts) / 20)])

    def function(x):
        w, bias = x[: len(used)], x[len(used) :]
        scores = matrix @ w + bias[kinds]
        highest = np.repeat(np.maximum.reduceat(scores, starts), sizes)
        odds = np.exp(scores - highest)
        sums = np.repeat(np.add.reduceat(odds, starts), sizes)
        odds /= sums
        value = (highest + np.log(sums))[starts].sum() - shares @ bias + x @ (penalties * x) / 2
        slope = np.bincount(kinds, odds, len(KINDS)) - shares
        return value, np.concatenate([matrix.T @ odds, slope]) + penalties * x

    x = minimize(function, np.zeros(len(used) + len(KINDS)), jac=True, method="L-BFGS-B", options={"maxiter": STEPS}).x
    choice.weights[used] = x[: len(used)]
    choice.kinds = dict(zip(KINDS, x[len(used) :].tolist()))
    return choice
