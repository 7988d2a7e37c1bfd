"""Files that appear whole or not at all, json that is read with a good error, folders for one run at a time."""

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config import DataError, HaclError


@contextlib.contextmanager
def atomic(path: str | os.PathLike) -> Iterator[str]:
    """A name to write a file under: ``with atomic(path) as part``.

    Flushed to the disk and renamed to ``path`` at the end of ``with``; after an error it is gone, and what was at
    ``path`` before is untouched.
    """
    part = f"{os.fspath(path)}.part"
    try:
        yield part
        file = os.open(part, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Write a file so that it appears whole or not at all."""
    with atomic(path) as part:
        Path(part).write_bytes(content)


def write_text(path: str | os.PathLike, text: str) -> None:
    r"""`write_bytes` of text as UTF-8; half of a surrogate pair is written as ``\ud800``, what json has for it."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write a json file so that it appears whole or not at all; nan and infinity become null."""
    write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def is_number(value: Any) -> bool:
    """Whether a json value is a finite number; not one is an integer that is too large for a float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def finite(value: Any) -> Any:
    """A json value with null in place of nan and infinity, which json does not have."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    if hasattr(value, "item"):  # numpy's and torch's scalars
        value = value.item()
    return None if isinstance(value, float) and not is_number(value) else value


@contextlib.contextmanager
def locked(path: str | os.PathLike, what: str, hint: str) -> Iterator[None]:
    """The right to write, for one process at a time: until the end of ``with``, or of the process, however it ends.

    Args:
        path: of the lock file, which names its holder. what: is written, for the message. hint: what else to do.

    Raises:
        HaclError: another process holds it, or the file cannot be written.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path, is_singleton=True)
    try:
        os.makedirs(os.path.dirname(os.fspath(path)) or ".", exist_ok=True)
        open(path, "a").close()  # says what the disk says, where filelock would take it for a lock that is held
        lock.acquire(timeout=0)
        Path(path).write_text(f"process {os.getpid()} on {socket.gethostname()}, since {time.ctime()}\n")
    except Timeout:
        try:
            holder = Path(path).read_text().strip()
        except (OSError, UnicodeDecodeError):
            holder = ""
        raise HaclError(
            f"{what}: another run writes there{f' ({holder})' if holder else ''}; wait for it, or {hint}."
        ) from None
    except OSError as why:
        raise HaclError(f"{what}: cannot be written to ({why.strerror}); {hint}.") from None
    try:
        yield
    finally:
        if lock.lock_counter == 1:
            with contextlib.suppress(OSError):
                os.unlink(path)  # while it is held: who opens it now finds that it is gone, and tries again
        lock.release()


def read_text(path: str | os.PathLike, hint: str = "", error: type[HaclError] = DataError) -> str:
    """The text of a UTF-8 file.

    Args:
        path: of the file. hint: what to do, for the message. error: the class to raise.

    Raises:
        ``error``: it cannot be read, or is no UTF-8 text; the message names the file.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as why:
        raise error(f"{path}: cannot be read ({why.strerror}){hint}.") from None
    except UnicodeDecodeError as why:
        raise error(
            f"{path}: is not UTF-8 text, or damaged (byte {why.start}){hint or '; save it as UTF-8'}."
        ) from None


def read_json(
    path: str | os.PathLike, hint: str = "", error: type[HaclError] = DataError, expected: type | None = None
) -> Any:
    """A json file's value.

    Args:
        path, hint, error: as of `read_text`. expected: dict or list, or None for whatever it is.

    Raises:
        ``error``: as `read_text`; it is no json, or something else than expected.
    """
    value = _parsed(path, read_text(path, hint, error), hint, error)
    if expected is not None and not isinstance(value, expected):
        names = {dict: "an object of names and values", list: "a list"}
        raise error(f"{path}: holds a {type(value).__name__}, expected {names[expected]}{hint}.")
    return value


def _parsed(path, text, hint="", error=DataError):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as why:
        raise error(f"{path}: is not json, half-written or damaged ({why}){hint}.") from None


def read_records(
    path: str | os.PathLike, hint: str = "", key: str | None = None, **fields: type | tuple[type, ...]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read the objects of a file of json lines, or of a json list.

    Args:
        path: of the file. hint: what to do, for the messages. key: a field that is unique in the file. fields: name and
            type (or types) of what each record must have; an empty text is not accepted.

    Yields:
        (place for messages, ``FILE: line 3`` or ``FILE: record 3``, both from 1; the record).

    Raises:
        DataError: it cannot be read, has no records, or one is not as said; the message names it.
    """
    text, seen = read_text(path, hint), set()
    for where, value in _values(path, text, hint):
        if not isinstance(value, dict):
            raise DataError(f"{where} is a {type(value).__name__}, expected an object{_of(fields)}{hint}.")
        if key in value:
            where += f" ({key} {value[key]!r})"
        for name, kinds in fields.items():
            if name not in value:
                raise DataError(f"{where} has no {name!r}; expected an object{_of(fields)}{hint}.")
            found = value[name]
            if not isinstance(found, kinds) or isinstance(found, bool) or found == "":
                kinds = kinds if isinstance(kinds, tuple) else (kinds,)
                raise DataError(f"{where} has {name} {found!r:.100}; expected {' or '.join(_KINDS[k] for k in kinds)}.")
        if key is not None:
            if str(value[key]) in seen:
                raise DataError(f"{where}: the {key} comes twice; it has to be unique in a file.")
            seen.add(str(value[key]))
        yield where, value


_KINDS = {str: "text", int: "a whole number", list: "a list", dict: "an object"}


def _of(fields):
    return f" with {', '.join(fields)}" if fields else ""


def _values(path, text, hint):
    found = False
    if text.lstrip().startswith("["):
        for number, value in enumerate(_parsed(path, text, hint), 1):
            found = True
            yield f"{path}: record {number}", value
    else:
        for number, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 may stand in a string
            if line.strip():
                found = True
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{path}: line {number} is not valid json ({error}){hint}.") from None
                yield f"{path}: line {number}", value
    if not found:
        raise DataError(f"{path}: has no records{hint}.")
