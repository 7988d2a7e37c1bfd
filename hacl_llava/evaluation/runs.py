"""The runs of a report: what their folders hold, what differs between them, and whose answers differ."""

import importlib
import json
import math
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..common.files import is_number, read_json
from ..config import DataError, HaclError

TASKS = {"pope": ".pope", "chair": ".chair", "amber": ".amber", "mmhal": ".mmhal"}  # "kind" of results.json: module
QUANTITIES = {  # of a trainer's log: what its panel is called
    "loss": "loss that is trained",
    "loss_lm": "caption loss (nats a token)",
    "loss_i2t": "contrast, image to text",
    "loss_t2i": "contrast, text to image",
    "temperature": "temperature",
    "retrieval_accuracy": "caption found in its batch",
    "closer_to_true": "closer to true than hallucinated",
}
# Whether more of a metric is better (1), less is (-1); of others a report cannot say (the share of "yes", a length).
_BETTER = {
    **dict.fromkeys(("accuracy", "precision", "recall", "f1", "cover", "amber_score", "score"), 1),
    **dict.fromkeys(("chair_i", "chair_s", "chair", "hal", "cog", "hallucination_rate"), -1),
}
# Settings of an evaluation that say which model it was, and those that do not change answers; all others are flagged.
_NOT_FLAGGED = {"model", "digest", "base", "base_digest", "vision_tower", "base_url", "url"}
_NOT_FLAGGED |= {"task", "batch_size", "device", "output", "images"}


# ---- what is there


class Run(NamedTuple):
    """What was found of one run.

    ``training``: a dict for each trainer_state.json. ``tasks``: {name: {"folder", "result", "items"}} of results.json
    files, items by their id. ``analyses``: [(folder, analysis.json's content)]. ``left_out``: [(file, reason)].
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
            name, folder = Path(word).resolve().name or "run", word
        if not os.path.isdir(folder):
            raise HaclError(f"{folder or word!r}: is no folder; give NAME=FOLDER or FOLDER.")
        name = name.strip()
        if not name:
            raise HaclError(f"{word!r}: has no name before '='; give NAME=FOLDER or FOLDER.")
        if name in runs:
            raise HaclError(f"two runs are named {name!r}; give each a name of its own: NAME=FOLDER.")
        runs[name] = folder
    return list(runs.items())


def _load(path, **keys):
    """A json object that has these keys, of these types."""
    value = read_json(path, expected=dict)
    if wrong := [key for key, kind in keys.items() if not isinstance(value.get(key), kind)]:
        wrote = "hacl-llava analyze" if path.name == "analysis.json" else "hacl-llava eval"
        raise DataError(f"is not one that `{wrote}` wrote (missing or of another type: {', '.join(wrong)})")
    return value


def read_run(name: str, folder: str | os.PathLike, output: str | os.PathLike | None = None) -> Run:
    """Read what a run's folder holds, at any depth; ``checkpoint-*``, hidden folders and ``output`` are passed over.

    Returns:
        A `Run`. Files that are damaged or not finished are in ``left_out``; none of them stops the report.
    """
    run = Run(name, str(folder), [], {}, [], [])
    output = output and os.path.realpath(output)
    for place, folders, files in os.walk(folder):
        checkpoints = sum(f.startswith("checkpoint-") for f in folders)
        folders[:] = sorted(f for f in folders if not f.startswith((".", "checkpoint-")))
        folders[:] = [f for f in folders if os.path.realpath(os.path.join(place, f)) != output]
        place = Path(place)
        for file, read in (("trainer_state.json", _training), ("results.json", _task), ("analysis.json", _analysis)):
            if file in files:
                try:
                    read(run, place)
                except DataError as error:
                    run.left_out.append((str(place / file), str(error).removeprefix(f"{place / file}: ").rstrip(".")))
                except (AttributeError, KeyError, TypeError):
                    run.left_out.append((str(place / file), "holds values of other types than the commands write"))
        if "trainer_state.json" not in files and checkpoints:
            reason = f"{checkpoints} checkpoint-* but no trainer_state.json: the training is still going or stopped"
            run.left_out.append((str(place), f"has {reason}"))
        answers = [f for f in ("answers.jsonl", "items.jsonl") if f in files]
        if "results.json" not in files and answers:
            count = sum(bool(line.strip()) for line in (place / answers[0]).read_bytes().split(b"\n"))
            reason = f"has {count} answers but no results.json: the evaluation is still going or stopped"
            run.left_out.append((str(place), reason))
    return run


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
    log = [entry for entry in state.get("log_history", []) if "loss" in entry and "step" in entry]
    if not log:
        raise DataError("has no logged loss")
    curves = {k: [(e["step"], e[k] if is_number(e[k]) else math.nan) for e in log if k in e] for k in QUANTITIES}
    curves = {k: points for k, points in curves.items() if points}
    lost = {k: sum(math.isnan(v) for _, v in points) for k, points in curves.items()}
    config, contrast = config_of(folder), len(curves) > 1
    run.training.append(
        {
            "folder": str(folder),
            "stage": 1 if contrast or (config or {}).get("tune_mm_mlp_adapter") else 2,
            "hacl": contrast,
            "steps": log[-1]["step"],
            "of_steps": state.get("max_steps"),
            "epochs": state.get("epoch"),
            "batch_size": state.get("train_batch_size"),
            "learning_rate": max((e["learning_rate"] for e in log if is_number(e.get("learning_rate"))), default=None),
            "curves": curves,
            "not_finite": {k: n for k, n in lost.items() if n},
            "config": config,
        }
    )


def _task(run, folder):
    keys = {"task": str, "kind": str, "metrics": dict, "counts": dict, "settings": dict, "provenance": dict}
    result = _load(folder / "results.json", **keys)
    if result["task"] in run.tasks:
        other = run.tasks[result["task"]]["folder"]
        raise DataError(f"is a second result of {result['task']!r} (first: {other}); give it as a run of its own")
    for name, entry in result["metrics"].items():
        interval = entry.get("interval") or [None]
        known = all(map(is_number, interval))
        result["metrics"][name] = {"value": entry["value"], "interval": interval if known else None}
    items, bad, path = {}, 0, folder / "items.jsonl"
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        lines = []
        run.left_out.append((str(path), f"cannot be read ({error.strerror}): no paired comparison, no gallery"))
    for line in filter(bytes.strip, lines):
        try:
            item = json.loads(line)
            # one run's ids may be numbers, another's words
            item.update({k: str(item[k]) for k in ("id", "image", "question", "answer") if item.get(k) is not None})
            if not all(map(is_number, (item.get("counts") or {}).values())):
                raise ValueError("counts are no numbers")
            items[item["id"]] = item
        except (ValueError, KeyError, AttributeError):
            bad += 1
    if bad:
        run.left_out.append((str(path), f"{bad} of its lines are no whole item (damaged, or half a last line)"))
    run.tasks[result["task"]] = {"folder": str(folder), "result": result, "items": items}


def _analysis(run, folder):
    keys = {
        "models": {"name", "spaces"},
        "comparisons": {"first", "second", "spaces"},
        "findings": {"title", "lines"},
        "figures": {"file", "title"},
    }
    analysis = _load(folder / "analysis.json", **dict.fromkeys(keys, list))
    wrong = [part for part, names in keys.items() for x in analysis[part] if not isinstance(x, dict) or names - set(x)]
    if wrong:
        raise DataError(f"is of another version of `hacl-llava analyze` (its {wrong[0]}); run that again")
    run.analyses.append((str(folder), analysis))


# ---- what differs


def settings_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """What an evaluation says of its settings, and of the judge where there is one, flat: {"judge.name": ...}."""

    def flat(value, name):
        if not isinstance(value, dict):
            return {name: value}
        return {k: v for key, x in value.items() for k, v in flat(x, f"{name}.{key}" if name else key).items()}

    return flat({**result["settings"], **({"judge": result["judge"]} if "judge" in result else {})}, "")


def tasks_of(runs: Iterable[Run]) -> list[str]:
    """Names of all tasks, in the order in which the runs have them."""
    return list(dict.fromkeys(t for run in runs for t in run.tasks))


def differing_settings(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Settings of one task's evaluations that are not the same in all runs, and neither harmless nor the model's.

    Returns:
        [{"task", "setting", "values": {run: value}}].
    """
    found = []
    for task in tasks_of(runs):
        settings = {r.name: settings_of(r.tasks[task]["result"]) for r in runs if task in r.tasks}
        for key in sorted({k for s in settings.values() for k in s}):
            # an endpoint has no template of its own
            of = {n: s for n, s in settings.items() if key in s or not str(s.get("model")).startswith("api:")}
            values = {name: s.get(key, "not recorded") for name, s in of.items()}
            differ = len({json.dumps(v, sort_keys=True) for v in values.values()}) > 1
            if differ and not set(key.split(".")) & _NOT_FLAGGED:
                found.append({"task": task, "setting": key, "values": values})
    return found


def _scored(a, b, task):
    """The scored items of both runs, and the ids of those that are the same question in both."""
    all_a, all_b = ({k: x for k, x in run.tasks[task]["items"].items() if x.get("counts")} for run in (a, b))

    def asked(item):
        return item.get("image"), item.get("label")

    return all_a, all_b, [k for k in all_a if k in all_b and asked(all_a[k]) == asked(all_b[k])]


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

    all_a, all_b, common = _scored(a, b, task)
    items_a, items_b = ([items[k] for k in common] for items in (all_a, all_b))
    comparison = {
        "a": a.name,
        "b": b.name,
        "questions": len(common),
        "only_a": len(all_a) - len(common),
        "only_b": len(all_b) - len(common),
        "other_question": sum(k in all_b for k in all_a) - len(common),
        "other_words": sum(x.get("question") != y.get("question") for x, y in zip(items_a, items_b)),
        "same_answers": sum(x.get("answer") == y.get("answer") for x, y in zip(items_a, items_b)),
    }
    results = [run.tasks[task]["result"] for run in (a, b)]
    kinds = {result["kind"] for result in results}
    if len(kinds) > 1 or not kinds <= set(TASKS):
        return {**comparison, "problem": f"the kind of task is {' and '.join(sorted(kinds))}; known: {list(TASKS)}"}
    if not common:
        return {**comparison, "problem": "no question that both answered"}
    every = importlib.import_module(TASKS[kinds.pop()], __package__).METRICS
    metrics = {n: f for n, f in every.items() if all(n in result["metrics"] for result in results)}
    sums = [statistics.totals(items) for items in (items_a, items_b)]
    paired = statistics.paired(metrics, items_b, items_a, seed=seed)  # the first minus the second
    comparison["metrics"] = {
        n: {"a": float(f(sums[0])), "b": float(f(sums[1])), **paired[n]} for n, f in metrics.items()
    }
    if any("correct" in x["counts"] and "correct" in y["counts"] for x, y in zip(items_a, items_b)):
        split = dict(zip(("both", "only_a", "only_b", "neither"), statistics.correct_pairs(items_a, items_b)))
        comparison["mcnemar"] = {**split, "p": float(statistics.mcnemar(split["only_a"], split["only_b"]))}
    return comparison


def way_of(metric: str) -> int:
    """1 where more of a metric is better, -1 where less is, 0 where neither; of its kinds (``existence_f1``) alike."""
    ways = {_BETTER[n] for n in _BETTER if metric == n or metric.startswith(f"{n}_") or metric.endswith(f"_{n}")}
    return _BETTER.get(metric) or (ways.pop() if len(ways) == 1 else 0)


def verdict_of(metric: str, entry: Mapping[str, Any]) -> str | None:
    """``improved``, ``worse``, ``changed``, ``unclear``; None where it is undefined."""
    low, high = entry["interval"]
    if not all(map(is_number, (low, high, entry["difference"]))):
        return None
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
    pools = {"Questions with a label": [], "Captions and free answers (right: nothing hallucinated)": [], "": []}
    labelled, described, unjudged = pools.values()
    asked = set()
    for task in tasks:
        all_a, all_b, common = _scored(a, b, task)
        for item, other in ((all_a[key], all_b[key]) for key in sorted(common)):
            right = [x["counts"].get("correct") for x in (item, other)]
            judged, same = None not in right, item.get("answer") == other.get("answer")
            name = (item.get("image"), item.get("question"))
            if same or judged and bool(right[0]) == bool(right[1]) or name in asked:
                continue
            asked.add(name)
            entry = {"task": task} | {k: item[k] for k in ("id", "image", "question", "label") if k in item}
            entry["answers"] = {a.name: item.get("answer"), b.name: other.get("answer")}
            if judged:
                entry["right"] = a.name if right[0] else b.name
            facts = {a.name: _facts(item), b.name: _facts(other)}
            if item.get("question") != other.get("question"):
                facts[b.name] = {"asked in other words": str(other.get("question")), **facts[b.name]}
            entry["facts"] = {k: v for k, v in facts.items() if v}
            (unjudged if not judged else labelled if "label" in item else described).append(entry)
    rng, drawn = random.Random(f"gallery {seed}"), []
    for what, pool in pools.items():
        if not pool:
            continue
        if what:
            sides = {name: [e for e in pool if e["right"] == name] for name in (a.name, b.name)}
            chosen = {name: rng.sample(side, min(-(-size // 2), len(side))) for name, side in sides.items()}
            counts = " and ".join(f"{len(chosen[n])} of the {len(sides[n])} that only {n} got right" for n in sides)
            how = f"{what}: drawn at random (seed {seed}), not chosen, as many of each side as there are: {counts}."
            drawn.append((how, sum(chosen.values(), [])))
        else:
            entries = rng.sample(pool, min(size, len(pool)))
            how = f"Answers that are neither right nor wrong: {len(entries)} of the {len(pool)} whose texts differ"
            drawn.append((f"{how}, drawn at random (seed {seed}), not chosen.", entries))
    return drawn


def _facts(item):
    """What a score says for people to read: the words that hallucinate, the judge's rating and its words."""
    facts = {k: item[k] for k in ("hallucinated", "rating", "judgement") if item.get(k) not in (None, [], "")}
    if "hallucinated" in facts:  # words, or pairs of a word and what it was taken for
        pairs = [p if isinstance(p, list) else [p, p] for p in facts["hallucinated"]]
        facts["hallucinated"] = list(dict.fromkeys(w if w == c else f"{w} ({c})" for w, c in pairs))
    return facts
