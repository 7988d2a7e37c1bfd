"""hacl-llava eval: the answers of LLaVA's own script, runs that go on, endpoints and judges, figures and files."""

import argparse
import base64
import importlib
import io
import json
import logging
import re
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from conftest import load
from openai_server import OpenAIServer, completion
from PIL import Image
from safetensors.torch import load_file, save_file
from workers import Command

from hacl_llava import cli
from hacl_llava.checkpoints import hub
from hacl_llava.config import HaclError
from hacl_llava.evaluation import Question, journal

TEXTS = (
    "Is there a red circle in the image?",
    "Is there a blue square in the image?",
    "Is there a circle?",
    "Describe the image briefly.",
    "What is left, what is right, and what is at the top of the image?",
)
KEY = "sk-secret-0123456789"


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")  # the command sets it; not for other tests
    monkeypatch.setattr(logging, "raiseExceptions", False)  # of a handler that an earlier test's closed stderr has
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def checkpoint(mini, tmp_path_factory):
    """A whole checkpoint of float16 numbers whose answers differ by image and question, and end early or late."""
    model, tokenizer = load(mini, stock=True)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in (model.lm_head.weight, *(p for p in model.model.layers.parameters() if p.ndim == 2)):
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
        model.lm_head.weight[:259] *= 0.3  # special tokens and bytes: seldom, but for the end
        model.lm_head.weight[2] *= 8.7
    model.half().float()
    off = ("tune_mm_mlp_adapter", "mm_use_im_patch_token", "mm_use_im_start_end")
    model.config.update({**dict.fromkeys(off, False), "image_aspect_ratio": "pad", "tokenizer_model_max_length": 2048})
    folder = tmp_path_factory.mktemp("eval") / "llava-v1.5-mini"
    tower = folder.with_name("clip")  # LLaVA's loader makes float16 of it, too
    shutil.copytree(mini.clip, tower)
    weights = {k: v.half().float() for k, v in load_file(tower / "model.safetensors").items()}
    save_file(weights, tower / "model.safetensors", metadata={"format": "pt"})
    model.config.mm_vision_tower = str(tower)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.copy(mini.llm / "tokenizer.model", folder)
    (folder / "generation_config.json").write_text(  # Vicuna's
        json.dumps({"bos_token_id": 1, "eos_token_id": 2, "max_length": 4096, "temperature": 0.9, "top_p": 0.6})
    )
    return folder


@pytest.fixture(scope="module")
def images(mini, records, tmp_path_factory):
    """Twelve images, of which two are not square."""
    folder = tmp_path_factory.mktemp("images")
    for i, record in enumerate(records[:12]):
        image = Image.open(mini.images / record["image"]).convert("RGB")
        image.resize((96, 30) if i % 6 == 5 else image.size).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def questions():
    return [Question(str(i), f"{i % 12}.png", TEXTS[i % len(TEXTS)], {}) for i in range(24)]


def write_pope(path, questions):
    """A question file in POPE's format."""
    lines = [
        {"question_id": int(q.id), "image": q.image, "text": q.text, "label": ("yes", "no")[int(q.id) % 2]}
        for q in questions
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def pope(tmp_path, questions):
    return write_pope(tmp_path / "coco_pope_random.json", questions)


@pytest.fixture(scope="module")
def whole(checkpoint, images, questions, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(checkpoint, write_pope(folder / "coco_pope_random.json", questions), images, folder / "out") == 0
    return folder / "out"


@pytest.fixture
def loaded(checkpoint):
    from hacl_llava.checkpoints.load import load_pretrained

    return load_pretrained(checkpoint, device="cpu")


def answers_of(loaded, questions, images, tokens=12, **settings):
    from hacl_llava.evaluation.answers import Answerer

    found = {a.question.id: a for a in Answerer(loaded, "v1", **settings).answers(questions, images, tokens)}
    assert len(found) == len(questions)
    return [found[q.id] for q in questions]


def stock_evaluation(checkpoint, questions, images, folder, monkeypatch, change=lambda model: None):
    """LLaVA's own eval_model on the CPU in float32: its texts, and what generate() gave it."""
    import hacl_llava.compat  # noqa: F401

    # the one package of LLaVA's that only this script needs: names of answers
    monkeypatch.setitem(sys.modules, "shortuuid", types.SimpleNamespace(uuid=lambda: "name"))
    script = importlib.import_module("llava.eval.model_vqa_loader")
    build, loader, to, tokens = script.load_pretrained_model, script.create_data_loader, torch.Tensor.to, []
    model_class = importlib.import_module("llava.model.builder").LlavaLlamaForCausalLM
    read = model_class.from_pretrained

    def in_float32(*args, **kwargs):  # .float() after float16 is not it: 4.37 makes rotary tables in the first dtype
        return read(*args, **{**kwargs, "torch_dtype": torch.float32})

    def load_here(path, base, name):
        tokenizer, model, processor, context = build(path, base, name, device_map="cpu", device="cpu")
        model.float().get_vision_tower().float()
        change(model)
        generate = model.generate

        def spy(*args, **kwargs):
            out = generate(*args, **kwargs)
            tokens.append(out[0].tolist())
            return out

        model.generate = spy
        return tokenizer, model, processor, context

    def here(self, *args, device=None, dtype=None, **kwargs):
        if device == "cuda":
            return self.float() if dtype == torch.float16 else self
        kwargs |= {k: v for k, v in (("device", device), ("dtype", dtype)) if v is not None}
        return to(self, *args, **kwargs)

    asked = folder / "questions.jsonl"
    lines = ({"question_id": q.id, "image": q.image, "text": q.text} for q in questions)
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines))
    args = argparse.Namespace(
        model_path=str(checkpoint), model_base=None, question_file=str(asked), image_folder=str(images), num_chunks=1,
        chunk_idx=0, answers_file=str(folder / "stock" / "answers.jsonl"), conv_mode="v1", temperature=0, top_p=None,
        num_beams=1, max_new_tokens=12,
    )  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(script, "args", args, raising=False)
        patch.setattr(model_class, "from_pretrained", in_float32)
        patch.setattr(script, "load_pretrained_model", load_here)
        patch.setattr(script, "create_data_loader", lambda *a: loader(*a, num_workers=0))
        patch.setattr(script, "disable_torch_init", lambda: None)
        patch.setattr(torch.Tensor, "to", here)
        script.eval_model(args)
    texts = [json.loads(line)["text"] for line in open(args.answers_file)]
    return texts, tokens


def test_stock_llava_gives_the_same_tokens(checkpoint, loaded, questions, images, tmp_path, monkeypatch):
    texts, tokens = stock_evaluation(checkpoint, questions, images, tmp_path, monkeypatch)
    assert len(set(texts)) > 6 and len({len(t) for t in tokens}) > 1  # they differ, in length too
    assert any(t[-1] == 2 for t in tokens) and any(t[-1] != 2 for t in tokens)  # ended, and cut off
    for size in (1, 3, 8):
        found = answers_of(loaded, questions, images, batch_size=size)
        assert [list(a.tokens) for a in found] == tokens, size
        assert [a.text for a in found] == texts, size

    # control: other weights give other answers
    def change(model):
        model.lm_head.weight.data += 0.02 * torch.randn(
            model.lm_head.weight.shape, generator=torch.Generator().manual_seed(1)
        )

    other, _ = stock_evaluation(checkpoint, questions, images, tmp_path, monkeypatch, change)
    assert other != texts


def test_batches_are_of_one_length_and_bounded_and_the_generation_settings_come_back(loaded, images, monkeypatch):
    from hacl_llava.evaluation import answers

    questions = [Question(str(i), f"{i % 12}.png", "circle " * (i % 7 + 1), {}) for i in range(40)]
    own, shapes, held = loaded.model.generation_config, [], []
    generate = answers.Answerer.generate
    monkeypatch.setattr(answers, "WAITING", 2)

    def spy(self, ids, *rest):
        shapes.append(tuple(ids.shape))
        return generate(self, ids, *rest)

    monkeypatch.setattr(answers.Answerer, "generate", spy)
    answerer, seen = answers.Answerer(loaded, "v1", 4), []
    for answer in answerer.answers(questions, images, 2):
        held.append(len(seen))
        seen.append(answer.question.id)
    assert sorted(seen, key=int) == [q.id for q in questions] and len(set(seen)) == 40
    assert sum(n for n, _ in shapes) == 40 and max(n for n, _ in shapes) <= 4
    assert max(abs(int(i) - at) for at, i in enumerate(seen)) <= 3 * 2 * 4  # nearly in order
    assert loaded.model.generation_config is own and own.temperature == 0.9


def test_images_read_by_other_processes_give_the_same(loaded, questions, images):
    alone = answers_of(loaded, questions[:8], images, tokens=4)
    assert answers_of(loaded, questions[:8], images, tokens=4, workers=2) == alone


def test_images_of_llava_16_share_a_batch_only_where_they_have_one_size(loaded, questions, images):
    from llava.mm_utils import process_images

    from hacl_llava.evaluation.answers import Answerer

    config, side = loaded.model.config, 48
    config.update({"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"})
    config.image_grid_pinpoints = [[side, 2 * side], [2 * side, side], [2 * side, 2 * side]]
    newline = torch.randn(config.hidden_size, generator=torch.Generator().manual_seed(2))
    loaded.model.model.image_newline = torch.nn.Parameter(newline)
    found = answers_of(loaded, questions, images, batch_size=8)
    for question, answer in list(zip(questions, found))[:7]:
        image = Image.open(images / question.image).convert("RGB")
        pixels = process_images([image], loaded.image_processor, config)
        ids = Answerer(loaded, "v1").prompt(question)
        more = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "use_cache": True, "temperature": None}
        out = loaded.model.generate(ids, images=pixels, image_sizes=[image.size], **more, top_p=None)
        assert list(answer.tokens) == out[0].tolist()


def test_a_batch_that_does_not_fit_is_halved(loaded, questions, images, monkeypatch, capsys):
    from hacl_llava.evaluation.answers import Answerer

    same = [q._replace(text="Is there a circle?") for q in questions]
    want = [a.tokens for a in answers_of(loaded, same, images, tokens=4)]
    generate, sizes = Answerer.generate, []

    def tight(self, ids, *rest, most=2):
        sizes.append(len(ids))
        if len(ids) > most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return generate(self, ids, *rest)

    monkeypatch.setattr(Answerer, "generate", tight)
    capsys.readouterr()
    assert [a.tokens for a in answers_of(loaded, same, images, tokens=4, batch_size=8)] == want
    assert sizes[:3] == [8, 4, 2] and set(sizes[3:]) == {2}
    assert capsys.readouterr().err.count("do not fit") == 1
    monkeypatch.setattr(Answerer, "generate", lambda *a: tight(*a, most=0))
    with pytest.raises(HaclError, match="one question alone does not fit"):
        answers_of(loaded, same, images, batch_size=2)


def test_what_is_wrong_with_an_image_is_the_items_own(loaded, images, tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes((images / "0.png").read_bytes())
    (tmp_path / "half.png").write_bytes((images / "0.png").read_bytes()[:200])
    (tmp_path / "text.png").write_text("no image")
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    outside = ("../a.png", "/etc/passwd", "x/../../a.png")
    names = ("a.png", "half.png", "text.png", "none.png", *outside, "bomb.png", "b.png")
    asked = [Question(name, name, "Is there?", {}) for name in names]
    found = {a.question.id: a for a in answers_of(loaded, asked, tmp_path, tokens=2)}
    errors = {name: a.error for name, a in found.items() if a.error}
    assert set(errors) == set(names) - {"a.png", "b.png"} and all(found[n].text for n in ("a.png", "b.png"))
    for name in outside:
        assert "leads out of the image folder" in errors[name]
    assert "no such file" in errors["none.png"] and "cannot be opened" in errors["bomb.png"]


def test_a_process_that_reads_images_and_is_killed_ends_the_run_with_a_line():
    from hacl_llava.evaluation.answers import alive

    def loader(message):
        yield 1
        raise RuntimeError(message)

    with pytest.raises(HaclError, match="a process that reads images was ended"):
        list(alive(loader("DataLoader worker (pid 7) is killed by signal: Killed.")))
    with pytest.raises(RuntimeError, match="other"):
        list(alive(loader("other")))


def test_a_question_that_is_too_long_is_said_not_cut(loaded, images):
    loaded.model.config.tokenizer_model_max_length = 120
    asked = [Question("0", "0.png", "circle " * 100, {}), Question("1", "0.png", "a circle?", {})]
    long, short = answers_of(loaded, asked, images, tokens=2)
    assert re.search(r"takes \d+ tokens with its image; allowed are 120", long.error) and short.error is None


# ---- the command


def command(output, images, *more):
    return cli.main(["eval", "--output", str(output), "--images", str(images), *map(str, more)])


def run(checkpoint, pope, images, output, *more):
    arguments = ("--model", checkpoint, "--pope", pope, "--max-new-tokens", 8, "--device", "cpu", *more)
    return command(output, images, *arguments)


def figures(output):
    """All that a run says, without when, where and how."""
    found = {str(p.relative_to(output)): p.read_bytes() for p in Path(output).rglob("*") if p.is_file()}
    for name in found:
        if name.endswith("results.json"):
            found[name] = {k: v for k, v in json.loads(found[name]).items() if k != "provenance"}
    return found


def result_of(output, task="pope-coco-random"):
    return json.loads((output / task / "results.json").read_text())


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_a_run_writes_answers_items_results_and_asks_nothing_twice(
    checkpoint, pope, images, questions, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out"
    assert run(checkpoint, pope, images, out) == 0
    printed = capsys.readouterr().out
    folder = out / "pope-coco-random"
    answers, items = lines_of(folder / "answers.jsonl"), lines_of(folder / "items.jsonl")
    assert [a["question_id"] for a in answers] == [i["id"] for i in items] == [q.id for q in questions]
    assert set(answers[0]) == {"question_id", "image", "prompt", "text", "model_id"}
    assert answers[0]["model_id"] == "llava-v1.5-mini" and answers[0]["prompt"].startswith(questions[0].text)
    assert items[0]["answer"] == answers[0]["text"] and items[0]["label"] == "yes"
    result = result_of(out)
    assert result["task"] == "POPE coco random" and result["kind"] == "pope" and result["model"] == "llava-v1.5-mini"
    assert result["counts"]["questions"] == result["counts"]["scored"] == 24 and result["counts"]["failed"] == 0
    right = sum(item["counts"]["correct"] for item in items) / 24
    assert result["metrics"]["accuracy"]["value"] == pytest.approx(right)
    low, high = result["metrics"]["accuracy"]["interval"]
    assert low <= right <= high and low < high
    assert result["images"] == str(images.absolute()) and result["settings"]["template"] == "v1"
    assert result["provenance"]["versions"]["transformers"] and result["provenance"]["seed"] == 0
    table = (out / "results.md").read_text()
    assert table in printed and f"| POPE coco random | accuracy | {right:.3f} |" in table
    entries = hub.read_evaluation(out / "evaluation.json")
    assert {"task": "POPE coco random", "metric": "accuracy", "value": right, "interval": [low, high]} in entries
    before = figures(out)
    monkeypatch.setattr("hacl_llava.checkpoints.load.load_pretrained", None)  # not called: there is nothing to ask
    assert run(checkpoint, pope, images, out) == 0
    assert figures(out) == before


@pytest.mark.parametrize("lost", ["half a line", "some lines", "not sorted"])
def test_a_run_that_was_killed_goes_on_to_the_same_files(checkpoint, pope, images, tmp_path, capsys, lost, whole):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for name in ("evaluation.json", "results.md", "pope-coco-random/results.json", "pope-coco-random/items.jsonl"):
        (out / name).unlink()
    path = out / "pope-coco-random/answers.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 24
    kept = {"half a line": b"".join(lines[:9]) + lines[9][:-1], "some lines": b"".join(lines[3:6])}
    path.write_bytes(kept.get(lost, b"".join(reversed(lines))))
    capsys.readouterr()
    assert run(checkpoint, pope, images, out, "--batch-size", 5) == 0
    assert ("was not written to its end; it is cut off" in capsys.readouterr().err) == (lost == "half a line")
    assert figures(out) == figures(whole)


def test_a_limit_draws_questions_and_the_same_command_without_it_goes_on(checkpoint, pope, images, tmp_path, whole):
    out = tmp_path / "out"
    assert run(checkpoint, pope, images, out, "--limit", 6) == 0
    items = lines_of(out / "pope-coco-random/items.jsonl")
    assert len(items) == result_of(out)["counts"]["questions"] == 6
    assert [i["id"] for i in items] != [str(i) for i in range(6)]
    assert run(checkpoint, pope, images, out) == 0
    assert figures(out) == figures(whole)


def test_images_that_cannot_be_read_are_counted_and_tried_again(checkpoint, pope, images, tmp_path, capsys, whole):
    here, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(images, here)
    (here / "3.png").write_bytes((images / "3.png").read_bytes()[:200])
    (here / "4.png").unlink()
    assert run(checkpoint, pope, here, out) == 0
    err, first = capsys.readouterr().err, figures(out)
    assert "question 3: " in err and "3.png: cannot be opened" in err and "4 questions failed" in err
    folder = out / "pope-coco-random"
    failed = [a for a in lines_of(folder / "answers.jsonl") if "error" in a]
    assert [a["question_id"] for a in failed] == ["3", "4", "15", "16"] and not any("text" in a for a in failed)
    items = lines_of(folder / "items.jsonl")
    assert [i["id"] for i in items if "counts" not in i and i["error"]] == ["3", "4", "15", "16"]
    assert (result_of(out)["counts"]["failed"], result_of(out)["counts"]["scored"]) == (4, 20)
    assert run(checkpoint, pope, here, out) == 0  # what is left to ask cannot be read, all of it
    assert figures(out) == first
    for name in ("3.png", "4.png"):
        shutil.copy(images / name, here)
    assert run(checkpoint, pope, here, out) == 0
    found, want = figures(out), figures(whole)
    for of in (found, want):
        of.pop("pope-coco-random/settings.json")
        of["pope-coco-random/results.json"].pop("images")
        of["pope-coco-random/results.json"]["settings"].pop("images")
    assert found == want


def refused(capsys, status, pattern):
    out, err = capsys.readouterr()
    assert status == 2 and re.search(pattern, err), err
    assert "Traceback" not in err


def test_a_wrong_image_folder_ends_the_run_before_the_model_is_loaded(
    checkpoint, pope, tmp_path, images, capsys, monkeypatch
):
    monkeypatch.setattr("hacl_llava.checkpoints.load.load_pretrained", None)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes((images / "0.png").read_bytes())
    status = run(checkpoint, pope, tmp_path / "images", tmp_path / "out")
    refused(
        capsys, status, r"--images .*images: 11 of 12 images that are asked about are not there; the first: .*1\.png"
    )
    refused(capsys, run(checkpoint, pope, tmp_path / "none", tmp_path / "out"), "--images .*none: is no folder")


def test_images_that_are_all_damaged_end_the_run(checkpoint, pope, images, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for path in images.iterdir():
        (tmp_path / "images" / path.name).write_text("no image")
    status = run(checkpoint, pope, tmp_path / "images", tmp_path / "out")
    refused(capsys, status, r"the first 20 questions all failed, the last so: .*See to --images .*images")


@pytest.mark.parametrize("change", ["checkpoint", "template", "questions", "tokens", "weights"])
def test_answers_of_another_setting_are_not_mixed(checkpoint, pope, images, tmp_path, capsys, change):
    mine = tmp_path / "llava-mine"
    shutil.copytree(checkpoint, mine)
    assert run(mine, pope, images, tmp_path / "out", "--limit", 2) == 0
    before = figures(tmp_path / "out")
    more, named = [], ""
    if change == "checkpoint":
        mine, named = checkpoint, "model was .*llava-mine"
    elif change == "template":
        more, named = ["--conv", "v0"], "template was 'v1', now it is 'v0'"
    elif change == "questions":
        pope.write_text(pope.read_text().replace("red", "green"))
        named = "questions was"
    elif change == "tokens":
        more, named = ["--max-new-tokens", 9], "max_new_tokens was 8, now it is 9"
    else:
        file = mine / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-5] ^= 1
        file.write_bytes(bytes(data))
        named = "digest was"
    refused(capsys, run(mine, pope, images, tmp_path / "out", *more), f"another evaluation: {named}.*choose another")
    assert figures(tmp_path / "out") == before


def test_another_image_folder_is_said(checkpoint, pope, images, tmp_path, capsys):
    out, moved = tmp_path / "out", tmp_path / "moved"
    shutil.copytree(images, moved)
    assert run(checkpoint, pope, images, out, "--limit", 2) == run(checkpoint, pope, images, out, "--limit", 2) == 0
    assert "are kept" not in capsys.readouterr().err
    assert run(checkpoint, pope, moved, out, "--limit", 2) == 0
    said = f"were given with --images {images}, now it is {moved}; they are kept. If these are other images, choose"
    assert said in capsys.readouterr().err


def test_another_model_cannot_use_the_folder_for_another_task(checkpoint, pope, images, tmp_path, capsys):
    assert run(checkpoint, pope, images, tmp_path / "out", "--limit", 1) == 0
    other = tmp_path / "gqa_pope_random.json"
    other.write_text(pope.read_text())
    refused(capsys, run(checkpoint, other, images, tmp_path / "out", "--bits", 4), "bits was None, now it is 4")
    assert run(checkpoint, other, images, tmp_path / "out", "--limit", 1) == 0
    tasks = {entry["task"] for entry in hub.read_evaluation(tmp_path / "out" / "evaluation.json")}
    assert tasks == {"POPE coco random", "POPE gqa random"}


def test_what_is_wrong_is_said_before_anything_is_loaded(checkpoint, pope, images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hacl_llava.checkpoints.load.load_pretrained", None)
    out = tmp_path / "out"
    (tmp_path / "file").write_text("")
    for arguments, pattern in (
        (("--model", checkpoint), "no task: give --pope"),
        (("--model", checkpoint, "--pope", tmp_path / "none.json"), "none.json: cannot be read"),
        (("--model", checkpoint, "--pope", pope, pope), "two of the question files give a task of this name"),
        (("--model", tmp_path / "none", "--pope", pope), "none"),
        (("--model", checkpoint, "--pope", pope, "--conv", "x"), "--conv is 'x'; allowed are"),
        (("--model", checkpoint, "--pope", pope, "--device", "cuda:99"), "--device is 'cuda:99'"),
        (("--model", checkpoint, "--pope", pope, "--judge", "api:x"), "--judge is for --mmhal"),
        (("--model", "api:x", "--pope", pope, "--bits", 4), "--bits is for a checkpoint"),
        (("--model", "api:", "--pope", pope), "give api:NAME"),
        (("--model", "api:x", "--pope", pope), "OPENAI_API_KEY is not set"),
    ):
        refused(capsys, command(out, images, *arguments), pattern)
    refused(capsys, run(checkpoint, pope, images, tmp_path / "file"), "file: cannot be written to")
    assert not list(out.rglob("*.jsonl"))


def test_ctrl_c_keeps_what_there_is(checkpoint, pope, images, tmp_path, capsys, monkeypatch, whole):
    append = journal.Answers.append

    def interrupted(self, line):
        append(self, line)
        if len(self.lines) == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(journal.Answers, "append", interrupted)
        assert run(checkpoint, pope, images, tmp_path / "out") == 130
    assert "stopped; answers so far are in" in capsys.readouterr().err
    assert len(lines_of(tmp_path / "out/pope-coco-random/answers.jsonl")) == 7
    assert run(checkpoint, pope, images, tmp_path / "out") == 0
    assert figures(tmp_path / "out") == figures(whole)


def test_a_models_name():
    from hacl_llava.evaluation.command import _short_name

    for path, name in (
        ("a/llava-x/", "llava-x"),
        ("liuhaotian/llava-v1.5-7b", "llava-v1.5-7b"),
        ("runs/a/checkpoint-10", "a/checkpoint-10"),
        ("runs/a/../b/.", "b"),
    ):
        assert _short_name(path) == name


def test_help_and_parser_import_nothing_heavy():
    code = "import sys; from hacl_llava.evaluation import command, endpoint, journal; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


HOLD = """import sys, time
from hacl_llava.common.files import locked
with locked(sys.argv[1] + "/.lock", "x", "y"):
    print(1, flush=True)
    time.sleep(60)
"""


def test_two_runs_in_one_folder(checkpoint, pope, images, tmp_path, capsys):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "out")], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline().strip() == b"1"
        refused(capsys, run(checkpoint, pope, images, tmp_path / "out"), "another run writes there")
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_a_damaged_journal_is_not_guessed_at(tmp_path):
    path = tmp_path / "answers.jsonl"
    for text, line in (('{"question_id": "1"}\nx\n{"question_id": "2"}\n', 2), ("[]\n", 1), ('{"id": 1}\n', 1)):
        path.write_text(text)
        with pytest.raises(HaclError, match=f"line {line} is damaged"):
            journal.Answers(path, "question_id")
        assert path.read_text() == text


def test_other_kinds_of_checkpoint(mini, checkpoint, pope, images, tmp_path, capsys, whole):
    from hacl_llava.checkpoints.convert import export_to_hf

    export_to_hf(checkpoint, tmp_path / "hf")
    assert run(tmp_path / "hf", pope, images, tmp_path / "out-hf") == 0
    texts = [[a["text"] for a in lines_of(o / "pope-coco-random/answers.jsonl")] for o in (whole, tmp_path / "out-hf")]
    assert texts[0] == texts[1]
    model, _ = load(mini, stock=True)
    projector = tmp_path / "llava-pretrain"
    projector.mkdir()
    model.config.update({"tune_mm_mlp_adapter": True, "mm_use_im_patch_token": False})
    model.config.save_pretrained(projector)
    state = {f"model.mm_projector.{n}": p for n, p in model.get_model().mm_projector.state_dict().items()}
    torch.save(state, projector / "mm_projector.bin")
    capsys.readouterr()
    assert run(projector, pope, images, tmp_path / "out-plain", "--base", mini.llm) == 0
    assert "This template asks nothing" in capsys.readouterr().err
    found = lines_of(tmp_path / "out-plain/pope-coco-random/answers.jsonl")
    assert found[0]["text"] == found[12]["text"]  # one image, two questions
    assert run(projector, pope, images, tmp_path / "out-v1", "--base", mini.llm, "--conv", "v1") == 0
    assert "asks nothing" not in capsys.readouterr().err
    asked = lines_of(tmp_path / "out-v1/pope-coco-random/answers.jsonl")
    assert [a["text"] for a in asked] != [a["text"] for a in found]


def test_a_lora(mini, pope, images, tmp_path):
    from test_loading import lora_folder

    model, tokenizer = load(mini, stock=True)
    model.config.update({"mm_use_im_patch_token": False, "mm_use_im_start_end": False})
    lora_folder((model, tokenizer), mini, tmp_path / "llava-lora")
    assert run(tmp_path / "llava-lora", pope, images, tmp_path / "out", "--base", mini.llm, "--conv", "v1") == 0
    settings = json.loads((tmp_path / "out/pope-coco-random/settings.json").read_text())
    assert settings["base"] == str(mini.llm) and settings["base_digest"] != settings["digest"]


@pytest.mark.once
@pytest.mark.e2e
def test_killed_half_way_for_real(checkpoint, pope, images, tmp_path, questions):
    lines = lines_of(pope)
    many = [{**line, "question_id": 100 * i + line["question_id"]} for i in range(8) for line in lines]
    pope.write_text("".join(json.dumps(line) + "\n" for line in many))

    def start(out):
        arguments = ["--model", checkpoint, "--pope", pope, "--images", images, "--output", out, "--device", "cpu"]
        arguments += ["--max-new-tokens", 40, "--batch-size", 2]
        return Command(tmp_path, "eval", *arguments)

    status, _, err = start(tmp_path / "whole").ends()
    assert status == 0, err
    path = tmp_path / "out/pope-coco-random/answers.jsonl"
    for least in (10, 60):
        command, end = start(tmp_path / "out"), time.time() + 200
        while not path.exists() or path.read_bytes().count(b"\n") < least:
            assert time.time() < end and command.process.is_alive()
            time.sleep(0.01)
        command.process.kill()
        assert command.ends()[0] == -9
        assert least <= path.read_bytes().count(b"\n") < len(many) and not (tmp_path / "out/evaluation.json").exists()
    status, _, err = start(tmp_path / "out").ends()
    assert status == 0, err
    assert figures(tmp_path / "out") == figures(tmp_path / "whole")


# ---- endpoints


class Server(OpenAIServer):
    """A stand-in for an endpoint: ``behave(body, number of the request)`` gives a text, or (status, json)."""

    def __init__(self, behave):
        super().__init__(responses=self.respond_to, key=KEY)
        self.behave, self.bodies = behave, []

    def respond_to(self, body):
        with self.lock:
            self.bodies.append(body)
            number = len(self.bodies)
        found = self.behave(body, number)
        return completion(found) if isinstance(found, str) else found


def error(status, message, **more):
    return status, {"error": {"message": message, **more}}


def question_of(body):
    return next(part["text"] for part in body["messages"][-1]["content"] if part["type"] == "text")


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    monkeypatch.setattr("hacl_llava.common.endpoint.BACKOFF", 0.001)


def ask_api(server, pope, images, output, *more):
    arguments = ("--model", "api:gpt-x", "--pope", pope, "--base-url", server.base_url, "--key-env", "MY_KEY", *more)
    return command(output, images, *arguments)


def no_key_anywhere(folder, *texts):
    for path in Path(folder).rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path
    assert not any(KEY in text for text in texts)


def test_a_model_behind_an_endpoint(pope, images, tmp_path, key, capsys):
    busy = {TEXTS[0], TEXTS[3]}

    def behave(body, number):
        if any(text in question_of(body) and not busy.discard(text) for text in list(busy)):
            return error(429, f"slow down {KEY}")
        return "Yes, there is." if "circle" in question_of(body) else " No. "

    with Server(behave) as server:
        assert ask_api(server, pope, images, tmp_path / "out") == 0
        assert len(server.bodies) == 26
        asked = len(server.bodies)
        assert ask_api(server, pope, images, tmp_path / "out") == 0 and len(server.bodies) == asked
    body = server.bodies[0]
    assert body["temperature"] == 0 and body["max_tokens"] == 128 and body["model"] == "gpt-x"
    uri = body["messages"][0]["content"][0]["image_url"]["url"]
    sent = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    assert sent in [p.read_bytes() for p in images.iterdir()]
    folder = tmp_path / "out/pope-coco-random"
    answers = lines_of(folder / "answers.jsonl")
    assert [a["question_id"] for a in answers] == [str(i) for i in range(24)]
    assert all(a["text"] == ("Yes, there is." if "circle" in a["prompt"] else "No.") for a in answers)
    result = json.loads((folder / "results.json").read_text())
    assert result["model"] == "api:gpt-x" and result["settings"]["base_url"] == server.base_url
    assert result["counts"]["scored"] == 24
    no_key_anywhere(tmp_path, *capsys.readouterr())


def test_what_an_endpoint_does_not_answer_is_counted(pope, images, tmp_path, key, capsys):
    seen = {}

    def behave(body, number):
        text = json.dumps(body["messages"])
        with server.lock:
            at = seen.setdefault(text, len(seen) % 6)
        if at == 0:
            return error(400, f"{KEY} flagged by the content policy", code="content_filter")
        return completion(None, refusal="no") if at == 1 else error(500, "broken") if at == 2 else "yes"

    with Server(behave) as server:
        assert ask_api(server, pope, images, tmp_path / "out", "--concurrency", 2) == 0
    out, err = capsys.readouterr()
    items = lines_of(tmp_path / "out/pope-coco-random/items.jsonl")
    failed = [item["error"] for item in items if "counts" not in item]
    assert len(failed) == 12 and len(items) == 24 and "12 questions failed" in err
    assert sum("content policy" in reason for reason in failed) == 8
    assert sum("500: broken" in reason for reason in failed) == 4
    assert err.count("POPE coco random, question") == 10 and "(no more of these are shown)" in err
    no_key_anywhere(tmp_path, out, err)


def test_an_endpoint_that_ends_the_run(pope, images, tmp_path, key, capsys):
    answer = error(429, f"no more {KEY}", code="insufficient_quota")
    with Server(lambda body, number: "yes" if number <= 5 else answer) as server:
        refused(capsys, ask_api(server, pope, images, tmp_path / "out", "--concurrency", 1), "no credit is left")
    assert len(lines_of(tmp_path / "out/pope-coco-random/answers.jsonl")) == 5
    no_key_anywhere(tmp_path)
    with Server(lambda body, number: "yes") as server:  # another address is another endpoint
        refused(capsys, ask_api(server, pope, images, tmp_path / "out"), "base_url was")


def test_an_endpoint_that_is_not_there(pope, images, tmp_path, key, capsys):
    with Server(lambda *_: None) as server:
        pass
    refused(capsys, ask_api(server, pope, images, tmp_path / "out"), "cannot be reached: no connection")


def test_images_are_sent_as_they_are_or_as_jpeg(tmp_path, monkeypatch):
    from hacl_llava.evaluation import endpoint

    image = Image.new("RGB", (30, 20), (200, 10, 10))
    for name in ("a.jpg", "a.png", "a.bmp", "wrong.png"):
        image.save(tmp_path / name, "JPEG" if name == "wrong.png" else None)
    (tmp_path / "bad.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:300])
    uris = {n: endpoint.data_uri(tmp_path, n) for n in ("a.jpg", "a.png", "a.bmp", "wrong.png")}
    assert [u[5:15] for u in uris.values()] == ["image/jpeg", "image/png;", "image/jpeg", "image/jpeg"]

    def opened(uri):
        return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))

    assert base64.b64decode(uris["a.png"].partition(",")[2]) == (tmp_path / "a.png").read_bytes()
    assert all(opened(u).size == (30, 20) for u in uris.values())
    monkeypatch.setattr(endpoint, "LARGEST_IMAGE", 10)
    assert opened(endpoint.data_uri(tmp_path, "a.png")).format == "JPEG"
    for name in ("bad.jpg", "none.jpg", "../x.jpg"):
        with pytest.raises(HaclError):
            endpoint.data_uri(tmp_path, name)


# ---- judges


@pytest.fixture
def mmhal(tmp_path):
    path = tmp_path / "mmhal" / "response_template.json"
    path.parent.mkdir()
    kinds = ("attribute", "counting", "other")
    rows = [
        {"question_type": kinds[i % 3], "image_src": f"https://x.org/a/{i}.png", "image_content": ["circle"],
         "question": f"What is in image {i}?", "gt_answer": f"circle {i}", "model_answer": ""}
        for i in range(6)
    ]  # fmt: skip
    path.write_text(json.dumps(rows))
    return path


def judged(server, checkpoint, mmhal, images, output, *more):
    arguments = ("--model", checkpoint, "--mmhal", mmhal, "--judge", "api:gpt-4", "--base-url", server.base_url)
    arguments += ("--key-env", "MY_KEY", "--max-new-tokens", 4, "--device", "cpu", "--concurrency", 2, *more)
    return command(output, images, *arguments)


def item_of(body):
    return int(re.search(r"What is in image (\d)", body["messages"][0]["content"])[1])


def test_a_judge_that_fails_is_asked_again_then_marked_never_scored(checkpoint, mmhal, images, tmp_path, key, capsys):
    asked, out = [], tmp_path / "out"

    def behave(body, number):
        i = item_of(body)
        asked.append(i)
        assert (out / "mmhal-bench/answers.jsonl").read_text().count("\n") == 6  # saved before judging
        if i == 0:
            return "I cannot say."
        if i == 1:
            return error(500, "broken")
        if i == 2:
            return error(429, "slow down") if asked.count(2) == 1 else "Fine. Rating: 6"
        if i == 3:
            return "hm" if asked.count(3) == 1 else "Rating: 1"
        return "Rating: 4"

    with Server(behave) as server:
        assert judged(server, checkpoint, mmhal, images, out) == 0
        texts = capsys.readouterr()
        assert [asked.count(i) for i in range(6)] == [3, 7, 2, 2, 1, 1]
        folder = out / "mmhal-bench"
        items = lines_of(folder / "items.jsonl")
        assert ["counts" in item for item in items] == [False, False, True, True, True, True]
        assert all("no verdict from the judge" in item["error"] for item in items[:2])
        assert "question 0: no verdict" in texts.err and "2 questions failed" in texts.err
        result = json.loads((folder / "results.json").read_text())
        assert result["metrics"]["score"]["value"] == pytest.approx((6 + 1 + 4 + 4) / 4)
        assert result["metrics"]["hallucination_rate"]["value"] == 0.25
        assert result["counts"]["failed"] == 2 and result["counts"]["scored"] == 4
        assert (
            result["judge"]["name"] == "gpt-4" and result["judge"]["rubric"] and result["settings"]["judge"] == "gpt-4"
        )
        assert "gpt-4" in (out / "results.md").read_text()
        server.behave = lambda body, number: asked.append(item_of(body)) or "Rating: 3"
        asked.clear()
        assert judged(server, checkpoint, mmhal, images, out) == 0
        assert sorted(asked) == [0, 1]  # the same command asks again for what failed, and for nothing else
        asked.clear()
        assert judged(server, checkpoint, mmhal, images, out, "--judge", "api:gpt-5") == 0
        assert sorted(asked) == list(range(6))  # another judge judges anew, the answers are the same
        result = json.loads((folder / "results.json").read_text())
        assert result["judge"]["name"] == "gpt-5" and result["metrics"]["score"]["value"] == 3
        asked.clear()
        assert judged(server, checkpoint, mmhal, images, out) == 0 and asked == []  # the first one's are kept
    assert json.loads((folder / "results.json").read_text())["metrics"]["score"]["value"] == pytest.approx(21 / 6)
    no_key_anywhere(tmp_path, *texts)


def test_a_judge_that_refuses_the_key_takes_no_answers_and_no_other_results(
    checkpoint, mmhal, pope, images, tmp_path, key, capsys
):
    with Server(lambda *_: error(401, f"bad key {KEY}")) as server:
        status = judged(server, checkpoint, mmhal, images, tmp_path / "out", "--pope", pope)
    texts = capsys.readouterr()
    assert status == 2 and "refuses the key" in texts.err
    assert len(lines_of(tmp_path / "out/mmhal-bench/answers.jsonl")) == 6
    assert {e["task"] for e in hub.read_evaluation(tmp_path / "out/evaluation.json")} == {"POPE coco random"}
    no_key_anywhere(tmp_path, *texts)


def test_mmhal_without_a_judge_or_its_key_is_refused_before_loading(
    checkpoint, mmhal, images, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("hacl_llava.checkpoints.load.load_pretrained", None)
    arguments = ("--model", checkpoint, "--mmhal", mmhal, "--device", "cpu")
    refused(capsys, command(tmp_path / "out", images, *arguments), "--mmhal needs --judge")
    status = command(tmp_path / "out", images, *arguments, "--judge", "api:x", "--judge-key-env", "NOT_SET")
    refused(capsys, status, "NOT_SET is not set")
    with pytest.raises(SystemExit):
        command(tmp_path / "out", images, *arguments, "--judge", "gpt-4")
    assert "allowed is api: and a model's name" in capsys.readouterr().err


def test_captions_and_several_tasks_of_one_run(checkpoint, pope, images, tmp_path, monkeypatch):
    from hacl_llava.checkpoints import load as loading

    truth, loads, real = tmp_path / "truth.jsonl", [], loading.load_pretrained
    lines = [{"image": f"{i}.png", "captions": ["a dog"], "instances": [{"category": "cat"}]} for i in range(4)]
    truth.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(loading, "load_pretrained", lambda *a, **k: loads.append(a) or real(*a, **k))
    assert run(checkpoint, pope, images, tmp_path / "out", "--chair", truth) == 0
    assert len(loads) == 1
    tasks = {entry["task"] for entry in hub.read_evaluation(tmp_path / "out" / "evaluation.json")}
    assert "POPE coco random" in tasks
    items = lines_of(tmp_path / "out/chair/items.jsonl")
    assert [i["image"] for i in items] == [f"{i}.png" for i in range(4)] and all("counts" in i for i in items)


def test_results_name_what_answers_are_scored_by_and_a_new_truth_asks_nothing_anew(
    checkpoint, images, tmp_path, monkeypatch
):
    def settings(truth, *more):
        lines = [{"image": f"{i}.png", "captions": [truth]} for i in range(2)]
        (tmp_path / "truth.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        chair = ("--chair", tmp_path / "truth.jsonl", *more, "--max-new-tokens", 2, "--device", "cpu")
        assert command(tmp_path / "out", images, "--model", checkpoint, *chair) == 0
        return json.loads((tmp_path / "out/chair/results.json").read_text())["settings"]

    first = settings("a dog")
    monkeypatch.setattr("hacl_llava.checkpoints.load.load_pretrained", None)
    other = settings("a cat")
    assert {k for k in first if first[k] != other[k]} == {"truth"} and first["synonyms"] == "own"
    (tmp_path / "list.txt").write_text("dog, puppy\ncat, kitten\n")
    listed = settings("a cat", "--chair-synonyms", tmp_path / "list.txt")
    assert {k for k in other if other[k] != listed[k]} == {"synonyms"}
    assert settings("a cat") == other
