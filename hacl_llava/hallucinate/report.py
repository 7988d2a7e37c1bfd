"""How good the hallucinated captions of a run are, as far as words can tell: Markdown and a picture."""

import json
import os
import statistics
from collections import Counter
from typing import Any

from ..common.files import write_text
from ..common.report import COLOURS, as_markdown, pyplot, save
from ..config import HaclError
from ..records import caption_of, name_of, stream_records
from . import KINDS
from .checks import length, normal
from .run import Run, chance

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
        entry, caption = run.journal.entry(index), caption_of(record)
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


def _counted(head, counts):
    return ("table", head, counts.most_common()) if counts else ("text", "None.")


def _picture(found, path):
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), constrained_layout=True)
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
    save(figure, path)


def write_report(run: Run, summary: dict[str, Any], command: str) -> str:
    """Write the report of a run beside its target: ``.report.md``, ``.report.json``, ``.report.png``.

    Returns:
        The path of the Markdown.

    Raises:
        HaclError: it cannot be written.
    """
    found, stem = measure(run, summary), _stem(run.target) + ".report"
    try:
        _picture(found, stem + ".png")
        for ending, text in (
            (".json", json.dumps(found, indent=1, ensure_ascii=False)),
            (".md", as_markdown(_page(found, os.path.basename(stem) + ".png", command))),
        ):
            write_text(stem + ending, text)
    except OSError as error:
        raise HaclError(f"{stem}.*: cannot be written ({error.strerror or error}).") from None
    return stem + ".md"
