"""Files of json lines that grow by whole lines, and are gone on with after a kill."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..config import DataError, HaclError
from .files import finite, write_text

SYNC_EVERY = 5  # seconds between writes to the disk itself: what a power cut may cost; a kill costs nothing
_SHOWN, _SURE = 3, 9  # damaged lines named; bytes by which a header that a kill has cut is known from a foreign file


def dumps(value: Any) -> bytes:
    """A value as one line; half of a surrogate pair is written as json's escape of it, nan and infinity as null."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:  # a bad record's id may be anything that Python reads as json
        text = json.dumps(finite(value), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def write(path: str | os.PathLike, values: Iterable) -> None:
    """Write a whole file of json lines, so that it appears whole or not at all."""
    write_text(path, b"".join(map(dumps, values)).decode())


def read(path: str | os.PathLike) -> Iterator[Any]:
    """The values of a file's lines, none where there is no file; a line that was cut is passed over."""
    try:
        with open(path, "rb") as file:
            for line in file:
                try:
                    yield json.loads(line)
                except ValueError:
                    continue
    except FileNotFoundError:
        return


def append(path: str | os.PathLike, values: Iterable) -> None:
    """Add lines to a file that several processes write, by one write; what a kill cut before is closed first.

    Raises:
        OSError: what the disk says.
    """
    os.makedirs(os.path.dirname(os.fspath(path)) or ".", exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        end = os.fstat(file).st_size
        whole = not end or os.pread(file, 1, end - 1) == b"\n"
        os.write(file, (b"" if whole else b"\n") + b"".join(map(dumps, values)))
    finally:
        os.close(file)


class Journal:
    """One process's append-only file of json lines: a kill leaves whole lines, and the next start goes on behind them.

    Args:
        path: of the file, made where it is not there.
        keep: called with (value, byte where its line begins) of each line that is there, and of each that is added;
            it raises ValueError, KeyError, TypeError or IndexError for one that is none of this journal's.
        header: the value that a new file begins with, or None. begin: called with what an old one begins with (None
            where that is no json), before anything else is read; it raises, or says whether to throw all of it away.
        damaged: what becomes of a line in the middle that cannot be read: "refuse" it, or "skip" it with a warning.

    Raises:
        DataError: a line is damaged. HaclError: the file cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        keep: Callable[[Any, int], None],
        header: Any = None,
        begin: Callable[[Any], bool] = lambda begun: False,
        damaged: str = "refuse",
    ):
        self.path, self._keep = os.fspath(path), keep
        self._file = self._reader = None  # opened by the first line that is added, and by the first that is looked up
        self._synced = time.monotonic()
        empty = True
        try:
            with open(self.path, "rb") as lines:
                empty = header is not None and self._starts_anew(lines, header, begin)
                if not empty:
                    end = self._read(lines, header is not None, damaged)
                    if end < os.fstat(lines.fileno()).st_size:
                        print(f"{self.path}: the last line was not written to its end; it is cut off.", file=sys.stderr)
                        os.truncate(self.path, end)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror}).") from None
        if empty and header is not None:
            self._write(dumps(header), anew=True)

    @staticmethod
    def _starts_anew(lines, header, begin):
        """Whether nothing is to be kept: it is new, was killed within its first line, or `begin` says so."""
        first = lines.readline()
        if not first.endswith(b"\n") and dumps(header).startswith(first[:_SURE]):
            return True
        try:
            begun = json.loads(first)
        except ValueError:
            begun = None
        lines.seek(0)
        return begin(begun)

    def _read(self, lines, headed, damaged):
        """Hands the lines to `keep`; where the last whole one ends."""
        bad, place, end = [], 0, 0
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                break  # killed while writing it
            place, end = end, end + len(line)
            if number == 1 and headed:
                continue
            try:
                self._keep(json.loads(line), place)
            except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
                if damaged == "refuse":
                    raise DataError(f"{self.path}: line {number} is damaged ({error}); remove it to go on.") from None
                bad.append(str(number))
        if bad:
            more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
            print(
                f"warning: {self.path}: {len(bad)} lines are damaged ({', '.join(bad[:_SHOWN])}{more}); what they "
                "answered is asked again.",
                file=sys.stderr,
            )
        return end

    def append(self, value: Any) -> None:
        """Add a line: it outlives this process at once, and a power cut after `SYNC_EVERY` seconds.

        Raises:
            HaclError: it cannot be written; the lines before it are whole.
        """
        self._keep(value, self._write(dumps(value)))

    def _write(self, line, anew=False):
        place = None
        try:
            if self._file is None:
                self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115  (kept open)
            if anew:
                self._file.truncate(0)
            place, written = self._file.seek(0, os.SEEK_END), 0
            while written < len(line):
                written += self._file.write(line[written:])
            if time.monotonic() - self._synced > SYNC_EVERY:
                self.sync()
        except OSError as error:
            if place is not None:
                os.truncate(self.path, place)
            raise HaclError(
                f"{self.path}: cannot be written ({error.strerror}); the answers so far are safe in it. Make room and "
                "give the same command again."
            ) from None
        return place

    def at(self, place: int) -> Any:
        """The value of the line that begins at a byte."""
        if self._reader is None:
            self._reader = open(self.path, "rb")  # noqa: SIM115
        self._reader.seek(place)
        return json.loads(self._reader.readline())

    def sync(self) -> None:
        """To the disk itself."""
        if self._file is not None:
            os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        """`sync`, and close the file; again does no harm."""
        if self._file is not None:
            self.sync()
        for file in (self._file, self._reader):
            if file is not None:
                file.close()
        self._file = self._reader = None

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
