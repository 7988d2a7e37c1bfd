"""Ranks stay in step whatever their batches hold, and one that fails ends the run with its own error."""

import contextlib
import copy
import dataclasses
import json
import os
import re
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import arguments, batch_of, gradients, load, made_once, relative
from test_e2e import log_of
from workers import ROOT, Run, run_ranks, trained

from hacl_llava import fused
from hacl_llava.nonfinite import NonFiniteGuard
from hacl_llava.recomputation import recompute

pytestmark = pytest.mark.distributed
NAN = float("nan")

# --- gradients of two ranks against one process -----------------------------------------------------------------------

FEWER = "zero3, 1 of 2 layers computed again"  # where a layer that runs again gathers its weights again
ENGINES = ("ddp", "zero2", "zero3", "zero3_offload", "ddp, 1 of 2 layers computed again", FEWER)
# What each of two ranks gets, as indices of `mixed`, in the two micro-batches of a step.
STEPS = {
    "images beside rows without hallucinated captions, then text alone": (((0, 1), (2, 3)), ((4, 5), (0, 6))),
    "one image on each rank, then one on the first alone": (((0,), (1,)), ((2,), (4,))),
    "text alone on all ranks, then all there is": (((4, 5), (5, 4)), ((0, 1), (6, 2))),
}


def mixed(records):
    """Seven records: 2 and 3 have no hallucinated captions, 6 has one of two, 4 and 5 no image."""
    rows = copy.deepcopy(records[:7])
    for i in (2, 3):
        del rows[i]["hallucinated_captions"]
    rows[6]["hallucinated_captions"] = rows[6]["hallucinated_captions"][:1]
    for i in (4, 5):
        del rows[i]["image"]
        rows[i]["conversations"] = [{"from": "human", "value": "Hello."}, rows[i]["conversations"][1]]
    rows[0]["conversations"][1]["value"] += " And much more."
    return rows


def without_contrast(batch):
    return {k: v for k, v in batch.items() if k != "texts"}


def spoiled(batch):
    return {**batch, "images": batch["images"] * NAN}


def ddp_engine(model):
    # The heads have no part in a batch without contrast, which one case below takes.
    wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)

    def step(batches, guard):
        model.zero_grad()
        for i, batch in enumerate(batches):
            with contextlib.nullcontext() if i else wrapped.no_sync():
                micro_batch(wrapped, lambda loss: (loss / len(batches)).backward(), batch, guard, i)
        return {k: v.float().numpy() for k, v in gradients(model).items()}

    return step


def deepspeed_engine(model, config):
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import safe_get_full_grad

    getattr(deepspeed.ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False  # it would be compiled now
    trained = [p for p in model.parameters() if p.requires_grad]
    config = json.loads((ROOT / f"zero_configs/{config}.json").read_text())
    config.update(train_micro_batch_size_per_gpu=1, train_batch_size=4, gradient_accumulation_steps=2, bf16={})
    config.update(fp16={}, gradient_clipping=0.0, zero_allow_untested_optimizer=True, zero_force_ds_cpu_optimizer=False)
    for key in ("offload_optimizer", "offload_param"):
        config["zero_optimization"].get(key, {})["pin_memory"] = False
    engine, *_ = deepspeed.initialize(
        model=model, config=config, model_parameters=trained, optimizer=torch.optim.SGD(trained, lr=0.0)
    )

    def step(batches, guard):
        for i, batch in enumerate(batches):
            micro_batch(engine, engine.backward, batch, guard, i)
            if i == len(batches) - 1:
                named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
                found = {n: safe_get_full_grad(p).float().cpu().numpy() for n, p in named}
            engine.step()
        return found

    return step


def micro_batch(model, backward, batch, guard, i):
    guard.begin(i + 1, torch.tensor([10 * i + dist.get_rank()]))
    loss = model(**batch).loss
    core = getattr(model, "module", model)
    guard.see(loss, getattr(core, "hacl_own_finite", None) if "texts" in batch else None)
    backward(loss)
    guard.end(loss.detach())


def engine_worker(rank, world, paths, rows, folder):
    mini, out = types.SimpleNamespace(**paths), {}
    for name in ENGINES:
        model, tokenizer = load(mini, negatives="global")
        per_step = {
            key: [batch_of(mini, model, tokenizer, micro[rank], rows) for micro in step] for key, step in STEPS.items()
        }
        ran = []
        for module_name, module in model.named_modules():
            module.register_forward_pre_hook(lambda *_, n=module_name, to=ran: to.append(n))
        model.hacl_fused = fused.check(model, torch.device("cpu"))
        guard = NonFiniteGuard("skip", Path(folder) / name)
        guard.watch(model.parameters())
        engine, *fewer = name.split(",")
        if fewer:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
            recompute(model.get_model(), 1)
        step = ddp_engine(model) if engine == "ddp" else deepspeed_engine(model, engine)
        grads, order = {}, {}
        settings, model.hacl_config = model.hacl_config, dataclasses.replace(model.hacl_config, start=0.5)
        grads["before the start"] = step(per_step[next(iter(STEPS))], guard)
        model.hacl_config = settings
        for key, batches in per_step.items():
            ran.clear()
            grads[key], order[key] = step(batches, guard), list(ran)
        guard.read()
        assert guard.found == 0
        first, second = per_step[next(iter(STEPS))]
        bad = spoiled if rank == 1 else dict
        grads["lost on all"] = step([first, bad(second)], guard)
        grads["lost on one"] = step([without_contrast(first), without_contrast(bad(second))], guard)
        guard.read()
        out[name] = grads, order, model.hacl_fused
    return out


@pytest.fixture(scope="module")
def two_ranks(mini, records, tmp_path_factory):
    def of_all(folder):
        return run_ranks(engine_worker, vars(mini), mixed(records), str(folder)), folder

    return made_once(tmp_path_factory, "two_ranks", of_all)


@pytest.fixture(scope="module")
def one_process(mini, records):
    """``gradient(rows of each rank, contrast, ranks that count)`` of one micro-batch."""
    model, tokenizer = load(mini, negatives="global")
    rows, config = mixed(records), model.hacl_config

    def of(indices, weight):
        model.zero_grad()
        model.hacl_config = dataclasses.replace(config, weight=weight)
        model(**batch_of(mini, model, tokenizer, indices, rows)).loss.backward()
        return gradients(model)

    def gradient(micro, contrast=True, ranks=(0, 1), joined=False):
        everyone = [i for rank in micro for i in rank]
        if joined:
            return of(everyone, 1.0)
        # LLaVA's loss is a mean over the tokens of each rank, and a run takes the mean of those means; the contrast is
        # that of the joined batch.
        parts = [(0.5, of(micro[rank], 0.0)) for rank in ranks]
        if contrast:
            parts += [(1.0, of(everyone, 1.0)), (-1.0, of(everyone, 0.0))]
        return {n: sum(factor * g[n] for factor, g in parts) for n in parts[0][1]}

    return gradient


def mean(*grads):
    return {n: sum(g[n] for g in grads) / 2 for n in grads[0]}


def differ(got, want):
    return max(relative(torch.from_numpy(got[n]).double(), w) for n, w in want.items() if w.norm() > 1e-12)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("step", STEPS)
def test_gradients_equal_one_process(two_ranks, one_process, engine, step):
    want = mean(*(one_process(micro) for micro in STEPS[step]))
    for rank in two_ranks[0]:
        grads, _, fused = rank[engine]
        assert fused and set(grads[step]) == set(want)
        assert differ(grads[step], want) < 1e-4
    # control: the mean over all tokens is another gradient, where ranks have different numbers of them
    if len(STEPS[step][0][0]) == 2:
        assert (
            differ(two_ranks[0][0][engine][0][step], mean(*(one_process(m, joined=True) for m in STEPS[step]))) > 1e-3
        )


@pytest.mark.parametrize("engine", ENGINES)
def test_before_the_contrast_begins_heads_have_a_gradient_of_0(two_ranks, one_process, engine):
    want = mean(*(one_process(micro, contrast=False) for micro in next(iter(STEPS.values()))))
    for rank in two_ranks[0]:
        got = rank[engine][0]["before the start"]
        assert set(got) == set(want) and not any(got[n].any() for n in got if "hacl_head" in n)
        assert differ(got, {n: g for n, g in want.items() if "hacl_head" not in n}) < 1e-4


@pytest.mark.parametrize("engine", ENGINES)
def test_modules_run_in_the_same_order(two_ranks, engine):
    (_, a, _), (_, b, _) = (rank[engine] for rank in two_ranks[0])
    assert a == b
    for ran in a.values():
        assert {"model.vision_tower", "model.mm_projector", "lm_head", "hacl_head"} <= set(ran)
    two_rows = [a[key] for key in STEPS if len(STEPS[key][0][0]) == 2]
    assert two_rows[0] == two_rows[1]  # nor does it depend on what the batches hold


def order_worker(rank, world, paths, rows):
    """A model that saves itself the vision tower where there is no image."""
    mini = types.SimpleNamespace(**paths)
    model, tokenizer = load(mini)
    encode, ran = model.encode_images, []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, n=name: ran.append(n))
    model.encode_images = lambda images: encode(images) if images.any() else images.new_zeros(len(images), 4, 64)
    with torch.no_grad():
        model(**without_contrast(batch_of(mini, model, tokenizer, (0, 1) if rank else (4, 5), rows)))
    return ran


def test_control_a_model_that_skips_a_module_is_seen(mini, records):
    a, b = run_ranks(order_worker, vars(mini), mixed(records))
    assert a != b and "model.vision_tower" in b and "model.vision_tower" not in a


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_not_finite_reaches_no_rank(two_ranks, one_process, engine):
    first, second = STEPS[next(iter(STEPS))]
    ranks, folder = two_ranks
    own = mean(one_process(first), {n: torch.zeros_like(g) for n, g in one_process(first).items()})
    plain = mean(one_process(first, contrast=False), one_process(second, contrast=False, ranks=(0,)))
    for rank in ranks:
        grads = rank[engine][0]
        assert differ(grads["lost on all"], own) < 1e-4  # one rank's NaN is in the contrast of all
        plain = {n: g for n, g in plain.items() if "mm_projector" in n}
        assert differ(grads["lost on one"], plain) < 1e-4
    entries = [json.loads(line) for line in (folder / engine / "nonfinite.jsonl").read_text().splitlines()]
    assert sorted((e["rank"], e["began_here"]) for e in entries) == [(0, False), (1, True), (1, True)]
    assert all(e["step"] == 2 and e["records"] == [{"index": 10 + e["rank"]}] for e in entries)


# --- through the door -------------------------------------------------------------------------------------------------


def spoil(identity):
    """In a rank: the image of the record with this id is not finite."""
    from hacl_llava import data

    item = data.HaclDataset.__getitem__

    def spoiled(self, i):
        found = item(self, i)
        if self.list_data_dict[i]["id"] == identity:
            found["image"] = found["image"] * NAN
        return found

    data.HaclDataset.__getitem__ = spoiled


@pytest.fixture(scope="module")
def mixed_data(records, tmp_path_factory):
    """27 records: each fourth without an image, each third without hallucinated captions."""
    rows = copy.deepcopy(records[:27])
    for i, row in enumerate(rows):
        if i % 3 == 0:
            del row["hallucinated_captions"]
        if i % 4 == 0:
            del row["image"]
            row["conversations"][0]["value"] = "Hello."
    path = tmp_path_factory.mktemp("mixed") / "mixed.json"
    path.write_text(json.dumps(rows))
    return path, next(row["id"] for row in rows[9:] if "image" in row)


MIXED = (
    *("--group_by_modality_length", "True", "--per_device_train_batch_size", "3", "--hacl_queue_size", "7"),
    *("--gradient_accumulation_steps", "2", "--dataloader_num_workers", "1", "--hacl_negatives", "global"),
)


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
def test_mixed_records_and_one_that_is_not_finite(mini, mixed_data, tmp_path, engine):
    """Text-only batches, records without hallucinated captions, a last batch that is not full, accumulation, data
    workers: under ZeRO-3 a rank that ran one pass less would hang the other. And a NaN, past which the run goes on."""
    path, identity = mixed_data
    ddp = engine == "ddp"
    engine_flags = ("--use_cpu", "True") if ddp else ("--deepspeed", f"zero_configs/{engine}.json", "--bf16", "True")
    argv = arguments(mini, tmp_path / "out", "--data_path", path, *MIXED, *engine_flags, "--hacl_nonfinite", "skip")
    said = trained(argv, tmp_path / "log", ranks=2, prepare=(spoil, identity))
    assert (
        f"engine {'DistributedDataParallel' if ddp else f'DeepSpeedEngine ZeRO-{engine[-1]}'}, 2 ranks on cpu" in said
    )
    assert "27 records, 20 with an image, 18 with hallucinated captions" in said
    log = log_of(tmp_path / "out")
    assert len(log) >= 2 and log[-1]["nonfinite"] >= 1
    entries = [json.loads(line) for line in (tmp_path / "out/nonfinite.jsonl").read_text().splitlines()]
    assert len(entries) == log[-1]["nonfinite"] and len({e["step"] for e in entries}) == 1
    began = [e for e in entries if e["began_here"]]
    assert len(began) == 1 and identity in [r["id"] for r in began[0]["records"]]
    projector = torch.load(tmp_path / "out/mm_projector.bin", weights_only=True)
    assert all(p.isfinite().all() for p in projector.values())


def test_stop_ends_all_ranks_together(mini, mixed_data, tmp_path):
    path, identity = mixed_data
    argv = arguments(mini, tmp_path / "out", "--data_path", path, *MIXED, "--deepspeed", "zero_configs/zero2.json")
    argv += ["--bf16", "True", "--save_strategy", "steps", "--save_steps", "1", "--num_train_epochs", "3"]
    argv += ["--gradient_accumulation_steps", "1"]
    run = Run(argv, tmp_path / "log", ranks=2, prepare=(spoil, identity))
    assert run.ends() == 2, run.said()[-3000:]
    errors = [line for line in run.said().splitlines() if line.startswith("error:")]
    (step,) = {int(re.search(r"step (\d+), rank \d, records .*: the loss is not finite", e)[1]) for e in errors}
    assert f"(id {identity!r})" in errors[0] and "--hacl_nonfinite skip" in errors[0]
    assert "Traceback" not in run.said()
    steps = sorted(int(p.name.split("-")[1]) for p in (tmp_path / "out").glob("checkpoint-*"))
    assert steps == list(range(1, step))  # each before, whole; none of the step that was lost
    assert not (tmp_path / "out/unfinished").exists() and not (tmp_path / "out/mm_projector.bin").exists()
