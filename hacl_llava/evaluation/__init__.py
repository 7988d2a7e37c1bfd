"""Evidence: evaluation on the field's benchmarks, pictures of representations, and a report of both. Floor 5.

A task (`pope`, `chair`, `amber`, `mmhal`) reads `Question` items and scores answers into counts, whose sums give every
metric; `answers` asks a checkpoint or an endpoint; `analyze` looks at representations; `report` puts runs side by side.
"""

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from .. import __version__
from ..records import DataError


class Question(NamedTuple):
    """One thing asked about one image.

    ``id``: unique within its task. ``image``: path relative to the image folder. ``text``: what is asked, without the
    image token. ``facts``: what the task scores the answer by (``{"label": "yes"}``).
    """

    id: str
    image: str
    text: str
    facts: dict


def provenance(seed=None):
    """What made a result: versions, command line, commit of the checkout if there is one, and the seed."""
    names = {"torch": "torch", "transformers": "transformers", "llava": "llava-torch"}
    versions = {"hacl_llava": __version__, "python": platform.python_version()}
    for name, distribution in names.items():
        try:
            versions[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    # Only of this package's own checkout: installed elsewhere, git would answer for whatever repository lies around it.
    root = Path(__file__).parents[2]
    commit = None
    if (root / ".git").exists():
        git = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True)
        commit = git.stdout.strip() or None
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"versions": versions, "command": command, "commit": commit, "seed": seed}


def write_bytes(path, content):
    """Write a file so that it appears whole or not at all."""
    part = f"{path}.part"
    with open(part, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def write_text(path, text):
    r"""`write_bytes` of text as UTF-8; half of a surrogate pair is written as ``\ud800``, what json has for it."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path, value):
    """Write a json file so that it appears whole or not at all; nan and infinity become null."""
    write_text(path, json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value):
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if hasattr(value, "item"):  # numpy's and torch's scalars
        value = value.item()
    return None if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))) else value


def read_text(path, hint=""):
    """The text of a UTF-8 file; DataError where it cannot be read, with ``hint`` in the message."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}){hint}.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason}); save it as UTF-8.") from None


def read_json(path, hint=""):
    """A json file's value; DataError as of `read_text`, or where it is no json."""
    return _parsed(path, read_text(path, hint))


def _parsed(path, text):
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{path}: is not valid json ({error}).") from None


def read_lines(path):
    """Read a file of json lines, or a json list.

    Yields:
        (line number from 1, value); empty lines are passed over. Of a list: (position from 1, value).

    Raises:
        DataError: it cannot be read, or a line is no json; the message names the line.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        yield from enumerate(_parsed(path, text), 1)
        return
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 may stand in a string
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}: line {number} is not valid json ({error}).") from None
