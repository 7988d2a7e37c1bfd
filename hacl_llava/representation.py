"""What HACL contrasts: the global representation of an image and of a text, the heads, the temperature.

The global representation is the last layer's state at the last token of a sequence of its own: ``[BOS, v_1 .. v_m, s]``
of an image, ``[BOS, t_1 .. t_n, s]`` of a text. The suffix s is EOS (arXiv 2312.06968), or a short prompt that asks for
what was seen, as sentence embeddings from LLMs do (PromptEOL, arXiv 2307.16645; E5-V, 2407.12580). `generation` and
`texts` compute them that plain way, one pass for each; `fused` computes the same with fewer tokens and is measured
against them.

Shapes: B batch, T tokens of a row, m visual tokens, S tokens of the suffix, K hallucinated captions per image, D hidden
size, P head size.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .config import TEMPERATURE_RANGE, HaclConfig, HaclError
from .packing import PackedTexts, Rows, unpack

IGNORE_INDEX = -100  # as llava.constants; labels without loss
HEAD_FILE = "hacl_head.safetensors"
LONGEST_SUFFIX = 64  # tokens


def suffix_ids(config: HaclConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that end every sequence, an image's and a text's alike: EOS, or those of ``config.prompt``.

    Raises:
        HaclError: there is no EOS; the prompt is more than `LONGEST_SUFFIX` tokens, or a special token is in it.
    """
    if config.representation == "eos":
        if tokenizer.eos_token_id is None:
            raise HaclError(
                "the tokenizer has no EOS token; give it one, or --hacl_representation prompt, which needs none."
            )
        return [tokenizer.eos_token_id]
    ids = tokenizer(config.prompt.replace("\\n", "\n"), add_special_tokens=False).input_ids
    if special := sorted(set(ids) & set(tokenizer.all_special_ids)):
        named = tokenizer.convert_ids_to_tokens(special)
        raise HaclError(f"hacl_prompt is {config.prompt!r}, which has the special tokens {named}; give plain text.")
    if not 1 <= len(ids) <= LONGEST_SUFFIX:
        raise HaclError(f"hacl_prompt is {len(ids)} tokens, allowed are 1 to {LONGEST_SUFFIX}; each row has them.")
    return ids


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


class Centre:
    """The mean states of images and of captions, each subtracted from its own kind before heads and norm.

    The states of an LLM share one large direction: raw, the cosine of a caption with any other is above .9, and at the
    usual temperatures nearly nothing is left to tell them by. Images have another such direction than captions; less
    the captions' mean, a contrast would spend most of itself on moving that one, which tells no image from another.

    In step s, c_s = c_(s-1) + r_s (m_s - c_(s-1)), where m_s is the mean over the rows of all ranks. A step without
    rows is none. For captions r_s = 1 / s, the mean of all so far; after ``STEPS`` steps it stays as it is while the
    LLM is frozen, and follows slowly, r_s = 1 / STEPS, one that trains. Images' states move with the projector:
    r_s = 1 / s, then 1 / IMAGE_STEPS. No gradient goes through either.

    A plain tensor in float32, no buffer, which DeepSpeed would round to its own dtype.
    """

    STEPS, IMAGE_STEPS = 100, 10

    def __init__(self) -> None:
        self.means, self.steps = None, torch.zeros(())  # [2, D]: of images, of captions

    @torch.no_grad()
    def update(self, visual: Tensor, text: Tensor, mask: Tensor, moves: bool) -> None:
        """Take a batch in; every rank must call it.

        Args:
            visual: ``[B, D]`` e_v. text: ``[B, D]`` e_t. mask: ``[B]`` bool, which rows count. moves: whether the LLM
                trains.
        """
        states = torch.stack([visual, text]).detach().float()
        mask = (mask & torch.isfinite(states).all(2).all(0))[:, None]
        sums = torch.cat([states.masked_fill(~mask, 0).sum(1).flatten(), mask.sum().float()[None]])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        # On the device, so that nothing waits for it.
        found, count = sums[:-1].view(2, -1), sums[-1]
        old = torch.zeros_like(found) if self.means is None else self.means.to(found.device)
        self.steps = self.steps.to(found.device) + (count > 0)
        rates = 1 / torch.stack([self.steps.clamp(1, self.IMAGE_STEPS), self.steps.clamp(1, self.STEPS)])
        if not moves:
            rates[1] *= self.steps <= self.STEPS
        self.means = old + (rates * (count > 0))[:, None] * (found / count.clamp(min=1) - old)

    def subtract(self, visual: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Both less their means, float32."""
        if self.means is None:
            return visual, text
        of_images, of_captions = self.means.to(visual.device)
        return visual.float() - of_images, text.float() - of_captions

    def state(self) -> dict[str, Tensor]:
        """Tensors by name, for a file; empty before the first batch."""
        if self.means is None:
            return {}
        return dict(zip(("image_centre", "centre"), self.means.cpu())) | {"centre_steps": self.steps.cpu()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take `state` back, from a dict that may hold more; what is taken leaves it.

        Where an older file has captions' alone, which was subtracted from images as well, it is both.
        """
        if "centre" in state:
            of_captions = state.pop("centre").float()
            self.means = torch.stack([state.pop("image_centre", of_captions).float(), of_captions])
            self.steps = state.pop("centre_steps").float()


class HaclHead(nn.Module):
    """Projection heads of both modalities, temperature and centre, in one module, so that ZeRO-3 gathers them at once.

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
        self.centre = Centre() if config.centre else None

    def load(self, state: dict[str, Tensor]) -> None:
        """Take weights, temperature and centre from what `read_head` returns.

        Raises:
            HaclError: they are of other shapes.
        """
        state = dict(state)
        (self.centre or Centre()).load(state)
        own = {k: list(v.shape) for k, v in self.state_dict().items()}
        got = {k: list(v.shape) for k, v in state.items()}
        if own != got:
            raise HaclError(f"holds heads of the shapes {got}, these settings ask for {own} (hacl_head_dim).")
        self.load_state_dict(state)

    def forward(self, visual: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project and normalise, in float32.

        Args:
            visual: ``[B, D]`` e_v.
            text: ``[N, D]`` e_t and e_h, any number of rows.

        Returns:
            ``[B, P]`` and ``[N, P]`` of unit norm, and the temperature, a 0-d tensor within `TEMPERATURE_RANGE`.
        """
        if self.centre is not None:
            visual, text = self.centre.subtract(visual, text)
        low, high = (math.log(limit) for limit in TEMPERATURE_RANGE)
        temperature = _ClampInward.apply(self.log_temperature.float(), low, high).exp().squeeze()
        return (
            F.normalize(self.visual(visual.float()), dim=-1),
            F.normalize(self.text(text.float()), dim=-1),
            temperature,
        )


class SavedHead(NamedTuple):
    """What ``hacl_head.safetensors`` holds: settings, tensors by name, ids of the suffix (None: an older file)."""

    config: HaclConfig
    state: dict[str, Tensor]
    suffix: list[int] | None


def read_head(folder: str | os.PathLike) -> SavedHead | None:
    """Read ``folder/hacl_head.safetensors``; None where there is none.

    Raises:
        HaclError: it is damaged, or of a version with other settings.
    """
    file = Path(folder) / HEAD_FILE
    if not file.exists():
        return None
    try:
        with safe_open(file, "pt") as found:
            metadata = found.metadata() or {}
            config = HaclConfig.from_dict(json.loads(metadata["hacl"]), file)
            state = {name: found.get_tensor(name) for name in found.keys()}  # noqa: SIM118 (no iterator)
            return SavedHead(config, state, json.loads(metadata.get("suffix", "null")))
    except HaclError:
        raise
    except (KeyError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        raise HaclError(f"{file}: cannot be read ({error}); it is written by stage 1 with HACL.") from None


# --- passes through the LLM; ``model`` is a `model.HaclMixin` ---------------------------------------------------------


def embed(model: Any, ids: Tensor) -> Tensor:
    """Embeddings ``[..., D]`` of token ids."""
    return model.get_model().embed_tokens(ids)


def suffix(model: Any, embeds: Tensor) -> Tensor:
    """``[B, S, D]``, the suffix for each row of ``embeds``, of their dtype."""
    ids = torch.tensor(model.hacl_suffix, device=embeds.device).expand(len(embeds), -1)
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


def llm_parameters(model: Any) -> Iterator[nn.Parameter]:
    """Parameters of the LLM up to its last states: embeddings and layers, with a LoRA's; not those of lm_head."""
    outside = ("mm_projector", "vision_tower", "image_newline")
    return (p for n, p in model.get_model().named_parameters() if not any(part in n for part in outside))


def llm_trains(model: Any) -> bool:
    """Whether anything in the LLM trains; asked of the parameters, not of a flag: LoRA or embeddings count."""
    return any(p.requires_grad for p in llm_parameters(model))


@contextlib.contextmanager
def graph_of_texts(model: Any) -> Iterator[None]:
    """Inside, texts have a graph only if something in the LLM trains: else only the heads behind them do."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and llm_trains(model)):
        yield


def caption_loss(model: Any, rows: Rows) -> Tensor:
    """LLaVA's own forward: the mean over the batch's labels, 0-d, 0 without any."""
    loss = model.stock_class.forward(
        model, inputs_embeds=rows.embeds, attention_mask=rows.mask, labels=rows.labels, use_cache=False
    ).loss
    # Of no label at all, as in a batch of masked rows, LLaVA's mean is NaN.
    return loss.where((rows.labels[:, 1:] != IGNORE_INDEX).any(), torch.zeros_like(loss))


def generation(model: Any, rows: Rows) -> tuple[Tensor, Tensor]:
    """loss_lm, 0-d, by `caption_loss`, and e_v ``[B, D]``, by a pass over ``[BOS, image, suffix]`` (without BOS if so
    set)."""
    first = torch.zeros_like(rows.first) if model.hacl_config.visual_bos else rows.first
    return caption_loss(model, rows), image(model, rows.embeds, first, rows.behind)


def image(model: Any, embeds: Tensor, first: Tensor, behind: Tensor) -> Tensor:
    """e_v ``[B, D]`` of the columns from ``first`` to ``behind`` ``[B]`` of ``embeds`` ``[B, T, D]``, in a pass."""
    end = suffix(model, embeds)
    length, (S, D) = behind - first, end.shape[1:]
    columns = torch.arange(int(length.max()) + S, device=embeds.device)[None]
    table = torch.cat([embeds, end], dim=1)
    take = torch.where(columns < length[:, None], first[:, None] + columns, embeds.shape[1] + columns - length[:, None])
    rows = table.gather(1, take.clamp(max=table.shape[1] - 1)[..., None].expand(-1, -1, D))
    states = hidden(model, rows, columns < length[:, None] + S)
    return states[torch.arange(len(states), device=states.device), length + S - 1]


def texts(model: Any, packed: PackedTexts) -> Tensor:
    """e_t, then e_h: ``[N, D]``, from a pass in which each text is a row of its own."""
    ids, lengths = unpack(packed)
    columns = torch.arange(ids.shape[1], device=ids.device)
    with graph_of_texts(model):
        states = hidden(model, embed(model, ids), columns[None] < lengths[:, None])
        return states[torch.arange(len(ids), device=ids.device), lengths - 1]
