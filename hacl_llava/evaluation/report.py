"""``hacl-llava report``: one page that puts runs side by side: training, evaluation, representations, answers.

What is found below the folders is read, never changed: trainer_state.json of training, results.json and items.jsonl of
``hacl-llava eval``, analysis.json of ``hacl-llava analyze``. report.json is what the page is made from.
"""

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.files import finite, is_number, write_bytes, write_json, write_text
from ..common.images import image_file
from ..common.options import argument, option
from ..common.report import as_html, as_words, counted, figure, provenance, pyplot, shorten, thumbnail
from ..config import HaclError
from .analyze import LABELS, SPACES
from .charts import draw_curves, draw_evaluation, lines_of
from .runs import (
    QUANTITIES,
    Run,
    compare,
    config_of,
    differing_settings,
    draw_gallery,
    parse_runs,
    read_run,
    settings_of,
    tasks_of,
    verdict_of,
)

_COUNTS = ("questions", "scored", "failed", "unclear")  # of results.json, for people; the others are sums of scores
_TRADED = ("precision", "recall")  # of yes/no questions: saying yes, or no, more often buys one with the other
_SMALL = 1000  # questions below which a comparison is called small
_VERDICTS = {
    "improved": "Improved",
    "worse": "Got worse",
    "changed": "Changed, neither better nor worse by itself",
    "unclear": "No clear difference (the interval holds 0, or too many tests for it)",
    "not_compared": "Not compared",
}


@dataclass
class ReportOptions:
    """one page that puts runs side by side

    Training curves, evaluations with intervals and paired tests, figures of analyses, and images with the answers of
    both models where they differ, on one page: report.html, and report.json.
    """

    runs: list[str] = argument("a run's folder, searched; FOLDER: named after it", nargs="+", metavar="NAME=FOLDER")
    output: str = option("folder for report.html, report.json and pictures", required=True, metavar="OUT")
    baseline: str | None = option("the run that the others are compared with (default: the first)", metavar="NAME")
    gallery: int = option("images shown of each comparison", 12, metavar="N")
    images: str | None = option("where images lie now, in place of the folder that the evaluation names", metavar="DIR")
    title: str | None = option("heading of the page (default: the names of the runs)", metavar="TEXT")
    seed: int = option("of intervals and of the gallery's sample", 0)


# ---- the summary


def _p(value):
    return "< 0.0001" if value < 0.0001 else f"{value:.4f}"


def _sentences(task, comparison):
    """[(verdict, sentence)] of one comparison, and how many intervals were looked at."""
    said, intervals = [], 0
    if comparison["questions"] and comparison["same_answers"] == comparison["questions"]:
        said.append(("unclear", "all answers are the same"))
    if "problem" in comparison:
        said.append(("not_compared", comparison["problem"]))
    for metric, entry in comparison.get("metrics", {}).items():
        if not is_number(entry["difference"]) or list(entry["interval"]) == [0, 0]:
            continue  # undefined, or the same in every sample
        intervals += 1
        verdict, change = verdict_of(metric, entry), figure(entry, "difference")
        words = f"{metric} {entry['a']:.3f} to {entry['b']:.3f} ({change})"
        if verdict is None:
            words, verdict = f"{words}, too few images for an interval", "unclear"
        elif verdict == "unclear":
            words = f"{metric} ({change})"
        elif metric.endswith(_TRADED) and task["kind"] in ("pope", "amber"):
            verdict = "changed"
        elif metric == "accuracy" and comparison.get("mcnemar", {"p_holm": 0})["p_holm"] >= 0.05:
            words += f", but McNemar's p is {_p(comparison['mcnemar']['p_holm'])} (adjusted)"
            verdict = "unclear"
        said.append((verdict, words))
    if not said and comparison["metrics"]:
        said.append(("unclear", "every figure is the same"))
    return said, intervals


def summarise(tasks: Sequence[dict[str, Any]], runs: Sequence[Run], baseline: Run) -> dict[str, Any]:
    """Plain sentences from the numbers.

    Returns:
        {"pairs": [{"a", "b", "improved": [...], "worse", "changed", "unclear", "not_compared"}], "cautions": [...]}; an
        entry of a list is a sentence about one task.
    """
    pairs, intervals = {}, 0
    for task in tasks:
        for c in task["comparisons"]:
            pair = pairs.setdefault(
                (c["a"], c["b"]), {"a": c["a"], "b": c["b"]} | {verdict: [] for verdict in _VERDICTS}
            )
            said, count = _sentences(task, c)
            intervals += count
            for verdict in dict.fromkeys(verdict for verdict, _ in said):
                pair[verdict].append(f"{task['task']}: {'; '.join(words for v, words in said if v == verdict)}")
    return {"pairs": list(pairs.values()), "cautions": list(_cautions(tasks, runs, baseline, bool(pairs), intervals))}


def _cautions(tasks, runs, baseline, compared, intervals):
    sizes = [c["questions"] for t in tasks for c in t["comparisons"] if "metrics" in c]
    sizes = sizes or [counts["scored"] for t in tasks for counts in t["counts"].values() if "scored" in counts]
    if sizes and min(sizes) < _SMALL:
        yield (
            f"Small samples: the smallest has {counted(min(sizes), 'question')}. Figures of a miniature or of a few "
            "hundred questions say little about full-size models and other images."
        )
    failed = {r.name: sum(t["counts"].get(r.name, {}).get("failed", 0) for t in tasks) for r in runs}
    if any(failed.values()):
        words = ", ".join(f"{count} of {name}" for name, count in failed.items() if count)
        yield f"Questions that failed (no image, no answer, no verdict) are in no figure: {words}."
    if compared:
        if differ := dict.fromkeys(d["setting"] for d in differing_settings(runs)):
            yield f"Settings differ between the evaluations, and may be why figures do: {', '.join(differ)}."
        yield (
            "Each run is one training with one seed; the intervals are about which images were asked about, not about "
            "what another training would give."
        )
    if intervals > 1:
        yield (
            f"{intervals} differences were looked at. Were there none at all, about 1 in 20 of the 95% intervals would "
            "leave 0 out all the same, and metrics of the same answers go together."
        )
    for run in (r for r in runs if r is not baseline):
        common = [task for task in run.tasks if task in baseline.tasks]
        if run.tasks and baseline.tasks and not common:
            yield f"{run.name} has no task in common with {baseline.name}: nothing is compared."
        same = (t for t in common if any(_model(run, t)) and _model(run, t) == _model(baseline, t))
        if task := next(same, None):
            yield f"{baseline.name} and {run.name}: {task} was answered by the same model."


def _model(run, task):
    result = run.tasks[task]["result"]
    names = ("model", "digest", "base", "base_digest", "vision_tower")
    return [result.get("model"), *(result["settings"].get(name) for name in names)]


# ---- tables


def _about(runs):
    """The table of what was compared: [property, its value in each run], properties nobody has left out."""
    results = [[t["result"] for t in run.tasks.values()] for run in runs]

    def of_results(get):
        return [dict.fromkeys(as_words(value) for x in rs if (value := get(x)) not in (None, "")) for rs in results]

    rows = {"folder": [[r.folder] for r in runs]}
    for stage in (1, 2):
        trainings = [[_training_words(t, r) for t in r.training if t["stage"] == stage] for r in runs]
        rows[f"training, stage {stage}"] = trainings
    rows["HACL settings"] = [dict.fromkeys(_hacl_words(run)) for run in runs]
    rows["model"] = of_results(lambda x: x.get("model"))
    for name in sorted({k for rs in results for x in rs for k in settings_of(x)} - {"task"}):
        values = of_results(lambda x, name=name: settings_of(x).get(name))
        values = [[f"{len(v)} different ones"] if len(v) > 3 else [shorten("\n".join(v), 300)] for v in values]
        rows["settings: model" if name == "model" else name] = values
    for name, key in (("evaluated with", "versions"), ("commit", "commit"), ("command", "command")):
        rows[name] = of_results(lambda x, key=key: x["provenance"].get(key))
    rows = {name: ["\n".join(value) for value in values] for name, values in rows.items()}
    return [[name, *(value or "-" for value in values)] for name, values in rows.items() if any(values)]


def _training_words(training, run):
    words = [os.path.relpath(training["folder"], run.folder), f"{training['steps']} steps"]
    if (training["of_steps"] or 0) > training["steps"]:
        words[1] = f"{training['steps']} of {training['of_steps']} steps"
    if training["batch_size"]:
        words.append(f"batch {training['batch_size']} a device")
    if training["learning_rate"] is not None:
        words.append(f"learning rate {training['learning_rate']:.3g}")
    return ", ".join(words)


def _hacl_words(run):
    for training in run.training:
        if hacl := (training["config"] or {}).get("hacl"):
            yield as_words(hacl)
        elif training["stage"] == 1 and training["config"]:
            yield "none in config.json" if training["hacl"] else "without HACL"
    for task in run.tasks.values():
        config = config_of(Path(str(task["result"]["settings"].get("model"))))
        if hacl := (config or {}).get("hacl"):
            yield as_words(hacl)


def _training_ends(lines):
    """Where each curve ends: the mean over the last tenth of what was logged; None: it was not."""
    ends = []
    for line in lines:
        end = {key: None for key in QUANTITIES if any(key in x["curves"] for x in lines)}
        for key, points in line["curves"].items():
            values = [v for _, v in points if not math.isnan(v)]
            last = values[-max(1, len(values) // 10) :]
            end[key] = sum(last) / len(last) if last else None
        training = {key: line["training"][key] for key in ("steps", "not_finite", "hacl")}
        ends.append({"line": line["line"], "end": end, **training})
    return ends


# ---- all of it


def _gallery(runs, baseline, output, options: ReportOptions):
    parts, number = [], 0
    for run in (r for r in runs if r is not baseline and options.gallery):
        tasks = [t for t in baseline.tasks if t in run.tasks]
        for drawn, entries in draw_gallery(baseline, run, tasks, options.gallery, options.seed):
            for entry in entries:
                number += 1
                folder = str(options.images or baseline.tasks[entry["task"]]["result"].get("images") or ".")
                entry["picture"] = entry["problem"] = None
                try:
                    if "image" not in entry:
                        raise HaclError("the item names no image")
                    picture = thumbnail(image_file(folder, entry["image"]))
                    entry["picture"] = f"gallery-{number:02}.jpg"
                    write_bytes(output / entry["picture"], picture)
                except HaclError as error:
                    where = os.path.join(folder, str(entry.get("image")))  # not for a page that is handed on
                    entry["problem"] = f"{entry.get('image')}: {str(error).removeprefix(f'{where}: ')}"
            parts.append({"a": baseline.name, "b": run.name, "drawn": drawn, "entries": entries})
    return parts


def _analyses(runs, output):
    """What analyses say, with their figures copied beside the report; one found below two folders is shown once."""
    found, shown = {}, []
    for folder, analysis in (x for run in runs for x in run.analyses):
        found.setdefault(os.path.realpath(folder), (folder, analysis))
    for number, (folder, analysis) in enumerate(found.values(), 1):
        figures = []
        for i, picture in enumerate(analysis["figures"], 1):
            name, problem = os.path.basename(picture["file"]), None
            try:
                content = (Path(folder) / name).read_bytes()
                if not content.startswith(b"\x89PNG"):
                    raise HaclError(f"{name} is no PNG file")
                name = f"analysis-{number}-{i}.png"
                write_bytes(output / name, content)
            except (OSError, HaclError) as error:
                problem = f"left out ({getattr(error, 'strerror', None) or error})"
            figures.append({**picture, "file": None if problem else name, "problem": problem})
        said = {key: analysis[key] for key in ("models", "comparisons", "findings")}
        shown.append({"folder": folder, **said, "figures": figures})
    return shown


def _evaluations(runs, baseline, seed):
    from ..common.statistics import holm

    tasks = []
    for name in tasks_of(runs):
        have = [r for r in runs if name in r.tasks]
        results = {r.name: r.tasks[name]["result"] for r in have}
        metrics = dict.fromkeys(m for x in results.values() for m in x["metrics"])
        others = [r for r in have if r is not baseline] if baseline in have else []
        tasks.append(
            {
                "task": name,
                "kind": have[0].tasks[name]["result"]["kind"],
                "metrics": {m: {n: x["metrics"][m] for n, x in results.items() if m in x["metrics"]} for m in metrics},
                "counts": {n: x["counts"] for n, x in results.items()},
                "comparisons": [compare(baseline, r, name, seed) for r in others],
            }
        )
    tests = [c["mcnemar"] for t in tasks for c in t["comparisons"] if "mcnemar" in c]
    for test, p in zip(tests, holm([t["p"] for t in tests])):
        test.update(p_holm=p, tests=len(tests))
    return tasks


def _run_facts(run):
    evaluations = {
        name: {"folder": task["folder"], **{k: task["result"].get(k) for k in ("model", "settings", "provenance")}}
        for name, task in run.tasks.items()
    }
    training = [{k: v for k, v in t.items() if k != "curves"} for t in run.training]
    return {"name": run.name, "folder": run.folder, "training": training, "evaluations": evaluations}


def make_report(runs: Sequence[Run], options: ReportOptions) -> dict[str, Any]:
    """Write the report of ``runs`` to ``options.output``; returns its numbers, what report.json holds."""
    output = Path(options.output)
    shown = [r for r in runs if r.training or r.tasks]  # a folder of an analysis is no run of its own
    about, shown = _about(shown), shown or runs
    baseline = next((r for r in runs if r.name == options.baseline), shown[0])
    tasks = _evaluations(shown, baseline, options.seed)
    found = {
        "title": options.title or "Report: " + ", ".join(r.name for r in shown),
        "seed": options.seed,
        "baseline": baseline.name,
        "summary": summarise(tasks, shown, baseline),
        "runs": [_run_facts(r) for r in shown],
        "about": about,
        "settings_that_differ": differing_settings(shown),
        "training": {},
        "tasks": tasks,
        "pictures": {},
        "analyses": _analyses(runs, output),
        "gallery": _gallery(shown, baseline, output, options),
        "left_out": [{"run": r.name, "file": file, "reason": reason} for r in runs for file, reason in r.left_out],
        "provenance": provenance(options.seed),
    }
    for stage in (1, 2):
        if lines := lines_of(shown, stage):
            found["pictures"][f"training-stage-{stage}"] = f"training-stage-{stage}.png"
            draw_curves(lines, output / f"training-stage-{stage}.png")
            found["training"][str(stage)] = _training_ends(lines)
    if tasks and draw_evaluation(shown, tasks, output / "evaluation.png"):
        found["pictures"]["evaluation"] = "evaluation.png"
    found = finite(found)
    write_text(output / "report.html", page(found, output))
    write_json(output / "report.json", found)
    return found


def page(found: Mapping[str, Any], output: str | os.PathLike) -> str:
    """The HTML page of what report.json holds; ``output``: the folder of its pictures."""
    words = {"verdicts": _VERDICTS, "quantities": QUANTITIES, "shown_counts": _COUNTS}
    words |= {"labels": LABELS, "space_titles": SPACES}
    return as_html("report.html.j2", found, output, **words, verdict_of=verdict_of, p_words=_p)


def run(options: ReportOptions) -> int:
    """Read the runs, write the report, and print what came of it; returns 0.

    Raises:
        HaclError: folders or names that cannot be, or nothing to report on. ImportError: no matplotlib.
    """
    folders = parse_runs(options.runs)
    names = [name for name, _ in folders]
    if options.baseline is not None and options.baseline not in names:
        raise HaclError(f"--baseline is {options.baseline!r}, allowed is the name of a run: {', '.join(names)}.")
    if options.gallery < 0:
        raise HaclError(f"--gallery is {options.gallery}, allowed is a number from 0 (no gallery).")
    pyplot()
    runs = [read_run(name, folder, options.output) for name, folder in folders]
    if not any(r.training or r.tasks or r.analyses for r in runs):
        left_out = "".join(f"\n  {file}: {reason}" for r in runs for file, reason in r.left_out)
        raise HaclError(
            f"nothing to report on below {', '.join(f for _, f in folders)}. Looked for: trainer_state.json "
            "(training), results.json with items.jsonl (hacl-llava eval), analysis.json (hacl-llava analyze)."
            + (f" Left out:{left_out}" if left_out else "")
        )
    try:
        Path(options.output).mkdir(parents=True, exist_ok=True)
        found = make_report(runs, options)
    except OSError as error:
        raise HaclError(f"{options.output}: cannot be written ({error.strerror or error}).") from None
    for entry in found["left_out"]:
        print(f"left out: {entry['file']}: {entry['reason']}", file=sys.stderr)
    print(f"{Path(options.output) / 'report.html'}: written, with report.json and pictures beside it.")
    return 0
