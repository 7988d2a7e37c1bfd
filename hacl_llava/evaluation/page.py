"""A page of blocks as one self-contained HTML file, and as Markdown with its pictures beside it.

Blocks: ``("heading", level, text)``, ``("text", text)``, ``("list", texts)``, ``("code", text)``,
``("picture", file, what it shows)``, ``("figure", file, what it shows)`` that says so below it, ``("table", head,
rows)``, ``("gallery", entries)`` of `runs.draw_gallery`. All texts are plain: whatever an answer holds is shown, not
interpreted.
"""

import base64
import html
import io
import re
import warnings

from ..common.images import open_image

_LONGEST = 1500  # characters of an answer that are shown


def shorten(text, length):
    """Text of at most ``length`` characters, the last one … where something was cut off."""
    text = str(text)
    return text if len(text) <= length else text[: length - 1] + "…"


def as_words(value):
    """A json value for people to read."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {as_words(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(as_words, value))
    text = f"{value:.6g}" if isinstance(value, float) else str(value).strip()
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{28,}\b", r"\1…", text)  # of a digest or commit the beginning will do


def thumbnail(path, side=320):
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


_STYLE = """
body { font: 16px/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; color: #1a1a1a; background: #fff;
  max-width: 68rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; line-height: 1.25; } h2 { margin-top: 2.4rem; border-bottom: 1px solid #bbb; }
h3 { margin-bottom: .3rem; }
h1, h2, h3, p, li { overflow-wrap: anywhere; } .wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .7rem 0; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { border: 1px solid #ccc; padding: .25rem .55rem; text-align: left; vertical-align: top; white-space: pre-line;
  overflow-wrap: break-word; }
thead th { background: #f2f2f2; } tbody th { font-weight: 600; }
img { max-width: 100%; height: auto; } figure { margin: 1.5rem 0; } figcaption { color: #444; font-size: .92rem; }
.answer { white-space: pre-wrap; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: .6rem; font-size: .82rem; }
.gallery { display: flex; flex-wrap: wrap; gap: 1rem; }
.card { border: 1px solid #ccc; padding: .7rem; width: 19.6rem; font-size: .88rem; box-sizing: border-box; }
.card img { display: block; margin: 0 auto .5rem; } .card p { margin: .3rem 0; }
.small { color: #555; font-size: .8rem; }
.missing { border: 1px dashed #888; padding: 2rem .5rem; text-align: center; color: #555; }
@media print { body { font-size: 11pt; max-width: none; margin: 0; } h2, h3 { break-after: avoid; }
  .card, tr, img { break-inside: avoid; } .gallery { display: block; }
  .card { display: inline-block; vertical-align: top; width: 31%; margin: 0 .5% .6rem; font-size: .7rem; } }
""".strip()


def _img(path, text):
    kind, data = "jpeg" if path.suffix == ".jpg" else "png", base64.b64encode(path.read_bytes()).decode()
    return f'<img src="data:image/{kind};base64,{data}" alt="{html.escape(str(text))}">'


def as_html(blocks, title, output):
    """The page as one HTML file that needs no other: pictures of the folder ``output`` as data URIs, no script."""
    esc = html.escape
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{esc(title)}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n<body>",
    ]
    for kind, *block in blocks:
        if kind == "heading":
            parts.append(f"<h{block[0]}>{esc(block[1])}</h{block[0]}>")
        elif kind == "text":
            parts.append(f"<p>{esc(block[0])}</p>")
        elif kind == "code":
            parts.append(f"<pre>{esc(block[0])}</pre>")
        elif kind == "list":
            parts.append("<ul>\n" + "\n".join(f"<li>{esc(x)}</li>" for x in block[0]) + "\n</ul>")
        elif kind == "picture":
            parts.append(f"<p>{_img(output / block[0], block[1])}</p>")
        elif kind == "figure":
            caption = f"<figcaption>{esc(block[1])}</figcaption>"
            parts.append(f"<figure>{_img(output / block[0], block[1])}{caption}</figure>")
        elif kind == "table":
            head = "".join(f'<th scope="col">{esc(str(x))}</th>' for x in block[0])
            rows = [
                f'<tr><th scope="row">{esc(str(first))}</th>'
                + "".join(f"<td>{esc(str(x))}</td>" for x in rest)
                + "</tr>"
                for first, *rest in block[1]
            ]
            body = "<tbody>\n" + "\n".join(rows) + "\n</tbody>"
            parts.append(f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n{body}\n</table></div>')
        elif kind == "gallery":
            parts.append('<div class="gallery">')
            for entry in block[0]:
                if entry["picture"]:
                    image = _img(output / entry["picture"], entry.get("image"))
                else:
                    image = f'<p class="missing">no picture: {esc(entry["problem"])}</p>'
                lines = [f'<p class="small">{esc(_entry_name(entry))}</p>']
                for name, text, note in _entry_lines(entry):
                    note = f" <em>({esc(note)})</em>" if note else ""
                    lines.append(f'<p><b>{esc(name)}</b>{note}: <span class="answer" dir="auto">{esc(text)}</span></p>')
                parts.append('<div class="card">' + image + "\n" + "\n".join(lines) + "</div>")
            parts.append("</div>")
    return "\n".join(parts) + "\n</body>\n</html>\n"


def _entry_name(entry):
    return f"{entry['task']}, question {entry['id']}, {entry.get('image')}"


def _entry_lines(entry):
    """(name, text, note) of what stands below a picture."""
    yield "question", shorten(entry.get("question", "-"), _LONGEST), ""
    if entry.get("label") is not None:
        yield "label", as_words(entry["label"]), ""
    for name, answer in entry["answers"].items():
        note = "" if "right" not in entry else "right" if entry["right"] == name else "wrong"
        yield name, "(empty)" if answer in (None, "") else shorten(answer, _LONGEST), note
        for what, value in entry.get("facts", {}).get(name, {}).items():
            yield what, shorten(as_words(value), 400), ""


def _cell(text):
    """Markdown that shows this text, on one line, and means nothing else."""
    text = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_|\[\]$!~])", r"\\\1", text)


def _line(text):
    """`_cell` that may begin a line: no heading, no list."""
    return re.sub(r"^(\d*)([.)+=#-])", r"\1\\\2", _cell(text))


def as_markdown(blocks):
    """The page as Markdown; its pictures lie beside it."""
    parts = []
    for kind, *block in blocks:
        if kind == "heading":
            parts.append("#" * block[0] + " " + _cell(block[1]))
        elif kind == "text":
            parts.append(_line(block[0]))
        elif kind == "code":
            parts.append("\n".join("    " + line for line in block[0].splitlines()))
        elif kind == "list":
            parts.append("\n".join(f"- {_line(x)}" for x in block[0]))
        elif kind == "picture":
            parts.append(f"![{_cell(block[1])}]({block[0]})")
        elif kind == "figure":
            parts.append(f"![{_cell(block[1])}]({block[0]})\n\n{_line(block[1])}")
        elif kind == "table":
            lines = ["| " + " | ".join(map(_cell, block[0])) + " |", "|" + " --- |" * len(block[0])]
            parts.append("\n".join(lines + ["| " + " | ".join(map(_cell, row)) + " |" for row in block[1]]))
        elif kind == "gallery":
            for entry in block[0]:
                if entry["picture"]:
                    parts.append(f"![{_cell(entry.get('image'))}]({entry['picture']})")
                else:
                    parts.append(f"(no picture: {_cell(entry['problem'])})")
                lines = [_line(_entry_name(entry))]
                for name, text, note in _entry_lines(entry):
                    lines.append(f"**{_cell(name)}**" + (f" ({note})" if note else "") + f": {_cell(text)}")
                parts.append("\n".join(f"- {line}" for line in lines))
    return "\n\n".join(parts) + "\n"
