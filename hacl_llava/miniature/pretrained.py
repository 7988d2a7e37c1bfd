"""The small LLM and vision tower that come with the package, as float16 in pretrained/; and how they were made.

    python -m hacl_llava.miniature.pretrained     ten minutes on one core; writes pretrained/ anew, with its log

A frozen LLM that has read nothing but text does not come to read images in the minutes that a miniature has. This one
has also read captions behind "bundles": nine vectors, one for each cell of a scene, each the sum of the embeddings of
the words for what is there; and questions about what is there, with "Yes" or "No". So it can read vectors that mean
several words at once, which a projector can find, and it knows what a question asks. And its state at EOS tells texts
apart that differ in one detail, as text embeddings of real LLMs do. It has seen no image.
"""

import argparse
import json
import os
import random
import shutil
import time
from pathlib import Path

from . import models
from .world import KINDS, PLACES, SHAPES, caption_of, hallucinate, make_scene, question_about

FOLDER = Path(__file__).with_name("pretrained")
STEPS, TOWER_STEPS, BATCH, LEARNING_RATE = 6000, 600, 32, 3e-3
BATCHES = ("captions of bundles", "texts", "captions of bundles", "after a bundle", "questions of bundles")
NOISE = 0.02  # standard deviation of what is added to bundles
INFO_NCE, TEMPERATURE = 0.2, 0.07  # weight and temperature of the contrast of texts


def copy(folder: str | os.PathLike) -> None:
    """Write the LLM to ``folder``/llm and the vision tower to ``folder``/clip.

    Raises:
        OSError: ``folder`` cannot be written.
    """
    for name in ("llm", "clip"):
        shutil.copytree(FOLDER / name, Path(folder) / name, dirs_exist_ok=True)


def make(folder: Path, seed: int = 0, steps: int = STEPS, tower_steps: int = TOWER_STEPS) -> None:
    """Train both, and write them and log.json, which has the settings and the losses on the way."""
    import torch
    import transformers

    models.make_llm(folder / "llm", seed, hidden_size=96, layers=3)
    model = transformers.LlamaForCausalLM.from_pretrained(folder / "llm", torch_dtype=torch.float32)
    torch.manual_seed(seed)
    log = {"seed": seed, "batch": BATCH, "learning_rate": LEARNING_RATE, "noise": NOISE, "info_nce": INFO_NCE}
    log |= {"steps": steps, "tower_steps": tower_steps, "losses": []}
    began = time.time()
    for done in _train(model, folder, seed, steps):
        log["losses"].append(done)
        print(json.dumps(done), flush=True)
        if done["step"] % 500 == 0 or done["step"] == steps:
            model.half().save_pretrained(folder / "llm")
            model.float()
            log["seconds"] = round(time.time() - began)
            (folder / "log.json").write_text(json.dumps(log, indent=1) + "\n")


def make_tower(folder: Path, seed: int = 0, steps: int = TOWER_STEPS) -> None:
    """Train the vision tower and write it as float16."""
    from safetensors.torch import load_file, save_file

    right = models.make_vision_tower(folder / "clip", seed, steps, places=True)
    file = folder / "clip/model.safetensors"
    save_file({name: x.half() for name, x in load_file(file).items()}, file, metadata={"format": "pt"})
    print(f"cells named right: {right:.3f}")


def _train(model, folder, seed, steps):
    """``BATCHES`` in turn; yields mean losses of each hundred steps."""
    import sentencepiece
    import torch
    import torch.nn.functional as F

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "llm/tokenizer.model"))
    rng, losses = random.Random(seed + 1), {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.98))
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    for step in range(1, steps + 1):
        kind = BATCHES[step % len(BATCHES)]
        ids, labels, end, bundles = _rows(rng, pieces, kind)
        words = model.get_input_embeddings()
        embeds = words(ids)
        if bundles is not None:
            sums = (words(bundles) * (bundles > 0)[..., None]).sum(2)
            embeds = torch.cat([embeds[:, :1], sums + NOISE * torch.randn_like(sums), embeds[:, 10:]], dim=1)
        at = torch.arange(ids.shape[1])
        sees = (at[:, None] >= at) & ((at[:, None] <= end[:, None, None]) | (at >= end[:, None, None]))
        states = model.model(inputs_embeds=embeds, attention_mask=sees[:, None], use_cache=False)[0]
        loss = F.cross_entropy(model.lm_head(states[:, :-1]).flatten(0, 1), labels[:, 1:].flatten())
        losses.setdefault(kind, []).append(loss.item())
        if kind == "texts":
            e = F.normalize(states[torch.arange(len(ids)), end], dim=-1)
            scores = e[::2] @ e[1::2].T / TEMPERATURE
            apart = (F.cross_entropy(scores, torch.arange(BATCH)) + F.cross_entropy(scores.T, torch.arange(BATCH))) / 2
            losses.setdefault("contrast of texts", []).append(apart.item())
            loss = loss + INFO_NCE * apart
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps:
            yield {"step": step, **{name: round(sum(x) / len(x), 4) for name, x in losses.items()}}
            losses = {}


def _rows(rng, pieces, kind):
    """(ids, labels, end, bundles) of a batch; what is behind column ``end`` sees of what is before it only that EOS.

    A scene's groups stand in another order behind EOS. "texts": rows 2i and 2i + 1 are of one scene, and half of the
    scenes differ from the other half in one detail.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    scenes = [make_scene(rng) for _ in range(BATCH if kind != "texts" else BATCH // 2)]
    if kind == "texts":
        scenes += [hallucinate(scene, rng.choice(KINDS), rng) for scene in scenes]
    rows, labels, ends, bundles = [], [], [], []
    for scene in scenes:
        one, other = (pieces.encode(caption_of(rng.sample(scene, len(scene)))) for _ in range(2))
        line = pieces.encode("\n")[-1:]
        if kind == "texts":
            both = [(one, other), (other, one)]
            of_scene = [[1, *a, 2, *b, 2] for a, b in both]
            kept, end = of_scene, [len(a) + 1 for a, _ in both]
        else:
            if kind == "questions of bundles":
                after, asked = _questions(scene, pieces, rng)
            else:
                after = [*one, *line] if kind == "captions of bundles" else [2, *one, 2]
                asked = [-100, *one, 2] if after[0] == 2 else after  # EOS itself follows no end
            of_scene, kept = [[1, *[0] * 9, *after]], [[-100] * 10 + asked]
            end = [10 if after[0] == 2 else 0]
            bundles += [torch.tensor(x) for x in _bundle(scene, pieces)]
        rows += of_scene
        labels += kept
        ends += end
    ids, labels = (
        pad_sequence([torch.tensor(x) for x in of], batch_first=True, padding_value=pad)
        for of, pad in ((rows, 0), (labels, -100))
    )
    bundles = pad_sequence(bundles, batch_first=True).unflatten(0, (-1, 9)) if bundles else None
    return ids, labels, torch.tensor(ends), bundles


def _questions(scene, pieces, rng):
    """(ids, labels) of questions after shapes, half of which are there, with their answers; labels of answers alone."""
    there, ids, labels = [group[2] for group in scene], [], []
    for shape in rng.sample([*there, *rng.sample([s for s in SHAPES if s not in there], len(there))], 2 * len(there)):
        asked = pieces.encode(f"{question_about(shape)} ASSISTANT:")
        answer = [*pieces.encode("Yes" if shape in there else "No"), 2]
        ids += [*asked, *answer]
        labels += [-100] * len(asked) + answer
    return ids, labels


def _bundle(scene, pieces):
    """Tokens of each cell: the words for its place, and for what is there."""
    there = {cell: caption_of([group]).split(" at ")[0] for group in scene for cell in group[3:]}
    return [pieces.encode(f"{there.get(cell, '')} {place}".strip()) for cell, place in enumerate(PLACES)]


def main() -> None:
    """Make what the package comes with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make_tower(args.output, args.seed)
    make(args.output, args.seed)


if __name__ == "__main__":
    main()
