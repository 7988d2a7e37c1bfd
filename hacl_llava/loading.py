"""LLaVA checkpoints of every published layout, ready to answer."""

import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .checkpoint import (
    ROWS,
    CheckpointError,
    Folder,
    Weights,
    check_base,
    config_from_hf,
    is_whole,
    local_folder,
    names_from_hf,
    read_json,
    save_tokenizer,
    tower_folder,
    write_tower,
)
from .compat import LlavaLlamaForCausalLM, LlavaMistralForCausalLM, savable_generation_config
from .config import HaclConfig, HaclError
from .model import HaclLlavaLlamaForCausalLM, HaclLlavaMistralForCausalLM

# What may stand in a checkpoint beside the model's own: the tower (read from its own place unless it was tuned), old
# transformers' buffers, and HACL's heads.
_BESIDE = ("vision_tower.", "rotary_emb.inv_freq", "hacl_head.")


class Loaded(NamedTuple):
    """What LLaVA's ``load_pretrained_model`` returns, in its order."""

    tokenizer: Any
    model: Any
    image_processor: Any
    context_len: int


def load_pretrained(
    path: str | os.PathLike,
    base: str | os.PathLike | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    bits: int | None = None,
    vision_tower: str | os.PathLike | None = None,
    hacl: bool = False,
    attn_implementation: str | None = None,
) -> Loaded:
    """Load a LLaVA checkpoint; its kind is seen from its files, not from its name.

    Taken are: whole LLaVA checkpoints (``liuhaotian/llava-v1.5-7b`` as published, stage 2's output), a projector
    (``mm_projector.bin``) or a LoRA folder with its ``base``, and Hugging Face's ``LlavaForConditionalGeneration``.
    Every tensor's shape is compared with what config.json asks for before a model is built. Pickles are read with
    ``weights_only=True``.

    Args:
        path: folder, or a name on the hub.
        base: the language model of a projector; the model that a LoRA belongs to. Folder or name on the hub.
        device: ``"cuda"`` (the default where there is one), ``"cpu"``, ``"cuda:1"``, or ``"auto"``: over all GPUs.
        dtype: of the weights; None: float16 on a GPU as LLaVA's own loader has it, float32 elsewhere.
        bits: 4 or 8: quantized through bitsandbytes (``[quantize]``), the projector and the tower excepted.
        vision_tower: folder or hub name in place of config.json's.
        hacl: make it a `HaclLlavaLlamaForCausalLM` with heads and temperature as saved beside it, else fresh, so that
            stage 1 can go on.
        attn_implementation: handed to transformers.

    Returns:
        `Loaded`: tokenizer, model in eval mode, image processor, context length.

    Raises:
        CheckpointError: something is missing, damaged, holds code, or does not fit; the message names file and tensor.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if not isinstance(dtype or torch.float32, torch.dtype):
        raise HaclError(f"dtype is {dtype!r}, expected one of torch's, as torch.bfloat16 or 'bfloat16'.")
    dtype = dtype or (torch.float32 if str(device).startswith("cpu") else torch.float16)
    folder = local_folder(path)
    try:
        return _load(folder, base and local_folder(base), device, dtype, bits, vision_tower, hacl, attn_implementation)
    except HaclError:
        raise
    except Exception as error:  # what transformers, peft and LLaVA say of a checkpoint, named
        first = (str(error).strip().splitlines() or [""])[0][:300]
        raise CheckpointError(f"{folder}: cannot be loaded ({type(error).__name__}: {first}).") from error


def _load(folder, base, device, dtype, bits, vision_tower, hacl, attn_implementation):
    options = {"torch_dtype": dtype, "low_cpu_mem_usage": True, "attn_implementation": attn_implementation}
    options["device_map"] = device if device == "auto" else {"": device}
    if bits:
        options["quantization_config"] = _quantization(bits, dtype)

    config = read_json(folder / "config.json")
    with tempfile.TemporaryDirectory() as made:
        if "LlavaForConditionalGeneration" in (config.get("architectures") or ()):
            if base:
                raise CheckpointError(f"{folder}: is a whole checkpoint and takes no base; {base} would not be used.")
            if bits:
                raise CheckpointError(
                    f"{folder}: {bits}-bit loading is for LLaVA's own format; run: hacl-llava export --to llava"
                )
            model, tokens = _from_hf(folder, config, vision_tower, Path(made), hacl, options)
        else:
            model, tokens = _from_llava(folder, config, base, vision_tower, hacl, options)
        tower = model.get_vision_tower()
        if not tower.is_loaded:
            tower.load_model()
        _check_tower(tower)
        _check_projector(folder, model.config, tower)
        if made in model.config.mm_vision_tower:
            model.config.mm_vision_tower = _tower_of(config) or str(folder)
    if config.get("unfreeze_mm_vision_tower"):
        model.config.unfreeze_mm_vision_tower = True
        _tuned_tower(folder, tower)
    tower.to(device=model.get_input_embeddings().weight.device, dtype=dtype)
    if hacl:
        _heads(folder, config, model, tokens.eos_token_id)
    context = getattr(model.config, "max_sequence_length", 2048)  # as LLaVA's loader
    return Loaded(tokens, model.eval(), tower.image_processor, context)


def merge(
    source: str | os.PathLike,
    target: str | os.PathLike,
    base: str | os.PathLike,
    vision_tower: str | os.PathLike | None = None,
) -> None:
    """Write a LoRA, or a projector, and its base as one whole LLaVA checkpoint, in the base's dtype.

    Args:
        source: folder of the LoRA or projector. target: folder to write; it must not exist yet. base, vision_tower: as
            for `load_pretrained`.

    Raises:
        CheckpointError: as `load_pretrained`, and when the target cannot be written.
    """
    with Folder(target) as folder:
        base = local_folder(base)
        weights = Weights(base)
        stored = weights[next((n for n in weights if n.endswith("embed_tokens.weight")), next(iter(weights)))].dtype
        tokenizer, model, _, _ = load_pretrained(source, base, device="cpu", dtype=stored, vision_tower=vision_tower)
        savable_generation_config(model)
        model.save_pretrained(folder)
        if len(tokenizer) == len(_tokenizer(base)):
            save_tokenizer(tokenizer, folder, base)
        else:  # LLaVA-1's tokens around images, which the base's files do not know
            tokenizer.save_pretrained(folder)


def _class_for(config, hacl):
    kind = f"{config.get('model_type')} {config.get('architectures')}".lower()
    if "mpt" in kind:
        raise CheckpointError("LLaVA on MPT is not supported; Llama and Mistral are.")
    if "mistral" in kind:
        return HaclLlavaMistralForCausalLM if hacl else LlavaMistralForCausalLM
    return HaclLlavaLlamaForCausalLM if hacl else LlavaLlamaForCausalLM


def _quantization(bits, dtype):
    import importlib.util

    from transformers import BitsAndBytesConfig

    if bits not in (4, 8):
        raise HaclError(f"bits is {bits!r}, allowed are 4 and 8 (None: no quantization).")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise HaclError(f"{bits}-bit loading needs bitsandbytes; run: pip install 'hacl-llava[quantize]'")
    keep = {"llm_int8_skip_modules": ["mm_projector", "vision_tower", "lm_head"]}
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, **keep)
    return BitsAndBytesConfig(  # LLaVA's own settings
        load_in_4bit=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type="nf4",
        **keep,
    )


def _llava_config(cls, values, folder, vision_tower):
    """The config of a LLaVA class from a config.json's values, with a tower that LLaVA's builder takes."""
    values = {k: v for k, v in values.items() if k not in ("model_type", "unfreeze_mm_vision_tower")}
    named = vision_tower or values["mm_vision_tower"]
    known = str(named).startswith(("openai", "laion")) or "ShareGPT4V" in str(named)
    if Path(named).exists() or (Path(folder) / named).exists() or not known:
        named = tower_folder(named, folder).absolute()
    return cls.config_class.from_dict({**values, "mm_vision_tower": str(named)})


def _tokenizer(folder):
    import transformers

    if not any((Path(folder) / name).exists() for name in ("tokenizer.model", "tokenizer.json")):
        raise CheckpointError(f"{folder}: has neither tokenizer.model nor tokenizer.json; copy them from its origin.")
    return transformers.AutoTokenizer.from_pretrained(str(folder), use_fast=False)


def _from_llava(folder, values, base, vision_tower, hacl, options):
    lora = (folder / "adapter_config.json").exists()
    whole = not lora and is_whole(folder)
    if "mm_vision_tower" not in values:
        raise CheckpointError(
            f"{folder}/config.json: names no mm_vision_tower, so this is no LLaVA checkpoint"
            + ("; a language model goes to base." if is_whole(folder) else ".")
        )
    if whole and base:
        raise CheckpointError(f"{folder}: is a whole checkpoint and takes no base; {base} would not be used.")
    if not whole and not lora and not (folder / "mm_projector.bin").exists():
        raise CheckpointError(
            f"{folder}: holds neither a model's weights, nor an mm_projector.bin, nor a LoRA adapter; "
            "perhaps it was not written to its end."
        )
    if not whole and base is None:
        what = "a LoRA" if lora else "a projector alone"
        named = read_json(folder / "adapter_config.json").get("base_model_name_or_path") if lora else None
        named = named or values.get("_name_or_path")
        raise CheckpointError(f"{folder}: is {what}; give its base{f' ({named}, it says)' if named else ''}.")
    if not whole:  # a QLoRA's says how its base was held in training
        values = {k: v for k, v in values.items() if k != "quantization_config"}
    cls = _class_for(values, hacl)
    config = _llava_config(cls, values, folder, vision_tower)
    source = folder if whole else base
    language = Weights(source)
    if not whole:
        rows = check_base(folder, values, base)
        config.vocab_size = rows
    if not getattr(config, "quantization_config", None):  # else packed: nothing that a shape could be compared with
        _check_shapes(language, cls, config, needs_projector=whole)
    model = cls.from_pretrained(str(source), config=config, **options)
    tokenizer = _tokenizer(source)
    added = _special_tokens(values, tokenizer)
    if len(tokenizer) != model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))  # as LLaVA's loader, rows beyond the tokenizer's included
    if lora:
        model = _with_lora(model, folder, language)
    elif not whole:
        weights = Weights(folder / "mm_projector.bin")
        asked = [n for n, _ in model.named_parameters() if "mm_projector." in n]
        if lacking := [n for n in asked if n not in weights]:
            raise CheckpointError(f"{weights.path}: lacks {lacking[0]!r}, which config.json asks for.")
        _put(model, weights.path, weights, added)
    return model, tokenizer


def _from_hf(folder, hf, vision_tower, made, hacl, options):
    if vision_tower is None:
        write_tower(made, folder, hf["vision_config"])
    values, rows = config_from_hf(hf, str(vision_tower or made), folder)
    cls = _class_for(values, hacl)
    config = _llava_config(cls, values, folder, None)
    weights = Weights(folder)
    names = {new: old for old, new in names_from_hf(weights).items() if not new.startswith("vision_tower.")}
    _check_shapes(weights, cls, config, True, names, rows)
    state = {new: weights[old][:rows] if new.endswith(ROWS) else weights[old] for new, old in names.items()}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    # From tensors in memory transformers 4.37 neither spares memory nor places; so the model is moved whole.
    where = options["device_map"]
    plain = {k: options[k] for k in ("torch_dtype", "attn_implementation")}
    model = cls.from_pretrained(None, config=config, state_dict=state, **plain)
    return model.to("cuda" if where == "auto" else where[""]), _tokenizer(folder)


def _check_shapes(weights, cls, config, needs_projector, names=None, rows=None):
    """Compare each tensor with what the config asks for, before gigabytes are loaded.

    ``names``: {name in the model: name in the file}; ``rows`` of the vocabulary are used.
    """
    with torch.device("meta"):
        expected = {k: tuple(v.shape) for k, v in cls(config).state_dict().items()}
    names = names or {name: name for name in weights}
    unknown = []
    for name, stored in names.items():
        got = weights.shape(stored)
        if name not in expected:
            if not any(part in name for part in _BESIDE):
                unknown.append(stored)
            continue
        want = expected[name]
        if rows and name.endswith(ROWS) and got[0] >= rows:
            got = (rows, *got[1:])
        if got != want:
            raise CheckpointError(
                f"{weights.file(stored)}: tensor {stored!r} has the shape {list(got)}, config.json asks for "
                f"{list(want)}."
            )
    if unknown:
        raise CheckpointError(f"{weights.path}: holds {unknown[0]!r}, which belongs to no part of {cls.__name__}.")
    beside = _BESIDE if needs_projector else (*_BESIDE, "mm_projector.")
    missing = [n for n in expected if n not in names and not any(part in n for part in beside)]
    if config.tie_word_embeddings:
        missing = [n for n in missing if n != "lm_head.weight"]
    if missing:
        raise CheckpointError(
            f"{weights.path}: lacks {len(missing)} tensors that config.json asks for, as {missing[0]!r}."
        )


def _check_projector(folder, config, tower):
    if tower.hidden_size != getattr(config, "mm_hidden_size", tower.hidden_size):
        raise CheckpointError(
            f"{folder}: its projector takes {config.mm_hidden_size} features a patch, the vision tower "
            f"{config.mm_vision_tower} gives {tower.hidden_size}; name the one it was trained with as vision_tower."
        )


def _special_tokens(config, tokenizer):
    """Add what old LLaVA checkpoints put around images; how many were new. (Defaults as LLaVA's loader.)"""
    from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN

    names = [DEFAULT_IMAGE_PATCH_TOKEN] if config.get("mm_use_im_patch_token", True) else []
    if config.get("mm_use_im_start_end", False):
        names += [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN]
    return tokenizer.add_tokens(names, special_tokens=True) if names else 0


def _put(model, file, weights, added=0, rename=lambda name: name):
    """Copy tensors over the model's own; each must have a place of its shape."""
    own = dict(model.named_parameters())
    with torch.no_grad():
        for stored in weights:
            if any(part in stored for part in _BESIDE[1:]):
                continue
            name = rename(stored)
            if name not in own:
                raise CheckpointError(f"{file}: tensor {stored!r} belongs to no part of {type(model).__name__}.")
            tensor, target = weights[stored], own[name]
            if name.endswith(ROWS) and added and tensor.shape[0] in (added, target.shape[0]):
                tensor, target = tensor[-added:], target[-added:]  # stage 1 of old trains the added tokens' rows alone
            if tensor.shape != target.shape:
                raise CheckpointError(
                    f"{file}: tensor {stored!r} has the shape {list(tensor.shape)}, expected is {list(target.shape)}."
                )
            target.copy_(tensor)


def _with_lora(model, folder, language):
    from peft import PeftModel

    others = folder / "non_lora_trainables.bin"  # written last by LLaVA's train()
    if not others.exists():
        raise CheckpointError(f"{folder}: has no non_lora_trainables.bin; perhaps it was not written to its end.")
    weights = Weights(others)
    own = dict(model.named_parameters())

    def rename(name):  # base_model.model.model.mm_projector... -> model.mm_projector...
        name = name.removeprefix("base_model.").removeprefix("model.")
        return name if name in own else f"model.{name}"

    _put(model, others, weights, rename=rename)
    # Frozen in the run, LLaVA does not save the projector at all.
    placed = {rename(n) for n in weights} | set(language)
    if lacking := [n for n in own if n not in placed and ("mm_projector." in n or "image_newline" in n)]:
        raise CheckpointError(
            f"{others}: lacks {lacking[0]!r}, and so does the base; the LoRA was trained with a projector that is not "
            "here (frozen, LLaVA does not save it). Merge onto a LLaVA checkpoint that has it."
        )
    files = [folder / f"adapter_model.{end}" for end in ("safetensors", "bin")]
    adapter = next((f for f in files if f.exists()), None)
    if adapter is None:
        raise CheckpointError(f"{folder}: has no adapter_model.safetensors or .bin.")
    found = Weights(adapter)
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    for name in found:  # peft ignores an adapter whose modules do not exist
        module, _, part = name.removeprefix("base_model.model.").partition(".lora_")
        want, got = shapes.get(f"{module}.weight"), found.shape(name)
        side = 1 if part.startswith("A") else 0  # A: [r, in], B: [out, r]
        if part and (want is None or (part[:1] in "AB" and got[side] != want[side] and not _packed(model, module))):
            raise CheckpointError(
                f"{adapter}: tensor {name!r} of shape {list(got)} does not fit the base"
                + (", which has no such layer" if want is None else f", whose layer has the shape {list(want)}")
                + "; give the model that the LoRA was trained on."
            )
    model = PeftModel.from_pretrained(model, str(folder))
    asked = {n.replace(".default", "") for n, _ in model.named_parameters() if ".lora_" in n}
    if lacking := sorted(n for n in asked if n not in found):
        raise CheckpointError(f"{adapter}: lacks {lacking[0]!r}, which adapter_config.json asks for.")
    if unused := [n for n in found if ".lora_" in n and n not in asked]:
        raise CheckpointError(f"{adapter}: holds {unused[0]!r}, which adapter_config.json does not ask for.")
    return model.merge_and_unload()


def _packed(model, module):
    return not model.get_submodule(module).weight.is_floating_point()


def _check_tower(tower):
    """Refuse a tower with weights missing, which transformers makes up with only a warning."""
    if Path(tower.vision_tower_name).is_dir():
        weights = Weights(Path(tower.vision_tower_name))
        if any(k not in weights for k in tower.vision_tower.state_dict() if "position_ids" not in k):
            _tower_from(weights, tower, "")


def _tuned_tower(folder, tower):
    _tower_from(Weights(folder), tower, "model.vision_tower.vision_tower.")


def _tower_from(weights, tower, prefix):
    # transformers 5 has no vision_model in between: neither in what it writes nor in its modules.
    found = {n.removeprefix(prefix).removeprefix("vision_model."): n for n in weights if n.startswith(prefix)}
    own = {k: v for k, v in tower.vision_tower.state_dict().items() if "position_ids" not in k}
    for name, value in own.items():
        stored = found.get(name.removeprefix("vision_model."))
        if stored is None or weights.shape(stored) != tuple(value.shape):
            what = "no" if stored is None else f"of the shape {list(weights.shape(stored))}"
            raise CheckpointError(
                f"{weights.path}: has {what} {prefix + name!r} for the vision tower, expected is {list(value.shape)}."
            )
    state = {name: weights[found[name.removeprefix("vision_model.")]] for name in own}
    tower.vision_tower.load_state_dict(state, strict=False)


def _tower_of(hf):
    """The tower's name that a Hugging Face config keeps, or whose weights LLaVA-1.5 has; None where it is another."""
    vision = hf["vision_config"]
    large = {"hidden_size": 1024, "num_hidden_layers": 24, "patch_size": 14, "image_size": 336}
    same = all(vision.get(key) == value for key, value in large.items())
    return hf.get("hacl_llava", {}).get("mm_vision_tower") or ("openai/clip-vit-large-patch14-336" if same else None)


def _heads(folder, config, model, eos):
    """Heads and temperature as saved in the folder, else fresh ones."""
    if not model.load_hacl_head(folder, eos):
        model.enable_hacl(HaclConfig.from_dict(config["hacl"]) if "hacl" in config else HaclConfig(), eos)
