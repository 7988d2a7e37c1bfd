"""``hacl-llava demo``: both stages without and with HACL side by side, as a 7B run goes, and a page of what differs."""

import ast
import os
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .common.files import write_bytes, write_json, write_text
from .common.options import option
from .common.report import as_html, figure, provenance, thumbnail, version
from .config import EOS, HaclConfig, HaclError

ROOT = Path(__file__).parents[1]
BATCH, LOGGING_STEPS = 32, 10
# What HACL is trained with here; chosen on another seed than the default one (docs/evidence.md).
SETTINGS = EOS | {"learnable_temperature": False, "head_dim": 0, "centre": True, "weight": 0.1}
# The arms in the order in which they are started, two at a time: the longest first. A step with a learning rate of
# nearly 0 leaves the projector as both of the others find it.
ARMS = {
    "HACL": {f"hacl_{name}": value for name, value in SETTINGS.items()},
    "plain": {"use_hacl": False},
    "untrained": {"use_hacl": False, "max_steps": 1, "learning_rate": 1e-30},
}
SHOWN, COMPARED = ("untrained", "plain", "HACL"), ("plain", "HACL")
EPOCHS_2 = 2  # of stage 2, which is LLaVA's own: the LLM and a projector, on as many questions as stage 1 has images
# name, heading, better if higher (1) or lower (-1)
CAPTIONS = (
    ("loss_lm", "caption loss, nats a token", -1),
    ("made_up", "shapes made up, of those named (CHAIR_i)", -1),
    ("recall", "shapes found, of those there", 1),
    ("wrong_colour", "wrong colour, of shapes found", -1),
    ("wrong_count", "wrong count", -1),
    ("wrong_place", "wrong place", -1),
    ("prefers", "LM finds the true caption likelier than a hallucinated one", 1),
)
REPRESENTATIONS = (
    ("image_to_text_r1", "the image's nearest caption is its own", 1),
    ("text_to_image_r1", "the caption's nearest image is its own", 1),
    ("closer_to_true", "image closer to true than to hallucinated caption", 1),
    ("modality_gap", "distance between centroids of images and captions", -1),
)
POPE = (("accuracy", "right", 1), ("f1", "F1", 1), ("yes_ratio", 'answers "yes"', 0))
HALLUCINATED, SAMPLES = 2, 12  # hallucinated captions an image; scenes on the page


@dataclass
class DemoOptions:
    """LLaVA's two stages without and with HACL side by side, on a rendered miniature and a CPU

    Render images with captions and hallucinated captions, train two projectors for a small LLM through DeepSpeed, plain
    and with HACL, from the same seed, data and order, then each with the LLM as LLaVA's stage 2 does, and write a page
    of what differs on scenes held out: captions, representations, and answers to POPE's questions.
    """

    output: str = option("folder for everything made", "runs/demo")  # what an earlier demo left there is replaced
    images: int = option("training images", 6000)  # a tenth as many more are held out for the figures
    epochs: int = option("passes over them in stage 1", 4)
    seed: int = option("of scenes and training", 0)
    processes: int = option("ranks for DeepSpeed, of each of the two", 1)


def run(options: DemoOptions) -> int:
    """Make data, train, measure, write the page, say what came of it; returns 0, 1 if training failed.

    Raises:
        HaclError: this is not a checkout. ImportError: the extra [plot] is missing.
    """
    from .evaluation import figures

    script = ROOT / "scripts/pretrain_hacl.py"
    if not script.exists():
        raise HaclError(f"the demo runs scripts/{script.name} of a checkout; {ROOT} is not one. Use make demo.")
    figures.need()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before transformers is imported, here and in the runs
    os.environ["OMP_NUM_THREADS"] = "1"  # small models gain nothing from more
    started, output = time.time(), Path(options.output)
    heldout = _make_data(output, options)
    commands = {arm: [_stage_1(output, options, arm)] for arm in ARMS}
    for arm in COMPARED:
        commands[arm] += [_stage_2(output, options, arm), _eval(output, arm)]
        for command in commands[arm]:
            print(f"\n$ {shlex.join(command)}")
    print(flush=True)
    lock, found = threading.Lock(), {}

    def one(arm):
        position, (stage_1, *others) = list(ARMS).index(arm), commands[arm]
        an_epoch = -(-options.images // BATCH)
        log, steps = output / f"{arm}.log", options.epochs * an_epoch if others else None
        if status := _train(arm, stage_1, log, steps, position):
            return status
        with lock:  # on one core, while the other arm still trains
            found[arm] = measure(output / f"llava-{arm}", output, heldout)
        for name, command, steps in zip(("stage 2", "POPE"), others, (EPOCHS_2 * an_epoch, None)):
            if status := _train(f"{arm}, {name}", command, log, steps, position):
                return status
        return 0

    with ThreadPoolExecutor(2) as pool:
        statuses = dict(zip(ARMS, pool.map(one, ARMS)))
    if failed := {arm: status for arm, status in statuses.items() if status}:
        for arm, status in failed.items():
            print(f"training {arm} ended with status {status}; the end of {output / arm}.log:", file=sys.stderr)
            print("\n".join((output / f"{arm}.log").read_text().splitlines()[-15:]), file=sys.stderr)
        return 1
    summary = _compare(output, heldout, found, options.seed)
    summary |= {"images": options.images, "epochs": options.epochs, "batch": BATCH, "hacl": SETTINGS}
    summary |= {**provenance(options.seed), "commands": {arm: [*map(shlex.join, of)] for arm, of in commands.items()}}
    summary["versions"]["deepspeed"] = version("deepspeed")
    summary["seconds"] = round(time.time() - started)
    _write(output, summary)
    return 0


def free_port() -> str:
    """A port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def _make_data(output, options):
    from .evaluation.representations import sample_records
    from .miniature import pretrained, world

    count = max(BATCH, options.images // 10)
    print(f"Rendering {options.images} training and {count} held-out scenes, each with two hallucinated captions ...")
    made = ["images", "texts", *(f"llava-{arm}" for arm in ARMS)]
    for name in made + [f"{name}-{arm}" for arm in COMPARED for name in ("stage2", "eval")]:
        shutil.rmtree(output / name, ignore_errors=True)
    for arm in ARMS:
        (output / f"{arm}.log").unlink(missing_ok=True)
    world.make_dataset(output, options.images, seed=options.seed, per_caption=HALLUCINATED, name="train")
    path = world.make_dataset(output, count, seed=options.seed, per_caption=HALLUCINATED, name="heldout")
    world.make_instructions(output, options.images, seed=options.seed)
    world.make_questions(output, count, seed=options.seed)
    pretrained.copy(output)
    return sample_records(path, count, options.seed)[0]


def _stage_1(output, options, arm):
    flags = {
        "version": "plain",
        "data_path": output / "train.json",
        "tune_mm_mlp_adapter": True,
        "output_dir": output / f"llava-{arm}",
        "num_train_epochs": options.epochs,
        "learning_rate": 3e-3,
        "hacl_text_cache": output / "texts",
        **ARMS[arm],
    }
    return _launch("pretrain_hacl.py", output, options, flags)


def _stage_2(output, options, arm):
    flags = {
        "version": "v1",
        "data_path": output / "instructions.json",
        "pretrain_mm_mlp_adapter": output / f"llava-{arm}/mm_projector.bin",
        "output_dir": output / f"stage2-{arm}",
        "num_train_epochs": EPOCHS_2,
        "learning_rate": 1e-3,
    }
    return _launch("finetune_hacl.py", output, options, flags)


def _eval(output, arm):
    from .miniature.world import SPLITS

    command = [sys.executable, "-m", "hacl_llava.cli", "eval", "--model", output / f"stage2-{arm}"]
    command += ["--images", output / "images", "--output", output / f"eval-{arm}", "--conv", "v1"]
    command += ["--device", "cpu", "--batch-size", 64, "--pope"]
    return [str(x) for x in (*command, *(output / f"mini_pope_{split}.json" for split in SPLITS))]


def _launch(script, output, options, flags):
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", options.processes]
    flags = {
        "deepspeed": ROOT / "zero_configs/zero2.json",
        "model_name_or_path": output / "llm",
        "image_folder": output / "images",
        "vision_tower": output / "clip",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "per_device_train_batch_size": max(1, BATCH // options.processes),
        "weight_decay": 0.0,
        "warmup_ratio": 0.03,
        "lr_scheduler_type": "cosine",
        "save_strategy": "no",
        "logging_steps": LOGGING_STEPS,
        "model_max_length": 512,
        "lazy_preprocess": True,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": options.seed,
        **flags,
    }
    command = [*launcher, "--master_port", free_port(), ROOT / "scripts" / script]
    return [str(x) for x in (*command, *(x for k, v in flags.items() for x in (f"--{k}", v)))]


def _train(what, command, log, steps, position):
    """Run the launcher; its output goes to ``log``, a bar shows the steps with the parts of the loss."""
    with (
        open(log, "a", encoding="utf-8") as file,
        tqdm(total=steps, desc=f"{what:15}", unit="step", position=position, disable=steps is None) as bar,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process,
    ):
        for line in process.stdout:
            file.write(line)
            file.flush()
            if steps and line.startswith("HACL "):
                bar.write(line.strip())
            elif steps and line.startswith("{'loss'"):
                logs = {k: float(v) for k, v in ast.literal_eval(line.strip()).items()}
                logs.setdefault("loss_lm", logs["loss"])
                names = {"lm": "loss_lm", "i2t": "loss_i2t", "t2i": "loss_t2i", "closer": "closer_to_true"}
                bar.set_postfix({k: f"{logs[v]:.2f}" for k, v in names.items() if v in logs})
                bar.update(min(LOGGING_STEPS, steps - bar.n))
        status = process.wait()
        if steps and not status:
            bar.update(steps - bar.n)
    return status


# --- figures ----------------------------------------------------------------------------------------------------------


def measure(checkpoint: Path, folder: Path, items: Sequence[Any]) -> tuple[Any, list[str], list[dict[str, Any]]]:
    """What a projector makes of scenes held out.

    Args:
        checkpoint: what stage 1 wrote. folder: has llm and images. items: `representations.Item` of the scenes.

    Returns:
        (`Representations`, a caption of each scene, and what each adds to the sums that `CAPTIONS` are made from).
    """
    import torch

    from .checkpoints.load import load_pretrained
    from .evaluation import captions, representations
    from .miniature import judge

    torch.set_num_threads(1)
    loaded = load_pretrained(checkpoint, folder / "llm", device="cpu", dtype="float32")
    how = HaclConfig(**SETTINGS)
    found = representations.extract(loaded, items, folder / "images", how, batch_size=100)
    extractor = representations.Extractor(loaded, how)
    before = captions.embeds_of(extractor, folder / "images", items, 100)
    said = captions.greedy(extractor, before, 100)
    likely, tokens = captions.likelihoods(extractor, [[item.caption, *item.hallucinated] for item in items], before)
    rows = []
    for item, text, (true, *others), (length, *_) in zip(items, said, likely, tokens):
        counts = {**judge.counts(text, item.caption), "nll": -true, "tokens": length}
        counts |= {"pairs": len(others), "prefers": sum(true > other for other in others)}
        rows.append({"id": item.index, "image": item.image, "counts": counts})
    return found, said, rows


def _compare(output, items, found, seed):
    """Figures of all arms, the differences of HACL from plain, pictures and sample scenes, as summary.json has them."""
    from .common import statistics
    from .evaluation import figures, measures
    from .evaluation.runs import compare, read_run, tasks_of
    from .miniature import judge

    space, spaces = "centred", {"llm": "the LLM's space", "centred": "the LLM's space, centred"}
    analysis = measures.analyse(SHOWN, [found[arm][0] for arm in SHOWN], items, seed)
    pictures = figures.draw(output, [found[arm][0] for arm in SHOWN], analysis, spaces, ["pca"], seed)
    metrics = {
        "loss_lm": lambda s: statistics.ratio(s["nll"], s["tokens"]),
        **judge.MEASURES,
        "prefers": lambda s: statistics.ratio(s["prefers"], s["pairs"]),
    }
    rows = {arm: found[arm][2] for arm in SHOWN}
    arms = {arm: statistics.summarise(metrics, rows[arm], seed=seed) for arm in SHOWN}
    for model in analysis["models"]:
        arms[model["name"]] |= model["spaces"][space]["measures"] | _gap(model)
        arms[model["name"]]["closer_to_true_by_kind"] = model["spaces"][space]["closer_to_true_by_kind"]
    evaluated = [read_run(arm, output / f"eval-{arm}") for arm in COMPARED]
    pope = {task: compare(*evaluated, task, seed)["metrics"] for task in tasks_of(evaluated)}
    difference = statistics.paired(metrics, rows["HACL"], rows["plain"], seed=seed)
    (compared,) = (x for x in analysis["comparisons"] if (x["first"], x["second"]) == ("plain", "HACL"))
    difference |= compared["spaces"][space]["measures"] | _gap(compared)
    samples = []
    for number, n in enumerate(statistics.sample(range(len(items)), SAMPLES, seed), 1):
        picture = f"scene-{number:02}.jpg"
        write_bytes(output / picture, thumbnail(output / "images" / items[n].image, 192))
        said = {arm: found[arm][1][n] for arm in SHOWN}
        samples.append({"picture": picture, "image": items[n].image, "true": items[n].caption, "said": said})
    return {
        "heldout": len(items), "arms": arms, "difference": difference, "pope": pope,
        "findings": findings(difference, pope), "figures": pictures, "samples": samples,
    }  # fmt: skip


def _gap(found):
    """The modality gap as it is before centring, which leaves none."""
    return {"modality_gap": found["spaces"]["llm"]["measures"]["modality_gap"]}


def findings(
    difference: Mapping[str, Mapping[str, Any]], pope: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> list[str]:
    """What the differences of HACL from plain carry, in sentences: answers after stage 2, representations, captions.

    Args:
        difference: {name: {"difference", "interval"}}; what an interval does not set apart from 0 is called none.
        pope: {task: {metric: the same}}.
    """
    lines, right = [], {task: metrics["accuracy"] for task, metrics in pope.items()}
    asked = [(task, f"right answers to {task}", 1) for task in right]
    parts = ("After stage 2", asked), ("Representations", REPRESENTATIONS), ("Captions", CAPTIONS)
    for title, rows in parts:
        verdicts = {"better": [], "worse": [], "no difference beyond its interval": []}
        for name, heading, way in rows:
            low, high = (right if rows is asked else difference)[name]["interval"]
            sign = 1 if low > 0 else -1 if high < 0 else 0
            verdict = "better" if sign == way else "worse" if sign == -way else "no difference beyond its interval"
            verdicts[verdict].append(heading.split(",")[0])
        said = (f"{verdict}: {', '.join(names)}" for verdict, names in verdicts.items() if names)
        lines.append(f"{title}, HACL against plain: {'; '.join(said)}.")
    return lines


def _write(output, summary):
    from .miniature import judge

    write_json(output / "summary.json", summary)
    samples = [
        {**x, "said": {arm: judge.marked(text, x["true"]) for arm, text in x["said"].items()}}
        for x in summary["samples"]
    ]
    page = {**summary, "samples": samples, "title": "HACL in miniature: LLaVA's two stages without and with it"}
    page |= {"shown": SHOWN, "rows": [*CAPTIONS, *REPRESENTATIONS], "hallucinated": HALLUCINATED, "answers": POPE}
    write_text(output / "report.html", as_html("demo.html.j2", page, output))
    print("\n\nPOPE's questions after stage 2; differences with 95 % intervals over scenes:\n")
    print(f"{'':69}{'plain':>8}{'HACL':>8}  HACL - plain")
    for task, metrics in summary["pope"].items():
        for name, heading, _ in POPE:
            a, b = (f"{metrics[name][x]:.3f}" for x in "ab")
            print("{:69}{:>8}{:>8}  {}".format(f"{task}: {heading}", a, b, figure(metrics[name], "difference")))
    print(f"\nAfter stage 1, on {summary['heldout']} other scenes held out:\n")
    print(f"{'':59}{'untrained':>10}{'plain':>8}{'HACL':>8}  HACL - plain")
    for name, heading, _ in (*CAPTIONS, *REPRESENTATIONS):
        values = (f"{summary['arms'][arm][name]['value']:.3f}" for arm in SHOWN)
        print("{:59}{:>10}{:>8}{:>8}  {}".format(heading, *values, figure(summary["difference"][name], "difference")))
    print()
    for path, text in (
        (output / "report.html", "all of this as a page, with Figure 1 and sample scenes"),
        (output / "stage2-HACL", "the model after stage 2; hacl-llava chat talks to it"),
        (output / "summary.json", "the figures, seed, versions, commands"),
        (
            output / "llava-HACL/mm_projector.bin",
            "the projector, as LLaVA's stage 2 takes it",
        ),
        (output / "llava-HACL/trainer_state.json", "every logged step"),
        (output / "train.json", "the data: LLaVA's format, with hallucinated_captions"),
        (output / "HACL.log", "all that the launcher printed; plain.log likewise"),
    ):
        print(f"{str(path):40} {text}")
    print(f"\n{summary['seconds']} seconds. One training run each, of a miniature: no claim about a 7B model.")
    print("\n".join(summary["findings"]))
