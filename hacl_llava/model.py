"""LLaVA's model classes with HACL in training. Shapes as in `representation`."""

import functools
import inspect
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutputWithPast

from . import fused, representation
from .common.weights import is_whole
from .compat import LlavaLlamaForCausalLM, LlavaMistralForCausalLM
from .config import HaclConfig, HaclError
from .loss import HaclLoss
from .packing import PackedTexts
from .representation import HEAD_FILE, HaclHead, llm_trains, read_head, suffix_ids


class HaclMixin:
    """Adds HACL to a LLaVA model class; put it before that class.

    Until `enable_hacl` is called, and for every batch without ``texts``, the model is the stock one. The names in
    ``hacl_*`` are training state; `save_pretrained` writes a stock LLaVA checkpoint.
    """

    stock_class: Any = None  # the LLaVA class that a saved checkpoint names

    def __init__(self, config: Any):
        super().__init__(config)
        self.hacl_head = None
        self.hacl_text_cache = None  # a TextCache, for training alone

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)

        @functools.wraps(HaclMixin.forward)
        def forward(self, *args, **kwargs):
            return HaclMixin.forward(self, *args, **kwargs)

        # No **kwargs in what others see: the Trainer takes them as "the loss is already divided by accumulation steps".
        stock = inspect.signature(cls.stock_class.forward)
        ours = inspect.Parameter("texts", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)
        forward.__signature__ = stock.replace(parameters=[*stock.parameters.values(), ours])
        cls.forward = forward

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
            model.load_hacl_head(folder)
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
            suffix = suffix_ids(config, tokenizer)
            if not self.load_hacl_head(folder, suffix, config):
                self.enable_hacl(config, suffix)

    def enable_hacl(self, config: HaclConfig, suffix: Sequence[int]) -> None:
        """Create heads, temperature and loss; from now on a batch with ``texts`` is trained with HACL.

        Args:
            config: the settings.
            suffix: ids of the tokens that end each sequence (`suffix_ids`).

        Raises:
            HaclError: the settings do not suit the model.
        """
        self.hacl_config, self.hacl_suffix, self.hacl_progress = config, list(suffix), 0.0
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
        self, folder: str | os.PathLike, suffix: Sequence[int] | None = None, config: HaclConfig | None = None
    ) -> bool:
        """Enable HACL with the heads and the temperature that stage 1 left in ``folder/hacl_head.safetensors``.

        Args:
            folder: of the run. suffix, config: in place of those of that run; None: those.

        Returns:
            Whether there was such a file; without one nothing is changed.

        Raises:
            HaclError: it is damaged, or its heads have other sizes.
        """
        found = read_head(folder)
        if found is None:
            return False
        self.enable_hacl(config or found.config, suffix or found.suffix or [self.config.eos_token_id])
        try:
            self.hacl_head.load(found.state)
        except HaclError as error:
            raise HaclError(f"{folder}/{HEAD_FILE}: {error}") from None
        return True

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
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

    def forward(self, *args: Any, texts: PackedTexts | None = None, **kwargs: Any) -> CausalLMOutputWithPast:
        """LLaVA's forward, bit for bit; with ``texts``, HACL's training loss (arXiv 2312.06968).

        Args:
            texts: the captions of the batch, then its hallucinated captions, as `data.HaclCollator` packs them; then
                ``input_ids``, ``labels`` and ``images`` are needed. All other arguments are LLaVA's.

        Returns:
            With texts, only ``loss`` = loss_lm + scale * weight * (loss_i2t + loss_t2i) / 2, the scale that of
            `hacl_scale`; its parts are added to `hacl_metrics`. A row counts for HACL if it has exactly one image,
            whole, and a caption. In a training step outside ``hacl_start`` and ``hacl_end``, loss_lm alone is computed:
            a step like stock LLaVA's.

        Raises:
            HaclError: an argument is missing, or rows are padded on the left.
        """
        if texts is None or self.hacl_head is None:
            return super().forward(*args, **kwargs)
        rows = fused.splice_images(self, **self.hacl_batch(args, kwargs))
        if self.hacl_fused is None:
            self.hacl_fused = fused.check(self, rows.embeds.device)
        passes = fused if self.hacl_fused else representation
        if self.hacl_rests():
            if self.hacl_text_cache is not None:
                self.hacl_text_cache.check(self, passes.texts, rows.embeds.device)
            loss_lm = passes.caption_loss(self, rows)
            self._keep(loss_lm)
            return CausalLMOutputWithPast(loss=loss_lm + self._nothing_of_heads(rows.embeds))
        loss_lm, e_v = passes.generation(self, rows)
        e_text = self.hacl_texts(passes, texts)
        if self.hacl_head.centre is not None and self.training:
            counts = rows.whole & (texts["end"][: len(e_v)] >= 0)
            self.hacl_head.centre.update(e_v, e_text[: len(e_v)], counts, llm_trains(self))
        features = self.hacl_features(e_v, e_text, rows.whole, texts["end"])
        parts = self.hacl_loss(**features)
        self._keep(loss_lm, features, parts)
        return CausalLMOutputWithPast(loss=loss_lm + self.hacl_scale() * self.hacl_config.weight * parts["loss"])

    def hacl_texts(self, passes: Any, texts: PackedTexts) -> Tensor:
        """e_t, then e_h, by `fused` or `representation`; in training through `hacl_text_cache` where there is one."""
        if self.hacl_text_cache is None or not self.training:
            return passes.texts(self, texts)
        return self.hacl_text_cache.states(self, texts, passes.texts)

    def hacl_rests(self) -> bool:
        """Whether a training step takes no part of HACL now (`HaclConfig.ramp`), and need not compute it.

        Where the LLM trains it does: texts have a graph then, and the memory that takes is to show in the first step.
        """
        return self.training and not self.hacl_scale() and not llm_trains(self)

    def _nothing_of_heads(self, embeds):
        """0, with a gradient of 0 for heads and temperature: DDP waits for one of each, ZeRO-3 for their module."""
        none = torch.zeros(1, embeds.shape[-1], device=embeds.device)
        return 0 * sum(x.sum() for x in self.hacl_head(none, none))

    def hacl_scale(self) -> float:
        """What HACL's weight is multiplied by in this step, 0 to 1: `HaclConfig.ramp` at ``hacl_progress``, the share
        of the run that is done."""
        return self.hacl_config.ramp(self.hacl_progress)

    def hacl_keep(self) -> Callable[[], None]:
        """Keep what a training step changes beside gradients; returns a function that puts it back."""
        centre = None if self.hacl_head is None else self.hacl_head.centre
        kept = None if centre is None else (centre.means, centre.steps)
        sums, loss = getattr(self, "_hacl_sums", None), getattr(self, "hacl_loss", None)
        queue = loss.queue_state() if loss is not None else {}  # a step writes into it, where the others are replaced
        queue = {k: v.clone() if torch.is_tensor(v) else v for k, v in queue.items()}

        def put_back():
            self._hacl_sums = sums
            if centre is not None:
                centre.means, centre.steps = kept
            if loss is not None:
                loss.load_queue_state(queue)

        return put_back

    def hacl_batch(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Of the stock forward's arguments those that HACL's step takes.

        Raises:
            HaclError: one is missing, or rows are padded on the left.
        """
        given = inspect.signature(self.stock_class.forward).bind(self, *args, **kwargs).arguments
        names = "input_ids", "attention_mask", "labels", "images", "image_sizes"
        batch = {name: given.get(name) for name in names}
        if missing := [name for name in ("input_ids", "labels", "images") if batch[name] is None]:
            raise HaclError(f"with texts, HACL's forward needs input_ids, labels and images; got no {missing[0]}.")
        if (side := getattr(self.config, "tokenizer_padding_side", "right")) != "right":
            raise HaclError(f"HACL needs right padding; config.tokenizer_padding_side is {side!r}.")
        return batch

    def hacl_features(self, e_v: Tensor, e_text: Tensor, whole: Tensor, end: Tensor) -> dict[str, Any]:
        """The first arguments of `hacl_loss`, from e_v ``[B, D]`` and e_t, e_h ``[N, D]``.

        Args:
            whole: ``[B]`` bool, as in `packing.Rows`. end: ``[N]``, as in `packing.PackedTexts`.
        """
        B = len(e_v)
        image_features, text_features, temperature = self.hacl_head(e_v, e_text)
        hallucinated = hallucination_mask = None
        if len(end) > B:
            hallucinated = text_features[B:].view(B, -1, text_features.shape[-1])
            hallucination_mask = end[B:].view(B, -1) >= 0
        return {
            "image_features": image_features,
            "text_features": text_features[:B],
            "hallucination_features": hallucinated,
            "hallucination_mask": hallucination_mask,
            "sample_mask": whole & (end[:B] >= 0),
            "temperature": temperature,
        }

    _SUMS = (
        *("loss_i2t", "loss_t2i", "temperature", "retrieval_correct", "retrieval_total", "closer_to_true"),
        "closer_total",
    )

    @torch.no_grad()
    def _keep(self, loss_lm, features=None, parts=None):
        """For the guard, whether all of this rank was finite; for the log, the sums."""
        found, one = {**(features or {}), **(parts or {})}, torch.ones_like(loss_lm)
        names = "image_features", "text_features", "hallucination_features"
        own = [loss_lm, *(found.get(name) for name in names)]
        self.hacl_own_finite = torch.stack([torch.isfinite(x).all() for x in own if x is not None]).all()
        sums = [loss_lm, one, one if parts else 0 * one, *(found.get(name, 0 * one) for name in self._SUMS)]
        sums = torch.stack([s.detach().double() for s in sums])
        sums = sums.where(torch.isfinite(sums).all(), torch.zeros_like(sums))  # or the means would never recover
        self._hacl_sums = sums if self._hacl_sums is None else self._hacl_sums + sums

    # --- figures for the log ------------------------------------------------------------------------------------------

    def reset_hacl_metrics(self) -> None:
        """Forget the sums behind `hacl_metrics`."""
        self._hacl_sums = None

    def hacl_metrics(self, reset: bool = True) -> dict[str, float]:
        """Means since the last reset over steps and ranks; every rank must call it.

        Returns:
            ``loss_lm``, ``loss_i2t``, ``loss_t2i``, ``temperature``, ``retrieval_accuracy`` (share of images whose
            caption is the closest of the batch's) and ``closer_to_true`` (share of images closer to their caption than
            to each of their hallucinated ones); empty before the first HACL step, without the shares that had nothing
            to count, and ``loss_lm`` alone where no step had a contrast (`hacl_rests`).
        """
        if self._hacl_sums is None:  # on all ranks alike, since they run the same steps
            return {}
        sums = self._hacl_sums
        if dist.is_available() and dist.is_initialized():
            sums = sums.clone()
            dist.all_reduce(sums)
        lm, steps, contrasts, i2t, t2i, temperature, right, of, closer, closer_of = sums.tolist()
        if reset:
            self.reset_hacl_metrics()
        if not steps:  # none was finite
            return {}
        figures = {"loss_lm": lm / steps}
        if contrasts:
            parts = {"loss_i2t": i2t, "loss_t2i": t2i, "temperature": temperature}
            figures |= {name: total / contrasts for name, total in parts.items()}
        if of:
            figures["retrieval_accuracy"] = right / of
        if closer_of:
            figures["closer_to_true"] = closer / closer_of
        return figures


def _zero3():
    from transformers.integrations import is_deepspeed_zero3_enabled

    return is_deepspeed_zero3_enabled()


class HaclLlavaLlamaForCausalLM(HaclMixin, LlavaLlamaForCausalLM):
    """LLaVA on Llama or Vicuna, with HACL in training."""

    stock_class = LlavaLlamaForCausalLM


class HaclLlavaMistralForCausalLM(HaclMixin, LlavaMistralForCausalLM):
    """LLaVA on Mistral, with HACL in training. Sliding windows shorter than a row are not for the fused step."""

    stock_class = LlavaMistralForCausalLM
