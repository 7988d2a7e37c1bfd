"""Files that appear whole or not at all, json that is read with a good error, folders for one run at a time."""

import contextlib
import json
import os
import socket
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


def finite(value: Any) -> Any:
    """A json value with null in place of nan and infinity, which json does not have."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    if hasattr(value, "item"):  # numpy's and torch's scalars
        value = value.item()
    return None if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))) else value


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


def read_lines(path: str | os.PathLike) -> Iterator[tuple[int, Any]]:
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
