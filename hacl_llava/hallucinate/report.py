"""How good hallucinated captions are, of a run or of any file, as far as words can tell: Markdown and a picture."""

import json
import os
import statistics
from collections import Counter
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..common.files import write_text
from ..common.report import COLOURS, as_markdown, dots, figure, plain, pyplot, save
from ..config import HaclError
from ..records import caption_of, name_of, stream_records
from . import KINDS, chance
from .audit import FOLDS, audit, read_pairs
from .checks import length, normal
from .run import Run

if TYPE_CHECKING:
    from .likelihood import Likelihood

_EXAMPLES = 10  # of each kind


def _stem(target):
    for ending in (".gz", ".jsonl", ".json"):
        target = target.removesuffix(ending)
    return target


def measure(run: Run, summary: dict[str, Any]) -> dict[str, Any]:
    """Everything the report shows, as a dict that json can hold; ``summary`` is the run's.

    ``length_ratio``: tokens of a hallucinated caption over those of its caption. ``repeated``: hallucinated captions
    whose text (but for case and punctuation) an earlier one has, ``equal_to_a_caption``: ... some caption of the input
    has; both are counted by 64-bit hashes.
    """
    ratios, kinds_by_source, seen, repeated, captions_seen = [], {}, set(), 0, set()
    samples, without = {kind: [] for kind in KINDS}, []
    for index, (_, record) in enumerate(stream_records(run.source)):
        if run.survey.skip.get(index) == "bad record":
            continue
        entry, caption = run.entry(index), caption_of(record)
        captions_seen.add(hash(normal(caption)))
        if not entry or not entry["captions"]:
            reason = entry["reason"] if entry else run.survey.skip.get(index, "not asked for yet")
            if len(without) < 50 and reason != "has hallucinated captions already":
                without.append([name_of(run.source, index, record), reason, caption])
            continue
        words = max(length(caption), 1)
        for turn, (kind, text) in enumerate(entry["captions"]):
            ratios.append(length(text) / words)
            row = kinds_by_source.setdefault(entry["source"], Counter())
            row[kind] += 1
            key = hash(normal(text))
            repeated += key in seen
            seen.add(key)
            # a uniform sample: the smallest of numbers that depend on the record alone
            sample = samples[kind]
            sample.append([chance("example", index, turn), caption, text, entry["source"]])
            if len(sample) > 50 * _EXAMPLES:
                sample[:] = sorted(sample)[:_EXAMPLES]
    counts = Counter(min(max(int(r * 20), 7), 36) for r in ratios)
    low, high = run.header["length_ratio"]
    return {
        **summary,
        "settings": run.header,
        "kinds_by_source": kinds_by_source,
        "length_ratio": {
            "median": statistics.median(ratios) if ratios else None,
            "within": sum(low <= r <= high for r in ratios) / len(ratios) if ratios else None,
            "histogram": [counts.get(i, 0) for i in range(7, 37)],
        },
        "repeated": repeated,
        "equal_to_a_caption": len(seen & captions_seen),
        "examples": {k: [s[1:] for s in sorted(v)[:_EXAMPLES]] for k, v in samples.items()},
        "without_examples": without,
    }


def _share(part, whole):
    return f"{part} ({part / whole:.1%})" if whole else str(part)


def _page(found, picture, command):
    """The report as blocks of `common.report`."""
    records, captions = found["records"], found["captions"]
    ratio = found["length_ratio"]
    yield "heading", 1, f"Hallucinated captions of {os.path.basename(found['settings']['input_name'])}"
    yield "text", f"Made by hacl_llava {found['settings']['version']}:"
    yield "code", command
    rows = [
        ("records", records),
        ("with hallucinated captions", _share(found["with hallucinated captions"], records)),
        ("hallucinated captions", captions),
        ("failed, to be asked again", found["failed"]),
        ("not asked for yet", found["to do"]),
        ("repeats of an earlier hallucinated caption", _share(found["repeated"], captions)),
        ("the text of some other record's caption", _share(found["equal_to_a_caption"], captions)),
        ("median length ratio (tokens)", f"{ratio['median']:.2f}" if captions else "-"),
        (
            "length ratio within {} to {}".format(*found["settings"]["length_ratio"]),
            f"{ratio['within']:.1%}" if captions else "-",
        ),
        *((f"tokens, {s}: {k}", v) for s, usage in found["usage"].items() for k, v in usage.items()),
    ]
    yield "table", ("", "count"), rows
    yield "picture", picture, "kinds, length ratios, refusals"
    yield from _told(found["audit"])
    yield "heading", 2, "By kind and source"
    rows = [(s, *(row.get(k, 0) for k in KINDS), sum(row.values())) for s, row in found["kinds_by_source"].items()]
    yield "table", ("source", *KINDS, "all"), rows
    yield "heading", 2, "Candidates refused"
    yield "text", "A refused candidate is replaced by another one where there is one."
    yield _counted(("reason", "candidates"), found["rejected"])
    yield "heading", 2, "Records without"
    yield _counted(("reason", "records"), found["without"])
    if found["without_examples"]:
        yield "table", ("record", "reason", "caption"), found["without_examples"]
    yield "heading", 2, "Examples"
    yield "text", "Drawn at random; not chosen."
    for kind in KINDS:
        if found["examples"][kind]:
            yield "heading", 3, kind
            yield "table", ("caption", "hallucinated caption", "source"), found["examples"][kind]


def _told(found):
    """What the words alone tell, as blocks of the page."""
    yield "heading", 2, "What text alone tells"
    if "blind" not in found:
        yield "text", found["without"]
        return
    yield (
        "text",
        "Blind accuracy: the share of pairs (caption, hallucinated caption) that a classifier of words and characters "
        "orders rightly without the image, over images that it was not trained on; .5 is chance. "
        f"{found['pairs']} pairs of {found['captions']}.",
    )
    measures = [("blind accuracy", found["blind"])]
    if "likelihood" in found:
        measures.append(("the language model prefers the caption", found["likelihood"]))
    rows = [
        (name, part, each["pairs"], figure(each if "value" in each else None))
        for name, measure in measures
        for part, each in (("all", measure["all"]), *measure["kinds"].items(), *measure["sources"].items())
    ]
    yield "table", ("", "of", "pairs", "share [95 % interval]"), rows
    quartiles = [(name, *(f"{v:.2f}" for v in found[key])) for name, key in _SIZES]
    yield "table", ("", "lower quartile", "median", "upper quartile"), quartiles
    for key, said in (("hardest", "Hardest to tell"), ("easiest", "Easiest to tell")):
        yield "heading", 3, said
        yield "table", ("margin", "kind", "caption", "hallucinated caption"), found[key]


_SIZES = (("length ratio (tokens)", "length_ratio"), ("words changed", "edit_size"))


def _audited(path, seed, likelihood, source_of=None):
    """What `audit` finds in a file, with {"records", "captions", "pairs"}; {"without": why} where it finds nothing."""
    pairs, counts = read_pairs(path, seed)
    counts |= {"pairs": len(pairs)}
    preference = None
    if likelihood is not None:
        values = iter(likelihood.of([text for p in pairs for text in (p.caption, p.text)]))
        preference = [true - false for true, false in zip(values, values)]
    sources = [source_of(p.index) for p in pairs] if source_of else None
    if len({p.image for p in pairs}) < FOLDS:
        return counts | {"without": f"Not measured: there are pairs of fewer than {FOLDS} images."}
    return counts | audit(pairs, sources, preference)


def _dots(axis, found):
    """Blind accuracy over all and by kind, with its intervals."""
    rows = {"all": found["blind"]["all"], **found["blind"]["kinds"]} if "blind" in found else {}
    series = {"blind accuracy": rows}
    if "likelihood" in found:
        series["language model"] = {"all": found["likelihood"]["all"], **found["likelihood"]["kinds"]}
    if not rows:
        axis.set_axis_off()
        return
    handles = dots(axis, list(rows), series)
    low = min(0.3, *(row.get("interval", [1])[0] for of in series.values() for row in of.values())) - 0.02
    axis.axvline(0.5, color="black", linestyle="--", linewidth=1)
    axis.set_yticks(range(len(rows)), [plain(row) for row in rows])
    axis.set(title="What text alone tells", xlabel="share ordered rightly (dashed: chance)", xlim=(low, 1.02))
    if len(handles) > 1:
        axis.legend(handles=list(handles.values()), loc="lower right")


def write_audit(path: str, seed: int = 0, likelihood: "Likelihood | None" = None, command: str = "") -> str:
    """Measure any file of hallucinated captions: ``.report.md``, ``.report.json``, ``.report.png`` beside it.

    Args:
        path: of the file; see `read_pairs`. seed: of the sample that is measured. likelihood: a language model to ask,
            too. command: shown in the report.

    Returns:
        The path of the Markdown.

    Raises:
        HaclError: there is nothing to measure, or the report cannot be written.
    """
    plt, found, stem = pyplot(), _audited(path, seed, likelihood), _stem(path) + ".report"
    if "blind" not in found:
        raise HaclError(f"{path}: {found['without']}")
    found |= {"command": command, "version": __version__}
    drawing, axes = plt.subplots(1, 2, figsize=(9, 3.8), constrained_layout=True)
    _dots(axes[0], found)
    low, high = found["margins_range"]
    width = (high - low) / len(found["margins"]) or 1
    centres = [low + (i + 0.5) * width for i in range(len(found["margins"]))]
    axes[1].bar(centres, found["margins"], width=width, color=COLOURS[0])
    axes[1].axvline(0, color="black", linestyle="--", linewidth=1)
    axes[1].set(title="How surely", xlabel="log odds for the true caption", ylabel="pairs")
    share = _share(found["with hallucinated captions"], found["records"])
    page = [
        ("heading", 1, f"Hallucinated captions of {os.path.basename(path)}"),
        ("code", command),
        ("text", f"{share} of {found['records']} records have hallucinated captions."),
        ("picture", os.path.basename(stem) + ".png", "blind accuracy, margins"),
        *_told(found),
    ]
    _write(stem, found, page, drawing)
    return stem + ".md"


def _write(stem, found, page, drawing):
    try:
        save(drawing, stem + ".png")
        write_text(stem + ".json", json.dumps(found, indent=1, ensure_ascii=False))
        write_text(stem + ".md", as_markdown(page))
    except OSError as error:
        raise HaclError(f"{stem}.*: cannot be written ({error.strerror or error}).") from None


def _counted(head, counts):
    return ("table", head, counts.most_common()) if counts else ("text", "None.")


def _picture(found):
    plt = pyplot()
    drawing, axes = plt.subplots(1, 4, figsize=(17, 3.8), constrained_layout=True)
    bottom = [0] * len(KINDS)
    for (source, row), colour in zip(found["kinds_by_source"].items(), COLOURS):
        heights = [row.get(k, 0) for k in KINDS]
        axes[0].bar(KINDS, heights, bottom=bottom, label=source, color=colour)
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    axes[0].set(title="What they get wrong", ylabel="hallucinated captions")
    if found["kinds_by_source"]:
        axes[0].legend(title="source")
    axes[1].bar(
        [i / 20 + 0.025 for i in range(7, 37)], found["length_ratio"]["histogram"], width=0.045, color=COLOURS[0]
    )
    for bound in found["settings"]["length_ratio"]:
        axes[1].axvline(bound, color="black", linestyle="--", linewidth=1)
    axes[1].set(title="How long they are", xlabel="tokens, relative to the caption (dashed: allowed)", ylabel="count")
    reasons = found["rejected"].most_common(8)[::-1]
    axes[2].barh([r for r, _ in reasons], [n for _, n in reasons], color=COLOURS[1])
    axes[2].set(title="Why candidates were refused", xlabel="candidates")
    if not reasons:
        axes[2].set_yticks([])
        axes[2].text(0.5, 0.5, "none was", ha="center", transform=axes[2].transAxes)
    _dots(axes[3], found["audit"])
    return drawing


def write_report(run: Run, summary: dict[str, Any], command: str, likelihood: "Likelihood | None" = None) -> str:
    """Write the report of a run beside its target: ``.report.md``, ``.report.json``, ``.report.png``.

    Returns:
        The path of the Markdown.

    Raises:
        HaclError: it cannot be written.
    """

    def source_of(index):
        return (run.entry(index) or {}).get("source", "before")

    found, stem = measure(run, summary), _stem(run.target) + ".report"
    found["audit"] = {"without": "Nothing to measure."}
    if found["captions"]:
        found["audit"] = _audited(run.target, run.seed, likelihood, source_of)
    _write(stem, found, _page(found, os.path.basename(stem) + ".png", command), _picture(found))
    return stem + ".md"
