"""What a model is asked for hallucinated captions, and the reading of what it answers."""

import hashlib
import json
import re
from collections import Counter

from ..config import HaclError
from . import KINDS, Answer, Item

# Quoted from "Hallucination Augmented Contrastive Learning for Multimodal Large Language Model" (arXiv 2312.06968), so
# that captions made with it compare with the paper's.
PAPER_PROMPT = (
    "Hallucination in Large-scale Visual Language Models (LVLMs) refers to cases where these models generate "
    "descriptions introducing elements that are inconsistent with the content or completely absent from a provided "
    "image. These hallucinations can be coarse-grained, focusing on the mere existence of objects, or fine-grained, "
    "focusing on more specific attributes or characteristics such as quantity, properties, and locations. Your task is "
    "to revise a given caption to create a mirrored version that closely aligns with the original's content and length "
    "but incorporates elements of hallucination. The first step involves identifying the objects involved and their "
    "associated attributes within the given caption. Subsequently, combine this insight with the details concerning "
    "hallucinations provided above to complete your task."
)

EXPLAINED = {
    "existence": "name an object that is not in the image, added or in place of one that is",
    "attribute": "change a property of an object, such as its color, size, material or what it does",
    "quantity": "change how many there are of something",
    "location": "change where something is, or how things stand to each other",
}

REFUSED = "refused by the model"
REFUSAL = re.compile(
    r"\W*(I['’]m |I am )?(sorry\b|unable to|not able to|I can(['’]t|not) |I won['’]t |as an AI )", re.I
)

# The answer's form, as strict structured output takes it: every property required, no other allowed.
SCHEMA = {
    "type": "object",
    "properties": {
        "captions": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"kind": {"type": "string", "enum": list(KINDS)}, "caption": {"type": "string"}},
                "required": ["kind", "caption"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["captions"],
    "additionalProperties": False,
}


def _quoted(value):
    """JSON in which braces, quotes and line ends of a caption are harmless; half an emoji becomes "?"."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace").decode()


class Prompt:
    """The chat messages for an `Item`.

    ``system``: the system prompt. ``examples``: {"caption", "hallucinated_caption", "kind"} dicts, shown to the model
    as earlier turns.
    """

    def __init__(self, system=PAPER_PROMPT, examples=()):
        self.system, self.examples = system, tuple(examples)

    def messages(self, item, avoid=()):
        """The messages that ask for one caption per kind in ``item.wanted``; ``avoid``: texts not to be given again."""
        turns = [("system", self.system)]
        for example in self.examples:
            kind, text = example["kind"], example["hallucinated_caption"]
            turns.append(("user", self._request(Item(0, "", example["caption"], wanted=(kind,)))))
            turns.append(("assistant", _quoted({"captions": [{"kind": kind, "caption": text}]})))
        turns.append(("user", self._request(item, avoid)))
        return [{"role": role, "content": text} for role, text in turns]

    def _request(self, item, avoid=()):
        form = {"captions": [{"kind": kind, "caption": "..."} for kind in item.wanted]}
        lines = [f"Caption: {_quoted(item.caption)}"]
        if item.others:
            lines.append(f"Other captions of the same image, true as well: {_quoted(item.others)}")
        lines.append(f"Hallucinated versions to write: {len(item.wanted)}, one of each kind in this list.")
        lines += [f"{n}. {kind}: {EXPLAINED[kind]}." for n, kind in enumerate(item.wanted, 1)]
        lines.append(
            "Each is about as long as the caption, differs in words that matter, and is not true of the image."
        )
        if avoid:
            lines.append(f"Not to be given again: {_quoted(list(avoid))}")
        lines.append(f"Answer with JSON only, in this form: {_quoted(form)}")
        return "\n".join(lines)

    def digest(self):
        """16 hex digits that change with the prompt, the examples or the form of the request."""
        sample = Item(0, "", "a caption", ("another",), KINDS)
        return hashlib.sha256(json.dumps(self.messages(sample, ["a text"])).encode()).hexdigest()[:16]


# A line of an answer without what is put around it: "1. A cat.", '- "A cat."', "Hallucinated caption: A cat."
_PLAIN = re.compile(r'^\s*(?:\d+[.)]|[-*•](?!\*))?\s*(?:[\w ]{0,30}caption\s*:)?\s*"?(.*?)"?\s*$', re.IGNORECASE)


def parse(text, item):
    """The (kind, caption) pairs in a model's answer to ``item``, white space made single.

    Read are the form asked for, a bare list of its entries, and a list of strings (of the kinds wanted, in order), with
    reasoning, code fences or other text around; and, from models that know no JSON, just as many lines as are wanted.
    Entries that are of no use are left out.

    Raises:
        ValueError: nothing usable; the message is a short reason.
    """
    text = text.rsplit("</think>", 1)[-1].rstrip()
    values, at, reason = [], 0, "it holds no JSON" if text else "it is empty"
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) == len(item.wanted) + 1 and lines[0].rstrip().endswith(":"):
        lines = lines[1:]  # "Here it is:"
    if lines and len(lines) == len(item.wanted) and not re.search(r"[\[{<`]", text):
        # "1. A cat." and '- "A cat."' are a cat; what is chatter is for the checks to say
        if found := _entries([_PLAIN.sub(r"\1", line) for line in lines], item):
            return found
    decoder = json.JSONDecoder(strict=False)
    while match := re.compile(r"[\[{]").search(text, at):
        try:
            value, at = decoder.raw_decode(text, match.start())
            values.append(value)
        except json.JSONDecodeError as error:
            reason, at = "its JSON is malformed", match.end()
            # What is cut off stays unread: an inner entry that happens to be whole is not the answer.
            if error.pos >= len(text) or error.msg.startswith("Unterminated"):
                reason = "its JSON is cut off"
                break
        except (RecursionError, ValueError):
            reason = "its JSON is nested too deep, or has a number too long to read"
            break
    for value in sorted(values, key=lambda v: not isinstance(v, dict)):
        if found := _entries(value, item):
            return found
        reason = "its JSON has another form than asked for, or no caption in it"
    raise ValueError(reason)


def _entries(value, item):
    """The usable entries of a decoded answer, or []."""
    if isinstance(value, dict) and "kind" not in value:
        value = next((v for k, v in value.items() if "caption" in k.lower()), None)
    wanted, found = item.wanted or KINDS, []
    for position, entry in enumerate(value if isinstance(value, list) else [value]):
        kind = wanted[min(position, len(wanted) - 1)]
        if isinstance(entry, dict):
            said = str(entry.get("kind")).lower()
            kind = next((k for k in KINDS if k in said), kind)  # "object existence"
            entry = next((v for k, v in entry.items() if "caption" in k.lower()), None)
        caption = " ".join(entry.split()) if isinstance(entry, str) else ""
        # Control characters and half surrogate pairs cannot be written or tokenized as text.
        if caption and not re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", caption):
            found.append((kind, caption))
    return found


class Work:
    """What is known of one item so far: captions taken, candidates refused, tokens paid."""

    def __init__(self, item):
        self.item, self.got, self.refused = item, [], []
        self.rejected, self.usage, self.reserved = Counter(), Counter(), Counter()
        self.attempt = self.cut = self.failures = 0
        self.reason, self.unread = None, False

    def missing(self):
        """The kinds still wanted; a caption of a kind that was not asked for fills the first place."""
        left = list(self.item.wanted)
        for kind, _ in self.got:
            left.remove(kind if kind in left else left[0])
        return tuple(left)

    def read(self, text, checker):
        """Take from a model's answer what passes the checks; True if it declines.

        ``unread`` says afterwards whether nothing could be read, ``reason`` why something is still missing.
        """
        wanted, candidates = self.missing(), []
        try:
            candidates = parse(text, self.item._replace(wanted=wanted))
        except ValueError as error:
            self.reason = f"no usable answer: {error}"
        self.unread = not candidates
        # Captions of photo sites do start with "I can't believe"; then so do their rewrites.
        if all(REFUSAL.match(t) for t in [t for _, t in candidates] or [text]) and not REFUSAL.match(self.item.caption):
            self.reason = REFUSED
            return True
        if candidates:
            self._check(wanted, candidates, checker)
        return False

    def _check(self, wanted, candidates, checker):
        # those of a kind wanted come first
        self.reason = "the model gave too few"
        for kind, text in sorted(candidates, key=lambda c: c[0] not in wanted):
            if not self.missing():
                break
            problem = checker.problem(self.item, text, tuple(t for _, t in self.got))
            if problem:
                self.rejected[problem] += 1
                self.refused.append(text)
                self.reason = "every other candidate was rejected" if self.got else "every candidate was rejected"
            else:
                self.got.append((kind, text))

    def answer(self, reason=None, failed=False):
        got, wanted = len(self.got), len(self.item.wanted)
        reason = None if got == wanted else reason or self.reason
        reason = f"{got} of {wanted}: {reason}" if got and reason else reason
        captions, usage = tuple(self.got), dict(self.usage)
        return Answer(self.item.index, captions, reason, failed and not got, dict(self.rejected), usage)


def _read(path, what):
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        raise HaclError(f"{path}: cannot be read ({error.strerror}); give {what}.") from None
    except UnicodeDecodeError as error:
        raise HaclError(f"{path}: is not UTF-8 text (byte {error.start}); give {what}.") from None


def read_prompt(path):
    """The system prompt in a text file. HaclError if there is none."""
    text = _read(path, "a text file that holds the system prompt").strip()
    if not text:
        raise HaclError(f"{path}: is empty; write the system prompt into it, or leave it out for the paper's.")
    return text


def read_examples(path):
    """The examples in a jsonl file, as `Prompt` takes them. HaclError names the line of a bad one."""
    keys, examples = ("caption", "hallucinated_caption", "kind"), []
    for n, line in enumerate(_read(path, "a jsonl file of examples").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise HaclError(f"{path}, line {n}: is not JSON ({error}); write one object a line.") from None
        found = [record.get(key) for key in keys] if isinstance(record, dict) else []
        if not found or not all(isinstance(value, str) and value.strip() for value in found):
            raise HaclError(
                f"{path}, line {n}: needs a text under each of {', '.join(keys)}; got {line.strip()[:100]}."
            )
        if record["kind"] not in KINDS:
            raise HaclError(f"{path}, line {n}: the kind is {record['kind']!r}, allowed is one of {', '.join(KINDS)}.")
        examples.append({key: record[key] for key in keys})
    if not examples:
        raise HaclError(f"{path}: holds no example; write one JSON object a line, with {', '.join(keys)}.")
    return examples
