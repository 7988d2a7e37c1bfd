"""Captions as stage 1 trains them: what a model says of an image, and how likely it finds what others say.

Sequences are ``[BOS, v_1 .. v_m, caption, line break]``, LLaVA's template "plain". Shapes: B images, m visual tokens, D
hidden size.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from ..common.images import Images
from .representations import Extractor, Item


@torch.inference_mode()
def embeds_of(extractor: Extractor, folder: Path, items: Sequence[Item], batch_size: int = 20) -> torch.Tensor:
    """``[B, 1 + m, D]``, BOS and the image of each."""
    model, found = extractor.model, []
    images = Images(folder, [item.image for item in items], extractor.processor, model.config)
    for start in range(0, len(items), batch_size):
        part = range(start, min(start + batch_size, len(items)))
        pixels, sizes, _ = zip(*(images[n] for n in part))
        pixels = torch.stack([torch.from_numpy(x) for x in pixels]).to(extractor.device, model.dtype)
        ids = torch.tensor([extractor.visual_ids[: -len(extractor.suffix)]], device=extractor.device)
        ids = ids.expand(len(part), -1)
        held = torch.ones_like(ids, dtype=torch.bool)
        found.append(model.prepare_inputs_labels_for_multimodal(ids, None, held, None, None, pixels, list(sizes))[4])
    return torch.cat(found)


@torch.inference_mode()
def greedy(extractor: Extractor, before: torch.Tensor, batch_size: int = 20) -> list[str]:
    """The caption that each ``[1 + m, D]`` of ``before`` is given, up to the end of its line or 48 tokens."""
    from transformers import LlamaForCausalLM

    tokenizer, said = extractor.tokenizer, []
    end = tokenizer("\n", add_special_tokens=False).input_ids[-1]
    for part in before.split(batch_size):
        mask = part.new_ones(part.shape[:2], dtype=int)
        ids = LlamaForCausalLM.generate(
            extractor.model, inputs_embeds=part, attention_mask=mask, max_new_tokens=48, do_sample=False,
            eos_token_id=end, pad_token_id=end,
        )  # fmt: skip
        said += [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    return said


@torch.inference_mode()
def likelihoods(
    extractor: Extractor, texts: Sequence[Sequence[str]], before: torch.Tensor | None = None
) -> tuple[list[list[float]], list[list[int]]]:
    """log p(text | image), without ``before`` log p(text), of each item's texts in nats; and their tokens."""
    model, tokenizer = extractor.model, extractor.tokenizer
    scores, counts = [], []
    bos = model.get_model().embed_tokens(torch.tensor([[tokenizer.bos_token_id]], device=extractor.device))
    for n, of_item in enumerate(texts):
        ids = [tokenizer(f"{text}\n", add_special_tokens=False).input_ids for text in of_item]
        first = bos if before is None else before[n : n + 1]
        longest = max(map(len, ids))
        rows = torch.tensor([row + [0] * (longest - len(row)) for row in ids], device=extractor.device)
        embeds = torch.cat([first.expand(len(ids), -1, -1), model.get_model().embed_tokens(rows)], dim=1)
        states = model.get_model()(inputs_embeds=embeds, use_cache=False, return_dict=True)[0]
        logits = model.lm_head(states[:, first.shape[1] - 1 : -1]).float()
        gains = logits.log_softmax(-1).gather(-1, rows[..., None])[..., 0].cpu()
        scores.append([gains[i, : len(row)].sum().item() for i, row in enumerate(ids)])
        counts.append([len(row) for row in ids])
    return scores, counts
