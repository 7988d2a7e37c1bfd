"""Pictures of representations, drawn with matplotlib into PNG files; the paper's Figure 1 and two charts beside it."""

import importlib.util
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..common.report import COLOURS, MARKERS, dots, plain, pyplot, save
from .analyze import METHODS
from .measures import unit

if TYPE_CHECKING:
    from .representations import Representations

_DRAWN, _JOINED = 500, 12  # images in a picture (more would hide each other); of these joined with their captions
# Squares are hollow, since a hallucinated caption often lies where its caption does.
_ROLES = tuple(
    zip(("hallucinated caption", "caption", "image"), COLOURS[1:3] + COLOURS[:1], MARKERS[1:3] + MARKERS[:1])
)
_TEXT = {"font.size": 11, "axes.titlesize": 12, "axes.labelsize": 11, "legend.fontsize": 11}


def need() -> None:
    """Raise ImportError, naming what to install, before any work is done."""
    if any(importlib.util.find_spec(name) is None for name in ("matplotlib", "sklearn")):
        raise ImportError(
            "analyze draws with matplotlib and measures with scikit-learn: pip install 'hacl_llava[plot]'"
        )


def draw(
    out: Path,
    found: "Sequence[Representations]",
    analysis: Mapping[str, Any],
    spaces: Mapping[str, str],
    methods: Sequence[str],
    seed: int = 0,
) -> list[dict[str, str]]:
    """Draw every picture of an analysis.

    Args:
        out: folder. found: `Representations` of each model. analysis: what `measures.analyse` says of them. spaces:
            {name: title} of those to draw. methods: names of `METHODS`.

    Returns:
        [{"file", "title", "note"}].
    """
    made = []
    for space, title in spaces.items():
        models = [(m["name"], m["spaces"][space], x) for m, x in zip(analysis["models"], found) if space in x.spaces]
        if models:
            made += _draw_points(out, space, title[0].upper() + title[1:], models, methods, seed)
        if models and len(models[0][2].owner):
            chart = out / _file("closer_to_true", space)
            shares = []
            for name, numbers, x in models:
                everything = {**numbers["measures"]["closer_to_true"], "count": len(x.owner)}
                shares.append((name, {"all": everything, **numbers["closer_to_true_by_kind"]}))
            closer_chart(chart, shares, f"Is the image closer to its true caption? ({title})")
            note = "share of pairs, in all and by what the hallucinated caption gets wrong, with 95 % intervals"
            made.append({"file": chart.name, "title": f"Closer to true ({title})", "note": note})
    return made


def _file(name, space):
    return f"{name}.png" if space == "llm" else f"{name}_{space}.png"


def _draw_points(out, space, title, models, methods, seed):
    rows = len(models[0][2].index)
    drawn = np.sort(np.random.default_rng(seed).permutation(rows)[:_DRAWN])
    # Each model's heads were trained on their own: an axis of one means nothing in another.
    same_width = len({x.spaces[space][0].shape[1] for *_, x in models}) == 1
    joint = same_width and (space != "head" or len(models) == 1)
    axes = "fitted on all panels together" if joint else "fitted on each panel alone (axes not comparable)"
    what = "projected by the heads" if space == "head" else "last-layer states"
    panels = []
    for name, numbers, x in models:
        v, t, h = map(unit, x.spaces[space])
        first = {int(o): m for m, o in reversed(list(enumerate(x.owner)))}  # of an image's hallucinated captions
        values = numbers["measures"]
        text = f"{name}\nmodality gap {values['modality_gap']['value']:.3f}"
        if space == "centred":  # which leaves no gap
            text = f"{name}\nnearest caption is the image's own: {values['image_to_text_r1']['value']:.3f}"
        elif "modality_gap_relative" in values:
            text += f" ({values['modality_gap_relative']['value']:.2f} x the spread)"
        panels.append((text, v[drawn], t[drawn], h[[first[row] for row in drawn if row in first]]))
    made = []
    for method in methods:
        label, file = METHODS[method], _file(method, space)
        heading = f"{title}: {len(drawn)} images, {what}, {label}" + (f" {axes}" if len(models) > 1 else "")
        scatter(out / file, panels, method, joint, heading, seed)
        about = " about the mean of all points shown" if method == "pca" else ""
        note = f"{label}{about} of unit-norm {what}, {axes}; one hallucinated caption an image"
        made.append({"file": file, "title": f"{title}, {label}", "note": note})
    return made


def project(groups: Sequence[np.ndarray], method: str, seed: int = 0) -> tuple[list[np.ndarray], np.ndarray | None]:
    """Two coordinates of each row of all groups together.

    Args:
        groups: ``[R, D]`` each, of unit norm. method: of `METHODS`: "pca" (about the mean of all rows) or "tsne" (by
            distance).

    Returns:
        ``[R, 2]`` of each group, and the shares of variance along the two axes, or None but for PCA.
    """
    x, ends = np.concatenate(groups), np.cumsum([len(group) for group in groups])[:-1]
    if method == "pca":
        from sklearn.decomposition import PCA

        pca = PCA(2, random_state=seed)
        points = pca.fit_transform(x)
        return np.split(points, ends), np.nan_to_num(pca.explained_variance_ratio_)
    from sklearn.manifold import TSNE

    # Rows that are equal, as captions are in models with the same language model, come once and to one place.
    x, places = np.unique(x.round(6), axis=0, return_inverse=True)
    perplexity = max(1.0, min(30.0, (len(x) - 1) / 3))
    points = TSNE(2, init="pca", perplexity=perplexity, random_state=seed).fit_transform(x)
    return np.split(points[places.reshape(-1)], ends), None


def scatter(
    path: str | os.PathLike,
    panels: Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray]],
    method: str,
    joint: bool,
    heading: str,
    seed: int = 0,
) -> None:
    """One panel a model: images, captions and hallucinated captions in two dimensions.

    Args:
        path: of the PNG. panels: [(title, v ``[N, D]``, t ``[N, D]``, h ``[M, D]``)] of unit norm; the rows of all
            panels belong to the same records. method: as `project`. joint: whether one projection is fitted on all
            panels and they share axes; else each panel has its own. heading: above all.
    """
    parts = [[h, t, v] for _, v, t, h in panels]  # in the order of _ROLES
    fits = [sum(parts, [])] if joint else parts
    found = [project(fit, method, seed) for fit in fits]
    found = [(points[i : i + 3], share, _square(points)) for points, share in found for i in range(0, len(points), 3)]
    plt, columns, rows = pyplot(), len(panels), len(panels[0][1])
    joined = np.random.default_rng(seed).permutation(rows)[:_JOINED]
    size = min(26.0, max(7.0, 4500 / max(rows, 1)))
    with plt.rc_context(_TEXT):
        figure, axes = plt.subplots(
            1, columns, figsize=(max(5.4 * columns, 6.6), 6.7), squeeze=False, sharex=joint, sharey=joint
        )
        for axis, (title, *_), (points, share, limits) in zip(axes[0], panels, found):
            _points(axis, points, joined, size)
            axis.set_title("\n".join(textwrap.fill(line, 44) for line in plain(title).split("\n")))
            names = [METHODS[method] + f" {k}" for k in (1, 2)]
            if share is not None:
                names = [f"{name} ({s:.0%} of the variance)" for name, s in zip(names, share)]
            axis.set(xlim=limits[0], ylim=limits[1], box_aspect=1, xlabel=names[0])
            if axis is axes[0][0] or not joint:
                axis.set_ylabel(names[1])
            axis.grid(color="0.92")
            axis.set_axisbelow(True)
        looks = {name: {"marker": marker, "color": colour} for name, colour, marker in _ROLES[::-1]}
        looks["hallucinated caption"]["markerfacecolor"] = "none"
        handles = [plt.Line2D([], [], linestyle="", markersize=8, label=name, **look) for name, look in looks.items()]
        handles.append(plt.Line2D([], [], color="0.15", linewidth=1, label="an image and its caption"))
        wrapped = textwrap.fill(heading, 58 * columns + 12)
        figure.suptitle(wrapped, fontsize=12, y=0.985)
        figure.legend(handles=handles, loc="lower center", ncols=4 if columns > 1 else 2)
        figure.tight_layout(rect=(0, 0.06 if columns > 1 else 0.1, 1, 0.985 - 0.022 * wrapped.count("\n")))
        save(figure, path)


def _points(axis, groups, joined, size):
    """The points of each of `_ROLES`, and lines from some images to their captions."""
    for order, ((_, colour, marker), points) in enumerate(zip(_ROLES, groups)):
        style = {"c": colour, "s": size, "linewidths": 0}
        if order == 0:
            style = {"facecolors": "none", "edgecolors": colour, "s": 1.9 * size, "linewidths": 0.9}
        axis.scatter(*points.T, marker=marker, alpha=0.6, zorder=1 + order, **style)
    _, captions, images = groups
    for i in joined:
        axis.plot(*np.stack([images[i], captions[i]]).T, color="0.15", linewidth=0.8, alpha=0.7, zorder=5)
        for point, (_, colour, marker) in zip((captions[i], images[i]), _ROLES[1:]):
            style = {"c": colour, "marker": marker, "edgecolors": "black", "linewidths": 0.8}
            axis.scatter(*point, s=size + 14, zorder=6, **style)


def _square(groups):
    """Limits of both axes, as wide as each other, so that a distance looks the same in every direction."""
    points = np.concatenate(groups)
    low, high = points.min(0), points.max(0)
    half = max(float((high - low).max()) * 0.54, 1e-6)
    return [(middle - half, middle + half) for middle in (low + high) / 2]


def closer_chart(
    path: str | os.PathLike, models: Sequence[tuple[str, Mapping[str, Mapping[str, Any]]]], heading: str
) -> None:
    """Share of pairs closer to the true caption, by kind of hallucination, with intervals and the line of chance.

    Args:
        models: [(name, {row label: {"value", "interval", "count"}})]; the rows of the first come first.
    """
    labels = list(dict.fromkeys(label for _, rows in models for label in rows))
    counts = {label: row["count"] for _, rows in models for label, row in rows.items()}
    plt = pyplot()
    with plt.rc_context(_TEXT):
        figure, axis = plt.subplots(figsize=(8.4, 1.9 + 0.3 * len(labels) * (1 + len(models) * 0.6)))
        axis.set_title(textwrap.fill(heading, 74))
        dots(axis, labels, dict(models))
        axis.axvline(0.5, color="0.25", linestyle="--", linewidth=1.2, label="chance (0.5)")
        axis.set_yticks(range(len(labels)), [f"{label}\n(n = {counts[label]})" for label in labels])
        axis.set_xlim(-0.02, 1.02)
        axis.set_xlabel("share of pairs in which the image is closer to its true caption (bars: 95 %)")
        axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        figure.tight_layout()
        save(figure, path)
