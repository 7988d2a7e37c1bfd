"""Where tokens stand: images spliced into rows, and texts packed into rows. Needs torch alone.

All shapes follow from shapes that the host knows; nothing here waits for a device.
"""

import heapq
from collections.abc import Sequence

import torch

ROW = 256  # tokens that a row of packed texts has about: attention is cheap, and rows are of one length


def splice(length: int, is_image: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
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


def pack(lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lay texts out one after another in rows of about equal length, longest first into the emptiest row.

    Padded to the longest caption of a batch, half of what the LLM would read is padding.

    Args:
        lengths: tokens of each text, a list; a text of none takes one place.

    Returns:
        Long tensors: ``texts`` ``[R, L]``, which text a place belongs to, -1 for none; ``columns`` ``[R, L]``, its
        token; ``starts`` ``[R, S]``, places where texts begin, padded with 0; ``at`` ``[len(lengths)]``, where in
        ``starts``, flattened, a text is.
    """
    lengths = [max(int(n), 1) for n in lengths]
    count = max(1, sum(lengths) // max(ROW, *lengths))
    rows, fill = [[] for _ in range(count)], [(0, r) for r in range(count)]
    for text in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        used, r = heapq.heappop(fill)
        rows[r].append((text, used))
        heapq.heappush(fill, (used + lengths[text], r))
    width, most = max(used for used, _ in fill), max(len(row) for row in rows)
    texts, columns = torch.full((count, width), -1), torch.zeros(count, width, dtype=torch.long)
    starts, at = torch.zeros(count, most, dtype=torch.long), torch.zeros(len(lengths), dtype=torch.long)
    for r, row in enumerate(rows):
        for s, (text, first) in enumerate(row):
            last = first + lengths[text]
            texts[r, first:last] = text
            columns[r, first:last] = torch.arange(lengths[text])
            starts[r, s], at[text] = first, r * most + s
    return texts, columns, starts, at
