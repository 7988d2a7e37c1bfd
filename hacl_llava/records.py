"""LLaVA's records: what one must look like, and reading and writing many of them, however large the file.

A record is LLaVA's own, plus ``"hallucinated_captions"`` (a string or a list of strings) and, where it is known what
each of them gets wrong, ``"hallucinated_kinds"``; the official release's key, ``"Hallucination caption"``, is read too.
The caption is the first answer of the conversation.
"""

import array
import copy
import gzip
import itertools
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from .common.files import atomic
from .config import DataError

HALLUCINATED_KEYS = ("hallucinated_captions", "Hallucination caption")
KINDS_KEY = "hallucinated_kinds"  # a list beside the first of them, in the same order
FORMAT = (
    'a LLaVA record: {"id": ..., "image": "a.jpg", "conversations": [{"from": "human", ...}, {"from": "gpt", ...}]}'
)
_CHUNK = 1 << 20  # characters read at a time
_decode = json.JSONDecoder().raw_decode
_LONGEST = 1 << 26  # characters: a record that goes on for longer is a quote that was never closed


def name_of(path: str | os.PathLike, index: int, record: Any) -> str:
    """How messages name a record: ``data.json: record 12 (id 'abc')``."""
    identity = f" (id {record['id']!r})" if isinstance(record, dict) and "id" in record else ""
    return f"{path}: record {index}{identity}"


def unblock(pool: ProcessPoolExecutor) -> None:
    """After a worker of a `ProcessPoolExecutor` was killed: Python before 3.13 (its issue 94777) may wait for ever for
    a thread that writes to a pipe which nobody reads any more."""
    if queue := getattr(pool, "_call_queue", None):
        queue._reader.close()


def hallucinated_captions(record: dict[str, Any]) -> list[str]:
    """The record's hallucinated captions, a list of non-empty strings.

    Raises:
        DataError: they are neither a string nor a list of strings (None counts as missing).
    """
    for key in HALLUCINATED_KEYS:
        value = record.get(key)
        if value is None:
            continue
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or any(not isinstance(v, str) and v is not None for v in value):
            raise DataError(f"{key!r} is {str(value)[:60]!r}, expected a string or a list of strings.")
        return [v.strip() for v in value if v and v.strip()]
    return []


def hallucinated_kinds(record: dict[str, Any]) -> list[str | None]:
    """What each of `hallucinated_captions` gets wrong, as a list in step; None where the record does not say."""
    value = next((record[key] for key in HALLUCINATED_KEYS if record.get(key) is not None), [])
    value, kinds = [value] if isinstance(value, str) else value, record.get(KINDS_KEY)
    if not isinstance(kinds, list) or len(kinds) != len(value):
        kinds = [None] * len(value)
    return [kind if isinstance(kind, str) else None for kind, text in zip(kinds, value) if text and text.strip()]


def caption_of(record: dict[str, Any]) -> str:
    """The caption: the first answer of the conversation, or "" if it has none."""
    return next((turn["value"].strip() for turn in record["conversations"] if turn["from"] == "gpt"), "")


def problem_of(record: Any, plain: bool) -> str | None:
    """What makes a record unusable, or None; ``plain``: it has to suit LLaVA's stage-1 template."""
    if not isinstance(record, dict):
        return f"is a {type(record).__name__}, expected {FORMAT}"
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        return f"has no 'conversations', expected {FORMAT}"
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str) or "from" not in turn:
            return f"has the turn {str(turn)[:60]!r}, expected {{'from': 'human' or 'gpt', 'value': text}}"
        if turn["from"] not in ("human", "gpt"):
            return f"has a turn from {turn['from']!r}, allowed are 'human' and 'gpt'"
    if plain and [turn["from"] for turn in turns] != ["human", "gpt"]:
        return f"has {len(turns)} turns, but --version plain takes one question and one answer"
    has_token = any("<image>" in turn["value"] for turn in turns if turn["from"] == "human")
    if "image" in record:
        if not isinstance(record["image"], str) or not record["image"]:
            return f"has the image {record['image']!r}, expected a path relative to --image_folder"
        if plain and "<image>" not in turns[0]["value"]:
            return "has an image but no <image> in its question"
    elif has_token and plain:
        return "has <image> in its question but no 'image'"
    try:
        hallucinated_captions(record)
    except DataError as error:
        return f"is wrong: {error}"
    return None


def stream_records(path: str | os.PathLike) -> Iterator[tuple[str, Any]]:
    """Read a json array or a file of json lines, gzipped or not, one record at a time.

    Yields:
        (text, record): the record's own text in the file, and what it holds (of any type: `problem_of` judges it).

    Raises:
        DataError: the file is missing, is no json or is cut off; the message says after which record.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise DataError(f"{path}: is no regular file; it is read more than once, so save it first.")
    try:
        with (gzip.open if _packed(path) else open)(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield from _stream(path, file)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason}); save it as UTF-8.") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: the gzip file is damaged or cut off ({error}).") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); give a LLaVA-format json.") from None


class Records(Sequence):
    """Records held as their text, each parsed when it is asked for: a new object each time.

    As Python objects LLaVA's 558k take four times as much, on every rank; and each data worker, a fork of its rank,
    comes to copy them all, since to look at an object is to write its count of references (benchmarks/data.py).

    Args:
        texts: of records, each a json value.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._text, self._ends = bytearray(), array.array("Q", [0])
        for text in texts:
            self._text += text.encode("utf-8", "surrogatepass")
            self._ends.append(len(self._text))
        self._at = range(len(self._ends) - 1)  # where each of this sequence stands

    def __len__(self) -> int:
        return len(self._at)

    def __getitem__(self, i: int) -> Any:
        n = self._at[i]
        return json.loads(self._text[self._ends[n] : self._ends[n + 1]].decode("utf-8", "surrogatepass"))

    def only(self, numbers: Sequence[int]) -> "Records":
        """Those that stand at ``numbers``; the text is shared."""
        part = copy.copy(self)
        part._at = array.array("Q", (self._at[i] for i in numbers))
        return part


def list_records(path: str | os.PathLike) -> Records:
    """All records of a file that `stream_records` reads.

    Raises:
        DataError: as there, and for a file that holds one object which is no record.
    """
    records = Records(text for text, _ in stream_records(path))
    if len(records) == 1 and isinstance(records[0], dict) and "conversations" not in records[0]:
        with (gzip.open if _packed(path) else open)(path, "rb") as file:
            if file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{":
                raise DataError(f"{path}: holds a dict, expected a list of LLaVA records, or one a line.")
    return records


def _packed(path):
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


class _Text:
    """The text of a file from the place that is read, a chunk at a time."""

    def __init__(self, path, file):
        self.path, self.file, self.at = path, file, 0
        self.text = file.read(_CHUNK)
        self.over = not self.text  # the file is at its end

    def fill(self):
        """Read on, at least as much again as is left, and forget what is behind."""
        more = self.file.read(max(_CHUNK, len(self.text) - self.at))
        self.text, self.at, self.over = self.text[self.at :] + more, 0, not more

    def peek(self):
        """The next character that is no white space, "" at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at].isspace():
                self.at += 1
            if self.at < len(self.text) or self.over:
                return self.text[self.at : self.at + 1]
            self.fill()

    def value(self, count):
        """(its text, the json value) that begins here; ``count``: the number of its record, for messages."""
        while True:
            try:
                value, end = _decode(self.text, self.at)
                whole = isinstance(value, (dict, list, str)) or self.text[end : end + 1] in tuple(",] \t\r\n")
                if not whole and not self.over:  # of "0.5" only "0." may have been read
                    raise json.JSONDecodeError("may go on", self.text, end)
                start, self.at = self.at, end
                return self.text[start:end], value
            except json.JSONDecodeError as error:
                unfinished = error.pos >= len(self.text) - 16 or "Unterminated" in error.msg
                if self.over or not unfinished or len(self.text) - self.at > _LONGEST:
                    where = " It looks truncated, cut off there." if self.over and unfinished else ""
                    raise DataError(
                        f"{self.path}: record {count} is not valid json ({error.msg}: "
                        f"{self.text[max(error.pos - 10, self.at) : error.pos + 20]!r}).{where}"
                    ) from None
                self.fill()
            except ValueError as error:  # an integer of thousands of digits
                raise DataError(f"{self.path}: record {count} is not usable json ({error}).") from None
            except RecursionError:
                raise DataError(f"{self.path}: record {count} is nested too deeply.") from None


def _stream(path, file):
    text = _Text(path, file)
    first = text.peek()
    if not first:
        raise DataError(f"{path}: is empty, expected a list of LLaVA records.")
    if first not in "[{":
        got = text.text[text.at : text.at + 20]
        raise DataError(f"{path}: begins with {got!r}, expected '[' (a list) or '{{' (json lines).")
    values = _array(path, text) if first == "[" else _lines(text)
    empty = True
    for found in values:
        empty = False
        yield found
    if empty:
        raise DataError(f"{path}: holds no records.")


def _lines(text):
    for count in itertools.count():
        if not text.peek():
            return
        yield text.value(count)


def _array(path, text):
    text.at += 1  # over the [
    for count in itertools.count():
        mark = text.peek()
        comma = bool(count) and mark == ","
        if comma:
            text.at += 1
            mark = text.peek()
        if not mark:
            raise DataError(f"{path}: ends after record {count - 1}, without a ']': it looks truncated, cut off.")
        if mark == "]":
            rest = (text.text[text.at + 1 :] + text.file.read(_CHUNK)).strip()
            if rest or comma:
                got = f"more text after its ']': {rest[:20]!r}" if rest else "a comma before its ']'"
                raise DataError(f"{path}: has {got}; that is not one json list.")
            return
        if count and not comma:
            got = text.text[text.at : text.at + 20]
            raise DataError(f"{path}: no comma between record {count - 1} and what follows, {got!r}.")
        yield text.value(count)


def with_captions(text: str, record: dict[str, Any], captions: list[str], kinds: list[str | None]) -> str:
    """The text of a record with ``captions`` and their ``kinds``, two lists in step; everything else as it stands."""
    added = {HALLUCINATED_KEYS[0]: captions, KINDS_KEY: kinds}
    old = (*HALLUCINATED_KEYS, KINDS_KEY)
    if any(key in record for key in old):  # empty ones, or ones to be replaced
        return _dumps({**{k: v for k, v in record.items() if k not in old}, **added})
    body = text.rstrip()[:-1].rstrip()
    comma = "" if body == "{" else ", "
    return f"{body}{comma}{_dumps(added)[1:]}"


def _dumps(value):
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isprintable() or _encodes(text) else json.dumps(value)


def _encodes(text):
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which json can hold and UTF-8 cannot
        return False
    return True


def write_records(path: str | os.PathLike, texts: Iterable[str]) -> None:
    """Write records' texts as a json list, or as json lines where the name ends so; ``.gz`` is packed.

    The file appears whole or not at all: it is written beside itself and renamed.

    Raises:
        OSError: what the disk says; what was there before is untouched.
    """
    path = os.fspath(path)
    name = path.lower()
    lines = name.removesuffix(".gz").endswith((".jsonl", ".ndjson"))
    with atomic(path) as part, open(part, "wb") as raw:
        packed = gzip.GzipFile("", "wb", 6, raw, mtime=0) if name.endswith(".gz") else raw
        separator = b"" if lines else b"[\n"
        for text in texts:
            if lines and "\n" in text:
                text = _dumps(json.loads(text))
            packed.write(separator)
            packed.write(text.encode())
            separator = b"\n" if lines else b",\n"
        packed.write(b"\n" if lines else b"\n]\n")
        if packed is not raw:
            packed.close()
