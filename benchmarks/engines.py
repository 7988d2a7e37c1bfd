"""Steps of stage 1 as users run them: DeepSpeed, scripts/pretrain_hacl.py, an LLM of a 7B's shape with random weights.

    python benchmarks/engines.py                          on a GPU: plain, HACL, and HACL with fewer layers recomputed
    python benchmarks/engines.py --shape tiny --zero 2    on a CPU: shows that it runs

Seconds of a step are the times between the lines of the log; losses are of random weights, and only have to be finite.
Writes OUTPUT/engines.json; after each run engines.part.json, from which the same command goes on.
"""

import argparse
import ast
import json
import math
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import step
import torch
import transformers

from hacl_llava.common.files import write_json
from hacl_llava.common.report import provenance
from hacl_llava.demo import free_port
from hacl_llava.miniature import models, world

RUNS = {
    "plain": {"use_hacl": False},
    "hacl": {},
    "hacl, few layers recomputed": {"hacl_checkpoint_layers": "auto"},
}


def make(folder, shape, images, visual):
    """A language model, a vision tower of ``visual`` tokens and data."""
    (hidden, intermediate, layers, heads, vocabulary), (tower_hidden, tower_layers) = step.SHAPES[shape]
    models.make_tokenizer(folder / "llm")
    config = transformers.LlamaConfig(
        vocab_size=max(vocabulary, 256),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"), step._dtype(torch.bfloat16):
        torch.manual_seed(0)
        llm = transformers.LlamaForCausalLM(config)
    llm.generation_config = transformers.GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    llm.save_pretrained(folder / "llm")
    patches = math.isqrt(visual)
    models.make_vision_tower(folder / "clip", 0, 0, tower_hidden, tower_layers, size=14 * patches, patches=patches)
    world.make_dataset(folder, images)


def run(folder, args, zero, name):
    """Losses, seconds between the lines of the log, and the most memory of the GPU that was taken."""
    flags = {
        "deepspeed": step.ROOT / f"zero_configs/zero{zero}.json",
        "model_name_or_path": folder / "llm",
        "version": "plain",
        "data_path": folder / "train.json",
        "image_folder": folder / "images",
        "vision_tower": folder / "clip",
        "mm_projector_type": "mlp2x_gelu",
        "tune_mm_mlp_adapter": True,
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "bf16": True,
        "output_dir": folder / name.replace(" ", "-").replace(",", ""),
        "max_steps": args.steps,
        "per_device_train_batch_size": args.images,
        "gradient_checkpointing": True,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "logging_steps": 1,
        "model_max_length": 2048,
        "dataloader_num_workers": args.workers,
        "lazy_preprocess": True,
        "report_to": "none",
        "disable_tqdm": True,
        **RUNS[name],
    }
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", 1, "--master_port", free_port()]
    command = [*launcher, step.ROOT / "scripts/pretrain_hacl.py", *(x for k, v in flags.items() for x in (f"--{k}", v))]
    losses, times, said, memory, over = [], [], [], [0], threading.Event()
    watch = threading.Thread(target=_watch, args=(memory, over))
    watch.start()
    with subprocess.Popen(
        [str(x) for x in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=step.ROOT
    ) as process:
        for line in process.stdout:
            said.append(line)
            if line.startswith("{'loss'"):
                times.append(time.time())
                losses.append(float(ast.literal_eval(line.strip())["loss"]))
    over.set()
    watch.join()
    if process.returncode or len(losses) != args.steps or not all(map(math.isfinite, losses)):
        end = "".join(said[-30:])
        raise SystemExit(f"{name} ended with status {process.returncode} and the losses {losses}:\n{end}")
    found = {"losses": losses, "seconds": [round(b - a, 3) for a, b in zip(times[1:], times[2:])]}
    found["said"] = [line.strip() for line in said if line.startswith("HACL")]
    return found | ({"memory_mib": memory[0]} if memory[0] else {})


def _watch(memory, over):
    """The most that nvidia-smi says is taken, in MiB; without a GPU nothing."""
    while torch.cuda.is_available() and not over.wait(0.5):
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        taken = subprocess.run(query, capture_output=True, text=True).stdout.split()
        memory[0] = max(memory[0], *map(int, taken))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=step.SHAPES, default="7b", help="(default: %(default)s)")
    parser.add_argument("--zero", nargs="+", choices=("2", "3"), default=["2", "3"], help="stages (default: both)")
    parser.add_argument("--images", type=int, default=16, help="of a batch (default: %(default)s)")
    parser.add_argument("--visual", type=int, default=step.VISUAL, help="tokens of an image, a square")
    parser.add_argument("--steps", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, default=4, help="that read images (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=step.ROOT / "benchmarks/results/gpu", metavar="DIR")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    about = {"device": device, "shape": args.shape, "images": args.images, "visual": args.visual}
    file, whole = args.output / "engines.part.json", args.output / "engines.json"
    report = json.loads(file.read_text()) if file.exists() else about | {"runs": {}}
    if {k: report[k] for k in about} != about:
        raise SystemExit(f"{file} is of another device or size; give another --output.")
    wanted = [(zero, name) for zero in args.zero for name in RUNS if name not in report["runs"].get(f"ZeRO-{zero}", {})]
    with tempfile.TemporaryDirectory(prefix="hacl-") as folder:  # not "tmpt...": LLaVA looks for mpt in a path
        # One epoch: a new one starts its workers anew, which is no cost of a step.
        make(Path(folder), args.shape, max(args.images * args.steps, 64), args.visual)
        for zero, name in wanted:
            of_zero = report["runs"].setdefault(f"ZeRO-{zero}", {})
            of_zero[name] = found = run(Path(folder), args, zero, name)
            found["to_plain"] = round(
                statistics.median(found["seconds"]) / statistics.median(of_zero["plain"]["seconds"]), 3
            )
            write_json(file, report | {"provenance": provenance(0)})
            print(f"ZeRO-{zero}", name, found, flush=True)
    file.rename(whole)


if __name__ == "__main__":
    main()
