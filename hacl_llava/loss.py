"""The contrastive loss of HACL: equations for L_v and L_t of arXiv 2312.06968, exact across ranks.

Needs torch alone; everything here runs in float32 (float64 if the features are), also under autocast.

Shapes: B batch on one rank, W ranks, N = W * B, K hallucinated captions per image, P feature size, Q queue size.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from .config import NEGATIVES


def _world():
    """(rank, number of ranks) of the default process group; (0, 1) without one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class _GatherFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features):
        ctx.rank, world = _world()
        parts = [torch.empty_like(features) for _ in range(world)]
        dist.all_gather(parts, features.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        # Every rank's loss depends on these features, so the gradient is the SUM over ranks, not this rank's share.
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(_world()[1])[ctx.rank]


def gather_features(features: torch.Tensor) -> torch.Tensor:
    """Concatenate a tensor of all ranks along dimension 0, in rank order, with gradient.

    Args:
        features: ``[B, ...]``, the same shape on every rank.

    Returns:
        ``[W * B, ...]``. The backward sums the ranks' gradients, so that the mean over ranks that DDP or ZeRO takes
        afterwards equals the gradient of one process on the joined batch. Without a process group, ``features``.
    """
    return features if _world()[1] == 1 else _GatherFeatures.apply(features)


def _full_precision(x):
    return x if x.dtype == torch.float64 else x.float()


def hacl_loss(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    hallucination_features: torch.Tensor | None = None,
    hallucination_mask: torch.Tensor | None = None,
    sample_mask: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 0.07,
    negatives: str = "own",
    gather: bool = True,
    queue: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> dict[str, Any]:
    """HACL's two losses (arXiv 2312.06968) and two figures that people can read.

    ``loss_i2t`` is the paper's L_v: image to text, with hallucinated captions as further candidates. ``loss_t2i`` is
    L_t: text to image. Without hallucinated captions, ``loss`` is the symmetric loss of CLIP.

    Args:
        image_features: ``[B, P]``, unit norm.
        text_features: ``[B, P]``, unit norm; row i is the caption of image i.
        hallucination_features: ``[B, K, P]``, unit norm, or None. K must be the same on all ranks.
        hallucination_mask: ``[B, K]`` bool, False where a hallucinated caption is missing; None means all are there.
        sample_mask: ``[B]`` bool, False where a row has no image or caption: it neither counts nor is a candidate for
            another, nor are its hallucinated captions. None: all rows count.
        temperature: a float or a 0-d tensor (then with gradient).
        negatives, gather: see `HaclConfig`.
        queue: None, or ``(images [Q, P], texts [Q, P], mask [Q] bool)`` of past features: candidates without gradient.

    Returns:
        A dict of 0-d tensors: ``loss`` = (``loss_i2t`` + ``loss_t2i``) / 2, with gradient, normalised so that the mean
        over ranks is the mean over all counted rows; and without gradient, for this rank alone,
        ``retrieval_correct`` of ``retrieval_total`` images whose own caption is the closest among the captions of the
        (gathered) batch, and ``closer_to_true`` of ``closer_total`` images that are closer to it than to each of their
        own hallucinated ones. Also ``candidates``, what a queue takes: all ranks' detached features.

    Raises:
        ValueError: shapes that do not fit together, or an unknown ``negatives``.
    """
    B, P, K = _sizes(image_features, text_features, hallucination_features, negatives)
    device = image_features.device
    sample_mask = torch.ones(B, dtype=torch.bool, device=device) if sample_mask is None else sample_mask
    if hallucination_mask is None:
        hallucination_mask = torch.ones(B, K, dtype=torch.bool, device=device)
    rank, world = _world() if gather else (0, 1)
    target = torch.arange(B, device=device) + rank * B
    with torch.autocast(device.type, enabled=False):
        v, t = _full_precision(image_features), _full_precision(text_features)
        h = _full_precision(hallucination_features) if K else v.new_zeros(B, 0, P)
        h_mask = hallucination_mask & sample_mask[:, None] if K else sample_mask.new_zeros(B, 0)
        images, texts, valid, pool, pool_mask = _exchange(v, t, sample_mask, h, h_mask, negatives, gather)
        count = valid.sum().clamp(min=1)
        candidates = images.detach(), texts.detach(), valid
        if queue is not None:
            # Copies, so that the queue may change before the backward.
            images, texts, valid = (torch.cat([x, q.to(x)]) for x, q in zip((images, texts, valid), queue))
        own = torch.einsum("bp,bkp->bk", v, h)
        to_hallucinated = own if negatives == "own" else v @ pool.T
        hallucinated_valid = h_mask if negatives == "own" else pool_mask[None].expand(B, -1)
        valid = valid[None].expand(B, -1)

        to_text = v @ texts.T
        to_all, all_valid = torch.cat([to_text, to_hallucinated], 1), torch.cat([valid, hallucinated_valid], 1)
        loss_i2t = (_losses(to_all, all_valid, target, temperature) * sample_mask).sum() * world / count
        loss_t2i = (_losses(t @ images.T, valid, target, temperature) * sample_mask).sum() * world / count
    return {
        "loss": (loss_i2t + loss_t2i) / 2,
        "loss_i2t": loss_i2t,
        "loss_t2i": loss_t2i,
        **_figures(to_text[:, : len(candidates[2])], candidates[2], target, sample_mask, own, h_mask),
        "candidates": candidates,
    }


def _losses(similarity, valid, target, temperature):
    """Cross-entropy of each row. What is not valid gets the lowest finite number, not -inf: a row that is masked itself
    then has a finite loss, times zero."""
    logits = (similarity / temperature).masked_fill(~valid, torch.finfo(similarity.dtype).min)
    return F.cross_entropy(logits, target, reduction="none")


def _sizes(image_features, text_features, hallucination_features, negatives):
    if negatives not in NEGATIVES.__args__:
        raise ValueError(f"negatives is {negatives!r}, allowed is one of {', '.join(NEGATIVES.__args__)}.")
    if image_features.ndim != 2 or image_features.shape != text_features.shape:
        raise ValueError(
            f"image_features {list(image_features.shape)} and text_features {list(text_features.shape)} "
            "must both be [B, P]."
        )
    (B, P), h = image_features.shape, hallucination_features
    if h is not None and (h.ndim != 3 or h.shape[0] != B or h.shape[2] != P):
        raise ValueError(f"hallucination_features {list(h.shape)} must be [B, K, P] with B = {B}, P = {P}.")
    return B, P, 0 if h is None else h.shape[1]


def _exchange(v, t, sample_mask, h, h_mask, negatives, gather):
    """All ranks' images ``[N, P]``, texts ``[N, P]``, mask ``[N]``; the hallucinated captions that all images of this
    rank are contrasted with, ``[M, P]``, and their mask ``[M]``. One gather for all that there is to exchange."""
    K, P = h.shape[1:]
    shared = [v, t, sample_mask[:, None].to(v.dtype)]
    if negatives == "global":
        shared += [h.flatten(1), h_mask.to(v.dtype)]
    everyone = torch.cat(shared, dim=1)
    everyone = gather_features(everyone) if gather else everyone
    images, texts, mask = everyone[:, :P], everyone[:, P : 2 * P], everyone[:, 2 * P].detach() > 0.5
    if negatives != "global":
        return images, texts, mask, h.reshape(-1, P), h_mask.reshape(-1)
    pool, pool_mask = everyone[:, 2 * P + 1 :].split([K * P, K], dim=1)
    return images, texts, mask, pool.reshape(-1, P), pool_mask.detach().reshape(-1) > 0.5


@torch.no_grad()
def _figures(to_text, valid, target, sample_mask, own, h_mask):
    in_batch = to_text.masked_fill(~valid[None], -torch.inf)
    true = in_batch.gather(1, target[:, None])
    # Ties count as wrong: representations that have collapsed to one point must not look right.
    correct = ((in_batch >= true).sum(1) == 1) & sample_mask
    closer = (true > own.masked_fill(~h_mask, -torch.inf)).all(1) & h_mask.any(1)
    return {
        "retrieval_correct": correct.sum(),
        "retrieval_total": sample_mask.sum(),
        "closer_to_true": closer.sum(),
        "closer_total": h_mask.any(1).sum(),
    }


class HaclLoss(nn.Module):
    """`hacl_loss` with a queue of past image and caption features (arXiv 2312.06968 uses 16,384 of them).

    The queue is a ring: it takes any number of features at a time, whatever its size, and works with and without
    hallucinated captions. It holds no parameters and no buffers, so it is never part of a checkpoint's weights;
    `queue_state` and `load_queue_state` carry it over a restart.

    Args:
        negatives, gather: as in `hacl_loss`.
        queue_size: Q; 0 for none.
    """

    def __init__(self, negatives: str = "own", gather: bool = True, queue_size: int = 0) -> None:
        super().__init__()
        if negatives not in NEGATIVES.__args__:
            raise ValueError(f"negatives is {negatives!r}, allowed is one of {', '.join(NEGATIVES.__args__)}.")
        if queue_size < 0:
            raise ValueError(f"queue_size is {queue_size}, allowed is a number >= 0.")
        self.negatives, self.gather, self.queue_size = negatives, gather, queue_size
        self._queue, self._position = None, 0

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """`hacl_loss` of features, masks and temperature; in training mode, the batch joins the queue afterwards."""
        own = {"negatives": self.negatives, "gather": self.gather, "queue": self._queue}
        result = hacl_loss(*args, **kwargs, **own)
        candidates = result.pop("candidates")
        if self.queue_size and self.training:
            self._enqueue(*candidates)
        return result

    @torch.no_grad()
    def _enqueue(self, images, texts, mask):
        if self._queue is None:
            shape = (self.queue_size, images.shape[1])
            self._queue = (images.new_zeros(shape), images.new_zeros(shape), mask.new_zeros(self.queue_size))
        images, texts, mask = (x[-self.queue_size :] for x in (images, texts, mask))
        # A feature that is not finite would spoil every later step.
        finite = torch.isfinite(images).all(1) & torch.isfinite(texts).all(1)
        images, texts = (x.masked_fill(~finite[:, None], 0) for x in (images, texts))
        mask = mask & finite
        # Rows that do not count are stored with their mask: sorting them out would make the host wait for the device.
        slots = (torch.arange(len(mask), device=mask.device) + self._position) % self.queue_size
        for kept, new in zip(self._queue, (images, texts, mask)):
            kept[slots] = new.to(kept.dtype)
        self._position = (self._position + len(mask)) % self.queue_size

    def queue_state(self) -> dict[str, torch.Tensor | int]:
        """The queue as a dict of tensors and a number (empty before the first training batch)."""
        if self._queue is None:
            return {}
        images, texts, mask = self._queue
        return {"images": images, "texts": texts, "mask": mask, "position": self._position}

    def load_queue_state(self, state: dict[str, torch.Tensor | int]) -> None:
        """Restore `queue_state`. Raises ValueError if it is of another size."""
        if not state:
            self._queue, self._position = None, 0
            return
        if len(state["mask"]) != self.queue_size:
            raise ValueError(f"the queue holds {len(state['mask'])} features, this loss wants {self.queue_size}.")
        self._queue = tuple(state[k].clone() for k in ("images", "texts", "mask"))
        self._position = int(state["position"])
