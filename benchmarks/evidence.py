"""The miniature behind docs/evidence: stage 1 without and with HACL, stage 2 after each, evaluation, analysis, report.

    python benchmarks/evidence.py                      half an hour on two CPU cores; writes docs/evidence/
    python benchmarks/evidence.py --small --docs ''    the same way in a minute or two; its figures mean nothing (CI)

Everything goes through the commands a 7B run goes through: scripts/pretrain_hacl.py, scripts/finetune_hacl.py and
`hacl-llava eval`, `analyze`, `report`. What is there already (--output) is not made again.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hacl_llava.common.report import data_uri
from hacl_llava.miniature import models, world

ROOT = Path(__file__).parents[1]
COMMAND = Path(sys.executable).with_name("hacl-llava")
# A step with a learning rate of nearly 0 leaves the projector as it was made. It is there for the analysis alone.
RUNS = {
    "untrained": {"--use_hacl": False, "--max_steps": 1, "--learning_rate": 1e-30},
    "plain": {"--use_hacl": False},
    "hacl": {
        "--hacl_weight": 0.1,
        "--hacl_learnable_temperature": False,
        "--hacl_negatives": "batch",
        "--hacl_head_dim": 0,
    },
}


def run(*command, log=None):
    """Run a command of this project; its output goes to the screen, or to a log."""
    command = [str(x) for x in command]
    print("$", shlex.join(command), flush=True)
    with open(log or os.devnull, "w") as file:
        out = {"stdout": file, "stderr": subprocess.STDOUT} if log else {}
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, **out)


def train(script, output, data, folder, more):
    """One stage, in one process without DeepSpeed; nothing if it has ended before."""
    if (output / "trainer_state.json").exists():
        return
    flags = {
        "--model_name_or_path": folder / "llm",
        "--data_path": folder / data,
        "--image_folder": folder / "images",
        "--vision_tower": folder / "clip",
        "--mm_projector_type": "mlp2x_gelu",
        "--mm_vision_select_layer": -2,
        "--mm_use_im_start_end": False,
        "--mm_use_im_patch_token": False,
        "--output_dir": output,
        "--save_strategy": "no",
        "--weight_decay": 0.0,
        "--warmup_ratio": 0.03,
        "--lr_scheduler_type": "cosine",
        "--logging_steps": 10,
        "--model_max_length": 512,
        "--lazy_preprocess": True,
        "--report_to": "none",
        "--disable_tqdm": True,
        **more,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    run(script, *(x for pair in flags.items() for x in pair), log=f"{output}.log")


def copy_report(source, target):
    """Copy a report to docs/, its page as a report.md of HTML, which GitHub shows, with the pictures beside it."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors", "*.html"))
    page = re.search("<body>(.*)</body>", (source / "report.html").read_text(), re.DOTALL)[1]
    for picture in [*source.glob("*.png"), *source.glob("*.jpg")]:
        page = page.replace(data_uri(picture), picture.name)
    (target / "report.md").write_text("\n".join(filter(str.strip, page.split("\n"))) + "\n")  # an empty line ends HTML
    for path in [*target.glob("*.json"), *target.glob("*.md")]:  # no place of this machine
        path.write_text(path.read_text().replace(f"{ROOT}/", ""))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/evidence", help="folder for everything made (default: %(default)s)")
    parser.add_argument("--docs", default="docs/evidence", help="where report and pictures go; '' for nowhere")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="few images and steps: shows that it runs")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "TRANSFORMERS_VERBOSITY": "error"}
    folder, seed = (ROOT / args.output).resolve(), args.seed
    sizes = {"train": 6000, "instructions": 6000, "heldout": 600, "test": 500, "llm": 3000, "tower": 400}
    if args.small:
        sizes = {"train": 96, "instructions": 64, "heldout": 32, "test": 16, "llm": 4, "tower": 4}
    made = folder / "made"
    if not made.exists():
        world.make_dataset(folder, sizes["train"], seed, per_caption=2, name="train")
        world.make_dataset(folder, sizes["heldout"], seed, per_caption=4, name="heldout")
        world.make_instructions(folder, sizes["instructions"], seed)
        world.make_questions(folder, sizes["test"], seed)
        models.make_llm(folder / "llm", seed, sizes["llm"], questions=6, progress=True)
        models.make_vision_tower(folder / "clip", seed, sizes["tower"], progress=True)
        made.touch()

    stage1 = {"--version": "plain", "--tune_mm_mlp_adapter": True, "--per_device_train_batch_size": 64}
    stage1 |= {"--num_train_epochs": 8, "--learning_rate": 6e-3, "--seed": seed}
    stage2 = {"--version": "v1", "--per_device_train_batch_size": 32}
    stage2 |= {"--num_train_epochs": 12, "--learning_rate": 1e-3, "--warmup_ratio": 0.1, "--seed": seed}

    def one(name):
        projector, tuned = folder / name / "llava-pretrain", folder / name / "llava-v1"
        train("scripts/pretrain_hacl.py", projector, "train.json", folder, {**stage1, **RUNS[name]})
        if name == "untrained":
            return
        start = {"--pretrain_mm_mlp_adapter": projector / "mm_projector.bin"}
        train("scripts/finetune_hacl.py", tuned, "instructions.json", folder, {**stage2, **start})
        run(
            *(COMMAND, "eval", "--model", tuned, "--images", folder / "images"),
            *("--output", folder / name / "eval", "--batch-size", 64, "--max-new-tokens", 48),
            *("--pope", *(folder / f"mini_pope_{split}.json" for split in world.SPLITS)),
            *("--chair", folder / "instances.json", "--chair-synonyms", folder / "synonyms.txt"),
            log=folder / name / "eval.log",
        )

    with ThreadPoolExecutor(2) as pool:  # tiny models gain nothing from a second thread of their own
        list(pool.map(one, RUNS))
    run(
        *(COMMAND, "analyze", *(folder / name / "llava-pretrain" for name in RUNS)),
        *("--base", folder / "llm", "--data", folder / "heldout.json", "--images", folder / "images"),
        *(x for name in RUNS for x in ("--name", name)),
        "--output",
        folder / "analysis",
    )
    compared = [f"{name}={folder / name}" for name in ("plain", "hacl")]
    run(
        *(COMMAND, "report", *compared, f"analysis={folder / 'analysis'}"),
        *("--baseline", "plain", "--output", folder / "report"),
    )
    if args.docs:
        for source in (folder / "analysis", folder / "report"):
            copy_report(source, ROOT / args.docs / source.name)


if __name__ == "__main__":
    main()
