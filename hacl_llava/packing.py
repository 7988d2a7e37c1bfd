"""Where tokens stand: images spliced into rows, and texts packed into rows. Needs torch alone.

All shapes follow from shapes that the host knows; nothing here waits for a device, but for `unpack`.
"""

import heapq
from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

ROW = 256  # tokens that a row of packed texts has about: attention is cheap, and rows are of one length


class Rows(NamedTuple):
    """Rows with their images in them, as the LLM reads them. Shapes: B rows, T tokens, D hidden size.

    Attributes:
        embeds: ``[B, T, D]``. mask: ``[B, T]`` bool, False where nothing stands. labels: ``[B, T]``.
        predicting: ``[B, S]`` columns, among them all whose next one has a label; the rest is -1.
        first, behind: ``[B]``, the first column of the row's image, and the one behind it.
        whole: ``[B]`` bool, whether the row has exactly one image and all of it. One without has the span of one token:
            it passes through the LLM like the others, and does not count for the contrast.
    """

    embeds: Tensor
    mask: Tensor
    labels: Tensor
    predicting: Tensor
    first: Tensor
    behind: Tensor
    whole: Tensor


class PackedTexts(TypedDict):
    """The captions of a batch, then its hallucinated captions, several to a row: N = B * (1 + K) texts in R rows of L.

    A dict at run time, so that whatever moves a batch to a device moves it too. A text that is missing has no place.

    Keys:
        ids: ``[R, L]`` long, tokens. positions: ``[R, L]`` long, where a token stands in its own text.
        owner: ``[R, L]`` long, the text that a place belongs to; -1: none.
        end: ``[N]`` long, the place in R * L of each text's last token, EOS; -1: the text is missing.
    """

    ids: Tensor
    positions: Tensor
    owner: Tensor
    end: Tensor


def splice(length: int, is_image: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
    """Where each column of a row comes from once every placeholder has become the tokens of its image.

    The rows are those of LLaVA's ``prepare_inputs_labels_for_multimodal``: columns that hold nothing go, a row without
    placeholder passes its image over, and images count on from row to row.

    Args:
        length: columns of the result; what is longer is cut.
        is_image: ``[B, n]`` bool, placeholders. tokens: ``[B, n]``, how many each column becomes: 0, 1, or those of
            an image.

    Returns:
        All ``[B, length]``: ``held`` (bool: a token stands there), ``column`` it comes from, ``image`` (bool: it is an
        image's), ``number`` of that image in the batch, ``offset`` in it; and ``[B, n]``, ``start`` of each column.
    """
    ends = tokens.cumsum(1)
    start = ends - tokens
    to = torch.arange(length, device=tokens.device).expand(len(tokens), -1).contiguous()
    held = to < ends[:, -1:]
    column = torch.searchsorted(ends, to, right=True).clamp(max=tokens.shape[1] - 1)
    image = is_image.gather(1, column) & held
    taken = is_image.sum(1).clamp(min=1)
    within = (is_image.cumsum(1) - 1).gather(1, column)
    number = (taken.cumsum(0) - taken)[:, None] + within
    return held, column, image, number, to - start.gather(1, column), start


def pack(texts: Sequence[Tensor | None]) -> PackedTexts:
    """Lay texts out one after another in rows of about equal length, longest first into the emptiest row.

    Padded to the longest caption of a batch, half of what the LLM would read is padding.

    Args:
        texts: ``[n]`` long, token ids of each; None for one that is missing.

    Returns:
        `PackedTexts` with R >= 1 and L >= 1, also of nothing.
    """
    lengths = [0 if text is None else len(text) for text in texts]
    count = max(1, sum(lengths) // max(ROW, *lengths, 1))
    rows, fill = [[] for _ in range(count)], [(0, r) for r in range(count)]
    for text in sorted((i for i, n in enumerate(lengths) if n), key=lambda i: (-lengths[i], i)):
        used, r = heapq.heappop(fill)
        rows[r].append((text, used))
        heapq.heappush(fill, (used + lengths[text], r))
    width = max(1, *(used for used, _ in fill))
    ids, positions = torch.zeros(2, count, width, dtype=torch.long)
    owner, end = torch.full((count, width), -1), torch.full((len(texts),), -1)
    for r, row in enumerate(rows):
        for text, first in row:
            places = slice(first, first + lengths[text])
            ids[r, places], owner[r, places] = texts[text], text
            positions[r, places] = torch.arange(lengths[text])
            end[text] = r * width + places.stop - 1
    return PackedTexts(ids=ids, positions=positions, owner=owner, end=end)


def unpack(texts: PackedTexts) -> tuple[Tensor, Tensor]:
    """Each text in a row of its own.

    Returns:
        ``[N, n]`` ids, padded on the right with whatever; ``[N]`` lengths, at least 1: a text that is missing is one
        token, so that there are as many rows.
    """
    last = texts["end"].clamp(min=0)
    lengths = torch.where(texts["end"] < 0, 1, texts["positions"].flatten()[last] + 1)
    places = (last - lengths + 1)[:, None] + torch.arange(int(lengths.max()), device=last.device)
    return texts["ids"].flatten()[places.clamp(max=texts["ids"].numel() - 1)], lengths
