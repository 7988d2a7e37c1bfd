"""HACL's training step on LLaVA's model: heads, global representations, and the fused forward.

Shapes: B batch, T tokens of a row after the image is spliced in, m visual tokens, n text tokens, K hallucinated
captions per image, D hidden size, P head size.
"""

import contextlib
import json
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutputWithPast

from .checkpoint import is_whole
from .compat import LlavaLlamaForCausalLM, LlavaMistralForCausalLM, rotary, rotate_half
from .config import HaclConfig, HaclError
from .layout import pack, splice
from .loss import HaclLoss

IGNORE_INDEX = -100  # as llava.constants; labels without loss
IMAGE_TOKEN_INDEX = -200  # as llava.constants; where the image goes
HEAD_FILE = "hacl_head.safetensors"
TEMPERATURE_RANGE = (0.001, 0.5)  # the released code's


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
    """

    def __init__(self, hidden_size: int, config: HaclConfig) -> None:
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

    def forward(self, visual: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Project and normalise, in float32.

        Args:
            visual: ``[B, D]`` e_v.
            text: ``[R, D]`` e_t and e_h, any number of rows.

        Returns:
            ``[B, P]`` and ``[R, P]`` of unit norm, and the temperature, a 0-d tensor within [0.001, 0.5].
        """
        low, high = (math.log(limit) for limit in TEMPERATURE_RANGE)
        temperature = _ClampInward.apply(self.log_temperature.float(), low, high).exp().squeeze()
        return (
            F.normalize(self.visual(visual.float()), dim=-1),
            F.normalize(self.text(text.float()), dim=-1),
            temperature,
        )


def read_head(folder: str | os.PathLike) -> tuple[HaclConfig, dict[str, torch.Tensor]] | None:
    """(`HaclConfig`, state dict) of ``folder/hacl_head.safetensors``; None where there is none.

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


class HaclMixin:
    """Adds HACL to a LLaVA model class; put it before that class.

    Until `enable_hacl` is called, and for every batch without ``caption_ids``, the model is the stock one. The names
    in ``hacl_*`` are training state; `save_pretrained` writes a stock LLaVA checkpoint.
    """

    stock_class = None  # the LLaVA class that a saved checkpoint names

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.hacl_head = None

    @classmethod
    def from_pretrained(cls, *args: Any, attn_implementation: str | None = None, **kwargs: Any) -> "HaclMixin":
        """As LLaVA's, with sdpa in place of flash attention, which does not take the 4-D mask of the fused step.

        Where the folder has a ``hacl_head.safetensors``, HACL is enabled with it.

        Raises:
            HaclError: the folder holds a projector or a LoRA alone, which `load_pretrained` takes.
        """
        folder = Path(args[0]) if args and args[0] is not None else None
        parts = ("mm_projector.bin", "adapter_config.json")
        if folder is not None and not is_whole(folder) and any((folder / part).exists() for part in parts):
            raise HaclError(
                f"{folder}: is a projector or a LoRA and no whole model; use hacl_llava.load_pretrained(folder, base, "
                "hacl=True)."
            )
        if attn_implementation == "flash_attention_2":
            # Attention is 1-2 % of the FLOPs at 600 tokens, so little is lost.
            warnings.warn("HACL: attn_implementation flash_attention_2 is replaced by sdpa.", stacklevel=2)
            attn_implementation = "sdpa"
        model = super().from_pretrained(*args, attn_implementation=attn_implementation, **kwargs)
        if folder is not None:
            model.load_hacl_head(folder, model.config.eos_token_id)
        return model

    def initialize_vision_tokenizer(self, model_args: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        """LLaVA's, then HACL's heads: the last call before the data is made, after freezing and after PEFT.

        Heads that lie beside ``--pretrain_mm_mlp_adapter``, or without it in the model's own folder, go on from where
        they were.
        """
        super().initialize_vision_tokenizer(model_args, tokenizer)
        if getattr(model_args, "use_hacl", False):
            config, projector = HaclConfig.from_arguments(model_args), model_args.pretrain_mm_mlp_adapter
            folder = Path(projector).parent if projector else self.config._name_or_path  # that of from_pretrained
            if not self.load_hacl_head(folder, tokenizer.eos_token_id, config):
                self.enable_hacl(config, tokenizer.eos_token_id)

    def enable_hacl(self, config: HaclConfig, eos_token_id: int | None) -> None:
        """Create heads, temperature and loss; from now on a batch with ``caption_ids`` is trained with HACL.

        Args:
            config: a `HaclConfig`.
            eos_token_id: the token whose last-layer state is the global representation.
        """
        if eos_token_id is None:
            raise HaclError("HACL needs a tokenizer with an EOS token; this one has none.")
        self.hacl_config = config
        self.hacl_eos = eos_token_id
        projector = self.get_model().mm_projector
        reference = next(projector.parameters(), next(self.parameters()))
        self.hacl_head = HaclHead(self.config.hidden_size, config).to(reference.device)
        if _zero3():
            # LLaVA makes the projector in float32; ZeRO-3's linear has no autocast and refuses it beside a bf16 LLM.
            dtype = self.get_input_embeddings().weight.dtype
            projector.to(dtype)
            self.hacl_head.to(dtype)
        # Reentrant checkpointing complains of a pass without graph, as the text pass is. Once and for all: a filter set
        # and unset in every step would make others' once-only warnings come back in every step.
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
        self.hacl_loss = HaclLoss(config.negatives, config.gather, config.queue_size)
        self.hacl_fused = None if config.fused else False  # None: not yet checked on this model
        self.config.hacl = config.to_dict()
        self.reset_hacl_metrics()

    def load_hacl_head(
        self, folder: str | os.PathLike, eos_token_id: int | None, config: HaclConfig | None = None
    ) -> bool:
        """Enable HACL with the heads and the temperature that stage 1 left in ``folder/hacl_head.safetensors``.

        Args:
            folder: of the run. eos_token_id: as in `enable_hacl`.
            config: a `HaclConfig` in place of the settings of that run; None: those.

        Returns:
            Whether there was such a file; without one nothing is changed.

        Raises:
            HaclError: it is damaged, or its heads have other sizes.
        """
        found = read_head(folder)
        if found is None:
            return False
        saved, state = found
        self.enable_hacl(config or saved, eos_token_id)
        own = {k: list(v.shape) for k, v in self.hacl_head.state_dict().items()}
        got = {k: list(v.shape) for k, v in state.items()}
        if own != got:
            raise HaclError(
                f"{folder}/{HEAD_FILE}: holds heads of the shapes {got}, these settings ask for {own} (hacl_head_dim)."
            )
        self.hacl_head.load_state_dict(state)
        return True

    # --- saving: a HACL checkpoint is a LLaVA checkpoint --------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """As LLaVA's, without the heads and under the stock class's name, so that every LLaVA tool loads it."""
        if self.hacl_head is not None:
            state_dict = self.state_dict() if state_dict is None else state_dict
            state_dict = {k: v for k, v in state_dict.items() if "hacl_head." not in k}
        super().save_pretrained(save_directory, is_main_process=is_main_process, state_dict=state_dict, **kwargs)
        self.config.architectures = [self.stock_class.__name__]
        if is_main_process:
            self.config.save_pretrained(save_directory)

    # --- the step -----------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        images: torch.Tensor | Sequence[torch.Tensor] | None = None,
        image_sizes: Sequence[Sequence[int]] | None = None,
        return_dict: bool | None = None,
        cache_position: torch.Tensor | None = None,
        caption_ids: torch.Tensor | None = None,
        caption_lengths: torch.Tensor | None = None,
        hallucinated_ids: torch.Tensor | None = None,
        hallucinated_lengths: torch.Tensor | None = None,
        packed_texts: torch.Tensor | None = None,
        packed_columns: torch.Tensor | None = None,
        packed_starts: torch.Tensor | None = None,
        packed_at: torch.Tensor | None = None,
    ) -> CausalLMOutputWithPast | tuple:
        """LLaVA's forward, and with captions HACL's training loss (arXiv 2312.06968).

        Args:
            caption_ids: ``[B, n]`` captions with BOS and EOS, padded on the right; None for the stock forward.
            caption_lengths: ``[B]`` tokens of each caption, EOS included; 0 where a record has none.
            hallucinated_ids: ``[B, K, n']``, or None.
            hallucinated_lengths: ``[B, K]``; 0 where a hallucinated caption is missing.
            packed_texts, packed_columns, packed_starts, packed_at: ``[1, ...]``, `layout.pack` of captions, then
                hallucinated captions; without them, or if they are those of another batch than this one (some of its
                rows, say), each text is a row of its own.

        Returns:
            With captions, only ``loss`` = loss_lm + weight * (loss_i2t + loss_t2i) / 2; its parts are added to
            ``hacl_metrics``. A row counts for the contrast if it has exactly one image, whole, and a caption.
        """
        if caption_ids is None or self.hacl_head is None:
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                labels=labels,
                use_cache=use_cache,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
                images=images,
                image_sizes=image_sizes,
                return_dict=return_dict,
            )
        if labels is None or images is None or input_ids is None:
            raise HaclError("with caption_ids, HACL's forward needs input_ids, labels and images too.")
        if getattr(self.config, "tokenizer_padding_side", "right") != "right":
            raise HaclError(
                f"HACL needs right padding; config.tokenizer_padding_side is {self.config.tokenizer_padding_side!r}."
            )
        if self.hacl_fused is None:
            self._check_fused(input_ids.device)

        mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        if torch.is_tensor(images) and images.ndim == 4:
            spliced = self._splice(input_ids, mask, labels, images)
        else:
            spliced = self._splice_any(input_ids, mask, labels, images, image_sizes)
        embeds, mask, labels, predicting, start, prefix, whole = spliced
        texts = caption_ids, caption_lengths, hallucinated_ids, hallucinated_lengths
        if self.hacl_fused:
            loss_lm, e_v = self._fused_pass(embeds, mask, labels, prefix, predicting)
            packed = packed_texts, packed_columns, packed_starts, packed_at
            e_text = self._packed_text_pass(*texts, packed=packed)
        else:
            loss_lm, e_v = self._separate_passes(embeds, mask, labels, start, prefix)
            e_text = self._text_pass(*texts)
        return CausalLMOutputWithPast(
            loss=loss_lm
            + self.hacl_config.weight
            * self._contrast(loss_lm, e_v, e_text, whole & (caption_lengths > 0), hallucinated_lengths)
        )

    def _splice(self, ids, mask, labels, images):
        """LLaVA's rows with their images in them, for images of one size: one gather in place of loops over rows.

        Returns:
            ``[B, T, D]`` embeddings, ``[B, T]`` mask and labels; ``[B, S]`` columns, among them all whose next one has
            a label, the rest -1; of the image in each row its first column, the column behind it, and whether there is
            exactly one and all of it, each ``[B]``. A row without gets the span of one token: it passes through the
            LLM like the others, and is masked.
        """
        is_image = (ids == IMAGE_TOKEN_INDEX) & mask
        features = self.encode_images(images)  # once: this runs the vision tower
        (B, n), m = ids.shape, features.shape[1]
        # Each row takes an image, even one that shows none: what a row can take beyond is no secret of the device.
        most = max(len(features) - B + 1, 1)
        limit = getattr(self.config, "tokenizer_model_max_length", None)
        length = n + (m - 1) * most
        length = length if limit is None else min(length, limit)
        tokens = torch.where(is_image, m, mask.long())
        held, column, image, number, offset, start = splice(length, is_image, tokens)
        texts = self._embed(ids.masked_fill(is_image, 0))
        # Where nothing stands, any row of the table will do.
        row = torch.arange(B, device=ids.device)[:, None] * n + column
        number = number.clamp(max=len(features) - 1)
        source = torch.where(image, B * n + number * m + offset, row)
        table = torch.cat([texts.flatten(0, 1), features.flatten(0, 1).to(texts.device)])
        embeds = table.index_select(0, source.flatten()).view(B, length, -1)
        labels = labels.gather(1, column).masked_fill(image | ~held, IGNORE_INDEX)
        # All text may have labels, as behind the image in stage 1; so the text is what is looked at.
        predicting = start[:, 1:] - 1
        predicting = predicting.masked_fill((tokens[:, 1:] != 1) | (predicting < 0) | (predicting > length - 2), -1)
        first = start.gather(1, is_image.int().argmax(1, keepdim=True))[:, 0]
        whole = (is_image.sum(1) == 1) & (first + m <= length)
        span = torch.where(whole, first, 0), torch.where(whole, first + m, 1), whole
        return embeds, held, labels, predicting, *span

    def _splice_any(self, ids, mask, labels, images, image_sizes):
        """The same for images of several sizes, by LLaVA's own loops."""
        is_image = (ids == IMAGE_TOKEN_INDEX) & mask
        _, _, after, _, embeds, labels = self.prepare_inputs_labels_for_multimodal(
            ids, None, mask, None, labels, images, image_sizes
        )
        # A row grows by the visual tokens of its image, less the placeholder; a row that was cut does not tell.
        first, lengths, whole = is_image.int().argmax(1), after.sum(1), is_image.sum(1) == 1
        behind = first + lengths - mask.sum(1) + 1
        limit = getattr(self.config, "tokenizer_model_max_length", None)
        if limit is not None:
            whole = whole & (lengths < limit)
        labelled = labels[:, 1:] != IGNORE_INDEX
        predicting = labelled.int().topk(max(int(labelled.sum(1).max()), 1)).indices
        return embeds, after, labels, predicting, torch.where(whole, first, 0), torch.where(whole, behind, 1), whole

    def _embed(self, ids):
        return self.get_model().embed_tokens(ids)

    def _eos(self, like):
        ids = torch.full((like.shape[0], 1), self.hacl_eos, dtype=torch.long, device=like.device)
        return self._embed(ids).to(like.dtype)

    def _hidden(self, embeds, mask, position_ids=None):
        """Last-layer states ``[B, T, D]`` of one pass through the LLM."""
        return self.get_model()(
            inputs_embeds=embeds, attention_mask=mask, position_ids=position_ids, use_cache=False, return_dict=True
        )[0]

    def _hidden_at(self, embeds, see, positions, columns):
        """Last-layer states of some columns of a pass: of the others, the last layer computes keys and values alone.

        Args:
            embeds: ``[R, T, D]``. see: ``[R, T, T]`` bool, which columns a column sees. positions: ``[R, T]``.
            columns: ``[R, S]``.

        Returns:
            ``[R, S, D]``.
        """
        with _without_last_layer(self.get_model()) as (layer, norm):
            # A boolean mask, True = see, and sdpa: the one form that every supported transformers version reads right.
            states = self._hidden(embeds, see[:, None], positions)
        see = see.gather(1, columns[..., None].expand(-1, -1, see.shape[2]))
        return norm(_last_layer(self.get_model(), layer, states, see, positions, columns))

    def _fused_states(self, embeds, mask, prefix, columns):
        """One pass for generation and e_v: EOS stands in an extra last column, at the position right behind the image,
        and sees only the columns before that and itself; nothing sees it.

        Returns:
            ``[B, S + 1, D]``: the states of ``columns``, ``[B, S]``, then e_v.
        """
        B, T = mask.shape
        device = embeds.device
        every = torch.arange(T + 1, device=device)
        see = (every[None, :] <= every[:, None])[None] & F.pad(mask.bool(), (0, 1), value=True)[:, None, :]
        eos_sees = (every[None] < prefix[:, None]) | (every[None] == T)
        see = torch.cat([see[:, :T], eos_sees[:, None]], dim=1)
        positions = every.expand(B, -1).clone()
        positions[:, T] = prefix
        columns = F.pad(columns, (0, 1), value=T)
        return self._hidden_at(torch.cat([embeds, self._eos(embeds)], dim=1), see, positions, columns)

    def _fused_pass(self, embeds, mask, labels, prefix, columns):
        """loss_lm, with logits only where there may be a label to predict, some 30 of 600 positions; and e_v."""
        states = self._fused_states(embeds, mask, prefix, columns.clamp(min=0))
        targets = labels[:, 1:].gather(1, columns.clamp(min=0)).masked_fill(columns < 0, IGNORE_INDEX)
        logits = self.lm_head(states[:, :-1]).float().flatten(0, 1)
        loss_lm = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
        return loss_lm / (targets != IGNORE_INDEX).sum().clamp(min=1), states[:, -1]

    def _separate_passes(self, embeds, mask, labels, image_start, prefix):
        """The plain form: LLaVA's own forward, then a pass over ``[BOS, image, EOS]`` (without BOS if so set)."""
        loss_lm = super().forward(inputs_embeds=embeds, attention_mask=mask, labels=labels, use_cache=False).loss
        # Of no label at all, as in a batch of masked rows, LLaVA's mean is NaN.
        loss_lm = loss_lm.where((labels[:, 1:] != IGNORE_INDEX).any(), torch.zeros_like(loss_lm))
        first = torch.zeros_like(image_start) if self.hacl_config.visual_bos else image_start
        return loss_lm, self._visual_pass(embeds, first, prefix)

    def _visual_pass(self, embeds, first, prefix):
        length = prefix - first
        columns = torch.arange(int(length.max()) + 1, device=embeds.device)
        take = (first[:, None] + columns[None]).clamp(max=embeds.shape[1] - 1)
        rows = embeds.gather(1, take[..., None].expand(-1, -1, embeds.shape[-1]))
        at_end = columns[None] == length[:, None]
        rows = torch.where(at_end[..., None], self._eos(embeds), rows)
        states = self._hidden(rows, columns[None] <= length[:, None])
        return states[torch.arange(len(states), device=states.device), length]

    def _texts(self, caption_ids, caption_lengths, hallucinated_ids, hallucinated_lengths):
        """Captions, then hallucinated ones: ids ``[B + B * K, n]`` and lengths, at least 1."""
        ids, lengths = [caption_ids], [caption_lengths]
        if hallucinated_ids is not None and hallucinated_ids.shape[1]:
            ids.append(hallucinated_ids.flatten(0, 1))
            lengths.append(hallucinated_lengths.flatten())
        width = max(x.shape[1] for x in ids)
        ids = torch.cat([F.pad(x, (0, width - x.shape[1])) for x in ids])
        # a missing caption is one masked token: the pass has the same rows
        return ids, torch.cat(lengths).clamp(min=1)

    def _text_pass(self, *texts):
        """e_t and e_h in one pass: ``[B + B * K, D]``, captions first; no graph while nothing in the LLM trains."""
        ids, lengths = self._texts(*texts)
        columns = torch.arange(ids.shape[1], device=ids.device)
        # Asked of the parameters, not of a flag: LoRA, stage 2 or trained embeddings need the graph.
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._llm_trains()):
            states = self._hidden(self._embed(ids), columns[None] < lengths[:, None])
            return states[torch.arange(len(ids), device=ids.device), lengths - 1]

    def _packed_text_pass(self, *texts, packed):
        """The same from rows of several texts that do not see each other (``packed``: see `layout.pack`)."""
        ids, lengths = self._texts(*texts)
        if packed[-1] is None or packed[-1].shape != (1, len(ids)):
            owner = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
            columns = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
            starts, at = torch.zeros_like(ids[:, :1]), owner[:, 0]
        else:
            owner, columns, starts, at = (x[0] for x in packed)
            ids = ids[owner, columns]  # where there is no text, the last one's; nobody sees it
        ends = starts.flatten().index_add(0, at, lengths - 1).view_as(starts)
        see = (owner[:, :, None] == owner[:, None, :]).tril()
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._llm_trains()):
            return self._hidden_at(self._embed(ids), see, columns, ends).flatten(0, 1)[at]

    def _llm_trains(self):
        outside = ("mm_projector", "vision_tower", "image_newline")
        return any(
            p.requires_grad for n, p in self.get_model().named_parameters() if not any(part in n for part in outside)
        )

    def _contrast(self, loss_lm, e_v, e_text, counts, hallucinated_lengths):
        B = e_v.shape[0]
        features, text_features, temperature = self.hacl_head(e_v, e_text)
        h_features = h_mask = None
        if len(text_features) > B:
            h_features = text_features[B:].view(B, -1, text_features.shape[-1])
            h_mask = hallucinated_lengths > 0
        own = (loss_lm, features, text_features)  # before those of other ranks join
        self.hacl_own_finite = torch.stack([torch.isfinite(x.detach()).all() for x in own]).all()
        result = self.hacl_loss(features, text_features[:B], h_features, h_mask, counts, temperature)
        with torch.no_grad():
            sums = (loss_lm, result["loss_i2t"], result["loss_t2i"], temperature)
            sums += tuple(result[k] for k in ("retrieval_correct", "retrieval_total", "closer_to_true", "closer_total"))
            sums = torch.stack([s.detach().double() for s in (*sums, torch.ones_like(loss_lm))])
            sums = sums.where(torch.isfinite(sums).all(), torch.zeros_like(sums))  # or the means would never recover
            self._hacl_sums = sums if self._hacl_sums is None else self._hacl_sums + sums
        return result["loss"]

    # --- figures for the log ------------------------------------------------------------------------------------------

    def reset_hacl_metrics(self) -> None:
        """Forget the sums behind `hacl_metrics`."""
        self._hacl_sums = None

    def hacl_metrics(self, reset: bool = True) -> dict[str, float]:
        """Means since the last reset over steps and ranks; every rank must call it.

        Returns:
            A dict of floats: ``loss_lm``, ``loss_i2t``, ``loss_t2i``, ``temperature``, ``retrieval_accuracy`` (share of
            images whose caption is the closest of the batch's) and ``closer_to_true`` (share of images closer to their
            caption than to each of their hallucinated ones); empty before the first HACL step, and without the shares
            that had nothing to count.
        """
        if self._hacl_sums is None:  # on all ranks alike, since they run the same steps
            return {}
        sums = self._hacl_sums
        if dist.is_available() and dist.is_initialized():
            sums = sums.clone()
            dist.all_reduce(sums)
        lm, i2t, t2i, temperature, right, of, closer, closer_of, steps = sums.tolist()
        if reset:
            self.reset_hacl_metrics()
        if not steps:  # none was finite
            return {}
        figures = {
            "loss_lm": lm / steps,
            "loss_i2t": i2t / steps,
            "loss_t2i": t2i / steps,
            "temperature": temperature / steps,
        }
        if of:
            figures["retrieval_accuracy"] = right / of
        if closer_of:
            figures["closer_to_true"] = closer / closer_of
        return figures

    # --- the self-check -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _check_fused(self, device):
        """Compare fused and separate passes on this very model, once; on a difference, fall back and say why.

        Some attention implementations read a boolean 4-D mask wrongly without an error (eager attention in
        transformers 4.57 and 5), and others refuse it; all ranks take the same way.
        """
        dtype = self.get_input_embeddings().weight.dtype
        generator = torch.Generator(device="cpu").manual_seed(0)
        ids = torch.randint(3, self.config.vocab_size, (2, 9), generator=generator).to(device)
        mask = torch.ones(2, 9, dtype=torch.bool, device=device)
        mask[1, 7:] = False
        prefix = torch.tensor([5, 4], device=device)
        training = self.training
        self.eval()  # attention dropout, if any, would differ between the two
        try:
            embeds = self._embed(ids)
            plain = self._hidden(embeds, mask)
            alone = self._visual_pass(embeds, torch.zeros_like(prefix), prefix)
            texts = ids, mask.sum(1), None, None
            apart = self._text_pass(*texts)
            try:
                every = torch.arange(mask.shape[1], device=device).expand_as(mask)
                fused = self._fused_states(embeds, mask, prefix, every)
                packed = [x[None].to(device) for x in pack([9, 7])]
                together = self._packed_text_pass(*texts, packed=packed)
                problem = None
            except Exception as error:  # an attention implementation that refuses the mask
                fused, problem = None, f"{type(error).__name__}: {error}"
        finally:
            self.train(training)
        if fused is not None:
            allowed = {torch.float64: 1e-8, torch.float32: 1e-3}.get(dtype, 0.1)

            def difference(a, b):
                return ((a - b).float().norm() / b.float().norm().clamp(min=1e-9)).item()

            pairs = (fused[:, -1], alone), (fused[:, :-1][mask], plain[mask]), (together, apart)
            found = max(difference(*pair) for pair in pairs)
            if not found <= allowed:
                problem = f"its states differ from separate passes by {found:.2g} (relative; allowed {allowed:g})"
        right = torch.tensor([0.0 if problem else 1.0], device=device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(right, op=dist.ReduceOp.MIN)
        self.hacl_fused = bool(right.item())
        if not self.hacl_fused:
            implementation = getattr(self.config, "_attn_implementation", "?")
            warnings.warn(
                f"HACL: the fused step is not right with attention implementation {implementation!r} here: "
                f"{problem or 'another rank found a difference'}. Training goes on with separate passes, which give "
                "the same result more slowly; attn_implementation='sdpa' has the fused step.",
                stacklevel=2,
            )


@contextlib.contextmanager
def _without_last_layer(model):
    """Inside, a call of the LLM ends before its last layer and has no last norm: those two are handed out."""
    layers, norm = model.layers, model.norm
    model.layers, model.norm = layers[:-1], nn.Identity()
    try:
        yield layers[-1], norm
    finally:
        model.layers, model.norm = layers, norm


def _last_layer(model, layer, states, see, positions, columns):
    """A decoder layer of Llama or Mistral at some columns only (arguments as in `HaclMixin._hidden_at`)."""
    attention = layer.self_attn
    width = attention.head_dim
    at = columns[..., None].expand(-1, -1, states.shape[-1])

    def heads(x):
        return x.unflatten(-1, (-1, width)).transpose(1, 2)

    normed = layer.input_layernorm(states)
    query = heads(attention.q_proj(normed.gather(1, at)))
    key, value = heads(attention.k_proj(normed)), heads(attention.v_proj(normed))
    cos, sin = rotary(model, layer, states, value, positions)
    at_heads = columns[..., None].expand(-1, -1, width)
    query = query * cos.gather(1, at_heads)[:, None] + rotate_half(query) * sin.gather(1, at_heads)[:, None]
    key = key * cos[:, None] + rotate_half(key) * sin[:, None]
    groups = query.shape[1] // key.shape[1]
    found = F.scaled_dot_product_attention(
        query,
        key.repeat_interleave(groups, 1) if groups > 1 else key,
        value.repeat_interleave(groups, 1) if groups > 1 else value,
        attn_mask=see[:, None],
        dropout_p=attention.attention_dropout if layer.training else 0.0,
    )
    states = states.gather(1, at) + attention.o_proj(found.transpose(1, 2).flatten(2))
    return states + layer.mlp(layer.post_attention_layernorm(states))


def _zero3():
    from transformers.integrations import is_deepspeed_zero3_enabled

    return is_deepspeed_zero3_enabled()


class HaclLlavaLlamaForCausalLM(HaclMixin, LlavaLlamaForCausalLM):
    """LLaVA on Llama or Vicuna, with HACL in training."""

    stock_class = LlavaLlamaForCausalLM


class HaclLlavaMistralForCausalLM(HaclMixin, LlavaMistralForCausalLM):
    """LLaVA on Mistral, with HACL in training. Sliding windows shorter than a row are not for the fused step."""

    stock_class = LlavaMistralForCausalLM
