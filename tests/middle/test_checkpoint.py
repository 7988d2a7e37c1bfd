"""Checkpoints into Hugging Face's LLaVA format and back."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time

import pytest
import torch
import transformers
from conftest import load
from PIL import Image
from workers import Command, small_disk

from hacl_llava.checkpoints import convert as checkpoint
from hacl_llava.checkpoints.convert import export_to_hf, import_from_hf
from hacl_llava.cli import main
from hacl_llava.common.weights import CheckpointError, Weights, save_tokenizer

PROMPT = "USER: <image>\nIs there a red circle in the image? ASSISTANT:"
PLAIN = """
import json, sys, torch, transformers
from PIL import Image
folder, image, prompt = sys.argv[1:]
try:
    processor = transformers.AutoProcessor.from_pretrained(folder)
except TypeError:  # before 4.46 the processor took no patch_size, and the model itself made room for the image
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    processor = transformers.LlavaProcessor(transformers.CLIPImageProcessor.from_pretrained(folder), tokenizer)
model = transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval().float()
picture = Image.open(image).convert("RGB")
inputs = processor(text=prompt, images=picture, return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits[0]
    answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
chat = [{"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image"}]}]
assert "llava" not in {m.split(".")[0] for m in sys.modules} and "hacl_llava" not in sys.modules
torch.save({"logits": logits, "ids": inputs["input_ids"][0], "pixels": inputs["pixel_values"], "answer": answer[-8:],
            "chat": processor.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)},
           sys.argv[1] + "/../out.pt")
"""


@pytest.fixture(scope="module")
def llava(mini, tmp_path_factory):
    """A whole LLaVA checkpoint, as stage 2 leaves it."""
    folder = tmp_path_factory.mktemp("llava") / "llava-tiny"
    torch.manual_seed(3)
    model, tokenizer = load(mini, stock=True)
    model.config.image_aspect_ratio = "pad"
    model.config.mm_use_im_patch_token = model.config.mm_use_im_start_end = False
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes((mini.llm / "tokenizer.model").read_bytes())
    return folder


def loaded(folder):
    """Model and tokenizer as stock LLaVA's loader makes them, but in float32."""
    from hacl_llava import compat

    model = compat.LlavaLlamaForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    model.get_vision_tower().load_model()
    return model, transformers.AutoTokenizer.from_pretrained(folder, use_fast=False)


def digests(folder):
    weights = Weights(folder)
    return {
        n: hashlib.sha256(weights[n].contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for n in weights
        if "position_ids" not in n and "inv_freq" not in n
    }


def test_plain_transformers_gives_llavas_logits(mini, llava, records, tmp_path):
    export_to_hf(llava, tmp_path / "hf")
    image = mini.images / records[0]["image"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, tmp_path / "hf", image, PROMPT], capture_output=True, text=True, env=environment,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = torch.load(tmp_path / "out.pt", weights_only=True)

    from llava.mm_utils import tokenizer_image_token

    model, tokenizer = loaded(llava)
    picture = Image.open(image).convert("RGB")
    pixels = model.get_vision_tower().image_processor.preprocess(picture, return_tensors="pt")["pixel_values"]
    assert torch.allclose(pixels, theirs["pixels"], atol=1e-6)
    ids = tokenizer_image_token(PROMPT, tokenizer, return_tensors="pt")[None]
    with torch.no_grad():
        logits = model(input_ids=ids, images=pixels).logits[0]
    image_token = json.loads((tmp_path / "hf/config.json").read_text())["image_token_index"]
    assert [i for i in theirs["ids"].tolist() if i != image_token] == [i for i in ids[0].tolist() if i != -200]
    assert logits.shape[0] == theirs["logits"].shape[0]
    rows = logits.shape[1]
    difference = (logits - theirs["logits"][:, :rows]).abs().max()
    assert difference < 1e-4 * max(1, logits.abs().max())
    assert torch.equal(logits.argmax(-1)[-1:], theirs["answer"][:1]) or theirs["answer"][0] >= rows
    assert "USER: <image>\nWhat? ASSISTANT:" in theirs["chat"]


def test_there_and_back_gives_the_same_bits(llava, tmp_path):
    export_to_hf(llava, tmp_path / "hf")
    import_from_hf(tmp_path / "hf", tmp_path / "back")
    before, after = digests(llava), digests(tmp_path / "back")
    before = {n: d for n, d in before.items() if "vision_tower" not in n}
    assert before == after
    config = [json.loads((f / "config.json").read_text()) for f in (llava, tmp_path / "back")]
    same = ("vocab_size", "hidden_size", "mm_vision_tower", "mm_projector_type", "mm_vision_select_layer", "model_type")
    assert all(config[0][key] == config[1][key] for key in same)
    from llava.model.builder import load_pretrained_model

    tokenizer, model, _, _ = load_pretrained_model(
        str(tmp_path / "back"), None, "llava-tiny", device="cpu", device_map="cpu"
    )
    assert len(tokenizer) == model.get_input_embeddings().num_embeddings
    old = load_pretrained_model(str(llava), None, "llava-tiny", device="cpu", device_map="cpu")[0]
    assert tokenizer(PROMPT).input_ids == old(PROMPT).input_ids


def test_a_projector_and_its_base_make_the_same_model(mini, llava, tmp_path):
    stage1 = tmp_path / "stage1"
    stage1.mkdir()
    weights = Weights(llava)
    projector = {n: weights[n].clone() for n in weights if "mm_projector" in n}
    torch.save(projector, stage1 / "mm_projector.bin")
    shutil.copy(llava / "config.json", stage1)
    assert main(["export", "--to", "hf", str(stage1), str(tmp_path / "a"), "--base", str(mini.llm)]) == 0
    assert main(["export", "--to", "hf", str(llava), str(tmp_path / "b")]) == 0
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert main(["export", "--to", "hf", str(stage1), str(tmp_path / "c")]) == 2  # without its base
    torch.save(projector | {"model.embed_tokens.weight": torch.zeros(2, 64)}, stage1 / "mm_projector.bin")
    config = json.loads((llava / "config.json").read_text()) | {"mm_use_im_start_end": True}
    (stage1 / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="a few rows of the vocabulary; merge it with its base first"):
        export_to_hf(stage1, tmp_path / "c", mini.llm)
    assert not (tmp_path / "c").exists()


def test_what_is_written_is_sharded_where_it_is_large(llava, tmp_path, monkeypatch):
    export_to_hf(llava, tmp_path / "one")
    monkeypatch.setattr(checkpoint._write, "__defaults__", (50_000,))
    export_to_hf(llava, tmp_path / "many")
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3 and files[0].endswith(f"-of-{len(files):05d}.safetensors")
    assert digests(tmp_path / "one") == digests(tmp_path / "many")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "many")
    assert model.get_input_embeddings().num_embeddings % 64 == 0
    import_from_hf(tmp_path / "many", tmp_path / "back")


def test_what_transformers_itself_saves_comes_back(llava, tmp_path):
    """The names that the installed transformers writes, with the tower's weights beside."""
    export_to_hf(llava, tmp_path / "hf")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf")
    model.save_pretrained(tmp_path / "again")
    for name in ("tokenizer.model", "tokenizer_config.json", "preprocessor_config.json"):
        (tmp_path / "again" / name).write_bytes((tmp_path / "hf" / name).read_bytes())
    config = json.loads((tmp_path / "again/config.json").read_text())
    config.pop("hacl_llava", None)  # as a checkpoint of somebody else's
    (tmp_path / "again/config.json").write_text(json.dumps(config))
    import_from_hf(tmp_path / "again", tmp_path / "back")
    before, after = digests(llava), digests(tmp_path / "back")
    assert {n: d for n, d in before.items() if "vision_tower" not in n} == after
    tower = {n.removeprefix("vision_model."): d for n, d in digests(tmp_path / "back/vision_tower").items()}
    whole = {n.rpartition("vision_model.")[2].removeprefix("model.vision_tower.vision_tower."): d
             for n, d in before.items() if "vision_tower" in n}  # fmt: skip
    assert tower == whole
    back, tokenizer = loaded(tmp_path / "back")
    assert back.get_vision_tower().num_patches == 9 and len(tokenizer) == back.config.vocab_size


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mm_patch_merge_type": "spatial_unpad"}, "is of LLaVA-1.6"),
        ({"quantization_config": {"load_in_4bit": True}}, "is quantized"),
        ({"architectures": ["LlavaForConditionalGeneration"]}, "is in Hugging Face's format already"),
        ({"mm_projector_type": "linear"}, "has the projector 'linear'; .*mlp2x_gelu alone"),
        ({"model_type": "llama"}, "has the model_type 'llama'.*expected a LLaVA checkpoint"),
        ({"mm_vision_tower": "nobody/nothing-at-all"}, "vision tower nobody/nothing-at-all: is no folder"),
    ],
)
def test_what_cannot_be_converted_says_why(llava, tmp_path, change, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = shutil.copytree(llava, tmp_path / "odd")
    config = json.loads((llava / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        export_to_hf(folder, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.once
def test_targets_are_whole_or_not_there(llava, tmp_path, tmp_path_factory, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious").write_text("mine")
    assert main(["export", "--to", "hf", str(llava), str(tmp_path / "full")]) == 2
    assert "exists already" in capsys.readouterr().err and (tmp_path / "full/precious").read_text() == "mine"
    weights = llava / "model.safetensors"
    damaged = shutil.copytree(llava, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    assert main(["export", "--to", "hf", str(damaged), str(tmp_path / "hf")]) == 2
    assert "model.safetensors: cannot be read" in capsys.readouterr().err

    command = ("export", "--to", "hf", llava, tmp_path / "hf")
    code, _, said = Command(tmp_path_factory.mktemp("said"), *command, prepare=(small_disk, 100_000)).ends()
    assert code == 2 and f"{tmp_path / 'hf'}: cannot be written" in said, said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged", "full"]


@pytest.mark.once
@pytest.mark.e2e
def test_killed_while_writing(llava, tmp_path, tmp_path_factory):
    rng, done, log = random.Random(0), 0, tmp_path_factory.mktemp("said")
    for attempt in range(12):
        process = Command(log, "export", "--to", "hf", llava, tmp_path / "hf").process
        target = tmp_path / "hf.part"
        for _ in range(60_000):
            if target.exists() or not process.is_alive():
                break
            time.sleep(0.0005)
        time.sleep(rng.random() * 0.05 * (attempt % 3))
        process.kill()
        process.join()
        if (tmp_path / "hf").exists():  # whole
            transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf")
            shutil.rmtree(tmp_path / "hf")
            done += 1
    assert done < 12
    assert main(["export", "--to", "hf", str(llava), str(tmp_path / "hf")]) == 0
    assert not (tmp_path / "hf.part").exists()


def test_tokenizer_files_come_from_where_they_came(mini, tmp_path, monkeypatch):
    """From a folder, or from what the hub's name has in the cache; never over the network, and never a failure."""
    import huggingface_hub.constants

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(mini.llm), use_fast=False)
    for name in ("folder", "cache", "nowhere"):
        (tmp_path / name).mkdir()
    save_tokenizer(tokenizer, tmp_path / "folder", mini.llm)
    want = (mini.llm / "tokenizer.model").read_bytes()
    assert (tmp_path / "folder/tokenizer.model").read_bytes() == want

    snapshot = tmp_path / "hub/models--some--vicuna/snapshots/0123"
    snapshot.mkdir(parents=True)
    shutil.copyfile(mini.llm / "tokenizer.model", snapshot / "tokenizer.model")
    (tmp_path / "hub/models--some--vicuna/refs").mkdir()
    (tmp_path / "hub/models--some--vicuna/refs/main").write_text("0123")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(transformers.utils.hub, "TRANSFORMERS_CACHE", str(tmp_path / "hub"), raising=False)
    save_tokenizer(None, tmp_path / "cache", "some/vicuna")
    assert (tmp_path / "cache/tokenizer.model").read_bytes() == want
    save_tokenizer(None, tmp_path / "nowhere", "some/model-of-nowhere")
    assert not list((tmp_path / "nowhere").iterdir())
