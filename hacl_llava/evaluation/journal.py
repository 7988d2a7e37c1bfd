"""The files that an evaluation writes as it goes, and goes on from after a kill."""

import hashlib
import json
import operator
import os
import re
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ..common import jsonl
from ..common.files import read_json
from ..common.report import shorten
from ..config import HaclError
from . import Question

_WHOLE, _BLOCK, _BLOCKS = 64 << 20, 4096, 64
_OF_THE_MODEL = re.compile(  # not results, which may be written beside it
    r".*\.(bin|safetensors|model|index\.json)|(.*config|tokenizer|special_tokens_map|added_tokens)\.json"
)


class Answer(NamedTuple):
    """What came of one question: ``text``, or ``error`` where nothing came. ``tokens``: a checkpoint's own, as ids."""

    question: Question
    text: str | None = None
    error: str | None = None
    tokens: tuple = ()


def digest_of(folder: str | os.PathLike) -> str:
    """A sha256 that tells one checkpoint from another without reading gigabytes.

    It covers names and sizes of a folder's weights and of the settings beside them, all of those up to 64 MiB, and of
    larger ones 64 blocks spread over the file and its last MiB.
    """
    digest = hashlib.sha256()
    for path in sorted(p for p in Path(folder).iterdir() if p.is_file() and _OF_THE_MODEL.fullmatch(p.name)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            if size <= _WHOLE:
                digest.update(file.read())
                continue
            for i in range(_BLOCKS):
                file.seek(size * i // _BLOCKS)
                digest.update(file.read(_BLOCK))
            file.seek(size - (1 << 20))
            digest.update(file.read())
    return digest.hexdigest()


def check_settings(path: str | os.PathLike, settings: dict[str, Any]) -> dict[str, Any]:
    """Compare what answers depend on with what the answers of an earlier run depend on.

    Args:
        path: settings.json. settings: {name: value}; names that are not given are not compared.

    Returns:
        What the file holds, {} if there is none.

    Raises:
        HaclError: they differ; the message says where. DataError: the file is no such file.
    """
    path = Path(path)
    if not path.exists():
        if path.with_name("answers.jsonl").exists():
            raise HaclError(f"{path.parent}: has answers, but no {path.name} that says whose; choose another --output.")
        return {}
    old = read_json(path, "; choose another --output", expected=dict)
    settings = json.loads(json.dumps(settings))
    changed = [name for name, value in settings.items() if name not in old or old[name] != value]
    if changed:
        name = changed[0]
        more = f" ({', '.join(changed[1:])} differ too)" if changed[1:] else ""
        raise HaclError(
            f"{path}: the answers there are of another evaluation: {name} was {shorten(repr(old.get(name)), 100)}, now "
            f"it is {shorten(repr(settings[name]), 100)}{more}; choose another --output, or remove {path.parent} to "
            "ask anew."
        )
    return old


class Answers(jsonl.Journal):
    """Answers by name, in a file of json lines that grows by whole lines; the last line of a name counts.

    Args:
        path: the file. key: the field, or the fields, that name a line.

    Attributes:
        lines: {name: line}, the name a tuple where there are several fields.

    Raises:
        DataError: a line is damaged.
    """

    def __init__(self, path: str | os.PathLike, *key: str) -> None:
        self.name, self.lines = operator.itemgetter(*key), {}
        super().__init__(path, lambda line, place: self.lines.update({self.name(line): line}))

    def sort(self, names: Iterable[Hashable]) -> None:
        """Rewrite the file, one line for each name, in the order of ``names``, others after them."""
        self.close()
        order = {name: i for i, name in enumerate(names)}
        jsonl.write(self.path, (self.lines[n] for n in sorted(self.lines, key=lambda n: order.get(n, len(order)))))
