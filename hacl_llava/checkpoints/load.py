"""LLaVA checkpoints of every published layout, ready to answer."""

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..common.weights import CheckpointError, Folder, save_tokenizer
from ..compat import LlavaMistralForCausalLM, savable_generation_config
from ..config import HaclConfig, HaclError
from ..model import HaclLlavaLlamaForCausalLM, HaclLlavaMistralForCausalLM
from ..representation import suffix_ids
from .convert import write_tower
from .read import ROWS, TOWER, Checkpoint, named, read_checkpoint


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
    options = _options(device, dtype, attn_implementation)
    if bits:
        options["quantization_config"] = _quantization(bits, dtype)
    checkpoint = read_checkpoint(path, base, vision_tower)
    if bits and checkpoint.kind == "hf":
        raise CheckpointError(
            f"{checkpoint.folder}: {bits}-bit loading is for LLaVA's own format; run: hacl-llava export --to llava"
        )
    return _load(checkpoint, options, vision_tower, hacl)


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
    written = Folder(target)
    checkpoint = read_checkpoint(source, base, vision_tower)
    weights, stored = checkpoint.tensors["model.embed_tokens.weight"]
    tokenizer, model, _, _ = _load(checkpoint, _options("cpu", weights[stored].dtype), vision_tower)
    with written as folder:
        savable_generation_config(model)
        model.save_pretrained(folder)
        if checkpoint.added:  # LLaVA-1's tokens around images, which the base's files do not know
            tokenizer.save_pretrained(folder)
        else:
            save_tokenizer(tokenizer, folder, checkpoint.language)


def _options(device, dtype, attn_implementation=None):
    """Those of ``from_pretrained``."""
    options = {"torch_dtype": dtype, "low_cpu_mem_usage": True, "attn_implementation": attn_implementation}
    return {**options, "device_map": device if device == "auto" else {"": device}}


def _load(checkpoint, options, vision_tower, hacl=False):
    folder, values, tokenizer = checkpoint.folder, checkpoint.values, checkpoint.tokenizer
    with named(folder), tempfile.TemporaryDirectory() as made:
        if not checkpoint.tower:
            write_tower(Path(made), checkpoint)
        model = _built(checkpoint, _tower_name(checkpoint, vision_tower) if checkpoint.tower else made, hacl, options)
        tower = model.get_vision_tower()
        if not tower.is_loaded:
            tower.load_model()
        if not checkpoint.tower:
            model.config.mm_vision_tower = _origin(checkpoint) or str(folder)
    if values.get("unfreeze_mm_vision_tower"):
        model.config.unfreeze_mm_vision_tower = True
        _place(tower, checkpoint.tensors)
    elif checkpoint.tower:
        _place(tower, checkpoint.beside)
    tower.to(device=model.get_input_embeddings().weight.device, dtype=options["torch_dtype"])
    if hacl and not model.load_hacl_head(folder):
        config = HaclConfig.from_dict(values.get("hacl", {}), Path(folder) / "config.json")
        model.enable_hacl(config, suffix_ids(config, tokenizer))
    context = getattr(model.config, "max_sequence_length", 2048)  # as LLaVA's loader
    return Loaded(tokenizer, model.eval(), tower.image_processor, context)


def _place(tower, tensors):
    """Give a tower its weights: what transformers 5 has written, older ones would start at random."""
    names = [n for n in tower.vision_tower.state_dict() if "position_ids" not in n]
    found = {n: tensors[TOWER + n.removeprefix("vision_model.")] for n in names}
    tower.vision_tower.load_state_dict({n: weights[stored] for n, (weights, stored) in found.items()}, strict=False)


def _tower_name(checkpoint, vision_tower):
    """What config.json is to say: a hub's name as it is where LLaVA's builder takes it, else the folder."""
    name = str(vision_tower or checkpoint.values["mm_vision_tower"])
    known = name.startswith(("openai", "laion")) or "ShareGPT4V" in name
    if known and not Path(name).exists() and not (checkpoint.folder / name).exists():
        return name
    return str(checkpoint.tower.absolute())


def _origin(checkpoint):
    """The tower's name that a Hugging Face config keeps, or whose weights LLaVA-1.5 has; None where it is another."""
    vision = checkpoint.vision
    large = (vision.hidden_size, vision.num_hidden_layers, vision.patch_size, vision.image_size) == (1024, 24, 14, 336)
    return checkpoint.values["mm_vision_tower"] or ("openai/clip-vit-large-patch14-336" if large else None)


def _quantization(bits, dtype):
    from transformers import BitsAndBytesConfig

    if bits not in (4, 8):
        raise HaclError(f"bits is {bits!r}, allowed are 4 and 8 (None: no quantization).")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise HaclError(f"{bits}-bit loading needs bitsandbytes; run: pip install 'hacl-llava[quantize]'")
    four = {"bnb_4bit_compute_dtype": dtype, "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_type": "nf4"}
    return BitsAndBytesConfig(  # LLaVA's own settings
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        llm_int8_skip_modules=["mm_projector", "vision_tower", "lm_head"],
        **(four if bits == 4 else {}),
    )


def _built(checkpoint: Checkpoint, tower: str, hacl, options):
    """The model with all of its weights but the tower's."""
    cls = checkpoint.cls
    if hacl:
        cls = HaclLlavaMistralForCausalLM if cls is LlavaMistralForCausalLM else HaclLlavaLlamaForCausalLM
    beside = ("model_type", "unfreeze_mm_vision_tower", "mm_vision_tower")
    values = {k: v for k, v in checkpoint.values.items() if k not in beside}
    config = cls.config_class.from_dict({**values, "mm_vision_tower": tower})
    if checkpoint.kind == "hf":
        state = {name: checkpoint.weight(name) for name in checkpoint.tensors if not name.startswith(TOWER)}
        if config.tie_word_embeddings:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        # From tensors in memory transformers 4.37 neither spares memory nor places; so the model is moved whole.
        where = options["device_map"]
        plain = {k: options[k] for k in ("torch_dtype", "attn_implementation")}
        model = cls.from_pretrained(None, config=config, state_dict=state, **plain)
        return model.to("cuda" if where == "auto" else where[""])
    model = cls.from_pretrained(str(checkpoint.language), config=config, **options)
    rows = model.get_input_embeddings().num_embeddings
    if len(checkpoint.tokenizer) != rows:
        model.resize_token_embeddings(len(checkpoint.tokenizer))  # as LLaVA's loader, rows beyond it included
        # Rows that no file has would be random, and one of them now and then the likeliest token of an answer.
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight.data[rows:] = layer.weight.data[:rows].float().mean(0).to(layer.weight.dtype)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name in checkpoint.over:
            tensor = checkpoint.weight(name)
            own[name][len(own[name]) - len(tensor) if name.endswith(ROWS) else 0 :].copy_(tensor)
    if checkpoint.kind == "lora":
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(checkpoint.folder)).merge_and_unload()
    return model
