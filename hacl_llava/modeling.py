"""HACL's training step on LLaVA's model: heads, global representations, and the fused forward. Floor 2.

Shapes: B batch, T tokens of a row after the image is spliced in, m visual tokens, n text tokens, K hallucinated
captions per image, D hidden size, P head size.
"""

import json
import math
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from .checkpoint import is_whole
from .compat import LlavaLlamaForCausalLM, LlavaMistralForCausalLM
from .config import HaclConfig, HaclError
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

    def __init__(self, hidden_size, config):
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

    def forward(self, visual, text):
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


def read_head(folder):
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

    def __init__(self, config):
        super().__init__(config)
        self.hacl_head = None

    @classmethod
    def from_pretrained(cls, *args, attn_implementation=None, **kwargs):
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

    def initialize_vision_tokenizer(self, model_args, tokenizer):
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

    def enable_hacl(self, config, eos_token_id):
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

    def load_hacl_head(self, folder, eos_token_id, config=None):
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

    def save_pretrained(self, save_directory, is_main_process=True, state_dict=None, **kwargs):
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
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        images=None,
        image_sizes=None,
        return_dict=None,
        cache_position=None,
        caption_ids=None,
        caption_lengths=None,
        hallucinated_ids=None,
        hallucinated_lengths=None,
    ):
        """LLaVA's forward, and with captions HACL's training loss (arXiv 2312.06968).

        Args:
            caption_ids: ``[B, n]`` captions with BOS and EOS, padded on the right; None for the stock forward.
            caption_lengths: ``[B]`` tokens of each caption, EOS included; 0 where a record has none.
            hallucinated_ids: ``[B, K, n']``, or None.
            hallucinated_lengths: ``[B, K]``; 0 where a hallucinated caption is missing.

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

        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids, dtype=torch.bool)
        before = attention_mask.bool()
        is_image = (input_ids == IMAGE_TOKEN_INDEX) & before
        # Once: this runs the vision tower.
        _, _, mask, _, embeds, labels = self.prepare_inputs_labels_for_multimodal(
            input_ids, None, before, None, labels, images, image_sizes
        )
        equal = torch.is_tensor(images) and images.ndim == 4
        image_start, prefix, whole = self._image_span(before, is_image, mask, equal)
        if self.hacl_fused:
            loss_lm, e_v = self._fused_pass(embeds, mask, labels, prefix)
        else:
            loss_lm, e_v = self._separate_passes(embeds, mask, labels, image_start, prefix)
        e_text = self._text_pass(caption_ids, caption_lengths, hallucinated_ids, hallucinated_lengths)
        return CausalLMOutputWithPast(
            loss=loss_lm
            + self.hacl_config.weight
            * self._contrast(loss_lm, e_v, e_text, whole & (caption_lengths > 0), hallucinated_lengths)
        )

    def _image_span(self, before, is_image, after, equal):
        """Find the image in each row after splicing.

        Args:
            before, after: ``[B, *]`` bool, which columns hold a token, before and after splicing.
            is_image: where the placeholder is.
            equal: whether all images have the same number of visual tokens.

        Returns:
            Its first column, the column behind it, and whether there is exactly one and all of it; each ``[B]``.
            A row without gets the span of one token: it passes through the LLM like the others, and is masked.
        """
        start, lengths = is_image.int().argmax(1), after.sum(1)
        # A row grows by the visual tokens of its image, less the placeholder; a row that was cut does not tell.
        grown, whole = lengths - before.sum(1) + 1, is_image.sum(1) == 1
        limit = getattr(self.config, "tokenizer_model_max_length", None)
        if limit is not None:
            cut = lengths >= limit
            known = torch.where(whole & ~cut, grown, 0).amax() if equal else torch.zeros_like(grown[0])
            whole = whole & (~cut | ((known > 0) & (start + known <= limit)))
            grown = torch.where(cut, known, grown)
        return torch.where(whole, start, 0), torch.where(whole, start + grown, 1), whole

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

    def _fused_states(self, embeds, mask, prefix):
        """One pass for generation and e_v: EOS stands in an extra last column, at the position right behind the image,
        and sees only the columns before that and itself; nothing sees it.

        Returns:
            ``[B, T + 1, D]``; the last column is e_v.
        """
        B, T = mask.shape
        device = embeds.device
        columns = torch.arange(T + 1, device=device)
        # A boolean mask, True = see, and sdpa: the one form that every supported transformers version reads right.
        see = (columns[None, :] <= columns[:, None])[None] & F.pad(mask.bool(), (0, 1), value=True)[:, None, :]
        eos_sees = (columns[None] < prefix[:, None]) | (columns[None] == T)
        see = torch.cat([see[:, :T], eos_sees[:, None]], dim=1)
        positions = columns.expand(B, -1).clone()
        positions[:, T] = prefix
        return self._hidden(torch.cat([embeds, self._eos(embeds)], dim=1), see[:, None], positions)

    def _fused_pass(self, embeds, mask, labels, prefix):
        states = self._fused_states(embeds, mask, prefix)
        # Logits only where there is a label to predict: some 25 of 600 positions.
        supervised = labels[:, 1:] != IGNORE_INDEX
        states_lm, targets = states[:, :-2][supervised], labels[:, 1:][supervised]
        logits = self.lm_head(states_lm).float()
        loss_lm = F.cross_entropy(logits, targets, reduction="sum") / max(len(targets), 1)
        return loss_lm, states[:, -1]

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

    def _text_pass(self, caption_ids, caption_lengths, hallucinated_ids, hallucinated_lengths):
        """e_t and e_h in one pass: ``[B + B * K, D]``, captions first; no graph while nothing in the LLM trains."""
        ids, lengths = [caption_ids], [caption_lengths]
        if hallucinated_ids is not None and hallucinated_ids.shape[1]:
            ids.append(hallucinated_ids.flatten(0, 1))
            lengths.append(hallucinated_lengths.flatten())
        width = max(x.shape[1] for x in ids)
        ids = torch.cat([F.pad(x, (0, width - x.shape[1])) for x in ids])
        lengths = torch.cat(lengths).clamp(min=1)  # a missing caption is one masked token: the pass has the same rows
        columns = torch.arange(width, device=ids.device)
        # Asked of the parameters, not of a flag: LoRA, stage 2 or trained embeddings need the graph.
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._llm_trains()):
            embeds = self._embed(ids)
            states = self._hidden(embeds, columns[None] < lengths[:, None])
            return states[torch.arange(len(ids), device=ids.device), lengths - 1]

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

    def reset_hacl_metrics(self):
        """Forget the sums behind `hacl_metrics`."""
        self._hacl_sums = None

    def hacl_metrics(self, reset=True):
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
            try:
                fused = self._fused_states(embeds, mask, prefix)
                problem = None
            except Exception as error:  # an attention implementation that refuses the mask
                fused, problem = None, f"{type(error).__name__}: {error}"
        finally:
            self.train(training)
        if fused is not None:
            allowed = {torch.float64: 1e-8, torch.float32: 1e-3}.get(dtype, 0.1)

            def difference(a, b):
                return ((a - b).float().norm() / b.float().norm().clamp(min=1e-9)).item()

            found = max(difference(fused[:, -1], alone), difference(fused[:, :-1][mask], plain[mask]))
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


def _zero3():
    from transformers.integrations import is_deepspeed_zero3_enabled

    return is_deepspeed_zero3_enabled()


class HaclLlavaLlamaForCausalLM(HaclMixin, LlavaLlamaForCausalLM):
    """LLaVA on Llama or Vicuna, with HACL in training."""

    stock_class = LlavaLlamaForCausalLM


class HaclLlavaMistralForCausalLM(HaclMixin, LlavaMistralForCausalLM):
    """LLaVA on Mistral, with HACL in training. Sliding windows shorter than a row are not for the fused step."""

    stock_class = LlavaMistralForCausalLM
