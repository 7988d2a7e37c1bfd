"""Checkpoints of every published layout, in tiny replicas: loaded, answering, saved, loaded by stock LLaVA."""

import importlib.util
import json
import os
import pickle
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from conftest import load
from PIL import Image
from safetensors.torch import load_file, save_file
from workers import alone

from hacl_llava.checkpoints.convert import export_to_hf, import_from_hf
from hacl_llava.checkpoints.load import load_pretrained, merge
from hacl_llava.common.weights import CheckpointError, Weights
from hacl_llava.config import HaclConfig, HaclError
from hacl_llava.miniature import models
from hacl_llava.trainer import save_head

QUESTION = "USER: <image>\nIs there a red circle in the image? ASSISTANT:"


def answer(loaded, image):
    from llava.mm_utils import process_images, tokenizer_image_token

    tokenizer, model, processor, _ = loaded
    pixels = process_images([Image.open(image).convert("RGB")], processor, model.config)
    ids = tokenizer_image_token(QUESTION, tokenizer, return_tensors="pt")[None]
    with torch.no_grad():
        out = model.generate(ids, images=pixels.to(model.dtype), do_sample=False, max_new_tokens=8)
    return out[0, -8:].tolist()


def _stock_answer(path, image, base, name):
    import hacl_llava.compat  # noqa: F401, I001
    from llava.model.builder import load_pretrained_model

    loaded = load_pretrained_model(path, base or None, name, device_map="cpu", device="cpu")
    loaded[1].float()
    loaded[1].get_vision_tower().float()
    return answer(loaded, image)


def stock_answer(path, image, base="", name="llava-tiny"):
    """From stock LLaVA's load_pretrained_model, in its own process, in float32 after loading in float16."""
    return alone(_stock_answer, str(path), str(image), str(base), name)


@pytest.fixture(scope="module")
def image(mini, records):
    return mini.images / records[0]["image"]


@pytest.fixture(scope="module")
def stage2(mini, tmp_path_factory):
    """A model whose weights are float16 numbers, so that LLaVA's loader (float16) and ours (float32) see the same."""
    torch.manual_seed(3)
    model, tokenizer = load(mini, stock=True)
    model.half().float()
    model.config.image_aspect_ratio = "pad"
    model.config.mm_use_im_patch_token = model.config.mm_use_im_start_end = False
    model.config.unfreeze_mm_vision_tower = False
    model.generation_config.do_sample = False
    return model, tokenizer


def published(
    stage2, mini, folder, *, kind="llava", sharded=True, safe=False, dtype=torch.float16, extra=None, **config
):
    """A folder as liuhaotian/llava-v1.5-7b is published: config.json of LLaVA 1.1 to 1.5 (model_type "llava" until
    1.1.3, then "llava_llama"), pytorch_model-0000N-of-0000M.bin with an index, vision tower included, tokenizer.model
    (https://huggingface.co/liuhaotian/llava-v1.5-7b/tree/main, docs/MODEL_ZOO.md of LLaVA)."""
    model, tokenizer = stage2
    folder.mkdir(parents=True)
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes((mini.llm / "tokenizer.model").read_bytes())
    values = model.config.to_dict()
    values |= {"architectures": ["LlavaLlamaForCausalLM"], "model_type": kind, "torch_dtype": "float16"}
    values |= {"mm_vision_tower": str(mini.clip), "transformers_version": "4.31.0", **config}
    for key in ("dtype", "hacl", "unfreeze_mm_vision_tower" if "unfreeze_mm_vision_tower" not in config else ""):
        values.pop(key, None)
    (folder / "config.json").write_text(json.dumps(values))
    state = {k: v.to(dtype) for k, v in model.state_dict().items()}
    tower = "model.vision_tower.vision_tower."
    state = {  # transformers of those days had vision_model in between, and the position ids as a buffer
        k if not k.startswith(tower) or "vision_model." in k else k.replace(tower, tower + "vision_model."): v
        for k, v in state.items()
    }
    state[f"{tower}vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    state |= extra or {}
    names = sorted(state)
    write_shards(folder, state, [names[::2], names[1::2]] if sharded else [names], safe)
    return folder


def write_shards(folder, state, parts, safe):
    stem, end = ("model", "safetensors") if safe else ("pytorch_model", "bin")
    where = {}
    for i, part in enumerate(parts):
        file = f"{stem}-{i + 1:05d}-of-{len(parts):05d}.{end}" if len(parts) > 1 else f"{stem}.{end}"
        held = {k: state[k].contiguous() for k in part}
        save_file(held, folder / file, metadata={"format": "pt"}) if safe else torch.save(held, folder / file)
        where.update(dict.fromkeys(part, file))
    if len(parts) > 1:
        index = {"metadata": {"total_size": 1}, "weight_map": where}
        (folder / f"{stem}.{end}.index.json").write_text(json.dumps(index))


def refused(folder, match, base=None, exported=False, **config):
    """In one line, with other values in config.json (None: without); exporting says the same, and writes nothing."""
    file = Path(folder) / "config.json"
    before = file.read_text() if config else ""
    if config:
        values = {**json.loads(before), **config}
        file.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    with pytest.raises(CheckpointError, match=match) as error:
        load_pretrained(folder, base, device="cpu")
    assert "\n" not in str(error.value)
    if exported:
        target = Path(folder).parent / "exported"
        with pytest.raises(CheckpointError, match=match):
            export_to_hf(folder, target, base)
        assert not target.exists() and not target.with_name("exported.part").exists()
    if config:
        file.write_text(before)


LAYOUTS = {
    "1.5 as published": {"kind": "llava"},
    "newer config": {"kind": "llava_llama"},
    "safetensors": {"kind": "llava_llama", "safe": True},
    "one file": {"kind": "llava", "sharded": False},
    "bfloat16": {"kind": "llava_llama", "safe": True, "dtype": torch.bfloat16},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_load_answer_save_and_stock_loads(mini, stage2, image, tmp_path, layout):
    folder = published(stage2, mini, tmp_path / "llava-v1.5-tiny", **LAYOUTS[layout])
    loaded = load_pretrained(folder, device="cpu")
    assert type(loaded.model).__name__ == "LlavaLlamaForCausalLM" and loaded.model.dtype == torch.float32
    assert not loaded.model.training and loaded.context_len == 2048
    want = answer(loaded, image)
    # control: another projector gives another answer, so that the weights are really those of the file
    projector = loaded.model.get_model().mm_projector
    assert torch.equal(projector[0].weight, stage2[0].get_model().mm_projector[0].weight.to(LAYOUTS[layout].get(
        "dtype", torch.float16)).float())  # fmt: skip
    loaded.model.save_pretrained(tmp_path / "llava-saved")
    loaded.tokenizer.save_pretrained(tmp_path / "llava-saved")
    assert answer(load_pretrained(tmp_path / "llava-saved", device="cpu"), image) == want
    if layout in ("1.5 as published", "safetensors"):
        assert stock_answer(tmp_path / "llava-saved", image) == want
    if layout == "safetensors":
        assert stock_answer(folder, image) == want
    with torch.no_grad():
        projector[2].bias.add_(torch.randn(projector[2].bias.shape, generator=torch.Generator().manual_seed(1)) * 30)
    assert answer(loaded, image) != want


def test_13b_shapes_and_old_linear_projector(mini, stage2, image, tmp_path):
    """Grouped heads and other widths come from config.json alone; LLaVA 1's projector is one linear layer, with
    tokens around the image whose rows lie in mm_projector.bin."""
    base, tokenizer = load(mini, stock=True)
    folder = tmp_path / "llava-pretrain-v1"
    folder.mkdir()
    values = base.config.to_dict() | {"model_type": "llava", "mm_projector_type": "linear", "mm_use_im_start_end": True}
    values |= {"vocab_size": base.config.vocab_size + 2, "mm_use_im_patch_token": False}
    values["mm_vision_tower"] = str(mini.clip)
    (folder / "config.json").write_text(json.dumps(values))
    torch.manual_seed(0)
    rows = torch.randn(2, base.config.hidden_size).half()
    weight = torch.randn(base.config.hidden_size, base.config.mm_hidden_size).half()
    state = {
        "model.mm_projector.weight": weight,
        "model.mm_projector.bias": torch.zeros(base.config.hidden_size).half(),
    }
    torch.save({**state, "model.embed_tokens.weight": rows}, folder / "mm_projector.bin")
    loaded = load_pretrained(folder, mini.llm, device="cpu")
    assert torch.equal(loaded.model.get_model().mm_projector.weight, weight.float())
    assert loaded.tokenizer.convert_tokens_to_ids("<im_end>") == base.config.vocab_size + 1
    assert torch.equal(loaded.model.get_input_embeddings().weight[-2:], rows.float())
    assert len(answer(loaded, image)) == 8


def test_a_token_that_no_file_has_is_the_mean_of_the_others(mini, stage2, tmp_path):
    """A config that says nothing of <im_patch> gets it added, as in LLaVA's loader; never at random."""
    model, tokenizer = stage2
    model.save_pretrained(tmp_path / "llava-x")
    tokenizer.save_pretrained(tmp_path / "llava-x")
    values = json.loads((tmp_path / "llava-x/config.json").read_text())
    del values["mm_use_im_patch_token"]
    (tmp_path / "llava-x/config.json").write_text(json.dumps(values))
    loaded = load_pretrained(tmp_path / "llava-x", device="cpu")
    assert loaded.tokenizer.convert_tokens_to_ids("<im_patch>") == len(tokenizer)
    for layer in (loaded.model.get_input_embeddings(), loaded.model.get_output_embeddings()):
        assert layer.weight.shape[0] == len(tokenizer) + 1
        torch.testing.assert_close(layer.weight[-1], layer.weight[:-1].mean(0), rtol=0, atol=0)


def test_projector_with_its_base_and_a_wrong_base(mini, stage2, image, tmp_path):
    model, _ = stage2
    folder = tmp_path / "llava-projector"
    folder.mkdir()
    model.config.save_pretrained(folder)
    state = {f"model.mm_projector.{k}": v.half() for k, v in model.get_model().mm_projector.state_dict().items()}
    torch.save(state, folder / "mm_projector.bin")
    want = answer(load_pretrained(folder, mini.llm, device="cpu"), image)
    assert stock_answer(folder, image, mini.llm) == want
    refused(folder, "a projector alone; give its base by --base", exported=True)
    models.make_llm(tmp_path / "other", layers=3)
    refused(folder, "num_hidden_layers 3, .* was trained with 2", tmp_path / "other", exported=True)
    torch.save({**state, "model.mm_projector.0.weight": torch.zeros(64, 65)}, folder / "mm_projector.bin")
    refused(folder, r"mm_projector.0.weight' has the shape \[64, 65\], not the \[64, 64\]", mini.llm, exported=True)
    torch.save([torch.zeros(1)], folder / "mm_projector.bin")
    refused(folder, "something else than tensors by name", mini.llm, exported=True)


def lora_folder(stage2, mini, folder, base=None):
    """As LLaVA's train() leaves it, from a model with random adapters."""
    import peft
    from llava.train.train import find_all_linear_names, get_peft_state_maybe_zero_3

    base_model = load_pretrained(base, device="cpu").model if base else load(mini, stock=True, frozen=False)[0]
    names = find_all_linear_names(base_model)
    torch.manual_seed(8)
    inner = base_model.get_model()
    tower, inner.vision_tower = inner.vision_tower, None  # LLaVA's train() adds the tower after the adapters
    model = peft.get_peft_model(
        base_model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=names, task_type="CAUSAL_LM")
    )
    inner.vision_tower = tower
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_" in n:
                p.copy_((torch.randn(p.shape) * 0.2).half())
            elif "mm_projector" in n:
                p.copy_((p * 1.5).half())
    model.config.mm_use_im_patch_token = model.config.mm_use_im_start_end = False
    model.config.save_pretrained(folder)
    model.save_pretrained(folder, state_dict=get_peft_state_maybe_zero_3(model.named_parameters(), "none"))
    others = {n: p.detach().clone() for n, p in model.named_parameters() if "mm_projector" in n}
    torch.save(others, folder / "non_lora_trainables.bin")
    return model


@pytest.mark.parametrize("on_llava", [False, True])
def test_lora_with_its_other_weights(mini, stage2, image, tmp_path, on_llava):
    base = published(stage2, mini, tmp_path / "llava-base", safe=True, kind="llava_llama") if on_llava else None
    folder = tmp_path / "llava-tiny-lora"
    trained = lora_folder(stage2, mini, folder, base)
    if on_llava:  # as older peft wrote it, and liuhaotian/llava-v1.5-7b-lora is published
        torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
        (folder / "adapter_model.safetensors").unlink()
    loaded = load_pretrained(folder, base or mini.llm, device="cpu")
    merged = trained.merge_and_unload().state_dict()
    for name, got in loaded.model.state_dict().items():
        if "vision_tower" not in name:
            assert torch.allclose(got, merged[name], atol=1e-5), name
    assert len(answer(loaded, image)) == 8

    refused(folder, "is a LoRA; give its base")
    other = tmp_path / "other"
    models.make_llm(other, layers=1)
    refused(folder, "num_hidden_layers 1", other)
    refused(folder, "layers.1.*no part of what adapter_config.json asks for on this", other, num_hidden_layers=1)
    (folder / "non_lora_trainables.bin").unlink()
    refused(folder, "no non_lora_trainables.bin; perhaps it was not written to its end", base or mini.llm)


def test_hugging_face_format(mini, stage2, image, tmp_path):
    folder = published(stage2, mini, tmp_path / "llava-tiny", kind="llava_llama")
    want = answer(load_pretrained(folder, device="cpu"), image)
    export_to_hf(folder, tmp_path / "hf")
    loaded = load_pretrained(tmp_path / "hf", device="cpu")
    assert type(loaded.model).__name__ == "LlavaLlamaForCausalLM" and answer(loaded, image) == want
    assert loaded.model.config.mm_vision_tower == str(mini.clip)
    assert torch.equal(
        loaded.model.get_vision_tower().vision_tower.state_dict()[next(iter(stage2[0].get_vision_tower().vision_tower.state_dict()))],
        next(iter(stage2[0].get_vision_tower().vision_tower.state_dict().values())),
    )  # fmt: skip
    assert answer(load_pretrained(tmp_path / "hf", device="cpu", vision_tower=mini.clip), image) == want


def test_from_pretrained_takes_the_heads_along(mini, tmp_path):
    from hacl_llava import HaclLlavaLlamaForCausalLM

    model, tokenizer = load(mini, head_dim=12, negatives="batch")
    model.save_pretrained(tmp_path / "whole")
    save_head(model, tmp_path / "whole")
    again = HaclLlavaLlamaForCausalLM.from_pretrained(str(tmp_path / "whole"))
    assert again.hacl_config == model.hacl_config and torch.equal(
        again.hacl_head.text.weight, model.hacl_head.text.weight
    )
    assert torch.equal(again.get_model().mm_projector[0].weight, model.get_model().mm_projector[0].weight)
    (tmp_path / "whole/hacl_head.safetensors").unlink()
    assert HaclLlavaLlamaForCausalLM.from_pretrained(str(tmp_path / "whole")).hacl_head is None


def test_mistral(mini, stage2, image, tmp_path):
    from hacl_llava import compat

    values = stage2[0].config.to_dict() | {"model_type": "llava_mistral", "architectures": ["LlavaMistralForCausalLM"]}
    values |= {"mm_vision_tower": str(mini.clip), "sliding_window": None, "num_key_value_heads": 2}
    values.pop("head_dim", None)
    torch.manual_seed(6)
    model = compat.LlavaMistralForCausalLM(compat.LlavaMistralForCausalLM.config_class.from_dict(values)).half().float()
    model.save_pretrained(tmp_path / "llava-mistral")
    stage2[1].save_pretrained(tmp_path / "llava-mistral")
    (tmp_path / "llava-mistral/tokenizer.model").write_bytes((mini.llm / "tokenizer.model").read_bytes())
    loaded = load_pretrained(tmp_path / "llava-mistral", device="cpu")
    assert type(loaded.model).__name__ == "LlavaMistralForCausalLM"
    assert torch.equal(
        loaded.model.get_model().layers[1].mlp.up_proj.weight, model.get_model().layers[1].mlp.up_proj.weight
    )
    assert len(answer(loaded, image)) == 8
    hacl = load_pretrained(tmp_path / "llava-mistral", device="cpu", hacl=True).model
    assert type(hacl).__name__ == "HaclLlavaMistralForCausalLM" and hacl.hacl_head is not None


def test_our_heads_go_on(mini, stage2, tmp_path):
    model, _ = load(mini, head_dim=12, queue_size=3, temperature=0.2)
    with torch.no_grad():
        model.hacl_head.log_temperature.add_(0.1)
    model.config.save_pretrained(tmp_path / "stage1")
    state = {f"model.mm_projector.{k}": v for k, v in model.get_model().mm_projector.state_dict().items()}
    torch.save(state, tmp_path / "stage1/mm_projector.bin")
    save_head(model, tmp_path / "stage1")
    again = load_pretrained(tmp_path / "stage1", mini.llm, device="cpu", hacl=True).model
    assert again.hacl_config == model.hacl_config
    for k, v in model.hacl_head.state_dict().items():
        assert torch.equal(again.hacl_head.state_dict()[k], v)
    assert type(load_pretrained(tmp_path / "stage1", mini.llm, device="cpu").model).__name__ == "LlavaLlamaForCausalLM"
    with pytest.raises(HaclError, match=r"is a projector or a LoRA .* use hacl_llava.load_pretrained"):
        type(model).from_pretrained(str(tmp_path / "stage1"))
    with pytest.raises(HaclError, match="holds heads of the shapes"):
        again.load_hacl_head(tmp_path / "stage1", config=HaclConfig(head_dim=8))
    for hacl, said in (
        ('{"ranking": 0.5}', r"hacl_head.safetensors: unknown HACL .*'ranking'"),
        ("[", "cannot be read"),
    ):
        save_file({}, tmp_path / "stage1/hacl_head.safetensors", {"hacl": hacl})
        with pytest.raises(HaclError, match=said):
            again.load_hacl_head(tmp_path / "stage1")
    (tmp_path / "stage1/hacl_head.safetensors").write_bytes(b"nothing")
    with pytest.raises(HaclError, match="cannot be read"):
        load_pretrained(tmp_path / "stage1", mini.llm, device="cpu", hacl=True)


class Evil:
    def __reduce__(self):
        return os.system, ("touch " + os.environ["HACL_TEST_MARK"],)


def test_a_pickle_with_code_is_refused_and_not_run(mini, stage2, tmp_path, monkeypatch):
    monkeypatch.setenv("HACL_TEST_MARK", str(tmp_path / "ran"))
    os.system(Evil().__reduce__()[1][0])  # control: the code does what the test looks for
    (tmp_path / "ran").unlink()
    folder = published(stage2, mini, tmp_path / "llava-tiny", sharded=False)
    projector, lora = tmp_path / "llava-projector", tmp_path / "llava-lora"
    projector.mkdir()
    shutil.copy(folder / "config.json", projector)
    for write in (torch.save, lambda value, file: Path(file).write_bytes(pickle.dumps(value))):
        write({"model.mm_projector.0.weight": Evil()}, folder / "pytorch_model.bin")
        write({"model.mm_projector.0.weight": Evil()}, projector / "mm_projector.bin")
        for path, base in ((folder, None), (projector, mini.llm)):
            refused(path, "cannot be read", base, exported=True)
    lora_folder(stage2, mini, lora)
    for file in lora.glob("adapter_model.*"):
        file.unlink()
    torch.save({"base_model.model.lm_head.lora_A.weight": Evil()}, lora / "adapter_model.bin")
    refused(lora, "adapter_model.bin: cannot be read .* may hold code, which is not run", mini.llm)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "match, config",
    [
        (r"pytorch_model-0000\d-of-00002.bin: tensor .* has the shape \[.*\], not the \[", {"intermediate_size": 99}),
        ("lacks .* tensors that config.json asks for", {"num_hidden_layers": 3}),
        ("layers.1.* belongs to no part of what config.json asks for", {"num_hidden_layers": 1}),
        ("mm_vision_tower None; expected a LLaVA .* a language model goes to base", {"mm_vision_tower": None}),
        ("the hub does not give it", {"mm_vision_tower": "someone/clip-of-nowhere"}),
        ("MPT, which is not supported", {"model_type": "llava_mpt"}),
        ("has the model_type 'llama'", {"model_type": "llama"}),
        ("its projector takes 65 features a patch, the vision tower .* gives 64", {"mm_hidden_size": 65}),
    ],
)
def test_a_config_that_does_not_fit_is_named(mini, stage2, tmp_path, match, config):
    folder = published(stage2, mini, tmp_path / "llava-tiny", kind="llava_llama")
    refused(folder, match, exported=True, **config)


def test_what_does_not_fit_is_named(mini, stage2, tmp_path):
    refused(tmp_path / "nowhere", "is no folder")
    refused("someone/llava-of-nowhere", "the hub does not give it")
    folder = published(stage2, mini, tmp_path / "llava-tiny", extra={"model.itc_temp": torch.tensor(0.1)})
    refused(folder, "bin: holds 'model.itc_temp', which belongs to no part", exported=True)
    refused(folder, "takes no base", mini.llm, exported=True)
    refused(folder, r"cannot be loaded \(ValueError: Unknown projector", mm_projector_type="mlp_of_nowhere")
    safe = published(stage2, mini, tmp_path / "llava-safe", kind="llava_llama", safe=True)
    index = safe / "model.safetensors.index.json"
    before = index.read_text()
    index.write_text(json.dumps({"weight_map": ["a"]}))
    refused(safe, "has no weight_map", exported=True)
    index.write_text(before)
    for path in (safe, folder):
        file = min([*path.glob("*.safetensors"), *path.glob("pytorch_model*.bin")])
        file.write_bytes(file.read_bytes()[:-100])
        refused(path, f"{file.name}: cannot be read", exported=True)
    file.unlink()
    refused(folder, f"names {file.name}, not there", exported=True)
    (folder / "pytorch_model.bin.index.json").unlink()
    refused(folder, "holds neither a model's weights, nor an mm_projector.bin", exported=True)
    for content, match in (("[]", "holds a list, expected an object"), (None, "config.json: cannot be read")):
        (folder / "config.json").write_text(content) if content else (folder / "config.json").unlink()
        refused(folder, match, exported=True)


def test_one_file_beside_an_index_is_what_is_loaded_and_exported(mini, stage2, tmp_path):
    folder = published(stage2, mini, tmp_path / "llava-tiny", kind="llava_llama", safe=True)
    weights, name = Weights(folder), "model.layers.0.mlp.up_proj.weight"
    save_file({n: weights[n] * 2 for n in weights}, folder / "model.safetensors", metadata={"format": "pt"})
    got = load_pretrained(folder, device="cpu").model.state_dict()[name]  # as transformers
    assert torch.equal(got, Weights(folder)[name].float()) and not torch.equal(got, weights[name].float())


def test_a_tuned_tower_is_the_checkpoints_own(mini, stage2, tmp_path):
    tower = stage2[0].get_vision_tower().vision_tower
    before = {k: v.clone() for k, v in tower.state_dict().items() if v.is_floating_point()}
    with torch.no_grad():
        for p in tower.parameters():
            p.mul_(1.25)
    for tuned in (False, True):
        config = {"unfreeze_mm_vision_tower": True} if tuned else {}
        folder = published(stage2, mini, tmp_path / f"llava-{tuned}", kind="llava_llama", safe=True, **config)
        got = load_pretrained(folder, device="cpu").model.get_vision_tower().vision_tower.state_dict()
        for name, value in before.items():
            assert torch.allclose(got[name], value * (1.25 if tuned else 1), rtol=2e-3, atol=1e-6), name
    tower.load_state_dict(before, strict=False)


def test_quantized(mini, stage2, tmp_path):
    folder = published(stage2, mini, tmp_path / "llava-tiny", kind="llava_llama", safe=True)
    with pytest.raises(HaclError, match="allowed are 4 and 8"):
        load_pretrained(folder, device="cpu", bits=2)
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(HaclError, match=r"pip install 'hacl-llava\[quantize\]'"):
            load_pretrained(folder, device="cpu", bits=4)
        return
    if not torch.cuda.is_available() and transformers.__version__.startswith("4.37"):
        pytest.skip("this transformers quantizes on a GPU alone")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = load_pretrained(folder, device="cpu", bits=4)
    assert type(loaded.model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert type(loaded.model.get_model().mm_projector[0]) is torch.nn.Linear
    # Near the model's own numbers. (One token at a time, a CPU wants sizes that 64 divides, which 160 is not.)
    whole = load_pretrained(folder, device="cpu")
    ids = torch.tensor([[1, *range(300, 330)]])
    with torch.inference_mode(False):
        got, want = (x.model(input_ids=ids).logits[0].detach().float() for x in (loaded, whole))
    assert torch.nn.functional.cosine_similarity(got, want).mean() > 0.9
    assert not torch.equal(got, want)


def test_what_would_be_random_is_refused(mini, stage2, tmp_path):
    """Weights that a file lacks, which transformers, peft and LLaVA make up with a warning at most."""
    lora = tmp_path / "llava-lora"
    lora_folder(stage2, mini, lora)
    others = torch.load(lora / "non_lora_trainables.bin", weights_only=True)
    torch.save({}, lora / "non_lora_trainables.bin")
    refused(lora, "lacks 'model.mm_projector.0.weight', .*and so does the base", mini.llm)
    base = published(stage2, mini, tmp_path / "llava-base", safe=True, kind="llava_llama", sharded=False)
    got = load_pretrained(lora, base, device="cpu").model.get_model().mm_projector[0].weight  # it has one
    assert torch.equal(got, stage2[0].get_model().mm_projector[0].weight.half().float())
    torch.save(others, lora / "non_lora_trainables.bin")
    adapter = load_file(lora / "adapter_model.safetensors")
    save_file({k: v for k, v in adapter.items() if "layers.1." not in k}, lora / "adapter_model.safetensors")
    refused(lora, "lacks .* tensors that adapter_config.json asks for .*layers.1", mini.llm)

    tower = shutil.copytree(mini.clip, tmp_path / "clip")
    weights = load_file(tower / "model.safetensors")
    bare = {k.removeprefix("vision_model."): v for k, v in weights.items()}  # as transformers 5 writes them
    save_file(bare, tower / "model.safetensors", metadata={"format": "pt"})
    want = load_pretrained(base, device="cpu").model.get_vision_tower().vision_tower.state_dict()
    got = load_pretrained(base, device="cpu", vision_tower=tower).model.get_vision_tower().vision_tower.state_dict()
    assert all(torch.equal(got[k], want[k]) for k in want)
    gone = next(k for k in bare if "layers.1" in k)
    save_file({k: v for k, v in bare.items() if k != gone}, tower / "model.safetensors", metadata={"format": "pt"})
    refused(base, f"lacks 1 tensors .*vision tower.*{gone}", exported=True, mm_vision_tower=str(tower))
    for name in ("tokenizer.model", "tokenizer.json"):
        (base / name).unlink(missing_ok=True)
    refused(base, "neither tokenizer.model nor tokenizer.json", exported=True)


def test_merging_keeps_the_dtype_and_the_tokens(mini, stage2, tmp_path):
    lora = tmp_path / "llava-lora"
    lora_folder(stage2, mini, lora)
    base = published(stage2, mini, tmp_path / "llava-base", safe=True, kind="llava_llama", dtype=torch.bfloat16)
    config = json.loads((base / "config.json").read_text())
    config["dtype"] = config.pop("torch_dtype")  # as transformers 5 calls it
    (base / "config.json").write_text(json.dumps(config))
    merge(lora, tmp_path / "merged", base)
    weights = Weights(tmp_path / "merged")
    assert {weights[n].dtype for n in weights if n.endswith("weight")} == {torch.bfloat16}
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes()
    for convert, source, match in (
        (import_from_hf, lora, "is a LoRA; give its base"),
        (import_from_hf, base, "expected LlavaForConditionalGeneration"),
        (export_to_hf, lora, "is a LoRA; merge it first"),
    ):
        with pytest.raises(CheckpointError, match=match):
            convert(source, tmp_path / "no")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").touch()
    with pytest.raises(CheckpointError, match="exists already"):  # before anything is loaded
        merge(tmp_path / "nowhere", tmp_path / "full", base)
    assert not list(tmp_path.glob("*.part"))
