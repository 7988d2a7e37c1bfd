"""The two pictures of a report: training curves, and metrics with their differences."""

import math
import os
from collections.abc import Sequence
from typing import Any

from ..common.files import is_number
from ..common.report import COLOURS, STYLES, dots, plain, pyplot, save, shorten
from .runs import QUANTITIES, Run, way_of


def _label(text):
    return plain(" ".join(shorten(text, 40).split()))


def smooth(values: Sequence[float]) -> list[float]:
    """Means over the twelfth of the values (at most 100) around each; nan stays nan.

    Centred, so that a curve that falls is not drawn later than it fell, and over as few on both sides at the start,
    where curves fall the most; at the end over those that are there.
    """
    import numpy as np

    reach = [min(50, len(values) // 24, i) for i in range(len(values))]
    near = (values[i - k : i + k + 1] for i, k in enumerate(reach))
    return [x if math.isnan(x) else float(np.nanmean(window)) for x, window in zip(values, near)]


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
    keys = [k for k in QUANTITIES if any(k in x["curves"] for x in lines)]
    columns = min(4, len(keys))
    size = {"figsize": (max(7, 3.1 * columns), 0.6 + 2.5 * -(-len(keys) // columns)), "squeeze": False}
    figure, axes = pyplot().subplots(-(-len(keys) // columns), columns, layout="constrained", **size)
    handles = {}
    for axis in axes.flat[len(keys) :]:
        axis.axis("off")
    for axis, key in zip(axes.flat, keys):
        for line in (x for x in lines if key in x["curves"]):
            steps, values = zip(*line["curves"][key])
            look = {**line["look"], "marker": "o" if len(steps) == 1 else None}
            axis.plot(steps, values, color=look["color"], alpha=0.25, linewidth=0.8)
            handles[line["line"]] = axis.plot(steps, smooth(values), linewidth=1.6, **look)[0]
        axis.set_title(QUANTITIES[key], fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.margins(x=0.02)
    _legend(figure, handles, handlelength=3)
    save(figure, path)


def _legend(figure, handles, **look):
    look |= {"ncols": min(4, len(handles)), "fontsize": 9, "frameon": False}
    figure.legend(handles.values(), map(_label, handles), loc="outside upper center", **look)


def draw_evaluation(runs: Sequence[Run], tasks: Sequence[dict[str, Any]], path: str | os.PathLike) -> bool:
    """Values with intervals on the left, differences from the baseline on the right; returns whether there are any."""
    shown = {}  # name: (task, its metrics that are shares)
    for task in tasks:
        values = {m: [x["value"] for x in of.values() if is_number(x["value"])] for m, of in task["metrics"].items()}
        if metrics := [m for m, found in values.items() if found and 0 <= min(found) and max(found) <= 1]:
            shown[task["task"]] = task, metrics
    if not shown:
        return False
    made = [c for task, _ in shown.values() for c in task["comparisons"] if "metrics" in c]
    rows = [len(metrics) for _, metrics in shown.values()]
    size = {"figsize": (10, 1 + 0.5 * len(rows) + sum(rows) * (0.14 + 0.11 * len(runs))), "squeeze": False}
    size |= {"sharex": "col", "sharey": "row", "height_ratios": rows, "layout": "constrained"}
    figure, axes = pyplot().subplots(len(rows), 1 + bool(made), **size)
    handles = {}
    for row, (task, metrics) in zip(axes, shown.values()):
        compared = {c["b"]: c["metrics"] for c in task["comparisons"] if "metrics" in c}
        values = {r.name: {m: of[r.name] for m, of in task["metrics"].items() if r.name in of} for r in runs}
        handles |= dots(row[0], metrics, values)
        if made:
            dots(row[-1], metrics, {r.name: compared.get(r.name, {}) for r in runs}, "difference")
            row[-1].axvline(0, color="black", linewidth=1)
        labels = [_label(m) + " (less is better)" * (way_of(m) == -1) for m in metrics]
        row[0].set_yticks(range(len(metrics)), labels, fontsize=8)
        row[0].set_title(_label(task["task"]), loc="left", fontsize=8.5, fontweight="bold")
    for axis in axes.flat:
        axis.tick_params(axis="x", labelsize=8)
    axes[-1][0].set_xlabel("value, 95% interval", fontsize=9)
    if made:
        low, high = axes[-1][1].get_xlim()
        axes[-1][1].set_xlim(min(low, -0.02), max(high, 0.02))  # where all are equal, rounding is not to fill the panel
        axes[-1][1].set_xlabel(f"difference from {_label(made[0]['a'])}, paired, 95% interval", fontsize=9)
    _legend(figure, handles)
    save(figure, path)
    return True
