"""The runs of a report: what their folders hold, what differs between them, and whose answers differ."""

import importlib
import json
import math
import os
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..common.files import read_json
from ..config import DataError, HaclError

_TASKS = {"pope": ".pope", "chair": ".chair", "amber": ".amber", "mmhal": ".mmhal"}  # "kind" of results.json: module
QUANTITIES = {  # of a trainer's log: what its panel is called
    "loss": "loss that is trained",
    "loss_lm": "caption loss (nats a token)",
    "loss_i2t": "contrast, image to text",
    "loss_t2i": "contrast, text to image",
    "temperature": "temperature",
    "retrieval_accuracy": "caption found in its batch",
    "closer_to_true": "closer to true than hallucinated",
}
_CONTRAST = tuple(QUANTITIES)[1:]
# Whether more of a metric is better (1), less is (-1); of others a report cannot say (the share of "yes", a length).
_BETTER = {
    **dict.fromkeys(("accuracy", "precision", "recall", "f1", "cover", "amber_score", "score"), 1),
    **dict.fromkeys(("chair_i", "chair_s", "chair", "hal", "cog", "hallucination_rate"), -1),
}
# Settings of an evaluation that say which model it was, and those that do not change answers; all others are flagged.
_MODEL = ("model", "digest", "base", "base_digest", "vision_tower", "base_url", "url")
_HARMLESS = ("task", "batch_size", "device", "output", "images")


# ---- what is there


class Run(NamedTuple):
    """What was found of one run.

    ``training``: a dict for each trainer_state.json. ``tasks``: {name: {"result", "items"}} of results.json files,
    items by their id. ``analyses``: [(folder, analysis.json's content)]. ``left_out``: [(file, reason)].
    """

    name: str
    folder: str
    training: list
    tasks: dict
    analyses: list
    left_out: list


def parse_runs(words: Iterable[str]) -> list[tuple[str, str]]:
    """``NAME=FOLDER`` or ``FOLDER`` to [(name, folder)].

    Raises:
        HaclError: no such folder, an empty name, or a name given twice.
    """
    runs = {}
    for word in words:
        name, equals, folder = word.partition("=")
        if not equals or os.path.isdir(word):
            name, folder = "", word
        if not os.path.isdir(folder):
            raise HaclError(f"{folder or word!r}: is no folder; give NAME=FOLDER or FOLDER.")
        name = printable(name if name or not equals or os.path.isdir(word) else " ").strip()
        if not name and folder != word:
            raise HaclError(f"{word!r}: has no name before '='; give NAME=FOLDER or FOLDER.")
        name = name or printable(Path(folder).resolve().name) or "run"
        if name in runs:
            raise HaclError(f"two runs are named {name!r}; give each a name of its own: NAME=FOLDER.")
        runs[name] = folder
    return list(runs.items())


def printable(value: Any) -> Any:
    """Strings of a json value without what neither a file nor a page can hold: surrogates, control characters."""
    if isinstance(value, str):
        value = value.encode("utf-8", "replace").decode()
        return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe\uffff]", "\ufffd", value)
    if isinstance(value, dict):
        return {printable(k): printable(v) for k, v in value.items()}
    return [printable(v) for v in value] if isinstance(value, list) else value


def _load(path):
    return printable(read_json(path, expected=dict))


def read_run(name: str, folder: str | os.PathLike, output: str | os.PathLike | None = None) -> Run:
    """Read what a run's folder holds, at any depth; ``checkpoint-*``, hidden folders and ``output`` are passed over.

    Returns:
        A `Run`. Files that are damaged or not finished are in ``left_out``; none of them stops the report.
    """
    run = Run(name, str(folder), [], {}, [], [])
    output = output and os.path.realpath(output)
    for place, folders, files in os.walk(folder):
        steps = [f for f in folders if f.startswith("checkpoint-")]
        folders[:] = sorted(
            f
            for f in folders
            if not f.startswith((".", "checkpoint-")) and os.path.realpath(os.path.join(place, f)) != output
        )
        place = Path(place)
        for file, read in (("trainer_state.json", _training), ("results.json", _task), ("analysis.json", _analysis)):
            if file in files:
                try:
                    read(run, place)
                except DataError as error:
                    run.left_out.append((str(place / file), str(error).removeprefix(f"{place / file}: ").rstrip(".")))
        if "trainer_state.json" not in files and steps:
            reason = f"has {len(steps)} checkpoint-* but no trainer_state.json: the training is still going or stopped"
            run.left_out.append((str(place), reason))
        if "results.json" not in files and {"answers.jsonl", "items.jsonl"} & set(files):
            count = _lines(place / "answers.jsonl") if "answers.jsonl" in files else _lines(place / "items.jsonl")
            reason = f"has {count} answers but no results.json: the evaluation is still going or stopped"
            run.left_out.append((str(place), reason))
    return run


def _lines(path):
    with open(path, "rb") as file:
        return sum(1 for line in file if line.strip())


def config_of(folder: Path) -> dict[str, Any] | None:
    """What a checkpoint's config.json says of HACL and LLaVA, or None where it cannot be read."""
    try:
        config = _load(folder / "config.json")
    except DataError:
        return None
    names = ("hacl", "tune_mm_mlp_adapter", "mm_projector_type", "mm_vision_tower", "model_type", "hidden_size")
    return {n: config[n] for n in names if n in config}


def _training(run, folder):
    state = _load(folder / "trainer_state.json")
    log = [
        e for e in list_of(state.get("log_history")) if isinstance(e, dict) and "loss" in e and is_number(e.get("step"))
    ]
    if not log:
        raise DataError("has no logged loss")
    curves, bad = {}, {}
    for key in QUANTITIES:
        points = [(e["step"], e[key] if is_number(e[key]) else math.nan) for e in log if key in e]
        if points:
            curves[key] = points
        if lost := sum(math.isnan(v) for _, v in points):
            bad[key] = lost
    config, contrast = config_of(folder), any(k in curves for k in _CONTRAST)
    stage = 1 if contrast or (config or {}).get("tune_mm_mlp_adapter") else 2
    run.training.append(
        {
            "folder": str(folder),
            "stage": stage,
            "hacl": contrast,
            "steps": log[-1]["step"],
            "of_steps": state.get("max_steps"),
            "epochs": state.get("epoch"),
            "batch_size": state.get("train_batch_size"),
            "learning_rate": max((e["learning_rate"] for e in log if is_number(e.get("learning_rate"))), default=None),
            "curves": curves,
            "not_finite": bad,
            "config": config,
        }
    )


def _task(run, folder):
    result = _load(folder / "results.json")
    if not all(isinstance(result.get(k), t) for k, t in (("task", str), ("kind", str), ("metrics", dict))):
        raise DataError("is not one that `hacl-llava eval` wrote (no task, kind and metrics)")
    if result["task"] in run.tasks:
        other = run.tasks[result["task"]]["folder"]
        raise DataError(f"is a second result of {result['task']!r} (first: {other}); give it as a run of its own")
    result["metrics"] = {name: figure_of(entry) for name, entry in result["metrics"].items()}
    result["counts"] = {k: v for k, v in dict_of(result.get("counts")).items() if is_number(v)}
    items, path = {}, folder / "items.jsonl"
    bad = twice = 0
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        lines = []
        run.left_out.append((str(path), f"cannot be read ({error.strerror}): no paired comparison, no gallery"))
    for line in lines:
        if not line.strip():
            continue
        try:
            item = printable(json.loads(line))
            identity, counts = str(item["id"]), item.get("counts")
            item["id"] = identity  # one run's may be numbers, another's words
            item.update({k: str(item[k]) for k in ("image", "question", "answer") if item.get(k) is not None})
            if counts is not None and not all(is_number(v) for v in counts.values()):
                raise ValueError("counts are no numbers")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            bad += 1
            continue
        twice += identity in items
        items[identity] = item
    if bad:
        run.left_out.append((str(path), f"{bad} of its lines are no whole item (damaged, or half a last line)"))
    if twice:
        run.left_out.append((str(path), f"{twice} items stand there twice; the last of each is used"))
    run.tasks[result["task"]] = {"folder": str(folder), "result": result, "items": items}


def figure_of(entry: Any, key: str = "value") -> dict[str, Any]:
    """{key: a number or None, "interval": [low, high] or None} of what a file has for a figure."""
    entry = entry if isinstance(entry, dict) else {key: entry}
    value, interval = entry.get(key), entry.get("interval")
    whole = isinstance(interval, list) and len(interval) == 2 and all(map(is_number, interval))
    return {key: value if is_number(value) else None, "interval": interval if whole else None}


def _analysis(run, folder):
    analysis = _load(folder / "analysis.json")
    if not isinstance(analysis.get("models"), list) or not all(isinstance(m, dict) for m in analysis["models"]):
        raise DataError("is not one that `hacl-llava analyze` wrote (no list of models)")
    run.analyses.append((str(folder), analysis))


def is_number(value: Any) -> bool:
    """Whether a json value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# ---- what differs


def _flat(value, prefix=""):
    if not isinstance(value, dict):
        return {prefix: value}
    flat = {}
    for key, inner in value.items():
        flat.update(_flat(inner, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def settings_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """What an evaluation says of its settings, and of the judge where there is one, flat: {"judge.name": ...}."""
    return _flat({**dict_of(result.get("settings")), **({"judge": result["judge"]} if "judge" in result else {})})


def list_of(value: Any) -> list:
    """The value if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def dict_of(value: Any) -> dict:
    """The value if it is a dict, else an empty one: for files that hold something else."""
    return value if isinstance(value, dict) else {}


def differing_settings(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Settings of one task's evaluations that are not the same in all runs, and neither harmless nor the model's.

    Returns:
        [{"task", "setting", "values": {run: value}}].
    """
    found = []
    for task in tasks_of(runs):
        settings = {r.name: settings_of(r.tasks[task]["result"]) for r in runs if task in r.tasks}
        for key in sorted({k for s in settings.values() for k in s}):
            if set(key.split(".")) & set(_MODEL + _HARMLESS):
                continue
            # an endpoint has no template of its own
            of = {n: s for n, s in settings.items() if key in s or not str(s.get("model")).startswith("api:")}
            values = {name: s.get(key, "not recorded") for name, s in of.items()}
            if len({json.dumps(v, sort_keys=True) for v in values.values()}) > 1:
                found.append({"task": task, "setting": key, "values": values})
    return found


def tasks_of(runs: Iterable[Run]) -> list[str]:
    """Names of all tasks, in the order in which the runs have them."""
    return list(dict.fromkeys(t for run in runs for t in run.tasks))


def _scored(items):
    return {k: v for k, v in items.items() if v.get("counts")}


def _same_question(a, b):
    return a.get("image") == b.get("image") and a.get("label") == b.get("label")


def compare(a: Run, b: Run, task: str, seed: int = 0) -> dict[str, Any]:
    """The paired comparison of two runs in one task, over the questions that both answered.

    Args:
        a, b: `Run`; differences are ``b`` minus ``a``. task: its name in both. seed: of the bootstrap.

    Returns:
        A dict: ``questions`` (common), ``only_a``, ``only_b``, ``other_question`` (same id, other image or label: not
        compared), ``metrics`` {name: {"a", "b", "difference", "interval"}} and, where items are right or wrong,
        ``mcnemar`` {"both", "only_a", "only_b", "neither", "p"}; with ``problem`` in place of metrics where none can
        be made.
    """
    from ..common import statistics

    all_a, all_b = (_scored(run.tasks[task]["items"]) for run in (a, b))
    common = [k for k in all_a if k in all_b and _same_question(all_a[k], all_b[k])]
    comparison = {
        "a": a.name,
        "b": b.name,
        "questions": len(common),
        "only_a": len(all_a) - len(common),
        "only_b": len(all_b) - len(common),
        "other_question": sum(k in all_b for k in all_a) - len(common),
        "other_words": sum(all_a[k].get("question") != all_b[k].get("question") for k in common),
        "same_answers": sum(all_a[k].get("answer") == all_b[k].get("answer") for k in common),
    }
    kinds = {run.tasks[task]["result"]["kind"] for run in (a, b)}
    if len(kinds) > 1 or not kinds <= set(_TASKS):
        return {**comparison, "problem": f"the kind of task is {' and '.join(sorted(kinds))}; known: {list(_TASKS)}"}
    if not common:
        return {**comparison, "problem": "no question that both answered"}
    every = importlib.import_module(_TASKS[kinds.pop()], __package__).METRICS
    named = [run.tasks[task]["result"]["metrics"] for run in (a, b)]
    metrics = {n: f for n, f in every.items() if all(n in m for m in named)}
    items_a, items_b = ([items[k] for k in common] for items in (all_a, all_b))
    totals = [statistics.totals(items) for items in (items_a, items_b)]
    values = [{n: float(metric(sums)) for n, metric in metrics.items()} for sums in totals]
    paired = statistics.paired(metrics, items_b, items_a, seed=seed)  # the first minus the second
    comparison["metrics"] = {n: {"a": values[0][n], "b": values[1][n], **paired[n]} for n in metrics}
    if any("correct" in x["counts"] and "correct" in y["counts"] for x, y in zip(items_a, items_b)):
        both, only_a, only_b, neither = map(int, statistics.correct_pairs(items_a, items_b))
        p = float(statistics.mcnemar(only_a, only_b))
        comparison["mcnemar"] = {"both": both, "only_a": only_a, "only_b": only_b, "neither": neither, "p": p}
    return comparison


def way_of(metric: str) -> int:
    """1 where more of a metric is better, -1 where less is, 0 where neither; of its kinds (``existence_f1``) alike."""
    ways = {_BETTER[n] for n in _BETTER if metric == n or metric.startswith(f"{n}_") or metric.endswith(f"_{n}")}
    return _BETTER.get(metric) or (ways.pop() if len(ways) == 1 else 0)


def verdict_of(metric: str, entry: Mapping[str, Any]) -> str | None:
    """``improved``, ``worse``, ``changed``, ``unclear``; None where it is undefined."""
    interval = entry.get("interval") or ()
    if len(interval) != 2 or not all(map(is_number, (*interval, entry.get("difference")))):
        return None
    low, high = interval
    if low <= 0 <= high:
        return "unclear"
    better = way_of(metric)
    return "changed" if not better else "improved" if (low > 0) == (better > 0) else "worse"


# ---- the gallery


def draw_gallery(
    a: Run, b: Run, tasks: Iterable[str], size: int, seed: int = 0
) -> list[tuple[str, list[dict[str, Any]]]]:
    """Questions that the runs ``a`` and ``b`` answered differently, drawn at random.

    Of those that exactly one of the two got right, up to half of ``size`` of each side: once among questions with a
    label, once among captions and free answers (right: nothing hallucinated). Of items that are neither right nor wrong
    up to ``size`` whose texts differ. A question that several tasks ask counts once.

    Returns:
        A list of (how it was drawn, in words, and from how many; entries).
    """
    pools, asked = {"labelled": [], "described": [], "unjudged": []}, set()
    for task in tasks:
        all_a, all_b = (_scored(run.tasks[task]["items"]) for run in (a, b))
        for key in sorted(all_a):
            item, other = all_a[key], all_b.get(key)
            if other is None or not _same_question(item, other):
                continue
            judged = ["correct" in x["counts"] for x in (item, other)]
            right = [bool(x["counts"].get("correct")) for x in (item, other)]
            name = (item.get("image"), item.get("question"))
            if item.get("answer") == other.get("answer") or all(judged) and right[0] == right[1] or name in asked:
                continue
            asked.add(name)
            entry = {"task": task, "id": key} | {k: item[k] for k in ("image", "question", "label") if k in item}
            entry["answers"] = {a.name: item.get("answer"), b.name: other.get("answer")}
            if all(judged):
                entry["right"] = a.name if right[0] else b.name
            facts = {run.name: _facts(x) for run, x in ((a, item), (b, other))}
            if item.get("question") != other.get("question"):
                facts[b.name] = {"asked in other words": str(other.get("question")), **facts[b.name]}
            entry["facts"] = {k: v for k, v in facts.items() if v}
            pools["unjudged" if not all(judged) else "labelled" if "label" in item else "described"].append(entry)
    rng, drawn = random.Random(f"gallery {seed}"), []
    for kind, what in (
        ("labelled", "Questions with a label"),
        ("described", "Captions and free answers (right: nothing hallucinated)"),
    ):
        sides = {name: [e for e in pools[kind] if e["right"] == name] for name in (a.name, b.name)}
        chosen = {name: rng.sample(pool, min(-(-size // 2), len(pool))) for name, pool in sides.items()}
        counts = " and ".join(f"{len(chosen[n])} of the {len(sides[n])} that only {n} got right" for n in sides)
        if pools[kind]:
            how = f"{what}: drawn at random (seed {seed}), not chosen, as many of each side as there are: {counts}."
            drawn.append((how, [entry for name in chosen for entry in chosen[name]]))
    if pool := pools["unjudged"]:
        entries = rng.sample(pool, min(size, len(pool)))
        how = f"Answers that are neither right nor wrong: {len(entries)} of the {len(pool)} whose texts differ"
        drawn.append((f"{how}, drawn at random (seed {seed}), not chosen.", entries))
    return drawn


def _facts(item):
    """What a score says for people to read: the words that hallucinate, the judge's rating and its words."""
    facts = {k: item[k] for k in ("hallucinated", "rating", "judgement") if item.get(k) not in (None, [], "")}
    if isinstance(facts.get("hallucinated"), list):  # words, or pairs of a word and what it was taken for
        pairs = [p if isinstance(p, list) and len(p) == 2 else [p, p] for p in facts["hallucinated"]]
        facts["hallucinated"] = list(dict.fromkeys(str(w) if w == c else f"{w} ({c})" for w, c in pairs))
    return facts
