"""Model cards, and pushing to a stand-in for the hub."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from conftest import load
from hub_server import TOKEN, HubServer
from safetensors.torch import load_file, save_file
from workers import alone

from hacl_llava.checkpoints import hub
from hacl_llava.checkpoints.convert import export_to_hf
from hacl_llava.cli import main
from hacl_llava.common.weights import CheckpointError
from hacl_llava.config import HaclConfig, HaclError

RESULTS = [
    {"task": "POPE random", "metric": "f1", "value": 0.87, "interval": [0.85, 0.89]},
    {"task": "POPE random", "metric": "accuracy", "value": 0.9},
    {"task": "CHAIR | captions", "metric": "objects", "value": 12},
]


def write(path, value):
    path.write_text(json.dumps(value))
    return path


@pytest.fixture(scope="module")
def llava(mini, tmp_path_factory):
    """A whole LLaVA checkpoint; its config.json names language model and tower by paths of this machine."""
    folder = tmp_path_factory.mktemp("llava") / "llava-tiny"
    model, tokenizer = load(mini, stock=True)
    model.config.mm_use_im_patch_token = model.config.mm_use_im_start_end = False
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes((mini.llm / "tokenizer.model").read_bytes())
    config = json.loads((folder / "config.json").read_text())
    write(folder / "config.json", {**config, "_name_or_path": str(mini.llm)})
    return folder


@pytest.fixture
def stage1(llava, tmp_path):
    """What a stage-1 run leaves, its own state and a half-written file among it."""
    folder = tmp_path / "stage1"
    folder.mkdir()
    weights = load_file(llava / "model.safetensors")
    torch.save({n: t for n, t in weights.items() if "mm_projector" in n}, folder / "mm_projector.bin")
    config = json.loads((llava / "config.json").read_text())
    write(folder / "config.json", {**config, "hacl": HaclConfig(queue_size=16384).to_dict()})
    metadata = {"format": "pt", "hacl": json.dumps(HaclConfig(queue_size=16384).to_dict()), "hacl_llava": "0.0.7"}
    save_file({"log_temperature": torch.zeros(1)}, folder / "hacl_head.safetensors", metadata)
    log = [{"step": 1, "loss": 9.0, "learning_rate": 0.001}, {"step": 2, "loss": 3.25, "loss_lm": 2.125,
           "closer_to_true": 0.75, "learning_rate": 0.0005}, {"step": 2, "train_loss": 6.0}]  # fmt: skip
    state = {"global_step": 2, "epoch": 0.5, "train_batch_size": 8, "log_history": log}
    write(folder / "trainer_state.json", {**state, "best_model_checkpoint": str(tmp_path / "secret-place")})
    (folder / "training_args.bin").write_bytes(b"cbuiltins\nexec\n(S'raise SystemExit(\"unpickled\")'\ntR.")
    for name in (
        *("checkpoint-1/global_step1/states.pt", "checkpoint-1/mm_projector.bin", "unfinished/model.bin", ".env"),
        *("runs/now/events", "optimizer.pt", "model.safetensors.part", "sub/training_args.bin", "rng_state_0.pth"),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"not for others")
    return folder


MODEL = {"README.md", "config.json", "mm_projector.bin", "hacl_head.safetensors", "trainer_state.json"}


@pytest.fixture
def lora(mini, tmp_path, stage1):
    folder = tmp_path / "lora"
    folder.mkdir()
    shutil.copy(stage1 / "config.json", folder)
    torch.save({"base_model.model.model.mm_projector.0.bias": torch.zeros(64)}, folder / "non_lora_trainables.bin")
    save_file({"a": torch.zeros(2)}, folder / "adapter_model.safetensors")
    cache = str(tmp_path / "hub/models--lmsys--vicuna-7b-v1.5/snapshots/0123456789abcdef")
    write(folder / "adapter_config.json", {"base_model_name_or_path": cache, "r": 128, "lora_alpha": 256})
    return folder


@pytest.fixture
def hf(llava, tmp_path):
    export_to_hf(llava, tmp_path / "tiny-hf")
    return tmp_path / "tiny-hf"


def parts(folder):
    """Front matter and text of a folder's card, without any path of this machine."""
    text = (folder / "README.md").read_text()
    start, front, body = text.split("---\n", 2)
    assert start == ""
    assert str(folder.parent) not in text and "/tmp" not in text and str(Path.home()) not in text
    assert not re.search(r"(?<![\w/.:])/[\w.-]+/", text), text
    return yaml.safe_load(front), body


def test_card_of_a_stage1_folder(stage1, tmp_path):
    results = write(tmp_path / "results.json", RESULTS)
    assert hub.write_card(stage1, results) == stage1 / "README.md"
    front, body = parts(stage1)
    assert front["library_name"] == "llava" and front["pipeline_tag"] == "image-text-to-text"
    assert front["tags"] == ["llava", "hacl"] and "license" not in front and "base_model" not in front
    (index,) = front["model-index"]
    assert index["name"] == "stage1"
    pope, chair = index["results"]
    assert pope["dataset"] == {"name": "POPE random", "type": "pope-random"}
    assert pope["metrics"] == [{"type": "f1", "value": 0.87}, {"type": "accuracy", "value": 0.9}]
    assert chair["metrics"] == [{"type": "objects", "value": 12}]
    for line in (
        "- Language model: llm", "- Vision tower: clip", "| steps | 2 |", "| epochs | 0.5 |",
        "| last logged loss | 3.25 |", "| last logged loss_lm | 2.125 |", "| highest logged learning rate | 0.001 |",
        "| hacl_queue_size | 16384 |",
        "| hacl_llava of the training | 0.0.7 |", "| POPE random | f1 | 0.87 | 0.85 to 0.89 |",
        "| POPE random | accuracy | 0.9 |  |", "--pretrain_mm_mlp_adapter", "2312.06968", "2304.08485",
        "set `mm_vision_tower` anew", "licence of the language model", "| CHAIR \\| captions | objects | 12 |  |",
    ):  # fmt: skip
        assert line in body, line
    assert "no HACL settings" not in body and "No evaluation" not in body
    hub.write_card(stage1)  # written anew: nothing is left of the results
    front, body = parts(stage1)
    assert "model-index" not in front and "No evaluation results were given" in body


def test_card_of_lora_names_a_cached_base_by_its_id(lora):
    hub.write_card(lora)
    front, body = parts(lora)
    assert front["base_model"] == "lmsys/vicuna-7b-v1.5" and "lora" in front["tags"]
    assert "| LoRA rank | 128 |" in body and '"lmsys/vicuna-7b-v1.5", "llava-lora"' in body


def test_card_of_a_whole_checkpoint_says_what_is_not_known(llava, tmp_path):
    folder = shutil.copytree(llava, tmp_path / "whole")
    hub.write_card(folder)
    front, body = parts(folder)
    assert front["tags"] == ["llava"] and "The files hold no HACL settings" in body
    assert "The files say nothing of it." in body


def test_base_models_that_are_no_ids_stay_out_of_the_front_matter(stage1, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/vicuna").mkdir(parents=True)
    for base, named in (("models/vicuna", None), ("./checkpoints/vicuna", None), ("checkpoints/vicuna", None),
                        ("C:\\data\\vicuna", None), ("lmsys/vicuna", "lmsys/vicuna")):  # fmt: skip
        hub.write_card(stage1, base=base)
        front, body = parts(stage1)
        assert front.get("base_model") == named and f"- Language model: {named or 'vicuna'}\n" in body


def test_an_export_gets_a_card_that_tells_of_the_training(mini, stage1, tmp_path, capsys):
    target = tmp_path / "out"
    results = write(tmp_path / "results.json", RESULTS)
    command = ["export", "--to", "hf", stage1, target, "--base", mini.llm, "--evaluation", results]
    assert main([str(a) for a in command]) == 0
    front, body = parts(target)
    assert front["library_name"] == "transformers" and front["tags"] == ["llava", "hacl"] and "model-index" in front
    assert "- Language model: llm" in body and "| hacl_queue_size | 16384 |" in body and "vllm serve out" in body
    assert main(["card", str(target)]) == 0  # which sees neither the source nor its settings
    front, body = parts(target)
    assert "| hacl_queue_size | 16384 |" not in body and "model-index" not in front
    assert not list(tmp_path.rglob("README.md.part"))


def run_code(code, folder):
    os.chdir(folder)
    exec(code, {})


@pytest.mark.parametrize("kind", ["hf", "llava", "stage1"])
def test_what_a_card_says_of_loading_works(kind, mini, llava, request, tmp_path):
    folder = request.getfixturevalue(kind) if kind != "llava" else shutil.copytree(llava, tmp_path / "llava-tiny")
    hub.write_card(folder, base=mini.llm)
    (code,) = re.findall(r"```python\n(.*?)```", parts(folder)[1], re.S)
    code = code.replace('"path/to/llm"', repr(str(mini.llm))).replace('"llava"\n', '"llava", device="cpu"\n')
    if kind == "hf" and tuple(int(x) for x in transformers.__version__.split(".")[:2]) < (4, 46):
        # such a processor takes no settings (docs/use.md)
        code = re.sub("processor = .*", "", code)
    code += "\nassert sum(p.numel() for p in model.parameters()) > 50_000"
    alone(run_code, code, folder.parent)


def test_somebody_elses_readme_is_kept(stage1, tmp_path, capsys):
    (stage1 / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    assert hub.write_card(stage1) is None
    assert main(["card", str(stage1)]) == 2
    assert "README.md: is not one that hacl_llava wrote, so it is kept; rename it" in capsys.readouterr().err
    assert (stage1 / "README.md").read_text() == "---\nlicense: mit\n---\nMine.\n"
    (stage1 / "README.md").unlink()
    hub.write_card(stage1)
    ours = (stage1 / "README.md").read_text()
    kept = re.sub("<!--.*?-->", "", ours, flags=re.S) + "My own words.\n"
    (stage1 / "README.md").write_text(kept)  # as the comment says
    assert hub.write_card(stage1) is None and (stage1 / "README.md").read_text() == kept
    form = "---\nlibrary_name: peft\n---\n" + "## About\n[More Information Needed]\n" * 20  # as peft leaves it
    (stage1 / "README.md").write_text(form)
    assert hub.write_card(stage1) and (stage1 / "README.md").read_text() == ours
    memory = '<!-- hacl_llava card: {"base": "vicuna", "hacl": {}}\n'  # as versions before this one wrote it
    (stage1 / "README.md").write_text(ours.replace("<!-- ", memory))
    assert hub.write_card(stage1) and (stage1 / "README.md").read_text() == ours


def test_what_is_no_checkpoint_gets_no_card(tmp_path, llava):
    with pytest.raises(CheckpointError, match="nowhere: is no folder; give a stage-1 folder"):
        hub.write_card(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty: is no checkpoint that is known here"):
        hub.write_card(tmp_path / "empty")
    folder = shutil.copytree(llava, tmp_path / "broken")
    (folder / "trainer_state.json").write_text('{"global_step"')
    with pytest.raises(CheckpointError, match="trainer_state.json: is not json"):
        hub.write_card(folder)
    assert not (folder / "README.md").exists() and not (folder / "README.md.part").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"task": "x"}', "expected a list of results like"),
        ("[]", "expected a list"),
        ("[1]", "result 0 is a int; expected is"),
        ('[{"task": "x", "metric": "f1", "value": 1, "split": "test"}]', r"unknown keys \['split'\]"),
        ('[{"metric": "f1", "value": 1}]', "has the task None, expected a line of text"),
        ('[{"task": "a\\nb", "metric": "f1", "value": 1}]', "has the task 'a.nb'"),
        ('[{"task": "x", "metric": "f1", "value": "0.8"}]', "has the value '0.8', expected a finite number"),
        ('[{"task": "x", "metric": "f1", "value": true}]', "has the value True"),
        ('[{"task": "x", "metric": "f1", "value": NaN}]', "has the value nan"),
        ('[{"task": "x", "metric": "f1", "value": 1%s}]' % ("0" * 400), "has the value 1000"),
        ('[{"task": "x", "metric": "f1", "value": 1, "interval": [1]}]', r"has the interval \[1\]"),
        ('[{"task": "x", "metric": "f1", "value": 1, "interval": [2, 1]}]', "begins above its end"),
        ('[{"task": "x", "metric": "f1", "value": 1}, {"task": "x", "metric": "f1", "value": 2}]', "1 repeats f1 of x"),
        ("[{]", "is not json"),
    ],
)
def test_evaluation_files_that_are_wrong_say_where(stage1, tmp_path, content, message):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(HaclError, match=f"results.json: .*{message}"):
        hub.write_card(stage1, tmp_path / "results.json")
    assert not (stage1 / "README.md").exists()


def test_mistakes_are_told_before_the_work(llava, tmp_path, capsys, monkeypatch):
    command = ["export", "--to", "hf", str(llava), str(tmp_path / "out")]
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for more, message in (
        (["--evaluation", str(tmp_path / "none.json")], "none.json: cannot be read"),
        (["--public"], "--public is for --push_to_hub"),
        (["--push_to_hub", "no-user"], "'no-user' is no name of a repository, expected USER/NAME"),
        (["--push_to_hub", "a/b/c"], "'a/b/c' is no name"),
        (["--push_to_hub", "me/x"], "HF_HUB_OFFLINE is set, so nothing can be pushed"),  # conftest.py sets it
    ):
        assert main(command + more) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and TOKEN not in error
    assert not (tmp_path / "out").exists()


# ---- pushing


@pytest.fixture
def pushed(monkeypatch, capsys):
    """A command against the stand-in, as in a process with that environment; the token is in no output."""
    from huggingface_hub import constants, utils

    def run(server, *command, HF_HUB_OFFLINE="0", **env):
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        url = server if isinstance(server, str) else server.url
        # what huggingface_hub reads from the environment once, when it is imported
        read = {"ENDPOINT": url, "HF_HUB_OFFLINE": HF_HUB_OFFLINE == "1", "HF_HUB_DISABLE_XET": True}
        read["HF_TOKEN_PATH"] = "/nonexistent/token"
        for name, value in read.items():
            monkeypatch.setattr(constants, name, value, raising=False)
        capsys.readouterr()
        status = main([str(word) for word in command])
        done = subprocess.CompletedProcess(command, status, *capsys.readouterr())
        assert TOKEN not in done.stdout + done.stderr
        return done

    reset = getattr(utils, "reset_sessions", None) or utils.close_session  # 0.x keeps one that was made offline
    reset()
    utils.disable_progress_bars()
    yield run
    utils.enable_progress_bars()
    reset()


def refused(done, message):
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert re.search(message, lines[0]), lines[0]


def test_a_push_is_private_and_has_the_same_bytes(stage1, pushed):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HOME": "/nonexistent"}
    command = [sys.executable, "-m", "hacl_llava.cli", "card", stage1, "--push_to_hub", "me/projector"]
    with HubServer() as server:
        environment["HF_ENDPOINT"] = server.url
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0 and TOKEN not in done.stdout + done.stderr, done.stderr
        assert f"{server.url}/me/projector: pushed, private." in done.stdout
        assert server.repos["me/projector"]["private"] is True
        received = server.files("me/projector")
        assert set(received) == MODEL
        assert all((stage1 / name).read_bytes() == data for name, data in received.items())
        assert not any(b"not for others" in data for data in [*received.values(), *server.objects.values()])
        asked = {path for _, path, token in server.log if token == f"Bearer {TOKEN}"}
        assert "/api/repos/create" in asked and any("/commit/" in path for path in asked)
        assert {path.split("/")[1] for method, path, token in server.log if not token and method != "GET"} == {"lfs"}
        # again, with other weights: the old ones go
        server.repos["me/projector"]["branches"]["main"]["model.safetensors.index.json"] = b"{}"
        server.repos["me/projector"]["branches"]["main"]["notes.txt"] = b"theirs"
        assert pushed(server, "card", stage1, "--push_to_hub", "me/projector").returncode == 0
        assert set(server.files("me/projector")) == MODEL | {"notes.txt"}


def test_an_export_is_pushed_in_shards_and_public_where_that_is_said(llava, tmp_path, pushed):
    with HubServer() as server:
        target = tmp_path / "out"
        command = ("export", "--to", "hf", llava, target, "--push_to_hub", "me/model", "--public")
        done = pushed(server, *command)
        assert done.returncode == 0 and "pushed, public." in done.stdout, done.stderr
        assert server.repos["me/model"]["private"] is False
        files = {str(p.relative_to(target)): p.read_bytes() for p in target.rglob("*") if p.is_file()}
        assert server.files("me/model") == files and {"model.safetensors", "README.md"} <= set(files)


def test_a_public_repository_is_refused_unless_told(stage1, pushed):
    with HubServer(public=["me/open"], private=["me/closed"]) as server:
        done = pushed(server, "card", stage1, "--push_to_hub", "me/open")
        refused(done, "me/open: is public, and a private one was wanted; nothing was uploaded. Say --public")
        assert server.files("me/open") == {} and not server.objects
        assert pushed(server, "card", stage1, "--push_to_hub", "me/open", "--public").returncode == 0  # control
        assert set(server.files("me/open")) == MODEL
        done = pushed(server, "card", stage1, "--push_to_hub", "me/closed", "--public")
        assert "pushed, private." in done.stdout and server.repos["me/closed"]["private"] is True  # keeps what it is


def test_somebody_elses_readme_is_pushed_as_it_is(stage1, tmp_path, pushed):
    (stage1 / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    with HubServer() as server:
        done = pushed(server, "card", stage1, "--push_to_hub", "me/x")
        assert done.returncode == 0 and "kept as it is" in done.stdout, done.stderr
        assert server.files("me/x")["README.md"] == b"---\nlicense: mit\n---\nMine.\n"
        results = write(tmp_path / "results.json", RESULTS)  # which would be shown nowhere
        refused(pushed(server, "card", stage1, "--push_to_hub", "me/y", "--evaluation", results), "so it is kept")
        (stage1 / "README.md").write_text("---\na: [\n---\nMine.\n")
        refused(pushed(server, "card", stage1, "--push_to_hub", "me/z"), "me/z: .*Invalid metadata in README.md")
        assert server.files("me/z") == {}


@pytest.mark.parametrize(
    "server, command, env, message",
    [
        (
            {"fail": {"/repos/create": 403}},
            "me/x",
            {},
            r"hub answers 403 \(.*\): the token may not write there; run `",
        ),
        (
            {"fail": {"/repos/create": 500}},
            "me/x",
            {},
            r"hub answers 500 \(.*told to fail.*\): give the command again",
        ),
        ({"fail": {"/lfs/": 403}}, "me/x", {}, "hub answers 403"),
        ({"fail": {"/commit/": 404}}, "me/x", {}, "hub answers 404.*no such user, organization or repository"),
        ({}, "me/x", {"HF_TOKEN": "hf_another"}, "me/x: the hub answers 401.*the token is not accepted"),
        ({}, "other/x", {}, "other/x: the hub answers 403 .*rights to create"),
        ({}, "me/x", {"HF_TOKEN": ""}, "there is no token for the hub; run `hf auth login`, or set HF_"),
        ({}, "me/x", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set, so nothing can be pushed; unset"),
        (None, "me/x", {}, r"me/x: the push failed \(\w+.*\); check the network, and HF_END"),
    ],
)
def test_refusals_are_one_line(stage1, pushed, server, command, env, message):
    with HubServer(**(server or {})) as hub_server:
        done = pushed(
            hub_server if server is not None else "http://127.0.0.1:9", "card", stage1, "--push_to_hub", command, **env
        )
        refused(done, f"error: .*{message}")
        assert "signature" not in done.stderr
        if env.get("HF_TOKEN") == "" or "HF_HUB_OFFLINE" in env:
            assert not hub_server.log  # nothing was asked


def test_signed_addresses_and_tokens_are_not_told():
    error = OSError(f"no route to host/path?X-Amz-Signature=secret for {TOKEN}\nand more")
    line = hub._why(error, "me/x", TOKEN)
    assert "secret" not in line and TOKEN not in line and "\n" not in line and "no route to host/path for ***" in line


def test_a_branch_is_made_and_filled(stage1, pushed):
    with HubServer() as server:
        assert pushed(server, "card", stage1).returncode == 0 and not server.log
        for _ in range(2):
            assert hub.push(stage1, "me/x", revision="v2") == (f"{server.url}/me/x", True)
        assert set(server.files("me/x", "v2")) == MODEL and server.files("me/x") == {}


def broken_folders(llava, stage1, lora, tmp_path):
    """(folder, what is said of it) for every way in which a folder may not be whole."""

    def copied(source, name):
        return shutil.copytree(source, tmp_path / "broken" / name)

    for source, name in ((llava, "model.safetensors"), (stage1, "mm_projector.bin"), (lora, "non_lora_trainables.bin"),
                         (stage1, "hacl_head.safetensors"), (lora, "adapter_model.safetensors")):  # fmt: skip
        folder = copied(source, f"{source.name}-with-half-of-{name}")
        (folder / name).write_bytes((source / name).read_bytes()[:-8])
        yield folder, f"{name}: cannot be read"
    for source, name in ((stage1, "config.json"), (lora, "non_lora_trainables.bin"), (lora, "config.json"),
                         (lora, "adapter_model.safetensors"), (llava, "tokenizer_config.json")):  # fmt: skip
        folder = copied(source, f"{source.name}-without-{name}")
        (folder / name).unlink()
        yield folder, f"has no {name}"
    yield copied(llava, "llava.part"), "llava.part: is half-written, by its name"
    tensors = load_file(llava / "model.safetensors")
    names = sorted(tensors)
    folder = copied(llava, "shards")
    (folder / "model.safetensors").unlink()
    for i in (1, 2):
        save_file({n: tensors[n] for n in names[i - 1 :: 2]}, folder / f"model-0000{i}-of-00002.safetensors")
    index = {n: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, n in enumerate(names)}
    write(folder / "model.safetensors.index.json", {"weight_map": index})
    hub._check_whole(folder)  # control: so far it is whole
    write(folder / "model.safetensors.index.json", {"weight_map": {**index, "model.more": index[names[0]]}})
    yield folder, "its index names model.more, which is in no shard"
    (folder / "model-00002-of-00002.safetensors").unlink()
    yield folder, "names model-00002-of-00002.safetensors, not there"


def test_what_is_not_whole_is_not_pushed(llava, stage1, lora, hf, tmp_path, monkeypatch):
    for folder in (llava, stage1, lora, hf):
        hub._check_whole(folder)  # control
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def asked(*_, **__):
        raise RuntimeError("asked the hub")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", asked)
    said = 0
    for folder, message in broken_folders(llava, stage1, lora, tmp_path):
        with pytest.raises(CheckpointError, match=re.escape(message)):
            hub.push(folder, "me/x")
        said += 1
    assert said == 13
    with pytest.raises(HaclError, match="asked the hub"):  # control: a whole one does
        hub.push(hf, "me/x")
