"""States of texts kept on disk are those that the LLM computes, and those of another LLM are never used."""

import json
import sqlite3
import sys

import pytest
import torch
from conftest import arguments, batch_of, load, texts_of, with_texts
from workers import run_ranks

from hacl_llava import fused, representation, resume
from hacl_llava.config import HaclError
from hacl_llava.text_cache import FILE, TextCache

PROMPT = {"representation": "prompt", "prompt": "\nthis in one:"}


class Calls:
    """A pass that notes how many texts it is given each time."""

    def __init__(self, encode):
        self.encode, self.texts = encode, []

    def __call__(self, model, packed):
        self.texts.append(len(packed["end"]))
        return self.encode(model, packed)


def packed_texts(batch):
    captions, hallucinated = texts_of(batch)
    return [*captions, *(h for row in hallucinated for h in row)]


def packed_of(batch, change=lambda texts: texts):
    return with_texts(batch, change(packed_texts(batch)), [])["texts"]


def assert_close(got, want, packed, tolerance=1e-5):
    there = packed["end"] >= 0
    assert got.shape == want.shape and got.dtype == want.dtype and torch.isfinite(got).all()
    assert ((got - want)[there].float().norm(dim=1) <= tolerance * want[there].float().norm(dim=1)).all()


@pytest.mark.parametrize("settings", [{}, PROMPT], ids=["eos", "prompt"])
@pytest.mark.parametrize("passes, dtype", [(fused, None), (representation, None), (fused, torch.bfloat16)], ids=str)
def test_states_are_those_of_the_pass(mini, tmp_path, passes, dtype, settings):
    model, tokenizer = load(mini, dtype=dtype, **settings)
    batch, exact = batch_of(mini, model, tokenizer), 1e-5 if dtype is None else 0.02
    # Of 18 texts: one is missing, one comes three times.
    first = packed_of(batch, lambda texts: [texts[3], None, *texts[2:17], texts[3]])
    want, cache, calls = passes.texts(model, first), TextCache(tmp_path), Calls(passes.texts)
    assert_close(cache.states(model, first, calls), want, first, exact)
    assert calls.texts == [15] and (cache.read, cache.computed) == (0, 15)
    again = TextCache(tmp_path), Calls(passes.texts)
    got = [again[0].states(model, first, again[1]) for _ in range(2)]
    assert_close(got[0], want, first, exact)
    assert torch.equal(*got) and again[1].texts == [4]  # to compare; the second time nothing runs
    assert (again[0].read, again[0].computed) == (30, 0)

    # Some are known, in another order; the texts of another batch are not.
    other = batch_of(mini, model, tokenizer, range(6, 12))
    mixed = packed_of(batch, lambda texts: [packed_texts(other)[0], *texts[::-1], packed_texts(other)[5], None])
    again[1].texts.clear()
    assert_close(again[0].states(model, mixed, again[1]), passes.texts(model, mixed), mixed, exact)
    assert again[1].texts == [5]  # those two, and three that stood in no pass above

    nothing = packed_of(batch, lambda texts: [None] * 6)
    again[1].texts.clear()
    assert torch.isfinite(again[0].states(model, nothing, again[1])).all() and not again[1].texts


def test_step_with_a_cache_is_the_step_without(mini, tmp_path):
    model, tokenizer = load(mini, centre=True)
    batch, steps = batch_of(mini, model, tokenizer), {}
    for name, cache in (("without", None), ("first", TextCache(tmp_path)), ("second", TextCache(tmp_path))):
        model.hacl_text_cache, model.hacl_head.centre = cache, type(model.hacl_head.centre)()
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        steps[name] = [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]
    assert (cache.read, cache.computed) == (18, 0)
    for name in ("first", "second"):
        torch.testing.assert_close(steps[name], steps["without"], rtol=1e-4, atol=1e-6)
    model.eval()
    model(**batch)
    assert cache.read == 18  # it is for training


def test_control_what_another_llm_or_suffix_gives_is_never_used(mini, tmp_path):
    model, tokenizer = load(mini)
    packed = packed_of(batch_of(mini, model, tokenizer))
    TextCache(tmp_path).states(model, packed, fused.texts)

    # Another suffix: not found, and in the same file.
    prompt, _ = load(mini, **PROMPT)
    other, cache = packed_of(batch_of(mini, prompt, tokenizer)), TextCache(tmp_path)
    assert_close(cache.states(prompt, other, fused.texts), fused.texts(prompt, other), other)
    assert (cache.read, cache.computed) == (0, 18)

    # Other weights, also where states hardly differ.
    model.get_model().layers[1].mlp.up_proj.weight.data.mul_(1.0001)
    refused = "its states are of an LLM with other weights.*another folder"
    with pytest.raises(HaclError, match=f"{tmp_path / FILE}: {refused}"):
        TextCache(tmp_path).states(model, packed, fused.texts)
    late, tokenizer = load(mini, start=0.5)  # refused in its first step, in which it asks for no text
    late.load_state_dict(model.state_dict())
    late.hacl_text_cache = TextCache(tmp_path)
    with pytest.raises(HaclError, match=refused):
        late(**batch_of(mini, late, tokenizer))

    def beside_another_run(model, packed):
        TextCache(tmp_path / "late").states(load(mini)[0], packed, fused.texts)
        return fused.texts(model, packed)

    with pytest.raises(HaclError, match=refused):  # the file was empty when the step looked
        TextCache(tmp_path / "late").states(model, packed, beside_another_run)

    # The same weights in another model: here, positions turned by another angle.
    model, _ = load(mini)
    for module in model.modules():
        for name in ("cos_cached", "sin_cached", "inv_freq"):
            if getattr(module, name, None) is not None:
                getattr(module, name).mul_(0.5)
    with pytest.raises(HaclError, match="its states differ from this LLM's by .*allowed 0.001.*another folder"):
        TextCache(tmp_path).states(model, packed, fused.texts)

    half, _ = load(mini, dtype=torch.bfloat16)
    with pytest.raises(HaclError, match="in another precision"):
        TextCache(tmp_path).states(half, packed, fused.texts)
    with pytest.raises(HaclError, match="its states are float32, this LLM's are float64"):
        TextCache(tmp_path).states(load(mini)[0], packed, lambda *args: fused.texts(*args).double())

    model, _ = load(mini, frozen=False)
    with pytest.raises(HaclError, match="an LLM that is frozen"):
        TextCache(tmp_path / "trained").states(model, packed, fused.texts)
    assert not (tmp_path / "trained").exists()


def test_states_that_are_not_finite_are_not_kept(mini, tmp_path):
    model, tokenizer = load(mini)
    packed = packed_of(batch_of(mini, model, tokenizer))

    def overflows(model, packed):
        states = fused.texts(model, packed)
        states[1] = float("inf")
        return states

    assert TextCache(tmp_path).states(model, packed, overflows).isinf().sum() == 64  # the guard sees it
    cache = TextCache(tmp_path)
    assert cache.states(model, packed, fused.texts).isfinite().all() and cache.computed == 1


def cut(file):
    file.write_bytes(file.read_bytes()[:5000])


def overwritten(file):
    file.write_bytes(b"no database at all, " * 999)


def one_bit(file):
    with sqlite3.connect(file) as database:
        (state,) = database.execute("SELECT state FROM states WHERE rowid = 9").fetchone()
        database.execute("UPDATE states SET state = ? WHERE rowid = 9", (state[:100] + b"\x01" + state[101:],))
    database.close()


def no_table(file):
    with sqlite3.connect(file) as database:
        database.execute("DROP TABLE states")
        database.execute("CREATE TABLE states (another)")
    database.close()


@pytest.mark.parametrize("damage", [cut, overwritten, one_bit, no_table])
def test_a_damaged_file_is_refused_by_name(mini, tmp_path, damage):
    model, tokenizer = load(mini)
    packed, cache = packed_of(batch_of(mini, model, tokenizer)), TextCache(tmp_path)
    cache.states(model, packed, fused.texts)
    cache._connection.close()  # so that all is in the one file
    damage(tmp_path / FILE)
    with pytest.raises(HaclError, match=f"{tmp_path / FILE}: .*remove it, and its states are computed anew"):
        TextCache(tmp_path).states(model, packed, fused.texts)


def test_a_full_disk_is_an_error_that_names_the_file(mini, tmp_path):
    model, tokenizer = load(mini)
    packed, cache = packed_of(batch_of(mini, model, tokenizer)), TextCache(tmp_path)
    with cache._database() as database:
        database.execute("PRAGMA max_page_count = 5")  # what SQLite says of it is what it says of a disk
    with pytest.raises(HaclError, match=f"{tmp_path / FILE}: .*full"):
        cache.states(model, packed, fused.texts)


def rank_with_a_cache(rank, world, mini, folder):
    model, tokenizer = load(mini)
    wrapped, cache = torch.nn.parallel.DistributedDataParallel(model), TextCache(folder)
    pairs = [[i, 31 - i] for i in range(16)]
    if rank:
        pairs.reverse()
    batches, found = [batch_of(mini, model, tokenizer, pair) for pair in pairs], []
    for model.hacl_text_cache in (None, cache):
        losses = [wrapped(**batch).loss for batch in batches]
        losses[-1].backward()
        found.append(torch.stack(losses).tolist())
    return *found, cache.computed, cache.read


def test_ranks_share_a_file_and_write_at_the_same_time(mini, tmp_path):
    """In the second half of its batches each rank finds what the other computed in its first."""
    found = run_ranks(rank_with_a_cache, mini, tmp_path)
    distinct = len(distinct_texts(mini))
    with sqlite3.connect(tmp_path / FILE) as database:
        (kept,) = database.execute("SELECT count(*) FROM states").fetchone()
    database.close()
    assert kept == distinct
    for without, with_cache, computed, read in found:
        assert with_cache == pytest.approx(without, abs=1e-5) and computed < distinct and read >= 48


def distinct_texts(mini):
    model, tokenizer = load(mini)
    return {text.numpy().tobytes() for text in packed_texts(batch_of(mini, model, tokenizer, range(32)))}


def test_runs_from_the_command_line(mini, tmp_path, monkeypatch, capsys):
    """Two epochs: the second of the first run, and all of the second run, run no text pass; the losses are the same."""
    from hacl_llava import integration, train

    # isort: split
    import llava.train.train as module

    encode, calls = fused.texts, []
    monkeypatch.setattr(fused, "texts", lambda *args: calls.append(len(args[1]["end"])) or encode(*args))

    def run(name, *more):
        calls.clear()
        argv = arguments(mini, tmp_path / name, "--use_cpu", "True", "--num_train_epochs", "2", *more)
        monkeypatch.setattr(sys, "argv", ["pretrain_hacl.py", *argv])
        status, (out, err) = train.main(), capsys.readouterr()
        assert status == 0, err
        log = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        return out, [x["loss"] for x in log if "loss" in x], calls[1:]  # after the self-check's

    keep = ("--hacl_text_cache", str(tmp_path / "cache"))
    try:
        out, want, passes = run("without")
        assert len(want) == len(passes) == 8 and "HACL texts:" not in out and not (tmp_path / "cache").exists()
        out, losses, first = run("first", *keep)
        assert losses == pytest.approx(want, abs=2e-4)  # the log has four places
        total, distinct = 2 * 32 * 3, len(distinct_texts(mini))
        assert sum(first) == distinct + 4 and f"{distinct} computed" in out and str(tmp_path / "cache") in out
        assert len(first) <= 5  # of the first epoch, and one to compare
        out, losses, second = run("second", *keep, "--seed", "42")
        assert losses == pytest.approx(want, abs=2e-4) and second == [4] and ", 0 computed" in out
        assert total >= int(out.split("HACL texts: ")[1].split()[0]) > total / 2
        (tmp_path / "file").write_text("")
        monkeypatch.setattr(sys, "argv", [*sys.argv, "--hacl_text_cache", str(tmp_path / "file/cache")])
        assert train.main() == 2 and "--hacl_text_cache" in capsys.readouterr().err
    finally:
        resume.SIGNALS.release()
        integration.uninstall(vars(module))
