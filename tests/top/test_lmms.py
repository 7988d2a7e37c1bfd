"""The adapter for lmms-eval: its logic with a stand-in for lmms-eval's base class, and lmms-eval's own command line."""

import importlib
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import load
from PIL import Image

from hacl_llava.config import HaclError

ABSENT = "lmms-eval is not installed: docs/evaluation.md says how this was tried"
QUESTIONS = ["Is there a circle?", "What is in the image?", "Describe the image with its shapes and all colours."]


@pytest.fixture(scope="module")
def checkpoint(mini, tmp_path_factory):
    """A whole checkpoint whose answers depend on image and question, and do not end by themselves."""
    model, tokenizer = load(mini, stock=True)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(7)
        model.lm_head.weight.copy_(torch.randn(model.lm_head.weight.shape, generator=generator) * 0.2)
        model.lm_head.weight[:259] = 0  # special tokens and bytes: never the likeliest
    # As llava-v1.5's config.json. Without the third the loader, as LLaVA's own, adds a token whose row is random.
    values = {"tune_mm_mlp_adapter": False, "image_aspect_ratio": "pad", "mm_use_im_patch_token": False}
    model.config.update(values)
    folder = tmp_path_factory.mktemp("lmms") / "llava-mini"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(monkeypatch):
    """The module, with lmms-eval's two classes stood in for where it is not installed."""
    if importlib.util.find_spec("lmms_eval") is None:

        class lmms:  # what lmms_eval.api.model.lmms of 0.7.3 sets up
            def __init__(self):
                self.rank, self.world_size, self.task_dict = 0, 1, {}

        modules = {"": {}, ".api": {}, ".api.model": {"lmms": lmms}, ".models": {}}
        modules[".models.registry_v2"] = {"ModelManifest": types.SimpleNamespace}
        for name, values in modules.items():
            module = types.ModuleType(f"lmms_eval{name}")
            vars(module).update(values)
            monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "hacl_llava.evaluation.lmms", raising=False)
    yield importlib.import_module("hacl_llava.evaluation.lmms")
    sys.modules.pop("hacl_llava.evaluation.lmms", None)


@pytest.fixture
def make(adapter, checkpoint, mini, records):
    """A function that makes a model whose task's documents are the miniature's images."""

    def make(**settings):
        model = adapter.HaclLlava(**{"pretrained": str(checkpoint), "device": "cpu", **settings})
        model.task_dict = {"t": {"test": [mini.images / r["image"] for r in records]}}
        return model

    return make


def request(doc, text, images=lambda path: [Image.open(path)], **settings):
    """As lmms-eval (api/task.py, construct_requests) hands it over."""
    settings = {"max_new_tokens": 6, "until": ["\n\n"], "temperature": 0.0, **settings}
    return types.SimpleNamespace(args=(text, settings, images, doc, "t", "test"))


def mixed(records):
    return [request(i, QUESTIONS[i % 3], max_new_tokens=5 + i % 2) for i in range(len(records))]


def test_answers_are_those_of_eval_in_any_batch_and_order(make, records, mini):
    from hacl_llava.evaluation import Question

    model, requests, sizes = make(batch_size="4"), mixed(records), []
    generate = model.answerer.generate
    model.answerer.generate = lambda ids, *rest: sizes.append(len(ids)) or generate(ids, *rest)
    got = model.generate_until(requests)
    assert max(sizes) == 4 and sum(sizes) == len(records)
    asked = [Question(str(i), r["image"], QUESTIONS[i % 3], {}) for i, r in enumerate(records)]
    by_limit = {5: asked[::2], 6: asked[1::2]}
    want = {a.question.id: a.text for n, q in by_limit.items() for a in model.answerer.answers(q, mini.images, n)}
    assert got == [want[str(i)] for i in range(len(records))]
    assert make(batch_size=1).generate_until(requests) == got
    assert model.generate_until(requests[::-1]) == got[::-1]
    assert len(set(got)) > 5 and got != got[::-1]  # control: neither image nor question is ignored


def test_projector_and_base(make, mini, tmp_path, records):
    from hacl_llava.checkpoints.load import merge

    model, _ = load(mini)
    stage1, whole = tmp_path / "stage1", tmp_path / "whole"
    model.config.update({"tune_mm_mlp_adapter": True, "mm_use_im_patch_token": False})
    model.config.save_pretrained(stage1)

    def answers(scale):
        projector = {
            f"model.mm_projector.{k}": scale * v for k, v in model.get_model().mm_projector.state_dict().items()
        }
        torch.save(projector, stage1 / "mm_projector.bin")
        asked = make(pretrained=str(stage1), base=str(mini.llm), conv_template="v1", batch_size=4)
        return asked.generate_until(mixed(records))

    got = answers(1)
    merge(stage1, whole, mini.llm)
    assert make(pretrained=str(whole), conv_template="v1").generate_until(mixed(records)) == got
    assert answers(-1) != got  # control: the projector matters
    assert make(pretrained=str(stage1), base=str(mini.llm)).answerer.plain  # stage 1's own, where none is named


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"batch_size": "auto"}, HaclError, "--batch_size is 'auto'; allowed are 1 and more"),
        ({"batch_size": 0}, HaclError, "--batch_size is 0"),
        ({"conv_template": "nobody"}, HaclError, "conv_template is 'nobody'; allowed are: .*v1"),
        ({"pretrained": "/nowhere"}, HaclError, "/nowhere"),
        ({"use_flash_attention": True}, TypeError, "use_flash_attention"),
    ],
)
def test_bad_settings(make, settings, error, message):
    with pytest.raises(error, match=message):
        make(**settings)


@pytest.mark.parametrize(
    "more, message",
    [
        ({"do_sample": True}, "task t samples or uses beams.*--gen_kwargs do_sample=False,num_beams=1"),
        ({"temperature": 0.2}, "samples"),
        ({"num_beams": 3}, "beams"),
        ({"images": lambda path: []}, "task t, document 1: comes with 0 images"),
        ({"images": lambda path: None}, "with 0 images"),
        ({"images": lambda path: [Image.open(path)] * 2}, "with 2 images"),
        ({"images": lambda path: ["film.mp4"]}, "another medium"),
        ({"text": "word " * 3000}, "task t, document 1: takes .* tokens with its image; allowed are "),
    ],
)
def test_requests_it_does_not_take(make, more, message):
    text = more.pop("text", QUESTIONS[0])
    with pytest.raises(HaclError, match=message):
        make().generate_until([request(0, QUESTIONS[0]), request(1, text, **more)])


def test_what_is_greedy_is_taken_and_other_kinds_of_request_are_not(make):
    requests = [request(0, "What?", do_sample=False, temperature=0.2), request(0, "What?", num_beams=None)]
    model = make()
    first, second = model.generate_until(requests)
    assert first == second != ""
    with pytest.raises(NotImplementedError, match="task t compares likelihoods"):
        model.loglikelihood(requests)
    with pytest.raises(NotImplementedError, match="rounds"):
        model.generate_until_multi_round([])


def test_several_processes_take_their_own_gpu(make, monkeypatch):
    from hacl_llava.checkpoints import load as loading

    asked = []

    def stop(*_, device, **__):
        asked.append(device)
        raise HaclError("stop")

    monkeypatch.setattr(loading, "load_pretrained", stop)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for world, device in (("1", None), ("2", None), ("2", "cuda:0")):
        monkeypatch.setenv("WORLD_SIZE", world)
        monkeypatch.setenv("LOCAL_RANK", "1")
        with pytest.raises(HaclError, match="stop"):
            make(device=device)
    assert asked == [None, "cuda:1", "cuda:0"]


def test_the_entry_point(adapter):
    manifest = adapter.manifest()
    assert manifest.model_id == "hacl_llava"
    module, _, name = manifest.simple_class_path.rpartition(".")
    assert getattr(importlib.import_module(module), name) is adapter.HaclLlava


def commands():
    """lmms-eval's arguments in each command line of its page."""
    page = (Path(__file__).parents[2] / "docs/evaluation.md").read_text()
    for block in re.findall(r"```bash\n(.*?)```", page, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line)
            if words and words[0] != "hacl-llava" and "--model" in words:
                yield words[words.index("--model") :]


def test_settings_in_the_page_exist(adapter):
    from hacl_llava.checkpoints.load import load_pretrained

    known = {
        name for function in (adapter.HaclLlava, load_pretrained) for name in inspect.signature(function).parameters
    }
    seen = 0
    for words in commands():
        if words[1] == "hacl_llava":
            seen += 1
            names = {pair.partition("=")[0] for pair in words[words.index("--model_args") + 1].split(",")}
            assert "pretrained" in names <= known
    assert seen >= 3


def test_lmms_eval_takes_the_commands_of_the_page(monkeypatch):
    pytest.importorskip("lmms_eval", reason=ABSENT)
    from lmms_eval.__main__ import parse_eval_args
    from lmms_eval.tasks import TaskManager

    tasks = set(TaskManager().all_tasks)
    for words in commands():
        monkeypatch.setattr(sys, "argv", ["lmms-eval", *words])
        _, args = parse_eval_args()
        assert set(args.tasks.split(",")) <= tasks


TASK = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
task: mini_shapes
test_split: test
output_type: generate_until
doc_to_visual: !function utils.images
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 6, temperature: 0}}
process_results: !function utils.results
metric_list: [{{metric: same, aggregation: mean, higher_is_better: true}}]
"""
UTILS = """
from PIL import Image
def images(doc):
    return [Image.open(doc["image"])]
def results(doc, results):
    return {"same": float(results[0] == doc["answer"])}
"""


@pytest.mark.e2e
def test_lmms_evals_own_command(checkpoint, mini, records, tmp_path):
    pytest.importorskip("lmms_eval", reason=ABSENT)
    from lmms_eval.models import list_available_models

    if "hacl_llava" not in list_available_models():
        pytest.skip("hacl_llava's entry points are not installed; run: pip install --no-deps -e .")
    from hacl_llava.evaluation.lmms import HaclLlava

    model = HaclLlava(str(checkpoint), device="cpu", batch_size=4)
    model.task_dict = {"t": {"test": [mini.images / r["image"] for r in records]}}
    want = model.generate_until([request(i, QUESTIONS[i % 3]) for i in range(len(records))])
    want[0] = "another answer"  # control: one in 32 is wrong
    lines = [
        {"image": str(mini.images / r["image"]), "question": QUESTIONS[i % 3], "answer": a}
        for i, (r, a) in enumerate(zip(records, want))
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/mini_shapes.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    (tmp_path / "tasks/utils.py").write_text(UTILS)
    command = [
        *(sys.executable, "-m", "lmms_eval", "eval", "--model", "hacl_llava", "--batch_size", "4"),
        *("--model_args", f"pretrained={checkpoint},device=cpu", "--include_path", str(tmp_path / "tasks")),
        *("--tasks", "mini_shapes", "--output_path", str(tmp_path / "out"), "--log_samples"),
    ]
    env = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (result,) = (tmp_path / "out").rglob("*results.json")
    assert json.loads(result.read_text())["results"]["mini_shapes"]["same,none"] == 31 / 32
