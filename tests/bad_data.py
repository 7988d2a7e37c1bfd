"""Everything that was thought of as bad data, in one table, which tests/middle/test_check_data.py runs.

``python tests/bad_data.py`` writes it into docs/reliability/bad-data.md.
"""

import gzip
import json
import os
import re
import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

PAGE = Path(__file__).parent.parent / "docs/reliability/bad-data.md"
OUTCOMES = {
    "unreadable": "refused, the file as a whole",
    "refused": "refused",
    "warned": "warning",
    "fine": "trained on",
}
SHOWN = {"fast": "fast", "full": "full", "tokens": "--tokenizer"}
CAPTION = "a red ring at the top"


class Case(NamedTuple):
    """``change`` makes it: a function of the good record, or of the folder if ``how`` is about the file."""

    name: str
    how: str
    outcome: str  # of OUTCOMES
    shown: str  # of SHOWN: the cheapest check that sees it
    message: str  # what the message says after the record's name
    change: Any
    version: str = "plain"


def record(i, **more):
    """A record that is fine."""
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": CAPTION}]
    return {"id": f"good-{i}", "image": "good.png", "conversations": turns, **more}


def make(case, folder):
    """Write the case into ``folder``: data.json, in which record 1 of three is the bad one, and images/."""
    from PIL import Image

    images = folder / "images"
    images.mkdir()
    Image.new("RGB", (40, 30), (200, 10, 20)).save(images / "good.png")
    rows = [record(0), record(1, id="bad"), record(2)]
    if case.outcome == "unreadable" or case.change.__code__.co_varnames[:1] == ("rows",):
        found = case.change(rows)
        name, data = found if isinstance(found, tuple) else ("data.json", found)
        if data is not None:
            (folder / name).write_bytes(data)
        return folder / name
    found = case.change(rows[1], images) if case.change.__code__.co_argcount == 2 else case.change(rows[1])
    rows[1] = rows[1] if found is None else found
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


# --- how they are made ------------------------------------------------------------------------------------------------


def dumped(rows, **options):
    return json.dumps(rows, **options).encode()


def lines(rows):
    return "\n".join(json.dumps(row) for row in rows).encode()


def setting(**changes):
    return lambda r: {**r, **changes}


def turns(*pairs):
    return setting(conversations=[{"from": role, "value": value} for role, value in pairs])


def caption(text):
    return turns(("human", "<image>\nWhat?"), ("gpt", text))


def without(*keys):
    return lambda r: {k: v for k, v in r.items() if k not in keys}


def saved(name, mode="RGB", size=(40, 30), color=0, **options):
    def change(r, images):
        from PIL import Image

        Image.new(mode, size, color).save(images / name, **options)
        r["image"] = name

    return change


def written(name, data):
    def change(r, images):
        (images / name).write_bytes(data(images) if callable(data) else data)
        r["image"] = name

    return change


def animated(r, images):
    from PIL import Image

    frames = [Image.new("RGB", (40, 30), (60 * i, 0, 0)) for i in range(3)]
    frames[0].save(images / "moving.gif", save_all=True, append_images=frames[1:])
    r["image"] = "moving.gif"


def turned(r, images):
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(images / "turned.jpg", exif=exif)
    r["image"] = "turned.jpg"


def deep(r, images):
    from PIL import Image

    Image.new("I;16", (40, 30), 40000).save(images / "deep.png")
    r["image"] = "deep.png"


def header(width, height):
    """A png of which only the header is true."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + b"\0\0\0\0IDAT"


def linked(r, images):
    (images.parent / "secret.png").write_bytes((images / "good.png").read_bytes())
    os.symlink(images.parent / "secret.png", images / "link.png")
    r["image"] = "link.png"


def linked_folder(r, images):
    (images.parent / "elsewhere").mkdir()
    os.replace(images / "good.png", images.parent / "elsewhere/a.png")
    (images / "good.png").write_bytes((images.parent / "elsewhere/a.png").read_bytes())
    os.symlink(images.parent / "elsewhere", images / "coco")
    r["image"] = "coco/a.png"


def locked(r, images):
    (images / "locked.png").write_bytes((images / "good.png").read_bytes())
    (images / "locked.png").chmod(0)
    r["image"] = "locked.png"


def other_name(r, images):
    (images / "Photo.GIF").write_bytes((images / "good.png").read_bytes())
    r["image"] = "photo.jpg"


def folder_instead(r, images):
    (images / "sub.png").mkdir()
    r["image"] = "sub.png"


H = "hallucinated_captions"
Q, A = ("human", "<image>\nWhat?"), ("gpt", "A ring.")
CASES = [
    # the file
    Case("no file", "the file is not there", "unreadable", "fast", "cannot be read (No such file or directory)",
         lambda rows: None),
    Case("empty file", "0 bytes", "unreadable", "fast", "is empty, expected a list of LLaVA records", lambda rows: b""),
    Case("no records", "`[]`", "unreadable", "fast", "holds no records", lambda rows: b"[]"),
    Case("not json", "a page of text", "unreadable", "fast", "begins with '<html>', expected '[' (a list)",
         lambda rows: b"<html>"),
    Case("not a list", '`{"data": [...]}`', "unreadable", "fast", "holds a dict, expected a list",
         lambda rows: dumped({"data": rows})),
    Case("truncated json", "its last 20 bytes are gone", "unreadable", "fast", "It looks truncated",
         lambda rows: dumped(rows)[:-20]),
    Case("comma at the end", "`[...,]`", "unreadable", "fast", "a comma before its ']'",
         lambda rows: dumped(rows)[:-1] + b",]"),
    Case("two lists in a file", "`[...][...]`", "unreadable", "fast", "more text after its ']'",
         lambda rows: dumped(rows) * 2),
    Case("not UTF-8", "saved as Latin-1", "unreadable", "fast", "not UTF-8 text",
         lambda rows: '[{"a": "café"}]'.encode("latin-1")),
    Case("damaged gzip", "half of a .json.gz", "unreadable", "fast", "the gzip file is damaged or cut off",
         lambda rows: ("data.json.gz", gzip.compress(dumped(rows))[:80])),
    Case("nested too deeply", "100,000 brackets", "unreadable", "fast", "nested too deeply",
         lambda rows: b"[" * 100_000),
    Case("byte order mark", "EF BB BF before the list", "fine", "fast", "",
         lambda rows: b"\xef\xbb\xbf" + dumped(rows)),
    Case("json lines", "a record a line, .jsonl", "fine", "fast", "", lambda rows: ("data.jsonl", lines(rows))),
    Case("gzip", ".json.gz", "fine", "fast", "", lambda rows: ("data.json.gz", gzip.compress(dumped(rows)))),
    Case("duplicate id", "two records have the same id", "warned", "fast", "has the id of record 0",
         setting(id="good-0")),
    # the record's form
    Case("no object", "a string where a record should be", "refused", "fast", "is a str, expected a LLaVA record",
         lambda r: "caption"),
    Case("no conversations", "the key is missing", "refused", "fast", "has no 'conversations'",
         without("conversations")),
    Case("empty conversations", "`[]`", "refused", "fast", "has no 'conversations'", setting(conversations=[])),
    Case("value is no text", "a number as answer", "refused", "fast", "has the turn \"{'from': 'gpt', 'value': 7}\"",
         turns(Q, ("gpt", 7))),
    Case("unknown role", "from `user`", "refused", "fast", "has a turn from 'user', allowed are 'human' and 'gpt'",
         turns(("user", "<image>\nWhat?"), A)),
    Case("too many turns for plain", "two questions", "refused", "fast",
         "has 4 turns, but --version plain takes one question and one answer", turns(Q, A, ("human", "And?"), A)),
    Case("answer before question in plain", "`gpt`, `human`", "refused", "fast",
         "but --version plain takes one question and one answer", turns(A, Q)),
    Case("turns out of order", "two questions in a row", "refused", "fast", "question and answer must alternate",
         turns(Q, ("human", "And?"), A), "v1"),
    Case("no answer at the end", "the last turn is a question", "warned", "fast", "does not end with an answer",
         turns(Q, A, ("human", "And?")), "v1"),
    Case("nothing in it", "no image, empty texts", "refused", "fast", "has no image and no text",
         lambda r: without("image")(turns(("human", ""), ("gpt", " "))(r))),
    # <image>
    Case("no <image>", "an image, and a question without the placeholder", "refused", "fast",
         "has an image but no <image> in its question", turns(("human", "What?"), A)),
    Case("no <image> in a conversation", "the same for v1: LLaVA trains it as text", "warned", "fast",
         "it is trained as text", turns(("human", "What?"), A), "v1"),
    Case("two <image> in one question", "LLaVA merges them", "warned", "fast", "has <image> more than once in a turn",
         turns(("human", "<image><image>\nWhat?"), A)),
    Case("two <image> in two questions", "one image: the rows behind it would get each other's", "refused", "fast",
         "has <image> in 2 turns and one image", turns(Q, A, Q, A), "v1"),
    Case("<image> in the caption", "literal", "refused", "fast",
         "has <image> in an answer: LLaVA would take it for a second image", caption("an <image> of a ring")),
    Case("<image> without an image", "no key `image`", "refused", "fast", "has <image> in its question but no 'image'",
         without("image")),
    Case("<image> as text", "no image, v1: code with an <image> tag, say", "warned", "fast",
         "has <image> but no 'image': it is trained as text", without("image"), "v1"),
    Case("<image> in a hallucinated caption", "literal", "warned", "fast",
         "has <image> in a hallucinated caption, where it is text", setting(**{H: ["an <image> of a dog"]})),
    Case("image is null", "`null`", "refused", "fast", "has the image None, expected a path relative to --image_folder",
         setting(image=None)),
    Case("image is empty", '`""`', "refused", "fast", "has the image '', expected a path", setting(image="")),
    Case("image is a list", "several images", "refused", "fast", "has the image ['a.png', 'b.png'], expected a path",
         setting(image=["a.png", "b.png"])),
    # the image file
    Case("image missing", "no such file", "refused", "fast", "nowhere.png, which does not exist",
         setting(image="nowhere.png")),
    Case("image under another name", "Photo.GIF where photo.jpg is asked for", "refused", "fast",
         "photo.jpg, which does not exist; 'Photo.GIF' does", other_name),
    Case("image's folder missing", "no such folder", "refused", "fast",
         "which does not exist (nor does its folder: --image_folder is", setting(image="no/such/folder.png")),
    Case("image is a folder", "a folder of that name", "refused", "fast", "sub.png, which is a folder", folder_instead),
    Case("NUL in the name", "`a\\0.png`", "refused", "fast", "which does not exist", setting(image="a\0.png")),
    Case("path with ..", "`../../etc/passwd`", "refused", "fast",
         "has the image '../../etc/passwd', which leads outside --image_folder", setting(image="../../etc/passwd")),
    Case("absolute path", "`/etc/passwd`", "refused", "fast",
         "has the image '/etc/passwd', which leads outside --image_folder", setting(image="/etc/passwd")),
    Case("link to a file outside", "a symbolic link", "refused", "fast",
         "link.png, a link that leads outside the image folder", linked),
    Case("linked folder", "images/coco is a link to where the images are", "fine", "full", "", linked_folder),
    Case("no permission", "mode 000", "refused", "full", "locked.png, which cannot be read (Permission denied)",
         locked),
    Case("empty image", "0 bytes", "refused", "full", "empty.png, which is empty", written("empty.png", b"")),
    Case("truncated image", "the first half of it", "refused", "full", "which cannot be read (",
         written("half.jpg", lambda images: _jpeg()[: len(_jpeg()) // 2])),
    Case("not an image", "a page of text named .jpg", "refused", "full",
         "page.jpg, which is not an image that Pillow reads", written("page.jpg", b"<html>404</html>")),
    Case("30,000 x 30,000 pixels", "a decompression bomb: a png of 60 bytes", "refused", "full",
         "too large to be opened", written("bomb.png", header(30_000, 30_000))),
    Case("30,000 x 1 pixels", "LLaVA would scale it to 10,080,000 x 336", "refused", "full", "of 30000 x 1, which is",
         saved("line.png", size=(30_000, 1))),
    Case("30,000 x 100 pixels, padded", "--image_aspect_ratio pad: 900 million pixels", "refused", "full",
         "900,000,000 pixels when padded to a square", saved("long.png", size=(30_000, 100)), "v1"),
    Case("1 pixel high", "40 x 1: transformers 4 takes it for one channel", "refused", "full",
         "of 40 x 1, which transformers before 5 cannot read", saved("flat.png", size=(40, 1))),
    Case("1 pixel", "1 x 1", "refused", "full", "of 1 x 1, which transformers before 5 cannot read",
         saved("dot.png", size=(1, 1))),
    Case("3 pixels high", "40 x 3: transformers 4 takes rows for channels", "warned", "full",
         "of 40 x 3, which transformers before 5 misread", saved("three.png", size=(40, 3))),
    Case("extreme shape", "1200 x 40", "warned", "full", "of which little is left in a square",
         saved("wide.png", size=(1200, 40))),
    Case("animated", "a gif of three frames", "warned", "full", "animated: its first frame is taken", animated),
    Case("transparent", "RGBA with alpha 0", "warned", "full", "partly transparent: what it hides is shown",
         saved("glass.png", "RGBA", color=(9, 9, 9, 0))),
    Case("16 bits", "a 16-bit grey png", "warned", "full", "with more than 8 bits (mode I;16): it becomes nearly white",
         deep),
    Case("EXIF orientation", "a photo to be turned by 90 degrees", "warned", "full",
         "which its EXIF data turns; LLaVA takes it as it is stored", turned),
    Case("gif", "one frame", "fine", "full", "", saved("still.gif", "P")),
    Case("CMYK", "a jpeg for print", "fine", "full", "", saved("print.jpg", "CMYK")),
    Case("palette", "a png of 256 colours", "fine", "full", "", saved("palette.png", "P")),
    Case("RGBA, opaque", "alpha 255", "fine", "full", "", saved("opaque.png", "RGBA", color=(9, 9, 9, 255))),
    Case("grey", "8 bits", "fine", "full", "", saved("grey.png", "L")),
    # texts
    Case("empty caption", '`""`', "warned", "fast", "has an empty answer", caption("")),
    Case("empty answer in a conversation", '`""`, v1', "warned", "fast",
         "has an empty answer: LLaVA masks the whole conversation", turns(Q, A, ("human", "And?"), ("gpt", "")), "v1"),
    Case("caption too long", "2,100 words, a context of 2,048 tokens", "warned", "fast",
         "has 2100 words and a context of 2048 tokens: it is cut", caption("ring " * 2100)),
    Case("</s> in a caption", "literal, stage 1", "warned", "fast", "which tokenizers take for a special token",
         caption("a ring</s> on top")),
    Case("</s> in a conversation", "literal, v1", "warned", "fast",
         "LLaVA takes </s> for an answer's end and masks all of it", caption("a ring</s> on top"), "v1"),
    Case("<s> in a caption", "literal", "warned", "fast", "has '<s>a ring', which tokenizers take for a special token",
         caption("<s>a ring")),
    Case("the template's words", "`ASSISTANT: ` in a question, v1", "warned", "fast", "has ' ASSISTANT: ' in a turn",
         turns(("human", "<image>\nUSER: Hi ASSISTANT: Hello"), A), "v1"),
    Case("half a surrogate pair", "`\\ud83d` alone", "refused", "fast",
         "has half of a surrogate pair in 'a ring \\ud83d'", caption("a ring \ud83d")),
    Case("half a surrogate pair in a hallucinated caption", "`\\udc00` alone", "refused", "fast",
         "has half of a surrogate pair", setting(**{H: ["\udc00"]})),
    Case("NUL in a caption", "`\\0`", "warned", "fast", "has characters that nobody sees (U+0000)", caption("a\0ring")),
    Case("text direction marks", "U+202E turns what follows around", "warned", "fast",
         "has characters that nobody sees (U+202E)", caption("a \u202ering")),
    Case("zero width", "U+200B inside a word", "warned", "fast", "has characters that nobody sees (U+200B)",
         caption("a ri\u200bng")),
    Case("emoji and other scripts", "a whole surrogate pair, accents, Chinese", "fine", "fast", "",
         caption("ein Hündchen 🐕 在这里")),
    # hallucinated captions
    Case("hallucinated: wrong type", "a number", "refused", "fast",
         "'hallucinated_captions' is '7', expected a string or a list of strings", setting(**{H: 7})),
    Case("hallucinated: wrong type in the list", "a list in it", "refused", "fast",
         "expected a string or a list of strings", setting(**{H: ["a", ["b"]]})),
    Case("hallucinated equals the caption", "but for case and a full stop", "warned", "fast",
         "has its own caption among the hallucinated ones", setting(**{H: ["A red ring at the top."]})),
    Case("hallucinated twice", "the same caption two times", "warned", "fast",
         "has the same hallucinated caption twice", setting(**{H: ["a dog", "a dog"]})),
    Case("kinds out of step", "one kind for two captions", "warned", "fast",
         "has 1 'hallucinated_kinds' for 2 hallucinated captions",
         setting(**{H: ["a dog", "a cat"], "hallucinated_kinds": ["attribute"]})),
    Case("hallucinated is null", "`null`: none", "fine", "fast", "", setting(**{H: None})),
    # what only the tokenizer shows
    Case("tokenization mismatch", "an empty second question, v1", "warned", "tokens",
         "is masked whole by LLaVA (tokenization mismatch: ", turns(Q, A, ("human", ""), A), "v1"),
    Case("too many tokens", "one word of 3,000 letters", "warned", "tokens", "tokens and a context of 2048: it is cut",
         caption("xq" * 1500)),
]  # fmt: skip


def _jpeg():
    import io
    import random

    from PIL import Image

    data, noise = io.BytesIO(), random.Random(0)
    Image.frombytes("RGB", (64, 64), noise.randbytes(64 * 64 * 3)).save(data, "jpeg")
    return data.getvalue()


def table():
    """The cases as a table in Markdown."""

    def cell(text):
        return re.sub(r"<(?=[a-z/])", "&lt;", text).replace("|", "\\|") if "`" not in text else text

    rows = ["| # | Case | Made by | Becomes | Seen by | Message |", "|---|---|---|---|---|---|"]
    for number, case in enumerate(CASES, 1):
        message = f"`{case.message}`" if case.message else ""
        version = "" if case.version == "plain" else f" ({case.version})"
        rows.append(
            f"| {number} | {cell(case.name)}{version} | {cell(case.how)} | {OUTCOMES[case.outcome]} "
            f"| {SHOWN[case.shown]} | {message} |"
        )
    return "\n".join(rows) + "\n"


BEGIN, END = "<!-- from tests/bad_data.py -->\n", "<!-- end -->\n"


def page(text):
    """The page with the table in its place."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}{table()}{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
