"""Stage 1 stopped at any moment: the same command goes on, and ends where it would have ended."""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import arguments, made_once, names_in, relative
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from workers import CONTEXT, Run, alone, slow_disk

from hacl_llava import resume
from hacl_llava.compat import STATE_FILE, order_is_of_one_rank
from hacl_llava.config import HaclError

ROOT = Path(__file__).parents[2]


def stage1(mini, output, *more):
    """Arguments of a run of 8 steps in two epochs, every one of them saved."""
    argv = arguments(mini, output, "--save_steps", "1", "--save_total_limit", "2", "--hacl_queue_size", "5", *more)
    argv[argv.index("--save_strategy") + 1] = "steps"
    argv[argv.index("--num_train_epochs") + 1] = "2"
    argv[argv.index("--weight_decay") + 1] = "0.01"
    return list(map(str, argv))


def final(folder):
    """What a run left: every tensor, and losses and learning rates by step."""
    tensors = torch.load(folder / "mm_projector.bin", weights_only=True)
    if (folder / "hacl_head.safetensors").exists():
        tensors |= load_file(folder / "hacl_head.safetensors")
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    keys = ("step", "loss", "learning_rate", "loss_lm", "loss_i2t", "retrieval_accuracy", "hacl_scale")
    return tensors, [[x.get(k) for k in keys] for x in log if "loss" in x]


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in b)


def steps(folder):
    return [int(p.name.split("-")[1]) for p in resume.checkpoints(folder)]


# --- in this process --------------------------------------------------------------------------------------------------


@pytest.fixture
def train(monkeypatch, capsys, mini):
    """train(output, *flags) -> (status, stderr), through the door."""
    from hacl_llava import integration, train

    # isort: split
    import llava.train.train as module

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # where --bf16 of a run would outlive it

    def run(output, *more):
        monkeypatch.setattr(sys, "argv", ["pretrain_hacl.py", *stage1(mini, output, "--use_cpu", "True", *more)])
        status = train.main()
        return status, capsys.readouterr().err

    yield run
    resume.SIGNALS.release()
    integration.uninstall(vars(module))


def test_goes_on_as_if_never_stopped(train, tmp_path):
    """In the middle of the second epoch, with LLaVA's sampler by lengths, queue, centre, a late start and bfloat16: bit
    for bit."""
    flags = ("--save_total_limit", "8", "--group_by_modality_length", "True", "--bf16", "True")
    flags += ("--hacl_centre", "True", "--hacl_start", "0.3", "--hacl_head_dim", "0")
    assert train(tmp_path / "whole", *flags)[0] == 0
    want, log = final(tmp_path / "whole")
    assert len(log) == 8 and steps(tmp_path / "whole") == list(range(1, 9))

    def resumed(name, change=None):
        shutil.copytree(tmp_path / "whole/checkpoint-6", tmp_path / name / "checkpoint-6")
        if change:
            change(tmp_path / name / "checkpoint-6")
            resume.write_manifest(tmp_path / name / "checkpoint-6")
        status, err = train(tmp_path / name, *flags)
        assert status == 0, err
        return final(tmp_path / name)

    got, again = resumed("resumed")
    assert same(got, want) and again == log
    assert (tmp_path / "whole/checkpoint-6" / STATE_FILE).stat().st_size < 150_000  # 10,401 floats, three times

    # controls: each part is needed
    if not order_is_of_one_rank():  # else the Trainer draws the earlier epochs' orders again, to come to this one's
        assert not same(resumed("order", lambda f: (f / "rng_epoch.pt").unlink())[0], want)
    assert not same(resumed("queue", lambda f: (f / "hacl_queue_0.pt").unlink())[0], want)

    def forget(folder):
        with safe_open(folder / STATE_FILE, "pt") as file:
            tensors = {k: file.get_tensor(k) for k in file.keys() if not k.startswith("exp_avg_sq")}  # noqa: SIM118
            save_file(tensors, folder / STATE_FILE, metadata=file.metadata())

    assert not same(resumed("optimizer", forget)[0], want)

    for name in ("centre", "image_centre"):

        def without(folder, name=name):
            file = folder / "hacl_head.safetensors"
            kept = {k: v for k, v in load_file(file).items() if name not in k}
            with safe_open(file, "pt") as old:
                metadata = old.metadata()
            save_file(kept, file, metadata=metadata)

        assert not same(resumed(name, without)[0], want)
    weights = [row[-1] for row in log]
    assert weights[:3] == [0, 0, 0] and 0 < weights[3] < weights[4] == weights[7] == 1


def test_what_cannot_be_as_it_was_is_said(train, tmp_path, mini, records):
    flags = ("--use_hacl", "False", "--max_steps", "2")
    assert train(tmp_path / "out", *flags)[0] == 0
    (tmp_path / "fewer.json").write_text(json.dumps(records[:24]))
    more = ("--max_steps", "3", "--data_path", tmp_path / "fewer.json", "--per_device_train_batch_size", "4")
    status, err = train(tmp_path / "out", *flags, *more, "--seed", "7")
    said = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert status == 0 and len(said) == 3, err
    assert "8 records a step then, 4 now: the position in the data is counted in steps" in said[0]
    assert "32 records then, 24 now" in said[1] and "--seed 42 then, 7 now" in said[2]
    log = json.loads((tmp_path / "out/trainer_state.json").read_text())
    assert log["global_step"] == 3 and log["epoch"] == 0.5  # 24 / 4 steps in one: the new batch size counts

    status, err = train(tmp_path / "out", "--max_steps", "4")  # with HACL: heads train too
    assert status == 2 and "begun with --use_hacl False; give that to go on" in err
    status, err = train(
        tmp_path / "out", *flags, "--max_steps", "4", "--mm_use_im_start_end", "True"
    )  # words train too
    assert status == 2 and "in which something else was trained (model.embed_tokens.weight" in err, err


@pytest.mark.once  # the order of the data is that of the transformers with which it was begun
def test_a_run_of_the_first_version_goes_on(train, tmp_path):
    """tests/data/begun-at-20bdd60: half of a run, and the log of that version's other half."""
    begun = ROOT / "tests/data/begun-at-20bdd60"
    want = [x for x in json.loads((begun / "trainer_state.json").read_text())["log_history"] if "loss" in x]
    shutil.copytree(begun / "checkpoint-4", tmp_path / "out/checkpoint-4")
    flags = ("--save_steps", "4", "--weight_decay", "0", "--hacl_queue_size", "12")
    status, err = train(tmp_path / "out", *flags, "--hacl_preset", "default", "--hacl_representation", "prompt")
    assert status == 2 and "begun with --hacl_representation eos; give that to go on, or another" in err
    status, err = train(tmp_path / "out", *flags)
    assert status == 0 and "warning" not in err, err
    log = [x for x in json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"] if "loss" in x]
    assert len(log) == len(want) == 8
    for got, old in zip(log, want):
        assert {k: got[k] for k in old} == pytest.approx(old, rel=1e-5)


def test_other_settings_are_said():
    then = {"ranks": 2, "global_batch": 8, "records": 9, "seed": 1, "hacl": {"weight": 1.0, "queue_size": 5}}
    assert resume.differences(then, then) == []
    now = {**then, "ranks": 1, "hacl": {"weight": 2.0, "queue_size": 5}}
    first, second = resume.differences(then, now)
    assert first.startswith("2 ranks then, 1 now: random states are not restored")
    assert ("another order" in first) == order_is_of_one_rank() and second == "hacl_weight 1.0 then, 2.0 now"


DAMAGE = {
    "missing": lambda f: (f / STATE_FILE).unlink(),
    "truncated": lambda f: (f / STATE_FILE).write_bytes((f / STATE_FILE).read_bytes()[:-1]),
    "empty after a power loss": lambda f: (f / "scheduler.pt").write_bytes(b""),
    "list of files empty": lambda f: (f / resume.MANIFEST).write_text(""),
    "list of files no list": lambda f: (f / resume.MANIFEST).write_text("[]"),
    "nothing but a name": lambda f: [p.unlink() for p in f.iterdir()],
    "no list, no state": lambda f: [(f / n).unlink() for n in (resume.MANIFEST, "trainer_state.json")],
    "no list, weights cut": lambda f: ((f / resume.MANIFEST).unlink(), (f / STATE_FILE).write_bytes(b"x")),
}


def fake(folder, *numbers):
    for n in numbers:
        (folder / f"checkpoint-{n}").mkdir(parents=True)
        for name in (STATE_FILE, "scheduler.pt"):
            (folder / f"checkpoint-{n}" / name).write_bytes(b"{}" * 9)
        (folder / f"checkpoint-{n}/trainer_state.json").write_text("{}")
        resume.write_manifest(folder / f"checkpoint-{n}")


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_checkpoint_is_passed_over(tmp_path, capsys, how):
    fake(tmp_path, 9, 10, 11)
    (tmp_path / "checkpoint-12").write_text("no folder")
    assert resume.last_whole(tmp_path).endswith("checkpoint-11") and not capsys.readouterr().err
    DAMAGE[how](tmp_path / "checkpoint-11")
    DAMAGE[how](tmp_path / "checkpoint-9")  # older than what is used: not spoken of
    assert resume.last_whole(tmp_path).endswith("checkpoint-10")
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and re.match(r"warning: .*checkpoint-11: passed over, .*; checkpoint-10 is used", err[0])
    DAMAGE[how](tmp_path / "checkpoint-10")
    assert resume.last_whole(tmp_path) is None
    assert "training starts from the beginning" in capsys.readouterr().err


def test_run_with_damaged_checkpoints(train, tmp_path):
    """The one before is used, and however few are kept, a damaged one never costs a whole one its place."""
    assert train(tmp_path / "out")[0] == 0
    want = final(tmp_path / "out")
    assert steps(tmp_path / "out") == [7, 8]
    (tmp_path / "out/checkpoint-8" / STATE_FILE).write_bytes(b"")
    shutil.copytree(tmp_path / "out/checkpoint-8", tmp_path / "out/checkpoint-99")
    status, err = train(tmp_path / "out", "--save_total_limit", "1")
    assert status == 0 and err.count("passed over, training_state.safetensors has 0 bytes of ") == 2, err
    assert final(tmp_path / "out")[1] == want[1] and same(final(tmp_path / "out")[0], want[0])
    assert [n for n in steps(tmp_path / "out") if not resume.broken(tmp_path / f"out/checkpoint-{n}")] == [8]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")])
def test_full_disk_while_saving(train, tmp_path, monkeypatch, error):
    from hacl_llava import trainer

    save = trainer.save_training_state

    def full(path, *args, **kwargs):
        save(path, *args, **kwargs)
        if "checkpoint-4" in str(path):
            path.write_bytes(path.read_bytes()[:999])
            raise error

    monkeypatch.setattr(trainer, "save_training_state", full)
    status, err = train(tmp_path / "out")
    assert status == 2 and err.count("error:") == 1 and "unfinished: cannot be written" in err
    assert "Traceback" not in err and sorted(os.listdir(tmp_path / "out")) == ["checkpoint-2", "checkpoint-3"]
    monkeypatch.setattr(trainer, "save_training_state", save)
    assert train(tmp_path / "out")[0] == 0
    assert len(final(tmp_path / "out")[1]) == 8


def test_checkpoint_of_stock_llava_is_refused_in_words(train, tmp_path):
    (tmp_path / "out/checkpoint-4").mkdir(parents=True)
    torch.save({}, tmp_path / "out/checkpoint-4/mm_projector.bin")
    (tmp_path / "out/checkpoint-4/config.json").write_text("{}")
    status, err = train(tmp_path / "out")
    assert status == 2 and re.search("error: .*checkpoint-4: is not of a stage 1 that can be gone on from.*remove", err)


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(train, tmp_path):
    (tmp_path / "file").write_text("")
    status, err = train(tmp_path / "file/out")
    assert status == 2 and "error:" in err and "file" in err and "Traceback" not in err


def _hold(folder, held):
    resume.lock_folder(folder)
    held.set()
    time.sleep(99)


@pytest.mark.once
def test_a_second_run_in_the_same_folder_is_refused(train, tmp_path):
    held = CONTEXT.Event()
    holder = CONTEXT.Process(target=_hold, args=(tmp_path, held))
    holder.start()
    try:
        assert held.wait(60)
        status, err = train(tmp_path)
        assert status == 2 and f"another run writes there (process {holder.pid} on " in err and "--output_dir" in err
    finally:
        holder.kill()
        holder.join()
    assert train(tmp_path, "--max_steps", "1")[0] == 0  # a dead one's lock does not count


def test_loss_scale_of_fp16_goes_on():
    """DeepSpeed's own scaler and torch's: neither runs in fp16 on a CPU, so their states alone."""
    from hacl_llava.trainer import ResumableTrainer

    def trainer(scaler=None, zero=None):
        return SimpleNamespace(
            accelerator=SimpleNamespace(scaler=scaler), args=SimpleNamespace(fp16=True),
            optimizer=SimpleNamespace(optimizer=SimpleNamespace(**({"loss_scaler": zero} if zero else {}))),
        )  # fmt: skip

    scaler = pytest.importorskip("deepspeed.runtime.fp16.loss_scaler").DynamicLossScaler
    make = [lambda: trainer(zero=scaler(2.0**16, 1000, 1, 2, False)), lambda: trainer(torch.amp.GradScaler("cpu"))]
    used, fresh = make[0](), make[0]()
    vars(used.optimizer.optimizer.loss_scaler).update(cur_scale=2.0**15, cur_iter=4, last_overflow_iter=3)
    state = json.loads(json.dumps(ResumableTrainer._scaler_state(used)))
    assert ResumableTrainer._scaler_state(fresh) != state and state["cur_scale"] == 2.0**15 and state["cur_iter"] == 4
    ResumableTrainer._restore_scaler(fresh, state)
    assert vars(fresh.optimizer.optimizer.loss_scaler) == vars(used.optimizer.optimizer.loss_scaler)

    used, fresh = make[1](), make[1]()
    used.accelerator.scaler.scale(torch.ones(1))
    used.accelerator.scaler.update(4.0)
    state = json.loads(json.dumps(ResumableTrainer._scaler_state(used)))
    ResumableTrainer._restore_scaler(fresh, state)
    assert ResumableTrainer._scaler_state(fresh) == state
    ResumableTrainer._restore_scaler(trainer(), state)  # of an fp16 run, resumed in bf16


def test_deepspeed_optimizer_that_hides_its_state_is_refused():
    hidden = SimpleNamespace(optimizer=SimpleNamespace(optimizer=torch.optim.AdamW([torch.zeros(1)])))
    with pytest.raises(HaclError, match="does not show its state.*ZeRO stage 1, 2 or 3"):
        resume.optimizers(hidden, [torch.zeros(1)])


def _data_worker(ready):
    """Outlives the first SIGTERM, which a launcher sends to the whole tree, and no second one."""
    resume.in_worker(lambda number: None, 3)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGINT, signal.SIGUSR1):
        os.kill(os.getpid(), number)
    os.write(ready, b"alive")
    os.kill(os.getpid(), signal.SIGTERM)


def _rank(ready):
    """In something that no Python interrupts, as a collective with a rank that died."""
    resume.SIGNALS.catch()
    resume.SIGNALS.phase = "training"
    os.write(ready, b"begun")
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)


def status_of(function, ranks, wait=100):
    """What a process says that runs the function, and its exit status; None where it works on, whatever it is sent."""
    os.environ["LOCAL_SIZE"] = str(ranks)
    said, ready = os.pipe()
    child = os.fork()
    if child == 0:
        function(ready)
        os._exit(0)
    found = os.read(said, 9)
    if function is _rank:
        time.sleep(1)
        os.kill(child, signal.SIGTERM)
    until, done = time.time() + wait, 0
    while time.time() < until and not done:
        done, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.01)
    if done:
        return found, os.waitstatus_to_exitcode(status)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return found, None


@pytest.mark.once
def test_signals_reach_whom_they_should():
    """A data worker; a rank whose launcher has lost another; and, as a control, one whose launcher has not."""
    assert alone(status_of, _data_worker, 1) == (b"alive", -signal.SIGTERM)
    assert alone(status_of, _rank, 2) == (b"begun", 143)
    assert alone(status_of, _rank, 1, 3) == (b"begun", None)


# --- killed for real --------------------------------------------------------------------------------------------------

KILLS = int(os.environ.get("HACL_KILLS", 4))  # in each of the two tests; `make test-all` asks for 20


def catches(pid, number):
    """Whether a process has a handler for a signal; not one that has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    return bool(int(re.search(r"^SigCgt:\s*(\w+)", status, re.M)[1], 16) >> (number - 1) & 1)


@pytest.mark.once
@pytest.mark.e2e
def test_killed_again_and_again_in_one_process(mini, tmp_path):
    """SIGKILL, SIGTERM and others at random moments of loading, training and saving."""
    chance, log, epochs = random.Random(8), tmp_path / "log.txt", max(5, KILLS // 2)
    codes, in_saving, out = [], 0, tmp_path / "killed"

    def start(output):
        argv = stage1(mini, output, "--use_cpu", "True", "--num_train_epochs", str(epochs))
        return Run(argv, log, prepare=(slow_disk, 0.01))

    whole = start(tmp_path / "whole")
    assert whole.ends() == 0, whole.said()[-2000:]
    signals = [signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1, signal.SIGKILL, signal.SIGKILL]
    for kill in range(KILLS):
        seen, part = steps(out), out / "unfinished"
        run = start(out)
        pid, number = run.processes[0].pid, signals[kill % len(signals)]
        waits = ("saving", "step", "time")[kill % 3]
        until = time.time() + (chance.random() * 2 if waits == "time" else 60)
        while time.time() < until and (waits == "time" or steps(out) == seen):
            time.sleep(0.001)
        while waits == "saving" and not names_in(part) and time.time() < until:
            time.sleep(0.001)
        if waits != "saving":
            time.sleep(chance.random() * 0.02)
        until = time.time() + 60
        while number != signal.SIGKILL and not catches(pid, number) and time.time() < until:
            time.sleep(0.001)  # it has hardly begun
        if run.running():
            run.kill(number)
        in_saving += part.exists()
        codes.append(run.ends())
        assert not [n for n in steps(out) if resume.broken(out / f"checkpoint-{n}")]
    last = start(out)
    assert last.ends() == 0, last.said()[-2000:]
    assert set(codes) <= {-9, 75, 0} and codes.count(-9) >= KILLS / 3 and 75 in codes, codes
    assert in_saving >= KILLS / 10, in_saving
    (got, losses), (want, expected) = final(out), final(tmp_path / "whole")
    last = 4 * epochs
    assert len(expected) == last and losses == expected and same(got, want)
    assert steps(out) == [last - 1, last] and not (out / "unfinished").exists()


@pytest.fixture(scope="module")
def rows(mini):
    """The miniature's images with captions of one length, so that the mean over a rank's tokens is that over all."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(mini.llm, use_fast=False)
    records, length = json.loads(mini.data.read_text()), {}
    for record in records:
        length.setdefault(len(tokenizer(record["conversations"][1]["value"]).input_ids), []).append(record)
    captions = max(length.values(), key=len)
    for i, record in enumerate(records):
        record["conversations"][1]["value"] = captions[i % len(captions)]["conversations"][1]["value"]
    path = mini.folder / "one_length.json"
    path.write_text(json.dumps(records))
    return path


EPOCHS = max(2, KILLS // 2)  # of four steps


def ranks(mini, rows, output, number, *more):
    """Stage 1 under DeepSpeed ZeRO-2, begun on so many ranks."""
    argv = stage1(mini, output, "--data_path", rows, "--deepspeed", "zero_configs/zero2.json", *more)
    argv += ["--hacl_representation", "prompt", "--hacl_centre", "True"]
    argv += ["--per_device_train_batch_size", str(8 // number), "--num_train_epochs", str(EPOCHS)]
    return Run(argv, output.with_suffix(".log"), ranks=number)


@pytest.fixture(scope="module")
def two_ranks(mini, rows, tmp_path_factory):
    """What an uninterrupted run on two ranks leaves."""

    def train(folder):
        run = ranks(mini, rows, folder / "whole", 2)
        assert run.ends() == 0, run.said()[-3000:]
        assert run.said().count("engine DeepSpeedEngine ZeRO-2, 2 ranks on cpu") == 1
        return final(folder / "whole")

    return made_once(tmp_path_factory, "uninterrupted", train)


@pytest.mark.distributed
def test_killed_under_deepspeed(mini, rows, two_ranks, tmp_path):
    out, chance = tmp_path / "killed", random.Random(3)
    for _ in range(KILLS // 2):
        seen = steps(out)
        run, until = ranks(mini, rows, out, 2), time.time() + 100
        while steps(out) in (seen, []) and run.running() and time.time() < until:
            time.sleep(0.001)
        time.sleep(chance.random() * 0.1)
        run.kill()
        assert steps(out) and all(not resume.broken(out / f"checkpoint-{n}") for n in steps(out))
    if steps(out)[-1] < 4 * EPOCHS - 1:  # SIGUSR1, as Slurm sends it, to one rank: all save after the same step
        seen = steps(out)
        run = ranks(mini, rows, out, 2, "--dataloader_num_workers", "1")
        while steps(out) == seen:
            assert run.running(), run.said()[-2000:]
            time.sleep(0.001)
        os.kill(run.processes[1].pid, signal.SIGUSR1)
        assert run.ends() in (75, 0) and "Traceback" not in run.said()
    run = ranks(mini, rows, out, 2)
    assert run.ends() == 0, run.said()[-2000:]
    got, losses = final(out)
    assert losses == two_ranks[1] and same(got, two_ranks[0])


@pytest.mark.distributed
def test_two_ranks_then_one_then_four(mini, rows, two_ranks, tmp_path):
    out = tmp_path / "out"
    for number, last in ((2, 3), (1, 5), (4, 4 * EPOCHS)):
        run = ranks(mini, rows, out, number, "--save_total_limit", str(4 * EPOCHS))
        assert run.ends() == 0, run.said()[-2000:]
        for n in steps(out):
            if n > last:
                shutil.rmtree(out / f"checkpoint-{n}")
    assert "warning: 2 ranks then, 1 now" in run.said() and "warning: 1 ranks then, 4 now" in run.said()
    assert "the position in the data" not in run.said()
    (got, losses), (want, expected) = final(out), two_ranks
    assert [x[0] for x in losses] == list(range(1, 4 * EPOCHS + 1)) and losses[:3] == expected[:3]
    if not order_is_of_one_rank():  # else the data comes in another order from step 4 on
        apart = [abs(a[1] - b[1]) / b[1] for a, b in zip(losses, expected)]
        assert max(apart) < 1e-5
        assert all(relative(got[k], want[k]) < 1e-4 for k in want)
