"""Checkpoints between LLaVA's format and Hugging Face's ``LlavaForConditionalGeneration``.

Weights are read and written tensor by tensor, under their own names: neither model is built, so a 13B checkpoint needs
no more memory than one shard, and the weights do not depend on the installed transformers.
"""

import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .common import files as common_files
from .config import HaclError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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


class CheckpointError(HaclError):
    """A checkpoint that cannot be read or converted; the message names the file and the tensor."""


class Weights:
    """The tensors of a folder or file by name, read one at a time: safetensors or LLaVA's ``.bin``, sharded or not.

    Pickles are read with ``weights_only=True``: one that holds code is refused.

    Raises:
        CheckpointError: there are none, a shard is missing, or a file is damaged.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self._open = (None, None)  # the one file that is held
        self._where = dict(sorted(self._find().items(), key=lambda found: found[1]))  # shard by shard

    def _find(self):
        """{name: file}; an index says it without a shard being opened."""
        if self.path.is_file():
            return dict.fromkeys(self._load(self.path).keys(), self.path)
        for single in ("model.safetensors", "pytorch_model.bin", "mm_projector.bin"):  # transformers' order
            index = f"{single}.index.json"
            if (self.path / single).exists():
                return dict.fromkeys(self._load(self.path / single).keys(), self.path / single)
            if (self.path / index).exists():
                names = read_json(self.path / index).get("weight_map")
                if not isinstance(names, dict) or not all(isinstance(shard, str) for shard in names.values()):
                    raise CheckpointError(f"{self.path / index}: has no weight_map from tensors to files.")
                shards = sorted(set(names.values()))
                missing = [s for s in shards if not (self.path / s).exists()]
                if missing or not shards:
                    raise CheckpointError(
                        f"{self.path / index}: names {', '.join(missing) or 'no shards'}, not there; copy them all."
                    )
                return {name: self.path / shard for name, shard in names.items()}
        raise CheckpointError(
            f"{self.path}: holds no weights (model.safetensors, pytorch_model.bin, or shards of them)."
        )

    def _load(self, file):
        if self._open[0] != file:
            try:
                if file.suffix == ".safetensors":
                    self._open = (file, safe_open(file, "pt"))
                else:
                    mapped = zipfile.is_zipfile(file)  # else written by torch before 1.6
                    held = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
                    if not isinstance(held, dict) or not all(isinstance(v, torch.Tensor) for v in held.values()):
                        raise ValueError("it holds something else than tensors by name")
                    self._open = (file, held)
            except Exception as error:
                first = (str(error).splitlines() or [""])[0][:200]
                code = "; it may hold code, which is not run" if "weights_only" in str(error).lower() else ""
                raise CheckpointError(f"{file}: cannot be read ({type(error).__name__}: {first}){code}.") from None
        return self._open[1]

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        if name not in self._where:
            raise CheckpointError(f"{self.path}: has no tensor {name!r}.")
        return self._where[name]

    def _of(self, name, get_safe):
        file = self.file(name)
        found = self._load(file)
        try:
            return getattr(found, get_safe)(name) if hasattr(found, get_safe) else found[name]
        except Exception:  # an index that names a tensor which its shard does not hold
            raise CheckpointError(f"{file}: lacks the tensor {name!r} that the index names in it.") from None

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._of(name, "get_tensor")

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape as a tuple, without reading the tensor."""
        found = self._of(name, "get_slice")
        return tuple(found.get_shape() if hasattr(found, "get_shape") else found.shape)


def is_whole(folder: str | os.PathLike) -> bool:
    """Whether a folder has a model's weights, rather than a projector or an adapter alone (or nothing)."""
    names = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json")
    return any((Path(folder) / name).exists() for name in names)


def local_folder(path: str | os.PathLike) -> Path:
    """A folder as it is, or a name on the hub as the folder that it was downloaded to.

    Raises:
        CheckpointError: there is no such folder, and the hub does not give it.
    """
    folder = Path(path).expanduser()
    if str(path) and folder.is_dir():
        return folder
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not folder.exists():
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.safetensors", "*.bin", "*.model"]
        try:
            return Path(snapshot_download(str(path), allow_patterns=patterns))
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            raise CheckpointError(f"{path}: is no folder, and the hub does not give it ({first}).") from None
    raise CheckpointError(f"{path}: is no folder; give a checkpoint's folder or its name on the hub.")


def check_base(folder: str | os.PathLike, config: dict[str, Any], base: str | os.PathLike) -> int | None:
    """Refuse a base whose sizes are not those that a projector or a LoRA was trained with.

    Args:
        folder: of the projector or LoRA, for the message. config: its config.json. base: folder of the language model.

    Returns:
        The rows of the base's vocabulary.
    """
    text = read_json(Path(base) / "config.json")
    keys = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    for key in keys:
        if text.get(key) != config.get(key, text.get(key)):
            raise CheckpointError(
                f"{base}/config.json: has the {key} {text.get(key)}, {folder} was trained with {config.get(key)}; "
                "give the language model that it was trained with."
            )
    return text.get("vocab_size", config.get("vocab_size"))


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The object in a json file; CheckpointError where there is none."""
    return common_files.read_json(path, error=CheckpointError, expected=dict)


class Folder:
    """A folder that appears whole or not at all: written beside itself and renamed.

    Raises:
        CheckpointError: it exists already, or cannot be written (a full disk, say); nothing is left behind then.
    """

    def __init__(self, target: str | os.PathLike) -> None:
        self.target = Path(target)
        self.part = self.target.with_name(self.target.name + ".part")

    def __enter__(self) -> Path:
        if self.target.exists() and (not self.target.is_dir() or any(self.target.iterdir())):
            raise CheckpointError(f"{self.target}: exists already; choose another folder, or remove it.")
        shutil.rmtree(self.part, ignore_errors=True)
        try:
            self.part.mkdir(parents=True)
        except OSError as error:
            raise CheckpointError(f"{self.part}: cannot be made ({error.strerror}).") from None
        return self.part

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        if kind is None:
            if self.target.exists():
                self.target.rmdir()
            os.replace(self.part, self.target)
            return
        shutil.rmtree(self.part, ignore_errors=True)
        if isinstance(error, OSError) or kind.__name__ == "SafetensorError":
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(f"{self.target}: cannot be written ({reason}).") from None


def _write(folder, tensors, shard=SHARD):
    """Write (name, tensor) pairs as safetensors, in shards with an index where one file would be too large."""
    files, names, held, size, total = [], {}, {}, 0, 0

    def close():
        nonlocal held, size
        file = f"model-{len(files) + 1:05d}.safetensors"
        save_file(held, folder / file, metadata={"format": "pt"})
        names.update(dict.fromkeys(held, file))
        files.append(file)
        held, size = {}, 0

    for name, tensor in tensors:
        count = tensor.numel() * tensor.element_size()
        if held and size + count > shard:
            close()
        held[name] = tensor.contiguous().clone() if tensor._base is not None else tensor.contiguous()
        size, total = size + count, total + count
    close()
    if len(files) == 1:
        os.replace(folder / files[0], folder / "model.safetensors")
        return
    new = {f: f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i, f in enumerate(files)}
    for old, name in new.items():
        os.replace(folder / old, folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": {n: new[f] for n, f in names.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


# LLaVA's names -> those of the published llava-hf checkpoints, which every transformers since 4.36 and vLLM read; newer
# transformers writes the third form itself. The first pattern that fits decides.
_TO_HF = (
    (r"model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
    (r"model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"model\.vision_tower\.vision_tower\.(?:vision_model\.)?", "vision_tower.vision_model."),
    (r"model\.", "language_model.model."),
    (r"lm_head\.", "language_model.lm_head."),
)
_TO_LLAVA = (
    (r"(?:model\.)?multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
    (r"(?:model\.)?multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
    (r"(?:model\.)?vision_tower\.(?:vision_model\.)?", "vision_tower.vision_model."),
    (r"language_model\.lm_head\.", "lm_head."),
    (r"language_model\.model\.", "model."),
    (r"model\.language_model\.", "model."),
    (r"lm_head\.", "lm_head."),
)
_NOT_KEPT = re.compile(r"rotary_emb\.inv_freq|position_ids|hacl_head\.")
_NOT_VISION = ("text_model.", "text_projection", "visual_projection", "logit_")  # of a whole CLIP
ROWS = ("embed_tokens.weight", "lm_head.weight")


def _renamed(name, patterns, path):
    for pattern, new in patterns:
        if re.match(pattern, name):
            return re.sub("^" + pattern, new, name)
    raise CheckpointError(f"{path}: has a tensor {name!r}, which belongs to no part of a LLaVA model.")


def _llava_config(source):
    config = read_json(Path(source) / "config.json")
    kind = config.get("model_type")
    if kind not in ("llava", "llava_llama", "llava_mistral") or "mm_vision_tower" not in config:
        raise CheckpointError(
            f"{source}/config.json: has the model_type {kind!r}"
            + ("" if "mm_vision_tower" in config else " and no mm_vision_tower")
            + "; expected a LLaVA checkpoint: llava_llama, llava_mistral or llava, with an mm_vision_tower."
        )
    shape = str(config.get("image_aspect_ratio")), str(config.get("mm_patch_merge_type", "flat"))
    if shape[0] == "anyres" or "unpad" in shape[1]:
        raise CheckpointError(
            f"{source}/config.json: is of LLaVA-1.6 (image_aspect_ratio {shape[0]}, mm_patch_merge_type {shape[1]}); "
            "LlavaForConditionalGeneration is LLaVA-1.5's format and cannot hold it."
        )
    projector = config.get("mm_projector_type", "linear")
    if projector != "mlp2x_gelu":
        raise CheckpointError(
            f"{source}/config.json: has the projector {projector!r}; Hugging Face's format knows mlp2x_gelu alone."
        )
    return config


def tower_folder(tower: str | os.PathLike, source: str | os.PathLike) -> Path:
    """The folder of a vision tower, given as a path (from here or from the checkpoint ``source``) or a hub name."""
    for folder in (Path(tower), Path(source) / tower):
        if (folder / "config.json").exists():
            return folder
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "pytorch_model*.bin"]
        return Path(snapshot_download(str(tower), allow_patterns=patterns))
    except Exception as error:
        first = str(error).strip().splitlines()[0][:160]
        raise CheckpointError(
            f"vision tower {tower}: is no folder, and the hub does not give it ({first}); name it with --vision-tower."
        ) from None


def _text_config(config):
    """The language model's part of a LLaVA config.json."""
    other = (
        "mm_",
        "tune_mm",
        "freeze_mm",
        "unfreeze_mm",
        "image_",
        "use_mm_proj",
        "hacl",
        "tokenizer_",
        "architectures",
    )
    other += ("model_type", "transformers_version", "_name_or_path", "auto_map", "use_cache")
    text = {k: v for k, v in config.items() if not k.startswith(other)}
    text["model_type"] = "mistral" if "mistral" in str(config["model_type"]) else "llama"
    text["architectures"] = [{"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}[text["model_type"]]]
    return text


def _more_rows(tensor, rows):
    """The tensor with rows added, each the mean of those there: the same every time."""
    mean = tensor.double().mean(0, keepdim=True).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(rows - len(tensor), -1)])


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
    source = Path(source)
    config = _llava_config(source)
    if (source / "adapter_config.json").exists():
        raise CheckpointError(
            f"{source}: is a LoRA; merge it first: hacl-llava export --to llava --base LLM {source} MERGED"
        )
    tower = tower_folder(vision_tower or config["mm_vision_tower"], source)
    vision = read_json(tower / "config.json")
    vision = vision.get("vision_config", vision) | {"model_type": "clip_vision_model"}
    parts = [Weights(source)]
    if base is not None:
        if is_whole(source):
            raise CheckpointError(f"{source}: is a whole checkpoint and takes no base; leave out --base.")
        parts = [Weights(base), Weights(source / "mm_projector.bin")]
        check_base(source, config, base)
    elif "lm_head.weight" not in parts[0] and not config.get("tie_word_embeddings"):
        raise CheckpointError(f"{source}: holds a projector alone; give its language model with --base.")

    from transformers import AddedToken, AutoTokenizer

    # legacy: a text that follows <image> begins with a space, as where LLaVA tokenizes the pieces between images
    tokenizer = AutoTokenizer.from_pretrained(str(base or source), use_fast=True, from_slow=True, legacy=True)
    own = len(tokenizer)
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    text_config = _text_config(config)
    embeddings = next(p for p in parts if "model.embed_tokens.weight" in p)["model.embed_tokens.weight"]
    before = len(embeddings)
    rows = -(-max(before, len(tokenizer)) // _PAD_TO) * _PAD_TO
    text_config |= {"vocab_size": rows, "pad_token_id": tokenizer.pad_token_id}
    select = config.get("mm_vision_select_feature", "patch")
    new = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": text_config,
        "vision_config": vision,
        "image_token_index": image_token,
        "image_seq_length": (vision["image_size"] // vision["patch_size"]) ** 2 + (select != "patch"),
        "ignore_index": -100,
        "pad_token_id": tokenizer.pad_token_id,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": config.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": "default" if select == "patch" else "full",
        "tie_word_embeddings": bool(config.get("tie_word_embeddings")),
        "vocab_size": rows,
        "torch_dtype": str(embeddings.dtype).removeprefix("torch."),
        "hacl_llava": {
            "vocab_size": before,
            "tokenizer_length": own,
            "mm_vision_tower": str(config["mm_vision_tower"]),
        },
    }

    def tensors():
        seen = set()
        for part in parts:
            for name in part:
                if _NOT_KEPT.search(name):
                    continue
                hf = _renamed(name, _TO_HF, part.path)
                tensor = part[name]
                seen.add(hf)
                yield hf, _more_rows(tensor, rows) if name.endswith(ROWS) else tensor
        needed = {f"multi_modal_projector.linear_{i}.{k}" for i in (1, 2) for k in ("weight", "bias")}
        needed |= {"language_model.model.embed_tokens.weight"}
        if not needed <= seen:
            raise CheckpointError(f"{source}: has no {', '.join(sorted(needed - seen))}.")
        if not any(name.startswith("vision_tower.") for name in seen):
            found = Weights(tower)
            for name in found:
                if _NOT_KEPT.search(name) or name.startswith(_NOT_VISION):
                    continue
                yield (
                    "vision_tower.vision_model." + name.removeprefix("vision_model."),
                    found[name].to(embeddings.dtype),
                )

    with Folder(target) as folder:
        _write(folder, tensors())
        _save_json(folder / "config.json", new)
        generation = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        _save_json(folder / "generation_config.json", generation | {"pad_token_id": tokenizer.pad_token_id})
        tokenizer.chat_template = _PROMPT
        tokenizer.save_pretrained(folder)
        saved = read_json(folder / "tokenizer_config.json") | {"tokenizer_class": "LlamaTokenizer", "legacy": True}
        for key in ("from_slow", "is_local", "local_files_only", "backend"):
            saved.pop(key, None)
        _save_json(folder / "tokenizer_config.json", saved | {"processor_class": "LlavaProcessor"})
        _copy(base or source, folder, "tokenizer.model")
        image = read_json(tower / "preprocessor_config.json")
        image |= {"image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor"}
        _save_json(folder / "preprocessor_config.json", image)
        processor = {"processor_class": "LlavaProcessor", "image_token": "<image>", "patch_size": vision["patch_size"]}
        processor |= {"vision_feature_select_strategy": new["vision_feature_select_strategy"]}
        _save_json(folder / "processor_config.json", processor | {"num_additional_image_tokens": 1})
        _save_json(folder / "chat_template.json", {"chat_template": _PROMPT})


def config_from_hf(
    config: dict[str, Any], tower: str, source: str | os.PathLike = "config.json"
) -> tuple[dict[str, Any], int]:
    """LLaVA's config.json for that of a ``LlavaForConditionalGeneration``, and the rows of its own vocabulary.

    Args:
        config: the parsed config.json. tower: what mm_vision_tower is to say. source: for messages.
    """
    if "LlavaForConditionalGeneration" not in (config.get("architectures") or ()):
        raise CheckpointError(
            f"{source}/config.json: has the architectures {config.get('architectures')}, expected "
            "LlavaForConditionalGeneration."
        )
    lacking = [key for key in ("text_config", "vision_config") if not isinstance(config.get(key), dict)]
    if lacking or not ("image_token_index" in config or "image_token_id" in config):
        raise CheckpointError(f"{source}/config.json: has no {(lacking or ['image_token_index'])[0]}.")
    text, vision = config["text_config"], config["vision_config"]
    odd = {
        "text_config.model_type": (text.get("model_type", "llama"), ("llama", "mistral")),
        "projector_hidden_act": (config.get("projector_hidden_act", "gelu"), ("gelu",)),
        "multimodal_projector_bias": (config.get("multimodal_projector_bias", True), (True,)),
    }
    for key, (got, allowed) in odd.items():
        if got not in allowed:
            raise CheckpointError(f"{source}/config.json: has the {key} {got!r}; LLaVA knows {allowed[0]!r}.")
    rows = config.get("hacl_llava", {}).get("vocab_size", config.get("image_token_index", config.get("image_token_id")))
    strategy = config.get("vision_feature_select_strategy", "default")
    kind = text.get("model_type", "llama")
    return {k: v for k, v in text.items() if k not in ("model_type", "architectures", "pad_token_id")} | {
        "architectures": ["LlavaMistralForCausalLM" if kind == "mistral" else "LlavaLlamaForCausalLM"],
        "model_type": "llava_mistral" if kind == "mistral" else "llava_llama",
        "vocab_size": rows,
        "mm_vision_tower": tower,
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": vision["hidden_size"],
        "mm_vision_select_layer": config.get("vision_feature_layer", -2),
        "mm_vision_select_feature": "patch" if strategy == "default" else "cls_patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "use_mm_proj": True,
        "tie_word_embeddings": bool(config.get("tie_word_embeddings")),
    }, rows


def names_from_hf(weights: Weights) -> dict[str, str]:
    """{name in a Hugging Face checkpoint: name in LLaVA's}; the tower's begin with ``vision_tower.vision_model.``."""
    return {n: _renamed(n, _TO_LLAVA, weights.path) for n in weights if not _NOT_KEPT.search(n)}


def write_tower(folder: Path, source: str | os.PathLike, vision: dict[str, Any]) -> None:
    """Write the vision tower of a Hugging Face checkpoint as one of its own, as LLaVA loads it.

    Args:
        folder: exists. source: the checkpoint's folder. vision: its vision_config.
    """
    weights = Weights(source)
    names = {n: new for n, new in names_from_hf(weights).items() if new.startswith("vision_tower.")}
    _write(folder, ((new.removeprefix("vision_tower."), weights[n]) for n, new in names.items()))
    _save_json(folder / "config.json", vision | {"architectures": ["CLIPVisionModel"]})
    _copy(source, folder, "preprocessor_config.json")


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
    source, target = Path(source), Path(target)
    if (source / "adapter_config.json").exists() or (source / "mm_projector.bin").exists():
        raise CheckpointError(
            f"{source}: is a LoRA or a projector; give the language model that it belongs to: --base."
        )
    config = read_json(source / "config.json")
    kept, vision = config.get("hacl_llava", {}), config.get("vision_config")
    tower = vision_tower or kept.get("mm_vision_tower")
    new, rows = config_from_hf(config, str(tower or (target / "vision_tower").absolute()), source)
    weights = Weights(source)
    names = names_from_hf(weights)
    with Folder(target) as folder:
        language = ((new_name, weights[n]) for n, new_name in names.items() if not new_name.startswith("vision_tower."))
        _write(folder, ((n, t[:rows] if n.endswith(ROWS) else t) for n, t in language))
        _save_json(folder / "config.json", new)
        if (source / "generation_config.json").exists():
            generation = read_json(source / "generation_config.json")
            _save_json(folder / "generation_config.json", generation | {"pad_token_id": 0})
        _copy(source, folder, "tokenizer.model")
        special = {k: {"content": v, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
                   for k, v in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"))}  # fmt: skip
        old = read_json(source / "tokenizer_config.json")
        tokenizer = {"tokenizer_class": "LlamaTokenizer", "legacy": old.get("legacy", False), "padding_side": "right"}
        tokenizer |= {"add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False}
        tokenizer |= {k: {**v, "__type": "AddedToken"} for k, v in special.items()}
        tokenizer |= {"model_max_length": old.get("model_max_length", 2048), "sp_model_kwargs": {}}
        _save_json(folder / "tokenizer_config.json", tokenizer)
        _save_json(folder / "special_tokens_map.json", special | {"pad_token": "<unk>"})
        if tower is None:
            (folder / "vision_tower").mkdir()
            write_tower(folder / "vision_tower", source, vision)


def save_tokenizer(
    tokenizer: "PreTrainedTokenizerBase | None", folder: str | os.PathLike, origin: str | os.PathLike
) -> None:
    """Write a tokenizer as LLaVA's tools on every transformers read it: with the files of its origin, where there are.

    transformers 5 writes no tokenizer.model, and settings that older ones cannot read or read otherwise.

    Args:
        tokenizer: without added tokens; None where it is written already. folder: to write to. origin: folder or hub
            name of the model that it came with.
    """
    from transformers.utils import cached_file

    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        found = Path(origin) / name
        if not Path(origin).is_dir():
            try:  # what was downloaded when the tokenizer was loaded; a training that saves needs no network
                found = Path(cached_file(str(origin), name, local_files_only=True))
            except (OSError, TypeError, ValueError):  # not among them
                continue
        if found.exists():
            shutil.copyfile(found, Path(folder) / name)


def _save_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _copy(source, folder, name):
    if not (Path(source) / name).exists():
        raise CheckpointError(f"{source}: has no {name}, which LLaVA's tools read.")
    shutil.copyfile(Path(source) / name, folder / name)
