"""``hacl-llava analyze``: the paper's Figure 1 (arXiv 2312.06968) and its numbers, for one to four checkpoints."""

import os
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common.files import finite, write_json, write_text
from ..common.options import Loader, argument, option
from ..common.report import as_html, provenance
from ..config import HaclError

METHODS = {"pca": "PCA", "tsne": "t-SNE"}  # how `figures` brings representations to two dimensions
SPACES = {"llm": "the LLM's space", "centred": "the LLM's space, centred", "head": "head space"}
_MODELS = 4  # side by side at most
_NAMED = 20  # skipped records named on the page; analysis.json has more
# label, and how to read it
LABELS = {
    "modality_gap": ("modality gap", "distance between the centroids of images and captions; 0: none"),
    "modality_gap_relative": ("modality gap, relative", "the same over the mean distance from the own centroid"),
    "gap_image_hallucinated": ("gap image - hallucinated", "between the centroids of images and hallucinated captions"),
    "gap_caption_hallucinated": ("gap caption - hallucinated", "between those of captions and hallucinated captions"),
    "image_to_text_r1": ("image to text R@1", "a right caption is the nearest of all to the image"),
    "image_to_text_r5": ("image to text R@5", "... is among the five nearest"),
    "text_to_image_r1": ("text to image R@1", "a right image is the nearest of all to the caption"),
    "text_to_image_r5": ("text to image R@5", "... is among the five nearest"),
    "caption_to_caption_r1": ("caption to caption R@1", "another caption of the image is the nearest: a bound"),
    "closer_to_true": ("closer to true", "pairs whose image is closer to its caption than to the hallucinated one"),
    "closer_to_true_than_all": ("closer to true than to all", "images for which that holds for all they have"),
    "mean_margin": ("mean margin", "cosine with the caption less that with a hallucinated caption"),
    "alignment": ("squared distance of image and caption", "mean; alignment of Wang & Isola; lower: closer"),
    "alignment_hallucinated": ("squared distance of image and hallucinated caption", "the same with those"),
}
_SPOKEN = ("modality_gap", "alignment", "image_to_text_r1", "text_to_image_r1", "closer_to_true", "mean_margin")


@dataclass
class AnalyzeOptions(Loader):
    """representations of checkpoints side by side: pictures and numbers

    The paper's Figure 1 and its numbers, for one to four checkpoints: where images, captions and hallucinated captions
    lie, the modality gap, retrieval, and how often an image is closer to its true caption.
    """

    checkpoints: list[str] = argument("folder or hub id; one to four", nargs="+", metavar="CHECKPOINT")
    data: str = option("LLaVA-format json with hallucinated_captions", required=True, metavar="JSON")
    images: str = option("the folder that its images are relative to", required=True, metavar="DIR")
    output: str = option("folder to write", required=True, metavar="OUT")
    bases: list[str] | None = option(
        "the LLM of projectors or LoRAs: once, or once for each in order",
        flag="--base",
        action="append",
        metavar="LLM",
    )
    names: list[str] | None = option(
        "in the pictures, for each in order", flag="--name", action="append", metavar="NAME"
    )
    limit: int = option("records, drawn at random", 1000)
    seed: int = option("of the draw and the pictures", 0)
    method: Sequence[str] = option("pictures to draw (default: both)", tuple(METHODS), nargs="+", choices=METHODS)
    visual_bos: str | None = option("BOS before the image (default: as trained, else true)", choices=("true", "false"))
    representation: str | None = option("what to look at (default: as trained, else eos)", choices=("eos", "prompt"))
    prompt: str | None = option("of --representation prompt (default: as trained)", metavar="TEXT")
    batch_size: int = option("images at a time", 16)
    workers: int = option("processes that read images", 2)
    base: str | None = field(default=None, init=False)  # each has its own, see bases
    conv: str | None = field(default=None, init=False)  # nothing is asked


def run(options: AnalyzeOptions) -> int:
    """Represent, measure, draw and write; what was represented before is taken from its file. Returns 0.

    Raises:
        HaclError: an argument, the data or a checkpoint cannot be used, or the disk says no. ImportError: the extra
            [plot] is missing.
    """
    try:
        analysis = analyze(options)
    except OSError as error:
        where = error.filename or options.output
        raise HaclError(f"{where}: {error.strerror or error}; the same command goes on from there.") from None
    for group in analysis["findings"]:
        print("\n- ".join([f"{group['title']}:", *group["lines"]]) + "\n")
    page = Path(options.output) / "report.html"
    print(f"{page}: written, with analysis.json and {len(analysis['figures'])} pictures.")
    return 0


def analyze(options: AnalyzeOptions) -> dict[str, Any]:
    """Everything that `run` does but speak of it; returns what analysis.json holds."""
    from . import figures, measures

    names, bases = _check(options)
    figures.need()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before transformers is imported
    from . import representations

    items, counts, skipped = representations.sample_records(options.data, options.limit, options.seed)
    bos = None if options.visual_bos is None else options.visual_bos == "true"
    given = {"visual_bos": bos, "representation": options.representation, "prompt": options.prompt}
    config = representations.common_config(options.checkpoints, **given)
    out, found = Path(options.output), []
    out.mkdir(parents=True, exist_ok=True)
    how = {"config": config, "batch_size": options.batch_size, "workers": options.workers}
    how["options"] = options.settings()
    for name, path, base in zip(names, options.checkpoints, bases):
        file = out / f"representations-{slug(name)}.safetensors"
        x, cached = representations.represent(
            path, base, items, counts["sha256"], options.images, file, label=name, **how
        )
        print(f"{name}: {len(x.index)} records {'taken from' if cached else 'written to'} {file}", file=sys.stderr)
        found.append(x)
    found, items, unread = _same_records(found, items)
    for line in (skipped + unread)[:_NAMED]:
        print(f"left out: {line}", file=sys.stderr)
    analysis = measures.analyse(names, found, items, options.seed)
    analysis["data"] = {
        "file": os.path.abspath(options.data),
        "images": os.path.abspath(options.images),
        **counts,
        "limit": options.limit,
        "seed": options.seed,
        "used": len(items),
        "with_hallucinated": sum(bool(item.hallucinated) for item in items),
        "hallucinated": sum(len(item.hallucinated) for item in items),
        "kinds": Counter(kind or "unknown" for item in items for kind in item.kinds),
        "unreadable_images": len(unread),
        "skipped": skipped + unread,
    }
    analysis |= {"visual_bos": config.visual_bos, "representation": config.representation}
    analysis["prompt"] = config.prompt if config.representation == "prompt" else None
    analysis["figures"] = figures.draw(out, found, analysis, SPACES, list(dict.fromkeys(options.method)), options.seed)
    analysis |= {"provenance": provenance(options.seed), "findings": findings(analysis)}
    analysis = finite(analysis)
    write_json(out / "analysis.json", analysis)
    words = {"title": f"Representations: {', '.join(names)}", "labels": LABELS, "space_titles": SPACES, "named": _NAMED}
    write_text(out / "report.html", as_html("analysis.html.j2", analysis, out, **words))
    return analysis


def slug(name: str) -> str:
    """A name as part of a file's name."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"


def _check(options: AnalyzeOptions):
    count = len(options.checkpoints)
    if count > _MODELS:
        raise HaclError(f"{count} checkpoints are given; at most {_MODELS} stand side by side.")
    for flag, least in (("limit", 2), ("batch_size", 1), ("workers", 0)):
        if getattr(options, flag) < least:
            raise HaclError(f"--{flag.replace('_', '-')} is {getattr(options, flag)}; allowed are {least} and more.")
    names = options.names
    if not names:
        paths = [Path(os.path.abspath(path)) if os.path.isdir(path) else Path(path) for path in options.checkpoints]
        for parts in range(1, 6):
            names = ["/".join(path.parts[-parts:]) for path in paths]
            if len(set(map(slug, names))) == count:
                break
    if len(names) != count:
        raise HaclError(f"--name is given {len(names)} times for {count} checkpoints; give it once for each, or never.")
    if len(set(map(slug, names))) < count:
        raise HaclError(f"the names {', '.join(names)} are not different enough for files; give --name for each.")
    bases = options.bases or [None]
    if len(bases) not in (1, count):
        raise HaclError(f"--base is given {len(bases)} times for {count} checkpoints; give it once, or once for each.")
    return names, bases * count if len(bases) == 1 else bases


def _same_records(found, items):
    """Only the records that every model has: (representations, items, reasons of the others)."""
    shared = set.intersection(*(set(map(int, x.index)) for x in found))
    kept = [item for item in items if item.index in shared]
    if len(kept) < 2:
        raise HaclError(f"only {len(kept)} of {len(items)} records can be used for every model; 2 and more are needed.")
    unread = list(dict.fromkeys(line for x in found for line in x.skipped))
    return [x.only([item.index for item in kept]) for x in found], kept, unread


# --- in sentences -----------------------------------------------------------------------------------------------------


def _verdict(change, second):
    low, high = change["interval"]
    if low > 0:
        return f"higher in {second}"
    return f"lower in {second}" if high < 0 else "no clear difference"  # also where an interval is not known


def findings(analysis: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the numbers say, in plain sentences; a difference is named as one only where its interval leaves out 0.

    Returns:
        [{"title", "lines"}], one on the models by themselves and one for each comparison.
    """
    lines = []
    for model in analysis["models"]:
        for space, found in model["spaces"].items():
            if closer := found["measures"].get("closer_to_true"):
                low, high = closer["interval"]
                level = "above" if low > 0.5 else "below" if high < 0.5 else "not told apart from"
                known = f" [{low:.1%}, {high:.1%}]" if low == low else ""
                lines.append(
                    f"{model['name']}, {SPACES[space]}: in {closer['value']:.1%} of pairs{known} the "
                    f"image is closer to its true caption than to the hallucinated one: {level} chance (50%)."
                )
    groups = [{"title": "Each against chance", "lines": lines}] if lines else []
    values = {model["name"]: model["spaces"] for model in analysis["models"]}
    for comparison in analysis["comparisons"]:
        title = f"{comparison['second']} against {comparison['first']}"
        groups.append({"title": title, "lines": list(_compared(comparison, values))})
    return groups


def _compared(comparison, values):
    first, second = comparison["first"], comparison["second"]
    for space, found in comparison["spaces"].items():
        for measure in (name for name in _SPOKEN if name in found["measures"]):
            label, change = LABELS[measure][0], found["measures"][measure]
            a, b = (values[name][space]["measures"][measure]["value"] for name in (first, second))
            low, high = change["interval"]
            known = f" [{low:.3f}, {high:.3f}]" if low == low else ""
            yield (
                f"{label[0].upper()}{label[1:]}, {SPACES[space]}: {a:.3f} in {first}, {b:.3f} in {second}; "
                f"difference {change['difference']:+.3f}{known}: {_verdict(change, second)}."
            )
        verdicts = {}
        for kind, change in found["closer_to_true_by_kind"].items():
            verdicts.setdefault(_verdict(change, second), []).append(kind)
        if verdicts:
            said = "; ".join(f"{verdict}: {', '.join(kinds)}" for verdict, kinds in verdicts.items())
            yield f"Closer to true by kind, {SPACES[space]}: {said}."
    if comparison["same_captions"]:
        yield (
            "In the LLM's space both represent captions alike (the language model is the same): what differs is "
            "where images lie. What is measured there on captions alone cannot differ."
        )
    else:
        yield (
            "The two represent captions differently (another language model, or one that was trained): places "
            "in one panel are not places in the other, axes shared or not; only what lies near what in each counts."
        )
