"""HACL's step with no more passes than it needs: the same representations and the same loss as `representation`'s.

- One gather puts the images of a batch into its rows (`splice_images`).
- One pass serves generation and e_v: the suffix (EOS, or a prompt) stands in extra last columns, which see the image
  alone (`shared_pass`).
- Texts share rows and do not see each other (`texts`); they have no graph while nothing in the LLM trains.
- Logits are computed only where there may be a label to predict (`caption_loss`).

`check` compares all that with separate passes on the very model that is to be trained, once.
"""

import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from . import representation
from .packing import PackedTexts, Rows, pack, splice
from .representation import IGNORE_INDEX, embed, graph_of_texts, hidden, suffix

IMAGE_TOKEN_INDEX = -200  # as llava.constants; where the image goes


def splice_images(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor,
    images: Any,
    image_sizes: Any = None,
) -> Rows:
    """LLaVA's rows with their images in them, the arguments of its forward: one gather in place of loops over rows.

    Args:
        input_ids: ``[B, n]``, padded on the right, with `IMAGE_TOKEN_INDEX` for an image. attention_mask: ``[B, n]``.
        labels: ``[B, n]``. images: ``[B', 3, H, W]``; of several sizes, LLaVA's own loops do it.
    """
    mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    is_image = (input_ids == IMAGE_TOKEN_INDEX) & mask
    if not torch.is_tensor(images) or images.ndim != 4:
        return _by_loops(model, input_ids, mask, is_image, labels, images, image_sizes)
    features = model.encode_images(images)  # once: this runs the vision tower
    (B, n), m = input_ids.shape, features.shape[1]
    # Each row takes an image, even one that shows none: how many a row can take beyond needs no host synchronisation.
    most = max(len(features) - B + 1, 1)
    limit = getattr(model.config, "tokenizer_model_max_length", None)
    length = n + (m - 1) * most
    length = length if limit is None else min(length, limit)
    tokens = torch.where(is_image, m, mask.long())
    held, column, image, number, offset, start = splice(length, is_image, tokens)
    words = embed(model, input_ids.masked_fill(is_image | ~mask, 0))  # padding may have no row in the table
    # Where nothing stands, any row of the table will do.
    row = torch.arange(B, device=input_ids.device)[:, None] * n + column
    source = torch.where(image, B * n + number.clamp(max=len(features) - 1) * m + offset, row)
    table = torch.cat([words.flatten(0, 1), features.flatten(0, 1).to(words.device)])
    embeds = table.index_select(0, source.flatten()).view(B, length, -1)
    labels = labels.gather(1, column).masked_fill(image | ~held, IGNORE_INDEX)
    # All text may have labels, as behind the image in stage 1; so the text is what is looked at.
    predicting = start[:, 1:] - 1
    predicting = predicting.masked_fill((tokens[:, 1:] != 1) | (predicting < 0) | (predicting > length - 2), -1)
    first = start.gather(1, is_image.int().argmax(1, keepdim=True))[:, 0]
    whole = (is_image.sum(1) == 1) & (first + m <= length)
    return Rows(embeds, held, labels, predicting, *_span(first, first + m, whole), whole)


def _by_loops(model, ids, mask, is_image, labels, images, image_sizes):
    _, _, after, _, embeds, labels = model.prepare_inputs_labels_for_multimodal(
        ids, None, mask, None, labels, images, image_sizes
    )
    # A row grows by the visual tokens of its image, less the placeholder; a row that was cut does not tell.
    first, lengths, whole = is_image.int().argmax(1), after.sum(1), is_image.sum(1) == 1
    behind = first + lengths - mask.sum(1) + 1
    limit = getattr(model.config, "tokenizer_model_max_length", None)
    if limit is not None:
        whole = whole & (lengths < limit)
    labelled = labels[:, 1:] != IGNORE_INDEX
    predicting = labelled.int().topk(max(int(labelled.sum(1).max()), 1)).indices
    return Rows(embeds, after, labels, predicting, *_span(first, behind, whole), whole)


def _span(first, behind, whole):
    return torch.where(whole, first, 0), torch.where(whole, behind, 1)


def shared_pass(model: Any, rows: Rows) -> Tensor:
    """One pass for generation and e_v: the suffix stands in S further columns behind the T of ``rows``. Each sees the
    columns up to the row's image, that image, and the suffix up to itself; nothing else sees it.

    Returns:
        Last-layer states ``[B, T + S, D]``; e_v is the last column.
    """
    end = suffix(model, rows.embeds)
    (B, T), S = rows.mask.shape, end.shape[1]
    every = torch.arange(T + S, device=end.device)
    held = F.pad(rows.mask.bool(), (0, S), value=True)[:, None].expand(-1, T, -1)
    before = F.pad(every[:T] < rows.behind[:, None], (0, S), value=True)[:, None].expand(-1, S, -1)
    sees = torch.cat([held, before], dim=1) & (every[None, :] <= every[:, None])
    positions = torch.cat([every[:T].expand(B, -1), rows.behind[:, None] + every[:S]], dim=1)
    return hidden(model, torch.cat([rows.embeds, end], dim=1), sees[:, None], positions)


def caption_loss(model: Any, rows: Rows, states: Tensor | None = None) -> Tensor:
    """As `representation.caption_loss`; logits only at ``rows.predicting``, some 30 of 600 columns.

    Args:
        states: those of a pass, whose first columns are those of ``rows``; None: a pass of the rows alone.
    """
    states = hidden(model, rows.embeds, rows.mask) if states is None else states
    columns = rows.predicting.clamp(min=0)
    targets = rows.labels[:, 1:].gather(1, columns).masked_fill(rows.predicting < 0, IGNORE_INDEX)
    logits = model.lm_head(states.gather(1, columns[..., None].expand(-1, -1, states.shape[-1]))).float()
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    return loss / (targets != IGNORE_INDEX).sum().clamp(min=1)


def generation(model: Any, rows: Rows) -> tuple[Tensor, Tensor]:
    """As `representation.generation`, in one pass."""
    states = shared_pass(model, rows)
    return caption_loss(model, rows, states), states[:, -1]


def texts(model: Any, packed: PackedTexts) -> Tensor:
    """e_t, then e_h: ``[N, D]``, as `representation.texts`, from rows of several texts that do not see each other."""
    owner = packed["owner"]
    sees = (owner[:, :, None] == owner[:, None, :]).tril()
    with graph_of_texts(model):
        states = hidden(model, embed(model, packed["ids"]), sees[:, None], packed["positions"])
        return states.flatten(0, 1)[packed["end"].clamp(min=0)]


# --- the self-check ---------------------------------------------------------------------------------------------------


def allowed_difference(dtype: torch.dtype) -> float:
    """Between states of the same text by two ways through the LLM: the norm of their difference over their norm."""
    return {torch.float64: 1e-8, torch.float32: 1e-3}.get(dtype, 0.1)


@torch.no_grad()
def check(model: Any, device: torch.device) -> bool:
    """Whether fused passes give on this very model what separate ones do; on a difference, says so.

    Some attention implementations read a boolean 4-D mask wrongly without an error (eager attention in transformers
    4.57 and 5), and others refuse it; all ranks take the same way.
    """
    training = model.training
    model.eval()  # attention dropout, if any, would differ between the two
    try:
        problem = _problem(model, device)
    finally:
        model.train(training)
    right = torch.tensor([0.0 if problem else 1.0], device=device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(right, op=dist.ReduceOp.MIN)
    if not right.item():
        implementation = getattr(model.config, "_attn_implementation", "?")
        warnings.warn(
            f"HACL: the fused step is not right with attention implementation {implementation!r} here: "
            f"{problem or 'another rank found a difference'}. Training goes on with separate passes, which give the "
            "same result more slowly; attn_implementation='sdpa' has the fused step.",
            stacklevel=2,
        )
    return bool(right.item())


def _problem(model, device):
    """What is wrong with the fused passes, or None."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (2, 9), generator=generator)
    end = torch.tensor(model.hacl_suffix)
    packed = {name: x.to(device) for name, x in pack([torch.cat([t, end]) for t in (ids[0], ids[1, :7])]).items()}
    embeds, mask = embed(model, ids.to(device)), torch.ones(2, 9, dtype=torch.bool, device=device)
    mask[1, 7:] = False
    first, behind = torch.zeros(2, dtype=torch.long, device=device), torch.tensor([5, 4], device=device)
    rows = Rows(embeds, mask, ids, ids, first, behind, behind > 0)
    plain = hidden(model, embeds, mask)
    alone = representation.image(model, embeds, first, behind)
    apart = representation.texts(model, packed)
    try:
        states, together = shared_pass(model, rows), texts(model, packed)
    except Exception as error:  # an attention implementation that refuses the mask
        return f"{type(error).__name__}: {error}"

    def difference(a, b):
        return ((a - b).float().norm() / b.float().norm().clamp(min=1e-9)).item()

    pairs = (states[:, -1], alone), (states[:, : mask.shape[1]][mask], plain[mask]), (together, apart)
    found = max(difference(*pair) for pair in pairs)
    allowed = allowed_difference(embeds.dtype)
    if found <= allowed:
        return None
    return f"its states differ from separate passes by {found:.2g} (relative; allowed {allowed:g})"
