"""LLaVA's dataset and collator, plus the captions that HACL contrasts."""

import contextlib
import functools
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from . import compat  # noqa: F401  (before llava)
from .common import jsonl
from .common.images import image_path, size_problem
from .config import HaclConfig, RunSettings, on_first_rank
from .packing import pack
from .records import (
    DataError,
    Records,
    caption_of,
    hallucinated_captions,
    list_records,
    name_of,
)
from .representation import suffix_ids

# isort: split
import llava.train.train as stock


def read_records(path: str | os.PathLike) -> Records:
    """Read a LLaVA-format json, or json lines, gzipped or not.

    Raises:
        DataError: the file is missing, is not json (truncated, say), or is not a list of records.
    """
    try:
        stat = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give --data_path a LLaVA-format json.") from None
    return _read_records(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=1)  # read once to be checked before the model is loaded, and once by the dataset
def _read_records(path, mtime, size):
    return list_records(path)


MOST_IN_A_ROW = 20  # records that fail, more than half of those a process has read, after which going on is of no use


class BadRecords:
    """The list of records that are not trained on, ``bad_records.jsonl`` in the run's folder: one json object a line.

    Keys: ``file``, ``index``, ``id``, ``image``, ``problem`` and ``when``, "start" for records that were left out and
    "training" for those in whose place a masked row was trained. Ranks and data workers append to one file, a line a
    write; a record is listed once, however many epochs it fails in, and over restarts.

    Args:
        path: of the file. limit: how many may fail while training runs; of all ranks that share the file.
    """

    def __init__(self, path: str | os.PathLike, limit: int) -> None:
        self.path, self.limit = os.fspath(path), limit
        self._unwritten = []  # of this process, on a full disk

    def read(self) -> list[dict[str, Any]]:
        """Lines of the file, as dicts; a line that a kill or a full disk cut is passed over."""
        return list(jsonl.read(self.path))

    def replace(self, entries: Sequence[dict[str, Any]]) -> None:
        """Start the file anew with these, or without any remove it; it appears whole."""
        if not entries:
            if os.path.exists(self.path):
                os.unlink(self.path)
            return
        os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
        jsonl.write(self.path, entries)

    def add(self, entry: dict[str, Any]) -> None:
        """Append one that failed while training runs, unless it is listed.

        Raises:
            DataError: more than ``limit`` have failed by now.
        """
        listed = self.read() + self._unwritten
        failed = {e["index"] for e in listed if e.get("when") == "training" and e.get("file") == entry["file"]}
        if entry["index"] in failed:
            return
        name = name_of(entry["file"], entry["index"], entry)
        if len(failed) >= self.limit:
            raise DataError(
                f"{name}: {entry['problem']}. {len(failed)} records have failed before it, listed in {self.path}, and "
                f"--hacl_max_failed is {self.limit}. Mend them, and give the same command again; it goes on."
            )
        try:
            jsonl.append(self.path, [entry])
        except OSError as error:
            self._unwritten.append(entry)
            print(f"HACL data: {self.path}: cannot be written ({error.strerror}).", file=sys.stderr)
        print(
            f"\nHACL data: {name}: {entry['problem']}; a masked row is trained in its place "
            f"({len(failed) + 1} of at most {self.limit}, in {self.path}).",
            file=sys.stderr,
            flush=True,
        )


def entry_of(path: str | os.PathLike, index: int, record: Any, problem: str, when: str) -> dict[str, Any]:
    """A record as a line of `BadRecords` has it."""
    known = record if isinstance(record, dict) else {}
    entry = {"file": os.fspath(path), "index": index}
    entry |= {key: known[key] for key in ("id", "image") if key in known}
    return {**entry, "problem": problem, "when": when}


def tokenize_caption(text: str, tokenizer: PreTrainedTokenizerBase, suffix: Sequence[int]) -> torch.Tensor | None:
    """Token ids of a caption, BOS before it and the suffix behind it; one that is too long is cut so that this stays.

    Args:
        suffix: `representation.suffix_ids`.

    Returns:
        A 1-d long tensor of at most ``tokenizer.model_max_length`` ids, or None for an empty text.
    """
    if not text:
        return None
    if not text.isascii():  # half of a surrogate pair, which json can hold and tokenizers refuse
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    ids = tokenizer(text, truncation=True, max_length=tokenizer.model_max_length).input_ids
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and ids[:1] != [bos]:
        ids = [bos, *ids]
    if getattr(tokenizer, "add_eos_token", False) and ids[-1:] == [eos]:
        ids = ids[:-1]
    return torch.tensor(ids[: tokenizer.model_max_length - len(suffix)] + [*suffix], dtype=torch.long)


def ensure_pad(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Give a tokenizer a padding token where LLaVA's train() left it none: it takes <unk>, which today's lack.

    A special token that texts do not hold: never EOS, which would pass for padding where it is to be learnt.

    Returns:
        What was done, or None.

    Raises:
        DataError: there is no such token.
    """
    if tokenizer.pad_token_id is not None:
        return None
    taken = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    special = [str(t) for i, t in sorted(tokenizer.added_tokens_decoder.items()) if t.special and i not in taken]
    unused = [t for t in special if not re.search("im_start|im_end|start_header|end_header|eot|eom|image|vision", t)]
    best = sorted(unused, key=lambda t: ("pad" not in t, "reserved" not in t))
    if not best:
        raise DataError(
            f"{tokenizer.name_or_path}: its tokenizer has neither <unk> nor another special token to pad rows with; "
            "add a padding token to it, within the rows of the model's embedding."
        )
    tokenizer.pad_token = best[0]
    return f"the tokenizer has no <unk> to pad rows with, so {best[0]!r} does"


class Family(NamedTuple):
    """How a language model was taught to talk: its name, and LLaVA's template for it, which this LLaVA may lack."""

    name: str
    template: str


FAMILIES = {  # by what stands in the tokenizer's chat template; the first decides
    "<|im_start|>": Family("ChatML", "chatml_direct"),
    "<|start_header_id|>": Family("Llama-3", "llava_llama_3"),
    "<\uff5cUser\uff5c>": Family("DeepSeek", "deepseek"),
    "<|user|>": Family("Zephyr", "zephyr"),
    "<<SYS>>": Family("Llama-2", "llava_llama_2"),
    "[INST]": Family("Mistral", "mistral_instruct"),
}


def family_of(tokenizer: PreTrainedTokenizerBase) -> Family | None:
    """What a tokenizer's chat template is of; None where it has none, or one of no mark."""
    own = str(tokenizer.chat_template or "")
    return next((family for mark, family in FAMILIES.items() if mark in own), None)


def answers_only(ids: torch.Tensor, tokenizer: PreTrainedTokenizerBase, answers: int) -> torch.Tensor | None:
    """Labels of a conversation in a template of ChatML's kind, by the tokens around its answers.

    For tokenizers for which LLaVA's preprocess_mpt loses count and masks every row: it takes the BOS of each round for
    the separator after it, and most of today's add none.

    Args:
        ids: [n]. answers: how many there are in the conversation.

    Returns:
        [n], an answer and what ends it, IGNORE_INDEX elsewhere; None where its tokens do not tell.
    """
    conv = stock.conversation_lib.default_conversation
    head, end = (tokenizer(text, add_special_tokens=False).input_ids for text in (conv.roles[1], conv.sep))
    row, labels = ids.tolist(), torch.full_like(ids, stock.IGNORE_INDEX)
    starts = [i + len(head) for i in range(len(row)) if row[i : i + len(head)] == head]
    cut = len(row) >= tokenizer.model_max_length
    if len(end) != 1 or len(starts) > answers or len(starts) < answers and not cut:
        return None
    for start in starts:
        stop = row.index(end[0], start) + 1 if end[0] in row[start:] else len(row)
        labels[start:stop] = ids[start:stop]
    return labels


_PROBE = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A ring."}]


def answers_in(record: dict[str, Any]) -> int:
    """How many answers a conversation has; LLaVA passes over one that comes first."""
    return sum(turn["from"] == "gpt" for turn in record["conversations"][1:])


def loses_count(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether LLaVA masks every conversation in a template of ChatML's kind, with this tokenizer."""
    if not _is_mpt():
        return False
    with contextlib.redirect_stdout(io.StringIO()):
        labels = stock.preprocess([_PROBE], tokenizer, has_image=True)["labels"]
    return not (labels[0] != stock.IGNORE_INDEX).any()


def ready(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Give a tokenizer of today what LLaVA's code takes for granted.

    Returns:
        What was done.

    Raises:
        DataError: there is no token to pad with.
    """
    done = [ensure_pad(tokenizer)]
    if not hasattr(tokenizer, "legacy"):  # asked for by the template v1, of every tokenizer
        tokenizer.legacy = not _is_mpt()
    if loses_count(tokenizer):
        done.append("LLaVA loses count of this tokenizer's tokens, so answers are found by the tokens around them")
    return [note for note in done if note]


class GuardedDataset(stock.LazySupervisedDataset):
    """LLaVA's dataset, bit for bit on records that can be used; one that cannot becomes a masked row.

    A masked row has a zero image, tokens without labels and no captions: it passes through the same modules, and
    nothing is learnt from it. It is listed (`BadRecords`), and the run goes on up to ``--hacl_max_failed``.
    ``data_args`` may have, as `integration` sets them: ``hacl_run`` (`RunSettings`) and ``hacl_bad_records``, the path
    of the list, without which a record that cannot be used raises DataError; and ``hacl_left_out``, indices in the
    file of records that are not taken.

    Items have ``record_index`` beside LLaVA's keys: the position in ``list_data_dict``; ``numbers`` has those in the
    file.
    """

    def __init__(self, data_path: str | os.PathLike, tokenizer: PreTrainedTokenizerBase, data_args: Any) -> None:
        torch.utils.data.Dataset.__init__(self)
        self.tokenizer, self.data_args, self.data_path = tokenizer, data_args, data_path
        records, left_out = read_records(data_path), getattr(data_args, "hacl_left_out", None) or ()
        self.numbers = [i for i in range(len(records)) if i not in left_out] if left_out else range(len(records))
        self.list_data_dict = records.only(self.numbers) if left_out else records
        path = getattr(data_args, "hacl_bad_records", None)
        run = getattr(data_args, "hacl_run", None) or RunSettings()
        self.bad_records = BadRecords(path, run.max_failed) if path else None
        self._read = self._lost = 0  # by this process
        self._mends = loses_count(tokenizer)
        if left_out and on_first_rank():
            print(f"HACL data: {len(left_out)} of {len(records)} records are left out, listed in {path}.")

    def __getitem__(self, i: int) -> dict[str, Any]:
        self._read += 1
        try:
            item = self._item(i)
        except Exception as error:
            self._failed(i, error)
            item = self._masked()
        item["record_index"] = i
        return item

    # Of --group_by_modality_length and --group_by_length: LLaVA's, where a record without a word, or of another form,
    # counts as one word; LLaVA refuses the first and stumbles over the second.

    @property
    def lengths(self) -> list[int]:
        """Words of each record, and 128 for an image."""
        return [_words(r) + 128 * (isinstance(r, dict) and "image" in r) for r in self.list_data_dict]

    @property
    def modality_lengths(self) -> list[int]:
        """Words of each record, negative without an image."""
        return [_words(r) * (1 if isinstance(r, dict) and "image" in r else -1) for r in self.list_data_dict]

    def _item(self, i):
        record = self.list_data_dict[i]
        if "image" not in record and _is_plain():
            return self._text_only(record)
        if "image" in record:
            path = image_path(self.data_args.image_folder, record["image"])
            with stock.Image.open(path) as image:  # its header alone
                if problem := size_problem(*image.size, self.data_args.image_aspect_ratio == "pad"):
                    raise DataError(f"has the image {path}, {problem}")
        said = io.StringIO()
        with contextlib.redirect_stdout(said) if self._mends else contextlib.nullcontext():
            item = super().__getitem__(i)
        if self._mends:
            labels = answers_only(item["input_ids"], self.tokenizer, answers_in(record))
            if labels is None:
                print(said.getvalue(), end="")  # LLaVA's warning that it masks this row
            else:
                item["labels"] = labels
        images = int((item["input_ids"] == stock.IMAGE_TOKEN_INDEX).sum())
        if images > 1:  # each would take the image of another row
            raise DataError(f"has {images} <image> in its conversation and one image")
        return item

    def _failed(self, i, error):
        record, number = self.list_data_dict[i], self.numbers[i]
        problem = str(error) if isinstance(error, DataError) else f"cannot be used ({type(error).__name__}: {error})"
        if self.bad_records is None:
            image = f", image {record['image']}" if isinstance(record, dict) and "image" in record else ""
            name = name_of(self.data_path, number, record)
            raise DataError(f"{name}{image}: {problem}. Repair or remove it.") from error
        self.bad_records.add(entry_of(self.data_path, number, record, problem, "training"))
        self._lost += 1
        if self._lost >= MOST_IN_A_ROW and 2 * self._lost > self._read:
            raise DataError(
                f"{self._lost} of the {self._read} records that a process has read failed, the last: "
                f"{name_of(self.data_path, number, record)}: {problem}. That is not a few bad records: look at "
                f"--image_folder {self.data_args.image_folder} and at the data; {self.bad_records.path} lists them."
            )

    def _masked(self):
        tokenizer = self.tokenizer
        known = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, 1, 0)
        token = next(t for t in known if t is not None and t != tokenizer.pad_token_id)
        # Two of them: of a batch of single tokens, LLaVA takes no image in.
        ids = torch.tensor([token, token])
        return self._with_zero_image({"input_ids": ids, "labels": torch.full_like(ids, stock.IGNORE_INDEX)})

    def _text_only(self, record):
        # LLaVA's plain template asserts an image; its form without one is the answer alone.
        text = caption_of(record) + stock.conversation_lib.default_conversation.sep
        ids = torch.tensor(self.tokenizer(text).input_ids, dtype=torch.long)
        labels = ids.clone()
        if len(ids) and ids[0] == self.tokenizer.bos_token_id:
            labels[0] = stock.IGNORE_INDEX
        return self._with_zero_image({"input_ids": ids, "labels": labels})

    def _with_zero_image(self, item):
        if self.data_args.is_multimodal:
            size = self.data_args.image_processor.crop_size
            item["image"] = torch.zeros(3, size["height"], size["width"])
        return item


def _words(record):
    try:
        return max(sum(len(turn["value"].split()) for turn in record["conversations"]), 1)
    except (KeyError, TypeError, AttributeError):
        return 1


class HaclDataset(GuardedDataset):
    """LLaVA's records with ``caption_ids`` and ``hallucinated_ids`` beside ``input_ids``, ``labels``, ``image``.

    K, the number of hallucinated captions, is that of the record with most (at most ``hacl_num_hallucinated``),
    so that every batch on every rank has the same number of rows. ``data_args.hacl`` is the `HaclConfig`.
    """

    def __init__(self, data_path: str | os.PathLike, tokenizer: PreTrainedTokenizerBase, data_args: Any) -> None:
        super().__init__(data_path, tokenizer, data_args)
        config = getattr(data_args, "hacl", None) or HaclConfig()
        self.suffix, limit = suffix_ids(config, tokenizer), config.num_hallucinated
        found = [(_number_of_hallucinated(r), isinstance(r, dict) and "image" in r) for r in self.list_data_dict]
        found, images = zip(*found)
        self.num_hallucinated = max(found) if limit < 0 else min(limit, max(found))
        images, with_captions = sum(images), sum(n > 0 for n in found)
        if on_first_rank():
            print(
                f"HACL data: {len(found)} records, {images} with an image, {with_captions} with hallucinated captions "
                f"(up to {max(found)} each, {self.num_hallucinated} used); records without are masked, not dropped."
            )
            if not self.num_hallucinated:
                print("HACL data: no hallucinated captions are used: images are contrasted with captions only.")

    def _item(self, i):
        item, record = super()._item(i), self.list_data_dict[i]
        bos = self.tokenizer.bos_token_id
        if bos is not None and item["input_ids"][:1].tolist() != [bos]:
            # A tokenizer that adds no BOS: captions have one, and without it before the image, EOS would take its part.
            item["input_ids"] = torch.cat([torch.tensor([bos]), item["input_ids"]])
            item["labels"] = torch.cat([torch.tensor([stock.IGNORE_INDEX]), item["labels"]])
        item["caption_ids"] = tokenize_caption(caption_of(record), self.tokenizer, self.suffix)
        captions = hallucinated_captions(record)[: self.num_hallucinated]
        ids = [tokenize_caption(c, self.tokenizer, self.suffix) for c in captions]
        item["hallucinated_ids"] = ids + [None] * (self.num_hallucinated - len(ids))
        return item

    def _masked(self):
        return {**super()._masked(), "caption_ids": None, "hallucinated_ids": [None] * self.num_hallucinated}


def _number_of_hallucinated(record):
    try:
        return len(hallucinated_captions(record))
    except (AttributeError, DataError):  # a record that becomes a masked row
        return 0


def _is_plain():
    conversation = stock.conversation_lib
    return conversation.default_conversation.sep_style == conversation.SeparatorStyle.PLAIN


def _is_mpt():
    conversation = stock.conversation_lib
    return conversation.default_conversation.sep_style == conversation.SeparatorStyle.MPT


class HaclCollator:
    """LLaVA's collator, and ``texts``: the batch's captions, then its hallucinated captions, as `packing.PackedTexts`.

    The place of each text's last token is kept: a literal ``</s>`` inside a caption does no harm.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.stock = stock.DataCollatorForSupervisedDataset(tokenizer=tokenizer)

    def __call__(self, instances: Sequence[dict[str, Any]]) -> dict[str, Any]:
        extra = ("caption_ids", "hallucinated_ids")
        batch = self.stock([{k: v for k, v in x.items() if k not in extra} for x in instances])
        hallucinated = [text for x in instances for text in x["hallucinated_ids"]]
        return {**batch, "texts": pack([*(x["caption_ids"] for x in instances), *hallucinated])}


class WithRecordIndices:
    """A collator that adds ``record_indices`` ``[B]``, which rows of the dataset the batch is of; not for the model."""

    def __init__(self, collator: Callable[[Sequence[dict[str, Any]]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, instances: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(instances)
        batch["record_indices"] = torch.tensor([x["record_index"] for x in instances])
        return batch


def _say(notes):
    for note in notes if on_first_rank() else ():
        print(f"HACL data: {note}.")


def make_hacl_data_module(tokenizer: PreTrainedTokenizerBase, data_args: Any) -> dict[str, Any]:
    """In place of LLaVA's `make_supervised_data_module`: dataset, collator, and no evaluation set."""
    _say(ready(tokenizer))
    dataset = HaclDataset(data_args.data_path, tokenizer, data_args)
    collator = WithRecordIndices(HaclCollator(tokenizer))
    return {"train_dataset": dataset, "eval_dataset": None, "data_collator": collator}


def make_plain_data_module(tokenizer: PreTrainedTokenizerBase, data_args: Any) -> dict[str, Any]:
    """The same without HACL: LLaVA's own batches, and ``record_indices``."""
    _say(ready(tokenizer))
    dataset = GuardedDataset(data_args.data_path, tokenizer, data_args)
    collator = WithRecordIndices(stock.DataCollatorForSupervisedDataset(tokenizer=tokenizer))
    return {"train_dataset": dataset, "eval_dataset": None, "data_collator": collator}
