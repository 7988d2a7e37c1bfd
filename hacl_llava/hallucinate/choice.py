"""What is taken of a model's answers: candidates that pass the checks, one for each kind wanted."""

import re
from collections import Counter

from . import Answer, Item
from .checks import Checker
from .prompts import parse

REFUSED = "refused by the model"
REFUSAL = re.compile(
    r"\W*(I['’]m |I am )?(sorry\b|unable to|not able to|I can(['’]t|not) |I won['’]t |as an AI )", re.I
)


class Work:
    """What is known of one item so far: captions taken, candidates refused, tokens paid."""

    def __init__(self, item: Item) -> None:
        self.item, self.got, self.refused = item, [], []
        self.rejected, self.usage, self.reserved = Counter(), Counter(), Counter()
        self.attempt = self.cut = 0
        self.reason, self.unread = None, False

    def missing(self) -> tuple[str, ...]:
        """The kinds still wanted; a caption of a kind that was not asked for fills the first place."""
        left = list(self.item.wanted)
        for kind, _ in self.got:
            left.remove(kind if kind in left else left[0])
        return tuple(left)

    def lacks(self) -> bool:
        """Whether it is to be asked for again."""
        enough = self.item.enough
        return bool(self.missing()) and (enough is None or len(self.got) < enough)

    def read(self, text: str, checker: Checker) -> bool:
        """Take from a model's answer what passes the checks; True if it declines.

        ``unread`` says afterwards whether nothing could be read, ``reason`` why something is still missing.
        """
        wanted, candidates = self.missing(), []
        try:
            candidates = parse(text, self.item._replace(wanted=wanted))
        except ValueError as error:
            self.reason = f"no usable answer: {error}"
        self.unread = not candidates
        # Captions of photo sites do start with "I can't believe"; then so do their rewrites.
        if all(REFUSAL.match(t) for t in [t for _, t in candidates] or [text]) and not REFUSAL.match(self.item.caption):
            self.reason = REFUSED
            return True
        if candidates:
            self._check(wanted, candidates, checker)
        return False

    def _check(self, wanted, candidates, checker):
        # those of a kind wanted come first
        self.reason = "the model gave too few"
        for kind, text in sorted(candidates, key=lambda c: c[0] not in wanted):
            if not self.missing():
                break
            problem = checker.problem(self.item, text, tuple(t for _, t in self.got))
            if problem:
                self.rejected[problem] += 1
                self.refused.append(text)
                self.reason = "every other candidate was rejected" if self.got else "every candidate was rejected"
            else:
                self.got.append((kind, text))

    def answer(self, reason: str | None = None, failed: bool = False) -> Answer:
        """The `Answer`; ``reason``: why something is missing, ``failed``: nothing was learnt, if nothing was got."""
        got, wanted = len(self.got), self.item.enough or len(self.item.wanted)
        reason = None if got >= wanted else reason or self.reason
        reason = f"{got} of {wanted}: {reason}" if got and reason else reason
        captions, usage = tuple(self.got), dict(self.usage)
        return Answer(self.item.index, captions, reason, failed and not got, dict(self.rejected), usage)
