"""Requests to a file, results from a file: the form of OpenAI's Batch API, which the batch runners of vLLM and others
read and write too (``vllm run-batch``).

A line of requests: ``{"custom_id", "method", "url", "body"}``. A line of results: ``{"custom_id", "response":
{"status_code", "body"}, "error"}``. A custom id is ``RUN-RECORD-TRY``: the run's own digits, the record's place, and
how many answers read from files it has had before, so that a file that is read again counts nothing twice.
"""

import contextlib
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..common.endpoint import is_completion, is_refusal
from ..config import HaclError
from . import Answer, Item
from .api import Asking
from .choice import REFUSED, Work
from .run import AGAIN

MOST_REQUESTS, LARGEST_FILE = 50_000, 190_000_000  # of one file; OpenAI takes 50,000 requests and 200 MB
_SHOWN = 5  # lines or reasons that a message names


def run_id(header: dict) -> str:
    """Eight digits that requests of a run carry; ``header``: the first line of its journal."""
    told = {key: value for key, value in header.items() if key != "input_name"}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]


def write_requests(
    asking: Asking, items: Iterable[Item], path: str, run: str, tries: Mapping[int, int]
) -> tuple[list[str], int]:
    """Write a request for each item.

    Args:
        asking: what is asked. items: `Item`, those still to be done. path: of the file; where one file would be too
            large for OpenAI, NAME-2.jsonl and so on follow. run: `run_id`. tries: {record: answers it has had}.

    Returns:
        The files, and how many requests are in them. ``asking.stopped`` says if a spending cap ended it.

    Raises:
        HaclError: a file is there already, or cannot be written; then none is left.
    """
    stem, ending = os.path.splitext(path)
    files, count, inside, size = [], 0, 0, 0
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [os.unlink(f) for f in files])
        file = None
        try:
            for item in items:
                work = Work(item)
                if not work.missing():
                    continue
                work.attempt = tries.get(item.index, 0)  # another seed than last time
                if not asking.reserve(work):
                    asking.stopped = asking.sentence()
                    break
                request = {
                    "custom_id": f"{run}-{item.index}-{work.attempt}",
                    "method": "POST",
                    "url": "/v1/chat/completions",
                }
                body = {"model": asking.model, **asking.body(work)}
                body["max_completion_tokens"] = body.pop("max_tokens")  # OpenAI's models of today take it, and vLLM
                line = json.dumps({**request, "body": body}, ensure_ascii=False)
                line = line.encode("utf-8", "replace") + b"\n"
                if file is None or inside == MOST_REQUESTS or size + len(line) > LARGEST_FILE:
                    name = f"{stem}-{len(files) + 1}{ending}" if files else path
                    file = stack.enter_context(open(name, "xb"))
                    files.append(name)
                    inside = size = 0
                file.write(line)
                inside, size, count = inside + 1, size + len(line), count + 1
        except FileExistsError as error:
            raise HaclError(f"{error.filename}: exists; give --write-requests another name.") from None
        except OSError as error:
            raise HaclError(f"{error.filename or path}: cannot be written ({error.strerror}); make room.") from None
        made = list(files)
        files.clear()  # they are whole: nothing is taken away
    return made, count


class ResultFiles(Asking):
    """A source that answers from files of results, in any order, with some missing and some twice.

    A completion counts as one answer of the model: what passes the checks is taken, and what is still missing is asked
    again, by another file of requests or online, up to ``attempts``. A result that is an error says nothing of the
    record, but for one that the endpoint's policy refuses; it is counted, and asked again.

    Args:
        paths: of the files. run: `run_id`. tries: {record: answers it has had}.

    Raises:
        HaclError: a file cannot be read, or is of another run; from ``answers``: all results are one error.
    """

    def __init__(self, paths: Iterable[str], run: str, tries: Mapping[int, int], **more: Any) -> None:
        super().__init__(**more)
        self.paths, self.run, self.tries = list(paths), run, tries
        self.lines, self.errors, self.damaged = 0, Counter(), []

    def answers(self, items: Iterable[Item]) -> Iterator[Answer]:
        """Yields an `Answer` for each item that the results tell something about."""
        self.stopped = None
        with contextlib.ExitStack() as stack:
            files = [self._open(stack, path) for path in self.paths]
            places = self._places(files)
            missing = 0
            for item in items:
                bodies = self._bodies(files, places.get(item.index, ()))
                if bodies is REFUSED:
                    yield Work(item).answer(REFUSED)
                elif bodies:
                    yield self._answer(item, bodies)
                else:
                    missing += 1
        self._tell(missing)

    def _open(self, stack, path):
        try:
            return stack.enter_context(open(path, "rb"))
        except OSError as error:
            raise HaclError(f"{path}: cannot be read ({error.strerror}); give --read-results a file.") from None

    def _places(self, files):
        """{record: [(file, byte)]} of the lines that belong to this run."""
        places = {}
        for number, file in enumerate(files):
            at = 0
            for count, line in enumerate(file, 1):
                start, at = at, at + len(line)
                if not line.strip():
                    continue
                try:
                    run, *numbers = json.loads(line)["custom_id"].split("-")
                    index, tried = map(int, numbers)
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    self.damaged.append(f"{self.paths[number]}:{count}")
                    continue
                if run != self.run:
                    raise HaclError(
                        f"{self.paths[number]}:{count}: a result of {run} is of another input or other settings, this "
                        f"run is {self.run}; give the file and the settings that belong together."
                    )
                self.lines += 1
                if tried == self.tries.get(index, 0):
                    places.setdefault(index, []).append((number, start))
        return places

    def _bodies(self, files, places):
        """The different completions of a record, in an order that the files' own does not change; `REFUSED`; or []."""
        found, refused = {}, False
        for number, start in places:
            files[number].seek(start)
            reply = json.loads(files[number].readline())
            response = reply.get("response") if isinstance(reply.get("response"), dict) else {}
            status, body = response.get("status_code"), response.get("body")
            if status == 200 and is_completion(body):
                found[json.dumps(body["choices"], sort_keys=True)] = body
                continue
            said = reply.get("error") or (isinstance(body, dict) and (body.get("error") or body)) or "no answer"
            text = json.dumps(said)
            refused = refused or is_refusal(status, said)
            message = said.get("message") if isinstance(said, dict) else said
            self.errors[f"{status or 'error'}: {' '.join(str(message or text).split())[:200]}"] += 1
        return [found[key] for key in sorted(found)] or (REFUSED if refused else [])

    def _answer(self, item, bodies):
        work = Work(item)
        work.attempt = self.tries.get(item.index, 0)
        for body in bodies:
            if self.take(work, body):
                return work.answer()
        return work.answer()._replace(captions=(), reason=f"{AGAIN}{work.reason}", failed=True)

    def _tell(self, missing):
        if self.damaged:
            more = f" and {len(self.damaged) - _SHOWN} more" if len(self.damaged) > _SHOWN else ""
            shown = f"{', '.join(self.damaged[:_SHOWN])}{more}"
            print(f"warning: {len(self.damaged)} lines of results cannot be read: {shown}", file=sys.stderr)
        if self.errors:
            said = "; ".join(f"{n} times {reason}" for reason, n in self.errors.most_common(_SHOWN))
            if self.errors.total() == self.lines:
                raise HaclError(f"no result is an answer: {said}. Mend that, and ask again.")
            print(f"warning: {self.errors.total()} results are errors: {said}", file=sys.stderr)
        if missing:
            self.stopped = (
                f"{missing} captions have no result yet; ask for them by --write-requests, or by the same command with "
                "neither --write-requests nor --read-results."
            )
