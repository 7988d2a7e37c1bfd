"""``hacl-llava report``: one page that puts runs side by side: training, evaluation, representations, answers.

What is found below the folders is read, never changed: trainer_state.json of training, results.json and items.jsonl of
``hacl-llava eval``, analysis.json of ``hacl-llava analyze``. The same page is written as report.html (everything
inside), report.md (pictures beside it) and report.json (its numbers).
"""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..common.files import write_bytes, write_json, write_text
from ..common.images import image_file
from ..common.report import Card, as_html, as_markdown, as_words, provenance, pyplot, shorten, thumbnail
from ..config import HaclError
from .charts import curve_of, draw_curves, draw_evaluation, lines_of
from .runs import (
    QUANTITIES,
    Run,
    compare,
    config_of,
    dict_of,
    differing_settings,
    draw_gallery,
    figure_of,
    is_number,
    list_of,
    parse_runs,
    printable,
    read_run,
    settings_of,
    tasks_of,
    verdict_of,
)

_COUNTS = ("questions", "scored", "failed", "unclear")  # of results.json, for people; the others are sums of scores
_TRADED = ("precision", "recall")  # of yes/no questions: saying yes, or no, more often buys one with the other
_LONGEST = 1500  # characters of an answer that are shown
_SMALL = 1000  # questions below which a comparison is called small


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give an argparse parser the command's arguments."""
    add = parser.add_argument
    add("runs", metavar="NAME=FOLDER", nargs="+", help="a run's folder, searched to any depth; FOLDER: named after it")
    add("--output", metavar="OUT", required=True, help="folder for report.html, report.md, report.json and pictures")
    add("--baseline", metavar="NAME", help="the run that the others are compared with (default: the first)")
    add("--gallery", type=int, default=12, metavar="N", help="images shown of each comparison (default: %(default)s)")
    add("--images", metavar="DIR", help="where images lie now, in place of the folder that the evaluation names")
    add("--title", metavar="TEXT", help="heading of the page (default: the names of the runs)")
    add("--seed", type=int, default=0, help="of intervals and of the gallery's sample (default: %(default)s)")


# ---- words for numbers


def _value(value, digits=3):
    return f"{value:.{digits}f}" if is_number(value) else "undefined"


def _interval(entry, key="value", sign=""):
    if not is_number(entry.get(key)):
        return "undefined"
    text = f"{entry[key]:{sign}.3f}"
    bounds = entry.get("interval") or ()
    if len(bounds) == 2 and all(map(is_number, bounds)):
        text += " [{:{s}.3f}, {:{s}.3f}]".format(*bounds, s=sign)
    return text


def _p(value):
    return "< 0.0001" if value < 0.0001 else f"{value:.4f}"


def _count(number, thing):
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _unlikely_alone(comparison):
    """Whether McNemar's p, adjusted for the number of tests, leaves the difference in accuracy open."""
    return "mcnemar" in comparison and comparison["mcnemar"]["p_holm"] >= 0.05


def summarise(tasks: Sequence[dict[str, Any]], runs: Sequence[Run], baseline: Run) -> dict[str, Any]:  # noqa: C901
    """Plain sentences from the numbers.

    Returns:
        {"pairs": [{"a", "b", "improved": [...], "worse", "changed", "unclear", "not_compared"}], "cautions": [...]}; an
        entry of a list is a sentence about one task.
    """
    pairs, cautions, intervals = {}, [], 0
    for task in tasks:
        for c in task["comparisons"]:
            pair = pairs.setdefault((c["a"], c["b"]), {verdict: [] for verdict in _VERDICTS})
            said = {verdict: [] for verdict in pair}
            if c["questions"] and c["same_answers"] == c["questions"]:
                said["unclear"].append("all answers are the same")
            if "problem" in c:
                said["not_compared"].append(c["problem"])
            for metric, entry in c.get("metrics", {}).items():
                verdict = verdict_of(metric, entry)
                if not is_number(entry["difference"]) or list(entry["interval"]) == [0, 0]:
                    continue  # undefined, or the same in every sample
                intervals += 1
                words = f"{metric} {_value(entry['a'])} to {_value(entry['b'])} ({_interval(entry, 'difference', '+')})"
                if verdict is None:
                    words, verdict = f"{words}, too few images for an interval", "unclear"
                elif verdict == "unclear":
                    words = f"{metric} ({_interval(entry, 'difference', '+')})"
                if task["kind"] in ("pope", "amber") and metric.endswith(_TRADED) and verdict in ("improved", "worse"):
                    verdict = "changed"
                if metric == "accuracy" and verdict in ("improved", "worse") and _unlikely_alone(c):
                    words += f", but McNemar's p is {_p(c['mcnemar']['p_holm'])} (adjusted)"
                    verdict = "unclear"
                said[verdict].append(words)
            if c.get("metrics") and not any(said.values()):
                said["unclear"].append("every figure is the same")
            for verdict, words in said.items():
                if words:
                    pair[verdict].append(f"{task['task']}: {'; '.join(words)}")
    compared = [c["questions"] for t in tasks for c in t["comparisons"] if "metrics" in c]
    counted = [t["counts"][r].get("scored", t["counts"][r].get("questions")) for t in tasks for r in t["counts"]]
    smallest = min(compared or [n for n in counted if is_number(n)], default=None)
    if smallest is not None and smallest < _SMALL:
        cautions.append(
            f"Small samples: the smallest has {_count(smallest, 'question')}. Figures of a miniature or of a few "
            "hundred questions say little about full-size models and other images."
        )
    failed = [(n, sum(t["counts"].get(n, {}).get("failed") or 0 for t in tasks)) for n in (r.name for r in runs)]
    if any(count for _, count in failed):
        words = ", ".join(f"{count} of {name}" for name, count in failed if count)
        cautions.append(f"Questions that failed (no image, no answer, no verdict) are in no figure: {words}.")
    if pairs and (differ := dict.fromkeys(d["setting"] for d in differing_settings(runs))):
        cautions.append(f"Settings differ between the evaluations, and may be why figures do: {', '.join(differ)}.")
    if pairs:
        cautions.append(
            "Each run is one training with one seed; the intervals are about which images were asked about, not about "
            "what another training would give."
        )
    if intervals > 1:
        cautions.append(
            f"{intervals} differences were looked at. Were there none at all, about 1 in 20 of the 95% intervals would "
            "leave 0 out all the same, and metrics of the same answers go together."
        )
    for run in runs:
        if run.name != baseline.name:
            if run.tasks and baseline.tasks and not set(run.tasks) & set(baseline.tasks):
                cautions.append(f"{run.name} has no task in common with {baseline.name}: nothing is compared.")
            for task in run.tasks:
                models = [_identity(r.tasks[task]["result"]) for r in (baseline, run) if task in r.tasks]
                if len(models) == 2 and models[0] == models[1] and any(models[0]):
                    cautions.append(f"{baseline.name} and {run.name}: {task} was answered by the same model.")
                    break
    return {"pairs": [{"a": a, "b": b, **said} for (a, b), said in pairs.items()], "cautions": cautions}


def _identity(result):
    settings = dict_of(result.get("settings"))
    return [result.get("model"), *(settings.get(k) for k in ("model", "digest", "base", "base_digest", "vision_tower"))]


# ---- the page


def _about(runs):
    """The table of what was compared: (property, its value in each run), properties nobody has left out."""
    rows = []

    def row(name, values):
        if any(v not in (None, "") for v in values):
            rows.append((name, *("-" if v in (None, "") else v for v in values)))

    results = [[t["result"] for t in run.tasks.values()] for run in runs]
    row("folder", [r.folder for r in runs])
    for stage in (1, 2):
        words = [[_training_words(t, r) for t in r.training if t["stage"] == stage] for r in runs]
        row(f"training, stage {stage}", ["\n".join(w) for w in words])
    row("HACL settings", ["\n".join(dict.fromkeys(_hacl_words(run))) for run in runs])
    row("model", ["\n".join(dict.fromkeys(str(x["model"]) for x in rs if x.get("model"))) for rs in results])
    settings = [[settings_of(x) for x in rs] for rs in results]
    for name in sorted({k for ss in settings for s in ss for k in s} - {"task"}):
        values = [dict.fromkeys(as_words(s[name]) for s in ss if s.get(name) is not None) for ss in settings]
        named = "settings: model" if name == "model" else name
        row(named, [f"{len(v)} different ones" if len(v) > 3 else shorten("\n".join(v), 300) for v in values])
    made = [[dict_of(x.get("provenance")) for x in rs] for rs in results]
    for name, key in (("evaluated with", "versions"), ("commit", "commit"), ("command", "command")):
        row(name, ["\n".join(dict.fromkeys(as_words(p[key]) for p in ps if p.get(key))) for ps in made])
    return rows


def _training_words(training, run):
    words = [os.path.relpath(training["folder"], run.folder), f"{training['steps']} steps"]
    if is_number(training["of_steps"]) and training["of_steps"] > training["steps"]:
        words[1] = f"{training['steps']} of {training['of_steps']} steps"
    if training["batch_size"]:
        words.append(f"batch {training['batch_size']} a device")
    if is_number(training["learning_rate"]):
        words.append(f"learning rate {training['learning_rate']:.3g}")
    return ", ".join(words)


def _hacl_words(run):
    for training in run.training:
        if hacl := (training["config"] or {}).get("hacl"):
            yield as_words(hacl)
        elif training["stage"] == 1 and training["config"]:
            yield "none in config.json" if training["hacl"] else "without HACL"
    for task in run.tasks.values():
        checkpoint = dict_of(task["result"].get("settings")).get("model")
        if isinstance(checkpoint, str) and os.path.isdir(checkpoint):
            if hacl := (config_of(Path(checkpoint)) or {}).get("hacl"):
                yield as_words(hacl)


def _training_table(runs, stage):
    """Where each curve ends: means over the last tenth of what was logged."""
    series = list(lines_of(runs, stage))
    contrast = any(t["hacl"] for *_, t in series)
    keys = [k for k in QUANTITIES if any(curve_of(t, k, contrast) for *_, t in series)]
    ends = []
    for label, _, _, training in series:
        end = {}
        for key in keys:
            values = [v for _, v in curve_of(training, key, contrast) or () if not math.isnan(v)]
            last = values[-max(1, len(values) // 10) :]
            end[key] = sum(last) / len(last) if last else None
        ends.append({"line": label, "steps": training["steps"], "end": end, "not_finite": training["not_finite"]})
    rows = [("steps", *(e["steps"] for e in ends))]
    rows += [(QUANTITIES[k], *("-" if e["end"][k] is None else f"{e['end'][k]:.4g}" for e in ends)) for k in keys]
    return ("", *(e["line"] for e in ends)), rows, ends


def _page(found, runs, about, training):  # noqa: C901
    """The page as blocks, (kind, ...), which `as_html` and `as_markdown` write out."""
    names = [r.name for r in runs]
    versions = found["provenance"]["versions"]
    yield "heading", 1, found["title"]
    yield "text", f"Made by hacl_llava {versions['hacl_llava']}; seed {found['seed']}. {_count(len(names), 'run')}."
    yield "heading", 2, "In short"
    yield from _page_summary(found, runs)
    yield "heading", 2, "What was compared"
    if about:
        yield "table", ("", *names), about
    if found["settings_that_differ"]:
        words = (
            "These settings differ between the evaluations. Differences below may come from them, not from the models"
        )
        yield "text", f"{words}:"
        rows = [
            (d["task"], d["setting"], *(shorten(as_words(d["values"].get(n, "-")), 300) for n in names))
            for d in found["settings_that_differ"]
        ]
        yield "table", ("task", "setting", *names), rows
    elif len([r for r in runs if r.tasks]) > 1:
        yield "text", "No setting that changes answers differs between the evaluations of a task."
    if any(len(set(values) - {"-"}) > 1 for name, *values in about if name in ("evaluated with", "commit")):
        yield "text", "The evaluations were made with different versions or commits; see the table."
    for stage, (head, rows, picture) in training.items():
        yield "heading", 2, f"Training, stage {stage}"
        yield "picture", picture, f"training curves of stage {stage}"
        words = "Faint: as logged; strong: smoothed. In the table: the mean over the last tenth of what was logged."
        if len({t["hacl"] for r in runs for t in r.training if t["stage"] == stage}) > 1:
            words += " Without HACL the loss that is trained is the caption loss, so it is drawn in both panels."
        yield "text", words
        yield "table", head, rows
        for end in found["training"][str(stage)]:
            for key, n in end["not_finite"].items():
                words = f"{end['line']}: {key} was no finite number in {n} of the logged steps"
                yield "text", f"{words} (gaps in the line)."
    if found["tasks"]:
        yield "heading", 2, "Evaluation"
        if found["pictures"].get("evaluation"):
            yield "picture", found["pictures"]["evaluation"], "metrics and differences"
            yield "text", "The picture shows shares; lengths, scores and whatever goes beyond 0 to 1 are in the tables."
        made = [c for task in found["tasks"] for c in task["comparisons"] if "metrics" in c]
        if made:
            words = "Differences are paired, over the questions that both runs answered; 95% intervals from resampled"
            yield "text", f"{words} images. *: the interval leaves 0 out."
        if tests := sum("mcnemar" in c for c in made):
            words = (
                "McNemar's exact test says how likely so uneven a split of the questions that only one run got right "
                "is if both are equally good. It takes questions as independent, where the intervals allow for several "
                f"about one image. {_count(tests, 'such test')} in this report; the adjusted p counts them (Holm)."
            )
            yield "text", words
        for task in found["tasks"]:
            yield from _page_task(task, names)
    for analysis in found["analyses"]:
        more = f" ({analysis['folder']})" if len(found["analyses"]) > 1 else ""
        yield "heading", 2, f"Representations{more}"
        yield from _page_analysis(analysis)
    if found["gallery"]:
        yield "heading", 2, "Gallery"
        for part in found["gallery"]:
            yield "heading", 3, f"{part['a']} and {part['b']}"
            yield "text", part["drawn"]
            if part["entries"]:
                yield "gallery", [_card(entry) for entry in part["entries"]]
    if found["left_out"]:
        yield "heading", 2, "Left out"
        yield "table", ("run", "file", "reason"), [(x["run"], x["file"], x["reason"]) for x in found["left_out"]]
    yield "heading", 2, "How this was made"
    commit = found["provenance"]["commit"]
    yield "text", as_words(versions) + (f"; commit {commit}" if commit else "")
    yield "code", found["provenance"]["command"]


_VERDICTS = {
    "improved": "Improved",
    "worse": "Got worse",
    "changed": "Changed, neither better nor worse by itself",
    "unclear": "No clear difference (the interval holds 0, or too many tests for it)",
    "not_compared": "Not compared",
}


def _page_summary(found, runs):
    summary = found["summary"]
    for pair in summary["pairs"]:
        yield "heading", 3, f"{pair['b']} against {pair['a']}"
        for verdict, title in _VERDICTS.items():
            if pair[verdict]:
                yield "text", f"{title}:"
                yield "list", pair[verdict]
            elif verdict in ("improved", "worse"):
                yield "text", f"{title}: nothing."
    if not summary["pairs"]:
        none = "No task was evaluated in the baseline and in another run: nothing is said about which is better."
        yield "text", none if len(runs) > 1 else "One run: nothing is compared."
    if summary["cautions"]:
        yield "heading", 3, "With caution"
        yield "list", summary["cautions"]


def _page_task(task, names):
    yield "heading", 3, task["task"]
    here = [n for n in names if n in task["counts"]]
    made = [c for c in task["comparisons"] if "metrics" in c]
    rows = []
    for metric, values in task["metrics"].items():
        if not any(is_number(v.get("value")) for v in values.values()):
            continue  # of questions that were not asked
        cells = [_interval(values[n]) if n in values else "-" for n in here]
        rows.append((metric, *cells, *(_difference(metric, c["metrics"].get(metric)) for c in made)))
    counts = (",\n".join(f"{as_words(v)} {k}" for k, v in task["counts"][n].items() if k in _COUNTS) for n in here)
    rows.append(("counts", *counts, *(f"{c['questions']} common" for c in made)))
    yield "table", ("95% intervals in brackets", *here, *(f"{c['b']} minus {c['a']}" for c in made)), rows
    for c in task["comparisons"]:
        words = f"{c['b']} against {c['a']}: {_count(c['questions'], 'question')} that both answered"
        if c["only_a"] or c["only_b"]:
            words += f"; left out: {c['only_a']} of {c['a']} and {c['only_b']} of {c['b']} that the other lacks"
        if c["other_question"]:
            words += f" ({c['other_question']} with the same id, but another image or label)"
        if c["other_words"]:
            words += f"; {c['other_words']} of the common ones were asked in other words"
        yield "text", words + f". {_count(c['same_answers'], 'pair')} of answers are the same to the letter."
        if "problem" in c:
            yield "text", f"Not compared: {c['problem']}."
        elif c["only_a"] or c["only_b"]:  # then the values of the common ones are not those above
            rows = [(n, _value(e["a"]), _value(e["b"])) for n, e in c["metrics"].items()]
            yield "table", ("on the common questions", c["a"], c["b"]), [r for r in rows if set(r[1:]) != {"undefined"}]
    tested = [(c, c["mcnemar"]) for c in made if "mcnemar" in c]
    if tested:
        head = (
            "right answers" if task["kind"] == "pope" else "right, or nothing hallucinated",
            "both",
            "only the first",
            "only the second",
            "neither",
            "p",
            "p, Holm-adjusted",
        )
        cells = ("both", "only_a", "only_b", "neither")
        rows = [(f"{c['a']}, {c['b']}", *(m[k] for k in cells), _p(m["p"]), _p(m["p_holm"])) for c, m in tested]
        yield "table", head, rows


def _difference(metric, entry):
    if entry is None:
        return "-"
    return _interval(entry, "difference", "+") + " *" * (verdict_of(metric, entry) in ("improved", "worse", "changed"))


def _page_analysis(analysis):
    for title, lines in analysis["findings"]:
        if title:
            yield "heading", 3, title
        yield "list", lines
    for figure in analysis["figures"]:
        if figure.get("file"):
            yield "text", f"{figure['title']}:"
            yield "picture", figure["file"], figure["title"]
        else:
            yield "text", f"{figure['title']}: {figure['problem']}."
    columns = [(m["name"], "value", m["spaces"]) for m in analysis["models"]]
    columns += [(c["name"], "difference", c["spaces"]) for c in analysis["comparisons"]]
    for space in dict.fromkeys(s for *_, spaces in columns for s in spaces):
        here = [(name, key, spaces[space]) for name, key, spaces in columns if space in spaces]
        rows = []
        for part, prefix in (("measures", ""), ("closer_to_true_by_kind", "closer to true: ")):
            for name in dict.fromkeys(n for *_, s in here for n in s.get(part, {})):
                rows.append((prefix + name, *(_measure(s.get(part, {}).get(name), key) for _, key, s in here)))
        if rows:
            yield "table", (f"in the {space} space", *(name for name, *_ in here)), rows


def _measure(entry, key):
    if entry is None:
        return "-"
    words = _interval(entry, key, "+" if key == "difference" else "")
    more = [f"chance {_value(entry['chance'])}"] if is_number(entry.get("chance")) else []
    more += [f"n = {entry['count']}"] if "count" in entry else []
    return words + (f" ({', '.join(more)})" if more else "")


def _card(entry):
    """An entry of `runs.draw_gallery` as a card."""
    lines = [("question", shorten(entry.get("question", "-"), _LONGEST), "")]
    if entry.get("label") is not None:
        lines.append(("label", as_words(entry["label"]), ""))
    for name, answer in entry["answers"].items():
        note = "" if "right" not in entry else "right" if entry["right"] == name else "wrong"
        lines.append((name, "(empty)" if answer in (None, "") else shorten(answer, _LONGEST), note))
        facts = entry.get("facts", {}).get(name, {})
        lines += [(what, shorten(as_words(value), 400), "") for what, value in facts.items()]
    image = entry.get("image")
    what = image if entry["picture"] else entry["problem"]
    return Card(entry["picture"], what, f"{entry['task']}, question {entry['id']}, {image}", lines)


# ---- all of it


def _gallery(runs, pairs, output, args):
    parts, number = [], 0
    for a, b in pairs:
        tasks = [t for t in a.tasks if t in b.tasks]
        for drawn, entries in draw_gallery(a, b, tasks, args.gallery, args.seed):
            for entry in entries:
                number += 1
                folder = args.images or a.tasks[entry["task"]]["result"].get("images") or "."
                entry["picture"] = entry["problem"] = None
                try:
                    if not isinstance(entry.get("image"), str):
                        raise HaclError("the item names no image")
                    picture = thumbnail(image_file(str(folder), entry["image"]))
                    entry["picture"] = f"gallery-{number:02}.jpg"
                    write_bytes(output / entry["picture"], picture)
                except HaclError as error:
                    where = os.path.join(str(folder), str(entry.get("image")))  # not for a page that is handed on
                    entry["problem"] = f"{entry.get('image')}: {str(error).removeprefix(f'{where}: ')}"
            parts.append({"a": a.name, "b": b.name, "drawn": drawn, "entries": entries})
    return parts


def _analyses(runs, output):
    """What analyses say, with their figures copied beside the report; one found below two folders is shown once."""
    shown, seen = [], set()
    for run in runs:
        for folder, analysis in run.analyses:
            if os.path.realpath(folder) in seen:
                continue
            seen.add(os.path.realpath(folder))
            figures = []
            for i, figure in enumerate(f for f in list_of(analysis.get("figures")) if isinstance(f, dict)):
                name = os.path.basename(str(figure.get("file")))
                entry = {"title": str(figure.get("title") or name), "file": None}
                try:
                    content = (Path(folder) / name).read_bytes()
                    if not content.startswith(b"\x89PNG"):
                        raise HaclError(f"{name} is no PNG file")
                    entry["file"] = f"analysis-{len(seen)}-{i + 1}.png"
                    write_bytes(output / entry["file"], content)
                except (OSError, HaclError) as error:
                    entry["problem"] = f"left out ({getattr(error, 'strerror', None) or error})"
                figures.append(entry)
            models = [
                {"name": str(m.get("name")), "checkpoint": m.get("checkpoint"), "spaces": _spaces(m)}
                for m in analysis["models"]
            ]
            comparisons = [
                {"name": f"{c.get('second')} minus {c.get('first')}", "spaces": _spaces(c, "difference")}
                for c in list_of(analysis.get("comparisons"))
                if isinstance(c, dict)
            ]
            shown.append(
                {
                    "folder": folder,
                    "models": models,
                    "comparisons": comparisons,
                    "findings": _findings(analysis.get("findings")),
                    "figures": figures,
                }
            )
    return shown


def _findings(found):
    """[(title or None, sentences)] of an analysis, which has them as plain sentences or under titles."""
    found = list_of(found)
    plain = [str(x) for x in found if not isinstance(x, dict)]
    titled = [
        (str(x.get("title")), [str(line) for line in list_of(x.get("lines"))]) for x in found if isinstance(x, dict)
    ]
    return ([(None, plain)] if plain else []) + titled


def _spaces(about, key="value"):
    """{space: {"measures": {name: figure}, "closer_to_true_by_kind": {kind: figure}}} of a model or a comparison."""
    spaces = {}
    for name, space in dict_of(about.get("spaces")).items():
        spaces[name] = {}
        for part in ("measures", "closer_to_true_by_kind"):
            entries = dict_of(dict_of(space).get(part))
            more = {
                n: {k: e[k] for k in ("chance", "count") if is_number(dict_of(e).get(k))} for n, e in entries.items()
            }
            spaces[name][part] = {n: figure_of(e, key) | more[n] for n, e in entries.items()}
    return spaces


def _evaluations(runs, baseline, seed):
    from ..common.statistics import holm

    tasks = []
    for name in tasks_of(runs):
        have = [r for r in runs if name in r.tasks]
        results = {r.name: r.tasks[name]["result"] for r in have}
        metrics = dict.fromkeys(m for x in results.values() for m in x["metrics"])
        pairs = [(baseline, r) for r in have if r is not baseline] if baseline in have else []
        tasks.append(
            {
                "task": name,
                "kind": have[0].tasks[name]["result"]["kind"],
                "metrics": {m: {n: x["metrics"][m] for n, x in results.items() if m in x["metrics"]} for m in metrics},
                "counts": {n: x["counts"] for n, x in results.items()},
                "comparisons": [compare(a, b, name, seed) for a, b in pairs],
            }
        )
    tests = [c["mcnemar"] for t in tasks for c in t["comparisons"] if "mcnemar" in c]
    for test, p in zip(tests, holm([t["p"] for t in tests])):
        test.update(p_holm=p, tests=len(tests))
    return tasks


def make_report(runs: Sequence[Run], args: argparse.Namespace) -> dict[str, Any]:
    """Write the report of ``runs`` to ``args.output``; returns its numbers, what report.json holds."""
    output = Path(args.output)
    with_something = [r for r in runs if r.training or r.tasks]  # a folder of an analysis is no run of its own
    baseline = next((r for r in runs if r.name == args.baseline), (with_something or runs)[0])
    shown = with_something or runs
    pairs = [(baseline, r) for r in shown if r is not baseline]
    tasks = _evaluations(shown, baseline, args.seed)
    found = {
        "title": printable(args.title or "Report: " + ", ".join(r.name for r in shown)),
        "seed": args.seed,
        "baseline": baseline.name,
        "summary": summarise(tasks, shown, baseline),
        "runs": [
            {
                "name": r.name,
                "folder": r.folder,
                "training": [{k: v for k, v in t.items() if k != "curves"} for t in r.training],
                "evaluations": {
                    n: {"folder": t["folder"], **{k: t["result"].get(k) for k in ("model", "settings", "provenance")}}
                    for n, t in r.tasks.items()
                },
            }
            for r in shown
        ],
        "settings_that_differ": differing_settings(shown),
        "training": {},
        "tasks": tasks,
        "pictures": {},
        "analyses": _analyses(runs, output),
        "gallery": _gallery(shown, pairs, output, args) if args.gallery > 0 else [],
        "left_out": [{"run": r.name, "file": file, "reason": reason} for r in runs for file, reason in r.left_out],
        "provenance": printable(provenance(args.seed)),
    }
    training = {}
    for stage in (1, 2):
        if series := list(lines_of(shown, stage)):
            picture = f"training-stage-{stage}.png"
            draw_curves(series, output / picture)
            head, rows, found["training"][str(stage)] = _training_table(shown, stage)
            training[stage] = (head, rows, picture)
            found["pictures"][f"training-stage-{stage}"] = picture
    if tasks and draw_evaluation(shown, tasks, output / "evaluation.png"):
        found["pictures"]["evaluation"] = "evaluation.png"
    blocks = list(_page(found, shown, _about(with_something), training))
    write_text(output / "report.html", as_html(blocks, found["title"], output))
    write_text(output / "report.md", as_markdown(blocks))
    write_json(output / "report.json", found)
    return found


def main(args: argparse.Namespace) -> int:
    """Read the runs, write the report, and print what came of it; returns 0.

    Raises:
        HaclError: folders or names that cannot be, or nothing to report on. ImportError: no matplotlib.
    """
    folders = parse_runs(args.runs)
    names = [name for name, _ in folders]
    if args.baseline is not None and args.baseline not in names:
        raise HaclError(f"--baseline is {args.baseline!r}, allowed is the name of a run: {', '.join(names)}.")
    if args.gallery < 0:
        raise HaclError(f"--gallery is {args.gallery}, allowed is a number from 0 (no gallery).")
    pyplot()
    runs = [read_run(name, folder, args.output) for name, folder in folders]
    if not any(r.training or r.tasks or r.analyses for r in runs):
        left_out = "".join(f"\n  {file}: {reason}" for r in runs for file, reason in r.left_out)
        raise HaclError(
            f"nothing to report on below {', '.join(f for _, f in folders)}. Looked for: trainer_state.json "
            "(training), results.json with items.jsonl (hacl-llava eval), analysis.json (hacl-llava analyze)."
            + (f" Left out:{left_out}" if left_out else "")
        )
    try:
        Path(args.output).mkdir(parents=True, exist_ok=True)
        found = make_report(runs, args)
    except OSError as error:
        raise HaclError(f"{args.output}: cannot be written ({error.strerror or error}).") from None
    for entry in found["left_out"]:
        print(f"left out: {entry['file']}: {entry['reason']}", file=sys.stderr)
    print(f"{Path(args.output) / 'report.html'}: written, with report.md, report.json and pictures beside it.")
    return 0
