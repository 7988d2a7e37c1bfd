"""How well text alone tells hallucinated captions from true ones, in any file of them.

Blind accuracy: the share of pairs (true, hallucinated) that a classifier orders rightly from the words, without the
image; .5 is chance. Where it is high, a model can learn the contrast without looking. The classifier is a logistic
regression over TF-IDF of words 1-3 and of characters 2-5, trained on other images than it judges. It has nothing in
common with `blind`, which makes the choice.
"""

import difflib
import heapq
import os
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..config import DataError, HaclError
from ..records import caption_of, hallucinated_captions, hallucinated_kinds, problem_of, stream_records
from . import chance
from .checks import length
from .lexicon import TOKEN

if TYPE_CHECKING:
    import numpy as np

MOST = 10_000  # pairs that are measured, drawn at random from larger files
FOLDS = 5
FEWEST = 2 * FOLDS  # pairs of which a figure is given
EXAMPLES = 8
# Names that other files give the same things: SugarCrepe, OHD-Caps, and whoever writes plain rows.
_CAPTION = ("caption", "positive_sample", "true_caption")
_NEGATIVES = ("hallucinated_captions", "hallucinated_caption", "negative_captions", "negative_caption", "negative")
_NEGATIVES += ("adversarial_samples", "popular_samples", "random_samples")
_IMAGE = ("image", "filename", "file_path", "image_id", "id")


class Pair(NamedTuple):
    """A caption and a hallucinated version of it. ``index``: of its record; ``image``: pairs of one image are never
    on both sides of the classifier; ``kind``: what it gets wrong, or "unknown"."""

    index: int
    image: str
    caption: str
    text: str
    kind: str


def _texts(value):
    """[(kind or None, text)] of a string, a list of strings, or {kind: text or texts}."""
    if isinstance(value, str):
        return [(None, value)]
    if isinstance(value, dict):
        return [(str(key), text) for key, each in value.items() for _, text in _texts(each)]
    return [(None, text) for text in value if isinstance(text, str)] if isinstance(value, list) else []


def _row(row):
    """(caption, [(kind or None, text)], image) of a record of LLaVA's or a plain row; None if it is neither."""
    if not isinstance(row, dict):
        return None
    image = next((str(row[key]) for key in _IMAGE if row.get(key) is not None), None)
    if problem_of(row, plain=False) is None:
        return caption_of(row), list(zip(hallucinated_kinds(row), hallucinated_captions(row))), image
    caption = next((row[key] for key in _CAPTION if isinstance(row.get(key), str)), None)
    if caption is None:
        return None
    texts = [pair for key in _NEGATIVES if key in row for pair in _texts(row[key])]
    kind = row.get("kind") if isinstance(row.get("kind"), str) else None
    return caption.strip(), [(kind, text) for _, text in texts], image


def _rows(path):
    for _, row in stream_records(path):
        inner = list(row.values()) if isinstance(row, dict) and _row(row) is None else []
        if inner and all(isinstance(each, dict) for each in inner):  # one object of rows by their names
            yield from inner
        else:
            yield row


def read_pairs(path: str | os.PathLike, seed: int = 0, most: int = MOST) -> tuple[list[Pair], dict[str, int]]:
    """The pairs of a file, or ``most`` of them drawn at random.

    Args:
        path: LLaVA json or json lines with ``hallucinated_captions``, or rows with a caption (``caption``) and its
            negatives (``negative_caption``, ``hallucinated_captions``, ``adversarial_samples`` ...).
        seed: of the draw.

    Returns:
        The pairs in the file's order, and {"records", "with hallucinated captions", "captions"} of the whole file.

    Raises:
        DataError: there is no pair in it.
    """
    counts = {"records": 0, "with hallucinated captions": 0, "captions": 0}

    def drawn():
        for index, row in enumerate(_rows(path)):
            counts["records"] += 1
            caption, texts, image = _row(row) or ("", [], None)
            texts = [(kind or "unknown", text.strip()) for kind, text in texts if caption and text.strip()]
            counts["with hallucinated captions"] += bool(texts)
            counts["captions"] += len(texts)
            for turn, (kind, text) in enumerate(texts):
                yield chance(seed, "audit", index, turn), Pair(index, image or caption, caption, text, kind)

    pairs = [pair for _, pair in heapq.nsmallest(most, drawn(), key=lambda each: each[0])]
    if not pairs:
        raise DataError(
            f"{path}: holds no hallucinated captions; expected LLaVA records with 'hallucinated_captions', or rows "
            f"with one of {', '.join(_CAPTION)} and one of {', '.join(_NEGATIVES)}."
        )
    return sorted(pairs), counts


def _sklearn():
    try:
        import sklearn
    except ImportError:
        raise ImportError("blind accuracy needs scikit-learn: pip install 'hacl_llava[plot]'") from None
    return sklearn


def margins(pairs: Sequence[Pair]) -> "np.ndarray":
    """By how much the true caption of each pair is preferred, by a classifier that saw no text of its image.

    Returns:
        float array [pairs]: log odds, positive where the true one is found.

    Raises:
        HaclError: there are fewer images than folds.
    """
    import numpy as np

    _sklearn()
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold
    from sklearn.pipeline import make_pipeline, make_union

    images = [pair.image for pair in pairs]
    if len(set(images)) < FOLDS:
        raise HaclError(f"blind accuracy needs pairs of at least {FOLDS} images, there are {len(set(images))}.")
    texts = np.array([[pair.caption, pair.text] for pair in pairs], dtype=object)
    found = np.zeros(len(pairs))
    shared = {"lowercase": False, "sublinear_tf": True, "dtype": np.float32}
    for train, test in GroupKFold(FOLDS).split(texts, groups=images):
        classifier = make_pipeline(
            make_union(
                TfidfVectorizer(ngram_range=(1, 3), token_pattern=r"[^\W_]+|[^\w\s]", **shared),
                TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), **shared),
            ),
            LogisticRegression(C=4, solver="liblinear", random_state=0),
        )
        classifier.fit(texts[train].ravel(), np.tile([1, 0], len(train)))
        scores = classifier.decision_function(texts[test].ravel()).reshape(-1, 2)
        found[test] = scores[:, 0] - scores[:, 1]
    return found


def accuracy(values: Iterable[float], images: Sequence[str]) -> dict[str, Any]:
    """The share of positive ones among differences (a tie is half), with its 95 % interval over images.

    Returns:
        {"pairs", "value", "interval"}; no value where there are fewer than `FEWEST`.
    """
    from ..common.statistics import ratio, summarise

    items = [{"counts": {"right": (v > 0) + 0.5 * (v == 0), "pairs": 1}} for v in values]
    if len(items) < FEWEST:
        return {"pairs": len(items)}
    metric = {"accuracy": lambda counts: ratio(counts["right"], counts["pairs"])}
    return {"pairs": len(items), **summarise(metric, items, images)["accuracy"]}


def edit_size(caption: str, text: str) -> int:
    """How many words (or marks) were replaced, put in or taken out."""
    before, after = TOKEN.findall(caption), TOKEN.findall(text)
    blocks = difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    return sum(max(b - a, d - c) for tag, a, b, c, d in blocks if tag != "equal")


def _quartiles(values):
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else list(values) * 3


def _by(values, pairs, names) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in sorted(set(names)):
        places = [i for i, other in enumerate(names) if other == name]
        yield name, accuracy([values[i] for i in places], [pairs[i].image for i in places])


def audit(
    pairs: Sequence[Pair], sources: Sequence[str] | None = None, preference: Sequence[float] | None = None
) -> dict[str, Any]:
    """What the words of some pairs give away, as a dict that json can hold.

    Args:
        pairs: of `read_pairs`. sources: where each came from, in parallel to ``pairs``. preference: by how much a
            language model prefers each true caption, in parallel.

    Returns:
        ``blind``: {"all", "kinds", "sources"} of `accuracy`; ``likelihood`` likewise, where ``preference`` is given;
        ``length_ratio`` and ``edit_size``: quartiles, in tokens; ``hardest`` and ``easiest``: [margin, kind, caption,
        hallucinated caption].
    """
    import numpy as np

    values = margins(pairs)
    found = {}
    for name, each in (("blind", values), ("likelihood", preference)):
        if each is not None:
            found[name] = {"all": accuracy(each, [p.image for p in pairs])}
            found[name]["kinds"] = dict(_by(each, pairs, [p.kind for p in pairs]))
            found[name]["sources"] = dict(_by(each, pairs, sources)) if sources else {}
    order = sorted(range(len(pairs)), key=lambda i: values[i])
    rows = [[round(float(values[i]), 3), pairs[i].kind, pairs[i].caption, pairs[i].text] for i in order]
    return {
        **found,
        "length_ratio": _quartiles([length(p.text) / max(length(p.caption), 1) for p in pairs]),
        "edit_size": _quartiles([edit_size(p.caption, p.text) for p in pairs]),
        "hardest": rows[:EXAMPLES],
        "easiest": rows[::-1][:EXAMPLES],
        "margins": np.histogram(values, bins=41)[0].tolist(),
        "margins_range": [float(values.min()), float(values.max())],
    }
