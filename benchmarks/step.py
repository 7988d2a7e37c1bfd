"""What HACL costs a training step of stage 1: stock LLaVA's step, HACL as released, ours, and ours without each idea.

    python benchmarks/step.py                sizes for a CPU, some minutes (make bench)
    python benchmarks/step.py --shape 7b     on a GPU: time, memory, and the largest batch that fits
    python benchmarks/step.py --layers       counts alone, two minutes: N layers recomputed, and the N that fits a GPU
    python benchmarks/step.py --parity       the shared pass against separate ones, beside what bfloat16 itself changes
    benchmarks/gpu.sh                        all of that on a GPU, and more

A 7B step's FLOPs and peak memory are counted in any case, from the sizes of its tensors, with nothing computed. Weights
and pixels are random: no time depends on them. Times are ratios to stock LLaVA's step in the same round; the order of a
round is drawn anew. Writes benchmarks/results/step-NAME.json, .md and .png; with --layers checkpointing.json and .md.
"""

import argparse
import contextlib
import gc
import json
import math
import random
import statistics
import sys
import time
import types
import weakref
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hacl_llava import compat  # noqa: E402, F401, I001  (before llava)
from hacl_llava.config import PRESETS, HaclConfig  # noqa: E402
from hacl_llava.data import HaclCollator  # noqa: E402
from hacl_llava.common.files import write_json, write_text  # noqa: E402
from hacl_llava.common.report import COLOURS, provenance, pyplot, save, table  # noqa: E402
from hacl_llava import fused  # noqa: E402
from hacl_llava.model import HaclLlavaLlamaForCausalLM  # noqa: E402
from hacl_llava.packing import pack, unpack  # noqa: E402
from hacl_llava.recomputation import recompute  # noqa: E402
from hacl_llava.representation import IGNORE_INDEX, Centre, embed, hidden, suffix  # noqa: E402

# hidden, intermediate, layers, heads, vocabulary; the vision tower's hidden size and layers. The output layer has the
# same share of the weights in each, so that what logits cost does not mislead.
SHAPES = {
    "tiny": ((128, 344, 4, 2, 500), (32, 1)),
    "small": ((512, 1376, 12, 8, 2500), (128, 2)),
    "medium": ((1024, 2752, 16, 8, 6000), (512, 6)),
    "1b": ((2048, 5504, 24, 16, 24000), (1024, 23)),
    "7b": ((4096, 11008, 32, 32, 32000), (1024, 23)),
}
VISUAL = 576  # visual tokens of an image; --visual
PROMPT = [*range(3, 10)]  # a suffix of seven tokens, as the default of --hacl_prompt is for a Llama tokenizer
MEAN_TOKENS = 28  # of a caption: what a Llama tokenizer makes of LLaVA's 558k, on average
SEED = 1


def image_size():
    """Pixels of a side, for patches of 14."""
    return 14 * math.isqrt(VISUAL)


# --- the model and its batches ----------------------------------------------------------------------------------------


def make_model(shape, device, dtype, checkpointing):
    """LLaVA on random weights, set up as for stage 1, with HACL."""
    import transformers
    from llava.model.language_model.llava_llama import LlavaConfig

    (hidden, intermediate, layers, n_heads, vocabulary), (tower_hidden, tower_layers) = SHAPES[shape]
    config = LlavaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    tower = transformers.CLIPVisionConfig(
        hidden_size=tower_hidden,
        intermediate_size=4 * tower_hidden,
        num_hidden_layers=tower_layers + 1,  # LLaVA reads the layer before the last
        num_attention_heads=max(1, tower_hidden // 64),
        image_size=image_size(),
        patch_size=14,
    )
    torch.manual_seed(SEED)
    with torch.device(device), _dtype(dtype):
        model = HaclLlavaLlamaForCausalLM._from_config(config)
        vision = transformers.CLIPVisionModel(tower)
    model.get_model().vision_tower = _Tower(vision)
    projector = types.SimpleNamespace(mm_projector_type="mlp2x_gelu", mm_hidden_size=tower_hidden, hidden_size=hidden)
    from llava.model.multimodal_projector.builder import build_vision_projector

    with torch.device(device), _dtype(dtype):
        model.get_model().mm_projector = build_vision_projector(projector)
    model.requires_grad_(False)
    model.get_model().mm_projector.requires_grad_(True)
    model.config.use_cache = False
    model.config.tokenizer_model_max_length = 2048
    with torch.device(device), _dtype(dtype):
        model.enable_hacl(HaclConfig(), [2])
    model.hacl_head.to(dtype)
    model.train()
    if checkpointing:
        model.enable_input_require_grads()  # as LLaVA's train() does
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    return model


@contextlib.contextmanager
def _dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _Tower(torch.nn.Module):
    """LLaVA's CLIPVisionTower without its files."""

    def __init__(self, vision):
        super().__init__()
        self.vision_tower = vision

    @torch.no_grad()
    def forward(self, images):
        return self.vision_tower(images, output_hidden_states=True).hidden_states[-2][:, 1:]


def caption_lengths(count, mean, rng):
    """Token counts spread as the words of COCO's human captions are, with this mean."""
    words = [
        len(record["conversations"][1]["value"].split())
        for record in json.loads((ROOT / "tests/data/coco_captions.json").read_text())
    ]
    scale = mean / statistics.mean(words)
    return [max(2, round(rng.choice(words) * scale)) for _ in range(count)]


def make_batch(shape, device, dtype, images, captions, mean):
    """A batch of ``images``, each with so many hallucinated captions, from the real collator."""
    vocabulary, rng = SHAPES[shape][0][4], random.Random(SEED)
    tokenizer = types.SimpleNamespace(pad_token_id=0, bos_token_id=1, eos_token_id=2, model_max_length=2048)

    def words(n):
        return torch.tensor([rng.randrange(3, vocabulary) for _ in range(n)])

    bos, eos, image = torch.tensor([1]), torch.tensor([2]), torch.tensor([-200])
    rows = []
    for n in caption_lengths(images, mean, rng):
        caption = words(n)
        hallucinated = [torch.cat([bos, words(m), eos]) for m in caption_lengths(captions, mean, rng)]
        ids = torch.cat([bos, image, caption, words(1)])  # the template's line break
        labels = torch.cat([torch.full((2,), IGNORE_INDEX), ids[2:]])
        rows.append(
            {
                "input_ids": ids,
                "labels": labels,
                "image": torch.zeros(3, image_size(), image_size()),
                "caption_ids": torch.cat([bos, caption, eos]),
                "hallucinated_ids": hallucinated,
            }
        )
    batch = HaclCollator(tokenizer)(rows)
    # What other forms of the step take: texts in rows of their own, and captions apart from hallucinated captions.
    ids, lengths = unpack(batch["texts"])
    columns = torch.arange(ids.shape[1]).expand_as(ids)
    held = columns < lengths[:, None]
    batch["_spread"] = {
        "ids": ids,
        "positions": columns,
        "owner": torch.where(held, torch.arange(len(ids))[:, None], -1),
        "end": torch.arange(len(ids)) * ids.shape[1] + lengths - 1,
    }
    prompted = [[*(row["caption_ids"] for row in rows)], [text for row in rows for text in row["hallucinated_ids"]]]
    batch["_prompted"] = pack([torch.cat([text[:-1], torch.tensor(PROMPT)]) for part in prompted for text in part])
    batch["_apart"] = [(ids[part], lengths[part]) for part in (slice(0, images), slice(images, None))]
    batch = tree_map(lambda x: x.to(device), batch)
    batch["images"] = torch.randn(images, 3, image_size(), image_size(), device=device, dtype=dtype)
    return batch


# --- the steps compared -----------------------------------------------------------------------------------------------


def of_stock(batch):
    return {k: batch[k] for k in ("input_ids", "labels", "attention_mask", "images")}


def stock_step(model, batch):
    """A: LLaVA's own step."""
    return model(**of_stock(batch)).loss


def stock_step_counted(model, batch):
    """A without its loops over rows, which sizes alone cannot follow: the LLM's work is the same."""
    return stock_loss(model, fused.splice_images(model, **of_stock(batch)))


def stock_loss(model, rows):
    return model.stock_class.forward(
        model, inputs_embeds=rows.embeds, attention_mask=rows.mask, labels=rows.labels
    ).loss


def few_logits(model, rows, states):
    columns = rows.predicting.clamp(min=0)
    targets = rows.labels[:, 1:].gather(1, columns).masked_fill(rows.predicting < 0, IGNORE_INDEX)
    logits = model.lm_head(states.gather(1, columns[..., None].expand(-1, -1, states.shape[-1]))).float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)


def stock_step_few_logits(model, batch):
    """A with logits only where there is a label, so that nobody takes that for HACL's doing."""
    rows = fused.splice_images(model, **of_stock(batch))
    return few_logits(model, rows, hidden(model, rows.embeds, rows.mask))


def released_step(model, batch):
    """B: four passes with gradient, each padded, logits at every position."""
    splice = fused.splice_images if isinstance(batch["input_ids"], FAKE) else by_loops
    rows = splice(model, **of_stock(batch))
    loss_lm = stock_loss(model, rows)
    visual = torch.cat([rows.embeds[:, 1 : 1 + VISUAL], suffix(model, rows.embeds)], dim=1)
    e_v = hidden(model, visual, torch.ones(visual.shape[:2], dtype=torch.bool, device=visual.device))[:, -1]
    e_text = []
    for ids, lengths in batch["_apart"]:
        columns = torch.arange(ids.shape[1], device=ids.device)
        states = hidden(model, embed(model, ids), columns[None] < lengths[:, None])
        e_text.append(states[torch.arange(len(ids), device=ids.device), lengths - 1])
    features = model.hacl_features(e_v, torch.cat(e_text), rows.whole, batch["texts"]["end"])
    return loss_lm + model.hacl_loss(**features)["loss"]


def our_step(model, batch):
    """C."""
    return model(**of_stock(batch), texts=batch["texts"]).loss


def prompted_step(model, batch):
    """C with --hacl_representation prompt and --hacl_centre."""
    eos, model.hacl_suffix, model.hacl_head.centre = model.hacl_suffix, PROMPT, Centre()
    try:
        return our_step(model, {**batch, "texts": batch["_prompted"]})
    finally:
        model.hacl_suffix, model.hacl_head.centre = eos, None


def resting_step(model, batch):
    """P before its contrast begins."""
    config, model.hacl_config = model.hacl_config, HaclConfig(start=PRESETS["default"]["start"])
    try:
        return prompted_step(model, batch)
    finally:
        model.hacl_config = config


def kept_step(model, batch):
    """C where --hacl_text_cache has every text: no text pass; reading takes no FLOPs."""

    def read(model, packed):
        table = model.get_input_embeddings().weight
        return torch.ones(len(packed["end"]), table.shape[1], dtype=table.dtype, device=table.device)

    with replaced(texts=read):
        return our_step(model, batch)


@contextlib.contextmanager
def replaced(**functions):
    """Inside, other functions stand in `fused`."""
    before = {name: getattr(fused, name) for name in functions}
    for name, function in functions.items():
        setattr(fused, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(fused, name, function)


def without(idea):
    """C without one of its ideas; the loss is the same."""

    def step(model, batch):
        if idea == "packed texts":
            return our_step(model, {**batch, "texts": batch["_spread"]})
        with replaced(**INSTEAD[idea]):
            return our_step(model, batch)

    return step


def by_loops(model, input_ids, attention_mask, labels, images, image_sizes=None):
    is_image = (input_ids == fused.IMAGE_TOKEN_INDEX) & attention_mask
    return fused._by_loops(model, input_ids, attention_mask, is_image, labels, images, image_sizes)


def all_logits(model, rows):
    states = fused.shared_pass(model, rows)
    logits = model.lm_head(states[:, :-2]).float()
    loss = F.cross_entropy(logits.flatten(0, 1), rows.labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)
    return loss, states[:, -1]


def two_passes(model, rows):
    loss_lm = few_logits(model, rows, hidden(model, rows.embeds, rows.mask))
    visual = torch.cat([rows.embeds[:, : 1 + VISUAL], suffix(model, rows.embeds)], dim=1)
    seen = torch.ones(visual.shape[:2], dtype=torch.bool, device=visual.device)
    return loss_lm, hidden(model, visual, seen)[:, -1]


ONE_SPLICE = "one splice"
INSTEAD = {
    "one pass for e_v and loss": {"generation": two_passes},
    "texts without graph": {"graph_of_texts": lambda model: contextlib.nullcontext()},
    "few logits": {"generation": all_logits},
    "packed texts": {},
    ONE_SPLICE: {"splice_images": by_loops},
}


PROMPTED, RESTING = "P: C with a prompt of 7 tokens, centred", "S: P before its contrast begins"
STEPS = {
    "A: stock LLaVA": stock_step,
    "A with few logits": stock_step_few_logits,
    "B: HACL as released": released_step,
    "C: HACL here": our_step,
    PROMPTED: prompted_step,
    RESTING: resting_step,
    "T: C with every text kept on disk": kept_step,
    **{f"C without: {idea}": without(idea) for idea in INSTEAD},
}
FAKE = torch._subclasses.FakeTensor


# --- what is measured -------------------------------------------------------------------------------------------------


class Peak(TorchDispatchMode):
    """Bytes of the storages that live at once, above those that were there before."""

    def __init__(self, known=()):
        super().__init__()
        self.live = self.peak = 0
        self.known = {t.untyped_storage()._cdata for t in known}
        self.sizes = {}

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if torch.is_tensor(tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage):
        key = storage._cdata
        if key in self.known or key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.live += self.sizes[key]
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key):
        self.live -= self.sizes.pop(key, 0)


def train(step, model, batch):
    model.zero_grad(set_to_none=True)
    step(model, batch).backward()


def flop_counter():
    """FLOPs of matrix products and attention; torch's own counter knows no attention on a CPU."""
    from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

    aten = torch.ops.aten
    mapping = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
        ),
    }
    return FlopCounterMode(display=False, custom_mapping=mapping)


def count(step, model, batch):
    """FLOPs (forward and backward, matrix products and attention), tokens through the LLM, peak bytes."""
    tokens = []
    hook = model.get_model().layers[0].register_forward_hook(lambda m, a, out: tokens.append(a[0].shape[:2].numel()))
    with flop_counter() as flops:
        train(step, model, batch)
    hook.remove()
    model.zero_grad(set_to_none=True)
    gc.collect()
    with Peak([*model.parameters(), *model.buffers(), *tree_iter(batch)]) as peak:
        train(step, model, batch)
    passes = len(tokens)
    return {"flops": flops.get_total_flops(), "tokens": sum(tokens), "llm_passes": passes, "peak_bytes": peak.peak}


def measure_time(steps, model, batch, rounds, device):
    """``{name: [seconds of each round]}``, all steps in each round, in an order drawn anew; without what finds the
    memory too full after others."""
    rng, times = random.Random(SEED), {name: [] for name in steps}
    for number in tqdm(range(rounds + 1), desc="rounds"):  # the first without a clock
        for name in rng.sample(list(times), len(times)):
            _wait(device)
            began = time.perf_counter()
            try:
                train(steps[name], model, batch)
            except torch.OutOfMemoryError:
                del times[name]
                continue
            _wait(device)
            times[name] += [time.perf_counter() - began] if number else []
    return times


def _wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def quartiles(values):
    ordered = sorted(values)
    return [round(ordered[round(q * (len(ordered) - 1))], 4) for q in (0.25, 0.5, 0.75)]


def matmul_peak(device, dtype):
    """FLOPs a second of a large matrix product, the best of several."""
    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        _wait(device)
        began = time.perf_counter()
        a @ b
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


def fake(model, batch):
    """The model and the batch with sizes in place of numbers, so that a 7B step takes seconds and no memory; as on a
    CPU, where attention is one operation, as it is on a GPU. Returns them and the mode to run under."""
    mode = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        for module in model.modules():
            for kind in (module._parameters, module._buffers):
                for name, tensor in kind.items():
                    if tensor is not None:
                        empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                        trained = tensor.requires_grad
                        kind[name] = torch.nn.Parameter(empty, trained) if kind is module._parameters else empty
    model.hacl_fused = True  # the self-check compares numbers
    return model, tree_map(mode.from_tensor, batch), mode


def count_all(args, steps, checkpointing, captions, mean):
    """`count` of each step from sizes alone."""
    model = make_model(args.shape, "meta", torch.bfloat16, checkpointing)
    batch = make_batch(args.shape, "cpu", torch.bfloat16, args.images, captions, mean)
    model, batch, mode = fake(model, batch)
    with mode:
        return {name: count(step, model, batch) for name, step in tqdm(steps.items(), desc="counting")}


def time_all(args, steps, checkpointing):
    """Seconds of each step and peak memory, on the device; None for what does not fit."""
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    model = make_model(args.shape, args.device, dtype, checkpointing)
    batch = make_batch(args.shape, args.device, dtype, args.images, args.captions, args.mean)
    losses, found = {}, {}
    for limit in limits() if args.device == "cuda" and checkpointing else ():
        few, layers = fewest_on_device(args, model, batch, limit), SHAPES[args.shape][0][2]
        name = f"C, {few} of {layers} layers recomputed"
        if few is not None and not any(known.startswith(name) for known in steps):
            steps = steps | {f"{name}, as fits {limit / 2**30:.0f} GiB": recomputing(our_step, few)}
    for name, step in steps.items():
        try:
            losses[name] = float(step(model, batch).detach())
            found[name] = {"peak_bytes": peak_memory(step, model, batch, args.device)}
            if args.device == "cuda":
                with flop_counter() as counter:
                    train(step, model, batch)
                found[name]["computed_flops"] = counter.get_total_flops()
        except torch.OutOfMemoryError:
            found[name] = None
            torch.cuda.empty_cache()
    ours = losses.get(OURS)
    for name, loss in losses.items():
        if name.startswith("C") and abs(loss - ours) > (1e-4 if dtype == torch.float32 else 0.05):
            raise SystemExit(f"{name} has the loss {loss}, C has {ours}: it is another step.")
    fitting = {name: steps[name] for name in steps if found[name]}
    times = measure_time(fitting, model, batch, args.rounds, args.device)
    found |= dict.fromkeys(fitting.keys() - times.keys())
    for name, seconds in times.items():
        found[name]["seconds"] = [round(s, 4) for s in seconds]
        if STOCK in times:
            found[name]["to_stock"] = quartiles([s / a for s, a in zip(seconds, times[STOCK])])
        if "computed_flops" in found[name]:
            share = found[name]["computed_flops"] / statistics.median(seconds) / args.peak
            found[name]["share_of_peak"] = round(share, 4)
    return found


def peak_memory(step, model, batch, device):
    """Bytes above model and batch."""
    model.zero_grad(set_to_none=True)
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        train(step, model, batch)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with Peak([*model.parameters(), *model.buffers(), *tree_iter(batch)]) as peak:
        train(step, model, batch)
    return peak.peak


def limits():
    """Bytes that a GPU has: this one, and the commonest card where this one has more."""
    total = torch.cuda.mem_get_info()[1]
    return sorted({min(CARDS[0] * 2**30, total), total})


@contextlib.contextmanager
def limited(limit):
    """Inside, PyTorch takes no more of the GPU than ``limit`` bytes, all but `RESERVE`, as ``auto`` does."""
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, (1 - RESERVE) * limit / total))
    torch.cuda.empty_cache()
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def fits(step, model, batch):
    try:
        train(step, model, batch)
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()


def fewest_on_device(args, model, batch, limit):
    """The fewest layers to recompute, to an eighth of them, with which C fits in so much; None: not even with all."""
    layers = SHAPES[args.shape][0][2]
    counts = range(0, layers + 1, max(layers // 8, 1))
    with limited(limit):
        return next((n for n in counts if fits(recomputing(our_step, n), model, batch)), None)


def parity(args):
    """How far the gradients of the shared pass are from those of separate passes, in float32 and in bfloat16, beside
    how far bfloat16 is from float32: norm of the difference by norm, over all that trains."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model = make_model(args.shape, args.device, torch.float32, checkpointing=True)
    batch = make_batch(args.shape, args.device, torch.float32, args.images, args.captions, args.mean)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        for fused_pass in (True, False):
            model.hacl_fused = fused_pass
            train(our_step, model, {**batch, "images": batch["images"].to(dtype)})
            grads = [p.grad.float().flatten() for p in model.parameters() if p.grad is not None]
            found[dtype, fused_pass] = torch.cat(grads)

    def apart(a, b):
        return ((found[a] - found[b]).norm() / found[b].norm()).item()

    full, half = torch.float32, torch.bfloat16
    return {
        "float32, shared against separate": apart((full, True), (full, False)),
        "bfloat16, shared against separate": apart((half, True), (half, False)),
        "bfloat16 against float32, shared": apart((half, True), (full, True)),
        "bfloat16 against float32, separate": apart((half, False), (full, False)),
    }


def largest_batch(args, steps, known, checkpointing):
    """Images a batch that fit the smaller of `limits`, to a multiple of eight. ``known``: peaks with args.images."""
    gc.collect()
    torch.cuda.empty_cache()
    model = make_model(args.shape, args.device, torch.bfloat16, checkpointing)
    limit = limits()[0]
    room, found = (1 - RESERVE) * limit - torch.cuda.memory_allocated(), {}
    for name, step in steps.items():
        if known[name] is None:
            continue

        def good(images, step=step):
            batch = make_batch(args.shape, args.device, torch.bfloat16, images, args.captions, args.mean)
            with limited(limit):
                return fits(step, model, batch)

        images = int(room / known[name]["peak_bytes"] * args.images) // 8 * 8  # memory grows with the images
        while images > 0 and not good(images):
            images -= 8
        while good(images + 8):
            images += 8
        found[name] = images
    return found


# --- fewer layers recomputed ------------------------------------------------------------------------------------------

CARDS, RESERVE = (80, 40, 24), 0.1  # GiB; the share left: the driver's, the allocator's gaps, what is not counted
OF_TRAINED = 16  # bytes for each number that trains, beside itself: gradient, and Adam in float32


def recomputing(step, layers):
    """A step with the first ``layers`` recomputed alone."""

    def limited(model, batch):
        llm = model.get_model()
        recompute(llm, layers)
        try:
            return step(model, batch)
        finally:
            recompute(llm, len(llm.layers))

    return limited


def by_hand(shape, batch, layers):
    """FLOPs and peak bytes of C with so many layers recomputed, from a few lines of arithmetic."""
    (D, inner, L, _, vocabulary), (H, tower_layers) = SHAPES[shape]
    B, width = batch["input_ids"].shape[0], batch["input_ids"].shape[1] + VISUAL  # EOS in place of the image's token
    rows, text = batch["texts"]["ids"].shape
    linear, attention = 2 * (4 * D * D + 3 * D * inner), 4 * D  # of a token; of a token and a column that it sees
    tokens = B * width
    # Forward and backward through weights that are frozen take one product each, attention two and five.
    of_layers = L * tokens * (2 * linear + 3.5 * attention * width)
    again = layers * tokens * (linear + attention * width)
    of_texts = L * rows * text * (linear + attention * text)
    tower = B * (tower_layers + 1) * (VISUAL + 1) * (24 * H * H + 4 * H * (VISUAL + 1))
    logits = 4 * D * vocabulary * B * (batch["input_ids"].shape[1] - 2)
    projector = B * VISUAL * (4 * H * D + 6 * D * D)
    # In bfloat16: the MLP's gate, its activation unless the layer is lean, and up; four products of attention; in
    # float32 both norms' inputs.
    lean = 0 < layers < L
    kept = 2 * ((2 if lean else 3) * inner + 4 * D) + 2 * 4 * D
    passing = (8 if lean else 6) * inner + 6 * D  # gradients in the MLP; rows and their sources; an activation
    peak = tokens * (layers * 2 * D + max(L - layers, 1) * kept + passing)
    return {"flops": of_layers + again + of_texts + tower + logits + projector, "peak_bytes": peak}


def count_layers(shape):
    """C, and others, with N layers recomputed: at 32 images for several N, and for each card and batch what N fits."""
    args, L = argparse.Namespace(shape=shape), SHAPES[shape][0][2]
    report = {"by_count": [], "fits": [], "layers": L}
    ours, texts_kept, stock = our_step, kept_step, stock_step_counted
    for args.images in (32, 16):
        model = make_model(shape, "meta", torch.bfloat16, True)
        batch = make_batch(shape, "cpu", torch.bfloat16, args.images, 1, MEAN_TOKENS)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        # All but the trained are held as they are.
        standing = sum(p.nbytes for p in model.parameters()) + OF_TRAINED * trained
        model, fake_batch, mode = fake(model, batch)
        known = {}

        def counted(step, layers, model=model, fake_batch=fake_batch, mode=mode, known=known):
            if (step, layers) not in known:
                with mode:
                    known[step, layers] = count(recomputing(step, layers), model, fake_batch)
            return known[step, layers]

        base = counted(stock, L)
        if args.images == 32:
            for layers in range(0, L + 1, L // 4):
                hand = by_hand(shape, batch, layers)
                row = {"recomputed": layers, "stock_flops": base["flops"], **counted(ours, layers), "by_hand": hand}
                report["by_count"].append(row)
        for card in CARDS:
            room = (1 - RESERVE) * card * 2**30 - standing
            for name, step in ((OURS, ours), ("T: C with every text kept on disk", texts_kept), (STOCK, stock)):
                if step is not ours and (args.images != 32 or card != CARDS[0]):
                    continue
                layers = fewest(lambda n, step=step: counted(step, n)["peak_bytes"], room, L)
                row = {"images": args.images, "card": card, "step": name, "recomputed": layers, "standing": standing}
                if layers is not None:
                    found = counted(step, layers)
                    row |= {"peak_bytes": found["peak_bytes"], "to_stock": found["flops"] / base["flops"]}
                report["fits"].append(row)
    report["measured"] = list(measure_by_hand())
    return report


MEASURED = (("small", 8), ("medium", 4), ("1b", 2))  # shapes and images


def measure_by_hand():
    """`by_hand` beside what steps that are computed take, on a CPU in bfloat16."""
    for shape, images in tqdm(MEASURED, desc="measuring"):
        L = SHAPES[shape][0][2]
        model = make_model(shape, "cpu", torch.bfloat16, True)
        batch = make_batch(shape, "cpu", torch.bfloat16, images, 1, MEAN_TOKENS)
        model.hacl_fused = True  # without the self-check, of which nothing is to be counted
        for layers in (0, L // 2, L):
            found = count(recomputing(our_step, layers), model, batch) | {"by_hand": by_hand(shape, batch, layers)}
            yield {"shape": shape, "images": images, "recomputed": layers, "layers": L, **found}


def fewest(peak, room, L):
    """The fewest layers whose ``peak`` is within ``room``; it falls by the same for each layer but the last."""
    if peak(L) > room:
        return None
    if peak(0) <= room:
        return 0
    a_layer = (peak(0) - peak(L - 1)) / (L - 1)
    guess = min(math.ceil((peak(0) - room) / a_layer), L - 1)
    while peak(guess) > room:
        guess += 1
    while guess and peak(guess - 1) <= room:
        guess -= 1
    return guess


def markdown_of_layers(report):
    made, L = report["provenance"], report["layers"]
    versions = ", ".join(f"{k} {v}" for k, v in made["versions"].items() if v)
    lines = ["# Fewer layers recomputed", "", f"`{made['command']}`, {versions}, commit {made['commit']}.", ""]
    lines += [
        "Counted from sizes at the 7B shape, as in step-cpu.md; but for the last table nothing was computed. "
        f"Stage 1, {VISUAL} visual tokens, one hallucinated caption, bfloat16. A is stock LLaVA's step with all {L} "
        "layers recomputed, as LLaVA trains. Where some are recomputed, the others are lean: they compute the "
        "activation in their MLP again, whose time is not counted here.",
        "",
        "## C at 32 images",
        "",
    ]

    def beside(row):
        hand = row["by_hand"]
        shares = [f"{hand[key] / row[key]:.3f}" for key in ("flops", "peak_bytes")]
        return shares[0], f"{row['peak_bytes'] / 2**20:,.0f}", shares[1]

    rows = []
    for row in report["by_count"]:
        rows.append([f"{row['recomputed']} of {L}", f"{row['flops'] / row['stock_flops']:.4f}", *beside(row)])
    head = ("recomputed", "FLOPs / A", "by hand / counted", "peak memory above weights, MiB", "by hand / counted")
    lines += [table(head, rows), "", "## The fewest that fit", ""]
    lines += [
        f"On one GPU, with weights and what Adam holds, and {RESERVE:.0%} of the card left for its driver, the "
        "allocator's gaps and what is not counted.",
        "",
    ]
    rows = []
    for row in report["fits"]:
        cells = [f"{row['card']} GiB", row["images"], row["step"], f"{row['standing'] / 2**30:.1f}"]
        if row["recomputed"] is None:
            rows.append((*cells, "does not fit", "", ""))
            continue
        cells += [f"{row['recomputed']} of {L}", f"{row['peak_bytes'] / 2**30:.1f}", f"{row['to_stock']:.4f}"]
        rows.append(cells)
    head = ("card", "images", "step", "held throughout, GiB", "recomputed", "peak above, GiB", "FLOPs / A")
    lines += [
        table(head, rows),
        "",
        "## The same arithmetic beside steps that were computed",
        "",
        "On a CPU, in bfloat16.",
        "",
    ]
    rows = []
    for row in report["measured"]:
        recomputed = f"{row['recomputed']} of {row['layers']}"
        rows.append([row["shape"], row["images"], recomputed, f"{row['flops'] / 1e12:.3f}", *beside(row)])
    head = ("shape", "images", "recomputed", "TFLOPs", "by hand / measured", "peak memory, MiB", "by hand / measured")
    return "\n".join([*lines, table(head, rows), ""])


# --- the report -------------------------------------------------------------------------------------------------------


def rows_of(found):
    """A Markdown table, each step against stock LLaVA's."""
    stock = found[STOCK]
    timed = any(row and "seconds" in row for row in found.values())
    counted = any(row and "flops" in row for row in found.values())
    shares = any(row and "share_of_peak" in row for row in found.values())
    head = ["step"] + ["time / A (quartiles)"] * timed + ["share of the matmul peak"] * shares
    head += ["FLOPs / A", "tokens through the LLM"] * counted
    head += ["peak memory / A", "peak memory, MiB"]
    rows = []
    for name, row in found.items():
        cells = [name]
        rows.append(cells)
        if row is None:
            cells += ["does not fit"] * (len(head) - 1)
            continue
        if timed:
            low, middle, high = row["to_stock"]
            cells.append(f"{middle:.3f} ({low:.3f} to {high:.3f})")
        if shares:
            cells.append(f"{row['share_of_peak']:.3f}")
        if counted:
            cells += [f"{row['flops'] / stock['flops']:.4f}", f"{row['tokens']:,}"]
        cells += [f"{row['peak_bytes'] / stock['peak_bytes']:.3f}", f"{row['peak_bytes'] / 2**20:,.0f}"]
    return table(head, rows)


def of_a_run(steps):
    """A paragraph: the mean step of the flags' defaults, whose contrast begins late."""
    if not all(steps.get(name) for name in (OURS, PROMPTED, RESTING)):
        return []
    share, found = PRESETS["default"]["start"], []
    for what, key, value in (("time", "to_stock", lambda quartiles: quartiles[1]), ("FLOPs", "flops", float)):
        if key in steps[OURS]:
            ours, prompted, resting, stock = (value(steps[name][key]) for name in (OURS, PROMPTED, RESTING, STOCK))
            mean = share * resting + (1 - share) * prompted
            found.append(f"{what} {mean / stock:.3f} of A, {mean / ours:.3f} of C")
    return ["", f"The defaults' mean step, {share:.0%} S and the others P: {'; '.join(found)}."]


def markdown(report):
    made = report["provenance"]
    versions = ", ".join(f"{k} {v}" for k, v in made["versions"].items() if v)
    lines = ["# What HACL costs a training step", "", f"`{made['command']}`, {versions}, commit {made['commit']}.", ""]
    old = report.get("timed")
    lines += [report["device"] + (f" (`{old['command']}`, commit {old['commit']})" if old else "") + ".", ""]
    for part in report["parts"]:
        lines += [f"## {part['title']}", "", part["note"], "", rows_of(part["steps"]), *of_a_run(part["steps"]), ""]
        if part.get("largest"):
            found = ", ".join(f"{k} {v}" for k, v in part["largest"].items())
            room = f"{1 - RESERVE:.0%} of {part['largest_in_gib']} GiB"
            lines += [f"Largest batch that fits, to a multiple of eight, in {room}: {found}.", ""]
    if report["sweep"]:
        note = "With gradient checkpointing; of B and C, to stock LLaVA's step."
        rows = []
        for row in report["sweep"]:
            a, b, c = (row["steps"][name]["flops"] for name in (STOCK, RELEASED, OURS))
            rows.append((row["captions"], row["mean"], f"{b / a:.3f}", f"{c / a:.4f}"))
        head = ("hallucinated captions an image", "mean tokens of a caption", "B / A", "C / A")
        lines += ["## FLOPs of other batches", "", note, "", table(head, rows), ""]
    return "\n".join(lines)


WIDEST = 2.8  # of the picture's axes


def draw(report, path):
    """A panel a part: what each step costs, to stock LLaVA's."""
    plt = pyplot()
    parts = report["parts"]
    figure, axes = plt.subplots(
        1, len(parts), figsize=(4.2 * len(parts), 4), squeeze=False, sharey=True, layout="tight"
    )
    # The axis is shared, and not every panel has all steps.
    names = [*dict.fromkeys(name for part in sorted(parts, key=lambda p: -len(p["steps"])) for name in part["steps"])]
    for axis, part in zip(axes[0], parts):
        steps = {k: v for k, v in part["steps"].items() if v}
        stock, at = steps[STOCK], [names.index(name) for name in steps]
        timed = "to_stock" in stock
        kinds = {"time": [row["to_stock"][1] for row in steps.values()]} if timed else {}
        for kind, key in (("FLOPs", "flops"), ("peak memory", "peak_bytes")):
            if key in stock:
                kinds[kind] = [row[key] / stock[key] for row in steps.values()]
        for k, (name, values) in enumerate(kinds.items()):
            places = [y + 0.4 * k - 0.2 for y in at]
            axis.barh(places, values, 0.38, color=COLOURS[k], label=name, hatch=("", "//")[k], edgecolor="white")
            for y, v in zip(places, values):
                box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
                axis.text(min(v + 0.02, WIDEST - 0.3), y, f"{v:.2f}", va="center", fontsize=7, bbox=box)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xlim(0, WIDEST)  # memory of layers that are not recomputed is several times stock's
        axis.set_xlabel("to stock LLaVA's step", fontsize=8)
        axis.set_title(part["title"], fontsize=8)
        axis.legend(fontsize=7, loc="upper right")
    axes[0][0].set_yticks(range(len(names)), names, fontsize=8)
    axes[0][0].invert_yaxis()
    save(figure, path)


def part_of(steps, device, checkpointing):
    """Those that are timed; on a GPU, whose time is dear, ours without each idea with checkpointing alone."""
    kept = device != "cuda" or checkpointing
    return {name: step for name, step in steps.items() if kept or "without:" not in name}


STOCK, RELEASED, OURS = "A: stock LLaVA", "B: HACL as released", "C: HACL here"
SWEEP = [(1, 14), (1, 28), (1, 56), (2, 28), (4, 28)]


def parsed():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="small", help="of the LLM that is timed (default: small)")
    parser.add_argument("--count", choices=SHAPES, default="7b", help="shape whose FLOPs are counted (default: 7b)")
    parser.add_argument("--images", type=int, help="of a batch that is timed (default: 3; on a GPU 32)")
    parser.add_argument("--captions", type=int, default=1, metavar="K", help="hallucinated ones an image (default: 1)")
    parser.add_argument("--mean", type=int, default=MEAN_TOKENS, help="tokens of a caption (default: %(default)s)")
    what = "visual tokens of an image, a square (default: %(default)s)"
    parser.add_argument("--visual", type=int, default=VISUAL, metavar="N", help=what)
    parser.add_argument("--rounds", type=int, default=9, help="(default: %(default)s)")
    parser.add_argument("--layers", action="store_true", help="count what fewer layers recomputed cost, and no more")
    parser.add_argument("--parity", action="store_true", help="compare gradients of --shape, and no more")
    parser.add_argument("--timed", action="store_true", help="count nothing")
    parser.add_argument("--counted", action="store_true", help="time nothing: what a file of that name has timed stays")
    parser.add_argument("--only", nargs="+", metavar="X", help="with --timed: steps whose names begin so, beside A")
    parser.add_argument("--name", help="of the results: step-NAME (default: cpu or cuda)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results", metavar="DIR")
    return parser.parse_args()


def main():
    args = parsed()
    globals()["VISUAL"] = args.visual
    args.output.mkdir(parents=True, exist_ok=True)  # now, not once all is measured
    if args.layers:
        report = count_layers(args.count) | {"provenance": provenance(seed=SEED)}
        write_json(args.output / "checkpointing.json", report)
        write_text(args.output / "checkpointing.md", markdown_of_layers(report))
        print(markdown_of_layers(report))
        return
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.images = args.images or (32 if args.device == "cuda" and not args.parity else 3)
    if args.parity:
        report = {"shape": args.shape, "images": args.images, "visual": VISUAL, "apart": parity(args)}
        report["device"] = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
        write_json(args.output / "parity.json", report | {"provenance": provenance(seed=SEED)})
        print(json.dumps(report["apart"], indent=1))
        return
    device = f"Timed on {torch.get_num_threads()} CPU threads, in float32"
    if args.device == "cuda":
        device = f"Timed on {torch.cuda.get_device_name()}, in bfloat16"
    peak = args.peak = matmul_peak(args.device, torch.bfloat16 if args.device == "cuda" else torch.float32)
    counted = dict(STEPS, **{STOCK: stock_step_counted})
    del counted[f"C without: {ONE_SPLICE}"]  # sizes alone do not follow LLaVA's loops

    timed = STEPS
    if args.only:
        timed = {name: step for name, step in STEPS.items() if name == STOCK or name.startswith(tuple(args.only))}
    report = {"device": device, "matmul_flops": peak, "parts": [], "sweep": []}
    path = args.output / f"step-{args.name or args.device}"
    if args.counted:
        before = json.loads(path.with_suffix(".json").read_text())
        timed_by = before.get("timed", before["provenance"])
        report |= {"device": before["device"], "parts": before["parts"][:2], "timed": timed_by}
    for checkpointing in () if args.counted else (True, False):
        words = "with" if checkpointing else "without"
        part = {
            "title": f"{args.shape}, {words} gradient checkpointing, timed",
            "note": f"{args.images} images of {VISUAL} visual tokens, {args.captions} hallucinated captions each, "
            f"captions of {args.mean} tokens on average; {args.rounds} rounds.",
            "steps": time_all(args, part_of(timed, args.device, checkpointing), checkpointing),
        }
        if args.device == "cuda" and checkpointing and not args.only:
            chosen = {name: STEPS[name] for name in (STOCK, RELEASED, OURS)}
            part["largest"] = largest_batch(args, chosen, part["steps"], checkpointing)
            part["largest_in_gib"] = round(limits()[0] / 2**30)
        report["parts"].append(part)
    args.shape, args.images = args.count, 32
    for checkpointing in () if args.timed else (True, False):
        words = "with" if checkpointing else "without"
        part = {
            "title": f"{args.count}, {words} gradient checkpointing, counted from sizes",
            "note": "32 images, otherwise the same. Nothing was computed: FLOPs of matrix products and attention, "
            "forward and backward, and the bytes of the tensors that live at once, in bfloat16.",
            "steps": count_all(args, counted, checkpointing, args.captions, args.mean),
        }
        report["parts"].append(part)
    for captions, mean in () if args.timed else SWEEP:
        chosen = {name: counted[name] for name in (STOCK, RELEASED, OURS)}
        steps = count_all(args, chosen, True, captions, mean)
        report["sweep"].append({"captions": captions, "mean": mean, "steps": steps})
    report["provenance"] = provenance(seed=SEED)
    write_json(path.with_suffix(".json"), report)
    write_text(path.with_suffix(".md"), markdown(report))
    draw(report, path.with_suffix(".png"))
    print(markdown(report))


if __name__ == "__main__":
    main()
