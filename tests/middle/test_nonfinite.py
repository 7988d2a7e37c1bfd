"""What is not finite stays away from the weights, and the run says which records it was."""

import json
import math
import types

import pytest
import torch
from conftest import batch_of, gradients, load, texts_of, with_texts

from hacl_llava.config import HaclError
from hacl_llava.loss import HaclLoss
from hacl_llava.nonfinite import BLANK, UNLABELLED, NonFiniteGuard

NAN, INF = float("nan"), float("inf")


def linear(guard=None):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    if guard is not None:
        guard.watch(model.parameters())
    return model


def backward(model, guard, x, step=1, records=None, loss=None):
    guard.begin(step, records)
    value = model(x).square().mean() if loss is None else loss(model(x))
    guard.see(value)
    value.backward()
    return guard.end(value.detach())


GOOD = torch.linspace(-1, 1, 6).view(2, 3)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_batch_that_is_not_finite_adds_nothing(tmp_path, value):
    guard = NonFiniteGuard("skip", tmp_path)
    model, plain = linear(guard), linear()
    bad = GOOD.clone()
    bad[1, 2] = value
    losses = [backward(model, guard, x) for x in (GOOD, bad, GOOD * 2)]
    for x in (GOOD, GOOD * 2):
        plain(x).square().mean().backward()
    want = gradients(plain)
    assert all(torch.equal(g, want[n]) for n, g in gradients(model).items())  # bit for bit
    assert losses[1] == 0 and losses[0] == plain(GOOD).square().mean()


def test_control_without_the_guard_the_gradient_is_lost():
    model = linear()
    model(GOOD * NAN).square().mean().backward()
    assert not any(g.isfinite().all() for g in gradients(model).values())


def root(out):
    """Finite itself; its gradient is not, where the output is 0."""
    return (out - out.detach()).abs().sqrt().sum()


@pytest.mark.parametrize("scaled", [False, True])
def test_a_gradient_that_is_not_finite(tmp_path, scaled):
    guard = NonFiniteGuard("skip", tmp_path, scaled=scaled)
    model = linear(guard)
    assert backward(model, guard, GOOD, loss=root) == 0
    guard.read()
    found = [bool(g.isfinite().all()) for g in gradients(model).values()]
    if scaled:  # an overflow has to reach fp16's scaler, which makes the scale smaller
        assert not any(found) and not guard.path.exists()
    else:
        assert all(found) and json.loads(guard.path.read_text())["what"] == "gradient"


def test_the_report_names_step_and_records(tmp_path, capsys):
    names = {4: {"index": 4, "id": "cat", "image": "cat.jpg"}, 7: {"index": 7}}
    guard = NonFiniteGuard("skip", tmp_path / "out", name=names.__getitem__)
    model = linear(guard)
    backward(model, guard, GOOD, step=1, records=torch.tensor([4, 4]))
    guard.read()
    assert not guard.path.exists() and guard.found == 0
    backward(model, guard, GOOD * NAN, step=2, records=torch.tensor([4, 7]))
    backward(model, guard, GOOD, step=3, records=torch.tensor([4, 4]))
    assert not guard.path.exists()  # nothing is looked at before it is asked
    guard.read()
    guard.read()
    (line,) = guard.path.read_text().splitlines()
    want = {"step": 2, "rank": 0, "what": "loss", "began_here": True, "records": [names[4], names[7]]}
    assert json.loads(line) == want
    assert "step 2, rank 0, records 4 (id 'cat'), 7: the loss is not finite;" in capsys.readouterr().out
    assert guard.take_counts() == (1, 3) and guard.take_counts() == (0, 0) and guard.found == 1


def test_stop_says_what_to_do(tmp_path):
    guard = NonFiniteGuard("stop", tmp_path)
    model = linear(guard)
    for step in (1, 2):
        backward(model, guard, GOOD * NAN, step, torch.arange(10))
    with pytest.raises(HaclError) as error:
        guard.read()
    message = str(error.value)
    assert "step 1, rank 0, records 0, 1, 2, 3, 4, 5, 6, 7 and 2 more: the loss is not finite, and in 1 more" in message
    assert "never reached the weights" in message and "--hacl_nonfinite skip" in message and "\n" not in message
    assert len(guard.path.read_text().splitlines()) == 2
    assert all((p.grad == 0).all() for p in model.parameters())


def test_a_run_without_labels_stops(tmp_path):
    def looked(labels, final=False):
        guard = NonFiniteGuard("skip", tmp_path)
        for step, labelled in enumerate(labels):
            guard.begin(step)
            guard.see(torch.tensor(1.0), labelled=torch.tensor(labelled))
            guard.end(torch.tensor(1.0))
        guard.read(final)

    looked([False] * (UNLABELLED - 1))  # they may be bad records, one after the other
    looked([True] + [False] * UNLABELLED, final=True)
    with pytest.raises(HaclError, match="none of the 20 batches so far had a label.+--version.+--model_max_length"):
        looked([False] * UNLABELLED)
    with pytest.raises(HaclError, match="none of the 3 batches"):
        looked([False] * 3, final=True)


def test_where_it_began_comes_first(tmp_path):
    """A loss over all ranks is lost on all; the rank whose own part was finite is not the one to look at."""
    guard = NonFiniteGuard("stop", tmp_path)
    for step, own in ((1, True), (2, False)):
        guard.begin(step)
        guard.see(torch.tensor(NAN), own=torch.tensor(own))
        guard.end(torch.tensor(NAN))
    with pytest.raises(HaclError, match="step 2, rank 0: .* in 1 more"):
        guard.read()
    assert [json.loads(x)["began_here"] for x in guard.path.read_text().splitlines()] == [False, True]


def test_skip_ends_where_nothing_is_finite(tmp_path):
    guard = NonFiniteGuard("skip", tmp_path)
    model = linear(guard)
    for step in range(BLANK - 1):
        backward(model, guard, GOOD * NAN, step)
        guard.read()
    backward(model, guard, GOOD)
    guard.read()  # one that is finite, and it counts anew
    for step in range(BLANK - 1):
        backward(model, guard, GOOD * NAN, step)
    guard.read()
    backward(model, guard, GOOD * NAN)
    with pytest.raises(HaclError, match=f"the last {BLANK} batches of each rank .* learning rate"):
        guard.read()


def test_a_folder_that_cannot_be_written_is_said_and_does_not_end_it(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    guard = NonFiniteGuard("skip", tmp_path / "file")
    backward(linear(guard), guard, GOOD * NAN)
    guard.read()
    assert "cannot be written" in capsys.readouterr().out and guard.found == 1


def test_flags_are_read_by_themselves_where_nothing_is_logged(tmp_path, monkeypatch):
    monkeypatch.setattr("hacl_llava.nonfinite._KEPT", 3)
    guard = NonFiniteGuard("skip", tmp_path)
    model = linear(guard)
    for step in range(7):
        backward(model, guard, GOOD * (NAN if step == 1 else 1), step)
    assert guard.found == 1 and len(guard._pending) == 1


def test_the_queue_takes_no_feature_that_is_not_finite():
    torch.manual_seed(0)
    unit = torch.nn.functional.normalize
    loss = HaclLoss(queue_size=6).train()
    x = [unit(torch.randn(3, 4), dim=-1) for _ in range(2)]
    loss(*x)
    x[0][1] = NAN
    loss(*x)
    queue = loss.queue_state()
    assert queue["images"].isfinite().all() and queue["mask"].tolist() == [True, True, True, True, False, True]
    v, t = (unit(torch.randn(3, 4), dim=-1).requires_grad_() for _ in range(2))
    loss(v, t)["loss"].backward()
    assert v.grad.isfinite().all() and t.grad.isfinite().all()


# --- in the trainer ---------------------------------------------------------------------------------------------------


class Waits(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts what makes the host wait for the device: a tensor's value in Python, or a shape that depends on one."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(name in str(function) for name in ("_local_scalar_dense", "nonzero", "is_nonzero")):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


def trainer(mini, folder, batches, nonfinite="skip", guarded=True, lr=1e-2, **more):
    """A `HaclTrainer` over ready batches, with and without its guard."""
    import llava.train.train as stock

    from hacl_llava.config import RunSettings
    from hacl_llava.trainer import HaclTrainer

    model, tokenizer = load(mini, queue_size=5)
    args = stock.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=1, max_steps=len(batches), logging_steps=1, report_to=[],
        learning_rate=lr, use_cpu=True, lr_scheduler_type="constant", save_strategy="no",
        remove_unused_columns=False, disable_tqdm=True, **more,
    )  # fmt: skip
    args.tune_mm_mlp_adapter = True
    args.hacl_run = RunSettings(nonfinite=nonfinite)

    class Ready(torch.utils.data.Dataset):
        list_data_dict = [{"id": f"r{i}"} for i in range(8)]

        def __len__(self):
            return len(batches)

        def __getitem__(self, i):
            return batches[i]

    class Trainer(HaclTrainer):
        waits = ()

        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, *args, **kwargs):
            with Waits() as waits:
                loss = super().training_step(*args, **kwargs)
            self.waits = (*self.waits, waits.found)
            return loss

    made = Trainer(model, args, train_dataset=Ready(), data_collator=lambda items: dict(items[0]), tokenizer=tokenizer)
    if not guarded:
        made.guard = types.SimpleNamespace(
            watch=lambda *a: None, begin=lambda *a: None, see=lambda *a: None, end=lambda loss: loss,
            read=lambda **_: None, take_counts=lambda: (0, 0), found=0,
        )  # fmt: skip
    return made


@pytest.fixture(scope="module")
def batches(mini):
    model, tokenizer = load(mini)
    made = [batch_of(mini, model, tokenizer, range(2 * i, 2 * i + 2)) for i in range(4)]
    return [{**batch, "record_indices": torch.tensor([2 * i, 2 * i + 1])} for i, batch in enumerate(made)]


def spoiled(batches, at):
    return [{**b, "images": b["images"] * NAN} if i == at else b for i, b in enumerate(batches)]


def masked(batches, at):
    """The same batches, with one that has nothing to learn from: loss and gradients are 0."""
    batch = batches[at]
    blank = {**batch, "images": torch.zeros_like(batch["images"]), "labels": torch.full_like(batch["labels"], -100)}
    captions, hallucinated = texts_of(batch)
    blank = with_texts(blank, [None] * len(captions), [[None] * len(row) for row in hallucinated])
    return [blank if i == at else b for i, b in enumerate(batches)]


def weights(run):
    return {n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad}


def losses(run):
    return [x["loss"] for x in run.state.log_history if "loss" in x]


def test_finite_steps_are_unchanged_and_nothing_waits(mini, tmp_path, batches):
    guarded = trainer(mini, tmp_path / "a", batches)
    plain = trainer(mini, tmp_path / "b", [{**b, "record_indices": None} for b in batches], guarded=False)
    for run in (guarded, plain):
        run.train()
    want = weights(plain)
    assert all(torch.equal(p, want[n]) for n, p in weights(guarded).items()) and losses(guarded) == losses(plain)
    assert guarded.waits[1:] == plain.waits[1:] and len(guarded.waits) == 4
    curious = trainer(mini, tmp_path / "c", batches[:2])
    curious.guard.end = lambda loss: loss if loss.isfinite() else loss * 0  # control: this one waits
    curious.train()
    assert len(curious.waits[1]) == len(plain.waits[1]) + 1
    assert not (tmp_path / "a/nonfinite.jsonl").exists()
    assert not any("nonfinite" in x for x in guarded.state.log_history)


def test_skip_goes_on_as_if_the_batch_were_empty(mini, tmp_path, batches):
    run = trainer(mini, tmp_path / "a", spoiled(batches, 1))
    want = trainer(mini, tmp_path / "b", masked(batches, 1))
    want.train()
    run.train()
    for name, p in weights(want).items():
        assert torch.equal(weights(run)[name], p), name
    assert torch.equal(run.model.hacl_loss.queue_state()["mask"], want.model.hacl_loss.queue_state()["mask"])
    got = losses(run)
    assert math.isnan(got[1]) and got[2:] == losses(want)[2:] and math.isfinite(run.state.log_history[-1]["train_loss"])
    log = [x for x in run.state.log_history if "loss" in x]
    assert "nonfinite" not in log[0] and [x["nonfinite"] for x in log[1:]] == [1, 1, 1]
    assert "loss_lm" not in log[1] and all(math.isfinite(x["loss_lm"]) for x in (log[0], log[2], log[3]))
    (entry,) = [json.loads(x) for x in (tmp_path / "a/nonfinite.jsonl").read_text().splitlines()]
    assert entry["step"] == 2 and entry["began_here"]
    assert entry["records"] == [{"index": 2, "id": "r2"}, {"index": 3, "id": "r3"}]


def test_the_logged_loss_is_the_mean_of_what_is_finite(mini, tmp_path, batches):
    # with a learning rate of 0, the steps' losses do not depend on each other (but on the queue)
    run = trainer(mini, tmp_path / "a", spoiled(batches[:2], 1), gradient_accumulation_steps=2, lr=0.0)
    run.args.max_steps = 1
    run.train()
    alone = trainer(mini, tmp_path / "b", batches[:1], lr=0.0)
    alone.train()
    assert losses(run) == pytest.approx(losses(alone), abs=1e-4)


def test_stop_ends_before_anything_is_saved(mini, tmp_path, batches):
    run = trainer(mini, tmp_path / "a", spoiled(batches, 2), nonfinite="stop")
    run.args.logging_steps = 100  # so that the checkpoint is the first to look
    run.args.save_strategy = type(run.args.save_strategy)("steps")
    run.args.save_steps = 2
    run.state.save_steps = 2
    with pytest.raises(HaclError, match=r"step 3, rank 0, records 4 \(id 'r4'\), 5 \(id 'r5'\): the loss"):
        run.train()
    assert [p.name for p in (tmp_path / "a").glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (tmp_path / "a/unfinished").exists()
    assert all(p.isfinite().all() for p in weights(run).values())
