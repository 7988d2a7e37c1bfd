"""The two pictures of a report: training curves, and metrics with their differences."""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..common.report import COLOURS, MARKERS, STYLES, plain, pyplot, save, shorten
from .runs import QUANTITIES, Run, is_number, way_of


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


def lines_of(runs: Iterable[Run], stage: int) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """(label, colour, style, training) of each line; the colour is the run's in all pictures.

    Seven colours and four styles: no two of 28 runs look alike.
    """
    for index, run in enumerate(runs):
        of_stage = [t for t in run.training if t["stage"] == stage]
        for turn, training in enumerate(of_stage):
            where = os.path.relpath(training["folder"], run.folder)
            label = run.name if len(of_stage) == 1 else f"{run.name}: {where}"
            yield label, COLOURS[index % len(COLOURS)], STYLES[(index + turn) % len(STYLES)], training


def curve_of(training: Mapping[str, Any], key: str, beside_contrast: bool) -> list[tuple[float, float]] | None:
    """[(step, value)] of one quantity, or None; ``beside_contrast``: other lines of the panel are HACL's."""
    # Without contrast the loss that is trained is the caption loss: it belongs beside the caption losses of the others.
    if key == "loss_lm" and not training["hacl"] and beside_contrast:
        key = "loss"
    return training["curves"].get(key)


def draw_curves(series: Sequence[tuple[str, str, str, dict[str, Any]]], path: str | os.PathLike) -> None:
    """A panel for each quantity that was logged, a line for each of `lines_of`, to a PNG file."""
    plt = pyplot()
    contrast = any(t["hacl"] for *_, t in series)
    keys = [k for k in QUANTITIES if any(curve_of(t, k, contrast) for *_, t in series)]
    columns = min(4, len(keys) + 1) if len(keys) > 1 else 1
    rows = -(-(len(keys) + (len(keys) > 1)) // columns)  # a cell more, for the legend
    size = (3.1 * columns, 2.5 * rows) if columns > 1 else (7, 3.6)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, constrained_layout=True)
    handles = {}
    for axis, key in zip(axes.flat, keys):
        for label, colour, style, training in series:
            if points := curve_of(training, key, contrast):
                steps, values = zip(*points)
                marker = "o" if len(points) == 1 else None
                axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
                handles[label] = axis.plot(steps, smooth(values), style, color=colour, linewidth=1.6, marker=marker)[0]
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


def _share_like(entries):
    return all(e.get("value") is None or is_number(e["value"]) and 0 <= e["value"] <= 1 for e in entries)


def draw_evaluation(runs: Sequence[Run], tasks: Sequence[dict[str, Any]], path: str | os.PathLike) -> bool:  # noqa: C901
    """Values with intervals on the left, differences from the baseline on the right; returns whether there are any."""
    rows = []
    for task in tasks:
        for metric, values in task["metrics"].items():
            if _share_like(values.values()) and any(is_number(v.get("value")) for v in values.values()):
                rows.append((task, metric, values))
    if not rows:
        return False
    plt = pyplot()
    pairs = list(dict.fromkeys((c["a"], c["b"]) for t in tasks for c in t["comparisons"] if "metrics" in c))
    names = [r.name for r in runs]
    look = {n: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, n in enumerate(names)}
    series = sum(any(n in v for *_, v in rows) for n in names)
    height = 1.2 + 0.45 * len({t["task"] for t, *_ in rows}) + len(rows) * (0.14 + 0.11 * series)
    figure, axes = plt.subplots(
        1, 1 + bool(pairs), figsize=(10, height), sharey=True, squeeze=False, constrained_layout=True
    )
    ticks, heads, handles, place, last = [], [], {}, 0.0, None

    def mark(axis, name, y, value, interval):
        colour, marker = look[name]
        if interval and all(map(is_number, interval)):
            axis.plot(interval, (y, y), color=colour, linewidth=1.4)
        return axis.plot(value, y, marker, color=colour, markersize=4.5)[0]

    for task, metric, values in rows:
        if task is not last:
            heads.append((place + 1.3, task["task"]))
            place, last = place + 1.3, task
        place += 1
        ticks.append((place, _label(metric) + " (less is better)" * (way_of(metric) == -1)))
        gap = 0.7 / max(1, len(names))
        for i, name in enumerate(names):
            value = values.get(name, {})
            if is_number(value.get("value")):
                y = place + (i - (len(names) - 1) / 2) * gap
                handles[name] = mark(axes[0][0], name, y, value["value"], value.get("interval"))
        for i, (a, b) in enumerate(pairs):
            comparison = next((c for c in task["comparisons"] if (c["a"], c["b"]) == (a, b)), {})
            entry = comparison.get("metrics", {}).get(metric, {})
            if is_number(entry.get("difference")):
                y = place + (i - (len(pairs) - 1) / 2) * gap
                mark(axes[0][1], b, y, entry["difference"], entry.get("interval"))
    axes[0][0].set_yticks(*zip(*ticks), fontsize=8)
    axes[0][0].set_ylim(place + 0.8, 0.6)
    axes[0][0].set_xlabel("value, 95% interval", fontsize=9)
    for axis in axes.flat:
        axis.grid(axis="x", alpha=0.25)
        axis.tick_params(axis="x", labelsize=8)
        for y, _ in heads:
            axis.axhspan(y - 0.42, y + 0.42, color="#eeeeee", zorder=0.5)
        axis.tick_params(axis="y", length=0)
    for y, name in heads:
        axes[0][0].annotate(
            _label(name), (0.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=8.5, fontweight="bold"
        )
    if pairs:
        axes[0][1].axvline(0, color="black", linewidth=1)
        axes[0][1].set_xlabel(f"difference from {_label(pairs[0][0])}, paired, 95% interval", fontsize=9)
    columns = min(4, len(handles))
    figure.legend(
        handles.values(), map(_label, handles), loc="outside upper center", ncols=columns, fontsize=9, frameon=False
    )
    save(figure, path)
    return True
