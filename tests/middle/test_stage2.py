"""Stage 2 through its door: checkpoints that appear whole, resume, and the way from stage 1 to an answer."""

import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import arguments, made_once, names_in
from workers import ROOT, Run, slow_disk, small_disk, trained

from hacl_llava import cli
from hacl_llava.common.weights import Weights
from hacl_llava.resume import broken

LORA = (
    "--lora_enable",
    "True",
    "--lora_r",
    "4",
    "--lora_alpha",
    "8",
    "--mm_projector_lr",
    "1e-3",
    "--lora_dropout",
    "0.1",
)
HACL = ("--use_hacl", "True", "--hacl_queue_size", "5", "--hacl_start", "0.5", "--hacl_centre", "True")
MODES = {"full": (), "lora": LORA, "hacl": (*LORA, *HACL)}


@pytest.fixture(scope="module")
def stage1(mini, tmp_path_factory):
    """Stage 1 with HACL under DeepSpeed ZeRO-2 on two processes."""

    def train(folder):
        argv = arguments(mini, folder / "llava-stage1", "--bf16", "True", "--deepspeed", "zero_configs/zero2.json")
        trained(argv, folder / "log", ranks=2)
        return folder / "llava-stage1"

    return made_once(tmp_path_factory, "stage1", train)


def stage2(mini, output, projector, *more):
    argv = arguments(mini, output)
    for flag, value in (("--tune_mm_mlp_adapter", "False"), ("--version", "v1"), ("--save_strategy", "steps")):
        argv[argv.index(flag) + 1] = value
    argv += [
        "--save_steps",
        "1",
        "--save_total_limit",
        "2",
        "--image_aspect_ratio",
        "pad",
        "--num_train_epochs",
        "2",
        *more,
    ]
    return [*argv, *(("--pretrain_mm_mlp_adapter", projector) if projector else ())]


def final(folder):
    """Every tensor that a finished run left."""
    files = ("adapter_model.safetensors", "adapter_model.bin", "non_lora_trainables.bin", "model.safetensors")
    found = {}
    for name in files:
        if (folder / name).exists():
            weights = Weights(folder / name)
            found |= {(name, n): weights[n].float() for n in weights}
    return found


def losses(folder):
    return [x["loss"] for x in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss" in x]


def checkpoints(folder):
    return sorted((n for n in names_in(folder) if n.startswith("checkpoint-")), key=lambda n: int(n.split("-")[1]))


@pytest.mark.e2e
@pytest.mark.parametrize("mode", [pytest.param("full", marks=pytest.mark.once), "hacl"])
def test_killed_at_random_it_ends_as_if_never_stopped(mini, tmp_path, mode):
    """kill -9 again and again, in the middle of steps and of saving; after each, what is there is whole."""
    flags = (*MODES[mode], "--use_cpu", "True")
    chance, in_saving, log = random.Random(4), 0, tmp_path / "log.txt"

    def start(output):
        return Run(stage2(mini, output, None, *flags), log, stage=2, prepare=(slow_disk, 0.01))

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run = start(whole)
    assert run.ends() == 0, run.said()[-2000:]
    assert checkpoints(whole) == ["checkpoint-7", "checkpoint-8"]  # 64 / 8 steps, each saved, two kept
    assert not (whole / "unfinished").exists()
    for kill in range(4):
        run = start(killed)
        seen, until = checkpoints(killed), time.time() + 60
        while checkpoints(killed) == seen and time.time() < until:
            if kill % 2 and checkpoints(killed / "unfinished"):
                break
            time.sleep(0.002)
        time.sleep(chance.random() * (0.01 if kill % 2 else 0.05))
        run.kill()
        assert run.ends() == -9
        in_saving += (killed / "unfinished").exists()
        for name in checkpoints(killed):
            assert not broken(killed / name)
            assert list(Weights(_model_file(killed / name)))
    assert in_saving >= 1
    # and passes over what is damaged
    last = killed / checkpoints(killed)[-1]
    _model_file(last).write_bytes(b"")
    run = start(killed)
    assert run.ends() == 0, run.said()[-2000:]
    errors = run.said()
    assert re.search(f"{last.name}: passed over, .* has 0 bytes of", errors)
    assert losses(killed) == losses(whole)
    got, want = final(killed), final(whole)
    assert got.keys() == want.keys() and len(want) > 10
    for name in want:
        assert torch.equal(got[name], want[name]), name
    if mode == "hacl":
        assert "the paper's ablation found" in errors
        assert not [n for _, n in want if "hacl" in n]
        heads = [Weights(x / "hacl_head.safetensors") for x in (killed, whole)]
        assert all(torch.equal(heads[0][n], heads[1][n]) for n in heads[1])
        log = json.loads((whole / "trainer_state.json").read_text())["log_history"]
        assert [x["hacl_scale"] > 0 for x in log if "loss" in x] == [False] * 5 + [True] * 3
        assert all("mm_projector" in n for f, n in want if f == "non_lora_trainables.bin")
        # control: without what trains beside the LoRA, resuming gives other weights
        assert (whole / "checkpoint-8/non_lora_trainables.bin").exists()


def _model_file(folder):
    return next(folder / n for n in ("model.safetensors", "adapter_model.safetensors", "adapter_model.bin")
                if (folder / n).exists())  # fmt: skip


@pytest.mark.e2e
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_full_disk_while_saving(mini, tmp_path, mode):
    """One line, exit status 2, nothing half-written; with room, the same command goes on."""
    flags = (*MODES[mode], "--use_cpu", "True", "--save_steps", "4")
    out, log = tmp_path / "out", tmp_path / "log.txt"
    argv = stage2(mini, out, None, *flags)
    trained(argv, log, stage=2)
    assert checkpoints(out) == ["checkpoint-4", "checkpoint-8"]
    whole = {name: final(out / name) for name in checkpoints(out)}
    state = (out / "checkpoint-8/trainer_state.json").read_bytes()

    largest = max(p.stat().st_size for p in (out / "checkpoint-8").iterdir())
    longer = [*argv, "--num_train_epochs", "3"]
    log.write_text("")
    full = Run(longer, log, stage=2, prepare=(small_disk, largest * 2 // 3))
    assert full.ends() == 2, full.said()[-2000:]
    lines = [line for line in full.said().splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "cannot be written" in lines[0] and "give the same command again" in lines[0]
    assert "Traceback" not in full.said()
    assert checkpoints(out) == ["checkpoint-4", "checkpoint-8"]
    assert (out / "checkpoint-8/trainer_state.json").read_bytes() == state
    for name, tensors in whole.items():
        now = final(out / name)
        assert tensors.keys() == now.keys() and all(torch.equal(now[k], tensors[k]) for k in now)
    assert not list(out.glob("unfinished/checkpoint-*"))
    trained(longer, log, stage=2)
    assert checkpoints(out)[-1] == "checkpoint-12"


PLAIN = """
import sys, json, torch, transformers
from PIL import Image
folder, image = sys.argv[1:]
try:
    processor = transformers.AutoProcessor.from_pretrained(folder)
except TypeError:  # transformers before 4.46
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    processor = transformers.LlavaProcessor(transformers.CLIPImageProcessor.from_pretrained(folder), tokenizer)
model = transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval().float()
inputs = processor(text=sys.stdin.read(), images=Image.open(image).convert("RGB"), return_tensors="pt")
out = model.generate(**inputs, max_new_tokens=8, do_sample=False, min_new_tokens=8)[0]
assert "llava" not in sys.modules and "hacl_llava" not in sys.modules
print(json.dumps(out[-8:].tolist()))
"""


def torchs_adam():
    """DeepSpeed's own Adam of ZeRO-Offload is compiled at its first use, for minutes; torch's takes its place."""
    import accelerate.accelerator

    accelerate.accelerator.map_pytorch_optim_to_deepspeed = lambda optimizer: optimizer


@pytest.mark.distributed
@pytest.mark.parametrize(
    "config, mode",
    [("zero3_offload", "full"), pytest.param("zero3", "full", marks=pytest.mark.once), ("zero2", "lora")],
)
def test_from_stage_one_to_an_answer(mini, stage1, records, tmp_path, capfd, monkeypatch, config, mode):
    """Stage 1 (HACL, ZeRO-2) -> stage 2, killed and resumed -> merged -> exported -> answers in plain transformers."""
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")  # the commands set it; not for other tests
    output = tmp_path / ("llava-tiny-lora" if mode == "lora" else "llava-tiny")
    settings = json.loads((ROOT / f"zero_configs/{config}.json").read_text())
    settings["zero_force_ds_cpu_optimizer"] = False
    (tmp_path / "zero.json").write_text(json.dumps(settings))
    argv = stage2(
        mini, output, stage1 / "mm_projector.bin", *MODES[mode], "--deepspeed", tmp_path / "zero.json",
        *("--bf16", "True", "--max_steps", "4", "--save_total_limit", "4"),
    )  # fmt: skip

    def start():
        return Run(argv, tmp_path / "log", stage=2, ranks=2, prepare=(torchs_adam,))

    # killed while step 3 is being saved (of 4), then the same command again
    run, started = start(), time.time()
    while not ((output / "checkpoint-2").exists() and names_in(output / "unfinished")):
        assert run.running() and time.time() - started < 200, run.said()[-3000:]
        time.sleep(0.002)
    run.kill()
    assert checkpoints(output) in (["checkpoint-1", "checkpoint-2"], ["checkpoint-1", "checkpoint-2", "checkpoint-3"])
    run = start()
    assert run.ends() == 0, run.said()[-3000:]
    assert checkpoints(output)[-1] == "checkpoint-4" and not (output / "unfinished").exists()
    state = json.loads((output / "trainer_state.json").read_text())
    assert [x["step"] for x in state["log_history"] if "loss" in x] == [1, 2, 3, 4]
    assert "hacl" not in json.loads((output / "config.json").read_text())

    def command(*argv):
        return cli.main([str(a) for a in argv])

    whole = output
    if mode == "lora":
        assert command("export", "--to", "hf", output, tmp_path / "no") == 2
        assert "is a LoRA; merge it first" in capfd.readouterr().err
        whole = tmp_path / "llava-merged"
        assert command("export", "--to", "llava", "--base", mini.llm, output, whole) == 0
        assert command("card", output) == 0  # in place of peft's empty form
    assert command("export", "--to", "hf", whole, tmp_path / "hf") == 0
    from test_loading import QUESTION, answer, stock_answer

    from hacl_llava.checkpoints.load import load_pretrained

    image = mini.images / records[0]["image"]
    base = mini.llm if mode == "lora" else None
    ours = load_pretrained(output, base, device="cpu")
    before = Weights(stage1 / "mm_projector.bin")["model.mm_projector.0.weight"].float()
    assert not torch.equal(ours.model.get_model().mm_projector[0].weight, before)  # it was trained
    ours.model.config.image_aspect_ratio = "square"  # as plain transformers does
    want = answer(ours, image)
    if mode == "full":
        return  # what plain transformers makes of an export, the merged one shows
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, tmp_path / "hf", image], input=QUESTION, capture_output=True, text=True,
        cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.strip().splitlines()[-1]) == want
    stock_answer(whole, image)  # loads, and answers (in float16's rounding)


@pytest.mark.e2e
def test_qlora(mini, tmp_path):
    pytest.importorskip("bitsandbytes")
    import transformers

    if not torch.cuda.is_available() and transformers.__version__.startswith("4.37"):
        pytest.skip("this transformers quantizes on a GPU alone")
    output = tmp_path / "llava-tiny-qlora"
    command = stage2(mini, output, None, *LORA, "--bits", "4", "--bf16", "True", "--use_cpu", "True")
    for steps in ("2", "4"):
        trained([*command, "--max_steps", steps], tmp_path / "log", stage=2)
    assert len(losses(output)) == 4
    names = {n for _, n in final(output)}
    assert any("lora_A" in n for n in names) and not any("absmax" in n for n in names)
    from hacl_llava.checkpoints.load import load_pretrained

    assert load_pretrained(output, mini.llm, device="cpu").model.dtype == torch.float32


@pytest.mark.e2e
def test_wrong_settings_end_with_one_line(mini, tmp_path):
    log = tmp_path / "log.txt"

    def refused(match, projector, *more):
        log.unlink(missing_ok=True)
        run = Run(stage2(mini, tmp_path / "out", projector, "--use_cpu", "True", *more), log, stage=2)
        assert run.ends() == 2 and "Traceback" not in run.said(), run.said()[-2000:]
        assert re.search(match, run.said().strip().splitlines()[-1]), run.said()[-500:]

    refused("is stage 1: use scripts/pretrain_hacl.py", None, "--tune_mm_mlp_adapter", "True")
    refused("nowhere.bin", tmp_path / "nowhere.bin")
    torch.save({"model.mm_projector.0.weight": torch.zeros(96, 64), "model.mm_projector.2.weight": torch.zeros(96, 96)},
               tmp_path / "other.bin")  # fmt: skip
    refused("projects to 96 features, .* has the hidden_size 64", tmp_path / "other.bin")
    refused("is no file", tmp_path)
    torch.save({"something": torch.zeros(1)}, tmp_path / "other.bin")
    refused("holds no mm_projector", tmp_path / "other.bin")
    (tmp_path / "out/checkpoint-8").mkdir(parents=True)
    (tmp_path / "out/checkpoint-8/adapter_config.json").write_text("{}")
    (tmp_path / "out/checkpoint-8/trainer_state.json").write_text("{}")
    refused("checkpoint-8: is of a LoRA run, and cannot be gone on from", None)
    refused("checkpoint-8: was saved without DeepSpeed", None, *LORA, "--deepspeed", "zero_configs/zero2.json")
    for rank in range(2):
        (tmp_path / f"out/checkpoint-8/rng_state_{rank}.pth").write_bytes(b"")
    (tmp_path / "out/checkpoint-8/global_step8").mkdir()
    refused("was saved by 2 ranks.* this run has 1. Start 2", None, *LORA, "--deepspeed", "zero_configs/zero2.json")


def test_what_an_earlier_run_left_does_not_stay_beside_the_new(tmp_path):
    from types import SimpleNamespace

    from hacl_llava.trainer import ResumableTrainer

    for name in (
        "adapter_config.json",
        "pytorch_model.bin",
        "model.safetensors.index.json",
        "config.json",
        "other.txt",
    ):
        (tmp_path / name).write_text("old")
    trainer = SimpleNamespace(_moves=lambda: True)
    trainer._unfinished = lambda folder: ResumableTrainer._unfinished(trainer, folder)

    def write(part):
        os.mkdir(part)
        for name in ("model.safetensors", "config.json"):
            (Path(part) / name).write_text("new")

    ResumableTrainer.save_finished(trainer, tmp_path, write)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        "model.safetensors": "new", "config.json": "new", "other.txt": "old"
    }  # fmt: skip


@pytest.mark.e2e
def test_vicunas_generation_settings_can_be_saved(mini, tmp_path):
    import shutil

    shutil.copytree(mini.llm, tmp_path / "vicuna")
    settings = {"temperature": 0.9, "top_p": 0.6, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    (tmp_path / "vicuna/generation_config.json").write_text(json.dumps(settings))
    command = stage2(mini, tmp_path / "out", None, "--use_cpu", "True", "--max_steps", "1")
    command[command.index("--model_name_or_path") + 1] = tmp_path / "vicuna"
    trained(command, tmp_path / "log", stage=2)
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["do_sample"] is True
    assert (tmp_path / "out/tokenizer.model").read_bytes() == (mini.llm / "tokenizer.model").read_bytes()


def test_help_of_stage_two(capsys, monkeypatch):
    from hacl_llava.train import main

    monkeypatch.setattr(sys, "argv", ["finetune_hacl.py", "--help"])
    assert main(stage=2) == 0
    text = capsys.readouterr().out
    assert "--pretrain_mm_mlp_adapter" in text and "tune_mm_mlp_adapter" not in text.replace("pretrain_mm_mlp", "")
    assert "goes on from the last checkpoint" in text and "(default: False)" in text
