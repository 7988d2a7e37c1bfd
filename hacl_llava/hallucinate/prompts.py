"""What a model is asked for hallucinated captions, and the reading of what it answers."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from ..common.files import is_number, read_text
from ..config import HaclError
from . import KINDS, Item
from .checks import RATIO

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
FORMATS = {  # names of `Settings.response_format`
    "schema": {"type": "json_schema", "json_schema": {"name": "captions", "strict": True, "schema": SCHEMA}},
    "json": {"type": "json_object"},
    "text": None,
}


def _quoted(value):
    """JSON in which braces, quotes and line ends of a caption are harmless; half an emoji becomes "?"."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace").decode()


class Prompt:
    """The chat messages for an `Item`.

    ``system``: the system prompt. ``examples``: {"caption", "hallucinated_caption", "kind"} dicts, shown to the model
    as earlier turns.
    """

    def __init__(self, system: str = PAPER_PROMPT, examples: Iterable[Mapping[str, str]] = ()) -> None:
        self.system, self.examples = system, tuple(examples)

    def messages(self, item: Item, avoid: Iterable[str] = ()) -> list[dict[str, str]]:
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

    def digest(self) -> str:
        """16 hex digits that change with the prompt, the examples or the form of the request."""
        sample = Item(0, "", "a caption", ("another",), KINDS)
        return hashlib.sha256(json.dumps(self.messages(sample, ["a text"])).encode()).hexdigest()[:16]


# A line of an answer without what is put around it: "1. A cat.", '- "A cat."', "Hallucinated caption: A cat."
_PLAIN = re.compile(r'^\s*(?:\d+[.)]|[-*•](?!\*))?\s*(?:[\w ]{0,30}caption\s*:)?\s*"?(.*?)"?\s*$', re.IGNORECASE)


def parse(text: str, item: Item) -> list[tuple[str, str]]:
    """The (kind, caption) pairs in a model's answer to ``item``, white space made single.

    Read are the form asked for, a bare list of its entries, and a list of strings (of the kinds wanted, in order), with
    code fences or other text around; and, from models that know no JSON, just as many lines as are wanted.
    Entries that are of no use are left out.

    Raises:
        ValueError: nothing usable; the message is a short reason.
    """
    text = text.rstrip()
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


# ---- the prompt file


@dataclass(frozen=True)
class Settings:
    """The settings of a prompt file (YAML or JSON); a prompt file of plain text is the ``prompt`` alone.

    Raises:
        HaclError: a value that is not allowed.
    """

    prompt: str = PAPER_PROMPT  # the system prompt
    examples: tuple = ()  # {"caption", "hallucinated_caption", "kind"}, shown to the model as earlier turns
    temperature: float = 1.0  # of sampling
    attempts: int = 3  # for each caption, until checks pass
    max_output_tokens: int | None = None  # of one answer; None: by the caption's length
    response_format: str = "schema"  # of `FORMATS`; what the endpoint does not take is left for the next
    length_ratio: tuple = RATIO  # smallest and largest number of tokens, as a share of the caption's
    key_env: str = "OPENAI_API_KEY"  # the environment variable that holds the key
    timeout: float = 60.0  # seconds for one request
    retries: int = 6  # of a request after 429, 5xx, a time-out
    requests_per_minute: float | None = None  # sent at most; None: no limit but the endpoint's
    price: tuple | None = None  # dollars per million tokens, (input, output), for the cost shown
    max_cost: float | None = None  # dollars, not to be passed over all starts of a run

    def __post_init__(self) -> None:
        for name, allowed, right in (
            ("prompt", "a text", lambda v: isinstance(v, str) and v.strip()),
            ("temperature", "a number from 0", lambda v: is_number(v) and v >= 0),
            ("attempts", "a whole number from 1", lambda v: _whole(v) and v >= 1),
            ("max_output_tokens", "a whole number from 1", lambda v: v is None or _whole(v) and v >= 1),
            ("response_format", f"one of {', '.join(FORMATS)}", lambda v: isinstance(v, str) and v in FORMATS),
            ("length_ratio", "[MIN, MAX] with 0 <= MIN <= 1 <= MAX", lambda v: _pair(v) and 0 <= v[0] <= 1 <= v[1]),
            ("key_env", "the name of a variable", lambda v: isinstance(v, str) and v.strip()),
            ("timeout", "a number of seconds above 0", lambda v: is_number(v) and v > 0),
            ("retries", "a whole number from 0", lambda v: _whole(v) and v >= 0),
            ("requests_per_minute", "a number above 0", lambda v: v is None or is_number(v) and v > 0),
            ("price", "[INPUT, OUTPUT], numbers from 0", lambda v: v is None or _pair(v) and min(v) >= 0),
            ("max_cost", "a number from 0", lambda v: v is None or is_number(v) and v >= 0),
        ):
            if not right(value := getattr(self, name)):
                raise HaclError(f"{name} is {value!r}; allowed is {allowed}.")
        if self.max_cost is not None and self.price is None:
            raise HaclError(
                f"max_cost is {self.max_cost}, but without a price nothing can be counted against it; give price too, "
                "the dollars per million tokens of input and of output."
            )


def _whole(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _pair(value):
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(is_number, value))


def read_settings(path: str | os.PathLike) -> Settings:
    """Read a prompt file: ``.yaml``, ``.yml`` and ``.json`` hold `Settings` by name, any other the system prompt.

    Raises:
        HaclError: it cannot be read, or holds something that is not known or not allowed; the message names it.
    """
    text = read_text(path, "; give a text with the system prompt, or YAML with settings", HaclError)
    if Path(path).suffix.lower() not in (".yaml", ".yml", ".json"):
        if not text.strip():
            raise HaclError(f"{path}: is empty; write the system prompt into it, or leave it out for the paper's.")
        return Settings(prompt=text.strip())
    import yaml

    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise HaclError(f"{path}: is not YAML ({' '.join(str(error).split())}).") from None
    known = [field.name for field in fields(Settings)]
    if not isinstance(values, dict) or not values:
        raise HaclError(f"{path}: holds no settings; write NAME: VALUE, one a line, of {', '.join(known)}.")
    if unknown := [name for name in values if name not in known]:
        raise HaclError(f"{path}: {unknown[0]!r} is no setting; known are {', '.join(known)}.")
    try:
        if isinstance(values.get("prompt"), str):
            values["prompt"] = values["prompt"].strip()
        for name in ("length_ratio", "price"):
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        return Settings(**{**values, "examples": _examples(values.get("examples"))})
    except HaclError as error:
        raise HaclError(f"{path}: {error}") from None


def _examples(values):
    keys = ("caption", "hallucinated_caption", "kind")
    if not isinstance(values or [], list):
        raise HaclError(f"examples is {values!r}; allowed is a list of {', '.join(keys)}.")
    for n, value in enumerate(values or (), 1):
        found = [value.get(key) for key in keys] if isinstance(value, dict) else []
        if not found or not all(isinstance(text, str) and text.strip() for text in found):
            raise HaclError(f"example {n} needs a text under each of {', '.join(keys)}; got {str(value)[:100]}.")
        if value["kind"] not in KINDS:
            raise HaclError(f"example {n}: the kind is {value['kind']!r}, allowed is one of {', '.join(KINDS)}.")
    return tuple({key: value[key] for key in keys} for value in values or ())
