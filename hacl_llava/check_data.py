"""Whether data can be trained on: ``hacl-llava check-data``, and the same before a run starts.

A finding is an error where stock LLaVA would end the run, or spoil other records of the batch; it is a warning where
the record is trained on, but most likely not as it was meant.
"""

import collections
import contextlib
import functools
import io
import json
import multiprocessing
import os
import re
import sys
import time
import types
import unicodedata
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import __version__
from .common.files import write_text
from .common.images import image_path, size_problem
from .common.options import argument, option, whole
from .config import HaclConfig, HaclError, on_first_rank
from .records import (
    HALLUCINATED_KEYS,
    KINDS_KEY,
    DataError,
    caption_of,
    hallucinated_captions,
    list_records,
    name_of,
    problem_of,
    stream_records,
    unblock,
    write_records,
)

if TYPE_CHECKING:  # it imports transformers, which a command line does when it runs
    from .run import Run

REMEDIES = {
    # errors
    "form": "bring the record into LLaVA's form, or remove it",
    "template": "give it the turns that the template takes, or train it with another --version",
    "placeholder": "leave one <image>, in the first question",
    "unicode": "rewrite the text: half of a surrogate pair is no character, and tokenizers refuse it",
    "nothing": "remove the record",
    "path": "give paths below --image_folder (to link a whole folder into it is fine)",
    "missing": "add the image, correct its name, or remove the record",
    "unreadable": "replace the image by a whole one, or remove the record",
    "size": "scale or cut the image",
    "preprocess": "look at the record with the message of LLaVA's code",
    "vocabulary": "give the tokenizer that the language model was made with",
    # warnings
    "id": "give each record an id of its own; training does not need them, messages do",
    "ignored image": "put <image> into the first question",
    "literal token": "take it out, or write it in another way",
    "characters": "take them out",
    "empty": "write a caption, or remove the record",
    "hallucinated": "remove that hallucinated caption, or make it again (hacl-llava hallucinate --replace)",
    "kinds": "give one kind for each hallucinated caption, in the same order",
    "long": "shorten it, or raise --model_max_length",
    "masked": "repair the conversation: as it is, nothing is learnt from it",
    "appearance": "convert the image as it is meant to look (RGB, 8 bits, turned upright)",
}
ERRORS = tuple(REMEDIES)[:11]
PLAIN = ("plain", "v0_plain")  # templates of stage 1
_SURROGATE = re.compile("[\ud800-\udfff]")
_ODD = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]")
_SPECIAL = re.compile(r"</?s>|<unk>")


class Finding(NamedTuple):
    """What is wrong with a record: ``text`` goes on from its name; ``kind`` is a key of `REMEDIES`."""

    index: int
    kind: str
    text: str

    @property
    def severity(self) -> str:
        """ "error" or "warning"."""
        return "error" if self.kind in ERRORS else "warning"


# --- one record -------------------------------------------------------------------------------------------------------


def text_findings(record: Any, plain: bool, max_length: int | None = None) -> list[tuple[str, str]]:
    """(kind, text) of what is wrong with a record by itself, errors first; no file is opened.

    Args:
        plain: it has to suit LLaVA's stage-1 template; else a template of conversations.
        max_length: tokens of the context, if known; there are no fewer tokens than words.
    """
    if problem := problem_of(record, plain):
        return [("form", problem)]
    turns, with_image = record["conversations"], "image" in record
    values, caption, hallucinated = [t["value"] for t in turns], caption_of(record), hallucinated_captions(record)
    texts = values + hallucinated
    joined = "\n".join(texts)
    found = []
    if "<image>" in joined or with_image:
        found += _placeholder_findings(turns, with_image, plain, hallucinated)
    if not plain:
        found += _conversation_findings(turns, with_image)
    elif not caption and (with_image or any(v.split() for v in values)):
        found.append(("empty", "has an empty answer: nothing is learnt from it"))
    if not with_image and not any(v.split() for v in values):
        found.append(("nothing", "has no image and no text"))
    ends = not plain and any("</s>" in v for v in values)  # said already
    found += _character_findings(texts, joined, special=not ends)
    found += _hallucinated_findings(record, caption, hallucinated)
    if max_length and len(joined) > max_length:  # a word is two characters or more, with its space
        words = max(len(v.split()) for v in ([" ".join(values)] if not plain else texts))
        if words > max_length:
            found.append(("long", f"has {words} words and a context of {max_length} tokens: it is cut"))
    return sorted(found, key=lambda f: f[0] not in ERRORS)


def _conversation_findings(turns, with_image):
    roles = [t["from"] for t in turns]
    roles = roles[roles[0] == "gpt" :]  # LLaVA passes over an answer that comes first
    if roles != ["human", "gpt"] * (len(roles) // 2) + ["human"] * (len(roles) % 2):
        yield "template", "has turns out of order: question and answer must alternate"
    elif len(roles) % 2 or not roles:
        yield "masked", "does not end with an answer: LLaVA masks the whole conversation"
    something = with_image or any(t["value"].split() for t in turns)
    if something and any(t["from"] == "gpt" and not t["value"] for t in turns):
        yield "masked", "has an empty answer: LLaVA masks the whole conversation"
    if any("</s>" in t["value"] for t in turns):
        special = _around(_SPECIAL, [t["value"] for t in turns])
        yield "masked", f"has {special}: LLaVA takes </s> for an answer's end and masks all of it"
    if any(" ASSISTANT: " in t["value"] for t in turns):
        yield "masked", "has ' ASSISTANT: ' in a turn: LLaVA takes it for a turn's end and masks all of it"


def _character_findings(texts, joined, special):
    if not joined.isascii() and _SURROGATE.search(joined):
        yield "unicode", f"has half of a surrogate pair in {_around(_SURROGATE, texts)}"
    if special and "<" in joined and _SPECIAL.search(joined):
        yield "literal token", f"has {_around(_SPECIAL, texts)}, which tokenizers take for a special token"
    if not joined.isprintable() and _ODD.search(joined):
        names = sorted({f"U+{ord(c):04X}" for c in _ODD.findall(joined)})
        yield "characters", f"has characters that nobody sees ({', '.join(names[:5])})"


def _hallucinated_findings(record, caption, hallucinated):
    seen = [_same(h) for h in hallucinated]
    if seen and caption and _same(caption) in seen:
        yield "hallucinated", "has its own caption among the hallucinated ones: the loss contradicts itself"
    if len(set(seen)) < len(seen):
        yield "hallucinated", "has the same hallucinated caption twice"
    if (kinds := record.get(KINDS_KEY)) is not None:
        given = next((record[k] for k in HALLUCINATED_KEYS if record.get(k) is not None), [])
        given = [given] if isinstance(given, str) else given
        if not isinstance(kinds, list) or len(kinds) != len(given):
            number = len(kinds) if isinstance(kinds, list) else repr(kinds)[:20]
            yield "kinds", f"has {number} {KINDS_KEY!r} for {len(given)} hallucinated captions"


def _placeholder_findings(turns, with_image, plain, hallucinated):
    holding = [t["from"] for t in turns if "<image>" in t["value"]]
    found = []
    if with_image and "gpt" in holding and (plain or len(holding) > 1):
        found.append(("placeholder", "has <image> in an answer: LLaVA would take it for a second image"))
    elif with_image and len(holding) > 1:
        found.append(("placeholder", f"has <image> in {len(holding)} turns and one image"))
    elif with_image and holding == ["gpt"]:
        found.append(("ignored image", "has its <image> in an answer, not in a question"))
    elif with_image and not holding:
        found.append(("ignored image", "has an image but no <image> in its questions: it is trained as text"))
    elif with_image and any(t["value"].count("<image>") > 1 for t in turns):
        found.append(("literal token", "has <image> more than once in a turn, which LLaVA takes for one"))
    elif not with_image and holding:
        found.append(("literal token", "has <image> but no 'image': it is trained as text"))
    if any("<image>" in h for h in hallucinated):
        found.append(("literal token", "has <image> in a hallucinated caption, where it is text"))
    return found


def _around(pattern, texts):
    text, match = next((t, m) for t in texts if (m := pattern.search(t)))
    return repr(text[max(match.start() - 15, 0) : match.end() + 15])


def _same(text):
    return " ".join(text.casefold().split()).rstrip(".")


def _shown(path):
    return path if path.isprintable() else repr(path)


class Folders:
    """Which files are there, by listing each folder once.

    Args:
        root: the image folder.
    """

    def __init__(self, root: str | os.PathLike | None) -> None:
        self.root = root or ""
        self._real = functools.lru_cache(maxsize=None)(lambda folder: os.path.join(os.path.realpath(folder), ""))
        self._listed, self._stems = {}, {}

    def _list(self, folder):
        if folder not in self._listed:
            try:
                with os.scandir(folder or ".") as entries:
                    # From the listing itself: nothing is asked of the disk for each file.
                    self._listed[folder] = {
                        e.name: "link" if e.is_symlink() else "folder" if e.is_dir() else "file" for e in entries
                    }
            except (OSError, ValueError) as error:  # a name with a NUL
                self._listed[folder] = error
        return self._listed[folder]

    def finding(self, image: str) -> tuple[str, str] | None:
        """(kind, text) if the image is not there, or leads outside; else None."""
        try:
            path = image_path(self.root, image)
        except DataError as error:
            return "path", str(error)
        folder, name = os.path.split(path)
        listed = self._list(folder)
        if isinstance(listed, PermissionError):
            return "unreadable", f"has the image {_shown(path)}, whose folder cannot be read ({listed.strerror})"
        kind = None if isinstance(listed, Exception) else listed.get(name)
        if kind == "link":
            kind = "folder" if os.path.isdir(path) else "file" if os.path.exists(path) else None
            real = os.path.realpath(path)
            if kind and not real.startswith((self._real(self.root), self._real(folder))):
                return "path", f"has the image {_shown(path)}, a link that leads outside the image folder"
        if kind == "folder":
            return "missing", f"has the image {_shown(path)}, which is a folder"
        return (
            None
            if kind
            else ("missing", f"has the image {_shown(path)}, which does not exist{self._hint(folder, name)}")
        )

    def _hint(self, folder, name):
        listed = self._listed[folder]
        if isinstance(listed, Exception):
            return f" (nor does its folder: --image_folder is {self.root or '.'})"
        if folder not in self._stems:
            self._stems[folder] = {_stem(n): n for n in listed}
        other = self._stems[folder].get(_stem(name))
        return f"; {other!r} does" if other else ""


def _stem(name):
    return unicodedata.normalize("NFC", os.path.splitext(name)[0]).casefold()


def image_findings(path: str, pad: bool) -> list[tuple[str, str]]:
    """(kind, text) of what is wrong with an image file, which is opened and decoded as LLaVA does it.

    Args:
        path: of the file. pad: ``--image_aspect_ratio pad``, which makes a square of the longer side.
    """
    from PIL import Image, UnidentifiedImageError

    def error(kind, text):
        return [(kind, f"has the image {_shown(path)}, {text}")]

    found = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                width, height = image.size
                long, short = max(width, height), min(width, height)
                if problem := size_problem(width, height, pad):
                    return error("size", problem)
                high = long if pad else height
                if high == 1:  # an array of 1 x W x 3 is taken for one channel
                    return error("size", f"of {width} x {height}, which transformers before 5 cannot read")
                if high == 3:
                    found += error("appearance", f"of {width} x {height}, which transformers before 5 misread")
                if long > 20 * short:
                    found += error("appearance", f"of {width} x {height}, of which little is left in a square")
                if getattr(image, "is_animated", False):
                    found += error("appearance", "animated: its first frame is taken")
                if image.getexif().get(0x0112, 1) not in (0, 1):
                    found += error("appearance", "which its EXIF data turns; LLaVA takes it as it is stored")
                if image.mode[0] in "IF":
                    found += error("appearance", f"with more than 8 bits (mode {image.mode}): it becomes nearly white")
                if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
                    if image.convert("RGBA").getchannel("A").getextrema()[0] < 255:
                        found += error("appearance", "partly transparent: what it hides is shown")
                image.convert("RGB")
    except Image.DecompressionBombError as problem:
        return error("size", f"too large to be opened ({problem})")
    except UnidentifiedImageError:
        empty = not os.path.getsize(path)
        return error("unreadable", "which is empty" if empty else "which is not an image that Pillow reads")
    except MemoryError:
        return error("size", "for which the memory does not suffice")
    except Exception as problem:  # Pillow's readers raise almost anything on damaged files
        return error("unreadable", f"which cannot be read ({getattr(problem, 'strerror', None) or problem})")
    return found


class TokenCheck:
    """LLaVA's own preprocessing of a record, by which is seen what it masks or cannot do.

    Args:
        name: folder or hub id of the language model. version: of the template. max_length: tokens of the context.
        visual: tokens that an image takes of it; 0: not known. rows: of the model's embedding; 0: not known.
        cache: folder of the hub's cache, None: the usual one.

    Raises:
        HaclError: the tokenizer cannot be loaded, or has no token to pad with.
    """

    def __init__(
        self, name: str, version: str, max_length: int, visual: int = 0, rows: int = 0, cache: str | None = None
    ) -> None:
        from . import compat  # noqa: F401  (before llava)

        # isort: split
        import llava.train.train as stock
        import transformers

        from . import data
        from .common.weights import first_line

        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(
                name, model_max_length=max_length, padding_side="right", use_fast=False, cache_dir=cache
            )
        except Exception as error:  # of a library for each kind of tokenizer
            reason = first_line(error, 200)
            raise HaclError(f"{name}: its tokenizer cannot be loaded ({reason}); give the language model.") from None
        self.tokenizer.pad_token = self.tokenizer.unk_token
        templates = stock.conversation_lib.conv_templates
        self.stock, self.data, self.template = stock, data, templates.get(version, templates["vicuna_v1"])
        self.version, self.max_length, self.visual, self.rows = version, max_length, visual, rows
        self.plain = version in PLAIN
        with self._under_template():
            data.ready(self.tokenizer)
            self.mends = data.loses_count(self.tokenizer)
        if self.plain and self.tokenizer.eos_token_id is None:
            raise HaclError(f"{name}: its tokenizer has no EOS token, with which captions end; give it one it knows.")
        ids = {key: getattr(self.tokenizer, f"{key}_token_id") for key in ("bos", "eos", "pad")}
        if beyond := [f"{key} ({i})" for key, i in ids.items() if rows and i is not None and i >= rows]:
            raise HaclError(
                f"{name}: its tokenizer's {' and '.join(beyond)} are beyond the model's {rows} rows; give the "
                "tokenizer that the model was made with."
            )
        self.arguments = types.SimpleNamespace(is_multimodal=True, mm_use_im_start_end=False)

    @contextlib.contextmanager
    def _under_template(self):
        library = self.stock.conversation_lib
        before, library.default_conversation = library.default_conversation, self.template
        try:
            yield
        finally:
            library.default_conversation = before

    def __call__(self, record: dict[str, Any]) -> list[tuple[str, str]]:
        """(kind, text) of what is wrong with it."""
        if self.plain and "image" not in record:  # LLaVA cannot; the guarded dataset trains the answer alone
            return []
        try:
            with self._under_template():
                return list(self._findings(record, "image" in record))
        except Exception as error:
            return [("preprocess", f"cannot be prepared ({type(error).__name__}: {error})")]

    def _findings(self, record, with_image):
        source, printed = [[dict(turn) for turn in record["conversations"]]], io.StringIO()
        with contextlib.redirect_stdout(printed):
            if with_image:
                source = self.stock.preprocess_multimodal(source, self.arguments)
            item = self.stock.preprocess(source, self.tokenizer, has_image=with_image)
        ids, labels = item["input_ids"][0], item["labels"][0]
        if self.mends:
            mended = self.data.answers_only(ids, self.tokenizer, self.data.answers_in(record))
            labels = labels if mended is None else mended
        labelled = labels != self.stock.IGNORE_INDEX
        if self.rows and int(ids.max()) >= self.rows:
            yield "vocabulary", f"holds the token {int(ids.max())}, and the model has {self.rows} rows"
        if not labelled.any():
            said = re.search("tokenization mismatch: [^(]*", printed.getvalue())
            yield "masked", f"is masked whole by LLaVA ({said.group().rstrip(' .') if said else 'no labels'})"
        elif self.visual:
            grown = (ids == self.stock.IMAGE_TOKEN_INDEX).cumsum(0) * (self.visual - 1)
            first = int(labelled.nonzero()[0])
            if first + int(grown[first]) >= self.max_length:
                room = f"a context of {self.max_length} tokens, of which its image takes {self.visual}"
                yield "masked", f"is cut before its answer: it has {room}"
        texts = hallucinated_captions(record) if self.plain else []
        longest = max([len(ids), *(len(self.tokenizer(t).input_ids) + 1 for t in texts)])
        if longest > self.max_length:
            yield "long", f"has {longest} tokens and a context of {self.max_length}: it is cut"

    def advice(self) -> str:
        """Which template to train with instead."""
        family, templates = self.data.family_of(self.tokenizer), self.stock.conversation_lib.conv_templates
        if family is None or templates.get(family.template) is self.template:
            return f"Give the template that the tokenizer was made for (--version is {self.version})"
        if family.template in templates:
            return f"Give --version {family.template}, for the tokenizer is of {family.name} (it is {self.version})"
        return (
            f"The tokenizer's chat template is {family.name}'s, for which this LLaVA has none (--version is "
            f"{self.version}): give a language model for whose template it has one"
        )


# --- a whole file -----------------------------------------------------------------------------------------------------


def find(
    records: Sequence[Any],
    image_folder: str | os.PathLike | None,
    plain: bool,
    max_length: int | None = None,
    full: bool = False,
    pad: bool = False,
    workers: int = 1,
    tokenizer: tuple[Any, ...] | None = None,
    ids: bool = False,
    progress: bool = False,
    images: bool = True,
) -> list[Finding]:
    """All findings of a list of records, by their order there.

    Args:
        records: as `records.stream_records` reads them. image_folder: what their images are relative to.
        plain, max_length: as in `text_findings`. full: open every image, on ``workers`` processes. pad: as in
            `image_findings`. tokenizer: arguments of `TokenCheck`, or None. ids: look for duplicate
            ids too. progress: show bars on stderr. images: look for them.

    Returns:
        A list of `Finding`.

    Raises:
        HaclError: the tokenizer cannot be loaded, or a worker process was killed.
    """
    found, folders, users, known = [], Folders(image_folder), collections.defaultdict(list), {}
    for index, record in enumerate(_bar(records, "records", progress)):
        found += [Finding(index, *f) for f in text_findings(record, plain, max_length)]
        if found and found[-1].index == index and found[-1].kind == "form":
            continue
        if images and "image" in record:
            if finding := folders.finding(record["image"]):
                found.append(Finding(index, *finding))
            elif full:
                users[image_path(image_folder, record["image"])].append(index)
        if ids and "id" in record:
            first = known.setdefault(repr(record["id"]), index)
            if first != index:
                found.append(Finding(index, "id", f"has the id of record {first}"))
    paths = list(users)
    for path, findings in zip(
        paths, _each(functools.partial(image_findings, pad=pad), paths, workers, "images", progress)
    ):
        found += [Finding(index, *f) for f in findings for index in users[path]]
    if tokenizer is not None:
        TokenCheck(*tokenizer)  # refused here, if it is
        bad = {f.index for f in found if f.severity == "error"}
        good = [i for i in range(len(records)) if i not in bad]
        masked = {f.index for f in found if f.kind == "masked"}
        results = _each(
            functools.partial(_token_findings, tokenizer), [records[i] for i in good], workers, "tokens", progress
        )
        for index, findings in zip(good, results):
            found += [Finding(index, *f) for f in findings if not (f[0] == "masked" and index in masked)]
    return sorted(found, key=lambda f: (f.index, f.kind not in ERRORS))


@functools.lru_cache(maxsize=1)
def _token_check(settings):
    return TokenCheck(*settings)


def _token_findings(settings, record):
    return _token_check(settings)(record)


def _bar(values, label, progress, total=None):
    from tqdm import tqdm

    return tqdm(values, desc=label, total=total, disable=not progress, file=sys.stderr)


_CHUNK = 64


def _many(function, values):
    return [function(value) for value in values]


def _each(function, values, workers, label, progress):
    """``function`` of each value, in order; on several processes where that is worth their start."""
    if workers == 1 or len(values) < 4 * _CHUNK:
        yield from map(function, _bar(values, label, progress))
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    bar = _bar(None, label, progress, len(values))
    try:
        chunks = [values[i : i + _CHUNK] for i in range(0, len(values), _CHUNK)]
        for results in pool.map(functools.partial(_many, function), chunks):
            bar.update(len(results))
            yield from results
    except BrokenProcessPool:
        unblock(pool)
        raise HaclError(
            f"a process that looked at {label} was killed, by want of memory most likely; give fewer --workers."
        ) from None
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)


def cores() -> int:
    """How many processes this one may keep busy."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def refusal(path: str | os.PathLike, records: Sequence[Any], errors: Sequence[Finding]) -> DataError:
    """The `DataError` that names the first of these findings, says how many there are, and what to do."""
    first, bad = errors[0], len({f.index for f in errors})
    more = "" if bad == 1 else f" {bad} of {len(records)} records cannot be used."
    return DataError(
        f"{name_of(path, first.index, records[first.index])} {first.text}.{more} Repair or remove "
        f"{'it' if bad == 1 else 'them'} (hacl-llava check-data lists all, and writes the others with --write), or "
        "train on the others with --hacl_bad_records skip."
    )


# --- before a run -----------------------------------------------------------------------------------------------------


def check_before_run(asked: "Run") -> None:
    """What ``--hacl_check_data`` and ``--hacl_bad_records`` say, before anything costly is loaded.

    Every rank calls it. Sets on ``asked.data``, for the dataset: ``hacl_bad_records``, the path of the list, and
    ``hacl_left_out``, indices of records that are not taken, the same on all ranks. A run that goes on from a
    checkpoint leaves out what it left out before, so that its order stays; what has gone bad since is masked.

    Raises:
        DataError: the file cannot be read, or records cannot be used.
    """
    from .data import BadRecords, entry_of, read_records

    model, data, training = asked.model, asked.data, asked.training
    run, path = data.hacl_run, data.data_path
    if not path:
        raise DataError(NO_DATA)
    records, plain = read_records(path), model.version in PLAIN
    if _lacks_folder(data, records):
        raise DataError(f"{path}: {NO_FOLDER}.")
    output = Path(training.output_dir)
    listed = BadRecords(output / "bad_records.jsonl", run.max_failed)
    data.hacl_bad_records, data.hacl_left_out = listed.path, set()
    goes_on = any(output.glob("checkpoint-*"))
    problems, refused = {}, None  # problems of records to leave out, by index
    if int(os.environ.get("LOCAL_RANK", 0)) <= 0:  # once a machine
        if run.check_data != "off":
            found = find(
                records,
                data.image_folder,
                plain,
                training.model_max_length,
                full=run.check_data == "full",
                pad=data.image_aspect_ratio == "pad",
                workers=cores(),
                progress=run.check_data == "full" and on_first_rank(),
            )
            errors = [f for f in found if f.severity == "error"]
            if errors and run.bad_records == "refuse":
                refused = refusal(path, records, errors)
            else:
                bad = {f.index for f in errors}
                refused = _without_labels(records, [i for i in range(len(records)) if i not in bad], asked)
            for finding in reversed(errors):
                problems[finding.index] = finding.text
            counts = collections.Counter(f.kind for f in found if f.severity == "warning")
            if counts and on_first_rank():
                kinds = ", ".join(f"{kind} {n}" for kind, n in counts.most_common())
                print(f"HACL data: to look at, by hacl-llava check-data, though it is trained on: {kinds}.")
        if goes_on:
            before = {e["index"]: e["problem"] for e in listed.read() if e.get("when") == "start"}
            if new := len(problems.keys() - before.keys()):
                print(f"HACL data: {new} records have gone bad since the run began; each becomes a masked row.")
            problems = before
    problems, end = _of_all_ranks(problems, refused is not None)
    if refused is not None:
        raise refused
    if end:
        sys.exit(2)  # the one that refuses says why
    if goes_on or run.bad_records == "skip":
        if len(problems) == len(records):
            raise refusal(path, records, [Finding(i, "form", text) for i, text in sorted(problems.items())])
        data.hacl_left_out = set(problems)
    if on_first_rank() and not goes_on:
        listed.replace([entry_of(path, i, records[i], text, "start") for i, text in sorted(problems.items())])


NO_DATA = "--data_path is missing: give it a LLaVA-format json."
NO_FOLDER = "has images; give --image_folder, the folder that they are relative to"
SAMPLE = 64  # records that are tokenized before a run


def token_settings(run: "Run") -> tuple[str, str, int, int, int, str | None]:
    """The arguments of `TokenCheck` for a run."""
    config, vision = run.llm.config, run.vision
    size, patch = vision.get("image_size"), vision.get("patch_size")
    visual = (size // patch) ** 2 if isinstance(size, int) and isinstance(patch, int) and patch > 0 else 0
    name, length = run.model.model_name_or_path, run.training.model_max_length
    cache = getattr(run.training, "cache_dir", None)
    return name, run.model.version, length, visual, config.get("vocab_size", 0), cache


def _without_labels(records, usable, run):
    """The `DataError` for a run in which every record of a sample would be masked whole, or None; says the share."""
    from .representation import suffix_ids

    check, model = TokenCheck(*token_settings(run)), run.model
    try:
        if getattr(model, "use_hacl", False):
            suffix_ids(HaclConfig.from_arguments(model), check.tokenizer)
    except HaclError as error:  # the prompt is not fit
        return DataError(str(error))
    sample = [usable[i * len(usable) // SAMPLE] for i in range(SAMPLE)] if len(usable) > SAMPLE else usable
    found = [finding for i in sample for finding in check(records[i])]
    bad = [text for kind, text in found if kind in ("masked", "preprocess")]
    if beyond := next((text for kind, text in found if kind == "vocabulary"), None):
        return DataError(
            f"a record {beyond}: the tokenizer of {model.model_name_or_path} is of a larger vocabulary; give the one "
            "that the model was made with."
        )
    misfits = sum("tokenization mismatch" in text or kind == "preprocess" for kind, text in found)
    if not bad or len(bad) < len(sample) and 2 * misfits <= len(sample):
        if bad and on_first_rank():
            print(f"HACL data: {len(bad)} of {len(sample)} records of a sample have no label; the first {bad[0]}.")
        return None
    share = f"{len(bad)} of {len(sample)} records that were looked at have no label"
    return DataError(
        f"{share if len(bad) < len(sample) else f'none of {len(sample)} records that were looked at has a label'}: the "
        f"first {bad[0]}. {'Little' if len(bad) < len(sample) else 'Nothing'} would be learnt. {check.advice()}, a "
        "language model with the tokenizer of that template, or a larger --model_max_length (it is "
        f"{run.training.model_max_length})."
    )


def _of_all_ranks(problems, refused):
    """All ranks' problems, and whether one of them refuses; until then, no rank loads anything."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return problems, refused
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (problems, refused))
    return {i: text for found, _ in reversed(everyone) for i, text in found.items()}, any(r for _, r in everyone)


# --- hacl-llava check-data --------------------------------------------------------------------------------------------


_images, _texts, _written = (functools.partial(option, group=g) for g in ("images", "texts", "what is written"))


@dataclass
class CheckDataOptions:
    """whether a json and its images can be trained on, and what is odd about them

    Look at every record and every image of a LLaVA-format json ahead of training: what would end a run, and what would
    be trained on in another way than it was meant; with --run, at all that a training is given. Exit status 0: fine, 1:
    some records cannot be used, 2: the data cannot be looked at, or the training would be refused.
    """

    json: str | None = argument("LLaVA-format json or json lines, .gz or not", metavar="JSON", nargs="?")
    training: list[str] | None = option(
        "last, in place of JSON: a whole training by its own arguments, as --run scripts/finetune_hacl.py --data_path "
        "... (script or not): models, template, projector, folders, data; every problem is named",
        flag="--run",
        nargs="...",
    )
    workers: int | None = option("processes that open images and tokenize (default: cores)", type=whole, metavar="N")
    images: str | None = _images("folder that the records' images are relative to (--image_folder)", metavar="DIR")
    fast: bool = _images("do not open the images; only see whether they are there", False)
    image_aspect_ratio: str | None = _images("as in training (default: pad; plain: square)", choices=("square", "pad"))
    version: str = _texts("template it is for: plain (stage 1; the default), v1, ...", "plain", metavar="NAME")
    tokenizer: str | None = _texts("folder or hub id: tokenize as LLaVA does, and see what it masks", metavar="LLM")
    max_length: int = _texts("tokens of the context", 2048, type=whole, metavar="N")
    output: str | None = _written("write report.json, report.md and bad_records.jsonl there", metavar="DIR")
    write: str | None = _written("write the records that can be used (.json, .jsonl, .gz by its name)", metavar="FILE")


def run(options: CheckDataOptions, training: "Run | None" = None, problems: Sequence[str] = ()) -> int:
    """Look, print, write.

    Args:
        options: the command line. training: whose data is looked at, in place of what ``options`` says of the data.
        problems: of that training.

    Returns:
        0 where every record can be used, 1 where some cannot, 2 where the training would be refused. HaclError, for
        which the command line's exit status is 2, says that the data cannot be looked at.
    """
    start, problems = time.time(), list(problems)
    options = options if training is None else _of_training(options, training)
    if options.write and os.path.realpath(options.write) == os.path.realpath(options.json or ""):
        raise HaclError(f"--write {options.write}: is the file that is read; give another name.")
    pad = options.version not in PLAIN
    pad = options.image_aspect_ratio == "pad" if options.image_aspect_ratio else pad
    records, found, there = _look(options, pad, training, problems)
    bad = {f.index for f in found if f.severity == "error"}
    counts = collections.Counter(f.kind for f in found)
    report = {
        "file": options.json,
        "image_folder": options.images,
        "version": options.version,
        "image_aspect_ratio": "pad" if pad else "square",
        "max_length": options.max_length,
        "tokenizer": options.tokenizer,
        "images_opened": there and not options.fast,
        "problems": problems,
        "records": len(records),
        "usable": len(records) - len(bad),
        "errors": {kind: counts[kind] for kind in REMEDIES if counts[kind] and kind in ERRORS},
        "warnings": {kind: counts[kind] for kind in REMEDIES if counts[kind] and kind not in ERRORS},
        "seconds": round(time.time() - start, 1),
        "hacl_llava": __version__,
    }
    page = _page(report, records, found)
    print(
        page.encode(sys.stdout.encoding or "utf-8", "backslashreplace").decode(sys.stdout.encoding or "utf-8"), end=""
    )
    try:
        if options.output:
            _write(options.output, report, page, records, found)
            print(f"\n{options.output}: report.json, report.md and bad_records.jsonl are written.")
        if options.write:
            if len(bad) == len(records):
                raise HaclError(f"{options.write}: not written, for no record can be used.")
            write_records(options.write, (t for i, (t, _) in enumerate(stream_records(options.json)) if i not in bad))
            print(f"\n{options.write}: written, {len(records) - len(bad)} records.")
    except OSError as error:
        raise HaclError(f"{error.filename or options.output}: cannot be written ({error.strerror}).") from None
    return 2 if problems else 1 if bad else 0


def _look(options, pad, training, problems):
    """The records, what is found in them, and whether their images were looked for; adds to ``problems``."""
    there, records = not options.images or os.path.isdir(options.images), []
    if training is None and not there:
        raise HaclError(
            f"--images {options.images}: is no folder; give the one that the records' images are relative to."
        )
    tokenizer = (options.tokenizer, options.version, options.max_length) if options.tokenizer else None
    try:
        if not options.json:
            raise DataError(NO_DATA)
        records = list_records(options.json)
        if training is not None:
            tokenizer = _tokens_of(training, records, problems)
            there = there and not _lacks_folder(training.data, records)
    except HaclError as error:
        if training is None:
            raise
        problems.append(str(error))
    found = find(
        records,
        options.images,
        options.version in PLAIN,
        options.max_length,
        full=not options.fast,
        pad=pad,
        workers=options.workers or cores(),
        tokenizer=tokenizer,
        ids=True,
        progress=True,
        images=there,
    )
    if records and tokenizer and training is not None:
        bad = {f.index for f in found if f.severity == "error"}
        problems += [refused for refused in [_nothing_to_learn(records, bad, training)] if refused]
    return records, found, there


def _of_training(options, run):
    """The command line's options with what a run's own arguments say of its data."""
    data = {"json": run.data.data_path, "images": run.data.image_folder, "version": run.model.version}
    more = {"tokenizer": run.model.model_name_or_path, "max_length": run.training.model_max_length}
    return replace(options, **data, **more, image_aspect_ratio=run.data.image_aspect_ratio)


def _tokens_of(run, records, problems):
    """The arguments of `TokenCheck`, None where there is no tokenizer to be had; adds to ``problems``."""
    if _lacks_folder(run.data, records):
        problems.append(f"{run.data.data_path}: {NO_FOLDER}.")
    settings = token_settings(run)
    try:
        TokenCheck(*settings)
    except HaclError as error:
        problems.append(str(error))
        return None
    return settings


def _lacks_folder(data, records):
    return not data.image_folder and any(isinstance(r, dict) and "image" in r for r in records)


def _nothing_to_learn(records, bad, run):
    """Why a run would be refused for what its records hold, or None."""
    if len(bad) == len(records):
        return f"{run.data.data_path}: none of its {len(records)} records can be used."
    refused = _without_labels(records, [i for i in range(len(records)) if i not in bad], run)
    return refused and str(refused)


def _page(report, records, found, examples=5):
    """The report as Markdown: what was found, by kind, with the first records of each and what to do."""
    opened = "every image was opened" if report["images_opened"] else "images were looked for, not opened"
    lines = [f"# {report['file']}", ""]
    if report["problems"]:
        lines += ["## the run would be refused", "", *(f"- {problem}" for problem in report["problems"]), ""]
    lines += [
        f"{report['records']:,} records for the template {report['version']}; {opened}. "
        f"**{report['usable']:,} can be used, {report['records'] - report['usable']:,} cannot.**",
    ]
    for severity in ("errors", "warnings"):
        for kind, number in report[severity].items():
            of_kind = [f for f in found if f.kind == kind]
            lines += ["", f"## {severity[:-1]}: {kind} ({number:,})", "", f"What to do: {REMEDIES[kind]}.", ""]
            lines += [f"- {name_of(report['file'], f.index, records[f.index])} {f.text}" for f in of_kind[:examples]]
            if number > examples:
                lines.append(f"- and {number - examples:,} more")
    return "\n".join(lines) + "\n"


def _write(folder, report, page, records, found):
    from .data import entry_of

    os.makedirs(folder, exist_ok=True)
    lines = (
        {**entry_of(report["file"], f.index, records[f.index], f.text, "check"), "severity": f.severity, "kind": f.kind}
        for f in found
    )
    texts = {
        "bad_records.jsonl": "".join(json.dumps(line) + "\n" for line in lines),
        "report.md": page,
        "report.json": json.dumps(report, indent=2) + "\n",
    }
    for name, text in texts.items():
        write_text(Path(folder) / name, text)
