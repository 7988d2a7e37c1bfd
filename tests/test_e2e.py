"""The real command lines: the deepspeed launcher, LLaVA's own script after the patch, the way of the projector."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import arguments

from hacl_llava.demo import free_port

ROOT = Path(__file__).parent.parent
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


@pytest.mark.distributed
@pytest.mark.parametrize(
    "config, stage, negatives", [("zero2", 2, "own"), ("zero3", 3, "global"), ("zero3_offload", 3, "batch")]
)
def test_deepspeed_trains_on_two_processes(mini, tmp_path, config, stage, negatives):
    done = launch(
        2, "scripts/pretrain_hacl.py", "--deepspeed", f"zero_configs/{config}.json",
        *arguments(mini, tmp_path / "out", "--hacl_negatives", negatives, "--hacl_queue_size", "10", "--bf16", "True"),
    )  # fmt: skip
    # DeepSpeed's engine holds the model: the line is printed from the object, not from the flag.
    line = re.search(r"HACL run: .*", done.stdout + done.stderr).group()
    assert f"engine DeepSpeedEngine ZeRO-{stage}, 2 ranks on cpu, fused passes" in line
    # 64 -> 64 -> 64 projector with biases; two heads 64 -> 16, and the temperature
    assert "trained: hacl_head 2,081, mm_projector 8,320" in line
    log = log_of(tmp_path / "out")
    assert len(log) == 2 and all(set(x) >= PARTS for x in log)  # 32 images, 8 a rank
    projector = torch.load(tmp_path / "out/mm_projector.bin", weights_only=True)
    assert {k: list(v.shape) for k, v in projector.items()} == {
        "model.mm_projector.0.weight": [64, 64], "model.mm_projector.0.bias": [64],
        "model.mm_projector.2.weight": [64, 64], "model.mm_projector.2.bias": [64],
    }  # fmt: skip
    assert (tmp_path / "out/hacl_head.safetensors").exists()


@pytest.mark.distributed
def test_ranks_stay_in_step_on_mixed_records(mini, tmp_path, records):
    """Text-only batches beside image batches, records without hallucinated captions, a last batch that is not full,
    accumulation and worker processes: under ZeRO-3 a rank that ran one pass less would hang the other."""
    rows = []
    for i, record in enumerate(records[:27]):
        row = {k: v for k, v in record.items() if k != "hallucinated_captions" or i % 3}
        if i % 4 == 0:
            del row["image"]
            row["conversations"] = [{"from": "human", "value": "Hello."}, row["conversations"][1]]
        rows.append(row)
    (tmp_path / "mixed.json").write_text(json.dumps(rows))
    done = launch(
        2, "scripts/pretrain_hacl.py", "--deepspeed", "zero_configs/zero3.json",
        *arguments(mini, tmp_path / "out", "--data_path", tmp_path / "mixed.json", "--hacl_negatives", "global"),
        *("--group_by_modality_length", "True", "--per_device_train_batch_size", "3", "--bf16", "True"),
        *("--gradient_accumulation_steps", "2", "--dataloader_num_workers", "2", "--hacl_queue_size", "7"),
    )  # fmt: skip
    assert "27 records, 20 with an image, 18 with hallucinated captions" in done.stdout
    assert len(log_of(tmp_path / "out")) >= 2
    assert (tmp_path / "out/mm_projector.bin").exists()


@pytest.mark.once
def test_script_of_the_real_run_as_it_is(mini, tmp_path):
    """scripts/pretrain_7b.sh with the miniature's paths; on a CPU without tf32."""
    env = {
        "DATA": str(mini.folder), "JSON": str(mini.data), "LLM": str(mini.llm), "TOWER": str(mini.clip),
        "OUTPUT": str(tmp_path / "out"), "LAUNCHER_ARGS": f"--num_gpus 1 --master_port {free_port()}",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    run("bash", "scripts/pretrain_7b.sh", "--tf32", "False", "--per_device_train_batch_size", "8", **env)
    assert (tmp_path / "out/mm_projector.bin").exists()
    assert json.loads((tmp_path / "out/config.json").read_text())["hacl"]["queue_size"] == 16384


def test_script_for_several_nodes(tmp_path):
    """What it hands to the launcher (a stand-in here, which prints it: several nodes need ssh)."""
    (tmp_path / "deepspeed").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "deepspeed").chmod(0o755)
    env = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "MASTER_PORT": "29511"}
    hostfile = tmp_path / "hostfile"
    done = run("bash", "scripts/pretrain_7b_multinode.sh", hostfile, check=False, **env)
    assert done.returncode == 2 and "cannot be read; a line is: NAME slots=GPUS" in done.stderr
    hostfile.write_text("# nothing\n")
    done = run("bash", "scripts/pretrain_7b_multinode.sh", hostfile, check=False, **env)
    assert done.returncode == 2 and "names no GPUs" in done.stderr
    hostfile.write_text("# two of eight\nnode1 slots=8\nnode2 slots=8\n")
    out = run("bash", "scripts/pretrain_7b_multinode.sh", hostfile, "--hacl_negatives", "batch", **env).stdout
    assert out.startswith(f"--hostfile {hostfile} --master_port 29511 scripts/pretrain_hacl.py --deepspeed")
    assert out.rstrip().endswith("--per_device_train_batch_size 16 --hacl_negatives batch")


@pytest.mark.once
def test_demo(tmp_path):
    cli = Path(sys.executable).parent / "hacl-llava"
    done = run(sys.executable, cli, "demo", "--output", tmp_path, "--images", 64, "--epochs", 1, "--processes", 2)
    assert "engine DeepSpeedEngine ZeRO-2, 2 ranks on cpu, fused passes" in done.stdout
    assert re.search(r"closer to true than hallucinated +0\.\d+ +0\.\d+", done.stdout)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["seed"] == 0 and summary["after"]["images"] == 32 and "--hacl_negatives" in summary["command"]
    assert summary["after"]["loss_lm"] != summary["before"]["loss_lm"]
    assert (tmp_path / "llava-hacl-pretrain/mm_projector.bin").exists()


def test_help_of_the_entry_point_through_the_launcher():
    done = launch(1, "scripts/pretrain_hacl.py", "--help")
    assert "--hacl_weight FLOAT" in done.stdout and "deepspeed scripts/pretrain_hacl.py" in done.stdout


def test_module_door_and_help_all(mini, tmp_path):
    # An installed package has no scripts/: the launcher takes the module.
    out = launch(1, "--module", "hacl_llava.train", *arguments(mini, tmp_path / "out", "--use_cpu", "True"))
    assert "HACL run: engine" in out.stdout and (tmp_path / "out/hacl_head.safetensors").exists()
    text = run(sys.executable, "-m", "hacl_llava.train", "--help_all").stdout
    assert "--hacl_queue_size" in text and "--learning_rate" in text and "--warmup_ratio" in text


def test_llavas_own_script_after_the_patch(mini, tmp_path):
    import llava

    shutil.copytree(llava.__path__[0], tmp_path / "LLaVA/llava")
    run(sys.executable, "-m", "hacl_llava.cli", "patch", tmp_path / "LLaVA")
    # train_mem.py asks for flash attention, which is not installed here: with HACL, sdpa takes its place.
    script = tmp_path / "LLaVA/llava/train/train_mem.py"
    env = {"PYTHONPATH": str(tmp_path / "LLaVA")}
    done = run(
        sys.executable, script, *arguments(mini, tmp_path / "on", "--use_cpu", "True", "--use_hacl", "True"), **env
    )
    assert "HACL run: engine" in done.stdout and "flash_attention_2 is replaced by sdpa" in done.stderr
    assert set(log_of(tmp_path / "on")[0]) >= PARTS
    # Without the flag it is stock LLaVA: nothing of HACL is written. (train_mem.py would want flash attention.)
    plain = "import llava.train.train as t; t.train()"
    done = run(sys.executable, "-c", plain, *arguments(mini, tmp_path / "off", "--use_cpu", "True"), **env)
    assert not set(log_of(tmp_path / "off")[0]) & PARTS
    assert not (tmp_path / "off/hacl_head.safetensors").exists() and "HACL" not in done.stdout


def test_projector_goes_into_stock_stage_two_and_stock_loading(mini, tmp_path, records):
    run(sys.executable, "scripts/pretrain_hacl.py", *arguments(mini, tmp_path / "llava-stage1", "--use_cpu", "True"))
    projector = tmp_path / "llava-stage1/mm_projector.bin"

    # Stage 2 with stock LLaVA: the whole LLM, conversation template v1, starting from our projector.
    argv = arguments(mini, tmp_path / "llava-stage2", "--use_cpu", "True", "--pretrain_mm_mlp_adapter", projector)
    argv[argv.index("--tune_mm_mlp_adapter") + 1] = "False"
    argv[argv.index("--version") + 1] = "v1"
    argv[argv.index("--learning_rate") + 1] = "0"  # so that what is saved is what was loaded
    run(sys.executable, "-c", "import hacl_llava.compat, llava.train.train as t; t.train()", *map(str, argv))

    # Both results in stock load_pretrained_model, and an answer from each.
    code = f"""
import hacl_llava.compat, torch
from PIL import Image
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
want = torch.load({str(projector)!r}, weights_only=True)
answers = []
for path, base in (({str(tmp_path / "llava-stage1")!r}, {str(mini.llm)!r}), ({str(tmp_path / "llava-stage2")!r}, None)):
    tokenizer, model, processor, _ = load_pretrained_model(path, base, "llava-mini", device_map="cpu", device="cpu")
    assert type(model).__name__ == "LlavaLlamaForCausalLM"
    state = model.state_dict()
    for k, v in want.items():
        assert torch.equal(state[k], v.half()), k
    model.float(); model.get_vision_tower().float()
    pixels = process_images([Image.open({str(mini.images / records[0]["image"])!r})], processor, model.config)
    ids = tokenizer_image_token("<image>\\nWhat?", tokenizer, return_tensors="pt")[None]
    out = model.generate(ids, images=pixels, do_sample=False, max_new_tokens=5)
    answers.append(out[0, -5:].tolist())
print(answers)
assert answers[0] == answers[1]
"""
    run(sys.executable, "-c", code)


def test_mistake_under_the_launcher_ends_it(mini, tmp_path):
    (tmp_path / "data.json").write_text('[{"id": "x", "image": "nowhere.png"}]')
    launcher = Path(sys.executable).parent / "deepspeed"
    done = run(
        sys.executable, launcher, "--num_gpus", 2, "--master_port", free_port(), "scripts/pretrain_hacl.py",
        *arguments(mini, tmp_path / "out", "--data_path", tmp_path / "data.json"), check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count("record 0 (id 'x') has no 'conversations'") == 1
