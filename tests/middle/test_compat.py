"""Stock LLaVA on this transformers version, and the package's own borders."""

import ast
import inspect
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import arguments, load
from PIL import Image
from workers import alone, stock_training

import hacl_llava
from hacl_llava import compat

PACKAGE = Path(hacl_llava.__file__).parent


def python(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, timeout=120
    )


def test_generate_with_an_image(mini, records):
    from llava.mm_utils import process_images, tokenizer_image_token

    model, tokenizer = load(mini, stock=True)
    model.eval()
    model.lm_head.weight.data[2] = 0  # no end before six tokens
    image = Image.open(mini.images / records[0]["image"])
    pixels = process_images([image], model.get_vision_tower().image_processor, model.config)
    ids = tokenizer_image_token("<image>\nWhat?", tokenizer, return_tensors="pt")[None]
    more = {"images": pixels, "image_sizes": [image.size], "do_sample": False, "max_new_tokens": 6}
    with_cache = model.generate(ids, use_cache=True, **more)
    without = model.generate(ids, use_cache=False, **more)
    assert torch.equal(with_cache, without) and with_cache.shape[1] >= 6
    # what was generated is the argmax of the plain forward
    answer = with_cache[:, -6:]
    joined = torch.cat([ids, answer], 1)
    logits = model(input_ids=joined, images=pixels).logits
    assert torch.equal(logits[:, -7:-1].argmax(-1), answer)


def test_forward_takes_cache_position_and_shows_no_kwargs():
    from hacl_llava import compat

    for cls in (compat.LlavaLlamaForCausalLM, compat.LlavaMistralForCausalLM):
        parameters = inspect.signature(cls.forward).parameters
        assert "cache_position" in parameters
        assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        stock = inspect.unwrap(cls.forward)
        assert "cache_position" not in inspect.signature(stock).parameters
        with pytest.raises(TypeError, match="cache_position"):  # control: what users met (LLaVA issue 1218)
            stock(None, cache_position=torch.arange(3))


def test_arguments_as_llavas_scripts_spell_them(mini, tmp_path):
    from hacl_llava import compat  # noqa: F401

    # isort: split
    import llava.train.train as llava_train
    import transformers

    parser = transformers.HfArgumentParser((llava_train.TrainingArguments,))
    args, rest = parser.parse_args_into_dataclasses(
        arguments(mini, tmp_path, "--use_cpu", "True", "--gradient_checkpointing", "True"),
        return_remaining_strings=True,
    )
    assert args.gradient_checkpointing is True
    assert getattr(args, "eval_strategy", None) == "no" or args.evaluation_strategy == "no"
    assert args.get_warmup_steps(1000) == 30
    assert not [x for x in rest if "warmup" in x or "strategy" in x]


def test_full_finetuning_saves_checkpoints(mini, tmp_path):
    # LLaVATrainer._save_checkpoint outside of stage 1 passes an argument that newer Trainers refuse.
    argv = arguments(mini, tmp_path / "out", "--use_cpu", "True", "--save_steps", "2", stock=True)
    argv[argv.index("--tune_mm_mlp_adapter") + 1] = "False"
    argv[argv.index("--save_strategy") + 1] = "steps"
    alone(stock_training, argv)
    assert (tmp_path / "out/checkpoint-2/model.safetensors").exists()
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["LlavaLlamaForCausalLM"]


def test_missing_or_wrong_llava_is_one_clear_line(tmp_path, monkeypatch):
    command = "pip install --no-deps llava-torch==1.2.2.post1"
    missing = python("import sys; sys.modules['llava'] = None; import hacl_llava.compat")
    assert missing.stderr.strip().splitlines()[-1].endswith(f"llava is not installed; run: {command}")
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava/__init__.py").write_text("")
    wrong = python("import hacl_llava.compat", PYTHONPATH=str(tmp_path))
    line = wrong.stderr.strip().splitlines()[-1]
    assert f"the llava at {tmp_path / 'llava'} is not LLaVA 1.2.2.post1; run: {command}" in line
    monkeypatch.setitem(sys.modules, "llava.model", types.ModuleType("llava.model"))  # as where its own imports fail
    with pytest.raises(compat.LlavaNotUsable, match=rf"does not work here \(.*LlavaLlamaFor.*\); run: {command}"):
        compat._import_llava()


def test_import_is_light():
    done = python(
        "import sys, hacl_llava, hacl_llava.cli; "
        "heavy = {'torch', 'transformers', 'matplotlib', 'llava', 'deepspeed', 'numpy', 'PIL', 'scipy', 'jinja2'}; "
        "heavy &= set(sys.modules); "
        "assert not heavy, heavy; from hacl_llava import HaclConfig; assert 'torch' not in sys.modules"
    )
    assert done.returncode == 0, done.stderr


def test_public_names_resolve():
    for name in hacl_llava.__all__:
        assert getattr(hacl_llava, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        hacl_llava.nothing  # noqa: B018


# Each room imports from rooms before it alone (docs/how-it-works.md).
ROOMS = [
    *("config", "loss", "packing", "common", "compat", "records", "hallucinate", "miniature", "patching"),
    *("representation", "fused", "text_cache", "model", "data", "nonfinite", "recomputation"),
    *("resume", "run"),
    *("check_data", "check_run", "trainer"),
    *("checkpoints", "integration", "check_command", "train", "evaluation", "demo", "cli"),
]


def imports_of(path):
    """Modules of the package that a file imports at any place, as names of the table above."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            inside = path.parent != PACKAGE
            if node.level == 1 and inside:
                yield path.parent.name
            elif node.module:
                yield node.module.split(".")[0]
            else:
                yield from (a.name for a in node.names if a.name in ROOMS)


def test_a_room_imports_only_from_rooms_before_it():
    seen = 0
    for path in PACKAGE.rglob("*.py"):
        name = path.parent.name if path.parent != PACKAGE else path.stem
        if name == "__init__":
            continue
        for other in imports_of(path):
            if other != name:
                seen += 1
                assert ROOMS.index(other) < ROOMS.index(name), f"{path} imports {other}, a later room"
    assert seen > 10


def public_functions(body, inside=()):
    """(dotted name, function) of what is public at the top of a module and in its public classes."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body, (*inside, node))
        elif isinstance(node, (ast.If, ast.Try, ast.With)):
            yield from public_functions([n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt)], inside)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if not node.name.startswith("_") or inside and node.name == "__init__":
                yield ".".join(n.name for n in (*inside, node)), node


def untyped(function, method):
    """Names of a function's arguments without annotation, and "return"."""
    of = function.args
    named = [*of.posonlyargs, *of.args]
    if method and not any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in function.decorator_list):
        named = named[1:]  # self or cls
    every = [*named, *of.kwonlyargs, *(a for a in (of.vararg, of.kwarg) if a)]
    returns = function.returns or function.name == "__init__"
    return [a.arg for a in every if a.annotation is None] + ([] if returns else ["return"])


def test_public_functions_are_typed():
    seen = 0
    for path in PACKAGE.rglob("*.py"):
        for name, function in public_functions(ast.parse(path.read_text()).body):
            seen += 1
            lacking = untyped(function, method="." in name)
            assert not lacking, f"{path}: {name} has no annotation of {', '.join(lacking)}"
    assert seen > 100


def test_only_compat_knows_versions():
    for path in PACKAGE.rglob("*.py"):
        if path.name not in ("compat.py", "cli.py"):
            assert "transformers.__version__" not in path.read_text()


def test_deepspeed_without_an_accelerator_gets_gloo(monkeypatch):
    from accelerate.state import PartialState

    from hacl_llava import compat  # noqa: F401

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    state = types.SimpleNamespace()
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert PartialState._prepare_backend(state, False, False, None)[0] == "gloo"


@pytest.mark.skipif(sys.version_info >= (3, 11, 10), reason="this Python forks beside threads")
def test_a_fork_lets_gloo_come_to_rest(monkeypatch):
    import os
    import time

    from hacl_llava import compat  # noqa: F401

    naps = []
    monkeypatch.setattr(time, "sleep", naps.append)
    for running in (False, True):
        monkeypatch.setattr("torch.distributed.is_initialized", lambda running=running: running)
        if (child := os.fork()) == 0:
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    assert naps == [0.02]
