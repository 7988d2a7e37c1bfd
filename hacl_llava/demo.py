"""``hacl-llava demo``: stage 1 with HACL from nothing, the way a 7B run goes."""

import ast
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from .common.files import write_json
from .common.options import option
from .common.report import provenance, version
from .config import HaclConfig, HaclError

ROOT = Path(__file__).parents[1]
# The miniature's recipe: no heads and a fixed temperature; everything else is LLaVA-1.5's stage 1.
SETTINGS = {"weight": 1.0, "learnable_temperature": False, "negatives": "batch", "head_dim": 0}
BATCH = 32
LLM_STEPS, TOWER_STEPS, LOGGING_STEPS = 600, 400, 10


@dataclass
class DemoOptions:
    """stage 1 with HACL on a rendered miniature, from nothing, on a CPU

    Render images with captions and hallucinated captions, make a tiny LLM and vision tower, train a projector with HACL
    through DeepSpeed, and say what it learnt.
    """

    output: str = option("folder for everything made", "runs/demo")  # what an earlier demo left there is replaced
    images: int = option("training images", 6000)  # a tenth as many more are held out for the figures
    epochs: int = option("passes over them", 5)
    seed: int = option("of scenes, models and training", 0)
    processes: int = option("ranks for DeepSpeed", 1)


def run(options: DemoOptions) -> int:
    """Make data and models, train, measure before and after, say what came of it; returns 0, 1 if training failed."""
    output, images, seed = Path(options.output), options.images, options.seed
    epochs, processes = options.epochs, options.processes
    script, zero = ROOT / "scripts/pretrain_hacl.py", ROOT / "zero_configs/zero2.json"
    if not script.exists():
        raise HaclError(f"the demo runs {script.name} and {zero.name} of a checkout; {ROOT} is not one. Use make demo.")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before transformers is imported, here and in the run
    started = time.time()
    train_json = _make_everything(output, images, seed)
    stage1 = output / "llava-hacl-pretrain"
    shutil.rmtree(stage1, ignore_errors=True)
    before = _measure(output, None, seed)
    launcher = [Path(sys.executable).parent / "deepspeed", "--num_gpus", processes, "--master_port", free_port()]
    flags = {
        "deepspeed": zero,
        "model_name_or_path": output / "llm",
        "version": "plain",
        "data_path": train_json,
        "image_folder": output / "images",
        "vision_tower": output / "clip",
        "mm_projector_type": "mlp2x_gelu",
        "tune_mm_mlp_adapter": True,
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "output_dir": stage1,
        "num_train_epochs": epochs,
        "per_device_train_batch_size": max(1, BATCH // processes),
        "learning_rate": 6e-3,
        "weight_decay": 0.0,
        "warmup_ratio": 0.03,
        "lr_scheduler_type": "cosine",
        "save_strategy": "no",
        "logging_steps": LOGGING_STEPS,
        "model_max_length": 512,
        "lazy_preprocess": True,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": seed,
        **{f"hacl_{name}": value for name, value in SETTINGS.items()},
    }
    command = [str(x) for x in (*launcher, script, *(x for k, v in flags.items() for x in (f"--{k}", v)))]
    print(f"\n$ {shlex.join(command)}\n")
    steps = epochs * -(-images // BATCH)
    if status := _train(command, output / "train.log", steps):
        print(f"training ended with status {status}; the end of {output / 'train.log'}:", file=sys.stderr)
        print("\n".join((output / "train.log").read_text().splitlines()[-15:]), file=sys.stderr)
        return 1
    after = _measure(output, stage1 / "mm_projector.bin", seed)
    _report(output, stage1, before, after, command, seed, images, time.time() - started)
    return 0


def free_port() -> str:
    """A port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def _make_everything(output, images, seed):
    from .miniature import models, world

    heldout = max(BATCH, images // 10)
    print(f"Rendering {images} training and {heldout} held-out scenes, each with two hallucinated captions ...")
    shutil.rmtree(output / "images", ignore_errors=True)
    path = world.make_dataset(output, images, seed=seed, per_caption=2, name="train")
    world.make_dataset(output, heldout, seed=seed, per_caption=2, name="heldout")
    loss = models.make_llm(output / "llm", seed=seed, steps=LLM_STEPS, progress=True)
    seen = models.make_vision_tower(output / "clip", seed=seed, steps=TOWER_STEPS, progress=True)
    print(f"Tiny LLM: {loss:.2f} nats a token on captions. Tiny vision tower: {seen:.0%} of the cells named right.")
    return path


def _train(command, log, steps):
    """Run the launcher; its output goes to ``log``, a bar shows the steps with the parts of the loss."""
    with (
        open(log, "w", encoding="utf-8") as file,
        tqdm(total=steps, desc="stage 1 with HACL", unit="step") as bar,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process,
    ):
        for line in process.stdout:
            file.write(line)
            file.flush()
            if line.startswith("HACL "):
                bar.write(line.strip())
            elif line.startswith("{'loss'"):
                logs = {k: float(v) for k, v in ast.literal_eval(line.strip()).items()}
                names = {"lm": "loss_lm", "i2t": "loss_i2t", "t2i": "loss_t2i", "closer": "closer_to_true"}
                bar.set_postfix({k: f"{logs[v]:.2f}" for k, v in names.items() if v in logs})
                bar.update(min(LOGGING_STEPS, steps - bar.n))
        status = process.wait()
        if not status:
            bar.update(steps - bar.n)
    return status


def _measure(output, projector, seed):
    """HACL's figures on the held-out scenes, in batches of 100; with a fresh projector if ``projector`` is None."""
    import torch
    import transformers

    from .data import HaclCollator, HaclDataset
    from .model import HaclLlavaLlamaForCausalLM

    # isort: split
    from llava import conversation

    torch.manual_seed(seed)
    transformers.utils.logging.disable_progress_bar()
    model = HaclLlavaLlamaForCausalLM.from_pretrained(str(output / "llm"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(output / "llm"), use_fast=False, model_max_length=512)
    tokenizer.pad_token = tokenizer.unk_token
    conversation.default_conversation = conversation.conv_templates["plain"]
    arguments = types.SimpleNamespace(
        vision_tower=str(output / "clip"),
        mm_vision_select_layer=-2,
        mm_vision_select_feature="patch",
        pretrain_mm_mlp_adapter=projector and str(projector),
        mm_patch_merge_type="flat",
        mm_projector_type="mlp2x_gelu",
    )
    model.get_model().initialize_vision_modules(arguments)
    model.enable_hacl(HaclConfig(**SETTINGS), [tokenizer.eos_token_id])
    data_arguments = types.SimpleNamespace(
        is_multimodal=True,
        image_folder=str(output / "images"),
        image_processor=model.get_vision_tower().image_processor,
        image_aspect_ratio="square",
        mm_use_im_start_end=False,
    )
    data = HaclDataset(str(output / "heldout.json"), tokenizer, data_arguments)
    loader = torch.utils.data.DataLoader(data, batch_size=100, collate_fn=HaclCollator(tokenizer))
    model.eval()
    with torch.no_grad():
        for batch in loader:
            model(**batch)
    return {**model.hacl_metrics(), "images": len(data)}


ROWS = (
    ("loss_lm", "caption loss (nats a token)"),
    ("loss_i2t", "contrast, image to text"),
    ("loss_t2i", "contrast, text to image"),
    ("retrieval_accuracy", "caption found among 100"),
    ("closer_to_true", "closer to true than hallucinated"),
)


def _report(output, stage1, before, after, command, seed, images, seconds):
    summary = {"before": before, "after": after, "images": images, "seconds": round(seconds)}
    summary |= {**provenance(seed), "command": shlex.join(command)}
    summary["versions"]["deepspeed"] = version("deepspeed")
    write_json(output / "summary.json", summary)
    print(f"\nOn {after['images']} held-out scenes, with two hallucinated captions each (chance: 0.01 and 0.33):\n")
    print(f"{'':34}{'before':>9}{'after':>9}")
    for key, text in ROWS:
        print(f"{text:34}{before[key]:9.3f}{after[key]:9.3f}")
    print(
        "\nA miniature trained in two minutes shows that everything runs and learns; it is no claim about a 7B model.\n"
    )
    for path, text in (
        (stage1 / "mm_projector.bin", "the projector, as LLaVA's stage 2 takes it"),
        (stage1 / "hacl_head.safetensors", "temperature (and heads, where there are any)"),
        (stage1 / "trainer_state.json", "every logged step"),
        (output / "train.json", "the data: LLaVA's format, with hallucinated_captions"),
        (output / "train.log", "all that the launcher printed"),
        (output / "summary.json", "the figures above, seed, versions, command"),
    ):
        print(f"{str(path):52} {text}")
