"""How good the hallucinated captions of a run are, as far as words can tell: Markdown and a picture."""

import json
import os
import re
import statistics
from collections import Counter

from ..common.files import write_text
from ..config import HaclError
from ..records import caption_of, name_of, stream_records
from . import KINDS
from .checks import length, normal
from .run import chance

_BINS = [i / 20 for i in range(8, 37)]  # of the length ratio: 0.4 to 1.8
_EXAMPLES = 10  # of each kind
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")  # Okabe and Ito's, told apart by the colour-blind


def need_matplotlib():
    """Raise ImportError, naming the extra, before any work is done."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError("--report draws a picture with matplotlib: pip install 'hacl_llava[plot]'") from None


def _stem(target):
    for ending in (".gz", ".jsonl", ".json"):
        target = target.removesuffix(ending)
    return target


def measure(run, summary):
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


def _cell(text):
    return re.sub(r"([\\`*_|\[\]$!])", r"\\\1", " ".join(str(text).split())).replace("<", "&lt;")


def _table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]) + "\n"


def _share(part, whole):
    return f"{part} ({part / whole:.1%})" if whole else str(part)


def _markdown(found, picture, command):
    records, captions = found["records"], found["captions"]
    ratio = found["length_ratio"]
    parts = [
        f"# Hallucinated captions of {os.path.basename(found['settings']['input_name'])}\n",
        f"Made by `{command}`, hacl_llava {found['settings']['version']}.\n",
        _table(
            ("", "count"),
            [
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
            ],
        ),
        f"![kinds, length ratios, refusals]({picture})\n",
        "## By kind and source\n",
        _table(
            ("source", *KINDS, "all"),
            [
                (source, *(row.get(k, 0) for k in KINDS), sum(row.values()))
                for source, row in found["kinds_by_source"].items()
            ],
        ),
        "## Candidates refused\n",
        "A refused candidate is replaced by another one where there is one.\n",
        _table(("reason", "candidates"), found["rejected"].most_common()) if found["rejected"] else "None.\n",
        "## Records without\n",
        _table(("reason", "records"), found["without"].most_common()) if found["without"] else "None.\n",
    ]
    if found["without_examples"]:
        parts.append(_table(("record", "reason", "caption"), found["without_examples"]))
    parts.append("## Examples\n\nDrawn at random; not chosen.\n")
    for kind in KINDS:
        if found["examples"][kind]:
            parts += [f"### {kind}\n", _table(("caption", "hallucinated caption", "source"), found["examples"][kind])]
    return "\n".join(parts)


def _picture(found, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), constrained_layout=True)
    bottom = [0] * len(KINDS)
    for (source, row), colour in zip(found["kinds_by_source"].items(), _COLOURS, strict=False):
        heights = [row.get(k, 0) for k in KINDS]
        axes[0].bar(KINDS, heights, bottom=bottom, label=source, color=colour)
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    axes[0].set(title="What they get wrong", ylabel="hallucinated captions")
    if found["kinds_by_source"]:
        axes[0].legend(title="source")
    axes[1].bar(
        [i / 20 + 0.025 for i in range(7, 37)], found["length_ratio"]["histogram"], width=0.045, color=_COLOURS[0]
    )
    for bound in found["settings"]["length_ratio"]:
        axes[1].axvline(bound, color="black", linestyle="--", linewidth=1)
    axes[1].set(title="How long they are", xlabel="tokens, relative to the caption (dashed: allowed)", ylabel="count")
    reasons = found["rejected"].most_common(8)[::-1]
    axes[2].barh([r for r, _ in reasons], [n for _, n in reasons], color=_COLOURS[1])
    axes[2].set(title="Why candidates were refused", xlabel="candidates")
    if not reasons:
        axes[2].set_yticks([])
        axes[2].text(0.5, 0.5, "none was", ha="center", transform=axes[2].transAxes)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_report(run, summary, command):
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
            (".md", _markdown(found, os.path.basename(stem) + ".png", command)),
        ):
            write_text(stem + ending, text)
    except OSError as error:
        raise HaclError(f"{stem}.*: cannot be written ({error.strerror or error}).") from None
    return stem + ".md"
