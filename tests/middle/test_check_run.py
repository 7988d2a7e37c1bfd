"""What ends a run before anything is loaded: each check refuses its case, says what to do, and lets the others pass."""

import dataclasses
import functools
import json
import re
import shutil
import types
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_loading import write_shards

from hacl_llava import check_run
from hacl_llava.check_run import CHECKS
from hacl_llava.compat import STATE_FILE
from hacl_llava.config import HaclConfig, HaclError
from hacl_llava.run import Run


def projector(width=64, features=64, layers=("",), prefix="model.mm_projector."):
    found = {}
    for layer in layers:
        found |= {f"{prefix}{layer}weight": torch.zeros(width, features), f"{prefix}{layer}bias": torch.zeros(width)}
        features = width
    return found


@pytest.fixture
def run(tmp_path, mini):
    """``run(stage, flag=value, ...)``: of a run in which nothing is wrong."""
    torch.save(projector(), tmp_path / "mm_projector.bin")

    def make(stage=1, **flags):
        model = {"model_name_or_path": str(mini.llm), "vision_tower": str(mini.clip), "use_hacl": stage == 1}
        model |= {"mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"}
        model["version"] = "plain" if stage == 1 else "v1"
        model |= {"tune_mm_mlp_adapter": stage == 1, "mm_projector_type": "linear", "mm_use_im_start_end": False}
        model["pretrain_mm_mlp_adapter"] = str(tmp_path / "mm_projector.bin") if stage == 2 else None
        training = {"output_dir": str(tmp_path / "out"), "n_gpu": 1, "fsdp": "", "deepspeed": None}
        training |= {"model_max_length": 512, "lora_enable": False, "freeze_mm_mlp_adapter": False}
        training |= {"gradient_checkpointing": True, "max_steps": -1, "num_train_epochs": 1.0, "learning_rate": 1e-3}
        groups = model, {"image_folder": str(tmp_path)}, training
        for group in groups:
            group |= {k: v for k, v in flags.items() if k in group or k.startswith("hacl_")}
        return Run(*(types.SimpleNamespace(**group) for group in groups), stage)

    return make


def checkpoint(folder, *files):
    folder.mkdir(parents=True)
    for name in ("trainer_state.json", *files):
        (folder / name).write_text("{}")


def test_a_run_in_which_nothing_is_wrong(run):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for stage in (1, 2):
            check_run.check_run(run(stage))
            check_run.check_run(run(stage, use_hacl=False, hacl_text_cache="no matter"))
        check_run.check_run(run(hacl_text_cache="new", deepspeed="zero_configs/zero2.json"))
    check_run.check_run(run(1, pretrain_mm_mlp_adapter=run(2).model.pretrain_mm_mlp_adapter))


CASES = [  # which check, stage, flags, what it says
    ("settings", 1, {"hacl_weight": -1}, "hacl_weight is -1, allowed is"),
    ("stage", 2, {"tune_mm_mlp_adapter": True}, "is stage 1: use scripts/pretrain_hacl.py"),
    ("vision_tower", 1, {"vision_tower": None}, "--use_hacl contrasts images: give --vision_tower"),
    ("vision_tower", 1, {"vision_tower": None, "use_hacl": False}, "no mm_projector is trained: give --vision_tower"),
    ("name_of_an_mpt_model", 1, {"model_name_or_path": "my-mpt-llama"}, "give the folder another name"),
    ("name_of_an_mpt_model", 2, {"model_name_or_path": "attempt-3"}, "give the folder another name"),
    ("something_to_learn", 1, {"num_train_epochs": 0.0}, "--num_train_epochs 0.0: not a single step"),
    ("something_to_learn", 2, {"learning_rate": 0.0}, "--learning_rate 0.0: nothing would be learnt"),
    ("something_to_learn", 1, {"freeze_mm_mlp_adapter": True}, "leave the second out"),
    ("deepspeed_config", 1, {"deepspeed": "no.json"}, "--deepspeed no.json: is no file"),
    ("image_features", 1, {"mm_vision_select_feature": "cls"}, "allowed are patch and cls_patch"),
    ("image_features", 2, {"mm_vision_select_layer": -9}, "--mm_vision_select_layer -9: the vision tower has"),
    ("tower", 1, {"vision_tower": "me/clip"}, "is no folder, and LLaVA takes names on the hub of openai/"),
    ("template", 2, {"version": "llava_llama_3"}, "--version llava_llama_3: is no template of this LLaVA, .+vicuna_v1"),
    ("processes", 1, {"n_gpu": 2}, "one process was started for 2 GPUs.+deepspeed, torchrun"),
    ("processes", 1, {"fsdp": "full_shard"}, "stage 1 under FSDP cannot be saved"),
    ("image_folder", 1, {"image_folder": "nowhere"}, "--image_folder nowhere: is no folder"),
    ("projector", 2, {"pretrain_mm_mlp_adapter": "nowhere.bin"}, "nowhere.bin: is no file"),
    ("projector", 1, {"pretrain_mm_mlp_adapter": "nowhere.bin"}, "nowhere.bin: is no file"),
    ("text_cache", 1, {"hacl_text_cache": "README.md"}, "--hacl_text_cache README.md: is a file"),
    ("text_cache", 1, {"hacl_text_cache": "c", "mm_use_im_start_end": True}, "frozen, and in this run it trains"),
    ("text_cache", 1, {"hacl_text_cache": "c", "lora_enable": True}, "frozen, and in this run it trains"),
    ("text_cache", 1, {"hacl_text_cache": "c", "deepspeed": "zero_configs/zero3.json"}, "give .+/zero2.json, or leave"),
    ("checkpoint_layers", 1, {"hacl_checkpoint_layers": "3"}, "has 2 layers; allowed is all, auto or .+ 0 to 2"),
    (
        *("checkpoint_layers", 1, {"hacl_checkpoint_layers": "auto", "gradient_checkpointing": False}),
        "give --gradient_checkpointing True too",
    ),
]


@pytest.mark.parametrize("name, stage, flags, message", CASES)
def test_what_is_wrong_is_refused_by_its_check_alone(run, name, stage, flags, message):
    with pytest.raises(HaclError, match=message):
        check_run.check_run(run(stage, **flags))
    assert [check.__name__ for check in CHECKS if check(run(stage, **flags))] == [name]


def changed(folder, copy, config=None, tensors=lambda found: found):
    """A copy of a model's folder with another config.json or other tensors."""
    shutil.copytree(folder, copy)
    old = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(old | (config or {})))
    (file,) = copy.glob("*.safetensors")
    save_file(tensors(load_file(file)), file, {"format": "pt"})
    return str(copy)


def without(part):
    return lambda found: {k: v for k, v in found.items() if part not in k}


MODELS = [  # config, tensors, what is said of the language model
    ({"model_type": "qwen2"}, dict, "is of the type 'qwen2'.+random weights"),
    ({"model_type": "mpt"}, dict, "is of the type 'mpt'.+give a Llama-shaped model"),
    (
        {"model_type": "llava", "text_config": {}},
        dict,
        "is in Hugging Face's format; convert it first: hacl-llava export",
    ),
    (
        {},
        without("layers.1.mlp.up_proj"),
        "lacks 1 tensors .+ 'model.layers.1.mlp.up_proj.weight', which would be random",
    ),
    ({"num_hidden_layers": 3}, dict, "lacks 9 tensors .+'model.layers.2"),
    ({"num_hidden_layers": 1}, dict, "holds 9 tensors that its config.json does not know"),
    ({"intermediate_size": 100}, dict, r"'model.layers.0.mlp.gate_proj.weight' has the shape"),
    ({}, lambda found: {f"transformer.{k}": v for k, v in found.items()}, "lacks"),
]


@pytest.mark.parametrize("config, tensors, message", MODELS)
def test_a_language_model_that_is_not_what_it_is_taken_for(run, mini, tmp_path, config, tensors, message):
    path = changed(mini.llm, tmp_path / "llm", config, tensors)
    for stage in (1, 2):
        with pytest.raises(HaclError, match=f"--model_name_or_path {path}: {message}"):
            check_run.check_run(run(stage, model_name_or_path=path))


SHAPES = {  # as published: what of config.json is not Vicuna's
    "vicuna": ("LlamaForCausalLM", {"torch_dtype": "float16", "max_sequence_length": 2048, "pad_token_id": 0}),
    "llama 2": ("LlamaForCausalLM", {"pretraining_tp": 1, "rope_scaling": None, "attention_bias": False}),
    "mistral": ("MistralForCausalLM", {"num_key_value_heads": 2, "sliding_window": 4096, "rope_theta": 10000.0}),
    "tinyllama": ("LlamaForCausalLM", {"num_key_value_heads": 1, "max_position_embeddings": 2048}),
    "tied": ("LlamaForCausalLM", {"num_key_value_heads": 2, "tie_word_embeddings": True, "head_dim": 16}),
}


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_models_as_they_are_published_are_not_refused(run, mini, tmp_path, shape, parts, safe):
    """And LLaVA's class, which is what trains, finds all of its weights in them."""
    import transformers

    from hacl_llava.compat import LlavaLlamaForCausalLM

    name, settings = SHAPES[shape]
    folder = shutil.copytree(mini.llm, tmp_path / "llm", ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((mini.llm / "config.json").read_text()) | settings
    config |= {"architectures": [name], "model_type": name.removesuffix("ForCausalLM").lower()}
    (folder / "config.json").write_text(json.dumps(config))
    cls = getattr(transformers, name)
    model = cls(cls.config_class.from_dict(config)).half()
    tensors = {k: v for k, v in model.state_dict().items() if not (shape == "tied" and k.startswith("lm_head"))}
    if shape == "llama 2" and not safe:  # as transformers of those days saved it
        tensors |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
    names = sorted(tensors)
    write_shards(folder, tensors, [names[::2], names[1::2]] if parts == 2 else [names], safe)
    for stage in (1, 2):
        assert list(check_run.problems(run(stage, model_name_or_path=str(folder)))) == []
    if parts == 2 and shape in ("mistral", "tied"):
        options = {"torch_dtype": None, "output_loading_info": True}
        _, info = LlavaLlamaForCausalLM.from_pretrained(str(folder), **options)
        assert not info["missing_keys"] and not info["mismatched_keys"]


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: shard(f)[1].unlink(), "names model-00002-of-00002.safetensors, not there; copy them all"),
        (lambda f: cut(shard(f)[1]), "model-00002-of-00002.safetensors: cannot be read"),
        (lambda f: shard(f)[1].write_bytes(shard(f)[0].read_bytes()), "lacks the tensor .+ that the index names in it"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
        (lambda f: cut(f / "model.safetensors"), "model.safetensors: cannot be read"),
        (
            lambda f: (f / "model.safetensors").write_text("version https://git-lfs"),
            "model.safetensors: cannot be read",
        ),
        (lambda f: (f / "config.json").write_text("{"), "config.json: "),
        (lambda f: settings_of(f, quantization_config={"quant_method": "gptq"}), "is quantized .gptq., which cannot"),
        (lambda f: settings_of(f, vocab_size=9), "has the shape"),
        (lambda f: settings_of(f, hidden_act="none"), "a config.json that this transformers makes no model of"),
        (lambda f: settings_of(f, rope_scaling={"type": "none"}), "a config.json that this transformers makes no mod"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "holds a LoRA beside a whole model, which transfor"),
        (
            lambda f: (f / "generation_config.json").write_text("[]"),
            "a generation_config.json that",
        ),
        (
            lambda f: settings_of(f, mm_vision_tower="x", mm_projector_type="mlp2x_gelu"),
            "has a projector that is mlp2x",
        ),
        (lambda f: settings_of(f, mm_vision_tower="x", mm_hidden_size=9), "its projector takes 9 features of a patch"),
    ],
    ids=range(15),
)
def test_a_damaged_language_model(run, mini, tmp_path, damage, message):
    folder = shutil.copytree(mini.llm, tmp_path / "llm")
    damage(folder)
    (tmp_path / "link").symlink_to(folder)
    for stage, name in ((1, folder), (2, tmp_path / "link")):
        found = list(check_run.problems(run(stage, model_name_or_path=str(name))))
        assert found and re.search(message, found[0]), found
        assert len(found) == 1 or "config.json" in message


def shard(folder):
    """Its weights in two files with an index."""
    if (folder / "model.safetensors").exists():
        sharded(folder)
    return sorted(folder.glob("model-*"))


def sharded(folder, safe=True):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    write_shards(folder, tensors, [sorted(tensors)[::2], sorted(tensors)[1::2]], safe)


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def settings_of(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_tower_that_cannot_prepare_images(run, mini, tmp_path):
    folder = shutil.copytree(mini.clip, tmp_path / "clip")
    file = folder / "preprocessor_config.json"
    before = json.loads(file.read_text())
    file.write_text(json.dumps(before | {"crop_size": {"height": 7, "width": 7}}))
    assert "makes images of 7 pixels, and the tower's config.json says" in check_run.image_features(
        run(vision_tower=str(folder))
    )
    file.unlink()
    (problem,) = check_run.problems(run(vision_tower=str(folder)))
    assert "has no preprocessor_config.json, by which images are prepared" in problem


def test_language_models_that_are_fine(run, mini, tmp_path):
    assert check_run.language_model(run(model_name_or_path="lmsys/vicuna-7b-v1.5")) is None  # on the hub
    beside = {
        "model.mm_projector.0.weight": torch.zeros(64, 32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    }
    for kind in ("llava_llama", "mistral"):
        path = changed(mini.llm, tmp_path / kind, {"model_type": kind, "mm_vision_tower": "x"}, lambda f: f | beside)
        assert check_run.language_model(run(model_name_or_path=path)) is None
    tied = changed(mini.llm, tmp_path / "tied", {"tie_word_embeddings": True}, without("lm_head"))
    assert check_run.language_model(run(model_name_or_path=tied)) is None
    both = changed(mini.llm, tmp_path / "both", {"tie_word_embeddings": True})
    assert check_run.language_model(run(model_name_or_path=both)) is None
    (tmp_path / "lora").mkdir()
    assert "has no config.json" in check_run.language_model(run(model_name_or_path=str(tmp_path / "lora")))
    (tmp_path / "lora/adapter_config.json").write_text("{}")
    assert "is a LoRA and no whole model; merge it" in check_run.language_model(
        run(model_name_or_path=str(tmp_path / "lora"))
    )


@pytest.mark.parametrize(
    "config, tensors, message",
    [
        ({"model_type": "siglip_vision_model"}, dict, "is of the type 'siglip_vision_model'.+give a CLIP model"),
        ({}, without("patch_embedding"), "lacks 1 tensors"),
        ({"hidden_size": 48}, dict, "has the shape"),
        ({}, lambda found: found | {"text_model.x": torch.zeros(1)}, None),  # whole CLIP
    ],
)
def test_a_vision_tower_that_is_not_what_it_is_taken_for(run, mini, tmp_path, config, tensors, message):
    path = changed(mini.clip, tmp_path / "clip", config, tensors)
    problem = check_run.tower(run(vision_tower=path))
    assert problem is None if message is None else re.search(message, problem)
    assert check_run.tower(run(vision_tower="openai/clip-vit-large-patch14-336")) is None


@pytest.mark.parametrize(
    "tensors, flags, message",
    [
        (projector(96), {}, "projects to 96 features, .* has the hidden_size 64"),
        (projector(features=48), {}, "takes 48 features of a patch, --vision_tower .* gives 64"),
        ({"something": torch.zeros(1)}, {}, "holds no mm_projector"),
        (projector(prefix=""), {}, "holds no mm_projector"),  # taken out by hand
        (projector(), {"mm_projector_type": "mlp2x_gelu"}, "is linear; --mm_projector_type is mlp2x_gelu"),
        (projector(layers=("0.", "2.")), {}, "is mlp2x_gelu; --mm_projector_type is linear"),
        (
            projector(layers=("0.", "2.", "4.")),
            {"mm_projector_type": "mlp2x_gelu"},
            "is mlp3x_gelu; --mm_projector_type",
        ),
        (projector(), {"mm_use_im_start_end": True}, "no embeddings of <im_start>.+--mm_use_im_start_end False"),
        (projector(layers=("0.", "2.")), {"mm_projector_type": "mlp2x_gelu"}, None),
        (projector(prefix="module.model.mm_projector."), {}, None),
        (projector(prefix="base_model.model.model.mm_projector."), {}, None),
        (projector() | {"model.image_newline": torch.zeros(64)}, {}, None),
        (projector() | {"model.embed_tokens.weight": torch.zeros(2, 64)}, {"mm_use_im_start_end": True}, None),
    ],
)
def test_a_projector_that_is_none_or_another_kind(run, tmp_path, tensors, flags, message):
    torch.save(tensors, tmp_path / "other.bin")
    for stage in (1, 2):
        other = run(stage, pretrain_mm_mlp_adapter=str(tmp_path / "other.bin"), **flags)
        assert check_run.projector(other) is None if message is None else re.search(message, check_run.projector(other))
    (tmp_path / "other.safetensors").touch()
    safe = check_run.projector(run(2, pretrain_mm_mlp_adapter=str(tmp_path / "other.safetensors")))
    assert "is safetensors, and LLaVA reads it with torch.load; give a .bin" in safe
    (tmp_path / "other.bin").write_bytes(b"no weights")
    assert "other.bin" in check_run.projector(run(2, pretrain_mm_mlp_adapter=str(tmp_path / "other.bin")))


def test_an_output_folder_with_another_kind_of_run(run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.write_text("")
    assert "is a file" in check_run.output_folder(run())
    out.unlink()
    checkpoint(out / "checkpoint-3", "mm_projector.bin")
    assert "is not of a stage 1 that can be gone on from" in check_run.earlier_stage1(run(1))
    assert check_run.earlier_stage1(run(2)) is None and "not of stage 2" in check_run.earlier_stage2(run(2))
    (out / "checkpoint-3" / STATE_FILE).write_text("")
    assert "was begun with --use_hacl False; give that to go on" in check_run.earlier_stage1(run(1))
    assert check_run.earlier_stage1(run(1, use_hacl=False)) is None
    begun = HaclConfig(prompt="it's a", queue_size=7, representation="prompt")
    save_file({}, out / "checkpoint-3/hacl_head.safetensors", {"hacl": json.dumps(begun.to_dict())})
    assert "begun with --use_hacl True; " in check_run.earlier_stage1(run(1, use_hacl=False))
    flags = {f"hacl_{k}": v for k, v in begun.to_dict().items()}
    assert check_run.earlier_stage1(run(1, **flags)) is None
    assert check_run.earlier_stage1(run(1, **flags | {"hacl_queue_size": 0})) is None  # `resume.differences` says it
    assert begun.flags_to_go_on(dataclasses.replace(begun, prompt="a word")) == """--hacl_prompt 'it'"'"'s a'"""
    at_eos = HaclConfig()  # for which the prompt is of no matter
    assert at_eos.flags_to_go_on(dataclasses.replace(at_eos, prompt="a word")) is None
    said = check_run.earlier_stage1(run(1, **flags | {"hacl_queue_size": 0, "hacl_prompt": "a word", "hacl_weight": 2}))
    assert """ --hacl_weight 1.0 --hacl_prompt 'it'"'"'s a' --hacl_queue_size 7; give that to go on""" in said
    checkpoint(out / "checkpoint-4", "adapter_config.json", "rng_state_0.pth", "rng_state_1.pth")
    lora = {"lora_enable": True}
    (out / "checkpoint-3").rename(tmp_path / "away")
    assert "is of a LoRA run, and cannot be gone on from" in check_run.earlier_stage2(run(2))
    assert check_run.earlier_stage2(run(2, **lora)) is None
    assert "was saved without DeepSpeed" in check_run.earlier_stage2(run(2, **lora, deepspeed="zero2.json"))
    (out / "checkpoint-4/global_step4").mkdir()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "was saved by 2 ranks" in check_run.earlier_stage2(run(2, **lora, deepspeed="zero2.json"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert check_run.earlier_stage2(run(2, **lora, deepspeed="zero2.json")) is None


def test_what_is_allowed_and_advised_against(run):
    with pytest.warns(UserWarning, match="the paper's ablation found"):
        check_run.check_run(run(2, use_hacl=True))
    with pytest.warns(UserWarning, match="--model_max_length 9000: .+ was made for 2048 tokens"):
        check_run.check_run(run(2, model_max_length=9000))
    with pytest.warns(UserWarning, match="starts with a random projector"):
        check_run.check_run(run(2, pretrain_mm_mlp_adapter=None))


# --- names on the hub -------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the hub that holds nothing yet, and an empty cache."""
    import huggingface_hub.file_download
    import huggingface_hub.hf_api
    from hub_server import HubServer

    public = ["me/llm", "me/shards", "me/bin", "me/wide", "openai/clip"]
    with HubServer(public, private=["me/gated"]) as server:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        address = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        for module in (huggingface_hub.constants, huggingface_hub.file_download):  # older and newer ones
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", address, raising=False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
        renew = getattr(huggingface_hub.utils._http, "reset_sessions", lambda: None)  # older ones keep being offline
        renew()
        yield server
        renew()


def publish(hub, name, folder, leave_out=()):
    files = hub.repos[name]["branches"]["main"]
    files.update({f.name: f.read_bytes() for f in folder.iterdir() if f.name not in leave_out})
    return files


def test_a_name_on_the_hub_is_checked_by_its_headers(run, mini, tmp_path, hub, capsys):
    publish(hub, "me/llm", mini.llm)
    publish(hub, "openai/clip", mini.clip)
    named = {"model_name_or_path": "me/llm", "vision_tower": "openai/clip"}
    for stage in (1, 2):
        assert list(check_run.problems(run(stage, **named))) == []
    fetched = [path.rsplit("/", 1)[1] for method, path, _ in hub.log if method == "GET" and "/resolve/" in path]
    assert set(fetched) == {"config.json", "model.safetensors"}  # of these a header alone: nothing is in the cache
    cached = {p.name for p in (tmp_path / "cache").rglob("*") if not p.is_dir() and p.parent.name != "blobs"}
    assert "config.json" in cached and "model.safetensors" not in cached
    config = json.loads((mini.llm / "config.json").read_text())
    shards = publish(hub, "me/shards", mini.llm, ["model.safetensors"])
    shards["pytorch_model.bin.index.json"] = json.dumps({"weight_map": {"lm_head.weight": "a.bin"}}).encode()
    other = publish(hub, "me/bin", mini.llm, ["model.safetensors"])
    other["pytorch_model.bin"] = b"of which nothing is read"
    wide = publish(hub, "me/wide", mini.llm)
    wide["config.json"] = json.dumps(config | {"num_hidden_layers": 3}).encode()
    for name, said in {
        "me/wide": "lacks 9 tensors that its config.json asks for, as 'model.layers.2",
        "me/shards": "lacks 20 tensors",
        "me/nothing": "is no folder, and on the hub it is not there; give",
        "me/gated": "on the hub it asks for leave",
        "no/such/folder": "is no folder, and on the hub it is not there; give",
    }.items():
        (problem,) = check_run.problems(run(model_name_or_path=name, vision_tower=str(mini.clip)))
        assert problem.startswith(f"--model_name_or_path {name}: ") and said in problem
    capsys.readouterr()
    assert list(check_run.problems(run(model_name_or_path="me/bin"))) == []
    line = (
        "HACL: --model_name_or_path me/bin: not checked, for it has weights in one .bin file, which is looked at once"
    )
    assert line in capsys.readouterr().out
    assert "projects to 96 features, me/llm has the hidden_size 64" in check_run.projector(
        run(2, **named, pretrain_mm_mlp_adapter=str(_saved(tmp_path / "wide.bin", projector(96))))
    )


def _saved(path, tensors):
    torch.save(tensors, path)
    return path


def test_without_a_network_the_cache_is_checked_and_the_rest_named(run, mini, tmp_path, hub, monkeypatch, capsys):
    import huggingface_hub

    publish(hub, "me/llm", mini.llm)
    for name in hub.files("me/llm"):
        huggingface_hub.hf_hub_download("me/llm", name)
    alone = functools.partial(huggingface_hub.hf_hub_download, local_files_only=True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", alone)
    asked = run(model_name_or_path="me/llm", vision_tower="openai/clip")
    assert list(check_run.problems(asked)) == [] and asked.llm.folder
    assert "HACL: --vision_tower openai/clip: not checked, for it is not on this machine" in capsys.readouterr().out
    file = next((tmp_path / "cache").rglob("snapshots/*/model.safetensors"))
    tensors = without("layers.1.mlp.up_proj")(load_file(file))
    file.unlink()
    save_file(tensors, file, {"format": "pt"})
    assert "me/llm: lacks 1 tensors" in check_run.language_model(run(model_name_or_path="me/llm"))
