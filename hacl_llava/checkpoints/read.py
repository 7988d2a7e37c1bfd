"""The one reading of a checkpoint: what cannot be loaded cannot be converted, and the other way round.

Names, shapes and settings are compared before a model is built or a file is written; no weights are read.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModel, PreTrainedModel, PreTrainedTokenizerBase

from ..common.weights import CheckpointError, Weights, first_line, is_whole, kind_of, local_folder, read_json
from ..compat import LlavaLlamaForCausalLM, LlavaMistralForCausalLM
from ..config import HaclError

# isort: split
from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from llava.model.multimodal_projector.builder import build_vision_projector

ROWS = ("embed_tokens.weight", "lm_head.weight")  # a row for each token
TOWER = "vision_tower."
# Names in files -> those of LLaVA's model, the tower's shortened; the first pattern that fits decides. transformers 5
# has no vision_model between: neither in what it writes nor in its modules.
_LLAVA = ((r"model\.vision_tower\.vision_tower\.(?:vision_model\.)?", TOWER),)
_HF = (
    (r"(?:model\.)?multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
    (r"(?:model\.)?multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
    (r"(?:model\.)?vision_tower\.(?:vision_model\.)?", TOWER),
    (r"language_model\.lm_head\.", "lm_head."),
    (r"(?:language_model\.model|model\.language_model)\.", "model."),
)
_CLIP = ((r"(?:vision_model\.)?", TOWER),)
_LORA = ((r"(?:base_model\.)?(?:model\.)*(?=lm_head\.)", ""), (r"(?:base_model\.)?(?:model\.)*", "model."))
# Beside a model's own: buffers of old transformers, and HACL's heads.
_NOT_KEPT = re.compile(r"rotary_emb\.inv_freq|position_ids|hacl_head\.")


@dataclass
class Checkpoint:
    """A checkpoint whose files fit together."""

    folder: Path
    kind: str  # as `kind_of` says it
    cls: type[PreTrainedModel]  # LLaVA's
    values: dict[str, Any]  # LLaVA's config.json; of Hugging Face's form, the one made of its own
    language: Path  # where the language model and its tokenizer are
    tower: Path | None  # None: its weights are here alone
    vision: CLIPVisionConfig
    tokenizer: PreTrainedTokenizerBase  # with what old checkpoints put around images
    added: int  # how many tokens these are
    tensors: dict[str, tuple[Weights, str]]  # of the language model and its folder, by LLaVA's names
    over: dict[str, tuple[Weights, str]] = field(default_factory=dict)  # a projector's or LoRA's, in place of these
    own_tower: bool = False  # whether the tower's weights are among the checkpoint's own
    beside: dict[str, tuple[Weights, str]] = field(default_factory=dict)  # the tower's in its own folder

    def weight(self, name: str) -> torch.Tensor:
        """A tensor by LLaVA's name; of Hugging Face's form without the rows that it adds to the vocabulary."""
        weights, stored = self.over.get(name) or self.tensors[name]
        tensor = weights[stored]
        return tensor[: self.values["vocab_size"]] if self.kind == "hf" and name.endswith(ROWS) else tensor


@contextlib.contextmanager
def named(folder: str | os.PathLike) -> Iterator[None]:
    """What transformers, peft and LLaVA say of a checkpoint becomes a `CheckpointError` that names its folder."""
    try:
        yield
    except HaclError:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {first_line(error, 300)}"
        raise CheckpointError(f"{folder}: cannot be loaded ({what}).") from error


def read_checkpoint(
    path: str | os.PathLike, base: str | os.PathLike | None = None, vision_tower: str | os.PathLike | None = None
) -> Checkpoint:
    """Read what a checkpoint of any kind is made of, and refuse what does not fit together.

    Args:
        path, base, vision_tower: as for `load_pretrained`.

    Raises:
        CheckpointError: something is missing, damaged, holds code, or does not fit; the message names file and tensor.
    """
    folder, base = local_folder(path), base and local_folder(base)
    with named(folder):
        config = read_json(folder / "config.json")
        kind = kind_of(folder, config)
        _check_kind(folder, kind, config, base)
        values = _llava_values(config, folder) if kind == "hf" else config
        language = base or folder
        if base:
            values = {k: v for k, v in values.items() if k != "quantization_config"}  # a QLoRA's says how it was held
            values["vocab_size"] = _check_base(folder, values, base)
        model = _shapes_of(values)
        tensors = _tensors(Weights(language), _HF if kind == "hf" else _LLAVA)
        tokenizer = _tokenizer(language)
        added = _add_image_tokens(values, tokenizer)
        own_tower = any(name.startswith(TOWER) for name in tensors)
        if kind == "hf":
            tower = vision_tower and tower_folder(vision_tower, folder)
            vision = CLIPVisionConfig.from_dict(config["vision_config"])
        else:
            tower = tower_folder(vision_tower or values["mm_vision_tower"], folder)
            vision = CLIPVisionConfig.from_pretrained(str(tower))
        found = Checkpoint(folder, kind, _class(values), values, language, tower, vision, tokenizer, added, tensors)
        found.own_tower = own_tower or kind == "hf" or bool(values.get("unfreeze_mm_vision_tower"))
        _check_tower(found)
        _check_language(found, model)
        return found


def _check_kind(folder, kind, config, base):
    if kind in ("hf", "llava") and base:
        raise CheckpointError(f"{folder}: is a whole checkpoint and takes no base; {base} would not be used.")
    if kind == "hf":
        return
    named_kind = config.get("model_type")
    if "mpt" in str(named_kind):
        raise CheckpointError(f"{folder}: is LLaVA on MPT, which is not supported; Llama and Mistral are.")
    if not config.get("mm_vision_tower") or named_kind not in ("llava", "llava_llama", "llava_mistral"):
        raise CheckpointError(
            f"{folder}/config.json: has the model_type {named_kind!r} and the mm_vision_tower "
            f"{config.get('mm_vision_tower')!r}; expected a LLaVA checkpoint: llava_llama, llava_mistral or llava, "
            "with an mm_vision_tower" + ("; a language model goes to base." if is_whole(folder) else ".")
        )
    if kind is None:
        raise CheckpointError(
            f"{folder}: holds neither a model's weights, nor an mm_projector.bin, nor a LoRA adapter; "
            "perhaps it was not written to its end."
        )
    if kind != "llava" and base is None:
        adapter = read_json(folder / "adapter_config.json") if kind == "lora" else {}
        said = adapter.get("base_model_name_or_path") or config.get("_name_or_path")
        what = "a LoRA" if kind == "lora" else "a projector alone"
        raise CheckpointError(f"{folder}: is {what}; give its base by --base{f' ({said}, it says)' if said else ''}.")


def _class(values):
    kind = f"{values.get('model_type')} {values.get('architectures')}".lower()
    return LlavaMistralForCausalLM if "mistral" in kind else LlavaLlamaForCausalLM


def _check_base(folder, config, base):
    """Refuse a base of other sizes than a projector or a LoRA was trained with; the rows of its vocabulary."""
    text = read_json(base / "config.json")
    for key in ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        if text.get(key) != config.get(key, text.get(key)):
            raise CheckpointError(
                f"{base}/config.json: has the {key} {text.get(key)}, {folder} was trained with {config.get(key)}; "
                "give the language model that it was trained with."
            )
    return text.get("vocab_size", config.get("vocab_size"))


def _llava_values(config, folder):
    """LLaVA's config.json for that of a ``LlavaForConditionalGeneration``."""
    lacking = [key for key in ("text_config", "vision_config") if not isinstance(config.get(key), dict)]
    if lacking or not ("image_token_index" in config or "image_token_id" in config):
        raise CheckpointError(f"{folder}/config.json: has no {(lacking or ['image_token_index'])[0]}.")
    text, kept = config["text_config"], config.get("hacl_llava", {})
    kind = text.get("model_type", "llama")
    for key, got, allowed in (
        ("text_config.model_type", kind, ("llama", "mistral")),
        ("projector_hidden_act", config.get("projector_hidden_act", "gelu"), ("gelu",)),
        ("multimodal_projector_bias", config.get("multimodal_projector_bias", True), (True,)),
    ):
        if got not in allowed:
            raise CheckpointError(f"{folder}/config.json: has the {key} {got!r}; LLaVA knows {allowed[0]!r}.")
    strategy = config.get("vision_feature_select_strategy", "default")
    return {k: v for k, v in text.items() if k not in ("model_type", "architectures", "pad_token_id")} | {
        "architectures": ["LlavaMistralForCausalLM" if kind == "mistral" else "LlavaLlamaForCausalLM"],
        "model_type": "llava_mistral" if kind == "mistral" else "llava_llama",
        "vocab_size": kept.get("vocab_size", config.get("image_token_index", config.get("image_token_id"))),
        "mm_vision_tower": kept.get("mm_vision_tower"),
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": config["vision_config"]["hidden_size"],
        "mm_vision_select_layer": config.get("vision_feature_layer", -2),
        "mm_vision_select_feature": "patch" if strategy == "default" else "cls_patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "use_mm_proj": True,
        "tie_word_embeddings": bool(config.get("tie_word_embeddings")),
    }


def _shapes_of(values):
    """The model that a config.json asks for, without its tower: shapes alone, no weights."""
    cls = _class(values)
    config = cls.config_class.from_dict({k: v for k, v in values.items() if k not in ("model_type", "mm_vision_tower")})
    with torch.device("meta"):
        model = cls(config)
        model.model.mm_projector = build_vision_projector(config)
        if "unpad" in getattr(config, "mm_patch_merge_type", ""):
            model.model.image_newline = torch.nn.Parameter(torch.empty(config.hidden_size))
    return model


def tower_folder(tower: str | os.PathLike, source: str | os.PathLike) -> Path:
    """The folder of a vision tower, given as a path (from here or from the checkpoint ``source``) or a hub name."""
    inside = Path(source) / tower
    if inside.is_dir() and not Path(tower).is_dir():
        return inside
    return local_folder(tower, "vision tower ", "name it with --vision-tower")


def _tokenizer(folder):
    if not any((folder / name).exists() for name in ("tokenizer.model", "tokenizer.json")):
        raise CheckpointError(f"{folder}: has neither tokenizer.model nor tokenizer.json; copy them from its origin.")
    return AutoTokenizer.from_pretrained(str(folder), use_fast=False)


def _add_image_tokens(values, tokenizer):
    """Add what old LLaVA checkpoints put around images; how many were new. (Defaults as LLaVA's loader.)"""
    names = [DEFAULT_IMAGE_PATCH_TOKEN] if values.get("mm_use_im_patch_token", True) else []
    if values.get("mm_use_im_start_end", False):
        names += [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN]
    return tokenizer.add_tokens(names, special_tokens=True) if names else 0


def _tensors(weights, patterns):
    """{LLaVA's name: (weights, name there)}"""
    found = {}
    for name in weights:
        if not _NOT_KEPT.search(name):
            pattern, new = next((p for p in patterns if re.match(p[0], name)), ("", ""))
            found[re.sub(f"^{pattern}", new, name)] = (weights, name)
    return found


def _compare(path, tensors, expected, asks="config.json asks for", may_lack=()):
    """Refuse a tensor too many, too few, or of another shape than ``expected``: {name: shape}."""
    for name, (weights, stored) in tensors.items():
        if name not in expected:
            raise CheckpointError(f"{weights.file(stored)}: holds {stored!r}, which belongs to no part of what {asks}.")
        if (got := weights.shape(stored)) != expected[name]:
            raise CheckpointError(
                f"{weights.file(stored)}: tensor {stored!r} has the shape {list(got)}, not the "
                f"{list(expected[name])} that {asks}."
            )
    if missing := [n for n in expected if n not in tensors and not any(part in n for part in may_lack)]:
        raise CheckpointError(f"{path}: lacks {len(missing)} tensors that {asks}, as {missing[0]!r}.")


def _check_tower(found):
    """Compare the tower's weights with its config, and its width with the projector's; take them up where they are not
    the checkpoint's own."""
    wide = found.values.get("mm_hidden_size", found.vision.hidden_size)
    tower = CLIPVisionConfig.from_pretrained(str(found.tower)) if found.tower else found.vision
    if tower.hidden_size != wide:
        raise CheckpointError(
            f"{found.folder}: its projector takes {wide} features a patch, the vision tower {found.tower or 'in it'} "
            f"gives {tower.hidden_size}; name the one it was trained with as vision_tower."
        )
    own = {name: where for name, where in found.tensors.items() if name.startswith(TOWER)}
    if found.own_tower and not found.values.get("quantization_config"):
        _compare(found.language, own, _tower_shapes(found.vision), "the vision tower's config asks for")
    if found.tower:
        shapes, there = _tower_shapes(tower), _tensors(Weights(found.tower), _CLIP)
        there = {name: where for name, where in there.items() if name in shapes}  # of a whole CLIP, its tower alone
        _compare(found.tower, there, shapes, "the vision tower's config asks for")
        read_json(found.tower / "preprocessor_config.json")
        found.beside = there
        if not found.own_tower:
            found.tensors |= there


def _tower_shapes(config):
    with torch.device("meta"):
        state = CLIPVisionModel(config).state_dict()
    kept = (n for n in state if not _NOT_KEPT.search(n))
    return {TOWER + n.removeprefix("vision_model."): tuple(state[n].shape) for n in kept}


def _check_language(found, model):
    """Compare all but the tower with ``model``, which has shapes alone."""
    if found.values.get("quantization_config"):
        return  # packed: nothing that a shape could be compared with
    expected = {n: tuple(v.shape) for n, v in model.state_dict().items() if not _NOT_KEPT.search(n)}
    beside = [n for n in expected if "mm_projector." in n or "image_newline" in n]
    may_lack = ["lm_head."] if found.values.get("tie_word_embeddings") else []
    if found.kind in ("lora", "projector"):
        may_lack += beside
        others = found.folder / ("mm_projector.bin" if found.kind == "projector" else "non_lora_trainables.bin")
        if not others.exists():  # written last by LLaVA's train()
            raise CheckpointError(f"{found.folder}: has no {others.name}; perhaps it was not written to its end.")
        found.over = _tensors(Weights(others), _LORA)
        _compare_over(found, others, expected, beside)
    tensors = {name: where for name, where in found.tensors.items() if not name.startswith(TOWER)}
    for name in tensors:
        if found.kind == "hf" and name.endswith(ROWS):  # filled up beyond the vocabulary
            weights, stored = tensors[name]
            expected[name] = (max(weights.shape(stored)[0], expected[name][0]), *expected[name][1:])
    _compare(found.language, tensors, expected, may_lack=may_lack)
    if found.kind == "lora":
        _check_adapter(found.folder, model)


def _compare_over(found, others, expected, beside):
    """Compare what lies beside a projector or adapter, and see that a projector is there."""
    shapes = dict(expected)
    for name in found.over if found.added else ():
        if name.endswith(ROWS):  # old stage 1 trained the added tokens' rows alone
            weights, stored = found.over[name]
            rows = weights.shape(stored)[0]
            shapes[name] = (rows if rows == found.added else len(found.tokenizer), *expected[name][1:])
    _compare(others, found.over, shapes, may_lack=expected)
    placed, hint = found.over, ""
    if found.kind == "lora":
        placed = found.over | found.tensors
        hint = ", and so does the base; frozen, LLaVA does not save it: give a LLaVA checkpoint that has it as base"
    if lacking := [n for n in beside if n not in placed]:
        raise CheckpointError(f"{others}: lacks {lacking[0]!r}, which config.json asks for{hint}.")


def _check_adapter(folder, model):
    """Compare an adapter with what its adapter_config.json asks for: peft ignores or makes up what does not fit."""
    import peft

    files = [folder / f"adapter_model.{end}" for end in ("safetensors", "bin")]
    adapter = next((f for f in files if f.exists()), None)
    if adapter is None:
        raise CheckpointError(f"{folder}: has no adapter_model.safetensors or .bin.")
    weights = Weights(adapter)
    with torch.device("meta"):
        asked = peft.PeftModel(model, peft.PeftConfig.from_pretrained(str(folder)))
    expected = {n.replace(".default", ""): tuple(p.shape) for n, p in asked.named_parameters() if ".lora_" in n}
    found = {n: (weights, n) for n in weights if ".lora_" in n}
    _compare(adapter, found, expected, "adapter_config.json asks for on this base (was the LoRA trained on it?)")
