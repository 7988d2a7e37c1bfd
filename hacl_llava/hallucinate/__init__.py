"""Hallucinated captions for LLaVA-format data: candidates, checks, the choice among them, the resumable run.

Candidates come from `rules`, from a model behind an endpoint (`prompts`, `api`) or from files of its results
(`batch`); `checks` refuses, `blind` chooses so that the words alone tell nothing, `run` keeps a journal and writes the
file, `audit` measures any such file.

A source is an object with ``answers(items)``: it takes an iterable of `Item` and yields one `Answer` for each, in any
order, as each is ready; a source that has to stop early (a spending cap) yields fewer and says why in ``stopped``.
"""

import hashlib
from typing import Any, NamedTuple

# What a hallucinated caption gets wrong: the kinds that the paper's prompt names ("existence of objects", "quantity,
# properties, and locations").
KINDS = ("existence", "attribute", "quantity", "location")


class Item(NamedTuple):
    """One caption to rewrite.

    ``index``: position of its record in the input, from 0. ``name``: how messages name the record. ``caption``: its
    text. ``others``: other captions of the same image, of which a hallucinated caption must not be true. ``wanted``:
    the kinds asked for, one for each hallucinated caption; a source that cannot make a kind may give another.
    ``enough``: how many will do, so that nothing is paid for asking again; None: as many as are wanted.
    """

    index: int
    name: str
    caption: str
    others: tuple = ()
    wanted: tuple = ("existence",)
    enough: int | None = None


class Answer(NamedTuple):
    """What a source made of an `Item`.

    ``captions``: (kind, text) pairs that passed the checks, at most as many as wanted. ``reason``: why there are fewer
    than wanted, or None. ``failed``: True if nothing was learnt about the caption (the endpoint failed), so that the
    next run asks again. ``rejected``: how many candidates each check refused. ``usage``: tokens, for a source that is
    paid by them: {"input": n, "output": n}.
    """

    index: int
    captions: tuple = ()
    reason: str | None = None
    failed: bool = False
    rejected: dict = {}
    usage: dict = {}


def chance(*key: Any) -> float:
    """A number in [0, 1) that depends on the key alone."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") / 2**64
