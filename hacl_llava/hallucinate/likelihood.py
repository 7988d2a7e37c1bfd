"""A language model's eye on candidates: how likely each is beside its caption (optional)."""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from ..config import HaclError
from .blind import Candidate

FAR = 10.0  # nats: a candidate that is less likely than its caption by more is not chosen
_TOKENS = 8192  # of a batch, padding included
_LONGEST = 256  # tokens of a text that are looked at
_REMEMBERED = 500_000  # texts
_SHOWN = 10  # batches from which on there is a bar


def _load(path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, file = os.path.split(path)
    where, more = (folder or ".", {"gguf_file": file}) if file.endswith(".gguf") else (path, {})
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **more)
        model = AutoModelForCausalLM.from_pretrained(where, **more)
    except (OSError, ValueError, TypeError, ImportError, KeyError) as error:
        said = " ".join(str(error).split())[:300]
        raise HaclError(
            f"--likelihood-model {path}: cannot be loaded ({said}); give a folder that holds a causal language model "
            "and its tokenizer as transformers saves them, a .gguf file, or a name on the Hub."
        ) from None
    return tokenizer, model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


class Likelihood:
    """A causal language model.

    Args:
        path: folder, .gguf file or name of it.

    Raises:
        HaclError: it cannot be loaded.
    """

    def __init__(self, path: str) -> None:
        self.tokenizer, self.model = _load(path)
        self._known = {}  # a sample's texts are asked for again when the choice is made

    def of(self, texts: Sequence[str]) -> list[float]:
        """The log-likelihood of each text, in nats: of all its tokens, the first after the beginning of a text, and of
        its end."""
        if len(self._known) > _REMEMBERED:
            self._known.clear()
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            self._known.update(zip(new, self._computed(new)))
        return [self._known[text] for text in texts]

    def _computed(self, texts):
        import torch

        tokenizer = self.tokenizer
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        last = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else first
        rows = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        rows = [[first, *row[:_LONGEST], last] for row in rows]
        order, found = sorted(range(len(rows)), key=lambda i: len(rows[i])), [0.0] * len(rows)
        batches = list(_batches(order, rows))
        for batch in tqdm(batches, desc="likelihood", unit="batch", disable=len(batches) < _SHOWN):
            width = len(rows[batch[-1]])
            ids = torch.tensor([rows[i] + [last] * (width - len(rows[i])) for i in batch], device=self.model.device)
            sizes = torch.tensor([len(rows[i]) for i in batch], device=ids.device)
            mask = torch.arange(width, device=ids.device) < sizes[:, None]
            with torch.inference_mode():
                logits = self.model(input_ids=ids, attention_mask=mask.long()).logits[:, :-1]
            losses = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")
            for i, value in zip(batch, (-(losses * mask[:, 1:]).sum(1)).tolist()):
                found[i] = value
        return found

    def judge(self, proposed: Iterable[tuple[str, Sequence[Candidate]]]) -> Iterator[list[Candidate]]:
        """The candidates of each (caption, candidates) with their likelihood, without those far below their caption;
        where that is all of them, the likeliest one."""
        proposed = list(proposed)
        values = iter(self.of([text for caption, found in proposed for text in (caption, *(c.text for c in found))]))
        for _, candidates in proposed:
            caption = next(values)
            judged = [c._replace(likelihood=next(values) - caption) for c in candidates]
            near = [c for c in judged if c.likelihood >= -FAR]
            yield near or sorted(judged, key=lambda c: c.likelihood)[-1:]


def _batches(order, rows) -> Iterator[list[Any]]:
    batch = []
    for i in order:  # from short to long
        if batch and (len(batch) + 1) * len(rows[i]) > _TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
