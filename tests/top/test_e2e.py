"""The real command lines: the scripts and the deepspeed launcher, LLaVA's own script after the patch, the demo.

A launcher costs a quarter of a minute, so it is started once for each promise that is the launcher's; what the ranks of
a run do is tested on `workers.Run`, which begins them in a moment."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import arguments
from workers import Command, Run, alone, stock_training, trained

from hacl_llava import cli
from hacl_llava.config import PRESETS, HaclConfig
from hacl_llava.demo import free_port

ROOT = Path(__file__).parents[2]
PARTS = {"loss_lm", "loss_i2t", "loss_t2i", "temperature", "retrieval_accuracy", "closer_to_true"}
pytestmark = pytest.mark.e2e


def run(*command, check=True, **env):
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, timeout=400, cwd=ROOT, env={**os.environ, **env}
    )
    if check:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def launch(processes, *command, **env):
    launcher = Path(sys.executable).parent / "deepspeed"
    return run(sys.executable, launcher, "--num_gpus", processes, "--master_port", free_port(), *command, **env)


def log_of(folder):
    return [x for x in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss" in x]


PROJECTOR = {
    "model.mm_projector.0.weight": [64, 64], "model.mm_projector.0.bias": [64],
    "model.mm_projector.2.weight": [64, 64], "model.mm_projector.2.bias": [64],
}  # fmt: skip


def check_stage1(said, folder, stage, heads="hacl_head 2,081, "):
    # DeepSpeed's engine holds the model: the line is printed from the object, not from the flag.
    line = re.search(r"HACL run: .*", said).group()
    assert f"engine DeepSpeedEngine ZeRO-{stage}, 2 ranks on cpu, fused passes" in line
    # 64 -> 64 -> 64 projector with biases; two heads 64 -> 16, and the temperature
    assert f"trained: {heads}mm_projector 8,320" in line
    log = log_of(folder)
    parts = [PARTS if x["hacl_scale"] else {"loss_lm"} for x in log]
    assert len(log) == 2 and log[-1]["hacl_scale"] and all(set(x) >= p for x, p in zip(log, parts))  # 32 images
    projector = torch.load(folder / "mm_projector.bin", weights_only=True)
    assert {k: list(v.shape) for k, v in projector.items()} == PROJECTOR
    assert (folder / "hacl_head.safetensors").exists()


@pytest.fixture
def of_scripts(mini, tmp_path):
    """The environment of pretrain_7b.sh and finetune_7b.sh, and flags behind theirs: two ranks of the miniature."""
    env = {
        "DATA": str(mini.folder), "JSON": str(mini.data), "IMAGES": str(mini.images), "LLM": str(mini.llm),
        "TOWER": str(mini.clip), "OUTPUT": str(tmp_path / "stage1"), "MODE": "lora",
        "PROJECTOR": str(tmp_path / "stage1/mm_projector.bin"),
    }  # fmt: skip
    return env, ("--tf32", "False", "--per_device_train_batch_size", "8", "--dataloader_num_workers", "1")


# As sitecustomize.py, of every Python that a run starts: the second rank dies in its third step.
DYING = """
import os, signal, time
from pathlib import Path

def dying(self, *args, **kwargs):
    if self.state.global_step == 2:
        Path(os.environ["MARKER"]).write_text(str(time.time()))
        if os.environ["FAULT"] == "raises":
            raise RuntimeError("the second rank has lost its way")
        os.kill(os.getpid(), signal.SIGKILL) if os.environ["FAULT"] == "killed" else os._exit(7)
    return step(self, *args, **kwargs)

if os.environ.get("RANK") == "1":
    from hacl_llava.trainer import HaclTrainer

    step, HaclTrainer.training_step = HaclTrainer.training_step, dying
"""


def alive(folder):
    """Processes with the folder on their command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in (process / "cmdline").read_bytes() and int(process.name) != os.getpid():
                found.append(int(process.name))
    return found


@pytest.mark.once
@pytest.mark.parametrize("fault", ["killed", *(pytest.param(x, marks=pytest.mark.slow) for x in ("raises", "exits"))])
def test_pretraining_script_under_the_launcher_ends_with_a_rank_that_dies(of_scripts, tmp_path, fault):
    (tmp_path / "sitecustomize.py").write_text(DYING)
    env, flags = of_scripts
    env |= {"FAULT": fault, "MARKER": str(tmp_path / "died"), "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env["LAUNCHER_ARGS"] = f"--num_gpus 2 --master_port {free_port()}"
    done = run("bash", "scripts/pretrain_7b.sh", *flags, "--per_device_train_batch_size", 4, check=False, **env)
    end, said = time.time(), done.stdout + done.stderr
    assert "engine DeepSpeedEngine ZeRO-2, 2 ranks on cpu, fused passes" in said, said[-3000:]
    assert said.count("'loss':") == 2  # that of two steps
    assert done.returncode != 0 and end - float((tmp_path / "died").read_text()) < 60
    if fault == "raises":
        assert "RuntimeError: the second rank has lost its way" in said
    else:  # such a death says nothing itself; the launcher does
        assert re.search(f"exits with return code = {7 if fault == 'exits' else -9}", said), said[-3000:]
    assert not (tmp_path / "stage1/mm_projector.bin").exists()
    until = time.time() + 60  # data workers of a rank that was killed look every five seconds whether it lives
    while alive(tmp_path) and time.time() < until:
        time.sleep(0.2)
    assert not alive(tmp_path)


@pytest.mark.distributed
def test_scripts_of_the_real_run_as_they_are(of_scripts, tmp_path):
    """What pretrain_7b.sh and finetune_7b.sh hand to the launcher, run on two ranks without it."""
    env, flags = of_scripts
    env |= launcher_that_prints(tmp_path)

    def train(script, stage):
        out = run("bash", f"scripts/{script}_7b.sh", *flags, **env).stdout.splitlines()
        assert out[0] == f"scripts/{script}_hacl.py"
        return trained(out[1:], tmp_path / f"{stage}.log", stage=stage, ranks=2)

    said = train("pretrain", 1)
    check_stage1(said, tmp_path / "stage1", 2, heads="")
    settings = HaclConfig(**PRESETS["default"]).to_dict()
    assert json.loads((tmp_path / "stage1/config.json").read_text())["hacl"] == settings
    assert "HACL preset default: --hacl_representation prompt --hacl_centre True --hacl_weight 0.05" in said
    env["OUTPUT"] = str(tmp_path / "stage2")
    train("finetune", 2)
    assert (tmp_path / "stage2/non_lora_trainables.bin").exists()
    done = run("bash", "scripts/finetune_7b.sh", check=False, **{**env, "MODE": "half"})
    assert done.returncode == 2 and "allowed are full, offload, lora, qlora" in done.stderr


def launcher_that_prints(folder):
    """An environment in which the launcher is a stand-in that prints what it is given, a line each."""
    (folder / "deepspeed").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (folder / "deepspeed").chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("config, negatives", [("zero3", "global"), ("zero3_offload", "batch")])
def test_other_engines_under_the_launcher(mini, tmp_path, config, negatives):
    """With offload, DeepSpeed compiles its own Adam first."""
    done = launch(
        2, "scripts/pretrain_hacl.py", "--deepspeed", f"zero_configs/{config}.json",
        *arguments(mini, tmp_path / "out", "--hacl_negatives", negatives, "--hacl_queue_size", "10", "--bf16", "True"),
    )  # fmt: skip
    check_stage1(done.stdout + done.stderr, tmp_path / "out", 3)


def test_script_for_several_nodes(tmp_path):
    """What it hands to the launcher: several nodes need ssh."""
    env = launcher_that_prints(tmp_path) | {"MASTER_PORT": "29511"}
    hostfile = tmp_path / "hostfile"
    done = run("bash", "scripts/pretrain_7b_multinode.sh", hostfile, check=False, **env)
    assert done.returncode == 2 and "cannot be read; a line is: NAME slots=GPUS" in done.stderr
    hostfile.write_text("# nothing\n")
    done = run("bash", "scripts/pretrain_7b_multinode.sh", hostfile, check=False, **env)
    assert done.returncode == 2 and "names no GPUs" in done.stderr
    hostfile.write_text("# two of eight\nnode1 slots=8\nnode2 slots=8\n")
    done = run("bash", "scripts/pretrain_7b_multinode.sh", hostfile, "--hacl_negatives", "batch", **env)
    out = " ".join(done.stdout.splitlines())
    assert out.startswith(f"--hostfile {hostfile} --master_port 29511 scripts/pretrain_hacl.py --deepspeed")
    assert out.endswith("--per_device_train_batch_size 16 --hacl_negatives batch")


def check_parity_and_step(folder):
    apart = json.loads((folder / "parity.json").read_text())["apart"]
    assert apart["float32, shared against separate"] < 1e-4 < apart["bfloat16, shared against separate"]
    assert apart["bfloat16, shared against separate"] < 2 * apart["bfloat16 against float32, separate"]
    (_, without) = json.loads((folder / "step-2.json").read_text())["parts"]
    assert all(row["to_stock"] for row in without["steps"].values())


@pytest.mark.once
def test_what_a_step_is_measured_with(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import step

    sizes = ["step.py", "--shape", "tiny", "--visual", "9", "--output", str(tmp_path)]
    for more in (["--parity"], ["--timed", "--images", "2", "--rounds", "1", "--name", "2"]):
        monkeypatch.setattr(sys, "argv", sizes + more)
        step.main()
    check_parity_and_step(tmp_path)


@pytest.mark.slow
def test_what_a_gpu_is_measured_with(tmp_path):
    """`make gpu`, at a shape for a CPU: each part leaves its file, and what is there is not made again."""
    tiny = {"SHAPE": "tiny", "VISUAL": "9", "IMAGES": "2", "ROUNDS": "1", "ZERO": "2", "OUT": str(tmp_path)}

    def run():
        command = [str(ROOT / "benchmarks/gpu.sh"), sys.executable]
        return subprocess.run(command, env=os.environ | tiny, capture_output=True, text=True, timeout=550)

    first = run()
    assert first.returncode == 0, first.stdout + first.stderr
    check_parity_and_step(tmp_path)
    runs = json.loads((tmp_path / "engines.json").read_text())["runs"]["ZeRO-2"]
    assert set(runs) == {"plain", "hacl", "hacl, few layers recomputed"} and all(r["seconds"] for r in runs.values())
    assert run().stdout.count("there already") == 3


@pytest.mark.once
def test_demo(tmp_path, monkeypatch, capfd):
    """The whole of `make demo`, with one epoch of 64 images on two ranks; what is not HACL's begins in forked ones."""
    from hacl_llava import demo

    train = demo._train

    def begin(what, command, log, *others):
        if "HACL" in what:
            return train(what, command, log, *others)
        if "eval" in command:
            return Command(tmp_path, *command[command.index("eval") :]).ends()[0]
        (at,) = (i for i, x in enumerate(command) if x.endswith("_hacl.py"))
        return Run(command[at + 1 :], log, stage=1 if "pretrain" in command[at] else 2, ranks=2).ends()

    monkeypatch.setattr(demo, "_train", begin)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")  # the demo sets both; not for other tests
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert demo.run(demo.DemoOptions(output=str(tmp_path), images=64, epochs=1, processes=2)) == 0
    out = capfd.readouterr().out
    assert "engine DeepSpeedEngine ZeRO-2, 2 ranks on cpu, fused passes" in out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["seed"] == 0 and summary["heldout"] == 32 and "--hacl_centre" in summary["commands"]["HACL"][0]
    assert set(summary["pope"]) == {f"POPE mini {split}" for split in ("random", "popular", "adversarial")}
    assert all(metrics["accuracy"]["b"] > 0 for metrics in summary["pope"].values())
    assert out.rstrip().endswith(summary["findings"][-1])
    losses = {arm: figures["loss_lm"]["value"] for arm, figures in summary["arms"].items()}
    assert len(set(losses.values())) > 1 and set(losses) == {"untrained", "plain", "HACL"}
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png") >= 1 and page.count('class="card"') == 12 and "<mark>" in page
    assert (tmp_path / "llava-HACL/mm_projector.bin").exists()


def test_llavas_own_script_after_the_patch(mini, tmp_path):
    import llava

    shutil.copytree(llava.__path__[0], tmp_path / "LLaVA/llava")
    assert cli.main(["patch", str(tmp_path / "LLaVA")]) == 0
    # train_mem.py asks for flash attention, which is not installed here: with HACL, sdpa takes its place.
    script = tmp_path / "LLaVA/llava/train/train_mem.py"
    env = {"PYTHONPATH": str(tmp_path / "LLaVA")}
    done = run(
        sys.executable, script, *arguments(mini, tmp_path / "on", "--use_cpu", "True", "--use_hacl", "True"), **env
    )
    assert "HACL run: engine" in done.stdout and "flash_attention_2 is replaced by sdpa" in done.stderr
    assert set(log_of(tmp_path / "on")[0]) >= PARTS
    # Without the flag it is stock LLaVA: nothing of HACL is written. (train_mem.py would want flash attention.)
    said = alone(stock_training, arguments(mini, tmp_path / "off", "--use_cpu", "True"), script.with_name("train.py"))
    assert not set(log_of(tmp_path / "off")[0]) & PARTS
    assert not (tmp_path / "off/hacl_head.safetensors").exists() and "'loss'" in said and "HACL" not in said


def stock_answers(checkpoints, image, want):
    """Tokens from LLaVA's own loading of each (path, base), whose projectors must be the tensors ``want``."""
    import hacl_llava.compat  # noqa: F401, I001
    from llava.mm_utils import process_images, tokenizer_image_token
    from llava.model.builder import load_pretrained_model
    from PIL import Image

    answers = []
    for path, base in checkpoints:
        tokenizer, model, processor, _ = load_pretrained_model(path, base, "llava-mini", device_map="cpu", device="cpu")
        assert type(model).__name__ == "LlavaLlamaForCausalLM"
        state = model.state_dict()
        for k, v in torch.load(want, weights_only=True).items():
            assert torch.equal(state[k], v.half()), k
        model.float()
        model.get_vision_tower().float()
        pixels = process_images([Image.open(image)], processor, model.config)
        ids = tokenizer_image_token("<image>\nWhat?", tokenizer, return_tensors="pt")[None]
        out = model.generate(ids, images=pixels, do_sample=False, max_new_tokens=5)
        answers.append(out[0, -5:].tolist())
    return answers


def test_projector_goes_into_stock_stage_two_and_stock_loading(mini, tmp_path, records):
    first, second = tmp_path / "llava-stage1", tmp_path / "llava-stage2"
    trained(arguments(mini, first, "--use_cpu", "True"), tmp_path / "log")
    # Stage 2 with stock LLaVA: the whole LLM, conversation template v1, starting from our projector.
    more = ("--use_cpu", "True", "--pretrain_mm_mlp_adapter", str(first / "mm_projector.bin"))
    argv = arguments(mini, second, *more, stock=True)
    argv[argv.index("--tune_mm_mlp_adapter") + 1] = "False"
    argv[argv.index("--version") + 1] = "v1"
    argv[argv.index("--learning_rate") + 1] = "0"  # so that what is saved is what was loaded
    alone(stock_training, argv)
    # Both results in stock load_pretrained_model, and an answer from each.
    checkpoints = ((str(first), str(mini.llm)), (str(second), None))
    a, b = alone(stock_answers, checkpoints, str(mini.images / records[0]["image"]), str(first / "mm_projector.bin"))
    assert a == b


@pytest.mark.distributed
def test_mistake_ends_every_rank_with_one_line(mini, tmp_path):
    (tmp_path / "data.json").write_text('[{"id": "x", "image": "nowhere.png"}]')
    run = Run(arguments(mini, tmp_path / "out", "--data_path", tmp_path / "data.json"), tmp_path / "log", ranks=2)
    assert run.ends() == 2
    assert run.said().count("record 0 (id 'x') has no 'conversations'") == 1
