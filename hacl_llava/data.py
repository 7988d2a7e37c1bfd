"""LLaVA's dataset and collator, plus the captions that HACL contrasts. Floor 2."""

import functools
import json
import os

import torch

from . import compat  # noqa: F401  (before llava)
from .config import on_first_rank
from .records import DataError, caption_of, hallucinated_captions, name_of, problem_of

# isort: split
import llava.train.train as stock


def read_records(path):
    """Read a LLaVA-format json: a list of records.

    Raises:
        DataError: the file is missing, is not json (truncated, say), or is not a list of records.
    """
    try:
        stat = os.stat(path)
        return _read_records(path, stat.st_mtime_ns, stat.st_size)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give --data_path a LLaVA-format json.") from None


@functools.lru_cache(maxsize=1)  # read once to be checked before the model is loaded, and once by the dataset
def _read_records(path, mtime, size):
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
        records = json.loads(text)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}).") from None
    except json.JSONDecodeError as error:
        end = "" if text.rstrip().endswith(("]", "}")) else " It does not end like json: it looks truncated."
        raise DataError(
            f"{path}: not valid json at line {error.lineno}, column {error.colno} ({error.msg}).{end}"
        ) from None
    if not isinstance(records, list):
        raise DataError(f"{path}: holds a {type(records).__name__}, expected a list of LLaVA records.")
    if not records:
        raise DataError(f"{path}: holds no records.")
    return records


def check_records(path, records, image_folder, plain):
    """Refuse records that cannot be trained on, before anything costly is loaded.

    Checks the form of every record, and by listing folders (no file is opened) that every image is there.

    Raises:
        DataError: names the first bad record and how many there are.
    """
    problems = [(i, p) for i, r in enumerate(records) if (p := problem_of(r, plain))]
    if not problems:
        folders = {}
        for i, record in enumerate(records):
            if "image" in record:
                folder, file = os.path.split(os.path.join(image_folder or "", record["image"]))
                if folder not in folders:
                    try:
                        folders[folder] = set(os.listdir(folder or "."))
                    except OSError:
                        folders[folder] = set()
                if file not in folders[folder]:
                    problems.append((i, f"has the image {os.path.join(folder, file)}, which does not exist"))
    if problems:
        index, problem = problems[0]
        more = "" if len(problems) == 1 else f" {len(problems)} of {len(records)} records cannot be used."
        raise DataError(f"{name_of(path, index, records[index])} {problem}.{more} Repair or remove them.")


def tokenize_caption(text, tokenizer):
    """Token ids of a caption from BOS to EOS; one that is too long is cut so that EOS stays.

    Returns:
        A 1-d long tensor of at most ``tokenizer.model_max_length`` ids, or None for an empty text.
    """
    if not text:
        return None
    ids = tokenizer(text, truncation=True, max_length=tokenizer.model_max_length).input_ids
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and ids[:1] != [bos]:
        ids = [bos, *ids]
    if getattr(tokenizer, "add_eos_token", False) and ids[-1:] == [eos]:
        ids = ids[:-1]
    return torch.tensor(ids[: tokenizer.model_max_length - 1] + [eos], dtype=torch.long)


class HaclDataset(stock.LazySupervisedDataset):
    """LLaVA's records with ``caption_ids`` and ``hallucinated_ids`` beside ``input_ids``, ``labels``, ``image``.

    K, the number of hallucinated captions, is that of the record with most (at most ``hacl_num_hallucinated``),
    so that every batch on every rank has the same number of rows.
    """

    def __init__(self, data_path, tokenizer, data_args):
        torch.utils.data.Dataset.__init__(self)
        self.tokenizer, self.data_args, self.data_path = tokenizer, data_args, data_path
        self.list_data_dict = read_records(data_path)
        limit = getattr(data_args, "hacl_num_hallucinated", -1)
        found = [len(hallucinated_captions(r)) for r in self.list_data_dict]
        self.num_hallucinated = max(found) if limit < 0 else min(limit, max(found))
        images = sum("image" in r for r in self.list_data_dict)
        with_captions = sum(n > 0 for n in found)
        if on_first_rank():
            print(
                f"HACL data: {len(found)} records, {images} with an image, {with_captions} with hallucinated captions "
                f"(up to {max(found)} each, {self.num_hallucinated} used); records without are masked, not dropped."
            )
            if not self.num_hallucinated:
                print("HACL data: no hallucinated captions are used: images are contrasted with captions only.")

    def __getitem__(self, i):
        record = self.list_data_dict[i]
        if "image" not in record and _is_plain():
            item = self._text_only(record)
        else:
            try:
                item = super().__getitem__(i)
            except Exception as error:
                image = f", image {record['image']}" if "image" in record else ""
                raise DataError(
                    f"{name_of(self.data_path, i, record)}{image}: cannot be used "
                    f"({type(error).__name__}: {error}). Repair or remove it."
                ) from error
        item["caption_ids"] = tokenize_caption(caption_of(record), self.tokenizer)
        captions = hallucinated_captions(record)[: self.num_hallucinated]
        ids = [tokenize_caption(c, self.tokenizer) for c in captions]
        item["hallucinated_ids"] = ids + [None] * (self.num_hallucinated - len(ids))
        return item

    def _text_only(self, record):
        # LLaVA's plain template asserts an image; its form without one is the answer alone.
        text = caption_of(record) + stock.conversation_lib.default_conversation.sep
        ids = torch.tensor(self.tokenizer(text).input_ids, dtype=torch.long)
        labels = ids.clone()
        if len(ids) and ids[0] == self.tokenizer.bos_token_id:
            labels[0] = stock.IGNORE_INDEX
        item = {"input_ids": ids, "labels": labels}
        if self.data_args.is_multimodal:
            size = self.data_args.image_processor.crop_size
            item["image"] = torch.zeros(3, size["height"], size["width"])
        return item


def _is_plain():
    conversation = stock.conversation_lib
    return conversation.default_conversation.sep_style == conversation.SeparatorStyle.PLAIN


class HaclCollator:
    """LLaVA's collator, then HACL's rows.

    Adds ``caption_ids`` ``[B, n]`` and ``caption_lengths`` ``[B]``, and, where the dataset has hallucinated captions,
    ``hallucinated_ids`` ``[B, K, n']`` and ``hallucinated_lengths`` ``[B, K]``. A length of 0 marks what is missing.
    Lengths say where EOS is: a literal ``</s>`` inside a caption does no harm.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.stock = stock.DataCollatorForSupervisedDataset(tokenizer=tokenizer)

    def _pad(self, rows):
        lengths = torch.tensor([0 if r is None else len(r) for r in rows], dtype=torch.long)
        ids = torch.full((len(rows), max(1, int(lengths.max()))), self.tokenizer.pad_token_id, dtype=torch.long)
        for row, out in zip(rows, ids):
            if row is not None:
                out[: len(row)] = row
        return ids, lengths

    def __call__(self, instances):
        extra = ("caption_ids", "hallucinated_ids")
        batch = self.stock([{k: v for k, v in x.items() if k not in extra} for x in instances])
        batch["caption_ids"], batch["caption_lengths"] = self._pad([x["caption_ids"] for x in instances])
        hallucinated = [x["hallucinated_ids"] for x in instances]
        if K := len(hallucinated[0]):
            ids, lengths = self._pad([row for rows in hallucinated for row in rows])
            batch["hallucinated_ids"] = ids.view(len(instances), K, -1)
            batch["hallucinated_lengths"] = lengths.view(len(instances), K)
        return batch


def make_hacl_data_module(tokenizer, data_args):
    """In place of LLaVA's `make_supervised_data_module`: dataset, collator, and no evaluation set."""
    dataset = HaclDataset(data_args.data_path, tokenizer, data_args)
    return {"train_dataset": dataset, "eval_dataset": None, "data_collator": HaclCollator(tokenizer)}
