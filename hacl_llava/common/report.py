"""Reports: HTML pages in one file, Markdown from blocks, the words for numbers on both, the style of pictures.

Whatever an answer or a name holds is shown, not interpreted.
"""

import base64
import functools
import importlib.metadata
import io
import os
import platform
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from .files import is_number, write_bytes
from .images import open_image

if TYPE_CHECKING:
    from types import ModuleType

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEMPLATES = Path(__file__).parent / "templates"
# Okabe and Ito's colours, told apart by the colour-blind; each has a shape of its own, too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLES = ("-", "--", "-.", ":")


# ---- words


def shorten(text: Any, length: int) -> str:
    """Text of at most ``length`` characters, the last one … where something was cut off."""
    text = str(text)
    return text if len(text) <= length else text[: length - 1] + "…"


def as_words(value: Any) -> str:
    """A json value for people to read."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {as_words(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(as_words, value))
    text = f"{value:.6g}" if isinstance(value, float) else str(value).strip()
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{28,}\b", r"\1…", text)  # of a digest or commit the beginning will do


def figure(entry: Mapping[str, Any] | None, key: str = "value") -> str:
    """A figure with its interval, in words.

    Args:
        entry: {key: number, "interval": [low, high]}; either may be unknown. key: "difference" is shown with its sign.
    """
    if entry is None or not is_number(entry[key]):
        return "-" if entry is None else "undefined"
    sign, interval = "+" if key == "difference" else "", entry.get("interval") or [None]
    known = all(map(is_number, interval))
    return f"{entry[key]:{sign}.3f}" + (" [{:{s}.3f}, {:{s}.3f}]".format(*interval, s=sign) if known else "")


def counted(number: int, thing: str) -> str:
    """``1 question``, ``2 questions``."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def version(distribution: str) -> str | None:
    """The version of a distribution that is installed here; None: it is not."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def provenance(seed: int | None = None) -> dict[str, Any]:
    """What made a result: versions, command line, commit of the checkout if there is one, and the seed."""
    versions = {"hacl_llava": __version__, "python": platform.python_version()}
    versions |= {"torch": version("torch"), "transformers": version("transformers"), "llava": version("llava-torch")}
    # Only of this package's own checkout: installed elsewhere, git would answer for whatever repository lies around it.
    root = Path(__file__).parents[2]
    commit = None
    if (root / ".git").exists():
        git = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True)
        commit = git.stdout.strip() or None
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"versions": versions, "command": command, "commit": commit, "seed": seed}


# ---- pages


def literal(text: Any) -> str:
    """Markdown that shows this text, on one line, and means nothing else."""
    text = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # A # at the end would close a heading. Between letters or digits _ means nothing: names stay easy to search for.
    return re.sub(r"([\\`*|\[\]$!~]|#$|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", text)


def literal_line(text: Any) -> str:
    """`literal` text that may begin a line: no heading, no list."""
    return re.sub(r"^(\d*)([.)+=#-])", r"\1\\\2", literal(text))


def table(head: Sequence, rows: Iterable[Sequence]) -> str:
    """A Markdown table, whose cells are shown as they are; no newline at its end.

    Args:
        head: names of the columns. rows: of as many cells each.
    """
    lines = ["| " + " | ".join(map(literal, line)) + " |" for line in (head, *rows)]
    return "\n".join([lines[0], "|" + " --- |" * len(head), *lines[1:]])


@functools.cache
def _template(name):
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=lambda name: name.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters.update(
        literal=literal, literal_line=literal_line, words=as_words, figure=figure, counted=counted, shorten=shorten
    )
    templates.globals["table"] = table
    return templates.get_template(name)


def data_uri(path: str | os.PathLike) -> str:
    """A JPEG or PNG file as an address that holds the picture itself."""
    kind = "jpeg" if Path(path).suffix == ".jpg" else "png"
    return f"data:image/{kind};base64,{base64.b64encode(Path(path).read_bytes()).decode()}"


def as_html(body: str, found: Mapping[str, Any], output: str | os.PathLike, **more: Any) -> str:
    """A page as one HTML file that needs no other, with no script.

    Args:
        body: the template of what it says. found: a report's dict, whose keys, "title" among them, are the template's
            names. output: the folder of its pictures. more: what else the template uses.

    Raises:
        OSError: a picture cannot be read.
    """
    names = {**found, **more, "body": body, "data_uri": lambda file: data_uri(Path(output) / file)}
    # A page can hold no control characters; half a surrogate pair is seen to by `write_text`.
    return (
        re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe\uffff]", "\ufffd", _template("page.html.j2").render(names))
        + "\n"
    )


def as_markdown(blocks: Iterable[tuple]) -> str:
    """A page as Markdown.

    Args:
        blocks: ``("heading", level, text)``, ``("text", text)``, ``("code", text)``, ``("picture", file, what it
            shows)``, whose file lies beside the page, or ``("table", head, rows)``.
    """
    return _template("page.md.j2").render(blocks=[(*block, None)[:3] for block in blocks]).strip("\n") + "\n"


# ---- pictures


def thumbnail(path: str | os.PathLike, side: int = 320) -> bytes:
    """JPEG bytes of an image, at most ``side`` pixels wide and high; small ones enlarged by whole pixels.

    Raises:
        HaclError: it is missing, or no image that Pillow reads.
    """
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = open_image(path)  # as the model saw it
    times = side // max(image.size)
    if times > 1:
        image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=88, subsampling=0)
    return file.getvalue()


def pyplot() -> "ModuleType":
    """matplotlib.pyplot that opens no window; ImportError names the extra."""
    try:
        import matplotlib
    except ImportError:
        raise ImportError("pictures need matplotlib: pip install 'hacl_llava[plot]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plain(text: str) -> str:
    """Text that matplotlib draws as it is: no mathematics between $, no name hidden from a legend for its first _."""
    text = text.encode("utf-8", "replace").decode().replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def dots(
    axis: "Axes", rows: Sequence[str], series: Mapping[str, Mapping[str, Mapping[str, Any]]], key: str = "value"
) -> dict[str, Any]:
    """Figures as dots with their intervals, from top to bottom.

    Args:
        rows: names of the rows. series: {name: {row: {key: number, "interval": [low, high]}}}, each with a colour and
            a shape of its own; what is not known is not drawn.

    Returns:
        {name: handle for a legend} of what was drawn.
    """
    handles = {}
    for k, (name, entries) in enumerate(series.items()):
        known = [(y, entries[row]) for y, row in enumerate(rows) if is_number(entries.get(row, {}).get(key))]
        look = {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k % len(MARKERS)], "linestyle": ""}
        offset = (k - (len(series) - 1) / 2) * 0.6 / len(series)
        for y, entry in known:
            if all(map(is_number, entry["interval"] or [None])):
                axis.plot(entry["interval"], [y + offset] * 2, color=look["color"], linewidth=1.5)
        if known:
            x, y = [entry[key] for _, entry in known], [y + offset for y, _ in known]
            handles[name] = axis.plot(x, y, markersize=5, label=plain(name), **look)[0]
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.grid(axis="x", color="0.9")
    axis.set_axisbelow(True)
    return handles


def save(figure: "Figure", path: str | os.PathLike) -> None:
    """Write a figure to a PNG file, which appears whole or not at all, and close it."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name in letters that the font lacks
        figure.savefig(file, format="png", dpi=120, metadata={"Software": None})
    write_bytes(path, file.getvalue())
    pyplot().close(figure)
