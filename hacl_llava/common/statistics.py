"""Intervals and tests for figures that are functions of sums over items; the bootstrap and the binomial are scipy's.

An item is a dict as in ``items.jsonl``: ``{"id", "image", "counts": {name: number}, ...}``; one without ``counts``
failed and is passed over. The bootstrap resamples images with all their items, because the questions on one image are
not independent (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8 and 13).
"""

import itertools
import random
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..config import HaclError

_CELLS = 1_000_000  # drawn at once; scipy and `_with_intervals` hold about 60 bytes for each


class Counts(dict):
    """Summed counts by name, arrays of one shape; a name that no item has is zero."""

    def __missing__(self, name: str) -> np.ndarray:
        return np.zeros_like(next(iter(self.values()), np.zeros(())), dtype=float)


Metrics = Mapping[str, Callable[[Counts], ArrayLike]]  # name -> function of the sums, as a task's ``METRICS``


def ratio(part: ArrayLike, whole: ArrayLike) -> np.ndarray:
    """``part / whole`` of arrays or numbers; nan where ``whole`` is 0."""
    part, whole = np.broadcast_arrays(np.asarray(part, dtype=float), np.asarray(whole, dtype=float))
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole != 0)


def sample(questions: Sequence, count: int, seed: int = 0) -> list:
    """``count`` of the questions, chosen at random without replacement, in their own order; all if there are fewer.

    The same of the same list for the same seed, and a smaller sample is a part of a larger one.
    """
    order = list(range(len(questions)))
    random.Random(seed).shuffle(order)
    return [questions[i] for i in sorted(order[:count])]


def totals(items: Iterable[dict]) -> Counts:
    """The `Counts` summed over all items that have them."""
    names, sums = _sums([item["counts"] for item in items if item.get("counts")], None)
    return Counts(zip(names, sums.sum(0)))


def _sums(counts, clusters):
    # names, and an array [clusters, names]; clusters: their numbers in parallel to counts, None: each its own
    names = sorted({name for c in counts for name in c})
    column = {name: i for i, name in enumerate(names)}
    rows = range(len(counts)) if clusters is None else clusters
    sums = np.zeros((max(rows, default=-1) + 1, len(names)))
    for row, c in zip(rows, counts):
        for name, value in c.items():
            sums[row, column[name]] += value
    return names, sums


def _number(keys):
    numbers = {}
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def _evaluate(metrics, names, sums):
    counts = Counts(zip(names, np.moveaxis(sums, -1, 0)))
    with np.errstate(divide="ignore", invalid="ignore"):
        return {name: np.asarray(metric(counts), dtype=float) for name, metric in metrics.items()}


def _interval(values):
    defined = values[np.isfinite(values)]
    if 2 * len(defined) <= len(values):
        return [float("nan"), float("nan")]
    return [float(v) for v in np.percentile(defined, [2.5, 97.5])]


def _with_intervals(figures, tables, seed, samples):
    # {name: value} and {name: interval} of `figures`, a function of the sums of each table [clusters, names]
    values = {name: float(value) for name, value in figures(*(table.sum(0) for table in tables)).items()}
    clusters = len(tables[0])
    if clusters < 2 or not values:
        return values, {name: [float("nan"), float("nan")] for name in values}

    def statistic(drawn, axis):  # [samples of a batch, clusters] numbers of clusters -> [figures, samples of a batch]
        rows = np.arange(len(drawn))[:, None] * clusters
        weights = np.bincount((rows + drawn).ravel(), minlength=drawn.size).reshape(drawn.shape).astype(float)
        return np.stack(list(figures(*(weights @ table for table in tables)).values()))

    from scipy.stats import bootstrap

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of undefined samples, which `_interval` sees to
        found = bootstrap(
            (np.arange(clusters),),
            statistic,
            n_resamples=samples,
            batch=max(1, _CELLS // clusters),
            vectorized=True,
            method="percentile",
            random_state=np.random.default_rng(seed),
        )
    return values, dict(zip(values, map(_interval, found.bootstrap_distribution)))


def summarise(
    metrics: Metrics, items: Sequence[dict], clusters: Sequence[Hashable] | None = None, seed: int = 0,
    samples: int = 2000,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Every metric over all items, with the 95 % interval of the percentile bootstrap over images.

    Args:
        metrics: name -> function of `Counts`, as a task's ``METRICS``.
        items: dicts with ``counts``; those without are passed over.
        clusters: what is resampled, in parallel to ``items``; None: each item's ``image``, or
            its ``id`` where it has none.
        seed: of the resampling. samples: how often.

    Returns:
        ``{name: {"value": float, "interval": [low, high]}}``. The value is nan where it is undefined (no items,
        division by 0). Samples in which it is undefined are left out of the interval; it is [nan, nan] where that is
        half of them or more, and where there is a single image, which says nothing of other images.

    Raises:
        HaclError: there are not as many clusters as items.
    """
    if clusters is None:
        clusters = [item.get("image", item.get("id")) for item in items]
    if len(clusters) != len(items):
        raise HaclError(f"clusters: {len(clusters)} for {len(items)} items; give one for each item.")
    kept = [(item["counts"], cluster) for item, cluster in zip(items, clusters) if item.get("counts")]
    names, table = _sums([c for c, _ in kept], _number(cluster for _, cluster in kept))
    values, intervals = _with_intervals(lambda sums: _evaluate(metrics, names, sums), [table], seed, samples)
    return {name: {"value": values[name], "interval": intervals[name]} for name in metrics}


def _by_id(items):
    found = {}
    for item in items:
        if item["id"] in found:
            raise HaclError(f"item id {item['id']!r} comes twice; ids have to be unique within a task.")
        found[item["id"]] = item
    return {key: item for key, item in found.items() if item.get("counts")}


def paired(
    metrics: Metrics, items_a: Iterable[dict], items_b: Iterable[dict], seed: int = 0, samples: int = 2000
) -> dict[str, dict[str, Any]]:
    """The difference (first minus second) of every metric over the items that both have, matched by ``id``.

    Args:
        metrics, seed, samples: as of `summarise`. items_a, items_b: the items of two runs on the same questions.

    Returns:
        ``{name: {"difference": float, "interval": [low, high]}}``; both runs are resampled with the same images, so
        that what makes an image hard for both cancels out. nan as in `summarise`.

    Raises:
        HaclError: an id comes twice in a run.
    """
    a, b = _by_id(items_a), _by_id(items_b)
    shared = [key for key in a if key in b]
    numbers = _number(a[key].get("image", key) for key in shared)
    (names_a, table_a), (names_b, table_b) = (_sums([x[key]["counts"] for key in shared], numbers) for x in (a, b))

    def differences(sums_a, sums_b):
        values_a, values_b = _evaluate(metrics, names_a, sums_a), _evaluate(metrics, names_b, sums_b)
        return {name: values_a[name] - values_b[name] for name in metrics}

    values, intervals = _with_intervals(differences, [table_a, table_b], seed, samples)
    return {name: {"difference": values[name], "interval": intervals[name]} for name in metrics}


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided p of McNemar's test: the smaller tail of a fair binomial, doubled, at most 1.

    Args:
        only_a, only_b: how many items only the first, only the second answered correctly.

    Returns:
        p of "both are equally often right"; 1.0 where the runs never differ.

    Raises:
        HaclError: a count is negative.
    """
    few, n = min(only_a, only_b), only_a + only_b
    if few < 0:
        raise HaclError(f"mcnemar: {only_a} and {only_b} are counts of items, at least 0.")
    from scipy.stats import binomtest

    return float(binomtest(few, n).pvalue) if n else 1.0


def holm(values: Sequence[float]) -> list[float]:
    """p values adjusted for their number (Holm 1979, Scandinavian Journal of Statistics 6:65), in the order given."""
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, i in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, (len(values) - rank) * values[i]))
        adjusted[i] = largest
    return adjusted


def correct_pairs(items_a: Iterable[dict], items_b: Iterable[dict]) -> tuple[int, int, int, int]:
    """Of the items that both runs have, with ``counts["correct"]``: how many (both, only_a, only_b, neither) got right.

    Raises:
        HaclError: an id comes twice in a run.
    """
    a, b = _by_id(items_a), _by_id(items_b)
    counts = [(a[key]["counts"], b[key]["counts"]) for key in a if key in b]
    found = Counter((bool(x["correct"]), bool(y["correct"])) for x, y in counts if "correct" in x and "correct" in y)
    return tuple(found[pair] for pair in itertools.product((True, False), repeat=2))
