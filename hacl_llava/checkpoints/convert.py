"""Checkpoints between LLaVA's format and Hugging Face's ``LlavaForConditionalGeneration``.

Weights are copied tensor by tensor, none is computed with: a 13B checkpoint needs no more memory than one shard, and
the weights do not depend on the installed transformers.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AddedToken, AutoTokenizer

from ..common.files import write_json
from ..common.weights import CheckpointError, Folder, read_json
from .read import ROWS, TOWER, Checkpoint, read_checkpoint

SHARD = 5 * 10**9  # bytes of weights in a file
_PAD_TO = 64  # rows of the vocabulary, as the published llava-hf checkpoints have it
_PROMPT = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] + ' ' }}"
    "{% else %}{{ message['role'].upper() + ': ' }}{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}{% endif %}"
    "{% endfor %}{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ ' ' if message['role'] == 'user' else '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# LLaVA's names -> those of the published llava-hf checkpoints, which every transformers since 4.36 and vLLM read; newer
# transformers writes a third form itself.
_NAMES = (
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    (TOWER, "vision_tower.vision_model."),
    ("model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
# Keys of a LLaVA config.json that are not the language model's.
_NOT_TEXT = (
    *("mm_", "tune_mm", "freeze_mm", "unfreeze_mm", "image_", "use_mm_proj", "hacl", "tokenizer_", "architectures"),
    *("model_type", "transformers_version", "_name_or_path", "auto_map", "use_cache"),
)


def export_to_hf(
    source: str | os.PathLike,
    target: str | os.PathLike,
    base: str | os.PathLike | None = None,
    vision_tower: str | os.PathLike | None = None,
) -> None:
    """Write a LLaVA checkpoint as Hugging Face's ``LlavaForConditionalGeneration``, with its processor.

    The tokenizer gets ``<image>`` and ``<pad>`` after its own tokens, and the vocabulary rows up to a multiple of 64,
    as the published llava-hf checkpoints have them; new rows are the mean of the old ones. What is needed to come back
    is kept in config.json under ``"hacl_llava"``.

    Args:
        source: folder of a LLaVA checkpoint, or of a stage-1 run (``mm_projector.bin``) with ``base``.
        target: folder to write; it must not exist yet.
        base: the language model that a projector belongs to.
        vision_tower: folder or hub id, in place of config.json's ``mm_vision_tower``.

    Raises:
        CheckpointError: what is read does not fit together, or the target cannot be written.
    """
    written = Folder(target)
    _check_it_fits(Path(source))
    checkpoint = read_checkpoint(source, base, vision_tower)
    if checkpoint.values.get("quantization_config") or any(name.endswith(ROWS) for name in checkpoint.over):
        raise CheckpointError(
            f"{source}: is quantized, or comes with a few rows of the vocabulary; merge it with its base first: "
            f"hacl-llava export --to llava --base LLM {source} MERGED"
        )
    _check_files(checkpoint.language, "tokenizer.model")
    # legacy: a text that follows <image> begins with a space, as where LLaVA tokenizes the pieces between images
    tokenizer = AutoTokenizer.from_pretrained(str(checkpoint.language), use_fast=True, from_slow=True, legacy=True)
    own = len(tokenizer)
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.chat_template = _PROMPT
    config = _hf_config(checkpoint, own, tokenizer)
    with written as folder:
        _write(folder, _hf_tensors(checkpoint, config["vocab_size"]))
        write_json(folder / "config.json", config)
        _write_processor(folder, checkpoint, config, tokenizer)


def _check_it_fits(source):
    """Refuse what Hugging Face's format cannot hold."""
    if (source / "adapter_config.json").exists():
        raise CheckpointError(
            f"{source}: is a LoRA; merge it first: hacl-llava export --to llava --base LLM {source} MERGED"
        )
    config = read_json(source / "config.json")
    shape = str(config.get("image_aspect_ratio")), str(config.get("mm_patch_merge_type", "flat"))
    if shape[0] == "anyres" or "unpad" in shape[1]:
        raise CheckpointError(
            f"{source}/config.json: is of LLaVA-1.6 (image_aspect_ratio {shape[0]}, mm_patch_merge_type {shape[1]}); "
            "LlavaForConditionalGeneration is LLaVA-1.5's format and cannot hold it."
        )
    projector = config.get("mm_projector_type", "linear")
    if "mm_vision_tower" in config and projector != "mlp2x_gelu":
        raise CheckpointError(
            f"{source}/config.json: has the projector {projector!r}; Hugging Face's format knows mlp2x_gelu alone."
        )
    if "LlavaForConditionalGeneration" in (config.get("architectures") or ()):
        raise CheckpointError(f"{source}: is in Hugging Face's format already.")


def _check_files(folder, *names):
    for name in names:
        if not (folder / name).exists():
            raise CheckpointError(f"{folder}: has no {name}, which LLaVA's tools read.")


def _hf_config(checkpoint, own, tokenizer):
    """config.json; ``own``: tokens that the tokenizer had by itself."""
    values, embeddings = checkpoint.values, checkpoint.weight("model.embed_tokens.weight")
    rows = -(-max(len(embeddings), len(tokenizer)) // _PAD_TO) * _PAD_TO
    kind = "mistral" if "mistral" in str(values["model_type"]) else "llama"
    vision = read_json(checkpoint.tower / "config.json")
    vision = vision.get("vision_config", vision) | {"model_type": "clip_vision_model"}
    select = values.get("mm_vision_select_feature", "patch")
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": {k: v for k, v in values.items() if not k.startswith(_NOT_TEXT)}
        | {
            "model_type": kind,
            "architectures": [f"{kind.capitalize()}ForCausalLM"],
            "vocab_size": rows,
            "pad_token_id": tokenizer.pad_token_id,
        },
        "vision_config": vision,
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "image_seq_length": (vision["image_size"] // vision["patch_size"]) ** 2 + (select != "patch"),
        "ignore_index": -100,
        "pad_token_id": tokenizer.pad_token_id,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": values.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": "default" if select == "patch" else "full",
        "tie_word_embeddings": bool(values.get("tie_word_embeddings")),
        "vocab_size": rows,
        "torch_dtype": str(embeddings.dtype).removeprefix("torch."),
        "hacl_llava": {
            "vocab_size": len(embeddings),
            "tokenizer_length": own,
            "mm_vision_tower": str(values["mm_vision_tower"]),
        },
    }


def _hf_tensors(checkpoint, rows):
    """(name, tensor) of Hugging Face's form, with so many rows of the vocabulary."""
    dtype = checkpoint.weight("model.embed_tokens.weight").dtype
    for name in checkpoint.tensors | checkpoint.over:
        tensor = checkpoint.weight(name)
        if name.startswith(TOWER) and not checkpoint.own_tower:
            tensor = tensor.to(dtype)
        if name.endswith(ROWS) and len(tensor) < rows:  # the mean of those there: the same every time
            mean = tensor.double().mean(0, keepdim=True).to(tensor.dtype)
            tensor = torch.cat([tensor, mean.expand(rows - len(tensor), -1)])
        old, new = next(pair for pair in _NAMES if name.startswith(pair[0]))
        yield new + name.removeprefix(old), tensor


def _write_processor(folder, checkpoint, config, tokenizer):
    """What stands beside config.json and weights: settings of generation, tokenizer, image processor."""
    generation = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    write_json(folder / "generation_config.json", generation | {"pad_token_id": tokenizer.pad_token_id})
    tokenizer.save_pretrained(folder)
    saved = read_json(folder / "tokenizer_config.json") | {"tokenizer_class": "LlamaTokenizer", "legacy": True}
    for key in ("from_slow", "is_local", "local_files_only", "backend"):
        saved.pop(key, None)
    write_json(folder / "tokenizer_config.json", saved | {"processor_class": "LlavaProcessor"})
    shutil.copyfile(checkpoint.language / "tokenizer.model", folder / "tokenizer.model")
    image = read_json(checkpoint.tower / "preprocessor_config.json")
    image |= {"image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor"}
    write_json(folder / "preprocessor_config.json", image)
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": config["vision_config"]["patch_size"],
        "vision_feature_select_strategy": config["vision_feature_select_strategy"],
        "num_additional_image_tokens": 1,
    }
    write_json(folder / "processor_config.json", processor)
    write_json(folder / "chat_template.json", {"chat_template": _PROMPT})


def import_from_hf(
    source: str | os.PathLike, target: str | os.PathLike, vision_tower: str | os.PathLike | None = None
) -> None:
    """Write a ``LlavaForConditionalGeneration`` checkpoint as LLaVA's own format, as stock LLaVA loads it.

    Rows that were added for ``<image>`` and padding are left out, so that LLaVA -> Hugging Face -> LLaVA gives the same
    bits.

    Args:
        source: folder with config.json and weights. target: folder to write; it must not exist yet.
        vision_tower: folder or hub id that config.json is to name; None: the one it was exported with, or else the
            tower's weights are written to ``target/vision_tower``.
    """
    written, source, target = Folder(target), Path(source), Path(target)
    checkpoint = read_checkpoint(source)
    if checkpoint.kind != "hf":
        raise CheckpointError(
            f"{source}/config.json: has the architectures {checkpoint.values.get('architectures')}, expected "
            "LlavaForConditionalGeneration."
        )
    tower = vision_tower or checkpoint.values["mm_vision_tower"]
    _check_files(source, "tokenizer.model", "tokenizer_config.json", *([] if tower else ["preprocessor_config.json"]))
    old = read_json(source / "tokenizer_config.json")
    with written as folder:
        language = (name for name in checkpoint.tensors if not name.startswith(TOWER))
        _write(folder, ((name, checkpoint.weight(name)) for name in language))
        named = str(tower or (target / "vision_tower").absolute())
        write_json(folder / "config.json", checkpoint.values | {"mm_vision_tower": named})
        if (source / "generation_config.json").exists():
            generation = read_json(source / "generation_config.json")
            write_json(folder / "generation_config.json", generation | {"pad_token_id": 0})
        shutil.copyfile(source / "tokenizer.model", folder / "tokenizer.model")
        special = {k: {"content": v, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
                   for k, v in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"))}  # fmt: skip
        tokenizer = {"tokenizer_class": "LlamaTokenizer", "legacy": old.get("legacy", False), "padding_side": "right"}
        tokenizer |= {"add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False}
        tokenizer |= {k: {**v, "__type": "AddedToken"} for k, v in special.items()}
        tokenizer |= {"model_max_length": old.get("model_max_length", 2048), "sp_model_kwargs": {}}
        write_json(folder / "tokenizer_config.json", tokenizer)
        write_json(folder / "special_tokens_map.json", special | {"pad_token": "<unk>"})
        if tower is None:
            (folder / "vision_tower").mkdir()
            write_tower(folder / "vision_tower", checkpoint)


def write_tower(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the tower of a Hugging Face checkpoint as one of its own, as LLaVA loads it, to a folder that exists."""
    _check_files(checkpoint.folder, "preprocessor_config.json")
    names = [name for name in checkpoint.tensors if name.startswith(TOWER)]
    _write(folder, ((name.replace(TOWER, "vision_model.", 1), checkpoint.weight(name)) for name in names))
    vision = read_json(checkpoint.folder / "config.json")["vision_config"]
    write_json(folder / "config.json", vision | {"architectures": ["CLIPVisionModel"]})
    shutil.copyfile(checkpoint.folder / "preprocessor_config.json", folder / "preprocessor_config.json")


def _write(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], shard: int = SHARD) -> None:
    """Write (name, tensor) pairs as safetensors, in shards with an index where one file would be too large."""
    files, total = [], 0
    for held, size in _shards(tensors, shard):
        save_file(held, folder / f"part-{len(files)}", metadata={"format": "pt"})
        files.append(list(held))
        total += size
    if len(files) == 1:
        os.replace(folder / "part-0", folder / "model.safetensors")
        return
    where = {}
    for i, names in enumerate(files):
        file = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        os.replace(folder / f"part-{i}", folder / file)
        where.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _shards(tensors, most) -> Iterator[tuple[dict, int]]:
    """({name: tensor}, bytes) of at most so many bytes; of a tensor that is larger, it alone."""
    held, size = {}, 0
    for name, tensor in tensors:
        count = tensor.numel() * tensor.element_size()
        if held and size + count > most:
            yield held, size
            held, size = {}, 0
        held[name] = tensor.contiguous().clone() if tensor._base is not None else tensor.contiguous()
        size += count
    yield held, size
