"""What HACL contrasts: the global representation of an image and of a text, the heads, the temperature.

The global representation is the last layer's state at EOS of a sequence of its own: ``[BOS, v_1 .. v_m, EOS]`` of an
image, ``[BOS, t_1 .. t_n, EOS]`` of a text (arXiv 2312.06968). `generation` and `texts` compute them that plain way,
one pass for each; `fused` computes the same with fewer tokens and is measured against them.

Shapes: B batch, T tokens of a row, m visual tokens, K hallucinated captions per image, D hidden size, P head size.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .config import TEMPERATURE_RANGE, HaclConfig, HaclError
from .packing import PackedTexts, Rows, unpack

IGNORE_INDEX = -100  # as llava.constants; labels without loss
HEAD_FILE = "hacl_head.safetensors"


class _Float32Linear(nn.Linear):
    """A linear layer that computes in float32 whatever the dtype of its weights or of autocast."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.float()
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float(), bias)


class _ClampInward(torch.autograd.Function):
    """Clamp whose gradient stops only where it would push further out, so that the value can come back."""

    @staticmethod
    def forward(ctx, x, low, high):
        ctx.save_for_backward(x)
        ctx.range = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx, grad):
        (x,), (low, high) = ctx.saved_tensors, ctx.range
        outward = ((x <= low) & (grad > 0)) | ((x >= high) & (grad < 0))
        return grad.masked_fill(outward, 0), None, None


class HaclHead(nn.Module):
    """Projection heads of both modalities and the temperature, in one module, so that ZeRO-3 gathers them by its call.

    The heads are those of the released code: one linear layer each, D -> P. With ``head_dim`` 0 there are none, and
    the representations are contrasted as they are (the formula of arXiv 2312.06968).

    Args:
        hidden_size: D of the LLM.
        config: a `HaclConfig`.

    Raises:
        HaclError: D has no quarter, which is the default for P.
    """

    def __init__(self, hidden_size: int, config: HaclConfig):
        super().__init__()
        width = hidden_size // 4 if config.head_dim == -1 else config.head_dim
        if config.head_dim == -1 and width == 0:
            raise HaclError(f"hidden size {hidden_size} has no quarter; give --hacl_head_dim.")
        self.visual = _Float32Linear(hidden_size, width) if width else nn.Identity()
        self.text = _Float32Linear(hidden_size, width) if width else nn.Identity()
        # On a log scale, a step of the optimizer changes the temperature by a fraction of it, not by an amount.
        self.log_temperature = nn.Parameter(
            torch.tensor([math.log(config.temperature)]), requires_grad=config.learnable_temperature
        )

    def forward(self, visual: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project and normalise, in float32.

        Args:
            visual: ``[B, D]`` e_v.
            text: ``[N, D]`` e_t and e_h, any number of rows.

        Returns:
            ``[B, P]`` and ``[N, P]`` of unit norm, and the temperature, a 0-d tensor within `TEMPERATURE_RANGE`.
        """
        low, high = (math.log(limit) for limit in TEMPERATURE_RANGE)
        temperature = _ClampInward.apply(self.log_temperature.float(), low, high).exp().squeeze()
        return (
            F.normalize(self.visual(visual.float()), dim=-1),
            F.normalize(self.text(text.float()), dim=-1),
            temperature,
        )


def read_head(folder: str | os.PathLike) -> tuple[HaclConfig, dict[str, Tensor]] | None:
    """The settings and the state dict of ``folder/hacl_head.safetensors``; None where there is none.

    Raises:
        HaclError: it is damaged.
    """
    file = Path(folder) / HEAD_FILE
    if not file.exists():
        return None
    try:
        with safe_open(file, "pt") as found:
            config = HaclConfig.from_dict(json.loads((found.metadata() or {})["hacl"]))
            return config, {name: found.get_tensor(name) for name in found.keys()}  # noqa: SIM118 (no iterator)
    except (KeyError, OSError, RuntimeError, SafetensorError) as error:
        raise HaclError(f"{file}: cannot be read ({error}); it is written by stage 1 with HACL.") from None


# --- passes through the LLM; ``model`` is a `model.HaclMixin` ---------------------------------------------------------


def embed(model: Any, ids: Tensor) -> Tensor:
    """Embeddings ``[..., D]`` of token ids."""
    return model.get_model().embed_tokens(ids)


def eos(model: Any, embeds: Tensor) -> Tensor:
    """``[B, 1, D]``, EOS for each row of ``embeds``, of their dtype."""
    ids = torch.full((len(embeds), 1), model.hacl_eos, dtype=torch.long, device=embeds.device)
    return embed(model, ids).to(embeds.dtype)


def hidden(model: Any, embeds: Tensor, mask: Tensor, positions: Tensor | None = None) -> Tensor:
    """Last-layer states ``[B, T, D]``, after the final norm, of one pass through the LLM.

    Args:
        embeds: ``[B, T, D]``. mask: ``[B, T]`` bool, or ``[B, 1, T, T]``: which columns a column sees. A boolean mask,
            True = sees, and sdpa: the one form of the second kind that every supported transformers version reads
            right. positions: ``[B, T]``.
    """
    return model.get_model()(
        inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False, return_dict=True
    )[0]


@contextlib.contextmanager
def graph_of_texts(model: Any) -> Iterator[None]:
    """Inside, texts have a graph only if something in the LLM trains: else only the heads behind them do.

    Asked of the parameters, not of a flag: LoRA, stage 2 or trained embeddings need the graph.
    """
    outside = ("mm_projector", "vision_tower", "image_newline")
    trains = any(
        p.requires_grad for n, p in model.get_model().named_parameters() if not any(part in n for part in outside)
    )
    with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
        yield


def generation(model: Any, rows: Rows) -> tuple[Tensor, Tensor]:
    """LLaVA's own forward, then a pass over ``[BOS, image, EOS]`` (without BOS if so set).

    Returns:
        loss_lm, 0-d: the mean over the batch's labels, 0 without any. e_v ``[B, D]``.
    """
    loss_lm = model.stock_class.forward(
        model, inputs_embeds=rows.embeds, attention_mask=rows.mask, labels=rows.labels, use_cache=False
    ).loss
    # Of no label at all, as in a batch of masked rows, LLaVA's mean is NaN.
    loss_lm = loss_lm.where((rows.labels[:, 1:] != IGNORE_INDEX).any(), torch.zeros_like(loss_lm))
    first = torch.zeros_like(rows.first) if model.hacl_config.visual_bos else rows.first
    return loss_lm, image(model, rows.embeds, first, rows.behind)


def image(model: Any, embeds: Tensor, first: Tensor, behind: Tensor) -> Tensor:
    """e_v ``[B, D]`` of the columns from ``first`` to ``behind`` ``[B]`` of ``embeds`` ``[B, T, D]``, in a pass."""
    length = behind - first
    columns = torch.arange(int(length.max()) + 1, device=embeds.device)
    take = (first[:, None] + columns[None]).clamp(max=embeds.shape[1] - 1)
    rows = embeds.gather(1, take[..., None].expand(-1, -1, embeds.shape[-1]))
    rows = torch.where((columns[None] == length[:, None])[..., None], eos(model, embeds), rows)
    states = hidden(model, rows, columns[None] <= length[:, None])
    return states[torch.arange(len(states), device=states.device), length]


def texts(model: Any, packed: PackedTexts) -> Tensor:
    """e_t, then e_h: ``[N, D]``, from a pass in which each text is a row of its own."""
    ids, lengths = unpack(packed)
    columns = torch.arange(ids.shape[1], device=ids.device)
    with graph_of_texts(model):
        states = hidden(model, embed(model, ids), columns[None] < lengths[:, None])
        return states[torch.arange(len(ids), device=ids.device), lengths - 1]
