"""The source ``rules``: `rules` over many captions, with the choice among what they give."""

import collections
import gc
import heapq
import itertools
import multiprocessing
import signal
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any

from ..config import HaclError
from ..records import unblock
from . import KINDS, Answer, Item, chance
from .blind import SAMPLE, Candidate, fit
from .checks import Checker
from .counts import Counts
from .lexicon import lexicon
from .rules import LONGEST, MORE, MOST, Dice, Rules, Text

if TYPE_CHECKING:
    from .likelihood import Likelihood

BLOCK = 256  # records over which the kinds are balanced, and that a worker gets at once
ALONE = 2  # blocks that are done sooner than a worker has started


class RulesSource:
    """`Rules` over many captions.

    Args:
        types: {kind: weight}, the shares of the kinds.
        seed: of every choice.
        checker: refuses candidates.
        workers: processes.
        likelihood: asked for the candidates of a choice that is `blind`, or None.

    Until `balance` was called, the choice is random, and the kinds are balanced within blocks of `BLOCK` items by
    position, rarest possibility first; so what a block gives depends on that block alone, and the caller hands in whole
    blocks. After it, what an item gives depends on the item alone.
    """

    stopped = None

    def __init__(
        self,
        types: dict[str, float] | None = None,
        seed: int = 0,
        checker: Checker | None = None,
        workers: int = 1,
        likelihood: "Likelihood | None" = None,
    ) -> None:
        self.types = types or dict.fromkeys(KINDS, 1.0)
        self.seed, self.checker, self.workers, self.likelihood = seed, checker, workers, likelihood
        self.counts = self.choice = self._rules = None

    @property
    def whole_blocks(self) -> bool:
        """Whether all items of a block have to be handed in, also those that are done."""
        return self.choice is None

    def balance(self, items: Iterable[Item], most: int = SAMPLE) -> None:
        """Let the choice be blind: count the words of all captions, balance a sample of them.

        Args:
            items: every caption of the run; the same ones each time, or a run that is gone on with chooses otherwise.
            most: size of the sample.
        """
        sample = []

        def counted():
            for item in items:
                heapq.heappush(sample, (-chance(self.seed, "sample", item.index), item.index, item))
                if len(sample) > most:
                    heapq.heappop(sample)
                yield item.caption

        self.counts, self._rules = Counts(counted()), None
        chosen = [item for _, _, item in sorted(sample, key=lambda each: each[1])]
        found = itertools.chain.from_iterable(self._map("propose", _blocks(chosen)))
        judged = self._judged((item, candidates) for item, candidates, _, _ in found)
        count = max((len(item.wanted) for item in chosen), default=1)
        self.choice = fit(((item.caption, candidates) for item, candidates in judged), self.types, count, self.seed)

    def answers(self, items: Iterable[Item]) -> Iterator[Answer]:
        """One `Answer` for each item, in order."""
        if self.likelihood is None:
            yield from itertools.chain.from_iterable(self._map("block", _blocks(items)))
            return
        for block in self._map("propose", _blocks(items)):
            yield from self._chosen(block)

    def _map(self, method, blocks):
        """Results of a method for each block, in order."""
        first = list(itertools.islice(blocks, ALONE + 1))
        blocks = itertools.chain(first, blocks)
        if self.workers == 1 or len(first) <= ALONE:
            lexicon()
            gc.freeze()  # half a million small objects that the collector would go through again and again
            try:
                yield from map(getattr(self, method), blocks)
            finally:
                gc.unfreeze()
            return
        context, waiting = multiprocessing.get_context("spawn"), collections.deque()
        pool = ProcessPoolExecutor(self.workers, context, initializer=_start_worker, initargs=(self,))
        try:
            while True:
                for block in itertools.islice(blocks, 2 * self.workers - len(waiting)):
                    waiting.append(pool.submit(_work, method, block))
                if not waiting:
                    break
                yield waiting.popleft().result()
        except BrokenProcessPool:
            unblock(pool)
            raise HaclError(
                "a worker process was killed (out of memory, perhaps); the answers so far are safe: give the same "
                "command again, with fewer --workers."
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_rules": None, "likelihood": None}

    def _read(self, items):
        """(item, text, sites, dice, English or not) of each item."""
        if self._rules is None:
            self._rules = Rules(self.seed, self.checker, self.counts)
        for item in items:
            text = Text(item.caption if len(item.caption) <= LONGEST else "", item.others)
            english = text.is_english()
            sites = self._rules.sites(text) if english else {}
            sites = {kind: sites[kind] for kind in KINDS if self.types.get(kind) and sites.get(kind)}
            yield item, text, sites, Dice(f"{self.seed}/{item.index}/{item.caption}"), english

    def propose(self, items: Sequence[Item]) -> list[tuple[Item, list[Candidate], dict[str, int], str | None]]:
        """(item, candidates, refused by each check, why there is none) of the items of a block, in order."""
        found = []
        for item, text, sites, dice, english in self._read(items):
            most = MOST + MORE * (len(item.wanted) - 1)
            candidates, rejected = self._rules.candidates(item, text, sites, dice, most)
            reason = None if candidates else _reason(item, english, sites)
            found.append((item, [Candidate(*each) for each in candidates], rejected, reason))
        return found

    def _judged(self, proposed):
        """(item, candidates) of each, as the language model lets them through if there is one."""
        if self.likelihood is None:
            yield from proposed
            return
        proposed = iter(proposed)
        while block := list(itertools.islice(proposed, BLOCK)):
            found = self.likelihood.judge([(item.caption, candidates) for item, candidates in block])
            yield from zip([item for item, _ in block], found)

    def _chosen(self, proposed):
        """The answers for what `propose` found."""
        judged = self._judged((item, candidates) for item, candidates, _, _ in proposed)
        for (_, _, rejected, reason), (item, candidates) in zip(proposed, judged):
            taken = self.choice.take(item.index, item.caption, candidates)
            if taken and len(taken) < len(item.wanted):
                reason = f"only {len(taken)} of {len(item.wanted)}"
            yield Answer(item.index, tuple(taken), reason, rejected=rejected)

    def block(self, items: Sequence[Item]) -> list[Answer]:
        """Answers for the items of one block, in order."""
        return list(self._chosen(self.propose(items))) if self.choice else self._at_random(items)

    def _at_random(self, items):
        work = [(*read, [], {}) for read in self._read(items)]
        total, got, asked = sum(self.types.values()), dict.fromkeys(KINDS, 0), 0
        for turn in range(max((len(item.wanted) for item in items), default=0)):
            for item, text, sites, dice, _, taken, rejected in sorted(work, key=lambda w: (len(w[2]), w[0].index)):
                if turn >= len(item.wanted):
                    continue
                asked += 1
                used = {k for k, _ in taken}
                order = sorted(sites, key=lambda k: (k in used, got[k] - self.types[k] / total * asked, KINDS.index(k)))
                for kind in order:
                    texts = [t for _, t in taken]
                    caption = self._rules.rewrite(item, kind, text, sites[kind], dice, texts, rejected)
                    if caption is not None:
                        taken.append((kind, caption))
                        got[kind] += 1
                        break
        answers = []
        for item, _, sites, _, english, taken, rejected in work:
            reason = None if taken else _reason(item, english, sites)
            if taken and len(taken) < len(item.wanted):
                reason = f"only {len(taken)} of {len(item.wanted)}"
            answers.append(Answer(item.index, tuple(taken), reason, rejected=rejected))
        return answers


def _reason(item, english, sites):
    """Why there is no hallucinated caption of an item that had these sites."""
    if not item.wanted:
        return None
    if len(item.caption) > LONGEST:
        return "too long"
    if not english:
        return "not English"
    return "every candidate was rejected" if sites else "nothing in it to rewrite"


_source = None  # of a worker process


def _start_worker(source):
    global _source
    _source = source
    lexicon()
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's


def _work(method, block):
    return getattr(_source, method)(block)


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
