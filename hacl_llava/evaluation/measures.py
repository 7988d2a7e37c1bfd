"""Measures of representations: how far apart images and captions lie, who finds whom, and who is nearer to whom.

Shapes: N images with a caption each, M hallucinated captions of all images, D size. Everything is computed in float64
on rows of unit norm, since HACL contrasts cosines; nothing is centred.

Every measure is a function of sums over images, so that `statistics.summarise` and `statistics.paired` give intervals.
The distance of two centroids a, b is one by the direction u = (a - b) / |a - b|: |a - b| = mean(u.a_i) - mean(u.b_i).
In the bootstrap u and the centroids in the spread stay as they are (first order). The candidates of a retrieval stay,
too: its interval is over queries.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from ..common import statistics
from ..common.statistics import Counts, ratio

if TYPE_CHECKING:
    from .representations import Item, Representations

TIE = 1e-9  # cosines less apart than this are equal: sums of floats in another order are


def unit(x: ArrayLike) -> np.ndarray:
    """Rows of unit norm in float64; a row of zeros stays."""
    x = np.asarray(x, dtype=np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-30)


# --- per image --------------------------------------------------------------------------------------------------------


def retrieval(
    queries: np.ndarray, targets: np.ndarray, same: tuple[Sequence, Sequence]
) -> tuple[np.ndarray, np.ndarray]:
    """Rank of the best right target of each query: 1 plus the wrong targets that are at least as similar.

    A tie counts against: a model that sends everything to one point finds nothing.

    Args:
        queries, targets: ``[N, D]`` of unit norm. same: pair of label lists of length N; target j is right for query i
            where either label is the same (the same image file, or the same text: a repeated caption is no mistake).

    Returns:
        ``[N]`` ranks, and ``[N]`` how many targets are right for a query.
    """
    codes = [np.unique(np.asarray(labels), return_inverse=True)[1] for labels in same]
    ranks, right_of = np.empty(len(queries), dtype=np.int64), np.empty(len(queries), dtype=np.int64)
    for start in range(0, len(queries), 512):  # N x N cosines would not fit for many
        part = slice(start, start + 512)
        cosines = queries[part] @ targets.T
        right = np.logical_or.reduce([code[part, None] == code[None] for code in codes])
        best = np.where(right, cosines, -np.inf).max(1)
        ranks[part] = 1 + (~right & (cosines >= best[:, None] - TIE)).sum(1)
        right_of[part] = right.sum(1)
    return ranks, right_of


def captions_of_one_image(
    texts: np.ndarray, images: Sequence[str], captions: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Whether a caption's nearest caption is another one of its image: how much of what a caption says its
    representation holds, and so the most that images can learn from it.

    Args:
        texts: ``[N, D]`` of unit norm. images, captions: N labels; captions of the same text are passed over.

    Returns:
        ``[N]`` found, and ``[N]`` whether the image has another caption at all; a tie counts against.
    """
    image, caption = (np.unique(np.asarray(labels), return_inverse=True)[1] for labels in (images, captions))
    found, has = np.zeros(len(texts)), np.zeros(len(texts))
    for start in range(0, len(texts), 512):
        part = slice(start, start + 512)
        cosines = np.where(caption[part, None] == caption[None], -np.inf, texts[part] @ texts.T)
        right = (image[part, None] == image[None]) & (cosines > -np.inf)
        best, wrong = (np.where(which, cosines, -np.inf).max(1) for which in (right, ~right))
        has[part] = right.any(1)
        found[part] = has[part] * (best > wrong + TIE)
    return found, has


def chance_of_recall(right_of: np.ndarray, k: int) -> float:
    """Expected recall at k of a random order: mean over queries of 1 - C(N - c, k) / C(N, k), c of N targets right."""
    n, missed = len(right_of), np.ones(len(right_of))
    for i in range(min(k, n)):
        missed *= np.maximum(n - right_of - i, 0) / (n - i)
    return float((1 - missed).mean())


def _direction(a, b):
    d = a.mean(0) - b.mean(0)
    length = np.linalg.norm(d)
    # Of equal centroids any direction gives 0, and none is better than another.
    return d / length if length else d


def items_of(
    v: np.ndarray,
    t: np.ndarray,
    h: np.ndarray,
    owner: np.ndarray,
    ids: Sequence[int],
    images: Sequence[str],
    captions: Sequence[str],
    kinds: Sequence[str | None],
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """What each image adds to the sums that `MEASURES` are functions of, as items for `statistics`.

    Args:
        v, t, h: ``[N, D]``, ``[N, D]``, ``[M, D]`` representations of images, captions, hallucinated captions.
        owner: ``[M]`` row of the image that a hallucinated caption belongs to.
        ids: N, each its own. images, captions: N paths and texts, which say what else is a right answer in retrieval.
        kinds: M kinds of hallucination, None where unknown.

    Returns:
        (N items ``{"id", "image", "counts"}``, {measure: level of chance}).
    """
    v, t, h = unit(v), unit(t), unit(h)
    n = len(v)

    def per_image(values):  # [M] -> sums of each image's
        return np.bincount(owner, weights=values, minlength=n).astype(np.float64)

    found = {"n": np.ones(n), "m": per_image(np.ones(len(h)))}
    u = _direction(v, t)
    found |= {"v.vt": v @ u, "t.vt": t @ u}
    found["spread_v"] = np.linalg.norm(v - v.mean(0), axis=1)
    found["spread_t"] = np.linalg.norm(t - t.mean(0), axis=1)
    found["alignment"] = ((v - t) ** 2).sum(1)
    ranks, right_of = retrieval(v, t, (images, captions))
    back, _ = retrieval(t, v, (images, captions))
    chance = {}
    for k in (1, 5):
        found[f"i2t_{k}"], found[f"t2i_{k}"] = (ranks <= k).astype(float), (back <= k).astype(float)
        chance[f"image_to_text_r{k}"] = chance[f"text_to_image_r{k}"] = chance_of_recall(right_of, k)
    found["t2t"], found["t2t_n"] = captions_of_one_image(t, images, captions)
    if len(h):
        for name, x in (("vh", v), ("th", t)):
            u = _direction(x, h)
            found[f"x.{name}"], found[f"h.{name}"] = x @ u, per_image(h @ u)
        margins = (v * t).sum(1)[owner] - (v[owner] * h).sum(1)
        closer = (margins > TIE).astype(float)
        found["alignment_h"] = per_image(((v[owner] - h) ** 2).sum(1))
        found["margin"], found["closer"] = per_image(margins), per_image(closer)
        has = found["m"] > 0
        found["with"] = has.astype(float)
        found["all"] = (has & (found["closer"] == found["m"])).astype(float)
        chance["closer_to_true"] = 0.5
        chance["closer_to_true_than_all"] = float((1 / (1 + found["m"][has])).mean())
        for kind in sorted({kind for kind in kinds if kind is not None}):
            of = np.array([k == kind for k in kinds], dtype=float)
            found[f"closer:{kind}"], found[f"m:{kind}"] = per_image(closer * of), per_image(of)
    names, rows = list(found), np.stack(list(found.values()), axis=1).tolist()
    items = [{"id": i, "image": image, "counts": dict(zip(names, row))} for i, image, row in zip(ids, images, rows)]
    return items, chance


def _gap(s):
    return ratio(s["v.vt"] - s["t.vt"], s["n"])


MEASURES = {
    # Liang et al. 2022, "Mind the Gap" (arXiv 2203.02053), section 4.1: |mean(v) - mean(t)| on unit norm
    "modality_gap": _gap,
    # the same, over the mean distance of images and captions from their own centroid
    "modality_gap_relative": lambda s: 2 * ratio(_gap(s) * s["n"], s["spread_v"] + s["spread_t"]),
    # |mean(v) - mean(h)| and |mean(t) - mean(h)|
    "gap_image_hallucinated": lambda s: ratio(s["x.vh"], s["n"]) - ratio(s["h.vh"], s["m"]),
    "gap_caption_hallucinated": lambda s: ratio(s["x.th"], s["n"]) - ratio(s["h.th"], s["m"]),
    # share of queries with a right answer among the first k; `retrieval`
    "image_to_text_r1": lambda s: ratio(s["i2t_1"], s["n"]),
    "image_to_text_r5": lambda s: ratio(s["i2t_5"], s["n"]),
    "text_to_image_r1": lambda s: ratio(s["t2i_1"], s["n"]),
    "text_to_image_r5": lambda s: ratio(s["t2i_5"], s["n"]),
    # share of captions, of those whose image has several, that have one of these nearest: a bound for the above
    "caption_to_caption_r1": lambda s: ratio(s["t2t"], s["t2t_n"]),
    # share of pairs (image, hallucinated caption) with cos(v, t) > cos(v, h); a tie counts against
    "closer_to_true": lambda s: ratio(s["closer"], s["m"]),
    # share of images with cos(v, t) > cos(v, h) for every hallucinated caption they have (training logs this one)
    "closer_to_true_than_all": lambda s: ratio(s["all"], s["with"]),
    # mean over pairs of cos(v, t) - cos(v, h)
    "mean_margin": lambda s: ratio(s["margin"], s["m"]),
    # Wang & Isola 2020 (arXiv 2005.10242), section 4.1, alpha = 2: mean |v - t|^2; and with h in place of t
    "alignment": lambda s: ratio(s["alignment"], s["n"]),
    "alignment_hallucinated": lambda s: ratio(s["alignment_h"], s["m"]),
}


def of_kind(kind: str) -> Callable[[Counts], np.ndarray]:
    """The measure closer_to_true over hallucinated captions of one kind."""
    return lambda s: ratio(s[f"closer:{kind}"], s[f"m:{kind}"])


# --- of models --------------------------------------------------------------------------------------------------------


def _kinds(items):
    kinds = [kind for item in items for kind in item.kinds]
    return [kind or "unknown" for kind in kinds] if any(kinds) else kinds


def _without_nan(found, key):
    return {name: x for name, x in found.items() if x[key] == x[key]}


def analyse(
    names: Sequence[str], found: "Sequence[Representations]", items: "Sequence[Item]", seed: int = 0
) -> dict[str, Any]:
    """Measure every model, and every pair of them against each other.

    Args:
        names: of the models. found: their `Representations` of the same records. items: these records, in order.

    Returns:
        {"models": [{"name", "checkpoint", ..., "spaces": {space: {"measures", "closer_to_true_by_kind"}}}],
        "comparisons": [{"first", "second", "spaces": {space: {"measures": {name: {"difference", "interval"}},
        "closer_to_true_by_kind"}}, "same_captions"}]}. ``same_captions``: the captions' states in the LLM are equal.
    """
    kinds = _kinds(items)
    by_kind = {kind: of_kind(kind) for kind in sorted({kind for kind in kinds if kind is not None})}
    by_kind = {k: by_kind[k] for k in sorted(by_kind, key=lambda k: (k == "unknown", k))}
    count = Counter(kinds)
    ids, images, captions = zip(*((item.index, item.image, item.caption) for item in items))
    models, rows = [], []
    for name, x in zip(names, found):
        spaces, row = {}, {}
        for space, (v, t, h) in x.spaces.items():
            row[space], chance = items_of(v, t, h, x.owner, ids, images, captions, kinds)
            values = _without_nan(statistics.summarise(MEASURES, row[space], seed=seed), "value")
            for measure, level in chance.items():
                values[measure]["chance"] = level
            kind_values = statistics.summarise(by_kind, row[space], seed=seed)
            spaces[space] = {
                "measures": values,
                "closer_to_true_by_kind": {k: {**y, "count": count[k]} for k, y in kind_values.items()},
            }
        models.append({"name": name, **x.about, "spaces": spaces})
        rows.append(row)
    comparisons = []
    for one, other in itertools.combinations(range(len(models)), 2):
        spaces = {}
        for space in (s for s in rows[one] if s in rows[other]):
            changes = statistics.paired(MEASURES, rows[other][space], rows[one][space], seed=seed)
            spaces[space] = {
                "measures": _without_nan(changes, "difference"),
                "closer_to_true_by_kind": statistics.paired(by_kind, rows[other][space], rows[one][space], seed=seed),
            }
        same = _same(found[one].spaces["llm"][1], found[other].spaces["llm"][1])
        comparisons.append({"first": names[one], "second": names[other], "spaces": spaces, "same_captions": same})
    return {"models": models, "comparisons": comparisons}


def _same(a, b):
    # By 0.1 % of their norm: other batches and kernels round otherwise.
    return bool(a.shape == b.shape and np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(b))
