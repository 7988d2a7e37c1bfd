"""One miniature world on disk for all tests, and models loaded the way LLaVA's train() loads them."""

import contextlib
import gc
import json
import os
import pickle
import signal
import time
import types
from pathlib import Path

import filelock
import hypothesis
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as for a job in the background: tests press Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
hypothesis.settings.register_profile(  # how long an example takes is the machine's doing
    "patient",
    hypothesis.settings.default,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("patient")


# Of what is imported nothing is garbage, and each search of it for some would take a third of a second.
gc.disable()


def pytest_collection_finish():
    gc.enable()
    gc.freeze()


def names_in(folder):
    """What lies in a folder; nothing where there is none, also if another process takes it away at this moment."""
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def kill_session(process):
    """SIGKILL to all of a process's session, and wait until none of it lives: a rank may be in the middle of a call of
    the system, a rename say, and has its port until it is gone."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    until = time.monotonic() + 60
    while _of_session(process.pid) and time.monotonic() < until:
        time.sleep(0.01)
    assert not _of_session(process.pid)


def _of_session(leader):
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            state, _, _, session = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state not in "ZX":
                found.append(int(name))
    return found


def made_once(tmp_path_factory, name, make):
    """``make(folder)``, called by the first of pytest's processes that wants it; the others wait for what it gave."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    file = folder.with_suffix(".pickle")
    with filelock.FileLock(folder.with_suffix(".lock")):
        if not file.exists():
            folder.mkdir()
            file.write_bytes(pickle.dumps(make(folder)))
        return pickle.loads(file.read_bytes())


@pytest.fixture(scope="session")
def mini(tmp_path_factory):
    """Paths of a dataset of 32 images (two hallucinated captions each), a tiny LLM and a tiny vision tower."""
    import torch

    from hacl_llava.miniature import models, world

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("mini")
    data = world.make_dataset(folder, 32, per_caption=2)
    models.make_llm(folder / "llm", layers=2)
    models.make_vision_tower(folder / "clip")
    return types.SimpleNamespace(
        folder=folder, data=data, images=folder / "images", llm=folder / "llm", clip=folder / "clip"
    )


@pytest.fixture(scope="session")
def records(mini):
    return json.loads(mini.data.read_text())


def make_llm_of_today(mini, folder, special=("<|im_start|>", "<|reserved_0|>"), **settings):
    """The miniature with a tokenizer as Llama-3, Qwen and SmolLM2 have it: no <unk>, pad is EOS, BOS is not added, and
    tokenizer.json alone. ``special``: tokens besides; ``settings``: of tokenizer_config.json."""
    import shutil

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    shutil.copytree(mini.llm, folder, ignore=shutil.ignore_patterns("*token*"))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|begin|>", "<|end|>", *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([mini.data.read_text()], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|end|>"}
    more = {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": list(special)}
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, **more, **settings}))
    return folder


def arguments(mini, output, *more, stock=False):
    """The command line of a stage-1 run as LLaVA's scripts spell it, with heads and a temperature to train, for all
    that has to come through; ``stock``: without HACL's flags."""
    from hacl_llava.config import EOS

    hacl = [] if stock else [x for name, value in EOS.items() for x in (f"--hacl_{name}", str(value))]
    return [
        *("--model_name_or_path", str(mini.llm), "--version", "plain"),
        *("--data_path", str(mini.data), "--image_folder", str(mini.images), "--vision_tower", str(mini.clip)),
        *("--mm_projector_type", "mlp2x_gelu", "--tune_mm_mlp_adapter", "True", "--mm_vision_select_layer", "-2"),
        *("--mm_use_im_start_end", "False", "--mm_use_im_patch_token", "False", "--output_dir", str(output)),
        *("--num_train_epochs", "1", "--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "1"),
        *("--evaluation_strategy", "no", "--save_strategy", "no", "--learning_rate", "1e-3", "--weight_decay", "0."),
        *("--warmup_ratio", "0.03", "--lr_scheduler_type", "cosine", "--logging_steps", "1"),
        *("--model_max_length", "512", "--gradient_checkpointing", "True", "--dataloader_num_workers", "0"),
        *("--lazy_preprocess", "True", "--report_to", "none", *hacl, *more),
    ]


def load(mini, dtype=None, stock=False, select_layer=-2, frozen=True, **settings):
    """A model and tokenizer as after LLaVA's train() has set them up for stage 1, HACL enabled with ``settings``.

    The projector's weights are seeded and ten times larger than its default, so that images matter.
    """
    import torch
    import transformers
    from llava import conversation

    from hacl_llava import compat
    from hacl_llava.config import HaclConfig
    from hacl_llava.model import HaclLlavaLlamaForCausalLM
    from hacl_llava.representation import suffix_ids

    cls = compat.LlavaLlamaForCausalLM if stock else HaclLlavaLlamaForCausalLM
    attn = settings.pop("attn_implementation", None)
    model = cls.from_pretrained(str(mini.llm), attn_implementation=attn)
    model.config.use_cache = False
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        str(mini.llm), model_max_length=512, padding_side="right", use_fast=False
    )
    tokenizer.pad_token = tokenizer.unk_token
    conversation.default_conversation = conversation.conv_templates["plain"]
    model_args = types.SimpleNamespace(
        vision_tower=str(mini.clip), mm_vision_select_layer=select_layer, mm_vision_select_feature="patch",
        pretrain_mm_mlp_adapter=None, mm_patch_merge_type="flat", mm_projector_type="mlp2x_gelu",
        mm_use_im_patch_token=False, mm_use_im_start_end=False, tune_mm_mlp_adapter=True,
    )  # fmt: skip
    model.get_model().initialize_vision_modules(model_args)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.get_model().mm_projector.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.15)
    model.config.tokenizer_padding_side = "right"
    model.config.tokenizer_model_max_length = 512
    if frozen:
        model.requires_grad_(False)
        model.get_model().mm_projector.requires_grad_(True)
    model.initialize_vision_tokenizer(model_args, tokenizer)
    if not stock:
        torch.manual_seed(5)
        config = HaclConfig(**settings)
        model.enable_hacl(config, suffix_ids(config, tokenizer))
    return model.to(dtype or torch.float32).train(), tokenizer


def batch_of(mini, model, tokenizer, indices=range(6), records=None, **data_args):
    """A collated batch of the miniature's records (or of ``records``) through the real dataset and collator."""
    import torch

    from hacl_llava.data import HaclCollator, HaclDataset

    path = mini.data
    if records is not None:
        path = mini.folder / f"records-{os.getpid()}-{abs(hash(json.dumps(records)))}.json"
        path.write_text(json.dumps(records))
    tower = model.get_vision_tower()
    args = types.SimpleNamespace(
        is_multimodal=True, image_folder=str(mini.images), image_processor=tower.image_processor,
        image_aspect_ratio="square", mm_use_im_start_end=False, hacl=model.hacl_config, **data_args,
    )  # fmt: skip
    dataset = HaclDataset(str(path), tokenizer, args)
    collator = HaclCollator(tokenizer)
    batch = collator([dataset[i] for i in indices])
    dtype = next(model.parameters()).dtype
    return {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()}


def texts_of(batch):
    """The captions of a batch and its hallucinated captions: B lists of ids (None: missing), and B lists of K such."""
    packed, B = batch["texts"], len(batch["input_ids"])
    owner, ids = packed["owner"].flatten(), packed["ids"].flatten()
    found = [ids[owner == n] if end >= 0 else None for n, end in enumerate(packed["end"].tolist())]
    K = len(found) // B - 1
    return found[:B], [found[B + i * K : B + (i + 1) * K] for i in range(B)]


def with_texts(batch, captions, hallucinated):
    """The batch with other texts, as `texts_of` returns them."""
    from hacl_llava.packing import pack

    return {**batch, "texts": pack([*captions, *(text for row in hallucinated for text in row)])}


def rows_of(batch, rows):
    """The batch of some rows of this one, a list of numbers."""
    captions, hallucinated = texts_of(batch)
    part = {k: v if k == "texts" else v[rows] for k, v in batch.items()}
    return with_texts(part, [captions[i] for i in rows], [hallucinated[i] for i in rows])


def gradients(model):
    """Gradients of all that trains, by name, in float64."""
    return {n: p.grad.detach().double().clone() for n, p in model.named_parameters() if p.grad is not None}


def relative(a, b):
    """Norm of the difference over the norm of b."""
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


@pytest.fixture
def to_endpoints(monkeypatch):
    """No proxy and no key or address of the environment stands between a test and its server."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith("OPENAI_"):
            monkeypatch.delenv(name)
