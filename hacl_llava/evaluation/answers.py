"""Greedy answers of a loaded checkpoint, in batches.

Prompts and images are those of LLaVA's ``eval/model_vqa_loader.py``, and so are the answers, token for token. A batch
holds rows of one length alone, with images of one shape: nothing is padded, so nothing has to be masked.
"""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.data import DataLoader

from ..checkpoints.prompts import generation_settings, prompt_ids, say
from ..common.images import Images
from ..config import HaclError
from . import Question
from .journal import Answer

# isort: split
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import SeparatorStyle, conv_templates

if TYPE_CHECKING:
    from ..checkpoints.load import Loaded

WAITING = 8  # batches' worth of images that wait for others of their kind at most


class Row(NamedTuple):
    """A question ready for a batch with others of its ``kind``; the rest as of `Answerer.row`."""

    kind: tuple
    name: Any
    ids: torch.Tensor
    pixels: torch.Tensor
    size: tuple[int, int]
    room: int


def _as_it_is(value):
    return value


def alive(loader: DataLoader) -> Iterator[Any]:
    """What a DataLoader yields; HaclError where one of its processes was ended from outside."""
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise HaclError(
            "a process that reads images was ended from outside, mostly for want of memory; the same command goes on."
        ) from None


class Answerer:
    """Asks a checkpoint.

    Args:
        loaded: what `load_pretrained` returns. template: a name of ``llava.conversation.conv_templates``; ``plain``
            asks nothing, its answer is the image's caption. batch_size: rows at a time; halved where they do not fit.
        workers: processes that read images (None: up to 4 beside a GPU, else none).
    """

    def __init__(self, loaded: "Loaded", template: str, batch_size: int = 16, workers: int | None = None) -> None:
        self.tokenizer, self.model, self.image_processor, context = loaded
        self.template, self.batch_size, self.said = conv_templates[template], batch_size, False
        self.plain = self.template.sep_style == SeparatorStyle.PLAIN
        self.tokenizer.model_max_length = sys.maxsize  # it would warn; lengths are watched here
        if workers is None:
            workers = 0 if self.model.device.type == "cpu" else min(4, os.cpu_count() or 1)
        self.workers, self.settings = workers, generation_settings(self.model, self.tokenizer)
        config, tower = self.model.config, self.model.get_vision_tower()
        self.context = getattr(config, "max_position_embeddings", context)
        self.cut = getattr(config, "tokenizer_model_max_length", None) or self.context
        # With the class token of some towers, and the line ends that LLaVA-1.6 puts between rows of patches.
        self.tokens_of_a_picture = tower.num_patches + tower.num_patches_per_side + 1
        ends = self.settings.eos_token_id
        self.ends = set(ends if isinstance(ends, (list, tuple)) else [ends])

    def prompt(self, question: Question) -> torch.Tensor:
        """The token ids [1, n] of a question."""
        text = question.text.encode("utf-8", "replace").decode().replace(DEFAULT_IMAGE_TOKEN, "")
        return prompt_ids([(text, None)], self.template, self.tokenizer, self.model.config)

    def row(
        self, name: Any, ids: torch.Tensor, pixels: torch.Tensor, size: tuple[int, int], max_new_tokens: int
    ) -> Row:
        """One question for `replies`.

        Args:
            name: a `Question`, or what else tells its answer from others. ids: [1, n] of the prompt. pixels: [3, H, W]
                of its image, or [P, 3, H, W] of LLaVA-1.6's patches. size: (width, height) of the image.
            max_new_tokens: of the answer; less where the context ends.

        Raises:
            HaclError: prompt and image are too long: LLaVA would cut the end off without a word, the question.
        """
        pictures = len(pixels) if pixels.ndim == 4 else 1
        length = ids.shape[1] - 1 + pictures * self.tokens_of_a_picture
        if length > (longest := min(self.cut, self.context - min(max_new_tokens, self.context // 4))):
            raise HaclError(f"takes {length} tokens with its image; allowed are {longest}.")
        room = min(max_new_tokens, self.context - length)
        kind = ids.shape[1], pixels.shape, room, pictures > 1 and size  # LLaVA-1.6: size says how many tokens it takes
        return Row(kind, name, ids, pixels, size, room)

    def answers(
        self, questions: Sequence[Question], images: str | os.PathLike, max_new_tokens: int
    ) -> Iterator[Answer]:
        """Ask questions about images.

        Args:
            questions: a list of `Question`. images: the image folder. max_new_tokens: of an answer.

        Yields:
            `Answer`, with ``error`` where an image cannot be read or a question is too long; nearly in order: rows
            wait for others that a batch can hold with them.

        Raises:
            HaclError: one row alone does not fit into the GPU's memory.
        """
        data = Images(images, [q.image for q in questions], self.image_processor, self.model.config)
        more = {"prefetch_factor": 4} if self.workers else {}
        loader = DataLoader(data, batch_size=None, num_workers=self.workers, collate_fn=_as_it_is, **more)

        def rows():
            for question, (pixels, size, error) in zip(questions, alive(loader)):
                if error:
                    yield Answer(question, error=error)
                    continue
                try:
                    yield self.row(question, self.prompt(question), torch.from_numpy(pixels), size, max_new_tokens)
                except HaclError as why:
                    yield Answer(question, error=f"the question {why}")

        return self.replies(rows())

    def replies(self, rows: Iterable[Row | Answer]) -> Iterator[Answer]:
        """Answers to rows, nearly in order: they wait for others that a batch can hold with them.

        Args:
            rows: of `row`, or answers, which are handed on.

        Raises:
            HaclError: one row alone does not fit into the GPU's memory.
        """
        waiting = {}
        for row in rows:
            if isinstance(row, Answer):
                yield row
                continue
            waiting.setdefault(row.kind, []).append(row)
            most = max(waiting.values(), key=len)
            if len(most) >= self.batch_size or sum(map(len, waiting.values())) >= WAITING * self.batch_size:
                yield from self._reply(waiting.pop(most[0].kind))
        for batch in waiting.values():
            yield from self._reply(batch)

    def _reply(self, rows):
        while rows:
            batch = rows[: self.batch_size]
            tokens = self._within_memory(batch)
            if tokens is None:
                if len(batch) == 1:
                    raise HaclError(
                        "one question alone does not fit into the GPU's memory; take a larger GPU, --bits 4 or 8, or a "
                        "smaller --max-new-tokens. The same command goes on where this one stopped."
                    )
                self.batch_size = len(batch) // 2
                if not self.said:
                    say(f"{len(batch)} questions at a time do not fit into the GPU's memory; going on with less.")
                    self.said = True
                torch.cuda.empty_cache()
                continue
            texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            for row, text, ids in zip(batch, texts, tokens):
                yield Answer(row.name, text.strip(), tokens=tuple(ids))
            rows = rows[len(batch) :]

    def _within_memory(self, rows):
        """`generate`, or None; the failed pass and its tensors are gone when this returns."""
        _, _, ids, pixels, sizes, rooms = zip(*rows)
        try:
            return self.generate(torch.cat(ids), torch.stack(pixels), sizes, rooms[0])
        except torch.cuda.OutOfMemoryError:
            return None

    def generate(
        self, ids: torch.Tensor, pixels: torch.Tensor, sizes: Iterable[tuple[int, int]], max_new_tokens: int
    ) -> list[list[int]]:
        """Greedy tokens after prompts of one length.

        Args:
            ids: [B, n], ``IMAGE_TOKEN_INDEX`` in each row once. pixels: [B, 3, H, W], or [B, P, 3, H, W] of LLaVA-1.6's
                patches. sizes: (width, height) of each image. max_new_tokens: of each answer.

        Returns:
            B lists of token ids, to the end of the answer (EOS included).
        """
        before, self.model.generation_config = self.model.generation_config, self.settings
        self.settings.max_new_tokens = max_new_tokens
        try:
            with torch.inference_mode():
                out = self.model.generate(
                    ids.to(self.model.device),
                    images=pixels.to(self.model.device, dtype=self.model.dtype),
                    image_sizes=list(sizes),
                    generation_config=self.settings,
                )
        finally:
            self.model.generation_config = before
        ends = [next((i + 1 for i, token in enumerate(row) if token in self.ends), None) for row in out.tolist()]
        return [row[:end] for row, end in zip(out.tolist(), ends)]
