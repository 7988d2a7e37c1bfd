"""The run: from a LLaVA-format file to the same file with hallucinated captions, resumable at any moment.

Each answer is appended to a journal beside the target, one json line, as it comes; the target is assembled from input
and journal at the end, and renamed into place. The same command goes on where a killed one stopped.
"""

import array
import contextlib
import functools
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ..common import jsonl
from ..common.files import locked
from ..config import DataError, HaclError
from ..records import (
    caption_of,
    hallucinated_captions,
    name_of,
    problem_of,
    stream_records,
    with_captions,
    write_records,
)
from . import Answer, Item, chance
from .blind import SAMPLE, Candidate, fit
from .source import BLOCK

if TYPE_CHECKING:
    from .likelihood import Likelihood

EXIT_INCOMPLETE = 1  # some records are still to be asked for: the same command does it
SEVERAL = 4  # times as many captions, where there is a choice among them
AGAIN = "results: "  # begins the reason of a record whose answer, read from a file, did not do
_SHOWN = 10  # problems named in a message


class Survey:
    """One pass over the input: what is in it, before anything is paid for or written.

    Attributes:
        records: how many. digest: sha256 of their texts. problems: [(index, name, what is wrong)] of records that have
        no caption to rewrite or share an id. skip: {index: reason} for records to be left as they are. images: how
        many have one. captions: how many are to be rewritten; characters: their total length.
    """

    def __init__(self, path: str | os.PathLike, replace: bool = False) -> None:
        self.path, self.records, self.images, self.captions, self.characters = path, 0, 0, 0, 0
        self.problems, self.skip, self.duplicates = [], {}, 0
        digest, ids, images, repeated, text_only = hashlib.sha256(), set(), set(), set(), []
        for index, (text, record) in enumerate(_shown(stream_records(path), "reading")):
            digest.update(text.encode())
            self.records += 1
            problem = problem_of(record, plain=False)
            if problem is None and not any(turn["from"] == "gpt" for turn in record["conversations"]):
                problem = "has no answer (no turn from 'gpt'), so there is no caption to rewrite"
            if problem is not None:
                self.problems.append((index, name_of(path, index, record), problem))
                self.skip[index] = "bad record"
                continue
            if "id" in record:
                key = hash(repr(record["id"]))
                if key in ids:
                    self.duplicates += 1
                    self.problems.append((index, name_of(path, index, record), "has an id that an earlier record has"))
                ids.add(key)
            if record.get("image"):
                self.images += 1
                key = hash(record["image"])
                (repeated if key in images else images).add(key)
            else:
                text_only.append(index)
            caption = caption_of(record)
            if not caption:
                self.skip[index] = "empty caption"
            elif hallucinated_captions(record) and not replace:
                self.skip[index] = "has hallucinated captions already"
            else:
                self.captions += 1
                self.characters += len(caption)
        if self.images:
            for index in text_only:
                if self.skip.setdefault(index, "no image") == "no image":
                    self.captions -= 1
        self.digest = digest.hexdigest()[:16]
        self.same_image = {}
        if repeated:
            for _, record in _shown(stream_records(path), "captions of the same image", self.records):
                if problem_of(record, plain=False) is None and hash(record.get("image")) in repeated:
                    self.same_image.setdefault(hash(record["image"]), []).append(caption_of(record))

    def others(self, record: dict[str, Any]) -> tuple[str, ...]:
        """The other captions of a record's image."""
        captions = self.same_image.get(hash(record.get("image")), ())
        mine = caption_of(record)
        return tuple(dict.fromkeys(c for c in captions if c and c != mine))

    def refuse(self) -> None:
        """Raise for what is wrong with the records, all of it in one message."""
        if not self.problems:
            return
        shown = "".join(f"\n  {name} {problem}" for _, name, problem in self.problems[:_SHOWN])
        more = f"\n  and {len(self.problems) - _SHOWN} more" if len(self.problems) > _SHOWN else ""
        raise DataError(
            f"{len(self.problems)} of {self.records} records cannot be used as they are:{shown}{more}\n"
            "Repair them, or go on with --bad-records skip: records without a caption stay as they are, "
            "records that share an id are each rewritten."
        )


class Journal:
    """What the sources answered, one json line each, under a first line that says what they answer.

    Raises:
        HaclError: another run is writing it; it belongs to another input or other settings; the disk is full.
    """

    def __init__(self, path: str | os.PathLike, header: dict[str, Any], records: int, restart: bool = False) -> None:
        self.path = path
        self.done = bytearray(records)  # 1: answered, 2: to be asked again
        self.places = array.array("q", [-1]) * records
        self.usage = {}  # {source: tokens it was paid for}
        self.tries = Counter()  # {record: answers read from files that did not do}
        self._lock, self._journal = contextlib.ExitStack(), None
        self._lock.enter_context(locked(f"{path}.lock", path, "choose another output"))
        try:
            begin = functools.partial(self._check, header, restart)
            self._journal = jsonl.Journal(path, self._keep, header, begin, damaged="skip")
        except BaseException:
            self.close()
            raise

    def _check(self, header, restart, found):
        if not isinstance(found, dict) or found.get("format") != header["format"]:
            raise HaclError(f"{self.path}: is no journal of this command; move it away.") from None
        if restart:
            return True
        if found.get("input") != header["input"]:
            raise HaclError(
                f"{self.path}: the input has changed since that run began; --restart throws its answers away, another "
                "output begins anew."
            )
        for key in {**header, **found}:
            if (found.get(key) or None) != (header.get(key) or None) and key != "input_name":
                raise HaclError(
                    f"{self.path}: the run begun there had {_say(key, found.get(key))}, this one has "
                    f"{_say(key, header.get(key))}. Give the settings of then to go on, another output to begin anew, "
                    "or --restart to throw its answers away."
                )
        return False

    def _keep(self, entry, place):
        index = entry["record"]
        self.done[index] = 2 if entry.get("failed") else 1
        self.places[index] = place
        self.usage.setdefault(entry["source"], Counter()).update(entry.get("usage", {}))
        if (entry.get("reason") or "").startswith(AGAIN):  # a zero for each of 558k records would be 50 MB
            self.tries[index] += 1

    def add(self, source: str, answer: Answer) -> None:
        """Keep an `Answer` for a record that is not done."""
        entry = {"record": answer.index, "source": source, "captions": answer.captions}
        entry |= {k: v for k in ("reason", "failed", "rejected", "usage") if (v := getattr(answer, k))}
        self._journal.append(entry)

    def entry(self, index: int) -> dict[str, Any] | None:
        """What is known of a record, or None."""
        return None if self.places[index] < 0 else self._journal.at(self.places[index])

    def sync(self) -> None:
        """Bring what was added to the disk."""
        self._journal.sync()

    def close(self) -> None:
        """Close the file, and let other runs write it."""
        if self._journal is not None:
            self._journal.close()
        self._lock.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _say(key, value):
    return f"{key} {json.dumps(value)}" if value is not None else f"no {key}"


def _bar(iterable=None, **settings):
    # in a file, a line now and then is enough
    live = sys.stderr is not None and sys.stderr.isatty()
    return tqdm(iterable, mininterval=0.5 if live else 60, disable=sys.stderr is None, **settings)


def _shown(iterable, what, total=None):
    return _bar(iterable, desc=what, total=total, unit=" records", leave=False, delay=2)


class Run:
    """One input, one output, some sources.

    Args:
        source, target: paths. sources: {name: (share, source object)}. settings: what the answers depend on, as json;
        a journal that was begun with others is refused. per_caption: hallucinated captions for each caption.
        types: {kind: weight}. several: names of sources asked for `SEVERAL` times as many; `balance` chooses.
        bad_records: "refuse" or "skip". replace: also records that have hallucinated captions.
        limit: only the first so many records. restart: throw an earlier run's answers away.
    """

    def __init__(
        self,
        source: str | os.PathLike,
        target: str | os.PathLike,
        *,
        settings: dict[str, Any],
        per_caption: int,
        types: Mapping[str, float],
        seed: int,
        several: Iterable[str] = (),
        bad_records: str = "refuse",
        replace: bool = False,
        limit: int | None = None,
        restart: bool = False,
    ) -> None:
        self.source, self.target = os.fspath(source), os.fspath(target)
        self.per_caption, self.types, self.seed, self.limit = per_caption, types, seed, limit
        self.several, self.taken = frozenset(several), {}
        self.journal_path = self.target + ".journal"
        self._check_target(restart)
        self.survey = Survey(self.source, replace)
        if bad_records == "refuse":
            self.survey.refuse()
        for _, name, problem in self.survey.problems[:_SHOWN]:
            print(f"warning: {name} {problem}.", file=sys.stderr)
        self.header = {"format": "hacl_llava hallucinated captions 1", "input": self.survey.digest, **settings}
        self.restart = restart
        self.journal = None

    def _check_target(self, restart):
        folder = os.path.dirname(os.path.abspath(self.target))
        if os.path.isdir(self.target):
            raise HaclError(f"{self.target}: is a folder; give the name of the json to write.")
        if not os.path.isdir(folder):
            raise HaclError(f"{folder}: is no folder; make it, or choose another output.")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise HaclError(f"{folder}: is not writable; choose another output.")
        for ending in ("", ".journal", ".journal.lock", ".part"):
            mine = self.target + ending
            if os.path.exists(self.source) and os.path.exists(mine) and os.path.samefile(self.source, mine):
                raise HaclError(f"{mine}: is the input itself; choose another output.")
        if os.path.exists(self.target):
            if not os.path.exists(self.journal_path) and not restart:
                raise HaclError(
                    f"{self.target}: exists, and no journal of a run is beside it; choose another output, or "
                    "--restart to replace it."
                )

    def open(self) -> Journal:
        """Take the journal, and with it the right to write."""
        self.journal = Journal(self.journal_path, self.header, self.survey.records, self.restart)
        return self.journal

    def wanted(self, index: int, times: int = 1) -> tuple[str, ...]:
        """The kinds to ask for, one for each hallucinated caption of a record; different ones while there are any.

        Args:
            times: how many times as many as are to be written.
        """
        kinds = []
        for turn in range(self.per_caption * times):
            fewest = min(kinds.count(k) for k, w in self.types.items() if w > 0)
            left = {k: w for k, w in self.types.items() if w > 0 and kinds.count(k) == fewest}
            at = chance(self.seed, "kind", index, turn) * sum(left.values())
            for kind, weight in left.items():
                chosen, at = kind, at - weight
                if at < 0:
                    break
            kinds.append(chosen)
        return tuple(kinds)

    def _item(self, index, record, several=False):
        name = name_of(self.source, index, record)
        wanted, enough = self.wanted(index, SEVERAL if several else 1), self.per_caption if several else None
        try:
            return Item(index, name, caption_of(record), self.survey.others(record), wanted, enough)
        except (KeyError, TypeError, AttributeError):
            raise self._changed() from None

    def every(self) -> Iterator[Item]:
        """The `Item` of every record that has a caption to rewrite, done or not."""
        records = _shown(stream_records(self.source), "counting words", self.survey.records)
        for index, (_, record) in enumerate(records):
            if index not in self.survey.skip:
                yield self._item(index, record)

    def items(self, mine: Callable[[int], bool], whole_blocks: bool = False, several: bool = False) -> Iterator[Item]:
        """The `Item` of every record that is still to be done; ``mine(index)``: whether a source has it; ``several``:
        whether it is asked for more than are to be written."""
        block, done = [], self.journal.done
        for index, (_, record) in enumerate(stream_records(self.source)):
            if self.limit is not None and index >= self.limit and not (whole_blocks and index % BLOCK):
                break
            if block and index // BLOCK != block[0].index // BLOCK:
                if not all(done[i.index] == 1 for i in block):
                    yield from block
                block = []
            if index in self.survey.skip or not mine(index) or done[index] == 1 and not whole_blocks:
                continue
            block.append(self._item(index, record, several))
            if not whole_blocks:
                yield block.pop()
        if not all(done[i.index] == 1 for i in block):
            yield from block

    def split(self, sources: Mapping[str, tuple[float, Any]]) -> dict[str, Callable[[int], bool]]:
        """{name: function that says whether it has a record}, by the sources' shares."""
        total, at, bounds = sum(share for share, _ in sources.values()), 0.0, {}
        for name, (share, _) in sources.items():
            bounds[name] = (at / total, (at + share) / total)
            at += share
        if len(bounds) == 1:
            return {name: lambda index: True for name in bounds}
        seed = self.seed
        return {n: lambda i, a=a, b=b: a <= chance(seed, "source", i) < b for n, (a, b) in bounds.items()}

    def remaining(self, mine: Callable[[int], bool]) -> int:
        """How many records a source has still to do, of those that can be told without reading."""
        last = self.survey.records if self.limit is None else min(self.limit, self.survey.records)
        done, skip = self.journal.done, self.survey.skip
        return sum(done[i] != 1 and i not in skip and mine(i) for i in range(last))

    def ask(
        self, sources: Mapping[str, tuple[float, Any]], cost: Callable[[Mapping[str, int]], float] | None = None
    ) -> list[str]:
        """Ask every source for its records, one source after the other; answers go to the journal as they come.

        Args:
            sources: {name: (share, source)}. cost: tokens to dollars, for the progress bar.

        Returns:
            Sentences of sources that stopped early.
        """
        stopped = []
        split = self.split(sources)
        for name, (_, source) in sources.items():
            todo = self.remaining(split[name])
            if not todo:
                continue
            failed = without = seen = 0
            usage = self.journal.usage.setdefault(name, Counter())
            before = cost and cost(usage)
            with _bar(total=todo, desc=name, unit=" captions") as bar:
                answers = source.answers(self.items(split[name], source.whole_blocks, name in self.several))
                try:
                    for answer in answers:
                        beyond = self.limit is not None and answer.index >= self.limit
                        if self.journal.done[answer.index] == 1 or beyond:
                            continue
                        self.journal.add(name, answer)
                        seen += 1
                        failed += answer.failed
                        without += not answer.captions and not answer.failed
                        if seen % 64 == 0 or answer.usage:
                            shown = {"failed": failed, "without": without}
                            if cost and name == "api":
                                paid = cost(usage)
                                to_go = (paid - before) / seen * (todo - seen)
                                shown |= {"$": f"{paid:.2f}", "$ to go": f"{to_go:.2f}"}
                            bar.set_postfix(shown, refresh=False)
                        bar.update()
                finally:
                    answers.close()
                    self.journal.sync()
            if source.stopped:
                stopped.append(source.stopped)
        return stopped

    def balance(self, likelihood: "Likelihood | None" = None) -> None:
        """Choose among what sources gave that were asked for several: so that the words alone tell nothing.

        Args:
            likelihood: a language model that looks at them first, or None.
        """
        if not self.several:
            return

        def proposed(least=0.0):
            for index, (_, record) in enumerate(stream_records(self.source)):
                entry = self.journal.entry(index) if index < self.survey.records else None
                if entry and entry["captions"] and entry["source"] in self.several:
                    if chance(self.seed, "sample", index) >= least:
                        found = [(index, caption_of(record), [Candidate(*each) for each in entry["captions"]])]
                        yield from ((i, c, *(likelihood.judge([(c, f)]) if likelihood else [f])) for i, c, f in found)

        share = SAMPLE / max(self.survey.records, 1)
        choice = fit(
            ((caption, found) for _, caption, found in proposed(1 - share)), self.types, self.per_caption, self.seed
        )
        for index, caption, found in proposed():
            self.taken[index] = choice.take(index, caption, found)

    def entry(self, index: int) -> dict[str, Any] | None:
        """The journal's entry of a record, with the captions that are written; None if there is none."""
        entry = self.journal.entry(index)
        return {**entry, "captions": self.taken[index]} if entry and index in self.taken else entry

    def assemble(self) -> None:
        """Write the target from input and journal.

        Raises:
            HaclError: it cannot be written; what was there before is untouched.
        """

        def texts():
            digest = hashlib.sha256()
            for index, (text, record) in enumerate(_shown(stream_records(self.source), "writing", self.survey.records)):
                digest.update(text.encode())
                entry = self.entry(index) if index < self.survey.records else None
                kinds, captions = zip(*entry["captions"]) if entry and entry["captions"] else ((), ())
                yield with_captions(text, record, list(captions), list(kinds)) if captions else text

            if digest.hexdigest()[:16] != self.survey.digest:
                raise self._changed()

        try:
            write_records(self.target, texts())
        except OSError as error:
            raise HaclError(
                f"{self.target}: cannot be written ({error.strerror or error}); the answers are safe in "
                f"{self.journal_path}. Make room and give the same command again."
            ) from None

    def _changed(self):
        return HaclError(f"{self.source}: was changed while it was being read; nothing was written.")

    def entries(self) -> Iterator[tuple[int, dict[str, Any] | None]]:
        """(index, journal entry or None) of every record, in order."""
        for index in range(self.survey.records):
            yield index, self.entry(index)

    def summary(self) -> dict[str, Any]:
        """Counts of the whole run so far, for people and for the report; and which records are without, by reason."""
        found = {
            "records": self.survey.records,
            "with hallucinated captions": 0,
            "captions": 0,
            "failed": 0,
            "to do": 0,
            "kinds": Counter(),
            "sources": Counter(),
            "without": Counter(),
            "without_records": {},
            "rejected": Counter(),
            "usage": {source: dict(usage) for source, usage in self.journal.usage.items() if usage},
        }
        for index, entry in self.entries():
            reason = self.survey.skip.get(index)
            if reason is None and entry is None:
                found["to do"] += 1
                continue
            if reason is None:
                found["rejected"].update(entry.get("rejected", {}))
                found["failed"] += bool(entry.get("failed"))
                reason = None if entry["captions"] else entry["reason"]
            if reason is not None:
                found["without"][reason] += 1
                found["without_records"].setdefault(reason, []).append(index)
            else:
                found["with hallucinated captions"] += 1
                found["captions"] += len(entry["captions"])
                found["sources"][entry["source"]] += len(entry["captions"])
                found["kinds"].update(k for k, _ in entry["captions"])
        return found
