"""What the four benchmarks have in common: the shape of one, and small rules that several of them need."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..common.statistics import Metrics
from . import Question

# LLaVA-1.5's, for questions that want one word (arXiv 2310.03744, its table of prompts)
SHORT = "\nAnswer the question using a single word or phrase."


@dataclass
class Benchmark:
    """One task: what is asked, and how answers are scored.

    Attributes:
        kind: "pope", "chair", "amber" or "mmhal". name: as people read it. questions: all of them. max_new_tokens: of
        an answer. metrics: figure -> function of the summed counts. score: of (question, answer), gives
        ``{"counts": {name: number}, ...}``; of a judged benchmark also of (ask, rubric). judged: by a model, not by
        rules. lists: name -> digest of the lists of words that scores depend on.
    """

    kind: str
    name: str
    questions: list[Question]
    max_new_tokens: int
    metrics: Metrics
    score: Callable[..., dict[str, Any]]
    judged: bool = False
    lists: Mapping[str, str] = field(default_factory=dict)


def in_one_word(text: str) -> str:
    """A question that ends with `SHORT`, once."""
    text = text.strip()
    return text if text.endswith(SHORT.strip()) else text + SHORT


def described(answer: str, found: list, wrong: list, there: list, **more: int) -> dict[str, Any]:
    """The score of a description: objects found in it, those of them that are not there, and all that are there.

    Returns:
        ``counts``: hallucinated and mentions (each counts), sentence_hallucinated of sentences (1), ``more``,
        words, correct (nothing hallucinated); ``objects``, ``hallucinated``, ``truth``: the lists.
    """
    counts = {"hallucinated": len(wrong), "mentions": len(found), "sentence_hallucinated": int(bool(wrong))}
    words = len(re.findall(r"\w+(?:['’\-]\w+)*", answer))
    counts |= {"sentences": 1, **more, "words": words, "correct": int(not wrong)}
    return {"counts": counts, "objects": found, "hallucinated": wrong, "truth": there}


def digest(value: Any) -> str:
    """The sha256 of a json value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
