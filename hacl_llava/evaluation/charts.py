"""The two pictures of a report: training curves, and metrics with their differences."""

import math
import os
from collections.abc import Sequence
from typing import Any

from ..common.report import COLOURS, MARKERS, STYLES, is_number, plain, pyplot, save, shorten
from .runs import QUANTITIES, Run, way_of


def _label(text):
    return plain(" ".join(shorten(text, 40).split()))


def smooth(values: Sequence[float]) -> list[float]:
    """Means over the twelfth of the values (at most 100) around each; nan stays nan.

    Centred, so that a curve that falls is not drawn later than it fell, and over as few on both sides at the start,
    where curves fall the most; at the end over those that are there.
    """
    out, half = [], min(50, len(values) // 24)
    for i, value in enumerate(values):
        reach = min(half, i)
        near = [v for v in values[i - reach : i + reach + 1] if not math.isnan(v)]
        out.append(math.nan if math.isnan(value) else sum(near) / len(near))
    return out


def lines_of(runs: Sequence[Run], stage: int) -> list[dict[str, Any]]:
    """The lines of a stage's training curves.

    Returns:
        [{"line" (its label), "look" (colour and style: no two of 28 runs look alike), "curves" {quantity: [(step,
        value)]}, "training"}].
    """
    lines = []
    for index, run in enumerate(runs):
        of_stage = [t for t in run.training if t["stage"] == stage]
        for turn, training in enumerate(of_stage):
            where = os.path.relpath(training["folder"], run.folder)
            label = run.name if len(of_stage) == 1 else f"{run.name}: {where}"
            look = {"color": COLOURS[index % len(COLOURS)], "linestyle": STYLES[(index + turn) % len(STYLES)]}
            lines.append({"line": label, "look": look, "curves": training["curves"], "training": training})
    # Without contrast the loss that is trained is the caption loss: it belongs beside the caption losses of the others.
    if any(x["training"]["hacl"] for x in lines):
        for x in lines:
            x["curves"] = {"loss_lm": x["curves"]["loss"], **x["curves"]}
    return lines


def draw_curves(lines: Sequence[dict[str, Any]], path: str | os.PathLike) -> None:
    """A panel for each quantity that was logged, a line for each of `lines_of`, to a PNG file."""
    plt = pyplot()
    keys = [k for k in QUANTITIES if any(k in x["curves"] for x in lines)]
    columns = min(4, len(keys) + 1) if len(keys) > 1 else 1
    rows = -(-(len(keys) + (len(keys) > 1)) // columns)  # a cell more, for the legend
    size = (3.1 * columns, 2.5 * rows) if columns > 1 else (7, 3.6)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, constrained_layout=True)
    handles = {}
    for axis, key in zip(axes.flat, keys):
        for line in lines:
            if points := line["curves"].get(key):
                steps, values = zip(*points)
                look = {**line["look"], "marker": "o" if len(points) == 1 else None}
                axis.plot(steps, values, color=look["color"], alpha=0.25, linewidth=0.8)
                handles[line["line"]] = axis.plot(steps, smooth(values), linewidth=1.6, **look)[0]
        axis.set_title(QUANTITIES[key], fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.margins(x=0.02)
        axis.set_xlabel("step", fontsize=8)
    rest = list(axes.flat)[len(keys) :]
    for axis in rest:
        axis.axis("off")
    place = {"loc": "upper left", "frameon": False} if rest else {"loc": "best"}
    target = rest[0] if rest else axes.flat[0]
    target.legend(handles.values(), map(_label, handles), fontsize=9, handlelength=3, **place)
    save(figure, path)


def draw_evaluation(runs: Sequence[Run], tasks: Sequence[dict[str, Any]], path: str | os.PathLike) -> bool:
    """Values with intervals on the left, differences from the baseline on the right; returns whether there are any."""
    rows, heads, place = [], {}, 0.0  # (y, metric, entries by run: values, differences)
    for task in tasks:
        for metric, entries in task["metrics"].items():
            values = [x["value"] for x in entries.values() if is_number(x["value"])]
            if values and 0 <= min(values) and max(values) <= 1:
                place += 1 if task["task"] in heads else 2.3
                heads.setdefault(task["task"], place - 1)
                made = {c["b"]: c["metrics"].get(metric, {}) for c in task["comparisons"] if "metrics" in c}
                rows.append((place, metric, entries, made))
    if not rows:
        return False
    names = [r.name for r in runs]
    shown = [n for n in names if any(n in entries for _, _, entries, _ in rows)]
    comparisons = [c for t in tasks for c in t["comparisons"] if "metrics" in c]
    compared = [n for n in names if any(c["b"] == n for c in comparisons)]
    height = 1.2 + 0.45 * len(heads) + len(rows) * (0.14 + 0.11 * len(shown))
    size = {"figsize": (10, height), "squeeze": False, "constrained_layout": True}
    figure, axes = pyplot().subplots(1, 1 + bool(compared), sharey=True, **size)
    left, handles = axes[0][0], {}
    for axis, key, group in zip(axes[0], ("value", "difference"), (names, compared)):
        for y, _, *entries in rows:
            for i, name in enumerate(group):
                entry = entries[key == "difference"].get(name, {})
                if is_number(entry.get(key)):
                    at, k = y + (i - (len(group) - 1) / 2) * 0.7 / len(names), names.index(name)
                    colour, interval = COLOURS[k % len(COLOURS)], entry["interval"] or [None]
                    if all(map(is_number, interval)):
                        axis.plot(interval, (at, at), color=colour, linewidth=1.4)
                    handle = axis.plot(entry[key], at, MARKERS[k % len(MARKERS)], color=colour, markersize=4.5)[0]
                    handles.setdefault(name, handle)
        axis.grid(axis="x", alpha=0.25)
        axis.tick_params(axis="x", labelsize=8)
        axis.tick_params(axis="y", length=0)
        for y in heads.values():
            axis.axhspan(y - 0.42, y + 0.42, color="#eeeeee", zorder=0.5)
    labels = [_label(metric) + " (less is better)" * (way_of(metric) == -1) for _, metric, *_ in rows]
    left.set_yticks([y for y, *_ in rows], labels, fontsize=8)
    left.set_ylim(place + 0.8, 0.6)
    left.set_xlabel("value, 95% interval", fontsize=9)
    words = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 8.5, "fontweight": "bold"}
    for name, y in heads.items():
        left.annotate(_label(name), (0.01, y), **words)
    if compared:
        axes[0][1].axvline(0, color="black", linewidth=1)
        label = f"difference from {_label(comparisons[0]['a'])}, paired, 95% interval"
        axes[0][1].set_xlabel(label, fontsize=9)
    look = {"ncols": min(4, len(handles)), "fontsize": 9, "frameon": False}
    figure.legend(handles.values(), map(_label, handles), loc="outside upper center", **look)
    save(figure, path)
    return True
