"""check-data: every case of the table of bad data, and the same checks before and during a run."""

import contextlib
import errno
import json
import math
import os
import re
import shutil
import sys
import tempfile
import types
from pathlib import Path

import bad_data
import pytest
import torch
from bad_data import CASES, make
from conftest import arguments, make_llm_of_today

from hacl_llava import check_data, cli, integration
from hacl_llava.config import HaclError
from hacl_llava.data import (
    BadRecords,
    GuardedDataset,
    HaclCollator,
    HaclDataset,
    entry_of,
    make_plain_data_module,
)
from hacl_llava.run import Run


def command(capsys, *argv):
    """Exit status, stdout and the one line of error, as the command line has them."""
    run, options = cli.parse(["check-data", *map(str, argv)])
    try:
        status, error = run(options), None
    except HaclError as problem:
        status, error = 2, str(problem)
    return status, capsys.readouterr().out, error


@contextlib.contextmanager
def nobody():
    """Permissions hold for everyone but root."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def place():
    """A folder that others than root can look into, too."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


FLAGS = {"fast": ("--fast",), "full": ()}
BEFORE = {"full": "fast", "tokens": "full"}  # the cheaper check, which sees nothing


@pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])
def test_bad_data(case, place, mini, tmp_path, capsys):
    path = make(case, place)
    out, good = tmp_path / "report", tmp_path / "good.json"
    flags = FLAGS.get(case.shown) if case.shown != "tokens" else ("--tokenizer", mini.llm)
    argv = (path, "--images", place / "images", "--version", case.version, "--workers", 1)
    with nobody() if case.name == "no permission" else contextlib.nullcontext():
        found = command(capsys, *argv, *flags) if os.geteuid() else None
    if found is None:
        found = command(capsys, *argv, *flags, "--output", out, "--write", good)
    status, page, error = found
    if case.outcome == "unreadable":
        assert status == 2 and case.message in error and str(path) in error
        assert not out.exists() and not good.exists()
        return
    assert status == (1 if case.outcome == "refused" else 0), page
    if case.outcome == "fine":
        assert "## " not in page
    else:
        line = next(x for x in page.splitlines() if case.message in x)
        name = f"{path}: record 1" + (
            "" if case.name == "no object" else " (id 'good-0')" * (case.name == "duplicate id")
        )
        assert name in line and ("(id 'bad')" in line or case.name in ("no object", "duplicate id"))
        assert page.count("\n- ") == 1  # of the two good records nothing is said
        assert ("## error: " if case.outcome == "refused" else "## warning: ") in page and "What to do: " in page
    if case.shown in BEFORE and case.outcome != "fine":  # control: it takes this check to see it
        assert "## " not in command(capsys, *argv, *FLAGS[BEFORE[case.shown]])[1]
    if out.exists():
        assert sorted(p.name for p in tmp_path.iterdir()) == ["good.json", "report"]
        assert sorted(p.name for p in out.iterdir()) == ["bad_records.jsonl", "report.json", "report.md"]
        report = json.loads((out / "report.json").read_text())
        assert (report["records"], report["usable"]) == (3, 3 - status)
        listed = [json.loads(x) for x in (out / "bad_records.jsonl").read_text().splitlines()]
        assert [x["index"] for x in listed] == [1] * (case.outcome != "fine")
        assert len(json.loads(good.read_text())) == 3 - status
        with pytest.raises(AssertionError) if case.outcome == "warned" else contextlib.nullcontext():
            assert "## " not in command(capsys, good, *argv[1:], *flags)[1]


def test_the_table_is_long_and_the_page_prints_it():
    assert len({c.name for c in CASES}) == len(CASES) >= 40
    assert bad_data.page(bad_data.PAGE.read_text()) == bad_data.PAGE.read_text()
    assert {c.outcome for c in CASES} == set(bad_data.OUTCOMES) and {c.shown for c in CASES} == set(bad_data.SHOWN)


# --- the same cases through LLaVA's own code --------------------------------------------------------------------------

# LLaVA gets through these; they are refused for what they do.
HARMFUL = {
    "unknown role": "plain looks at no role, HACL finds no caption",
    "answer before question in plain": "LLaVA trains the question",
    "nothing in it": "only --group_by_modality_length ends there",
    "link to a file outside": "it shows what is outside",
    "<image> without an image": "trained as text alone",
    "1 pixel high": "",  # as of transformers 5
    "1 pixel": "",
    "half a surrogate pair in a hallucinated caption": "its tokens are made of what is left",
}


@pytest.fixture(scope="module")
def setup(mini):
    from conftest import load

    return load(mini)


@pytest.fixture
def template():
    from llava import conversation as library

    before = library.default_conversation
    yield lambda name: setattr(library, "default_conversation", library.conv_templates[name])
    library.default_conversation = before


def dataset(kind, path, images, setup, **more):
    model, tokenizer = setup
    data_args = types.SimpleNamespace(
        is_multimodal=True, image_folder=str(images), image_processor=model.get_vision_tower().image_processor,
        image_aspect_ratio="pad" if more.pop("pad", False) else "square", mm_use_im_start_end=False, **more,
    )  # fmt: skip
    return kind(str(path), tokenizer, data_args)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.outcome != "unreadable" and c.name != "no permission"], ids=lambda c: c.name
)
def test_llava_itself_cannot_use_what_is_refused_and_can_use_the_rest(case, tmp_path, setup, template, capsys):
    path, listed = make(case, tmp_path), tmp_path / "bad_records.jsonl"
    template(case.version)
    data = dataset(
        HaclDataset, path, tmp_path / "images", setup, hacl_bad_records=str(listed), pad=case.version == "v1"
    )
    items = [data[i] for i in range(3)]
    batch = HaclCollator(setup[1])(items)
    assert batch["images"].shape[0] == 3 and len({x["hallucinated_ids"].__len__() for x in items}) == 1
    masked = [(x["labels"] == -100).all().item() for x in items]
    assert not masked[0] and not masked[2]
    entries = [json.loads(x) for x in listed.read_text().splitlines()] if listed.exists() else []
    if case.outcome == "refused" and case.name not in HARMFUL:
        assert masked[1] and [(e["index"], e["when"]) for e in entries] == [(1, "training")]
        assert not items[1]["image"].any() and items[1]["caption_ids"] is None
        assert "a masked row is trained in its place (1 of at most 100" in capsys.readouterr().err
    elif case.outcome != "refused":
        assert not entries


# --- a masked row -----------------------------------------------------------------------------------------------------


def test_the_list_has_each_record_once_and_a_bound(tmp_path, capsys, monkeypatch):
    listed = BadRecords(tmp_path / "out/bad_records.jsonl", limit=2)
    entries = [entry_of("a.json", i, {"id": f"x{i}", "image": "a.png"}, "is bad", "training") for i in range(3)]
    listed.replace([entry_of("a.json", 9, "text", "is bad", "start")])
    listed.add(entries[0])
    listed.add(entries[0])
    with open(listed.path, "ab") as file:
        file.write(b'{"file": "a.js')  # a kill, or a full disk
    BadRecords(listed.path, limit=2).add(entries[1])  # of another process
    assert [(e["index"], e["when"]) for e in listed.read()] == [(9, "start"), (0, "training"), (1, "training")]
    with pytest.raises(HaclError, match=r"a.json: record 2 \(id 'x2'\): is bad. 2 records .* --hacl_max_failed is 2"):
        listed.add(entries[2])
    listed.add(entries[1])  # known
    listed.replace([])
    assert not os.path.exists(listed.path)

    def write(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", write)
    full = BadRecords(tmp_path / "bad_records.jsonl", limit=1)  # training goes on, and counts
    full.add(entries[0])
    full.add(entries[0])
    assert capsys.readouterr().err.count("cannot be written") == 1
    with pytest.raises(HaclError, match="1 records have failed"):
        full.add(entries[1])


@pytest.mark.parametrize("version", ["plain", "v1"])
def test_guarded_batches_equal_llavas_own(mini, setup, template, version):
    import llava.train.train as stock

    template(version)
    model, tokenizer = setup
    guarded = dataset(GuardedDataset, mini.data, mini.images, setup)
    own = dataset(stock.LazySupervisedDataset, mini.data, mini.images, setup)
    got = make_plain_data_module(tokenizer, guarded_arguments(guarded, mini))
    batch = got["data_collator"]([got["train_dataset"][i] for i in (3, 1, 2)])
    want = stock.DataCollatorForSupervisedDataset(tokenizer)([own[i] for i in (3, 1, 2)])
    assert batch.pop("record_indices").tolist() == [3, 1, 2]
    assert set(batch) == set(want) and all(torch.equal(batch[k], want[k]) for k in want)
    assert guarded.modality_lengths == own.modality_lengths and len(guarded) == len(own)


def guarded_arguments(data, mini):
    return types.SimpleNamespace(**vars(data.data_args), data_path=str(mini.data))


@pytest.mark.parametrize("fused", [True, False])
def test_a_batch_of_masked_rows_has_loss_zero_and_finite_gradients(mini, setup, tmp_path, records, fused):
    from conftest import gradients, load

    model, tokenizer = load(mini, fused=fused)
    (tmp_path / "data.json").write_text(json.dumps([{**r, "image": "nowhere.png"} for r in records[:2]]))
    data = dataset(
        HaclDataset, tmp_path / "data.json", mini.images, setup, hacl_bad_records=str(tmp_path / "bad.jsonl")
    )
    batch = HaclCollator(tokenizer)([data[0], data[1]])
    loss = model(**batch).loss
    loss.backward()
    found = gradients(model)
    assert loss.item() == 0 and found and all(not g.any() for g in found.values())


def test_a_share_that_vanishes_ends_the_run(mini, setup, tmp_path, records):
    """A hundred failures may be a few of 558k records, or all there are: an image folder that has gone."""
    rows = [{**r, "image": "nowhere.png"} for r in (*records, *records)[:50]]
    (tmp_path / "data.json").write_text(json.dumps([*records[:10], *rows]))
    listed = tmp_path / "bad.jsonl"
    data = dataset(HaclDataset, tmp_path / "data.json", mini.images, setup, hacl_bad_records=str(listed))
    with pytest.raises(HaclError, match="20 of the 30 records that a process has read failed, .*--image_folder"):
        for i in range(60):
            data[i]
    assert len(listed.read_text().splitlines()) == 20
    listed.unlink()
    data = dataset(HaclDataset, tmp_path / "data.json", mini.images, setup, hacl_bad_records=str(listed))
    for i in range(40):  # half of them
        data[10 + i // 2 if i % 2 else i % 10]


def test_a_masked_row_changes_nothing_for_the_others(mini, setup, tmp_path, records):
    """Loss and gradients of a batch with a masked row are those of the batch without it."""
    from conftest import gradients, load, relative

    model, tokenizer = load(mini)
    rows = [{**r, "image": "nowhere.png"} if i == 1 else r for i, r in enumerate(records[:4])]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    data = dataset(
        HaclDataset, tmp_path / "data.json", mini.images, setup, hacl_bad_records=str(tmp_path / "bad.jsonl")
    )
    found = []
    for take in ((0, 1, 2, 3), (0, 2, 3), (0, 2)):
        model.zero_grad()
        loss = model(**HaclCollator(tokenizer)([data[i] for i in take])).loss
        loss.backward()
        found.append((loss.item(), gradients(model)))
    (loss, got), (want_loss, want), (other, _) = found
    assert abs(loss - want_loss) < 1e-5 < abs(loss - other)  # control: another batch has another loss
    assert all(relative(got[k], want[k]) < 1e-4 for k in want)


# --- before and during a run ------------------------------------------------------------------------------------------


@pytest.fixture
def train_module(template):
    from hacl_llava import compat, integration  # noqa: F401

    # isort: split
    import llava.train.train as module

    yield module
    integration.uninstall(vars(module))


def train(monkeypatch, capsys, mini, output, *more, stage=1):
    """(status, stdout, stderr, losses) of a run in this process."""
    from hacl_llava.train import main

    argv = [*arguments(mini, output, "--use_cpu", "True"), *map(str, more)]
    if stage == 2:
        argv[argv.index("--tune_mm_mlp_adapter") + 1] = "False"
        argv[argv.index("--version") + 1] = "v1"
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    status = main(stage)
    out, err = capsys.readouterr()
    state = output / "trainer_state.json"
    log = json.loads(state.read_text())["log_history"] if state.exists() else []
    return status, out, err, [x["loss"] for x in log if "loss" in x]


@pytest.fixture
def some(mini, tmp_path, records):
    """Eight records: 2 has no caption form, 5 no image file, 6 an image that is none."""
    rows = [dict(r) for r in records[:8]]
    (mini.images / "page.png").write_text("<html>")
    rows[2]["conversations"] = []
    rows[5]["image"] = "nowhere.png"
    rows[6]["image"] = "page.png"
    path = tmp_path / "some.json"
    path.write_text(json.dumps(rows))
    return path, rows


def listed(output):
    file = output / "bad_records.jsonl"
    return [json.loads(x) for x in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.parametrize("stage, use_hacl", [(1, True), (1, False), (2, False)])
def test_refused_before_anything_is_loaded(monkeypatch, capsys, mini, tmp_path, some, train_module, stage, use_hacl):
    monkeypatch.setattr(train_module.transformers, "AutoTokenizer", None)  # would fail in another way
    (tmp_path / "out").mkdir()
    (tmp_path / "out/bad_records.jsonl").write_text("of an earlier run")
    flags = ("--data_path", some[0], "--use_hacl", use_hacl)
    status, _, err, _ = train(monkeypatch, capsys, mini, tmp_path / "out", *flags, stage=stage)
    line = next(x for x in err.splitlines() if x.startswith("error: "))
    assert status == 2 and f"{some[0]}: record 2 (id 'train-000000002') has no 'conversations'" in line
    assert "2 of 8 records cannot be used. Repair or remove them (hacl-llava check-data" in line
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["bad_records.jsonl"]
    status, _, err, _ = train(
        monkeypatch, capsys, mini, tmp_path / "out", *flags, "--hacl_check_data", "full", stage=stage
    )
    assert status == 2 and "3 of 8 records cannot be used" in err


def test_skipped_records_are_left_out_and_listed(monkeypatch, capsys, mini, tmp_path, some, train_module):
    """The run is that on the good records alone, bit for bit; what fails later is a masked row, and listed once."""
    path, rows = some
    flags = ("--hacl_bad_records", "skip", "--per_device_train_batch_size", "2", "--use_hacl", "False")
    status, out, _, losses = train(
        monkeypatch, capsys, mini, tmp_path / "full", "--data_path", path, "--hacl_check_data", "full", *flags
    )
    assert status == 0 and "3 of 8 records are left out" in out
    problems = {e["index"]: (e["when"], e["problem"]) for e in listed(tmp_path / "full")}
    assert {i: when for i, (when, _) in problems.items()} == {2: "start", 5: "start", 6: "start"}
    assert "nowhere.png, which does not exist" in problems[5][1]
    good = tmp_path / "good.json"
    good.write_text(json.dumps([r for i, r in enumerate(rows) if i not in problems]))
    status, out, _, want = train(monkeypatch, capsys, mini, tmp_path / "good", "--data_path", good, *flags)
    assert status == 0 and losses == want and len(want) == 3 and "HACL" not in out and not listed(tmp_path / "good")
    projectors = [torch.load(tmp_path / n / "mm_projector.bin", weights_only=True) for n in ("full", "good")]
    assert all(torch.equal(projectors[0][k], projectors[1][k]) for k in projectors[0])
    status, _, err, fast = train(
        monkeypatch, capsys, mini, tmp_path / "fast", "--data_path", path, *flags, "--num_train_epochs", "2"
    )
    assert status == 0 and len(fast) == 6 and all(math.isfinite(x) for x in fast)
    assert [(e["index"], e["when"]) for e in listed(tmp_path / "fast")] == [(2, "start"), (5, "start"), (6, "training")]
    assert err.count("a masked row is trained in its place (1 of at most 100") == 1


@pytest.mark.e2e
@pytest.mark.parametrize("stage, use_hacl", [(1, True), (1, False), (2, False)])
def test_batches_of_masked_rows_in_a_run(monkeypatch, capsys, mini, tmp_path, some, train_module, stage, use_hacl):
    """One row a batch, nothing checked at start: three losses of 0, none that is NaN, and workers that list."""
    flags = ("--data_path", some[0], "--use_hacl", use_hacl, "--hacl_check_data", "off")
    flags += ("--per_device_train_batch_size", "1", "--dataloader_num_workers", "2")
    status, _, err, losses = train(monkeypatch, capsys, mini, tmp_path / "out", *flags, stage=stage)
    assert status == 0, err
    assert sum(x == 0 for x in losses) == 3 and all(math.isfinite(x) for x in losses) and len(losses) == 8
    assert sorted(e["index"] for e in listed(tmp_path / "out")) == [2, 5, 6]
    status, _, err, _ = train(
        monkeypatch, capsys, mini, tmp_path / "more", *flags, "--hacl_max_failed", "2", stage=stage
    )
    assert status == 2 and "--hacl_max_failed is 2" in err and len(listed(tmp_path / "more")) == 2


def test_a_run_that_goes_on_leaves_out_what_it_left_out(tmp_path, some, mini, capsys):
    """Its order must stay: what has been mended since stays out, and what has gone bad since is masked."""
    from hacl_llava.config import RunSettings

    path, rows = some
    output = tmp_path / "out"
    model = types.SimpleNamespace(version="plain", model_name_or_path=str(mini.llm), vision_tower=str(mini.clip))
    training = types.SimpleNamespace(output_dir=str(output), model_max_length=512)

    def start(policy="skip"):
        data = types.SimpleNamespace(
            data_path=str(path), image_folder=str(mini.images), image_aspect_ratio="square",
            hacl_run=RunSettings(bad_records=policy),
        )  # fmt: skip
        check_data.check_before_run(Run(model, data, training))
        return data.hacl_left_out

    assert start() == {2, 5}
    (output / "checkpoint-1").mkdir()
    rows[5]["image"], rows[7]["image"] = rows[0]["image"], "gone.png"
    path.write_text(json.dumps(rows))
    assert start() == {2, 5} and "1 records have gone bad since the run began" in capsys.readouterr().out
    with pytest.raises(HaclError, match="2 of 8 records cannot be used"):
        start("refuse")
    (output / "checkpoint-1").rmdir()
    assert start() == {2, 7}
    path.write_text(json.dumps([rows[2], rows[7]]))
    with pytest.raises(HaclError, match="2 of 2 records cannot be used"):
        start()


@pytest.mark.distributed
def test_two_ranks_leave_out_the_same_and_stay_in_step(mini, tmp_path, some):
    """ZeRO-3, one row a rank and batch, an image that fails while training: the other rank waits for every module."""
    from test_e2e import log_of
    from workers import trained

    argv = [
        *("--deepspeed", "zero_configs/zero3.json"),
        *arguments(mini, tmp_path / "out", "--data_path", some[0], "--hacl_bad_records", "skip", "--bf16", "True"),
        *("--per_device_train_batch_size", "1", "--hacl_negatives", "global", "--dataloader_num_workers", "1"),
    ]
    said = trained(argv, tmp_path / "log", ranks=2)
    assert "2 of 8 records are left out" in said and "HACL data: 6 records, 6 with an image" in said
    assert [(e["index"], e["when"]) for e in listed(tmp_path / "out")] == [(2, "start"), (5, "start"), (6, "training")]
    assert len(log_of(tmp_path / "out")) == 3


@pytest.mark.e2e
def test_several_processes_find_what_one_finds(tmp_path, capsys):
    """And the command as users give it, over more images than one chunk."""
    from PIL import Image

    rows = [bad_data.record(i, image=f"{i}.png") for i in range(400)]
    for i in range(400):
        Image.new("RGB", (8, 8), (i % 256, 0, 0)).save(tmp_path / f"{i}.png")
    for i in (3, 199, 399):
        (tmp_path / f"{i}.png").write_text("no image")
    (tmp_path / "data.json").write_text(json.dumps(rows))
    found = [check_data.find(rows, str(tmp_path), True, full=True, workers=n) for n in (1, 2)]
    assert found[0] == found[1] and [f.index for f in found[0]] == [3, 199, 399]
    status, page, _ = command(capsys, tmp_path / "data.json", "--images", tmp_path, "--workers", 2)
    assert status == 1 and "**397 can be used, 3 cannot.**" in page


@pytest.mark.parametrize(
    "argv, message",
    [
        (("data.json", "--write", "data.json"), "is the file that is read"),
        (("data.json", "--images", "nowhere"), "--images nowhere: is no folder"),
        (("data.json", "--images", "images", "--tokenizer", "nowhere"), "nowhere: its tokenizer cannot be loaded"),
        (("data.json", "--images", "images", "--fast", "--output", "data.json"), "cannot be written"),
    ],
)
def test_what_cannot_be_checked(tmp_path, capsys, monkeypatch, argv, message):
    make(CASES[-1], tmp_path)
    monkeypatch.chdir(tmp_path)
    status, _, error = command(capsys, *argv)
    assert status == 2 and message in error


# --- check-data --run, and templates that do not fit ------------------------------------------------------------------

CHATML = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "chat_template": "{{ '<|im_start|>' + messages }}"}
LLAMA_3 = {"chat_template": "{{ '<|start_header_id|>' + messages }}"}


def chatml(mini, folder):
    return make_llm_of_today(mini, folder, ("<|im_start|>", "<|im_end|>", "<|reserved_0|>"), **CHATML)


def of_stage(stage, mini, output, *more):
    """The arguments of a training; the last of two that are the same counts."""
    argv = arguments(mini, output, *map(str, more))
    if stage == 2:
        torch.save(
            {
                f"model.mm_projector.{i}.{n}": torch.zeros(64, *(64,) * (n == "weight"))
                for i in (0, 2)
                for n in ("weight", "bias")
            },
            mini.folder / "mm_projector.bin",
        )
        argv[argv.index("--tune_mm_mlp_adapter") + 1] = "False"
        argv += ["--pretrain_mm_mlp_adapter", str(mini.folder / "mm_projector.bin")]
        if "--version" not in map(str, more):
            argv += ["--version", "v1"]
    return argv


@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_that_is_fine_is_rehearsed(mini, tmp_path, capsys, train_module, stage):
    script = ("scripts/pretrain_hacl.py", "--deepspeed", "zero_configs/zero2.json") if stage == 1 else ()
    argv = (*script, *of_stage(stage, mini, tmp_path / "out", "--bf16", "True"))
    before = dict(os.environ)
    status, page, error = command(capsys, "--workers", 1, "--output", tmp_path / "report", "--run", *argv)
    assert (status, error) == (0, None) and "**32 can be used, 0 cannot.**" in page and "## " not in page
    assert f"for the template {'plain' if stage == 1 else 'v1'}; every image was opened" in page
    assert json.loads((tmp_path / "report/report.json").read_text())["problems"] == []
    assert (
        os.environ == before and not (tmp_path / "out").exists() and train_module.ModelArguments.__mro__[1] is object
    )  # as it was


def test_the_shapes_of_mix665k_are_fine(mini, records, tmp_path, capsys, train_module):
    """Turns about an image of one of several folders, short answers, boxes, and text alone (ShareGPT's, long)."""
    for folder in ("coco/train2017", "ocr_vqa/images", "vg/VG_100K_2"):
        (tmp_path / folder).mkdir(parents=True)
        shutil.copy(mini.images / records[0]["image"], tmp_path / folder / "000000033471.png")

    def talk(folder, *texts):
        turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
        image = {"image": f"{folder}/000000033471.png"} if folder else {"model": ""}
        return {**image, "conversations": turns}

    short = "\nAnswer the question using a single word or phrase."
    region = "\nPlease provide a short description for this region: [0.33, 0.08, 0.78, 1.0]."
    rows = [
        talk("coco/train2017", "<image>\nWhat is it?", "A bus.", "Why?", "I see it."),
        talk("ocr_vqa/images", f"<image>\nWho wrote it?{short}", "A. Writer", f"Is it new?{short}", "No"),
        talk("vg/VG_100K_2", f"<image>{region}", "red ring", region, "a sky"),
        talk("coco/train2017", "What is there?\n<image>", "A cat."),
        talk(None, "Write code:\n```\n<b>x</b>\n```", "```python\nprint('\u00e9\u4e2d')\n```", "Thanks", "\U0001f642"),
        talk(None, "Say a lot.", "word " * 3000),
    ]
    path = tmp_path / "mix.json"
    path.write_text(json.dumps([{"id": f"{i:012d}", **row} for i, row in enumerate(rows)]))
    argv = of_stage(
        2, mini, tmp_path / "out", "--data_path", path, "--image_folder", tmp_path, "--image_aspect_ratio", "pad"
    )
    argv += ["--model_max_length", "2048", "--group_by_modality_length", "True"]
    status, page, error = command(capsys, "--run", *argv)
    assert (status, error) == (0, None) and "**6 can be used, 0 cannot.**" in page
    assert [line for line in page.splitlines() if line.startswith("## ")] == ["## warning: long (1)"], page


def test_every_problem_of_a_run_is_named(mini, tmp_path, capsys, train_module, some):
    """And the run itself is refused for the first of them."""
    llm = chatml(mini, tmp_path / "llm")
    torch.save({"model.mm_projector.weight": torch.zeros(64, 64)}, tmp_path / "other.bin")
    flags = ("--pretrain_mm_mlp_adapter", tmp_path / "other.bin", "--image_folder", "nowhere", "--data_path", some[0])
    argv = of_stage(2, mini, tmp_path / "out", "--model_name_or_path", llm, *flags, "--deepspeed", "no.json")
    argv += ["--pretrain_mm_mlp_adapter", str(tmp_path / "other.bin")]
    status, page, _ = command(capsys, "--run", *argv)
    assert status == 2
    for said in (
        "- --deepspeed no.json: is no file",
        "other.bin: holds a projector that is linear; --mm_projector_type is mlp2x_gelu",
        "- --image_folder nowhere: is no folder",
        "- none of 7 records that were looked at has a label: the first is masked whole by LLaVA (token",
        "Give --version chatml_direct, for the tokenizer is of ChatML (it is v1)",
        "record 2 (id 'train-000000002') has no 'conversations'",
    ):
        assert said in page, page
    assert "missing" not in page  # of images nothing is said where there is no folder
    status, page, _ = command(capsys, "--run", *of_stage(1, mini, tmp_path / "out", "--data_path", some[0]))
    assert status == 1 and "**5 can be used, 3 cannot.**" in page and "refused" not in page
    status, page, _ = command(
        capsys, "--run", *of_stage(1, mini, tmp_path / "out", "--data_path", tmp_path / "no.json")
    )
    assert status == 2 and "no.json: cannot be read" in page
    status, page, _ = command(capsys, "--run", "--version", "plain", "--model_name_or_path", llm, "--output_dir", "x")
    assert status == 2 and "--data_path is missing" in page and "give --vision_tower" in page


@pytest.mark.parametrize(
    "argv, message",
    [
        ((), "there is nothing to look at: give a JSON, or --run"),
        (("x.json", "--images", "y", "--run", "--version", "v1"), "JSON, --images: not beside --run"),
        (("--tokenizer", "y", "--run", "--version", "v1"), "--tokenizer: not beside --run"),
        (
            ("--run", "--no_such_flag", "3", "--output_dir", "x"),
            "--run: .+no_such_flag.+give the arguments of a training",
        ),
        (("--run", "--num_train_epochs", "many"), "^--run: argument --num_train_epochs.+invalid float value"),
    ],
)
def test_what_is_no_run_is_refused(capsys, argv, message):
    status, _, error = command(capsys, *argv)
    assert status == 2 and re.search(message, error), error


def test_a_sample_of_which_more_than_half_does_not_fit_the_template_is_refused(monkeypatch, mini, tmp_path, capsys):
    """One half is trained on, and said: rows of odd words are masked in stock LLaVA, too."""
    (tmp_path / "x.json").write_text("[]")
    argv = of_stage(2, mini, tmp_path / "out", "--data_path", tmp_path / "x.json")
    asked = integration.run_of(list(map(str, argv)))
    bad = [("masked", "record 0: tokenization mismatch: 3 vs. 4")]
    monkeypatch.setattr(check_data.TokenCheck, "__call__", lambda self, record: bad if record else [])
    assert check_data._without_labels([1, 0], [0, 1], asked) is None
    assert "1 of 2 records of a sample have no label" in capsys.readouterr().out
    refused = str(check_data._without_labels([1, 1, 0], [0, 1, 2], asked))
    assert "2 of 3 records that were looked at have no label" in refused and "--model_max_length" in refused


def test_a_tokenizer_without_eos_or_with_tokens_beyond_the_embedding(mini, tmp_path):
    folder = shutil.copytree(mini.llm, tmp_path / "llm")
    with pytest.raises(HaclError, match=r"tokenizer's eos \(2\) are beyond the model's 2 rows"):
        check_data.TokenCheck(str(folder), "plain", 512, rows=2)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            values = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps({**values, "eos_token": None}))
    with pytest.raises(HaclError, match="has no EOS token, with which captions end"):
        check_data.TokenCheck(str(folder), "plain", 512)


def test_chatml_and_a_tokenizer_without_bos(monkeypatch, capsys, mini, tmp_path, train_module):
    """LLaVA loses count of its tokens and masks every row; here answers are learnt, and v1 is refused by name."""
    llm = chatml(mini, tmp_path / "llm")
    flags = ("--model_name_or_path", llm, "--max_steps", "2")
    status, out, err, losses = train(
        monkeypatch, capsys, mini, tmp_path / "out", *flags, "--version", "chatml_direct", stage=2
    )
    assert status == 0, err
    assert "LLaVA loses count of this tokenizer's tokens" in out and "no label" not in out and min(losses) > 1
    assert json.loads((tmp_path / "out/config.json").read_text())["hacl_version"] == "chatml_direct"
    status, _, err, _ = train(monkeypatch, capsys, mini, tmp_path / "v1", *flags, "--version", "v1", stage=2)
    assert status == 2 and "none of 32 records that were looked at has a label" in err
    assert "Give --version chatml_direct, for the tokenizer is of ChatML (it is v1)" in err
    other = make_llm_of_today(mini, tmp_path / "llama3", ("<|start_header_id|>", "<|reserved_0|>"), **LLAMA_3)
    status, _, err, _ = train(
        monkeypatch, capsys, mini, tmp_path / "v1", "--model_name_or_path", other, "--version", "v1", stage=2
    )
    assert status == 2 and "The tokenizer's chat template is Llama-3's, for which this LLaVA has none" in err
