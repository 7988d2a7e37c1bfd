"""How large the contrast's gradient is beside the caption loss's, at the projector's output.

``--hacl_gradient_share`` limits it.

Adam divides by the size of both together: a contrast whose gradient is the larger one makes the steps of the caption
loss small, and captioning falls behind, whatever the weight is called.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import fused, representation
from .packing import PackedTexts

SCALE = 1024.0  # of both losses: float16 would lose gradients as small as these; their ratio is what is asked for


def ratio(model: Any, texts: PackedTexts, **batch: Any) -> float | None:
    """Norm of the gradient of loss_lm over that of HACL's losses, both at the batch's visual tokens, over all ranks.

    One pass through the LLM and two backward passes that end at the visual tokens: neither weights nor what HACL keeps
    from step to step change. Every rank must call it; the LLM must be frozen.

    Args:
        model: a `model.HaclMixin` with HACL enabled. texts, batch: as its forward takes them.

    Returns:
        None where one of them is 0 or not finite: a batch without images, labels or captions.
    """
    passes = representation if model.hacl_fused is False else fused
    with torch.no_grad():
        rows = fused.splice_images(model, **model.hacl_batch((), batch))
        e_text, branches = model.hacl_texts(passes, texts), texts.get("branches")
    visual = rows.embeds.detach().requires_grad_()  # a leaf: parameters in front of it, and their hooks, take no part
    loss_lm, *outputs = passes.generation(model, rows._replace(embeds=visual), branches)
    (loss_lm * SCALE).backward(retain_graph=True)
    columns = torch.arange(visual.shape[1], device=visual.device)
    is_image = (columns >= rows.first[:, None]) & (columns < rows.behind[:, None]) & rows.whole[:, None]
    of_lm = _square(visual.grad, is_image)
    visual.grad = None
    # In two parts, so that heads and temperature get no gradient either.
    outputs = [x for x in outputs if x is not None]
    leaves = [x.detach().requires_grad_() for x in outputs]
    loss = model.hacl_loss.parts(**model.hacl_features(leaves[0], e_text, rows.whole, texts["end"]))["loss"]
    loss = model.hacl_config.weight * loss
    if branches is not None:
        ranks = model.hacl_ranks(leaves[1], passes.blind(model, branches), rows.whole, branches)
        loss = loss + model.hacl_config.ranking * ranks["loss"]
    torch.autograd.backward(outputs, torch.autograd.grad(loss * SCALE, leaves))
    squares = torch.stack([of_lm, _square(visual.grad, is_image)])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(squares)
    lm, contrast = squares.sqrt().tolist()
    found = lm / contrast if contrast else 0.0
    return found if 0 < found < float("inf") else None


def _square(gradient: Tensor, where: Tensor) -> Tensor:
    return gradient.double()[where].square().sum()
