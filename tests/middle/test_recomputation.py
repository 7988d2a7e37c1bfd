"""Fewer layers computed again in the backward pass: gradients stay; how many, by memory; memory that runs short."""

import runpy
import types

import pytest
import torch
from conftest import arguments, batch_of, gradients, load, relative
from test_e2e import log_of
from test_integration import run_main, train_module  # noqa: F401
from transformers import Trainer
from workers import ROOT, run_ranks

from hacl_llava import recomputation
from hacl_llava.config import HaclError, RunSettings
from hacl_llava.recomputation import KeptBytes, Memory, Recomputation, recompute

LAYERS = 2  # of the miniature
CPU = torch.device("cpu")


def checkpointed(model, reentrant=False):
    """As LLaVA's train() does it."""
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model


@pytest.fixture
def float64():
    """The default dtype too, of which transformers 4.37 makes its masks."""
    torch.set_default_dtype(torch.float64)
    yield torch.float64
    torch.set_default_dtype(torch.float32)


def train(model, batch):
    """The gradients of a step, and how often each layer ran."""
    runs, layers = [0] * LAYERS, model.get_model().layers

    def counting(i):
        def hook(*_):
            runs[i] += 1

        return hook

    hooks = [layer.mlp.register_forward_pre_hook(counting(i)) for i, layer in enumerate(layers)]
    model.zero_grad(set_to_none=True)
    model(**batch).loss.backward()
    for hook in hooks:
        hook.remove()
    return gradients(model), runs


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "separate"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trains"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_gradients_are_those_of_all_and_of_no_checkpointing(mini, float64, reentrant, frozen, fused):
    model, tokenizer = load(mini, float64, frozen=frozen, fused=fused)
    batch = batch_of(mini, model, tokenizer)
    model(**batch)  # the self-check
    want, plain = train(model, batch)
    checkpointed(model, reentrant)
    # Passes with a graph: generation, e_v where it has its own, and texts only where the LLM trains.
    passes = (1 if fused else 2) + (0 if frozen else 1)
    for count, *lean in ((None,), (0,), (1,), (0, True), (2,), (1, False)):
        if count is not None:
            recompute(model.get_model(), count, *lean)
        got, runs = train(model, batch)
        again = LAYERS if count is None else count
        assert runs == [n + (passes if i < again else 0) for i, n in enumerate(plain)]
        assert set(got) == set(want)
        assert all(relative(got[n], want[n]) <= 1e-10 for n in want if want[n].norm() > 1e-12)


def test_kept_bytes_are_what_peak_memory_grows_by(mini):
    """Counted as benchmarks/step.py counts peak memory, which knows nothing of autograd."""
    peak_of = runpy.run_path(str(ROOT / "benchmarks/step.py"))["Peak"]
    model, tokenizer = load(mini)
    batch = batch_of(mini, model, tokenizer, range(12))
    model(**batch)
    checkpointed(model)
    kept = KeptBytes(model.get_model().layers[-1])
    recompute(model.get_model(), 1, lean=False)
    without, _ = train(load(mini)[0], batch)
    got, _ = train(model, batch)
    kept.remove()
    assert all(torch.equal(got[n], g) for n, g in without.items())  # measuring changes nothing
    peaks = []
    for count, lean in ((1, False), (0, False), (1, True), (0, True)):
        recompute(model.get_model(), count, lean)
        train(model, batch)
        model.zero_grad(set_to_none=True)
        with peak_of([*model.parameters(), *model.buffers()]) as peak:
            model(**batch).loss.backward()
        peaks.append(peak.peak)
    assert kept.most == pytest.approx(peaks[1] - peaks[0], rel=0.03)
    assert kept.most - kept.spared == pytest.approx(peaks[3] - peaks[2], rel=0.03)
    assert kept.spared > 0.1 * kept.most


def on_a_device(monkeypatch, *found):
    """Memory as a GPU would tell it: each of ``found`` in turn."""
    answers = iter(found)
    monkeypatch.setattr(recomputation, "memory", lambda device: next(answers))


def said_of(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("HACL checkpointing: ")]


@pytest.mark.parametrize(
    "room, count, lean",
    [(-1, 2, False), (0.01, 1, True), (0.7, 1, True), (0.99, 0, True), (1.01, 0, False), (9, 0, False)],
)
def test_auto_leaves_a_tenth(mini, monkeypatch, capsys, room, count, lean):
    """After a first step of two micro-batches; ``room``: in layers, beyond what that step took."""
    model, tokenizer = load(mini)
    small, large = (batch_of(mini, model, tokenizer, range(n)) for n in (2, 4))
    checkpointed(model)
    first = KeptBytes(model.get_model().layers[-1])
    recompute(model.get_model(), 1, lean=False)
    train(model, large)
    first.remove()
    before, after, peak = 1000, 1600, 5_000_000  # the optimizer's state came to be after the peak
    limit = round((peak + 600 + room * first.most) / 0.9)
    on_a_device(monkeypatch, Memory(before, before, limit), Memory(after, peak, limit))
    run = Recomputation(model, "auto", CPU, alone=True)
    for number, batch in ((7, small), (7, large), (8, small)):
        run.step(number, lambda batch=batch: train(model, batch)[0])
        assert (run.count, run.lean) == ((1, False) if number == 7 else (count, lean))
    (said,) = said_of(capsys)
    assert f"{count} of 2 layers are computed again" in said
    assert ("and the activation in the MLP of the others" in said) is lean


def test_an_mlp_of_others_is_left_alone(mini):
    """As another library's kernels would stand in its place."""
    model, tokenizer = load(mini)
    batch, mlp = batch_of(mini, model, tokenizer, range(2)), model.get_model().layers[1].mlp
    want, _ = train(model, batch)
    theirs = mlp.forward = lambda x: type(mlp).forward(mlp, x)
    checkpointed(model)
    for lean in (True, False):
        recompute(model.get_model(), 1, lean)
        got, _ = train(model, batch)
        assert mlp.forward is theirs and all(torch.equal(got[n], g) for n, g in want.items())
    kept = KeptBytes(model.get_model().layers[1])
    train(model, batch)
    assert kept.most and not kept.spared  # so that `auto` does not count on it


def test_auto_looks_again_before_a_larger_batch(mini, monkeypatch, capsys):
    model, tokenizer = load(mini)
    small, large = (batch_of(mini, model, tokenizer, range(n)) for n in (2, 8))
    checkpointed(model)
    on_a_device(monkeypatch, Memory(0, 0, 10_000_000), Memory(0, 3_000_000, 10_000_000))
    run = Recomputation(model, "auto", CPU, alone=True)
    counts = []
    for number, batch in enumerate((small, small, large, small)):
        _, runs = run.step(number, lambda batch=batch: train(model, batch))
        counts.append((run.count, runs[0]))
    # The large one is four times the first: 12 MB of the 9 that may be taken. It runs with all layers itself.
    (first, _), *others = counts
    assert first == 1 and others == [(0, 2), (2, 3), (2, 3)]
    assert len(said_of(capsys)) == 2


def agreeing_worker(rank, world, paths, zero3):
    """Each rank with a memory of its own: how many layers it computes again afterwards."""
    recomputation.is_deepspeed_zero3_enabled = lambda: zero3
    limits = iter([Memory(0, 0, 1), Memory(0, 10, 10**9 if rank else 1)])
    recomputation.memory = lambda device: next(limits)
    mini = types.SimpleNamespace(**paths)
    model, tokenizer = load(mini)
    run = Recomputation(checkpointed(model), "auto", CPU, alone=False)
    for number in (1, 2):
        run.step(number, lambda: train(model, batch_of(mini, model, tokenizer, range(4))))
    return run.count


@pytest.mark.distributed
@pytest.mark.parametrize("zero3, counts", [(True, [2, 2]), (False, [2, 0])])
def test_ranks_agree_where_layers_gather_their_weights(mini, zero3, counts):
    assert run_ranks(agreeing_worker, vars(mini), zero3) == counts


def test_auto_on_a_cpu_is_all(mini, capsys):
    run = Recomputation(checkpointed(load(mini)[0]), "auto", CPU, alone=True)
    assert [run.step(1, lambda: 5), run.count, run.setting] == [5, None, "all"]
    assert "auto on cpu, whose memory cannot be asked: all" in capsys.readouterr().out


# --- memory that runs short -------------------------------------------------------------------------------------------

SHORT = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def short_once(model, where):
    """The next step runs short of memory, once; ``where``: in the forward pass, or once the heads have gradients."""
    left = [1]

    def fail(*_):
        if left and torch.is_grad_enabled() or left and where == "backward":
            left.clear()
            raise SHORT

    if where == "forward":
        return model.get_model().layers[1].mlp.register_forward_hook(fail)
    return model.get_model().mm_projector[0].weight.register_hook(fail)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_step_that_runs_short_is_repeated_as_if_nothing_had_been(mini, capsys, float64, where):
    """Over two micro-batches whose gradients add up, with a queue and a centre, which each step changes."""
    states = []
    for short in (False, True):
        model, tokenizer = load(mini, float64, queue_size=16, centre=True)
        batches = [batch_of(mini, model, tokenizer, range(i, i + 4)) for i in (0, 4, 8)]
        checkpointed(model)
        run = Recomputation(model, "0", CPU, alone=True)
        for i, batch in enumerate(batches):
            if short and i == 1:
                hook = short_once(model, where)
            run.step(1, lambda model=model, batch=batch: model(**batch).loss.backward())
        if short:
            hook.remove()
            assert run.count == LAYERS
        queue = model.hacl_loss.queue_state()
        kept = model.hacl_head.centre.state(), {k: queue[k] for k in ("images", "texts", "mask")}
        tensors = {f"{i}.{k}": v.double() for i, part in enumerate(kept) for k, v in part.items()}
        states.append((gradients(model) | tensors, queue["position"], model.hacl_metrics()))
    (want, *rest), (got, *again) = states
    assert set(got) == set(want) and all(relative(got[n], want[n]) <= 1e-10 for n in want if want[n].norm() > 1e-12)
    assert rest[0] == again[0] and rest[1] == pytest.approx(again[1], rel=1e-10)
    said = capsys.readouterr().out
    assert "memory ran short in step 1 with 0 of 2 layers computed again; from now on all 2 are" in said


def test_what_cannot_be_repeated_is_refused(mini):
    def short():
        raise SHORT

    model = checkpointed(load(mini)[0])
    with pytest.raises(HaclError, match=r"step 3: memory ran short .CUDA out.+--hacl_checkpoint_layers all.+above 1"):
        Recomputation(model, "1", CPU, alone=False).step(3, short)
    for setting, alone in (("all", True), ("2", True), ("2", False)):  # nothing to fall back on
        with pytest.raises(torch.cuda.OutOfMemoryError):
            Recomputation(model, setting, CPU, alone).step(3, short)
    for wrong in ("", "some", "-1", "2.5"):
        with pytest.raises(HaclError, match="hacl_checkpoint_layers is '.*', allowed is all, auto or a number >= 0"):
            RunSettings(checkpoint_layers=wrong)
    with pytest.raises(HaclError, match="hacl_checkpoint_layers is 3, allowed is all, auto or a number from 0 to"):
        Recomputation(model, "3", CPU, alone=True)


# --- through the door -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hacl", [True, False])
def test_a_run_with_fewer_layers_that_runs_short(monkeypatch, capsys, mini, tmp_path, train_module, hacl):  # noqa: F811
    """The same losses and weights as a run with all; memory runs short in its second of two steps."""
    found, calls, compute_loss = [], [], Trainer.compute_loss

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2 and setting == "1":
            raise SHORT
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "compute_loss", failing)
    for setting in ("all", "1", "auto"):
        calls.clear()
        flags = ("--use_cpu", "True", "--max_steps", "2", "--hacl_checkpoint_layers", setting)
        out = tmp_path / setting
        status, said, err = run_main(monkeypatch, capsys, *arguments(mini, out, *flags, "--use_hacl", str(hacl)))
        assert status == 0, err
        assert ("memory ran short in step 2 with 1 of 2" in said) is (setting == "1")
        assert ("auto on cpu" in said) is (setting == "auto")
        weights = torch.load(out / "mm_projector.bin", weights_only=True)
        found.append(([x["loss"] for x in log_of(out) if "loss" in x], weights))
    (losses, want), *others = found
    assert len(losses) == 2
    for got_losses, got in others:
        assert got_losses == losses and all(torch.allclose(got[k], want[k], rtol=1e-4, atol=1e-6) for k in want)
