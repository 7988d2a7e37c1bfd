"""Two processes over gloo against one on the joined batch."""

import signal
import subprocess
import sys
import types

import pytest
import torch
import torch.distributed as dist
from conftest import batch_of, gradients, load, rows_of, texts_of, with_texts
from reference import naive_loss
from workers import run_ranks

from hacl_llava import loss as loss_module
from hacl_llava.loss import HaclLoss, hacl_loss

pytestmark = pytest.mark.distributed
CASES = [(n, q) for n in ("own", "batch", "global") for q in (0, 5)]


def agree(got, want):
    """Norm ratio and cosine of two gradients are 1 within 1e-5."""
    got, want = got.flatten().double(), want.flatten().double()
    ratio = (got.norm() / want.norm()).item()
    cosine = (got @ want / got.norm() / want.norm()).item()
    return abs(ratio - 1) <= 1e-5 and abs(cosine - 1) <= 1e-5


# --- the loss alone ---------------------------------------------------------------------------------------------------


def parts(steps=3):
    """Two linear heads and ``steps`` joined batches of 6 with K = 2, some captions and some rows missing."""
    g = torch.Generator().manual_seed(1)
    heads = [torch.randn(4, 8, generator=g, dtype=torch.float64) for _ in range(2)]
    batches = []
    for _ in range(steps):
        x = [torch.randn(*s, 8, generator=g, dtype=torch.float64) for s in ((6,), (6,), (6, 2))]
        batches.append((*x, torch.rand(6, 2, generator=g) > 0.3, torch.tensor([True, True, True, False, True, True])))
    return heads, batches


def project(heads, v, t, h):
    unit = torch.nn.functional.normalize
    return unit(v @ heads[0].T, dim=-1), unit(t @ heads[1].T, dim=-1), unit(h @ heads[1].T, dim=-1)


def loss_worker(rank, world, negatives, queue, broken):
    if broken == "sliced":  # the released code's gather: this rank's part of the gradient instead of the ranks' sum
        loss_module._GatherFeatures.backward = staticmethod(
            lambda ctx, grad: grad.chunk(dist.get_world_size())[ctx.rank]
        )
    heads, batches = parts()
    heads = [h.requires_grad_() for h in heads]
    tau = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    loss = HaclLoss(negatives, queue_size=queue)
    for batch in batches:
        for x in (*heads, tau):
            x.grad = None
        v, t, h, h_mask, mask = (x.chunk(world)[rank] for x in batch)
        out = loss(*project(heads, v, t, h), h_mask, mask, tau)
        out["loss"].backward()
    grads = [x.grad for x in (*heads, tau)]
    for g in (*grads, value := out["loss"].detach().clone()):
        dist.all_reduce(g)
        g /= world  # as DDP does
    return [g.numpy() for g in grads], value.item()


def loss_in_one_process(negatives, queue):
    heads, batches = parts()
    heads = [h.requires_grad_() for h in heads]
    tau = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    past = ([], [])
    for batch in batches:
        for x in (*heads, tau):
            x.grad = None
        *x, h_mask, mask = batch
        v, t, h = project(heads, *x)
        kept = [[f for f, m in p[-queue:] if m] for p in past] if queue else None
        i2t, t2i = naive_loss(v, t, h, h_mask, mask, tau, negatives, ranks=2, queue=kept)
        ((i2t + t2i) / 2).backward()
        for p, features in zip(past, (v, t)):
            p.extend((f.detach(), m) for f, m in zip(features, mask))
    return [x.grad for x in (*heads, tau)], ((i2t + t2i) / 2).item()


@pytest.mark.parametrize("negatives, queue", CASES)
def test_loss_and_gradient_equal_one_process(negatives, queue):
    want, value = loss_in_one_process(negatives, queue)
    for got, got_value in run_ranks(loss_worker, negatives, queue, ""):
        assert abs(got_value - value) < 1e-10
        assert all(agree(torch.from_numpy(g), w) for g, w in zip(got[:2], want[:2]))
        assert abs(got[2] - want[2].item()) < 1e-10


def test_control_a_gather_that_slices_the_gradient_fails():
    want, value = loss_in_one_process("own", 0)
    got, got_value = run_ranks(loss_worker, "own", 0, "sliced")[0]
    assert abs(got_value - value) < 1e-10  # the loss looks right
    assert not agree(torch.from_numpy(got[0]), want[0])


# --- the whole model under DDP ----------------------------------------------------------------------------------------


def equal_rows(model, tokenizer, mini):
    """Eight rows whose captions have the same number of tokens, so that LLaVA's own loss, a mean over each rank's
    tokens, is the mean over all; one has no hallucinated caption and one no contrast at all."""
    batch = batch_of(mini, model, tokenizer, range(8))
    g = torch.Generator().manual_seed(4)
    ids = torch.randint(3, 200, (8, 9), generator=g)
    batch["input_ids"] = torch.cat([torch.tensor([[1, -200]] * 8), ids], 1)
    batch["labels"] = torch.cat([torch.full((8, 2), -100), ids], 1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    captions, hallucinated = texts_of(batch)
    hallucinated[2], captions[5] = [None] * len(hallucinated[2]), None
    return with_texts(batch, captions, hallucinated)


def model_worker(rank, world, paths, settings, zero=False):
    mini = types.SimpleNamespace(**paths)
    model, tokenizer = load(mini, **settings)
    batch = equal_rows(model, tokenizer, mini)
    mine = rows_of(batch, [i for i in range(8) if i * world // 8 == rank])
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    for _ in range(2):
        model.zero_grad()
        model.reset_hacl_metrics()
        wrapped(**mine).loss.backward()
    return {k: v.numpy() for k, v in gradients(model).items()}, model.hacl_metrics(), model.hacl_fused


class GroupedLoss(torch.nn.Module):
    """In one process, what two ranks with ``negatives="batch"`` compute: the joined batch with candidates by rank."""

    def forward(self, **features):
        v, t, h, h_mask, mask, tau = features.values()
        i2t, t2i = naive_loss(v, t, h, h_mask, mask, tau, "batch", ranks=2)
        return {**hacl_loss(v, t, h, h_mask, mask, tau), "loss": (i2t + t2i) / 2, "loss_i2t": i2t, "loss_t2i": t2i}


@pytest.mark.parametrize(
    "settings",
    [
        {"negatives": "own"},
        {"negatives": "batch"},
        {"negatives": "global"},
        {"negatives": "global", "queue_size": 5, "head_dim": 0, "representation": "prompt", "centre": True},
        {"negatives": "own", "queue_size": 9, "fused": False},
    ],
    ids=str,
)
def test_model_under_ddp_equals_one_process(mini, settings):
    model, tokenizer = load(mini, **settings)
    batch = equal_rows(model, tokenizer, mini)
    if settings["negatives"] == "batch":
        model.hacl_loss = GroupedLoss()
    for _ in range(2):
        model.zero_grad()
        model.reset_hacl_metrics()
        model(**batch).loss.backward()
    want, figures = gradients(model), model.hacl_metrics()
    for got, got_figures, fused in run_ranks(model_worker, vars(mini), settings):
        assert fused is settings.get("fused", True)
        assert set(got) == set(want)
        for name in want:
            assert agree(torch.from_numpy(got[name]), want[name]), name
        assert set(got_figures) == set(figures)
        assert all(abs(got_figures[k] - figures[k]) < 1e-5 for k in figures), (got_figures, figures)
    assert figures["retrieval_accuracy"] >= 0 and len(figures) == 6


# --- the end of a process ---------------------------------------------------------------------------------------------

ENDING = """
import atexit, sys, time, types

def last():  # gloo's thread finishes meanwhile and waits for the interpreter's lock, which it gets when it is too late
    end = time.time() + 5
    while time.time() < end:
        pass

rank, init, ends = int(sys.argv[1]), sys.argv[2], sys.argv[3]
if rank == 1:
    atexit.register(last)
sys.setswitchinterval(100)
import torch, torch.distributed as dist
if ends == "in order" and rank == 1:
    from hacl_llava import compat

dist.init_process_group("gloo", init_method=f"file://{init}", rank=rank, world_size=2)

class Slow:  # keeps the interpreter's shutdown going while the other thread wakes up
    def __del__(self, sleep=time.sleep):
        sleep(1)

def reduce():
    tensor = torch.ones(3)
    tensor.note = "so that freeing it needs the interpreter"
    time.sleep(1.5 if rank == 0 else 0)
    return dist.all_reduce(tensor, async_op=True)

work = reduce()
if rank == 0:
    work.wait()
del work
slow = Slow()
if rank == 0:
    dist.destroy_process_group()
elif ends == "in order":
    compat.LLaVATrainer.save_state(types.SimpleNamespace(is_world_process_zero=lambda: False))
"""


@pytest.mark.once
@pytest.mark.parametrize("ends", ["in order", "as stock"])
def test_a_process_ends_without_abort(tmp_path, ends):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ENDING, str(rank), str(tmp_path / "rendezvous"), ends],
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    errors = [p.communicate(timeout=120)[1] for p in processes]
    codes = [p.returncode for p in processes]
    if ends == "in order":
        assert codes == [0, 0], errors
    else:  # control: what a training run met now and then
        assert codes[1] == -signal.SIGABRT and "terminate called" in errors[1]
