"""Prompts as LLaVA builds them, the settings of one answer, and what is said beside it: for `chat` and evaluation."""

import copy
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .. import compat  # noqa: F401  (before llava)
from ..common.options import Loader
from ..config import HaclError
from ..data import family_of

# isort: split
from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation, SeparatorStyle, conv_templates
from llava.mm_utils import get_model_name_from_path, tokenizer_image_token

# What a checkpoint's generation_config says of these is not for one streamed answer, or (sampling) not for greedy ones.
_NOT_KEPT = ("max_length", "min_length", "num_beams", "num_return_sequences")
_SAMPLING = ("temperature", "top_p", "top_k", "typical_p", "min_p", "epsilon_cutoff", "eta_cutoff")


def default_template(
    path: str | os.PathLike,
    base: str | os.PathLike | None,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> str:
    """The conversation template that a checkpoint was trained with, as far as its kind and names tell.

    Args:
        path: the checkpoint's folder or name. base: its language model's, or None.
        config: the model's. tokenizer: the language model's.

    Returns:
        A name of ``llava.conversation.conv_templates``.

    Raises:
        HaclError: the language model's template is one that LLaVA has not, and no other is known.
    """
    stage1 = getattr(config, "tune_mm_mlp_adapter", False)
    noted = getattr(config, "hacl_version", None)  # --version of a stage 2 of ours
    if noted in conv_templates and not stage1:
        return noted
    name = get_model_name_from_path(str(Path(stage1 and base or path).absolute())).lower()
    family = family_of(tokenizer)
    if stage1 and not (family or tokenizer.chat_template or any(w in name for w in ("vicuna", "chat", "instruct"))):
        return "plain"
    # What a stage 1 has left as it was, or of which stage 2 could not teach another form.
    if family and (stage1 or family.name in ("ChatML", "Llama-3", "DeepSeek")):
        if family.template in conv_templates:
            return family.template
        raise HaclError(
            f"{base or path}: its tokenizer's chat template is {family.name}'s, for which this LLaVA has none; name "
            f"the template that it was trained with by --conv{' (--conv plain: a caption)' if stage1 else ''}."
        )
    if config.model_type == "llava_mistral" and "mistral_instruct" in conv_templates:
        return "mistral_instruct"
    return "llava_llama_2" if "llama-2" in name else "chatml_direct" if "v1.6-34b" in name else "v1"


def generation_settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, temperature: float = 0.0
) -> GenerationConfig:
    """A checkpoint's own generation settings, without what is not for one answer or (temperature 0) a greedy one.

    Returns:
        A ``GenerationConfig``, to be handed to ``generate`` and put in place of the model's own: newer transformers
        look there for what they find unset.
    """
    settings = copy.deepcopy(model.generation_config)
    for name in _NOT_KEPT if temperature else _NOT_KEPT + _SAMPLING:
        setattr(settings, name, getattr(GenerationConfig(), name, None))
    settings.do_sample, settings.use_cache = temperature > 0, True
    settings.pad_token_id = settings.pad_token_id or 0  # never seen: rows are cut at their end
    if temperature:
        settings.temperature = temperature
    if settings.eos_token_id is None:
        settings.eos_token_id = tokenizer.eos_token_id
    return settings


def prompt_ids(
    turns: Sequence[tuple[str, str | None]],
    template: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    image: bool = True,
) -> torch.Tensor:
    """The prompt of a conversation, built as LLaVA's ``eval/model_vqa_loader.py`` builds that of one question.

    Args:
        turns: [(question, answer)], the last answer None. template: a ``Conversation``. tokenizer: the model's.
        config: the model's. image: whether the first question is about an image.

    Returns:
        Token ids [1, n], ``IMAGE_TOKEN_INDEX`` where the image goes. The ``plain`` template, which asks nothing, gives
        the image alone, as stage 1 trains it.
    """
    image = DEFAULT_IMAGE_TOKEN if image else ""
    if template.sep_style == SeparatorStyle.PLAIN:
        prompt = image or turns[-1][0]
    else:
        if image and getattr(config, "mm_use_im_start_end", False):
            image = DEFAULT_IM_START_TOKEN + image + DEFAULT_IM_END_TOKEN
        before, conv = image and image + "\n", template.copy()
        for asked, answered in turns:
            conv.append_message(conv.roles[0], before + asked)
            conv.append_message(conv.roles[1], answered)
            before = ""
        prompt = conv.get_prompt()
    ids = tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
    bos = tokenizer.bos_token_id
    if template.sep_style == SeparatorStyle.PLAIN and getattr(config, "hacl", None) and bos not in (None, int(ids[0])):
        ids = torch.cat([torch.tensor([bos]), ids])  # as stage 1 with HACL had it, whatever the tokenizer adds
    return ids[None]


def check_arguments(options: Loader) -> None:
    """Refuse a ``device`` that this machine does not have, and a ``conv`` that LLaVA does not have."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    devices = ["cpu", *(["cuda"] if gpus else []), *gpus]
    if options.device not in (None, *devices):
        raise HaclError(f"--device is {options.device!r}; allowed on this machine: {', '.join(devices)}.")
    if options.conv not in (None, *conv_templates):
        raise HaclError(f"--conv is {options.conv!r}; allowed are: {', '.join(sorted(conv_templates))}.")


def say(text: str) -> None:
    """Print what is no answer."""
    print(text, file=sys.stderr, flush=True)
